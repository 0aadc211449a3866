"""What the main process computes, handed on to the others."""

import itertools
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from two_processes import run_on_two

from vtp_diffusion.runtime import processes


def hand_on(rank):
    computed = []
    value = processes.from_main(lambda: computed.append(rank) or f"of {rank}")

    def fail():
        raise ValueError(f"said by {rank}")

    with pytest.raises(ValueError, match="said by 0"):
        processes.from_main(fail)
    return value, computed


def test_the_main_process_computes_and_all_have_it_or_its_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert run_on_two(hand_on, tmp_path) == [("of 0", [0]), ("of 0", [])]
    assert processes.from_main(lambda: 5) == 5


def work_long(rank):
    processes._calls = itertools.count()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    dist.barrier()
    done = []
    for _ in range(2):
        processes.main_alone(lambda: done.append(time.sleep(1.5)))
        dist.barrier()
    return len(done)


def test_the_others_wait_for_work_that_takes_longer_than_a_collective_may(tmp_path):
    assert run_on_two(work_long, tmp_path) == [2, 0]
    done = []
    processes.main_alone(lambda: done.append(1))
    assert done == [1]


def test_every_program_waits_an_hour(monkeypatch):
    waited = []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setattr(dist, "init_process_group", lambda **settings: waited.append(settings["timeout"]))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises((RuntimeError, ValueError)):  # there is no group
        processes.join_processes()
    AcceleratorState._reset_state(True)
    assert waited == [processes.PATIENCE]


ENDED = """
import sys
from pathlib import Path
import vtp_diffusion.runtime.processes
import torch.distributed as dist

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meeting", rank=0, world_size=1)
import torch._dynamo

names = [[Path(thread, "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]]
dist.destroy_process_group()
names.append([Path(thread, "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()])
print(*("pt_gloo_runloop" in part for part in names))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are read from Linux's /proc")
def test_the_threads_of_a_process_group_end_with_it(tmp_path):
    """Else one of them may abort the process at its exit."""
    done = subprocess.run([sys.executable, "-c", ENDED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
