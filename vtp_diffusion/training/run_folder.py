"""Run folder of a training run: configuration and lock, log, sample pictures, checkpoints."""

import json
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from ..runtime import folder_lock
from ..runtime.config import config_to_dict, flatten_config, save_config, setting_differences, settings_of
from ..runtime.disk import is_unfinished, log_lines, read_log, replacing, sync_folder, write_text, writing
from ..runtime.processes import this_process
from ..runtime.yaml_files import read_yaml

PATIENCE = 60.0  # seconds that NFS caches a folder at most, unless mount options say otherwise
UNFINISHED = ".unfinished-"  # what begins so was being written or deleted: nobody reads it, `claim` removes it


class RunFolder:
    """A folder that belongs to one configuration: config.yaml, log.jsonl, samples/ and checkpoint-N/. What begins with
    .unfinished- was being written or deleted; damaged-checkpoint-N/ was found so, and is left for you to look at.

    Creating the object only looks; `claim` writes, from then on the folder is locked until `release` or the end of the
    process (see folder_lock.py). `config.changeable_keys()` names what may differ on resuming.

    A start that failed before its first step leaves a configuration, and what was measured before training, but
    nothing to lose: another configuration may take its place.

    Raises: ValueError: another process trains in the folder (the main process of a run looks), or it holds the run of
        another configuration (the differing keys are named), a run that has gone on longer than this one is to, or
        files that no run wrote.
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
        """A line for every key of the saved configuration that differs and may not; what was no setting yet has to be
        at its default."""
        old = flatten_config(read_yaml(self.path / "config.yaml"))
        new, free = flatten_config(config_to_dict(self.config)), self.config.changeable_keys()
        for key, section, field in settings_of(self.config):
            as_ever = key not in old and getattr(section, field.name) == field.default
            if as_ever or "before" in field.metadata:
                free.add(key)
        old, new = (
            {k: v for k, v in values.items() if k not in free and k.partition(".")[0] not in free}
            for values in (old, new)
        )
        return setting_differences(old, new)

    def _keep_older_settings(self) -> None:
        """What the run in the folder did before there was a setting for it, it goes on with: see `setting`."""
        old = flatten_config(read_yaml(self.path / "config.yaml"))
        for key, section, field in settings_of(self.config):
            if "before" not in field.metadata:
                continue
            value = old.get(key, field.metadata["before"])
            if value != getattr(section, field.name):
                setattr(section, field.name, value)
                if this_process()[0] == 0:
                    print(f"{key} stays {value}, with which the run in {self.path} began")

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

    def claim(self) -> None:
        """Create and lock the folder, write the resolved configuration, remove what interrupted writing left behind.

        To be called by one process of a run. Raises: ValueError if another one was faster.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        folder_lock.acquire(self.path)
        self._check_content()  # another run may have come and gone since this one looked
        with replacing(self.path / "config.yaml") as unfinished:  # a kill must not leave half of whose folder it is
            save_config(self.config, unfinished)
        for entry in self.path.iterdir():
            if entry.name.startswith(UNFINISHED) or is_unfinished(entry):
                entry.unlink() if entry.is_file() else shutil.rmtree(entry)

    def check_shared(self, patience: float = PATIENCE) -> None:
        """For every process, once one has claimed the folder.

        Args: `patience`: seconds that a network file system may take to show it.
        Raises: ValueError if it is not there for this process, which runs on another machine, or holds the
            configuration of a start that failed there.
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
        """Let another process work in the folder."""
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
                oldest.rename(doomed)  # half deleted it must not look like a checkpoint
                shutil.rmtree(doomed)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after a step, which were found damaged, to damaged-checkpoint-N: so they take no
        place among those that are kept, nor the place of one that is written again."""
        for later, path in self.checkpoints():
            if later > step:
                aside, count = path.with_name(f"damaged-{path.name}"), 1
                while aside.exists():  # of an earlier attempt at the step: there may be something to learn from it
                    aside, count = path.with_name(f"damaged-{path.name}-{count + 1}"), count + 1
                path.rename(aside)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        path = self.path / "log.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """See the function."""
        return read_log(self.path / "log.jsonl")

    def truncate_log(self, step: int) -> None:
        """Forget the lines after a step: they will be written again. Raises: as `read_log`."""
        path = self.path / "log.jsonl"
        if path.is_file():
            kept = b"".join(line for line, record in log_lines(path) if record["step"] <= step)
            write_text(path, kept.decode("utf-8"))

    def samples(self, step: int, name: str = "step") -> Path:
        """Path of the picture made at a step."""
        return self.path / "samples" / f"{name}-{step:08d}.png"
