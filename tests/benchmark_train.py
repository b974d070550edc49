"""What amd.train costs beside the bare calls of its networks: python tests/benchmark_train.py.

The networks are perceptrons whose forward pass takes some 10 ms. The bare loop calls them just as
often as an update of AMD must, with the same backward passes, clipping and optimizers, and does
nothing else. Both take turns, so that a noisy machine hits both alike; the ratio of medians is
printed.
"""

import argparse
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import amd

FAKE_STEPS = 5


class Perceptron(nn.Module):
    """A velocity network of (B, 64).

    Student, fake and real teacher are three of one width, so a call of any costs the same.
    """

    def __init__(self, width):
        super().__init__()
        sizes = [65, width, width, width, 64]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x_t, t, _c):
        h = torch.cat([x_t, t[:, None]], 1)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        return self.layers[-1](h)


class Bare:
    """The least that an update of AMD calls, on inputs that stay the same.

    It draws no noise, asks no reward and computes none of the paper's formulas: what `train` takes
    beyond it is the price of those.
    """

    def __init__(self, nets, opts, batch):
        self.student, self.fake, self.real = nets
        self.opts = opts
        self.x = torch.randn(batch, 64)
        self.t = torch.full((batch,), 0.5)

    def update(self):
        """One student update, which is FAKE_STEPS of the fake.

        The student has its turn in the first of them. There the real teacher is asked too, for the
        condition and the empty one at once, and the student's sample has a graph.
        """
        for i in range(FAKE_STEPS):
            student_turn = i == 0
            with torch.set_grad_enabled(student_turn):
                x = self.student(self.x, self.t, None)
            self.fake(self.x, self.t, None).square().mean().backward()
            if student_turn:
                self.ask_real()
                x.square().mean().backward()
            self.step(self.opts if student_turn else self.opts[1:])

    @torch.no_grad()
    def ask_real(self):
        """One call of twice the batch, which is what guidance needs."""
        self.real(
            torch.cat([self.x] * 2),
            torch.cat([self.t] * 2),
            None,
        )

    def step(self, opts):
        """Clip and step each optimizer, as amd.update does."""
        for opt in opts:
            params = opt.param_groups[0]["params"]
            nn.utils.clip_grad_norm_(params, 10.0)
            opt.step()
            opt.zero_grad()


def seconds(call):
    """How long a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def updates_of_train(nets, opts, batch):
    """amd.train on the same networks and optimizers: a generator, with one update a next().

    It has all parts of AMD, with groups of eight samples and a reward that costs next to nothing.
    """
    G, fake, real = map(amd.x0_from_flow, nets)

    def student(c, u):
        z = torch.randn(len(c), 64)
        return amd.backward_simulation(G, z, c, [1.0], u)

    return amd.train(
        amd.method("amd"),
        student,
        real,
        fake,
        lambda _n, _j: torch.arange(batch) // 8,
        *opts,
        reward=lambda x, c: x.sum(1) + c,
        null=lambda c: 0 * c,
        w=2.0,
        fake_steps=FAKE_STEPS,
    )


def main():
    """Measure by turns, and print the medians.

    The forward pass is printed too: the ratio means little where a pass takes no time.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--width",
        type=int,
        default=1152,
        help="of the perceptrons (1152)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=256,
        help="samples of an update (256)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=30,
        help="updates of each kind (30)",
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    nets = [Perceptron(args.width) for _ in range(3)]
    nets[2].requires_grad_(False)
    opts = [torch.optim.AdamW(net.parameters(), 1e-5, fused=True) for net in nets[:2]]
    bare = Bare(nets, opts, args.batch)
    updates = updates_of_train(nets, opts, args.batch)

    for _ in range(3):  # to warm up
        bare.update()
        next(updates)
    with torch.no_grad():
        forward = [seconds(lambda: nets[2](bare.x, bare.t, None)) for _ in range(20)]
    rounds = [(seconds(bare.update), seconds(lambda: next(updates))) for _ in range(args.rounds)]

    bare_s, train_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"forward {1000 * statistics.median(forward):.1f} ms; update: bare {1000 * bare_s:.1f} ms,"
        f" train {1000 * train_s:.1f} ms, ratio {train_s / bare_s:.3f}"
    )


if __name__ == "__main__":
    main()
