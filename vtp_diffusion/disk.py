"""Files that cannot be written are named."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

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
