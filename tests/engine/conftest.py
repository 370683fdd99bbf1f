"""Checkpoints built once per run, and one engine that keeps them loaded."""

import os
from pathlib import Path

import pytest
import torch
from engine_builders import ALWAYS, a_spec, save_tiny_checkpoint

from engine.config import EngineConfig
from engine.engine import Engine

# As a worker does (tasks/roles/render.py). On some processors (seen on an AMD EPYC) the last bits
# of a matrix product depend on where the matrix lies in memory, unless MKL is told to be strict,
# before its first call.
os.environ["MKL_CBWR"] = "AUTO,STRICT"


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """As the engine's: with two, `pipe(...)` itself gives other bits, and a busy machine stalls."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, one_torch_thread) -> Path:
    """Trained, were it trained, like the pocket checkpoint.

    That is: v prediction, zero terminal SNR, trailing spacing.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", scheduler)


@pytest.fixture(scope="session")
def epsilon_checkpoint(tmp_path_factory, one_torch_thread) -> Path:
    """Like SD 1.5: epsilon prediction and its PNDM config."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "epsilon", scheduler)


@pytest.fixture(scope="session")
def engine(checkpoint):
    """One engine for all tests that only render.

    Its weights stay loaded, which is the point of it.
    """
    spec = a_spec(checkpoint, sizes=((64, 64), (96, 64)))
    with Engine(EngineConfig(growth_ceiling=ALWAYS), [spec]) as engine:
        yield engine
