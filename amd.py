"""Adaptive Matching Distillation (AMD, arXiv 2602.07345) in one file: copy it, or import it.

A slow diffusion teacher is distilled into a student that generates in a few steps. The student's
sample x is renoised, two teachers guess the clean sample again, and x moves down

    g = H(d_real, d_fake) + lam F_ext,    d = x - x0_hat.                                 (Eq. 6)

The real teacher is frozen; its displacement d_real attracts x. The fake teacher is trained on the
student's own samples; its displacement d_fake repels x. AMD finds failed samples by a reward, which
it compares within a group of K samples of one condition (Eq. 12). Then it
    - shifts the balance of the two terms of H sample by sample, which is Dynamic Score Adaptation
      (Eq. 10 and 13),
    - has the fake teacher study failures harder, which is Repulsive Landscape Sharpening (Eq. 14).
The table METHODS, the paper's Table 1 and two rows more, writes DMD, DMD2, DMDR ... the same way.

    x       the student's sample (B, ...)           t     noise level in [0, 1]: 0 clean, 1 noise
    x_t     F_t(x) = alpha x + sigma eps            t_G   noise level of the student's input
    x0_hat  a teacher's guess of the clean sample   c     condition (tensors with leading B)
    r, a    reward, group advantage in [-1, 1]      w     CFG scale omega, 1 = no guidance
    W(a)    weight in the fake teacher's loss       s     sensitivity in [0, 1], 0 = no adaptation
    u       draw in [0, 1) that picks the exit,     tau   temperature of W(a) = exp(-a / tau)
            the step at which the student stops

Usage with flow-matching networks, teacher(x_t, t, c) -> noise - data, and two copies of it:

    real, fake, G = map(amd.x0_from_flow, (teacher, fake_net, student_net))
    generate = lambda c, u: amd.backward_simulation(G, torch.randn(len(c), 2), c, [1.0], u)
    batch = lambda n, j: torch.arange(8).repeat_interleave(8)  # 8 conditions, K = 8 samples of each
    logs = amd.train(amd.method("amd"), generate, real, fake, batch, opt_student, opt_fake,
                     reward=reward, K=8)  # reward(x, c) -> (B,)
    for log in logs:  # endless: you log, save and stop

Usage with a DDPM, which predicts noise at time steps: pass one schedule to every call.

    schedule = amd.vp(scheduler.alphas_cumprod)

    def denoiser(unet):  # here one of diffusers
        return amd.x0_from_eps(lambda x_t, i, c: unet(x_t, i, class_labels=c).sample, schedule)

    levels = [schedule.level(alpha=0.3)]  # with one step, begin where the input has some signal
    generate = lambda c, u: amd.backward_simulation(G, z(c), c, levels, u, schedule)
    t_range = (0.02, min(0.98, schedule.level(alpha=0.05)))
    logs = amd.train(..., schedule=schedule, space="eps", t_range=t_range)
"""

import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import cos, pi
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Condition = Any  # a tensor (B, ...), or a tuple, list, named tuple, dict or dataclass of conditions
Network = Callable[[Tensor, Tensor, Condition], Tensor]
Denoiser = Network  # x_t (B, ...), t (B,), c -> x0_hat (B, ...), in float32, or float64 if x_t is
Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]  # t (B,) -> alpha (B,), sigma (B,)


# ----------------------------------------------------------------- 1. forward operator F_t (Sec. 2)
def like(v: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), which broadcasts against x (B, ...)."""
    return v.view(-1, *[1] * (x.ndim - 1))


def per_sample(v: Tensor) -> Tensor:
    """Mean over all dimensions but the first: (B, ...) -> (B,)."""
    return v.flatten(1).mean(1)


def flow(t: Tensor) -> tuple[Tensor, Tensor]:
    """The Schedule of flow matching: a straight line from data to noise."""
    return 1 - t, t


def shifted(t: float | Tensor, shift: float) -> float | Tensor:
    """Levels of flow in [0, 1], where sigma / alpha is shift times as large, as video has it."""
    return shift * t / (1 + (shift - 1) * t)


class vp:
    """The Schedule of a DDPM with alphas_cumprod (N,): level t is the time step i nearest to t N.

    ValueError: alphas_cumprod does not fall from about 1 to about 0.
    """

    def __init__(self, alphas_cumprod: Tensor):
        abar = torch.as_tensor(alphas_cumprod).detach().cpu()
        if not (abar.ndim == 1 and 1 >= abar[0] > 0.5 > abar[-1] >= 0 and (abar.diff() <= 0).all()):
            raise ValueError("vp takes alphas_cumprod (N,), which fall from about 1 to about 0")
        self.alphas_cumprod = abar

    def level(self, alpha: float) -> float:
        """The highest level at which the schedule's alpha is still at least this one.

        A guess x0 = (x_t - sigma eps) / alpha multiplies the network's error by sigma / alpha.
        """
        return (self.alphas_cumprod.sqrt() >= alpha).nonzero().max().item() / len(
            self.alphas_cumprod
        )

    def index(self, t: Tensor) -> Tensor:
        """Levels (B,) -> the DDPM's own time steps (B,), 0 to N - 1."""
        N = len(self.alphas_cumprod)
        i = (t * N).round()  # truncation can be off by one
        return i.clamp(0, N - 1).long()

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod.to(t, non_blocking=True)[self.index(t)]
        return abar.sqrt(), (1 - abar).sqrt()


def renoise(x: Tensor, t: Tensor, eps: Tensor, schedule: Schedule = flow) -> Tensor:
    """F_t(x) = alpha x + sigma eps (Alg. 1 l. 11): x, eps (B, ...), t (B,) -> x_t (B, ...)."""
    alpha, sigma = schedule(t)
    return like(alpha, x) * x + like(sigma, x) * eps


def x0_from_flow(net: Network) -> Denoiser:
    """Denoiser of a velocity network: net(x_t, t, c) -> eps - x (B, ...), with t in [0, 1].

    A network that counts t the other way, 0 for noise, wants 1 - t and a minus sign.
    """

    def denoise(x_t, t, c):
        return x_t - like(t, x_t) * net(x_t, t, c).to(x_t.dtype)

    denoise.schedule = flow
    return denoise


def x0_from_eps(net: Network, schedule: Schedule) -> Denoiser:
    """Denoiser, where alpha > 0, of a noise network: net(x_t, i, c) -> eps (B, ...).

    i (B,) is the DDPM's own time step if the schedule is `vp`, else it is t in [0, 1].
    """

    def denoise(x_t, t, c):
        alpha, sigma = schedule(t)
        i = schedule.index(t) if isinstance(schedule, vp) else t
        return (x_t - like(sigma, x_t) * net(x_t, i, c).to(x_t.dtype)) / like(alpha, x_t)

    denoise.schedule = schedule
    return denoise


def same_schedule(denoise: Denoiser, schedule: Schedule, what: str) -> None:
    """ValueError if a Denoiser was made for another schedule, which it would follow in silence."""
    if getattr(denoise, "schedule", schedule) is not schedule:
        raise ValueError(f"{what} was made for another schedule: pass it on as schedule=")


# --------------------------------------------------------------------- 2. displacements (Sec. 3.1)
class Displacements(NamedTuple):
    """d = x - x0_hat (below Eq. 6) for each guess of a teacher, (B, ...)."""

    cond: Tensor  # d_real^cond
    uncond: Tensor  # d_real^uncond
    fake: Tensor | None  # d_fake
    w: float  # omega

    @property
    def real(self) -> Tensor:
        """d_real under CFG (above Eq. 9)."""
        return self.uncond + self.w * (self.cond - self.uncond)

    @property
    def dm(self) -> Tensor:
        """Distribution matching (Eq. 9): anchors x to the data."""
        return self.cond - self.fake

    @property
    def ca(self) -> Tensor:
        """CFG augmentation (Eq. 9): pushes x towards its condition."""
        return (self.w - 1) * (self.cond - self.uncond)


def expect(v: Tensor, shape: Sequence[int], what: str) -> Tensor:
    """v if it has the shape, else ValueError: a silent broadcast would train on the wrong thing."""
    if v.shape != tuple(shape):
        raise ValueError(f"{what} returned shape {tuple(v.shape)}: make it {tuple(shape)}")
    return v


def pair(a: Condition, b: Condition) -> Condition:
    """Two conditions as one of twice the batch; leaves that are no tensors pass through.

    ValueError: a and b differ in structure, or in a leaf that is no tensor.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.cat([a, b])
    if type(a) is not type(b):
        names = f"a {type(a).__name__} a {type(b).__name__}"
        raise ValueError(f"null(c) makes {names}: keep c's structure")
    if isinstance(a, dict):
        if a.keys() != b.keys():
            raise ValueError(f"null(c) has the keys {[*b]}, c has {[*a]}: keep c's structure")
        return {k: pair(a[k], b[k]) for k in a}
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return dataclasses.replace(a, **{k: pair(getattr(a, k), getattr(b, k)) for k in names})
    if isinstance(a, tuple | list):
        if len(a) != len(b):
            raise ValueError(f"null(c) has {len(b)} parts, c has {len(a)}: keep c's structure")
        parts = map(pair, a, b)
        return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)
    if a is not b and a != b:
        raise ValueError(f"null(c) changes {a} to {b}: put tensors with leading B into c instead")
    return a


@torch.no_grad()
def displace(
    x: Tensor,
    x_t: Tensor,
    t: Tensor,
    c: Condition,
    null: Callable[[Condition], Condition] | None,
    real: Denoiser,
    x0_fake: Tensor | None,
    w: float,
) -> Displacements:
    """Alg. 1 l. 12-13: ask the real teacher at x_t (B, ...), t (B,); compare both guesses with x.

    One call of real serves c and null(c), or c alone if w = 1. x0_fake (B, ...) is the fake's guess
    at x_t, which is asked by the caller because the fake's own loss needs it too; or None.
    ValueError: a guess that has not the shape of x.
    """
    if w == 1:
        cond = uncond = expect(real(x_t, t, c), x.shape, "real")
    else:
        both = real(torch.cat([x_t, x_t]), torch.cat([t, t]), pair(c, null(c)))
        cond, uncond = expect(both, (2 * len(x), *x.shape[1:]), "real").chunk(2)
    d_fake = None if x0_fake is None else x - expect(x0_fake, x.shape, "fake")
    return Displacements(x - cond, x - uncond, d_fake, w)


# ------------------------------------------------------ 3. the operator H (Sec. 3.2, Table 1 row 1)
# Displacements d, and advantages a that broadcast against them -> (B, ...).
def H_std(d: Displacements, _a: Tensor) -> Tensor:
    """Eq. 7, the DMD family; equals d.dm + d.ca by Eq. 9."""
    return d.real - d.fake


def H_naive(d: Displacements, a: Tensor, s: float = 0.5) -> Tensor:
    """Eq. 8, the paper's strawman. ValueError: s outside [0, 1].

    It equals H_amd + 2 s a d.cond, and that term does not vanish where p_student = p_real.
    """
    alpha, beta = dsa(a, s)
    return alpha * d.real - beta * d.fake


def H_amd(d: Displacements, a: Tensor, s: float = 0.5) -> Tensor:
    """Eq. 10, Dynamic Score Adaptation. ValueError: s outside [0, 1].

    Failures (a < 0) follow DM back to the data, successes (a > 0) follow CA to their condition. At
    w = 1 there is no CA, and s only scales steps.
    """
    alpha, beta = dsa(a, s)
    return beta * d.dm + alpha * d.ca


def H_rf(d: Displacements, a: Tensor) -> Tensor:
    """Reward Forcing (arXiv 2512.04678): Eq. 7 times exp(2 a).

    The original's score is not compared within groups.
    """
    return (2 * a).exp() * H_std(d, a)


def dsa(a: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Eq. 13: advantages -> alpha, beta, both at least 0. ValueError: s outside [0, 1]."""
    if not 0 <= s <= 1:
        raise ValueError(f"s = {s} can turn alpha or beta negative: choose s in [0, 1]")
    return 1 + s * a, 1 - s * a


# ------------------------------------------------------------- 4. reward sensing (Sec. 3.2 and 3.3)
def group_advantage(r: Tensor, K: int, eps: float = 1e-6) -> Tensor:
    """Eq. 12: rewards (B,), where K adjacent ones are a group -> advantages (B,) in [-1, 1].

    A low advantage stands for the Forbidden Zone (Eq. 5), as far as high reward implies low energy
    (Eq. 11). Equal rewards have exactly 0. ValueError: K < 2, B % K, a reward that is NaN or inf.
    """
    if K < 2 or r.ndim != 1 or len(r) % K:
        raise ValueError(
            f"rewards {tuple(r.shape)} in groups of K = {K}: choose K >= 2 that divides the batch"
        )
    # in double: where rewards are close, float32 would round their mean by a part of the std
    grouped = r.detach().cpu().double().view(-1, K)
    if not grouped.isfinite().all():
        raise ValueError("a reward is NaN or inf: mend the reward")
    mean, std = grouped.mean(1, keepdim=True), grouped.std(1, keepdim=True, unbiased=False)
    equal = std <= 1e-6 * mean.abs().clamp_min(1)
    a = ((grouped - mean) / (std + eps)).clamp(-1, 1).masked_fill(equal, 0)
    return a.flatten().to(r.device, torch.promote_types(r.dtype, torch.float32))


def W_one(a: Tensor) -> Tensor:
    """No weight: the plain loss of a diffusion model."""
    return torch.ones_like(a)


def W_exp(a: Tensor, tau: float = 1.0) -> Tensor:
    """Repulsive Landscape Sharpening (below Eq. 14): failures count more.

    The fake overestimates how frequent they are, and so pushes x away from them: it models
    p_student W(a). The paper prints exp(-a), which is tau = 1; the temperature is ours, and tau =
    inf turns sharpening off. ValueError: tau <= 0.
    """
    if not tau > 0:
        raise ValueError(f"tau = {tau}: choose tau above 0")
    return (-a / tau).exp()


# ------------------------------------------- 5. external forces, as energies to descend (Eq. 25-28)
class Draw(NamedTuple):
    """A micro-batch of Algorithm 1, outside every graph.

    Losses, external forces and the caller's `probe` are given it.
    """

    c: Condition
    x: Tensor  # the student's sample (B, ...)
    t_G: float | Tensor  # noise level of the input from which it was made, a float or (B,)
    a: Tensor  # advantage (B,)
    weight: Tensor  # W(a) (B,)
    t: Tensor  # (B,), alike within a group
    eps: Tensor  # (B, ...)
    x_t: Tensor  # F_t(x) (B, ...)


# F_ext is the gradient at x of an energy: x, draw, a closure of the caller's, schedule -> (B,).
def regression(x: Tensor, draw: Draw, truth: Callable, _schedule: Schedule) -> Tensor:
    """DMD, Eq. 26: truth(c) (B, ...) is what x should become."""
    return 0.5 * per_sample((x - expect(truth(draw.c), x.shape, "truth")) ** 2)


def adversarial(x: Tensor, draw: Draw, logits: Denoiser, schedule: Schedule) -> Tensor:
    """DMD2, Eq. 27: -log sigmoid of a discriminator, logits(x_t, t, c) (B,)."""
    x_t = renoise(x, draw.t, draw.eps, schedule)
    return F.softplus(-expect(logits(x_t, draw.t, draw.c), (len(x),), "logits"))


def ascent(x: Tensor, draw: Draw, reward: Callable, _schedule: Schedule) -> Tensor:
    """DMDR, Eq. 28: a differentiable reward(x, c) (B,)."""
    return -expect(reward(x, draw.c), (len(x),), "reward")


def force(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of a per-sample energy (B,) at x (B, ...), outside the graph.

    It leaves the .grad of every parameter alone.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x)[0]


# -------------------------------------------------------------------------------------- 6. Table 1
# F_t: where the teachers are asked. draw, real, x0_fake, null, w, schedule -> Displacements.
def joint(
    draw: Draw,
    real: Denoiser,
    x0_fake: Tensor,
    null: Callable | None,
    w: float,
    _schedule: Schedule,
) -> Displacements:
    """All teachers see one x_t (Alg. 1 l. 12-13)."""
    return displace(draw.x, draw.x_t, draw.t, draw.c, null, real, x0_fake, w)


def decoupled(
    draw: Draw,
    real: Denoiser,
    x0_fake: Tensor,
    null: Callable | None,
    w: float,
    schedule: Schedule,
    noisier: bool = False,
) -> Displacements:
    """D-DMD (its Eq. 8): each sample has another noise and level for CA, below t_G.

    d.uncond is set so that d.ca is that term. noisier takes a level above t_G, as Prop. C.1 of the
    AMD paper reads it.
    """
    dm = displace(draw.x, draw.x_t, draw.t, draw.c, null, real, x0_fake, 1)
    if w == 1:
        return dm
    v = torch.rand_like(draw.t)
    t = draw.t_G + v * (1 - draw.t_G) if noisier else v * draw.t_G
    x_t = renoise(draw.x, t, torch.randn_like(draw.x), schedule)
    ca = displace(draw.x, x_t, t, draw.c, null, real, None, w)
    return dm._replace(uncond=dm.cond - (ca.cond - ca.uncond), w=w)


# phi: student updates done -> r in [0, 1], how far the real teacher's weights move to the fake's.
def fixed(_step: int) -> float:
    """The real teacher stays as it is."""
    return 0.0


def faded(step: int, fade: int = 10_000) -> float:
    """DMDR's half cosine, from .375 to 0 at update `fade`, and 0 from there on.

    Choose it so that the real teacher is itself again well before the end. ValueError: fade <= 0.
    """
    if not fade > 0:
        raise ValueError(f"fade = {fade}: choose fade above 0")
    return 0.375 * (1 + cos(pi * min(step / fade, 1))) / 2


class Method(NamedTuple):
    """A row of METHODS: a column of Table 1, with its symbols, or one of two more.

    H, F_t, phi and W may have hyper-parameters: arguments with a default, which `method` binds.
    """

    H: Callable  # d, a -> (B, ...)
    F_ext: tuple[str, Callable] | None  # closure of `train` by name, energy that calls it
    F_t: Callable  # draw, real, x0_fake, null, w, schedule -> Displacements
    phi: Callable  # student updates done -> r
    W: Callable  # a -> weight of a sample in the fake's loss
    lam: float = 0.0  # weight of F_ext
    lam_d: float = 0.01  # weight of DMD2's critic_loss beside the fake's loss
    unit_w: bool = False  # divide W by its mean over the batch

    @property
    def senses(self) -> bool:
        """Does H or W read the advantage? All do, but for H_std and W_one."""
        return self.H is not H_std or self.W is not W_one

    @property
    def calls(self) -> str | None:
        """The closure that F_ext calls; None without a force, as at lam = 0."""
        return self.F_ext[0] if self.F_ext and self.lam else None


# fmt: off
METHODS = {                # H        F_ext                    F_t        phi    W (psi)
    "dmd":            Method(H_std,   ("truth", regression),   joint,     fixed, W_one),
    "dmd2":           Method(H_std,   ("logits", adversarial), joint,     fixed, W_one),
    "ddmd":           Method(H_std,   None,                    decoupled, fixed, W_one),
    "magic":          Method(H_std,   None,                    joint,     faded, W_one),
    "dmdr":           Method(H_std,   ("reward", ascent),      joint,     faded, W_one),
    "amd":            Method(H_amd,   None,                    joint,     fixed, W_exp),
    "naive":          Method(H_naive, None,                    joint,     fixed, W_exp),
    "reward_forcing": Method(H_rf,    None,                    joint,     fixed, W_one),
}
# fmt: on


def method(
    name: str,
    *,
    lam: float | None = None,
    lam_d: float | None = None,
    unit_w: bool | None = None,
    **hyper: float,
) -> Method:
    """A row of METHODS with other hyper-parameters: lam, lam_d, unit_w, and those of its functions.

    These are s (H_amd, H_naive), tau (W_exp), fade (faded), noisier (decoupled). A function takes
    those that its signature names, and keeps its default for one that is not given. One that only
    other rows have is ignored, so that one call serves all rows; a new row needs no edit elsewhere:

        def H_mine(d, a, push=2.0): ...
        METHODS["mine"] = METHODS["amd"]._replace(H=H_mine)
        method("mine", push=3.0, tau=0.5)

    dmd, dmd2 and dmdr have no external force unless lam > 0, and tau < 1 wants unit_w. ValueError:
    an unknown name, a parameter that no row has, or one out of range.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r}: choose one of {', '.join(METHODS)}")
    parts = ("H", "F_t", "phi", "W")
    known = {
        k for row in METHODS.values() for part in parts for k in parameters(getattr(row, part))
    }
    if unknown := hyper.keys() - known:
        raise ValueError(
            f"no method has {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}"
        )
    row = METHODS[name]
    row = row._replace(**{part: bind(getattr(row, part), hyper) for part in parts})
    given = dict(lam=lam, lam_d=lam_d, unit_w=unit_w)
    row = row._replace(**{k: v for k, v in given.items() if v is not None})
    if not (row.lam >= 0 and row.lam_d >= 0):
        raise ValueError(f"lam = {row.lam}, lam_d = {row.lam_d}: choose both at least 0")

    zero = torch.zeros(1, 1)  # call each once: a value out of range ends here, not in training
    row.H(Displacements(zero, zero, zero, 1.0), zero)
    row.phi(0)
    if not row.W(torch.tensor([-1.0, 1.0]).double()).isfinite().all():
        raise ValueError("W of the advantages -1 and 1 is not finite: choose a larger tau")
    return row


def parameters(f: Callable) -> list[str]:
    """The hyper-parameters of f: its arguments that have a default."""
    try:
        arguments = inspect.signature(f).parameters.values()
    except ValueError:  # some builtins tell no signature
        return []
    return [p.name for p in arguments if p.default is not p.empty]


def bind(f: Callable, hyper: dict) -> Callable:
    """f with those of its hyper-parameters that are given."""
    own = {k: hyper[k] for k in parameters(f) if k in hyper}
    return partial(f, **own) if own else f


@torch.no_grad()
def blend(net: torch.nn.Module, real: torch.nn.Module, fake: torch.nn.Module, r: float) -> None:
    """Set net, a third module of their kind, to theta_real + r (theta_fake - theta_real), for phi.

    In place, because under FSDP2 a functional_call with other weights would run the module's own.
    What the fake alone has, as an embedding of exits, is left out.
    """
    of_real, of_fake = dict(real.named_parameters()), dict(fake.named_parameters())
    for name, p in net.named_parameters():
        p_real, p_fake = of_real[name], of_fake[name]
        p.copy_(p_real + r * (p_fake - p_real))  # not lerp, because they may differ in dtype


# ------------------------------------------------------ 7. gradient and losses (Eq. 1-4, 6 and 14)
def gradient(
    method: Method,
    draw: Draw,
    real: Denoiser,
    x0_fake: Tensor,
    *,
    null: Callable[[Condition], Condition] | None = None,
    w: float = 1.0,
    schedule: Schedule = flow,
    normalize: bool = True,
    closure: Callable | None = None,
) -> tuple[Tensor, Displacements]:
    """Eq. 6 -> g (B, ...) outside the graph, and the displacements that it is made of.

    With H_std, g is the gradient at x of V_DMD (Eq. 4), which stands for that of the KL divergence
    (Eq. 1, 2). x0_fake (B, ...) is the fake's guess at draw.x_t; closure is what F_ext calls.
    normalize divides H by each sample's mean |d_real|, in which alpha and beta have no part, as in
    Eq. 8 of the DMD paper.
    """
    d = method.F_t(draw, real, x0_fake, null, w, schedule)
    g = method.H(d, like(draw.a, draw.x))
    if normalize:
        g = g / like(per_sample(d.real.abs()).clamp_min(1e-8), draw.x)
    if method.calls:
        _, energy = method.F_ext
        F_ext = force(lambda x: energy(x, draw, closure, schedule), draw.x)
        numel = draw.x[0].numel()  # student_loss divides by it, and lam is to weigh the mean energy
        g = g + method.lam * numel * F_ext
    return g.detach(), d


def student_loss(x: Tensor, g: Tensor) -> Tensor:
    """Eq. 3 as a regression of x to x - g, both (B, ...): its gradient at x is g / x.numel()."""
    return 0.5 * F.mse_loss(x, (x - g).detach())


def fake_loss(
    draw: Draw, x0_fake: Tensor, schedule: Schedule = flow, space: str = "flow"
) -> Tensor:
    """Eq. 14: the mean of W(a) times a sample's mean square error, in space x0, eps or flow.

    x0_fake (B, ...) is the fake's guess at draw.x_t. W counts once; Alg. 1 l. 18-19 print it twice.
    """
    alpha, sigma = schedule(draw.t)
    # what turns an error of x0 into that of the noise, or of the velocity
    scale = {"x0": torch.ones_like(sigma), "eps": (alpha / sigma) ** 2, "flow": 1 / sigma**2}
    error = per_sample((expect(x0_fake, draw.x.shape, "fake") - draw.x) ** 2)
    return (draw.weight * scale[space] * error).mean()


def critic_loss(draw: Draw, truth: Callable, logits: Denoiser, schedule: Schedule = flow) -> Tensor:
    """DMD2's discriminator, softplus(D(student)) + softplus(-D(real)), at draw's t and eps."""
    real = expect(truth(draw.c), draw.x.shape, "truth")
    x_t = torch.cat([draw.x_t, renoise(real, draw.t, draw.eps, schedule)])
    D = logits(x_t, torch.cat([draw.t, draw.t]), pair(draw.c, draw.c))
    D_student, D_real = expect(D, (2 * len(real),), "logits").chunk(2)
    return (F.softplus(D_student) + F.softplus(-D_real)).mean()


# ----------------------------------------------------------------------------------- 8. the student
class Exit(NamedTuple):
    """What a student makes of noise and a condition, and the exit at which it stopped."""

    x: Tensor  # (B, ...)
    t_G: float | Tensor  # noise level of the input of the call that made x, a float or (B,)
    again: Callable[[], Tensor] | None = None  # repeats that one call, by itself -> the same x
    number: int = 0  # of the exit, from 1, if the student has several; names its reward in the log


def backward_simulation(
    denoise: Denoiser,
    z: Tensor,
    c: Condition,
    levels: Sequence[float],
    u: float = 1.0,
    schedule: Schedule = flow,
) -> Exit:
    """Generate from noise z (B, ...) down the levels, up to an exit (DMD2 Sec. 4.5).

    Each step guesses x0 and renoises it, with fresh noise, to the next level. u in [0, 1) picks the
    exit, and only its call carries gradient; u = 1, the last exit, makes it the sampler.
    ValueError: levels that do not fall within [0, 1], or begin where a DDPM's noise network cannot
    tell x from noise; a schedule that is not the one of denoise.
    """
    same_schedule(denoise, schedule, "denoise")
    falling = len(levels) > 0 and [*levels] == sorted({*levels}, reverse=True)
    if not (falling and levels[0] <= 1 and levels[-1] >= 0):
        raise ValueError(f"levels {levels}: choose levels that fall within [0, 1]")
    if isinstance(schedule, vp) and levels[0] > schedule.level(alpha=0.05):
        alpha = schedule(torch.tensor(levels[0]))[0].item()
        raise ValueError(
            f"alpha is {alpha:.2g} at level {levels[0]:g}, and x0 = (x_t - sigma eps) / alpha would"
            f" be noise: begin at level {schedule.level(alpha=0.3):g}, where alpha is .3"
        )
    k = min(int(u * len(levels)), len(levels) - 1)
    x_t = z.to(torch.promote_types(z.dtype, torch.float32))
    t = [x_t.new_full((len(z),), level) for level in levels]
    with torch.no_grad():
        for i in range(k):
            x = denoise(x_t, t[i], c)
            x_t = renoise(x, t[i + 1], torch.randn_like(x), schedule)
    again = partial(denoise, x_t, t[k], c)
    return Exit(again(), levels[k], again, k + 1 if len(levels) > 1 else 0)


# --------------------------------------------------------------------------------- 9. Algorithm 1
class Ranks(NamedTuple):
    """The processes that share an update.

    By default it is this one alone. running.py, beside this file, tells those of torchrun.
    """

    rank: int = 0  # the number of this one
    size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda v: v  # (b, ...) of each -> (size * b, ...) by rank


def update(opts: Sequence[torch.optim.Optimizer], clip: float = 10.0) -> Tensor:
    """Alg. 1 l. 21-22: clip the gradient's norm of each optimizer, and step.

    -> the norms before clipping, (len(opts),) on the CPU. If one is not finite, no optimizer steps.
    """
    norms = torch.stack([torch.nn.utils.get_total_norm(gradients(opt)) for opt in opts]).cpu()
    clip_and_step(opts, norms, clip)
    return norms


def train(
    method: Method,
    student: Callable[[Condition, float], Exit],
    real: Denoiser,
    fake: Denoiser,
    batch: Callable[[int, int], Condition],
    opt_student: torch.optim.Optimizer,
    opt_fake: torch.optim.Optimizer,
    *,
    reward: Callable[[Tensor, Condition], Tensor] | None = None,
    K: int = 8,
    null: Callable[[Condition], Condition] | None = None,
    w: float = 1.0,
    schedule: Schedule = flow,
    space: str = "flow",
    t_range: tuple[float, float] = (0.02, 0.98),
    shift: float = 1.0,
    t_clamp: tuple[float, float] = (0.0, 1.0),
    t_per_sample: bool = False,
    normalize: bool = True,
    truth: Callable[[Condition], Tensor] | None = None,
    logits: Denoiser | None = None,
    adapt: Callable[[float], Denoiser] | None = None,
    aware: Callable[[Condition, float | Tensor], Condition] | None = None,
    probe: Callable[[Draw, Displacements, Tensor], dict] | None = None,
    fake_steps: int = 5,
    accum: int = 1,
    update: Callable[[Sequence[torch.optim.Optimizer]], Tensor] = update,
    ranks: Ranks = Ranks(),  # noqa: B008, it cannot change
    seed: int = 0,
    start: int = 0,
) -> Iterator[dict]:
    """Algorithm 1 as an endless generator, which yields a dict to log after each student update.

    A student update is fake_steps iterations. Each rolls out a fresh batch, asks the reward, and
    updates the fake teacher; the first also updates the student, on the same x, t and eps. Where
    neither H nor W reads the reward, the first alone asks it, for the log. Nothing is kept but
    `start`, the number of updates done: torch's global generator is seeded for each rollout, so a
    resumed run draws what it would have drawn. Nothing is checked or done before the first next().

    batch(n, j) -> c           condition of micro-batch j of iteration n, a pure function. Samples
                               are numbered by rank, then by micro-batch, then by place in it; K
                               consecutive ones are a group
    student(c, u) -> Exit      the whole generation; (x, t_G) will do. u in [0, 1) picks the exit,
                               alike on all ranks, because FSDP2 hangs if some call more often
    real, fake                 Denoisers
    reward(x, c) -> (B,)       None will do if neither H nor W reads it; dmdr takes its gradient
    null(c) -> c               the empty condition, for w != 1
    truth(c) -> (B, ...)       dmd at lam > 0: what c's own noise should become; dmd2: real samples
    logits(x_t, t, c) -> (B,)  dmd2: a discriminator on the fake's features, trained by opt_fake
    adapt(r) -> Denoiser       magic, dmdr: the real teacher with weights moved by r (`blend`)
    aware(c, t_G) -> c         what the fake sees for c, so that it can tell exits apart; None: c.
                               logits sees c as it is, for real samples have no exit
    probe(draw, d, g) -> dict  numbers of your own for the log, in each student update
    update(opts) -> norms      steps the optimizers, if all norms are finite
    t_range, shift, t_clamp    t is uniform in t_range, then `shifted`, then clamped
    t_per_sample               each sample has a t of its own; Alg. 1 l. 8 draws one for a group
    accum                      micro-batches of an iteration. A single one holds the graphs of
                               student and fake at once. With several, the student is rolled out
                               without a graph, and its exit is called again once g is known; it
                               must make the same x, so it has no dropout

    The dict has numbers, or tensors of shape (): step and fake_step, the updates done; loss_student
    and loss_fake; g_norm, dm_norm and ca_norm, root mean squares of an element; reward, and
    reward_std, the mean over groups of their std, both also by exit, as reward_exit_1, if there are
    several; adv_clip, the share of advantages at +-1; w_mean, the mean of W(a); skipped, a count.
    All but counts are means over those iterations of the update that have them and were not
    skipped.

    An x, loss or gradient that is not finite skips the iteration on all ranks; ten in a row raise
    FloatingPointError. ValueError: a closure is missing or returns a wrong shape, K does not divide
    the batch, a number is out of range, a reward is not finite.
    """
    ranges = all(0 <= low < high <= 1 for low, high in (t_range, t_clamp))
    if not (ranges and min(shift, K, accum, fake_steps) > 0):
        raise ValueError("choose t_range, t_clamp in [0, 1]; shift, K, accum, fake_steps above 0")
    spaces = ("x0", "eps") if isinstance(schedule, vp) else ("x0", "eps", "flow")
    if space not in spaces:
        raise ValueError(f"space {space!r}: choose one of {', '.join(spaces)} for this schedule")
    same_schedule(real, schedule, "real")
    same_schedule(fake, schedule, "fake")
    refuse_lonely(update, ranks)
    given = dict(reward=reward, null=null, adapt=adapt, truth=truth, logits=logits)
    closure = closure_of(method, w, given)
    options = dict(null=null, w=w, schedule=schedule, normalize=normalize, closure=closure)
    step, skips = start, Skips()
    opt_student.zero_grad()
    opt_fake.zero_grad()

    while True:  # l. 1, and 7: no gradients yet
        moved = method.phi(step)
        teacher = adapt(moved) if moved > 0 else real
        rows = []

        for i in range(fake_steps):
            student_turn = i == 0
            opts = [opt_student, opt_fake] if student_turn else [opt_fake]
            n = step * fake_steps + i
            shared = torch.Generator().manual_seed(key(seed, n))  # for what all ranks draw alike

            # l. 2-3: conditions, and the student's samples of them
            conds = [batch(n, j) for j in range(accum)]
            u = torch.rand((), generator=shared).item()
            roll = [
                partial(rollout, student, c, u, seed=key(seed, n, j, ranks.rank))
                for j, c in enumerate(conds)
            ]
            # one of each micro-batch, all stopped at the exit that u picks
            exits = [roll_j(grad=student_turn and accum == 1) for roll_j in roll]

            # l. 4-6 and 17: which samples failed, within their group
            # for a method that does not read rewards: once an update, for the log
            asked = reward if method.senses or student_turn else None
            a, W, sensed = sense(method, exits, conds, asked, K, ranks)

            # l. 8: a noise level for each group
            t = draw_levels(shared, len(a), 1 if t_per_sample else K, t_range, shift, t_clamp)

            # l. 9-11: for each micro-batch, its noise
            found = []
            for j, draw in enumerate(renoised(exits, conds, a, W, t, ranks, schedule)):
                # l. 12, 18-19: the fake's guess, which the student needs too. Its loss comes first,
                # so that with several micro-batches its graph is gone before the student's is made
                x0_fake = fake(draw.x_t, draw.t, aware(draw.c, draw.t_G) if aware else draw.c)
                loss_fake = fake_loss(draw, x0_fake, schedule, space)
                row = sensed | dict(loss_fake=loss_fake.detach())
                if method.calls == "logits":
                    loss_D = critic_loss(draw, truth, logits, schedule)
                    loss_fake = loss_fake + method.lam_d * loss_D
                backward(loss_fake, accum)

                if student_turn:
                    # l. 12-16: the gradient g at the sample x, and from there at the weights
                    g, d = gradient(method, draw, teacher, x0_fake.detach(), **options)
                    x = exits[j].x
                    if accum > 1:
                        x = with_graph(exits[j], roll[j], check=step == start)
                    loss = student_loss(x, g)
                    backward(loss, accum)
                    row |= dict(loss_student=loss.detach(), g_norm=rms(g))
                    row |= dict(dm_norm=rms(d.dm), ca_norm=rms(d.ca))
                    if probe:
                        row |= probe(draw, d, g)
                found.append(row)

            # l. 21-22: update the student and the fake
            norms = update(opts)
            for opt in opts:
                opt.zero_grad()
            if skips.record(norms, step):
                rows += found

        step += 1
        counts = dict(step=step, fake_step=step * fake_steps)
        yield counts | mean_of(rows) | dict(skipped=skips.total)


# ----------------------------------------------------------------------------- the parts of `train`
def key(*ints: int) -> int:
    """A seed for each draw, so that there is no generator's state to save.

    It depends on the integers alone, on every machine and in every process.
    """
    return random.Random(repr(ints)).getrandbits(60)


def rollout(student: Callable, c: Condition, u: float, seed: int, grad: bool) -> Exit:
    """Alg. 1 l. 3: samples of c, in float32 or 64. The same seed makes the same samples."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # where it would spend half a millisecond on each kind of accelerator that is not there
        torch.default_generator.manual_seed(seed)
    with torch.set_grad_enabled(grad):
        made = student(c, u)
        if isinstance(made, Tensor):
            raise ValueError("student returned x alone: return (x, t_G), or an Exit")
        made = Exit(*made)
        return made._replace(x=made.x.to(torch.promote_types(made.x.dtype, torch.float32)))


def with_graph(made: Exit, roll: Callable[..., Exit], check: bool) -> Tensor:
    """Make x (B, ...) of a rollout again, now with a graph.

    That takes its last call alone, if the Exit has `again`, else the whole generation. With check
    that call must make the same x. ValueError: it is off by more than .05 of the mean |x|, as by
    dropout; half precision's rounding is less.
    """
    if made.again is None:
        return roll(grad=True).x
    with torch.enable_grad():
        x = made.again().to(made.x.dtype)
    apart = (x - made.x).detach().abs().mean()
    same = ~(apart > 0.05 * made.x.abs().mean())  # a NaN is for `update` to skip
    if check and not same:
        raise ValueError(
            "the student's exit made another x when it was called again: take dropout out, or"
            " return (x, t_G) alone, and the whole generation is repeated"
        )
    return x


def sense(
    method: Method,
    exits: list[Exit],
    conds: list[Condition],
    reward: Callable | None,
    K: int,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, dict]:
    """Alg. 1 l. 4-6 and 17 -> a, W (N,) of all ranks and micro-batches, and numbers for the log.

    Both are on the CPU, in order of rank, micro-batch, place; gathering the rewards is the one
    synchronisation. If any x is not finite, all have a = 0 and W = 1: `update` will skip them.
    """
    xs = [made.x.detach() for made in exits]
    N = sum(map(len, xs)) * ranks.size
    if N % K or len({*map(len, xs)}) > 1:
        raise ValueError(
            f"K = {K} must divide the {N} samples of an update, in equal micro-batches: change one"
        )
    if reward is None:
        return torch.zeros(N), torch.ones(N), {}
    with torch.no_grad():
        r = [expect(reward(x, c), (len(x),), "reward") for x, c in zip(xs, conds, strict=True)]
    finite = torch.cat([x.flatten(1).isfinite().all(1) for x in xs])
    mine = torch.stack([torch.cat(r), finite.to(r[0])], 1)
    r, finite = ranks.gather(mine).cpu().double().unbind(1)
    if not r[finite > 0].isfinite().all():
        raise ValueError("the reward of a finite sample is NaN or inf: mend the reward")
    log = dict(reward=r.mean(), reward_std=r.view(-1, K).std(1, unbiased=False).mean())
    if exits[0].number:  # all ranks have one exit at a time
        log |= {f"{k}_exit_{exits[0].number}": v for k, v in log.items()}
    if not (method.senses and finite.all()):
        return torch.zeros(N), torch.ones(N), log
    a = group_advantage(r, K)
    W = method.W(a)
    if method.unit_w:
        W = W / W.mean()
    clipped = a.abs() > 1 - 1e-5  # at K = 2, Eq. 12's eps keeps all just below 1
    return a, W, log | dict(adv_clip=clipped.double().mean(), w_mean=W.mean())


def draw_levels(
    generator: torch.Generator,
    N: int,
    K: int,
    t_range: tuple[float, float],
    shift: float = 1.0,
    t_clamp: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Alg. 1 l. 8, a draw for K samples -> t (N,): uniform in t_range, shifted, then clamped.

    DMD2 is uniform in [.02, .98]; Self-Forcing in [0, 1], with shift 5, clamped to [.02, .98].
    """
    t = torch.rand(N // K, generator=generator, dtype=torch.float64).repeat_interleave(K)
    return shifted(t_range[0] + (t_range[1] - t_range[0]) * t, shift).clamp(*t_clamp)


def renoised(
    exits: list[Exit],
    conds: list[Condition],
    a: Tensor,
    W: Tensor,
    t: Tensor,
    ranks: Ranks,
    schedule: Schedule,
) -> Iterator[Draw]:
    """Alg. 1 l. 9-11: this rank's micro-batches. a, W, t (N,) are those of all ranks."""
    B = len(exits[0].x)
    first = ranks.rank * len(exits)
    values = torch.stack([a, W, t]).split(B, 1)[first : first + len(exits)]
    for made, c, of_this in zip(exits, conds, values, strict=True):
        x = made.x.detach()
        eps = torch.randn_like(x)
        a_j, W_j, t_j = of_this.to(x, non_blocking=True)
        yield Draw(c, x, made.t_G, a_j, W_j, t_j, eps, renoise(x, t_j, eps, schedule))


def backward(loss: Tensor, accum: int) -> None:
    """Add the gradients of a micro-batch.

    If its loss is not finite, all of them are NaN, and `update` sees it on every rank.
    """
    (loss * (1 + 0 * loss.detach()) / accum).backward()


def gradients(opt: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients that an optimizer's parameters have."""
    return [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]


def clip_and_step(opts: Sequence[torch.optim.Optimizer], norms: Tensor, clip: float) -> None:
    """Scale each optimizer's gradients, whose norms (len(opts),) are given, down to clip, and step.

    If a norm is not finite, nothing happens.
    """
    if not norms.isfinite().all():
        return
    for opt, norm in zip(opts, norms.tolist(), strict=True):
        if norm > clip:
            torch._foreach_mul_(gradients(opt), clip / norm)
        opt.step()


def refuse_lonely(step: Callable, ranks: Ranks) -> None:
    """ValueError if the gradients of several ranks were never averaged: they would drift apart."""
    if ranks.size > 1 and getattr(step, "func", step) is update:
        raise ValueError("amd.update is for one process: pass update=, which averages over ranks")


class Skips:
    """Counts the iterations in which nothing stepped, because a number was not finite."""

    def __init__(self):
        self.total = 0
        self.in_a_row = 0

    def record(self, norms: Tensor, step: int) -> bool:
        """Count an iteration -> was it finite? FloatingPointError: the last ten were not."""
        if norms.isfinite().all():
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row == 10:
            raise FloatingPointError(
                f"step {step}: ten iterations in a row were not finite, lower the learning rates"
            )
        return False


def closure_of(method: Method, w: float, given: dict) -> Callable | None:
    """The closure that F_ext calls, or None. ValueError: one is missing that `train` will call."""
    called = dict(
        reward=method.senses or method.calls == "reward",
        null=w != 1,
        adapt=method.phi is not fixed,
        truth=method.calls in ("truth", "logits"),
        logits=method.calls == "logits",
    )
    for name, closure in given.items():
        if closure is None and called[name]:
            raise ValueError(f"this method, at its lam and w, calls {name}: pass {name}=")
    return given.get(method.calls)


def rms(v: Tensor) -> Tensor:
    """Root mean square of a sample (B, ...), averaged over samples: an element's size, to log."""
    return per_sample(v**2).sqrt().mean()


def mean_of(rows: list[dict]) -> dict:
    """The mean of each number over the rows that have it."""
    names = {k: None for row in rows for k in row}  # in order
    columns = {k: [row[k] for row in rows if k in row] for k in names}
    return {k: sum(column) / len(column) for k, column in columns.items()}
