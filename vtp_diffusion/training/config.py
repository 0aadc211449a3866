"""Settings that every training run has, and what follows from them alone: learning rate and decayed parameters."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from torch import nn


def _setting(default: Any, help: str, may_change: bool = False) -> Any:
    """A field with help text; `may_change` marks what a resumed run may set differently: it decides no result, or
    is the way out of a run that cannot go on as it was."""
    return field(default=default, metadata={"help": help, "may_change": may_change})


@dataclass(kw_only=True)
class TrainingConfig:
    """Settings of any training run; the programs add their data and model."""

    output_dir: str = field(
        metadata={"help": "run folder; the same command resumes what is in it", "may_change": True}
    )
    seed: int = _setting(0, "initial weights, data order, noise: everything random follows from it")
    train_batch_size: int = _setting(128, "images a step, over all processes and micro-steps together")
    gradient_accumulation_steps: int = _setting(
        1, "micro-steps a step: less memory, slower; a loss that compares samples compares those of a micro-step", True
    )
    max_train_steps: int = _setting(100_000, "optimiser steps")
    learning_rate: float = _setting(2e-4, "peak learning rate")
    lr_scheduler: Literal["constant", "linear", "cosine"] = _setting("constant", "after the warm-up; both decay to 0")
    lr_warmup_steps: int = _setting(0, "steps over which the learning rate rises linearly")
    adam_beta1: float = _setting(0.9, "AdamW, first moment")
    adam_beta2: float = _setting(0.95, "AdamW, second moment")
    adam_epsilon: float = _setting(1e-8, "AdamW, added to the denominator")
    adam_weight_decay: float = _setting(0.0, "AdamW, decoupled decay; weight matrices only")
    max_grad_norm: float | None = _setting(
        1.0, "gradients are clipped to this L2 norm; none leaves them; lower it where losses blow up", True
    )
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"] = _setting("no", "precision of the matrix products")
    ema_decay: float = _setting(0.9999, "decay of the averaged weights, constant from the first step")
    ema_further_decays: list[float] = field(
        default_factory=list, metadata={"help": "decays of further averages, which checkpoints hold beside"}
    )
    ema_bias_correction: bool = _setting(False, "leave the initial weights out of the average, for short runs")
    deterministic: bool = _setting(
        False, "the same bits on every run on one kind of GPU, slower; without it GPU runs differ by rounding", True
    )
    compile: bool = _setting(False, "torch.compile the forward and backward passes", True)
    gradient_checkpointing: bool = _setting(False, "recompute activations: less memory, slower", True)
    checkpointing_steps: int = _setting(5000, "a checkpoint every so many steps, and one at the end", True)
    checkpoints_total_limit: int | None = _setting(2, "oldest checkpoints beyond these are deleted", True)
    validation_steps: int = _setting(5000, "a validation every so many steps, and one at the end", True)
    log_steps: int = _setting(50, "steps averaged in one line of log.jsonl", True)
    dataloader_num_workers: int = _setting(0, "processes reading data that is not kept on the device", True)
    keep_on_device: bool | None = _setting(None, "hold all training data on the device; none decides by size", True)
    peak_flops: float | None = _setting(
        None, "FLOP/s of one device that MFU is a share of; none takes a known GPU's bfloat16 peak", True
    )
    report_to: Literal["none", "tensorboard", "wandb"] = _setting("tensorboard", "tracker beside log.jsonl", True)

    def __post_init__(self):
        positive = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate", "log_steps")
        for name in (*positive, "checkpointing_steps", "validation_steps", "adam_epsilon"):
            if not 0 < getattr(self, name) < math.inf:  # nan is no number either
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("seed", "adam_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or a positive number")
        for name in ("max_grad_norm", "checkpoints_total_limit", "peak_flops"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number or none")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1)")
        decays = [self.ema_decay, *self.ema_further_decays]
        if len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            raise ValueError(
                f"ema_further_decays is {self.ema_further_decays}, expected different numbers in [0, 1), none of them "
                f"ema_decay, {self.ema_decay}"
            )
        if not 0 <= self.lr_warmup_steps <= self.max_train_steps:
            raise ValueError(f"lr_warmup_steps is {self.lr_warmup_steps}, expected 0 to {self.max_train_steps} steps")
        self.micro_batch_size(1)

    def micro_batch_size(self, processes: int) -> int:
        """Images of a process in a micro-step. Raises: ValueError if so many processes cannot share a step."""
        if self.train_batch_size % (processes * self.gradient_accumulation_steps):
            raise ValueError(
                f"train_batch_size is {self.train_batch_size} images a step, expected a multiple of {processes} "
                f"processes x {self.gradient_accumulation_steps} gradient_accumulation_steps"
            )
        return self.train_batch_size // (processes * self.gradient_accumulation_steps)

    def changeable_keys(self) -> set[str]:
        """Keys that a resumed run may set differently from the run in the folder."""
        keys = set(_changeable(self))
        return keys | {"max_train_steps"} if self.lr_scheduler == "constant" else keys  # else it shapes the schedule


def _changeable(config: Any, prefix: str = "") -> Iterator[str]:
    """Keys of the fields marked `may_change`, those of sections too."""
    for setting in fields(config):
        key, value = prefix + setting.name, getattr(config, setting.name)
        if setting.metadata.get("may_change"):
            yield key
        elif is_dataclass(value):
            yield from _changeable(value, f"{key}.")


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then constant or down to 0 at `max_train_steps`."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * factor[config.lr_scheduler]


def weight_decay_at(done: float, first: float, last: float) -> float:
    """Weight decay after a share of training, along a cosine from the first value to the last (DINO)."""
    return last - (last - first) * (math.cos(math.pi * done) + 1) / 2


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: matrices decay; biases, norm scales and single tokens do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.squeeze().ndim >= 2]
    others = [p for p in trained if p.squeeze().ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
