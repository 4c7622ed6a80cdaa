"""A small hub on the loopback address: the routes that ``huggingface_hub`` and ``datasets`` ask of the real one.

Repositories are folders: ``ROOT/models/OWNER/NAME`` and ``ROOT/datasets/OWNER/NAME``. A repository's commit is a hash
of its files. ``gated`` repositories answer as those do whose licence nobody has accepted; a file in ``truncate`` is cut
off in the middle of its first download.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"^/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+))?(?:/(.*))?)?$")
_RESOLVE = re.compile(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class LocalHub:
    """What is served, and what was asked."""

    root: Path
    gated: set[str] = field(default_factory=set)
    truncate: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def repository(self, kind: str, name: str) -> Path:
        """The folder of a repository; made if it does not exist."""
        folder = self.root / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, kind: str, name: str) -> str:
        """40 hex digits over the names and bytes of its files."""
        digest = hashlib.sha1()
        for path in _files(self.root / kind / name):
            digest.update(f"{path.name}{path.stat().st_size}{path.stat().st_mtime_ns}".encode())
        return digest.hexdigest()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process that takes this for the hub, with its caches under ``home``."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@contextmanager
def local_hub(root: Path) -> Iterator[LocalHub]:
    """Serve ``root`` until the context ends."""
    hub = LocalHub(root)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        path = unquote(address.path)
        if match := _RESOLVE.match(path):
            self._file("datasets" if match[1] else "models", match[2], match[3], match[4])
        elif match := _API.match(path):
            self._api(match[1], match[2], match[3] or "revision", match[4] or "main", match[5] or "", body)
        else:
            self._error(404, "EntryNotFound", f"no route {path}")

    def _known(self, kind: str, name: str, revision: str) -> str | None:
        """The commit, or ``None`` after an error was sent."""
        if not (self.hub.root / kind / name).is_dir():
            self._error(401, "RepoNotFound", "Repository Not Found")
            return None
        commit = self.hub.commit(kind, name)
        if revision not in ("main", commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit

    def _api(self, kind: str, name: str, what: str, revision: str, below: str, body: bytes) -> None:
        commit = self._known(kind, name, revision)
        if commit is None:
            return
        folder = self.hub.root / kind / name
        if what == "refs":
            self._json({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": commit}], "tags": []})
        elif what == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            self._tree(folder, below, recursive)
        elif what == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            self._json([_entry(folder, folder / path) for path in asked if (folder / path).exists()])
        else:
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in _files(folder)]
            gated = "auto" if name in self.hub.gated else False
            facts = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
            self._json({**facts, "private": False, "gated": gated, "disabled": False, "likes": 0})

    def _tree(self, folder: Path, below: str, recursive: bool) -> None:
        start = folder / below
        if not start.is_dir():
            self._error(404, "EntryNotFound", f"{below} does not exist")
            return
        found = sorted(start.rglob("*") if recursive else start.iterdir())
        self._json([_entry(folder, path) for path in found])

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        commit = self._known(kind, name, revision)
        if commit is None:
            return
        if name in self.hub.gated:
            self._error(403, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted")
            return
        path = self.hub.root / kind / name / file
        if not path.is_file():
            self._error(404, "EntryNotFound", f"{file} does not exist", commit)
            return
        data = path.read_bytes()
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or ("", "0"))[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in self.hub.truncate and not start:
            self.hub.truncate.discard(file)
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        data = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}
