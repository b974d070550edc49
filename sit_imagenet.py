"""AMD on SiT, class to image: the paper's Table 4 and Figs. 5, 6, on ImageNet at 256 pixels.

    torchrun --nproc-per-node 8 sit_imagenet.py --teacher SiT-XL-2-256x256.pt
    torchrun --nproc-per-node 8 sit_imagenet.py sample --teacher runs/imagenet --out runs/amd50k
    python sit_imagenet.py evaluate --samples runs/amd50k/samples.npz --ref ADM.npz
    python sit_imagenet.py --dry-run full  # speed and memory of SiT-XL/2 on this GPU
    python sit_imagenet.py --dry-run tiny  # both stages on a CPU, in seconds

The protocol is the paper's A.4: 3,000 updates of pure DMD, then 1,000 of AMD, DMD or DMDR, from a
teacher of SiT (github.com/willisma/SiT) or REPA (github.com/sihyun-yu/REPA). The reward is DINOv2's
linear classifier; 50,000 samples are evaluated as ADM does it. FID, sFID, IS of Table 4: DMD 3.557,
5.850, 314.4; DMDR 9.634, 7.354, 391.8; AMD 3.469, 5.746, 316.0. toy_images.py is the same in small.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import amd
import running
from parts import metrics, rewards, tiny
from parts.sit import SiT, dimensions, read_sit

torch.set_float32_matmul_precision("high")

LATENT_SCALE = 0.18215  # of sd-vae-ft-ema, whose latents have 8 pixels a side
VAE = "stabilityai/sd-vae-ft-ema"

# -------------------------------------------------------------------------------------------- flags
DEFAULTS = dict(
    model="XL/2",
    image_size=256,
    batch=512,
    lr=2e-5,
    fake_lr=2e-5,
    fake_steps=5,
    ema=0.99,
    base_steps=3000,
    steps=1000,
    sample_every=250,
    count=50_000,
)
DRY = dict(
    tiny=dict(
        model="tiny/2",
        image_size=64,
        batch=16,
        lr=1e-3,
        fake_lr=1e-3,
        fake_steps=2,
        ema=0.9,
        base_steps=2,
        steps=4,
        sample_every=2,
        count=8,
    ),
    full=dict(batch=64),
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = running.Parser(__doc__)
    shared, groups = parser.shared, parser.groups
    parser.add_argument("task", nargs="?", choices=["train", "sample", "evaluate"], default="train")

    rows = [name for name in amd.METHODS if name != "dmd2"]
    shared("method", "of stage two; amd", choices=rows, default="amd")
    shared("s", ".5", default=0.5)
    shared("tau", "1", default=1.0)
    shared("w", "1.25", default=1.25)
    shared("lam", "dmdr .05, DMDR's own", default=0.05)
    shared("group", "8", default=8)
    shared("student-steps", "1", default=1)
    shared("exit-aware", "on", default=True)
    shared("fake-steps", "5, as DMDR")

    shared("batch", "A.4: 512")
    shared("accum", "1", default=1)
    groups["optimisation"].add_argument(
        "--base-steps", type=int, help="updates of stage one, pure DMD (A.4: 3,000)"
    )
    shared("steps", "of stage two; A.4: 1,000")
    shared("lr", "A.4: 2e-5")
    shared("fake-lr", "2e-5")
    shared("ema", ".99")
    shared("compile", default=torch.cuda.is_available())
    shared("seed", "0", default=0)

    data = groups["data"]
    shared("dry-run", choices=[*DRY])
    data.add_argument("--teacher", type=Path, help="weights of SiT or REPA; sample: or a run")
    shared("init", "whose end stage two starts from, instead of a stage one")
    data.add_argument("--image-size", type=int, help="pixels (256)")
    data.add_argument("--model", help="size/patch, of S, B, L, XL and 2, 4, 8 (XL/2)")
    data.add_argument("--vae", default=VAE, help=f"of diffusers ({VAE})")

    shared("out", "runs/imagenet; sample: runs/samples")
    shared("resume")
    shared("log-every", "10", default=10)
    shared("save-every", "500", default=500)
    shared("sample-every", "250")

    sampling = groups["sampling"]
    sampling.add_argument("--count", type=int, help="images to sample (50,000)")
    sampling.add_argument(
        "--labels",
        choices=["random", "balanced"],
        default="random",
        help="classes of samples: random as SiT draws them, or as many of each (random)",
    )
    shared("chunk", "64", default=64)
    shared("samples", "an npz, or a folder of images; evaluate")
    sampling.add_argument("--ref", type=Path, help="evaluate: the same, of real images")

    args = parser.parse_args(argv)
    name = "samples" if args.task == "sample" else args.dry_run or "imagenet"
    return running.fill(args, DEFAULTS | DRY.get(args.dry_run, {}) | dict(out=Path("runs", name)))


# ----------------------------------------------------------------------------------------- networks
def load_teacher(args: argparse.Namespace, device: torch.device) -> SiT:
    """The network in --teacher, or a random one for a dry run."""
    if args.teacher:
        path = args.teacher / "student/sit.pt" if args.teacher.is_dir() else args.teacher
        return read_sit(path, args.model, args.image_size // 8).to(device)
    running.require(args.dry_run, "give --teacher, a file of SiT or REPA")
    torch.manual_seed(0)  # alike on all ranks, and when a run goes on
    net = SiT(args.model, args.image_size // 8)
    for p in net.parameters():
        nn.init.normal_(p, std=0.02)
    return net.to(device)


def load_decoder(args: argparse.Namespace, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w) in [-1, 1] and a little beyond."""
    if args.dry_run:
        torch.manual_seed(0)  # as in load_teacher
        vae = tiny.sd_vae(args.dry_run)
    else:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(args.vae)
    vae.to(device).eval().requires_grad_(False)
    return lambda x: vae.decode(x / LATENT_SCALE).sample.float()


def load_reward(
    args: argparse.Namespace, decode: Callable, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """The reward of latents x and classes y -> log p(y | image) (B,), by DINOv2's classifier."""
    if args.dry_run:
        torch.manual_seed(0)  # as in load_teacher
        classify = tiny.dinov2(args.dry_run).to(device)
    else:
        classify = rewards.load_dinov2(device)
    return rewards.class_reward(classify, decode)


def denoiser(net: SiT) -> amd.Denoiser:
    return amd.x0_from_flow(running.autocast(net.pos_embed)(net.__call__))


def levels(args: argparse.Namespace) -> list[float]:
    """The levels of the student's steps."""
    return [1 - i / args.student_steps for i in range(args.student_steps)]


@dataclass
class Run:
    """What training needs: networks, optimizers, and the closures that connect them to amd.train.

    train  amd.train, but for the method and the first step
    parts  what a checkpoint holds
    """

    student: SiT
    fake: SiT
    real: SiT
    opt_student: torch.optim.Optimizer
    opt_fake: torch.optim.Optimizer
    ema: running.EMA
    decode: Callable
    reward: Callable
    generate: Callable
    batch: Callable
    train: Callable

    @property
    def parts(self) -> running.Parts:
        return dict(
            student=(self.student, self.opt_student, self.ema),
            fake=(self.fake, self.opt_fake, None),
        )


def prepare(args: argparse.Namespace, device: torch.device) -> Run:
    """Load, copy, compile and shard the networks, and make the closures."""
    real = load_teacher(args, device).requires_grad_(False)
    decode = load_decoder(args, device)
    student = copy.deepcopy(real).requires_grad_(True)
    fake = copy.deepcopy(real).requires_grad_(True)
    aware_of_exits = args.exit_aware and args.student_steps > 1
    if aware_of_exits:
        fake.tell_exits(args.student_steps)
    nets = [student, fake, real]
    if args.method in ("dmdr", "magic"):
        blended = copy.deepcopy(real)  # for the adapted teacher
        nets.append(blended)
    for net in nets:
        if args.compile:
            for block in net.blocks:
                block.compile(dynamic=False)
        running.shard(net, net.blocks, torch.bfloat16 if device.type == "cuda" else None)

    # weight decay and clip are DMDR's
    adamw = partial(torch.optim.AdamW, weight_decay=0.01, fused=True)
    opt_student = adamw(student.parameters(), args.lr)
    opt_fake = adamw(fake.parameters(), args.fake_lr)
    ranks = running.ranks()
    shape = (real.channels, *[args.image_size // 8] * 2)

    def generate(y, u):
        z = torch.randn(len(y), *shape, device=device)
        return amd.backward_simulation(denoiser(student), z, y, levels(args), u)

    def batch(n, j):
        """A class for each group of the update -> those of this rank and micro-batch."""
        groups = args.batch // args.group
        y = torch.randint(real.classes, (groups,), generator=running.seeded(args.seed, n, 0))
        y = y.repeat_interleave(args.group).view(ranks.size * args.accum, -1)
        return y[ranks.rank * args.accum + j].to(device, non_blocking=True)

    def aware(y, t_G):
        return y, torch.full_like(y, levels(args).index(t_G))

    def adapt(r):
        amd.blend(blended, real, fake, r)
        return denoiser(blended)

    train = partial(
        amd.train,
        student=generate,
        real=denoiser(real),
        fake=denoiser(fake),
        batch=batch,
        opt_student=opt_student,
        opt_fake=opt_fake,
        K=args.group,
        null=real.null,
        w=args.w,
        adapt=adapt,
        aware=aware if aware_of_exits else None,
        fake_steps=args.fake_steps,
        accum=args.accum,
        update=partial(running.update, clip=1.0),
        ranks=ranks,
        seed=args.seed,
    )
    return Run(
        student=student,
        fake=fake,
        real=real,
        opt_student=opt_student,
        opt_fake=opt_fake,
        ema=running.EMA(student, args.ema),
        decode=decode,
        reward=load_reward(args, decode, device),
        generate=generate,
        batch=batch,
        train=train,
    )


# -------------------------------------------------------------------------------------------- train
@dataclass
class Stage:
    """A part of the training, in a folder of its own; base is the run that it starts from."""

    out: Path
    method: str
    steps: int
    base: Path | None = None


def train(args: argparse.Namespace, device: torch.device) -> None:
    """A.4: stage one, pure DMD, in OUT/base, if there is no --init; then stage two, by --method."""
    refuse_used(args, args.out)
    base = args.init
    if base is None and args.base_steps:
        base = args.out / "base"
        train_stage(args, Stage(base, "dmd", args.base_steps), device)
    train_stage(args, Stage(args.out, args.method, args.steps, base), device)
    running.say(f"see {args.out}")


def method_of(args: argparse.Namespace, stage: Stage) -> amd.Method:
    """The row of Table 1 that a stage trains by.

    DMDR adapts its teacher while it has no reward yet, so r is 0 in a stage two of dmdr.
    """
    hyper = dict(s=args.s, tau=args.tau, fade=max(1, stage.steps // 2))
    lam = args.lam if stage.method == "dmdr" else 0.0
    method = amd.method(stage.method, **hyper, lam=lam, unit_w=args.tau < 1)
    if stage.method == "dmdr" and stage.base:
        method = method._replace(phi=amd.fixed)
    return method


def train_stage(args: argparse.Namespace, stage: Stage, device: torch.device) -> None:
    """Train a stage to its end, from its newest checkpoint or its base; a finished one is left."""
    out, steps = stage.out, stage.steps
    refuse_used(args, out)
    if (out / "student/sit.pt").exists():
        return
    run, method = prepare(args, device), method_of(args, stage)
    open_run(args, out)
    for name in ("student", "samples"):
        (out / name).mkdir(exist_ok=True)
    start = running.load(out, **run.parts)
    running.require(start <= steps, f"{out} has {start} updates: give it that many or more")
    if start == 0 and stage.base:
        found = running.load(stage.base, **run.parts)
        running.require(found, f"{stage.base} has no checkpoints: choose the folder of a run")

    # stage one has no use for a reward, and its log does without
    asked = stage.base or method.senses or method.lam
    updates = run.train(method, start=start, reward=run.reward if asked else None)
    log = running.Log(out, args.batch, start)
    bar = running.progress(total=steps, initial=start, desc=out.name)
    for row in islice(updates, steps - start):
        step = row["step"]
        run.ema.update()
        bar.update()
        if step % args.log_every == 0 or step == steps:
            row = log(row)
            bar.set_postfix({k: row[k] for k in ("reward", "g_norm") if k in row})
        if step % args.sample_every == 0 or step == steps:
            show(args, run, out / f"samples/step_{step}.png", device)
        if step % args.save_every == 0 or step == steps:
            running.save(out, step, **run.parts)
    running.draw_log(out)
    export(run, out / "student/sit.pt")


def open_run(args: argparse.Namespace, out: Path) -> Path:
    """The folder of a run, new or resumed; it may have been moved.

    The noise of a sample is of its chunk, so samples that go on keep to their --chunk.
    """
    free = {*running.FREE}
    if args.task == "sample":
        free.remove("chunk")
    return running.open_run(out, dict(vars(args), resume=None), args.resume, free)


def refuse_used(args: argparse.Namespace, out: Path) -> None:
    """ValueError for a folder that cannot be used, before anything is loaded."""
    if running.together((out / "config.json").exists()):
        open_run(args, out)


@torch.no_grad()
def show(args: argparse.Namespace, run: Run, path: Path, device: torch.device) -> None:
    """Draw 16 samples by the average to a png, of the same classes and noise each time."""
    from torchvision.utils import save_image

    y = torch.arange(16, device=device) * 61 % run.real.classes
    torch.manual_seed(amd.key(args.seed))
    with running.averaged(run.ema):
        images = run.decode(run.generate(y, 1.0).x)
    if running.ranks().rank == 0:
        save_image((images.cpu() + 1) / 2, path, nrow=4, padding=1)


def export(run: Run, path: Path) -> None:
    """Write the student as SiT's own checkpoints are: its weights and, as `ema`, their average.

    The average is what read_sit and SiT's own scripts take.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    raw = get_model_state_dict(run.student, options=options)
    raw = {k: v.clone() for k, v in raw.items()}
    with running.averaged(run.ema):
        average = get_model_state_dict(run.student, options=options)
        if running.ranks().rank == 0:
            beside = path.with_suffix(".unfinished")
            torch.save(dict(model=raw, ema=average), beside)
            beside.rename(path)


# ------------------------------------------------------------------------------------------- sample
@torch.no_grad()
def sample(args: argparse.Namespace, device: torch.device) -> None:
    """Write --count images of a student to OUT/samples.npz, for ADM's evaluator.

    They are made in chunks, which any number of processes share; one that is interrupted goes on
    with --resume.
    """
    if args.teacher and args.teacher.is_dir():
        args.student_steps = running.read_config(args.teacher)["student_steps"]
    refuse_used(args, args.out)
    student, decode = load_teacher(args, device), load_decoder(args, device)
    chunks = open_run(args, args.out) / "chunks"
    chunks.mkdir(exist_ok=True)
    ranks = running.ranks()

    y = torch.randint(student.classes, (args.count,), generator=running.seeded(args.seed))
    if args.labels == "balanced":
        y = torch.arange(args.count) % student.classes
    mine = [*enumerate(y.to(device).split(args.chunk))][ranks.rank :: ranks.size]
    for k, part in running.progress(mine, desc="samples"):
        path = chunks / f"{k:06}.npy"
        if path.exists():
            continue
        torch.manual_seed(amd.key(args.seed, k))
        side = args.image_size // 8
        z = torch.randn(len(part), student.channels, side, side, device=device)
        images = decode(amd.backward_simulation(denoiser(student), z, part, levels(args)).x)
        images = (127.5 * images + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
        beside = chunks / f"unfinished_{k}.npy"
        np.save(beside, images.cpu())
        beside.rename(path)  # a whole one, or none

    running.together(True)
    if ranks.rank == 0:
        whole = [np.load(path) for path in sorted(chunks.glob("[0-9]*.npy"))]
        np.savez(args.out / "samples", arr_0=np.concatenate(whole))
    running.say(f"see {args.out}")


# ----------------------------------------------------------------------------------------- evaluate
def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Print FID, sFID, IS, precision and recall of --samples against --ref, as ADM defines them."""
    print(json.dumps(metrics.evaluate(args.samples, args.ref, device, args.chunk)))


# -------------------------------------------------------------------------------------------- speed
def speed(args: argparse.Namespace, device: torch.device) -> None:
    """Print what an update takes beside the bare calls that it needs, and the GPU's memory."""
    run, clock = prepare(args, device), running.Clock()
    y = run.batch(0, 0)
    x = run.generate(y, 1.0).x.detach()
    t = torch.rand(len(y), device=device)
    student, real, fake = map(denoiser, (run.student, run.real, run.fake))
    x2, t2, y2 = (torch.cat([v, v]) for v in (x, t, y))

    def backward():
        fake(x, t, y).square().mean().backward()

    with torch.no_grad():
        clock("forward", lambda: student(x, t, y))
        clock("real", lambda: real(x2, t2, y2))
        clock("reward", lambda: run.reward(x, y))
    clock("backward", backward)
    clock("adamw", run.opt_fake.step)
    took = {}
    for n in (1, 3):
        updates = run.train(amd.method("amd"), fake_steps=n, reward=run.reward)
        took[n] = clock(f"update with {n} of the fake", partial(next, updates))

    # backward is a forward and a backward pass, and the student and the fake have one each
    parts, again = args.accum, 1 if args.accum > 1 else 0
    needs = dict(forward=again * parts, backward=2 * parts, real=parts, reward=parts, adamw=2)
    needs_fake = dict(forward=parts, backward=parts, reward=parts, adamw=1)
    fake_alone = (took[3] - took[1]) / 2
    clock.ratio("student and fake update", took[1], needs)
    clock.ratio("fake update", fake_alone, needs_fake)
    tflop = args.accum * len(y) * run.real.flops() / 1e12
    running.say(f"fake update: {4 * tflop / fake_alone:.1f} TFLOP/s of SiT alone")
    running.say(f"samples: {args.accum * len(y)}; peak {running.peak_gib():.1f} GiB")


# --------------------------------------------------------------------------------------------- main
def check(args: argparse.Namespace) -> None:
    """ValueError for what cannot work, before anything is written or downloaded."""
    counts = ("batch", "accum", "fake_steps", "student_steps", "steps", "count", "chunk")
    intervals = ("log_every", "save_every", "sample_every")
    running.positive(args, *counts, *intervals, "w", "lr", "fake_lr")
    running.require(0 <= args.ema < 1, f"--ema {args.ema}: choose it in [0, 1)")
    running.require(args.base_steps >= 0, "--base-steps: choose 0 or more")
    running.require(args.image_size % 8 == 0, "--image-size: choose a multiple of 8")
    dimensions(args.model, args.image_size // 8)
    amd.method(args.method, s=args.s, tau=args.tau, lam=args.lam)
    amd.group_advantage(torch.zeros(args.batch), args.group)
    running.require(
        args.teacher or args.dry_run or args.task == "evaluate",
        "give --teacher, a file of SiT or REPA",
    )
    if args.task == "evaluate":
        running.require(
            args.samples and args.ref, "evaluate compares two sets: give --samples and --ref"
        )
    if args.init:
        config = running.read_config(args.init)
        for k in ("model", "image_size", "student_steps", "exit_aware"):
            running.require(
                config.get(k) == getattr(args, k),
                f"--init {args.init} has another --{k.replace('_', '-')}: choose the same",
            )


def main(args: argparse.Namespace) -> None:
    check(args)
    device = running.launch()
    parts = running.ranks().size * args.accum
    running.require(
        args.batch % parts == 0,
        f"--batch {args.batch} on {parts} ranks and micro-batches: take a multiple",
    )
    if args.task == "evaluate":
        evaluate(args, device)
    elif args.task == "sample":
        sample(args, device)
    elif args.dry_run == "full":
        speed(args, device)
    else:
        train(args, device)


if __name__ == "__main__":
    running.run(main, parse, hint="try --accum 2, or a smaller --batch")
