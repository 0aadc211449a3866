"""The first 200 losses of a small LightningDiT on a fixed set of latents, trained by train_dit/train.py on a CPU.

    python tests/learning_curve.py        writes tests/fixtures/learning_curve.json

Four classes, each with a pattern of its own over channels and places, an amplitude and a little noise: something that
a network can learn in 200 steps. A change of the method, of the initialisation, of the order of the data or of what is
drawn shows in the curve.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.latent_shards import write_shard

ROOT = Path(__file__).parents[1]
CURVE = ROOT / "tests" / "fixtures" / "learning_curve.json"
SHAPE, NUM_LATENTS, NUM_CLASSES = (4, 4, 4), 256, 4
SETTINGS = {
    "max_train_steps": 200,
    "train_batch_size": 32,
    "learning_rate": 2e-3,
    "ema_decay": 0.99,
    "log_steps": 1,
    "checkpointing_steps": 200,
    "validation_steps": 200,
    "report_to": "none",
    "model.num_layers": 2,
    "model.num_attention_heads": 4,
    "model.attention_head_dim": 12,
    "model.qk_norm": "true",
}


def load_program():
    spec = importlib.util.spec_from_file_location("program_train_dit", ROOT / "train_dit" / "train.py")
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # dataclasses look their annotations up there
    spec.loader.exec_module(program)
    return program


def write_data(folder: Path) -> None:
    """vae/, which is only asked for its statistics, and latents/, as upstream's extraction leaves them."""
    random = torch.Generator().manual_seed(0)
    patterns = torch.randn(NUM_CLASSES, *SHAPE, generator=random)
    labels = torch.arange(NUM_LATENTS) % NUM_CLASSES
    amplitude = 1 + 0.3 * torch.randn(NUM_LATENTS, 1, 1, 1, generator=random)
    latents = amplitude * patterns[labels] + 0.1 * torch.randn(NUM_LATENTS, *SHAPE, generator=random)
    (folder / "latents").mkdir()
    write_shard(folder / "latents" / "latents_rank00_shard000.safetensors", latents, latents.flip(3).clone(), labels)
    names = ("hidden_size", "num_layers", "num_attention_heads")
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in zip(names, (16, 1, 2), strict=True)}
    statistics = {"latents_mean": [0.1, 0.0, -0.1, 0.0], "latents_std": [1.0, 1.1, 0.9, 1.0]}
    vae = AutoencoderVTP(sample_size=16, patch_size=4, latent_channels=SHAPE[0], **statistics, **sides)
    vae.save_pretrained(folder / "vae")


def words(folder: Path, run: str, **changes) -> list[str]:
    paths = {"vae": folder / "vae", "latents": folder / "latents", "output_dir": folder / run}
    return [f"--{name}={value}" for name, value in (SETTINGS | paths | changes).items()]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def learning_curve(folder: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of every step."""
    write_data(folder)
    load_program().main(words(folder, "run"))
    lines = [line for line in read_log(folder / "run") if "loss" in line]
    return {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        curve = learning_curve(Path(temporary))
    rounded = {name: [float(f"{value:.7g}") for value in values] for name, values in curve.items()}
    CURVE.write_text(json.dumps(rounded) + "\n", encoding="utf-8")
    print(f"{CURVE}: loss {curve['loss'][0]:.4f} to {curve['loss'][-1]:.4f}")
