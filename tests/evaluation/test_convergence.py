"""evaluation/convergence.py: what training took to a distance, read from the log of a run."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

from vtp_diffusion.evaluation.convergence import first_within, read_convergence

CONFIG = {
    "train_batch_size": 10,
    "validation": {
        "guidance_scale": 1.0,
        "distance": {"network": "vgg16", "num_images": 8, "reference": {"source": "openmoji"}},
    },
}


def training(step, seconds, processes=1):
    return {"step": step, "loss": 1.0, "seconds": seconds, "epochs": step / 5, "flops": step * 1e9} | (
        {"processes": processes} if processes else {}
    )


def distance(step, value):
    return {"step": step, "FD-VGG": value, "FD-VGG_floor": 1.0, "FD-VGG_images": 8}


@pytest.fixture
def folder(tmp_path):
    def write(*lines, config=CONFIG):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path

    return write


LINES = (
    distance(0, 90.0), training(10, 4.0), distance(10, 30.0), training(15, 6.0), training(20, 7.0, processes=2),
    distance(20, 20.0),
)  # fmt: skip


def test_a_distance_stands_beside_what_training_took(folder):
    rows = read_convergence(folder(*LINES))
    assert [row["distance"] for row in rows] == [90, 30, 20] and {row["network"] for row in rows} == {"vgg16"}
    assert [row["images"] for row in rows] == [0, 100, 200] and [row["epochs"] for row in rows] == [0, 2, 4]
    assert [row["gpu_seconds"] for row in rows] == [0, 4, 8], "the last second was of two processes"
    assert [row["flops"] for row in rows] == [0, 1e10, 2e10]
    assert first_within(rows, 30)["step"] == 10 and first_within(rows, 29.9)["step"] == 20


def test_a_log_of_an_earlier_version_leaves_open_what_it_does_not_say(folder):
    rows = read_convergence(folder({"step": 10, "seconds": 4.0}, distance(10, 30.0)))
    assert rows[0]["images"] == 100 and rows[0]["epochs"] is rows[0]["gpu_seconds"] is rows[0]["flops"] is None


def test_the_program_prints_it(folder, capsys):
    program = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "generation.py"))
    program["main"](["reach", str(folder(*LINES)), "25"])
    expected = "FD-VGG of 8 samples to openmoji, no guidance, is at most 25 after 4 epochs, 200 images, 8 GPU-seconds"
    assert expected + ", 2e+10 FLOPs" in capsys.readouterr().out
    program["main"](["reach", str(folder(distance(9, 1.0) | {"FD-VGG_reference": "20 images of cats"})), "25"])
    assert "FD-VGG of 8 samples to 20 images of cats, no guidance, is" in capsys.readouterr().out
    guidance = {"guidance_scale": 3.0, "guidance": "internal", "guidance_interval": [0.0, 0.9]}
    row = read_convergence(folder(*LINES, config=CONFIG | {"validation": CONFIG["validation"] | guidance}))[0]
    assert row["guidance"] == "guidance of scale 3.0 (internal) at times from 0.0 to 0.9"
    with pytest.raises(ValueError, match="reach was given x, expected a run folder and a distance"):
        program["main"](["reach", "x"])


def test_no_distance_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="log.jsonl has no distances"):
        read_convergence(folder(training(10, 4.0)))
    with pytest.raises(ValueError, match=r"none of 3 validations reaches 5: the lowest FD-VGG is 20, at step 20"):
        first_within(read_convergence(folder(*LINES)), 5)
    with pytest.raises(ValueError, match="no config.yaml: expected the run folder"):
        read_convergence(tmp_path / "nowhere")
