"""Protocols: four ways of measuring that papers call FID-50K, and what each of them fixes.

All pass 50,000 images through the Inception network of 2015-12-05 with TensorFlow 1's resize, in float32. They differ
in the reference, in the classes of the images and in how pixels become uint8, and their numbers do not compare.

- adm: the evaluator of guided-diffusion (arXiv:2105.05233). DiT, SiT and LightningDiT round as here and draw labels;
  ADM's own sampler truncates 127.5 (x + 1).
- torch-fidelity: that package with ADM's mean and covariance, as MAR (arXiv:2406.11838) calls it.
- jit: torch-fidelity with statistics of JiT's own (arXiv:2511.13720). iMF's release for PyTorch uses it too.
- imf: iMF's release for JAX (arXiv:2512.02012), a port of Inception that follows PyTorch's resize, with statistics of
  its own. The port itself is not run here: our Inception stands in for it. That it draws labels is not checked.
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
        reference: what its authors call the file of its statistics.
        holds, lacks: arrays that tell this file from those of others.
        labels: classes of sampled images; "balanced" is 50 a class of ImageNet.
        rounding: of sampled pixels, see `to_uint8`.
        num_images: that are measured.
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
    """Give a configuration of `eval/generation.py` what its published protocol fixes.

    Raises: ValueError: an option that contradicts the protocol, named.
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
    """Raises: ValueError if a file of statistics with these arrays is not the protocol's. adm_in256_stats.npz and
    jit_in256_stats.npz hold arrays of the same names: only their hashes, in the results, tell them apart."""
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
    """Raises: ValueError if images say that they were made with labels or a rounding unlike the protocol's."""
    for key in ("labels", "rounding"):
        wanted = getattr(PROTOCOLS[protocol], key)
        if settings.get(key, wanted) != wanted:
            raise ValueError(
                f"the {name} images were made with {key} {settings[key]!r}, but protocol {protocol} fixes {wanted!r}: "
                "sample again with this protocol, or measure without one"
            )


def rounding_of(protocol: str) -> dict[str, Rounding]:
    """The argument of sampling that a protocol fixes; nothing without one."""
    return {} if protocol == OWN else {"rounding": PROTOCOLS[protocol].rounding}


def describe_protocol(protocol: str, settings: dict | None) -> dict:
    """What result files say of a published one. Args: `settings`: what made the images, where that is known."""
    fixed = PROTOCOLS[protocol]
    made = settings or {}
    found = {key: made.get(key, "unknown (images were given as files)") for key in ("labels", "rounding")}
    return {"name": protocol, "reference": fixed.reference, "num_images": fixed.num_images} | found
