"""Does understanding drive generation? Tokenizers that differ in their objectives, and the same generator on each.

    python experiments/understanding_drives_generation/run.py --data runs/emoji.tar --gpus 0 1 --together 2
    python experiments/understanding_drives_generation/run.py \\
        --config experiments/understanding_drives_generation/fashion.yaml
    python experiments/understanding_drives_generation/run.py --smallest

The first trains every tokenizer, measures it on held-out concepts, trains a generator on its latents and measures
that at several steps. Done tasks are not repeated, and an interrupted run goes on: the same command again continues
the experiment. It ends after --seconds; before that, training that still runs is sent SIGTERM and saves a checkpoint.
--last is for a machine whose disk is deleted afterwards: only tasks are started that can be trained and measured in
the time left. Results are written as they come to results/ in --output_dir; --bundle keeps them in one file as well.
`data.py` makes the images; without --data they are OpenMoji alone. `table.py` reads the results.

The second is the same on Fashion-MNIST, whose images `fashion.py` writes, in sizes for two CPU cores.

--smallest is the smallest part on a CPU in minutes: two tokenizers at 32 pixels and a few steps. It shows that the
chain works, and nothing about the question.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preparation import PARQUET, is_fashion, open_data, write_fewer, write_random_network

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.experiments import MachineConfig, Task, carry_out, check_names, keep_settings, options

HERE = Path(__file__).resolve().parent
MEASURE = "experiments/understanding_drives_generation/measure.py"
ALL = ("contrastive", "self_supervision", "reconstruction")
# name -> objectives, how many times the steps
TOKENIZERS: dict[str, tuple[tuple[str, ...], int]] = {
    "reconstruction": (("reconstruction",), 1),
    "all": (ALL, 1),
    "reconstruction_long": (("reconstruction",), 4),
    "contrastive": (("contrastive", "reconstruction"), 1),
    "self_supervision": (("self_supervision", "reconstruction"), 1),
    "reconstruction_small": (("reconstruction",), 1),
    "all_small": (ALL, 1),
    "reconstruction_half": (("reconstruction",), 1),
    "all_half": (ALL, 1),
    "reconstruction_tenth": (("reconstruction",), 1),
    "all_tenth": (ALL, 1),
    "all_long": (ALL, 4),
    "all_pixels": (ALL, 1),
    "all_understanding": (ALL, 1),
}
WEIGHTS = {"_pixels": 25.0, "_understanding": 0.1}  # ending of a name -> weight of reconstruction, elsewhere 1
SMALL = "_small"  # names that end so have half the encoder's width: settings of the tokenizers -> width
SMALL_WIDTH = {"tokenizer.yaml": 192, "fashion_tokenizer.yaml": 48}
HEADLINE = ("reconstruction", "all", "reconstruction_long")
# Groups run in this order: if time runs out, the last ones are missing.
GROUPS = (
    (*HEADLINE, "all_long", "all_pixels", "all_understanding"),
    ("contrastive", "self_supervision"),
    ("reconstruction_small", "all_small"),
    ("reconstruction_half", "all_half", "reconstruction_tenth", "all_tenth"),
)
# Seconds on an H200 with one task a GPU. A step of a tokenizer by the number of its objectives: measured for one and
# three without compilation, the others are guesses, as are the seconds of compiling and of a second stage. What
# starting, measuring and encoding take was measured.
STEP, COMPILED_STEP, COMPILING = (0.056, 0.078, 0.1), (0.025, 0.045, 0.061), (40.0, 100.0, 150.0)
TOKENIZER, SECOND_STAGE, GENERATOR_STEP, GENERATOR, POINT = 75.0, 110.0, 0.011, 30.0, 10.0
DECODER = "_decoder"  # ending of what is measured with a decoder that was trained further
# Tokenizers whose names end so see a share of the training data: of the concepts, of Fashion-MNIST of the images. What
# is held out stays the same.
FEWER = {"_half": 0.5, "_tenth": 0.1}
TINY_TOKENIZER = {
    "train_batch_size": 32, "lr_warmup_steps": 5, "mixed_precision": "no", "ema_decay": 0.9,
    "compile_stacks": "false", "cuda_graphs": "false", "checkpointing_steps": 1000, "log_steps": 20,
    "model.patch_size": 8, "model.latent_channels": 16, "model.encoder_hidden_size": 64,
    "model.encoder_num_layers": 2, "model.encoder_num_attention_heads": 2, "model.decoder_hidden_size": 64,
    "model.decoder_num_layers": 2, "model.decoder_num_attention_heads": 2, "reconstruction.lpips": 0,
    "reconstruction.lpips_trunk": "none",
    "text.text_hidden_size": 32, "text.text_num_layers": 1, "text.text_num_attention_heads": 2,
    "text.projection_dim": 32, "self_supervision.head_hidden_size": 64, "self_supervision.head_bottleneck": 32,
    "self_supervision.prototypes": 128, "self_supervision.crops.local_crops": 4,
    "self_supervision.crops.local_size": 16, "augmentation.shift": 2,
}  # fmt: skip
TINY_GENERATOR = {
    "train_batch_size": 32, "lr_warmup_steps": 5, "mixed_precision": "no", "ema_decay": 0.9, "log_steps": 20,
    "model.num_layers": 2, "model.num_attention_heads": 2, "model.attention_head_dim": 32,
}  # fmt: skip


@dataclass(kw_only=True)
class Config(MachineConfig):
    """Settings of this program; --smallest replaces those in `SMALLEST`."""

    tokenizers: list[str] = setting(
        default_factory=lambda: [*GROUPS[0], *GROUPS[1]], help=f"of {', '.join(TOKENIZERS)}"
    )
    seeds: list[int] = setting(
        default_factory=lambda: [0, 1, 2],
        help="of the generators on the tokenizers named by --several; others take the smallest alone",
        at_least=0,
    )
    several: list[str] = setting(
        default_factory=lambda: list(HEADLINE), help="tokenizers whose generators have all seeds"
    )
    tokenizer_steps: int = setting(
        2000, "steps of a tokenizer; reconstruction_long takes four times as many", at_least=1
    )
    generator_steps: list[int] = setting(
        default_factory=lambda: [1000, 3000],
        help="at which the first seed is measured, in their order; others at the last",
        at_least=1,
        ordered=True,
    )
    data: str | None = setting(
        None, "folder or FILE.tar that data.py wrote, or folder of fashion.py; none: OpenMoji alone, rendered"
    )
    tokenizer: Literal["tokenizer.yaml", "fashion_tokenizer.yaml"] = setting(
        "tokenizer.yaml", "settings of the tokenizers, a file beside this one"
    )
    generator: Literal["generator.yaml", "fashion_generator.yaml"] = setting(
        "generator.yaml", "settings of the generator, likewise"
    )
    optimizer: Literal["adamw", "muon"] | None = setting(None, "of the generator; none: that of its settings")
    learning_rate: float | None = setting(None, "likewise", above=0)
    decoder: Literal["decoder.yaml", "fashion_decoder.yaml"] | None = setting(
        "decoder.yaml",
        "settings of a second stage, which trains the pixel decoders alone, likewise; none: no such stage",
    )
    resolution: int = setting(128, "side of the images in pixels", at_least=1)
    limit: int | None = setting(None, "use only so many images", at_least=100)
    copies: int = setting(12, "of every image among the latents, shifted and scaled", at_least=1)
    num_images: int = setting(2000, "images sampled for a measurement", at_least=10)
    num_reference: int | None = setting(None, "so many real images are the reference; none: all", at_least=4)
    num_reconstructions: int | None = setting(None, "so many held-out images are reconstructed; none: all", at_least=3)
    batch_size: int = setting(250, "images sampled at once", at_least=1)
    num_inference_steps: int = setting(25, "UniPC steps; there is no guidance", at_least=1)
    probe_steps: int = setting(2000, "steps of the linear probe", at_least=1)
    networks: list[str] = setting(
        default_factory=lambda: ["vgg16", "efficientnet_lite0"], help="of the distances, beside one of random weights"
    )
    feature_batch_size: int | None = setting(
        None, "images that such a network sees at once; none: as measure.py does", at_least=1
    )
    output_dir: str = setting("runs/understanding", "folder for everything that is made")
    least_seconds: float = setting(45.0, "nothing is started that has less than this left", at_least=0)
    smallest: bool = setting(False, "the smallest part, for a CPU")

    def __post_init__(self):
        if self.smallest:
            vars(self).update(SMALLEST)
        super().__post_init__()
        if self.data is not None and not Path(self.data).exists():
            raise ValueError(f"data {self.data} is not there, expected what data.py or fashion.py wrote")
        settings = self.tokenizer, self.generator, self.decoder or "fashion"
        if self.fashion and not all(name.startswith("fashion") for name in settings):
            raise ValueError(f"data {self.data} is Fashion-MNIST, expected its settings: --config {HERE}/fashion.yaml")
        for option in ("tokenizers", "several"):
            check_names(option, getattr(self, option), TOKENIZERS)

    @property
    def fashion(self) -> bool:
        """Whether the images are Fashion-MNIST."""
        return self.data is not None and is_fashion(Path(self.data))

    @property
    def folder(self) -> Path:
        """Everything that is made: the smallest part must not lie among the rest."""
        return Path(self.output_dir + "-smallest" * self.smallest)


SMALLEST = {
    "tokenizers": ["reconstruction", "all"], "seeds": [0], "tokenizer_steps": 60, "generator_steps": [40, 80],
    "resolution": 32,
    "limit": 600, "copies": 2, "num_images": 100, "batch_size": 50, "num_inference_steps": 8, "probe_steps": 50,
    "data": None, "networks": ["efficientnet_lite0"], "tokenizer": "tokenizer.yaml", "generator": "generator.yaml",
    "decoder": None,
}  # fmt: skip


def fewer_folder(folder: Path, ending: str) -> Path:
    """Where `write_fewer` puts the images of tokenizers whose names end so."""
    return folder / ending.removeprefix("_")


class Plan:
    """The tasks of an experiment.

    Attributes: `folder`: for what is made; `results`: for what is found; `images`: cache folder of the images, None
    where programs render OpenMoji.
    """

    def __init__(self, config: Config, images: Path | None):
        self.config, self.folder, self.images = config, config.folder, images
        self.results, self.seeds = self.folder / "results", sorted(config.seeds)

    @property
    def source(self) -> str:
        return "parquet" if self.config.fashion else "openmoji"

    def data(self, images: Path | None = None) -> list[str]:
        """The options that name the images, or those in a folder `images`."""
        return options({"data.source": self.source, "data.resolution": self.config.resolution}) + self.files(images)

    def files(self, images: Path | None = None, limit: int | None = None) -> list[str]:
        """Where the images are, and how many of them are used."""
        values = {"data.limit": limit or self.config.limit or "none"}
        images = images or self.images
        if self.config.fashion:
            train, held_out = (images / name for name in PARQUET)
            values |= {"data.data_files": train, "data.validation_files": held_out}
            values |= {"data.label_column": "label", "data.caption_column": "caption"}
        elif images:
            values |= {"data.cache_dir": images}
        return options(values)

    def reference(self) -> list[str]:
        """Real images that samples are compared with, in the samples' size: of emoji, which are few, the training
        images, of Fashion-MNIST held-out ones."""
        words = ["--reference", self.source, *self.files(limit=self.config.num_reference)]
        return words + ["--split", "validation"] * self.config.fashion

    @property
    def shared(self) -> float:
        """Tasks on a GPU at a time: each takes so many times longer."""
        return len(self.config.gpus) * self.config.together / len(set(self.config.gpus))

    def vae(self, name: str, stage: str = "tokenizer") -> str:
        return str(self.folder / f"{stage}-{name}" / "vae")

    def compiles(self, name: str) -> bool:
        """Whether its training is compiled: with one objective or several times the steps that pays on a GPU."""
        (objectives, times), config = TOKENIZERS[name], self.config
        return not (config.fashion or config.smallest) and (len(objectives) == 1 or times > 1)

    def training_seconds(self, name: str) -> float:
        """Estimated seconds that a GPU trains it for."""
        objectives, times = TOKENIZERS[name]
        steps, k = times * self.config.tokenizer_steps, len(objectives) - 1
        return COMPILING[k] + COMPILED_STEP[k] * steps if self.compiles(name) else STEP[k] * steps

    def tokenizer(self, name: str) -> Task:
        """Train it, measure it and encode the images for its generators, in one process."""
        config, latents = self.config, self.folder / f"latents-{name}"
        encoding = [
            "train_dit/extract_latents.py",
            "--vae",
            self.vae(name),
            *self.data(),
            "--output_dir",
            str(latents),
        ]
        encoding += options({"copies": config.copies, "augmentation.shift": 4, "augmentation.scale": 0.05})
        folder, place = self.folder / f"tokenizer-{name}", self.results / f"tokenizer-{name}.json"
        return Task(
            place.stem,
            latents / "latents.json",
            (self.training(name), *self.measurements(name), encoding),
            copies=((folder / "log.jsonl", place.with_suffix(".jsonl")), (folder / "results.json", place)),
            seconds=self.shared * (self.training_seconds(name) + TOKENIZER),
            one_process=True,
        )

    def training(self, name: str) -> list[str]:
        (objectives, times), config = TOKENIZERS[name], self.config
        words = ["train_vtp/train.py", "--config", str(HERE / config.tokenizer)]
        if name.endswith(SMALL):
            width = SMALL_WIDTH[config.tokenizer]
            words += options({"model.encoder_hidden_size": width, "model.encoder_num_attention_heads": 3})
        weights = [weight for ending, weight in WEIGHTS.items() if name.endswith(ending)]
        words += options({"reconstruction.weight": weights[0]}) if weights else []
        fewer = [ending for ending in FEWER if name.endswith(ending)]
        words += self.data(fewer_folder(self.folder, fewer[0]) if fewer else None)
        words += ["--objectives", *objectives, "--max_train_steps", str(times * config.tokenizer_steps)]
        words += ["--output_dir", str(self.folder / f"tokenizer-{name}")]
        words += ["--compile", "true"] if self.compiles(name) else []
        return words + (options(TINY_TOKENIZER | {"validation_steps": config.tokenizer_steps}) * config.smallest)

    def measurements(self, name: str) -> list[list[str]]:
        """Reconstruction, with LPIPS on the network that was not trained on, and the linear probe."""
        result, probe = (self.results / f"{kind}-{name}.json" for kind in ("reconstruction", "probe"))
        words = self.reconstruction(self.vae(name), result)
        probing = ["eval/linear_probe.py", "--model", self.vae(name), *self.data()]
        probing += [] if self.config.fashion else ["--data.label_column", "category"]
        probing += ["--steps", str(self.config.probe_steps), "--output", str(probe)]
        probing += ["--features", str(self.folder / f"features-{name}"), "--train_batch_size", "256"]
        return [words, probing]

    def reconstruction(self, vae: str, result: Path) -> list[str]:
        words = ["eval/reconstruction.py", "--vae", vae, *self.data(), "--output", str(result)]
        words += ["--feature_network", *self.config.networks, "--worst_cases", str(result.with_suffix(".png"))]
        count = self.config.num_reconstructions
        return words + (["--num_images", str(count)] if count else [])

    def second_stage(self, name: str) -> Task:
        """Train a tokenizer's decoder further and measure its reconstructions, in one process. The result file is kept
        beside the decoder: a task counts as done only where the decoder exists, too."""
        folder, place = self.folder / f"decoder-{name}", self.results / f"reconstruction-{name}{DECODER}.json"
        result = folder / place.name
        words = ["train_vtp/finetune_decoder.py", "--config", str(HERE / self.config.decoder)]
        words += ["--vae", self.vae(name), *self.data(), "--output_dir", str(folder)]
        programs = words, self.reconstruction(self.vae(name, "decoder"), result)
        there = Path(self.vae(name)).with_name("results.json").is_file()  # written after the autoencoder
        return Task(
            folder.name,
            result,
            programs,
            needs=() if there else (f"tokenizer-{name}",),
            copies=((result, place), (result.with_suffix(".png"), place.with_suffix(".png"))),
            seconds=self.shared * SECOND_STAGE,
            one_process=True,
        )

    def redecoded(self, name: str, seed: int) -> Task:
        """Measure a generator with that decoder, whose latents are the same, at the same steps."""
        result, steps = self.results / f"generator-{name}{DECODER}-{seed}.json", self.measured_steps(seed)
        words = self.measurement(name, seed, result, steps) + ["--vae", self.vae(name, "decoder")]
        words += ["--picture", str(result.with_suffix(".png"))] if seed == self.seeds[0] else []
        needs = f"decoder-{name}", f"generator-{name}-{seed}"
        done = result.with_name(f"{result.stem}-{steps[-1]}.json")
        seconds = self.shared * (GENERATOR + len(steps) * POINT)
        return Task(result.stem, done, (words,), needs, saves=False, seconds=seconds)

    def measured_steps(self, seed: int) -> list[int]:
        """All of `generator_steps` for the first seed, the last one for others."""
        return self.config.generator_steps[0 if seed == self.seeds[0] else -1 :]

    def measurement(self, name: str, seed: int, result: Path, steps: list[int]) -> list[str]:
        config, run = self.config, self.folder / f"generator-{name}-{seed}"
        words = [MEASURE, "--run", str(run), "--steps", *map(str, steps), *self.reference(), "--solver", "unipc"]
        words += ["--feature_network", *config.networks, f"vtp:{self.folder / 'random'}"]
        words += options({"num_images": config.num_images, "num_inference_steps": config.num_inference_steps})
        words += options({"batch_size": config.batch_size, "output": result.with_suffix("")})
        return words + (
            options({"feature_batch_size": config.feature_batch_size}) if config.feature_batch_size else []
        )

    def generator(self, name: str, seed: int) -> Task:
        """Train to the last step and measure there, in one process; the first seed also at the steps before."""
        config, steps, first = self.config, self.config.generator_steps, seed == self.seeds[0]
        folder, result = self.folder / f"generator-{name}-{seed}", self.results / f"generator-{name}-{seed}.json"
        training = ["train_dit/train.py", "--config", str(HERE / config.generator), "--vae", self.vae(name)]
        training += ["--latents", str(self.folder / f"latents-{name}"), "--seed", str(seed)]
        training += ["--max_train_steps", str(steps[-1]), "--checkpointing_steps", str(math.gcd(*steps))]
        changed = {"optimizer": config.optimizer, "learning_rate": config.learning_rate}
        training += options({key: value for key, value in changed.items() if value is not None})
        training += ["--output_dir", str(folder)] + options(TINY_GENERATOR) * config.smallest
        words = self.measurement(name, seed, result, self.measured_steps(seed))
        words += ["--control", "--picture", str(result.with_suffix(".png"))] if first else []
        points = len(self.measured_steps(seed)) + first  # with the control
        return Task(
            result.stem,
            result.with_name(f"{result.stem}-{steps[-1]}.json"),
            (training, words),
            needs=(f"tokenizer-{name}",),
            copies=((folder / "log.jsonl", result.with_suffix(".jsonl")),),
            seconds=self.shared * (GENERATOR_STEP * steps[-1] + GENERATOR + points * POINT),
            one_process=True,
        )

    def tasks(self) -> list[Task]:
        """In the order in which they are started, of one of the `GROUPS` after the other."""
        names, tasks = self.config.tokenizers, []
        for group in GROUPS:
            tasks += self.chain([name for name in names if name in group])
        return tasks

    def chain(self, names: list[str]) -> list[Task]:
        """All tasks of some tokenizers: the longest first, further seeds of the generators last."""
        runs = [
            (name, seed)
            for seed in self.seeds
            for name in names
            if seed == self.seeds[0] or name in self.config.several
        ]
        generators = {run: self.generator(*run) for run in runs}
        stages, again = {}, {}
        if self.config.decoder is not None:
            for run, task in generators.items():
                redecoded = self.redecoded(*run)
                if not task.done or (self.folder / task.name).is_dir():
                    again[run] = redecoded
                elif not redecoded.done:
                    print(f"{task.name} cannot be measured with another decoder: its run folder is gone", flush=True)
            stages = {name: self.second_stage(name) for (name, _), task in again.items() if not task.done}
        made = [*generators.values(), *stages.values()]
        wanted = {need for task in made if not task.done for need in task.needs}
        longest = sorted(names, key=lambda name: (-TOKENIZERS[name][1], -len(TOKENIZERS[name][0])))
        tokenizers = [self.tokenizer(name) for name in longest]
        # one whose generators are measured is not trained again, also where its run folder is gone
        tasks = [task for task in tokenizers if task.done or task.name in wanted]
        for seed in self.seeds:
            tasks += [task for run, task in generators.items() if run[1] == seed]
            tasks += stages.values() if seed == self.seeds[0] else []
            tasks += [task for run, task in again.items() if run[1] == seed]
        return tasks


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    deadline, folder = time.monotonic() + config.seconds, config.folder
    folder.mkdir(parents=True, exist_ok=True)
    keep_settings(config, folder, ("tokenizers", "seeds", "several", "output_dir"))
    plan = Plan(config, open_data(config.data, folder))
    plan.results.mkdir(exist_ok=True)
    for ending, share in FEWER.items():
        fewer = fewer_folder(folder, ending)
        if any(name.endswith(ending) for name in config.tokenizers) and not fewer.is_dir():
            write_fewer(plan.images, fewer, share, config.resolution)
    if not (folder / "random").is_dir():
        write_random_network(folder / "random", config.resolution)
    tasks = plan.tasks()
    carry_out(config, tasks, plan.results, folder, deadline)


if __name__ == "__main__":
    run(main)
