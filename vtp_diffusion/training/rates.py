"""Training speed: useful floating-point operations, a device's peak, their ratio (MFU), peak memory."""

import resource

import torch
from torch import nn

# Dense bfloat16 peak in FLOP/s, without sparsity, from NVIDIA's data sheets. The first entry that is part of the
# device's name counts: variants come first.
BF16_PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "L40S": 362e12
}  # fmt: skip


def peak_flops(device: torch.device, mixed_precision: str, given: float | None = None) -> float | None:
    """Peak that MFU is measured against, FLOP/s of one device: the one given, or the bfloat16 peak of a known GPU.

    None where there is no number: on a CPU, in float32, on an unknown GPU.
    """
    if given is not None:
        return given
    if device.type != "cuda" or mixed_precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAK_FLOPS.items() if part in name), None)


def forward_flops(module: nn.Module, *arguments: torch.Tensor) -> int:
    """Floating-point operations of the matrix products and attention in one forward pass, two for each multiplication
    with its addition. Nothing is computed: weights and arguments are replaced by shapes."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    shapes = {name: value.to("meta") for name, value in module.state_dict(keep_vars=False).items()}
    shapes |= {name: value.to("meta") for name, value in module.named_buffers()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(module, shapes, tuple(a.to("meta") for a in arguments))
    return counter.get_total_flops()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of tensors on the device so far; on a CPU the peak of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
