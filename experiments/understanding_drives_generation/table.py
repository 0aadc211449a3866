"""The tables and figures of this experiment, from the results of run.py.

    python experiments/understanding_drives_generation/table.py --results runs/understanding/results \\
        --output experiments/understanding_drives_generation/results/table.json

Writes the tables as JSON and Markdown, and beside them, as far as they are measured:

    table.svg             every distance against the steps of the generator, a line a tokenizer
    table-scaling.svg     distances against the width of the encoder, the share of the training data and the steps
    table-tokenizers.svg  what the encoder understands (k-NN) against what the decoder reconstructs (PSNR)
    table-samples.webp    the same samples of every generator, a row a tokenizer; with decoders that were trained
                          further in table-samples_decoder.webp

What is not measured yet is left out of figures and a dash in the tables.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from drawing import Curve, Panel, Style, figure
from PIL import Image, ImageDraw, ImageFont

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, read_json, write_picture, write_text
from vtp_diffusion.runtime.experiments import rounded

# column -> (file, path in it)
COLUMNS = {
    "PSNR": ("reconstruction", ("psnr",)),
    "LPIPS": ("reconstruction", ("lpips",)),
    "FD-EffLite0 of reconstructions": ("reconstruction", ("distances", "FD-EffLite0")),
    "linear probe": ("probe", ("linear", "top1")),
    "commonest class": ("probe", ("chance", "most_frequent_class")),
    "zero-shot": ("tokenizer", ("held_out", "zero_shot_accuracy")),
    "retrieval@1": ("tokenizer", ("held_out", "recall_at_1")),
    "by chance": ("tokenizer", ("held_out", "recall_at_1_by_chance")),
    "retrieval@5": ("tokenizer", ("held_out", "recall_at_5")),
    "effective rank": ("tokenizer", ("held_out", "effective_rank")),
}
NEAREST = ("class token", 20)


STYLES = {
    "reconstruction": Style("reconstruction", "#0072B2", "circle"),
    "reconstruction_long": Style("reconstruction, 4 times longer", "#56B4E9", "circle", "7 4"),
    "contrastive": Style("+ contrastive", "#009E73", "diamond", "2 3"),
    "self_supervision": Style("+ self-supervision", "#CC79A7", "triangle", "10 3 2 3"),
    "all": Style("all three objectives", "#D55E00", "square"),
    "all_long": Style("all three, 4 times longer", "#E69F00", "square", "7 4"),
    "all_pixels": Style("all three, pixels weighted 25 times", "#000000", "square"),
    "all_understanding": Style("all three, pixels weighted .1", "#000000", "diamond", "2 3"),
    "reconstruction_small": Style("reconstruction, half the width", "#0072B2", "circle", "2 3"),
    "all_small": Style("all three, half the width", "#D55E00", "square", "2 3"),
    "reconstruction_half": Style("reconstruction, half the data", "#0072B2", "circle", "7 4"),
    "all_half": Style("all three, half the data", "#D55E00", "square", "7 4"),
    "reconstruction_tenth": Style("reconstruction, a tenth of the data", "#0072B2", "circle", "10 3 2 3"),
    "all_tenth": Style("all three, a tenth of the data", "#D55E00", "square", "10 3 2 3"),
}
DECODER = "_decoder"  # ending of the names of those with a decoder that was trained further
STYLES |= {f"{name}{DECODER}": replace(s, label=f"{s.label}, second stage") for name, s in STYLES.items()}
MAIN = list(STYLES)[:8]  # in the first figure and the picture of samples; the others are in the second figure
# axis -> value -> ending of the tokenizer's name
SCALES = {
    "width of the encoder, %": {50: "_small", 100: ""},
    "share of the training data, %": {10: "_tenth", 50: "_half", 100: ""},
    "steps of the tokenizer, times": {1: "", 4: "_long"},
}
DECODED = " to reconstructions"  # ending of what is measured against real images after the same autoencoder
RANDOM = "FD-VTP-192"  # on the encoder of random weights
RANDOM_NOTE = "VTP-192 is an encoder of random weights: a difference that it shows as well says nothing about content."
TITLES = {RANDOM: "FD on a random network (control)", "FD-VGG": "FD-VGG (LPIPS trains on it)"}
TITLES |= {f"{RANDOM}{DECODED}": "the control, to reconstructions"}
COLOURS = 32  # of the pictures of samples
DIGITS = 6  # of numbers in the JSON, which is half as long so
LABEL, SAMPLE_ROWS = 226, 4  # pixels beside the samples for names; rows of the pictures of measure.py


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    results: str | None = setting(None, "folder with the results of run.py; none: those of --known alone")
    output: str = setting(help="FILE.json for the tables; .md, .svg and .webp go beside it")
    known: str | None = setting(None, "tables of earlier results, for what --results does not have")
    sample_rows: int = setting(SAMPLE_ROWS, "rows of 16 samples in the pictures", at_least=1, at_most=SAMPLE_ROWS)

    def __post_init__(self):
        super().__post_init__()
        if self.results is None and self.known is None:
            raise ValueError(
                "neither results nor known was given, expected one of them: a folder, or an earlier table"
            )
        check_output(self.output)


def read_known(file: str) -> dict[str, dict]:
    """The tables that were written into a file. Raises: ValueError for another file."""
    table = read_json(Path(file)).get("tokenizers", {})
    if not table:
        raise ValueError(f"{file} holds no tokenizers, expected the JSON of an earlier table")
    for row in table.values():  # JSON has no numbers as keys
        for measure, points in row["generators"].items():
            row["generators"][measure] = {int(step): point for step, point in points.items()}
    return table


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
    for part, ending in (("distances", ""), ("distances_to_reconstructions", DECODED)):
        for row in results.get(part, []):
            entry = found.setdefault(row["distance"] + ending, {})
            entry[row["images"]] = row["floor"]["generated"] if row.get("floor") else row["value"]
            if row.get("floor"):
                entry["real"] = row["floor"]["real"]
    for part, ending in (("scores", ""), ("scores_to_reconstructions", DECODED)):
        for row in results.get(part, []):
            if row["score"].startswith(("precision", "recall")) and RANDOM.removeprefix("FD-") not in row["score"]:
                found.setdefault(row["score"] + ending, {})[row["images"]] = row["value"]
    return found


def logged_loss(log: Path, step: int) -> dict[str, dict]:
    """The training loss at a step, the mean of some steps before it, as `read_generator` returns a measure."""
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines()) if log.is_file() else ()
    found = [row["loss"] for row in rows if row.get("step") == step and "loss" in row]
    return {"training loss": {"generated": found[-1]}} if found else {}


def read_generators(folder: Path, name: str) -> dict[str, dict[int, dict]]:
    """Measure -> step -> its values, one a seed, and what a control and real images get."""
    found: dict[str, dict[int, dict]] = {}
    for file in sorted(folder.glob(f"generator-{name}-*.json")):
        seed, step = file.stem.removeprefix(f"generator-{name}-").split("-")
        loss = logged_loss(file.with_name(f"generator-{name}-{seed}.jsonl"), int(step))
        for measure, entry in (read_generator(file) | loss).items():
            point = found.setdefault(measure, {}).setdefault(int(step), {"seeds": {}})
            point["seeds"][seed] = entry["generated"]
            point |= {key: entry[key] for key in ("real", "control") if key in entry}
    for points in found.values():
        for point in points.values():
            values = list(point["seeds"].values())
            point |= {"mean": mean(values)} | ({"deviation": stdev(values)} if len(values) > 1 else {})
    return {measure: dict(sorted(points.items())) for measure, points in found.items()}


def collect(folder: Path) -> dict[str, dict]:
    """Tokenizer -> what is known of it. Raises: ValueError for a folder without results."""
    kinds = ("tokenizer", "reconstruction")  # a decoder alone has the second
    names = [name for name in STYLES if any((folder / f"{kind}-{name}.json").is_file() for kind in kinds)]
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
    return number(point["mean"]) + (f" ± {number(point['deviation'])}" if point.get("deviation") is not None else "")


def last_common_step(table: dict[str, dict]) -> int | None:
    """The last step at which all generators are measured that are measured at all."""
    steps = [set(points) for row in table.values() for points in row["generators"].values()]
    return max(set.intersection(*steps), default=None) if steps else None


def markdown(table: dict[str, dict]) -> str:
    """Two tables: tokenizers on held-out concepts, and generators at the last step that all of them have."""
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row["generators"]))
    step = last_common_step(table)
    columns = list(next(iter(table.values()))["tokenizer"])
    lines = ["| tokenizer | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        lines.append(
            f"| {STYLES[name].label} | " + " | ".join(number(value) for value in row["tokenizer"].values()) + " |"
        )
    if step is not None:
        lines += ["", f"Generators at step {step}, distances at equal sizes:", ""]
        lines += ["| tokenizer | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
        for name, row in table.items():
            cells = [cell(row["generators"].get(measure), step) for measure in measures]
            lines.append(f"| {STYLES[name].label} | " + " | ".join(cells) + " |")
        found = [[row["generators"].get(measure, {}).get(step, {}) for row in table.values()] for measure in measures]
        real = [[point["real"] for point in points if "real" in point] for points in found]
        cells = [number(mean(values) if values else None) for values in real]
        lines += ["| real against real images | " + " | ".join(cells) + " |", "", RANDOM_NOTE]
    return "\n".join(lines) + "\n"


def distances(table: dict[str, dict]) -> list[str]:
    """Those that are measured, that of the random network last."""
    found = dict.fromkeys(measure for row in table.values() for measure in row["generators"])
    return sorted(
        (measure for measure in found if measure.startswith("FD-")), key=lambda name: name.startswith(RANDOM)
    )


def training_panels(table: dict[str, dict]) -> list[Panel]:
    """Every distance against the steps of the generator, with decoders that were trained on if those are measured at
    several steps."""
    panels = []
    for measure in distances(table):
        found = {name: row["generators"].get(measure, {}) for name, row in table.items()}
        second = any(name.endswith(DECODER) and len(points) > 1 for name, points in found.items())
        curves, real = [], []
        for name in MAIN:
            points = found.get(f"{name}{DECODER}" if second else name)
            if points:
                dots = [(s, v) for s, p in points.items() for v in p["seeds"].values() if len(p["seeds"]) > 1]
                curves.append(Curve(STYLES[name], [(s, p["mean"]) for s, p in points.items()], dots))
                real += [point["real"] for point in points.values() if "real" in point]
        if curves:
            baseline, title = mean(real) if real else None, TITLES.get(measure, measure)
            title += " (stage 2)" if second else ""
            panels.append(Panel(title, "training steps of the generator", "distance", curves, baseline))
    return panels


def scaling_curves(table: dict[str, dict], measure: str, ends: dict[int, str], step: int) -> list[Curve]:
    """A distance of reconstruction alone and of all objectives against a scale. Args: `ends`: as in `SCALES`."""
    curves = []
    for base in ("reconstruction", "all"):
        found = {x: table.get(f"{base}{end}", {}).get("generators", {}).get(measure, {}) for x, end in ends.items()}
        points = [(x, row[step]) for x, row in found.items() if step in row]
        if len(points) > 1:
            dots = [(x, value) for x, point in points for value in point["seeds"].values()]
            curves.append(Curve(STYLES[base], [(x, point["mean"]) for x, point in points], dots))
    return curves


def scaling_panels(table: dict[str, dict]) -> list[Panel]:
    """Distances at the last common step, a row for each, against each of the `SCALES`, a column for each. They are of
    decoders that were trained on, where those are measured."""
    panels, step = [], last_common_step(table)
    for measure in (name for name in distances(table) if not name.startswith(RANDOM)):
        for label, ends in SCALES.items():
            decoded = {x: f"{end}{DECODER}" for x, end in ends.items()}
            second = scaling_curves(table, measure, decoded, step)
            if curves := second or scaling_curves(table, measure, ends, step):
                title = f"{measure} (stage 2)" if second else measure
                panels.append(Panel(title, label, f"distance at step {step:,}", curves))
    return panels


def tokenizer_panel(table: dict[str, dict]) -> Panel | None:
    """k-NN against PSNR, a point a tokenizer."""
    known = {name: table[name]["tokenizer"] for name in MAIN if name in table}
    values = {name: (row["PSNR"], row["20-NN"]) for name, row in known.items()}
    curves = [Curve(STYLES[name], [point], line=False) for name, point in values.items() if None not in point]
    labels = "reconstruction of held-out images: PSNR, dB", "20-NN accuracy, 10 categories"
    return Panel("The tokenizers", *labels, curves, logarithmic=False) if curves else None


def samples_picture(folder: Path, rows: int, ending: str = "") -> Image.Image | None:
    """The pictures of measure.py row by row: a row of samples of every tokenizer, then the next one.

    Args: `rows`: how many of theirs; `ending`: of the tokenizers' names.
    """
    found = {name: folder.glob(f"generator-{name}{ending}-*.png") for name in MAIN}
    files = {name: sorted(paths, key=lambda f: int(f.stem.split("-")[-1])) for name, paths in found.items()}
    strips = {name: Image.open(found[-1]) for name, found in files.items() if found}
    if not strips:
        return None
    width, height = next(iter(strips.values())).size
    side, gap = height // SAMPLE_ROWS, 12
    picture = Image.new("RGB", (LABEL + width, (len(strips) * side + gap) * rows - gap), "white")
    pen, font, y = ImageDraw.Draw(picture), ImageFont.load_default(14), 0
    for row in range(rows):
        for name, strip in strips.items():
            picture.paste(strip.crop((0, row * side, width, (row + 1) * side)), (LABEL, y))
            pen.text((6, y + side // 2), STYLES[name].label, "black", font, anchor="lm")
            y += side
        y += gap
    return picture.quantize(COLOURS, dither=Image.Dither.NONE)


def write_figures(table: dict[str, dict], results: Path | None, output: Path, sample_rows: int) -> None:
    """All figures that something is measured of, beside the table."""
    panels = training_panels(table)
    if panels:
        styles = [STYLES[name] for name in MAIN if name in table]
        note = "Lower is better. Of several seeds the line is the mean, and small circles are the seeds."
        write_text(output.with_suffix(".svg"), figure(panels, 3, styles, note))
    panels = scaling_panels(table)
    if panels:
        styles, note = [STYLES["reconstruction"], STYLES["all"]], "Lower is better. Small circles are seeds."
        columns = max(2, len({panel.x_label for panel in panels}))
        write_text(output.with_name(f"{output.stem}-scaling.svg"), figure(panels, columns, styles, note))
    panel = tokenizer_panel(table)
    if panel is not None:
        styles = [curve.style for curve in panel.curves]
        drawn = figure([panel], 1, styles, "Up and right is better.")
        write_text(output.with_name(f"{output.stem}-tokenizers.svg"), drawn)
    for ending in ("", DECODER) if results else ():
        if (picture := samples_picture(results, sample_rows, ending)) is not None:
            write_picture(output.with_name(f"{output.stem}-samples{ending}.webp"), picture)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    results, output = Path(config.results) if config.results else None, Path(config.output)
    known = read_known(config.known) if config.known else {}
    found = known | (collect(results) if results else {})
    table = {name: found[name] for name in STYLES if name in found}
    lines = (f"{json.dumps(name)}: {json.dumps(rounded(row, DIGITS))}" for name, row in table.items())
    write_text(output, '{"tokenizers": {\n' + ",\n".join(lines) + "\n}}\n")  # a line each: a third of the bytes
    tables = markdown(table)
    write_text(output.with_suffix(".md"), tables)
    write_figures(table, results, output, config.sample_rows)
    print(tables)


if __name__ == "__main__":
    run(main)
