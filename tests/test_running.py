"""running.py: processes, the folder of a run, checkpoints, the log, the command line."""

import json
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.testing import assert_close

import amd
import running
from helpers import ROOT, finish, launch, leave_litter, read_log
from test_amd import Setting, clipped_step, close, hashed, lively


def parts_of(net):
    """A network with its optimizer, as save and load take them."""
    return dict(student=(net, torch.optim.AdamW(net.parameters()), None))


# --------------------------------------------------------------------------------------- processes
@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with what two processes made of each row of Table 1."""
    folder = tmp_path_factory.mktemp("methods")
    finish(launch("tests/ranks.py", "methods", folder, ranks=2))
    return folder


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("kind", ["plain", "sharded"])
@pytest.mark.parametrize("name", amd.METHODS)
def test_two_ranks_change_nothing(two_ranks, name, kind, aware, monkeypatch):
    """A group of 8 on two ranks in two micro-batches each, against one process and one batch.

    The weights agree to 1e-9, whether the networks are whole on each rank or sharded by FSDP2.
    """
    monkeypatch.setattr(torch, "randn_like", hashed)
    monkeypatch.setattr(torch, "rand_like", hashed)
    it = Setting()
    log = it.run(lively(name), 3, K=8, aware=it.aware if aware else None)[-1]
    there = torch.load(two_ranks / f"{name}_{kind}_{aware}.pt")
    close(there["weights"], it.weights(), rtol=1e-9, atol=1e-9)
    for k in log.keys() & {"reward", "reward_std", "adv_clip", "w_mean"}:
        close(there["log"][k], float(log[k]))


def test_every_rank_draws_noise_of_its_own(two_ranks):
    """Two iterations on two ranks are four draws, which gather puts in one tensor."""
    drawn = torch.load(two_ranks / "noise.pt")
    assert drawn.shape == (4, 3)
    assert len(drawn.unique(dim=0)) == 4


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_the_norm_that_is_clipped_counts_all_shards(two_ranks, kind, monkeypatch):
    """Plain SGD and a small clip, for AdamW would not see a wrong scale."""
    monkeypatch.setattr(torch, "randn_like", hashed)
    end = clipped_step(Setting(), partial(amd.update, clip=1e-2))
    close(torch.load(two_ranks / f"clipped_{kind}.pt"), end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_what_is_not_finite_on_one_rank_is_skipped_on_both(two_ranks, kind):
    """Both iterations of the first update are lost, no weight moves, and the second one is well."""
    for skipped, unmoved, skipped_later in torch.load(two_ranks / f"broken_{kind}.pt").tolist():
        assert (skipped, unmoved, skipped_later) == (2, 1, 2)


def test_ranks_without_a_shared_disk_say_so(tmp_path):
    """Rank 1 looks for the file of rank 0 in vain: one line, before anything is trained."""
    process = launch("tests/ranks.py", "folders", tmp_path, ranks=2)
    output, _ = process.communicate(timeout=110)
    assert process.returncode != 0
    assert "not one folder for all ranks: choose one on a disk they share" in output
    assert not list(tmp_path.glob("*/config.json"))


def test_one_process_is_rank_0_of_1():
    v = torch.randn(3, 2)
    assert running.ranks()[:2] == (0, 1)
    assert running.gather(v) is v


def test_update_is_amds_on_one_process():
    """Same norms, same step."""
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, step in zip(nets, (amd.update, running.update), strict=True):
        opt = torch.optim.SGD(net.parameters(), 1.0)
        net(torch.ones(4, 3)).sum().backward()
        assert_close(step([opt], 0.5), torch.tensor([math.sqrt(4**2 * 8)]))
    assert nets[0].weight.equal(nets[1].weight)


def test_half_a_launch_says_what_it_lacks(monkeypatch):
    """RANK without MASTER_ADDR, as a job script that forgot torchrun sets it."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        running.launch()


# ---------------------------------------------------------------------------------------- networks
def test_the_average_follows_the_weights():
    net = nn.Linear(2, 2)
    ema = running.EMA(net, 0.9)
    old = net.weight.data.clone()
    net.weight.data += 1
    ema.update()
    assert_close(ema.shadow["weight"], old + 0.1)


def test_the_average_is_of_what_is_trained():
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    assert [*running.EMA(net, 0.9).shadow] == ["weight"]


def test_averaged_gives_the_weights_back():
    """Also if what runs within it fails."""
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
    """Two LoRAs on one base: neither the base nor the other sees an adapter."""
    from peft import inject_adapter_in_model

    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(False)
    x = torch.randn(3, 4)
    before = base(x)
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    a, b = (inject_adapter_in_model(config, running.share(base)) for _ in range(2))
    own = {id(p) for p in base.parameters()}
    assert own <= {id(p) for p in a.parameters()}
    assert base(x).equal(before)
    assert not a(x).equal(before)
    assert not a(x).equal(b(x))
    assert [*running.adapters(a)] == ["0", "2"]
    assert not running.adapters(base)


# -------------------------------------------------------------------------------- the run's folder
CONFIG = dict(lr=1e-3, steps=5, out="x")


@pytest.fixture
def used(tmp_path):
    """The folder of a run that has saved something, and is over."""
    running.open_run(tmp_path / "run", CONFIG)
    (tmp_path / "run/samples").mkdir()
    (tmp_path / "run/samples/1.png").touch()
    return tmp_path / "run"


def test_open_run_keeps_the_config(tmp_path):
    """As JSON, with the versions of torch and of this repository."""
    out = running.open_run(tmp_path / "a/run", dict(CONFIG, out=tmp_path))
    told = json.loads((out / "config.json").read_text())
    assert told["config"] == dict(CONFIG, out=str(tmp_path))
    assert told["torch"] == torch.__version__
    assert running.read_config(out) == told["config"]


def test_a_used_folder_is_resumed_or_refused(used):
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        running.open_run(used, CONFIG)
    assert running.open_run(used, CONFIG, resume=True) == used


def test_a_logged_step_counts_as_a_run(tmp_path):
    running.open_run(tmp_path, CONFIG)
    running.Log(tmp_path, batch=8)(dict(step=1))
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        running.open_run(tmp_path, CONFIG)


def test_another_config_is_refused_and_named(used):
    other = dict(CONFIG, lr=2e-3)
    with pytest.raises(ValueError, match=r"another run \(lr 0.001 -> 0.002\)"):
        running.open_run(used, other, resume=True)
    assert running.read_config(used) == CONFIG


def test_what_is_free_may_change_and_is_kept(used):
    running.open_run(used, dict(CONFIG, steps=9), resume=True, free=["steps"])
    assert running.read_config(used)["steps"] == 9


def test_a_run_that_did_nothing_may_begin_anew(tmp_path):
    running.open_run(tmp_path, CONFIG)
    running.open_run(tmp_path, dict(CONFIG, lr=1))
    assert running.read_config(tmp_path)["lr"] == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """As a network's folder of diffusers, which has a config.json too."""
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(ValueError, match="is of no run"):
        running.open_run(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


HOLD = """
import sys, time, running
running.open_run(sys.argv[1], dict(lr=0))
print("at work", flush=True)
time.sleep(60)
"""


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The first one has saved nothing yet; when it is killed, its folder is free at once."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout.readline() == "at work\n"
    with pytest.raises(ValueError, match="has a run at work now"):
        running.open_run(tmp_path, CONFIG)
    assert running.read_config(tmp_path) == dict(lr=0)

    first.kill()
    first.communicate()
    running.open_run(tmp_path, CONFIG)
    assert running.read_config(tmp_path) == CONFIG


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    """As a worker that outlives the run."""
    code = HOLD.replace("time.sleep(60)", "import os; os.fork() and os._exit(0); time.sleep(20)")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    first.wait()
    running.open_run(tmp_path, CONFIG)


# ------------------------------------------------------------------------------------- checkpoints
def test_the_newest_checkpoint_is_loaded(tmp_path):
    """Steps count as numbers, 9 before 10; one that is saved again replaces the old one."""
    net = nn.Linear(4, 4)
    for step, value in ((9, 1.0), (10, 2.0), (10, 3.0)):
        net.weight.data.fill_(value)
        running.save(tmp_path, step, **parts_of(net))
    other = nn.Linear(4, 4)
    assert running.load(tmp_path, **parts_of(other)) == 10
    assert (other.weight == 3).all()


def test_a_fresh_folder_has_no_checkpoint(tmp_path):
    net = nn.Linear(4, 4)
    before = net.weight.clone()
    assert running.load(tmp_path, **parts_of(net)) == 0
    assert net.weight.equal(before)


def test_copies_and_litter_beside_checkpoints_do_not_count(tmp_path):
    """step_99.good, step_98_1 and unfinished_99 are a user's, or what kill -9 left."""
    running.save(tmp_path, 2, **parts_of(nn.Linear(4, 4)))
    leave_litter(tmp_path)
    assert running.load(tmp_path, **parts_of(nn.Linear(4, 4))) == 2


def test_only_the_newest_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        running.save(tmp_path, step, keep=2, **parts_of(nn.Linear(4, 4)))
        (tmp_path / "checkpoints/step_8.good").mkdir(exist_ok=True)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_10", "step_11", "step_8.good"}


def test_optimizers_and_averages_are_restored(tmp_path):
    """Training goes on bit for bit, momentum and step numbers included."""
    nets = [nn.Linear(4, 4), nn.Linear(4, 4)]
    parts = []
    for net in nets:
        opt = torch.optim.AdamW(net.parameters(), 0.1)
        parts.append(dict(student=(net, opt, running.EMA(net, 0.5))))

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
    assert parts[1]["student"][2].shadow["bias"].equal(parts[0]["student"][2].shadow["bias"])


@pytest.mark.parametrize(
    "foreign",
    [nn.Linear(4, 5), nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 4))],
)
def test_a_checkpoint_of_other_networks_is_refused(tmp_path, foreign):
    running.save(tmp_path, 1, **parts_of(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="choose another folder") as error:
        running.load(tmp_path, **parts_of(foreign))
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_is_named(tmp_path):
    running.save(tmp_path, 10, **parts_of(nn.Linear(4, 4)))
    (file,) = (tmp_path / "checkpoints/step_10").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="step_10 is damaged"):
        running.load(tmp_path, **parts_of(nn.Linear(4, 4)))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """A limit on the size of files stands for the full disk."""
    net = nn.Linear(4, 4)
    running.save(tmp_path, 10, **parts_of(net))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
    try:
        with pytest.raises(OSError, match=r"unfinished_11 cannot.*make room"):
            running.save(tmp_path, 11, **parts_of(net))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    assert running.load(tmp_path, **parts_of(nn.Linear(4, 4))) == 10


def test_one_process_saves_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        running.save(tmp_path, 1, **parts_of(nn.Linear(4, 4)))
        running.load(tmp_path, **parts_of(nn.Linear(4, 4)))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    running.write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        running.write(path, "half \ud800")
    assert path.read_text() == "old"


# ------------------------------------------------------------------------------------------ the log
def test_the_log_writes_a_row_a_call(tmp_path):
    """Counts stay integers, tensors become numbers, NaN becomes null; the time is a step's."""
    log = running.Log(tmp_path, batch=8)
    time.sleep(0.02)
    row = log(dict(step=2, reward=torch.tensor(0.5), skipped=0, loss=torch.tensor(math.nan)))
    (told,) = read_log(tmp_path)
    assert (told["step"], told["skipped"], told["reward"], told["loss"]) == (2, 0, 0.5, None)
    assert told["sec"] == row["sec"] > 0.01
    close(row["samples_per_s"], 8 / row["sec"])


def test_a_resumed_log_drops_what_it_writes_again(tmp_path):
    """Rows after the checkpoint's step, and the half row that kill -9 left."""
    log = running.Log(tmp_path, batch=8)
    for step in (1, 2, 3):
        log(dict(step=step))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    running.Log(tmp_path, batch=8, start=2)
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]


# ------------------------------------------------------------------------------------ command line
def test_shared_flags_have_one_name_one_type_and_one_help(capsys):
    parser = running.Parser("doc")
    for name in running.FLAGS:
        parser.shared(name)
    parser.parse_args([])
    args = parser.parse_args(["--tau", "inf", "--no-compile", "--adam8bit", "--fake-lr", "1e-5"])
    assert (args.tau, args.compile, args.adam8bit, args.fake_lr) == (math.inf, False, True, 1e-5)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:") for group in running.GROUPS]
    assert places == sorted(places)
    assert all(f"--{name}" in text for name in running.FLAGS)


def test_a_wrong_flag_is_one_line(capsys):
    parser = running.Parser("doc")
    parser.shared("steps", default=3)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--steps", "many"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_require_raises_what_to_do():
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
        (KeyboardInterrupt(), "sdxl.py: interrupted; with --resume, training", 130),
    ],
)
def test_an_expected_error_is_one_line(error, message, code, monkeypatch, capsys):
    """It tells the script's name and what is wrong; only a lack of memory gets the hint."""
    monkeypatch.setattr(sys, "argv", ["/some/where/sdxl.py"])

    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        running.run(main, lambda: None, "buy memory")
    assert stop.value.code == code
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(IndexError):
        running.run(lambda _: [][1], lambda: None)


def test_the_clock_prints_each_time_as_it_is_known(capsys):
    """After one call to warm up; an update is compared with the calls that it needs."""
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
