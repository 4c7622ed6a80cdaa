"""A disk that fills up while a library writes by itself: one sentence instead of its traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from dop_search.app.cli.hydra_command import run_command
from dop_search.utils.conf import CONFIG_NAME


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.ENOENT, False)])
def test_a_library_that_cannot_write(number, said, tmp_path, monkeypatch, capsys):
    def job(composed, folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder / "plot.png"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dop-search", f"hydra.run.dir={tmp_path / 'run'}"])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit):
        run_command("dop-search", CONFIG_NAME, job)
    shown = capsys.readouterr().err
    assert os.strerror(number) in shown
    assert ("Traceback" in shown) != said
    if said:
        assert "plot.png" in shown
