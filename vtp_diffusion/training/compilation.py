"""Compiling the parts of a model one by one (regional compilation)."""

from collections.abc import Iterable

import torch
from torch import nn


def keep_rows_unpadded() -> None:
    """Padded rows keep cuBLAS from adding the bias inside a product: where a width is no multiple of 64, as in VTP
    Large's SwiGLU, a copy of the bias into every row would come before it."""
    torch._inductor.config.comprehensive_padding = False


def compile_modules(model: nn.Module, class_names: Iterable[str]) -> None:
    """Compile the forward pass of every module of these classes by itself. Of blocks, one program serves all of a
    kind, which takes seconds where a whole model takes minutes.

    With several processes that is also faster than one program of everything: DDP sends the gradients of a block while
    those before it are computed, and what FSDP does at a block's borders stays outside. A step has few shapes, always
    the same ones: each has a program of its own, none with sizes left open.
    """
    torch._dynamo.config.optimize_ddp = False  # it would cut every program at the borders of DDP's buckets
    keep_rows_unpadded()
    names = set(class_names)
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = torch.compile(module.forward, dynamic=False)
