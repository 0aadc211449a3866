"""The networks of `TIMM_NETWORKS` at the smallest sizes of their architectures, with random weights."""

from dataclasses import replace

import torch
from safetensors.torch import save_file

from vtp_diffusion.metrics import timm_networks

VIT = {"embed_dim": 12, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 12)}


def make_small(monkeypatch):
    """Makes the table's architectures small, their inputs and names as they are."""
    for name, network in timm_networks.TIMM_NETWORKS.items():
        small = replace(network, architecture=CONVNEXT if name == "convnextv2_b" else VIT)
        monkeypatch.setitem(timm_networks.TIMM_NETWORKS, name, small)


def save_weights(folder, name):
    """A file of random weights of a network, as timm's repositories hold it."""
    torch.manual_seed(len(name))
    model = timm_networks.timm_model(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    file = folder / f"{name}.safetensors"
    save_file(model.state_dict(), file)
    return file
