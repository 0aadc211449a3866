"""Random access to files that may be larger than memory."""

import functools
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

OPEN_FILES_BESIDE = 512  # for everything else that a process opens
CGROUP = Path("/sys/fs/cgroup")
# files of a limit and of what is used, and the line of memory.stat with cached files, by the version of cgroups
MEMORY_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
MEMORY_2 = ("memory.max", "memory.current", "inactive_file")


class RandomReads:
    """A file that several threads read at any offset, straight into their buffers.

    Read-ahead is switched off where the system allows it (posix_fadvise): the bytes around a row are not needed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 # open as long as this object lives
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self.read = functools.partial(os.preadv, self._file.fileno())  # (buffers, offset) -> bytes read

    def read_rest(self, row: np.ndarray, offset: int, done: int) -> None:
        """The bytes of a row after the first `done`."""
        while done < len(row):
            if (count := self.read((row[done:],), offset + done)) == 0:
                raise ValueError(f"{self.path} ends at byte {offset + done}: it was truncated while it was read")
            done += count

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()


def read_rows(files: Sequence[RandomReads], offsets: Sequence[int], rows: np.ndarray) -> None:
    """Fill each of `rows` (B, bytes of a row) uint8 from its file at its offset. Other threads run meanwhile.
    Raises: ValueError naming a file that ends too early."""
    size = rows.shape[1]
    for file, offset, row in zip(files, offsets, rows, strict=True):  # runs 100,000 times a second: keep it short
        if (done := file.read((row,), offset)) != size:
            file.read_rest(row, offset, done)


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, if needed, so that `count` files fit beside others.

    Raises: ValueError if the system's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OPEN_FILES_BESIDE
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ValueError(
            f"{count} files are to be open at once, the system allows {hard}, of which {OPEN_FILES_BESIDE} are kept "
            "for others: raise the limit (ulimit -n) or write fewer, larger files"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def available_memory() -> int:
    """Bytes that this process may still allocate: the machine's free memory, or what is left of its container's
    (cgroup) limit. Cached files count as free, as the kernel gives them up."""
    found, own = psutil.virtual_memory().available, Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, inside = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, names = (CGROUP / "memory", MEMORY_1) if controllers else (CGROUP, MEMORY_2)
        for folder in (root / inside.strip("/"), root):  # a container's own cgroup may be its root
            limit, used = (_content(folder / name) for name in names[:2])
            if limit.isdigit():
                cached = dict(line.split() for line in _content(folder / "memory.stat").splitlines()).get(names[2], 0)
                found = min(found, int(limit) - max(0, int(used or 0) - int(cached)))
    return max(0, found)


def _content(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""
