"""The 2D lab of AMD: a 3x3 grid of Gaussians as the data, its exact teacher, and the paper's figures. Two CPU cores do.

    python toy2d.py --reward selective    # Fig. 7: where the reward suppresses modes (global: where not), < 60 s
    python toy2d.py --figure zone         # Figs. 1, 2: the Forbidden Zone, measured
    python toy2d.py --figure naive        # Fig. 8: Eq. 8 against Eq. 10
    python toy2d.py --figure ablation     # Figs. 5, 6 in small: which half of AMD does what
    python toy2d.py --figure methods      # Table 1, run
    python toy2d.py --figure tilt         # what AMD converges to; --figure all makes all of them

Each writes <figure>.png and <figure>.json under --out and prints a table: the mean and standard deviation over seeds, a
process each. The condition is a class, the row of the grid; class 3 is the empty condition.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import amd

STD, SPACING = 0.15, 2.0
MODES = (
    torch.tensor([[x, y] for y in (-1, 0, 1) for x in (-1, 0, 1)]) * SPACING
)  # (9, 2), mode 3 * row + column
ROW = torch.arange(9) // 3
GOOD = {
    "selective": [0, 2, 4, 6, 8],
    "global": list(range(9)),
    "corner": [0, 1, 3],
}  # the rewarded modes
TAU = {"selective": 0.2, "global": 1.0, "corner": 1.0}
SAMPLES, LR, FAKE_LR, FAKE_STEPS = 9000, 1.5e-3, 3e-3, 4


# ----------------------------------------------------------------------------------------------- data, reward, teachers
def real_samples(y):
    """Data of classes y (B,), 3 = any -> (B, 2)."""
    row = torch.where(y < 3, y, torch.randint(0, 3, y.shape))
    return MODES[3 * row + torch.randint(0, 3, y.shape)] + STD * torch.randn(len(y), 2)


def energy(x):
    """E_real = -log p_real, exact, of all nine modes: (B, 2) -> (B,)."""
    return math.log(9 * 2 * math.pi * STD**2) - torch.logsumexp(
        -(torch.cdist(x, MODES) ** 2) / (2 * STD**2), 1
    )


def exact_teacher(x_t, t, c):
    """E[x0 | x_t, class] of the mixture, a Denoiser; c = (classes (B,), noise)."""
    alpha, var = (1 - t)[:, None], ((1 - t) ** 2 * STD**2 + t**2)[:, None]
    diff = x_t[:, None] - alpha[..., None] * MODES  # (B, 9, 2)
    logp = (-diff.square().sum(2) / (2 * var)).masked_fill(
        (c[0][:, None] < 3) & (c[0][:, None] != ROW), -torch.inf
    )
    return (logp.softmax(1)[..., None] * (MODES + (alpha * STD**2 / var)[..., None] * diff)).sum(1)


def reward_of(name):
    """Sum over the rewarded modes of exp(-d^2 / (2 * 0.4^2)), or for "linear" the way to the lower left."""
    if name == "linear":
        return lambda x, c: -x.sum(1)
    return lambda x, c: (-(torch.cdist(x, MODES[GOOD[name]]) ** 2) / (2 * 0.4**2)).exp().sum(1)


class MLP(nn.Module):
    """Velocity network of teacher, student and fake. Without the sines of x and a condition in every layer, the middle
    mode of each row starves: a narrow MLP maps all rows alike."""

    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("f_x", math.pi / 8 * torch.tensor([1.0, 2.0, 4.0]))
        self.register_buffer("f_t", math.pi / 2 * torch.tensor([1.0, 2.0, 4.0, 8.0]))
        self.x_in, self.out, self.head = (
            nn.Linear(14, width),
            nn.Linear(width, 2),
            nn.Linear(width, 1),
        )
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.cond = nn.ModuleList([nn.Linear(12, width) for _ in range(3)])

    def features(self, x, t, y):
        e, p = t[:, None] * self.f_t, (x[..., None] * self.f_x).flatten(1)
        e = torch.cat([e.sin(), e.cos(), F.one_hot(y, 4).to(x)], 1)
        h = F.silu(self.x_in(torch.cat([x, p.sin(), p.cos()], 1)) + self.cond[0](e))
        for layer, cond in zip(self.hidden, self.cond[1:], strict=True):
            h = F.silu(layer(h) + cond(e))
        return h

    def forward(self, x, t, c):
        return self.out(self.features(x, t, c[0]))


def loaded(weights):
    (net := MLP()).load_state_dict(weights)
    return net


def descend(net, loss_of, lr, steps):
    """AdamW on loss_of(), the rate falling to 0 over the second half."""
    opt = torch.optim.AdamW(net.parameters(), lr, fused=True)
    for i in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, 2 - 2 * i / steps)
        opt.zero_grad()
        loss_of().backward()
        opt.step()
        tick(i)


def fit(job):
    """Flow matching on the data: the learned teacher, and everyone's start -> weights."""
    torch.manual_seed(job["seed"])
    net, classes = MLP(), torch.arange(512) % 3

    def loss():
        x, t, y = (
            real_samples(classes),
            torch.rand(512),
            torch.where(torch.rand(512) < 0.1, 3, classes),
        )
        eps = torch.randn_like(x)
        return F.mse_loss(net(amd.renoise(x, t, eps), t, (y,)), eps - x)

    descend(net, loss, 2e-3, job["steps"])
    return net.state_dict()


# ------------------------------------------------------------------------------------------------------- distillation
ARM = dict(s=0.5, tau=1.0, lam=0.0, w=1.0, student_steps=1, learned=False, sharpen=True)


def distill(job):
    """amd.train of one arm and seed -> {step: samples (9000, 2)} at the steps of job["shots"]; classes are i mod 3."""
    arm, seed, K, steps = ARM | job["arm"], job["seed"], job["K"], job["steps"]
    student, fake, real, blended = (loaded(job["start"]) for _ in range(4))
    opts = {
        torch.optim.AdamW(
            net.parameters(), lr, betas=(0.0, 0.99), fused=True
        ): lr  # no momentum: one chases the
        for net, lr in ((student, LR), (fake, FAKE_LR))
    }  # other
    teacher, levels = (
        amd.x0_from_flow(real) if arm["learned"] else exact_teacher,
        [1.0, 0.5][: arm["student_steps"]],
    )

    def batch(n, j):  # groups take the classes in turn; z rides along, for DMD's pairs
        y = ((torch.arange(job["batch"] // K) + n) % 3).repeat_interleave(K)
        return y, torch.randn(job["batch"], 2, generator=seeded(seed, n))

    generate = lambda c, u: amd.backward_simulation(amd.x0_from_flow(student), c[1], c, levels, u)
    truth = lambda c: (
        solve(teacher, c, arm["w"]) if arm["method"] == "dmd" else real_samples(c[0])
    )  # pairs, or data

    def adapt(r):
        amd.blend(blended, real, fake, r)
        return amd.x0_from_flow(blended)

    method = amd.method(
        arm["method"],
        s=arm["s"],
        tau=arm["tau"],
        lam=arm["lam"],
        fade=max(1, steps // 2),
        unit_w=True,
    )
    method = method if arm["sharpen"] else method._replace(W=amd.W_one)
    logs = amd.train(
        method,
        generate,
        teacher,
        amd.x0_from_flow(fake),
        batch,
        *opts,
        reward=reward_of(arm["reward"]),
        K=K,
        null=null,
        w=arm["w"],
        normalize=False,
        truth=truth,
        adapt=adapt,
        seed=seed,
        logits=lambda x_t, t, c: fake.head(fake.features(x_t, t, c[0]))[:, 0],
        fake_steps=FAKE_STEPS,
    )
    c, shots = (torch.arange(SAMPLES) % 3, torch.randn(SAMPLES, 2, generator=seeded(seed, -1))), {}
    for step in range(steps + 1):
        if step in job["shots"]:
            shots[step] = amd.rollout(generate, c, 1.0, seed, grad=False)[0]
        if step < steps:
            for opt, lr in opts.items():  # constant for a fifth, then to 0
                opt.param_groups[0]["lr"] = lr * min(1.0, (1 - step / steps) / 0.8)
            next(logs)
            tick(step)
    if len(levels) > 1:
        shots[-1] = amd.rollout(generate, c, 0.0, seed, grad=False)[0]  # what its first exit makes
    return shots


def seeded(*ints):
    return torch.Generator().manual_seed(amd.key(*ints))


def null(c):
    return torch.full_like(c[0], 3), c[1]


@torch.no_grad()
def solve(teacher, c, w, steps=20):
    """The teacher's flow from z = c[1] at CFG scale w, by Euler -> (B, 2)."""
    x, levels = c[1], torch.linspace(1, 0, steps + 1)
    for t, t_next in zip(levels, levels[1:], strict=False):
        d = amd.displace(x, x, t.expand(len(x)), c, null, teacher, None, w)
        x = x + (t_next - t) / t * d.real  # the velocity is (x_t - x0_hat) / t
    return x


# ------------------------------------------------------------------------------------------------------------ measures
def target_mass(reward):
    """The teacher restricted, within each class, to its rewarded modes -> (9,); a class without one keeps all three."""
    good = torch.zeros(9).index_fill(0, torch.tensor(GOOD[reward]), 1.0).view(3, 3)
    good = torch.where(good.sum(1, keepdim=True) > 0, good, 1.0)
    return (good / good.sum(1, keepdim=True) / 3).flatten()


def nearest(x):
    """Index of the nearest mode, and whether x is within 4 std of it: (B, 2) -> (B,), (B,)."""
    d, mode = torch.cdist(x, MODES).min(1)
    return mode, d < 4 * STD


def measure(x, reward):
    """Samples (B, 2), classes in turn -> {metric: number}; the README says what each is."""
    torch.manual_seed(0)
    target, good = (
        target_mass(reward),
        torch.zeros(9).index_fill(0, torch.tensor(GOOD[reward]), 1.0),
    )
    mode, on = nearest(x)
    mass, share = (torch.bincount(m, minlength=9) / len(x) for m in (mode[on], mode))
    wanted = MODES[
        torch.bucketize(torch.linspace(0, 1 - 1e-6, len(x)), target.cumsum(0), right=True)
    ]
    wanted = wanted + STD * torch.randn(len(x), 2)
    axes = torch.stack(
        [f(torch.arange(64) * math.pi / 64) for f in (torch.cos, torch.sin)]
    )  # (2, 64)
    sw2 = ((x @ axes).sort(0).values - (wanted @ axes).sort(0).values).square().mean().sqrt()
    gamma = energy(real_samples(torch.full((100_000,), 3))).quantile(
        0.999
    )  # the threshold of Eq. 5
    values = dict(
        off=1 - mass.sum(),
        good=mass @ good,
        bad=mass @ (1 - good),
        modes=((mass >= target / 4) & (target > 0)).sum(),
        tv=0.5 * (share - target).abs().sum(),
        sw2=sw2,
        reward=reward_of(reward)(x, None).mean(),
        zone=(energy(x) > gamma).float().mean(),
        spread=(x - MODES[mode])[on].std() / STD,
    )  # of samples about their mode, the data's is 1
    return {k: float(v) for k, v in values.items()}


def mean_std(rows):
    """Dicts of numbers, one a seed -> a dict of [mean, std], or of numbers if there is one seed."""
    columns = {k: torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in rows[0]}
    return {
        k: [v.mean().item(), v.std().item()] if len(rows) > 1 else v.item()
        for k, v in columns.items()
    }


def interval(values):
    """Mean and half width of its 95 % interval, by Student's t over seeds."""
    v, t = (
        torch.tensor(values, dtype=torch.float64),
        {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262},
    )
    return [v.mean().item(), t.get(len(v), 1.96) * v.std().item() / len(v) ** 0.5]


# ---------------------------------------------------------------------------------------- processes: one a seed and arm
COUNT = POOL = None  # steps done by all workers, for the progress bar; the workers


def begin(count):
    global COUNT
    COUNT = count
    torch.set_num_threads(1)


def tick(i):
    if COUNT is not None and i % 20 == 0:
        with COUNT.get_lock():
            COUNT.value += 20


def spread(work, jobs, what):
    """work(job) for each job, on all cores -> results in order. A job tells its "steps", to show the progress."""
    global COUNT, POOL
    if POOL is None:
        context = multiprocessing.get_context("spawn")
        COUNT = context.Value("l", 0)
        POOL = context.Pool(os.cpu_count(), begin, (COUNT,))
    COUNT.value, results = 0, POOL.map_async(work, jobs, chunksize=1)
    with tqdm(total=sum(job["steps"] for job in jobs), desc=what, leave=False, disable=None) as bar:
        while not results.ready():
            results.wait(0.5)
            bar.update(min(COUNT.value, bar.total) - bar.n)
    return results.get()


def run(args, arms, shots=(), steps=None):
    """Every arm with every seed, from one start a seed -> {arm: [shots of a seed]}."""
    seeds, steps = range(args.seed, args.seed + args.seeds), steps or args.steps
    starts = spread(fit, [dict(seed=seed, steps=args.fit) for seed in seeds], "fit")
    common = dict(steps=steps, shots={*shots, steps}, K=args.group, batch=args.batch)
    results = iter(
        spread(
            distill,
            [
                dict(common, arm=arm, seed=seed, start=start)
                for arm in arms.values()
                for seed, start in zip(seeds, starts, strict=True)
            ],
            "distill",
        )
    )
    return {name: [next(results) for _ in seeds] for name in arms}


# ------------------------------------------------------------------------------------------------------------- figures
def grid(side, half=4.0):
    """Points of the square [-half, half]^2, row by row -> (side^2, 2)."""
    return torch.cartesian_prod(*[torch.linspace(-half, half, side)] * 2).flip(1)


def axes(rows, columns, size=2.6):
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rc("axes", titlesize=9), matplotlib.rc("legend", fontsize=7)
    figure = Figure(figsize=(columns * size, rows * (size + 0.35)), layout="constrained", dpi=130)
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=dict(box_aspect=1))


def plane(ax, title, values=None, points=None, reward=None, cmap="Blues"):
    """A square of the plane: a map of values on grid(161), points, the reward's modes (star) and the others (cross)."""
    if values is not None:
        ax.imshow(values.view(161, 161), origin="lower", extent=(-4, 4, -4, 4), cmap=cmap)
    if points is not None:
        ax.scatter(*points[:4000].T, s=1.5, alpha=0.35, lw=0, color="tab:blue")
    for marker, modes in (
        (("*", GOOD[reward]), ("x", set(range(9)) - set(GOOD[reward]))) if reward else ()
    ):
        ax.scatter(
            *MODES[sorted(modes)].T,
            marker=marker,
            s=24,
            lw=1,
            c="tab:green" if marker == "*" else "tab:red",
        )
    ax.set(xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[], title=title)


def table(results, reward):
    """{arm: [shots of a seed]} -> {arm: measures of the last shot, mean and std over seeds}."""
    return {
        name: mean_std([measure(shots[max(shots)], reward) for shots in runs])
        for name, runs in results.items()
    }


def shaping(args):
    tau, half, points = args.tau or TAU[args.reward], args.steps // 4, grid(161)
    results = run(
        args,
        {
            "DMD": dict(method="dmd", reward=args.reward),
            "AMD": dict(method="amd", reward=args.reward, s=args.s, tau=tau),
        },
        shots=(0, half),
    )
    figure, panels = axes(2, 3)
    teacher, rewards, *students = panels.flat
    plane(teacher, "teacher", (-energy(points)).exp())
    plane(
        rewards,
        f"reward, tau {tau:g}",
        reward_of(args.reward)(points, None),
        None,
        args.reward,
        "Greens",
    )
    for ax, name, step in zip(
        students, ["AMD", "AMD", "AMD", "DMD"], [0, half, args.steps, args.steps], strict=True
    ):
        plane(ax, f"{name}, step {step}", points=results[name][0][step], reward=args.reward)
    return figure, dict(arms=table(results, args.reward), tau=tau)


def naive(args):
    shots, tau = [args.steps * i // 4 for i in range(5)], args.tau or TAU[args.reward]
    results = run(
        args,
        {
            f"{name} (Eq. {n})": dict(method=method, reward=args.reward, s=args.s, tau=tau)
            for name, method, n in [("naive", "naive", 8), ("AMD", "amd", 10)]
        },
        shots,
    )
    figure, grid_of_axes = axes(2, 5)
    for row, (name, runs) in zip(grid_of_axes, results.items(), strict=True):
        for ax, step in zip(row, shots, strict=True):
            plane(ax, f"{name}, step {step}", points=runs[0][step], reward=args.reward)
    off = {
        name: {
            step: [round(measure(run[step], args.reward)["off"], 4) for run in runs]
            for step in shots
        }
        for name, runs in results.items()
    }
    return figure, dict(arms=table(results, args.reward), tau=tau, off_of_each_seed=off)


def ablation(args):
    shots, tau = range(0, args.steps + 1, max(1, args.steps // 20)), args.tau or TAU[args.reward]
    kinds = {
        "DMD": dict(method="dmd"),
        "+ DSA": dict(sharpen=False),
        "+ RLS": dict(s=0.0),
        "AMD": {},
    }
    common = dict(method="amd", s=args.s, tau=tau, reward=args.reward)
    results = run(args, {k: common | v for k, v in kinds.items()}, shots)
    figure, (row,) = axes(1, 3, 3.2)
    curves = {
        name: {
            step: mean_std([measure(run[step], args.reward) for run in runs]) for step in runs[0]
        }
        for name, runs in results.items()
    }
    for ax, key in zip(row, ("reward", "off", "sw2"), strict=True):
        for name, curve in curves.items():
            mean, std = torch.tensor(
                [v[key] if args.seeds > 1 else [v[key], 0.0] for v in curve.values()]
            ).T
            ax.plot(list(curve), mean, label=name)
            ax.fill_between(list(curve), mean - std, mean + std, alpha=0.2)
        ax.set(title=key, xlabel="student updates", ylim=(0, None))
    row[0].legend()
    return figure, dict(arms=table(results, args.reward), tau=tau)


def methods(args):
    lam, tau = {"dmd": 0.25, "dmd2": 0.1, "dmdr": 0.25}, args.tau or 0.5
    rows = {
        name: dict(
            method=name,
            reward=args.reward,
            s=args.s,
            tau=tau,
            lam=lam.get(name, 0.0),
            w=1.25,
            student_steps=2,
            learned=True,
        )
        for name in amd.METHODS
    }
    results = run(args, rows, steps=args.steps // 2)
    figure, grid_of_axes = axes(2, 4)
    for ax, (name, runs) in zip(grid_of_axes.flat, results.items(), strict=True):
        plane(ax, name, points=runs[0][max(runs[0])], reward=args.reward)
    first = {
        f"{name}, exit 1": [{0: shots[-1]} for shots in runs] for name, runs in results.items()
    }
    return figure, dict(arms=table(results | first, args.reward), tau=tau, lam=lam)


def tilt(args):
    """Slope of log p_student / p_real of a mode against its mean advantage, over the classes, for a linear reward."""
    taus, reward, K = (2.0, 1.0, 0.5), reward_of("linear"), args.group
    results = run(
        args, {f"tau {tau:g}": dict(method="amd", reward="linear", s=0.0, tau=tau) for tau in taus}
    )
    (figure, ((ax,),)), arms, line = axes(1, 1, 4.2), {}, torch.tensor([-1.2, 1.2])
    for color, (tau, (name, runs)) in enumerate(zip(taus, results.items(), strict=True)):
        slopes = []
        for shots in runs:
            points = []  # (mean advantage, log ratio, weight), centred within their class
            for row in range(3):
                x = shots[args.steps][row::3][: SAMPLES // 3 // K * K]
                a, (mode, on) = amd.group_advantage(reward(x, None), K), nearest(x)  # fresh groups
                at = [on & (mode == 3 * row + column) for column in range(3)]
                mass = torch.stack([v.float().mean() for v in at]) / on.float().mean()
                point = torch.stack(
                    [torch.stack([a[v].mean() for v in at]), (3 * mass).log(), mass]
                )[:, mass > 0.002]
                points.append(
                    point - torch.stack([*(point[:2] @ point[2]), torch.tensor(0.0)])[:, None]
                )
            a, y, weight = torch.cat(points, 1)
            slopes.append(((weight * a) @ y / ((weight * a) @ a)).item())
            ax.plot(a, y, ".", color=f"C{color}", ms=5)
        mean, half = interval(slopes)
        ax.plot(
            line,
            line / tau,
            color=f"C{color}",
            lw=1,
            label=f"{name}: slope {mean:.2f}, law {1 / tau:g}",
        )
        arms[name] = dict(
            mean_std([measure(shots[args.steps], "global") for shots in runs]),
            slope=mean,
            half_width=half,
            law=1 / tau,
        )
    ax.set(
        xlabel="mean advantage of a mode, less its class's",
        ylabel="log p_student / p_real, less its class's",
        title="AMD tilts: p_student ~ p_real exp(a / tau)",
    )
    ax.legend()
    return figure, dict(arms=arms, reward="linear")


def study(job):
    """A seed of `zone`: fakes of a perfect student, the learned teacher's errors, Eq. 11 -> numbers, fields to draw."""
    torch.manual_seed(job["seed"])
    teacher, reward, K, out = loaded(job["start"]), reward_of(job["reward"]), job["K"], {}
    denoise, classes = amd.x0_from_flow(teacher), (torch.arange(512 // K) % 3).repeat_interleave(K)
    bad_student = torch.no_grad()(
        lambda y: amd.backward_simulation(denoise, torch.randn(len(y), 2), (y,), [1.0, 0.5])[0]
    )

    def learn(W, sample):
        torch.manual_seed(job["seed"])  # the same samples and noise for every fake
        fake = loaded(job["start"])

        def loss():
            x, t = sample(classes), 0.02 + 0.96 * torch.rand(512 // K).repeat_interleave(K)
            a = amd.group_advantage(reward(x, None), K)
            eps = torch.randn_like(x)
            draw = amd.Draw((classes,), x, 1.0, a, W(a), t, eps, amd.renoise(x, t, eps))
            return amd.fake_loss(draw, amd.x0_from_flow(fake)(draw.x_t, t, draw.c))

        descend(fake, loss, 1e-3, job["steps"] // 3)
        return fake

    fakes, near = (
        [learn(W, real_samples) for W in (amd.W_one, amd.W_exp)],
        learn(amd.W_one, bad_student),
    )
    with torch.no_grad():
        good = torch.tensor(GOOD[job["reward"]])
        bad = torch.tensor([k for k in range(9) if k not in GOOD[job["reward"]]]).repeat(2048)
        x = MODES[bad] + STD * torch.randn(len(bad), 2)
        far = torch.cdist(x, MODES[good]) + 99.0 * (
            ROW[bad][:, None] != ROW[good]
        )  # to rewarded modes of its class
        way = F.normalize(MODES[good[far.argmin(1)]] - x, dim=1)
        for level in (0.2, 0.4, 0.6, 0.8):
            t, c = torch.full((len(x),), level), (ROW[bad],)
            x_t = amd.renoise(x, t, torch.randn_like(x))
            d = [
                amd.displace(
                    x, x_t, t, c, None, exact_teacher, amd.x0_from_flow(fake)(x_t, t, c), 1
                )
                for fake in fakes
            ]
            push, size = (
                [-(amd.H_std(v, None) * way).sum(1).mean() for v in d],
                [v.fake.norm(dim=1).mean() for v in d],
            )
            out[f"push with W = 1, t = {level}"] = push[0].item()
            out[f"push gained by W = exp(-a), t = {level}"] = (push[1] - push[0]).item()
            out[f"|d_fake| ratio, t = {level}"] = (size[1] / size[0]).item()
        points, errors, c = grid(161), {}, (torch.full((161 * 161,), 3),)
        for name, low, high in [("t in [.02, .98]", 0.02, 0.98)] + [
            (f"t = {t}", t, t) for t in (0.5, 0.2, 0.1, 0.05)
        ]:
            errors[name] = 0
            for _ in range(8):
                t = low + (high - low) * torch.rand(len(points))
                x_t = amd.renoise(points, t, torch.randn_like(points))
                errors[name] += (denoise(x_t, t, c) - exact_teacher(x_t, t, c)).norm(dim=1) / 8
            ranks = torch.stack(
                [by_energy(errors[name]).argsort().argsort(), torch.arange(20)]
            ).double()
            out[f"rank correlation, error and E_real, {name}"] = torch.corrcoef(ranks)[0, 1].item()
        limit = energy(real_samples(torch.full((100_000,), 3))).quantile(0.99)  # gamma' of Eq. 11
        for where, x in (
            ("plane", points),
            ("bad student", bad_student(torch.arange(SAMPLES) % 3)),
        ):
            for level in (-1.0, 0.1, 0.5, 0.9):
                outside = energy(x)[reward(x, None) > level] > limit
                out[f"P(E > gamma' | R > {level:g}), {where}"] = outside.float().mean().item()
        at, mixed = grid(15), loaded(job["start"])
        amd.blend(mixed, teacher, near, 0.75)

        def pull(net, t):  # -d_real, averaged over noise
            t, c = torch.full((len(at),), t), (torch.full((len(at),), 3),)
            return (
                sum(net(amd.renoise(at, t, torch.randn_like(at)), t, c) - at for _ in range(64))
                / 64
            )

        home, outside, arrows = (
            MODES[nearest(at)[0]] - at,
            energy(at) > limit,
            {
                "teacher, t = 0.1": pull(denoise, 0.1),
                "external force": pull(denoise, 0.1)
                - amd.force(lambda x: -reward_of("global")(x, None), at),
                "more noise, t = 0.6": pull(denoise, 0.6),
                "teacher adapted, r = .75": pull(amd.x0_from_flow(mixed), 0.1),
            },
        )
        for name, arrow in arrows.items():
            cos, size = F.cosine_similarity(arrow, home), arrow.norm(dim=1) / home.norm(dim=1)
            out[f"pull in Z_f, cos to the nearest mode, {name}"] = cos[outside].mean().item()
            out[f"pull in Z_f, over the distance, {name}"] = size[outside].mean().item()
    return out, dict(at=at, arrows=arrows, errors=errors)


def by_energy(values):
    return torch.stack(
        [values[part].mean() for part in energy(grid(161)).argsort().chunk(20)]
    )  # in 20 equal bins


def zone(args):
    jobs = [
        dict(seed=args.seed + i, steps=args.fit, K=args.group, reward=args.reward)
        for i in range(args.seeds)
    ]
    starts = spread(fit, jobs, "fit")
    runs = spread(
        study,
        [dict(v, start=at, steps=3 * args.steps) for v, at in zip(jobs, starts, strict=True)],
        "study",
    )
    numbers, fields = {k: interval([out[k] for out, _ in runs]) for k in runs[0][0]}, runs[0][1]
    figure, (top, bottom) = axes(2, 4, 3.0)
    E, at, levels = energy(grid(161)), fields["at"], (0.2, 0.4, 0.6, 0.8)
    plane(
        top[0],
        "error of the learned teacher, t = 0.2",
        fields["errors"]["t = 0.2"].clamp_max(1),
        cmap="Reds",
    )
    plane(top[1], "exact E_real (root)", E.sqrt(), cmap="Greys")
    for name, error in fields["errors"].items():
        top[2].plot(by_energy(E), by_energy(error), label=name)
    top[2].set(xscale="log", xlabel="E_real", title="mean error of the learned teacher")
    mean, half = torch.tensor([numbers[f"push gained by W = exp(-a), t = {t}"] for t in levels]).T
    top[3].errorbar(
        levels, mean, half, marker="o", capsize=3, label="push to the nearest rewarded mode, gained"
    )
    top[3].plot(
        levels,
        [numbers[f"|d_fake| ratio, t = {t}"][0] - 1 for t in levels],
        label="|d_fake|, ratio - 1",
    )
    top[3].set(xlabel="noise level t", title="W = exp(-a) against W = 1", ylim=(None, 0.45))
    for ax, (name, arrow) in zip(bottom, fields["arrows"].items(), strict=True):
        plane(
            ax,
            f"{name}: cos {numbers[f'pull in Z_f, cos to the nearest mode, {name}'][0]:.2f}",
            (-E).exp(),
        )
        size, cos = (
            arrow.norm(dim=1, keepdim=True),
            F.cosine_similarity(arrow, MODES[nearest(at)[0]] - at),
        )
        ax.quiver(
            *at.T,
            *(arrow / size * size.clamp_max(0.5)).T,
            cos,
            cmap="RdYlGn",
            clim=(-1, 1),
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.006,
        )
    top[2].legend(), top[3].legend()
    return figure, dict(arms={k: dict(mean=v[0], half_width=v[1]) for k, v in numbers.items()})


# ----------------------------------------------------------------------------------------------------------- arguments
FIGURES = {
    "shaping": shaping,
    "zone": zone,
    "naive": naive,
    "ablation": ablation,
    "methods": methods,
    "tilt": tilt,
}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, parser.error = (
        parser.add_argument,
        lambda message: parser.exit(2, f"toy2d.py: {message}\n"),
    )
    add("--figure", choices=[*FIGURES, "all"], default="shaping")
    add("--reward", choices=list(GOOD), help="default: selective, for naive corner (Fig. 8)")
    add(
        "--tau",
        type=float,
        help="temperature of W; default: 0.2 selective, 1 else; 0.5 for methods",
    )
    add("--s", type=float, default=0.5, help="sensitivity of Eq. 13, in [0, 1], default 0.5")
    add("--group", type=int, default=16, help="K, samples in a group, default 16")
    add("--batch", type=int, default=256, help="samples in an update, default 256")
    add("--steps", type=int, default=2000, help="student updates, default 2000")
    add("--fit", type=int, default=4000, help="steps of the flow-matching start, default 4000")
    add("--seed", type=int, default=0, help="the first seed")
    add("--seeds", type=int, help="how many; default: 1 for shaping, 5 else")
    add(
        "--out",
        type=Path,
        default=Path("runs/toy2d"),
        help="folder of the pictures and tables, default runs/toy2d",
    )
    return parser.parse_args()


def show(arms):
    keys, width = list(next(iter(arms.values()))), max(map(len, arms)) + 1
    print(" " * width + "".join(f"{k:>15}" for k in keys))
    for name, row in arms.items():
        cells = [
            " +- ".join(f"{v:.3f}" for v in (row[k] if isinstance(row[k], list) else [row[k]]))
            for k in keys
        ]
        print(f"{name:{width}}" + "".join(f"{cell:>15}" for cell in cells))


def main(args):
    amd.method(
        "amd", s=args.s, tau=1.0 if args.tau is None else args.tau
    )  # bad values end here, before any work
    if min(args.batch, args.steps, args.fit, 1 if args.seeds is None else args.seeds) < 1:
        raise ValueError("choose --batch, --steps, --fit and --seeds of at least 1")
    amd.group_advantage(torch.zeros(args.batch), args.group)
    args.out.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES if args.figure == "all" else [args.figure]:
        begun = time.time()
        reward, seeds = (
            "corner" if figure == "naive" else "selective",
            1 if figure == "shaping" else 5,
        )
        given = argparse.Namespace(
            **vars(args) | dict(reward=args.reward or reward, seeds=args.seeds or seeds)
        )
        picture, results = FIGURES[figure](given)
        picture.savefig(args.out / f"{figure}.png")
        results = (
            dict(
                figure=figure,
                reward=given.reward,
                seed=[*range(args.seed, args.seed + given.seeds)],
                seconds=round(time.time() - begun, 1),
            )
            | results
        )
        (args.out / f"{figure}.json").write_text(json.dumps(results, indent=1))
        print(
            f"\n{figure}, {results['reward']} reward, {given.seeds} seed(s), {results['seconds']} s, in {args.out}"
        )
        show(results["arms"])


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        print(
            f"toy2d.py: {error}{': choose another --out' * isinstance(error, OSError)}",
            file=sys.stderr,
        )
        sys.exit(2)
