"""An object store with weights, and a door before it that counts, stops and breaks off."""

import hashlib
import re
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import httpx

from edges.weightsources import RemoteFolder, open_folder
from policy.sources import remote_source
from settings import DeviceSettings
from tests.builders import a_closed_port, until

KEYS = ("weights-reader", "weights-secret")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def an_object_store(folder: Path) -> Iterator[dict[str, str]]:
    """The variables of one that serves the folders below `folder` as buckets."""
    port = a_closed_port()
    rclone = str(Path(sys.executable).with_name("rclone"))
    process = subprocess.Popen(
        [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", str(folder)],
        env={"RCLONE_AUTH_KEY": f'"{",".join(KEYS)}"', "RCLONE_CONFIG": "/dev/null"},
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    try:
        until(answers, what="rclone")
        yield {
            "MODEL_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "MODEL_S3_ACCESS_KEY_ID": KEYS[0],
            "MODEL_S3_SECRET_ACCESS_KEY": KEYS[1],
        }
    finally:
        process.kill()
        process.wait()


class Bucket:
    """A bucket of such a store, as it is seen through the door."""

    def __init__(self, store: dict[str, str]) -> None:
        self.name = f"weights-{uuid.uuid4().hex[:8]}"
        self.store = store
        self._client = boto3.client(
            "s3",
            endpoint_url=store["MODEL_S3_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=store["MODEL_S3_ACCESS_KEY_ID"],
            aws_secret_access_key=store["MODEL_S3_SECRET_ACCESS_KEY"],
        )
        self._client.create_bucket(Bucket=self.name)
        self.gets: Counter[str] = Counter()  # by name of the file
        self.ranges: list[int] = []  # first bytes that were asked for
        self.breaks_after: dict[str, int] = {}  # bytes of a file, once
        self.stops_after: dict[str, int] = {}  # bytes of a file, until the door is open
        self.door = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.door.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        own = {"MODEL_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}"}
        return self.store | own

    def settings(self, **changes) -> DeviceSettings:
        told = {name.lower(): value for name, value in self.environment.items()}
        return DeviceSettings(**{**told, **changes})

    def put(self, name: str, content: bytes) -> str:
        self._client.put_object(Bucket=self.name, Key=f"model/{name}", Body=content)
        return sha256(content)

    @property
    def source(self) -> str:
        return f"s3://{self.name}/model"

    def folder(self, **changes) -> RemoteFolder:
        source = remote_source(self.source)
        assert source is not None
        return open_folder(source, self.settings(**changes))


def _handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Door(BaseHTTPRequestHandler):
        """Passes requests on with their own Host, which is part of the signature."""

        def do_HEAD(self):
            self._pass_on()

        def do_GET(self):
            self._pass_on()

        def _pass_on(self):
            name = urlsplit(self.path).path.rpartition("/")[2]
            if self.command == "GET":
                first = re.search(r"=(\d+)-", self.headers.get("Range", "=0-"))
                bucket.gets[name] += 1
                bucket.ranges.append(int(first[1]))
            url = f"{bucket.store['MODEL_S3_ENDPOINT_URL']}{self.path}"
            headers = dict(self.headers)
            with httpx.stream(self.command, url, headers=headers, timeout=None) as answer:
                self.send_response(answer.status_code)
                for key, value in answer.headers.items():
                    if key.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self._send(name, answer)
            self.close_connection = True

        def _send(self, name, answer):
            sent = 0
            breaks_after = bucket.breaks_after.pop(name, None)
            stops_after = bucket.stops_after.get(name)
            for piece in answer.iter_raw(65_536):
                if stops_after is not None and sent >= stops_after:
                    bucket.door.wait()
                self.wfile.write(piece)
                sent += len(piece)
                if breaks_after is not None and sent >= breaks_after:
                    break

        def handle(self):
            with suppress(OSError):  # the client is gone
                super().handle()

        def log_message(self, *_):
            pass

    return Door
