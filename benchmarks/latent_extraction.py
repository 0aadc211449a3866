"""Images a second that train_dit/extract_latents.py can encode at best, against upstream's encoder on one H100.

    python benchmarks/latent_extraction.py --output benchmarks/results/latent_extraction.json

Measured is what the program does with a batch once it has been read: uint8 images to the device, encoding, rounding to
bfloat16, latents back. Two images of it make one sample, the second mirrored. The weights are random, which decides no
time. "autocast" is --mixed_precision bf16, whose residual stream is float32 as upstream's; "bfloat16 stream" is the
same with one in bfloat16; "bfloat16" rounds the weights as well; each as it is and compiled. `latent_error` is how far
latents of random weights are from those in float32, relative to these.
The peer's numbers hold for VTP-Large at 256 pixels, bfloat16, batches of 256, one H100; the ratios are only printed
for that. `--size tiny` is for trying the program on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.images import from_uint8
from vtp_diffusion.models.latent_space import encode_raw
from vtp_diffusion.runtime.disk import write_json
from vtp_diffusion.runtime.reproducibility import autocast

PEER = {"eager": 1177, "compiled": 2063}  # images a second, as shipped and with its whole model compiled
WIDTHS = {"tiny": (16, 1, 2), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=WIDTHS, default="large", help="of the VTP encoder")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10, help="batches measured; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def build(arguments: argparse.Namespace) -> AutoencoderVTP:
    names = ("hidden_size", "num_layers", "num_attention_heads")
    encoder = {f"encoder_{name}": value for name, value in zip(names, WIDTHS[arguments.size], strict=True)}
    decoder = {f"decoder_{name}": value for name, value in zip(names, WIDTHS["tiny"], strict=True)}  # not used
    vae = AutoencoderVTP(sample_size=arguments.resolution, **encoder, **decoder)
    return vae.eval().requires_grad_(False).to(arguments.device)


@torch.no_grad()
def images_per_second(vae: AutoencoderVTP, encode: Callable, precision: str, arguments: argparse.Namespace) -> float:
    """Median over the repeats, after two batches that compile and warm up."""
    side, device = arguments.resolution, torch.device(arguments.device)
    images = torch.randint(0, 256, (arguments.batch_size, 3, side, side), dtype=torch.uint8)
    seconds = []
    for _ in range(arguments.repeats + 2):
        start = time.perf_counter()
        pixels = from_uint8(images.to(device))
        with autocast(device, precision):
            for source in (pixels, pixels.flip(3)):
                encode(vae, source).to(torch.bfloat16).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * arguments.batch_size / statistics.median(seconds[2:])


@torch.no_grad()
def a_latent(vae: AutoencoderVTP, precision: str, arguments: argparse.Namespace) -> torch.Tensor:
    """The latents of one batch of noise, at most 8 images, float32."""
    side, device = arguments.resolution, torch.device(arguments.device)
    images = (
        torch.rand(min(8, arguments.batch_size), 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    with autocast(device, precision):
        return encode_raw(vae, images.to(device, vae.dtype)).float()


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    torch.set_float32_matmul_precision("high")
    on = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    comparable = "H100" in on and (arguments.size, arguments.resolution, arguments.batch_size) == ("large", 256, 256)
    results = {
        "images_per_second": {},
        "latent_error": {},
        "ratio_to_peer": {},
        "peer": PEER,
        "device": on,
        "torch": torch.__version__,
    }
    results |= {name: value for name, value in vars(arguments).items() if name not in ("output", "device")}
    for kind, precision in (("autocast", "bf16"), ("bfloat16 stream", "bf16"), ("bfloat16", "no")):
        vae = build(arguments)
        exact = a_latent(vae, "no", arguments)
        if kind == "bfloat16":
            vae.to(torch.bfloat16)
        elif kind == "bfloat16 stream":
            token = vae.encoder.embeddings.cls_token  # whose dtype the residual stream gets
            token.data = token.data.to(torch.bfloat16)
        results["latent_error"][kind] = ((a_latent(vae, precision, arguments) - exact).norm() / exact.norm()).item()
        for mode in PEER:
            encode = torch.compile(encode_raw) if mode == "compiled" else encode_raw
            name, rate = f"{kind}, {mode}", images_per_second(vae, encode, precision, arguments)
            results["images_per_second"][name] = rate
            if comparable:
                results["ratio_to_peer"][name] = rate / PEER[mode]
            ratio = f"{rate / PEER[mode]:.2f} x the peer's" if comparable else "not comparable with the peer's"
            print(f"{name:<20} {rate:>9,.1f} images/s, {ratio}", flush=True)
            if arguments.output is not None:  # now: compiling the next one may take longer than there is time
                write_json(arguments.output, results)


if __name__ == "__main__":
    main()
