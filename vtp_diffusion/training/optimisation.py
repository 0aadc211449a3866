"""One step of the optimiser: learning rate, weight decay, clipping, skipped steps, EMA of the weights."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..runtime.processes import gather_objects
from .config import TrainingConfig
from .muon import BatchedMuon


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then constant or down to 0 at `max_train_steps`."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * factor[config.lr_scheduler]


def cosine_at(done: float, first: float, last: float) -> float:
    """A setting after a share of training, along a cosine from the first value to the last (DINO)."""
    return last - (last - first) * (math.cos(math.pi * done) + 1) / 2


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: matrices decay; biases, norm scales and single tokens do not.

    Returns: groups whose "decayed" says if `Optimisation.set_weight_decay` changes them.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.squeeze().ndim >= 2]
    others = [p for p in trained if p.squeeze().ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "decayed": True},
        {"params": others, "weight_decay": 0.0, "decayed": False},
    ]
    return [group for group in groups if group["params"]]


def muon_groups(model: nn.Module, module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """`parameter_groups` of `module`, but the matrices inside the blocks of `model` are a group for Muon.

    Raises: ValueError if there are none.
    """
    inside = {id(p) for block in getattr(model, "blocks", ()) for p in block.parameters() if p.ndim == 2}
    matrices = [p for p in module.parameters() if p.requires_grad and id(p) in inside]
    if not matrices:
        raise ValueError(f"optimizer is muon, but {type(model).__name__} has no blocks with matrices: expected adamw")
    groups = [{"params": matrices, "weight_decay": weight_decay, "decayed": True, "muon": True}]
    for group in parameter_groups(module, weight_decay):
        others = [p for p in group["params"] if id(p) not in inside]
        groups += [group | {"params": others}] if others else []
    return groups


class MuonWithAdamW(torch.optim.AdamW):
    """Muon for groups with "muon" true, AdamW for the others. Muon's updates have the root mean square of AdamW's
    (arXiv:2502.16982), so that one learning rate fits both."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        super().__init__(groups, **settings)
        for group in self.param_groups:
            group.setdefault("muon", False)
        for_muon = [group for group in self.param_groups if group["muon"]]
        self._muon = BatchedMuon(
            [{"params": group["params"]} for group in for_muon], momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        for group, muon in zip(for_muon, self._muon.param_groups, strict=True):
            group.update({key: value for key, value in muon.items() if key not in group})

    def step(self, closure: Any = None) -> None:
        """Both skip the step if `found_inf`, on the device, is 1."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = everything
        # at every step, since `load_state_dict`, which accelerate calls too, replaces groups and state
        self._muon.param_groups = [group for group in everything if group["muon"]]
        self._muon.state = self.state
        self._muon.found_inf = getattr(self, "found_inf", None)
        self._muon.step()


class AveragedWeights:
    """Exponential moving average of parameters, in float32 on their device: average += (1 - decay)(weights - average).

    The decay is constant from the first step, as in LightningDiT; diffusers' `EMAModel` copies the weights at its
    first step instead. `bias_correction` divides out what is left of the initial weights (as Adam does with its
    moments), which after N steps is decay**N: much, when N is a few multiples of 1 / (1 - decay).
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, bias_correction: bool = False):
        self.decay, self.bias_correction, self.step = decay, bias_correction, 0
        self.averages = [p.detach().clone().float() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[nn.Parameter]) -> None:
        """Average in the weights of one more step. Args: `parameters`: in the order in which the constructor took
        them."""
        self.step += 1
        weight = 1 - self.decay
        if self.bias_correction:
            weight /= 1 - self.decay**self.step
        torch._foreach_lerp_(self.averages, [p.detach() for p in parameters], weight)

    @contextlib.contextmanager
    def swapped_into(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Inside the context the parameters hold the averages, afterwards what they held before."""
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), self.averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(parameters), kept)


class Optimisation:
    """The optimiser, and averages (EMA) of the model that it trains.

    Args:
        groups: parameter groups of AdamW, or of Muon where `muon` is true. Besides settings of AdamW a group may have
            `lr_scale`, a factor on the learning rate; `network`, a name: the gradients of each network are clipped
            separately.
        accelerator: of the run; it prepares the objective and the optimiser.
        objective: module that holds the trained parameters.
        model: the model inside it whose weights are averaged; checkpoints call the averages `name`.

    Attributes:
        objective: as accelerate prepared it, to be called.
        optimizer: AdamW or `MuonWithAdamW`.
        parameters, trained: the model's trainable parameters; all trainable parameters.
        average: with `ema_decay`; `averages`: by name, this one and those of `ema_further_decays`.
        skipped: (2,) on the device, steps skipped because of non-finite gradients: in a row, in total.
    """

    def __init__(
        self,
        config: TrainingConfig,
        groups: list[dict[str, Any]],
        accelerator: Any,
        objective: nn.Module,
        model: nn.Module,
        name: str,
    ):
        self.config, self.accelerator = config, accelerator
        kind = MuonWithAdamW if any(group.get("muon") for group in groups) else torch.optim.AdamW
        self.optimizer = kind(
            groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,  # faster, and a flag on the device can make it skip a step (see `step`)
        )
        self.objective, self._prepared = accelerator.prepare(objective, self.optimizer)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.networks: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            self.networks.setdefault(group.get("network", ""), []).extend(group["params"])
        self.average = AveragedWeights(self.parameters, config.ema_decay, config.ema_bias_correction)
        self.averages = {name: self.average}
        for decay in config.ema_further_decays:
            self.averages[f"{name}_{decay}"] = AveragedWeights(self.parameters, decay, config.ema_bias_correction)
        self.skipped = torch.zeros(2, device=accelerator.device)

    def set_weight_decay(self, weight_decay: float) -> None:
        """Set the weight decay of the groups that decay."""
        for group in self.optimizer.param_groups:
            if group["decayed"]:
                group["weight_decay"] = weight_decay

    def all_finite(self) -> bool:
        """Whether all trained weights and averages are finite; waits for the device. With sharded weights every
        process has to call it."""
        values = [*self.trained, *(value for average in self.averages.values() for value in average.averages)]
        shards = [value.to_local() if isinstance(value, DTensor) else value for value in values]
        finite = bool(torch.stack([shard.isfinite().all() for shard in shards]).all())
        return all(gather_objects(finite)) if any(isinstance(value, DTensor) for value in values) else finite

    def step(self, learning_rate: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Clip, step, average. Returns the gradient norms, and 1, or 0 for a skipped step.

        A step is skipped, for all networks, if any gradient is not finite. That is decided on the device: to read it
        would wait for the device at every step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self.accelerator.unscale_gradients(self._prepared)
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norms = {
            f"{network}/grad_norm".lstrip("/"): whole(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True))
            for network, parameters in self.networks.items()
        }
        bad = (~torch.isfinite(sum(norms.values()))).float()
        if self.accelerator.scaler is None:  # with fp16 the loss scaler does the same, in the same way
            self.optimizer.found_inf = bad
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)
        for average in self.averages.values():
            # Also after a skipped step: the weights are unchanged and finite, and count once more. A condition would
            # take a second pass over the weights.
            average.update(self.parameters)
        self.skipped.copy_(torch.stack([(self.skipped[0] + bad) * bad, self.skipped[1] + bad]))
        return norms, 1 - bad


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from its shards if it is sharded: then every process has to call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The unsharded `value`, which every process has, on the device of `like` and sharded like it."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
