"""DINO, iBOT, Sinkhorn-Knopp and KoLeo against their formulae, crops, masks and the teacher."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_joint import tiny_inputs, tiny_objectives
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as transforms
from two_processes import run_on_two

from vtp_diffusion.pretraining.crops import (
    TO_YIQ,
    TURN,
    CropConfig,
    _turn_hue,
    block_mask,
    cut,
    cut_as_version_0_1,
    draw_crops,
    gaussian_blur,
    make_crops,
    recolour_views,
)
from vtp_diffusion.pretraining.self_supervision import (
    DINOHead,
    SelfSupervisionConfig,
    dino_loss,
    entropies,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dino_compares_every_view_with_the_other_global_views():
    targets = random(2, 3, 5).softmax(-1)
    logits, again = (random(4, 3, 5, seed=1).requires_grad_() for _ in range(2))
    expected, pairs = 0.0, 0
    for g in range(2):
        for v in range(4):
            if g != v:
                log_probabilities = F.log_softmax(again[v] / 0.1, dim=-1)
                expected += -(targets[g] * log_probabilities).sum(-1).mean()
                pairs += 1
    loss = dino_loss(targets, logits)
    torch.testing.assert_close(loss, expected / pairs)
    loss.backward()
    (expected / pairs).backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_ibot_is_the_mean_over_crops_of_the_mean_over_their_masked_patches():
    targets = random(5, 7).softmax(-1)
    logits, again = (random(5, 7, seed=1).requires_grad_() for _ in range(2))
    # four crops: two masked patches, none, one, and two rows of padding
    weights = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0])
    each = [-(targets[i] * F.log_softmax(again[i] / 0.1, dim=-1)).sum() for i in range(3)]
    expected = ((each[0] + each[1]) / 2 + each[2]) / 4
    loss = ibot_loss(targets, logits, weights, num_crops=4)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_sinkhorn_knopp_alternates_its_two_normalisations():
    logits, valid = random(6, 4), torch.tensor([1.0, 1, 1, 1, 1, 0])
    q = torch.exp(logits[:5].double() / 0.5).T  # prototypes in rows, as the paper writes it
    q /= q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / 4
        q = q / q.sum(0, keepdim=True) / 5
    result = sinkhorn_knopp(logits, 0.5, valid)
    torch.testing.assert_close(result[:5], (q * 5).T.float())
    assert not result[5].any()
    assert sinkhorn_knopp(logits * 1e4, 0.04, valid).isfinite().all()
    assert not sinkhorn_knopp(logits, 0.5, torch.zeros(6)).any()


def test_koleo_is_minus_log_of_the_distance_to_the_nearest():
    x, again = (random(5, 3).requires_grad_() for _ in range(2))
    unit = again / again.norm(dim=1, keepdim=True)
    distances = torch.stack(
        [torch.stack([(unit[i] - unit[j]).norm() for j in range(5) if j != i]).min() for i in range(5)]
    )
    expected = -distances.log().mean()
    loss = koleo_loss(x)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)


def halves(rank):
    half = slice(3 * rank, 3 * rank + 3)
    features = random(6, 4)[half].requires_grad_()
    loss = koleo_loss(features)
    return {
        "sinkhorn": sinkhorn_knopp(random(6, 4)[half], 0.5, torch.ones(3)),
        "koleo": loss.detach(),
        "entropies": entropies(random(6, 4)[half].softmax(-1)),
    }


def test_statistics_of_a_batch_are_those_of_all_processes(tmp_path):
    first, second = run_on_two(halves, tmp_path)
    whole = sinkhorn_knopp(random(6, 4), 0.5, torch.ones(6))
    torch.testing.assert_close(torch.cat([first["sinkhorn"], second["sinkhorn"]]), whole)
    torch.testing.assert_close((first["koleo"] + second["koleo"]) / 2, koleo_loss(random(6, 4)))
    torch.testing.assert_close(first["entropies"], entropies(random(6, 4).softmax(-1)))


def test_entropies_tell_the_two_collapses_apart():
    flat, same, spread = torch.full((4, 4), 0.25), torch.eye(4)[[0, 0, 0, 0]], torch.eye(4)
    found = [tuple(round(v.item(), 4) for v in entropies(t).values()) for t in (flat, same, spread)]
    assert found == [(round(math.log(4), 4),) * 2, (0.0, 0.0), (0.0, round(math.log(4), 4))]


def test_the_head_is_a_weight_normed_layer_on_the_unit_sphere():
    config = SelfSupervisionConfig(head_hidden_size=8, head_bottleneck=4, prototypes=6)
    torch.manual_seed(0)
    head, x = DINOHead(5, config), random(3, 5)
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 6, bias=False))
    layer.parametrizations.weight.original0.data.fill_(1.0)
    layer.parametrizations.weight.original1.data.copy_(head.prototypes.weight.data)
    torch.testing.assert_close(head(x), layer(F.normalize(head.mlp(x), dim=-1)))
    assert [type(m).__name__ for m in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    head(x, learning=0.0).square().sum().backward()
    assert not head.prototypes.weight.grad.any() and head.mlp[0].weight.grad.any()


def test_schedules_start_and_end_where_dinov2_says():
    config = SelfSupervisionConfig()
    assert [config.momentum_at(d) for d in (0.0, 0.5, 1.0)] == pytest.approx([0.992, 0.996, 1.0])
    assert [config.temperature_at(d) for d in (0.0, 0.15, 0.3, 1.0)] == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_the_teacher_follows_the_student_and_learns_from_no_gradient():
    model = tiny_objectives()
    part, encoder = model.objectives["self_supervision"], model.autoencoder.encoder
    before = part.teacher_encoder.blocks[0].mlp.w1.weight.clone()
    encoder.blocks[0].mlp.w1.weight.data.add_(1.0)
    part.after_step(done=0.0)
    torch.testing.assert_close(part.teacher_encoder.blocks[0].mlp.w1.weight, before + (1 - 0.992))
    assert not any(p.requires_grad for p in part.teacher_encoder.parameters())


def test_centers_are_averages_of_the_teachers_outputs():
    part = tiny_objectives().objectives["self_supervision"]
    logits, valid = random(4, part.config.prototypes), torch.tensor([1.0, 1, 1, 0])
    part.dino_center.copy_(random(part.config.prototypes, seed=1))
    center = part.dino_center.clone()
    targets = part.targets(logits, torch.tensor(0.05), "dino", valid)
    torch.testing.assert_close(targets, F.softmax((logits - center) / 0.05, dim=-1))
    torch.testing.assert_close(part.dino_center, 0.9 * center + 0.1 * logits[:3].mean(0))


def test_outputs_that_are_not_finite_leave_the_centers_as_they_were():
    part = tiny_objectives().objectives["self_supervision"]
    logits = random(4, part.config.prototypes)
    logits[1, 2] = math.nan
    part.targets(logits, torch.tensor(0.05), "ibot", torch.ones(4))
    others = torch.arange(part.config.prototypes) != 2
    assert part.ibot_center[2] == 0
    torch.testing.assert_close(part.ibot_center[others], 0.1 * logits[:, others].mean(0))


def test_the_centers_of_a_step_that_is_left_out_become_what_they_were():
    """After two micro-steps, of which the second has an output that is not finite."""
    model = tiny_objectives()
    part, temperature = model.objectives["self_supervision"], torch.tensor(0.05)
    logits = random(4, part.config.prototypes)
    part.targets(logits, temperature, "dino", torch.ones(4))
    model.after_step(0.0, torch.tensor(1.0))
    before = part.dino_center.clone()
    torch.testing.assert_close(before, 0.1 * logits.mean(0))
    for broken in (1.0, math.nan):
        logits[0, 0] *= broken
        for name in ("dino", "ibot"):
            part.targets(logits, temperature, name, torch.ones(4))
    assert not torch.equal(part.dino_center, before) and part.ibot_center.any()
    model.after_step(0.0, torch.tensor(0.0))
    assert torch.equal(part.dino_center, before) and not part.ibot_center.any()


class Watch(TorchDispatchMode):
    """Names of the operations that were done."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_nothing():
    """Constants copied there, numbers read back and checks of results each make the host wait for all that is queued,
    and then the device for the host."""
    objective = tiny_objectives(depth_rate=0.3)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    config = objective.objectives["self_supervision"].config
    draws = draw_crops(config.crops, 4, torch.Generator().manual_seed(0))["crops"]
    inputs = tiny_inputs(objective)
    with Watch() as done:
        make_crops(images, config.crops, draws)
        for name in ("self_supervision", "reconstruction"):
            objective.objectives[name](objective.autoencoder, **inputs[name])["loss"].backward()
        objective.after_step(0.5, torch.ones(()))
    assert {"bmm", "convolution", "index_add"} <= done.names
    assert not done.names & {"lift_fresh", "_local_scalar_dense", "_linalg_check_errors", "nonzero", "masked_select"}


def test_turning_the_hue_turns_the_chrominance_and_keeps_the_luminance():
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angle = torch.tensor([0.3, -1.0], dtype=torch.float64)
    before, after = (
        torch.einsum("ij,bjhw->bihw", torch.from_numpy(TO_YIQ), p) for p in (pixels, _turn_hue(pixels, angle, TURN))
    )
    torch.testing.assert_close(after[:, 0], before[:, 0])
    turned = torch.complex(before[:, 1], before[:, 2]) * torch.exp(1j * angle)[:, None, None]
    torch.testing.assert_close(torch.complex(after[:, 1], after[:, 2]), turned)


def test_masks_hide_a_share_of_the_patches_in_some_of_the_crops():
    part, counts = tiny_objectives().objectives["self_supervision"], []
    for position in range(200):
        masks = part.draw_masks((16, 16), position, seed=3)
        assert (masks.any((1, 2))).sum() == 1  # half of two crops
        counts.append(masks.sum())
    assert np.array_equal(part.draw_masks((16, 16), 5, 3), part.draw_masks((16, 16), 5, 3))
    assert 256 * 0.1 - 8 < min(counts) and max(counts) <= 128 and 60 < np.mean(counts) < 90  # 0.1 to 0.5, mean 0.3
    inputs = part.mask_inputs(np.stack([part.draw_masks((4, 4), p, 0) for p in range(3)]))
    masks, masked, weights = (inputs[name] for name in ("masks", "masked", "mask_weights"))
    assert masks.shape == (6, 16) and masked.shape == weights.shape == (3 * 8,)
    assert masks.flatten()[masked[weights > 0]].all() and (weights > 0).sum() == masks.sum()
    assert weights.sum().item() == pytest.approx((masks.any(1)).sum().item())
    assert block_mask((4, 4), 0, np.random.default_rng(0)).sum() == 0


def test_blocks_of_a_mask_are_rectangles_anywhere_in_the_grid():
    random, seen = np.random.default_rng(0), np.zeros((5, 9), dtype=bool)
    for _ in range(300):
        mask = block_mask((5, 9), 4, random, small_blocks=False)  # no second block
        rows, columns = mask.any(1), mask.any(0)
        assert mask.shape == (5, 9) and 0 < mask.sum() <= 4
        assert mask[rows][:, columns].all()
        for side in (rows, columns):  # without gaps
            assert np.flatnonzero(side).size == np.ptp(np.flatnonzero(side)) + 1
        seen |= mask
    assert seen.all()


def test_a_crop_is_a_rectangle_of_the_image():
    """On a ramp, cutting is linear; as version 0.1 cuts, and away from the borders as it is done today."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    #                     area ratio left top mirror
    draws = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.9], [0.0, 0.5, 1 - 1e-6, 0.5, 0.1]])
    row = torch.linspace(-1, 1, 64)[:32]
    for function, inside in ((cut_as_version_0_1, slice(None)), (cut, slice(2, -2))):
        crops = function(ramp.expand(2, -1, -1, -1), draws, scale=(0.25, 1.0), size=32)
        torch.testing.assert_close(crops[0, 0, 0, inside], row[inside], rtol=0, atol=1e-5)
        torch.testing.assert_close(crops[1, 0, 0, inside], -row[inside], rtol=0, atol=1e-5)  # the right half, mirrored


@pytest.mark.parametrize("size, scale", [(12, (0.05, 0.32)), (8, (0.32, 1.0)), (64, (0.32, 1.0))])
def test_crops_are_torchvisions_antialiased_bicubic_ones(size, scale):
    generator = torch.Generator().manual_seed(0)
    images, draws = torch.rand(2, 3, 40, 48, generator=generator) * 2 - 1, torch.rand(6, 5, generator=generator)
    crops = cut(images, draws, scale, size)
    for k, draw in enumerate(draws.double()):
        share, ratio = scale[0] + (scale[1] - scale[0]) * draw[0], (4 / 3) ** (2 * draw[1] - 1)
        wide, tall = (min(round((share * 40 * 48 * r).sqrt().item()), s) for r, s in ((ratio, 48), (1 / ratio, 40)))
        left, top = int(draw[2] * (48 - wide + 1)), int(draw[3] * (40 - tall + 1))
        side, mode = [size, size], transforms.InterpolationMode.BICUBIC
        expected = transforms.resized_crop(images[k % 2], top, left, tall, wide, side, mode, antialias=True).clamp(
            -1, 1
        )
        expected = expected.flip(2) if draw[4] < 0.5 else expected
        torch.testing.assert_close(crops[k], expected, rtol=0, atol=1e-5)


def test_views_are_blurred_as_often_as_dinov2_writes():
    """1, .1 and .5 of the first global view, the second and the local ones; its code runs 1 - p."""
    images = torch.rand(1, 3, 8, 8).round().expand(400, -1, -1, -1)
    config = CropConfig(local_crops=1, local_size=8)
    draws = draw_crops(config, 400, torch.Generator().manual_seed(0))["crops"]
    draws[..., 5], draws[..., 10], draws[..., 12] = 1, 1, 1  # neither colour nor grey; the widest blur
    large, small = make_crops(images, config, draws)
    sharp = make_crops(images, dataclasses.replace(config, colour=False), draws)
    pairs = zip((large, small), sharp, strict=True)
    changed = [((views - plain).abs().mean((1, 2, 3)) > 1e-3).float() for views, plain in pairs]
    solarized, (first, second) = draws[:, 1, 13] < 0.2, changed[0].chunk(2)
    assert first.mean() == 1
    assert second[~solarized].mean().item() == pytest.approx(0.1, abs=0.05)
    assert changed[1].mean().item() == pytest.approx(0.5, abs=0.08)


def test_masks_are_filled_as_dinov2_fills_them():
    """On 6 x 6 patches .997 of what is wanted; .979 where no block is smaller than four patches, as in version 0.1."""
    filled = {}
    for small_blocks in (True, False):
        random, wanted, found = np.random.default_rng(0), 0, 0
        for _ in range(1500):
            count = int(random.uniform(0.1, 0.5) * 36)
            wanted, found = wanted + count, found + block_mask((6, 6), count, random, small_blocks).sum()
        filled[small_blocks] = found / wanted
    assert filled[True] == pytest.approx(0.997, abs=0.002) and filled[False] == pytest.approx(0.979, abs=0.004)


def test_views_have_their_sizes_and_depend_on_their_own_draws():
    config = CropConfig(local_crops=3, local_size=8)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = draw_crops(config, 4, torch.Generator().manual_seed(1))["crops"]
    large, small = make_crops(images, config, draws)
    assert large.shape == (8, 3, 16, 16) and small.shape == (12, 3, 8, 8)
    assert -1.001 <= min(large.min(), small.min()) and max(large.max(), small.max()) <= 1.001
    alone = make_crops(images[2:3], config, draws[2:3])
    torch.testing.assert_close(large[[2, 6]], alone[0])
    torch.testing.assert_close(small[[2, 6, 10]], alone[1])
    compiled = make_crops(images, config, draws, torch.compile(recolour_views, backend="aot_eager", dynamic=False))
    torch.testing.assert_close(compiled, (large, small))


def test_blur_keeps_constants_and_spreads_a_point_as_a_gaussian():
    point = torch.zeros(1, 3, 17, 17)
    point[..., 8, 8] = 1
    blurred = gaussian_blur(point, torch.tensor([1.5]))
    x = torch.arange(-4, 5)
    kernel = torch.exp(-(x**2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()
    torch.testing.assert_close(blurred[0, 0, 4:13, 4:13], kernel[:, None] * kernel)
    torch.testing.assert_close(
        gaussian_blur(torch.full((1, 3, 9, 9), 0.3), torch.tensor([2.0])), torch.full((1, 3, 9, 9), 0.3)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "share is 1.5"),
        ({"masked_crops": 0.3}, "masked_crops is 0.3 of 2 global crops"),
        ({"mask_ratio": (0.5, 0.1)}, "mask_ratio is .0.5, 0.1., expected the smaller number first"),
        ({"dino_weight": 0.0, "ibot_weight": 0.0}, "dino_weight or ibot_weight"),
        ({"teacher_temperature": (0.0, 0.07)}, "teacher_temperature"),
        ({"stochastic_depth": 1.0}, "stochastic_depth is 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfSupervisionConfig(**settings)
