"""Result files of the evaluation programs: JSON that says which evaluation it is, every setting, and the versions."""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import __version__
from .config import config_to_dict
from .disk import write_json

CACHES = ("cache_dir", "features")  # settings that say where a machine keeps what it can make again


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
