"""parts/beyond.py: operators, sensors and exits, held against what each is in a simple case."""

import pytest
import torch
from torch.testing import assert_close

import amd
from parts import beyond


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------- operators
def draw(B=6):
    """A micro-batch of Algorithm 1 with samples (B, 3, 2)."""
    x, eps = torch.randn(2, B, 3, 2)
    t = torch.rand(B)
    y = torch.ones(B)
    return amd.Draw(y, x, 1.0, torch.zeros(B), torch.ones(B), t, eps, amd.renoise(x, t, eps))


def real(x_t, t, y):
    """A teacher whose guess depends on the condition, by more than a factor."""
    return x_t * (1 - amd.like(t, x_t)) + amd.like(y, x_t) * x_t.flip(0).sin()


def zero(y):
    """The empty condition."""
    return torch.zeros_like(y)


def displaced(F_t, w, **hyper):
    """Displacements by an operator and by amd.joint, at the same samples -> both, the draw."""
    of, x0_fake = draw(), torch.randn(6, 3, 2)
    given = (of, real, x0_fake, zero, w, amd.flow)
    return F_t(*given, **hyper), amd.joint(*given), of


def dot(a, b):
    """The inner product of each sample."""
    return (a * b).flatten(1).sum(1)


def test_a_projected_guidance_has_no_part_along_the_estimate():
    """What is taken away is along it, matching is as it was, and half a share takes half."""
    d, plain, of = displaced(beyond.projected, 1.5)
    x0 = of.x - d.cond

    assert_close(dot(d.ca, x0), torch.zeros(6), atol=1e-5, rtol=0)
    assert dot(plain.ca, x0).abs().min() > 1e-3
    removed = plain.ca - d.ca
    assert_close(dot(removed, x0).abs(), removed.flatten(1).norm(dim=1) * x0.flatten(1).norm(dim=1))
    assert d.dm.equal(plain.dm)
    torch.manual_seed(0)
    half, *_ = displaced(beyond.projected, 1.5, share=0.5)
    assert_close(half.ca, (d.ca + plain.ca) / 2)


def test_an_orthogonal_guidance_has_no_part_along_the_matching():
    """So it is never longer than guidance as it is."""
    d, plain, _ = displaced(beyond.orthogonal, 2.0)

    assert_close(dot(d.ca, d.dm), torch.zeros(6), atol=1e-5, rtol=0)
    assert dot(plain.ca, plain.dm).abs().min() > 1e-3
    assert (d.ca.flatten(1).norm(dim=1) < plain.ca.flatten(1).norm(dim=1)).all()
    assert d.dm.equal(plain.dm)


@pytest.mark.parametrize("F_t", [beyond.projected, beyond.orthogonal])
def test_without_guidance_there_is_nothing_to_project(F_t):
    """At w = 1 both are amd.joint."""
    d, plain, _ = displaced(F_t, 1)

    assert d.cond.equal(plain.cond)
    assert d.ca.eq(0).all()


@pytest.mark.parametrize("share", [0.5, 1.0, -0.5])
def test_momentum_mixes_matching_with_its_average(share):
    """DM is linear in the fake's guess, so the oracle mixes two DMs; guidance is as it was."""

    def average(x_t, t, y):
        return x_t.cos()

    d, plain, of = displaced(beyond.momentum, 1.5, average=average, share=share)

    lagging = plain.cond - (of.x - average(of.x_t, of.t, of.c))
    assert_close(d.dm, (1 - share) * plain.dm + share * lagging)
    assert d.ca.equal(plain.ca)


def test_each_operator_is_what_its_name_says():
    """A row of amd.METHODS takes it in place of its F_t; the oracle is the gradient by hand."""
    of, x0_fake = draw(), torch.randn(6, 3, 2)
    options = dict(null=zero, w=1.5, normalize=False)
    plain, d = amd.gradient(amd.method("amd"), of, real, x0_fake, **options)
    x0, ahead = of.x - d.cond, x0_fake - of.x_t.cos()

    def along(axis):
        return amd.like(dot(d.ca, axis) / dot(axis, axis), axis) * axis

    wanted = {
        "CA less half of its part along x0": -along(x0) / 2,
        "CA less its part along x0": -along(x0),
        "CA less its part along DM": -along(d.dm),
        "DM half averaged": -ahead / 2,
        "DM half ahead": ahead / 2,
    }

    operators = beyond.operators_of(lambda x_t, t, y: x_t.cos())
    assert operators.keys() == wanted.keys()
    for name, F_t in operators.items():
        row = amd.method("amd")._replace(F_t=F_t)
        g, _ = amd.gradient(row, of, real, x0_fake, **options)
        assert_close(g - plain, wanted[name], atol=1e-5, rtol=1e-4)


def test_an_average_follows_a_network():
    """A rate of 1 copies it; what the network has alone is left out, as an embedding of exits."""
    average, net = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    net.exits = torch.nn.Parameter(torch.zeros(3))
    before = average.weight.detach().clone()

    beyond.follow(average, net, 0.1)
    assert_close(average.weight, 0.9 * before + 0.1 * net.weight)
    beyond.follow(average, net, 1.0)
    assert_close(average.weight, net.weight)
    assert_close(average.bias, net.bias)


# ------------------------------------------------------------------------------------------ sensors
def test_teachers_that_agree_are_content():
    """And a disagreement is relative to the distance of x from the real teacher's guess."""
    x, y = torch.randn(5, 2), torch.ones(5)

    at = torch.tensor([1.0, 2.0])

    def fixed(x_t, t, y):
        return at.expand_as(x_t)

    def beside(x_t, t, y):
        return fixed(x_t, t, y) + torch.tensor([3.0, 4.0])

    assert beyond.disagreement(fixed, fixed, 0.5)(x, y).eq(0).all()
    assert_close(beyond.disagreement(fixed, beside, 0.5)(x, y), -5 / (x - at).norm(dim=1))


@pytest.mark.parametrize("t", [0.2, 0.6])
def test_a_teacher_that_passes_noise_on_is_inconsistent_by_its_variance(t):
    """The identity at x_t has the variance of the noise, t^2; a constant has none."""
    x, y = torch.randn(4, 50_000), torch.ones(4)

    sensed = beyond.inconsistency(lambda x_t, t, y: x_t, t)(x, y)

    assert_close(sensed, torch.full((4,), -(t**2)), rtol=0.05, atol=0)
    constant = beyond.inconsistency(lambda x_t, t, y: torch.ones_like(x_t), t)
    assert constant(x, y).eq(0).all()


def test_an_ensemble_is_a_mean_or_the_worst():
    """By hand, for two rewards that disagree."""
    rewards = [lambda x, _y: x[:, 0], lambda x, _y: -x[:, 0]]
    x = torch.tensor([[2.0], [-1.0]])

    assert beyond.ensemble(rewards)(x, None).tolist() == [0, 0]
    assert beyond.ensemble(rewards, worst=True)(x, None).tolist() == [-2, -1]


def test_the_target_is_where_matching_moves_a_sample():
    """Teachers that guess v and -v move x by 2 v, as -H_std does."""
    x, y = torch.randn(5, 2), torch.ones(5)
    v = torch.tensor([1.0, -2.0])
    sense = beyond.of_target(
        lambda x, _y: x[:, 1],
        lambda x_t, t, y: v.expand_as(x_t),
        lambda x_t, t, y: -v.expand_as(x_t),
        0.5,
    )

    assert_close(sense(x, y), x[:, 1] - 4)


def test_train_takes_a_sensor_for_a_reward():
    """No closure of train changes, and a sample that a sensor dislikes weighs more."""
    nets = [torch.nn.Linear(2, 2) for _ in range(2)]
    opts = [torch.optim.SGD(net.parameters(), 0.1) for net in nets]

    def denoiser(net):
        return lambda x_t, t, y: net(x_t)

    def student(y, u):
        return denoiser(nets[0])(torch.randn(16, 2), None, y), 1.0

    teacher = denoiser(torch.nn.Linear(2, 2))
    sense = beyond.disagreement(teacher, denoiser(nets[1]), 0.4)
    seen = {}

    def probe(of, d, g):
        seen.update(a=of.a, weight=of.weight)
        return {}

    updates = amd.train(
        amd.method("amd"),
        student,
        teacher,
        denoiser(nets[1]),
        lambda n, j: torch.ones(16),
        *opts,
        reward=sense,
        K=8,
        probe=probe,
    )
    row = next(updates)

    assert row["reward"] < 0
    assert seen["a"].unique().numel() > 8
    assert_close(seen["weight"], (-seen["a"]).exp())


# -------------------------------------------------------------------------------------------- exits
LEVELS = [1.0, 0.75, 0.5, 0.25]


def test_a_weighted_fake_learns_four_times_as_much_of_the_last_exit():
    """Its guess is the fake's own, the weights have a mean of 1, and gradients scale with them."""
    net = torch.nn.Linear(2, 2)
    denoise, aware = beyond.weighted(lambda x_t, t, c: net(x_t), LEVELS)
    x_t, y = torch.randn(5, 2), torch.ones(5)

    sizes = []
    for level in LEVELS:
        net.zero_grad()
        guess = denoise(x_t, None, aware(y, level))
        assert_close(guess, net(x_t))
        guess.square().sum().backward()
        sizes.append(net.weight.grad.norm())
    net.zero_grad()
    net(x_t).square().sum().backward()

    share = torch.stack(sizes) / net.weight.grad.norm()
    assert_close(share, torch.tensor([4.0, 4, 4, 16]) / 7)


def test_mixed_exits_are_each_samples_own():
    """The guess at level t is theta x_t, so a gradient of x_t, and no more, passes through theta.

    Each sample tells its level, and all levels come.
    """
    theta = torch.ones((), requires_grad=True)
    seen = {}

    def denoise(x_t, t, c):
        seen[t[0].item()] = x_t.detach()
        return theta * x_t

    made = beyond.mixed_exits(denoise, torch.randn(400, 2), None, LEVELS)

    assert sorted(made.t_G.unique().tolist()) == sorted(LEVELS)
    x_t = torch.stack([seen[level][i] for i, level in enumerate(made.t_G.tolist())])
    assert_close(made.x, x_t)
    (grad,) = torch.autograd.grad(made.x.sum(), theta)
    assert_close(grad, x_t.sum())


def test_mixed_exits_go_down_the_levels():
    """A student that guesses 0 is asked at noise of the next level: its std is the level."""
    seen = {}

    def denoise(x_t, t, c):
        seen[t[0].item()] = x_t.std().item()
        return torch.zeros_like(x_t)

    beyond.mixed_exits(denoise, torch.randn(20_000, 2), None, LEVELS)

    assert seen == pytest.approx({level: level for level in LEVELS}, rel=0.03)


def test_mixed_exits_of_one_level_are_backward_simulation():
    """There is nothing to mix."""
    z = torch.randn(6, 2)

    def denoise(x_t, t, c):
        return x_t.sin()

    mixed = beyond.mixed_exits(denoise, z, None, [1.0])

    assert mixed.x.equal(amd.backward_simulation(denoise, z, None, [1.0]).x)
    assert mixed.t_G.eq(1).all()


@pytest.mark.parametrize(
    "kind, numbers",
    [("one fake", [1, 3, 4]), ("exit-aware", [1, 3, 4]), ("last alone", [4, 4, 4])],
)
def test_a_kind_of_training_has_its_exits(kind, numbers):
    """u picks the exit, but for a student that is trained at its last one alone."""
    generate = beyond.generation(kind, lambda x_t, t, c: x_t, LEVELS)

    exits = [generate(torch.randn(2, 2), None, u) for u in (0.1, 0.6, 0.9)]

    assert [made.number for made in exits] == numbers


def test_kinds_of_exits_differ_as_they_say():
    """A mixed one has a level for each sample; "more updates" alone doubles the fake's."""
    z = torch.randn(50, 2)

    mixed = beyond.generation("mixed", lambda x_t, t, c: x_t, LEVELS)(z, None, 0.1)

    assert len(mixed.t_G.unique()) == 4
    doubled = {kind for kind in beyond.EXITS if beyond.more_updates(kind) == 2}
    assert doubled == {"more updates"}
    assert all(beyond.more_updates(kind) in (1, 2) for kind in beyond.EXITS)
    with pytest.raises(ValueError, match="choose one of one fake, exit-aware"):
        beyond.generation("last", None, LEVELS)
