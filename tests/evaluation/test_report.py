"""eval/report.py: one page of several results."""

import copy
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from vtp_diffusion.evaluation.report import read_result, result_names, table_rows
from vtp_diffusion.evaluation.report_page import chart_svg, convergence_charts, find_charts

PROGRAM = str(Path(__file__).parents[2] / "eval" / "report.py")


def generation(guidance, value, floor=True):
    """What eval/generation.py writes, as far as the page reads it."""
    row = {"distance": "FD-VGG", "network": "vgg16", "images": "generated", "value": value, "num_images": 1000}
    row |= {"num_reference": 1713, "spread": {"kind": "jackknife of 10 groups", "value": 0.5}, "floor": None}
    if floor:
        row["floor"] = {"kind": "held-out", "sizes": [190, 1713], "repetitions": 5, "real": 4.0}
        row["floor"] |= {"real_deviation": 0.1, "generated": value + 5, "generated_deviation": 0.2}
    score = {"score": "precision (VGG)", "network": "vgg16", "images": "generated", "value": 0.61, "num_images": 1000}
    made = {
        "guidance_scale": guidance,
        "num_inference_steps": 50,
        "seed": 0,
        "labels": "random",
        "weights": {"vae": "a"},
    }
    return {
        "settings": {"images": "runs/<dit>/pipeline", "nearest_neighbours": "there/pairs.png"},
        "distances": [row], "kernel_distances": [], "scores": [score], "counts": {"generated": 1000},
        "labels_rule": {"generated": "random"}, "sampling": {"generated": made},
    }  # fmt: skip


RECONSTRUCTION = {
    "evaluation": "reconstruction", "settings": {"lpips_network": "vgg"}, "num_images": 363, "psnr": 28.252,
    "ssim": 0.951, "lpips": 0.0367, "distances": {"FD-VGG": 1.25},
}  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for guidance, value in ((1.0, 30.0), (2.5, 12.0), (4.0, 18.0)):
        (tmp_path / f"guidance-{guidance:g}.json").write_text(json.dumps(generation(guidance, value)))
    (tmp_path / "vae.json").write_text(json.dumps(RECONSTRUCTION))
    Image.new("RGB", (40, 20), "red").save("pairs.png")
    Image.new("RGB", (30, 30), "blue").save("grid.png")
    return ["guidance-4.json", "guidance-1.json", "guidance-2.5.json", "vae.json"]


def read_result_of(values):
    Path("made.json").write_text(json.dumps(values))
    return read_result("made.json")


def report(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [PROGRAM, *words])
    monkeypatch.setenv("VTP_DIFFUSION_TRACEBACK", "1")
    runpy.run_path(PROGRAM, run_name="__main__")


def test_a_page_that_needs_nothing_else(files, tmp_path, monkeypatch, capsys):
    words = (
        "--results",
        *files,
        "--pictures",
        "sampled <b>=grid.png",
        "--title",
        "A & B",
        "--output",
        "out/page.html",
    )
    report(monkeypatch, *words)
    # pairs.png lies beside each of the three results that recorded it
    assert "10 numbers, 1 curves, 4 pictures" in capsys.readouterr().out
    first = (tmp_path / "out" / "page.html").read_bytes()
    page = first.decode()
    assert not re.search(r"https?://|<script|<link|url\(", page), "nothing is fetched"
    assert page.count("data:image/png;base64,") == 4 and "<svg" in page and "@media print" in page
    assert "A &amp; B" in page and "sampled &lt;b&gt;" in page and "runs/&lt;dit&gt;/pipeline" in page
    for text in ("17 ± 0.2", "4 ± 0.1", "28.25 dB", "0.0367", "190 against 1713", "all 1713 real: 12 ± 0.5"):
        assert text in page
    markdown = (tmp_path / "out" / "page.md").read_text()
    assert markdown.count("\n| ") == 11 and "| FD-VGG ↓ | 17 ± 0.2 | 4 ± 0.1 | – | 190 against 1713 |" in markdown
    report(monkeypatch, *words)
    assert (tmp_path / "out" / "page.html").read_bytes() == first


def test_curves_are_of_what_differs_in_one_thing_only(files):
    results = [read_result(file) for file in files]
    (chart,) = find_charts(results)
    assert (chart.title, chart.axis) == ("FD-VGG", "guidance scale")
    assert [point[:3] for point in chart.points] == [(1.0, 35.0, 4.0), (2.5, 17.0, 4.0), (4.0, 23.0, 4.0)]
    picture = ElementTree.fromstring(chart_svg(chart))
    line = [element for element in picture if element.get("class") == "line"][0]
    places = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places) and min(places, key=lambda p: -p[1]) == places[1]
    assert all(0 <= x <= 560 and 0 <= y <= 300 for x, y in places)
    results[1].values["sampling"]["generated"]["num_inference_steps"] = 25
    assert len(find_charts(results)[0].points) == 2, "the one that differs in two things is not drawn"
    # checkpoints of one run, whose weights differ, are one curve against the step
    steps = [copy.deepcopy(results[0]) for _ in range(2)]
    for k, result in enumerate(steps):
        result.values["settings"]["images"] = f"runs/dit/checkpoint-{1000 * (k + 1)}/pipeline"
        result.values["sampling"]["generated"]["weights"] = {"vae": str(k)}
    (chart,) = find_charts(steps)
    assert chart.axis == "training step" and [point[0] for point in chart.points] == [1000.0, 2000.0]
    without = [copy.deepcopy(result) for result in results[1:3]]
    for result in without:
        result.values["sampling"]["generated"]["num_inference_steps"] = 50
        result.values["distances"][0]["floor"] = None
    assert [point[1] for point in find_charts(without)[0].points] == [30.0, 12.0]
    assert {row.best for row in table_rows(without) if row.what == "FD-VGG"} == {"not available"}


def test_what_keeps_a_number_out_of_a_table_stands_beside_it(files):
    values = json.loads(Path("guidance-1.json").read_text())
    assert not any("float16" in row.details or "pixel" in row.details for row in table_rows([read_result(files[0])]))
    values["settings"]["feature_mode"] = "fast"
    values["images_sha256"] = {"generated": "a", "reference": "a", "floor": "b"}
    score = {"score": "Inception score", "splits": 10, "images_per_split": 100, "order": "shuffled", "adm_value": 9.5}
    values["scores"].append(values["scores"][0] | score)
    Path("guidance-1.json").write_text(json.dumps(values))
    rows = table_rows([read_result("guidance-1.json")])
    caveats = "features in float16; these images are those of the reference, pixel for pixel"
    assert len(rows) == 3 and all(row.details.endswith(caveats) for row in rows)
    parts = "10 parts of 100 images, shuffled; in the order given, in parts of 5,000, as ADM's evaluator: 9.5; "
    assert rows[2].details == parts + caveats
    (chart,) = find_charts([read_result(file) for file in files])
    assert [x for x, *_ in chart.points] == [2.5, 4.0], "no curve has points of two precisions"


def test_rows_come_in_the_order_of_the_file(files):
    names = ["generated", "control", *"abcd"]  # which a set shuffles from run to run
    row = {"value": 2.0, "spread_at_most": 0.1, "num_images": 1000, "distances": {}, "constants": {}}
    fdr6 = {"constants_from": "paper"} | {name: row for name in names}
    rows = [row.what for row in table_rows([read_result_of(generation(1.0, 30.0) | {"fdr6": fdr6})])]
    assert [what for what in rows if "FDr6" in what] == ["FDr6", *(f"FDr6 of the {name}" for name in names[1:])]


def test_the_control_is_the_chance_beside_the_value(files, tmp_path, monkeypatch):
    values = generation(2.5, 12.0)
    control = copy.deepcopy(values["distances"][0]) | {"images": "control", "value": 200.0}
    control["floor"]["generated"] = 210.0
    values["distances"].append(control)
    values["scores"].append(values["scores"][0] | {"images": "control", "value": 0.02})
    distance, score = table_rows([read_result_of(values)])
    assert (distance.value, distance.best, distance.chance) == ("17 ± 0.2", "4 ± 0.1", "210 ± 0.2")
    assert (distance.better, score.better, score.value, score.best, score.chance) == ("↓", "↑", "0.61", "", "0.02")
    values["distances"] = [control]  # alone it is a row
    assert table_rows([read_result_of(values)])[0].what == "FD-VGG of the control"


def test_samples_come_first_and_the_summary_has_one_number_of_a_kind(files, monkeypatch):
    report(monkeypatch, "--results", *files[:1], "vae.json", "--pictures", "s=grid.png", "--output", "page.html")
    page = Path("page.html").read_text()
    assert page.index('alt="s"') < page.index("<h2>Summary") < page.index("<h2>Distance to real") < page.index("pairs")
    summary = page[page.index("<h2>Summary") : page.index("<h2>Distance")]
    for text, count in (("FD-VGG", 1), ("precision (VGG)", 1), ("PSNR", 1), ("SSIM", 0), ("LPIPS", 0)):
        assert summary.count(text) == count, text


def test_a_run_is_drawn_against_every_amount_that_its_log_knows():
    row = {"distance": 9.0, "floor": 2.0, "name": "FD-VGG", "step": 0, "gpu_seconds": None}
    rows = [row | {"images": 10 * k, "epochs": k / 7, "flops": 1e12 * k, "distance": 50.0 / k} for k in range(1, 31)]
    charts = convergence_charts("run", rows)
    assert [chart.axis for chart in charts] == ["epochs", "images", "FLOPs"]
    assert charts[1].points[0] == (10.0, 50.0, 2.0, "run")
    picture = ElementTree.fromstring(chart_svg(charts[0]))
    assert [text.text for text in picture if text.get("class") == "value"] == ["50", "1.67"], "not thirty that touch"


def test_runs_are_drawn_from_their_folders(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    settings = {"train_batch_size": 8, "validation": {"guidance_scale": 1.0, "distance": {"network": "vgg16"}}}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(settings))
    lines = ({"step": k, "FD-VGG": 9.0 / k, "FD-VGG_floor": 1.0, "FD-VGG_images": 64} for k in (1, 2))
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(monkeypatch, "--results", "vae.json", "--runs", "run", "--output", "page.html")
    assert "1 curves" in capsys.readouterr().out and "run: FD-VGG</b>" in Path("page.html").read_text()
    with pytest.raises(ValueError, match="no-run has no config.yaml"):
        report(monkeypatch, "--results", "vae.json", "--runs", "no-run", "--output", "page.html")


def test_what_is_missing_is_on_the_page_and_on_the_console(files, tmp_path, monkeypatch, capsys):
    values = generation(2.5, 12.0)
    why = "the reference holds statistics but no images"
    values["not_measured"] = [{"what": "recall", "why": why, "images": "control", "network": "vgg16"}]
    values |= {"duplicates": {"generated": 3, "reference": 0}, "converted": {"generated": {"L": 2}}}
    values |= {"skipped": {"reference": ["a.png"]}, "enlarged": {"reference": 7}}
    values["settings"]["nearest_neighbours"] = "there/gone.png"
    values["distances"][0]["floor"]["real_deviation"] = None
    Path("partly.json").write_text(json.dumps(values))
    report(monkeypatch, "--results", "partly.json", "--output", "page.html")
    printed, markdown, page = capsys.readouterr().out, Path("page.md").read_text(), Path("page.html").read_text()
    assert "| FD-VGG ↓ | 17 ± 0.2 | 4 | – | 190 against" in markdown and ": 12 ± 0.5" in markdown
    assert "2 numbers, 0 curves, 0 pictures" in printed and f"recall on vgg16 of the control: {why}" in printed
    assert f"| recall on vgg16 of the control | not measured | – | – |  | partly | {why} |" in markdown
    for text in ("3 of the generated images equal an earlier one", "2 of the generated images converted from mode L"):
        assert markdown.count(text) == 2 and page.count(text) == 2, "beside the distance and the score"
    assert markdown.count("7 of the reference images are smaller than these and were enlarged") == 1
    assert markdown.count("1 of the reference images cannot be read") == 1, "beside what is against the reference"
    assert "reference images equal" not in markdown
    assert "picture there/gone.png is not there" in printed and "picture there/gone.png is not there" in page
    (row, *_) = table_rows([read_result("vae.json")])
    assert row.details == "mean of the images' own"
    Path("vae.json").write_text(
        json.dumps(
            RECONSTRUCTION
            | {"psnr": None, "equal_images": 363, "skipped": ["a"]}
            | {"subset_rule": "a random subset of 400, seed 0"}
        )
    )
    (row, *_) = table_rows([read_result("vae.json")])
    assert (row.value, row.details.count(";")) == ("infinite", 3) and "a random subset of 400, seed 0" in row.details


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps(generation(1.0, 1.0) | {"distances": [], "scores": []}),
            "bad.json is a generation result that holds no numbers",
        ),
        (
            '{"evaluation": "zero_shot", "settings": {}}',
            "bad.json is an incomplete zero_shot result: it lacks top1, top5",
        ),
        ('{"evaluation": "reconst', "bad.json is not a complete JSON file"),
        ('{"steps": 3}', "bad.json is of no known evaluation"),
        ("[1]", "bad.json holds a list"),
        (json.dumps(RECONSTRUCTION | {"settings": {}, "distances": None}), "bad.json is an incomplete reconstruction"),
    ],
)
def test_incomplete_results_are_refused_by_name(content, message, files, tmp_path, monkeypatch):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        report(monkeypatch, "--results", *files, "bad.json", "--output", "page.html")
    assert not (tmp_path / "page.html").exists()


def test_results_of_one_name_are_called_by_their_folders(files, tmp_path, monkeypatch):
    runs = [Path(f"run{k}") / "generation.json" for k in (1, 2)]
    for k, file in enumerate(runs):
        file.parent.mkdir()
        file.write_text(json.dumps(generation(1.0 + k, 20.0 + k)))
    report(monkeypatch, "--results", *map(str, runs), "vae.json", "--output", "page.html")
    rows = [line.split(" | ") for line in Path("page.md").read_text().splitlines() if line.startswith("| FD-VGG ↓ ")]
    assert [(row[1], row[5]) for row in rows] == [
        ("25 ± 0.2", "run1/generation"), ("26 ± 0.2", "run2/generation"), ("1.25", "vae")
    ]  # fmt: skip
    page = Path("page.html").read_text()
    summary = page[page.index("<h2>Summary") : page.index("<h2>Distance")]
    assert "<small>run1/generation</small>" in summary and "<small>vae</small>" not in summary
    assert result_names(["a/eval/x.json", "b/eval/x.json", "y.json"]) == ["a/eval/x", "b/eval/x", "y"]
    assert result_names(["x.json", "b/x.json"]) == ["x", "b/x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--results", "none.json"], "none.json is not there"),
        (["--results", "run"], r"run is a folder, expected FILE\.json that a program of eval/ wrote"),
        (["--results", "vae.json", "vae.json"], "cannot be told apart on the page: vae"),
        (["--results", "vae.json", "--pictures", "grid.png"], "pictures must be CAPTION=FILE"),
        (["--results", "vae.json", "--pictures", "a=none.png"], "picture none.png is not there"),
        (["--results", "vae.json", "--output", "guidance-1.json/page.html"], "cannot be written"),
        (["--results", "vae.json", "--output", "page.pdf"], "output must be a FILE.html"),
        (["--results", "vae.json", "--output", "notes.html"], "would replace notes.md, which is no part of a report"),
    ],
)
def test_bad_input(words, message, files, monkeypatch):
    Path("notes.md").write_text("mine")
    Path("run").mkdir()
    with pytest.raises(ValueError, match=message):
        report(monkeypatch, "--output", "page.html", *words)


def test_a_report_needs_no_torch():
    code = (
        "import sys; sys.modules['vtp_diffusion'] = package = type(sys)('vtp_diffusion'); "
        "package.__path__ = [sys.argv[1]]; import vtp_diffusion.evaluation.report_page; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(PROGRAM).parents[1] / "vtp_diffusion")], check=False)
    assert done.returncode == 0


def test_on_a_phone_the_summary_ends_on_the_second_screen(tmp_path, monkeypatch):
    """The results of the shipped pipeline, in Debian's chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("there is no chromium")
    results = Path(__file__).parents[2] / "weights/openmoji-128/results"
    names = ("generation", "reconstruction", "probe_category")
    page = tmp_path / "page.html"
    report(monkeypatch, "--results", *(str(results / f"{name}.json") for name in names), "--output", str(page))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        summary = tab.locator("section", has=tab.get_by_role("heading", name="Summary")).bounding_box()
        assert summary["y"] + summary["height"] < 2 * 844
        browser.close()
