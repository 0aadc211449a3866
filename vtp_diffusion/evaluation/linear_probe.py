"""Linear probe: linear classifiers on frozen features, trained on a grid of inputs and learning rates, as DINOv2 does
(Oquab et al., arXiv:2304.07193; its public evaluation code).

Features are computed once and kept on disk (`probe_features.py`). DINOv2 sees a new random crop of an image in every
epoch; features of several random crops of each image stand in for that.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..metrics.classification import top_k_accuracy
from ..runtime.reproducibility import stream_seed
from .probe_features import ProbeFeatures

# DINOv2's, for a batch of 256
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


@dataclass(frozen=True)
class HeadSettings:
    """One linear head: what it reads (see `ProbeFeatures.inputs`) and how fast it learns.

    Attributes: `learning_rate`: for a batch of 256, as DINOv2 states it; it is scaled linearly with the batch.
    """

    layers: int
    patches: bool
    learning_rate: float


def head_grid(
    num_layers: int, learning_rates: Sequence[float] = LEARNING_RATES, patches: Sequence[bool] = (False, True)
) -> list[HeadSettings]:
    """DINOv2's grid: the class token of the last layer or of the last `num_layers`, with and without the mean patch
    token, at every learning rate. VTP's heads always read the mean patch token: `patches` (True,)."""
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"learning_rates are {list(learning_rates)}, expected positive numbers")
    choices = [(layers, with_mean) for layers in sorted({1, num_layers}) for with_mean in patches]
    return [HeadSettings(*choice, rate) for choice in choices for rate in learning_rates]


class LinearHeads:
    """Linear classifiers on frozen features, all trained at once on the same batches, none influencing another.

    DINOv2's recipe: weights from N(0, 0.01), biases 0, cross-entropy, SGD with momentum 0.9 and no weight decay, the
    learning rate falling to 0 along a cosine. Heads that read the same input share one matrix product.

    Args: `settings`: one entry a head; `num_classes`: C.
    """

    def __init__(self, settings: Sequence[HeadSettings], num_classes: int):
        self.settings, self.num_classes = list(settings), num_classes
        self.groups: dict[tuple[int, bool], list[int]] = {}
        for index, head in enumerate(self.settings):
            self.groups.setdefault((head.layers, head.patches), []).append(index)
        self.heads: list[nn.Linear] = []

    def train(
        self,
        features: ProbeFeatures,
        steps: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        progress: Callable[[int], Any] = lambda count: None,
        rows: torch.Tensor | None = None,
    ) -> "LinearHeads":
        """Train all heads on these rows (None: all), shuffled in every epoch. A batch has at most as many images as
        an epoch. `progress` is called with 1 after every step."""
        if steps < 1 or batch_size < 1:
            raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
        if int(features.labels.max()) >= self.num_classes:
            raise ValueError(f"labels go to {int(features.labels.max())}, the heads have {self.num_classes} classes")
        # the order has a generator of its own, so that the number of heads does not change it
        weights, shuffling = (
            torch.Generator().manual_seed(stream_seed(use, seed)) for use in ("probe weights", "probe order")
        )
        self.heads = [self._new_head(head, features, weights).to(device) for head in self.settings]
        every = torch.arange(len(features)) if rows is None else rows
        batch_size = min(batch_size, len(every))
        groups = [
            {"params": list(head.parameters()), "lr": settings.learning_rate * batch_size / 256}
            for head, settings in zip(self.heads, self.settings, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < batch_size:
                order = torch.cat([order, every[torch.randperm(len(every), generator=shuffling)]])
            rows, order = order[:batch_size].sort().values, order[batch_size:]
            labels = features.labels[rows].to(device)
            # a sum over heads gives each of them the gradient of its own loss
            loss = sum(
                F.cross_entropy(scores.flatten(0, 1), labels.repeat(scores.shape[0]), reduction="sum")
                for _, scores in self._scores(features, rows, device)
            )
            optimizer.zero_grad()
            (loss / batch_size).backward()
            optimizer.step()
            schedule.step()
            progress(1)
        return self

    def _new_head(self, settings: HeadSettings, features: ProbeFeatures, generator: torch.Generator) -> nn.Linear:
        width = features.inputs(settings.layers, settings.patches, slice(0, 1)).shape[1]
        head = nn.Linear(width, self.num_classes)
        nn.init.normal_(head.weight, std=0.01, generator=generator)
        nn.init.zeros_(head.bias)
        return head

    def _scores(
        self, features: ProbeFeatures, rows: torch.Tensor | slice, device: torch.device | str
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(heads, their scores (H, n, C)) for every kind of input."""
        for (layers, patches), indices in self.groups.items():
            inputs = features.inputs(layers, patches, rows).to(device)
            weight = torch.cat([self.heads[index].weight for index in indices])  # (H·C, D)
            bias = torch.cat([self.heads[index].bias for index in indices])
            scores = F.linear(inputs, weight, bias).unflatten(1, (len(indices), self.num_classes))
            yield indices, scores.transpose(0, 1)

    @torch.no_grad()
    def accuracies(
        self,
        features: ProbeFeatures,
        device: torch.device | str = "cpu",
        k: Sequence[int] = (1, 5),
        chunk: int = 1024,
        rows: torch.Tensor | None = None,
    ) -> list[dict[int, float | None]]:
        """For every head, k -> top-k accuracy on the rows (None: all); None where training diverged."""
        every = torch.arange(len(features)) if rows is None else rows
        counts = torch.zeros(len(self.settings), len(k), dtype=torch.float64)
        for part in every.split(chunk):
            labels = features.labels[part]
            for indices, scores in self._scores(features, part, device):
                for index, of_head in zip(indices, scores.cpu(), strict=True):
                    for place, number in enumerate(k):
                        finite = bool(of_head.isfinite().all())
                        accuracy = top_k_accuracy(of_head, labels, number) if finite else float("nan")
                        counts[index, place] += accuracy * len(labels)
        shares = (counts / len(every)).tolist()
        return [
            {number: None if math.isnan(share) else share for number, share in zip(k, row, strict=True)}
            for row in shares
        ]
