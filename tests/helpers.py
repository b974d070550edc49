"""What several test files share: real processes, a run that is killed, pictures."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def launch(script, *arguments, ranks=1):
    """Start a script, under torchrun if there are several ranks -> the process."""
    command = [sys.executable]
    if ranks > 1:
        port = random.randint(20_000, 40_000)
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += [f"--master-port={port}"]
    command += [str(ROOT / script), *map(str, arguments)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process):
    """Wait for a process that must end well -> what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def kill(process, ranks):
    """kill -9: the process, or torchrun's workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children if ranks > 1 else [process.pid]:
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()


def run_main(script, arguments):
    """main(parse(arguments)) of a script in this process, which spares its imports."""
    torch.set_num_threads(1)  # as launch does, for the same rounding
    lib = __import__(script)
    return lib.main(lib.parse([str(v) for v in arguments]))


def survive(folder, script, flags, ranks):
    """A run is killed after a checkpoint and resumed; beside it, one is left alone.

    Both must write the same student, and the same numbers to log.jsonl, bit for bit. They lie in
    folder/killed and folder/whole.
    """
    killed, whole = folder / "killed", folder / "whole"
    process = launch(f"{script}.py", *flags, "--out", killed, ranks=ranks)
    beside = launch(f"{script}.py", *flags, "--out", whole, ranks=ranks) if ranks > 1 else None
    while not list(killed.glob("checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.01)
    kill(process, ranks)
    assert not list(killed.glob("student/*")), "it had time to end"

    leave_litter(killed)
    if ranks > 1:
        finish(beside)
        finish(launch(f"{script}.py", *flags, "--out", killed, "--resume", ranks=ranks))
    else:
        run_main(script, [*flags, "--out", whole])
        run_main(script, [*flags, "--out", killed, "--resume"])

    for path in (whole / "student").iterdir():
        assert path.read_bytes() == (killed / "student" / path.name).read_bytes()
    rows, resumed = read_log(whole), read_log(killed)
    assert [row["step"] for row in resumed] == [*range(1, len(rows) + 1)]
    timed = {"sec", "samples_per_s", "mem_gib"}
    for row, other in zip(rows, resumed, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }
    return whole


def leave_litter(run):
    """What a kill may leave, and what a user may add: none of it counts."""
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 1')
    (run / "checkpoints/unfinished_99").mkdir()
    (run / "checkpoints/step_99.good").mkdir()
    (run / "checkpoints/step_98_1").mkdir()


def read_log(run):
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def picture(path):
    """An image of PIL."""
    return Image.open(path)


def pictures(folder, count=5):
    """A folder of random images of unlike sizes, with metadata.jsonl {file_name, text}."""
    random_pixels = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for i in range(count):
        pixels = random_pixels.integers(0, 256, (100, 85 + 10 * i, 3), dtype="uint8")
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(json.dumps(dict(file_name=f"{i}.png", text=f"noise number {i}")))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
