"""Released state dicts -> ours, strictly: renames that account for every key, loading that accepts no other shape."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

StateDict = dict[str, torch.Tensor]
# Released name -> our names; several names share the rows of the tensor equally, in this order.
RenameTable = dict[str, tuple[str, ...]]


def with_kinds(modules: RenameTable) -> RenameTable:
    """Renames of modules -> renames of their weights and biases."""
    return {
        f"{theirs}.{kind}": tuple(f"{name}.{kind}" for name in ours)
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    }


def rename_strictly(state: Mapping[str, torch.Tensor], table: RenameTable, what: str) -> StateDict:
    """Rename every tensor of `state` by `table`; tensors with several names are split along their rows.

    Raises: ValueError: starting with `what`, naming the keys that are missing and those the table does not know.
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
    """`model` with the tensors of `state` as its parameters, after checking every shape.

    The tensors take the place of the parameters, so that a model built on the meta device (nothing is initialised only
    to be overwritten) is complete afterwards.

    Args:
        model: without buffers outside its state dict, which the meta device would leave without values.
        state: keys of `model.state_dict()`, which `rename_strictly` has seen to.
        source: where the weights come from, for the message.
    Raises: ValueError: naming tensors that are mis-shaped or not floating point.
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


def read_safetensors(path: str | Path) -> StateDict:
    """Tensors of a safetensors file; ValueError with its path when it is truncated or no such file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
