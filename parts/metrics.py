"""FID, sFID, IS, precision and recall of two sets of images, as the ADM evaluator defines them.

And the winning rate of two lists of scores.

The evaluator is github.com/openai/guided-diffusion/evaluations, for TensorFlow. Here its network
and its formulas are those of torch-fidelity, whose weights are the same, converted. A number for a
paper should still come from the evaluator itself, which reads the same npz.

    numbers = evaluate(Path("samples.npz"), Path("VIRTUAL_imagenet256_labeled.npz"), device)
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import running
from parts.images import SUFFIXES, image_files, open_image

Statistics = dict[str, np.ndarray]  # mu (D,), sigma (D, D) of features

LEAST = 4  # images in a set: a point and its three neighbours
RUN = 5000  # images of which an Inception score is taken
Z = 1.959963984540054  # of a normal distribution, within which 95 % of it lie
GIVE = "give an npz with arr_0 (N, H, W, 3) of bytes, or a folder of pictures of one size"


# --------------------------------------------------------------------------------------- evaluation
def evaluate(samples: Path, ref: Path, device: torch.device, chunk: int = 64) -> dict[str, float]:
    """FID, sFID, IS, precision and recall of samples against real images, by these names.

    Each is what read_images takes, and both have images of one size. Where ref comes with
    statistics, as ADM's reference batches do, FID and sFID use them instead of its images.
    Inception sees `chunk` images at a time. ValueError: an input cannot be used; all but a wrong
    shape of statistics is found before Inception is loaded.
    """
    generated, _ = read_images(samples)
    real, given = read_images(ref)
    running.require(
        generated.shape[1:] == real.shape[1:],
        f"{samples} has images of {shape_of(generated)}, {ref} of {shape_of(real)}: "
        "make them one size",
    )

    network = Inception(device)
    pool, logits, spatial = see(network, generated, chunk, "samples")
    pool_real, _, spatial_real = see(network, real, chunk, "ref")

    precision, recall = precision_recall(pool, pool_real)
    return dict(
        FID=frechet_distance(pool, given.get("FID", pool_real)),
        sFID=frechet_distance(spatial, given.get("sFID", spatial_real)),
        IS=inception_score(logits),
        precision=precision,
        recall=recall,
    )


def see(
    network: "Inception", images: Tensor, chunk: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What Inception puts out for all images of a set, on the CPU."""
    chunks = running.progress(images.split(chunk), desc=name)
    seen = [[v.cpu() for v in network(part)] for part in chunks]
    pool, logits, spatial = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return pool, logits, spatial


def shape_of(images: Tensor) -> str:
    """The size of images (N, H, W, 3) as people say it, width first."""
    _, height, width, _ = images.shape
    return f"{width} x {height} pixels"


# --------------------------------------------------------------------------------------- two inputs
def read_images(path: Path) -> tuple[Tensor, dict[str, Statistics]]:
    """The images (N, H, W, 3) uint8 of an npz or a folder, and the statistics that an npz may have.

    The statistics are of FID and of sFID, by these names: ADM's mu and sigma, mu_s and sigma_s.
    ValueError: there are no images of the kind that GIVE says, or fewer than 4, or half of the
    statistics.
    """
    running.require(path.exists(), f"{path} does not exist: {GIVE}")
    if path.is_dir():
        pixels, statistics = read_folder(path), {}
    else:
        pixels, statistics = read_npz(path)
    running.require(len(pixels) >= LEAST, f"{path} has {len(pixels)} images: give {LEAST} or more")
    return torch.from_numpy(pixels), statistics


def read_folder(folder: Path) -> np.ndarray:
    """All pictures in a folder -> (N, H, W, 3) uint8, in order of their paths."""
    files = image_files(folder)
    running.require(files, f"{folder} has no pictures ({', '.join(SUFFIXES)}): {GIVE}")
    width, height = size = open_image(files[0]).size
    pixels = np.empty((len(files), height, width, 3), np.uint8)
    for i, path in enumerate(running.progress(files, desc=folder.name)):
        image = open_image(path)
        running.require(
            image.size == size,
            f"{path} is {image.width} x {image.height} pixels, {files[0]} is {width} x {height}: "
            "make all pictures one size",
        )
        pixels[i] = np.asarray(image)
    return pixels


def read_npz(path: Path) -> tuple[np.ndarray, dict[str, Statistics]]:
    """arr_0 of an npz, and the statistics in it."""
    with path.open("rb") as file:
        begin = file.read(24)
    running.require(zipfile.is_zipfile(path), f"{path} is no whole npz (it begins {begin}): {GIVE}")
    names = ("arr_0", "mu", "sigma", "mu_s", "sigma_s")
    try:
        with np.load(path) as file:
            arrays = {k: file[k] for k in names if k in file}
    except Exception as error:  # a zip file's damage shows in as many ways as a picture's
        raise ValueError(f"{path} cannot be read as an npz ({error!s:.150}): {GIVE}") from error

    running.require("arr_0" in arrays, f"{path} has no arr_0, which are the images: {GIVE}")
    pixels = arrays["arr_0"]
    running.require(
        pixels.dtype == np.uint8, f"{path}: arr_0 is {pixels.dtype}: give uint8 in 0..255"
    )
    running.require(
        pixels.ndim == 4 and pixels.shape[3] == 3,
        f"{path}: arr_0 has shape {pixels.shape}: give (N, H, W, 3)",
    )

    statistics = {}
    for metric, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        running.require(
            (mu in arrays) == (sigma in arrays),
            f"{path} has one of {mu} and {sigma}: give both, or neither",
        )
        if mu in arrays:
            statistics[metric] = dict(mu=arrays[mu], sigma=arrays[sigma])
    return pixels, statistics


# ------------------------------------------------------------------------------------- the measures
def frechet_distance(features: Tensor, real: Tensor | Statistics) -> float:
    """The Frechet distance of two Gaussians, |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)).

    One has the mean and the covariance of features (N, D), the other those of real, which is
    features (M, D) too, or their {mu (D,), sigma (D, D)}. It computes in float64 on the CPU.
    ValueError: a set has one row, or statistics are of another number of features.
    """
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    of_features = statistics_of(features)
    if isinstance(real, Tensor):
        of_real = statistics_of(real)
    else:
        of_real = {k: np.asarray(real[k], np.float64) for k in ("mu", "sigma")}
    for k, v in of_real.items():
        running.require(
            v.shape == of_features[k].shape,
            f"{k} of the real images has shape {v.shape}, not {of_features[k].shape}: "
            "give statistics of the same network",
        )
    return fid_statistics_to_metric(of_features, of_real, False)["frechet_inception_distance"]


def statistics_of(features: Tensor) -> Statistics:
    """The mean and the covariance, by N - 1, of features (N, D)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    running.require(len(features) >= 2, f"a covariance of {len(features)} images: give more")
    return fid_features_to_statistics(features.double().cpu())


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence of p(class | image) from p(class): logits (N, classes), N > 0.

    It is taken of runs of 5,000 images in their order, of which the last may be shorter, and is the
    mean over the runs.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    scores = []
    for part in logits.cpu().split(RUN):
        score = isc_features_to_metric(part, splits=1, shuffle=False)
        scores.append(score["inception_score_mean"])
    return sum(scores) / len(scores)


def precision_recall(features: Tensor, real: Tensor) -> tuple[float, float]:
    """Precision and recall of features (N, D) against real (M, D), each in [0, 1].

    Precision is the share of features in one or more of the balls about the points of real, each of
    which reaches to the point's third neighbour in real. Recall is the same with the sets exchanged
    (arXiv 1904.06991). ValueError: a set has fewer than 4 points.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    fewer = min(len(features), len(real))
    running.require(fewer >= LEAST, f"a set has {fewer} images: give {LEAST} or more")
    shares = prc_features_to_metric(
        features.float().cpu(),
        real.float().cpu(),
        prc_neighborhood=LEAST - 1,
        save_cpu_ram=True,
        verbose=False,
    )
    return shares["precision"], shares["recall"]


# --------------------------------------------------------------------------------- the winning rate
def winning_rate(r: Tensor, other: Tensor) -> dict[str, float]:
    """How often the first of two images of a prompt has the higher score: r (N,), other (N,).

    A tie counts half. low and high are the ends of Wilson's interval of 95 %, which holds for few
    images too, also where one side has won them all. ValueError: N is 0, or of unlike numbers.
    """
    running.require(
        r.shape == other.shape and r.ndim == 1 and len(r) > 0,
        f"scores of shapes {tuple(r.shape)} and {tuple(other.shape)}: give both (N,), N > 0",
    )
    won = (r > other).double() + (r == other).double() / 2
    p = won.mean().item()
    n = len(r)
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    width = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return dict(winning_rate=p, low=max(0.0, middle - width), high=min(1.0, middle + width))


# -------------------------------------------------------------------------------------- the network
class Inception:
    """The Inception of 2015: images (B, H, W, 3) uint8, of any size -> what the measures are of.

    These are pool (B, 2048) for FID, precision and recall; logits (B, 1008), without the bias, for
    IS; and the spatial features of sFID (B, 2023), which are the first 7 channels of a layer with
    17 x 17 positions, row by row, with the channels last. All are float32 on the device.

    The weights are downloaded at first (95 MB), to where torch.hub keeps them.
    """

    def __init__(self, device: torch.device):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        outputs = ["2048", "logits_unbiased"]
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", outputs).to(device)
        self.device = device
        self.layer = None
        # It is mixed_6/conv in ADM's graph, after its ReLU.
        self.net.Mixed_6d.branch1x1.register_forward_hook(self.keep)

    def keep(self, _module, _inputs, output: Tensor) -> None:
        """Keep the layer of sFID, which torch-fidelity does not put out."""
        self.layer = output

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with true_float32(self.device):
            pool, logits = self.net(images.to(self.device).permute(0, 3, 1, 2))
        spatial = self.layer[:, :7].permute(0, 2, 3, 1).flatten(1)
        self.layer = None
        return pool, logits, spatial


@contextlib.contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """A context without TF32 and autocast: with them a GPU has some 3 digits, and FID drifts.

    What was set before is set again at the end, also after an exception. It is for programs that
    set TF32 by set_float32_matmul_precision or allow_tf32; torch lets nobody mix these with
    fp32_precision.
    """
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
