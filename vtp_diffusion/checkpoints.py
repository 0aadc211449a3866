"""Checkpoints of a training run: written whole or not at all, and resumed bit for bit."""

import json
import shutil
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from .training import TrainingRun

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def beside_model(run: "TrainingRun") -> dict[str, torch.Tensor]:
    """State of the objective that is not the model's."""
    inside = {id(t) for t in run.model.state_dict(keep_vars=True).values()}
    state = run.bare.state_dict(keep_vars=True).items()
    return {k: v.detach() for k, v in state if id(v) not in inside and not k.startswith(run.not_saved or "\0")}


def save_checkpoint(run: "TrainingRun", step: int) -> None:
    """Write checkpoint-<step>: first under another name, then renamed, so that a kill never leaves half of one."""
    path = run.folder.unfinished(step)
    if run.is_main:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    run.accelerator.wait_for_everyone()
    random = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(run.device)
    torch.save(random, path / f"random_state_{run.rank}.pt")
    if run.is_main:
        run.model.save_pretrained(path / run.model_name, max_shard_size="1TB")
        with run.averaged_weights():
            run.model.save_pretrained(path / f"{run.model_name}_ema", max_shard_size="1TB")
        beside = {name: value.contiguous() for name, value in beside_model(run).items()}
        save_file(beside, path / "objective.safetensors")
        scaler = None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict()
        torch.save({"optimizer": run.optimizer.state_dict(), "scaler": scaler}, path / "optimizer.pt")
        state = {"step": step, "fingerprint": run.fingerprint, "seconds": run.seconds}
        state |= {"skipped": run.skipped.tolist(), "average_step": run.average.step}
        (path / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    run.accelerator.wait_for_everyone()
    if run.is_main:
        run.folder.finish(step, run.config.checkpoints_total_limit)
    run.accelerator.wait_for_everyone()


def resume(run: "TrainingRun") -> None:
    checkpoints = run.folder.checkpoints()
    if not checkpoints:
        if run.is_main:
            run.folder.truncate_log(0)
        return
    step, path = checkpoints[-1]
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["fingerprint"] != run.fingerprint:
        raise ValueError(
            f"{path} was trained on data with fingerprint {state['fingerprint']}, the data given now has "
            f"{run.fingerprint}: a run is resumed on the same data only"
        )
    averaged = load_file(path / f"{run.model_name}_ema" / WEIGHTS_NAME)
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    run.average.averages = [averaged[name].to(run.device, torch.float32) for name in names]
    run.average.step = state["average_step"]
    run.model.load_state_dict(load_file(path / run.model_name / WEIGHTS_NAME), strict=True)
    for name, value in load_file(path / "objective.safetensors").items():
        beside_model(run)[name].copy_(value)
    saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    run.optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    random = torch.load(path / f"random_state_{run.rank}.pt", weights_only=True)
    torch.set_rng_state(random["cpu"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], run.device)
    run.skipped = torch.tensor(state["skipped"], device=run.device)
    run.first_step, run.seconds = step, state["seconds"]
    if run.is_main:
        run.folder.truncate_log(step)
