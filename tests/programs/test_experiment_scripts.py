"""The scripts of experiments/: what they would run, and their tables, without starting a program."""

import json
import signal
import sys

import pytest
import torch
from experiment_programs import ROOT, load


@pytest.fixture
def in_turn(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    handler = signal.getsignal(signal.SIGTERM)
    yield load("experiments/in_turn.py").main
    signal.signal(signal.SIGTERM, handler)


def test_programs_in_turn_have_their_own_words_and_ended_ones_are_not_repeated(in_turn, tmp_path):
    program, seen = tmp_path / "program.py", tmp_path / "seen.txt"
    program.write_text(f"""
import pathlib, sys, torch
with open({str(seen)!r}, "a") as stream:
    print(sys.argv[1:], torch.get_float32_matmul_precision(), __name__, file=stream)
torch.set_float32_matmul_precision("high")
if sys.argv[1] == "b c" and not pathlib.Path({str(tmp_path / "mended")!r}).exists():
    raise SystemExit(2)
""")
    words = [f"{tmp_path}/ended.txt", f"{program} a", f"{program} 'b c'", f"{program} d"]
    torch.set_float32_matmul_precision("highest")  # as a process begins; other tests leave what they set
    with pytest.raises(SystemExit):
        in_turn(words)
    (tmp_path / "mended").touch()
    torch.set_float32_matmul_precision("highest")  # the next process
    in_turn(words)
    expected = [f"[{word!r}] highest __main__" for word in ("a", "b c", "b c", "d")]
    assert seen.read_text().splitlines() == expected


def test_what_saves_nothing_ends_when_it_is_told_to_stop_and_nothing_comes_after(in_turn, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, pathlib, signal, sys
os.kill(os.getpid(), signal.SIGTERM)
pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch()
""")
    with pytest.raises(SystemExit, match="stopped by a signal"):
        in_turn([f"{tmp_path}/ended.txt", f"{program} first", f"{program} second"])
    assert (tmp_path / "first").is_file() and not (tmp_path / "second").exists()


def test_frontier_prepares_once_and_other_seeds_wait_for_the_first(tmp_path):
    program = load("experiments/frontier/run.py")
    config = program.Config(runs=["data"], seeds=[1, 0], results=str(tmp_path))
    tasks = program.plan(config, tmp_path / "made")
    assert [task.name for task in tasks] == ["latents", "reference", "data-0", "data-1"]
    assert tasks[3].needs == ("latents", "reference", "data-0") and tasks[3].result == tmp_path / "data-1.json"
    for name in ("data-0", "data-1"):
        (tmp_path / f"{name}.json").touch()
    assert all(task.done for task in program.plan(config, tmp_path / "made"))


def test_frontier_measures_the_kinds_of_guidance_that_it_is_asked_for(tmp_path):
    program = load("experiments/frontier/run.py")
    config = program.Config(runs=["velocity", "student"], kinds=["none", "internal"], results=str(tmp_path))
    trained, student = (program.measured_run(config, tmp_path, name, 0).programs[1] for name in config.runs)
    assert trained[trained.index("--kinds") :][:3] == ["--kinds", "none", "internal"] and "--kinds" not in student
    with pytest.raises(ValueError, match="kinds are inner, expected some of none, classifier_free"):
        program.Config(kinds=["inner"])


def test_frontier_begins_a_training_only_if_it_can_be_measured_too(tmp_path):
    program = load("experiments/frontier/run.py")
    *_, trained, measured = program.plan(
        program.Config(runs=["data", "teacher"], results=str(tmp_path)), tmp_path / "f"
    )
    assert trained.seconds == measured.seconds + 3000 * program.STEP and trained.one_process
    assert trained.saves and not measured.saves, "what saves nothing runs up to the deadline"


def test_students_stand_beside_their_teacher_which_is_measured_once(tmp_path):
    program = load("experiments/frontier/run.py")
    config = program.Config(runs=["teacher", "student_trajectories"], seeds=[0, 1], results=str(tmp_path))
    tasks = {task.name: task for task in program.plan(config, tmp_path / "made")}
    assert list(tasks) == ["latents", "reference", "teacher-0", "student_trajectories-0", "student_trajectories-1"]
    distill, measure = tasks["student_trajectories-1"].programs
    given = load(distill[0]).parse_config(load(distill[0]).Config, distill[1:])
    assert given.trajectory_steps == given.max_train_steps == 4000 and given.seed == 1
    measured = load(measure[0])
    for words in (measure, *tasks["teacher-0"].programs):
        pipeline = measured.parse_config(measured.Config, words[1:]).pipeline
        assert (ROOT / pipeline).is_dir() == (words is not measure) == (pipeline == given.teacher.pipeline)
    with pytest.raises(ValueError, match="runs are none, expected some of velocity, .*, teacher"):
        program.Config(runs=["none"])


def test_the_programs_take_the_words_of_every_run(tmp_path):
    program = load("experiments/frontier/run.py")
    config = program.Config(runs=program.KNOWN, seeds=[0, 1], results=str(tmp_path))
    programs = {file: load(file) for file in ("train_dit/train.py", "train_dit/distill.py", program.MEASURE)}
    taken = [
        programs[file].parse_config(programs[file].Config, words)
        for task in program.plan(config, tmp_path)
        for file, *words in task.programs
        if file in programs
    ]
    assert len(taken) == 1 + 2 * 2 * (len(program.RUNS) + len(program.STUDENTS)) + 1, "reference, runs, teacher"


def test_the_programs_take_the_words_of_every_run_on_fashion_mnist(tmp_path):
    program, train = load("experiments/frontier/fashion.py"), load("train_dit/train.py")
    with pytest.raises(ValueError, match="has no latents-reconstruction_long: first run that experiment"):
        program.Config(runs=["muon_1e-3"], tokenizers=str(tmp_path))
    for name in ("all", "reconstruction_long"):
        (tmp_path / f"latents-{name}").mkdir()
        (tmp_path / f"latents-{name}" / "latents.json").touch()
    config = program.Config(runs=list(program.RUNS), tokenizers=str(tmp_path), output_dir=str(tmp_path))
    for name in config.runs:
        words = program.measured_run(config, name, 0).programs[0]
        given = train.parse_config(train.Config, words[1:])
        kind, rate = name.rsplit("_", 1)
        assert given.learning_rate == float(rate) and (given.optimizer == "muon") == (kind == "muon")
        assert (given.model.prediction == "data") == kind.endswith("data") and given.seed == 0


def test_the_table_of_fashion_mnist_has_means_over_seeds(tmp_path):
    program, table = load("experiments/frontier/fashion.py"), load("experiments/frontier/table.py")
    for seed, value in ((0, 90.0), (1, 94.0)):
        row = {"distance": "FD-EffLite0", "value": 1.0, "floor": {"generated": value, "real": 17.6}}
        scores = [{"score": f"{kind} (EffLite0)", "value": 0.5} for kind in ("precision", "recall")]
        scores += [{"score": "recall (VTP-192)", "value": 0.9}]  # of another network
        file = tmp_path / f"muon_4e-3-{seed}-1500.json"
        file.write_text(json.dumps({"distances": [row], "distances_to_reconstructions": [row], "scores": scores}))
    known = {"muon_4e-3": {"0": {}}, "adamw_4e-3": {"2": row["floor"]}}  # measured again, and elsewhere
    found = program.tabulated(tmp_path, known)
    assert found["muon_4e-3"]["1"]["FD-EffLite0 to reconstructions"] == 94.0
    assert found.pop("adamw_4e-3") == {"2": row["floor"]}
    printed = table.fashion_table(found)
    assert "| muon_4e-3 | 2 | 92.0 ± 2.8 | 0.500 ± 0.000 | 0.500 ± 0.000 |" in printed and "17.6" in printed
