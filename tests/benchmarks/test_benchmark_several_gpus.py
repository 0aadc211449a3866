"""benchmarks/several_gpus.py and step_profile.py: what runs where, and the arithmetic of their rows."""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # fewer GPUs than wanted are refused
    return importlib.import_module


def test_lanes_side_by_side_share_no_gpu_and_every_part_is_measured(load):
    benchmark = load("several_gpus")
    first, beside, last = benchmark.plan([1, 2, 4], benchmark.PARTS)
    assert first == [([0, 1, 2, 3], ["resume"])] and last[0][0] == [0, 1, 2, 3]
    used = [gpu for gpus, _ in beside for gpu in gpus]
    assert sorted(used) == [0, 1, 2, 3]
    parts = {count: {part for gpus, wanted in beside if len(gpus) == count for part in wanted} for count in (1, 2)}
    assert parts[1] == {"dit", "images", "vtp", "latents", "resume"}
    assert parts[2] == {"dit", "images", "latents", "resume"}
    assert set(last[0][1]) == {"dit", "vtp", "latents", "images", "sharded"}
    assert benchmark.plan([1, 2], ["dit"]) == [[([0, 1], [])], [([0], ["dit"]), ([1], [])], [([0, 1], ["dit"])]]


def test_rows_are_compared_with_one_process(load):
    rows = [
        {"part": "dit", "processes": 2, "images_per_second": 15.0},
        {"part": "dit", "processes": 1, "images_per_second": 10.0},
        {"part": "sharded", "processes": 4, "images_per_second": 36.0},
        {"part": "latents", "processes": 1, "images_per_second": 1.0, "sha256": "a"},
        {"part": "latents", "processes": 2, "images_per_second": 1.0, "sha256": "b"},
        {"part": "images", "processes": 1, "error": "no"},
        {"part": "images", "processes": 2, "images_per_second": 1.0, "sha256": "a"},
    ]
    load("several_gpus").compare(rows)
    assert [row.get("scaling") for row in rows] == [0.75, 1.0, 0.9, 1.0, 0.5, None, None]
    assert [row.get("same_bytes_as_one") for row in rows] == [None, None, None, True, False, None, None]


def test_a_part_that_fails_is_a_row_and_the_next_one_is_measured(tmp_path, load, monkeypatch):
    benchmark = load("several_gpus")

    def measure(config, folder, part, gpus, options):
        if part == "dit":
            raise RuntimeError("no such thing")
        yield {"images_per_second": 2.0}

    monkeypatch.setattr(benchmark, "measure", measure)
    config = benchmark.BenchmarkConfig(output=str(tmp_path / "x.json"), processes=[1, 2])
    job = benchmark.Job(config, [])
    assert job.run_phase(tmp_path, [([0], ["dit", "images"])])
    assert [row.get("error") for row in job.rows] == ["RuntimeError: no such thing", None]
    config.keep_rows = True
    again = benchmark.Job(config, [])
    assert [row["part"] for row in again.rows] == ["images"]
    again.keep({"part": "images", "processes": 1, "images_per_second": 3.0})
    assert [row["images_per_second"] for row in again.rows] == [3.0]
    assert again.known("images", [3]) and not again.known("images", [0, 1]) and not again.known("dit", [0])


def test_a_phase_ends_when_the_time_is_over_and_what_it_started_too(tmp_path, load, monkeypatch):
    benchmark = load("several_gpus")
    command = [sys.executable, "-c", "import time; time.sleep(60)"]

    def measure(*_):
        benchmark.dit_training.run_to_its_end(command, dict(os.environ))
        yield {}

    monkeypatch.setattr(benchmark, "measure", measure)
    job = benchmark.Job(benchmark.BenchmarkConfig(output=str(tmp_path / "x.json"), seconds=0.3), [])
    start, before = time.perf_counter(), threading.active_count()
    assert not job.run_phase(tmp_path, [([0], ["dit"])])
    job.end()
    while threading.active_count() > before and time.perf_counter() - start < 20:
        time.sleep(0.02)
    assert time.perf_counter() - start < 20 and threading.active_count() == before
    assert job.rows == [] and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "2", "4"], r"processes is \[2, 4\], expected rising numbers from 1 on"),
        (["--processes", "1", "2", "3", "4"], "don't fit side by side into the last"),
        (["--parts", "dit", "fid"], "parts are fid, expected some of resume, dit"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, load, words, message):
    with pytest.raises(ValueError, match=message):
        load("several_gpus").main([f"--output={tmp_path / 'x.json'}", *words])


@pytest.mark.parametrize(("gpus", "visible"), [(None, "5,6,7"), ([1, 2], "6,7")])
def test_a_program_sees_the_gpus_it_is_given(load, monkeypatch, gpus, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    assert load("launching").program_environment(gpus)["CUDA_VISIBLE_DEVICES"] == visible
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert load("launching").program_environment([1, 2])["CUDA_VISIBLE_DEVICES"] == "1,2"


def kernel(name, start, end):
    return {"cat": "kernel", "name": name, "ts": start, "dur": end - start}


def test_a_profile_tells_hidden_communication_from_waiting(load):
    """Two steps of 10 ms: 8 ms of products, NCCL from 7 to 9.5 ms, nothing in the last half millisecond."""
    events = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 10**6}]
    for begin in (0, 10_000):
        events += [kernel("gemm", begin, begin + 5000), kernel("gemm", begin + 4000, begin + 8000)]
        events += [kernel("ncclDevKernel_AllReduce", begin + 7000, begin + 9500)]
    events += [kernel("copy", 20_000, 20_000)]
    found = load("step_profile").shares(events, 2)
    assert found.pop("kernels") == 3.5
    assert found == pytest.approx(
        {"step_ms": 10, "nccl_ms": 2.5, "computing_ms": 8, "hidden_ms": 1, "idle_ms": 0.5, "waiting_ms": 2}
    )
    assert load("step_profile").shares([], 2) == {"kernels": 0}


def test_a_trace_has_what_ran_in_the_steps_that_count(load):
    program = load("step_profile")
    plan = program.schedule(wait=0, warmup=1, active=2, repeat=1)
    profiler = program.profile(activities=[program.ProfilerActivity.CPU], schedule=plan)
    profiler.start()
    for _ in range(3):
        torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.step()
    profiler.stop()
    assert sum(event.get("name") == "aten::mm" for event in program.trace(profiler)) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_steps_after_the_first_ones_are_profiled_and_the_file_written_once(tmp_path, load, monkeypatch):
    program, path, made = load("step_profile"), tmp_path / "x.json", []
    monkeypatch.setattr(program.TrainingRun, "optimise", lambda training, step, inputs: made.append(step) or inputs)
    profiled, training = program.Profile(path, first=3), SimpleNamespace(device=torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for step in range(3 + program.WARM_UP + program.STEPS):
            assert not path.exists() and profiled(training, step, "inputs") == "inputs"
    finally:
        dist.destroy_process_group()
    (row,) = (result := json.loads(path.read_text()))["all_reduce"]
    assert result["processes"] == [{"kernels": 0}] and made == list(range(9))
    assert row["bytes"] == 2**20 and row["milliseconds"] > 0 and row["bus_gb_per_second"] == 0  # nothing to pass on


def test_latents_and_images_have_a_rate_after_the_first_piece_of_every_process(tmp_path, load, monkeypatch):
    """Four files of 8 images: two processes, whose second ones come half a second after the first ones."""
    benchmark = load("several_gpus")
    body = f"""
import os, pathlib, time
for k, age in enumerate((0, 0.25, 0.5, 0.75)):
    path = pathlib.Path({str(tmp_path)!r}) / f"latents_{{k}}.safetensors"
    path.touch()
    os.utime(path, (time.time() + age,) * 2)"""
    monkeypatch.setattr(benchmark, "torchrun", lambda *_: [sys.executable, "-c", body])
    row = benchmark.watch(tmp_path / "x.py", [], [0, 1], (tmp_path, "latents_*.safetensors"), 4, 8)
    assert row["images"] == 32 and row["images_per_second"] == pytest.approx(16 / 0.5, rel=0.05)
    with pytest.raises(RuntimeError, match="had 4 files latents_.*, expected 6"):
        benchmark.watch(tmp_path / "x.py", [], [0, 1], (tmp_path, "latents_*.safetensors"), 6, 8)
