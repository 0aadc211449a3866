"""Checkpoints of a training run: written whole or not at all, told from torn ones, resumed bit for bit.

A checkpoint is written under another name, flushed to the disk, listed with sizes and hashes in `manifest.json`, and
renamed at last. Whatever the processes were, and whether their weights were whole or sharded, its content is the same:

    <model>/, <model>_ema/     diffusers folders, which from_pretrained loads
    <model>_ema_<decay>/       the same for every further decay of the averages
    objective.safetensors      what is trained beside the model, and buffers
    optimizer.pt               name of a parameter -> its moments; the state of the loss scaler
    random_state_<rank>.pt     of each process
    data_state_<rank>.json     of each process, where data are read as a stream
    state.json                 step, data, counters
"""

import hashlib
import json
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..runtime.disk import writing
from .accelerator import laid_out_like, whole
from .ema import AveragedWeights
from .run_folder import UNFINISHED, RunFolder

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
MANIFEST_NAME = "manifest.json"
HASHING_THREADS = 4  # a checkpoint has hardly more large files


def _sha256(path: Path, flush: bool = False) -> str:
    """Hash of a file's content; `flush`: make sure, too, that it is on the disk. Both leave the interpreter alone."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
    return digest


class Manifest:
    """Size and SHA-256 of every file of a folder, and the certainty that all of it is on the disk.

    Files that are `add`ed once they are complete are hashed and flushed by threads while the next ones are written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._threads, self._hashes = ThreadPoolExecutor(HASHING_THREADS), {}

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, *paths: Path) -> None:
        """Take complete files, or folders of them, of which each is then as it was."""
        for path in paths:
            for file in [path] if path.is_file() else path.rglob("*"):
                if file.is_file() and file not in self._hashes:
                    self._hashes[file] = self._threads.submit(_sha256, file, flush=True)

    def write(self) -> None:
        """Add what is there besides, and write the list. Raises: OSError if something does not reach the disk."""
        self.add(self.folder)
        files = {
            path.relative_to(self.folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest.result()}
            for path, digest in sorted(self._hashes.items())
        }
        with open(self.folder / MANIFEST_NAME, "w", encoding="utf-8") as file:
            json.dump(files, file, indent=2)
            file.flush()
            os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or differs from the manifest; None if nothing is."""
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except ValueError:
        return f"{MANIFEST_NAME} is not JSON"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(_sha256, (folder / name for name in files))
        for (name, expected), digest in zip(files.items(), digests, strict=True):
            if digest != expected["sha256"]:
                return f"the content of {name} is not what was written"
    return None


def newest_whole_checkpoint(folder: RunFolder) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that is as it was written; newer ones are named in a warning.

    Raises:
        ValueError: there are checkpoints, but every one is damaged: starting over would be a surprise.
    """
    damages = []
    for step, path in reversed(folder.checkpoints()):
        damage = find_damage(path)
        if damage is None:
            return step, path
        warnings.warn(f"{path} is damaged and not used: {damage}", stacklevel=2)
        damages.append(f"  {path.name}: {damage}")
    if damages:
        raise ValueError(
            f"every checkpoint in {folder.path} is damaged:\n"
            + "\n".join(damages)
            + "\nDelete them to train from the start, or give another output_dir"
        )
    return None


def averaged_state(run: Any, average: AveragedWeights) -> dict[str, torch.Tensor]:
    """State of the model with averages for its parameters; whole, so that every process has to call this."""
    averages = {id(p): value for p, value in zip(run.parameters, average.averages, strict=True)}
    state = run.model.state_dict(keep_vars=True)
    return {name: whole(averages.get(id(value), value)) for name, value in state.items()}


def write_model(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """What `model.save_pretrained` writes, with other weights than those in the model."""
    model.save_config(folder)
    save_file(
        {name: value.contiguous().cpu() for name, value in state.items()}, folder / WEIGHTS_NAME, {"format": "pt"}
    )


def export_averaged(run: Any, name: str) -> None:
    """Write the averaged weights as a diffusers folder of the run folder, whole or not at all; every process has to
    call this."""
    state = averaged_state(run, run.average)
    if run.is_main:
        unfinished, path = run.folder.path / f"{UNFINISHED}{name}", run.folder.path / name
        with writing(path):
            write_model(run.model, state, unfinished)
        if path.exists():
            shutil.rmtree(path)
        unfinished.rename(path)
    run.accelerator.wait_for_everyone()


def _beside_model(run: Any) -> dict[str, torch.Tensor]:
    """State of the objective that is not the model's."""
    inside = {id(t) for t in run.model.state_dict(keep_vars=True).values()}
    state = run.bare.state_dict(keep_vars=True).items()
    return {k: v.detach() for k, v in state if id(v) not in inside and not k.startswith(run.not_saved or "\0")}


def _trained_by_name(run: Any) -> dict[str, nn.Parameter]:
    trained = {id(p) for p in run.trained}
    return {name: p for name, p in run.bare.named_parameters() if id(p) in trained}


def _optimizer_state(run: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Moments by the name of the parameter, whole and on the CPU of the main process; every process has to call it."""
    states = {}
    for name, parameter in _trained_by_name(run).items():
        moments = {key: whole(value) for key, value in run.optimizer.state[parameter].items()}
        if run.is_main:
            states[name] = {key: value.cpu() for key, value in moments.items()}
    return states


def save_checkpoint(run: Any, step: int) -> None:
    """Write checkpoint-<step>; the ones before survive whatever happens meanwhile, and steps being left out.

    Raises:
        OSError: it could not be written, for example because the disk is full. What was written of it is removed; if
            it was another process than the main one that failed, by the next start.
    """
    path = run.folder.unfinished(step)
    try:
        with Manifest(path) as manifest:
            _write_checkpoint(run, step, path, manifest)
            if run.is_main:
                manifest.write()
        if run.is_main:
            # while steps are left out, what leads to that must not take the place of what came before
            limit = None if run.skipped[0] > 0 else run.config.checkpoints_total_limit
            run.folder.finish(step, limit)
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.save wrap what the disk said
        free = shutil.disk_usage(run.folder.path).free / 2**20  # torch.save does not say that there was no room
        if run.is_main:
            shutil.rmtree(path, ignore_errors=True)
        kept = [p.name for _, p in run.folder.checkpoints()]
        raise OSError(
            f"checkpoint {step} could not be written to {run.folder.path}: {error} ({free:,.0f} MiB free). "
            f"Checkpoints that are there: {', '.join(kept) or 'none'}"
        ) from error
    run.accelerator.wait_for_everyone()


def _write_checkpoint(run: Any, step: int, path: Path, manifest: Manifest) -> None:
    if run.is_main:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    run.accelerator.wait_for_everyone()
    random = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(run.device)
    torch.save(random, path / f"random_state_{run.rank}.pt")
    if run.data_state is not None:
        (path / f"data_state_{run.rank}.json").write_text(json.dumps(run.data_state()), encoding="utf-8")
    optimizer = _optimizer_state(run)
    if run.is_main:  # first, as it takes longest to hash
        scaler = None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict()
        torch.save({"optimizer": optimizer, "scaler": scaler}, path / "optimizer.pt")
        manifest.add(path / "optimizer.pt")
    del optimizer
    states = {run.model_name: lambda: {n: whole(v) for n, v in run.model.state_dict().items()}}
    for name, average in run.averages.items():
        states[name] = lambda average=average: averaged_state(run, average)
    for name, gather in states.items():  # one after the other: each may be gigabytes
        state = gather()
        if run.is_main:
            write_model(run.model, state, path / name)
            manifest.add(path / name)
        del state
    beside = {name: whole(value).contiguous() for name, value in _beside_model(run).items()}
    if run.is_main:
        save_file(beside, path / "objective.safetensors")
        state = {"step": step, "fingerprint": run.fingerprint, "seconds": run.seconds}
        state |= {"skipped": run.skipped.tolist(), "average_step": run.average.step, "processes": run.world_size}
        (path / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    run.accelerator.wait_for_everyone()


def resume(run: Any) -> None:
    """Continue from the newest checkpoint that is not damaged, with whatever number of processes it was written.

    Raises:
        ValueError: all are damaged, or it has another fingerprint.
    """
    found = [newest_whole_checkpoint(run.folder) if run.is_main else None]
    if run.world_size > 1:
        torch.distributed.broadcast_object_list(found)
    if found[0] is None:
        if run.is_main:
            run.folder.truncate_log(-1)  # nor is what was measured before training
        return
    step, path = found[0]
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    cuts = len(run.fingerprint_of) - 1
    there, now = (fingerprint.rsplit("-", cuts) for fingerprint in (state["fingerprint"], run.fingerprint))
    for name, old, new in zip(run.fingerprint_of, there, now, strict=True):
        if old != new:
            raise ValueError(
                f"{path} was trained with {name} of fingerprint {old}, what is given now has {new}: a run is resumed "
                f"with the same {name} only"
            )
    _load_weights(run, path, state)
    _load_optimizer(run, path)
    random_state = path / f"random_state_{run.rank}.pt"
    if random_state.is_file():  # else there are more processes than before; all that training draws is keyed anyway
        random = torch.load(random_state, weights_only=True)
        torch.set_rng_state(random["cpu"])
        if run.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], run.device)
    data_state = path / f"data_state_{run.rank}.json"
    if data_state.is_file():
        run.resumed_data_state = json.loads(data_state.read_text(encoding="utf-8"))
    run.skipped = torch.tensor(state["skipped"], device=run.device)
    run.first_step, run.seconds = step, state["seconds"]
    if run.is_main:
        run.folder.set_aside_after(step)
        run.folder.truncate_log(step)


def _load_weights(run: Any, path: Path, state: dict[str, Any]) -> None:
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    for name, average in run.averages.items():
        averaged = load_file(path / name / WEIGHTS_NAME)
        averages = [averaged[key].float() for key in names]
        average.averages = [laid_out_like(v, p) for v, p in zip(averages, run.parameters, strict=True)]
        average.step = state["average_step"]
    with torch.no_grad():
        saved = load_file(path / run.model_name / WEIGHTS_NAME)
        current = run.model.state_dict()
        if saved.keys() != current.keys():
            raise ValueError(
                f"{path / run.model_name} and the model differ in {sorted(saved.keys() ^ current.keys())}"
            )
        beside = _beside_model(run)
        for target, values in ((current, saved), (beside, load_file(path / "objective.safetensors"))):
            for name, value in values.items():
                target[name].copy_(laid_out_like(value, target[name]))


def _load_optimizer(run: Any, path: Path) -> None:
    # mapped: else the moments would take room in the host's memory once for every process
    saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    for name, parameter in _trained_by_name(run).items():
        run.optimizer.state[parameter] = {
            key: laid_out_like(value, parameter) if value.shape == parameter.shape else value.to(run.device)
            for key, value in saved["optimizer"][name].items()
        }
    if saved["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
