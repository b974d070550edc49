"""parts/videoalign.py and its random one of parts/tiny.py: scores, what is seen, official files.

The files are those that VideoAlign's authors write, of a tiny Qwen2-VL with random weights, and the
scores are computed by hand, by their steps.
"""

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.transforms import functional as V
from transformers import Qwen2VLForConditionalGeneration

import running
from helpers import CPU
from parts import tiny, videoalign

torch.set_num_threads(1)  # the networks are small

MARKS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
ASKED = "Rate.\n{}\n{} - {{text_prompt}}\n{}\n".format(*MARKS)
ZSCORE = dict(VQ=(1.0, 2.0), MQ=(0.5, 4.0), TA=(0.0, 0.5))  # mean, standard deviation
RANK, ALPHA = 2, 6


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


# ------------------------------------------------------------------------------- its authors' files
@dataclass
class Official:
    """A VideoReward in its authors' files, and what is in them."""

    folder: Path
    net: nn.Module  # with peft's LoRA in it
    processor: object
    head: Tensor

    @property
    def checkpoint(self):
        return self.folder / "checkpoint-11352"

    def scores(self, frames, places, size, prompt):
        """VQ, MQ, TA (3,), normalised, of these places of the frames, resized to size.

        Tokens are counted in a row, as transformers 4.45, with which it was trained, did where it
        was given no positions.
        """
        video = V.resize(frames[places], size, V.InterpolationMode.BICUBIC)
        content = [dict(type="video"), dict(type="text", text=ASKED.format(text_prompt=prompt))]
        chat = [dict(role="user", content=content)]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        c = self.processor(
            text=[text],
            videos=[video],
            do_resize=False,
            do_sample_frames=False,
            return_tensors="pt",
        )

        ids = c["input_ids"]
        h = self.net.get_input_embeddings()(ids)
        seen = self.net.visual(c["pixel_values_videos"], c["video_grid_thw"])
        h[ids == self.net.config.video_token_id] = seen.pooler_output
        row = torch.arange(ids.shape[1]).expand(3, 1, -1)
        h = self.net.language_model(inputs_embeds=h, position_ids=row).last_hidden_state[0]

        scores = []
        for i, (mark, (mean, std)) in enumerate(zip(MARKS, ZSCORE.values(), strict=True)):
            at = ids[0] == self.processor.tokenizer.convert_tokens_to_ids(mark)
            logits = h[at][0] @ self.head.T
            scores.append((logits[i % len(self.head)] - mean) / std)
        return torch.stack(scores)


def write_official(folder, rows, names, whole):
    """A VideoReward at random, in its authors' files.

    rows is the number of the head's. names are "old", those of transformers 4.45, or "new", those
    of today. If it is whole, all weights are in model.pth, the LoRA beside the rest. Else the LoRA
    is in a file, what else was trained is in another, and the rest are Qwen2-VL's.
    """
    model, processor = tiny.qwen2vl("tiny")
    base = Qwen2VLForConditionalGeneration(model.config)
    randomise(base)
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")

    processor.tokenizer.add_special_tokens(dict(additional_special_tokens=MARKS))
    base.resize_token_embeddings(len(processor.tokenizer))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "up_proj"])
    net = inject_adapter_in_model(lora, base.model).eval()
    head = torch.randn(rows, 32)
    for name, p in net.named_parameters():
        if whole or is_lora(name) or is_trained(name):
            p.data.normal_(0, 0.2)
    official = Official(folder, net, processor, head)
    official.checkpoint.mkdir()

    if whole:
        state = keyed(net.state_dict(), names) | of_heads(head)
        torch.save(state, official.checkpoint / "model.pth")
    else:
        state = net.state_dict()
        trained = {k: v for k, v in state.items() if is_trained(k)}
        torch.save(
            keyed(trained, names) | of_heads(head), official.checkpoint / "non_lora_state_dict.pth"
        )
        lora = {k.replace(".default", ""): v for k, v in state.items() if is_lora(k)}
        save_file(keyed(lora, names), official.checkpoint / "adapter_model.safetensors")

    code = f"A = 1\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {ASKED!r}\n"
    (folder / "prompt_template.py").write_text(code)
    config = dict(
        model_config=dict(model_name_or_path=str(folder / "base")),
        data_config=dict(fps=2.0, max_frame_pixels=200_704),
        peft_lora_config=dict(lora_r=RANK, lora_alpha=ALPHA),
        inference_config={f"{k}_mean": mean for k, (mean, _) in ZSCORE.items()}
        | {f"{k}_std": std for k, (_, std) in ZSCORE.items()},
    )
    (folder / "model_config.json").write_text(json.dumps(config))
    return official


def randomise(net):
    """Give all weights a size at which each of them matters."""
    for p in net.parameters():
        p.data.normal_(0, 0.2)


def is_lora(name):
    """Is it half of a LoRA?"""
    return ".lora_" in name


def is_trained(name):
    """What VideoAlign trains beside the LoRA: the eye, and the embedding, for its new tokens."""
    return name.startswith("visual.") or "embed_tokens" in name


def keyed(state, names):
    """A state of Qwen2VLModel by the keys of a checkpoint, as contiguous tensors."""
    keys = {}
    for k, v in state.items():
        key = f"model.{k}"
        if names == "old":
            key = k.replace("language_model.", "model.")
        keys[f"base_model.model.{key}"] = v.contiguous()
    return keys


def of_heads(head):
    """Both heads by a checkpoint's keys. The language's is not used."""
    unused = torch.randn(2, 32)
    return {
        "base_model.model.rm_head.weight": head,
        "base_model.model.lm_head.weight": unused,
    }


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """One of one row, in new names and in one file. Tests that spoil it link what they leave."""
    torch.manual_seed(0)
    return write_official(tmp_path_factory.mktemp("official"), 1, "new", whole=True)


@pytest.fixture
def parts(tmp_path):
    """One in two files."""
    (tmp_path / "parts").mkdir()
    return write_official(tmp_path / "parts", 3, "new", whole=False)


def linked(official, folder):
    """A folder with the official files, where each may be replaced by another."""
    for path in official.folder.rglob("*"):
        if path.is_file():
            copied = folder / path.relative_to(official.folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.symlink_to(path)
    return Official(folder, official.net, official.processor, official.head)


@pytest.fixture
def copied(official, tmp_path):
    """The official folder, to be spoilt."""
    return linked(official, tmp_path / "copied")


def replace(path, text):
    """Put another text file in the place of a link."""
    path.unlink()
    path.write_text(text)


# ------------------------------------------------------------------------------------------- scores
def video(count=81, height=240, width=416):
    """Frames of noise."""
    return torch.randint(256, (count, 3, height, width)).byte()


@pytest.mark.parametrize("whole", [True, False], ids=["model.pth", "two files"])
@pytest.mark.parametrize("rows, names", [(1, "old"), (3, "new")])
@torch.no_grad()
def test_videoalign_is_its_definition(tmp_path, rows, names, whole):
    """Read from its authors' files it gives the scores of their steps, done by hand.

    The video has 5 seconds at 16 frames a second, and 3.4 at 24. VQ and MQ do not see the prompt,
    whose words come after their marks.
    """
    official = write_official(tmp_path, rows, names, whole)
    frames = video()
    at_16 = [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    at_24 = [0, 16, 32, 48, 64, 80]
    size = [252, 420]

    rate = videoalign.load_videoalign(CPU, tmp_path)

    fox = official.scores(frames, at_16, size, "a fox")
    owl = official.scores(frames, at_16, size, "an owl")
    faster = official.scores(frames, at_24, size, "a fox")
    assert_close(rate(frames, "a fox"), fox, rtol=1e-5, atol=1e-5)
    assert_close(rate(frames, "an owl"), owl, rtol=1e-5, atol=1e-5)
    assert_close(rate(frames, "a fox", fps=24.0), faster, rtol=1e-5, atol=1e-5)
    assert fox[:2].equal(owl[:2])
    assert fox[2] != owl[2]
    assert (fox - faster).abs().max() > 1e-2


def test_a_prompt_may_have_braces(official):
    """Prompts are put into the text, and are no templates themselves."""
    rate = videoalign.load_videoalign(CPU, official.folder)
    asked = rate.question("a {fox} {0}")
    assert " - a {fox} {0}\n" in asked


def test_a_prompt_may_have_the_tokenizers_own_words(official):
    """A mark in a prompt would be read for a score, and a place for a video for a second video."""
    rate = videoalign.load_videoalign(CPU, official.folder)
    frames = video(4, 28, 28)
    odd = rate(frames, "<|VQ_reward|>a <|video_pad|>fox<|im_end|>")
    assert_close(odd, rate(frames, "a fox"))


def test_it_is_frozen_and_its_scores_have_no_graph(official):
    """Students are not trained through it."""
    rate = videoalign.load_videoalign(CPU, official.folder)
    scores = rate(video(2, 28, 28), "a fox")
    assert not scores.requires_grad
    assert not rate.training
    assert not any(p.requires_grad for p in rate.parameters())


def test_the_scores_are_normalised_as_the_paper_has_them_where_nothing_is_said(copied):
    """Mean and deviation are those that ports of the official file have (shared/recipes.md 6).

    Without data_config, two frames a second are seen, of 200,704 pixels.
    """
    frames = video()
    told = videoalign.load_videoalign(CPU, copied.folder)
    path = copied.folder / "model_config.json"
    config = json.loads(path.read_text())
    del config["inference_config"]
    del config["data_config"]
    replace(path, json.dumps(config))

    untold = videoalign.load_videoalign(CPU, copied.folder)

    mean, std = torch.tensor([*ZSCORE.values()]).T
    raw = told(frames, "a fox") * std + mean
    usual_mean = torch.tensor([3.6757, 1.1646, 2.8105])
    usual_std = torch.tensor([2.2476, 1.3811, 2.5121])
    assert_close(untold(frames, "a fox"), (raw - usual_mean) / usual_std, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- what is seen
def numbered(count, height=28, width=28):
    """Frames whose pixels all have the number of the frame."""
    numbers = torch.arange(count, dtype=torch.uint8)
    return numbers[:, None, None, None].expand(-1, 3, height, width)


@pytest.mark.parametrize(
    "fps, count, seen",
    [
        (8, 40, [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]),
        (16, 81, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (24, 120, [0, 13, 26, 40, 53, 66, 79, 93, 106, 119]),
        (30, 150, [0, 17, 33, 50, 66, 83, 99, 116, 132, 149]),
        (29.97, 45, [0, 15, 29, 44]),
    ],
)
def test_it_sees_two_frames_of_each_second(fps, count, seen):
    """Five seconds are ten frames, whatever the rate of the video; one and a half are four."""
    assert videoalign.watch(numbered(count), fps)[:, 0, 0, 0].tolist() == seen


def test_it_sees_as_many_frames_a_second_as_it_is_told():
    """model_config.json says how many, and may say another number."""
    seen = videoalign.watch(numbered(32), 16, fps=4.0)[:, 0, 0, 0]
    assert seen.tolist() == [0, 4, 9, 13, 18, 22, 27, 31]


@pytest.mark.parametrize(
    "height, width, size",
    [
        (480, 832, (336, 588)),
        (832, 480, (588, 336)),
        (448, 448, (448, 448)),
        (40, 40, (336, 336)),
    ],
)
def test_it_sees_sides_of_multiples_of_28_and_at_most_200_704_pixels(height, width, size):
    """Those are the patches of Qwen2-VL. Small videos are enlarged to 100,352 pixels or more."""
    assert videoalign.watch(numbered(4, height, width), 16).shape == (4, 3, *size)


def test_it_sees_an_even_number_of_frames_four_if_there_are_and_at_most_768(monkeypatch):
    """Qwen2-VL takes frames in pairs. So of 3 frames it sees 2, and of 2 seconds 4.

    768 are 384 seconds.
    """

    def unsized(frames, *size, **options):
        return frames

    monkeypatch.setattr("torchvision.transforms.functional.resize", unsized)
    totals = (2, 3, 5, 33, 6400)
    seen = [len(videoalign.watch(torch.zeros(total, 3, 28, 28), 16)) for total in totals]
    assert seen == [2, 2, 4, 4, 768]


def test_one_frame_is_refused():
    """It has no motion, and Qwen2-VL would see it twice."""
    with pytest.raises(ValueError, match="there is one frame"):
        videoalign.watch(numbered(1), 16)


# --------------------------------------------------------------------------- files that are refused
LAYER = "base_model.model.model.language_model.layers.1"


def said_of(folder):
    """The line in which a folder is refused."""
    with pytest.raises(ValueError) as caught:
        videoalign.load_videoalign(CPU, folder)
    said = str(caught.value)
    assert str(folder) in said
    assert "\n" not in said
    assert len(said) < 500
    return said


def change(path, new):
    """Put tensors into a file of weights; None takes one out."""
    safe = path.suffix == ".safetensors"
    state = videoalign.read_file(path)
    for key, v in new.items():
        assert v is not None or key in state
        state.pop(key, None)
        if v is not None:
            state[key] = v
    path.unlink()
    save = save_file if safe else torch.save
    save(state, path)


@pytest.mark.parametrize(
    "new, message",
    [
        ({"base_model.model.odd.weight": torch.ones(2)}, "language_model.odd.weight is none"),
        ({f"{LAYER}.mlp.down_proj.weight": None}, "lacks language_model.layers.1.mlp.down_proj.w"),
        ({f"{LAYER}.mlp.down_proj.weight": torch.ones(32, 1)}, "down_proj.weight is [32, 1], and"),
        ({f"{LAYER}.self_attn.q_proj.lora_B.default.weight": None}, "lacks language_model.layers"),
        ({f"{LAYER}.mlp.gone.lora_A.default.weight": torch.ones(2, 32)}, "gone.lora_B.weight"),
        ({"base_model.model.rm_head.weight": None}, "lacks rm_head.weight"),
        ({"base_model.model.rm_head.weight": torch.ones(2, 32)}, "rm_head.weight is [2, 32]"),
        ({"base_model.model.rm_head.weight": torch.ones(1, 16)}, "rm_head.weight is [1, 16]"),
    ],
)
def test_a_key_that_is_foreign_or_missing_or_of_another_shape_is_named(copied, new, message):
    """A weight that does not arrive leaves a judge that scores, and wrongly."""
    change(copied.checkpoint / "model.pth", new)
    assert message in said_of(copied.folder)


@pytest.mark.parametrize(
    "file, new, message",
    [
        (
            "adapter_model.safetensors",
            {f"{LAYER}.mlp.gone.lora_A.weight": torch.ones(2, 32)}
            | {f"{LAYER}.mlp.gone.lora_B.weight": torch.ones(32, 2)},
            "gone.lora_A.weight is none",
        ),
        (
            "adapter_model.safetensors",
            {f"{LAYER}.mlp.up_proj.lora_A.weight": None},
            "up_proj.lora_B.weight is none",
        ),
        (
            "non_lora_state_dict.pth",
            {"base_model.model.model.visual.odd": torch.ones(2)},
            "visual.odd is none",
        ),
        (
            "non_lora_state_dict.pth",
            {"base_model.model.rm_head.weight": None},
            "lacks rm_head.weight",
        ),
    ],
)
def test_a_key_of_either_of_two_files_is_named(parts, file, new, message):
    """All keys of both are used; those that are not there are Qwen2-VL's own."""
    change(parts.checkpoint / file, new)
    assert message in said_of(parts.folder)


def test_a_file_that_is_cut_or_missing_is_named(parts):
    """As a download leaves them that has broken off."""
    path = parts.checkpoint / "non_lora_state_dict.pth"
    path.write_bytes(path.read_bytes()[:2000])
    assert str(parts.checkpoint) in said_of(parts.folder)
    path.unlink()
    assert "non_lora_state_dict.pth" in said_of(parts.folder)


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_of_weights_is_not_run(copied, tmp_path):
    """The files are others', and a pickle can be a program."""
    path = copied.checkpoint / "model.pth"
    path.unlink()
    torch.save(dict(a=Trap(tmp_path / "sprung")), path)
    assert "is no checkpoint" in said_of(copied.folder)
    assert not (tmp_path / "sprung").exists()


def test_the_newest_checkpoint_is_read(copied):
    """By its number, not by its name; what has no number is none."""
    for name in ("checkpoint-9", "checkpoint-20000", "checkpoint-best"):
        (copied.folder / name).mkdir()
    assert videoalign.newest(copied.folder) == copied.folder / "checkpoint-20000"
    assert videoalign.newest(copied.folder / "base") == copied.folder / "base"


@pytest.mark.parametrize("gone", ["model_config", "peft_lora_config"])
def test_a_config_that_lacks_something_is_named(copied, gone):
    """Without the first there is no Qwen2-VL, and without the second the LoRA has no scale."""
    path = copied.folder / "model_config.json"
    config = json.loads(path.read_text())
    del config[gone]
    replace(path, json.dumps(config))
    said = said_of(copied.folder)
    assert str(path) in said
    assert gone in said


def test_a_config_that_is_no_json_is_named(copied):
    """Its file is cut, say."""
    replace(copied.folder / "model_config.json", "{")
    assert "model_config.json is none" in said_of(copied.folder)


def test_a_folder_without_a_config_is_refused(tmp_path):
    """As the folder above is, or a folder of Qwen2-VL."""
    assert "has no model_config.json" in said_of(tmp_path)


def test_a_missing_qwen_is_named(copied):
    """VideoReward is an addition to Qwen2-VL, which is downloaded for itself."""
    path = copied.folder / "model_config.json"
    replace(path, path.read_text().replace(str(copied.folder), "x").replace("/base", "/gone"))
    with pytest.raises(ValueError, match=r"/gone, on which VideoReward stands") as caught:
        videoalign.load_videoalign(CPU, copied.folder)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------- the text it reads
def test_the_file_of_the_text_is_not_run(copied, tmp_path):
    """It is a program of others, of which a text is wanted."""
    trap = tmp_path / "sprung"
    code = f"""
from pathlib import Path
Path({str(trap)!r}).mkdir()
(a, b), c.d = (1, 2), 3
DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {ASKED!r}
raise RuntimeError
"""
    replace(copied.folder / "prompt_template.py", code)

    rate = videoalign.load_videoalign(CPU, copied.folder)

    assert rate.template == ASKED
    assert not trap.exists()


@pytest.mark.parametrize(
    "code",
    [
        "x = 1",
        "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = build()",
        "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = 1",
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {ASKED.replace('MQ', '')!r}",
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {ASKED.replace('text_prompt', 'prompt')!r}",
        "no code",
    ],
)
def test_a_file_without_the_text_is_refused(copied, code):
    """The text is what Qwen2-VL was tuned on, and without a mark there is no score."""
    replace(copied.folder / "prompt_template.py", code)
    assert "prompt_template.py has no DETAILED_PROMPT" in said_of(copied.folder)


def test_a_text_that_is_not_in_the_folder_is_asked_of_github(copied, monkeypatch):
    """huggingface.co/KwaiVGI/VideoReward lacks it. It is that of one commit, which stays."""
    (copied.folder / "prompt_template.py").unlink()
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {ASKED!r}".encode())

    monkeypatch.setattr(videoalign, "urlopen", urlopen)
    assert videoalign.read_template(copied.folder) == ASKED
    (url,) = asked
    assert re.fullmatch(
        r"https://raw\.githubusercontent\.com/KwaiVGI/VideoAlign/[0-9a-f]{40}/prompt_template\.py",
        url,
    )


def test_without_a_connection_it_says_which_file_to_put_where(copied, monkeypatch):
    """Before Qwen2-VL is loaded, which takes a while."""
    (copied.folder / "prompt_template.py").unlink()

    def urlopen(url, timeout):
        raise URLError("no route to host")

    monkeypatch.setattr(videoalign, "urlopen", urlopen)
    monkeypatch.setattr(videoalign, "load_qwen", None)
    said = said_of(copied.folder)
    assert "prompt_template.py is not in" in said
    assert "offline: put https://raw.githubusercontent.com/KwaiVGI/VideoAlign/" in said


def test_the_files_are_those_of_the_hub_if_no_folder_is_given(official, monkeypatch):
    """And what the hub's library says without a connection is one line of ours."""
    repos = []

    def snapshot_download(repo):
        repos.append(repo)
        return str(official.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    rate = videoalign.load_videoalign(CPU)
    assert repos == ["KwaiVGI/VideoReward"]
    assert rate.head.equal(official.head)

    def offline(repo):
        raise LocalEntryNotFoundError("many\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"huggingface.co/KwaiVGI/VideoReward is not") as caught:
        videoalign.load_videoalign(CPU)
    assert "offline" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------- at random
def test_a_random_one_scores_a_video():
    """Dry runs have it: three numbers, which depend on the video, and TA on the prompt."""
    rate = tiny.videoalign("tiny")
    frames = video(33, 32, 32)
    scores = rate(frames, "a fox")
    assert scores.shape == (len(videoalign.SCORES),)
    assert scores.isfinite().all()
    assert (scores != rate(255 - frames, "a fox")).all()
    assert (scores != rate(frames, "an owl")).tolist() == [False, False, True]
    assert not rate.training
    assert not any(p.requires_grad for p in rate.parameters())


def test_a_random_one_is_built_in_half_with_a_head_in_float32():
    """On a GPU its 2 billion weights are never in float32. What normalises scores stays exact."""
    with running.default_dtype(torch.bfloat16):
        rate = tiny.videoalign("tiny")
    assert {p.dtype for p in rate.parameters()} == {torch.bfloat16}
    assert {rate.head.dtype, rate.mean.dtype, rate.std.dtype} == {torch.float32}
    scores = rate(video(33, 32, 32), "a fox")
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_a_full_one_has_qwen2_vl_2bs_number_of_weights():
    """Nothing is allocated. 2,208,985,600 are those of Qwen2-VL-2B, whose language head is tied."""
    with torch.device("meta"):
        net, processor = tiny.qwen2vl("full")
    assert len(processor.tokenizer) == 151_657
    padding = 151_936 - 151_657  # rows that the official embedding has for no word
    count = sum(p.numel() for p in net.parameters())
    assert count + padding * net.config.text_config.hidden_size == 2_208_985_600
