"""VideoAlign's VideoReward (arXiv 2501.13918): what students are trained on and judged by.

    rate = load_videoalign(device)
    vq, mq, ta = rate(frames, "a red fox runs")  # of uint8 frames (T, 3, H, W), 16 a second

VQ is the quality of its pictures, MQ that of its motion, and TA how well it fits the prompt. It is
Qwen2-VL-2B with a LoRA, which reads the video and a text that asks for the three. Behind each of
the three questions stands a mark, a token of its own, and a linear head scores what is there. The
first two marks come before the prompt, so VQ and MQ do not depend on it.
"""

import ast
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import torch
from torch import Tensor, nn

import running
from parts.sit import read_file

if TYPE_CHECKING:
    from transformers import Qwen2VLModel, Qwen2VLProcessor

SCORES = ("vq", "mq", "ta")
MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
ZSCORE = {  # what model_config.json has as its inference_config
    "VQ_mean": 3.6757,
    "VQ_std": 2.2476,
    "MQ_mean": 1.1646,
    "MQ_std": 1.3811,
    "TA_mean": 2.8105,
    "TA_std": 2.5121,
}
FPS = 2.0  # frames a second that it sees
PIXELS = 200_704  # of a frame, at most
LEAST_PIXELS = 100_352  # 128 patches of 28 x 28

REPO = "KwaiVGI/VideoReward"
TEMPLATE_FILE = "prompt_template.py"
TEMPLATE = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
CODE = (
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/219ab9db64c045e5181a2202d11f686439351292"
)


# -------------------------------------------------------------------------------------- the network
class VideoAlign(nn.Module):
    """VideoReward of a Qwen2-VL without its language head.

    net        the network, whose embedding has a row for each of MARKS (see add_marks)
    processor  what makes its inputs, whose tokenizer knows MARKS
    head       (1, D) for all marks alike, or (3, D) with a row for each
    template   the text that asks for the scores, with MARKS in it and {text_prompt}
    zscore     mean and standard deviation of the scores, by the names that ZSCORE has
    fps, most  the frames a second and the pixels of a frame that it sees (see watch)

    The network computes in the type of its weights, the head in float32.
    """

    def __init__(
        self,
        net: "Qwen2VLModel",
        processor: "Qwen2VLProcessor",
        head: Tensor,
        template: str,
        zscore: dict[str, float] = ZSCORE,
        fps: float = FPS,
        most: int = PIXELS,
    ):
        super().__init__()
        self.net = net
        self.processor = processor
        self.template = template
        self.fps = fps
        self.most = most
        marks = processor.tokenizer.convert_tokens_to_ids(list(MARKS))
        mean = [zscore[f"{score.upper()}_mean"] for score in SCORES]
        std = [zscore[f"{score.upper()}_std"] for score in SCORES]
        self.register_buffer("head", head.float())
        self.register_buffer("marks", torch.tensor(marks), persistent=False)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def forward(self, frames: Tensor, prompt: str, fps: float = 16.0) -> Tensor:
        """SCORES (3,), normalised, in float32, of frames (T, 3, H, W) uint8 shown at fps.

        ValueError: there is one frame only.
        """
        seen = watch(frames, fps, self.fps, self.most)
        inputs = self.processor(
            text=[self.question(prompt)],
            videos=[seen],
            do_resize=False,
            do_sample_frames=False,
            return_tensors="pt",
        ).to(self.head.device)
        ids = inputs["input_ids"]

        # Tokens are counted in a row, not by M-RoPE: VideoAlign was trained with transformers 4.45,
        # which did so.
        places = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        h = self.net(**inputs, position_ids=places).last_hidden_state[0]
        logits = h[torch.isin(ids[0], self.marks)].float() @ self.head.T  # (3, 1) or (3, 3)
        scores = logits[:, 0] if len(self.head) == 1 else logits.diagonal()
        return (scores - self.mean) / self.std

    def question(self, prompt: str) -> str:
        """The text that goes with a video of a prompt, with a place for the video.

        Words of a prompt that the tokenizer has for itself, as MARKS, are left out.
        """
        for word in self.processor.tokenizer.get_added_vocab():
            prompt = prompt.replace(word, "")
        text = self.template.format(text_prompt=prompt)
        content = [dict(type="video"), dict(type="text", text=text)]
        return self.processor.apply_chat_template(
            [dict(role="user", content=content)], tokenize=False, add_generation_prompt=True
        )


def add_marks(net: "Qwen2VLModel", processor: "Qwen2VLProcessor") -> None:
    """Make MARKS tokens of a Qwen2-VL, whose embedding gets a row for each."""
    processor.tokenizer.add_tokens(list(MARKS), special_tokens=True)
    net.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)


def watch(frames: Tensor, fps_of_video: float, fps: float = FPS, most: int = PIXELS) -> Tensor:
    """What VideoAlign sees of frames (T, 3, H, W) uint8, which are shown at fps_of_video.

    It returns (n, 3, h, w) uint8. The n frames are spread evenly from the first to the last, as
    many as make fps. n is even, because Qwen2-VL takes frames in pairs; it is at least 4, if there
    are so many, and at most 768. h and w are multiples of 28, in nearly the ratio of H and W, with
    100,352 to `most` pixels. ValueError: there is one frame only.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize  # v2 rounds uint8 to other pixels
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    total = len(frames)
    running.require(
        total >= 2, "VideoAlign rates motion, and there is one frame: give a video of 2 or more"
    )
    wanted = max(total / fps_of_video * fps, 4)
    n = 2 * round(min(wanted, min(total, 768) // 2 * 2) / 2)
    places = torch.linspace(0, total - 1, n).round().long()
    size = smart_resize(*frames.shape[2:], 28, LEAST_PIXELS, most)
    return resize(frames[places], list(size), InterpolationMode.BICUBIC, antialias=True)


# ----------------------------------------------------------------------------------- official files
def load_videoalign(device: torch.device, folder: Path | None = None) -> VideoAlign:
    """VideoReward with its official weights, frozen, on a device, in bfloat16 on a GPU.

    folder has its files as huggingface.co/KwaiVGI/VideoReward has them. Without one they are
    downloaded at first, and kept where the hub's files always are; Qwen2-VL, to which they are an
    addition, is downloaded likewise. ValueError, in one line: a file is missing, or is another's,
    or cannot be downloaded.
    """
    if folder is None:
        folder = download()
    spec = read_spec(folder)
    template = read_template(folder)
    net, processor = load_qwen(spec["model_config"]["model_name_or_path"])
    add_marks(net, processor)
    checkpoint = newest(folder)
    try:
        head = fill(net, checkpoint, spec["peft_lora_config"]["lora_alpha"])
    except Exception as error:  # files of other kinds fail in as many ways
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint} is no checkpoint of {REPO} ({reason:.200}): download it again"
        ) from error

    data = spec.get("data_config") or {}
    rate = VideoAlign(
        net.to(running.half(device)),
        processor,
        head,
        template,
        zscore=ZSCORE | (spec.get("inference_config") or {}),
        fps=data.get("fps", FPS),
        most=data.get("max_frame_pixels", PIXELS),
    )
    return rate.to(device).eval().requires_grad_(False)


def download() -> Path:
    """The folder of REPO, from the hub's cache, or downloaded to it.

    ValueError: it must be downloaded, and the hub is not to be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(REPO))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"huggingface.co/{REPO} is not in the cache, and this machine is offline:"
            " download it once with a connection"
        ) from error


def read_spec(folder: Path) -> dict:
    """model_config.json of a folder. ValueError: there is none, or it lacks what we need of it."""
    path = folder / "model_config.json"
    running.require(path.is_file(), f"{folder} has no {path.name}: give the folder of {REPO}")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        running.require(spec["model_config"]["model_name_or_path"], "no model_name_or_path")
        running.require(spec["peft_lora_config"]["lora_alpha"], "no lora_alpha")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is none of {REPO} ({error!s:.100}): download it again") from error
    return spec


def read_template(folder: Path) -> str:
    """The text that asks for the scores, of prompt_template.py of VideoAlign's code.

    It is read from the folder if it is there, else from GitHub, and is not run. ValueError: GitHub
    is not to be reached, or there is no such text in the file.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file():
        code = path.read_bytes()
    else:
        url = f"{CODE}/{TEMPLATE_FILE}"
        try:
            with urlopen(url, timeout=60) as answer:
                code = answer.read()
        except OSError as error:
            raise ValueError(
                f"{TEMPLATE_FILE} is not in {folder}, and this machine is offline: put {url} there"
            ) from error

    text = constant(code, TEMPLATE)
    running.require(
        text and all(word in text for word in (*MARKS, "{text_prompt}")),
        f"{path} has no {TEMPLATE} with {', '.join(MARKS)} and {{text_prompt}}:"
        f" take {CODE}/{TEMPLATE_FILE}",
    )
    return text


def constant(code: bytes, name: str) -> str | None:
    """The text that Python code assigns to a name at its top level; None if it does not."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError):
        return None
    for node in statements:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if name in names and isinstance(node.value.value, str):
                return node.value.value
    return None


def load_qwen(base: str) -> tuple["Qwen2VLModel", "Qwen2VLProcessor"]:
    """Qwen2-VL without its language head, in float32, and its processor.

    base is a folder or a repository of transformers. ValueError: it cannot be loaded.
    """
    from transformers import AutoProcessor, Qwen2VLModel

    try:
        net = Qwen2VLModel.from_pretrained(base, dtype=torch.float32)
        return net, AutoProcessor.from_pretrained(base)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{base}, on which VideoReward stands, cannot be loaded ({reason:.150}):"
            " download it once with a connection"
        ) from error


def newest(folder: Path) -> Path:
    """The checkpoint-N of a folder with the greatest N, or the folder itself if there is none."""
    steps = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            steps[int(step)] = path
    return steps[max(steps)] if steps else folder


def fill(net: "Qwen2VLModel", checkpoint: Path, alpha: float) -> Tensor:
    """Give net the weights of a checkpoint, with the LoRA added -> the head (1 or 3, D).

    A checkpoint is model.pth, which has all weights, or else non_lora_state_dict.pth, which has
    those that were trained, and the LoRA in adapter_model.safetensors. alpha is the LoRA's.
    ValueError, with the key: one is not net's, or of another shape, or is missing.
    """
    whole = (checkpoint / "model.pth").is_file()
    files = ["model.pth"] if whole else ["non_lora_state_dict.pth", "adapter_model.safetensors"]
    state = {}
    for file in files:
        for key, v in read_file(checkpoint / file).items():
            state[name_of(key)] = v.float()

    own = net.state_dict()
    add_lora(state, own, alpha)
    head = state.pop("rm_head.weight", None)
    state.pop("lm_head.weight", None)  # Qwen2-VL's, which is not used
    width = net.config.text_config.hidden_size
    running.require(head is not None, "it lacks rm_head.weight")
    running.require(
        head.shape in ((1, width), (3, width)),
        f"rm_head.weight is {[*head.shape]}, not 1 or 3 rows of {width}",
    )
    for key, v in state.items():
        running.require(key in own, f"its {key} is none of Qwen2-VL")
        shape = [*own[key].shape]
        running.require(
            shape == [*v.shape], f"its {key} is {[*v.shape]}, and that of Qwen2-VL {shape}"
        )
    lost = [key for key in own if key not in state]
    running.require(not whole or not lost, f"it lacks {', '.join(lost[:1])}")
    net.load_state_dict(own | state)
    return head


def name_of(key: str) -> str:
    """The name that today's transformers has in Qwen2VLModel for a key of a checkpoint.

    peft puts base_model.model before all, and base_layer and default into layers with a LoRA. Old
    versions of transformers, such as VideoAlign's 4.45, have model.layers and visual.blocks where
    the new ones have model.language_model.layers and model.visual.blocks.
    """
    key = re.sub(r"\.(default|base_layer)(?=\.)", "", key)
    key = key.removeprefix("base_model.model.").removeprefix("model.")
    if key.startswith(("language_model.", "visual.", "rm_head.", "lm_head.")):
        return key
    return f"language_model.{key}"


def add_lora(state: dict[str, Tensor], own: dict[str, Tensor], alpha: float) -> None:
    """Replace each LoRA in state, its lora_A and lora_B, by the weight with alpha / rank B A added.

    The weight is that of state, or else the network's own. ValueError, with the key: there is none
    that the LoRA could be added to, or it has no B.
    """
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        key_of_up = key.replace("lora_A", "lora_B")
        target = key.replace("lora_A.", "")
        running.require(key_of_up in state, f"it lacks {key_of_up}")
        running.require(target in state or target in own, f"its {key} is none of Qwen2-VL")
        down = state.pop(key)
        up = state.pop(key_of_up)
        weight = state[target] if target in state else own[target]
        scale = alpha / len(down)
        state[target] = weight + scale * up @ down
