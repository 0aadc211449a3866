"""The loop of the training programs: processes, steps, resuming; the parts of a step are in the other files here.

runtime/reproducibility.py explains why a resumed run does the same as one without a break, bit for bit on a CPU.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from ..data.batches import StepBatchSampler
from ..runtime.processes import from_main, gather_objects
from ..runtime.reproducibility import (
    draw_for_positions,
    step_generator,
    step_positions,
    use_deterministic_algorithms,
)
from .accelerator import StopRequest, is_sharded, make_accelerator
from .checkpoints import CheckpointWriter, TrainingState, averaged_state, find_resumed, resume
from .config import TrainingConfig
from .cuda_graphs import GraphedPasses, why_not_recorded
from .log import TrainingLog
from .optimisation import Optimisation, learning_rate_at, parameter_groups
from .run_folder import RunFolder

# Steps with non-finite gradients, one after the other, before training is given up: wherever it is, and where weights
# are to be evaluated. fp16 skips some steps until its loss scale fits.
MAX_SKIPPED_IN_A_ROW, MAX_SKIPPED_BEFORE_EVALUATION = 50, 10
STOP_STEPS = 10  # processes agree on stopping only at every tenth step, since agreeing waits for the device


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
        config: settings of the run.
        folder: the run folder, which is claimed here.
        objective: module whose `forward(**micro_batch)` returns named scalar losses; "loss" is minimised.
        model: the diffusers model inside it, which checkpoints hold as `<model_name>` and, averaged,
            `<model_name>_ema`, each loadable with from_pretrained.
        model_name: the pipeline's name of it.
        fingerprint: hashes of what the run learns from, joined by "-"; a checkpoint is only resumed with the same.
        fingerprint_of: names of the parts of `fingerprint`, for errors.
        older_fingerprints: what earlier versions would have called the same; a checkpoint with one is resumed, too.
        not_saved: prefixes of state-dict keys of `objective` to leave out: their weights come from elsewhere.
        groups: parameter groups, see `Optimisation`; None: those of `parameter_groups`.
        flops_per_image: useful floating-point operations of training on one image, for the MFU in the log.
        in_parts: some backward passes do not reach every parameter.
        cuda_graphs: record the passes of a step and replay them, see `GraphedPasses`; arguments must then be tensors
            or dictionaries of them. Where that is not possible, passes run without graphs, and unless this is None
            the reason is printed.
    Raises: ValueError: accelerate does not provide the processes or precision that are asked for, the batch cannot be
        divided among the processes, the checkpoint has another fingerprint or does not fit, or all are damaged.
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
        older_fingerprints: Collection[str] = (),
    ):
        self.config, self.folder, self.model, self.bare = config, folder, model, objective
        if config.deterministic:
            use_deterministic_algorithms()
        block_names = getattr(model, "_no_split_modules", None) or []
        self.accelerator = make_accelerator(config, folder.path, block_names, in_parts)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world_size, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.micro_batch_size = config.micro_batch_size(self.world_size)
        resumed = from_main(
            lambda: folder.claim(lambda: find_resumed(folder, fingerprint, fingerprint_of, older_fingerprints))
        )
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
        resume(self.state, folder, resumed)
        self._writer = CheckpointWriter(folder)
        self.first_step, self._done, self._saved = self.state.step, self.state.step, None
        self.log = TrainingLog(config, folder, self.accelerator, flops_per_image, self.first_step, self.state.seconds)
        self.report = self.log.report

    @property
    def micro_steps(self) -> range:
        """Micro-steps this process has still to do: `batch_sampler`, `draw` and `generator` are keyed by them."""
        k = self.config.gradient_accumulation_steps
        return range(self.first_step * k, self.config.max_train_steps * k)

    def batch_sampler(
        self, num_samples: int, weights: torch.Tensor | None = None, micro_steps: range | None = None
    ) -> StepBatchSampler:
        """The indices this process reads, one list for each micro-step: see StepBatchSampler.

        Args: `micro_steps`: some of the run's, one after the other; None: `self.micro_steps`, all still to do.
        """
        todo = self.micro_steps if micro_steps is None else micro_steps
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
            self.config.gradient_accumulation_steps,
        )

    def positions(self, micro_step: int) -> range:
        """Positions in the run of the samples of this process in a micro-step; `draw` is keyed by them."""
        return step_positions(micro_step, self.rank, self.world_size, self.micro_batch_size)

    def draw(
        self, micro_step: int, draw: Callable[[int, torch.Generator], dict[str, torch.Tensor]], stream: int = 0
    ) -> dict[str, torch.Tensor]:
        """Random numbers for the samples of this process in a micro-step: what a sample gets does not depend on how
        many processes and micro-steps a step is divided into.

        Args: `draw(count, generator)` returns named tensors (count, ...) on the run's device.
        """
        return draw_for_positions(draw, self.positions(micro_step), self.config.seed, stream, self.device)

    def generator(self, micro_step: int, stream: int = 0) -> torch.Generator:
        """A generator on the device for draws of this process in a micro-step that are not made sample by sample. Its
        numbers depend on how a step is divided into processes and micro-steps."""
        return step_generator(self.config.seed, micro_step, self.rank, stream, self.device)

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due once `step` (from 0) is done."""
        return (step + 1) % every == 0 or step + 1 == self.config.max_train_steps

    def steps(self) -> Iterator[int]:
        """Steps still to do, counted from 0, with a progress bar; says what is to do, logs and saves when due.

        Raises: ValueError if training has diverged, as `check_sound`.

        After SIGTERM or SIGINT the current step is finished and saved, and the program ends with the status that a
        shell gives to a program which a signal ended (SystemExit, 143 or 130), in every process: what comes after
        training does not start, and the same command resumes. A launcher reports the status as a failure, but no
        process ends before the checkpoint is written. Launchers may give less time than saving takes (torchrun: 30
        seconds); if a kill interrupts a checkpoint, the one before is still there.
        """
        config = self.config
        self.accelerator.print(self.log.start_line(sum(p.numel() for p in self.optimisation.trained)))
        with contextlib.closing(self.log.progress_bar()) as bar, StopRequest() as request, self._writer:
            for step in range(self.first_step, config.max_train_steps):
                yield step
                bar.update()
                checkpointed = self.due(step, config.checkpointing_steps)
                self.save_due(step)
                if self._stop_agreed(step, request):
                    if not checkpointed:
                        if self.log.summed:
                            self._write_log(step)
                        self.save(step + 1)
                    bar.close()
                    self.accelerator.print(f"stopped by a signal after step {step + 1}: the same command resumes")
                    number = max(gather_objects(int(request.signal or 0)))  # perhaps another process got it
                    self.end()
                    raise SystemExit(128 + number)
                if checkpointed or self.due(step, config.validation_steps) or self._log_due(step):
                    self.log.restart_clock()
        self._writer.wait()
        self.check_sound()

    def check_sound(self) -> None:
        """Refuse a training that has diverged. This reads all weights and waits for the device: it is called before
        evaluations and checkpoints, and at the end.

        Raises: ValueError: weights or averages are not finite, or the last steps were all skipped. Skipped steps do
            not count before the first step of a resumed run, which may get over them.
        """
        skipped, steps, config = int(self.state.skipped[0]), self.config.max_train_steps, self.config
        since = self._done - skipped
        if not self.optimisation.all_finite():  # then the gradients of all later steps are not finite either
            fault = f"the weights or their averages are not finite since step {since}"
        elif skipped >= min(MAX_SKIPPED_BEFORE_EVALUATION, steps) and not self.first_step == self._done < steps:
            which = f"all {steps}" if skipped == steps else f"the last {skipped}"
            fault = f"{which} steps up to step {self._done} were skipped, since their gradients were not finite"
        else:
            return
        self._writer.settle()
        found = self.folder.checkpoints()
        before = [path.name for saved, path in found if saved <= since]
        again = f"resumes from {before[-1]}" if before else "starts anew"
        again += " once the later checkpoints are deleted" * (len(before) < len(found))
        raise ValueError(
            f"training has diverged: {fault}. Nothing is evaluated or exported. Last checkpoint from before: "
            f"{before[-1] if before else 'none'}. A lower max_grad_norm ({config.max_grad_norm}) may be given to "
            f"the same command, which {again}; a lower learning_rate ({config.learning_rate:g}) or another "
            f"mixed_precision ({config.mixed_precision}) takes another output_dir than {self.folder.path}"
        )

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far, before resuming too, because their gradients were not finite."""
        return int(self.state.skipped[1])

    @property
    def skipped_note(self) -> str:
        """`skipped_steps` in words, for the last line that a program prints; empty if there are none."""
        count = self.skipped_steps
        return f"; {count} steps were skipped, since their gradients were not finite" if count else ""

    def save_due(self, step: int) -> None:
        """Save if a checkpoint is due once `step` (from 0) is done.

        `steps` saves too, but only after everything else that the program does at that step. Call this before a
        validation, so that a failing validation does not lose the steps before it.
        """
        if self.due(step, self.config.checkpointing_steps):
            self.save(step + 1)

    def validation_missed(self, name: str | None) -> bool:
        """Whether the resumed checkpoint was due for a validation that did not complete, because the process ended
        during it; every process has to call this.

        Args: `name`: prefix of the values that a validation reports; None if it only makes a picture.
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
        """Whether a signal asked any process to stop; all processes give the same answer at the same step."""
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
        """One optimiser step over the next `gradient_accumulation_steps` micro-batches, the objective's arguments.

        A micro-batch may be a list of sets of arguments, each with its own forward and backward pass: their losses are
        added up, and only the activations of one set are in memory at a time.

        Returns: a scalar on the device, 1, or 0 if the step was skipped because its gradients were not finite.
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
        self._done = step + 1
        self.log.add(means | norms, finite)
        if self._log_due(step):
            self._write_log(step)
        return finite

    def _write_log(self, step: int) -> None:
        """Write a line of the log. Raises: ValueError if too many steps in a row were skipped."""
        in_a_row, skipped = (int(n) for n in self.state.skipped.tolist())
        self.log.write(step + 1, learning_rate_at(step, self.config), skipped)
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.check_sound()

    def _pass(self, arguments: dict[str, Any], sync: bool = True) -> dict[str, torch.Tensor]:
        """Forward and backward pass on one set of arguments.

        Args: `sync`: reduce the gradients over the processes in this backward pass.
        Returns: the losses, detached, float32, divided by the number of micro-steps.
        """
        count = self.config.gradient_accumulation_steps
        with contextlib.nullcontext() if sync else self.accelerator.no_sync(self.optimisation.objective):
            with self.accelerator.autocast() if self.sharded else contextlib.nullcontext():
                losses = self.optimisation.objective(**arguments)
            self.accelerator.backward(losses["loss"] / count)
        return {name: value.detach().float() / count for name, value in losses.items()}

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
        """The entries of results.json that every program writes."""
        counts = {"images_per_step": self.config.train_batch_size, "seconds": self.log.seconds}
        return counts | {"images_per_second": self.log.median_rate(), "skipped_steps": self.skipped_steps}

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the model has its averaged weights, for evaluation without gradients. Nothing is compiled, since
        the batch sizes of evaluation would each take a compilation.

        Raises: ValueError if the weights are sharded: use `averaged_model` then; as `check_sound`.
        """
        if self.sharded:
            raise ValueError("the weights are sharded over the processes: this evaluation needs whole ones (no FSDP)")
        self.check_sound()
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
        """The model with its averaged weights, unsharded, on every process; all of them have to enter.

        Under FSDP it is a temporary copy, else the model itself. Raises: as `check_sound`.
        """
        if not self.sharded:
            with self.averaged_weights():
                yield self.model
            return
        self.check_sound()
        model = type(self.model).from_config(self.model.config)
        model.load_state_dict(averaged_state(self.model, self.optimisation.average))
        with torch.no_grad():
            yield model.to(self.device).eval()

    def save(self, step: int) -> None:
        """Begin to write checkpoint-<step>, unless that was just done; every process has to call this. Raises: as
        `CheckpointWriter.save`; ValueError, with nothing written, if weights are not finite."""
        if step != self._saved:
            if not self.optimisation.all_finite():
                self.check_sound()
            self.state.step, self.state.seconds = step, self.log.seconds
            self._writer.save(self.state, self.config.checkpoints_total_limit)
            self._saved = step

    def end(self) -> None:
        """Wait for the last checkpoint, close the trackers, and unlock the run folder."""
        self._writer.wait()
        self.accelerator.end_training()
        if self.is_main:
            self.folder.release()
