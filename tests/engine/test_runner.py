"""Pixels on their way from the device."""

import numpy as np
import pytest
import torch

from engine.runner import as_bytes


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_bytes_made_on_the_device_are_those_of_its_floats_on_the_host(dtype):
    every_byte = torch.arange(-10, 265.5, 0.25).repeat(3, 1) / 127.5 - 1
    drawn = torch.randn((3, 1102), generator=torch.Generator().manual_seed(0))
    decoded = torch.cat([every_byte, drawn], dim=1)[None, :, :, None].to(dtype)

    unit = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()[0]
    expected = (unit * 255).round().astype(np.uint8)
    assert np.array_equal(as_bytes(decoded).numpy(), expected)
