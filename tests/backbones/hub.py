"""A server of the few answers of Hugging Face's hub that a download needs, on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves the folders below ``root`` as OWNER/NAME, and keeps what was asked for.

    Attributes:
        asked: paths of all requests.
        fetched: names of the files that were sent.
        failures: OWNER/NAME -> status and ``X-Error-Code`` that every request of it is answered with.
        gated: OWNER/NAME -> status of requests for its files.
        page: what is sent in the place of every answer.
        delay: seconds that a file takes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.fetched: list[str] = []
        self.failures: dict[str, tuple[int, str | None]] = {}
        self.gated: dict[str, int] = {}
        self.page: bytes | None = None
        self.delay = 0.0

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request for ``path``."""
        self.asked.append(path)
        words = unquote(path).partition("?")[0].strip("/").split("/")
        api = words[0] == "api"
        owner, name, *rest = [*(words[2:] if api else words), "", ""]
        model = f"{owner}/{name}"
        if self.page is not None:
            return 200, {"Content-Type": "text/html"}, self.page
        if model in self.failures or not (self.root / model).is_dir():
            status, code = self.failures.get(model, (401, "RepoNotFound"))
            return status, {"X-Error-Code": code} if code else {}, b"{}"
        if not api and model in self.gated:
            return self.gated[model], {"X-Error-Code": "GatedRepo"}, b""
        if api:
            return 200, {"Content-Type": "application/json"}, json.dumps(self._listed(model, rest)).encode()
        file = self.root / model / "/".join(rest[2:-2])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        time.sleep(self.delay)
        body = file.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body

    def _listed(self, model: str, rest: list[str]) -> object:
        folder = self.root / model
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if rest[:1] == ["tree"]:
            return [
                {
                    "type": "file",
                    "path": name,
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
                for name, file in files.items()
            ]
        return {"id": model, "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in files]}


@contextmanager
def hub_at(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and huggingface_hub set up to ask it and to keep its files in ``cache``."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                if status == 200 and not self.path.startswith("/api"):
                    hub.fetched.append("/".join(unquote(self.path).split("/")[5:]))

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    ask(f"http://127.0.0.1:{server.server_port}", cache, monkeypatch)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def ask(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on huggingface_hub asks ``endpoint``."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.ENDPOINT", endpoint)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
