"""Regional compilation: torch.compile of a model's blocks one by one."""

from collections.abc import Iterable

import torch
from torch import nn


def keep_rows_unpadded() -> None:
    """Turn off inductor's padding of rows in this process. With padded rows (widths that are no multiple of 64, as in
    VTP-Large's SwiGLU) cuBLAS does not fuse the bias into the product: a further kernel copies it into every row."""
    torch._inductor.config.comprehensive_padding = False


def compile_modules(model: nn.Module, class_names: Iterable[str]) -> None:
    """Compile the forward pass of every module of these classes by itself. All blocks of a class share one compiled
    graph, which takes seconds to compile; a whole model takes minutes.

    With several processes training is also faster than with one graph of the whole model: DDP sends the gradients of a
    block while those of earlier blocks are computed, and FSDP's hooks around a block stay outside the graph. Shapes
    are compiled as static, since all steps have the same few.
    """
    torch._dynamo.config.optimize_ddp = False  # it would split every graph at the borders of DDP's buckets
    keep_rows_unpadded()
    names = set(class_names)
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = torch.compile(module.forward, dynamic=False)
