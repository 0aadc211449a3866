"""Top-k accuracy, and weighted k-nearest-neighbour classification as DINOv2 measures it (arXiv:2304.07193)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

KNN_NEIGHBOURS = (10, 20)
KNN_TEMPERATURE = 0.07


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k highest scores.

    Args:
        scores: (N, C), any real numbers.
        labels: (N,) int64 from 0 to C - 1.
        k: with fewer than k classes every answer counts as right, and the result is 1.0.
    Raises: ValueError: shapes that do not fit, no rows, or scores that are not finite.
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
    Raises: ValueError: shapes that do not fit, features that are not finite, or fewer bank features than neighbours.
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

    Args: as for `knn_scores`; `labels`: (N,) of the queries.
    """
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    scores = knn_scores(bank, bank_labels, queries, neighbours, num_classes, temperature)
    return {k: top_k_accuracy(votes, labels) for k, votes in scores.items()}
