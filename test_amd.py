"""Tests of AMD. `pytest -m fast` pins the formulas; the rest runs real processes: torchrun, kill -9, the scripts."""
import argparse
import ast
import copy
import csv
import gc
import inspect
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import amd

HERE = Path(__file__).parent
shapes = pytest.mark.parametrize("shape", [(8, 2), (8, 3, 4, 4), (8, 2, 3, 4, 4)])
f64, double = partial(torch.tensor, dtype=torch.float64), partial(torch.randn, dtype=torch.float64)
close = partial(assert_close, rtol=1e-9, atol=1e-12)
@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)
def draw(shape=(8, 2), **fields):
    given = dict(c=torch.arange(8) % 3, x=double(*shape), eps=double(*shape), a=double(8).clamp(-1, 1),
                 weight=double(8).exp(), t=0.1 + 0.8 * torch.rand(8).double())
    return amd.Draw(**given | fields)
def affine(scale, shift=0.0):  # a Denoiser that depends on x_t, t and c
    return lambda x_t, t, c: scale * x_t + amd.like(t, x_t) + shift * amd.like(c, x_t)
# ------------------------------------------------------------------------------------------------ Part I, fast
@shapes
def test_eq3_one_sgd_step_moves_x_by_g(shape):
    x, g = double(*shape).requires_grad_(), double(*shape)
    before, loss = x.detach().clone(), amd.student_loss(x, g)
    loss.backward(), torch.optim.SGD([x], lr=x.numel()).step()
    close(x.detach(), before - g), close(loss.item(), g.square().mean().item() / 2)
@shapes
def test_eq1_eq2_eq4_eq18_gradient_of_the_potential_and_exact_score_difference(shape):
    """H_std is autograd's gradient of V_DMD; for Gaussian data and student it is sigma^2 / alpha (s_fake - s_real)."""
    def gaussian(mu, var):
        def moments(x_t, t): return (alpha := amd.like(1 - t, x_t)), alpha**2 * var + amd.like(t, x_t) ** 2
        def denoise(x_t, t, c):
            alpha, v = moments(x_t, t)
            return mu + alpha * var / v * (x_t - alpha * mu)
        def score(x_t, t): return (moments(x_t, t)[0] * mu - x_t) / moments(x_t, t)[1]
        return denoise, score
    (real, s_real), (fake, s_fake), z = gaussian(0.3, 2.0), gaussian(-1.0, 0.5), draw(shape)
    x, x_t, t = z.x.clone().requires_grad_(), amd.renoise(z.x, z.t, z.eps), amd.like(z.t, z.x)
    g, d = amd.gradient(amd.METHODS["dmd"], z._replace(x=x), real, fake, normalize=False)
    V = ((x - real(x_t, z.t, z.c)) ** 2 - (x - fake(x_t, z.t, z.c)) ** 2).sum() / 2
    close(g, torch.autograd.grad(V, x)[0]), close(g, t**2 / (1 - t) * (s_fake(x_t, z.t) - s_real(x_t, z.t)))
    assert not g.requires_grad and not d.fake.requires_grad
def test_eq7_to_eq10_eq13_by_hand():
    d, a = amd.Displacements(f64(3), f64(1), f64(2), 4.0), f64(0.5)
    assert (d.real, d.dm, d.ca, amd.H_std(d, a), amd.H_naive(d, a)) == (9, 1, 6, 7, 1.25 * 9 - 0.75 * 2)
    assert amd.H_amd(d, a) == 0.75 * 1 + 1.25 * 6 and abs(amd.H_rf(d, a) - math.e * 7) < 1e-9
@shapes
def test_eq6_to_eq13_identities(shape):
    d, a = amd.Displacements(*double(3, *shape), 3.0), amd.like(double(8).clamp(-1, 1), torch.empty(shape))
    close(amd.H_std(d, a), d.dm + d.ca), close(amd.H_naive(d, a, 0.3) - amd.H_amd(d, a, 0.3), 0.6 * a * d.cond)
    close(amd.H_amd(d, torch.ones_like(a), 1), 2 * d.ca), close(amd.H_amd(d, -torch.ones_like(a), 1), 2 * d.dm)
    assert not d._replace(w=1.0).ca.any()
    for H in (amd.H_naive, amd.H_amd):
        close(H(d, a, 0), amd.H_std(d, a)), close(H(d, 0 * a, 1), amd.H_std(d, a))
        for s in (-0.01, 1.01, math.nan):
            with pytest.raises(ValueError, match="choose s in"): H(d, a, s)
def test_eq12_values_invariances_and_groups():
    close(amd.group_advantage(f64([0, 0, 0, 1, 5, 3, 5, 3]), 4), f64([-(3**-0.5)] * 3 + [1, 1, -1, 1, -1]), rtol=1e-5)
    close(amd.group_advantage(f64([0, 2e-5]), 2), f64([-1, 1]) / 1.1)  # eps
    r, order = double(24), torch.cat([torch.randperm(8) + 8 * g for g in range(3)])
    a = amd.group_advantage(r, 8)
    close(amd.group_advantage(3 * r + torch.arange(3).repeat_interleave(8), 8), a, rtol=1e-4)  # eps
    close(amd.group_advantage(r[order], 8), a[order])
    assert amd.group_advantage(torch.cat([r[:8] * 0 + 9, r[8:]]), 8)[8:].equal(a[8:])
    assert a.abs().max() == 1 and {amd.group_advantage(v, 8).dtype for v in (r.float(), r.long())} == {torch.float32}
    for r, K in [([0] * 8, 1), ([0] * 8, 3), ([[0]] * 8, 2), ([0] * 8, -2), ([0, math.nan], 2), ([0, math.inf], 2)]:
        with pytest.raises(ValueError, match="choose K|mend the reward"): amd.group_advantage(f64(r), K)
def test_eq12_equal_rewards_have_no_advantage():
    """Equal means a population std of at most 1e-6 max(1, |mean|): two rewards `spread` apart have spread / 2."""
    for level, limit in ((-3.7, 7.4e-6), (0, 2e-6), (2, 4e-6), (-1000, 2e-3)):
        for spread in (0, 0.95 * limit, 1.05 * limit):
            a = amd.group_advantage(f64([level - spread / 2, level + spread / 2] * 4), 8)
            assert (a == 0).all() if spread < limit else a.abs().min() > 0.5
    assert (amd.group_advantage(torch.full((8,), -3.7), 8) == 0).all()
@shapes
def test_eq14_is_the_weighted_loss_of_the_networks_own_prediction(shape):
    """A noise network's loss in "eps", a velocity network's in "flow", x0 in "x0": each sample once by its weight."""
    close(amd.W_exp(f64([-1, 0, 1])), f64([math.e, 1, 1 / math.e])), close(amd.W_exp(f64([1]), 0.5), f64([math.e**-2]))
    assert amd.W_one(a := double(3)).equal(torch.ones_like(a))
    z, abar = draw(shape), torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    net, vp = lambda x_t, t, c: torch.tanh(x_t) + amd.like(t + c, x_t), amd.vp(abar)
    def loss(guess, true): return sum(z.weight[i] * (guess[i] - true[i]).square().mean() for i in range(8)) / 8
    x_t = amd.renoise(z.x, z.t, z.eps)
    close(amd.fake_loss(z, amd.x0_from_flow(net)), loss(net(x_t, z.t, z.c), z.eps - z.x))
    close(amd.fake_loss(z, net, space="x0"), loss(net(x_t, z.t, z.c), z.x))
    x_t = amd.renoise(z.x, z.t, z.eps, vp)
    close(amd.fake_loss(z, amd.x0_from_eps(net, vp), vp, "eps"), loss(net(x_t, z.t, z.c), z.eps))
def test_tilt_is_the_fixed_point_of_amd_but_not_of_naive():
    """At w = 1, p_student ~ p_real exp(a / tau) and the fake that minimises Eq. 14, AMD's update is 0 for any s.
    Oracle: all atoms of a discrete p_real meet at one x_t, each by its own eps, weighed by the density of that eps."""
    tau, t, n, x_t = 0.7, 0.6, 8, double(2)
    x, p_real, a = double(n, 2), double(n).softmax(0), double(n).clamp(-1, 1)
    density = (-(eps := (x_t - (1 - t) * x) / t).square().sum(1) / 2).exp()
    real = ((p_real * density)[:, None] * x).sum(0) / (p_real * density).sum()  # E[x0 | x_t]
    p_student = p_real * (a / tau).exp()
    f = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    z = amd.Draw(torch.zeros(n), x, eps, a, p_student * density * amd.W_exp(a, tau), torch.full((n,), t).double())
    fake, _ = lambda x_t, t, c: f.expand(n, 2), f.data.copy_(real)
    close(torch.autograd.grad(amd.fake_loss(z, fake), f)[0], 0 * x_t)  # so the ideal fake is the real teacher
    for name, still in (("amd", True), ("naive", False)):
        g, _ = amd.gradient(amd.method(name), z, lambda x_t, t, c: real.expand(n, 2), fake, normalize=False)
        assert (g.abs().max() < 1e-9) == still
@shapes
def test_forward_operator_and_its_inverses(shape):
    x, eps, c, t = double(*shape), double(*shape), torch.zeros(8), f64([0, 1, 0.25, 0.5, 0.75, 0.9, 0.1, 0.3])
    x_t = amd.renoise(x, t, eps)
    close(x_t[0], x[0]), close(x_t[1], eps[1]), close(x_t[2], 0.75 * x[2] + 0.25 * eps[2])
    close(amd.x0_from_flow(lambda x_t, t, c: eps - x)(x_t, t, c), x)
    vp = amd.vp(abar := torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
    alpha, sigma = vp(torch.arange(1001) / 1000)  # in float32, where truncation errs
    assert_close(alpha, torch.cat([abar, abar[-1:]]).sqrt().float())  # every i / N is index i, and t = 1 the last
    assert_close(alpha**2 + sigma**2, torch.ones(1001))
    close(amd.x0_from_eps(lambda x_t, t, c: eps, vp)(amd.renoise(x, t, eps, vp), t, c), x)
    half, rounded = (amd.x0_from_flow(lambda x_t, t, c, k=k: x_t.bfloat16().to(k)) for k in (torch.bfloat16, t.dtype))
    assert half(x, t, c).equal(rounded(x, t, c))  # half precision ends at the network
def test_displace_asks_once_and_in_order():
    calls = []
    real = lambda x_t, t, c: (calls.append((x_t, t, c)), x_t * amd.like(c["y"], x_t))[1]
    z = draw(c=dict(y=double(8), size=7, more=(double(8, 3), [double(8)], None)))
    null = lambda c: dict(c, y=0 * c["y"], more=(c["more"][0] + 1, *c["more"][1:]))
    x_t = amd.renoise(z.x, z.t, z.eps)
    d = amd.displace(z.x, x_t, z.t, z.c, null, real, lambda x_t, t, c: 0.5 * x_t + t[:, None], 3)
    (both, t, c), = calls
    close(d.cond, z.x - x_t * z.c["y"][:, None]), close(d.uncond, z.x), close(d.fake, z.x - 0.5 * x_t - z.t[:, None])
    assert both.equal(torch.cat([x_t, x_t])) and t.equal(torch.cat([z.t, z.t])) and c["size"] == 7
    assert c["more"][2] is None and c["more"][1][0].shape == (16,) == (len(c["more"][0]),)
    assert amd.displace(z.x, x_t, z.t, z.c, None, real, None, 1).fake is None
    assert len(calls) == 2 and len(calls[1][0]) == 8  # w = 1: no unconditional half
def test_eq25_to_eq28_forces():
    """Each is the gradient that autograd gives for the energy of the paper; no parameter gets a .grad."""
    z, truth = draw(), double(8, 2)
    D, reward = nn.Linear(2, 1).double(), lambda x, c: torch.sin(x).sum(1)
    logits = lambda x_t, t, c: D(x_t)[:, 0]
    force = lambda energy, closure: amd.force(lambda x: energy(x, z, closure, amd.flow), z.x)
    close(force(amd.regression, lambda c: truth), (z.x - truth) / 2)  # half the mean over two dimensions
    x_t = amd.renoise(z.x, z.t, z.eps)
    sigmoid = torch.sigmoid(logits(x_t, z.t, z.c))[:, None]
    close(force(amd.adversarial, logits), -(1 - sigmoid) * (1 - z.t)[:, None] * D.weight)  # towards higher D
    close(force(amd.ascent, reward), -torch.cos(z.x))
    assert D.weight.grad is None and not z.x.requires_grad
    with torch.no_grad(): assert amd.force(lambda x: x.square().sum(1), z.x).equal(2 * z.x)
@pytest.mark.parametrize("name", ["dmd", "dmd2", "dmdr"])
def test_eq6_lam_weighs_the_energys_mean_in_the_loss(name):
    """grad of student_loss = H / numel + lam grad of mean energy; the normaliser leaves the force alone."""
    z, real, fake, truth = draw(), affine(0.5), affine(0.9), double(8, 2)
    closure = dict(dmd=lambda c: truth, dmd2=lambda x_t, t, c: x_t.sin().sum(1), dmdr=lambda x, c: x.cos().sum(1))[name]
    m, x = amd.method(name, lam=0.3), z.x.clone().requires_grad_()
    g, d = amd.gradient(m, z, real, fake, closure=closure)
    energy, = torch.autograd.grad(m.F_ext[1](x, z, closure, amd.flow).mean(), x)
    H = amd.H_std(d, None) / d.real.abs().mean(1, keepdim=True)
    close(torch.autograd.grad(amd.student_loss(x, g), x)[0], H / 16 + 0.3 * energy)
    with pytest.raises(ValueError, match="make it"):
        amd.gradient(m, z, real, fake, closure=lambda *a: torch.zeros(8, 1).expand(8, 3))
@shapes
def test_eq6_normaliser_is_per_sample_and_before_eq13(shape):
    z, m = draw(shape), amd.method("amd", s=0.7)
    of = lambda z: amd.gradient(m, z, affine(0.5, 1.0), affine(0.9), null=lambda c: 0 * c, w=2.5)
    g, d = of(z)
    for i in range(8):
        close(g[i], amd.H_amd(amd.Displacements(*(v[i] for v in d[:3]), 2.5), z.a[i], 0.7) / d.real[i].abs().mean())
    close(g[1:], of(z._replace(x=torch.cat([z.x[:1] + 1, z.x[1:]])))[0][1:])  # samples do not see each other
    exact = lambda x_t, t, c: z.x  # d_real = 0
    assert amd.gradient(amd.method("dmd"), z, exact, affine(0.9))[0].isfinite().all()
def test_ddmd_takes_dm_and_ca_from_two_levels():
    z, calls = draw()._replace(t_ca=torch.rand(8).double(), eps_ca=double(8, 2)), []
    real = lambda x_t, t, c: (calls.append(len(x_t)), x_t * amd.like(c + 1, x_t))[1]
    fake = lambda x_t, t, c: (calls.append("fake"), 0.3 * x_t)[1]
    vp, kw = amd.vp(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)), dict(null=lambda c: 0 * c, normalize=False)
    g, d = amd.gradient(amd.METHODS["ddmd"], z, real, fake, w=3.0, schedule=vp, **kw)
    x_t, x_ca, c = amd.renoise(z.x, z.t, z.eps, vp), amd.renoise(z.x, z.t_ca, z.eps_ca, vp), z.c[:, None]
    dm, ca = 0.3 * x_t - x_t * (c + 1), 2 * (x_ca - x_ca * (c + 1))
    close(d.dm, dm), close(d.ca, ca), close(g, dm + ca)
    amd.gradient(amd.METHODS["ddmd"], z, real, fake, w=1)
    assert calls == [8, "fake", 16, 8, "fake"]
    t, v = torch.rand(2, 100)
    close(amd.cleaner(t, v, 0.5)[1], v / 2, rtol=1e-6), close(amd.noisier(t, v, 0.5)[1], 0.5 + v / 2, rtol=1e-6)
    assert amd.METHODS["ddmd"].t is amd.cleaner and amd.joint(t, v, 0.5) == (t, None)
def test_table1_rows():
    """The columns as the paper prints them, and with every special part off one and the same update."""
    T, z = amd.METHODS, draw()
    assert [k for k in T if T[k].F_ext] == ["dmd", "dmd2", "dmdr"] and [k for k in T if T[k].phi is amd.fade] == [
        "magic", "dmdr"] and [k for k in T if T[k].W is amd.W_exp] == ["amd", "naive"]
    assert [k for k in T if T[k].senses] == ["amd", "naive", "reward_forcing"]
    assert len({row[:5] for row in T.values()}) == len(T) == 8
    kw = dict(null=lambda c: 0 * c, w=2.0)
    g = [amd.gradient(amd.method(k, s=0), z._replace(a=0 * z.a), affine(0.5, 1.0), affine(0.9), **kw)[0] for k in T]
    for other in g[1:]: close(other, g[0])
    bound = {k: amd.method(k, lam=0.2, fade=3) for k in T}  # and each ends three updates elsewhere
    bound |= dict(no=bound["ddmd"]._replace(t=amd.noisier), pure=amd.method("dmd"), d=bound["dmd2"]._replace(lam_d=1))
    ends = torch.stack([weights(steps(m, 3)[1])["student.out.weight"].flatten() for m in bound.values()])
    assert (torch.cdist(ends, ends) + torch.eye(11) > 1e-6).all()
def test_method_binds_and_checks_and_blend_moves_weights():
    d, a = amd.Displacements(*double(3, 8, 2), 3.0), torch.full((8, 1), 0.5).double()
    m = amd.method("amd", s=0.25, tau=2, lam=3, lam_d=4, unit_w=True)
    close(m.H(d, a), amd.H_amd(d, a, 0.25)), close(amd.method("naive", s=0.25).H(d, a), amd.H_naive(d, a, 0.25))
    assert m.W(a).equal((-a / 2).exp()) and (m.lam, m.lam_d, m.unit_w, m.phi(5)) == (3, 4, True, 0) and m.senses
    phi = amd.method("magic", fade=100).phi
    close([phi(0), phi(25), phi(50), phi(100), phi(1000)], [0.75, 0.375 * (1 + 0.5**0.5), 0.375, 0.0, 0.0])
    close(amd.method("dmdr").phi(5000), 0.375)
    amd.blend(*(nets := [nn.Linear(3, 2) for _ in range(3)]), 0.25)
    for p, r, f in zip(*map(nn.Module.parameters, nets), strict=True): close(p, 0.75 * r + 0.25 * f, rtol=1e-6)
    for bad in (dict(s=1.1), dict(tau=0), dict(fade=0), dict(lam=-1), dict(lam_d=-1)):
        with pytest.raises(ValueError, match="choose"): amd.method("amd", **bad)
    with pytest.raises(ValueError, match="magic, dmdr, amd, naive, reward_forcing"): amd.method("no")
    defaults = lambda f: {k: p.default for k, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
    assert defaults(amd.method) == dict(s=0.5, tau=1.0, lam=0.0, lam_d=0.01, fade=10_000, unit_w=False)
    assert defaults(amd.train).items() >= dict(K=8, w=1, t_range=(0.02, 0.98), normalize=True, fake_steps=5).items()
def test_backward_simulation_by_hand():
    net, c, z, levels, seen = nn.Linear(2, 2), torch.zeros(8), torch.randn(8, 2), [1.0, 0.6, 0.3], []
    denoise = lambda x_t, t, c: (seen.append(t), net(x_t) * amd.like(t, x_t))[1]
    for u, k in [(0.0, 0), (0.33, 0), (0.34, 1), (0.67, 2), (0.999, 2), (1.0, 2)]:
        seen.clear(), torch.manual_seed(3)
        x, t_G = amd.backward_simulation(denoise, z, c, levels, u, lambda t: (1 - t**2, t))
        x_t, _ = z, torch.manual_seed(3)
        for i in range(k):
            t, low = levels[i : i + 2]
            with torch.no_grad(): x_t = (1 - low**2) * net(x_t) * t + low * torch.randn(8, 2)
        want = net(x_t) * levels[k]
        close(x, want, rtol=1e-5)
        assert t_G == levels[k] and len(seen) == k + 1 and seen[-1].shape == (8,)
        close(*(torch.autograd.grad(v.sum(), net.weight)[0] for v in (x, want)), rtol=1e-5)  # the exit's graph alone
    with pytest.raises(ValueError, match="falling"): amd.backward_simulation(denoise, z, c, [999, 499])
    assert amd.backward_simulation(lambda x_t, t, c: x_t * amd.like(t, x_t), z.bfloat16(), c, [1.0])[0].dtype == z.dtype
def test_levels_are_shared_by_a_group_and_warped():
    (t, v), (warped, _) = (amd.draw_levels(torch.Generator().manual_seed(1), 4000, 4, (0.1, 0.9), k) for k in (1, 5))
    assert all(q.view(-1, 4).std(1).max() == 0 and len(q.unique()) > 990 for q in (t, v))
    close(warped, (5 * t / (1 + 4 * t)).clamp(0.1, 0.9))
    assert len({amd.key(*ints) for ints in [(0,), (1,), (0, 1), (1, 0), (0, 0), (12, 3), (1, 23), (123,)]}) == 8
    assert 0.1 <= t.min() < 0.11 and warped.max() == 0.9 and abs(torch.corrcoef(torch.stack([t, v]))[0, 1]) < 0.1
# ----------------------------------------------------------------------------------------- train, on small networks
class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.out, self.head = (nn.Linear(a, b).double() for a, b in ((4, 16), (16, 2), (16, 1)))
    def forward(self, x_t, t, c, head=False):
        h = self.body(torch.cat([x_t, t[:, None], c["y"][:, None]], 1)).tanh()
        return self.head(h)[:, 0] if head else self.out(h)
def setting(B=8, seed=0, world=1, rank=0, accum=1, shard=lambda net: net):
    """Networks, optimizers and closures on which every method runs. Iteration n has the same samples in any layout of
    ranks and micro-batches, and the same noise if randn_like is `hashed`."""
    student, fake, real, blended = (shard(Net(i)) for i in (1, 2, 3, 3))
    opts = torch.optim.AdamW(student.parameters(), 1e-2), torch.optim.AdamW(fake.parameters(), 1e-2)
    def batch(n, j):
        g = torch.Generator().manual_seed(amd.key(seed, n))
        c = dict(y=torch.arange(B).double() // 4 % 3, z=torch.randn(B, 2, generator=g, dtype=torch.float64))
        b = B // (world * accum)
        return {k: v[(rank * accum + j) * b :][:b] for k, v in c.items()} | dict(tag="yes")
    closures = dict(
        reward=lambda x, c: x[:, 0] - x[:, 1] ** 2 * c["y"], null=lambda c: dict(c, y=0 * c["y"]),
        adapt=lambda r: amd.blend(blended, real, fake, r) or blended, truth=lambda c: c["z"].cos(),
        logits=lambda x_t, t, c: fake(x_t, t, c, head=True))
    generate = lambda c, u: amd.backward_simulation(student, c["z"], c, [1.0, 0.5], u)
    return (generate, real, fake, batch, *opts), closures, dict(student=student, fake=fake)
def hashed(x): return torch.sin(999 * x.detach())  # noise that depends on the sample alone, not on where it lies
def steps(method, count, accum=1, world=1, rank=0, shard=lambda net: net, K=4):
    args, closures, nets = setting(world=world, rank=rank, accum=accum, shard=shard)
    logs = amd.train(method, *args, **closures, K=K, w=1.5, fake_steps=2, accum=accum)
    return [next(logs) for _ in range(count)], nets
def weights(nets):
    full = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
    return {f"{k}.{name}": full(p.detach()) for k, net in nets.items() for name, p in net.named_parameters()}
def test_algorithm1_by_a_literal_loop():
    """Alg. 1, one sample at a time, with plain SGD; only the draws come from where train's docstring says."""
    B, K, s, w, lr, seed, tau = 8, 4, 0.7, 1.5, 0.1, 5, 0.8
    args, closures, nets = setting(B, seed)
    (_, real, _, batch, *_), (G, psi) = args, map(copy.deepcopy, nets.values())
    opts = [torch.optim.SGD(net.parameters(), lr) for net in nets.values()]
    R, null = closures["reward"], closures["null"]
    log = next(amd.train(amd.method("amd", s=s, tau=tau), *args[:4], *opts, reward=R, null=null, K=K, w=w, fake_steps=2,
                         seed=seed, update=partial(amd.update, clip=math.inf), shift=2, normalize=False))
    def add(totals, loss, net):
        grads = torch.autograd.grad(loss, net.parameters(), retain_graph=True, allow_unused=True)
        for total, v in zip(totals, grads, strict=True): total += 0 if v is None else v
    losses = []
    for n in range(2):  # the student moves on the first only
        shared = torch.Generator().manual_seed(amd.key(seed, n))
        u = torch.rand((), generator=shared).item()
        t = 0.02 + 0.96 * torch.rand(2, B // K, generator=shared, dtype=torch.float64)[0]
        t, c, _ = (2 * t / (1 + t)).clamp(0.02, 0.98), batch(n, 0), torch.manual_seed(amd.key(seed, n, 0, 0))
        x, _ = amd.backward_simulation(G, c["z"], c, [1.0, 0.5], u)  # l. 3
        eps = torch.randn_like(x)
        r = [R(x[i : i + 1].detach(), {k: v[i : i + 1] for k, v in c.items()}).item() for i in range(B)]
        grad_G, grad_psi = ([torch.zeros_like(p) for p in net.parameters()] for net in (G, psi))
        for i in range(B):
            mu = sum(group := r[i // K * K : i // K * K + K]) / K  # l. 4-6
            sigma = (sum((v - mu) ** 2 for v in group) / K) ** 0.5
            a = max(-1, min(1, (r[i] - mu) / (sigma + 1e-6)))
            ci = {k: v[i : i + 1] for k, v in c.items()}
            ti, xi = t[i // K].view(1), x[i : i + 1]
            x_t = ((1 - ti) * xi + ti * eps[i]).detach()  # l. 11
            cond, uncond = real(x_t, ti, ci), real(x_t, ti, null(ci))
            alpha, beta = 1 + s * a, 1 - s * a  # l. 14
            d_cond, d_uncond, d_fake = xi - cond, xi - uncond, xi - psi(x_t, ti, ci)
            g = (beta * (d_cond - d_fake) + alpha * (w - 1) * (d_cond - d_uncond)).detach()  # l. 15
            if n == 0:
                add(grad_G, (g * xi).sum() / 16, G)  # l. 16
            v_hat = (x_t - psi(x_t, ti, ci)) / ti
            loss = math.exp(-a / tau) * (v_hat - (eps[i] - xi.detach())).square().mean() / B  # l. 17-18, as a velocity
            losses.append(loss.item())
            add(grad_psi, loss, psi)  # l. 19
        with torch.no_grad():
            for net, grads in ((G, grad_G), (psi, grad_psi)):  # l. 21-22
                for p, v in zip(net.parameters(), grads, strict=True): p -= lr * v
    for k, v in weights(nets).items(): close(v, weights(dict(student=G, fake=psi))[k])
    close(float(log["loss_fake"]), sum(losses) / 2)
    assert log["step"] == 1 and log["fake_step"] == 2 and log["skipped"] == 0
def test_unit_w_and_the_log():
    (log,), _ = steps(amd.method("amd", tau=0.3, unit_w=True), 1)
    close(float(log["w_mean"]), 1.0)
    (args, closures, _), r, pure = setting(), [], amd.method("dmd")  # pure senses nothing: its reward is for the log
    reward = lambda x, c: (r.append(closures["reward"](x, c)), r[-1])[1]
    log = next(amd.train(amd.method("amd", tau=0.3), *args, reward=reward, K=4))
    std = (groups := torch.stack(r).view(-1, 4)).std(1, keepdim=True, unbiased=False)
    a = ((groups - groups.mean(1, keepdim=True)) / (std + 1e-6)).clamp(-1, 1)
    for k, v in dict(reward=groups.mean(), w_mean=(-a / 0.3).exp().mean(), fake_step=5, reward_std=std.mean(),
                     adv_clip=(a.abs() == 1).double().mean()).items(): close(float(log[k]), float(v))
    for K in (1, 4): assert (next(amd.train(pure, *args, reward=reward, K=K, fake_steps=1))["adv_clip"] > 0) == (K > 1)
    log = next(amd.train(pure, *args, K=1, fake_steps=1))
    assert math.isnan(log["reward"]) and log["ca_norm"] == 0 < log["dm_norm"] and amd.rms(f64([[3, -3]])) == 3
def test_accum_rolls_out_again_under_the_same_seed():
    (generate, *args), closures, _ = setting(accum=2)
    seen, kw = [], dict(reward=closures["reward"], K=4, fake_steps=2, accum=2)
    watched = lambda c, u: (seen.append((torch.is_grad_enabled(), torch.rand(()).item())), generate(c, u))[1]
    next(amd.train(amd.method("amd"), watched, *args, **kw))
    grads, noise = zip(*seen, strict=True)
    assert grads == (False, False, True, True, False, False) and noise[:2] == noise[2:4] and len({*noise}) == 4
@pytest.mark.parametrize("where", ["x", "loss", "gradient"])
def test_what_is_not_finite_is_skipped_counted_and_raises_at_ten(where):
    (generate, real, critic, *rest), closures, nets = setting()
    before, n, kw = copy.deepcopy(weights(nets)), [], dict(reward=closures["reward"], K=4, fake_steps=3)
    bad = lambda: math.inf if where == "x" and len(n) < 9 else 0
    def student(c, u): return (generate(c, u)[0] + bad(), n.append(0), 1.0)[::2]
    def fake(x_t, t, c):
        x0 = critic(x_t, t, c)
        if len(n) <= 9 and where != "x" and x0.requires_grad:
            x0.register_hook(lambda g: g * (math.nan if where == "gradient" else 0))
        return x0 + (1e160 if len(n) <= 9 and where == "loss" else 0)  # the square overflows, no gradient tells
    logs = amd.train(m := amd.method("amd"), student, real, fake, *rest, **kw)
    assert [next(logs)["skipped"] for _ in range(3)] == [3, 6, 9]
    assert all(v.equal(before[k]) for k, v in weights(nets).items())
    assert next(logs)["skipped"] == 9 and not weights(nets)["student.out.weight"].equal(before["student.out.weight"])
    student = lambda c, u: (n.append(0), generate(c, u)[0] * math.nan, 1.0)[1:]
    with pytest.raises(FloatingPointError, match="ten updates"):
        n.clear(), [*amd.train(m, student, real, fake, *rest, **kw)]
    assert len(n) == 10
@pytest.mark.parametrize("given, message", [
    (dict(name="amd", reward=None), "pass reward="), (dict(name="dmdr", lam=1, reward=None), "pass reward="),
    (dict(name="dmd", lam=1, truth=None), "pass truth="), (dict(name="dmd2", lam=1, truth=None), "pass truth="),
    (dict(name="dmd2", lam=1, logits=None), "pass logits="), (dict(name="magic", adapt=None), "pass adapt="),
    (dict(w=2.0, null=None), "pass null="), (dict(K=3), "K = 3 must divide the 8"), (dict(K=1), "choose K >= 2"),
    (dict(reward=lambda x, c: x), "reward returned"), (dict(reward=lambda x, c: x[:, 0] * math.nan), "mend the reward"),
    (dict(real=lambda x_t, t, c: x_t[:, :1]), "real returned"), (dict(fake=lambda x_t, t, c: x_t[:1]), "fake returned"),
    (dict(space="v"), "space out of"), (dict(name="dmd2", lam=1, truth=lambda c: c["z"][:, :1]), "truth returned"),
    (dict(t_range=(0, 980)), "t_range in [0, 1]"), (dict(w=2.0, null=lambda c: {**c, "tag": 2}), "use"),
    (dict(batch=lambda n, j: dict(y=torch.zeros(3 + 2 * j).double(), z=double(3 + 2 * j, 2)), accum=2), "equal micro"),
    (dict(name="dmd2", lam=1, logits=lambda x_t, t, c: x_t), "logits returned shape")])
def test_train_says_what_is_wrong(given, message):
    args, closures, nets = setting()
    names, before = "student real fake batch opt_student opt_fake".split(), copy.deepcopy(weights(nets))
    given = dict(name="amd", K=4, w=1.0, lam=0.0) | dict(zip(names, args, strict=True)) | closures | given
    m = amd.method(given.pop("name"), lam=given.pop("lam"))
    with pytest.raises(ValueError, match=re.escape(message)): next(amd.train(m, **given))
    assert all(v.equal(before[k]) for k, v in weights(nets).items())
def test_the_average_follows_and_swaps():
    ema = amd.EMA(net := nn.Linear(2, 2), 0.9)
    old, new, _ = net.weight.data.clone(), net.weight.data.add_(1).clone(), ema.update()
    close(ema.shadow["weight"], mean := old + 0.1, rtol=1e-5), ema.swap(), close(net.weight.data, mean, rtol=1e-5)
    assert ema.shadow["weight"].equal(new) and ema.swap() is None and net.weight.equal(new)
def test_update_clips_each_optimizer_and_steps_all_or_none():
    w = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opts = [torch.optim.SGD([p], 1.0) for p in w]
    w[0].grad, w[1].grad = torch.tensor([3.0, 4, 0]), torch.tensor([0.3, 0.4, math.nan])
    assert not amd.update(opts, 1.0).isfinite().all() and not any(p.any() for p in w)
    close((w[1].grad[2].zero_(), amd.update(opts, 1.0))[1], torch.tensor([5.0, 0.5]))
    close(-w[0].detach(), torch.tensor([0.6, 0.8, 0]), rtol=1e-4), close(-w[1].detach(), torch.tensor([0.3, 0.4, 0]))
def test_amd_imports_torch_alone_and_every_equation_is_cited_and_tested():
    text, tests = (HERE / "amd.py").read_text(), " ".join(re.findall(r"def (test_\w+)", Path(__file__).read_text()))
    names = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
    numbers = lambda *given: {n for low, high in re.findall(*given) for n in range(int(low), int(high or low) + 1)}
    cited, tested = numbers(r"Eq\. (\d+)(?:-(\d+))?", text), numbers(r"eq(\d+)(?:_to_eq(\d+))?", tests)
    assert cited >= {*range(1, 15), 25, 26, 27, 28}
    assert cited - tested <= {5, 11}, "Def. 3.2 and an assumption: measured by toy2d.py --figure zone"
PROCESSES = inspect.currentframe().f_lineno  # the tests above are marked fast, at the end of the file
# ---------------------------------------------------------------------------------------- real processes: Part II
def launch(*command, ranks=1, script="test_amd.py"):
    torchrun = f"-m torch.distributed.run --nproc-per-node {ranks} --master-port {random.randint(20000, 40000)}".split()
    command = [sys.executable, *torchrun[: None if ranks > 1 else 0], HERE / script, *map(str, command)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"))
def finish(process):
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 0, output[-3000:]
def test_two_ranks_change_nothing(tmp_path, monkeypatch):
    """A group of 8 on 2 ranks x 2 micro-batches, plain and under FSDP2, against one process, for every row."""
    finish(launch(tmp_path, ranks=2))
    monkeypatch.setattr(torch, "randn_like", hashed)
    for name in amd.METHODS:
        logs, nets = steps(amd.method(name, lam=0.2, tau=0.5, fade=3, unit_w=True), 3, K=8)
        for kind in ("plain", "sharded"):
            there = torch.load(tmp_path / f"{name}_{kind}.pt")
            for k, v in weights(nets).items(): assert_close(there["weights"][k], v, rtol=1e-9, atol=1e-9)
            for k in ("reward", "adv_clip", "w_mean"): close(there["log"][k], float(logs[-1][k]), equal_nan=True)
def span(out):
    _, (rank, world), torch.randn_like = amd.launch(), amd.ranks(), hashed
    for kind, shard in (("plain", lambda net: net), ("sharded", lambda net: amd.shard(net, [net.body], dtype=None))):
        for name in amd.METHODS:
            logs, nets = steps(amd.method(name, lam=0.2, tau=0.5, fade=3, unit_w=True), 3, 2, world, rank, shard, 8)
            told = dict(weights=weights(nets), log={k: float(v) for k, v in logs[-1].items()})
            if rank == 0: torch.save(told, Path(out) / f"{name}_{kind}.pt")
    (generate, *args), noise = setting(world=world, rank=rank)[0], []
    next(amd.train(amd.method("dmd"), lambda c, u: (noise.append(torch.rand(1, 3)), generate(c, u))[1], *args, K=8))
    assert len(amd.gather(noise[0]).unique(dim=0)) == world, "every rank draws its own noise"
def test_bad_checkpoints_and_other_runs_say_so(tmp_path):
    parts = lambda net: dict(student=(net, torch.optim.AdamW(net.parameters()), None))
    net = nn.Linear(4, 4)
    for step in (9, 10, 10): assert amd.save(tmp_path, step, **parts(net)) is None
    assert amd.load(tmp_path, **parts(nn.Linear(4, 4))) == 10
    for foreign in (nn.Linear(4, 5), nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(ValueError, match="choose another folder") as error: amd.load(tmp_path, **parts(foreign))
        assert "\n" not in str(error.value)
    shard, = (tmp_path / "checkpoints/step_10").glob("*.distcp")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))  # as on a full disk
    with pytest.raises(OSError, match="unfinished_11 cannot.*make room"): amd.save(tmp_path, 11, **parts(net))
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    assert amd.load(tmp_path, **parts(nn.Linear(4, 4))) == 10
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="step_10 is damaged"): amd.load(tmp_path, **parts(nn.Linear(4, 4)))
    out = amd.open_run(tmp_path / "run", config := dict(lr=1e-3, out=Path("x")))
    assert json.loads((out / "config.json").read_text())["config"] == dict(lr=1e-3, out="x")
    assert amd.open_run(out, config, resume=True) == out
    for changed, resume, message in ((config, False, "resume it"), (config | dict(lr=2e-3), True, "lr 0.001 -> 0.002")):
        with pytest.raises(ValueError, match=message): amd.open_run(out, changed, resume)
# ------------------------------------------------------------------------------------------------ files and scripts
def test_readme_snippets_run_beside_a_copy_of_amd(tmp_path):
    assert len(blocks := re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)) == 2
    (tmp_path / "amd.py").write_text((HERE / "amd.py").read_text())
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, check=True)
    assert (tmp_path / "runs/mine/checkpoints/step_10").exists()
def test_toy2d_makes_every_figure(tmp_path):
    small = f"--figure all --steps 4 --fit 20 --batch 32 --group 8 --seeds 1 --out {tmp_path}".split()
    subprocess.run([sys.executable, HERE / "toy2d.py", *small], check=True)
    for name in "shaping zone naive ablation tilt methods".split():
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told.keys() >= {"figure", "seconds"} and (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert told["reward"] == dict(naive="corner", tilt="linear").get(name, "selective") and told["seed"] == [0]
    assert told["arms"].keys() == {f"{k}{exit}" for k in amd.METHODS for exit in ("", ", exit 1")}
def test_toy2d_teacher_and_measures():
    import toy2d as lab  # needs matplotlib and tqdm, which the fast tests do without
    y, at, t = torch.ones(400_000).long(), torch.tensor([[0.3, -0.2]]), 0.6
    x = lab.real_samples(y)
    weight = (-(at - (1 - t) * x).square().sum(1) / (2 * t * t)).softmax(0)
    close(lab.exact_teacher(at, torch.tensor([t]), (y[:1],))[0], weight @ x, rtol=0, atol=0.02)
    close((-lab.energy(lab.grid(401))).exp().sum() * (8 / 400) ** 2, torch.tensor(1.0), rtol=1e-3, atol=0)
    close(lab.target_mass("selective").view(3, 3), torch.tensor([[1, 0, 1], [0, 2, 0], [1, 0, 1]]) / 6)
    x = lab.MODES[[0, 2, 4, 4, 6, 8] * 1500] + lab.STD * torch.randn(9000, 2)
    got, away = (lab.measure(v, "selective") for v in (x, x + 1))
    assert got["off"] < 0.002 > got["bad"] and got["modes"] == 5 and got["tv"] < 0.02 and got["sw2"] < 0.05
    assert 1e-4 < got["zone"] < 0.003 and away["off"] > 0.99 < away["zone"] and abs(away["sw2"] - 1) < 0.05  # of (1, 1)
@pytest.mark.parametrize("script, flags, message", [
    ("toy2d", "--s 2", "choose s in"), ("toy2d", "--out file/x", "--out"),
    ("sit_imagenet", "--preset digits --lr -1", "choose lr"), ("sit_imagenet", "", "give --teacher, a file of SiT"),
    ("sit_imagenet", "--group 7", "divides the batch"), ("sit_imagenet", "--preset digits --method dmd", "no sample"),
    ("sit_imagenet", "--teacher file", "is no SiT XL/2 at 256 px"), ("sit_imagenet", "--accum 3", "take a multiple"),
    ("sit_imagenet", "--preset cifar10 --data images", "one class"), ("sit_imagenet", "--w 1 2", "choose one --w"),
    ("sit_imagenet", "--init .", "config.json"), ("wan", "--frames 20", "multiple of"), ("wan", "score", "give"),
    ("wan", "--window 5", "at least --sink plus --block"), ("wan", "--prompts no.csv", "No such file"),
    ("wan", "--mode bidirectional --frames 1", "rates motion"), ("wan", "--dry-run tiny --teacher thin", "text_dim"),
    ("wan", "--prompts file", "give 1 to"), ("wan", "--method magic", "give --teacher"), ("wan", "--lr 0", "choose lr"),
    ("wan", "--dry-run tiny --model torn", "is no Wan2.1"), ("wan", "--dry-run tiny --init file", "is no student"),
    ("sdxl", "--prompts file", "give 1 to"), ("sdxl", "--prompts latin.txt", "UTF-8"), ("sdxl", "--lr 0", "choose lr"),
    ("sdxl", "--prompts long.txt", "prompt 2"), ("sdxl", "--prompts half.jsonl", "no .json"), ("sdxl", "score", "give"),
    ("sdxl", "--model torn", "has no unet"), ("sdxl", "sample", "--init"), ("sdxl", "--batch 12", "choose K"),
    ("sdxl", "--method dmd2", "dmd2, which needs"), ("sdxl", "--lam 1", "dmd2 and dmdr"), ("sdxl", "--accum 3", "take"),
    ("sdxl", "--dry-run tiny --method dmd2 --real-data images --image-size 192", "bottleneck is 12")])
def test_bad_input_is_one_line(tmp_path, monkeypatch, script, flags, message):
    monkeypatch.chdir(tmp_path), pictures(tmp_path / "images"), (tmp_path / "images/class").mkdir()
    picture("images/0.png").save("images/class/a.png"), (tmp_path / "file").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9"), (tmp_path / "half.jsonl").write_text('{"prompt": ')
    (tmp_path / "long.txt").write_text("ok\n" + "x" * 10_000), (tmp_path / "torn/vae").mkdir(parents=True)
    (tmp_path / "torn/model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline", "unet": ["a", "b"]}')
    (tmp_path / "thin/transformer").mkdir(parents=True), (tmp_path / "thin/transformer/config.json").write_text("{}")
    if script == "toy2d" or (script, flags) == ("wan", "--lr 0"):
        got = subprocess.run([sys.executable, HERE / f"{script}.py", *flags.split()], capture_output=True, text=True)
        assert got.returncode == 2 and message in got.stderr and got.stderr.count("\n") == 1, got.stderr
    else:
        lib = __import__(script)
        with pytest.raises((ValueError, OSError), match=re.escape(message)): lib.main(lib.parse(flags.split()))
    assert not (tmp_path / "runs").exists(), "nothing is written before"
# -------------------------------------------------------------------------------------------------- sit_imagenet.py
@pytest.mark.parametrize("outputs", [8, 4])
def test_sit_reads_both_kinds_of_files(tmp_path, outputs):
    """8 channels out: SiT's own file, t = 0 noise, velocity x - noise. 4: REPA's, t = 1 noise, and its projectors."""
    import sit_imagenet as sit
    made, args = sit.SiT("tiny/2", 8, learn_sigma=outputs == 8), sit.parse(["--dry-run", "tiny", "--model", "tiny/2"])
    w = {k: 0.2 * torch.randn_like(v) for k, v in made.state_dict().items()}
    saved = dict(ema=w, args=argparse.Namespace(lr=1)) if outputs == 8 else w | {"projectors.0.weight": torch.ones(3)}
    torch.save(saved, tmp_path / "sit.pt"), torch.save({k: w[k] for k in w if "pos" not in k}, tmp_path / "no.pt")
    net, (x, t), y = sit.read_sit(tmp_path / "sit.pt", args), (torch.randn(3, 4, 8, 8), torch.rand(3)), torch.arange(3)
    plain = sit.SiT("tiny/2", 8)  # whose last layer has the first four of eight channels
    first = {k: v.unflatten(0, (4, -1))[:, :4].flatten(0, 1) for k, v in w.items() if "final_layer.lin" in k}
    plain.load_state_dict(w | first)
    v = plain(x, t, y) if outputs == 4 else -plain(x, 1 - t, y)
    assert_close(net(x, t, y), v), assert_close(sit.denoiser(net)(x, t, y), x - t[:, None, None, None] * v)
    assert_close(made.pos_embed[0].view(4, 4, 2, 2, 8)[0, -1, 0, 0], (3 * 1e4 ** (-torch.arange(8) / 8)).sin())
    with pytest.raises(ValueError, match="is no SiT tiny"): sit.read_sit(tmp_path / "no.pt", args)
def test_evaluate_takes_adms_statistics_and_its_own(tmp_path, monkeypatch, capsys):
    sit, np, pool = __import__("sit_imagenet"), __import__("numpy"), torch.randn(6, 128)
    monkeypatch.chdir(tmp_path), (tmp_path / "empty").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    np.savez("adm.npz", images, mu=pool.double().mean(0) + 0.5, sigma=torch.cov(pool.double().T))
    np.savez("a.npz", images)
    monkeypatch.setattr(sit, "inception", lambda device: lambda x: (pool, pool, pool))
    run = lambda a, b: sit.main(sit.parse(["evaluate", "--samples", a, "--ref", b]))
    for b, fid in (("a.npz", 0), ("adm.npz", 32)):
        got = (run("a.npz", b), json.loads(capsys.readouterr().out))[1]
        assert abs(got["FID"] - fid) < 1e-2 and abs(got["sFID"]) < 1e-2 and got["precision"] == got["recall"] == 1
    with pytest.raises(ValueError, match="one size"): run("empty", "a.npz")
def survive(tmp_path, script, flags, ranks):
    """A dry run killed after a checkpoint, then resumed: the student and the log of a run left alone, bit for bit."""
    def run(out, *more, wait=True):  # on one rank here, if we wait: most of a process's time is imports
        command = [*flags.split(), "--out", f"{tmp_path}/{out}", *more]
        if wait and ranks == 1: return torch.set_num_threads(1), lib.main(lib.parse(command))
        return (finish if wait else lambda process: process)(launch(*command, ranks=ranks, script=f"{script}.py"))
    killed, lib, process, other = tmp_path / "killed", __import__(script), run("killed", wait=False), None
    if ranks > 1: other = run("whole", wait=False)
    while not list(killed.glob("checkpoints/step_*")) and process.poll() is None: time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children if ranks > 1 else [process.pid]: os.kill(int(pid), signal.SIGKILL)
    assert process.communicate() and not list(killed.glob("student/*"))
    finish(other) if other else run("whole")
    with (killed / "log.jsonl").open("a") as file: file.write('{"step": 1')  # this and a folder a kill may leave
    (killed / "checkpoints/unfinished_99").mkdir(), run("killed", "--resume")
    for path in (tmp_path / "whole/student").iterdir():
        assert path.read_bytes() == (killed / "student" / path.name).read_bytes()
    whole, rows = ([*map(json.loads, (tmp_path / f"{k}/log.jsonl").open())] for k in ("whole", "killed"))
    assert [row["step"] for row in rows] == [*range(1, len(whole) + 1)]
    for k in ("loss_fake", "reward", "g_norm"): assert [row[k] for row in rows] == [row[k] for row in whole]
    assert rows[0].keys() >= {"step", "fake_step", *amd.LOGGED, "skipped", "sec", "samples_per_s", "mem_gib"}
def test_sit_survives_kill_9_and_samples(tmp_path):
    sit, load = __import__("sit_imagenet"), __import__("numpy").load
    flags, _ = "--dry-run tiny --save-every 2 --steps 6 --log-every 1 --chunk 4", torch.set_num_threads(1)
    survive(tmp_path, "sit_imagenet", flags, 1)
    a = torch.load(tmp_path / "whole/student/sit.pt")["ema"]
    alone = sit.prepare(sit.parse(["--dry-run", "tiny"]), CPU)
    assert amd.load(tmp_path / "whole", **alone.parts) == 6 and all(v.equal(a[k]) for k, v in alone.ema.shadow.items())
    half = sit.prepare(sit.parse(["--dry-run", "tiny", "--accum", "2"]), CPU).batch(5, 1)
    assert (y := alone.batch(5, 0)).view(2, 8).unique(dim=1).shape == (2, 1) and half.equal(y[8:]) and y[0] != y[8]
    def sampled(*more):
        command = ["sample", *flags.split(), "--teacher", f"{tmp_path}/whole", "--out", f"{tmp_path}/images", *more]
        return (sit.main(sit.parse(command)), load(tmp_path / "images/samples.npz")["arr_0"])[1]
    assert (images := sampled()).shape == (8, 64, 64, 3) and images.dtype == "uint8"
    net, decode, _ = sit.backbone(sit.parse(["--dry-run", "tiny", "--teacher", f"{tmp_path}/whole"]), CPU)
    assert torch.manual_seed(amd.key(0, 1)) and all(v.equal(a[k]) for k, v in net.state_dict().items())
    z, y = torch.randn(4, 4, 8, 8), torch.randint(1000, (8,), generator=sit.seeded(0))[4:]
    with torch.no_grad(): x = decode(sit.denoiser(net)(z, torch.ones(4), y)).clamp(-1, 1)  # chunk 1, in one step
    assert abs(images[4:] - (127.5 * x.permute(0, 2, 3, 1).numpy() + 127.5)).max() <= 1
    (tmp_path / "images/chunks/000000.npy").unlink()
    assert (sampled("--resume") == images).all()
def test_sit_presets_run_every_arm(tmp_path):
    import sit_imagenet as sit
    flags = f"--preset digits --steps 1 --base-steps 1 --seeds 1 --count 60 --sample-every 1 --w 1.5 --out {tmp_path}"
    args = sit.variant(sit.parse(flags.split()), fit=((3, 1e-3),) * 3)
    sit.main(args)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert rows.keys() == {*(f"{k}, w = 1.5" for k in (*sit.ARMS, "teacher")), "real, held out"}
    assert rows["AMD, w = 1.5"][0].keys() == {*"FD IS precision recall reward accuracy".split()}
    assert min((tmp_path / name).stat().st_size for name in ("curves.png", "samples.png")) > 5000
    with pytest.raises(ValueError, match="another data"): sit.main(sit.variant(
        args, init=tmp_path, out=tmp_path / "other", arms=["AMD"], data=tmp_path))
# ---------------------------------------------------------------------------------------------------------- sdxl.py
@pytest.fixture
def sd(tmp_path, monkeypatch):
    import sdxl
    monkeypatch.chdir(tmp_path)
    args = lambda flags: sdxl.parse(f"--dry-run tiny --no-compile {flags}".split())
    return argparse.Namespace(**vars(sdxl), args=args, run=lambda flags: sdxl.prepare(args(flags), CPU))
CPU, picture = torch.device("cpu"), lambda path: __import__("PIL.Image").Image.open(path)
def pictures(folder, count=5):
    np = __import__("numpy").random.default_rng(0)
    folder.mkdir()
    for i in range(count): __import__("PIL.Image").Image.fromarray(
        np.integers(0, 256, (100, 85 + 10 * i, 3), dtype="uint8")).save(folder / f"{i}.png")
    rows = [json.dumps(dict(file_name=f"{i}.png", text=f"noise number {i}")) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
def test_sdxl_takes_dmd2s_steps(sd, tmp_path):
    """A student and a fake update, GAN and all, by DMD2's own equations on diffusers' scheduler and the whole UNets."""
    from diffusers import DDPMScheduler
    pictures(tmp_path / "real")
    run = sd.run("--method dmd2 --real-data real --lora-rank 0 --group 4")
    grid, nets = DDPMScheduler.from_config(run.pipe.scheduler.config), (run.nets["student"], run.nets["fake"])
    for p in nets[1].head.parameters(): p.data.normal_(0, 0.1)
    (G, psi), c, bottleneck = map(copy.deepcopy, nets), run.batch(0, 0), []
    assert c["index"].view(2, 4).unique(dim=1).shape == (2, 1) and c["index"][0] != c["index"][4]  # groups of four
    psi.mid_block.register_forward_hook(lambda m, i, out: bottleneck.append(out))
    def eps_of(net, x_t, i, mute=1):
        kw = dict(text_embeds=mute * c["pooled"], time_ids=torch.tensor([[64, 64, 0, 0, 64, 64]] * 8))
        return net(x_t, i, mute * c["text"], added_cond_kwargs=kw).sample
    def x0(x_t, i, eps):
        abar = grid.alphas_cumprod[i][:, None, None, None]
        return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    def D(x): return (eps_of(psi, grid.add_noise(x, eps, i), i), psi.head(bottleneck.pop()).flatten())[1]
    k = int(4 * torch.rand((), generator=(shared := torch.Generator().manual_seed(amd.key(0, 0)))).item())  # the exit
    t = torch.rand(2, 2, generator=shared, dtype=torch.float64)[0].repeat_interleave(4)  # one for each group, Alg. 1
    i, steps = (20 + 960 * t).round().long(), [torch.full((8,), step) for step in (999, 749, 499, 249)]
    x_t = torch.manual_seed(amd.key(0, 0, 0, 0)) and torch.randn(8, 4, 8, 8)
    for a, b in zip(steps[:k], steps[1:], strict=False):  # backward simulation
        with torch.no_grad(): x_t = grid.add_noise(x0(x_t, a, eps_of(G, x_t, a)), torch.randn_like(x_t), b)
    x = x0(x_t, steps[k], eps_of(G, x_t, steps[k]))
    eps, real = torch.randn_like(x), run.nets["real"]
    with torch.no_grad():
        x_t = grid.add_noise(x, eps, i)
        none, both = eps_of(real, x_t, i, 0), eps_of(real, x_t, i)
        p_real, p_fake = x - x0(x_t, i, none + 8 * (both - none)), x - x0(x_t, i, eps_of(psi, x_t, i))
        grad = (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)
        pixels = [sd.form(64, [0.5], [0.5])(picture(f"real/{j}.png"))[None] for j in c["index"].tolist()]
        true = torch.cat([run.pipe.vae.encode(v).latent_dist.mean * 0.13025 for v in pixels])
    loss = 0.5 * F.mse_loss(x, (x - grad).detach()) + 5e-3 * F.softplus(-D(x)).mean()
    want, x = [torch.autograd.grad(loss, [*G.parameters()])], x.detach()
    loss = F.mse_loss(eps_of(psi, grid.add_noise(x, eps, i), i), eps) + 1e-2 * (
        F.softplus(D(x)) + F.softplus(-D(true))).mean()
    want.append(torch.autograd.grad(loss, [*psi.parameters()]))
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    opts = {f"opt_{k}": torch.optim.SGD(run.nets[k].parameters(), 1.0) for k in ("student", "fake")}
    log = next(run.train(**opts, fake_steps=1, update=partial(amd.update, clip=1e9)))
    assert k > 0 == log["skipped"] and pixels[0].shape == (1, 3, 64, 64) and -1 <= pixels[0].min() < -0.9
    for net, old, grads in zip(nets, before, want, strict=True):
        for p, q, g in zip(net.parameters(), old, grads, strict=True): assert_close(q - p, g, rtol=1e-3, atol=1e-5)
def test_sdxl_adapters_leave_the_teacher_alone(sd):
    """Student, fake and adapted teacher on one base: none sees another's adapter, and training none of the base."""
    run = sd.run("--method dmdr --lora-rank 4 --lr 1e-2 --fake-lr 2e-2 --accum 2 --ema 0.5")
    look = torch.no_grad()(lambda k, q=(torch.randn(4, 4, 8, 8), torch.ones(4) / 3, run.batch(0, 0)): run.call[k](*q))
    base, own = look("real"), {id(p) for p in run.nets["real"].parameters()}
    assert all(own < {id(p) for p in run.nets[k].parameters()} and look(k).equal(base) for k in ("student", "fake"))
    logs = run.train()
    assert next(logs)["skipped"] == next(logs)["skipped"] == 0 and look("real").equal(base)
    assert min((look("student") - base).abs().max(), (look("fake") - look("student")).abs().max()) > 1e-4
    assert run.adapt(1) and look("blended").equal(look("fake")) and run.adapt(0) and look("blended").equal(base)
    assert {m.scaling["default"] for m in sd.adapters(run.nets["fake"]).values()} == {8 / 4}  # DMD2's alpha
    assert not [k for k in amd.tensors(run.parts) if "lora" not in k and ".opt." not in k]
def test_hpsv2_is_its_definition(sd, tmp_path):
    """Its authors' steps, one picture at a time, on random weights: to a tensor, longest side, black, CLIP, cosine."""
    import open_clip
    from torchvision.transforms import functional as V
    args, texts, words = sd.args(""), [f"picture {i}" for i in range(5)], open_clip.get_tokenizer("ViT-H-14")
    pictures(tmp_path / "some"), torch.manual_seed(7)
    net = open_clip.CLIP(32, open_clip.CLIPVisionCfg(2, 32, 16, patch_size=56), open_clip.CLIPTextCfg(
        width=32, heads=2, layers=2)).eval()
    def by_hand(image, prompt):  # (3, H, W) in [0, 1]
        h, w = (round(side * 224 / max(image.shape)) for side in image.shape[1:])
        image = V.resize(image, [h, w], V.InterpolationMode.BICUBIC, antialias=True)
        image = V.pad(image, [(224 - w) // 2, (224 - h) // 2, 224 - w - (224 - w) // 2, 224 - h - (224 - h) // 2])
        image = V.normalize(image, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
        return 100 * F.cosine_similarity(net.encode_image(image[None]), net.encode_text(words([prompt])))[0]
    images, judge = [picture(f"some/{i}.png") for i in range(5)], torch.manual_seed(7) and sd.hpsv2(args, CPU)
    want = torch.stack([by_hand(V.to_tensor(a), b) for a, b in zip(images, texts, strict=True)])
    pipe, x, _ = sd.random_pipeline(False), torch.randn(4, 4, 8, 8, requires_grad=True), torch.manual_seed(7)
    reward, read, seen = sd.load_reward(args, pipe, CPU)
    assert_close(judge(images, texts), want, rtol=0, atol=1e-4)
    c = sd.conditions(args, pipe, read, CPU)[0](texts, torch.arange(4) // 2)
    image = ((pipe.vae.decode(x / 0.13025).sample + 1) / 2).clamp(0, 1)
    want = torch.stack([by_hand(image[i], texts[i // 2]) for i in range(4)])
    assert_close(reward(x, c), want, rtol=0, atol=1e-4)
    g, grad = (torch.autograd.grad(r.sum(), x)[0] for r in (reward(x, c), want))
    assert_close(g, grad, rtol=1e-3, atol=1e-5)
    assert torch.cat(seen).shape == (4,) and seen[1].all() and g.any()
@pytest.mark.parametrize("ranks", [1, 2])
def test_sdxl_survives_kill_9_and_loads_in_diffusers(sd, tmp_path, ranks):
    """From diffusers to diffusers: alone a LoRA, its average, 8-bit states; on two ranks whole sharded UNets."""
    sd.random_pipeline(False).save_pretrained("model")
    kind = "--lora-rank 4 --ema 0.5 --adam8bit --lr 1e-2" if ranks == 1 else "--lora-rank 0 --lr 1e-3"
    flags = (f"--dry-run tiny --model {tmp_path}/model --no-compile --log-every 1 --steps {4 - ranks} --save-every 1 "
             f"--fake-steps 1 {kind}")
    survive(tmp_path, "sdxl", flags, ranks)
    run, texts = sd.prepare(sd.parse(f"{flags} --out whole --accum 1".split()), CPU), ["a red fox in deep snow"]
    assert amd.load("whole", **run.parts) == 4 - ranks and len([*(tmp_path / "whole/checkpoints").iterdir()]) == 2
    assert bool(run.ema) == (ranks == 1) and not (run.ema and run.ema.swap())
    lines = re.findall(r"```py\n(.*?)```", (HERE / "README.md").read_text(), re.S)[0]  # of which one loads a LoRA
    if ranks > 1: lines = lines.replace("pipe.load", "# pipe.load").replace("# pipe.unet", "pipe.unet")
    for old, new in dict(zip("stabilityai/stable-diffusion-xl-base-1.0 float16 cuda runs/sdxl =0)".split(), (
            "model", "float32", "cpu", "whole", "=0, output_type='pt', generator=seeded)"), strict=True)).items():
        lines = lines.replace(old, new)
    exec(lines, scope := dict(seeded=torch.Generator().manual_seed(5)))
    with torch.no_grad(): x, _ = torch.manual_seed(5) and run.generate(run.encode(texts, torch.tensor([0])))
    image = ((run.pipe.vae.decode(x / 0.13025).sample[0] + 1) / 2).clamp(0, 1)
    assert_close(scope["image"], image, rtol=0, atol=1e-4)
    if ranks == 2: return
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(dict(prompt=f"a fox {i}", tag="t")) for i in range(2)))
    sampled = lambda *more: sd.main(sd.parse(["sample", *flags.split(), *"--prompts p.jsonl --layout geneval".split(),
                                              "--init", f"{tmp_path}/whole", "--out", *more]))
    sampled("one"), sampled("all", "--chunk", "12")  # each image has a seed, whatever the batch
    folder, raw = tmp_path / "one/images/00000", lambda p: torch.tensor(list(picture(p).tobytes()))
    files = [folder / f"samples/000{i}.png" for i in range(4)]
    assert json.loads((folder / "metadata.jsonl").read_text()) == dict(prompt="a fox 0", tag="t")
    for p in files: assert (raw(p) - raw(str(p).replace("/one/", "/all/"))).abs().max() <= 1
    lost = raw(files[2]), files[2].unlink(), files[3].write_bytes(b"kept"), sampled("one", "--resume")
    assert (raw(files[2]) - lost[0]).abs().max() <= 1 and files[3].read_bytes() == b"kept"
    assert (raw(files[2]) - raw(files[1])).abs().max() > 9
# ---------------------------------------------------------------------------------------------------------- wan.py
@pytest.fixture
def wn(tmp_path, monkeypatch):
    wan = (monkeypatch.chdir(tmp_path), __import__("wan"))[1]
    def net(causal=True):
        net = torch.manual_seed(1) and wan.load_transformer("tiny", CPU, torch.float)
        for p in net.parameters(): p.data.normal_(0, 0.3)
        return wan.make_causal(net) if causal else net
    return argparse.Namespace(**vars(wan), wan=wan, net=net)
def masked_pass(net, x, where, t, sees, text, p=4):  # p tokens a frame
    """All frames of x (B, 16, F, h, w) at once, by diffusers' own attention: f is at where[f], t[f], reads sees[f]."""
    attend, t, rope = net.blocks[0].attn1.processor, torch.tensor(t), net.rope.forward
    mask = torch.tensor([[g in s for g in range(len(t))] for s in sees]).repeat_interleave(p, 0).repeat_interleave(p, 1)
    for block in net.blocks: block.attn1.set_processor(lambda attn, h, c, _, rope: attend(attn, h, c, mask, rope))
    net.rope.forward = lambda x: [v.unflatten(1, (-1, p))[:, where].flatten(1, 2) for v in rope(
        x.new_empty(1).expand(1, 1, max(where) + 1, *x.shape[3:]))]
    return x - t[:, None, None] * net(x, 1000 * t.repeat_interleave(p).expand(len(x), -1), text).sample
@pytest.mark.parametrize("n, F, window, sink", [(3, 15, 9, 3), (1, 6, 3, 1), (2, 8, 8, 0), (3, 9, 5, 2), (2, 10, 5, 1)])
@torch.no_grad()
def test_a_cached_stream_is_one_masked_pass(wn, n, F, window, sink):
    """Against clean frames, which are the cache, beside noisy ones; then with a new prompt for the last block."""
    z, texts, t, read = torch.randn(2, 16, F, 4, 4), torch.randn(2, 2, 512, 32), 0.8, wn.read_block
    def roll(window=window, sink=sink, turn=F):
        a, b = (dict(text=text) for text in texts)
        conds = [a] * (turn // n) + [b] * (F // n)
        return torch.cat([x for x, _ in wn.stream(wn.net(), z.split(n, 2), conds, [t], window, sink)], 2)
    def reads(s): return {*range(min(sink, s)), *range(max(min(sink, s), s - (window - sink - n)), s)}
    def off(**kw): return (roll(**kw) - want).abs().max()
    own = [({*range(f // n * n, f // n * n + n)}, reads(f // n * n)) for f in range(F)]
    sees, both = [a | b for a, b in own] + [{F + f for f in a} | b for a, b in own], torch.cat([x := roll(), z], 2)
    want = masked_pass(wn.net(False), both, [*range(F)] * 2, [0.0] * F + [t] * F, sees, texts[0])[:, :, F:]
    assert off() < 1e-5 and (sink == 0 or off(window=window - sink, sink=0) > 1e-3)  # a lost sink
    for wrong in (dict(start=0), dict(t=torch.full((2,), t)), dict(past=[])):  # positions, a cache of noisy x, no cache
        names = ("net", "x_t", "t", "c", "start", "past", "fresh")
        wn.wan.read_block = lambda *a, **kw: read(**dict(zip(names, a, strict=False)) | kw | wrong)  # noqa: B023
        assert (off(), setattr(wn.wan, "read_block", read))[0] > 1e-3, wrong
    turn, k = F - n, min(sink, F - n)  # what the cache holds is read again: the sink, then the others, in blocks
    y, kept = roll(turn=turn), sorted(reads(turn - n) | {*range(turn - n, turn)})
    part = [(i >= k, (i if i < k else i - k) // n) for i in range(len(kept))]
    sees = [{j for j in range(len(kept)) if part[j] <= part[i]} for i in range(len(kept))] + [
        {kept.index(g) for g in reads(turn)} | {*range(len(kept), len(kept) + n)}] * n
    both, level = torch.cat([x[:, :, kept], z[:, :, turn:]], 2), [0.0] * len(kept) + [t] * n
    want = masked_pass(wn.net(False), both, [*kept, *range(turn, F)], level, sees, texts[1])[:, :, len(kept) :]
    assert y[:, :, :turn].equal(x[:, :, :turn]) and (y[:, :, turn:] - want).abs().max() < 1e-5
def test_gradients_of_a_stream_and_its_constant_memory(wn, monkeypatch):
    """A layer that is computed again sees the cache that it saw, and compiles whole; only exits carry gradient."""
    args = argparse.Namespace(mode="streaming", frames=15, block=3, window=9, sink=3, size=[32, 32], student_steps=4)
    c, grads, graphs, past, read = dict(text=torch.randn(1, 512, 32)), [], [], [], wn.read_block
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)
    monkeypatch.setattr(wn.wan, "read_block", lambda *a, **kw: (past.extend(kw.get("past", ())), read(*a, **kw))[1])
    for checkpointing, compiled in ((False, False), (True, False), (True, True)):
        net = wn.net().requires_grad_()
        if checkpointing: net.enable_gradient_checkpointing()
        for block in net.blocks if compiled else (): block.forward = torch.compile(
            block.forward, fullgraph=True, dynamic=False, backend=lambda gm, _: (graphs.append(gm), gm.forward)[1])
        x, levels = torch.manual_seed(3) and zip(*wn.rollout(args, net, [c], u=0.6), strict=True)
        torch.cat(x, 2).sin().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert {*levels} == {5 * 0.5 / 3} and grads[0].abs().max() > 1 and len(graphs) < 30  # kinds of cache x modes
    for other in grads[1:]: assert_close(other, grads[0], rtol=1e-6, atol=1e-6)
    assert past and not any(h.requires_grad for frame in past for layer in frame for h in layer)
    def held():  # bytes of all tensors alive
        alive = [v.untyped_storage() for v in gc.get_objects() if type(v) is torch.Tensor]
        return sum({v.data_ptr(): v.nbytes() for v in alive}.values())
    wn.wan.read_block, past, noise = read, None, torch.randn(1, 16, 27, 4, 4).split(3, 2)
    with torch.no_grad(): bytes_ = [held() for _ in wn.stream(wn.net(), noise, [c] * 9, [1.0], 9, 3)]
    assert bytes_[0] < bytes_[1] < bytes_[2] and len({*bytes_[4:]}) == 1
@pytest.mark.parametrize("columns", [1, 3])
def test_videoalign_is_its_definition(wn, tmp_path, columns):
    """Its authors' steps and files on a tiny Qwen2-VL, peft's LoRA beside the weights: a column of output and the keys
    of old transformers, or three and today's. VQ and MQ do not see the prompt."""
    import transformers as T
    from peft import LoraConfig, inject_adapter_in_model
    from torchvision.transforms import functional as V
    (net, processor), marks, root = wn.random_qwen(True), wn.MARKS, tmp_path / "reward/checkpoint-11352"
    whole = T.Qwen2VLForConditionalGeneration(net.config)
    whole.save_pretrained("base"), processor.save_pretrained("base"), root.mkdir(parents=True)
    words, z = "Rate.\n{}\n{} - {{text_prompt}}\n{}\n".format(*marks), dict(VQ=(1.0, 2.0), MQ=(0.5, 4.0), TA=(0.0, 0.5))
    (root.parent / "prompt_template.py").write_text(f"A = 1\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {words!r}\n1 / 0")
    (root.parent / "model_config.json").write_text(json.dumps(dict(
        model_config=dict(model_name_or_path="base"), data_config=dict(fps=2.0, max_frame_pixels=200_704),
        peft_lora_config=dict(lora_r=2, lora_alpha=6), inference_config={
            f"{k}_{of}": v[i] for k, v in z.items() for i, of in enumerate(("mean", "std"))})))
    processor.tokenizer.add_special_tokens(dict(additional_special_tokens=marks))
    whole.resize_token_embeddings(len(processor.tokenizer))
    net = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"]), whole.model)
    for p in net.eval().parameters(): p.data.normal_(0, 0.2)
    names = {k: k.replace("language_model.", "model.") if columns == 1 else f"model.{k}" for k in net.state_dict()}
    head = {f"base_model.model.{k}_head.weight": torch.randn(columns, 32) for k in ("lm", "rm")}
    torch.save(head | {f"base_model.model.{names[k]}": v for k, v in net.state_dict().items()}, root / "model.pth")
    def by_hand(prompt):  # two frames a second, of 81 at 16 a second
        see = V.resize(frames[[0, 9, 18, 27, 36, 44, 53, 62, 71, 80]], [252, 420], V.InterpolationMode.BICUBIC)
        content = [dict(type="video"), dict(type="text", text=words.format(text_prompt=prompt))]
        text = processor.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True)
        c = processor(text=[text], videos=[see], do_resize=False, do_sample_frames=False, return_tensors="pt")
        ids, h = c["input_ids"], net.get_input_embeddings()(c["input_ids"])
        h[ids == net.config.video_token_id] = net.visual(c["pixel_values_videos"], c["video_grid_thw"]).pooler_output
        places = torch.arange(ids.shape[1]).expand(3, 1, -1)  # what transformers 4.45 takes where it is given none
        h = net.language_model(inputs_embeds=h, position_ids=places).last_hidden_state[0]
        logits = [h[ids[0] == processor.tokenizer.convert_tokens_to_ids(k)][0] @ [*head.values()][1].T for k in marks]
        return torch.stack([(logits[i][i % columns] - m) / s for i, (m, s) in enumerate(z.values())])
    frames, args = torch.randint(256, (81, 3, 240, 416)).byte(), wn.parse(["--videoalign", str(root.parent)])
    with torch.no_grad(): a, b, rate = by_hand("a fox"), by_hand("an owl"), wn.load_videoalign(args, CPU)
    for prompt, want in (("a fox", a), ("an owl", b)): assert_close(rate(frames, prompt), want, rtol=1e-3, atol=1e-4)
    assert a[:2].equal(b[:2]) and a[2] != b[2]
    assert wn.watch(frames.new_zeros(81, 3, 480, 832)).shape == (10, 3, 336, 588)
    assert [len(wn.watch(frames[:k, :, :40, :40])) for k in (2, 3, 5, 33)] == [2, 2, 4, 4]
def test_wan_starts_from_every_kind_of_file(wn, tmp_path):
    """Self-Forcing's .pt by Wan's keys, each used, none left; a transformer's folder; a LoRA and what it stands on."""
    w, state = (base := wn.net(False)).state_dict(), {}
    pairs = ("attn1 self_attn attn2 cross_attn .to_out.0 .o .to_ . norm2 norm3 net.0.proj 0 net.2 2 embedder.linear_1 "
             "embedding.0 embedder.linear_2 embedding.2 time_proj time_projection.1 proj_out head.head "
             "scale_shift_table modulation")
    for k in w:
        name = re.sub("^scale_shift_table", "head.modulation", k.replace("condition_embedder.", ""))
        for a, b in zip(*[iter(pairs.split())] * 2, strict=True): name = name.replace(a, b)
        state[f"model.{name}"] = w[k]
    torch.save(dict(generator=state), "ode_init.pt"), base.save_pretrained("folder"), (tmp_path / "none").mkdir()
    for path in ("ode_init.pt", "folder"):
        other = wn.load_transformer("tiny", CPU, torch.float)
        assert wn.adopt(other, tmp_path / path) is None and all(v.equal(w[k]) for k, v in other.state_dict().items())
    torch.save(state | {"model.odd": w["proj_out.bias"]}, "odd.pt")
    torch.save({k: v for k, v in state.items() if "head" not in k}, "less.pt")
    for path in ("odd.pt", "less.pt", "none"):
        with pytest.raises(ValueError, match="is no student of --model"): wn.adopt(other, tmp_path / path)
    flags = "--dry-run tiny --init ode_init.pt --lora-rank 2 --lr .1 --steps 1 --fake-steps 1 --method magic --out lora"
    nets = wn.prepare(args := wn.parse(flags.split()), CPU).nets
    real, *others = ({id(p) for p in nets[k].parameters()} for k in ("real", "student", "fake", "blended"))
    assert [len(real & each) / len(real) for each in others] == [0, 1, 1]
    wn.main(args), wn.adopt(other, tmp_path / "lora")
    apart = {k.split(".", 2)[2] for k, v in other.state_dict().items() if not v.equal(w[k])}
    assert apart == {f"{k}.weight" for t in wn.TARGETS for k in ([f"attn1.{t}", f"attn2.{t}"] if "to_" in t else [t])}
@pytest.mark.parametrize("ranks", [1, 2])
def test_wan_survives_kill_9_and_writes_videos(wn, tmp_path, ranks):
    """Alone image to video, which diffusers draws as we do; on two ranks a stream of text, sharded, drawn longer."""
    D, T = __import__("diffusers"), __import__("transformers")
    pictures(tmp_path / "i"), (tmp_path / "rows.json").write_text('[{"prompt_en": "fox", "image_name": "i/0.png"}]')
    (tmp_path / "rows.csv").write_text('prompt,prompt_shorter\n"A long, ""red"" fox",fox\nAn owl,owl\nOne more,owl\n')
    pipe, net, read = wn.random_pipeline(True), wn.net(False), lambda path: [*__import__("imageio").v3.imiter(path)]
    if ranks == 1:
        net = D.WanTransformer3DModel(**wn.SIZES["tiny"], in_channels=36, image_dim=16, added_kv_proj_dim=24)
        eye = T.CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        pipe = D.WanImageToVideoPipeline(**pipe.components | dict(
            image_processor=T.CLIPImageProcessor(), image_encoder=T.CLIPVisionModel(eye), transformer_2=None))
    pipe.register_modules(transformer=net), pipe.save_pretrained("model")
    kind = ("bidirectional --method ddmd --reward mq", "streaming")[ranks - 1]
    flags = (f"--dry-run tiny --model {tmp_path}/model --log-every 1 --steps 3 --save-every 1 --fake-steps 1 --lr 1e-2 "
             f"--mode {kind} --prompts {tmp_path}/{('rows.json', 'rows.csv')[ranks - 1]}")
    survive(tmp_path, "wan", flags, ranks)
    assert [len(read(p)) for p in (tmp_path / "whole/samples/step_3").iterdir()] == [33] * ranks
    row = json.loads((tmp_path / "whole/log.jsonl").read_text().splitlines()[-1])
    assert row["ca_norm"] > 1e-6 > abs(row["reward"] - (row["mq"] if ranks == 1 else row["vq"] + row["mq"] + row["ta"]))
    more = f"sample {flags} --init whole --layout vbench --out v --resume --seeds 2 --frames {6 * ranks + 3}".split()
    rows = (wn.main(wn.parse(more)), [*csv.DictReader((tmp_path / "v/videos.csv").open())])[1]
    assert {p.name for p in (tmp_path / "v/videos").iterdir()} == {row["path"][7:] for row in rows}
    assert [*rows[1].values()] == ["videos/fox-1.mp4", ("fox", 'A long, "red" fox')[ranks - 1]]
    film = read(path := tmp_path / "v" / rows[-1]["path"])
    assert (film[9] != read(tmp_path / "v" / rows[-2]["path"])[9]).any(), "each video has its own noise"
    path.unlink(), wn.main(wn.parse(more))
    assert len(film) == 24 * ranks + 9 and all((a == b).all() for a, b in zip(film, read(path), strict=True))
    if ranks == 2: return
    lines = re.findall(r"```py\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1].replace("runs/t2v", "whole")
    scope = dict(pipe=D.DiffusionPipeline.from_pretrained("model"))
    lines = lines.replace(', dtype=torch.bfloat16).to("cuda")', ")").splitlines()
    exec("\n".join(line for line in lines if re.match("import|pipe.(sch|tra)", line)), scope)
    given = dict(height=32, width=32, num_frames=33, num_inference_steps=4, guidance_scale=1, output_type="latent")
    x = torch.manual_seed(5) and scope["pipe"](picture("i/0.png").convert("RGB"), "fox", **given).frames
    run = wn.prepare(wn.parse(flags.split()), CPU)
    assert amd.load(tmp_path / "whole", **run.parts) == 3 and run.ema.swap() is None
    with torch.no_grad(): y, _ = torch.manual_seed(5) and run.generate(run.encode(run.rows))
    vae, many = run.pipe.vae, torch.cat([*wn.frames_of(run.pipe.vae, y.split(4, 2))], 2)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    film = (127.5 * vae.decode(y * std + mean).sample + 127.5).round().clamp(0, 255).byte()
    assert_close(x, y, rtol=0, atol=1e-4), assert_close(many, film)
for name, f in list(globals().items()):
    if name.startswith("test_") and f.__code__.co_firstlineno < PROCESSES: globals()[name] = pytest.mark.fast(f)
if __name__ == "__main__":
    span(sys.argv[1])
    sys.stdout.flush(), os._exit(0)  # all is written; gloo's threads now and then abort the interpreter's teardown
