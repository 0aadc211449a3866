"""Run folder of a training run: configuration and lock, log, sample pictures, checkpoints."""

import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from ..runtime import folder_lock
from ..runtime.config import config_to_dict, flatten_config, save_config, setting_differences, settings_of
from ..runtime.disk import is_unfinished, log_lines, read_log, remove, replacing, sync_folder, write_text, writing
from ..runtime.processes import print_once, this_process
from ..runtime.yaml_files import read_yaml

Found = TypeVar("Found")

PATIENCE = 60.0  # seconds; NFS caches a folder no longer, unless mount options say otherwise
UNFINISHED = ".unfinished-"  # prefix of what is being written or deleted: never read, and `claim` removes it


class RunFolder:
    """A folder that belongs to one configuration: config.yaml, log.jsonl, samples/ and checkpoint-N/. Names beginning
    with .unfinished- were being written or deleted; damaged-checkpoint-N/ was found damaged, and is kept for a look.

    Creating the object only reads. `claim` writes, and locks the folder until `release` or the end of the process (see
    folder_lock.py). `config.changeable_keys()` names what may differ on resuming.

    A run that failed before its first step has nothing to lose: another configuration may replace it.

    Raises: ValueError: another process trains in the folder (only the main process checks that), or the folder holds a
        run of another configuration (the differing keys are named), a run that already has more steps than
        max_train_steps, or files that no run wrote.
    """

    def __init__(self, path: str | Path, config: Any):
        self.path, self.config = Path(path), config
        if this_process()[0] == 0:
            folder_lock.check_free(self.path)
        self._check_content()

    def _check_content(self) -> None:
        if (self.path / "config.yaml").is_file():
            if self._has_trained():
                self._keep_older_settings()
                self._compare()
                self._compare_steps()
        elif self.path.exists() and (not self.path.is_dir() or self._holds_files()):
            raise ValueError(f"{self.path} exists and holds no run (no config.yaml): give a new or an empty folder")

    def _holds_files(self) -> bool:
        names = {path.name for path in self.path.iterdir()} - {folder_lock.LOCK_NAME}
        return any(not name.startswith(UNFINISHED) and not is_unfinished(self.path / name) for name in names)

    def _has_trained(self) -> bool:
        if any(self.path.glob("*checkpoint-*")):
            return True
        return (self.path / "log.jsonl").is_file() and any(record["step"] > 0 for record in self.read_log())

    def _differences(self) -> list[str]:
        """A line for every key that differs from the saved configuration and may not. A setting that is younger than
        the saved one has to be at its default."""
        old = flatten_config(read_yaml(self.path / "config.yaml"))
        new, free = flatten_config(config_to_dict(self.config)), self.config.changeable_keys()
        for key, section, field in settings_of(self.config):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            new_at_default = key not in old and getattr(section, field.name) == default
            if new_at_default or "before" in field.metadata:
                free.add(key)
        old, new = (
            {k: v for k, v in values.items() if k not in free and k.partition(".")[0] not in free}
            for values in (old, new)
        )
        return setting_differences(old, new)

    def _keep_older_settings(self) -> None:
        """A run that began before a setting existed keeps its behaviour, the value `before`: see `setting`."""
        old = flatten_config(read_yaml(self.path / "config.yaml"))
        for key, section, field in settings_of(self.config):
            if "before" not in field.metadata:
                continue
            value = old.get(key, field.metadata["before"])
            if value != getattr(section, field.name):
                setattr(section, field.name, value)
                print_once(f"{key} stays {value}, with which the run in {self.path} began")

    def _compare(self) -> None:
        if lines := self._differences():
            longer = ""
            if any(line.startswith("  max_train_steps:") for line in lines):
                longer = (
                    "The learning rate or another schedule of this run ends at max_train_steps, which is fixed once "
                    "training has begun: to train longer, give a new output_dir and start from its weights "
                    "(initial_transformer of train_dit/train.py). "
                )
            raise ValueError(f"{longer}{self.path} holds the run of another configuration:\n" + "\n".join(lines))

    def _compare_steps(self) -> None:
        newest, wanted = max((step for step, _ in self.checkpoints()), default=0), self.config.max_train_steps
        if newest > wanted:
            raise ValueError(
                f"max_train_steps is {wanted}, but {self.path} has trained for {newest} steps: expected at least as "
                "many, or another output_dir"
            )

    def claim(self, check: Callable[[], Found] = lambda: None) -> Found:
        """Create and lock the folder, write the resolved configuration, remove what interrupted writing left behind.

        To be called by one process of a run.

        Args: `check`: called before anything of an earlier run is changed; may raise. Returns: what it returns.
        Raises: ValueError if another run was faster.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        folder_lock.acquire(self.path)
        self._check_content()  # another run may have come and gone since this one looked
        found = check()
        with replacing(self.path / "config.yaml") as unfinished:  # a kill must not leave half a configuration
            save_config(self.config, unfinished)
        for entry in (*self.path.iterdir(), *self.path.glob("samples/.*")):
            if entry.name.startswith(UNFINISHED) or is_unfinished(entry):
                remove(entry)
        return found

    def check_shared(self, patience: float = PATIENCE) -> None:
        """Check that this process sees the folder that the main process has claimed.

        Args: `patience`: seconds that a network file system may take to show it.
        Raises: ValueError if it does not: this process then runs on another machine, which has no such folder, or a
            folder of its own with another configuration.
        """
        last = time.monotonic() + patience
        while not (self.path / "config.yaml").is_file() or self._differences():
            if time.monotonic() > last:
                raise ValueError(
                    f"{self.path}, which the main process has made, is not there for process {this_process()[0]} on "
                    f"{socket.gethostname()}: expected a folder that all machines share"
                )
            time.sleep(0.5)

    def release(self) -> None:
        """Unlock the folder."""
        folder_lock.release(self.path)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, oldest first."""
        found = []
        for entry in self.path.glob("checkpoint-*"):
            match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
            if match and entry.is_dir():
                found.append((int(match[1]), entry))
        return sorted(found)

    def unfinished(self, step: int) -> Path:
        """Where a checkpoint is written until `finish` renames it: a name that resuming never looks at."""
        return self.path / f"{UNFINISHED}checkpoint-{step}"

    def finish(self, step: int, limit: int | None) -> None:
        """Give a completely written checkpoint its name and delete the oldest beyond `limit`."""
        self.unfinished(step).rename(self.path / f"checkpoint-{step}")
        sync_folder(self.path)  # the new name is on the disk before anything older is deleted
        if limit is not None:
            for old_step, oldest in self.checkpoints()[:-limit]:
                doomed = self.unfinished(old_step)
                oldest.rename(doomed)  # a half-deleted folder must not look like a checkpoint
                shutil.rmtree(doomed)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after a step, which were found damaged, to damaged-checkpoint-N: they no longer count
        among those to keep, and training can write that step again."""
        for later, path in self.checkpoints():
            if later > step:
                aside, count = path.with_name(f"damaged-{path.name}"), 1
                while aside.exists():  # keeps one of an earlier attempt at the step
                    aside, count = path.with_name(f"damaged-{path.name}-{count + 1}"), count + 1
                path.rename(aside)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        path = self.path / "log.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The records of log.jsonl, see `disk.read_log`."""
        return read_log(self.path / "log.jsonl")

    def truncate_log(self, step: int) -> None:
        """Delete the lines after a step: they will be written again. Raises: as `read_log`."""
        path = self.path / "log.jsonl"
        if path.is_file():
            kept = b"".join(line for line, record in log_lines(path) if record["step"] <= step)
            write_text(path, kept.decode("utf-8"))

    def samples(self, step: int, name: str = "step") -> Path:
        """Path of the picture made at a step."""
        return self.path / "samples" / f"{name}-{step:08d}.png"
