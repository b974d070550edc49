"""AMD on Wan2.1, text or image to video in four steps, streaming or whole: the paper's Tables 5, 6, 10, 11 and Fig. 15.
    torchrun --nproc-per-node 8 wan.py                   # a causal, streaming student: LongLive's stage 1 (A.4)
    torchrun --nproc-per-node 8 wan.py --mode bidirectional --lora-rank 64 --model I2V-14B-480P --prompts rows.jsonl
    python wan.py --teacher T2V-1.3B --offload-text --adam8bit      # on one GPU; the line above: Tables 10, 11
    torchrun --nproc-per-node 8 wan.py sample --init runs/wan --layout vbench --prompts vbench.csv --out runs/vbench
    python wan.py score --samples runs/vbench            # VideoAlign's VQ, MQ, TA and their sum, x 100
    python wan.py --dry-run full                         # memory and speed on this GPU, with random weights
Weights are downloaded on first use. VBench's total in Table 5: LongLive 81.42, AMD 82.21."""

import argparse
import ast
import copy
import csv
import json
import os
import re
import warnings
from functools import lru_cache, partial
from importlib import import_module as lib  # for what is slow to import, where it's first used
from pathlib import Path
from urllib.request import urlopen

import torch
from torch import nn

import amd
import running

warnings.filterwarnings("ignore", "FSDP2-wrapped"), torch.set_float32_matmul_precision("high")
os.environ |= dict(DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
# ----------------------------------------------------------------------------------------------------------- arguments
HUB, FPS = "Wan-AI/Wan2.1-{}-Diffusers", 16
PRESETS = {
    "streaming": dict(model="T2V-1.3B", teacher="T2V-14B", steps=140, lr=2e-6, fake_lr=4e-7),
    "bidirectional": dict(model="T2V-14B", steps=800, lr=5e-7),
}  # LongLive's 700 count the fake's, too
SHARED = dict(
    batch=8,
    group=8,
    fake_steps=5,
    frames=21,
    size=[480, 832],
    lora_rank=0,
    student_steps=4,
    block=3,
    window=12,
    sink=3,
    ema_from=40,
    log_every=1,
    sample_every=20,
    save_every=20,
)
DRY = dict(
    full=dict(teacher=None, offload_text=True),
    tiny=dict(
        model="tiny",
        teacher=None,
        frames=9,
        window=6,
        size=[32, 32],
        batch=4,
        fake_steps=2,
        steps=4,
        accum=1,
        ema_from=1,
        group=4,
        sample_every=4,
        save_every=2,
    ),
)
OWN = ("model", "size", "student_steps", "block", "window", "sink")  # of a run, for its samples
LAYOUTS = dict(
    flat="{i:06}.mp4",
    vbench="{name}-{k}.mp4",
    vbench_i2v="{name}-{k}.mp4",
    videogen_eval="{i:04}-{k}.mp4",
    ta_hard="{i:04}-{k}.mp4",
)


def parse(argv=None):
    parser = running.Parser(__doc__)
    shared, (method, optimisation, data, _, sampling) = parser.shared, parser.groups.values()
    parser.add_argument("task", nargs="?", choices=["train", "sample", "score"], default="train")

    rows = [name for name in amd.METHODS if name not in ("dmd2", "dmdr")]
    shared("method", "amd", choices=rows, default="amd")
    method.add_argument(
        "--mode", choices=PRESETS, help="a causal student (default), or all at once"
    )
    shared("s", ".5", default=0.5)
    shared("tau", "1", default=1.0)
    shared("w", "4, which is Self-Forcing's 3", default=4.0)
    shared("group", "8, over ranks too")
    method.add_argument(
        "--reward", choices=["overall", "vq", "mq", "ta"], default="overall", help="of VideoAlign"
    )
    shared("student-steps", "4")
    shared("fake-steps", "5")
    method.add_argument("--block", type=int, help="latent frames of a block (3)")
    method.add_argument("--window", type=int, help="latent frames that attention sees (12)")
    method.add_argument("--sink", type=int, help="first latent frames among them (3)")

    shared("batch", "8")
    shared("accum", "as many as make micro-batches of 1")
    shared("steps", "140; bidirectional 800")
    shared("lr", "2e-6; bidirectional 5e-7")
    shared("fake-lr", "4e-7")
    shared("ema", ".99", default=0.99)
    optimisation.add_argument("--ema-from", type=int, help="update at which it begins (40)")
    shared("lora-rank", "0")
    shared("adam8bit")
    shared("checkpointing", default=True)
    shared("compile", default=torch.cuda.is_available())
    shared("offload-text")
    shared("seed", "0", default=0)

    shared("dry-run", choices=["tiny", "full"])
    data.add_argument(
        "--model",
        help="student and fake: T2V-1.3B (default), T2V-14B (bidirectional), I2V-14B-480P, any"
        f" Wan2.1 of diffusers; {', '.join(SIZES)}: random weights",
    )
    data.add_argument("--teacher", help="the same (T2V-14B; bidirectional: --model)")
    data.add_argument("--videoalign", type=Path, help="folder of VideoReward (downloaded)")
    shared("init", "a run, a transformer's folder, a LoRA, ode_init.pt; sample: what to sample")
    shared("prompts", "text, jsonl, json or csv; default: ours")
    data.add_argument("--size", type=int, nargs=2, help="height and width (480 832)")
    data.add_argument("--frames", type=int, help="latent frames (21: 81 frames), up to 1,024")

    shared("out", "runs/wan")
    shared("resume")
    shared("log-every", "1")
    shared("sample-every", "20")
    shared("save-every", "20")

    shared("samples", "folders of sample", nargs="+")
    shared("layout", "flat", choices=LAYOUTS, default="flat")
    sampling.add_argument("--seeds", type=int, help="videos of a prompt (5; flat 1)")
    args = parser.parse_args(argv)
    init = args.init and args.init.resolve()
    args.init = (
        init.parent
        if init and init.name == "student" and (init.parent / "config.json").exists()
        else init
    )
    own = (
        running.read_config(args.init)
        if args.task == "sample" and args.init and (args.init / "student").exists()
        else {}
    )
    mode, name = (
        args.mode or own.get("mode", "streaming"),
        "videos" if args.task == "sample" else args.dry_run or "wan",
    )
    given = (
        dict(mode=mode, out=Path("runs", name), seeds=5 - 4 * (args.layout == "flat"))
        | SHARED
        | PRESETS[mode]
    )
    given |= DRY.get(args.dry_run, {}) | {k: own[k] for k in own if k in OWN}
    given |= {k: v for k, v in vars(args).items() if v is not None and v is not False}
    for k, of in dict(model=given["model"], teacher=given.get("teacher") or given["model"]).items():
        given[k] = (
            of
            if not re.match("[TI]2V-", of)
            else HUB.format(of)
            if args.dry_run != "full"
            else of.split("-")[1]
        )
    rest = dict(
        fake_lr=given["lr"], accum=-(-given["batch"] // int(os.environ.get("WORLD_SIZE", 1)))
    )
    return argparse.Namespace(**vars(args) | rest | given)


NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)  # Wan's own
# ------------------------------------------------------------------------------------------------------------ backbone
SIZES = {
    "tiny": dict(
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=32,
        num_layers=2,
        text_dim=32,
        freq_dim=16,
    ),
    "1.3B": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14B": {},
}


def drawn(make, place):  # random weights, alike on all ranks
    torch.manual_seed(0)
    with place:
        return make()


def random_pipeline(tiny):
    """Wan's pipeline but for its transformer, with random weights: the true architecture, or the same classes, tiny."""
    D, T = lib("diffusers"), lib("transformers")
    words = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz.,")]
    text = (
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        if tiny
        else dict(
            vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64
        )
    )
    text, vae = (
        T.UMT5Config(**text),
        dict(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1) if tiny else {},
    )
    return D.WanPipeline(
        T.T5Tokenizer(vocab=words, extra_ids=0),
        T.UMT5EncoderModel(text),
        D.AutoencoderKLWan(**vae),
        D.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )


def load_pipeline(args, device, rows):
    """-> diffusers' pipeline of --model but for its transformer, frozen. ValueError: another kind, unfit for rows."""
    diffusers, kinds = lib("diffusers"), dict(default=running.half(device), vae=torch.float)
    if args.model in SIZES:
        pipe = drawn(lambda: random_pipeline(args.model == "tiny"), device)
    else:
        index = diffusers.DiffusionPipeline.load_config(args.model)
        if "WanTransformer3DModel" not in index.get("transformer", ()) or any(
            index.get("transformer_2", ())
        ):
            raise ValueError(
                f"{args.model} is no Wan2.1, of one transformer: give one of diffusers, a whole folder"
            )
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            args.model, transformer=None, dtype=kinds
        )
    if (
        {i2v := hasattr(pipe, "encode_image")} != {bool(r["image"]) for r in rows}
        or i2v
        and args.mode == "streaming"
    ):
        raise ValueError(
            f"{args.model}: an I2V model is for bidirectional and prompts with images, T2V for others"
        )
    for name, net in pipe.components.items():
        if isinstance(net, nn.Module):
            net.to(device, kinds.get(name, running.half(device))).eval().requires_grad_(False)
    return pipe


def load_transformer(name, place, dtype):
    """WanTransformer3DModel of a pipeline on the hub or in a folder, or of SIZES at random; frozen, at place."""
    kind = lib("diffusers").WanTransformer3DModel
    if name in SIZES:
        net = drawn(lambda: kind(**SIZES[name]), place)
    else:
        net = kind.from_pretrained(name, subfolder="transformer", dtype=dtype).to(place)
    for p in net.parameters():
        p.data = p.data.to(dtype)  # alike, for FSDP2; but not the buffers, rope's angles
    return net.eval().requires_grad_(False)


def denoiser(net):
    def velocity(x_t, t, c):
        x = torch.cat([x_t, c["y"]], 1) if "y" in c else x_t
        with running.autocast(x):
            return net(x, 1000 * t, c["text"], c.get("image")).sample

    return amd.x0_from_flow(velocity)


def conditions(args, pipe, device):
    """-> encode(rows) to what the transformer asks for; null: the negative prompt, with the same image."""

    @lru_cache(64)  # the K samples of a group come in many batches
    @torch.no_grad()
    def embed(text):
        c = (
            pipe.text_encoder.to(device)
            and pipe.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=512, device=device
            )[0][0]
        )
        return (args.offload_text and pipe.text_encoder.to("cpu"), c)[1]

    @lru_cache(16)
    @torch.no_grad()
    def look(path):  # latents of the image and grey frames behind it, with a mask; what CLIP sees
        (h, w), image = args.size, lib("PIL.Image").open(path).convert("RGB")
        x = pipe.video_processor.preprocess(image, height=h, width=w).to(device, torch.float)
        y = pipe.prepare_latents(
            x, 1, 16, h, w, 4 * args.frames - 3, torch.float, device, latents=torch.ones(1)
        )[1]
        return y[0], pipe.encode_image(image, device)[0].float()

    def encode(rows):
        seen = zip(*[look(row["image"]) for row in rows if row["image"]], strict=True)
        return dict(text=torch.stack([embed(row["prompt"]) for row in rows])) | dict(
            zip(("y", "image"), map(torch.stack, seen), strict=False)
        )

    return encode, lambda c: c | dict(text=embed(NEGATIVE).expand_as(c["text"]))


def frames_of(vae, blocks):
    """Latents (B, 16, n, h, w), block after block -> frames (B, 3, 1 or 4, H, W) uint8, a latent frame at a time by the
    VAE's own causal cache: what vae.decode makes of all, in constant memory."""
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    vae.clear_cache()
    for i, z in enumerate(z for x in blocks for z in (x * std.to(x) + mean.to(x)).split(1, 2)):
        with running.autocast(z):
            x = vae.decoder(
                vae.post_quant_conv(z), feat_cache=vae._feat_map, feat_idx=[0], first_chunk=not i
            )
        yield (127.5 * x.float() + 127.5).round().clamp(0, 255).to(torch.uint8)
    vae.clear_cache()


def write_mp4(path, frames):  # of frames_of, of one video; whole or not at all
    path.parent.mkdir(parents=True, exist_ok=True)
    with lib("imageio").get_writer(
        new := path.with_name(f"_{path.name}"), fps=FPS, quality=8
    ) as file:
        for part in frames:
            [file.append_data(image) for image in part[0].permute(1, 2, 3, 0).cpu().numpy()]
    new.rename(path)


# ---------------------------------------------------------------------------------------------------- streaming student
# Diffusers' own transformer becomes causal by three hooks: its rope starts at the block's first frame, self-attention
# reads cached frames, too, and both travel as rotary_emb, an argument of each layer, recomputed ones included.
class Angles(
    nn.Module
):  # in place of net.rope; call: the block's first frame, cached frames, where to leave new ones
    def forward(self, x):
        (start, past, fresh), n = self.call, self.rope.t_dim
        moved = {
            k: torch.cat([v[:, :n].roll(-start, 0), v[:, n:]], 1)
            for k, v in self.rope.named_buffers()
        }
        return *torch.func.functional_call(self.rope, moved, x), past, fresh


def own_layer(i, block, args):
    *given, (cos, sin, past, fresh) = args
    return *given, (cos, sin, [frame[i] for frame in past], fresh and fresh[i])


def rotate(
    x, cos, sin
):  # (B, tokens, heads, dim): pairs of neighbours, in real numbers, that compile
    (a, b), cos, sin = x.float().unflatten(-1, (-1, 2)).unbind(-1), cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


def read(
    attn, x, text, mask, rotary
):  # self-attention's processor: frames read the cached ones and their own block
    cos, sin, past, fresh = rotary
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
    q, k, v = (h.unflatten(2, (attn.heads, -1)) for h in (q, k, v))
    q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)
    if fresh is not None:
        fresh.append((k, v))
    k, v = (
        torch.cat([*(old for old, _ in past), k], 1),
        torch.cat([*(old for _, old in past), v], 1),
    )
    x = nn.functional.scaled_dot_product_attention(*(h.transpose(1, 2) for h in (q, k, v)))
    return attn.to_out[0](x.transpose(1, 2).flatten(2))


def make_causal(net):
    net.rope, net.rope.rope = Angles(), net.rope
    for i, block in enumerate(net.blocks):
        block.attn1.set_processor(read), block.register_forward_pre_hook(partial(own_layer, i))
    return net


def read_block(net, x_t, t, c, start, past, fresh=None):
    """x0_hat of a block (B, 16, n, h, w) at level t (B,), whose first frame is `start`. past: keys and values (B,
    tokens, heads, dim) of each cached frame and layer; fresh: a list for each layer, to leave its own."""
    net.rope.call = start, past, fresh
    return (denoiser(net)(x_t, t, c), setattr(net.rope, "call", None))[
        0
    ]  # the cache is the caller's to keep


def stream(net, noises, conds, levels, window, sink, u=1.0):
    """A causal student's rollout (Self-Forcing, Alg. 1), block by block: noise (B, 16, n, h, w), its condition -> x of
    it, its exit's level. Each is made by amd.backward_simulation, whose exit alone carries gradient, and read again,
    clean (t = 0), without gradient, for its keys and values. Attention sees the first `sink` and the last frames,
    `window` with the block (LongLive): no others are kept. A condition that is another object than the last one is a
    new prompt: the kept frames are read anew under it (LongLive's recache)."""
    kept, last, start = [], None, 0  # kept: (index, x, keys and values of each layer) of frames

    @torch.no_grad()
    def remember(x, start, c):  # -> kept and the frames of x, which are from start on
        fresh = [[] for _ in net.blocks]
        read_block(
            net,
            x,
            torch.zeros_like(x[:, 0, 0, 0, 0]),
            c,
            start,
            [states for *_, states in kept],
            fresh,
        )
        layers = [[h.chunk(x.shape[2], 1) for h in states] for (states,) in fresh]
        return kept + [
            (start + j, x[:, :, j : j + 1], [(k[j], v[j]) for k, v in layers])
            for j in range(x.shape[2])
        ]

    for z, c in zip(noises, conds, strict=False):
        n = z.shape[2]
        if last:
            kept = remember(*last)
        if last and last[2] is not c:
            parts, kept = (
                [
                    part[i : i + n]
                    for part in (kept[:sink], kept[sink:])
                    for i in range(0, len(part), n)
                ],
                [],
            )
            for part in parts:
                kept = remember(torch.cat([x for _, x, _ in part], 2), part[0][0], c)
        kept = kept[:sink] + kept[max(sink, len(kept) - (window - sink - n)) :]
        denoise = partial(read_block, net, start=start, past=[states for *_, states in kept])
        x, level, *_ = amd.backward_simulation(denoise, z, c, levels, u)
        yield x, level
        last, start = (x.detach(), start, c), start + n


def rollout(args, net, conds, u=1.0):
    """Conditions that take turns, a block at least -> x and its exit's level, block by block, or all at once."""
    text, size, N = (
        conds[0]["text"],
        (args.frames, *(v // 8 for v in args.size)),
        args.student_steps,
    )
    levels = [
        5 * s / (1 + 4 * s) for s in (1 - i / N for i in range(N))
    ]  # warped by shift 5: 1, .9375, .8333, .625
    z = torch.randn(len(text), net.config.out_channels, *size, device=text.device)
    if args.mode == "bidirectional":
        return [amd.backward_simulation(denoiser(net), z, conds[0], levels, u)[:2]]
    n = len(blocks := z.split(args.block, 2))
    return stream(
        net,
        blocks,
        [conds[i * len(conds) // n] for i in range(n)],
        levels,
        args.window,
        args.sink,
        u,
    )


# ------------------------------------------------------------------------------------------------------ reward and data
MARKS = [f"<|{k}_reward|>" for k in ("VQ", "MQ", "TA")]
ZSCORE = dict(
    VQ_mean=3.6757, VQ_std=2.2476, MQ_mean=1.1646, MQ_std=1.3811, TA_mean=2.8105, TA_std=2.5121
)
SOURCE = (
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/219ab9db64c045e5181a2202d11f686439351292/"
)


def random_qwen(tiny):
    """Qwen2-VL but for its language head, with its processor, at random: of 2B's shape, or the same classes, tiny."""
    T, letters = (
        lib("transformers"),
        [*lib("transformers.convert_slow_tokenizer").bytes_to_unicode().values()],
    )
    special = [
        f"<|{k}|>"
        for k in "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    ]
    words = T.Qwen2Tokenizer(vocab={k: i for i, k in enumerate(letters + special)}, merges=[])
    words.add_tokens(special, special_tokens=True)
    at = {
        f"{k[2:-2].replace('_pad', '')}_token_id": words.convert_tokens_to_ids(k)
        for k in special[3:]
    }
    text = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    if not tiny:
        text = dict(zip(text, (1536, 8960, 28, 12, 2), strict=True))
    eye = dict(hidden_size=text["hidden_size"]) | (
        dict(depth=2, embed_dim=32, num_heads=2) if tiny else {}
    )
    text |= dict(
        vocab_size=len(words),
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3] if tiny else [16, 24, 24]
        ),
    )
    chat = "{% for c in messages[0].content %}{{ c.text if c.type == 'text' else '<|video_pad|>' }}{% endfor %}"
    return T.Qwen2VLModel(
        T.Qwen2VLConfig(text_config=text, vision_config=eye, **at)
    ), T.Qwen2VLProcessor(
        T.Qwen2VLImageProcessor(), words, T.Qwen2VLVideoProcessor(), chat_template=chat
    )


def load_videoalign(args, device):
    """-> rate(frames (T, 3, H, W) uint8 at 16 a second, prompt): VQ, MQ, TA (3,), normalised. ValueError: bad files."""
    T, folder = lib("transformers"), args.videoalign
    if args.dry_run and not folder:
        spec, words = (
            dict(data_config={}),
            "Rate <|VQ_reward|> and <|MQ_reward|> and {text_prompt} <|TA_reward|>",
        )
        net, processor = drawn(lambda: random_qwen(args.dry_run == "tiny"), device)
        rows = torch.ones(1, net.config.text_config.hidden_size)
    else:
        folder = folder or Path(lib("huggingface_hub").snapshot_download("KwaiVGI/VideoReward"))
        spec, name = json.loads((folder / "model_config.json").read_text()), "prompt_template.py"
        code = (
            (folder / name).read_bytes()
            if (folder / name).exists()
            else urlopen(SOURCE + name, timeout=60).read()
        )
        words = next(
            node.value.value
            for node in ast.parse(code).body
            if isinstance(node, ast.Assign)  # read, not run
            and node.targets[0].id == "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
        )
        base = spec["model_config"]["model_name_or_path"]
        net, processor = (
            T.Qwen2VLModel.from_pretrained(base, dtype=torch.float),
            T.AutoProcessor.from_pretrained(base),
        )
    processor.tokenizer.add_tokens(MARKS, special_tokens=True)
    net.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    if folder:
        rows = read_videoalign(folder, spec, net)
    net, rows = (
        net.to(device, running.half(device)).eval().requires_grad_(False),
        rows.to(device, running.half(device)),
    )
    marks = torch.tensor(processor.tokenizer.convert_tokens_to_ids(MARKS), device=device)
    z, data = (
        ZSCORE | (spec.get("inference_config") or {}),
        dict(fps=2, max_frame_pixels=200_704) | spec["data_config"],
    )
    mean, std = (
        torch.tensor([z[f"{k}_{of}"] for k in ("VQ", "MQ", "TA")], device=device)
        for of in ("mean", "std")
    )

    @torch.no_grad()
    def rate(frames, prompt):
        chat = [dict(type="video"), dict(type="text", text=words.format(text_prompt=prompt))]
        text = processor.apply_chat_template(
            [dict(role="user", content=chat)], tokenize=False, add_generation_prompt=True
        )
        see = watch(frames, data["fps"], data["max_frame_pixels"])
        c = processor(
            text=[text], videos=[see], do_resize=False, do_sample_frames=False, return_tensors="pt"
        )
        places = torch.arange(c["input_ids"].shape[1], device=device).expand(
            3, 1, -1
        )  # in a row, not by M-RoPE: so
        h = net(**c.to(device), position_ids=places).last_hidden_state[
            0
        ]  # VideoAlign was trained (transformers 4.45)
        logits = (
            h[torch.isin(c["input_ids"][0], marks)] @ rows.T
        ).float()  # of three rows each mark has its own
        return ((logits[:, 0] if len(rows) == 1 else logits.diagonal()) - mean) / std

    return rate


def read_videoalign(folder, spec, net):
    """Give net the newest checkpoint, its LoRA added up -> the head's rows (1 or 3, D). Old keys and new will do."""
    path = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]), default=folder)
    whole, state, weights = (path / "model.pth").exists(), {}, net.state_dict()
    for name in (
        ["model.pth"] if whole else ["non_lora_state_dict.pth", "adapter_model.safetensors"]
    ):
        for k, v in read_file(path / name).items():
            k = (
                re.sub(r"\.(default|base_layer)(?=\.)", "", k)
                .removeprefix("base_model.model.")
                .removeprefix("model.")
            )
            own = k.split(".")[0] in ("visual", "language_model", "rm_head", "lm_head")
            state[k if own else f"language_model.{k}"] = v.float()
    for down in [k for k in state if k.endswith("lora_A.weight")]:
        k, up = down.replace("lora_A.", ""), state.pop(down.replace("lora_A", "lora_B"))
        scale = spec["peft_lora_config"]["lora_alpha"] / up.shape[1]
        state[k] = state.get(k, weights.get(k, 0)) + scale * up @ state.pop(down)
    rows, _ = state.pop("rm_head.weight", None), state.pop("lm_head.weight", None)
    odd = {*state} - {*weights} or whole and {*weights} - {*state}
    if odd or rows is None:
        raise ValueError(f"{path} is no VideoReward: see {min(odd or ['rm_head.weight'])}")
    return (net.load_state_dict(weights | state), rows)[1]


def read_file(path):
    return (
        lib("safetensors.torch").load_file(path)
        if path.suffix == ".safetensors"
        else torch.load(path, "cpu", weights_only=True)
    )  # no code is run


def watch(frames, fps=2.0, most=200_704):
    """VideoAlign's view of frames (T, 3, H, W) uint8 at 16 a second: `fps` of them, an even number, at least 4 if there
    are, resized to multiples of 28 and `most` pixels. ValueError: a single frame."""
    total = len(frames)
    if total < 2:
        raise ValueError("VideoAlign rates motion, and there is one frame: give --frames 2 or more")
    n = 2 * round(min(max(total / FPS * fps, 4), total // 2 * 2) / 2)
    frames = frames[torch.linspace(0, total - 1, n).round().long()]
    smart = lib("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    size = smart(*frames.shape[2:], 28, 100_352, most)
    T = lib(
        "torchvision.transforms"
    )  # not v2, whose uint8 path gives other pixels than VideoAlign's
    bicubic = T.InterpolationMode.BICUBIC
    return T.functional.resize(frames, list(size), bicubic, antialias=True)


OURS = [
    f"{what} {where}"
    for what in ("A red fox runs", "An old sailor walks", "A paper boat drifts")
    for where in (
        "through falling snow",
        "along a harbour at dawn",
        "down a street in the rain",
        "past a train that arrives",
    )
]


def listed(row):
    return row["prompt"] if isinstance(row["prompt"], list) else [row["prompt"]]


def read_prompts(path):
    """Rows {prompt, name, image} of text, jsonl, json or csv; ours if path is None. ValueError: none, not UTF-8, too
    long. A list of prompts changes in mid-stream. The name: the official, short form of a prompt, for benchmarks."""
    if not path:
        return [dict(prompt=prompt, name=prompt, image=None) for prompt in OURS]
    each = lambda f: (line.strip() for line in f if line.strip())
    how = dict(
        csv=csv.DictReader,
        json=lambda f: list.__iter__(json.load(f)),
        jsonl=lambda f: map(json.loads, each(f)),
    )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [*how.get(path.suffix[1:], each)(file)]
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is not UTF-8 or no list: {e}") from None
    rows = [dict(row) if isinstance(row, dict) else dict(prompt=row) for row in rows or [""]]
    for i, row in enumerate(rows):
        prompt, at = (
            row.get("prompt", row.get("prompt_en")),
            row.get("image", row.get("image_name")),
        )
        row |= dict(
            prompt=prompt,
            name=row.get("prompt_shorter", prompt),
            image=at and str(path.parent / str(at)),
        )
        if not (
            listed(row)
            and all(isinstance(text, str) and 0 < len(text) <= 5000 for text in listed(row))
        ):
            raise ValueError(
                f"{path}, row {i + 1}: give 1 to 5,000 characters as its prompt (T5 reads 512 tokens)"
            )
    return rows


# ---------------------------------------------------------------------------------------------- optimizers and sharding
TARGETS = "to_q to_k to_v to_out.0 ffn.net.0.proj ffn.net.2".split()  # of a LoRA


def compiled(
    net,
):  # layer by layer; what `own_layer` picks is outside, else each layer were a program of its own
    torch._dynamo.config.recompile_limit = (
        64  # cached frames, batches, with and without graph, with and without LoRA
    )
    for block in net.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def adopt(net, path, fuse=True):
    """Give net the student in path: a run, a transformer's folder of diffusers, a LoRA, or a file with the keys of
    Self-Forcing or Wan. fuse: a LoRA into its weights, which bf16 would round. ValueError: none, another model."""
    path = path / "student" if (path / "student").exists() else path
    try:
        if path.is_file():
            state = read_file(path)
            for key in ("generator_ema", "generator", "model"):
                state = state.get(key, state)
            state = {
                k.replace("_fsdp_wrapped_module.", "").removeprefix("model."): v
                for k, v in state.items()
            }
            net.load_state_dict(
                lib("diffusers.loaders.single_file_utils").convert_wan_transformer_to_diffusers(
                    state
                )
            )
        elif (path / "config.json").exists():
            net.load_state_dict(
                lib("diffusers").WanTransformer3DModel.from_pretrained(path).state_dict()
            )
        else:
            if (path.parent / "config.json").exists() and (
                own := running.read_config(path.parent)["init"]
            ):
                adopt(net, Path(own))
            net.load_lora_adapter(path, use_safetensors=True), running.adapters(net).popitem()
            if fuse:
                net.fuse_lora(), net.unload_lora()
    except Exception as error:
        raise ValueError(f"{path} is no student of --model: take one ({error!s:.99})") from None


def networks(args, device):
    """-> student, fake, real; `blended`, the adapted teacher of magic. LoRAs share the tensors of one base."""
    kind, nets, rank = lib("diffusers").WanTransformer3DModel, {}, args.lora_rank
    keys = dict(in_channels=16, out_channels=16, text_dim=4096, image_dim=None)
    load = lambda name: (
        SIZES[name] if name in SIZES else kind.load_config(name, subfolder="transformer")
    )
    ours, theirs = (
        [load(name).get(k, usual) for k, usual in keys.items()]
        for name in (args.model, args.teacher)
    )
    if ours != theirs:
        raise ValueError(
            f"--teacher: {', '.join(keys)} are {theirs}, not {ours}: take one of its width"
        )
    place, whole = (
        torch.device("cpu") if running.ranks()[1] > 1 else device,
        running.half(device) if rank else torch.float32,
    )
    base, _ = (
        load_transformer(args.model, place, whole),
        torch.manual_seed(0),
    )  # adapters begin alike on all ranks

    def put(name, net):  # one after the other is sharded, layer by layer
        own = not rank or name == "real" and net is not base
        for p in net.parameters() if own and name in ("real", "blended") else ():
            p.data = p.data.to(running.half(device))
        nets[name] = (running.shard(net, net.blocks, running.half(device)) if own else net).to(
            device
        )
        for p in net.parameters() if rank else ():
            p.data = p.data.float() if p.requires_grad else p.data

    for name in ("student", "fake"):
        net = (
            copy.deepcopy(base)
            if (alone := name == "student" and args.init) or not rank
            else running.share(base)
        )
        if alone:
            adopt(net, args.init)
        if name == "student" and args.mode == "streaming":
            make_causal(net)
        if args.checkpointing:
            net.enable_gradient_checkpointing()
        if rank:
            net.add_adapter(lib("peft").LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
        put(name, net if rank else net.requires_grad_())
    if args.method == "magic":
        put("blended", running.share(net) if rank else copy.deepcopy(base))
    put(
        "real",
        base
        if args.teacher == args.model
        else load_transformer(args.teacher, place, running.half(device)),
    )
    for k in nets.keys() - {"blended"} if args.compile else ():
        compiled(nets[k])  # not it: its LoRA's scale moves
    return nets


def prepare(args, device):
    """-> a namespace of all names below: networks (nets, call), opts, ema, parts to save, train, generate, batch ..."""
    rows, (rank, world, _) = read_prompts(args.prompts), running.ranks()
    pipe, nets, seen = (
        load_pipeline(args, device, rows),
        networks(args, device),
        [],
    )  # seen: scores of an update
    call, rate = {k: denoiser(net) for k, net in nets.items()}, load_videoalign(args, device)
    encode, null = conditions(args, pipe, device)

    @torch.no_grad()
    def reward(x, c):
        videos = [
            torch.cat([*frames_of(pipe.vae, [part])], 2)[0].transpose(0, 1) for part in x.split(1)
        ]
        scores = torch.stack(
            [rate(v, rows[i]["prompt"]) for v, i in zip(videos, c["index"].tolist(), strict=True)]
        )
        seen[:] = [*seen, scores][-args.accum * args.fake_steps :]
        return (
            scores.sum(1)
            if args.reward == "overall"
            else scores[:, ["vq", "mq", "ta"].index(args.reward)]
        )

    def generate(c, u=1.0):
        x, exits = zip(*rollout(args, nets["student"], [c], vars(args).get("exit", u)), strict=True)
        return torch.cat(x, 2), exits[0]

    def adapt(r):
        if not args.lora_rank:
            amd.blend(nets["blended"], nets["real"], nets["fake"], r)
        for m in running.adapters(nets["blended"]).values():
            m.set_scale("default", r)
        return call["blended"]

    def batch(n, j):  # of all groups, what this rank and micro-batch have
        seeded = torch.Generator().manual_seed(amd.key(args.seed, n))
        index = torch.randint(
            len(rows), (args.batch // args.group,), generator=seeded
        ).repeat_interleave(args.group)
        index = index.view(world * args.accum, -1)[rank * args.accum + j]
        return encode([rows[i] for i in index.tolist()]) | dict(index=index)

    adam = (
        lib("bitsandbytes").optim.AdamW8bit
        if args.adam8bit
        else partial(torch.optim.AdamW, fused=True)
    )
    opts = [
        adam(
            [p for p in nets[name].parameters() if p.requires_grad],
            lr,
            betas=(0.0, 0.999),
            weight_decay=0.01,
        )
        for name, lr in (("student", args.lr), ("fake", args.fake_lr))
    ]
    train = partial(
        amd.train,
        amd.method(
            args.method, s=args.s, tau=args.tau, fade=max(1, args.steps // 2), unit_w=args.tau < 1
        ),
        generate,
        call["real"],
        call["fake"],
        batch,
        *opts,
        reward=reward,
        K=args.group,
        null=null,
        w=args.w,
        shift=5.0,
        adapt=adapt,
        accum=args.accum,
        fake_steps=args.fake_steps,
        update=running.update,
        ranks=running.ranks(),
        seed=args.seed,
    )
    ema = args.ema and running.EMA(nets["student"], args.ema)
    parts = dict(student=(nets["student"], opts[0], ema), fake=(nets["fake"], opts[1], None))
    return argparse.Namespace(**locals())


# ------------------------------------------------------------------------------------------------------------- training
def begin(args):  # OUT with its config.json; a run may go on to other --steps, on other ranks
    free = ["accum"] if (args.out / "student").exists() else ["accum", "steps"]
    return running.open_run(args.out, dict(vars(args), resume=None), args.resume, free)


def train(
    args, device
):  # --steps student updates; then OUT/student: a transformer's folder, or a LoRA
    if (args.out / "student").exists():
        return begin(args)  # done; or of another run, and it says so
    run, steps = prepare(args, device), args.steps
    start = running.load(out := begin(args), **run.parts)
    log, bar = (
        running.Log(out, args.batch, start),
        running.progress(total=steps, initial=start, desc=out.name),
    )
    for _, row in zip(range(start, steps), run.train(start=start), strict=False):
        if run.ema:
            run.ema.decay = args.ema * (row["step"] > args.ema_from)
            run.ema.update()
        due, scores = (
            lambda every, step=row["step"]: step % every == 0 or step == steps,
            torch.cat(run.seen).mean(0),
        )
        row |= dict(zip(("vq", "mq", "ta"), scores, strict=True))
        if due(args.log_every):
            bar.set_postfix(reward=log(row).get("reward"))
        (
            bar.update(),
            due(args.sample_every) and show(args, run, out / f"samples/step_{row['step']}"),
        )
        if due(args.save_every):
            running.save(out, row["step"], keep=2, **run.parts)
    export(args, run)


def export(
    args, run
):  # OUT/student, of the average if there is one, whole or not at all; OSError: no room
    net, new, _ = run.nets["student"], args.out / "student.unfinished", run.ema and run.ema.swap()
    D, tools = lib("diffusers"), lib("torch.distributed.checkpoint.state_dict")
    state = (
        lib("peft").get_peft_model_state_dict(net)
        if args.lora_rank
        else tools.get_model_state_dict(
            net, options=tools.StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    )
    if running.ranks()[0]:
        return
    with torch.device("meta"):
        whole = D.WanTransformer3DModel.from_config(net.config)
    try:
        if args.lora_rank:
            D.WanPipeline.save_lora_weights(new, state)
        else:
            whole.load_state_dict(state, assign=True), whole.save_pretrained(new)
    except Exception as error:
        raise OSError(f"{new} unwritable ({error!s:.99}): make room, then --resume") from None
    new.rename(args.out / "student")


@torch.no_grad()
def show(
    args, run, folder
):  # a video a rank, always of the same prompts and seeds, by the average if there is one
    run.ema and run.ema.swap(), torch.manual_seed(amd.key(args.seed, run.rank))
    x, _ = run.generate(run.encode([run.rows[run.rank % len(run.rows)]]))
    run.ema and run.ema.swap(), write_mp4(folder / f"{run.rank}.mp4", frames_of(run.pipe.vae, [x]))


# ----------------------------------------------------------------------------------------------------- sample and score
def listing(args):  # -> rows {path, prompt, ..} of what --layout wants, in order; each path once
    rows = [
        row | dict(path="videos/" + LAYOUTS[args.layout].format(i=i, k=k, name=row["name"]))
        for i, row in enumerate(read_prompts(args.prompts))
        for k in range(args.seeds)
    ]
    for row in rows:
        if row["path"].count("/") > 1 or len(row["path"].encode()) > 240:
            raise ValueError(
                f"{row['path']:.60}..: no file can be named so: give prompts and prompt_shorter, as csv"
            )
    return [*{row["path"]: row for row in rows}.values()]


@torch.no_grad()
def sample(args, device):
    """mp4 files to OUT/videos; any number of processes share them, each has its seed. OUT/videos.csv is for `score`."""
    rows, (rank, world, _), streams = listing(args), running.ranks(), args.mode == "streaming"
    pipe, net = (
        load_pipeline(args, device, rows),
        load_transformer(args.model, device, running.half(device)),
    )
    _, out, net = (
        adopt(net, args.init, fuse=False),
        begin(args),
        make_causal(net) if streams else net,
    )
    (encode, _), _ = conditions(args, pipe, device), args.compile and compiled(net)
    table = [
        f'"{row["path"]}","{" ".join(listed(row)).replace(chr(34), chr(34) * 2)}"' for row in rows
    ]
    if rank == 0:
        running.write(out / "videos.csv", "\n".join(["path,prompt", *table]))
    for row in running.progress(
        [row for row in rows[rank::world] if not (out / row["path"]).exists()]
    ):
        torch.manual_seed(amd.key(args.seed, row["path"]))
        conds = [encode([row | dict(prompt=text)]) for text in listed(row)]
        write_mp4(out / row["path"], frames_of(pipe.vae, (x for x, _ in rollout(args, net, conds))))


@torch.no_grad()
def score(args, device):
    """Print the mean of VideoAlign's scores x 100 over each folder that `sample` wrote, and its standard error."""
    rate = load_videoalign(args, device)
    for run in args.samples:
        with (run / "videos.csv").open(newline="", encoding="utf-8") as file:
            rows = [*csv.DictReader(file)]
        if not rows:
            raise ValueError(f"{run}/videos.csv lists no video")
        film = lambda path: torch.stack(
            [torch.as_tensor(v).permute(2, 0, 1) for v in lib("imageio").get_reader(path)]
        )
        r = torch.stack(
            [
                100 * rate(film(run / v["path"]).to(device), v["prompt"])
                for v in running.progress(rows)
            ]
        ).double()
        for of, v in zip(("VQ", "MQ", "TA", "Total"), [*r.T, r.sum(1)], strict=True):
            error = v.std().item() / len(r) ** 0.5 if len(r) > 1 else None
            print(json.dumps(dict(samples=str(run), of=of, mean=v.mean().item(), error=error)))


def speed(args, device):
    """Print what a rollout and an update take beside the bare passes they need, frames a second, the GPU's memory."""
    args.exit, cuts = 1.0, args.mode == "streaming"  # all rollouts take all steps
    run, k, n, off = prepare(args, device), args.accum, args.student_steps, torch.no_grad()
    clock = running.Clock()
    c, net, (real, fake) = run.batch(0, 0), run.nets["student"], map(run.call.get, ("real", "fake"))
    x, block, C = off(run.generate)(c)[0], args.block if cuts else args.frames, net.config
    t, c_two, kv = (
        0 * x[:, 0, 0, 0, 0] + 0.5,
        amd.pair(c, run.null(c)),
        torch.zeros(
            len(x),
            x[0, 0, 0].numel() // 4,
            C.num_attention_heads,
            C.attention_head_dim,
            device=device,
            dtype=running.half(device),
        ),
    )
    held = [
        min(i, args.window - block) if cuts else 0 for i in range(0, args.frames, block)
    ]  # frames in the cache

    def passes(held):
        for m in held:
            yield (
                run.call["student"](x, t, c)
                if not cuts
                else read_block(net, x[:, :, :block], t, c, m, [[(kv, kv)] * len(net.blocks)] * m)
            )

    for name, call in dict(
        forward=off(lambda: [*passes(held)]),
        clean=off(lambda: [*passes(held[:-1])]),
        graph=lambda: [y.square().mean().backward() for y in passes(held)],
        fake=off(lambda: fake(x, t, c)),
        fake_graph=lambda: fake(x, t, c).square().mean().backward(),
        adamw=run.opts[1].step,
        real=off(lambda: real(torch.cat([x, x]), torch.cat([t, t]), c_two)),
        reward=lambda: run.reward(x, c),
        rollout=off(lambda: run.generate(c)),
        video=off(lambda: [*frames_of(run.pipe.vae, (y for y, _ in rollout(args, net, [c])))]),
    ).items():
        clock(name, call)
    one, three = (
        clock(f"update with {i} of the fake", partial(next, run.train(fake_steps=i)))
        for i in (1, 3)
    )
    fakes, two = (
        dict(forward=n * k, clean=k, reward=k, fake_graph=k, adamw=1),
        1 + (k > 1),
    )  # accum > 1 rolls out twice
    both = fakes | dict(
        forward=(n * two - 1) * k, clean=two * k, graph=k, real=k, fake_graph=k, adamw=2
    )
    clock.ratio("rollout", clock.seconds["rollout"], dict(forward=n, clean=1))
    clock.ratio("fake update", (three - one) / 2, fakes)
    clock.ratio("student and fake update", one, both)
    fps = [
        round(len(x) * (4 * args.frames - 3) / clock.seconds[name], 2)
        for name in ("rollout", "video")
    ]
    running.say(
        f"videos: {len(x)}; frames a second, without and with the VAE: {fps}; peak {running.peak_gib():.1f} GiB"
    )


def main(args):
    """ValueError for what cannot work, before anything is written or downloaded."""
    counts = "batch accum group fake_steps student_steps steps frames block log_every save_every sample_every seeds"
    bad = [k for k in (*counts.split(), "lr", "fake_lr", "w") if not vars(args)[k] > 0]
    world, trains, streams = (
        int(os.environ.get("WORLD_SIZE", 1)),
        args.task == "train",
        args.mode == "streaming",
    )
    rows = listing(args) if args.task == "sample" else read_prompts(args.prompts) if trains else ()
    files = [args.init, args.videoalign, *(args.samples or ()), *(row["image"] for row in rows)]
    lost = [str(path) for path in files if path and not Path(path).exists()]
    for wrong, fix in (
        (bad, f"choose {', '.join(bad)} above 0"),
        (lost, f"no such file or folder: {', '.join(lost[:3])}"),
        (
            not 0 <= args.ema < 1
            or min(args.lora_rank, args.sink) < 0
            or any(v % 16 or v < 16 for v in args.size),
            "choose --ema in [0, 1), --lora-rank and --sink of at least 0, --size of multiples of 16",
        ),
        (streams and args.frames % (args.block or 1), "choose --frames as a multiple of --block"),
        (
            streams and args.window < args.sink + args.block,
            "choose --window of at least --sink plus --block",
        ),
        (
            not 1 + trains <= args.frames <= 1024,
            "choose --frames of 2, VideoAlign rates motion, to Wan's 1,024",
        ),
        (
            (trains or not streams) and any(len(listed(row)) > 1 for row in rows),
            "only streams change their prompt",
        ),
        (
            trains and args.adam8bit and world > 1 and not args.lora_rank,
            "--adam8bit: give --lora-rank, or one GPU",
        ),
        (
            trains and args.batch % (world * args.accum or 1),
            f"--batch: take a multiple of {world} ranks x --accum",
        ),
        (
            trains and args.method == "magic" and args.teacher != args.model,
            "magic: give --teacher what --model is",
        ),
        (
            args.task == "sample" and not args.init,
            "give --init: a run, a transformer's folder, a LoRA, a .pt",
        ),
        (
            args.task == "score" and (not args.samples or world > 1),
            "give --samples, of sample, to one process",
        ),
        (args.out.is_file(), f"--out {args.out} is a file: choose a folder"),
        (
            args.task != "score" and args.dry_run != "tiny" and not torch.cuda.is_available(),
            "no GPU is seen: on a CPU try --dry-run tiny",
        ),
    ):
        running.require(not wrong, fix)
    amd.method(args.method, s=args.s, tau=args.tau)
    if trains:
        amd.group_advantage(torch.zeros(args.batch), args.group)
    job = (
        speed
        if args.dry_run == "full" and trains
        else dict(train=train, sample=sample, score=score)[args.task]
    )
    device = running.launch()
    if args.task != "score" and running.together((args.out / "config.json").exists()):
        begin(args)  # a folder that cannot be used is refused before anything is loaded
    job(args, device)
    if job in (train, sample) and running.ranks()[0] == 0:
        print(f"see {args.out}")


if __name__ == "__main__":
    running.run(main, parse, "take --offload-text, --lora-rank 64 --adam8bit, a smaller --teacher")
