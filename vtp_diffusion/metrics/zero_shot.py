"""Zero-shot classification as CLIP does it (Radford et al., arXiv:2103.00020, section 3.1): an image gets the class
whose prompts are nearest to its feature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..data.captions import Tokenize
from ..runtime.optional_packages import require

if TYPE_CHECKING:
    from ..models.vtp_model import VTPModel

TEMPLATES = ("a photo of a {}.",)  # CLIP's for classes that have none of their own, in training and evaluation alike


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """The 1000 class names of ImageNet, in the order of its labels, and CLIP's 80 templates, all from open_clip.

    Two names occur twice (missile, sunglasses): no model can tell their classes apart by name.
    """
    metadata = require("open_clip.zero_shot_metadata", "eval")
    templates = [template("{}") for template in metadata.OPENAI_IMAGENET_TEMPLATES]
    return list(metadata.IMAGENET_CLASSNAMES), templates


def spoken_names(names: Sequence[str]) -> list[str]:
    """Class names as prompts say them: "face-smiling" and "face_smiling" are "face smiling"."""
    return [name.replace("-", " ").replace("_", " ") for name in names]


def check_templates(name: str, templates: Sequence[str]) -> None:
    """ValueError naming the setting where there are no templates, or one without {} for the name of the class."""
    if not templates:
        raise ValueError(f"{name} is empty, expected at least one text with {{}} for the name of the class")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"{name}: {template!r} has no {{}} for the name of the class")


@torch.no_grad()
def class_embeddings(
    model: VTPModel, names: Sequence[str], templates: Sequence[str], tokenize: Tokenize, batch_size: int = 256
) -> torch.Tensor:
    """One embedding of length 1 per class (C, E), float32: the mean of its prompts' normalised features, normalised.

    Args:
        names: of the classes.
        templates: texts in which {} stands for the name.
        tokenize: as `clip_tokenizer` makes it.
        batch_size: prompts at a time.
    Raises: ValueError: no names, no templates, or a template without {}.
    """
    if not names:
        raise ValueError(f"got {len(names)} class names and {len(templates)} templates, expected at least one of each")
    check_templates("templates", templates)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    device = model.logit_scale.device
    features = [
        model.get_text_features(tokenize(prompts[start : start + batch_size]).to(device)).float()
        for start in range(0, len(prompts), batch_size)
    ]
    features = torch.cat(features).unflatten(0, (len(names), len(templates)))  # (C, T, E)
    return F.normalize(features.mean(1), dim=1)


@torch.no_grad()
def zero_shot_scores(model: VTPModel, images: Iterable[torch.Tensor], embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (N, C), float32 on the CPU, of every image with every class.

    Args:
        images: batches (B, 3, H, W) in [-1, 1], moved to the model's device and precision here.
        embeddings: (C, E), as `class_embeddings` makes them.
    Raises: ValueError: no images.
    """
    parameter = model.logit_scale
    scores = []
    for batch in images:
        features = model.get_image_features(batch.to(parameter.device, parameter.dtype)).float()
        scores.append((features @ embeddings.to(features.device).T).cpu())
    if not scores:
        raise ValueError("no images were given, expected at least one")
    return torch.cat(scores)
