"""Puts the files that git tracks into the source distribution, and no others.

In a folder without git, as an unpacked source distribution is one, every file is taken.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class TrackedFiles(BuildHookInterface):
    """Called by hatchling, see ``[tool.hatch.build.targets.sdist.hooks.custom]`` in pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add what is tracked and present to what hatchling always takes."""
        root = Path(self.root)
        if (root / ".git").exists():
            listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True).stdout
            paths = [Path(name) for name in listed.decode().split("\0") if name and (root / name).is_file()]
        else:
            paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        build_data["force_include"].update({str(root / path): str(path) for path in paths})
