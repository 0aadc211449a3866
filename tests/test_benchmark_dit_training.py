"""benchmarks/dit_training.py at its smallest, and with wrong settings."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "dit_training.py"
    spec = importlib.util.spec_from_file_location("benchmark_dit_training", path)
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # dataclasses look their annotations up there
    spec.loader.exec_module(program)
    return program


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_tiny_run_is_measured_and_compared_with_nothing(tmp_path, benchmark):
    benchmark.main(["--output", str(tmp_path / "speed.json"), "--steps", "6"])
    result = json.loads((tmp_path / "speed.json").read_text())
    (row,) = result["speed"]
    assert row["images_per_second"] > 0 and row["scaling"] == 1.0 and row["peak_memory_gib"] > 0
    assert row["mfu"] is None and row["ratio_to"] is None and result["device"] == "CPU"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "XXL"], "size 'XXL' is unknown; known: tiny, B/1, XL/1"),
        (["--processes", "0"], r"processes is \[0\]"),
        (["--steps", "2"], "steps 2, expected positive numbers and 6"),
        (["--output", "x.txt"], "output must be a FILE.json"),
    ],
)
def test_wrong_settings_are_refused(benchmark, words, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main(["--output", "x.json", *words])
