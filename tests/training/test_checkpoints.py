"""Checkpoints that were cut short, damaged or could not be written; runs that were killed or asked to stop."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_training
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_training import assert_identical, everything, interrupted_copy, log_of, make_run, tiny_config, train

from vtp_diffusion import LightningDiTTransformer2DModel
from vtp_diffusion.training import checkpoints
from vtp_diffusion.training.checkpoints import MANIFEST_NAME, Manifest, TrainingState, export_averaged, find_damage

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """On the CPU, where runs repeat bit for bit, and as in a new process: accelerate keeps its state between runs."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    torch.use_deterministic_algorithms(False)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "transformer/diffusion_pytorch_model.safetensors has": (
        "transformer/diffusion_pytorch_model.safetensors",
        truncate,
    ),
    "optimizer.pt is missing": ("optimizer.pt", Path.unlink),
    "the content of transformer_ema/diffusion_pytorch_model.safetensors is not": (
        "transformer_ema/diffusion_pytorch_model.safetensors",
        flip_a_byte,
    ),
    "manifest.json is missing": ("manifest.json", Path.unlink),
    "manifest.json is not JSON": ("manifest.json", truncate),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, message):
    config = tiny_config(tmp_path / "run", max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=3)
    straight = everything(train(config))
    name, damage = DAMAGES[message]
    damage(tmp_path / "run" / "checkpoint-3" / name)
    with pytest.warns(UserWarning, match=f"checkpoint-3 is damaged and not used: {message}"):
        run = train(config)
    assert run.first_step == 2
    assert_identical(everything(run), straight)
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
        "damaged-checkpoint-3",
    ]
    assert find_damage(tmp_path / "run" / "checkpoint-3") is None


def test_a_second_damaged_checkpoint_of_a_step_is_set_aside_beside_the_first(tmp_path):
    config = tiny_config(tmp_path / "run", max_train_steps=2, checkpointing_steps=1)
    train(config)
    for _ in range(2):
        truncate(tmp_path / "run" / "checkpoint-2" / "state.json")
        with pytest.warns(UserWarning, match="checkpoint-2 is damaged"):
            train(config)
    names = {path.name for path in (tmp_path / "run").glob("damaged-*")}
    assert names == {"damaged-checkpoint-2", "damaged-checkpoint-2-2"}


def test_a_planted_pickle_is_named_and_not_executed(tmp_path):
    class Planted:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    config = tiny_config(tmp_path / "run", max_train_steps=2, checkpointing_steps=1)
    train(config)
    folder = tmp_path / "run" / "checkpoint-2"
    torch.save({"optimizer": Planted()}, folder / "optimizer.pt")
    (folder / MANIFEST_NAME).unlink()
    with Manifest(folder) as manifest:  # as whoever planted it would
        manifest.write()
    with pytest.raises(ValueError, match="checkpoint-2/optimizer.pt cannot be read as a PyTorch file of tensors"):
        train(config)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", ["[]", '{"a.pt": 5}', "[" * 100_000])
def test_a_manifest_that_is_no_list_of_files_is_damage(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    (tmp_path / MANIFEST_NAME).write_text(content)
    assert "manifest.json" in find_damage(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    config = tiny_config(tmp_path / "run")
    train(config)
    for step in (3, 6):
        (tmp_path / "run" / f"checkpoint-{step}" / "state.json").write_text("")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"every checkpoint in .* is damaged:\n  checkpoint-6: state.json has 0 bytes"),
    ):
        train(config)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    config = tiny_config(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        while not (tmp_path / "run" / "checkpoint-3").exists():  # it is written meanwhile
            time.sleep(0.001)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))

    try:
        with pytest.raises(
            OSError, match=r"checkpoint 6 could not be written to .* MiB free\). .*are there: checkpoint-3"
        ):
            train(config, at_step={4: fill})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-3"]
    resumed = train(config)
    assert resumed.first_step == 3
    assert_identical(everything(resumed), everything(train(tiny_config(tmp_path / "straight"))))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.distributed.DistBackendError])
def test_a_failing_device_is_no_full_disk(kind, tmp_path, monkeypatch):
    def fail(state):
        raise kind("Tried to allocate 2 GiB, or to reach another process")

    monkeypatch.setattr(TrainingState, "moments", fail)
    with pytest.raises(kind, match="^Tried to allocate"):
        train(tiny_config(tmp_path / "run"))
    assert list((tmp_path / "run").glob("*checkpoint-*")) == []


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is written is the state of its step, whatever the steps after it change; the next save waits for it."""
    config = tiny_config(tmp_path / "run", max_train_steps=4, checkpointing_steps=2)
    straight = everything(train(tiny_config(tmp_path / "straight", max_train_steps=4, checkpointing_steps=2)))
    goes_on, write = threading.Event(), checkpoints.write_model
    monkeypatch.setattr(checkpoints, "write_model", lambda *args: goes_on.wait(10) and write(*args))
    there = []
    look = {3: lambda: (there.append(sorted((tmp_path / "run").glob("checkpoint-*"))), goes_on.set())}
    assert_identical(everything(train(config, at_step=look)), straight)
    assert there == [[]], "step 3 waited for the checkpoint of step 2"
    for step in (2, 4):
        one, other = (tmp_path / name / f"checkpoint-{step}" for name in ("run", "straight"))
        assert find_damage(one) is None
        for path in one.rglob("*.safetensors"):
            assert_identical(load_file(path), load_file(other / path.relative_to(one)))


def test_an_export_replaces_the_one_before_only_when_it_is_whole(tmp_path):
    run = make_run(tiny_config(tmp_path / "run"))
    guide = run.folder.path / "guide"
    export_averaged(run.model, run.optimisation.average, guide)
    before = guide.joinpath("diffusion_pytorch_model.safetensors").read_bytes()
    run.optimisation.average.averages[0].add_(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
        with pytest.raises(OSError, match="guide could not be written"):
            export_averaged(run.model, run.optimisation.average, guide)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert guide.joinpath("diffusion_pytorch_model.safetensors").read_bytes() == before
    export_averaged(run.model, run.optimisation.average, guide)
    assert guide.joinpath("diffusion_pytorch_model.safetensors").read_bytes() != before
    assert not list(run.folder.path.glob(".unfinished*guide"))


def test_a_log_and_a_picture_that_the_disk_does_not_take_are_named(tmp_path):
    run = train(tiny_config(tmp_path / "run", max_train_steps=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
        with pytest.raises(OSError, match="step-00000001.png could not be written: .*File too large"):
            run.report(1, {}, Image.new("RGB", (8, 8)))
        with pytest.raises(OSError, match="log.jsonl could not be written: .*File too large"):
            run.report(1, {"psnr": 20.0})
        with pytest.raises(OSError, match="guide could not be written: .*File too large"):
            export_averaged(run.model, run.optimisation.average, run.folder.path / "guide")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "run" / "guide").exists()


def test_an_objective_with_other_parts_is_refused(tmp_path, monkeypatch):
    train(tiny_config(tmp_path / "run"))

    class Wider(tiny_training.Objective):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

    monkeypatch.setattr(tiny_training, "Objective", Wider)
    with pytest.raises(ValueError, match=r"objective.safetensors and the objective differ in \['seen'\]"):
        train(tiny_config(tmp_path / "run", max_train_steps=8))


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    train(tiny_config(tmp_path / "run"))
    file = tmp_path / "run" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("ema_further_decays")))
    assert len(file.read_text().splitlines()) == len(lines) - 1
    train(tiny_config(tmp_path / "run", max_train_steps=8))
    assert log_of(tmp_path / "run")[-1]["step"] == 8


def test_several_averages_are_kept_and_resumed(tmp_path):
    """The first is the one that `average`, validations and pipelines use; decay 0 is the weights themselves."""
    config = tiny_config(tmp_path / "straight", ema_further_decays=[0.0, 0.5])
    run = train(config)
    straight = everything(run)
    assert list(run.optimisation.averages) == ["transformer_ema", "transformer_ema_0.0", "transformer_ema_0.5"]
    path = tmp_path / "straight" / "checkpoint-6"
    assert_identical(
        load_file(path / "transformer_ema_0.0" / "diffusion_pytorch_model.safetensors"), run.model.state_dict()
    )
    averaged = LightningDiTTransformer2DModel.from_pretrained(path / "transformer_ema_0.5")
    expected = run.optimisation.averages["transformer_ema_0.5"].averages
    assert all(torch.equal(p, a) for p, a in zip(averaged.parameters(), expected, strict=True))
    interrupted_copy(tmp_path / "straight", tmp_path / "resumed", step=3)
    config = tiny_config(tmp_path / "resumed", ema_further_decays=[0.0, 0.5])
    assert_identical(everything(train(config)), straight)
    with pytest.raises(ValueError, match=r"ema_further_decays is \[0.9\], expected different numbers"):
        tiny_config("nowhere", ema_further_decays=[0.9])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_program(tmp_path, number):
    config = tiny_config(tmp_path / "run")
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(config, at_step={3: lambda: os.kill(os.getpid(), number)})
    assert stopped.value.code == 128 + number and signal.getsignal(number) is handler
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    resumed = train(config)
    assert resumed.first_step == 4
    assert_identical(everything(resumed), everything(train(tiny_config(tmp_path / "straight"))))


def test_a_run_that_was_refused_at_a_validation_goes_on(tmp_path):
    """It begins with the validation that it missed, of weights from before the skipped steps."""
    config = tiny_config(tmp_path / "run", max_train_steps=24, checkpointing_steps=10, validation_steps=20)
    latents = torch.randn(4, 4, 2, 2)

    def start(broken):
        run = make_run(config)
        if run.validation_missed("psnr"):
            with run.averaged_weights():
                run.report(run.first_step, {"psnr": 9.0})
        for step in run.steps():
            run.optimise(step, iter([{"latents": latents, "broken": step in broken}]))
            if step + 1 == config.validation_steps:
                run.save_due(step)
                with run.averaged_weights():
                    pass
        return run

    with pytest.raises(ValueError, match="last 17 steps up to step 20 .* starts anew once the later checkpoints are"):
        start(broken=range(3, 20))
    assert start(broken=()).first_step == 20
    assert [line["step"] for line in log_of(tmp_path / "run") if "psnr" in line] == [20]


def test_a_run_without_a_step_left_is_refused_until_it_has_one(tmp_path):
    config = tiny_config(tmp_path / "run", max_train_steps=20, checkpointing_steps=2)
    with pytest.raises(ValueError, match="which resumes from checkpoint-2 once the later checkpoints are deleted"):
        train(config, broken_steps=range(3, 20))
    with pytest.raises(ValueError, match="last 17 steps up to step 20"):
        train(config)
    for path in set((tmp_path / "run").glob("checkpoint-*")) - {tmp_path / "run" / "checkpoint-2"}:
        shutil.rmtree(path)
    assert train(config).first_step == 2


def test_steps_before_a_signal_are_in_the_log(tmp_path):
    config = tiny_config(tmp_path / "run", log_steps=100, checkpointing_steps=100)
    with pytest.raises(SystemExit):
        train(config, at_step={3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    train(config)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 4, 6]


def test_a_process_that_fails_first_waits_for_the_one_that_writes(tmp_path, monkeypatch):
    """Launchers kill the others half a minute after a process has ended."""
    run = make_run(tiny_config(tmp_path / "run"))
    run.folder.unfinished(run.state.step).mkdir()  # by the main process
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="of this process"), run._writer as writer:
        writer.save(run.state, None)
        finishing = threading.Timer(1.0, run.folder.finish, (run.state.step, None))
        finishing.start()
        raise ValueError("an error of this process")
    assert [path.name for _, path in run.folder.checkpoints()] == ["checkpoint-0"]
    finishing.join()


def test_a_signal_in_the_last_step_is_not_forgotten(tmp_path):
    """What comes after training may take long: it is for the next start."""
    config = tiny_config(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        train(config, at_step={5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert stopped.value.code == 128 + signal.SIGTERM
    assert train(config).first_step == config.max_train_steps


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """Three steps, a checkpoint, a fourth step, kill -9 as soon as that is written, and the same command again."""
    config = {"folder": str(tmp_path / "killed"), "lr_scheduler": "cosine", "gradient_accumulation_steps": 2}
    config |= {"ema_further_decays": [0.5], "deterministic": True}
    job = {"config": config, "signal": {"rank": 0, "step": 9, "number": signal.SIGKILL, "after": "checkpoint-3"}}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "tiny_training.py", json.dumps([job])]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in (tmp_path / "killed").glob("*checkpoint-*")] == ["checkpoint-3"]
    resumed = train(tiny_config(**config))
    assert resumed.first_step == 3
    straight = train(tiny_config(**config | {"folder": tmp_path / "straight"}))
    assert_identical(everything(resumed), everything(straight))
    assert resumed.read == straight.read[6:]
    lines = [log_of(tmp_path / name) for name in ("killed", "straight")]
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]]
