"""Judges of images: HPSv2, on which students are trained, and two on which none is.

    judge = JUDGES["imagereward"](device)
    scores = judge(images, prompts)  # images of PIL in RGB, as many texts -> (B,)

Each scores as its authors do, so numbers compare with theirs. Papers print ImageReward's x 100.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from parts import rewards
from parts.images import to_square, to_tensor

Judge = Callable[[list[Image], list[str]], Tensor]

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
IMAGEREWARD_REPO = "THUDM/ImageReward"
IMAGEREWARD_FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of ImageReward's raw scores


# -------------------------------------------------------------------------------------------- HPSv2
def hpsv2(device: torch.device, net: rewards.HPSv2 | None = None) -> Judge:
    """HPSv2 x 100: net, or version 2.1 with its official weights."""
    net = rewards.load_hpsv2(device) if net is None else net
    view = to_tensor()

    @torch.no_grad()
    def judge(images: list[Image], prompts: list[str]) -> Tensor:
        squares = [rewards.square(view(image)[None].to(device)) for image in images]
        return net(torch.cat(squares), net.text(prompts))

    return judge


# ---------------------------------------------------------------------------------------- PickScore
def pickscore(
    device: torch.device,
    name: str | Path = PICKSCORE,
    processor: str | Path = PICKSCORE_PROCESSOR,
) -> Judge:
    """PickScore (arXiv 2305.01569): exp(logit scale) times the cosine of a CLIP's features.

    name and processor are folders or repositories of transformers, by default the official ones,
    which are downloaded at first. What is beyond 77 tokens of a prompt is not read.
    """
    from transformers import AutoModel, AutoProcessor

    net = AutoModel.from_pretrained(name).to(device).eval()
    read = AutoProcessor.from_pretrained(processor)

    @torch.no_grad()
    def judge(images: list[Image], prompts: list[str]) -> Tensor:
        inputs = read(
            images=images, text=prompts, padding=True, truncation=True, return_tensors="pt"
        )
        seen = net(**inputs.to(device))
        cosine = (seen.image_embeds * seen.text_embeds).sum(1)  # transformers normalises them
        return net.logit_scale.exp() * cosine

    return judge


# -------------------------------------------------------------------------------------- ImageReward
class ImageReward(nn.Module):
    """ImageReward-v1.0 (arXiv 2304.05977): BLIP, whose text reads the image, and an MLP.

    vit is the name of a Vision Transformer of timm. bert has the sizes of the text's encoder, by
    default BERT's base. Keys are those of ImageReward.pt, so its state dict needs no map.
    """

    def __init__(self, vit: str, **bert: int):
        import timm
        from transformers import BlipTextConfig
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        image = timm.create_model(vit, num_classes=0)
        sizes = dict(num_attention_heads=12) | bert
        config = BlipTextConfig(encoder_hidden_size=image.embed_dim, **sizes)
        text = BlipTextModel(config, add_pooling_layer=False)
        self.blip = nn.ModuleDict(dict(visual_encoder=image, text_encoder=text))
        layers = nn.Sequential(
            nn.Linear(config.hidden_size, 1024),
            nn.Identity(),  # these are dropout in training, and hold places 1, 3 and 5 in the keys
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
        self.mlp = nn.ModuleDict(dict(layers=layers))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """images (B, 3, 224, 224), tokens and their mask (B, N) -> scores (B,)."""
        seen = self.blip["visual_encoder"].forward_features(images)
        read = self.blip["text_encoder"](ids, mask, encoder_hidden_states=seen, is_decoder=False)
        first = read.last_hidden_state[:, 0]
        raw = self.mlp["layers"](first)[:, 0]
        return (raw - MEAN) / STD


def imagereward(
    device: torch.device,
    file: Path | None = None,
    tokenizer: str | Path = "bert-base-uncased",
    vit: str = "vit_large_patch16_224",
    **bert: int,
) -> Judge:
    """ImageReward-v1.0, whose scores have the mean 0 and the deviation 1 on its authors' images.

    file is ImageReward.pt. Without one it is downloaded at first, and so is the tokenizer, which is
    a folder or a repository of transformers. vit and bert are as the class ImageReward has them.
    What is beyond 35 tokens of a prompt is not read. ValueError: it is another file, or it cannot
    be downloaded.
    """
    from transformers import AutoTokenizer

    path = rewards.download(IMAGEREWARD_REPO, IMAGEREWARD_FILE) if file is None else file
    net = ImageReward(vit, **bert)
    try:
        state = torch.load(path, "cpu", weights_only=True)
        net.load_state_dict({k: state[k] for k in net.state_dict()})
    except Exception as error:  # a file of another kind fails in as many ways
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no {IMAGEREWARD_FILE} of {IMAGEREWARD_REPO} ({reason:.150})"
        ) from error
    net.to(device).eval().requires_grad_(False)
    read = AutoTokenizer.from_pretrained(tokenizer)
    view = to_square(224, rewards.CLIP_MEAN, rewards.CLIP_STD)

    @torch.no_grad()
    def judge(images: list[Image], prompts: list[str]) -> Tensor:
        words = read(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(device)
        squares = torch.stack([view(image) for image in images]).to(device)
        return net(squares, words.input_ids, words.attention_mask)

    return judge


JUDGES: dict[str, Callable[..., Judge]] = {
    "hpsv2": hpsv2,
    "pickscore": pickscore,
    "imagereward": imagereward,
}
