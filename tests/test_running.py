"""running.py: processes, the folder of a run, checkpoints, the log, the command line.

The networks are single layers. What needs several ranks is done by tests/ranks.py under torchrun,
once for all tests; the rest runs in the process of the test.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close

import amd
import running
from helpers import ROOT, leave_litter, read_log, torchrun
from test_amd import Setting, clipped_step, close, hashed, lively


def parts_of(net):
    """A network with its optimizer, as save and load take them.

    There is no average; a test that wants one gives it.
    """
    opt = torch.optim.AdamW(net.parameters())
    return dict(student=(net, opt, None))


# ---------------------------------------------------------------------------------------- processes
kinds = pytest.mark.parametrize("kind", ["plain", "sharded"])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with what two processes have made. See tests/ranks.py for its files."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun("tests/ranks.py", folder, ranks=2)
    return folder


@pytest.fixture
def hashed_noise(monkeypatch):
    """Noise that depends on the sample alone, so that any layout of ranks draws the same.

    Without it the oracle of one process would see other noise than two ranks do.
    """
    monkeypatch.setattr(torch, "randn_like", hashed)
    monkeypatch.setattr(torch, "rand_like", hashed)


@pytest.mark.parametrize("aware", [False, True])
@kinds
@pytest.mark.parametrize("name", amd.METHODS)
def test_two_ranks_change_nothing(two_ranks, name, kind, aware, hashed_noise):
    """A group of 8 may lie on two ranks, in two micro-batches each: the weights are the same.

    So a user may add GPUs without tuning anew. They agree to 1e-9, whether the networks are whole
    on each rank or sharded by FSDP2. The oracle is one process with one batch.
    """
    there = torch.load(two_ranks / f"{name}_{kind}_{aware}.pt")

    it = Setting()
    log = it.run(
        lively(name),
        2,
        K=8,
        aware=it.aware if aware else None,
    )[-1]

    close(
        there["weights"],
        it.weights(),
        rtol=1e-9,
        atol=1e-9,
    )
    for k in log.keys() & {"reward", "reward_std", "adv_clip", "w_mean"}:
        close(there["log"][k], float(log[k]))


def test_every_rank_draws_noise_of_its_own(two_ranks):
    """Ranks that drew the same noise would make the same samples, and all but one were useless.

    Two iterations on two ranks are four draws, which gather puts in one tensor.
    """
    drawn = torch.load(two_ranks / "noise.pt")

    assert drawn.shape == (4, 3)
    assert len(drawn.unique(dim=0)) == 4


@kinds
def test_the_norm_that_is_clipped_counts_all_shards(two_ranks, kind, hashed_noise):
    """A step is that of one process also where the clip scales it.

    It is a step of plain SGD with a small clip, for AdamW would not see a wrong scale.
    """
    there = torch.load(two_ranks / f"clipped_{kind}.pt")

    update = partial(amd.update, clip=1e-2)
    here = clipped_step(Setting(), update)

    close(
        there,
        here,
        rtol=1e-9,
        atol=1e-9,
    )


@kinds
def test_what_is_not_finite_on_one_rank_is_skipped_on_both(two_ranks, kind):
    """A rank that skipped alone would drift from the others, or hang in a collective call.

    Here x is NaN on rank 1 in the first update. Both ranks lose both of its iterations, no weight
    moves, and the second update is well.
    """
    told = torch.load(two_ranks / f"broken_{kind}.pt")

    for of_one_rank in told.tolist():
        assert of_one_rank == [
            2,  # iterations skipped in the first update
            True,  # no weight moved in it
            2,  # skipped after the second one
        ]


def test_ranks_without_a_shared_disk_say_so(two_ranks):
    """Machines without a shared disk cannot write one checkpoint, so none of them may begin.

    Rank 1 looks in vain for the file that rank 0 has written. Both end with exit code 2 and a line
    that tells what to choose, before anything is trained.
    """
    for rank in (0, 1):
        told = (two_ranks / f"told_{rank}.txt").read_text()
        assert told.startswith("2 ranks.py: ")
        assert told.endswith("not one folder for all ranks: choose one on a disk they share\n")
    assert not list(two_ranks.glob("*/config.json"))


def test_one_process_is_rank_0_of_1():
    """A script that was started without torchrun is a run of one rank.

    gather has nothing to do there, not even a copy.
    """
    v = torch.randn(3, 2)

    assert running.ranks()[:2] == (0, 1)
    assert running.gather(v) is v


def test_update_is_amds_on_one_process():
    """running.update serves any number of ranks, so a script need not choose.

    The oracle is amd.update on a twin: the step is the same, and so are the norms that come back,
    here of eight gradients that are 4 each.
    """
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    nets[1].load_state_dict(nets[0].state_dict())

    for net, step in zip(nets, (amd.update, running.update), strict=True):
        opt = torch.optim.SGD(net.parameters(), 1.0)
        net(torch.ones(4, 3)).sum().backward()
        norms = step([opt], 0.5)
        assert_close(norms, torch.tensor([math.sqrt(4**2 * 8)]))

    assert nets[0].weight.equal(nets[1].weight)


def test_half_a_launch_says_what_it_lacks(monkeypatch):
    """A job script may set RANK and forget the rest of what torchrun sets.

    The error names the variable, and the run does not go on as one process of many.
    """
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    with pytest.raises(ValueError, match="MASTER_ADDR"):
        running.launch()


# ----------------------------------------------------------------------------------------- networks
def test_the_average_follows_the_weights():
    """At a decay of .9 a tenth of a change is in the average after one update.

    The average begins as a copy of the weights, so no early samples are drawn from zeros.
    """
    net = nn.Linear(2, 2)
    ema = running.EMA(net, 0.9)
    old = net.weight.data.clone()

    net.weight.data += 1
    ema.update()

    assert_close(ema.shadow["weight"], old + 0.1)


def test_the_average_is_of_what_is_trained():
    """A LoRA's base is frozen, and an average of it would be a copy of the whole network.

    Here the bias is frozen.
    """
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)

    ema = running.EMA(net, 0.9)

    assert [*ema.shadow] == ["weight"]


def test_averaged_gives_the_weights_back():
    """Samples are drawn with the average for weights, and then training must go on as it was.

    The weights come back also if what runs within fails. A run that keeps no average has None for
    it, and draws with its weights.
    """
    net = nn.Linear(2, 2)
    ema = running.EMA(net, 0.0)
    net.weight.data += 1
    trained = net.weight.data.clone()

    with pytest.raises(KeyError), running.averaged(ema):
        assert_close(net.weight.data, trained - 1)
        raise KeyError
    assert net.weight.equal(trained)

    with running.averaged(None):
        assert net.weight.equal(trained)


def test_a_shared_copy_holds_no_weight_twice_and_hides_its_adapter():
    """Student and fake teacher are LoRAs on the real teacher, and there is room for one base.

    Neither the base nor the other copy may see an adapter, or the frozen teacher would learn. The
    oracle is what the base says before it is shared.
    """
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]
    base = nn.Sequential(*layers).requires_grad_(False)
    x = torch.randn(3, 4)
    before = base(x)
    config = LoraConfig(
        r=2,
        target_modules=["0", "2"],
        init_lora_weights=False,
    )

    a, b = (inject_adapter_in_model(config, running.share(base)) for _ in range(2))

    weights_of_base = {id(p) for p in base.parameters()}
    assert weights_of_base <= {id(p) for p in a.parameters()}
    assert base(x).equal(before)
    assert not a(x).equal(before)
    assert not a(x).equal(b(x))
    assert [*running.adapters(a)] == ["0", "2"]
    assert not running.adapters(base)


def test_a_network_visits_a_device_and_is_back_as_it_was():
    """There it has copies, a shared weight one, buffers too; nothing is copied back.

    The device is torch's own "meta", which has shapes and no numbers. It is back after an error.
    """
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).requires_grad_(False)
    net[2].weight = net[0].weight
    before = {**dict(net.named_parameters()), **dict(net.named_buffers())}

    with pytest.raises(KeyError), running.visit(torch.device("meta"), net):
        there = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        assert {v.device.type for v in there.values()} == {"meta"}
        assert net[2].weight is net[0].weight
        assert net(torch.zeros(2, 3, device="meta")).device.type == "meta"
        raise KeyError

    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert after.keys() == before.keys()
    assert all(v is before[name] for name, v in after.items())
    assert net[2].weight is net[0].weight


# --------------------------------------------------------------------------------- the run's folder
CONFIG = dict(lr=1e-3, steps=5, out="x")


@pytest.fixture
def used(tmp_path):
    """The folder of a run that has saved something, and is over.

    An image is enough, as a script saves them while it trains.
    """
    running.open_run(tmp_path / "run", CONFIG)
    (tmp_path / "run/samples").mkdir()
    (tmp_path / "run/samples/1.png").touch()
    return tmp_path / "run"


def test_open_run_keeps_the_config(tmp_path):
    """config.json tells how a run was made: its arguments, and the version of torch.

    A path is no JSON and becomes text. read_config gives back the arguments alone.
    """
    config = dict(CONFIG, out=tmp_path)

    out = running.open_run(tmp_path / "a/run", config)

    told = json.loads((out / "config.json").read_text())
    assert told["config"] == dict(CONFIG, out=str(tmp_path))
    assert told["torch"] == torch.__version__
    assert running.read_config(out) == told["config"]


def test_a_used_folder_is_resumed_or_refused(used):
    """A second run must not mix its files with those of the first by mistake.

    The message tells the flag of one who meant to go on.
    """
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        running.open_run(used, CONFIG)

    assert running.open_run(used, CONFIG, resume=True) == used


def test_a_logged_step_counts_as_a_run(tmp_path):
    """A run that has logged has trained, though it has saved nothing yet.

    Its log would be lost if another run began in its place.
    """
    running.open_run(tmp_path, CONFIG)
    running.Log(tmp_path, batch=8)(dict(step=1))

    with pytest.raises(ValueError, match="holds a run: add --resume"):
        running.open_run(tmp_path, CONFIG)


def test_another_config_is_refused_and_named(used):
    """A run that went on with another learning rate would be neither of the two.

    The message tells what differs, and the old config stays.
    """
    other = dict(CONFIG, lr=2e-3)

    with pytest.raises(ValueError, match=r"another run \(lr 0.001 -> 0.002\)"):
        running.open_run(used, other, resume=True)

    assert running.read_config(used) == CONFIG


def test_what_is_free_may_change_and_is_kept(used):
    """A script frees what does not change the training so far, as the number of steps.

    So a run may be made longer. The folder tells the new number from then on.
    """
    longer = dict(CONFIG, steps=9)

    running.open_run(used, longer, resume=True, free=["steps"])

    assert running.read_config(used)["steps"] == 9


def test_a_run_that_did_nothing_may_begin_anew(tmp_path):
    """A run that failed before its first step leaves a config, and nothing worth to keep.

    Its folder takes another config without --resume.
    """
    running.open_run(tmp_path, CONFIG)

    running.open_run(tmp_path, dict(CONFIG, lr=1))

    assert running.read_config(tmp_path)["lr"] == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """A network's folder of diffusers has a config.json too.

    Given as --out by mistake, it must lose nothing and gain nothing.
    """
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')

    with pytest.raises(ValueError, match="is of no run"):
        running.open_run(tmp_path, CONFIG)

    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# A run in a process of its own, which says that it has the folder, and then works for a minute.
HOLD = """
import sys, time, running
running.open_run(sys.argv[1], dict(lr=0))
print("at work", flush=True)
time.sleep(60)
"""


def start(code, argument, **options):
    """Start Python code with an argument, often a folder -> the process."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(argument)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        **options,
    )


def test_two_runs_do_not_share_a_folder(tmp_path):
    """A run may be at work that has saved nothing yet, and its folder is taken all the same.

    When it is killed, even by kill -9, its folder is free at once, with no file to remove by hand.
    """
    first = start(
        HOLD,
        tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "at work\n"

    with pytest.raises(ValueError, match="has a run at work now"):
        running.open_run(tmp_path, CONFIG)
    assert running.read_config(tmp_path) == dict(lr=0)

    first.kill()
    first.communicate()
    running.open_run(tmp_path, CONFIG)
    assert running.read_config(tmp_path) == CONFIG


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    """A worker of a data loader may outlive the run, and it has inherited the open lock.

    Here the run forks and ends, and its child sleeps on. The folder must be free.
    """
    fork_and_end = "import os; os.fork() and os._exit(0); time.sleep(20)"
    code = HOLD.replace("time.sleep(60)", fork_and_end)

    first = start(code, tmp_path)
    first.wait()

    running.open_run(tmp_path, CONFIG)


def test_a_student_is_of_the_run_in_whose_folder_it_lies(tmp_path):
    """Its steps and sizes are in the run's config.json. Anyone else's student has none."""
    running.open_run(tmp_path / "run", dict(student_steps=2))
    for name in ("student", "student_ema"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "else/config.json").write_text("{}")  # of a network

    for path in ("run", "run/student", "run/student_ema"):
        assert running.config_of_student(tmp_path / path)["student_steps"] == 2
    assert running.config_of_student(tmp_path / "else") == {}


@pytest.mark.parametrize(
    "batch, world, most, accum",
    [(128, 1, 8, 16), (128, 8, 8, 2), (20, 1, 8, 4), (7, 1, 8, 1), (14, 1, 4, 7), (8, 8, 1, 1)],
)
def test_micro_batches_are_equal_and_small_enough(batch, world, most, accum, monkeypatch):
    """Of 20 samples, four micro-batches of 5: three would have 7, 7 and 6."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert running.micro_batches(batch, most) == accum


# -------------------------------------------------------------------------------------- checkpoints
def test_the_newest_checkpoint_is_loaded(tmp_path):
    """Steps count as numbers: 9 comes before 10, though not in the alphabet.

    A step that is saved again replaces the old one, as after a resume.
    """
    net = nn.Linear(4, 4)
    for step, value in ((9, 1.0), (10, 2.0), (10, 3.0)):
        net.weight.data.fill_(value)
        running.save(tmp_path, step, **parts_of(net))

    other = nn.Linear(4, 4)
    assert running.load(tmp_path, **parts_of(other)) == 10

    assert (other.weight == 3).all()


def test_a_fresh_folder_has_no_checkpoint(tmp_path):
    """A script loads whether it resumes or not.

    Where nothing was saved, it starts at step 0 with the weights that it has.
    """
    net = nn.Linear(4, 4)
    before = net.weight.clone()

    assert running.load(tmp_path, **parts_of(net)) == 0

    assert net.weight.equal(before)


def test_copies_and_litter_beside_checkpoints_do_not_count(tmp_path):
    """step_99.good, step_98_1 and unfinished_99 are a user's, or what kill -9 left.

    All of them are empty here, so a load of one would fail.
    """
    running.save(tmp_path, 2, **parts_of(nn.Linear(4, 4)))
    leave_litter(tmp_path)

    step = running.load(tmp_path, **parts_of(nn.Linear(4, 4)))

    assert step == 2


def test_only_the_newest_are_kept(tmp_path):
    """keep=2 bounds the disk that a long run takes.

    What a user has copied stays, for it is the user's.
    """
    for step in (8, 9, 10, 11):
        running.save(
            tmp_path,
            step,
            keep=2,
            **parts_of(nn.Linear(4, 4)),
        )
        (tmp_path / "checkpoints/step_8.good").mkdir(exist_ok=True)

    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_10", "step_11", "step_8.good"}


def test_optimizers_and_averages_are_restored(tmp_path):
    """Training goes on bit for bit, momentum and step numbers included.

    The oracle is the run that was saved: it takes its second step beside one that was loaded into
    other weights, and both must end alike.
    """
    nets = [nn.Linear(4, 4), nn.Linear(4, 4)]
    parts = []
    for net in nets:
        opt = torch.optim.AdamW(net.parameters(), 0.1)
        ema = running.EMA(net, 0.5)
        parts.append(dict(student=(net, opt, ema)))

    def step(net, opt, ema):
        net(torch.ones(2, 4)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        ema.update()

    step(*parts[0]["student"])
    running.save(tmp_path, 1, **parts[0])
    running.load(tmp_path, **parts[1])
    for given in parts:
        step(*given["student"])

    assert nets[1].weight.equal(nets[0].weight)
    _, _, ema = parts[0]["student"]
    _, _, ema_loaded = parts[1]["student"]
    assert ema_loaded.shadow["bias"].equal(ema.shadow["bias"])


@pytest.mark.parametrize(
    "foreign",
    [
        nn.Linear(4, 5),
        nn.Linear(4, 4, bias=False),
        nn.Sequential(nn.Linear(4, 4)),
    ],
)
def test_a_checkpoint_of_other_networks_is_refused(tmp_path, foreign):
    """A network must not be filled in part, whether a shape, a weight or a name is another.

    The error is one line. It does not call a whole checkpoint damaged, which one would remove.
    """
    running.save(tmp_path, 1, **parts_of(nn.Linear(4, 4)))

    with pytest.raises(ValueError, match=r"\(student\.net.*choose another folder") as error:
        running.load(tmp_path, **parts_of(foreign))

    assert "\n" not in str(error.value)
    assert "damaged" not in str(error.value)


def test_a_part_that_was_not_saved_is_named(tmp_path):
    """As a student alone is, where student and fake were saved."""
    parts = parts_of(nn.Linear(4, 4))
    running.save(tmp_path, 1, **parts, fake=parts["student"])

    with pytest.raises(ValueError, match=r"holds other parts .*\(fake\.net.*give those"):
        running.load(tmp_path, **parts)


def test_a_checkpoint_of_another_optimizer_is_whole(tmp_path):
    """The step of an 8-bit optimizer is a number, and that of AdamW a tensor."""
    from bitsandbytes.optim import AdamW8bit

    parts = parts_of(nn.Linear(4, 4))
    running.fill_state(parts["student"][1])
    running.save(tmp_path, 1, **parts)
    net = nn.Linear(4, 4)

    with pytest.raises(ValueError, match=r"holds other parts .*student\.opt"):
        running.load(tmp_path, student=(net, AdamW8bit(net.parameters()), None))


def test_a_damaged_checkpoint_is_named(tmp_path):
    """A user must learn which one to remove, so as to resume from the one before.

    Here a file is cut after 100 bytes.
    """
    running.save(tmp_path, 10, **parts_of(nn.Linear(4, 4)))
    (file,) = (tmp_path / "checkpoints/step_10").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])

    with pytest.raises(ValueError, match=r"step_10 cannot be read .* if it is damaged, remove it"):
        running.load(tmp_path, **parts_of(nn.Linear(4, 4)))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """What is half written never takes the place of what was whole.

    A limit on the size of files stands for the full disk.
    """
    net = nn.Linear(4, 4)
    running.save(tmp_path, 10, **parts_of(net))

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
    try:
        with pytest.raises(OSError, match=r"unfinished_11 cannot.*make room"):
            running.save(tmp_path, 11, **parts_of(net))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))

    step = running.load(tmp_path, **parts_of(nn.Linear(4, 4)))
    assert step == 10


def test_one_process_saves_without_a_warning(tmp_path):
    """torch warns at each save that nothing is distributed, which the owner of one GPU knows.

    Here each warning is an error, both for save and for load.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        running.save(tmp_path, 1, **parts_of(nn.Linear(4, 4)))
        running.load(tmp_path, **parts_of(nn.Linear(4, 4)))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """A config or a log that is cut in the middle would end every later resume.

    The text has a surrogate, which is no UTF-8, so that writing fails halfway.
    """
    path = tmp_path / "a.json"
    running.write(path, "old")

    with pytest.raises(UnicodeEncodeError):
        running.write(path, "half \ud800")

    assert path.read_text() == "old"


# ------------------------------------------------------------------------------------------ the log
def test_the_log_writes_a_row_a_call(tmp_path):
    """Counts stay integers, tensors become numbers, and NaN becomes null, for JSON has none.

    The time is that of one step: here two steps took at least 20 ms, so one took 10.
    """
    log = running.Log(tmp_path, batch=8)
    time.sleep(0.02)

    row = log(
        dict(
            step=2,
            reward=torch.tensor(0.5),
            skipped=0,
            loss=torch.tensor(math.nan),
        )
    )

    (told,) = read_log(tmp_path)
    numbers = dict(
        step=2,
        reward=0.5,
        skipped=0,
        loss=None,
    )
    assert told.items() >= numbers.items()
    assert told["sec"] == row["sec"] > 0.01
    close(row["samples_per_s"], 8 / row["sec"])


def test_a_resumed_log_drops_what_it_writes_again(tmp_path):
    """A reader of log.jsonl must find each step once.

    What goes are the rows after the checkpoint's step, and the half row that kill -9 left.
    """
    log = running.Log(tmp_path, batch=8)
    for step in (1, 2, 3):
        log(dict(step=step))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')

    running.Log(tmp_path, batch=8, start=2)

    steps = [row["step"] for row in read_log(tmp_path)]
    assert steps == [1, 2]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, instead of their files."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append((figure, path)))
    return figures


def test_the_log_is_drawn_with_a_line_for_each_number(tmp_path, drawn):
    """The reward of each exit has a line of its own, which has points where that exit came.

    A null, which was no finite number, leaves a gap. What is no loss, reward or norm is not drawn.
    """
    rows = [
        dict(step=1, loss_fake=3.0, reward=0.1, reward_std=9.0, reward_exit_1=0.2, g_norm=1.0),
        dict(step=2, loss_fake=None, reward=0.3, reward_std=9.0, reward_exit_2=0.4, g_norm=None),
        dict(step=3, loss_fake=1.0, reward=0.5, reward_std=9.0, reward_exit_1=0.6, g_norm=None),
    ]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    running.draw_log(tmp_path)

    ((figure, path),) = drawn
    assert path == tmp_path / "curves.png"
    panels = {}
    for ax in figure.axes:
        lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
        panels[ax.get_title()] = lines
    assert panels == dict(
        loss=dict(loss_fake=[[1, 3.0], [3, 1.0]]),
        reward=dict(
            reward=[[1, 0.1], [2, 0.3], [3, 0.5]],
            reward_exit_1=[[1, 0.2], [3, 0.6]],
            reward_exit_2=[[2, 0.4]],
        ),
        norm=dict(g_norm=[[1, 1.0]]),
    )


def test_nothing_is_drawn_of_an_empty_log(tmp_path, drawn):
    """A run of no updates, or of fewer than a row of the log takes, must still end well."""
    running.Log(tmp_path, batch=8)

    running.draw_log(tmp_path)

    assert not drawn


def test_a_log_without_a_reward_is_drawn(tmp_path):
    """Stage one of a run asks no reward, and a number may be null in all rows."""
    log = running.Log(tmp_path, batch=8)
    log(dict(step=1, loss_fake=1.0, g_norm=math.nan))

    running.draw_log(tmp_path)

    assert (tmp_path / "curves.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------- many small jobs
class Job(NamedTuple):
    """A job of a worker: how long it takes, and what it makes."""

    seconds: float
    number: int
    steps: int = 40


def work(job):
    """Take a while, step by step, and fail at number 13."""
    time.sleep(job.seconds)
    for step in range(job.steps):
        running.tick(step)
    if job.number == 13:
        raise ValueError("thirteen")
    return job.number, os.getpid(), torch.get_num_threads()


def test_there_are_no_more_workers_than_cores_that_may_be_used():
    """A machine may have many cores of which a container gives us one."""
    given = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(given)})
        assert running.cores() == 1
    finally:
        os.sched_setaffinity(0, given)


def test_results_of_workers_come_in_the_order_of_the_jobs():
    """A job that ends early must not be taken for another. The first here takes longest.

    The jobs are done by several processes, with one thread each, and their steps are counted.
    """
    workers = running.Workers(3)

    results = workers.map(work, [Job(0.4, 0), Job(0.2, 1), Job(0, 2), Job(0, 3)], "jobs")

    numbers, pids, threads = zip(*results, strict=True)
    assert numbers == (0, 1, 2, 3)
    assert os.getpid() not in pids
    assert len({*pids}) > 1
    assert {*threads} == {1}
    assert workers.done.value == 4 * 40


def test_without_workers_this_process_does_the_jobs():
    """So it is on a GPU, of which each process would hold a context."""
    workers = running.Workers(0)

    results = workers.map(work, [Job(0, 4), Job(0, 2)], "jobs")

    numbers, pids, _ = zip(*results, strict=True)
    assert numbers == (4, 2)
    assert {*pids} == {os.getpid()}


def test_an_error_of_a_job_reaches_the_caller():
    """running.run makes one line of it there. The workers are still of use."""
    workers = running.Workers(2)

    with pytest.raises(ValueError, match="thirteen"):
        workers.map(work, [Job(0, 1), Job(0, 13)], "jobs")

    ((number, *_),) = workers.map(work, [Job(0, 4)], "jobs")
    assert number == 4


# A script that has a job of a minute and two workers, of which one is killed, as the system kills
# for lack of memory: its own, or the other one, which waits for a job.
KILLED = """
import os, signal, sys, time, types, running
def work(job):
    me, parent = os.getpid(), os.getppid()
    workers = open(f"/proc/{parent}/task/{parent}/children").read().split()
    (other,) = {int(pid) for pid in workers} - {me}
    os.kill(me if sys.argv[1] == "busy" else other, signal.SIGKILL)
    time.sleep(60)
running.run(
    lambda _: running.Workers(2).map(work, [types.SimpleNamespace(steps=1)], "jobs"), lambda: None
)
"""


@pytest.mark.parametrize("which", ["busy", "idle"])
def test_a_worker_that_is_killed_is_missed(which):
    """The lost job has no result to wait for. The script ends at once, and says what happened."""
    process = start(KILLED, which, stderr=subprocess.PIPE, text=True)

    _, told = process.communicate(timeout=30)

    assert told == "-c: jobs: a process was killed; is there too little memory?\n"
    assert process.returncode == 2


# A script whose workers have work for a minute.
LONG_WORK = """
import signal, time, types, running
def work(job):
    time.sleep(60)
def main(args):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = running.Workers(2)
    print("at work", flush=True)
    workers.map(work, [types.SimpleNamespace(steps=1)] * 4, "jobs")
running.run(main, lambda: None)
"""


def test_ctrl_c_ends_all_workers_in_one_line(tmp_path):
    """A terminal sends it to all processes at once, and each worker would print a traceback.

    Here they are a group of their own, as under a shell. Their pipe ends when the last of them is
    gone.
    """
    process = start(
        LONG_WORK,
        tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "at work\n"
    time.sleep(0.5)

    os.killpg(process.pid, signal.SIGINT)

    output, _ = process.communicate(timeout=30)
    assert output == "-c: interrupted\n"
    assert process.returncode == 130


def test_seeds_are_told_by_mean_and_spread(capsys):
    """One seed has no spread, so its number stands alone; of two it is sqrt(1/2) of their distance.

    The table has a row for each arm and a column for each measure.
    """
    two, one = running.mean_std([dict(a=1.0), dict(a=3.0)]), running.mean_std([dict(a=0.5)])
    running.show(dict(both=two, single=one))

    assert two == dict(a=[2.0, pytest.approx(2**0.5)])
    assert one == dict(a=0.5)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["a"], ["both", "2.000", "+-", "1.414"], ["single", "0.500"]]


# ------------------------------------------------------------------------------------- command line
def test_fill_gives_a_default_to_what_was_not_given():
    """Defaults that hang on another flag, as on --dry-run, can be set only when all are known.

    What was given stays, also if it counts as false.
    """
    args = Namespace(steps=None, lr=0.0, out="mine")

    filled = running.fill(args, dict(steps=9, lr=1.0))

    assert filled is args
    assert vars(args) == dict(steps=9, lr=0.0, out="mine")


@pytest.mark.parametrize("value", [0, -1, 0.0, math.nan, math.inf, -math.inf])
def test_positive_refuses_what_is_not_above_0_or_no_number(value):
    """A learning rate of NaN would pass any comparison that is turned about.

    The message has the flag as it is typed.
    """
    args = Namespace(fake_lr=value, steps=3)

    running.positive(args, "steps")

    with pytest.raises(ValueError, match=rf"--fake-lr {value}: choose it above 0"):
        running.positive(args, "steps", "fake_lr")


def test_shared_flags_have_one_name_one_type_and_one_help(capsys):
    """A flag means the same in every script, and --help shows all in groups, in one order.

    A script may leave any out, so none is required.
    """
    parser = running.Parser("doc")
    for name in running.FLAGS:
        parser.shared(name)

    parser.parse_args([])
    args = parser.parse_args(
        ["--tau", "inf", "--no-compile", "--adam8bit", "--fake-lr", "1e-5"],
    )
    types = dict(
        tau=math.inf,
        compile=False,
        adam8bit=True,
        fake_lr=1e-5,
    )
    assert vars(args).items() >= types.items()

    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:") for group in running.GROUPS]
    assert places == sorted(places)
    assert all(f"--{name}" in text for name in running.FLAGS)


def test_a_wrong_flag_is_one_line(capsys):
    """argparse would print the usage of all flags first, and what is wrong would be lost in it.

    The exit code is argparse's own, 2.
    """
    parser = running.Parser("doc")
    parser.shared("steps", default=3)

    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--steps", "many"])

    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_require_raises_what_to_do():
    """Scripts check all input by it, so that running.run can tell a bad input from a bug.

    Anything may be the condition, as a list that must not be empty.
    """
    running.require(True, "never")

    with pytest.raises(ValueError, match="choose more"):
        running.require([], "choose more")


@pytest.mark.parametrize(
    "error, message, code",
    [
        (ValueError("choose\nmore"), "sdxl.py: choose more\n", 2),
        (OSError("no room"), "sdxl.py: no room\n", 2),
        (FloatingPointError("ten"), "sdxl.py: ten\n", 2),
        (torch.OutOfMemoryError("all used"), "sdxl.py: all used; buy memory\n", 2),
        (KeyboardInterrupt(), "sdxl.py: interrupted\n", 130),
    ],
)
def test_an_expected_error_is_one_line(error, message, code, monkeypatch, capsys):
    """It tells the script's name and what is wrong; only a lack of memory gets the hint.

    A job script may tell by the exit code what a user can mend from what was interrupted.
    """
    monkeypatch.setattr(sys, "argv", ["/some/where/sdxl.py"])

    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        running.run(
            main,
            lambda: None,
            "buy memory",
        )

    assert stop.value.code == code
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    """An IndexError is no fault of the input: one line of it would tell nobody where to look.

    So running.run lets it through as it is.
    """
    with pytest.raises(IndexError):
        running.run(
            lambda _: [][1],
            lambda: None,
        )


def test_the_clock_prints_each_time_as_it_is_known(capsys):
    """A call is measured after one to warm up, which may compile.

    An update is then compared with the calls that it needs: by hand, three of 10 ms are half of
    60 ms.
    """
    clock, calls = running.Clock(), []

    def call():
        calls.append(0)
        time.sleep(0.01)

    clock("pass", call)
    assert len(calls) == 2
    assert 0.01 <= clock.seconds["pass"] < 0.1

    clock.seconds["pass"] = 0.01
    clock.ratio("update", 0.06, {"pass": 3})

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pass: 0.01")
    assert lines[1] == "update: 0.0600 s; bare calls (3 pass): 0.0300 s; ratio 2.000"
