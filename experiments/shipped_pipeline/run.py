"""Remake the pipeline in weights/: tokenizer, stage 2 decoder, latents, generator with a base head, measurement.

    python experiments/shipped_pipeline/run.py --recipes f8c16 f16c64 --data runs/emoji --gpus 0 1 --seconds 570
    python experiments/shipped_pipeline/run.py --smallest

Each recipe becomes a pipeline in bfloat16, RECIPE/generator/pipeline in --output_dir. Configurations are those of
train_vtp/configs and train_dit/configs; what differs stands here. The same command again goes on where the last one
was stopped. results/ has what is found, and with --bundle one file.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.experiments import MachineConfig, Task, carry_out

MEASURE = "experiments/frontier/measure.py"
# 14.5 M parameters with the generator, 29 MB in bfloat16
SMALL = ["--model.encoder_hidden_size", "192", "--model.encoder_num_attention_heads", "3"]
SMALL += ["--model.encoder_num_layers", "4"]
# name -> options of the tokenizer
RECIPES = {
    "f8c16": ["--model.patch_size", "8", "--model.latent_channels", "16"],
    "f16c64": ["--model.patch_size", "16", "--model.latent_channels", "64"],
}
TINY_TOKENIZER = [
    *["--data.limit", "300", "--train_batch_size", "8", "--max_train_steps", "2", "--lr_warmup_steps", "1"],
    *["--mixed_precision", "no", "--text.text_hidden_size", "64", "--text.text_num_layers", "1"],
    *["--self_supervision.prototypes", "64", "--self_supervision.head_hidden_size", "64"],
    *["--self_supervision.crops.local_crops", "1", "--model.encoder_num_layers", "1", "--evaluation_images", "16"],
    *["--reconstruction.lpips", "0", "--reconstruction.lpips_trunk", "none", "--cuda_graphs", "false"],
    *["--model.decoder_hidden_size", "64", "--model.decoder_num_attention_heads", "1", "--validation_images", "4"],
]
TINY_DECODER = ["--data.limit", "300", "--train_batch_size", "2", "--max_train_steps", "2", "--lr_warmup_steps", "1"]
TINY_DECODER += [
    "--mixed_precision",
    "no",
    "--compile",
    "false",
    "--validation_steps",
    "2",
    "--evaluation_images",
    "8",
]
TINY_DECODER += [
    "--reconstruction.lpips",
    "0",
    "--reconstruction.lpips_trunk",
    "none",
    "--adversarial.start_step",
    "1",
]
TINY_GENERATOR = ["--train_batch_size", "4", "--max_train_steps", "2", "--lr_warmup_steps", "1", "--ema_decay", ".9"]
TINY_GENERATOR += ["--mixed_precision", "no", "--validation.labels", "0", "--validation.num_inference_steps", "2"]


@dataclass(kw_only=True)
class Config(MachineConfig):
    """Settings of this program."""

    recipes: list[str] = setting(default_factory=lambda: ["f8c16"], help=f"of {', '.join(RECIPES)}")
    objectives: list[str] = setting(
        default_factory=lambda: ["contrastive", "self_supervision", "reconstruction"], help="of the tokenizer"
    )
    data: str | None = setting(
        None, "folder that understanding_drives_generation/data.py wrote, for the tokenizer; none: OpenMoji alone"
    )
    tokenizer_steps: int = setting(6000, "of 256 images", at_least=1)
    generator_steps: int = setting(18_000, "of 512 images", at_least=1)
    output_dir: str = setting("runs/shipped", "folder for everything that is made")
    smallest: bool = setting(False, "a few steps of everything on a CPU: shows that the chain works, and no more")

    def __post_init__(self):
        super().__post_init__()
        if unknown := [name for name in self.recipes if name not in RECIPES]:
            raise ValueError(f"recipes are {', '.join(unknown)}, expected of {', '.join(RECIPES)}")
        if self.data is not None and not Path(self.data).is_dir():
            raise ValueError(f"data {self.data} is not there, expected a folder that data.py wrote")


def tasks(config: Config, folder: Path, name: str) -> list[Task]:
    """The steps of a recipe."""
    made, results = folder / name, folder / "results"
    tiny = (
        {"tokenizer": TINY_TOKENIZER, "decoder": TINY_DECODER, "generator": TINY_GENERATOR} if config.smallest else {}
    )
    vae, latents, pipeline = made / "decoder" / "vae", made / "latents", made / "generator" / "pipeline"
    limit = ["--data.limit", "300"] if config.smallest else []
    tokenizer = ["train_vtp/train.py", "--config", "openmoji", *SMALL, *RECIPES[name], "--compile", "false"]
    tokenizer += ["--objectives", *config.objectives, "--max_train_steps", str(config.tokenizer_steps)]
    tokenizer += ["--self_supervision.prototypes", "1024", "--validation_steps", "2000", "--report_to", "none"]
    tokenizer += ["--data.cache_dir", config.data] if config.data else []
    decoder = ["train_vtp/finetune_decoder.py", "--config", "finetune_decoder_openmoji", "--report_to", "none"]
    decoder += ["--vae", str(made / "tokenizer" / "vae")]
    given = ["--data.source", "openmoji", "--data.resolution", "128", *limit]
    measured = [str(results / f"{kind}-{name}.json") for kind in ("reconstruction", "probe")]
    networks = ["efficientnet_lite0"] if config.smallest else ["vgg16", "efficientnet_lite0"]
    reconstruction = ["eval/reconstruction.py", "--vae", str(vae), *given, "--output", measured[0]]
    reconstruction += ["--feature_network", *networks]
    probe = [
        "eval/linear_probe.py",
        "--model",
        str(vae),
        *given,
        "--data.label_column",
        "category",
        "--output",
        measured[1],
    ]
    probe += ["--steps", "20" if config.smallest else "1000", "--train_batch_size", "256"]
    probe += ["--features", str(made / "features")]
    extraction = ["train_dit/extract_latents.py", "--vae", str(vae), "--output_dir", str(latents), *given]
    extraction += [
        "--copies",
        "1" if config.smallest else "12",
        "--augmentation.shift",
        "4",
        "--augmentation.scale",
        "0.05",
    ]
    generator = ["train_dit/train.py", "--config", "openmoji", "--vae", str(vae), "--latents", str(latents)]
    generator += ["--max_train_steps", str(config.generator_steps), "--optimizer", "muon", "--compile", "false"]
    generator += ["--model.base_head_layer", "3", "--report_to", "none"]
    measure = [MEASURE, "--reference", str(folder / "reference.safetensors"), "--pipeline", str(pipeline)]
    measure += ["--log", str(made / "generator" / "log.jsonl"), "--output", str(results / f"generator-{name}.json")]
    measure += ["--limit", "12", "--num_inference_steps", "2", "--batch_size", "12"] if config.smallest else []
    found = results / f"generator-{name}.json"
    for kind, words in (("tokenizer", tokenizer), ("decoder", decoder), ("generator", generator)):
        words += ["--output_dir", str(made / kind), *tiny.get(kind, [])]
    return [
        Task(f"tokenizer-{name}", made / "tokenizer" / "vae" / "config.json", (tokenizer,)),
        Task(f"decoder-{name}", vae / "config.json", (decoder,), (f"tokenizer-{name}",)),
        Task(
            f"latents-{name}",
            latents / "latents.json",
            (reconstruction, probe, extraction),
            (f"decoder-{name}",),
            saves=False,
            one_process=True,
        ),
        Task(f"generator-{name}", pipeline / "model_index.json", (generator,), (f"latents-{name}",)),
        Task(f"measured-{name}", found, (measure,), (f"generator-{name}",), saves=False, seconds=100.0),
    ]


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    folder = Path(config.output_dir + "-smallest" * config.smallest)
    deadline, results = time.monotonic() + config.seconds, folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    every = [tasks(config, folder, name) for name in config.recipes]
    # the same step of all recipes, then the next
    carry_out(config, [task for step in zip(*every, strict=True) for task in step], results, folder, deadline)


if __name__ == "__main__":
    run(main)
