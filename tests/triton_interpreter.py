"""Programs of the tests that run Triton kernels in its interpreter, to be chosen before Triton is imported."""

import os
import subprocess
import sys

import pytest


def run_interpreted(program: str, unsupported: str, why: str) -> None:
    """Run a program that prints "all equal" at its end; skipped, for a reason, where a version of torch or Triton says
    that it is `unsupported`."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if unsupported in done.stderr:
        pytest.skip(why)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr
