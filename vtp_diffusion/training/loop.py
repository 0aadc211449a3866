"""The loop of the training programs: processes, steps, resuming; what else a step takes is in the files beside.
Why a resumed run does the same, bit for bit on a CPU, stands in runtime/reproducibility.py."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..data.batches import StepBatchSampler
from ..runtime.processes import gather_objects
from ..runtime.reproducibility import draw_for_positions, step_generator, use_deterministic_algorithms
from .accelerator import StopRequest, is_sharded, make_accelerator
from .checkpoints import CheckpointWriter, TrainingState, averaged_state, resume
from .config import TrainingConfig
from .cuda_graphs import GraphedPasses, why_not_recorded
from .log import TrainingLog
from .optimisation import Optimisation, learning_rate_at, parameter_groups
from .run_folder import RunFolder

MAX_SKIPPED_IN_A_ROW = 50  # steps with non-finite gradients before training is given up
STOP_STEPS = 10  # several processes agree on stopping every so many steps: agreeing makes them wait for the device


class TrainingRun:
    """The loop around a loss: precision, processes, optimiser, averaged weights, log, checkpoints, resuming.

    A program does::

        run = TrainingRun(config, folder, objective, model, "transformer", fingerprint)
        for step in run.steps():
            run.optimise(step, micro_batches)
            if run.due(step, config.validation_steps):
                run.save_due(step)
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
        fingerprint_of: what the parts of `fingerprint`, with "-" between them, are of, as errors call it.
        not_saved: prefixes of state-dict keys of `objective` that are rebuilt from elsewhere, never saved.
        groups: parameter groups where not everything is trained alike, see `Optimisation`; None is what
            `parameter_groups` gives.
        flops_per_image: useful floating-point operations of training on one image, for the MFU in the log.
        in_parts: a set of arguments, of the lists of them that micro-batches can be, does not use every parameter.
        cuda_graphs: record the passes of a step and replay them, see `GraphedPasses`; arguments are then dictionaries
            of tensors. Where that cannot be, why is printed, unless this is None, and the passes are made as ever.
    Raises: ValueError: processes or precision that accelerate does not give here, a batch that cannot be divided among
        them, a checkpoint that has another fingerprint or does not fit, or none that is not damaged.
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
        groups: list[dict[str, Any]] | None = None,
        flops_per_image: float | None = None,
        in_parts: bool = False,
        cuda_graphs: bool | None = False,
        fingerprint_of: tuple[str, ...] = ("data",),
    ):
        self.config, self.folder, self.model, self.bare = config, folder, model, objective
        if config.deterministic:
            use_deterministic_algorithms()
        block_names = getattr(model, "_no_split_modules", None) or []
        self.accelerator = make_accelerator(config, folder.path, block_names, in_parts)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world_size, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.micro_batch_size = config.micro_batch_size(self.world_size)
        if self.is_main:
            folder.claim()
        self.accelerator.wait_for_everyone()
        folder.check_shared()
        groups = parameter_groups(objective, config.adam_weight_decay) if groups is None else groups
        average_name = f"{model_name}_ema"  # as checkpoints call it
        self.optimisation = Optimisation(config, groups, self.accelerator, objective, model, average_name)
        self.sharded = is_sharded(self.optimisation.parameters)
        self.graphed = None if cuda_graphs is False else self._graphed(asked=cuda_graphs is True)
        self.state = TrainingState(
            model=model,
            model_name=model_name,
            averages=self.optimisation.averages,
            objective=objective,
            optimizer=self.optimisation.optimizer,
            scaler=self.accelerator.scaler,
            fingerprint=fingerprint,
            fingerprint_of=fingerprint_of,
            not_saved=not_saved,
            skipped=self.optimisation.skipped,
        )
        resume(self.state, folder)
        self._writer = CheckpointWriter(folder)
        self.first_step, self._saved = self.state.step, None
        self.log = TrainingLog(config, folder, self.accelerator, flops_per_image, self.first_step, self.state.seconds)
        self.report = self.log.report

    @property
    def micro_steps(self) -> range:
        """Micro-steps this process has still to do: `batch_sampler`, `draw` and `generator` are keyed by them."""
        k = self.config.gradient_accumulation_steps
        return range(self.first_step * k, self.config.max_train_steps * k)

    def batch_sampler(self, num_samples: int, weights: torch.Tensor | None = None) -> StepBatchSampler:
        """The indices this process reads, one list for each of `micro_steps`: see StepBatchSampler."""
        todo, accumulation = self.micro_steps, self.config.gradient_accumulation_steps
        self.log.num_samples = num_samples
        return StepBatchSampler(
            num_samples,
            self.micro_batch_size,
            self.config.seed,
            todo.start,
            len(todo),
            self.rank,
            self.world_size,
            weights,
            accumulation,
        )

    def positions(self, micro_step: int) -> range:
        """Positions in the run of the samples of this process in a micro-step; `draw` is keyed by them."""
        first = (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def draw(
        self, micro_step: int, draw: Callable[[int, torch.Generator], dict[str, torch.Tensor]], stream: int = 0
    ) -> dict[str, torch.Tensor]:
        """Random numbers for the samples of this process in a micro-step: what a sample gets does not depend on how
        many processes and micro-steps a step is divided into.

        Args: `draw(count, generator)` returns named tensors (count, ...) on the run's device.
        """
        return draw_for_positions(draw, self.positions(micro_step), self.config.seed, stream, self.device)

    def generator(self, micro_step: int, stream: int = 0) -> torch.Generator:
        """A generator on the device for what this process draws in a micro-step where `draw` does not fit: its numbers
        depend on how a step is divided."""
        return step_generator(self.config.seed, micro_step, self.rank, stream, self.device)

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due once `step` (from 0) is done."""
        return (step + 1) % every == 0 or step + 1 == self.config.max_train_steps

    def steps(self) -> Iterator[int]:
        """Steps still to do, counted from 0, with a progress bar; logs and saves when due.

        Raises: RuntimeError in the end, if not one step of the run counted.

        After SIGTERM or SIGINT the step under way is finished and saved, and the program ends (SystemExit, status 0):
        the same command resumes. Launchers may give less time than saving takes (torchrun: 30 seconds); a checkpoint
        that a kill interrupts leaves the one before.
        """
        last, config = self.config.max_train_steps, self.config
        with contextlib.closing(self.log.progress_bar()) as bar, StopRequest() as request, self._writer:
            for step in range(self.first_step, last):
                yield step
                bar.update()
                pause = self.due(step, config.checkpointing_steps)
                self.save_due(step)
                if step + 1 < last and self._stop_agreed(step, request):
                    if not pause:
                        if self.log.summed:
                            self._write_log(step)
                        self.save(step + 1)
                    bar.close()
                    self.accelerator.print(f"stopped by a signal after step {step + 1}: the same command resumes")
                    self.end()
                    raise SystemExit(0)
                if pause or self.due(step, config.validation_steps) or self._log_due(step):
                    self.log.restart_clock()
        self._writer.wait()
        if self.skipped_steps >= last:
            raise RuntimeError(
                f"not one of the {last} steps counted, their gradients were not finite: nothing was trained, and "
                f"nothing is exported. Delete {self.folder.path} or give another output_dir, with other settings"
            )

    @property
    def skipped_steps(self) -> int:
        """Steps so far, in earlier sessions too, that were left out since their gradients were not finite."""
        return int(self.state.skipped[1])

    @property
    def skipped_note(self) -> str:
        """What the last line of a program says of `skipped_steps`: nothing where there are none."""
        count = self.skipped_steps
        return f"; {count} steps were left out, their gradients not being finite" if count else ""

    def save_due(self, step: int) -> None:
        """Save if a checkpoint is due once `step` (from 0) is done.

        `steps` does so too, but after all that the program does at that step: before a validation, this keeps what
        ends it from costing the steps before.
        """
        if self.due(step, self.config.checkpointing_steps):
            self.save(step + 1)

    def validation_missed(self, name: str | None) -> bool:
        """Whether a validation is due at the step that the run goes on after and was not made, since the process ended
        between its checkpoint and its end; every process has to call this.

        Args: `name`: how the names of the values begin that a validation reports; None if it makes a picture alone.
        """
        step = self.first_step
        if step == 0 or not self.due(step - 1, self.config.validation_steps):
            return False
        missed = False
        if self.is_main and name is None:
            missed = not self.folder.samples(step).is_file()
        elif self.is_main:
            lines = (line for line in self.folder.read_log() if line["step"] == step)
            missed = not any(key.startswith(name) for line in lines for key in line)
        return any(gather_objects(missed))

    def _stop_agreed(self, step: int, request: StopRequest) -> bool:
        """Whether a signal asked one of the processes to stop; all answer the same at the same step."""
        if self.world_size == 1:
            return request.signal is not None
        if not (self._log_due(step) or (step + 1) % STOP_STEPS == 0):
            return False
        asked = torch.tensor(float(request.signal is not None), device=self.device)
        return self.accelerator.reduce(asked, reduction="sum").item() > 0

    def _log_due(self, step: int) -> bool:
        every = (self.config.log_steps, self.config.validation_steps, self.config.checkpointing_steps)
        return step == 0 or any(self.due(step, n) for n in every)

    def optimise(self, step: int, micro_batches: Iterator[dict[str, Any] | list[dict[str, Any]]]) -> torch.Tensor:
        """One optimiser step over the next `gradient_accumulation_steps` sets of arguments of the objective.

        A micro-batch may be a list of sets, which are passed forwards and backwards one after the other: their losses
        are added up, and the activations of one set only are in memory at a time. See `in_parts`.

        Returns: a scalar on the device, 1, or 0 if the step was left out since its gradients were not finite.
        """
        means, last = {}, self.config.gradient_accumulation_steps - 1
        for k in range(last + 1):
            micro_batch = next(micro_batches)
            parts = micro_batch if isinstance(micro_batch, list) else [micro_batch]
            if self.graphed is not None:
                passed = self.graphed(parts)
            else:
                passed = [self._pass(part, sync=k == last and part is parts[-1]) for part in parts]
            for losses in passed:
                means = means | {name: means.get(name, 0) + value for name, value in losses.items()}
        norms, finite = self.optimisation.step(learning_rate_at(step, self.config))
        self.log.add(means | norms, finite)
        if self._log_due(step):
            self._write_log(step)
        return finite

    def _write_log(self, step: int) -> None:
        """A line of the log. Raises: RuntimeError if too many steps in a row were left out."""
        in_a_row, skipped = (int(n) for n in self.state.skipped.tolist())
        self.log.write(step + 1, learning_rate_at(step, self.config), skipped)
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self._writer.wait()
            before = [path.name for saved, path in self.folder.checkpoints() if saved <= step + 1 - in_a_row]
            raise RuntimeError(
                f"the gradients of the last {in_a_row} steps up to step {step + 1} were not finite. Last checkpoint "
                f"from before: {before[-1] if before else 'none'}. The command that resumes it may give a lower "
                f"max_grad_norm than {self.config.max_grad_norm}"
            )

    def _pass(self, arguments: dict[str, Any], sync: bool = True) -> dict[str, torch.Tensor]:
        """One set of arguments forwards and backwards: its losses, detached, float32, as they count in a step.

        Args: `sync`: processes are to have the sum of their gradients then.
        """
        count = self.config.gradient_accumulation_steps
        with contextlib.nullcontext() if sync else self.accelerator.no_sync(self.optimisation.objective):
            with self.accelerator.autocast() if self.sharded else contextlib.nullcontext():
                losses = self.optimisation.objective(**arguments)
            self.accelerator.backward(losses["loss"] / count)
        return {name: value.detach().float() / count for name, value in losses.items()}

    def record_anew(self) -> None:
        """Recorded passes are forgotten: the arguments that come next are of other kinds."""
        if self.graphed is not None:
            self.graphed = self._graphed(asked=False)

    def _graphed(self, asked: bool) -> GraphedPasses | None:
        config = self.config
        reason = why_not_recorded(
            self.device, self.world_size, config.gradient_accumulation_steps, config.mixed_precision
        )
        if reason is None:
            return GraphedPasses(self._pass, self.bare.parameters(), report=self.accelerator.print)
        if asked:
            self.accelerator.print(f"cuda_graphs is true, but the passes of a step are not recorded: {reason}")
        return None

    def summary(self) -> dict[str, float]:
        """What results.json says of a run of any kind."""
        counts = {"images_per_step": self.config.train_batch_size, "seconds": self.log.seconds}
        return counts | {"images_per_second": self.log.median_rate(), "skipped_steps": self.skipped_steps}

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its averaged weights, for evaluation, no gradients. Nothing is compiled meanwhile: batches of
        other sizes than training's are not worth programs of their own.

        Raises: ValueError if the weights are sharded; `averaged_model` works then too.
        """
        if self.sharded:
            raise ValueError("the weights are sharded over the processes: this evaluation needs whole ones (no FSDP)")
        training, optimisation = self.model.training, self.optimisation
        self.model.eval()
        averaged = optimisation.average.swapped_into(optimisation.parameters)
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), averaged:
                yield
        finally:
            self.model.train(training)

    @contextlib.contextmanager
    def averaged_model(self) -> Iterator[Any]:
        """The model with its averaged weights, whole, on every process; all of them have to enter.

        Under FSDP it is a copy that exists meanwhile, else the model itself.
        """
        if not self.sharded:
            with self.averaged_weights():
                yield self.model
            return
        model = type(self.model).from_config(self.model.config)
        model.load_state_dict(averaged_state(self.model, self.optimisation.average))
        with torch.no_grad():
            yield model.to(self.device).eval()

    def save(self, step: int) -> None:
        """Begin to write checkpoint-<step>, unless that was just done; see `CheckpointWriter`."""
        if step != self._saved:
            self.state.step, self.state.seconds = step, self.log.seconds
            self._writer.save(self.state, self.config.checkpoints_total_limit)
            self._saved = step

    def end(self) -> None:
        """Wait for the last checkpoint, close the trackers, and let another process have the run folder."""
        self._writer.wait()
        self.accelerator.end_training()
        if self.is_main:
            self.folder.release()
