"""Sums and concatenations over processes that gradients pass through, so that a loss over the whole batch is the same
however many processes it is spread over. Without torch.distributed every function is the identity."""

import torch
import torch.distributed as dist

from .processes import this_process


def num_processes() -> int:
    """Processes that train together; 1 without torch.distributed, whatever the launcher says."""
    return this_process()[1] if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    return this_process()[0] if num_processes() > 1 else 0


@torch.compiler.disable
def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Sum of the processes' tensors of one shape, without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def total(x: torch.Tensor) -> torch.Tensor:
    """`sum_over_processes`, and x itself (detached) with one process, where a compiled graph is not broken."""
    return sum_over_processes(x) if num_processes() > 1 else x.detach()


class _Gather(torch.autograd.Function):
    """Forward: every process's rows. Backward: what all processes' losses say about the rows of this one, summed."""

    @staticmethod
    def forward(ctx, x):
        gathered = x.new_empty(num_processes() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        ctx.rows = len(x)
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        first = process_index() * ctx.rows
        return gradient[first : first + ctx.rows]


@torch.compiler.disable
def _gather(x: torch.Tensor) -> torch.Tensor:
    return _Gather.apply(x)


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows (B, ...) of every process, in the order of the processes: (processes · B, ...), with gradients.

    When every process takes the mean over its own rows as its loss, and the gradients of the processes are averaged
    (as distributed data parallelism does), the result is the gradient of the mean over all rows. B must be the same in
    all of them.
    """
    return _gather(x) if num_processes() > 1 else x
