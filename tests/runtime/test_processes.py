"""What the main process computes, handed on to the others."""

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
