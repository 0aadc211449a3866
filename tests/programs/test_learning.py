"""The same learning as published: initial weights, first steps of a second implementation, the curve of 200 steps."""

import json
import math

import pytest
import torch
from learning_curve import CURVE, NUM_CLASSES, SHAPE, learning_curve, load_program, read_log, words, write_data
from safetensors.torch import load_file
from test_train_dit import fresh_accelerate  # noqa: F401

from vtp_diffusion import AutoencoderVTP, LightningDiTTransformer2DModel
from vtp_diffusion.data.latent_shards import LatentDataset
from vtp_diffusion.generation.objective import FlowMatchingObjective, training_inputs
from vtp_diffusion.generation.transformer_config import build_transformer
from vtp_diffusion.models.latent_space import latent_statistics
from vtp_diffusion.training.loop import TrainingRun
from vtp_diffusion.training.run_folder import RunFolder

# --- initial weights ---


def expected_distribution(name: str, width: int, hidden: int, patch: int, out: int) -> tuple[str, float]:
    """Of a parameter, as DiT and LightningDiT publish it (`initialize_weights` of facebookresearch/DiT)."""
    if "modulation" in name or "proj_out" in name:
        return "zero", 0.0
    if "norm" in name:
        return "one", 0.0
    if name.endswith("bias"):
        return "zero", 0.0
    if "class_embed" in name or "time_embed" in name:
        return "normal", 0.02
    # xavier: inputs + outputs; query, key and value are one matrix in the published code, as are both halves of w12
    fans = {"patch_embed": patch + width, "to_q": 4 * width, "to_k": 4 * width, "to_v": 4 * width}
    fans |= {"to_out": 2 * width, "w12": width + 2 * hidden, "w3": hidden + width}
    (fan,) = (fan for part, fan in fans.items() if part in name)
    return "uniform", math.sqrt(6 / fan)


def test_initial_weights_follow_the_published_distributions():
    torch.manual_seed(0)
    model = LightningDiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=8, num_layers=2, num_attention_heads=4, attention_head_dim=16,
        num_classes=100, qk_norm=True,
    )  # fmt: skip
    model.initialize_weights()
    seen = set()
    for name, parameter in model.named_parameters():
        kind, scale = expected_distribution(name, 64, int(2 / 3 * 4 * 64), 4 * 8, 4 * 8)
        values = parameter.detach().flatten()
        seen.add(kind)
        if kind in ("zero", "one"):
            assert (values == (kind == "one")).all(), name
            continue
        error = 4 / math.sqrt(2 * len(values))  # four standard errors of a standard deviation
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values)), name
        assert values.std().item() == pytest.approx(scale / math.sqrt(3) if kind == "uniform" else scale, rel=error), (
            name
        )
        if kind == "uniform":
            assert 0.99 * scale < values.abs().max() <= scale, name
        else:
            assert values.abs().max() > 3 * scale, name
    assert seen == {"zero", "one", "uniform", "normal"}


# --- a second implementation ---


def plain_velocity(w: dict, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, heads: int) -> torch.Tensor:
    """LightningDiT with qk-norm and patch 1, written from the papers on a dictionary of weights. `x`: (B, C, s, s)."""

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, value):
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def modulation(name, parts):
        return [part[:, None] for part in linear(f"{name}.linear", silu(condition)).split(width, dim=1)]

    def silu(value):
        return value / (1 + torch.exp(-value))

    def rotated(value):  # (B, h, N, d): a pair of channels is a complex number, turned by place x frequency
        turned = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous()) * turns
        return torch.view_as_real(turned).flatten(-2)

    batch, channels, side, _ = x.shape
    width = w["class_embed.weight"].shape[1]
    angles = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    time = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    condition = (
        linear("time_embed.linear_2", silu(linear("time_embed.linear_1", time))) + w["class_embed.weight"][labels]
    )
    head = width // heads
    place = torch.arange(side * side)
    frequencies = 10000 ** (-torch.arange(head // 4) / (head // 4))
    angles = torch.cat([(place // side)[:, None] * frequencies, (place % side)[:, None] * frequencies], dim=1)
    turns = torch.polar(torch.ones_like(angles), angles)  # (N, d / 2): rows, then columns
    tokens = x.reshape(batch, channels, -1).transpose(1, 2)  # (B, N, C)
    tokens = tokens @ w["patch_embed.weight"][:, :, 0, 0].T + w["patch_embed.bias"] + w["pos_embed"]
    for k in range(sum(name.endswith("mlp.w3.bias") for name in w)):
        block = f"blocks.{k}"
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(f"{block}.modulation", 6)
        y = norm(f"{block}.norm1", tokens) * (1 + scale) + shift
        q, k_, v = (
            linear(f"{block}.attn.to_{name}", y).reshape(batch, -1, heads, head).transpose(1, 2) for name in "qkv"
        )
        q, k_ = rotated(norm(f"{block}.attn.norm_q", q)), rotated(norm(f"{block}.attn.norm_k", k_))
        attended = torch.softmax(q @ k_.transpose(2, 3) / math.sqrt(head), dim=-1) @ v
        attended = attended.transpose(1, 2).reshape(batch, -1, width)
        tokens = tokens + gate * linear(f"{block}.attn.to_out.0", attended)
        y = norm(f"{block}.norm2", tokens) * (1 + scale_mlp) + shift_mlp
        first, second = linear(f"{block}.mlp.w12", y).split(w[f"{block}.mlp.w3.weight"].shape[1], dim=-1)
        tokens = tokens + gate_mlp * linear(f"{block}.mlp.w3", silu(first) * second)
    shift, scale = modulation("modulation_out", 2)
    out = linear("proj_out", norm("norm_out", tokens) * (1 + scale) + shift)
    return out.transpose(1, 2).reshape(x.shape)


def plain_loss(w: dict, inputs: dict, heads: int) -> torch.Tensor:
    """Mean squared error of the velocity plus 1 - cosine similarity over channels.

    Norms below 1e-8 count as 1e-8. Each of the two does, which decides the first gradient: the output is still zero,
    so that the gradient is 1e8 times a unit vector, and only clipping keeps it out of AdamW's second moments.
    """
    data, noise, t = inputs["latents"], inputs["noise"], inputs["times"][:, None, None, None]
    target = data - noise
    v = plain_velocity(w, t * data + (1 - t) * noise, inputs["times"], inputs["labels"], heads)
    cosine = (v * target).sum(1) / (v.norm(dim=1).clamp(min=1e-8) * target.norm(dim=1).clamp(min=1e-8))
    return (v - target).square().mean() + (1 - cosine).mean()


def plain_training(w: dict, batches, steps: int, heads: int, rate: float, decay: float) -> tuple[list, list, dict]:
    """AdamW (betas 0.9, 0.95, no decay), gradients clipped to 1, averaged weights: losses, norms, averages."""
    trained = [name for name in w if name != "pos_embed"]
    first, second = ({name: torch.zeros_like(w[name]) for name in trained} for _ in range(2))
    average, losses, norms = {name: w[name].clone() for name in trained}, [], []
    for step in range(1, steps + 1):
        leaves = {name: w[name].clone().requires_grad_() for name in trained}
        loss = plain_loss(w | leaves, next(batches), heads)
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        for name in trained:
            gradient = gradients[name] * min(1, 1 / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            change = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            w[name] = w[name] - rate * change
            average[name] = decay * average[name] + (1 - decay) * w[name]
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, average


def test_the_first_steps_are_those_of_a_second_implementation(tmp_path):
    write_data(tmp_path)
    program, steps = load_program(), 8
    program.main(words(tmp_path, "run", max_train_steps=steps))
    config = program.parse_config(program.Config, words(tmp_path, "inputs", max_train_steps=steps))
    vae = AutoencoderVTP.from_pretrained(config.vae)
    dataset = program.open_training_data(config, vae)
    torch.manual_seed(config.seed)
    transformer = build_transformer(config.model, dataset.shape, NUM_CLASSES, config.class_dropout_prob)
    objective, folder = FlowMatchingObjective(transformer, config.cosine_loss), RunFolder(config.output_dir, config)
    run = TrainingRun(config, folder, objective, transformer, "transformer", dataset.fingerprint)
    batches = program.latent_batches(run, config, dataset)
    inputs = training_inputs(run, config, batches, vae, dataset.shape, NUM_CLASSES)
    start = {name: value.detach().clone() for name, value in transformer.state_dict().items()}
    losses, norms, average = plain_training(start, inputs, steps, 4, config.learning_rate, config.ema_decay)
    log = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-4)
    assert [line["grad_norm"] for line in log] == pytest.approx(norms, rel=1e-3)
    saved = load_file(
        tmp_path / "run" / f"checkpoint-{steps}" / "transformer_ema" / "diffusion_pytorch_model.safetensors"
    )
    assert all(torch.allclose(saved[name], value, atol=1e-5) for name, value in average.items())


# --- the curve ---


def test_the_learning_curve_is_the_committed_one(tmp_path):
    expected, found = json.loads(CURVE.read_text(encoding="utf-8")), learning_curve(tmp_path)
    assert len(found["loss"]) == len(expected["loss"]) == 200
    for name in expected:
        assert found[name][:10] == pytest.approx(expected[name][:10], rel=1e-3)
    means = [torch.tensor(curve["loss"]).view(20, 10).mean(1) for curve in (found, expected)]
    assert torch.allclose(*means, rtol=0.02)
    # with the output still zero the error is the velocity's size, 1 from the noise and the rest from the data
    assert means[1][-2:].mean() < 0.6 * expected["loss"][0]


def test_the_curve_starts_where_a_zero_output_must(tmp_path):
    """E |data - noise|^2 + 1: with the published initialisation nothing else is possible."""
    write_data(tmp_path)
    program = load_program()
    config = program.parse_config(program.Config, words(tmp_path, "run"))
    stored = LatentDataset(config.latents).__getitems__(range(256))["latents"]
    mean, std = latent_statistics(AutoencoderVTP.from_pretrained(config.vae))
    size = ((stored - mean) / std).square().mean()
    first = json.loads(CURVE.read_text(encoding="utf-8"))["loss"][0]
    assert SHAPE == stored.shape[1:] and first == pytest.approx(1 + size.item() + 1, rel=0.05)
