from types import SimpleNamespace

import jinja2
import pytest

from vtp_diffusion.evaluation.validation import ValidationConfig
from vtp_diffusion.generation.model_card import write_model_card

VALUES = {"parameters": "9.8 M", "data": "30 latents", "batch": 4, "speed": "9 s", "times": "uniform"}
CONFIG = SimpleNamespace(
    model=SimpleNamespace(num_layers=2, num_attention_heads=4, attention_head_dim=16, patch_size=1),
    validation=ValidationConfig(guidance_scale=2.0),
    guide=SimpleNamespace(text="classifier-free"),
    optimizer="adamw",
    max_train_steps=6,
    learning_rate=1e-3,
    lr_scheduler="cosine",
    ema_decay=0.9,
    class_dropout_prob=0.1,
    time_shift=1.0,
    shift=0.3,
)


def test_names_beyond_ten_are_counted(tmp_path):
    names = [f"class {k}" for k in range(12)]
    write_model_card(tmp_path / "README.md", CONFIG, "AutoencoderVTP", names=names, **VALUES)
    card = (tmp_path / "README.md").read_text()
    assert "12 classes: class 0, class 1, " in card and "class 9, ...." in card and "class 10" not in card
    assert '{"guidance_scale": 2.0, "num_inference_steps": 50}' in card
    assert "\n- AdamW,\n  learning rate 0.001" in card
    assert "class dropout 0.1.\n" in card
    assert "2 layers, 4 heads of 16, patch 1." in card and "Training images" not in card


def test_guidance_and_optimizer_are_those_of_the_run(tmp_path):
    guidance = {"guidance_scale": 3.5, "guidance": "internal", "guidance_interval": (0.0, 0.9)}
    settings = {"validation": ValidationConfig(**guidance, num_inference_steps=9), "optimizer": "muon"}
    config = SimpleNamespace(**vars(CONFIG) | settings)
    config.model = SimpleNamespace(**vars(CONFIG.model), base_head_layer=1)
    write_model_card(tmp_path / "README.md", config, "AutoencoderVTP", names=["cat"], **VALUES)
    card = (tmp_path / "README.md").read_text()
    call = '{"guidance_scale": 3.5, "guidance": "internal", "guidance_interval": [0.0, 0.9], "num_inference_steps": 9}'
    assert "\n- Muon for the matrices inside blocks, AdamW for the rest,\n  learning rate 0.001" in card
    assert f"settings = {call}\n" in card and "guidance: by the base head after block 1 (internal" in card


def test_a_gap_is_refused(tmp_path):
    with pytest.raises(jinja2.UndefinedError, match="names"):
        write_model_card(tmp_path / "README.md", CONFIG, "AutoencoderKL", **VALUES)
    assert not (tmp_path / "README.md").exists()
