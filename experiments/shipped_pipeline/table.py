"""One file of everything that run.py found out about its recipes.

    python experiments/shipped_pipeline/table.py --runs runs/shipped --output found.json

A value that is not there yet is left out. Numbers have five digits.
"""

from dataclasses import dataclass
from pathlib import Path

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, read_json, read_log, write_json
from vtp_diffusion.runtime.experiments import rounded

TRAINED = ("tokenizer", "decoder", "generator")
ROW = ("kind", "steps", "settings", "passes", "FD-VGG", "FD-VGG_pair", "FD-EffLite0", "FD-EffLite0_pair")
ROW += ("precision", "recall")
CALL = ("guidance", "guidance_scale", "guidance_interval", "num_inference_steps")


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    runs: str = setting("runs/shipped", "--output_dir of run.py")
    output: str = setting(help="FILE.json")

    def __post_init__(self):
        super().__post_init__()
        check_output(self.output, ".json")


def evaluated(result: dict) -> dict:
    """What stands in the table of one result of eval/generation.py."""
    row = {name: result["sampling"]["generated"].get(name) for name in CALL}
    for distance in result["distances"]:
        row[f"{distance['distance']}, {distance['images']}"] = [distance["value"], distance["spread"]["value"]]
    counts = {name: found for name, found in result["near_duplicates"].items() if isinstance(found, dict)}
    return row | {
        "near_duplicates": {name: [found["near_duplicates"], found["num_images"]] for name, found in counts.items()}
    }


def collected(runs: Path, name: str) -> dict:
    """What was found of one recipe."""
    files = {part: runs / name / part / "log.jsonl" for part in TRAINED}
    logs = {part: read_log(file) if file.is_file() else [] for part, file in files.items()}
    seconds = {part: next(x["seconds"] for x in reversed(log) if "seconds" in x) for part, log in logs.items() if log}
    validated = [line for line in logs["decoder"] if "held_out_psnr" in line]
    held_out = {line["step"]: [line["held_out_psnr"], line.get("held_out_lpips")] for line in validated}
    found = {"seconds of training": seconds}
    if held_out:  # a recipe that goes on with a generator alone has none
        found["decoder, held-out PSNR and LPIPS"] = held_out
    if (file := runs / name / "tokenizer" / "results.json").is_file():
        found["tokenizer, held out"] = read_json(file)["held_out"]
    for file in sorted((runs / "results").glob(f"*-{name}.json")):
        kind, result = file.stem.removesuffix(f"-{name}"), read_json(file)
        if kind == "reconstruction":
            found[kind] = {key: result[key] for key in ("psnr", "ssim", "lpips")} | result["distances"]
        elif kind == "probe":
            found[kind] = {"linear": result["linear"]["top1"], "neighbours": result["neighbours"]}
        elif "rows" in result:
            found[kind] = [{key: row[key] for key in ROW} for row in result["rows"]]
        else:
            found[kind] = evaluated(result)
    return found


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    names = sorted({file.parts[-3] for part in TRAINED for file in Path(config.runs).glob(f"*/{part}/log.jsonl")})
    if not names:
        raise ValueError(f"runs is {config.runs}, which holds no recipe, expected the --output_dir of run.py")
    found = {name: collected(Path(config.runs), name) for name in names}
    write_json(Path(config.output), rounded(found, digits=5))


if __name__ == "__main__":
    run(main)
