"""Reconstructions of an autoencoder beside their originals: errors of every image, distances, and the worst cases."""

import heapq
from collections.abc import Sequence

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.images import from_uint8, image_grid, to_pil
from ..metrics.features import Extractor
from ..metrics.frechet import (
    JACKKNIFE_GROUPS,
    GaussianStatistics,
    frechet_distance,
    jackknife_deviation,
    jackknife_group,
)
from ..metrics.lpips import LPIPS
from ..metrics.pixels import psnr, ssim
from ..models.latent_space import reconstruct
from ..runtime.processes import gather_objects, this_process
from .one_pass import batches_of_this_process, gathered
from .sources import DatasetImages, image_batches

WORST = 16


class WorstCases:
    """The images of the lowest PSNR, with their reconstructions."""

    def __init__(self, count: int):
        self.count = count
        self._heap: list[tuple[float, int, torch.Tensor, torch.Tensor]] = []  # by -PSNR: the best of them is first out

    def update(self, indices: Sequence[int], ratios: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Add a batch: the images' indices, PSNR (B,), and originals and reconstructions, uint8 (B, 3, H, W)."""
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

    def picture(self) -> Image.Image:
        """Originals and, right of each, its reconstruction."""
        images, names = [], []
        for index, ratio, real, fake in self.sorted():
            images += to_pil(torch.stack([real, fake]))
            names += [f"image {index}", f"{ratio:.1f} dB"]
        return image_grid(images, 8, names)


class PairedStatistics:
    """Statistics of images and of their reconstructions: the distance between them, and its spread.

    Args:
        extractor: one for all batches, so that a GPU pads smaller ones.
        count: number of images.
        seed: decides their groups, see `jackknife_group`.
    """

    def __init__(self, extractor: Extractor, count: int, seed: int):
        self.extractor, network = extractor, extractor.network
        self.group = torch.from_numpy(jackknife_group(count, JACKKNIFE_GROUPS, seed))
        self.real, self.fake = ([GaussianStatistics(network.dim) for _ in range(JACKKNIFE_GROUPS)] for _ in range(2))

    def update(self, places: range, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Add a batch: originals and reconstructions, uint8 (B, 3, H, W), and their places among the images."""
        place = self.group[places.start : places.stop]
        for groups, images in ((self.real, real), (self.fake, fake)):
            features = self.extractor(images)["features"].cpu()
            for k in place.unique().tolist():
                groups[k].update(features[place == k])

    def gather(self) -> None:
        """Merge the statistics of all processes, on every process."""
        self.real, self.fake = (list(map(gathered, groups)) for groups in (self.real, self.fake))

    def distance(self) -> tuple[str, float, dict]:
        """Its name, its value and its spread."""
        real, fake = ([group for group in groups if group.count] for groups in (self.real, self.fake))
        network = self.extractor.network
        # against the very same images: on Inception's features that is the rFID
        name = "rFID" if network.name == "inception" else network.distance_name
        value = frechet_distance(*map(GaussianStatistics.merged, (real, fake)))
        kind = f"jackknife of {len(real)} random groups of pairs"
        return name, value, {"kind": kind, "value": jackknife_deviation(fake, real)}


def measure_reconstructions(
    vae: torch.nn.Module,
    lpips: LPIPS,
    statistics: list[PairedStatistics],
    images: DatasetImages,
    chosen: list[int],
    batch_size: int,
    device: str,
) -> tuple[torch.Tensor, WorstCases]:
    """Reconstruct and compare the images with the indices `chosen`; the processes share the batches.

    Returns: on every process, for all images: PSNR, SSIM and LPIPS (N, 3), float64 on the CPU, and the worst cases.
        `statistics` are filled with all images too.
    """
    places = batches_of_this_process(len(chosen), batch_size)
    batches = image_batches(images, [chosen[place] for batch in places for place in batch], batch_size)
    values, worst = torch.zeros(len(chosen), 3, dtype=torch.float64), WorstCases(WORST)
    shown = tqdm(batches, total=len(places), desc="reconstructing", disable=this_process()[0] > 0)
    for batch, real in zip(places, shown, strict=True):
        real = real.to(device)
        fake = reconstruct(vae, real)
        with torch.inference_mode():
            distances = lpips(from_uint8(real), from_uint8(fake))
        rows = [part.cpu().double() for part in (psnr(real, fake), ssim(real, fake), distances)]
        values[batch.start : batch.stop] = torch.stack(rows, 1)
        worst.update([chosen[place] for place in batch], rows[0], real, fake)
        for pair in statistics:
            pair.update(batch, real, fake)
    for found in (worst, *statistics):
        found.gather()
    return torch.stack(gather_objects(values)).sum(0), worst  # a row is 0 on all processes but the one that made it


def mean_psnr(ratios: torch.Tensor) -> dict:
    """The mean of (N,) in dB without images that equal their reconstructions, whose PSNR is infinite."""
    finite = ratios[ratios.isfinite()]
    return {"psnr": finite.mean().item() if len(finite) else None, "equal_images": len(ratios) - len(finite)}
