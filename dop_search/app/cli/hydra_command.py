"""What the commands that Hydra composes have in common: exit statuses, errors without a traceback, the last lines."""

from __future__ import annotations

import errno
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from dop_search.utils.conf import config_dir
from dop_search.utils.errors import ConfigError, DopError
from dop_search.utils.extras import check_extras
from dop_search.utils.files import cannot_write

log = logging.getLogger(__name__)

_CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""A disk that is full or read-only."""
_OBJECTS_BETWEEN_COLLECTIONS = 20_000
"""Python's 700 make it look for garbage three thousand times among the million objects that imports leave: a second."""
LAUNCHER_EXTRAS = {"hydra/launcher=slurm": "slurm", "hydra/launcher=ray_gpu": "ray"}
"""Overrides that Hydra cannot compose without an extra of this package."""


def run_command(name: str, config_name: str, job: Callable[[DictConfig, Path], None]) -> None:
    """Compose the configuration and run ``job`` with it and the run directory, or with ``-m`` once per combination.

    A :class:`DopError` is shown without a traceback (``HYDRA_FULL_ERROR=1`` shows it). Exit status 1 on a user's error,
    130 on Ctrl-C.
    """
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    flags = set(sys.argv[1:])
    if flags & {"-m", "--multirun"} and (shown := sorted(flags & {"--cfg", "-c", "--info", "-i", "--run", "-r"})):
        sys.exit(f"{name}: {shown[0]} goes with one configuration, -m with many; leave one of them out")
    try:
        directory = config_dir()
        for override in LAUNCHER_EXTRAS.keys() & set(sys.argv):
            check_extras(override, LAUNCHER_EXTRAS[override])
        check_choices(sys.argv[1:], directory)
    except DopError as error:
        sys.exit(f"{name}: {error}")

    def task(composed: DictConfig) -> None:
        try:
            job(composed, Path(HydraConfig.get().runtime.output_dir))
        except DopError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                log.error("%s", error)  # Hydra runs the rest of the sweep and reports only the first error, at the end
            raise CompactHydraException(f"{name}: {error}") from error
        except OSError as error:  # of a library that writes by itself
            if error.errno not in _CANNOT_WRITE:
                raise
            raise CompactHydraException(f"{name}: {cannot_write(Path(error.filename or '.'), error)}") from error

    try:
        hydra.main(version_base="1.3", config_path=str(directory), config_name=config_name)(task)()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


def check_choices(arguments: Sequence[str], directory: Path) -> None:
    """Refuse, by ConfigError, ``model=null`` and the like, which end in a traceback of Hydra's or choose nothing."""
    groups = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in directory.iterdir()}
    for argument in arguments:
        group = argument.partition("=")[0]
        if "=" not in argument or not groups.get(group):
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue  # Hydra says itself what is wrong
        if not override.is_sweep_override() and not isinstance(override.value(), (str, QuotedString)):
            raise ConfigError(
                f"{argument!r} must choose one of {', '.join(groups[group])}; a key of the group is set by {group}.KEY="
            )


def print_end(tables: list[object], lines: list[str], ui_command: str | None) -> None:
    """The tables of a result, where everything lies, and how to compare runs."""
    console = Console()
    console.print()
    for table in tables:
        console.print(table)
        console.print()
    if ui_command is not None:
        lines = [*lines, f"Compare:  {ui_command}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
