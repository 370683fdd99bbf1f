"""The device the engine owns: set up for repeatable bits, and timed without stalling it."""

import ctypes
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from engine.devicefacts import cpu_facts, cuda_facts, told
from engine.errors import UnsupportedRequest

cuda: Any = torch.cuda  # half of what is used of these two is not annotated
backends: Any = torch.backends


# Torch's kernels of scaled dot product attention.
ATTENTION = ("auto", "flash", "efficient", "cudnn", "math")
BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
KERNEL_NAMES = {"flash": "flash", "efficient": "mem_efficient", "cudnn": "cudnn", "math": "math"}
# Torch's allocator raises a class of its own. These are the words of all others: torch on a CPU;
# CUDA and its driver (pinned memory, a graph); Triton; cuBLAS, of its workspace; cuDNN, when no
# convolution's workspace could be had ("GET was unable to find an engine to execute this
# computation").
OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute",
)
# The share of free memory that is used, and what is left free at least: for fragments, and for the
# workspaces of convolutions. cuDNN quietly takes another kernel, with other bits, for good, where
# it cannot have one.
MEMORY_SHARE = 0.92
LEAST_MARGIN_BYTES = 1 << 30
SHARED_POOL = (0, 0)  # of the allocator: the memory that is no recording's
# What torch gives cuBLAS where nobody says: from Hopper on, and before.
LARGE_WORKSPACE_BYTES = 4096 * 8 * 1024
WORKSPACE_BYTES = 4096 * 2 * 1024 + 16 * 8 * 1024
CLOCK_S = 60.0
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; None: another library


@dataclass(frozen=True)
class Span:
    """When a piece of work was on the device, on one clock for all its work."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """Return how long it lasted."""
        return self.end_s - self.start_s


class Stopwatch(Protocol):
    """Started when made. Reading it may wait for the device; `is_ready` says whether it would."""

    @property
    def is_ready(self) -> bool: ...

    def stop(self) -> None: ...

    def wait(self) -> None: ...

    def span(self) -> Span: ...


class HostStopwatch:
    """Time on the host's clock: on a CPU the work is done when the call returns."""

    is_ready = True

    def __init__(self) -> None:
        self._started_s = self._stopped_s = time.perf_counter()

    def stop(self) -> None:
        """Take the time."""
        self._stopped_s = time.perf_counter()

    def wait(self) -> None:
        """Return: the work is done."""

    def span(self) -> Span:
        """Return when it was started and stopped."""
        return Span(self._started_s, self._stopped_s)


class CudaClock:
    """The zero from which a device's spans are told, as an event on the device.

    Events tell the milliseconds between two of them in 24 bits: exact to some microseconds over a
    minute, to seconds over a month. So a clock is replaced by its `next` every minute.
    """

    def __init__(self, before: "CudaClock | None" = None) -> None:
        self.made_at = time.monotonic()
        self._before = before
        self._before_s = 0.0  # what had passed on all clocks before this one
        self._zero = cuda.Event(enable_timing=True)
        self._zero.record()

    @property
    def is_old(self) -> bool:
        """Tell whether the next span should go by another clock."""
        return time.monotonic() - self.made_at > CLOCK_S

    def seconds_at(self, event: Any) -> float:
        """Return when the device passed an event of after this clock's zero; it must have."""
        if self._before is not None:
            self._before_s = self._before.seconds_at(self._zero)
            self._before = None
        return self._before_s + float(self._zero.elapsed_time(event)) / 1000


class CudaStopwatch:
    """Time on the device's clock, by two events in its stream.

    Taking it launches nothing and waits for nothing.
    """

    def __init__(self, clock: CudaClock) -> None:
        self._clock = clock
        self._start = cuda.Event(enable_timing=True)
        # The waiting thread sleeps instead of using a core.
        self._end = cuda.Event(enable_timing=True, blocking=True)
        self._start.record()

    @property
    def is_ready(self) -> bool:
        """Tell whether the device has passed the end."""
        return bool(self._end.query())

    def stop(self) -> None:
        """Mark the end in the stream."""
        self._end.record()

    def wait(self) -> None:
        """Wait for the device to pass the end. Any thread; without the interpreter lock."""
        self._end.synchronize()

    def span(self) -> Span:
        """Return when the device passed start and stop.

        Waits for it to pass the end.
        """
        self.wait()
        start_s = self._clock.seconds_at(self._start)
        return Span(start_s, start_s + float(self._start.elapsed_time(self._end)) / 1000)


class Device:
    """One CPU or GPU.

    Everything here is called on the engine's thread, but for what a side thread needs.
    """

    def __init__(
        self,
        name: str,
        *,
        num_threads: int,
        attention: str = "auto",
        fp16_accumulation: bool = False,
        blas_workspaces: tuple[str, str] = ("", ""),
    ) -> None:
        """Set nothing yet. See `EngineConfig`.

        Raises `UnsupportedRequest`, naming the field, for what this device has not, and
        `ValueError` for a kernel of attention that nobody has.
        """
        if attention not in ATTENTION:
            raise ValueError(f"attention is {attention!r}, none of {', '.join(ATTENTION)}")
        if fp16_accumulation and not name.startswith("cuda"):
            raise UnsupportedRequest(
                "fp16_accumulation", f"is for GPUs, and the device is {name!r}"
            )
        self.name = name
        self.attention = attention
        self.torch_device = torch.device(name)
        self.num_threads = num_threads
        self.fp16_accumulation = fp16_accumulation
        self.blas_workspaces = blas_workspaces
        self.recordings = 0  # of forwards, as CUDA graphs; whoever makes one counts it
        self._side: Any = None  # the stream that decodes run in
        self._is_aside = False  # it is the current one
        self._clock: CudaClock | None = None

    @property
    def is_cuda(self) -> bool:
        """Tell whether this is an NVIDIA (or ROCm) GPU."""
        return self.torch_device.type == "cuda"

    @property
    def attention_order(self) -> list[str]:
        """List the kernels that may run, the first that can compute a call before the others.

        A pinned `flash` or `cudnn` cannot compute every call: heads of the VAE are 512 wide, and
        fp32 is refused. `efficient` can, in a small part of the memory that `math` would need.
        """
        if self.attention in ("auto", "math"):
            return [self.attention]
        return list(dict.fromkeys([self.attention, "efficient", "math"]))

    def prepare(self) -> None:
        """Set what can change bits to fixed values.

        These switches are the process's: one engine per process.
        """
        torch.set_num_threads(self.num_threads)
        for kernel in ATTENTION[1:]:
            is_enabled = self.attention == "auto" or kernel in self.attention_order
            getattr(backends.cuda, f"enable_{KERNEL_NAMES[kernel]}_sdp")(is_enabled)
        if self.attention != "auto":
            members: Any = SDPBackend.__members__
            order = [int(members[BACKENDS[kernel]]) for kernel in self.attention_order]
            torch._C._set_sdp_priority_order(order)
        if self.is_cuda:
            cuda.set_device(self.torch_device)
            backends.cudnn.benchmark = False  # else the kernel depends on what ran first
            backends.cudnn.deterministic = True
            backends.cudnn.allow_tf32 = False
            backends.cuda.matmul.allow_tf32 = False
            backends.cuda.matmul.allow_fp16_accumulation = self.fp16_accumulation

    def prepare_side_thread(self) -> None:
        """Have a thread that loads beside the engine's compute with as many threads as that one.

        A new thread has as many as the machine has cores.
        """
        torch.set_num_threads(self.num_threads)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Launch a side thread's work of this context in a stream of its own, and wait for its end.

        Copies in the default stream would keep the forwards that are launched after them waiting.
        """
        if not self.is_cuda:
            yield
            return
        stream = cuda.Stream(self.torch_device)
        with cuda.stream(stream):
            yield
        stream.synchronize()

    def stopwatch(self) -> Stopwatch:
        """Start timing."""
        if not self.is_cuda:
            return HostStopwatch()
        # Not in the side stream: forwards that were launched before may pass their events first.
        if self._clock is None or (self._clock.is_old and not self._is_aside):
            self._clock = CudaClock(self._clock)
        return CudaStopwatch(self._clock)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Launch the work of this context in a stream of its own; on a CPU, do nothing.

        It runs after all that was launched until now, and beside the forwards to come.
        """
        if not self.is_cuda:
            yield
            return
        if self._side is None:
            self._side = cuda.Stream(self.torch_device)
        self._side.wait_stream(cuda.current_stream(self.torch_device))
        self._is_aside = True
        try:
            with cuda.stream(self._side):
                yield
        finally:
            self._is_aside = False

    def fetch(self, tensor: Tensor) -> Tensor:
        """Give a copy on the CPU.

        On a GPU only launched, there when a stopwatch stopped after this call is ready.
        """
        if not self.is_cuda:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )

    def free_cached_memory(self) -> None:
        """Give unused cached blocks back, after the device ran out of memory."""
        if self.is_cuda:
            cuda.empty_cache()

    def memory_bytes(self) -> int:
        """Tell what is allocated on a GPU now.

        0 on a CPU, whose memory is not the engine's to divide.
        """
        return int(cuda.memory_allocated(self.torch_device)) if self.is_cuda else 0

    def forget_peak(self) -> None:
        """Measure the peak from now on."""
        if self.is_cuda:
            cuda.reset_peak_memory_stats(self.torch_device)

    def peak_bytes(self) -> int:
        """Give the most that was allocated since `forget_peak`; 0 on a CPU."""
        return int(cuda.max_memory_allocated(self.torch_device)) if self.is_cuda else 0

    def memory_budget_bytes(self) -> int | None:
        """Tell what may be allocated in all, a margin for fragments left free; None on a CPU."""
        if not self.is_cuda:
            return None
        free_bytes, _ = cuda.mem_get_info(self.torch_device)
        all_bytes = int(free_bytes + cuda.memory_reserved(self.torch_device))
        return min(int(all_bytes * MEMORY_SHARE), all_bytes - LEAST_MARGIN_BYTES)

    def refusals(self) -> int:
        """Count how often memory was refused, also to a library that went another way; 0 on a CPU.

        With too little memory for one kernel's workspace cuDNN takes another kernel.
        """
        if not self.is_cuda:
            return 0
        return int(cuda.memory_stats(self.torch_device).get("num_ooms", 0))

    def recorded_bytes(self) -> int:
        """Tell what recorded forwards keep of the device's memory for themselves.

        It is theirs while nothing in it is allocated, and they are not running. 0 on a CPU.
        """
        if not self.is_cuda:
            return 0
        return sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in cuda.memory_snapshot(include_traces=False)
            if segment["device"] == (self.torch_device.index or 0)
            and tuple(segment["segment_pool_id"]) != SHARED_POOL
        )

    def thread_bytes(self) -> int:
        """Tell what each thread that computes keeps of the device's memory: cuBLAS's workspace.

        It stays for the next thread when one ends. 0 on a CPU.
        """
        if not self.is_cuda:
            return 0
        told = re.findall(r":(\d+):(\d+)", self.blas_workspaces[0])
        if told:
            return sum(int(kib) * int(number) for kib, number in told) * 1024
        is_large = cuda.get_device_capability(self.torch_device)[0] >= 9
        return LARGE_WORKSPACE_BYTES if is_large else WORKSPACE_BYTES

    def free_bytes(self) -> int | None:
        """Tell what may be allocated now; None where nobody knows."""
        budget_bytes = self.memory_budget_bytes()
        if budget_bytes is not None:
            return budget_bytes - self.memory_bytes() - self.recorded_bytes()
        available = told("/proc/meminfo", "MemAvailable")  # such as "17000000 kB"
        return int(available.split()[0]) * 1024 if available else None

    def is_lost(self) -> bool:
        """Tell, after an error, whether nothing on this device will work any more in this process.

        An illegal address, an uncorrectable memory error or a card off the bus stays: every later
        call of CUDA raises it again. Waits for what was launched.
        """
        if not self.is_cuda:
            return False
        try:
            cuda.synchronize(self.torch_device)
        except Exception as problem:  # noqa: BLE001  any error here is the device's
            return not is_out_of_memory(problem)
        return False

    def facts(self) -> dict[str, Any]:
        """Tell what of this device and its set-up can change a bit."""
        return cuda_facts(self) if self.is_cuda else cpu_facts(self)


def give_back_host_memory() -> None:
    """Have the C library give the kernel what it keeps of freed memory.

    Of weights that have been moved to a GPU it would keep all: a second copy, for good.
    """
    if MALLOC_TRIM is not None:
        MALLOC_TRIM(0)


def is_out_of_memory(problem: BaseException) -> bool:
    """Tell whether the device, or the host standing in for one, refused an allocation."""
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = str(problem)
    return isinstance(problem, RuntimeError) and any(words in told for words in OUT_OF_MEMORY)
