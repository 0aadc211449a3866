"""Muon, with batched products for matrices of the same shape, and without waiting for the device.

Muon: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; the scale of its updates: arXiv:2502.16982.
"""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

# Size of a batch of bfloat16 matrices: 16 of XL's largest, since one alone has too few tiles to fill a large GPU. A
# step uses up to three times as much memory, less than the second moments that Muon does not have.
STACK_BYTES = 2**28


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon with the same settings and state; results are the same but for rounding in bfloat16.

    Like torch's fused optimisers it skips a step, leaving weights and momentum unchanged, if the attribute
    `found_inf`, a float on the device, is 1. Sharded weights (DTensor) are stepped one by one, as torch does.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        skip = getattr(self, "found_inf", None)
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return None if skip is not None and skip.item() else super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters, gradients, buffers = [], [], []
            self._init_group(group, parameters, gradients, buffers)
            # buffer += (1 - momentum) (gradient - buffer)
            _descend(buffers, gradients, skip, maximize=True, lr=1 - group["momentum"], weight_decay=1.0)
            alike: dict[Any, list[tuple[torch.Tensor, ...]]] = {}
            for matrix in zip(parameters, gradients, buffers, strict=True):
                alike.setdefault((matrix[0].shape, matrix[0].dtype, matrix[0].device), []).append(matrix)
            for (shape, *_), matrices in alike.items():
                count = max(1, STACK_BYTES // (2 * shape.numel()))
                for first in range(0, len(matrices), count):
                    _step_alike(*map(list, zip(*matrices[first : first + count], strict=True)), group, skip)
        return loss


def _step_alike(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    buffers: list[torch.Tensor],
    group: dict[str, Any],
    skip: torch.Tensor | None,
) -> None:
    """Step matrices of one shape (m, n) whose momentum is up to date."""
    first = parameters[0]
    stack = torch.empty(len(parameters), *first.shape, dtype=torch.bfloat16, device=first.device)
    updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
    torch._foreach_copy_(list(stack.unbind()), updates)
    del updates  # as large as two stacks
    stack = orthogonalised(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
    updates = list(stack.to(first.dtype).unbind())
    scale = update_scale(first.shape, group["adjust_lr_fn"])
    # weight -= lr scale update + lr weight_decay weight
    _descend(parameters, updates, skip, lr=group["lr"] * scale, weight_decay=group["weight_decay"] / scale)


def orthogonalised(
    stack: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Matrices (N, m, n), which are overwritten, with singular values brought near 1, by Newton-Schulz iteration:
    X <- a X + (b A + c A A) X with A = X X^T, from X of Frobenius norm 1."""
    a, b, c = coefficients
    tall = stack.size(1) > stack.size(2)  # A = X^T X from the right is the same and smaller
    stack.div_(torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp_(min=eps))
    for _ in range(steps):
        gram = stack.mT @ stack if tall else stack @ stack.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, stack, gram, beta=a) if tall else torch.baddbmm(stack, gram, stack, beta=a)
    return stack


def update_scale(shape: torch.Size, kind: str | None) -> float:
    """Factor on the learning rate of a matrix, by the kinds of torch.optim.Muon's `adjust_lr_fn`."""
    rows, columns = shape
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(ratio if kind == "spectral_unclamped" else max(1, ratio))


def _descend(
    tensors: list[torch.Tensor],
    gradients: list[torch.Tensor],
    skip: torch.Tensor | None,
    lr: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """tensor -= lr (gradient + weight_decay tensor), with `maximize` for minus the gradient; unchanged if `skip` is 1.
    This is plain SGD, whose fused kernel reads `skip` on the device and makes one pass over the tensors."""
    sgd(
        tensors,
        gradients,
        [None] * len(tensors),
        fused=True,
        found_inf=skip,
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
    )
