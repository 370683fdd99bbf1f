"""Plain diffusers in a process of its own: one pipeline call per image, when told.

    python -m benchmarks.overhead.plain_calls CHECKPOINT PRECISION GUIDANCE

Reads a number of images a line, answers with the seconds that so many calls took.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import REPO

STEPS = 20
TORCH_THREADS = 1
PROMPT = "a large red circle at the top on a blue background"


@dataclass(frozen=True)
class Stretch:
    """Images made in one go."""

    images: int
    seconds: float

    @property
    def rate(self) -> float:
        """Return images a second."""
        return self.images / self.seconds


class PlainCalls:
    """The asking side of that process. `facts`: of its device and precision."""

    def __init__(self, checkpoint: Path, precision: str, guidance: float) -> None:
        module = "benchmarks.overhead.plain_calls"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(checkpoint), precision, str(guidance)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        self.facts: dict[str, Any] = json.loads(self._answer())

    def run(self, images: int) -> Stretch:
        """Render so many images, one call after the other."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{images}\n")
        self._process.stdin.flush()
        return Stretch(images, float(self._answer()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the plain pipeline ended early")
        return line


def main(checkpoint: str, precision: str, guidance: str) -> None:
    """Load the pipeline, say how it runs, render until standard input ends."""
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(TORCH_THREADS)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    pipe = StableDiffusionPipeline.from_pretrained(
        checkpoint,
        torch_dtype=dtype,
        safety_checker=None,
        use_safetensors=True,
        local_files_only=True,
    )
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda:0")

    def render(seed: int) -> None:
        pipe(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=float(guidance),
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        )

    render(0)
    facts = {
        "device": str(pipe.device),
        "dtype": str(dtype),
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        started_at = time.perf_counter()
        for seed in range(int(line)):
            render(seed)
        print(time.perf_counter() - started_at, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
