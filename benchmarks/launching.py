"""Programs that benchmarks start as a user starts them, and end with all that they have started."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import torch

from vtp_diffusion.runtime.programs import python_path

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.2
LOOK_SECONDS = 0.02  # where what is seen gives a rate
COMPILERS = ("TORCHINDUCTOR", "TRITON")
END_SECONDS = 60  # a killed process that holds much takes a while to be gone


def torchrun(processes: int, program: Path, *words: object) -> list[str]:
    """The command that starts a program on so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(program), *map(str, words)]


def program_environment(gpus: list[int] | None = None) -> dict[str, str]:
    """The environment of a program: this package first, and where there is no GPU, accelerate told so.

    Args: `gpus`: those that the program sees, of the ones that this one sees; None: all.
    """
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": python_path()}
    if gpus is not None:
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names.split(",")[k] if names else str(k) for k in gpus)
    return environment | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})


def environment_alone(caches: Path) -> dict[str, str]:
    """The environment of a single process that no launcher starts: all cores, and what Triton and torch.compile keep
    goes into a folder."""
    environment = program_environment() | {f"{name}_CACHE_DIR": str(caches / name) for name in COMPILERS}
    if "OMP_NUM_THREADS" not in os.environ:
        del environment["OMP_NUM_THREADS"]
    return environment


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def read_log(run: Path) -> list[dict]:
    """The complete lines of a run's log.jsonl so far, none before it is there."""
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_logged(run: Path) -> int:
    return max((line["step"] for line in read_log(run)), default=0)


def run_to_its_end(command: list, environment: dict[str, str]) -> None:
    """Run a launcher. Raises: RuntimeError with what it wrote if it fails."""
    with running(command, environment) as (process, errors):
        if process.wait() != 0:
            raise failure(command, errors)


def run_and_look(look: Callable[[IO[bytes]], None], command: list, environment: dict[str, str]) -> None:
    """Run a program to its end, looking meanwhile, and once more after the end.

    Args: `look`: called with the file of its error output, for `written`.
    Raises: RuntimeError with what it wrote if it fails.
    """
    with running(command, environment) as (process, errors):
        over = False
        while not over:
            over = process.poll() is not None
            look(errors)
            time.sleep(LOOK_SECONDS)
        if process.returncode != 0:
            raise failure(command, errors)


def run_until(reached: Callable[[], bool], command: list, environment: dict[str, str]) -> None:
    """Run a launcher until something is reached, and end it then.

    Raises: RuntimeError with what it wrote, as soon as it or one of its workers has ended before. torchrun itself
        waits half a minute for the other workers, which may wait for the one that ended.
    """
    with running(command, environment) as (process, errors):
        workers: list[psutil.Process] = []
        while not reached():
            over = process.poll() is not None or lost_a_worker(process.pid, workers)
            if over and not reached():
                raise failure(command, errors)
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def running(command: list, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen, IO[bytes]]]:
    """A launcher, and the file that its error output goes to. When the context is left, also by an exception, it ends
    and so does all that it started, which is found by parentage: torchrun puts every process into a session of its
    own."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            yield process, errors
        finally:
            if process.poll() is None:
                doomed = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for child in doomed:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.wait()
                deadline = time.monotonic() + END_SECONDS
                while not all(map(gone, doomed)) and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)  # they still hold memory that the next run needs


def lost_a_worker(launcher: int, workers: list[psutil.Process]) -> bool:
    """Whether a worker is gone. Those that are new are added to the list: children of the launcher with a rank."""
    try:
        children = psutil.Process(launcher).children()
        workers += [child for child in children if child not in workers and "LOCAL_RANK" in child.environ()]
    except psutil.NoSuchProcess:  # since it was listed: it shows in how the launcher ends
        pass
    return any(map(gone, workers))


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, its parent knowing or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def written(errors: IO[bytes]) -> str:
    """The error output so far."""
    # without moving the place in the file, where what still runs writes on
    return os.pread(errors.fileno(), os.fstat(errors.fileno()).st_size, 0).decode(errors="replace")


def failure(command: list, errors: IO[bytes]) -> RuntimeError:
    """What a program wrote before it ended, without its progress bars and Python's times of importing."""
    words, text = " ".join(map(str, command)), re.sub(r"[^\n]*\r", "", written(errors))
    text = re.sub(r"import time:[^\n]*\n?", "", text)
    return RuntimeError(f"{words} failed:\n{text}")


def end_by_exception(number: int, frame) -> None:
    """A signal handler: what `running` started ends with this program."""
    raise SystemExit(128 + number)
