"""Muon for the matrices inside blocks, AdamW for the rest: they step as torch's, and are left out together."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from vtp_diffusion import LightningDiTTransformer2DModel
from vtp_diffusion.training import muon as muon_file
from vtp_diffusion.training.muon import BatchedMuon
from vtp_diffusion.training.optimisation import MuonWithAdamW, muon_groups

ADAMW = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


SHAPES = [(16, 16), (24, 8), (8, 24), (16, 16), (24, 8), (1, 8), (16, 16)]
# Difference, as a share of the way the weights went. One rounding in bfloat16 is .004. Measured: 2e-5, which is of the
# additions in float32, and .0012 at 1376 x 256, where a batched product sums in another order than a single one.
CLOSE = 0.004


def tiny(num_layers=2):
    torch.manual_seed(0)
    return LightningDiTTransformer2DModel(
        sample_size=2, in_channels=4, num_layers=num_layers, num_attention_heads=2, attention_head_dim=8, num_classes=3
    )


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def assert_close(ours, theirs, before):
    for first, second, start in zip(ours, theirs, before, strict=True):
        assert (first - second).norm() <= CLOSE * (second - start).norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("matrices", [1, 100])
def test_batches_step_as_torch_does_and_go_on_from_its_state(monkeypatch, nesterov, adjust_lr_fn, matrices):
    monkeypatch.setattr(muon_file, "STACK_BYTES", matrices * 2 * 16 * 16)
    sizes, whole = [], muon_file.orthogonalised
    monkeypatch.setattr(
        muon_file, "orthogonalised", lambda stack, *settings: sizes.append(len(stack)) or whole(stack, *settings)
    )
    torch.manual_seed(0)
    ours = nn.ParameterList([torch.randn(shape) for shape in SHAPES])
    theirs = nn.ParameterList([p.detach().clone() for p in ours])
    before = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    try:
        batched, single = BatchedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    except ValueError as error:
        pytest.skip(f"this version of PyTorch: {error}")
    for seed in range(3):
        for model, optimizer in ((ours, batched), (theirs, single)):
            give_gradients(model, seed)
            optimizer.step()
        assert_close(ours, theirs, before)
        batched.load_state_dict(copy.deepcopy(single.state_dict()))
    assert max(sizes) == min(matrices, 3)
    assert all(
        torch.equal(batched.state[p]["momentum_buffer"], single.state[q]["momentum_buffer"])
        for p, q in zip(ours, theirs, strict=True)
    )


class Called(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_operations_do_not_grow_with_the_number_of_blocks_and_ask_the_device_nothing():
    products = []
    for num_layers in (1, 3):
        model = tiny(num_layers)
        optimizer = MuonWithAdamW(muon_groups(model, model, 0.1), **ADAMW)
        optimizer.found_inf = torch.zeros(())
        give_gradients(model, 0)
        optimizer.step()  # makes its state
        with Called() as called:
            optimizer.step()
        assert "_local_scalar_dense" not in called.names
        products.append([name for name in called.names if name not in ("unbind", "detach")])
    assert products[0] == products[1] and "baddbmm" in products[0]


def test_sharded_matrices_are_stepped_by_torch():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, values = init_device_mesh("cpu", (1,)), torch.randn(8, 4)
        parameter = nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
        optimizer = BatchedMuon([parameter], lr=0.1)
        parameter.grad = torch.ones_like(parameter)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert torch.equal(parameter.full_tensor(), values)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        assert not torch.equal(parameter.full_tensor(), values)
    finally:
        distributed.destroy_process_group()


def test_each_group_is_stepped_as_torch_does():
    ours, theirs, before = tiny(), tiny(), tiny()
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
    inside = {id(p) for p in matrices["params"]}
    for first, second, start in zip(ours.parameters(), theirs.parameters(), before.parameters(), strict=True):
        if id(second) in inside:
            assert_close([first], [second], [start])
        else:
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
