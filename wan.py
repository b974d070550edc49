"""AMD on Wan2.1, text or image to video in four steps: the paper's Tables 5, 6, 10, 11 and Fig. 15.

    torchrun --nproc-per-node 8 wan.py                            # a student that streams
    python wan.py --teacher T2V-1.3B --lora-rank 64 --adam8bit --offload-text    # one of 24 GB
    torchrun --nproc-per-node 8 wan.py --mode bidirectional --lora-rank 64 \\
        --model I2V-14B-480P --prompts rows.jsonl                 # a student that makes all at once
    torchrun --nproc-per-node 8 wan.py sample --init runs/wan --layout vbench \\
        --prompts vbench.csv --out runs/vbench
    python wan.py score --samples runs/vbench                     # by VideoAlign
    python wan.py --dry-run full                                  # speed and memory
    python wan.py --dry-run tiny                                  # all of it on a CPU

Weights are downloaded on first use. A stream is LongLive's first stage, whose start and prompts are
Self-Forcing's. The reward is VideoAlign. VBench's total in Table 5: LongLive 81.42, AMD 82.21.
"""

import argparse
import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import amd
import running
from parts import causal_wan, rewards, tiny, videoalign, videos, wan_net, wan_students
from parts.images import open_image
from parts.prompts import (
    VIDEO_LAYOUTS,
    digest,
    read_prompts,
    read_video_prompts,
    video_layout,
    videos_csv,
)
from parts.unet import index_of

torch.set_float32_matmul_precision("high")

# -------------------------------------------------------------------------------------------- flags
HUB = "Wan-AI/Wan2.1-{}-Diffusers"
LONGEST_LIST = 100_000  # characters of a video's prompts in videos.csv
VIDPROM = Path(wan_students.SELF_FORCING, "vidprom_filtered_extended.txt")  # on the hub

STREAMING = dict(  # LongLive's first stage: its 700 updates of the fake are 140 of the student
    model="T2V-1.3B",
    teacher="T2V-14B",
    batch=8,
    group=8,
    fake_steps=5,
    student_steps=4,
    steps=140,
    lr=2e-6,
    fake_lr=4e-7,
    lora_rank=0,
    ema_from=40,
    frames=21,
    size=[480, 832],
    block=3,
    window=12,
    sink=3,
    log_every=1,
    sample_every=20,
    save_every=20,
)
BIDIRECTIONAL = STREAMING | dict(model="T2V-14B", teacher=None, steps=160, lr=5e-7, fake_lr=5e-7)
MODES = dict(streaming=STREAMING, bidirectional=BIDIRECTIONAL)
LORA_LR, LORA_FAKE_LR = 1e-5, 2e-6  # LongLive's second stage
DRY = dict(
    full=dict(teacher=None, batch=2, group=2),
    tiny=dict(
        model="tiny",
        teacher=None,
        frames=9,
        window=6,
        size=[32, 32],
        batch=4,
        group=4,
        accum=1,
        fake_steps=2,
        steps=4,
        ema_from=1,
        sample_every=4,
        save_every=2,
    ),
)
OF_A_RUN = ("mode", "model", "size", "student_steps", "block", "window", "sink")  # samples have it


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = running.Parser(__doc__)
    shared, groups = parser.shared, parser.groups
    parser.add_argument("task", nargs="?", choices=["train", "sample", "score"], default="train")

    method = groups["method"]
    offered = [name for name in amd.METHODS if name not in ("dmd2", "dmdr")]
    shared("method", "amd", choices=offered, default="amd")
    method.add_argument("--mode", choices=MODES, help="the student's (streaming)")
    shared("s", ".5", default=0.5)
    shared("tau", "1", default=1.0)
    shared("w", "4, which is Self-Forcing's 3", default=4.0)
    shared("group", "8, over ranks too")
    method.add_argument(
        "--t-per-sample",
        action="store_true",
        help="renoise each video to a level of its own, as LongLive does; else each group, Alg. 1",
    )
    method.add_argument(
        "--reward",
        choices=["overall", *videoalign.SCORES],
        default="overall",
        help="VideoAlign's sum, or its quality of images or motion, or alignment to text (overall)",
    )
    shared("student-steps", "4")
    shared("exit-aware", "on", default=True)
    shared("fake-steps", "LongLive: 5")
    method.add_argument("--block", type=int, help="latent frames of a block (LongLive: 3)")
    method.add_argument(
        "--window", type=int, help="latent frames that attention sees (LongLive: 12)"
    )
    method.add_argument("--sink", type=int, help="first latent frames among them (LongLive: 3)")

    shared("batch", "8")
    shared("accum", "as many as make micro-batches of 1")
    shared("steps", "LongLive: 140; bidirectional 160")
    shared("lr", f"LongLive: 2e-6; bidirectional 5e-7; of a LoRA {LORA_LR:g}")
    shared("fake-lr", f"LongLive: 4e-7; bidirectional 5e-7; of a LoRA {LORA_FAKE_LR:g}")
    shared("ema", ".99", default=0.99)
    groups["optimisation"].add_argument(
        "--ema-from", type=int, help="update after which the average begins (LongLive: 40)"
    )
    shared("lora-rank", "0")
    shared("adam8bit")
    shared("checkpointing", default=True)
    shared("compile", default=torch.cuda.is_available())
    shared("offload-text", "VideoAlign, too")
    shared("seed", "0", default=0)

    data = groups["data"]
    shared("dry-run", choices=[*DRY])
    data.add_argument(
        "--model",
        help="student and fake: T2V-1.3B (streaming), T2V-14B (bidirectional), I2V-14B-480P, or"
        " any Wan2.1 of diffusers, on the hub or in a folder",
    )
    data.add_argument("--teacher", help="the same (T2V-14B; bidirectional: --model)")
    data.add_argument("--videoalign", type=Path, help="folder of VideoReward (downloaded)")
    shared("init", "or a transformer's folder, a LoRA, a .pt; Self-Forcing's ode_init.pt")
    shared("prompts", "text, csv, jsonl or json; Self-Forcing's of VidProM; sample: ours")
    data.add_argument(
        "--names", type=Path, help="text file of short prompts, which name the videos of --prompts"
    )
    data.add_argument(
        "--images", type=Path, help="folder of the images of --prompts (that of the file)"
    )
    data.add_argument("--size", type=int, nargs=2, help="height and width in pixels (480 832)")
    data.add_argument("--frames", type=int, help="latent frames (21, which are 81 frames)")

    shared("out", "runs/wan; sample: runs/videos")
    shared("resume")
    shared("log-every", "1")
    shared("sample-every", "20")
    shared("save-every", "20")

    shared("samples", "folders of sample", nargs="+")
    shared("layout", "flat", choices=VIDEO_LAYOUTS, default="flat")
    groups["sampling"].add_argument("--seeds", type=int, help="videos of a prompt (5; flat 1)")
    return fill(parser.parse_args(argv))


def fill(args: argparse.Namespace) -> argparse.Namespace:
    """Set the flags that were not given, by the mode, by the run, and by each other."""
    if args.task == "sample" and args.init:
        config = running.config_of_student(args.init)
        running.fill(args, {name: config[name] for name in OF_A_RUN if name in config})
    running.fill(args, dict(mode="streaming"))
    defaults = MODES[args.mode] | DRY.get(args.dry_run, {})
    if args.lora_rank:
        defaults = defaults | dict(lr=LORA_LR, fake_lr=LORA_FAKE_LR)
    name = "videos" if args.task == "sample" else args.dry_run or "wan"
    running.fill(args, defaults | dict(out=Path("runs", name)))
    running.fill(
        args,
        dict(
            teacher=args.model,
            accum=running.micro_batches(args.batch, most=1),
            seeds=1 if args.layout == "flat" else 5,
        ),
    )
    args.model = full_name(args.model, args.dry_run)
    args.teacher = full_name(args.teacher, args.dry_run)
    if args.task == "train" and not args.dry_run:
        if args.mode == "streaming" and args.model == HUB.format("T2V-1.3B"):
            running.fill(args, dict(init=wan_students.ODE_INIT))
        if "I2V" not in args.model:
            running.fill(args, dict(prompts=VIDPROM))
    return args


def full_name(model: str, dry_run: str | None) -> str:
    """T2V-1.3B and its like -> the name on the hub; in a full dry run the size."""
    if not re.match("[TI]2V-", model) or Path(model).is_dir():
        return model
    running.require(
        dry_run != "full" or model.startswith("T2V"),
        "--dry-run full has text to video only: give T2V-1.3B or T2V-14B",
    )
    return model.split("-")[1] if dry_run == "full" else HUB.format(model)


# ----------------------------------------------------------------------------------------- networks
NEGATIVE = (  # Wan's own
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
SHIFT = 5.0  # of noise levels, the student's and those of renoising


def load_pipeline(args: argparse.Namespace, device: torch.device):
    """diffusers' pipeline of --model but for its transformer; of random weights for a dry run.

    Its VAE decodes in half precision on a GPU, as LongLive's does. It encodes images in float32.
    """
    half = running.half(device)
    if args.model not in tiny.WAN_SIZES:
        pipe = wan_net.load_pipeline(args.model, device, default=half, vae=torch.float32)
        if not hasattr(pipe, "encode_image"):
            pipe.vae.to(half)
        return offloaded(args, pipe)
    torch.manual_seed(0)  # random weights are alike on all ranks, and when a run goes on
    size = "tiny" if args.model == "tiny" else "full"
    with device, running.default_dtype(half):
        return offloaded(args, tiny.wan_pipeline(size))


def offloaded(args: argparse.Namespace, pipe):
    """A pipeline whose text encoder lives on the CPU, if --offload-text says so."""
    if args.offload_text:
        pipe.text_encoder.to("cpu")
        pipe.text_encoder.tie_weights()  # its embedding is one tensor, however it was moved
    return pipe


def load_transformer(model: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen transformer; of random weights for a dry run."""
    if model not in tiny.WAN_SIZES:
        return wan_net.load_transformer(model, device, dtype)
    torch.manual_seed(0)
    with device, running.default_dtype(dtype):
        return tiny.wan_transformer(model)


def levels_of(args: argparse.Namespace) -> list[float]:
    """Where the student's steps begin: 1, .9375, .8333, .625 if they are four."""
    count = args.student_steps
    return [amd.shifted(1 - i / count, SHIFT) for i in range(count)]


def denoiser(net: nn.Module) -> amd.Denoiser:
    """A transformer's guess of clean latents; an exit is told to a fake teacher only."""

    def velocity(x_t, t, c):
        x = torch.cat([x_t, c["y"]], 1) if "y" in c else x_t
        with running.autocast(x), wan_net.told(net, c.get("exit")):
            return net(x, 1000 * t, c["text"], c.get("image")).sample

    return amd.x0_from_flow(velocity)


def networks(args: argparse.Namespace, device: torch.device) -> dict[str, nn.Module]:
    """student, fake, real and, for an adapted teacher, blended.

    LoRAs stand on one base, but for a student that starts from --init. Whole transformers are
    copied, moved and sharded one after the other; several processes read them on the CPU.
    """
    lora = args.lora_rank
    place = device if running.ranks().size == 1 else torch.device("cpu")
    half = running.half(device)
    base = load_transformer(args.model, place, half if lora else torch.float32)
    torch.manual_seed(0)  # adapters begin alike on all ranks
    nets = {}
    for name in ("student", "fake"):
        starts = name == "student" and args.init
        net = running.share(base) if lora and not starts else copy.deepcopy(base)
        if starts:
            wan_students.adopt(net, args.init)
        if lora:
            wan_net.add_lora(net, lora)
        else:
            net.requires_grad_()
        if name == "student" and args.mode == "streaming":
            causal_wan.make_causal(net)
        if name == "fake" and args.exit_aware and args.student_steps > 1:
            wan_net.tell_exits(net)
        if args.checkpointing:
            net.enable_gradient_checkpointing()
        nets[name] = placed(args, net, device)
    if args.method == "magic":
        if lora:
            nets["blended"] = running.share(nets["fake"])
        else:
            blended = wan_net.cast(copy.deepcopy(base), half)
            nets["blended"] = placed(args, blended, device)
    if args.teacher != args.model:
        real = load_transformer(args.teacher, place, half)
        nets["real"] = placed(args, real, device)
    elif lora:
        nets["real"] = base.to(device)
    else:
        nets["real"] = placed(args, wan_net.cast(base, half), device)
    if lora and args.compile:  # last, for a copy of a compiled block calls the one it is a copy of
        for net in (nets["student"], nets["fake"], base):
            wan_net.compile_blocks(net)
    return nets


def placed(args: argparse.Namespace, net: nn.Module, device: torch.device) -> nn.Module:
    """A transformer on its GPU; one without LoRAs is compiled and sharded."""
    if not running.adapters(net):
        if args.compile:
            wan_net.compile_blocks(net)
        running.shard(net, net.blocks, running.half(device))
    return net.to(device)


# --------------------------------------------------------------------------------------- conditions
class Conditions:
    """What the transformer is told of rows, which is encoded once an update.

    With --offload-text T5 lives on the CPU, and visits the GPU for that.
    """

    def __init__(self, args: argparse.Namespace, pipe, rows: list[dict], device: torch.device):
        self.pipe = pipe
        self.rows = rows
        self.device = device
        self.size = args.size
        self.frames = args.frames
        self.held = {}
        self.update = None
        (self.negative,) = self.texts([NEGATIVE])

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> list[Tensor]:
        """Prompts -> (512, D) of each, one by one, so that it does not hang on its company."""
        made = []
        with running.visit(self.device, self.pipe.text_encoder):
            for prompt in prompts:
                embeds, _ = self.pipe.encode_prompt(
                    prompt,
                    do_classifier_free_guidance=False,
                    max_sequence_length=512,
                    device=self.device,
                )
                made.append(embeds[0])
        return made

    @torch.no_grad()
    def look(self, path: Path) -> dict[str, Tensor]:
        """An image -> y, its latents, grey frames after it and a mask; image, what CLIP sees."""
        height, width = self.size
        image = open_image(path)
        pixels = self.pipe.video_processor.preprocess(image, height=height, width=width)
        pixels = pixels.to(self.device, torch.float32)
        _, y = self.pipe.prepare_latents(
            pixels,
            batch_size=1,
            num_channels_latents=16,
            height=height,
            width=width,
            num_frames=4 * self.frames - 3,
            dtype=torch.float32,
            device=self.device,
            latents=torch.ones(1),  # of noise, which is drawn elsewhere
        )
        return dict(y=y[0], image=self.pipe.encode_image(image, self.device)[0].float())

    def of_image(self, row: dict) -> dict[str, Tensor]:
        """What is told of a row's image; nothing, if it has none."""
        return self.look(row["image"]) if "image" in row else {}

    def encode(self, row: dict, prompts: list[str]) -> list[dict[str, Tensor]]:
        """What is told of a row's image and each of these prompts; no batch."""
        image = self.of_image(row)
        return [dict(text=text) | image for text in self.texts(prompts)]

    def hold(self, indices: list[int], update: int | None = None) -> None:
        """Encode the rows that will be asked for, those of an update, and forget others."""
        self.held = {}
        held = sorted(set(indices))
        texts = self.texts([self.rows[i]["prompt"] for i in held])
        for i, text in zip(held, texts, strict=True):
            self.held[i] = dict(text=text) | self.of_image(self.rows[i])
        self.update = update

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        """The condition of held rows, index (B,) on the CPU."""
        held = [self.held[i] for i in index.tolist()]
        return batched(held) | dict(index=index)

    def null(self, c: dict[str, Tensor]) -> dict[str, Tensor]:
        """The negative prompt, with the same image."""
        return c | dict(text=self.negative.expand_as(c["text"]))


def batched(held: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of one sample each -> that of a batch of them."""
    return {k: torch.stack([c[k] for c in held]) for k in held[0]}


# ------------------------------------------------------------------------------------------- reward
class Reward:
    """VideoAlign of latents and their prompts (B,): the sum of its scores, or one of them.

    With --offload-text it lives on the CPU, and visits the GPU for each micro-batch.
    """

    def __init__(self, args: argparse.Namespace, pipe, rows: list[dict], device: torch.device):
        self.vae = pipe.vae
        self.rows = rows
        self.device = device
        self.rate = load_videoalign(args, device)
        if args.offload_text:
            self.rate.to("cpu")
        self.of = args.reward
        self.seen = []

    @torch.no_grad()
    def __call__(self, x: Tensor, c: dict[str, Tensor]) -> Tensor:
        films = [torch.cat([*videos.frames_of(self.vae, [part])], 2)[0] for part in x.split(1)]
        prompts = [self.rows[i]["prompt"] for i in c["index"].tolist()]
        with running.visit(self.device, self.rate):
            pairs = zip(films, prompts, strict=True)
            scores = torch.stack([self.rate(film.transpose(0, 1), text) for film, text in pairs])
        self.seen.append(scores)
        if self.of == "overall":
            return scores.sum(1)
        return scores[:, videoalign.SCORES.index(self.of)]

    def means(self) -> dict[str, Tensor]:
        """The mean of each score, since it was last asked."""
        seen = self.seen
        self.seen = []
        if not seen:
            return {}
        return dict(zip(videoalign.SCORES, torch.cat(seen).mean(0), strict=True))


def load_videoalign(args: argparse.Namespace, device: torch.device) -> videoalign.VideoAlign:
    """VideoAlign; of random weights for a dry run."""
    if not args.dry_run or args.videoalign:
        return videoalign.load_videoalign(device, args.videoalign)
    torch.manual_seed(0)
    with device, running.default_dtype(running.half(device)):
        return tiny.videoalign(args.dry_run).to(device)


# ------------------------------------------------------------------------------ what training needs
@dataclass
class Run:
    """Networks, optimizers, and the closures that connect them to amd.train.

    train  amd.train, but for the first step
    parts  what a checkpoint holds
    """

    pipe: object
    nets: dict[str, nn.Module]
    denoise: dict[str, amd.Denoiser]
    opt_student: torch.optim.Optimizer
    opt_fake: torch.optim.Optimizer
    ema: running.EMA | None
    conditions: Conditions
    reward: Reward
    generate: Callable
    batch: Callable
    train: Callable

    @property
    def parts(self) -> running.Parts:
        return dict(
            student=(self.nets["student"], self.opt_student, self.ema),
            fake=(self.nets["fake"], self.opt_fake, None),
        )


def prepare(args: argparse.Namespace, device: torch.device) -> Run:
    """Load the pipeline and the networks, and make the closures."""
    ranks, lora = running.ranks(), args.lora_rank
    rows = rows_of(args)
    check_model(args, rows)
    pipe = load_pipeline(args, device)
    if args.compile:
        videos.compile_decoder(pipe.vae)
    nets = networks(args, device)
    denoise = {name: denoiser(net) for name, net in nets.items()}
    conditions = Conditions(args, pipe, rows, device)
    reward = Reward(args, pipe, rows, device)
    levels = levels_of(args)

    def generate(c, u):
        z = noise(args, len(c["text"]), device)
        if args.mode == "bidirectional":
            return amd.backward_simulation(denoise["student"], z, c, levels, u)
        return causal_wan.rollout(
            nets["student"],
            denoise["student"],
            z,
            c,
            levels,
            block=args.block,
            window=args.window,
            sink=args.sink,
            u=u,
        )

    def drawn(n, j):
        """A row for each group of iteration n -> those of this rank and micro-batch."""
        groups = args.batch // args.group
        index = torch.randint(len(rows), (groups,), generator=running.seeded(args.seed, n, 0))
        index = index.repeat_interleave(args.group).view(ranks.size * args.accum, -1)
        return index[ranks.rank * args.accum + j]

    def batch(n, j):
        update = n // args.fake_steps
        if conditions.update != update:
            iterations = range(update * args.fake_steps, (update + 1) * args.fake_steps)
            indices = torch.cat([drawn(i, k) for i in iterations for k in range(args.accum)])
            conditions.hold(indices.tolist(), update)
        return conditions(drawn(n, j))

    def aware(c, t_G):
        return c | dict(exit=wan_net.exit_code(t_G, len(c["index"]), device))

    def adapt(r):
        if not lora:
            amd.blend(nets["blended"], nets["real"], nets["fake"], r)
        for layer in running.adapters(nets["blended"]).values():
            layer.set_scale("default", r)  # the fake's own adapters, weighed by r
        return denoise["blended"]

    adam = partial(torch.optim.AdamW, fused=True)
    if args.adam8bit:
        import bitsandbytes

        adam = bitsandbytes.optim.AdamW8bit
    opt_student, opt_fake = (
        adam(
            [p for p in nets[name].parameters() if p.requires_grad],
            lr,
            betas=(0.0, 0.999),
            weight_decay=0.01,
        )
        for name, lr in (("student", args.lr), ("fake", args.fake_lr))
    )
    train = partial(
        amd.train,
        method_of(args),
        student=generate,
        real=denoise["real"],
        fake=denoise["fake"],
        batch=batch,
        opt_student=opt_student,
        opt_fake=opt_fake,
        reward=reward,
        K=args.group,
        null=conditions.null,
        w=args.w,
        t_range=(0.0, 1.0),
        shift=SHIFT,
        t_clamp=(0.02, 0.98),
        t_per_sample=args.t_per_sample,
        adapt=adapt,
        aware=aware if args.exit_aware and args.student_steps > 1 else None,
        fake_steps=args.fake_steps,
        accum=args.accum,
        update=running.update,
        ranks=ranks,
        seed=args.seed,
    )
    ema = running.EMA(nets["student"], args.ema) if args.ema else None
    return Run(
        pipe=pipe,
        nets=nets,
        denoise=denoise,
        opt_student=opt_student,
        opt_fake=opt_fake,
        ema=ema,
        conditions=conditions,
        reward=reward,
        generate=generate,
        batch=batch,
        train=train,
    )


def rows_of(args: argparse.Namespace) -> list[dict]:
    """The rows of --prompts; Self-Forcing's are downloaded at first."""
    path = args.prompts
    if path == VIDPROM:
        path = rewards.download(wan_students.SELF_FORCING, VIDPROM.name)
    return read_video_prompts(path, args.images)


def noise(args: argparse.Namespace, count: int, device: torch.device) -> Tensor:
    """Latents of nothing but noise, (count, 16, frames, height / 8, width / 8)."""
    height, width = args.size
    return torch.randn(count, 16, args.frames, height // 8, width // 8, device=device)


def method_of(args: argparse.Namespace) -> amd.Method:
    """The row of Table 1; an adapted teacher is back at the real one after half of the updates."""
    return amd.method(
        args.method, s=args.s, tau=args.tau, fade=max(1, args.steps // 2), unit_w=args.tau < 1
    )


# -------------------------------------------------------------------------------------------- train
def open_run(args: argparse.Namespace) -> Path:
    """OUT with its config.json. Until it has ended a run may go on to other --steps."""
    free = [*running.FREE]
    if not (args.out / "student").exists() and method_of(args).phi is amd.fixed:
        free.append("steps")  # which say when an adapted teacher is itself again
    config = dict(vars(args), resume=None)
    if args.task == "train":
        config["prompts_digest"] = digest(rows_of(args))  # the file may be another one by now
    return running.open_run(args.out, config, args.resume, free)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """--steps student updates, from the newest checkpoint or --init; then OUT/student."""
    if running.together((args.out / "config.json").exists()):
        open_run(args)  # a folder that cannot be used is refused before anything is loaded
        if (args.out / "student").exists():
            running.say(f"{args.out} has its student: there is nothing to do")
            return
    running.require(
        not (args.out / "student").exists(),
        f"{args.out} has a student and no config.json of its run: choose another folder",
    )
    run, steps = prepare(args, device), args.steps
    out = open_run(args)
    start = running.load(out, **run.parts)
    running.require(start <= steps, f"{out} has {start} updates: give --steps of that or more")
    log = running.Log(out, args.batch, start)
    bar = running.progress(total=steps, initial=start, desc=out.name)
    for row in islice(run.train(start=start), steps - start):
        step = row["step"]
        if run.ema:
            run.ema.decay = args.ema if step > args.ema_from else 0.0
            run.ema.update()
        bar.update()
        row |= run.reward.means()
        if step % args.log_every == 0 or step == steps:
            row = log(row)
            bar.set_postfix({k: row[k] for k in ("reward", "g_norm") if k in row})
        if step % args.sample_every == 0 or step == steps:
            show(args, run, out / f"samples/step_{step}")
        if step % args.save_every == 0 or step == steps:
            running.save(out, step, keep=2, **run.parts)  # each of 37 GiB, if whole
    running.draw_log(out)
    if run.ema:
        with running.averaged(run.ema):
            export(args, run, out / "student_ema")
    export(args, run, out / "student")
    running.say(f"see {out}")


@torch.no_grad()
def show(args: argparse.Namespace, run: Run, folder: Path) -> None:
    """Write a video by each rank, always the same, by the average if there is one."""
    rank = running.ranks().rank
    index = torch.tensor([rank % len(run.conditions.rows)])
    run.conditions.hold(index.tolist())
    torch.manual_seed(amd.key(args.seed, rank))
    with running.averaged(run.ema):
        x = run.generate(run.conditions(index), 1.0).x
    videos.write_mp4(folder / f"{rank}.mp4", videos.frames_of(run.pipe.vae, [x]))


def export(args: argparse.Namespace, run: Run, path: Path) -> None:
    """Write the student as diffusers reads it: a transformer's folder, or a LoRA.

    It is whole, or not there at all. OSError: there is no room.
    """
    from diffusers import WanPipeline, WanTransformer3DModel
    from peft import get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    net, beside = run.nets["student"], path.with_name(f"{path.name}.unfinished")
    if args.lora_rank:
        state = get_peft_model_state_dict(net)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(net, options=options)
    if running.ranks().rank > 0:
        return
    try:
        if args.lora_rank:
            WanPipeline.save_lora_weights(beside, state)
        else:
            with torch.device("meta"):
                plain = WanTransformer3DModel.from_config(net.config)
            plain.load_state_dict(state, assign=True)
            plain.save_pretrained(beside)
    except Exception as error:
        raise OSError(f"{beside} unwritable ({error!s:.99}): make room, then --resume") from None
    shutil.rmtree(path, ignore_errors=True)  # of an attempt that found no room for its twin
    beside.rename(path)


# ------------------------------------------------------------------------------------------- sample
@torch.no_grad()
def sample(args: argparse.Namespace, device: torch.device) -> None:
    """Write mp4 files to OUT/videos, as --layout names them, and OUT/videos.csv, which lists them.

    Any number of processes share them, and each video has a seed of its own.
    """
    rows, ranks = rows_to_draw(args), running.ranks()
    artist = Artist(args, device, [row["of"] for row in rows])
    out = open_run(args)
    keep_list(out, rows)

    mine = rows[ranks.rank :: ranks.size]
    missing = [row for row in mine if not (out / "videos" / row["file"]).exists()]
    for row in running.progress(missing, desc="videos"):
        torch.manual_seed(amd.key(args.seed, row["file"]))
        blocks = artist.draw(row["of"])
        videos.write_mp4(out / "videos" / row["file"], videos.frames_of(artist.pipe.vae, blocks))
    running.say(f"see {out}")


def rows_to_draw(args: argparse.Namespace) -> list[dict]:
    """The videos of --layout: their files, and the row that each is of."""
    return video_layout(args.layout, args.prompts, args.seeds, args.names, args.images)


class Artist:
    """A student of --init that draws latents, streaming or all at once."""

    def __init__(self, args: argparse.Namespace, device: torch.device, rows: list[dict]):
        self.args = args
        self.device = device
        check_model(args, rows)
        self.pipe = load_pipeline(args, device)
        self.net = load_transformer(args.model, device, running.half(device))
        if args.init:
            wan_students.adopt(self.net, args.init, fuse=False)
        if args.mode == "streaming":
            causal_wan.make_causal(self.net)
        if args.compile:
            wan_net.compile_blocks(self.net)
            videos.compile_decoder(self.pipe.vae)
        self.denoise = denoiser(self.net)
        self.conditions = Conditions(args, self.pipe, rows, device)

    def draw(self, row: dict) -> Iterator[Tensor]:
        """Latents (1, 16, n, h, w) of a row, block by block. Prompts share the blocks equally."""
        args, z = self.args, noise(self.args, 1, self.device)
        prompts = row.get("prompts", [row["prompt"]])
        conds = [batched([c]) for c in self.conditions.encode(row, prompts)]
        if args.mode == "bidirectional":
            yield amd.backward_simulation(self.denoise, z, conds[0], levels_of(args)).x
            return
        blocks = z.split(args.block, 2)
        turns = [conds[i * len(conds) // len(blocks)] for i in range(len(blocks))]
        made = causal_wan.stream(
            self.net, self.denoise, blocks, turns, levels_of(args), args.window, args.sink
        )
        with contextlib.closing(made):
            for block in made:
                yield block.x


def keep_list(out: Path, rows: list[dict]) -> None:
    """Write OUT/videos.csv, paths and prompts, as VideoAlign reads them.

    ValueError: a run that is resumed was of other prompts, so its videos would get wrong ones.
    """
    path, text = out / "videos.csv", videos_csv(rows)
    same = not path.exists() or path.read_text(encoding="utf-8") == text
    running.require(
        running.together(same), f"{out} has videos of other prompts: choose another folder"
    )
    if running.ranks().rank == 0:
        running.write(path, text)


# -------------------------------------------------------------------------------------------- score
@torch.no_grad()
def score(args: argparse.Namespace, device: torch.device) -> None:
    """Print VideoAlign's means x 100 of folders that `sample` wrote, and their standard errors."""
    rate = load_videoalign(args, device)
    for folder in args.samples:
        rows = read_prompts(folder / "videos.csv", LONGEST_LIST)
        r = []
        for row in running.progress(rows, desc=str(folder)):
            path = folder / row.get("path", "videos.csv has no path")
            frames, fps = videos.read_video(path)
            running.require(len(frames) > 1, f"{path} is one picture, and VideoAlign rates motion")
            r.append(100 * rate(frames.to(device), row["prompt"], fps))
        r = torch.stack(r).double().cpu()
        for of, v in zip((*videoalign.SCORES, "total"), [*r.T, r.sum(1)], strict=True):
            error = v.std().item() / len(v) ** 0.5 if len(v) > 1 else None
            told = dict(samples=str(folder), of=of, videos=len(v), mean=v.mean().item())
            print(json.dumps(told | dict(error=error)))


# -------------------------------------------------------------------------------------------- speed
def speed(args: argparse.Namespace, device: torch.device) -> None:
    """Print what an update takes beside the bare calls that it needs, and the GPU's memory."""
    run, clock = prepare(args, device), running.Clock()
    c = run.batch(0, 0)
    real, fake = run.denoise["real"], run.denoise["fake"]
    with torch.no_grad():
        made = run.generate(c, 1.0)
    x = made.x
    t = torch.full((len(x),), 0.5, device=device)
    two = amd.pair(c, run.conditions.null(c))
    x2, t2 = torch.cat([x, x]), torch.cat([t, t])

    def last_exit(c, _u):
        return run.generate(c, 1.0)

    def exit_again():
        with torch.enable_grad():
            made.again().square().mean().backward()

    def fake_update():
        fake(x, t, c).square().mean().backward()

    def texts():
        run.conditions.update = None
        run.batch(0, 0)

    with torch.no_grad():
        rollout = clock("rollout", lambda: run.generate(c, 1.0))
        clock("real", lambda: real(x2, t2, two))
        clock("reward", lambda: run.reward(x, c))
    clock("exit", exit_again)
    clock("fake", fake_update)
    clock("texts", texts)
    clock("adamw", run.opt_fake.step)
    video = clock("video", lambda: [*videos.frames_of(run.pipe.vae, [x])])
    frames = len(x) * (4 * args.frames - 3)
    running.say(
        f"frames a second: {frames / rollout:.1f}, with the VAE {frames / (rollout + video):.1f}"
    )

    updates = run.train(student=last_exit)
    took = clock(f"update with {args.fake_steps} of the fake", partial(next, updates))
    # in the student's turn its exit is called again with a graph, whose backward pass is in `exit`
    parts, fake_steps = args.accum, args.fake_steps
    asked = fake_steps if method_of(args).senses else 1  # how often, for the reward
    needs = dict(texts=1, rollout=parts * fake_steps, exit=parts, real=parts)
    needs |= dict(fake=parts * fake_steps, reward=parts * asked, adamw=fake_steps + 1)
    clock.ratio(f"update of {args.batch}", took, needs)
    running.say(f"videos: {len(x)}; peak {running.peak_gib():.1f} GiB")


@torch.no_grad()
def speed_of_sample(args: argparse.Namespace, device: torch.device) -> None:
    """Print how many frames a second a student draws, without and with the VAE."""
    clock, row = running.Clock(), rows_of(args)[0]
    artist = Artist(args, device, [row])
    frames = 4 * args.frames - 3
    latents = clock("latents", lambda: [*artist.draw(row)])
    video = clock("video", lambda: [*videos.frames_of(artist.pipe.vae, artist.draw(row))])
    running.say(f"frames a second: {frames / latents:.1f}, with the VAE {frames / video:.1f}")
    running.say(f"peak {running.peak_gib():.1f} GiB")


# --------------------------------------------------------------------------------------------- main
def check(args: argparse.Namespace) -> None:
    """ValueError for what cannot work, before anything is written or downloaded."""
    counts = ("batch", "accum", "group", "fake_steps", "student_steps", "steps", "frames", "block")
    intervals = ("log_every", "save_every", "sample_every", "seeds")
    running.positive(args, *counts, *intervals, "w", "lr", "fake_lr")
    running.require(0 <= args.ema < 1, f"--ema {args.ema}: choose it in [0, 1)")
    running.require(args.lora_rank >= 0, "--lora-rank: choose 0 or more")
    running.require(args.sink >= 0, "--sink: choose 0 or more")
    running.require(
        all(side > 0 and side % 16 == 0 for side in args.size),
        "--size: choose multiples of 16",
    )
    running.require(not args.out.is_file(), f"--out {args.out} is a file: choose a folder")
    for path in (args.init, args.videoalign, args.names, args.images):
        there = path in (None, wan_students.ODE_INIT) or path.exists()
        running.require(there, f"{path}: there is no such file or folder")
    if args.mode == "streaming":
        running.require(
            args.frames % args.block == 0, f"--frames: choose a multiple of --block, {args.block}"
        )
        running.require(
            args.window >= args.sink + args.block,
            f"--window: choose at least --sink plus --block, {args.sink + args.block}",
        )
    {"train": check_train, "sample": check_sample, "score": check_score}[args.task](args)


def check_train(args: argparse.Namespace) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    parts = world * args.accum
    running.require(
        args.frames >= 2, "VideoAlign rates motion, and one latent frame is a picture: --frames 2"
    )
    running.require(
        not args.adam8bit or world == 1 or args.lora_rank,
        "--adam8bit: give --lora-rank, or one GPU",
    )
    running.require(
        args.batch % parts == 0, f"--batch {args.batch} of {parts} ranks x --accum: take a multiple"
    )
    running.require(
        args.method != "magic" or args.teacher == args.model,
        "magic moves the teacher towards the fake: give --teacher what --model is",
    )
    method_of(args)
    running.require(
        args.batch % args.group == 0, f"--batch {args.batch}: take a multiple of --group"
    )
    amd.group_advantage(torch.zeros(args.batch), args.group)
    if args.prompts != VIDPROM:
        running.require(
            not any("prompts" in row for row in rows_of(args)),
            "--prompts: only `sample` changes the prompt of a stream, so give one a row",
        )
    videos.require_mp4()


def check_sample(args: argparse.Namespace) -> None:
    running.require(
        args.init or args.dry_run, "give --init: a run, a transformer's folder, a LoRA or a .pt"
    )
    running.require(
        not (args.init and running.is_unfinished(args.init)),
        f"{args.init} has no student before its run has ended: finish it",
    )
    rows = rows_to_draw(args)
    running.require(
        args.mode == "streaming" or not any("prompts" in row["of"] for row in rows),
        "--prompts: only a stream changes its prompt, so give one a row",
    )
    if args.mode == "streaming":
        most = max(len(row["of"].get("prompts", [""])) for row in rows)
        running.require(
            most <= args.frames // args.block, f"a row has {most} prompts: give it as many blocks"
        )
    videos.require_mp4()


def check_score(args: argparse.Namespace) -> None:
    running.require(args.samples, "give --samples, folders of sample")
    videos.require_mp4()
    running.require(int(os.environ.get("WORLD_SIZE", 1)) == 1, "score is for one process")
    for folder in args.samples:
        path = folder / "videos.csv"
        running.require(path.exists(), f"{path}: there is no such file; sample writes it")


def check_model(args: argparse.Namespace, rows: list[dict]) -> None:
    """ValueError, unless --model, --teacher and the rows go together, by the models' small files.

    An image-to-video model has an image for each row, and others have none.
    """
    random, i2v = tiny.WAN_SIZES, False
    if args.model not in random:
        index = index_of(args.model)
        wan_net.require_wan21(args.model, index)
        i2v = wan_net.is_i2v(index)
    running.require(
        not i2v or args.mode == "bidirectional",
        f"{args.model} begins with an image, which a stream does not: give --mode bidirectional",
    )
    for row in rows:
        running.require(
            ("image" in row) == i2v,
            f"{args.model}: give rows {'with' if i2v else 'without'} an image",
        )
    if args.task == "train" and args.teacher != args.model and args.teacher not in random:
        wan_net.same_widths(args.model, args.teacher)
    if args.mode == "streaming" and args.model not in random:
        most = wan_net.config_of(args.model).get("rope_max_seq_len", 1024)
        running.require(
            args.frames <= most, f"--frames {args.frames}: {args.model} knows {most} positions"
        )


def main(args: argparse.Namespace) -> None:
    check(args)
    wan_net.quiet()
    device = running.launch()
    if args.task == "score":
        score(args, device)
    elif args.dry_run == "full" and args.task == "sample":
        speed_of_sample(args, device)
    elif args.dry_run == "full":
        speed(args, device)
    elif args.task == "sample":
        sample(args, device)
    else:
        train(args, device)


if __name__ == "__main__":
    running.run(main, parse, "take --offload-text, --lora-rank 64 --adam8bit, a smaller --teacher")
