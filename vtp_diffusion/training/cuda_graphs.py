"""CUDA graphs of the forward and backward passes of a training step: recorded once, then replayed.

Replaying a graph is one launch. Without it Python launches thousands of short kernels, and the GPU waits for it.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]  # name -> tensor, or name -> such a dictionary
Losses = dict[str, torch.Tensor]
WARM_UP = 3  # calls before recording: they compile, choose kernels, and allocate what is allocated once


def why_not_recorded(device: torch.device, processes: int, micro_steps: int, mixed_precision: str) -> str | None:
    """Why the passes of a run cannot be recorded; None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type}, no GPU"
    if processes > 1:
        return f"there are {processes} processes, which exchange gradients during the passes"
    if micro_steps > 1:
        return f"a step has {micro_steps} micro-steps"
    if mixed_precision not in ("no", "bf16"):
        return f"mixed_precision is {mixed_precision}, whose scales change from step to step"
    return None


class CUDARecorder:
    """Runs functions on a side stream and records them there.

    Recordings share one memory pool and reuse what earlier ones have freed: they have to be replayed all together, in
    the order of recording.
    """

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Any]) -> Any:
        """Result of `function()`, run on the side stream, ordered with the current stream.

        Autograd keeps accumulating a gradient on the stream where it first did so, and a recording can wait for no
        other stream. So what runs before recording runs on the side stream, too.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """(result, replay): the tensors that `function()` returns have no values until `replay()` computes them. Keep
        them: without a reference their memory is reused.

        Raises: torch.OutOfMemoryError: by `function`; the recording has been ended and its memory is free again.
            RuntimeError: CUDA could not record it. Its memory stays allocated in this process.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": other threads may still do what recording forbids, such as pinning memory for batches.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "the passes of a step could not be recorded: start again without cuda_graphs"
            ) from error
        return result, graph.replay


class GraphedPasses:
    """The forward and backward passes of a step, recorded after the first calls and replayed from then on.

    Gradients are never set to zero: in every replay the first recording that reaches a parameter overwrites its
    gradient, later ones add to it. The gradient tensors stay in memory: every call puts them back into `.grad`, which
    `zero_grad(set_to_none=True)` has emptied.

    `passes` may depend only on its inputs and on tensors that are changed in place: a replay runs no Python. The
    graphs keep the memory of the passes, so that evaluation between steps has less. If there is too little memory for
    recording, that is reported, and all passes run without graphs.

    Args:
        passes: takes the inputs of one part of the step, named tensors or dictionaries of them; adds gradients to
            `.grad` of the parameters; returns named losses, detached.
        parameters: those that get gradients.
        warm_up: how many calls run without being recorded, at least 1.
        report: called with the reason if passes are not recorded.
        recorder: records `passes`; tests without a GPU pass another one.
    """

    def __init__(
        self,
        passes: Callable[[Inputs], Losses],
        parameters: Iterable[nn.Parameter],
        warm_up: int = WARM_UP,
        report: Callable[[str], None] = print,
        recorder: CUDARecorder | None = None,
    ):
        if warm_up < 1:
            raise ValueError(f"warm_up is {warm_up}, expected at least 1: set-up of the first call cannot be recorded")
        self.passes, self.warm_up, self.report = passes, warm_up, report
        self.parameters = [p for p in parameters if p.requires_grad]
        self.recorder = CUDARecorder() if recorder is None else recorder
        self._inputs: list[Inputs] = []  # at fixed addresses
        self._recordings: list[tuple[Losses, Callable[[], None]]] = []
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._given_up = False

    def __call__(self, parts: list[Inputs]) -> list[Losses]:
        """Run a step: returns copies of the losses of each part; the gradients are in `.grad` of the parameters.

        Raises: ValueError: parts, names, shapes or dtypes differ from those of the first call, an input is no tensor,
            or there are gradients already.
        """
        if any(p.grad is not None for p in self.parameters):
            raise ValueError("parameters have gradients, expected none: call zero_grad(set_to_none=True) before")
        self._take(parts)
        if self.warm_up > 0:
            self.warm_up -= 1
        elif not self._recordings and not self._given_up:
            self._record()
        if not self._recordings:
            return [self.recorder.run(partial(self._pass, part)) for part in self._inputs]
        for _, replay in self._recordings:
            replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return [{name: value.clone() for name, value in losses.items()} for losses, _ in self._recordings]

    def _record(self) -> None:
        """Record all parts, or none if there is not enough memory for all of them."""
        gc.collect()  # reference cycles would keep memory from the recordings
        try:
            for part in self._inputs:
                self._recordings.append(self.recorder.record(partial(self._pass, part)))
            self._gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
            return
        except torch.OutOfMemoryError as error:
            reason = str(error)
        self._given_up = True
        self._recordings.clear()
        for parameter in self.parameters:
            parameter.grad = None
        self.report(f"the passes of a step are not recorded, since there is too little memory for that: {reason}")

    def _pass(self, part: Inputs) -> Losses:
        """Run `passes` on a part, and add its gradients to those of earlier parts in a few kernels, where autograd
        would launch one for every parameter. Until then the part's gradients take memory of their own."""
        before = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        losses = self.passes(part)
        pairs = [
            (gradient, p.grad)
            for gradient, p in zip(before, self.parameters, strict=True)
            if gradient is not None and p.grad is not None
        ]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        for gradient, parameter in zip(before, self.parameters, strict=True):
            if gradient is not None:
                parameter.grad = gradient
        return losses

    def _take(self, parts: list[Inputs]) -> None:
        """Copy the inputs of a step to where the recordings read them."""
        came = _by_place(parts)
        if not self._inputs:
            self._inputs = [_copied(part) for part in parts]
            return
        kept = _by_place(self._inputs)
        differing = [
            f"  {place[1]} of part {place[0]}: {_kind(came.get(place))}, expected {_kind(kept.get(place))}"
            for place in sorted(came.keys() | kept.keys())
            if _kind(came.get(place)) != _kind(kept.get(place))
        ]
        if differing:
            raise ValueError("recorded passes take the same shapes and dtypes at every step:\n" + "\n".join(differing))
        torch._foreach_copy_(list(kept.values()), [came[place] for place in kept])


def _copied(inputs: Inputs) -> Inputs:
    return {key: _copied(value) if isinstance(value, dict) else value.clone() for key, value in inputs.items()}


def _by_place(parts: list[Inputs]) -> dict[tuple[int, str], torch.Tensor]:
    """(number of the part, name) -> input. Raises: ValueError for one that is no tensor."""
    return {(number, name): value for number, inputs in enumerate(parts) for name, value in _named(inputs)}


def _named(inputs: Inputs, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors. A function within another one that calls itself would be a reference cycle and keep the
    tensors of many steps until the next garbage collection."""
    for key, value in inputs.items():
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield prefix + key, value
        else:
            raise ValueError(
                f"{prefix}{key} is of type {type(value).__name__}, expected a tensor: a recording would keep the "
                "value of the first step"
            )


def _kind(value: torch.Tensor | None) -> str:
    if value is None:
        return "nothing"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device.type}"
