"""The part of the hub's protocol that a download and an upload need, on 127.0.0.1: repositories are folders."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``root/owner/name`` as the repository ``owner/name``.

    Args:
        root: folder of the repositories.

    Attributes:
        gated: repositories that ask for consent.
        fetched: files that were sent, ``owner/name/file``.
        options: what the repositories that were created here were asked to be.
        tokens: the tokens that came with uploads.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.options: dict[str, dict[str, object]] = {}
        self.tokens: set[str] = set()
        self.large: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub for the time of the ``with`` block."""
    hub = Hub(root)
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Creates a repository, says how each file is to be sent, takes the small ones in the commit itself."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self._reply({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(content)
            repo = f"{asked.pop('organization')}/{asked.pop('name')}"
            self.server.options[repo] = asked
            (self.server.root / repo).mkdir(parents=True)
            return self._reply({"name": repo, "url": f"{self.server.address}/{repo}"})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._reply({"objects": [self._place(one) for one in json.loads(content)["objects"]]})
        repo = "/".join(parts[2:4])
        if not (self.server.root / repo).is_dir():
            return self._send(401, b"{}", True, {"X-Error-Code": "RepoNotFound"})
        if parts[4] == "preupload":
            files = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": _mode(file["path"])}
                for file in json.loads(content)["files"]
            ]
            return self._reply({"files": files})
        self._commit(self.server.root / repo, [json.loads(line) for line in content.splitlines()])
        url = f"{self.server.address}/{repo}/commit/{COMMIT}"
        self._reply({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    def do_PUT(self) -> None:
        """A large file."""
        name = self.path.rpartition("/")[2]
        self.server.large[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, b"", True)

    def _place(self, file: dict[str, object]) -> dict[str, object]:
        upload = {"href": f"{self.server.address}/large/{file['oid']}", "header": {}}
        return {"oid": file["oid"], "size": file["size"], "actions": {"upload": upload}}

    def _commit(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                (folder / value["path"]).write_bytes(content)

    def _reply(self, content: dict[str, object]) -> None:
        self._send(200, json.dumps(content).encode(), True, {"Content-Type": "application/json"})

    def _answer(self, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, what = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision"
        else:
            repo, what = "/".join(parts[:2]), "file"
        folder = self.server.root / repo
        if repo in self.server.gated:
            return self._send(
                403, b"{}", body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            )
        if not folder.is_dir():
            return self._send(401, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if what == "file":
            return self._file(folder, repo, "/".join(parts[4:]), body)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if what == "tree":
            sizes = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _hash(path)}
                for name, path in zip(names, files, strict=True)
            ]
            return self._send(200, json.dumps(sizes).encode(), body)
        siblings = [{"rfilename": name} for name in names]
        content = {"_id": "1", "id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        self._send(200, json.dumps(content).encode(), body)

    def _file(self, folder: Path, repo: str, name: str, body: bool) -> None:
        path = folder / name
        if not path.is_file():
            return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        if body:
            self.server.fetched.append(f"{repo}/{name}")
        self._send(200, path.read_bytes(), body, {"ETag": f'"{_hash(path)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _mode(name: str) -> str:
    """As the hub has it: weights go to the large file storage, text into the commit."""
    return "lfs" if name.endswith(".safetensors") else "regular"


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
