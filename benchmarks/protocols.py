"""How much the protocols that are called FID-50K differ, on images of one pipeline and one Inception network.

    python benchmarks/protocols.py --pipeline weights/openmoji-128 --output benchmarks/results/protocols_cpu.json

Samples are made with random labels and with equally many of each class, and converted to uint8 in each of the ways
that projects use; Inception's input is resized as in TensorFlow 1, and once with centred pixels, a mistake of other
ports. The table has the distance of every choice and its difference to protocol adm. Inception's weights are random
unless --weights names the file. With random ones these are no FIDs: they tell how sensitive such features are, not how
far published numbers differ. A port in JAX cannot be run here.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.images import to_uint8
from vtp_diffusion.generation.sampling import draw_labels, initial_noise
from vtp_diffusion.generation.solvers import use_solver
from vtp_diffusion.metrics import inception
from vtp_diffusion.metrics.features import extract_features
from vtp_diffusion.metrics.frechet import GaussianStatistics, frechet_distance, jackknife_deviation
from vtp_diffusion.runtime.disk import write_json
from vtp_diffusion.runtime.reproducibility import random_stream

GROUPS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="weights/openmoji-128", help="folder of the pipeline to sample")
    parser.add_argument("--num_images", type=int, default=500, help="samples of each label rule, and real images")
    parser.add_argument("--steps", type=int, default=10, help="evaluations of the network (UniPC)")
    parser.add_argument("--weights", type=Path, help="file of the Inception network; none: random weights")
    parser.add_argument("--batch_size", type=int, default=25, help="images at once")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.pipeline).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    use_solver(pipe, "unipc")
    with TemporaryDirectory() as folder:
        file = arguments.weights or inception.save_random_inception(Path(folder) / "random.pth", seed=0)
        network = inception.InceptionFeatures(file)
    samples = {rule: sample(pipe, rule, arguments) for rule in ("random", "balanced")}
    real = real_images(samples["random"].shape[-1], arguments.num_images)

    def statistics(images: torch.Tensor) -> list[GaussianStatistics]:
        batches = tqdm(images.split(arguments.batch_size), desc="features", leave=False)
        features = extract_features(network, batches, arguments.device)
        return [GaussianStatistics.of(part, device=arguments.device) for part in features.chunk(GROUPS)]

    reference = GaussianStatistics.merged(statistics(real))
    drawn, even = samples["random"], samples["balanced"]
    half_up, to_even = to_uint8(drawn, "half up"), to_uint8(drawn)
    truncated = (127.5 * (drawn.clamp(-1, 1) + 1)).to(torch.uint8)
    sets = {
        "adm: labels drawn, half up": half_up,
        "labels drawn, half to even": to_even,
        "labels drawn, truncated": truncated,
        "torch-fidelity, jit: as many of each class, half to even": to_uint8(even),
    }
    found = {name: (statistics(images), reference) for name, images in sets.items()}
    tensorflow1, inception.resize_like_tensorflow1 = inception.resize_like_tensorflow1, resize_centred
    resized = statistics(half_up)
    found["labels drawn, half up, samples alone resized with centred pixels"] = resized, reference
    found["the same, real images too"] = resized, GaussianStatistics.merged(statistics(real))
    inception.resize_like_tensorflow1 = tensorflow1
    rows = [
        {
            "choice": name,
            "distance": frechet_distance(against, GaussianStatistics.merged(groups)),
            "standard_error": jackknife_deviation(groups, against),
        }
        for name, (groups, against) in found.items()
    ]
    for row in rows:
        row["from_adm"] = row["distance"] - rows[0]["distance"]
        print(f"{row['choice']:72} {row['distance']:10.4f} ± {row['standard_error']:.2g} {row['from_adm']:+10.4f}")
    shares = {
        "half_to_even": (half_up != to_even).float().mean().item(),
        "truncated": (half_up != truncated).float().mean().item(),
    }
    print(f"pixels that differ from half up: {shares['half_to_even']:.2g}, truncated {shares['truncated']:.2g}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    del settings["output"]
    results = {"settings": settings, "weights": "random, seed 0" if arguments.weights is None else "given"}
    results |= {"rows": rows, "share_of_pixels_unlike_half_up": shares, "torch": torch.__version__}
    if arguments.output:
        write_json(arguments.output, json.loads(json.dumps(results)))


@torch.inference_mode()
def sample(pipe: DiffusionPipeline, rule: str, arguments: argparse.Namespace) -> torch.Tensor:
    """Float images (N, 3, H, W) around [-1, 1] on the CPU."""
    labels, images = draw_labels(rule, arguments.num_images, pipe.transformer.config.num_classes, seed=0), []
    for numbers in tqdm(torch.arange(arguments.num_images).split(arguments.batch_size), desc=f"{rule} labels"):
        noise = initial_noise(pipe, numbers.tolist(), seed=0)
        wanted = [labels[k] for k in numbers]
        made = pipe(wanted, latents=noise, num_inference_steps=arguments.steps, output_type="latent").images
        images.append(pipe.decode_latents(made).float().cpu())
    return torch.cat(images)


def real_images(side: int, count: int) -> torch.Tensor:
    """uint8 (count, 3, side, side), random ones of OpenMoji."""
    dataset = open_dataset(DataConfig(source="openmoji", resolution=side))
    chosen = random_stream("real images", 0).permutation(len(dataset))[:count].tolist()
    return torch.stack([item["image"] for item in dataset.__getitems__(chosen)])


def resize_centred(images: torch.Tensor, side: int = inception.SIDE) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, (side, side), mode="bilinear", align_corners=False)


if __name__ == "__main__":
    main()
