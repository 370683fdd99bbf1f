"""What is measured in which part, how long it takes on an H200, and in which nine minutes.

Seconds are estimates until they were measured on one. Plain values; knows no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

START_S = 10.0  # of a part's process, until its first cell
ROUND_S = 540.0
QUICK_S = 48.0  # the rest of the minute is this process's start, and a part's grace
QUICK_SHARE = 0.6  # of a cell's seconds, with `--quick`: fewer images

FAMILIES = ("sd", "sdxl", "sd3", "flux")
PRECISIONS = ("bf16", "fp16", "fp32")
QUANTISATIONS = ("float8", "int8")
KERNELS = ("auto", "flash", "efficient", "cudnn", "math")  # of attention


@dataclass(frozen=True)
class PartPlan:
    """A part of the benchmark: a process of its own, one cell after the other."""

    round: int  # the nine minutes that it belongs to
    cells: Mapping[str, float]  # name -> seconds; it is not begun with less left

    @property
    def needs_s(self) -> float:
        """Return the seconds that all of it takes."""
        return START_S + sum(self.cells.values())


def _small_bits() -> dict[str, float]:
    """List cells of small networks: first what makes a checkpoint faster, kernels last."""
    plain = [f"{family} {precision} auto" for precision in PRECISIONS for family in FAMILIES]
    layouts = [f"{family} bf16 auto channels_last" for family in ("sd", "sdxl")]
    graphs = [f"{family} bf16 auto cuda_graphs" for family in FAMILIES]
    compiled = [f"{family} bf16 auto compile_blocks" for family in ("sdxl", "flux")]
    kernels = [f"{family} bf16 {kernel}" for kernel in KERNELS[1:] for family in FAMILIES]
    return (
        dict.fromkeys([*plain, *graphs, *layouts], 4.0)
        | dict.fromkeys(compiled, 40.0)
        | dict.fromkeys(kernels, 4.0)
    )


PARTS = {
    "check": PartPlan(1, {"attention": 4, "matmul": 2, "compiler": 4}),
    "full_bits": PartPlan(1, {"sdxl bf16 bucket 8": 20, "flux bf16 bucket 4": 30}),
    "sdxl": PartPlan(
        1,
        {
            "eager": 45,
            "plain_batched": 20,
            "launches": 5,
            "launches_graphs": 6,
            "overlap": 5,
            "graphs": 25,
            "channels_last": 25,
        },
    ),
    "flux": PartPlan(
        1,
        {
            "eager": 75,
            "plain_batched": 30,
            "launches": 6,
            "launches_graphs": 8,
            "overlap": 8,
            "graphs": 42,
        },
    ),
    "profile": PartPlan(
        1,
        {
            "sdxl one image": 12,
            "sdxl full batch": 8,
            "flux one image": 15,
            "flux full batch": 10,
        },
    ),
    # Ours compiles its convolutions and the decoder besides; the second finds them in the cache.
    "sdxl_compiled": PartPlan(2, {"plain_compiled": 45, "compiled": 100, "compiled_graphs": 45}),
    # With graphs there is nothing to gain: its forwards keep a GPU busy for longer than the host.
    "flux_compiled": PartPlan(2, {"plain_compiled": 45, "compiled": 55}),
    "sdxl_quantised": PartPlan(
        2, {"float8": 25, "float8_graphs": 25, "int8": 25, "int8_graphs": 25}
    ),
    "flux_quantised": PartPlan(2, {"float8": 42, "int8": 42}),
    "full_bits_variants": PartPlan(
        3,
        {
            "sdxl bf16 bucket 8 cuda_graphs": 12,
            "sdxl bf16 bucket 8 channels_last": 12,
            "sdxl bf16 bucket 8 float8": 12,
            "flux bf16 bucket 4 cuda_graphs": 20,
            "flux bf16 bucket 4 float8": 20,
            "sdxl bf16 bucket 8 compile_blocks": 100,
        },
    ),
    "invariance": PartPlan(3, _small_bits()),
    "curves": PartPlan(
        3,
        {
            "sdxl half side": 6,
            "sdxl full side": 10,
            "flux half side": 15,
            "flux full side": 40,
        },
    ),
}
"""In the order in which they are run."""

ROUNDS = sorted({plan.round for plan in PARTS.values()})
QUICK_PARTS = ("sdxl",)


def parts_of_round(number: int) -> list[str]:
    """List the parts of one nine minutes."""
    return [name for name, plan in PARTS.items() if plan.round == number]


def seconds_for(name: str, later: Sequence[str], left_s: float) -> float:
    """Return the seconds that a part may take: what it needs, and its share of what is over.

    later: the parts behind it, which go short if too little is left.
    """
    needs_s = PARTS[name].needs_s
    share = needs_s / (needs_s + sum(PARTS[other].needs_s for other in later))
    return min(left_s, max(needs_s, share * left_s))


def model_of(part: str) -> str:
    """Return the model of a part that measures images a second."""
    return part.partition("_")[0]


def changes_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the changes to a checkpoint's spec that a cell's last words name."""
    changes: dict[str, Any] = {}
    for word in words:
        if word in QUANTISATIONS:
            changes["quantize"] = word
        else:
            changes[word] = True
    return changes
