"""Load one network as a worker does, and let it go: `python -m benchmarks.loading.loader`.

The device is torch's `meta`, in place of a GPU: weights that were moved there have left the host's
memory.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

os.environ |= {"TRANSFORMERS_VERBOSITY": "error"}  # before it is imported
import torch
from diffusers import UNet2DConditionModel

from engine.device import give_back_host_memory
from engine.families import latent
from tasks.loadturns import LoadTurns


def main() -> None:
    """Load when a line comes; say when this process is ready, and when it has loaded."""
    path, way, lock_file = sys.argv[1:]
    turn = LoadTurns(Path(lock_file)).turn if way == "in turn" else nullcontext
    latent._goes_straight_to = lambda device: way == "straight to the device"
    print("ready", flush=True)
    sys.stdin.readline()
    with turn():
        network = latent.load_network(
            UNet2DConditionModel, Path(path), "unet", torch.bfloat16, torch.device("meta")
        )
        if way != "kept by the C library":
            give_back_host_memory()
    print(sum(tensor.nbytes for tensor in network.parameters()), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
