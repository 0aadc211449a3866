from types import SimpleNamespace

import pytest
import torch
from test_pipeline_lightning_dit import tiny_transformer

from vtp_diffusion.generation.flow_matching import shift_times
from vtp_diffusion.generation.objective import FlowMatchingConfig, FlowMatchingObjective, draw_inputs, resolve_shift

SHAPE = (3, 4, 4)


def draw(count: int, **settings) -> dict[str, torch.Tensor]:
    return draw_inputs(FlowMatchingConfig(**settings), SHAPE, count, torch.Generator().manual_seed(0))


class Perfect(torch.nn.Module):
    """Knows the velocity."""

    config = SimpleNamespace(base_head_layer=None)

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, hidden_states, timestep, class_labels, return_dict, return_base):
        return (self.velocity,)

    def target_scale(self, timestep):
        return torch.ones_like(timestep)


def test_a_perfect_network_has_no_loss_and_the_opposite_one_the_largest():
    inputs = draw(8)
    latents = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    target, labels = latents - inputs["noise"], torch.zeros(8, dtype=torch.long)
    batch = (latents, inputs["noise"], inputs["times"], labels)
    assert FlowMatchingObjective(Perfect(target), cosine_loss=True)(*batch)["loss"] < 1e-6
    losses = FlowMatchingObjective(Perfect(-target), cosine_loss=True)(*batch)
    torch.testing.assert_close(losses["squared_error"], 4 * target.square().mean())
    torch.testing.assert_close(losses["loss"], losses["squared_error"] + 2)
    without = FlowMatchingObjective(Perfect(-target), cosine_loss=False)(*batch)
    assert torch.equal(without["loss"], without["squared_error"])
    sums, counts = without["squared_error_by_time"].unbind(1)
    torch.testing.assert_close(sums.sum() / 8, without["squared_error"])
    assert counts.sum() == 8


def test_the_network_sees_the_interpolation_its_time_and_its_label():
    transformer, inputs = tiny_transformer(in_channels=3), draw(2)
    latents, labels = torch.ones(2, *SHAPE), torch.tensor([0, 3])
    with torch.no_grad():
        loss = FlowMatchingObjective(transformer, False)(latents, inputs["noise"], inputs["times"], labels)["loss"]
        t = inputs["times"].view(2, 1, 1, 1)
        prediction = transformer(t * latents + (1 - t) * inputs["noise"], inputs["times"], labels).sample
    torch.testing.assert_close(loss, (prediction - (latents - inputs["noise"])).square().mean())


def test_times_are_shifted_and_independent_of_how_labels_are_dropped():
    plain, shifted = draw(1000, time_distribution="uniform"), draw(1000, time_distribution="uniform", time_shift=0.5)
    assert torch.equal(shift_times(plain["times"], 0.5), shifted["times"])
    assert torch.equal(plain["noise"], shifted["noise"]) and torch.equal(plain["drop"], shifted["drop"])
    assert plain["noise"].shape == (1000, *SHAPE) and plain["drop"].mean() == pytest.approx(0.5, abs=0.05)
    assert resolve_shift("dimensions", (64, 16, 16)) == 0.5 and resolve_shift(0.3, SHAPE) == 0.3
