"""What fits a LightningDiT pipeline: numbers, class names, components and schedulers."""

import sys
import unicodedata
from numbers import Real
from typing import Any

import torch

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
# These follow the flow when their settings say so.
SOLVERS = (
    "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "SASolverScheduler",
)  # fmt: skip


def is_number(value: Any, low: float = 0, high: float = sys.float_info.max, kind: type = Real) -> bool:
    """Whether a value is a finite number of this kind between the bounds; booleans are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


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
    seen = {}
    for index, name in id2label.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"id2label names class {index} {name!r}, expected a text")
        if seen.setdefault(normal_name(name), index) != index:
            raise ValueError(
                f"id2label calls both {seen[normal_name(name)]} and {index} {name!r}, expected different names"
            )


def check_scheduler(scheduler) -> None:
    """Raises: ValueError unless the scheduler integrates noise - data from sigma 1 to 0."""
    classes, config = {kind.__name__ for kind in type(scheduler).__mro__}, dict(getattr(scheduler, "config", {}))
    wanted = {"invert_sigmas": False, "use_dynamic_shifting": False}
    if classes.isdisjoint(FLOW_SCHEDULERS):
        wanted |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        others = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        wanted |= dict.fromkeys(others, False)
    faults = [f"{name}={config.get(name)}" for name, value in wanted.items() if (config.get(name) or False) != value]
    for name, other in ("shift", "flow_shift"), ("flow_shift", "shift"):
        shift = config.get(name, 1)
        given = config.get(other, shift) if name in config.get("_use_default_values", ()) else shift
        if not is_number(shift, low=1e-9) or given != shift:
            faults.append(f"{name}={shift}" + (f", where it was made from {other}={given}" if given != shift else ""))
    if faults or classes.isdisjoint(FLOW_SCHEDULERS + SOLVERS):
        raise ValueError(
            f"scheduler is {type(scheduler).__name__} ({', '.join(faults)}), which does not follow the flow: expected "
            f"{', '.join(FLOW_SCHEDULERS)}, or with use_flow_sigmas=True, prediction_type='flow_prediction' and "
            f"flow_shift (from_config drops what others call shift) {', '.join(SOLVERS)}"
        )
