"""Which samples a step sees, and every random number drawn for them.

All of it is keyed by the seed and the position in the run, never by what was drawn before: that is what makes ten
steps, a restart and ten more steps the same as twenty, bit for bit on a CPU.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch


def step_generator(
    seed: int, step: int, rank: int = 0, stream: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that depends on nothing but (seed, step, rank, stream): resuming at a step redraws the same numbers.

    Args: `stream` separates draws made for different purposes in one step.
    """
    state = np.random.SeedSequence([seed, step, rank, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


RANDOM_BLOCK = 16  # samples that share a generator: few enough to waste little, enough to keep a GPU busy


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
        positions: of the samples: step x images a step + place in the step.

    Returns: named tensors (len(positions), ...).
    """
    blocks = range(positions.start // RANDOM_BLOCK, -(-positions.stop // RANDOM_BLOCK))
    drawn = [draw(RANDOM_BLOCK, step_generator(seed, block, 0, stream, device)) for block in blocks]
    first = positions.start - blocks.start * RANDOM_BLOCK
    return {name: torch.cat([part[name] for part in drawn])[first : first + len(positions)] for name in drawn[0]}


class StepBatchSampler:
    """Batches of indices keyed by (seed, step): step s of process r is the same list whenever training starts.

    A step may be divided into micro-steps, which are what is counted below; the samples of a step depend neither on
    that number nor on that of the processes, as long as their product with `batch_size` stays the same.

    Without weights the samples run through one random permutation an epoch, each seen once, epochs following each
    other without a gap: a batch may span two. With weights, every step draws anew, with replacement and in proportion
    to them; the draw is stratified, so that a batch follows the proportions more closely than independent draws would.

    Args:
        num_samples: size of the data set.
        batch_size: indices a micro-step and process.
        seed: of the run.
        start_step, num_steps: iterating gives the micro-steps start_step ... start_step + num_steps - 1.
        rank, world_size: this process and how many there are; together they read each epoch once.
        weights: (num_samples,) not negative; all equal counts as none.
        accumulation: micro-steps a step.

    Raises:
        ValueError: sizes that are not positive, weights of another shape, negative, not finite or all zero.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
        weights: torch.Tensor | None = None,
        accumulation: int = 1,
    ):
        if num_samples <= 0 or batch_size <= 0 or num_steps < 0 or start_step < 0:
            raise ValueError(
                f"got {num_samples} samples, batches of {batch_size}, {num_steps} steps from {start_step}: samples "
                "and batch size must be positive, steps not negative"
            )
        if accumulation < 1:
            raise ValueError(f"got {accumulation} micro-steps a step, expected at least one")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_step, self.num_steps, self.rank, self.world_size = start_step, num_steps, rank, world_size
        self.accumulation = accumulation
        self._permutation: tuple[int, np.ndarray] | None = None
        self._cumulative = None if weights is None else self._cumulate(weights)

    def _cumulate(self, weights: torch.Tensor) -> np.ndarray | None:
        values = np.asarray(weights, dtype=np.float64)
        if values.shape != (self.num_samples,):
            raise ValueError(f"weights have shape {values.shape}, expected ({self.num_samples},)")
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
            raise ValueError("weights must be finite and not negative, and not all zero")
        return None if (values == values[0]).all() else np.cumsum(values) / values.sum()

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.start_step + self.num_steps):
            yield self.batch(step)

    def positions(self, step: int) -> range:
        """Positions in the run of this process's samples at a micro-step, for `draw_for_positions`."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def batch(self, step: int) -> list[int]:
        """The indices of this process at a micro-step."""
        first = self.positions(step).start
        if self._cumulative is not None:
            total = self.batch_size * self.world_size * self.accumulation
            random = np.random.default_rng([self.seed, step // self.accumulation])
            # one draw in each of `total` equal slices of the distribution, then shuffled so that every rank sees all
            points = random.permutation((np.arange(total) + random.random(total)) / total)
            indices = np.searchsorted(self._cumulative, points, side="right").clip(max=self.num_samples - 1)
            return indices[first % total : first % total + self.batch_size].tolist()
        indices = []
        while len(indices) < self.batch_size:
            epoch, offset = divmod(first + len(indices), self.num_samples)
            indices += self._epoch(epoch)[offset : offset + self.batch_size - len(indices)].tolist()
        return indices

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
            self._permutation = (epoch, order)
        return self._permutation[1]
