"""What the training programs share: data order, averaged weights, optimisation, logging, run folders and resuming.

Everything random is keyed by (seed, step, rank), never by what was drawn before. That is what makes ten steps, a
restart and ten more steps the same as twenty, bit for bit on a CPU.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .config import config_to_dict, flatten_config
from .extras import require
from .run_folder import RunFolder

MAX_SKIPPED_IN_A_ROW = 50  # steps with non-finite gradients before training is given up
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def _setting(default: Any, help: str, may_change: bool = False) -> Any:
    """A field with help text; `may_change` marks what a resumed run may set differently: it decides no result."""
    return field(default=default, metadata={"help": help, "may_change": may_change})


@dataclass(kw_only=True)
class TrainingConfig:
    """Settings of any training run; the programs add their data and model."""

    output_dir: str = field(
        metadata={"help": "run folder; the same command resumes what is in it", "may_change": True}
    )
    seed: int = _setting(0, "initial weights, data order, noise: everything random follows from it")
    train_batch_size: int = _setting(128, "images a process and a micro-step")
    gradient_accumulation_steps: int = _setting(1, "micro-steps a step")
    max_train_steps: int = _setting(100_000, "optimiser steps")
    learning_rate: float = _setting(2e-4, "peak learning rate")
    lr_scheduler: Literal["constant", "linear", "cosine"] = _setting("constant", "after the warm-up; both decay to 0")
    lr_warmup_steps: int = _setting(0, "steps over which the learning rate rises linearly")
    adam_beta1: float = _setting(0.9, "AdamW, first moment")
    adam_beta2: float = _setting(0.95, "AdamW, second moment")
    adam_epsilon: float = _setting(1e-8, "AdamW, added to the denominator")
    adam_weight_decay: float = _setting(0.0, "AdamW, decoupled decay; weight matrices only")
    max_grad_norm: float | None = _setting(1.0, "gradients are clipped to this L2 norm; none leaves them")
    mixed_precision: Literal["no", "fp16", "bf16"] = _setting("no", "precision of the matrix products")
    ema_decay: float = _setting(0.9999, "decay of the averaged weights, constant from the first step")
    ema_bias_correction: bool = _setting(False, "leave the initial weights out of the average, for short runs")
    compile: bool = _setting(False, "torch.compile the forward and backward passes", True)
    gradient_checkpointing: bool = _setting(False, "recompute activations: less memory, slower", True)
    checkpointing_steps: int = _setting(5000, "a checkpoint every so many steps, and one at the end", True)
    checkpoints_total_limit: int | None = _setting(2, "oldest checkpoints beyond these are deleted", True)
    validation_steps: int = _setting(5000, "a validation every so many steps, and one at the end", True)
    log_steps: int = _setting(50, "steps averaged in one line of log.jsonl", True)
    dataloader_num_workers: int = _setting(0, "processes reading data that is not kept on the device", True)
    keep_on_device: bool | None = _setting(None, "hold all training data on the device; none decides by size", True)
    report_to: Literal["none", "tensorboard", "wandb"] = _setting("tensorboard", "tracker beside log.jsonl", True)

    def __post_init__(self):
        positive = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate", "log_steps")
        for name in (*positive, "checkpointing_steps", "validation_steps", "adam_epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("max_grad_norm", "checkpoints_total_limit"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number or none")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1)")
        if not 0 <= self.lr_warmup_steps <= self.max_train_steps:
            raise ValueError(f"lr_warmup_steps is {self.lr_warmup_steps}, expected 0 to {self.max_train_steps} steps")

    def changeable_keys(self) -> set[str]:
        """Keys that a resumed run may set differently from the run in the folder."""
        keys = {f.name for f in fields(self) if f.metadata.get("may_change")}
        return keys | {"max_train_steps"} if self.lr_scheduler == "constant" else keys  # else it shapes the schedule


def step_generator(
    seed: int, step: int, rank: int = 0, stream: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that depends on nothing but (seed, step, rank, stream): resuming at a step redraws the same numbers.

    Args: `stream` separates draws made for different purposes in one step.
    """
    state = np.random.SeedSequence([seed, step, rank, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


class StepBatchSampler:
    """Batches of indices keyed by (seed, step): step s of process r is the same list whenever training starts.

    Without weights the samples run through one random permutation an epoch, each seen once, epochs following each
    other without a gap: a batch may span two. With weights, every step draws anew, with replacement and in proportion
    to them; the draw is stratified, so that a batch follows the proportions more closely than independent draws would.

    Args:
        num_samples: size of the data set.
        batch_size: indices a step and process.
        seed: of the run.
        start_step, num_steps: iterating gives the steps start_step ... start_step + num_steps - 1.
        rank, world_size: this process and how many there are; together they read each epoch once.
        weights: (num_samples,) not negative; all equal counts as none.

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
    ):
        if num_samples <= 0 or batch_size <= 0 or num_steps < 0 or start_step < 0:
            raise ValueError(
                f"got {num_samples} samples, batches of {batch_size}, {num_steps} steps from {start_step}: samples "
                "and batch size must be positive, steps not negative"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_step, self.num_steps, self.rank, self.world_size = start_step, num_steps, rank, world_size
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

    def batch(self, step: int) -> list[int]:
        """The indices of this process at a step."""
        total = self.batch_size * self.world_size
        if self._cumulative is not None:
            random = np.random.default_rng([self.seed, step])
            # one draw in each of `total` equal slices of the distribution, then shuffled so that every rank sees all
            points = random.permutation((np.arange(total) + random.random(total)) / total)
            indices = np.searchsorted(self._cumulative, points, side="right").clip(max=self.num_samples - 1)
            return indices[self.rank * self.batch_size : (self.rank + 1) * self.batch_size].tolist()
        first = step * total + self.rank * self.batch_size
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


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then constant or down to 0 at `max_train_steps`."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * factor[config.lr_scheduler]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: matrices decay; biases, norm scales and single tokens do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.squeeze().ndim >= 2]
    others = [p for p in trained if p.squeeze().ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class TrainingRun:
    """The loop around a loss: precision, processes, optimiser, averaged weights, log, checkpoints, resuming.

    A program does::

        run = TrainingRun(config, folder, objective, model, "transformer", fingerprint)
        for step in run.steps():
            run.optimise(step, micro_batches)
            if run.due(step, config.validation_steps):
                with run.averaged_weights():
                    ...

    Args:
        config: of the run.
        folder: the run folder, which is claimed here.
        objective: module whose `forward(**micro_batch)` returns named scalar losses; "loss" is minimised.
        model: the diffusers model inside it, which checkpoints hold as `<model_name>` and, averaged,
            `<model_name>_ema`, each loadable with from_pretrained.
        model_name: as the pipeline calls it.
        fingerprint: identifies the training data; a checkpoint is only resumed on the same.
        not_saved: prefixes of state-dict keys of `objective` that are rebuilt from elsewhere, never saved.

    Raises:
        ValueError: the latest checkpoint was made from other data, or its weights do not fit.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        objective: nn.Module,
        model: Any,
        model_name: str,
        fingerprint: str,
        not_saved: tuple[str, ...] = (),
    ):
        accelerate = require("accelerate", "train")
        self.config, self.folder, self.model, self.model_name = config, folder, model, model_name
        self.fingerprint, self.not_saved, self.bare = fingerprint, not_saved, objective
        tracker = None if config.report_to == "none" else config.report_to
        if tracker is not None:
            require("tensorboard" if tracker == "tensorboard" else tracker, "train")
        self.accelerator = accelerate.Accelerator(
            mixed_precision=config.mixed_precision, log_with=tracker, project_dir=str(folder.path)
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.accelerator.num_processes:  # each would train alone and write into the same folder
            raise ValueError(
                f"{launched} processes were launched but accelerate joined {self.accelerator.num_processes}: "
                "where there is no accelerator, torchrun needs ACCELERATE_USE_CPU=true in the environment"
            )
        if self.accelerator.is_main_process:
            folder.claim()
        self.accelerator.wait_for_everyone()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(objective, config.adam_weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,  # besides speed: it can be told on the device to leave a step out (see _update)
        )
        self.objective, self.prepared_optimizer = self.accelerator.prepare(objective, self.optimizer)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = AveragedWeights(self.parameters, config.ema_decay, config.ema_bias_correction)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world_size, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.skipped = torch.zeros(2, device=self.device)  # in a row, altogether
        self.first_step, self.seconds, self.rates = 0, 0.0, []
        self._sums: torch.Tensor | None = None  # of the losses, then the number of steps that count
        self._names, self._summed = [], 0
        self._bar, self._mark = None, time.perf_counter()
        self._resume()
        if tracker is not None:
            scalars = {k: str(v) for k, v in flatten_config(config_to_dict(config)).items()}
            self.accelerator.init_trackers("logs", config=scalars)

    @property
    def images_per_step(self) -> int:
        return self.config.train_batch_size * self.config.gradient_accumulation_steps * self.world_size

    @property
    def micro_steps(self) -> range:
        """Micro-steps this process has still to do: `StepBatchSampler` and generators are keyed by them."""
        k = self.config.gradient_accumulation_steps
        return range(self.first_step * k, self.config.max_train_steps * k)

    def generator(self, micro_step: int, stream: int = 0) -> torch.Generator:
        """The generator on the device for what this process draws in a micro-step."""
        return step_generator(self.config.seed, micro_step, self.rank, stream, self.device)

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due once `step` (from 0) is done."""
        return (step + 1) % every == 0 or step + 1 == self.config.max_train_steps

    def steps(self) -> Iterator[int]:
        """Steps still to do, counted from 0, with a progress bar; logs and saves when due."""
        from tqdm.auto import tqdm

        last, config = self.config.max_train_steps, self.config
        self._bar = bar = tqdm(
            initial=self.first_step, total=last, desc="steps", disable=not self.is_main, smoothing=0.05
        )
        self._mark = time.perf_counter()
        for step in range(self.first_step, last):
            yield step
            bar.update()
            pause = self.due(step, config.checkpointing_steps)
            if pause:
                self.save(step + 1)
            if pause or self.due(step, config.validation_steps) or self._log_due(step):
                self._mark = time.perf_counter()  # what was done besides training does not count as training time
        bar.close()

    def _log_due(self, step: int) -> bool:
        every = (self.config.log_steps, self.config.validation_steps, self.config.checkpointing_steps)
        return step == self.first_step or any(self.due(step, n) for n in every)

    def optimise(self, step: int, micro_batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """One optimiser step over the next `gradient_accumulation_steps` sets of arguments of the objective."""
        count, means = self.config.gradient_accumulation_steps, {}
        for k in range(count):
            arguments = next(micro_batches)
            synchronise = contextlib.nullcontext() if k == count - 1 else self.accelerator.no_sync(self.objective)
            with synchronise:
                losses = self.objective(**arguments)
                self.accelerator.backward(losses["loss"] / count)
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach().float() / count
        rate = learning_rate_at(step, self.config)
        means["grad_norm"], finite = self._update(rate)
        values = torch.stack([*means.values(), finite])
        values = torch.where(finite > 0, values, 0.0)  # a step that was left out does not enter the averages
        self._sums = values if self._sums is None else self._sums + values
        self._names, self._summed = list(means), self._summed + 1
        if self._log_due(step):
            self._log(step + 1, rate)

    def _update(self, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, step, average: (gradient norm, 1 or 0). A step whose gradients are not finite is left out, and that
        (the 0) is decided on the device: asking it would make it wait at every step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.unscale_gradients(self.prepared_optimizer)
        limit = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.trained, math.inf if limit is None else limit, foreach=True)
        bad = (~torch.isfinite(norm)).float()
        if self.accelerator.scaler is None:  # with fp16 the loss scaler does the same, in the same way
            self.optimizer.found_inf = bad
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad(set_to_none=True)
        self.average.update(self.parameters)
        self.skipped = torch.stack([(self.skipped[0] + bad) * bad, self.skipped[1] + bad])
        return norm, 1 - bad

    def _log(self, step: int, rate: float) -> None:
        means = self._sums[:-1] / self._sums[-1].clamp(min=1)
        means = self.accelerator.reduce(means, reduction="mean").tolist()  # waits for the device
        in_a_row, skipped = (int(n) for n in self.skipped.tolist())
        elapsed = time.perf_counter() - self._mark
        images = self.images_per_step * self._summed
        self.seconds += elapsed
        self.rates.append(images / elapsed)
        record = dict(zip(self._names, means, strict=True)) | {
            "learning_rate": rate,
            "images_per_second": images / elapsed,
        }
        self._sums, self._summed = None, 0
        if self.is_main:
            self.folder.log({"step": step} | record | {"skipped_steps": skipped, "seconds": self.seconds})
            self.accelerator.log(record, step=step)
            if self._bar is not None:
                self._bar.set_postfix(loss=f"{record['loss']:.4g}", images=f"{record['images_per_second']:.0f}/s")
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(f"the gradients of the last {in_a_row} steps up to step {step} were not finite")

    def report(self, step: int, values: dict[str, float], picture: Any = None, name: str = "validation") -> None:
        """Log what a validation measured, and its picture (PIL), which is also written into samples/."""
        if not self.is_main:
            return
        if values:
            self.folder.log({"step": step} | values)
            self.accelerator.log(values, step=step)
        if picture is not None:
            picture.save(self.folder.samples(step))
            for tracker in self.accelerator.trackers:
                if self.config.report_to == "tensorboard":
                    tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({name: [picture]}, step=step)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its averaged weights, for evaluation, no gradients."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.average.swapped_into(self.parameters):
            yield
        self.model.train(training)

    def _beside_model(self) -> dict[str, torch.Tensor]:
        """State of the objective that is not the model's."""
        inside = {id(t) for t in self.model.state_dict(keep_vars=True).values()}
        state = self.bare.state_dict(keep_vars=True).items()
        return {k: v.detach() for k, v in state if id(v) not in inside and not k.startswith(self.not_saved or "\0")}

    def save(self, step: int) -> None:
        """Write checkpoint-<step>: first under another name, then renamed, so that a kill never leaves half of one."""
        path = self.folder.unfinished(step)
        if self.is_main:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        self.accelerator.wait_for_everyone()
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        torch.save(random, path / f"random_state_{self.rank}.pt")
        if self.is_main:
            self.model.save_pretrained(path / self.model_name, max_shard_size="1TB")
            with self.averaged_weights():
                self.model.save_pretrained(path / f"{self.model_name}_ema", max_shard_size="1TB")
            beside = {name: value.contiguous() for name, value in self._beside_model().items()}
            save_file(beside, path / "objective.safetensors")
            scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
            torch.save({"optimizer": self.optimizer.state_dict(), "scaler": scaler}, path / "optimizer.pt")
            state = {"step": step, "fingerprint": self.fingerprint, "seconds": self.seconds}
            state |= {"skipped": self.skipped.tolist(), "average_step": self.average.step}
            (path / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.folder.finish(step, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        checkpoints = self.folder.checkpoints()
        if not checkpoints:
            if self.is_main:
                self.folder.truncate_log(0)
            return
        step, path = checkpoints[-1]
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{path} was trained on data with fingerprint {state['fingerprint']}, the data given now has "
                f"{self.fingerprint}: a run is resumed on the same data only"
            )
        averaged = load_file(path / f"{self.model_name}_ema" / WEIGHTS_NAME)
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.average.averages = [averaged[name].to(self.device, torch.float32) for name in names]
        self.average.step = state["average_step"]
        self.model.load_state_dict(load_file(path / self.model_name / WEIGHTS_NAME), strict=True)
        for name, value in load_file(path / "objective.safetensors").items():
            self._beside_model()[name].copy_(value)
        saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        random = torch.load(path / f"random_state_{self.rank}.pt", weights_only=True)
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.skipped = torch.tensor(state["skipped"], device=self.device)
        self.first_step, self.seconds = step, state["seconds"]
        if self.is_main:
            self.folder.truncate_log(step)

    def end(self) -> None:
        """Close the trackers."""
        self.accelerator.end_training()
