"""Reading at any place of a file, with threads, and what memory is left."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from vtp_diffusion.runtime import random_reads
from vtp_diffusion.runtime.random_reads import RandomReads, allow_open_files, available_memory, read_rows


@pytest.mark.parametrize("plain", [False, True])
def test_threads_read_what_is_there(plain, tmp_path, monkeypatch):
    if plain:  # as on macOS
        monkeypatch.delattr(os, "posix_fadvise")
    content = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
    (tmp_path / "x").write_bytes(content.tobytes())
    file, rows = RandomReads(tmp_path / "x"), np.empty((500, 20), dtype=np.uint8)
    with ThreadPoolExecutor(8) as threads:
        jobs = [range(k, k + 25) for k in range(0, 500, 25)]
        list(threads.map(lambda ks: read_rows([file] * 25, [20 * k for k in ks], rows[ks.start : ks.stop]), jobs))
    assert (rows.reshape(-1) == content).all()
    with pytest.raises(ValueError, match="x ends at byte 10000: it was truncated while it was read"):
        read_rows([file], [9_990], rows[:1])


def test_more_open_files_than_the_system_allows_are_refused():
    with pytest.raises(ValueError, match="1000000000000 files are to be open at once, the system allows"):
        allow_open_files(10**12)


def test_available_memory_is_that_of_the_container(tmp_path, monkeypatch):
    free = psutil.virtual_memory().available
    assert 0 < available_memory() < 2 * free
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory.max").write_text("12345\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("12345\n")
    monkeypatch.setattr(random_reads, "CGROUP", tmp_path)
    assert available_memory() == 12345
    for folder, used, cached in ((tmp_path, "current", ""), (tmp_path / "memory", "usage_in_bytes", "total_")):
        (folder / f"memory.{used}").write_text("12000\n")
        (folder / "memory.stat").write_text(f"anon 9000\n{cached}inactive_file 2000\n")
    assert available_memory() == 2345, "what others of the container have used, but for cached files"
