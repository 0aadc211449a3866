"""The documentation: its commands parse, its files are there, its table has every configuration."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from vtp_diffusion.runtime.programs import programs

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


SHORT = {
    "extract_latents": ["--copies", "1", "--augmentation.shift", "0"],
    "train": ["--validation.num_inference_steps", "1", "--max_train_steps", "1", "--lr_warmup_steps", "0",
              "--train_batch_size", "2", "--compile", "false", "--report_to", "none", "--mixed_precision", "no"],
    "generate": ["--num_images", "2", "--num_inference_steps", "1"],
}  # fmt: skip


def test_four_commands_lead_from_own_images_to_a_page_of_samples(checker, tmp_path, monkeypatch, capsys):
    """As docs/own_images.md has them, but for sizes; one class, so that no class is assumed."""
    from accelerate.state import AcceleratorState

    install, *commands = checker.commands(ROOT / "docs" / "own_images.md")[:4]
    assert install[:2] == ["pip", "install"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    Path("weights").symlink_to(ROOT / "weights")
    for k in range(2):
        file = Path("data/photos/shape", f"{k}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (90 * k, 200, 30)).save(file)
    for _, program, *words in commands:
        AcceleratorState._reset_state(True)
        checker.load(ROOT / program).main([*words, *SHORT[Path(program).stem]])
        assert capsys.readouterr().out.splitlines()[-1].startswith("written: ")
    assert Image.open("photos.png").width > 2 * 128


def test_every_configuration_is_listed_by_one_program(checker):
    for folder in ("train_dit", "train_vtp"):
        modules = [checker.load(path) for path in sorted((ROOT / folder).glob("*.py"))]
        listed = [path for module in modules for path in getattr(module, "CONFIGS", [])]
        assert sorted(listed) == sorted((ROOT / folder / "configs").glob("*.yaml"))


PROGRAMS = [path for path in programs().values() if path.name != "report.py"]  # its example names a picture


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_holds_three_commands_that_parse(checker, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are the files that examples name
    Path("weights").symlink_to(ROOT / "weights")
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))).replace("\\\n", " ")
    found = [line for line in text.splitlines() if re.match("    (python|accelerate)", line) and "..." not in line]
    assert len(found) >= 3
    for line in found:
        words = shlex.split(line)
        for file in (word for word in words if word.endswith(".pth")):
            Path(file).touch()
        assert {"compare", "reach"} & set(words) or checker.check(words) is None


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_command_that_a_program_names_last_parses(checker, program):
    text = program.read_text(encoding="utf-8")
    commands = re.findall(r'"((?:pipelines|train_dit|train_vtp|eval)/\w+\.py (?:pipeline )?--[^"]+)"', text)
    assert len(commands) == text.count("print_end(")
    assert commands or "print_end_of_evaluation(" in text or program.name == "app.py"
    for command in commands:  # what is known only when the program runs is replaced by a number
        checker.check(shlex.split("python " + command.replace("{}", "32").replace("NAME", "tiny")))


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


def test_pages_link_to_pages_alone():
    """The site holds nothing but docs/: its strict build refuses a link to a file beside it."""
    assert [(page.name, link) for page in PAGES for link in re.findall(r"\]\((\.\./[^)]*)", page.read_text())] == []


def test_the_table_has_every_configuration_once():
    table = (ROOT / "docs" / "configurations.md").read_text(encoding="utf-8")
    dit, vtp = (section for section in table.split("\n## ")[1:])
    for section, folder in ((dit, "train_dit"), (vtp, "train_vtp")):
        named = re.findall(r"^\| `(\w+\.yaml)`", section, re.MULTILINE)
        assert sorted(named) == sorted(path.name for path in (ROOT / folder / "configs").glob("*.yaml"))
