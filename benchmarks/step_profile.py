"""train_dit/train.py with a profile of its steps after FIRST: how long NCCL runs, computation beside it, and neither.

    torchrun --nproc_per_node 4 benchmarks/step_profile.py FILE.json FIRST [options of train_dit/train.py]

`dit_training.py --profile` starts it. FILE.json has milliseconds of a step for every process: of its GPU's time from
the first kernel of the profiled steps to the last. `nccl_ms` is when a kernel of NCCL ran, also one that waited for
another process; `hidden_ms` is the part of it during which other kernels ran; `waiting_ms` the rest of it together
with `idle_ms`, when nothing ran. Then the bandwidth of an all-reduce alone, as nccl-tests define bus bandwidth:
2 (n - 1) / n of the tensor's bytes in the median time.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.disk import write_json
from vtp_diffusion.runtime.processes import gather_objects, this_process
from vtp_diffusion.training.loop import TrainingRun

STEPS = 4
WARM_UP = 2  # steps that the profiler itself slows down
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
SIZES = (25 * 2**20, 2**30) if torch.cuda.is_available() else (2**20,)  # a bucket of DDP, and a large tensor
REPEATS = 10

Interval = tuple[float, float]


def union(intervals: list[Interval]) -> float:
    """Length of what at least one of the intervals covers."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def shares(events: list[dict], steps: int) -> dict[str, float]:
    """Milliseconds of a step, from the events of a trace, whose times are microseconds."""
    on_gpu = [event for event in events if event.get("cat") in ON_GPU]
    if not on_gpu:
        return {"kernels": 0}
    spans = [("nccl" in event["name"].lower(), event["ts"], event["ts"] + event["dur"]) for event in on_gpu]
    nccl = [(start, end) for is_nccl, start, end in spans if is_nccl]
    other = [(start, end) for is_nccl, start, end in spans if not is_nccl]
    whole = max(end for _, _, end in spans) - min(start for _, start, _ in spans)
    busy = union(nccl + other)
    hidden = union(nccl) + union(other) - busy
    parts = {"step": whole, "nccl": union(nccl), "computing": union(other), "hidden": hidden, "idle": whole - busy}
    parts["waiting"] = whole - parts["computing"]
    return {"kernels": len(on_gpu) / steps} | {f"{name}_ms": value / 1000 / steps for name, value in parts.items()}


def trace(profiler: profile) -> list[dict]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]


def bandwidths(device: torch.device) -> list[dict]:
    """Bus bandwidth of an all-reduce, in GB/s, for every one of `SIZES`."""
    count, rows = dist.get_world_size(), []
    for size in SIZES:
        tensor, seconds = torch.zeros(size // 4, device=device), []
        for _ in range(REPEATS + 2):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[2:])
        bus = 2 * (count - 1) / count * size / median / 1e9
        rows.append({"bytes": size, "milliseconds": 1000 * median, "bus_gb_per_second": bus})
    return rows


class Profile:
    """Replaces `TrainingRun.optimise` and profiles some of its calls."""

    def __init__(self, path: Path, first: int):
        self.path, self.first, self.optimise = path, first, TrainingRun.optimise
        kind = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        plan = schedule(wait=0, warmup=WARM_UP, active=STEPS, repeat=1)
        self.profiler = profile(activities=[kind], schedule=plan)

    def __call__(self, training: TrainingRun, step: int, micro_batches) -> torch.Tensor:
        if step == self.first:
            self.profiler.start()
        finite = self.optimise(training, step, micro_batches)
        if self.first <= step < self.first + WARM_UP + STEPS:
            if training.device.type == "cuda" and step in (self.first + WARM_UP - 1, self.first + WARM_UP + STEPS - 1):
                torch.cuda.synchronize()  # else kernels of the step before would be in the profile
            self.profiler.step()
        if step == self.first + WARM_UP + STEPS - 1:
            self.profiler.stop()
            found = gather_objects(shares(trace(self.profiler), STEPS))
            result = {"steps": STEPS, "processes": found, "all_reduce": bandwidths(training.device)}
            if this_process()[0] == 0:
                write_json(self.path, result)
        return finite


def main() -> None:
    path, first, *words = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[1] / "train_dit"))
    from train import main as train

    profiled = Profile(Path(path), int(first))
    TrainingRun.optimise = lambda training, step, micro_batches: profiled(training, step, micro_batches)
    train(words)


if __name__ == "__main__":
    run(main)
