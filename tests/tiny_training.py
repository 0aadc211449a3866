"""A tiny training run for the tests of the loop, in their process or, run as a program, in several."""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import nn

from vtp_diffusion import LightningDiTTransformer2DModel
from vtp_diffusion.training.config import TrainingConfig
from vtp_diffusion.training.loop import TrainingRun
from vtp_diffusion.training.run_folder import RunFolder

NUM_SAMPLES = 20
# of a line of the log: what no two runs share
TIMING = {"images_per_second", "seconds", "peak_memory_gib", "processes"}


def tiny_config(folder, **changes):
    settings = {"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 100, "log_steps": 1}
    settings |= {"train_batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.9, "report_to": "none"}
    return TrainingConfig(output_dir=str(folder), **(settings | changes))


class Objective(nn.Module):
    """Fits a tiny LightningDiT to noise, keeps a counter of its own, and breaks its gradients on request."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.transformer = LightningDiTTransformer2DModel(
            sample_size=2, in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3
        ).eval()
        self.head = nn.Linear(4, 4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, latents, broken):
        self.calls += 1
        labels = torch.zeros(len(latents), dtype=torch.long)
        prediction = self.transformer(latents, torch.full((len(latents),), 0.5), labels).sample
        prediction = self.head(prediction.movedim(1, -1)).movedim(-1, 1)
        loss = (prediction - latents).square().mean()
        return {"loss": loss * (math.nan if broken else 1.0), "calls": self.calls.clone()}


def make_run(config, fingerprint="data", **settings):
    objective, folder = Objective(), RunFolder(config.output_dir, config)
    settings |= {"not_saved": ("frozen.",)}
    return TrainingRun(config, folder, objective, objective.transformer, "transformer", fingerprint, **settings)


def train(config, broken_steps=(), fingerprint="data", at_step=None, **settings):
    """Train to the end. `at_step`: step -> what is called in the middle of it."""
    run = make_run(config, fingerprint, **settings)
    data = torch.randn(NUM_SAMPLES, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    run.read = []

    def inputs():
        for step, indices in zip(run.micro_steps, run.batch_sampler(NUM_SAMPLES), strict=True):
            run.read.append(indices)
            noise = run.draw(step, lambda n, generator: {"noise": torch.randn(n, 4, 2, 2, generator=generator)})
            (at_step or {}).get(step, lambda: None)()
            yield {"latents": data[indices] + noise["noise"], "broken": step in broken_steps}

    batches = inputs()
    for step in run.steps():
        run.optimise(step, batches)
    return run


def everything(run):
    state = {name: value.clone() for name, value in run.bare.state_dict().items()}
    for name, average in run.optimisation.averages.items():
        state |= {f"{name}.{i}": value for i, value in enumerate(average.averages)}
    for i, parameter in enumerate(run.optimisation.trained):
        state |= {f"adam.{i}.{k}": v for k, v in run.optimisation.optimizer.state[parameter].items()}
    return state | {"random": torch.get_rng_state()}


def assert_identical(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def interrupted_copy(source, target, step):
    """What a kill -9 after the checkpoint of that step leaves, half of the next checkpoint included."""
    shutil.copytree(source, target)
    for path in target.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            path.rename(target / f".unfinished-{path.name}")
            (target / f".unfinished-{path.name}" / "optimizer.pt").write_bytes(b"half")
    with open(target / "log.jsonl", "a") as file:
        file.write('{"step": 9')


def shard_on_cpu():
    """accelerate shards over accelerators only, but its FSDP2 code runs on processes of a CPU too, once told to."""
    import accelerate

    class Sharding(accelerate.Accelerator):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.state.distributed_type = accelerate.DistributedType.FSDP
            self.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)

    accelerate.Accelerator = Sharding


def send(asked, folder):
    """A signal to this process, once `after` is in the run folder: checkpoints are written while training goes on."""
    while "after" in asked and not (folder / asked["after"]).exists():
        time.sleep(0.001)
    os.kill(os.getpid(), asked["number"])


def main():
    """Run the jobs given as JSON one after the other: {"config": {...}, "shard": bool, "signal": {rank, step, number,
    after}, "broken": {rank, step}}."""
    import accelerate
    from accelerate.state import AcceleratorState

    whole_weights = accelerate.Accelerator
    for job in json.loads(sys.argv[1]):
        AcceleratorState._reset_state()
        accelerate.Accelerator = whole_weights
        os.environ["ACCELERATE_USE_FSDP"] = str(job.get("shard", False)).lower()
        if job.get("shard"):
            shard_on_cpu()
        asked, actions, rank = job.get("signal"), {}, int(os.environ.get("RANK", 0))
        if asked is not None and rank == asked["rank"]:
            actions[asked["step"]] = lambda job=job: send(job["signal"], Path(job["config"]["folder"]))
        broken = job.get("broken")
        broken_steps = {broken["step"]} if broken is not None and rank == broken["rank"] else ()
        config = tiny_config(**job["config"])
        try:
            run = train(config, broken_steps, at_step=actions)
        except SystemExit as stopped:
            assert stopped.code == 128 + job["signal"]["number"], "also in a process that did not get the signal"
            continue
        with run.averaged_model() as model:
            total = sum(p.sum().item() for p in model.parameters())
        record = {"read": run.read, "first_step": run.first_step, "average": total}
        (Path(config.output_dir) / f"rank-{run.rank}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
