"""Part `lora`: what it costs that the rows of a forward wear different adapters."""

import statistics
import tempfile
import time
from typing import Any

from benchmarks.engine.part import Part, first_model
from benchmarks.lib.tables import make_table
from engine.request import AdapterUse

RANK = 8
ROWS = 4
WARM_UP = 3  # rounds
Rows = list[tuple[AdapterUse, ...]]
"""The adapters of each row."""


def lora(quick: bool, device: str) -> Part:
    """Time forwards whose rows wear no adapter, one for all, and different ones."""
    rounds = 15 if quick else 100
    worn: Rows = [(AdapterUse(f"style {number}"),) for number in range(ROWS)]
    batches: dict[str, Rows] = {
        "none": [()] * ROWS,
        "one for all": worn[:1] * ROWS,
        "four different": worn,
        "three different and none": [*worn[:3], ()],
    }
    median_s = _time_forwards(batches, worn, rounds, device)
    costs = {name: seconds / median_s["one for all"] for name, seconds in median_s.items()}
    table = make_table(
        f"A forward of {ROWS} rows, median of {rounds}",
        ("adapters", "ms", "to one for all"),
        left=("adapters",),
        caption=f"rank {RANK}, on every attention projection",
    )
    for name, seconds in median_s.items():
        table.add_row(name, f"{seconds * 1000:.1f}", f"{costs[name]:.2f}")
    mixed = max(costs["four different"], costs["three different and none"])
    forward_ms = {name: round(seconds * 1000, 2) for name, seconds in median_s.items()}
    return Part({"mixed_adapters_to_one": mixed, "adapter_forward_ms": forward_ms}, [table])


def _time_forwards(
    batches: dict[str, Rows], worn: Rows, rounds: int, device: str
) -> dict[str, float]:
    """Return the median seconds of a forward of each batch, taken in turns."""
    import torch
    from diffusers import UNet2DConditionModel

    from engine.adapters import AdapterBank
    from engine.config import AdapterSpec

    torch.set_num_threads(1)
    spec, _, _ = first_model(device)
    unet = UNet2DConditionModel.from_pretrained(spec.path, subfolder="unet", dtype=torch.float32)
    unet = unet.to(device).eval()
    side = unet.config.sample_size
    latents = torch.randn(ROWS, unet.config.in_channels, side, side, device=device)
    text = torch.randn(ROWS, 24, unet.config.cross_attention_dim, device=device)
    timesteps = torch.tensor([900.0, 600.0, 300.0, 30.0], device=device)
    taken_s: dict[str, list[float]] = {name: [] for name in batches}
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder, torch.inference_mode():
        bank = AdapterBank(
            {"unet": unet},
            [
                AdapterSpec(name=use.name, path=_save_adapter(folder, use.name, unet))
                for (use,) in worn
            ],
            slots=ROWS,
            max_rank=RANK,
            device=torch.device(device),
            dtype=torch.float32,
        )
        for number in range(rounds + WARM_UP):
            for name, per_row in batches.items():
                started_s = _busy_s(device)
                with bank.rows(per_row):
                    unet(latents, timesteps, encoder_hidden_states=text)
                if number >= WARM_UP:
                    taken_s[name].append(_busy_s(device) - started_s)
    return {name: statistics.median(values) for name, values in taken_s.items()}


def _save_adapter(folder: str, name: str, network: Any) -> str:
    """Save random low-rank weights for every attention projection of a network.

    In the layout of peft. Returns the file's path.
    """
    import torch
    from safetensors.torch import save_file

    path = f"{folder}/{name}.safetensors"
    weights = {}
    for layer_name, layer in network.named_modules():
        if layer_name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            down = torch.randn(RANK, layer.in_features) / RANK
            weights[f"unet.{layer_name}.lora_A.weight"] = down
            up = torch.randn(layer.out_features, RANK) / RANK
            weights[f"unet.{layer_name}.lora_B.weight"] = up
    save_file(weights, path)
    return path


def _busy_s(device: str) -> float:
    """Read a clock that only moves while this process works.

    CPU seconds; on a GPU, which nobody else uses, the host's.
    """
    import torch

    if not device.startswith("cuda"):
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
