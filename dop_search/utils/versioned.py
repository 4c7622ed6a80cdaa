"""JSON files that say what they are: a format and a version, and one wording for a file that is something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dop_search.utils.errors import CacheError, DopError
from dop_search.utils.files import write_text_atomic


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        what: in words with the article, e.g. ``a profile``.
        name: stands in the file under ``format``.
        version: the one that this code writes and reads.
        remedy: what to do about a file that is no such file.
        error: what is raised then.
        oldest: the first version that this code still reads; ``None``: only the one that it writes.
    """

    what: str
    name: str
    version: int
    remedy: str
    error: type[DopError] = CacheError
    oldest: int | None = None

    @property
    def stamp(self) -> dict[str, Any]:
        """The first keys of such a file."""
        return {"format": self.name, "version": self.version}

    def read(self, path: str | Path) -> dict[str, Any]:
        """The content of a file of this format and version.

        Raises:
            DopError: of the type :attr:`error`, naming the file, what was found and expected, and the remedy.
        """
        file = Path(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise self.error(f"there is no {self.what.partition(' ')[2]} at {str(file)!r}; {self.remedy}") from error
        except OSError as error:
            raise self.error(f"cannot read {self.what} from {str(file)!r}: {error.strerror}; {self.remedy}") from error
        except (ValueError, RecursionError) as error:
            raise self.error(f"{str(file)!r} is not a JSON file ({error}); {self.remedy}") from error
        return self.check(data, repr(str(file)))

    def check(self, data: Any, where: str = "the object") -> dict[str, Any]:
        """``data`` if it has this format and version; see :meth:`read`."""
        if not isinstance(data, dict):
            raise self.error(f"{where} is not {self.what}: it holds {data!r:.60}, not an object; {self.remedy}")
        versions = range(self.version if self.oldest is None else self.oldest, self.version + 1)
        for key, read in (("format", [self.name]), ("version", versions)):
            if data.get(key) not in read:
                found = f"its {key} is {data.get(key)!r}, but this dop-search reads {' or '.join(map(repr, read))}"
                known = " or ".join(map(str, versions))
                raise self.error(f"{where} is not {self.what} of version {known}: {found}; {self.remedy}")
        return data


def write_json(path: str | Path, data: Mapping[str, Any], indent: int | None = 2, **options: Any) -> None:
    """Write ``data`` as JSON with a newline at the end, atomically; ``options`` are those of ``json.dumps``."""
    write_text_atomic(Path(path), json.dumps(data, indent=indent, **options) + "\n")
