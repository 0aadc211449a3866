"""Names of ImageNet's classes, from timm, for the WordNet ids that its folders are named by."""

import re
from collections.abc import Sequence

from ..runtime.optional_packages import require

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
