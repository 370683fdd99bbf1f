"""Everything at once: strangers join, leave, are parked, canceled, moved and changed in rank, and
no reproducible image notices.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from adapter_builders import a_file, lora_tensors
from engine_builders import ALWAYS, SAMPLERS, a_request, a_spec, reproducible

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ImageCanceled
from engine.events import Parked, Resumed, Stepped
from engine.request import AdapterUse
from engine.snapshots import from_bytes

CHANCES = {"join": 0.25, "stranger": 0.15, "cancel": 0.1, "move": 0.1, "rank": 0.1}


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    """Few seats, so that ranks park each other; adapters over the UNet and the text encoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("adapters")
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    specs = []
    for number in range(5):
        tensors = lora_tensors(unet, prefix="unet", seed=number, rank=2 + number)
        if number % 2:
            tensors |= lora_tensors(
                text_encoder, prefix="text_encoder", seed=number, only=lambda name: "_proj" in name
            )
        specs.append(a_file(folder / f"adapter-{number}.safetensors", tensors))
    # fewer slots than adapters: they are loaded again and again
    spec = a_spec(checkpoint, adapters=tuple(specs), adapter_slots=3)
    with Engine(EngineConfig(growth_ceiling=ALWAYS, max_inflight=6), [spec]) as engine:
        yield engine


def wishes(dice, count) -> list:
    """Reproducible requests of every kind."""
    return [
        reproducible(
            f"wish {n}",
            seed=n,
            prompt=dice.choice(["a red circle", "a small green star on the blue background", ""]),
            num_steps=dice.randint(1, 7),
            sampler=dice.choice(SAMPLERS),
            guidance=dice.choice([1.0, 3.0, 7.5]),
            bucket_rows=dice.choice([4, 4, 8]),
            rank=dice.randint(0, 2),
            adapters=tuple(
                AdapterUse(f"adapter-{number}", dice.choice([0.5, 1.0, -1.5]))
                for number in dice.sample(range(5), dice.choice([0, 0, 1, 2]))
            ),
        )
        for n in range(count)
    ]


class Company:
    """Lets wishes and strangers into an engine at steps nobody planned, and disturbs them there."""

    def __init__(self, engine, wishes, dice):
        self.engine, self.dice, self.most_strangers = engine, dice, len(wishes)
        self.waiting = list(wishes)
        self.handles, self.strangers = {}, []
        self.done = Counter()

    def stir(self, event):
        """Called on the engine's thread at every event of every image."""
        self.done["parked"] += isinstance(event, Parked)
        self.done["resumed"] += isinstance(event, Resumed)
        if self.happens("join"):
            self.let_one_in()
        if self.happens("stranger") and len(self.strangers) < self.most_strangers:
            number = len(self.strangers)
            steps = self.dice.randint(1, 6)
            self.strangers.append(
                self.engine.submit(
                    a_request(f"stranger {number}", seed=number, num_steps=steps), self.stir
                )
            )
        if self.happens("cancel") and self.strangers:
            self.dice.choice(self.strangers).cancel()
        if self.happens("rank"):
            self.engine.set_rank(event.request_id, self.dice.randint(0, 2))
        if (
            isinstance(event, Stepped)
            and event.request_id.startswith("wish")
            and self.happens("move")
        ):
            self.engine.snapshot(event.request_id).add_done_callback(self.move)

    def move(self, asked):
        """Between two turns: the image goes on from its snapshot under another id, its former self
        is canceled.
        """
        if asked.exception() is not None:
            return  # that step was its last
        blob = asked.result()
        former = from_bytes(blob).request
        name = former.id.rstrip("+")
        moved = replace(former, id=f"{former.id}+")
        self.engine.cancel(former.id)
        self.handles[name] = self.engine.restore(blob, self.stir, request=moved)
        self.done["moved"] += 1

    def happens(self, what) -> bool:
        return self.dice.random() < CHANCES[what]

    def let_one_in(self):
        if self.waiting:
            wish = self.waiting.pop()
            self.handles[wish.id] = self.engine.submit(wish, self.stir)


def finished_latents(engine, monkeypatch) -> dict[str, torch.Tensor]:
    """The last latents of every image by its name.

    Stricter than pixels, where rounding hides the last bits.
    """
    seen = {}
    decode = engine._runner.decode

    def watched(image):
        seen[image.id.rstrip("+")] = image.tensors.latents.clone()
        return decode(image)

    monkeypatch.setattr(engine._runner, "decode", watched)
    return seen


@pytest.mark.parametrize("count", [30, pytest.param(150, marks=pytest.mark.slow)])
def test_reproducible_images_have_the_bits_they_have_alone_whatever_happens_around_them(
    engine, monkeypatch, count
):
    dice = random.Random(2026)
    latents = finished_latents(engine, monkeypatch)
    asked = wishes(dice, count)
    for wish in asked:
        engine.submit(wish).result(60)
    alone = dict(latents)
    latents.clear()
    company = Company(engine, asked, dice)

    finished = []
    while company.waiting or len(finished) < count:
        if len(company.handles) == len(finished):
            company.let_one_in()
        name = list(company.handles)[len(finished)]
        try:
            finished.append(company.handles[name].result(60))
        except ImageCanceled:
            continue  # it has been moved: its handle is another one by now
    for stranger in company.strangers:
        try:
            stranger.result(60)
            company.done["strangers"] += 1
        except ImageCanceled:
            company.done["canceled"] += 1

    records = [image.record for image in finished]
    assert len(finished) == count
    assert (
        min(company.done[what] for what in ("parked", "resumed", "moved", "canceled", "strangers"))
        >= 2
    ), company.done
    assert (
        sum(record.shared_forwards for record in records)
        > sum(record.forwards for record in records) / 2
    )
    assert engine.stats()["adapter_misses"] > 10
    assert [name for name in alone if not torch.equal(alone[name], latents[name])] == []
