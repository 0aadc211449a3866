"""evaluation/comparison.py: the difference of two results, or why there is none."""

import json
import runpy
from pathlib import Path

import pytest

from vtp_diffusion.evaluation.comparison import compare_files
from vtp_diffusion.evaluation.printed_results import print_singular


def result(value, spread, **changes):
    """What eval/generation.py writes, as far as a comparison reads it."""
    row = {"distance": "FID", "network": "inception", "images": "generated", "value": value, "num_images": 1000}
    row |= {"num_reference": None, "spread": {"kind": "jackknife of 10 random groups", "value": spread}}
    network = {"name": "inception", "sha256": "6726825d", "preprocessing": "resize to 299"}
    for place in (row, network):
        place.update({key: changes.pop(key) for key in list(changes) if key in place})
    return {
        "distances": [row], "networks": [network], "labels_rule": {"generated": "random"}, "image_size": [256, 256],
        "files_sha256": {"reference": "aa"}, "images_sha256": {}, "settings": {"feature_mode": "exact"},
    } | changes  # fmt: skip


@pytest.fixture
def compare(tmp_path):
    def run(*results):
        paths = [tmp_path / f"{name}.json" for name in "AB"]
        for path, content in zip(paths, results, strict=True):
            path.write_text(json.dumps(content))
        return compare_files([str(path) for path in paths])

    return run


def test_a_difference_comes_with_the_error_of_both(compare):
    _, line = compare(result(5.0, 0.3), result(4.0, 0.4))
    assert line.split() == ["FID", "5", "4", "-1", "±", "0.5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": {"name": "jit"}}, "the protocol is own in A, jit in B"),
        ({"num_images": 500}, "num_images of FID is 1000 in A, 500 in B"),
        ({"sha256": "bb"}, "sha256 of inception"),
        ({"preprocessing": "resize to 224"}, "preprocessing of inception"),
        ({"labels_rule": {"generated": "balanced"}}, "the label rule is random in A, balanced in B"),
        ({"files_sha256": {"reference": "bb"}}, "SHA-256 of the reference is aa in A, bb in B"),
        ({"settings": {"feature_mode": "fast"}}, "feature_mode is exact in A, fast in B"),
        ({"distance": "FD-VGG"}, "they have no distance in common"),
    ],
)
def test_other_conditions_are_named(compare, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(result(5.0, 0.3), result(4.0, 0.4, **changes))


def test_the_program_prints_it(compare, tmp_path, capsys):
    compare(result(5.0, 0.3), result(4.0, 0.4))
    program = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "generation.py"))
    program["main"](["compare", str(tmp_path / "A.json"), str(tmp_path / "B.json")])
    assert "-1 ± 0.5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program["main"](["compare", "--help"])
    assert "compare A.json B.json" in capsys.readouterr().out


def test_other_files_are_refused(compare, tmp_path):
    with pytest.raises(ValueError, match="B.json has no distances"):
        compare(result(5.0, 0.3), {"psnr": 28.0})
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(ValueError, match="text.json is not JSON.*Expected a result"):
        compare_files([str(tmp_path / "text.json"), str(tmp_path / "A.json")])
    with pytest.raises(ValueError, match="compare was given 1 words"):
        compare_files(["A.json"])


def test_only_distances_of_no_more_images_than_features_are_remarked_on(capsys):
    print_singular({"FID": (50_000, 2048), "sFID": (2024, 2023)})
    assert capsys.readouterr().out == ""
    print_singular({"FID": (2048, 2048), "FD-VGG": (600, 512)})
    assert "than features: FID (2,048 images, 2,048 features). Covariances" in capsys.readouterr().out
