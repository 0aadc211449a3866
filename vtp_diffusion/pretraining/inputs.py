"""What each objective of pre-training gets in a step: its share of the batch, crops, masks, captions, and the samples
stochastic depth keeps. What happens to a sample depends on the seed and its position in the run alone, so that a
resumed run goes on bit for bit and several processes do what one does; only stochastic depth is drawn for a process's
whole batch.
"""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.augmentation import NUM_DRAWS, AugmentationConfig, augment_images
from ..data.batches import (
    Columns,
    all_images,
    collate_images,
    fits_on_device,
    gathered_batches,
    read_batches,
    to_device,
)
from ..data.captions import tokenize_captions
from ..data.image_datasets import ImageDataset
from ..data.order import StepBatchSampler, draw_for_positions
from ..data.streaming import Collate, StreamBatches, StreamingImages
from ..models.stochastic_depth import draw_kept
from ..runtime.processes import gather_objects
from ..training.loop import TrainingRun
from .crops import draw_crops, make_crops
from .joint import VTPForPreTraining

# Streams of random numbers: see `draw_for_positions` and `step_generator`.
AUGMENTATION, NOISE, CROPS, SHARES, KEPT = range(5)
MAX_BLOCK = 1024  # samples of which a share is a whole number


def share_block(share: float) -> tuple[int, int]:
    """(k, n): of every n consecutive samples k belong to a share of the batch, n as small as possible."""
    fraction = Fraction(share).limit_denominator(MAX_BLOCK)
    return fraction.numerator, fraction.denominator


def check_share(name: str, share: float, batch_size: int) -> None:
    """ValueError unless a share of a batch, or of what a process has of it in a micro-step, is a whole number of
    samples in every block of it."""
    k, n = share_block(share)
    if k == 0:
        raise ValueError(f"{name}.share is {share}, expected at least 1 sample in {MAX_BLOCK}")
    if batch_size % n:
        raise ValueError(
            f"{name}.share is {share} ({k} of {n}) of a batch of {batch_size} images a process and micro-step, "
            f"expected a multiple of {n}, so that each has as many of them"
        )


def choose_share(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Indices of a random share of the samples, in order: in every block those with the least scores (N,)."""
    k, n = share_block(share)
    chosen = scores.unflatten(0, (-1, n)).argsort(dim=1, stable=True)[:, :k].sort(dim=1).values  # (N/n, k)
    return (chosen + torch.arange(0, len(scores), n)[:, None]).flatten()


class _Collate:
    """Items -> columns, captions tokenised in the process that reads; an object, since it travels to workers."""

    def __init__(self, context_length: int | None):
        self.context_length = context_length

    def __call__(self, items: list[dict]) -> Columns:
        columns = collate_images(items)
        if self.context_length is not None:
            captions = [item["caption"] for item in items]
            columns["token_ids"], columns["paired"] = tokenize_captions(captions, self.context_length)
        return columns


def training_batches(
    run: TrainingRun,
    dataset: Dataset | StreamingImages,
    context_length: int | None,
    keep_on_device: bool | None,
    num_workers: int,
) -> Iterable[Columns]:
    """Batches of "image" uint8 (B, 3, R, R) and, with a context length, "token_ids" (B, L) and "paired" (B,) bool;
    one for each of the run's micro-steps, of a stream without end."""
    if isinstance(dataset, StreamingImages):
        return stream_batches(run, dataset, _Collate(context_length), num_workers)
    sampler: StepBatchSampler = run.batch_sampler(len(dataset), dataset.weights)
    if not fits_on_device(len(dataset) * 3 * dataset.resolution**2, run.device, keep_on_device):
        return read_batches(dataset, sampler, _Collate(context_length), run.device, num_workers)
    columns = {"image": all_images(dataset).to(run.device)}
    if context_length is not None:
        token_ids, paired = tokenize_captions(dataset.captions, context_length)
        columns |= {"token_ids": token_ids.to(run.device), "paired": paired.to(run.device)}
    return gathered_batches(columns, sampler)


class PreTrainingInputs:
    """Batches -> inputs of `VTPForPreTraining`, micro-step by micro-step.

    Args:
        run: whose seed, step and processes decide every draw.
        objective: with the objectives to feed.
        augmentation: changes of the images of contrastive and reconstruction; self-supervision has its own.
        resolution: side of the images.

    Raises:
        ValueError: a share that is no whole number of samples, a size that is no multiple of the patch.
    """

    def __init__(
        self, run: TrainingRun, objective: VTPForPreTraining, augmentation: AugmentationConfig, resolution: int
    ):
        self.run, self.objective, self.augmentation = run, objective, augmentation
        self.patch = objective.autoencoder.spatial_compression_ratio
        self.resolution = resolution
        for name in ("self_supervision", "reconstruction"):
            if name in objective.objectives:
                share = objective.objectives[name].config.share
                check_share(name, share, run.micro_batch_size)

    def __call__(self, micro_step: int, batch: Columns) -> dict[str, dict[str, torch.Tensor]]:
        """Inputs of every objective from a batch on the device."""
        run, objectives = self.run, self.objective.objectives
        draws = run.draw(micro_step, self._draw_augmentation, AUGMENTATION)["augmentation"]
        generator = run.generator(micro_step, KEPT)
        inputs: dict[str, dict[str, torch.Tensor]] = {}
        if "contrastive" in objectives or "reconstruction" in objectives:
            images = augment_images(batch["image"], self.augmentation, draws=draws)
        if "contrastive" in objectives:
            inputs["contrastive"] = {"images": images, "token_ids": batch["token_ids"], "paired": batch["paired"]}
            inputs["contrastive"] |= objectives["contrastive"].draw_kept(len(images), generator)
        if "self_supervision" in objectives:
            inputs["self_supervision"] = self._self_supervision(micro_step, batch["image"], generator)
        if "reconstruction" in objectives:
            inputs["reconstruction"] = self._reconstruction(micro_step, images, generator)
        return inputs

    def _draw_augmentation(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"augmentation": torch.rand(count, NUM_DRAWS, generator=generator, device=generator.device)}

    def _chosen(self, micro_step: int, which: int, share: float) -> torch.Tensor:
        """Indices on the CPU of an objective's share of the micro-batch."""
        if share == 1:
            return torch.arange(self.run.micro_batch_size)
        # On the CPU: masks, which are drawn there, need to know the samples too, and nobody waits for the device.
        draw = draw_for_positions(
            lambda n, generator: {"scores": torch.rand(n, 2, generator=generator)},
            self.run.positions(micro_step),
            self.run.config.seed,
            SHARES,
        )
        return choose_share(draw["scores"][:, which], share)

    def _self_supervision(self, micro_step, images, generator) -> dict[str, torch.Tensor]:
        run, objective = self.run, self.objective.objectives["self_supervision"]
        config, positions = objective.config, run.positions(micro_step)
        chosen = self._chosen(micro_step, 0, config.share)
        rows = to_device(chosen, run.device)
        draws = run.draw(micro_step, lambda n, g: draw_crops(config.crops, n, g), CROPS)["crops"]
        views = make_crops(images[rows], config.crops, draws[rows], objective.recolour_views)
        side = views[0].shape[-1] // self.patch
        masks = [objective.draw_masks((side, side), positions[k], run.config.seed) for k in chosen.tolist()]
        inputs = {name: to_device(value, run.device) for name, value in objective.mask_inputs(np.stack(masks)).items()}
        done = micro_step // run.config.gradient_accumulation_steps / run.config.max_train_steps
        inputs["temperature"] = torch.full((), config.temperature_at(done), device=run.device)
        learns = float(done >= config.freeze_last_layer)
        inputs["prototypes_learn"] = torch.full((), learns, device=run.device)
        inputs |= objective.draw_kept(len(chosen), generator)
        return inputs | {"global_crops": views[0], "local_crops": views[1]}

    def _reconstruction(self, micro_step, images, generator) -> dict[str, torch.Tensor]:
        objective, autoencoder = self.objective.objectives["reconstruction"], self.objective.autoencoder
        share, rate = objective.config.share, objective.config.stochastic_depth
        rows = to_device(self._chosen(micro_step, 1, share), self.run.device)
        random = self.run.draw(
            micro_step, lambda n, g: objective.draw(autoencoder, images[:1].expand(n, -1, -1, -1), g), NOISE
        )
        inputs = {name: value[rows] for name, value in random.items()}
        kept = draw_kept(len(rows), autoencoder.config.encoder_num_layers, rate, generator)
        if kept is not None:
            inputs["kept"] = kept
        return inputs | {"images": images[rows]}


def stream_batches(run: TrainingRun, images: StreamingImages, collate: Collate, num_workers: int) -> StreamBatches:
    """The batches of a run's micro-steps; where they are is saved with its checkpoints and resumed from there.

    Raises:
        ValueError: the run is resumed with other numbers of processes or workers.
    """
    if run.first_step > 0 and run.resumed_data_state is None:
        raise ValueError(
            f"{run.folder.path}: the checkpoint of step {run.first_step} holds no stream position for process "
            f"{run.rank}: a stream is resumed with the same number of processes"
        )
    batches = StreamBatches(
        images,
        run.micro_batch_size,
        run.config.seed,
        run.device,
        collate,
        num_workers,
        run.rank,
        run.world_size,
        run.resumed_data_state,
    )
    run.data_state = batches.state_dict
    return batches


def count_left_out(run: TrainingRun, training: ImageDataset | StreamingImages, batches: Any) -> dict[str, int]:
    """How many samples were left out of training by all processes together; every process has to call this.

    Of a stream it is `StreamBatches.left_out` since the beginning of the run, a sample counting in every epoch. Of
    images by index it is how many different ones could not be read since the program was started.
    """
    if not isinstance(training, StreamingImages):
        return {"unreadable": len(set().union(*gather_objects(training.skipped)))}
    counts = batches.left_out
    total = run.accelerator.reduce(torch.tensor(list(counts.values()), device=run.device), reduction="sum")
    return dict(zip(counts, total.tolist(), strict=True))
