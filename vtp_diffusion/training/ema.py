"""Averages of the weights over training."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class AveragedWeights:
    """Exponential moving average of parameters, in float32 on their device: average += (1 - decay)(weights - average).

    The decay is constant from the first step, as in LightningDiT; diffusers' `EMAModel` copies the weights at its
    first step instead. `bias_correction` divides out what is left of the initial weights (as Adam does with its
    moments), which after N steps is decay**N: much, when N is a few multiples of 1 / (1 - decay).
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, bias_correction: bool = False):
        self.decay, self.bias_correction, self.step = decay, bias_correction, 0
        self.averages = [p.detach().clone().float() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[nn.Parameter]) -> None:
        self.step += 1
        weight = 1 - self.decay
        if self.bias_correction:
            weight /= 1 - self.decay**self.step
        torch._foreach_lerp_(self.averages, [p.detach() for p in parameters], weight)

    @contextlib.contextmanager
    def swapped_into(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Inside the context the parameters hold the averages, afterwards what they held before."""
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), self.averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(parameters), kept)
