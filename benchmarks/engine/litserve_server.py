"""LitServe with its dynamic batching, in processes of its own.

    python -m benchmarks.engine.litserve_server PORT CHECKPOINT PRECISION DEVICE

Written as one of its users would: `predict` gets what arrived in the window and makes one pipeline
call for each group of equal steps and guidance; pixels are answered raw, which costs less than a
PNG. `/empty` answers as many bytes at once, unbatched: the price of HTTP. It ends when its standard
input does, so that it cannot outlive the benchmark.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve
from fastapi import Response

from benchmarks.engine.traffic import MAX_BATCH, WINDOW_S, by_kind
from engine.request import ImageRequest


class Pictures(litserve.LitAPI):
    """What it is compared for."""

    def __init__(self, checkpoint: str, precision: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=WINDOW_S)
        self._checkpoint = checkpoint
        self._precision = precision

    def setup(self, device: str) -> None:
        """Load the pipeline, in the worker's process."""
        from benchmarks.lib.pipeline import PlainPipeline

        self._pipe = PlainPipeline(Path(self._checkpoint), self._precision, device)

    def decode_request(self, request: dict[str, Any]) -> ImageRequest:
        """Make a request of JSON."""
        return ImageRequest(**request)

    def predict(self, requests: Sequence[ImageRequest]) -> list[bytes]:
        """Return the raw pixels of all requests, in their order."""
        pixels = {
            request.id: image
            for group in by_kind(requests)
            for request, image in zip(group, self._pipe.render(group), strict=True)
        }
        return [pixels[request.id].tobytes() for request in requests]

    def encode_response(self, pixels: bytes) -> Response:
        """Make the body."""
        return Response(pixels, media_type="application/octet-stream")


class Empty(litserve.LitAPI):
    """As many bytes, made of nothing."""

    def __init__(self) -> None:
        super().__init__(api_path="/empty")

    def predict(self, request: dict[str, Any]) -> bytes:
        """Return black pixels."""
        return bytes(request["width_px"] * request["height_px"] * 3)

    def encode_response(self, pixels: bytes) -> Response:
        """Make the body."""
        return Response(pixels, media_type="application/octet-stream")


def end_with_parent() -> None:
    """Wait for the end of standard input, then end every process of this group."""
    # Not sys.stdin.read(): LitServe forks, and the child would wait for the lock held by that.
    os.read(sys.stdin.fileno(), 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(port: str, checkpoint: str, precision: str, device: str) -> None:
    """Serve until the parent is gone."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    apis = [Pictures(checkpoint, precision), Empty()]
    server = litserve.LitServer(
        apis, accelerator=device.partition(":")[0], devices=1, timeout=False
    )
    # One process takes the requests, the default for one model: `Empty` would add another.
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
