"""Released weights -> diffusers folders.

    python pipelines/convert.py vtp --source RELEASED_FOLDER --output vtp-large --latent-statistics latents_stats.pt
    python pipelines/convert.py lightning-dit --checkpoint 0100000.pt --output dit-xl
    python pipelines/convert.py pipeline --vae vtp-large --transformer dit-xl --time-shift 0.075 --output pipeline

`vtp` writes the autoencoder without the text tower, which `VTPModel.from_released` loads from the released folder.
Without --latent-statistics the autoencoder can reconstruct images and encode latents, but pipelines refuse it: samples
would be noise.
`lightning-dit` takes the EMA weights and reads the architecture from their shapes.
`pipeline` joins the two; --time-shift is the shift s of train_dit/train.py and of papers. The output must be a new or
empty folder; an error leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.disk import replacing
from vtp_diffusion.runtime.programs import as_typed, print_end

if TYPE_CHECKING:
    from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(
        description=as_typed(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        options = commands.add_parser(name, help=text, description=text)
        options.add_argument("--output", required=True, metavar="DIR", help="new or empty folder to write")
        return options

    vtp = command("vtp", "a released VTP folder -> AutoencoderVTP")
    vtp.add_argument("--source", required=True, help="folder with config.json and model.safetensors, or Hub id")
    vtp.add_argument(
        "--rope-dtype", "--rope_dtype", choices=("bfloat16", "float32"), help="of the rotary embedding [bfloat16]"
    )
    vtp.add_argument(
        "--latent-statistics",
        "--latent_statistics",
        metavar="FILE",
        help="mean and std of each latent channel: JSON, or upstream's .pt; FILE:NAME picks one of several in a JSON",
    )

    dit = command("lightning-dit", "an upstream LightningDiT checkpoint -> LightningDiTTransformer2DModel")
    dit.add_argument("--checkpoint", required=True, metavar="FILE", help="upstream .pt file with 'ema'")

    pipeline = command("pipeline", "autoencoder + transformer -> LightningDiTPipeline")
    pipeline.add_argument("--vae", required=True, metavar="DIR", help="folder of a diffusers autoencoder")
    pipeline.add_argument("--transformer", required=True, metavar="DIR", help="folder of the transformer")
    shifts = pipeline.add_mutually_exclusive_group()
    shifts.add_argument("--time-shift", "--time_shift", metavar="S", type=float, help="s, as `shift` of training [1]")
    shifts.add_argument("--shift", metavar="1/S", type=float, help="or the scheduler's shift, 1/s")
    pipeline.add_argument(
        "--id2label",
        metavar="FILE",
        help="JSON: class index -> name, or a list of names; WordNet ids are replaced by names; "
        "imagenet: names of its 1000 classes",
    )
    return parser.parse_args(argv)


def read_json(path: str) -> dict | list:
    """The content of a JSON file. Raises: ValueError if there is none."""
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_latent_statistics(file: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel from FILE.json, FILE.json:NAME or upstream's FILE.pt."""
    import torch

    from vtp_diffusion.runtime.tensor_files import read_torch

    path, _, name = file.rpartition(":") if not Path(file).exists() and ":" in file else (file, "", "")
    if path.endswith(".pt"):
        entry = read_torch(path)
    else:
        entry = read_json(path)
        if name:
            if not isinstance(entry, dict) or name not in entry:
                raise ValueError(f"{path} has no entry {name!r}, it has {', '.join(entry)}")
            entry = entry[name]
    if not isinstance(entry, dict) or not {"mean", "std"} <= set(entry):
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{file} must hold 'mean' and 'std', it holds {found}; FILE:NAME picks an entry")
    try:
        return tuple(torch.as_tensor(entry[key], dtype=torch.float32).flatten().tolist() for key in ("mean", "std"))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{file}: 'mean' and 'std' must be lists of numbers: {error}") from error


def read_names(file: str) -> dict[int | str, str]:
    """Class index -> name from a JSON file, or those of ImageNet."""
    from vtp_diffusion.data.imagenet import IMAGENET, names_of_wnids

    if file == IMAGENET:
        return dict(enumerate(names_of_wnids()))
    names = read_json(file)
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file} must hold texts, as a list or by class index")
    return dict(zip(names, names_of_wnids([*names.values()]), strict=True))


def convert_vtp(arguments: argparse.Namespace) -> AutoencoderVTP:
    """The autoencoder of a released checkpoint, with latent statistics if they are given."""
    from vtp_diffusion import AutoencoderVTP

    statistics = arguments.latent_statistics and read_latent_statistics(arguments.latent_statistics)
    vae = AutoencoderVTP.from_released(arguments.source, rope_dtype=arguments.rope_dtype)
    return vae.with_latent_statistics(*statistics) if statistics else vae


def convert_lightning_dit(arguments: argparse.Namespace) -> LightningDiTTransformer2DModel:
    """The transformer of an upstream checkpoint, its architecture read from the shapes of the weights."""
    import torch

    from vtp_diffusion import LightningDiTTransformer2DModel
    from vtp_diffusion.models import conversion_lightning_dit
    from vtp_diffusion.models.conversion import load_strict

    source = arguments.checkpoint
    released = conversion_lightning_dit.read_lightning_dit_checkpoint(source)
    architecture = conversion_lightning_dit.lightning_dit_architecture(released, source)
    with torch.device("meta"):
        model = LightningDiTTransformer2DModel(**architecture)
    state = conversion_lightning_dit.convert_lightning_dit_state_dict(released, architecture, source)
    return load_strict(model, state, source)


def assemble_pipeline(arguments: argparse.Namespace) -> LightningDiTPipeline:
    """The pipeline of a saved autoencoder and a saved transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from vtp_diffusion import LightningDiTPipeline, LightningDiTTransformer2DModel
    from vtp_diffusion.generation.flow_matching import scheduler_shift
    from vtp_diffusion.models.latent_space import latent_statistics
    from vtp_diffusion.models.loading import load_autoencoder, load_saved

    shift = scheduler_shift(1.0 if arguments.time_shift is None else arguments.time_shift)
    if arguments.shift is not None:
        scheduler_shift(shift := arguments.shift)  # refuses an invalid shift
    vae = load_autoencoder(arguments.vae)
    latent_statistics(vae)  # refuses an AutoencoderVTP without statistics
    if not (Path(arguments.transformer) / "config.json").is_file():
        raise ValueError(f"{arguments.transformer} is not the folder of a diffusers model: it has no config.json")
    return LightningDiTPipeline(
        vae=vae,
        transformer=load_saved(LightningDiTTransformer2DModel, arguments.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        id2label=None if arguments.id2label is None else read_names(arguments.id2label),
    )


CONVERSIONS = {"vtp": convert_vtp, "lightning-dit": convert_lightning_dit, "pipeline": assemble_pipeline}


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"the output must be a new or empty folder, {output} is not")
    from tqdm.auto import tqdm

    with tqdm(total=2, desc="reading") as progress:
        result = CONVERSIONS[arguments.command](arguments)
        progress.update()
        progress.set_description("writing")
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as folder:
            result.save_pretrained(folder)
        progress.update()
    print(f"{type(result).__name__} written")
    if arguments.command == "vtp":
        print_end([output], "train_dit/extract_latents.py --vae {} --data.source FOLDER --output_dir latents", output)
    elif arguments.command == "lightning-dit":
        then = "pipelines/convert.py pipeline --vae FOLDER --transformer {} --output pipeline"
        print_end([output], then, output)
    else:
        print_end([output], "pipelines/generate.py --pipeline {} --num_images 16 --output samples.png", output)


if __name__ == "__main__":
    run(main)
