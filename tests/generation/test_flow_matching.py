import math

import pytest
import torch

from vtp_diffusion.generation import flow_matching as fm


def test_path_ends_at_noise_and_data_and_moves_with_the_velocity():
    data, noise = torch.randn(2, 4, 3, 3, 3).double()
    assert torch.equal(fm.interpolate(data, noise, torch.zeros(4)), noise)
    assert torch.equal(fm.interpolate(data, noise, torch.ones(4)), data)
    t = torch.rand(4).double()
    step = 1e-3
    moved = fm.interpolate(data, noise, t + step) - fm.interpolate(data, noise, t)
    assert torch.allclose(moved / step, fm.velocity(data, noise))


def test_loss_terms_have_their_closed_forms():
    data, noise = torch.randn(2, 3, 5, 2, 2)
    target = fm.velocity(data, noise)
    squared, cosine = fm.flow_matching_loss(target, data, noise)
    assert squared.abs().max() == 0 and cosine.abs().max() < 1e-6
    squared, cosine = fm.flow_matching_loss(-target, data, noise)
    assert torch.allclose(squared, 4 * target.square().mean((1, 2, 3)))
    assert torch.allclose(cosine, torch.full((3,), 2.0))
    _, scaled = fm.flow_matching_loss(7 * target, data, noise)
    assert scaled.abs().max() < 1e-6  # the cosine term sees the direction only


def test_loss_is_computed_in_float32():
    data, noise = torch.randn(2, 3, 5, 2, 2).bfloat16()
    assert all(term.dtype == torch.float32 for term in fm.flow_matching_loss(data, data, noise))


def test_times_are_logit_normal():
    t = fm.sample_times(200_000, mu=-0.75, sigma=1.25, generator=torch.Generator().manual_seed(0))
    logits = torch.logit(t.double())
    assert logits.mean() == pytest.approx(-0.75, abs=0.02)
    assert logits.std() == pytest.approx(1.25, abs=0.02)


def test_shift_is_a_flow_matching_scheduler_of_the_inverse_shift():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma, shift = 1 - t, 0.3
    scheduler = (1 / shift) * sigma / (1 + (1 / shift - 1) * sigma)
    assert torch.allclose(fm.shift_times(t, shift), 1 - scheduler)
    assert torch.equal(fm.shift_times(t, 1.0), t)


def test_the_shift_by_dimensions_is_raes_in_the_other_orientation():
    """RAE on 768 x 16 x 16 latents: noise level u becomes a u / (1 + (a - 1) u), a = sqrt(196608 / 4096) = 6.93."""
    a, u = math.sqrt(196608 / 4096), torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = 1 - fm.shift_times(1 - u, fm.dimension_shift(768 * 16 * 16))
    assert a == pytest.approx(6.928, abs=1e-3) and torch.allclose(shifted, a * u / (1 + (a - 1) * u))
    assert fm.dimension_shift(4096) == 1.0 and fm.dimension_shift(64 * 16 * 16) == 0.5


def test_sums_by_time_add_up_to_means_of_parts():
    t, values = torch.tensor([0.0, 0.09, 0.1, 0.55, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    table = fm.sums_by_time(values, t)
    assert table[:, 1].tolist() == [2, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert table[:, 0].tolist() == [4, 5, 0, 0, 0, 7, 0, 0, 0, 9]
    halves = fm.sums_by_time(values[:2], t[:2]) + fm.sums_by_time(values[2:], t[2:])
    assert torch.equal(halves, table)


def test_dropped_labels_become_the_null_class():
    labels = torch.arange(10).repeat(5000)
    dropped = fm.drop_labels(labels, 0.1, num_classes=10, generator=torch.Generator().manual_seed(0))
    changed = dropped != labels
    assert (dropped[changed] == 10).all()
    assert changed.float().mean() == pytest.approx(0.1, abs=3 * math.sqrt(0.09 / len(labels)))
    assert torch.equal(fm.drop_labels(labels, 0.0, 10), labels)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fm.sample_times(3, sigma=0.0),
        lambda: fm.shift_times(torch.rand(3), 0.0),
        lambda: fm.dimension_shift(0),
        lambda: fm.drop_labels(torch.zeros(3, dtype=torch.long), 1.5, 10),
        lambda: fm.flow_matching_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4)),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()
