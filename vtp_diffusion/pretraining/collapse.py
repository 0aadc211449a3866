"""Signs that the training of a decoder against a discriminator collapses, read from the log of a run."""

import math
from collections.abc import Iterable
from typing import Any

from .adversarial import ADAPTIVE_LIMIT

# The numbers are ours.
COLLAPSE_LINES = 3  # lines of the log in a row
COLLAPSE_ACCURACY = 0.99  # the discriminator is (almost) never wrong: nothing to learn from it
COLLAPSE_GUESSING = 0.01  # or its accuracy is within this distance of one half
COLLAPSE_WEIGHT = ADAPTIVE_LIMIT / 10  # adaptive weight: the discriminator's gradient at the decoder vanishes
COLLAPSE_PSNR = 3.0  # dB lost since before training
GUESSES, PSNR_FALLS = "discriminator guesses", "PSNR falls"


def collapse_signs(log: Iterable[dict[str, Any]], start_step: int, psnr: str) -> list[dict[str, Any]]:
    """Signs that the GAN collapses, from the lines of a run's log; each is listed where it begins.

    Over `COLLAPSE_LINES` lines in a row, after `start_step`: an accuracy of the discriminator of at least 0.99
    ("discriminator wins"), or within 0.01 of one half ("discriminator guesses"), or a mean adaptive weight of 1000 or
    more ("adaptive weight explodes"). In any validation: a PSNR 3 dB below the first ("PSNR falls").

    Args:
        log: lines of log.jsonl in order.
        start_step: `AdversarialConfig.start_step`.
        psnr: name of the PSNR in the log; its first value is that before training. Where it is None or infinite, all
            images, or some, equalled their reconstructions: nothing has fallen, and nothing is compared with it.
    Returns: {"step", "sign", "value"}, in the order of the steps.
    """
    rules = {
        "discriminator wins": ("discriminator/accuracy", lambda value: value >= COLLAPSE_ACCURACY),
        GUESSES: ("discriminator/accuracy", lambda value: abs(value - 0.5) <= COLLAPSE_GUESSING),
        "adaptive weight explodes": ("adaptive_weight", lambda value: value >= COLLAPSE_WEIGHT),
    }
    streaks, signs, values, fallen = dict.fromkeys(rules, 0), [], [], False
    for line in log:
        if psnr in line:
            values.append(line[psnr])
            was_fallen, fallen = fallen, _last_is_fallen(values)
            if fallen and not was_fallen:
                signs.append({"step": line["step"], "sign": PSNR_FALLS, "value": line[psnr]})
        if line["step"] <= start_step:
            continue
        for sign, (name, holds) in rules.items():
            if line.get(name) is not None:  # None: every step of the line was skipped
                streaks[sign] = streaks[sign] + 1 if holds(line[name]) else 0
                if streaks[sign] == COLLAPSE_LINES:
                    signs.append({"step": line["step"], "sign": sign, "value": line[name]})
    return signs


def harmful(signs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The signs after which decoders got worse: all but a discriminator that guesses, as it does at first, and which
    only teaches nothing."""
    return [sign for sign in signs if sign["sign"] != GUESSES]


def has_fallen(log: Iterable[dict[str, Any]], psnr: str) -> bool:
    """Whether the last validation has a PSNR 3 dB below the first, or NaN."""
    return _last_is_fallen([line[psnr] for line in log if psnr in line])


def _last_is_fallen(values: list[float | None]) -> bool:
    """Whether the last PSNR is NaN, or 3 dB below the first one that is neither None nor infinite."""
    if not values or not _is_comparable(values[-1]):
        return False
    return not values[-1] > next(filter(_is_comparable, values)) - COLLAPSE_PSNR


def _is_comparable(value: float | None) -> bool:
    return value is not None and value != math.inf
