"""Checks of what a LightningDiT pipeline is given: numbers, class names, components and schedulers."""

import sys
import unicodedata
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

MANY = 1_000_000
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
SKIPPING_CACHES = ("FirstBlockCacheConfig", "MagCacheConfig")
# These integrate the flow only with the settings that `check_scheduler` expects.
SOLVER_CLASSES = (
    "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "SASolverScheduler",
)  # fmt: skip


def is_number(value: Any, low: float = 0, high: float = sys.float_info.max, kind: type = Real) -> bool:
    """Whether a value is a finite number of this kind between the bounds; booleans do not count as numbers."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return low <= (value if isinstance(value, Integral) else float(value)) <= high


def is_guided(t: float | torch.Tensor, interval: tuple[float, float]) -> bool | torch.Tensor:
    """Whether guidance acts at time t, a number or (B,): low <= t <= high, up to the rounding of float32 times.

    A high of 1 bounds nothing: the last step of an adaptive solver goes past the end and is cut back.
    """
    low, high = interval
    return (low - 1e-6 <= t) & ((t <= high + 1e-6) | (high == 1))


def normal_name(name: str) -> str:
    """A name as it is compared: one form of accented letters, whichever a file system or keyboard gave."""
    return unicodedata.normalize("NFC", name.strip())


def check_components(vae, transformer, guidance_transformer) -> None:
    """Raises: ValueError if the components are no models, or made for other latents or classes."""
    for name, model in (("vae", vae), ("transformer", transformer), ("guidance_transformer", guidance_transformer)):
        if not isinstance(model, torch.nn.Module | None):
            raise ValueError(f"{name} is a {type(model).__name__}, expected a model")
    if transformer is None:  # diffusers allows pipelines that lack components
        return
    config = transformer.config
    channels = getattr(getattr(vae, "config", None), "latent_channels", None)  # AutoencoderRAE has no such entry
    if channels is not None and channels != config.in_channels:
        raise ValueError(f"the autoencoder has {channels} latent channels, the transformer {config.in_channels}")
    for key in ("in_channels", "sample_size", "num_classes") if guidance_transformer is not None else ():
        theirs = guidance_transformer.config[key]
        if theirs != config[key]:
            raise ValueError(f"the guidance transformer has {key} {theirs}, the transformer {config[key]}")


def check_names(id2label: Any, transformer) -> None:
    """Raises: ValueError unless `id2label` gives classes of the transformer one name each."""
    if id2label is None or transformer is None:
        return
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label is a {type(id2label).__name__}, expected a dict of class index -> name")
    expected, given = set(map(str, range(transformer.config.num_classes))), [*map(str, id2label)]
    if wrong := [index for index in id2label if str(index) not in expected] or given[len(set(given)) :]:
        raise ValueError(f"id2label has {wrong[:5]}, expected class indices from 0 to {len(expected) - 1}")
    check_distinct_names(id2label, "id2label")


def check_distinct_names(names: dict[Any, Any], given: str) -> None:
    """Raises: ValueError unless every class has a name of its own. Args: `given`: where the names are from."""
    seen = {}
    for index, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{given} names class {index} {name!r}, expected a text")
        if seen.setdefault(normal_name(name), index) != index:
            raise ValueError(f"{given} calls both {seen[normal_name(name)]} and {index} {name!r}, expected two names")


def check_scheduler(scheduler) -> None:
    """Raises: ValueError unless the scheduler integrates noise - data from sigma 1 to 0."""
    classes, config = {kind.__name__ for kind in type(scheduler).__mro__}, dict(getattr(scheduler, "config", {}))
    wanted = {"invert_sigmas": False, "use_dynamic_shifting": False}
    if classes.isdisjoint(FLOW_SCHEDULERS):
        wanted |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        others = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "thresholding")
        wanted |= dict.fromkeys(others, False)
    faults = [f"{name}={config.get(name)}" for name, value in wanted.items() if (config.get(name) or False) != value]
    for name, other in ("shift", "flow_shift"), ("flow_shift", "shift"):
        shift = config.get(name, 1)
        given = config.get(other, shift) if name in config.get("_use_default_values", ()) else shift
        if not is_number(shift, low=1e-9) or given != shift:
            faults.append(f"{name}={shift}" + (f", where it was made from {other}={given}" if given != shift else ""))
    if faults or classes.isdisjoint(FLOW_SCHEDULERS + SOLVER_CLASSES):
        raise ValueError(
            f"scheduler is {type(scheduler).__name__} ({', '.join(faults)}), which does not follow the flow: expected "
            f"{', '.join(FLOW_SCHEDULERS)}, or one of {', '.join(SOLVER_CLASSES)} with use_flow_sigmas=True, "
            "prediction_type='flow_prediction' and flow_shift (from_config does not take it over from shift)"
        )


def guidance_kinds(pipe) -> list[str]:
    """The values of `guidance` that a pipeline takes."""
    cache = getattr(pipe.transformer, "_cache_config", None)
    skips = type(cache).__name__ in SKIPPING_CACHES or getattr(cache, "use_lite_mode", False)
    kinds = ["auto", "classifier_free"] + ["autoguidance"] * (pipe.guidance_transformer is not None)
    return kinds + ["internal"] * (pipe.transformer.config.get("base_head_layer") is not None and not skips)


def check_parts(pipe) -> None:
    """Raises: ValueError if a pipeline has no transformer or no scheduler, or parts that do not fit together."""
    if pipe.transformer is None or pipe.scheduler is None:
        raise ValueError("this pipeline lacks a transformer or a scheduler: it cannot sample")
    check_components(pipe.vae, pipe.transformer, pipe.guidance_transformer)  # they may have been replaced


def changed_latents(changed, latents: torch.Tensor) -> torch.Tensor:
    """The latents after a callback. Raises: ValueError unless it gave None, or a dictionary without latents or with
    such latents."""
    if not isinstance(changed, dict | None):
        raise ValueError(f"callback_on_step_end gave a {type(changed).__name__}, expected a dict")
    found = (changed or {}).get("latents", latents)
    if not isinstance(found, torch.Tensor) or found.shape != latents.shape or not found.is_floating_point():
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"callback_on_step_end gave latents {what}, expected floating-point {tuple(latents.shape)}")
    return found


def check_call(pipe, steps, scale, interval, channels, repeats, output_type, callback, tensor_inputs, kind) -> None:
    """Raises: ValueError naming the first argument of a call that does not fit."""
    check_scheduler(pipe.scheduler)  # a pipeline's scheduler may be replaced
    config, known = pipe.transformer.config, pipe._callback_tensor_inputs
    if config.get("student") is not None:
        check_student(config.student, pipe.scheduler, steps, scale, kind, interval, channels)
    pair = isinstance(interval, tuple | list | np.ndarray) and len(interval) == 2
    types, no_vae = (OUTPUT_TYPES, "") if pipe.vae is not None else (("latent",), ": this pipeline has no vae")
    kinds, least = guidance_kinds(pipe), int(kind == "internal")
    inputs = isinstance(tensor_inputs, list | tuple) and all(name in known for name in tensor_inputs)
    for name, value, fits, expected in (
        ("num_inference_steps", steps, is_number(steps, 1, MANY, Integral), f"1 to {MANY}"),
        ("num_images_per_label", repeats, is_number(repeats, 1, MANY, Integral), f"1 to {MANY}"),
        (
            "guidance", kind, isinstance(kind, str) and kind in kinds,
            f"{', '.join(kinds)}: autoguidance takes a guidance_transformer, internal a base_head_layer and no cache "
            "that skips blocks",
        ),
        ("guidance_scale", scale, is_number(scale, least), f"{least} or more with guidance {kind!r}"),
        (
            "guidance_interval", interval,
            pair and is_number(interval[0], 0, 1) and is_number(interval[1], interval[0], 1),
            "(low, high) with 0 <= low <= high <= 1",
        ),
        (
            "guidance_channels", channels,
            channels is None or is_number(channels, 1, config.in_channels, Integral), f"1 to {config.in_channels}",
        ),
        (
            "output_type", output_type, isinstance(output_type, str) and output_type in types,
            f"one of {', '.join(types)}{no_vae}",
        ),
        ("callback_on_step_end", callback, callback is None or callable(callback), "a function"),
        (
            "callback_on_step_end_tensor_inputs", tensor_inputs, tensor_inputs is None or inputs,
            f"some of {known}",
        ),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    bare = hasattr(pipe.vae, "denormalize_latents") and pipe.vae.config.latents_mean is None
    if bare and output_type != "latent":
        warnings.warn(
            "the vae lacks its latent statistics (latents_mean, latents_std): expect wrong pictures", stacklevel=1
        )
    free = kind == "classifier_free" or (kind == "auto" and pipe.guidance_transformer is None)
    if scale != 1 and free and config.class_dropout_prob == 0:
        warnings.warn(
            f"guidance_scale is {scale}, but with class_dropout_prob 0 no unconditional class was trained: expect "
            "meaningless pictures, or give guidance_scale 1 or a guidance_transformer",
            stacklevel=1,  # one place, for a warning shown once
        )


def default_steps(student: dict[str, Any] | None) -> int:
    """The number of steps where none is given: 50, or the most that a few-step student learned."""
    return 50 if student is None else max(student["steps"])


def check_student(student: dict[str, Any], scheduler, steps: int, scale: float, kind: str, interval, channels) -> None:
    """Raises: ValueError if a few-step student is asked for what it was not trained for.

    Args: `student`: that entry of the transformer's configuration.
    """
    if steps not in student["steps"]:
        raise ValueError(f"num_inference_steps is {steps}, expected one that this student learned: {student['steps']}")
    interval = tuple(interval) if isinstance(interval, list | np.ndarray) else interval
    usual = ("guidance", kind, "auto"), ("guidance_scale", scale, 1), ("guidance_interval", interval, (0, 1))
    for name, value, expected in (*usual, ("guidance_channels", channels, None)):
        if value != expected:
            baked = ", ".join(f"{k} {v}" for k, v in (student["guidance"] or {"guidance": "none"}).items())
            raise ValueError(f"{name} is {value!r}, expected {expected!r}: this student has {baked} baked in")
    config, euler = scheduler.config, type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    if not euler or config.get("stochastic_sampling") or abs(config.shift - student["shift"]) > 1e-6:
        raise ValueError(
            f"scheduler is {type(scheduler).__name__}, expected FlowMatchEulerDiscreteScheduler with shift "
            f"{student['shift']:.6g} and no noise: this student's own"
        )
