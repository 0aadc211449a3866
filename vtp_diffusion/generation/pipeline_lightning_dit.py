"""`LightningDiTPipeline`: class labels -> images with a LightningDiT and any latent autoencoder."""

import contextlib
import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderRAE,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.utils.torch_utils import randn_tensor

from ..data.images import check_finite, to_pil
from ..models.autoencoder_vtp import AutoencoderVTP
from ..models.latent_space import decode_to_images
from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel
from .pipeline_checks import (
    changed_latents,
    check_call,
    check_components,
    check_names,
    check_parts,
    check_scheduler,
    default_steps,
    is_guided,
    is_number,
    normal_name,
)


class LightningDiTPipeline(DiffusionPipeline):
    """Class-conditional image generation.

    Args:
        vae: `AutoencoderVTP` or another diffusers autoencoder; None when only latents are wanted.
        transformer: the velocity network.
        scheduler: one of `FLOW_SCHEDULERS`, or of `SOLVER_CLASSES` with use_flow_sigmas=True, prediction_type=
            "flow_prediction" and flow_shift. Upstream's time shift s is `FlowMatchEulerDiscreteScheduler(shift=1/s)`.
        guidance_transformer: optional weaker network for autoguidance (Karras et al., arXiv:2406.02507): its
            conditional prediction takes the place of the unconditional one.
        id2label: class index -> name; comma-separated names are synonyms.

    Raises: ValueError if the autoencoder or the guidance transformer works on other latents or classes than the
    transformer, the scheduler does not follow the flow, or `id2label` does not name the transformer's classes.
    """

    model_cpu_offload_seq = "guidance_transformer->transformer->vae"
    _optional_components = ["vae", "guidance_transformer"]
    _callback_tensor_inputs = ["latents"]
    # Text of the self-contained pipeline.py that this class was loaded from, set at its end; None in the package.
    exported_source: str | None = None

    def __init__(
        self,
        # `from_pipe` passes on only components of the classes named here
        vae: AutoencoderVTP | AutoencoderKL | AutoencoderDC | AutoencoderRAE | None,
        transformer: LightningDiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        guidance_transformer: LightningDiTTransformer2DModel | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        check_components(vae, transformer, guidance_transformer)
        check_names(id2label, transformer)
        if scheduler is not None:
            check_scheduler(scheduler)
        if vae is not None:
            # Only a pipeline that was made without an autoencoder is complete without one.
            self._optional_components = ["guidance_transformer"]
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, guidance_transformer=guidance_transformer
        )
        # JSON has no integer keys, so the saved form has strings from the start.
        self.register_to_config(
            id2label=None if id2label is None else {str(index): name for index, name in id2label.items()}
        )
        self.labels, self._shared_names = {}, {}
        for index, names in (id2label or {}).items():
            for name in {normal_name(name) for name in (names, *names.split(","))}:
                if self.labels.setdefault(name, int(index)) != int(index):
                    self._shared_names.setdefault(name, [self.labels[name]]).append(int(index))

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write `model_index.json`, the last step of `save_pretrained`, and a self-contained pipeline's code."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.exported_source is not None:
            write_self_contained(save_directory, self.exported_source)

    @property
    def components(self) -> dict[str, Any]:
        """The arguments that make a pipeline like this one: its components, and `id2label` if there are names."""
        names = {} if self.config.id2label is None else {"id2label": dict(self.config.id2label)}
        return super().components | names

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The scheduler's time of the step under way, which some diffusers caches ask for; None outside the loop."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def get_label_ids(self, class_labels: int | str | list[int | str] | torch.Tensor | np.ndarray) -> list[int]:
        """Class indices of the given indices or names, nested lists flattened.

        A string of digits that is no name is an index; "index=4" always is one.
        Raises: ValueError naming a label that does not exist, or may mean several classes.
        """
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.flatten().tolist()
        if not isinstance(class_labels, list | tuple | range):
            return [self._label_id(class_labels)]
        if not class_labels:
            raise ValueError("class_labels is empty: give at least one class index or name")
        return [index for label in class_labels for index in self.get_label_ids(label)]

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, str):
            label = self._named(label)
        if not is_number(label, -math.inf, math.inf, Integral):
            raise ValueError(f"a class label must be an index or a name, got {label!r}")
        if not 0 <= label < self.transformer.config.num_classes:
            raise ValueError(
                f"class index {label} does not exist: expected 0 to {self.transformer.config.num_classes - 1}"
            )
        return int(label)

    def named_classes(self, name: str) -> set[int]:
        """The classes of a name: none, one, or several that share it as a synonym."""
        name = normal_name(name)
        return set(self._shared_names.get(name, [self.labels[name]] if name in self.labels else []))

    def _named(self, label: str) -> int:
        name = normal_name(label)
        digits = name.removeprefix("index=")
        meant = self.named_classes(name)
        if digits.isascii() and digits.isdecimal() and len(digits) < 16:
            if not meant or digits == name and int(digits) < self.transformer.config.num_classes:
                meant.add(int(digits))
        if len(meant) > 1:
            expected = " or ".join(f"index={index}" for index in sorted(meant))
            raise ValueError(f"label {label!r} may mean several classes: expected {expected}")
        if meant:
            return meant.pop()
        if not self.labels:
            raise ValueError(f"unknown label {label!r}: this pipeline has no id2label, give an index")
        close = difflib.get_close_matches(name, self.labels, n=5, cutoff=0.4)
        hint = f", such as {', '.join(close or list(self.labels)[:5])}"
        raise ValueError(f"unknown label {label!r}: expected one of the {len(self.labels)} names in `labels`{hint}")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LightningDiTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance: str = "auto",
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: class indices and names, mixed freely (see `get_label_ids`).
            num_inference_steps: evaluations of the network with the Euler scheduler (N - 1 for upstream's N grid
                points); None is 50, or for a few-step student the most that it was trained for.
            guidance_scale: w in weak + w·(v - weak) (Ho and Salimans, arXiv:2207.12598). 1 = no
                guidance, 0 = `weak` alone.
            guidance_interval: guidance is applied where low <= t <= high, t = 0 being noise (Kynkäänniemi et al.,
                arXiv:2404.07724).
            guidance_channels: number of latent channels to guide, from the first; 3 is upstream's rule. None = all.
            num_images_per_label: images per label; those of one label follow each other.
            generator: one for all images, or a list with one per image; for the noise, and schedulers that add more.
            latents: initial noise (B, C, h, w), B = labels x images per label.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, C, h, w).
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; may return new
                "latents". A `PipelineCallback` says itself which tensors it gets.
            guidance: what `weak` is: "classifier_free", the prediction without a class; "autoguidance", that of
                `guidance_transformer`; "internal", that of the transformer's base head, in the same pass (RAEv2,
                arXiv:2605.18324); "auto": the guidance transformer's where there is one, else without a class.
        Returns: `ImagePipelineOutput` with `.images`, or a tuple of them.
        Raises: ValueError on any argument that does not fit, before the first evaluation, and on results that are not
        finite.
        """
        check_parts(self)
        label_ids = self.get_label_ids(class_labels)
        tensor_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        student = self.transformer.config.get("student")
        if num_inference_steps is None:
            num_inference_steps = default_steps(student)
        check_call(
            self, num_inference_steps, guidance_scale, guidance_interval, guidance_channels, num_images_per_label,
            output_type, callback_on_step_end, tensor_inputs, guidance,
        )  # fmt: skip
        self._guidance_scale = guidance_scale
        self._interrupt, self._current_timestep = False, None
        for network in filter(None, (self.transformer, self.guidance_transformer)):
            network._reset_stateful_cache()  # of an interrupted call
        device = self._execution_device
        labels = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_label)  # (B,)
        latents = self.prepare_latents(len(labels), generator, latents, device)
        step_options = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_options["generator"] = generator

        timesteps = self._set_timesteps(num_inference_steps, device)
        sigmas = self.scheduler.sigmas.tolist()  # all at once: reading one per step would wait for the device
        with _evaluation_mode(self.vae, self.transformer, self.guidance_transformer):
            with self.progress_bar(total=len(timesteps)) as progress:
                for step, timestep in enumerate(timesteps):
                    if self.interrupt:
                        continue
                    self._current_timestep = timestep
                    t = 1 - sigmas[step]
                    # read at every step: a callback may change it
                    scale = self.guidance_scale if is_guided(t, guidance_interval) else 1.0
                    if student is None:
                        velocity = self._velocity(latents, t, labels, scale, guidance_channels, guidance)
                    else:  # the mean velocity up to the next time
                        velocity = self._evaluate(self.transformer, "cond", latents, t, labels, 1 - sigmas[step + 1])
                    if step + 1 == len(timesteps) and sigmas[-1] > 0:  # DEIS and SASolver leave the last noise in
                        latents = latents + (1 - t) * velocity
                    else:  # diffusers' flow models predict noise - data
                        latents = self.scheduler.step(-velocity, timestep, latents, **step_options)[0]
                    if callback_on_step_end is not None:
                        tensors = {name: latents for name in (["latents"] if tensor_inputs is None else tensor_inputs)}
                        latents = changed_latents(callback_on_step_end(self, step, timestep, tensors), latents)
                    progress.update()

            self._current_timestep = None
            check_finite(latents, "latents")
            images = latents if output_type == "latent" else self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Initial noise (B, C, h, w) in float32, which the sampling loop keeps whatever the network's precision."""
        config = self.transformer.config
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        generators = generator if isinstance(generator, list) else [generator] * batch
        if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"generator is {generator!r}, expected a torch.Generator or a list of them")
        if len(generators) != batch:
            raise ValueError(f"got {len(generators)} generators for {batch} images: give one, or one an image")
        if latents is not None:
            if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
                raise ValueError(f"latents must be a floating-point tensor, got {type(latents).__name__}")
            if tuple(latents.shape) != shape:
                raise ValueError(f"expected latents {shape}, got {tuple(latents.shape)}")
            check_finite(latents, "given latents")
            return latents.to(device, torch.float32)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the network sees them (B, C, h, w) -> images (B, 3, H, W) around [-1, 1], float32.

        An autoencoder that owns its latent statistics undoes them in `decode`; `scaling_factor` and `shift_factor` of
        the others are undone here.
        """
        return decode_to_images(self.vae, latents)

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> torch.Tensor:
        # Without sigmas the scheduler builds its grid between ends that are already shifted, and shifts it again.
        sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        if "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def _velocity(
        self,
        latents: torch.Tensor,
        t: float | torch.Tensor,
        labels: torch.Tensor,
        guidance_scale: float | torch.Tensor,
        guidance_channels: int | None,
        guidance: str = "auto",
    ) -> torch.Tensor:
        """data - noise at time t, guided when the scale is not 1. (B, C, h, w) in float32.

        Distillation calls it with (B,) times and scales (B, 1, 1, 1).
        """
        if not isinstance(guidance_scale, torch.Tensor) and guidance_scale == 1.0:
            return self._evaluate(self.transformer, "cond", latents, t, labels)
        if guidance == "internal":
            strong, weak = self._evaluate(self.transformer, "cond", latents, t, labels, return_base=True)
        elif self.guidance_transformer is not None and guidance != "classifier_free":
            strong = self._evaluate(self.transformer, "cond", latents, t, labels)
            weak = self._evaluate(self.guidance_transformer, "guidance", latents, t, labels)
        else:
            null = torch.full_like(labels, self.transformer.config.num_classes)
            both = self._evaluate(
                self.transformer, "cond_uncond", torch.cat([latents] * 2), t, torch.cat([labels, null])
            )
            strong, weak = both.chunk(2)
        guided = weak + guidance_scale * (strong - weak)
        if guidance_channels is None:
            return guided
        return torch.cat([guided[:, :guidance_channels], strong[:, guidance_channels:]], dim=1)

    def _evaluate(
        self,
        transformer: torch.nn.Module,
        cache: str,
        latents: torch.Tensor,
        t: float | torch.Tensor,
        labels: torch.Tensor,
        next_t: float | None = None,
        return_base: bool = False,
    ) -> Any:
        """A velocity (B, C, h, w) float32; with `return_base` also the base head's. The transformer casts the latents
        to its precision itself."""

        def repeated(t):
            if isinstance(t, torch.Tensor):
                return t.repeat(len(latents) // len(t))
            return torch.full((len(latents),), t, dtype=torch.float32, device=latents.device)

        options = {"return_base": True} if return_base else {}
        options |= {} if next_t is None else {"next_timestep": repeated(next_t)}
        with transformer.cache_context(cache):  # diffusers' step caches keep one state a context
            outputs = transformer(latents, repeated(t), labels, return_dict=False, **options)
        return [output.float() for output in outputs] if return_base else outputs[0].float()

    def _decoded(self, latents: torch.Tensor, output_type: str) -> Any:
        images = self.decode_latents(latents)
        check_finite(images, "pixels")
        if output_type == "pil":
            return to_pil(images)
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


@contextlib.contextmanager
def _evaluation_mode(*models: torch.nn.Module | None) -> Iterator[None]:
    """Put models into evaluation mode: in training mode a transformer drops labels."""
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def write_self_contained(folder: str | Path, source: str) -> None:
    """Turn a saved pipeline folder into one that stock diffusers can load (see `vtp_diffusion.generation.export`).

    Adds a `pipeline.py` with the given text, and has `model_index.json` look our classes up in diffusers, where that
    file puts them.
    """
    folder = Path(folder)
    index_file = folder / LightningDiTPipeline.config_name
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) else None
        if library is not None and library.partition(".")[0] in ("vtp_diffusion", "diffusers_modules"):
            index[name] = ["diffusers", entry[1]]
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "pipeline.py").write_text(source, encoding="utf-8")
