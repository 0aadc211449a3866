"""Tasks on several GPUs until a deadline: order, needs, failures, what is skipped, what is stopped."""

import functools
import os
import signal
import tarfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from vtp_diffusion.runtime import experiments
from vtp_diffusion.runtime.experiments import (
    MachineConfig,
    OutOfTimeError,
    Task,
    bundle,
    carry_out,
    keep_settings,
    run_program,
    run_task,
    work_through,
)


@pytest.fixture
def make(tmp_path):
    return lambda name, *needs: Task(name, tmp_path / f"{name}.json", (), needs)


def finish(task, gpu):
    task.result.write_text("{}")


def soon(seconds=60.0):
    return time.monotonic() + seconds


def test_a_task_waits_for_what_it_needs_and_done_ones_are_not_repeated(make):
    tasks, started = [make("c", "b"), make("b", "a"), make("a"), make("ready")], []
    finish(tasks[3], 0)

    def start(task, gpu):
        started.append(task.name)
        finish(task, gpu)

    after = []
    assert work_through(tasks, [0, 1], soon(), 0.0, start, lambda task: after.append(task.name)) == []
    assert started == after == ["a", "b", "c"]

    def full(task):
        raise OSError("the disk is full")

    assert work_through([make("d")], [0], soon(), 0.0, start, full) == ["d: the disk is full"]
    assert len(work_through([make("e"), make("f", "e")], [0], soon(), 0.0, start, full)) == 2
    assert make("f").done, "what was made is made, whether it could be bundled or not"


def test_results_of_other_settings_are_not_taken_for_those_that_are_asked_for(tmp_path):
    @dataclass(kw_only=True)
    class Config(MachineConfig):
        steps: int = 10
        runs: list[str] = field(default_factory=list)

    keep_settings(Config(), tmp_path, ["runs"])
    keep_settings(Config(gpus=[1], runs=["other"]), tmp_path, ["runs"])
    with pytest.raises(ValueError, match=r"other settings, give another output_dir:\n  steps: 10 there, 20"):
        keep_settings(Config(steps=20), tmp_path, ["runs"])


def test_a_failure_stops_only_what_needs_it(make):
    tasks = [make("a"), make("b", "a"), make("other")]

    def start(task, gpu):
        if task.name == "a":
            raise RuntimeError("no memory")
        finish(task, gpu)

    assert work_through(tasks, [0], soon(), 0.0, start) == ["a: no memory"]
    assert [task.done for task in tasks] == [False, False, True]


def test_nothing_starts_too_late_and_what_was_stopped_is_no_failure(make):
    started = []
    seconds = experiments.SAVING_SECONDS + 50
    assert work_through([make("late")], [0], soon(seconds), 60.0, lambda task, gpu: started.append(task)) == []
    assert started == []

    def stopped(task, gpu):
        raise OutOfTimeError("train.py")

    tasks = [make("a"), make("b", "a")]
    assert work_through(tasks, [0], soon(), 0.0, stopped) == [] and not tasks[0].done


def test_what_cannot_be_measured_in_time_is_not_begun_and_a_shorter_task_is(make):
    started, left = [], experiments.SAVING_SECONDS + 100

    def start(task, gpu):
        started.append(task.name)
        finish(task, gpu)

    long, short = (replace(make(name), seconds=seconds) for name, seconds in (("long", 140), ("short", 126)))
    measured = replace(make("measured"), saves=False, seconds=126)  # the time to save in is theirs as well
    work_through([long, short, measured], [0], soon(left), 0.0, start, last=True)
    assert started == ["short", "measured"] and not long.done
    work_through([long, replace(make("other"), saves=False, seconds=200)], [0], soon(left), 0.0, start)
    assert started == ["short", "measured", "long"], "training goes on in a later run, a measurement does not"


def test_what_a_task_that_is_done_needed_may_be_missing(make):
    task = make("measured", "trained")
    finish(task, 0)
    assert work_through([task], [0], soon(), 0.0, finish) == []


def test_programs_of_one_process_are_one_program_and_may_end_after_they_were_told_to(tmp_path, monkeypatch):
    started = []

    def late(words, gpu, log, stop, patience):
        started.append(words)
        raise OutOfTimeError("stopped")

    monkeypatch.setattr(experiments, "run_program", late)
    task = Task("a", tmp_path / "a.json", (["x.py", "b c"], ["y.py"]), one_process=True)
    with pytest.raises(OutOfTimeError):
        run_task(task, 0, tmp_path, soon())
    assert started == [["experiments/in_turn.py", f"{tmp_path}/a-ended.txt", "x.py 'b c'", "y.py"]]
    finish(task, 0)  # it came to its end while it was waited for
    run_task(task, 0, tmp_path, soon())


def test_needs_have_to_be_tasks(make):
    with pytest.raises(ValueError, match="b needs a, expected tasks among b"):
        work_through([make("b", "a")], [0], soon(), 0.0, finish)


def test_a_program_is_told_to_save_before_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "SAVING_SECONDS", 5.0)
    log, saved = tmp_path / "log", tmp_path / "saved"
    code = f"import pathlib, signal, sys, time\nsaved = pathlib.Path({str(saved)!r})\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: (saved.write_text('x'), sys.exit(0)))\n"
    code += "saved.with_name('ready').touch()\ntime.sleep(60)"
    monkeypatch.setattr(experiments.subprocess.Popen, "wait", waiting_for(tmp_path / "ready"))
    program = script(tmp_path, code)
    with pytest.raises(OutOfTimeError, match="stopped at the deadline"):
        run_program([program], 0, log, soon(0.0))
    assert saved.is_file()


def test_a_program_that_does_not_end_when_it_is_told_to_is_killed(tmp_path, monkeypatch):
    code = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\ntime.sleep(60)"
    monkeypatch.setattr(experiments.subprocess.Popen, "wait", waiting_for(tmp_path / "ready"))
    began = time.monotonic()
    with pytest.raises(OutOfTimeError):
        run_program([script(tmp_path, code)], 0, tmp_path / "log", soon(0.0), patience=0.2)
    assert time.monotonic() - began < 20


def waiting_for(file):
    """Popen.wait that first lets the program come as far as to write `file`."""
    wait = experiments.subprocess.Popen.wait

    def patient(process, timeout=None):
        while not file.exists() and process.poll() is None:
            time.sleep(0.01)
        return wait(process, timeout)

    return patient


def script(folder, code):
    path = folder / f"program{len(code)}.py"
    path.write_text(code)
    return str(path)


def test_a_task_copies_its_result_and_names_what_failed(tmp_path):
    writes = script(tmp_path, "import sys; open(sys.argv[1], 'w').write('7')")
    written, result = tmp_path / "made", tmp_path / "made.json"
    run_task(Task("made", result, ([writes, str(written)],), copies=((written, result),)), 0, tmp_path, soon())
    assert result.read_text() == "7"
    with pytest.raises(RuntimeError, match="failed, .*log has all of its output:\n(.*\n)*boom"):
        run_program([script(tmp_path, "raise SystemExit('boom')")], 0, tmp_path / "log", soon())
    with pytest.raises(RuntimeError, match="empty ended without"):
        copies = ((tmp_path / "nothing", tmp_path / "empty.json"),)
        run_task(Task("empty", tmp_path / "empty.json", (), copies=copies), 0, tmp_path, soon())


def test_a_bundle_holds_the_finished_files_and_the_logs(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("a.json", "a.png", ".b.json.unfinished"):
        (folder / name).write_text(name)
    for name in ("a.log", "a.txt"):
        (tmp_path / name).write_text(name)
    bundle(folder, tmp_path, tmp_path / "out" / "results.tar.gz")
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert archive.getnames() == ["a.json", "a.png", "logs/a.log"]


def test_logs_of_a_task_that_was_stopped_are_kept_and_its_result_is_not(tmp_path, monkeypatch):
    results, file = tmp_path / "results", tmp_path / "log.jsonl"
    results.mkdir()
    file.write_text("{}")
    copies = (file, results / "a.json"), (file, results / "a.jsonl"), (tmp_path / "none", results / "b")
    task = Task("a", results / "a.json", (["train.py"],), copies=copies)

    def stopped(words, gpu, log, stop, patience):
        log.write_text("step 1")
        raise OutOfTimeError("train.py")

    monkeypatch.setattr(experiments, "run_program", stopped)
    config = MachineConfig(bundle=str(tmp_path / "results.tar.gz"))
    carry_out(config, [task], results, tmp_path, soon(1e4))
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert archive.getnames() == ["a.jsonl", "logs/a.log"]
    assert not task.done


def test_what_saves_nothing_runs_up_to_the_deadline(tmp_path, monkeypatch):
    stops, end = [], soon(100.0)
    monkeypatch.setattr(experiments, "run_program", lambda *words: stops.append((end - words[3], words[4])))
    (tmp_path / "a.json").touch()
    for saves in (True, False):
        run_task(Task("a", tmp_path / "a.json", (["x.py"],), saves=saves), 0, tmp_path, end)
    assert [stop for stop, _ in stops] == pytest.approx([experiments.SAVING_SECONDS, experiments.ENDING_SECONDS])
    assert all(patience < stop for stop, patience in stops), "killed before the deadline"


def test_too_little_time_to_start_anything_is_refused():
    with pytest.raises(ValueError, match="seconds is 80, too short .*: expected more than least_seconds, 60,"):
        MachineConfig(seconds=80)


def test_a_program_finds_the_repository_and_what_the_caller_finds(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "module_of_the_caller.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    run_program([script(tmp_path, "import module_of_the_caller, vtp_diffusion")], 0, tmp_path / "log", soon())


def test_sigterm_to_an_experiment_is_passed_on_to_its_programs(tmp_path, monkeypatch):
    """`docker stop` and a plain `kill` signal one process, not its children."""
    program = tmp_path / "saving.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(1)))\n"
        "pathlib.Path('running').touch()\ntime.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    tasks = [Task(name, tmp_path / f"{name}.json", ([str(program)],)) for name in "ab"]

    def kill():
        while not Path("running").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill).start()
    start = functools.partial(run_task, logs=tmp_path, deadline=soon())
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        work_through(tasks, [0], soon(), 0.0, start)
    for thread in threading.enumerate():  # workers wait for what saves
        if thread is not threading.current_thread():
            thread.join(20)
    assert Path("saved").exists() and not (tmp_path / "b.log").exists(), "and starts no other"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_result_that_was_removed_is_made_again(tmp_path):
    program = tmp_path / "making.py"
    program.write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).touch()\n")
    task = Task("a", tmp_path / "a.json", ([str(program), str(tmp_path / "a.json")],), one_process=True)
    run_task(task, 0, tmp_path, soon())
    task.result.unlink()
    with pytest.raises(RuntimeError, match="a ended without .*a.json: the same command runs its programs again"):
        run_task(task, 0, tmp_path, soon())
    run_task(task, 0, tmp_path, soon())
    assert task.done
