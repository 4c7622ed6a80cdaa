"""Where the configuration files are: inside an installed package, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

from dop_search.utils.errors import ConfigError

CONFIG_NAME = "config"
"""The primary config: ``conf/config.yaml``."""

_PACKAGE = Path(__file__).resolve().parents[1]


def config_dir() -> Path:
    """The folder with the Hydra groups; ConfigError if it is in neither place."""
    candidates = (_PACKAGE / "conf", _PACKAGE.parent / "conf")
    for path in candidates:
        if (path / f"{CONFIG_NAME}.yaml").is_file():
            return path
    places = " nor ".join(repr(str(path)) for path in candidates)
    raise ConfigError(f"no `{CONFIG_NAME}.yaml` in {places}; reinstall dop-search, or run it from a full checkout")
