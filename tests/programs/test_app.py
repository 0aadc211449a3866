"""The page of pipelines/app.py: what it computes, without gradio; where gradio is installed, the page itself."""

import html
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_distillation import student_pipeline
from test_pipelines import load, pipeline_folder  # noqa: F401

from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.generation.sampling import open_pipeline, sample_numbers

SAMPLER = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 2.0, "solver": "unipc"}


@pytest.fixture(scope="module")
def app():
    return load("app.py")


@pytest.fixture(scope="module")
def page(app, pipeline_folder):  # noqa: F811
    return app.Page(app.AppConfig(pipeline=[str(pipeline_folder)], device="cpu"))


def test_images_are_those_of_the_seed_and_their_number(page, pipeline_folder):  # noqa: F811
    folder = str(pipeline_folder)
    pictures, nearest = page.generate(folder, ["cat", "2"], 2, **SAMPLER)
    assert [caption for _, caption in pictures] == ["cat", "cat", "bird", "bird"] and nearest == []
    config = SamplerConfig(**SAMPLER)
    expected = sample_numbers(open_pipeline(folder, config, "cpu"), [0, 0, 2, 2], range(4), 3, **config.sampler)
    found = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1)[:, ::3, ::3] for p, _ in pictures])
    assert torch.equal(found, expected)  # enlarged from 32 to 96 pixels
    page.generate(folder, ["cat"], 1, **SAMPLER | {"solver": "pipeline"})
    assert type(page.pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler", "unipc is not kept"


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (["cats"], {}, "unknown label 'cats'"),
        ([], {}, "class_labels is empty"),
        (["cat"] * 65, {}, "65 classes with 1 images each, expected 1 to 64 images"),
        (["cat"], {"seed": None}, "seed is None, expected int"),
        (["cat"], {"num_inference_steps": 0}, "num_inference_steps is 0, expected a positive number"),
        (["cat"], {"solver": "magic"}, "solver is 'magic', expected one of"),
    ],
)
def test_what_does_not_fit_is_one_message(page, labels, changes, message):
    with pytest.raises(ValueError, match=message):
        page.generate(page.folder, labels, 1, **SAMPLER | changes)


def test_the_inputs_begin_with_what_a_pipeline_can_do(app, page, pipeline_folder, tmp_path):  # noqa: F811
    assert page.settings(str(pipeline_folder)) == (15, 4.0, "unipc", ["auto", "classifier_free"])
    student_pipeline().save_pretrained(tmp_path)
    of_student = app.Page(app.AppConfig(pipeline=[str(tmp_path)], device="cpu"))
    steps, scale, solver, kinds = of_student.settings(str(tmp_path))
    given = {"num_inference_steps": steps, "guidance_scale": scale, "solver": solver, "guidance": kinds[0]}
    assert steps == 4 and len(of_student.generate(str(tmp_path), ["0"], 1, **given)[0]) == 1
    with pytest.raises(ValueError, match="num_inference_steps is 15, expected one that this student learned"):
        of_student.generate(str(tmp_path), ["0"], 1, **given | {"num_inference_steps": 15})


def test_a_picture_comes_back_beside_its_crop(page, tmp_path):
    Image.new("RGB", (90, 70), "red").save(tmp_path / "red.png")
    (given, first), (made, second) = page.reconstruct(page.folder, str(tmp_path / "red.png"))
    assert given.size == made.size == (96, 96) and given.getpixel((0, 0)) == (255, 0, 0)
    assert first == "original, 32 x 32" and second.endswith(" dB")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for file, message in ((None, "choose one first"), (str(tmp_path / "broken.png"), "^broken.png cannot be read")):
        with pytest.raises(ValueError, match=message):
            page.reconstruct(page.folder, file)


def test_folders_that_hold_no_pipeline_are_refused(app, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no model_index.json"):
        app.Page(app.AppConfig(pipeline=[str(tmp_path)], device="cpu"))
    with pytest.raises(ValueError, match="port is 70000"):
        app.AppConfig(port=70000)


def test_the_page_as_a_browser_calls_it(app, page):
    gradio = pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    blocks = app.build_page(page)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    try:
        caller = client.Client(address, verbose=False, analytics_enabled=False)
        images, nearest = caller.predict(page.folder, ["cat"], 2, 0, 2, 1.0, "euler", api_name="/generate")
        assert [image["caption"] for image in images] == ["cat", "cat"] and nearest == []
        with pytest.raises(Exception, match=html.escape("unknown label '<cats>'")):
            caller.predict(page.folder, ["<cats>"], 2, 0, 2, 1.0, "euler", api_name="/generate")
        with pytest.raises(Exception, match="choose one first"):
            caller.predict(page.folder, None, api_name="/reconstruct")
        classes, steps, *_, kinds = caller.predict(page.folder, api_name="/of_pipeline")
        assert steps == 15 and [kind for kind, _ in kinds["choices"]] == ["auto", "classifier_free"]
        assert [name for name, _ in classes["choices"]] == ["cat", "golden retriever", "bird"]
    finally:
        blocks.close()
    assert gradio.__version__.startswith("6.")


def test_the_page_in_a_browser(app, page):
    """Debian's chromium, at the width of a desktop and of a phone: images appear, nothing is cut, nothing is fetched
    from elsewhere, and a message is shown."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("there is no chromium")
    blocks = app.build_page(page)
    _, address, _ = blocks.launch(prevent_thread_lock=True, **app.appearance())
    asked = []
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for width in (1280, 390):
                tab = browser.new_page(viewport={"width": width, "height": 800})
                tab.on("request", lambda request: asked.append(request.url))
                tab.goto(address)
                tab.get_by_label("number input for Steps").fill("2")
                tab.get_by_role("button", name="Generate").click()
                tab.wait_for_selector(".grid-container img")
                assert tab.evaluate("document.documentElement.scrollWidth") == width
                captions = tab.locator(".caption-label")
                assert captions.count() == 8 and "golden retriever" in captions.all_inner_texts()
                assert captions.evaluate_all("all => all.every(one => one.scrollWidth <= one.clientWidth)")
            tab.get_by_label("Seed").fill("-3")
            tab.get_by_role("button", name="Generate").click()
            assert "seed is -3" in tab.inner_text(".toast-body")
            browser.close()
    finally:
        blocks.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
