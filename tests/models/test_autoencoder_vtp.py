import math

import pytest
import torch
from diffusers import AutoModel
from golden import GOLDEN, relative_error, vtp_golden

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.models.autoencoder_vtp import VTP_SIZES, denormalize_images, normalize_images
from vtp_diffusion.models.vtp_blocks import VTPSwiGLU, apply_rotary, rotary_periods, rotary_tables, round_to_bfloat16

VTP_SETS = ["vtp_released", "vtp_qk_norm"]
TINY = dict(
    sample_size=16,
    patch_size=4,
    latent_channels=6,
    encoder_hidden_size=16,
    encoder_num_layers=2,
    encoder_num_attention_heads=2,
    decoder_hidden_size=24,
    decoder_num_layers=2,
    decoder_num_attention_heads=2,
)
STATISTICS = dict(latents_mean=[0.5, -1.0, 0.0, 2.0, 0.1, -0.1], latents_std=[0.5, 2.0, 1.0, 0.25, 3.0, 0.1])


def tiny_model(**changes) -> AutoencoderVTP:
    """Larger weights than a new model's, so that attention is far from uniform and every layer matters."""
    torch.manual_seed(0)
    model = AutoencoderVTP(**{**TINY, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_images(batch: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def public_config(model) -> dict:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def golden_outputs(model: AutoencoderVTP, images: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = {
        "latents": model.encode(images).latent,
        "reconstruction": normalize_images(model(images).sample),
    }
    last = model.encode_features(images)
    outputs["last_cls"], outputs["last_patch"] = last.cls_token, last.patch_tokens
    for i, features in enumerate(model.encode_features(images, num_layers=2)):
        outputs[f"intermediate{i}_cls"], outputs[f"intermediate{i}_patch"] = features.cls_token, features.patch_tokens
    return outputs


def check_golden(model: AutoencoderVTP, golden: dict, shape: str, limit: float) -> None:
    # Upstream works on ImageNet-normalised images.
    images = denormalize_images(golden[f"{shape}.image"]).to(model.dtype)
    with torch.no_grad():
        outputs = golden_outputs(model, images)
    for name, output in outputs.items():
        expected = golden[f"{shape}.{name}"]
        assert output.shape == expected.shape and output.dtype == model.dtype
        assert relative_error(output, expected) < limit, name


@pytest.mark.parametrize("shape", ["square", "wide", "large"])
@pytest.mark.parametrize("name", VTP_SETS)
def test_golden_with_the_rotary_embedding_in_float32(name, shape):
    model = AutoencoderVTP.from_released(GOLDEN / name, rope_dtype="float32")
    check_golden(model, vtp_golden(name, "float32"), shape, limit=1e-5)


@pytest.mark.parametrize("shape", ["square", "wide", "large"])
@pytest.mark.parametrize("name", VTP_SETS)
def test_golden_as_released(name, shape):
    golden, model = vtp_golden(name, "bfloat16"), AutoencoderVTP.from_released(GOLDEN / name)
    assert model.config.rope_dtype == "bfloat16"
    check_golden(model, golden, shape, limit=5e-3)
    check_golden(model.to(torch.bfloat16), golden, shape, limit=4e-2)


def test_golden_rotary_tables_bit_for_bit():
    golden = vtp_golden("vtp_released", "bfloat16")  # the other set's are the same
    tables = [key for key in golden if key.startswith("rope.")]
    assert len(tables) == 16
    for key in tables:
        part, function, grid = key.removeprefix("rope.").split("_")
        height, width = (int(side) for side in grid.split("x"))
        cos, sin = rotary_tables(height, width, {"encoder": 32, "decoder": 24}[part], torch.bfloat16)
        computed = {"cos": cos, "sin": sin}[function]
        assert computed.dtype == golden[key].dtype == torch.bfloat16 and torch.equal(computed, golden[key])


@pytest.mark.parametrize("head_dim", [8, 24, 32, 64, 128])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (16, 16), (31, 64)])
def test_bfloat16_rotary_tables_equal_plain_bfloat16_arithmetic(head_dim, grid):
    half = dict(dtype=torch.bfloat16)
    periods = 100.0 ** (2 * torch.arange(head_dim // 4, **half) / (head_dim // 2))
    rows, columns = (torch.arange(0.5, side, **half) / side for side in grid)
    coordinates = 2 * torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1) - 1
    angles = (2 * math.pi * coordinates[:, :, None] / periods).flatten(1).tile(2)
    cos, sin = rotary_tables(*grid, head_dim, torch.bfloat16)
    assert torch.equal(rotary_periods(head_dim, torch.bfloat16), periods)
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())


def test_rounding_to_bfloat16():
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.abs() < 3e38]
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0])
    for x in (values, ties):
        assert torch.equal(round_to_bfloat16(x), x.bfloat16().float())
    # The NaN of CUDA has all bits set, which rounding the bits alone would turn into zero.
    assert round_to_bfloat16(torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)).isnan().all()
    x = torch.tensor([1.001, -3.3], requires_grad=True)
    round_to_bfloat16(x).backward(torch.tensor([2.0, 5.0]))
    assert x.grad.tolist() == [2.0, 5.0]


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 25, 1, 16)
    cos, sin = rotary_tables(5, 5, 16, torch.float32)
    query, key = (apply_rotary(x, cos, sin) for x in (query, key))
    assert torch.allclose(query.norm(dim=-1), query[:, :1].norm(dim=-1).expand(1, 25, 1), atol=1e-5)
    scores = (query[0, :, 0] @ key[0, :, 0].T).view(5, 5, 5, 5)
    assert torch.allclose(scores[0, 0, 1, 2], scores[3, 2, 4, 4], atol=1e-5)
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bfloat16_rotation_is_plain_bfloat16_arithmetic_for_every_input_dtype(dtype):
    x = torch.randn(2, 15, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = rotary_tables(3, 5, 16, torch.bfloat16)
    expected = apply_rotary(x.bfloat16(), cos, sin)
    rotated = apply_rotary(x, cos, sin)
    assert rotated.dtype == dtype and torch.equal(rotated.float(), expected.float())
    unrotated = apply_rotary(x, torch.ones_like(cos), torch.zeros_like(sin))  # what happens to the class token
    assert torch.equal(unrotated.float(), x.bfloat16().float())


def test_a_compiled_rotary_embedding_is_still_rounded_at_every_step():
    def rotate(x):
        tables = rotary_tables(7, 16, 24, torch.bfloat16)
        return *tables, apply_rotary(x, *tables)

    x = torch.randn(1, 7 * 16, 1, 24, generator=torch.Generator().manual_seed(0))
    for compiled, eager in zip(torch.compile(rotate, fullgraph=True)(x), rotate(x), strict=True):
        assert torch.equal(compiled, eager)


def test_a_compiled_model_equals_eager():
    """One graph; what machine code makes of it is tested on its rotary embedding, which is all that is rounded."""
    model, images = tiny_model(encoder_num_layers=1, decoder_num_layers=1, **STATISTICS), tiny_images(batch=1)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images).sample
        assert relative_error(compiled, model(images).sample) < 5e-3


@pytest.mark.parametrize("rope_dtype", ["bfloat16", "float32"])
def test_outputs_and_their_forms(rope_dtype):
    model, images = tiny_model(rope_dtype=rope_dtype), tiny_images()
    with torch.no_grad():
        encoded, (posterior,) = model.encode(images), model.encode(images, return_dict=False)
        assert encoded.latent.shape == (2, 6, 4, 6)
        for latents in (encoded.latent_dist.sample(), encoded.latent_dist.mode(), posterior.mode()):
            assert torch.equal(latents, encoded.latent)
        decoded = model.decode(encoded.latent).sample
        assert decoded.shape == images.shape
        assert torch.equal(model.decode(encoded.latent, return_dict=False)[0], decoded)
        for sample_posterior in (False, True):
            assert torch.equal(model(images, sample_posterior=sample_posterior).sample, decoded)
        assert torch.equal(model(images, return_dict=False)[0], decoded)


def test_features_are_what_the_bottleneck_reads():
    model, images = tiny_model(), tiny_images()
    with torch.no_grad():
        features = model.encode_features(images)
        assert features.cls_token.shape == (2, 16) and features.patch_tokens.shape == (2, 24, 16)
        latents = model.bottleneck(features.patch_tokens).transpose(1, 2).reshape(2, 6, 4, 6)
        assert torch.equal(latents, model.encode(images).latent)
        layers = model.encode_features(images, num_layers=2)
        assert len(layers) == 2 and torch.equal(layers[-1].patch_tokens, features.patch_tokens)
        # Each layer is normed: undoing the scale leaves a root mean square of 1.
        for layer in layers:
            unscaled = layer.patch_tokens / model.encoder.norm.weight
            assert torch.allclose(unscaled.square().mean(-1), torch.ones(2, 24), atol=1e-3)


def test_latent_statistics():
    plain, model, images = tiny_model(), tiny_model(**STATISTICS), tiny_images()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in STATISTICS.values())
    with torch.no_grad():
        raw, latents = plain.encode(images).latent, model.encode(images).latent
        assert torch.allclose(latents, (raw - mean) / std, atol=1e-5)
        assert torch.allclose(model.denormalize_latents(latents), raw, atol=1e-5)
        assert torch.allclose(model.decode(latents).sample, plain.decode(raw).sample, atol=1e-4)
    assert plain.normalize_latents(raw) is raw and plain.denormalize_latents(raw) is raw
    assert plain.with_latent_statistics(mean.flatten(), std.flatten()) is plain
    assert torch.equal(plain.normalize_latents(raw), model.normalize_latents(raw))
    assert AutoencoderVTP.from_config(plain.config).config.latents_std == std.flatten().tolist()
    assert plain.normalize_latents(raw.bfloat16()).dtype == torch.bfloat16


def test_latent_statistics_that_are_set_later_are_part_of_the_configuration():
    for model in (tiny_model().with_latent_statistics(*STATISTICS.values()), tiny_model()):
        model.register_to_config(**STATISTICS)  # as pre-training does at its end
        again = AutoencoderVTP.from_config(model.config)
        assert {name: again.config[name] for name in STATISTICS} == STATISTICS
        assert "block_out_channels" in model.config["_use_default_values"]  # follows the patch size


def test_latent_statistics_are_copied_to_a_device_once():
    model, latents = tiny_model(**STATISTICS).to(torch.bfloat16), torch.ones(1, 6, 2, 2, requires_grad=True)
    with torch.inference_mode():
        first = model.normalize_latents(latents)
    held = model._statistics_on(latents.device)
    assert all(a is b for a, b in zip(held, model._statistics_on(latents.device), strict=True))
    assert torch.equal(held[1].flatten(), torch.tensor(STATISTICS["latents_std"])), "float32 in a bfloat16 model too"
    model.normalize_latents(latents).sum().backward()
    assert torch.allclose(latents.grad[0, :, 0, 0], 1 / torch.tensor(STATISTICS["latents_std"]))
    model.with_latent_statistics([0.0] * 6, [1.0] * 6)
    assert torch.equal(model.normalize_latents(latents), latents) and not torch.equal(first, latents)


def test_image_normalisation_is_inverted():
    images = tiny_images()
    assert torch.allclose(denormalize_images(normalize_images(images)), images, atol=1e-6)
    white = normalize_images(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(white, torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


@pytest.mark.parametrize("max_shard_size", ["10GB", "10KB"])
def test_save_and_load(tmp_path, max_shard_size):
    model, images = tiny_model(encoder_qk_norm=True, decoder_qk_norm=True, **STATISTICS), tiny_images()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    with torch.no_grad():
        expected = model(images).sample
        for loader in (AutoencoderVTP, AutoModel):
            loaded = loader.from_pretrained(str(tmp_path))
            assert type(loaded) is AutoencoderVTP and public_config(loaded) == public_config(model)
            assert torch.equal(loaded(images).sample, expected)
        half = AutoencoderVTP.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        assert relative_error(half(images.bfloat16()).sample, expected) < 4e-2


def test_slicing():
    model, images = tiny_model(), tiny_images(batch=3)
    with torch.no_grad():
        latents, decoded = model.encode(images).latent, model(images).sample
        model.enable_slicing()
        assert torch.allclose(model.encode(images).latent, latents, atol=1e-5)
        assert relative_error(model.decode(latents).sample, decoded) < 1e-5
    with pytest.raises(NotImplementedError):
        model.enable_tiling()


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(encoder_qk_norm=True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(tiny_images()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "mask_token" not in name})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


def test_fused_projections_and_attention_backend():
    model, images = tiny_model(decoder_qk_norm=True), tiny_images()
    with torch.no_grad():
        expected = model(images).sample
        model.fuse_qkv_projections()
        assert relative_error(model(images).sample, expected) < 5e-3  # a different product, rounded inside
        model.unfuse_qkv_projections()
        model.set_attention_backend("native")
        assert torch.equal(model(images).sample, expected)


def test_layerwise_casting_and_group_offloading():
    images = tiny_images()
    with torch.no_grad():
        expected = tiny_model()(images).sample
        offloaded = tiny_model()
        offloaded.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
        assert torch.equal(offloaded(images).sample, expected)
        cast = tiny_model()
        cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert cast.encoder.blocks[0].mlp.w1.weight.dtype == torch.float8_e4m3fn
        assert cast.encoder.embeddings.patch_embed.weight.dtype == torch.float32
        assert torch.isfinite(cast(images).sample).all()


def test_autocast_reaches_attention_with_one_dtype():
    model, images = tiny_model(encoder_qk_norm=True, rope_dtype="float32"), tiny_images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(images).sample
    with torch.no_grad():
        assert relative_error(half, model(images).sample) < 4e-2


def test_under_autocast_the_encoder_has_a_float32_residual_stream():
    torch.manual_seed(0)
    model, seen = tiny_model(encoder_num_layers=8, rope_dtype="float32").eval(), []
    model.encoder.blocks[-1].register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    token, images, errors = model.encoder.embeddings.cls_token, tiny_images(), []
    with torch.no_grad():
        exact = model.encode_raw(images)
        for dtype in (torch.float32, torch.bfloat16):  # the latter as if the class token were cast to its patches
            token.data = token.data.to(dtype)
            with torch.autocast("cpu", torch.bfloat16):
                errors.append(relative_error(model.encode_raw(images).float(), exact))
        model.to(torch.bfloat16).encode_raw(images.bfloat16())
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert errors[0] < 0.75 * errors[1] < 0.03


def test_what_pipelines_read():
    model = tiny_model()
    assert model.spatial_compression_ratio == 4 == 2 ** (len(model.config.block_out_channels) - 1)
    assert model.latent_channels == model.config.latent_channels == 6 and model.config.scaling_factor == 1.0
    assert tiny_model(patch_size=6).config.block_out_channels is None


@pytest.mark.parametrize("size", VTP_SIZES)
def test_published_parameter_counts(size):
    counts = {"Small": (21.6, 21.6), "Base": (85.7, 85.7), "Large": (303.5, 303.6)}[size]
    with torch.device("meta"):
        model = AutoencoderVTP(**VTP_SIZES[size].architecture())
    # facts.md gives them in millions with one decimal, without the tokens and projections around the blocks.
    for part, millions in zip((model.encoder, model.decoder), counts, strict=True):
        assert sum(p.numel() for p in part.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_swiglu_width_is_rounded_up():
    assert [VTPSwiGLU(width).w1.out_features for width in (64, 96, 384, 1024)] == [176, 256, 1024, 2736]


def test_images_and_latents_that_do_not_fit():
    model = tiny_model()
    for shape in ((1, 4, 16, 16), (3, 16, 16), (1, 3, 16, 17), (1, 3, 18, 16), (1, 3, 0, 16)):
        for method in (model.encode, model.encode_features, model):
            with pytest.raises(ValueError, match="expected"):
                method(torch.zeros(shape))
    for shape in ((1, 5, 4, 4), (6, 4, 4)):
        with pytest.raises(ValueError, match="expected"):
            model.decode(torch.zeros(shape))
    for num_layers in (0, 3, -1):
        with pytest.raises(ValueError, match="1 to 2"):
            model.encode_features(tiny_images(), num_layers=num_layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(in_channels=1), "in_channels=1"),
        (dict(rope_dtype="float16"), "rope_dtype='float16'"),
        (dict(scaling_factor=0.5), "scaling_factor=0.5"),
        (dict(latents_mean=[0.0] * 6), "both or neither"),
        (dict(latents_mean=[0.0] * 5, latents_std=[1.0] * 5), "latent_channels=6"),
        (dict(latents_mean=[0.0] * 6, latents_std=[0.0] * 6), "positive"),
        (dict(block_out_channels=[1, 2]), "patch_size=4"),
        (dict(encoder_num_attention_heads=3), "multiple of 4"),
        (dict(decoder_num_attention_heads=12), "multiple of 4"),
    ],
)
def test_configurations_that_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**changes)


def test_raw_latents_are_those_that_no_statistics_have_touched():
    """Also in bfloat16, where a way through the statistics and back would round them twice more."""
    images = tiny_images()
    for dtype in (torch.float32, torch.bfloat16):
        plain, normalising = (tiny_model(**changes).to(dtype) for changes in ({}, STATISTICS))
        raw = normalising.encode_raw(images.to(dtype))
        assert torch.equal(raw, plain.encode(images.to(dtype)).latent)
        assert not torch.allclose(raw, normalising.encode(images.to(dtype)).latent, rtol=0.1)


def test_float32_latents_are_decoded_by_a_model_of_half_precision():
    model = tiny_model(**STATISTICS).bfloat16()
    latents = torch.randn(1, 6, 2, 2)
    assert (model.decode(latents).sample - model.decode(latents.bfloat16()).sample).abs().max() < 0.1
