"""Remake the pipeline in weights/: tokenizer, stage 2 decoder, latents, generator with a base head, measurement.

    python experiments/shipped_pipeline/run.py --data runs/emoji --seconds 570
    python experiments/shipped_pipeline/run.py --smallest

A recipe's pipeline in bfloat16 is RECIPE/generator/pipeline in --output_dir. `three_styles_f8c8` made what is shipped.
Some recipes go on with the tokenizer of weights that were shipped before. Those of three styles train decoder and
generator on --data as well, which has to tell the style in the class (--style_in_class of
understanding_drives_generation/data.py).
Configurations are those of train_vtp/configs and train_dit/configs; what differs stands here. The same command again
goes on where the last one was stopped. results/ has what is found; so has the file of --bundle. `table.py` makes one
file of it, `side_by_side.py` a picture.
"""

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from vtp_diffusion.data.openmoji import METADATA_NAME, read_metadata
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.experiments import MachineConfig, Task, carry_out, check_names, options

WEIGHTS = "weights/openmoji-128"  # of a commit


@dataclass(frozen=True)
class Recipe:
    """What a pipeline is made with.

    Attributes: `tokenizer`: options of its training; `commit`: or the commit whose weights have it; `longer`: only the
    generator of these weights is trained, from where it was; `styles`: decoder and generator see all styles, and not
    OpenMoji alone; `decoder_steps`; `steps`: of the generator.
    """

    tokenizer: str = ""
    commit: str | None = None
    longer: bool = False
    styles: bool = False
    decoder_steps: int = 4_000
    steps: int = 14_000

    def weights(self, folder: Path) -> Path:
        """Where the weights of the commit must be."""
        return folder / self.commit / WEIGHTS


JOINT = "--objectives contrastive self_supervision reconstruction --reconstruction.weight 25"
# with the generator 14.4 to 14.7 M parameters, 28.8 to 29.4 MB in bfloat16
RECIPES = {
    "previous_tokenizer": Recipe(commit="be4752e"),
    "f8c16": Recipe("--objectives reconstruction --model.patch_size 8 --model.latent_channels 16"),
    "f8c16_joint": Recipe(f"{JOINT} --model.patch_size 8 --model.latent_channels 16"),
    "f16c64": Recipe("--objectives reconstruction --model.patch_size 16 --model.latent_channels 64"),
    "three_styles": Recipe(commit="5ef9321", styles=True, steps=28_000),
    "three_styles_longer": Recipe(commit="4b756fb", longer=True, styles=True, steps=20_000),
    "three_styles_f8c8": Recipe(
        f"{JOINT} --model.patch_size 8 --model.latent_channels 8", styles=True, decoder_steps=7_000, steps=42_000
    ),
}
TOKENIZER = """train_vtp/train.py --config openmoji --validation_steps 3000 --report_to none
    --model.encoder_hidden_size 192 --model.encoder_num_attention_heads 3 --model.encoder_num_layers 4
    --self_supervision.prototypes 1024"""
# without a discriminator: it won against the decoder of the first try
DECODER = """train_vtp/finetune_decoder.py --config finetune_decoder_openmoji --report_to none
    --adversarial.discriminator none --learning_rate 1e-3 --validation_steps 1000"""
GENERATOR = """train_dit/train.py --config openmoji --compile false --optimizer muon --learning_rate 2e-3
    --model.base_head_layer 3 --report_to none"""
ENCODING = "train_dit/extract_latents.py --copies 12 --augmentation.shift 4 --augmentation.scale 0.05"
PROBE = "eval/linear_probe.py --data.label_column category --steps 1000 --train_batch_size 256"
MEASURE = "experiments/frontier/measure.py"
STEPS = {"euler": 50, "unipc": 16}  # of sampling, by solver
EVALUATE = """eval/generation.py --num_images 500 --num_inference_steps 25 --labels reference --reference openmoji
    --floor_images openmoji --control untrained --guidance internal --guidance_scale 3.5 --guidance_interval 0 0.9"""
DRAW = "pipelines/generate.py --num_images_per_label 8 --guidance_scale 4 --dtype bfloat16"  # nothing selected
STYLES = ("", "-noto", "-fluent")  # endings of class names
CLASSES = """animal-mammal animal-bird face-smiling food-prepared transport-ground plant-flower country-flag
    clothing""".split()
IMAGES = "--data.source openmoji --data.resolution 128"
# what --smallest adds to a program's words
TINY = {
    "train_vtp/train.py": """--data.limit 300 --train_batch_size 8 --max_train_steps 2 --lr_warmup_steps 1
        --mixed_precision no --text.text_hidden_size 64 --text.text_num_layers 1 --self_supervision.prototypes 64
        --self_supervision.head_hidden_size 64 --self_supervision.crops.local_crops 1 --model.encoder_num_layers 1
        --model.decoder_hidden_size 64 --model.decoder_num_attention_heads 1 --reconstruction.lpips 0
        --reconstruction.lpips_trunk none --cuda_graphs false --evaluation_images 16 --validation_images 4""",
    "train_vtp/finetune_decoder.py": """--data.limit 300 --train_batch_size 2 --max_train_steps 2 --lr_warmup_steps 1
        --mixed_precision no --compile false --validation_steps 2 --evaluation_images 8 --reconstruction.lpips 0
        --reconstruction.lpips_trunk none""",
    "eval/reconstruction.py": "--data.limit 300 --feature_network efficientnet_lite0",
    "eval/linear_probe.py": "--data.limit 300 --steps 20",
    "train_dit/extract_latents.py": "--data.limit 300 --copies 1",
    "train_dit/train.py": """--train_batch_size 4 --max_train_steps 2 --lr_warmup_steps 1 --ema_decay .9
        --mixed_precision no --validation.labels 0 --validation.num_inference_steps 2""",
    MEASURE: "--limit 12 --batch_size 12",
    "eval/generation.py": "--data.limit 60 --num_images 12 --feature_network efficientnet_lite0",
    "pipelines/generate.py": "--num_images_per_label 1 --num_inference_steps 2",
}


@dataclass(kw_only=True)
class Config(MachineConfig):
    """Settings of this program."""

    recipes: list[str] = setting(default_factory=lambda: ["f8c16_joint"], help=f"of {', '.join(RECIPES)}")
    data: str | None = setting(
        None,
        "folder that understanding_drives_generation/data.py wrote, for the tokenizer, and for all of a recipe with "
        "styles; none: OpenMoji alone",
    )
    tokenizer_steps: int = setting(6000, "of 256 images", at_least=1)
    generator_steps: int | None = setting(None, "of 512 images; none: those of the recipe", at_least=1)
    output_dir: str = setting("runs/shipped", "folder for everything that is made")
    smallest: bool = setting(False, "a few steps of everything on a CPU: shows that the chain works, and no more")

    def __post_init__(self):
        super().__post_init__()
        check_names("recipes", self.recipes, RECIPES)
        if self.data is not None and not Path(self.data).is_dir():
            raise ValueError(f"data {self.data} is not there, expected a folder that data.py wrote")
        for name in self.recipes:
            recipe = RECIPES[name]
            if recipe.styles and not has_styles(self.data):
                raise ValueError(f"data is {self.data}, expected what data.py --style_in_class wrote, for {name}")
            if recipe.commit and not (recipe.weights(self.folder) / "vae").is_dir():
                place = self.folder / recipe.commit
                raise ValueError(
                    f"{place} lacks {WEIGHTS}, which the recipe {name} goes on with: "
                    f"mkdir -p {place}; git archive {recipe.commit} {WEIGHTS} | tar -x -C {place}"
                )

    @property
    def folder(self) -> Path:
        """The folder of all that is made."""
        return Path(self.output_dir + "-smallest" * self.smallest)


def has_styles(data: str | None) -> bool:
    """Whether the classes of these images tell the style."""
    files = [] if data is None else Path(data).glob(f"*/{METADATA_NAME}")
    return any(row["subcategory"].endswith("-noto") for file in files for row in read_metadata(file.parent))


def finished(vae: Path) -> Path:
    """The file that is there once an autoencoder is whole: results.json, which training writes after it, or for one of
    a commit its configuration."""
    return vae / "config.json" if vae.parent.name == Path(WEIGHTS).name else vae.with_name("results.json")


def tasks(config: Config, folder: Path, name: str) -> list[Task]:
    """The steps of a recipe."""
    recipe = RECIPES[name]
    results, tokenizer, decoder = folder / "results", folder / name / "tokenizer", folder / name / "decoder"
    latents, generator = folder / name / "latents", folder / name / "generator"
    trained = recipe.weights(folder) / "vae" if recipe.commit else tokenizer / "vae"
    vae = trained if recipe.longer else decoder / "vae"
    styles = ["--data.cache_dir", config.data] if recipe.styles else []

    def words(text: str, **values) -> list[str]:
        program, *others = text.split()
        return [program, *others, *options(values), *(TINY[program].split() if config.smallest else [])]

    training = words(f"{TOKENIZER} {recipe.tokenizer}", output_dir=tokenizer, max_train_steps=config.tokenizer_steps)
    training += ["--data.cache_dir", config.data] if config.data else []
    finetuning = words(DECODER, vae=trained, output_dir=decoder, max_train_steps=recipe.decoder_steps) + styles
    kinds = ("reconstruction", "probe", "euler", "unipc", "generation")
    measured = {kind: results / f"{kind}-{name}.json" for kind in kinds}
    encoder = (
        words(f"eval/reconstruction.py {IMAGES}", vae=vae, output=measured["reconstruction"]),
        words(f"{PROBE} {IMAGES}", model=vae, output=measured["probe"], features=folder / name / "features"),
        words(f"{ENCODING} {IMAGES}", vae=vae, output_dir=latents) + styles,
    )
    count = config.generator_steps or recipe.steps
    generating = words(GENERATOR, vae=vae, latents=latents, output_dir=generator, max_train_steps=count)
    generating += ["--initial_transformer", f"{recipe.weights(folder)}/transformer"] if recipe.longer else []
    pipeline = generator / "pipeline"
    sampled = {"reference": folder / "reference.safetensors", "pipeline": pipeline, "log": generator / "log.jsonl"}
    steps = dict.fromkeys(STEPS, 2) if config.smallest else STEPS
    pairs = results / f"near_duplicates-{name}.png"
    measuring = (
        *(
            words(f"{MEASURE} --solver {solver}", **sampled, num_inference_steps=number, output=measured[solver])
            for solver, number in steps.items()
        ),
        *(
            words(DRAW, pipeline=pipeline, output=folder / name / f"drawn{style}")
            + ["--labels", *(label + style for label in CLASSES)]
            for style in STYLES[: 3 if recipe.styles else 1]
        ),
        words(EVALUATE, images=pipeline, nearest_neighbours=pairs, output=measured["generation"]),
    )
    index, alone = pipeline / "model_index.json", {"saves": False}
    return [
        Task(f"tokenizer-{name}", finished(trained), (training,)),
        Task(f"decoder-{name}", finished(vae), (finetuning,)),
        Task(f"latents-{name}", latents / "latents.json", encoder, one_process=True, **alone),
        Task(f"generator-{name}", index, (generating,)),
        Task(f"measured-{name}", measured["generation"], measuring, seconds=180.0, one_process=True, **alone),
    ]


def in_order(steps: list[Task]) -> list[Task]:
    """The same tasks, each needing the one before."""
    return steps[:1] + [replace(task, needs=(before.name,)) for before, task in pairwise(steps)]


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    folder = config.folder
    deadline, results = time.monotonic() + config.seconds, folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    every = [in_order(tasks(config, folder, name)) for name in config.recipes]
    # the same step of all recipes, then the next
    carry_out(config, [task for step in zip(*every, strict=True) for task in step], results, folder, deadline)


if __name__ == "__main__":
    run(main)
