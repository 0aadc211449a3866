"""The model card (README.md) of a trained pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from ..runtime.disk import replacing_saved
from .sampling import to_bfloat16

if TYPE_CHECKING:
    from ..training.loop import TrainingRun
    from .pipeline_lightning_dit import LightningDiTPipeline

# diffusers' load_or_create_model_card wants a Hub repository and a network, and its template leaves gaps.
TEMPLATE = """\
---
{{ card_data }}
---

# LightningDiT on {{ "VTP" if vtp else autoencoder }} latents

Class labels to images: a LightningDiT ({{ parameters }} parameters) on the latents of the autoencoder in `vae/`.
{{ names | length }} classes: {{ names[:10] | join(", ") }}{{ ", ..." if names | length > 10 }}.

## Use

```python
import vtp_diffusion  # registers the classes with diffusers
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
settings = {{ settings }}
images = pipeline(class_labels=[0], **settings).images
```

## Training

{% if student -%}
- A few-step student, made by `train_dit/distill.py` of vtp-diffusion from {{ teacher.pipeline }}: it samples in
  {{ student.steps | join(", ") }} steps, and has {{ student.baked }} baked in. {{ trajectory_steps }} steps on
  trajectories of {{ teacher.num_inference_steps }} steps ({{ teacher.solver }}), the rest on mean velocities
  (MeanFlow, arXiv:2505.13447).
- {{ data }}; {{ max_train_steps }} steps of {{ batch }}, {{ speed }}.
- AdamW, learning rate {{ learning_rate }} ({{ lr_scheduler }}); EMA weights with decay {{ ema_decay }}.
{%- else -%}
- `train_dit/train.py` of vtp-diffusion; the method is LightningDiT's (arXiv:2501.01423),
{%- if vtp %} the tokenizer after VTP
  (arXiv:2512.13687).
{%- else %} the latents are of
  {{ autoencoder }}.
{%- endif %}
- {{ model.num_layers }} layers, {{ model.num_attention_heads }} heads of {{
  model.attention_head_dim }}, patch {{ model.patch_size }}.
- {{ data }}; {{ max_train_steps }} steps of {{ batch }} latents,
  {{ speed }}.
- {{ "Muon for the matrices inside blocks, AdamW for the rest" if optimizer == "muon" else "AdamW" }},
  learning rate {{ learning_rate }} ({{ lr_scheduler }}); EMA weights with decay {{ ema_decay }}.
- Times: {{ times }}, shift {{ time_shift }}; class dropout {{ class_dropout_prob }}.
- Sampling with time shift {{ shift }}; guidance:
{%- if validation.guidance == "internal" %} by the base head after block {{ model.base_head_layer }} (internal
  guidance, arXiv:2605.18324).
{%- else %} {{ guide.text }}.
{%- endif %}
{%- endif %}
{%- if reference %}
- Distances during training are to {{ reference }}.
{%- endif %}

## Limits

It draws the classes it was trained on, at the resolution it was trained at, and may repeat training images.
{% if attribution %}
## Training images

{{ attribution }}
{% endif %}"""


def write_model_card(
    file: Path,
    config: Any,
    autoencoder: str,
    license: str | None = None,
    attribution: str | None = None,
    **values: Any,
) -> None:
    """Write what a pipeline is, how it is used, how it was trained and what it can draw.

    Args:
        file: README.md in the pipeline's folder.
        config: the run's configuration; its settings are fields of `TEMPLATE`.
        autoencoder: class of the pipeline's autoencoder.
        license, attribution: of the training images, if known.
        values: the other fields, and settings that the card words differently.
    Raises: jinja2.UndefinedError if a field is missing.
    """
    validation, vtp = config.validation, autoencoder == "AutoencoderVTP"
    data = ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation", license=license)
    fields = {"student": None, "reference": None, "autoencoder": autoencoder, "vtp": vtp, "attribution": attribution}
    fields |= vars(config) | values
    guidance = {"guidance_scale": validation.guidance_scale} | validation.changed_guidance
    settings = ({} if fields["student"] else guidance) | {"num_inference_steps": validation.num_inference_steps}
    fields["settings"] = json.dumps(settings)
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    card = ModelCard(template.render(card_data=data.to_yaml(), **fields), ignore_metadata_errors=False)
    populate_model_card(card, tags=["class-to-image", "lightning-dit"] + ["vtp"] * vtp).save(file)


def save_with_card(config: Any, run: TrainingRun, pipeline: LightningDiTPipeline, dataset: Any, **values: Any) -> Path:
    """Write the pipeline of a finished run into its pipeline/, with a model card, and print where it is.

    Args: `dataset`: what it was trained on; `values`: the fields of the card that the program knows.
    Returns: the folder. Raises: as `write_model_card`; OSError if it cannot be saved, saying that nothing is lost.
    """
    folder, known = run.folder.path / "pipeline", dataset.metadata or {}
    if config.save_dtype == "bfloat16":
        to_bfloat16(pipeline)
    again = "The run has finished, its last checkpoint is saved: the same command tries again"
    with replacing_saved(folder, again) as unfinished:
        pipeline.save_pretrained(unfinished)
        write_model_card(
            unfinished / "README.md",
            config,
            autoencoder=type(pipeline.vae).__name__,
            license=known.get("license"),
            attribution=known.get("attribution"),
            names=list((pipeline.config.id2label or dataset.id2label).values()),
            parameters=f"{sum(p.numel() for p in run.optimisation.parameters) / 1e6:.1f} M",
            batch=run.config.train_batch_size,
            speed=f"{run.log.seconds:.0f} s ({run.log.median_rate():.0f} a second){run.skipped_note}",
            **values,
        )
    print(f"the pipeline is in {folder}{run.skipped_note}")
    return folder
