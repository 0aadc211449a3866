"""Comparing two results of `eval/generation.py`: the difference of every distance, or why they do not compare."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..runtime.disk import read_json


def compare_files(paths: Sequence[str]) -> list[str]:
    """Lines that say how far the distances of two result files are apart, B - A, with their standard error.

    The images of A and B are taken as independent, so their variances add. Images made with the same seed are not
    independent, and the error is then only a guide. Kernel distances are left out: their spread is that over subsets,
    not a standard error.

    Raises:
        ValueError: not two result files of `eval/generation.py`, or two that do not compare, with every reason.
    """
    if len(paths) != 2:
        raise ValueError(f"compare was given {len(paths)} words, expected two result files: compare A.json B.json")
    first, second = (_read(Path(path)) for path in paths)
    reasons = differing_conditions(first, second)
    if reasons:
        raise ValueError(f"{paths[0]} and {paths[1]} do not compare: " + "; ".join(reasons))
    pairs = _paired(first, second)
    width = max(map(len, pairs))
    lines = [f"{'':{width}} {'A':>10} {'B':>10} {'B - A':>10}"] + [
        f"{name:{width}} {a['value']:10.4g} {b['value']:10.4g} {b['value'] - a['value']:10.4g} "
        f"± {math.hypot(a['spread']['value'], b['spread']['value']):.2g}"
        for name, (a, b) in pairs.items()
    ]
    return lines + _compared_fdr6(first, second, width)


def _compared_fdr6(first: dict, second: dict, width: int) -> list[str]:
    """The line of FDr6 if both results have one. With other constants only its six distances compare, not FDr6."""
    a, b = (result.get("fdr6", {}).get("generated") for result in (first, second))
    if a is None or b is None:
        return []
    if any(not math.isclose(a["constants"][name], b["constants"][name]) for name in a["constants"]):
        return ["FDr6 does not compare: A and B divide its distances by different constants"]
    error = math.hypot(a["spread_at_most"], b["spread_at_most"])
    return [
        f"{'FDr6':{width}} {a['value']:10.4g} {b['value']:10.4g} {b['value'] - a['value']:10.4g} ± at most {error:.2g}"
    ]


def differing_conditions(first: dict, second: dict) -> list[str]:
    """Why the distances of two results do not compare, one sentence for each condition; empty if they do.

    The protocol, the image size, the label rule, the reference, the precision of features, and for every network its
    weights, preprocessing, number of images and number of reference images have to be equal. The number of images and
    the label rule because more images (arXiv:1911.07023) and labels drawn evenly lower a distance.
    """
    conditions = [_conditions(first), _conditions(second)]
    reasons = [
        f"{name} is {conditions[0][name]} in A, {conditions[1][name]} in B"
        for name in conditions[0]
        if conditions[0][name] != conditions[1][name]
    ]
    pairs = _paired(first, second)
    if not pairs:
        return [*reasons, "they have no distance in common"]
    for name, rows in pairs.items():
        for key in ("num_images", "num_reference"):
            if rows[0][key] != rows[1][key]:
                reasons.append(f"{key} of {name} is {rows[0][key]} in A, {rows[1][key]} in B")
        files = [result["files_sha256"].get(f"reference of {rows[0]['network']}") for result in (first, second)]
        if files[0] != files[1]:
            reasons.append(f"the statistics of the reference of {name} are {files[0]} in A, {files[1]} in B")
        networks = [_network(result, row["network"]) for result, row in zip((first, second), rows, strict=True)]
        for key in ("sha256", "preprocessing"):
            if networks[0][key] != networks[1][key]:
                reasons.append(
                    f"{key} of {rows[0]['network']}, the network of {name}, is {networks[0][key]} in A, "
                    f"{networks[1][key]} in B"
                )
    return reasons


def _conditions(result: dict) -> dict:
    reference = result["files_sha256"].get("reference", result["images_sha256"].get("reference"))
    return {
        "the protocol": result.get("protocol", {"name": "own"})["name"],
        "image_size": result["image_size"],
        "the label rule": result["labels_rule"]["generated"],
        "SHA-256 of the reference": reference,
        "feature_mode": result["settings"]["feature_mode"],
    }


def _network(result: dict, name: str) -> dict:
    return next(network for network in result["networks"] if network["name"] == name)


def _paired(first: dict, second: dict) -> dict[str, tuple[dict, dict]]:
    """Distance -> its rows in both results, for generated images and the distances that both have."""
    a, b = ({r["distance"]: r for r in x["distances"] if r["images"] == "generated"} for x in (first, second))
    return {name: (row, b[name]) for name, row in a.items() if name in b}


def _read(path: Path) -> dict:
    result = read_json(path, "Expected a result of eval/generation.py")
    needed = ("distances", "networks", "labels_rule", "image_size", "files_sha256", "images_sha256", "settings")
    if missing := [key for key in needed if key not in result]:
        raise ValueError(f"{path} has no {', '.join(missing)}: expected a result of eval/generation.py")
    return result
