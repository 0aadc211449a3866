"""Folders of saved models: what is wrong with one is said with its name, whoever opens it."""

import json

import pytest
import torch
from test_vtp_model import tiny_vtp

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.models.loading import find_autoencoder, load_autoencoder, load_encoder, load_vtp


def change_settings(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_encoder_is_that_of_either_model(tmp_path):
    model = tiny_vtp()
    model.save_pretrained(tmp_path / "vtp")
    model.autoencoder.save_pretrained(tmp_path / "vae")
    assert type(load_vtp(tmp_path / "vtp")) is type(model)
    for folder in (tmp_path / "vtp", tmp_path / "vae"):
        encoder = load_encoder(folder)
        assert type(encoder) is AutoencoderVTP and not encoder.training
        assert all(
            torch.equal(p, q) for p, q in zip(encoder.parameters(), model.autoencoder.parameters(), strict=True)
        )


@pytest.mark.parametrize("load", [load_autoencoder, load_vtp, load_encoder])
def test_settings_that_make_no_model_are_refused_with_the_folder(tmp_path, load):
    tiny_vtp().autoencoder.save_pretrained(tmp_path)
    change_settings(tmp_path, encoder_num_attention_heads=0)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded .ZeroDivisionError"):
        load(tmp_path)
    change_settings(tmp_path, encoder_num_attention_heads=2, encoder_num_layers=10**12)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: encoder_num_layers is 1000000000000, expected at"):
        load(tmp_path)


def test_where_the_autoencoder_is_looked_for(tmp_path):
    with pytest.raises(ValueError, match="neither config.json nor vae/"):
        find_autoencoder(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="holds checkpoints but no vae/"):
        find_autoencoder(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderVTP"}')
    assert find_autoencoder(tmp_path) == find_autoencoder(tmp_path / "vae") == tmp_path / "vae"
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="holds a AutoencoderKL, expected an AutoencoderVTP"):
        find_autoencoder(tmp_path)
