"""The three objectives together: shares of the batch, stochastic depth, useful operations, and the program."""

import functools
import json
import os
import shutil
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_streaming import write_shards
from test_train_vtp import ROOT, fresh_accelerate, load_program  # noqa: F401
from tiny_training import TIMING
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vtp_diffusion import AutoencoderVTP, VTPModel
from vtp_diffusion.models.autoencoder_vtp import VTP_SIZES
from vtp_diffusion.models.fused_vtp import use_large_products
from vtp_diffusion.pretraining.contrastive import ContrastiveConfig, ContrastiveObjective
from vtp_diffusion.pretraining.crops import CropConfig, draw_crops, make_crops
from vtp_diffusion.pretraining.feature_evaluation import effective_rank, retrieval_recall
from vtp_diffusion.pretraining.joint import (
    VTPForPreTraining,
    check_share,
    checkpoint_blocks,
    choose_share,
    compile_parts,
)
from vtp_diffusion.pretraining.reconstruction import ReconstructionObjective, ReconstructionPartConfig
from vtp_diffusion.pretraining.self_supervision import SelfSupervisionConfig, SelfSupervisionObjective
from vtp_diffusion.runtime.config import parse_config
from vtp_diffusion.training.optimisation import cosine_at

TINY = {
    f"{part}_{key}": value
    for part in ("encoder", "decoder")
    for key, value in (("hidden_size", 16), ("num_layers", 2), ("num_attention_heads", 2))
} | {
    "sample_size": 16, "patch_size": 4, "latent_channels": 3, "rope_dtype": "float32", "text_hidden_size": 8,
    "text_num_layers": 1, "text_num_attention_heads": 2, "text_context_length": 6, "text_vocab_size": 32,
    "projection_dim": 8,
}  # fmt: skip


def tiny_objectives(depth_rate=0.0):
    torch.manual_seed(0)
    model = VTPModel(**TINY)
    crops = CropConfig(local_crops=2, local_size=8)
    own = SelfSupervisionConfig(
        crops=crops, head_hidden_size=12, head_bottleneck=6, prototypes=10, stochastic_depth=depth_rate, share=0.5
    )
    objectives = {
        "contrastive": ContrastiveObjective(ContrastiveConfig(stochastic_depth=depth_rate), model),
        "self_supervision": SelfSupervisionObjective(own, model.autoencoder),
        "reconstruction": ReconstructionObjective(ReconstructionPartConfig(lpips=0, share=0.5, weight=0.1), None),
    }
    return VTPForPreTraining(model.autoencoder, objectives)


def tiny_inputs(objective, count=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1
    part = objective.objectives["self_supervision"]
    draws = draw_crops(part.config.crops, count, generator)["crops"]
    large, small = make_crops(images, part.config.crops, draws)
    masks = part.mask_inputs(np.stack([part.draw_masks((4, 4), position, 0) for position in range(count)]))
    own = {"global_crops": large, "local_crops": small, "temperature": torch.tensor(0.04)}
    own |= masks | {"prototypes_learn": torch.tensor(1.0)} | part.draw_kept(count, generator)
    text = {"token_ids": torch.randint(0, 32, (count, 6), generator=generator)}
    text |= {"paired": torch.ones(count, dtype=torch.bool), "images": images}
    text |= objective.objectives["contrastive"].draw_kept(count, generator)
    return {"contrastive": text, "self_supervision": own, "reconstruction": {"images": images}}


def test_the_losses_are_named_and_every_trained_weight_learns():
    objective = tiny_objectives(depth_rate=0.5)
    losses = objective(**tiny_inputs(objective))
    names = {"contrastive/clip", "self_supervision/dino", "self_supervision/ibot", "self_supervision/koleo"}
    assert names | {"reconstruction/l1", "loss"} <= losses.keys()
    own = losses["self_supervision/dino"] + losses["self_supervision/ibot"] + 0.2 * losses["self_supervision/koleo"]
    torch.testing.assert_close(losses["loss"], losses["contrastive/clip"] + own + 0.1 * losses["reconstruction/l1"])
    losses["loss"].backward()
    without = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert objective.autoencoder.encoder.embeddings.mask_token.grad.any()


def test_objectives_passed_backwards_one_by_one_have_the_gradients_of_all_at_once():
    together, apart = tiny_objectives(depth_rate=0.5), tiny_objectives(depth_rate=0.5)
    apart.load_state_dict(together.state_dict())
    inputs = tiny_inputs(together)
    loss = together(**inputs)["loss"]
    loss.backward()
    total = 0.0
    for part in apart.one_by_one(inputs):
        losses = apart(**part)
        losses["loss"].backward()
        total += losses["loss"].item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(together, apart)


def assert_same_gradients(expected, actual):
    for (name, first), second in zip(expected.named_parameters(), actual.parameters(), strict=True):
        if first.requires_grad:
            atol = 1e-8 + 1e-5 * first.grad.abs().max().item()  # gradients here are between 1e-9 and 10
            torch.testing.assert_close(second.grad, first.grad, rtol=1e-4, atol=atol, msg=name)


def test_large_products_have_the_gradients_of_the_layers_and_do_not_call_them():
    plain, large = tiny_objectives(depth_rate=0.5), tiny_objectives(depth_rate=0.5)
    large.load_state_dict(plain.state_dict())
    use_large_products(large, None)
    block, inputs, called = large.autoencoder.encoder.blocks[0], tiny_inputs(plain), []
    for layer in (block.attn.to_q, block.mlp.w1, large.autoencoder.encoder.embeddings.patch_embed):
        layer.register_forward_hook(lambda *_: called.append(True))
    for objective in (plain, large):
        objective(**inputs)["loss"].backward()
    assert_same_gradients(plain, large)
    assert not called


def test_mask_tokens_replace_patches_before_the_first_block():
    encoder = tiny_objectives().autoencoder.encoder
    encoder.embeddings.mask_token.data.fill_(0.5)
    images, masks = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.bool)
    masks[1, 3] = True
    plain, hidden = encoder.embeddings(images), encoder.embeddings(images, masks)
    assert torch.equal(hidden[1, 4], torch.full((16,), 0.5))
    different = (plain != hidden).any(-1)
    assert different.nonzero().tolist() == [[1, 4]]
    with pytest.raises(ValueError, match="masks have shape"):
        encoder.embeddings(images, masks[:, :5])


def test_useful_operations_are_those_that_a_counter_sees():
    objective = tiny_objectives(depth_rate=0.5)
    inputs = tiny_inputs(objective)
    expected = objective.flops(16)
    for name, part in objective.objectives.items():
        # The counter knows attention as products of matrices only.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            part(objective.autoencoder, **inputs[name])["loss"].backward()
        share = getattr(part.config, "share", 1.0)
        # It also sees losses and the padding of masks, but no gradient of the images, which is counted as useful.
        assert counter.get_total_flops() / 4 * share == pytest.approx(expected[name], rel=0.1), name


def test_a_share_is_a_random_subset_of_every_block():
    scores = torch.rand(1000, 16, generator=torch.Generator().manual_seed(0))
    chosen = torch.stack([choose_share(row, 0.25) for row in scores])
    assert (chosen // 4 == torch.arange(4)).all()  # one in four, in order
    frequencies = chosen.flatten().bincount(minlength=16) / 1000
    assert (frequencies - 0.25).abs().max() < 0.06
    assert choose_share(scores[0], 1.0).tolist() == list(range(16))
    with pytest.raises(ValueError, match="reconstruction.share is 0.125 .1 of 8. of a batch of 12 images"):
        check_share("reconstruction", 0.125, 12)


def test_the_effective_rank_counts_directions():
    assert effective_rank(torch.eye(5)) == pytest.approx(5, rel=1e-3)
    assert effective_rank(torch.ones(6, 4)) == pytest.approx(1, rel=1e-3)
    with pytest.raises(ValueError, match="finite"):
        effective_rank(torch.full((3, 3), float("nan")))


def test_retrieval_accepts_every_image_of_the_same_caption():
    texts, images = torch.eye(4), torch.eye(4)[[0, 2, 1, 3]]  # the second and third are exchanged
    recalls = retrieval_recall(texts, images, ["a", "b", "c", "d"], ranks=(1, 4))
    assert recalls == {
        "recall_at_1": 0.5,
        "recall_at_4": 1.0,
        "recall_at_1_by_chance": 0.25,
        "recall_at_4_by_chance": 1.0,
    }
    alike = retrieval_recall(texts, images, ["a", "b", "b", "d"], ranks=(1, 2))
    assert alike["recall_at_1"] == 1.0
    orders = [[("a", "b", "b", "d")[k] for k in order] for order in permutations(range(4))]
    for k in (1, 2):  # of all orders, for each of the captions
        right = [caption in order[:k] for order in orders for caption in ("a", "b", "b", "d")]
        assert alike[f"recall_at_{k}_by_chance"] == pytest.approx(sum(right) / len(right))


def test_weight_decay_follows_a_cosine():
    assert [cosine_at(d, 0.04, 0.4) for d in (0.0, 0.5, 1.0)] == pytest.approx([0.04, 0.22, 0.4])


def arguments(output, *more, objectives=("contrastive", "self_supervision", "reconstruction")):
    sides = [f"--model.{key}={value}" for key, value in TINY.items() if key.split("_")[0] in ("encoder", "decoder")]
    text = [f"--text.{key}={TINY[key]}" for key in TINY if key.startswith("text") and key != "text_vocab_size"]
    return [
        f"--output_dir={output}", "--data.resolution=32", "--data.limit=64", "--model.patch_size=8", *sides,
        *text, "--text.text_context_length=16", "--text.projection_dim=8", "--model.latent_channels=3", "--objectives",
        *objectives, "--self_supervision.share=0.5",
        "--self_supervision.prototypes=16", "--self_supervision.head_hidden_size=12",
        "--self_supervision.head_bottleneck=6", "--self_supervision.crops.local_crops=2",
        "--self_supervision.crops.local_size=16", "--reconstruction.lpips=0", "--reconstruction.share=0.25",
        "--augmentation.flip=0.5", "--augmentation.shift=2", "--max_train_steps=6", "--train_batch_size=8",
        "--learning_rate=1e-3", "--lr_scheduler=cosine", "--ema_decay=0.8", "--checkpointing_steps=3",
        "--adam_weight_decay=0.04", "--adam_weight_decay_end=0.4", "--validation_steps=3", "--log_steps=1",
        "--report_to=none", *more,
    ]  # fmt: skip


def test_a_resumed_joint_run_gives_the_same_models(tmp_path):
    program = load_program("train_vtp")
    program.main(arguments(tmp_path / "straight", "--evaluation_images=40"))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    for folder in ("vae", "vtp"):
        shutil.rmtree(tmp_path / "resumed" / folder)
    (tmp_path / "resumed" / "checkpoint-6").rename(tmp_path / "resumed" / ".unfinished-checkpoint-6")
    program.main(arguments(tmp_path / "resumed"))
    files = ["vae/diffusion_pytorch_model.safetensors", "vtp/diffusion_pytorch_model.safetensors"]
    for name in [*files, "checkpoint-6/objective.safetensors"]:
        first, second = (load_file(tmp_path / run / name) for run in ("straight", "resumed"))
        assert [key for key in first if not torch.equal(first[key], second[key])] == [] and first
    vae = AutoencoderVTP.from_pretrained(tmp_path / "straight" / "vae")
    vtp = VTPModel.from_pretrained(tmp_path / "straight" / "vtp")
    assert vae.config.latents_mean == vtp.autoencoder.config.latents_mean is not None
    lines = [json.loads(line) for line in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
    measured = next(line for line in lines if "held_out_knn_accuracy" in line)
    results = json.loads((tmp_path / "straight" / "results.json").read_text())
    assert [results[name]["images"] for name in ("train", "held_out")] == [40, 40]
    assert results["held_out"]["recall_at_1_by_chance"] == 1 / 40
    assert {"held_out_zero_shot_accuracy", "held_out_recall_at_1", "held_out_effective_rank"} <= measured.keys()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # two blocks each of encoder, teacher and decoder, one of the text tower; two of the prototypes' losses;
        # colours of crops
        (["--gradient_checkpointing", "--checkpointed_share=0.5"], 10),
        (
            ["--compile_stacks"],
            7,  # encoder, teacher, text tower, reconstruction; two of the prototypes' losses; colours of crops
        ),
    ],
)
def test_compiling_and_recomputing_leave_the_losses_as_they_are(tmp_path, monkeypatch, options, count):
    """Without a graph break; traced and differentiated as for a GPU, but not turned into machine code (minutes)."""
    program = load_program("train_vtp")
    program.main(arguments(tmp_path / "plain", "--max_train_steps=3"))
    compiled, functions = functools.partial(torch.compile, backend="aot_eager", fullgraph=True), []
    monkeypatch.setattr(torch, "compile", lambda f, **settings: functions.append(f) or compiled(f, **settings))
    program.main(arguments(tmp_path / "compiled", "--compile", "--max_train_steps=3", *options))
    assert len(functions) == count
    plain, compiled = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    names = ("loss", "contrastive/clip", "self_supervision/dino", "self_supervision/ibot", "reconstruction/l1")
    for name in names:
        losses = [[line[name] for line in lines if name in line] for lines in (plain, compiled)]
        assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4), name


def test_a_step_has_one_program_a_batch_and_kind_of_block(monkeypatch):
    """None for further layers or later steps, none with sizes left open, and none for what is only measured."""
    torch.compiler.reset()
    objective, programs = tiny_objectives(depth_rate=0.3), []
    inputs = tiny_inputs(objective)

    def keep(program, _):
        programs.append([node.meta["example_value"] for node in program.graph.find_nodes(op="placeholder")])
        return program.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep, fullgraph=True))
    compile_parts(objective)
    for _ in range(2):
        objective(**inputs)["loss"].backward()
        # encoder: contrastive, global and local crops, teacher, reconstruction; decoder; text tower; the losses over
        # prototypes; the teacher's distributions of class tokens and of patches
        assert len(programs) == 10
    assert not any(isinstance(value, torch.SymInt) for values in programs for value in values)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        objective.autoencoder.encode(inputs["reconstruction"]["images"][:3])
    assert len(programs) == 10


@pytest.mark.parametrize(("share", "passes"), [(0.5, [2, 1]), (1.0, [2, 2])])
def test_a_share_of_the_blocks_is_computed_twice(share, passes):
    objective, counts = tiny_objectives(), [0, 0]
    checkpoint_blocks(objective.objectives["contrastive"].model, share)
    for k, block in enumerate(objective.autoencoder.decoder.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, k=k: counts.__setitem__(k, counts[k] + 1))
    inputs = tiny_inputs(objective)["reconstruction"]
    objective.objectives["reconstruction"](objective.autoencoder, **inputs)["loss"].backward()
    assert counts == passes


def test_a_step_that_is_left_out_moves_no_center(tmp_path):
    """A ruined student: the second step's gradients are not finite, the teacher's outputs are."""
    more = ["--learning_rate=1e6", "--lr_scheduler=constant", "--max_grad_norm=none"]
    lengths = ["--max_train_steps=2", "--checkpointing_steps=1", "--data.limit=16", "--evaluation_images=2"]
    load_program("train_vtp").main(arguments(tmp_path / "run", *more, *lengths, objectives=["self_supervision"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [0, 1]
    first, second = (load_file(tmp_path / "run" / f"checkpoint-{step}/objective.safetensors") for step in (1, 2))
    names = [f"objectives.self_supervision.{name}_center" for name in ("dino", "ibot")]
    assert all(first[name].any() and torch.equal(first[name], second[name]) for name in names)
    teacher = "objectives.self_supervision.teacher_head.prototypes.weight"
    assert not torch.equal(first[teacher], second[teacher])  # it follows the student, which is as it was


def test_two_processes_have_the_losses_of_one(tmp_path):
    """Stochastic depth off, float32, the same global batch: 20 steps. Of so much noise its scale, taken from the whole
    batch, is seen in the weights."""
    more = ["--self_supervision.stochastic_depth=0", "--max_train_steps=20", "--validation_steps=20"]
    more += ["--reconstruction.latent_noise=3"]
    load_program("train_vtp").main(arguments(tmp_path / "one", *more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "train_vtp" / "train.py", *arguments("two", *more)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for a, b in zip(one[:20], two[:20], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMING:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), (a["step"], name)
    one, two = (load_file(tmp_path / run / "vtp/diffusion_pytorch_model.safetensors") for run in ("one", "two"))
    for name, weight in one.items():  # of every tower, whichever backward pass reaches it
        torch.testing.assert_close(two[name], weight, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("objectives", [["contrastive"], ["reconstruction"]])
def test_shards_are_refused_before_anything_is_built(tmp_path, monkeypatch, objectives):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="the text tower are not trained sharded"):
        load_program("train_vtp").main(arguments(tmp_path / "run", objectives=objectives))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--self_supervision.share=1.5"], "share is 1.5"),
        (["--checkpointed_share=0"], "checkpointed_share is 0.0, expected a number in .0, 1."),
        (
            ["--gradient_checkpointing", "--checkpointed_share=0.2"],
            "checkpointed_share is 0.2, expected at least half a block",
        ),
        (["--self_supervision.crops.local_size=12"], "local_size is 12, expected a multiple of model.patch_size, 8"),
        (["--data.resolution=16"], r"global_size is 16 \(16 is data.resolution\), expected 3 patches of 8 or more"),
        (["--train_batch_size=80"], "has 64 training images, expected at least train_batch_size, 80"),
        (["--text.text_context_length=2"], "text.text_context_length is 2, expected 3 or more"),
        (["--evaluation_images=0"], "evaluation_images is 0, expected a positive number"),
        (["--train_batch_size=6"], "reconstruction.share is 0.25 .1 of 4. of a batch of 6 images"),
    ],
)
def test_bad_input_is_named(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load_program("train_vtp").main(arguments(tmp_path / "run", *more))
    with pytest.raises(ValueError, match="objectives is .., expected some of"):
        load_program("train_vtp").main(arguments(tmp_path / "run", objectives=[]))
    assert not (tmp_path / "run").exists()


def test_images_without_captions_have_no_contrastive_objective(tmp_path):
    from PIL import Image

    for split in ("train", "validation"):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (32, 32), (k * 20, 0, 0)).save(tmp_path / "pictures" / split / f"{k}.png")
    with pytest.raises(ValueError, match="has no captions, .*: those of a folder are the names of its classes"):
        load_program("train_vtp").main(arguments(tmp_path / "run", f"--data.source={tmp_path / 'pictures'}"))


def test_another_architecture_does_not_resume(tmp_path):
    program = load_program("train_vtp")
    program.main(arguments(tmp_path / "run", "--max_train_steps=1"))
    with pytest.raises(ValueError, match="self_supervision.prototypes: 16 there, 32 now"):
        program.main(arguments(tmp_path / "run", "--max_train_steps=1", "--self_supervision.prototypes=32"))


def test_shards_are_read_as_a_stream_and_resumed(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shards = write_shards(datasets, tmp_path / "shards", silent=(2, 7))
    more = [
        "--data.source=parquet", f"--data.data_files={shards / '[01].parquet'}", "--data.caption_column=text",
        f"--data.validation_files={shards / '2.parquet'}", "--data.label_column=kind", "--data.streaming",
        "--data.limit=none", "--evaluation_images=6",
    ]  # fmt: skip
    program = load_program("train_vtp")
    program.main(arguments(tmp_path / "straight", *more))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint-6").rename(tmp_path / "resumed" / ".unfinished-checkpoint-6")
    program.main(arguments(tmp_path / "resumed", *more))
    first, second = (
        load_file(tmp_path / run / "vtp/diffusion_pytorch_model.safetensors") for run in ("straight", "resumed")
    )
    assert [key for key in first if not torch.equal(first[key], second[key])] == [] and first
    results = json.loads((tmp_path / "straight" / "results.json").read_text())
    assert results["train"]["images"] == 6 and results["held_out"]["images"] == 4
    assert {"psnr", "effective_rank", "knn_accuracy", "recall_at_1"} <= results["held_out"].keys()
    assert results["latent_statistics_images"] == 8  # all that there are, more than are measured
    # "0", "1", ... would be the prompts
    assert "zero_shot_accuracy" not in results["held_out"]
    assert capsys.readouterr().out.count("the classes have indices and no names: no zero-shot accuracy") == 2
    # what has no text takes part in the step, but not in its contrastive objective
    lines = [json.loads(line) for line in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
    pairs = [line["contrastive/captions"] for line in lines if "contrastive/captions" in line]
    assert lines[-1]["left_out/without_caption"] == results["left_out"]["without_caption"]
    assert len(pairs) == 6 and sum(pairs) == 6 * 8 - results["left_out"]["without_caption"] < 6 * 8
    with pytest.raises(ValueError, match="evaluation_images is none with data.streaming"):
        program.main(arguments(tmp_path / "other", *more, "--evaluation_images=none"))
    with pytest.raises(ValueError, match="parquet has no captions, .* data.caption_column, .* column, is none"):
        program.main(arguments(tmp_path / "other", *more, "--data.caption_column=none"))
    with pytest.raises(ValueError, match="data.skip_empty_captions: False there, True now"):
        program.main(arguments(tmp_path / "straight", *more, "--data.skip_empty_captions"))


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_the_published_sizes_are_what_the_configurations_say(name):
    program = load_program("train_vtp")
    config = parse_config(program.Config, ["--config", str(ROOT / f"train_vtp/configs/{name}.yaml")])
    size = VTP_SIZES[name.capitalize()].architecture()
    assert {key: getattr(config.model, key) for key in size} == size
    shares = (1, config.self_supervision.share, config.reconstruction.share)
    assert [config.train_batch_size * share for share in shares] == [16384, 4096, 2048]
    assert (config.reconstruction.weight, config.self_supervision.weight, config.contrastive.weight) == (0.1, 1, 1)
