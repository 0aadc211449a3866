"""The self-supervised objective: DINO self-distillation and iBOT's masked patches with an averaged teacher, as DINOv2
combines them (arXiv:2304.07193; DINO, arXiv:2104.14294; iBOT, arXiv:2111.07832).

The VTP paper (arXiv:2512.13687) says "following DINOv2" and gives the head. Every other default here is DINOv2's
published one (`ssl_default_config.yaml`), unless its help text says otherwise. The headers of train_vtp/configs list
what is left out of DINOv2.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..data.images import to_device
from ..runtime.config import Settings, setting
from ..runtime.reproducibility import random_stream
from ..training.optimisation import cosine_at
from .crops import MIN_MASK_GRID, CropConfig, block_mask, draw_crops, make_crops, recolour_views
from .flops import encoder_flops, linear_parameters
from .joint import CROPS, MicroBatch, Objective, draw_kept, gather_rows, num_processes, process_index, total

if TYPE_CHECKING:
    from ..models.autoencoder_vtp import AutoencoderVTP
    from ..models.vtp_model import VTPModel

STUDENT_TEMPERATURE = 0.1
CENTER_MOMENTUM = 0.9
SINKHORN_ITERATIONS = 3


@dataclass(kw_only=True)
class SelfSupervisionConfig(Settings):
    """Self-distillation between views. Weight, share of the batch and the head's sizes are the VTP paper's."""

    weight: float = setting(1.0, "weight of this objective; 1 in the paper", above=0)
    share: float = setting(0.25, "share of the batch, at random; the paper's 4k of 16k", above=0, at_most=1)
    crops: CropConfig = setting(default_factory=CropConfig)
    head_layers: int = setting(3, "layers of the head's MLP; 3 in the paper", at_least=2)
    head_hidden_size: int = setting(2048, "width of the head's MLP; 2048 in the paper", at_least=1)
    head_bottleneck: int = setting(256, "width before the prototypes; 256 in the paper", at_least=1)
    prototypes: int = setting(65536, "outputs of the head", at_least=1)
    centering: Literal["centering", "sinkhorn_knopp"] = setting("centering", "keeps the teacher from collapsing")
    dino_weight: float = setting(1.0, "weight of the loss on class tokens", at_least=0)
    ibot_weight: float = setting(1.0, "weight of the loss on masked patches", at_least=0)
    koleo_weight: float = setting(0.1, "weight of the loss that spreads class tokens out; 0 is off", at_least=0)
    masked_crops: float = setting(0.5, "share of every image's global crops that are masked", above=0, at_most=1)
    mask_ratio: tuple[float, float] = setting(
        (0.1, 0.5), "smallest and largest share of patches that a mask hides", above=0, below=1, ordered=True
    )
    stochastic_depth: float = setting(
        0.3, "drop path: share of samples that skip a residual branch (student)", at_least=0, below=1
    )
    teacher_momentum: tuple[float, float] = setting(
        (0.992, 1.0), "at the start and the end, along a cosine", at_least=0, at_most=1
    )
    teacher_temperature: tuple[float, float] = setting((0.04, 0.07), "at the start and after the warm-up", above=0)
    temperature_warmup: float = setting(0.3, "share of training; DINOv2: 30 of 100 epochs", at_least=0, at_most=1)
    freeze_last_layer: float = setting(
        0.01, "first share of training, with frozen prototypes; DINOv2: 1 of 100 epochs", at_least=0, at_most=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dino_weight + self.ibot_weight == 0:
            raise ValueError("self_supervision: dino_weight or ibot_weight must be positive")
        masked = self.masked_crops * self.crops.global_crops
        if masked != round(masked):
            raise ValueError(
                f"self_supervision.masked_crops is {self.masked_crops} of {self.crops.global_crops} global crops, "
                "expected a whole number of them"
            )

    def check_sizes(self, resolution: int, patch: int) -> None:
        """Raises: ValueError unless crops are whole patches and a block of masked patches fits into a global crop."""
        large = self.crops.global_size or resolution
        for name, size in (("global_size", large), ("local_size", self.crops.local_size)):
            if size % patch:
                raise ValueError(
                    f"self_supervision.crops.{name} is {size}, expected a multiple of model.patch_size, {patch}"
                )
        if self.ibot_weight > 0 and large < MIN_MASK_GRID * patch:
            raise ValueError(
                f"self_supervision.crops.global_size is {large} ({resolution} is data.resolution), expected "
                f"{MIN_MASK_GRID} patches of {patch} or more: no block of masked patches fits into fewer"
            )

    def momentum_at(self, done: float) -> float:
        """The teacher's momentum after a share of training: a cosine from the first value to the last."""
        return cosine_at(done, *self.teacher_momentum)

    def temperature_at(self, done: float) -> float:
        """The teacher's temperature after a share of training: linear up to the end of the warm-up, then constant."""
        first, last = self.teacher_temperature
        return last if done >= self.temperature_warmup else first + (last - first) * done / self.temperature_warmup


class DINOHead(nn.Module):
    """MLP, L2 normalisation, cosines with the prototypes: DINO's weight-normed last layer, all lengths fixed at 1."""

    def __init__(self, hidden_size: int, config: SelfSupervisionConfig):
        super().__init__()
        inner = [config.head_hidden_size] * (config.head_layers - 1)
        widths, layers = [hidden_size, *inner, config.head_bottleneck], []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = nn.Linear(config.head_bottleneck, config.prototypes, bias=False)
        from ..models.vtp_blocks import initialise_weights  # imports diffusers, which a configuration does not need

        self.apply(initialise_weights)

    def forward(self, x: torch.Tensor, learning: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Tokens (N, D) -> cosines (N, K) with the prototypes.

        Args: `learning`: factor on the gradient of the prototypes; 0 freezes them. (Weight decay changes only their
            lengths, which are normalised away.)
        """
        x = F.normalize(self.mlp(x), dim=-1, eps=1e-6)
        weight = self.prototypes.weight
        weight = weight.detach() + learning * (weight - weight.detach())
        return F.linear(x, F.normalize(weight, dim=-1).to(x.dtype))


def sinkhorn_knopp(logits: torch.Tensor, temperature: float | torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Targets whose prototypes are used equally often (SwAV, arXiv:2006.09882): exp(logits / temperature), normalised
    in turns so that prototypes have equal mass and every sample sums to 1, over the samples of all processes.

    Args: `logits`: (N, K); `valid`: (N,) 1, or 0 for rows of padding, whose targets are 0.
    Returns: (N, K) float32.
    """
    # Subtracting the largest logit changes nothing after normalisation, and exp cannot overflow.
    top = logits.float().masked_fill(valid[:, None] == 0, -torch.inf).max()
    if num_processes() > 1:
        top = gather_rows(top[None]).max()
    top = top.masked_fill(top == -torch.inf, 0.0)  # no row is valid
    q = torch.exp((logits.float() - top) / temperature) * valid[:, None]
    count = total(valid.sum()).clamp(min=1)
    q = q / total(q.sum()).clamp(min=1e-30)
    for _ in range(SINKHORN_ITERATIONS):
        q = q / total(q.sum(0)).clamp(min=1e-30) / q.shape[1]
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30) / count
    return q * count


def dino_loss(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean over images and over all pairs of a teacher's global view and another view of the student.

    Args:
        targets: (G, B, K) of the teacher's global views.
        logits: (V, B, K) of the student's views, the same global ones first.
    """
    # log softmax = logits - their logsumexp, so that one product of views serves every pair
    scaled = logits.float() / STUDENT_TEMPERATURE
    log_sum = scaled.logsumexp(-1)  # (V, B)
    with torch.autocast(logits.device.type, enabled=False):
        products = torch.einsum("gbk,vbk->gvb", targets, scaled)
    pairs = log_sum[None] * targets.sum(-1)[:, None] - products
    different = ~torch.eye(*pairs.shape[:2], dtype=torch.bool, device=pairs.device)
    return (pairs.mean(-1) * different).sum() / different.sum()


def ibot_loss(targets: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, num_crops: int) -> torch.Tensor:
    """Cross-entropy of masked patches, averaged over the patches of a crop, then over all global crops, those without
    a mask included (DINOv2's normalisation).

    Args: `targets`, `logits`: (M, K); `weights`: (M,) 1 / (masked patches of the crop), 0 for padding.
    """
    losses = -(targets * (logits.float() / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1)  # (M,)
    return (losses * weights).sum() / num_crops


def koleo_loss(features: torch.Tensor) -> torch.Tensor:
    """Kozachenko-Leonenko estimator of minus the entropy (arXiv:1806.03198): mean of -log distance to the nearest
    other feature, on the unit sphere. The neighbours are those of all processes.

    Args: `features`: (B, D).
    """
    own = F.normalize(features.float(), dim=-1, eps=1e-8)
    every = gather_rows(own)
    with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
        similarity = own @ every.T
        similarity.diagonal(process_index() * len(own)).fill_(-2.0)
        nearest = similarity.argmax(1)
    distance = F.pairwise_distance(own, every[nearest], eps=1e-8)
    return -(distance + 1e-8).log().mean()


class SelfSupervisionObjective(Objective):
    """Student, teacher and their heads.

    Args:
        config: losses, views, schedules.
        model: the autoencoder, or what holds it; its encoder is the student, the teacher a copy of it.
    """

    place, trains = 2, ("encoder.embeddings.mask_token",)

    def __init__(self, config: SelfSupervisionConfig, model: "AutoencoderVTP | VTPModel"):
        super().__init__()
        autoencoder = getattr(model, "autoencoder", model)
        self.config, self.depth = config, autoencoder.config.encoder_num_layers
        self.recolour_views = recolour_views  # for `make_crops`
        self.head = DINOHead(autoencoder.config.encoder_hidden_size, config)
        self.teacher_encoder = copy.deepcopy(autoencoder.encoder).requires_grad_(False)
        self.teacher_encoder.gradient_checkpointing = False
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        for name in ("dino_center", "ibot_center"):
            if config.centering == "centering":
                self.register_buffer(name, torch.zeros(config.prototypes))
        self._student_encoder = [autoencoder.encoder]  # in a list, so that it is no submodule of this module
        self._centers_before: dict[str, torch.Tensor] = {}  # before the step; empty until a step has moved them

    def draw_inputs(self, batch: MicroBatch, autoencoder: "AutoencoderVTP") -> dict[str, torch.Tensor]:
        config, device = self.config, batch.device
        chosen = batch.chosen(config.share, which=0)
        rows = to_device(chosen, device)
        draws = batch.draw(lambda n, g: draw_crops(config.crops, n, g), CROPS)["crops"]
        global_crops, local_crops = make_crops(batch.images[rows], config.crops, draws[rows], self.recolour_views)
        side, seed = global_crops.shape[-1] // autoencoder.spatial_compression_ratio, batch.run.config.seed
        masks = np.stack([self.draw_masks((side, side), batch.positions[k], seed) for k in chosen.tolist()])
        inputs = {name: to_device(value, device) for name, value in self.mask_inputs(masks).items()}
        inputs["temperature"] = torch.full((), config.temperature_at(batch.done), device=device)
        inputs["prototypes_learn"] = torch.full((), float(batch.done >= config.freeze_last_layer), device=device)
        inputs |= self.draw_kept(len(chosen), batch.generator)
        return inputs | {"global_crops": global_crops, "local_crops": local_crops}

    def flops(self, autoencoder: "AutoencoderVTP", resolution: int) -> float:
        """The student's passes with gradients count three times, the teacher's once; masked patches are counted at the
        mean of the ratio."""
        config, crops = self.config, self.config.crops
        size = crops.global_size or resolution
        patches = (size // autoencoder.config.patch_size) ** 2
        masked = config.masked_crops * crops.global_crops * sum(config.mask_ratio) / 2 * patches
        rate, head = config.stochastic_depth, 2 * linear_parameters(self.head)
        student = crops.global_crops * encoder_flops(autoencoder, size, rate)
        student += crops.local_crops * encoder_flops(autoencoder, crops.local_size, rate)
        student += head * (crops.global_crops + crops.local_crops + masked)
        teacher = crops.global_crops * (encoder_flops(autoencoder, size) + head) + head * masked
        return config.share * (3 * student + teacher)

    def compile_parts(self, stacks: bool) -> None:
        """The losses over prototypes, whose logits are large, and the colours of crops: all bound by memory."""
        self.compare = torch.compile(self.compare, dynamic=False)
        self.centred = torch.compile(self.centred, dynamic=False)
        self.recolour_views = torch.compile(self.recolour_views, dynamic=False)

    def draw_kept(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Which crops of `count` images stochastic depth keeps: "kept_global" and "kept_local"."""
        rate, crops = self.config.stochastic_depth, self.config.crops
        kept = draw_kept(count * crops.global_crops, self.depth, rate, generator, "kept_global")
        return kept | draw_kept(count * crops.local_crops, self.depth, rate, generator, "kept_local")

    def draw_masks(self, grid: tuple[int, int], position: int, seed: int) -> np.ndarray:
        """Masks (G, rows, columns) of one image's global crops: which crops, what share and which blocks depend on the
        seed and the image's position in the run."""
        config, current = self.config, self.config.crops.recipe == "dinov2"
        random = random_stream("masks", seed, position) if current else np.random.default_rng([seed, position, 1])
        number = config.crops.global_crops
        masks = np.zeros((number, *grid), dtype=bool)
        for crop in random.permutation(number)[: round(config.masked_crops * number)]:
            count = int(random.uniform(*config.mask_ratio) * masks[crop].size)
            masks[crop] = block_mask(grid, count, random, small_blocks=current)
        return masks

    def mask_inputs(self, masks: np.ndarray) -> dict[str, torch.Tensor]:
        """Masks (B, G, rows, columns) as the inputs "masks" (G·B, N) bool, "masked" (M,) indices into the G·B·N
        patches and "mask_weights" (M,) of `forward`. M depends on the sizes only: the rest is padding of weight 0."""
        flat = rearrange(masks, "b g rows columns -> (g b) (rows columns)")  # (G·B, N)
        most = round(self.config.masked_crops * len(flat)) * max(1, int(self.config.mask_ratio[1] * flat.shape[1]))
        masked = np.flatnonzero(flat)
        weights = (1 / np.maximum(flat.sum(1), 1)).repeat(flat.shape[1])[masked]
        padding = (0, most - len(masked))
        return {
            "masks": torch.from_numpy(flat),
            "masked": torch.from_numpy(np.pad(masked, padding)),
            "mask_weights": torch.from_numpy(np.pad(weights, padding).astype(np.float32)),
        }

    def targets(self, logits: torch.Tensor, temperature: torch.Tensor, name: str, valid: torch.Tensor) -> torch.Tensor:
        """The teacher's distributions (N, K) float32; in training the centre is updated.

        Args: `logits`: (N, K) of the teacher; `name`: dino or ibot; `valid`: (N,) 1 or 0 for padding.
        """
        if self.config.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits, temperature, valid)
        center = getattr(self, f"{name}_center")
        targets, summed = self.centred(logits, center, temperature, valid)
        mean = total(summed) / total(valid.sum()).clamp(min=1)
        if self.training:
            if name not in self._centers_before:
                self._centers_before[name] = center.clone()
            # a NaN in the centre would spread to the targets of the next micro-step
            mean = torch.where(mean.isfinite(), mean, center)
            center.copy_(center * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM))
        return targets

    def centred(self, logits, center, temperature, valid) -> tuple[torch.Tensor, torch.Tensor]:
        """Distributions (N, K) of the logits without the centre (K,), and the sum (K,) of the valid logits, float32.

        A method of its own, since it is compiled.
        """
        targets = ((logits.float() - center) / temperature).softmax(-1)
        return targets, (logits.float() * valid[:, None]).sum(0)

    @torch.no_grad()
    def teach(self, global_crops, masked, mask_weights, temperature) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets (G, B, K) of class tokens and (M, K) of masked patches, from unmasked global crops."""
        from ..models.autoencoder_vtp import normalize_images  # imports diffusers, which a configuration does not need

        tokens = self.teacher_encoder(normalize_images(global_crops))[0]
        patches = tokens[:, 1:].flatten(0, 1).index_select(0, masked)
        class_tokens = tokens[:, 0]
        logits = self.teacher_head(torch.cat([class_tokens, patches]))
        class_logits, patch_logits = logits.split([len(class_tokens), len(patches)])
        every = mask_weights.new_ones(len(class_tokens))
        dino = self.targets(class_logits, temperature, "dino", every)
        ibot = self.targets(patch_logits, temperature, "ibot", (mask_weights > 0).float())
        return dino.unflatten(0, (self.config.crops.global_crops, -1)), ibot

    def compare(self, views, patches, dino_targets, ibot_targets, mask_weights, prototypes_learn) -> dict:
        """The losses "dino" and "ibot" of class tokens (V·B, D) and masked patches (M, D) against their targets.

        A method of its own, since it is compiled.
        """
        # One pass of the shared head for class tokens and patches.
        logits = self.head(torch.cat([views, patches]), prototypes_learn)
        view_logits, patch_logits = logits.split([len(views), len(patches)])
        crops, count = dino_targets.shape[:2]
        return {
            "dino": dino_loss(dino_targets, view_logits.unflatten(0, (-1, count))),
            "ibot": ibot_loss(ibot_targets, patch_logits, mask_weights, crops * count),
        }

    def forward(
        self,
        autoencoder: "AutoencoderVTP",
        global_crops: torch.Tensor,
        local_crops: torch.Tensor,
        masks: torch.Tensor,
        masked: torch.Tensor,
        mask_weights: torch.Tensor,
        temperature: torch.Tensor,
        prototypes_learn: torch.Tensor,
        kept_global: torch.Tensor | None = None,
        kept_local: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Named scalars; "loss" is what is minimised.

        Args:
            global_crops: (G·B, 3, S, S), local_crops: (L·B, 3, s, s) in [-1, 1], see `make_crops`.
            masks, masked, mask_weights: see `mask_inputs`.
            temperature: of the teacher, a scalar tensor; prototypes_learn: 1, or 0 while the last layer is frozen.
            kept_global, kept_local: see `draw_kept`.
        """
        config, number = self.config, self.config.crops.global_crops
        dino_targets, ibot_targets = self.teach(global_crops, masked, mask_weights, temperature)
        tokens = autoencoder.encode_tokens(global_crops, masks=masks, kept=kept_global)  # (G·B, 1 + N, D)
        class_tokens = views = tokens[:, 0]
        if len(local_crops):
            views = torch.cat([views, autoencoder.encode_tokens(local_crops, kept=kept_local)[:, 0]])
        patches = tokens[:, 1:].flatten(0, 1).index_select(0, masked)
        losses = self.compare(views, patches, dino_targets, ibot_targets, mask_weights, prototypes_learn)
        loss = config.dino_weight * losses["dino"] + config.ibot_weight * losses["ibot"]
        if config.koleo_weight > 0:
            losses["koleo"] = sum(koleo_loss(part) for part in class_tokens.chunk(number)) / number
            loss = loss + config.koleo_weight * number * losses["koleo"]  # DINOv2 adds the crops up
        return losses | {"loss": loss} | entropies(dino_targets.flatten(0, 1))

    @torch.no_grad()
    def after_step(self, done: float, counted: torch.Tensor | None = None) -> None:
        """teacher = momentum · teacher + (1 - momentum) · student, after a step of the optimiser; after a skipped step
        the centres are restored.

        A skipped step moves the teacher too, since its momentum counts steps and the student is unchanged and finite.
        The centres come from inputs whose gradients were not finite, and may have moved in some places only.

        Args: as of `VTPForPreTraining.after_step`; the momentum depends on `done`.
        """
        for name, before in self._centers_before.items():
            center = getattr(self, f"{name}_center")
            if counted is not None:
                center.copy_(torch.where(counted > 0, center, before))
            before.copy_(center)  # in place, and here, since replaying a recorded forward pass runs no Python
        student = [*self._student_encoder[0].parameters(), *self.head.parameters()]
        teacher = [*self.teacher_encoder.parameters(), *self.teacher_head.parameters()]
        torch._foreach_lerp_(teacher, [p.detach() for p in student], 1 - self.config.momentum_at(done))


def entropies(targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Entropies in nats that show whether the teacher collapses, over all processes: the mean entropy of its
    distributions (N, K), 0 if all are one-hot, log K if all are uniform; and the entropy of their mean, 0 if all
    choose the same prototype."""
    count = total(targets.new_full((), len(targets)))
    mean = total(targets.sum(0)) / count
    return {
        "teacher_entropy": total(torch.special.entr(targets).sum()) / count,
        "mean_target_entropy": torch.special.entr(mean).sum(),
    }
