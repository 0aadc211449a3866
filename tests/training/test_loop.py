"""What the training programs share, with tiny real models."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_training import (
    NUM_SAMPLES,
    Objective,
    assert_identical,
    everything,
    interrupted_copy,
    log_of,
    make_run,
    tiny_config,
    train,
)
from torch import nn

from vtp_diffusion import LightningDiTTransformer2DModel
from vtp_diffusion.runtime.reproducibility import step_generator
from vtp_diffusion.training.loop import MAX_SKIPPED_IN_A_ROW, TrainingRun
from vtp_diffusion.training.optimisation import AveragedWeights, learning_rate_at, parameter_groups
from vtp_diffusion.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """On the CPU, where runs repeat bit for bit, and as in a new process: accelerate keeps its state between runs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(tmp_path):
    config = tiny_config(tmp_path / "straight", lr_scheduler="cosine", lr_warmup_steps=2, ema_bias_correction=True)
    straight = everything(train(config))
    interrupted_copy(tmp_path / "straight", tmp_path / "resumed", step=3)
    run = train(replace(config, output_dir=str(tmp_path / "resumed")))
    assert run.first_step == 3
    assert_identical(everything(run), straight)
    assert sorted(p.name for p in (tmp_path / "resumed").glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-6"]
    logs = [log_of(tmp_path / name) for name in ("straight", "resumed")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "learning_rate", "calls", "epochs", "processes"):
        assert [line[name] for line in logs[0]] == [line[name] for line in logs[1]]
    assert logs[0][-1]["epochs"] == 6 * 4 / 20 and logs[0][-1]["processes"] == 1


def test_the_start_says_what_is_to_do_and_a_resumed_run_what_is_left(tmp_path, capsys):
    count = sum(p.numel() for p in Objective().parameters() if p.requires_grad) / 1e6
    made, batch = f"; {count:.4g} M trained parameters, float32 on cpu, 1 process\n", torch.zeros(4, 4, 2, 2)
    begun = {3: "training: 3 steps, 4 images each, 0.6", 8: "resumed after step 3: 5 steps are left, 4 images each, 1"}
    for steps, line in begun.items():
        run = make_run(tiny_config(tmp_path, max_train_steps=steps))
        run.batch_sampler(NUM_SAMPLES)
        for step in run.steps():
            run.optimise(step, iter([{"latents": batch, "broken": False}]))
        assert f"{line} epochs of {NUM_SAMPLES}{made}" in capsys.readouterr().out
        run.end()


def test_the_log_of_a_resumed_run_averages_over_the_same_steps(tmp_path):
    lengths = {"max_train_steps": 8, "checkpointing_steps": 4, "log_steps": 3}
    config = tiny_config(tmp_path / "straight", **lengths)
    train(config)
    interrupted_copy(tmp_path / "straight", tmp_path / "resumed", step=4)
    train(replace(config, output_dir=str(tmp_path / "resumed")))
    logs = [[(line["step"], line["loss"]) for line in log_of(tmp_path / name)] for name in ("straight", "resumed")]
    assert [step for step, _ in logs[0]] == [1, 3, 4, 6, 8] and logs[0] == logs[1]


def test_a_run_that_is_made_longer_equals_one_that_was_as_long(tmp_path):
    config = tiny_config(tmp_path / "straight", checkpointing_steps=4)
    straight = everything(train(config))
    config = replace(config, output_dir=str(tmp_path / "longer"))
    train(replace(config, max_train_steps=3))
    run = train(config)
    assert run.first_step == 3
    assert_identical(everything(run), straight)


def test_micro_steps_may_change_on_resuming(tmp_path):
    config = tiny_config(tmp_path / "straight")
    train(config)
    interrupted_copy(tmp_path / "straight", tmp_path / "divided", step=3)
    train(replace(config, output_dir=str(tmp_path / "divided"), gradient_accumulation_steps=2))
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("straight", "divided")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[1]) == 6


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = tiny_config(tmp_path / "run")
    first = everything(train(config))
    again = train(config)
    assert again.first_step == 6
    assert_identical(everything(again), first)


def test_checkpoints_hold_the_model_and_its_average_for_from_pretrained(tmp_path):
    run = train(tiny_config(tmp_path / "run", checkpointing_steps=2, checkpoints_total_limit=2))
    assert [step for step, _ in run.folder.checkpoints()] == [4, 6]
    path = tmp_path / "run" / "checkpoint-6"
    model = LightningDiTTransformer2DModel.from_pretrained(path / "transformer")
    assert_identical(model.state_dict(), run.model.state_dict())
    averaged = LightningDiTTransformer2DModel.from_pretrained(path / "transformer_ema")
    for parameter, average in zip(averaged.parameters(), run.optimisation.average.averages, strict=True):
        assert torch.equal(parameter, average)
    assert set(load_file(path / "objective.safetensors")) == {"head.weight", "head.bias", "calls"}


def test_other_data_are_refused_on_resuming(tmp_path):
    config = tiny_config(tmp_path / "run", max_train_steps=3)
    train(config, fingerprint="cats")

    def content():
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()}

    before = content()
    other = tiny_config(tmp_path / "run", max_train_steps=5)
    with pytest.raises(ValueError, match="fingerprint cats.*dogs"):
        train(other, fingerprint="dogs")
    assert content() == before, "config.yaml too: the run still goes on with its own settings"
    assert train(other, fingerprint="dogs", older_fingerprints=["cats"]).first_step == 3


def test_a_sampler_of_some_micro_steps_reads_what_the_run_s_own_does_there(tmp_path):
    run = make_run(tiny_config(tmp_path, gradient_accumulation_steps=2))
    whole, part = run.batch_sampler(NUM_SAMPLES), run.batch_sampler(NUM_SAMPLES, micro_steps=range(3, 7))
    assert len(part) == 4 and list(part) == list(whole)[3:7]
    assert [whole.positions(k) for k in range(12)] == [run.positions(k) for k in range(12)]
    assert list(run.batch_sampler(NUM_SAMPLES, micro_steps=range(12, 12))) == []


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    """A mean over 2 x 2 samples is the mean over 4: the same data through the sampler, half at a time."""
    large, small = Objective(), Objective()
    latents = torch.randn(4, 4, 2, 2, generator=step_generator(0, 0))
    runs = []
    for objective, count in ((large, 1), (small, 2)):
        config = tiny_config(tmp_path / f"{count}", gradient_accumulation_steps=count, max_train_steps=1)
        run = TrainingRun(config, RunFolder(config.output_dir, config), objective, objective.transformer, "m", "d")
        assert run.micro_steps == range(count)
        run.optimise(0, iter([{"latents": part, "broken": False} for part in latents.chunk(count)]))
        runs.append(run)
    for first, second in zip(runs[0].optimisation.trained, runs[1].optimisation.trained, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_what_the_launcher_says_of_accumulation_divides_no_loss(tmp_path, monkeypatch):
    train(tiny_config(tmp_path / "plain", max_train_steps=1))
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(tiny_config(tmp_path / "told", max_train_steps=1))
    assert log_of(tmp_path / "told")[0]["grad_norm"] == log_of(tmp_path / "plain")[0]["grad_norm"]


def test_steps_with_gradients_that_are_not_finite_are_left_out(tmp_path):
    run = train(tiny_config(tmp_path / "run"), broken_steps={2, 3})
    assert run.optimisation.skipped.tolist() == [0, 2]
    assert all(torch.isfinite(p).all() for p in run.optimisation.trained)
    assert run.optimisation.optimizer.state[run.optimisation.trained[0]]["step"].item() == 4
    lines = log_of(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2]


def test_averages_go_by_steps_those_left_out_too(tmp_path):
    """The weights, which such a step leaves alone, count once more: a_2 = a_1 + w (p_1 - a_1)."""
    decay = 0.9
    run = make_run(tiny_config(tmp_path / "run", ema_decay=decay, ema_bias_correction=True))
    latents, counted = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(1)), []
    for step, broken in enumerate((False, False, True)):
        weights, averages = (
            [t.detach().clone() for t in ts] for ts in (run.optimisation.parameters, run.optimisation.average.averages)
        )
        counted.append(run.optimise(step, iter([{"latents": latents, "broken": broken}])).item())
    assert counted == [1, 1, 0]
    weight = (1 - decay) / (1 - decay**3)
    for parameter, before, old, new in zip(
        run.optimisation.parameters, weights, averages, run.optimisation.average.averages, strict=True
    ):
        assert torch.equal(parameter, before)
        torch.testing.assert_close(new, old + weight * (before - old))


def test_tables_are_logged_as_means_and_memory_and_utilisation_beside(tmp_path):
    """Sums and counts add up over micro-steps and steps; a peak of 1 FLOP/s makes the MFU the rate times the work."""
    lengths = {"max_train_steps": 4, "checkpointing_steps": 3, "log_steps": 2, "gradient_accumulation_steps": 2}
    config = tiny_config(tmp_path / "run", peak_flops=1.0, **lengths)
    objective, folder = Objective(), RunFolder(config.output_dir, config)
    tables, plain = iter(torch.tensor([[float(k), 1.0], [0.0, 0.0]]) for k in range(8)), objective.forward
    objective.forward = lambda **inputs: plain(**inputs) | {"by_time": next(tables)}
    run = TrainingRun(config, folder, objective, objective.transformer, "transformer", "data", flops_per_image=3.0)
    batches = iter([{"latents": torch.ones(2, 4, 2, 2), "broken": k in (4, 5)} for k in range(8)])
    for step in run.steps():
        run.optimise(step, batches)
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["by_time"] for line in lines] == [[0.5, None], [2.5, None], [None, None], [6.5, None]]
    assert [line["loss"] is None for line in lines] == [False, False, True, False]  # the third step was left out
    for line in lines:
        assert line["mfu"] == pytest.approx(3 * line["images_per_second"]) and line["peak_memory_gib"] > 0


def test_training_stops_when_no_gradient_is_finite_any_more(tmp_path):
    """The checkpoints that are there then hold the weights of the last step that counted."""
    steps = MAX_SKIPPED_IN_A_ROW + 1
    config = tiny_config(tmp_path / "run", max_train_steps=steps, checkpointing_steps=25)
    with pytest.raises(ValueError, match=f"last {MAX_SKIPPED_IN_A_ROW} steps up to step {steps}"):
        train(config, broken_steps=set(range(1, steps)))
    kept = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-25", "checkpoint-50"]
    train(tiny_config(tmp_path / "one", max_train_steps=1))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert_identical(load_file(kept[1] / weights), load_file(tmp_path / "one" / "checkpoint-1" / weights))


def test_what_leads_to_no_finite_gradient_does_not_displace_the_checkpoint_before(tmp_path):
    steps = 30 + MAX_SKIPPED_IN_A_ROW
    config = tiny_config(tmp_path / "run", max_train_steps=200, checkpointing_steps=10, checkpoints_total_limit=1)
    with pytest.raises(ValueError, match=f"last 50 steps up to step {steps} .* from before: checkpoint-30"):
        train(config, broken_steps=set(range(30, 200)))
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in (30, 40, 50, 60, 70)}
    train(replace(config, output_dir=str(tmp_path / "other")), broken_steps={29})  # one step alone
    assert [path.name for path in (tmp_path / "other").glob("checkpoint-*")] == ["checkpoint-200"]


def test_a_training_that_diverged_is_refused_before_its_weights_are_evaluated(tmp_path):
    """17 of 20 steps skipped; a few in between, as fp16 skips them, are fine."""
    config = tiny_config(tmp_path / "run", max_train_steps=20, log_steps=20)
    message = "training has diverged: the last 17 steps up to step 20 were skipped, .* from before: checkpoint-3. "
    with pytest.raises(ValueError, match=message + r".* lower learning_rate \(0.01\)"):
        train(config, broken_steps=set(range(3, 20)))
    run = train(replace(config, output_dir=str(tmp_path / "other")), broken_steps=set(range(13, 20)))
    with run.averaged_weights():
        pass


@pytest.mark.parametrize("averages", [False, True])
def test_weights_that_are_not_finite_are_neither_saved_nor_evaluated(tmp_path, averages):
    config, runs = tiny_config(tmp_path / "run", max_train_steps=9), []

    def ruin():
        optimisation = runs[0].optimisation
        (optimisation.average.averages if averages else optimisation.parameters)[0].data[0] = torch.inf

    run = make_run(config)
    runs.append(run)
    latents, message = torch.randn(4, 4, 2, 2), "the weights or their averages are not finite since step [56]. Nothing"
    with pytest.raises(ValueError, match=message + ".* from before: checkpoint-3. "):
        for step in run.steps():
            if step == 5:
                ruin()
            run.optimise(step, iter([{"latents": latents, "broken": False}]))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    with pytest.raises(ValueError, match=message), run.averaged_weights():
        pass


def test_a_folder_of_another_configuration_is_refused_by_key(tmp_path):
    config = tiny_config(tmp_path / "run", max_train_steps=1)
    train(config)
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 there, 0.02 now\n  seed: 0 there, 1 now"):
        RunFolder(config.output_dir, replace(config, seed=1, learning_rate=2e-2))
    RunFolder(config.output_dir, replace(config, log_steps=7, report_to="none", checkpoints_total_limit=None))


def test_the_length_of_a_run_may_change_only_where_the_schedule_ignores_it(tmp_path):
    config = tiny_config(tmp_path / "run", max_train_steps=1)
    train(config)
    RunFolder(tmp_path / "run", replace(config, max_train_steps=9))
    config = tiny_config(tmp_path / "cosine", lr_scheduler="cosine")
    train(config)
    with pytest.raises(
        ValueError, match="(?s)to train longer, give a new output_dir.*max_train_steps: 6 there, 9 now"
    ):
        RunFolder(tmp_path / "cosine", replace(config, max_train_steps=9))


@pytest.mark.parametrize("left", ["", "log.jsonl", "checkpoint-1"])
def test_a_start_that_failed_before_its_first_step_lets_a_corrected_one_take_its_place(tmp_path, left):
    """Once a step is in the log, or in a checkpoint, there is something to lose."""
    config = tiny_config(tmp_path / "run", max_train_steps=1)
    corrected, early = replace(config, seed=1), RunFolder(tmp_path / "run", replace(config, seed=1))
    failed = RunFolder(tmp_path / "run", config)
    failed.claim()
    failed.log({"step": 0, "psnr": 9.0})
    with pytest.raises(ValueError, match="is not there for process"):
        early.check_shared(patience=0)  # of a machine that has the failed start's folder and not the run's
    if not left:
        run = train(corrected)
        run.folder.check_shared(patience=0)
        assert "seed: 1\n" in (tmp_path / "run" / "config.yaml").read_text()
        assert [line["step"] for line in log_of(tmp_path / "run")] == [1]
        return
    if left == "log.jsonl":
        failed.log({"step": 1})
    else:
        (tmp_path / "run" / left).mkdir()
    for start in (lambda: RunFolder(tmp_path / "run", corrected), early.claim):
        with pytest.raises(ValueError, match="another configuration:\n  seed: 0 there, 1 now"):
            start()


def test_a_run_is_not_made_shorter_than_it_is(tmp_path):
    """The pipeline would be that of 6 steps and its card would say 5."""
    config = tiny_config(tmp_path / "run")
    train(config)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match="max_train_steps is 5, but .* has trained for 6 steps"):
        train(replace(config, max_train_steps=5))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_folder_that_another_machine_does_not_have_is_refused_before_training(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", tiny_config(tmp_path / "run"))
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(
        ValueError, match="run, which the main process has made, is not there for process 8 on .* share"
    ):
        folder.check_shared(patience=0)
    folder.claim()
    folder.check_shared(patience=0)


def test_a_folder_claimed_by_half_is_claimed_again(tmp_path):
    """A kill while the configuration is written leaves a part of it, under a name that nobody reads."""
    (tmp_path / ".unfinished-config.yaml").write_text("output_d")
    train(tiny_config(tmp_path, max_train_steps=1))
    names = {"config.yaml", "log.jsonl", "checkpoint-1", ".lock"}
    assert {path.name for path in tmp_path.iterdir()} == names
    before = (tmp_path / "log.jsonl").stat().st_ino
    train(tiny_config(tmp_path, max_train_steps=1))
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "log.jsonl").stat().st_ino != before, "written over in place"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no run"):
        RunFolder(tmp_path, tiny_config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU accelerate joins the processes without --cpu")
def test_processes_that_did_not_find_each_other_are_refused(tmp_path, monkeypatch):
    """torchrun where there is no accelerator: each process would train alone, in the same folder."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched but accelerate joined 1"):
        train(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_line_of_the_log_is_named(tmp_path):
    config = tiny_config(tmp_path / "run", max_train_steps=3)
    train(config)
    for damaged in (b"\0\0\0\n", b"[1]\n", b'{"loss": 1.0}\n', b"\xff\n"):
        lines = (tmp_path / "run" / "log.jsonl").read_bytes().splitlines(keepends=True)[:3]
        (tmp_path / "run" / "log.jsonl").write_bytes(b"".join([lines[0], damaged, *lines[1:]]))
        with pytest.raises(ValueError, match="log.jsonl, line 2, is not a record of a step"):
            train(config)
        assert damaged in (tmp_path / "run" / "log.jsonl").read_bytes()
        (tmp_path / "run" / "log.jsonl").write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"lr_warmup_steps": 7}, "lr_warmup_steps is 7, expected 0 to max_train_steps, 6"),
    ],
)
def test_settings_outside_their_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("nowhere", **changes)


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="train_batch_size is 4 images a step, .* of 1 processes x 3"):
        train(tiny_config(tmp_path / "run", gradient_accumulation_steps=3))
    assert not (tmp_path / "run").exists()


def test_averages_follow_the_closed_form():
    """With w_k = k: a_N = decay**N w_0 + (1 - decay) sum decay**(N - k) w_k; corrected, the sum over 1 - decay**N."""
    decay, steps = 0.8, 7
    plain, corrected = 100 * decay**steps, 0.0
    for k in range(1, steps + 1):
        plain += (1 - decay) * decay ** (steps - k) * k
        corrected += (1 - decay) * decay ** (steps - k) * k / (1 - decay**steps)
    for bias_correction, expected in ((False, plain), (True, corrected)):
        parameter = nn.Parameter(torch.full((2,), 100.0))
        average = AveragedWeights([parameter], decay, bias_correction)
        for k in range(1, steps + 1):
            with torch.no_grad():
                parameter.fill_(k)
            average.update([parameter])
        torch.testing.assert_close(average.averages[0], torch.full((2,), expected))
        with average.swapped_into([parameter]):
            assert torch.equal(parameter.detach(), average.averages[0])
        assert parameter.tolist() == [steps, steps]


def test_learning_rate_warms_up_and_decays():
    config = tiny_config("x", max_train_steps=10, lr_warmup_steps=4, learning_rate=1.0, lr_scheduler="cosine")
    assert [learning_rate_at(step, config) for step in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert learning_rate_at(7, config) == pytest.approx(0.5) and learning_rate_at(9, config) > 0
    assert learning_rate_at(7, replace(config, lr_scheduler="linear")) == pytest.approx(0.5)
    assert learning_rate_at(9, replace(config, lr_scheduler="constant")) == 1.0


def test_only_matrices_decay():
    module = nn.ModuleDict({"linear": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "frozen": nn.Linear(2, 2)})
    module["frozen"].requires_grad_(False)
    module.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 4)))
    decayed, others = parameter_groups(module, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.1
    assert len(others["params"]) == 4 and others["weight_decay"] == 0.0


def test_a_changing_weight_decay_reaches_what_decays_wherever_its_group_stands(tmp_path):
    run = make_run(tiny_config(tmp_path / "run", adam_weight_decay=0.1))
    run.optimisation.optimizer.param_groups.reverse()
    run.optimisation.set_weight_decay(0.3)
    assert {group["decayed"]: group["weight_decay"] for group in run.optimisation.optimizer.param_groups} == {
        True: 0.3,
        False: 0.0,
    }


def test_an_error_within_an_evaluation_leaves_the_model_training(tmp_path):
    run = make_run(tiny_config(tmp_path / "run"))
    run.model.train()
    before = [p.detach().clone() for p in run.optimisation.parameters]
    run.optimisation.average.averages[0].add_(1)
    with pytest.raises(ZeroDivisionError), run.averaged_weights():
        assert not run.model.training
        1 / 0  # noqa: B018
    assert run.model.training
    assert all(torch.equal(p, b) for p, b in zip(run.optimisation.parameters, before, strict=True))
