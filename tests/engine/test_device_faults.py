"""What the engine makes of a device that has no memory left, or that is broken for good."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from engine.acceleration import RECOMPILE_LIMIT, compile_named
from engine.config import EngineConfig
from engine.device import Device, is_out_of_memory
from engine.engine import Engine
from engine.errors import DeviceLost, EngineDied, EngineStopped
from tests.builders import until
from tests.engine.engine_builders import a_request, a_spec

ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    "words",
    [
        "GET was unable to find an engine to execute this computation",
        "Triton Error [CUDA]: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
    ],
)
def test_no_memory_is_understood_in_the_words_of_every_library(words):
    assert is_out_of_memory(RuntimeError(words))


def test_other_errors_are_no_lack_of_memory():
    assert not is_out_of_memory(RuntimeError(ILLEGAL))
    assert not is_out_of_memory(ValueError("a prompt about a robot that is out of memory"))


@pytest.mark.parametrize(
    ("raised", "is_lost"),
    [
        (torch.AcceleratorError(ILLEGAL), True),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (None, False),
    ],
)
def test_a_device_is_lost_when_it_answers_with_an_error_once_more(monkeypatch, raised, is_lost):
    def synchronize(device):
        if raised is not None:
            raise raised

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)

    assert Device("cuda:0", num_threads=1).is_lost() is is_lost
    assert Device("cpu", num_threads=1).is_lost() is False


@pytest.fixture
def broken(checkpoint, monkeypatch):
    """Yield an engine whose every forward fails, as all do after one that broke the device."""
    with Engine(EngineConfig(max_batch_rows=8), [a_spec(checkpoint)]) as engine:

        def fails(rows):
            raise torch.AcceleratorError(ILLEGAL)

        engine._checkpoints["tiny"].family.denoise = fails
        monkeypatch.setattr(Device, "is_lost", lambda self: True)
        yield engine


@pytest.mark.parametrize("images", [1, 3])
def test_images_on_a_device_that_is_lost_end_as_none_of_them_is_to_blame(broken, images):
    handles = [broken.submit(a_request(f"{place}", seed=place)) for place in range(images)]

    for handle in handles:
        with pytest.raises(DeviceLost, match="illegal memory access") as ended:
            handle.result(60)
        assert not isinstance(ended.value, EngineDied), "which counts the attempt"


def test_a_device_that_is_lost_while_it_loads_takes_down_more_than_one_model(
    checkpoint, monkeypatch
):
    def fails(*_):
        raise torch.AcceleratorError(ILLEGAL)

    monkeypatch.setattr("engine.checkpoints.LoadedCheckpoints.read", fails)
    monkeypatch.setattr(Device, "is_lost", lambda self: True)
    engine = Engine(EngineConfig(may_lack_checkpoints=True), [a_spec(checkpoint)])

    with pytest.raises(DeviceLost):
        engine.start()


def test_a_stop_tells_everyone_though_a_load_found_the_device_lost_meanwhile(
    checkpoint, monkeypatch
):
    def fails(*_, **__):
        raise torch.AcceleratorError(ILLEGAL)

    with Engine(EngineConfig(), [a_spec(checkpoint)]) as engine:
        monkeypatch.setattr("engine.checkpoints.LoadedCheckpoints.read", fails)
        monkeypatch.setattr(Device, "is_lost", lambda self: True)
        asked = []

        def ask_and_stop():  # on the device thread: what is left now is found at its end
            loading = engine.load(a_spec(checkpoint, name="other"))
            until(lambda: engine._inbox._notes, what="the load that fails")
            asked.extend([loading, engine.unload("tiny")])
            engine._inbox.stop()

        engine._inbox.post(ask_and_stop)
        until(lambda: len(asked) == 2, what="both")

        for each in asked:
            with pytest.raises(EngineStopped):
                each.result(30)


def test_a_device_that_is_lost_while_weights_leave_it_ends_the_engine(checkpoint, monkeypatch):
    def fails(*_):
        raise torch.AcceleratorError(ILLEGAL)

    with Engine(EngineConfig(), [a_spec(checkpoint)]) as engine:
        monkeypatch.setattr("engine.hostcopies.HostCopies.put", fails)
        monkeypatch.setattr(Device, "free_cached_memory", fails)
        monkeypatch.setattr(Device, "is_lost", lambda self: True)

        with pytest.raises(EngineStopped):
            engine.unload("tiny", may_return=True).result(30)
        until(lambda: engine.is_device_lost, what="the end of the engine")


@pytest.fixture
def attention_as_it_was():
    """Put the switches of the process back."""
    order = torch._C._get_sdp_priority_order()
    yield
    torch._C._set_sdp_priority_order(order)
    Device("cpu", num_threads=1).prepare()


@pytest.mark.parametrize(
    ("pinned", "order"),
    [
        ("flash", ["flash", "efficient", "math"]),
        ("cudnn", ["cudnn", "efficient", "math"]),
        ("efficient", ["efficient", "math"]),
        ("math", ["math"]),
    ],
)
def test_a_pinned_attention_kernel_comes_first_and_leaves_one_for_wide_heads(
    attention_as_it_was, pinned, order
):
    device = Device("cpu", num_threads=1, attention=pinned)
    device.prepare()

    assert device.attention_order == order
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    assert {kernel for kernel, is_enabled in enabled.items() if is_enabled} == set(order)
    first = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    first |= {"cudnn": "CUDNN_ATTENTION", "math": "MATH"}
    assert torch._C._get_sdp_priority_order()[0] == int(getattr(SDPBackend, first[pinned]))


class Block(nn.Module):
    """What a network repeats."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(width, width))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weights


class Network(nn.Module):
    """A network of one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = Block(width)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.block(rows)


def test_many_kinds_of_blocks_are_compiled_in_one_process():
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]

    for width in range(8, 20):
        network = Network(width).requires_grad_(False)
        compile_named(network, ("Block",), backend="eager")
        with torch.inference_mode():
            network(torch.randn(2, width))

    assert 8 < graphs["unique_graphs"] - before < RECOMPILE_LIMIT, "torch's own limit is 8"
