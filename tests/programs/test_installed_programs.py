"""The wheel: it holds the library and the programs, and `vtp-diffusion` starts them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.runtime import programs
from vtp_diffusion.runtime.programs import IMAGES, data_options, print_end

ROOT = Path(__file__).parents[2]
SOURCES = ("vtp_diffusion", *programs.FOLDERS)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the content of a wheel, built from a copy of the sources alone."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, folder], cwd=folder / "source", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def start(installed: Path, *words: str) -> str:
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from vtp_diffusion.runtime.programs import main; main()"
    command = [sys.executable, "-c", code, str(installed), *words]
    environment = {"PYTHONPATH": str(installed), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_library_and_programs_once(installed):
    found = sorted(str(path.relative_to(installed)) for path in installed.glob("vtp_diffusion/**/*.*"))
    expected = [path.relative_to(ROOT) for name in SOURCES for path in (ROOT / name).rglob("*.*")]
    wanted = [
        str(path) if path.parts[0] == "vtp_diffusion" else f"vtp_diffusion/programs/{path}"
        for path in expected
        if "__pycache__" not in path.parts
    ]
    assert found == sorted(wanted)
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"vtp_diffusion"}
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "vtp-diffusion = vtp_diffusion.runtime.programs:command" in entry_points.read_text()


def test_an_installed_program_starts_with_its_configurations(installed):
    listed = start(installed).splitlines()
    assert any(line.split() == ["report", "Several", "results", "on", "one", "page"] for line in listed)
    printed = start(installed, "train-dit", "--help")
    assert "--learning_rate" in printed and "\n  openmoji " in printed
    assert "    vtp-diffusion train-dit --config tiny\n" in printed
    assert "    accelerate launch --no_python vtp-diffusion train-dit --config openmoji\n" in printed
    assert ".py --" not in printed


def test_every_program_has_a_name_of_its_own():
    files = {path for folder in programs.FOLDERS for path in (ROOT / folder).glob("*.py")}
    assert set(programs.programs().values()) == files
    assert programs.programs()["evaluate"] == ROOT / "eval" / "generation.py"


def test_the_last_line_names_what_was_written_and_the_next_command(capsys, monkeypatch):
    arguments = [Path("run"), None, "a b"], "pipelines/generate.py --pipeline {} --num_images {}", "a b", 16
    programs.print_end(*arguments)
    line = "written: run, a b; next: {} --pipeline 'a b' --num_images 16\n"
    assert capsys.readouterr().out == line.format("python pipelines/generate.py")
    with monkeypatch.context() as patch:
        patch.setattr(programs, "INSTALLED", True)
        programs.print_end(*arguments)
    assert capsys.readouterr().out == line.format("vtp-diffusion generate")
    monkeypatch.setenv(programs.STARTED_BY_NAME, "1")  # also by an editable install, elsewhere
    programs.print_end(*arguments)
    assert capsys.readouterr().out == line.format("vtp-diffusion generate")


def test_a_program_knows_that_it_was_started_by_its_name(monkeypatch):
    monkeypatch.delenv(programs.STARTED_BY_NAME, raising=False)
    monkeypatch.setattr(programs.os, "execv", lambda *_: None)
    programs.main(["generate"])
    assert programs.os.environ.pop(programs.STARTED_BY_NAME) == "1"


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'train_dit' is not a program; did you mean train-dit"):
        programs.main(["train_dit", "--lr", "1"])


def test_the_next_command_finds_the_images_of_a_builder(capsys):
    data = DataConfig(source="parquet", data_files="shards/{a,b c}.parquet", label_column="kind", resolution=32)
    print_end(["vae"], "eval/zero_shot.py --model {}", "my vae", more=data_options(data, *IMAGES))
    then = "eval/zero_shot.py --model 'my vae' --data.data_files 'shards/{a,b c}.parquet' --data.label_column kind"
    assert capsys.readouterr().out == f"written: vae; next: python {then}\n"
    print_end([], "eval/zero_shot.py", more=data_options(DataConfig(source="photos"), *IMAGES))
    assert capsys.readouterr().out == "written: ; next: python eval/zero_shot.py\n"
