"""The contrastive objective against open_clip's losses, on one process and on two."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from two_processes import run_on_two

from vtp_diffusion.data.captions import clip_tokenizer, tokenize_captions
from vtp_diffusion.pretraining.contrastive import clip_loss, sigmoid_loss
from vtp_diffusion.pretraining.joint import gather_rows

ALL = torch.ones(6, dtype=torch.bool)


def some_features(count=6):
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(count, 8, generator=generator), dim=-1) for _ in range(2))
    scalars = (torch.tensor(7.0), torch.tensor(-3.0))
    return [x.requires_grad_() for x in (images, texts, *scalars)]


def losses_of(kind, inputs, paired):
    images, texts, scale, bias = inputs
    if kind == "clip":
        return clip_loss(images, texts, scale, paired)
    return sigmoid_loss(images, texts, scale, bias, paired)


@pytest.mark.parametrize(("kind", "theirs"), [("clip", ClipLoss), ("sigmoid", SigLipLoss)])
def test_the_losses_and_their_gradients_are_those_of_open_clip(kind, theirs):
    mine, other = some_features(), some_features()
    loss = losses_of(kind, mine, ALL)
    expected = theirs()(*other) if kind == "sigmoid" else theirs()(*other[:3])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for a, b in zip(mine, other, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("kind", ["clip", "sigmoid"])
def test_samples_without_a_caption_take_no_part(kind):
    inputs, paired = some_features(), torch.tensor([True, False, True, True, False, True])
    loss = losses_of(kind, inputs, paired)
    images, texts, *scalars = inputs
    torch.testing.assert_close(loss, losses_of(kind, [images[paired], texts[paired], *scalars], ALL[:4]))
    loss.backward()
    assert not images.grad[~paired].any() and not texts.grad[~paired].any()
    nobody = losses_of(kind, some_features(), ~ALL)
    assert nobody == 0


def union_in_two(rank):
    """Loss and gradients of this half of the batch, averaged over processes as distributed training does."""
    results = {}
    for kind in ("clip", "sigmoid"):
        images, texts, *scalars = some_features()
        half = slice(3 * rank, 3 * rank + 3)
        own = [images[half].detach().requires_grad_(), texts[half].detach().requires_grad_(), *scalars]
        paired = torch.tensor([True, True, False, True, True, True])[half]
        loss = losses_of(kind, own, paired)
        loss.backward()
        values = [loss.detach(), own[2].grad]
        for value in values:
            torch.distributed.all_reduce(value)
        gradients = [gather_rows(x.grad) / 2 for x in own[:2]]
        results[kind] = [value / 2 for value in values] + gradients
    return results


def test_two_processes_give_the_gradients_of_the_whole_batch(tmp_path):
    halves = run_on_two(union_in_two, tmp_path)
    paired = torch.tensor([True, True, False, True, True, True])
    for kind in ("clip", "sigmoid"):
        inputs = some_features()
        loss = losses_of(kind, inputs, paired)
        loss.backward()
        expected = [loss.detach(), inputs[2].grad, inputs[0].grad, inputs[1].grad]
        for results in halves:
            torch.testing.assert_close(results[kind], expected)


def test_long_captions_keep_their_end_and_missing_ones_are_marked():
    captions = ["a red apple", "", None, "  ", "word " * 50]
    token_ids, paired = tokenize_captions(captions, context_length=8)
    start, end = 49406, 49407
    assert token_ids.shape == (5, 8) and paired.tolist() == [True, False, False, False, True]
    assert token_ids[0].tolist()[:5] == [start, *token_ids[0, 1:4].tolist(), end] and not token_ids[0, 5:].any()
    assert token_ids[4, 0] == start and token_ids[4, -1] == end and (token_ids[4, 1:-1] < start).all()


def test_a_caption_of_a_megabyte_takes_no_time_and_leaves_those_that_fit_as_they_are():
    text = "a photo of a dog " * 5  # 25 words, more than fit
    token_ids, paired = tokenize_captions(["x" * 10**6, text, text + "and a cat " * 10**5], context_length=16)
    assert paired.all() and torch.equal(token_ids[1], token_ids[2]) and token_ids[0, -1] == 49407
    with pytest.raises(ValueError, match="'xx+'... has 1000000 characters, too many for 16 tokens"):
        clip_tokenizer(16)(["x" * 10**6])


def test_the_scale_stays_where_open_clip_keeps_it():
    from test_joint import tiny_objectives

    objective = tiny_objectives().objectives["contrastive"]
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        objective.model.logit_scale.data.fill_(value)
        objective.after_step(0.5)
        assert objective.model.logit_scale.item() == pytest.approx(expected)
