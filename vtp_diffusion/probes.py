"""What frozen features know about classes: weighted nearest neighbours and linear heads, both as DINOv2 measures them
(Oquab et al., arXiv:2304.07193; its public evaluation code).

Features are read once and kept on disk (`probe_features.py`): there is no augmentation, which DINOv2's own linear
evaluation has.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .probe_features import ProbeFeatures

KNN_NEIGHBOURS = (10, 20)
KNN_TEMPERATURE = 0.07
# DINOv2's, for a batch of 256
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k highest scores.

    Args:
        scores: (N, C), any real numbers.
        labels: (N,) int64 from 0 to C - 1.
        k: of a problem with fewer than k classes every answer is right: 1.0.

    Raises:
        ValueError: shapes that do not fit, no rows, or scores that are not finite.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)}, expected (N, C) and (N,)")
    if not scores.isfinite().all():
        raise ValueError("scores are not finite: an accuracy of them would mean nothing")
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices  # (N, k)
    return (best == labels.to(best.device)[:, None]).any(1).double().mean().item()


def knn_scores(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    neighbours: Sequence[int] = KNN_NEIGHBOURS,
    num_classes: int | None = None,
    temperature: float = KNN_TEMPERATURE,
    chunk: int = 1024,
) -> dict[int, torch.Tensor]:
    """Votes (N, C) of each query's k nearest bank features, for every k: a neighbour with cosine similarity s votes
    for its class with exp(s / temperature) (Wu et al., arXiv:1805.01978; DINOv2 uses k = 10 and 20, temperature 0.07).

    Votes of a query sum to 1. Computed on the bank's device, `chunk` queries at a time.

    Args:
        bank: features (M, D) of labelled images; bank_labels: (M,) int64.
        queries: features (N, D).
        neighbours: values of k.
        num_classes: C; None = the largest label of the bank + 1.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, or fewer bank features than neighbours.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)}, expected (M, D) and (N, D)")
    if bank_labels.shape != bank.shape[:1]:
        raise ValueError(f"bank has {len(bank)} features and labels of shape {tuple(bank_labels.shape)}")
    if not neighbours or min(neighbours) < 1 or max(neighbours) > len(bank):
        raise ValueError(f"neighbours are {list(neighbours)}, expected 1 to {len(bank)}, the size of the bank")
    if not (bank.isfinite().all() and queries.isfinite().all()):
        raise ValueError("features are not finite: neighbours of them would mean nothing")
    bank_labels = bank_labels.to(bank.device)
    num_classes = int(bank_labels.max()) + 1 if num_classes is None else num_classes
    bank = F.normalize(bank.float(), dim=1)
    votes = {k: [] for k in neighbours}
    for part in queries.split(chunk):
        similarity = F.normalize(part.to(bank.device).float(), dim=1) @ bank.T  # (n, M)
        nearest, indices = similarity.topk(max(neighbours), dim=1)
        classes = bank_labels[indices]  # (n, max k)
        for k in neighbours:
            weights = (nearest[:, :k] / temperature).softmax(1)
            empty = weights.new_zeros(len(part), num_classes)
            votes[k].append(empty.scatter_add_(1, classes[:, :k], weights))
    return {k: torch.cat(parts) for k, parts in votes.items()}


def knn_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    labels: torch.Tensor,
    neighbours: Sequence[int] = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
) -> dict[int, float]:
    """Top-1 accuracy of weighted k-nearest-neighbour classification, for every k.

    Args: as of `knn_scores`; `labels` are the queries' (N,).
    """
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    scores = knn_scores(bank, bank_labels, queries, neighbours, num_classes, temperature)
    return {k: top_k_accuracy(votes, labels) for k, votes in scores.items()}


@dataclass(frozen=True)
class HeadSettings:
    """One linear head: what it reads (see `ProbeFeatures.inputs`) and how fast it learns.

    Attributes:
        learning_rate: of a batch of 256, as DINOv2 states it; the one used is proportional to the batch.
    """

    layers: int
    patches: bool
    learning_rate: float


def head_grid(num_layers: int, learning_rates: Sequence[float] = LEARNING_RATES) -> list[HeadSettings]:
    """DINOv2's grid: the class token of the last layer or of the last `num_layers`, with and without the mean patch
    token, at every learning rate."""
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"learning_rates are {list(learning_rates)}, expected positive numbers")
    choices = [(layers, patches) for layers in sorted({1, num_layers}) for patches in (False, True)]
    return [HeadSettings(*choice, rate) for choice in choices for rate in learning_rates]


class LinearHeads:
    """Linear classifiers on frozen features, all trained at once on the same batches, each as if it were alone.

    DINOv2's recipe: weights from N(0, 0.01), biases 0, cross-entropy, SGD with momentum 0.9 and no weight decay, the
    learning rate falling to 0 along a cosine. Heads that read the same input are one matrix product.

    Args:
        settings: one entry a head.
        num_classes: C.
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
    ) -> "LinearHeads":
        """Train all heads; epochs are shuffled, the batch is at most the data set. `progress` is called with 1."""
        if steps < 1 or batch_size < 1:
            raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
        if int(features.labels.max()) >= self.num_classes:
            raise ValueError(f"labels go to {int(features.labels.max())}, the heads have {self.num_classes} classes")
        # one for the order alone: more heads don't change what the others see
        weights, shuffling = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
        self.heads = [self._new_head(head, features, weights).to(device) for head in self.settings]
        batch_size = min(batch_size, len(features))
        groups = [
            {"params": list(head.parameters()), "lr": settings.learning_rate * batch_size / 256}
            for head, settings in zip(self.heads, self.settings, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(features), generator=shuffling)])
            rows, order = order[:batch_size].sort().values, order[batch_size:]
            labels = features.labels[rows].to(device)
            # the sum over heads: none of them sees another's gradient
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
        self, features: ProbeFeatures, device: torch.device | str = "cpu", k: Sequence[int] = (1, 5), chunk: int = 1024
    ) -> list[dict[int, float | None]]:
        """For every head, k -> top-k accuracy; None where training diverged."""
        counts = torch.zeros(len(self.settings), len(k), dtype=torch.float64)
        for start in range(0, len(features), chunk):
            rows = slice(start, start + chunk)
            labels = features.labels[rows]
            for indices, scores in self._scores(features, rows, device):
                for index, of_head in zip(indices, scores.cpu(), strict=True):
                    for place, number in enumerate(k):
                        finite = bool(of_head.isfinite().all())
                        accuracy = top_k_accuracy(of_head, labels, number) if finite else float("nan")
                        counts[index, place] += accuracy * len(labels)
        shares = (counts / len(features)).tolist()
        return [
            {number: None if math.isnan(share) else share for number, share in zip(k, row, strict=True)}
            for row in shares
        ]
