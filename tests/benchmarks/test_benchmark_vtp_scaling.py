"""benchmarks/vtp_scaling.py at its smallest, and what benchmarks start and end."""

import importlib
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

from vtp_diffusion.runtime.config import parse_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Import a module of benchmarks/; what it starts has the test's folder in its command."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return importlib.import_module


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One process, the same again, and two, on batches of 16 images: (what the program wrote, its folder)."""
    folder = tmp_path_factory.mktemp("scaling")
    words = ["--size=tiny", "--same_losses=true", "--images=16", "--steps=6", "--processes", "1", "1", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(tempfile, "tempdir", str(folder))
        program = importlib.import_module("vtp_scaling")
        program.main([*words, f"--output={folder / 'out' / 'x.json'}", "--", "--lr_warmup_steps=1000"])
    return json.loads((folder / "out" / "x.json").read_text()), folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_one_process_and_two_are_measured_and_nothing_goes_on(measured):
    result, folder = measured
    one, _, two = result["rows"]
    assert (one["processes"], two["processes"], two["images_a_process"]) == (1, 2, 8)
    assert one["scaling"] == one["times_one"] == 1.0
    assert two["times_one"] == pytest.approx(two["images_per_second"] / one["images_per_second"])
    assert two["scaling"] == pytest.approx(two["times_one"] / 2) and two["mfu"] is None
    assert len(set(one["losses"])) == 6 and result["options"] == ["--lr_warmup_steps=1000"]
    assert not any(str(folder) in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_the_same_batches_differ_by_rounding_only(measured):
    """With the warm-up of the configuration, or another one where an option says so. Some processors round alike."""
    result, _ = measured
    first, *others = result["rows"]
    again = others[0]
    assert result["changed"]["mixed_precision"] == "no" and "lr_warmup_steps" not in result["changed"]
    assert "differences_of_losses" not in first
    assert again["times_one"] == again["scaling"] == again["images_per_second"] / first["images_per_second"]
    assert again["environment"] == {"DIFFUSERS_ATTN_BACKEND": "_native_math"} and "environment" not in first
    for row in others:
        assert len(row["differences_of_losses"]) == len(row["differences_of_gradient_norms"]) == 6
        assert 0 <= max(row["differences_of_losses"]) < 1e-5
        assert 0 <= max(row["differences_of_gradient_norms"]) < 1e-4


@pytest.mark.parametrize(("same_losses", "sizes"), [(False, (32, 16)), (True, (16, 8))])
def test_images_are_those_of_a_process_or_of_a_step(load, same_losses, sizes):
    benchmark = load("vtp_scaling")
    config = benchmark.BenchmarkConfig(output="x.json", images=16, same_losses=same_losses)
    assert benchmark.batch_sizes(config, 2) == sizes


@pytest.mark.parametrize("size", ["large", "tiny"])
def test_the_program_takes_what_is_changed(load, size):
    benchmark = load("vtp_scaling")
    config = benchmark.BenchmarkConfig(output="x.json", size=size, processes=[1], same_losses=True)
    words = [f"--config={ROOT / 'train_vtp' / 'configs' / benchmark.SIZES[size][0]}"]
    words += [f"--{name}={value}" for name, value in benchmark.changes(config).items()]
    assert parse_config(runpy.run_path(str(benchmark.PROGRAM))["Config"], words).data.source == "openmoji"


def test_losses_are_compared_step_by_step_and_those_near_zero_with_a_part_of_the_whole(load):
    one = {"step": 1, "loss": 2.0, "a/b": 1.0, "a/koleo": 1e-6, "a/logit_scale": 1.0, "grad_norm": 4.0, "seconds": 1.0}
    two = one | {"step": 2, "loss": 4.0, "a/b": -0.5}
    three = [one | {"a/b": 1.1, "a/logit_scale": 9.0, "grad_norm": 5.0, "seconds": 9.0}, two | {"a/koleo": 0.01}]
    result = load("vtp_scaling").compare([one, two], three)
    assert result["differences_of_losses"] == pytest.approx([0.1, 0.25], rel=1e-3)
    assert result["largest_difference_of_losses"] == {
        "step": 2,
        "loss": "a/koleo",
        "difference": pytest.approx(0.25, rel=1e-3),
    }
    assert result["differences_of_gradient_norms"] == [0.25, 0.0]


def test_a_program_that_refuses_its_input_ends_the_benchmark_with_its_message(tmp_path, load):
    words = ["--size=tiny", "--processes=1", f"--output={tmp_path / 'x.json'}", "--", "--self_supervision.share=0.3"]
    with pytest.raises(
        RuntimeError, match=r"\nerror: self_supervision.share is 0.3 \(3 of 10\) of a batch of 8 images"
    ):
        load("vtp_scaling").main(words)
    assert not (tmp_path / "x.json").exists()


def test_a_worker_that_dies_ends_the_others_at_once(tmp_path, load):
    """Also where the launcher would wait: the other worker hears no signal, as one that waits inside NCCL."""
    worker = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(os.environ["LOCAL_RANK"]).write_text(str(os.getpid()))
while os.environ["LOCAL_RANK"] == "1" or not pathlib.Path("1").is_file():
    time.sleep(0.05)
time.sleep(0.5)
print("steps: 3\\rsteps: 4\\rerror: no such thing", file=sys.stderr)
sys.exit(2)"""
    body = f"""
import os, subprocess
workers = [subprocess.Popen(["{sys.executable}", "-c", {worker!r}], start_new_session=True, cwd={str(tmp_path)!r},
           env=os.environ | {{"LOCAL_RANK": str(rank)}}) for rank in range(2)]
for worker in workers[::-1]:
    worker.wait()"""
    launching, other, start = load("launching"), [], time.perf_counter()

    def reached():
        if not other and (tmp_path / "1").is_file() and (tmp_path / "1").read_text():
            other.append(psutil.Process(int((tmp_path / "1").read_text())))
        return False

    with pytest.raises(RuntimeError, match="failed:\nerror: no such thing"):
        launching.run_until(reached, [sys.executable, "-c", body], dict(os.environ))
    assert time.perf_counter() - start < 20 and launching.gone(other[0])


def test_a_launcher_that_ends_before_anything_is_reached_failed(load):
    with pytest.raises(RuntimeError, match="failed"):
        load("launching").run_until(lambda: False, [sys.executable, "-c", ""], dict(os.environ))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output=x.txt"], "output must be a FILE.json"),
        (["--output=x.json", "--processes=0"], r"processes is \[0\]"),
        (["--output=x.json", "--steps=3"], "steps 3, expected positive numbers and 6 steps or more"),
        (["--output=x.json", "--images=0"], "images is 0"),
    ],
)
def test_wrong_settings_are_refused(load, words, message):
    with pytest.raises(ValueError, match=message):
        load("vtp_scaling").main(words)


def test_losses_that_are_not_finite_are_not_compared(load):
    lines = [{"step": step, "loss": 2.0, "a/b": 1.0, "grad_norm": 1.0} for step in (1, 2)]
    broken = [lines[0], lines[1] | {"a/b": float("nan")}]
    assert load("vtp_scaling").compare(lines, lines)["largest_difference_of_losses"]["difference"] == 0
    for first, second in ((lines, broken), (broken, lines)):
        with pytest.raises(SystemExit, match="step 2: a/b not finite"):
            load("vtp_scaling").compare(first, second)
