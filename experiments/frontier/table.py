"""The tables of this experiment's page, from the results of run.py and fashion.py.

    python experiments/frontier/table.py --results experiments/frontier/results

Prints Markdown: a row for each run, kind of guidance and number of steps, mean ± deviation over the seeds of training.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import read_json

MEASURES = {"FD-EffLite0": 1, "FD-VGG": 2, "precision": 3, "recall": 3}  # and decimals
FASHION = "fashion_cpu.json"  # written by fashion.py


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    results: str = setting("experiments/frontier/results", "folder with RUN-SEED.json")


def over_seeds(values: list[float], decimals: int) -> str:
    """Mean ± deviation."""
    spread = f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{mean(values):.{decimals}f}{spread}"


def describe(settings: dict) -> str:
    """Scale and interval of a call."""
    low, high = settings.get("guidance_interval", (0.0, 1.0))
    interval = f", {low:g} ≤ t ≤ {high:g}" if (low, high) != (0.0, 1.0) else ""
    return f"{settings['guidance_scale']:g}{interval}" if "guidance_scale" in settings else "–"


def table(folder: Path) -> str:
    """Markdown. Raises: ValueError for a folder without results."""
    found, losses = defaultdict(list), defaultdict(list)
    for file in sorted(folder.glob("*-[0-9]*.json")):
        name, result = file.stem.rpartition("-")[0], read_json(file)
        losses[name] += [line["loss"] for line in result["training"]]
        for row in result["rows"]:
            found[name, row["kind"], row["steps"], describe(row["settings"])].append(row)
    if not found:
        raise ValueError(f"{folder} holds no RUN-SEED.json, expected the results of run.py")
    names = ["run", "seeds", "loss", "guidance", "scale", "steps", "passes", *MEASURES]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for (name, kind, steps, scale), rows in found.items():
        loss = over_seeds(losses[name], 4) if losses[name] else "–"
        cells = [name, len(rows), loss, kind, scale, steps, rows[0]["passes"]]
        cells += [over_seeds([row[measure] for row in rows], decimals) for measure, decimals in MEASURES.items()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    real = [row["FD-EffLite0_pair"]["real"][0] for rows in found.values() for row in rows]
    return "\n".join([*lines, "", f"Real against real at the pair's sizes: FD-EffLite0 {mean(real):.1f}."])


def fashion_table(runs: dict[str, dict[str, dict]]) -> str:
    """Markdown of what fashion.py wrote."""
    names = ["Fashion-MNIST", "seeds", *(name for name in MEASURES if name != "FD-VGG")]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, seeds in runs.items():
        rows = list(seeds.values())
        cells = [over_seeds([row[m] for row in rows], MEASURES[m]) for m in names[2:]]
        lines.append("| " + " | ".join([name, str(len(rows)), *cells]) + " |")
    real = [row["real against real"] for seeds in runs.values() for row in seeds.values()]
    return "\n".join([*lines, "", f"Real against real at equal sizes: FD-EffLite0 {mean(real):.1f}."])


def main(argv: list[str] | None = None) -> None:
    folder = Path(parse_config(Config, argv, __doc__).results)
    print(table(folder))
    if (folder / FASHION).is_file():
        print(f"\n{fashion_table(read_json(folder / FASHION))}")


if __name__ == "__main__":
    run(main)
