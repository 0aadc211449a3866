"""Sampling by image number: noise and label of image k depend on the seed and on k alone, not on how many images are
made at once or by how many processes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ..data.images import Rounding, finite_to_uint8
from ..models.latent_space import config_sha256
from ..runtime.reproducibility import exact_float32, random_stream, stream_seed
from .sampler_config import SamplerConfig
from .solvers import solve_adaptively, use_solver

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LabelRule = Literal["random", "balanced", "reference"]
NOISE_RULE = "a hash of seed and image"  # written to settings and results; version 0.1 wrote none: seed + image


def draw_labels(
    rule: LabelRule, count: int, num_classes: int, seed: int, reference: Sequence[int] | None = None
) -> list[int]:
    """Class labels of `count` generated images; label k does not depend on `count`.

    Args: `rule`: "random" draws classes uniformly (as ADM, DiT, SiT and LightningDiT do), "balanced" goes through them
        in turn (VAR, MAR, RAE; lowers FID on ImageNet by about 0.1), "reference" draws from `reference`'s labels.
    """
    generator = random_stream("labels", seed)
    if rule == "random":
        return generator.integers(0, num_classes, count).tolist()
    if rule == "balanced":
        return [k % num_classes for k in range(count)]
    if rule != "reference":
        raise ValueError(f"labels {rule!r} is unknown; known: random, balanced, reference")
    if not reference or not all(0 <= label < num_classes for label in reference):
        raise ValueError(f"labels 'reference' needs a labelled reference with labels from 0 to {num_classes - 1}")
    return np.asarray(reference)[generator.integers(0, len(reference), count)].tolist()


def open_pipeline(folder: str, config: SamplerConfig | None, device: torch.device | str) -> DiffusionPipeline:
    """The pipeline of a folder on a device, in the precision and with the solver of a configuration, without progress
    bars.

    Args: `config`: how it will be called; None if that is not known yet. A number of steps that is none becomes the
        pipeline's own, so that results record it.
    Raises: ValueError naming a folder that cannot be loaded, or what of the configuration the pipeline cannot do.
    """
    from diffusers import DiffusionPipeline

    from ..models.loading import load_saved
    from .pipeline_checks import default_steps

    dtype = (config or SamplerConfig()).torch_dtype(torch.device(device))
    pipe = load_saved(DiffusionPipeline, folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if config is not None:
        try:  # at once: the first call may come after hours of reading real images
            use_solver(pipe, config.solver, config.time_shift)
            if config.num_inference_steps is None:
                config.num_inference_steps = default_steps(pipe.transformer.config.get("student"))
            config.check_pipeline(pipe, config.num_inference_steps, config.guidance_channels)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    return pipe.to(device)


def reset_networks(pipe: DiffusionPipeline, seed: int) -> None:
    """Give a pipeline's transformer, and the one that guides it, the random weights they are constructed with."""
    torch.manual_seed(stream_seed("untrained weights", seed))
    for name in ("transformer", "guidance_transformer"):
        if (network := getattr(pipe, name)) is not None:
            network.load_state_dict(type(network).from_config(network.config).state_dict())


def labels_by_name(pipe: DiffusionPipeline, labels: Sequence[int], names: Sequence[str]) -> list[int]:
    """Labels of a data set -> class indices of a pipeline: matched by name if both have names, since one number may
    mean two classes.

    Args: `names`: of the data set's classes; a class that is called by its own number has no name.
    Raises: ValueError naming classes that the pipeline does not have, or has twice.
    """
    known = pipe.config.id2label or {}
    if not any(name != str(k) for k, name in enumerate(names)) or not any(name != k for k, name in known.items()):
        return list(labels)
    found, missing = {}, []
    for label in sorted(set(labels)):
        whole = pipe.named_classes(names[label])
        classes = whole or {k for name in names[label].split(",") for k in pipe.named_classes(name)}
        if len(classes) == 1:
            found[label] = classes.pop()
        else:
            missing.append(names[label])
    if missing:
        raise ValueError(
            f"labels 'reference': {len(missing)} classes of the reference match none, or several, of the pipeline's "
            f"{len(known)} classes, the first is {missing[0]!r}: expected the same names (id2label)"
        )
    return [found[label] for label in labels]


def initial_noise(pipe: DiffusionPipeline, numbers: Sequence[int], seed: int) -> torch.Tensor:
    """Noise (B, C, h, w) float32 of the images with these numbers, on the pipeline's device.

    That of image k is drawn on the CPU, so that every device starts from the same, from a generator of its own for
    (seed, k): different seeds share no image, and a spread over seeds is one over independent samples.
    """
    return pipe.prepare_latents(len(numbers), image_generators(numbers, seed), None, pipe.device)


def image_generators(numbers: Sequence[int], seed: int) -> list[torch.Generator]:
    """A generator on the CPU for each image."""
    return [torch.Generator().manual_seed(stream_seed("noise", seed, number)) for number in numbers]


def sample_numbers(
    pipe: DiffusionPipeline,
    labels: Sequence[int],
    numbers: Sequence[int],
    seed: int,
    on_step: Callable[[], None] | None = None,
    rounding: Rounding = "half to even",
    **settings,
) -> torch.Tensor:
    """The images with the given numbers of a class-conditional pipeline, at once: uint8 (B, 3, H, W) on the CPU.

    A pipeline in float32 computes without TF32. With a float32 rotary embedding too, the batch that an image is in
    changes its pixels by one level at most. `benchmarks/batch_invariance.py` measures other precisions.

    Args:
        labels: of all images; image k has labels[k].
        on_step: called after every evaluation of the network.
        rounding: as of `to_uint8`.
        settings: of the sampler, as `SamplerConfig.sampler` gives them: num_inference_steps, guidance,
            guidance_scale, guidance_interval, guidance_channels; solver "dopri5" and its tolerance.
    Raises: ValueError: settings that the pipeline refuses, one without an autoencoder, or images that are not finite.
    """
    if pipe.vae is None:
        raise ValueError("this pipeline has no vae: it makes latents, expected images")

    def callback(pipe, step, timestep, tensors):
        on_step()
        return {}

    generators = image_generators(numbers, seed)  # a scheduler that adds noise goes on with them
    noise = pipe.prepare_latents(len(numbers), generators, None, pipe.device)
    wanted = [labels[number] for number in numbers]
    with exact_float32() if pipe.dtype == torch.float32 else contextlib.nullcontext():
        if settings.pop("solver", None) == "dopri5":
            settings.pop("num_inference_steps")
            latents = solve_adaptively(pipe, wanted, noise, on_evaluation=on_step, **settings)
        else:
            latents = pipe(
                wanted,
                generator=generators,
                latents=noise,
                output_type="latent",
                callback_on_step_end=None if on_step is None else callback,
                **settings,
            ).images
        with torch.inference_mode():
            images = finite_to_uint8(pipe.decode_latents(latents), numbers, rounding)
    return images.cpu()


def pipeline_identity(pipe: DiffusionPipeline) -> dict:
    """What decides sampled images beside seeds, labels and the sampler's arguments: weights, configurations,
    precision, and how noise follows from the seed."""
    weights, configurations = {}, {"scheduler": config_sha256(pipe.scheduler)}
    with ThreadPoolExecutor() as pool:  # hashing takes most of the start-up time, and releases the GIL
        for name in ("vae", "transformer", "guidance_transformer"):
            if getattr(pipe, name, None) is not None:
                hashes = pool.map(_tensor_sha256, *zip(*sorted(getattr(pipe, name).state_dict().items()), strict=True))
                weights[name] = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
                configurations[name] = config_sha256(getattr(pipe, name))
    config = pipe.scheduler.config
    scheduler = {"class": type(pipe.scheduler).__name__, "shift": config.get("flow_shift", config.get("shift"))}
    identity = {"weights": weights, "scheduler": scheduler, "configurations": configurations}
    return identity | {"dtype": str(pipe.dtype), "noise": NOISE_RULE}


def _tensor_sha256(name: str, tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(content)  # by itself: joining it with the name would copy it
    return digest.hexdigest()


def to_bfloat16(pipeline: DiffusionPipeline) -> None:
    """Cast the networks. diffusers' `to` would do it too, but warns of modules kept in float32 even without any."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.bfloat16()
