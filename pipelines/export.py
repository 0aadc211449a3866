"""Make a pipeline folder self-contained: it then also loads where this package is not installed.

    python pipelines/export.py --pipeline weights/openmoji-128 --output exported

and anywhere with diffusers

    DiffusionPipeline.from_pretrained("exported", custom_pipeline="pipeline", trust_remote_code=True)
"""

from dataclasses import dataclass, field

from vtp_diffusion.generation.export import export_pipeline
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config


@dataclass
class ExportConfig:
    pipeline: str = field(metadata={"help": "folder of a saved LightningDiTPipeline"})
    output: str = field(metadata={"help": "new or empty folder to write"})


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ExportConfig, argv, __doc__)
    folder = export_pipeline(config.pipeline, config.output)
    print(f"self-contained pipeline: {folder}")


if __name__ == "__main__":
    run(main)
