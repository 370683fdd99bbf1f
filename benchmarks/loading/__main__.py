"""The host's memory and the time that loads take: of several workers at once, in turn, and straight
to the device.

    python -m benchmarks.loading [--quick]

Each of four processes reads a network of fp32 into bf16, as workers of one host do when they start
together, and moves it to a device (`loader.py`). What they hold that is no cache of files is added
up every few milliseconds. "kept by the C library" is at once, without giving back in the end what
the C library keeps. Also the seconds to hash a checkpoint's files, by threads.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.lib.stack import temporary_folder
from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target, report
from engine.folders import hash_files

WORKERS = 4
WAYS = ("kept by the C library", "at once", "in turn", "straight to the device")
THREADS = (1, 2, 4)
HASHED_FILES = 4
MIB = 2**20
READ_EVERY_S = 0.005
# Of the network's bytes on the device: a load alone holds them once on its way there.
TARGETS = (Target("in_turn_peak", "<=", 1.5), Target("straight_to_the_device_peak", "<=", 2.0))


def main() -> int:
    """Measure, print tables and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="files of a quarter of the size")
    options = parser.parse_args()
    figures: dict[str, object] = {}
    with temporary_folder() as folder:
        _save_network(folder, width=128 if options.quick else 256)
        table = make_table(
            f"{WORKERS} workers that load together",
            ("way", "peak, MiB", "of one network on the device", "seconds"),
            left=("way",),
        )
        for way in WAYS:
            peak_bytes, device_bytes, seconds = _load_together(folder, way)
            ratio = peak_bytes / device_bytes
            table.add_row(way, f"{peak_bytes / MIB:.0f}", f"{ratio:.2f}x", f"{seconds:.1f}")
            figures[f"{way.replace(' ', '_')}_peak"] = ratio
            figures[f"{way.replace(' ', '_')}_s"] = seconds
        size_bytes = _save_files(folder / "hashed", (64 if options.quick else 256) * MIB)
        hashing = make_table(f"hashing {size_bytes / MIB:.0f} MiB", ("threads", "seconds"))
        for threads in THREADS:
            seconds = _hash(folder / "hashed", threads)
            hashing.add_row(str(threads), f"{seconds:.2f}")
            figures[f"hash_s_by_{threads}"] = seconds
    show(table, hashing)
    return report("loading", figures, TARGETS, facts={"cores": os.cpu_count()})


def _save_network(folder: Path, *, width: int) -> None:
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=768,
    ).save_pretrained(folder / "unet")


def _load_together(folder: Path, way: str) -> tuple[int, int, float]:
    """Return the most that the loads held at once, one network's bytes, and the seconds of all."""
    command = [sys.executable, "-m", "benchmarks.loading.loader", str(folder), way]
    loaders = [
        subprocess.Popen(
            [*command, str(folder / "lock")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(WORKERS)
    ]
    try:
        for loader in loaders:
            assert loader.stdout is not None
            assert loader.stdout.readline() == "ready\n", "it did not start"
        base_bytes = _held_bytes(loaders)
        started = time.perf_counter()
        _tell(loaders)
        for loader in loaders:
            assert loader.stdout is not None
            os.set_blocking(loader.stdout.fileno(), False)
        peak_bytes = 0
        device_bytes: dict[int, int] = {}
        while len(device_bytes) < WORKERS:
            peak_bytes = max(peak_bytes, _held_bytes(loaders) - base_bytes)
            for loader in loaders:
                assert loader.poll() is None, "a loader has ended"
                line = _line_of(loader)
                if line:
                    device_bytes[loader.pid] = int(line)
            time.sleep(READ_EVERY_S)
        seconds = time.perf_counter() - started
        _tell(loaders)
        return peak_bytes, next(iter(device_bytes.values())), seconds
    finally:
        for loader in loaders:
            loader.kill()
            loader.wait()


def _line_of(loader: subprocess.Popen[str]) -> str:
    """Return what the loader has written; "" if nothing."""
    assert loader.stdout is not None
    with suppress(BlockingIOError):
        return os.read(loader.stdout.fileno(), 100).decode().strip()
    return ""


def _tell(loaders: list[subprocess.Popen[str]]) -> None:
    for loader in loaders:
        assert loader.stdin is not None
        loader.stdin.write("\n")
        loader.stdin.flush()


def _held_bytes(loaders: list[subprocess.Popen[str]]) -> int:
    """Add up the memory of the processes that no file backs: what the kernel cannot drop."""
    held = 0
    for loader in loaders:
        for line in Path(f"/proc/{loader.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                held += int(line.split()[1]) * 1024
    return held


def _save_files(folder: Path, size_bytes: int) -> int:
    """Write the files of one part; return the bytes of all."""
    (folder / "unet").mkdir(parents=True)
    for number in range(HASHED_FILES):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-{HASHED_FILES:05}.safetensors"
        (folder / "unet" / name).write_bytes(os.urandom(MIB) * (size_bytes // MIB))
    return HASHED_FILES * size_bytes


def _hash(folder: Path, threads: int) -> float:
    started = time.perf_counter()
    hash_files(folder, ["unet"], threads=threads)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
