"""Batches: collated, read ahead by threads, and by processes that outlive a stopping signal."""

import os
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data import _utils as loader_settings

from vtp_diffusion.data.batches import (
    ReusedMemory,
    all_columns,
    collate_images,
    read_ahead,
    read_batches,
    spread_evenly,
    training_loader,
)

CPU = torch.device("cpu")


class Processes(Dataset):
    """The id of the process that reads; item `stuck` never comes."""

    def __init__(self, stuck=None):
        self.stuck = stuck

    def __getitem__(self, index):
        if index == self.stuck:
            time.sleep(1000)
        return os.getpid()


def identity(items):
    return {"process": torch.tensor(items)}


def test_all_columns_come_from_the_items():
    """With `skip_unreadable` an unreadable image's item is another image, with that one's label and caption."""

    class Replacing(Dataset):
        labels, captions = [0, 1, 2], ["a", "b", "c"]

        def __len__(self):
            return 3

        def __getitems__(self, indices):
            found = [max(1, index) for index in indices]  # the first cannot be read
            return [{"image": torch.full((3, 1, 1), k), "label": k, "caption": "abc"[k]} for k in found]

    def collate(items):
        columns = collate_images(items, ("image", "label", "caption"))
        return columns | {"caption": torch.tensor([ord(caption) for caption in columns["caption"]])}

    columns = all_columns(Replacing(), collate)
    assert columns["image"][:, 0, 0, 0].tolist() == columns["label"].tolist() == [1, 1, 2]
    assert [chr(code) for code in columns["caption"].tolist()] == ["b", "b", "c"]


def test_collating_stacks_images_and_keeps_texts():
    items = [{"image": torch.full((3, 2, 2), k, dtype=torch.uint8), "label": k, "key": f"{k}.png"} for k in range(3)]
    assert collate_images(items).keys() == {"image"} and collate_images(items)["image"].shape == (3, 3, 2, 2)
    columns = collate_images(items, ("image", "label", "key"))
    assert columns["label"].tolist() == [0, 1, 2] and columns["key"] == ["0.png", "1.png", "2.png"]


def test_a_signal_to_all_processes_ends_no_reading():
    """As torchrun, a scheduler (SIGTERM) or a terminal (SIGINT) sends them when training is to stop."""
    before = torch.get_rng_state()
    batches = read_batches(Processes(), [[k] for k in range(20)], identity, CPU, num_workers=1)
    reader = next(batches)["process"].item()
    assert reader != os.getpid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(reader, number)
    assert [batch["process"].item() for batch in batches] == [reader] * 19
    assert torch.equal(torch.get_rng_state(), before)


def test_a_process_that_hangs_ends_with_its_loader(monkeypatch):
    monkeypatch.setattr(loader_settings, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds the loader waits for it
    loader = training_loader(Processes(stuck=1), 1, CPU, batch_sampler=[[0], [1]], collate_fn=identity)
    batches = iter(loader)
    reader = next(batches)["process"].item()
    os.kill(reader, 0)  # it is there
    del batches
    with pytest.raises(ProcessLookupError):
        os.kill(reader, 0)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_reading_ahead_keeps_the_order_and_tells_errors(threads):
    seen = set()

    def read(job):
        seen.add(threading.get_ident())
        return 10 // (job - 50)

    jobs = list(range(40))
    assert list(read_ahead(read, jobs, threads)) == [10 // (job - 50) for job in jobs]
    assert (threading.get_ident() in seen) == (threads == 0)
    results = read_ahead(read, range(49, 60), threads)
    assert next(results) == -10
    with pytest.raises(ZeroDivisionError):
        next(results)
    unfinished = read_ahead(read, iter(range(40)), threads)
    next(unfinished)
    unfinished.close()  # what was submitted is dropped, not waited for


def test_memory_is_used_again_once_no_tensor_nor_view_is_left():
    memory = ReusedMemory()
    first, second = (memory.take((2, 3), torch.float32).fill_(k) for k in (1, 2))
    place, row = first.data_ptr(), first.numpy()[1]
    assert first.shape == (2, 3) and second.data_ptr() != place
    del first
    assert memory.take((2, 3), torch.float32).data_ptr() not in (place, second.data_ptr()) and row.tolist() == [1] * 3
    del row
    again = [memory.take((6,), torch.float32) for _ in range(2)]
    assert place in [tensor.data_ptr() for tensor in again] and second.eq(2).all()


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(10, 3, [0, 3, 6]), (7, 4, [0, 1, 3, 5]), (3, 3, [0, 1, 2]), (3, 5, [0, 1, 2]), (3, None, [0, 1, 2]), (0, 2, [])],
)
def test_a_limit_is_spread_evenly(count, limit, expected):
    assert spread_evenly(range(count), limit) == expected
