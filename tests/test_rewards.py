"""parts/rewards.py and parts/tiny.py: DINOv2's classifier, the reward of a class, random networks.

DINOv2 is timm's network with four layers of width 32 and random weights. Its positions, its input
and what its head sees are computed by hand from DINOv2's definition.
"""

import builtins
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from parts import rewards, tiny


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------- DINOv2
def lively_net():
    """timm's tiny network, as it is before DINOv2Classifier gets it, with positions for 37 x 37.

    All weights are random: a new network has scales of 1e-5 that hide its layers, and a CLS token
    of next to nothing.
    """
    net = timm.create_model(
        rewards.NETWORK,
        pretrained=False,
        num_classes=0,
        embed_dim=32,
        depth=6,
        num_heads=2,
    )
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


def cubic(distance, a):
    """Keys' kernel of bicubic interpolation."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)
    return 0.0


def resize_weights():
    """The matrix (16, 37) of DINOv2's interpolation of positions along one axis.

    Point i of the 16 lies at (i + .5) * 37 / 16.1 - .5 of the 37, and four neighbours count. Those
    beyond the edge are the one on it. The kernel is torch's, with a = -.75.
    """
    weights = np.zeros((16, 37))
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[i, min(max(j, 0), 36)] += cubic(at - j, -0.75)
    return weights


def by_hand(net, head, images):
    """dinov2_vitl14_lc, from the parts of timm's network: images (B, 3, H, W) -> logits (B, 1000).

    Pillow's bicubic resize of floats is the antialiased one.
    """
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (images.permute(0, 2, 3, 1).double().numpy() - mean) / std
    small = np.empty((len(images), 3, 224, 224), np.float32)
    for i in range(len(images)):
        for channel in range(3):
            plane = Image.fromarray(pixels[i, :, :, channel].astype(np.float32))
            small[i, channel] = plane.resize((224, 224), Image.Resampling.BICUBIC)

    grid = net.pos_embed[0, 1:].double().numpy().reshape(37, 37, -1)
    grid = np.einsum("ij,kl,jlc->ikc", resize_weights(), resize_weights(), grid)
    positions = torch.from_numpy(grid.reshape(256, -1)).float()

    # patches of 14 pixels, row by row
    tokens = net.patch_embed.proj(torch.from_numpy(small)).flatten(2).mT + positions
    first = net.cls_token + net.pos_embed[:, :1]
    h = torch.cat([first.expand(len(images), 1, -1), tokens], 1)
    layers = []
    for block in net.blocks:
        h = block(h)
        layers.append(net.norm(h))
    cls_tokens = [layer[:, 0] for layer in layers[-4:]]
    patches = layers[-1][:, 1:]
    return torch.cat([*cls_tokens, patches.sum(1) / 256], 1) @ head.weight.T + head.bias


@pytest.mark.parametrize("size", [(256, 256), (96, 128)], ids=["256", "wide"])
def test_dinov2_is_its_official_classifier(size):
    """The reward must be DMDR's, to the digit.

    The head sees the normed CLS tokens of the last four layers of six, in order, and the mean of
    the last one's patches. The images are of DMDR's size, and of one that is enlarged.
    """
    net, head = lively_net(), nn.Linear(5 * 32, 1000)
    images = torch.rand(2, 3, *size)
    want = by_hand(net, head, images)

    got = rewards.DINOv2Classifier(net, head)(images)

    assert want.std() > 0.1
    assert_close(
        got,
        want,
        rtol=1e-4,
        atol=1e-4,
    )


def test_loaded_weights_are_the_official_ones(monkeypatch):
    """timm's network comes pretrained, and the head from DINOv2's own page, without pickles.

    Stand-ins give what would be downloaded. All of it is frozen.
    """
    net, head = lively_net(), nn.Linear(5 * 32, 1000)
    asked = {}

    def create_model(name, pretrained, num_classes):
        asked.update(name=name, pretrained=pretrained, num_classes=num_classes)
        return net

    def load(url, map_location, weights_only):
        asked.update(url=url, weights_only=weights_only)
        return head.state_dict()

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)

    classify = rewards.load_dinov2(torch.device("cpu"))

    assert asked == dict(
        name="vit_large_patch14_dinov2.lvd142m",
        pretrained=True,
        num_classes=0,
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_linear4_head.pth",
        weights_only=True,
    )
    assert classify.net is net
    assert classify.head.weight.equal(head.weight)
    assert not classify.training
    assert not any(p.requires_grad for p in classify.parameters())


# ---------------------------------------------------------------------------- the reward of a class
def test_log_p_is_the_log_of_a_softmax():
    """By hand, one image at a time, for the class that is asked for.

    Logits of bfloat16, as autocast leaves them, are taken to float32 first.
    """
    logits = torch.randn(3, 5).bfloat16()
    y = torch.tensor([4, 0, 2])

    got = rewards.log_p(logits, y)

    assert got.dtype == torch.float32
    for i, k in enumerate(y.tolist()):
        exps = [math.exp(v) for v in logits[i].tolist()]
        assert got[i].item() == pytest.approx(math.log(exps[k] / sum(exps)), abs=1e-5)


class Toy(nn.Module):
    """A decoder and a classifier, in float64: latents (B, 4) -> images (B, 3, 2, 2) -> 5 logits.

    The images go beyond [-1, 1] here and there, so that the clamp is seen. sizes has the number of
    images in each call of decode.
    """

    def __init__(self):
        super().__init__()
        self.pixels = nn.Linear(4, 12)
        self.logits = nn.Linear(12, 5)
        self.double().requires_grad_(False)
        self.pixels.weight *= 3
        self.sizes = []

    def decode(self, x):
        self.sizes.append(len(x))
        return self.pixels(x).sin().mul(1.3).view(-1, 3, 2, 2)

    def classify(self, images):
        return self.logits(images.flatten(1))

    def by_hand(self, x, y):
        """log p(y) of all images at once, written out."""
        images = self.pixels(x).sin() * 1.3
        seen = images / 2 + 0.5
        seen = torch.where(seen < 0, 0.0, torch.where(seen > 1, 1.0, seen))
        exps = self.logits(seen).float().exp()
        return (exps[torch.arange(len(y)), y] / exps.sum(1)).log()


def batch(count):
    """Latents and classes."""
    return torch.randn(count, 4, dtype=torch.float64), torch.arange(count) % 5


counts = pytest.mark.parametrize("count", [1, 16, 17])


@counts
def test_the_reward_is_log_p_of_clamped_images(count):
    """It is the same with and without a gradient, in batches that fill a chunk of 16 and do not."""
    toy = Toy()
    reward = rewards.class_reward(toy.classify, toy.decode)
    x, y = batch(count)

    got = reward(x, y)
    with_gradient = reward(x.clone().requires_grad_(), y)

    assert got.shape == (count,)
    assert_close(got, toy.by_hand(x, y))
    assert with_gradient.requires_grad
    assert with_gradient.equal(got)


@counts
def test_the_rewards_gradient_is_that_of_one_whole_batch(count):
    """DMDR descends it, by torch.autograd.grad, which not every kind of checkpoint allows.

    The oracle has no chunks, and nothing is computed again. What the clamp has cut has no gradient,
    in both.
    """
    toy = Toy()
    reward = rewards.class_reward(toy.classify, toy.decode)
    x, y = batch(count)
    weights = torch.randn(count)
    x.requires_grad_()

    (got,) = torch.autograd.grad((reward(x, y) * weights).sum(), x)
    (want,) = torch.autograd.grad((toy.by_hand(x, y) * weights).sum(), x)

    assert want.abs().max() > 0
    assert_close(got, want)


def test_a_saturated_image_has_no_gradient():
    """All its pixels are white, whatever the latents are."""
    toy = Toy()
    reward = rewards.class_reward(
        toy.classify, lambda x: 2 + x.view(-1, 1, 2, 2).expand(-1, 3, 2, 2)
    )
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)

    reward(x, torch.tensor([0])).sum().backward()

    assert (x.grad == 0).all()


def test_a_gradient_decodes_again_in_chunks_of_16():
    """So a decoder's activations are held for 16 images at a time.

    After the forward pass nothing may be held but the latents; each chunk is decoded again when its
    turn comes in the backward pass.
    """
    toy = Toy()
    reward = rewards.class_reward(toy.classify, toy.decode)
    x, y = batch(33)
    kept = []

    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        r = reward(x.requires_grad_(), y)
    assert toy.sizes == [16, 16, 1]
    assert not [v for v in kept if v.shape[1:] == (12,)]

    r.sum().backward()
    assert sorted(toy.sizes[3:]) == [1, 16, 16]


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "plain"])
def test_nothing_is_decoded_twice_without_a_gradient(monkeypatch, how):
    """AMD's reward is a black box, sensed in every update, and checkpoints would slow it.

    There is none under no_grad though the latents require a gradient, and none for latents that
    require none.
    """

    def refuse(*arguments, **options):
        raise AssertionError("it made a checkpoint")

    monkeypatch.setattr(rewards, "checkpoint", refuse)
    toy = Toy()
    reward = rewards.class_reward(toy.classify, toy.decode)
    x, y = batch(17)
    contexts = dict(
        no_grad=torch.no_grad(), inference_mode=torch.inference_mode(), plain=torch.enable_grad()
    )

    with contexts[how]:
        r = reward(x.requires_grad_(how != "plain"), y)

    assert not r.requires_grad
    assert toy.sizes == [16, 1]


def test_the_reward_runs_under_runnings_autocast(monkeypatch):
    """In bfloat16 on a GPU, also when a chunk is computed again. Here it is made to on the CPU.

    float32 goes in and comes out, so that no reward is rounded.
    """
    monkeypatch.setattr(
        rewards.running, "autocast", lambda x: torch.autocast("cpu", torch.bfloat16)
    )
    toy = Toy().float()
    types = []

    def classify(images):
        logits = toy.classify(images)
        types.append(logits.dtype)
        return logits

    reward = rewards.class_reward(classify, toy.decode)
    x, y = batch(4)
    x = x.float().requires_grad_()

    r = reward(x, y)
    r.sum().backward()

    assert types == [torch.bfloat16] * 2
    assert r.dtype == x.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------- random networks
def test_a_latent_of_the_tiny_autoencoder_is_an_eighth_of_a_side():
    """It must have the shapes of the real one: 4 channels, and an eighth of a side."""
    vae = tiny.sd_vae("tiny")

    image = vae.decode(torch.randn(1, 4, 2, 3)).sample

    assert image.shape == (1, 3, 16, 24)
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())


def test_the_tiny_classifier_has_imagenets_classes():
    """Its weights are random, and it can tell images apart."""
    classify = tiny.dinov2("tiny")

    logits = classify(torch.rand(2, 3, 32, 32))

    assert logits.shape == (2, 1000)
    assert not logits[0].equal(logits[1])
    assert not classify.training
    assert not any(p.requires_grad for p in classify.parameters())


@pytest.mark.parametrize(
    "make, weights",
    [
        (tiny.sd_vae, 83_653_863),
        (tiny.dinov2, 304_368_640 - 1024 - (37**2 - 16**2) * 1024 + (5 * 1024 + 1) * 1000),
    ],
    ids=["sd_vae", "dinov2"],
)
def test_full_networks_have_the_true_number_of_weights(make, weights):
    """A dry run measures memory and speed with them. On the meta device they need none.

    The numbers are sd-vae-ft-ema's, and DINOv2's ViT-L/14 less its mask token, with positions for
    16 x 16 patches and with its head.
    """
    with torch.device("meta"):
        net = make("full")

    assert sum(p.numel() for p in net.parameters()) == weights
    assert {p.device.type for p in net.parameters()} == {"meta"}


@pytest.mark.parametrize("make", [tiny.sd_vae, tiny.dinov2])
def test_libraries_are_imported_on_the_cpu(monkeypatch, make):
    """They make tensors when they are imported, which must not lie on the device of a network.

    They may be imported already, but Python calls __import__ all the same.
    """
    devices = {}
    python_import = builtins.__import__

    def note(name, *arguments):
        if name in ("diffusers", "timm"):
            devices.setdefault(name, torch.empty(0).device.type)
        return python_import(name, *arguments)

    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(builtins, "__import__", note)
        net = make("tiny")

    assert devices["diffusers" if make is tiny.sd_vae else "timm"] == "cpu"
    assert next(net.parameters()).device.type == "meta"
