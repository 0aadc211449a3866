"""train_dit/extract_latents.py as a user runs it: from image files to latents, resumed, and with bad input."""

import functools
import glob
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from test_latent_shards import dc, kl, rae

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.images import from_uint8
from vtp_diffusion.data.latent_shards import LatentDataset
from vtp_diffusion.generation.latent_inputs import check_latents
from vtp_diffusion.models.latent_space import encode_raw, latent_statistics

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "train_dit" / "extract_latents.py"


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # convolutions on a GPU round to TF32


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("program_extract_latents", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with vae/ (float32 rotary embedding, statistics set) and images/ of two classes."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2))}  # fmt: skip
    vae = AutoencoderVTP(sample_size=16, patch_size=8, latent_channels=3, rope_dtype="float32", **sides)
    vae.with_latent_statistics([1.0, 2.0, 3.0], [0.5, 1.0, 2.0]).save_pretrained(folder / "vae")
    for k in range(7):
        path = folder / "images" / ("cat" if k < 4 else "dog") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def words(made, output, *more):
    return [
        *("--vae", made / "vae", "--output_dir", output, "--data.source", made / "images"),
        *("--data.resolution", 16, "--batch_size", 2, "--shard_size", 3, "--dtype", "float32", *more),
    ]


def extract(program, made, output, *more):
    program.main([str(word) for word in words(made, output, *more)])
    return LatentDataset(output)


def read_all(dataset):
    return dataset.__getitems__(range(len(dataset)))


def test_a_resolution_that_is_not_given_is_the_autoencoder_s(program, made, tmp_path, capsys):
    given = words(made, tmp_path / "latents")
    place = given.index("--data.resolution")
    program.main([str(word) for word in given[:place] + given[place + 2 :]])
    assert "data.resolution is 16, which the AutoencoderVTP was saved with" in capsys.readouterr().out
    assert extract(program, made, tmp_path / "latents").metadata["data"]["resolution"] == 16
    assert "is finished" in capsys.readouterr().out, "the same as with the resolution given"


def test_latents_are_those_of_the_images(program, made, tmp_path, capsys):
    latents = extract(program, made, tmp_path / "out")
    images = open_dataset(DataConfig(source=str(made / "images"), resolution=16))
    batch, vae = read_all(latents), AutoencoderVTP.from_pretrained(made / "vae")
    pixels = from_uint8(torch.stack([item["image"] for item in images.__getitems__(range(7))]))
    with torch.no_grad():
        assert torch.allclose(batch["latents"], encode_raw(vae, pixels), atol=1e-5)
        assert torch.allclose(batch["latents_flip"], encode_raw(vae, pixels.flip(3)), atol=1e-5)
        mean, std = latent_statistics(vae)
        assert torch.allclose((batch["latents"] - mean) / std, vae.encode(pixels).latent, atol=1e-4)
    assert batch["labels"].tolist() == [0, 0, 0, 0, 1, 1, 1] and latents.id2label == {0: "cat", 1: "dog"}
    names = ["latents.json", *(f"latents_{k:05d}.safetensors" for k in range(3)), "latents_stats.pt", "plan.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert "7 latents, 0 images skipped" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_json_holds_statistics_and_origin(dtype, program, made, tmp_path):
    latents = extract(program, made, tmp_path / "out", "--dtype", str(dtype).removeprefix("torch."))
    metadata, batch = latents.metadata, read_all(latents)
    both = torch.cat([batch["latents"], batch["latents_flip"]]).double().transpose(0, 1).flatten(1)
    assert batch["latents"].dtype == batch["latents_flip"].dtype == dtype
    assert metadata["mean"] == pytest.approx(both.mean(1).tolist())
    assert metadata["std"] == pytest.approx(both.std(1, unbiased=False).tolist())
    assert metadata["autoencoder"]["class"] == "AutoencoderVTP" and metadata["resolution"] == 16
    assert metadata["autoencoder"].keys() == {"class", "config", "weights", "encoder"}
    assert (metadata["num_samples"], metadata["num_images"], metadata["skipped"]) == (7, 7, [])


def test_copies_are_changed_and_keyed_by_the_sample(program, made, tmp_path):
    options = ("--copies", 3, "--augmentation.shift", 4)
    one = read_all(extract(program, made, tmp_path / "one", *options))
    other = read_all(extract(program, made, tmp_path / "other", *options, "--batch_size", 5))
    plain = read_all(extract(program, made, tmp_path / "plain"))
    assert len(one["labels"]) == 21 and one["labels"].tolist() == [0] * 12 + [1] * 9
    assert torch.allclose(one["latents"][::3], plain["latents"], atol=1e-5), "the first copy is the image itself"
    assert all((one["latents"][k] - one["latents"][k - k % 3]).abs().max() > 1e-3 for k in range(21) if k % 3)
    assert torch.allclose(one["latents"], other["latents"], atol=1e-5), "batches decide nothing"
    again = read_all(extract(program, made, tmp_path / "seed", *options, "--seed", 1))
    assert (again["latents"][1] - one["latents"][1]).abs().max() > 1e-3


def test_weights_decide_the_number_of_copies(program):
    samples = program.plan_samples([1.0, 0.2, 0.01], 10)
    assert [sum(index == k for index, _ in samples) for k in range(3)] == [10, 2, 1]
    assert program.plan_samples([1.0, 0.2], 1) == [(0, 0), (1, 0)]


def test_finished_shards_are_kept(program, made, tmp_path):
    whole = read_all(extract(program, made, tmp_path))
    first, second = (tmp_path / f"latents_{k:05d}.safetensors" for k in range(2))
    stamp = first.stat().st_mtime_ns
    second.unlink()  # as if killed before it was written, and then latents.json neither
    (tmp_path / "latents.json").unlink()
    with pytest.raises(ValueError, match="has not finished"):
        LatentDataset(tmp_path)
    again = read_all(extract(program, made, tmp_path, "--batch_size", 3))
    assert first.stat().st_mtime_ns == stamp
    assert all(torch.allclose(whole[name].float(), again[name].float(), atol=1e-5) for name in whole)


def test_a_finished_folder_is_known_by_its_hashes_and_not_read_again(program, made, tmp_path, monkeypatch, capsys):
    extract(program, made, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(program, "encode_missing", None)
        extract(program, made, tmp_path)
    assert "is finished: every shard has the SHA-256" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "latents_00000.safetensors").unlink()
    extract(program, made, tmp_path)
    assert (tmp_path / "latents_00000.safetensors").is_file() and "1 images skipped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (("--copies", "2"), "copies: 1 there, 2 now"),
        (("--dtype", "bfloat16"), "dtype: float32 there, bfloat16 now"),
        (("--data.limit", "5"), "num_samples: 7 there, 5 now"),
    ],
)
def test_another_runs_folder_is_refused(more, key, program, made, tmp_path):
    extract(program, made, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="(?s)holds other latents:.*" + key):
        extract(program, made, tmp_path, *more)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_autoencoder_is_refused(program, made, tmp_path):
    extract(program, made, tmp_path / "out")
    vae = AutoencoderVTP.from_pretrained(made / "vae")
    with torch.no_grad():
        vae.bottleneck.weight.mul_(1.1)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="(?s)holds other latents:.*vae"):
        extract(program, made, tmp_path / "out", "--vae", tmp_path / "vae")


def test_a_folder_that_another_process_writes_is_refused(program, made, tmp_path):
    other = (
        "import sys, time; from pathlib import Path; from vtp_diffusion.runtime import folder_lock\n"
        "folder_lock.acquire(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    (tmp_path / "out").mkdir()
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])}
    command = [sys.executable, "-c", other, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(ValueError, match=f"out is in use by process {holder.pid} on "):
                extract(program, made, tmp_path / "out")
            assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
        finally:
            holder.kill()
    extract(program, made, tmp_path / "out")  # what was killed holds nothing


def test_a_folder_of_something_else_is_refused(program, made, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no plan.json"):
        extract(program, made, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.resolution", "20"), "data.resolution is 20, which .* expected multiples of the patch 8"),
        (("--data.resolution", "20", "--data.source", ROOT / "docs"), "data.resolution is 20"),  # before its images
        (("--augmentation.shift", "4"), "augmentation is given without copies, expected --copies 2 or more"),
        (("--copies", "0"), "copies is 0, expected a positive number"),
        (("--shard_sise", "3"), "did you mean --shard_size"),
        (("--dtype", "float8"), "expected one of float32, float16, bfloat16"),
    ],
)
def test_bad_input_writes_nothing(more, message, program, made, tmp_path):
    with pytest.raises(ValueError, match=message):
        extract(program, made, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unreadable_image(in_memory, program, made, tmp_path, monkeypatch):
    import vtp_diffusion.data.image_datasets

    if not in_memory:
        monkeypatch.setattr(vtp_diffusion.data.image_datasets, "IN_MEMORY_BYTES", 0)
    images = tmp_path / "images"
    for path in (made / "images").glob("*/*.png"):
        (images / path.parent.name).mkdir(parents=True, exist_ok=True)
        (images / path.parent.name / path.name).write_bytes(path.read_bytes())
    (images / "dog" / "4.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="4.png cannot be read as an image"):
        extract(program, made, tmp_path / "strict", "--data.source", images)
    assert (tmp_path / "strict" / "latents_00000.safetensors").is_file() != in_memory, "what was done is kept"

    options = ("--data.source", images, "--data.skip_unreadable")
    resumed = extract(program, made, tmp_path / "strict", *options)  # as the error says, with what was done
    latents, plain = extract(program, made, tmp_path / "out", *options), extract(program, made, tmp_path / "plain")
    assert latents.metadata["skipped"] == ["dog/4.png"] and latents.metadata["num_images"] == 6
    rows = [0, 1, 2, 3, 5, 6]  # image 4 is the first dog
    assert torch.allclose(read_all(latents)["latents"], read_all(plain)["latents"][rows], atol=1e-5)
    assert resumed.metadata["skipped"] == ["dog/4.png"]
    assert torch.equal(read_all(resumed)["latents"], read_all(latents)["latents"])
    assert latents.labels.tolist() == [0, 0, 0, 0, 1, 1]
    (tmp_path / "out" / "latents.json").unlink()  # verified again from what the shards say
    assert extract(program, made, tmp_path / "out", *options).metadata == latents.metadata


def test_compiled_are_the_blocks_of_a_vtp_and_otherwise_the_encoder(program, made, tmp_path, monkeypatch):
    """Traced without a graph break, not turned into machine code."""
    compiled, compile = [], functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda what, **more: compiled.append(what.__name__) or compile(what, **more))
    one_batch = ("--batch_size", 7, "--shard_size", 7)
    plain = read_all(extract(program, made, tmp_path / "plain", *one_batch))["latents"]
    latents = read_all(extract(program, made, tmp_path / "compiled", *one_batch, "--compile"))["latents"]
    torch.testing.assert_close(latents, plain, rtol=1e-4, atol=1e-5)
    assert compiled == ["forward", "forward"]  # a block of the encoder, one of the decoder, not called
    assert program.compiled_encoder(kl()) is not encode_raw and compiled[2:] == ["encode_raw"]


@pytest.mark.parametrize(("make", "shape"), [(kl, (4, 8, 8)), (dc, (4, 8, 8)), (rae, (64, 2, 2))])
def test_another_autoencoder(make, shape, program, made, tmp_path):
    vae = make()
    vae.save_pretrained(tmp_path / "vae")
    latents = extract(program, made, tmp_path / "out", "--vae", tmp_path / "vae")
    assert latents.shape == shape and latents.metadata["autoencoder"]["class"] == type(vae).__name__
    check_latents(latents, vae, DataConfig(resolution=16))
    images = open_dataset(DataConfig(source=str(made / "images"), resolution=16))
    with torch.no_grad():
        raw = encode_raw(vae, from_uint8(images[3]["image"])[None])
    assert torch.allclose(latents[3]["latents"], raw[0], atol=1e-4)


def test_a_collection_of_datasets_read_by_workers_in_half_precision(program, made, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = sorted((made / "images").glob("*/*.png"))
    columns = {
        "picture": [{"bytes": p.read_bytes(), "path": None} for p in paths],
        "kind": [p.parent.name for p in paths],
    }
    datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    source = ("--data.source", "parquet", "--data.data_files", tmp_path / "a.parquet")
    options = ("--data.image_column", "picture", "--data.label_column", "kind", "--num_workers", 1)
    half = extract(program, made, tmp_path / "out", *source, *options, "--mixed_precision", "bf16")
    plain, latents = read_all(extract(program, made, tmp_path / "plain")), read_all(half)
    assert half.id2label == {0: "cat", 1: "dog"} and torch.equal(latents["labels"], plain["labels"])
    difference = (latents["latents"] - plain["latents"]).abs().max()
    assert 0 < difference < 0.1 and half.metadata["mixed_precision"] == "bf16"


def test_upstreams_loader_reads_the_folder(program, made, tmp_path):
    """What ImgLatentDataset does (hustvl/LightningDiT, datasets/img_latent_dataset.py): every *.safetensors in the
    order of the names, one row of one key at a time, (row - mean) / std with the two of latents_stats.pt."""
    latents = extract(program, made, tmp_path / "out")
    statistics = torch.load(tmp_path / "out" / "latents_stats.pt", weights_only=True)
    rows, labels = [], []
    for file in sorted(glob.glob(os.path.join(tmp_path / "out", "*.safetensors"))):
        with safe_open(file, framework="pt", device="cpu") as shard:
            for k in range(shard.get_slice("labels").get_shape()[0]):
                flip = "latents_flip" if k % 2 else "latents"
                rows.append((shard.get_slice(flip)[k : k + 1] - statistics["mean"]) / statistics["std"])
                labels.append(shard.get_slice("labels")[k : k + 1])
    vae, batch = AutoencoderVTP.from_pretrained(made / "vae"), read_all(latents)
    vae.with_latent_statistics(latents.metadata["mean"], latents.metadata["std"])
    mean, std = latent_statistics(vae)
    mirrored = torch.tensor([k % 2 for shard in (3, 3, 1) for k in range(shard)], dtype=torch.bool)
    raw = torch.where(mirrored[:, None, None, None], batch["latents_flip"], batch["latents"])
    assert statistics["mean"].shape == (1, 3, 1, 1) and statistics["mean"].dtype == torch.float32
    assert torch.allclose(torch.cat(rows), (raw - mean) / std, atol=1e-5)
    assert torch.equal(torch.cat(labels), batch["labels"])


def test_convert_reads_the_statistics(program, made, tmp_path):
    latents = extract(program, made, tmp_path / "out")
    spec = importlib.util.spec_from_file_location("program_convert", ROOT / "pipelines" / "convert.py")
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    for name in ("latents.json", "latents_stats.pt"):  # as --latent-statistics is given them
        mean, std = convert.read_latent_statistics(str(tmp_path / "out" / name))
        assert mean == pytest.approx(latents.metadata["mean"]) and std == pytest.approx(latents.metadata["std"])


@pytest.mark.parametrize("content", [b"", b"half a shard", None])
def test_a_damaged_shard_is_found_before_any_work(content, program, made, tmp_path):
    extract(program, made, tmp_path)
    (tmp_path / "latents.json").unlink()
    path = tmp_path / "latents_00001.safetensors"
    path.write_bytes((tmp_path / "latents_00002.safetensors").read_bytes() if content is None else content)
    (tmp_path / "latents_00000.safetensors").unlink()
    expected = "holds 1 samples .* expected 3" if content is None else "is not a complete safetensors file"
    with pytest.raises(ValueError, match=f"latents_00001.safetensors {expected}"):
        extract(program, made, tmp_path)
    assert not (tmp_path / "latents_00000.safetensors").exists()


def test_a_kill_while_the_plan_is_written_spoils_nothing(program, made, tmp_path):
    (tmp_path / ".plan.json.unfinished").write_text('{"vae": ')
    assert len(extract(program, made, tmp_path)) == 7


def test_help(program, capsys):
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    text = capsys.readouterr().out
    assert "accelerate launch train_dit/extract_latents.py" in text and "--data.resolution" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU accelerate joins the processes without --cpu")
def test_processes_that_did_not_find_each_other_are_refused(program, made, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pytest.raises(ValueError, match="2 processes were launched but accelerate joined 1"):
        extract(program, made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def launch(made, output, *more):
    """In two processes of a CPU: with --cpu accelerate would start a single one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    settings = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", *start, *settings, str(PROGRAM), *map(str, words(made, output, *more))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=output.parent, **pipes)


def test_killed_at_a_random_moment_and_resumed_by_another_number_of_processes(program, made, tmp_path):
    """Two under accelerate launch are killed; one goes on and ends with the latents of an undisturbed run."""
    options = ("--copies", 40, "--augmentation.shift", 4, "--batch_size", 1)  # 280 samples, 94 shards
    process = launch(made, tmp_path / "out", *options)
    moment = random.randrange(1, 80)
    while process.poll() is None and len(list((tmp_path / "out").glob("latents_*.safetensors"))) < moment:
        time.sleep(0.001)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if str(PROGRAM) in p.cmdline()]
    for doomed in (process, *workers):  # torchrun puts each into a session of its own
        doomed.kill()
    assert len(workers) == 2
    output = process.communicate()[0]
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("latents_*.safetensors")}
    assert len(left) >= moment, output
    assert not (tmp_path / "out" / "latents.json").exists()
    latents = extract(program, made, tmp_path / "out", *options, "--batch_size", 3)
    whole = extract(program, made, tmp_path / "whole", *options)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == stamp for name, stamp in left.items())
    assert latents.metadata["shards"] == whole.metadata["shards"] and len(latents) == 280
    one, other = read_all(latents), read_all(whole)
    assert torch.equal(one["labels"], other["labels"])
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in ("latents", "latents_flip"))
    assert not list((tmp_path / "out").glob(".*")), "nothing half written is left"


def test_two_processes_as_a_user_runs_them(program, made, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(PROGRAM)]
    command = [*launch, *map(str, words(made, tmp_path / "two"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("latents.json written") == 1, "not two processes but twice one"
    one, two = read_all(extract(program, made, tmp_path / "one")), read_all(LatentDataset(tmp_path / "two"))
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-5) for name in one)
    metadata = [json.loads((tmp_path / name / "latents.json").read_text()) for name in ("one", "two")]
    assert metadata[0]["mean"] == pytest.approx(metadata[1]["mean"], abs=1e-5)
