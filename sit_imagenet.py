"""AMD on SiT, class to image: the paper's Table 4 and Figs. 5, 6 (ImageNet), and both in small on digits and CIFAR-10.
    torchrun --nproc-per-node 8 sit_imagenet.py --teacher SiT-XL-2-256x256.pt    # 3,000 updates of DMD, 1,000 of AMD
    torchrun --nproc-per-node 8 sit_imagenet.py sample --teacher runs/imagenet --out runs/amd50k    # 50,000, one npz
    python sit_imagenet.py evaluate --samples runs/amd50k/samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python sit_imagenet.py --preset digits     # all arms on 8x8 digits: 5.5 minutes on 2 cores; cifar10: one GPU
    python sit_imagenet.py --dry-run full      # memory and speed of SiT-XL/2 on this GPU, with random weights
Teachers are files of SiT (github.com/willisma/SiT) or REPA (github.com/sihyun-yu/REPA), the reward is DINOv2's linear
classifier. FID, sFID, IS of Table 4: DMD 3.557, 5.850, 314.4; DMDR 9.634, 7.354, 391.8; AMD 3.469, 5.746, 316.0.
"""

import argparse
import copy
import json
import os
from functools import cache, partial
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import amd
import running

torch.set_float32_matmul_precision("high")

# ----------------------------------------------------------------------------------------------------------- arguments
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),  # width, depth, heads
    "digits": (64, 4, 4),
    "cifar10": (256, 12, 4),
    "tiny": (32, 2, 2),
}
PRESETS = {  # fit: updates and learning rate of the teacher, of the reward, of the judge
    "imagenet": dict(
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
        fit=None,
    ),
    "digits": dict(
        model="digits/2",
        image_size=8,
        batch=64,
        lr=3e-4,
        fake_lr=6e-4,
        fake_steps=3,
        ema=0.95,
        steps=100,
        base_steps=200,
        sample_every=25,
        count=2000,
        w=[1.0],
        fit=((1500, 1e-3), (100, 3e-3), (400, 3e-3)),
    ),
    "cifar10": dict(
        model="cifar10/2",
        image_size=32,
        batch=256,
        lr=5e-5,
        fake_lr=5e-5,
        fake_steps=3,
        ema=0.99,
        steps=300,
        base_steps=600,
        sample_every=75,
        count=10000,
        fit=((5600, 6e-4), *[(2000, 3e-3)] * 2),
    ),
    "tiny": dict(
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
        fit=None,
    ),
}
PRESETS["full"] = PRESETS["imagenet"] | dict(batch=64)
ARMS = {
    "DMD": dict(method="dmd"),
    "DSA only": dict(method="amd", tau=torch.inf),
    "RLS only": dict(method="amd", s=0.0),
    "AMD": dict(method="amd"),
    "DMDR": dict(method="dmdr"),
    "naive": dict(method="naive"),
}


def parse(argv=None):
    parser = running.Parser(__doc__)
    shared, (method, optimisation, data, _, sampling) = parser.shared, parser.groups.values()
    parser.add_argument("task", nargs="?", choices=["train", "sample", "evaluate"], default="train")

    rows = [name for name in amd.METHODS if name != "dmd2"]
    shared("method", "of stage two; amd", choices=rows, default="amd")
    shared("s", ".5", default=0.5)
    shared("tau", "1", default=1.0)
    shared("w", "1.25, digits 1; the presets take several", nargs="+")
    shared("lam", "dmdr .05, DMDR's own", default=0.05)
    shared("group", "8", default=8)
    shared("student-steps", "1", default=1)
    shared("fake-steps", "5, as DMDR; the presets 3")
    method.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="presets: which")

    shared("batch", "A.4: 512")
    shared("accum", "1", default=1)
    optimisation.add_argument("--base-steps", type=int, help="updates of stage one (A.4: 3,000)")
    shared("steps", "of stage two; A.4: 1,000")
    shared("lr", "A.4: 2e-5")
    shared("fake-lr", "2e-5")
    shared("ema", ".99")
    shared("compile", default=torch.cuda.is_available())
    shared("seed", "0", default=0)
    optimisation.add_argument("--seeds", type=int, default=3, help="presets: runs of an arm (3)")

    presets = ["imagenet", "digits", "cifar10"]
    data.add_argument("--preset", choices=presets, default="imagenet", help="data and defaults")
    shared("dry-run", choices=["tiny", "full"])
    data.add_argument("--teacher", type=Path, help="weights of SiT or REPA; sample: or a run")
    shared("init", "whose end stage two starts from; presets: whose networks and bases to share")
    data.add_argument("--data", type=Path, help="presets: a labelled folder, DATA/class/*.png")
    data.add_argument("--image-size", type=int, help="pixels (256; digits 8; cifar10 32)")
    data.add_argument("--model", help="size/patch, of S, B, L, XL and 2, 4, 8 (XL/2)")
    data.add_argument("--vae", default="stabilityai/sd-vae-ft-ema", help="of diffusers")

    shared("out", "runs/PRESET")
    shared("resume")
    shared("log-every", "10", default=10)
    shared("save-every", "500", default=500)
    shared("sample-every", "250")

    sampling.add_argument("--count", type=int, help="images to sample (50,000)")
    labels = ["random", "balanced"]
    sampling.add_argument("--labels", choices=labels, default="random", help="of samples (random)")
    shared("chunk", "64", default=64)
    sampling.add_argument("--samples", type=Path, help="evaluate: npz or folder of images")
    sampling.add_argument("--ref", type=Path, help="evaluate: the same, of real images")
    args = parser.parse_args(argv)
    name = args.dry_run or args.preset
    defaults = (
        dict(w=[1.25], out=Path("runs", "samples" if args.task == "sample" else name))
        | PRESETS[name]
    )
    return argparse.Namespace(
        **defaults | {k: v for k, v in vars(args).items() if v is not None or k not in defaults}
    )


# ------------------------------------------------------------------------------------------------------------ backbone
def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, dim, heads):
        from timm.models.vision_transformer import Attention, Mlp

        super().__init__()
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.mlp = Mlp(dim, 4 * dim, act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[
            :, None
        ].chunk(6, 2)
        h = h + gate * self.attn(modulate(h, shift, scale))
        return h + gate_mlp * self.mlp(modulate(h, shift_mlp, scale_mlp))


class SiT(nn.Module):
    """SiT (arXiv 2401.08740), keys as in its files: x (B, C, side, side), t (B,), 0 = clean, y (B,), `classes` = no ->
    velocity noise - x. learn_sigma: SiT's own layout, 2 C channels out, half of them unused, and t = 0 is noise."""

    def __init__(self, model="XL/2", side=32, channels=4, classes=1000, learn_sigma=False):
        from timm.layers import PatchEmbed, build_sincos2d_pos_embed

        super().__init__()
        size, _, patch = model.partition("/")
        if size not in SIZES or patch not in ("2", "4", "8") or side % int(patch):
            raise ValueError(
                f"--model {model}: give size/patch, of {', '.join(SIZES)} and 2, 4, 8 dividing {side}"
            )
        (dim, depth, heads), patch = SIZES[size], int(patch)
        self.channels, self.classes, self.patch, self.learn_sigma = (
            channels,
            classes,
            patch,
            learn_sigma,
        )
        self.x_embedder = PatchEmbed(side, patch, channels, dim)
        embed = build_sincos2d_pos_embed((side // patch,) * 2, dim).view(
            -1, 2, 2, dim // 4
        )  # T, sin cos, axis, band
        self.register_buffer(
            "pos_embed", embed.transpose(1, 2).flip(1).reshape(1, -1, dim)
        )  # SiT: x first
        self.t_embedder = nn.ModuleDict(
            dict(mlp=nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim)))
        )
        self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(classes + 1, dim)))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.final_layer = nn.ModuleDict(
            dict(
                linear=nn.Linear(dim, patch**2 * channels * (1 + learn_sigma)),
                adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)),
            )
        )
        for name, p in self.named_parameters():  # as SiT, all gates and the output start at 0
            if "adaLN" in name or "final" in name:
                nn.init.zeros_(p)

    def null(self, y):
        return torch.full_like(y, self.classes)

    def forward(self, x, t, y):
        angle = (1 - t if self.learn_sigma else t)[:, None] * 1e4 ** (
            -torch.arange(128, device=x.device) / 128
        )
        c = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], 1)) + self.y_embedder[
            "embedding_table"
        ](y)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, 2)
        h, p, n = (
            self.final_layer["linear"](modulate(h, shift, scale)),
            self.patch,
            x.shape[2] // self.patch,
        )
        v = (
            h.view(len(x), n, n, p, p, -1)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(len(x), -1, n * p, n * p)
        )
        return -v[:, : self.channels] if self.learn_sigma else v


def read_sit(path, args):
    """The SiT in a file of SiT or REPA, or in a run's student/. ValueError: none, another kind or size."""
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # rides in their training checkpoints
            state = torch.load(
                path / "student/sit.pt" if path.is_dir() else path, "cpu", weights_only=True
            )
        state = {
            k: v for k, v in state.get("ema", state).items() if not k.startswith("projectors.")
        }  # REPA's, unused
        learn_sigma = (
            len(state["final_layer.linear.bias"]) > state["x_embedder.proj.weight"][0].numel()
        )
        net = SiT(args.model, args.image_size // 8, learn_sigma=learn_sigma)
        net.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"{path} is no SiT {args.model} at {args.image_size} px ({error!s:.130})"
        ) from error
    return net


def denoiser(net):
    return amd.x0_from_flow(running.autocast(net.pos_embed)(net.__call__))


def seeded(*ints):
    return torch.Generator().manual_seed(amd.key(*ints))


def levels(args):
    return [
        1 - i / args.student_steps for i in range(args.student_steps)
    ]  # of the student's sampler


@torch.no_grad()
def solve(net, x, y, w, steps=25):
    """A SiT's ODE, dx/dt = (x - x0_hat) / t, at CFG scale w, by Euler: noise x (B, ...), y (B,) -> (B, ...)."""
    for t, low in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        x = (
            x
            + (low - t)
            / t
            * amd.displace(x, x, x.new_full((len(x),), t), y, net.null, denoiser(net), None, w).real
        )
    return x


def backbone(args, device):
    """-> teacher, decode: latents -> images (B, C, H, W) in [-1, 1] and a little beyond, shape of a latent."""
    if args.fit:
        return (
            (net := fit(args, "teacher", device)),
            nn.Identity(),
            (net.channels, *[args.image_size] * 2),
        )
    if not (args.teacher or args.dry_run):
        raise ValueError("give --teacher, a file of SiT or REPA, or --preset digits")
    torch.manual_seed(0)  # random weights are alike on all ranks, and when a run goes on
    teacher = (
        read_sit(args.teacher, args) if args.teacher else SiT(args.model, args.image_size // 8)
    )
    for p in teacher.parameters() if not args.teacher else ():
        nn.init.normal_(p, std=0.02)
    from diffusers import AutoencoderKL

    widths = (
        (8,) * 4 if args.dry_run == "tiny" else (128, 256, 512, 512)
    )  # the latter are sd-vae-ft-ema's
    vae = (
        AutoencoderKL.from_pretrained(args.vae)
        if not args.dry_run
        else AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            block_out_channels=widths,
            norm_num_groups=widths[0] // 4,
        )
    )
    vae.to(device).eval().requires_grad_(False)
    return (
        teacher.to(device),
        lambda x: vae.decode(x / 0.18215).sample.float(),
        (4, *[args.image_size // 8] * 2),
    )


# -------------------------------------------------------------------------------------------------------------- reward
HEAD = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_linear4_head.pth"


def log_p(logits, y):
    return logits.float().log_softmax(1).gather(1, y[:, None])[:, 0]


def dinov2(net, head):
    """timm's network, the official head -> images (B, 3, H, W) in [0, 1] to logits (B, 1000): dinov2_vitl14_lc."""
    from torchvision.transforms.v2.functional import normalize

    embed, grid = (
        net.pos_embed[:, :1],
        net.pos_embed[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2),
    )
    grid = F.interpolate(
        grid, scale_factor=16.1 / 37, mode="bicubic"
    )  # as DINOv2 does it, timm has another way
    net.set_input_size(224)
    net.pos_embed = nn.Parameter(torch.cat([embed, grid.flatten(2).mT], 1), requires_grad=False)

    def logits(image):
        image = normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        image = F.interpolate(image, (224, 224), mode="bicubic", antialias=True)
        layers = net.get_intermediate_layers(image, n=4, norm=True, return_prefix_tokens=True)
        return head(torch.cat([*(prefix[:, 0] for _, prefix in layers), layers[-1][0].mean(1)], 1))

    return logits


def load_reward(args, decode, device):
    """-> reward(x, y) = log p(y | image of latents x) (B,), with a gradient if x has one (DMDR)."""
    if args.fit:
        return lambda x, y, net=fit(args, "reward", device): log_p(net(x.clamp(-1, 1)), y)
    import timm

    net = timm.create_model(
        "vit_large_patch14_dinov2.lvd142m",
        not args.dry_run,
        num_classes=0,
        **(dict(embed_dim=32, depth=4, num_heads=2) if args.dry_run == "tiny" else {}),
    )
    head = nn.Linear(5 * net.embed_dim, 1000)
    if not args.dry_run:
        head.load_state_dict(
            torch.hub.load_state_dict_from_url(HEAD, None, "cpu", weights_only=True)
        )
    classify = dinov2(*(part.to(device).eval().requires_grad_(False) for part in (net, head)))
    score = running.autocast(head.bias)(
        lambda x, y: log_p(classify(((decode(x) + 1) / 2).clamp(0, 1)), y)
    )

    def reward(
        x, y
    ):  # 16 at a time, and again for a gradient: nothing is as large as the decoder's activations
        parts = zip(x.split(16), y.split(16), strict=True)
        return torch.cat(
            [torch.utils.checkpoint.checkpoint(score, *part, use_reentrant=False) for part in parts]
        )

    return reward


# -------------------------------------------------------------------------- evaluation, as the ADM evaluator defines it
def compare(f, real, stats=None, logits=None):
    """Features f (N, D), real (M, D) or its {mu, sigma}, logits (N, classes) -> FD; with logits IS (mean over runs
    of 5,000), precision (share of f in balls about real that reach its third neighbours) and recall, the reverse."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    p, q = (
        fid_features_to_statistics(f.double().cpu()),
        stats or fid_features_to_statistics(real.double().cpu()),
    )
    got = dict(FD=fid_statistics_to_metric(p, q, False)["frechet_inception_distance"])
    if logits is None:
        return got
    scores = [
        isc_features_to_metric(part, 1, False)["inception_score_mean"]
        for part in logits.cpu().split(5000)
    ]
    balls = prc_features_to_metric(
        f.cpu(), real.cpu(), prc_neighborhood=3, save_cpu_ram=True, verbose=False
    )
    return got | dict(
        IS=sum(scores) / len(scores), precision=balls["precision"], recall=balls["recall"]
    )


def read_images(path):
    """A folder of images or an npz -> (N, H, W, 3) uint8, other arrays of the npz. ValueError: no such images."""
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    try:
        arrays = (
            dict(arr_0=np.stack([Image.open(p).convert("RGB") for p in files]))
            if files
            else dict(np.load(path))
        )
    except Exception as error:
        raise ValueError(
            f"{path}: give an npz, as of sample, or a folder of png, jpg of one size ({error})"
        ) from None
    images = arrays.pop("arr_0", np.empty(0))
    if (images.dtype, images.ndim, images.shape[3:]) != (np.uint8, 4, (3,)):
        raise ValueError(f"{path}: no uint8 arr_0")
    return torch.from_numpy(images), arrays


def inception(device):
    """-> images (B, H, W, 3) uint8 to pool (B, 2048), logits (B, 1008) without bias, features of sFID (B, 2023)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as there
    net, kept = (
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device),
        [],
    )
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: kept.append(out))
    return lambda x: (
        *net(x.to(device).permute(0, 3, 1, 2)),
        kept.pop()[:, :7].permute(0, 2, 3, 1).flatten(1),
    )


@torch.no_grad()
def evaluate(args, device):
    """Print FID, sFID, IS, precision, recall; the npz of --ref may hold ADM's mu, sigma, mu_s, sigma_s."""
    if not (args.samples and args.ref):
        raise ValueError("evaluate compares two sets: give --samples and --ref")
    (images, _), (real, given) = map(read_images, (args.samples, args.ref))
    if images.shape[1:] != real.shape[1:]:
        raise ValueError("--samples and --ref differ in size: make them one size")
    seen = lambda x, judge=inception(device): map(
        torch.cat,
        zip(*[judge(part) for part in running.progress(x.split(args.chunk))], strict=True),
    )
    (pool, logits, spatial), (pool_real, _, spatial_real) = seen(images), seen(real)
    stats, stats_s = (
        {m: given[m + k].astype(float) for m in ("mu", "sigma") if m + k in given}
        for k in ("", "_s")
    )
    got, sfid = (
        compare(pool, pool_real, stats, logits),
        compare(spatial, spatial_real, stats_s)["FD"],
    )
    print(json.dumps(dict(FID=got.pop("FD"), sFID=sfid, **got)))


# ---------------------------------------------------------------------------------------------- optimizers and sharding
def prepare(args, device):
    """-> a namespace of all names below: networks (nets, call), opts, ema, parts to save, train, generate, batch ..."""
    teacher, decode, shape = backbone(args, device)
    names = ["student", "fake"] + ["blended"] * (
        args.method in ("dmdr", "magic")
    )  # the last is the adapted teacher
    nets = {name: copy.deepcopy(teacher) for name in names} | dict(real=teacher)
    for name, net in nets.items():
        net.requires_grad_(name in ("student", "fake"))
        for block in net.blocks if args.compile else ():
            block.compile(dynamic=False)
        running.shard(net, net.blocks, torch.bfloat16 if device.type == "cuda" else None)
    call, (rank, world, _) = {name: denoiser(net) for name, net in nets.items()}, running.ranks()

    def generate(y, u=1.0):
        return amd.backward_simulation(
            call["student"], torch.randn(len(y), *shape, device=device), y, levels(args), u
        )

    def adapt(r):
        return amd.blend(nets["blended"], nets["real"], nets["fake"], r) or call["blended"]

    def batch(n, j):  # of all groups, what this rank and micro-batch have
        y = torch.randint(
            teacher.classes, (args.batch // args.group,), generator=seeded(args.seed, n)
        )
        y = y.repeat_interleave(args.group).view(world * args.accum, -1)[rank * args.accum + j]
        return y.to(device, non_blocking=True)

    opts = [
        torch.optim.AdamW(
            nets[name].parameters(), lr, weight_decay=0.01, fused=True
        )  # DMDR's, as is the clip
        for name, lr in (("student", args.lr), ("fake", args.fake_lr))
    ]
    ema, reward = running.EMA(nets["student"], args.ema), load_reward(args, decode, device)
    train = partial(
        amd.train,
        student=generate,
        real=call["real"],
        fake=call["fake"],
        batch=batch,
        opt_student=opts[0],
        opt_fake=opts[1],
        reward=reward,
        K=args.group,
        null=teacher.null,
        w=args.w[0],
        adapt=adapt,
        accum=args.accum,
        fake_steps=args.fake_steps,
        update=partial(running.update, clip=1.0),
        ranks=running.ranks(),
        seed=args.seed,
    )
    parts = dict(student=(nets["student"], opts[0], ema), fake=(nets["fake"], opts[1], None))
    return argparse.Namespace(**locals())


# ------------------------------------------------------------------------------------------------------------- training
def variant(args, **kw):
    return argparse.Namespace(**vars(args) | kw)


def begin(args):
    return running.open_run(args.out, dict(vars(args), resume=None), args.resume)


def train(args, device):
    """A.4: stage one, pure DMD in OUT/base, if there is no --init; stage two, --method; then OUT/student/sit.pt."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if (args.out / "student/sit.pt").exists():
        return begin(args)  # done; or of another run, and it says so
    base = args.init or (args.out / "base" if args.base_steps else None)
    if base != args.init:
        train(variant(args, out=base, method="dmd", base_steps=0, steps=args.base_steps), device)
    lam = args.lam if args.method == "dmdr" else 0.0
    method = amd.method(
        args.method,
        s=args.s,
        tau=args.tau,
        lam=lam,
        fade=max(1, args.steps // 2),
        unit_w=args.tau < 1,
    )
    run, out, steps = prepare(args, device), begin(args), args.steps
    if (
        not (start := running.load(out, **run.parts))
        and base
        and not running.load(base, **run.parts)
    ):
        raise ValueError(f"{base} has no checkpoints: choose the folder of a run")
    for name in ("student", "samples"):
        (out / name).mkdir(exist_ok=True)
    logs = run.train(
        method, start=start, reward=run.reward if base or method.senses or method.lam else None
    )
    log, bar = (
        running.Log(out, args.batch, start),
        running.progress(total=steps, initial=start, desc=out.name),
    )
    for row in islice(logs, steps - start):
        run.ema.update(), bar.update()
        due = lambda every, step=row["step"]: step % every == 0 or step == steps
        if due(args.log_every):
            bar.set_postfix({k: v for k, v in log(row).items() if k in ("reward", "g_norm")})
        if due(args.sample_every):
            show(args, run, out / f"samples/step_{row['step']}.png")
        if due(args.save_every):
            running.save(out, row["step"], **run.parts)
    run.ema.swap()
    state = get_model_state_dict(
        run.nets["student"], options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if running.ranks()[0] == 0:
        torch.save(dict(ema=state), new := out / "student/new"), new.rename(out / "student/sit.pt")


@torch.no_grad()
def show(args, run, path):
    """Samples by the student's average to a png; the presets measure --count of them, to a json beside it."""
    from torchvision.utils import save_image

    y = (
        torch.arange(args.count if args.fit else 16, device=run.device)
        * (1 if args.fit else 61)
        % run.teacher.classes
    )
    run.ema.swap(), torch.manual_seed(amd.key(args.seed))
    x = torch.cat([run.decode(run.generate(part)[0]) for part in y.split(500)])
    run.ema.swap()
    if running.ranks()[0] == 0:
        save_image((x[:40].cpu() + 1) / 2, path, nrow=20 if args.fit else 4, padding=1)
    if args.fit:
        running.write(path.with_suffix(".json"), json.dumps(measure(args, x, y)))


@torch.no_grad()
def sample(args, device):
    """--count images of a student to OUT/samples.npz; any number of processes share the chunks."""
    (net, decode, shape), (rank, world, _), teacher = (
        backbone(args, device),
        running.ranks(),
        args.teacher or args.out,
    )
    if teacher.is_dir():
        args.student_steps = running.read_config(teacher)["student_steps"]
    (chunks := begin(args) / "chunks").mkdir(exist_ok=True)
    y = torch.randint(net.classes, (args.count,), generator=seeded(args.seed))
    if args.labels == "balanced":
        y = torch.arange(args.count) % net.classes
    for k, part in running.progress([*enumerate(y.to(device).split(args.chunk))][rank::world]):
        if (path := chunks / f"{k:06}.npy").exists():
            continue
        torch.manual_seed(amd.key(args.seed, k))
        z = torch.randn(len(part), *shape, device=device)
        x = amd.backward_simulation(denoiser(net), z, part, levels(args)).x
        x = (127.5 * decode(x) + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
        (
            np.save(chunks / f"_{k}.npy", x.cpu()),
            (chunks / f"_{k}.npy").rename(path),
        )  # a whole one or none
    running.gather(torch.zeros(1))
    if rank == 0:
        np.savez(
            args.out / "samples",
            arr_0=np.concatenate([*map(np.load, sorted(chunks.glob("0*.npy")))]),
        )


def speed(args, device):
    """Print what an update takes beside the bare calls of the same networks that it needs, and the GPU's memory."""
    run, off = prepare(variant(args, accum=1), device), torch.no_grad()
    clock = running.Clock()
    y, (G, real, fake) = run.batch(0, 0), map(run.call.get, ("student", "real", "fake"))
    x, t = run.generate(y)[0].detach(), torch.rand(len(y), device=device)
    for name, call in dict(
        forward=off(lambda: G(x, t, y)),
        backward=lambda: fake(x, t, y).square().mean().backward(),
        real=off(lambda: real(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y]))),
        reward=off(lambda: run.reward(x, y)),
        adamw=run.opts[1].step,
    ).items():
        clock(name, call)
    one, three = (
        clock(
            f"update with {n} of the fake",
            partial(next, run.train(amd.method("amd"), fake_steps=n)),
        )
        for n in (1, 3)
    )
    (dim, depth, _), tokens = (
        SIZES[args.model.split("/")[0]],
        (args.image_size // 8 // int(args.model[-1])) ** 2,
    )
    flops = (
        len(y) * depth * tokens * (24 * dim**2 + 4 * tokens * dim)
    )  # forward; twice as many backward
    both = dict(forward=1, backward=2, real=1, reward=1, adamw=2)
    for name, took, needs, n in (
        ("student and fake update", one, both, 8),
        ("fake update", (three - one) / 2, dict(forward=1, backward=1, reward=1, adamw=1), 4),
    ):
        clock.ratio(name, took, needs)
        running.say(
            f"SiT at {n * flops / took / 1e12:.1f} TFLOP/s, {n * flops / took / 989e12:.1%} of an H100's peak"
        )
    running.say(f"samples: {len(y)}; peak {running.peak_gib():.1f} GiB")


# ------------------------------------------------------------------------ the presets: all arms, small, on real images
@cache
def dataset(preset, data, size):
    """-> images (N, C, H, W) uint8 and classes (N,) to train on, a fifth of both held out, number of classes."""
    if preset == "digits" and not data:
        from sklearn.datasets import load_digits

        x, y = map(torch.from_numpy, load_digits(return_X_y=True))
        x = F.interpolate((x * 255 / 16).view(-1, 1, 8, 8), (size, size)).round().byte()
    else:
        from torchvision.datasets import CIFAR10, ImageFolder
        from torchvision.transforms import v2

        form = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
        images = (
            ImageFolder(data, form) if data else CIFAR10("runs/data", transform=form, download=True)
        )
        x, y = (
            torch.stack(v) for v in zip(*[(x, torch.tensor(y)) for x, y in images], strict=True)
        )
    if (classes := len(y.unique())) < 2:
        raise ValueError(f"{data} has one class: give several, DATA/class/*.png")
    held, kept = torch.randperm(len(x), generator=seeded(0)).tensor_split([len(x) // 5])
    return x[kept], y[kept], x[held], y[held], classes


def fit(args, name, device):
    """The teacher (flow matching), the reward or the judge (two unlike classifiers), trained once, in ROOT/name.pt."""
    x, y, *_, classes = dataset(args.preset, args.data, args.image_size)
    torch.manual_seed(amd.key(args.seed, *name.encode()))
    kernel, *w = dict(teacher=(0, 0, 0, 0), reward=(3, 32, 64, 128), judge=(5, 48, 96, 192))[name]
    net = (
        SiT(args.model, args.image_size, x.shape[1], classes)
        if name == "teacher"
        else nn.Sequential(
            *[
                nn.Sequential(
                    nn.Conv2d(a, b, kernel, padding="same"),
                    nn.GroupNorm(8, b),
                    nn.SiLU(),
                    nn.AvgPool2d(2, ceil_mode=True),
                )
                for a, b in pairwise([x.shape[1], *w])
            ],
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(w[2], classes),
        )
    )
    if (path := args.root / f"{name}.pt").exists():
        net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return net.to(device).eval().requires_grad_(False)
    for block in net.blocks if args.compile and name == "teacher" else ():
        block.compile(dynamic=False)
    x, y, (steps, lr) = (
        x.to(device),
        y.to(device),
        args.fit[["teacher", "reward", "judge"].index(name)],
    )
    opt = torch.optim.AdamW(net.to(device).parameters(), lr, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps)
    for _ in running.progress(range(steps), desc=name):
        pick = torch.randint(len(x), (2 * args.batch,), device=device)
        clean, label, t = x[pick] / 127.5 - 1, y[pick], torch.rand(len(pick), device=device)
        with running.autocast(clean):
            if name == "teacher":
                eps, label = torch.randn_like(clean), label.where(torch.rand_like(t) > 0.1, classes)
                loss = F.mse_loss(net(amd.renoise(clean, t, eps), t, label), eps - clean)
            else:
                loss = F.cross_entropy(net(clean), label)
        loss.backward(), opt.step(), opt.zero_grad(), rate.step()
    torch.save(net.state_dict(), part := path.with_suffix(".part")), part.rename(path)
    return fit(args, name, device)


@torch.no_grad()
def measure(args, x, y):
    """Images x (N, C, H, W), [-1, 1], of classes y -> FD, IS, precision, recall, accuracy by the judge, the reward."""
    reward, judge = (fit(args, name, x.device) for name in ("reward", "judge"))
    seen = lambda x: map(
        torch.cat, zip(*[(f := judge[:-1](v), judge[-1](f)) for v in x.split(1000)], strict=True)
    )
    real, x = (
        dataset(args.preset, args.data, args.image_size)[0][:10_000].to(x.device) / 127.5 - 1,
        x.clamp(-1, 1),
    )
    (f, logits), (f_real, _) = seen(x), seen(real)
    told = dict(reward=log_p(reward(x), y), accuracy=(logits.argmax(1) == y).double())
    return compare(f, f_real, None, logits) | {k: v.mean().item() for k, v in told.items()}


def lab(args, device):
    """Teacher, reward, judge; for each w a base of pure DMD, from it every arm with every seed; table and pictures."""
    (*_, x, y, classes), out, rows, runs = (
        dataset(args.preset, args.data, args.image_size),
        begin(args),
        {},
        {},
    )
    args = variant(args, root=args.init or out)
    *_, teacher = (fit(args, name, device) for name in ("reward", "judge", "teacher"))
    rows["real, held out"] = [measure(args, x.to(device) / 127.5 - 1, y.to(device))]
    z, y = (
        torch.randn(args.count, *x.shape[1:]).to(device),
        torch.arange(args.count, device=device) % classes,
    )
    for w in args.w:
        own, base = (
            partial(variant, args, w=[w], resume=True, base_steps=0),
            args.root / f"base {w:g}",
        )
        first = own(out=base, init=None, method="dmd", steps=args.base_steps)
        if not (base / "student/sit.pt").exists():
            train(first, device)
        x = torch.cat(
            [solve(teacher, *part, w) for part in zip(z.split(500), y.split(500), strict=True)]
        )
        rows[f"teacher, w = {w:g}"] = [measure(args, x, y)]
        runs |= {
            f"{arm}, w = {w:g}": [
                own(out=out / f"{arm}, w = {w:g}, seed {i}", seed=i, init=base, **ARMS[arm])
                for i in range(args.seed, args.seed + args.seeds)
            ]
            for arm in args.arms
        }
    with get_context("spawn").Pool(
        1 if device.type == "cuda" else os.cpu_count(), torch.set_num_threads, (1,)
    ) as pool:
        jobs = [pool.apply_async(train, (run, device)) for seeds in runs.values() for run in seeds]
        for job in running.progress(jobs, desc="arms"):
            job.get()
        pool.close(), pool.join()
    steps = [
        step
        for step in range(1, args.steps + 1)
        if step % args.sample_every == 0 or step == args.steps
    ]
    curves = {
        title: [
            [json.loads((run.out / f"samples/step_{i}.json").read_text()) for run in seeds]
            for i in steps
        ]
        for title, seeds in runs.items()
    }
    rows |= {title: curve[-1] for title, curve in curves.items()}
    running.write(out / "table.json", json.dumps(dict(rows=rows, steps=steps, curves=curves)))
    plot(
        out,
        curves,
        steps,
        [seeds[0].out / f"samples/step_{args.steps}.png" for seeds in runs.values()],
    )
    print(" " * 20 + "".join(f"{k:>17}" for k in rows["real, held out"][0]))
    for title, seeds in rows.items():
        v = torch.tensor([list(row.values()) for row in seeds]).T
        spread = [f"+-{u.std():6.3f}" if len(u) > 1 else "" for u in v]
        print(
            f"{title:20}"
            + "".join(f"{u.mean():8.3f} {s:8}" for u, s in zip(v, spread, strict=True))
        )


def plot(out, curves, steps, pictures):
    """curves.png: measures against student updates (Figs. 5, 6). samples.png: what each arm draws, in order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3), layout="constrained", dpi=110)
    for ax, k in zip(figure.subplots(1, 4), ("FD", "IS", "reward", "recall"), strict=True):
        for title, curve in curves.items():
            v = torch.tensor([[row[k] for row in rows] for rows in curve])
            ax.errorbar(
                steps, v.mean(1), v.std(1, correction=v.shape[1] > 1), label=title, capsize=2
            )
        ax.set(title=k, xlabel="student updates")
    (
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center"),
        figure.savefig(out / "curves.png"),
    )
    Image.fromarray(np.concatenate([*map(Image.open, pictures)]).repeat(3, 0).repeat(3, 1)).save(
        out / "samples.png"
    )


def main(args):
    """ValueError for what cannot work, before anything is written or downloaded."""
    counts = "batch accum fake_steps student_steps steps seeds count chunk log_every save_every sample_every".split()
    bad = [k for k in [*counts, "lr", "fake_lr"] if not vars(args)[k] > 0] + ["w"] * (
        not all(w > 0 for w in args.w)
    )
    if bad or not 0 <= args.ema < 1 or args.base_steps < 0:
        raise ValueError(f"choose {', '.join(bad) or '--base-steps'} above 0, --ema in [0, 1)")
    amd.method(args.method, s=args.s, tau=args.tau, lam=args.lam)
    amd.group_advantage(torch.zeros(args.batch), args.group)
    if not args.fit and (len(args.w) > 1 or args.image_size % 8):
        raise ValueError("choose one --w, --image-size 8 n")
    init = running.read_config(args.init) if args.init else vars(args)
    if differ := [
        k for k in ("preset", "data", "model", "image_size") if str(init[k]) != str(vars(args)[k])
    ]:
        raise ValueError(
            f"--init {args.init} is a run of another {', '.join(differ)}: choose the same"
        )
    device, parts = running.launch(), running.ranks()[1] * args.accum
    if args.task != "evaluate" and running.together((args.out / "config.json").exists()):
        begin(args)  # a folder that cannot be used is refused before anything is loaded
    if args.batch % parts:
        raise ValueError(
            f"--batch {args.batch} on {parts} ranks and micro-batches: take a multiple"
        )
    if args.fit and (
        args.task == "sample" or parts > args.accum or args.teacher or args.method != "amd"
    ):
        raise ValueError(
            f"--preset {args.preset} trains --arms by python: no sample, torchrun, --teacher, --method"
        )
    job = lab if args.fit else speed if args.dry_run == "full" else train
    dict(train=job, sample=sample, evaluate=evaluate)[args.task](args, device)
    if args.task != "evaluate" and job is not speed and running.ranks()[0] == 0:
        print(f"see {args.out}")


if __name__ == "__main__":
    running.run(main, parse)
