"""Checkpoints of a training run: written atomically, checked for damage, resumed bit for bit.

The state is copied to host memory, from where a thread writes it: under a temporary name, flushed to disk, with the
size and hash of every file in `manifest.json`, and renamed at the end. The content depends neither on the number of
processes nor on whether the weights were sharded:

    <model>/, <model>_ema/     diffusers folders, which from_pretrained loads
    <model>_ema_<decay>/       the same for every further decay of the averages
    objective.safetensors      trained parameters outside the model, and buffers
    optimizer.pt               name of a parameter -> its state in the optimiser; the state of the loss scaler
    random_state_<rank>.pt     of each process
    data_state_<rank>.json     position of each process in the data, if they are read as a stream
    state.json                 step, data and where they were, counters
"""

import contextlib
import copy
import json
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..runtime.config import config_to_dict, flatten_config
from ..runtime.disk import file_sha256, read_json, replacing_saved, sync
from ..runtime.processes import PATIENCE, this_process, wait_for_everyone
from ..runtime.tensor_files import read_safetensors, read_torch
from .optimisation import AveragedWeights, laid_out_like, whole
from .run_folder import RunFolder

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
MANIFEST_NAME = "manifest.json"
HASHING_THREADS = 4  # a checkpoint has hardly more large files


def _flushed_sha256(path: Path) -> str:
    """Flush a file to disk and hash it. Neither holds the GIL, so that threads do it in parallel."""
    sync(path)
    return file_sha256(path)


class Manifest:
    """Size and SHA-256 of every file of a folder, each of which is flushed to disk.

    Threads hash and flush the files given to `add` while the next ones are written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._threads, self._hashes = ThreadPoolExecutor(HASHING_THREADS), {}

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, *paths: Path) -> None:
        """Hash and flush files, or all files in folders; they must be complete and not change any more."""
        for path in paths:
            for file in [path] if path.is_file() else path.rglob("*"):
                if file.is_file() and file not in self._hashes:
                    self._hashes[file] = self._threads.submit(_flushed_sha256, file)

    def write(self) -> None:
        """Add the remaining files of the folder, write the manifest. Raises: OSError if a file cannot be flushed."""
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
    """(step, folder) of the newest undamaged checkpoint, with a warning for each newer one; None without checkpoints.

    Raises: ValueError if every checkpoint is damaged: a run must not start over without being told to.
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


def data_place(config: Any) -> str | None:
    """The folder, files or source of a run's data, for messages; None if its configuration names none."""
    settings = flatten_config(config_to_dict(config))
    found = (settings.get(name) for name in ("latents", "data.data_files", "data.source"))
    return next(filter(None, found), None)


@dataclass
class TrainingState:
    """What a checkpoint holds: everything that decides how a run goes on.

    Attributes:
        model: diffusers model, saved as `<model_name>`.
        averages: name -> averages of the model's parameters.
        objective: the trained module, which contains the model.
        not_saved: prefixes of state-dict keys of `objective` to leave out: their weights come from elsewhere.
        optimizer, scaler: AdamW or `MuonWithAdamW`, and the loss scaler of fp16.
        fingerprint: hashes of what the run learns from, joined by "-"; `fingerprint_of` names them in errors.
        skipped: (2,) steps skipped, in a row and in total.
        step, seconds: steps done, and the time training them took.
        data_state: for data read as a stream: returns the position of this process, to be saved.
        resumed_data_state: that position from the checkpoint that was resumed.
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
        """State dict of the objective without the model and without `not_saved`."""
        inside = {id(t) for t in self.model.state_dict(keep_vars=True).values()}
        state = self.objective.state_dict(keep_vars=True).items()
        return {k: v.detach() for k, v in state if id(v) not in inside and not k.startswith(self.not_saved or "\0")}

    def trained_by_name(self) -> dict[str, nn.Parameter]:
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.objective.named_parameters() if id(p) in trained}

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Name of a parameter -> its moments of AdamW or momentum of Muon, unsharded, on the CPU of the main process;
        every process has to call this."""
        state, trained = self.optimizer.state, self.trained_by_name().items()
        return {name: _copies({key: whole(value) for key, value in state[p].items()}) for name, p in trained}


@dataclass
class Snapshot:
    """A copy in host memory of what a checkpoint holds; of `model` only the configuration is used."""

    model: Any
    optimizer: dict[str, Any]
    models: dict[str, dict[str, torch.Tensor]]
    beside: dict[str, torch.Tensor]
    record: dict[str, Any]


def averaged_state(model: Any, average: AveragedWeights) -> dict[str, torch.Tensor]:
    """State dict of the model with averages in place of its parameters, unsharded: every process has to call this."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages = {id(p): value for p, value in zip(parameters, average.averages, strict=True)}
    state = model.state_dict(keep_vars=True)
    return {name: whole(averages.get(id(value), value)) for name, value in state.items()}


def write_model(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what `model.save_pretrained` would, but with the weights in `state`."""
    model.save_config(folder)
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / WEIGHTS_NAME, {"format": "pt"})


def export_averaged(model: Any, average: AveragedWeights, path: Path) -> None:
    """Write averaged weights as a diffusers folder, in place of an earlier one. Every process has to call this."""
    state = averaged_state(model, average)
    if this_process()[0] == 0:
        with replacing_saved(path) as unfinished:
            write_model(model, state, unfinished)
    wait_for_everyone()


class CheckpointWriter:
    """Writes checkpoint-<step> in a thread: training waits only while the state is copied to host memory.

    Earlier checkpoints survive a write that fails, and are kept while steps are being skipped. A failure is raised by
    the next `save` or `wait`. A program that ends with an exception first waits for the write in progress, in every
    process: once one has ended, launchers give the others little time.
    """

    def __init__(self, folder: RunFolder):
        self.folder, self._thread, self._writing = folder, ThreadPoolExecutor(1), None
        self._awaited: Path | None = None  # what the main process writes, in the others

    def save(self, state: TrainingState, limit: int | None) -> None:
        """Wait for the previous checkpoint, copy the state and begin to write it; every process has to call this.

        Args: `limit`: how many checkpoints to keep.
        Raises: OSError: this or the previous checkpoint could not be written, for example because the disk is full.
            Its partial files are removed, at once if the main process failed, else at the next start.
        """
        self.wait()
        with _reporting_failure(state.step, self.folder):
            snapshot = _take_snapshot(state, self.folder.unfinished(state.step))
        if snapshot is not None:
            snapshot.record["data"] = data_place(self.folder.config)
            # while steps are being skipped, delete no checkpoint: the older ones may be the only healthy ones
            limit = None if state.skipped[0] > 0 else limit
            self._writing = self._thread.submit(_write_snapshot, snapshot, state.step, self.folder, limit)
        else:
            self._awaited = self.folder.unfinished(state.step)

    def wait(self) -> None:
        """Wait for the write in progress; every process has to call this. Raises: OSError if it failed."""
        writing, self._writing, self._awaited = self._writing, None, None
        if writing is not None:
            writing.result()
        wait_for_everyone()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.settle()

    def settle(self) -> None:
        """Wait for the write in progress; a process may call this alone. It raises nothing: `wait` raises failures."""
        if self._writing is not None:
            self._writing.exception()
        last = time.monotonic() + PATIENCE.total_seconds()
        while self._awaited is not None and self._awaited.exists() and time.monotonic() < last:
            time.sleep(0.1)


@contextlib.contextmanager
def _reporting_failure(step: int, folder: RunFolder) -> Iterator[None]:
    """Turn a failure to write a checkpoint into an OSError that names it, and remove its partial files."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.save wrap the system's error
        free = shutil.disk_usage(folder.path).free / 2**20  # torch.save does not say that the disk is full
        if this_process()[0] == 0:
            shutil.rmtree(folder.unfinished(step), ignore_errors=True)
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:  # of a device, of other processes
            raise
        kept = [p.name for _, p in folder.checkpoints()]
        raise OSError(
            f"checkpoint {step} could not be written to {folder.path}: {error} ({free:,.0f} MiB free). "
            f"Checkpoints that are there: {', '.join(kept) or 'none'}"
        ) from error


def _take_snapshot(state: TrainingState, path: Path) -> Snapshot | None:
    """Copy what the main process will write; None on the others. Every process has to call this: each writes its own
    random state, and its position in streamed data, into the unfinished checkpoint."""
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
    for name, average in state.averages.items():  # one at a time: each may take gigabytes on the device
        models[name] = _copies(averaged_state(state.model, average))
    beside = _copies({name: whole(value) for name, value in state.beside_model().items()})
    scaler = None if state.scaler is None else copy.deepcopy(state.scaler.state_dict())
    record = {"step": state.step, "fingerprint": state.fingerprint, "seconds": state.seconds}
    record |= {"skipped": state.skipped.tolist(), "average_step": next(iter(state.averages.values())).step}
    wait_for_everyone()  # every process has written its files
    if rank != 0:
        return None
    optimizer, record = {"optimizer": moments, "scaler": scaler}, record | {"processes": processes}
    return Snapshot(state.model, optimizer, models, beside, record)


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies in host memory, on the main process only."""
    if this_process()[0] != 0:
        return {}
    return {name: torch.empty(value.shape, dtype=value.dtype).copy_(value) for name, value in tensors.items()}


def _write_snapshot(snapshot: Snapshot, step: int, folder: RunFolder, limit: int | None) -> None:
    path = folder.unfinished(step)
    with _reporting_failure(step, folder), Manifest(path) as manifest:
        torch.save(snapshot.optimizer, path / "optimizer.pt")  # first, as it takes longest to hash
        manifest.add(path / "optimizer.pt")
        for name, weights in snapshot.models.items():
            write_model(snapshot.model, weights, path / name)
            manifest.add(path / name)
        save_file(snapshot.beside, path / "objective.safetensors")
        (path / "state.json").write_text(json.dumps(snapshot.record, indent=2), encoding="utf-8")
        manifest.write()
        folder.finish(step, limit)


def find_resumed(
    folder: RunFolder, fingerprint: str, fingerprint_of: tuple[str, ...], older: Collection[str] = ()
) -> tuple[int, Path] | None:
    """(step, folder) of the checkpoint that a run goes on from, the newest undamaged one; None: it starts anew.

    Args: `fingerprint`, `fingerprint_of`, `older`: as of `TrainingRun`.
    Raises: ValueError: all checkpoints are damaged, or the newest has another fingerprint.
    """
    if (found := newest_whole_checkpoint(folder)) is None:
        return None
    _, path = found
    record = read_json(path / "state.json")
    if record["fingerprint"] in older:
        return found
    there, now = (text.rsplit("-", len(fingerprint_of) - 1) for text in (record["fingerprint"], fingerprint))
    # the first part is that of the data; older checkpoints do not know their place
    places = {fingerprint_of[0]: (record.get("data"), data_place(folder.config))}
    for name, *hashes in zip(fingerprint_of, there, now, strict=True):
        if hashes[0] != hashes[1]:
            known = [f"{place}, " if place else "" for place in places.get(name, (None, None))]
            old, new = (f"{place}fingerprint {found}" for place, found in zip(known, hashes, strict=True))
            raise ValueError(
                f"{path} was trained with {name} of {old}, not of {new}: a run is resumed with the same {name} only. "
                "Give those again, or another output_dir"
            )
    return found


def resume(state: TrainingState, folder: RunFolder, found: tuple[int, Path] | None) -> None:
    """Load a checkpoint, whatever number of processes wrote it. Args: `found`: as of `find_resumed`."""
    rank, _ = this_process()
    if found is None:
        if rank == 0:
            folder.truncate_log(-1)  # measurements before training are made again, too
        return
    step, path = found
    record = read_json(path / "state.json")
    _load_weights(state, path, record["average_step"])
    _load_optimizer(state, path)
    random_state = path / f"random_state_{rank}.pt"
    if random_state.is_file():  # missing with more processes than before; training does not draw from it anyway
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
        beside, wanted = read_safetensors(path / "objective.safetensors"), state.beside_model()
        if beside.keys() != wanted.keys():
            differing = sorted(beside.keys() ^ wanted.keys())
            raise ValueError(f"{path / 'objective.safetensors'} and the objective differ in {differing}")
        for target, values in ((current, saved), (wanted, beside)):
            for name, value in values.items():
                target[name].copy_(laid_out_like(value, target[name]))


def _load_optimizer(state: TrainingState, path: Path) -> None:
    # memory-mapped: else every process would hold its own copy of the moments in host memory
    saved = read_torch(path / "optimizer.pt", mmap=True)
    for name, parameter in state.trained_by_name().items():
        state.optimizer.state[parameter] = {
            key: laid_out_like(value, parameter) if value.shape == parameter.shape else value.to(state.device)
            for key, value in saved["optimizer"][name].items()
        }
    if saved["scaler"] is not None:
        state.scaler.load_state_dict(saved["scaler"])
