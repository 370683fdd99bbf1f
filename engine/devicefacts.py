"""What of a device and its set-up can change a bit, as plain values for the fingerprint."""

import platform
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from engine.device import Device

cuda: Any = torch.cuda  # half of what is used of these two is not annotated
backends: Any = torch.backends


def cuda_facts(device: "Device") -> dict[str, Any]:
    """Tell what of a GPU and its set-up can change a bit."""
    matmul = backends.cuda.matmul
    return {
        "device": cuda.get_device_name(device.torch_device),
        "capability": list(cuda.get_device_capability(device.torch_device)),
        "cuda": torch.version.cuda,
        "cudnn": backends.cudnn.version(),
        "cudnn_benchmark": backends.cudnn.benchmark,
        "cudnn_deterministic": backends.cudnn.deterministic,
        "tf32": [backends.cudnn.allow_tf32, matmul.allow_tf32],
        "reduced_precision_reduction": [
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        ],
        "fp16_accumulation": matmul.allow_fp16_accumulation,
        "blas": str(backends.cuda.preferred_blas_library()),
        # Of cuBLAS and cuBLASLt, which choose a kernel by them.
        "blas_workspaces": list(device.blas_workspaces),
        "sampler_factors": "host",  # where samplers compute their factors
        # cuBLAS chooses by it, and it is fewer under MPS and in a MIG instance.
        "multiprocessors": cuda.get_device_properties(device.torch_device).multi_processor_count,
        "sdp": device.attention_order,
    }


def cpu_facts(device: "Device") -> dict[str, Any]:
    """Tell what of a CPU and its set-up can change a bit."""
    return {
        "device": _cpu("model name") or platform.processor() or platform.machine(),
        "instructions": sorted(
            flag for flag in _cpu("flags").split() if flag.startswith(("avx", "amx", "fma"))
        ),
        "capability": backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "onednn": backends.mkldnn.is_available(),
        "mkl": backends.mkl.is_available(),
        "sdp": device.attention,
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def _cpu(key: str) -> str:
    """Return what Linux says of the processor, "" elsewhere.

    Its instruction set chooses the kernels, also inside oneDNN.
    """
    return told("/proc/cpuinfo", key)


def told(path: str, key: str) -> str:
    """Return the value in the first line of that key, "" where there is none."""
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                if line.partition(":")[0].strip() == key:
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""
