"""Saved models whose weights do not fit are refused, not completed at random."""

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file
from test_autoencoder_vtp import tiny_model as tiny_autoencoder
from test_pipeline_lightning_dit import tiny_pipeline
from test_transformer_lightning_dit import tiny_model as tiny_transformer
from test_vtp_model import tiny_vtp

KEYS = {"autoencoder": "bottleneck.weight", "transformer": "proj_out.bias", "vtp": "text_model.norm.bias"}
MODELS = {"autoencoder": tiny_autoencoder, "transformer": tiny_transformer, "vtp": tiny_vtp}


def damage(folder, changes: dict) -> None:
    """Replace tensors of the only weight file, or remove those that are None."""
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path) | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_weights_that_do_not_fit(tmp_path, kind, low_cpu_mem_usage):
    model, key = MODELS[kind](), KEYS[kind]
    for changes, message in (
        ({key: None}, rf"missing keys \['{key}'\]"),
        ({"surprise": torch.zeros(1)}, r"unexpected keys \['surprise'\]"),
        ({key: torch.zeros(1, 7)}, key),
    ):
        model.save_pretrained(tmp_path)
        damage(tmp_path, changes)
        for loader in (type(model), AutoModel):
            with pytest.raises(ValueError, match=message):
                loader.from_pretrained(str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    options = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    assert type(model).from_pretrained(tmp_path, **options)  # asked for: the shape is wrong still
    damage(tmp_path, {key: None})
    _, found = type(model).from_pretrained(tmp_path, output_loading_info=True, low_cpu_mem_usage=False)
    assert found["missing_keys"] == [key]


def test_a_pipeline_with_a_part_that_does_not_fit(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    damage(tmp_path / "transformer", {"blocks.0.mlp.w3.bias": None})
    with pytest.raises(ValueError, match="transformer does not fit LightningDiTTransformer2DModel: missing keys"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_model_whose_projections_were_fused_is_saved_and_loaded(tmp_path, part):
    pipeline = tiny_pipeline()
    whole = getattr(pipeline, part).state_dict()
    getattr(pipeline, part).fuse_qkv_projections()
    pipeline.save_pretrained(tmp_path)
    loaded = getattr(DiffusionPipeline.from_pretrained(tmp_path), part).state_dict()
    assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], whole[name]) for name in whole)
