"""What test_running.py has two processes do: torchrun ... ranks.py TASK FOLDER."""

import os
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402, the path comes first

import amd  # noqa: E402
import running  # noqa: E402
from test_amd import Setting, clipped_step, hashed, lively  # noqa: E402


def methods(folder):
    """Three updates of each row of Table 1, in two micro-batches a rank, plain and sharded."""
    noise(folder)
    broken(folder)
    clipped(folder)
    torch.randn_like = hashed
    torch.rand_like = hashed
    for kind, shard in (("plain", lambda net: net), ("sharded", shard_all)):
        for name in amd.METHODS:
            for aware in (False, True):
                it = Setting(ranks=running.ranks(), accum=2, shard=shard)
                given = dict(K=8, update=running.update, aware=it.aware if aware else None)
                log = it.run(lively(name), 3, **given)[-1]
                end = dict(weights=it.weights(), log={k: float(v) for k, v in log.items()})
                if running.ranks().rank == 0:
                    torch.save(end, folder / f"{name}_{kind}_{aware}.pt")


def clipped(folder):
    """A step of plain SGD whose clip is at work: the norm must be that of all shards."""
    torch.randn_like = hashed
    for kind, shard in (("plain", lambda net: net), ("sharded", shard_all)):
        it = Setting(ranks=running.ranks(), shard=shard)
        end = clipped_step(it, partial(running.update, clip=1e-2))
        if running.ranks().rank == 0:
            torch.save(end, folder / f"clipped_{kind}.pt")


def broken(folder):
    """x is NaN on rank 1 alone, then nowhere: what each rank skipped, and whether weights moved."""
    for kind, shard in (("plain", lambda net: net), ("sharded", shard_all)):
        it = Setting(ranks=running.ranks(), shard=shard)
        before = it.weights()
        rollouts = []

        def student(c, u, it=it, rollouts=rollouts):
            rollouts.append(0)
            x, t_G, _ = it.generate(c, u)
            bad = running.ranks().rank == 1 and len(rollouts) <= 2
            return (x * torch.nan if bad else x), t_G

        logs = it.train(amd.method("amd"), student=student, K=8, update=running.update)
        first = next(logs)
        same = all(v.equal(before[k]) for k, v in it.weights().items())
        told = torch.tensor([[first["skipped"], same, next(logs)["skipped"]]])
        told = running.gather(told)
        if running.ranks().rank == 0:
            torch.save(told, folder / f"broken_{kind}.pt")


def shard_all(net):
    return running.shard(net, [net.body], dtype=None)


def noise(folder):
    """The noise that each rank draws in an update, gathered."""
    it = Setting(ranks=running.ranks())
    drawn = []

    def student(c, u):
        drawn.append(torch.rand(1, 3))
        return it.generate(c, u)

    it.run(amd.method("dmd"), 1, student=student, K=8, update=running.update)
    drawn = running.gather(torch.cat(drawn))
    if running.ranks().rank == 0:
        torch.save(drawn, folder / "noise.pt")


def folders(folder):
    """Each rank has a disk of its own, as machines without a shared one."""
    running.open_run(folder / f"disk_{running.ranks().rank}", dict(lr=1))


if __name__ == "__main__":
    task, out = sys.argv[1:]
    running.launch()
    running.run(lambda _: globals()[task](Path(out)), lambda: None)
    sys.stdout.flush()
    os._exit(0)
