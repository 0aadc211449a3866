"""Files that are written at once or not at all, and named where that fails."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


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
