"""Kill a training run again and again while it saves, and see that nothing is lost. Too long for every test run.

    PYTHONPATH=. python tests/kill_saving.py --kills 20 --output benchmarks/results/kill_saving.json

The run of tests/tiny_training.py saves after every step, while the next one is made. It is killed (SIGKILL) at a
random moment while a checkpoint is being written, started again by the same command, and so on; in the end it must
equal a run that was never killed: weights, averages, optimiser, random state and log, bit for bit. After every kill
the newest whole checkpoint must be the last one that had been finished.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_training import log_of

from vtp_diffusion.training.checkpoints import find_damage

PROGRAM = Path(__file__).with_name("tiny_training.py")
LONGEST_SAVE = 0.05  # seconds: the kill comes at a random moment of as many after a save began
STEPS = 200


def start(folder: Path) -> subprocess.Popen:
    config = {"folder": str(folder), "max_train_steps": STEPS, "checkpointing_steps": 1, "ema_further_decays": [0.5]}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, PROGRAM, json.dumps([{"config": config}])]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def newest(folder: Path) -> tuple[int, str | None]:
    """Step of the newest checkpoint and what is wrong with it; 0 without any."""
    steps = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))
    return (steps[-1], find_damage(folder / f"checkpoint-{steps[-1]}")) if steps else (0, None)


def kill_while_saving(folder: Path, chance: random.Random) -> dict | None:
    """One life of the run; None if the kill missed the save. Raises: RuntimeError if something was lost."""
    process = start(folder)
    for _ in range(chance.randint(1, 4)):  # which save of this life it is to be
        seen = set(folder.glob(".unfinished-checkpoint-*"))
        while not set(folder.glob(".unfinished-checkpoint-*")) - seen:
            if process.poll() is not None:
                raise RuntimeError(f"the run ended by itself, status {process.returncode}:\n{process.stderr.read()}")
            time.sleep(0.0005)
    time.sleep(chance.random() * LONGEST_SAVE)
    finished_before, _ = newest(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step, damage = newest(folder)
    if damage is not None or step < finished_before:
        raise RuntimeError(f"after the kill checkpoint-{step} is the newest: {damage}; {finished_before} was there")
    unfinished = list(folder.glob(".unfinished-checkpoint-*"))
    if not unfinished:
        return None
    hit = max(int(path.name.rpartition("-")[2]) for path in unfinished)
    files = sum(1 for path in (folder / f".unfinished-checkpoint-{hit}").rglob("*") if path.is_file())
    while_doing = "writing the next" if hit > step else "deleting an old one"
    return {"newest_checkpoint": step, "while": while_doing, "files_in_the_unfinished": files}


def differences(first: Path, second: Path) -> list[str]:
    """Names of what the last checkpoints and the logs of two runs do not have in common, bit for bit."""
    found = []
    folders = [folder / f"checkpoint-{STEPS}" for folder in (first, second)]
    for name in sorted({p.relative_to(f).as_posix() for f in folders for p in f.rglob("*.safetensors")}):
        one, other = (load_file(folder / name) for folder in folders)
        found += [f"{name}: {key}" for key in one.keys() | other.keys() if not torch.equal(one[key], other[key])]
    moments = [torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"] for folder in folders]
    for name, state in moments[0].items():
        found += [f"optimizer: {name} {k}" for k, v in state.items() if not torch.equal(v, moments[1][name][k])]
    states = [torch.load(folder / "random_state_0.pt", weights_only=True)["cpu"] for folder in folders]
    found += [] if torch.equal(*states) else ["random state"]
    decided = ("step", "loss", "grad_norm", "learning_rate")
    logs = [[{key: line[key] for key in decided} for line in log_of(folder)] for folder in (first, second)]
    return found + ([] if logs[0] == logs[1] else ["log"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills that hit a save")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", required=True, help="FILE.json for the results")
    arguments = parser.parse_args()
    chance, kills, missed = random.Random(arguments.seed), [], 0
    with tempfile.TemporaryDirectory() as temporary:
        killed, straight = Path(temporary) / "killed", Path(temporary) / "straight"
        while len(kills) < arguments.kills:
            kill = kill_while_saving(killed, chance)
            missed += kill is None
            kills += [kill] if kill is not None else []
            print(f"kill {len(kills)} of {arguments.kills}: {kill or 'between two saves'}", flush=True)
        for folder in (killed, straight):
            process = start(folder)
            _, error = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"the run in {folder.name} failed: {error}")
        differing = differences(killed, straight)
    result = {
        "kills_while_saving": len(kills),
        "kills_between_saves": missed,
        "steps": STEPS,
        "differences_from_a_run_never_killed": differing,
        "kills": kills,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "machine": f"CPU, {platform.machine()}",
    }
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{len(kills)} kills while saving; differences from a run never killed: {differing or 'none'}")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
