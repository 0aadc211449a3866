"""Packages that sampling does not need: imported where they are used, with a message if they are missing."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package that an extra installs is not there; the message says what to install."""


def install_hint(extra: str) -> str:
    """How to install an extra: from a clone, since on the package index another project has our name."""
    return f"in a clone of the repository, pip install -e '.[{extra}]'"


def require(module_name: str, extra: str) -> ModuleType:
    """Imports a module that belongs to an extra of this package.

    Args:
        module_name: dotted name, for example "torchvision.models".
        extra: the extra that installs it, such as "train" or "eval".
    Raises: MissingExtraError: it is not installed; says which extra to install.
    """
    package = module_name.partition(".")[0]
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is installed, but one of its own dependencies is missing
        raise MissingExtraError(f"{package} is needed here: {install_hint(extra)}") from error
