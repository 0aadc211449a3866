"""Fixtures of the tests of programs."""

import pytest
from experiment_programs import UNDERSTANDING, load


@pytest.fixture(scope="module")
def understanding():
    """experiments/understanding_drives_generation/run.py as a module."""
    return load(f"{UNDERSTANDING}/run.py")
