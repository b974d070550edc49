"""wan.py: the recipes, networks, conditions, the reward, an update, whole runs, videos, bad input.

Everything runs on the CPU, on tiny networks of diffusers' and transformers' own classes with random
weights. What is in parts/ has tests of its own.
"""

import contextlib
import copy
import csv
import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffusers
import imageio.v2  # noqa: F401, forks need not import again what is imported here
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import pytest
import torch
import transformers.models.qwen2_vl.modeling_qwen2_vl  # noqa: F401
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file
from torch.testing import assert_close

import amd
import running
import wan
from helpers import CPU, ROOT, picture, pictures, read_log, run_main, survive
from parts import tiny, videoalign, videos, wan_net, wan_students

torch.set_num_threads(1)  # the networks are small


@pytest.fixture(autouse=True)
def clean_start(tmp_path, monkeypatch):
    """Each test begins in an empty folder, with the same random numbers, as one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    torch.manual_seed(0)


def arguments(*flags):
    """The arguments of a run on tiny networks, which need no download."""
    return wan.parse(["--dry-run", "tiny", "--no-compile", *map(str, flags)])


def prepare(*flags):
    """A run that is ready to train: its networks, closures and optimizers."""
    return wan.prepare(arguments(*flags), CPU)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders as diffusers saves them: t2v, i2v, and as start a transformer of other weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny.wan_pipeline("tiny")
    pipe.register_modules(transformer=tiny.wan_transformer("tiny"))
    pipe.save_pretrained(folder / "t2v")
    tiny.wan_i2v_pipeline("tiny").save_pretrained(folder / "i2v")
    tiny.wan_transformer("tiny").save_pretrained(folder / "start")
    return folder


# -------------------------------------------------------------------------------------------- flags
SMALL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
LARGE = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
OF_IMAGES = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"


def read(flags, *names):
    """What these arguments are for these flags."""
    args = wan.parse(flags.split())
    return tuple(getattr(args, name) for name in names)


COMMON = dict(
    method="amd",
    reward="overall",
    s=0.5,
    tau=1,
    w=4,
    t_per_sample=False,
    batch=8,
    group=8,
    accum=8,
    fake_steps=5,
    student_steps=4,
    exit_aware=True,
    ema=0.99,
    ema_from=40,
    lora_rank=0,
    frames=21,
    size=[480, 832],
    out=Path("runs/wan"),
)
STREAMING = COMMON | dict(
    mode="streaming",
    model=SMALL,
    teacher=LARGE,
    steps=140,
    lr=2e-6,
    fake_lr=4e-7,
    block=3,
    window=12,
    sink=3,
)
BIDIRECTIONAL = COMMON | dict(
    mode="bidirectional",
    model=LARGE,
    teacher=LARGE,
    steps=160,
    lr=5e-7,
    fake_lr=5e-7,
)


@pytest.mark.parametrize(
    "flags, recipe",
    [
        ("", STREAMING),
        ("--mode streaming", STREAMING),
        ("--mode bidirectional", BIDIRECTIONAL),
    ],
)
def test_the_recipe_is_longlives_first_stage(flags, recipe):
    """Its 700 updates of the fake are 140 of the student.

    A student that makes all at once is Wan's 14B, and has the paper's 800 updates and its rates.
    """
    args = wan.parse(flags.split())

    assert {name: getattr(args, name) for name in recipe} == recipe


@pytest.mark.parametrize("mode", ["streaming", "bidirectional"])
def test_a_lora_has_the_rates_of_longlives_second_stage(mode):
    """The student's and the fake's do not follow each other."""
    flags = f"--mode {mode} --lora-rank 64"

    assert read(flags, "lr", "fake_lr") == (1e-5, 2e-6)
    assert read(f"{flags} --lr 1e-4", "lr", "fake_lr") == (1e-4, 2e-6)


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--teacher T2V-1.3B", dict(model=SMALL, teacher=SMALL)),
        ("--model T2V-14B", dict(model=LARGE, teacher=LARGE, lr=2e-6)),
        ("--mode bidirectional --model I2V-14B-480P", dict(model=OF_IMAGES, teacher=OF_IMAGES)),
        ("--mode bidirectional --model a/b", dict(model="a/b", teacher="a/b")),
        ("--mode bidirectional --model a/b --teacher T2V-14B", dict(model="a/b", teacher=LARGE)),
        ("--batch 24 --steps 3 --block 7 --ema 0", dict(accum=24, steps=3, block=7, ema=0)),
        ("--batch 24 --accum 2", dict(accum=2)),
        ("sample", dict(out=Path("runs/videos"), seeds=1)),
        ("sample --layout vbench", dict(seeds=5)),
        ("sample --layout ta_hard --seeds 2", dict(seeds=2)),
        ("--dry-run full", dict(model="1.3B", teacher="1.3B", batch=2, group=2, accum=2)),
        ("--dry-run full --teacher T2V-14B", dict(model="1.3B", teacher="14B")),
        ("--dry-run full --mode bidirectional", dict(model="14B", teacher="14B", lr=5e-7)),
        ("--dry-run tiny", dict(model="tiny", teacher="tiny", steps=4, out=Path("runs/tiny"))),
        ("--dry-run tiny --mode bidirectional", dict(model="tiny", accum=1, frames=9)),
        ("--dry-run tiny --batch 16 --frames 3", dict(batch=16, frames=3)),
    ],
)
def test_a_flag_that_is_given_counts_and_others_follow_it(flags, wanted):
    args = wan.parse(flags.split())

    assert {name: getattr(args, name) for name in wanted} == wanted


def test_whatever_student_streams_the_teacher_is_t2v_14b():
    """It is the recipe's. For a smaller one, or one of the student's kind, there is --teacher."""
    assert read("--model a/b", "model", "teacher") == ("a/b", LARGE)


@pytest.mark.parametrize("world, accum", [(1, 8), (2, 4), (3, 3), (8, 1), (16, 1)])
def test_a_rank_has_micro_batches_of_one_video(monkeypatch, world, accum):
    """By default, for a video of true size fills a GPU. They are rounded up, and refused later."""
    monkeypatch.setenv("WORLD_SIZE", str(world))

    assert read("", "accum") == (accum,)


@pytest.mark.parametrize(
    "flags, init, prompts",
    [
        ("", wan_students.ODE_INIT, wan.VIDPROM),
        ("--lora-rank 64", wan_students.ODE_INIT, wan.VIDPROM),
        (f"--model {SMALL}", wan_students.ODE_INIT, wan.VIDPROM),
        ("--init a --prompts b", Path("a"), Path("b")),
        ("--init a", Path("a"), wan.VIDPROM),
        ("--prompts b", wan_students.ODE_INIT, Path("b")),
        ("--model T2V-14B", None, wan.VIDPROM),
        ("--mode bidirectional", None, wan.VIDPROM),
        ("--mode bidirectional --model T2V-1.3B", None, wan.VIDPROM),
        ("--mode bidirectional --model I2V-14B-480P", None, None),
        ("--dry-run tiny", None, None),
        ("--dry-run full", None, None),
        ("sample", None, None),
    ],
)
def test_a_stream_of_1_3b_starts_where_self_forcing_does(flags, init, prompts):
    """Its start is a causal T2V-1.3B, and no other student can begin there.

    Its prompts are texts, without the images that image to video wants.
    """
    assert read(flags, "init", "prompts") == (init, prompts)


@pytest.mark.parametrize(
    "steps, levels",
    [(4, [1, 0.9375, 5 / 6, 0.625]), (2, [1, 5 / 6]), (1, [1])],
)
def test_steps_begin_at_levels_of_shift_5(steps, levels):
    """Those of four steps are Self-Forcing's 1000, 937.5, 833.3 and 625."""
    assert wan.levels_of(wan.parse(["--student-steps", str(steps)])) == pytest.approx(levels)


def test_sample_draws_as_the_run_of_init_was_trained(tmp_path):
    """A flag that is given counts all the same, and a folder that is no run tells nothing."""
    flags = "--mode bidirectional --model I2V-14B-480P --size 320 176 --student-steps 2"
    more = "--block 2 --window 7 --sink 1 --frames 4 --steps 9"
    trained = wan.parse(f"{flags} {more}".split())
    running.open_run(tmp_path / "run", dict(vars(trained)))
    (tmp_path / "run/student").mkdir()
    (tmp_path / "folder").mkdir()
    drawn = "sample --init run"
    shape = ("size", "student_steps", "block", "window", "sink")

    assert read(drawn, "mode", "model") == ("bidirectional", OF_IMAGES)
    assert read(drawn, *shape) == ([320, 176], 2, 2, 7, 1)
    assert read(drawn, "frames", "out") == (21, Path("runs/videos"))
    assert read(f"{drawn} --window 9 --student-steps 3", *shape) == ([320, 176], 3, 2, 9, 1)
    assert read("sample --init folder", "mode", "window") == ("streaming", 12)


def test_sample_draws_as_the_run_was_trained_with_its_average_too(tmp_path):
    """--init runs/wan/student_ema, as the documentation has it."""
    trained = wan.parse(["--mode", "bidirectional", "--size", "320", "176"])
    running.open_run(tmp_path / "run", dict(vars(trained)))
    for name in wan_students.STUDENTS:
        (tmp_path / "run" / name).mkdir()

    for name in wan_students.STUDENTS:
        flags = f"sample --init run/{name}"
        assert read(flags, "mode", "model", "size") == ("bidirectional", LARGE, [320, 176])


def test_an_update_is_asked_of_amd_as_longlive_has_it():
    """Renoising is uniform in [0, 1] with shift 5, then clamped; AdamW has betas 0, .999."""
    flags = "--fake-steps 3 --group 2 --accum 2 --t-per-sample --seed 7 --w 3"
    run = prepare(*flags.split())

    wanted = dict(
        t_range=(0, 1),
        shift=5,
        t_clamp=(0.02, 0.98),
        t_per_sample=True,
        fake_steps=3,
        accum=2,
        K=2,
        w=3,
        seed=7,
    )
    given = run.train.keywords
    assert {name: given[name] for name in wanted} == wanted
    for opt, lr in ((run.opt_student, 2e-6), (run.opt_fake, 4e-7)):
        wanted = dict(lr=lr, betas=(0, 0.999), weight_decay=0.01)
        assert {name: opt.defaults[name] for name in wanted} == wanted


def test_magics_teacher_is_itself_again_after_half_of_the_updates():
    """Until then it is on its way between the real teacher and the fake one."""
    method = wan.method_of(arguments("--method", "magic", "--steps", 100))

    assert method.phi(0) == 0.375
    assert 0 < method.phi(49) < 0.01
    assert method.phi(50) == 0


def test_a_tau_below_1_weighs_losses_by_1_on_average():
    assert not wan.method_of(arguments()).unit_w
    assert wan.method_of(arguments("--tau", 0.5)).unit_w


# ----------------------------------------------------------------------------------------- networks
AT_ONCE = ("--mode", "bidirectional", "--batch", 4, "--group", 2, "--frames", 3)


@torch.no_grad()
def look(run, name, x_t, **more):
    """What a network of a run makes of x_t, for the first conditions of the run."""
    t = torch.ones(len(x_t)) / 3
    c = {k: v[: len(x_t)] for k, v in run.batch(0, 0).items()}
    return run.denoise[name](x_t, t, c | more)


def look_of(run, folder, x_t):
    """What the transformer of a folder would make of x_t in the place of a run's."""
    net = tiny.wan_transformer("tiny")
    wan_students.adopt(net, folder)
    other = dataclasses.replace(run, denoise=dict(other=wan.denoiser(net)))
    return look(other, "other", x_t)


def latents(count=2, frames=3):
    """Noise of videos of 32 x 32 pixels."""
    return torch.randn(count, 16, frames, 4, 4)


def louder(net):
    """Move all that a network trains, so that no two of them say the same."""
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)


def storages(net):
    """Where the weights of a network lie."""
    return {p.data_ptr() for p in net.parameters()}


def test_whole_networks_share_nothing():
    """Student and fake are trained, the teachers are not."""
    run = prepare(*AT_ONCE, "--method", "magic")

    places = {name: storages(net) for name, net in run.nets.items()}

    assert places.keys() == {"student", "fake", "blended", "real"}
    assert len(set().union(*places.values())) == sum(map(len, places.values()))
    for name, net in run.nets.items():
        trained = {p.requires_grad for p in net.parameters()}
        assert trained == {name in ("student", "fake")}


def test_loras_stand_on_the_teachers_own_weights():
    """Each holds the very weights of the teacher beside its own, which are no other's."""
    run = prepare(*AT_ONCE, "--method", "magic", "--lora-rank", 2)

    base = storages(run.nets["real"])
    own = {name: storages(run.nets[name]) - base for name in ("student", "fake", "blended")}
    for name in own:
        assert base < storages(run.nets[name])
    assert own["blended"] == own["fake"]
    assert not own["student"] & own["fake"]


def test_a_lora_student_that_starts_elsewhere_has_a_base_of_its_own(models):
    """That base is --init's, whole. The fake stands on the teacher, which is --model."""
    flags = ["--model", models / "t2v", "--init", models / "start", "--method", "magic"]
    run = prepare(*AT_ONCE, *flags, "--lora-rank", 2)

    base = storages(run.nets["real"])
    assert not base & storages(run.nets["student"])
    for name in ("fake", "blended"):
        assert base < storages(run.nets[name])

    x_t = latents()
    for name, folder in (("student", "start"), ("real", "t2v/transformer")):
        assert look(run, name, x_t).equal(look_of(run, models / folder, x_t))


def test_a_teacher_may_be_another_model(models):
    """Student and fake are --model's, and the teacher keeps weights of its own."""
    shutil.copytree(models / "t2v", "teacher")
    shutil.rmtree("teacher/transformer")
    shutil.copytree(models / "start", "teacher/transformer")

    for rank in (0, 2):
        run = prepare(
            *AT_ONCE, "--model", models / "t2v", "--teacher", "teacher", "--lora-rank", rank
        )
        x_t = latents()
        assert look(run, "student", x_t).equal(look(run, "fake", x_t))
        assert not look(run, "student", x_t).equal(look(run, "real", x_t))
        assert look(run, "real", x_t).equal(look_of(run, models / "start", x_t))


@pytest.mark.parametrize("rank", [0, 4])
def test_an_exit_aware_fake_begins_as_the_plain_one(rank):
    """--exit-aware adds one layer to the fake, which is 0 at first, and nothing to the others."""
    flags = [*AT_ONCE, "--lora-rank", rank, "--method", "magic"]
    plain = prepare(*flags, "--no-exit-aware")
    aware = prepare(*flags)
    x_t = latents()
    code = wan_net.exit_code(0.625, 2, CPU)

    told = look(aware, "fake", x_t, exit=code)

    assert told.equal(look(plain, "fake", x_t))
    assert plain.train.keywords["aware"] is None
    new = running.tensors(aware.parts).keys() - running.tensors(plain.parts).keys()
    assert new == {"fake.net.condition_embedder.time_embedder.exit_proj.weight"}


def test_a_fake_of_one_exit_is_told_none():
    """It would be one more bias, and a key more in the checkpoint."""
    run = prepare("--student-steps", 1)

    assert run.train.keywords["aware"] is None
    assert not hasattr(run.nets["fake"].condition_embedder.time_embedder, "exit_proj")


class Looks(NamedTuple):
    """Guesses of the networks of a run at one x_t, before two updates and after.

    told has, by network, what its calls in these updates were told of an exit.
    """

    run: wan.Run
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    told: dict[str, list]
    logs: list[dict]


def mean_of_latents(x, _c):
    """A reward that costs nothing, where the reward is not what is tested."""
    return x.mean((1, 2, 3, 4))


@pytest.fixture(scope="module")
def adapted():
    """Two updates of MagicDistillation with LoRAs.

    It has all four networks: real, student, fake, and the blended teacher between real and fake.
    """
    torch.manual_seed(0)
    flags = "--method magic --lora-rank 4 --lr 1e-2 --fake-lr 2e-2 --accum 2"
    run = prepare(*AT_ONCE, *flags.split())
    x_t = latents()
    before = {name: look(run, name, x_t) for name in ("real", "student", "fake")}

    told = {name: [] for name in run.nets}

    def note(net, _args):
        (name,) = [k for k, v in run.nets.items() if v is net]
        told[name].append(getattr(net.condition_embedder.time_embedder, "exit_code", None))

    hooks = [net.register_forward_pre_hook(note) for net in run.nets.values()]
    updates = run.train(reward=mean_of_latents)
    logs = [next(updates) for _ in range(2)]
    for hook in hooks:
        hook.remove()

    after = {name: look(run, name, x_t) for name in ("real", "student", "fake")}
    adapt = run.train.keywords["adapt"]
    for r in (0, 1):
        adapt(r)
        after[f"blended, r = {r}"] = look(run, "blended", x_t)
    return Looks(run, before, after, told, logs)


def test_two_updates_with_loras_are_finite(adapted):
    assert [log["skipped"] for log in adapted.logs] == [0, 0]


def test_training_loras_leaves_the_teacher_alone(adapted):
    """The teacher says what it said, bit for bit, while student and fake go ways of their own.

    All three begin alike, and no network sees an adapter of another, though they share one base.
    """
    before, after = adapted.before, adapted.after
    assert before["student"].equal(before["real"])
    assert before["fake"].equal(before["real"])
    assert after["real"].equal(before["real"])
    assert (after["student"] - before["real"]).abs().max() > 1e-4
    assert (after["fake"] - after["student"]).abs().max() > 1e-4


def test_the_adapted_teacher_goes_from_the_teacher_to_the_fake(adapted):
    """MagicDistillation moves the teacher's weights to the fake's by r in [0, 1].

    With a LoRA that is the fake's own adapter, scaled by r.
    """
    assert adapted.after["blended, r = 0"].equal(adapted.after["real"])
    assert adapted.after["blended, r = 1"].equal(adapted.after["fake"])


def test_an_adapted_whole_teacher_is_blended_in_its_weights():
    """At r = 1 it is the fake but for rounding, and at r = 0 the real one again."""
    run = prepare(*AT_ONCE, "--method", "magic")
    louder(run.nets["fake"])
    adapt = run.train.keywords["adapt"]
    x_t = latents()

    adapt(1)
    assert_close(look(run, "blended", x_t), look(run, "fake", x_t), rtol=0, atol=1e-5)
    adapt(0)
    assert look(run, "blended", x_t).equal(look(run, "real", x_t))
    assert not look(run, "real", x_t).equal(look(run, "fake", x_t))


def test_an_adapted_teacher_is_itself_where_blocks_are_compiled(monkeypatch):
    """A copy of a compiled block would call the block that it is a copy of, the fake's.

    What stands for torch.compile makes a function, as it does, which a copy does not copy.
    """

    def compiled(forward, **_options):
        return lambda *given, **more: forward(*given, **more)

    monkeypatch.setattr(torch, "compile", compiled)
    run = prepare(*AT_ONCE, "--method", "magic", "--lora-rank", 4, "--compile")
    louder(run.nets["fake"])
    x_t = latents()

    run.train.keywords["adapt"](0)

    assert look(run, "blended", x_t).equal(look(run, "real", x_t))


def test_the_fake_alone_is_told_of_exits(adapted):
    """All calls of the fake are, of the exit of their iteration, and no call of another network.

    The layer that it is told by has learned, and a fake that is told hears it.
    """
    told = adapted.told
    assert len(told["fake"]) == 2 * 2 * 2  # updates, fake updates in each, micro-batches
    assert told["student"]
    assert told["blended"]
    for name in ("student", "real", "blended"):
        assert {v is None for v in told[name]} <= {True}
    levels = [1, 0.9375, 5 / 6, 0.625]
    codes = [wan_net.exit_code(level, 2, CPU) for level in levels]
    found = [[torch.allclose(code, v) for code in codes].index(True) for v in told["fake"]]
    assert found[0::2] == found[1::2]  # the micro-batches of an iteration have one exit
    exits = {found[4 * i] + 1 for i in range(2)}
    logged = {int(k[-1]) for log in adapted.logs for k in log if k.startswith("reward_exit_")}
    assert logged == exits

    layer = adapted.run.nets["fake"].condition_embedder.time_embedder.exit_proj
    assert layer.weight.any(1).all()
    x_t = latents()
    by_exit = [look(adapted.run, "fake", x_t, exit=code) for code in codes]
    assert (by_exit[0] - by_exit[3]).abs().max() > 1e-4


def test_a_checkpoint_of_loras_holds_no_weight_of_the_teacher(adapted):
    """Only adapters and the layer of exits are saved, and optimizers' states, named by number."""
    names = running.tensors(adapted.run.parts)
    weights = [name for name in names if name.startswith(("student.net", "fake.net"))]
    others = [name for name in weights if "lora" not in name]
    assert len(weights) > 50
    assert others == ["fake.net.condition_embedder.time_embedder.exit_proj.weight"]


# --------------------------------------------------------------------------------------- conditions
@pytest.fixture(scope="module")
def pipes():
    """The two pipelines, by name."""
    torch.manual_seed(0)
    return dict(t2v=tiny.wan_pipeline("tiny"), i2v=tiny.wan_i2v_pipeline("tiny"))


ROWS = [dict(prompt=f"a fox {'runs ' * i}in snow") for i in range(5)]


def conditions(pipe, *flags, rows=ROWS):
    """The conditions of five prompts, of videos of five latent frames."""
    return wan.Conditions(arguments("--frames", 5, *flags), pipe, rows, CPU)


def noted(monkeypatch, owner, name):
    """A list that gets the arguments of each call of a function, which works as before."""
    function = getattr(owner, name)
    calls = []

    def note(*given, **options):
        calls.append(given)
        return function(*given, **options)

    monkeypatch.setattr(owner, name, note)
    return calls


def test_a_prompt_is_encoded_once_an_update(monkeypatch):
    """However many iterations and micro-batches of the update draw it. Other updates come anew."""
    run = prepare("--fake-steps", 3, "--accum", 2, "--group", 2)
    calls = noted(monkeypatch, run.pipe, "encode_prompt")

    for update in (5, 6):
        calls.clear()
        drawn = [run.batch(3 * update + i, j) for i in range(3) for j in range(2)]
        again = run.batch(3 * update + 2, 1)

        index = torch.cat([c["index"] for c in drawn]).unique()
        wanted = [(run.conditions.rows[i]["prompt"],) for i in index.tolist()]
        assert len(wanted) > 3
        assert calls == wanted
        assert again["text"].equal(drawn[-1]["text"])


def test_a_group_shares_its_prompt():
    """Advantages compare videos of one prompt."""
    run = prepare("--batch", 4, "--group", 2)
    first, second = run.batch(0, 0)["index"].view(2, 2)
    assert len(first.unique()) == len(second.unique()) == 1
    assert first[0] != second[0]


def test_ranks_and_micro_batches_share_one_draw_of_prompts(monkeypatch):
    """Whatever their number, an iteration has the same prompts, in the same order."""
    whole = prepare("--batch", 8, "--group", 2).batch(3, 0)["index"]

    parts = []
    for rank in range(2):
        monkeypatch.setattr(running, "ranks", partial(amd.Ranks, rank, 2))
        monkeypatch.setattr(running, "shard", lambda net, *_: net)
        run = prepare("--batch", 8, "--group", 2, "--accum", 2)
        parts += [run.batch(3, j)["index"] for j in range(2)]

    assert [len(part) for part in parts] == [2] * 4
    assert torch.cat(parts).equal(whole)
    assert len(whole.unique()) > 2


def test_a_condition_does_not_depend_on_its_company(pipes):
    """A prompt's numbers are the same bit for bit, whatever else an update has, and in which order.

    So micro-batches and ranks change nothing.
    """
    told = conditions(pipes["t2v"])

    told.hold([3])
    alone = told(torch.tensor([3, 3]))
    told.hold([4, 3, 0, 3])
    among = told(torch.tensor([4, 3, 0, 3]))

    assert among["index"].tolist() == [4, 3, 0, 3]
    assert among["text"][1].equal(alone["text"][0])
    assert among["text"][3].equal(alone["text"][1])
    assert not among["text"][0].equal(among["text"][1])


def test_a_transformer_is_told_512_tokens_of_a_prompt(pipes):
    """Those of t5; what is beyond the prompt is 0, as Wan has it. The oracle is t5 itself."""
    pipe = pipes["t2v"]
    told = conditions(pipe)
    told.hold([2])

    text = told(torch.tensor([2]))["text"]

    tokens = pipe.tokenizer([ROWS[2]["prompt"]], return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = pipe.text_encoder(tokens).last_hidden_state
    count = tokens.shape[1]
    assert text.shape == (1, 512, 32)
    assert_close(text[:, :count], wanted)
    assert not text[:, count:].any()


def test_the_null_condition_is_wans_negative_prompt(pipes):
    """All else stays, as the image of image to video."""
    told = conditions(pipes["t2v"])
    told.hold([1, 2])
    c = told(torch.tensor([2, 1])) | dict(y=torch.ones(2, 3))

    null = told.null(c)

    wanted, _ = pipes["t2v"].encode_prompt(
        wan.NEGATIVE, do_classifier_free_guidance=False, max_sequence_length=512, device=CPU
    )
    assert wan.NEGATIVE.startswith("色调艳丽，过曝，")
    assert null.keys() == c.keys()
    for text in null["text"]:
        assert_close(text, wanted[0])
    assert null["y"] is c["y"]
    assert amd.pair(c, null)["text"].shape == (4, 512, 32)


class Seen(Exception):
    """It ends a pipeline's call, once that has called its transformer."""


def test_an_image_is_what_diffusers_pipeline_makes_of_it(pipes, tmp_path):
    """Its latents, grey frames after it, their mask, and what CLIP sees; a null has the same.

    The oracle is the call that WanImageToVideoPipeline makes of its transformer.
    """
    pictures(tmp_path / "images", count=2)
    paths = [tmp_path / f"images/{i}.png" for i in range(2)]
    rows = [dict(prompt="a fox", image=path) for path in paths]
    pipe = pipes["i2v"]
    told = conditions(pipe, "--mode", "bidirectional", rows=rows)
    told.hold([0, 1])
    c = told(torch.tensor([1, 0]))
    calls = []

    def note(_net, _args, given):
        calls.append(given)
        raise Seen

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    for path in reversed(paths):
        image = picture(path).convert("RGB")
        with pytest.raises(Seen):
            pipe(image, "a fox", height=32, width=32, num_frames=17, num_inference_steps=1)
    hook.remove()

    wanted_y = torch.cat([given["hidden_states"][:, 16:] for given in calls])
    wanted_image = torch.cat([given["encoder_hidden_states_image"] for given in calls])
    assert c["y"].shape == (2, 20, 5, 4, 4)
    assert_close(c["y"], wanted_y)
    assert_close(c["image"], wanted_image)
    assert not c["y"][0].equal(c["y"][1])
    assert_close(c["text"], torch.cat([given["encoder_hidden_states"] for given in calls]))

    mask = c["y"][:, :4]
    assert mask[:, :, 0].all()
    assert not mask[:, :, 1:].any()
    assert told.null(c)["y"].equal(c["y"])


def test_an_image_has_a_say_in_what_is_guessed(models, tmp_path):
    """Both its latents and what CLIP sees of it reach the transformer."""
    pictures(tmp_path / "images")
    rows = [dict(prompt="a fox", image=f"images/{i}.png") for i in range(2)]
    Path("rows.json").write_text(json.dumps(rows))
    flags = ["--model", models / "i2v", "--prompts", "rows.json"]
    run = prepare(*AT_ONCE, *flags)
    run.conditions.hold([0, 1])
    c, other = (run.conditions(torch.tensor([i])) for i in (0, 1))
    x_t = latents(1)
    t = torch.tensor([0.5])

    with torch.no_grad():
        ours = run.denoise["real"](x_t, t, c)
        for part in ("y", "image"):
            assert not run.denoise["real"](x_t, t, c | {part: other[part]}).equal(ours)


def test_the_text_encoder_visits_the_gpu_once_an_update(pipes, monkeypatch):
    """For all prompts of it; tests/test_running.py says what a visit is."""
    told = conditions(pipes["t2v"], "--offload-text")
    visits = noted(monkeypatch, running, "visit")

    told.hold([1, 2, 1])

    assert visits == [(CPU, pipes["t2v"].text_encoder)]


def test_an_offloaded_text_encoder_lives_on_the_cpu(monkeypatch):
    """It is sent there before any other network is loaded."""
    moved, make = [], tiny.wan_pipeline
    for flags in ([], ["--offload-text"]):
        pipe = make("tiny")
        monkeypatch.setattr(tiny, "wan_pipeline", lambda size, pipe=pipe: pipe)
        moved.append(noted(monkeypatch, pipe.text_encoder, "to"))
        wan.load_pipeline(arguments(*flags), CPU)
    assert moved == [[], [("cpu",)]]


def test_videoalign_visits_the_gpu_for_each_micro_batch(pipes, monkeypatch):
    """With --offload-text it was sent to the CPU, and only visits to score what was decoded."""
    rate = tiny.videoalign("tiny")
    moved = noted(monkeypatch, rate, "to")
    monkeypatch.setattr(wan, "load_videoalign", lambda args, device: rate)
    wan.Reward(arguments(), pipes["t2v"], ROWS, CPU)
    assert moved == []
    reward = wan.Reward(arguments("--offload-text"), pipes["t2v"], ROWS, CPU)
    assert moved == [("cpu",)]

    visits = noted(monkeypatch, running, "visit")
    for _ in range(2):
        reward(torch.randn(2, 16, 3, 4, 4), dict(index=torch.tensor([0, 1])))
    assert visits == [(CPU, rate)] * 2


# --------------------------------------------------------------------------------------- the reward
class Rewarded(NamedTuple):
    """Three latents of two prompts, and VideoAlign's three scores of them by hand (3, 3)."""

    x: torch.Tensor
    c: dict
    scores: torch.Tensor


@pytest.fixture(scope="module")
def rewarded(pipes):
    """The videos are decoded at once by the VAE itself, each scored with its own prompt."""
    torch.manual_seed(0)
    vae = pipes["t2v"].vae
    rate = wan.load_videoalign(arguments(), CPU)
    x = torch.randn(3, 16, 3, 4, 4)
    index = [3, 1, 3]
    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    scores = []
    for latent, i in zip(x, index, strict=True):
        with torch.no_grad():
            film = 127.5 * vae.decode((latent * std + mean)[None]).sample[0] + 127.5
        frames = film.round().clamp(0, 255).byte().transpose(0, 1)
        scores.append(rate(frames, ROWS[i]["prompt"], fps=16.0))
    return Rewarded(x, dict(index=torch.tensor(index)), torch.stack(scores))


def test_the_reward_is_the_sum_of_videoaligns_scores(pipes, rewarded):
    """Of decoded videos and their own prompts; by flag it is one of the scores."""
    reward = wan.Reward(arguments(), pipes["t2v"], ROWS, CPU)

    assert_close(reward(rewarded.x, rewarded.c), rewarded.scores.sum(1), rtol=0, atol=1e-4)
    for i, name in enumerate(videoalign.SCORES):
        reward.of = wan.parse(["--reward", name]).reward
        r = reward(rewarded.x, rewarded.c)
        assert_close(r, rewarded.scores[:, i], rtol=0, atol=1e-4)
        assert len(set(r.tolist())) == 3

    other = dict(index=torch.tensor([0, 1, 3]))
    reward.of = "ta"
    apart = reward(rewarded.x, other) - rewarded.scores[:, 2]
    assert apart[0].abs() > 1e-4  # by its prompt alone
    assert apart[1:].abs().max() < 1e-4


def test_means_are_of_the_scores_since_last_asked(pipes, rewarded):
    """All three are logged, whichever of them the reward is."""
    reward = wan.Reward(arguments("--reward", "mq"), pipes["t2v"], ROWS, CPU)

    for part in (slice(0, 2), slice(2, 3)):
        reward(rewarded.x[part], dict(index=rewarded.c["index"][part]))
    means = reward.means()

    assert [*means] == ["vq", "mq", "ta"]
    found = torch.stack([*means.values()])
    assert_close(found, rewarded.scores.mean(0), rtol=0, atol=1e-4)
    assert reward.means() == {}


# ---------------------------------------------------------------------------- an update of a stream
class Update(NamedTuple):
    """What an update took from the weights of student and fake, and what it logged."""

    steps: dict[str, torch.Tensor]  # by network, of all its weights
    log: dict


RATES = dict(student=1.0, fake=0.1)  # of SGD, whose steps are gradients


@pytest.fixture(scope="module")
def updates():
    """One update of a stream of three blocks, in one batch and in two micro-batches, by accum.

    A sample has the same noise wherever it lies: at first by its place in the batch, and then by
    its own values, where torch would draw it.
    """
    found = {}
    torch.manual_seed(0)
    noise = torch.randn(4, 16, 9, 4, 4)
    for accum in (1, 2):
        run = prepare("--group", 2, "--accum", accum, "--fake-steps", 2)
        for name in ("student", "fake"):
            torch.manual_seed(1)
            louder(run.nets[name])
        found[accum] = one_update(run, noise, accum)
    return found


def one_update(run, noise, accum):
    """An update by SGD, clipped nowhere, of samples whose noise is given.

    The reward is a smooth one, for VideoAlign sees pixels that are rounded to one of 256 levels.
    """
    size = len(noise) // accum
    places = []

    def batch(n, j):
        places.append(slice(j * size, (j + 1) * size))
        return run.batch(n, j)

    def noise_here(_args, count, _device):
        z = noise[places.pop(0)]
        assert len(z) == count
        return z

    def by_value(v):
        return torch.sin(3 * v.detach())

    nets = {name: run.nets[name] for name in ("student", "fake")}
    before = {name: flat(net) for name, net in nets.items()}
    sgd = {name: torch.optim.SGD(net.parameters(), RATES[name]) for name, net in nets.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "noise", noise_here)
        patch.setattr(torch, "randn_like", by_value)
        made = run.train(
            batch=batch,
            reward=mean_of_latents,
            opt_student=sgd["student"],
            opt_fake=sgd["fake"],
            update=partial(amd.update, clip=1e9),
        )
        log = next(made)
    return Update({name: flat(net) - before[name] for name, net in nets.items()}, log)


def flat(net):
    """All weights of a network, in a row."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("accum", [1, 2])
def test_an_update_of_a_stream_moves_student_and_fake(updates, accum):
    """Gradients are finite, and not 0. The reward is logged by exit, too.

    The exit of the student's turn is not the first, else all of its steps would not be tested.
    """
    update = updates[accum]

    assert update.log["skipped"] == 0
    for step in update.steps.values():
        assert step.isfinite().all()
        assert step.abs().max() > 1e-4
    names = [k for k in update.log if re.fullmatch("reward_exit_[1-4]", k)]
    assert sorted(names) == ["reward_exit_1", "reward_exit_3"]
    by_exit = torch.stack([update.log[k] for k in names])
    assert_close(by_exit.mean(), update.log["reward"])
    assert update.log["dm_norm"] > 0
    assert update.log["ca_norm"] > 0
    assert update.log["w_mean"] > 1.1  # advantages count


def test_micro_batches_of_a_stream_change_nothing(updates):
    """With two of them each exit is called again by itself, after the rollout."""
    for name, step in updates[1].steps.items():
        assert_close(updates[2].steps[name], step, rtol=0, atol=1e-5)
    for k in ("reward", "reward_std", "w_mean", "g_norm", "loss_fake"):
        assert float(updates[2].log[k]) == pytest.approx(float(updates[1].log[k]), rel=1e-3)


# -------------------------------------------------------------------------------- runs and students
class Run(NamedTuple):
    """A run in folder/whole, from a model of diffusers. One that was killed is in folder/killed."""

    folder: Path
    model: Path
    flags: list[str]
    ranks: int

    @property
    def whole(self):
        return self.folder / "whole"

    @property
    def args(self):
        return wan.parse(self.flags)


def flags_of(model, prompts, kind):
    """Updates of two videos of nine pictures, with a checkpoint after each."""
    given = [
        *("--dry-run", "tiny", "--no-compile", "--model", model, "--prompts", prompts),
        *("--fake-steps", 1, "--save-every", 1, "--log-every", 1),
        *("--batch", 2, "--group", 2, "--frames", 3, "--lr", 1e-2),
        *kind.split(),
    ]
    return [str(v) for v in given]


def run_twice(folder, model, prompts, ranks, kind):
    """Train once with a kill -9 and once without.

    `survive` compares the two students and the two logs, bit for bit. Curves are drawn elsewhere.
    """
    flags = flags_of(model, folder / prompts, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "draw_log", lambda out: None)
        survive(folder, "wan", flags, ranks)
    return Run(folder, model, flags, ranks)


FRAME_BY_FRAME = "--mode streaming --block 1 --window 2 --sink 1"


@pytest.fixture(scope="module")
def stream_run(tmp_path_factory):
    """Text to video, streaming frame by frame, whole networks that FSDP2 shards on two ranks.

    Two of its three prompts have one short name, so that they ask for one file of video. FSDP2 and
    checkpoints take as long as there are calls and layers, so it has few.
    """
    folder = tmp_path_factory.mktemp("stream")
    rows = 'prompt,prompt_shorter\n"A long, ""red"" fox",fox\nAn owl,owl\nOne more,owl\n'
    (folder / "rows.csv").write_text(rows)
    torch.manual_seed(0)
    net = tiny.wan_transformer("tiny")
    pipe = tiny.wan_pipeline("tiny")
    pipe.register_modules(transformer=type(net).from_config(net.config, num_layers=1))
    pipe.save_pretrained(folder / "model")
    kind = f"{FRAME_BY_FRAME} --steps 2 --student-steps 2"
    return run_twice(folder, folder / "model", "rows.csv", 2, kind)


@pytest.fixture(scope="module")
def image_run(models, tmp_path_factory):
    """Image to video, all at once, on one rank, by D-DMD. Its reward is VideoAlign's MQ alone."""
    folder = tmp_path_factory.mktemp("image")
    pictures(folder / "images")
    rows = [dict(prompt="a fox", image=f"images/{i}.png") for i in range(2)]
    (folder / "rows.json").write_text(json.dumps(rows))
    kind = "--mode bidirectional --method ddmd --reward mq --steps 2"
    return run_twice(folder, models / "i2v", "rows.json", 1, kind)


@pytest.fixture(scope="module")
def lora_run(models, tmp_path_factory):
    """A LoRA that streams and stands on --init, on one rank. Its average begins after update 2."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "rows.txt").write_text("a fox\nan owl")
    kind = f"{FRAME_BY_FRAME} --steps 3 --lora-rank 2 --init {models / 'start'}"
    flags = flags_of(models / "t2v", folder / "rows.txt", f"{kind} --ema .5 --ema-from 2")
    run_main("wan", [*flags, "--out", folder / "whole"])
    return Run(folder, models / "t2v", flags, 1)


@pytest.fixture(scope="module", params=["stream_run", "image_run", "lora_run"])
def run(request):
    """Each of the three."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def again(run):
    """Networks made anew, on one rank, with the weights of the run's last checkpoint."""
    made = wan.prepare(run.args, CPU)
    assert running.load(run.whole, **made.parts) == run.args.steps
    return made


LOGGED = {
    "step",
    "fake_step",
    "skipped",
    "g_norm",
    "dm_norm",
    "ca_norm",
    "loss_student",
    "loss_fake",
    "reward",
    "reward_std",
    "vq",
    "mq",
    "ta",
    "sec",
    "samples_per_s",
    "mem_gib",
}


def test_a_run_logs_its_rewards(run):
    """That it survives a kill -9 as if nothing had happened, `survive` has checked.

    The null condition is another one, so CFG pushes. The reward is what --reward says, or the sum
    of all three; it is logged by exit, too, and with one iteration in an update there is one exit.
    """
    rows = read_log(run.whole)
    assert [row["step"] for row in rows] == [*range(1, run.args.steps + 1)]
    of = dict(mq=["mq"], overall=["vq", "mq", "ta"])[run.args.reward]
    for row in rows:
        assert row.keys() >= LOGGED
        assert ("w_mean" in row) == (run.args.method == "amd")
        assert row["skipped"] == 0
        assert row["ca_norm"] > 1e-6
        assert row["reward"] == pytest.approx(sum(row[name] for name in of), abs=1e-4)
        (name,) = [k for k in row if re.fullmatch("reward_exit_[1-4]", k)]
        assert row[name] == row["reward"]


def test_the_last_two_checkpoints_are_kept(run):
    """A whole one of true size has 37 GiB."""
    steps = [int(path.name[5:]) for path in (run.whole / "checkpoints").iterdir()]
    assert sorted(steps) == [run.args.steps - 1, run.args.steps]


def test_a_run_shows_a_video_of_each_rank(run):
    """A latent frame is four pictures, and the first one is one."""
    (folder,) = (run.whole / "samples").iterdir()
    files = sorted(folder.iterdir())
    assert folder.name == f"step_{run.args.steps}"
    assert [path.name for path in files] == ["0.mp4", "1.mp4"][: run.ranks]
    for path in files:
        frames, fps = videos.read_video(path)
        assert frames.shape == (9, 3, 32, 32)
        assert fps == 16


def test_a_run_draws_its_curves(lora_run):
    """They are for the eye, so that there is a picture must do."""
    assert (lora_run.whole / "curves.png").stat().st_size > 10_000


def contents(folder):
    """The bytes of the files of a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights_of(net):
    """A network's weights by name, as they are now."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_a_run_writes_two_students_of_its_last_weights(run, again):
    """The weights themselves and their average, which differ, and which both load.

    A LoRA stands on --init, so what is adopted is its base with the LoRA added. A student knows
    nothing of the fake's exits.
    """
    net = again.nets["student"]
    for name in wan_students.STUDENTS:
        with running.averaged(again.ema if name == "student_ema" else None):
            merged = copy.deepcopy(net)
        if run.args.lora_rank:
            wan_net.fuse_lora(merged)
        wanted = weights_of(merged)
        adopted = wan_net.load_transformer(str(run.model), CPU, torch.float32)
        wan_students.adopt(adopted, run.whole / name)
        found = weights_of(adopted)
        assert found.keys() == wanted.keys()
        for k, v in found.items():
            assert_close(v, wanted[k], rtol=0, atol=1e-6)

    plain, average = (contents(run.whole / name) for name in wan_students.STUDENTS)
    assert plain.keys() == average.keys()
    assert plain != average
    layer = again.nets["fake"].condition_embedder.time_embedder.exit_proj
    assert layer.weight.any()


def test_a_lora_is_a_lora_of_diffusers(lora_run):
    """Its file has the name and the keys by which pipelines look for one, and nothing else."""
    (path,) = (lora_run.whole / "student").iterdir()
    assert path.name == LORA_WEIGHT_NAME_SAFE
    assert all(
        re.fullmatch(r"transformer\.blocks\..*\.lora_[AB]\.weight", k) for k in load_file(path)
    )


def test_the_average_begins_after_its_update(lora_run, tmp_path):
    """With --ema-from 2 the average is that of the second and third update's weights, half each."""
    made = wan.prepare(lora_run.args, CPU)
    found = {}
    for step in (2, 3):
        name = f"checkpoints/step_{step}"
        shutil.copytree(lora_run.whole / name, tmp_path / str(step) / name)
        assert running.load(tmp_path / str(step), **made.parts) == step
        found[step] = [p.detach().clone() for p in made.ema.weights.values()]
        if step == 2:
            averages = [v.clone() for v in made.ema.shadow.values()]
            assert all(v.equal(p) for v, p in zip(averages, found[2], strict=True))

    for v, p, q in zip(made.ema.shadow.values(), found[2], found[3], strict=True):
        assert_close(v, (p + q) / 2)
        assert not p.equal(q)


def test_a_used_folder_is_refused(image_run):
    """Nobody overwrites a run by forgetting --out."""
    with pytest.raises(ValueError, match="holds a run: add --resume to go on"):
        run_main("wan", [*image_run.flags, "--out", image_run.whole])


def test_a_finished_run_is_left_as_it_is(image_run):
    """A job script that is started again with --resume finds nothing to do."""
    files = [path for path in image_run.whole.rglob("*") if path.is_file() and path.suffix]
    times = {path: path.stat().st_mtime_ns for path in files if path.name != "config.json"}

    run_main("wan", [*image_run.flags, "--out", image_run.whole, "--resume"])

    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_run_that_was_moved_is_resumed(image_run, tmp_path):
    """It lost its students, as where a disk was full: --resume writes them as they were."""
    out = tmp_path / "moved"
    shutil.copytree(image_run.whole, out)
    for name in wan_students.STUDENTS:
        shutil.rmtree(out / name)

    run_main("wan", [*image_run.flags, "--out", out, "--resume"])

    for name in wan_students.STUDENTS:
        assert contents(out / name) == contents(image_run.whole / name)
    assert len(read_log(out)) == 2


@contextlib.contextmanager
def full_disk():
    """A context in which no file can grow beyond 1000 bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_student_is_written_whole_or_not_at_all(run, again, tmp_path):
    """On a full disk the error says what to do, and another attempt succeeds."""
    with full_disk(), pytest.raises(OSError, match=r"unwritable .*: make room, then --resume"):
        wan.export(run.args, again, tmp_path / "student")
    assert not (tmp_path / "student").exists()

    wan.export(run.args, again, tmp_path / "student")
    assert contents(tmp_path / "student") == contents(run.whole / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def documented(model, student, lora):
    """The lines of the documentation that draw with a student, for a test's own files.

    They load a whole transformer, and say in a comment what loads a LoRA instead.
    """
    text = (ROOT / "docs/wan.md").read_text(encoding="utf-8")
    lines = re.search(r"```py\n(.*?)```", text, re.S)[1]
    for old, new in {
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": str(model),
        "runs/t2v/student": str(student),
        "torch.bfloat16": "torch.float32",
        '"cuda"': '"cpu"',
    }.items():
        assert old in lines
        lines = lines.replace(old, new)
    if lora:
        lines = re.sub(r"^pipe\.transformer = .*?^\)[^\n]*\n", "", lines, flags=re.M | re.S)
        lines = re.sub("^# ", "", lines, flags=re.M)
        assert "load_lora_weights" in lines
        assert "WanTransformer3DModel" not in lines
    return lines


PROMPT = "a red fox in deep snow"  # of the documentation


def drawn_by_diffusers(model, student, lora, **image):
    """Latents (1, 16, 3, 4, 4) that the documentation's lines draw, from the noise of seed 5.

    Videos are small here, and for image to video there is an image besides.
    """
    kind = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    call = kind.__call__
    small = dict(height=32, width=32, num_frames=9, output_type="latent")

    def from_our_noise(pipe, prompt, **given):
        assert prompt == PROMPT
        torch.manual_seed(5)
        return call(pipe, prompt=prompt, **given, **small, **image)

    scope = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__call__", from_our_noise)
        exec(documented(model, student, lora), scope)
    return scope["video"][None]


@torch.no_grad()
def drawn_by_us(run, row):
    """The same by a run's own networks."""
    c = wan.batched([*run.conditions.encode(row, [row["prompt"]])])
    torch.manual_seed(5)
    return run.generate(c, 1.0).x


@pytest.mark.parametrize("rank", [0, 2])
def test_a_student_draws_in_diffusers_what_it_draws_here(models, tmp_path, rank):
    """The documentation's own lines load a student, whole or a LoRA, and draw what we draw."""
    flags = [*AT_ONCE, "--model", models / "t2v", "--lora-rank", rank]
    run = prepare(*flags)
    louder(run.nets["student"])
    wan.export(arguments(*flags), run, tmp_path / "student")

    ours = drawn_by_us(run, dict(prompt=PROMPT))

    theirs = drawn_by_diffusers(models / "t2v", tmp_path / "student", lora=rank > 0)
    assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_both_students_of_a_run_draw_in_diffusers(image_run, models):
    """Image to video. They have the weights of the last checkpoint, and are not the same."""
    run = wan.prepare(image_run.args, CPU)
    running.load(image_run.whole, **run.parts)
    path = image_run.folder / "images/1.png"
    image = picture(path).convert("RGB")

    drawn = []
    for name in wan_students.STUDENTS:
        with running.averaged(run.ema if name == "student_ema" else None):
            ours = drawn_by_us(run, dict(prompt=PROMPT, image=path))
        student = image_run.whole / name
        theirs = drawn_by_diffusers(models / "i2v", student, lora=False, image=image)
        assert_close(theirs, ours, rtol=0, atol=1e-4)
        drawn.append(ours)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------- sample
def sample(run, out, *more, seeds=2):
    """Draw videos by a run's student, named as VBench has them, longer ones than in training."""
    flags = [*run.flags, "--init", run.whole, "--out", out, "--layout", "vbench"]
    run_main("wan", ["sample", *flags, "--seeds", seeds, "--frames", 6, *more])


def listed(out):
    """The rows of a folder's videos.csv."""
    with (out / "videos.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def film(path):
    """The frames of a video (T, 3, H, W)."""
    frames, _ = videos.read_video(path)
    return frames


@pytest.fixture(scope="module")
def drawn(stream_run):
    """The folder of videos that a stream drew."""
    sample(stream_run, stream_run.folder / "drawn")
    return stream_run.folder / "drawn"


def test_each_listed_video_is_there_once_with_its_prompt(drawn):
    """VBench looks for short names. Two prompts have one, so the second of them gets no video."""
    rows = listed(drawn)

    assert [row["path"] for row in rows] == [
        f"videos/{name}-{k}.mp4" for name in ("fox", "owl") for k in range(2)
    ]
    assert [row["prompt"] for row in rows] == ['A long, "red" fox'] * 2 + ["An owl"] * 2
    assert {f"videos/{path.name}" for path in (drawn / "videos").iterdir()} == {
        row["path"] for row in rows
    }


def test_each_video_has_its_own_noise(drawn):
    """They are longer than those of training, where a stream knows no end."""
    films = [film(drawn / row["path"]) for row in listed(drawn)]
    assert {len(frames) for frames in films} == {21}
    for i, frames in enumerate(films):
        for other in films[:i]:
            assert (frames[9].int() - other[9].int()).abs().max() > 9


def test_sample_resumes_with_the_videos_that_are_missing(stream_run, drawn, tmp_path):
    """What is lost is drawn again as it was, and what is there is left alone."""
    out = tmp_path / "again"
    shutil.copytree(drawn, out)
    (out / "videos/owl-0.mp4").unlink()
    (out / "videos/owl-1.mp4").write_bytes(b"kept")

    sample(stream_run, out, "--resume")

    assert film(out / "videos/owl-0.mp4").equal(film(drawn / "videos/owl-0.mp4"))
    assert (out / "videos/owl-1.mp4").read_bytes() == b"kept"


def test_sample_is_not_resumed_with_other_prompts(stream_run, drawn, tmp_path):
    """A prompt that is put before the others would get the video of another."""
    out = tmp_path / "again"
    shutil.copytree(drawn, out)
    kept = contents(out / "videos")
    prompts = stream_run.folder / "rows.csv"
    text = prompts.read_text()

    prompts.write_text(text.replace("An owl", "A teapot"))
    with pytest.raises(ValueError, match="has videos of other prompts: choose another folder"):
        sample(stream_run, out, "--resume")
    prompts.write_text(text)

    assert contents(out / "videos") == kept
    assert contents(out)[Path("videos.csv")] == (drawn / "videos.csv").read_bytes()


def test_videos_are_named_by_names_and_may_change_their_prompt(lora_run, tmp_path):
    """--names has a name a row. Both prompts of a stream are listed, one after the other."""
    rows = [dict(prompts=["a fox runs", "an owl"]), dict(prompt="a boat")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("names.txt").write_text("first\nsecond")
    out = tmp_path / "drawn"

    more = ["--prompts", "rows.jsonl", "--names", "names.txt"]
    sample(lora_run, out, *more, seeds=1)

    assert listed(out) == [
        dict(path="videos/first-0.mp4", prompt="a fox runs an owl"),
        dict(path="videos/second-0.mp4", prompt="a boat"),
    ]
    assert len(film(out / "videos/first-0.mp4")) == 21


def drawn_blocks(artist, **row):
    """The blocks that an artist draws of a row, from the noise of seed 5."""
    torch.manual_seed(5)
    with torch.no_grad():
        return [*artist.draw(row)]


def artist_of(run, *more):
    """Who draws by a run's student."""
    args = wan.parse(["sample", *run.flags, "--init", str(run.whole), *map(str, more)])
    return wan.Artist(args, CPU, [dict(prompt="a fox")])


def test_a_stream_changes_its_prompt_in_the_middle(lora_run):
    """Of three blocks the first two are of the first prompt, as if there were no other."""
    artist = artist_of(lora_run, "--frames", 3)

    fox = drawn_blocks(artist, prompt="a fox")
    both = drawn_blocks(artist, prompt="a fox", prompts=["a fox", "an owl"])
    owl = drawn_blocks(artist, prompt="an owl")

    assert [block.shape[2] for block in both] == [1, 1, 1]
    assert both[0].equal(fox[0])
    assert both[1].equal(fox[1])
    for other in (fox, owl):
        assert (both[2] - other[2]).abs().max() > 1e-4


def test_a_lora_that_streams_draws_what_it_drew_in_training(lora_run):
    """The oracle is the run's own generator, with the weights of its last checkpoint."""
    run = wan.prepare(lora_run.args, CPU)
    running.load(lora_run.whole, **run.parts)

    blocks = drawn_blocks(artist_of(lora_run), prompt=PROMPT)

    ours = drawn_by_us(run, dict(prompt=PROMPT))
    assert_close(torch.cat(blocks, 2), ours, rtol=0, atol=1e-4)


def test_image_to_video_draws_what_it_drew_in_training(image_run):
    """All at once. Of two images of a prompt it makes two videos."""
    run = wan.prepare(image_run.args, CPU)
    running.load(image_run.whole, **run.parts)
    rows = [dict(prompt=PROMPT, image=image_run.folder / f"images/{i}.png") for i in range(2)]
    args = wan.parse(["sample", *image_run.flags, "--init", str(image_run.whole)])
    artist = wan.Artist(args, CPU, rows)

    drawn = []
    for row in rows:
        (x,) = drawn_blocks(artist, **row)
        assert_close(x, drawn_by_us(run, row), rtol=0, atol=1e-4)
        drawn.append(x)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------- score
def scores_of(folder, capsys):
    """What score prints of a folder."""
    capsys.readouterr()
    run_main("wan", ["score", "--dry-run", "tiny", "--samples", folder])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_score_prints_means_and_their_errors(drawn, capsys):
    """The oracle is VideoAlign of each video and its prompt, x 100."""
    rate = wan.load_videoalign(arguments(), CPU)
    wanted = torch.stack([rate(film(drawn / row["path"]), row["prompt"]) for row in listed(drawn)])
    wanted = 100 * torch.cat([wanted, wanted.sum(1, keepdim=True)], 1).double()

    rows = scores_of(drawn, capsys)

    assert [row["of"] for row in rows] == ["vq", "mq", "ta", "total"]
    assert {(row["samples"], row["videos"]) for row in rows} == {(str(drawn), 4)}
    for row, mean, std in zip(rows, wanted.mean(0), wanted.std(0), strict=True):
        assert row["mean"] == pytest.approx(mean.item(), rel=1e-4)
        assert row["error"] == pytest.approx(std.item() / 2, rel=1e-2)


def test_score_sees_frames_by_the_rate_at_which_they_are_shown(drawn, tmp_path, capsys):
    """At 4 a second a video lasts four times as long, so more of its frames are seen.

    A single video has no error.
    """
    row = listed(drawn)[0]
    frames = film(drawn / row["path"])
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/videos.csv").write_text('path,prompt\nslow.mp4,"a fox"\n')
    videos.write_mp4(tmp_path / "slow/slow.mp4", [frames.transpose(0, 1)[None]], fps=4)
    seen = film(tmp_path / "slow/slow.mp4")
    rate = wan.load_videoalign(arguments(), CPU)

    rows = scores_of(tmp_path / "slow", capsys)

    wanted = 100 * rate(seen, "a fox", 4.0)
    assert [row["mean"] for row in rows[:3]] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert not torch.allclose(wanted, 100 * rate(seen, "a fox", 16.0), atol=0.1)
    assert {row["error"] for row in rows} == {None}


def test_score_reads_a_list_that_excel_has_saved(drawn, tmp_path, capsys):
    """With a byte-order mark, semicolons and other line ends. A picture is named, and no video."""
    row = listed(drawn)[0]
    (tmp_path / "excel").mkdir()
    shutil.copy(drawn / row["path"], tmp_path / "excel/fox.mp4")
    text = '\ufeffpath;prompt\r\nfox.mp4;"a fox; red"\r\n'
    (tmp_path / "excel/videos.csv").write_bytes(text.encode())
    assert [row["videos"] for row in scores_of(tmp_path / "excel", capsys)] == [1] * 4

    frames = film(drawn / row["path"])[:1]
    videos.write_mp4(tmp_path / "excel/fox.mp4", [frames.transpose(0, 1)[None]])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'excel/fox.mp4'} is one picture")):
        scores_of(tmp_path / "excel", capsys)


def test_steps_are_not_free_where_they_say_when_the_teacher_is_itself_again(tmp_path):
    """Magic's would be moved towards the fake again by a run that goes on for longer."""
    for method, free in (("amd", True), ("magic", False)):
        flags = ["--method", method, "--out", tmp_path / method, "--resume"]
        wan.open_run(arguments(*flags, "--steps", 3))
        if free:
            wan.open_run(arguments(*flags, "--steps", 4))
            continue
        with pytest.raises(ValueError, match="steps"):
            wan.open_run(arguments(*flags, "--steps", 4))


def test_a_folder_of_that_name_is_a_model(tmp_path, monkeypatch):
    """T2V-1.3B is short for a name on the hub, unless there is such a folder."""
    monkeypatch.chdir(tmp_path)
    assert wan.parse(["--model", "T2V-mine"]).model == "Wan-AI/Wan2.1-T2V-mine-Diffusers"
    (tmp_path / "T2V-mine").mkdir()
    assert wan.parse(["--model", "T2V-mine"]).model == "T2V-mine"


# ---------------------------------------------------------------------------------------- the speed
NUMBER = r"\d+\.\d"


@pytest.mark.parametrize("mode, accum", [("streaming", 1), ("bidirectional", 2)])
def test_the_speed_report_compares_an_update_with_the_calls_that_it_needs(capsys, mode, accum):
    """Each item has a line, as soon as it is known; the ratio is what a reader looks for.

    Every micro-batch is rolled out in each iteration, and its exit is called again for the student.
    """
    flags = [
        *("--mode", mode, "--student-steps", 2, "--fake-steps", 2),
        *("--batch", 2, "--group", 2, "--accum", accum),
        *("--frames", 2, "--block", 1, "--window", 2, "--sink", 1),
    ]
    wan.speed(arguments(*flags), CPU)

    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    measured = {"rollout", "real", "reward", "exit", "fake", "texts", "adamw", "video"}
    measured.add("update with 2 of the fake")
    assert lines.keys() == measured | {"frames a second", "update of 2", "videos"}
    for name in measured:
        assert re.fullmatch(r"\d+\.\d{4} s", lines[name])
    ratio = lines["update of 2"]
    assert f"{2 * accum} rollout, {accum} exit, {accum} real, {2 * accum} fake" in ratio
    assert f"1 texts, {2 * accum} rollout" in ratio
    assert f"{2 * accum} reward, 3 adamw" in ratio
    assert re.search(r"ratio \d+\.\d{3}$", ratio)
    assert lines["videos"].startswith(f"{2 // accum}; peak")
    assert re.fullmatch(f"{NUMBER}, with the VAE {NUMBER}", lines["frames a second"])


@pytest.mark.parametrize("mode", ["streaming", "bidirectional"])
def test_the_speed_of_sample_is_of_frames_a_second(capsys, mode):
    """Of 9 frames, without the VAE and with it."""
    flags = ["--dry-run", "tiny", "--no-compile", "--mode", mode, "--frames", "3"]
    wan.speed_of_sample(wan.parse(["sample", *flags]), CPU)

    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert lines.keys() == {"latents", "video", "frames a second"}
    seconds, with_vae = (float(lines[name].removesuffix(" s")) for name in ("latents", "video"))
    found = [float(v) for v in re.findall(NUMBER, lines["frames a second"])]
    assert found == pytest.approx([9 / seconds, 9 / with_vae], rel=0.01)


def test_a_full_dry_run_measures(monkeypatch):
    """Training or sampling, by the first word; nothing else is done."""
    called = []
    monkeypatch.setattr(wan, "speed", lambda *_: called.append("speed"))
    monkeypatch.setattr(wan, "speed_of_sample", lambda *_: called.append("speed_of_sample"))

    for task in ("train", "sample"):
        run_main("wan", [task, "--dry-run", "full"])

    assert called == ["speed", "speed_of_sample"]
    assert not [*Path().iterdir()]


# --------------------------------------------------------------------------------------- bad inputs
@pytest.fixture
def files(models, tmp_path):
    """Inputs that are wrong in one way each, by the name of what is wrong; and good ones."""
    for name in models.iterdir():
        (tmp_path / name.name).symlink_to(name)
    pictures(tmp_path / "images", count=2)
    rows = [dict(prompt="a fox", image="images/0.png"), dict(prompt="an owl")]
    (tmp_path / "good.txt").write_text("a fox\nan owl")
    (tmp_path / "images.json").write_text(json.dumps(rows[:1]))
    (tmp_path / "one_image.json").write_text(json.dumps(rows))
    (tmp_path / "lost.jsonl").write_text('{"prompt": "a fox", "image": "nowhere.png"}')
    (tmp_path / "turns.jsonl").write_text('{"prompts": ["a fox", "an owl"]}')
    (tmp_path / "of_no_run/student").mkdir(parents=True)
    (tmp_path / "cut_short.jsonl").write_text('{"prompt": ')
    (tmp_path / "one_name.txt").write_text("fox")
    (tmp_path / "empty").touch()

    of_sdxl = tmp_path / "of_sdxl"
    of_sdxl.mkdir()
    index = dict(_class_name="StableDiffusionXLPipeline", unet=["a", "b"])
    (of_sdxl / "model_index.json").write_text(json.dumps(index))

    running.open_run(tmp_path / "other_script", dict(seed=0))
    (tmp_path / "other_script/student").mkdir()


TINY = "--dry-run tiny --no-compile"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--frames 20", "--frames: choose a multiple of --block, 3"),
        ("--window 5", "--window: choose at least --sink plus --block, 6"),
        ("--sink -1", "--sink: choose 0 or more"),
        ("--block 0", "--block 0: choose it above 0"),
        ("--size 480 830", "--size: choose multiples of 16"),
        ("--mode bidirectional --frames 1", "VideoAlign rates motion"),
        ("--method magic", "magic moves the teacher towards the fake: give --teacher"),
        ("--lr 0", "--lr 0.0: choose it above 0"),
        ("--fake-lr -1", "--fake-lr -1.0: choose it above 0"),
        ("--w nan", "--w nan: choose it above 0"),
        ("--batch 0", "--batch 0: choose it above 0"),
        ("--ema 1", "--ema 1.0: choose it in [0, 1)"),
        ("--lora-rank -1", "--lora-rank: choose 0 or more"),
        ("--s 2", "choose s in [0, 1]"),
        ("--tau 0", "tau"),
        ("--batch 12", "--batch 12: take a multiple of --group"),
        ("--accum 3", "--batch 8 of 3 ranks x --accum: take a multiple"),
        ("--init nowhere", "nowhere: there is no such file or folder"),
        ("--videoalign nowhere", "nowhere: there is no such file or folder"),
        ("--prompts nowhere.txt", "nowhere.txt"),
        ("--prompts empty", "empty has no prompt"),
        ("--prompts cut_short.jsonl", "line 1 is no JSON"),
        ("--prompts turns.jsonl", "only `sample` changes the prompt of a stream"),
        ("--prompts lost.jsonl", "there is no image"),
        ("--prompts images.json --images nowhere", "nowhere: there is no such file or folder"),
        ("--prompts one_image.json", "1 of its 2 prompts have an image"),
        (f"{TINY} --init empty", "empty is no student of --model"),
        (f"{TINY} --init other_script", "student is no student of --model"),
        (f"{TINY} --model of_sdxl", "is a StableDiffusionXLPipeline, and no Wan2.1"),
        (f"{TINY} --prompts images.json", "tiny: give rows without an image"),
        (f"{TINY} --model i2v --mode bidirectional", "i2v: give rows with an image"),
        (f"{TINY} --model i2v --prompts images.json", "give --mode bidirectional"),
        ("sample", "give --init"),
        ("sample --init nowhere", "nowhere: there is no such file or folder"),
        ("sample --init start --names nowhere", "nowhere: there is no such file or folder"),
        ("sample --init start --seeds 0", "--seeds 0: choose it above 0"),
        ("sample --init start --names good.txt", "--layout flat has numbers for names"),
        (
            "sample --init start --layout vbench --prompts good.txt --names one_name.txt",
            "one_name.txt has 1 names, and good.txt 2 prompts",
        ),
        (
            "sample --init start --prompts turns.jsonl --frames 3",
            "a row has 2 prompts: give it as many blocks",
        ),
        (
            "--dry-run full --mode bidirectional --model I2V-14B-480P",
            "--dry-run full has text to video only",
        ),
        (
            "sample --init start --mode bidirectional --prompts turns.jsonl",
            "only a stream changes its prompt",
        ),
        (f"sample {TINY} --init images", "images is no student of --model"),
        (f"{TINY} --out of_no_run", "of_no_run has a student and no config.json"),
        ("score", "give --samples, folders of sample"),
        (f"score {TINY} --samples images", "images/videos.csv: there is no such file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(files, tmp_path, flags, message):
    """ValueError or OSError is what running.run turns into one line and exit code 2."""
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run_main("wan", flags.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--batch 9 --accum 1", "--batch 9 of 2 ranks x --accum: take a multiple"),
        ("--adam8bit", "--adam8bit: give --lora-rank, or one GPU"),
        ("score --samples images", "score is for one process"),
    ],
)
def test_bad_input_of_several_ranks_is_refused(files, monkeypatch, flags, message):
    """It is seen before the processes meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=re.escape(message)):
        run_main("wan", flags.split())


@pytest.mark.parametrize("method", ["dmd2", "dmdr"])
def test_methods_that_want_what_wan_lacks_are_not_offered(method, capsys):
    """These are real videos and a discriminator, and a gradient through all decoded frames."""
    with pytest.raises(SystemExit):
        wan.parse(["--method", method])
    assert "invalid choice" in capsys.readouterr().err


def test_bad_input_ends_in_one_line_and_code_2(tmp_path):
    """A real process is started, as a user does it: no traceback, nothing on the disk."""
    ended = subprocess.run(
        [sys.executable, ROOT / "wan.py", "--lr", "0"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr == "wan.py: --lr 0.0: choose it above 0\n"
    assert not [*tmp_path.iterdir()]
