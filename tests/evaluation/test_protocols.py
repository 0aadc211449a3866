"""evaluation/protocols.py: what a protocol fixes, and that nothing contradicts it."""

import numpy as np
import pytest
import torch

from vtp_diffusion.data.images import to_uint8
from vtp_diffusion.evaluation.one_pass import USUAL_NETWORKS
from vtp_diffusion.evaluation.protocols import (
    PROTOCOLS,
    check_reference,
    check_samples,
    describe_protocol,
    follow_protocol,
)
from vtp_diffusion.evaluation.references import read_statistics

ARRAYS = {name: protocol.holds for name, protocol in PROTOCOLS.items()}


class Given:
    """The options that a protocol looks at, as a user leaves them."""

    def __init__(self, **options):
        self.labels = self.num_images = self.feature_network = None
        self.feature_mode = "exact"
        self.reference, self.protocol = "statistics.npz", "jit"
        vars(self).update(options)


def test_what_is_left_open_follows_the_protocol():
    config = Given()
    follow_protocol(config)
    assert (config.labels, config.num_images, config.feature_network) == ("balanced", 50_000, ["inception"])
    follow_protocol(config)  # a configuration is checked again where it is copied


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "random"}, "labels is random, but protocol jit fixes balanced"),
        ({"num_images": 1000}, "num_images is 1000, but protocol jit fixes 50000"),
        ({"feature_mode": "fast"}, "feature_mode is fast, but protocol jit fixes exact"),
        ({"feature_network": list(USUAL_NETWORKS)}, "feature_network is vgg16, .*, but protocol jit fixes inception"),
        ({"reference": "photos"}, "reference is photos, but protocol jit measures against .* jit_in256_stats.npz"),
    ],
)
def test_an_option_that_contradicts_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        follow_protocol(Given(**options))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_file_of_a_protocol_is_told_by_its_arrays(protocol):
    check_reference("r.npz", ARRAYS[protocol], protocol)
    with pytest.raises(ValueError, match=f"settings, but protocol {protocol} measures against"):
        check_reference("r.npz", [*ARRAYS[protocol], "settings"], protocol)  # one of our own


@pytest.mark.parametrize(("file", "protocol"), [("adm", "jit"), ("jit", "adm"), ("imf", "jit"), ("adm", "imf")])
def test_the_file_of_another_protocol_is_refused(file, protocol):
    with pytest.raises(ValueError, match=f"r.npz holds {ARRAYS[file][0]}.*but protocol {protocol} measures against"):
        check_reference("r.npz", ARRAYS[file], protocol)


def test_statistics_of_imf_are_read_under_their_names(tmp_path):
    class Network:
        name, output_dims = "inception", {"features": 3}

        def describe(self):
            return {"name": "inception"}

    np.savez(tmp_path / "r.npz", ref_mu=np.arange(3.0), ref_sigma=np.eye(3))
    found = read_statistics(tmp_path / "r.npz", Network(), protocol="imf")
    assert found["features"].mean.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="holds ref_mu, .* or --protocol imf"):
        read_statistics(tmp_path / "r.npz", Network())


def test_images_that_say_they_were_made_otherwise_are_refused():
    check_samples("generated", {"labels": "balanced"}, "jit")
    with pytest.raises(ValueError, match="made with labels 'random', but protocol jit fixes 'balanced'"):
        check_samples("generated", {"labels": "random"}, "jit")
    with pytest.raises(ValueError, match="made with rounding 'half to even', but protocol imf fixes 'half up'"):
        check_samples("generated", {"labels": "random", "rounding": "half to even"}, "imf")
    assert describe_protocol("jit", None)["labels"].startswith("unknown")


def test_roundings_differ_where_a_pixel_lies_halfway_between_two_levels():
    images = torch.tensor([100.2, 254.8, 300.0]) / 127.5 - 1
    assert to_uint8(images, "half up").tolist() == to_uint8(images).tolist() == [100, 255, 255]
    halfway = torch.tensor([-0.4, 0.0, 0.4])  # levels 76.5, 127.5, 178.5: exact in float32 once scaled
    assert to_uint8(halfway).tolist() == [76, 128, 178] and to_uint8(halfway, "half up").tolist() == [77, 128, 179]
