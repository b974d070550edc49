"""Ideas beyond the paper, which docs/findings.md measures: none is part of AMD.

Operators change the displacements of an update; each is an F_t, so a row of amd.METHODS takes it by
`row._replace(F_t=...)`. Sensors stand in for the reward, which finds failed samples; each makes a
closure reward(x, c) -> (B,) for amd.train. The rest treats the exits of a student of several steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import amd


# ---------------------------------------------------------------------------------------- operators
def along(v: Tensor, axis: Tensor) -> Tensor:
    """The part of each sample of v (B, ...) that is parallel to axis (B, ...)."""
    flat, onto = v.flatten(1), axis.flatten(1)
    length = (flat * onto).sum(1) / onto.square().sum(1).clamp_min(1e-12)
    return amd.like(length, v) * axis


def with_ca(d: amd.Displacements, ca: Tensor) -> amd.Displacements:
    """The same displacements with another CFG augmentation (B, ...); w is not 1."""
    return d._replace(uncond=d.cond - ca / (d.w - 1))


def projected(
    draw: amd.Draw,
    real: amd.Denoiser,
    x0_fake: Tensor,
    null: Callable | None,
    w: float,
    schedule: amd.Schedule,
    share: float = 1.0,
) -> amd.Displacements:
    """CA without a share of its part along the conditional estimate, as APG (arXiv 2410.02416).

    APG blames that part for over-saturation. share = 1 takes all of it away, 0 none.
    """
    d = amd.joint(draw, real, x0_fake, null, w, schedule)
    x0_cond = draw.x - d.cond
    return d if w == 1 else with_ca(d, d.ca - share * along(d.ca, x0_cond))


def orthogonal(
    draw: amd.Draw,
    real: amd.Denoiser,
    x0_fake: Tensor,
    null: Callable | None,
    w: float,
    schedule: amd.Schedule,
) -> amd.Displacements:
    """CA without its part along DM, so that guidance neither helps nor hinders the matching."""
    d = amd.joint(draw, real, x0_fake, null, w, schedule)
    return d if w == 1 else with_ca(d, d.ca - along(d.ca, d.dm))


def momentum(
    draw: amd.Draw,
    real: amd.Denoiser,
    x0_fake: Tensor,
    null: Callable | None,
    w: float,
    schedule: amd.Schedule,
    average: amd.Denoiser,
    share: float = 0.5,
) -> amd.Displacements:
    """DM mixed with its running average, as a field: share of the average, the rest of its own.

    The real teacher stands still, so the average of DM at a point is that of the fake's guess, and
    `average` is a fake with averaged weights. A share below 0 looks ahead instead, as APG does.
    """
    with torch.no_grad():
        x0_average = average(draw.x_t, draw.t, draw.c)
    x0_fake = x0_fake + share * (x0_average - x0_fake)
    return amd.joint(draw, real, x0_fake, null, w, schedule)


def operators_of(average: amd.Denoiser) -> dict[str, Callable]:
    """Forms of F_t by name. average is a fake with averaged weights."""
    return {
        "CA less half of its part along x0": partial(projected, share=0.5),
        "CA less its part along x0": projected,
        "CA less its part along DM": orthogonal,
        "DM half averaged": partial(momentum, average=average, share=0.5),
        "DM half ahead": partial(momentum, average=average, share=-0.5),
    }


@torch.no_grad()
def follow(average: torch.nn.Module, net: torch.nn.Module, rate: float = 0.1) -> None:
    """Move the weights of average towards those of net by a share of the way."""
    weights = dict(net.named_parameters())
    own = dict(average.named_parameters())
    torch._foreach_lerp_([*own.values()], [weights[name] for name in own], rate)


# ------------------------------------------------------------------------------------------ sensors
Sensor = Callable[[Tensor, amd.Condition], Tensor]  # x (B, ...), c -> (B,); high = a good sample


def at_level(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """x (B, ...) with fresh noise of level t -> x_t (B, ...), t (B,)."""
    level = x.new_full((len(x),), t)
    return amd.renoise(x, level, torch.randn_like(x)), level


def norm(v: Tensor) -> Tensor:
    """The length of each sample (B, ...) -> (B,)."""
    return v.flatten(1).norm(dim=1)


def disagreement(real: amd.Denoiser, fake: amd.Denoiser, t: float) -> Sensor:
    """-|d_cond - d_fake| / |d_cond| at level t: do the teachers agree? One more call of each."""

    def sense(x, c):
        x_t, level = at_level(x, t)
        x0_real = real(x_t, level, c)
        return -norm(x0_real - fake(x_t, level, c)) / norm(x - x0_real).clamp_min(1e-8)

    return sense


def inconsistency(real: amd.Denoiser, t: float) -> Sensor:
    """-variance of the real teacher's estimate over two noises of level t. Two more calls of it."""

    def sense(x, c):
        first, second = (real(*at_level(x, t), c) for _ in range(2))
        return -0.5 * amd.per_sample((first - second) ** 2)

    return sense


def ensemble(rewards: Sequence[Sensor], worst: bool = False) -> Sensor:
    """The mean of several rewards, or the lowest of them."""

    def sense(x, c):
        each = torch.stack([reward(x, c) for reward in rewards])
        return each.amin(0) if worst else each.mean(0)

    return sense


def of_target(reward: Sensor, real: amd.Denoiser, fake: amd.Denoiser, t: float) -> Sensor:
    """The reward of where DMD's update at level t would move x. One more call of each teacher."""

    def sense(x, c):
        x_t, level = at_level(x, t)
        return reward(x + real(x_t, level, c) - fake(x_t, level, c), c)

    return sense


# -------------------------------------------------------------------------------------------- exits
EXITS = {  # what one may do about the exits of a student of several steps
    "one fake": "a random exit an iteration, and one fake for all: as published",
    "exit-aware": "the fake is told the exit",
    "weighted": "one fake, whose loss weighs the last exit four times",
    "last alone": "the last exit in all iterations",
    "mixed": "a random exit for each sample, so that groups mix exits",
    "more updates": "one fake, with twice the updates, in half of the student updates",
}


def more_updates(kind: str) -> int:
    """How many times as many fake updates a student update has, for a kind of EXITS."""
    return 2 if kind == "more updates" else 1


def fake_of(
    kind: str, fake: amd.Denoiser, levels: Sequence[float], told: Callable
) -> tuple[amd.Denoiser, Callable | None]:
    """A fake as a kind of EXITS asks it -> it, and `aware` of amd.train.

    told(c, t_G) -> c names the exit.
    """
    if kind == "weighted":
        return weighted(fake, levels)
    return fake, told if kind == "exit-aware" else None


def generation(kind: str, denoise: amd.Denoiser, levels: Sequence[float]) -> Callable:
    """A student's generation in training, for a kind of EXITS: z, c, u -> amd.Exit.

    ValueError: there is no such kind.
    """
    if kind not in EXITS:
        raise ValueError(f"{kind!r}: choose one of {', '.join(EXITS)}")

    def generate(z, c, u):
        if kind == "mixed":
            return mixed_exits(denoise, z, c, levels)
        return amd.backward_simulation(denoise, z, c, levels, 1.0 if kind == "last alone" else u)

    return generate


class Weighed(NamedTuple):
    """A condition, and the weight of its samples in the fake's loss."""

    c: amd.Condition
    weight: float


def weighted(
    fake: amd.Denoiser, levels: Sequence[float], last: float = 4.0
) -> tuple[amd.Denoiser, Callable]:
    """A fake whose loss weighs the last exit more -> it, and `aware` of amd.train.

    The last exit weighs `last` times as much as another; the mean weight is 1.
    """
    unit = len(levels) / (len(levels) - 1 + last)
    weight_of = dict.fromkeys(levels, unit) | {levels[-1]: last * unit}

    def denoise(x_t, t, told):
        return gradient_times(fake(x_t, t, told.c), told.weight)

    def aware(c, t_G):
        return Weighed(c, weight_of[t_G])

    return denoise, aware


def gradient_times(v: Tensor, k: float) -> Tensor:
    """The same v, whose gradient counts k times."""
    return v.detach() + k * (v - v.detach())


def mixed_exits(
    denoise: amd.Denoiser, z: Tensor, c: amd.Condition, levels: Sequence[float]
) -> amd.Exit:
    """A student's generation in which each sample has an exit of its own, so t_G is (B,).

    amd.backward_simulation has one exit for all, and fewer calls. Only for flow's levels.
    """
    exit_of = torch.randint(len(levels), (len(z),), device=z.device)
    x_t, x = z, torch.zeros_like(z)
    for i, level in enumerate(levels):
        t = z.new_full((len(z),), level)
        made = denoise(x_t, t, c)
        x = torch.where(amd.like(exit_of == i, z), made, x)
        if i + 1 < len(levels):
            x_t = amd.renoise(
                made.detach(), t.new_full(t.shape, levels[i + 1]), torch.randn_like(z)
            )
    return amd.Exit(x, z.new_tensor(levels)[exit_of])
