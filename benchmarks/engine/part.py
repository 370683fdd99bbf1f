"""What the parts of the engine benchmark have in common."""

from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from engine.config import CheckpointSpec, EngineConfig
from engine.request import ImageRequest
from policy.fleet import parse_fleet, parse_size
from settings import REPO

PATIENCE_S = 300  # for one image


@dataclass
class Part:
    """What one part found."""

    figures: dict[str, Any]
    tables: list[Table]
    # Target -> why its figure shows nothing this time.
    not_judged: dict[str, str] = field(default_factory=dict)


def first_model(device: str, **changes: Any) -> tuple[CheckpointSpec, EngineConfig, ImageRequest]:
    """Return the first model of fleet.toml, how a worker holds it, and a request of its defaults.

    A worker of the local pool, with one thread. changes: to its configuration.
    """
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    name, model = next(iter(fleet.models.items()))
    sizes = tuple(parse_size(size) for size in model.sizes)
    spec = CheckpointSpec(
        name=name,
        path=str(REPO / model.versions[0].source),
        family=model.family,
        precision=model.precision,
        sha256=model.versions[0].sha256,
        sizes=sizes,
        samplers=model.samplers,
        default_sampler=model.default_sampler,
    )
    pool = fleet.pools["local"]
    config = EngineConfig(
        device=device,
        num_threads=1,
        max_inflight=pool.slots,
        max_batch_rows=pool.max_batch_rows,
    )
    request = ImageRequest(
        id="bench",
        group="bench",
        checkpoint=name,
        prompt="",
        width_px=sizes[0][0],
        height_px=sizes[0][1],
        num_steps=1,
        guidance=model.default_guidance,
        sampler=model.default_sampler,
        seed=0,
    )
    return spec, replace(config, **changes), request
