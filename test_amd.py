"""The method, equation by equation, then Algorithm 1 on small networks: `pytest test_amd.py`.

It needs torch and pytest and takes seconds. Everything else is tested in tests/. A test's name has
the numbers of the equations that it holds amd.py to, and its docstring says by what oracle.
"""

import ast
import copy
import dataclasses
import inspect
import math
import re
import sys
from collections import Counter, namedtuple
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import amd

f64 = partial(torch.tensor, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)
close = partial(assert_close, rtol=1e-9, atol=1e-12)
shapes = pytest.mark.parametrize("shape", [(8, 2), (8, 3, 4, 4), (8, 2, 3, 4, 4)])
methods = pytest.mark.parametrize("name", amd.METHODS)

torch.set_num_threads(1)  # the networks are small
ABAR = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)  # a DDPM's alphas_cumprod


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


def draw(shape=(8, 2), schedule=amd.flow, **given):
    """A random Draw of eight samples, but for the fields that are given.

    x_t follows from x, t and eps, as in Algorithm 1. The levels keep away from 0 and 1, where a
    guess divides by sigma or alpha.
    """
    fields = dict(
        c=torch.arange(8) % 3,
        x=randn(*shape),
        t_G=1.0,
        a=randn(8).clamp(-1, 1),
        weight=randn(8).exp(),
        t=0.1 + 0.8 * torch.rand(8).double(),
        eps=randn(*shape),
    )
    fields |= given
    x_t = amd.renoise(
        fields["x"],
        fields["t"],
        fields["eps"],
        schedule,
    )
    return amd.Draw(**dict(x_t=x_t) | fields)


def affine(scale, shift=0.0):
    """A Denoiser that depends on x_t, t and c.

    So the test sees it if one of them is not what it should be.
    """
    return lambda x_t, t, c: scale * x_t + amd.like(t, x_t) + shift * amd.like(c, x_t)


# ----------------------------------------------------------------------------- 1. forward operator
@shapes
def test_renoise_goes_from_data_to_noise(shape):
    """Level 0 is the sample, level 1 the noise, .25 a quarter of the way.

    Each sample of the batch has a level of its own, whatever the shape behind the first dimension.
    """
    x, eps = randn(*shape), randn(*shape)
    t = f64([0, 1, 0.25, 0.5, 0.75, 0.9, 0.1, 0.3])

    x_t = amd.renoise(x, t, eps)

    close(x_t[0], x[0])
    close(x_t[1], eps[1])
    close(x_t[2], 0.75 * x[2] + 0.25 * eps[2])


@shapes
def test_x0_from_flow_inverts_renoise(shape):
    """A network that knows the velocity gives back the sample.

    The velocity is eps - x: noise minus data.
    """
    z = draw(shape)

    denoise = amd.x0_from_flow(lambda x_t, t, c: z.eps - z.x)

    close(denoise(z.x_t, z.t, z.c), z.x)


@shapes
def test_x0_from_eps_inverts_renoise(shape):
    """A network that knows the noise gives back the sample.

    It holds at every level of the grid at which there is signal.
    """
    schedule = amd.vp(ABAR)
    z = draw(shape, schedule)

    denoise = amd.x0_from_eps(lambda x_t, i, c: z.eps, schedule)

    close(denoise(z.x_t, z.t, z.c), z.x)


def test_vp_finds_every_time_step():
    """Level i / N is index i, and t = 1 is the last, also in float32, where truncating t N errs.

    The oracle is the grid itself: alpha^2 is alphas_cumprod, and alpha^2 + sigma^2 is 1.
    """
    schedule = amd.vp(ABAR)
    t = torch.arange(1001) / 1000

    alpha, sigma = schedule(t)

    assert schedule.index(t).tolist() == [*range(1000), 999]
    abar = torch.cat([ABAR, ABAR[-1:]])
    assert_close(alpha, abar.sqrt().float())
    assert_close(alpha**2 + sigma**2, torch.ones(1001))


def test_a_ddpms_network_is_given_its_own_time_steps():
    """Levels in [0, 1] would be wrong by a factor of N, without a word.

    A network whose schedule is a function of t, and no grid, is given t as it is.
    """
    seen = []

    def net(x_t, i, c):
        seen.append(i)
        return x_t

    def smooth(t):
        return (1 - t).sqrt(), t.sqrt()

    x_t, t = randn(3, 2), f64([0.02, 0.5, 0.98])
    for schedule in (amd.vp(ABAR), smooth):
        denoise = amd.x0_from_eps(net, schedule)
        denoise(x_t, t, None)

    assert seen[0].tolist() == [20, 500, 980]
    assert seen[1] is t


@pytest.mark.parametrize(
    "wrong",
    [
        1 - ABAR,
        2 * ABAR,
        0.4 * ABAR,
        ABAR[None],
        ABAR * math.nan,
        ABAR.roll(500),
    ],
)
def test_vp_refuses_what_is_no_alphas_cumprod(wrong):
    """A user may take the wrong attribute of a scheduler, as betas, which rise.

    Nor does it take a schedule that begins low, goes up again, or has another shape.
    """
    with pytest.raises(ValueError, match="alphas_cumprod"):
        amd.vp(wrong)


def test_vp_tells_the_level_of_an_alpha():
    """It is the highest level that has so much signal: a step of the grid above it there is less.

    A student of one step begins at such a level.
    """
    schedule = amd.vp(ABAR)

    for alpha in (0.2, 0.3, 0.9):
        level = schedule.level(alpha)
        at_level, _ = schedule(f64(level))
        one_step_above, _ = schedule(f64(level + 0.001))
        assert at_level >= alpha > one_step_above


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_precision_ends_at_the_network(dtype):
    """A network may answer in bfloat16; what follows is computed in the type of x_t.

    The oracle is an answer that is rounded to bfloat16 and then widened. It must change nothing.
    """
    x_t = torch.randn(8, 2, dtype=dtype)
    t = torch.rand(8, dtype=dtype)
    from_eps = partial(amd.x0_from_eps, schedule=amd.vp(ABAR))

    for adapter in (amd.x0_from_flow, from_eps):
        half = adapter(lambda x_t, t, c: x_t.bfloat16())
        rounded = adapter(lambda x_t, t, c: x_t.bfloat16().to(dtype))
        assert half(x_t, t, None).equal(rounded(x_t, t, None))


# -------------------------------------------------------------------------------- 2. displacements
def test_eq9_by_hand():
    """DM compares both teachers without guidance; CA is what guidance adds.

    The oracle is the paper's arithmetic on single numbers, at w = 4.
    """
    d = amd.Displacements(
        cond=f64(3),
        uncond=f64(1),
        fake=f64(2),
        w=4.0,
    )

    assert d.real == 1 + 4 * (3 - 1)
    assert d.dm == 3 - 2
    assert d.ca == (4 - 1) * (3 - 1)


def test_displace_calls_the_real_teacher_once_for_both_conditions():
    """The condition comes first, the empty one second, at the same x_t and t.

    One call of twice the batch takes less time than two. The oracle is a teacher that multiplies
    x_t by its condition, so the empty condition, 0, makes 0.
    """
    calls = []

    def real(x_t, t, c):
        calls.append((x_t, t))
        return x_t * amd.like(c, x_t)

    z = draw(c=randn(8))
    x0_fake = randn(8, 2)

    d = amd.displace(
        z.x,
        z.x_t,
        z.t,
        z.c,
        null=lambda c: 0 * c,
        real=real,
        x0_fake=x0_fake,
        w=3,
    )

    close(d.cond, z.x - z.x_t * z.c[:, None])
    close(d.uncond, z.x)
    close(d.fake, z.x - x0_fake)
    ((x_t, t),) = calls
    assert x_t.equal(torch.cat([z.x_t, z.x_t]))
    assert t.equal(torch.cat([z.t, z.t]))


def test_displace_skips_the_empty_condition_without_guidance():
    """At w = 1 the empty condition has no weight, so half of the call is spared.

    CA is 0 then, and null may be None.
    """
    calls = []

    def real(x_t, t, c):
        calls.append(len(x_t))
        return 0 * x_t

    z = draw()

    d = amd.displace(
        z.x,
        z.x_t,
        z.t,
        z.c,
        null=None,
        real=real,
        x0_fake=None,
        w=1,
    )

    assert calls == [8]
    assert d.fake is None
    assert not d.ca.any()


def test_pair_joins_every_kind_of_condition():
    """Tensors grow, other leaves pass through; the structure stays.

    So a pipeline's own dicts, tuples and dataclasses serve as conditions as they are.
    """

    @dataclasses.dataclass(frozen=True)
    class Size:
        ids: torch.Tensor
        unit: str

    Text = namedtuple("Text", ["embedding", "mask"])
    v = randn(8, 3)
    c = dict(
        text=Text(v, None),
        size=Size(v, "px"),
        more=([v, v], 7),
    )
    empty = dict(
        text=Text(-v, None),
        size=Size(-v, "px"),
        more=([-v, v], 7),
    )

    both = amd.pair(c, empty)

    assert both["text"].embedding.equal(torch.cat([v, -v]))
    assert both["text"].mask is None
    assert both["size"].ids.equal(torch.cat([v, -v]))
    assert both["size"].unit == "px"
    assert both["more"][0][0].equal(torch.cat([v, -v]))
    assert both["more"][0][1].equal(torch.cat([v, v]))
    assert both["more"][1] == 7


@pytest.mark.parametrize(
    "empty, message",
    [
        (dict(text=f64([0]), size=8), "changes 7 to 8"),
        (dict(text=f64([0])), "has the keys"),
        (dict(text=[f64([0])], size=7), "makes a Tensor a list"),
        ((f64([0]), 7), "makes a dict a tuple"),
    ],
)
def test_pair_refuses_an_empty_condition_of_another_structure(empty, message):
    """The two conditions share a call, so what is no tensor must be alike in both.

    The message tells where null(c) departs from c.
    """
    c = dict(text=f64([1]), size=7)

    with pytest.raises(ValueError, match=message):
        amd.pair(c, empty)


def test_pair_refuses_tuples_of_other_lengths():
    """A part too few would otherwise be dropped in silence, as zip does.

    The message counts the parts of both.
    """
    c = (f64([1]), f64([1]))
    empty = (f64([1]),)

    with pytest.raises(ValueError, match="has 1 parts, c has 2"):
        amd.pair(c, empty)


# ------------------------------------------------------------------------------- 3. the operator H
def test_eq7_to_eq10_eq13_by_hand():
    """All four operators, on single numbers: d_real is 9, d_fake 2, DM 1 and CA 6.

    At the default s = .5 an advantage of .5 makes alpha 1.25 and beta .75.
    """
    d = amd.Displacements(
        cond=f64(3),
        uncond=f64(1),
        fake=f64(2),
        w=4.0,
    )
    a = f64(0.5)
    alpha, beta = 1.25, 0.75

    assert amd.H_std(d, a) == 9 - 2
    assert amd.H_naive(d, a) == alpha * 9 - beta * 2
    assert amd.H_amd(d, a) == beta * 1 + alpha * 6
    close(amd.H_rf(d, a), f64(math.e * 7))


@shapes
def test_eq7_to_eq10_identities(shape):
    """They are what the paper says of the operators, on random displacements.

    DMD is DM + CA. Eq. 8 differs from Eq. 10 by 2 s a d_cond. At s = 1 a failure has DM alone and a
    success CA alone, both twice.
    """
    d = amd.Displacements(*randn(3, *shape), 3.0)
    a = amd.like(randn(8).clamp(-1, 1), d.cond)
    one = torch.ones_like(a)

    close(amd.H_std(d, a), d.dm + d.ca)
    close(
        amd.H_naive(d, a, 0.3) - amd.H_amd(d, a, 0.3),
        2 * 0.3 * a * d.cond,
    )
    close(amd.H_amd(d, one, 1), 2 * d.ca)
    close(amd.H_amd(d, -one, 1), 2 * d.dm)


@pytest.mark.parametrize("H", [amd.H_naive, amd.H_amd])
def test_eq13_without_sensitivity_or_advantage_is_eq7(H):
    """s = 0 turns score adaptation off, and so does a = 0.

    Both operators are DMD's then.
    """
    d = amd.Displacements(*randn(3, 8, 2), 3.0)
    a = randn(8, 1).clamp(-1, 1)

    close(H(d, a, 0), amd.H_std(d, a))
    close(H(d, 0 * a, 1), amd.H_std(d, a))


@pytest.mark.parametrize("H", [amd.H_naive, amd.H_amd])
@pytest.mark.parametrize("s", [-0.01, 1.01, math.nan])
def test_eq13_refuses_a_sensitivity_that_can_turn_a_sign(H, s):
    """Beyond s = 1, alpha or beta is negative for some advantage, and a pull becomes a push.

    Below s = 0 failures would follow CA, and successes DM.
    """
    d = amd.Displacements(*randn(3, 8, 2), 3.0)

    with pytest.raises(ValueError, match="choose s in"):
        H(d, randn(8, 1), s)


# ------------------------------------------------------------------------------- 4. reward sensing
def test_eq12_by_hand():
    """Two groups of four, whose mean and population std are easy.

    In the first group the outlier is clipped to 1; in the second all are at +-1.
    """
    r = f64([0, 0, 0, 1, 5, 3, 5, 3])

    a = amd.group_advantage(r, 4)

    first = [-(3**-0.5)] * 3 + [1]
    second = [1, -1, 1, -1]
    close(a, f64(first + second), rtol=1e-5)


def test_eq12_eps_is_added_to_the_std():
    """The std here is 1e-5, and eps = 1e-6 is added to it: an advantage is 1 / 1.1.

    So eps matters only where rewards hardly differ.
    """
    a = amd.group_advantage(f64([0, 2e-5]), 2)

    close(a, f64([-1, 1]) / 1.1)


def test_eq12_does_not_see_scale_shift_order_or_other_groups():
    """A reward may be on any scale, and a hard prompt is not held against an easy one.

    Each group is shifted by another number, then shuffled within itself, then given neighbours.
    """
    r = randn(24)
    a = amd.group_advantage(r, 8)

    shift = torch.arange(3).repeat_interleave(8)
    close(
        amd.group_advantage(3 * r + shift, 8),
        a,
        rtol=1e-4,  # for eps does not scale
    )

    order = torch.cat([torch.randperm(8) + 8 * g for g in range(3)])
    close(
        amd.group_advantage(r[order], 8),
        a[order],
    )

    other = torch.cat([0 * r[:8] + 9, r[8:]])
    assert amd.group_advantage(other, 8)[8:].equal(a[8:])


def test_eq12_clips_and_keeps_floats():
    """No advantage is beyond 1, and a reward that counts in integers has advantages all the same.

    Floats keep their type.
    """
    r = randn(24)

    assert amd.group_advantage(r, 8).abs().max() == 1
    assert amd.group_advantage(r.float(), 8).dtype == torch.float32
    assert amd.group_advantage(r.long(), 8).dtype == torch.float32


@pytest.mark.parametrize(
    "level, limit",
    [
        (-3.7, 7.4e-6),
        (0, 2e-6),
        (2, 4e-6),
        (-1000, 2e-3),
    ],
)
def test_eq12_equal_rewards_have_no_advantage(level, limit):
    """A group that is alike but for rounding must not be pushed apart.

    Equal is a std of at most 1e-6 max(1, |mean|). Two rewards that are `spread` apart have a std of
    spread / 2, so the limit is known. Just below it the advantage is 0, just above it is large.
    """
    for spread, equal in ((0, True), (0.95 * limit, True), (1.05 * limit, False)):
        r = f64([level - spread / 2, level + spread / 2] * 4)
        a = amd.group_advantage(r, 8)
        if equal:
            assert (a == 0).all()
        else:
            assert a.abs().min() > 0.5


def test_eq12_equal_rewards_in_float32_have_no_advantage():
    """The mean of eight times -3.7 is not -3.7 in float32, and eps is small beside the rest.

    So an advantage that is computed in float32 would not be 0.
    """
    r = torch.full((8,), -3.7)

    assert not amd.group_advantage(r, 8).any()


@pytest.mark.parametrize(
    "r, K, message",
    [
        ([0] * 8, 1, "choose K"),
        ([0] * 8, 3, "choose K"),
        ([0] * 8, -2, "choose K"),
        ([[0]] * 8, 2, "choose K"),
        ([0, math.nan], 2, "mend the reward"),
        ([0, math.inf], 2, "mend the reward"),
    ],
)
def test_eq12_refuses(r, K, message):
    """A group of one has no std, and a group must not end in the middle of the batch.

    A reward that is not finite would make its whole group NaN.
    """
    with pytest.raises(ValueError, match=message):
        amd.group_advantage(f64(r), K)


def test_eq14_weights_by_hand():
    """The fake teacher studies failures harder: W is e at an advantage of -1, and 1 at 0.

    A lower temperature sharpens that, and tau = inf turns it off.
    """
    a = f64([-1, 0, 1])

    close(amd.W_exp(a), f64([math.e, 1, 1 / math.e]))
    close(amd.W_exp(a, 0.5), f64([math.e**2, 1, math.e**-2]))
    assert amd.W_exp(a, math.inf).equal(amd.W_one(a))
    assert amd.W_one(a).equal(torch.ones_like(a))


@pytest.mark.parametrize("tau", [0, -1, math.nan])
def test_eq14_refuses_a_temperature(tau):
    """A negative one would have the fake study successes, and 0 divides by zero.

    NaN would make every weight NaN, and each iteration would be skipped.
    """
    with pytest.raises(ValueError, match="choose tau"):
        amd.W_exp(f64([0]), tau)


# ------------------------------------------------------------------------------ 5. external forces
def test_eq25_eq26_regression_pulls_to_the_truth():
    """DMD's force is the way from the truth to x, and descending it leads back.

    The energy is half of the mean over two dimensions, hence the half.
    """
    z, truth = draw(), randn(8, 2)

    def energy(x):
        return amd.regression(x, z, lambda c: truth, amd.flow)

    got = amd.force(energy, z.x)

    close(got, (z.x - truth) / 2)


def test_eq27_adversarial_pulls_to_a_higher_logit():
    """DMD2's force raises the discriminator's logit of the renoised x.

    The oracle is the chain rule: the logit is linear in x_t, which is (1 - t) x + t eps. The
    discriminator itself gets no gradient, for it has a loss of its own.
    """
    z, D = draw(), nn.Linear(2, 1).double()

    def logits(x_t, t, c):
        return D(x_t)[:, 0]

    def energy(x):
        return amd.adversarial(x, z, logits, amd.flow)

    got = amd.force(energy, z.x)

    share = torch.sigmoid(logits(z.x_t, z.t, z.c))[:, None]
    close(
        got,
        -(1 - share) * (1 - z.t)[:, None] * D.weight,
    )
    assert D.weight.grad is None


def test_eq28_ascent_pulls_to_a_higher_reward():
    """DMDR's force is minus the reward's gradient, here that of a sine, by hand.

    x itself stays outside the graph.
    """
    z = draw()

    def energy(x):
        return amd.ascent(x, z, lambda x, c: x.sin().sum(1), amd.flow)

    got = amd.force(energy, z.x)

    close(got, -z.x.cos())
    assert not z.x.requires_grad


@torch.no_grad()
def test_a_force_works_without_gradients_around_it():
    """A caller may have turned gradients off for the teachers, and the force needs its own.

    The gradient of a sum of squares is twice x.
    """
    x = randn(8, 2)

    got = amd.force(lambda x: x.square().sum(1), x)

    assert got.equal(2 * x)


# ------------------------------------------------------------------------------------- 6. Table 1
def test_table1_says_what_the_paper_prints():
    """The table is checked a column at a time: the rows that depart from DMD, by name.

    No two rows are the same.
    """
    T = amd.METHODS

    assert [k for k in T if T[k].F_ext] == ["dmd", "dmd2", "dmdr"]
    assert [k for k in T if T[k].F_t is not amd.joint] == ["ddmd"]
    assert [k for k in T if T[k].phi is amd.faded] == ["magic", "dmdr"]
    assert [k for k in T if T[k].W is amd.W_exp] == ["amd", "naive"]
    assert [k for k in T if T[k].senses] == ["amd", "naive", "reward_forcing"]
    assert len({row[:5] for row in T.values()}) == len(T) == 8


@methods
def test_table1_rows_are_one_update_without_their_specialities(name):
    """At lam = 0, a = 0 and one level for both terms, every row is DMD.

    So no row has a sign or a factor of its own.
    """
    z = draw(a=torch.zeros(8).double())
    x0_fake = affine(0.9)(z.x_t, z.t, z.c)
    row = amd.method(name, s=0)._replace(F_t=amd.joint)

    def g_of(method):
        g, _ = amd.gradient(
            method,
            z,
            affine(0.5, 1.0),
            x0_fake,
            null=lambda c: 0 * c,
            w=2.0,
        )
        return g

    close(g_of(row), g_of(amd.METHODS["dmd"]))


def test_method_binds_the_hyper_parameters_of_a_row():
    """What is given reaches the row's functions, and what is not keeps the table's value.

    A hyper-parameter that only other rows have is let pass, so that a script has one call for all.
    """
    d = amd.Displacements(*randn(3, 8, 2), 3.0)
    a = torch.full((8, 1), 0.5).double()

    m = amd.method("amd", s=0.25, tau=2, lam=3, lam_d=4, unit_w=True)
    close(m.H(d, a), amd.H_amd(d, a, 0.25))
    close(m.W(a), (-a / 2).exp())
    assert (m.lam, m.lam_d, m.unit_w, m.phi(5)) == (3, 4, True, 0)

    naive = amd.method("naive", s=0.25)
    close(naive.H(d, a), amd.H_naive(d, a, 0.25))

    noisier = amd.method("ddmd", noisier=True)
    assert noisier.F_t.keywords == dict(noisier=True)

    assert amd.method("amd") == amd.METHODS["amd"]
    assert amd.method("dmd", s=0.25, tau=2, fade=3) == amd.METHODS["dmd"]


def test_a_new_row_brings_hyper_parameters_of_its_own(monkeypatch):
    """A row that a user adds needs no edit in amd.py, as the docstring of `method` promises.

    It has an s with a default of its own, a new name, and a function of the others' beside it.
    """

    def H_mine(d, a, s=0.1, push=2.0):
        return push * d.dm + s * a * d.ca

    mine = amd.METHODS["amd"]._replace(H=H_mine)
    monkeypatch.setitem(amd.METHODS, "mine", mine)
    d = amd.Displacements(*randn(3, 8, 2), 3.0)
    a = randn(8, 1).clamp(-1, 1)

    row = amd.method("mine")
    close(row.H(d, a), H_mine(d, a, 0.1, 2.0))

    row = amd.method("mine", s=0.7, push=5.0, tau=0.5)
    close(row.H(d, a), H_mine(d, a, 0.7, 5.0))
    close(row.W(a), (-2 * a).exp())
    assert row.senses

    amd.method("dmd", push=5.0)  # others let it pass


def test_a_new_row_keeps_what_it_sets(monkeypatch):
    """A row that sets lam, or binds a hyper-parameter, has that for its default.

    What is given to `method` counts more. So a user's recipe may be a row, and a flag may still
    change it.
    """
    mine = amd.METHODS["dmdr"]._replace(
        lam=0.5,
        unit_w=True,
        H=partial(amd.H_amd, s=0.1),
    )
    monkeypatch.setitem(amd.METHODS, "mine", mine)
    d = amd.Displacements(*randn(3, 8, 2), 3.0)
    a = randn(8, 1).clamp(-1, 1)

    kept = amd.method("mine")
    assert (kept.lam, kept.unit_w) == (0.5, True)
    close(kept.H(d, a), amd.H_amd(d, a, 0.1))

    given = amd.method("mine", lam=2, s=0.9)
    assert (given.lam, given.unit_w) == (2, True)
    close(given.H(d, a), amd.H_amd(d, a, 0.9))


def test_a_builtin_has_no_hyper_parameters(monkeypatch):
    """A row may use a function of torch, which tells no signature.

    It is taken as it is.
    """
    mine = amd.METHODS["amd"]._replace(W=torch.exp)
    monkeypatch.setitem(amd.METHODS, "mine", mine)

    row = amd.method("mine", tau=2.0)

    assert row.W is torch.exp


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("amd", dict(s=1.1), "choose s in"),
        ("amd", dict(tau=0), "choose tau"),
        ("amd", dict(tau=1e-3), "choose a larger tau"),
        ("dmdr", dict(fade=0), "choose fade"),
        ("amd", dict(lam=-1), "at least 0"),
        ("amd", dict(lam_d=-1), "at least 0"),
        ("amd", dict(gamma=1), "no method has gamma"),
        ("no", {}, "magic, dmdr, amd, naive, reward_forcing"),
    ],
)
def test_method_refuses(name, given, message):
    """A number out of range ends here, and not when training has begun.

    A misspelt name is told with the names that there are.
    """
    with pytest.raises(ValueError, match=message):
        amd.method(name, **given)


def test_the_adapted_teacher_fades_from_three_eighths_to_none():
    """DMDR's half cosine. A row that has it goes back to the real teacher for good.

    The oracle is the cosine at four of its angles: 0, 45, 90 and 180 degrees.
    """
    phi = amd.method("magic", fade=100).phi

    quarter = 0.1875 * (1 + 0.5**0.5)
    close(
        [phi(0), phi(25), phi(50), phi(100)],
        [0.375, quarter, 0.1875, 0.0],
    )
    assert phi(1000) == 0
    assert amd.method("dmd").phi(0) == 0


def test_blend_moves_weights_to_the_fake():
    """r = 0 would be the real teacher, r = 1 the fake.

    Every parameter moves, weights and biases.
    """
    net, real, fake = (nn.Linear(3, 2) for _ in range(3))

    amd.blend(net, real, fake, 0.25)

    assert_close(net.weight, 0.75 * real.weight + 0.25 * fake.weight)
    assert_close(net.bias, 0.75 * real.bias + 0.25 * fake.bias)


def test_blend_leaves_out_what_the_fake_alone_has():
    """A fake that is told exits has a vector for each, in front of the weights here.

    The blend has the teacher's weights by their names, and the teacher has no such vectors.
    """
    net, real, fake = (nn.ModuleDict(dict(out=nn.Linear(3, 2))) for _ in range(3))
    fake = nn.ModuleDict(dict(exits=nn.Embedding(4, 2), out=fake["out"]))

    amd.blend(net, real, fake, 0.25)

    assert_close(net["out"].weight, 0.75 * real["out"].weight + 0.25 * fake["out"].weight)
    assert_close(net["out"].bias, 0.75 * real["out"].bias + 0.25 * fake["out"].bias)


def test_ddmd_asks_ca_at_a_level_of_its_own(monkeypatch):
    """DM is asked at t, CA at v t_G with noise of its own, as D-DMD has it.

    `noisier` takes a level above t_G, as the AMD paper reads it. The oracle is each term by its
    definition, with a teacher that depends on level and condition. The calls are counted too.
    """
    v, eps_ca = torch.rand(8).double(), randn(8, 2)
    calls = []
    monkeypatch.setattr(torch, "rand_like", lambda t: v)
    monkeypatch.setattr(torch, "randn_like", lambda x: eps_ca)

    def real(x_t, t, c):
        calls.append(len(x_t))
        return x_t * amd.like(c + t, x_t)

    schedule = amd.vp(ABAR)
    z = draw(schedule=schedule, t_G=0.8)
    x0_fake, c = randn(8, 2), z.c[:, None]

    for noisier, t in ((False, v * 0.8), (True, 0.8 + v * 0.2)):
        g, d = amd.gradient(
            amd.method("ddmd", noisier=noisier),
            z,
            real,
            x0_fake,
            null=lambda c: 0 * c,
            w=3.0,
            schedule=schedule,
            normalize=False,
        )
        x_ca = amd.renoise(z.x, t, eps_ca, schedule)
        x0_uncond = x_ca * t[:, None]
        x0_cond = x_ca * (c + t[:, None])
        close(d.dm, x0_fake - z.x_t * (c + z.t[:, None]))
        close(d.ca, (3 - 1) * (x0_uncond - x0_cond))
        close(g, d.dm + d.ca)
    assert calls == [8, 16, 8, 16]

    amd.gradient(amd.METHODS["ddmd"], z, real, x0_fake, w=1)
    assert calls[4:] == [8], "without guidance there is no CA to ask"


# --------------------------------------------------------------------------- 7. gradient and losses
@shapes
def test_eq3_one_sgd_step_moves_x_by_g(shape):
    """The student's loss is a regression of x to x - g, so its gradient at x is g / numel.

    SGD at a learning rate of numel must land there, if x is what is trained.
    """
    x, g = randn(*shape).requires_grad_(), randn(*shape)
    before = x.detach().clone()

    loss = amd.student_loss(x, g)
    loss.backward()
    torch.optim.SGD([x], lr=x.numel()).step()

    close(x.detach(), before - g)
    close(loss.item(), g.square().mean().item() / 2)


@shapes
def test_eq1_eq2_eq4_eq18_h_std_is_the_difference_of_scores(shape):
    """DMD's g is the gradient of the KL divergence, up to sigma^2 / alpha.

    The oracle is a pair of Gaussians, data and student, whose scores are known. It is the gradient
    of V_DMD (Eq. 4) as well, by autograd.
    """
    z = draw(shape)
    alpha, sigma = 1 - amd.like(z.t, z.x), amd.like(z.t, z.x)

    def gaussian(mu, var):
        total = alpha**2 * var + sigma**2
        score = (alpha * mu - z.x_t) / total
        x0 = mu + alpha * var / total * (z.x_t - alpha * mu)
        return score, x0

    s_real, x0_real = gaussian(0.3, 2.0)
    s_fake, x0_fake = gaussian(-1.0, 0.5)

    g, _ = amd.gradient(
        amd.METHODS["dmd"],
        z,
        lambda x_t, t, c: x0_real,
        x0_fake,
        normalize=False,
    )

    close(g, sigma**2 / alpha * (s_fake - s_real))
    x = z.x.clone().requires_grad_()
    V = ((x - x0_real) ** 2 - (x - x0_fake) ** 2).sum() / 2
    close(g, torch.autograd.grad(V, x)[0])


@shapes
def test_eq6_normaliser_is_per_sample_and_before_eq13(shape):
    """H is divided by the mean |d_real| of its own sample, which no advantage has changed.

    The oracle does so a sample at a time. When the first sample is moved, no other one sees it.
    """
    z, m = draw(shape), amd.method("amd", s=0.7)

    def gradient_of(z):
        return amd.gradient(
            m,
            z,
            affine(0.5, 1.0),
            affine(0.9)(z.x_t, z.t, z.c),
            null=lambda c: 0 * c,
            w=2.5,
        )

    g, d = gradient_of(z)
    for i in range(8):
        own = amd.Displacements(d.cond[i], d.uncond[i], d.fake[i], 2.5)
        close(
            g[i],
            amd.H_amd(own, z.a[i], 0.7) / d.real[i].abs().mean(),
        )

    moved = torch.cat([z.x[:1] + 1, z.x[1:]])
    x_t = amd.renoise(moved, z.t, z.eps)
    other, _ = gradient_of(z._replace(x=moved, x_t=x_t))
    close(g[1:], other[1:])


def test_eq6_normaliser_survives_a_teacher_that_agrees():
    """Where the real teacher guesses x itself, d_real is 0, and nothing may be divided by it.

    A student that has learned a sample well would otherwise end in NaN.
    """
    z = draw()

    g, _ = amd.gradient(
        amd.method("dmd"),
        z,
        lambda x_t, t, c: z.x,
        randn(8, 2),
    )

    assert g.isfinite().all()


@pytest.mark.parametrize("name", ["dmd", "dmd2", "dmdr"])
def test_eq6_lam_weighs_the_energys_mean_in_the_loss(name):
    """The student's loss has the gradient H / numel + lam grad(mean energy) at x.

    The normaliser divides H alone, so lam means the same with and without it. The oracle takes H
    from the displacements, and the force by autograd.
    """
    z, truth = draw(), randn(8, 2)
    closures = dict(
        dmd=lambda c: truth,
        dmd2=lambda x_t, t, c: x_t.sin().sum(1),
        dmdr=lambda x, c: x.cos().sum(1),
    )
    m = amd.method(name, lam=0.3)
    x = z.x.clone().requires_grad_()

    g, d = amd.gradient(
        m,
        z,
        affine(0.5),
        randn(8, 2),
        closure=closures[name],
    )
    got = torch.autograd.grad(amd.student_loss(x, g), x)[0]

    energy = m.F_ext[1](x, z, closures[name], amd.flow).mean()
    (F_ext,) = torch.autograd.grad(energy, x)
    H = (d.real - d.fake) / d.real.abs().mean(1, keepdim=True)
    close(got, H / 16 + 0.3 * F_ext)


@shapes
def test_eq14_is_the_weighted_loss_of_the_networks_own_prediction(shape):
    """Space "eps" is the loss of a noise network, "flow" that of a velocity, "x0" that of x0.

    The oracle adds up the samples one by one, each with its weight once.
    """
    z, schedule = draw(shape), amd.vp(ABAR)
    all_but_x_t = {k: v for k, v in z._asdict().items() if k != "x_t"}
    on_grid = draw(shape, schedule, **all_but_x_t)

    def net(x_t, t, c):
        return torch.tanh(x_t) + amd.like(t + c, x_t)

    def by_hand(guess, true):
        total = 0
        for i in range(8):
            total += z.weight[i] * (guess[i] - true[i]).square().mean()
        return total / 8

    velocity = net(z.x_t, z.t, z.c)
    x0 = amd.x0_from_flow(net)(z.x_t, z.t, z.c)
    close(
        amd.fake_loss(z, x0),
        by_hand(velocity, z.eps - z.x),
    )

    x0 = net(z.x_t, z.t, z.c)
    close(
        amd.fake_loss(z, x0, space="x0"),
        by_hand(x0, z.x),
    )

    eps = net(on_grid.x_t, schedule.index(z.t), z.c)
    x0 = amd.x0_from_eps(net, schedule)(on_grid.x_t, z.t, z.c)
    close(
        amd.fake_loss(on_grid, x0, schedule, "eps"),
        by_hand(eps, z.eps),
    )


def test_critic_loss_tells_real_from_student():
    """The discriminator learns that its input is real, or the student's, in one call.

    Both have the same level and the same noise, so nothing but the sample tells them apart. The
    oracle is the cross-entropy, written with sigmoids.
    """
    z, truth = draw(), randn(8, 2)
    calls = []

    def logits(x_t, t, c):
        calls.append((t, c))
        return x_t.sum(1)

    loss = amd.critic_loss(z, lambda c: truth, logits)

    x_t = amd.renoise(truth, z.t, z.eps)
    p_student = torch.sigmoid(z.x_t.sum(1))
    p_real = torch.sigmoid(x_t.sum(1))
    close(
        loss,
        (-(1 - p_student).log() - p_real.log()).mean(),
    )
    ((t, c),) = calls
    assert t.equal(torch.cat([z.t, z.t]))
    assert c.equal(torch.cat([z.c, z.c]))


def test_the_tilt_is_the_fixed_point_of_amd_but_not_of_naive():
    """At w = 1, p_student ~ p_real exp(a / tau), and Eq. 14's best fake, the update of AMD is 0.

    All atoms of a discrete p_real meet at one x_t, each by its own eps, and count by the density
    of that eps: the oracle is E[x0 | x_t].
    """
    n = 8
    t, tau = 0.6, 0.7
    x_t = randn(2)
    x = randn(n, 2)
    p_real = randn(n).softmax(0)
    a = randn(n).clamp(-1, 1)
    eps = (x_t - (1 - t) * x) / t
    density = (-eps.square().sum(1) / 2).exp()

    share = p_real * density
    x0_real = (share[:, None] * x).sum(0) / share.sum()
    p_student = p_real * (a / tau).exp()
    z = draw(
        (n, 2),
        c=torch.zeros(n),
        x=x,
        a=a,
        weight=p_student * density * amd.W_exp(a, tau),
        t=torch.full((n,), t).double(),
        eps=eps,
    )

    x0_fake = x0_real.clone().requires_grad_()
    loss = amd.fake_loss(z, x0_fake.expand(n, 2))
    (grad,) = torch.autograd.grad(loss, x0_fake)
    close(grad, 0 * x_t)  # so the best fake is the real teacher

    x0 = x0_real.expand(n, 2)
    for name, still in (("amd", True), ("naive", False)):
        g, _ = amd.gradient(
            amd.method(name),
            z,
            lambda *_: x0,
            x0,
            normalize=False,
        )
        assert (g.abs().max() < 1e-9) == still


# ---------------------------------------------------------------------------------- 8. the student
LEVELS = [1.0, 0.6, 0.3]


@pytest.mark.parametrize(
    "u, k",
    [
        (0, 0),
        (0.33, 0),
        (0.34, 1),
        (0.67, 2),
        (0.999, 2),
        (1, 2),
    ],
)
def test_backward_simulation_by_hand(u, k):
    """u picks exit k of three; there is new noise in between; the exit's call alone has a graph.

    The oracle is the loop over levels, written out with the same seed. Its gradient at the weights
    must be the same too.
    """
    net = nn.Linear(2, 2)
    z, c = torch.randn(8, 2), torch.zeros(8)
    seen = []

    def schedule(t):
        return 1 - t**2, t

    def denoise(x_t, t, c):
        seen.append(t)
        return net(x_t) * amd.like(t, x_t)

    torch.manual_seed(3)
    made = amd.backward_simulation(denoise, z, c, LEVELS, u, schedule)

    torch.manual_seed(3)
    x_t = z
    with torch.no_grad():
        for t, low in pairwise(LEVELS[: k + 1]):
            x_t = (1 - low**2) * net(x_t) * t + low * torch.randn(8, 2)
    want = net(x_t) * LEVELS[k]

    assert_close(made.x, want)
    assert made.t_G == LEVELS[k]
    assert made.number == k + 1
    assert len(seen) == k + 1
    assert_close(seen[-1], torch.full((8,), LEVELS[k]))
    got, by_hand = (torch.autograd.grad(v.sum(), net.weight)[0] for v in (made.x, want))
    assert_close(got, by_hand)


def test_an_exit_repeats_its_call_alone():
    """With several micro-batches the exit is called again, and all steps before it are spared.

    The call must make the same x, at the same level.
    """
    calls = []

    def denoise(x_t, t, c):
        calls.append(t[0].item())
        return x_t * amd.like(t, x_t)

    made = amd.backward_simulation(denoise, torch.randn(8, 2), None, LEVELS, 0.5)

    assert made.again().equal(made.x)
    assert_close(calls, [1.0, 0.6, 0.6])


@pytest.mark.parametrize(
    "levels",
    [
        [],
        [999, 499],
        [0.5, 1.0],
        [1.0, 1.0],
        [0.5, -0.1],
    ],
)
def test_backward_simulation_refuses_levels(levels):
    """A student goes from noise to data, so its levels fall, within [0, 1].

    Time steps of a DDPM's grid are what a user may give by mistake.
    """
    with pytest.raises(ValueError, match="fall within"):
        amd.backward_simulation(affine(1), torch.randn(8, 2), torch.zeros(8), levels)


def test_backward_simulation_refuses_a_level_without_signal():
    """On the grid of the DDPM paper alpha is .006 at level 1.

    A guess x0 = (x_t - sigma eps) / alpha would be noise there, while rewards look alive. The limit
    is an alpha of .05, and the message names a level that is far from it.
    """
    schedule = amd.vp((1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0))
    begin = partial(
        amd.backward_simulation,
        amd.x0_from_eps(lambda x_t, i, c: x_t, schedule),
        torch.randn(8, 2),
        None,
        schedule=schedule,
    )

    with pytest.raises(ValueError, match=r"alpha is 0\.0064 at level 1, .* begin at") as error:
        begin([1.0])

    advice = re.search(r"begin at level ([\d.]+)", str(error.value))
    level = float(advice[1])
    alpha, _ = schedule(torch.tensor(level))
    assert 0.3 <= alpha < 0.303
    assert begin([level]).t_G == level

    limit = schedule.level(0.05)
    assert begin([limit]).t_G == limit
    with pytest.raises(ValueError, match="begin at"):
        begin([limit + 0.001])


def test_a_schedule_that_was_left_out_is_missed():
    """A noise network's Denoiser knows its own schedule; another one would be silent nonsense.

    It is left out easily, because flow matching is the default.
    """
    denoise = amd.x0_from_eps(lambda x_t, i, c: x_t, amd.vp(ABAR))

    with pytest.raises(ValueError, match="pass it on as schedule="):
        amd.backward_simulation(denoise, torch.randn(8, 2), None, [0.5])


def test_sdxls_first_time_step_is_not_refused():
    """A student of SDXL begins at time step 999, as DMD2's does, and alpha is .068 there.

    So little signal is still above the limit of .05.
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    schedule = amd.vp((1 - beta).cumprod(0))
    denoise = amd.x0_from_eps(lambda x_t, i, c: 0 * x_t, schedule)

    made = amd.backward_simulation(
        denoise,
        torch.randn(8, 2),
        None,
        [0.999],
        schedule=schedule,
    )

    assert made.t_G == 0.999


def test_a_student_in_half_precision_is_rolled_out_in_float32():
    """Noise between the steps, and d = x - x0_hat, need more digits than bfloat16 has.

    A student of the caller's own that answers in bfloat16 is cast too.
    """
    z = torch.randn(8, 2, dtype=torch.bfloat16)

    denoise = amd.x0_from_flow(lambda x_t, t, c: x_t)
    made = amd.backward_simulation(denoise, z, None, [1.0])
    assert made.x.dtype == torch.float32

    half = amd.rollout(
        lambda c, u: (z, 1.0),
        c=None,
        u=0.5,
        seed=0,
        grad=False,
    )
    assert half.x.dtype == torch.float32


# --------------------------------------------------------------- 9. Algorithm 1, on small networks
class Net(nn.Module):
    """Denoiser of (B, 2) with a discriminator's head; float64.

    It sees the level of the student's exit where its condition tells it.
    """

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(5, 16).double()
        self.out = nn.Linear(16, 2).double()
        self.head = nn.Linear(16, 1).double()

    def forward(self, x_t, t, c, head=False):
        exit_level = c.get("exit", 0 * t)
        inputs = [
            x_t,
            t[:, None],
            c["y"][:, None],
            exit_level[:, None],
        ]
        h = self.body(torch.cat(inputs, 1)).tanh()
        return self.head(h)[:, 0] if head else self.out(h)


class Setting:
    """Networks, optimizers and closures on which every method runs.

    Iteration n has the same samples in any layout of ranks and micro-batches, and the same noise
    too, if randn_like and rand_like are `hashed`. calls counts what is called.
    """

    def __init__(self, ranks=None, accum=1, shard=lambda net: net):
        self.student, self.fake, self.real, self.blended = (shard(Net(i)) for i in (1, 2, 3, 3))
        self.opt_student = torch.optim.AdamW(self.student.parameters(), 1e-2)
        self.opt_fake = torch.optim.AdamW(self.fake.parameters(), 1e-2)
        self.ranks = ranks or amd.Ranks()
        self.accum = accum
        self.calls = Counter()

    def batch(self, n, j):
        """This rank's micro-batch j of the eight samples of iteration n.

        A sample has a class y and the student's noise z. Its tag is a leaf that is no tensor.
        """
        g = torch.Generator().manual_seed(amd.key(0, n))
        c = dict(
            y=torch.arange(8).double() // 4 % 3,
            z=torch.randn(8, 2, generator=g, dtype=torch.float64),
        )
        size = 8 // (self.ranks.size * self.accum)
        first = (self.ranks.rank * self.accum + j) * size
        mine = {k: v[first : first + size] for k, v in c.items()}
        return mine | dict(tag="yes")

    def generate(self, c, u):
        """The student: two steps from the noise in its condition, and an exit after each."""

        def denoise(x_t, t, c):
            self.calls["student, with graph" if torch.is_grad_enabled() else "student"] += 1
            return self.student(x_t, t, c)

        return amd.backward_simulation(denoise, c["z"], c, [1.0, 0.5], u)

    def ask_real(self, x_t, t, c):
        self.calls["real"] += 1
        return self.real(x_t, t, c)

    def ask_fake(self, x_t, t, c):
        self.calls["fake"] += 1
        return self.fake(x_t, t, c)

    def reward(self, x, c):
        """A smooth reward that differs from class to class.

        DMDR calls it with a graph too, for its gradient, which does not count as asking it.
        """
        if not torch.is_grad_enabled():
            self.calls["reward"] += 1
        return x[:, 0] - x[:, 1] ** 2 * c["y"]

    def adapt(self, r):
        """The real teacher with its weights moved to the fake's, by r."""
        amd.blend(self.blended, self.real, self.fake, r)

        def ask_blended(x_t, t, c):
            self.calls["real"] += 1
            return self.blended(x_t, t, c)

        return ask_blended

    def aware(self, c, t_G):
        """The condition of a fake that is told the student's exit."""
        return dict(c, exit=torch.full_like(c["y"], t_G))

    def train(self, method, **given):
        """amd.train on all of this, but for what is given.

        Each closure that any method may call is there, and an update has two iterations.
        """
        options = dict(
            reward=self.reward,
            null=lambda c: dict(c, y=0 * c["y"]),
            adapt=self.adapt,
            truth=lambda c: c["z"].cos(),
            logits=lambda x_t, t, c: self.fake(x_t, t, c, head=True),
            K=4,
            w=1.5,
            fake_steps=2,
            accum=self.accum,
            ranks=self.ranks,
        )
        networks = dict(
            student=self.generate,
            real=self.ask_real,
            fake=self.ask_fake,
            batch=self.batch,
            opt_student=self.opt_student,
            opt_fake=self.opt_fake,
        )
        return amd.train(method, **networks | options | given)

    def run(self, method, updates, **given):
        """Some student updates -> the log of each."""
        logs = self.train(method, **given)
        return [next(logs) for _ in range(updates)]

    def weights(self):
        """All weights of student and fake, whole, by name.

        They are copies, so what comes after does not change them.
        """
        found = {}
        for name, net in (("student", self.student), ("fake", self.fake)):
            for k, p in net.named_parameters():
                whole = p.full_tensor() if hasattr(p, "full_tensor") else p
                found[f"{name}.{k}"] = whole.detach().clone()
        return found


def hashed(v):
    """Noise that depends on the sample alone, and not on where it lies.

    It stands for randn_like and rand_like where layouts are compared.
    """
    return torch.sin(999 * v.detach())


def lively(name):
    """A method with all its parts at work for three updates.

    It has a force, a teacher that fades within them, and weights that are far from 1.
    """
    return amd.method(
        name,
        lam=0.2,
        tau=0.5,
        fade=3,
        unit_w=True,
    )


def plain_sgd(it, lr):
    """Optimizers for Setting.run whose steps are the gradients times lr.

    AdamW's steps would hide a wrong scale.
    """
    return dict(
        opt_student=torch.optim.SGD(it.student.parameters(), lr),
        opt_fake=torch.optim.SGD(it.fake.parameters(), lr),
    )


def clipped_step(it, update):
    """One update by plain SGD, whose norms `update` clips -> weights.

    tests/test_running.py compares the steps of one process and of two by it.
    """
    it.run(
        amd.method("amd"),
        1,
        **plain_sgd(it, 1.0),
        update=update,
        K=8,
    )
    return it.weights()


def test_algorithm1_by_a_literal_loop():
    """Alg. 1 line by line, a sample at a time, with plain SGD.

    Only the draws come from where the docstring of `train` says. The weights of both networks must
    be the same after an update, which is two iterations.
    """
    K, seed = 4, 5
    s, tau = 0.7, 0.8
    w, lr = 1.5, 0.1
    it = Setting()
    G, psi = copy.deepcopy(it.student), copy.deepcopy(it.fake)
    (log,) = it.run(
        amd.method("amd", s=s, tau=tau),
        1,
        **plain_sgd(it, lr),
        update=partial(amd.update, clip=math.inf),
        seed=seed,
        shift=2,
        normalize=False,
        w=w,
    )

    losses = []
    for n in range(2):
        # What the ranks draw alike: the exit, and a level for each of two groups.
        shared = torch.Generator().manual_seed(amd.key(seed, n))
        u = torch.rand((), generator=shared).item()
        t = 0.02 + 0.96 * torch.rand(2, generator=shared, dtype=torch.float64)  # l. 8
        t = (2 * t / (1 + t)).clamp(0.02, 0.98)

        # The batch, its samples, their noise and their rewards.
        c = it.batch(n, 0)  # l. 2
        torch.manual_seed(amd.key(seed, n, 0, 0))
        x, *_ = amd.backward_simulation(G, c["z"], c, [1.0, 0.5], u)  # l. 3
        eps = torch.randn_like(x)  # l. 10
        r = it.reward(x.detach(), c).tolist()  # l. 4

        grad_G = [torch.zeros_like(p) for p in G.parameters()]
        grad_psi = [torch.zeros_like(p) for p in psi.parameters()]
        for i in range(8):
            # Its advantage within its group.
            first = i // K * K
            group = r[first : first + K]
            mu = sum(group) / K  # l. 5
            sigma = (sum((v - mu) ** 2 for v in group) / K) ** 0.5
            a = max(-1, min(1, (r[i] - mu) / (sigma + 1e-6)))  # l. 6

            # Three guesses, one at a time.
            c_i = {k: v if k == "tag" else v[i : i + 1] for k, v in c.items()}
            empty = dict(c_i, y=0 * c_i["y"])
            t_i, x_i = t[i // K].view(1), x[i : i + 1]
            x_t = ((1 - t_i) * x_i + t_i * eps[i]).detach()  # l. 11
            d_cond = x_i - it.real(x_t, t_i, c_i)  # l. 12-13
            d_uncond = x_i - it.real(x_t, t_i, empty)
            d_fake = x_i - psi(x_t, t_i, c_i)

            # The student's gradient; it moves in the first iteration only.
            alpha, beta = 1 + s * a, 1 - s * a  # l. 14
            dm = d_cond - d_fake
            ca = (w - 1) * (d_cond - d_uncond)
            g = beta * dm + alpha * ca  # l. 15
            if n == 0:
                add_gradients(grad_G, (g.detach() * x_i).sum() / 16, G)  # l. 16

            # The fake's loss, of its guess as a velocity.
            W = math.exp(-a / tau)  # l. 17
            v_hat = (x_t - psi(x_t, t_i, c_i)) / t_i
            v = eps[i] - x_i.detach()
            loss = W * (v_hat - v).square().mean() / 8  # l. 18
            add_gradients(grad_psi, loss, psi)  # l. 19
            losses.append(loss.item())

        descend(G, grad_G, lr)  # l. 21
        descend(psi, grad_psi, lr)  # l. 22

    for net, by_hand in ((it.student, G), (it.fake, psi)):
        for p, q in zip(net.parameters(), by_hand.parameters(), strict=True):
            close(p, q)
    close(float(log["loss_fake"]), sum(losses) / 2)
    assert (log["step"], log["fake_step"], log["skipped"]) == (1, 2, 0)


def add_gradients(totals, loss, net):
    """Add the gradients of a loss to totals, a tensor for each parameter of net."""
    grads = torch.autograd.grad(
        loss,
        [*net.parameters()],
        retain_graph=True,
        allow_unused=True,
    )
    for total, v in zip(totals, grads, strict=True):
        if v is not None:
            total += v


@torch.no_grad()
def descend(net, grads, lr):
    """A step of plain SGD, by hand."""
    for p, v in zip(net.parameters(), grads, strict=True):
        p -= lr * v


@pytest.mark.parametrize("name", ["dmd", "dmd2", "dmdr", "amd"])
def test_algorithm1_on_a_ddpms_grid(name):
    """One iteration with noise networks, a schedule of N time steps, forces and a discriminator.

    The oracle uses alphas_cumprod and autograd alone: H / numel + lam grad(mean energy) for the
    student; the loss of the noise, and lam_d times that of the discriminator, for the fake.
    """
    lam, lam_d = 0.3, 0.2
    lr, seed = 0.1, 5
    it, schedule = Setting(), amd.vp(ABAR)
    G, psi = copy.deepcopy(it.student), copy.deepcopy(it.fake)

    def noise_net(net):
        return amd.x0_from_eps(lambda x_t, i, c: net(x_t, i / 1000, c), schedule)

    def generate(c, u):
        denoise = noise_net(it.student)
        return amd.backward_simulation(denoise, c["z"], c, [0.9], u, schedule)

    it.run(
        amd.method(name, lam=lam, lam_d=lam_d),
        1,
        student=generate,
        real=noise_net(it.real),
        fake=noise_net(it.fake),
        adapt=lambda r: noise_net(it.real),  # of dmdr: as it is
        **plain_sgd(it, lr),
        update=partial(amd.update, clip=math.inf),
        schedule=schedule,
        space="eps",
        seed=seed,
        fake_steps=1,
        normalize=False,
        w=1.5,
    )

    # The draws: the exit, which is the only one, a level for each group, and the noise.
    shared = torch.Generator().manual_seed(amd.key(seed, 0))
    torch.rand((), generator=shared)  # u
    t = 0.02 + 0.96 * torch.rand(2, generator=shared, dtype=torch.float64)
    t = t.repeat_interleave(4)
    c = it.batch(0, 0)
    torch.manual_seed(amd.key(seed, 0, 0, 0))

    def x0(net, x_t, t, c):
        """x0 = (x_t - sigma eps) / alpha, where the network sees the time step."""
        i = (1000 * t).round().clamp(0, 999).long()
        abar = ABAR[i][:, None]
        eps_hat = net(x_t, i / 1000, c)
        return (x_t - (1 - abar).sqrt() * eps_hat) / abar.sqrt()

    x = x0(G, c["z"], torch.full((8,), 0.9).double(), c)
    eps = torch.randn_like(x)

    def noised(x):
        abar = ABAR[(1000 * t).round().long()][:, None]
        return abar.sqrt() * x + (1 - abar).sqrt() * eps

    def D(x):
        return psi(noised(x), t, c, head=True)

    # The guesses of both teachers, and the method's energy.
    x_t = noised(x.detach())
    real = x0(it.real, x_t, t, c)
    empty = x0(it.real, x_t, t, dict(c, y=0 * c["y"]))
    fake = x0(psi, x_t, t, c)
    dm = (fake - real).detach()
    ca = 0.5 * (empty - real).detach()
    r = it.reward(x, c)
    truth = c["z"].cos()
    energy = dict(
        dmd=0.5 * (x - truth).square().mean(1),
        dmd2=-F.logsigmoid(D(x)),
        dmdr=-r,
        amd=0 * r,
    )[name]

    # Both losses.
    a, W = torch.zeros(8, 1), torch.ones(8)
    if name == "amd":
        a = amd.group_advantage(r, 4)[:, None]
        W = (-a[:, 0]).exp()
    H = (1 - 0.5 * a) * dm + (1 + 0.5 * a) * ca
    loss_G = (H * x).sum() / 16 + lam * energy.mean()
    eps_hat = psi(x_t, (1000 * t).round() / 1000, c)
    loss_psi = (W * (eps_hat - eps).square().mean(1)).mean()
    if name == "dmd2":
        log_right = F.logsigmoid(-D(x.detach())) + F.logsigmoid(D(truth))
        loss_psi = loss_psi - lam_d * log_right.mean()

    for net, by_hand, loss in ((it.student, G, loss_G), (it.fake, psi, loss_psi)):
        grads = [torch.zeros_like(p) for p in by_hand.parameters()]
        add_gradients(grads, loss, by_hand)
        descend(by_hand, grads, lr)
        for p, q in zip(net.parameters(), by_hand.parameters(), strict=True):
            close(p, q, rtol=1e-7, atol=1e-9)


def test_each_row_of_table1_ends_elsewhere():
    """No two methods are the same in training, so no part of a row is dropped on the way.

    And so do a GAN of another weight, DMD without pairs, and D-DMD read the other way: all ends of
    the student's last layer after three updates are apart.
    """
    rows = {name: amd.method(name, lam=0.2, fade=3) for name in amd.METHODS}
    rows["noisier"] = amd.method("ddmd", noisier=True)
    rows["no pairs"] = amd.method("dmd")
    rows["critic"] = rows["dmd2"]._replace(lam_d=1)

    ends = []
    for row in rows.values():
        it = Setting()
        it.run(row, 3)
        ends.append(it.student.out.weight.detach().flatten())

    distance = torch.cdist(torch.stack(ends), torch.stack(ends))
    assert (distance + torch.eye(len(rows)) > 1e-6).all()


@methods
@pytest.mark.parametrize("accum", [1, 2])
def test_an_update_calls_each_network_as_often_as_it_must(name, accum):
    """Two updates of two iterations, in which the student's exit is always its second step.

    The fake is called once for each x_t. The reward is called where H or W reads it, and once an
    update for the log. D-DMD alone asks the real teacher twice. With accum = 2 the student is
    rolled out without a graph, and repeats its exit's call alone.
    """
    it = Setting(accum=accum)

    it.run(lively(name), 2, student=lambda c, u: it.generate(c, 0.9))

    iterations, turns = 4 * accum, 2 * accum
    reads = name in ("amd", "naive", "reward_forcing")
    without_graph = 2 * iterations if accum == 2 else 2 * iterations - turns
    assert it.calls == {
        "fake": iterations,
        "real": 2 * turns if name == "ddmd" else turns,
        "reward": iterations if reads else turns,
        "student": without_graph,
        "student, with graph": turns,
    }


@pytest.fixture
def hashed_noise(monkeypatch):
    """Noise that depends on the sample alone, so that any layout of a batch draws the same.

    Without it each micro-batch would draw other noise, and the weights could not be the same.
    """
    monkeypatch.setattr(torch, "randn_like", hashed)
    monkeypatch.setattr(torch, "rand_like", hashed)


@methods
@pytest.mark.parametrize("aware", [False, True])
def test_micro_batches_change_nothing(name, aware, hashed_noise):
    """A group of 8 lies in one batch, or spans two micro-batches: same weights, same log.

    So a user who has less memory may split the batch, and keep all hyper-parameters.
    tests/test_running.py has the same for ranks.
    """
    ends, logs = [], []
    for accum in (1, 2):
        it = Setting(accum=accum)
        log = it.run(
            lively(name),
            2,
            K=8,
            aware=it.aware if aware else None,
        )[-1]
        logs.append(log)
        ends.append(it.weights())

    close(ends[1], ends[0], rtol=1e-9, atol=1e-9)
    assert logs[1].keys() == logs[0].keys()
    for k in logs[1].keys() & {"reward", "reward_std", "adv_clip", "w_mean"}:
        close(float(logs[1][k]), float(logs[0][k]))


def test_the_fake_alone_is_aware_of_the_exit():
    """It is told t_G; real teacher, reward and student see the condition as it is.

    Eight updates are 16 iterations, in which both exits are met.
    """
    it, seen = Setting(), Counter()

    def fake(x_t, t, c):
        seen[c["exit"][0].item()] += 1
        return it.fake(x_t, t, c)

    def real(x_t, t, c):
        assert "exit" not in c
        return it.real(x_t, t, c)

    it.run(amd.method("amd"), 8, aware=it.aware, fake=fake, real=real)

    assert seen.keys() == {1.0, 0.5}
    assert seen.total() == 16


class Causal(Setting):
    """A student that makes a sequence of three points, each after those before it: a stream.

    It answers (x, t_G), and no call that would make x again.
    """

    def generate(self, c, u):
        points, past = [], torch.zeros_like(c["z"])
        for step in range(3):
            z = c["z"].roll(step, 1)
            made = amd.backward_simulation(self.student, z + past, c, [1.0, 0.5], u)
            points.append(made.x)
            past = made.x.detach()
        return torch.stack(points, 2), made.t_G

    @staticmethod
    def each_point(net):
        """A teacher that looks at the points one by one."""
        return lambda x_t, t, c: torch.stack([net(p, t, c) for p in x_t.unbind(2)], 2)


@pytest.mark.parametrize("name", ["amd", "ddmd"])
def test_a_causal_student_is_rolled_out_whole_for_each_micro_batch(name, hashed_noise):
    """It tells no exit to repeat, so the second rollout repeats all; the weights are the same.

    The oracle is one batch, in which nothing is repeated.
    """
    ends = []
    for accum in (1, 2):
        it = Causal(accum=accum)
        before = it.weights()
        it.run(
            amd.method(name),
            3,
            reward=lambda x, c: x.sum((1, 2)),
            real=it.each_point(it.real),
            fake=it.each_point(it.fake),
        )
        ends.append(it.weights())

    close(ends[1], ends[0], rtol=1e-9, atol=1e-9)
    moved = ends[0]["student.out.weight"]
    assert not moved.equal(before["student.out.weight"])


def test_a_run_goes_on_where_it_was():
    """`start` is all the state that `train` has, beside networks and optimizers.

    Four updates in one go are the oracle for two and two, bit for bit.
    """
    whole, cut = Setting(), Setting()

    whole.run(amd.method("amd"), 4)
    cut.run(amd.method("amd"), 2)
    cut.run(amd.method("amd"), 2, start=2)

    want = whole.weights()
    assert all(v.equal(want[k]) for k, v in cut.weights().items())


def test_every_rank_draws_its_own_noise_at_the_same_levels():
    """Samples must differ, but the exit must not: under FSDP2 all ranks make the same calls.

    Each rank has four rollouts here. A stand-in for gather lets one process be one rank of two.
    """
    noise, exits = [], []
    for rank in (0, 1):
        it = Setting(ranks=amd.Ranks(rank, 2, lambda v: torch.cat([v, v])))

        def student(c, u, it=it):
            noise.append(torch.randn(3))
            exits.append(u)
            return it.generate(c, u)

        it.run(
            amd.method("dmd"),
            2,
            student=student,
            K=8,
            update=lambda opts: amd.update(opts),
        )

    assert len({tuple(v.tolist()) for v in noise}) == 8
    assert exits[:4] == exits[4:]


def test_every_micro_batch_draws_its_own_noise():
    """Micro-batches stand for one batch, in which no two samples share noise.

    That is so for the student's noise, in each of eight rollouts, and for the noise at which the
    teachers are asked, in each of four turns of the student.
    """
    it = Setting(accum=2)
    noise, draws = [], []

    def student(c, u):
        noise.append(torch.randn(3))
        return it.generate(c, u)

    def probe(draw, d, g):
        draws.append(draw.eps)
        return {}

    it.run(amd.method("amd"), 2, student=student, probe=probe)

    assert len({tuple(v.tolist()) for v in noise}) == 8
    assert len({tuple(v.flatten().tolist()) for v in draws}) == 4


def test_the_teacher_is_adapted_by_the_updates_done():
    """Once an update, by phi of its number; where r is 0 the real teacher itself is asked.

    With fade = 3 that is so from the fourth update on.
    """
    it, asked = Setting(), []

    def adapt(r):
        asked.append(r)
        return it.adapt(r)

    it.run(amd.method("magic", fade=3), 5, adapt=adapt)

    close(asked, [amd.faded(step, fade=3) for step in (0, 1, 2)])


def test_an_exit_that_repeats_another_x_is_refused():
    """The gradient g would be applied to an x for which it was not computed.

    Dropout draws anew, here by noise of its own, and a student that changes its exit's x leaves
    `again` behind.
    """
    for change in (lambda x: 3 * x, lambda x: x + torch.randn_like(x)):
        it = Setting(accum=2)

        def student(c, u, it=it, change=change):
            made = it.generate(c, u)
            return made._replace(x=change(made.x))

        with pytest.raises(ValueError, match="made another x"):
            it.run(amd.method("amd"), 1, student=student)


def test_levels_are_shared_by_a_group():
    """Rewards are compared within a group, so its samples have one level; groups have many."""
    t = amd.draw_levels(torch.Generator().manual_seed(1), 4000, 4, (0.1, 0.9))

    assert t.view(-1, 4).std(1).max() == 0
    assert len(t.unique()) > 990
    assert 0.1 <= t.min() < 0.11
    assert 0.89 < t.max() <= 0.9


def test_levels_of_video_are_self_forcings():
    """Uniform in [0, 1], shifted by 5, clamped to [.02, .98]: 9.3 % are at .98, half above .833.

    These shares are the inverse of the shift at .98 and its value at .5.
    """
    t = amd.draw_levels(torch.Generator().manual_seed(1), 40000, 1, (0, 1), 5.0, (0.02, 0.98))

    assert t.min() == 0.02
    assert t.max() == 0.98
    assert abs((t == 0.98).double().mean() - (1 - 49 / 54)) < 0.005
    assert abs(t.median() - 5 / 6) < 0.005


def test_a_shift_multiplies_the_noise_to_signal_ratio_of_flow():
    """Nothing and noise stay what they are."""
    t = torch.linspace(0, 0.99, 100).double()
    alpha, sigma = amd.flow(t)
    alpha_5, sigma_5 = amd.flow(amd.shifted(t, 5.0))
    close(sigma_5 / alpha_5, 5 * sigma / alpha)
    assert amd.shifted(1.0, 5.0) == 1


def test_a_sample_may_have_a_level_of_its_own():
    """Alg. 1 draws one for a group of K; LongLive one for each video."""
    for alone, levels in ((False, 2), (True, 8)):
        it, seen = Setting(), []

        def probe(draw, d, g, seen=seen):
            seen.extend(draw.t.tolist())
            return {}

        it.run(amd.method("amd"), 1, probe=probe, t_per_sample=alone, t_range=(0, 1))
        assert len({*seen}) == levels


def test_each_draw_has_a_seed_of_its_own():
    """Numbers are not just strung together: (12, 3), (1, 23) and (123,) are three draws.

    Two draws with one seed would have the same noise.
    """
    ints = [(0,), (1,), (0, 1), (1, 0), (0, 0), (12, 3), (1, 23), (123,)]

    assert len({amd.key(*given) for given in ints}) == 8


# -------------------------------------------------------------------------------- the log of train
def test_the_log_says_what_the_reward_was():
    """A user watches these numbers, so they must be what their names say.

    The oracle computes them from the rewards that were asked: two iterations with two groups each.
    """
    it, r = Setting(), []

    def reward(x, c):
        r.append(it.reward(x, c))
        return r[-1]

    (log,) = it.run(amd.method("amd", tau=0.3), 1, reward=reward)

    groups = torch.stack(r).view(-1, 4)
    mean = groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True, unbiased=False)
    a = ((groups - mean) / (std + 1e-6)).clamp(-1, 1)
    close(float(log["reward"]), groups.mean().item())
    close(float(log["reward_std"]), std.mean().item())
    close(float(log["w_mean"]), (-a / 0.3).exp().mean().item())
    close(float(log["adv_clip"]), (a.abs() == 1).double().mean().item())


def test_the_log_says_what_the_reward_of_each_exit_was():
    """A reward may lift one exit of a student and lower another, and the mean tells neither.

    An update has two iterations, and each has one exit. The oracle sorts the rewards that were
    asked by the levels at which the exits' calls began: 1 is the first exit's, 0.5 the second's.
    """
    it, levels, r = Setting(), [], []

    def student(c, u):
        made = it.generate(c, u)
        levels.append(made.t_G)
        return made

    def reward(x, c):
        r.append(it.reward(x, c))
        return r[-1]

    logs = it.run(amd.method("amd"), 6, student=student, reward=reward)

    assert {*levels} == {1.0, 0.5}
    for k, log in enumerate(logs):
        of_update = [*zip(levels, r, strict=True)][2 * k : 2 * k + 2]
        for level, number in ((1.0, 1), (0.5, 2)):
            groups = [v.view(2, 4) for at, v in of_update if at == level]
            told = f"reward_exit_{number}" in log, f"reward_std_exit_{number}" in log
            assert told == (bool(groups), bool(groups))
            if groups:
                groups = torch.cat(groups)
                close(float(log[f"reward_exit_{number}"]), groups.mean().item())
                std = groups.std(1, unbiased=False).mean().item()
                close(float(log[f"reward_std_exit_{number}"]), std)
        if len({level for level, _ in of_update}) == 2:
            mean = (log["reward_exit_1"] + log["reward_exit_2"]) / 2
            close(float(log["reward"]), float(mean))


@pytest.mark.parametrize("kind", ["one step", "a pair"])
def test_the_log_has_no_reward_of_an_exit_where_there_is_one(kind):
    """It would say the same twice. Nor does a student that tells no number have any."""
    it = Setting()

    def student(c, u):
        made = amd.backward_simulation(it.student, c["z"], c, [1.0], u)
        return made if kind == "one step" else (made.x, made.t_G)

    (log,) = it.run(amd.method("amd"), 1, student=student)

    assert "reward" in log
    assert not any("exit" in k for k in log)


def test_the_log_says_how_large_the_terms_are():
    """Without guidance there is no CA, and the gradient is DM.

    A method that reads no reward has none in its log. A size is the root mean square of a sample,
    averaged over samples.
    """
    it = Setting()

    (log,) = it.run(
        amd.method("dmd"),
        1,
        w=1,
        normalize=False,
        reward=None,
    )

    assert log["ca_norm"] == 0 < log["dm_norm"]
    assert log["g_norm"] == log["dm_norm"]  # H = DM without guidance
    assert "reward" not in log
    assert amd.rms(f64([[3, -3], [1, 1]])) == 2


def test_pairs_count_as_clipped():
    """At K = 2 every advantage is +-1, but for Eq. 12's eps, which keeps it just below.

    A share of 0 in the log would mislead.
    """
    it = Setting()

    (log,) = it.run(
        amd.method("amd"),
        1,
        K=2,
        reward=lambda x, c: 100 * it.reward(x, c),
    )

    assert log["adv_clip"] == 1


def test_unit_w_divides_by_the_mean():
    """A low tau makes W large, and with it the fake's loss; unit_w keeps that loss in scale.

    The mean of W in the log is 1 then, at any tau.
    """
    method = amd.method("amd", tau=0.3, unit_w=True)

    (log,) = Setting().run(method, 1)

    close(float(log["w_mean"]), 1.0)


def test_a_probe_adds_numbers_to_the_log():
    """A user's own measure sees the draw, the displacements and the gradient of each turn.

    Here it looks at all three: at w = 1 both guesses of the real teacher are one.
    """

    def probe(draw, d, g):
        return dict(
            size=draw.x.abs().mean(),
            same=(d.real - d.uncond).abs().sum(),
            twice=2 * amd.rms(g),
        )

    (log,) = Setting().run(amd.method("amd"), 1, w=1, probe=probe)

    assert log["size"] > 0 == log["same"]
    close(float(log["twice"]), 2 * float(log["g_norm"]))


# ------------------------------------------------------------------------------- what is not finite
def with_gradients(*grads):
    """A parameter for each gradient, zero so far, and plain SGD for each parameter."""
    params = [nn.Parameter(torch.zeros(3)) for _ in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = torch.tensor(grad)
    return params, [torch.optim.SGD([p], 1.0) for p in params]


def test_update_clips_each_optimizer_by_itself():
    """Norms 5 and .5 against a clip of 1: the first gradient is scaled, the second is not.

    The norms that come back are those before clipping.
    """
    params, opts = with_gradients([3.0, 4, 0], [0.3, 0.4, 0])

    norms = amd.update(opts, 1.0)

    assert_close(norms, torch.tensor([5.0, 0.5]))
    clipped, whole = (-p.detach() for p in params)
    assert_close(clipped, torch.tensor([0.6, 0.8, 0]), rtol=1e-4, atol=1e-6)
    assert_close(whole, torch.tensor([0.3, 0.4, 0]))


def test_update_clips_at_10():
    """A caller who gives no clip gets DMD2's, 10.

    The norm of 20 is halved.
    """
    (p,), opts = with_gradients([0, 12.0, 16])

    amd.update(opts)

    assert_close(-p.detach(), torch.tensor([0, 6.0, 8]), rtol=1e-5, atol=0)


def test_update_steps_all_or_none():
    """A fake that stepped without its student would have studied a batch that was thrown away.

    Here the second gradient has a NaN, so the first optimizer must not step either.
    """
    params, opts = with_gradients([1.0, 1, 1], [0, math.nan, 0])

    norms = amd.update(opts)

    assert not norms.isfinite().all()
    assert not any(p.any() for p in params)


class Broken(Setting):
    """x, the fake's loss or its gradient is not finite in the first `bad` rollouts.

    Where it is the loss, all gradients are 0, so that only the loss itself can tell.
    """

    def __init__(self, where, bad):
        super().__init__()
        self.where, self.bad = where, bad
        self.rollouts = 0

    def generate(self, c, u):
        self.rollouts += 1
        x, t_G, *_ = super().generate(c, u)
        return (x + math.inf if self.is_bad("x") else x), t_G

    def ask_fake(self, x_t, t, c):
        x0_hat = super().ask_fake(x_t, t, c)
        if self.is_bad("gradient"):
            x0_hat.register_hook(lambda g: g * math.nan)
        if self.is_bad("loss"):
            x0_hat.register_hook(lambda g: 0 * g)  # so that no gradient tells
            return x0_hat + 1e160  # whose square overflows
        return x0_hat

    def is_bad(self, where):
        return where == self.where and self.rollouts <= self.bad


@pytest.mark.parametrize("where", ["x", "loss", "gradient"])
@pytest.mark.parametrize("name", ["amd", "dmd"])
def test_what_is_not_finite_is_skipped_and_counted(where, name):
    """One bad batch must not end a run of days, nor leave NaN in its weights.

    Four updates of two iterations are all bad here, and no weight moves. The fifth is well, and the
    student moves.
    """
    it = Broken(where, bad=8)
    before, logs = it.weights(), it.train(amd.method(name))

    skipped = [next(logs)["skipped"] for _ in range(4)]
    assert skipped == [2, 4, 6, 8]
    assert all(v.equal(before[k]) for k, v in it.weights().items())

    log = next(logs)
    assert log["skipped"] == 8
    assert math.isfinite(log["loss_student"])
    moved = it.weights()["student.out.weight"]
    assert not moved.equal(before["student.out.weight"])


def test_a_skipped_iteration_leaves_the_log():
    """A mean with a NaN in it would tell nothing of the rest.

    The first of two iterations is lost, in which the student has its turn; the other one is logged.
    """
    it = Broken("x", bad=1)

    log = next(it.train(amd.method("amd")))

    assert log["skipped"] == 1
    assert "loss_student" not in log
    assert math.isfinite(log["loss_fake"])
    assert math.isfinite(log["reward"])


def test_a_skipped_iteration_leaves_the_others_in_the_log():
    """The second of two iterations is lost, when the student has stepped already.

    The log says what its step was. An update of the caller's, which returns NaN as a norm, stands
    for a gradient that is not finite.
    """
    it = Setting()
    steps = []

    def update(opts):
        steps.append(0)
        return amd.update(opts) if len(steps) == 1 else torch.tensor([math.nan])

    (log,) = it.run(amd.method("amd"), 1, update=update)

    assert log["skipped"] == 1
    assert math.isfinite(log["loss_student"])


def test_ten_in_a_row_end_the_run():
    """A run that has diverged does not come back, so it must not spend the night skipping.

    It ends at the tenth rollout, and the message says what to lower.
    """
    it = Broken("x", bad=99)

    with pytest.raises(FloatingPointError, match="ten iterations"):
        it.run(amd.method("amd"), 99)

    assert it.rollouts == 10


def test_nine_in_a_row_do_not_end_the_run():
    """Each tenth iteration is well, and the count begins anew.

    Of 24 iterations two are well; what was skipped stays in the log.
    """

    class NineOfTen(Broken):
        def is_bad(self, where):
            return where == self.where and self.rollouts % 10 != 0

    logs = NineOfTen("x", bad=0).run(amd.method("amd"), 12)

    assert logs[-1]["skipped"] == 22


# ------------------------------------------------------------------------------------ what is wrong
def wrong_sizes(n, j):
    """Micro-batches of unlike sizes, which the mean of their losses would weigh wrong."""
    size = 3 + 2 * j
    return dict(
        y=torch.zeros(size).double(),
        z=randn(size, 2),
    )


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("amd", dict(reward=None), "pass reward="),
        ("dmdr", dict(reward=None), "pass reward="),
        ("dmd", dict(truth=None), "pass truth="),
        ("dmd2", dict(truth=None), "pass truth="),
        ("dmd2", dict(logits=None), "pass logits="),
        ("magic", dict(adapt=None), "pass adapt="),
        ("amd", dict(null=None), "pass null="),
        ("amd", dict(K=3), "K = 3 must divide the 8"),
        ("amd", dict(K=1), "choose K >= 2"),
        ("amd", dict(batch=wrong_sizes, accum=2), "equal micro"),
        ("amd", dict(reward=lambda x, c: x), "reward returned"),
        ("amd", dict(reward=lambda x, c: x[:, 0] * math.nan), "mend the reward"),
        ("amd", dict(real=lambda x_t, t, c: x_t[:, :1]), "real returned"),
        ("amd", dict(fake=lambda x_t, t, c: x_t[:1]), "fake returned"),
        ("dmd", dict(truth=lambda c: c["z"][:, :1]), "truth returned"),
        ("dmd2", dict(truth=lambda c: c["z"][:, :1]), "truth returned"),
        ("dmd2", dict(logits=lambda x_t, t, c: x_t), "logits returned"),
        ("amd", dict(null=lambda c: dict(c, tag="no")), "changes yes to no"),
        ("amd", dict(space="v"), "choose one of x0, eps, flow"),
        ("amd", dict(schedule=amd.vp(ABAR)), "choose one of x0, eps for"),
        ("dmd", dict(reward=lambda x, c: x[:, 0] * math.nan), "mend the reward"),
        ("amd", dict(student=lambda c, u: c["z"]), "return (x, t_G), or an Exit"),
        ("amd", dict(fake=amd.x0_from_eps(None, amd.vp(ABAR))), "fake was made for another"),
        ("amd", dict(ranks=amd.Ranks(0, 2)), "pass update=, which averages"),
        ("amd", dict(t_range=(0, 980)), "t_range, t_clamp in"),
        ("amd", dict(t_clamp=(0.5, 0.5)), "t_range, t_clamp in"),
        ("amd", dict(shift=0), "above 0"),
    ],
)
def test_train_says_what_is_wrong_and_leaves_the_weights(name, given, message):
    """A mistake ends at the first update, in a message that says what to do.

    A shape that broadcasts would train on the wrong thing in silence. A user who mends it in a
    notebook goes on with the weights as they were.
    """
    it = Setting()
    before = it.weights()

    with pytest.raises(ValueError, match=re.escape(message)):
        it.run(amd.method(name, lam=0.2), 1, **given)

    assert all(v.equal(before[k]) for k, v in it.weights().items())


# -------------------------------------------------------------------------------------- the file
SOURCE = (Path(__file__).parent / "amd.py").read_text()


def test_amd_needs_torch_alone_and_knows_no_process():
    """amd.py is to be copied into other projects, so it imports torch and the standard library.

    Of these it imports nothing that knows other processes, files or the environment: what it needs
    of them comes as arguments.
    """
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)

    packages = {name.split(".")[0] for name in names}
    assert packages <= {"torch", *sys.stdlib_module_names}
    assert not {name for name in names if "distributed" in name}
    assert not names & {"os", "pathlib", "subprocess", "sys"}


def test_every_equation_is_cited_and_tested():
    """A reader of the paper finds each equation in amd.py, and a test of it by its number here.

    Eq. 1 to 14 are the method, 25 to 28 its forces. A range counts, as "Eq. 25-28" in the source
    and eq7_to_eq10 in the name of a test.
    """

    def numbers(pattern, text):
        found = set()
        for low, high in re.findall(pattern, text):
            found |= {*range(int(low), int(high or low) + 1)}
        return found

    tests = re.findall(r"def (test_\w+)", Path(__file__).read_text())
    cited = numbers(r"Eq\. (\d+)(?:-(\d+))?", SOURCE)
    tested = numbers(r"eq(\d+)(?:_to_eq(\d+))?", " ".join(tests))

    assert cited >= {*range(1, 15), 25, 26, 27, 28}
    untested = cited - tested
    assert untested <= {5, 11}, "a definition and an assumption: see toy2d.py --figure zone"


def test_defaults_stay_what_others_rely_on():
    """A caller who leaves these out gets them, so one that moved would change runs in silence.

    docs/guide.md tells users what they are.
    """

    def defaults(f):
        given = inspect.signature(f).parameters
        return {k: p.default for k, p in given.items() if p.default is not p.empty}

    assert defaults(amd.H_amd) == dict(s=0.5)
    assert defaults(amd.W_exp) == dict(tau=1.0)
    assert amd.METHODS["amd"][-3:] == (0.0, 0.01, False)  # lam, lam_d, unit_w
    usual = dict(
        K=8,
        w=1,
        t_range=(0.02, 0.98),
        t_clamp=(0.0, 1.0),
        t_per_sample=False,
        normalize=True,
        fake_steps=5,
        accum=1,
    )
    assert defaults(amd.train).items() >= usual.items()
