"""Residual updates of a subset of the samples against the plain formula."""

import pytest
import torch

from vtp_diffusion.models.vtp_blocks import residual_update
from vtp_diffusion.pretraining.joint import draw_kept


@pytest.mark.parametrize("compiled", [False, True])
def test_stochastic_depth_has_the_gradients_of_adding_into_rows(compiled):
    """Against the plain formula, whose gradients are sums over rows."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 3, 4, generator=generator), torch.randn(4, 4, generator=generator)
    kept, seen = torch.tensor([4, 0, 5, 2]), torch.randn(6, 3, 4, generator=generator)

    def ours(x, weight):
        return residual_update(x, lambda part: torch.sin(part @ weight), kept)

    def plain(x, weight):
        return x.index_add(0, kept, torch.sin(x[kept] @ weight), alpha=6 / 4)

    ours = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    results = []
    for function in (ours, plain):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad((value * seen).sum(), leaves)])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def test_stochastic_depth_computes_fewer_samples_and_its_expectation_is_the_whole_update():
    x, seen = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0)), []

    def branch(part):
        seen.append(len(part))
        return torch.sin(part)

    # over all pairs of samples the mean is exact
    pairs = [torch.tensor([i, j]) for i in range(8) for j in range(i)]
    mean = torch.stack([residual_update(x, branch, kept) for kept in pairs]).mean(0)
    torch.testing.assert_close(mean, residual_update(x, torch.sin))
    assert set(seen) == {2}
    generator = torch.Generator().manual_seed(1)
    kept = draw_kept(8, num_layers=500, rate=0.7, generator=generator)["kept"]
    assert kept.shape == (500, 2, 2)
    assert all(len(set(row.tolist())) == 2 for row in kept.flatten(0, 1))
    frequencies = kept.flatten().bincount(minlength=8) / 1000
    assert (frequencies - 0.25).abs().max() < 0.06  # four standard deviations
    assert draw_kept(8, 4, 0.0, generator) == draw_kept(0, 4, 0.7, generator) == {}
