"""Atomic writes, with errors that name the file; result files with their settings and versions."""

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

UNFINISHED = ".unfinished"  # a suffix that no reader of images, shards or results accepts
CONFIGURATIONS = ("model_index.json", "config.json")  # without which diffusers loads nothing
CACHES = ("cache_dir", "features")  # settings that name a cache on this machine


@contextlib.contextmanager
def writing(path: Path, then: str = "") -> Iterator[None]:
    """Context for writing `path`: errors of the disk (full, quota, permission) become one that names `path`.

    Pillow, safetensors and closing a file each report them differently, and none names the file. Other errors, such as
    torch.OutOfMemoryError, pass unchanged.

    Args: `then`: the end of the message: what is safe, what to do.
    Raises: OSError in place of OSError and SafetensorError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written: {error}{then and '. ' + then}") from error


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder was left by a `replacing` that was killed, on this host or another."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk (fsync): a file renamed into it then survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush the content of a file, or of everything in a folder, to the disk (fsync)."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        sync_folder(path)
    else:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # without it, a power cut could leave the name without the content


@contextlib.contextmanager
def replacing(path: Path, then: str = "") -> Iterator[Path]:
    """Atomic write of a file or a folder: yields a temporary path, which is renamed to `path` at the end.

    Readers find the whole file or what was there before, also after a kill or a power cut. The temporary path is in
    the same folder and unique (host, process and a random part), so that two hosts may write the same path: the last
    one wins. It ends in `.unfinished`, not in the suffix of `path`: give `numpy.save` an open file, and Pillow a
    format. A folder cannot replace a folder that is not empty. After an exception the temporary file is removed.

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
    finally:  # after the rename there is nothing to remove
        remove(unfinished)


@contextlib.contextmanager
def replacing_saved(folder: Path, then: str = "") -> Iterator[Path]:
    """Write what diffusers saves into a folder where an older model or pipeline may be: yields a temporary folder.

    Its files are moved into `folder` at the end, the configurations last, after older configurations and weights were
    removed. Readers find the older whole, the new one whole, or none; never one's configuration with the other's
    weights. Other files in `folder` stay.

    Args, Raises: as of `writing`.
    """
    with contextlib.ExitStack() as stack:
        if not folder.exists():
            yield stack.enter_context(replacing(folder, then))
            return
        unfinished = stack.enter_context(tempfile.TemporaryDirectory(UNFINISHED, f".{folder.name}.", folder.parent))
        stack.enter_context(writing(folder, then))
        yield Path(unfinished)
        sync(Path(unfinished))
        files = [file.relative_to(unfinished) for file in Path(unfinished).rglob("*") if file.is_file()]
        files.sort(key=lambda file: (file.name in CONFIGURATIONS, -len(file.parts)))
        places = {(folder / file).parent for file in files}
        for file in reversed(files):
            if file.name in CONFIGURATIONS:
                (folder / file).unlink(missing_ok=True)
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        for place in {(folder / file).parent for file in files if file.suffix == ".safetensors"}:
            for weights in place.glob("*.safetensors*"):  # the older ones may be in other pieces
                weights.unlink()
            sync_folder(place)
        for file in files:
            (Path(unfinished) / file).rename(folder / file)
        for place in places:
            sync_folder(place)


def remove_leftovers(path: Path) -> None:
    """Remove what a `replacing` of this path left on this host, in processes that were killed."""
    start = f".{path.name}.{socket.gethostname()}-"
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        if entry.name.startswith(start) and is_unfinished(entry):
            process = entry.name.removeprefix(start).partition("-")[0]
            if process.isdigit() and not _is_running(int(process)):
                remove(entry)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing if it is not there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically; missing folders are made. Raises: OSError naming the file."""
    with replacing(path) as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file. Args: `hint`: the end of the error message: what to do.

    Raises: ValueError naming the file if it is not JSON or not a JSON object. OSError if it does not exist.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}{hint and '. ' + hint}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {str(values)[:40]!r}, expected a JSON object{hint and '. ' + hint}")
    return values


def write_picture(path: Path, picture: Any) -> None:
    """Write a PIL image without loss, as WebP if the name ends so and else as PNG, as `write_text` does."""
    with replacing(path) as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".webp":
            picture.convert("RGB").save(unfinished, "WEBP", lossless=True, quality=100, method=6)
        else:
            picture.save(unfinished, "PNG")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_results(path: str | Path, evaluation: str, config: Any, results: dict[str, Any]) -> dict[str, Any]:
    """Write `results` as JSON, with the evaluation's name, the settings and the package versions.

    Args:
        path: FILE.json; written atomically, missing folders are made.
        evaluation: name by which `eval/report.py` recognises the kind of results.
        config: the program's configuration, a dataclass.
    Returns: what was written. Settings that name caches are left out: they affect no number.
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
    """The floats among `values` with four significant digits, for the console: "psnr 25.93, lpips 0.05527"."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))


def check_output(output: str, suffix: str = ".json", name: str = "output", evaluation: str | None = None) -> None:
    """Check, before any work, that a result can be written to `output`. Its folder is made.

    Args: `name`: the setting's, for the message; `evaluation`: that of `write_results`, whose results may be replaced.
    Raises: ValueError if `output` has another suffix, is a folder, holds something else than results of `evaluation`,
        or its folder cannot be written to.
    """
    path = Path(output)
    if not output.endswith(suffix):
        raise ValueError(f"{name} must be a FILE{suffix}, got {output}")
    if path.is_dir():
        raise ValueError(f"{name} must be a FILE{suffix}, {output} is a folder")
    if evaluation is not None and path.is_file() and path.stat().st_size:
        advice = f"expected a new {name}, or results of {evaluation}, which are replaced"
        if (found := read_json(path, advice).get("evaluation")) != evaluation:
            holds = "something else than results" if found is None else f"results of {found}"
            raise ValueError(f"{name} {output} holds {holds}: {advice}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{name} {output} cannot be written: {error}") from error


def log_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines of a log.jsonl with their parsed records. A last line that a killed process left incomplete is dropped."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}, line {number}, is not a record of a step: {line[:80]!r}. Delete or repair it")
        found.append((line, record))
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, in order. Raises: ValueError naming a line that is not a record of a step."""
    return [record for _, record in log_lines(path)]
