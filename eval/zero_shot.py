"""Zero-shot classification: how often an image is nearest to the prompts of its own class.

    python eval/zero_shot.py --model VTP-Large-f16d64 --data.source imagenet-1k --data.label_column label \\
        --classes imagenet --protocol vtp --output zero_shot.json

    python eval/zero_shot.py --model runs/vtp-openmoji/vtp --data.resolution 128 --data.label_column category \\
        --templates "an emoji of {}" "a picture of {}" --output zero_shot.json

    python eval/zero_shot.py --model runs/mine/vtp --data.source FOLDER --data.resolution 256 --output zero_shot.json

--model is the folder of a VTPModel (text tower included) or of a released checkpoint. With --classes imagenet names
and CLIP's 80 templates come from open_clip, and classes are WordNet ids, ImageNet's names or its 1000 indices; else
the data set has the names. The embedding of a class is the average over its prompts, as in CLIP. Images are ADM's
centre crops, or with --protocol vtp whole images squashed to 256 x 256 (--data.resolution), as for VTP's numbers.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm.auto import tqdm

from vtp_diffusion.data.captions import clip_tokenizer
from vtp_diffusion.data.image_datasets import ImageDataset
from vtp_diffusion.data.image_files import center_crop, squash
from vtp_diffusion.data.imagenet import imagenet_indices
from vtp_diffusion.data.images import from_uint8
from vtp_diffusion.evaluation.sources import fault_lines, image_batches, open_measured
from vtp_diffusion.metrics.classification import top_k_accuracy
from vtp_diffusion.metrics.zero_shot import (
    TEMPLATES,
    class_embeddings,
    imagenet_prompts,
    spoken_names,
    zero_shot_scores,
)
from vtp_diffusion.models.image_size import EncodedDataConfig, settle_resolution
from vtp_diffusion.models.latent_space import autoencoder_identity
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_results
from vtp_diffusion.runtime.processes import check_alone, check_device
from vtp_diffusion.runtime.programs import print_end_of_evaluation


@dataclass(kw_only=True)
class ZeroShotConfig(Settings):
    """Settings of this program."""

    model: str = setting(help="folder of a VTPModel or of a released checkpoint")
    data: EncodedDataConfig = setting(help="images with labels")
    output: str = setting(help="FILE.json for the results")
    split: str = setting("validation", "split of the images: train, validation or all")
    classes: Literal["imagenet", "data"] = setting("data", "class names: ImageNet's, or those of the data set")
    templates: list[str] = setting(
        default_factory=list, help="prompts, {} is the name; none = CLIP's 80 for imagenet, else 'a photo of a {}.'"
    )
    protocol: Literal["adm", "vtp"] = setting("adm", "adm: centre crops; vtp: squashed whole, as VTP's own numbers")
    batch_size: int = setting(64, "images at once", at_least=1)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "torch device to run on")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        check_output(self.output, evaluation="zero_shot")


def prompts(config: ZeroShotConfig, dataset: ImageDataset) -> tuple[list[str], list[str], list[int]]:
    """(names of the prompts, templates, place of each class of the data set among these names).

    Raises: ValueError for classes that are not ImageNet's, or that have no or equal names.
    """
    if config.classes == "imagenet":
        names, templates = imagenet_prompts()
        try:
            return names, config.templates or templates, imagenet_indices(dataset.label_names, names)
        except ValueError as error:
            raise ValueError(f"classes is imagenet, but in {config.data.source} {error}") from error
    names = spoken_names(dataset.label_names)
    if len(names) < 2:
        raise ValueError(
            f"the images of {config.data.source} have one class, {names[0]!r}: expected at least 2, in folders or a "
            "column of `datasets` (data.label_column)"
        )
    if not dataset.classes_named:
        raise ValueError(f"the classes of {config.data.source} have indices, but prompts need names of classes")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"classes of the same name cannot be told apart: {', '.join(twice)}")
    return names, config.templates or list(TEMPLATES), list(range(len(names)))


def main() -> None:
    check_alone("eval/zero_shot.py")
    config = parse_config(ZeroShotConfig, description=__doc__)
    from vtp_diffusion import VTPModel
    from vtp_diffusion.models.loading import load_vtp

    model = load_vtp(config.model)
    if not isinstance(model, VTPModel):
        raise ValueError(f"{config.model} holds an autoencoder without a text tower, expected a VTPModel")
    model = model.requires_grad_(False).to(config.device)
    settle_resolution(config.data, model)
    crop = squash if config.protocol == "vtp" else center_crop
    images = open_measured(config.data, config.split, crop, advice=". --split all takes all images")
    names, templates, places = prompts(config, images.dataset)
    tokenize = clip_tokenizer(model.config.text_context_length)
    embeddings = class_embeddings(model, names, templates, tokenize)
    batches = image_batches(images, range(len(images)), config.batch_size)
    shown = tqdm(batches, total=math.ceil(len(images) / config.batch_size), desc="classifying")
    scores = zero_shot_scores(model, (from_uint8(batch) for batch in shown), embeddings)
    labels = torch.tensor([places[label] for label in images.labels])

    results = {
        "num_images": len(labels),
        "skipped": images.dataset.skipped,
        "enlarged": images.count_enlarged(range(len(images))),
        "num_classes": len(names),
        "fingerprint": images.dataset.fingerprint,
        "model": autoencoder_identity(model),
        "templates": templates,
        "chance": 1 / len(names),
        "top1": top_k_accuracy(scores, labels, 1),
        "top5": top_k_accuracy(scores, labels, 5),
    }
    results = write_results(config.output, "zero_shot", config, results)
    print(f"\n{len(labels)} images, {len(names)} classes, {len(templates)} templates")
    for line in fault_lines(results["skipped"], results["enlarged"], config.data.resolution):
        print(line)
    print(f"chance  top-1 {results['chance']:6.1%}")
    print(f"found   top-1 {results['top1']:6.1%}   top-5 {results['top5']:6.1%}")
    print_end_of_evaluation(config.output)


if __name__ == "__main__":
    run(main)
