"""The scripts of experiments/shipped_pipeline: what they would run, their table and picture."""

import json

import pytest
from experiment_programs import load, settings_class
from PIL import Image

FOLDER = "experiments/shipped_pipeline"
CONFIGURED = ("tokenizer", "decoder", "generator")  # tasks of programs with configurations


def taken(task) -> list:
    """What the programs of a task make of their words."""
    configs = []
    for file, *words in task.programs:
        program = load(file)
        known = (program.CONFIGS,) if task.name.split("-")[0] in CONFIGURED else ()
        configs.append(program.parse_config(settings_class(program), words, "", *known))
    return configs


@pytest.mark.parametrize("smallest", [False, True])
def test_the_programs_take_the_recipes(smallest, tmp_path):
    program = load(f"{FOLDER}/run.py")
    config = program.Config(smallest=smallest, output_dir=str(tmp_path), data=str(tmp_path))
    tasks = {task.name: task for name in program.RECIPES for task in program.tasks(config, tmp_path, name)}
    (tokenizer,), (joint,) = taken(tasks["tokenizer-f16c64"]), taken(tasks["tokenizer-f8c16_joint"])
    assert (tokenizer.model.patch_size, tokenizer.model.latent_channels) == (16, 64)
    assert tokenizer.objectives == ("reconstruction",) and len(joint.objectives) == 3
    assert joint.reconstruction.weight == 25 * tokenizer.reconstruction.weight
    (decoder,), (generator,) = taken(tasks["decoder-f8c16"]), taken(tasks["generator-f8c16"])
    assert decoder.adversarial.discriminator == "none" and tokenizer.compile and not generator.compile
    assert (generator.optimizer, generator.model.base_head_layer, generator.save_dtype) == ("muon", 3, "bfloat16")
    assert generator.vae == f"{tmp_path}/f8c16/decoder/vae" and len(taken(tasks["latents-f8c16"])) == 3
    (tmp_path / "f8c16/generator/pipeline").mkdir(parents=True)  # a control is only taken beside a pipeline
    (tmp_path / "f8c16/generator/pipeline/model_index.json").touch()
    euler, unipc, drawn, evaluated = taken(tasks["measured-f8c16"])
    assert {euler.pipeline, unipc.pipeline, drawn.pipeline, evaluated.images} == {f"{generator.output_dir}/pipeline"}
    assert (unipc.solver, unipc.num_inference_steps) == ("unipc", [2 if smallest else 16])
    previous = tmp_path / "be4752e/weights/openmoji-128/vae"
    assert str(previous) in tasks["decoder-previous_tokenizer"].programs[0]
    assert tasks["tokenizer-previous_tokenizer"].result.parent == previous
    (decoder,), (*known, encoded) = taken(tasks["decoder-three_styles"]), taken(tasks["latents-three_styles"])
    assert decoder.data.cache_dir == encoded.data.cache_dir == str(tmp_path)
    assert {config.data.cache_dir for config in known} == {None}  # measured on OpenMoji alone, as the others are
    programs = tasks["measured-three_styles"].programs
    assert len(programs) == 2 + len(tasks["measured-f8c16"].programs) and "clothing-fluent" in programs[4]
    (longer,) = taken(tasks["generator-three_styles"])
    assert smallest or longer.max_train_steps > generator.max_train_steps == 14_000
    before = tmp_path / "4b756fb/weights/openmoji-128"  # only the generator of these is trained
    (longer,) = taken(tasks["generator-three_styles_longer"])
    assert (longer.vae, longer.initial_transformer) == (f"{before}/vae", f"{before}/transformer")
    assert tasks["decoder-three_styles_longer"].result.parent == before / "vae" and not generator.initial_transformer
    with pytest.raises(ValueError, match="recipes are none, expected some of previous_tokenizer, f8c16, f8c16_joint"):
        program.Config(recipes=["none"])
    with pytest.raises(ValueError, match="be4752e lacks weights/openmoji-128, .* git archive be4752e weights/"):
        program.Config(recipes=["previous_tokenizer"], output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="data is None, expected what data.py --style_in_class wrote, for three_styl"):
        program.Config(recipes=["three_styles"])


def test_the_table_has_what_a_recipe_has_so_far(tmp_path):
    program, folder = load(f"{FOLDER}/table.py"), tmp_path / "runs" / "small"
    with pytest.raises(ValueError, match="which holds no recipe, expected the --output_dir of run.py"):
        program.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "found.json")])
    (folder / "decoder").mkdir(parents=True)
    lines = [{"step": 0, "held_out_psnr": 25.0, "held_out_lpips": 0.1}, {"step": 1, "seconds": 5.0001234}]
    lines += [{"step": 2, "held_out_psnr": 26.0}]  # --smallest has no LPIPS
    (folder / "decoder" / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "runs" / "results").mkdir()
    evaluated = {
        "sampling": {"generated": {"guidance": "internal", "guidance_scale": 3.5, "seed": 0}},
        "distances": [{"distance": "FD-VGG", "images": "generated", "value": 7.264812, "spread": {"value": 0.3}}],
        "near_duplicates": {"threshold": 0.03, "generated": {"near_duplicates": 3, "num_images": 12, "share": 0.25}},
    }
    (tmp_path / "runs" / "results" / "generation-small.json").write_text(json.dumps(evaluated))
    (tmp_path / "runs" / "results" / "generation-other.json").write_text("{}")
    program.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "found.json")])
    row = {"guidance": "internal", "guidance_scale": 3.5, "guidance_interval": None, "num_inference_steps": None}
    row |= {"FD-VGG, generated": [7.2648, 0.3], "near_duplicates": {"generated": [3, 12]}}
    found = {"seconds of training": {"decoder": 5.0001}, "decoder, held-out PSNR and LPIPS": {"0": [25.0, 0.1]}}
    found["decoder, held-out PSNR and LPIPS"] |= {"2": [26.0, None]}
    assert json.loads((tmp_path / "found.json").read_text()) == {"small": found | {"generation": row}}
    (tmp_path / "runs" / "longer" / "generator").mkdir(parents=True)  # a recipe without a decoder of its own
    (tmp_path / "runs" / "longer" / "generator" / "log.jsonl").write_text('{"step": 9, "seconds": 2.5}\n')
    program.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "found.json")])
    longer = {"seconds of training": {"generator": 2.5}}
    assert json.loads((tmp_path / "found.json").read_text())["longer"] == longer


def test_the_same_labels_stand_side_by_side(tmp_path):
    program = load(f"{FOLDER}/side_by_side.py")
    for number, folder in enumerate((tmp_path / "old", tmp_path / "new")):
        folder.mkdir()
        for image in range(4):
            Image.new("RGB", (8, 8), (100 * number, 60 * image, 0)).save(folder / f"{image:06d}.png")
        names = [("a", "b"), ("a-noto", "b-noto")][number]
        labels = {f"{image:06d}.png": {"label": image // 2, "name": names[image // 2]} for image in range(4)}
        (folder / "labels.json").write_text(json.dumps(labels))
    words = ["--images", str(tmp_path / "old"), str(tmp_path / "new"), "--titles", "old", "new", "--side", "16"]
    program.main([*words, "--output", str(tmp_path / "both.webp")])
    with Image.open(tmp_path / "both.webp") as picture:
        assert picture.size == (2 * 32 + program.GAP, program.HEADER + 2 * (16 + program.LINE))
        place = 32 + program.GAP + 16 + 8, program.HEADER + 16 + 2 * program.LINE - 1 + 8
        assert picture.getpixel(place) == pytest.approx((100, 180, 0), abs=12)  # the new pipeline's last image
    (tmp_path / "new" / "labels.json").write_text(json.dumps({"000000.png": {"label": 0, "name": "a"}}))
    with pytest.raises(ValueError, match="labels and their numbers of images differ"):
        program.main([*words, "--output", str(tmp_path / "both.webp")])
    labels = {f"{image:06d}.png": {"label": image, "name": name} for image, name in enumerate(("a", "a-noto"))}
    (tmp_path / "new" / "labels.json").write_text(json.dumps(labels))
    assert list(program.read_rows(tmp_path / "new")) == ["a", "a-noto"], "one folder with two styles"
    with pytest.raises(ValueError, match="has no labels.json, expected a folder of pipelines/generate.py"):
        program.read_rows(tmp_path)
    with pytest.raises(ValueError, match="titles are 1, expected one for each of 2 folders"):
        program.Config(images=["a", "b"], titles=["a"], output="b.webp")
