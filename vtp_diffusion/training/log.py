"""What a run reports while it trains: log.jsonl, the tracker, the progress bar, pictures of validations."""

import math
import statistics
import time
from typing import Any

import numpy as np
import torch

from ..runtime.config import config_to_dict, flatten_config
from ..runtime.disk import numbers_line, write_picture
from .accelerator import tracker_settings
from .config import TrainingConfig
from .rates import peak_flops, peak_memory_bytes
from .run_folder import RunFolder


def _means(table: torch.Tensor) -> list[float | None]:
    """Means from sums and counts (K, 2); None where nothing was counted, since JSON has no NaN."""
    return [total / count if count else None for total, count in table.tolist()]


class TrainingLog:
    """Averages losses and rates over the steps between two lines, and writes them to the log, tracker and bar.

    A loss that is a table (K, 2) of sums and counts, as `flow_matching.sums_by_time` makes them, is logged as the K
    means.

    Args:
        flops_per_image: useful floating-point operations of training on one image, for the MFU.
        first_step, seconds: steps and training time before this start.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        accelerator: Any,
        flops_per_image: float | None,
        first_step: int,
        seconds: float,
    ):
        self.config, self.folder, self.accelerator, self.seconds = config, folder, accelerator, seconds
        self.first_step, self.is_main = first_step, accelerator.is_main_process
        self.flops_per_image, self.num_samples = flops_per_image, None  # num_samples: see `TrainingRun.batch_sampler`
        self._sums: dict[str, torch.Tensor] | None = None  # of the losses, without skipped steps
        self.summed = 0
        peak = peak_flops(accelerator.device, config.mixed_precision, config.peak_flops)
        known = peak is not None and flops_per_image is not None
        self._mfu_per_rate = flops_per_image / (peak * accelerator.num_processes) if known else None
        self._bar, self._mark = None, time.perf_counter()
        if config.report_to != "none" and self.is_main:
            scalars = {k: str(v) for k, v in flatten_config(config_to_dict(config)).items()}
            accelerator.init_trackers(**tracker_settings(config.report_to, folder.path, first_step, scalars))

    def start_line(self, trained: int) -> str:
        """What is still to do, of what and where, for the console. Args: `trained`: number of trained parameters."""
        config, device, first = self.config, self.accelerator.device, self.first_step
        left, processes = config.max_train_steps - first, self.accelerator.num_processes
        line = f"resumed after step {first:,}: {left:,} steps are left" if first else f"training: {left:,} steps"
        line += f", {config.train_batch_size:,} images each"
        if self.num_samples:
            epochs = left * config.train_batch_size / self.num_samples
            line += f", {epochs:{',.0f' if epochs >= 100 else '.3g'}} epochs of {self.num_samples:,}"
        precision = "float32" if config.mixed_precision == "no" else config.mixed_precision
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        line += f"; {trained / 1e6:.4g} M trained parameters, {precision} on {place}, {processes} process"
        return line + "es" * (processes > 1)

    def progress_bar(self) -> Any:
        """The bar over the steps of the run, a context manager."""
        from tqdm.auto import tqdm

        last = self.config.max_train_steps
        self._bar = tqdm(initial=self.first_step, total=last, desc="steps", disable=not self.is_main, smoothing=0.05)
        if self.config.compile:
            self._bar.set_postfix_str("the first step compiles")
        self.restart_clock()
        return self._bar

    def restart_clock(self) -> None:
        """Begin the measurement of time anew, after work that is not training, such as validation."""
        self._mark = time.perf_counter()

    def add(self, losses: dict[str, torch.Tensor], counted: torch.Tensor) -> None:
        """Add the losses of a step. Args: `counted`: 1, or 0 for a skipped step, whose losses are ignored."""
        values = {name: torch.where(counted > 0, value, 0.0) for name, value in (losses | {"finite": counted}).items()}
        if self._sums is not None:
            values = {name: self._sums[name] + value for name, value in values.items()}
        self._sums, self.summed = values, self.summed + 1

    def write(self, step: int, learning_rate: float, skipped: int) -> None:
        """Write a line with the means since the last one; every process has to call this.

        Args: `step`: steps done; `skipped`: steps skipped so far.
        """
        names, values = list(self._sums), list(self._sums.values())
        flat = self.accelerator.reduce(torch.cat([v.flatten() for v in values]), reduction="mean")
        sums = dict(zip(names, flat.cpu().split([v.numel() for v in values]), strict=True))  # waits for the device
        elapsed = time.perf_counter() - self._mark
        images = self.config.train_batch_size * self.summed
        self.seconds += elapsed
        counted = sums.pop("finite")
        record = {n: _means(torch.cat([v, counted])[None])[0] for n, v in sums.items() if v.numel() == 1}
        record |= {"learning_rate": learning_rate, "images_per_second": images / elapsed}
        if self._mfu_per_rate is not None:
            record["mfu"] = self._mfu_per_rate * images / elapsed
        record["peak_memory_gib"] = peak_memory_bytes(self.accelerator.device) / 2**30
        tables = {name: _means(value.view(-1, 2)) for name, value in sums.items() if value.numel() > 1}
        scalars = record | {f"{name}/{k}": value for name, row in tables.items() for k, value in enumerate(row)}
        self._sums, self.summed = None, 0
        if self.is_main:
            counters = {"skipped_steps": skipped, "seconds": self.seconds} | self._amounts(step)
            self.folder.log({"step": step} | record | tables | counters)
            self.accelerator.log({name: value for name, value in scalars.items() if value is not None}, step=step)
            if self._bar is not None:
                loss = math.nan if record["loss"] is None else record["loss"]
                self._bar.set_postfix(loss=f"{loss:.4g}", images=f"{record['images_per_second']:.0f}/s")

    def _amounts(self, step: int) -> dict[str, float]:
        """Epochs and operations up to a step, where they are known, and the number of processes."""
        images = step * self.config.train_batch_size
        known = {"epochs": self.num_samples and images / self.num_samples}
        known["flops"] = self.flops_per_image and images * self.flops_per_image
        return {name: value for name, value in known.items() if value is not None} | {
            "processes": self.accelerator.num_processes
        }

    def report(self, step: int, values: dict[str, float], picture: Any = None, name: str = "validation") -> None:
        """Log and print what a validation measured, and its picture (PIL), which is also written into samples/. The
        values come last: if log.jsonl has them, the validation was complete."""
        if not self.is_main:
            return
        if picture is not None:
            write_picture(self.folder.samples(step), picture)
            for tracker in self.accelerator.trackers:
                if self.config.report_to == "tensorboard":
                    tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({name: [picture]}, step=step)
        if values:
            self.accelerator.log(values, step=step)
            self.folder.log({"step": step} | values)
            (print if self._bar is None else self._bar.write)(f"step {step}: {numbers_line(values)}")

    def median_rate(self) -> float:
        """Images per second: the median of the whole log, earlier starts included. Its first line, which contains
        compilation, counts only if there is no other."""
        rates = [line["images_per_second"] for line in self.folder.read_log() if "images_per_second" in line]
        return statistics.median(rates[1:] or rates)
