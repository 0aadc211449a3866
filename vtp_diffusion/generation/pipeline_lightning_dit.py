"""`LightningDiTPipeline`: class labels -> images with a LightningDiT and any latent autoencoder."""

import difflib
import inspect
import json
from collections.abc import Callable
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

from ..data.images import to_pil
from ..models.autoencoder_vtp import AutoencoderVTP
from ..models.latent_space import decode_to_images
from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LightningDiTPipeline(DiffusionPipeline):
    """Class-conditional image generation.

    Args:
        vae: `AutoencoderVTP` or another diffusers autoencoder; None when only latents are wanted.
        transformer: the velocity network.
        scheduler: a flow-matching scheduler. Upstream's time shift s is `FlowMatchEulerDiscreteScheduler(shift=1/s)`.
        guidance_transformer: optional weaker network for autoguidance (Karras et al., arXiv:2406.02507): its
            conditional prediction takes the place of the unconditional one.
        id2label: class index -> name; comma-separated names are synonyms.

    Raises: ValueError if the autoencoder or the guidance transformer works on other latents or classes than the
    transformer, or `id2label` names a class that the transformer does not have.
    """

    model_cpu_offload_seq = "guidance_transformer->transformer->vae"
    _optional_components = ["vae", "guidance_transformer"]
    _callback_tensor_inputs = ["latents"]
    # The text of the self-contained pipeline.py that this class was loaded from, which sets it; None in the package.
    exported_source: str | None = None

    def __init__(
        self,
        # `from_pipe` hands over components of the classes named here alone
        vae: AutoencoderVTP | AutoencoderKL | AutoencoderDC | AutoencoderRAE | None,
        transformer: LightningDiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        guidance_transformer: LightningDiTTransformer2DModel | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        _check_components(vae, transformer, guidance_transformer, id2label)
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
        self.labels = {}
        for index, names in (id2label or {}).items():
            for name in (names, *names.split(",")):
                self.labels.setdefault(name.strip(), int(index))

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write `model_index.json`, the last step of `save_pretrained`.

        A pipeline that was loaded from a self-contained folder is saved as one, since diffusers itself would name a
        module that only exists in its cache.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.exported_source is not None:
            write_self_contained(save_directory, self.exported_source)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1.0

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

    def get_label_ids(self, class_labels: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """Class indices of the given indices or names. Raises: ValueError naming a label that does not exist."""
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.flatten().tolist()
        if isinstance(class_labels, int | str | np.integer):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("class_labels is empty: give at least one class index or name")
        label_ids = []
        for label in class_labels:  # lists of lists are flattened, as diffusers' own class-conditional pipeline does
            label_ids += self.get_label_ids(label) if isinstance(label, list) else [self._label_id(label)]
        return label_ids

    def _label_id(self, label: int | str) -> int:
        num_classes = self.transformer.config.num_classes
        if isinstance(label, str):
            if label in self.labels:
                return self.labels[label]
            if not self.labels:
                raise ValueError(f"unknown label {label!r}: this pipeline has no id2label, give an index")
            close = difflib.get_close_matches(label, self.labels, n=5, cutoff=0.4)
            hint = f"; similar names: {', '.join(close)}" if close else ""
            raise ValueError(
                f"unknown label {label!r}: expected one of the {len(self.labels)} names in `labels`{hint}"
            )
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise ValueError(f"a class label must be an index or a name, got {label!r}")
        if not 0 <= label < num_classes:
            raise ValueError(f"class index {label} does not exist: expected 0 to {num_classes - 1}")
        return int(label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int = 50,
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
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: class indices and names, mixed freely.
            num_inference_steps: evaluations of the network with the Euler scheduler (N - 1 for upstream's N grid
                points).
            guidance_scale: w in weak + w·(v - weak) (Ho and Salimans, arXiv:2207.12598); 1.0 = no guidance.
            guidance_interval: guidance is applied where low <= t <= high, t = 0 being noise (Kynkäänniemi et al.,
                arXiv:2404.07724).
            guidance_channels: guide only the first so many latent channels; 3 is upstream's rule. None = all.
            num_images_per_label: images a label; those of one label follow each other.
            generator: one for all images, or a list with one an image.
            latents: initial noise (B, C, h, w), B = labels x images a label.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, C, h, w).
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; may return new
                "latents".
        Returns: `ImagePipelineOutput` with `.images`, or a tuple of them.
        Raises: ValueError on any argument that does not fit, before the first evaluation.
        """
        label_ids = self.get_label_ids(class_labels)
        self._check_inputs(
            num_inference_steps, guidance_scale, guidance_interval, guidance_channels, num_images_per_label,
            output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        self._guidance_scale = guidance_scale
        self._interrupt = False
        self._current_timestep = None
        device = self._execution_device
        labels = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_label)  # (B,)
        latents = self.prepare_latents(len(labels), generator, latents, device)

        timesteps = self._set_timesteps(num_inference_steps, device)
        sigmas = self.scheduler.sigmas.tolist()  # at once: asked for step by step, the device would be waited for
        with self.progress_bar(total=len(timesteps)) as progress:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                t = 1 - sigmas[step]
                # read at every step: a callback may change it
                scale = self.guidance_scale if guidance_interval[0] <= t <= guidance_interval[1] else 1.0
                velocity = self._velocity(latents, t, labels, scale, guidance_channels)
                # diffusers' flow models predict noise - data
                latents = self.scheduler.step(-velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs or ["latents"]}
                    latents = callback_on_step_end(self, step, timestep, tensors).pop("latents", latents)
                progress.update()

        self._current_timestep = None
        images = latents if output_type == "latent" else self._postprocess(self.decode_latents(latents), output_type)
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
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"expected latents {shape}, got {tuple(latents.shape)}")
            return latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"got {len(generator)} generators for {batch} images: give one, or one an image")
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the network sees them (B, C, h, w) -> images (B, 3, H, W) around [-1, 1], float32.

        An autoencoder that owns its latent statistics undoes them in `decode`; `scaling_factor` and `shift_factor` of
        the others are undone here.
        """
        return decode_to_images(self.vae, latents)

    def _check_inputs(self, steps, scale, interval, channels, images_per_label, output_type, tensor_inputs) -> None:
        """Raises: ValueError naming the first argument of a call that does not fit."""
        all_channels, known_inputs = self.transformer.config.in_channels, self._callback_tensor_inputs
        interval_fits = len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1
        for name, value, fits, expected in (
            ("num_inference_steps", steps, steps >= 1, "1 or more"),
            ("num_images_per_label", images_per_label, images_per_label >= 1, "1 or more"),
            ("guidance_scale", scale, not scale < 0, "0 or a positive number"),
            ("guidance_interval", interval, interval_fits, "(low, high) with 0 <= low <= high <= 1"),
            ("guidance_channels", channels, channels is None or 1 <= channels <= all_channels, f"1 to {all_channels}"),
            ("output_type", output_type, output_type in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}"),
            (
                "output_type",
                output_type,
                self.vae is not None or output_type == "latent",
                "latent: this pipeline has no vae",
            ),
            (
                "callback_on_step_end_tensor_inputs",
                tensor_inputs,
                set(tensor_inputs or ()) <= set(known_inputs),
                f"some of {known_inputs}",
            ),
        ):
            if not fits:
                raise ValueError(f"{name} is {value!r}, expected {expected}")

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> torch.Tensor:
        # Left to itself the scheduler builds the grid between already shifted ends and shifts it once more.
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
        t: float,
        labels: torch.Tensor,
        guidance_scale: float,
        guidance_channels: int | None,
    ) -> torch.Tensor:
        """data - noise at time t, guided when the scale is not 1. (B, C, h, w) in float32."""
        if guidance_scale == 1.0:
            return self._evaluate(self.transformer, "cond", latents, t, labels)
        if self.guidance_transformer is not None:
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
        self, transformer: torch.nn.Module, cache: str, latents: torch.Tensor, t: float, labels: torch.Tensor
    ) -> torch.Tensor:
        timestep = torch.full((len(latents),), t, dtype=torch.float32, device=latents.device)
        with transformer.cache_context(cache):  # diffusers' step caches keep one state a context
            dtype = transformer.patch_embed.weight.dtype  # asking for the model's walks over all modules
            return transformer(latents.to(dtype), timestep, labels, return_dict=False)[0].float()

    def _postprocess(self, images: torch.Tensor, output_type: str) -> Any:
        if output_type == "pil":
            return to_pil(images)
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _check_components(vae, transformer, guidance_transformer, id2label: dict[Any, str] | None) -> None:
    """Raises: ValueError if the components are made for other latents or classes."""
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
    expected = {str(index) for index in range(config.num_classes)}
    if wrong := [index for index in id2label or {} if str(index) not in expected]:
        raise ValueError(f"id2label has {wrong[:5]}, expected class indices from 0 to {config.num_classes - 1}")


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
