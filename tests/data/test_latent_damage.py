"""Latent shards that are damaged, of no use, or beside manifests that say nothing."""

import pytest
import torch
from test_latent_shards import SHAPE, random, write, write_ours

from vtp_diffusion.data.latent_shards import (
    METADATA_NAME,
    PLAN_NAME,
    LatentDataset,
    begin_extraction,
    check_shard,
    write_shard,
)
from vtp_diffusion.runtime import folder_lock
from vtp_diffusion.runtime.disk import write_json


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_shard_is_the_same_bytes_every_time(tmp_path):
    written = set()
    for k in range(4):
        path = tmp_path / f"{k}.safetensors"
        write_shard(path, random(2, 0), random(2, 1), torch.arange(2), ["x.png"], first=3)
        written.add(path.read_bytes())
    assert len(written) == 1


def test_a_flipped_byte_is_found_when_resuming_and_by_option_on_opening(tmp_path):
    write_ours(tmp_path)
    LatentDataset(tmp_path, verify=True)
    before = LatentDataset(tmp_path).fingerprint
    second = tmp_path / "latents_00001.safetensors"
    flip(second, -1)
    check_shard(tmp_path / "latents_00000.safetensors", 3, torch.bfloat16)
    for look in (lambda: check_shard(second, 3, torch.bfloat16), lambda: LatentDataset(tmp_path, verify=True)):
        with pytest.raises(ValueError, match="latents_00001.safetensors is damaged: its content is not what"):
            look()
    write_shard(second, random(3, 9), random(3, 9), torch.arange(3, 6) % 3, first=3)
    assert LatentDataset(tmp_path).fingerprint != before, "other values under the same names and sizes"
    write(tmp_path / "upstream")
    with pytest.raises(ValueError, match="has no SHA-256 in it: version 0.1 or another program wrote it"):
        LatentDataset(tmp_path / "upstream", verify=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.full((5, *SHAPE), float("nan")).bfloat16()}, "latents hold values that are not finite"),
        ({"labels": torch.full((5,), 10**15)}, "labels go from 10+ to 10+, expected 0 to 1048575"),
    ],
)
def test_shards_of_no_use_are_refused_before_training(changes, message, tmp_path):
    write(tmp_path, (5,), **changes)
    with pytest.raises(ValueError, match=message):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("name", [METADATA_NAME, PLAN_NAME])
@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_manifests_that_are_no_objects_are_named(content, name, tmp_path):
    write(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} (holds '..', expected a JSON object|is not JSON)"):
        LatentDataset(tmp_path) if name == METADATA_NAME else begin_extraction(tmp_path, {})


def test_the_same_images_with_other_classes_are_other_latents(tmp_path):
    plan = {"num_samples": 2, "classes": "2 from bird to bird-noto (1)"}
    begin_extraction(tmp_path / "new", plan)
    folder_lock.release(tmp_path / "new")
    with pytest.raises(ValueError, match=r"holds other latents:\n  classes: 2 from bird"):
        begin_extraction(tmp_path / "new", plan | {"classes": "1 from bird to bird (2)"})
    write_json(tmp_path / "old" / PLAN_NAME, {"num_samples": 2})
    begin_extraction(tmp_path / "old", plan)  # a plan that says nothing of classes: earlier versions wrote it
    folder_lock.release(tmp_path / "old")


def test_an_extraction_begun_when_the_same_images_had_another_fingerprint_goes_on(tmp_path):
    plan = {"classes": "1 from bird to bird (0)", "fingerprint": "newer"}
    write_json(tmp_path / PLAN_NAME, plan | {"fingerprint": "older"})
    with pytest.raises(ValueError, match=r"holds other latents:\n  fingerprint: older"):
        begin_extraction(tmp_path, plan)
    begin_extraction(tmp_path, plan, ("older",))
    folder_lock.release(tmp_path)
    begin_extraction(tmp_path, plan)  # the newer one has taken its place
    folder_lock.release(tmp_path)
