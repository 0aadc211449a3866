"""Training a VTP tokenizer for several objectives at once (arXiv:2512.13687).

An objective is a module in a file of its own. It owns its configuration (`config`, with a `weight`), draws its inputs
from a micro-batch (`draw_inputs`), turns the autoencoder and them into named losses (`forward`), counts its operations
(`flops`) and compiles its parts (`compile_parts`). This file loops over objectives without knowing their insides, and
has what several of them use: the micro-batch, draws of stochastic depth, sums over processes with gradients.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..data.batches import NUM_DRAWS, AugmentationConfig, Columns, augment_images
from ..runtime.processes import this_process
from ..runtime.reproducibility import draw_for_positions
from ..training.compilation import compile_modules, keep_rows_unpadded

if TYPE_CHECKING:
    from ..models.autoencoder_vtp import AutoencoderVTP
    from ..models.vtp_model import VTPModel
    from ..training.loop import TrainingRun

COMPILED_SHAPES = 64  # of a block: one for each objective's batch, with and without gradients
STACKS = ("VTPEncoder", "VTPTextModel", "ReconstructionObjective")
MAX_BLOCK = 1024  # longest block of `share_block`
# Streams of random numbers: see `draw_for_positions` and `step_generator`.
AUGMENTATION, NOISE, CROPS, SHARES, KEPT = range(5)
# Parts of the autoencoder that only some objectives train, else frozen: DDP fails at a parameter without gradient.
OPTIONAL_PARTS = ("encoder.embeddings.mask_token", "bottleneck", "decoder")


class Objective(nn.Module):
    """Base class of the objectives of `VTPForPreTraining`; `forward(autoencoder, **inputs)` returns named scalars,
    "loss" among them.

    Attributes:
        config: with `weight`, and `share` where only a part of the batch is taken.
        place: position in the order of the backward passes. Reconstruction has many small kernels, which run faster
            than they are launched. After the contrastive objective, whose kernels are the longest, that takes no time.
        trains: which of `OPTIONAL_PARTS` get a gradient from it.
        compiled_alone: whether it is compiled as one graph if it is the only objective, in a single process.
    """

    place = 0
    trains: tuple[str, ...] = ()
    compiled_alone = False

    @classmethod
    def build(cls, config: Any, model: "AutoencoderVTP | VTPModel") -> "Objective":
        """The objective for a model, which is a VTPModel if captions are trained on."""
        return cls(config, model)

    def draw_inputs(self, batch: "MicroBatch", autoencoder: "AutoencoderVTP") -> dict[str, torch.Tensor]:
        """The inputs of `forward` from a micro-batch, everything random in them keyed by the samples' positions."""
        raise NotImplementedError

    def flops(self, autoencoder: "AutoencoderVTP", resolution: int) -> float:
        """Useful floating-point operations of a step, divided by the images of its batch: what the objective asks for,
        not what is recomputed, padded or done for the sake of speed."""
        raise NotImplementedError

    def compile_parts(self, stacks: bool) -> None:
        """Compile slow parts that are no blocks. Args: `stacks`: as of the function `compile_parts`."""

    def after_step(self, done: float, counted: torch.Tensor | None = None) -> None:
        """Updates after a step of the optimiser, such as that of a teacher.

        Args: `done`: share of training that was done before this step; `counted`: as `TrainingRun.optimise` returns
            it, None if no step can be skipped.
        """


class MicroBatch:
    """A batch on the device, and the random numbers that its objectives draw. What happens to a sample depends on the
    seed and its position in the run alone, so that a resumed run goes on bit for bit and several processes do what one
    does. The exception is stochastic depth, which is drawn for the whole batch of a process.

    Args:
        columns: "image" uint8 (B, 3, R, R) and, with captions, "token_ids" (B, L) and "paired" (B,) bool.
        augmentation: of `augmented`; self-supervision has its own.
    """

    def __init__(self, run: "TrainingRun", micro_step: int, columns: Columns, augmentation: AugmentationConfig):
        self.run, self.micro_step, self.columns, self.augmentation = run, micro_step, columns, augmentation
        self.images: torch.Tensor = columns["image"]
        self.positions, self.device = run.positions(micro_step), run.device
        self.generator = run.generator(micro_step, KEPT)

    @cached_property
    def augmented(self) -> torch.Tensor:
        """Images (B, 3, R, R) in [-1, 1], changed as the configuration says."""
        draws = self.draw(lambda n, g: {"draws": torch.rand(n, NUM_DRAWS, generator=g, device=g.device)}, AUGMENTATION)
        return augment_images(self.images, self.augmentation, draws=draws["draws"])

    @property
    def done(self) -> float:
        """Share of training that was done before this step."""
        config = self.run.config
        return self.micro_step // config.gradient_accumulation_steps / config.max_train_steps

    def draw(self, draw: Callable, stream: int, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """`draw_for_positions` of every sample of the batch, on its device or another."""
        return draw_for_positions(draw, self.positions, self.run.config.seed, stream, device or self.device)

    def chosen(self, share: float, which: int) -> torch.Tensor:
        """Indices on the CPU of a random share of the batch. Args: `which`: 0 or 1, of two independent choices."""
        if share == 1:
            return torch.arange(len(self.positions))
        # On the CPU: masks are drawn there and need the indices too, without waiting for the device.
        drawn = self.draw(lambda n, g: {"scores": torch.rand(n, 2, generator=g)}, SHARES, device="cpu")
        return choose_share(drawn["scores"][:, which], share)


def share_block(share: float) -> tuple[int, int]:
    """(k, n): of every n consecutive samples k belong to a share of the batch, n as small as possible."""
    fraction = Fraction(share).limit_denominator(MAX_BLOCK)
    return fraction.numerator, fraction.denominator


def check_share(name: str, share: float, batch_size: int) -> None:
    """Raises: ValueError unless a share of a batch, or of a process's part of it in a micro-step, is a whole number of
    samples in every block (`share_block`)."""
    k, n = share_block(share)
    if k == 0:
        raise ValueError(f"{name}.share is {share}, expected at least 1 sample in {MAX_BLOCK}")
    if batch_size % n:
        raise ValueError(
            f"{name}.share is {share} ({k} of {n}) of a batch of {batch_size} images a process and micro-step, "
            f"expected a multiple of {n}, so that each has as many of them"
        )


def choose_share(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Indices of a random share of the samples, in order: in every block those with the lowest scores (N,)."""
    k, n = share_block(share)
    blocks = rearrange(scores, "(blocks n) -> blocks n", n=n)
    chosen = blocks.argsort(dim=1, stable=True)[:, :k].sort(dim=1).values  # (N/n, k)
    return (chosen + torch.arange(0, len(scores), n)[:, None]).flatten()


def draw_kept(
    count: int, num_layers: int, rate: float, generator: torch.Generator, name: str = "kept"
) -> dict[str, torch.Tensor]:
    """Under `name` a random subset of `count` samples for the two branches of every layer, (layers, 2, K) int64 on the
    generator's device; nothing at rate 0. The rate is the same in all layers, as in DINOv2's published configuration.
    """
    if rate == 0 or count == 0:
        return {}
    noise = torch.rand(num_layers, 2, count, generator=generator, device=generator.device)
    kept = max(int(count * (1 - rate)), 1)  # DINOv2's rule
    return {name: noise.argsort(dim=-1)[..., :kept]}


def num_processes() -> int:
    """Processes that train together; 1 without torch.distributed, whatever the launcher says."""
    return this_process()[1] if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    return this_process()[0] if num_processes() > 1 else 0


@torch.compiler.disable
def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Sum of the processes' tensors of one shape, without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def total(x: torch.Tensor) -> torch.Tensor:
    """`sum_over_processes`; with one process x itself, detached, which does not break a compiled graph."""
    return sum_over_processes(x) if num_processes() > 1 else x.detach()


class _Gather(torch.autograd.Function):
    """Forward: the rows of all processes. Backward: the sum over all processes of the gradients of this one's rows."""

    @staticmethod
    def forward(ctx, x):
        gathered = x.new_empty(num_processes() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        ctx.rows = len(x)
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        first = process_index() * ctx.rows
        return gradient[first : first + ctx.rows]


_gather = torch.compiler.disable(_Gather.apply)


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows (B, ...) of every process, in the order of the processes: (processes · B, ...), with gradients.

    When every process takes the mean over its own rows as its loss, and the gradients of the processes are averaged
    (as distributed data parallelism does), the result is the gradient of the mean over all rows. B must be the same in
    all of them.
    """
    return _gather(x) if num_processes() > 1 else x


class VTPForPreTraining(nn.Module):
    """A tokenizer and its objectives.

    Args:
        autoencoder: the tokenizer.
        objectives: name -> `Objective`, in the order in which they draw random numbers.
    """

    def __init__(self, autoencoder: "AutoencoderVTP", objectives: dict[str, Objective]):
        super().__init__()
        if not objectives:
            raise ValueError("pre-training needs at least one objective")
        self.autoencoder = autoencoder
        self.objectives = nn.ModuleDict(objectives)
        trained = {name for objective in objectives.values() for name in objective.trains}
        for name in set(OPTIONAL_PARTS) - trained:
            parent, _, attribute = name.rpartition(".")
            getattr(autoencoder.get_submodule(parent), attribute).requires_grad_(False)

    def forward(self, **inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`<objective>/<loss>` -> scalar, and "loss": the weighted sum over objectives (arXiv:2512.13687).

        Args: `inputs`: objective name -> its inputs; of one objective only, if each has its own backward pass.
        """
        return self.losses(inputs)

    def losses(self, inputs: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`forward` without accelerate's wrapper: the function that is compiled."""
        losses, total = {}, 0.0
        for name, arguments in inputs.items():
            objective = self.objectives[name]
            parts = objective(self.autoencoder, **arguments)
            total = total + objective.config.weight * parts["loss"]
            losses |= {f"{name}/{key}": value for key, value in parts.items() if key != "loss"}
        return losses | {"loss": total}

    def draw_inputs(self, batch: MicroBatch) -> dict[str, dict[str, torch.Tensor]]:
        """Inputs of every objective from a batch on the device."""
        return {name: part.draw_inputs(batch, self.autoencoder) for name, part in self.objectives.items()}

    def one_by_one(self, inputs: dict[str, dict[str, torch.Tensor]]) -> list[dict[str, dict[str, torch.Tensor]]]:
        """Inputs of `forward` split by objective, in the order of their backward passes. A step then takes the memory
        of the largest objective, not of all."""
        return [{name: inputs[name]} for name in sorted(inputs, key=lambda name: self.objectives[name].place)]

    def flops(self, resolution: int) -> dict[str, float]:
        """Objective -> useful floating-point operations of a step, divided by the images of its batch."""
        return {name: part.flops(self.autoencoder, resolution) for name, part in self.objectives.items()}

    def after_step(self, done: float, counted: torch.Tensor | None = None) -> None:
        """`Objective.after_step` of every objective."""
        for objective in self.objectives.values():
            objective.after_step(done, counted)


def compile_parts(objective: VTPForPreTraining, stacks: bool = False) -> None:
    """Compile the slow parts. Reconstruction alone becomes one graph. Otherwise blocks, losses over prototypes and
    LPIPS are compiled one by one, since one graph of three objectives would take longer to compile than small models
    take to train. With several processes it is always one by one, see `compile_modules`.

    Args: `stacks`: compile whole encoders, text towers and reconstructions instead of blocks.
    """
    from ..models.fused_vtp import cuda_kernels, use_large_products
    from ..models.vtp_model import VTPModel

    use_large_products(objective, cuda_kernels())
    parts = list(objective.objectives.values())
    if len(parts) == 1 and parts[0].compiled_alone and this_process()[1] == 1:
        keep_rows_unpadded()
        objective.losses = torch.compile(objective.losses)
        return
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    compile_modules(objective, STACKS if stacks else VTPModel._repeated_blocks)
    for part in parts:
        part.compile_parts(stacks)


def _recomputed(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    # Nothing in a block is random: the state of the generators, which cannot be read while a CUDA graph is recorded,
    # need not be saved.
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def checkpoint_blocks(model: "AutoencoderVTP | VTPModel", share: float) -> None:
    """Recompute the activations of a share of the blocks of every stack in the backward pass: less memory, but that
    share of the forward pass is run twice. Raises: ValueError if the share rounds to no block of any stack."""
    model.enable_gradient_checkpointing(_recomputed)
    stacks = [module for module in model.modules() if hasattr(module, "checkpointed_blocks")]
    for stack in stacks:
        stack.checkpointed_blocks = round(share * len(stack.blocks))
    if not any(stack.checkpointed_blocks for stack in stacks):
        raise ValueError(
            f"checkpointed_share is {share}, expected at least half a block of one stack "
            f"({', '.join(str(len(stack.blocks)) for stack in stacks)} blocks)"
        )
