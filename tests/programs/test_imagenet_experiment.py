"""The script of experiments/imagenet, rehearsed with tiny weights and 200 images; every program in this process."""

import json
from pathlib import Path

import numpy as np
import pytest
from experiment_programs import ROOT, load
from PIL import Image


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    draw = np.random.default_rng(0)
    for number in range(200):
        folder = tmp_path / "images" / "train" / f"n0000000{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    channels = json.loads((ROOT / "tests/fixtures/golden/vtp_released/config.json").read_text())
    channels = channels["vision_feature_bottleneck"]
    (tmp_path / "statistics.json").write_text(json.dumps({"mean": [0.0] * channels, "std": [1.0] * channels}))
    options = {"data": tmp_path / "images", "latent_statistics": tmp_path / "statistics.json"}
    options |= {"output_dir": tmp_path / "run", "reference": tmp_path / "images"}
    options |= {"feature_network": f"vtp:{tmp_path}/run/vae"}
    return ["--config", "experiments/imagenet/rehearsal.yaml", *(f"--{key}={value}" for key, value in options.items())]


def test_from_images_to_a_report(words, tmp_path):
    started = []

    def start(config, program, arguments):
        started.append(program)
        load(program).main(arguments)

    load("experiments/imagenet/run.py").main(words, start)
    assert [Path(program).stem for program in started] == [
        *("convert", "extract_latents", "train", "generation", "generation", "report")
    ]
    results = [json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("unguided", "guided")]
    assert "gradient_accumulation_steps: 2" in (tmp_path / "run" / "generator" / "config.yaml").read_text()
    scales = [result["settings"]["guidance_scale"] for result in results]
    assert scales == [1.0, 1.5] and (tmp_path / "run" / "report.html").is_file()


def test_what_is_not_there_is_named_before_anything_runs(words):
    program = load("experiments/imagenet/run.py")
    with pytest.raises(ValueError, match="not there: --reference absent.npz"):
        program.main([*words, "--reference", "absent.npz"], start=None)
    with pytest.raises(ValueError, match="latent_statistics is none"):
        program.main([], start=None)


def test_a_ready_pipeline_is_only_measured():
    program = load("experiments/imagenet/run.py")
    config = program.Config(pipeline="ready")
    assert [name for name, _ in program.steps(config)] == ["eval/generation.py", "eval/report.py"]
