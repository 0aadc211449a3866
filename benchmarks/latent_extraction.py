"""Highest rates of encoding, as in train_dit/extract_latents.py, and of decoding, against upstream's on one H100.

    python benchmarks/latent_extraction.py --output benchmarks/results/latent_extraction.json

Measured is what the program does with a batch once it has been read into pinned memory: uint8 images to the device,
encoding, rounding to bfloat16, latents back. Every image is encoded twice, the second time mirrored. Rows "decode"
turn latents in pinned memory into uint8 images there. The weights are random, which changes no time. "autocast" is
--mixed_precision bf16, whose residual stream is float32 as upstream's; "bfloat16 stream" is the same with the
encoder's residual stream in bfloat16; "bfloat16" has bfloat16 weights as well. Each runs eager, with blocks compiled
one by one (--compile), and, last because it takes longest, compiled as a whole. `first_batch_seconds` includes
compilation. `latent_error` is the difference between latents of random weights and those in float32, relative to the
latter. The peer's numbers hold for VTP-Large at 256 pixels, bfloat16, batches of 256, one H100; the ratios are only
printed for that. `--size tiny` is for trying the program on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.images import from_uint8, to_uint8
from vtp_diffusion.models.latent_space import decode_to_images, encode_raw
from vtp_diffusion.runtime.disk import write_json
from vtp_diffusion.runtime.reproducibility import autocast
from vtp_diffusion.training.compilation import compile_modules

# Images a second, as shipped and with its whole model compiled.
PEER = {"encode": {"eager": 1177, "compiled": 2063}, "decode": {"eager": 1382, "compiled": 2691}}
KINDS = {"autocast": "bf16", "bfloat16 stream": "bf16", "bfloat16": "no"}  # and precision of products
MODES = ("eager", "compiled", "whole compiled")
WIDTHS = {"tiny": (16, 1, 2), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=WIDTHS, default="large", help="of the VTP")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10, help="batches measured; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def build(kind: str, arguments: argparse.Namespace) -> AutoencoderVTP:
    names = ("hidden_size", "num_layers", "num_attention_heads")
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in zip(names, WIDTHS[arguments.size], strict=True)
    }
    torch.manual_seed(0)  # the same weights of every kind
    with torch.device(arguments.device):
        vae = AutoencoderVTP(sample_size=arguments.resolution, **sizes).eval().requires_grad_(False)
    if kind == "bfloat16":
        vae.to(torch.bfloat16)
    elif kind == "bfloat16 stream":
        token = vae.encoder.embeddings.cls_token  # whose dtype the residual stream gets
        token.data = token.data.to(torch.bfloat16)
    return vae


def in_pinned_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def encoding(vae: AutoencoderVTP, encode: Callable, arguments: argparse.Namespace) -> Callable[[], int]:
    """What encodes a batch and its mirror images, and says how many."""
    side, device = arguments.resolution, torch.device(arguments.device)
    images = torch.randint(0, 256, (arguments.batch_size, 3, side, side), dtype=torch.uint8)
    images = in_pinned_memory(images, device)

    def step() -> int:
        pixels = from_uint8(images.to(device, non_blocking=True))
        for source in (pixels, pixels.flip(3)):
            encode(vae, source).to(torch.bfloat16).cpu()  # waits for the device
        return 2 * len(images)

    return step


def decoding(vae: AutoencoderVTP, decode: Callable, arguments: argparse.Namespace) -> Callable[[], int]:
    """What decodes a batch, and says how many images it has."""
    side, device = arguments.resolution, torch.device(arguments.device)
    grid = side // vae.spatial_compression_ratio
    latents = in_pinned_memory(torch.randn(arguments.batch_size, vae.latent_channels, grid, grid), device)
    images = in_pinned_memory(torch.empty(arguments.batch_size, 3, side, side, dtype=torch.uint8), device)

    def step() -> int:
        images.copy_(to_uint8(decode(vae, latents.to(device, non_blocking=True))), non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(images)

    return step


@torch.no_grad()
def measure(step: Callable[[], int], precision: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Images a second, the median over the repeats after two batches that compile and warm up; the first's seconds."""
    seconds = []
    for _ in range(arguments.repeats + 2):
        start = time.perf_counter()
        with autocast(torch.device(arguments.device), precision):
            count = step()
        seconds.append(time.perf_counter() - start)
    return count / statistics.median(seconds[2:]), seconds[0]


@torch.no_grad()
def a_latent(kind: str, precision: str, arguments: argparse.Namespace) -> torch.Tensor:
    """The latents of one batch of noise, at most 8 images, float32."""
    side, device, vae = arguments.resolution, torch.device(arguments.device), build(kind, arguments)
    images = (
        torch.rand(min(8, arguments.batch_size), 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    with autocast(device, precision):
        return encode_raw(vae, images.to(device, vae.dtype)).float()


def rows() -> list[tuple[str, str, str]]:
    """(encode or decode, kind, mode) in the order measured: those that take longest to compile come last."""
    every = [(work, kind, mode) for mode in MODES for work in PEER for kind in KINDS]
    return [row for row in every if row[:2] != ("decode", "bfloat16 stream")]  # the encoder's alone


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    torch.set_float32_matmul_precision("high")
    on = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    comparable = "H100" in on and (arguments.size, arguments.resolution, arguments.batch_size) == ("large", 256, 256)
    results = {name: {} for name in ("images_per_second", "first_batch_seconds", "latent_error", "ratio_to_peer")}
    results |= {"peer": PEER, "device": on, "torch": torch.__version__}
    results |= {name: value for name, value in vars(arguments).items() if name not in ("output", "device")}
    exact = a_latent("autocast", "no", arguments)
    for kind, precision in KINDS.items():
        error = (a_latent(kind, precision, arguments) - exact).norm() / exact.norm()
        results["latent_error"][kind] = error.item()
    for work, kind, mode in rows():
        vae = build(kind, arguments)
        function, make = (encode_raw, encoding) if work == "encode" else (decode_to_images, decoding)
        if mode == "compiled":
            compile_modules(vae, vae._repeated_blocks)
        elif mode == "whole compiled":
            function = torch.compile(function)
        rate, first = measure(make(vae, function, arguments), KINDS[kind], arguments)
        name = f"{kind}, {mode}" if work == "encode" else f"decode, {kind}, {mode}"
        results["images_per_second"][name], results["first_batch_seconds"][name] = rate, first
        peer = PEER[work]["eager" if mode == "eager" else "compiled"]
        if comparable:
            results["ratio_to_peer"][name] = rate / peer
        ratio = f"{rate / peer:.2f} x the peer's" if comparable else "not comparable with the peer's"
        print(f"{name:<32} {rate:>9,.1f} images/s, first batch {first:.1f} s, {ratio}", flush=True)
        if arguments.output is not None:  # now: compiling the next one may take longer than there is time
            write_json(arguments.output, results)


if __name__ == "__main__":
    main()
