"""sit_imagenet.py: SiT's network and its files, bad input, the evaluation, a run, its samples.

Networks have two layers of width 32 and random weights (--dry-run tiny), or are those of the preset
of digits. Neither needs a file from the internet or a GPU.
"""

import argparse
import itertools
import json
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import amd
import running
import sit_imagenet as sit
from helpers import CPU, picture, pictures, read_log, run_main, survive


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


# ------------------------------------------------------------------------------- the network of SiT
SIZE = dict(model="tiny/2", side=8)  # width 32; latents (4, 8, 8) are 4 x 4 patches of 2 x 2
kinds_of_files = pytest.mark.parametrize(
    "learn_sigma",
    [True, False],
    ids=["SiT", "REPA"],
)


def inputs(count=3):
    """Latents x (B, 4, 8, 8), levels t (B,), classes y (B,)."""
    return torch.randn(count, 4, 8, 8), torch.rand(count), torch.arange(count)


def test_positions_are_sines_of_the_column_then_of_the_row():
    """REPA's files and SiT's hold this table as a weight, and both have x, the column, first.

    The oracle is the formula of a sine embedding, for one token at a time. It has 32 numbers: eight
    sines and eight cosines of the column, then of the row.
    """
    net = sit.SiT(**SIZE)

    omega = 1e4 ** (-torch.arange(8) / 8)
    embed = net.pos_embed.view(4, 4, 32)
    for row, column in itertools.product(range(4), range(4)):
        x, y = column * omega, row * omega
        assert_close(
            embed[row, column],
            torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]),
        )


@kinds_of_files
def test_the_level_enters_by_cosines_then_sines(learn_sigma):
    """At time 0 SiT's own networks see noise, REPA's see the image; for us t = 0 is the image.

    The oracle is SiT's embedding of a time, 128 cosines and then 128 sines of it, which a hook
    reads where it enters the network's first layer.
    """
    net = sit.SiT(**SIZE, learn_sigma=learn_sigma)
    x, t, y = inputs()
    entered = []
    net.t_embedder["mlp"].register_forward_pre_hook(
        lambda module, args: entered.append(args[0]),
    )

    net(x, t, y)

    time = 1 - t if learn_sigma else t
    angle = time[:, None] * 1e4 ** (-torch.arange(128) / 128)
    assert_close(
        entered[0],
        torch.cat([angle.cos(), angle.sin()], 1),
    )


def test_a_token_writes_its_patch_row_by_row_with_channels_last():
    """The oracle is SiT's unpatchify: a token's 16 numbers are (row, column, channel).

    The bias of the last layer tells them apart. It is all that a new network puts out, because the
    weights of that layer begin at 0.
    """
    net = sit.SiT(**SIZE)
    net.final_layer["linear"].bias.data.copy_(torch.arange(16))

    v = net(*inputs())

    for row, column, channel in itertools.product(range(2), range(2), range(4)):
        assert (v[:, channel, row::2, column::2] == 8 * row + 4 * column + channel).all()


def test_a_token_reads_the_patch_that_it_writes():
    """Tokens lie row by row, on the way in and on the way out.

    The blocks of a new network are gated off, so its tokens do not see each other. Where one patch
    of the latents changes, that patch of the velocity must change, and no other.
    """
    net = sit.SiT(**SIZE)
    net.final_layer["linear"].weight.data.normal_()
    x, t, y = inputs()
    other = x.clone()
    other[:, :, 2:4, 6:8] += 1

    moved = (net(other, t, y) - net(x, t, y)).abs() > 1e-5

    want = torch.zeros(8, 8, dtype=bool)
    want[2:4, 6:8] = True
    assert moved.any(0).any(0).equal(want)


# --------------------------------------------------------------------------------- files of weights
def random_state(learn_sigma):
    """Random weights under the keys of a tiny SiT.

    None of them is 0, as some are in a new network, and the positions are random too: what a file
    holds is what counts.
    """
    state = sit.SiT(**SIZE, learn_sigma=learn_sigma).state_dict()
    return {k: 0.2 * torch.randn_like(v) for k, v in state.items()}


def first_channels(state):
    """The state of SiT's kind of file, without the second four of eight channels out.

    SiT's networks have room for a sigma there, which nothing uses.
    """
    last = ("final_layer.linear.weight", "final_layer.linear.bias")
    pixels = {k: state[k].unflatten(0, (4, 8)) for k in last}
    return state | {k: v[:, :4].flatten(0, 1) for k, v in pixels.items()}


def read(path):
    """The network in a file, if the file fits --model."""
    args = sit.parse(["--dry-run", "tiny", "--model", "tiny/2"])
    return sit.read_sit(path, args)


def check(net, state, velocity):
    """Check that net is velocity(plain, x, t, y), and its denoiser x - t v.

    plain has four channels out, no learned sigma, and the weights `state`. v is the velocity
    noise - x, as everywhere in this project.
    """
    plain = sit.SiT(**SIZE)
    plain.load_state_dict(state)
    x, t, y = inputs()

    v = velocity(plain, x, t, y)
    assert_close(net(x, t, y), v)
    assert_close(
        sit.denoiser(net)(x, t, y),
        x - t[:, None, None, None] * v,
    )


def test_a_file_of_sit_has_eight_channels_and_noise_at_0(tmp_path):
    """It is a training checkpoint, whose average counts, with SiT's arguments beside it.

    Its time runs the other way than ours, so its velocity is x - noise. The oracle is a network
    without the unused channels that is asked at 1 - t and whose answer is turned about.
    """
    state = random_state(learn_sigma=True)
    checkpoint = dict(ema=state, args=argparse.Namespace(lr=1))
    torch.save(checkpoint, tmp_path / "sit.pt")

    def velocity(plain, x, t, y):
        return -plain(x, 1 - t, y)

    check(
        read(tmp_path / "sit.pt"),
        first_channels(state),
        velocity,
    )


def test_a_file_of_repa_has_four_channels_and_noise_at_1(tmp_path):
    """It is a bare state with REPA's projectors in it, which served its training only.

    Its time and its velocity are ours, so the oracle is the plain network with these weights.
    """
    state = random_state(learn_sigma=False)
    projectors = {"projectors.0.weight": torch.ones(3)}
    torch.save(state | projectors, tmp_path / "repa.pt")

    def velocity(plain, x, t, y):
        return plain(x, t, y)

    check(
        read(tmp_path / "repa.pt"),
        state,
        velocity,
    )


@kinds_of_files
def test_a_file_that_lacks_a_weight_is_refused(tmp_path, learn_sigma):
    """It must not become a network of which a part is random.

    The message names the model that was asked for.
    """
    state = random_state(learn_sigma)
    del state["pos_embed"]
    torch.save(state, tmp_path / "less.pt")

    with pytest.raises(ValueError, match="is no SiT tiny"):
        read(tmp_path / "less.pt")


# ---------------------------------------------------------------------------------------- bad input
@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder to work in.

    In it `file` is empty, and the labelled folder `images` has one class.
    """
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "images")
    (tmp_path / "images/class").mkdir()
    picture("images/0.png").save("images/class/a.png")
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "give --teacher, a file of SiT"),
        ("--preset digits --lr -1", "choose lr"),
        ("--preset digits --method dmd", "no sample"),
        ("--preset cifar10 --data images", "one class"),
        ("--group 7", "divides the batch"),
        ("--accum 3", "take a multiple"),
        ("--w 1 2", "choose one --w"),
        ("--teacher file", "is no SiT XL/2 at 256 px"),
        ("--init .", "config.json"),
    ],
)
def test_bad_input_says_what_to_mend_before_anything_is_written(files, flags, message):
    """running.run makes one line and exit code 2 of these errors.

    All are found before the folder of the run is made, whose default is runs/PRESET.
    """
    args = sit.parse(flags.split())

    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        sit.main(args)

    assert not (files / "runs").exists()


# --------------------------------------------------------------------------------------- evaluation
@pytest.fixture
def features(monkeypatch):
    """Features (6, 128) that every set of images has.

    They stand for those of Inception, its logits and the features of sFID; no network is loaded.
    """
    pool = torch.randn(6, 128)

    def judge(images):
        return pool, pool, pool

    monkeypatch.setattr(sit, "inception", lambda device: judge)
    return pool


@pytest.fixture
def images():
    """Six random images of 32 pixels a side, in bytes."""
    numbers = np.random.default_rng(0)
    return numbers.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def evaluate(capsys, samples, ref):
    """The task `evaluate` on two sets of images -> the numbers that it prints."""
    flags = ["--samples", str(samples), "--ref", str(ref)]
    sit.main(sit.parse(["evaluate", *flags]))
    return json.loads(capsys.readouterr().out)


def test_evaluate_finds_a_set_at_no_distance_from_itself(tmp_path, capsys, features, images):
    """A set is all of itself, so its precision and its recall are 1."""
    np.savez(tmp_path / "images.npz", images)

    got = evaluate(
        capsys,
        samples=tmp_path / "images.npz",
        ref=tmp_path / "images.npz",
    )

    assert abs(got["FID"]) < 1e-2
    assert abs(got["sFID"]) < 1e-2
    assert got["precision"] == got["recall"] == 1


def test_evaluate_takes_adms_statistics_instead_of_the_images(tmp_path, capsys, features, images):
    """ADM's npz holds the statistics, mu and sigma, of more images than it lists.

    Here mu is 0.5 off in each of 128 features, so FID is 128 times 0.5^2. This npz has no mu_s and
    sigma_s, so sFID is of its images, and so are precision and recall, which know no statistics.
    """
    np.savez(tmp_path / "images.npz", images)
    mu, sigma = features.double().mean(0), torch.cov(features.double().T)
    np.savez(tmp_path / "adm.npz", images, mu=mu + 0.5, sigma=sigma)

    got = evaluate(
        capsys,
        samples=tmp_path / "images.npz",
        ref=tmp_path / "adm.npz",
    )

    assert abs(got["FID"] - 32) < 1e-2
    assert abs(got["sFID"]) < 1e-2
    assert got["precision"] == got["recall"] == 1


def test_evaluate_of_a_folder_without_images_says_what_to_give(tmp_path, capsys, features, images):
    np.savez(tmp_path / "images.npz", images)
    (tmp_path / "empty").mkdir()

    with pytest.raises(ValueError, match="a folder of png, jpg of one size"):
        evaluate(
            capsys,
            samples=tmp_path / "empty",
            ref=tmp_path / "images.npz",
        )


# ------------------------------------------------------------------------------- a run, its samples
TINY = ["--dry-run", "tiny"]
RUN = [*TINY, "--steps", "6", "--save-every", "2", "--log-every", "1", "--chunk", "4"]
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
    "adv_clip",
    "w_mean",
    "skipped",
    "sec",
    "samples_per_s",
    "mem_gib",
}


def prepared(*flags):
    """Networks, optimizers and closures as `train` makes them, from the same seed."""
    return sit.prepare(sit.parse([*TINY, *flags]), CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of six updates, after two of pure DMD.

    survive() has compared it with one that was killed by kill -9 and resumed: both have written the
    same student and the same log, bit for bit.
    """
    folder = tmp_path_factory.mktemp("run")
    return survive(folder, "sit_imagenet", RUN, ranks=1)


def weights_of(run):
    """The student that a run has written in the end."""
    return torch.load(run / "student/sit.pt")["ema"]


def test_a_run_survives_kill_9_and_its_log_has_every_column(run):
    """That it survives is what the fixture `run` has found.

    The README explains these columns; a reader of log.jsonl may rely on them.
    """
    killed = run.with_name("killed")

    assert read_log(killed)[0].keys() >= COLUMNS


def test_the_student_of_a_run_is_the_average_in_its_last_checkpoint(run):
    """The average is what samples were drawn by, and not the weights of the last update.

    The oracle is the checkpoint of step 6, loaded into networks that were made anew.
    """
    again = prepared()
    assert running.load(run, **again.parts) == 6

    saved = weights_of(run)
    for name, average in again.ema.shadow.items():
        assert average.equal(saved[name])


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


def sample(run, out, *more):
    """The task `sample`: eight images by a run's student, to a folder -> (8, H, W, 3)."""
    flags = [*RUN, "--teacher", run, "--out", out]
    run_main("sit_imagenet", ["sample", *flags, *more])
    return np.load(out / "samples.npz")["arr_0"]


@pytest.fixture(scope="module")
def samples(run, tmp_path_factory):
    """A folder that `sample` has made, with two chunks of four, and its images."""
    out = tmp_path_factory.mktemp("samples")
    return out, sample(run, out)


def test_sample_writes_what_adms_evaluator_reads(samples):
    """It reads arr_0 of an npz, in bytes, channels last."""
    _, images = samples

    assert images.shape == (8, 64, 64, 3)
    assert images.dtype == np.uint8


def test_a_run_is_read_as_a_teacher(run):
    """--teacher takes the folder of a run for the student in it."""
    net, _, _ = sit.backbone(sit.parse([*TINY, "--teacher", str(run)]), CPU)

    saved = weights_of(run)
    for name, value in net.state_dict().items():
        assert value.equal(saved[name])


def test_a_chunk_of_samples_is_one_step_from_noise_of_its_own_seed(run, samples):
    """Any process may draw any chunk: noise is of the seed and the chunk, classes of the seed.

    The oracle draws chunk 1, images 4 to 7, by hand: one step of the student from t = 1, and the
    decoder. Bytes are rounded, so one level is allowed.
    """
    _, images = samples
    net, decode, _ = sit.backbone(sit.parse([*TINY, "--teacher", str(run)]), CPU)

    generator = torch.Generator().manual_seed(amd.key(0))
    classes = torch.randint(1000, (8,), generator=generator)
    torch.manual_seed(amd.key(0, 1))
    noise = torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        x = decode(sit.denoiser(net)(noise, torch.ones(4), classes[4:])).clamp(-1, 1)

    want = 127.5 * x.permute(0, 2, 3, 1).numpy() + 127.5
    assert abs(images[4:] - want).max() <= 1


def test_sample_draws_a_lost_chunk_again_as_it_was(run, samples):
    """A job that ended early has lost chunks; its images are those of one that did not."""
    out, images = samples
    (out / "chunks/000000.npy").unlink()

    again = sample(run, out, "--resume")

    assert (again == images).all()


def test_sample_leaves_a_used_folder_alone(run, samples):
    """Without --resume, images of one student are never mixed with those of another."""
    out, _ = samples

    with pytest.raises(ValueError, match="holds a run: add --resume to go on"):
        sample(run, out)


# -------------------------------------------------------------------------------------- the presets
@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The arguments of the preset of digits, when it has run, as short as it can be.

    The teacher, the reward and the judge are trained for three updates, and each arm has one.
    """
    flags = "--preset digits --steps 1 --base-steps 1 --seeds 1 --count 60 --sample-every 1 --w 1.5"
    out = tmp_path_factory.mktemp("digits")
    args = sit.parse([*flags.split(), "--out", str(out)])
    short = sit.variant(args, fit=((3, 1e-3),) * 3)
    sit.main(short)
    return short


def test_a_preset_tells_every_arm_in_its_table(digits):
    """Beside the arms are what they are compared with: the teacher, and real images held out."""
    rows = json.loads((digits.out / "table.json").read_text())["rows"]

    arms = {f"{name}, w = 1.5" for name in [*sit.ARMS, "teacher"]}
    assert rows.keys() == arms | {"real, held out"}
    measures = {"FD", "IS", "precision", "recall", "reward", "accuracy"}
    assert rows["AMD, w = 1.5"][0].keys() == measures


@pytest.mark.parametrize("name", ["curves.png", "samples.png"])
def test_a_preset_draws_its_curves_and_samples(digits, name):
    """What they show is for the eye; a picture of nothing would be a smaller file."""
    assert (digits.out / name).stat().st_size > 5000


def test_a_preset_shares_no_bases_of_other_data(digits, tmp_path):
    """--init shares the teacher, the reward, the judge and the bases of another run.

    All of them know one data set alone.
    """
    args = sit.variant(
        digits,
        init=digits.out,
        out=tmp_path / "other",
        arms=["AMD"],
        data=tmp_path,
    )

    with pytest.raises(ValueError, match="another data"):
        sit.main(args)
