"""Writing at once or not at all: what readers see during, after a failure, and what the messages name."""

import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from vtp_diffusion.runtime.disk import (
    check_output,
    is_unfinished,
    remove_leftovers,
    replacing,
    replacing_saved,
    write_json,
    writing,
)


def test_a_file_appears_when_it_is_complete_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "made" / "values.json"
    write_json(path, {"a": 1})
    with replacing(path) as unfinished:
        assert unfinished.parent == path.parent and is_unfinished(unfinished)
        unfinished.write_text("new")
        assert json.loads(path.read_text()) == {"a": 1}
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_path_have_names_of_their_own(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]  # the one that ends last


def test_a_folder_appears_with_everything_in_it(tmp_path):
    path = tmp_path / "folder"
    with replacing(path) as unfinished:
        (unfinished / "inner").mkdir(parents=True)
        (unfinished / "inner" / "file").write_text("x")
        assert not path.exists()
    assert (path / "inner" / "file").read_text() == "x" and list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with (
        pytest.raises(OSError, match="file could not be written: disk full. Free some"),
        replacing(path, "Free some") as u,
    ):
        u.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_memory_that_runs_out_is_not_reported_as_the_disk(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"), writing(tmp_path / "file"):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"evaluation": "generation"}', "r.json holds results of generation: expected a new output, or"),
        ('{"model": "mine"}', "r.json holds something else than results: expected a new output"),
        ("no JSON", "r.json is not JSON: .* expected a new output"),
    ],
)
def test_only_results_of_the_same_evaluation_are_replaced(tmp_path, content, message):
    file = tmp_path / "r.json"
    for harmless in ("", '{"evaluation": "zero_shot"}'):
        file.write_text(harmless)
        check_output(str(file), evaluation="zero_shot")
    file.write_text(content)
    check_output(str(file))
    with pytest.raises(ValueError, match=message):
        check_output(str(file), evaluation="zero_shot")
    assert file.read_text() == content


@pytest.mark.parametrize("steps", range(12))
def test_a_kill_while_a_model_is_saved_again_leaves_the_older_the_newer_or_none(tmp_path, monkeypatch, steps):
    folder, left = tmp_path / "pipeline", [steps]

    def save(version):
        with replacing_saved(folder) as unfinished:
            for name in ("model_index.json", "vae/config.json", f"vae/{version}.safetensors", "README.md"):
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / name).write_text(version)

    def counted(change):
        def counted_change(path, *others, **options):
            if not path.name.startswith("."):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            return change(path, *others, **options)

        return counted_change

    save("older")
    (folder / "mine.png").write_text("mine")
    with monkeypatch.context() as killed, contextlib.suppress(KeyboardInterrupt):
        for name in ("rename", "unlink"):
            killed.setattr(Path, name, counted(getattr(Path, name)))
        save("newer")
    for configuration in (folder / "vae" / "config.json", folder / "model_index.json"):
        if configuration.is_file():
            weights = [path.stem for path in (folder / "vae").glob("*.safetensors")]
            assert weights == [(folder / "vae" / "config.json").read_text()] == [configuration.read_text()]
    save("newest")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "mine.png", "model_index.json", "vae"]
    assert sorted(path.name for path in (folder / "vae").iterdir()) == ["config.json", "newest.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    start = f".features.{socket.gethostname()}"
    names = [
        f"{start}-{os.getpid()}-0.unfinished",
        f"{start}-{ended.pid}-0.unfinished",
        f".features.other-{ended.pid}",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path / "features")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[0], names[2]])
