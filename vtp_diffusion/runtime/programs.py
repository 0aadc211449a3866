"""The programs by name: `vtp-diffusion NAME ...` starts the same files as `python FOLDER/FILE.py ...` in a clone.

The wheel holds them in vtp_diffusion/programs/ (setup.cfg maps the folders there); a clone has them at its root.
"""

import ast
import difflib
import os
import shlex
import sys
from pathlib import Path

from .cli import run

FOLDERS = ("pipelines", "train_dit", "train_vtp", "eval")
# the others are called as their file, with - for _
NAMES = {
    "train_dit/train.py": "train-dit",
    "train_vtp/train.py": "train-vtp",
    "eval/generation.py": "evaluate",
    "eval/reconstruction.py": "evaluate-reconstruction",
}
PACKAGE = Path(__file__).parents[1]
INSTALLED = (PACKAGE / "programs").is_dir()
ROOT = PACKAGE / "programs" if INSTALLED else PACKAGE.parent


def programs() -> dict[str, Path]:
    """Name -> file of every program."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]
    return {NAMES.get(f"{file.parent.name}/{file.name}", file.stem.replace("_", "-")): file for file in files}


def spoken(file: str, *words: object) -> str:
    """The command of a program as a user types it here.

    Args: `file`: FOLDER/FILE.py, as a clone has it; `words`: its options.
    """
    names = {path: name for name, path in programs().items()}
    start = ["vtp-diffusion", names[ROOT / file]] if INSTALLED else ["python", file]
    return shlex.join([*start, *map(str, words)])


def print_end(*written: object, then: str) -> None:
    """The last line of a program: all that it wrote, and the command that comes next."""
    print(f"written: {', '.join(str(path) for path in written if path is not None)}; next: {then}")


def main(argv: list[str] | None = None) -> None:
    """Replace this process by the program that the first word names, with the other words as its options."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    known = programs()
    if name in ("-h", "--help"):
        lines = [f"  {name:24} {_first_line(file)}" for name, file in known.items()]
        print("\n".join(["usage: vtp-diffusion PROGRAM [--help] [--OPTION VALUE ...]", "", *lines]))
        return
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{name!r} is no program{hint} (expected one of {', '.join(known)})")
    os.execv(sys.executable, [sys.executable, str(known[name]), *words])


def _first_line(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).partition("\n")[0]


def command() -> None:
    """What the console script `vtp-diffusion` calls."""
    run(main)


if __name__ == "__main__":
    command()
