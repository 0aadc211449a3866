import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import GOLDEN
from safetensors.torch import load_file, save_file
from test_autoencoder_vtp import public_config

from vtp_diffusion import AutoencoderVTP, VTPModel
from vtp_diffusion.models import conversion_vtp
from vtp_diffusion.models.autoencoder_vtp import VTP_SIZES
from vtp_diffusion.models.conversion import load_strict
from vtp_diffusion.models.conversion_vtp import convert_vtp_config, convert_vtp_state_dict
from vtp_diffusion.models.loading import load_vtp
from vtp_diffusion.models.vtp_blocks import rotary_periods

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASED = GOLDEN / "vtp_released"
VTP_FACTS = json.loads(gzip.decompress((FIXTURES / "vtp_state_dicts.json.gz").read_bytes()))


def released_options(**changes) -> dict:
    return json.loads((RELEASED / "config.json").read_text()) | changes


@pytest.fixture
def folder(tmp_path) -> Path:
    """A released folder that a test may damage."""
    return Path(shutil.copytree(RELEASED, tmp_path / "released"))


def rewrite(folder: Path, **changes) -> None:
    """Replace tensors of the checkpoint, or remove those that are None."""
    state = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("size", VTP_SIZES)
def test_every_entry_of_the_released_vtp_state_dicts_has_its_place(size):
    architecture = VTP_SIZES[size].architecture()
    with torch.device("meta"):
        model = VTPModel(**architecture)
    released = {}
    for name, (dtype, shape) in VTP_FACTS[size].items():
        if name.endswith("periods"):  # compared by value
            released[name] = rotary_periods(64, torch.bfloat16)
            assert list(released[name].shape) == shape and dtype == "bfloat16"
        else:
            released[name] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    converted = convert_vtp_state_dict(released, model.config)
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    sizes = [sum(tensor.numel() for tensor in state.values()) for state in (released, converted)]
    assert sizes[0] - sizes[1] == 2 * 16  # the periods of encoder and decoder, which are computed
    load_strict(model, converted, source=size)


def test_vtp_config():
    config = convert_vtp_config(released_options())
    assert config == dict(
        sample_size=64,
        patch_size=16,
        latent_channels=16,
        encoder_hidden_size=64,
        encoder_num_layers=4,
        encoder_num_attention_heads=2,
        encoder_qk_norm=False,
        decoder_hidden_size=96,
        decoder_num_layers=3,
        decoder_num_attention_heads=4,
        decoder_qk_norm=False,
        rope_dtype="bfloat16",
        text_hidden_size=48,
        text_num_layers=2,
        text_num_attention_heads=2,
        text_context_length=16,
        text_vocab_size=128,
        projection_dim=48,
    )
    options = released_options(vision_use_qk_norm=True, vision_ffn_layer="swiglu64")
    del options["text_proj_type"]
    assert convert_vtp_config(options, "float32") == config | dict(encoder_qk_norm=True, rope_dtype="float32")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("decoder_norm_layer", "rmsnorm"),
        ("vision_norm_layer", "layernorm"),
        ("vision_clip_feat", "pooled"),
        ("vision_bottleneck_ae_only", False),
        ("vision_bottleneck_ae_only", 1),
        ("text_quick_gelu", True),
        ("text_pool_type", "last"),
        ("text_no_causal_mask", True),
        ("model_type", "clip"),
        ("decoder_init_values", 1e-5),
        ("init_logit_bias", -10.0),
        ("vision_depth", 0),
        ("vision_depth", True),
        ("text_vocab_size", "128"),
        ("vision_use_qk_norm", 1),
    ],
)
def test_options_that_are_not_supported(option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        convert_vtp_config(released_options(**{option: value}))


def test_unknown_and_missing_options_are_listed():
    options = released_options(vision_registers=4, text_extra=None)
    del options["vision_depth"], options["text_pool_type"]
    with pytest.raises(ValueError) as error:
        convert_vtp_config(options)
    assert "['text_extra', 'vision_registers']" in str(error.value)
    assert "['text_pool_type', 'vision_depth']" in str(error.value)


def test_autoencoder_is_a_part_of_the_whole(folder):
    vtp, autoencoder = VTPModel.from_released(folder), AutoencoderVTP.from_released(folder)
    whole = vtp.autoencoder.state_dict()
    assert whole.keys() == autoencoder.state_dict().keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in autoencoder.state_dict().items())
    assert public_config(autoencoder) == public_config(vtp.autoencoder) and autoencoder.config.latents_mean is None
    storages = [parameter.untyped_storage().data_ptr() for parameter in vtp.parameters()]
    assert len(set(storages)) == len(storages) and all(parameter.requires_grad for parameter in vtp.parameters())


@pytest.mark.parametrize("model_class", [AutoencoderVTP, VTPModel])
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("trunk.blocks.1.attn.qkv.bias", None, r"missing keys \['trunk.blocks.1.attn.qkv.bias'\]"),
        ("trunk.blocks.4.norm1.weight", torch.zeros(64), r"unexpected keys \['trunk.blocks.4.norm1.weight'\]"),
        ("trunk.blocks.0.ls1.gamma", torch.zeros(64), r"unexpected keys \['trunk.blocks.0.ls1.gamma'\]"),
        ("trunk.blocks.1.attn.qkv.bias", torch.zeros(193), r"attn.to_q.bias has shape \(65,\), expected \(64,\)"),
        ("pixel_decoder.proj_in.weight", torch.zeros(96, 16, 3, 3), r"proj_in.weight has shape \(96, 16, 3, 3\)"),
        ("trunk.cls_token", torch.zeros(1, 1, 64, dtype=torch.int8), "cls_token is torch.int8"),
        ("trunk.rope_embed.periods", torch.zeros(8, dtype=torch.bfloat16), "trunk.rope_embed.periods"),
        ("pixel_decoder.rope_embed.periods", torch.zeros(5, dtype=torch.bfloat16), "heads of 24 channels"),
        ("trunk.rope_embed.periods", rotary_periods(32, torch.float32), "torch.float32"),
    ],
)
def test_checkpoints_that_do_not_fit(folder, model_class, name, tensor, message):
    rewrite(folder, **{name: tensor})
    with pytest.raises(ValueError, match=message) as error:
        model_class.from_released(folder)
    assert str(error.value).startswith(str(folder))


def test_files_that_cannot_be_read(folder):
    with pytest.raises(ValueError, match="rope_dtype='half'"):
        VTPModel.from_released(folder, rope_dtype="half")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for size in (len(content) - 1, 100, 0):
        weights.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"{weights} is not a complete safetensors file"):
            AutoencoderVTP.from_released(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        AutoencoderVTP.from_released(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        AutoencoderVTP.from_released(folder)
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        AutoencoderVTP.from_released(folder / "missing")


def test_short_names_are_those_of_the_hub(monkeypatch):
    asked = []

    def download(repository, name):
        asked.append(repository)
        return str(RELEASED / name)

    monkeypatch.setattr(conversion_vtp, "hf_hub_download", download)
    for load in (AutoencoderVTP.from_released, VTPModel.from_released, load_vtp):
        load("VTP-Large-f16d64")
    load_vtp("MiniMaxAI/VTP-Large-f16d64")
    assert asked == ["MiniMaxAI/VTP-Large-f16d64"] * 8  # the configuration and the weights, each time
    with pytest.raises(ValueError, match="VTP-Huge is neither a folder .* nor one of VTP-Small-f16d64, "):
        VTPModel.from_released("VTP-Huge")


@pytest.mark.parametrize("model_class", [AutoencoderVTP, VTPModel])
def test_each_loader_names_the_other(folder, tmp_path, model_class):
    name = model_class.__name__
    with pytest.raises(ValueError, match=f"holds a released checkpoint.*{name}.from_released"):
        model_class.from_pretrained(folder)
    model_class.from_released(folder).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"holds a saved {name}.*{name}.from_pretrained"):
        model_class.from_released(tmp_path / "saved")
    assert isinstance(model_class.from_pretrained(tmp_path / "saved"), model_class)
