"""Pin every package that uv resolves for this project: names and versions, no addresses.

    python .ci/pins.py              # after a change of the dependencies: pins what is new, keeps the rest
    python .ci/pins.py --upgrade    # the newest version of everything

One resolution covers every supported Python and platform; a version that differs between them has a marker. uv reads
the pins in pyproject.toml without a flag (``[tool.uv]``), pip reads them by ``pip install -c .ci/constraints.txt``.
To move one package, edit its line in pyproject.toml and run the first command. Needs ``uv`` on PATH.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
KEYS = {"constraint-dependencies": "--all-groups", "build-constraint-dependencies": "--only-group=build"}
"""The list of ``[tool.uv]``, and which part of the resolution it holds."""


def main() -> None:
    """Resolve, and write the pins into pyproject.toml and the constraints file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="forget the pins that are there")
    options = parser.parse_args()
    text = PYPROJECT.read_text()
    pins = resolve(with_pins(text, {key: [] for key in KEYS}) if options.upgrade else text)
    PYPROJECT.write_text(with_pins(text, pins))
    CONSTRAINTS.write_text("\n".join(["# Written by .ci/pins.py.", *pins["constraint-dependencies"]]) + "\n")
    print(f"{len(pins['constraint-dependencies'])} pins")


def resolve(pyproject: str) -> dict[str, list[str]]:
    """What uv resolves for the project that the text describes: requirements ``NAME==VERSION[ ; MARKER]`` per list."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(pyproject)
        subprocess.run(["uv", "lock", "--quiet", "--project", folder], check=True)
        return {key: _exported(folder, groups) for key, groups in KEYS.items()}


def _exported(folder: str, groups: str) -> list[str]:
    extras = ["--all-extras"] if groups == "--all-groups" else []
    plain = ["--no-emit-project", "--no-hashes", "--no-annotate", "--no-header", "--quiet"]
    command = ["uv", "export", "--frozen", "--project", folder, groups, *extras, *plain]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def with_pins(pyproject: str, pins: dict[str, list[str]]) -> str:
    """The text with other lists of pins.

    Raises:
        ValueError: the text lacks one of the lists, or has it twice.
    """
    for key, requirements in pins.items():
        lines = "".join(f"    {json.dumps(requirement)},\n" for requirement in requirements)
        pattern = re.compile(rf"^{key} = \[\n.*?^\]\n", re.MULTILINE | re.DOTALL)
        pyproject, count = pattern.subn(lambda _, key=key, lines=lines: f"{key} = [\n{lines}]\n", pyproject)
        if count != 1:
            raise ValueError(f"pyproject.toml must have `{key} = [` and `]` on lines of their own once, has {count}")
    return pyproject


if __name__ == "__main__":
    main()
