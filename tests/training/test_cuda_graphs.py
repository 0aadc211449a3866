"""Recorded passes: that they do what passes from Python do. Without a GPU something else stands for the graphs."""

import contextlib
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file
from test_joint import arguments, load_program, tiny_inputs, tiny_objectives
from test_train_vtp import fresh_accelerate  # noqa: F401
from tiny_training import assert_identical, log_of
from torch import nn

from vtp_diffusion.pretraining.joint import checkpoint_blocks
from vtp_diffusion.training.cuda_graphs import WARM_UP, CUDARecorder, GraphedPasses, why_not_recorded
from vtp_diffusion.training.loop import TrainingRun


class Recorder:
    """As CUDA graphs do it: recording computes nothing, a replay writes to where the recording has its results, and
    gradients are overwritten by the recording that made them and added to by later ones."""

    def __init__(self, module):
        self.module, self.parameters = module, list(module.parameters())

    def run(self, function):
        return function()

    def record(self, function):
        state = {name: value.clone() for name, value in self.module.named_buffers()}
        before = {p for p in self.parameters if p.grad is not None}
        losses = function()
        made = {p: p.grad for p in self.parameters if p.grad is not None and p not in before}
        added = {p: p.grad for p in before}
        for value in (*losses.values(), *made.values()):
            value.fill_(torch.nan)
        for name, value in self.module.named_buffers():
            value.copy_(state[name])

        def replay():
            for parameter in self.parameters:
                parameter.grad = None
            for name, value in function().items():
                losses[name].copy_(value)
            for p, gradient in made.items():
                gradient.copy_(p.grad)
            for p, gradient in added.items():
                if p.grad is not None:
                    gradient += p.grad
            for parameter in self.parameters:
                parameter.grad = None

        return losses, replay


def inputs_of(objective, step, device="cpu"):
    """Other inputs at every step, of the same kinds."""
    inputs = tiny_inputs(objective)
    for part in inputs.values():
        part |= {name: value.roll(step, -1) for name, value in part.items() if value.ndim == 4 or name == "token_ids"}
    inputs["self_supervision"]["temperature"] += 0.01 * step
    return {name: {key: v.to(device) for key, v in part.items()} for name, part in inputs.items()}


def passes_of(objective):
    def passes(part):
        losses = objective(**part)
        losses["loss"].backward()
        return {name: value.detach() + 0 for name, value in losses.items()}

    return passes


def trained(objective, passes_of_step, steps, device="cpu"):
    """Losses of every step, the fifth being left out."""
    optimizer, seen = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9), []
    for step in range(steps):
        seen.append(passes_of_step(objective.one_by_one(inputs_of(objective, step, device))))
        counts = step != 4
        if counts:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(0.5, torch.tensor(float(counts), device=device))
    return seen


def test_replayed_steps_are_those_of_python():
    plain, other = tiny_objectives(depth_rate=0.5), tiny_objectives(depth_rate=0.5)
    passes = passes_of(plain)
    expected = trained(plain, lambda parts: [passes(part) for part in parts], steps=7)
    graphed, gradients = GraphedPasses(passes_of(other), other.parameters(), recorder=Recorder(other)), []

    def watched(parts):
        losses = graphed(parts)
        gradients.append([p.grad for p in other.parameters() if p.requires_grad])
        return losses

    assert trained(other, watched, steps=7) == expected
    assert_identical(plain.state_dict(), other.state_dict())
    recorded = gradients[WARM_UP:]
    assert len(recorded) == 4 and all(g is not None for g in recorded[0])
    assert all(g is first for step in recorded for g, first in zip(step, recorded[0], strict=True))


def test_steps_that_find_no_memory_to_be_recorded_are_those_of_python():
    class Full(Recorder):
        def record(self, function):
            if counted.append(1) or len(counted) > 1:
                function()  # leaves gradients behind
                raise torch.OutOfMemoryError("Tried to allocate 1.31 GiB.")
            return super().record(function)

    plain, other = tiny_objectives(), tiny_objectives()
    passes, counted, reports = passes_of(plain), [], []
    expected = trained(plain, lambda parts: [passes(part) for part in parts], steps=6)
    graphed = GraphedPasses(passes_of(other), other.parameters(), report=reports.append, recorder=Full(other))
    assert trained(other, graphed, steps=6) == expected and len(counted) == 2
    assert_identical(plain.state_dict(), other.state_dict())
    assert len(reports) == 1 and "too little memory for that: Tried to allocate 1.31 GiB." in reports[0]


@pytest.mark.parametrize(
    ("error", "ending", "expected"),
    [
        (torch.OutOfMemoryError("too little"), None, "^too little$"),
        (torch.OutOfMemoryError("too little"), RuntimeError("invalidated"), "start again without cuda_graphs"),
        (None, RuntimeError("instantiation failed"), "start again without cuda_graphs"),
    ],
)
def test_what_cuda_makes_no_graph_of_ends_the_run(monkeypatch, error, ending, expected):
    @contextlib.contextmanager
    def recording(*args, **kwargs):
        try:
            yield
        finally:
            if ending is not None:
                raise ending

    def function():
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    recorder = object.__new__(CUDARecorder)
    recorder.stream = recorder.pool = None
    with pytest.raises(RuntimeError, match=expected) as raised:
        recorder.record(function)
    assert isinstance(raised.value, torch.OutOfMemoryError) == (ending is None)


def test_the_inputs_of_a_step_do_not_outlive_it():
    layer = nn.Linear(2, 1)
    graphed = GraphedPasses(lambda part: squares(layer, part), layer.parameters(), 1, recorder=Recorder(layer))
    gc.disable()  # programs collect rarely: what waits for it takes the memory of many steps
    try:
        for _ in range(3):
            images = torch.randn(3, 2)
            image = weakref.ref(images)
            graphed([{"a": {"x": images}}])
            layer.zero_grad(set_to_none=True)
            del images
            assert image() is None
    finally:
        gc.enable()


def test_the_losses_of_a_step_outlive_the_next():
    layer = nn.Linear(2, 1)
    graphed = GraphedPasses(lambda part: squares(layer, part), layer.parameters(), 1, recorder=Recorder(layer))
    found = []
    for step in range(4):
        found += graphed([{"a": {"x": torch.full((3, 2), float(step))}}])
        layer.zero_grad(set_to_none=True)
    assert len({losses["loss"].item() for losses in found}) == 4


def squares(layer, part):
    loss = layer(part["a"]["x"]).square().sum()
    loss.backward()
    return {"loss": loss.detach()}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"a": {"x": torch.ones(2, 2)}}], r"a\.x of part 0: float32 \(2, 2\) on cpu, expected float32 \(3, 2\)"),
        (
            [{"a": {"x": torch.ones(3, 2).double()}}],
            r"a\.x of part 0: float64 \(3, 2\) on cpu, expected float32 \(3, 2\)",
        ),
        ([{"a": {}}], r"a\.x of part 0: nothing, expected float32 \(3, 2\)"),
        ([{"a": {"x": torch.ones(3, 2)}}] * 2, r"a\.x of part 1: float32 \(3, 2\) on cpu, expected nothing"),
        ([{"a": {"x": 3}}], r"a\.x is of type int, expected a tensor"),
    ],
)
def test_other_inputs_are_refused(parts, message):
    layer = nn.Linear(2, 1)
    graphed = GraphedPasses(lambda part: squares(layer, part), layer.parameters(), 1, recorder=Recorder(layer))
    for _ in range(2):
        graphed([{"a": {"x": torch.ones(3, 2)}}])
        layer.zero_grad(set_to_none=True)
    with pytest.raises(ValueError, match=message):
        graphed(parts)


def test_gradients_of_before_and_recording_at_once_are_refused():
    layer = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="warm_up is 0, expected at least 1"):
        GraphedPasses(lambda part: squares(layer, part), layer.parameters(), 0, recorder=Recorder(layer))
    graphed = GraphedPasses(lambda part: squares(layer, part), layer.parameters(), 1, recorder=Recorder(layer))
    graphed([{"a": {"x": torch.ones(3, 2)}}])
    with pytest.raises(ValueError, match="parameters have gradients, expected none"):
        graphed([{"a": {"x": torch.ones(3, 2)}}])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"mixed_precision": "no"}, None),
        ({"device": torch.device("cpu")}, "the device is cpu"),
        ({"processes": 2}, "there are 2 processes"),
        ({"micro_steps": 4}, "a step has 4 micro-steps"),
        ({"mixed_precision": "fp16"}, "mixed_precision is fp16"),
    ],
)
def test_why_a_run_is_not_recorded(changes, reason):
    settings = {"device": torch.device("cuda"), "processes": 1, "micro_steps": 1, "mixed_precision": "bf16"}
    found = why_not_recorded(**settings | changes)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the program records passes in earnest")
def test_the_program_trains_the_same_with_it(tmp_path, monkeypatch, capsys):
    program = load_program("train_vtp")
    few = ["--evaluation_images=4", "--data.limit=16", "--cuda_graphs"]
    program.main(arguments(tmp_path / "plain", *few))
    assert (
        "cuda_graphs is true, but the passes of a step are not recorded: the device is cpu" in capsys.readouterr().out
    )
    monkeypatch.setattr(
        TrainingRun,
        "_graphed",
        lambda run, asked: GraphedPasses(run._pass, run.bare.parameters(), recorder=Recorder(run.bare)),
    )
    program.main(arguments(tmp_path / "graphed", *few))
    names = ("plain", "graphed")
    for file in ("vtp/diffusion_pytorch_model.safetensors", "checkpoint-6/objective.safetensors"):
        assert_identical(*(load_file(tmp_path / name / file) for name in names))
    losses = [[line.get("loss") for line in log_of(tmp_path / name)] for name in names]
    assert losses[0] == losses[1] and len(losses[0]) >= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recomputed", [0.0, 1.0])
def test_a_gpu_replays_what_python_does(recomputed):
    """Up to rounding: the order in which some gradients are summed is not fixed."""
    results = []
    for recorded in (False, True):
        objective = tiny_objectives(depth_rate=0.5).cuda()
        if recomputed:
            checkpoint_blocks(objective.objectives["contrastive"].model, recomputed)
        passes = passes_of(objective)
        graphed = GraphedPasses(passes, objective.parameters()) if recorded else None
        run = graphed or (lambda parts, passes=passes: [passes(part) for part in parts])
        losses = trained(objective, run, steps=8, device="cuda")
        results.append((losses, objective.state_dict()))
        assert graphed is None or len(graphed._recordings) == 3
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_goes_on_without_recordings_it_has_no_memory_for():
    def passes(part):
        hidden = layer(part["a"]["x"]).square()
        size = 2**50 if len(reports) == 0 and torch.cuda.is_current_stream_capturing() and len(called) % 2 else 1
        called.append(size)
        loss = hidden.sum() + torch.zeros(size, device="cuda").sum()
        loss.backward()
        return {"loss": loss.detach()}

    layer, reports, called, stream = nn.Linear(2, 1).cuda(), [], [], torch.cuda.current_stream()
    graphed, found = GraphedPasses(passes, layer.parameters(), 2, reports.append), []
    for _ in range(6):
        found.append(
            [losses["loss"].item() for losses in graphed([{"a": {"x": torch.ones(3, 2, device="cuda")}}] * 2)]
        )
        gradient = layer.weight.grad.clone()
        layer.zero_grad(set_to_none=True)
    assert len(reports) == 1 and "Tried to allocate" in reports[0] and called.count(2**50) == 1
    assert all(losses == found[0] for losses in found) and torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()  # which fails where a recording has not been ended
    expected = torch.autograd.grad(2 * layer(torch.ones(3, 2, device="cuda")).square().sum(), layer.weight)[0]
    torch.testing.assert_close(gradient, expected)
