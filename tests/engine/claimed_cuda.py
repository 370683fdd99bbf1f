"""A GPU that there is not: tensors that claim to lie on cuda:0, and a count of the host's waits.

The host holds their values and computes them, so an engine renders on them from start to end, its
own code all the way. Counted is what would make the host wait until the device has done all that
was launched: copies of memory that is not pinned, numbers that are read back, an event with nothing
launched behind it. As on a GPU, a tensor of the host and one of the device do not mix, but for
single numbers.
"""

import threading
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
# What tells the host a number or a shape that the device has to find first.
READS_BACK = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "_unique2",
    "_linalg_solve_ex",
}
COPIES = {"_to_copy", "copy_"}
PLACES = ("/engine/", "/diffusers/", "/transformers/")  # that a wait is told by
NO_PLACES = ("/tests/", "/engine/transfers.py")


class Claimed(Tensor):
    """A tensor on cuda:0 by its own word."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Claimed":
        with torch.inference_mode(False):  # else weights would have no views in that mode
            return torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=CUDA,
            )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    # These of torch ask for the driver before anything is dispatched.

    def __getitem__(self, place):
        held = self.held[ClaimedCuda.now.index(place)]
        return Claimed(held)

    def __setitem__(self, place, value):
        if isinstance(value, Tensor) and value.ndim and not isinstance(value, Claimed):
            ClaimedCuda.now.wait("copy to the device")
        self.held[ClaimedCuda.now.index(place)] = getattr(value, "held", value)

    def copy_(self, source, non_blocking=False):
        return torch.ops.aten.copy_.default(self, source, non_blocking)

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def tolist(self):
        return self.cpu().tolist()

    def contiguous(self, memory_format=torch.contiguous_format):
        if self.is_contiguous(memory_format=memory_format):
            return self
        return self.clone(memory_format=memory_format)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return ClaimedCuda.now.run(func, args, kwargs or {})


class ClaimedCuda(TorchDispatchMode):
    """The device: what was launched on it, and where the host waited for it."""

    now: "ClaimedCuda"

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()  # "what, where"
        self.launches = 0
        self.passed = 0  # how many of them the host has waited for
        self._known: dict[object, tuple[str, bool]] = {}  # name of an operation; is it composite?
        self._pinned: dict[int, Tensor] = {}  # by the address of their memory
        self._joined = threading.local()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def join(self) -> None:
        """Have the current thread's work counted, for as long as the thread lives."""
        if not getattr(self._joined, "is_here", False):
            self._joined.is_here = True
            torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor would ask a driver
            self.__enter__()

    def wait(self, what: str) -> None:
        """Note that the host waits; a thread that only waits keeps nobody."""
        self.passed = self.launches
        if not getattr(self._joined, "is_here", False):
            return
        place = next(
            frame
            for frame in reversed(traceback.extract_stack(limit=60))
            if any(part in frame.filename for part in PLACES)
            and not any(part in frame.filename for part in NO_PLACES)
        )
        file = place.filename.rpartition("site-packages/")[2].rpartition("/engine/")[2]
        self.waits[f"{what}, {file}:{place.lineno}"] += 1

    # --- pinned memory ---

    def pin(self, tensor: Tensor) -> Tensor:
        """Give a copy in memory that the device reads by itself."""
        with torch._C._DisableTorchDispatch():
            pinned = tensor.clone(memory_format=torch.contiguous_format)
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def is_pinned(self, tensor: Tensor) -> bool:
        """Tell whether the device reads this memory by itself."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    # --- operations ---

    def run(self, func, args, kwargs):
        """Do what the device would do, and note it."""
        if func not in self._known:
            name = func._schema.name.partition("::")[2]
            self._known[func] = name, _is_composite(func) and not name.startswith("scaled_dot")
        name, is_composite = self._known[func]
        if is_composite:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        device = kwargs.get("device")
        to_here = device is not None and torch.device(device).type == "cuda"
        tensors = list(_tensors((*args, *kwargs.values())))
        if not to_here and not any(isinstance(tensor, Claimed) for tensor in tensors):
            return self._on_host(func, args, kwargs)
        held = [_held(value) for value in args]
        options = {key: _held(value) for key, value in kwargs.items()}
        if device is not None:
            options["device"] = torch.device("cpu")
        if name in COPIES:
            return self._copy(func, args, kwargs, held, options)
        self._check_devices(name, tensors)
        self.launches += 1
        if name in READS_BACK:
            self.wait(f"read back by {name}")
        result = func(*held, **options)
        if name.endswith("_") and not name.startswith("_"):
            return args[0]
        return _claimed(result)

    def index(self, place):
        """Note what finding this place takes; give it as a place in what is held."""
        self.launches += 1
        for one in place if isinstance(place, tuple) else (place,):
            if isinstance(one, Claimed) and (one.dtype is torch.bool or one.ndim == 0):
                self.wait("read back by indexing")
            is_several = isinstance(one, list) or (isinstance(one, Tensor) and one.ndim > 0)
            if is_several and not isinstance(one, Claimed):
                self.wait("copy to the device")
        return _held(place)

    def _on_host(self, func, args, kwargs):
        if kwargs.pop("pin_memory", False):
            return self.pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs, held, options):
        """Copy within the device, or to or from it."""
        is_new = func._schema.name.endswith("_to_copy")
        source = args[0] if is_new else args[1]
        device = kwargs.get("device")
        came = isinstance(source, Claimed)
        goes = isinstance(args[0], Claimed) if not is_new else came
        if is_new and device is not None:
            goes = torch.device(device).type == "cuda"
        is_async = bool(kwargs.get("non_blocking") or args[2:])
        options.pop("pin_memory", None)
        result = func(*held, **options)
        self.launches += 1
        if not came and goes and not (is_async and self.is_pinned(source)):
            self.wait("copy to the device")
        if came and not goes:
            if is_new and is_async:  # torch puts it into pinned memory
                self._pinned[result.untyped_storage().data_ptr()] = result
            elif not (is_async and self.is_pinned(args[0])):
                self.wait("copy from the device")
        if not is_new:
            return args[0]
        return Claimed(result) if goes else result

    @staticmethod
    def _check_devices(name: str, tensors: list[Tensor]) -> None:
        """Raise as torch does where tensors of host and device would mix."""
        hosts = [tensor for tensor in tensors if not isinstance(tensor, Claimed)]
        if any(tensor.ndim for tensor in hosts) or (hosts and name in ("cat", "stack")):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")


def _tensors(values):
    """Iterate over the tensors among values and lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _held(value):
    """Give what the host holds of a value."""
    if isinstance(value, Claimed):
        return value.held
    if isinstance(value, list | tuple):
        return type(value)(_held(each) for each in value)
    return value


def _claimed(value):
    """Claim that every tensor of a result is on the device."""
    if isinstance(value, Tensor):
        return Claimed(value)
    if isinstance(value, list | tuple):
        return type(value)(_claimed(each) for each in value)
    return value


def _is_composite(func) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


@contextmanager
def claimed_cuda(monkeypatch):
    """Have `torch.cuda` be a claimed device; threads that take it are counted."""
    gpu = ClaimedCuda.now = ClaimedCuda()
    torch._C._ensureCUDADeviceGuardSet()
    for name, stub in _stubs(gpu).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: gpu.pin(tensor))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, *_: gpu.is_pinned(tensor))
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield gpu
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)


def _stubs(gpu: ClaimedCuda):
    """Give what the engine uses of `torch.cuda`."""

    class Event:
        """Passed once something was launched behind it."""

        def __init__(self, **_) -> None:
            self.at = 0

        def record(self, *_) -> None:
            self.at = gpu.launches

        def query(self) -> bool:
            return gpu.launches > self.at or gpu.passed >= self.at

        def synchronize(self) -> None:
            if not self.query():
                gpu.wait("event")

        def elapsed_time(self, other: "Event") -> float:
            return (other.at - self.at) / 1000

    stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: gpu.wait("stream"))

    @contextmanager
    def on_stream(_):
        gpu.join()
        yield

    return {
        "Event": Event,
        "Stream": lambda *_: stream,
        "_lazy_init": lambda: None,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: None,  # not that one: weights cannot go straight to it
        "device": lambda *_: nullcontext(),
        "empty_cache": lambda: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "claimed",
        "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=1),
        "max_memory_allocated": lambda *_: 1 << 20,
        "mem_get_info": lambda *_: (1 << 40, 1 << 40),
        "memory_allocated": lambda *_: 1 << 20,
        "memory_reserved": lambda *_: 1 << 20,
        "memory_stats": lambda *_: {},
        "memory_snapshot": lambda **_: [],
        "reset_peak_memory_stats": lambda *_: None,
        "set_device": lambda *_: gpu.join(),
        "stream": on_stream,
        "synchronize": lambda *_: gpu.wait("synchronize"),
    }
