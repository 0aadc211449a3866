"""benchmarks/README.md: every script and every result is on it, and what it points at is there."""

import importlib.util
import re
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_script_and_result_is_on_the_page():
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"launching.py"}
    assert {name for name in scripts if f"| `{name}` |" not in PAGE} == set()
    assert {path.name for path in FOLDER.glob("results/*.json") if f"`{path.stem}" not in PAGE} == set()


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", PAGE, re.M)
    }
    targets = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert {t for t in targets if t[0] == "#" and t[1:] not in headings} == set()
    assert {t for t in targets if t[0] != "#" and not (FOLDER / t).exists()} == set()


def test_the_commands_still_to_run_are_taken(monkeypatch):
    """As on a machine with GPUs, where a fault in one would show first."""
    spec = importlib.util.spec_from_file_location("check_commands", FOLDER.parent / "docs" / "check_commands.py")
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    commands = checker.commands(FOLDER / "README.md")
    assert len(commands) > 10
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    monkeypatch.chdir(FOLDER.parent)
    for _, program, *_ in commands:
        checker.load(FOLDER.parent / program)  # what other tests import too must not see the GPUs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for words in commands:
        checker.check(words)
