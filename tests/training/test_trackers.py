"""What TensorBoard and wandb get of a run."""

import importlib.util
import shutil

import pytest
from test_loop import fresh_accelerate  # noqa: F401
from tiny_training import tiny_config, train

from vtp_diffusion.training.accelerator import tracker_settings


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tiny_config(tmp_path / "run", max_train_steps=2, report_to="tensorboard"))
    run.report(2, {"held_out_psnr": 20.0}, Image.new("RGB", (8, 8)))
    run.end()
    events = EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    assert {"loss", "learning_rate", "held_out_psnr"} <= set(events.Tags()["scalars"])
    assert "validation" in events.Tags()["images"]
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()


def test_tensorboard_has_every_step_of_a_resumed_run_once(tmp_path):
    """The run was killed after its sixth step and goes on after the third, whose checkpoint was the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path / "run", report_to="tensorboard")
    run = train(config)
    run.report(6, {"held_out_psnr": 20.0})
    run.end()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    train(config).end()
    events = EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("held_out_psnr") == []
    assert len(list((tmp_path / "run" / "logs").rglob("hparams.yml"))) == 1


def test_wandb_has_one_project_and_a_run_the_name_of_its_folder(tmp_path):
    """As far as accelerate goes without wandb, which starts when the tracker does."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in ("vtp-l", "dit-xl"):
        (tmp_path / name).mkdir()
    settings = tracker_settings("wandb", tmp_path / "vtp-l" / ".." / "dit-xl", 0, {})
    tracker = LOGGER_TYPE_TO_CLASS["wandb"](settings["project_name"], **settings["init_kwargs"]["wandb"])
    assert tracker.run_name == "vtp-diffusion", "what accelerate passes to wandb.init as the project"
    assert tracker.init_kwargs["name"] == "dit-xl"


def test_a_resumed_run_goes_on_with_its_run_in_wandb(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    first, again, other = (
        tracker_settings("wandb", tmp_path / name, step, {})["init_kwargs"]["wandb"]
        for name, step in (("one", 0), ("one", 3), ("other", 0))
    )
    assert first["id"] == again["id"] != other["id"] and again["resume"] == "allow"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="about an environment without wandb")
def test_wandb_that_is_missing_is_named_with_its_extra(tmp_path):
    with pytest.raises(ImportError, match=r"wandb is needed here: .* pip install -e '.\[wandb\]'"):
        train(tiny_config(tmp_path / "run", report_to="wandb"))
    assert not (tmp_path / "run").exists()
