"""Optimisers, learning rates and prediction of the data on Fashion-MNIST, on a CPU.

    python experiments/frontier/fashion.py --runs adamw_1e-3 muon_1e-3 --seeds 0 1 2 --together 2

The tokenizers and their latents are those of experiments/understanding_drives_generation/run.py with fashion.yaml, the
generator and its measurement too: FD-EffLite0 at equal sizes, precision and recall of 1,000 samples against test
images. Done runs are not repeated; the same command goes on with the rest, and adds all results to --table.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.disk import read_json, write_json
from vtp_diffusion.runtime.experiments import MachineConfig, Task, carry_out, check_names, options
from vtp_diffusion.runtime.yaml_files import read_yaml

UNDERSTANDING = Path(__file__).resolve().parents[1] / "understanding_drives_generation"
MEASURE = "experiments/understanding_drives_generation/measure.py"
SETTINGS = read_yaml(UNDERSTANDING / "fashion.yaml")
STEPS = SETTINGS["generator_steps"][-1]
RATES = ("5e-4", "1e-3", "2e-3", "4e-3", "8e-3")
# kind of run -> tokenizer, options of train_dit/train.py
KINDS = {
    "adamw": ("reconstruction_long", []),
    "muon": ("reconstruction_long", ["--optimizer", "muon"]),
    "data": ("reconstruction_long", ["--model.prediction", "data"]),
    "all": ("all", []),  # on the tokenizer that understands most
    # 4 tokens of 128 channels, as many as the network is wide
    "wide": ("all", ["--model.patch_size", "2"]),
    "wide_data": ("all", ["--model.patch_size", "2", "--model.prediction", "data"]),
}
RUNS = {
    f"{kind}_{rate}": (tokenizer, [*changed, "--learning_rate", rate])
    for kind, (tokenizer, changed) in KINDS.items()
    for rate in RATES
}


@dataclass(kw_only=True)
class Config(MachineConfig):
    """Settings of this program."""

    runs: list[str] = setting(default_factory=lambda: ["adamw_1e-3"], help=f"of {', '.join(RUNS)}")
    seeds: list[int] = setting(default_factory=lambda: [0], help="of training", at_least=0)
    tokenizers: str = setting("runs/understanding-fashion", "output_dir of the experiment that trained the tokenizers")
    data: str = setting("runs/fashion", "folder that fashion.py of that experiment wrote")
    output_dir: str = setting("runs/frontier-fashion", "folder for everything that is made")
    table: str = setting("experiments/frontier/results/fashion_cpu.json", "file of all results, for table.py")

    def __post_init__(self):
        super().__post_init__()
        check_names("runs", self.runs, RUNS)
        for name in {RUNS[name][0] for name in self.runs}:
            if not (Path(self.tokenizers) / f"latents-{name}" / "latents.json").is_file():
                raise ValueError(f"{self.tokenizers} has no latents-{name}: first run that experiment")


def measured_run(config: Config, name: str, seed: int) -> Task:
    """One run, and its measurement into results/RUN-SEED-STEP.json."""
    (tokenizer, changed), source = RUNS[name], Path(config.tokenizers)
    output, result = (Path(config.output_dir) / part / f"{name}-{seed}" for part in ("runs", "results"))
    files = ["--data.data_files", os.path.join(config.data, "train.parquet"), "--data.label_column", "label"]
    files += ["--data.validation_files", os.path.join(config.data, "test.parquet"), "--data.caption_column", "caption"]
    words = ["train_dit/train.py", "--config", str(UNDERSTANDING / SETTINGS["generator"]), *changed]
    words += ["--vae", str(source / f"tokenizer-{tokenizer}" / "vae"), "--seed", str(seed)]
    words += ["--latents", str(source / f"latents-{tokenizer}")]
    words += ["--max_train_steps", str(STEPS), "--output_dir", str(output)]
    measure = [MEASURE, "--run", str(output), "--steps", str(STEPS), "--output", str(result), "--reference", "parquet"]
    measure += [*files, "--split", "validation", "--data.limit", str(SETTINGS["num_reference"]), "--solver", "unipc"]
    measure += ["--feature_network", *SETTINGS["networks"]]
    same = ("num_images", "num_inference_steps", "feature_batch_size")
    measure += options({name: SETTINGS[name] for name in same} | {"batch_size": 250})
    done = result.with_name(f"{result.name}-{STEPS}.json")
    return Task(f"{name}-{seed}", done, (words, measure), one_process=True)


def tabulated(results: Path, table: dict[str, dict]) -> dict[str, dict]:
    """Run -> seed -> what was measured; `table`: what is known already."""
    for file in sorted(results.glob(f"*-{STEPS}.json")):
        found, (name, seed) = read_json(file), file.stem.removesuffix(f"-{STEPS}").rsplit("-", 1)
        row = found["distances"][0]
        values = {row["distance"]: row["floor"]["generated"], "real against real": row["floor"]["real"]}
        values |= {
            f"{row['distance']} to reconstructions": row["floor"]["generated"]
            for row in found.get("distances_to_reconstructions", [])
        }
        scores = [(*score["score"].split(), score["value"]) for score in found["scores"]]  # "recall (EffLite0)"
        values |= {kind: value for kind, network, value in scores if network == "(EffLite0)"}
        table.setdefault(name, {})[seed] = values
    return table


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    deadline, folder = time.monotonic() + config.seconds, Path(config.output_dir)
    for part in ("runs", "results"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    tasks = [measured_run(config, name, seed) for seed in sorted(config.seeds) for name in config.runs]
    try:
        carry_out(config, tasks, folder / "results", folder, deadline)
    finally:
        table = Path(config.table)
        write_json(table, tabulated(folder / "results", read_json(table) if table.is_file() else {}))


if __name__ == "__main__":
    run(main)
