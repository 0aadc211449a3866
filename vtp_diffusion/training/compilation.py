"""Regional compilation: torch.compile of a model's blocks one by one."""

from collections.abc import Iterable

import torch
from torch import nn


def keep_rows_unpadded() -> None:
    """Turn off inductor's row padding, for the process: with padded rows (widths that are no multiple of 64, as in VTP
    Large's SwiGLU) cuBLAS does not fuse the bias into the product, and it is first copied into every row."""
    torch._inductor.config.comprehensive_padding = False


def compile_modules(model: nn.Module, class_names: Iterable[str]) -> None:
    """Compile the forward pass of every module of these classes by itself. All blocks of a class share one compiled
    graph: seconds, where a whole model takes minutes.

    With several processes that is also faster than one graph of the whole model: DDP sends the gradients of a block
    while those of earlier blocks are computed, and FSDP's hooks at the borders of a block stay outside. A step has few
    shapes, always the same ones: each is compiled by itself, none as a dynamic shape.
    """
    torch._dynamo.config.optimize_ddp = False  # it would split every graph at the borders of DDP's buckets
    keep_rows_unpadded()
    names = set(class_names)
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = torch.compile(module.forward, dynamic=False)
