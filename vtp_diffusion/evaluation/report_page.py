"""A page of several results: HTML that needs no network, with tables, curves and pictures, and a Markdown table.

The same files always give the same bytes: the page has no dates and no absolute paths.
"""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ..data.image_files import read_image
from .convergence import AMOUNTS
from .report import NOT_MEASURED, Result, Row, reading

PICTURES = {"generation": "nearest_neighbours", "reconstruction": "worst_cases"}
AXES = {"num_inference_steps": "evaluations of the network", "guidance_scale": "guidance scale"}
STEP_AXIS = "training step"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 58, 34, 18, 46  # of a chart and its margins
HEADS = {name: name for name in ("what", "value", "best", "chance", "images", "details")} | {"best": "best possible"}
TEMPLATES = Environment(
    loader=PackageLoader("vtp_diffusion.evaluation"), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip

Picture = tuple[str, Path | None]  # caption, and the file where there is one


@dataclass
class Chart:
    """A line chart of a distance; points are (x, value, floor or None, name of the result)."""

    title: str
    axis: str
    note: str
    points: list[tuple[float, float, float | None, str]]


def _sampling(result: Result) -> dict[str, Any]:
    """Settings that the images were sampled with: those recorded with them, else (in older files) the program's."""
    made = result.values.get("sampling", {}).get("generated")
    names = ("num_inference_steps", "guidance_scale", "guidance_interval", "guidance_channels", "seed", "labels")
    made = made or {name: result.values["settings"].get(name) for name in names}
    return {name: value for name, value in made.items() if value is not None}  # None means the same as a missing key


def _add_points(groups: dict[tuple, list], result: Result) -> None:
    """Add the distances of a result to `groups`, whose keys are everything that the points of a curve share."""
    made = _sampling(result)
    step = re.search(r"(?:checkpoint|step)[-_](\d+)", result.values["settings"].get("images", ""))
    places = [(axis, made.get(key), {k: v for k, v in made.items() if k != key}) for key, axis in AXES.items()]
    if step is not None:
        places.append((STEP_AXIS, int(step[1]), {k: v for k, v in made.items() if k != "weights"}))
    for row in result.values["distances"]:
        if row["images"] != "generated":
            continue
        for axis, x, rest in places:
            mode = result.values["settings"].get("feature_mode", "exact")
            sizes = row["num_images"], row["num_reference"]
            others = json.dumps([rest, *sizes, row["network"], mode], sort_keys=True)
            if x is not None:
                groups.setdefault((row["distance"], axis, others), []).append((float(x), row, result.name))


def find_charts(results: Sequence[Result]) -> list[Chart]:
    """Distances against the one setting that the files differ in: sampling steps, guidance scale, or training step
    (read from checkpoint-N or step-N in the path of the images). Files that differ in more are not drawn together."""
    groups: dict[tuple, list] = {}
    for result in results:
        if result.evaluation == "generation":
            with reading(result):
                _add_points(groups, result)
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


def convergence_charts(name: str, rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Quick distances of a training run against each of `AMOUNTS`, such as epochs or GPU-seconds, one chart each.

    Args: `rows`: of `read_convergence`. An amount that some rows lack is not drawn.
    """
    charts = []
    for key, axis in AMOUNTS.items():
        if len({row[key] for row in rows}) > 1 and None not in (row[key] for row in rows):
            points = [(float(row[key]), row["distance"], row["floor"], name) for row in rows]
            title = f"{name}: {rows[0]['name']}"
            charts.append(Chart(title, axis, "during training (dashed: real images)", points))
    return charts


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    power = math.floor(math.log10((high - low) / 5))
    step = next(base * 10.0**power for base in (1, 2, 5, 10) if (high - low) / (base * 10.0**power) <= 5)
    first = -(-low // step)
    return [k * step for k in range(int(first), int(high / step + 1e-9) + 1)]


def chart_svg(chart: Chart) -> Markup:
    """A line chart as inline SVG: it scales with the page and prints sharply."""
    xs = [x for x, *_ in chart.points]
    floors = [(x, floor) for x, _, floor, _ in chart.points if floor is not None]
    x_low, x_high = min(xs), max(xs)
    y_high = max(0.0, *(value for _, value, *_ in chart.points), *(floor for _, floor in floors)) * 1.08 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        left, height = LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - TOP - BOTTOM
        return round(left, 1), round(HEIGHT - BOTTOM - y / y_high * height, 1)

    x_ticks: list[tuple[str, float]] = []
    for x in sorted(set(xs)):
        left, text = place(x, 0)[0], f"{x:.4g}" if x >= 1e6 else f"{x:g}"
        if not x_ticks or left - x_ticks[-1][1] >= 10 + 8 * len(text):  # leave out labels that would touch
            x_ticks.append((text, left))
    values = [(x, value) for x, value, *_ in chart.points]
    lines = {"floor": floors, "line": values}
    ys = [y for _, y in values]
    labelled = ys if len(ys) <= 10 else [ys[0], min(ys), ys[-1]]  # of many points the numbers would touch
    text = TEMPLATES.get_template("chart.svg").render(
        chart=chart,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
        y_ticks=[(f"{tick:g}", place(x_low, tick)[1]) for tick in _ticks(0.0, y_high)],
        x_ticks=x_ticks,
        lines=[(kind, [place(*point) for point in points]) for kind, points in lines.items()],
        marks=[
            (*place(x, v), f"{v:.3g}" if v in labelled else "", f"{name}: {v:.4g} at {x:g}")
            for x, v, _, name in chart.points
        ],
    )
    return Markup(text)


def data_uri(image: Image.Image) -> str:
    """A picture inside the page, as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def find_pictures(results: Sequence[Result]) -> list[Picture]:
    """(caption, file) of the pictures that the programs wrote, samples first. A picture is looked for beside the
    result file, then where the program wrote it. If it is missing, its file is None and its caption says so."""
    titles = {"generation": "nearest real images, below each generated one", "reconstruction": "worst cases"}
    pictures = []
    for result in sorted(results, key=lambda result: result.evaluation != "generation"):
        with reading(result):
            recorded = result.values["settings"].get(PICTURES.get(result.evaluation, ""))
            places = () if recorded is None else (result.folder / Path(recorded).name, Path(recorded))
        if not places:
            continue
        file = next((place for place in places if place.is_file()), None)
        caption = f"{result.name}: {titles[result.evaluation]}"
        pictures.append((caption if file else f"{caption}: picture {recorded} is not there", file))
    return pictures


def markdown_table(rows: Sequence[Row]) -> str:
    """The table as GitHub shows it, every cell as plain text."""
    heads = ["what", "value", "best possible", "chance", "images", "from", "details"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        what = f"{row.what} {row.better}".strip()
        cells = (what, row.value, row.best or "–", row.chance or "–", row.images, row.name, row.details)
        lines.append("| " + " | ".join(map(markdown_text, cells)) + " |")
    return "\n".join(lines) + "\n"


def markdown_text(text: str) -> str:
    """Text in one line with all Markdown escaped: links, pictures, HTML, emphasis and columns."""
    return re.sub(r"[\\`*\[\]<>|#~&$]|(?<!\w)_|_(?!\w)|(?<=:)//|(?<=www)\.", r"\\\g<0>", " ".join(text.split()))


def _table_heads(rows: Sequence[Row]) -> tuple[dict[str, str], str]:
    """Columns that are not empty; and the details if all rows have the same, to be shown once below the table."""
    heads = {key: head for key, head in HEADS.items() if any(getattr(row, key) for row in rows)}
    if len(rows) == 1 or len({row.details for row in rows}) > 1:
        return heads, ""
    return {key: head for key, head in heads.items() if key != "details"}, rows[0].details


def html_page(
    title: str, rows: Sequence[Row], charts: Sequence[Chart], given: Sequence[Picture], recorded: Sequence[Picture],
    results: Sequence[Result],
) -> str:  # fmt: skip
    """The page: given pictures, a summary with the first number of each group, all numbers, charts, other pictures.

    Raises: UnreadableImageError naming a picture that cannot be read."""
    first = {(row.name, row.group): row for row in reversed(rows) if row.group != NOT_MEASURED}
    samples, others = (
        [(caption, data_uri(read_image(file)) if file else None) for caption, file in pictures]
        for pictures in ((given, recorded) if given else (recorded[:1], recorded[1:]))
    )
    return TEMPLATES.get_template("report.html").render(
        title=title,
        table_heads=_table_heads,
        summary=[row for row in rows if any(row is headline for headline in first.values())],
        groups={row.group: [other for other in rows if other.group == row.group] for row in rows},
        results=results,
        charts=charts,
        chart_svg=chart_svg,
        samples=samples,
        pictures=others,
    )
