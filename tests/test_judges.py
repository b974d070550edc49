"""parts/judges.py, HPSv2 of parts/rewards.py, the winning rate, and pipelines of parts/tiny.py.

Each judge is held against its definition, written out from the weights. The networks are small and
random. What would be downloaded lies in folders that the tests make.
"""

import builtins
import contextlib
import math
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import functional as V

from helpers import CPU, picture, pictures
from parts import judges, metrics, rewards, tiny

torch.set_num_threads(1)  # the networks are small

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])  # of CLIP
STD = np.array([0.26862954, 0.26130258, 0.27577711])
TEXTS = [f"picture {i}" for i in range(5)]


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


@pytest.fixture
def images(tmp_path):
    """Five images of PIL, 100 pixels high and from 85 to 125 wide."""
    pictures(tmp_path / "images")
    return [picture(tmp_path / f"images/{i}.png").convert("RGB") for i in range(5)]


def lively(net):
    """net with large weights: new ones make much the same of all images, and of all texts."""
    for p in net.parameters():
        p.data.normal_(0, 0.3)
    return net.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------- HPSv2
def padded(pixels, size=224):
    """HPSv2's preprocessing by hand: floats (H, W, 3) in [0, 1] -> (3, size, size).

    Pillow's bicubic resize of floats is the antialiased one. Where the margins are odd, the right
    and the lower one have the pixel more.
    """
    height, width, _ = pixels.shape
    scale = size / max(height, width)
    height, width = round(height * scale), round(width * scale)
    square = np.zeros((size, size, 3))
    top, left = (size - height) // 2, (size - width) // 2
    for channel in range(3):
        plane = Image.fromarray(pixels[:, :, channel].astype(np.float32))
        plane = plane.resize((width, height), Image.Resampling.BICUBIC)
        square[top : top + height, left : left + width, channel] = plane
    return torch.from_numpy((square - MEAN) / STD).permute(2, 0, 1).float()


def hps_by_hand(clip, image, prompt):
    """100 times the cosine, of one image of PIL and one prompt."""
    seen = clip.encode_image(padded(np.asarray(image) / 255)[None])[0]
    words = open_clip.get_tokenizer("ViT-H-14")([prompt])
    said = clip.encode_text(words)[0]
    return 100 * (seen @ said) / (seen.norm() * said.norm())


@pytest.mark.parametrize(
    "height, width",
    [(100, 85), (100, 125), (512, 384), (224, 224), (224, 101), (60, 224), (1000, 999)],
)
def test_hpsv2_pads_an_image_to_a_square(height, width):
    """Enlarged or made smaller, wide or high, with odd margins, or of the size that it needs."""
    pixels = torch.rand(2, 3, height, width)
    wanted = [padded(image.permute(1, 2, 0).numpy()) for image in pixels]
    assert_close(rewards.square(pixels), torch.stack(wanted), rtol=0, atol=1e-4)


def test_hpsv2s_square_may_have_another_size():
    pixels = torch.rand(1, 3, 40, 30)
    wanted = padded(pixels[0].permute(1, 2, 0).numpy(), 56)
    assert_close(rewards.square(pixels, 56)[0], wanted, rtol=0, atol=1e-4)


def test_hpsv2_judges_images_as_its_authors_do(images):
    """The images are wider than high and higher than wide, and are judged at once."""
    net = lively(tiny.hpsv2("tiny"))
    wanted = [hps_by_hand(net.clip, *pair) for pair in zip(images, TEXTS, strict=True)]

    scores = judges.hpsv2(CPU, net)(images, TEXTS)

    assert_close(scores, torch.stack(wanted), rtol=0, atol=1e-4)
    assert scores.std() > 0.1


def test_hpsv2s_features_have_length_1():
    """A text's are computed once for all samples of a prompt, and a score is their product."""
    net = lively(tiny.hpsv2("tiny"))
    squares = rewards.square(torch.rand(3, 3, 64, 64))
    text = net.text(["a fox", "an owl", "a fox"])
    image = net.image(squares)

    assert_close(text.norm(dim=1), torch.ones(3))
    assert_close(image.norm(dim=1), torch.ones(3))
    assert text[0].equal(text[2])
    assert_close(net(squares, text), 100 * torch.einsum("bd,bd->b", image, text))


def test_hpsv2_has_a_gradient_through_its_preprocessing():
    """A reward is ascended by it. The oracle is torchvision's resize and pad."""
    net = lively(tiny.hpsv2("tiny"))
    text = net.text(["a fox"])
    pixels = torch.rand(1, 3, 100, 60, requires_grad=True)

    view = V.pad(V.resize(pixels, [224, 134], V.InterpolationMode.BICUBIC), [45, 0, 45, 0])
    features = net.clip.encode_image(V.normalize(view, MEAN, STD))
    wanted = torch.autograd.grad(100 * F.cosine_similarity(features, text).sum(), pixels)[0]

    gradient = torch.autograd.grad(net(rewards.square(pixels), text).sum(), pixels)[0]

    assert wanted.abs().max() > 1e-3
    assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "device, gradient, wanted",
    [
        ("cuda", False, ("cuda", torch.float16, True)),
        ("cuda", True, ("cuda", torch.bfloat16, True)),
        ("cpu", True, ("cpu", torch.bfloat16, False)),
    ],
)
def test_hpsv2_is_half_on_a_gpu_and_bfloat16_for_a_gradient(monkeypatch, device, gradient, wanted):
    """float16 is what its authors use, and gradients underflow in it. No GPU is needed here."""
    asked = []

    def autocast(device_type, dtype, enabled):
        asked.append((device_type, dtype, enabled))
        return contextlib.nullcontext()

    net = tiny.hpsv2("tiny")
    monkeypatch.setattr(torch, "autocast", autocast)
    image = SimpleNamespace(
        device=SimpleNamespace(type=device), is_cuda=device == "cuda", requires_grad=gradient
    )

    features = net.features(lambda v: torch.tensor([[3.0, 4.0]]).half(), image)

    assert asked == [wanted]
    assert_close(features, torch.tensor([[0.6, 0.8]]))


@pytest.fixture
def small_clip(tmp_path, monkeypatch):
    """A file as HPS_v2.1_compressed.pt, of a small CLIP, which open_clip knows by name."""
    name = "small-for-hpsv2"
    sizes = dict(
        embed_dim=32,
        vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=56),
        text_cfg=dict(layers=2, width=32, heads=2),
    )
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, sizes)
    monkeypatch.setattr(rewards, "CLIP", name)
    path = tmp_path / "HPS_v2.1_compressed.pt"
    clip = lively(open_clip.create_model(name))
    torch.save(dict(epoch=1, state_dict=clip.state_dict()), path)
    return clip, path


@pytest.mark.parametrize("given", [True, False])
def test_hpsv2_is_loaded_from_its_file(small_clip, monkeypatch, given):
    """Given, or downloaded from its authors' repository; it is the whole of the weights, frozen."""
    clip, path = small_clip
    asked = []

    def download(*arguments):
        asked.append(arguments)
        return path

    monkeypatch.setattr(rewards, "download", download)

    net = rewards.load_hpsv2(CPU, path if given else None)

    assert asked == ([] if given else [("xswu/HPSv2", "HPS_v2.1_compressed.pt")])
    for k, v in clip.state_dict().items():
        assert net.clip.state_dict()[k].equal(v)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_hpsv2s_clip_is_vit_h_14():
    assert rewards.CLIP == "ViT-H-14"


SPOIL = {
    "another state": lambda path: torch.save(dict(state_dict=dict(a=torch.ones(1))), path),
    "no weights": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
    "a part": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_a_wrong_file_of_hpsv2_is_refused(small_clip, spoil):
    """In one line that names it. Files are mixed up, and downloads break off."""
    _, path = small_clip
    spoil(path)
    with pytest.raises(ValueError, match=r"is no HPS_v2.1_compressed.pt of xswu/HPSv2") as refused:
        rewards.load_hpsv2(CPU, path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------ the downloads
def test_a_machine_without_network_is_told_so(tmp_path, monkeypatch):
    """The hub's own message reads as if the repository lacked the file."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"a.pt of huggingface.co/b/c is not in the cache, .*off"):
        rewards.download("b/c", "a.pt")


@pytest.mark.parametrize("error", ["LocalEntryNotFoundError", "OfflineModeIsEnabled"])
def test_either_error_of_the_hub_means_offline(monkeypatch, error):
    """Which one it is depends on its version, and on what failed."""

    def fail(*arguments):
        raise getattr(huggingface_hub.errors, error)("no")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match="offline"):
        rewards.download("b/c", "a.pt")


def test_a_download_is_the_file_that_the_hub_keeps(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: f"/{repo}/{name}")
    assert str(rewards.download("b/c", "a.pt")) == "/b/c/a.pt"


# ---------------------------------------------------------------------------------------- PickScore
class Pick:
    """A small CLIP of transformers on disk, and PickScore's definition on it."""

    def __init__(self, folder):
        half = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        config = transformers.CLIPConfig(
            text_config=half, vision_config=half | dict(patch_size=56), projection_dim=24
        )
        self.net = lively(transformers.CLIPModel(config))
        self.net.logit_scale.data.fill_(1.5)
        self.net.save_pretrained(folder / "net")
        form = transformers.CLIPImageProcessor()
        words = tiny.clip_tokenizer()
        transformers.CLIPProcessor(form, words).save_pretrained(folder / "processor")
        self.folders = (folder / "net", folder / "processor")

    def __call__(self, image, prompt):
        """One image of 224 pixels a side, and one prompt without padding."""
        pixels = torch.from_numpy((np.asarray(image) / 255 - MEAN) / STD).float()
        seen = self.net.vision_model(pixels.permute(2, 0, 1)[None]).pooler_output
        seen = self.net.visual_projection(seen)[0]

        words = open_clip.SimpleTokenizer().encode(prompt)[:75]
        tokens = torch.tensor([[49406, *words, 49407]])  # which begin and end a text of CLIP
        said = self.net.text_model(tokens).last_hidden_state[:, -1]
        said = self.net.text_projection(said)[0]
        return math.exp(1.5) * (seen @ said) / (seen.norm() * said.norm())


def test_pickscore_is_a_scaled_cosine(images, tmp_path):
    """The prompts differ in length, and one is longer than CLIP's 77 tokens."""
    pick = Pick(tmp_path)
    views = [image.resize((224, 224)) for image in images[:3]]
    texts = ["a fox", "an old sailor in the rain", "a fox and " * 40 + "an owl"]
    wanted = [pick(*pair) for pair in zip(views, texts, strict=True)]

    scores = judges.pickscore(CPU, *pick.folders)(views, texts)

    assert_close(scores, torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert scores.std() > 0.01
    assert not scores.requires_grad


def test_pickscores_weights_and_processor_are_the_official_ones():
    assert judges.PICKSCORE == "yuvalkirstain/PickScore_v1"
    assert judges.PICKSCORE_PROCESSOR == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


# -------------------------------------------------------------------------------------- ImageReward
VIT = dict(vit="vit_tiny_patch16_224")  # of width 192, with 12 layers of 3 heads
BERT = dict(hidden_size=48, num_hidden_layers=2, intermediate_size=96)  # 12 heads, as BERT's base
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox", "in"]
PAD, CLS, SEP = 0, 2, 3


class Weights(dict):
    """A state dict, read from one module or a prefix of it."""

    def within(self, prefix):
        return Weights({k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)})

    def linear(self, name, h):
        return h @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, name, h, eps):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return h * self[f"{name}.weight"] + self[f"{name}.bias"]


# the shapes of weights in ImageReward.pt, at the small sizes; a bias has the first number
VIT_BLOCK = {
    "norm1": (192,),
    "attn.qkv": (576, 192),
    "attn.proj": (192, 192),
    "norm2": (192,),
    "mlp.fc1": (768, 192),
    "mlp.fc2": (192, 768),
}
BERT_LAYER = {
    "attention.self.query": (48, 48),
    "attention.self.key": (48, 48),
    "attention.self.value": (48, 48),
    "attention.output.dense": (48, 48),
    "attention.output.LayerNorm": (48,),
    "crossattention.self.query": (48, 48),
    "crossattention.self.key": (48, 192),
    "crossattention.self.value": (48, 192),
    "crossattention.output.dense": (48, 48),
    "crossattention.output.LayerNorm": (48,),
    "intermediate.dense": (96, 48),
    "output.dense": (48, 96),
    "output.LayerNorm": (48,),
}
LAYERS = {
    "blip.visual_encoder.patch_embed.proj": (192, 3, 16, 16),
    **{f"blip.visual_encoder.blocks.{i}.{k}": v for i in range(12) for k, v in VIT_BLOCK.items()},
    "blip.visual_encoder.norm": (192,),
    "blip.text_encoder.embeddings.LayerNorm": (48,),
    **{
        f"blip.text_encoder.encoder.layer.{i}.{k}": v for i in (0, 1) for k, v in BERT_LAYER.items()
    },
    "mlp.layers.0": (1024, 48),
    "mlp.layers.2": (128, 1024),
    "mlp.layers.4": (64, 128),
    "mlp.layers.6": (16, 64),
    "mlp.layers.7": (1, 16),
}
TABLES = {
    "blip.visual_encoder.cls_token": (1, 1, 192),
    "blip.visual_encoder.pos_embed": (1, 197, 192),
    "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 48),
    "blip.text_encoder.embeddings.position_embeddings.weight": (512, 48),
}


def save_imagereward(path):
    """A random file as ImageReward.pt -> its weights. It has things that a judge does not need."""
    state = {name: 0.3 * torch.randn(shape) for name, shape in TABLES.items()}
    for name, shape in LAYERS.items():
        fan_in = math.prod(shape[1:])
        normalises = len(shape) == 1
        state[f"{name}.weight"] = torch.randn(shape) / fan_in**0.5 + normalises
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0])
    more = {
        "blip.vision_proj.bias": torch.ones(2),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
    }
    torch.save(state | more, path)
    return Weights(state)


def attention(query, key, value, heads, mask=None):
    """query (M, D), key and value (N, D) -> (M, D); only those of the N in mask are seen."""
    width = query.shape[1] // heads
    heads_out = []
    for part in range(heads):
        at = slice(part * width, (part + 1) * width)
        scores = query[:, at] @ key[:, at].T / width**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        heads_out.append(scores.softmax(1) @ value[:, at])
    return torch.cat(heads_out, 1)


def vit_by_hand(weights, image):
    """A square of pixels (3, 224, 224) -> 197 tokens (197, 192) of timm's Vision Transformer."""
    patches = image.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(196, -1)
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    h = patches @ kernel.T + weights["patch_embed.proj.bias"]
    h = torch.cat([weights["cls_token"][0], h]) + weights["pos_embed"][0]
    for i in range(12):
        block = weights.within(f"blocks.{i}.")
        query, key, value = block.linear("attn.qkv", block.norm("norm1", h, 1e-6)).chunk(3, 1)
        h = h + block.linear("attn.proj", attention(query, key, value, heads=3))
        inner = F.gelu(block.linear("mlp.fc1", block.norm("norm2", h, 1e-6)))
        h = h + block.linear("mlp.fc2", inner)
    return weights.norm("norm", h, 1e-6)


def bert_by_hand(weights, ids, mask, seen):
    """Tokens ids and mask (N,), tokens of an image (M, 192) -> (N, 48), by BLIP's text encoder.

    Each layer attends to the text, then to the image, and normalises after adding, as BERT does.
    """
    h = weights["embeddings.word_embeddings.weight"][ids]
    h = h + weights["embeddings.position_embeddings.weight"][: len(ids)]
    h = weights.norm("embeddings.LayerNorm", h, 1e-12)
    for i in range(2):
        layer = weights.within(f"encoder.layer.{i}.")
        for name, context, visible in (
            ("attention", h, mask),
            ("crossattention", seen, None),
        ):
            query = layer.linear(f"{name}.self.query", h)
            key = layer.linear(f"{name}.self.key", context)
            value = layer.linear(f"{name}.self.value", context)
            new = layer.linear(f"{name}.output.dense", attention(query, key, value, 12, visible))
            h = layer.norm(f"{name}.output.LayerNorm", h + new, 1e-12)
        inner = F.gelu(layer.linear("intermediate.dense", h))
        h = layer.norm("output.LayerNorm", h + layer.linear("output.dense", inner), 1e-12)
    return h


def central(image):
    """An image of PIL -> (3, 224, 224): its shorter side to 224, its middle, as CLIP sees it."""
    width, height = image.size
    shorter = min(width, height)
    width, height = 224 * width // shorter, 224 * height // shorter
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    image = image.crop((left, top, left + 224, top + 224))
    return torch.from_numpy((np.asarray(image) / 255 - MEAN) / STD).permute(2, 0, 1).float()


def imagereward_by_hand(weights, image, words):
    """The score of an image of PIL and of a text's words, as numbers in WORDS."""
    ids = [CLS, *words[:33], SEP]
    mask = torch.tensor([True] * len(ids) + [False] * (35 - len(ids)))
    ids = torch.tensor(ids + [PAD] * (35 - len(ids)))
    seen = vit_by_hand(weights.within("blip.visual_encoder."), central(image))
    h = bert_by_hand(weights.within("blip.text_encoder."), ids, mask, seen)[0]
    for i in (0, 2, 4, 6, 7):
        h = weights.linear(f"mlp.layers.{i}", h)
    return (h[0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def bert_words(tmp_path):
    """The folder of a tokenizer as bert-base-uncased, of few words."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_imagereward_is_its_definition(images, bert_words, tmp_path):
    """The text reads the image, its first token goes through five linear layers.

    The prompts are of unlike lengths, one with capitals and one of more than 35 tokens.
    """
    weights = save_imagereward(tmp_path / "ImageReward.pt")
    prompts = {
        "A Fox": [5, 6],
        "fox in a fox": [6, 7, 5, 6],
        "fox " * 30 + "a " * 10: [6] * 30 + [5] * 10,
    }
    wanted = []
    for image, words in zip(images[:3], prompts.values(), strict=True):
        wanted.append(imagereward_by_hand(weights, image, words))

    judge = judges.imagereward(CPU, tmp_path / "ImageReward.pt", bert_words, **VIT, **BERT)
    scores = judge(images[:3], [*prompts])

    assert_close(scores, torch.stack(wanted), rtol=1e-5, atol=2e-5)
    assert scores.std() > 0.01
    assert not scores.requires_grad


def test_imagereward_is_downloaded_from_its_authors(monkeypatch):
    asked = []

    def download(*arguments):
        asked.append(arguments)
        raise ValueError("offline")

    monkeypatch.setattr(rewards, "download", download)
    with pytest.raises(ValueError, match="offline"):
        judges.imagereward(CPU)
    assert asked == [("THUDM/ImageReward", "ImageReward.pt")]


def test_a_wrong_file_of_imagereward_is_refused(bert_words, tmp_path):
    path = tmp_path / "ImageReward.pt"
    for content in (dict(a=torch.ones(1)), [1, 2]):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"is no ImageReward.pt of THUDM/ImageReward"):
            judges.imagereward(CPU, path, bert_words, **VIT, **BERT)


def test_the_judges_are_these():
    """The keys are what --judges takes."""
    assert [*judges.JUDGES] == ["hpsv2", "pickscore", "imagereward"]
    assert all(load is getattr(judges, name) for name, load in judges.JUDGES.items())


# --------------------------------------------------------------------------------- the winning rate
def scores(wins, ties, losses):
    """Two lists of scores of which the first wins, ties and loses so often, in mixed order."""
    first = torch.tensor([2.0] * wins + [1.0] * ties + [0.5] * losses)
    other = torch.tensor([1.0] * (wins + ties) + [1.5] * losses)
    order = torch.randperm(len(first))
    return first[order], other[order]


@pytest.mark.parametrize(
    "wins, ties, losses",
    [(11, 2, 7), (0, 0, 40), (40, 0, 0), (0, 8, 0), (1, 0, 0), (0, 0, 1), (3, 0, 4)],
)
def test_the_winning_rates_interval_is_wilsons(wins, ties, losses):
    """It must hold for an image alone, and where one side has won them all. A tie counts half."""
    n = wins + ties + losses
    wanted = scipy.stats.binomtest(wins + ties // 2, n).proportion_ci(method="wilson")

    got = metrics.winning_rate(*scores(wins, ties, losses))

    assert got.keys() == {"winning_rate", "low", "high"}
    assert got["winning_rate"] == pytest.approx((wins + ties / 2) / n)
    assert (got["low"], got["high"]) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert 0 <= got["low"] <= got["high"] <= 1


def test_the_winning_rate_of_one_tie():
    """scipy counts whole wins. An end q of the interval lies z deviations of its own from p."""
    got = metrics.winning_rate(torch.zeros(1), torch.zeros(1))
    assert got["winning_rate"] == 0.5
    z = scipy.stats.norm.ppf(0.975)
    for q in (got["low"], got["high"]):
        assert abs(0.5 - q) == pytest.approx(z * math.sqrt(q * (1 - q)))


@pytest.mark.parametrize("shape, other", [((0,), (0,)), ((2,), (3,)), ((2,), (1,)), ((), ())])
def test_a_winning_rate_needs_a_pair_of_scores_an_image(shape, other):
    with pytest.raises(ValueError, match="scores of shapes"):
        metrics.winning_rate(torch.zeros(shape), torch.zeros(other))


# ---------------------------------------------------------------------------------- random networks
MAKERS = dict(sdxl=tiny.sdxl_pipeline, sd15=tiny.sd15_pipeline)


def networks_of(pipe):
    """The networks of a pipeline, by name."""
    return {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_tiny_pipelines_draw(make):
    """They are diffusers' own, frozen, and what they draw depends on the prompt."""
    pipe = make("tiny")
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for prompt in ("a fox", "an owl"):
        noise = torch.Generator().manual_seed(0)
        out = pipe(prompt, num_inference_steps=2, output_type="pt", generator=noise)
        drawn.append(out.images)

    assert drawn[0].shape == (1, 3, 64, 64)
    assert not drawn[0].equal(drawn[1])
    for net in networks_of(pipe).values():
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())


def test_pipelines_are_those_of_their_models():
    """sdxl.py tells them apart by class and by the UNet's conditions, and scales their latents."""
    pipes = [make("tiny") for make in MAKERS.values()]

    assert [type(pipe) for pipe in pipes] == [
        diffusers.StableDiffusionXLPipeline,
        diffusers.StableDiffusionPipeline,
    ]
    added = [pipe.unet.config.addition_embed_type for pipe in pipes]
    assert added == ["text_time", None]
    assert ["text_encoder_2" in pipe.components for pipe in pipes] == [True, False]
    assert [pipe.vae.config.scaling_factor for pipe in pipes] == [0.13025, 0.18215]

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for pipe in pipes:
        levels = pipe.scheduler.alphas_cumprod.double()
        assert_close(levels, (1 - betas).cumprod(0), rtol=1e-4, atol=0)
        assert pipe.scheduler.config.prediction_type == "epsilon"


def test_full_networks_have_the_true_number_of_weights():
    """SDXL's own, and ViT-H/14's. On the meta device they need no memory.

    What their number does not tell is asked for by name. The noise levels lie on the CPU, where a
    pipeline of files has them.
    """
    with torch.device("meta"):
        pipe = tiny.sdxl_pipeline("full")
        hps = tiny.hpsv2("full")

    nets = networks_of(pipe) | dict(hps=hps)
    assert {k: sum(p.numel() for p in net.parameters()) for k, net in nets.items()} == dict(
        unet=2_567_463_684,
        vae=83_653_863,
        text_encoder=123_060_480,
        text_encoder_2=694_659_840,
        hps=986_109_441,
    )
    assert pipe.unet.config.attention_head_dim == (5, 10, 20)
    assert pipe.unet.config.use_linear_projection
    assert pipe.text_encoder.config.hidden_act == "quick_gelu"
    assert pipe.text_encoder_2.config.hidden_act == "gelu"
    devices = {p.device.type for net in nets.values() for p in net.parameters()}
    assert devices == {"meta"}
    assert pipe.scheduler.alphas_cumprod.device == CPU


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_are_made_in_the_default_dtype(monkeypatch, dtype):
    """In half, full ones need half the memory at first. The noise levels stay in float32."""
    torch.set_default_dtype(dtype)
    try:
        pipe = tiny.sdxl_pipeline("tiny")
        hps = tiny.hpsv2("tiny")
    finally:
        torch.set_default_dtype(torch.float32)

    nets = [*networks_of(pipe).values(), hps]
    assert {p.dtype for net in nets for p in net.parameters()} == {dtype}
    assert pipe.scheduler.alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("make", [*MAKERS.values(), tiny.hpsv2], ids=[*MAKERS, "hpsv2"])
def test_libraries_are_imported_on_the_cpu(monkeypatch, make):
    """They make tensors when they are imported, which must not lie on the device of a network.

    They may be imported already, but Python calls __import__ all the same.
    """
    devices = {}
    python_import = builtins.__import__

    def note(name, scope=None, *arguments):
        of_tiny = scope is not None and scope["__name__"] == tiny.__name__
        if of_tiny and name in ("diffusers", "transformers", "open_clip"):
            devices.setdefault(name, set()).add(torch.empty(0).device.type)
        return python_import(name, scope, *arguments)

    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(builtins, "__import__", note)
        made = make("tiny")

    assert "open_clip" in devices
    assert set.union(*devices.values()) == {"cpu"}
    net = made if make is tiny.hpsv2 else made.unet
    assert next(net.parameters()).device.type == "meta"
