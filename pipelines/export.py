"""Make a pipeline folder self-contained: it then also loads where this package is not installed.

    python pipelines/export.py --pipeline weights/openmoji-128 --output exported
    python pipelines/export.py --pipeline runs/dit-openmoji/pipeline --output openmoji-128
    python pipelines/export.py --pipeline pipeline --output vtp-large-xl

Weights, configurations and model cards are copied; other files are left out and named. Components of other classes
than diffusers' and the exported ones are refused. Anywhere with diffusers, load the folder by:

    DiffusionPipeline.from_pretrained("exported", custom_pipeline="pipeline", trust_remote_code=True)
"""

from dataclasses import dataclass
from pathlib import Path

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import read_json
from vtp_diffusion.runtime.programs import print_end


@dataclass(kw_only=True)
class ExportConfig(Settings):
    """Options of this program."""

    pipeline: str = setting(help="folder of a saved LightningDiTPipeline")
    output: str = setting(help="new or empty folder to write")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ExportConfig, argv, __doc__)
    from vtp_diffusion.generation.export import export_pipeline

    folder = export_pipeline(config.pipeline, config.output)
    print(f"self-contained pipeline: {folder}")
    files = sorted(path.relative_to(config.pipeline) for path in Path(config.pipeline).rglob("*") if path.is_file())
    if left_out := [str(path) for path in files if not (folder / path).exists()]:
        print(f"left out: {', '.join(left_out)}")
    student = read_json(folder / "transformer" / "config.json").get("student")
    steps = f" --num_inference_steps {max(student['steps'])}" if student else ""
    print_end([folder], "pipelines/generate.py --pipeline {} --num_images 16 --output samples.png" + steps, folder)


if __name__ == "__main__":
    run(main)
