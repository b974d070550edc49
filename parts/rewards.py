"""Rewards that students are trained on: DINOv2's linear classifier of ImageNet, and HPSv2.

A reward is a function of latents x and of what they are of, here classes y:

    classify = load_dinov2(device)
    reward = class_reward(classify, decode)  # decode: latents -> images in [-1, 1]
    r = reward(x, y)  # log p(class y | image of x), (B,)

HPSv2 scores images of prompts:

    hps = load_hpsv2(device)
    text = hps.text(prompts)  # (B, D), once a prompt
    r = hps(square(images), text)  # (B,), of images (B, 3, H, W) in [0, 1]
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import running

NETWORK = "vit_large_patch14_dinov2.lvd142m"  # of timm
HEAD = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_linear4_head.pth"
LAYERS = 4  # whose CLS tokens the head sees
CHUNK = 16  # images that are decoded at a time
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue
STD = (0.229, 0.224, 0.225)

CLIP = "ViT-H-14"  # of open_clip, as HPSv2 has it
HPS_REPO = "xswu/HPSv2"
HPS_FILE = "HPS_v2.1_compressed.pt"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of all networks that came from CLIP
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# -------------------------------------------------------------------------------- reward of a class
def log_p(logits: Tensor, y: Tensor) -> Tensor:
    """log p(y) of a classifier: logits (B, classes), classes y (B,) -> (B,), in float32."""
    return logits.float().log_softmax(1).gather(1, y[:, None])[:, 0]


def class_reward(
    classify: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The reward (x (B, ...), y (B,)) -> log p(y | image of x) (B,), as DMDR has it.

    decode makes images (B, 3, H, W) of latents, in [-1, 1] and a little beyond; they are clamped.
    classify takes them in [0, 1] and returns logits (B, classes). Both run in bfloat16 on a GPU.

    The reward has a gradient where x requires one. Sixteen images are decoded at a time. For a
    gradient they are decoded again in the backward pass, so no more than sixteen images'
    activations are ever held: at 256 pixels a decoder's are by far the largest of a run.
    """

    def score(x: Tensor, y: Tensor) -> Tensor:
        with running.autocast(x):
            image = (decode(x) + 1) / 2
            return log_p(classify(image.clamp(0, 1)), y)

    return partial(by_parts, score, CHUNK)


def by_parts(f: Callable[..., Tensor], size: int, x: Tensor, *more: Tensor) -> Tensor:
    """f(x, *more) for `size` samples at a time, all (B, ...) -> its results, (B, ...).

    Where x requires a gradient, each part is computed again in the backward pass. So what f holds
    is held for one part only, such as a decoder's activations.
    """
    again = x.requires_grad and torch.is_grad_enabled()
    call = partial(checkpoint, f, use_reentrant=False) if again else f
    parts = zip(*[v.split(size) for v in (x, *more)], strict=True)
    return torch.cat([call(*part) for part in parts])


# ------------------------------------------------------------------------------------------- DINOv2
class DINOv2Classifier(nn.Module):
    """dinov2_vitl14_lc of github.com/facebookresearch/dinov2, from timm's network.

    net is a Vision Transformer of timm for DINOv2's files, of any width, with positions for 37 x 37
    patches; they are resized in it. head is the linear classifier, whose input is the CLS token of
    each of the last four layers and the mean of the last layer's patches, (B, 5 width).

    images (B, 3, H, W) in [0, 1] -> logits (B, classes).
    """

    def __init__(self, net: nn.Module, head: nn.Linear):
        super().__init__()
        positions = resized(net.pos_embed.detach())
        net.set_input_size(224)  # timm resizes the positions in a way of its own
        net.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.net = net
        self.head = head
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = (images - self.mean) / self.std
        images = F.interpolate(images, (224, 224), mode="bicubic", antialias=True)
        layers = self.net.get_intermediate_layers(
            images, n=LAYERS, norm=True, return_prefix_tokens=True
        )
        _, cls_tokens = zip(*layers, strict=True)
        patches, _ = layers[-1]
        seen = [tokens[:, 0] for tokens in cls_tokens] + [patches.mean(1)]
        return self.head(torch.cat(seen, 1))


def resized(positions: Tensor) -> Tensor:
    """Positions (1, 1 + 37 * 37, width) for images of 518 pixels -> (1, 1 + 16 * 16, width).

    The first is of the CLS token. DINOv2 gives bicubic interpolation the scale (16 + .1) / 37, and
    its sampling points are of that scale, not of 16 / 37.
    """
    first, grid = positions[:, :1], positions[:, 1:]
    grid = grid.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")
    return torch.cat([first, grid.flatten(2).mT], 1)


def load_dinov2(device: torch.device | str = "cpu") -> DINOv2Classifier:
    """The classifier with its official weights, frozen, on a device.

    timm and torch.hub download them at first (1.2 GB), and keep them where they always do.
    """
    import timm

    net = timm.create_model(NETWORK, pretrained=True, num_classes=0)
    head = nn.Linear((LAYERS + 1) * net.embed_dim, 1000)
    state = torch.hub.load_state_dict_from_url(HEAD, map_location="cpu", weights_only=True)
    head.load_state_dict(state)
    return DINOv2Classifier(net, head).to(device).eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------- HPSv2
class HPSv2(nn.Module):
    """HPSv2 (arXiv 2306.09341), a CLIP that was tuned on which image of a prompt people prefer.

    clip is one of open_clip, which reads CLIP's own tokens. A score is 100 times the cosine of an
    image's features and a text's, without CLIP's logit scale: some 31 in the paper's tables.

    On a GPU it computes in float16, as its authors do, and in bfloat16 where images require a
    gradient, whose range float16 has not. Features are normalised in float32.
    """

    def __init__(self, clip: nn.Module):
        from open_clip import get_tokenizer

        super().__init__()
        self.clip = clip
        self.text_nets = (clip.token_embedding, clip.transformer)  # what an image has no need of
        self.tokenize = get_tokenizer(CLIP)

    def text(self, prompts: list[str]) -> Tensor:
        """Features (B, D) of prompts, of length 1. What is beyond 77 tokens is not read."""
        tokens = self.tokenize(prompts).to(self.clip.logit_scale.device)
        return self.features(self.clip.encode_text, tokens)

    def image(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, 224, 224) as `square` makes them, of length 1."""
        return self.features(self.clip.encode_image, images)

    def features(self, encode: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """What encode makes of v, in half precision on a GPU, of length 1."""
        dtype = torch.bfloat16 if v.requires_grad else torch.float16
        with torch.autocast(v.device.type, dtype, enabled=v.is_cuda):
            features = encode(v)
        return F.normalize(features.float(), dim=1)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """The scores (B,) of images as `square` makes them, and of features of `text` (B, D)."""
        return 100 * (self.image(images) * text).sum(1)


def square(images: Tensor, size: int = 224) -> Tensor:
    """HPSv2's preprocessing: images (B, 3, H, W) in [0, 1] -> (B, 3, size, size).

    The longer side becomes size, the rest is black, and CLIP's mean and deviation are taken out.
    It resizes tensors, by today's antialiased bicubic interpolation.
    """
    height, width = images.shape[2:]
    longer = max(height, width)
    if longer != size:
        height, width = round(height * size / longer), round(width * size / longer)
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    images = F.pad(images, (left, size - width - left, top, size - height - top))
    channels = zip(images.unbind(1), CLIP_MEAN, CLIP_STD, strict=True)
    # by numbers: tensors of them would be copied to the GPU in each call
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


def load_hpsv2(device: torch.device, file: Path | None = None) -> HPSv2:
    """HPSv2 of version 2.1 with its official weights, frozen, on a device.

    file is HPS_v2.1_compressed.pt. Without one it is downloaded at first, and kept where the hub's
    files always are. ValueError: it is another file, or it cannot be downloaded.
    """
    import open_clip

    path = download(HPS_REPO, HPS_FILE) if file is None else file
    precision = "fp16" if device.type == "cuda" else "fp32"
    try:
        clip = open_clip.create_model(CLIP, str(path), precision=precision)
    except Exception as error:  # open_clip has errors of all kinds for files that it cannot use
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no {HPS_FILE} of {HPS_REPO} ({reason:.150})") from error
    return HPSv2(clip).to(device).eval().requires_grad_(False)


def download(repo: str, name: str) -> Path:
    """A file of a repository of huggingface.co, from the cache, or downloaded to it.

    ValueError: it must be downloaded, and the hub is not to be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(repo, name))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"{name} of huggingface.co/{repo} is not in the cache, and this machine is offline:"
            " download it once with a connection"
        ) from error
