"""The programs by name: `vtp-diffusion NAME ...` starts the same files as `python FOLDER/FILE.py ...` in a clone.

The wheel holds them in vtp_diffusion/programs/ (setup.cfg maps the folders there); a clone has them at its root.
"""

import ast
import difflib
import os
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .cli import run

FOLDERS = ("pipelines", "train_dit", "train_vtp", "eval")
# programs not listed here are called like their file, with - for _
NAMES = {
    "train_dit/train.py": "train-dit",
    "train_vtp/train.py": "train-vtp",
    "eval/generation.py": "evaluate",
    "eval/reconstruction.py": "evaluate-reconstruction",
}
# of a `DataConfig`: where images and classes are, which other programs have to be told too
IMAGES = ("name", "data_files", "image_column", "label_column", "cache_dir", "exif_orientation", "skip_unreadable")
STARTED_BY_NAME = "VTP_DIFFUSION_STARTED_BY_NAME"  # in the environment of programs that `vtp-diffusion NAME` started
PACKAGE = Path(__file__).parents[1]
INSTALLED = (PACKAGE / "programs").is_dir()
ROOT = PACKAGE / "programs" if INSTALLED else PACKAGE.parent


def python_path() -> str:
    """PYTHONPATH for a program that this one starts: the repository, then the present PYTHONPATH."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def programs() -> dict[str, Path]:
    """Name -> file of every program."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]
    return {NAMES.get(f"{file.parent.name}/{file.name}", file.stem.replace("_", "-")): file for file in files}


def as_typed(text: str) -> str:
    """`text` with its commands as the user types them: `vtp-diffusion NAME` if installed, or if this program was
    started so (files of an editable install are elsewhere); else as they are written, for a clone."""
    for name, path in programs().items() if INSTALLED or os.environ.get(STARTED_BY_NAME) else ():
        file = re.escape(f"{path.parent.name}/{path.name}")
        text = re.sub(rf"\bpython {file}", f"vtp-diffusion {name}", text)
        text = re.sub(rf"accelerate launch(.*) {file}", rf"accelerate launch --no_python\1 vtp-diffusion {name}", text)
    return text


def data_options(data: Any, *names: str) -> str:
    """Options for those of the named settings of a `DataConfig` that are not at their defaults."""
    own = [name for name in names if getattr(data, name) != getattr(type(data), name)]
    return " ".join(f"--data.{name} {shlex.quote(str(getattr(data, name)))}" for name in own)


def print_end(written: Sequence[object], then: str, *values: object, more: str = "") -> None:
    """Print the last line of a program: the files that it wrote (None is left out) and the command that comes next.

    Args: `then`: FOLDER/FILE.py and its options, with {} in place of each of the values; `more`: further options.
    """
    command = then.format(*(shlex.quote(str(value)) for value in values)) + f" {more}".rstrip()
    places = ", ".join(str(path) for path in written if path is not None)
    print(f"written: {places}; next: {as_typed('python ' + command)}")


def print_end_of_evaluation(results: str, *pictures: str | None) -> None:
    """Print the last line of an evaluation: the next command makes a page of its results."""
    print_end([results, *pictures], "eval/report.py --results {} --output report.html", results)


def unknown_word(word: str, what: str, known: Collection[str]) -> ValueError:
    """The error for a first word that is `what` and none of the known ones."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return ValueError(f"{word!r} is {what}{hint} (expected one of {', '.join(known)})")


def main(argv: list[str] | None = None) -> None:
    """Replace this process by the program that the first word names, with the other words as its options."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    known = programs()
    if name in ("-h", "--help"):
        lines = [f"  {name:24} {_first_line(file)}" for name, file in known.items()]
        print("\n".join(["usage: vtp-diffusion PROGRAM [--help] [--OPTION VALUE ...]", "", *lines]))
        return
    if name not in known:
        raise unknown_word(name, "not a program", known)
    os.environ[STARTED_BY_NAME] = "1"
    os.execv(sys.executable, [sys.executable, str(known[name]), *words])


def _first_line(file: Path) -> str:
    """First line of a program's docstring, up to a colon or semicolon."""
    first = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).partition("\n")[0]
    return re.split("[:;]", first)[0].rstrip(".")


def command() -> None:
    """Entry point of the console script `vtp-diffusion`."""
    run(main)


if __name__ == "__main__":
    command()
