"""toy_images.py: its data, its measures, a lab from the networks to the table, bad input.

The labs are of the 8 x 8 digits, with networks that have learned next to nothing, so no test looks
at what the numbers say. Later labs share the networks and bases of the first by --init.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure  # noqa: F401, forks need not import again what is imported here
import numpy as np
import pytest
import timm.models.vision_transformer  # noqa: F401
import torch
import torch.nn.functional as F
import torch_fidelity  # noqa: F401
import torchvision.utils  # noqa: F401
from PIL import Image
from torch import nn
from torch.testing import assert_close

import amd
import running
import toy_images as toy
from helpers import Forked, read_log, run_main
from parts import beyond

TINY = "--fit-teacher 5 --fit-reward 5 --fit-judge 10 --base-steps 2 --steps 3 --sample-every 2"
TINY = [*TINY.split(), "--batch", "16", "--count", "60"]


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """Nothing may be written to where the tests are started.

    An arm's own curves are left out, for they take most of its time and are tested in
    test_running.py. Workers are forks of this process, so it holds for them too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setattr(running, "draw_log", lambda out: None)
        yield


def settings(*flags):
    """The Lab of a command line."""
    return toy.lab_of(toy.parse([*TINY, *map(str, flags)]))


def make(out, *flags):
    """Run a lab to its end -> its table."""
    run_main("toy_images", [*TINY, "--out", out, *flags])
    return table_of(out)


def table_of(out):
    """The table of a lab; NaN is no JSON."""
    return json.loads((out / "table.json").read_text(), parse_constant=pytest.fail)


# --------------------------------------------------------------------------------------------- data
def test_a_fifth_of_the_digits_is_held_out():
    """The held-out images are what the best of students could measure, so none is trained on.

    There are 1,797 digits in 17 shades, from 0 to 16, which become bytes from 0 to 255. The oracle
    is the file of scikit-learn, in any order.
    """
    from sklearn.datasets import load_digits

    images = toy.read_images("digits", 8)

    assert (len(images.x), len(images.x_held), images.classes) == (1438, 359, 10)
    pixels = torch.cat([images.x, images.x_held]).flatten(1)
    labels = torch.cat([images.y, images.y_held])
    found = torch.cat([pixels, labels[:, None]], 1)
    data, target = map(torch.from_numpy, load_digits(return_X_y=True))
    want = torch.cat([(data / 16 * 255).round(), target[:, None]], 1).to(found)
    assert found.unique(dim=0).equal(want.unique(dim=0))


def coloured(folder, count):
    """A labelled folder of two classes, with a hidden one beside them -> folder.

    A picture is 36 x 12 pixels, green with a middle square in the colour of its class.
    """
    for name, colour in (("cat", "red"), ("dog", "blue"), (".ipynb_checkpoints", "white")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (36, 12), "green")
            image.paste(colour, (12, 0, 24, 12))
            image.save(folder / name / f"{i}.png")
    return folder


def test_a_labelled_folder_has_a_class_a_folder(tmp_path):
    """Classes are numbered in the order of their names, and what is hidden is no class.

    Of a picture the middle square counts, and here it has one colour.
    """
    images = toy.read_images(str(coloured(tmp_path / "data", 12)), 12)

    assert (images.classes, len(images.x), len(images.x_held)) == (2, 20, 4)
    red_and_blue = torch.tensor([[255, 0, 0], [0, 0, 255]]).byte()
    for x, y in ((images.x, images.y), (images.x_held, images.y_held)):
        want = red_and_blue[y][:, :, None, None].expand(-1, -1, 12, 12)
        assert x.equal(want)


def test_a_labelled_folder_with_few_images_is_refused_before_anything_is_written(tmp_path):
    """Measures need four images that are held out, so there must be twenty."""
    folder = coloured(tmp_path / "data", 8)

    with pytest.raises(ValueError, match="has 16 images: give 20 at least, a fifth is held out"):
        make(tmp_path / "out", "--data", folder)

    assert not (tmp_path / "out").exists()


def test_a_labelled_folder_makes_a_lab(tmp_path):
    """Its pictures have three channels and any size, and one seed has no spread."""
    folder = coloured(tmp_path / "data", 12)
    flags = ["--data", folder, "--image-size", 8, "--model", "digits/4", "--seeds", 1]

    table = make(tmp_path / "out", *flags, "--arms", "DMD")

    assert table["rows"].keys() == {"real, held out", "teacher, w = 1", "DMD, w = 1"}
    with Image.open(tmp_path / "out/samples.png") as picture:
        red, green, blue = np.asarray(picture).reshape(-1, 3).T
    assert (red != blue).any()
    assert (red != green).any()


# -------------------------------------------------------------------------------------------- a lab
@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The folder of a lab of one arm with two seeds."""
    out = tmp_path_factory.mktemp("lab")
    make(out, "--arms", "AMD", "--seeds", 2)
    return out


MEASURES = {"reward", "accuracy", "FD", "IS", "precision", "recall"}


def test_the_table_has_a_row_for_each_arm_and_a_dict_for_each_seed(lab):
    """The curves are measured each second update and after the last, and end in the row.

    Beside the arms are what they are compared with, the teacher and real images held out.
    """
    table = table_of(lab)

    rows = table["rows"]
    assert [*rows] == ["real, held out", "teacher, w = 1", "AMD, w = 1"]
    assert [len(seeds) for seeds in rows.values()] == [1, 1, 2]
    for seeds in rows.values():
        assert all(row.keys() == MEASURES for row in seeds)
    assert table["steps"] == [2, 3]
    assert table["curves"].keys() == {"AMD, w = 1"}
    curve = table["curves"]["AMD, w = 1"]
    assert [len(seeds) for seeds in curve] == [2, 2]
    assert curve[-1] == rows["AMD, w = 1"]
    assert curve[0] != curve[-1]
    assert curve[-1][0] != curve[-1][1]


@pytest.mark.parametrize("name", ["curves.png", "logs.png", "samples.png"])
def test_a_lab_draws_its_curves_and_samples(lab, name):
    """What they show is for the eye; a picture of nothing would be a smaller file."""
    assert (lab / name).stat().st_size > 5000


def times_of(out, *names):
    """When the files of finished runs and fitted networks were written, by their paths."""
    files = [path for name in names for path in out.glob(name)]
    return {path.relative_to(out): path.stat().st_mtime_ns for path in files}


def test_a_lab_goes_on_with_more_arms(lab, tmp_path):
    """What was interrupted is trained again to the same end, and what was done is left alone.

    One arm lacks its mark `done`, and here it has lost its checkpoint too. The lab is a copy, for a
    lab may be moved.
    """
    out = tmp_path / "lab"
    shutil.copytree(lab, out, copy_function=shutil.copy2)
    before = table_of(out)["rows"]
    again = out / "AMD, w = 1, seed 1"
    (again / "done").unlink()
    shutil.rmtree(again / "checkpoints")
    kept = times_of(out, "*.pt", "base*/done", "AMD, w = 1, seed 0/*")

    table = make(out, "--arms", "AMD", "DMDR", "--seeds", 2, "--resume")

    rows = table["rows"]
    assert [*rows] == [*before, "DMDR, w = 1"]
    assert rows["AMD, w = 1"] == before["AMD, w = 1"]
    assert rows["DMDR, w = 1"] != before["AMD, w = 1"]
    assert times_of(out, *map(str, kept)) == kept
    assert (again / "done").exists()


def test_a_run_that_ended_before_its_mark_is_marked(lab, tmp_path, capsys):
    """Its last checkpoint is there, so there is nothing left to train, and the table is printed.

    The oracle of the print is the mean of two numbers, and their spread.
    """
    out = tmp_path / "lab"
    shutil.copytree(lab, out, copy_function=shutil.copy2)
    mark = out / "AMD, w = 1, seed 1/done"
    mark.unlink()
    kept = times_of(out, "AMD, w = 1, seed 1/samples/*")

    make(out, "--arms", "AMD", "--seeds", 2, "--resume")

    assert mark.exists()
    assert times_of(out, *map(str, kept)) == kept
    lines = capsys.readouterr().out.splitlines()
    a, b = (row["FD"] for row in table_of(out)["rows"]["AMD, w = 1"])
    (line,) = [line for line in lines if line.startswith("AMD, w = 1 ")]
    assert f"{(a + b) / 2:.3f} +- {abs(a - b) / 2**0.5:.3f}" in line
    assert lines[-1] == f"see {out}"


def test_a_lab_survives_kill_9(lab, tmp_path):
    """It is killed with its workers in the middle of an arm, and goes on, with a seed more.

    It shares the networks and the base of the first lab, which are never made again, and has its
    settings; so the table of the first lab is the oracle.
    """
    out = tmp_path / "killed"
    flags = ["--init", lab, "--arms", "AMD"]
    shared = times_of(lab, "*.pt", "base*/*")
    run = Forked("toy_images", [*TINY, "--out", out, *flags, "--seeds", 1])
    while not [*out.glob("*/samples/step_2.json")] and run.running():
        time.sleep(0.01)
    (pid,) = run.pids
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    run.kill()
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    assert not [*out.glob("*/done")], "it had time to end"

    table = make(out, *flags, "--seeds", 2, "--resume")

    assert table == table_of(lab)
    assert times_of(lab, "*.pt", "base*/*") == shared
    assert not [*out.glob("*.pt"), *out.glob("base*")]


def test_an_arm_starts_from_the_base(lab, tmp_path):
    """All arms go on from one student of pure DMD, and the teacher is not where they start.

    At a learning rate of almost 0 an arm stays there. Its optimizer goes on as well: after the two
    updates of the base it has done three.
    """
    setting = settings("--init", lab, "--out", tmp_path, "--lr", "1e-9")
    base = lab / "base, w = 1, seed 0"

    toy.distill(toy.Job(setting, "AMD", 1, out=tmp_path / "arm", base=base))

    of_base, of_arm = loaded(base), loaded(tmp_path / "arm")
    teacher = toy.fitted(setting, "teacher")
    for name, p in of_arm.student.named_parameters():
        start = of_base.student.get_parameter(name)
        assert_close(p, start, rtol=0, atol=1e-7)
        assert not start.equal(teacher.get_parameter(name))
        assert of_arm.opt.state[p]["step"] == 3


def test_a_base_of_other_settings_is_not_taken(lab, tmp_path):
    """Its name does not tell all of them. What arms alone read is free."""
    free = "--s 1 --tau 2 --count 50 --steps 1 --reward linear --arms DMD"
    args = toy.parse([*TINY, "--init", str(lab), *free.split()])
    (base,), _ = toy.jobs_of(toy.lab_of(args), args)
    assert (base.out / "done").exists()
    toy.check_base(base)

    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"is another base \(lr 0.0003 -> 0.001\): choose"):
        make(out, "--init", lab, "--arms", "DMD", "--lr", "1e-3")
    assert not out.exists()


def test_a_base_without_its_checkpoint_is_no_start(lab, tmp_path):
    """An arm would begin as the teacher, and nobody would know."""
    base = tmp_path / "base"
    shutil.copytree(lab / "base, w = 1, seed 0", base)
    shutil.rmtree(base / "checkpoints")

    with pytest.raises(ValueError, match="base has no checkpoint: remove it"):
        toy.distill(toy.Job(settings("--init", lab), "AMD", 1, out=tmp_path / "arm", base=base))


def test_networks_of_another_lab_stay_the_same(lab, tmp_path):
    """A lab that is resumed without --init would train its own, for half of its table."""
    out = tmp_path / "out"
    config = running.read_config(lab) | dict(networks=toy.mark_of(lab))
    running.open_run(out, config)
    (out / "log.jsonl").touch()

    with pytest.raises(ValueError, match="holds another run"):
        make(out, "--arms", "DMD", "--seeds", 1, "--resume")


def test_a_lab_without_networks_is_not_shared(lab, tmp_path):
    """It was stopped while it fitted them."""
    shutil.copy(lab / "config.json", tmp_path)

    with pytest.raises(ValueError, match=r"has no teacher.pt: let that lab go on first"):
        make(tmp_path / "out", "--init", tmp_path)


def test_clip_and_normalize_reach_the_training(lab, tmp_path):
    """A norm of at most 1e-14 is lost in AdamW's epsilon, so the student stays where it starts.

    g divided by the mean of |d_real| has another size; both runs draw the same. With w = 1 there
    would be no g in the first update, where the fake still is the teacher.
    """
    default = settings("--init", lab, "--out", tmp_path)
    teacher = toy.fitted(default, "teacher")

    changed = {"as ever": {}, "clipped": dict(clip=1e-14), "raw": dict(normalize=False)}
    for name, change in changed.items():
        own = dataclasses.replace(default, **change)
        toy.distill(toy.Job(own, "DMD", 1, w=2.0, out=tmp_path / name))

    clipped, free = (loaded(tmp_path / name).student for name in ("clipped", "as ever"))
    for name, p in clipped.named_parameters():
        assert_close(p, teacher.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert (free.final_layer.linear.weight - teacher.final_layer.linear.weight).abs().max() > 1e-4
    ever, raw = (read_log(tmp_path / name)[0] for name in ("as ever", "raw"))
    assert raw["reward"] == ever["reward"]
    assert abs(raw["g_norm"] / ever["g_norm"] - 1) > 0.01


# ----------------------------------------------------------------------- a student of several steps
class Loaded(NamedTuple):
    """What a run's last checkpoint holds."""

    student: nn.Module
    fake: nn.Module
    ema: running.EMA
    opt: torch.optim.Optimizer


def loaded(run, aware=False):
    """The last checkpoint of a run, whose fake has vectors for two exits if it is aware of them."""
    student, fake = (toy.build(settings(), "teacher") for _ in range(2))
    if aware:
        fake.tell_exits(2)
    opt, opt_fake = (torch.optim.AdamW(net.parameters()) for net in (student, fake))
    ema = running.EMA(student, 0.5)
    assert running.load(run, student=(student, opt, ema), fake=(fake, opt_fake, None)) > 0
    return Loaded(student, fake, ema, opt)


@pytest.fixture(scope="module")
def exits(lab, tmp_path_factory):
    """A lab of two steps with the networks of the first, to which it adds its two bases."""
    out = tmp_path_factory.mktemp("exits")
    make(out, "--init", lab, "--arms", "AMD", "--seeds", 1, "--student-steps", 2)
    return out


KINDS = {"one fake": False, "exit-aware": True}


def test_a_student_of_two_steps_has_a_row_for_each_exit_and_fake(exits):
    """By default a fake that is told the exit is tried beside one that is not.

    The row without an exit in its name is of the last, which is what such a student draws. Curves
    are of the last exit alone.
    """
    table = table_of(exits)

    arms = [f"AMD, w = 1, {kind}{exit}" for kind in KINDS for exit in (", exit 1", "")]
    assert [*table["rows"]] == ["real, held out", "teacher, w = 1", *arms]
    assert [*table["curves"]] == [f"AMD, w = 1, {kind}" for kind in KINDS]
    for kind in KINDS:
        row = table["rows"][f"AMD, w = 1, {kind}"]
        assert table["curves"][f"AMD, w = 1, {kind}"][-1] == row


@pytest.mark.parametrize("kind, aware", KINDS.items())
def test_an_exit_is_measured_by_samples_of_that_exit(lab, exits, kind, aware):
    """Exit 1 is the student's guess from pure noise, exit 2 its guess from half noise.

    The oracle takes both steps by hand, with the average of the last checkpoint.
    """
    arm = f"AMD, w = 1, {kind}"
    run = loaded(exits / f"{arm}, seed 0", aware)
    y = torch.arange(60) % 10
    torch.manual_seed(amd.key(0))
    noise = torch.randn(60, 1, 8, 8)
    with torch.no_grad(), running.averaged(run.ema):
        first = noise - run.student(noise, torch.ones(60), y)
        x_t = first / 2 + torch.randn_like(first) / 2
        last = x_t - run.student(x_t, torch.full((60,), 0.5), y) / 2

    rows = table_of(exits)["rows"]
    for name, x in ((f"{arm}, exit 1", first), (arm, last)):
        measured = toy.measure(settings("--init", lab), x, y)
        assert measured == pytest.approx(rows[name][0], rel=1e-3)
    assert rows[f"{arm}, exit 1"] != rows[arm]


def test_one_kind_of_fake_is_told_exits_and_learns_of_them(lab, exits):
    """In the base and in the arm: both go by the name of their kind.

    Both exits came by the end of the arm, so both have learned. The other kind has no vectors for
    exits, or its checkpoint would not load.
    """
    for folder, name in (
        (lab, "base, 2 steps, w = 1, {}, seed 0"),
        (exits, "AMD, w = 1, {}, seed 0"),
    ):
        aware = loaded(folder / name.format("exit-aware"), aware=True)
        loaded(folder / name.format("one fake"), aware=False)

        learned = aware.fake.exit_embedder.weight.any(1)
        assert learned.all() if folder is exits else learned.any()
        keys = set().union(*read_log(folder / name.format("exit-aware")))
        assert keys & {"reward_exit_1", "reward_exit_2"}


@pytest.mark.parametrize(
    "flags, kinds",
    [
        ("--student-steps 1", ["one fake"]),
        ("--student-steps 1 --exit-aware", ["one fake"]),
        ("--student-steps 2", ["one fake", "exit-aware"]),
        ("--student-steps 2 --exit-aware", ["exit-aware"]),
        ("--student-steps 2 --no-exit-aware", ["one fake"]),
        ("--study exits --exits mixed weighted mixed", ["mixed", "weighted"]),
        ("--study exits", [*beyond.EXITS]),
    ],
)
def test_either_flag_leaves_one_kind_of_fake(flags, kinds):
    """A student of one step has one exit, so there is nothing to tell, whatever was asked."""
    args = toy.parse(flags.split())

    found = toy.kinds(toy.lab_of(args), args)

    assert found == kinds


# ------------------------------------------------------------------------------------------ studies
@pytest.fixture(scope="module")
def study(lab, tmp_path_factory):
    """The folder of the study of exits, of one arm, with students of two steps."""
    out = tmp_path_factory.mktemp("study")
    flags = "--study exits --arms AMD --student-steps 2 --seeds 1 --base-steps 2 --steps 4"
    flags = [*flags.split(), *TINY[:6], "--batch", 16, "--count", 60]
    run_main("toy_images", [*flags, "--init", lab, "--out", out])
    return out


def test_a_study_compares_arms_seed_by_seed(tmp_path, study):
    """With another arm of the same exits, and with the same arm of one fake.

    The oracle is Student's t of two numbers, whose 97.5 % quantile is 12.706.
    """
    args = toy.parse(["--study", "exits", "--seeds", "2", "--out", str(tmp_path)])
    lab = toy.lab_of(args)
    assert lab.clip == 10
    _, runs = toy.jobs_of(lab, args)
    rows = {
        name: [{measure: random.random() for measure in MEASURES} for _ in jobs]
        for name, jobs in runs.items()
    }

    differ = toy.compare_arms(lab, rows, runs)

    kinds = [kind for kind in beyond.EXITS if kind != "one fake"]
    wanted = {f"AMD, w = 1, {kind} - AMD, w = 1, one fake" for kind in kinds}
    wanted |= {f"DMD, w = 1, {kind} - DMD, w = 1, one fake" for kind in kinds if kind != "mixed"}
    same = [kind for kind in beyond.EXITS if kind != "mixed"]
    wanted |= {f"AMD, w = 1, {kind} - DMD, w = 1, {kind}" for kind in same}
    assert differ.keys() == wanted
    for name, row in differ.items():
        arm, other = (rows[part] for part in name.split(" - "))
        a, b = (mine["FD"] - its["FD"] for mine, its in zip(arm, other, strict=True))
        assert row["FD"] == pytest.approx([(a + b) / 2, 12.706 * abs(a - b) / 2], rel=1e-3)
    assert (tmp_path / "differences.png").stat().st_size > 5000
    assert table_of(study)["differences"].keys() < wanted


def test_operators_are_compared_with_less_guidance(tmp_path):
    """For some take guidance away. There is a base for each seed and w."""
    arms = ["AMD", "AMD, CA less its part along DM"]
    flags = ["--study", "operators", "--w", "1.5", "1", "--seeds", "2", "--seed", "7"]
    args = toy.parse([*flags, "--arms", *arms, "--out", str(tmp_path)])
    lab = toy.lab_of(args)
    bases, runs = toy.jobs_of(lab, args)
    rows = {name: [dict.fromkeys(MEASURES, 0.0)] * 2 for name in runs}

    differ = toy.compare_arms(lab, rows, runs)

    of_w, of_less = (f"AMD, CA less its part along DM, w = {w}" for w in (1.5, 1))
    assert differ.keys() == {
        f"{of_w} - AMD, w = 1.5",
        f"{of_w} - AMD, w = 1",
        f"{of_less} - AMD, w = 1",
    }
    assert {base.out.name for base in bases} == {
        f"base, w = {w}, not normalized, seed {seed}" for w in (1.5, 1) for seed in (7, 8)
    }
    of_jobs = {(job.w, job.seed, job.base) for jobs in runs.values() for job in jobs}
    assert of_jobs == {(base.w, base.seed, base.out) for base in bases}


def test_a_kind_of_exits_is_another_way_to_train(study):
    """No two kinds end alike. "more updates" has half of the student's, as many of the fake's."""
    rows = table_of(study)["rows"]
    ends = [rows[f"AMD, w = 1, {kind}"][0]["FD"] for kind in beyond.EXITS]
    assert len(set(ends)) == len(ends)

    for kind, steps, fakes in (("one fake", 4, 12), ("more updates", 2, 12)):
        *_, last = read_log(study / f"AMD, w = 1, {kind}, seed 0")
        assert (last["step"], last["fake_step"]) == (steps, fakes)


def test_the_arms_of_a_study_are_what_their_names_say():
    """Each differs from its reference in what the name says, and in that alone."""
    a = torch.linspace(-1, 1, 5)
    d = amd.Displacements(*torch.randn(3, 5, 2), w=2.0)

    def of(study, arm):
        lab = dataclasses.replace(settings(), study=study)
        return toy.method_of(toy.Job(lab, arm, steps=4), average=lambda x_t, t, y: x_t)

    for s in (0.25, 0.5, 1.0):
        alone, both = of("dsa", f"DSA only, s = {s:g}"), of("dsa", f"AMD, s = {s:g}")
        assert_close(alone.H(d, a[:, None]), amd.H_amd(d, a[:, None], s))
        assert_close(both.H(d, a[:, None]), amd.H_amd(d, a[:, None], s))
        assert_close(alone.W(a), torch.ones(5))
        assert_close(both.W(a), (-a).exp())
    assert [of("hacking", f"DMDR, lam = {v}").lam for v in (0.05, 0.15, 0.5)] == [0.05, 0.15, 0.5]
    quarter = of("hacking", "AMD, tau = 0.25")
    assert_close(quarter.W(a), (-4 * a).exp())
    assert all(of("hacking", f"AMD, tau = {tau}").unit_w for tau in (0.25, 0.5, 1))
    for name in beyond.operators_of(None):
        arm, plain = of("operators", f"AMD, {name}"), of("operators", "AMD")
        assert arm.F_t is not plain.F_t
        assert arm._replace(F_t=None, H=None, W=None) == plain._replace(F_t=None, H=None, W=None)


# -------------------------------------------------------------------------------- methods, measures
def method_of(arm, *flags):
    """The method of an arm of a lab."""
    return toy.method_of(toy.Job(settings(*flags), arm, steps=100))


def test_dmdr_has_its_teacher_adapted_no_more():
    """DMDR does so before the reward sets in, and here that stage is the base."""
    method = method_of("DMDR", "--lam", "0.3")

    assert [method.phi(step) for step in (0, 10, 50)] == [0, 0, 0]
    assert method.lam == 0.3


def test_the_ablations_have_half_of_amd_each():
    """DSA alone does not sharpen, whatever the advantage; RLS alone has no sensitivity.

    So its operator is that of DMD at any advantage.
    """
    a = torch.tensor([-1.0, 0.0, 1.0])
    a_like_d = a[:, None]
    d = amd.Displacements(*torch.randn(3, 3, 2), w=2.0)

    dsa, rls, both, dmd = map(method_of, ("DSA only", "RLS only", "AMD", "DMD"))

    assert_close(dsa.W(a), torch.ones(3))
    assert_close(rls.W(a), both.W(a))
    assert_close(both.W(a), (-a).exp())
    assert_close(dsa.H(d, a_like_d), both.H(d, a_like_d))
    assert_close(rls.H(d, a_like_d), dmd.H(d, a_like_d))
    assert not both.H(d, a_like_d).allclose(dmd.H(d, a_like_d))
    assert not dmd.senses


def test_training_images_are_at_no_distance_from_themselves(lab):
    """Each is in its own ball too, so precision and recall are 1.

    Reward and accuracy are those of two networks: the mean log-likelihood, by torch's own loss, and
    the share of classes that are found.
    """
    setting = settings("--out", lab)
    images = toy.read_images("digits", 8)
    x, y = images.x / 127.5 - 1, images.y

    got = toy.measure(setting, x, y)

    assert abs(got["FD"]) < 1e-3
    assert got["precision"] == got["recall"] == 1
    reward, judge = toy.fitted(setting, "reward"), toy.fitted(setting, "judge")
    with torch.no_grad():
        assert got["reward"] == pytest.approx(-F.cross_entropy(reward(x), y).item(), rel=1e-4)
        right = judge(x).argmax(1) == y
    assert got["accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-3)


def test_images_of_one_class_are_precise_and_recall_little(lab):
    """All zeros of the training images lie among these, and the other digits not among the zeros.

    So a student that has lost modes shows in the recall, and one that draws nonsense in precision.
    """
    images = toy.read_images("digits", 8)
    zeros = images.y == 0

    got = toy.measure(settings("--out", lab), images.x[zeros] / 127.5 - 1, images.y[zeros])

    assert got["precision"] == 1
    assert zeros.double().mean() <= got["recall"] < 0.6
    assert got["FD"] > 0.1


def test_the_teacher_learns_the_velocity_also_of_no_class():
    """Where each image is a 3, x_t = (1 - t) 3 + t noise, and the velocity follows from x_t and t.

    So a network that knows it has no loss. A tenth of the labels is the empty one.
    """
    seen = []

    def velocity(x, t, y):
        seen.append(y.flatten())
        return (x - 3) / t

    y = torch.arange(20_000) % 2

    loss = toy.flow_loss(Teacher(velocity), torch.full((20_000, 1, 2, 2), 3.0), y, 2)

    assert loss < 1e-6
    empty = seen[0] == 2
    assert empty.double().mean() == pytest.approx(0.1, abs=0.01)
    assert seen[0][~empty].equal(y[~empty])


def test_a_reward_sees_a_clamped_image(lab):
    """A student must not be paid for ink that is blacker than black."""
    reward = toy.reward_of(settings("--out", lab))
    x, y = torch.randn(5, 1, 8, 8).sign(), torch.arange(5)

    assert reward(3 * x, y).equal(reward(x, y))


def test_a_linear_reward_has_a_file_of_its_own(lab, tmp_path):
    """So a lab may share all other networks with one whose reward is a CNN."""
    shutil.copytree(lab, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    kept = times_of(tmp_path, "*.pt")
    linear = settings("--out", tmp_path, "--reward", "linear")

    toy.fit(toy.Job(linear, "reward", 5))

    assert {path.name for path in tmp_path.glob("*.pt")} == {
        "teacher.pt",
        "judge.pt",
        "reward_cnn_5.pt",
        "reward_linear_5.pt",
    }
    assert times_of(tmp_path, *map(str, kept)) == kept
    net = toy.fitted(linear, "reward")
    x = torch.randn(4, 1, 8, 8)
    assert_close(net(x[:2]) + net(x[2:]), net(x[:2] + x[2:]) + net(0 * x[:2]))


class Teacher(nn.Module):
    """A stand-in for a SiT, with a velocity of one's own; its classes are 0 and 1, none is 2."""

    pos_embed = torch.zeros(1)

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def null(self, y):
        return torch.full_like(y, 2)

    def forward(self, x, t, y):
        return self.velocity(x, t[:, None, None, None], y[:, None, None, None])


@pytest.mark.parametrize("w, want", [(1, [3.0, 5.0]), (2, [-1.0, 3.0])])
def test_solve_goes_straight_to_a_known_image(w, want):
    """A teacher that knows the image leads there in straight lines, in which Euler makes no error.

    Its image is 3 or 5 by the label and 7 without one, so guidance of 2 goes as far again beyond.
    """
    known = torch.tensor([3.0, 5.0, 7.0])
    teacher = Teacher(lambda x, t, y: (x - known[y]) / t)

    x = toy.solve(teacher, torch.randn(2, 1, 4, 4), torch.tensor([0, 1]), w)

    assert_close(x, torch.tensor(want)[:, None, None, None].expand(2, 1, 4, 4), rtol=0, atol=1e-4)


def test_solve_approaches_the_exact_solution():
    """The velocity x t has the solution x(1) exp(-1/2) at t = 0, to which fine steps lead.

    A solver that took a level that is not its own would end elsewhere.
    """
    teacher = Teacher(lambda x, t, y: x * t)
    z = torch.randn(2, 1, 4, 4)

    errors = []
    for steps in (25, 100, 400):
        x = toy.solve(teacher, z, torch.tensor([0, 1]), 1.0, steps)
        errors.append((x / z - np.exp(-0.5)).abs().max().item())

    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.1)
    assert errors[2] == pytest.approx(errors[1] / 4, rel=0.1)


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "--steps 0: choose it above 0"),
        ("--fake-lr nan", "--fake-lr nan: choose it above 0"),
        ("--seeds 0", "--seeds 0: choose it above 0"),
        ("--ema 1", "--ema 1.0: choose it in [0, 1)"),
        ("--w 1 inf", "choose each --w above 0"),
        ("--s 2", "choose s in [0, 1]"),
        ("--tau 0", "choose tau above 0"),
        ("--lam -1", "lam"),
        ("--group 7", "K = 7"),
        ("--count 3", "--count 3: choose 4 or more"),
        ("--model digits/3", "--model digits/3: give size/patch"),
        ("--data nowhere", "nowhere is no folder"),
        ("--init nowhere", "config.json is of no run"),
        ("--arms AMD nothing", "--arms 'nothing': choose from ['DMD', 'DSA only'"),
        ("--study hacking --arms naive", "choose from ['DMD', 'DMDR, lam = 0.05'"),
        ("--study exits --student-steps 1", "give --student-steps above 1"),
        ("--study exits --exit-aware", "choose kinds by --exits, not --exit-aware"),
        ("--study exits --steps 1", "choose more --steps"),
        ("--study operators --student-steps 4", "a --study is of one step"),
        ("--exits weighted --student-steps 4", "--exits is for --study exits"),
        ("--study dsa --exits weighted", "--exits is for --study exits"),
        ("--study exits --exits mixed --arms DMD", "no mixed exits: choose more --exits"),
        ("--study exits --sample-every 5", "--study samples in the end: no --sample-every"),
    ],
)
def test_bad_input_says_what_to_mend_before_anything_is_written(
    tmp_path, monkeypatch, flags, message
):
    """running.run makes one line and exit code 2 of these errors."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match=re.escape(message)) as error:
        toy.main(toy.parse(flags.split()))

    assert "\n" not in str(error.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flags", ["--tau inf", "--s 0", "--ema 0", "--lam 0"])
def test_a_limit_is_no_bad_input(flags):
    """They leave something out: sharpening, adaptation, the average, DMDR's force."""
    toy.lab_of(toy.parse(flags.split()))


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--data", "cifar10"], "--data"),
        (["--image-size", "16"], "--image-size"),
        (["--model", "digits/4"], "--model"),
    ],
)
def test_networks_of_other_data_are_not_shared(lab, tmp_path, flags, name):
    """The teacher, the reward, the judge and the bases of --init know one kind of images alone."""
    with pytest.raises(ValueError, match=f"has another {name}: choose the same"):
        make(tmp_path / "out", "--init", lab, *flags)

    assert not (tmp_path / "out").exists()


def test_a_used_folder_is_resumed_as_it_was_or_refused(lab):
    """Numbers of two settings in one table would be of neither."""
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        make(lab, "--arms", "AMD")
    with pytest.raises(ValueError, match=r"another run \(fake_steps 3 -> 4\)"):
        make(lab, "--arms", "AMD", "--fake-steps", "4", "--resume")
