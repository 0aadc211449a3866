"""Parse every command of the documentation with the parser of its program, without running anything.

python docs/check_commands.py
"""

import argparse
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
OTHERS = ("pip", "pre-commit", "export")  # what pages may call besides programs and make


class Parsed(Exception):  # noqa: N818
    """Raised in the place of what a program does after it has parsed its options."""


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the bash blocks of a page, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def load(program: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documented_{program.parent.name}_{program.stem}", program)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    sys.path.insert(0, str(program.parent))  # as for a program that is started
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(program.parent))
    return module


def parse(program: Path, words: list[str]) -> None:
    """Raises: ValueError or SystemExit, as the program does of options it does not take."""
    module = load(program)
    if hasattr(module, "parse_arguments"):
        module.parse_arguments(words)
        return
    whose = (module, "parse_config") if hasattr(module, "parse_config") else (argparse.ArgumentParser, "parse_args")
    read = getattr(*whose)

    def parse_only(*arguments, **options):
        read(*arguments, **options)
        raise Parsed

    setattr(*whose, parse_only)
    given, sys.argv = sys.argv, [str(program), *words]
    try:
        module.main()
    except Parsed:
        return
    finally:
        setattr(*whose, read)
        sys.argv = given
    raise ValueError(f"{program} did not parse its options")


def check(words: list[str]) -> None:
    """Raises: ValueError of a command that does not parse, or names no program of this repository."""
    program = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        if unknown := [target for target in words[1:] if target not in targets]:
            raise ValueError(f"the Makefile has no {', '.join(unknown)}")
    elif words[:3] == ["python", "-m", "pytest"] or words[0] in OTHERS:
        return
    elif program is None or not (ROOT / words[program]).is_file():
        raise ValueError("expected a program of this repository")
    elif words[program] != "docs/check_commands.py":
        # a device that this machine does not have is refused, which says nothing of the command
        parse(ROOT / words[program], ["cpu" if word == "cuda" else word for word in words[program + 1 :]])


def main() -> None:
    faults, count = [], 0
    for page in PAGES:
        for words in commands(page):
            count += 1
            try:
                check(words)
            except (ValueError, OSError, SystemExit) as error:
                faults.append(f"{page.relative_to(ROOT)}: {shlex.join(words)}\n    {error}")
    print("\n".join([*faults, f"{count} commands of {len(PAGES)} pages, {len(faults)} do not parse"]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
