"""parts/sit.py: SiT against its definition, the exits that a fake is told, and files of weights.

Networks have two layers of width 32 and random weights; the files are made by the tests.
"""

import argparse
import fractions
import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from parts import sit

SIZE = dict(model="tiny/2", side=8)  # latents (4, 8, 8) are 4 x 4 patches of 2 x 2
DIM, HEADS = 32, 2
kinds_of_files = pytest.mark.parametrize(
    "learn_sigma",
    [True, False],
    ids=["SiT", "REPA"],
)


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


def inputs(count=3):
    """Latents x (B, 4, 8, 8), levels t (B,), classes y (B,)."""
    return torch.randn(count, 4, 8, 8), torch.rand(count), torch.arange(count)


def random_state(learn_sigma=False):
    """Random weights under the keys of a tiny SiT.

    None of them is 0, as some are in a new network, and the positions are random too: what a file
    holds is what counts.
    """
    state = sit.SiT(**SIZE, learn_sigma=learn_sigma).state_dict()
    return {k: 0.2 * torch.randn_like(v) for k, v in state.items()}


def network(state, learn_sigma=False):
    """A tiny SiT with these weights."""
    net = sit.SiT(**SIZE, learn_sigma=learn_sigma)
    net.load_state_dict(state)
    return net


# ------------------------------------------------------------------- the network, by its definition
def linear(state, name, v):
    """The layer of that name: v W^T + b."""
    return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(v):
    """v times its logistic function."""
    return v / (1 + (-v).exp())


def gelu(v):
    """The tanh approximation of GELU (arXiv 1606.08415, Sec. 2)."""
    return 0.5 * v * (1 + ((2 / math.pi) ** 0.5 * (v + 0.044715 * v**3)).tanh())


def normed(h):
    """A token less its mean, over its standard deviation."""
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attention(state, name, h):
    """softmax(q k^T / sqrt(d)) v, head by head, token by token: h (N, 32) of one sample."""
    queries, keys, values = linear(state, f"{name}.qkv", h).split(DIM, 1)
    width = DIM // HEADS
    found = []
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        q, k, v = queries[:, own], keys[:, own], values[:, own]
        share = (q @ k.T / width**0.5).exp()
        found.append(share / share.sum(1, keepdim=True) @ v)
    return linear(state, f"{name}.proj", torch.cat(found, 1))


def definition(state, x, time, y):
    """All channels that SiT puts out for one sample: x (4, 8, 8), time and class are numbers.

    It is models.py of github.com/willisma/SiT in plain tensor operations, patch by patch.
    """
    angle = time * 1e4 ** (-torch.arange(128).to(x) / 128)
    wave = torch.cat([angle.cos(), angle.sin()])
    c = linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", wave)))
    c = c + state["y_embedder.embedding_table.weight"][y]

    places = [*itertools.product(range(0, 8, 2), range(0, 8, 2))]  # row by row
    patches = [x[:, i : i + 2, j : j + 2].flatten() for i, j in places]
    weight = state["x_embedder.proj.weight"].flatten(1)
    h = torch.stack(patches) @ weight.T + state["x_embedder.proj.bias"] + state["pos_embed"][0]

    for block in ("blocks.0", "blocks.1"):
        six = linear(state, f"{block}.adaLN_modulation.1", silu(c)).split(DIM)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = six
        h = h + gate * attention(state, f"{block}.attn", normed(h) * (1 + scale) + shift)
        inner = gelu(linear(state, f"{block}.mlp.fc1", normed(h) * (1 + scale_mlp) + shift_mlp))
        h = h + gate_mlp * linear(state, f"{block}.mlp.fc2", inner)

    shift, scale = linear(state, "final_layer.adaLN_modulation.1", silu(c)).split(DIM)
    tokens = linear(state, "final_layer.linear", normed(h) * (1 + scale) + shift)
    out = torch.zeros(tokens.shape[1] // 4, 8, 8).to(x)
    for (i, j), token in zip(places, tokens, strict=True):
        out[:, i : i + 2, j : j + 2] = token.view(2, 2, -1).permute(2, 0, 1)
    return out


@kinds_of_files
def test_sit_is_its_definition(learn_sigma):
    """A file of SiT or REPA makes the images of its authors only if each operation is theirs.

    REPA's time is ours, and its velocity too. SiT's time is 1 where ours is 0, its velocity has the
    other sign, and half of its eight channels is a sigma, which nothing uses. The oracle is the
    definition by plain tensor operations, in float64.
    """
    state = {k: v.double() for k, v in random_state(learn_sigma).items()}
    net = network(state, learn_sigma).double()
    x, t, y = inputs()
    x, t = x.double(), t.double()

    v = net(x, t, y)

    for k in range(3):
        if learn_sigma:
            want = -definition(state, x[k], 1 - t[k], y[k])[:4]
        else:
            want = definition(state, x[k], t[k], y[k])
        assert_close(v[k], want, rtol=1e-5, atol=1e-5)


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
@pytest.mark.parametrize("patch, side", [(2, 8), (4, 16), (8, 8)])
def test_a_new_network_says_0_of_any_patch(patch, side, learn_sigma):
    """As in SiT, gates and output begin at 0, so that no token sees another at first.

    Its output has the shape of its input, whatever the patch and the channels.
    """
    net = sit.SiT(f"tiny/{patch}", side, channels=3, classes=10, learn_sigma=learn_sigma)
    x = torch.randn(2, 3, side, side)

    v = net(x, torch.rand(2), torch.tensor([3, 10]))

    assert v.shape == x.shape
    assert not v.any()


def test_the_label_of_no_class_follows_the_classes():
    """SiT's table of labels has one more row than classes, and the last is the empty one."""
    net = sit.SiT(**SIZE, classes=10)

    assert net.null(torch.arange(3)).tolist() == [10, 10, 10]
    assert len(net.y_embedder["embedding_table"].weight) == 11


@pytest.mark.parametrize("model, side", [("XL/3", 32), ("huge/2", 32), ("XL/8", 36), ("XL", 32)])
def test_another_model_is_refused_with_all_that_there_are(model, side):
    """The message is what a user reads who gave a wrong --model or --image-size."""
    with pytest.raises(ValueError, match=r"give size/patch, a size of S, B, L, XL.* 2, 4, 8 that"):
        sit.SiT(model, side)


@pytest.mark.parametrize("model, side", [("S/2", 32), ("S/4", 32)])
def test_flops_are_those_that_torch_counts(model, side):
    """The speed report divides by them, so they must be of the size and the tokens at hand.

    The oracle is torch's own counter over a forward pass. It counts the condition, patches and last
    layer too, which are a few percent; the plain attention is used, which it knows in all versions.
    """
    net = sit.SiT(model, side)
    for block in net.blocks:
        block.attn.fused_attn = False

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(1, 4, side, side), torch.rand(1), torch.zeros(1).long())

    assert 0.95 < net.flops() / counter.get_total_flops() < 1


# ----------------------------------------------------------------------------- a fake knows an exit
def told(state, count=3):
    """A tiny SiT that is told one of `count` exits, in a batch of as many samples."""
    return network(state).tell_exits(count)


def test_exits_that_are_told_change_nothing_at_first():
    """A fake begins as the teacher, or its first guesses would push the student about."""
    state = random_state()
    x, t, y = inputs()

    plain = network(state)(x, t, y)

    net = told(state)
    assert net(x, t, (y, torch.tensor([0, 1, 2]))).equal(plain)
    assert net(x, t, y).equal(plain)


def test_an_exit_learns_from_its_own_samples_alone():
    """A gradient reaches the vector of the exit at hand, and no other."""
    net = told(random_state())
    x, t, y = inputs()

    net(x, t, (y, torch.tensor([1, 1, 1]))).sum().backward()

    rows = net.exit_embedder.weight.grad
    assert [bool(row.any()) for row in rows] == [False, True, False]


def test_an_exit_moves_its_own_samples_alone():
    """What the fake has learned of one exit must not touch the guesses for the others."""
    net = told(random_state())
    x, t, y = inputs()
    c = (y, torch.tensor([0, 1, 2]))
    before = net(x, t, c)

    net.exit_embedder.weight.data[2] = 1.0

    moved = (net(x, t, c) - before).flatten(1).any(1)
    assert moved.tolist() == [False, False, True]


def test_a_network_that_is_not_told_exits_has_no_room_for_them():
    """The student's file must be that of a SiT, and a SiT's file must fit the fake's other weights.

    So the one key that exits add is missing without them.
    """
    plain = sit.SiT(**SIZE).state_dict().keys()

    assert told(random_state()).state_dict().keys() - plain == {"exit_embedder.weight"}
    assert not any("exit" in k for k in plain)


# --------------------------------------------------------------------------------- files of weights
def saved(folder, what, name="sit.pt"):
    """A file of torch.save -> its path."""
    torch.save(what, folder / name)
    return folder / name


def read(path):
    """The network in a file, if it is a tiny one."""
    return sit.read_sit(path, **SIZE)


def same(net, state):
    """Check that a network has these weights, all of them and no others."""
    found = net.state_dict()
    assert found.keys() == state.keys()
    for k, v in state.items():
        assert found[k].equal(v)


@kinds_of_files
def test_a_file_is_told_by_the_channels_that_it_puts_out(tmp_path, learn_sigma):
    """Nothing else tells SiT's files from REPA's, and their times and signs are opposite.

    What each kind makes of its weights is pinned above.
    """
    state = random_state(learn_sigma)

    net = read(saved(tmp_path, state))

    same(net, state)
    assert net.learn_sigma == learn_sigma


@pytest.mark.parametrize("name", [*sit.AVERAGES, *sit.WEIGHTS])
def test_weights_are_found_by_the_names_that_people_give_them(tmp_path, name):
    """Beside them lies what a training script saves too, which is of no use here."""
    state = random_state()
    beside = dict(
        opt=dict(state={0: dict(step=1, exp_avg=torch.ones(3))}, param_groups=[dict(lr=1e-4)]),
        args=argparse.Namespace(lr=1e-4, out=Path("runs/mine")),
        steps=400_000,
    )

    net = read(saved(tmp_path, beside | {name: state}))

    same(net, state)


@pytest.mark.parametrize(
    "average, weights",
    [("ema", "model"), ("student_ema", "student"), ("model_ema", "state_dict")],
)
def test_the_average_comes_before_the_weights(tmp_path, average, weights):
    """The average is what a paper evaluates, whichever of the two was written first."""
    state = random_state()

    net = read(saved(tmp_path, {weights: random_state(), average: state}))

    same(net, state)


def test_weights_may_lie_a_dict_deeper(tmp_path):
    """Some averages are saved as a wrapper's own state, with the network's inside."""
    state = random_state()

    net = read(saved(tmp_path, dict(ema=dict(model=state, decay=0.9999))))

    same(net, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema_model."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    """DDP, torch.compile and others put their own name before each key, also one on another."""
    state = random_state()

    net = read(saved(tmp_path, dict(ema={f"{prefix}{k}": v for k, v in state.items()})))

    same(net, state)


def test_repas_projectors_are_left_out(tmp_path):
    """They served REPA's training only, and a SiT has no place for them."""
    state = random_state()
    projectors = {"projectors.0.weight": torch.ones(3)}

    net = read(saved(tmp_path, dict(ema=state | projectors)))

    same(net, state)


def test_a_file_of_safetensors_is_read(tmp_path):
    """It holds tensors alone, so there is nothing to be unpickled."""
    state = random_state()
    save_file(state, tmp_path / "sit.safetensors")

    same(read(tmp_path / "sit.safetensors"), state)


def test_a_file_of_an_older_torch_is_read(tmp_path):
    """Before version 1.6 torch wrote a plain pickle, and no zip file."""
    state = random_state()
    torch.save(state, tmp_path / "sit.pt", _use_new_zipfile_serialization=False)

    same(read(tmp_path / "sit.pt"), state)


# ------------------------------------------------------------------------------------ refused files
def without(name):
    """The weights of a SiT less one."""
    state = random_state()
    del state[name]
    return state


@pytest.mark.parametrize(
    "what, reason",
    [
        (dict(ema=dict(a=1), of=fractions.Fraction(1, 2)), "has a pickled fractions.Fraction"),
        ([1, 2], "a list, not a dict"),
        (dict(ema={0: torch.ones(3)}), "no x_embedder.proj.weight; it has 0"),
        (dict(epoch=3, loss=0.1), "no x_embedder.proj.weight; it has epoch, loss"),
        (without("pos_embed"), 'Missing key(s) in state_dict: "pos_embed"'),
        (without("final_layer.linear.bias"), "no 'final_layer.linear.bias'"),
        (random_state() | {"blocks.2.more": torch.ones(1)}, "Unexpected key(s)"),
        (sit.SiT("tiny/2", 16).state_dict(), "size mismatch for pos_embed"),
        (sit.SiT("tiny/4", 16).state_dict(), "size mismatch for x_embedder.proj.weight"),
    ],
    ids=["class", "list", "numbers", "other", "less", "last", "more", "side", "patch"],
)
def test_what_is_no_sit_of_this_size_is_refused_in_a_line(tmp_path, what, reason):
    """It must not become a network of which a part is random, or run a stranger's code.

    The line names the file, what was asked for, and what is in its place.
    """
    path = saved(tmp_path, what)

    with pytest.raises(ValueError, match=r"is no SiT tiny/2 at 64 px \(") as error:
        read(path)

    said = str(error.value)
    assert said.startswith(str(path))
    assert reason in said.split("(", 1)[1]
    assert "\n" not in said


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2702000000\n"


@pytest.mark.parametrize("name", ["sit.pt", "sit.safetensors"])
@pytest.mark.parametrize(
    "content, reason",
    [
        (LFS, "a git-lfs pointer, not the file: run git lfs pull"),
        (b"", "the file is empty"),
        (None, "No such file"),
    ],
    ids=["lfs", "empty", "nowhere"],
)
def test_half_a_download_is_refused_in_a_line(tmp_path, name, content, reason):
    """These are what people have who think that they have the file."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ValueError) as error:
        read(path)

    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_short_is_refused_in_a_line(tmp_path):
    """torch itself says "[Errno 22] Invalid argument" of it, which nobody understands."""
    path = saved(tmp_path, random_state())
    path.write_bytes(path.read_bytes()[:5000])

    with pytest.raises(ValueError, match=r"\(a part of the file: get it again\)$"):
        read(path)


def test_a_page_in_place_of_the_file_is_refused_in_a_line(tmp_path):
    """A download that needs a login ends in a page of HTML under the name of the file."""
    path = tmp_path / "sit.pt"
    path.write_text("<!DOCTYPE html><title>Log in</title>")

    with pytest.raises(ValueError, match=r"not of torch.save, for it begins b'<!DOCTYPE html>"):
        read(path)
