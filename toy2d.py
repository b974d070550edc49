"""The 2D lab of AMD: nine Gaussians on a grid, a teacher that is exact, and the paper's figures.

    python toy2d.py --reward selective    # Fig. 7: the reward suppresses modes
    python toy2d.py --figure zone         # Figs. 1, 2: the Forbidden Zone, measured
    python toy2d.py --figure naive        # Fig. 8: Eq. 8 against Eq. 10
    python toy2d.py --figure ablation     # Figs. 5, 6 in small: which half of AMD does what
    python toy2d.py --figure methods      # Table 1, run
    python toy2d.py --figure tilt         # what AMD converges to
    python toy2d.py --figure exits        # a student of four steps, exit by exit
    python toy2d.py --animate             # DMD, naive and AMD, moving
    python toy2d.py --diagram             # one update of AMD as boxes and arrows

Ideas beyond the paper, each compared with what it would replace, seed by seed (docs/findings.md):

    python toy2d.py --figure operators    # other ways to join matching and guidance
    python toy2d.py --figure sensors      # what may stand in for the reward
    python toy2d.py --figure dsa          # Dynamic Score Adaptation with guidance
    python toy2d.py --figure fakes        # what one may do about exits

A laptop with two cores does. Each figure is written to --out as a picture and a table in json, and
the table is printed: mean and standard deviation over seeds, each of which is a process of its own.
A condition is a class, which is a row of the grid; class 3 is the empty condition.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amd
import running
from parts import beyond

STD, SPACING = 0.15, 2.0
MODES = torch.tensor([[x, y] for y in (-1, 0, 1) for x in (-1, 0, 1)]) * SPACING  # 3 row + column
ROW = torch.arange(9) // 3
GOOD = {  # the rewarded modes of each reward
    "selective": [0, 2, 4, 6, 8],
    "global": list(range(9)),
    "corner": [0, 1, 3],
}
TAU = {"selective": 0.2, "global": 1.0, "corner": 1.0}
SAMPLES = 9000  # that are measured
STUDENT_LR, FAKE_LR = 1.5e-3, 3e-3


class Condition(NamedTuple):
    """What networks are told."""

    y: Tensor  # class (B,), 3 = empty
    z: Tensor | None = None  # the student's noise (B, 2)
    exit: Tensor | None = None  # for an exit-aware fake: the student's exit (B,)


def null(c: Condition) -> Condition:
    """The empty condition, with the same noise and exit."""
    return c._replace(y=torch.full_like(c.y, 3))


# --------------------------------------------------------------------------- data, reward, teachers
def real_samples(y: Tensor) -> Tensor:
    """Data of classes y (B,), where 3 is any -> (B, 2)."""
    row = torch.where(y < 3, y, torch.randint(0, 3, y.shape))
    return MODES[3 * row + torch.randint(0, 3, y.shape)] + STD * torch.randn(len(y), 2)


def energy(x: Tensor) -> Tensor:
    """E_real = -log p_real of all nine modes, exact: (B, 2) -> (B,)."""
    closeness = torch.logsumexp(-(torch.cdist(x, MODES) ** 2) / (2 * STD**2), 1)
    return math.log(9 * 2 * math.pi * STD**2) - closeness


def exact_teacher(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
    """The Denoiser E[x0 | x_t, class] of the mixture, by Bayes' rule."""
    alpha = (1 - t)[:, None]
    var = ((1 - t) ** 2 * STD**2 + t**2)[:, None]
    diff = x_t[:, None] - alpha[..., None] * MODES  # (B, 9, 2)
    other_class = (c.y[:, None] < 3) & (c.y[:, None] != ROW)
    logp = (-diff.square().sum(2) / (2 * var)).masked_fill(other_class, -torch.inf)
    x0_of_mode = MODES + (alpha * STD**2 / var)[..., None] * diff
    return (logp.softmax(1)[..., None] * x0_of_mode).sum(1)


def reward_of(name: str) -> Callable[[Tensor, Condition | None], Tensor]:
    """A reward (x, c) -> (B,): bumps of width .4 on its modes; "linear" rises to the lower left."""
    if name == "linear":
        return lambda x, _c: -x.sum(1)
    centres = MODES[GOOD[name]]
    return lambda x, _c: (-(torch.cdist(x, centres) ** 2) / (2 * 0.4**2)).exp().sum(1)


class MLP(nn.Module):
    """The velocity network of teacher, student and fake.

    Sines of x, and the condition in every layer: without them the middle mode of each row starves,
    for a narrow network maps all rows alike.
    """

    def __init__(self, width: int = 128):
        super().__init__()
        self.register_buffer("f_x", math.pi / 8 * torch.tensor([1.0, 2.0, 4.0]))
        self.register_buffer("f_t", math.pi / 2 * torch.tensor([1.0, 2.0, 4.0, 8.0]))
        self.x_in = nn.Linear(14, width)
        self.out = nn.Linear(width, 2)
        self.head = nn.Linear(width, 1)  # DMD2's discriminator
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.cond = nn.ModuleList([nn.Linear(12, width) for _ in range(3)])
        self.exits = nn.Parameter(torch.zeros(8, 12))  # what an exit adds to time and class

    def features(self, x: Tensor, t: Tensor, c: Condition) -> Tensor:
        """The last hidden layer (B, width)."""
        angle_t = t[:, None] * self.f_t
        angle_x = (x[..., None] * self.f_x).flatten(1)
        told = torch.cat([angle_t.sin(), angle_t.cos(), F.one_hot(c.y, 4).to(x)], 1)
        if c.exit is not None:
            told = told + self.exits[c.exit]
        seen = torch.cat([x, angle_x.sin(), angle_x.cos()], 1)
        h = F.silu(self.x_in(seen) + self.cond[0](told))
        for layer, cond in zip(self.hidden, self.cond[1:], strict=True):
            h = F.silu(layer(h) + cond(told))
        return h

    def forward(self, x: Tensor, t: Tensor, c: Condition) -> Tensor:
        return self.out(self.features(x, t, c))


def loaded(weights: dict) -> MLP:
    """An MLP of these weights."""
    net = MLP()
    net.load_state_dict(weights)
    return net


def descend(net: MLP, loss_of: Callable[[], Tensor], lr: float, steps: int) -> None:
    """AdamW on a loss; the rate falls to 0 over the second half."""
    opt = torch.optim.AdamW(net.parameters(), lr, fused=True)
    for i in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, 2 - 2 * i / steps)
        opt.zero_grad()
        loss_of().backward()
        opt.step()
        running.tick(i)


# ------------------------------------------------------------------------------------- distillation
@dataclass(frozen=True)
class Arm:
    """How a student is distilled.

    method, s, tau, lam and w are those of amd.method and amd.train.

    levels   of the student's steps, falling from 1
    learned  is the teacher the fitted network, and not the exact one?
    sharpen  False: W = 1, so that Dynamic Score Adaptation works alone
    exits    what is done about them, of beyond.EXITS
    operator of beyond.operators_of, which changes the displacements
    sensor   of `sensors_of`, which stands in for the reward; "" = the reward
    """

    method: str = "amd"
    reward: str = "selective"
    s: float = 0.5
    tau: float = 1.0
    lam: float = 0.0
    w: float = 1.0
    levels: tuple[float, ...] = (1.0,)
    learned: bool = False
    sharpen: bool = True
    exits: str = "one fake"
    operator: str = ""
    sensor: str = ""


@dataclass(frozen=True)
class Job:
    """What a process is to do: a seed of an arm, or of what all arms start from.

    steps  student updates, or steps of the fit
    K      samples in a group
    batch  samples in an update
    start  weights of the fitted network
    fake_steps  fake updates in a student update
    shots  updates after which samples are taken
    """

    seed: int
    steps: int
    K: int = 16
    batch: int = 256
    arm: Arm = Arm()
    start: dict | None = None
    fake_steps: int = 4
    shots: frozenset[int] = frozenset()


class Result(NamedTuple):
    """Samples (9000, 2) of a student; their classes take turns."""

    shots: dict[int, Tensor]  # by update, of its sampler
    exits: list[Tensor]  # in the end, exit by exit
    calls: dict[str, float]  # of each network, for a sample of a student update

    @property
    def last(self) -> Tensor:
        return self.shots[max(self.shots)]


def fit(job: Job) -> dict:
    """Flow matching on the data -> weights.

    They are the learned teacher's, and the start of student and fake.
    """
    torch.manual_seed(job.seed)
    net, classes = MLP(), torch.arange(512) % 3

    def loss():
        x = real_samples(classes)
        t = torch.rand(512)
        y = torch.where(torch.rand(512) < 0.1, 3, classes)
        eps = torch.randn_like(x)
        return F.mse_loss(net(amd.renoise(x, t, eps), t, Condition(y)), eps - x)

    descend(net, loss, 2e-3, job.steps)
    return net.state_dict()


def distill(job: Job) -> Result:
    """amd.train of one arm and seed, with samples along the way.

    The student takes one call a step; all networks begin as the fitted one. The learning rates are
    constant for a fifth of the updates, and then fall to 0.
    """
    arm, seed = job.arm, job.seed
    steps = job.steps
    student, fake, real, blended, averaged = (loaded(job.start) for _ in range(5))
    counts = dict(student=0, fake=0, teacher=0)
    G = counted(amd.x0_from_flow(student), counts, "student")
    psi = counted(amd.x0_from_flow(fake), counts, "fake")
    teacher = amd.x0_from_flow(real) if arm.learned else exact_teacher
    teacher = counted(teacher, counts, "teacher")
    # no momentum, for student and fake chase each other
    adam = {
        net: torch.optim.AdamW(net.parameters(), lr, betas=(0.0, 0.99), fused=True)
        for net, lr in ((student, STUDENT_LR), (fake, FAKE_LR))
    }

    def batch(n, _j):
        """Groups take the classes in turn; the noise rides along, for DMD's pairs."""
        y = ((torch.arange(job.batch // job.K) + n) % 3).repeat_interleave(job.K)
        return Condition(y, torch.randn(job.batch, 2, generator=running.seeded(seed, n)))

    def simulate(c, u):
        return amd.backward_simulation(amd.x0_from_flow(student), c.z, c, arm.levels, u)

    generation = beyond.generation(arm.exits, G, arm.levels)

    def generate(c, u):
        return generation(c.z, c, u)

    def truth(c):
        """DMD's pairs, or DMD2's data."""
        return solve(teacher, c, arm.w) if arm.method == "dmd" else real_samples(c.y)

    def logits(x_t, t, c):
        return fake.head(fake.features(x_t, t, c))[:, 0]

    def adapt(r):
        amd.blend(blended, real, fake, r)
        return amd.x0_from_flow(blended)

    def told(c, t_G):
        return c._replace(exit=torch.full_like(c.y, arm.levels.index(t_G)))

    guess, aware = beyond.fake_of(arm.exits, psi, arm.levels, told)
    hyper = dict(s=arm.s, tau=arm.tau, fade=max(1, steps // 2))
    method = amd.method(arm.method, lam=arm.lam, unit_w=True, **hyper)
    if not arm.sharpen:
        method = method._replace(W=amd.W_one)
    if arm.operator:
        average = counted(amd.x0_from_flow(averaged), counts, "fake")
        method = method._replace(F_t=beyond.operators_of(average)[arm.operator])
    reward = reward_of(arm.reward)
    if arm.sensor:
        reward = sensors_of(reward, teacher, psi)[arm.sensor]
    updates = amd.train(
        method,
        generate,
        teacher,
        guess,
        batch,
        adam[student],
        adam[fake],
        reward=reward,
        K=job.K,
        null=null,
        w=arm.w,
        normalize=False,
        truth=truth,
        logits=logits,
        adapt=adapt,
        aware=aware,
        fake_steps=job.fake_steps,
        seed=seed,
    )

    z = torch.randn(SAMPLES, 2, generator=running.seeded(seed, -1))
    c, shots = Condition(torch.arange(SAMPLES) % 3, z), {}
    for step in range(steps):
        if step in job.shots:
            shots[step] = amd.rollout(simulate, c, 1.0, seed, grad=False).x
        fall = min(1.0, (1 - step / steps) / 0.8)
        for opt, lr in zip(adam.values(), (STUDENT_LR, FAKE_LR), strict=True):
            opt.param_groups[0]["lr"] = lr * fall
        next(updates)
        if arm.operator:
            beyond.follow(averaged, fake)
        running.tick(step)
    shots[steps] = amd.rollout(simulate, c, 1.0, seed, grad=False).x
    count = len(arm.levels)
    exits = [amd.rollout(simulate, c, (i + 0.5) / count, seed, False).x for i in range(count)]
    calls = {name: count / steps / job.batch for name, count in counts.items()}
    return Result(shots, exits, calls)


def counted(denoise: amd.Denoiser, counts: dict[str, int], name: str) -> amd.Denoiser:
    """The same Denoiser, which adds the samples that it is asked for to counts."""

    def call(x_t, t, c):
        counts[name] += len(x_t)
        return denoise(x_t, t, c)

    return call


SENSED_AT = 0.4  # the noise level at which sensors ask the teachers
SPURIOUS = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])  # between the modes


def hackable(reward: Callable, at: Tensor) -> Callable:
    """A reward that also likes one place off the modes, twice as much as any mode."""
    return lambda x, c: reward(x, c) + 2 * (-(x - at).square().sum(1) / (2 * 0.4**2)).exp()


def sensors_of(reward: Callable, real: amd.Denoiser, fake: amd.Denoiser) -> dict:
    """What may stand in for the reward, by name."""
    return teachers_sense(reward, real, fake, SENSED_AT) | hackable_rewards(reward)


def teachers_sense(
    reward: Callable, real: amd.Denoiser, fake: amd.Denoiser, t: float
) -> dict[str, beyond.Sensor]:
    """Sensors that ask the teachers at level t, by name."""
    return {
        "disagreement": beyond.disagreement(real, fake, t),
        "inconsistency": beyond.inconsistency(real, t),
        "reward of the target": beyond.of_target(reward, real, fake, t),
    }


def hackable_rewards(reward: Callable) -> dict[str, beyond.Sensor]:
    """A reward that can be hacked, and ensembles of three, by name."""
    three = [hackable(reward, at) for at in SPURIOUS]
    return {
        "hackable reward": three[0],
        "mean of three hackable": beyond.ensemble(three),
        "worst of three hackable": beyond.ensemble(three, worst=True),
    }


@torch.no_grad()
def solve(teacher: amd.Denoiser, c: Condition, w: float, steps: int = 20) -> Tensor:
    """The teacher's flow from noise c.z at CFG scale w, by Euler -> (B, 2)."""
    x, levels = c.z, torch.linspace(1, 0, steps + 1)
    for t, t_next in pairwise(levels):
        d = amd.displace(x, x, t.expand(len(x)), c, null, teacher, None, w)
        x = x + (t_next - t) / t * d.real  # the velocity is (x_t - x0_hat) / t
    return x


# ----------------------------------------------------------------------------------------- measures
def target_mass(reward: str) -> Tensor:
    """The mass of each mode (9,) of the teacher, within a class restricted to rewarded modes.

    A class that has none of them keeps all three.
    """
    good = torch.zeros(9).index_fill(0, torch.tensor(GOOD[reward]), 1.0).view(3, 3)
    good = torch.where(good.sum(1, keepdim=True) > 0, good, 1.0)
    return (good / good.sum(1, keepdim=True) / 3).flatten()


def nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest mode of each point (B, 2), and whether it is within 4 std -> (B,), (B,)."""
    d, mode = torch.cdist(x, MODES).min(1)
    return mode, d < 4 * STD


@cache
def energy_of_data(share: float) -> float:
    """The energy that a share of the data exceeds.

    gamma of Eq. 5 is that of a thousandth, gamma' of Eq. 11 that of a hundredth.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return energy(real_samples(torch.full((100_000,), 3))).quantile(1 - share).item()


def measure(x: Tensor, reward: str) -> dict[str, float]:
    """Samples (B, 2) whose classes take turns -> numbers by name:

    off     share of samples farther than 4 std from every mode
    good    share on rewarded modes
    bad     share on suppressed modes
    modes   rewarded modes that hold at least a quarter of their share
    tv      total variation, over modes, to the teacher restricted to rewarded modes
    sw2     sliced Wasserstein distance to that teacher
    reward  mean reward
    zone    share in the Forbidden Zone: E_real above the data's 99.9th percentile (Eq. 5)
    spread  std of samples about their mode, divided by the data's

    The last one is NaN if hardly a sample is on a mode.
    """
    torch.manual_seed(0)
    target = target_mass(reward)
    good = torch.zeros(9).index_fill(0, torch.tensor(GOOD[reward]), 1.0)
    mode, on = nearest(x)
    mass = torch.bincount(mode[on], minlength=9) / len(x)
    share = torch.bincount(mode, minlength=9) / len(x)

    # samples of the target, and the distance to them along 64 directions
    places = torch.linspace(0, 1 - 1e-6, len(x))
    wanted = MODES[torch.bucketize(places, target.cumsum(0), right=True)]
    wanted = wanted + STD * torch.randn(len(x), 2)
    angles = torch.arange(64) * math.pi / 64
    axes = torch.stack([angles.cos(), angles.sin()])
    apart = (x @ axes).sort(0).values - (wanted @ axes).sort(0).values

    spread = (x - MODES[mode])[on].std() / STD if on.sum() > 1 else torch.tensor(math.nan)
    values = dict(
        off=1 - mass.sum(),
        good=mass @ good,
        bad=mass @ (1 - good),
        modes=((mass >= target / 4) & (target > 0)).sum(),
        tv=0.5 * (share - target).abs().sum(),
        sw2=apart.square().mean().sqrt(),
        reward=reward_of(reward)(x, None).mean(),
        zone=(energy(x) > energy_of_data(0.001)).float().mean(),
        spread=spread,
    )
    return {k: float(v) for k, v in values.items()}


def table(results: dict[str, list[Result]], reward: str) -> dict:
    """The measures of each arm's last samples, mean and std over seeds."""
    return {
        name: running.mean_std([measure(run.last, reward) for run in runs])
        for name, runs in results.items()
    }


# --------------------------------------------------------------------------- what all figures share
@dataclass(frozen=True)
class Lab:
    """The settings of a figure, and what runs its arms.

    They are the flags of the command line, with the figure's own defaults.
    """

    workers: running.Workers
    reward: str
    tau: float
    s: float
    steps: int
    fit: int
    group: int
    batch: int
    seeds: range
    fake_steps: int = 4
    student_steps: int = 4
    only: str = ""

    def starts(self) -> list[dict]:
        """The fitted network of each seed."""
        jobs = [Job(seed, self.fit) for seed in self.seeds]
        return self.workers.map(fit, jobs, "fit")

    def run(
        self,
        arms: dict[str, Arm],
        shots: tuple = (),
        steps: int | None = None,
        starts: list[dict] | None = None,
    ) -> dict[str, list[Result]]:
        """Every arm with every seed, from one start a seed."""
        starts = starts or self.starts()
        common = dict(K=self.group, batch=self.batch, shots=frozenset(shots))
        jobs = []
        for arm in arms.values():
            more = beyond.more_updates(arm.exits)
            own = dict(steps=(steps or self.steps) // more, fake_steps=more * self.fake_steps)
            for seed, start in zip(self.seeds, starts, strict=True):
                jobs.append(Job(seed, arm=arm, start=start, **own, **common))
        results = iter(self.workers.map(distill, jobs, "distill"))
        return {name: [next(results) for _ in self.seeds] for name in arms}


# ----------------------------------------------------------------------------------------- pictures
def grid(side: int, half: float = 4.0) -> Tensor:
    """Points of the square [-half, half]^2, row by row -> (side^2, 2)."""
    line = torch.linspace(-half, half, side)
    return torch.cartesian_prod(line, line).flip(1)


def axes(rows: int, columns: int, size: float = 2.6):
    """A figure of square panels -> the figure, and its axes (rows, columns).

    size is a panel's, in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rc("axes", titlesize=9)
    matplotlib.rc("legend", fontsize=7)
    figure = Figure((columns * size, rows * (size + 0.35)), layout="constrained", dpi=130)
    square = dict(box_aspect=1)
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=square)


def plane(ax, title: str, values=None, points=None, reward=None, cmap="Blues") -> None:
    """Draw a square of the plane in a panel.

    values are a map on grid(161), points are samples (B, 2); of a reward, the rewarded modes are
    stars and the others crosses.
    """
    if values is not None:
        ax.imshow(values.view(161, 161), origin="lower", extent=(-4, 4, -4, 4), cmap=cmap)
    if points is not None:
        ax.scatter(*points[:4000].T, s=1.5, alpha=0.35, lw=0, color="tab:blue")
    if reward is not None:
        good = GOOD[reward]
        bad = [mode for mode in range(9) if mode not in good]
        ax.scatter(*MODES[good].T, marker="*", s=24, lw=1, c="tab:green")
        ax.scatter(*MODES[bad].T, marker="x", s=24, lw=1, c="tab:red")
    ax.set(xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[], title=title)


# ------------------------------------------------------------------------------------------ figures
def shaping(lab: Lab):
    """Fig. 7: what AMD makes of a reward, and DMD without it."""
    half, points = lab.steps // 4, grid(161)
    common = dict(reward=lab.reward, s=lab.s, tau=lab.tau)
    arms = {"DMD": Arm("dmd", **common), "AMD": Arm("amd", **common)}
    results = lab.run(arms, shots=(0, half))

    figure, panels = axes(2, 3)
    teacher, reward, *students = panels.flat
    plane(teacher, "teacher", (-energy(points)).exp())
    values = reward_of(lab.reward)(points, None)
    plane(reward, f"reward, tau {lab.tau:g}", values, None, lab.reward, "Greens")
    shown = [("AMD", 0), ("AMD", half), ("AMD", lab.steps), ("DMD", lab.steps)]
    for ax, (name, step) in zip(students, shown, strict=True):
        points = results[name][0].shots[step]
        plane(ax, f"{name}, step {step}", points=points, reward=lab.reward)
    return figure, dict(arms=table(results, lab.reward), tau=lab.tau)


def naive(lab: Lab):
    """Fig. 8: the strawman of Eq. 8 throws samples out, Eq. 10 does not."""
    shots = [lab.steps * i // 4 for i in range(5)]
    common = dict(reward=lab.reward, s=lab.s, tau=lab.tau)
    arms = {"naive (Eq. 8)": Arm("naive", **common), "AMD (Eq. 10)": Arm("amd", **common)}
    results = lab.run(arms, tuple(shots))

    figure, rows = axes(2, 5)
    off = {}
    for row, (name, runs) in zip(rows, results.items(), strict=True):
        off[name] = {}
        for ax, step in zip(row, shots, strict=True):
            plane(ax, f"{name}, step {step}", points=runs[0].shots[step], reward=lab.reward)
            each = [measure(run.shots[step], lab.reward)["off"] for run in runs]
            off[name][step] = [round(v, 4) for v in each]
    arms = table(results, lab.reward)
    return figure, dict(arms=arms, tau=lab.tau, off_of_each_seed=off)


def ablation(lab: Lab):
    """Figs. 5, 6 in small: each half of AMD alone, against updates."""
    shots = range(0, lab.steps + 1, max(1, lab.steps // 20))
    common = dict(reward=lab.reward, tau=lab.tau)
    arms = {
        "DMD": Arm("dmd", s=lab.s, **common),
        "+ DSA": Arm("amd", s=lab.s, sharpen=False, **common),
        "+ RLS": Arm("amd", s=0.0, **common),
        "AMD": Arm("amd", s=lab.s, **common),
    }
    results = lab.run(arms, tuple(shots))

    figure, (panels,) = axes(1, 3, 3.2)
    for name, runs in results.items():
        steps = [*runs[0].shots]
        measured = [[measure(run.shots[step], lab.reward) for run in runs] for step in steps]
        for ax, key in zip(panels, ("reward", "off", "sw2"), strict=True):
            values = torch.tensor([[row[key] for row in rows] for rows in measured])
            mean, std = values.mean(1), values.std(1, correction=min(1, len(runs) - 1))
            ax.plot(steps, mean, label=name)
            ax.fill_between(steps, mean - std, mean + std, alpha=0.2)
            ax.set(title=key, xlabel="student updates", ylim=(0, None))
    panels[0].legend()
    return figure, dict(arms=table(results, lab.reward), tau=lab.tau)


def methods(lab: Lab):
    """Table 1, run: every row from one start, with a learned teacher, guidance and two steps."""
    lam = {"dmd": 0.25, "dmd2": 0.1, "dmdr": 0.25}
    common = dict(reward=lab.reward, s=lab.s, tau=lab.tau, w=1.25, levels=(1.0, 0.5), learned=True)
    arms = {name: Arm(name, lam=lam.get(name, 0.0), **common) for name in amd.METHODS}
    results = lab.run(arms, steps=lab.steps // 2)

    figure, panels = axes(2, 4)
    for ax, (name, runs) in zip(panels.flat, results.items(), strict=True):
        plane(ax, name, points=runs[0].last, reward=lab.reward)
    told = table(results, lab.reward)
    for name, runs in results.items():
        first = [measure(run.exits[0], lab.reward) for run in runs]
        told[f"{name}, exit 1"] = running.mean_std(first)
    return figure, dict(arms=told, tau=lab.tau, lam=lam)


def exits(lab: Lab):
    """A student of four steps, exit by exit: with one fake for all, and with one that is told.

    DMD is measured against the whole teacher, AMD against the reward's target.
    """
    arms = {}
    for name, method, reward, tau in (
        ("DMD", "dmd", "global", 1.0),
        ("AMD, tau 1", "amd", lab.reward, 1.0),
        ("AMD, tau 0.2", "amd", lab.reward, 0.2),
    ):
        arm = Arm(method, reward, lab.s, tau, levels=(1.0, 0.75, 0.5, 0.25))
        arms[f"{name}, one fake"] = arm
        arms[f"{name}, exit-aware"] = dataclasses.replace(arm, exits="exit-aware")
    results = lab.run(arms)

    figure, panels = axes(len(arms), 4, 2.2)
    told = {}
    for row, (name, runs) in zip(panels, results.items(), strict=True):
        for i, ax in enumerate(row):
            reward = arms[name].reward
            title = f"{name}\nexit {i + 1}"
            plane(ax, title, points=runs[0].exits[i], reward=reward)
            ax.title.set_fontsize(7)
            measured = [measure(run.exits[i], reward) for run in runs]
            told[f"{name}, exit {i + 1}"] = running.mean_std(measured)
    return figure, dict(arms=told)


def tilt(lab: Lab):
    """What AMD converges to: p_student ~ p_real exp(a / tau), for a linear reward.

    Measured is the slope of log p_student / p_real of a mode against its mean advantage.
    """
    taus = (2.0, 1.0, 0.5)
    arms = {f"tau {tau:g}": Arm("amd", "linear", s=0.0, tau=tau) for tau in taus}
    results = lab.run(arms)

    figure, ((ax,),) = axes(1, 1, 4.2)
    line, told = torch.tensor([-1.2, 1.2]), {}
    for i, (tau, (name, runs)) in enumerate(zip(taus, results.items(), strict=True)):
        slopes = []
        for run in runs:
            a, y, weight = advantage_and_tilt(run.last, lab.group)
            slopes.append(((weight * a) @ y / ((weight * a) @ a)).item())
            ax.plot(a, y, ".", color=f"C{i}", ms=5)
        mean, half = running.interval(slopes)
        label = f"{name}: slope {mean:.2f}, law {1 / tau:g}"
        ax.plot(line, line / tau, color=f"C{i}", lw=1, label=label)
        own = running.mean_std([measure(run.last, "global") for run in runs])
        told[name] = dict(own, slope=mean, half_width=half, law=1 / tau)
    ax.set(
        title="AMD tilts: p_student ~ p_real exp(a / tau)",
        xlabel="mean advantage of a mode, less its class's",
        ylabel="log p_student / p_real, less its class's",
    )
    ax.legend()
    return figure, dict(arms=told, reward="linear")


def advantage_and_tilt(x: Tensor, K: int) -> Tensor:
    """Samples whose classes take turns -> (3, modes): mean advantage, log ratio and mass of a mode.

    Advantages are of fresh groups of the class; the first two are centred within it. A mode with
    hardly a sample is left out.
    """
    points = []
    for row in range(3):
        own = x[row::3][: SAMPLES // 3 // K * K]
        a = amd.group_advantage(reward_of("linear")(own, None), K)
        mode, on = nearest(own)
        at = [on & (mode == 3 * row + column) for column in range(3)]
        mass = torch.stack([v.float().mean() for v in at]) / on.float().mean()
        advantage = torch.stack([a[v].mean() for v in at])
        point = torch.stack([advantage, (3 * mass).log(), mass])[:, mass > 0.002]
        centre = point[:2] @ point[2]
        point[:2] -= centre[:, None]
        points.append(point)
    return torch.cat(points, 1)


# ------------------------------------------------------------------------ ideas beyond the paper
Comparison = tuple[dict[str, Arm], list[tuple[str, str]]]  # arms; which is compared with which


def operators(lab: Lab) -> Comparison:
    """Other ways to join matching and guidance, at w = 1.5 with a learned teacher, against AMD.

    Some take a part of the guidance away, so they are compared with AMD at less guidance, too.
    """
    common = dict(reward=lab.reward, s=lab.s, tau=lab.tau, w=1.5, learned=True)
    arms = {"DMD": Arm("dmd", **common), "AMD": Arm("amd", **common)}
    arms |= {
        f"AMD, {name}": Arm("amd", operator=name, **common) for name in beyond.operators_of(None)
    }
    for w in (1.25, 1.0):
        arms[f"AMD, w = {w:g}"] = dataclasses.replace(arms["AMD"], w=w)
    pairs = [(name, "AMD") for name in arms if name != "AMD"]
    pairs += [(name, "AMD, w = 1.25") for name in arms if name.startswith("AMD, CA")]
    return arms, pairs


def dsa(lab: Lab) -> Comparison:
    """What Dynamic Score Adaptation does with guidance, alone and beside sharpening."""
    arms = {}
    pairs = []
    for w in (1.25, 2.0):
        common = dict(reward=lab.reward, tau=lab.tau, w=w, learned=True)
        dmd = f"w = {w:g}: DMD"
        rls = f"w = {w:g}: sharpening alone"
        arms[dmd] = Arm("dmd", **common)
        arms[rls] = Arm("amd", s=0.0, **common)
        pairs.append((rls, dmd))
        for s in (0.25, 0.5, 1.0):
            alone = f"w = {w:g}: DSA alone, s = {s:g}"
            both = f"w = {w:g}: AMD, s = {s:g}"
            arms[alone] = Arm("amd", s=s, sharpen=False, **common)
            arms[both] = Arm("amd", s=s, **common)
            pairs += [(alone, dmd), (both, rls)]
    return arms, pairs


def sensors(lab: Lab) -> Comparison:
    """What may stand in for the reward."""
    common = dict(reward=lab.reward, s=lab.s, tau=lab.tau, learned=True)
    arms = {"DMD": Arm("dmd", **common), "AMD": Arm("amd", **common)}
    names = sensors_of(reward_of(lab.reward), None, None)
    arms |= {f"AMD, {name}": Arm("amd", sensor=name, **common) for name in names}
    return arms, [(name, "DMD") for name in arms if name != "DMD"]


def rank_sensors(lab: Lab):
    """What AMD does with each sensor, and whether it ranks samples as their energy does."""
    starts = lab.starts()
    figure, told = compare(sensors, lab, starts)
    common = dict(steps=3 * lab.steps, K=lab.group, arm=Arm(reward=lab.reward))
    of_seeds = zip(lab.seeds, starts, strict=True)
    jobs = [Job(seed, start=start, **common) for seed, start in of_seeds]
    ranks = lab.workers.map(ranks_of_sensors, jobs, "sensors")
    told["ranks"] = {k: running.interval([seed[k] for seed in ranks]) for k in ranks[0]}
    for name, (mean, half) in told["ranks"].items():
        print(f"rank correlation with -E_real, {name}: {mean:.3f} +- {half:.3f}")
    return figure, told


@torch.no_grad()
def ranks_of_sensors(job: Job) -> dict[str, float]:
    """Spearman's correlation of each sensor with -E_real, over the plane and on bad samples.

    Those are of the fitted network in two steps, and the fake is trained on them.
    """
    from scipy.stats import spearmanr

    torch.manual_seed(job.seed)
    denoise, reward = amd.x0_from_flow(loaded(job.start)), reward_of(job.arm.reward)

    def bad_student(y):
        z = torch.randn(len(y), 2)
        return amd.backward_simulation(denoise, z, Condition(y), [1.0, 0.5]).x

    with torch.enable_grad():
        fake = amd.x0_from_flow(learn_fake(job, amd.W_one, lambda y: bad_student(y).detach()))
    y = torch.arange(SAMPLES) % 3
    places = {
        "plane": (grid(161), Condition(torch.full((161 * 161,), 3))),
        "bad student": (bad_student(y), Condition(y)),
    }
    ranks = {}
    for where, (x, c) in places.items():
        asked = {"reward": reward} | hackable_rewards(reward)
        for t in LEVELS_OF_PUSH:
            of_level = teachers_sense(reward, denoise, fake, t)
            asked |= {f"{name}, t = {t}": sense for name, sense in of_level.items()}
        for name, sense in asked.items():
            rank = spearmanr(sense(x, c), -energy(x)).statistic
            ranks[f"{where}: {name}"] = float(rank)
    return ranks


def fakes(lab: Lab) -> Comparison:
    """What one may do about the exits of a student, against one fake for all.

    DMD is measured against the whole teacher, AMD against the reward's target.
    """
    levels = tuple(1 - i / lab.student_steps for i in range(lab.student_steps))
    arms = {}
    pairs = []
    for name, method, reward in (("DMD", "dmd", "global"), ("AMD", "amd", lab.reward)):
        for kind in beyond.EXITS:
            if (name, kind) == ("DMD", "mixed"):
                continue  # it has no groups
            arms[f"{name}, {kind}"] = Arm(method, reward, lab.s, lab.tau, levels=levels, exits=kind)
            if kind != "one fake":
                pairs.append((f"{name}, {kind}", f"{name}, one fake"))
    return arms, pairs


COMPARED = dict(operators=operators, sensors=sensors, dsa=dsa, fakes=fakes)


def compare(of: Callable[[Lab], Comparison], lab: Lab, starts: list[dict] | None = None):
    """Every arm with every seed, and how it differs from the arm that it is compared with.

    Differences are taken seed by seed; they have 95 % intervals. Half of lab.steps is enough.
    """
    arms, pairs = of(lab)
    arms = {name: arm for name, arm in arms.items() if name.startswith(lab.only)}
    results = lab.run(arms, steps=lab.steps // 2, starts=starts)
    rows = {}
    for name, runs in results.items():
        *before, last = zip(*(run.exits for run in runs), strict=True)
        for number, samples in enumerate(before, 1):
            rows[f"{name}, exit {number}"] = [measure(x, arms[name].reward) for x in samples]
        rows[name] = [measure(x, arms[name].reward) for x in last]
    differ = {
        f"{name} - {other}": running.compared(rows[name], rows[other])
        for name, other in pairs
        if {name, other} <= rows.keys()  # --only may have left one out
    }

    measures = ("off", "bad", "sw2", "reward", "spread")
    figure, (panels,) = axes(1, len(measures), 3.0)
    if differ:
        running.draw_differences(panels, differ, measures)
        print("\ndifferences, seed by seed, and half of their 95 % interval")
        running.show(differ)
    told = dict(
        arms={name: running.mean_std(of_seeds) for name, of_seeds in rows.items()},
        seeds=rows,
        differences=differ,
        calls={name: runs[0].calls for name, runs in results.items()},
        tau=lab.tau,
    )
    return figure, told


# ------------------------------------------------------------------------------ the Forbidden Zone
LEVELS_OF_PUSH = (0.2, 0.4, 0.6, 0.8)


def study(job: Job) -> tuple[dict[str, float], dict]:
    """A seed of `zone` -> numbers, and fields to draw."""
    torch.manual_seed(job.seed)
    teacher = loaded(job.start)
    denoise = amd.x0_from_flow(teacher)

    @torch.no_grad()
    def bad_student(y):
        """The fitted network in two steps, which is not distilled yet."""
        z = torch.randn(len(y), 2)
        return amd.backward_simulation(denoise, z, Condition(y), [1.0, 0.5]).x

    fakes = [learn_fake(job, W, real_samples) for W in (amd.W_one, amd.W_exp)]
    near = learn_fake(job, amd.W_one, bad_student)
    with torch.no_grad():
        numbers = push_of_sharpening(job, fakes)
        errors, ranks = errors_by_energy(denoise)
        arrows, pulls = pulls_in_the_zone(teacher, near)
        numbers |= ranks | energy_given_reward(job, bad_student) | pulls
    return numbers, dict(arrows=arrows, errors=errors)


def learn_fake(job: Job, W: Callable, sample: Callable) -> MLP:
    """A fake teacher of the samples (classes -> x), trained by Eq. 14 with weight W."""
    torch.manual_seed(job.seed)  # the same samples and noise for every fake
    fake, reward = loaded(job.start), reward_of(job.arm.reward)
    groups = 512 // job.K
    c = Condition((torch.arange(groups) % 3).repeat_interleave(job.K))

    def loss():
        x = sample(c.y)
        t = 0.02 + 0.96 * torch.rand(groups).repeat_interleave(job.K)
        a = amd.group_advantage(reward(x, None), job.K)
        eps = torch.randn_like(x)
        draw = amd.Draw(c, x, 1.0, a, W(a), t, eps, amd.renoise(x, t, eps))
        return amd.fake_loss(draw, amd.x0_from_flow(fake)(draw.x_t, t, c))

    descend(fake, loss, 1e-3, job.steps // 3)
    return fake


def push_of_sharpening(job: Job, fakes: list[MLP]) -> dict[str, float]:
    """What the sharpened fake changes (Sec. 3.3) for a perfect student at the suppressed modes.

    The push is DMD's update along the way to the nearest rewarded mode of the class.
    """
    good = torch.tensor(GOOD[job.arm.reward])
    bad = torch.tensor([k for k in range(9) if k not in good]).repeat(2048)
    x = MODES[bad] + STD * torch.randn(len(bad), 2)
    other_class = ROW[bad][:, None] != ROW[good]
    target = (torch.cdist(x, MODES[good]) + 99.0 * other_class).argmin(1)
    way = F.normalize(MODES[good[target]] - x, dim=1)

    numbers, c = {}, Condition(ROW[bad])
    for level in LEVELS_OF_PUSH:
        t = torch.full((len(x),), level)
        x_t = amd.renoise(x, t, torch.randn_like(x))
        pushes, sizes = [], []
        for fake in fakes:
            x0_fake = amd.x0_from_flow(fake)(x_t, t, c)
            d = amd.displace(x, x_t, t, c, None, exact_teacher, x0_fake, 1)
            pushes.append(-(amd.H_std(d, None) * way).sum(1).mean())
            sizes.append(d.fake.norm(dim=1).mean())
        numbers[f"push with W = 1, t = {level}"] = pushes[0].item()
        numbers[f"push gained by W = exp(-a), t = {level}"] = (pushes[1] - pushes[0]).item()
        numbers[f"|d_fake| ratio, t = {level}"] = (sizes[1] / sizes[0]).item()
    return numbers


def errors_by_energy(denoise: amd.Denoiser) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Errors of the learned teacher on grid(161).

    And how they rank with the exact energy (Eq. 5), by 20 bins of it.
    """
    points, c = grid(161), Condition(torch.full((161 * 161,), 3))
    errors, numbers = {}, {}
    spans = [("t in [.02, .98]", 0.02, 0.98)] + [(f"t = {t}", t, t) for t in (0.5, 0.2, 0.1, 0.05)]
    for name, low, high in spans:
        errors[name] = torch.zeros(len(points))
        for _ in range(8):
            t = low + (high - low) * torch.rand(len(points))
            x_t = amd.renoise(points, t, torch.randn_like(points))
            error = denoise(x_t, t, c) - exact_teacher(x_t, t, c)
            errors[name] += error.norm(dim=1) / 8
        ranks = by_energy(errors[name]).argsort().argsort()
        both = torch.stack([ranks, torch.arange(20)]).double()
        correlation = torch.corrcoef(both)[0, 1].item()
        numbers[f"rank correlation, error and E_real, {name}"] = correlation
    return errors, numbers


def by_energy(values: Tensor) -> Tensor:
    """Values on grid(161), averaged in 20 equal bins of rising exact energy."""
    bins = energy(grid(161)).argsort().chunk(20)
    return torch.stack([values[part].mean() for part in bins])


def energy_given_reward(job: Job, bad_student: Callable) -> dict[str, float]:
    """Eq. 11: how often the energy is high though the reward is."""
    limit, reward = energy_of_data(0.01), reward_of(job.arm.reward)
    numbers = {}
    samples = bad_student(torch.arange(SAMPLES) % 3)
    for where, x in (("plane", grid(161)), ("bad student", samples)):
        for level in (-1.0, 0.1, 0.5, 0.9):
            outside = energy(x)[reward(x, None) > level] > limit
            share = outside.float().mean().item()
            numbers[f"P(E > gamma' | R > {level:g}), {where}"] = share
    return numbers


def pulls_in_the_zone(teacher: MLP, near: MLP) -> tuple[dict[str, Tensor], dict[str, float]]:
    """-d_real on grid(15), averaged over noise, and what is done about its weakness (Fig. 2).

    near is a fake teacher of a bad student, for the adapted teacher of DMDR.
    """
    at, limit = grid(15), energy_of_data(0.01)
    home, outside = MODES[nearest(at)[0]] - at, energy(at) > limit
    denoise, mixed = amd.x0_from_flow(teacher), MLP()
    amd.blend(mixed, teacher, near, 0.75)

    def pull(net, level):
        t, c = torch.full((len(at),), level), Condition(torch.full((len(at),), 3))
        noisy = [amd.renoise(at, t, torch.randn_like(at)) for _ in range(64)]
        return sum(net(x_t, t, c) - at for x_t in noisy) / 64

    ascent = amd.force(lambda x: -reward_of("global")(x, None), at)
    arrows = {
        "teacher, t = 0.1": pull(denoise, 0.1),
        "external force": pull(denoise, 0.1) - ascent,
        "more noise, t = 0.6": pull(denoise, 0.6),
        "teacher adapted, r = .75": pull(amd.x0_from_flow(mixed), 0.1),
    }
    numbers = {}
    for name, arrow in arrows.items():
        cos = F.cosine_similarity(arrow, home)[outside].mean().item()
        size = (arrow.norm(dim=1) / home.norm(dim=1))[outside].mean().item()
        numbers[f"pull where E > gamma', cos to the nearest mode, {name}"] = cos
        numbers[f"pull where E > gamma', over the distance, {name}"] = size
    return arrows, numbers


def zone(lab: Lab):
    """Figs. 1, 2: where the teacher cannot be trusted, and what helps there."""
    common = dict(steps=3 * lab.steps, K=lab.group, arm=Arm(reward=lab.reward))
    jobs = [
        Job(seed, start=start, **common)
        for seed, start in zip(lab.seeds, lab.starts(), strict=True)
    ]
    runs = lab.workers.map(study, jobs, "study")
    numbers = {k: running.interval([out[k] for out, _ in runs]) for k in runs[0][0]}
    _, fields = runs[0]

    figure, (top, bottom) = axes(2, 4, 3.0)
    E = energy(grid(161))
    error = fields["errors"]["t = 0.2"].clamp_max(1)
    plane(top[0], "error of the learned teacher, t = 0.2", error, cmap="Reds")
    plane(top[1], "exact E_real (root)", E.sqrt(), cmap="Greys")
    for name, error in fields["errors"].items():
        top[2].plot(by_energy(E), by_energy(error), label=name)
    top[2].set(xscale="log", xlabel="E_real", title="mean error of the learned teacher")
    top[2].legend()
    draw_push(top[3], numbers)
    for ax, (name, arrow) in zip(bottom, fields["arrows"].items(), strict=True):
        cos, _ = numbers[f"pull where E > gamma', cos to the nearest mode, {name}"]
        plane(ax, f"{name}: cos {cos:.2f}", (-E).exp())
        draw_arrows(ax, arrow)
    told = {k: dict(mean=mean, half_width=half) for k, (mean, half) in numbers.items()}
    return figure, dict(arms=told)


def draw_push(ax, numbers: dict) -> None:
    """What sharpening gains against the noise level, and what it does to the size of d_fake."""
    gained = [numbers[f"push gained by W = exp(-a), t = {t}"] for t in LEVELS_OF_PUSH]
    mean, half = torch.tensor(gained).T
    label = "push to the nearest rewarded mode, gained"
    ax.errorbar(LEVELS_OF_PUSH, mean, half, marker="o", capsize=3, label=label)
    sizes = [numbers[f"|d_fake| ratio, t = {t}"][0] - 1 for t in LEVELS_OF_PUSH]
    ax.plot(LEVELS_OF_PUSH, sizes, label="|d_fake|, ratio - 1")
    ax.set(xlabel="noise level t", title="W = exp(-a) against W = 1", ylim=(None, 0.45))
    ax.legend()


def draw_arrows(ax, arrow: Tensor) -> None:
    """A field on grid(15), at most .5 long; green where it points to the nearest mode."""
    at = grid(15)
    size = arrow.norm(dim=1, keepdim=True)
    short = arrow / size * size.clamp_max(0.5)
    cos = F.cosine_similarity(arrow, MODES[nearest(at)[0]] - at)
    style = dict(cmap="RdYlGn", clim=(-1, 1), width=0.006)
    ax.quiver(*at.T, *short.T, cos, angles="xy", scale_units="xy", scale=1, **style)


# -------------------------------------------------------------------------------- a moving picture
FRAMES = 40


def animate(lab: Lab, path: Path) -> None:
    """shaping.gif: DMD, naive and AMD side by side, from the start to the end of training."""
    from PIL import Image

    common = dict(reward=lab.reward, s=lab.s, tau=lab.tau)
    arms = {
        "DMD": Arm("dmd", **common),
        "naive (Eq. 8)": Arm("naive", **common),
        "AMD": Arm("amd", **common),
    }
    # most happens early, so the frames are dense there
    steps = sorted({round(lab.steps * (i / (FRAMES - 1)) ** 2) for i in range(FRAMES)})
    results = lab.run(arms, tuple(steps))
    frames = [
        frame({k: runs[0].shots[step] for k, runs in results.items()}, step, lab) for step in steps
    ]
    palette = Image.fromarray(frames[-1]).quantize(24)  # one for all, or colours would flicker
    first, *rest = [
        Image.fromarray(pixels).quantize(palette=palette, dither=0) for pixels in frames
    ]
    time_of_each = [120] * (len(frames) - 1) + [2500]
    first.save(
        path, save_all=True, append_images=rest, duration=time_of_each, loop=0, optimize=True
    )


def frame(points: dict[str, Tensor], step: int, lab: Lab):
    """One picture of the animation, as an array (height, width, 3) of bytes.

    points has the samples of each arm, by name.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, (panels,) = axes(1, len(points), 2.3)
    figure.set_dpi(96)
    for ax, (name, x) in zip(panels, points.items(), strict=True):
        plane(ax, name, points=x[:2500], reward=lab.reward)
    figure.suptitle(f"update {step}", fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


# ------------------------------------------------------------------------- a diagram of one update
PLAIN = "#f2f2f2"
TRAINED = "#cfe3f7"
FROZEN = "#d5efd0"
FAKE = "#f8d7cf"
SENSED = "#fdeeb8"
BOXES = {  # name: place of its centre, colour, text
    "z": (0.0, 2.0, PLAIN, "noise z\ncondition c"),
    "student": (1.6, 2.0, TRAINED, "student"),
    "x": (3.2, 2.0, PLAIN, "samples x\nK of each c"),
    "x_t": (5.1, 2.0, PLAIN, "$x_t = \\alpha_t x + \\sigma_t \\epsilon$\none t a group"),
    "uncond": (7.4, 3.0, FROZEN, "real teacher, no c\n$d_{uncond} = x - \\hat x_0$"),
    "cond": (7.4, 2.0, FROZEN, "real teacher, c\n$d_{cond} = x - \\hat x_0$"),
    "fake": (7.4, 1.0, FAKE, "fake teacher, c\n$d_{fake} = x - \\hat x_0$"),
    "ca": (10.0, 2.5, PLAIN, "$d_{CA}$: to the condition\n$(w - 1)(d_{cond} - d_{uncond})$"),
    "dm": (10.0, 1.5, PLAIN, "$d_{DM}$: to the data\n$d_{cond} - d_{fake}$"),
    "g": (12.7, 2.0, TRAINED, "$g = \\beta\\, d_{DM} + \\alpha\\, d_{CA}$\nx moves down g"),
    "reward": (3.2, 0.0, SENSED, "reward\nr(x, c)"),
    "a": (5.1, 0.0, SENSED, "advantage a\nof x in its group"),
    "loss": (
        7.4,
        0.0,
        FAKE,
        "its loss: $W \\|\\epsilon - \\hat\\epsilon\\|^2$\n$W = e^{-a / \\tau}$",
    ),
    "dsa": (12.7, 0.0, SENSED, "$\\alpha = 1 + s a$\n$\\beta = 1 - s a$"),
}
ARROWS = (
    "z student, student x, x x_t, x_t uncond, x_t cond, x_t fake, uncond ca, cond ca, cond dm, "
    "fake dm, ca g, dm g, x reward, reward a, a loss, fake loss, a dsa, dsa g"
)


def diagram(path: Path) -> None:
    """update.png: what one update computes from what."""
    from matplotlib.figure import Figure

    figure = Figure((10.2, 3.2), layout="constrained", dpi=150)
    ax = figure.subplots()
    ax.set(xlim=(-0.8, 13.8), ylim=(-0.9, 3.5))
    ax.axis("off")
    edges = {}
    for name, (x, y, colour, text) in BOXES.items():
        box = dict(boxstyle="round,pad=0.4", fc=colour, ec="dimgrey")
        edges[name] = ax.text(
            x, y, text, ha="center", va="center", fontsize=8.5, bbox=box, zorder=2
        )
    figure.canvas.draw()  # only then is it known how large a box is
    for arrow in ARROWS.split(", "):
        tail, head = arrow.split()
        style = dict(arrowstyle="-|>", color="dimgrey", shrinkA=0, shrinkB=0)
        style |= dict(
            patchA=edges[tail].get_bbox_patch(),
            patchB=edges[head].get_bbox_patch(),
            connectionstyle="arc3,rad=0.2" if arrow == "a dsa" else "arc3",
        )
        ax.annotate("", BOXES[head][:2], BOXES[tail][:2], arrowprops=style, zorder=1)
    figure.savefig(path)


# ------------------------------------------------------------------------------------- command line
FIGURES = {
    "shaping": shaping,
    "zone": zone,
    "naive": naive,
    "ablation": ablation,
    "methods": methods,
    "tilt": tilt,
    "exits": exits,
    "operators": partial(compare, operators),
    "sensors": rank_sensors,
    "dsa": partial(compare, dsa),
    "fakes": partial(compare, fakes),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = running.Parser(__doc__, groups=())
    what = parser.add_argument_group("what to draw")
    what.add_argument("--figure", choices=[*FIGURES, "all"], default="shaping")
    what.add_argument("--animate", action="store_true", help="write shaping.gif instead")
    what.add_argument("--diagram", action="store_true", help="write update.png instead")
    what.add_argument(
        "--reward",
        choices=GOOD,
        help="default: selective; for naive, corner (Fig. 8); for sensors, global",
    )
    what.add_argument("--out", type=Path, default=Path("runs/toy2d"), help="folder (runs/toy2d)")
    how = parser.add_argument_group("method and optimisation")
    how.add_argument(
        "--tau", type=float, help="temperature of W (.2 for selective, else 1; .5 for methods)"
    )
    how.add_argument("--s", type=float, default=0.5, help="sensitivity of Eq. 13, in [0, 1] (.5)")
    how.add_argument("--group", type=int, default=16, help="K, samples in a group (16)")
    how.add_argument("--batch", type=int, default=256, help="samples in an update (256)")
    how.add_argument("--steps", type=int, default=2000, help="student updates (2,000)")
    how.add_argument("--fit", type=int, default=4000, help="steps of the fit at the start (4,000)")
    how.add_argument("--fake-steps", type=int, default=4, help="fake updates in each (4)")
    how.add_argument(
        "--student-steps", type=int, default=4, help="of fakes: steps of the student (4)"
    )
    how.add_argument(
        "--only",
        default="",
        help="of operators, sensors, dsa and fakes: arms whose name begins so (all)",
    )
    how.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    how.add_argument("--seeds", type=int, help="how many (1 for shaping and --animate, else 5)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """ValueError for what cannot work, before any work is done."""
    tau = 1.0 if args.tau is None else args.tau
    amd.method("amd", s=args.s, tau=tau)
    amd.group_advantage(torch.zeros(max(0, args.batch)), args.group)
    for name in ("batch", "steps", "fit", "fake_steps", "student_steps", "seeds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: choose at least 1")
    most = len(MLP().exits)
    running.require(
        2 <= args.student_steps <= most, f"--student-steps {args.student_steps}: choose 2 to {most}"
    )
    least = 4 if args.figure == "fakes" else 2 if args.figure in COMPARED else 1
    running.require(args.steps >= least, f"--steps {args.steps}: choose {least} or more")
    if args.only:
        running.require(args.figure in COMPARED, f"--only is for --figure {', '.join(COMPARED)}")
        arms, _ = COMPARED[args.figure](lab_of(args, args.figure, None))
        running.require(
            any(name.startswith(args.only) for name in arms),
            f"--only {args.only}: choose how one of {', '.join(arms)} begins",
        )


def lab_of(args: argparse.Namespace, figure: str, workers: running.Workers | None) -> Lab:
    """The settings of a figure, which has defaults of its own.

    The strawman's is the corner reward, as in Fig. 8; sensors find what is off all modes. tau is
    small where a reward suppresses modes.
    """
    reward = args.reward or dict(naive="corner", sensors="global").get(figure, "selective")
    tau = 0.5 if figure == "methods" else TAU[reward]
    seeds = args.seeds or (1 if figure in ("shaping", "animate") else 5)
    return Lab(
        workers,
        reward=reward,
        tau=tau if args.tau is None else args.tau,
        s=args.s,
        steps=args.steps,
        fit=args.fit,
        group=args.group,
        batch=args.batch,
        seeds=range(args.seed, args.seed + seeds),
        fake_steps=args.fake_steps,
        student_steps=args.student_steps,
        only=args.only,
    )


def main(args: argparse.Namespace) -> None:
    check(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{error}: choose another --out") from None
    if args.diagram:
        diagram(args.out / "update.png")
        print(f"see {args.out / 'update.png'}")
        return
    workers = running.Workers()
    if args.animate:
        animate(lab_of(args, "animate", workers), args.out / "shaping.gif")
        print(f"see {args.out / 'shaping.gif'}")
        return
    figures = FIGURES if args.figure == "all" else [args.figure]
    for figure in figures:
        begun, lab = time.time(), lab_of(args, figure, workers)
        picture, results = FIGURES[figure](lab)
        picture.savefig(args.out / f"{figure}.png")
        seconds = round(time.time() - begun, 1)
        told = dict(figure=figure, reward=lab.reward, seed=[*lab.seeds], seconds=seconds) | results
        text = json.dumps(told, indent=1).replace("NaN", "null")
        (args.out / f"{figure}.json").write_text(text)
        seeds = f"{len(lab.seeds)} seed{'s' if len(lab.seeds) > 1 else ''}"
        print(f"\n{figure}, {told['reward']} reward, {seeds}, {seconds} s, in {args.out}")
        running.show(told["arms"])


if __name__ == "__main__":
    running.run(main, parse)
