"""Nearest neighbours and linear heads on frozen features."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from vtp_diffusion.evaluation.linear_probe import HeadSettings, LinearHeads, head_grid
from vtp_diffusion.evaluation.probe_features import ProbeFeatures
from vtp_diffusion.metrics.classification import knn_accuracy, knn_scores, top_k_accuracy


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


def probe_features(count, seed):
    """Two layers of class tokens, the last one separable; the mean patch token is noise."""
    features, labels = clouds(count, seed)
    noise = torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(seed))
    return ProbeFeatures(torch.stack([noise[:, 0], features], 1).numpy(), noise[:, 1].numpy(), labels)


def test_heads_read_what_dinov2_gives_them():
    features = probe_features(5, seed=1)
    tokens, patches = torch.from_numpy(features.class_tokens), torch.from_numpy(features.patch_means)
    assert torch.equal(features.inputs(1, False), tokens[:, 1])
    expected = torch.cat([tokens[:, 0], tokens[:, 1], patches], dim=1)[[3, 1]]
    assert torch.equal(features.inputs(2, True, torch.tensor([3, 1])), expected)
    assert features.without_variants() is features, "all alike"
    features.variants = torch.tensor([False, True, False, True, False])
    base = features.without_variants()
    assert torch.equal(base.labels, features.labels[[0, 2, 4]])
    assert torch.equal(base.inputs(2, True), features.inputs(2, True, torch.tensor([0, 2, 4])))
    with pytest.raises(ValueError, match="layers is 3, the features have the last 2"):
        features.inputs(3, False)
    assert len(head_grid(4)) == 2 * 2 * 13 and len(head_grid(1, (0.1,))) == 2
    with pytest.raises(ValueError, match="expected positive numbers"):
        head_grid(1, (0.1, 0.0))


def test_heads_learn_separable_classes_and_nothing_from_shuffled_labels():
    train, held_out = probe_features(300, seed=1), probe_features(300, seed=2)
    heads = LinearHeads(head_grid(2, (1e-3, 0.1)), num_classes=4).train(train, steps=150, batch_size=64, seed=0)
    found = heads.accuracies(held_out, chunk=70)
    assert max(accuracy[1] for accuracy in found) > 0.99 and all(accuracy[5] == 1.0 for accuracy in found)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    shuffled = ProbeFeatures(train.class_tokens, train.patch_means, train.labels[order])
    chance = LinearHeads(head_grid(1, (0.1,)), num_classes=4).train(shuffled, steps=50, batch_size=64, seed=0)
    assert all(0.05 < accuracy[1] < 0.45 for accuracy in chance.accuracies(held_out))


def test_heads_do_not_notice_each_other_and_one_that_diverges_says_so():
    train = probe_features(100, seed=1)
    grid = [HeadSettings(1, False, 0.1), HeadSettings(2, True, 0.02), HeadSettings(1, False, 1e38)]
    together = LinearHeads(grid, num_classes=4).train(train, steps=30, batch_size=32, seed=0)
    alone = LinearHeads(grid[:1], num_classes=4).train(train, steps=30, batch_size=32, seed=0)
    assert torch.allclose(together.heads[0].weight, alone.heads[0].weight, atol=1e-6)
    assert together.accuracies(train)[2][1] is None
    assert together.accuracies(train)[0][1] > 0.9 and together.accuracies(train)[1][1] > 0.5
    with pytest.raises(ValueError, match="labels go to 3, the heads have 3 classes"):
        LinearHeads(grid, num_classes=3).train(train, steps=1, batch_size=8, seed=0)
