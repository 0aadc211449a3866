"""Settings of train_vtp/train.py: which of them depend on each other, and what a resumed run may change."""

from dataclasses import replace

import pytest
from test_joint import arguments
from test_train_vtp import ROOT, load_program

from vtp_diffusion.pretraining.joint import Objective
from vtp_diffusion.runtime.config import parse_config
from vtp_diffusion.training.run_folder import RunFolder

ALL = ("contrastive", "self_supervision", "reconstruction")


def config_of(*objectives, folder="nowhere", **settings):
    """A configuration without LPIPS, whose network would be needed."""
    program = load_program("train_vtp")
    part = program.ReconstructionPartConfig(lpips=0, **settings.pop("reconstruction", {}))
    return program.Config(output_dir=str(folder), objectives=objectives, reconstruction=part, **settings)


def differing(folder, config, **changes):
    """What RunFolder says of a run of `config` that is resumed with changes; None if it may."""
    if not folder.exists():
        run = RunFolder(folder, config)
        run.claim()
        run.log({"step": 1})
        run.release()
    try:
        RunFolder(folder, replace(config, **changes))
    except ValueError as error:
        return str(error).partition("another configuration:\n")[2].strip()
    return None


def test_an_objective_is_an_entry_with_a_class_and_a_field_of_settings():
    program = load_program("train_vtp")
    config = config_of(*ALL)
    assert tuple(program.OBJECTIVES) == ALL
    for name, kind in program.OBJECTIVES.items():
        assert issubclass(kind, Objective) and getattr(config, name).weight > 0


def test_a_setting_that_came_after_a_run_began_is_what_the_run_has_done_since(tmp_path, capsys):
    config, folder = config_of("self_supervision", folder=tmp_path / "run"), tmp_path / "run"
    run = RunFolder(folder, config)
    run.claim()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("    recipe: dinov2\n", ""))  # as version 0.1 wrote it
    run.release()
    RunFolder(folder, config)
    assert config.self_supervision.crops.recipe == "dinov2"  # nothing was trained: the new run's own
    run.log({"step": 1})
    for _ in range(2):  # the second time the folder knows the setting
        config = config_of("self_supervision", folder=folder)
        run = RunFolder(folder, config)
        assert config.self_supervision.crops.recipe == "version_0_1"
        assert "self_supervision.crops.recipe stays version_0_1" in capsys.readouterr().out
        run.claim()
        run.release()
    assert "recipe: version_0_1" in (folder / "config.yaml").read_text()


MARKS = ("[paper]", "[released]", "[DINOv2]", "[OpenCLIP]", "[ours]")
# What decides no result: where things are, how fast they run, how often something is looked at.
UNMARKED = {
    "output_dir",
    "compile",
    "cuda_graphs",
    "gradient_checkpointing",
    "checkpointing_steps",
    "validation_steps",
}
UNMARKED |= {"log_steps", "dataloader_num_workers", "streaming", "image_column", "caption_column", "skip_unreadable"}
OMISSIONS = ("layer-wise decay", "patch embedding's lower rate", "LayerScale", "minimal learning rate", "prototypes")


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_every_setting_of_the_papers_recipe_names_its_source(name):
    """On its line, or on that of its section."""
    text = (ROOT / f"train_vtp/configs/{name}.yaml").read_text()
    header, settings = text.partition("output_dir:")[0], text[text.index("output_dir:") :]
    assert all(word in header for word in OMISSIONS) and all(f"{mark}:" in header for mark in MARKS)
    sections, unmarked = {}, []
    for line in settings.splitlines():
        key, depth = line.strip().partition(":")[0], len(line) - len(line.lstrip())
        sections = {d: marked for d, marked in sections.items() if d < depth}
        marked = any(mark in line for mark in MARKS) or any(sections.values())
        if line.partition(" #")[0].endswith(":"):
            sections[depth] = marked
        elif not marked:
            unmarked.append(key)
    assert set(unmarked) <= UNMARKED


@pytest.mark.parametrize(
    ("objectives", "refused"),
    [(("reconstruction",), False), (("contrastive", "reconstruction"), True), (("self_supervision",), True)],
)
def test_micro_steps_may_change_only_where_no_loss_compares_samples(tmp_path, objectives, refused):
    said = differing(tmp_path / "run", config_of(*objectives), gradient_accumulation_steps=4)
    assert said == ("gradient_accumulation_steps: 1 there, 4 now" if refused else None)


@pytest.mark.parametrize(
    ("objectives", "settings", "refused"),
    [
        (("contrastive", "reconstruction"), {}, False),
        (("reconstruction",), {"adam_weight_decay": 0.04, "adam_weight_decay_end": 0.4}, True),
        (ALL, {}, True),
        (("contrastive",), {"lr_scheduler": "cosine"}, True),
    ],
)
def test_the_length_may_change_only_where_nothing_follows_the_share_of_training(
    tmp_path, objectives, settings, refused
):
    """A teacher's momentum and temperature, frozen prototypes and a rising weight decay do."""
    config = config_of(*objectives, max_train_steps=100, **settings)
    said = differing(tmp_path / "run", config, max_train_steps=200)
    assert said == ("max_train_steps: 100 there, 200 now" if refused else None)


@pytest.mark.parametrize(
    ("more", "processes", "message"),
    [
        (["--gradient_accumulation_steps=4"], 1, "reconstruction.share is 0.25 .1 of 4. of a batch of 2 images"),
        ([], 4, "reconstruction.share is 0.25 .1 of 4. of a batch of 2 images a process and micro-step, .* each has"),
        ([], 16, "train_batch_size is 8 images a step, expected a multiple of 16 processes x 1"),
        (["--gradient_accumulation_steps=3"], 1, "train_batch_size is 8 .* a multiple of 1 processes x 3"),
        (["--reconstruction.share=0.0001"], 1, "reconstruction.share is 0.0001, expected at least 1 sample in 1024$"),
    ],
)
def test_shares_that_processes_or_micro_steps_cannot_divide_leave_no_folder(
    tmp_path, monkeypatch, more, processes, message
):
    """A folder would refuse the corrected command."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=message):
        load_program("train_vtp").main(arguments(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objectives", "given", "expected"),
    [
        (ALL, {}, (0.1, 0.125)),  # arXiv:2512.13687: 0.1, 2k of 16k
        (("self_supervision", "reconstruction"), {"share": 0.5}, (0.1, 0.5)),
        (("reconstruction",), {}, (1.0, 1.0)),
        (("reconstruction",), {"weight": 0.1}, (0.1, 1.0)),
    ],
)
def test_reconstruction_has_the_weight_and_share_of_the_paper_beside_others_and_the_whole_batch_alone(
    objectives, given, expected
):
    settings = config_of(*objectives, reconstruction=given).reconstruction
    assert (settings.weight, settings.share) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", (1.0, 0.5)),
        ("openmoji", (1.0, 0.5)),
        ("openmoji_twin", (1.0, 0.5)),
        ("openmoji_reconstruction", (1.0, 1.0)),
    ],
)
def test_the_configurations_that_were_run_have_the_weights_that_they_ran_with(name, expected):
    config = parse_config(load_program("train_vtp").Config, ["--config", str(ROOT / f"train_vtp/configs/{name}.yaml")])
    assert (config.reconstruction.weight, config.reconstruction.share) == expected


def test_a_recipe_without_its_shards_is_refused_before_its_model_is_built(tmp_path, monkeypatch):
    program = load_program("train_vtp")
    monkeypatch.setattr(program, "build", None)
    with pytest.raises(ValueError, match="data_files is none with source 'webdataset'"):
        program.main(["--config", str(ROOT / "train_vtp/configs/large.yaml"), f"--output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ALL)
def test_an_objective_that_does_not_count_is_left_out(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}.weight is 0.0, expected a positive number"):
        load_program("train_vtp").main(arguments(tmp_path / "run", f"--{name}.weight=0"))
