"""Reading here and there in files that may be larger than memory."""

import os
import threading
from pathlib import Path

import numpy as np
import psutil

OPEN_FILES_BESIDE = 512  # for everything else that a process opens
CGROUP = Path("/sys/fs/cgroup")


class RandomReads:
    """A file that threads read at any place, straight into their memory.

    The kernel is told not to read ahead, where it takes such advice: of what lies around a row, nothing is wanted.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 # for as long as this object lives
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, target: np.ndarray, offset: int) -> None:
        """Fill `target` (N,) uint8 with what lies `offset` bytes after the start of the file.

        Raises: ValueError naming the file if it ends before.
        """
        done = 0
        while done < len(target):
            count = self._read(target[done:], offset + done)
            if count == 0:
                raise ValueError(f"{self.path} ends at byte {offset + done}: it was cut while it was read")
            done += count

    def _read(self, target: np.ndarray, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [target], offset)  # other threads run meanwhile
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(target)

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()


def allow_open_files(count: int) -> None:
    """Raise what this process may open, if need be, to `count` files beside others.

    Raises: ValueError if the system's limit is lower.
    """
    try:
        import resource
    except ImportError:  # Windows, which has a limit of its own
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OPEN_FILES_BESIDE
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ValueError(
            f"{count} files are to be open at once, the system allows {hard}, {OPEN_FILES_BESIDE} of them for others: "
            "raise it (ulimit -n) or write fewer, larger files"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def available_memory() -> int:
    """Bytes that this process could still take: what the machine has free, or the limit of its container (cgroup)."""
    found, own = psutil.virtual_memory().available, Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, inside = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (CGROUP, "memory.max") if not controllers else (CGROUP / "memory", "memory.limit_in_bytes")
        for path in (root / inside.strip("/") / name, root / name):  # a container may see its own as the root
            limit = path.read_text().strip() if path.is_file() else "max"
            found = found if limit == "max" else min(found, int(limit))
    return found
