"""sit_imagenet.py: bad input, a run on one rank and on two, its student, samples, speed report.

Networks have two layers of width 32 and random weights (--dry-run tiny), so nothing needs a file
from the internet or a GPU. The network itself and its files are tested in test_sit.py.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure  # noqa: F401, forks need not import again what is imported here
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL  # noqa: F401
from torch.testing import assert_close

import amd
import running
import sit_imagenet as sit
from helpers import CPU, Forked, read_log, run_main, survive
from parts.sit import SiT


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """Nothing may be written to where the tests are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


TINY = ["--dry-run", "tiny"]
RUN = "--student-steps 2 --steps 6 --save-every 2 --sample-every 4 --log-every 1"
RUN = [*TINY, *RUN.split()]


def arguments(*flags):
    """The arguments of a dry run."""
    return sit.parse([*TINY, *map(str, flags)])


def prepared(*flags):
    """Networks, optimizers and closures as `train` makes them, from the same seed."""
    return sit.prepare(arguments(*flags), CPU)


# ---------------------------------------------------------------------------------------- bad input
@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with an empty `file` and the config of a run of two steps in `other`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    config = dict(model="tiny/2", image_size=64, student_steps=2, exit_aware=True)
    running.open_run("other", config)
    return tmp_path


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "give --teacher, a file of SiT or REPA"),
        ("sample", "give --teacher, a file of SiT or REPA"),
        ("--teacher file", "file is no SiT XL/2 at 256 px (the file is empty)"),
        ("--teacher nowhere", "nowhere is no SiT XL/2 at 256 px"),
        ("sample --teacher other", "sit.pt is no SiT XL/2 at 256 px"),
        ("--dry-run tiny --lr -1", "--lr -1.0: choose it above 0"),
        ("--dry-run tiny --w nan", "--w nan: choose it above 0"),
        ("--dry-run tiny --student-steps 0", "--student-steps 0: choose it above 0"),
        ("--dry-run tiny --ema 1", "--ema 1.0: choose it in [0, 1)"),
        ("--dry-run tiny --base-steps -1", "--base-steps: choose 0 or more"),
        ("--dry-run tiny --image-size 60", "--image-size: choose a multiple of 8"),
        ("--dry-run tiny --model tiny/3", "--model tiny/3: give size/patch"),
        ("--dry-run tiny --s 2", "choose s in [0, 1]"),
        ("--dry-run tiny --tau 0", "choose tau above 0"),
        ("--dry-run tiny --group 7", "K = 7"),
        ("--dry-run tiny --accum 3", "--batch 16 on 3 ranks and micro-batches: take a multiple"),
        ("--dry-run tiny --init file", "config.json is of no run"),
        ("--dry-run tiny --init other --image-size 128", "has another --image-size"),
        ("--dry-run tiny --init other", "has another --student-steps: choose the same"),
        ("evaluate", "give --samples and --ref"),
    ],
)
def test_bad_input_says_what_to_mend_before_anything_is_written(folder, flags, message):
    """running.run makes one line and exit code 2 of these errors.

    All are found before the folder of the run is made, whose default is runs/imagenet, for a user
    who mends the flag must not be told then that there is a run.
    """
    args = sit.parse(flags.split())

    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        sit.main(args)

    assert not (folder / "runs").exists()


# ---------------------------------------------------------------------------------- what a run does
def test_a_denoiser_takes_the_velocity_off():
    """SiT's velocity is noise - x, so x is x_t - t v, with a level t for each sample."""
    net = SiT("tiny/2", 8)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.5, 1.0]), torch.arange(3)

    x0, v = sit.denoiser(net)(x, t, y), net(x, t, y)

    assert_close(x0[0], x[0])
    assert_close(x0[1], x[1] - v[1] / 2)
    assert_close(x0[2], x[2] - v[2])


def test_latents_are_scaled_as_the_decoder_learned_them(monkeypatch):
    """SiT's latents have standard deviation 1, and those of sd-vae-ft-ema 1 / 0.18215.

    Here the decoder gives back what it was given.
    """
    vae = SimpleNamespace(decode=lambda x: SimpleNamespace(sample=x))
    for name in ("to", "eval", "requires_grad_"):
        setattr(vae, name, lambda *_: vae)
    monkeypatch.setattr(sit.tiny, "sd_vae", lambda size: vae)
    x = torch.randn(2, 4, 8, 8)

    image = sit.load_decoder(arguments(), CPU)(x)

    assert_close(image * 0.18215, x)


def test_a_group_shares_one_class_in_whole_and_micro_batches():
    """Rewards are compared within a group of eight, so it has one class, drawn for each group.

    Two micro-batches must be the halves of the one batch that they stand for.
    """
    whole = prepared().batch(5, 0)
    second_half = prepared("--accum", "2").batch(5, 1)

    groups = whole.view(2, 8)
    assert groups.unique(dim=1).shape == (2, 1)
    assert groups[0, 0] != groups[1, 0]
    assert second_half.equal(groups[1])


def test_the_fake_is_told_the_number_of_the_exit():
    """Three steps begin at the levels 1, 2/3 and 1/3, which are the exits 0, 1 and 2.

    That is the default. The fake has a vector for each of them, and no other network has.
    """
    run = prepared("--student-steps", "3")
    y = torch.tensor([4, 5])

    levels = [1.0, 1 - 1 / 3, 1 - 2 / 3]
    told = [run.train.keywords["aware"](y, level) for level in levels]

    assert [exit.tolist() for _, exit in told] == [[0, 0], [1, 1], [2, 2]]
    assert all(classes is y for classes, _ in told)
    assert len(run.fake.exit_embedder.weight) == 3
    assert run.student.exit_embedder is None is run.real.exit_embedder


@pytest.mark.parametrize("flags", ["--student-steps 1", "--student-steps 2 --no-exit-aware"])
def test_a_fake_is_told_no_exit_where_there_is_one_or_none_is_wanted(flags):
    """A vector that is always the same would be one more bias, and a key more in the checkpoint."""
    run = prepared(*flags.split())

    assert run.train.keywords["aware"] is None
    assert run.fake.exit_embedder is None


@pytest.mark.parametrize("base, adapted", [(None, 0.375), ("base", 0)])
def test_dmdr_adapts_its_teacher_in_a_stage_without_reward(base, adapted):
    """DMDR's teacher moves to the fake in its first stage, which here is the pure DMD of the base.

    Where there is no base, stage two is all there is, and r begins at 3/8. It is 0 halfway.
    """
    method = sit.method_of(arguments(), sit.Stage(Path("out"), "dmdr", 100, base))

    assert method.phi(0) == adapted
    assert method.phi(50) == 0
    assert method.lam == 0.05


def test_stage_one_is_pure_dmd_whatever_comes_then():
    """Its method has no force of a reward and does not sense one, and its teacher stands still."""
    args = arguments("--method", "dmdr", "--s", "0.3")

    method = sit.method_of(args, sit.Stage(Path("out"), "dmd", 100))

    assert not method.senses
    assert method.lam == 0
    assert method.phi(0) == 0


# ----------------------------------------------------------------------------------------- two runs
COLUMNS = {
    "step",
    "fake_step",
    "g_norm",
    "dm_norm",
    "ca_norm",
    "loss_student",
    "loss_fake",
    "reward",
    "reward_std",
    "skipped",
    "sec",
    "samples_per_s",
    "mem_gib",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of AMD on one rank: six updates, after two of pure DMD.

    survive() has compared it with one that was killed by kill -9 and resumed: both have written the
    same student and the same log, bit for bit.
    """
    return survive(tmp_path_factory.mktemp("run"), "sit_imagenet", RUN, ranks=1)


@pytest.fixture(scope="module")
def run_of_two_ranks(tmp_path_factory):
    """The same of DMDR on two ranks, sharded by FSDP2, and without a base.

    So its teacher is adapted, by a fake that has the exits' vectors more than the teacher. Half of
    the samples will do, and curves are drawn by the other run.
    """
    small = ["--batch", "8", "--group", "4", "--sample-every", "6"]
    flags = [*RUN, *small, "--method", "dmdr", "--base-steps", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "draw_log", lambda out: None)
        return survive(tmp_path_factory.mktemp("two_ranks"), "sit_imagenet", flags, ranks=2)


runs = pytest.mark.parametrize("name", ["run", "run_of_two_ranks"])


@runs
def test_a_run_survives_kill_9_and_its_log_has_every_column(request, name):
    """That it survives is what the fixture has found.

    The docs explain these columns; a reader of log.jsonl may rely on them. The reward is told for
    each of the two exits too.
    """
    killed = request.getfixturevalue(name).with_name("killed")

    rows = read_log(killed)

    assert rows[0].keys() >= COLUMNS
    told = set().union(*rows)
    assert told >= {"reward_exit_1", "reward_exit_2", "reward_std_exit_1", "reward_std_exit_2"}


@runs
def test_the_student_of_a_run_is_that_of_its_last_checkpoint(request, name):
    """`ema` is the average, which is what samples were drawn by, and `model` the last weights.

    The oracle is the checkpoint of step 6, loaded into networks that were made anew, on one process
    whatever the run had. The fake's vectors of exits are in that checkpoint, and have learned; the
    student's file has the keys of a SiT and no other.
    """
    folder = request.getfixturevalue(name)
    again = prepared("--student-steps", "2")
    assert running.load(folder, **again.parts) == 6

    saved = torch.load(folder / "student/sit.pt")

    assert saved.keys() == {"model", "ema"}
    plain = SiT("tiny/2", 8).state_dict().keys()
    assert saved["model"].keys() == plain == saved["ema"].keys()
    for k, v in again.student.state_dict().items():
        assert saved["model"][k].equal(v)
    for k, average in again.ema.shadow.items():
        assert saved["ema"][k].equal(average)
        assert not saved["model"][k].equal(average)
    assert again.fake.exit_embedder.weight.any(1).all()


def test_a_run_draws_its_curves_and_samples(run):
    """What they show is for the eye; a picture of nothing would be a smaller file."""
    assert (run / "curves.png").stat().st_size > 10_000
    pictures = {path.name for path in (run / "samples").iterdir()}
    assert pictures == {"step_4.png", "step_6.png"}


def test_stage_one_has_a_folder_and_a_student_of_its_own(run):
    """Other methods start from it by --init. It has no use for a reward, so its log has none."""
    base = run / "base"

    assert [row["step"] for row in read_log(base)] == [1, 2]
    assert not any("reward" in k for row in read_log(base) for k in row)
    assert torch.load(base / "student/sit.pt")["model"].keys() == weights_of(run).keys()


def test_stage_two_starts_from_the_end_of_its_base(run, tmp_path):
    """At a learning rate of almost 0 it stays there, for its weights and for their average.

    The teacher, from which a stage one starts, is elsewhere.
    """
    base = run / "base"
    flags = [*RUN, "--steps", "1", "--lr", "1e-9", "--init", base, "--out", tmp_path / "two"]

    run_main("sit_imagenet", flags)

    start, end = (torch.load(folder / "student/sit.pt") for folder in (base, tmp_path / "two"))
    teacher = sit.load_teacher(arguments(), CPU)
    for k, p in teacher.named_parameters():
        assert_close(end["model"][k], start["model"][k], rtol=0, atol=1e-7)
        assert not start["model"][k].equal(p)
    assert not (tmp_path / "two/base").exists()


def test_a_finished_run_is_left_as_it_is(run):
    """A job script that is started again with --resume finds nothing to do, in both stages."""
    files = [run / "student/sit.pt", run / "base/student/sit.pt", run / "log.jsonl"]
    before = [path.stat().st_mtime_ns for path in files]

    run_main("sit_imagenet", [*RUN, "--out", run, "--resume"])

    assert [path.stat().st_mtime_ns for path in files] == before


# ------------------------------------------------------------------------------------------ samples
def weights_of(run):
    """The average that a run has written in the end."""
    return torch.load(run / "student/sit.pt")["ema"]


def flags_of(run, out, *more):
    """The command line of `sample`: eight images in two chunks, by a run's student.

    The number of the student's steps is not given, for the run's own is taken.
    """
    return ["sample", *TINY, "--teacher", run, "--out", out, "--chunk", "4", *more]


def images_of(out):
    """What `sample` has written: (8, H, W, 3) in bytes."""
    return np.load(out / "samples.npz")["arr_0"]


@pytest.fixture(scope="module")
def lively(run, tmp_path_factory):
    """The folder of a run of two steps, whose student's images depend much on noise and class.

    Weights as small as those of a dry run make nearly one image of all. The average is what counts,
    so the weights beside it are others.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lively")
    state = SiT("tiny/2", 8).state_dict()
    average, weights = ({k: 0.2 * torch.randn_like(v) for k, v in state.items()} for _ in range(2))
    (folder / "student").mkdir()
    torch.save(dict(model=weights, ema=average), folder / "student/sit.pt")
    shutil.copy(run / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def samples(lively, tmp_path_factory):
    """A folder that `sample` has made, and its images."""
    out = tmp_path_factory.mktemp("samples")
    run_main("sit_imagenet", flags_of(lively, out))
    return out, images_of(out)


def test_sample_writes_what_adms_evaluator_reads(samples):
    """It reads arr_0 of an npz, in bytes, channels last."""
    _, images = samples

    assert images.shape == (8, 64, 64, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(8, -1), axis=0)) == 8


def test_a_run_is_read_as_a_teacher(run):
    """--teacher takes the folder of a run for the student in it."""
    net = sit.load_teacher(arguments("--teacher", run), CPU)

    saved = weights_of(run)
    for name, value in net.state_dict().items():
        assert value.equal(saved[name])


def drawn_by_hand(lively, chunk, classes):
    """The images of a chunk of four: two steps of the student, at levels 1 and 1/2, decoded."""
    args = arguments("--teacher", lively)
    net, decode = sit.load_teacher(args, CPU), sit.load_decoder(args, CPU)
    torch.manual_seed(amd.key(0, chunk))
    noise = torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        x = noise - net(noise, torch.ones(4), classes)
        x = x / 2 + torch.randn(4, 4, 8, 8) / 2
        x = x - net(x, torch.full((4,), 0.5), classes) / 2
        image = decode(x).clamp(-1, 1)
    return 127.5 * image.permute(0, 2, 3, 1).numpy() + 127.5


def test_a_chunk_of_samples_is_two_steps_from_noise_of_its_own_seed(lively, samples):
    """Any process may draw any chunk: noise is of the seed and the chunk, classes of the seed.

    The oracle draws chunk 1, images 4 to 7, by hand. Bytes are rounded, so one level is allowed;
    other noise or other classes make another image.
    """
    _, images = samples

    classes = torch.randint(1000, (8,), generator=torch.Generator().manual_seed(amd.key(0)))

    assert abs(images[4:] - drawn_by_hand(lively, 1, classes[4:])).max() <= 1
    assert abs(images[4:] - drawn_by_hand(lively, 1, classes[4:] + 1)).max() > 5
    assert abs(images[4:] - drawn_by_hand(lively, 0, classes[4:])).max() > 5


def test_balanced_labels_have_as_many_of_each_class(lively, tmp_path):
    """Then the classes of chunk 1 are 4 to 7, of a thousand that are drawn in turn."""
    run_main("sit_imagenet", flags_of(lively, tmp_path, "--labels", "balanced"))

    want = drawn_by_hand(lively, 1, torch.arange(4, 8))
    assert abs(images_of(tmp_path)[4:] - want).max() <= 1


def test_two_processes_draw_the_same_samples(lively, samples, tmp_path):
    """50,000 samples are drawn on as many GPUs as there are, and may go on on another number."""
    _, images = samples
    out = tmp_path / "two"

    Forked("sit_imagenet", flags_of(lively, out), ranks=2).finish()

    assert (images_of(out) == images).all()
    assert len([*(out / "chunks").iterdir()]) == 2


def test_sample_draws_a_lost_chunk_again_as_it_was(lively, samples, tmp_path):
    """A job that ended early has lost chunks; its images are those of one that did not.

    The chunk that is there is kept, so what is in it shows, and half a chunk counts for nothing.
    The folder may have been moved: it is a copy here.
    """
    _, images = samples
    out = tmp_path / "again"
    shutil.copytree(samples[0], out)
    (out / "chunks/000000.npy").unlink()
    (out / "chunks/unfinished_0.npy").write_bytes(b"half")
    np.save(out / "chunks/000001.npy", 0 * images[4:])

    run_main("sit_imagenet", flags_of(lively, out, "--resume"))

    again = images_of(out)
    assert (again[:4] == images[:4]).all()
    assert not again[4:].any()


def test_samples_do_not_go_on_in_other_chunks(lively, samples, tmp_path):
    """Chunks of both sizes would lie side by side, and samples.npz would have images twice."""
    out = tmp_path / "again"
    shutil.copytree(samples[0], out)
    (out / "chunks/000001.npy").unlink()

    with pytest.raises(ValueError, match=r"holds another run \(chunk 4 -> 2\)"):
        run_main("sit_imagenet", [*flags_of(lively, out, "--resume"), "--chunk", "2"])


def test_sample_leaves_a_used_folder_alone(lively, samples):
    """Without --resume, images of one student are never mixed with those of another."""
    out, _ = samples

    with pytest.raises(ValueError, match="holds a run: add --resume to go on"):
        run_main("sit_imagenet", flags_of(lively, out))


# ----------------------------------------------------------------------------- evaluation and speed
def test_evaluate_prints_the_measures_of_two_sets(monkeypatch, capsys):
    """The measures are those of parts/metrics.py, and a script can read what is printed."""
    asked = []

    def stand_in(*given):
        asked.append(given)
        return dict(FID=3.5, recall=0.25)

    monkeypatch.setattr(sit.metrics, "evaluate", stand_in)
    flags = "--samples a.npz --ref b.npz --chunk 9"

    run_main("sit_imagenet", ["evaluate", *flags.split()])

    assert asked == [(Path("a.npz"), Path("b.npz"), CPU, 9)]
    assert json.loads(capsys.readouterr().out) == dict(FID=3.5, recall=0.25)


@pytest.mark.parametrize("accum", [1, 2])
def test_the_speed_report_compares_an_update_with_the_calls_that_it_needs(capsys, accum):
    """Each item has a line, as soon as it is known; the two ratios are what a reader looks for.

    An update of one batch rolls the student out with its graph, so no forward call counts beside
    the backward one; that of two micro-batches rolls each of them out once more.
    """
    sit.speed(arguments("--accum", accum, "--student-steps", "2"), CPU)

    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    measured = {"forward", "real", "reward", "backward", "adamw"}
    updates = {f"update with {n} of the fake" for n in (1, 3)}
    assert lines.keys() == measured | updates | {
        "student and fake update",
        "fake update",
        "samples",
    }
    for name in measured | updates:
        assert re.fullmatch(r"\d+\.\d{4} s", lines[name])
    ratio = lines["student and fake update"]
    assert f"{accum - 1 and 2} forward, {2 * accum} backward, {accum} real" in ratio
    assert re.search(r"ratio \d+\.\d{3}$", ratio)
    assert lines["fake update"].endswith("TFLOP/s of SiT alone")
    assert lines["samples"].startswith("16; peak")
