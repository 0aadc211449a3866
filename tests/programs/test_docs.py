"""The documentation: its commands parse, its files are there, its table has every configuration."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture
def checker(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("check_commands", ROOT / "docs" / "check_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_parses(checker, capsys):
    with pytest.raises(SystemExit) as status:
        checker.main()
    assert status.value.code == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["python", "pipelines/generate.py", "--pipeline", "x", "--stepps", "4"],
        ["python", "pipelines/convert.py", "vtp", "--from", "x"],
        ["python", "pipelines/gone.py"],
        ["make", "coffee"],
    ],
)
def test_a_command_that_does_not_parse_is_found(checker, words):
    with pytest.raises((ValueError, SystemExit)):
        checker.check(words)


def test_files_that_pages_name_are_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`([\w-]+_(?:h100|cpu)\.json)`", text):
            assert (ROOT / "benchmarks/results" / name).is_file(), f"{page.name}: {name}"
        for name in re.findall(r"`((?:weights|tests|experiments|benchmarks|train_\w+)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_table_has_every_configuration_once():
    table = (ROOT / "docs" / "configurations.md").read_text(encoding="utf-8")
    dit, vtp = (section for section in table.split("\n## ")[1:])
    for section, folder in ((dit, "train_dit"), (vtp, "train_vtp")):
        named = re.findall(r"^\| `(\w+\.yaml)`", section, re.MULTILINE)
        assert sorted(named) == sorted(path.name for path in (ROOT / folder / "configs").glob("*.yaml"))
