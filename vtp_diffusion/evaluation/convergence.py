"""How fast a training run reaches a distance: E@FID-k, the epochs until the FID is at most k, and the same in images,
GPU-seconds and floating-point operations."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..generation.sampler_config import GuidanceConfig
from ..runtime.config import build_config, flatten_config
from ..runtime.disk import read_log
from ..runtime.yaml_files import read_yaml

AMOUNTS = {"epochs": "epochs", "images": "images", "gpu_seconds": "GPU-seconds", "flops": "FLOPs"}


def read_convergence(run_folder: str | Path) -> list[dict]:
    """The quick distances of a training run in order, each with the training that it took until then.

    Returns: a dictionary for every validation that measured a distance, with
        step, images: training steps and images so far.
        epochs: passes over the training images so far. None if the log is of an earlier version and does not say.
        flops: useful operations of forward and backward passes so far. None as above.
        gpu_seconds: time of training alone, summed over all processes (also on a CPU). None as above.
        distance, floor: the value for num_images samples, and that of real images at the same sizes.
        name, network, reference: name of the distance, its feature network, and the real images in words.
        guidance: of the samples, in words.
    Raises: ValueError: no run folder, a damaged log, or one without distances.
    """
    folder = Path(run_folder)
    for name in ("config.yaml", "log.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: expected the run folder of train_dit/train.py")
    config = flatten_config(read_yaml(folder / "config.yaml"))
    names = {
        field.name: f"validation.{field.name}" for field in fields(GuidanceConfig)
    }  # there, or later than the run
    given = {name: config[key] for name, key in names.items() if key in config}
    guidance = build_config(GuidanceConfig, given, str(folder / "config.yaml"), "validation.")
    earlier = config.get("validation.distance.reference.source", "unknown images")  # logs now name the reference
    rows, taken, seconds = [], dict.fromkeys(("epochs", "flops", "gpu_seconds"), 0.0), 0.0
    for line in read_log(folder / "log.jsonl"):
        if "seconds" in line:
            spent, seconds = line["seconds"] - seconds, line["seconds"]
            known = taken["gpu_seconds"] is not None and "processes" in line
            taken = {"epochs": line.get("epochs"), "flops": line.get("flops")} | {
                "gpu_seconds": taken["gpu_seconds"] + spent * line["processes"] if known else None
            }
        for name in (key.removesuffix("_floor") for key in line if key.endswith("_floor")):
            rows.append(
                {"step": line["step"], "images": line["step"] * config["train_batch_size"]}
                | taken
                | {"distance": line[name], "floor": line[f"{name}_floor"], "num_images": line[f"{name}_images"]}
                | {"name": name, "network": config["validation.distance.network"]}
                | {"reference": line.get(f"{name}_reference", earlier)}
                | {"guidance": guidance.guidance_text}
            )
    if not rows:
        raise ValueError(f"{folder}/log.jsonl has no distances: expected validation.distance.num_images above 0")
    return rows


def first_within(rows: Sequence[dict], distance: float) -> dict:
    """The first row of `read_convergence` with at most this distance. Raises: ValueError: there is none."""
    for row in rows:
        if row["distance"] <= distance:
            return row
    best = min(rows, key=lambda row: row["distance"])
    raise ValueError(
        f"none of {len(rows)} validations reaches {distance:g}: the lowest {best['name']} is {best['distance']:.4g}, "
        f"at step {best['step']}"
    )


def reach_line(words: Sequence[str]) -> str:
    """What `eval/generation.py reach RUN_FOLDER K` prints. Raises: ValueError as above, or for other words."""
    try:
        folder, wanted = words
        distance = float(wanted)
    except ValueError as error:
        raise ValueError(
            f"reach was given {' '.join(words) or 'nothing'}, expected a run folder and a distance: reach RUN_FOLDER K"
        ) from error
    row = first_within(read_convergence(folder), distance)
    amounts = [f"{'unknown' if row[key] is None else f'{row[key]:.4g}'} {text}" for key, text in AMOUNTS.items()]
    return (
        f"{row['name']} of {row['num_images']} samples to {row['reference']}, {row['guidance']}, is at most {wanted} "
        f"after {', '.join(amounts)}: {row['distance']:.4g} at step {row['step']} (real images: {row['floor']:.4g})"
    )
