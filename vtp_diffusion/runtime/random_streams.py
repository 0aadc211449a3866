"""Seeds of random numbers: one stream for each use, as if they had nothing to do with each other."""

import hashlib

import numpy as np


def stream_seed(use: str, *keys: int) -> int:
    """Seed, below 2**63, of the random numbers of one use at its keys: `stream_seed("noise", seed, image)`.

    A hash of the text of both. Numbers alone would not do: seed + image gives neighbouring seeds all but one image in
    common, and numpy fills up lists of numbers with zeros, so that [7, 3] and [7, 3, 0, 0] are one generator.

    Training's order of images and its `step_generator` keep such lists, since runs resume; a training program draws
    nothing else from them.
    """
    digest = hashlib.sha256(" ".join([use, *map(str, keys)]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_stream(use: str, *keys: int) -> np.random.Generator:
    """NumPy's generator of that seed."""
    return np.random.default_rng(stream_seed(use, *keys))
