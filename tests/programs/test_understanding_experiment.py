"""experiments/understanding_drives_generation: what run.py would run, measurements, and tables."""

import io
import json
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from experiment_programs import ROOT, UNDERSTANDING, fashion_settings, load, option, settings_class
from PIL import Image

from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.openmoji import is_held_out, read_attribution, read_metadata


def test_every_tokenizer_has_the_same_words_but_for_what_it_is_trained_for(understanding, tmp_path):
    plan = understanding.Plan(understanding.Config(output_dir=str(tmp_path)), tmp_path / "images")
    tasks = {task.name: task for task in plan.tasks()}
    base, joint, long = (tasks[f"tokenizer-{n}"].programs[0] for n in ("reconstruction", "all", "reconstruction_long"))
    assert set(joint) - set(base) == {"contrastive", "self_supervision", str(tmp_path / "tokenizer-all")}
    assert int(option(long, "--max_train_steps")) == 4 * int(option(base, "--max_train_steps")) == 8_000
    assert option(base, "--data.cache_dir") == str(tmp_path / "images")


def test_what_the_headline_needs_comes_first(understanding, tmp_path):
    some = [name for name in understanding.TOKENIZERS if not name.endswith(("_tenth", *understanding.WEIGHTS))]
    config = understanding.Config(output_dir=str(tmp_path), tokenizers=some, seeds=[1, 0], generator_steps=[20, 50])
    names = [task.name for task in understanding.Plan(config, None).tasks()]
    # of each a tokenizer, a decoder, a generator with both decoders; of the first three these with a second seed
    assert len(set(names)) == len(names) == 3 * 6 + (len(config.tokenizers) - 3) * 4
    assert names[:2] == ["tokenizer-all_long", "tokenizer-reconstruction_long"]
    headline = names[: names.index("tokenizer-contrastive")]
    assert len(headline) == 22 and headline[-1] == "generator-reconstruction_long_decoder-1"
    order = ["generator-all-0", "decoder-all", "generator-all_decoder-0", "generator-reconstruction-1"]
    assert sorted(order, key=headline.index) == order
    starts = [names.index(f"tokenizer-{name}") for name in ("contrastive", "all_small", "all_half")]
    assert starts == [22, 30, 38]
    few = understanding.Plan(understanding.Config(output_dir=str(tmp_path), several=["contrastive"]), None).tasks()
    assert {"generator-contrastive-2", "generator-all-0"} < {task.name for task in few}
    assert "generator-all-1" not in {task.name for task in few}


@pytest.mark.parametrize("settings", ["tokenizer.yaml", "fashion_tokenizer.yaml"])
def test_a_small_tokenizer_has_half_the_width(understanding, tmp_path, settings):
    config = understanding.Config(output_dir=str(tmp_path), tokenizer=settings)
    program, whole = load("train_vtp/train.py"), understanding.HERE / settings
    words = understanding.Plan(config, None).training("all_small")
    given = program.parse_config(program.Config, words[1:]).model
    usual = program.parse_config(program.Config, ["--config", str(whole), "--data.source", "openmoji"]).model
    assert 2 * given.encoder_hidden_size == usual.encoder_hidden_size


@pytest.mark.parametrize(("name", "weight"), [("all_pixels", 25), ("all_understanding", 0.1)])
def test_reconstruction_has_another_weight_beside_the_other_objectives_where_named_so(
    understanding, tmp_path, name, weight
):
    program = load("train_vtp/train.py")
    plan = understanding.Plan(understanding.Config(output_dir=str(tmp_path)), None)
    usual, other = (program.parse_config(program.Config, plan.training(n)[1:]) for n in ("all", name))
    assert other.reconstruction.weight == weight * usual.reconstruction.weight and other.objectives == usual.objectives


def test_a_tokenizer_whose_generators_are_measured_is_not_trained_again(understanding, tmp_path):
    config = understanding.Config(output_dir=str(tmp_path), tokenizers=["all", "contrastive"], seeds=[0])
    plan = understanding.Plan(config, None)
    plan.results.mkdir()
    plan.generator("all", 0).result.touch()
    left = [task.name for task in plan.tasks() if not task.done]
    others = [
        "tokenizer-contrastive",
        "generator-contrastive-0",
        "decoder-contrastive",
        "generator-contrastive_decoder-0",
    ]
    assert left == others
    (tmp_path / "generator-all-0").mkdir()  # measured on this disk: the decoder can follow
    left = {task.name for task in plan.tasks() if not task.done}
    assert left == {*others, "tokenizer-all", "decoder-all", "generator-all_decoder-0"}
    (tmp_path / "tokenizer-all" / "vae").mkdir(parents=True)
    (tmp_path / "tokenizer-all" / "vae" / "config.json").touch()  # written before the weights
    assert "tokenizer-all" in {task.name for task in plan.tasks() if not task.done}
    (tmp_path / "tokenizer-all" / "results.json").touch()  # written after them: all that a second stage needs is there
    assert "tokenizer-all" not in {task.name for task in plan.tasks() if not task.done}


def test_a_second_stage_whose_disk_is_gone_is_trained_again_for_a_further_seed(understanding, tmp_path, capsys):
    config = understanding.Config(output_dir=str(tmp_path), tokenizers=["all"], seeds=[0, 1])
    plan = understanding.Plan(config, None)
    plan.results.mkdir()
    for done in (plan.generator("all", 0), plan.redecoded("all", 0), plan.generator("all", 1)):
        done.result.touch()
    (plan.results / "reconstruction-all_decoder.json").touch()  # what was found; the decoder itself is gone
    assert [task.name for task in plan.tasks() if not task.done] == []
    assert "generator-all-1 cannot be measured with another decoder" in capsys.readouterr().out
    plan.generator("all", 1).result.unlink()
    left = [task.name for task in plan.tasks() if not task.done]
    assert left == ["tokenizer-all", "decoder-all", "generator-all-1", "generator-all_decoder-1"]


def test_a_generator_is_measured_at_every_step_by_one_program(understanding, tmp_path):
    config = understanding.Config(output_dir=str(tmp_path), seeds=[0, 1], generator_steps=[20, 50])
    first, other = (understanding.Plan(config, None).generator("all", seed) for seed in (0, 1))
    assert first.needs == other.needs == ("tokenizer-all",)
    training, measuring = first.programs
    assert option(training, "--max_train_steps") == "50"
    assert option(training, "--checkpointing_steps") == "10", "a checkpoint at both"
    program = load(understanding.MEASURE)
    for step in (10, 20, 50):
        (tmp_path / "generator-all-0" / f"checkpoint-{step}" / "transformer_ema").mkdir(parents=True)
    given = program.parse_config(program.Config, measuring[1:])
    assert given.steps == [20, 50] and given.control and given.solver == "unipc"
    assert f"vtp:{tmp_path / 'random'}" in given.feature_network
    assert first.result == Path(f"{given.output}-50.json") == tmp_path / "results" / "generator-all-0-50.json"
    with pytest.raises(ValueError, match="generator-all-1 has no checkpoint of step 50: expected some of its"):
        program.parse_config(program.Config, other.programs[1][1:])
    assert "--control" not in other.programs[1] and other.seconds < first.seconds


def test_generators_are_measured_again_with_decoders_that_were_trained_further(understanding, tmp_path):
    settings = fashion_settings(tmp_path) | {"output_dir": str(tmp_path), "tokenizers": ["all"], "seeds": [0, 1]}
    plan = understanding.Plan(understanding.Config(**settings), Path(settings["data"]))
    tasks = {task.name: task for task in plan.chain(["all"])}
    decoder, again = tasks["decoder-all"], tasks["generator-all_decoder-1"]
    assert decoder.needs == ("tokenizer-all",) and again.needs == ("decoder-all", "generator-all-1")
    words = again.programs[0]
    assert option(words, "--run") == f"{tmp_path}/generator-all-1", "the same generator"
    assert option(words, "--vae") == f"{option(decoder.programs[0], '--output_dir')}/vae"
    first = tasks["generator-all_decoder-0"].programs[0]
    assert "--picture" in first and "--picture" not in words
    assert first[first.index("--steps") + 1 :][:2] == ["500", "1500"] and option(words, "--steps") == "1500"


def test_the_generator_may_have_another_optimiser_and_rate(understanding, tmp_path):
    config = understanding.Config(output_dir=str(tmp_path), optimizer="muon", learning_rate=8e-3)
    words, usual = (
        understanding.Plan(c, None).generator("all", 0).programs[0]
        for c in (config, understanding.Config(output_dir=str(tmp_path)))
    )
    assert (option(words, "--optimizer"), option(words, "--learning_rate")) == ("muon", "0.008")
    assert not {"--optimizer", "--learning_rate"} & set(usual)


def test_tasks_that_share_a_gpu_take_longer(understanding, tmp_path):
    plans = [
        understanding.Plan(understanding.Config(output_dir=str(tmp_path), gpus=[0, 1], together=k), None)
        for k in (1, 2)
    ]
    for alone, shared in zip(*(plan.tasks() for plan in plans), strict=True):
        assert shared.seconds == 2 * alone.seconds > 0 and alone.one_process == (len(alone.programs) > 1)


def test_the_programs_take_these_words(understanding, tmp_path):
    """Of both scales and both sets of images: names and values of options."""
    for settings in ({}, {"smallest": True}, fashion_settings(tmp_path)):
        config = understanding.Config(**settings | {"output_dir": str(tmp_path)})
        plan = understanding.Plan(config, config.data and Path(config.data))
        programs = [words for name in ("all", "reconstruction") for words in plan.tokenizer(name).programs]
        programs += plan.second_stage("all").programs if config.decoder else ()
        for words in [*programs, plan.generator("all", 0).programs[0]]:
            program = load(words[0])
            given = program.parse_config(settings_class(program), words[1:])
            assert getattr(given, "output_dir", None) or given.output.startswith(str(plan.folder))


def test_the_commands_of_the_pages_are_taken(tmp_path, monkeypatch):
    commands = load("docs/check_commands.py").commands
    pages = (ROOT / UNDERSTANDING / page for page in ("details.md", "README.md"))
    found = [words for page in pages for words in commands(page) if words[0] == "python"]
    (tmp_path / "runs" / "copies-all").mkdir(parents=True)
    (tmp_path / "runs" / "copies-all" / "model_index.json").touch()
    for name in ("runs/emoji.tar", "runs/fashion", option(found[0], "--noto"), option(found[0], "--fluent")):
        (tmp_path / name).touch()
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    emoji, fashion = "data run run run table run table generation", "train linear_probe table run fashion run table"
    assert " ".join(Path(words[1]).stem for words in found) == f"{emoji} {fashion} run table"
    for words in found:
        program = load(words[1])
        program.parse_config(settings_class(program), words[2:])


def test_smallest_is_small_whatever_else_is_said(understanding):
    config = understanding.Config(smallest=True, num_images=5000, decoder="fashion_decoder.yaml")
    assert (config.num_images, config.tokenizers, config.decoder) == (100, ["reconstruction", "all"], None)
    assert config.folder == Path("runs/understanding-smallest") != understanding.Config().folder
    with pytest.raises(ValueError, match="tokenizers are none, expected some of reconstruction"):
        understanding.Config(tokenizers=["none"])
    with pytest.raises(ValueError, match="data nowhere is not there"):
        understanding.Config(data="nowhere")


def test_the_first_samples_are_the_picture():
    program = load(f"{UNDERSTANDING}/measure.py")

    class Samples:
        def __len__(self):
            return 70

        def read(self, numbers):
            return torch.stack([torch.full((3, 8, 8), number, dtype=torch.uint8) for number in numbers])

    picture = program.samples_picture(Samples())
    assert picture.size == (16 * 48, 4 * 48)
    assert [picture.getpixel((x, y))[0] for x, y in ((10, 10), (60, 10), (760, 190))] == [0, 1, 63]


def test_a_generator_and_its_control_are_measured_against_one_reference(tmp_path):
    program, run = load(f"{UNDERSTANDING}/measure.py"), tmp_path / "run"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 1}
    both = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()}
    vae = AutoencoderVTP(sample_size=16, patch_size=8, latent_channels=4, **both)
    kinds = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16, "num_classes": 2}
    names = {0: "a", 1: "b"}
    for step in (1, 2):
        dit = LightningDiTTransformer2DModel(sample_size=2, patch_size=1, in_channels=4, **kinds)
        dit.save_pretrained(run / f"checkpoint-{step}" / "transformer_ema")
    scheduler = FlowMatchEulerDiscreteScheduler()
    LightningDiTPipeline(vae=vae, transformer=dit, scheduler=scheduler, id2label=names).save_pretrained(
        run / "pipeline"
    )
    vae.save_pretrained(tmp_path / "random")
    for k in range(20):
        (tmp_path / "images" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / "ab"[k % 2] / f"{k}.png")
    words = f"--run {run} --steps 1 2 --reference {tmp_path}/images --feature_network vtp:{tmp_path}/random --control"
    words += f" --num_images 12 --num_inference_steps 1 --output {tmp_path}/g --picture {tmp_path}/g.png --device cpu"
    program.main(words.split())
    first, last = (json.loads((tmp_path / f"g-{step}.json").read_text()) for step in (1, 2))
    rows = {step: {r["images"]: r["value"] for r in found["distances"]} for step, found in ((1, first), (2, last))}
    assert sorted(rows[1]) == ["control", "generated"] and list(rows[2]) == ["generated"]
    assert len({*rows[1].values(), *rows[2].values()}) == 3, "three networks"
    decoded = {r["images"]: r["value"] for r in first["distances_to_reconstructions"]}
    assert sorted(decoded) == ["control", "generated"] and decoded["generated"] != rows[1]["generated"]
    assert first["sampling"]["generated"]["weights"] != last["sampling"]["generated"]["weights"]
    assert first["sampling"]["generated"]["labels"] == "reference" and (tmp_path / "g.png").is_file()
    table = load(f"{UNDERSTANDING}/table.py")
    for title in ("FD-VTP-32", "FD-VTP-32 to reconstructions"):
        assert set(table.read_generator(tmp_path / "g-1.json")[title]) == {"generated", "control", "real"}
    with torch.no_grad():
        vae.decoder.proj_out.weight.mul_(0.5)
    vae.save_pretrained(tmp_path / "decoder")
    program.main([*words.replace("/g ", "/h ").split(), "--vae", str(tmp_path / "decoder")])
    assert json.loads((tmp_path / "h-2.json").read_text())["distances"][0]["value"] != rows[2]["generated"]
    with torch.no_grad():
        next(vae.encoder.parameters()).add_(0.5)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other makes other latents than the autoencoder of"):
        program.main([*words.split(), "--vae", str(tmp_path / "other")])


def test_half_of_the_training_concepts_and_all_held_out_ones(understanding, tmp_path):
    bases = [f"{code:X}" for code in range(0x1F300, 0x1F300 + 400)]
    folder = tmp_path / "images" / "openmoji-17.0.0-8"
    folder.mkdir(parents=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"base": base}) + "\n" for base in bases))
    config = understanding.Config(output_dir=str(tmp_path), resolution=8, tokenizers=["all_half"])
    understanding.write_fewer(tmp_path / "images", tmp_path / "half", 0.5, resolution=8)
    kept = {row["base"] for row in read_metadata(tmp_path / "half" / folder.name)}
    held_out = {base for base in bases if is_held_out(base, 0.1, 0)}
    assert held_out < kept and abs(len(kept - held_out) / len(set(bases) - held_out) - 0.5) < 0.1
    tasks = understanding.Plan(config, tmp_path / "images").tasks()
    folders = [option(words, "--data.cache_dir") for words in tasks[0].programs]
    assert folders == [str(tmp_path / "half")] + [str(tmp_path / "images")] * 3, "measured and encoded are all"


def test_images_come_from_the_archive_once(understanding, tmp_path):
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "emoji.tar", "w") as archive:
        archive.add(tmp_path / "x", "openmoji/x")
    config = understanding.Config(data=str(tmp_path / "emoji.tar"), output_dir=str(tmp_path))
    images = understanding.open_data(config.data, tmp_path)
    assert (images / "openmoji" / "x").read_text() == "x"
    (images / "openmoji" / "x").write_text("kept")
    assert (understanding.open_data(config.data, tmp_path) / "openmoji" / "x").read_text() == "kept"
    assert understanding.open_data(str(images), tmp_path) == images


def test_three_styles_of_a_concept_share_its_base(tmp_path, monkeypatch):
    program = load(f"{UNDERSTANDING}/data.py")
    rendered = tmp_path / "rendered"
    (rendered / "images").mkdir(parents=True)
    row = {"file_name": "images/2764.webp", "key": "2764", "base": "2764", "caption": "red heart", "skin_tone": False}
    row["subcategory"] = "heart"
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
    words = [*words[:2], f"--output={tmp_path}/styles", "--resolution=8", "--style_in_class", "--openmoji_weight=2.5"]
    program.main(words)
    dataset = open_dataset(DataConfig(source="openmoji", resolution=8, cache_dir=str(tmp_path / "styles")), "train")
    assert dataset.label_names == ["heart", "heart-fluent", "heart-noto"] and list(dataset.labels) == [0, 2, 1]
    assert dataset.weights.tolist() == [2.5, 1, 1]
    assert not dataset.variants.any(), "a weight makes no variants of the others: all stay in a reference"
    config = DataConfig(source="openmoji", resolution=8, cache_dir=str(tmp_path / "out"))
    plain = open_dataset(config, "train")
    assert plain.fingerprint == dataset.fingerprint, "distances can be compared"
    assert plain.training_fingerprint != dataset.training_fingerprint, "a run does not go on with other weights"
    assert plain.training_fingerprint == open_dataset(config, "train").training_fingerprint
    next((folder / "images").glob("noto-*")).write_bytes(picture.getvalue())
    assert plain.training_fingerprint != open_dataset(config, "train").training_fingerprint, "nor with other pixels"


def write_generator(folder, name, seed, step, value):
    row = {"distance": "FD-VGG", "images": "generated", "value": 9.0, "floor": {"generated": value, "real": 1.0}}
    scores = [{"score": "recall (VGG)", "images": "generated", "value": 0.25}]
    scores += [{"score": "recall (VTP-192)", "images": "generated", "value": 0.5}]
    results = {"distances": [row], "scores": scores}
    (folder / f"generator-{name}-{seed}-{step}.json").write_text(json.dumps(results))


def write_tokenizer(folder, name, **reconstruction):
    nearest = [{"features": "both", "neighbours": 20, "top1": 0.1}]
    nearest += [{"features": "class token", "neighbours": k, "top1": k / 100} for k in (10, 20)]
    (folder / f"tokenizer-{name}.json").write_text(json.dumps({"held_out": {"recall_at_1": 0.5}}))
    (folder / f"probe-{name}.json").write_text(json.dumps({"neighbours": nearest}))
    (folder / f"reconstruction-{name}.json").write_text(json.dumps(reconstruction))


def elements(file: Path, tag: str) -> list[ElementTree.Element]:
    return ElementTree.parse(file).findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def test_the_table_has_means_over_seeds_and_dashes(tmp_path):
    program = load(f"{UNDERSTANDING}/table.py")
    write_tokenizer(tmp_path, "all", distances={"FD-EffLite0": 5.0})
    for seed, value in ((0, 2.0), (1, 4.0)):
        write_generator(tmp_path, "all", seed, 20, value)
    log = [{"step": 10, "loss": 0.9}, {"step": 20, "loss": 0.5}, {"step": 20, "seconds": 1.0}]
    (tmp_path / "generator-all-0.jsonl").write_text("\n".join(map(json.dumps, log)))
    program.main([f"--results={tmp_path}", f"--output={tmp_path}/out/table.json"])
    found = json.loads((tmp_path / "out" / "table.json").read_text())["tokenizers"]["all"]
    names = "20-NN", "retrieval@1", "FD-EffLite0 of reconstructions", "PSNR"
    assert [found["tokenizer"][name] for name in names] == [0.2, 0.5, 5.0, None]
    assert found["generators"]["FD-VGG"]["20"]["mean"] == 3.0
    written = (tmp_path / "out" / "table.md").read_text()
    assert "| all three objectives | 3 ± 1.414 | 0.25 ± 0 | 0.5 |\n| real against real images | 1 | – | – |" in written
    assert len(elements(tmp_path / "out" / "table.svg", "circle")) == 2, "a seed each"
    words = [element.text for element in elements(tmp_path / "out" / "table.svg", "text")]
    assert {"FD-VGG (LPIPS trains on it)", "training steps of the generator", "real against real images", "20"} < set(
        words
    )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["table.json", "table.md", "table.svg"]
    with pytest.raises(ValueError, match="holds no tokenizer-NAME.json"):
        program.main([f"--results={tmp_path}/out", f"--output={tmp_path}/out/table.json"])


def test_scaling_is_drawn_where_two_points_are_measured(tmp_path):
    program = load(f"{UNDERSTANDING}/table.py")
    for place, name in enumerate(("reconstruction", "reconstruction_small", "all", "all_half")):
        write_tokenizer(tmp_path, name, psnr=20.0 + place)
        write_generator(tmp_path, name, 0, 20, 10.0 + place)
    write_tokenizer(tmp_path, "all_tenth", psnr=19.0)
    write_generator(tmp_path, "all_tenth", 0, 20, 15.0)
    write_generator(tmp_path, "all", 0, 40, 1.0)  # not measured of the others: no common step
    table = program.collect(tmp_path)
    panels = program.scaling_panels(table)
    assert [(panel.x_label, [curve.points for curve in panel.curves]) for panel in panels] == [
        ("width of the encoder, %", [[(50, 11.0), (100, 10.0)]]),
        ("share of the training data, %", [[(10, 15.0), (50, 13.0), (100, 12.0)]]),
    ]
    assert (panels[0].title, panels[0].y_label) == ("FD-VGG", "distance at step 20")
    program.write_figures(table, tmp_path, tmp_path / "table.json", 4)
    words = {element.text for element in elements(tmp_path / "table-tokenizers.svg", "text")}
    assert {"reconstruction", "all three objectives"} < words and "all three, half the data" not in words


def test_a_table_goes_on_from_what_is_known(tmp_path):
    program = load(f"{UNDERSTANDING}/table.py")
    for folder, name, distance in (("old", "all", 12.0), ("old", "contrastive", 9.0), ("new", "all", 10.0)):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_tokenizer(tmp_path / folder, name, psnr=20.0)
        write_generator(tmp_path / folder, name, 0, 20, distance)
    files = {folder: tmp_path / f"{folder}.json" for folder in ("old", "new")}
    program.main([f"--results={tmp_path}/old", f"--output={files['old']}"])
    program.main([f"--results={tmp_path}/new", f"--output={files['new']}", f"--known={files['old']}"])
    program.main([f"--output={tmp_path}/again.json", f"--known={files['new']}"])  # draws what is known
    assert (tmp_path / "again.json").read_text() == Path(files["new"]).read_text()
    assert (tmp_path / "again.svg").read_text() == Path(files["new"]).with_suffix(".svg").read_text()
    with pytest.raises(ValueError, match="neither results nor known"):
        program.main([f"--output={tmp_path}/again.json"])
    table = program.read_known(files["new"])
    found = {name: row["generators"]["FD-VGG"][20]["mean"] for name, row in table.items()}
    assert list(found.items()) == [("contrastive", 9.0), ("all", 10.0)]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json holds no tokenizers"):
        program.read_known(tmp_path / "other.json")


def test_samples_of_all_generators_stand_row_by_row(tmp_path):
    program = load(f"{UNDERSTANDING}/table.py")
    assert program.samples_picture(tmp_path, 4) is None
    for name, step, colour in (("all", 90, "red"), ("all", 100, "lime"), ("reconstruction", 100, "blue")):
        Image.new("RGB", (768, 192), colour).save(tmp_path / f"generator-{name}-0-{step}.png")
    assert program.samples_picture(tmp_path, 1).size == (program.LABEL + 768, 2 * 48)
    picture = program.samples_picture(tmp_path, 4).convert("RGB")
    assert picture.size == (program.LABEL + 768, 4 * 2 * 48 + 3 * 12)
    assert [picture.getpixel((900, y)) for y in (24, 72, 102)] == [(0, 0, 255), (0, 255, 0), (255, 255, 255)]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (3.9, 17.2), (95.0, 1300.0), (0.448, 0.452), (2.0, 2.0)])
def test_axes_have_round_numbers(low, high):
    found = load(f"{UNDERSTANDING}/drawing.py").ticks(low, high)
    assert len(found) in range(3, 9) or low == high
    assert all(low - 1e-9 <= value <= high + 1e-9 and len(f"{value:g}") <= 5 for value in found)
