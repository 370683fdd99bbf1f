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

from benchmarks.gpu.cells import DEVICE_LOST
from benchmarks.gpu.clocks import FACTS, DeviceWatch, query
from benchmarks.gpu.plan import PARTS, START_S

REPO = Path(__file__).resolve().parents[2]
# Beyond its seconds, before a part is stopped: of a cell that takes longer than planned.
GRACE_S = 30.0
GRACE_SHARE = 0.1
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
    clocks: dict[str, Any] | str = ""  # of the device while it ran

    def add(self, line: dict[str, Any]) -> None:
        """Take in what it said of a cell."""
        name = line["cell"]
        if "found" in line:
            self.cells[name] = line["found"]
            self.took_s[name] = line["took_s"]
        elif "failed" in line:
            self.failed[name] = line["failed"]
        elif "left_out" in line:
            self.left_out[name] = line["left_out"]

    def end(self, status: int, last: str) -> None:
        """Note how its process ended.

        status: as `Popen.returncode`.  last: the cell that it began last, "" before the first.
        """
        if status == DEVICE_LOST:
            self.failed[last] = f"the device was lost, and the part ended: {self.failed[last]}"
        elif status:
            is_told = last in {"", *self.cells, *self.failed, *self.left_out}
            how = f"by signal {-status}" if status < 0 else f"with {status}"
            self.failed["its process" if is_told else last] = f"the process ended {how}"


def run_part(
    name: str, seconds: float, *, device: str, quick: bool, tiny: bool, traces: Path
) -> Part:
    """Run a part in a fresh process; without the seconds to start one, leave out all its cells.

    Nothing that another has loaded, broken or left behind weighs on it.
    """
    if seconds < START_S:
        return Part(left_out=dict.fromkeys(PARTS[name].cells, "no time was left for this part"))
    until = str(time.time() + seconds)
    command = [sys.executable, "-m", "benchmarks.gpu.part_process", name, until, device]
    command += ["--traces", str(traces)]
    command += [flag for flag, is_set in (("--quick", quick), ("--tiny", tiny)) if is_set]
    part = Part()
    last = ""
    with (
        DeviceWatch(query(device, FACTS)) as watch,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=REPO, env=os.environ | QUIET
        ) as process,
    ):
        grace_s = min(GRACE_S, GRACE_SHARE * seconds)
        too_late = threading.Timer(seconds + grace_s, process.kill)
        too_late.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"cell": '):
                told = json.loads(line)
                part.add(told)
                last = told["cell"] if "begun" in told else last
                print(f"{name}: {line.rstrip()[:180]}", file=sys.stderr, flush=True)
            else:
                sys.stderr.write(line)
        process.wait()
        too_late.cancel()
    part.end(process.returncode, last)
    part.clocks = watch.summary()
    return part
