"""Weights from the hub: read at one commit, with the token, and resumed."""

import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from edges.weightcache import WeightCache
from edges.weightsources import SourceRefused, SourceUnavailable, open_folder
from policy.sources import remote_source
from settings import DeviceSettings
from tests.buckets import sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    cache = WeightCache(tmp_path / "cache", budget_gb=1)
    yield cache
    cache.hold_only(set())


class Hub:
    """Answers as the hub does: the files of one commit, by way of another address."""

    def __init__(self) -> None:
        self.files = {}
        self.asked = []  # (method, path, token)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self._answer()

            def do_GET(self):
                self._answer()

            def _answer(self):
                path = unquote(urlsplit(self.path).path)
                hub.asked.append((self.command, path, self.headers.get("Authorization")))
                resolve = f"/org/repo/resolve/{COMMIT}/"
                if path == f"/api/models/org/repo/revision/{COMMIT}":
                    siblings = [{"rfilename": name} for name in hub.files]
                    self._send(json.dumps({"siblings": siblings}).encode())
                elif path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
                    self.send_response(302)
                    self.send_header("Location", f"/cdn/{path.removeprefix(resolve)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif path.startswith("/cdn/"):
                    self._send(hub.files[path.removeprefix("/cdn/")])
                else:
                    self.send_error(404)

            def _send(self, content):
                first = int(re.search(r"=(\d+)-", self.headers.get("Range", "=0-"))[1])
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(content) - first))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[first:])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def folder(self, path="", **changes):
        url = f"http://127.0.0.1:{self.server.server_port}"
        settings = DeviceSettings(hf_endpoint=url, hf_token="hf_secret", **changes)
        return open_folder(remote_source(f"hf:org/repo@{COMMIT}{path}"), settings)


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_hub_is_read_at_the_commit_with_the_token_and_resumed(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    content = os.urandom(50_000)
    hub.files = {"unet/w x.safetensors": content}
    (cache.folder / "partial").mkdir(parents=True)
    (cache.folder / "partial" / sha256(content)).write_bytes(content[:20_000])

    folder = cache.bring(hub.folder(), {"unet/w x.safetensors": sha256(content)})

    assert (folder / "unet/w x.safetensors").read_bytes() == content
    method, path, token = hub.asked[0]
    assert (method, token) == ("HEAD", "Bearer hf_secret")
    assert path == f"/org/repo/resolve/{COMMIT}/unet/w x.safetensors"


def test_hub_lists_files_below_a_folder(hub):
    hub.files = {"a/one.json": b"1", "a/b/two.json": b"2", "three.json": b"3"}

    assert sorted(hub.folder("/a").names()) == ["b/two.json", "one.json"]


def test_hub_s_missing_file_is_told_as_fleet_toml_names_it(hub, cache):
    with pytest.raises(SourceRefused, match=f"hf:org/repo@{COMMIT}/no.json: is not there"):
        cache.bring(hub.folder(), {"no.json": "0" * 64})


def test_source_that_does_not_answer_is_tried_a_few_times(hub, cache, monkeypatch):
    monkeypatch.setattr("edges.weightdownloads.FIRST_PAUSE_S", 0.001)
    hub.server.shutdown()
    hub.server.server_close()

    with pytest.raises(SourceUnavailable, match=r"hf:org/repo@.*ConnectError"):
        cache.bring(hub.folder(), {"no.json": "0" * 64})
