"""benchmarks/startup.py and extraction_program.py at their smallest, and the arithmetic of their rows."""

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vtp_diffusion.data import image_datasets

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(image_datasets, "IN_MEMORY_BYTES", image_datasets.IN_MEMORY_BYTES)  # which a benchmark changes
    return importlib.import_module


@NO_GPU
def test_a_first_step_has_three_parts(tmp_path, load, capsys):
    path = tmp_path / "x.json"
    load("startup").main(["--output", str(path), "--tiny", "true", "--ways", "train plain"])
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert row["seconds"] == pytest.approx(row["imports"] + row["building"] + row["first"])
    assert min(row["imports"], row["building"], row["first"]) > 0 and row["cache"] == "empty"
    assert result["of_plain"] == {"train plain, empty cache": 1.0} and str(path) in capsys.readouterr().out


def test_imports_before_the_bar_and_after_it_are_told_apart(tmp_path, load):
    done = tmp_path / "done"
    body = f"""
import sys, time
sys.stderr.write("import time: self [us] | cumulative | imported package\\n")
sys.stderr.write("import time:    200000 |     900000 | torch\\n")
time.sleep(0.3)
sys.stderr.write("\\rsteps:   0%|    | 0/9 import time:      1500 |       1500 |   triton\\n")
open({str(done)!r}, "w").close()
time.sleep(60)"""
    row = load("startup").watch([sys.executable, "-c", body], dict(os.environ), "steps: ", done.is_file)
    assert row["imports"] == 0.2 and row["imports_in_first"] == 0.0015 and 0 < row["first"] < 10
    assert row["building"] == pytest.approx(row["seconds"] - row["first"] - 0.2)
    command = [sys.executable, "-c", "import sys; sys.exit('import time: 1 | 1 | x\\nno such thing')"]
    with pytest.raises(RuntimeError, match=r"failed:\nno such thing"):
        load("startup").watch(command, dict(os.environ), "steps: ", done.with_name("never").is_file)


def test_a_way_that_comes_again_finds_what_it_compiled(tmp_path, load, monkeypatch):
    benchmark = load("startup")

    def watch(command, environment, bar, reached):
        Path(environment["TRITON_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)
        (Path(environment["TRITON_CACHE_DIR"]) / "kernel").touch()
        return {"seconds": 2.0 if "--fast=false" in command else 1.0}

    monkeypatch.setattr(benchmark, "watch", watch)
    config = benchmark.BenchmarkConfig(output=str(tmp_path / "x.json"))
    names = ["generate fast", "generate fast", "generate plain", "train fused"]
    rows = [benchmark.measure(config, tmp_path, name, number) for number, name in enumerate(names)]
    assert [row["cache"] for row in rows] == ["empty", "filled", "empty", "empty"]
    expected = {
        "generate fast, empty cache": 0.5,
        "generate fast, filled cache": 0.5,
        "generate plain, empty cache": 1,
    }
    assert benchmark.of_plain(rows) == expected


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("startup", ["--ways", "train warm"], "ways are train warm, expected some of train fused, train plain"),
        ("extraction_program", ["--images", "12000"], "images is 12000 .* expected a multiple of 8192"),
        ("extraction_program", ["--batch_size", "100"], "batch_size 100, .* a divisor of 4096"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, load, name, words, message):
    with pytest.raises(ValueError, match=message):
        load(name).main([f"--output={tmp_path / 'x.json'}", *words])


@NO_GPU
def test_the_slower_of_reading_and_encoder_is_named(tmp_path, load, capsys):
    path = tmp_path / "x.json"
    load("extraction_program").main(["--output", str(path), "--tiny", "true", "--num_workers", "1"])
    result = json.loads(path.read_text())
    program = result["program"]
    assert program["steady"] > program["altogether"] == 64 / program["seconds"] and program["gpu_busy"] is None
    slower = min(result["reading"], result["encoder"])
    assert result[result["limit"]] == slower and result["of_limit"] == program["steady"] / slower
    assert result["nvjpeg"] == "not available: no GPU" and '"limit"' in capsys.readouterr().out


def test_images_have_the_size_of_photographs_and_others_are_links(tmp_path, load, monkeypatch):
    monkeypatch.setattr(load("extraction_program"), "DIFFERENT", 20)
    sizes = load("extraction_program").make_images(tmp_path, 24)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert len(sizes) == 20 and len(paths) == 24 and 40_000 < min(sizes) < max(sizes) < 120_000
    assert os.path.samefile(tmp_path / "3" / "000023.jpg", tmp_path / "3" / "000003.jpg")
    assert Image.open(paths[0]).size in ((500, 400), (375, 500))


def test_the_steady_part_is_the_second_half(load):
    seen = [(0.0, 0), (30.0, 128), (31.0, 256), (32.0, 512), (33.0, 600), (34.0, 1024), (35.0, 1024)]
    benchmark = load("extraction_program")
    assert benchmark.steady_part(seen, 1024) == (256.0, 32.0, 34.0)
    text = "encoding:   0%|          | 0/1024 [00:00<?, ?it/s]\rencoding:  12%|█▎        | 128/1024 [00:00<00:00]\r"
    assert benchmark.progress(text) == 128 and benchmark.progress("reading images: 5%|  | 3/9") == 0


def test_the_gpu_is_looked_at_while_something_runs(load, monkeypatch):
    benchmark = load("extraction_program")
    said = iter([50, 100, *[0] * 1000])
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"{next(said)}\n"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with benchmark.Utilisation() as gpu:
        gpu.look()
    times = [at for at, _ in gpu.samples]
    assert gpu.mean(times[0], times[1]) == 0.75 and gpu.mean(times[1] + 9, times[1] + 10) is None
