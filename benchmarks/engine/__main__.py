"""What the engine gives: beside other ways to serve, at saturation, with mixed adapters, over time.

    python -m benchmarks.engine [--quick] [--only serving|overhead|lora|leak] [--device cpu]

Each part has a process of its own, with one torch thread and the first model of fleet.toml, held as
the local pool's workers hold it.

serving   Poisson arrivals of 4-, 8- and 30-step requests at 0.8x and 1.5x of what sequential
          `pipe()` calls can serve. Systems: those calls, first come first served; a 50 ms window
          that collects up to 8 requests and renders them whole; LitServe's dynamic batching with
          the same window; the engine. Latency runs from the scheduled arrival to the pixels.
          LitServe's contains HTTP and the others' none: what a round trip costs without work is
          printed beside it. LitServe is installed for this benchmark alone, from
          requirements/bench.txt into .darkroom/bench-site, where only its own process looks: our
          own pins stay what they are.
overhead  (encode + denoise + decode seconds) ÷ seconds of the device thread, with every slot taken.
lora      Process CPU seconds of a forward of 4 rows that wear nothing, one adapter, four different
          ones, three different ones and none.
leak      2,000 requests in 40 waves, a fifth of them canceled at odd moments, some too late. Memory
          is read after each wave, when nothing is in flight, garbage is collected and malloc has
          given back what it had kept for later: what is left is held. Ten waves are warm-up; a
          least-squares line through the other thirty gives KiB a request, the median of their last
          third over that of their first the growth.
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.engine.adapters import lora
from benchmarks.engine.device_share import overhead
from benchmarks.engine.memory import leak
from benchmarks.engine.serving import serving
from benchmarks.engine.targets import TARGETS
from benchmarks.lib.progress import log_progress
from benchmarks.lib.tables import show
from benchmarks.lib.verdict import report

PARTS = {"serving": serving, "overhead": overhead, "lora": lora, "leak": leak}


def main() -> int:
    """Run the parts, print their tables and one line of JSON; 1 if a target is missed."""
    options = _options()
    os.environ |= {  # before any part loads torch
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    load_at_start = os.getloadavg()[0]  # above 0: the machine had more to do than this
    figures: dict[str, Any] = {}
    not_judged: dict[str, str] = {}
    # A fresh process for each part: nothing that one left behind weighs on the next. They fork from
    # one that has read the libraries.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.engine.comparison"])
    for name in [options.only] if options.only else PARTS:
        log_progress(name)
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            part = fresh.submit(PARTS[name], options.quick, options.device).result()
        show(*part.tables)
        figures |= part.figures
        not_judged |= part.not_judged
    facts = {
        "device": options.device,
        "cores": os.cpu_count(),
        "load_at_start": round(load_at_start, 2),
        "torch_threads": 1,
        "quick": options.quick,
    }
    targets = [target for target in TARGETS if target.figure in figures]
    return report("engine", figures, targets, not_judged=not_judged, facts=facts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="ends within a minute; not_judged says what so little cannot show",
    )
    parser.add_argument("--only", choices=list(PARTS), help="one part")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
