"""Files: written at once or not at all, named where that fails; result files with settings and versions."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from . import __version__
from .config import config_to_dict

UNFINISHED = ".unfinished"  # suffix: no reader of images, shards or results takes such a file for one of its own
CACHES = ("cache_dir", "features")  # settings that say where a machine keeps what it can make again


@contextlib.contextmanager
def writing(path: Path, then: str = "") -> Iterator[None]:
    """Within it `path` is written: what the disk refuses (full, a quota, no permission) names it.

    Pillow, safetensors and files that are closed each say it in their own way, none with the name. Everything else,
    such as torch.OutOfMemoryError, is no fault of the disk and passes unchanged.

    Args: `then`: what the message says last: what is safe, what to do.
    Raises: OSError in the place of OSError and SafetensorError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written: {error}{then and '. ' + then}") from error


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder is what a `replacing` that was killed has left, of this host or another."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED)


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk: a file renamed into it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Returns when the content of a file, or of everything in a folder, is on the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        sync_folder(path)
    else:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # else a power cut could leave the name without the content


@contextlib.contextmanager
def replacing(path: Path, then: str = "") -> Iterator[Path]:
    """Gives the name to write a file or a folder under, which becomes `path` at the end.

    Readers find all of it or nothing new, also after a kill or a power cut. The name lies in the same folder and is
    this attempt's alone (host, process and a random part), so that two hosts may write the same path: the last one
    wins. It ends in `.unfinished`, not in the suffix of `path`: give `numpy.save` an open file, and Pillow a format.
    A folder cannot replace one that holds something. What an exception leaves unfinished is removed.

    Args, Raises: as of `writing`.
    """
    attempt = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    unfinished = path.with_name(f".{path.name}.{attempt}{UNFINISHED}")
    try:
        with writing(path, then):
            yield unfinished
            sync(unfinished)
            unfinished.rename(path)
            sync_folder(path.parent)
    finally:  # renamed, it is not there
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8), at once or not at all; folders are made. Raises: OSError naming the file."""
    with replacing(path) as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file. Args: `hint`: what a message says last: what to do.

    Raises: ValueError naming the file if it is not JSON, or JSON of something else. OSError if it is not there.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}{hint and '. ' + hint}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {str(values)[:40]!r}, expected a JSON object{hint and '. ' + hint}")
    return values


def write_picture(path: Path, picture: Any) -> None:
    """Write a PIL image as PNG, as `write_text` does."""
    with replacing(path) as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(unfinished, "PNG")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_results(path: str | Path, evaluation: str, config: Any, results: dict[str, Any]) -> dict[str, Any]:
    """Write `results` beside the name of the evaluation, its settings and the versions that decide numbers.

    Args:
        path: FILE.json; written at once or not at all, folders are made.
        evaluation: by which `eval/report.py` knows what the file holds.
        config: the program's, a dataclass.
    Returns: What was written: settings that name caches are left out, they decide no number.
    """
    path = Path(path)
    versions = {"vtp_diffusion": __version__} | {package: version(package) for package in ("torch", "diffusers")}
    written = {"evaluation": evaluation, "settings": config_to_dict(config), "versions": versions} | results
    written["settings"] = _without_caches(written["settings"])
    write_json(path, written)
    return written


def _without_caches(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_caches(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in CACHES
    }


def numbers_line(values: dict[str, Any]) -> str:
    """The fractional numbers among `values` in four digits, for the console: "psnr 25.93, lpips 0.05527"."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))


def check_output(output: str, suffix: str = ".json", name: str = "output") -> None:
    """Before any work: that a result can be written to `output` when it is there. Its folder is made.

    Args: `name`: of the setting.
    Raises: ValueError unless `output` ends as it should, is no folder, and its folder takes files.
    """
    path = Path(output)
    if not output.endswith(suffix):
        raise ValueError(f"{name} must be a FILE{suffix}, got {output}")
    if path.is_dir():
        raise ValueError(f"{name} must be a FILE{suffix}, {output} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{name} {output} cannot be written: {error}") from error


def log_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines of a log and what they say; the half line that a killed process may leave at its end is left out."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}, line {number}, is no record of a step: {line[:80]!r}. Delete or mend it")
        found.append((line, record))
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, in order. Raises: ValueError naming the line that is no record of a step."""
    return [record for _, record in log_lines(path)]
