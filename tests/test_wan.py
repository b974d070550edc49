"""wan.py: the causal student, VideoAlign, what a student starts from, whole runs, bad input.

All of it is on tiny networks of the real classes, with random weights, on a CPU.
"""

import ast
import csv
import functools
import gc
import inspect
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import imageio.v3
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import running
import wan
from helpers import CPU, ROOT, picture, pictures, read_log, run_main, survive

torch.set_num_threads(1)  # the networks are small


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder, and draws what it drew last time.

    So nothing is written into the project.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def tiny(causal=True):
    """The tiny transformer, causal or as diffusers has it.

    Its weights are always the same, and so large that no part of it is without effect.
    """
    torch.manual_seed(1)
    net = wan.load_transformer("tiny", CPU, torch.float)
    for p in net.parameters():
        p.data.normal_(0, 0.3)
    return wan.make_causal(net) if causal else net


# ------------------------------------------------------------------ 1. a stream is one masked pass
LEVEL = 0.8  # the noise level from which these streams make each block, in one step
TOKENS = 4  # of a frame of 4 x 4 latents


def masked_pass(net, x, where, t, sees, text):
    """x0_hat of all frames of x (B, 16, F, h, w), in one pass of diffusers' own transformer.

    Frame f stands at position where[f], is noisy by level t[f] and attends to the frames sees[f].
    There is no cache in it. net is changed.
    """
    frames = range(len(t))
    mask = torch.tensor([[g in sees[f] for g in frames] for f in frames])
    mask = mask.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    attend = net.blocks[0].attn1.processor
    angles_of = net.rope.forward

    def masked(attn, h, text, no_mask, angles):
        return attend(attn, h, text, mask, angles)

    def angles_at_where(x):
        long_video = x.new_empty(1).expand(1, 1, max(where) + 1, *x.shape[3:])
        angles = [v.unflatten(1, (-1, TOKENS)) for v in angles_of(long_video)]
        return [v[:, where].flatten(1, 2) for v in angles]

    for block in net.blocks:
        block.attn1.set_processor(masked)
    net.rope.forward = angles_at_where

    t = torch.tensor(t)
    levels = t.repeat_interleave(TOKENS).expand(len(x), -1)
    velocity = net(x, 1000 * levels, text).sample
    return x - t[:, None, None] * velocity


@dataclass
class Case:
    """A stream of F frames in blocks of n, whose attention sees `window` frames, `sink` first."""

    n: int
    F: int
    window: int
    sink: int
    noise: Tensor  # (2, 16, F, 4, 4)
    texts: Tensor  # (2, 2, 512, 32): two prompts of two videos
    x: Tensor | None = None  # the stream under the first prompt
    want: Tensor | None = None  # what it must be, by `one_pass`

    def roll(self, turn=None, **changes):
        """The stream -> its frames (2, 16, F, 4, 4).

        From frame `turn` on it has the second prompt, if that is given. changes are other values of
        window and sink.
        """
        first, second = (dict(text=text) for text in self.texts)
        starts = range(0, self.F, self.n)
        conds = [first if turn is None or start < turn else second for start in starts]
        given = dict(window=self.window, sink=self.sink) | changes
        blocks = wan.stream(tiny(), self.noise.split(self.n, 2), conds, [LEVEL], **given)
        return torch.cat([x for x, _ in blocks], 2)

    def reads(self, start):
        """The earlier frames that the block from `start` on may see.

        They are the first ones, and so many of the last as fill the window with the block.
        """
        sink = min(self.sink, start)
        last = self.window - self.sink - self.n
        return {*range(sink), *range(max(sink, start - last), start)}

    def one_pass(self, x):
        """The frames that the stream must have made, if x are those that came before each.

        Clean frames take part beside the noisy ones, and stand in for the cache: a noisy frame sees
        the noisy ones of its own block, and clean ones before it; a clean frame sees clean ones.
        """
        seen_by_clean = []
        seen_by_noisy = []
        for f in range(self.F):
            start = f // self.n * self.n
            block = range(start, start + self.n)
            seen_by_clean.append(self.reads(start) | {*block})
            seen_by_noisy.append(self.reads(start) | {self.F + g for g in block})

        both = torch.cat([x, self.noise], 2)
        where = [*range(self.F)] * 2
        levels = [0.0] * self.F + [LEVEL] * self.F
        sees = seen_by_clean + seen_by_noisy
        made = masked_pass(tiny(causal=False), both, where, levels, sees, self.texts[0])
        return made[:, :, self.F :]


SHAPES = {  # n, F, window, sink
    "as LongLive": (3, 15, 9, 3),
    "frame by frame": (1, 6, 3, 1),
    "no sink, all is seen": (2, 8, 8, 0),
    "sink below a block": (3, 9, 5, 2),
    "odd window": (2, 10, 5, 1),
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def case(request):
    """A stream of each shape, made once, before any test meddles with it."""
    n, F, window, sink = request.param
    torch.manual_seed(0)
    noise, texts = torch.randn(2, 16, F, 4, 4), torch.randn(2, 2, 512, 32)
    case = Case(n, F, window, sink, noise, texts)
    with torch.no_grad():
        case.x = case.roll()
        case.want = case.one_pass(case.x)
    return case


def furthest(a, b):
    """The largest difference between two tensors."""
    return (a - b).abs().max()


def test_a_cached_stream_is_one_masked_pass(case):
    """A stream makes each block by itself, and sees the others by keys and values in a cache.

    The oracle has neither blocks nor a cache, but all frames at once, in diffusers' own network,
    with a mask and positions that say what each may see.
    """
    assert furthest(case.x, case.want) < 1e-5


@torch.no_grad()
def test_a_lost_sink_would_be_seen(case):
    """A stream that keeps no first frames is another one, if it had any to keep.

    Its window is as much shorter, so that it sees the same last frames.
    """
    lost = case.roll(window=case.window - case.sink, sink=0)
    assert (furthest(lost, case.want) > 1e-3) == (case.sink > 0)


MISTAKES = {
    "every block begins at frame 0": dict(start=0),
    "the cache holds keys of noise": dict(t=torch.full((2,), LEVEL)),
    "the cache is not read": dict(past=[]),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
@torch.no_grad()
def test_a_mistake_with_the_cache_would_be_seen(case, mistake, monkeypatch):
    """The oracle tells a stream from one with a mistake.

    If it did not, that a stream is as it says would prove nothing.
    """
    read_block = wan.read_block
    arguments = inspect.signature(read_block)

    def mistaken(*given, **named):
        right = arguments.bind(*given, **named).arguments
        return read_block(**right | mistake)

    monkeypatch.setattr(wan, "read_block", mistaken)
    assert furthest(case.roll(), case.want) > 1e-3


@torch.no_grad()
def test_a_new_prompt_reads_the_kept_frames_anew(case):
    """The last block has another prompt, under which the cache is made again (LongLive).

    The oracle is a masked pass of the kept frames and the last block, all under the new prompt: the
    sink is read first, in blocks, then the others; each block sees what was read before it.
    """
    turn = case.F - case.n
    y = case.roll(turn)
    assert y[:, :, :turn].equal(case.x[:, :, :turn]), "what came before the turn has changed"

    kept = sorted(case.reads(turn - case.n) | {*range(turn - case.n, turn)})
    sink = min(case.sink, turn)

    def block_of(i):
        """Where the i-th kept frame comes in the order of reading."""
        return (0, i // case.n) if i < sink else (1, (i - sink) // case.n)

    places = range(len(kept))
    seen_by_kept = [{j for j in places if block_of(j) <= block_of(i)} for i in places]
    seen_by_last = {kept.index(g) for g in case.reads(turn)}
    seen_by_last |= {*range(len(kept), len(kept) + case.n)}

    both = torch.cat([case.x[:, :, kept], case.noise[:, :, turn:]], 2)
    where = [*kept, *range(turn, case.F)]
    levels = [0.0] * len(kept) + [LEVEL] * case.n
    sees = seen_by_kept + [seen_by_last] * case.n
    want = masked_pass(tiny(causal=False), both, where, levels, sees, case.texts[1])
    assert furthest(y[:, :, turn:], want[:, :, len(kept) :]) < 1e-5


# ------------------------------------------------------- 2. gradients and memory of a stream
def compile_counted(net, graphs):
    """Compile each layer, as wan.py does, but to an error where it does not compile whole.

    Each program that is made is added to graphs.
    """

    def backend(program, example):
        graphs.append(program)
        return program.forward

    for block in net.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)


def watch_caches(monkeypatch):
    """-> a list, to which each later call of read_block adds the cached frames that it is given.

    Such a frame is keys and values for each layer.
    """
    caches = []
    read_block = wan.read_block
    arguments = inspect.signature(read_block)

    def watched(*given, **named):
        caches.extend(arguments.bind(*given, **named).arguments["past"])
        return read_block(*given, **named)

    monkeypatch.setattr(wan, "read_block", watched)
    return caches


def test_gradients_of_a_stream_are_the_same_recomputed_and_compiled(monkeypatch):
    """A layer that is computed again, for its gradient, sees the cache that it saw at first.

    Layers compile whole, to a program for each kind of cache and mode. Only exits carry gradient:
    what is cached does not, and all blocks of a stream have one exit.
    """
    args = SimpleNamespace(
        mode="streaming",
        frames=15,
        block=3,
        window=9,
        sink=3,
        size=[32, 32],
        student_steps=4,
    )
    c = dict(text=torch.randn(1, 512, 32))
    caches = watch_caches(monkeypatch)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)

    def gradient(net):
        net.requires_grad_()
        torch.manual_seed(3)
        x, levels = zip(*wan.rollout(args, net, [c], u=0.6), strict=True)
        torch.cat(x, 2).sin().sum().backward()
        assert {*levels} == {5 * 0.5 / 3}, "u = 0.6 is the third of four levels, at shift 5"
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    plain = gradient(tiny())
    assert plain.abs().max() > 1

    recomputed = tiny()
    recomputed.enable_gradient_checkpointing()
    assert_close(gradient(recomputed), plain, rtol=1e-6, atol=1e-6)

    graphs = []
    compiled = tiny()
    compiled.enable_gradient_checkpointing()
    compile_counted(compiled, graphs)
    assert_close(gradient(compiled), plain, rtol=1e-6, atol=1e-6)
    assert 0 < len(graphs) < 30

    assert caches
    states = [h for frame in caches for layer in frame for h in layer]
    assert not any(h.requires_grad for h in states)


def bytes_alive():
    """The bytes of all tensors that are alive.

    Tensors that share a storage count once.
    """
    tensors = [v for v in gc.get_objects() if type(v) is torch.Tensor]
    storages = [v.untyped_storage() for v in tensors]
    return sum({v.data_ptr(): v.nbytes() for v in storages}.values())


@torch.no_grad()
def test_a_long_stream_takes_constant_memory():
    """The cache grows until the window is full, and then no more.

    Three blocks of three frames fill a window of nine, and nine blocks are made.
    """
    noise = torch.randn(1, 16, 27, 4, 4).split(3, 2)
    conds = [dict(text=torch.randn(1, 512, 32))] * 9
    gc.collect()
    held = [bytes_alive() for _ in wan.stream(tiny(), noise, conds, [1.0], window=9, sink=3)]
    assert held[0] < held[1] < held[2]
    assert len({*held[4:]}) == 1


# ------------------------------------------------------------------------------- 3. VideoAlign
ASKED = "Rate.\n{}\n{} - {{text_prompt}}\n{}\n".format(*wan.MARKS)
ZSCORE = dict(VQ=(1.0, 2.0), MQ=(0.5, 4.0), TA=(0.0, 0.5))  # mean, standard deviation


def write_videoreward(folder, base, columns):
    """A tiny VideoReward at random, in its authors' files -> its network, processor and head.

    It is peft's LoRA beside the weights. One column of output comes with the keys of old
    transformers, three with today's. `base` becomes the Qwen2-VL that it stands on.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Qwen2VLForConditionalGeneration

    model, processor = wan.random_qwen(True)
    whole = Qwen2VLForConditionalGeneration(model.config)
    whole.save_pretrained(base)
    processor.save_pretrained(base)

    processor.tokenizer.add_special_tokens(dict(additional_special_tokens=wan.MARKS))
    whole.resize_token_embeddings(len(processor.tokenizer))
    lora = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj"],
    )
    net = inject_adapter_in_model(lora, whole.model).eval()
    for p in net.parameters():
        p.data.normal_(0, 0.2)

    unused, head = torch.randn(columns, 32), torch.randn(columns, 32)
    state = {"lm_head.weight": unused, "rm_head.weight": head}
    for k, v in net.state_dict().items():
        old, new = k.replace("language_model.", "model."), f"model.{k}"
        state[old if columns == 1 else new] = v
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    torch.save({f"base_model.model.{k}": v for k, v in state.items()}, checkpoint / "model.pth")

    code = f"A = 1\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {ASKED!r}\n1 / 0"  # to be read, not run
    (folder / "prompt_template.py").write_text(code)
    config = dict(
        model_config=dict(model_name_or_path=str(base)),
        data_config=dict(fps=2.0, max_frame_pixels=200_704),
        peft_lora_config=dict(lora_r=2, lora_alpha=6),
        inference_config={f"{k}_mean": mean for k, (mean, _) in ZSCORE.items()}
        | {f"{k}_std": std for k, (_, std) in ZSCORE.items()},
    )
    (folder / "model_config.json").write_text(json.dumps(config))
    return net, processor, head


def videoalign_by_hand(net, processor, head, frames, prompt):
    """Its authors' steps, for 81 frames of 240 x 416 -> VQ, MQ, TA (3,), normalised.

    Which frames are seen, and how large, is written out here; places are counted in a row, as
    transformers 4.45, with which it was trained, did where it was given none.
    """
    from torchvision.transforms import functional as V

    two_a_second = frames[[0, 9, 18, 27, 36, 44, 53, 62, 71, 80]]  # of 16 a second
    video = V.resize(two_a_second, [252, 420], V.InterpolationMode.BICUBIC)
    content = [dict(type="video"), dict(type="text", text=ASKED.format(text_prompt=prompt))]
    chat = [dict(role="user", content=content)]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    c = processor(
        text=[text], videos=[video], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )

    ids = c["input_ids"]
    h = net.get_input_embeddings()(ids)
    seen = net.visual(c["pixel_values_videos"], c["video_grid_thw"])
    h[ids == net.config.video_token_id] = seen.pooler_output
    places = torch.arange(ids.shape[1]).expand(3, 1, -1)
    h = net.language_model(inputs_embeds=h, position_ids=places).last_hidden_state[0]

    scores = []
    for i, (mark, (mean, std)) in enumerate(zip(wan.MARKS, ZSCORE.values(), strict=True)):
        at = ids[0] == processor.tokenizer.convert_tokens_to_ids(mark)
        logits = h[at][0] @ head.T
        scores.append((logits[i % len(head)] - mean) / std)
    return torch.stack(scores)


@pytest.mark.parametrize("columns", [1, 3])
@torch.no_grad()
def test_videoalign_is_its_definition(tmp_path, columns):
    """Read from its authors' files it gives the scores of their steps, done by hand.

    VQ and MQ do not see the prompt, whose words come after their marks.
    """
    folder = tmp_path / "reward"
    by_hand = functools.partial(
        videoalign_by_hand, *write_videoreward(folder, tmp_path / "base", columns)
    )
    frames = torch.randint(256, (81, 3, 240, 416)).byte()
    rate = wan.load_videoalign(wan.parse(["--videoalign", str(folder)]), CPU)

    fox, owl = by_hand(frames, "a fox"), by_hand(frames, "an owl")
    assert_close(rate(frames, "a fox"), fox, rtol=1e-5, atol=1e-5)
    assert_close(rate(frames, "an owl"), owl, rtol=1e-5, atol=1e-5)
    assert fox[:2].equal(owl[:2])
    assert fox[2] != owl[2]


def test_videoalign_sees_two_frames_a_second_of_200_704_pixels():
    """Its sides are multiples of 28, the patches of Qwen2-VL.

    81 frames at 16 a second are 5 seconds.
    """
    video = torch.zeros(81, 3, 480, 832, dtype=torch.uint8)
    assert wan.watch(video).shape == (10, 3, 336, 588)


def test_videoalign_sees_an_even_number_of_frames_four_if_there_are():
    """Qwen2-VL takes frames in pairs.

    So of 3 frames it sees 2, and of 2 seconds 4.
    """
    video = torch.zeros(81, 3, 40, 40, dtype=torch.uint8)
    assert [len(wan.watch(video[:total])) for total in (2, 3, 5, 33)] == [2, 2, 4, 4]


# ------------------------------------------------------------------ 4. what a student starts from
WANS_NAMES = {  # diffusers' part of a key: Wan's, to be replaced in this order
    "attn1": "self_attn",
    "attn2": "cross_attn",
    ".to_out.0": ".o",
    ".to_": ".",
    "norm2": "norm3",
    "net.0.proj": "0",
    "net.2": "2",
    "embedder.linear_1": "embedding.0",
    "embedder.linear_2": "embedding.2",
    "time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "modulation",
}


def by_wans_names(weights):
    """A state dict of diffusers, with Wan's keys, as Self-Forcing saves them.

    They are written out here, for wan.py has diffusers translate them.
    """
    state = {}
    for k, v in weights.items():
        name = k.replace("condition_embedder.", "")
        name = re.sub("^scale_shift_table", "head.modulation", name)
        for ours, theirs in WANS_NAMES.items():
            name = name.replace(ours, theirs)
        state[f"model.{name}"] = v
    return state


def another():
    """A transformer of other weights than tiny's, to be given those of a file."""
    return wan.load_transformer("tiny", CPU, torch.float)


def test_a_student_starts_from_self_forcings_file_and_from_a_folder(tmp_path):
    """Each weight of the file arrives.

    Self-Forcing's has Wan's keys, the folder those of diffusers.
    """
    base = tiny(causal=False)
    weights = base.state_dict()
    torch.save(dict(generator=by_wans_names(weights)), "ode_init.pt")
    base.save_pretrained("folder")

    for path in (tmp_path / "ode_init.pt", tmp_path / "folder"):
        net = another()
        wan.adopt(net, path)
        assert all(v.equal(weights[k]) for k, v in net.state_dict().items())


def test_a_file_with_a_key_too_many_or_too_few_is_no_student(tmp_path):
    """Every key of a file is used and every weight is found, or it is refused.

    A folder with nothing in it is refused alike.
    """
    state = by_wans_names(tiny(causal=False).state_dict())
    torch.save(state | {"model.odd": torch.ones(3)}, "odd.pt")
    torch.save({k: v for k, v in state.items() if "head" not in k}, "less.pt")
    (tmp_path / "empty").mkdir()

    for path in (tmp_path / "odd.pt", tmp_path / "less.pt", tmp_path / "empty"):
        with pytest.raises(ValueError, match="is no student of --model"):
            wan.adopt(another(), path)


def test_a_lora_stands_on_its_init_and_shares_the_teachers_weights(tmp_path):
    """The student's LoRA stands on --init alone, those of fake and blended on the real teacher.

    Adopted from the run's folder, it comes with its --init and moves each layer that has a LoRA,
    and no other.
    """
    weights = tiny(causal=False).state_dict()
    torch.save(by_wans_names(weights), "ode_init.pt")
    flags = "--dry-run tiny --init ode_init.pt --lora-rank 2 --method magic --lr .1"
    flags += " --steps 1 --fake-steps 1 --out lora"
    args = wan.parse(flags.split())

    nets = wan.prepare(args, CPU).nets
    ids = {name: {id(p) for p in net.parameters()} for name, net in nets.items()}
    assert not ids["real"] & ids["student"]
    assert ids["real"] <= ids["fake"]
    assert ids["real"] <= ids["blended"]

    wan.main(args)
    net = another()
    wan.adopt(net, tmp_path / "lora")
    moved = {k for k, v in net.state_dict().items() if not v.equal(weights[k])}
    layers = [f"{attn}.to_{k}" for attn in ("attn1", "attn2") for k in ("q", "k", "v", "out.0")]
    layers += ["ffn.net.0.proj", "ffn.net.2"]
    assert moved == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}


# ------------------------------------------------------------------------------- 5. whole runs
@dataclass
class Run:
    """A run that was killed and resumed."""

    folder: Path  # of the files that it is given
    flags: list
    ranks: int
    out: Path  # what it has written


def run_of(folder, mode, prompts, ranks, *more):
    """A run of three updates is killed and resumed, and is what a run left alone is, bit for bit.

    See helpers.survive.
    """
    flags = [
        *("--dry-run", "tiny"),
        *("--model", folder / "model"),
        *("--prompts", folder / prompts),
        *("--mode", mode),
        *("--lr", "1e-2"),
        *("--steps", "3"),
        *("--fake-steps", "1"),
        *("--log-every", "1"),
        *("--save-every", "1"),
        *more,
    ]
    return Run(folder, flags, ranks, survive(folder, "wan", flags, ranks))


@pytest.fixture(scope="module")
def image_to_video(tmp_path_factory):
    """Image to video, bidirectional, on one process.

    Its reward is VideoAlign's MQ alone, and its method ddmd.
    """
    import diffusers
    import transformers

    folder = tmp_path_factory.mktemp("image_to_video")
    pictures(folder / "images")
    rows = [dict(prompt_en="fox", image_name="images/0.png")]
    (folder / "rows.json").write_text(json.dumps(rows))

    torch.manual_seed(0)
    shape = wan.SIZES["tiny"] | dict(in_channels=36, image_dim=16, added_kv_proj_dim=24)
    eye = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    parts = wan.random_pipeline(True).components | dict(
        transformer=diffusers.WanTransformer3DModel(**shape),
        transformer_2=None,
        image_processor=transformers.CLIPImageProcessor(),
        image_encoder=transformers.CLIPVisionModel(eye),
    )
    diffusers.WanImageToVideoPipeline(**parts).save_pretrained(folder / "model")
    more = ["--method", "ddmd", "--reward", "mq"]
    return run_of(folder, "bidirectional", "rows.json", 1, *more)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Text to video, streaming, sharded over two processes.

    Two of its three prompts have one short name, so that they ask for one file of video.
    """
    folder = tmp_path_factory.mktemp("stream")
    rows = 'prompt,prompt_shorter\n"A long, ""red"" fox",fox\nAn owl,owl\nOne more,owl\n'
    (folder / "rows.csv").write_text(rows)

    torch.manual_seed(0)
    pipe = wan.random_pipeline(True)
    pipe.register_modules(transformer=tiny(causal=False))
    pipe.save_pretrained(folder / "model")
    return run_of(folder, "streaming", "rows.csv", 2)


def film_of(path):
    """The pictures of an mp4."""
    return [*imageio.v3.imiter(path)]


@pytest.mark.parametrize(
    "kind, reward, of_the_method",
    [
        ("image_to_video", ["mq"], set()),
        ("stream", ["vq", "mq", "ta"], {"adv_clip", "w_mean"}),
    ],
    ids=["image_to_video", "stream"],
)
def test_a_run_survives_kill_9_and_logs_its_rewards(kind, reward, of_the_method, request):
    """The log of a run that was killed is whole; what is said of its numbers is so.

    CFG pushes, for the null condition is another one. The reward is what --reward says, or the sum
    of all three.
    """
    run = request.getfixturevalue(kind)
    row = read_log(run.out)[-1]
    counted = {"step", "fake_step", "skipped", "sec", "samples_per_s", "mem_gib"}
    means = {"g_norm", "dm_norm", "ca_norm", "loss_student", "loss_fake"}
    rewards = {"reward", "reward_std", "vq", "mq", "ta"}
    assert row.keys() >= counted | means | rewards | of_the_method
    assert row["ca_norm"] > 1e-6
    assert abs(row["reward"] - sum(row[k] for k in reward)) < 1e-6


@pytest.mark.parametrize("kind", ["image_to_video", "stream"])
def test_a_run_shows_a_video_of_each_rank(kind, request):
    """Nine latent frames are 33 pictures: four each, but the first."""
    run = request.getfixturevalue(kind)
    films = [film_of(path) for path in (run.out / "samples/step_3").iterdir()]
    assert [len(film) for film in films] == [33] * run.ranks


@pytest.mark.parametrize(
    "kind, frames, prompt",
    [
        ("image_to_video", 9, "fox"),
        ("stream", 15, 'A long, "red" fox'),
    ],
    ids=["image_to_video", "stream"],
)
def test_sample_writes_each_listed_video_from_its_own_noise(
    kind, frames, prompt, request, tmp_path
):
    """videos.csv lists the videos that there are, each once, with the prompt that it was drawn for.

    Those of the stream are longer than in training. A video that is lost is drawn again by
    --resume, as it was.
    """
    run = request.getfixturevalue(kind)
    flags = [
        "sample",
        *run.flags,
        *("--init", run.out),
        *("--out", tmp_path / "drawn"),
        *("--layout", "vbench"),
        *("--seeds", 2),
        *("--frames", frames),
        "--resume",
    ]
    run_main("wan", flags)

    with (tmp_path / "drawn/videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    there = {f"videos/{path.name}" for path in (tmp_path / "drawn/videos").iterdir()}
    assert there == {row["path"] for row in rows}
    assert rows[1] == dict(path="videos/fox-1.mp4", prompt=prompt)

    before, last = (tmp_path / "drawn" / row["path"] for row in rows[-2:])
    film = film_of(last)
    assert len(film) == 4 * frames - 3
    assert (film[9] != film_of(before)[9]).any(), "each video has its own noise"

    last.unlink()
    run_main("wan", flags)
    assert all((a == b).all() for a, b in zip(film, film_of(last), strict=True))


def documented():
    """The lines of docs/wan.md that draw with a student in diffusers.

    They are its first block of code in Python.
    """
    guide = (ROOT / "docs/wan.md").read_text(encoding="utf-8")
    return re.search(r"```py\n(.*?)```", guide, re.S)[1]


@torch.no_grad()
def test_the_documented_lines_draw_in_diffusers_what_we_draw(image_to_video):
    """They are run as they stand, but for the paths, float32 on a CPU, our image and size.

    The oracle is the run's own generator, with the average of the weights in its newest checkpoint.
    """
    run = image_to_video
    lines = documented()
    changes = {
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": str(run.folder / "model"),
        "runs/t2v/student": str(run.out / "student"),
        "torch.bfloat16": "torch.float32",
        '.to("cuda")': "",
    }
    for there, here in changes.items():
        assert there in lines
        lines = lines.replace(there, here)
    *loading, drawing = ast.parse(lines).body
    scope = {}
    exec("\n".join(map(ast.unparse, loading)), scope)

    pipe = scope["pipe"]
    image = picture(run.folder / "images/0.png").convert("RGB")

    def pipe_of_our_size(prompt, **given):
        given |= dict(height=32, width=32, num_frames=33, output_type="latent")
        return pipe(image, "fox", **given)

    scope["pipe"] = pipe_of_our_size
    torch.manual_seed(5)
    exec(ast.unparse(drawing), scope)

    ours = wan.prepare(wan.parse([str(v) for v in run.flags]), CPU)
    assert running.load(run.out, **ours.parts) == 3
    with running.averaged(ours.ema):
        torch.manual_seed(5)
        x, _ = ours.generate(ours.encode(ours.rows))
    assert_close(scope["video"], x[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_frames_one_by_one_are_what_the_vae_decodes_at_once():
    """Latents in three blocks, decoded frame by frame, are pictures of one decoding.

    The oracle is the VAE's own `decode` of all nine.
    """
    vae = wan.random_pipeline(True).vae.eval()
    z = torch.randn(1, 16, 9, 4, 4)
    film = torch.cat([*wan.frames_of(vae, z.split(4, 2))], 2)

    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    want = 127.5 * vae.decode(z * std + mean).sample + 127.5
    assert_close(film, want.round().clamp(0, 255).byte())
    assert film.shape == (1, 3, 33, 32, 32)


# --------------------------------------------------------------------------------- 6. bad input
@pytest.fixture
def bad_files(tmp_path):
    """Small files and folders, each named after what is wrong with it.

    The flags below name them.
    """
    (tmp_path / "empty").touch()

    of_sdxl = tmp_path / "of_sdxl"
    of_sdxl.mkdir()
    index = dict(_class_name="StableDiffusionXLPipeline", unet=["a", "b"])
    (of_sdxl / "model_index.json").write_text(json.dumps(index))

    wider = tmp_path / "of_another_width/transformer"
    wider.mkdir(parents=True)
    (wider / "config.json").write_text("{}")  # by default Wan's own width, and tiny's is 32


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--frames 20", "multiple of"),
        ("--window 5", "at least --sink plus --block"),
        ("--mode bidirectional --frames 1", "rates motion"),
        ("--method magic", "give --teacher"),
        ("--prompts missing.csv", "No such file"),
        ("--prompts empty", "give 1 to"),
        ("--dry-run tiny --init empty", "is no student"),
        ("--dry-run tiny --model of_sdxl", "is no Wan2.1"),
        ("--dry-run tiny --teacher of_another_width", "text_dim"),
        ("score", "give"),
    ],
)
def test_bad_input_says_what_is_wrong_before_anything_is_written(
    flags, message, bad_files, tmp_path
):
    """main raises what the command says in one line, see the next test.

    A message says what to do, so a word of it is enough here.
    """
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        wan.main(wan.parse(flags.split()))
    assert not (tmp_path / "runs").exists()


def test_bad_input_ends_in_one_line_and_code_2(tmp_path):
    """A real process is started, as a user does it: no traceback, nothing on the disk."""
    got = subprocess.run(
        [sys.executable, ROOT / "wan.py", "--lr", "0"],
        capture_output=True,
        text=True,
    )
    assert got.returncode == 2, got.stderr
    assert "choose lr" in got.stderr
    assert got.stderr.count("\n") == 1, got.stderr
    assert not (tmp_path / "runs").exists()
