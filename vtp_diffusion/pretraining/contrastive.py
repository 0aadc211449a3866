"""The contrastive objective: images and their captions in one space (CLIP, arXiv:2103.00020; SigLIP,
arXiv:2303.15343), with the details of OpenCLIP, which the VTP paper (arXiv:2512.13687) follows."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime.config import Settings, setting
from .flops import encoder_flops, transformer_flops
from .joint import MicroBatch, Objective, draw_kept, gather_rows, process_index, total

if TYPE_CHECKING:
    from ..models.autoencoder_vtp import AutoencoderVTP
    from ..models.vtp_model import VTPModel

MAX_LOGIT_SCALE = 100.0  # of OpenCLIP and CLIP
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # initial values of SigLIP


@dataclass(kw_only=True)
class ContrastiveConfig(Settings):
    """Images against captions, on the whole batch. The weight is the paper's (arXiv:2512.13687)."""

    weight: float = setting(1.0, "weight of this objective; 1 in the paper", above=0)
    loss: Literal["clip", "sigmoid"] = setting("clip", "softmax (CLIP) or sigmoid (SigLIP)")
    stochastic_depth: float = setting(
        0.0, "drop path: share of samples that skip a residual branch; no source states it", at_least=0, below=1
    )


def clip_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor, paired: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy of scaled cosine similarities, each image's caption among all captions and the reverse.

    With several processes every one compares its own rows with the rows of all; the mean of their losses is the loss
    of the whole batch, and so are the gradients (see `gather_rows`).

    Args:
        image_features, text_features: (B, E) of length 1.
        scale: factor of the similarities, a scalar.
        paired: (B,) bool; rows without a caption take no part, neither as a pair nor as a negative.
    Returns: a scalar, 0 if no row is paired.
    """
    everywhere, own, count = _pairs(paired)
    losses = 0.0
    for rows, columns in ((image_features, text_features), (text_features, image_features)):
        with torch.autocast(rows.device.type, enabled=False):
            logits = scale * rows.float() @ gather_rows(columns).float().T  # (B, W·B)
        # A large negative number and not -inf: where nothing is paired, the difference of two would be NaN.
        logits = logits.masked_fill(~everywhere, torch.finfo(logits.dtype).min)
        each = F.cross_entropy(logits, own, reduction="none")
        losses = losses + torch.where(paired, each, 0.0).sum() / count
    return losses / 2


def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    paired: torch.Tensor,
) -> torch.Tensor:
    """Every image with every caption, a pair or not: -log sigmoid(±(scale · similarity + bias)), summed over captions
    and averaged over images (arXiv:2303.15343, algorithm 1).

    Args: as of `clip_loss`; `bias`: a scalar added to the similarities.
    """
    everywhere, own, count = _pairs(paired)
    with torch.autocast(image_features.device.type, enabled=False):
        logits = scale * image_features.float() @ gather_rows(text_features).float().T + bias  # (B, W·B)
    sign = 2 * F.one_hot(own, len(everywhere)) - 1
    losses = -F.logsigmoid(sign * logits)
    return torch.where(paired[:, None] & everywhere, losses, 0.0).sum() / count


def _pairs(paired: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`paired` of all processes (W·B,), the indices (B,) of this one's rows in it, and the mean pairs of a process."""
    everywhere = gather_rows(paired.float()) > 0
    own = torch.arange(len(paired), device=paired.device) + process_index() * len(paired)
    return everywhere, own, everywhere.sum().clamp(min=1) / (len(everywhere) / len(paired))


class ContrastiveObjective(Objective):
    """CLIP's objective on the class token before the bottleneck.

    Args:
        config: weight, form of the loss, stochastic depth.
        model: its autoencoder, text tower and projections are trained. The bias of the sigmoid loss belongs to the
            objective and is logged; `logits_per_image` lacks it, which does not change their order.
    """

    def __init__(self, config: ContrastiveConfig, model: "VTPModel"):
        super().__init__()
        self.config, self.model = config, model
        self.logit_bias = None
        if config.loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))
            nn.init.constant_(model.logit_scale, math.log(SIGMOID_SCALE))

    def draw_inputs(self, batch: MicroBatch, autoencoder: "AutoencoderVTP") -> dict[str, torch.Tensor]:
        texts = {name: batch.columns[name] for name in ("token_ids", "paired")}
        return {"images": batch.augmented} | texts | self.draw_kept(len(batch.images), batch.generator)

    def flops(self, autoencoder: "AutoencoderVTP", resolution: int) -> float:
        """Images and captions through their towers; a pass with its gradients counts as three forward passes."""
        text = self.model.text_model
        length, width = text.positional_embedding.shape
        tower = transformer_flops(text, length, width) + 2 * text.text_projection.numel()
        project = 2 * self.model.visual_projection.weight.numel()
        return 3 * (encoder_flops(autoencoder, resolution, self.config.stochastic_depth) + tower + project)

    def draw_kept(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The random inputs of `forward`: which of `count` samples stochastic depth keeps."""
        return draw_kept(count, self.model.config.encoder_num_layers, self.config.stochastic_depth, generator)

    def forward(
        self,
        autoencoder: "AutoencoderVTP",
        images: torch.Tensor,
        token_ids: torch.Tensor,
        paired: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Named scalars; "loss" is what is minimised.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            token_ids: (B, context length); arbitrary where there is no caption.
            paired: (B,) bool, False where there is no caption.
            kept: (layers, 2, K), see `residual_update`.
        """
        class_token = autoencoder.encode_tokens(images, kept=kept)[:, 0]
        image_features = F.normalize(self.model.visual_projection(class_token).float(), dim=-1)
        text_features = F.normalize(self.model.get_text_features(token_ids, normalize=False).float(), dim=-1)
        scale = self.model.logit_scale.exp()
        if self.logit_bias is None:
            loss = clip_loss(image_features, text_features, scale, paired)
        else:
            loss = sigmoid_loss(image_features, text_features, scale, self.logit_bias, paired)
        captions = total(paired.sum().float())
        statistics = {"logit_scale": scale.detach(), "captions": captions}
        if self.logit_bias is not None:
            statistics["logit_bias"] = self.logit_bias.detach()
        return {"loss": loss, self.config.loss: loss} | statistics

    @torch.no_grad()
    def after_step(self, done: float, counted: torch.Tensor | None = None) -> None:
        """Keep the scale of the similarities in [1, 100], as OpenCLIP does."""
        self.model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
