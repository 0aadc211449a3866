"""What a user gives the programs by mistake: one row a case, in this process. Each ends with one message, status 2."""

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchLCMScheduler
from test_pipeline_lightning_dit import tiny_pipeline, tiny_transformer
from test_report import files, generation  # noqa: F401

from vtp_diffusion.data.image_datasets import sorted_names
from vtp_diffusion.data.imagenet import imagenet_indices, names_of_wnids
from vtp_diffusion.evaluation.one_pass import Record, Wanted
from vtp_diffusion.evaluation.report_page import markdown_text
from vtp_diffusion.generation.export import export_pipeline
from vtp_diffusion.generation.sample_files import SampleFolder, SampleNpz
from vtp_diffusion.generation.sampling import labels_by_name, sample_numbers
from vtp_diffusion.generation.transformer_config import ModelConfig, build_transformer
from vtp_diffusion.metrics import scores
from vtp_diffusion.metrics.zero_shot import imagenet_prompts
from vtp_diffusion.runtime.cli import run

ROOT = Path(__file__).parents[2]


def main_of(program):
    spec = importlib.util.spec_from_file_location("program_" + Path(program).stem, ROOT / program)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def ends(capsys, tmp_path, monkeypatch):
    """Calls the program and gives its status and what it printed last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VTP_DIFFUSION_TRACEBACK", raising=False)

    def call(program, *words):
        main = main_of(program) if isinstance(program, str) else program
        with pytest.raises(SystemExit) as end:
            run(lambda: main([str(word) for word in words]))
        return end.value.code, capsys.readouterr().err

    return call


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


GENERATE = ("pipelines/generate.py", "--pipeline", "saved", "--output", "out")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("transformer/config.json", {"num_layers": "2"}, "does not fit LightningDiTTransformer2DModel"),
        ("transformer/config.json", {"num_attention_heads": 0}, "saved cannot be loaded"),
        ("transformer/config.json", {"class_dropout_prob": None}, "does not fit LightningDiTTransformer2DModel"),
        ("transformer/config.json", {"sample_size": [4]}, "does not fit LightningDiTTransformer2DModel"),
        ("transformer/config.json", {"num_layers": -1}, "does not fit LightningDiTTransformer2DModel"),
        ("vae/config.json", {"patch_size": 0}, "saved cannot be loaded (ValueError"),
        ("vae/config.json", {"latents_std": "1"}, "saved cannot be loaded"),
        ("scheduler/scheduler_config.json", {"shift": "2"}, "saved cannot be loaded (TypeError"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("model_index.json", {"id2label": ["cat"]}, "id2label is a list"),
        ("model_index.json", {"id2label": {"0": 1}}, "id2label names class 0 1"),
        ("model_index.json", {"transformer": 3}, "saved cannot be loaded"),
    ],
)
def test_settings_of_a_saved_pipeline(ends, folder, file, values, message):
    change(folder / file, **values)
    code, printed = ends(*GENERATE, "--labels", 0)
    assert code == 2 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--labels", "0", "--seed", 10**30),
            "seed is 1000000000000000000000000000000, expected int of at most 4611686018427387904 in size",
        ),
        (("--labels", "0", "--guidance_scale", "1" + "0" * 400), "guidance_scale"),
        (
            ("--labels", "0", "--num_images_per_label", 10**400),
            "(401 characters), expected int of at most 4611686018427387904 in size",
        ),
        (("--labels", "7"), "class index 7 does not exist: expected 0 to 2"),
        (("--labels", "index=x"), "unknown label 'index=x'"),
        (("--labels", "0", "--guidance", "internal"), "guidance is 'internal', expected auto, classifier_free"),
        (("--labels", "0", "--guidance", "autoguidance"), "autoguidance takes a guidance_transformer"),
        (("--labels", "0", "--guidance", "classifier_free"), "with guidance_scale 1, which is no guidance"),
        (("--labels", "0", "--guidance_interval", 0, 0.5), "guidance_interval is (0.0, 0.5) with guidance_scale 1"),
        (("--labels", "0", "--guidance_channels", 3), "guidance_channels is 3 with guidance_scale 1"),
        (("--labels", "0", "--output", "saved/vae/config.json/a.png"), "output saved/vae/config.json/a.png cannot be"),
        (("--labels", "0", "--tolerance", 0.1), "tolerance is 0.1, but only solver dopri5 has one"),
        (("--labels", "0", "--label_rule", "balanced"), "label_rule is balanced, but labels are given"),
    ],
)
def test_options_of_generate(ends, folder, words, message):
    code, printed = ends(*GENERATE, *words)
    assert code == 2 and message in printed and not Path("out").exists()


def test_a_name_that_is_a_number_is_one_rule(ends, tmp_path):
    tiny_pipeline(id2label={0: "0", 1: "10", 2: "1"}).save_pretrained(tmp_path / "saved")
    code, printed = ends(*GENERATE, "--labels", 1)
    assert code == 2 and "'1' may mean several classes: expected index=1 or index=2" in printed
    main_of(GENERATE[0])([*GENERATE[1:], "--labels", "10", "index=2", "--num_inference_steps", "1"])
    assert json.loads((tmp_path / "out/settings.json").read_text())["label_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["dog", "cat"], [0, 1, 0], [1, 0, 1]),
        (["bird", "golden retriever, dog"], [1, 0], [1, 2]),
        (["golden retriever"], [0], [1]),
        (["0", "1", "2"], [2, 0], [2, 0]),  # no names: numbers
        (["cat", "lizard"], [0, 0], [0, 0]),
        (["cat", "lizard"], [0, 1], "1 classes of the reference match none.* the first is 'lizard'"),
        (["cat, dog"], [0], "the first is 'cat, dog'"),
    ],
)
def test_labels_of_a_reference_are_compared_by_name(names, labels, expected):
    if isinstance(expected, list):
        assert labels_by_name(tiny_pipeline(), labels, names) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            labels_by_name(tiny_pipeline(), labels, names)


def test_noise_that_a_scheduler_adds_is_keyed_by_the_image():
    pipe = tiny_pipeline(scheduler=FlowMatchLCMScheduler())
    labels, settings = [0, 1, 2], {"num_inference_steps": 3}
    together = sample_numbers(pipe, labels, [0, 1, 2], 5, **settings).int()
    alone = torch.cat([sample_numbers(pipe, labels, [k], 5, **settings) for k in range(3)]).int()
    assert (together - alone).abs().max() <= 1 and (together[0] - together[1]).abs().max() > 1


@pytest.mark.parametrize("kind", [SampleFolder, SampleNpz])
def test_a_second_run_on_one_output_is_refused(tmp_path, kind):
    images = kind(tmp_path / "out.npz", {"num_images": 2})
    with images.locked():
        child = os.fork()
        if child == 0:
            try:
                with kind(tmp_path / "out.npz", {"num_images": 2}).locked():
                    os._exit(1)
            except ValueError as error:
                os._exit(0 if f"in use by process {os.getppid()} on {socket.gethostname()}" in str(error) else 2)
        assert os.waitpid(child, 0)[1] == 0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    images = SampleFolder(tmp_path / "out", {"num_images": 2})
    with images.locked():
        images.write(0, torch.zeros(3, 8, 8, dtype=torch.uint8))
        monkeypatch.setattr("PIL.Image.Image.save", full)
        with pytest.raises(OSError, match="000001.png could not be written: .*No space.* the same command"):
            images.write(1, torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_ctrl_c_is_one_line(ends):
    def main(argv):
        raise KeyboardInterrupt

    code, printed = ends(main)
    assert code == 130 and printed.startswith("\ninterrupted (VTP") and "Traceback" not in printed


def plant(folder, where):
    """A module that a loader with trust_remote_code would run."""
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / where).write_text("raise SystemExit('planted code ran')\n")


@pytest.mark.parametrize(
    "where", ["helper.py", "vae/autoencoder.py", "scheduler/scheduler.py", "extra/x.py", "vae/w.bin"]
)
def test_export_copies_nothing_that_could_run(folder, tmp_path, where):
    plant(folder, where)
    (folder / "README.md").write_text("card")
    main_of("pipelines/export.py")(["--pipeline", str(folder), "--output", str(tmp_path / "exported")])
    exported = {str(path.relative_to(tmp_path / "exported")) for path in (tmp_path / "exported").rglob("*.*")}
    weights = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("vae", "transformer")}
    configs = {"vae/config.json", "transformer/config.json", "scheduler/scheduler_config.json"}
    assert exported == weights | configs | {"README.md", "model_index.json", "pipeline.py"}


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"vae": ["autoencoder", "AutoencoderVTP"]}, "autoencoder"),
        ("model_index.json", {"vae": ["vtp_diffusion", "Other"]}, "Other"),
        ("model_index.json", {"scheduler": ["os", "system"]}, "system"),
        ("model_index.json", {"scheduler": ["diffusers", "NoSuchScheduler"]}, "NoSuchScheduler"),
        ("model_index.json", {"scheduler": ["diffusers", "utils"]}, "utils"),
        ("model_index.json", {"safety_checker": ["diffusers", "AutoencoderKL"]}, "safety_checker"),
        ("model_index.json", {"_class_name": ["pipeline", "LightningDiTPipeline"]}, "says"),
        ("vae/config.json", {"auto_map": {"AutoModel": "vae.X"}}, "auto_map"),
    ],
)
def test_export_refuses_foreign_code(ends, folder, file, values, message):
    plant(folder, "vae/autoencoder.py")
    change(folder / file, **values)
    code, printed = ends("pipelines/export.py", "--pipeline", folder, "--output", "exported")
    assert code == 2 and message in printed and not Path("exported").exists()


def test_export_refuses_a_foreign_component_in_memory(tmp_path):
    class Mine(type(tiny_pipeline().scheduler)):
        pass

    with pytest.raises(ValueError, match="scheduler: .*'Mine'.*code of other packages is not exported"):
        export_pipeline(tiny_pipeline(scheduler=Mine()), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["distances"][0].update(value="12"),
            "guidance-1.json is an incomplete generation result",
        ),
        (lambda r: r["distances"][0]["floor"].update(real=None), "guidance-1.json is an incomplete"),
        (lambda r: r["distances"][0].pop("num_reference"), "guidance-1.json is an incomplete"),
        (lambda r: r["distances"][0].update(value=10**400), "is no number that can be shown"),
        (lambda r: r["distances"][0].update(value=float("nan")), "NaN is no number that can be shown"),
        (lambda r: r["distances"][0].update(value=1e305), "1e+305 is no number that can be shown"),
        (lambda r: r["sampling"]["generated"].update(guidance_scale="high"), "guidance-1.json is an incomplete"),
        (lambda r: r["settings"].update(nearest_neighbours=5), "guidance-1.json is an incomplete"),
        (lambda r: r.update(settings=[]), "guidance-1.json is an incomplete"),
    ],
)
def test_results_that_cannot_be_shown(ends, files, change, message):  # noqa: F811
    result = generation(1.0, 30.0)
    change(result)
    Path("guidance-1.json").write_text(json.dumps(result))
    code, printed = ends("eval/report.py", "--results", *files, "--output", "page.html")
    assert code == 2 and message in printed and not Path("page.html").exists()


@pytest.mark.parametrize("value", [1e300, 1e-300, 0.0, -1.0])
def test_charts_of_any_number_end(ends, files, value):  # noqa: F811
    for guidance in (1.0, 4.0):
        Path(f"guidance-{guidance:g}.json").write_text(json.dumps(generation(guidance, value, floor=False)))
    main_of("eval/report.py")(["--results", *files[:2], "--output", "page.html"])
    assert "<polyline" in Path("page.html").read_text()


def test_a_full_disk_keeps_the_page_that_was_there(ends, files, monkeypatch):  # noqa: F811
    Path("page.html").write_text("good")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, printed = ends("eval/report.py", "--results", *files, "--output", "page.html")
    assert code == 2 and "page.html could not be written: [Errno 28] No space left on device" in printed
    assert Path("page.html").read_text() == "good"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("![x](https://a.b/c)", r"!\[x\](https:\//a.b/c)"),
        ("a | b", r"a \| b"),
        ("a\n\n# b `c`", r"a \# b \`c\`"),
        ("*a* _b_ ~c~ &lt; \\", r"\*a\* \_b\_ \~c\~ \&lt; " + "\\\\"),
        ("www.a.b", r"www\.a.b"),
        ("efficientnet_lite0 12 ± 0.5", "efficientnet_lite0 12 ± 0.5"),
    ],
)
def test_markdown_of_a_report_holds_no_markup(text, escaped):
    assert markdown_text(text) == escaped


def test_a_pipeline_that_cannot_sample_is_not_saved_over(folder):
    DDIMScheduler().save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(ValueError, match="scheduler is DDIMScheduler.*expected FlowMatchEulerDiscreteScheduler"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["n02012849", "n03126707"], {0: "crane, n02012849", 1: "crane, n03126707"}),
        ({"2": "n02099601"}, {"2": "golden retriever, n02099601"}),
        (["n02099601", "cat"], {0: "n02099601", 1: "cat"}),
        (["n99999999"], "n99999999 is not a class of ImageNet"),
        ([["cat"]], "must hold texts"),
        ("cat", "must hold texts"),
    ],
)
def test_names_for_a_pipeline(tmp_path, names, expected):
    (tmp_path / "names.json").write_text(json.dumps(names))
    read_names = main_of("pipelines/convert.py").__globals__["read_names"]
    if isinstance(expected, dict):
        assert read_names(str(tmp_path / "names.json")) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            read_names(str(tmp_path / "names.json"))


def test_imagenet_has_a_name_for_each_class():
    names = names_of_wnids()
    assert len(set(names)) == 1000 and names[207] == "golden retriever, n02099601"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda known: [name.split(",")[0] for name in known], range(1000)),  # two of them are "crane"
        (lambda known: list(map(str, range(1000))), range(1000)),
        (lambda known: ["n02099601", "Great_White-Shark"], [207, 2]),
        (lambda known: ["cat", "dog"], "'cat', one of 2 classes, is not one of ImageNet's"),
        (lambda known: ["crane", "tench"], "'crane', one of 2"),
        (lambda known: ["tench", "n01440764"], "'tench', one of 2 .* each once"),
        (lambda known: ["mine", *known[1:]][::-1], "'mine', one of 1000 .* in ImageNet's order"),
    ],
)
def test_classes_are_imagenets_by_name(change, expected):
    names = change(names_of_wnids())
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            imagenet_indices(names, imagenet_prompts()[0])
    else:
        assert imagenet_indices(names, imagenet_prompts()[0]) == list(expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [({"10", "2", "1"}, ["1", "2", "10"]), ({"b10", "b2", "10"}, ["10", "b10", "b2"]), ({"02", "1"}, ["1", "02"])],
)
def test_numbers_are_sorted_as_numbers(names, expected):
    assert sorted_names(names) == expected


def test_a_generator_is_tuned_to_other_classes(tmp_path, capsys):
    before = tiny_transformer()
    before.save_pretrained(tmp_path / "released")
    config = ModelConfig(num_layers=2, num_attention_heads=2, attention_head_dim=8)
    after = build_transformer(config, (4, 4, 4), 5, 0.2, str(tmp_path / "released"))
    assert "released: 3 classes are replaced by 5 others" in capsys.readouterr().out
    assert after.config.num_classes == 5 and after.class_embed.weight.shape == (6, 16)
    build_transformer(config, (4, 4, 4), 3, 0.2, str(tmp_path / "released"))
    assert "released: its 3 classes are kept, each by its index" in capsys.readouterr().out
    old, new = before.state_dict(), after.state_dict()
    assert torch.equal(new.pop("class_embed.weight")[-1], old.pop("class_embed.weight")[-1])
    assert all(torch.equal(value, old[name]) for name, value in new.items())


def test_what_a_measurement_holds_is_the_features_alone(monkeypatch):
    record = Record(3, 1000, Wanted(0, None), 0, "cpu")
    block = record._rows.data_ptr()
    for start in range(0, 1000, 10):
        record.add(range(start, start + 10), torch.full((10, 3), float(start)))
    record.gather()
    assert record.features.data_ptr() == block and record.features[995].tolist() == [990.0] * 3
    monkeypatch.setattr(scores, "LARGEST_PRODUCT", 1000)  # ten rows of a hundred at once
    generated, reference = torch.randn(100, 3), torch.randn(90, 3)
    assert scores.precision_recall(generated, reference) == scores.precision_recall(generated, reference, chunk=10)
