"""What a user gives a pipeline by mistake: one row a case. It is refused by name, or does what is meant."""

import copy
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    MagCacheConfig,
    SASolverScheduler,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from test_pipeline_lightning_dit import sample, tiny_pipeline, tiny_transformer

from vtp_diffusion import LightningDiTPipeline

NAN, INFINITE = float("nan"), float("inf")
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NUMBERS = {0: "0", 1: "10", 2: "1"}  # names of class folders, sorted as text
NOISE = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


class NeverEvaluated(torch.nn.Module):
    def forward(self, *args, **kwargs):
        raise AssertionError("the network was evaluated")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": "2"}, "num_inference_steps is '2', expected 1 to"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"num_inference_steps": 10**12}, "num_inference_steps is 1000000000000"),
        ({"num_images_per_label": 1.5}, "num_images_per_label is 1.5"),
        ({"guidance_scale": NAN}, "guidance_scale is nan, expected 0 or more with"),
        ({"guidance_scale": "2", "guidance": "internal"}, "guidance is 'internal', expected auto, classifier_free:"),
        ({"guidance_scale": INFINITE}, "guidance_scale is inf"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'"),
        ({"guidance_scale": None}, "guidance_scale is None"),
        ({"guidance_interval": (0.0, NAN)}, "guidance_interval"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5"),
        ({"guidance_interval": ("0", "1")}, "guidance_interval"),
        ({"guidance_interval": (0.1, 0.2, 0.3)}, "guidance_interval"),
        ({"guidance_channels": 1.5}, "guidance_channels is 1.5, expected 1 to 4"),
        ({"guidance_channels": True}, "guidance_channels is True"),
        ({"output_type": ["pil"]}, r"output_type is \['pil'\], expected one of pil, np, pt, latent"),
        ({"generator": 0}, "generator is 0, expected a torch.Generator or a list of them"),
        ({"generator": (torch.Generator(), torch.Generator())}, "expected a torch.Generator or a list"),
        ({"generator": [0, 1]}, "expected a torch.Generator or a list"),
        ({"generator": [None, None]}, "expected a torch.Generator or a list"),
        ({"generator": [torch.Generator()], "latents": NOISE}, "1 generators for 2 images"),
        ({"latents": NOISE.tolist()}, "latents must be a floating-point tensor, got list"),
        ({"latents": NOISE.numpy()}, "latents must be a floating-point tensor, got ndarray"),
        ({"latents": NOISE.long()}, "latents must be a floating-point tensor"),
        ({"latents": NOISE / torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)}, "given latents of image 0 are not finite"),
        ({"callback_on_step_end": "print"}, "callback_on_step_end is 'print', expected a function"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs is 'latents'"),
        ({"callback_on_step_end": SDCFGCutoffCallback()}, "'prompt_embeds'.*expected some of .'latents'"),
    ],
)
def test_an_argument_is_refused_before_the_first_evaluation(arguments, message):
    pipeline = tiny_pipeline()
    pipeline.transformer.blocks[0] = NeverEvaluated()
    with pytest.raises(ValueError, match=message):
        sample(pipeline, **arguments)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (1.0, "a class label must be an index or a name, got 1.0"),
        ([1.0], "got 1.0"),
        (None, "got None"),
        ({0: "cat"}, "got {0: 'cat'}"),
        ({0, 1}, "got {0, 1}"),
        (b"cat", "got b'cat'"),
        (np.array([True]), "got True"),
        (torch.tensor([0.5]), "got 0.5"),
        (np.array([]), "class_labels is empty"),
        ([10**400], "does not exist: expected 0 to 2"),
        ("9" * 5000, "unknown label '999"),
        ("index=cat", "unknown label 'index=cat'"),
        ("index=7", "class index 7 does not exist"),
        ("-1", "unknown label '-1'"),
    ],
)
def test_a_label_that_is_none_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline().get_label_ids(labels)


@pytest.mark.parametrize(
    ("id2label", "label", "expected"),
    [
        (None, np.array([[2, 0]]), [2, 0]),
        (None, np.array(["2"]), [2]),
        (None, (2, range(2), torch.tensor(1)), [2, 0, 1, 1]),
        (None, "2", [2]),
        (NUMBERS, "10", [1]),
        (NUMBERS, "0", [0]),  # name and index of one class
        (NUMBERS, "2", [2]),  # no name
        (NUMBERS, 1, [1]),
        (NUMBERS, "1", "'1' may mean several classes: expected index=1 or index=2"),
        (NUMBERS, "index=1", [1]),
        ({0: "index=1"}, "index=1", [0]),
        ({0: "crane, bird", 1: "crane, machine"}, "machine", [1]),
        ({0: "crane, bird", 1: "crane, machine"}, "crane", "may mean several classes: expected index=0 or index=1"),
        ({0: "caf\u00e9"}, "cafe\u0301", [0]),  # NFC and NFD
        ({0: "cafe\u0301"}, "caf\u00e9", [0]),
    ],
)
def test_names_and_indices(id2label, label, expected):
    pipeline = tiny_pipeline(id2label=id2label)
    if isinstance(expected, list):
        assert pipeline.get_label_ids(label) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            pipeline.get_label_ids(label)


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({1: 5}, "id2label names class 1 5, expected a text"),
        ({1: " "}, "id2label names class 1 ' '"),
        ({True: "cat"}, r"id2label has \[True\]"),
        ({0: "cat", "0": "dog"}, r"id2label has \['0'\]"),
        (["cat", "dog"], "id2label is a list, expected a dict"),
        ({0: "cat", 1: "cat"}, "id2label calls both 0 and 1 'cat'"),
        ({0: "caf\u00e9", 2: "cafe\u0301"}, "id2label calls both 0 and 2"),
    ],
)
def test_names_that_do_not_fit_are_refused(id2label, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(id2label=id2label)


def schedulers_that_do_not_fit():
    plain = (
        "DDIM DDPM PNDM LCM EDMEuler EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete TCD UniPCMultistep"
    )
    yield from ((name + "Scheduler", {}, "expected FlowMatchEulerDiscreteScheduler") for name in plain.split())
    for name in ("UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "SASolver"):
        yield name + "Scheduler", {}, r"use_flow_sigmas=.*prediction_type=epsilon"
        yield name + "Scheduler", {"use_flow_sigmas": True}, r"\(prediction_type=epsilon\)"
    others = "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "thresholding"
    for setting in others:
        yield "DPMSolverMultistepScheduler", FLOW | {setting: True}, f"{setting}=True"
    yield "UniPCMultistepScheduler", FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"
    for setting in ("invert_sigmas", "use_dynamic_shifting"):
        yield "FlowMatchEulerDiscreteScheduler", {setting: True}, f"{setting}=True"
    for shift in (-1.0, 0.0, NAN, INFINITE):
        yield "FlowMatchEulerDiscreteScheduler", {"shift": shift}, "shift="
        yield "UniPCMultistepScheduler", FLOW | {"flow_shift": shift}, "flow_shift="


@pytest.mark.parametrize(("name", "settings", "message"), [*schedulers_that_do_not_fit()])
def test_a_scheduler_of_another_process_is_refused(name, settings, message):
    try:
        scheduler = getattr(diffusers, name)(**settings)
    except ImportError as error:  # beta sigmas take scipy
        pytest.skip(str(error))
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(scheduler=scheduler)
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        sample(pipeline)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        FlowMatchEulerDiscreteScheduler(shift=2.0, use_karras_sigmas=True),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0),
        UniPCMultistepScheduler(**FLOW, flow_shift=2.0),
        UniPCMultistepScheduler(**FLOW, flow_shift=2.0, final_sigmas_type="sigma_min"),
        DPMSolverMultistepScheduler(**FLOW, flow_shift=2.0),
        diffusers.DPMSolverSinglestepScheduler(**FLOW, flow_shift=2.0),
        diffusers.DEISMultistepScheduler(**FLOW, flow_shift=2.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_that_fits_brings_noise_to_the_data(scheduler):
    """Of data x distributed as N(m, 0.5²) the flow is known: noise e ends at m + 0.5·e."""
    pipeline = tiny_pipeline(vae=None, scheduler=scheduler)

    def velocity(latents, t, *_):
        spread = 0.25 * t**2 + (1 - t) ** 2
        return 3 + (0.25 * t - (1 - t)) / spread * (latents - 3 * t)

    pipeline._velocity = velocity
    end = sample(pipeline, num_inference_steps=40, latents=NOISE)
    assert (end - (3 + 0.5 * NOISE)).abs().max() < 0.12


def test_a_shift_that_from_config_dropped_is_named():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="flow_shift=1.0, where it was made from shift=3.0.*from_config does not"):
        tiny_pipeline(scheduler=UniPCMultistepScheduler.from_config(euler.config, **FLOW))
    tiny_pipeline(scheduler=UniPCMultistepScheduler.from_config(euler.config, **FLOW, flow_shift=1.0))


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        SASolverScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_that_adds_noise_draws_it_from_the_generator(scheduler):
    images = [sample(tiny_pipeline(scheduler=scheduler), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*images)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    alone = sample(tiny_pipeline(scheduler=scheduler), labels=[1], generator=torch.Generator().manual_seed(4))
    assert torch.allclose(sample(tiny_pipeline(scheduler=scheduler), generator=generators)[1:], alone, atol=1e-4)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_weights_that_are_no_numbers_raise(output_type):
    transformer = tiny_transformer()
    torch.nn.init.constant_(transformer.proj_out.bias, NAN)
    with pytest.raises(ValueError, match="latents of image 0, 1 are not finite"):
        sample(tiny_pipeline(transformer=transformer), output_type=output_type)
    vae = copy.deepcopy(tiny_pipeline().vae)
    torch.nn.init.constant_(vae.decoder.proj_out.bias, INFINITE)
    if output_type != "latent":
        with pytest.raises(ValueError, match="pixels of image 0, 1 are not finite"):
            sample(tiny_pipeline(vae=vae), output_type=output_type)


def test_guidance_by_a_class_that_was_never_trained_is_said():
    pipeline = tiny_pipeline(transformer=tiny_transformer(class_dropout_prob=0.0))
    with pytest.warns(UserWarning, match="guidance_scale is 2.0, but .* no unconditional class was trained"):
        sample(pipeline, guidance_scale=2.0)
    guided = LightningDiTPipeline(**pipeline.components | {"guidance_transformer": tiny_transformer(seed=1)})
    guided.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sample(pipeline)
        sample(guided, guidance_scale=2.0)


def test_a_transformer_in_training_mode_keeps_its_labels_and_its_mode():
    transformer = tiny_transformer(class_dropout_prob=1.0)
    expected = sample(tiny_pipeline(transformer=transformer))
    transformer.train()
    assert torch.equal(sample(tiny_pipeline(transformer=transformer)), expected)
    assert transformer.training and transformer.blocks[0].training


def test_callbacks():
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append(set(tensors))

    class Look(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, *arguments):
            return look(*arguments) or {}

    plain = sample(tiny_pipeline(), num_inference_steps=1)
    for callback, inputs in ((look, []), (look, None), (look, ["latents"]), (Look(), None)):
        found = sample(
            tiny_pipeline(),
            num_inference_steps=1,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=inputs,
        )
        assert torch.equal(found, plain)
    assert seen == [set(), {"latents"}, {"latents"}, {"latents"}]
    with pytest.raises(ValueError, match="callback_on_step_end gave a Tensor, expected a dict"):
        sample(tiny_pipeline(), callback_on_step_end=lambda *_: NOISE)
    for latents, message in ((None, "NoneType"), (NOISE[:0], r"torch.float32 \(0, "), (NOISE.long(), "torch.int64")):
        with pytest.raises(ValueError, match=f"callback_on_step_end gave latents {message}.*expected floating-point"):
            sample(tiny_pipeline(), callback_on_step_end=lambda *_, given=latents: {"latents": given})


def test_a_pipeline_without_a_network_or_a_scheduler_says_so():
    for name in ("transformer", "scheduler"):
        with pytest.raises(ValueError, match="this pipeline lacks a transformer or a scheduler: it cannot sample"):
            sample(tiny_pipeline(**{name: None}))


@pytest.mark.parametrize("name", ["vae", "transformer", "guidance_transformer"])
def test_a_component_that_is_no_model_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is a str, expected a model"):
        tiny_pipeline(**{name: "folder"})


def test_a_pipeline_of_another_ones_components_has_its_names():
    pipeline = tiny_pipeline()
    assert LightningDiTPipeline(**pipeline.components).labels == pipeline.labels
    assert "id2label" not in tiny_pipeline(id2label=None).components


def test_what_a_network_cannot_do_is_refused_by_name():
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="FasterCache does not fit LightningDiT: expected FirstBlockCache"):
        pipeline.transformer.enable_cache(FasterCacheConfig())
    with pytest.raises(NotImplementedError, match="AutoencoderVTP has no tiling.*use enable_slicing"):
        pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    assert pipeline.vae.use_slicing


@pytest.mark.parametrize(
    "cache",
    [FirstBlockCacheConfig(), MagCacheConfig(num_inference_steps=2, mag_ratios=[1.0, 1.0]),
     TaylorSeerCacheConfig(use_lite_mode=True)],
)  # fmt: skip
def test_internal_guidance_refuses_caches_that_skip_what_the_base_head_needs(cache):
    pipeline = tiny_pipeline(transformer=tiny_transformer(num_layers=3, base_head_layer=2))
    pipeline.transformer.enable_cache(cache)
    with pytest.raises(ValueError, match="guidance is 'internal', expected .* no cache that skips blocks"):
        sample(pipeline, guidance="internal", guidance_scale=2.0)
    pipeline.transformer.disable_cache()
    assert len(sample(pipeline, guidance="internal", guidance_scale=2.0)) == 2


def test_an_interrupted_call_with_a_cache_leaves_nothing_to_the_next():
    def call(end=None):
        def stop(pipe, step, timestep, tensors):
            if step == end:
                raise KeyboardInterrupt
            return {}

        return sample(pipeline, num_inference_steps=6, callback_on_step_end=stop)

    pipeline = tiny_pipeline()
    pipeline.transformer.enable_cache(MagCacheConfig(num_inference_steps=6, mag_ratios=[1.0] * 6, threshold=10.0))
    whole = call()
    with pytest.raises(KeyboardInterrupt):
        call(end=2)
    assert np.array_equal(call(), whole)


def test_parts_that_were_replaced_are_checked_before_the_first_step():
    pipeline = tiny_pipeline()
    pipeline.register_modules(vae=AutoencoderKL(latent_channels=3))
    pipeline.transformer.forward = None
    with pytest.raises(ValueError, match="the autoencoder has 3 latent channels, the transformer 4"):
        sample(pipeline)
    pipeline = tiny_pipeline()
    pipeline.vae.register_to_config(latents_mean=None, latents_std=None)
    with pytest.warns(UserWarning, match="the vae lacks its latent statistics"):
        sample(pipeline, output_type="np")
