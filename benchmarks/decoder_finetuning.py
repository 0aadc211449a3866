"""What stage 2 does to the shipped tokenizer: PSNR, LPIPS and Fréchet distance on held-out emoji, before and after.

Runs train_vtp/finetune_decoder.py, then eval/reconstruction.py on the autoencoder it began with and on its result, and
writes the three results side by side. One GPU, less than ten minutes:

    python benchmarks/decoder_finetuning.py --run_dir runs/finetune-decoder-openmoji \\
        --output benchmarks/results/decoder_finetuning.json

Options after `--` go to the training program. A CPU, to see that it works:

    python benchmarks/decoder_finetuning.py --run_dir runs/finetune-decoder-tiny --num_images 8 --device cpu \\
        --training_config train_vtp/configs/finetune_decoder_tiny.yaml --output runs/decoder_finetuning.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vtp_diffusion.config import read_yaml

ROOT = Path(__file__).parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "train_vtp/configs/finetune_decoder_openmoji.yaml"
    parser.add_argument("--training_config", type=Path, default=default, help="YAML of train_vtp/finetune_decoder.py")
    parser.add_argument("--run_dir", type=Path, required=True, help="run folder; an interrupted run is resumed")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--num_images", type=int, help="held-out images that are measured; all of them by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("training", nargs="*", help="options of the training program, after --")
    arguments = parser.parse_args()
    program = [sys.executable, str(ROOT / "train_vtp/finetune_decoder.py"), "--config", str(arguments.training_config)]
    subprocess.run([*program, "--output_dir", str(arguments.run_dir), *arguments.training], check=True)

    settings = read_yaml(arguments.run_dir / "config.yaml")
    trained = json.loads((arguments.run_dir / "results.json").read_text(encoding="utf-8"))
    source = Path(settings["vae"])
    before = source / "vae" if (source / "vae").is_dir() else source
    results = {"device": device_name(arguments.device), "torch": torch.__version__}
    for name, folder in (("before", before), ("after", arguments.run_dir / "vae")):
        results[name] = measure(folder, settings["data"], arguments)
    summary = {name: {k: results[name][k] for k in ("psnr", "lpips", "distances")} for name in ("before", "after")}
    results = {"summary": summary} | results | {"training": trained}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


def measure(vae: Path, data: dict, arguments: argparse.Namespace) -> dict:
    """The results of eval/reconstruction.py: FD-VGG and FD-EffLite0, LPIPS with AlexNet, which is not trained on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, str(ROOT / "eval/reconstruction.py"), "--vae", str(vae), "--output", str(path)]
        command += ["--data.source", data["source"], "--data.resolution", str(data["resolution"])]
        command += ["--device", arguments.device, "--feature_network", "vgg16", "efficientnet_lite0"]
        if arguments.num_images is not None:
            command += ["--num_images", str(arguments.num_images)]
        subprocess.run(command, check=True)
        return json.loads(path.read_text(encoding="utf-8"))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
