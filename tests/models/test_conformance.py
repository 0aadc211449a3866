"""What diffusers' own test mixins ask of models and pipelines, where it is no matter of one class alone."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_dispatch import attention_backend
from test_autoencoder_vtp import STATISTICS, tiny_images
from test_autoencoder_vtp import TINY as AUTOENCODER
from test_autoencoder_vtp import tiny_model as tiny_autoencoder
from test_pipeline_lightning_dit import sample, tiny_pipeline, tiny_transformer
from test_transformer_lightning_dit import tiny_inputs
from test_transformer_lightning_dit import tiny_model as tiny_dit

from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, VTPModel

TEXT = dict(
    text_hidden_size=16, text_num_layers=2, text_num_attention_heads=2, text_context_length=7, text_vocab_size=20
)
TOKEN_IDS = torch.tensor([[1, 5, 3, 19, 0, 0, 0], [4, 19, 0, 0, 0, 0, 0]])


def tiny_vtp() -> VTPModel:
    torch.manual_seed(0)
    model = VTPModel(**AUTOENCODER, **TEXT, projection_dim=8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


AUTOENCODER_CALLS = {
    "forward": lambda model: model(tiny_images()).sample,
    "encode": lambda model: model.encode(tiny_images()).latent,
    "decode": lambda model: model.decode(torch.ones(2, 6, 4, 6)).sample,
    "encode_features": lambda model: model.encode_features(tiny_images()).cls_token,
}
CALLS = {
    tiny_autoencoder: AUTOENCODER_CALLS,
    tiny_dit: {"forward": lambda model: model(**tiny_inputs()).sample},
    tiny_vtp: {
        "forward": lambda model: model(tiny_images(), TOKEN_IDS).logits_per_image,
        "images": lambda model: model.get_image_features(tiny_images()),
        "texts": lambda model: model.get_text_features(TOKEN_IDS),
        **{name: lambda model, call=call: call(model.autoencoder) for name, call in AUTOENCODER_CALLS.items()},
    },
}
each_model = pytest.mark.parametrize("build", CALLS, ids=["autoencoder", "transformer", "vtp"])


def check_calls(build, model) -> None:
    with torch.no_grad():
        for name, call in CALLS[build].items():
            assert torch.allclose(call(model), call(build()), atol=1e-5), name


def forget_offloaded_weights(model) -> None:
    for parameter in [*model.parameters(), *model.buffers()]:
        parameter.data = torch.full_like(parameter.data, float("nan"))


@each_model
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_serves_every_method(tmp_path, build, offload_type):
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    for name, call in CALLS[build].items():
        model = build()
        folder = str(tmp_path / name)
        model.enable_group_offload(
            torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=folder, **blocks
        )
        forget_offloaded_weights(model)  # what a hook does not bring back from the disk stays NaN
        with torch.no_grad():
            assert torch.allclose(call(model), call(build()), atol=1e-5), name


@each_model
def test_a_device_map_that_splits_the_model(tmp_path, build):
    model = build()
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(dict(model.named_children()), "cpu")
    for name in list(places)[1::2]:
        places[name] = "disk"
    places |= {name: "cpu" for name, _ in [*model.named_parameters(), *model.named_buffers()] if "." not in name}
    split = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded")
    assert {parameter.device.type for parameter in split.parameters()} == {"cpu", "meta"}
    check_calls(build, split)


@each_model
def test_a_sequentially_offloaded_model(build):
    accelerate = pytest.importorskip("accelerate")
    model = build()
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    check_calls(build, model)


def test_accelerate_can_move_and_cast_outputs():
    operations = pytest.importorskip("accelerate.utils.operations")
    with torch.no_grad():
        for output in (
            tiny_vtp()(tiny_images(), TOKEN_IDS),
            tiny_autoencoder().encode_features(tiny_images()),
            tiny_dit()(**tiny_inputs()),
        ):
            moved = operations.convert_to_fp32(operations.send_to_device(output, "cpu"))
            assert type(moved) is type(output)
            assert all(torch.equal(moved[key], value) for key, value in output.items())


@each_model
def test_regional_compilation_makes_one_program_a_kind_of_block(build):
    model = build()
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")  # what is captured, not the code made from it
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for _ in range(2):
            assert torch.allclose(CALLS[build]["forward"](model), CALLS[build]["forward"](build()), atol=1e-5)


def test_weights_stored_in_8_bits_change_nothing_else():
    stored, rounded = tiny_dit(), tiny_dit()
    # Nothing is left out: the time embedding too must compute in the tokens' precision, not in that of its storage.
    stored._skip_layerwise_casting_patterns = None
    stored.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("none",))
    rounded.load_state_dict({key: value.float() for key, value in stored.state_dict().items()})
    assert stored.time_embed.linear_1.weight.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        assert torch.allclose(stored(**tiny_inputs()).sample, rounded(**tiny_inputs()).sample, atol=1e-5)


def test_the_text_tower_is_causal_with_every_attention_backend():
    model = tiny_vtp()
    with torch.no_grad():
        expected = model.get_text_features(TOKEN_IDS)
        for backend in ("native", "_native_math", "flex"):
            with attention_backend(backend):
                assert torch.allclose(model.get_text_features(TOKEN_IDS), expected, atol=1e-5), backend


def test_the_configuration_of_a_saved_vtp_holds_its_latent_statistics(tmp_path):
    model = tiny_vtp()
    model.autoencoder.with_latent_statistics(*STATISTICS.values())
    model.save_pretrained(tmp_path)
    for again in (VTPModel.from_config(model.config), VTPModel.from_pretrained(tmp_path)):
        assert again.autoencoder.config.latents_std == STATISTICS["latents_std"]


def test_a_pipeline_from_a_pipeline_has_the_same_components():
    pipeline = tiny_pipeline()
    copy = LightningDiTPipeline.from_pipe(pipeline)
    copy.set_progress_bar_config(disable=True)
    assert copy.vae is pipeline.vae and copy.labels == pipeline.labels
    assert torch.equal(sample(copy, output_type="pt"), sample(pipeline, output_type="pt"))
    guided = LightningDiTPipeline.from_pipe(pipeline, guidance_transformer=tiny_transformer(seed=1))
    assert LightningDiTPipeline.from_pipe(guided).guidance_transformer is guided.guidance_transformer
    assert LightningDiTPipeline.from_pipe(pipeline, vae=None).vae is None
    other = AutoencoderKL(latent_channels=4, block_out_channels=[8], norm_num_groups=4)
    assert LightningDiTPipeline.from_pipe(LightningDiTPipeline.from_pipe(pipeline, vae=other)).vae is other


def test_one_data_type_a_component(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    dtypes = {"vae": torch.bfloat16, "default": torch.float16}
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path, variant="fp16", dtype=dtypes)
    assert type(pipeline.vae) is AutoencoderVTP
    assert (pipeline.vae.dtype, pipeline.transformer.dtype) == (torch.bfloat16, torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    assert sample(pipeline, output_type="pt").isfinite().all()
