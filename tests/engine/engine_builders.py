"""A tiny checkpoint with random weights, real in every part, and builders that hide what a test
does not care about.
"""

from pathlib import Path

import torch

from engine.config import CheckpointSpec
from engine.costs import CostModel
from engine.families import FAMILIES
from engine.inflight import BatchKey, InFlight, RenderState
from engine.request import Determinism, ImageRequest
from policy.fleet import OPEN_FAMILIES

# a growth ceiling under which every row joins: what shares a forward does not depend on the
# machine's mood then
ALWAYS = 1e9
SIZE = 64  # pixels: 8x8 latents
SAMPLERS = (
    "ddim",
    "ddpm",
    "euler",
    "euler_a",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "unipc",
    "lcm",
    "tcd",
)
NATIVE_FAMILIES = tuple(family for family in FAMILIES if family not in OPEN_FAMILIES)
WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "on",
    "the",
    "background",
    "small",
    "large",
]


def tiny_tokenizer():
    """A real CLIP tokenizer: every letter, the bare words above, nothing else."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab: dict[str, int] = {}
    for token in [*letters, *(letter + "</w>" for letter in letters)]:
        vocab[token] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
            parts = ["".join(pair), *parts[2:]]
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16, pad_token="<|endoftext|>")


def save_tiny_checkpoint(folder: Path, scheduler, seed: int = 0) -> Path:
    """A StableDiffusionPipeline folder of some hundred kilobytes."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    start = tokenizer.convert_tokens_to_ids("<|startoftext|>")
    pipe = StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        ),
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=SIZE,
            mid_block_add_attention=False,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def a_spec(path: Path, **changes) -> CheckpointSpec:
    return CheckpointSpec(
        **{
            "name": "tiny",
            "path": str(path),
            "sizes": ((SIZE, SIZE),),
            "samplers": SAMPLERS,
        }
        | changes
    )


def a_request(id: str = "image", **changes) -> ImageRequest:
    given = {
        "id": id,
        "group": f"job of {id}",
        "checkpoint": "tiny",
        "prompt": "a red circle on the blue background",
        "width_px": SIZE,
        "height_px": SIZE,
        "num_steps": 4,
        "guidance": 4.0,
        "sampler": "ddim",
        "seed": 7,
    }
    return ImageRequest(**given | changes)


def reproducible(id: str = "image", bucket_rows: int = 8, **changes) -> ImageRequest:
    return a_request(
        id, **{"determinism": Determinism.REPRODUCIBLE, "bucket_rows": bucket_rows} | changes
    )


def an_image(id: str, *, size: int = SIZE, encoded: bool = True, **changes) -> InFlight:
    """An image in flight without tensors: all a scheduler needs."""
    request = a_request(id, width_px=size, height_px=size, **changes)
    return InFlight(
        request=request,
        batch_key=BatchKey(request.checkpoint, size, size, 16),
        rows=2 if request.is_guided else 1,
        state=RenderState.RUNNING if encoded else RenderState.QUEUED,
    )


def a_pinned_image(id: str, bucket_rows: int = 8, **changes) -> InFlight:
    return an_image(
        id, **{"determinism": Determinism.REPRODUCIBLE, "bucket_rows": bucket_rows} | changes
    )


def ids(images) -> list[str]:
    return [image.id for image in images]


def a_key(size: int = SIZE, **changes) -> BatchKey:
    """The batch key of `an_image` of that size."""
    return BatchKey(
        **{"checkpoint": "tiny", "height_px": size, "width_px": size, "text_length": 16} | changes
    )


def flat(rows: int) -> float:
    """Seconds of a forward that batching makes nearly free."""
    return 1 + 0.01 * rows


def saturated(rows: int) -> float:
    """Seconds of a forward from which batching gains nothing."""
    return float(rows)


def measured_costs(
    curve=flat, *, sizes=(SIZE,), rows=(1, 2, 4, 8, 16), encode_s=0.1, decode_s=0.5
) -> CostModel:
    """Costs that have been seen often enough to be believed.

    `curve` gives the seconds of a forward by its rows, for every size.
    """
    costs = CostModel()
    for size in sizes:
        for n in rows:
            for _ in range(3):
                costs.observe_step(a_key(size), n, curve(n))
        costs.observe_encode(a_key(size), encode_s)
        costs.observe_decode(a_key(size), decode_s)
    return costs
