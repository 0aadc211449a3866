"""Seconds and peak memory of one VTP-Large encode + decode and one LightningDiT-XL/1 forward at 256 px on a CPU.

Weights are random: neither number depends on them. Each part runs in a process of its own, because a process's peak
memory never falls. The ratio printed is the achieved rate over that of a plain matrix product of the same type.

    python benchmarks/cpu_forward.py --output benchmarks/results/cpu_forward.json
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import vtp_diffusion as vtp
from vtp_diffusion.models.transformer_lightning_dit import LIGHTNING_DIT_SIZES
from vtp_diffusion.runtime.disk import write_json

# Multiply-adds count twice: 2 · parameters · tokens for the linear layers, 4 · tokens² · width a layer for attention.
PARTS = ("vtp_large_encode_decode", "lightning_dit_xl_1_forward")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--part", choices=PARTS, help="measure one part in this process and print its JSON")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measure(arguments.part)))
        return
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32", "batch": 1}
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part]
        results[part] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(part, results[part])
    if arguments.output:
        write_json(arguments.output, results)


@torch.inference_mode()
def measure(part: str) -> dict:
    if part == PARTS[0]:
        model, inputs, tokens = vtp.AutoencoderVTP().eval(), (torch.rand(1, 3, 256, 256) * 2 - 1,), 257
        width, layers = model.config.encoder_hidden_size, 2 * model.config.encoder_num_layers
    else:
        model = vtp.LightningDiTTransformer2DModel(**LIGHTNING_DIT_SIZES["XL"]).eval()
        inputs, tokens = (torch.randn(1, 64, 16, 16), torch.rand(1), torch.zeros(1, dtype=torch.long)), 256
        width, layers = 1152, model.config.num_layers
    seconds = best_of(lambda: model(*inputs))
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "modul" not in n
    )
    operations = 2 * linear * tokens + 4 * tokens**2 * width * layers
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 3),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "gflop": round(operations / 1e9, 1),
        "share_of_matrix_product_rate": round(operations / seconds / matrix_product_rate(), 2),
    }


def matrix_product_rate() -> float:
    """Operations a second of a float32 product of a layer's size."""
    a, b = torch.randn(256, 1152), torch.randn(1152, 4608)
    return 2 * 256 * 1152 * 4608 / best_of(lambda: a @ b, repeats=20)


def best_of(call, repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
