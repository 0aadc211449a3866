"""benchmarks/feature_extraction.py at its smallest, and when its time is over."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("torch_fidelity")
FILE = Path(__file__).parents[2] / "benchmarks" / "feature_extraction.py"


def run(folder, *words):
    spec = importlib.util.spec_from_file_location("feature_benchmark", FILE)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    output = folder / "results" / "x.json"
    size = ("--device", "cpu", "--num_files", 3, "--num_tensors", 2, "--size", 32, "--batch_size", 2)
    program.main([*map(str, size + words), "--num_workers", "0", "--output", str(output)])
    return json.loads(output.read_text())


def test_every_row_is_measured_and_printed(tmp_path, capsys):
    results = run(tmp_path, "--seconds", 600)
    rows = {row["name"]: row for row in results["rows"]}
    assert results["not_run"] == [] and {"png, exact", "png, exact, record", "tensors, fast"} <= rows.keys()
    assert rows["png, torch-fidelity"]["images"] == rows["png, exact"]["images"] == 3
    for name, row in rows.items():
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"], rel=0.01)
        if "torch-fidelity" not in name and "reading" not in name:
            peer = rows[f"{name.partition(',')[0]}, torch-fidelity"]["images_per_second"]
            assert row["ratio_to_torch_fidelity"] == pytest.approx(row["images_per_second"] / peer)
    assert results["difference_to_torch-fidelity_by_spread"]["exact"] < 1e-4
    assert 0 < results["difference_to_float64_by_spread"]["exact"] < 1e-4
    assert results["ceiling"]["flops_an_image"] == pytest.approx(11.4e9, rel=0.01)
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in rows)


def test_what_there_is_no_time_for_is_named(tmp_path, capsys):
    results = run(tmp_path, "--seconds", 0)
    assert [row["name"] for row in results["rows"]] == ["png, torch-fidelity", "tensors, torch-fidelity"]
    assert "exact, eager" in results["not_run"] and "fast, eager" in results["not_run"]
    assert "not run" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--num_tensors must be at least 2, got 1"):
        run(tmp_path, "--num_tensors", 1)
