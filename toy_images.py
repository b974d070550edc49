"""The lab of AMD on real images: the paper's Table 4 and Figs. 5, 6 in small.

    python toy_images.py                                   # 8x8 digits, six arms, 3 seeds: minutes
    python toy_images.py --student-steps 4 --arms DMD AMD  # exit by exit, one fake and exit-aware
    python toy_images.py --reward linear --arms DMD AMD DMDR  # a reward that is easily hacked
    python toy_images.py --data cifar10                    # one GPU
    python toy_images.py --data FOLDER --image-size 32     # FOLDER/class/*.png
    python toy_images.py --study exits --init runs/toy_images --out runs/exits  # beyond the paper

A SiT in pixel space learns the images, a few-step student of it is trained by pure DMD, and from
this base every arm goes on, with every seed; in a study (docs/findings.md) each seed has a base of
its own. One classifier is the reward; another, the judge, measures what comes out. --out gets
table.json, curves.png, logs.png and samples.png; the table is printed, mean and standard deviation
over seeds. A study compares its arms seed by seed, too, and gets differences.png. An interrupted
lab goes on with --resume.
"""

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amd
import running
from parts import beyond
from parts.images import labelled_folder, open_image
from parts.metrics import LEAST, frechet_distance, inception_score, precision_recall
from parts.rewards import log_p
from parts.sit import SiT, dimensions

ARMS = {  # the row of amd.METHODS, and what differs from the command line
    "DMD": ("dmd", {}),
    "DSA only": ("amd", dict(tau=math.inf)),
    "RLS only": ("amd", dict(s=0.0)),
    "AMD": ("amd", {}),
    "DMDR": ("dmdr", {}),
    "naive": ("naive", {}),
}


@dataclass(frozen=True)
class Study:
    """Ideas beyond the paper, measured: docs/findings.md.

    arms      as ARMS has them; `operator` is one of beyond.operators_of
    against   the arm that each arm is compared with, at its w and kind of exits
    settings  defaults of the command line, and what else differs in Lab
    kinds     of beyond.EXITS; a kind is compared with "one fake", of the same arm
    less_w    compare an arm with the other at each smaller w, too
    """

    arms: dict[str, tuple[str, dict]]
    against: dict[str, str]
    settings: dict
    kinds: tuple[str, ...] = ()
    less_w: bool = False


def study_of_dsa() -> Study:
    """Does Dynamic Score Adaptation do anything where there is guidance, alone or with RLS?"""
    arms = {"DMD": ("dmd", {}), "RLS only": ("amd", dict(s=0.0))}
    against = {"RLS only": "DMD"}
    for s in (0.25, 0.5, 1.0):
        arms[f"DSA only, s = {s:g}"] = ("amd", dict(s=s, tau=math.inf))
        arms[f"AMD, s = {s:g}"] = ("amd", dict(s=s))
        against |= {f"DSA only, s = {s:g}": "DMD", f"AMD, s = {s:g}": "RLS only"}
    return Study(arms, against, dict(w=[1.25, 2.0]))


def study_of_hacking() -> Study:
    """What is a reward worth, and what does it cost, by DMDR's weight and by AMD's temperature?"""
    arms = {"DMD": ("dmd", {})}
    arms |= {f"DMDR, lam = {lam:g}": ("dmdr", dict(lam=lam)) for lam in (0.05, 0.15, 0.5)}
    arms |= {f"AMD, tau = {tau:g}": ("amd", dict(tau=tau, unit_w=True)) for tau in (1.0, 0.5, 0.25)}
    return Study(arms, dict.fromkeys([*arms][1:], "DMD"), dict(reward="linear"))


def study_of_operators() -> Study:
    """Other ways to join matching and guidance; some do it by taking guidance away."""
    arms = {"DMD": ("dmd", {}), "AMD": ("amd", {})}
    arms |= {f"AMD, {name}": ("amd", dict(operator=name)) for name in beyond.operators_of(None)}
    against = {name: "AMD" for name in arms if name != "AMD"}
    # taking a part of CA away would change the normaliser mean |d_real|, and so the weight of DM
    return Study(arms, against, dict(w=[1.5], normalize=False), less_w=True)


STUDIES = {
    "operators": study_of_operators(),
    "dsa": study_of_dsa(),
    "exits": Study(
        {"DMD": ("dmd", {}), "AMD": ("amd", {})},
        {"AMD": "DMD"},
        # a norm of 1 would undo a weight in the fake's loss
        dict(student_steps=4, clip=10.0),
        tuple(beyond.EXITS),
    ),
    "hacking": study_of_hacking(),
}
SHOWN = ("FD", "IS", "reward", "recall")  # in curves.png
LOGGED = [  # in logs.png
    "loss_fake",
    "loss_student",
    "g_norm",
    "dm_norm",
    "ca_norm",
    "reward",
    "reward_std",
    "adv_clip",
    "w_mean",
    "skipped",
]
HELD_OUT = 5  # each fifth image is not trained on


@dataclass(frozen=True)
class Lab:
    """All settings; most have a flag.

    root        where the networks and the bases lie
    fit_*       updates that the teacher, the reward and the judge are trained for
    batch       samples of an update; the fits take twice as many
    base_steps  updates of pure DMD, before the arms
    steps       updates of an arm
    clip        the largest norm of a network's gradient
    normalize   divide g by the mean of |d_real|, as amd.train does?
    count       samples that are measured
    """

    out: Path = Path("runs/toy_images")
    root: Path = Path("runs/toy_images")
    study: str = ""
    data: str = "digits"
    image_size: int = 8
    model: str = "digits/2"
    reward: str = "cnn"
    fit_teacher: int = 1500
    fit_reward: int = 100
    fit_judge: int = 400
    teacher_lr: float = 1e-3
    batch: int = 64
    group: int = 8
    student_steps: int = 1
    fake_steps: int = 3
    base_steps: int = 200
    steps: int = 100
    lr: float = 3e-4
    fake_lr: float = 6e-4
    ema: float = 0.95
    clip: float = 1.0
    normalize: bool = True
    s: float = 0.5
    tau: float = 1.0
    lam: float = 0.05
    seed: int = 0
    count: int = 2000
    sample_every: int = 25

    @property
    def levels(self) -> list[float]:
        """The levels of the student's steps."""
        return [1 - i / self.student_steps for i in range(self.student_steps)]

    @property
    def arms(self) -> dict[str, tuple[str, dict]]:
        """The row of amd.METHODS of each arm, and what differs from the command line."""
        return STUDIES[self.study].arms if self.study else ARMS

    @property
    def settings(self) -> dict:
        """All that makes the numbers, for config.json: a lab may be moved, so no paths."""
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in ("out", "root")}

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


CIFAR10 = dict(
    image_size=32,
    model="cifar10/2",
    fit_teacher=5600,
    fit_reward=2000,
    fit_judge=2000,
    teacher_lr=6e-4,
    batch=256,
    base_steps=600,
    steps=300,
    lr=5e-5,
    fake_lr=5e-5,
    ema=0.99,
    count=10_000,
    sample_every=75,
)


@dataclass(frozen=True)
class Job:
    """What a worker process is to do.

    what   the network that is fitted, or the arm that is trained or measured
    out    the folder of a training run
    exits  what is done about them, of beyond.EXITS
    base   the run that an arm starts from; None: it is the base
    """

    lab: Lab
    what: str
    steps: int
    w: float = 1.0
    seed: int = 0
    exits: str = "one fake"
    out: Path | None = None
    base: Path | None = None


# --------------------------------------------------------------------------------------------- data
@dataclass(frozen=True)
class Images:
    """Images x (N, C, H, W) in bytes and their classes y (N,), to train on and held out."""

    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor
    classes: int


@cache
def read_images(data: str, size: int) -> Images:
    """scikit-learn's digits, CIFAR-10 (downloaded by torchvision), or a labelled folder.

    ValueError: a folder cannot be read, or has too few images.
    """
    if data == "digits":
        from sklearn.datasets import load_digits

        pixels, y = map(torch.from_numpy, load_digits(return_X_y=True))
        x = (pixels * 255 / 16).view(-1, 1, 8, 8)
        x = F.interpolate(x, (size, size)).round().byte()
    elif data == "cifar10":
        from torchvision.datasets import CIFAR10

        loaded = CIFAR10("runs/data", download=True)
        x = torch.stack([square(image, size) for image, _ in loaded])
        y = torch.tensor([label for _, label in loaded])
    else:
        paths, labels, _ = labelled_folder(Path(data))
        x = torch.stack([square(open_image(path), size) for path in paths])
        y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=running.seeded(0))
    held, kept = order.tensor_split([len(x) // HELD_OUT])
    running.require(
        len(held) >= 4, f"{data} has {len(x)} images: give 20 at least, a fifth is held out"
    )
    return Images(x[kept], y[kept], x[held], y[held], len(y.unique()))


def square(image, size: int) -> Tensor:
    """An image of PIL, its middle square at size x size pixels -> (C, size, size) in bytes."""
    from torchvision.transforms.v2 import functional as vision

    image = vision.center_crop(vision.resize(image, size), size)
    return vision.pil_to_tensor(image)


# -------------------------------------------------- networks that are fitted once, and then frozen
def classifier(channels: int, classes: int, kernel: int, widths: list[int]) -> nn.Sequential:
    """A small CNN; all but its last layer are the features."""
    stages = [
        nn.Sequential(
            nn.Conv2d(a, b, kernel, padding="same"),
            nn.GroupNorm(8, b),
            nn.SiLU(),
            nn.AvgPool2d(2, ceil_mode=True),
        )
        for a, b in pairwise([channels, *widths])
    ]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stages, *pool, nn.Linear(widths[-1], classes))


def build(lab: Lab, what: str) -> nn.Module:
    """A network with random weights.

    The reward and the judge are unlike each other, so that one sees how the other is hacked. A
    linear reward is blind to all but one picture a class.
    """
    images = read_images(lab.data, lab.image_size)
    channels, size, _ = images.x.shape[1:]
    if what == "teacher":
        return SiT(lab.model, lab.image_size, channels, images.classes)
    if what == "judge":
        return classifier(channels, images.classes, 5, [48, 96, 192])
    if lab.reward == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, images.classes))
    return classifier(channels, images.classes, 3, [32, 64, 128])


def file_of(lab: Lab, what: str) -> Path:
    """Where the weights of a fitted network lie."""
    name = f"reward_{lab.reward}_{lab.fit_reward}" if what == "reward" else what
    return lab.root / f"{name}.pt"


@cache
def fitted(lab: Lab, what: str) -> nn.Module:
    """The teacher, reward or judge of a lab, frozen."""
    net = build(lab, what)
    net.load_state_dict(torch.load(file_of(lab, what), map_location="cpu", weights_only=True))
    return net.to(lab.device).eval().requires_grad_(False)


def fit(job: Job) -> None:
    """Train the teacher by flow matching, the reward or the judge by cross-entropy, to its file."""
    lab, what = job.lab, job.what
    path = file_of(lab, what)
    if path.exists():
        return
    images = read_images(lab.data, lab.image_size)
    x, y = images.x.to(lab.device), images.y.to(lab.device)
    torch.manual_seed(amd.key(lab.seed, *what.encode()))
    net = build(lab, what).to(lab.device)
    lr = lab.teacher_lr if what == "teacher" else 3e-3
    opt = torch.optim.AdamW(net.parameters(), lr, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, job.steps)

    for step in range(job.steps):
        pick = torch.randint(len(x), (2 * lab.batch,), device=lab.device)
        clean, label = x[pick] / 127.5 - 1, y[pick]
        with running.autocast(clean):
            if what == "teacher":
                loss = flow_loss(net, clean, label, images.classes)
            else:
                loss = F.cross_entropy(net(clean), label)
        loss.backward()
        opt.step()
        opt.zero_grad()
        rate.step()
        running.tick(step)

    beside = path.with_suffix(".unfinished")
    torch.save({k: v.cpu() for k, v in net.state_dict().items()}, beside)
    beside.rename(path)


def flow_loss(net: nn.Module, x: Tensor, y: Tensor, empty: int) -> Tensor:
    """Flow matching; a tenth of the labels is empty, for classifier-free guidance."""
    t, eps = torch.rand(len(x), device=x.device), torch.randn_like(x)
    y = torch.where(torch.rand_like(t) > 0.1, y, empty)
    return F.mse_loss(net(amd.renoise(x, t, eps), t, y), eps - x)


def denoiser(net: SiT) -> amd.Denoiser:
    return amd.x0_from_flow(running.autocast(net.pos_embed)(net.__call__))


def reward_of(lab: Lab) -> Callable[[Tensor, Tensor], Tensor]:
    """The reward log p(y | x) (B,) of images x (B, C, H, W), clamped to [-1, 1]."""
    net = fitted(lab, "reward")
    return lambda x, y: log_p(net(x.clamp(-1, 1)), y)


@torch.no_grad()
def solve(net: SiT, z: Tensor, y: Tensor, w: float, steps: int = 25) -> Tensor:
    """The teacher's flow from noise z (B, C, H, W) at CFG scale w, by Euler."""
    x = z
    for t, t_next in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        level = x.new_full((len(x),), t)
        d = amd.displace(x, x, level, y, net.null, denoiser(net), None, w)
        x = x + (t_next - t) / t * d.real  # the velocity is (x_t - x0_hat) / t
    return x


# ----------------------------------------------------------------------------------------- measures
@torch.no_grad()
def measure(lab: Lab, x: Tensor, y: Tensor) -> dict[str, float]:
    """Images x (N, C, H, W) in [-1, 1] of classes y (N,) -> numbers by name:

    reward      mean log p(y | x) by the reward's network
    accuracy    share of images that the judge takes for their class
    FD          Frechet distance of the judge's features to those of the training images
    IS          inception score by the judge
    precision   share of images whose features lie among those of the training images
    recall      share of training images whose features lie among those of the images
    """
    reward, judge = reward_of(lab), fitted(lab, "judge")
    x = x.clamp(-1, 1)
    features, real = features_of(lab, x), real_features(lab)
    logits = judge[-1](features)
    precision, recall = precision_recall(features, real)
    return dict(
        reward=reward(x, y).mean().item(),
        accuracy=(logits.argmax(1) == y).double().mean().item(),
        FD=frechet_distance(features, real),
        IS=inception_score(logits),
        precision=precision,
        recall=recall,
    )


@torch.no_grad()
def features_of(lab: Lab, x: Tensor) -> Tensor:
    """What the judge sees in images x (N, C, H, W) in [-1, 1] -> (N, D)."""
    see = fitted(lab, "judge")[:-1]
    return torch.cat([see(part) for part in x.split(1000)])


@cache
def real_features(lab: Lab) -> Tensor:
    """What the judge sees in the training images, or in the first 10,000 of them."""
    x = read_images(lab.data, lab.image_size).x[:10_000].to(lab.device)
    return features_of(lab, x / 127.5 - 1)


def measure_given(job: Job) -> dict[str, float]:
    """What the held-out images measure, or the teacher's samples at CFG scale w."""
    lab = job.lab
    images = read_images(lab.data, lab.image_size)
    if job.what == "real":
        return measure(lab, images.x_held.to(lab.device) / 127.5 - 1, images.y_held.to(lab.device))
    noise = running.seeded(lab.seed, 1)
    z = torch.randn(lab.count, *images.x.shape[1:], generator=noise).to(lab.device)
    y = torch.arange(lab.count, device=lab.device) % images.classes
    teacher, parts = fitted(lab, "teacher"), zip(z.split(500), y.split(500), strict=True)
    return measure(lab, torch.cat([solve(teacher, *part, job.w) for part in parts]), y)


# ------------------------------------------------------------------------------------- distillation
def distill(job: Job) -> None:
    """Train an arm with a seed, from its base or, if there is none, the base itself, by pure DMD.

    Its folder gets log.jsonl, samples/, checkpoints/ and, in the end, the file `done`.
    """
    lab, out = job.lab, job.out
    if (out / "done").exists():
        return
    images = read_images(lab.data, lab.image_size)
    teacher = fitted(lab, "teacher")
    student, fake, blended, averaged = (
        SiT(lab.model, lab.image_size, *images.x.shape[1:2], images.classes).to(lab.device)
        for _ in range(4)
    )
    for net in (student, fake, blended, averaged):
        net.load_state_dict(teacher.state_dict())
    for net in (blended, averaged):
        net.requires_grad_(False)
    if job.exits == "exit-aware":
        fake.tell_exits(lab.student_steps)
    opt_student, opt_fake = (
        torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=True)
        for net, lr in ((student, lab.lr), (fake, lab.fake_lr))
    )
    ema = running.EMA(student, lab.ema)

    generation = beyond.generation(job.exits, denoiser(student), lab.levels)

    def noise(y):
        return torch.randn(len(y), *images.x.shape[1:], device=lab.device)

    def generate(y, u):
        return generation(noise(y), y, u)

    def sample(y, u):
        return amd.backward_simulation(denoiser(student), noise(y), y, lab.levels, u)

    def batch(n, _j):
        groups = lab.batch // lab.group
        y = torch.randint(images.classes, (groups,), generator=running.seeded(job.seed, n))
        return y.repeat_interleave(lab.group).to(lab.device)

    def adapt(r):
        amd.blend(blended, teacher, fake, r)
        return denoiser(blended)

    def told(y, t_G):
        return y, torch.full_like(y, lab.levels.index(t_G))

    guess, aware = beyond.fake_of(job.exits, denoiser(fake), lab.levels, told)
    running.open_run(out, config_of(job), resume=True)
    (out / "samples").mkdir(exist_ok=True)
    parts = dict(student=(student, opt_student, ema), fake=(fake, opt_fake, None))
    start = running.load(out, **parts)
    if start == 0 and job.base:
        found = running.load(job.base, **parts)
        running.require(found, f"{job.base} has no checkpoint: remove it, to make it anew")
    beyond.follow(averaged, fake, rate=1.0)

    updates = amd.train(
        method_of(job, denoiser(averaged)),
        generate,
        denoiser(teacher),
        guess,
        batch,
        opt_student,
        opt_fake,
        reward=reward_of(lab),
        K=lab.group,
        null=teacher.null,
        w=job.w,
        normalize=lab.normalize,
        adapt=adapt,
        aware=aware,
        fake_steps=lab.fake_steps * beyond.more_updates(job.exits),
        update=partial(amd.update, clip=lab.clip),
        seed=job.seed,
        start=start,
    )
    log = running.Log(out, lab.batch, start)
    for row in islice(updates, job.steps - start):
        step = row["step"]
        ema.update()
        beyond.follow(averaged, fake)
        running.tick(step)
        if step % 10 == 0 or step == job.steps:
            log(row)
        if step % lab.sample_every == 0 or step == job.steps:
            with running.averaged(ema):
                show(job, sample, step)
    running.save(out, job.steps, keep=1, **parts)
    running.draw_log(out)
    (out / "done").touch()


# what a base does not depend on, so that labs of other arms can share it
OF_ARMS = {
    "study",
    "reward",
    "fit_reward",
    "fit_judge",
    "steps",
    "s",
    "tau",
    "lam",
    "seed",
    "count",
    "sample_every",
}


def config_of(job: Job) -> dict:
    """What config.json of a training run has: all that makes its networks."""
    left_out = set() if job.base else OF_ARMS
    settings = {k: v for k, v in job.lab.settings.items() if k not in left_out}
    own = dict(arm=job.what, steps=job.steps, w=job.w, seed=job.seed, exits=job.exits)
    return settings | own


def method_of(job: Job, average: amd.Denoiser | None = None) -> amd.Method:
    """The row of amd.METHODS that an arm trains by.

    average is a fake with averaged weights, which some operators of a study ask.
    """
    lab = job.lab
    name, changes = lab.arms[job.what]
    hyper = dict(s=lab.s, tau=lab.tau, lam=lab.lam if name == "dmdr" else 0.0) | changes
    hyper.setdefault("unit_w", hyper["tau"] < 1)
    operator = hyper.pop("operator", None)
    method = amd.method(name, **hyper)
    if operator:
        method = method._replace(F_t=beyond.operators_of(average)[operator])
    if name == "dmdr":  # it adapts its teacher in the stage before the reward, here the base
        method = method._replace(phi=amd.fixed)
    return method


@torch.no_grad()
def show(job: Job, generate: Callable, step: int) -> None:
    """Draw samples of the student, all from one seed, and measure those of each exit.

    They go to samples/step_N.png, which has the last exit's, and step_N.json.
    """
    from torchvision.utils import save_image

    lab = job.lab
    path = job.out / f"samples/step_{step}.png"
    y = torch.arange(lab.count, device=lab.device) % fitted(lab, "teacher").classes
    exits = []
    for i in range(lab.student_steps):
        torch.manual_seed(amd.key(lab.seed))
        u = (i + 0.5) / lab.student_steps
        x = torch.cat([generate(part, u).x for part in y.split(500)])
        exits.append(measure(lab, x, y))
    save_image((x[:40].cpu() + 1) / 2, path, nrow=20, padding=1)
    running.write(path.with_suffix(".json"), json.dumps(exits))


# ---------------------------------------------------------------------------------------- the table
def compare(lab: Lab, w: list[float], bases: list[Job], runs: dict[str, list[Job]]) -> None:
    """Fit the networks, train the bases and the arms, and write table and pictures."""
    read_images(lab.data, lab.image_size)  # the workers inherit them
    workers = running.Workers(0 if torch.cuda.is_available() else None)
    lab.root.mkdir(parents=True, exist_ok=True)
    fits = dict(teacher=lab.fit_teacher, reward=lab.fit_reward, judge=lab.fit_judge)
    workers.map(fit, [Job(lab, what, steps) for what, steps in fits.items()], "networks")

    given = {"real, held out": Job(lab, "real", 0)}
    given |= {f"teacher, w = {scale:g}": Job(lab, "teacher", 0, scale) for scale in w}
    measured = workers.map(measure_given, [*given.values()], "measures")
    rows = {name: [row] for name, row in zip(given, measured, strict=True)}

    workers.map(distill, bases, "bases")
    workers.map(distill, [job for jobs in runs.values() for job in jobs], "arms")
    report(lab, rows, runs)


def jobs_of(lab: Lab, args: argparse.Namespace) -> tuple[list[Job], dict[str, list[Job]]]:
    """What is to be trained: the bases; and the arms by name, each with all seeds.

    A study has a base for each seed, so that its intervals include how much bases vary.
    """
    seeds = range(lab.seed, lab.seed + args.seeds)
    of_bases = seeds if lab.study else [lab.seed]
    bases, runs = [], {}
    for w, exits in product(args.w, kinds(lab, args)):
        more = beyond.more_updates(exits)
        name = condition(lab, w, exits)
        places = {seed: lab.root / base_name(lab, name, seed) for seed in of_bases}
        bases += [
            Job(lab, "DMD", lab.base_steps // more, w, seed, exits, place)
            for seed, place in places.items()
        ]
        for arm in args.arms:
            if (arm, exits) == ("DMD", "mixed"):
                continue  # it has no groups
            runs[f"{arm}, {name}"] = [
                Job(
                    lab,
                    arm,
                    lab.steps // more,
                    w,
                    seed,
                    exits,
                    out=lab.out / f"{arm}, {name}, seed {seed}",
                    base=places.get(seed, places[lab.seed]),  # one for all, but in a study
                )
                for seed in seeds
            ]
    return bases, runs


def condition(lab: Lab, w: float, exits: str) -> str:
    """What the name of an arm ends in."""
    return f"w = {w:g}" if lab.student_steps == 1 else f"w = {w:g}, {exits}"


def check_base(job: Job) -> None:
    """ValueError: what lies at the base's place was made with other settings."""
    if (job.out / "done").exists():
        changes = running.differences(running.read_config(job.out), config_of(job), ())
        running.require(
            not changes, f"{job.out} is another base ({changes}): choose its settings or no --init"
        )


def report(lab: Lab, rows: dict[str, list[dict]], runs: dict[str, list[Job]]) -> None:
    """Write table.json, curves.png and samples.png, and print the table.

    rows has what is given; an arm's row, a dict a seed, is of its last exit, and each exit before
    it has a row, too.
    """
    steps = [*range(lab.sample_every, lab.steps, lab.sample_every), lab.steps]
    curves = {}
    for name, jobs in runs.items():
        exits = [[read_measures(job, step) for job in jobs] for step in steps]  # step, seed, exit
        for i in range(lab.student_steps - 1):
            rows[f"{name}, exit {i + 1}"] = [of_seed[i] for of_seed in exits[-1]]
        curves[name] = [[of_seed[-1] for of_seed in of_step] for of_step in exits]
        rows[name] = curves[name][-1]
    table = dict(rows=rows, steps=steps, curves=curves)
    running.show({name: running.mean_std(of_seeds) for name, of_seeds in rows.items()})
    if lab.study:
        table["differences"] = compare_arms(lab, rows, runs)
    text = json.dumps(table, indent=1).replace("NaN", "null")  # of one seed there is no interval
    running.write(lab.out / "table.json", text)
    draw_curves(lab, curves, steps)
    draw_logs(lab, {name: jobs[0] for name, jobs in runs.items()})
    draw_samples(lab, [jobs[0] for jobs in runs.values()])


def compare_arms(
    lab: Lab, rows: dict[str, list[dict]], runs: dict[str, list[Job]]
) -> dict[str, dict]:
    """How each arm of a study differs from what it is compared with, seed by seed; with a picture.

    That is another arm with the same exits and w or a smaller one, and the same arm with one fake.
    """
    from matplotlib.figure import Figure

    study = STUDIES[lab.study]
    scales = sorted({job.w for job, *_ in runs.values()})
    differ = {}
    for name, (job, *_) in runs.items():
        pairs = []
        if job.what in study.against:
            other = study.against[job.what]
            smaller = [w for w in scales if w < job.w] if study.less_w else []
            pairs += [(other, w, job.exits) for w in (job.w, *smaller)]
        if job.exits != "one fake":
            pairs.append((job.what, job.w, "one fake"))
        for arm, w, exits in pairs:
            reference = f"{arm}, {condition(lab, w, exits)}"
            if reference in runs:
                differ[f"{name} - {reference}"] = running.compared(rows[name], rows[reference])
    if not differ:
        return {}
    print("\ndifferences, seed by seed, and half of their 95 % interval")
    running.show(differ)
    figure = Figure(figsize=(16, 1.2 + 0.25 * len(differ)), layout="constrained", dpi=110)
    running.draw_differences(figure.subplots(1, len(SHOWN)), differ, SHOWN)
    figure.savefig(lab.out / "differences.png")
    return differ


def kinds(lab: Lab, args: argparse.Namespace) -> list[str]:
    """What is tried about exits, of beyond.EXITS. A student of one step has but one."""
    if lab.student_steps == 1:
        return ["one fake"]
    if lab.study and STUDIES[lab.study].kinds:
        return args.exits
    both = {"one fake": False, "exit-aware": True}
    return [kind for kind, aware in both.items() if args.exit_aware in (None, aware)]


def base_name(lab: Lab, name: str, seed: int) -> str:
    """The folder of a base, which arms with the same number of steps share."""
    words = ["base"]
    if lab.student_steps > 1:
        words.append(f"{lab.student_steps} steps")
    words.append(name)
    if lab.clip != Lab.clip:
        words.append(f"clip {lab.clip:g}")
    if not lab.normalize:
        words.append("not normalized")
    return ", ".join([*words, f"seed {seed}"])


def read_measures(job: Job, step: int) -> list[dict]:
    """What `show` measured after that update, exit by exit."""
    step = min(step, job.steps)  # in a study of exits some arms have half of the updates
    return json.loads((job.out / f"samples/step_{step}.json").read_text())


def draw_curves(lab: Lab, curves: dict[str, list[list[dict]]], steps: list[int]) -> None:
    """curves.png: measures against student updates, mean and std over seeds (Figs. 5, 6)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(SHOWN))
    for ax, k in zip(panels, SHOWN, strict=True):
        for name, curve in curves.items():
            v = torch.tensor([[row[k] for row in seeds] for seeds in curve])
            std = v.std(1) if v.shape[1] > 1 else None
            ax.errorbar(steps, v.mean(1), std, label=name, capsize=2)
        ax.set(title=k, xlabel="student updates")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(lab.out / "curves.png")


def draw_logs(lab: Lab, jobs: dict[str, Job]) -> None:
    """logs.png: what each arm's first seed logged, against student updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.2), layout="constrained", dpi=90)
    panels = figure.subplots(2, len(LOGGED) // 2)
    for i, (name, job) in enumerate(jobs.items()):
        rows = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
        for ax, k in zip(panels.flat, LOGGED, strict=True):
            points = [(row["step"], row[k]) for row in rows if row.get(k) is not None]
            if points:
                ax.plot(*zip(*points, strict=True), f".-C{i}", lw=1, label=name)
            ax.set(title=k, xlabel="student updates")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(lab.out / "logs.png")


def draw_samples(lab: Lab, jobs: list[Job]) -> None:
    """samples.png: two rows of images of each arm's first seed, from the same noise."""
    import numpy as np
    from PIL import Image

    rows = [np.asarray(Image.open(job.out / f"samples/step_{job.steps}.png")) for job in jobs]
    pixels = np.concatenate(rows).repeat(3, 0).repeat(3, 1)
    Image.fromarray(pixels).save(lab.out / "samples.png")


# ------------------------------------------------------------------------------------- command line
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = running.Parser(__doc__)
    shared, groups = parser.shared, parser.groups
    groups["method"].add_argument(
        "--arms", nargs="+", metavar="ARM", help=f"which are trained (all): {', '.join(ARMS)}"
    )
    groups["method"].add_argument(
        "--study", choices=STUDIES, help="ideas beyond the paper, with arms of their own"
    )
    groups["method"].add_argument(
        "--exits",
        nargs="+",
        choices=beyond.EXITS,
        metavar="KIND",
        help=f"what --study exits tries (all): {', '.join(beyond.EXITS)}",
    )
    shared("s", ".5")
    shared("tau", "1")
    shared("lam", "of DMDR: .05, its own")
    shared("w", "1; several make an arm of each", nargs="+")
    shared("group", "8")
    shared("student-steps", "1")
    shared("exit-aware", "both are tried")
    shared("fake-steps", "3")

    shared("batch", "64; cifar10 256")
    groups["optimisation"].add_argument(
        "--base-steps", type=int, help="updates of pure DMD before the arms (200; cifar10 600)"
    )
    shared("steps", "of each arm: 100; cifar10 300")
    shared("lr", "3e-4; cifar10 5e-5")
    shared("fake-lr", "6e-4; cifar10 5e-5")
    shared("ema", ".95; cifar10 .99")
    shared("seed", "the first; 0")
    groups["optimisation"].add_argument("--seeds", type=int, help="of each arm (3; of a study 5)")

    groups["data"].add_argument(
        "--data", default="digits", help="digits, cifar10, or a folder FOLDER/class/*.png (digits)"
    )
    groups["data"].add_argument("--image-size", type=int, help="in pixels (8; else 32)")
    groups["data"].add_argument("--model", help="of the teacher, size/patch (digits/2; cifar10/2)")
    groups["data"].add_argument(
        "--reward", choices=["cnn", "linear"], help="the classifier that rewards (cnn)"
    )
    for name, note in (
        ("teacher", "1,500; cifar10 5,600"),
        ("reward", "100; cifar10 2,000"),
        ("judge", "400; cifar10 2,000"),
    ):
        groups["data"].add_argument(
            f"--fit-{name}", type=int, help=f"updates that the {name} is fitted for ({note})"
        )
    shared("init", "another lab, whose networks and bases are shared")

    shared("out", "runs/toy_images", default=Path("runs/toy_images"))
    shared("resume", "with more --arms, --seeds, --w or --exits, too")
    shared("sample-every", "25; cifar10 75; a study samples in the end alone")
    groups["sampling"].add_argument("--count", type=int, help="samples that are measured (2,000)")
    args = parser.parse_args(argv)
    defaults = dict(arms=[*ARMS], w=[1.0], seeds=3)
    if args.study:
        study = STUDIES[args.study]
        w = study.settings.get("w", [1.0])
        defaults = dict(arms=[*study.arms], w=w, seeds=5, exits=[*study.kinds] or None)
    args = running.fill(args, defaults)
    for name in ("arms", "w", "exits"):  # two jobs must not work in one folder
        given = getattr(args, name)
        setattr(args, name, given and [*dict.fromkeys(given)])
    return args


def lab_of(args: argparse.Namespace) -> Lab:
    """The data's own settings, and what the command line changes. ValueError: it cannot work."""
    names = {field.name for field in dataclasses.fields(Lab)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    defaults = {} if args.data == "digits" else CIFAR10
    if args.study:
        settings = STUDIES[args.study].settings
        defaults = defaults | {k: v for k, v in settings.items() if k in names}
    lab = Lab(**defaults | given | dict(root=args.init or args.out))
    for arm in args.arms:
        running.require(arm in lab.arms, f"--arms {arm!r}: choose from {[*lab.arms]}")
    has_kinds = bool(lab.study and STUDIES[lab.study].kinds)
    running.require(has_kinds or args.exits is None, "--exits is for --study exits")
    if lab.study:
        running.require(args.sample_every is None, "--study samples in the end: no --sample-every")
        if has_kinds:
            running.require(lab.student_steps > 1, "--study exits: give --student-steps above 1")
            running.require(args.exit_aware is None, "choose kinds by --exits, not --exit-aware")
            running.require(
                min(lab.steps, lab.base_steps) > 1, "--study exits: choose more --steps"
            )
        else:
            running.require(lab.student_steps == 1, "but for exits a --study is of one step")
        lab = dataclasses.replace(lab, sample_every=lab.steps)

    numbers = {k: v for k, v in dataclasses.asdict(lab).items() if type(v) in (int, float)}
    numbers = argparse.Namespace(**numbers | dict(seeds=args.seeds))
    checked_below = {"seed", "s", "tau", "lam", "ema"}
    running.positive(numbers, *(vars(numbers).keys() - checked_below))
    running.require(0 <= lab.ema < 1, f"--ema {lab.ema}: choose it in [0, 1)")
    running.require(all(0 < w < math.inf for w in args.w), "choose each --w above 0")
    amd.method("amd", s=lab.s, tau=lab.tau, lam=0.0)
    amd.method("dmdr", lam=lab.lam)
    amd.group_advantage(torch.zeros(lab.batch), lab.group)
    dimensions(lab.model, lab.image_size)
    running.require(lab.count >= LEAST, f"--count {lab.count}: choose {LEAST} or more")
    if args.init:
        other = running.read_config(args.init)
        for k in ("data", "image_size", "model", "fit_teacher", "fit_judge"):
            running.require(
                other.get(k) == getattr(lab, k),
                f"--init {args.init} has another --{k.replace('_', '-')}: choose the same",
            )
    return lab


def mark_of(init: Path | None) -> str | None:
    """What tells the networks of another lab from any others; None: this lab has its own.

    It is a mark of what is in their files, for labs may be moved. ValueError: there are none yet.
    """
    if init is None:
        return None
    mark = hashlib.sha256()
    for name in ("teacher.pt", "judge.pt"):
        path = Path(init) / name
        running.require(path.exists(), f"--init {init} has no {name}: let that lab go on first")
        mark.update(path.read_bytes())
    return mark.hexdigest()[:12]


def main(args: argparse.Namespace) -> None:
    lab = lab_of(args)
    read_images(lab.data, lab.image_size)
    bases, runs = jobs_of(lab, args)
    running.require(runs, "DMD has no groups, so no mixed exits: choose more --exits")
    if args.init:
        for base in bases:
            check_base(base)
    free = dict(arms=args.arms, seeds=args.seeds, w=args.w, exits=args.exits)
    config = lab.settings | dict(networks=mark_of(args.init)) | free
    running.open_run(lab.out, config, args.resume, free)
    compare(lab, args.w, bases, runs)
    print(f"see {lab.out}")


if __name__ == "__main__":
    running.run(main, parse)
