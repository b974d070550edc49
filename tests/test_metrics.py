"""parts/metrics.py: the five measures, their network, and the two inputs that they compare.

The measures are held against numbers worked out by hand or by scipy. Inception is the real network
with random weights, since its own must be downloaded; where only its place in `evaluate` matters, a
stand-in reads features off the pixels.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from helpers import CPU
from parts import metrics


def normal(count, seed, scale=1.0, shift=0.0):
    """Features (count, 3) whose numbers hang together, so that a covariance is no diagonal."""
    numbers = np.random.default_rng(seed)
    mixing = np.random.default_rng(seed + 100).normal(size=(3, 3))
    return torch.from_numpy(scale * numbers.normal(size=(count, 3)) @ mixing + shift)


def moments(features):
    """Mean and covariance by N - 1, by their definition."""
    v = features.double().numpy()
    mu = v.sum(0) / len(v)
    centred = v - mu
    return mu, centred.T @ centred / (len(v) - 1)


def distance(mu, sigma, mu_real, sigma_real):
    """The Frechet distance by scipy's matrix root, which torch-fidelity does without."""
    root = scipy.linalg.sqrtm(sigma @ sigma_real).real
    return ((mu - mu_real) ** 2).sum() + np.trace(sigma + sigma_real - 2 * root)


# --------------------------------------------------------------------------------- Frechet distance
def test_frechet_distance_of_two_sets():
    """The sets are small, so that a covariance by N instead of N - 1 would show."""
    features = normal(8, 0)
    real = normal(11, 1, scale=2.0, shift=0.5)

    got = metrics.frechet_distance(features, real)

    assert got == pytest.approx(distance(*moments(features), *moments(real)), rel=1e-6)


def test_frechet_distance_of_known_covariances():
    """For diagonal covariances it is a sum over axes of the squared distances of mean and of sigma.

    The four points have the means 0 and the variances 4/3 and 16/3. Statistics of mean (1, 2) and
    variances 12 and 3 are as far from it as the formula on paper says.
    """
    features = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]])
    real = dict(mu=np.array([1.0, 2.0]), sigma=np.diag([12.0, 3.0]))

    got = metrics.frechet_distance(features, real)

    deviations = (np.sqrt(4 / 3) - np.sqrt(12)) ** 2 + (np.sqrt(16 / 3) - np.sqrt(3)) ** 2
    assert got == pytest.approx(1 + 4 + deviations)


def test_statistics_stand_for_the_set_that_they_are_of():
    """They may be of float32, as an npz of ADM has them."""
    features, real = normal(8, 0), normal(11, 1)
    mu, sigma = moments(real)

    got = metrics.frechet_distance(
        features,
        dict(mu=mu.astype(np.float32), sigma=sigma.astype(np.float32)),
    )

    assert got == pytest.approx(metrics.frechet_distance(features, real), rel=1e-4)


@pytest.mark.parametrize(
    "mu, sigma, named",
    [((4,), (4, 4), "mu"), ((3,), (3, 4), "sigma"), ((1, 3), (3, 3), "mu")],
)
def test_statistics_of_another_network_are_refused(mu, sigma, named):
    """FID's and sFID's may be exchanged in a file, or be of another Inception."""
    real = dict(mu=np.zeros(mu), sigma=np.zeros(sigma))

    with pytest.raises(ValueError, match=f"^{named} of the real images has shape"):
        metrics.frechet_distance(normal(8, 0), real)


def test_one_image_has_no_covariance():
    """numpy would give NaN, and an error far from its cause."""
    with pytest.raises(ValueError, match="covariance of 1 images"):
        metrics.frechet_distance(normal(1, 0), normal(8, 1))


# ---------------------------------------------------------------------------------- Inception score
def sure(classes, count=10):
    """Logits (N, count) of a classifier that is sure of classes (N,)."""
    return 100 * torch.nn.functional.one_hot(torch.as_tensor(classes), count).float()


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_inception_score_counts_the_classes_that_are_told_apart(classes):
    """A classifier is sure of each image, and all k classes are as frequent: the score is k."""
    y = torch.arange(6 * classes) % classes

    assert metrics.inception_score(sure(y)) == pytest.approx(classes)


def test_inception_score_of_images_that_nothing_is_known_of_is_1():
    """Every image has the same uniform p(class)."""
    assert metrics.inception_score(torch.zeros(12, 10)) == pytest.approx(1)


def test_inception_score_of_half_sure_images():
    """The oracle is the definition, on paper: exp of the mean of sum p log(p / q).

    Two images have p = (3/4, 1/4) and (1/4, 3/4), so q is (1/2, 1/2).
    """
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]])

    got = metrics.inception_score(p.log())

    assert got == pytest.approx(np.exp(0.75 * np.log(1.5) + 0.25 * np.log(0.5)))


def test_inception_score_is_the_mean_over_runs_of_5000_in_order():
    """So the ADM evaluator has it, and a score of all images at once would be higher.

    The first run has two classes, the second has one, and the last is short and has four. The
    scores 2, 1 and 4 count alike.
    """
    y = torch.cat([torch.arange(5000) % 2, torch.full((5000,), 9), torch.arange(8) % 4])

    assert metrics.inception_score(sure(y)) == pytest.approx((2 + 1 + 4) / 3)


# ----------------------------------------------------------------------------- precision and recall
# Points on a line. The balls about the first four of REAL reach their third neighbours, so they
# cover -3 to 6, and the others 97 to 106. Of MADE, 5.5 is covered by the ball about 3 alone, which
# reaches 6, and 50 is not covered. The balls of MADE reach 98 at most, so half of REAL is covered.
REAL = [0, 1, 2, 3, 100, 101, 102, 103]
MADE = [0, 1, 2, 3, 5.5, 50]


def points(line):
    """Points (N, 2) of a plane that lie on a line."""
    x = torch.tensor(line, dtype=torch.float32)
    return torch.stack([x, torch.full_like(x, 7)], 1)


def test_precision_and_recall_of_points_on_a_line():
    """Precision is the share of what is made that looks real, recall the reverse."""
    precision, recall = metrics.precision_recall(points(MADE), points(REAL))

    assert precision == pytest.approx(5 / 6)
    assert recall == pytest.approx(1 / 2)


def test_precision_is_of_the_first_set():
    """One of four lies outside.

    The balls about these four are wide, so they cover all that is real.
    """
    precision, recall = metrics.precision_recall(points([-4, 0, 3, 5]), points([0, 1, 2, 3]))

    assert precision == pytest.approx(3 / 4)
    assert recall == 1


@pytest.mark.parametrize("made, real", [(3, 8), (8, 3)])
def test_a_third_neighbour_takes_four_points(made, real):
    with pytest.raises(ValueError, match="a set has 3 images: give 4 or more"):
        metrics.precision_recall(normal(made, 0), normal(real, 1))


# ---------------------------------------------------------------------------------------- Inception
@pytest.fixture(scope="module")
def inception():
    """The network with random weights, in place of those that torch-fidelity downloads."""
    from torch_fidelity import feature_extractor_inceptionv3 as lib

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(
            lib.FeatureExtractorInceptionV3,
            "load_state_dict",
            lambda self, state: None,
        )
        network = metrics.Inception(CPU)
    for p in network.net.parameters():
        if p.ndim > 1:  # the layers keep the size of what passes through them
            torch.nn.init.kaiming_normal_(p)
    return network


@pytest.fixture(scope="module")
def seen(inception):
    """What it puts out for two images, and the layers in it that this must be of.

    These are the last one with positions, and the one of sFID.
    """
    layers = {}

    def keep(name):
        return lambda module, inputs, output: layers.update({name: output.clone()})

    hooks = [
        inception.net.Mixed_7c.register_forward_hook(keep("last")),
        inception.net.Mixed_6d.branch1x1.register_forward_hook(keep("layer")),
    ]
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
    pool, logits, spatial = inception(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(
        images=images,
        pool=pool,
        logits=logits,
        spatial=spatial,
        net=inception.net,
        **layers,
    )


def test_inception_pools_its_last_layer(seen):
    """FID is of the mean over the 8 x 8 positions."""
    assert seen.pool.shape == (2, 2048)
    torch.testing.assert_close(seen.pool, seen.last.sum((2, 3)) / 64)


def test_inception_sees_images_upright(seen):
    """torch-fidelity wants channels first, and rows before columns.

    A network with random weights sees the difference as well as the real one.
    """
    channels_first = np.ascontiguousarray(np.moveaxis(seen.images, 3, 1))

    pool, _ = seen.net(torch.from_numpy(channels_first))

    torch.testing.assert_close(seen.pool, pool)


def test_inceptions_logits_have_no_bias(seen):
    """The ADM evaluator leaves the bias out, which changes IS."""
    assert seen.logits.shape == (2, 1008)
    torch.testing.assert_close(
        seen.logits,
        seen.pool @ seen.net.fc.weight.T,
        rtol=1e-4,
        atol=1e-4,
    )


def test_sfid_is_of_seven_channels_row_by_row(seen):
    """The ADM evaluator reads mixed_6/conv[..., :7] of a graph with channels last, and flattens it.

    Its statistics, mu_s and sigma_s, are in this order.
    """
    assert seen.spatial.shape == (2, 17 * 17 * 7)
    assert seen.spatial.std() > 0
    for row, column, channel in [(0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (11, 5, 3)]:
        got = seen.spatial[:, 7 * (17 * row + column) + channel]
        assert got.equal(seen.layer[:, channel, row, column])


@pytest.fixture
def tf32():
    """TF32 is on, as the scripts set it, and is put back as it was after the test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def precision_now():
    """How products and convolutions are computed, and whether autocast is on."""
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.is_autocast_enabled("cpu"),
    )


def test_inception_computes_in_float32_and_sets_tf32_back(inception, tf32):
    """With TF32 the features have three digits. What trains beside it goes on with TF32.

    A hook looks while the network runs, and then raises, as a lack of memory may do.
    """
    within = []

    def look(module, inputs):
        within.append(precision_now())
        raise MemoryError

    hook = inception.net.Conv2d_1a_3x3.register_forward_pre_hook(look)
    with torch.autocast("cpu"):
        before = precision_now()
        with pytest.raises(MemoryError):
            inception(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
        after = precision_now()
    hook.remove()

    assert within == [("highest", False, False, False)]
    assert before == after == ("high", True, True, True)


# --------------------------------------------------------------------------------------- the inputs
def random_images(count=6, height=8, width=10):
    numbers = np.random.default_rng(count)
    return numbers.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save_folder(folder, images, suffix="png"):
    """Images as files 000.png, 001.png ..."""
    folder.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i:03}.{suffix}", lossless=True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_whole(tmp_path, save):
    """arr_0 is what numpy calls an array without a name, and what the ADM evaluator reads."""
    images = random_images()
    save(tmp_path / "a.npz", images)

    got, statistics = metrics.read_images(tmp_path / "a.npz")

    assert got.dtype == torch.uint8
    assert (got.numpy() == images).all()
    assert statistics == {}


def test_an_npz_brings_the_statistics_of_adm(tmp_path):
    """They are sorted by the measure that they serve; what else is in the file is left there."""
    own = dict(mu=np.ones(2), sigma=np.eye(2), mu_s=np.zeros(3), sigma_s=2 * np.eye(3))
    np.savez(tmp_path / "a.npz", random_images(), **own, arr_1=np.zeros(6))

    _, statistics = metrics.read_images(tmp_path / "a.npz")

    assert statistics.keys() == {"FID", "sFID"}
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        assert (statistics[name]["mu"] == own[mu]).all()
        assert (statistics[name]["sigma"] == own[sigma]).all()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_folder_is_read_in_order_of_its_names(tmp_path, suffix):
    """Beside the pictures lie a copy by Jupyter and a file of a Mac's, which are none."""
    images = random_images()
    save_folder(tmp_path / "a", images, suffix)
    save_folder(tmp_path / "a/.ipynb_checkpoints", images[:2])
    (tmp_path / "a/._000.png").write_bytes(b"\0\5\x16\7")

    got, statistics = metrics.read_images(tmp_path / "a")

    assert (got.numpy() == images).all()
    assert statistics == {}


def refused(path):
    """The message with which read_images refuses a path: one line, with its name."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        metrics.read_images(path)
    message = str(raised.value)
    assert "\n" not in message
    return message


IMAGES = random_images()
MU, SIGMA = np.zeros(2), np.eye(2)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(arr_0=IMAGES / 255), "arr_0 is float64: give uint8 in 0..255"),
        (dict(arr_0=IMAGES.astype(int)), "arr_0 is int64: give uint8 in 0..255"),
        (dict(arr_0=IMAGES[0]), "arr_0 has shape (8, 10, 3): give (N, H, W, 3)"),
        (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), "arr_0 has shape (6, 3, 8, 10)"),
        (dict(arr_0=IMAGES[..., :1]), "arr_0 has shape (6, 8, 10, 1)"),
        (dict(images=IMAGES), "has no arr_0"),
        (dict(mu=MU, sigma=SIGMA), "has no arr_0"),
        (dict(arr_0=IMAGES[:3]), "has 3 images: give 4 or more"),
        (dict(arr_0=IMAGES, mu=MU), "has one of mu and sigma: give both"),
        (dict(arr_0=IMAGES, sigma=SIGMA), "has one of mu and sigma: give both"),
        (dict(arr_0=IMAGES, mu_s=MU), "has one of mu_s and sigma_s: give both"),
        (dict(arr_0=IMAGES, sigma_s=SIGMA), "has one of mu_s and sigma_s: give both"),
        (dict(arr_0=IMAGES, mu=MU, sigma_s=SIGMA), "has one of mu and sigma: give both"),
        (dict(arr_0=np.array([{}])), "cannot be read as an npz"),
    ],
)
def test_an_npz_of_another_kind_says_what_to_give(tmp_path, arrays, message):
    """Floats, for one, would be cut to 0 and 1 without a word if they were cast."""
    np.savez(tmp_path / "a.npz", **arrays)

    assert message in refused(tmp_path / "a.npz")


def test_four_images_are_enough(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES[:4])

    assert len(metrics.read_images(tmp_path / "a.npz")[0]) == 4


@pytest.mark.parametrize(
    "content, begin",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "version https://git-lfs"),
        (b"Not found\n", "Not found"),
        (b"", "begins b''"),
        (b"PK\x03\x04 and no end", "PK"),
    ],
    ids=["git-lfs", "text", "empty", "half"],
)
def test_a_file_that_is_no_npz_shows_its_beginning(tmp_path, content, begin):
    """That tells a git-lfs pointer or a web page from half a download."""
    (tmp_path / "a.npz").write_bytes(content)

    message = refused(tmp_path / "a.npz")

    assert "no whole npz" in message
    assert begin in message


def test_an_npz_with_damage_in_it_is_named(tmp_path):
    """Its table of contents is whole, and the images are not."""
    np.savez(tmp_path / "a.npz", IMAGES)
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    whole[400:420] = bytes(20)
    (tmp_path / "a.npz").write_bytes(whole)

    assert "cannot be read as an npz" in refused(tmp_path / "a.npz")


def test_a_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)

    assert "no whole npz" in refused(tmp_path / "a.npy")


def test_nothing_there_is_said(tmp_path):
    assert "does not exist" in refused(tmp_path / "a.npz")


def test_a_folder_without_pictures_is_named(tmp_path):
    (tmp_path / "a.txt").touch()

    assert "has no pictures (.png" in refused(tmp_path)


def test_the_first_picture_of_another_size_is_named(tmp_path):
    """The message has both sizes, as people say them, with the width first."""
    save_folder(tmp_path / "a", [*random_images(4), *random_images(2, height=9)])

    message = refused(tmp_path / "a")

    assert f"{tmp_path / 'a/004.png'} is 10 x 9 pixels" in message
    assert f"{tmp_path / 'a/000.png'} is 10 x 8" in message


def test_a_folder_of_three_pictures_is_too_small(tmp_path):
    save_folder(tmp_path / "a", IMAGES[:3])

    assert "has 3 images: give 4 or more" in refused(tmp_path / "a")


# ----------------------------------------------------------------------------------------- evaluate
class Eyes:
    """A stand-in for Inception, whose features are pixels that a test can choose.

    pool is red and green of the first pixel; the class, of 4, is red of the one below; the features
    of sFID are red of the two first pixels in the third row.
    """

    batches: list[int]

    def __init__(self, device):
        Eyes.batches = []

    def __call__(self, images):
        Eyes.batches.append(len(images))
        pool = images[:, 0, 0, :2].float()
        spatial = images[:, 2, :2, 0].float()
        return pool, sure(images[:, 1, 0, 0].long(), 4), spatial


@pytest.fixture
def eyes(monkeypatch):
    monkeypatch.setattr(metrics, "Inception", Eyes)


def images_of(line, classes=4):
    """Images whose first pixels are twice these points, and whose classes take turns.

    Twice, because a pixel is a whole number. The rest is random.
    """
    images = random_images(len(line))
    images[:, 0, 0, :2] = 2 * points(line).numpy()
    images[:, 1, 0, 0] = np.arange(len(line)) % classes
    return images


def evaluated(folder, samples, real, chunk=64, **statistics):
    """evaluate of two sets of images, by way of two files."""
    np.savez(folder / "samples.npz", samples)
    np.savez(folder / "ref.npz", real, **statistics)
    return metrics.evaluate(folder / "samples.npz", folder / "ref.npz", CPU, chunk)


def test_evaluate_puts_each_measure_in_its_place(tmp_path, eyes):
    """Samples come first and ref second, in all of them.

    Precision and recall are those of the points above, and the samples have three classes. FID is
    of points on a line, so it is the squared distance of their means and that of their deviations;
    sFID is scipy's, of what the stand-in sees.
    """
    samples, real = images_of(MADE, classes=3), images_of(REAL)

    got = evaluated(tmp_path, samples, real)

    assert [*got] == ["FID", "sFID", "IS", "precision", "recall"]
    means = 2 * (np.mean(MADE) - np.mean(REAL))
    deviations = 2 * (np.std(MADE, ddof=1) - np.std(REAL, ddof=1))
    assert got["FID"] == pytest.approx(means**2 + deviations**2)
    spatial, spatial_real = (moments(torch.from_numpy(v[:, 2, :2, 0])) for v in (samples, real))
    assert got["sFID"] == pytest.approx(distance(*spatial, *spatial_real))
    assert got["IS"] == pytest.approx(3)
    assert got["precision"] == pytest.approx(5 / 6)
    assert got["recall"] == pytest.approx(1 / 2)


def test_a_set_is_at_no_distance_from_itself(tmp_path, eyes):
    """It is all of itself, so its precision and its recall are 1."""
    images = images_of(REAL)

    got = evaluated(tmp_path, images, images)

    assert abs(got["FID"]) < 1e-2
    assert abs(got["sFID"]) < 1e-2
    assert got["precision"] == got["recall"] == 1


@pytest.mark.parametrize("name, mu, sigma", [("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")])
def test_adms_statistics_are_used_instead_of_the_images(tmp_path, eyes, name, mu, sigma):
    """They are of all of ImageNet, of which a reference batch has a part.

    They lie .5 off in each feature here, and else are those of the images; so one measure is .25 a
    feature, and all others are as without them.
    """
    images = images_of(REAL)
    seen = dict(FID=images[:, 0, 0, :2], sFID=images[:, 2, :2, 0])[name]
    mean, covariance = moments(torch.from_numpy(seen))
    plain = evaluated(tmp_path, images, images)

    got = evaluated(tmp_path, images, images, **{mu: mean + 0.5, sigma: covariance})

    assert got[name] == pytest.approx(0.25 * len(mean), abs=1e-2)
    for other in got.keys() - {name}:
        assert got[other] == plain[other]


def test_statistics_of_the_samples_count_for_nothing(tmp_path, eyes):
    """A reference batch may be scored as a sample, and its images are what is scored."""
    images = images_of(REAL)
    np.savez(tmp_path / "a.npz", images, mu=np.full(2, 9.0), sigma=np.eye(2))
    np.savez(tmp_path / "b.npz", images)

    got = metrics.evaluate(tmp_path / "a.npz", tmp_path / "b.npz", CPU)

    assert abs(got["FID"]) < 1e-2


def test_a_chunk_is_what_inception_sees_at_a_time(tmp_path, eyes):
    """It bounds the memory, and must change no number, whether or not it divides the count."""
    samples, real = images_of(MADE), images_of(REAL)
    whole = evaluated(tmp_path, samples, real)
    assert Eyes.batches == [6, 8]

    got = evaluated(tmp_path, samples, real, chunk=5)

    assert Eyes.batches == [5, 1, 5, 3]
    assert got == whole


def test_a_folder_and_an_npz_of_it_are_one(tmp_path, eyes):
    """People have samples as files and ADM's batch as an npz."""
    save_folder(tmp_path / "a", images_of(REAL))
    np.savez(tmp_path / "b.npz", images_of(REAL))

    got = metrics.evaluate(tmp_path / "a", tmp_path / "b.npz", CPU)

    assert abs(got["FID"]) < 1e-2
    assert got["precision"] == 1


@pytest.mark.parametrize("bad", ["samples", "ref"])
def test_both_inputs_are_checked_before_inception_is_loaded(tmp_path, monkeypatch, bad):
    """It is downloaded at first, which is not to be had on every machine."""

    def load(device):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(metrics, "Inception", load)
    paths = dict(samples=tmp_path / "samples.npz", ref=tmp_path / "ref.npz")
    for name, path in paths.items():
        np.savez(path, IMAGES[: 3 if name == bad else 6])

    with pytest.raises(ValueError, match=f"{bad}.npz has 3 images"):
        metrics.evaluate(**paths, device=CPU)


def test_two_sets_of_unlike_sizes_are_refused(tmp_path, monkeypatch):
    """Inception enlarges what it sees, so it would compare small images with large ones."""
    monkeypatch.setattr(metrics, "Inception", None)

    with pytest.raises(ValueError, match=re.escape("samples.npz has images of 10 x 8 pixels")):
        evaluated(tmp_path, IMAGES, random_images(height=16))
