"""Training a VTP tokenizer: the autoencoder and its objectives (arXiv:2512.13687).

An objective is a module that takes the autoencoder and its own inputs and returns named losses. `VTPForPreTraining`
runs those it was given and adds them up, so that another objective is one more entry.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..models.autoencoder_vtp import AutoencoderVTP
from ..models.vtp_blocks import use_large_products
from ..models.vtp_model import VTPModel
from ..runtime.processes import this_process
from ..training.compilation import compile_modules, keep_rows_unpadded
from .reconstruction import ReconstructionObjective
from .self_supervision import SelfSupervisionObjective

COMPILED_SHAPES = 64  # of a block: one for each objective's batch, with and without gradients
STACKS = ("VTPEncoder", "VTPTextModel", "ReconstructionObjective")
# Reconstruction's many small kernels run faster than they are launched: before it the GPU needs work in its queue, and
# the long kernels of the contrastive objective are the most.
ORDER = ("contrastive", "reconstruction", "self_supervision")


class VTPForPreTraining(nn.Module):
    """A tokenizer and what it is trained for.

    Args:
        autoencoder: the tokenizer.
        objectives: name -> module, called as `module(autoencoder, **inputs[name])`, returning named scalar losses with
            "loss" among them; its `config.weight` says how much it counts.
    """

    def __init__(self, autoencoder: AutoencoderVTP, objectives: dict[str, nn.Module]):
        super().__init__()
        if not objectives:
            raise ValueError("pre-training needs at least one objective")
        self.autoencoder = autoencoder
        self.objectives = nn.ModuleDict(objectives)
        # Distributed training stops at a parameter that gets no gradient.
        if "self_supervision" not in objectives:
            autoencoder.encoder.embeddings.mask_token.requires_grad_(False)
        if "reconstruction" not in objectives:
            autoencoder.bottleneck.requires_grad_(False)
            autoencoder.decoder.requires_grad_(False)

    def forward(self, **inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`<objective>/<loss>` -> scalar, and "loss": the weighted sum over objectives (arXiv:2512.13687).

        Args: `inputs`: objective name -> its inputs; of some only, where each is passed backwards by itself.
        """
        return self.losses(inputs)

    def losses(self, inputs: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`forward` without what accelerate wraps around it: what a program compiles."""
        losses, total = {}, 0.0
        for name, arguments in inputs.items():
            objective = self.objectives[name]
            parts = objective(self.autoencoder, **arguments)
            total = total + objective.config.weight * parts["loss"]
            losses |= {f"{name}/{key}": value for key, value in parts.items() if key != "loss"}
        return losses | {"loss": total}

    def after_step(self, done: float, counted: torch.Tensor | None = None) -> None:
        """What objectives do after a step of the optimiser: clamp a scale, move the teacher, take centres back.

        Args: `done`: share of training that was done before this step; `counted`: as `TrainingRun.optimise` returns
            it, None where no step is left out.
        """
        for objective in self.objectives.values():
            if hasattr(objective, "after_step"):
                objective.after_step(done, counted)


def one_by_one(inputs: dict[str, dict[str, torch.Tensor]]) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Inputs of `VTPForPreTraining` as those of every objective alone, in the order of passing them backwards. The
    memory of a step is then that of the largest, not of all."""
    return [{name: inputs[name]} for name in sorted(inputs, key=ORDER.index)]


def compile_parts(objective: VTPForPreTraining, stacks: bool = False) -> None:
    """Compile what takes the time: all of the reconstruction where it is alone, else the blocks, the losses over
    prototypes and LPIPS one by one, since one graph of three objectives would take longer to compile than small models
    take to train. Several processes do that in any case, see `compile_modules`.

    Args: `stacks`: whole encoders, text towers and reconstructions instead of blocks.
    """
    use_large_products(objective)
    if list(objective.objectives) == ["reconstruction"] and this_process()[1] == 1:
        keep_rows_unpadded()
        objective.losses = torch.compile(objective.losses)
        return
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    compile_modules(objective, STACKS if stacks else VTPModel._repeated_blocks)
    for part in objective.objectives.values():
        if isinstance(part, SelfSupervisionObjective):
            part.compare = torch.compile(part.compare, dynamic=False)
            part.centred = torch.compile(part.centred, dynamic=False)
            part.recolour_views = torch.compile(part.recolour_views, dynamic=False)
        elif isinstance(part, ReconstructionObjective) and part.perceptual is not None and not stacks:
            part.perceptual.compile(dynamic=False)


def _recomputed(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    # Nothing in a block is random: no state of generators has to be kept, which nobody can read while a CUDA graph is
    # recorded.
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def checkpoint_blocks(model: AutoencoderVTP | VTPModel, share: float) -> None:
    """Recompute the activations of a share of the blocks of every stack in the backward pass: less memory, and as much
    more of the forward pass. Raises: ValueError if that is no block of any stack."""
    model.enable_gradient_checkpointing(_recomputed)
    stacks = [module for module in model.modules() if hasattr(module, "checkpointed_blocks")]
    for stack in stacks:
        stack.checkpointed_blocks = round(share * len(stack.blocks))
    if not any(stack.checkpointed_blocks for stack in stacks):
        raise ValueError(
            f"a share of {share} of the blocks is to be recomputed, which is less than half a block of every stack "
            f"({', '.join(str(len(stack.blocks)) for stack in stacks)} blocks)"
        )
