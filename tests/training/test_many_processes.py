"""Training in two processes of a CPU, with whole weights (DDP) and with shards (FSDP2), against one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import NUM_SAMPLES, log_of, tiny_config, train

ROOT = Path(__file__).parents[2]
MODES = ("whole", "sharded")


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """On the CPU, where runs repeat bit for bit, and as in a new process: accelerate keeps its state between runs."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)


def keep_only(folder, target, step):
    """A run folder as it was after that step."""
    shutil.copytree(folder, target)
    for path in target.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the same run: in one process, in two, in two after three steps in one, with a third step that is not
    finite in one of two, stopped by a signal."""
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        train(tiny_config(folder / "one"))
        train(tiny_config(folder / "one-broken"), broken_steps={2})
    jobs = []
    for mode in MODES:
        broken = {"config": {"folder": str(folder / f"{mode}-broken")}, "shard": mode == "sharded"}
        jobs.append(broken | {"broken": {"rank": 1, "step": 2}})
        keep_only(folder / "one", folder / f"{mode}-resumed", 3)
        for name in (mode, f"{mode}-resumed"):
            jobs.append({"config": {"folder": str(folder / name)}, "shard": mode == "sharded"})
    stop = {"rank": 1, "step": 1, "number": signal.SIGTERM}
    jobs.append({"config": {"folder": str(folder / "stopped")}, "signal": stop})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "tests" / "tiny_training.py", json.dumps(jobs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def states(folder, step=6):
    """Everything a checkpoint holds, by file and name."""
    path = folder / f"checkpoint-{step}"
    found = {f"{p.parent.name}/{n}": v for p in path.rglob("*.safetensors") for n, v in load_file(p).items()}
    moments = torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]
    return found | {f"{name}/{key}": value for name, state in moments.items() for key, value in state.items()}


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def records(folder):
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_share_every_step_of_one(runs, mode):
    both = records(runs / mode)
    shared = [first + second for first, second in zip(both[0]["read"], both[1]["read"], strict=True)]
    assert all(len(batch) == 2 for record in both for batch in record["read"])
    assert sorted(sum(shared, [])[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resumed", ["", "-resumed"])
def test_losses_and_checkpoints_of_two_processes_are_those_of_one(runs, mode, resumed):
    lines = [log_of(runs / name) for name in ("one", mode + resumed)]
    for name in ("loss", "grad_norm"):
        assert [x[name] for x in lines[1]] == pytest.approx([x[name] for x in lines[0]], rel=1e-4)
    assert_close(states(runs / (mode + resumed)), states(runs / "one"))
    both = records(runs / (mode + resumed))
    assert both[0]["first_step"] == (3 if resumed else 0)
    assert both[0]["average"] == both[1]["average"]


@pytest.mark.parametrize("mode", MODES)
def test_one_process_goes_on_where_two_were(runs, tmp_path, mode):
    run = train(tiny_config(keep_only(runs / mode, tmp_path / "run", 3)))
    assert run.first_step == 3
    assert_close(states(tmp_path / "run"), states(runs / "one"))


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_not_finite_in_one_process_is_left_out_in_all(runs, mode):
    for step in (3, 6):
        assert_close(states(runs / f"{mode}-broken", step), states(runs / "one-broken", step))
    lines = log_of(runs / f"{mode}-broken")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1] and lines[2]["loss"] is None


def test_processes_agree_on_the_step_to_stop_at(runs):
    assert [path.name for path in (runs / "stopped").glob("*checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for, but accelerate runs NO on 1 x cpu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_what_accelerate_does_not_give_here_is_refused(tmp_path, monkeypatch, changes, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(replace(tiny_config(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
