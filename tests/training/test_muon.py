"""Muon for the matrices inside blocks, AdamW for the rest: each as torch has it, and left out together."""

import pytest
import torch
from torch import nn

from vtp_diffusion import LightningDiTTransformer2DModel
from vtp_diffusion.training.optimisation import MuonWithAdamW, muon_groups

ADAMW = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


def tiny():
    torch.manual_seed(0)
    return LightningDiTTransformer2DModel(
        sample_size=2, in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3
    )


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_each_group_is_stepped_as_torch_does():
    ours, theirs = tiny(), tiny()
    optimizer = MuonWithAdamW(muon_groups(ours, ours, 0.1), **ADAMW)
    groups = muon_groups(theirs, theirs, 0.1)
    matrices = groups.pop(0)
    names = {id(p): name for name, p in theirs.named_parameters()}
    assert all(names[id(p)].startswith("blocks.") and p.ndim == 2 for p in matrices["params"])
    adamw = torch.optim.AdamW(groups, **ADAMW)
    muon = torch.optim.Muon(
        matrices["params"], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does: states and groups are others then
    for seed in range(3):
        for model, optimizers in ((ours, [optimizer]), (theirs, [adamw, muon])):
            give_gradients(model, seed)
            for one in optimizers:
                for group in one.param_groups:
                    group["lr"] = 0.02 / (seed + 1)
                one.step()
    for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(first, second)
    assert {len(optimizer.state[p]) for p in ours.parameters()} == {1, 3}  # momentum; two moments and a count


def test_a_step_that_is_left_out_changes_nothing():
    model = tiny()
    optimizer = MuonWithAdamW(muon_groups(model, model, 0.0), **ADAMW)
    give_gradients(model, 0)
    optimizer.step()
    before = [value.clone() for p in model.parameters() for value in (p.detach(), *optimizer.state[p].values())]
    for parameter in model.parameters():
        parameter.grad.fill_(torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = [value for p in model.parameters() for value in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))


def test_a_model_without_matrices_in_blocks_is_refused():
    with pytest.raises(ValueError, match="optimizer is muon, but Linear has no blocks with matrices"):
        muon_groups(nn.Linear(2, 2), nn.Linear(2, 2), 0.0)
