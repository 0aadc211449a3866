"""What the user of a program reads when the input is at fault, and how programs start and end."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.optional_packages import require

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    path for folder in ("pipelines", "train_vtp", "train_dit", "eval") for path in (ROOT / folder).glob("*.py")
)


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("cat.png cannot be read")


def wrong_value():
    raise ValueError("width is 17, expected a multiple of 4")


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (wrong_value, "error: width is 17, expected a multiple of 4"),
        (lambda: open("absent.yaml"), "error: [Errno 2] No such file or directory: 'absent.yaml'"),
        (
            lambda: require("no_such_package", "train"),
            "error: no_such_package is needed here: in a clone of the repository, pip install -e '.[train]'",
        ),
        (lambda: next(iter(DataLoader(Unreadable(), num_workers=1))), "error: ValueError: cat.png cannot be read"),
    ],
    ids=["value", "file", "extra", "worker process"],
)
def test_faulty_input_is_one_message_and_a_place(main, message, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run(main)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    first, second = printed.err.splitlines()
    assert first == message
    assert ".py:" in second and "VTP_DIFFUSION_TRACEBACK=1" in second
    monkeypatch.setenv("VTP_DIFFUSION_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError, ImportError)):
        run(main)


def test_faults_of_the_program_keep_their_traceback(capsys):
    with pytest.raises(KeyError, match="unexpected"):
        run(lambda: {}["unexpected"])
    run(lambda: print("done"))
    assert capsys.readouterr().out == "done\n"


def test_programs_look_for_garbage_rarely_and_not_at_their_end():
    script = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
    script += (
        "from vtp_diffusion.runtime.cli import run; run(lambda: print(gc.get_threshold()[0], gc.get_freeze_count()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["50000", "0", "True"], done.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_program_ends_this_way(program):
    text = program.read_text(encoding="utf-8")
    assert re.search("from vtp_diffusion.runtime.cli import .*run", text)
    assert re.search(r'if __name__ == "__main__":\n    run\w*\(main\)\n$', text)
