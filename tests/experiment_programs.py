"""What the tests of experiments/ share: their scripts as modules, and words of command lines."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import yaml

ROOT = Path(__file__).parents[1]
UNDERSTANDING = "experiments/understanding_drives_generation"
KINDS = (
    "Config",
    "ReconstructionEvaluationConfig",
    "LinearProbeConfig",
    "GenerationConfig",
    "GenerateConfig",
)  # of the settings of programs


def load(program: str) -> ModuleType:
    """A program as a module. As when it is started, it may import what lies beside it."""
    if (folder := str((ROOT / program).parent)) not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(program.replace("/", "_").removesuffix(".py"), ROOT / program)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def settings_class(program: ModuleType) -> type:
    """The class of a program's settings."""
    return next(getattr(program, kind) for kind in KINDS if hasattr(program, kind))


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def fashion_settings(folder: Path) -> dict:
    """The settings of fashion.yaml, and a folder with the names of its images."""
    (folder / "fashion").mkdir()
    for part in ("train", "test"):
        (folder / "fashion" / f"{part}.parquet").touch()
    return yaml.safe_load((ROOT / UNDERSTANDING / "fashion.yaml").read_text()) | {"data": str(folder / "fashion")}
