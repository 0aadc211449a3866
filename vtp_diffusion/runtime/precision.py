"""Numerical precision: autocast, exact float32, deterministic algorithms."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact_float32(benchmark: bool = False) -> Iterator[None]:
    """TensorFloat-32 is off inside, whatever the process has set: torch allows it to convolutions by default.

    Args:
        benchmark: let cuDNN try its algorithms for every new shape.
    """
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        limit = torch.backends.cudnn.benchmark_limit  # of algorithms tried; else it would become PyTorch's
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, benchmark_limit=limit, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def use_deterministic_algorithms() -> None:
    """The same bits on every run on the same kind of device, where PyTorch has such algorithms; else it raises.

    To be called before the first product on a GPU, which fixes cuBLAS's workspace. What torch.compile measures to
    choose between kernels is left out as well: another choice would round differently.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch._inductor.config.deterministic = True


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a frozen autoencoder. `precision`: "no", "fp16" or "bf16", as accelerate's mixed_precision."""
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def to_float64(values: torch.Tensor) -> torch.Tensor:
    """The numbers in float64, on their device, or on the CPU where it has no such numbers (mps)."""
    return (values.cpu() if values.device.type == "mps" else values).double()
