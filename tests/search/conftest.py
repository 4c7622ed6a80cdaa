"""A real PostgreSQL server for the tests that share a storage."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def _program(name: str) -> str | None:
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    return shutil.which(name, path=os.pathsep.join(places))


def _user() -> str | None:
    """PostgreSQL refuses to run as root: somebody else, then."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


@pytest.fixture(scope="session")
def new_database() -> Iterator[Callable[[], str]]:
    """Makes an empty database in a server of its own (a Unix socket, no port) and returns its URL."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    initdb, postgres = _program("initdb"), _program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed: no initdb and postgres on PATH or in /usr/lib/postgresql/*/bin")
    user = _user()
    folder = Path(tempfile.mkdtemp(prefix="dop-pg-"))  # short: the path of a socket has at most 107 characters
    if user is not None:
        shutil.chown(folder, user)
    options = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    start = [initdb, "-D", str(folder / "data"), "-U", "tester", "--auth=trust", "--no-sync", "--encoding=UTF8"]
    subprocess.run(start, check=True, **options)
    command = [postgres, "-D", str(folder / "data"), "-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"]
    server = subprocess.Popen(command, **{**options, "stderr": subprocess.DEVNULL})

    def connect() -> object:
        return psycopg.connect(host=str(folder), user="tester", dbname="postgres", autocommit=True)

    deadline = time.monotonic() + 30
    while True:
        try:
            connect().close()
            break
        except psycopg.OperationalError:
            assert server.poll() is None, "the server has stopped"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    count = iter(range(1000))

    def create() -> str:
        name = f"test{next(count)}"
        with connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://tester@/{name}?host={folder}"

    yield create
    server.send_signal(signal.SIGINT)
    server.wait(timeout=30)
    shutil.rmtree(folder)
