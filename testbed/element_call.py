# SPDX-License-Identifier: Apache-2.0
"""Serves Element Call from its npm package to the browser of one user, already logged in.

Element Call has the AGPL as its licence. npm fetches it when a test needs it, and this repository
contains no part of it.
"""

from __future__ import annotations

import json
import mimetypes
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from testbed.cache import has_npm_packages, npm_packages
from testbed.matrix import User
from testbed.process import free_port

_PROJECT = Path(__file__).resolve().parent / "element-call"
_PACKAGE = "@element-hq/element-call-embedded"

_Page = tuple[str, bytes]


def find_element_call() -> Path:
    """The directory with the files of the web page, which npm fetches into the cache.

    Raises:
        MissingTool
    """
    return npm_packages(_PROJECT) / _PACKAGE / "dist"


def has_element_call() -> bool:
    """Whether Element Call is in the cache, so that npm need not fetch it."""
    return has_npm_packages(_PROJECT)


class ElementCall:
    """Element Call for one user, on its own port. A browser that opens it is logged in as that
    user.

    Browsers store the login for each host and port, so one browser can be several users at once.
    """

    def __init__(self, user: User, **config: Any) -> None:
        """
        Args:
            user: the user who is logged in.
            config: keys for Element Call's `config.json`.

        Raises:
            MissingTool
        """
        self.user = user
        self._files = find_element_call()
        self._config = config
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self._page))
        self._server.daemon_threads = True

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def link(self, room_id: str) -> str:
        """The URL of the call in a room."""
        # Without `confineToRoom`, the page shows its start page a second after an error or hang-up.
        query = urlencode({"roomId": room_id, "confineToRoom": "true"})
        return f"{self.url}/room/#/?{query}"

    def _page(self, path: str) -> _Page:
        if path.endswith("/config.json"):
            return "application/json", json.dumps(self._full_config()).encode()
        # A page below /room/ requests /room/assets/…. All assets are directly in `assets`.
        directory, _, name = path.rpartition("/")
        if not directory.endswith("/assets"):
            return "text/html", self._index()
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return kind, (self._files / "assets" / name).read_bytes()

    def _index(self) -> bytes:
        user = self.user
        session = {
            "user_id": user.user_id,
            "device_id": user.device_id,
            "access_token": user.access_token,
            "passwordlessUser": False,
        }
        log_in = f"localStorage.setItem('matrix-auth-store', {json.dumps(json.dumps(session))});"
        page = (self._files / "index.html").read_text()
        return page.replace("<head>", f"<head><script>{log_in}</script>", 1).encode()

    def _full_config(self) -> dict[str, Any]:
        homeserver = {
            "base_url": self.user.client_url,
            "server_name": self.user.user_id.partition(":")[2],
        }
        return {"default_server_config": {"m.homeserver": homeserver}, **self._config}


def _handler(page: Callable[[str], _Page]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                kind, content = page(urlsplit(self.path).path)
            except OSError:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            # The next start may serve another version at this port.
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
