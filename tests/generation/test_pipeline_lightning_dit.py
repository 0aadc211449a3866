import re
import time

import numpy as np
import pytest
import test_latent_shards
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderRAE,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from golden import GOLDEN, LIGHTNING_DIT_SETS, load_lightning_dit, relative_error
from safetensors.torch import load_file

import vtp_diffusion
from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.models.latent_space import encode_raw, latent_statistics

ID2LABEL = {0: "cat", 1: "golden retriever, dog", 2: "bird"}


def tiny_transformer(seed: int = 0, **changes) -> LightningDiTTransformer2DModel:
    torch.manual_seed(seed)
    settings = dict(sample_size=4, patch_size=1, in_channels=4, num_layers=2, num_attention_heads=2)
    model = LightningDiTTransformer2DModel(**settings | {"attention_head_dim": 8, "num_classes": 3} | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_pipeline(**components) -> LightningDiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderVTP(
        sample_size=32, patch_size=8, latent_channels=4, rope_dtype="float32",
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0],
        **{f"{part}_{key}": value for part in ("encoder", "decoder")
           for key, value in (("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2))},
    )  # fmt: skip
    defaults = {
        "vae": vae.eval(),
        "transformer": tiny_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0),
        "id2label": ID2LABEL,
    }
    pipeline = LightningDiTPipeline(**{**defaults, **components})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, labels=(0, 1), **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.manual_seed(0), **arguments}
    return pipeline(list(labels), **arguments).images


@pytest.mark.parametrize("name", LIGHTNING_DIT_SETS)
def test_golden_trajectories(name):
    golden, transformer = load_file(GOLDEN / name / "golden.safetensors"), load_lightning_dit(name)
    checked = 0
    for key, expected in golden.items():
        match = re.fullmatch(
            r"sample\.euler_(\d+)(_cfg4_first3channels)?(?:_interval([\d.]+))?(?:_shift([\d.]+))?", key
        )
        if not match:
            continue
        points, guided, start, shift = match.groups()
        shift = float(shift) if shift else (0.3 if guided else 1.0)
        pipeline = tiny_pipeline(
            vae=None,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1 / shift),
            id2label=None,
        )
        guidance = {"guidance_scale": 4.0, "guidance_channels": 3, "guidance_interval": (float(start or 0), 1.0)}
        images = sample(
            pipeline,
            golden["sample.label"].tolist(),
            num_inference_steps=int(points) - 1,
            latents=golden["sample.noise"],
            **(guidance if guided else {}),
        )
        assert relative_error(images, expected) < 1e-5, key
        checked += 1
    assert checked == 6


@pytest.mark.parametrize("name", LIGHTNING_DIT_SETS)
def test_a_scheduler_of_higher_order_reaches_the_end_state_of_upstreams_adaptive_solver(name):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipeline = tiny_pipeline(vae=None, transformer=load_lightning_dit(name), scheduler=scheduler, id2label=None)
    labels, noise = golden["sample.label"].tolist(), golden["sample.noise"]
    images = sample(pipeline, labels, num_inference_steps=50, latents=noise)
    assert relative_error(images, golden["sample.dopri5_5"]) < 1e-3  # the solver's own relative tolerance


def test_saved_folder_loads_as_an_ordinary_pipeline(tmp_path):
    pipeline = tiny_pipeline(guidance_transformer=tiny_transformer(seed=1))
    pipeline.save_pretrained(tmp_path / "guided")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "guided")
    assert type(loaded) is vtp_diffusion.LightningDiTPipeline
    assert loaded.labels == pipeline.labels
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, guidance_scale=2.0), sample(pipeline, guidance_scale=2.0))
    tiny_pipeline(vae=None).save_pretrained(tmp_path / "latent")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "latent")
    assert loaded.vae is None and loaded.guidance_transformer is None


def test_labels_are_indices_or_names():
    pipeline = tiny_pipeline()
    assert pipeline.get_label_ids([2, "cat", "dog", "golden retriever", "golden retriever, dog"]) == [2, 0, 1, 1, 1]
    assert pipeline.get_label_ids("bird") == [2] and pipeline.get_label_ids(torch.tensor([1, 2])) == [1, 2]
    for label, message in (("cats", "cat"), (3, "0 to 2"), (-1, "0 to 2"), (True, "True"), (0.5, "0.5")):
        with pytest.raises(ValueError, match=message):
            pipeline.get_label_ids([label])
    with pytest.raises(ValueError, match="empty"):
        pipeline.get_label_ids([])


def test_output_types_agree():
    pipeline = tiny_pipeline()
    images = {kind: sample(pipeline, output_type=kind) for kind in ("pil", "np", "pt")}
    assert images["pt"].shape == (2, 3, 32, 32) and images["np"].shape == (2, 32, 32, 3)
    assert np.array_equal(images["pt"].permute(0, 2, 3, 1).numpy(), images["np"])
    assert np.abs(np.stack([np.array(image) for image in images["pil"]]) - images["np"] * 255).max() <= 0.501
    latents = sample(pipeline)
    assert torch.equal((pipeline.decode_latents(latents) / 2 + 0.5).clamp(0, 1), images["pt"])


def test_images_of_one_label_follow_each_other_and_each_has_its_generator():
    pipeline = tiny_pipeline()
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images = sample(pipeline, num_images_per_label=2, generator=generators)
    alone = sample(pipeline, labels=[1], generator=torch.Generator().manual_seed(2))
    assert torch.allclose(images[2:3], alone, atol=1e-5)


def test_guidance_scale_one_is_no_guidance_and_zero_is_unconditional():
    pipeline = tiny_pipeline()
    plain = sample(pipeline)
    assert torch.equal(sample(pipeline, guidance_scale=1.0, guidance_interval=(0.2, 0.3)), plain)
    unconditional = sample(pipeline, guidance_scale=0.0)
    assert torch.allclose(unconditional, sample(pipeline, labels=(2, 2), guidance_scale=0.0), atol=1e-5)
    assert not torch.allclose(plain, unconditional, atol=1e-3)


def test_guidance_acts_inside_its_interval_and_on_its_channels():
    pipeline = tiny_pipeline()
    plain, guided = sample(pipeline), sample(pipeline, guidance_scale=3.0)
    assert torch.equal(sample(pipeline, guidance_scale=3.0, guidance_interval=(1.0, 1.0)), plain)
    assert not torch.allclose(sample(pipeline, guidance_scale=3.0, guidance_interval=(0.2, 1.0)), guided, atol=1e-3)
    one = sample(pipeline, num_inference_steps=1, guidance_scale=3.0, guidance_channels=3)
    assert torch.allclose(one[:, :3], sample(pipeline, num_inference_steps=1, guidance_scale=3.0)[:, :3], atol=1e-5)
    assert torch.allclose(one[:, 3:], sample(pipeline, num_inference_steps=1)[:, 3:], atol=1e-5)


@pytest.mark.parametrize(
    ("time_shift", "steps", "interval", "wider"),
    [
        (1.0, 10, (0.4, 0.7), (0.35, 0.75)),  # 1 - 0.6 is less than 0.4 in float32
        (0.375, 1, (0.0, 0.0), (0.0, 0.5)),  # the scheduler's first time is -1.2e-7
    ],
)
def test_times_on_the_bounds_of_the_guidance_interval_are_inside(time_shift, steps, interval, wider):
    pipeline = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=1 / time_shift))
    guided = sample(pipeline, num_inference_steps=steps, guidance_scale=3.0, guidance_interval=interval)
    expected = sample(pipeline, num_inference_steps=steps, guidance_scale=3.0, guidance_interval=wider)
    assert torch.equal(guided, expected)
    assert not torch.allclose(guided, sample(pipeline, num_inference_steps=steps), atol=1e-3)


def test_autoguidance_by_itself_is_no_guidance():
    plain = sample(tiny_pipeline())
    by_itself = sample(tiny_pipeline(guidance_transformer=tiny_transformer()), guidance_scale=5.0)
    assert torch.allclose(by_itself, plain, atol=1e-4)
    by_another = sample(tiny_pipeline(guidance_transformer=tiny_transformer(seed=1)), guidance_scale=5.0)
    assert not torch.allclose(by_another, plain, atol=1e-3)


def test_callback_sees_every_step_and_may_change_the_latents():
    steps = []

    def zero_at_the_end(pipeline, step, timestep, tensors):
        steps.append((step, pipeline.num_timesteps))
        return {"latents": tensors["latents"] * (step < 2)}

    assert sample(tiny_pipeline(), callback_on_step_end=zero_at_the_end).abs().max() == 0
    assert steps == [(0, 3), (1, 3), (2, 3)]


def test_other_schedulers_follow_the_same_path():
    euler = sample(tiny_pipeline(), num_inference_steps=200)
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    assert relative_error(sample(tiny_pipeline(scheduler=unipc), num_inference_steps=50), euler) < 0.02


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (test_latent_shards.vtp, {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}),
        (test_latent_shards.kl, {"scaling_factor": 0.5, "shift_factor": 0.25}),
        (test_latent_shards.dc, {"scaling_factor": 0.4}),
        (test_latent_shards.rae, {"scaling_factor": 0.5, "latents_std": torch.full((64, 1, 1), 3.0)}),
    ],
    ids=["AutoencoderVTP", "AutoencoderKL", "AutoencoderDC", "AutoencoderRAE"],
)
def test_any_autoencoder_decodes_what_the_network_would_be_trained_on(make, settings):
    vae, pictures = make(**settings), test_latent_shards.pictures()
    with torch.no_grad():
        mean, std = latent_statistics(vae)
        latents = (encode_raw(vae, pictures) - mean) / std  # what training sees
        transformer = tiny_transformer(in_channels=latents.shape[1], sample_size=latents.shape[2])
        pipeline = tiny_pipeline(vae=vae, transformer=transformer)
        in_zero_to_one = isinstance(vae, AutoencoderRAE)
        expected = vae(pictures / 2 + 0.5).sample * 2 - 1 if in_zero_to_one else vae(pictures).sample
        assert relative_error(pipeline.decode_latents(latents), expected) < 1e-5
        if not in_zero_to_one:  # AutoencoderRAE scales inside
            assert not torch.allclose(latents, encode_raw(vae, pictures), rtol=0.1)
    assert sample(pipeline, output_type="pt", num_inference_steps=1).shape == (2, 3, *expected.shape[2:])


def test_half_precision_keeps_the_latents_in_float32():
    pipeline = tiny_pipeline().to(torch.bfloat16)
    latents = sample(pipeline)
    assert latents.dtype == torch.float32
    assert sample(pipeline, output_type="pt").isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval"),
        ({"guidance_channels": 5}, "1 to 4"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
        ({"output_type": "png"}, "output_type"),
        ({"latents": torch.zeros(2, 4, 4, 5)}, r"\(2, 4, 4, 4\), got \(2, 4, 4, 5\)"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_pipeline(), **arguments)


def test_components_that_do_not_fit_are_refused():
    kl = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=3)
    for components, message in (
        ({"id2label": {0: "cat", 3: "none"}}, r"id2label has \[3\], expected class indices from 0 to 2"),
        ({"id2label": {"cat": "0"}}, "id2label has .'cat'.*0 to 2"),
        ({"vae": kl}, "has 3 .*transformer 4"),
        ({"guidance_transformer": tiny_transformer(num_classes=7)}, "num_classes 7, the transformer 3"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_pipeline(**components)


def test_names_of_many_classes_are_checked_at_once():
    names = {str(index): f"class {index}" for index in range(21_841)}
    transformer = tiny_transformer(num_classes=len(names))
    start = time.perf_counter()
    pipeline = tiny_pipeline(transformer=transformer, id2label=names)
    assert time.perf_counter() - start < 5  # comparing each with all took two minutes
    assert pipeline.get_label_ids("class 21840") == [21_840]


def test_images_need_an_autoencoder():
    with pytest.raises(ValueError, match="no vae"):
        sample(tiny_pipeline(vae=None), output_type="pil")
