"""Result files of eval/, and the rows of the report's tables that are made from them."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Keys of a complete file of each evaluation. Files of eval/generation.py are recognised by their keys alone.
REQUIRED = {
    "generation": ("settings", "distances", "scores", "counts", "labels_rule"),
    "reconstruction": ("settings", "num_images", "psnr", "ssim", "lpips", "distances"),
    "linear_probe": ("settings", "linear", "neighbours", "chance", "counts", "heads"),
    "zero_shot": ("settings", "top1", "top5", "chance", "num_images", "num_classes"),
}
LARGEST = 1e300
NOT_MEASURED = "not measured"  # stands in place of a value
UP, DOWN = "↑", "↓"  # more is better, less is better
DISTANCES, SCORES, COPIES = "distance to real images", "fidelity and coverage", "copies"
RECONSTRUCTION, FEATURES = "reconstruction", "what the features know"


@dataclass
class Result:
    """A result file that was read: its name on the page, its evaluation (a key of REQUIRED), and its contents."""

    name: str
    evaluation: str
    values: dict[str, Any]
    folder: Path

    def recorded_settings(self) -> str:
        """The settings that decide the numbers, as JSON."""
        keys = ("settings", "versions", "sampling", "networks", "files_sha256")
        return json.dumps({key: self.values[key] for key in keys if key in self.values}, indent=2)


@dataclass
class Row:
    """One line of a group's table, all texts. `best`: the best possible, what real images or a perfect model get.
    `chance`: what guessing or the untrained control gets. `better`: an arrow towards better values, or empty."""

    group: str
    what: str
    better: str
    value: str
    best: str
    chance: str
    images: str
    details: str
    name: str


def result_names(files: Sequence[str | Path]) -> list[str]:
    """The name of each result file on the page: without .json, and with as many of its folders as are needed to tell
    files of the same name apart (run1/generation and run2/generation).

    Raises: ValueError: a file is given twice.
    """
    parts = [Path(file).with_suffix("").parts for file in files]
    names = [part[-1] for part in parts]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        if not (twice := {name for name in names if names.count(name) > 1}):
            return names
        names = ["/".join(p[-depth:]) if name in twice else name for p, name in zip(parts, names, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"result files of the same name cannot be told apart on the page: {', '.join(twice)}")
    return names


def read_result(path: str | Path, name: str | None = None) -> Result:
    """A result file of eval/.

    Args: `name`: its name on the page; None: the name of the file.
    Raises: ValueError: it cannot be read, is of no known evaluation, or lacks keys.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected FILE.json that a program of eval/ wrote")
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, parse_int=_parse_number, parse_float=_parse_number, parse_constant=_parse_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected the results of a program of eval/")
    evaluation = values.get("evaluation", "generation" if isinstance(values.get("distances"), list) else None)
    if evaluation not in REQUIRED:
        raise ValueError(f"{path} is of no known evaluation ({', '.join(REQUIRED)}): it holds {', '.join(values)}")
    if missing := [key for key in REQUIRED[evaluation] if key not in values]:
        raise ValueError(f"{path} is an incomplete {evaluation} result: it lacks {', '.join(missing)}")
    return Result(name or path.stem, evaluation, values, path.parent)


def _parse_number(text: str) -> int | float:
    """Raises: ValueError for numbers that cannot be drawn in a chart: infinite, NaN or too large."""
    value = float(text)
    if not abs(value) <= LARGEST:
        raise ValueError(f"{text[:20]} is no number that can be shown")
    return int(text) if text.lstrip("-").isdecimal() else value


@contextlib.contextmanager
def reading(result: Result) -> Iterator[None]:
    """Context in which a result is read. Raises: ValueError naming it if values are missing or of other types."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{result.name}.json is an incomplete {result.evaluation} result: {error!r}") from error


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}"


def _floor_value(floor: dict[str, Any], side: str) -> str:
    deviation = floor[f"{side}_deviation"]  # None: the same images in every repetition
    return _number(floor[side]) + ("" if deviation is None else f" ± {_number(deviation, 2)}")


def _share(value: float) -> str:
    return f"{value:.1%}"


def _caveats(result: Result, images: str, against_reference: bool = True) -> list[str]:
    """Reasons why numbers of these images (measured against the reference or not) do not compare with others."""
    found, hashes = [], result.values.get("images_sha256", {})
    if result.values["settings"].get("feature_mode", "exact") != "exact":
        found.append("features in float16")
    if images in hashes:
        # older files say only whether all are
        same = {name: "these" for name in ("reference", "floor") if hashes.get(name) == hashes[images]}
        shared = result.values.get("shared_images", {}).get(images, same)
        found += [f"{n} images are those of the {name}, pixel for pixel" for name, n in shared.items() if n]
    for name in (images, "reference") if against_reference else (images,):
        if count := result.values.get("duplicates", {}).get(name):
            found.append(f"{count} of the {name} images equal an earlier one")
    modes = result.values.get("converted", {}).get(images, {})
    found += [f"{count} of the {images} images converted from mode {mode}" for mode, count in modes.items()]
    keys = result.values.get("skipped", {}).get("reference")
    if (count := result.values.get("enlarged", {}).get("reference")) and against_reference:
        found.append(f"{count} of the reference images are smaller than these and were enlarged")
    if keys and against_reference:
        found.append(f"{len(keys)} of the reference images cannot be read and are left out")
    return found


def _parts(row: dict[str, Any]) -> list[str]:
    """How the images were split for an Inception score, whose value depends on it."""
    if "images_per_split" not in row:
        return []
    found = [f"{row['splits']} parts of {row['images_per_split']} images, {row['order']}"]
    if "adm_value" in row:
        found.append(f"in the order given, in parts of 5,000, as ADM's evaluator: {_number(row['adm_value'])}")
    return found


def _of(row: dict[str, Any]) -> str:
    return "" if row["images"] == "generated" else f" of the {row['images']}"


def _with_spread(row: dict[str, Any]) -> str:
    return _number(row["value"]) + (f" ± {_number(row['spread']['value'], 2)}" if "spread" in row else "")


def _distance_row(result: Result, row: dict[str, Any], control: dict[str, Any] | None) -> Row:
    """The row of a distance: the pair at equal sizes, which alone compares with real images, if there is one."""
    floor, spread = row["floor"], row["spread"]
    labels = f"labels {result.values['labels_rule'].get(row['images'], 'unknown')}"
    caveats = _caveats(result, row["images"])
    part = "" if "projections" in row else "all "  # MIND takes as many as there are samples
    real = "reference statistics" if row["num_reference"] is None else f"{part}{row['num_reference']} real"
    whole = f"{_with_spread(row)} ({spread['kind']})"
    chance = "" if control is None else _with_spread(control)
    if floor is None:
        value, best, images = _with_spread(row), "not available", f"{row['num_images']} against {real}"
        details = [f"± is the {spread['kind']}", labels]
    else:
        value, best = (_floor_value(floor, side) for side in ("generated", "real"))
        images = f"{floor['sizes'][0]} against {floor['sizes'][1]}"
        details = [f"real images: {floor['kind']}", f"{row['num_images']} against {real}: {whole}", labels]
        if control is not None and control["floor"] is not None:
            chance = _floor_value(control["floor"], "generated")
    return Row(
        DISTANCES, row["distance"] + _of(row), DOWN, value, best, chance, images, "; ".join(details + caveats),
        result.name,
    )  # fmt: skip


def _with_controls(rows: Sequence[dict[str, Any]], kind: str) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Pairs of a row and the control's row of the same kind; control rows without a partner come last, alone."""
    controls = {(row[kind], row["network"]): row for row in rows if row["images"] == "control"}
    found = [(row, controls.get((row[kind], row["network"]))) for row in rows if row["images"] != "control"]
    used = [id(control) for _, control in found]
    return found + [(row, None) for row in controls.values() if id(row) not in used]


def _generation_rows(result: Result) -> Iterable[Row]:
    distances = result.values["distances"] + result.values.get("kernel_distances", [])
    for row, control in _with_controls(distances, "distance"):
        shown = _distance_row(result, row, control)
        if control is not None:
            shown.details = _add_control(result, shown.details, row, "chance is an untrained network")
        yield shown
    for row, control in _with_controls(result.values["scores"], "score"):
        details = "; ".join(_parts(row) + _caveats(result, row["images"], "num_reference" in row))
        if control is not None:
            details = _add_control(result, details, row, "")
        yield Row(
            SCORES, row["score"] + _of(row), UP, _with_spread(row), "", _with_spread(control) if control else "",
            str(row["num_images"]), details, result.name,
        )  # fmt: skip
    yield from _judges_rows(result)
    for row in result.values.get("not_measured", []):
        yield Row(
            NOT_MEASURED, f"{row['what']} on {row['network']}{_of(row)}", "", NOT_MEASURED, "", "", "", row["why"],
            result.name,
        )  # fmt: skip
    near = result.values.get("near_duplicates")
    if near is not None:
        known = {"those held out, after the autoencoder": "decoded_floor", "those held out": "floor"}
        known |= {"the reference's among themselves": "reference"}
        kind, best = next((kind, near[name]) for kind, name in known.items() if name in near)
        value = near["generated"]
        yield Row(
            COPIES, "near-duplicates of the reference", "", _share(value["share"]),
            f"real images {_share(best['share'])}", "", str(value["num_images"]), f"real: {kind}", result.name,
        )  # fmt: skip


def _judges_rows(result: Result) -> Iterable[Row]:
    found = result.values.get("fdr6", {})
    for images, row in found.items():
        if images == "constants_from":
            continue
        six = (f"{n} {_number(d)} / {_number(row['constants'][n])}" for n, d in row["distances"].items())
        value = f"{_number(row['value'])} ± at most {_number(row['spread_at_most'], 2)}"
        what = "FDr6" + ("" if images == "generated" else f" of the {images}")
        details = "; ".join([*six, f"constants {found['constants_from']}", *_caveats(result, images)])
        yield Row(DISTANCES, what, DOWN, value, _number(1), "", str(row["num_images"]), details, result.name)
    for row in result.values.get("memorisation", []):
        what = f"memorised on {row['network']}" + ("" if row["images"] == "generated" else f" of the {row['images']}")
        quantile = _share(row["quantile"])
        details = f"nearer to a training image than all but {quantile} of {row['num_held_out']} held-out images; "
        details += copies_text(row)
        yield Row(
            COPIES, what, "", _share(row["share"]), quantile, "", str(row["num_images"]), details, result.name
        )  # fmt: skip


def copies_text(row: dict[str, Any]) -> str:
    """How much a row of memorisation says: the share of copies of training images that is found."""
    if (share := row.get("share_of_copies")) is None:
        return "whether copies would be found is not known without the autoencoder"
    return f"copies of training images: {share:.1%}"


def _add_control(result: Result, details: str, row: dict[str, Any], meaning: str) -> str:
    """Details of a row that shows the control's value too, with the caveats of the control's images added."""
    own = set(_caveats(result, row["images"], "num_reference" in row))
    more = [fault for fault in _caveats(result, "control", "num_reference" in row) if fault not in own]
    return "; ".join(filter(None, [details, meaning, *more]))


def _image_faults(values: dict[str, Any]) -> Iterable[str]:
    if keys := values.get("skipped"):
        yield f"{len(keys)} images cannot be read and are left out"
    if enlarged := values.get("enlarged"):
        yield f"{enlarged} of the images are smaller than they are measured and were enlarged"


def _reconstruction_rows(result: Result) -> Iterable[Row]:
    values, count = result.values, str(result.values["num_images"])
    details = ["mean of the images' own"]
    if (rule := values.get("subset_rule", "all")) != "all":
        details.append(rule)
    if equal := values.get("equal_images"):
        details.append(f"{equal} that come back exactly, of which it is infinite, are left out")
    details += _image_faults(values)
    value = "infinite" if values["psnr"] is None else f"{values['psnr']:.2f} dB"
    yield Row(RECONSTRUCTION, "PSNR", UP, value, "infinite", "", count, "; ".join(details), result.name)
    ssim = values.get("ssim_settings", "")
    yield Row(RECONSTRUCTION, "SSIM", UP, _number(values["ssim"]), "1", "", count, ssim, result.name)
    network = values["settings"].get("lpips_network", "")
    yield Row(RECONSTRUCTION, f"LPIPS ({network})", DOWN, _number(values["lpips"]), "0", "", count, "", result.name)
    for name, value in values["distances"].items():
        spread = values.get("distance_spreads", {}).get(name)
        shown = _number(value) + (f" ± {_number(spread['value'])}" if spread else "")
        yield Row(RECONSTRUCTION, name, DOWN, shown, "0", "", count, "against the same images", result.name)


def _probe_rows(result: Result) -> Iterable[Row]:
    values, best = result.values, result.values["linear"]
    chance, count = values["chance"], f"{values['counts']['validation']}, learned from {values['counts']['train']}"
    guess = _share(chance["most_frequent_class"])
    chosen_on = values.get("head_chosen_on", "the validation images")  # of version 0.1 always
    details = (
        f"best of {len(values['heads'])} heads on {chosen_on}: {best['layers']} layer(s), "
        f"{'with' if best['patches'] else 'without'} patches, learning rate {best['learning_rate']:g}"
    )
    always = f"chance is always the most frequent class, {_share(chance['uniform'])} guessing"
    details = f"{details}; {always}"
    yield Row(FEATURES, "linear probe, top-1", UP, _share(best["top1"]), "", guess, count, details, result.name)
    for row in values["neighbours"]:
        what = f"{row['neighbours']}-NN on the {row['features']}".replace("the both", "both tokens")
        yield Row(FEATURES, what, UP, _share(row["top1"]), "", guess, count, always, result.name)


def _zero_shot_rows(result: Result) -> Iterable[Row]:
    values, count = result.values, str(result.values["num_images"])
    details = f"{values['num_classes']} classes, {len(values.get('templates', []))} templates"
    details = "; ".join([details, *_image_faults(values)])
    for key, k in (("top1", 1), ("top5", 5)):
        guess = _share(min(1.0, k * values["chance"]))
        yield Row(FEATURES, f"zero-shot, top-{k}", UP, _share(values[key]), "", guess, count, details, result.name)


ROWS = {
    "generation": _generation_rows,
    "reconstruction": _reconstruction_rows,
    "linear_probe": _probe_rows,
    "zero_shot": _zero_shot_rows,
}


def table_rows(results: Sequence[Result]) -> list[Row]:
    """All numbers, in the order of the files.

    Raises: ValueError naming a file whose numbers are incomplete or missing.
    """
    rows = []
    for result in results:
        with reading(result):
            own = list(ROWS[result.evaluation](result))
        if not own:
            raise ValueError(f"{result.name}.json is a {result.evaluation} result that holds no numbers")
        rows += own
    return rows
