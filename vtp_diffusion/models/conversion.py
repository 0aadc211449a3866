"""Released state dicts -> ours, strictly: every key must be renamed, and every shape must match."""

from collections.abc import Mapping
from typing import Any

import torch

StateDict = dict[str, torch.Tensor]
# Released name -> our names; a tensor with several names is split into equal parts of its rows, in this order.
RenameTable = dict[str, tuple[str, ...]]


def with_kinds(modules: RenameTable) -> RenameTable:
    """A table of module names -> the table of their weights and biases."""
    return {
        f"{theirs}.{kind}": tuple(f"{name}.{kind}" for name in ours)
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    }


def rename_strictly(state: Mapping[str, torch.Tensor], table: RenameTable, what: str) -> StateDict:
    """Rename every tensor of `state` by `table`; tensors with several names are split along their rows.

    Args: `what`: the start of the error message.
    Raises: ValueError naming the keys that are missing and those that the table does not have.
    """
    wrong = {"missing": sorted(set(table) - set(state)), "unexpected": sorted(set(state) - set(table))}
    if problems := [f"{kind} keys {keys}" for kind, keys in wrong.items() if keys]:
        raise ValueError(f"{what}: {'; '.join(problems)}.")
    renamed = {}
    for theirs, ours in table.items():
        if len(ours) == 1:
            renamed[ours[0]] = state[theirs]
        else:
            # Copies: parameters must not share storage.
            parts = (part.clone() for part in state[theirs].tensor_split(len(ours)))
            renamed |= dict(zip(ours, parts, strict=True))
    return renamed


def load_strict(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> Any:
    """Load `state` into `model`, after checking every shape, and return it.

    The tensors replace the parameters, so the model can be built on the meta device, without an initialisation that
    would be overwritten.

    Args:
        model: without non-persistent buffers, which have no values on the meta device.
        state: has exactly the keys of `model.state_dict()`, as `rename_strictly` ensures.
        source: where the weights come from, for the message.
    Raises: ValueError naming tensors that have another shape or are not floating point.
    """
    expected, problems = model.state_dict(), []
    for name, tensor in sorted(state.items()):
        if tensor.shape != expected[name].shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected floating point")
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}.")
    model.load_state_dict(dict(state), strict=True, assign=True)
    return model
