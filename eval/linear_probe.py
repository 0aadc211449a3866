"""How well frozen features tell classes apart: linear heads and nearest neighbours, as DINOv2 measures them.

    python eval/linear_probe.py --model weights/openmoji-128/vae --data.source openmoji --data.resolution 128 \\
        --data.label_column category --steps 2000 --output probe.json

    python eval/linear_probe.py --model VTP-Large-f16d64 --data.source imagenet-1k --data.label_column label \\
        --protocol vtp --data.resolution 224 --head_choice 0 --output probe.json

    python eval/linear_probe.py --model runs/mine/vae --data.source FOLDER --data.resolution 256 --output probe.json

--model is the folder of an AutoencoderVTP, of a VTPModel or of a released checkpoint. Features of both splits are
computed once and kept in the folder --features (by default beside the output); the same command again only trains.

All heads of the grid (class tokens of the last layer or of the last --num_layers, with and without the mean patch
token, every learning rate) are trained at once; all of them are in the JSON. The reported head is the one that is best
on a tenth of the training images, held out from training. With --head_choice 0 it is the best one on the validation
images themselves, as in DINOv2's and VTP's numbers.

Images are ADM's centre crops in both splits. With --protocol vtp they are as in VTP's and DINOv2's evaluations: the
short side is resized to 8/7 of --data.resolution (256 for 224) and the centre cropped. Heads learn from --crops random
resized crops of every training image, half of them mirrored, and the features take that many times the disk space
(12,500 steps of 1,024 images see an image of ImageNet ten times). As in VTP's they always read the mean patch token.

Variants that a data set draws less often (skin tones) are left out of both splits. k-NN votes are weighted,
temperature 0.07, on the last class token, on the mean patch token, and on both.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from vtp_diffusion.data.image_datasets import ImageDataset, open_dataset
from vtp_diffusion.data.image_files import center_crop, resized_center_crop
from vtp_diffusion.evaluation.linear_probe import LEARNING_RATES, LinearHeads, head_grid
from vtp_diffusion.evaluation.probe_features import ProbeFeatures, cached_features, random_views
from vtp_diffusion.metrics.classification import KNN_NEIGHBOURS, knn_accuracy
from vtp_diffusion.models.image_size import EncodedDataConfig, settle_resolution
from vtp_diffusion.models.latent_space import autoencoder_identity
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_results
from vtp_diffusion.runtime.processes import check_alone, check_device, reading_processes
from vtp_diffusion.runtime.programs import print_end_of_evaluation
from vtp_diffusion.runtime.reproducibility import random_stream


@dataclass(kw_only=True)
class LinearProbeConfig(Settings):
    """Settings of this program."""

    model: str = setting(help="folder of an AutoencoderVTP, a VTPModel or a released checkpoint")
    data: EncodedDataConfig = setting(help="images with labels")
    output: str = setting(help="FILE.json for the results")
    features: str | None = setting(None, "folder of the features; none = beside the output")
    protocol: Literal["adm", "vtp"] = setting("adm", "how images are cropped, and whether training ones at random")
    crops: int = setting(10, "random crops of a training image with protocol vtp", at_least=1)
    head_choice: float = setting(
        0.1, "share of training images that the head is chosen on; 0: validation images", at_least=0, below=1
    )
    num_layers: int = setting(4, "last layers whose class tokens a head may read", at_least=1)
    learning_rates: tuple[float, ...] = setting(LEARNING_RATES, "for a batch of 256; scaled with the batch")
    steps: int = setting(12500, "training steps; DINOv2 takes 12500", at_least=1)
    train_batch_size: int = setting(1024, "images a step, at most the training split", at_least=1)
    neighbours: tuple[int, ...] = setting(KNN_NEIGHBOURS, "values of k for k-NN", at_least=1)
    seed: int = setting(0, "of weights and order", at_least=0)
    batch_size: int = setting(64, "images encoded at once", at_least=1)
    num_workers: int = setting(reading_processes(), "processes that read image files", at_least=0)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "torch device to run on")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        check_output(self.output, evaluation="linear_probe")
        head_grid(self.num_layers, self.learning_rates)

    @property
    def features_folder(self) -> Path:
        return Path(self.features or self.output.removesuffix(".json") + "-features")


def open_splits(config: LinearProbeConfig) -> dict[str, ImageDataset]:
    """Both splits, and with protocol vtp "crops", random crops of the training images that heads learn from.

    Raises: ValueError if there is only one class, or the splits have different classes.
    """
    crop = resized_center_crop if config.protocol == "vtp" else center_crop
    validation = open_dataset(config.data, "validation", crop)  # first, as it is missing more often
    datasets = {"train": open_dataset(config.data, "train", crop, quiet=True), "validation": validation}
    names = datasets["train"].label_names
    if len(names) < 2:
        raise ValueError(
            f"the images of {config.data.source} have one class, {names[0]!r}: give them folders a class, or a column "
            "of `datasets` with --data.label_column"
        )
    if datasets["validation"].label_names != names:
        raise ValueError(f"the splits have different classes: {names[:5]}, {datasets['validation'].label_names[:5]}")
    if config.protocol == "vtp":
        datasets["crops"] = random_views(datasets["train"], config.crops, config.seed)
    return datasets


def read_features(config: LinearProbeConfig, model, datasets: dict[str, ImageDataset]) -> dict[str, ProbeFeatures]:
    features = {}
    for name, dataset in datasets.items():
        with tqdm(total=len(dataset), desc=f"features: {name}", unit="image") as progress:
            folder = config.features_folder / name
            arguments = (config.num_layers, config.batch_size, config.device, progress.update, config.num_workers)
            features[name] = cached_features(folder, model, dataset, *arguments).without_variants()
    return features


def neighbour_rows(config: LinearProbeConfig, train: ProbeFeatures, validation: ProbeFeatures) -> list[dict]:
    kinds = {
        "class token": lambda features: features.inputs(1, patches=False),
        "mean patch token": lambda features: torch.from_numpy(np.array(features.patch_means)),
        "both": lambda features: features.inputs(1, patches=True),
    }
    rows = []
    for kind, choose in kinds.items():
        bank = choose(train).to(config.device)
        found = knn_accuracy(bank, train.labels, choose(validation), validation.labels, config.neighbours)
        rows += [{"features": kind, "neighbours": k, "top1": accuracy} for k, accuracy in found.items()]
    return rows


def choice_rows(config: LinearProbeConfig, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training images that the head is chosen on, and of those that heads learn from."""
    order = torch.from_numpy(random_stream("head choice", config.seed).permutation(count))
    held_out = round(config.head_choice * count)
    if (held_out == 0) != (config.head_choice == 0):
        raise ValueError(
            f"head_choice is {config.head_choice:g} of {count} training images, expected one at least, or 0"
        )
    return order[:held_out].sort().values, order[held_out:].sort().values


def head_rows(config: LinearProbeConfig, features: dict[str, ProbeFeatures], num_classes: int) -> list[dict]:
    """Every head with its accuracies, the chosen one first."""
    train, learned = features["train"], features.get("crops", features["train"])
    patches = (True,) if config.protocol == "vtp" else (False, True)
    heads = LinearHeads(head_grid(config.num_layers, config.learning_rates, patches), num_classes)
    held_out, rest = choice_rows(config, len(train))
    views = len(learned) // len(train)
    rows = (rest[:, None] * views + torch.arange(views)).flatten()
    with tqdm(total=config.steps, desc=f"training {len(heads.settings)} heads") as progress:
        arguments = (config.steps, config.train_batch_size, config.seed, config.device, progress.update)
        heads.train(learned, *arguments, rows)
    found = {
        "top": heads.accuracies(features["validation"], config.device),
        "train_top": heads.accuracies(train, config.device, k=(1,), rows=rest),
    }
    if config.head_choice > 0:
        found["choice_top"] = heads.accuracies(train, config.device, k=(1,), rows=held_out)
    table = [
        asdict(settings) | {f"{name}{k}": accuracy for name, of in found.items() for k, accuracy in of[place].items()}
        for place, settings in enumerate(heads.settings)
    ]
    if all(row["top1"] is None for row in table):
        raise ValueError(f"every head diverged: learning_rates {list(config.learning_rates)} are too large")
    chosen_by = "choice_top1" if config.head_choice > 0 else "top1"
    return sorted(table, key=lambda row: -1.0 if row[chosen_by] is None else row[chosen_by], reverse=True)


def main() -> None:
    check_alone("eval/linear_probe.py")
    config = parse_config(LinearProbeConfig, description=__doc__)
    from vtp_diffusion.generation.latent_inputs import latent_shape
    from vtp_diffusion.models.loading import load_encoder

    model = load_encoder(config.model).requires_grad_(False)
    settle_resolution(config.data, model)
    latent_shape(model, config.data.resolution)  # refuses a resolution before images are read
    if config.num_layers > (layers := model.config.encoder_num_layers):
        print(f"num_layers is {config.num_layers}, the encoder has {layers}: heads read those {layers}")
        config = replace(config, num_layers=layers)
    datasets = open_splits(config)
    if max(config.neighbours) > len(datasets["train"]):
        raise ValueError(
            f"neighbours are {list(config.neighbours)}, expected at most the {len(datasets['train'])} training images"
        )
    features = read_features(config, model, datasets)
    train, validation = features["train"], features["validation"]

    most_frequent = Counter(train.labels.tolist()).most_common(1)[0][0]
    heads = head_rows(config, features, num_classes=len(datasets["train"].label_names))
    held_out = len(choice_rows(config, len(train))[0])
    results = {
        "num_classes": len(datasets["train"].label_names),
        "counts": {name: len(of) for name, of in features.items()},
        "fingerprints": {name: dataset.fingerprint for name, dataset in datasets.items()},
        "model": autoencoder_identity(model),
        "chance": {
            "uniform": 1 / len(datasets["train"].label_names),
            "most_frequent_class": (validation.labels == most_frequent).double().mean().item(),
        },
        "linear": heads[0],
        "head_chosen_on": f"{held_out} training images, held out" if held_out else "the validation images",
        "neighbours": neighbour_rows(config, train, validation),
        "heads": heads,
    }
    results = write_results(config.output, "linear_probe", config, results)
    print_results(results)
    print_end_of_evaluation(config.output)


def print_results(results: dict) -> None:
    best, chance, counts = results["linear"], results["chance"], results["counts"]
    print(
        f"\n{counts['train']} training and {counts['validation']} validation images, {results['num_classes']} classes"
    )
    print(
        f"{'chance':34} top-1 {chance['uniform']:6.1%}   (always the most frequent class: "
        f"{chance['most_frequent_class']:.1%})"
    )
    print(
        f"{'linear, one of ' + str(len(results['heads'])) + ' heads':34} top-1 {best['top1']:6.1%}   "
        f"top-5 {best['top5']:6.1%}   ({best['layers']} layers, {'with' if best['patches'] else 'without'} patches, "
        f"learning rate {best['learning_rate']:g}; {best['train_top1']:.1%} on training images; "
        f"chosen on {results['head_chosen_on']})"
    )
    for row in results["neighbours"]:
        print(f"{row['neighbours']:>3}-NN, {row['features']:26} top-1 {row['top1']:6.1%}")


if __name__ == "__main__":
    run(main)
