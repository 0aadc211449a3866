"""Mean and standard deviation of every channel of latents, streamed and merged in float64."""

from collections.abc import Iterable
from typing import Any

import torch

from ..runtime.reproducibility import to_float64

ROWS = 16  # latents per update: in float64 they still fit the processor's cache, which is ten times as fast


class ChannelStatistics:
    """Mean and standard deviation of each channel, streamed in float64 (Chan et al. 1979, pairwise update)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @classmethod
    def of(cls, *latents: torch.Tensor) -> "ChannelStatistics":
        """The statistics of tensors of latents (B, C, h, w)."""
        statistics = cls()
        for values in latents:
            statistics.update(values)
        return statistics

    def update(self, latents: torch.Tensor) -> None:
        """Add latents (B, C, h, w)."""
        for rows in latents.flatten(2).split(ROWS):
            values = to_float64(rows)  # (B, C, h·w)
            mean = values.mean((0, 2))
            squares = (values - mean[:, None]).square_().sum((0, 2))
            self._add(values.shape[0] * values.shape[2], mean, squares)

    def _add(self, count: int, mean: torch.Tensor, squares: torch.Tensor) -> None:
        total, difference = self.count + count, mean - self.mean
        self.squares = self.squares + squares + difference**2 * self.count * count / total
        self.mean, self.count = self.mean + difference * count / total, total

    @classmethod
    def merged(cls, parts: Iterable["ChannelStatistics"]) -> "ChannelStatistics":
        """The statistics of all parts together; their order affects the last digits."""
        whole = cls()
        for part in parts:
            whole._add(part.count, part.mean, part.squares)
        return whole

    def moments(self) -> dict[str, Any]:
        """For JSON: `count` of values, and of each channel the `mean` and the sum of `squares` around it."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_moments(cls, moments: dict[str, Any]) -> "ChannelStatistics":
        """What `moments` wrote."""
        whole = cls()
        whole.count = moments["count"]
        whole.mean, whole.squares = (torch.tensor(moments[name], dtype=torch.float64) for name in ("mean", "squares"))
        return whole

    def result(self) -> tuple[list[float], list[float]]:
        """(mean, population standard deviation), one value a channel."""
        return self.mean.tolist(), (self.squares / self.count).sqrt().tolist()
