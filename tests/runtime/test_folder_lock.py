"""One job at a time in a run folder, whatever becomes of the one that holds it."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket

import pytest
from tiny_training import tiny_config

from vtp_diffusion.runtime import folder_lock
from vtp_diffusion.training.run_folder import RunFolder


@contextlib.contextmanager
def another_process(action):
    """A fork of this process that has done `action` and waits; pid, and what its own fork, a reader of data, is."""
    receiver, sender = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            action()
            reader = os.fork()
            if reader:
                os.write(sender, str(reader).encode())
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(sender)
    reader = int(os.read(receiver, 32) or 0)
    os.close(receiver)
    assert reader, "the other process failed"
    try:
        yield holder
    finally:
        for pid in (holder, reader):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(holder, 0)


def content(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_second_start_is_refused_by_name_and_changes_nothing(tmp_path):
    config = tiny_config(tmp_path / "run")
    early = RunFolder(config.output_dir, config)  # both look before one of them begins
    with another_process(lambda: RunFolder(config.output_dir, config).claim()) as pid:
        before = content(tmp_path / "run")
        message = f"run is in use by process {pid} on {socket.gethostname()} since 20"
        for start in (lambda: RunFolder(config.output_dir, config), early.claim):
            with pytest.raises(ValueError, match=message):
                start()
        assert content(tmp_path / "run") == before
        os.kill(pid, signal.SIGKILL)  # what it forked lives on
        os.waitpid(pid, 0)
        RunFolder(config.output_dir, config).claim()


def test_processes_of_one_run_do_not_shut_each_other_out(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    with another_process(lambda: RunFolder(tmp_path, config).claim()):
        monkeypatch.setenv("RANK", "1")
        RunFolder(tmp_path, config)


def test_the_lock_is_that_of_the_process_until_it_is_released(tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):  # the second time in a new folder of the same name
        folder.mkdir()
        for _ in range(2):
            folder_lock.acquire(folder)
        with another_process(lambda: pytest.raises(ValueError, folder_lock.acquire, folder)):
            pass
        shutil.rmtree(folder)
    folder.mkdir()
    folder_lock.acquire(folder)
    folder_lock.release(folder)
    with (
        another_process(lambda: folder_lock.acquire(folder)),
        pytest.raises(ValueError, match="in use by process"),
    ):
        folder_lock.check_free(folder)


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks .*nothing prevents a second job"):
        RunFolder(tmp_path, tiny_config(tmp_path)).claim()
    assert (tmp_path / "config.yaml").is_file()


def test_a_lock_whose_file_is_removed_is_taken_anew(tmp_path):
    """Who has opened the file before it went does not hold what nobody else sees."""
    folder_lock.acquire(tmp_path)
    waiting = os.open(tmp_path / folder_lock.LOCK_NAME, os.O_RDWR)
    folder_lock.release(tmp_path, remove=True)
    assert list(tmp_path.iterdir()) == []
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the file that is gone
    folder_lock.acquire(tmp_path)
    with another_process(lambda: pytest.raises(ValueError, folder_lock.check_free, tmp_path)):
        pass
    folder_lock.release(tmp_path)
    os.close(waiting)
