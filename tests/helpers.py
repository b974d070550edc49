"""What several test files share: real processes, a run that is killed, pictures.

A process is one of torchrun's, or a fork of the test's own. The scripts run in forks, because their
imports take long; what only torchrun can show is tested under torchrun.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def torchrun(script, *arguments, ranks):
    """Run a script under torchrun, which must end well.

    The port is random, so that two test runs on one machine do not meet there. Each rank computes
    on one thread, because all of them share the cores. One that fails tells why at the end of its
    output, so that end is what the assertion shows.
    """
    port = random.randint(20_000, 40_000)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        f"--master-port={port}",
    ]
    environment = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        PYTHONWARNINGS="ignore",
    )
    ended = subprocess.run(
        [*command, str(ROOT / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]


LATE = {  # what a script imports where it first needs it, and what takes long
    "sit_imagenet": ["timm.models.vision_transformer", "diffusers.models.autoencoders"],
    "sdxl": ["diffusers.pipelines.stable_diffusion_xl", "open_clip", "peft", "bitsandbytes"],
    "wan": ["diffusers.pipelines.wan.pipeline_wan_i2v", "transformers.models.umt5"],
}


def warm(script):
    """Import what a script will, so that its forks find it in memory.

    Each of them would take some ten seconds for it, and a run that is killed is three forks.
    """
    for name in [*LATE.get(script, ()), "matplotlib.figure", "torchvision.utils"]:
        importlib.import_module(name)


class Forked:
    """main(parse(arguments)) of a script in processes of their own, one a rank.

    They are forks of this one, with the environment that torchrun gives, which spares each of them
    the quarter of a minute that the imports take. A test kills them, or waits until they finish.
    """

    def __init__(self, script, arguments, ranks=1):
        self.arguments = [str(v) for v in arguments]
        self.port = random.randint(20_000, 40_000)
        self.output = tempfile.NamedTemporaryFile("w+", suffix=".txt")  # noqa: SIM115, see finish
        lib = __import__(script)
        warm(script)
        self.pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                self.be(lib, rank, ranks)
            self.pids.append(pid)

    def be(self, lib, rank, ranks):
        """What a child does; it never returns.

        An exception that got out would go on with the test suite in the child, so all of them are
        caught: they are printed to the output, and the child ends with exit code 1.
        """
        code = 1
        try:
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.output.fileno(), 2)
            if ranks > 1:
                os.environ |= dict(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(self.port),
                )
            torch.set_num_threads(1)
            lib.main(lib.parse(self.arguments))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def running(self):
        """Is the first rank still at work?

        WNOWAIT leaves a child that has ended for `kill` or `finish` to wait for.
        """
        ended = os.waitid(
            os.P_PID,
            self.pids[0],
            os.WEXITED | os.WNOHANG | os.WNOWAIT,
        )
        return ended is None

    def kill(self):
        """kill -9, all ranks: none of them can save anything or clean up.

        It returns when all are gone, and with them their locks on the folder of the run.
        """
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)

    def finish(self):
        """Wait for the ranks, which must end well.

        Where one does not, the assertion shows the end of what all of them printed.
        """
        codes = []
        for pid in self.pids:
            _, status = os.waitpid(pid, 0)
            codes.append(os.waitstatus_to_exitcode(status))
        assert not any(codes), Path(self.output.name).read_text()[-3000:]


def run_main(script, arguments):
    """main(parse(arguments)) of a script in this process.

    It is what the command line does, without a new process and its imports.
    """
    torch.set_num_threads(1)
    lib = __import__(script)
    return lib.main(lib.parse([str(v) for v in arguments]))


def survive(folder, script, flags, ranks):
    """A run is killed after a checkpoint and resumed; beside it, one is left alone.

    Both must write the same student, and the same numbers to log.jsonl, bit for bit. They lie in
    folder/killed and folder/whole. The second is the oracle, and its folder is what comes back.
    """
    killed, whole = folder / "killed", folder / "whole"
    beside = Forked(script, [*flags, "--out", whole], ranks)
    run = Forked(script, [*flags, "--out", killed], ranks)
    while not list(killed.glob("checkpoints/step_*")) and run.running():
        time.sleep(0.01)
    run.kill()
    assert not list(killed.glob("student/*")), "it had time to end"

    leave_litter(killed)
    beside.finish()
    resumed = Forked(script, [*flags, "--out", killed, "--resume"], ranks)
    resumed.finish()

    for path in (whole / "student").iterdir():
        same_file = killed / "student" / path.name
        assert path.read_bytes() == same_file.read_bytes()

    rows, rows_resumed = read_log(whole), read_log(killed)
    steps = [row["step"] for row in rows_resumed]
    assert steps == [*range(1, len(rows) + 1)]
    for row, other in zip(rows, rows_resumed, strict=True):
        assert without_times(row) == without_times(other)
    return whole


def without_times(row):
    """A row of log.jsonl, less what no two runs have in common.

    These are how long the update took, and the memory that it needed.
    """
    unlike = ("sec", "samples_per_s", "mem_gib")
    return {k: v for k, v in row.items() if k not in unlike}


def leave_litter(run):
    """What a kill may leave, and what a user may add: none of it counts.

    A kill leaves half a row in the log, and a checkpoint that was not renamed yet. A user may copy
    a checkpoint beside the others, and must not find the copy loaded or removed.
    """
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 1')
    for name in ("unfinished_99", "step_99.good", "step_98_1"):
        (run / "checkpoints" / name).mkdir()


def read_log(run):
    """The rows of a run's log.jsonl, as dicts.

    Every row must be whole: half a row that a kill has left ends in an error.
    """
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def picture(path):
    """An image of PIL."""
    return Image.open(path)


def pictures(folder, count=5):
    """A folder of random images of unlike sizes, with metadata.jsonl {file_name, text}.

    They are the same in each call. Each is 100 pixels high, and from 85 to 125 wide, so that a
    script has to cut them to one size.
    """
    random_pixels = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for i in range(count):
        pixels = random_pixels.integers(
            0,
            256,
            (100, 85 + 10 * i, 3),
            dtype="uint8",
        )
        Image.fromarray(pixels).save(folder / f"{i}.png")
        row = dict(file_name=f"{i}.png", text=f"noise number {i}")
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def wans_guess(net, code=None):
    """The velocity (2, 16, 3, 4, 4) that Wan's transformer sees in latents, the same in each call.

    code is of an exit; None for a transformer that may never have heard of exits.
    """
    from parts import wan_net

    numbers = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 16, 3, 4, 4, generator=numbers)
    text = torch.randn(2, 8, 32, generator=numbers)
    t = torch.tensor([0.3, 0.7])
    dtype = net.patch_embedding.weight.dtype
    with wan_net.told(net, code):
        return net(x_t.to(dtype), 1000 * t, text.to(dtype)).sample


def same_weights(net, other):
    """Have two networks the same weights, by the same names?"""
    ours, theirs = net.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(v.equal(theirs[k]) for k, v in ours.items())
