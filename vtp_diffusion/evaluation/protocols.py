"""Protocols: four ways of measuring that papers call FID-50K, and what each of them fixes.

All pass 50,000 images through the Inception network of 2015-12-05 with TensorFlow 1's resize, in float32. They differ
in the reference, in the classes of the images and in how pixels become uint8, and their numbers do not compare.

- adm: the evaluator of guided-diffusion (arXiv:2105.05233). DiT, SiT and LightningDiT round as here and draw labels;
  ADM's own sampler truncates 127.5 (x + 1).
- torch-fidelity: that package with ADM's mean and covariance, as MAR (arXiv:2406.11838) calls it.
- jit: torch-fidelity with JiT's own statistics (arXiv:2511.13720). iMF's release for PyTorch uses them too.
- imf: iMF's release for JAX (arXiv:2512.02012): its own port of Inception, which follows PyTorch's resize, and its own
  statistics. The port is not run here: our Inception takes its place. Whether iMF draws labels was not checked.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from ..data.images import Rounding
from ..generation.sampling import LabelRule

ProtocolName = Literal["own", "adm", "torch-fidelity", "jit", "imf"]
OWN = "own"  # no published protocol: everything is as the options say


@dataclass(frozen=True)
class Protocol:
    """What a protocol fixes, beside Inception in float32.

    Attributes:
        reference: the authors' name of the file with reference statistics.
        holds, lacks: arrays that this file has and has not, to tell it from those of other protocols.
        labels: classes of sampled images; "balanced" is 50 for each class of ImageNet.
        rounding: of sampled pixels, see `to_uint8`.
        num_images: number of samples to measure.
    """

    reference: str
    holds: tuple[str, ...]
    lacks: tuple[str, ...]
    labels: LabelRule
    rounding: Rounding
    num_images: int = 50_000


PROTOCOLS = {
    "adm": Protocol(
        "VIRTUAL_imagenet256_labeled.npz", ("mu", "sigma", "mu_s", "sigma_s", "arr_0"), (), "random", "half up"
    ),
    "torch-fidelity": Protocol("adm_in256_stats.npz", ("mu", "sigma"), (), "balanced", "half to even"),
    "jit": Protocol("jit_in256_stats.npz", ("mu", "sigma"), ("mu_s", "arr_0"), "balanced", "half to even"),
    "imf": Protocol("imagenet_256_fid_stats.npz", ("ref_mu", "ref_sigma"), ("mu",), "random", "half up"),
}


def follow_protocol(config: Any) -> None:
    """Set the options of a configuration of `eval/generation.py` that its published protocol fixes.

    Raises: ValueError naming an option that contradicts the protocol.
    """
    protocol = PROTOCOLS[config.protocol]
    fixed = {"feature_network": ["inception"], "feature_mode": "exact"}
    fixed |= {"labels": protocol.labels, "num_images": protocol.num_images}
    for name, value in fixed.items():
        if (given := getattr(config, name)) is None:
            setattr(config, name, value)
        elif given != value:
            raise ValueError(
                f"{name} is {_words(given)}, but protocol {config.protocol} fixes {_words(value)}: leave it out, or "
                "measure without a protocol"
            )
    if not config.reference.endswith(".npz"):
        raise ValueError(
            f"reference is {config.reference}, but protocol {config.protocol} measures against the statistics in "
            f"{protocol.reference}: expected that file"
        )


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def check_reference(path: str, arrays: Collection[str], protocol: str) -> None:
    """Raises: ValueError if a file of statistics with these arrays is not that of the protocol. adm_in256_stats.npz
    and jit_in256_stats.npz have the same arrays: only their hashes, in result files, tell them apart."""
    if protocol == OWN:
        if "ref_mu" in arrays:
            raise ValueError(f"{path} holds ref_mu, as files of iMF do: expected mu and sigma, or --protocol imf")
        return
    wanted, foreign = PROTOCOLS[protocol], [name for name in PROTOCOLS[protocol].lacks if name in arrays]
    if "settings" in arrays or foreign or not set(wanted.holds) <= set(arrays):
        raise ValueError(
            f"{path} holds {', '.join(arrays)}, but protocol {protocol} measures against {wanted.reference}, which "
            f"holds {', '.join(wanted.holds)}: expected that file, or no protocol"
        )


def check_samples(name: str, settings: dict, protocol: str) -> None:
    """Raises: ValueError if the settings of images have other labels or another rounding than the protocol."""
    for key in ("labels", "rounding"):
        wanted = getattr(PROTOCOLS[protocol], key)
        if settings.get(key, wanted) != wanted:
            raise ValueError(
                f"the {name} images were made with {key} {settings[key]!r}, but protocol {protocol} fixes {wanted!r}: "
                "sample again with this protocol, or measure without one"
            )


def rounding_of(protocol: str) -> dict[str, Rounding]:
    """Keyword argument of `sample_numbers` that a protocol fixes; empty without a protocol."""
    return {} if protocol == OWN else {"rounding": PROTOCOLS[protocol].rounding}


def describe_protocol(protocol: str, settings: dict | None) -> dict:
    """A published protocol for result files. Args: `settings`: of the sampler, if they are known."""
    fixed = PROTOCOLS[protocol]
    made = settings or {}
    found = {key: made.get(key, "unknown (images were given as files)") for key in ("labels", "rounding")}
    return {"name": protocol, "reference": fixed.reference, "num_images": fixed.num_images} | found
