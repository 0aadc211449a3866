"""The table and the figure of this experiment, from the results of run.py.

    python experiments/understanding_drives_generation/table.py --results runs/understanding/results \\
        --output experiments/understanding_drives_generation/results/table.json

Writes the table as JSON, and beside it the same as Markdown and the figure as SVG: every distance against the steps
of the generator, a line a tokenizer (mean over seeds, the seeds as dots), dashed what real images get at equal sizes.
What is not measured yet is left out of the figure and a dash in the table.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, read_json, write_json, write_text

# column -> (file, path in it)
COLUMNS = {
    "PSNR": ("reconstruction", ("psnr",)),
    "LPIPS": ("reconstruction", ("lpips",)),
    "linear probe": ("probe", ("linear", "top1")),
    "commonest class": ("probe", ("chance", "most_frequent_class")),
    "zero-shot": ("tokenizer", ("held_out", "zero_shot_accuracy")),
    "retrieval@1": ("tokenizer", ("held_out", "recall_at_1")),
    "by chance": ("tokenizer", ("held_out", "recall_at_1_by_chance")),
    "retrieval@5": ("tokenizer", ("held_out", "recall_at_5")),
    "effective rank": ("tokenizer", ("held_out", "effective_rank")),
}
NEAREST = ("class token", 20)
COLOURS = ("#2c5f9e", "#c0392b", "#27864b", "#8e44ad", "#7f8c8d", "#d68910", "#16a085", "#000080", "#e377c2")
WIDTH, HEIGHT, MARGIN, LINE = 360, 260, 44, 16  # of a panel, in pixels


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    results: str = setting(help="folder with the results of run.py")
    output: str = setting(help="FILE.json for the table; .md and .svg go beside it")

    def __post_init__(self):
        super().__post_init__()
        check_output(self.output)


def looked_up(values: dict, path: tuple[str, ...]):
    """The value at a path in nested dictionaries; None where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def read_tokenizer(folder: Path, name: str) -> dict:
    """Column -> value, None where it is not measured."""
    files = {kind: folder / f"{kind}-{name}.json" for kind in ("tokenizer", "reconstruction", "probe")}
    found = {kind: read_json(file) if file.is_file() else {} for kind, file in files.items()}
    nearest = [r for r in found["probe"].get("neighbours", []) if (r["features"], r["neighbours"]) == NEAREST]
    # the probe's, which leaves skin tones out: train_vtp/train.py counts every tone of a person
    values = {"20-NN": nearest[0]["top1"] if nearest else None}
    return values | {column: looked_up(found[kind], path) for column, (kind, path) in COLUMNS.items()}


def read_generator(file: Path) -> dict[str, dict]:
    """Distance or score -> generated, and where there are some control and real, of one measurement."""
    results, found = read_json(file), {}
    for row in results["distances"]:
        entry = found.setdefault(row["distance"], {})
        entry[row["images"]] = row["floor"]["generated"] if row.get("floor") else row["value"]
        if row.get("floor"):
            entry["real"] = row["floor"]["real"]
    for row in results["scores"]:
        if row["score"].startswith(("precision", "recall")):
            found.setdefault(row["score"], {})[row["images"]] = row["value"]
    return found


def read_generators(folder: Path, name: str) -> dict[str, dict[int, dict]]:
    """Measure -> step -> its values, one a seed, and what a control and real images get."""
    found: dict[str, dict[int, dict]] = {}
    for file in sorted(folder.glob(f"generator-{name}-*.json")):
        seed, step = file.stem.removeprefix(f"generator-{name}-").split("-")
        for measure, entry in read_generator(file).items():
            point = found.setdefault(measure, {}).setdefault(int(step), {"seeds": {}})
            point["seeds"][seed] = entry["generated"]
            point |= {key: entry[key] for key in ("real", "control") if key in entry}
    for points in found.values():
        for point in points.values():
            values = list(point["seeds"].values())
            point |= {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else None}
    return {measure: dict(sorted(points.items())) for measure, points in found.items()}


def collect(folder: Path) -> dict[str, dict]:
    """Tokenizer -> what is known of it. Raises: ValueError for a folder without results."""
    names = [file.stem.removeprefix("tokenizer-") for file in sorted(folder.glob("tokenizer-*.json"))]
    if not names:
        raise ValueError(f"{folder} holds no tokenizer-NAME.json, expected the results folder of run.py")
    return {n: {"tokenizer": read_tokenizer(folder, n), "generators": read_generators(folder, n)} for n in names}


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def cell(points: dict[int, dict] | None, step: int) -> str:
    """Mean ± deviation over seeds at a step."""
    if points is None or step not in points:
        return "–"
    point = points[step]
    return number(point["mean"]) + (f" ± {number(point['deviation'])}" if point["deviation"] is not None else "")


def markdown(table: dict[str, dict]) -> str:
    """Two tables: tokenizers on held-out concepts, and generators at the last step that all of them have."""
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row["generators"]))
    steps = [set(points) for row in table.values() for points in row["generators"].values()]
    common = set.intersection(*steps) if steps else set()
    columns = list(next(iter(table.values()))["tokenizer"])
    lines = ["| tokenizer | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(number(value) for value in row["tokenizer"].values()) + " |")
    if common:
        step = max(common)
        lines += ["", f"Generators at step {step}, distances at equal sizes:", ""]
        lines += ["| tokenizer | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
        for name, row in table.items():
            cells = [cell(row["generators"].get(measure), step) for measure in measures]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def panel(measure: str, curves: dict[str, dict[int, dict]], left: int) -> list[str]:
    """One measure against the steps, as SVG elements; `curves`: tokenizer -> step -> point."""
    points = [point for curve in curves.values() for point in curve.values()]
    values = [value for point in points for value in [*point["seeds"].values(), point.get("real", point["mean"])]]
    last, low, high = max(step for curve in curves.values() for step in curve), min(values), max(values)

    def x(step: int) -> str:
        return f"{left + MARGIN + (WIDTH - 2 * MARGIN) * step / last:.1f}"

    def y(value: float) -> str:
        return f"{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / ((high - low) or 1.0):.1f}"

    parts = [f'<text x="{left + MARGIN}" y="20">{measure}: {low:.3g} to {high:.3g}</text>']
    parts.append(f'<text x="{left + MARGIN}" y="{HEIGHT - 15}">steps 0 to {last}</text>')
    real = [point["real"] for point in points if "real" in point]
    if real:
        line = f'x1="{x(0)}" x2="{x(last)}" y1="{y(mean(real))}" y2="{y(mean(real))}"'
        parts.append(f'<line {line} stroke="black" stroke-dasharray="4 3"/>')
    for colour, curve in zip(COLOURS, curves.values(), strict=False):
        path = " ".join(f"{x(step)},{y(point['mean'])}" for step, point in curve.items())
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for step, point in curve.items():
            dots = point["seeds"].values()
            parts += [f'<circle cx="{x(step)}" cy="{y(value)}" r="2.5" fill="{colour}"/>' for value in dots]
    return parts


def figure(table: dict[str, dict]) -> str:
    """All measures beside each other as an SVG, with the names of the tokenizers below."""
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row["generators"]))
    parts = []
    for place, measure in enumerate(measures):
        # every tokenizer keeps its colour, also in a panel where it has no points yet
        parts += panel(measure, {n: row["generators"].get(measure, {}) for n, row in table.items()}, place * WIDTH)
    for place, (colour, name) in enumerate(zip(COLOURS, table, strict=False)):
        parts.append(f'<text x="{MARGIN}" y="{HEIGHT + LINE * (place + 1)}" fill="{colour}">{name}</text>')
    size = f'width="{max(1, len(measures)) * WIDTH}" height="{HEIGHT + LINE * (len(table) + 1)}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([start, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    table, output = collect(Path(config.results)), Path(config.output)
    write_json(output, {"tokenizers": table})
    text = markdown(table)
    write_text(output.with_suffix(".md"), text)
    write_text(output.with_suffix(".svg"), figure(table))
    print(text)


if __name__ == "__main__":
    run(main)
