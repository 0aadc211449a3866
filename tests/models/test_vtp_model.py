import math

import pytest
import torch
from golden import GOLDEN, relative_error, vtp_golden
from test_autoencoder_vtp import TINY, VTP_SETS, tiny_images

from vtp_diffusion import AutoencoderVTP, VTPModel
from vtp_diffusion.models.autoencoder_vtp import denormalize_images

TINY_TEXT = dict(
    text_hidden_size=16,
    text_num_layers=2,
    text_num_attention_heads=2,
    text_context_length=5,
    text_vocab_size=20,
    projection_dim=12,
)
TOKENS = torch.tensor([[3, 7, 19, 0, 0], [1, 19, 0, 0, 0], [2, 4, 6, 8, 19]])


def tiny_vtp() -> VTPModel:
    torch.manual_seed(0)
    model = VTPModel(**TINY, **TINY_TEXT)
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", VTP_SETS)
@pytest.mark.parametrize("rope_dtype", ["float32", "bfloat16"])
def test_golden(name, rope_dtype):
    golden, limit = vtp_golden(name, rope_dtype), {"float32": 1e-5, "bfloat16": 5e-3}[rope_dtype]
    model = VTPModel.from_released(GOLDEN / name, rope_dtype=rope_dtype)
    assert type(model.autoencoder) is AutoencoderVTP and not model.training
    for dtype in (torch.float32, torch.bfloat16):
        model, limit = model.to(dtype), limit if dtype == torch.float32 else 4e-2
        with torch.no_grad():
            for shape in ("square", "wide", "large"):
                images = denormalize_images(golden[f"{shape}.image"]).to(dtype)
                for normalize, key in ((True, "clip_image"), (False, "clip_image_unnormalized")):
                    features = model.get_image_features(images, normalize=normalize)
                    assert relative_error(features, golden[f"{shape}.{key}"]) < limit
            tokens = golden["text.tokens"]
            for normalize, key in ((True, "clip_text"), (False, "clip_text_unnormalized")):
                features = model.get_text_features(tokens, normalize=normalize)
                assert features.dtype == dtype and relative_error(features, golden[f"text.{key}"]) < limit
            output = model(denormalize_images(golden["square.image"]).to(dtype), tokens)
        assert relative_error(output.logits_per_image, golden["text.logits"]) < limit
        assert torch.equal(output.logits_per_text, output.logits_per_image.T)


def test_text_features_ignore_what_follows_the_end_of_text():
    model, changed = tiny_vtp(), TOKENS.clone()
    changed[0, 3:], changed[1, 2:] = 9, 11
    with torch.no_grad():
        features = model.get_text_features(TOKENS, normalize=False)
        assert torch.allclose(model.get_text_features(changed, normalize=False), features, atol=1e-5)
        changed[:, 0] = 5
        assert not torch.allclose(model.get_text_features(changed, normalize=False), features, atol=1e-2)
        assert torch.allclose(model.get_text_features(TOKENS).norm(dim=-1), torch.ones(3))


def test_logits_are_scaled_cosines():
    model = tiny_vtp()
    with torch.no_grad():
        images, texts = model.get_image_features(tiny_images()), model.get_text_features(TOKENS)
        output = model(tiny_images(), TOKENS)
        assert output.logits_per_image.shape == (2, 3) and output.logits_per_text.shape == (3, 2)
        assert torch.allclose(output.logits_per_image, images @ texts.T / 0.07, atol=1e-4)
        assert torch.equal(model(tiny_images(), TOKENS, return_dict=False)[0], output.logits_per_image)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize("max_shard_size", ["10GB", "10KB"])
def test_save_and_load(tmp_path, max_shard_size):
    model = tiny_vtp()
    model.autoencoder.with_latent_statistics([0.0] * 6, [2.0] * 6)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = VTPModel.from_pretrained(tmp_path)
    with torch.no_grad():
        # Loading goes over the meta device, where a causal mask kept in a buffer would be lost.
        output, expected = loaded(tiny_images(), TOKENS), model(tiny_images(), TOKENS)
        assert torch.equal(output.logits_per_image, expected.logits_per_image)
        latents = loaded.autoencoder.encode(tiny_images()).latent
        assert torch.equal(latents, model.autoencoder.encode(tiny_images()).latent)
    half = VTPModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_vtp().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(tiny_images(), TOKENS).logits_per_image.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    used = ("logit_scale", "text_model.text_projection", "visual_projection.weight", "text_model.blocks.0.fc1.bias")
    assert set(used) <= gradients[0].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.long), r"\(1, 4\), expected \(B, 5\)"),
        (torch.zeros(5, dtype=torch.long), r"expected \(B, 5\)"),
        (torch.zeros(1, 5), "expected int64 or int32"),
        (torch.full((1, 5), 20), r"expected \[0, 19\]"),
        (torch.full((1, 5), -1), r"expected \[0, 19\]"),
    ],
)
def test_token_ids_that_do_not_fit(tokens, message):
    with pytest.raises(ValueError, match=message):
        tiny_vtp().get_text_features(tokens)


def test_text_width_that_the_heads_do_not_divide():
    with pytest.raises(ValueError, match="text_hidden_size=16"):
        VTPModel(**TINY, **{**TINY_TEXT, "text_num_attention_heads": 3})
