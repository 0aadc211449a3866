"""One job at a time in a folder: an advisory lock (filelock) on the file `.lock` in it.

The lock ends with the process, even if that is killed; the file may stay. Its text only serves the error message.
Between machines the lock works if the file system supports it: NFS does since Linux 2.6.12, Lustre if it is mounted
with `flock`.
"""

import os
import socket
import time
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = ".lock"
PATIENCE = 1.0  # seconds that `acquire` keeps trying: `check_free` in another process holds the lock for a moment
_held: dict[Path, tuple[FileLock, int]] = {}  # file -> lock of this process, inode
os.register_at_fork(after_in_child=_held.clear)  # forked processes, such as a loader's workers, hold none


def _is_held(path: Path) -> bool:
    """Whether this process holds the lock. The inode is compared: the folder may have been deleted and made again."""
    lock, inode = _held.get(path, (None, None))
    if lock is None:
        return False
    if path.is_file() and path.stat().st_ino == inode:
        return True
    lock.release()
    del _held[path]
    return False


def _take(path: Path, timeout: float) -> FileLock | None:
    """The lock; None, with a warning, if the file system has no locks. Raises: ValueError naming who holds it."""
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout as error:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        raise ValueError(
            f"{path.parent} is in use by {holder}: wait for its end, or give another folder. Nothing was changed"
        ) from error
    except (OSError, NotImplementedError) as error:  # ENOLCK, ENOTSUP, ENOSYS
        message = f"the file system of {path.parent} has no locks ({error}): nothing prevents a second job in it"
        warnings.warn(message, stacklevel=3)
        return None
    return lock


def check_free(folder: Path) -> None:
    """Check, before any work, that nobody holds the lock. Raises: ValueError naming the process that does."""
    path = folder.resolve() / LOCK_NAME
    if path.is_file() and not _is_held(path) and (lock := _take(path, timeout=0)) is not None:
        lock.release()


def acquire(folder: Path) -> None:
    """Take the lock of an existing folder, until `release` or the end of this process. A second call does nothing.

    Raises: ValueError naming the process that holds it.
    """
    path = folder.resolve() / LOCK_NAME
    if not _is_held(path) and (lock := _take(path, PATIENCE)) is not None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}\n", encoding="utf-8")
        _held[path] = lock, path.stat().st_ino


def release(folder: Path, remove: bool = False) -> None:
    """Release the lock if this process holds it. Args: `remove`: delete its file too."""
    path = folder.resolve() / LOCK_NAME
    if _is_held(path):
        path.unlink() if remove else path.write_text("", encoding="utf-8")
        _held.pop(path)[0].release()
