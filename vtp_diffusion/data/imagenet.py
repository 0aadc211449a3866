"""Names of ImageNet's classes, from timm, and the classes that names and WordNet ids of folders stand for."""

import re
from collections.abc import Sequence

from ..runtime.optional_packages import require

IMAGENET_CLASSES = 1000
IMAGENET = "imagenet"  # given instead of a file: the 1000 classes of ILSVRC 2012 in the order of their ids


def names_of_wnids(wnids: Sequence[str] | None = None) -> list[str]:
    """Synonyms and id of each class, "golden retriever, n02099601"; the id tells the two classes "crane" apart.

    Args: `wnids`: None for those of ILSVRC 2012. If some are not WordNet ids, all are returned unchanged.
    Raises: ValueError naming an id that ImageNet does not have; MissingExtraError without timm.
    """
    if wnids is not None and not (wnids and all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)):
        return list(wnids)
    known = require("timm.data", "eval").ImageNetInfo("imagenet-1k")
    names = []
    for wnid in known.label_names() if wnids is None else wnids:
        try:
            names.append(f"{known.label_name_to_description(wnid)}, {wnid}")
        except KeyError as error:
            raise ValueError(f"{wnid} is not a class of ImageNet, expected ids such as n02099601") from error
    return names


def imagenet_indices(names: Sequence[str], spoken: Sequence[str]) -> list[int]:
    """ImageNet's index, 0 to 999, of each class of a data set.

    Args:
        names: of the classes: WordNet ids, ImageNet's names, or anything for 1000 classes in ImageNet's order.
        spoken: the 1000 names of prompts, which are known beside WordNet's.
    Raises: ValueError: a class that may be none of ImageNet's, or several; MissingExtraError without timm.
    """
    known: dict[str, set[int]] = {}
    for index, texts in enumerate(zip(names_of_wnids(), spoken, strict=True)):
        for name in (*texts, *(part for text in texts for part in text.split(","))):
            known.setdefault(_compared(name), set()).add(index)
    found = [
        known.get(_compared(name), set().union(*(known.get(_compared(part), ()) for part in name.split(","))))
        for name in names
    ]
    if len(names) == IMAGENET_CLASSES and all(k in classes or not classes for k, classes in enumerate(found)):
        return list(range(IMAGENET_CLASSES))
    chosen = [next(iter(classes)) if len(classes) == 1 else None for classes in found]
    if None in chosen or len(set(chosen)) < len(names):
        twice = (name for name, index in zip(names, chosen, strict=True) if index is None or chosen.count(index) > 1)
        raise ValueError(
            f"{next(twice)!r}, one of {len(names)} classes, is not one of ImageNet's: expected WordNet ids such as "
            "n02099601 or ImageNet's names, each once, or all 1000 classes in ImageNet's order"
        )
    return chosen


def _compared(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
