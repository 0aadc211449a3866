"""Convolutions on tensor cores, in Triton's interpreter: it must be chosen before Triton is imported."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from vtp_diffusion.metrics.extraction import Extractor, can_split
from vtp_diffusion.metrics.networks import FeatureNetwork

pytest.importorskip("triton")

PROGRAM = """
import numpy as np
import torch
from torch import nn
from triton.runtime import interpreter

# a tensor core sees 10 bits behind the point: the interpreter's product shall not see more
multiply = interpreter.InterpreterBuilder.create_dot
def by_tensor_core(self, a, b, d, *precision):
    a, b = (interpreter.TensorHandle((x.data.view(np.int32) & -0x2000).view(np.float32), x.dtype) for x in (a, b))
    return multiply(self, a, b, d, *precision)
interpreter.InterpreterBuilder.create_dot = by_tensor_core

from vtp_diffusion.metrics.convolution import SplitConvolution, split_convolution

torch.manual_seed(0)
for channels, out, kernel, stride, padding, size in (
    (3, 32, 3, 2, 0, (2, 11, 9)),          # filled up to 16 channels
    (48, 80, (1, 7), 1, (0, 3), (1, 5, 8)),  # steps of 16
    (64, 72, 5, 1, 2, (2, 6, 6)),          # steps of 32, two columns of programs
    (32, 64, 1, 1, 0, (3, 7, 7)),          # two rows of programs
    (32, 16, (3, 1), (2, 1), (1, 0), (1, 1, 5)),  # a dimension of 1
):
    conv = nn.Conv2d(channels, out, kernel, stride, padding)
    x = torch.randn(size[0], channels, *size[1:])
    expected = conv.double()(x.double()).relu().detach()
    library = conv.float()(x).relu()
    split = SplitConvolution(conv)
    found = split(x)
    assert found.is_contiguous(memory_format=torch.channels_last), found.stride()
    error = lambda y: ((y - expected).norm() / expected.norm()).item()
    assert error(found) < 3e-7, (error(found), error(library))
    rounded = SplitConvolution(conv)
    rounded.low.zero_()  # as if weights were TensorFloat-32: the test would see it
    assert error(rounded(x)) > 1e-5

assert torch.equal(split(x.contiguous(memory_format=torch.channels_last)), found)
poisoned = x.clone()
poisoned[0, 0, 0, 2] = float("nan")
assert split(poisoned).isnan().any()

for wrong in (x.half(), x[:, :16], torch.zeros(1, 8, 4, 4)):
    try:
        split_convolution(wrong, split.high, split.low, split.bias, *split.places)
    except ValueError as error:
        assert "a split convolution of" in str(error)
    else:
        raise AssertionError(wrong.shape)

torch.library.opcheck(split_convolution, (x, split.high, split.low, split.bias, *split.places))
network = nn.Sequential(SplitConvolution(nn.Conv2d(3, 16, 3)), nn.MaxPool2d(2), SplitConvolution(nn.Conv2d(16, 8, 1)))
images = torch.randn(2, 3, 8, 8)
compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
with torch.inference_mode():
    assert torch.equal(compiled(images), network(images))
print("all equal")
"""


def test_split_convolutions_are_as_precise_as_float32():
    command, environment = [sys.executable, "-c", PROGRAM], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 3, groups=2),
        nn.Conv2d(16, 16, 3, dilation=2),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.Conv2d(16, 16, 3).half(),
    ],
)
def test_other_convolutions_are_refused(conv):
    from vtp_diffusion.metrics.convolution import SplitConvolution

    with pytest.raises(ValueError, match="a split convolution has"):
        SplitConvolution(conv)


class Splitting(FeatureNetwork):
    name, splittable = "splitting", True

    def split_convolutions(self):
        self.is_split = True


def test_a_split_network_is_for_exact_features_on_a_gpu_alone():
    assert not can_split(torch.device("cpu"))
    with pytest.raises(ValueError, match="on one of A100, H100, .*: the network is splitting, the device cpu"):
        Extractor(Splitting(), "cpu", split=True)
    network = Splitting()
    assert not Extractor(network, "cpu").network.is_split
    network.split_convolutions()
    for mode in ("exact", "fast"):
        with pytest.raises(ValueError, match=f"of this splitting were split .* for mode '{mode}' on cpu"):
            Extractor(network, "cpu", mode)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_as_precise():
    if not can_split(torch.device("cuda")):
        pytest.skip("a GPU without the tensor cores")
    from vtp_diffusion.metrics.convolution import SplitConvolution

    conv, x = nn.Conv2d(64, 80, 3, padding=1), torch.randn(4, 64, 17, 17)
    expected = conv.double()(x.double()).relu()
    found = SplitConvolution(conv.float()).cuda()(x.cuda()).cpu()
    assert (found - expected).norm() < 3e-7 * expected.norm()
