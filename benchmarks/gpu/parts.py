"""The parts of the benchmark, each in a process of its own, and what that process said."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
# Of the minutes; what a part leaves goes to those behind it.
SHARES = {"sdxl": 0.28, "flux": 0.34, "invariance": 0.22, "curves": 0.16}
GRACE_S = 30  # beyond its share, before a part is stopped
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass
class Part:
    """What the process of one part said."""

    cells: dict[str, Any] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, line: dict[str, Any]) -> None:
        """Take in what it said of a cell."""
        name = line["cell"]
        if "found" in line:
            self.cells[name] = line["found"]
            self.took_s[name] = line["took_s"]
        elif "failed" in line:
            self.failed[name] = line["failed"]
        else:
            self.left_out[name] = line["left_out"]


def run_part(name: str, seconds: float, *, device: str, quick: bool, tiny: bool) -> Part:
    """Run a part in a fresh process.

    Nothing that another has loaded, broken or left behind weighs on it.
    """
    until = str(time.time() + seconds)
    command = [sys.executable, "-m", "benchmarks.gpu.part_process", name, until, device]
    command += [flag for flag, is_set in (("--quick", quick), ("--tiny", tiny)) if is_set]
    part = Part()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=REPO, env=os.environ | QUIET
    ) as process:
        too_late = threading.Timer(seconds + GRACE_S, process.kill)
        too_late.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"cell": '):
                part.add(json.loads(line))
                print(f"{name}: {line.rstrip()[:180]}", file=sys.stderr, flush=True)
            else:
                sys.stderr.write(line)
        process.wait()
        too_late.cancel()
    if process.returncode:
        part.failed[name] = f"its process ended with {process.returncode}"
    return part
