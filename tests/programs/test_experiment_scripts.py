"""The scripts of experiments/: what they would run, and their tables, without starting a program."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vtp_diffusion.data.openmoji import is_held_out, read_attribution

ROOT = Path(__file__).parents[2]
UNDERSTANDING = "experiments/understanding_drives_generation"


def load(program: str):
    spec = importlib.util.spec_from_file_location(program.replace("/", "_").removesuffix(".py"), ROOT / program)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def understanding():
    return load(f"{UNDERSTANDING}/run.py")


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_frontier_prepares_once_and_other_seeds_wait_for_the_first(tmp_path):
    program = load("experiments/frontier/run.py")
    config = program.Config(runs=["muon"], seeds=[1, 0], results=str(tmp_path))
    tasks = program.plan(config, tmp_path / "made")
    assert [task.name for task in tasks] == ["latents", "reference", "muon-0", "muon-1"]
    assert tasks[3].needs == ("latents", "reference", "muon-0") and tasks[3].result == tmp_path / "muon-1.json"
    for name in ("muon-0", "muon-1"):
        (tmp_path / f"{name}.json").touch()
    assert all(task.done for task in program.plan(config, tmp_path / "made"))


def test_students_stand_beside_their_teacher_which_is_measured_once(tmp_path):
    program = load("experiments/frontier/run.py")
    config = program.Config(runs=["teacher", "student_trajectories"], seeds=[0, 1], results=str(tmp_path))
    tasks = {task.name: task for task in program.plan(config, tmp_path / "made")}
    assert list(tasks) == ["latents", "reference", "teacher-0", "student_trajectories-0", "student_trajectories-1"]
    distill, measure = tasks["student_trajectories-1"].programs
    given = load(distill[0]).parse_config(load(distill[0]).Config, distill[1:])
    assert given.trajectory_steps == given.max_train_steps == 4000 and given.seed == 1
    measured = load(measure[0])
    for words in (measure, *tasks["teacher-0"].programs):
        pipeline = measured.parse_config(measured.Config, words[1:]).pipeline
        assert (ROOT / pipeline).is_dir() == (words is not measure) == (pipeline == given.teacher.pipeline)
    with pytest.raises(ValueError, match="runs are none, expected of velocity, .*, student_trajectories, teacher"):
        program.Config(runs=["none"])


def test_every_tokenizer_has_the_same_words_but_for_what_it_is_trained_for(understanding, tmp_path):
    config = understanding.Config(output_dir=str(tmp_path), seeds=[0, 1], generator_steps=[50, 20])
    plan = understanding.Plan(config, tmp_path / "images")
    tasks = {task.name: task for task in plan.tasks()}
    assert len(tasks) == len(plan.tasks()) == 5 * (1 + 1 + 2 * 2 + 2)
    assert plan.tasks()[0].name == "tokenizer-reconstruction_long"
    base, joint, long = (tasks[f"tokenizer-{n}"].programs[0] for n in ("reconstruction", "all", "reconstruction_long"))
    assert set(joint) - set(base) == {"contrastive", "self_supervision", str(tmp_path / "tokenizer-all")}
    assert int(option(long, "--max_train_steps")) == 4 * int(option(base, "--max_train_steps")) == 8_000
    assert option(base, "--data.cache_dir") == str(tmp_path / "images")


def test_a_generator_is_measured_step_by_step_against_one_reference(understanding, tmp_path):
    config = understanding.Config(output_dir=str(tmp_path), seeds=[0, 1], generator_steps=[50, 20])
    tasks = {task.name: task for task in understanding.Plan(config, None).tasks()}
    first, last = tasks["generator-all-1-20"], tasks["generator-all-1-50"]
    assert first.needs == ("latents-all",) and last.needs == ("generator-all-1-20",)
    assert [option(t.programs[0], "--max_train_steps") for t in (first, last)] == ["20", "50"]
    assert option(first.programs[0], "--output_dir") == option(last.programs[0], "--output_dir"), "one run goes on"
    assert [Path(words[0]).stem for words in last.programs] == ["train", "generate", "generation"]
    measured = [task.programs[-1] for name, task in tasks.items() if name.startswith("generator-")]
    assert len({option(words, "--num_images") for words in measured}) == 1
    assert [n for n, t in tasks.items() if "--control" in t.programs[-1]] == [
        f"generator-{name}-0-20" for name in config.tokenizers
    ]
    assert f"vtp:{tmp_path / 'random'}" in first.programs[-1]


def test_the_programs_take_these_words(understanding, tmp_path):
    """Of both scales: names and values of options, and that the generator may go on to more steps."""
    for smallest in (False, True):
        config = understanding.Config(output_dir=str(tmp_path), smallest=smallest)
        plan = understanding.Plan(config, None)
        for task in (plan.tokenizer("all"), plan.tokenizer("reconstruction"), plan.generator("all", 0, 1)):
            words = task.programs[0]
            program = load(words[0])
            assert program.parse_config(program.Config, words[1:]).output_dir.startswith(str(tmp_path))
    assert "max_train_steps" in program.parse_config(program.Config, words[1:]).changeable_keys()


def test_smallest_is_small_whatever_else_is_said(understanding):
    config = understanding.Config(smallest=True, num_images=5000)
    assert (config.num_images, config.tokenizers) == (100, ["reconstruction", "all"])
    assert config.folder == Path("runs/understanding-smallest") != understanding.Config().folder
    with pytest.raises(ValueError, match="tokenizers are none, expected of reconstruction"):
        understanding.Config(tokenizers=["none"])
    with pytest.raises(ValueError, match="data nowhere is not there"):
        understanding.Config(data="nowhere")


def test_half_of_the_training_concepts_and_all_held_out_ones(understanding, tmp_path):
    bases = [f"{code:X}" for code in range(0x1F300, 0x1F300 + 400)]
    folder = tmp_path / "images" / "openmoji-17.0.0-8"
    folder.mkdir(parents=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"base": base}) + "\n" for base in bases))
    config = understanding.Config(output_dir=str(tmp_path), resolution=8, tokenizers=["all_half"])
    understanding.write_half(config, tmp_path / "images", tmp_path / "half")
    kept = {row["base"] for row in understanding.read_metadata(tmp_path / "half" / folder.name)}
    held_out = {base for base in bases if is_held_out(base, 0.1, 0)}
    assert held_out < kept and abs(len(kept - held_out) / len(set(bases) - held_out) - 0.5) < 0.1
    tasks = understanding.Plan(config, tmp_path / "images").tasks()
    folders = {task.name: option(task.programs[0], "--data.cache_dir") for task in tasks[:2]}
    assert folders == {"tokenizer-all_half": str(tmp_path / "half"), "latents-all_half": str(tmp_path / "images")}


def test_images_come_from_the_archive_once(understanding, tmp_path):
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "emoji.tar", "w") as archive:
        archive.add(tmp_path / "x", "openmoji/x")
    config = understanding.Config(data=str(tmp_path / "emoji.tar"), output_dir=str(tmp_path))
    images = understanding.open_data(config, tmp_path)
    assert (images / "openmoji" / "x").read_text() == "x"
    (images / "openmoji" / "x").write_text("kept")
    assert (understanding.open_data(config, tmp_path) / "openmoji" / "x").read_text() == "kept"
    assert understanding.open_data(understanding.Config(data=str(images)), tmp_path) == images


def test_three_styles_of_a_concept_share_its_base(tmp_path, monkeypatch):
    program = load(f"{UNDERSTANDING}/data.py")
    rendered = tmp_path / "rendered"
    (rendered / "images").mkdir(parents=True)
    row = {"file_name": "images/2764.webp", "key": "2764", "base": "2764", "caption": "red heart", "skin_tone": False}
    (rendered / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    Image.new("RGB", (8, 8)).save(rendered / "images" / "2764.webp")
    monkeypatch.setattr(program, "openmoji_folder", lambda resolution: rendered)
    picture = io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(picture, "PNG")
    for package, names in (
        ("noto", ["img/google/64/2764-fe0f.png"]),
        ("fluent", ["assets/2764.webp", "assets/1.webp"]),
    ):
        with tarfile.open(tmp_path / f"{package}.tgz", "w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(picture.getvalue())
                archive.addfile(member, io.BytesIO(picture.getvalue()))
    words = [f"--{name}={tmp_path}/{name}.tgz" for name in ("noto", "fluent")]
    words += [f"--output={tmp_path}/out", "--resolution=8", f"--archive={tmp_path}/emoji.tar"]
    program.main(words)
    folder = next((tmp_path / "out").iterdir())
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert {row["base"] for row in rows} == {"2764"} and len({row["caption"] for row in rows}) == len(rows) == 3
    image = Image.open(folder / rows[2]["file_name"])
    assert image.size == (8, 8) and image.getpixel((4, 4)) == (255, 255, 255), "transparency is white"
    attribution = read_attribution(8, tmp_path / "out")  # what latents and model cards say
    assert all(name in attribution for name in ("CC BY-SA 4.0", "Apache License 2.0", "MIT License"))
    with pytest.raises(ValueError, match="is there already"):
        program.main(words)


def test_the_table_has_means_over_seeds_and_dashes(tmp_path):
    program = load(f"{UNDERSTANDING}/table.py")
    (tmp_path / "tokenizer-all.json").write_text(json.dumps({"held_out": {"recall_at_1": 0.5}}))
    nearest = [{"features": "both", "neighbours": 20, "top1": 0.1}]
    nearest += [{"features": "class token", "neighbours": k, "top1": k / 100} for k in (10, 20)]
    (tmp_path / "probe-all.json").write_text(json.dumps({"neighbours": nearest}))
    for seed, value in ((0, 2.0), (1, 4.0)):
        floor = {"generated": value, "real": 1.0}
        row = {"distance": "FD-VGG", "images": "generated", "value": 9.0, "floor": floor}
        scores = [{"score": "recall (VGG)", "images": "generated", "value": 0.25}]
        results = {"distances": [row], "scores": scores}
        (tmp_path / f"generator-all-{seed}-20.json").write_text(json.dumps(results))
    program.main([f"--results={tmp_path}", f"--output={tmp_path}/out/table.json"])
    found = json.loads((tmp_path / "out" / "table.json").read_text())["tokenizers"]["all"]
    assert [found["tokenizer"][name] for name in ("20-NN", "retrieval@1", "PSNR")] == [0.2, 0.5, None]
    assert found["generators"]["FD-VGG"]["20"]["mean"] == 3.0
    assert "| all | 3 ± 1.414 | 0.25 ± 0 |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "table.svg").read_text().count("<circle") == 4
    with pytest.raises(ValueError, match="holds no tokenizer-NAME.json"):
        program.main([f"--results={tmp_path}/out", f"--output={tmp_path}/out/table.json"])
