"""Which samples a step sees, what is drawn for them, and how they are read."""

import multiprocessing
import subprocess

import numpy as np
import pytest
import torch

from vtp_diffusion.data.batches import StepBatchSampler, fits_on_device, gathered_batches, read_batches
from vtp_diffusion.runtime.reproducibility import draw_for_positions, step_generator, step_positions

CPU = torch.device("cpu")


def test_an_epoch_shows_every_sample_once_over_all_processes():
    samplers = [StepBatchSampler(24, 4, seed=3, start_step=0, num_steps=6, rank=r, world_size=2) for r in range(2)]
    batches = [list(sampler) for sampler in samplers]
    for epoch in (slice(0, 3), slice(3, 6)):
        assert sorted(sum(batches[0][epoch] + batches[1][epoch], [])) == list(range(24))
    assert batches[0][:3] != batches[0][3:]


def test_batches_span_epochs_and_data_sets_smaller_than_a_batch():
    seen = np.concatenate(list(StepBatchSampler(5, 7, seed=0, start_step=0, num_steps=5)))
    assert np.bincount(seen).tolist() == [7] * 5


@pytest.mark.parametrize("weights", [None, torch.arange(11.0)])
def test_data_order_depends_on_seed_and_step_only(weights):
    straight = list(StepBatchSampler(11, 4, 5, start_step=0, num_steps=9, weights=weights))
    assert list(StepBatchSampler(11, 4, 5, start_step=6, num_steps=3, weights=weights)) == straight[6:]
    assert list(StepBatchSampler(11, 4, 6, start_step=0, num_steps=9, weights=weights)) != straight


def test_weighted_draws_follow_the_weights():
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0, 0.0])
    seen = np.concatenate(list(StepBatchSampler(5, 16, 0, 0, 100, weights=weights)))
    shares = np.bincount(seen, minlength=5) / len(seen)
    np.testing.assert_allclose(shares, weights / 8, atol=0.005)
    halves = [np.concatenate(list(StepBatchSampler(5, 8, 0, 0, 100, r, 2, weights))) for r in range(2)]
    assert sorted(np.concatenate(halves)) == sorted(seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 0, 1), "got 0 samples"),
        ((4, 4, 0, 0, 1, 2, 2), "rank 2 is not one of 2"),
        ((2, 4, 0, 0, 1, 0, 1, torch.ones(3)), r"shape \(3,\), expected \(2,\)"),
        ((2, 4, 0, 0, 1, 0, 1, torch.tensor([1.0, -1.0])), "not negative"),
        ((2, 4, 0, 0, 1, 0, 1, torch.zeros(2)), "all zero"),
        ((2, 4, 0, 0, 1, 0, 1, None, 0), "0 micro-steps a step"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepBatchSampler(*arguments)


@pytest.mark.parametrize("weights", [None, torch.arange(11.0)])
@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 4), (2, 2), (4, 2)])
def test_a_step_sees_the_same_samples_however_it_is_divided(weights, processes, accumulation):
    whole = list(StepBatchSampler(11, 8, 5, 1, 3, weights=weights))
    size, steps = 8 // (processes * accumulation), (accumulation, 3 * accumulation)
    parts = [
        list(StepBatchSampler(11, size, 5, *steps, rank, processes, weights, accumulation))
        for rank in range(processes)
    ]
    micro_steps = [sum(batches, []) for batches in zip(*parts, strict=True)]
    assert [sum(micro_steps[i : i + accumulation], []) for i in range(0, len(micro_steps), accumulation)] == whole


def test_what_is_drawn_for_a_sample_depends_on_its_position_only():
    def draw(count, generator):
        return {
            "noise": torch.randn(count, 3, generator=generator),
            "times": torch.rand(count, generator=generator),
        }

    whole = draw_for_positions(draw, range(0, 60), seed=1)
    for first, last in ((0, 5), (5, 33), (33, 34), (40, 60)):
        part = draw_for_positions(draw, range(first, last), seed=1)
        assert all(torch.equal(part[name], whole[name][first:last]) for name in whole)
    assert len(whole["times"].unique()) == 60
    assert not torch.equal(draw_for_positions(draw, range(5), seed=2)["times"], whole["times"][:5])
    assert not torch.equal(draw_for_positions(draw, range(5), seed=1, stream=1)["times"], whole["times"][:5])


def test_a_run_counts_its_samples_micro_step_by_micro_step_and_rank_by_rank():
    found = [k for step in range(3) for rank in range(2) for k in step_positions(step, rank, 2, 4)]
    assert found == list(range(24))


def test_generators_differ_in_every_key_and_repeat():
    draws = [
        torch.randn(4, generator=step_generator(*key)) for key in [(0, 0), (1, 0), (0, 1), (0, 0, 1), (0, 0, 0, 1)]
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == 5
    assert torch.equal(torch.randn(4, generator=step_generator(0, 0)), draws[0])


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return {"square": torch.tensor(indices) ** 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_however_they_are_read(workers):
    sampler = StepBatchSampler(10, 4, 0, 2, 5)
    before = torch.get_rng_state()
    read = [b["square"].tolist() for b in read_batches(Squares(), sampler, dict, CPU, workers)]
    gathered = [b["square"].tolist() for b in gathered_batches({"square": torch.arange(10) ** 2}, sampler, CPU)]
    assert read == gathered == [[i**2 for i in batch] for batch in sampler]
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_that_read_outlive_signals_of_others_than_their_parent():
    """Launchers and terminals signal the whole group, while training has a step to finish and needs its data."""
    others = multiprocessing.active_children()  # of loaders that earlier tests left to the garbage collector
    batches = read_batches(Squares(), [[k % 10] for k in range(30)], dict, CPU, 2)
    read = [next(batches), next(batches)]  # one of either process: both have begun
    readers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(readers) == 2
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(reader.pid) for reader in readers)], check=True)
    read += batches
    assert [b["square"].item() for b in read] == [(k % 10) ** 2 for k in range(30)]


def test_data_sets_stay_on_the_device_by_size_or_choice():
    assert fits_on_device(2**20, CPU) and not fits_on_device(2**40, CPU)
    assert fits_on_device(2**40, CPU, True) and not fits_on_device(1, CPU, False)
