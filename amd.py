"""Adaptive Matching Distillation (AMD, arXiv 2602.07345) in one file: copy it, or `import amd`. It needs torch alone.

A slow diffusion teacher becomes a few-step student: its sample x is renoised, two teachers denoise it, x moves down
    g = H(d_real, d_fake) + lam F_ext,    d = x - x0_hat.                                                       (Eq. 6)
The real teacher attracts (d_real); the fake teacher, trained on the student's own samples, repels (d_fake). AMD senses
failures by a reward, compared within a group of K samples of one condition (Eq. 12). Then it
    - weighs the two terms of H sample by sample  (Dynamic Score Adaptation, Eq. 10 and 13),
    - has the fake teacher study failures harder  (Repulsive Landscape Sharpening, Eq. 14).
METHODS, the paper's Table 1, writes its relatives (DMD, DMD2, D-DMD, MagicDistillation, DMDR) in the same form.

    x       the student's sample (B, ...)             t      noise level in [0, 1]: 0 clean, 1 noise
    x_t     F_t(x) = alpha x + sigma eps              c      condition: a tensor, or a tuple / dict of tensors (B, ...)
    x0_hat  a teacher's guess of the clean sample     w      CFG scale omega, 1 = no guidance
    r, a    reward, group advantage in [-1, 1]        s      sensitivity in [0, 1], 0 = no score adaptation
    W(a)    weight in the fake teacher's loss         tau    temperature of W(a) = exp(-a / tau)

    Denoiser: (x_t (B, ...), t (B,), c) -> x0_hat (B, ...)   the one contract with a network; float32, or float64 as x
    Schedule: (t (B,)) -> (alpha (B,), sigma (B,))
"""
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import cos, nan, pi
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


# ============================================================================================== Part I: the algorithm
# ----------------------------------------------------------------------------------- 1. forward operator F_t (Sec. 2)
def like(v, x): return v.view(-1, *[1] * (x.ndim - 1))  # (B,) -> (B, 1, ..., 1), to broadcast against x (B, ...)
def per_sample(v): return v.flatten(1).mean(1)          # (B, ...) -> (B,)
def rms(v): return per_sample(v**2).sqrt().mean()       # (B, ...) -> (): size of an element, for the log
def flow(t): return 1 - t, t                            # the Schedule of flow matching's linear path

def vp(alphas_cumprod):
    """Schedule of a DDPM's grid, alphas_cumprod (N,): t = i / N, i the nearest, for truncation is off by one."""
    def schedule(t):
        N = len(alphas_cumprod)
        abar = alphas_cumprod.to(t, non_blocking=True)[(t * N).round().clamp(0, N - 1).long()]
        return abar.sqrt(), (1 - abar).sqrt()
    return schedule

def renoise(x, t, eps, schedule=flow):
    """F_t(x) = alpha x + sigma eps (Alg. 1 l. 11): x, eps (B, ...), t (B,) in [0, 1] -> x_t (B, ...)."""
    alpha, sigma = schedule(t)
    return like(alpha, x) * x + like(sigma, x) * eps

def x0_from_flow(net):            # net(x_t, t, c) -> the linear path's velocity eps - x (B, ...); -> a Denoiser
    return lambda x_t, t, c: x_t - like(t, x_t) * net(x_t, t, c).to(x_t.dtype)

def x0_from_eps(net, schedule):   # net(x_t, t, c) -> the noise eps_hat (B, ...); -> a Denoiser where alpha > 0
    def denoise(x_t, t, c):
        alpha, sigma = schedule(t)
        return (x_t - like(sigma, x_t) * net(x_t, t, c).to(x_t.dtype)) / like(alpha, x_t)
    return denoise

# --------------------------------------------------------------------------------------- 2. displacements (Sec. 3.1)
class Displacements(NamedTuple):
    """d = x - x0_hat (below Eq. 6): d_real^cond, d_real^uncond, d_fake (B, ...); w = omega, the CFG scale, 1 = off."""
    cond: Tensor; uncond: Tensor; fake: Tensor; w: float
    real = property(lambda d: d.uncond + d.w * (d.cond - d.uncond))  # d_real under CFG, above Eq. 9
    dm = property(lambda d: d.cond - d.fake)                         # Eq. 9: anchors x to the data
    ca = property(lambda d: (d.w - 1) * (d.cond - d.uncond))         # Eq. 9: pushes x towards its condition

def expect(v, shape, what):
    """v if it has the shape, else ValueError: a silent broadcast would train on the wrong thing."""
    if v.shape != tuple(shape): raise ValueError(f"{what} returned shape {tuple(v.shape)}: make it {tuple(shape)}")
    return v

def pair(a, b):
    """Two conditions as one of twice the batch; leaves that are not tensors pass through."""
    if isinstance(a, dict): return {k: pair(a[k], b[k]) for k in a}
    if isinstance(a, tuple | list): return type(a)(map(pair, a, b))
    if not isinstance(a, Tensor) and a is not b and a != b: raise ValueError(f"null(c) changes {a} to {b}: use tensors")
    return torch.cat([a, b]) if isinstance(a, Tensor) else a

@torch.no_grad()
def displace(x, x_t, t, c, null, real, fake, w):
    """Alg. 1 l. 12-13: teachers queried at x_t (B, ...), t (B,) -> Displacements of x (B, ...). One call of real for c
    and null(c), c alone if w = 1; fake may be None. ValueError: a teacher that does not return the shape of x."""
    if w == 1:
        cond = uncond = expect(real(x_t, t, c), x.shape, "real")
    else:
        both = real(torch.cat([x_t, x_t]), torch.cat([t, t]), pair(c, null(c)))
        cond, uncond = expect(both, (2 * len(x), *x.shape[1:]), "real").chunk(2)
    d_fake = None if fake is None else x - expect(fake(x_t, t, c), x.shape, "fake")
    return Displacements(x - cond, x - uncond, d_fake, w)

# -------------------------------------------------------------------------- 3. the operator H (Sec. 3.2, Table 1 row 1)
# Displacements d, advantages a that broadcast against them, s in [0, 1] -> (B, ...). ValueError: s out of [0, 1].
def H_std(d, a): return d.real - d.fake                # Eq. 7; equals d.dm + d.ca by Eq. 9
def H_naive(d, a, s=0.5):                              # Eq. 8, the strawman: H_amd + 2 s a d.cond, and that term does
    alpha, beta = dsa(a, s)                            # not vanish at p_student = p_real
    return alpha * d.real - beta * d.fake
def H_amd(d, a, s=0.5):                                # Eq. 10, Dynamic Score Adaptation: failures (a < 0) follow DM,
    alpha, beta = dsa(a, s)                            # successes (a > 0) follow CA
    return beta * d.dm + alpha * d.ca
def H_rf(d, a): return (2 * a).exp() * H_std(d, a)     # Reward Forcing (arXiv 2512.04678), there by an ungrouped score

def dsa(a, s):  # Eq. 13 -> alpha, beta
    if not 0 <= s <= 1: raise ValueError(f"s = {s} can turn alpha or beta negative: choose s in [0, 1]")
    return 1 + s * a, 1 - s * a

# --------------------------------------------------------------------------------- 4. reward sensing (Sec. 3.2, 3.3)
def group_advantage(r, K, eps=1e-6):
    """Eq. 12: rewards (B,), K adjacent ones a group -> advantages (B,) in [-1, 1], exactly 0 in a group of equals.
    A low one stands for the Forbidden Zone (Eq. 5), as far as Eq. 11 holds. ValueError: K < 2, B % K, NaN, inf."""
    if K < 2 or r.ndim != 1 or len(r) % K:
        raise ValueError(f"rewards {tuple(r.shape)} in groups of K = {K}: choose K >= 2 that divides the batch")
    g = r.detach().cpu().double().view(-1, K)  # in float32, eight equal rewards of -3.7 have advantages of .19
    if not g.isfinite().all(): raise ValueError("the reward of a finite sample is NaN or inf: mend the reward")
    mean, std = g.mean(1, keepdim=True), g.std(1, keepdim=True, unbiased=False)  # population std
    a = ((g - mean) / (std + eps)).clamp(-1, 1).where(std > 1e-6 * mean.abs().clamp_min(1), 0)
    return a.flatten().to(r.device, torch.promote_types(r.dtype, torch.float32))

def W_one(a): return torch.ones_like(a)            # plain L_diff
def W_exp(a, tau=1.0): return (-a / tau).exp()     # below Eq. 14, Repulsive Landscape Sharpening: failures count more

# --------------------------------------------------------------- 5. external forces, as energies to descend (Eq. 25-28)
class Draw(NamedTuple):
    """A micro-batch of Alg. 1 outside every graph: x, eps (B, ...), t, a, weight = W(a) (B,); _ca: D-DMD's CA term."""
    c: object; x: Tensor; eps: Tensor; a: Tensor; weight: Tensor; t: Tensor
    t_ca: Tensor | None = None; eps_ca: Tensor | None = None

# F_ext of Eq. 6 is the gradient at x of an energy (x, draw, closure, schedule) -> (B,)
def regression(x, draw, truth, schedule):    # DMD, Eq. 26
    return 0.5 * per_sample((x - expect(truth(draw.c), x.shape, "truth")) ** 2)
def adversarial(x, draw, logits, schedule):  # DMD2, Eq. 27: -log sigmoid(D)
    x_t = renoise(x, draw.t, draw.eps, schedule)
    return F.softplus(-expect(logits(x_t, draw.t, draw.c), (len(x),), "logits"))
def ascent(x, draw, reward, schedule):       # DMDR, Eq. 28
    return -expect(reward(x, draw.c), (len(x),), "reward")

def force(energy, x):
    """Gradient of a per-sample energy (B,) at x (B, ...), outside the graph; touches no parameter's .grad."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x)[0]

# ------------------------------------------------------------------------------------------------------- 6. Table 1
# F_t: level t, v in [0, 1), level t_G of the student's input -> level of DM, level of CA (None: the same)
def joint(t, v, t_G): return t, None
def cleaner(t, v, t_G): return t, v * t_G              # D-DMD, its Eq. 8: U(0, t_G)
def noisier(t, v, t_G): return t, t_G + v * (1 - t_G)  # D-DMD as Prop. C.1 of the AMD paper reads it: U(t_G, 1)

# phi: student updates done -> r, how far the real teacher's weights are moved to the fake's
def fixed(step): return 0.0
def fade(step, over=10_000): return 0.375 * (1 + cos(pi * min(step / over, 1)))  # DMDR's half cosine

class Method(NamedTuple):
    """A column of Table 1: H(d, a), F_ext = (argument of `train`, energy that calls it), F_t, phi, W(a)."""
    H: Callable; F_ext: tuple[str, Callable] | None; t: Callable; phi: Callable; W: Callable
    lam: float = 0.0; lam_d: float = 0.01; unit_w: bool = False  # weights of F_ext, of critic_loss; W over its mean?
    senses = property(lambda m: m.H is not H_std or m.W is not W_one)  # does H or W read the advantage?

METHODS = {                # H        F_ext                    F_t      phi    psi
    "dmd":            Method(H_std,   ("truth", regression),   joint,   fixed, W_one),
    "dmd2":           Method(H_std,   ("logits", adversarial), joint,   fixed, W_one),
    "ddmd":           Method(H_std,   None,                    cleaner, fixed, W_one),
    "magic":          Method(H_std,   None,                    joint,   fade,  W_one),
    "dmdr":           Method(H_std,   ("reward", ascent),      joint,   fade,  W_one),
    "amd":            Method(H_amd,   None,                    joint,   fixed, W_exp),
    "naive":          Method(H_naive, None,                    joint,   fixed, W_exp),
    "reward_forcing": Method(H_rf,    None,                    joint,   fixed, W_one),
}

def method(name, s=0.5, tau=1.0, lam=0.0, lam_d=0.01, fade=10_000, unit_w=False):
    """A row of METHODS with its hyper-parameters; dmd2, dmdr want lam > 0, tau < 1 wants unit_w. ValueError: ranges."""
    if name not in METHODS or not (tau > 0 and fade > 0 and lam >= 0 and lam_d >= 0):
        raise ValueError(f"method {name!r}, tau {tau}, fade {fade}, lam {lam}, lam_d {lam_d}: choose a method of "
                         f"{', '.join(METHODS)}, tau and fade above 0, lam and lam_d at least 0")
    dsa(0, s)
    row = METHODS[name]
    return row._replace(H=partial(row.H, s=s) if row.H in (H_amd, H_naive) else row.H,
                        phi=row.phi if row.phi is fixed else partial(row.phi, over=fade),
                        W=row.W if row.W is W_one else partial(row.W, tau=tau), lam=lam, lam_d=lam_d, unit_w=unit_w)

@torch.no_grad()
def blend(net, real, fake, r):
    """Set net, a third module of their kind, to theta_real + r (theta_fake - theta_real): phi of magic and dmdr.
    In place: under FSDP2 a functional_call with other weights would silently run the module's own."""
    for p, p_real, p_fake in zip(net.parameters(), real.parameters(), fake.parameters(), strict=True):
        p.copy_(p_real + r * (p_fake - p_real))  # not lerp, they may differ in dtype

# --------------------------------------------------------------------------- 7. gradient and losses (Eq. 1-4, 6 and 14)
def gradient(method, draw, real, fake, *, null=None, w=1.0, schedule=flow, normalize=True, closure=None):
    """Eq. 6 -> g (B, ...) outside the graph, its Displacements. closure: what F_ext calls.
    H_std is V_DMD's gradient at x (Eq. 4), for that of the KL (Eq. 1, 2). normalize divides H by each sample's mean
    |d_real| (DMD Eq. 8), which Eq. 13 does not weigh."""
    x, c, two = draw.x, draw.c, draw.t_ca is not None
    d = displace(x, renoise(x, draw.t, draw.eps, schedule), draw.t, c, null, real, fake, 1 if two else w)
    if two and w != 1:  # D-DMD: DM and CA of two levels, folded into one d
        ca = displace(x, renoise(x, draw.t_ca, draw.eps_ca, schedule), draw.t_ca, c, null, real, None, w)
        d = d._replace(uncond=d.cond - (ca.cond - ca.uncond), w=w)
    g = method.H(d, like(draw.a, x))
    if normalize: g = g / like(per_sample(d.real.abs()).clamp_min(1e-8), x)
    if method.F_ext and method.lam:  # times numel of a sample, for student_loss divides by it
        g = g + method.lam * x[0].numel() * force(lambda x: method.F_ext[1](x, draw, closure, schedule), x)
    return g.detach(), d

def student_loss(x, g):
    """Eq. 3 as a regression to x - g, both (B, ...): the gradient at x is g / numel."""
    return 0.5 * F.mse_loss(x, (x - g).detach())

def fake_loss(draw, fake, schedule=flow, space="flow"):
    """Eq. 14: mean of W(a) times a sample's mean square error, counted in space x0, eps or flow (velocity)."""
    alpha, sigma = schedule(draw.t)
    x0_hat = fake(renoise(draw.x, draw.t, draw.eps, schedule), draw.t, draw.c)
    error = per_sample((expect(x0_hat, draw.x.shape, "fake") - draw.x) ** 2)
    weight = dict(x0=torch.ones_like(sigma), eps=(alpha / sigma) ** 2, flow=1 / sigma**2)[space]
    return (draw.weight * weight * error).mean()  # W once; Alg. 1 l. 18-19 print it twice

def critic_loss(draw, truth, logits, schedule=flow):
    """DMD2's discriminator, softplus(D(student)) + softplus(-D(real)), at the fake update's t and eps, in one call."""
    x_t = [renoise(x, draw.t, draw.eps, schedule) for x in (draw.x, expect(truth(draw.c), draw.x.shape, "truth"))]
    D = logits(torch.cat(x_t), torch.cat([draw.t, draw.t]), pair(draw.c, draw.c))
    D_student, D_real = expect(D, (2 * len(draw.x),), "logits").chunk(2)
    return (F.softplus(D_student) + F.softplus(-D_real)).mean()

# ----------------------------------------------------------------------------------------------------- 8. Algorithm 1
def backward_simulation(denoise, z, c, levels, u=1.0, schedule=flow):
    """Few-step generation from noise z (B, ...) down the levels to an exit (DMD2 Sec. 4.5) -> x (B, ...), its level.
    u in [0, 1) picks the exit, u = 1 the last one: the sampler. Only the exit step carries gradient."""
    if not 1 >= levels[0] >= levels[-1] >= 0: raise ValueError(f"levels {levels}: choose falling levels in [0, 1]")
    k, z = min(int(u * len(levels)), len(levels) - 1), z.to(torch.promote_types(z.dtype, torch.float32))
    t, x_t = [z.new_full((len(z),), level) for level in levels], z
    with torch.no_grad():
        for i in range(k):
            x = denoise(x_t, t[i], c)
            x_t = renoise(x, t[i + 1], torch.randn_like(x), schedule)
    return denoise(x_t, t[k], c), levels[k]

def key(*ints): return random.Random(repr(ints)).getrandbits(60)  # a seed for each draw: no state to save

def rollout(student, c, u, seed, grad):
    """Alg. 1 l. 3, 10 -> x (B, ...), t_G, and noises for DM and CA (B, ...). The same seed repeats them all."""
    torch.manual_seed(seed)
    with torch.set_grad_enabled(grad):
        x, t_G = student(c, u)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, t_G, torch.randn_like(x), torch.randn_like(x)

def sense(method, xs, conds, reward, K):
    """Alg. 1 l. 4-6, 17, over micro-batches and ranks -> (a, W, log), or None if an x anywhere is not finite.
    a, W (N,) are on the CPU, ordered by rank, micro-batch, sample. Gathering the rewards is the one synchronisation."""
    N = sum(map(len, xs)) * ranks()[1]
    if N % K or len({*map(len, xs)}) > 1:
        raise ValueError(f"K = {K} must divide the {N} samples of an update, in equal micro-batches: change K or both")
    if reward is None: return torch.zeros(N), torch.ones(N), {}
    with torch.no_grad():
        r = torch.cat([expect(reward(x, c), (len(x),), "reward") for x, c in zip(xs, conds, strict=True)])
    finite = torch.cat([x.flatten(1).isfinite().all(1) for x in xs])
    r, finite = gather(torch.stack([r, finite.to(r)], 1)).cpu().double().unbind(1)
    if not finite.all(): return None
    a = group_advantage(r, K) if method.senses or K > 1 else torch.zeros_like(r)
    W = method.W(a) / (method.W(a).mean() if method.unit_w else 1)
    return a, W, dict(reward=r.mean(), reward_std=r.view(-1, K).std(1, unbiased=False).mean(),
                      adv_clip=(a.abs() == 1).double().mean(), w_mean=W.mean())

def draw_levels(generator, N, K, t_range, shift):
    """Alg. 1 l. 8, one draw a group -> t, v (N,): t uniform in t_range, warped by shift, clamped; v in [0, 1)."""
    t, v = torch.rand(2, N // K, generator=generator, dtype=torch.float64).repeat_interleave(K, 1)
    t = t_range[0] + (t_range[1] - t_range[0]) * t
    return (shift * t / (1 + (shift - 1) * t)).clamp(*t_range), v

def params(opt): return [p for group in opt.param_groups for p in group["params"]]
def backward(loss, accum):  # a loss that is not finite makes all gradients NaN, for `update` to see on every rank
    (loss * (1 + 0 * loss.detach()) / accum).backward()
    return loss.detach()

def update(opts, clip=10.0):
    """Alg. 1 l. 21-22: average plain gradients over ranks (FSDP2's are averaged), clip each optimizer's norm, step.
    -> norms (len(opts),) before clipping, on the CPU: one synchronisation. If one is not finite, none steps."""
    grads = [[p.grad for p in params(opt) if p.grad is not None] for opt in opts]
    plain = [g for gs in grads for g in gs if not isinstance(g, DTensor)]
    if ranks()[1] > 1 and plain:
        flat = torch.cat([g.flatten() for g in plain]) / ranks()[1]
        dist.all_reduce(flat)
        torch._foreach_copy_(plain, [*map(torch.Tensor.view_as, flat.split([g.numel() for g in plain]), plain)])
    norms = [torch.nn.utils.get_total_norm(gs) for gs in grads]
    norms = torch.stack([v.full_tensor() if isinstance(v, DTensor) else v for v in norms]).cpu()
    for opt, gs, norm in zip(opts, grads, norms.tolist(), strict=True):
        if norms.isfinite().all():
            torch._foreach_mul_(gs, min(1.0, clip / (norm + 1e-6)))
            opt.step()
    return norms

SPACES = ("x0", "eps", "flow")
LOGGED = "g_norm dm_norm ca_norm loss_student loss_fake reward reward_std adv_clip w_mean".split()

def train(method, student, real, fake, batch, opt_student, opt_fake, *, reward=None, K=8, null=None, w=1.0,
          schedule=flow, space="flow", t_range=(0.02, 0.98), shift=1.0, normalize=True, truth=None, logits=None,
          adapt=None, fake_steps=5, accum=1, update=partial(update, clip=10.0), seed=0, start=0) -> Iterator[dict]:
    """Alg. 1 as an endless generator: a dict to log for each student update, which is fake_steps iterations.

    An iteration rolls out and rewards a fresh batch and updates the fake; the first also updates the student, on the
    same x, t, eps. No state lives here but `start`, the updates done: torch's generator is reseeded for each rollout.

    batch(n, j) -> c            condition of micro-batch j of iteration n, a pure function; global order is rank,
                                micro-batch, sample, and K adjacent samples are a group
    student(c, u) -> x, t_G     the whole generation; u in [0, 1) picks its exit step, alike on all ranks (FSDP2 hangs
                                if they make other numbers of calls); t_G, float or (B,), is the exit's input level
    real, fake                  Denoisers
    reward(x, c) -> (B,)        None will do where neither H nor W reads it; dmdr takes its gradient
    null(c) -> c                the empty condition, for w != 1
    truth(c) -> (B, ...)        dmd at lam > 0: what c's own noise should become; dmd2: real samples
    logits(x_t, t, c) -> (B,)   dmd2: discriminator on the fake's features, trained by opt_fake
    adapt(r) -> Denoiser        magic, dmdr: the real teacher with weights moved by r (`blend`)

    accum > 1 rolls the student out twice under one seed, without and with graph. A non-finite x, loss or gradient skips
    the iteration on all ranks, ten in a row raise FloatingPointError. ValueError: closures, K, shapes, ranges, rewards.
    """
    if not 0 <= t_range[0] < t_range[1] <= 1 or min(shift, K, accum, fake_steps) <= 0 or space not in SPACES:
        raise ValueError(f"choose t_range in [0, 1], shift, K, accum, fake_steps above 0, space out of {SPACES}")
    closure = check(method, w, reward=reward, null=null, adapt=adapt, truth=truth, logits=logits)
    (rank, _), step, skipped, failures = ranks(), start, 0, 0
    opt_student.zero_grad(); opt_fake.zero_grad()
    while True:
        r, rows = method.phi(step), []
        teacher = adapt(r) if r > 0 else real
        for i in range(fake_steps):
            n, opts, norms = step * fake_steps + i, [opt_student, opt_fake][i > 0 :], torch.tensor(nan)
            shared = torch.Generator().manual_seed(key(seed, n))  # for what all ranks share
            u = torch.rand((), generator=shared).item()
            conds, rolled, x = [batch(n, j) for j in range(accum)], None, None  # frees a skipped update's graph
            roll = [partial(rollout, student, c, u, key(seed, n, j, rank)) for j, c in enumerate(conds)]
            rolled = [f(grad=i == 0 and accum == 1) for f in roll]  # l. 3
            if sensed := sense(method, [x.detach() for x, *_ in rolled], conds, reward, K):  # l. 4-6, 17
                a, W, log = sensed
                t, v = draw_levels(shared, len(a), K, t_range, shift)  # l. 8
                for j, (x, t_G, eps, eps_ca) in enumerate(rolled):
                    mine = slice((rank * accum + j) * len(x), (rank * accum + j + 1) * len(x))
                    t_j, v_j, a_j, W_j = (value[mine].to(x, non_blocking=True) for value in (t, v, a, W))
                    draw = Draw(conds[j], x.detach(), eps, a_j, W_j, *method.t(t_j, v_j, t_G), eps_ca)
                    rows.append(row := dict(log))
                    if i == 0:  # l. 12-16
                        g, d = gradient(method, draw, teacher, fake, null=null, w=w, schedule=schedule,
                                        normalize=normalize, closure=closure)
                        x = x if accum == 1 else roll[j](grad=True)[0]
                        row |= dict(g_norm=rms(g), dm_norm=rms(d.dm), ca_norm=rms(d.ca))
                        row["loss_student"] = backward(student_loss(x, g), accum)
                    loss = fake_loss(draw, fake, schedule, space)  # l. 17-19
                    row["loss_fake"] = loss.detach()
                    if closure is not None and closure is logits:
                        loss = loss + method.lam_d * critic_loss(draw, truth, logits, schedule)
                    backward(loss, accum)
                norms = update(opts)  # l. 21-22
            for opt in opts: opt.zero_grad()
            failures = 0 if norms.isfinite().all() else failures + 1
            skipped += failures > 0
            if failures == 10:
                raise FloatingPointError(f"step {step}: ten updates in a row were not finite, lower the learning rates")
        step += 1
        values = {k: [row[k] for row in rows if k in row] or [nan] for k in LOGGED}
        means = {k: sum(v) / len(v) for k, v in values.items()}
        yield dict(step=step, fake_step=step * fake_steps, **means, skipped=skipped)

def check(method, w, **given):
    """ValueError for a closure that `train` would miss later -> the one that F_ext calls, or None."""
    F_ext = method.F_ext[0] if method.F_ext and method.lam else None
    needs = dict(reward=method.senses, null=w != 1, adapt=method.phi is not fixed, truth=F_ext == "logits")
    for k in given:
        if given[k] is None and (needs.get(k) or k == F_ext):
            raise ValueError(f"this method, at its lam and w, calls {k}: pass {k}=")
    return given.get(F_ext)

# ================================================================================================ Part II: running it
def ranks():  # (rank, world size); (0, 1) without a process group
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

def launch():
    """Join torchrun's process group, where its environment is set -> this process's device."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda": torch.cuda.set_device(device)
    if "RANK" in os.environ: dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device

def gather(v):
    """v (b, ...) of every rank, of one shape -> (world * b, ...) in rank order."""
    if ranks()[1] == 1: return v
    out = [torch.empty_like(v, memory_format=torch.contiguous_format) for _ in range(ranks()[1])]
    dist.all_gather(out, v.contiguous())
    return torch.cat(out)

def shard(net, blocks=(), dtype=torch.bfloat16):
    """Rank 0's weights for all, then FSDP2 over blocks and the rest of net -> net; as it is on one process.
    Compute in dtype (None: as stored), reduce in float32. Inputs are not cast, t must not become bf16: let the closure
    autocast. Never toggle requires_grad later (pytorch#186998). What is not sharded must begin alike on all ranks."""
    if ranks()[1] > 1:
        for v in [*net.parameters(), *net.buffers()]: dist.broadcast(v.data, 0)
        policy = MixedPrecisionPolicy(dtype, dtype and torch.float32, cast_forward_inputs=False)
        for module in [*blocks, net]:  # the root reshards too, else weights read after a no-grad rollout are whole bf16
            fully_shard(module, mp_policy=policy, reshard_after_forward=True)
    return net

class EMA:
    """Running average decay * average + (1 - decay) * weights of what net trains, sharded as it is; decay in [0, 1)."""
    def __init__(self, net, decay):
        self.decay, self.weights = decay, {k: p for k, p in net.named_parameters() if p.requires_grad}
        self.shadow = {k: p.detach().clone() for k, p in self.weights.items()}
    @torch.no_grad()
    def update(self):
        torch._foreach_lerp_([*self.shadow.values()], [*self.weights.values()], 1 - self.decay)
    @torch.no_grad()
    def swap(self):
        """Exchange weights and average: once to sample from the average or save it, once more to train on."""
        for p, v in zip(self.weights.values(), self.shadow.values(), strict=True):
            kept = p.clone(); p.copy_(v); v.copy_(kept)

def write(path, text):  # whole or not at all
    (beside := path.with_suffix(".unfinished")).write_text(text)
    beside.replace(path)

def open_run(out, config, resume=False):
    """Make folder out with config.json {config, torch, git}, or find it with the same config to resume -> Path.
    ValueError: a run is there and not to be resumed, or of another config. OSError: out cannot be written."""
    path, config = Path(out) / "config.json", json.loads(json.dumps(config, default=str))
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["config"] if path.exists() else None
    gather(torch.zeros(1))  # every rank looks before rank 0 writes
    if old is None and ranks()[0] == 0:
        git = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
        write(path, json.dumps(dict(config=config, torch=torch.__version__, git=git), indent=2))
    if old is not None and not (resume and old == config):
        differ = [f"{k} {old.get(k)} -> {config.get(k)}" for k in old | config if old.get(k) != config.get(k)]
        raise ValueError(f"{out} holds a run: resume it as it was, or choose another folder {', '.join(differ)}")
    return path.parent

def tensors(parts):
    """{name: (net, optimizer, EMA or None)} -> {key: value}: trained weights, buffers, averages, optimizer states."""
    flat = {}
    for name, (net, opt, ema) in parts.items():
        trained = {k: v for k, v in net.state_dict(keep_vars=True).items() if v.requires_grad or type(v) is Tensor}
        moments = {f"{i}.{k}": v for i, p in enumerate(params(opt)) for k, v in opt.state.get(p, {}).items()}
        for kind, values in dict(net=trained, ema=ema.shadow if ema else {}, opt=moments).items():
            flat |= {f"{name}.{kind}.{k}": v for k, v in values.items()}
    return flat

def save(out, step, **parts):
    """Write out/checkpoints/step_N of parts (see `tensors`), beside it, then renamed: whole, or not at all: OSError."""
    path, new = (Path(out) / f"checkpoints/{name}_{step}" for name in ("step", "unfinished"))
    try: dcp.save(tensors(parts), checkpoint_id=new)
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        raise OSError(f"{new} cannot be written ({str(error).splitlines()[-1]:.99}): make room, then resume") from error
    if ranks()[0] == 0: shutil.rmtree(path, ignore_errors=True), new.rename(path)

def load(out, **parts):
    """Fill parts from the newest checkpoint of out, on any number of ranks -> its step, 0 if there is none.
    ValueError if it is damaged or of other networks. Resume only what your own runs wrote: its metadata is a pickle."""
    path = max(Path(out).glob("checkpoints/step_*[0-9]"), key=lambda path: int(path.name[5:]), default=None)
    if path is None: return 0
    for _, opt, _ in parts.values():  # a step makes a fresh optimizer's state; the load overwrites what it does
        for p in params(opt): p.grad = torch.zeros_like(p)
        opt.step(); opt.zero_grad()
    state = tensors(parts)
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.keys()
        if odd := {k for k in state.keys() ^ saved if k in saved or ".opt." not in k}:  # no gradient, no saved state
            raise KeyError(f"see {min(odd)}")
        dcp.load(state := {k: state[k] for k in saved}, checkpoint_id=path)  # in place
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        raise ValueError(f"{path} is damaged or of other networks ({str(error).splitlines()[0]:.80}): remove it to "
                         "resume from the one before, or choose another folder") from error
    for name, (_, opt, _) in parts.items():
        for i, p in enumerate(params(opt)):
            opt.state[p] = {k: state[key] for k in opt.state[p] if (key := f"{name}.opt.{i}.{k}") in saved}
    return int(path.name[5:])

class Log:
    """Appends to out/log.jsonl; drops the rows after step `start`, which a resumed run writes again."""
    def __init__(self, out, batch, start=0):
        self.path, self.batch, self.step, self.time = Path(out) / "log.jsonl", batch, start, time.perf_counter()
        rows = self.path.read_text().splitlines(True) if self.path.exists() else []
        if ranks()[0] == 0:
            write(self.path, "".join(row for row in rows if row[-1] == "\n" and json.loads(row)["step"] <= start))
    def __call__(self, log):
        """A dict of `train`, on all ranks -> the row: its means over ranks, sec a step, samples_per_s, peak mem_gib."""
        sec = (time.perf_counter() - self.time) / (log["step"] - self.step)
        self.step, self.time = log["step"], time.perf_counter()
        means = gather(torch.tensor([[float(v) for v in log.values()]], dtype=torch.float64)).mean(0).tolist()
        row = {k: int(v) if isinstance(log[k], int) else v for k, v in zip(log, means, strict=True)}
        row |= dict(sec=sec, samples_per_s=self.batch / sec)
        row["mem_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else nan
        if ranks()[0] == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n")
        return row
