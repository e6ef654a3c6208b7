"""A model hub on this machine, with the few routes that pushing and fetching small files needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Keeps the files of every repository in a dictionary of the server."""

    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer right":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.server.repos.setdefault(repo, {})
            return self._answer(200, {"url": f"{self._own}/{repo}"})
        if self.path == "/api/validate-yaml":  # of the model card
            return self._answer(200, {"errors": [], "warnings": []})
        found = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/", self.path)
        if found is None:
            return self._answer(404, {"error": f"no route {self.path}"})
        repo = found[1]
        if found[2] == "preupload" in self.path:
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for each in json.loads(body)["files"]]  # fmt: skip
            return self._answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(200, {"commitUrl": f"{self._own}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repo = re.match(r"(?:/api/models)?/([^/]+/[^/]+)", self.path)
        if repo is not None and repo[1] not in self.server.repos:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if found := re.match(r"/api/models/([^/]+/[^/]+)(/revision/main)?$", self.path):
            files = [{"rfilename": path} for path in self.server.repos[found[1]]]
            return self._answer(200, {"id": found[1], "sha": COMMIT, "siblings": files, "tags": [], "private": False})
        if found := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
            files = [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                     for path, content in self.server.repos[found[1]].items()]  # fmt: skip
            return self._answer(200, files)
        found = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        if found is None:
            return self._answer(404, {"error": f"no route {self.path}"})
        if found[2] not in self.server.repos[found[1]]:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = self.server.repos[found[1]][found[2]]
        etag = hashlib.sha1(content).hexdigest()
        return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    @property
    def _own(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Its address, and what is in its repositories."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = {}
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.repos
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def used_by_all(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[dict[str, dict[str, bytes]]]:
    """What is in the repositories of a hub on this machine, which huggingface_hub takes for the real one."""
    with running() as (address, repos):
        for module in (huggingface_hub.constants, huggingface_hub.hf_api, huggingface_hub.file_download):
            if hasattr(module, "ENDPOINT"):
                monkeypatch.setattr(module, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield repos
