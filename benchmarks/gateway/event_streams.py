"""Many event streams open at once, in a process of its own.

    python -m benchmarks.gateway.event_streams URL STREAMS

Standard input: a line "KEY JOB_ID" each; the last line is empty. Prints "open" when every stream
has sent its first event, reads whatever comes, and ends when standard input does.
"""

import asyncio
import sys
from urllib.parse import urlsplit

TRIES = 20
WAIT_S = 3.0


async def _open(
    address: tuple[str, int], key: str, job_id: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a stream.

    A refusal is waited out: the gateway notices at a heartbeat that the streams before have gone.
    """
    request = (
        f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\n"
        f"Host: {address[0]}\r\n"
        f"Authorization: Bearer {key}\r\n\r\n"
    )
    for _ in range(TRIES):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " in head.split(b"\r\n")[0]:
            while b"event:" not in await reader.readline():
                pass
            return reader, writer
        writer.close()
        await asyncio.sleep(WAIT_S)
    raise SystemExit(f"a stream was refused: {head!r}")


async def _drain(reader: asyncio.StreamReader) -> None:
    while await reader.read(65_536):
        pass


async def main(url: str, streams: int) -> None:
    """Open the streams, read them until standard input ends."""
    parts = urlsplit(url)
    address = (str(parts.hostname), int(parts.port or 80))
    watched = []
    while line := sys.stdin.readline().strip():
        watched.append(line.split())
    openings = (_open(address, *watched[number % len(watched)]) for number in range(streams))
    opened = await asyncio.gather(*openings)
    drains = [asyncio.create_task(_drain(reader)) for reader, _ in opened]
    print("open", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in drains:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
