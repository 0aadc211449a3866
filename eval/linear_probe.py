"""How well classes can be read off frozen features: linear heads and nearest neighbours, as DINOv2 measures them.

    python eval/linear_probe.py --model weights/openmoji-128/vae --data.source openmoji --data.resolution 128 \\
        --data.label_column category --steps 2000 --output probe.json

    python eval/linear_probe.py --model VTP-Large-f16d64 --data.source imagenet-1k --data.label_column label \\
        --output probe.json

--model is the folder of an AutoencoderVTP, of a VTPModel or of a released checkpoint. Features of both splits are read
once and kept in --features (beside the output unless it says otherwise); the same command again only trains.

All heads of the grid (class tokens of the last layer or of the last --num_layers, with and without the mean patch
token, every learning rate) are trained at once. As in DINOv2 the best of them on the validation split is the result:
it is chosen on the images it is reported for. All of them are in the JSON. Unlike there, training images are not
augmented. Variants that a data set draws less often (skin tones) are left out of both splits. k-NN votes are weighted,
temperature 0.07, on the last class token, on the mean patch token, and on both.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from vtp_diffusion.data.image_datasets import DataConfig, ImageDataset, open_dataset
from vtp_diffusion.evaluation.linear_probe import LEARNING_RATES, LinearHeads, head_grid
from vtp_diffusion.evaluation.probe_features import ProbeFeatures, cached_features
from vtp_diffusion.metrics.classification import KNN_NEIGHBOURS, knn_accuracy
from vtp_diffusion.models.latent_space import autoencoder_identity
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_results
from vtp_diffusion.runtime.processes import check_alone, check_device, reading_processes


@dataclass(kw_only=True)
class LinearProbeConfig(Settings):
    """Settings of this program."""

    model: str = setting(help="folder of an AutoencoderVTP, a VTPModel or a released checkpoint")
    data: DataConfig = setting(help="images with labels")
    output: str = setting(help="FILE.json for the results")
    features: str | None = setting(None, "folder of the features; none = beside the output")
    num_layers: int = setting(4, "last layers whose class tokens a head may read", at_least=1)
    learning_rates: tuple[float, ...] = setting(LEARNING_RATES, "of a batch of 256; scaled with the batch")
    steps: int = setting(12500, "of training; 12500 is DINOv2's", at_least=1)
    train_batch_size: int = setting(1024, "images a step, at most the training split", at_least=1)
    neighbours: tuple[int, ...] = setting(KNN_NEIGHBOURS, "values of k of k-NN", at_least=1)
    seed: int = setting(0, "of weights and order", at_least=0)
    batch_size: int = setting(64, "images encoded at once", at_least=1)
    num_workers: int = setting(reading_processes(), "processes that read image files", at_least=0)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "torch device to run on")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        check_output(self.output)
        head_grid(self.num_layers, self.learning_rates)

    @property
    def features_folder(self) -> Path:
        return Path(self.features or self.output.removesuffix(".json") + "-features")


def open_splits(config: LinearProbeConfig) -> dict[str, ImageDataset]:
    """Both splits. Raises: ValueError where there is nothing to learn, or nothing held out."""
    datasets = {split: open_dataset(config.data, split) for split in ("train", "validation")}
    names = datasets["train"].label_names
    if len(names) < 2:
        raise ValueError(
            f"the images of {config.data.source} have one class, {names[0]!r}: give them folders a class, or a column "
            "of `datasets` with --data.label_column"
        )
    if datasets["validation"].label_names != names:
        raise ValueError(f"the splits have other classes: {names[:5]} and {datasets['validation'].label_names[:5]}")
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


def head_rows(
    config: LinearProbeConfig, train: ProbeFeatures, validation: ProbeFeatures, num_classes: int
) -> list[dict]:
    """Every head with its accuracies, best first."""
    heads = LinearHeads(head_grid(config.num_layers, config.learning_rates), num_classes)
    with tqdm(total=config.steps, desc=f"training {len(heads.settings)} heads") as progress:
        heads.train(train, config.steps, config.train_batch_size, config.seed, config.device, progress.update)
    rows = []
    for settings, held_out, seen in zip(
        heads.settings,
        heads.accuracies(validation, config.device),
        heads.accuracies(train, config.device, k=(1,)),
        strict=True,
    ):
        rows.append(asdict(settings) | {"top1": held_out[1], "top5": held_out[5], "train_top1": seen[1]})
    if all(row["top1"] is None for row in rows):
        raise ValueError(f"every head diverged: learning_rates {list(config.learning_rates)} are too large")
    return sorted(rows, key=lambda row: -1.0 if row["top1"] is None else row["top1"], reverse=True)


def main() -> None:
    check_alone("eval/linear_probe.py")
    config = parse_config(LinearProbeConfig, description=__doc__)
    from vtp_diffusion.models.vtp_model import load_encoder

    model = load_encoder(config.model).requires_grad_(False)
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
    heads = head_rows(config, train, validation, num_classes=len(datasets["train"].label_names))
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
        "neighbours": neighbour_rows(config, train, validation),
        "heads": heads,
    }
    results = write_results(config.output, "linear_probe", config, results)
    print_results(results)
    print(f"results: {config.output}")


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
        f"{'linear, best of ' + str(len(results['heads'])) + ' heads':34} top-1 {best['top1']:6.1%}   "
        f"top-5 {best['top5']:6.1%}   ({best['layers']} layers, {'with' if best['patches'] else 'without'} patches, "
        f"learning rate {best['learning_rate']:g}; {best['train_top1']:.1%} on training images)"
    )
    for row in results["neighbours"]:
        print(f"{row['neighbours']:>3}-NN, {row['features']:26} top-1 {row['top1']:6.1%}")


if __name__ == "__main__":
    run(main)
