"""AMD on SDXL, text to image in four steps: the paper's Tables 2, 3, 7, 8, 9 and Fig. 9.

    torchrun --nproc-per-node 8 sdxl.py --prompts prompts.txt            # whole UNets, by FSDP2
    python sdxl.py --lora-rank 64 --adam8bit --offload-text --batch 32   # LoRAs, on one GPU
    python sdxl.py --model sd15                                          # DMD2's one-step SD1.5
    torchrun --nproc-per-node 8 sdxl.py sample --init runs/sdxl --layout hpdv2 --out runs/amd
    python sdxl.py score --samples runs/amd runs/dmd2                    # means, and who wins
    python sdxl.py --dry-run full --adam8bit                             # speed and memory
    python sdxl.py --dry-run tiny                                        # all of it on a CPU

Weights are downloaded on first use. The reward is HPSv2.1. HPSv2 and ImageReward x 100 of Table 3:
DMD2 30.64, 71.01; AMD 31.25, 88.37.
"""

import argparse
import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amd
import running
from parts import judges, metrics, rewards, tiny, unet
from parts.images import open_image, to_square
from parts.prompts import LAYOUTS, digest, layout, read_prompts

torch.set_float32_matmul_precision("high")

# -------------------------------------------------------------------------------------------- flags
SDXL = dict(  # DMD2's recipe: 19,000 updates of the fake are 3,800 of the student
    model="stabilityai/stable-diffusion-xl-base-1.0",
    w=8.0,
    student_steps=4,
    fake_steps=5,
    batch=128,
    steps=3800,
    lr=5e-7,
    lam_dmd2=5e-3,
    lora_rank=0,
    chunk=8,
    log_every=10,
    sample_every=250,
    save_every=250,
)
SD15 = SDXL | dict(  # DMD2's one-step recipe
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    w=1.75,
    student_steps=1,
    fake_steps=10,
    batch=2048,
    lr=1e-5,
    lam_dmd2=1e-3,
)
DRY = dict(
    full=dict(model=None, batch=8, accum=2, lora_rank=64),
    tiny=dict(
        model=None,
        batch=8,
        accum=1,
        lora_rank=64,
        fake_steps=2,
        steps=4,
        chunk=3,
        sample_every=4,
        save_every=2,
    ),
)
LORA_LR, LORA_FAKE_LR = 5e-5, 5e-4  # DMD2's; and what moves a LoRA fake as far as DMD2's whole one
DMDR_LAM = 3e-3  # DMDR's .3, of a reward that is 100 times as large here


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = running.Parser(__doc__)
    shared, groups = parser.shared, parser.groups
    parser.add_argument("task", nargs="?", choices=["train", "sample", "score"], default="train")

    shared("method", "amd", choices=amd.METHODS, default="amd")
    shared("s", ".5", default=0.5)
    shared("tau", "1", default=1.0)
    shared("w", "DMD2: 8; SD1.5 1.75")
    shared("lam", "DMD2: dmd2 .005, SD1.5 .001; DMDR: dmdr .003")
    shared("group", "8; DMD2: 1", default=8)
    shared("student-steps", "4; SD1.5 1")
    shared("exit-aware", "on", default=True)
    shared("fake-steps", "DMD2: 5; SD1.5 10")

    shared("batch", "DMD2: 128; SD1.5 2,048")
    shared("accum", "as many as make micro-batches of 8")
    shared("steps", "DMD2: 3,800")
    shared("lr", "DMD2: 5e-7; SD1.5 1e-5; of a LoRA 5e-5")
    shared("fake-lr", f"that of the student; of a LoRA {LORA_FAKE_LR:g}")
    shared("ema", "0, as DMD2", default=0.0)
    shared("lora-rank", "0; DMD2: 64")
    shared("adam8bit")
    shared("checkpointing", default=True)
    shared("compile", default=torch.cuda.is_available())
    shared("offload-text")
    shared("seed", "0", default=0)

    data = groups["data"]
    shared("dry-run", choices=[*DRY])
    data.add_argument("--model", help="sdxl, sd15, a hub's name, or a folder of either (sdxl)")
    shared("init", "from its end; sample: a run, a UNet's folder, or a LoRA")
    shared("prompts", "text, csv, jsonl or json; hpdv2: the folder of its json files; 36 of ours")
    data.add_argument(
        "--real-data", type=Path, help="dmd2: images and metadata.jsonl {file_name, text}"
    )
    data.add_argument("--image-size", type=int, help="pixels (the model's)")
    data.add_argument(
        "--reward-vae",
        help="another decoder for the reward, in half precision, as madebyollin/sdxl-vae-fp16-fix"
        " or the small madebyollin/taesdxl (the model's own, in float32)",
    )
    data.add_argument("--hps", type=Path, help="HPSv2's file (v2.1, downloaded)")

    shared("out", "runs/sdxl; sample: runs/samples")
    shared("resume")
    shared("log-every", "10")
    shared("sample-every", "250")
    shared("save-every", "250")

    sampling = groups["sampling"]
    shared("chunk", "8")
    shared("samples", "one folder of sample, or two", nargs="+")
    shared("layout", "flat", choices=LAYOUTS, default="flat")
    sampling.add_argument(
        "--judges",
        nargs="+",
        choices=judges.JUDGES,
        default=["hpsv2"],
        help="score: by whom (hpsv2)",
    )
    return fill(parser.parse_args(argv))


def fill(args: argparse.Namespace) -> argparse.Namespace:
    """Set the flags that were not given, by the model and by each other."""
    config = running.config_of_student(args.init) if args.task == "sample" and args.init else {}
    if args.model is None and not args.dry_run:
        args.model = config.get("model")
    defaults = SD15 if is_sd15(args.model) else SDXL
    if args.model in ("sdxl", "sd15"):
        running.require(
            not (args.dry_run and args.model == "sd15"),
            "--dry-run has SDXL's networks only: leave --model sd15 out, or give a folder",
        )
        args.model = None
    defaults = defaults | DRY.get(args.dry_run, {})
    defaults |= {k: config[k] for k in ("student_steps", "image_size") if k in config}
    running.fill(args, {k: v for k, v in defaults.items() if k not in ("lr", "lam_dmd2")})
    lam = dict(dmd2=defaults["lam_dmd2"], dmdr=DMDR_LAM).get(args.method, 0.0)
    lr = LORA_LR if args.lora_rank else defaults["lr"]
    running.fill(args, dict(lam=lam, lr=lr))
    name = "samples" if args.task == "sample" else args.dry_run or "sdxl"
    return running.fill(
        args,
        dict(
            fake_lr=LORA_FAKE_LR if args.lora_rank else args.lr,
            accum=running.micro_batches(args.batch, most=8),
            out=Path("runs", name),
        ),
    )


def is_sd15(model: str | None) -> bool:
    """Is --model Stable Diffusion 1.5, by its name or by its folder's index?"""
    index = Path(model or "nowhere") / "model_index.json"
    if index.exists():
        return '"StableDiffusionPipeline"' in index.read_text(encoding="utf-8")
    return model in ("sd15", SD15["model"])


# ----------------------------------------------------------------------------------------- networks
def load_pipeline(args: argparse.Namespace, device: torch.device, **dtypes: torch.dtype):
    """diffusers' pipeline of --model, frozen; or, for a dry run, one with random weights."""
    torch.manual_seed(0)  # random weights are alike on all ranks, and when a run goes on
    if args.model:
        pipe = unet.load_pipeline(args.model, device, **dtypes)
        running.require(
            is_sd15(args.model) == (type(pipe).__name__ == "StableDiffusionPipeline"),
            f"{args.model} is a Stable Diffusion 1.5, whose recipe is another: download it, and"
            " give its folder",
        )
        return pipe
    with device, running.default_dtype(dtypes["default"]):
        pipe = tiny.sdxl_pipeline(args.dry_run)
    return unet.frozen(pipe, device, **dtypes)


def timesteps(args: argparse.Namespace) -> list[int]:
    """Of the student's steps: DMD2's 999, 749, 499, 249 where they are four."""
    return [999 - i * (1000 // args.student_steps) for i in range(args.student_steps)]


def denoiser(net: nn.Module, schedule: amd.Schedule) -> amd.Denoiser:
    """A UNet's guess of clean latents; an exit is told to a fake teacher only."""

    def eps(x_t, t, c):
        with running.autocast(x_t):
            more = dict(added_cond_kwargs=unet.added(c), timestep_cond=c.get("exit"))
            return net(x_t, t, c["text"], **more).sample

    return amd.x0_from_eps(eps, schedule)


def decoder(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """Latents -> images of about [-1, 1], in the VAE's own precision: SDXL's wants float32."""

    def decode(x):
        with torch.autocast(x.device.type, enabled=False):
            return vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample.float()

    return decode


def networks(
    args: argparse.Namespace, base: nn.Module, side: int, device: torch.device
) -> dict[str, nn.Module]:
    """student, fake, real and, for an adapted teacher, blended.

    LoRAs stand on one base; whole UNets are copied, moved and sharded one after the other, so that
    a GPU never holds two of them in float32.
    """
    lora, nets = args.lora_rank, {}
    torch.manual_seed(0)  # adapters and head begin alike on all ranks
    for name in ("student", "fake"):
        net = running.share(base) if lora else copy.deepcopy(base).requires_grad_()
        if lora:
            unet.add_lora(net, args.lora_rank)
        if args.checkpointing:
            net.enable_gradient_checkpointing()
        if name == "fake":
            if args.exit_aware and args.student_steps > 1:
                unet.tell_exits(net)
            if args.method == "dmd2":
                unet.add_gan_head(net, side)
        nets[name] = net if lora else placed(args, net, device)
    if args.method in ("dmdr", "magic"):
        if lora:
            nets["blended"] = running.share(nets["fake"])
        else:
            blended = copy.deepcopy(base).to(running.half(device))
            nets["blended"] = placed(args, blended, device)
    nets["real"] = base if lora else placed(args, base.to(running.half(device)), device)
    if lora and args.compile:
        for name in nets.keys() - {"blended"}:  # its LoRA's scale changes in each update
            compile_blocks(nets[name])
    return nets


def placed(args: argparse.Namespace, net: nn.Module, device: torch.device) -> nn.Module:
    """A whole UNet on its GPU, compiled and sharded."""
    net.to(device)
    if args.compile:
        compile_blocks(net)
    blocks = unet.blocks_of(net, "Transformer2DModel", "ResnetBlock2D")
    exact = [net.head] if hasattr(net, "head") else []
    running.shard(net, blocks, running.half(device), exact)
    if hasattr(net, "logits") and running.ranks().size > 1:
        torch.distributed.fsdp.register_fsdp_forward_method(net, "logits")
    return net


def compile_blocks(net: nn.Module) -> None:
    """Compile what repeats; it makes some graphs for each width, batch and kind of pass."""
    torch._dynamo.config.recompile_limit = 256
    for block in unet.blocks_of(net, "BasicTransformerBlock", "ResnetBlock2D"):
        block.compile(dynamic=False)


# -------------------------------------------------------------------------------------------- texts
class Texts:
    """What the UNet is told of prompts, which are encoded once an update.

    With --offload-text the encoders live on the CPU, and visit the GPU for that.
    """

    def __init__(self, args: argparse.Namespace, pipe, prompts: list[str], device: torch.device):
        self.pipe = pipe
        self.prompts = prompts
        self.device = device
        parts = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
        self.encoders = [net for net in parts if net is not None]
        if args.offload_text:
            for net in self.encoders:
                net.to("cpu")
        size = pixels(args, pipe)
        self.ids = torch.tensor([size, size, 0, 0, size, size], device=device)
        self.held = {}
        self.update = None
        self.empty = None
        if not pipe.config.get("force_zeros_for_empty_prompt"):
            (self.empty,) = self.encode([""])

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """Prompts -> for each, text (1, 77, D) and for SDXL pooled (1, D).

        They are encoded one by one, so that a prompt's numbers do not hang on its company.
        """
        made = []
        with running.visit(self.device, *self.encoders):
            for text in texts:
                hidden, _, *more = self.pipe.encode_prompt(
                    [text],
                    device=self.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=False,
                )
                made.append(dict(text=hidden) | (dict(pooled=more[0]) if more else {}))
        return made

    def hold(self, indices: list[int], update: int | None = None) -> None:
        """Encode the prompts that will be asked for, those of an update, and forget others."""
        held = sorted(set(indices))
        made = self.encode([self.prompts[i] for i in held])
        self.held = dict(zip(held, made, strict=True))
        self.update = update

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        """The condition of held prompts, index (B,) on the CPU: each prompt once, then repeated."""
        which, places = index.unique(return_inverse=True)
        held = [self.held[i] for i in which.tolist()]
        places = places.to(self.device, non_blocking=True)
        c = {k: torch.cat([row[k] for row in held])[places] for k in held[0]}
        return c | dict(ids=self.ids.expand(len(index), -1), index=index)

    def null(self, c: dict[str, Tensor]) -> dict[str, Tensor]:
        """The empty prompt: zeros for SDXL, as DMD2 and diffusers have it."""
        texts = [k for k in ("text", "pooled") if k in c]
        if self.empty is None:
            return c | {k: torch.zeros_like(c[k]) for k in texts}
        return c | {k: self.empty[k].expand_as(c[k]) for k in texts}


def pixels(args: argparse.Namespace, pipe) -> int:
    return args.image_size or pipe.unet.config.sample_size * pipe.vae_scale_factor


# ------------------------------------------------------------------------------------------- reward
class Reward:
    """HPSv2 of latents and held prompts (B,), with a gradient if the latents have one (dmdr).

    `variety` is what the reward does not see: the mean distance of neighbouring samples of a
    prompt, also of two calls, since it was last asked; or NaN.
    """

    def __init__(self, args: argparse.Namespace, pipe, prompts: list[str], device: torch.device):
        self.prompts = prompts
        self.device = device
        self.hps = load_hps(args, device)
        if args.offload_text:
            for net in self.hps.text_nets:
                net.to("cpu")
        self.texts = {}
        vae = load_vae(args.reward_vae, pipe.vae, device) if args.reward_vae else pipe.vae
        self.decode = decoder(vae)
        self.apart = []
        self.last = None

    def hold(self, indices: list[int]) -> None:
        """Encode the prompts that it will be asked about, and forget those before."""
        held = sorted(set(indices))
        prompts = [self.prompts[i] for i in held]
        with torch.no_grad(), running.visit(self.device, *self.hps.text_nets):
            parts = [self.hps.text(prompts[i : i + 64]) for i in range(0, len(held), 64)]
        self.texts = dict(zip(held, torch.cat(parts), strict=True))

    def view(self, x: Tensor) -> Tensor:
        """Latents -> images as HPSv2 sees them."""
        return rewards.square(((self.decode(x) + 1) / 2).clamp(0, 1))

    def __call__(self, x: Tensor, c: dict[str, Tensor]) -> Tensor:
        images, index = rewards.by_parts(self.view, 1, x), c["index"]
        self.compare(images.detach(), index)
        texts = torch.stack([self.texts[i] for i in index.tolist()])
        return self.hps(images, texts)

    def compare(self, images: Tensor, index: Tensor) -> None:
        """Note how far apart neighbours of a prompt are; the last call's last image is one."""
        if self.last:
            image, its_index = self.last
            images = torch.cat([image, images])
            index = torch.cat([its_index, index])
        alike = index[1:] == index[:-1]
        apart = (images[1:] - images[:-1]).abs().mean((1, 2, 3))
        self.apart.append(apart[alike])
        self.last = (images[-1:], index[-1:])

    def variety(self) -> Tensor:
        seen = self.apart
        self.apart = []
        self.last = None
        return torch.cat(seen).mean() if seen else torch.tensor(float("nan"))


def load_hps(args: argparse.Namespace, device: torch.device) -> rewards.HPSv2:
    """HPSv2.1; of random weights for a dry run."""
    if not args.dry_run:
        return rewards.load_hpsv2(device, args.hps)
    torch.manual_seed(0)  # the same judge in all processes
    with device, running.default_dtype(running.half(device)):
        return tiny.hpsv2(args.dry_run)


def load_vae(name: str, own: nn.Module, device: torch.device) -> nn.Module:
    """A VAE or a tiny one for the reward, in half precision on a GPU, of the same latents as own.

    ValueError: it is neither, or latents are of another scale.
    """
    import diffusers

    config = diffusers.AutoencoderKL.load_config(name)
    kind, scale = config.get("_class_name"), config.get("scaling_factor", 0.18215)
    running.require(
        kind == "AutoencoderTiny" or (kind, scale) == ("AutoencoderKL", own.config.scaling_factor),
        f"--reward-vae {name} is a {kind} of scale {scale}: give a VAE of --model's latents",
    )
    vae = getattr(diffusers, kind).from_pretrained(name, dtype=running.half(device))
    return vae.to(device).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------- data
def real_images(
    args: argparse.Namespace, rows: list[dict], pipe, device: torch.device
) -> Callable[[dict], Tensor]:
    """dmd2: truth(c), latents of the images whose texts are c's prompts."""
    view = to_square(pixels(args, pipe), mean=[0.5], std=[0.5])  # to [-1, 1]

    @torch.no_grad()
    def latent(i: int) -> Tensor:
        x = view(open_image(args.real_data / rows[i]["file_name"]))[None].to(device)
        mode = pipe.vae.encode(x.to(pipe.vae.dtype)).latent_dist.mode()
        return mode.float() * pipe.vae.config.scaling_factor

    return lambda c: torch.cat([latent(i) for i in c["index"].tolist()])


def rows_of(args: argparse.Namespace) -> list[dict]:
    """The rows of --prompts, or of --real-data, whose texts are the prompts."""
    return read_prompts(args.real_data / "metadata.jsonl" if args.real_data else args.prompts)


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
    texts: Texts
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
    """Load the pipeline, make the networks of it, and the closures."""
    import diffusers

    ranks, whole = running.ranks(), not args.lora_rank
    trained = dict(unet=torch.float32) if whole else {}
    pipe = load_pipeline(args, device, default=running.half(device), vae=torch.float32, **trained)
    if whole:
        pipe.unet.cpu()  # placed one by one
    betas = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    schedule = amd.vp(betas.alphas_cumprod)
    side = pixels(args, pipe) // pipe.vae_scale_factor
    levels = [i / 1000 for i in timesteps(args)]
    rows = rows_of(args)
    prompts = [row["prompt"] for row in rows]

    nets = networks(args, pipe.unet, side, device)
    denoise = {name: denoiser(net, schedule) for name, net in nets.items()}
    texts = Texts(args, pipe, prompts, device)
    reward = Reward(args, pipe, prompts, device)

    def generate(c, u):
        z = torch.randn(len(c["text"]), 4, side, side, device=device)
        return amd.backward_simulation(denoise["student"], z, c, levels, u, schedule)

    def drawn(n, j):
        """A prompt for each group of iteration n -> those of this rank and micro-batch."""
        groups = args.batch // args.group
        index = torch.randint(len(prompts), (groups,), generator=running.seeded(args.seed, n, 0))
        index = index.repeat_interleave(args.group).view(ranks.size * args.accum, -1)
        return index[ranks.rank * args.accum + j]

    def batch(n, j):
        update = n // args.fake_steps
        if texts.update != update:
            iterations = range(update * args.fake_steps, (update + 1) * args.fake_steps)
            indices = torch.cat([drawn(i, k) for i in iterations for k in range(args.accum)])
            texts.hold(indices.tolist(), update)
            reward.hold(indices.tolist())
        return texts(drawn(n, j))

    def aware(c, t_G):
        return c | dict(exit=unet.exit_code(t_G, len(c["index"]), device))

    def adapt(r):
        if whole:
            amd.blend(nets["blended"], nets["real"], nets["fake"], r)
        for layer in running.adapters(nets["blended"]).values():
            layer.set_scale("default", r)  # the fake's own adapters, weighed by r
        return denoise["blended"]

    adam = partial(torch.optim.AdamW, fused=True)
    if args.adam8bit:
        import bitsandbytes

        adam = bitsandbytes.optim.AdamW8bit
    opt_student = adam(param_groups(args, nets["student"], args.lr), weight_decay=0.01)
    opt_fake = adam(param_groups(args, nets["fake"], args.fake_lr), weight_decay=0.01)
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
        null=texts.null,
        w=args.w,
        schedule=schedule,
        space="eps",
        truth=real_images(args, rows, pipe, device),
        logits=getattr(nets["fake"], "logits", None),
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
        texts=texts,
        reward=reward,
        generate=generate,
        batch=batch,
        train=train,
    )


def param_groups(args: argparse.Namespace, net: nn.Module, lr: float) -> list[dict]:
    """The parameters that are trained, with their learning rates, as optimizers want them.

    Beside LoRAs a fake has whole layers, for exits and dmd2's head. DMD2's rate is made for these.
    """
    loras = [p for name, p in net.named_parameters() if p.requires_grad and "lora_" in name]
    whole = [p for name, p in net.named_parameters() if p.requires_grad and "lora_" not in name]
    groups = [
        dict(params=loras, lr=lr),
        dict(params=whole, lr=min(lr, LORA_LR) if args.lora_rank else lr),
    ]
    return [group for group in groups if group["params"]]


def method_of(args: argparse.Namespace) -> amd.Method:
    """The row of Table 1; an adapted teacher is back at the real one after half of the updates."""
    return amd.method(
        args.method,
        s=args.s,
        tau=args.tau,
        lam=args.lam,
        fade=max(1, args.steps // 2),
        unit_w=args.tau < 1,
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
    if not (args.dry_run or args.prompts or args.real_data):
        running.say("training on a few prompts of our own: give --prompts for real work")
    run, steps = prepare(args, device), args.steps
    if args.init:
        running.load(args.init, **run.parts)
    out = open_run(args)
    (out / "samples").mkdir(exist_ok=True)
    start = running.load(out, **run.parts)
    running.require(start <= steps, f"{out} has {start} updates: give --steps of that or more")
    log = running.Log(out, args.batch, start)
    bar = running.progress(total=steps, initial=start, desc=out.name)
    for row in islice(run.train(start=start), steps - start):
        step = row["step"]
        if run.ema:
            run.ema.update()
        bar.update()
        row |= dict(variety=run.reward.variety())
        if step % args.log_every == 0 or step == steps:
            row = log(row)
            bar.set_postfix({k: row[k] for k in ("reward", "g_norm") if k in row})
        if step % args.sample_every == 0 or step == steps:
            show(args, run, out / f"samples/step_{step}.png")
        if step % args.save_every == 0 or step == steps:
            running.save(out, step, keep=2, **run.parts)  # each of 58 GiB, if whole
    running.draw_log(out)
    if run.ema:
        with running.averaged(run.ema):
            export(args, run, out / "student_ema")
    export(args, run, out / "student")
    running.say(f"see {out}")


@torch.no_grad()
def show(args: argparse.Namespace, run: Run, path: Path) -> None:
    """Draw four prompts by four seeds to a png, always the same, by the average if there is one."""
    from torchvision.utils import save_image

    count = len(run.texts.prompts)
    index = (torch.arange(4) * count // 4).repeat_interleave(4)
    run.texts.hold(index.tolist())
    torch.manual_seed(amd.key(args.seed))
    with running.averaged(run.ema):
        x = torch.cat([run.generate(run.texts(part), 1.0).x for part in index.split(4)])
    decode = decoder(run.pipe.vae)
    images = [F.interpolate(decode(part), (256, 256), mode="area") for part in x.split(1)]
    if running.ranks().rank == 0:
        save_image((torch.cat(images).cpu() + 1) / 2, path, nrow=4)


def export(args: argparse.Namespace, run: Run, path: Path) -> None:
    """Write the student as diffusers reads it: a UNet's folder, or a LoRA.

    It is whole, or not there at all. OSError: there is no room.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    net, beside = run.nets["student"], path.with_name(f"{path.name}.unfinished")
    if args.lora_rank:
        state = lora_state(net)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(net, options=options)
    if running.ranks().rank > 0:
        return
    try:
        if args.lora_rank:
            type(run.pipe).save_lora_weights(beside, state)
        else:
            plain = type(net).from_config(net.config)
            plain.load_state_dict(state)
            plain.save_pretrained(beside, max_shard_size="100GB")  # one file, as ComfyUI wants
    except Exception as error:
        raise OSError(f"{beside} unwritable ({error!s:.99}): make room, then --resume") from None
    shutil.rmtree(path, ignore_errors=True)  # of an attempt that found no room for its twin
    beside.rename(path)


def lora_state(net: nn.Module) -> dict[str, Tensor]:
    """A LoRA's weights, with its scale in B: readers who are told no alpha take the rank for it."""
    import peft

    state = peft.get_peft_model_state_dict(net)
    for name, layer in running.adapters(net).items():
        key = f"{name}.lora_B.weight"
        state[key] = state[key] * layer.scaling["default"]
    return state


# ------------------------------------------------------------------------------------------- sample
@torch.no_grad()
def sample(args: argparse.Namespace, device: torch.device) -> None:
    """Draw images by diffusers' own pipeline to OUT/images, as --layout names them.

    Any number of processes share them, and each image has a seed of its own.
    """
    import diffusers

    rows, ranks = layout(args.layout, args.prompts), running.ranks()
    half = torch.float16 if device.type == "cuda" else torch.float32
    pipe = load_pipeline(args, device, default=half)
    unet.adopt(pipe, args.init)
    pipe.vae.enable_slicing()
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    out = open_run(args)
    keep_prompts(out, rows)

    mine = rows[ranks.rank :: ranks.size]
    mine = [row for row in mine if not (out / "images" / row["file"]).exists()]
    chunks = [mine[i : i + args.chunk] for i in range(0, len(mine), args.chunk)]
    for part in running.progress(chunks, desc="images"):
        seeds = [amd.key(args.seed, row["file"]) for row in part]
        images = pipe(
            [row["of"]["prompt"] for row in part],
            height=args.image_size,
            width=args.image_size,
            timesteps=timesteps(args),
            guidance_scale=0.0,
            generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
        ).images
        for row, image in zip(part, images, strict=True):
            write_image(args, out / "images" / row["file"], image, row["of"])
    running.say(f"see {out}")


def keep_prompts(out: Path, rows: list[dict]) -> None:
    """Write OUT/prompts.jsonl, which says what each image is of.

    ValueError: a run that is resumed was of other prompts, so its images would get wrong ones.
    """
    path = out / "prompts.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    same = not path.exists() or path.read_text(encoding="utf-8") == text
    running.require(
        running.together(same), f"{out} has images of other prompts: choose another folder"
    )
    if running.ranks().rank == 0:
        running.write(path, text)


def write_image(args: argparse.Namespace, path: Path, image, of: dict) -> None:
    """Write an image whole, and for GenEval the metadata that its evaluator looks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.layout == "geneval":
        metadata = path.parents[1] / "metadata.jsonl"
        metadata.write_text(json.dumps(of), encoding="utf-8")
    beside = path.with_name(f"unfinished_{path.name}")
    image.save(beside)
    beside.rename(path)


# -------------------------------------------------------------------------------------------- score
@torch.no_grad()
def score(args: argparse.Namespace, device: torch.device) -> None:
    """Print each judge's mean of folders that `sample` wrote; of two, how often the first one wins.

    HPDv2's means go by style, too.
    """
    rows, *others = [read_rows(folder) for folder in args.samples]
    running.require(
        others in ([], [rows]),
        "--samples are of other prompts or layouts: compare like with like",
    )
    for name in args.judges:
        judge = judge_of(args, name, device)
        scores = [judged(args, judge, folder, rows) for folder in args.samples]
        for folder, r in zip(args.samples, scores, strict=True):
            told = dict(samples=str(folder), judge=name, images=len(r), mean=r.mean().item())
            print(json.dumps(told | by_style(rows, r)))
        if others:
            print(json.dumps(dict(judge=name) | metrics.winning_rate(*scores)))


def read_rows(folder: Path) -> list[dict]:
    """What the images of a folder are of, as `sample` wrote it."""
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    running.require(
        rows and all(isinstance(row, dict) and {"file", "of"} <= row.keys() for row in rows),
        f"{folder}/prompts.jsonl is not of `sample`: choose its --out",
    )
    return rows


def judge_of(args: argparse.Namespace, name: str, device: torch.device) -> Callable:
    """A judge: images of PIL and their prompts -> (B,)."""
    if name == "hpsv2":
        return judges.hpsv2(device, load_hps(args, device))
    return judges.JUDGES[name](device)


def judged(args: argparse.Namespace, judge: Callable, folder: Path, rows: list[dict]) -> Tensor:
    """A judge's scores of all images of a folder -> (N,), float64 on the CPU."""
    r = []
    for i in running.progress(range(0, len(rows), args.chunk), desc=str(folder)):
        part = rows[i : i + args.chunk]
        images = [open_image(folder / "images" / row["file"]) for row in part]
        r.append(judge(images, [row["of"]["prompt"] for row in part]))
    return torch.cat(r).double().cpu()


def by_style(rows: list[dict], r: Tensor) -> dict[str, float]:
    """The mean of each style of HPDv2, which is a folder; empty for other layouts."""
    styles = [row["file"].split("/")[0] if row["file"].count("/") == 1 else "" for row in rows]
    means = {}
    for style in sorted({*styles} - {""}):
        means[style] = r[[of == style for of in styles]].mean().item()
    return means


# -------------------------------------------------------------------------------------------- speed
def speed(args: argparse.Namespace, device: torch.device) -> None:
    """Print what an update takes beside the bare calls that it needs, and the GPU's memory."""
    run, clock = prepare(args, device), running.Clock()
    c = run.batch(0, 0)
    student, real, fake = (run.denoise[name] for name in ("student", "real", "fake"))
    with torch.no_grad():
        x = run.generate(c, 1.0).x
    t = torch.full((len(x),), 0.5, device=device)
    two = amd.pair(c, run.texts.null(c))
    x2, t2 = torch.cat([x, x]), torch.cat([t, t])

    def backward():
        fake(x, t, c).square().mean().backward()

    def texts():
        run.texts.update = None
        run.batch(0, 0)

    with torch.no_grad():
        clock("forward", lambda: student(x, t, c))
        clock("real", lambda: real(x2, t2, two))
        clock("reward", lambda: run.reward(x, c))
    clock("backward", backward)
    clock("texts", texts)
    clock("adamw", run.opt_fake.step)

    def last_exit(c, _u):
        return run.generate(c, 1.0)

    updates = run.train(student=last_exit)
    took = clock(f"update with {args.fake_steps} of the fake", partial(next, updates))
    # a rollout is student_steps calls, the last of which has a graph in the student's turn; with
    # micro-batches that one is made twice; backward is a forward and a backward pass
    parts, fake_steps = args.accum, args.fake_steps
    rollouts = fake_steps * args.student_steps
    forward = rollouts if parts > 1 else rollouts - 1
    needs = dict(texts=1, forward=parts * forward, backward=parts * (fake_steps + 1))
    needs |= dict(real=parts, reward=parts * fake_steps, adamw=fake_steps + 1)
    clock.ratio(f"update of {args.batch}", took, needs)
    running.say(f"samples: {len(x)}; peak {running.peak_gib():.1f} GiB")


# --------------------------------------------------------------------------------------------- main
def check(args: argparse.Namespace) -> None:
    """ValueError for what cannot work, before anything is written or downloaded."""
    counts = ("batch", "accum", "group", "fake_steps", "student_steps", "steps", "chunk")
    intervals = ("log_every", "save_every", "sample_every")
    running.positive(args, *counts, *intervals, "w", "lr", "fake_lr")
    running.require(0 <= args.ema < 1, f"--ema {args.ema}: choose it in [0, 1)")
    running.require(args.lora_rank >= 0, "--lora-rank: choose 0 or more")
    size = 64 if args.image_size is None else args.image_size
    running.require(size > 0 and size % 64 == 0, "--image-size: choose a multiple of 64")
    running.require(not args.out.is_file(), f"--out {args.out} is a file: choose a folder")
    for path in (args.init, args.hps):
        running.require(path is None or path.exists(), f"{path}: there is no such file or folder")
    {"train": check_train, "sample": check_sample, "score": check_score}[args.task](args)


def check_train(args: argparse.Namespace) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    parts = world * args.accum
    running.require(
        (args.method == "dmd2") == bool(args.real_data),
        "--real-data is for dmd2, which needs it",
    )
    running.require(not args.lam or args.method in ("dmd2", "dmdr"), "--lam is for dmd2 and dmdr")
    running.require(
        not args.adam8bit or world == 1 or args.lora_rank,
        "--adam8bit: give --lora-rank, or one GPU",
    )
    running.require(
        args.batch % parts == 0, f"--batch {args.batch} of {parts} ranks x --accum: take a multiple"
    )
    running.require(
        args.batch % args.group == 0, f"--batch {args.batch}: take a multiple of --group"
    )
    running.require(
        not (args.real_data and args.prompts), "--real-data has the prompts: leave --prompts out"
    )
    method = amd.method(args.method, s=args.s, tau=args.tau, lam=args.lam)
    if args.group > 1 or method.senses:
        amd.group_advantage(torch.zeros(args.batch), args.group)
    if args.real_data:
        for row in read_prompts(args.real_data / "metadata.jsonl"):
            path = args.real_data / str(row.get("file_name", "no file_name"))
            running.require(path.is_file(), f"{path}: there is no such file")
    rows_of(args)
    running.require(
        args.init is None or running.checkpoints(args.init),
        f"{args.init} holds no checkpoint: choose the folder of a run",
    )


def check_sample(args: argparse.Namespace) -> None:
    running.require(args.init, "give --init: a run, a UNet's folder or a LoRA")
    running.require(
        not running.is_unfinished(args.init),
        f"{args.init} has no student before its run has ended: finish it",
    )
    layout(args.layout, args.prompts)


def check_score(args: argparse.Namespace) -> None:
    running.require(len(args.samples or ()) in (1, 2), "give --samples, a folder or two")
    running.require(int(os.environ.get("WORLD_SIZE", 1)) == 1, "score is for one process")
    only = not args.dry_run or args.judges == ["hpsv2"]
    running.require(only, "--dry-run has no judge but hpsv2: leave --judges out")
    for folder in args.samples:
        there = (folder / "prompts.jsonl").exists()
        running.require(there, f"{folder} holds no images of `sample`: choose its --out")


def main(args: argparse.Namespace) -> None:
    check(args)
    device = running.launch()
    if args.task == "sample":
        sample(args, device)
    elif args.task == "score":
        score(args, device)
    elif args.dry_run == "full":
        speed(args, device)
    else:
        train(args, device)


if __name__ == "__main__":
    running.run(main, parse, "raise --accum, take --lora-rank 64 --adam8bit, lower --chunk")
