"""Files: written at once or not at all, named where that fails; result files with settings and versions."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from . import __version__
from .config import config_to_dict

CACHES = ("cache_dir", "features")  # settings that say where a machine keeps what it can make again


@contextlib.contextmanager
def writing(path: Path, then: str = "") -> Iterator[None]:
    """Within it `path` is written: what the disk refuses (full, a quota, no permission) names it.

    Pillow, safetensors and files that are closed each say it in their own way, none with the name.

    Args: `then`: what the message says last: what is safe, what to do.
    Raises: OSError in the place of OSError and SafetensorError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written: {error}{then and '. ' + then}") from error


def unfinished_name(path: Path) -> Path:
    """The name under which `replacing` has a file written: no reader looks at it, a second attempt overwrites it."""
    return path.with_name(f".{path.name}.unfinished")


@contextlib.contextmanager
def replacing(path: Path, then: str = "") -> Iterator[Path]:
    """Gives the name to write a file under, which becomes `path` at the end: readers find all of it or nothing new.

    Args, Raises: as of `writing`.
    """
    unfinished = unfinished_name(path)
    with writing(path, then):
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())  # else a power cut could leave the name without the content
        unfinished.rename(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, at once or not at all; folders are made."""
    with replacing(path) as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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

    Returns:
        What was written: settings that name caches are left out, they decide no number.
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
