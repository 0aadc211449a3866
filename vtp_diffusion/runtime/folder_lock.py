"""One job at a time in a folder: a lock that ends with the process, however that ends.

It is an advisory lock (flock) on the file `.lock` in the folder, which the kernel takes back when its holder is gone,
killed or not; the file itself may stay. What is written in it serves the message only. Between machines it holds as
far as the file system passes locks on: NFS does since Linux 2.6.12, Lustre if it is mounted with `flock`.
"""

import fcntl
import os
import socket
import time
import warnings
from pathlib import Path

LOCK_NAME = ".lock"
PATIENCE = 1.0  # seconds that `acquire` tries: somebody who only looks has the lock for a moment
_held: dict[Path, int] = {}  # file -> descriptor, of this process


def _leave_to_parent() -> None:
    """What is forked, to read data for example, has the descriptors too: with them it would hold the lock on after
    its parent is gone."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is of the file that is there now."""
    return path.is_file() and os.path.samestat(os.fstat(descriptor), path.stat())


def _is_held(path: Path) -> bool:
    """Whether this process has the lock: the file may be another by now, in a folder that was deleted."""
    descriptor = _held.get(path)
    if descriptor is None:
        return False
    if _is_file(descriptor, path):
        return True
    os.close(_held.pop(path))
    return False


def _try_lock(descriptor: int, path: Path) -> bool:
    """Whether the lock was free and is taken; where the file system has no locks, a warning and yes."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # ENOLCK, ENOTSUP, ENOSYS: what a file system without locks says
        warnings.warn(
            f"the file system of {path.parent} has no locks ({error}): nothing keeps a second job out of it",
            stacklevel=4,
        )
    return True


def _refusal(path: Path) -> ValueError:
    holder = path.read_text(encoding="utf-8").strip() or "another process"
    return ValueError(
        f"{path.parent} is in use by {holder}: expected that job to have ended, or another folder. Nothing was changed"
    )


def check_free(folder: Path) -> None:
    """Only look, before any work is done. Raises: ValueError naming the process that works in the folder."""
    path = folder.resolve() / LOCK_NAME
    if _is_held(path) or not path.is_file():
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        if not _try_lock(descriptor, path):
            raise _refusal(path)
    finally:
        os.close(descriptor)


def acquire(folder: Path) -> None:
    """Take the lock of a folder that exists, until `release` or the end of this process; again is as good as once.

    Raises: ValueError naming the process that has it.
    """
    path = folder.resolve() / LOCK_NAME
    if _is_held(path):
        return
    descriptor, last = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), time.monotonic() + PATIENCE
    while True:
        if not _try_lock(descriptor, path):
            if time.monotonic() > last:
                os.close(descriptor)
                raise _refusal(path)
            time.sleep(0.05)
        elif _is_file(descriptor, path):
            break
        else:  # removed by its holder meanwhile
            os.close(descriptor)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)
    _held[path] = descriptor


def release(folder: Path, remove: bool = False) -> None:
    """Give the lock back, if this process has it. Args: `remove`: its file too."""
    path = folder.resolve() / LOCK_NAME
    if _is_held(path):
        os.ftruncate(_held[path], 0)
        if remove:
            path.unlink()
        os.close(_held.pop(path))
