r"""Gain and cost of the joint objective: a run with it against its twin, trained for reconstruction alone.

    accelerate launch train_vtp/train.py --config train_vtp/configs/openmoji.yaml
    accelerate launch train_vtp/train.py --config train_vtp/configs/openmoji_twin.yaml
    python benchmarks/vtp_objectives.py --joint runs/vtp-openmoji --twin runs/vtp-openmoji-twin \
        --output benchmarks/results/vtp_objectives_openmoji_h100.json

One H100 each, 8 and 5 minutes. Held-out images are those of base emoji that training never saw. Beside the JSON,
which holds the curves, an SVG of the same name shows them. What it gave: benchmarks/README.md; the logs of both runs:
benchmarks/results/vtp_openmoji_h100/.

benchmarks/results/vtp_objectives_tiny_cpu.json is a rehearsal on a CPU: tiny.yaml at 32 pixels, 500 steps of 32
images (205 and 24 seconds), each with

    python train_vtp/train.py --config train_vtp/configs/tiny.yaml --data.limit none --max_train_steps 500 \
        --train_batch_size 32 --lr_warmup_steps 25 --ema_decay 0.99 --checkpointing_steps 500 \
        --validation_steps 100 --log_steps 50 [--objectives reconstruction] --output_dir FOLDER

At 13 dB its reconstructions are blurs: it shows the trend of the features, not the price in pixels.
"""

import argparse
import json
from pathlib import Path

from vtp_diffusion.runtime.config import flatten_config
from vtp_diffusion.runtime.disk import write_json

MEASURES = ("psnr", "lpips", "knn_accuracy", "effective_rank", "zero_shot_accuracy", "recall_at_1", "recall_at_5")
# what may differ between twins: where they are written, what they are trained for, and the settings of that
FREE = ("output_dir", "objectives", "contrastive", "self_supervision", "text", "reconstruction.weight")
COLOURS = {"joint": "#c0392b", "twin": "#2c5f9e"}
WIDTH, HEIGHT, MARGIN = 320, 200, 40  # of a panel, in pixels


def read_run(folder: Path) -> tuple[dict, dict[str, list[tuple[int, float]]]]:
    """results.json of a run and measure -> [(step, value)] on held-out images."""
    for name in ("results.json", "log.jsonl"):
        if not (folder / name).is_file():
            raise SystemExit(f"{folder} has no {name}: it holds no finished run of train_vtp/train.py")
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for measure in MEASURES:
            if f"held_out_{measure}" in record:
                curves.setdefault(measure, []).append((record["step"], record[f"held_out_{measure}"]))
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), curves


def check_twins(joint: dict, twin: dict) -> None:
    """SystemExit unless the runs differ in nothing but what they were trained for."""
    ours, theirs = (flatten_config(run["configuration"]) for run in (joint, twin))
    keys = [key for key in ours if not any(key == f or key.startswith(f + ".") for f in FREE)]
    if differing := [key for key in keys if ours[key] != theirs.get(key)]:
        lines = [f"  {key}: {ours[key]} and {theirs.get(key)}" for key in differing]
        raise SystemExit("the runs are no twins, they differ in\n" + "\n".join(lines))
    if "held_out" not in joint or joint["held_out"]["data"] != twin["held_out"]["data"]:
        raise SystemExit("the runs were not measured on the same held-out images")


def panel(title: str, curves: dict[str, list[tuple[int, float]]], left: int) -> str:
    """One chart as SVG elements."""
    points = [point for curve in curves.values() for point in curve]
    last, low, high = max(s for s, _ in points), min(v for _, v in points), max(v for _, v in points)
    span = (high - low) or 1.0
    parts = [f'<text x="{left + MARGIN}" y="20">{title}: {low:.3g} to {high:.3g}</text>']
    for name, curve in curves.items():
        path = " ".join(
            f"{left + MARGIN + (WIDTH - 2 * MARGIN) * s / last:.1f},"
            f"{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (v - low) / span:.1f}"
            for s, v in curve
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
    parts.append(f'<text x="{left + MARGIN}" y="{HEIGHT - 15}">steps 0 to {last}; joint red, twin blue</text>')
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("joint", "twin"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="run folder of train_vtp/train.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the curves go beside it as SVG")
    arguments = parser.parse_args()
    (joint, joint_curves), (twin, twin_curves) = (read_run(folder) for folder in (arguments.joint, arguments.twin))
    check_twins(joint, twin)
    a, b = joint["held_out"], twin["held_out"]
    results = {
        "held_out": {name: {"joint": a.get(name), "twin": b.get(name)} for name in MEASURES if name in a or name in b},
        "knn_gain": a["knn_accuracy"] - b["knn_accuracy"],
        "knn_of_commonest_class": a["knn_accuracy_of_commonest_class"],
        "psnr_loss_db": b["psnr"] - a["psnr"],
        "recall_at_1_over_chance": a["recall_at_1"] / a["recall_at_1_by_chance"],
        "images": a["images"],
        "steps": joint["steps"],
        "seconds": {"joint": joint["seconds"], "twin": twin["seconds"]},
        "curves": {"joint": joint_curves, "twin": twin_curves},
        "configuration": joint["configuration"],
    }
    write_json(arguments.output, results)
    panels = []
    for index, name in enumerate(joint_curves):
        curves = {"joint": joint_curves[name]} | ({"twin": twin_curves[name]} if name in twin_curves else {})
        panels.append(panel(name, curves, index * WIDTH))
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
    svg += '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(panels) + "\n</svg>\n"
    arguments.output.with_suffix(".svg").write_text(svg, encoding="utf-8")
    for name in ("knn_gain", "knn_of_commonest_class", "psnr_loss_db", "recall_at_1_over_chance"):
        print(f"{name}: {results[name]:.4f}")


if __name__ == "__main__":
    main()
