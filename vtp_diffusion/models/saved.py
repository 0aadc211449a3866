"""Folders of saved models and pipelines, opened with a message where their files make no sense."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# What diffusers and our constructors raise of settings of wrong types, sizes or combinations, and of damaged weights.
FAULTS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, SafetensorError)


def load_saved(loader: Any, folder: str | Path, **options) -> Any:
    """`loader.from_pretrained(folder, **options)`. Raises: ValueError naming the folder."""
    try:
        return loader.from_pretrained(folder, **options)
    except FAULTS as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}): expected a folder as save_pretrained "
            "writes it, with the settings of its config.json and complete weights"
        ) from error
