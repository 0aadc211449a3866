"""Settings that every training run has."""

from dataclasses import dataclass
from typing import Literal

from ..runtime.config import Settings, setting, settings_of


@dataclass(kw_only=True)
class TrainingConfig(Settings):
    """Settings of any training run; the programs add their data and model."""

    output_dir: str = setting(help="run folder; the same command resumes what is in it", may_change=True)
    seed: int = setting(0, "initial weights, data order, noise: everything random follows from it", at_least=0)
    train_batch_size: int = setting(128, "images per step, over all processes and micro-steps together", at_least=1)
    gradient_accumulation_steps: int = setting(
        1,
        "micro-steps per step: less memory, slower; losses that compare samples see one micro-step at a time",
        may_change=True,
        at_least=1,
    )
    max_train_steps: int = setting(100_000, "optimiser steps", at_least=1)
    learning_rate: float = setting(2e-4, "peak learning rate", above=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = setting(
        "constant", "after the warm-up; linear, cosine: to 0"
    )
    lr_warmup_steps: int = setting(0, "steps over which the learning rate rises linearly", at_least=0)
    adam_beta1: float = setting(0.9, "AdamW, first moment", at_least=0, below=1)
    adam_beta2: float = setting(0.95, "AdamW, second moment", at_least=0, below=1)
    adam_epsilon: float = setting(1e-8, "AdamW, added to the denominator", above=0)
    adam_weight_decay: float = setting(0.0, "AdamW, decoupled decay; weight matrices only", at_least=0)
    max_grad_norm: float | None = setting(
        1.0, "clip gradients to this L2 norm; none: no clipping; lower it if losses blow up", may_change=True, above=0
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "precision of the matrix products")
    ema_decay: float = setting(0.9999, "decay of the EMA weights, constant from the first step", at_least=0, below=1)
    ema_further_decays: list[float] = setting(
        default_factory=list, help="decays of further EMA weights to keep in checkpoints", at_least=0, below=1
    )
    ema_bias_correction: bool = setting(False, "leave the initial weights out of the average, for short runs")
    deterministic: bool = setting(
        False, "bit-identical runs on one kind of GPU, slower; else runs differ by rounding", may_change=True
    )
    compile: bool = setting(False, "torch.compile the forward and backward passes", may_change=True)
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower", may_change=True)
    checkpointing_steps: int = setting(
        5000, "steps between checkpoints; one is made at the end", may_change=True, at_least=1
    )
    checkpoints_total_limit: int | None = setting(
        2, "checkpoints to keep, older ones are deleted; none: keep all", may_change=True, at_least=1
    )
    validation_steps: int = setting(
        5000, "steps between validations; one is made at the end", may_change=True, at_least=1
    )
    log_steps: int = setting(50, "steps averaged in one line of log.jsonl", may_change=True, at_least=1)
    dataloader_num_workers: int = setting(
        0, "processes that read data, unless the device holds them", may_change=True, at_least=0
    )
    keep_on_device: bool | None = setting(None, "hold all data on the device; none: if they fit", may_change=True)
    peak_flops: float | None = setting(
        None, "peak FLOP/s of a device, for the MFU; none: the bfloat16 peak of a known GPU", may_change=True, above=0
    )
    report_to: Literal["none", "tensorboard", "wandb"] = setting(
        "tensorboard", "tracker, besides log.jsonl", may_change=True
    )

    def __post_init__(self):
        super().__post_init__()
        decays = [self.ema_decay, *self.ema_further_decays]
        if len(set(decays)) < len(decays):
            raise ValueError(
                f"ema_further_decays is {self.ema_further_decays}, expected different numbers, none of them "
                f"ema_decay, {self.ema_decay}"
            )
        if self.lr_warmup_steps > self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, expected 0 to max_train_steps, {self.max_train_steps}"
            )
        self.micro_batch_size(1)

    def micro_batch_size(self, processes: int) -> int:
        """Images of a process in a micro-step. Raises: ValueError if the processes cannot share a step evenly."""
        if self.train_batch_size % (processes * self.gradient_accumulation_steps):
            raise ValueError(
                f"train_batch_size is {self.train_batch_size} images a step, expected a multiple of {processes} "
                f"processes x {self.gradient_accumulation_steps} gradient_accumulation_steps"
            )
        return self.train_batch_size // (processes * self.gradient_accumulation_steps)

    def changeable_keys(self) -> set[str]:
        """Keys that a resumed run may set differently from the run in the folder."""
        keys = {key for key, _, field in settings_of(self) if field.metadata.get("may_change")}
        return keys | {"max_train_steps"} if self.lr_scheduler == "constant" else keys  # else it shapes the schedule
