"""Evaluation of a tokenizer's features during pre-training: by classes, by captions, and for collapse."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..data.batches import plain_columns
from ..data.captions import clip_tokenizer, tokenize_captions
from ..metrics.classification import knn_accuracy, top_k_accuracy
from ..metrics.zero_shot import class_embeddings, spoken_names

if TYPE_CHECKING:
    from ..models.autoencoder_vtp import AutoencoderVTP
    from ..models.vtp_model import VTPModel
    from .inputs import Splits

MEASURED_IMAGES = 10_000  # of a split at most, spread evenly over it: all similarities are in memory at once
NEIGHBOURS = 20  # of k-NN: DINOv2's


@torch.no_grad()
def class_tokens(autoencoder: AutoencoderVTP, dataset: Any, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class tokens (N, D) float32, before the bottleneck, and labels (N,) of the measured images of an
    `ImageDataset`."""
    tokens, labels = [], []
    for batch in plain_columns(dataset, autoencoder.device, limit, ("image", "label")):
        tokens.append(autoencoder.encode_features(batch["image"]).cls_token.float())
        labels.append(batch["label"])
    return torch.cat(tokens), torch.cat(labels)


def effective_rank(features: torch.Tensor) -> float:
    """RankMe (Garrido et al., arXiv:2210.02885, eq. 1 and 2): exp of the entropy of the normalised singular values of
    features (N, D). It is 1 if all features lie on one line, at most min(N, D), and falls when they collapse.

    Raises: ValueError for fewer than two rows or values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2 or not features.isfinite().all():
        raise ValueError(f"features of shape {tuple(features.shape)}, expected finite ones (N, D) with N > 1")
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7  # the paper's epsilon
    return torch.exp(-(shares * shares.log()).sum()).item()


def retrieval_recall(
    text_features: torch.Tensor, image_features: torch.Tensor, captions: Sequence[str], ranks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Text -> image retrieval: share of captions of which an image is among the k most similar ones.

    Args:
        text_features, image_features: (N, E) of length 1, row i of both belonging together.
        captions: (N,); images with the same text are all right answers to it.
        ranks: the values of k.
    Returns: "recall_at_<k>" and "recall_at_<k>_by_chance", what a random order reaches on average.
    """
    unique = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    group = torch.tensor([unique[caption] for caption in captions], device=text_features.device)
    order = (text_features @ image_features.T).argsort(dim=1, descending=True)  # (N, N)
    right = group[order] == group[:, None]
    values = {f"recall_at_{k}": right[:, :k].any(1).double().mean().item() for k in ranks}
    return values | {f"recall_at_{k}_by_chance": recall_by_chance(captions, k) for k in ranks}


def recall_by_chance(captions: Sequence[str], k: int) -> float:
    """Recall at k of a random order: 1 - C(N - n, k) / C(N, k) for a caption that n of N images have, averaged."""
    total, k = len(captions), min(k, len(captions))
    missed = sum(count * math.comb(total - count, k) for count in Counter(captions).values())
    everything = total * math.comb(total, k)
    return (everything - missed) / everything


@torch.no_grad()
def evaluate_features(
    autoencoder: AutoencoderVTP, dataset: Any, train: Any = None, limit: int | None = None
) -> dict[str, float]:
    """The effective rank of the features of images and, where training images are given, k-NN accuracy among those.

    With one class there is no accuracy, with one image no rank.

    Args:
        train: images that are not in `dataset`, since every image is its own nearest neighbour.
        limit: most images of either data set; never more than `MEASURED_IMAGES`.
    """
    limit = min(limit or MEASURED_IMAGES, MEASURED_IMAGES)
    (features, labels), values = class_tokens(autoencoder, dataset, limit), {}
    if len(features) > 1:
        values["effective_rank"] = effective_rank(features)
    if train is not None and len(train.label_names) > 1:
        bank, bank_labels = class_tokens(autoencoder, train, limit)
        neighbours = min(NEIGHBOURS, len(bank))
        values["knn_accuracy"] = knn_accuracy(bank, bank_labels, features, labels, [neighbours])[neighbours]
        majority = bank_labels.mode().values
        values["knn_accuracy_of_commonest_class"] = (labels == majority).double().mean().item()
    return values


@torch.no_grad()
def evaluate_alignment(
    model: VTPModel, held_out: Any, templates: Sequence[str], limit: int | None = None
) -> dict[str, float]:
    """Zero-shot accuracy with the names of the classes as prompts, and text -> image retrieval by caption.

    Images without a caption are left out of the retrieval. Zero-shot needs more than one class, and names of them:
    indices as prompts would mean nothing.

    Args: `limit`: as of `evaluate_features`.
    """
    device, limit = model.logit_scale.device, min(limit or MEASURED_IMAGES, MEASURED_IMAGES)
    parts, labels, all_captions = [], [], []
    for batch in plain_columns(held_out, device, limit, ("image", "label", "caption")):
        parts.append(model.get_image_features(batch["image"]).float())
        labels.append(batch["label"])
        all_captions += batch["caption"]
    images = torch.cat(parts)
    values, length = {}, model.config.text_context_length
    if len(held_out.label_names) > 1 and held_out.classes_named:
        tokenize = clip_tokenizer(length, truncate=True)
        classes = class_embeddings(model, spoken_names(held_out.label_names), templates, tokenize)
        values["zero_shot_accuracy"] = top_k_accuracy(images @ classes.T, torch.cat(labels))
    token_ids, paired = tokenize_captions(all_captions, length)
    rows = paired.nonzero().flatten()
    if len(rows) > 1:
        parts = token_ids[rows].split(256)
        texts = torch.cat([F.normalize(model.get_text_features(p.to(device)).float(), dim=-1) for p in parts])
        captions = [all_captions[row] for row in rows.tolist()]
        values |= retrieval_recall(texts, images[rows.to(device)], captions)
    return values


def unmeasured(splits: Splits, contrastive: bool) -> list[str]:
    """What cannot be measured during training, a sentence each, to be printed before it.

    Args: `contrastive`: whether captions are trained on.
    """
    (_, measured), missing = splits.validated, []
    if splits.held_out is None:
        missing.append(
            "no held-out images: training images are measured, and no k-NN accuracy. A folder has held-out ones in "
            "validation/, shards in data.validation_files"
        )
    accuracies = [*([] if splits.held_out is None else ["k-NN"]), *(["zero-shot"] if contrastive else [])]
    if len(measured.label_names) < 2 and accuracies:
        missing.append(f"the images have one class: no {' and no '.join(accuracies)} accuracy")
    elif contrastive and not measured.classes_named:
        missing.append("the classes have indices and no names: no zero-shot accuracy")
    return missing
