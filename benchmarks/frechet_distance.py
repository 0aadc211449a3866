"""Seconds of a Fréchet distance of 2048 features, against SciPy's matrix square root, which most FID programs call.

    python benchmarks/frechet_distance.py --output benchmarks/results/frechet_distance_cpu.json
    python benchmarks/frechet_distance.py --device cuda --output benchmarks/results/frechet_distance_h100.json

The statistics are of features whose covariance has eigenvalues like 1/rank. The distance is measured with more samples
than features, with fewer, which is computed differently, and to a reference that was compared before, whose root is
cached. SciPy always runs on the CPU, and once, since it is slow.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from vtp_diffusion.metrics.frechet import GaussianStatistics, frechet_distance
from vtp_diffusion.runtime.disk import write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048, help="number of features")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--scipy", action=argparse.BooleanOptionalAction, default=True, help="measure the peer too")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    dim, device = arguments.dim, torch.device(arguments.device)
    sets = {count: features(count, dim, seed, device) for seed, count in enumerate((3 * dim, 3 * dim + 1, dim // 2))}
    many, others, few = (GaussianStatistics.of(x, device=device) for x in sets.values())

    fresh = GaussianStatistics.of(sets[3 * dim], device=device)
    results = {
        "dim": dim,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "seconds": {
            "first_distance": seconds(lambda: frechet_distance(fresh, others), device),
            "another_to_the_same_reference": seconds(lambda: frechet_distance(fresh, others), device),
            "fewer_samples_than_features": seconds(lambda: frechet_distance(fresh, few), device),
        },
        "value": frechet_distance(many, others),
    }
    if arguments.scipy:
        results |= measure_scipy(many, others)
        results["speedup"] = round(results["scipy_seconds"] / results["seconds"]["first_distance"], 2)
        results["relative_difference"] = abs(results["value"] / results["scipy_value"] - 1)
    print(json.dumps(results, indent=2))
    if arguments.output:
        write_json(arguments.output, results)


def features(count: int, dim: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1, dtype=torch.float64).rsqrt()
    x = torch.randn(count, dim, generator=generator, dtype=torch.float64) * spectrum * (1 + 0.1 * seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)))[0]
    return (x.float() @ rotation).to(device)


def seconds(call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()  # returns a Python number: the device has finished
    return round(time.perf_counter() - start, 2)


def measure_scipy(a: GaussianStatistics, b: GaussianStatistics) -> dict:
    from scipy.linalg import sqrtm

    start = time.perf_counter()
    root = sqrtm(a.covariance.cpu().numpy() @ b.covariance.cpu().numpy()).real
    traces = a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    value = ((a.mean - b.mean).square().sum() + traces).item()
    return {"scipy_seconds": round(time.perf_counter() - start, 2), "scipy_value": value}


if __name__ == "__main__":
    main()
