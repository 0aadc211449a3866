"""Fréchet distance and floor against closed forms, feature networks with their real weights, neighbours, PSNR."""

import math

import numpy as np
import pytest
import torch

from vtp_diffusion.data.npz import NpzImages
from vtp_diffusion.evaluation.sources import FolderImages
from vtp_diffusion.generation.sampling import draw_labels
from vtp_diffusion.metrics.features import FeatureNetwork, extract_features
from vtp_diffusion.metrics.frechet import (
    GaussianStatistics,
    floor_of_halves,
    floor_of_images,
    frechet_distance,
    jackknife_deviation,
    jackknife_group,
)
from vtp_diffusion.metrics.inception import InceptionFeatures
from vtp_diffusion.metrics.neighbours import (
    near_duplicate_threshold,
    nearest_neighbours,
    neighbour_grid,
    shifted_or_flipped,
)
from vtp_diffusion.metrics.networks import VGG16Features, feature_network
from vtp_diffusion.metrics.pixels import psnr
from vtp_diffusion.metrics.trunks import export_trunk


def draw(n, dim, seed=0, scale=1.0, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def gaussian(mean, covariance):
    return GaussianStatistics.from_moments(torch.as_tensor(mean), torch.as_tensor(covariance))


def test_statistics_are_numpys_however_they_arrive():
    features = draw(101, 7, shift=1e4).float()
    whole = GaussianStatistics.of(features)
    parts = GaussianStatistics(7)
    for batch in features.split([1, 50, 0, 30, 20]):
        parts.update(batch)
    merged = GaussianStatistics.of(features[:33])
    merged.merge(GaussianStatistics.of(features[33:]))
    for statistics in (whole, parts, merged):
        assert statistics.count == 101
        np.testing.assert_allclose(statistics.mean, features.double().mean(0), rtol=1e-13)
        np.testing.assert_allclose(statistics.covariance, np.cov(features.double().T), rtol=1e-9, atol=1e-9)


def test_equal_statistics_have_distance_zero():
    statistics = GaussianStatistics.of(draw(50, 8))
    assert frechet_distance(statistics, statistics) < 1e-10


def test_a_shift_costs_its_squared_length():
    x = draw(50, 8)
    shift = torch.arange(8.0)
    distance = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(x + shift))
    assert distance == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_a_scale_costs_its_squared_excess_times_the_variance():
    x = draw(50, 8)
    x = x - x.mean(0)
    a = GaussianStatistics.of(x)
    distance = frechet_distance(a, GaussianStatistics.of(x * 3))
    assert distance == pytest.approx((3 - 1) ** 2 * a.covariance.trace().item(), rel=1e-9)


def test_commuting_covariances():
    vectors = torch.linalg.qr(draw(6, 6))[0]
    a, b = torch.arange(1.0, 7), torch.tensor([4.0, 0, 9, 1, 0, 2])
    first = gaussian(torch.zeros(6), vectors * a.double() @ vectors.T)
    second = gaussian(torch.zeros(6), vectors * b.double() @ vectors.T)
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


def test_rank_deficient_covariances():
    # 10 samples span 9 of 400 dimensions; in those 9 the closed form is that of the full-rank case
    basis = torch.linalg.qr(draw(400, 9, seed=3))[0]
    x, y = draw(10, 9, seed=1), draw(10, 9, seed=2, scale=2.0)
    small = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    large = frechet_distance(GaussianStatistics.of(x @ basis.T), GaussianStatistics.of(y @ basis.T))
    assert large == pytest.approx(small, rel=1e-7)
    # orthogonal supports: nothing overlaps, the traces add up
    p, q = (GaussianStatistics.of(draw(10, 4, seed=s) @ basis[:, s : s + 4].T) for s in (0, 5))
    means = (p.mean - q.mean).square().sum()
    traces = p.covariance.trace() + q.covariance.trace()
    assert frechet_distance(p, q) == pytest.approx((means + traces).item(), rel=1e-9)


def test_more_samples_than_features_and_fewer_agree():
    # the same two sets of 30 samples, as 30 rows of 40 features and as moments
    x, y = draw(30, 40), draw(30, 40, seed=1, scale=1.5, shift=0.3)
    few = GaussianStatistics.of(x), GaussianStatistics.of(y)
    many = [gaussian(statistics.mean, statistics.covariance) for statistics in few]
    assert all(statistics.factor is not None for statistics in few)
    expected = frechet_distance(*few)
    for a, b in ((many[0], few[1]), (few[0], many[1]), many):
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_stable_where_the_square_root_of_the_product_is_not():
    scipy = pytest.importorskip("scipy.linalg")
    # 5 samples of 60 features, equal but for a shift: the closed form is the squared length of the shift
    x = draw(5, 60)
    a, b = GaussianStatistics.of(x), GaussianStatistics.of(x + 0.01)
    expected = 60 * 0.01**2
    with np.errstate(all="ignore"):
        root = scipy.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    usual = expected + 2 * a.covariance.trace().item() - 2 * np.trace(root).real
    assert not abs(usual / expected - 1) < 1e-6, "the usual way holds too, so this shows nothing"
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    a, b = (gaussian(statistics.mean, statistics.covariance) for statistics in (a, b))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_the_jackknife_is_the_spread_of_repeated_draws():
    reference = GaussianStatistics.of(draw(4000, 3))
    distances, deviations = [], []
    for seed in range(60):
        x = draw(200, 3, seed=seed + 1, shift=0.4)
        distances.append(frechet_distance(reference, GaussianStatistics.of(x)))
        group = jackknife_group(200, 10, seed)
        deviations.append(jackknife_deviation([GaussianStatistics.of(x[group == k]) for k in range(10)], reference))
    assert np.mean(deviations) == pytest.approx(np.std(distances), rel=0.25)
    with pytest.raises(ValueError, match="at least 2 groups, got 1"):
        jackknife_deviation([reference], reference)


def test_groups_of_the_jackknife_do_not_follow_balanced_labels():
    """Monte Carlo: ten classes in turn, ten groups. By turns, a group would be a class, and the spread 20 times it."""
    centres, deviations, distances = draw(10, 4, scale=2.0), {"random": [], "in turn": []}, []
    reference = GaussianStatistics.of(centres.repeat(1000, 1) + draw(10_000, 4, seed=1))
    for seed in range(40):
        x = 1.1 * centres.repeat(40, 1) + draw(400, 4, seed=seed + 2)
        distances.append(frechet_distance(reference, GaussianStatistics.of(x)))
        for name, group in (("random", jackknife_group(400, 10, seed)), ("in turn", np.arange(400) % 10)):
            groups = [GaussianStatistics.of(x[group == k]) for k in range(10)]
            deviations[name].append(jackknife_deviation(groups, reference))
    ratio = {name: np.mean(values) / np.std(distances) for name, values in deviations.items()}
    assert 1 < ratio["random"] < 3 and ratio["in turn"] > 10, ratio
    group = jackknife_group(23, 10, 0)
    assert sorted(np.bincount(group)) == [2] * 7 + [3] * 3 and np.array_equal(group, jackknife_group(23, 10, 0))
    assert not np.array_equal(group, jackknife_group(23, 10, 1))


def test_a_paired_jackknife_leaves_out_both_sides():
    x = draw(60, 3)
    real, moved, scaled = ([GaussianStatistics.of(y[k::10]) for k in range(10)] for y in (x, x + 2, 1.5 * x))
    # a shift is as far whichever images are left out; a scaling depends on their spread
    assert jackknife_deviation(moved, real) < 1e-4 < 1e-2 < jackknife_deviation(scaled, real)
    assert jackknife_deviation(moved, GaussianStatistics.merged(real)) > 1e-2
    with pytest.raises(ValueError, match="paired groups must have equal sizes, got "):
        jackknife_deviation(moved, real[1:])


def test_moments_that_are_none():
    for mean, covariance, message in (
        (torch.zeros(3), torch.eye(2), r"mean \(3,\), covariance \(2, 2\)"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0, 1]]), "not symmetric"),
        (torch.zeros(2), torch.tensor([[1.0, 0], [0, -1]]), "variances below 0"),
        (torch.full((2,), math.inf), torch.eye(2), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianStatistics.from_moments(mean, covariance)


def test_agreement_with_scipys_square_root():
    scipy = pytest.importorskip("scipy.linalg")
    a, b = GaussianStatistics.of(draw(80, 12)), GaussianStatistics.of(draw(90, 12, seed=1, scale=1.3, shift=0.2))
    root = scipy.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)


def test_bad_features():
    with pytest.raises(ValueError, match="not finite"):
        GaussianStatistics.of(torch.full((3, 2), math.nan))
    few = GaussianStatistics.of(torch.full((3, 8), math.inf))
    for read in (lambda: few.mean, lambda: few.covariance, lambda: frechet_distance(few, few)):
        with pytest.raises(ValueError, match="not finite"):
            read()
    with pytest.raises(ValueError, match=r"expected \(B, 3\)"):
        GaussianStatistics(3).update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least 2"):
        GaussianStatistics.of(torch.zeros(1, 2)).covariance  # noqa: B018
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(GaussianStatistics.of(draw(4, 2)), GaussianStatistics.of(draw(4, 3)))


def test_the_floor_of_halves_is_met_by_good_samples_and_not_by_bad_ones():
    reference = draw(300, 6, seed=1)
    good = floor_of_halves(draw(200, 6, seed=2), reference, seed=0)
    bad = floor_of_halves(draw(200, 6, seed=2, shift=1.0), reference, seed=0)
    assert good.sizes == (150, 150) and good.repetitions == 5
    assert good.real == bad.real > 0
    assert good.generated == pytest.approx(good.real, abs=0.3)
    assert bad.generated > good.real + 5
    assert floor_of_halves(reference[:100], reference, seed=0).sizes == (100, 100)
    # finite samples bias the distance upwards: the floor of fewer images is higher
    assert floor_of_halves(reference[:20], reference, seed=0).real > 2 * good.real


def test_the_floor_of_held_out_images():
    reference, held_out = draw(300, 6, seed=1), draw(40, 6, seed=2)
    floor = floor_of_images(draw(200, 6, seed=3, shift=1.0), reference, held_out, seed=0)
    assert floor.kind == "held-out" and floor.sizes == (40, 300)
    expected = frechet_distance(GaussianStatistics.of(held_out), GaussianStatistics.of(reference))
    assert floor.real == pytest.approx(expected) and floor.real_deviation is None, "the same 40 in every repetition"
    assert floor.generated_deviation > 0
    few = floor_of_images(draw(30, 6, seed=3, shift=1.0), reference, held_out, seed=0)
    assert few.generated_deviation is None and few.real_deviation > 0
    assert floor.generated > floor.real + 4
    with pytest.raises(ValueError, match="got 200 and 1"):
        floor_of_images(draw(200, 6), reference, held_out[:1], seed=0)


@pytest.fixture(scope="module")
def photographs():
    datasets = pytest.importorskip("sklearn.datasets")
    images = [datasets.load_sample_image(name)[:, 100:527] for name in ("china.jpg", "flower.jpg")]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # uint8 (2, 3, 427, 427)


@pytest.fixture(scope="module")
def lite0():
    return feature_network("efficientnet_lite0")


def test_efficientnet_lite0_recognises_photographs(lite0, photographs):
    names = pytest.importorskip("open_clip").IMAGENET_CLASSNAMES
    with torch.inference_mode():
        first, second = lite0.logits(photographs).argmax(1).tolist()
    assert (names[first], names[second]) == ("palace", "daisy")
    assert extract_features(lite0, [photographs], "cpu").shape == (2, 320)
    assert lite0.describe()["sha256"].startswith("57934424")  # as the file's name says


def test_vgg16_features(photographs, tmp_path):
    network = feature_network("vgg16")
    small = photographs[:, :, :64, :64]
    features = extract_features(network, small.split(1), "cpu")
    assert features.shape == (2, 512) and features.dtype == torch.float32
    torch.testing.assert_close(features, extract_features(network, [small], "cpu"), rtol=1e-4, atol=1e-4)
    assert network.describe()["distance"] == "FD-VGG"
    export_trunk(tmp_path / "vgg16.safetensors", dtype=torch.float32)
    carried = feature_network("vgg16", tmp_path / "vgg16.safetensors")
    assert isinstance(carried, VGG16Features)
    torch.testing.assert_close(extract_features(carried, small.split(1), "cpu"), features)


def test_inception_with_random_weights_and_the_hash_that_forbids_them(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    torch.save({}, tmp_path / "empty.pth")
    random = Random("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(random.state_dict(), tmp_path / "random.pth")
    network = InceptionFeatures(tmp_path / "random.pth")
    assert extract_features(network, [torch.zeros(2, 3, 20, 20, dtype=torch.uint8)], "cpu").shape == (2, 2048)
    with pytest.raises(ValueError, match="starts with 6726825d"):
        feature_network("inception", tmp_path / "random.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="checkpoints/weights-inception-2015-12-05-6726825d.pth"):
        feature_network("inception")


def test_bad_networks(tmp_path):
    with pytest.raises(ValueError, match="'clip' is unknown; known: vgg16, efficientnet_lite0, inception"):
        feature_network("clip")
    torch.save({"_fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold EfficientNet-Lite0"):
        feature_network("efficientnet_lite0", tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not a file"):
        feature_network("efficientnet_lite0", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="at least one"):
        extract_features(FeatureNetwork(), [], "cpu")


def test_nearest_neighbours():
    keys = draw(30, 5)
    distances, indices = nearest_neighbours(keys[[4, 9]] * 2, keys)
    assert indices.tolist() == [4, 9] and distances.max() < 1e-12
    distances, indices = nearest_neighbours(keys, keys, exclude_self=True, chunk=7)
    cosine = 1 - torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
    cosine.fill_diagonal_(9)
    assert torch.equal(indices, cosine.argmin(1))
    torch.testing.assert_close(distances, cosine.min(1).values.float())
    with pytest.raises(ValueError, match="5 features and keys 4"):
        nearest_neighbours(keys, keys[:, :4])


def test_near_duplicates(lite0, photographs):
    patches = photographs[:, :, :384, :384].unfold(2, 64, 64).unfold(3, 64, 64)  # (2, 3, 6, 6, 64, 64)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[::3].contiguous()
    copies = shifted_or_flipped(patches, torch.Generator().manual_seed(0))
    assert copies.shape == patches.shape and not any(torch.equal(a, b) for a, b in zip(patches, copies, strict=True))
    features = extract_features(lite0, [patches], "cpu")

    def extract(images):
        return extract_features(lite0, [images], "cpu")

    threshold = near_duplicate_threshold(patches, features, extract, seed=0)
    distances, indices = nearest_neighbours(extract(patches.flip(-1)), features)
    assert (distances < threshold).float().mean() > 0.8 and (indices == torch.arange(len(patches))).all()
    grid = neighbour_grid(patches[:5], patches[indices[:5]], distances[:5], columns=3)
    assert grid.width > 3 * 64 and grid.height > 4 * 64


def test_psnr():
    x = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    y = x.clone()
    y[1] += 5
    values = psnr(x, y)
    assert values[0] == math.inf and values[1].item() == pytest.approx(20 * math.log10(255 / 5))
    with pytest.raises(ValueError, match="expected uint8"):
        psnr(x.float(), y.float())


def test_labels():
    assert draw_labels("balanced", 5, 3, 0) == [0, 1, 2, 0, 1]
    assert draw_labels("random", 50, 7, 1)[:20] == draw_labels("random", 20, 7, 1) != draw_labels("random", 20, 7, 2)
    assert set(draw_labels("random", 200, 7, 0)) == set(range(7))
    drawn = draw_labels("reference", 4000, 7, 0, [5, 5, 5, 2])
    assert set(drawn) == {2, 5} and 0.7 < drawn.count(5) / 4000 < 0.8
    with pytest.raises(ValueError, match="labelled reference"):
        draw_labels("reference", 4, 3, 0, [5])


def test_images_of_folders_and_arrays(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 6), "red").save(tmp_path / "b.png")
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "a.png")
    (tmp_path / "settings.json").write_text("{}")
    images = FolderImages(tmp_path)
    assert len(images) == 2 and images.read([1, 0])[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    Image.new("RGB", (9, 6)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match="c.png is 9x6, expected 8x6"):
        FolderImages(tmp_path).read([0, 2])
    (tmp_path / "d.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="d.png cannot be read"):
        FolderImages(tmp_path).read([3])
    np.savez(tmp_path / "x.npz", np.zeros((2, 4, 4, 3), np.uint8))
    assert NpzImages(tmp_path / "x.npz").read([1]).shape == (1, 3, 4, 4)
    np.savez(tmp_path / "y.npz", np.zeros((2, 3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"expected uint8 \(N, H, W, 3\)"):
        NpzImages(tmp_path / "y.npz")
    np.savez(tmp_path / "z.npz", mu=np.zeros(2))
    with pytest.raises(ValueError, match="holds mu: expected arr_0"):
        NpzImages(tmp_path / "z.npz")
