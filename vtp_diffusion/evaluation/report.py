"""One page out of several result files: HTML that needs no network, and a Markdown table.

Nothing depends on when or where it is made: the same files give the same bytes.
"""

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.image_files import read_image
from .report_style import STYLE

# What a complete file of each evaluation holds; eval/generation.py says what it is by its keys alone.
REQUIRED = {
    "generation": ("settings", "distances", "scores", "counts", "labels_rule"),
    "reconstruction": ("settings", "num_images", "psnr", "ssim", "lpips", "distances"),
    "linear_probe": ("settings", "linear", "neighbours", "chance", "counts", "heads"),
    "zero_shot": ("settings", "top1", "top5", "chance", "num_images", "num_classes"),
}
PICTURES = {"generation": "nearest_neighbours", "reconstruction": "worst_cases"}
AXES = {"num_inference_steps": "evaluations of the network", "guidance_scale": "guidance scale"}
STEP_AXIS = "training step"
NOT_MEASURED = "not measured"  # in the place of a value
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 58, 18, 18, 46  # of a chart and its margins


Picture = tuple[str, Path | None]  # caption, and the file where there is one


@dataclass
class Result:
    """A result file that was read: its name on the page, which evaluation it is, and what it holds."""

    name: str
    evaluation: str
    values: dict[str, Any]
    folder: Path


@dataclass
class Row:
    """One line of the table. `value` and the others are texts; `floor` is what real images, or chance, get."""

    what: str
    value: str
    floor: str
    images: str
    details: str
    name: str


@dataclass
class Chart:
    """Values against something; points are (x, value, floor or None, name)."""

    title: str
    axis: str
    note: str
    points: list[tuple[float, float, float | None, str]]


def result_names(files: Sequence[str | Path]) -> list[str]:
    """What each result file is called on the page: its name without .json, where several have the same with as many
    of the folders above it as tell them apart: run1/generation and run2/generation.

    Raises:
        ValueError: a file that is there twice.
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

    Args: `name`: what it is called on the page; None is the file's.

    Raises:
        ValueError: it cannot be read, is of no known evaluation, or is incomplete: named, with what is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a complete JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected the results of a program of eval/")
    evaluation = values.get("evaluation", "generation" if isinstance(values.get("distances"), list) else None)
    if evaluation not in REQUIRED:
        raise ValueError(f"{path} is of no known evaluation ({', '.join(REQUIRED)}): it holds {', '.join(values)}")
    if missing := [key for key in REQUIRED[evaluation] if key not in values]:
        raise ValueError(f"{path} is an incomplete {evaluation} result: it lacks {', '.join(missing)}")
    return Result(name or path.stem, evaluation, values, path.parent)


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}"


def _floor_value(floor: dict[str, Any], side: str) -> str:
    deviation = floor[f"{side}_deviation"]  # None: the same images in every repetition
    return _number(floor[side]) + ("" if deviation is None else f" ± {_number(deviation, 2)}")


def _share(value: float) -> str:
    return f"{value:.1%}"


def _caveats(result: Result, images: str, against_reference: bool = True) -> list[str]:
    """What keeps numbers of these images, or of them against the reference, out of a table beside others."""
    found, hashes = [], result.values.get("images_sha256", {})
    if result.values["settings"].get("feature_mode", "exact") != "exact":
        found.append("features in float16")
    if images in hashes:
        same = [name for name in ("reference", "floor") if hashes.get(name) == hashes[images]]
        found += [f"these images are those of the {name}, pixel for pixel" for name in same]
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
    """How an Inception score was taken, on which its value depends."""
    if "images_per_split" not in row:
        return []
    found = [f"{row['splits']} parts of {row['images_per_split']} images, {row['order']}"]
    if "adm_value" in row:
        found.append(f"in the order of the files, as ADM's evaluator takes them: {_number(row['adm_value'])}")
    return found


def _generation_rows(result: Result) -> Iterable[Row]:
    for row in result.values["distances"] + result.values.get("kernel_distances", []):
        floor, spread = row["floor"], row["spread"]
        details = [
            f"± is the {spread['kind']}",
            f"labels {result.values['labels_rule'].get(row['images'], 'unknown')}",
        ]
        reference = "reference statistics" if row["num_reference"] is None else f"{row['num_reference']} real"
        text = "not available"
        if floor is not None:
            text = _floor_value(floor, "real")
            details.append(
                f"at the floor's sizes ({floor['sizes'][0]} against {floor['sizes'][1]}, {floor['kind']}): "
                f"{_floor_value(floor, 'generated')}"
            )
        details += _caveats(result, row["images"])
        value = f"{_number(row['value'])} ± {_number(spread['value'], 2)}"
        what = row["distance"] + ("" if row["images"] == "generated" else f" of the {row['images']}")
        yield Row(what, value, text, f"{row['num_images']} against {reference}", "; ".join(details), result.name)
    for row in result.values["scores"]:
        value = _number(row["value"]) + (f" ± {_number(row['spread']['value'], 2)}" if "spread" in row else "")
        what = row["score"] + ("" if row["images"] == "generated" else f" of the {row['images']}")
        details = "; ".join(_parts(row) + _caveats(result, row["images"], "num_reference" in row))
        yield Row(what, value, "", str(row["num_images"]), details, result.name)
    for row in result.values.get("not_measured", []):
        what = f"{row['what']} on {row['network']}" + (
            "" if row["images"] == "generated" else f" of the {row['images']}"
        )
        yield Row(what, NOT_MEASURED, "", "", row["why"], result.name)
    near = result.values.get("near_duplicates")
    if near is not None:
        floor = near.get("floor", near["reference"])
        kind = "held-out real images" if "floor" in near else "real images among themselves"
        value, count = near["generated"], f"{near['generated']['num_images']}"
        yield Row(
            "near-duplicates of the reference", _share(value["share"]), f"{_share(floor['share'])}", count,
            f"the floor is {kind}", result.name,
        )  # fmt: skip


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
    yield Row("PSNR", value, "", count, "; ".join(details), result.name)
    yield Row("SSIM", _number(values["ssim"]), "", count, values.get("ssim_settings", ""), result.name)
    network = values["settings"].get("lpips_network", "")
    yield Row(f"LPIPS ({network})", _number(values["lpips"]), "", count, "", result.name)
    for name, value in values["distances"].items():
        spread = values.get("distance_spreads", {}).get(name)
        shown = _number(value) + (f" ± {_number(spread['value'])}" if spread else "")
        yield Row(name, shown, "0", count, "against the same images, so that perfection is 0", result.name)


def _probe_rows(result: Result) -> Iterable[Row]:
    values, best = result.values, result.values["linear"]
    chance, count = values["chance"], f"{values['counts']['validation']}, learned from {values['counts']['train']}"
    floor = f"{_share(chance['uniform'])} guessing, {_share(chance['most_frequent_class'])} most frequent class"
    details = (
        f"best of {len(values['heads'])} heads on these images: {best['layers']} layer(s), "
        f"{'with' if best['patches'] else 'without'} patches, learning rate {best['learning_rate']:g}"
    )
    yield Row("linear probe, top-1", _share(best["top1"]), floor, count, details, result.name)
    for row in values["neighbours"]:
        what = f"{row['neighbours']}-NN on the {row['features']}".replace("the both", "both tokens")
        yield Row(what, _share(row["top1"]), floor, count, "", result.name)


def _zero_shot_rows(result: Result) -> Iterable[Row]:
    values, count = result.values, str(result.values["num_images"])
    details = f"{values['num_classes']} classes, {len(values.get('templates', []))} templates"
    details = "; ".join([details, *_image_faults(values)])
    yield Row("zero-shot, top-1", _share(values["top1"]), _share(values["chance"]), count, details, result.name)
    yield Row(
        "zero-shot, top-5", _share(values["top5"]), _share(min(1.0, 5 * values["chance"])), count, details, result.name
    )


ROWS = {
    "generation": _generation_rows,
    "reconstruction": _reconstruction_rows,
    "linear_probe": _probe_rows,
    "zero_shot": _zero_shot_rows,
}


def table_rows(results: Sequence[Result]) -> list[Row]:
    """All numbers, in the order of the files.

    Raises:
        ValueError: a file whose numbers are not all there, or which holds none, named.
    """
    rows = []
    for result in results:
        try:
            own = list(ROWS[result.evaluation](result))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{result.name}.json is an incomplete {result.evaluation} result: {error!r}") from error
        if not own:
            raise ValueError(f"{result.name}.json is a {result.evaluation} result that holds no numbers")
        rows += own
    return rows


def _sampling(result: Result) -> dict[str, Any]:
    """What made the images: the settings that came with them, else (of older files) the program's own."""
    made = result.values.get("sampling", {}).get("generated")
    names = ("num_inference_steps", "guidance_scale", "guidance_interval", "guidance_channels", "seed", "labels")
    made = made or {name: result.values["settings"].get(name) for name in names}
    return {name: value for name, value in made.items() if value is not None}  # none and not said are the same


def _training_step(result: Result) -> int | None:
    found = re.search(r"(?:checkpoint|step)[-_](\d+)", result.values["settings"].get("images", ""))
    return int(found[1]) if found else None


def find_charts(results: Sequence[Result]) -> list[Chart]:
    """Distances against whatever single thing the files differ in: sampling steps, guidance, or training step (read
    from checkpoint-N or step-N in the path of the images). What differs in more is not drawn together."""
    groups: dict[tuple, list] = {}
    for result in results:
        if result.evaluation != "generation":
            continue
        made, step = _sampling(result), _training_step(result)
        places = [(axis, made.get(key), {k: v for k, v in made.items() if k != key}) for key, axis in AXES.items()]
        if step is not None:
            places.append((STEP_AXIS, step, {k: v for k, v in made.items() if k != "weights"}))
        for row in result.values["distances"]:
            if row["images"] != "generated":
                continue
            for axis, x, rest in places:
                mode = result.values["settings"].get("feature_mode", "exact")
                sizes = row["num_images"], row["num_reference"]
                others = json.dumps([rest, *sizes, row["network"], mode], sort_keys=True)
                key = (row["distance"], axis, others)
                if x is not None:
                    groups.setdefault(key, []).append((float(x), row, result.name))
    charts = []
    for (title, axis, _), found in groups.items():
        if len({x for x, *_ in found}) < 2:
            continue
        floors = all(row["floor"] is not None for _, row, _ in found)
        points = [
            (x, row["floor"]["generated"], row["floor"]["real"], name) if floors else (x, row["value"], None, name)
            for x, row, name in sorted(found, key=lambda point: point[0])
        ]
        note = "at the sizes of the floor (dashed: real images)" if floors else "to the whole reference"
        charts.append(Chart(title, axis, note, points))
    return charts


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that lie between, about five of them."""
    for step in (base * 10.0**power for power in range(-6, 9) for base in (1, 2, 5)):
        if (high - low) / step <= 5:
            break
    first = -(-low // step)
    return [k * step for k in range(int(first), int(high / step + 1e-9) + 1)]


def chart_svg(chart: Chart) -> str:
    """A line chart as inline SVG: it scales with the page and prints sharply."""
    xs = [x for x, *_ in chart.points]
    ys = [value for _, value, *_ in chart.points] + [floor for _, _, floor, _ in chart.points if floor is not None]
    x_low, x_high, y_high = min(xs), max(xs), max(ys) * 1.08 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        left, height = LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - TOP - BOTTOM
        return round(left, 1), round(HEIGHT - BOTTOM - y / y_high * height, 1)

    parts = []
    for tick in _ticks(0.0, y_high):
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    last = float("-inf")
    for x in sorted(set(xs)):
        left = place(x, 0)[0]
        if left - last >= 34:  # labels that would touch are left out, their points are not
            parts.append(f'<text x="{left}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
            last = left
    lines = [("floor", [(x, floor) for x, _, floor, _ in chart.points if floor is not None])]
    lines.append(("line", [(x, value) for x, value, *_ in chart.points]))
    for kind, points in lines:
        path = " ".join(f"{left},{top}" for left, top in (place(x, y) for x, y in points))
        parts.append(f'<polyline class="{kind}" points="{path}"/>' if points else "")
    for x, value, _, name in chart.points:
        left, top = place(x, value)
        label = html.escape(f"{name}: {value:.4g} at {x:g}")
        parts.append(f'<circle cx="{left}" cy="{top}" r="4"><title>{label}</title></circle>')
        parts.append(f'<text class="value" x="{left}" y="{top - 9}" text-anchor="middle">{value:.3g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(chart.axis)}</text>')
    label = html.escape(f"{chart.title} against {chart.axis}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def data_uri(image: Image.Image) -> str:
    """A picture inside the page, as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def find_pictures(results: Sequence[Result], given: Sequence[tuple[str, Path]]) -> list[Picture]:
    """(caption, file): those given, then those that the programs wrote beside their results. A recorded picture is
    looked for beside the result file, then where the program wrote it; one that is at neither place has no file, and
    its caption says so."""
    titles = {"generation": "nearest real images, below each generated one", "reconstruction": "worst cases"}
    pictures = list(given)
    for result in results:
        recorded = result.values["settings"].get(PICTURES.get(result.evaluation, ""))
        if recorded is None:
            continue
        places = (result.folder / Path(recorded).name, Path(recorded))
        file = next((place for place in places if place.is_file()), None)
        caption = f"{result.name}: {titles[result.evaluation]}"
        pictures.append((caption if file else f"{caption}: picture {recorded} is not there", file))
    return pictures


def markdown_table(rows: Sequence[Row]) -> str:
    """The table as GitHub shows it."""
    lines = ["| what | value | floor | images | from | details |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.what, row.value, row.floor or "–", row.images, row.name, row.details)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def html_page(
    title: str, rows: Sequence[Row], charts: Sequence[Chart], pictures: Sequence[Picture],
    results: Sequence[Result],
) -> str:  # fmt: skip
    """The page. Raises: UnreadableImageError naming a picture that cannot be read."""
    heads = ("what", "value", "floor", "images", "details")
    body = []
    for result in results:
        own = [row for row in rows if row.name == result.name]
        cells = "".join("<tr>" + "".join(_cell(head, getattr(row, head)) for head in heads) + "</tr>" for row in own)
        header = "".join(f"<th>{head}</th>" for head in heads)
        kind = result.evaluation.replace("_", " ")
        body.append(
            f"<section><h2>{html.escape(result.name)} <small>{kind}</small></h2>"
            f"<table><thead><tr>{header}</tr></thead><tbody>{cells}</tbody></table>"
            f"<details><summary>settings</summary><pre>{html.escape(_settings(result))}</pre></details></section>"
        )
    figures = "".join(
        f"<figure><figcaption><b>{html.escape(chart.title)}</b> against {html.escape(chart.axis)}, "
        f"{html.escape(chart.note)}</figcaption>{chart_svg(chart)}</figure>"
        for chart in charts
    )
    shown = "".join(
        f'<figure class="picture"><figcaption>{html.escape(caption)}</figcaption>'
        + (f'<img src="{data_uri(read_image(file))}" alt="{html.escape(caption)}">' if file else "")
        + "</figure>"
        for caption, file in pictures
    )
    charts_html = f'<section><h2>Curves</h2><div class="figures">{figures}</div></section>' if figures else ""
    pictures_html = f"<section><h2>Pictures</h2>{shown}</section>" if shown else ""
    floor = (
        "<p>The <b>floor</b> is what real images reach at sizes of their own, or what guessing does: a value means "
        "little without it.</p>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1>{floor}{''.join(body)}{charts_html}{pictures_html}</main></body></html>\n"
    )


def _cell(head: str, text: str) -> str:
    kind = "" if text else ' class="none"'
    return f'<td data-label="{head}"{kind}>{html.escape(text) or "–"}</td>'


def _settings(result: Result) -> str:
    keys = ("settings", "versions", "sampling", "networks", "files_sha256")
    return json.dumps({key: result.values[key] for key in keys if key in result.values}, indent=2)
