"""toy2d.py: its exact teacher, its measures, its figures and its bad input.

The teacher and the measures are held against the data, nine Gaussians. The figures are made as
short as can be, and no test looks at what they show.
"""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import amd
import toy2d as lab
from helpers import ROOT, run_main


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


# -------------------------------------------------------------------------------------- the teacher
@pytest.mark.parametrize(
    "t, at, error",
    [
        (0.6, (0.3, -0.2), 0.02),  # all three modes of the row count
        (0.1, (0.25, 0.15), 0.005),  # one mode does, and its width tells where in it
    ],
)
def test_the_exact_teacher_is_the_mean_of_the_data_that_a_noise_level_allows(t, at, error):
    """It is E[x0 | x_t, class], and its modes have the width of the data's.

    The oracle is Bayes' rule over 400,000 samples of class 1, the middle row: each counts by the
    density of the noise that would lead from it to x_t.
    """
    x_t = torch.tensor([at])
    classes = torch.ones(400_000).long()
    data = lab.real_samples(classes)
    weight = (-(x_t - (1 - t) * data).square().sum(1) / (2 * t**2)).softmax(0)

    x0 = lab.exact_teacher(x_t, torch.tensor([t]), lab.Condition(classes[:1]))

    assert_close(
        x0[0],
        weight @ data,
        rtol=0,
        atol=error,
    )


def test_the_density_of_the_data_integrates_to_one():
    """energy is -log p of all nine modes, with its constant.

    The oracle is a sum over 401 x 401 points of the square [-4, 4]^2, outside which nothing lies.
    """
    density = (-lab.energy(lab.grid(401))).exp()

    cell = (8 / 400) ** 2
    assert_close(
        density.sum() * cell,
        torch.tensor(1.0),
        rtol=1e-3,
        atol=0,
    )


# ------------------------------------------------------------------------------------- the measures
# The modes that the "selective" reward rates high, each as often as target_mass says: class by
# class, the outer two, the middle one, the outer two.
WANTED = [0, 2, 4, 4, 6, 8]


def perfect_samples():
    """9,000 samples of what a student of the "selective" reward should draw."""
    modes = WANTED * 1500
    return lab.MODES[modes] + lab.STD * torch.randn(len(modes), 2)


def test_the_target_shares_each_class_among_its_rewarded_modes():
    """A class, a row of the grid, is drawn a third of the time.

    The reward wants the outer two modes of the first and the last row, and of the middle row only
    the middle one.
    """
    mass = lab.target_mass("selective").view(3, 3)

    sixths = torch.tensor([[1, 0, 1], [0, 2, 0], [1, 0, 1]])
    assert_close(mass, sixths / 6)


def test_a_sample_belongs_to_a_mode_within_four_std():
    """A sample of the data lies farther out 3 times in 10,000.

    One that does still has a nearest mode.
    """
    way = torch.tensor([0.6, 0.8])
    near = lab.MODES[5] + 3.9 * lab.STD * way
    far = lab.MODES[1] + 4.1 * lab.STD * way
    x = torch.stack([near, far])

    mode, on = lab.nearest(x)

    assert mode.tolist() == [5, 1]
    assert on.tolist() == [True, False]


def test_samples_of_the_target_measure_well():
    """All modes are there, nothing is off them or on bad ones, and no distance is large.

    `zone` is the share of samples whose energy is above the 99.9 % quantile of the data: one in a
    thousand.
    """
    got = lab.measure(perfect_samples(), "selective")

    assert got["off"] < 0.002
    assert got["bad"] < 0.002
    assert got["modes"] == 5
    assert got["tv"] < 0.02
    assert got["sw2"] < 0.05
    assert 1e-4 < got["zone"] < 0.003


def test_samples_between_the_modes_measure_badly():
    """They are perfect samples, moved by (1, 1), so that all lie off the modes and in the zone.

    A sliced distance is the root of a mean square over directions. By the projection of (1, 1) it
    is 1. There is nothing whose spread about a mode could be told.
    """
    got = lab.measure(perfect_samples() + 1, "selective")

    assert got["off"] > 0.99
    assert got["zone"] > 0.99
    assert abs(got["sw2"] - 1) < 0.05
    assert math.isnan(got["spread"])


# ------------------------------------------------------------------------------------- the networks
def test_a_fake_that_is_told_the_exit_begins_as_one_that_is_not():
    """Its vectors begin at zero, and a gradient reaches that of the exit at hand alone."""
    net = lab.MLP()
    x, t = torch.randn(6, 2), torch.rand(6)
    c = lab.Condition(torch.arange(6) % 3)
    told = c._replace(exit=torch.full((6,), 2))
    assert net(x, t, told).equal(net(x, t, c))

    net(x, t, told).sum().backward()
    assert [bool(row.any()) for row in net.exits.grad] == [False, False, True] + [False] * 5
    net.exits.data[2] = 1.0
    assert not net(x, t, told).equal(net(x, t, c))


# -------------------------------------------------------------------------------------- the figures
@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """The folder of all figures, each with one seed, four student updates and few samples."""
    out = tmp_path_factory.mktemp("figures")
    flags = "--figure all --steps 4 --fit 20 --batch 32 --group 8 --seeds 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "SAMPLES", 1200)
        run_main("toy2d", [*flags.split(), "--out", out])
    return out


def table(figures, name):
    """The numbers of a figure."""
    return json.loads((figures / f"{name}.json").read_text())


@pytest.mark.parametrize(
    "name, reward",
    [
        ("shaping", "selective"),
        ("zone", "selective"),
        ("naive", "corner"),
        ("ablation", "selective"),
        ("tilt", "linear"),
        ("methods", "selective"),
        ("exits", "selective"),
        ("operators", "selective"),
        ("sensors", "global"),
        ("dsa", "selective"),
        ("fakes", "selective"),
    ],
)
def test_a_figure_is_a_picture_and_a_table(figures, name, reward):
    """Each figure has its own default reward, and its table says which that was."""
    told = table(figures, name)

    assert told.keys() >= {"figure", "seconds"}
    assert told["reward"] == reward
    assert told["seed"] == [0]
    assert (figures / f"{name}.png").stat().st_size > 10_000


def test_the_figure_of_methods_measures_every_row_at_both_exits(figures):
    """Students take two steps there, so what they draw after the first is measured too."""
    last = set(amd.METHODS)
    first = {f"{name}, exit 1" for name in amd.METHODS}

    assert table(figures, "methods")["arms"].keys() == last | first


def test_the_figure_of_exits_measures_each_of_four(figures):
    """Of a student under DMD and AMD, with one fake for all exits and with one that is told."""
    fakes = ("one fake", "exit-aware")
    arms = {f"{name}, {fake}" for name in ("DMD", "AMD, tau 1", "AMD, tau 0.2") for fake in fakes}
    wanted = {f"{arm}, exit {i}" for arm in arms for i in (1, 2, 3, 4)}
    assert table(figures, "exits")["arms"].keys() == wanted


@pytest.mark.parametrize("name", ["operators", "sensors", "dsa", "fakes"])
def test_a_comparison_is_of_differences_seed_by_seed(figures, name):
    """Each arm but the references is compared with another, and of one seed there is no interval.

    The oracle subtracts the numbers of the two arms.
    """
    told = table(figures, name)

    assert told["differences"]
    for name, row in told["differences"].items():
        arm, other = (told["seeds"][part][0] for part in name.split(" - "))
        for measure in ("off", "reward"):
            assert row[measure] == [pytest.approx(arm[measure] - other[measure]), None]


def test_sensors_are_ranked_beside_the_reward(figures):
    """Those that ask the teachers do so at four levels; over the plane and on a bad student."""
    ranks = table(figures, "sensors")["ranks"]

    assert len(ranks) == 2 * (1 + 3 * 4 + 3)
    assert all(-1 <= rank <= 1 for rank, _ in ranks.values())
    assert ranks["plane: reward"][0] > 0.9
    assert ranks["plane: worst of three hackable"][0] > ranks["plane: hackable reward"][0]


def test_exits_are_compared_at_equal_cost(figures):
    """The fake of "more updates" has twice the updates in half of the student's.

    So a sample of its update costs twice as many calls; DMD has no groups that could mix exits.
    """
    calls = table(figures, "fakes")["calls"]

    plain, more = calls["AMD, one fake"], calls["AMD, more updates"]
    assert (plain["fake"], more["fake"]) == (4, 8)
    assert (plain["teacher"], more["teacher"]) == (1, 1)
    assert calls["AMD, last alone"]["student"] == calls["AMD, mixed"]["student"] == 4 * 4
    assert calls["AMD, exit-aware"] == plain
    assert "AMD, mixed" in calls
    assert "DMD, mixed" not in calls


def test_guidance_and_sensors_cost_calls(figures):
    """Two of the teacher with guidance; a sensor asks in each of the four iterations."""
    operators, sensors = (table(figures, name)["calls"] for name in ("operators", "sensors"))

    assert operators["AMD"] == dict(student=4, fake=4, teacher=2)
    assert operators["AMD, w = 1"] == dict(student=4, fake=4, teacher=1)
    assert operators["AMD, DM half averaged"] == dict(student=4, fake=5, teacher=2)
    assert sensors["AMD, disagreement"] == dict(student=4, fake=8, teacher=5)
    assert sensors["AMD, inconsistency"] == dict(student=4, fake=4, teacher=9)


@pytest.mark.parametrize("only, arms", [("DMD, one", {"DMD, one fake"}), ("DMD", 5), ("AMD", 6)])
def test_a_comparison_may_have_some_of_its_arms(monkeypatch, only, arms):
    """Those whose names begin so; the reference is one of them, or there is nothing to compare."""
    made = {}

    def run(self, arms, steps, starts):
        made.update(arms)
        return {name: [lab.Result({}, [torch.randn(9, 2)] * 4, {})] * 2 for name in arms}

    monkeypatch.setattr(lab.Lab, "run", run)
    args = lab.parse(["--only", only, "--seeds", "2"])

    _, told = lab.compare(lab.fakes, lab.lab_of(args, "fakes", None))

    if isinstance(arms, set):
        assert made.keys() == arms
    else:
        assert len(made) == arms
    assert len(told["differences"]) == len(made) - 1


def test_tables_are_strict_json(figures):
    """A number that there is not is null, for NaN is no JSON."""
    for path in figures.glob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_the_animation_has_a_frame_for_each_of_its_updates(tmp_path):
    """Three panels side by side, small enough for a page."""
    flags = "--animate --steps 4 --fit 20 --batch 32 --group 8"
    run_main("toy2d", [*flags.split(), "--out", tmp_path])
    movie = Image.open(tmp_path / "shaping.gif")
    assert movie.n_frames == 5
    assert movie.width > 2 * movie.height


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tau 0", "choose tau above 0"),
        ("--figure dsa --only AMD", "--only AMD: choose how one of w = 1.25: DMD"),
        ("--figure tilt --only AMD", "--only is for --figure operators, sensors"),
        ("--figure fakes --steps 3", "--steps 3: choose 4 or more"),
        ("--figure fakes --student-steps 9", "--student-steps 9: choose 2 to 8"),
        ("--out file/x", "--out"),
        ("--fake-steps 0", "--fake-steps 0: choose"),
    ],
)
def test_bad_input_says_what_to_mend_before_anything_is_written(
    tmp_path, monkeypatch, flags, message
):
    """`file` is no folder, so nothing can be made in it."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run_main("toy2d", flags.split())

    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    """Of a process; what else may be wrong is tested above."""
    command = [sys.executable, ROOT / "toy2d.py", "--s", "2"]

    got = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert got.returncode == 2
    assert "choose s in" in got.stderr
    assert got.stderr.count("\n") == 1
