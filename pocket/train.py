"""Train the pocket model from nothing: `python -m pocket.train` makes a Stable Diffusion folder.

There are four stages. An autoencoder learns to carry 128 px pictures as 16x16x4 latents. The
training scenes are encoded once. The denoiser and the text encoder learn together. Last, the
decoder is polished while the latents stay what they are.

Progress is kept in a work folder every few minutes, each time with a loadable pipeline beside it;
`--resume` goes on from there. Uses a GPU where there is one; two CPU cores need about an hour.
"""

import argparse
import copy
import math
import os
import random
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pocket.tokenizer import MAX_TOKENS, build_tokenizer
from pocket.world import SIDE_PX, Scene, caption, draw, random_scene

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
WORK = HERE.parent / ".darkroom" / "pocket-train"
LATENT_NOISE = 0.05  # stands in for a learned variance
PAIR_SHARE = 0.45  # two objects are the harder half of the world
CAPTIONS_PER_SCENE = 3
BATCH = 32
BETAS = (0.9, 0.99)
SAVE_EVERY_S = 240
# In the work folder.
TOKENIZER = "tokenizer"
VAE = "vae"
DATA = "data.pt"
STATE = "denoiser.pt"
POLISHED = "vae-polished"


@dataclass(frozen=True)
class Plan:
    """How long and how much to train.

    A stage ends at its minutes or its count, whichever comes first.
    """

    vae_minutes: float
    denoiser_minutes: float
    decoder_minutes: float
    max_images: int
    num_vae_scenes: int = 4_000
    num_scenes: int = 12_000
    num_polish_scenes: int = 2_000
    vae_peak_lr: float = 2e-3
    peak_lr: float = 1.2e-3
    decoder_peak_lr: float = 1.5e-3


class MasterWeights:
    """AdamW over fp32 masters of bf16 parameters, with a moving average of the masters.

    Parameters and gradients become views of two long tensors: hundreds of small copies a step would
    cost a tenth of the time.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, weight_decay: float, ema_decay: float
    ) -> None:
        self.parameters = list(parameters)
        self.values = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        self.gradients = torch.zeros_like(self.values)
        for parameter, value, gradient in zip(
            self.parameters, self.split(self.values), self.split(self.gradients), strict=True
        ):
            parameter.data = value
            parameter.grad = gradient
        self.master = self.values.float()
        self.average = self.master.clone()
        self.optimizer = torch.optim.AdamW(
            [self.master], lr=0.0, betas=BETAS, weight_decay=weight_decay, fused=True
        )
        self.ema_decay = ema_decay
        self.num_updates = torch.zeros((), dtype=torch.long)
        self.lock: AbstractContextManager[Any] = nullcontext()

    def share(self, lock: AbstractContextManager[Any]) -> dict[str, Tensor]:
        """Move everything into shared memory, so that other processes can `adopt` it.

        They then learn on the same weights.
        """
        if not self.optimizer.state:  # an idle step makes the optimizer lay out its moments
            self.master.grad = torch.zeros_like(self.master)
            self.optimizer.step()
        self.lock = lock
        shared = {
            "values": self.values,
            "master": self.master,
            "average": self.average,
            "num_updates": self.num_updates,
        }
        return {
            name: tensor.share_memory_()
            for name, tensor in (shared | self.optimizer.state[self.master]).items()
        }

    def adopt(self, shared: dict[str, Tensor], lock: AbstractContextManager[Any]) -> None:
        """Work on the weights another process has shared, in place of one's own."""
        self.values, self.master, self.average, self.num_updates = (
            shared[name] for name in ("values", "master", "average", "num_updates")
        )
        for parameter, value in zip(self.parameters, self.split(self.values), strict=True):
            parameter.data = value
        settings = self.optimizer.defaults
        chosen = {name: settings[name] for name in ("lr", "betas", "weight_decay", "fused")}
        self.optimizer = torch.optim.AdamW([self.master], **chosen)
        self.optimizer.state[self.master] = {
            name: shared[name] for name in ("step", "exp_avg", "exp_avg_sq")
        }
        self.lock = lock

    def split(self, together: Tensor) -> list[Tensor]:
        """Cut a long tensor into views shaped like the parameters."""
        cuts = together.split([parameter.numel() for parameter in self.parameters])
        return [
            cut.view(parameter.shape) for cut, parameter in zip(cuts, self.parameters, strict=True)
        ]

    def update(self, learning_rate: float) -> None:
        """Take one step from the parameters' gradients (clipped to norm 1) and clear them."""
        self.master.grad = self.gradients.float()
        nn.utils.clip_grad_norm_([self.master], 1.0)
        self.gradients.zero_()
        self.optimizer.param_groups[0]["lr"] = learning_rate
        with self.lock:
            self.optimizer.step()
            self.num_updates += 1
            count = self.num_updates.item()
            self.average.lerp_(self.master, 1 - min(self.ema_decay, (1 + count) / (10 + count)))
            self.values.copy_(self.master)

    @torch.no_grad()
    def put_average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the moving average into another network's parameters, given in the same order."""
        for parameter, value in zip(parameters, self.split(self.average), strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, object]:
        """Return everything needed to go on later."""
        return {
            "master": self.master,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates.item(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.master.copy_(state["master"])
        self.average.copy_(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates.fill_(state["num_updates"])
        self.values.copy_(self.master)


class Progress:
    """One line that tells how far a stage is.

    It is rewritten in place on a terminal, and printed every 15 s elsewhere.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.started_s = time.monotonic()
        self.printed_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Return the seconds since the stage began."""
        return time.monotonic() - self.started_s

    def tell(self, done: float, facts: str, *, is_last: bool = False) -> None:
        """Show the share done (0 to 1) and the facts."""
        now_s = time.monotonic()
        on_terminal = sys.stdout.isatty()
        if not is_last and now_s - self.printed_s < (0.2 if on_terminal else 15):
            return
        self.printed_s = now_s
        left_s = self.elapsed_s * (1 - done) / done if done > 0.01 else math.nan
        bar = "█" * round(24 * done) + "·" * (24 - round(24 * done))
        minutes_left = "" if math.isnan(left_s) else f"  {left_s / 60:.1f} min left"
        minutes = f"{self.elapsed_s / 60:5.1f} min{minutes_left}"
        line = f"{self.stage:<9} {bar} {100 * done:5.1f} %  {minutes}  {facts}"
        print(
            f"\r\x1b[2K{line}" if on_terminal else line,
            end="\n" if is_last or not on_terminal else "",
            flush=True,
        )


def build_vae() -> AutoencoderKL:
    """Build a small autoencoder: 8 times down, 4 latent channels, 0.8 M parameters."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE_PX,
    )
    pin_variance(vae)
    return vae


def pin_variance(vae: AutoencoderKL) -> None:
    """Make the encoder's distribution as narrow as the noise it was trained with.

    Only then is sampling from it sound.
    """
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * math.log(LATENT_NOISE)


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser: two levels, text attention at 8x8, 4 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIDE_PX // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder: two layers, 128 wide."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # The library's start (0.02) leaves the words nearly alike; colours are then learnt much later.
    nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.3)
    return text_encoder


def build_noise_schedule() -> DDIMScheduler:
    """Build a schedule of velocity prediction down to zero signal, spaced for four steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def fall_off(done: float, *, flat_until: float, floor: float) -> float:
    """Return the learning rate's factor: flat, then linear down to `floor` at the end."""
    return (
        1.0
        if done < flat_until
        else max(floor, 1 - (1 - floor) * (done - flat_until) / (1 - flat_until))
    )


def paint_scenes(scenes: list[Scene], rng: random.Random) -> Tensor:
    """Draw them all: uint8 [n, 3, 128, 128]."""
    return (
        torch.from_numpy(np.stack([draw(scene, rng) for scene in scenes]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def training_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Draw scenes of which none is held out, many of them pairs."""
    return [random_scene(rng, pair_share=PAIR_SHARE, held_out=False) for _ in range(count)]


def to_model(pictures: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 pictures into floats from -1 to 1 on the device."""
    return pictures.to(device).float() / 127.5 - 1


def edge_mask(pictures: Tensor) -> Tensor:
    """Mark pixels beside a sharp change with 1, all others with 0: [b, 1, h, w]."""
    mask = torch.zeros_like(pictures[:, :1])
    across = (pictures[..., 1:] - pictures[..., :-1]).abs().sum(1, keepdim=True) > 0.2
    down = (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().sum(1, keepdim=True) > 0.2
    mask[..., 1:][across] = 1
    mask[..., :-1][across] = 1
    mask[..., 1:, :][down] = 1
    mask[..., :-1, :][down] = 1
    return mask


def picture_loss(got: Tensor, wanted: Tensor) -> Tensor:
    """Add the absolute and the squared error; errors at an edge count four times."""
    error = got - wanted
    return ((error.abs() + error.square()) * (1 + 3 * edge_mask(wanted))).mean()


def train_vae(plan: Plan, device: torch.device, rng: random.Random) -> AutoencoderKL:
    """Train the autoencoder on crops that grow from 16 to 64 px.

    Returns its moving average in fp32.
    """
    pictures = paint_scenes(training_scenes(plan.num_vae_scenes, rng), rng)
    vae = build_vae().to(device, torch.bfloat16).train()
    weights = MasterWeights(vae.parameters(), weight_decay=0.0, ema_decay=0.995)
    progress = Progress("vae")
    num_steps = 0
    shown = 1.0
    while (done := progress.elapsed_s / (plan.vae_minutes * 60)) < 1:
        # Starting with large crops stalls: the first thing to learn is colour.
        crop_px, batch = (16, 192) if done < 0.15 else (32, 64) if done < 0.40 else (64, 16)
        wanted = to_model(random_crops(pictures, batch, crop_px, rng), device)
        latents = vae.encode(wanted.bfloat16()).latent_dist.mean
        got = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample.float()
        loss = picture_loss(got, wanted) + 1e-3 * latents.float().square().mean()
        loss.backward()
        num_steps += 1
        weights.update(
            plan.vae_peak_lr * min(1.0, num_steps / 50) * fall_off(done, flat_until=0.6, floor=0.02)
        )
        shown += 0.02 * ((got - wanted).detach().abs().mean().item() - shown)
        progress.tell(done, f"step {num_steps}  crops {crop_px} px  L1 {shown:.4f}")
    progress.tell(1.0, f"step {num_steps}  L1 {shown:.4f}", is_last=True)
    averaged = build_vae().to(device)
    weights.put_average(averaged.parameters())
    pin_variance(averaged)
    return averaged.eval().requires_grad_(False)


def random_crops(pictures: Tensor, count: int, crop_px: int, rng: random.Random) -> Tensor:
    """Cut a square from each of `count` random pictures: [count, 3, crop_px, crop_px]."""
    crops = []
    for index in torch.randint(len(pictures), (count,)).tolist():
        x, y = rng.randint(0, SIDE_PX - crop_px), rng.randint(0, SIDE_PX - crop_px)
        crops.append(pictures[index, :, y : y + crop_px, x : x + crop_px])
    return torch.stack(crops)


def polish_decoder(
    vae: AutoencoderKL, plan: Plan, device: torch.device, rng: random.Random
) -> AutoencoderKL:
    """Train the decoder alone, on whole pictures, with twice the latent noise.

    A denoiser's latents are a little off. The encoder stays as it is, so a denoiser trained on its
    latents still fits. Returns a new autoencoder; `vae` is left untouched.
    """
    pictures = paint_scenes(training_scenes(plan.num_polish_scenes, rng), rng)
    polished = copy.deepcopy(vae).bfloat16().train()
    latents = encode_pictures(polished, pictures, device)
    taught = [*polished.post_quant_conv.parameters(), *polished.decoder.parameters()]
    weights = MasterWeights(
        [parameter.requires_grad_() for parameter in taught], weight_decay=0.0, ema_decay=0.995
    )
    progress = Progress("decoder")
    num_steps = 0
    shown = 0.05
    while (done := progress.elapsed_s / (plan.decoder_minutes * 60)) < 1:
        rows = torch.randint(len(pictures), (4,))
        wanted = to_model(pictures[rows], device)
        clean = latents[rows.to(device)]
        got = polished.decode(clean + 2 * LATENT_NOISE * torch.randn_like(clean)).sample.float()
        picture_loss(got, wanted).backward()
        num_steps += 1
        weights.update(
            plan.decoder_peak_lr
            * min(1.0, num_steps / 50)
            * fall_off(done, flat_until=0.4, floor=0.02)
        )
        shown += 0.02 * ((got - wanted).detach().abs().mean().item() - shown)
        progress.tell(done, f"step {num_steps}  L1 {shown:.4f}")
    progress.tell(1.0, f"step {num_steps}  L1 {shown:.4f}", is_last=True)
    better = copy.deepcopy(vae)
    weights.put_average([*better.post_quant_conv.parameters(), *better.decoder.parameters()])
    return better


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, device: torch.device) -> Tensor:
    """Encode uint8 pictures in batches: the means of their latents, on the device."""
    pieces = (to_model(piece, device).bfloat16() for piece in pictures.split(BATCH))
    return torch.cat([vae.encode(piece).latent_dist.mean for piece in pieces])


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL,
    plan: Plan,
    tokenizer: CLIPTokenizer,
    device: torch.device,
    rng: random.Random,
) -> dict[str, Tensor]:
    """Draw and encode the training set, and hold it in memory.

    latents: [n, 4, 16, 16], of standard deviation 1.  tokens: [n, captions, 24].  no_words: [24],
    the empty caption. Also sets the autoencoder's scaling factor.
    """
    progress = Progress("encode")
    latents = []
    tokens = []
    error = 0.0
    # Its rounding is a tenth of the noise the latents were trained with.
    fast = copy.deepcopy(vae).bfloat16()
    for start in range(0, plan.num_scenes, BATCH):
        scenes = training_scenes(min(BATCH, plan.num_scenes - start), rng)
        pictures = to_model(paint_scenes(scenes, rng), device)
        encoded = fast.encode(pictures.bfloat16()).latent_dist.mean.float()
        if start == 0:
            error = (vae.decode(encoded).sample.clamp(-1, 1) - pictures).square().mean().item()
        latents.append(encoded.cpu())
        texts = [caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
        ids = tokenize(tokenizer, texts)
        tokens.append(ids.view(len(scenes), CAPTIONS_PER_SCENE, MAX_TOKENS))
        progress.tell((start + len(scenes)) / plan.num_scenes, f"{start + len(scenes)} scenes")
    together = torch.cat(latents)
    vae.register_to_config(scaling_factor=1 / together.std().item())
    progress.tell(
        1.0,
        f"PSNR {10 * math.log10(4 / error):.1f} dB  latents' deviation {together.std().item():.3f}",
        is_last=True,
    )
    return {
        "latents": together * vae.config.scaling_factor,
        "tokens": torch.cat(tokens),
        "no_words": tokenize(tokenizer, [""])[0],
    }


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Turn texts into ids, padded: [n, 24]."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


class Denoising:
    """The training of the denoiser and its text encoder together.

    It can be resumed, and it can write a loadable pipeline.
    """

    def __init__(
        self, vae: AutoencoderKL | None, tokenizer: CLIPTokenizer, device: torch.device
    ) -> None:
        self.vae = vae
        self.tokenizer = tokenizer
        self.device = device
        self.unet = build_unet().to(device, torch.bfloat16).train()
        if device.type == "cpu":
            # At 64 tokens nearly twice as fast backwards as the fused one.
            self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = build_text_encoder(tokenizer).to(device, torch.bfloat16).train()
        self.weights = MasterWeights(
            [*self.unet.parameters(), *self.text_encoder.parameters()],
            weight_decay=0.01,
            ema_decay=0.998,
        )
        self.schedule = build_noise_schedule()
        self.signal_share = self.schedule.alphas_cumprod.to(device)

    def loss(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Return the mean squared error of the predicted velocity.

        The noise levels of a batch are spread evenly.
        """
        batch = len(latents)
        levels = (torch.arange(batch) + torch.rand(batch))[torch.randperm(batch)] / batch
        num_levels = len(self.signal_share)
        timesteps = (levels * num_levels).long().clamp(max=num_levels - 1).to(self.device)
        signal = self.signal_share[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * latents
        words = self.text_encoder(tokens).last_hidden_state
        guess = self.unet(noisy.bfloat16(), timesteps, encoder_hidden_states=words).sample
        return F.mse_loss(guess.float(), velocity)

    def learn_once(self, data: dict[str, Tensor], plan: Plan, done: float) -> float:
        """Make one update from one random batch, a tenth of it without words; return the loss."""
        rows = torch.randint(len(data["latents"]), (BATCH,), device=self.device)
        texts = data["tokens"][
            rows, torch.randint(CAPTIONS_PER_SCENE, (BATCH,), device=self.device)
        ]
        texts = torch.where(torch.rand(BATCH, 1, device=self.device) < 0.1, data["no_words"], texts)
        loss = self.loss(data["latents"][rows], texts)
        loss.backward()
        warm_up = min(1.0, (self.weights.num_updates.item() + 1) / 200)
        self.weights.update(plan.peak_lr * warm_up * fall_off(done, flat_until=0.55, floor=0.02))
        return loss.item()

    def train(self, data: dict[str, Tensor], plan: Plan, work: Path, *, num_workers: int) -> None:
        """Train until the plan's minutes or images are used up; keep a copy in `work` every few
        minutes.

        On a CPU `num_workers` single-threaded processes learn on the same weights and take turns to
        update them. On a busy machine, two threads in step wait for each other at every operation,
        but two processes wait only for the update.
        """
        data = {name: values.to(self.device) for name, values in data.items()}
        done = torch.zeros(()).share_memory_()
        if num_workers > 1 and self.device.type == "cpu":
            self.start_helpers(num_workers - 1, data, plan, done)
        progress = Progress("denoiser")
        shown = 1.0
        saved_s = 0.0
        first_update = self.weights.num_updates.item()
        while True:
            num_updates = self.weights.num_updates.item()
            num_images = num_updates * BATCH
            done.fill_(
                max(progress.elapsed_s / (plan.denoiser_minutes * 60), num_images / plan.max_images)
            )
            rate = (num_updates - first_update) * BATCH / progress.elapsed_s
            progress.tell(
                min(1.0, done.item()),
                f"{num_images} images  {rate:.0f}/s  loss {shown:.4f}",
                is_last=done.item() >= 1,
            )
            if done.item() >= 1:
                break
            loss = self.learn_once(data, plan, done.item())
            shown += max(0.02, 1 / (1 + num_updates - first_update)) * (loss - shown)
            if progress.elapsed_s - saved_s > SAVE_EVERY_S:
                saved_s = progress.elapsed_s
                self.keep(work)
        self.keep(work)

    def start_helpers(self, count: int, data: dict[str, Tensor], plan: Plan, done: Tensor) -> None:
        """Have `count` processes learn on the same weights until `done` is 1, with one thread each.

        From then on this process has one thread, too.
        """
        torch.set_num_threads(1)
        processes = mp.get_context("spawn")
        lock = processes.Lock()
        shared = self.weights.share(lock) | {"done": done}
        for worker in range(1, count + 1):
            processes.Process(
                target=help_learning,
                args=(shared, lock, data, plan, os.getpid(), worker),
                daemon=True,
            ).start()

    def keep(self, work: Path) -> None:
        """Write the training state and a loadable pipeline to `work`.

        A crash in between leaves the old state whole.
        """
        fresh = work / f"{STATE}.new"
        with self.weights.lock:
            torch.save({"weights": self.weights.state()}, fresh)
        fresh.replace(work / STATE)
        self.save(work / "pipeline")

    def save(self, out: Path) -> None:
        """Write the moving average as a Stable Diffusion folder, fp16."""
        unet = build_unet()
        text_encoder = build_text_encoder(self.tokenizer)
        self.weights.put_average([*unet.parameters(), *text_encoder.parameters()])
        assert self.vae is not None  # only helpers have none, and they save nothing
        vae = copy.deepcopy(self.vae).cpu().half()
        vae.register_to_config(_name_or_path="")  # else the config tells where the work folder lay
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder.half(),
            tokenizer=self.tokenizer,
            unet=unet.half(),
            scheduler=self.schedule,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(out, safe_serialization=True)


def help_learning(
    shared: dict[str, Tensor],
    lock: AbstractContextManager[Any],
    data: dict[str, Tensor],
    plan: Plan,
    parent: int,
    worker: int,
) -> None:
    """Train on the shared weights in a further process, until the first one is done or gone."""
    torch.set_num_threads(1)
    torch.manual_seed(worker)
    denoising = Denoising(None, build_tokenizer(), torch.device("cpu"))
    denoising.weights.adopt(shared, lock)
    while (done := shared["done"].item()) < 1 and os.getppid() == parent:
        denoising.learn_once(data, plan, done)


def pick_device(name: str) -> torch.device:
    """Return the device asked for; `auto` takes a GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Train with the options of the command line."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    device = pick_device(options.device)
    options.work.mkdir(parents=True, exist_ok=True)
    plan = _plan(options)
    tokenizer = _tokenizer(options)
    vae = _vae(options, plan, device, rng)
    data = _data(options, vae, plan, tokenizer, device, rng)

    denoising = Denoising(vae, tokenizer, device)
    _resume(denoising, options)
    if plan.denoiser_minutes > 0:
        denoising.train(data, plan, options.work, num_workers=options.workers)
    if plan.decoder_minutes > 0:
        denoising.vae = polish_decoder(denoising.vae, plan, device, rng)
        denoising.vae.save_pretrained(options.work / POLISHED)
    denoising.save(options.out)
    print(f"saved to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pocket.train", description="Train the pocket model from nothing."
    )
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINT, help="where the finished pipeline goes"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="where intermediate states go")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    _add_plan_options(parser)
    parser.add_argument("--threads", type=int, default=2, help="where one process learns alone")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes that teach the denoiser together on a CPU, one thread each",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=float,
        default=50,
        help="for autoencoder and denoiser together, one to four",
    )
    parser.add_argument(
        "--decoder-minutes", type=float, default=8, help="for polishing the decoder afterwards"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=400_000,
        help="end the denoiser's training after so many images, if sooner",
    )
    parser.add_argument(
        "--peak-lr", type=float, default=Plan.peak_lr, help="the denoiser's highest learning rate"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from what --work holds; --minutes is then for the denoiser alone",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a two-minute run that only proves the path; its pictures are mush",
    )


def _plan(options: argparse.Namespace) -> Plan:
    if options.quick:
        return Plan(
            0.4, 0.7, 0.3, options.images, num_vae_scenes=500, num_scenes=640, num_polish_scenes=128
        )
    vae_minutes = 0 if _is_kept(options, VAE) else options.minutes / 5
    return Plan(
        vae_minutes,
        options.minutes - vae_minutes,
        options.decoder_minutes,
        options.images,
        peak_lr=options.peak_lr,
    )


def _is_kept(options: argparse.Namespace, name: str) -> bool:
    """Tell whether to go on from what an earlier run left under this name in the work folder."""
    return bool(options.resume and (options.work / name).exists())


def _tokenizer(options: argparse.Namespace) -> CLIPTokenizer:
    """Read the kept tokenizer, or build one and keep it.

    The encoded captions and the weights are useless without the tokenizer they were made with.
    """
    folder = options.work / TOKENIZER
    if _is_kept(options, TOKENIZER):
        return CLIPTokenizer.from_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


def _vae(
    options: argparse.Namespace, plan: Plan, device: torch.device, rng: random.Random
) -> AutoencoderKL:
    """Read the kept autoencoder, or train one and keep it."""
    if _is_kept(options, VAE):
        return _frozen_vae(options.work / VAE, device)
    vae = train_vae(plan, device, rng)
    vae.save_pretrained(options.work / VAE)
    return vae


def _frozen_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder).to(device).eval().requires_grad_(False)


def _data(
    options: argparse.Namespace,
    vae: AutoencoderKL,
    plan: Plan,
    tokenizer: CLIPTokenizer,
    device: torch.device,
    rng: random.Random,
) -> dict[str, Tensor]:
    """Read the kept training set, or encode one and keep it."""
    file = options.work / DATA
    if _is_kept(options, DATA):
        kept: dict[str, Tensor] = torch.load(file)
        return kept
    data = encode_scenes(vae, plan, tokenizer, device, rng)
    vae.save_pretrained(options.work / VAE)  # again: it now knows its scaling factor
    torch.save(data, file)
    return data


def _resume(denoising: Denoising, options: argparse.Namespace) -> None:
    """Give it the kept weights and the kept polished autoencoder, where there are any."""
    device = denoising.device
    if _is_kept(options, STATE):
        state = torch.load(options.work / STATE, map_location=device)
        denoising.weights.load(state["weights"])
    if _is_kept(options, POLISHED):
        denoising.vae = _frozen_vae(options.work / POLISHED, device)


if __name__ == "__main__":
    main()
