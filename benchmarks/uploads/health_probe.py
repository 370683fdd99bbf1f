"""Ask a gateway whether it is alive, over and over, until standard input ends.

    python -m benchmarks.uploads.health_probe URL

Then print how long each answer took, in milliseconds.
"""

import json
import sys
import threading
import time

import httpx

EVERY_S = 0.02
GIVE_UP_S = 60.0


def main() -> int:
    """Ask until standard input ends."""
    over = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    took_ms: list[float] = []
    with httpx.Client(base_url=sys.argv[1], timeout=GIVE_UP_S, trust_env=False) as client:
        while not over.is_set():
            began = time.perf_counter()
            try:
                client.get("/healthz").raise_for_status()
            except httpx.HTTPError:
                took_ms.append(GIVE_UP_S * 1000)
            else:
                took_ms.append((time.perf_counter() - began) * 1000)
            over.wait(EVERY_S)
    print(json.dumps(took_ms))
    return 0


if __name__ == "__main__":
    sys.exit(main())
