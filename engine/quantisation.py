"""Hold the linear layers of a checkpoint as 8-bit numbers, with one scale for each output row.

Weights alone: a layer makes weights of the checkpoint's precision of them each time, and multiplies
by those. So memory halves or quarters, and a step takes no less time. Denoisers and text encoders
are quantised; convolutions, norms, embeddings and all that decodes pixels stay as they are. The
numbers depend on the file alone, and each layer computes one row as it does without: a row's bits
depend on its company no more than before.

No library: torchao's layers do the same arithmetic where nothing is compiled, and importing it
writes warnings into the log of every worker, quantised or not.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.errors import UnsupportedRequest
from engine.headers import QUANTISED_FOLDERS

QUANTISATIONS = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
FLOAT8_CAPABILITY = (8, 9)  # of CUDA devices: from Ada and Hopper on


def check_quantisation(how: str | None, device: torch.device) -> None:
    """Raise `UnsupportedRequest` for what is unknown, or what this device does not compute with."""
    if how not in (None, *QUANTISATIONS):
        raise UnsupportedRequest("quantize", f"{how!r} is none of {', '.join(QUANTISATIONS)}")
    if how == "float8" and device.type == "cuda":
        check_float8(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def check_float8(device_name: str, capability: tuple[int, int]) -> None:
    """Raise `UnsupportedRequest` for a GPU that has no 8-bit floating point."""
    if capability < FLOAT8_CAPABILITY:
        has, needs = (".".join(map(str, each)) for each in (capability, FLOAT8_CAPABILITY))
        raise UnsupportedRequest(
            "quantize",
            f"'float8' needs a GPU of compute capability {needs}, and {device_name} has {has};"
            " 'int8' works on it",
        )


class QuantisedLinear(nn.Linear):
    """A linear layer whose weights are 8-bit numbers x the scale of their row."""

    numbers: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """Take over a layer's bias, and its weights as numbers of `dtype`."""
        nn.Module.__init__(self)  # nn.Linear's own would make weights
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.computes_in = linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        numbers, scales = quantised(linear.weight, dtype)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the weights as they are computed with, made anew."""
        return (self.numbers.to(self.scales.dtype) * self.scales).to(self.computes_in)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


def quantised(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return numbers [out, in] of an 8-bit type and scales [out, 1]; their product is the weight.

    The largest number of each row is the largest of the type; of int8 127, so that both signs
    reach as far.
    """
    exact = weight.detach().float()
    is_integer = not dtype.is_floating_point
    largest = float(torch.iinfo(dtype).max if is_integer else torch.finfo(dtype).max)
    scales = exact.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scales = scales / largest
    numbers = (exact / scales).clamp(-largest, largest)
    return (numbers.round() if is_integer else numbers).to(dtype), scales


def quantise(network: nn.Module, folder: str, how: str | None) -> None:
    """Quantise the linear layers of a network in place, if the one of this folder is to be."""
    if how is None or not folder.startswith(QUANTISED_FOLDERS):
        return
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, QuantisedLinear(layer, QUANTISATIONS[how]))


def digest_of_quantised(weights_digest: str, how: str | None) -> str:
    """Return the digest of the weights as they are computed with."""
    if how is None:
        return weights_digest
    return hashlib.sha256(f"{weights_digest} {how}".encode()).hexdigest()
