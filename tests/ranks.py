"""What test_running.py has two processes do: torchrun ... ranks.py FOLDER.

FOLDER is where they leave what they have made. test_running.py has the oracle for each part: most
often the same on one process. All is one launch, because two ranks take long to start.
"""

import contextlib
import io
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402, the path comes first

import amd  # noqa: E402
import running  # noqa: E402
from test_amd import Setting, clipped_step, hashed, lively  # noqa: E402


def shard_all(net):
    """Shard a network of test_amd.py over the ranks by FSDP2, its first layer as a block.

    It keeps float64, so that sharded weights can be held against whole ones to 1e-9.
    """
    return running.shard(net, [net.body], dtype=None)


KINDS = {
    "plain": lambda net: net,  # whole on each rank
    "sharded": shard_all,
}


def save(value, path):
    """Write what all ranks have in common, which rank 0 alone may do."""
    if running.ranks().rank == 0:
        torch.save(value, path)


def methods(folder):
    """NAME_KIND_AWARE.pt: weights and log after two updates of a row of Table 1.

    They are made in two micro-batches a rank, plain and sharded. The noise is `hashed`: that of a
    sample is the same on any rank, so the oracle, one process with one batch, has it too.
    """
    torch.randn_like = hashed
    torch.rand_like = hashed
    for kind, shard in KINDS.items():
        for name in amd.METHODS:
            for aware in (False, True):
                it = Setting(
                    ranks=running.ranks(),
                    accum=2,
                    shard=shard,
                )
                log = it.run(
                    lively(name),
                    2,
                    K=8,
                    update=running.update,
                    aware=it.aware if aware else None,
                )[-1]
                numbers = {k: float(v) for k, v in log.items()}
                end = dict(weights=it.weights(), log=numbers)
                save(end, folder / f"{name}_{kind}_{aware}.pt")


def clipped(folder):
    """clipped_KIND.pt: a step of plain SGD whose clip is at work.

    The norm that is clipped must be that of all shards. A rank that saw its own shard alone would
    scale its gradients too little.
    """
    torch.randn_like = hashed
    for kind, shard in KINDS.items():
        it = Setting(ranks=running.ranks(), shard=shard)
        end = clipped_step(it, partial(running.update, clip=1e-2))
        save(end, folder / f"clipped_{kind}.pt")


def broken(folder):
    """broken_KIND.pt: for each rank, what it did when x was NaN on rank 1 alone, then nowhere.

    A row is of one rank: what was skipped in the first update, whether its weights were left as
    they were, and what was skipped when the second one had been done.
    """
    for kind, shard in KINDS.items():
        it = Setting(ranks=running.ranks(), shard=shard)
        before = it.weights()
        rollouts = []

        def student(c, u, it=it, rollouts=rollouts):
            rollouts.append(0)
            x, t_G, *_ = it.generate(c, u)
            bad = running.ranks().rank == 1 and len(rollouts) <= 2
            return (x * torch.nan if bad else x), t_G

        logs = it.train(
            amd.method("amd"),
            student=student,
            K=8,
            update=running.update,
        )
        first = next(logs)
        same = all(v.equal(before[k]) for k, v in it.weights().items())
        second = next(logs)

        told = torch.tensor([[first["skipped"], same, second["skipped"]]])
        save(running.gather(told), folder / f"broken_{kind}.pt")


def noise(folder):
    """noise.pt: what each rank draws from torch's generator in an update, a row for a rollout.

    Rows of one rank lie together, because gather puts ranks in order.
    """
    it = Setting(ranks=running.ranks())
    drawn = []

    def student(c, u):
        drawn.append(torch.rand(1, 3))
        return it.generate(c, u)

    it.run(
        amd.method("dmd"),
        1,
        student=student,
        K=8,
        update=running.update,
    )
    save(running.gather(torch.cat(drawn)), folder / "noise.pt")


def folders(folder):
    """told_RANK.txt: how a script ends, and what it says, if each rank has a disk of its own.

    So it is on machines without a shared one. open_run must raise a ValueError on both ranks, of
    which running.run makes an exit code and a line.
    """
    rank, told = running.ranks().rank, io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            running.run(lambda _: running.open_run(folder / f"disk_{rank}", {}), lambda: None)
    except SystemExit as end:
        (folder / f"told_{rank}.txt").write_text(f"{end.code} {told.getvalue()}")


def main(folder):
    """All of it, in an order in which `hashed` noise comes last."""
    folders(folder)
    noise(folder)
    broken(folder)
    clipped(folder)
    methods(folder)


if __name__ == "__main__":
    running.launch()
    running.run(lambda _: main(Path(sys.argv[1])), lambda: None)
