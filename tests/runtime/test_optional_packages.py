"""Packages of the extras are named when they are missing."""

import sys

import pytest

from vtp_diffusion.runtime.optional_packages import require


def test_an_installed_package_is_imported():
    assert require("json.decoder", "train").JSONDecoder


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(ImportError, match=r"no_such_package is needed here: in a clone of .* -e '.\[eval\]'"):
        require("no_such_package.part", "eval")


def test_what_an_installed_package_lacks_is_not_blamed_on_the_extra(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import a_dependency_of_it")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_of_it"):
        require("half_installed", "train")
    assert "half_installed" not in sys.modules
