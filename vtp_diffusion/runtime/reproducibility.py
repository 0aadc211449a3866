"""Reproducible runs: random numbers keyed by their use, exact float32, deterministic algorithms.

Random numbers depend on the seed and the position in the run, never on earlier draws. So ten steps, a restart and ten
more steps give the same as twenty, bit for bit on a CPU.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

RANDOM_BLOCK = 16  # samples that share a generator: few enough to waste little, enough to keep a GPU busy


def stream_seed(use: str, *keys: int) -> int:
    """A seed below 2**63 for one use of random numbers, such as `stream_seed("noise", seed, image)`.

    It is a hash of the use and the keys as text. Plain numbers collide: with seed + image, runs of neighbouring seeds
    share the noise of all images but one, and numpy pads lists with zeros, so that [7, 3] and [7, 3, 0, 0] give the
    same generator.

    Training's order of images and `step_generator` still use such lists, so that older runs can be resumed; training
    draws nothing else from them.
    """
    digest = hashlib.sha256(" ".join([use, *map(str, keys)]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_stream(use: str, *keys: int) -> np.random.Generator:
    """NumPy generator seeded with `stream_seed(use, *keys)`."""
    return np.random.default_rng(stream_seed(use, *keys))


def step_generator(
    seed: int, step: int, rank: int = 0, stream: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that depends on nothing but (seed, step, rank, stream): resuming at a step redraws the same numbers.

    Args: `stream` separates draws made for different purposes in one step.
    """
    state = np.random.SeedSequence([seed, step, rank, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def step_positions(micro_step: int, rank: int, world_size: int, batch_size: int) -> range:
    """Positions in a run of the `batch_size` samples of a process in a micro-step, for `draw_for_positions`: those of
    a micro-step follow each other rank by rank. The order of the data and everything drawn for a sample depend on it.
    """
    first = (micro_step * world_size + rank) * batch_size
    return range(first, first + batch_size)


def draw_for_positions(
    draw: Callable[[int, torch.Generator], dict[str, torch.Tensor]],
    positions: range,
    seed: int,
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Random tensors for samples at consecutive positions of a run, each depending on (seed, position, stream) only.

    They are drawn in aligned blocks of `RANDOM_BLOCK` positions, each from its own generator, and cut to size.

    Args:
        draw: (count, generator) -> named tensors (count, ...).
        positions: of the samples, as `step_positions` gives them.
    Returns: named tensors (len(positions), ...).
    """
    blocks = range(positions.start // RANDOM_BLOCK, -(-positions.stop // RANDOM_BLOCK))
    drawn = [draw(RANDOM_BLOCK, step_generator(seed, block, 0, stream, device)) for block in blocks]
    first = positions.start - blocks.start * RANDOM_BLOCK
    return {name: torch.cat([part[name] for part in drawn])[first : first + len(positions)] for name in drawn[0]}


@contextlib.contextmanager
def exact_float32(benchmark: int | None = None) -> Iterator[None]:
    """Context without TensorFloat-32, whatever the process has set: torch allows it for convolutions by default.

    Args: `benchmark`: let cuDNN time so many of its algorithms for every new shape, those that it expects most of.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # `allow_tf32` would leave a state that torch.compile cannot read
    try:
        limit = benchmark or torch.backends.cudnn.benchmark_limit  # `flags` would set PyTorch's default
        timed = benchmark is not None
        with torch.backends.cudnn.flags(enabled=True, benchmark=timed, benchmark_limit=limit, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def use_deterministic_algorithms() -> None:
    """Make runs on the same kind of device bit-identical; PyTorch raises where it has no deterministic algorithm.

    Call it before the first matrix product on a GPU, which fixes cuBLAS's workspace. torch.compile then chooses
    kernels without timing them: another choice would round differently.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch._inductor.config.deterministic = True


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast for a frozen autoencoder. `precision`: "no", "fp16" or "bf16", as accelerate's mixed_precision."""
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def to_float64(values: torch.Tensor) -> torch.Tensor:
    """`values` in float64 on their device, or on the CPU if the device has no float64 (mps)."""
    return (values.cpu() if values.device.type == "mps" else values).double()
