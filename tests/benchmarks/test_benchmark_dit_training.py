"""benchmarks/dit_training.py at its smallest, and with wrong settings."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "dit_training.py"
    spec = importlib.util.spec_from_file_location("benchmark_dit_training", path)
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # dataclasses look their annotations up there
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as for a program that is started
        spec.loader.exec_module(program)
    return program


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_tiny_run_is_measured_and_compared_with_nothing(tmp_path, benchmark):
    benchmark.main(["--output", str(tmp_path / "speed.json"), "--steps", "6"])
    result = json.loads((tmp_path / "speed.json").read_text())
    (row,) = result["speed"]
    assert row["images_per_second"] > 0 and row["scaling"] == 1.0 and row["peak_memory_gib"] > 0
    assert 0 < row["seconds"]["training"] < row["seconds"]["altogether"]
    assert row["mfu"] is None and row["ratio_to"] is None and result["device"] == "CPU"


def test_what_was_started_ends_with_the_benchmark(tmp_path, benchmark):
    """In a session of its own too, where torchrun puts what it starts."""
    body = f"""
import subprocess, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)"""

    def tell(number, frame):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            benchmark.end_by_exception(signal.SIGTERM, frame)

    before = signal.signal(signal.SIGALRM, tell)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(SystemExit) as ended:
            benchmark.run_to_its_end([sys.executable, "-c", body], dict(os.environ))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended.value.code == 143
    child = Path("/proc") / (tmp_path / "pid").read_text() / "stat"  # a killed orphan may wait for its last rites
    assert not child.is_file() or child.read_text().split()[2] == "Z"


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
