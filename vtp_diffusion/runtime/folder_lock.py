"""One job at a time in a folder: an advisory lock (filelock) on the file `.lock` in it, which ends with the process,
killed or not; the file may stay. What is written in it serves the message only.

Between machines it holds as far as the file system passes locks on: NFS does since Linux 2.6.12, Lustre if it is
mounted with `flock`.
"""

import os
import socket
import time
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = ".lock"
PATIENCE = 1.0  # seconds that `acquire` tries: somebody who only looks has the lock for a moment
_held: dict[Path, tuple[FileLock, int]] = {}  # file -> lock of this process, inode
os.register_at_fork(after_in_child=_held.clear)  # what is forked, to read data for example, holds nothing


def _is_held(path: Path) -> bool:
    """Whether this process has the lock: the file may be another by now, in a folder that was deleted."""
    lock, inode = _held.get(path, (None, None))
    if lock is None:
        return False
    if path.is_file() and path.stat().st_ino == inode:
        return True
    lock.release()
    del _held[path]
    return False


def _take(path: Path, timeout: float) -> FileLock | None:
    """The lock; None, with a warning, where the file system has none. Raises: ValueError naming who has it."""
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout as error:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        raise ValueError(
            f"{path.parent} is in use by {holder}: expected that job to have ended, or another folder. Nothing changed"
        ) from error
    except (OSError, NotImplementedError) as error:  # ENOLCK, ENOTSUP, ENOSYS
        message = f"the file system of {path.parent} has no locks ({error}): nothing keeps a second job out of it"
        warnings.warn(message, stacklevel=3)
        return None
    return lock


def check_free(folder: Path) -> None:
    """Only look, before any work is done. Raises: ValueError naming the process that works in the folder."""
    path = folder.resolve() / LOCK_NAME
    if path.is_file() and not _is_held(path) and (lock := _take(path, timeout=0)) is not None:
        lock.release()


def acquire(folder: Path) -> None:
    """Take the lock of a folder that exists, until `release` or the end of this process; again is as good as once.

    Raises: ValueError naming the process that has it.
    """
    path = folder.resolve() / LOCK_NAME
    if not _is_held(path) and (lock := _take(path, PATIENCE)) is not None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}\n", encoding="utf-8")
        _held[path] = lock, path.stat().st_ino


def release(folder: Path, remove: bool = False) -> None:
    """Give the lock back, if this process has it. Args: `remove`: its file too."""
    path = folder.resolve() / LOCK_NAME
    if _is_held(path):
        path.unlink() if remove else path.write_text("", encoding="utf-8")
        _held.pop(path)[0].release()
