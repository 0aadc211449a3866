"""Nearest neighbours and linear heads on frozen features."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from vtp_diffusion.probes import knn_accuracy, knn_scores, top_k_accuracy


def clouds(count, seed, classes=4, dim=16):
    """Features around one centre a class, and the labels."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + 0.3 * torch.randn(count, dim, generator=generator), labels


def test_top_k_accuracy_of_known_scores():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    labels = torch.tensor([1, 1, 0, 2])
    assert [top_k_accuracy(scores, labels, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="not finite"):
        top_k_accuracy(scores * float("nan"), labels)
    with pytest.raises(ValueError, match=r"scores \(4, 3\) and labels \(3,\)"):
        top_k_accuracy(scores, labels[:3])


def test_neighbours_vote_as_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 8, generator=generator) for n in (60, 25))
    labels = torch.randint(0, 5, (60,), generator=generator)
    votes = knn_scores(bank, labels, queries, (3, 10, 20), chunk=7)
    for k, found in votes.items():
        peer = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        expected = peer.fit(bank.double().numpy(), labels.numpy()).predict_proba(queries.double().numpy())
        assert found.shape == (25, 5) and np.abs(found.numpy() - expected).max() < 1e-5


def test_neighbours_know_separable_classes_and_guess_shuffled_ones():
    bank, bank_labels = clouds(200, seed=1)
    queries, labels = clouds(400, seed=2)
    assert knn_accuracy(bank, bank_labels, queries, labels) == {10: 1.0, 20: 1.0}
    shuffled = bank_labels[torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    chance = knn_accuracy(bank, shuffled, queries, labels)
    assert all(0.05 < accuracy < 0.45 for accuracy in chance.values())
    # a class that the bank does not have is never right, and no error
    assert knn_accuracy(bank, bank_labels, queries, torch.full((400,), 9)) == {10: 0.0, 20: 0.0}


def test_neighbours_refuse_what_does_not_fit():
    bank, labels = clouds(15, seed=1)
    with pytest.raises(ValueError, match=r"neighbours are \[10, 20\], expected 1 to 15"):
        knn_scores(bank, labels, bank)
    with pytest.raises(ValueError, match=r"queries \(15, 3\)"):
        knn_scores(bank, labels, bank[:, :3])
    with pytest.raises(ValueError, match="features are not finite"):
        knn_scores(bank, labels, bank / 0, (1,))
