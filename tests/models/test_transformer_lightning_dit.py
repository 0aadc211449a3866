import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from golden import GOLDEN, LIGHTNING_DIT_SETS, lightning_dit_architecture, load_lightning_dit, relative_error
from safetensors.torch import load_file

from vtp_diffusion import LightningDiTTransformer2DModel
from vtp_diffusion.generation.flow_matching import flow_matching_loss, interpolate
from vtp_diffusion.models.conversion_lightning_dit import convert_lightning_dit_state_dict
from vtp_diffusion.models.rotary_lightning_dit import lightning_dit_rotary_tables, rotate_interleaved
from vtp_diffusion.models.transformer_lightning_dit import (
    LIGHTNING_DIT_SIZES,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
FACTS = json.loads(gzip.decompress((FIXTURES / "lightning_dit_state_dicts.json.gz").read_bytes()))
TINY = dict(sample_size=4, patch_size=2, in_channels=3, num_layers=2, num_attention_heads=2, attention_head_dim=8)


def tiny_model(**changes) -> LightningDiTTransformer2DModel:
    """Every weight random: with the published initialisation the output would be zero whatever happens inside."""
    torch.manual_seed(0)
    model = LightningDiTTransformer2DModel(**{**TINY, "num_classes": 5, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_inputs(batch: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 3, 4, 4, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "class_labels": torch.arange(batch),
    }


@pytest.mark.parametrize("name", LIGHTNING_DIT_SETS)
def test_golden_forward(name):
    golden, model = load_file(GOLDEN / name / "golden.safetensors"), load_lightning_dit(name)
    inputs = golden["forward.sample"], golden["forward.t"], golden["forward.label"]
    with torch.no_grad():
        assert relative_error(model(*inputs).sample, golden["forward.velocity"]) < 1e-5
        model = model.to(torch.bfloat16)
        half = model(inputs[0].bfloat16(), *inputs[1:]).sample
    assert half.dtype == torch.bfloat16 and relative_error(half, golden["forward.velocity"]) < 4e-2


@pytest.mark.parametrize("name", LIGHTNING_DIT_SETS)
def test_golden_loss_and_gradient_norm(name):
    golden, model = load_file(GOLDEN / name / "golden.safetensors"), load_lightning_dit(name)
    data, noise, t = golden["loss.data"], golden["loss.noise"], golden["loss.t"]
    prediction = model(interpolate(data, noise, t), t, golden["loss.label"]).sample
    squared, cosine = flow_matching_loss(prediction, data, noise)
    assert relative_error(squared, golden["loss.velocity_mse"]) < 1e-5
    assert relative_error(cosine, golden["loss.cosine"]) < 1e-5
    (squared.mean() + cosine.mean()).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert relative_error(norm, golden["loss.grad_norm"]) < 1e-5


@pytest.mark.parametrize("name", FACTS)
def test_every_released_key_and_shape_is_accounted_for(name):
    size, patch_size = name.removeprefix("LightningDiT-").split("/")
    with torch.device("meta"):
        model = LightningDiTTransformer2DModel(patch_size=int(patch_size), **LIGHTNING_DIT_SIZES[size])
        released = {key: torch.empty(shape) for key, (_, shape) in FACTS[name].items()}
    tables = lightning_dit_rotary_tables(16 // int(patch_size), model.config.attention_head_dim)
    released |= zip(("feat_rope.freqs_cos", "feat_rope.freqs_sin"), tables, strict=True)
    assert {key: list(value.shape) for key, value in released.items()} == {k: v[1] for k, v in FACTS[name].items()}
    converted = convert_lightning_dit_state_dict(released, model.config)
    expected = model.state_dict()
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in expected.items()}
    assert all(value.is_meta for value in expected.values())  # all of it is made where torch.device says


def test_position_tables_equal_the_released_ones():
    for name in LIGHTNING_DIT_SETS:
        fresh = LightningDiTTransformer2DModel(**lightning_dit_architecture(name))
        assert torch.allclose(fresh.pos_embed, load_lightning_dit(name).pos_embed, atol=1e-6)


def test_rotation_makes_scores_depend_on_the_offset_alone():
    cos, sin = lightning_dit_rotary_tables(4, 8)
    query, key = torch.randn(2, 8).double()

    def rotated(x):
        return rotate_interleaved(x.expand(1, 16, 1, 8).float(), cos, sin)[0, :, 0].unflatten(0, (4, 4))

    q, k = rotated(query), rotated(key)
    assert torch.allclose(q[0, 0] @ k[1, 2], q[2, 1] @ k[3, 3], atol=1e-5)
    assert not torch.allclose(q[0, 0] @ k[1, 2], q[0, 0] @ k[2, 1], atol=1e-3)


def test_the_published_initialisation_starts_at_zero_with_its_scales():
    model = LightningDiTTransformer2DModel(**{**TINY, "num_attention_heads": 8}, num_classes=500)
    assert model.eval()(**tiny_inputs()).sample.abs().max() > 0
    model.initialize_weights()
    assert model(**tiny_inputs()).sample.abs().max() == 0
    assert model.class_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.95 * bound < model.blocks[0].attn.to_k.weight.abs().max() <= bound


def test_labels_are_dropped_in_training_mode_only():
    model, inputs = tiny_model(class_dropout_prob=1.0), tiny_inputs()
    null = {**inputs, "class_labels": torch.full((3,), 5)}
    unconditional = model(**null).sample
    assert not torch.allclose(model(**inputs).sample, unconditional)
    model.train()
    assert torch.allclose(model(**inputs).sample, unconditional)


def test_save_and_load(tmp_path):
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in ("whole", "sharded"):
        loaded = LightningDiTTransformer2DModel.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(**inputs).sample, expected)
    assert isinstance(AutoModel.from_pretrained(str(tmp_path / "whole")), LightningDiTTransformer2DModel)
    assert (
        LightningDiTTransformer2DModel.from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16).dtype
        == torch.bfloat16
    )


def test_gradient_checkpointing_changes_no_gradient():
    def gradients(model):
        model(**tiny_inputs()).sample.square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed, calls = tiny_model(), tiny_model(), []
    checkpointed.enable_gradient_checkpointing()
    checkpointed.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(checkpointed.train(False)), strict=True))
    assert len(calls) == 2, "forwards, and once more backwards"


def test_fused_projections_and_backends_agree():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    model.fuse_qkv_projections()
    assert torch.allclose(model(**inputs).sample, expected, atol=1e-5)
    model.unfuse_qkv_projections()
    model.set_attention_backend("native")
    assert torch.allclose(model(**inputs).sample, expected, atol=1e-6)


@pytest.mark.parametrize("regional", [False, True])
def test_compiled_without_graph_breaks(regional):
    """Traced and decomposed as for machine code, which takes half a minute to make."""
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        torch.compiler.reset()
        if regional:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
            actual = model(**inputs).sample
        else:
            actual = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).sample
    assert torch.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e-9),
        MagCacheConfig(num_inference_steps=2, mag_ratios=torch.ones(2), threshold=0.0),
        TaylorSeerCacheConfig(disable_cache_before_step=10),
    ],
    ids=lambda config: type(config).__name__,
)
def test_step_caches_that_skip_nothing_change_nothing(config):
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        model.enable_cache(config)
        with model.cache_context("cond"):
            assert torch.allclose(model(**inputs).sample, expected, atol=1e-6)
        model.disable_cache()


def test_lora_adapter_starts_as_the_identity_and_trains_alone():
    peft = pytest.importorskip("peft")
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"]))
    assert torch.allclose(model(**inputs).sample, expected, atol=1e-6)
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


def test_layerwise_casting_and_group_offloading_run():
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        assert torch.equal(model(**inputs).sample, expected)
        model = tiny_model()
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert model.blocks[0].mlp.w12.weight.dtype == torch.float8_e4m3fn
        assert relative_error(model(**inputs).sample, expected) < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(3, 3, 4, 6)}, r"\(B, 3, 4, 4\), got \(3, 3, 4, 6\)"),
        ({"hidden_states": torch.zeros(3, 2, 4, 4)}, r"got \(3, 2, 4, 4\)"),
        ({"class_labels": torch.zeros(2, dtype=torch.long)}, r"class_labels \(3,\)"),
        ({"class_labels": torch.zeros(3)}, "integer class_labels"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**tiny_inputs(), **change})


@pytest.mark.parametrize(
    "change", [{"patch_size": 3}, {"attention_head_dim": 6}, {"class_dropout_prob": 1.5}], ids=lambda c: next(iter(c))
)
def test_architectures_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match="got"):
        LightningDiTTransformer2DModel(**{**TINY, **change})


def test_released_checkpoints_are_loaded_strictly(tmp_path):
    name = "lightning_dit_patch2"
    architecture = lightning_dit_architecture(name)
    weights = torch.load(GOLDEN / name / "0000100.pt", weights_only=True)["ema"]

    def refused(changed: dict, message: str, **other):
        torch.save({"ema": changed}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            LightningDiTTransformer2DModel.from_released(tmp_path / "x.pt", **{**architecture, **other})

    refused({k: v for k, v in weights.items() if k != "blocks.1.mlp.w3.bias"}, "blocks.1.mlp.w3.bias")
    refused({**weights, "surprise": torch.zeros(1)}, "surprise")
    refused({**weights, "final_layer.linear.bias": torch.zeros(7)}, "proj_out.bias")
    refused(weights, "rotary table", sample_size=16)
    refused(weights, "blocks", num_layers=2)
    refused({k: v for k, v in weights.items() if not k.startswith("feat_rope")}, "use_rope=False, which")
    refused({f"module.{k}": v for k, v in weights.items()}, "missing keys")
    refused({k: v for k, v in weights.items() if ".norm1." not in k}, "use_rmsnorm=False, which")
    refused({k.replace("w12", "fc1"): v for k, v in weights.items()}, "use_swiglu=False, which")
    refused({**weights, "final_layer.linear.bias": torch.zeros(2 * 2 * 2 * 16)}, "learn_sigma=True, which")
    torch.save({"ema": {name: tensor.bfloat16() for name, tensor in weights.items()}}, tmp_path / "x.pt")
    half = LightningDiTTransformer2DModel.from_released(tmp_path / "x.pt", **architecture)
    assert half.dtype == torch.bfloat16 and torch.equal(half.pos_embed, weights["pos_embed"].bfloat16())
    torch.save({"model": weights}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no 'ema' weights"):
        LightningDiTTransformer2DModel.from_released(tmp_path / "x.pt", **architecture)
    (tmp_path / "x.pt").write_bytes((GOLDEN / name / "0000100.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="x.pt cannot be read"):
        LightningDiTTransformer2DModel.from_released(tmp_path / "x.pt", **architecture)
    with pytest.raises(ValueError, match="absent.pt"):
        LightningDiTTransformer2DModel.from_released(tmp_path / "absent.pt", **architecture)
