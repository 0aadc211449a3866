"""Experiments: many programs on the GPUs of a machine, until a deadline. The scripts of experiments/ use it."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from .config import Settings, config_to_dict, setting, setting_differences
from .disk import read_json, replacing, write_json
from .programs import ROOT, python_path

SAVING_SECONDS = 30.0  # from SIGTERM to SIGKILL, for a program that saves a checkpoint
ENDING_SECONDS = 3.0  # the same for a program that saves nothing
IN_TURN = "experiments/in_turn.py"
RUNNING = set[subprocess.Popen]()  # programs of this process


@dataclass(kw_only=True)
class MachineConfig(Settings):
    """How an experiment uses a machine."""

    gpus: list[int] = setting(default_factory=lambda: [0], help="indices of this machine's GPUs", at_least=0)
    together: int = setting(1, "tasks at a time on each GPU", at_least=1)
    seconds: float = setting(1e9, "time limit; training that it stops saves a checkpoint", above=0)
    least_seconds: float = setting(60.0, "start no task with less time than this left", at_least=0)
    last: bool = setting(
        False, "the disk is lost afterwards: start only tasks that can be trained and measured in the time left"
    )
    bundle: str | None = setting(None, "FILE.tar.gz of the results so far and the logs, rewritten after each task")

    def __post_init__(self):
        super().__post_init__()
        if self.seconds <= self.least_seconds + SAVING_SECONDS:
            raise ValueError(
                f"seconds is {self.seconds:g}, too short to start a task: expected more than least_seconds, "
                f"{self.least_seconds:g}, plus {SAVING_SECONDS:g} to save"
            )


def check_names(option: str, given: Sequence[str], known: Collection[str]) -> None:
    """Raises: ValueError for names that an experiment does not have."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{option} are {', '.join(unknown)}, expected some of {', '.join(known)}")


def rounded(value: Any, digits: int) -> Any:
    """Nested dictionaries and lists, with floats rounded to so many significant digits, for result files."""
    if isinstance(value, dict):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part, digits) for part in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def options(values: Mapping[str, object]) -> list[str]:
    """Settings as command-line words: --name value."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


class OutOfTimeError(Exception):
    """A program was stopped at the deadline."""


@dataclass(frozen=True)
class Task:
    """One result and the programs that make it.

    Attributes:
        result: file that exists once the task is done.
        programs: the command line of each, run one after the other; each must be safe to run again.
        needs: names of tasks that must be done before.
        copies: (source, destination) of files to copy at the end, if they exist, from run folders, which are too
            large to keep. If the task did not finish, the result is not copied.
        saves: the programs write a checkpoint on SIGTERM, and can be resumed. If not, a task that is stopped begins
            again; so it is stopped only seconds before the deadline.
        seconds: estimated time of the task and of later ones without which its work is lost. A task that saves nothing
            starts only if this much time is left. One that saves starts anyway, since a later run can resume it,
            unless `MachineConfig.last` is set.
        one_process: run all programs in one process, which starts up once (experiments/in_turn.py). Programs that have
            ended are not repeated, and a measurement after a training that saves may run up to the deadline.
    """

    name: str
    result: Path
    programs: tuple[list[str], ...]
    needs: tuple[str, ...] = ()
    copies: tuple[tuple[Path, Path], ...] = ()
    saves: bool = True
    seconds: float = 0.0
    one_process: bool = False

    @property
    def done(self) -> bool:
        return self.result.is_file()

    @property
    def reserve(self) -> float:
        """Seconds before the deadline at which its programs get SIGTERM."""
        return SAVING_SECONDS if self.saves else ENDING_SECONDS

    def fits(self, seconds: float, least_seconds: float, last: bool) -> bool:
        """Whether to start the task with so many seconds left before the deadline."""
        if last or not self.saves:  # it has to finish, and may use all the time
            return seconds > ENDING_SECONDS + max(least_seconds, self.seconds)
        return seconds > SAVING_SECONDS + least_seconds


def run_program(words: list[str], gpu: int, log: Path, stop: float, patience: float = SAVING_SECONDS) -> None:
    """Run a program of the repository on one GPU; its output is appended to `log`.

    At `stop` (of `time.monotonic`) it gets SIGTERM: training saves a checkpoint and resumes when it is started again.
    After `patience` more seconds it is killed.

    Raises: OutOfTimeError if it was stopped. RuntimeError with the end of its output if it fails.
    """
    environment = {"OMP_NUM_THREADS": "4"} | os.environ
    environment |= {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path()}
    with log.open("a") as stream:
        print(shlex.join(words), file=stream, flush=True)
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        RUNNING.add(process)
        try:
            status = process.wait(max(0.0, stop - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            process.terminate()
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise OutOfTimeError(f"{words[0]} was stopped at the deadline") from error
        finally:
            RUNNING.discard(process)
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
        raise RuntimeError(f"{words[0]} failed, {log} has all of its output:\n" + "\n".join(lines))


def run_task(task: Task, gpu: int, logs: Path, deadline: float) -> None:
    """Run a task's programs, with one log. Raises: as `run_program`; RuntimeError if they leave no result."""
    ended, programs, record = False, task.programs, logs / f"{task.name}-ended.txt"
    if task.one_process:
        programs = ([IN_TURN, str(record), *(shlex.join(words) for words in programs)],)
    try:
        for words in programs:
            # a kill comes one second before the deadline, which leaves time to bundle what was written
            run_program(words, gpu, logs / f"{task.name}.log", deadline - task.reserve, task.reserve - 1.0)
        ended = True
    except OutOfTimeError:
        if not task.done:  # otherwise it finished between SIGTERM and the kill
            raise
    finally:
        for file, place in task.copies:
            if file.is_file() and (ended or place != task.result):
                with replacing(place) as unfinished:
                    shutil.copyfile(file, unfinished)
    if not task.done:
        record.unlink(missing_ok=True)  # the result was removed: its programs have to run again
        raise RuntimeError(f"{task.name} ended without {task.result}: the same command runs its programs again")


def work_through(
    tasks: Sequence[Task],
    gpus: Sequence[int],
    deadline: float,
    least_seconds: float,
    start: Callable[[Task, int], None],
    after: Callable[[Task], None] = lambda task: None,
    last: bool = False,
) -> list[str]:
    """Run every task that is not done, in the given order, one at a time on each GPU.

    A task waits for those that it needs, and is not started if one of them fails. A task that does not fit before the
    deadline is skipped (see `Task.fits`); a later, shorter one may still run.

    Args:
        gpus: one entry per worker; a GPU that is named twice works on two tasks at once.
        start: runs a task on a GPU, as `run_task` does.
        after: called after each task that is done, never concurrently.
    Returns: an error message for each failed task.
    Raises: ValueError for a task that needs one that is not among `tasks`.
    """
    names = {task.name for task in tasks}
    for task in tasks:
        if not task.done and (missing := [name for name in task.needs if name not in names]):
            raise ValueError(
                f"{task.name} needs {', '.join(missing)}, expected tasks among {', '.join(sorted(names))}"
            )
    changed, one_after_the_other = threading.Condition(), threading.Lock()
    done = {task.name for task in tasks if task.done}
    waiting, running, faults = [task for task in tasks if not task.done], set[str](), list[str]()

    def take() -> Task | None:
        with changed:
            while fitting := [t for t in waiting if t.fits(deadline - time.monotonic(), least_seconds, last)]:
                for task in fitting:
                    if done.issuperset(task.needs):
                        waiting.remove(task)
                        running.add(task.name)
                        return task
                if not running:  # what is left needs a task that failed, or that does not fit
                    return None
                changed.wait(1.0)
            return None

    def ended(task: Task, gpu: int, began: float) -> None:
        if task.done:
            with changed:
                print(f"{task.name}: {time.monotonic() - began:.0f} s on GPU {gpu}", flush=True)
                done.add(task.name)
                changed.notify_all()
            with one_after_the_other:  # it may take a while, and may fail
                after(task)

    def work(gpu: int) -> None:
        while (task := take()) is not None:
            began, fault = time.monotonic(), None
            try:
                start(task, gpu)
                ended(task, gpu, began)
            except OutOfTimeError as stop:
                fault = f"{task.name}: {stop}"
            except Exception as error:  # else lost with the thread: returned to the caller at the end
                fault = f"{task.name}: {error}"
                faults.append(fault)
            with changed:  # alone, since lines of several threads would run into each other
                if fault is not None:
                    print(fault, flush=True)
                running.discard(task.name)
                changed.notify_all()

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for worker in workers:
        worker.start()
    before = signal.signal(signal.SIGTERM, pass_on) if threading.current_thread() is threading.main_thread() else None
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:  # running programs get it too, and save; start no others
        waiting.clear()
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return faults


def pass_on(number: int, frame: Any) -> None:
    """Handler of SIGTERM, which `kill` and containers send to the experiment alone: end as with Ctrl-C, which reaches
    its programs by itself."""
    for process in list(RUNNING):
        process.terminate()
    raise KeyboardInterrupt("what runs saves and ends; the same command goes on")


def keep_settings(config: MachineConfig, folder: Path, free: Collection[str]) -> None:
    """Write the settings that decide an experiment's results into its folder, or compare them with those there: the
    names of results do not tell the settings.

    Args: `free`: names of further settings that may change, besides those of `MachineConfig`.
    Raises: ValueError naming what differs.
    """
    may_change = {field.name for field in fields(MachineConfig)} | set(free)
    settings = {name: value for name, value in config_to_dict(config).items() if name not in may_change}
    file = folder / "settings.json"
    if file.is_file() and (lines := setting_differences(read_json(file), settings)):
        raise ValueError(f"{folder} holds results of other settings, give another output_dir:\n" + "\n".join(lines))
    write_json(file, settings)


def bundle(results: Path, logs: Path, file: Path) -> None:
    """Write all finished results and, in logs/, the programs' logs into one tar file, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished, tarfile.open(unfinished, "w:gz") as archive:
        for path in sorted(results.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                archive.add(path, path.name)
        for path in sorted(logs.glob("*.log")):
            archive.add(path, f"logs/{path.name}")


def carry_out(config: MachineConfig, tasks: Sequence[Task], results: Path, logs: Path, deadline: float) -> None:
    """Run the tasks of an experiment, bundle the results after each, and print how many are done.

    Args: `results`, `logs`: existing folders; `deadline`: of `time.monotonic`.
    Raises: SystemExit(1) if a task failed.
    """

    def after(task: Task | None) -> None:
        if config.bundle is not None:
            bundle(results, logs, Path(config.bundle))

    start = partial(run_task, logs=logs, deadline=deadline)
    gpus = config.gpus * config.together
    faults = work_through(tasks, gpus, deadline, config.least_seconds, start, after, config.last)
    after(None)  # to bundle the logs of tasks that were stopped or failed
    left = [task.name for task in tasks if not task.done]
    print(f"{len(tasks) - len(left)} of {len(tasks)} tasks are done, results in {results}", end="")
    print(f"; the same command goes on with the rest: {', '.join(left)}" if left else "")
    if faults:
        raise SystemExit(1)
