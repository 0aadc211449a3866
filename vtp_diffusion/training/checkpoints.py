"""Checkpoints of a training run: written whole or not at all, told from torn ones, resumed bit for bit.

A checkpoint is copied to the memory of the host, where a thread writes it: under another name, flushed to the disk,
listed with sizes and hashes in `manifest.json`, and renamed at last. Whatever the processes were, and whether their
weights were whole or sharded, its content is the same:

    <model>/, <model>_ema/     diffusers folders, which from_pretrained loads
    <model>_ema_<decay>/       the same for every further decay of the averages
    objective.safetensors      what is trained beside the model, and buffers
    optimizer.pt               name of a parameter -> its moments; the state of the loss scaler
    random_state_<rank>.pt     of each process
    data_state_<rank>.json     of each process, where data are read as a stream
    state.json                 step, data, counters
"""

import contextlib
import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..models.conversion import read_safetensors
from ..runtime.disk import file_sha256, read_json, sync, writing
from ..runtime.processes import from_main, this_process, wait_for_everyone
from ..runtime.tensor_files import read_torch
from .optimisation import AveragedWeights, laid_out_like, whole
from .run_folder import UNFINISHED, RunFolder

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
MANIFEST_NAME = "manifest.json"
HASHING_THREADS = 4  # a checkpoint has hardly more large files


def _flushed_sha256(path: Path) -> str:
    """Hash of a file that is then on the disk. Both leave the interpreter alone."""
    sync(path)
    return file_sha256(path)


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
                    self._hashes[file] = self._threads.submit(_flushed_sha256, file)

    def write(self) -> None:
        """Add what is there besides, and write the list. Raises: OSError if something does not reach the disk."""
        self.add(self.folder)
        files = {
            path.relative_to(self.folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest.result()}
            for path, digest in sorted(self._hashes.items())
        }
        (self.folder / MANIFEST_NAME).write_text(json.dumps(files, indent=2), encoding="utf-8")
        sync(self.folder / MANIFEST_NAME)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or differs from the manifest; None if nothing is."""
    try:
        files = read_json(folder / MANIFEST_NAME)
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except ValueError as error:
        return str(error).removeprefix(f"{folder}/")
    for name, expected in files.items():
        path = folder / name
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            return f"{MANIFEST_NAME} says {str(expected)[:40]!r} of {name}, expected its bytes and sha256"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(file_sha256, (folder / name for name in files))
        for (name, expected), digest in zip(files.items(), digests, strict=True):
            if digest != expected["sha256"]:
                return f"the content of {name} is not what was written"
    return None


def newest_whole_checkpoint(folder: RunFolder) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that is as it was written; newer ones are named in a warning.

    Raises: ValueError: there are checkpoints, but every one is damaged: starting over would be a surprise.
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


@dataclass
class TrainingState:
    """What a checkpoint holds: everything that decides how a run goes on.

    Attributes:
        model: diffusers model, held as `<model_name>`.
        averages: name -> averages of the model's parameters.
        objective: what is trained, with the model inside it.
        not_saved: prefixes of state-dict keys of `objective` that are rebuilt from elsewhere.
        optimizer, scaler: AdamW, and the loss scaler of fp16.
        fingerprint: of the training data; `fingerprint_of` names its parts, which have "-" between them.
        skipped: (2,) steps left out, in a row and altogether.
        step, seconds: done, and of training.
        data_state: where data are read as a stream, gives the position of this process for a checkpoint.
        resumed_data_state: that of the checkpoint that was resumed.
    """

    model: Any
    model_name: str
    averages: dict[str, AveragedWeights]
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    fingerprint: str
    fingerprint_of: tuple[str, ...]
    not_saved: tuple[str, ...]
    skipped: torch.Tensor
    step: int = 0
    seconds: float = 0.0
    data_state: Callable[[], dict[str, Any]] | None = None
    resumed_data_state: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return self.skipped.device

    def beside_model(self) -> dict[str, torch.Tensor]:
        """State of the objective that is not the model's."""
        inside = {id(t) for t in self.model.state_dict(keep_vars=True).values()}
        state = self.objective.state_dict(keep_vars=True).items()
        return {k: v.detach() for k, v in state if id(v) not in inside and not k.startswith(self.not_saved or "\0")}

    def trained_by_name(self) -> dict[str, nn.Parameter]:
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.objective.named_parameters() if id(p) in trained}

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """AdamW's moments by the name of the parameter, whole and copied to the CPU of the main process; every process
        has to call it."""
        state, trained = self.optimizer.state, self.trained_by_name().items()
        return {name: _copies({key: whole(value) for key, value in state[p].items()}) for name, p in trained}


@dataclass
class Snapshot:
    """Copies of what a checkpoint holds, of one step, in the memory of the host; `model` gives its configuration."""

    model: Any
    optimizer: dict[str, Any]
    models: dict[str, dict[str, torch.Tensor]]
    beside: dict[str, torch.Tensor]
    record: dict[str, Any]


def averaged_state(model: Any, average: AveragedWeights) -> dict[str, torch.Tensor]:
    """State of the model with averages for its parameters; whole, so that every process has to call this."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages = {id(p): value for p, value in zip(parameters, average.averages, strict=True)}
    state = model.state_dict(keep_vars=True)
    return {name: whole(averages.get(id(value), value)) for name, value in state.items()}


def write_model(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """What `model.save_pretrained` writes, with other weights than those in the model."""
    model.save_config(folder)
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / WEIGHTS_NAME, {"format": "pt"})


def export_averaged(model: Any, average: AveragedWeights, path: Path) -> None:
    """Write averaged weights as a diffusers folder, whole or not at all; one that is there is replaced. Every process
    has to call this."""
    state = averaged_state(model, average)
    if this_process()[0] == 0:
        unfinished, before = (path.with_name(f"{UNFINISHED}{kind}{path.name}") for kind in ("", "old-"))
        with writing(path):
            write_model(model, state, unfinished)
        if path.exists():
            path.rename(before)  # not removed before the new one is there
        unfinished.rename(path)
        shutil.rmtree(before, ignore_errors=True)
    wait_for_everyone()


class CheckpointWriter:
    """Writes checkpoint-<step> in a thread, from copies in the memory of the host: training waits for these alone.

    The checkpoints before survive whatever happens meanwhile, and steps being left out. What fails is raised by the
    next `save` or `wait`. A program that ends by an exception ends after what is being written is.
    """

    def __init__(self, folder: RunFolder):
        self.folder, self._thread, self._writing = folder, ThreadPoolExecutor(1), None

    def save(self, state: TrainingState, limit: int | None) -> None:
        """Copy the state and begin to write it, once the checkpoint before is written; for every process.

        Args: `limit`: how many to keep.
        Raises: OSError: this one or the one before could not be written, for example because the disk is full. What
            was written of it is removed; if it was another process than the main one that failed, by the next start.
        """
        self.wait()
        with _named(state.step, self.folder):
            snapshot = _take_snapshot(state, self.folder.unfinished(state.step))
        if snapshot is not None:
            # while steps are left out, what leads to that must not take the place of what came before
            limit = None if state.skipped[0] > 0 else limit
            self._writing = self._thread.submit(_write_snapshot, snapshot, state.step, self.folder, limit)

    def wait(self) -> None:
        """Until what is being written is there; for every process. Raises: OSError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        wait_for_everyone()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writing is not None:
            self._writing.exception()  # waits; `wait` raises it


@contextlib.contextmanager
def _named(step: int, folder: RunFolder) -> Iterator[None]:
    """What the disk does not take of a checkpoint is removed and named."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.save wrap what the disk said
        free = shutil.disk_usage(folder.path).free / 2**20  # torch.save does not say that there was no room
        if this_process()[0] == 0:
            shutil.rmtree(folder.unfinished(step), ignore_errors=True)
        if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError too, but of the device
            raise
        kept = [p.name for _, p in folder.checkpoints()]
        raise OSError(
            f"checkpoint {step} could not be written to {folder.path}: {error} ({free:,.0f} MiB free). "
            f"Checkpoints that are there: {', '.join(kept) or 'none'}"
        ) from error


def _take_snapshot(state: TrainingState, path: Path) -> Snapshot | None:
    """What the main process is to write, copied; None on the others. Every process has to call it: each writes its
    random state, and its place in the data, into the unfinished checkpoint."""
    rank, processes = this_process()
    if rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    wait_for_everyone()
    random = {"cpu": torch.get_rng_state()}
    if state.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(state.device)
    torch.save(random, path / f"random_state_{rank}.pt")
    if state.data_state is not None:
        (path / f"data_state_{rank}.json").write_text(json.dumps(state.data_state()), encoding="utf-8")
    moments = state.moments()
    models = {state.model_name: _copies({n: whole(v) for n, v in state.model.state_dict().items()})}
    for name, average in state.averages.items():  # one after the other: each may be gigabytes of the device
        models[name] = _copies(averaged_state(state.model, average))
    beside = _copies({name: whole(value) for name, value in state.beside_model().items()})
    scaler = None if state.scaler is None else copy.deepcopy(state.scaler.state_dict())
    record = {"step": state.step, "fingerprint": state.fingerprint, "seconds": state.seconds}
    record |= {"skipped": state.skipped.tolist(), "average_step": next(iter(state.averages.values())).step}
    wait_for_everyone()  # all have written theirs
    if rank != 0:
        return None
    optimizer, record = {"optimizer": moments, "scaler": scaler}, record | {"processes": processes}
    return Snapshot(state.model, optimizer, models, beside, record)


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, in memory of their own on the host, for the main process alone."""
    if this_process()[0] != 0:
        return {}
    return {name: torch.empty(value.shape, dtype=value.dtype).copy_(value) for name, value in tensors.items()}


def _write_snapshot(snapshot: Snapshot, step: int, folder: RunFolder, limit: int | None) -> None:
    path = folder.unfinished(step)
    with _named(step, folder), Manifest(path) as manifest:
        torch.save(snapshot.optimizer, path / "optimizer.pt")  # first, as it takes longest to hash
        manifest.add(path / "optimizer.pt")
        for name, weights in snapshot.models.items():
            write_model(snapshot.model, weights, path / name)
            manifest.add(path / name)
        save_file(snapshot.beside, path / "objective.safetensors")
        (path / "state.json").write_text(json.dumps(snapshot.record, indent=2), encoding="utf-8")
        manifest.write()
        folder.finish(step, limit)


def resume(state: TrainingState, folder: RunFolder) -> None:
    """Continue from the newest checkpoint that is not damaged, with whatever number of processes it was written.

    Raises: ValueError: all are damaged, or it has another fingerprint.
    """
    rank, _ = this_process()
    found = from_main(lambda: newest_whole_checkpoint(folder))
    if found is None:
        if rank == 0:
            folder.truncate_log(-1)  # nor is what was measured before training
        return
    step, path = found
    record = read_json(path / "state.json")
    cuts = len(state.fingerprint_of) - 1
    there, now = (fingerprint.rsplit("-", cuts) for fingerprint in (record["fingerprint"], state.fingerprint))
    for name, old, new in zip(state.fingerprint_of, there, now, strict=True):
        if old != new:
            raise ValueError(
                f"{path} was trained with {name} of fingerprint {old}, what is given now has {new}: a run is resumed "
                f"with the same {name} only"
            )
    _load_weights(state, path, record["average_step"])
    _load_optimizer(state, path)
    random_state = path / f"random_state_{rank}.pt"
    if random_state.is_file():  # else there are more processes than before; all that training draws is keyed anyway
        random = read_torch(random_state)
        torch.set_rng_state(random["cpu"])
        if state.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], state.device)
    data_state = path / f"data_state_{rank}.json"
    if data_state.is_file():
        state.resumed_data_state = read_json(data_state)
    state.skipped.copy_(torch.tensor(record["skipped"]))
    state.step, state.seconds = step, record["seconds"]
    if rank == 0:
        folder.set_aside_after(step)
        folder.truncate_log(step)


def _load_weights(state: TrainingState, path: Path, average_step: int) -> None:
    trained = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    for name, average in state.averages.items():
        averaged = read_safetensors(path / name / WEIGHTS_NAME)
        average.averages = [laid_out_like(averaged[key].float(), p) for key, p in trained.items()]
        average.step = average_step
    with torch.no_grad():
        saved = read_safetensors(path / state.model_name / WEIGHTS_NAME)
        current = state.model.state_dict()
        if saved.keys() != current.keys():
            raise ValueError(f"{path / state.model_name} and model differ in {sorted(saved.keys() ^ current.keys())}")
        beside = read_safetensors(path / "objective.safetensors")
        for target, values in ((current, saved), (state.beside_model(), beside)):
            for name, value in values.items():
                target[name].copy_(laid_out_like(value, target[name]))


def _load_optimizer(state: TrainingState, path: Path) -> None:
    # mapped: else the moments would take room in the host's memory once for every process
    saved = read_torch(path / "optimizer.pt", mmap=True)
    for name, parameter in state.trained_by_name().items():
        state.optimizer.state[parameter] = {
            key: laid_out_like(value, parameter) if value.shape == parameter.shape else value.to(state.device)
            for key, value in saved["optimizer"][name].items()
        }
    if saved["scaler"] is not None:
        state.scaler.load_state_dict(saved["scaler"])
