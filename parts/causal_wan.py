"""Wan2.1's transformer made causal: a student that makes a video block by block, as a stream.

    net = make_causal(net)  # diffusers' WanTransformer3DModel
    for made in stream(net, denoise, noises, conds, levels, window=12, sink=3):  # to sample
        show(made.x)
    made = rollout(net, denoise, z, c, levels, block=3, window=12, sink=3, u=u)  # to train

Each block of latent frames is denoised in a few steps. Attention sees the frames before it by keys
and values in a cache, which a clean pass (t = 0) of each finished block fills (Self-Forcing,
arXiv 2506.08009, Alg. 1). It sees `window` frames in all: the first ones, `sink` of them, the last
ones, and the block's own (LongLive, arXiv 2509.22622). `denoise` is an amd.Denoiser that calls net
once.

Diffusers' own network becomes causal by three hooks: its rope starts at the block's first frame, a
hook before each layer hands it its own keys and values, and a processor of self-attention reads
them. All of it travels as rotary_emb, an argument of each layer. So a layer that is computed again
for its gradient gets what it got at first, and layers may be compiled and sharded one by one.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amd
import running


# ---------------------------------------------------------------------------------------- the cache
class Cache:
    """Keys and values of the frames that a block may see, for each layer, of static size.

    A frame f of the sink has slot f. The other frames take turns in the slots after it, from the
    frame `origin` on. Attention does not care for the order of keys, since rope's angles are in
    them, so nothing is ever moved, and a full window is read without a copy.

    The tensors of a layer are made when it is first called, of the type of its input: that is the
    type of what the patches' convolution made, so autocast's, too. Only calls without gradient
    write to them.
    """

    def __init__(self, window: int, sink: int):
        self.window = window
        self.sink = sink
        self.origin = sink
        self.layers = {}

    def slots(self, start: int, count: int, device: torch.device) -> Tensor:
        """The slots (count,) of the frames from start on, without a copy from the CPU."""
        frames = torch.arange(start, start + count, device=device)
        turns = self.sink + (frames - self.origin) % (self.window - self.sink)
        return torch.where(frames < self.sink, frames, turns)

    def filled(self, end: int) -> int:
        """The number of slots in use, always the first ones, once frames before `end` are there."""
        return min(self.sink + end - self.origin, self.window)

    def forget(self, end: int) -> int:
        """Empty all slots but those of the sink, in which frames up to `end` are to be read anew.

        -> the first of these frames.
        """
        self.origin = max(self.sink, end - (self.window - self.sink))
        return self.origin

    def layer(self, i: int, like: Tensor, tokens: int, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, window * tokens, heads, dim) of layer i, with these tokens a frame.

        like (B, any, heads * dim) is what the layer is called with.
        """
        if i not in self.layers:
            shape = (len(like), self.window * tokens, heads, like.shape[2] // heads)
            self.layers[i] = (like.new_empty(shape), like.new_empty(shape))
        return self.layers[i]

    def clear(self) -> None:
        """Drop all tensors."""
        self.layers.clear()


# ---------------------------------------------------------------------------------- the three hooks
class Angles(nn.Module):
    """In place of a network's rope: the angles of a block, and all else that layers need for it.

    `place` is its cache and its first frame; see `placed`. A call makes rotary_emb: cos, sin, the
    cache, the tokens of a frame, the block's own rows of the cache (a tensor, whose values do not
    recompile a layer), and the number of rows that are seen. ValueError: the network is called by
    itself, or a frame lies beyond those that rope knows.
    """

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope
        self.place = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Cache, int, Tensor, int]:
        running.require(self.place, "this network is causal: call it by stream or rollout")
        cache, start = self.place
        count = x.shape[2]
        cos, sin = angles_from(self.rope, start, x)
        tokens = cos.shape[1] // count
        slots = cache.slots(start, count, x.device)
        rows = tokens * slots[:, None] + torch.arange(tokens, device=x.device)
        return cos, sin, cache, tokens, rows.flatten(), tokens * cache.filled(start + count)


def angles_from(rope: nn.Module, start: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, tokens, 1, dim) of rope for a block x, whose first frame is start."""
    end = start + x.shape[2]
    running.require(
        end <= rope.max_seq_len,
        f"frame {end} of a stream: this network's rope knows {rope.max_seq_len}, so stop there",
    )
    moved = {}
    for name, angles in rope.named_buffers():
        of_time, of_space = angles.tensor_split([rope.t_dim], dim=1)
        moved[name] = torch.cat([of_time.roll(-start, 0), of_space], 1)
    return torch.func.functional_call(rope, moved, (x,))


def own_layer(i: int, block: nn.Module, args: tuple) -> tuple:
    """A hook before layer i, outside what is compiled of it: of the cache it gets its own part.

    Layers are then called alike, and so they share their programs.
    """
    x, text, time, (cos, sin, cache, tokens, rows, seen) = args
    keys, values = cache.layer(i, x, tokens, block.attn1.heads)
    return x, text, time, (cos, sin, keys, values, rows, seen)


def attend(attn: nn.Module, x: Tensor, _text: None, _mask: None, place: tuple) -> Tensor:
    """Self-attention's processor: tokens x (B, N, width) see their block and the cached frames.

    The cache is written in place where there is no gradient. Where there is, it stays as it is, and
    no gradient goes into it: a layer that is computed again must find what it found at first.
    """
    cos, sin, keys, values, rows, seen = place
    q = attn.norm_q(attn.to_q(x)).unflatten(2, (attn.heads, -1))
    k = attn.norm_k(attn.to_k(x)).unflatten(2, (attn.heads, -1))
    v = attn.to_v(x).unflatten(2, (attn.heads, -1))
    q = rotate(q, cos, sin).type_as(v)
    k = rotate(k, cos, sin).type_as(v)

    if torch.is_grad_enabled():
        k = keys[:, :seen].index_copy(1, rows, k)
        v = values[:, :seen].index_copy(1, rows, v)
    else:
        # the whole cache is written, then cut: the other way round inductor copies it
        k = keys.index_copy_(1, rows, k)[:, :seen]
        v = values.index_copy_(1, rows, v)[:, :seen]

    h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    h = h.transpose(1, 2).flatten(2)
    for layer in attn.to_out:
        h = layer(h)
    return h


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbours in x (B, tokens, heads, dim) by angles (1, tokens, 1, dim).

    Numbers are real, for complex ones do not compile, and of the wider type of x and angles.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos = cos[..., 0::2]
    sin = sin[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def make_causal(net: nn.Module) -> nn.Module:
    """Make diffusers' WanTransformer3DModel causal, in place -> net.

    Its weights keep their names. Do it once, before layers are compiled or sharded. From then on
    only `stream` and `rollout` can call it. ValueError: it takes several frames to a token.
    """
    running.require(
        net.config.patch_size[0] == 1, "a token of this network spans several frames: take a Wan2.1"
    )
    net.rope = Angles(net.rope)
    for i, block in enumerate(net.blocks):
        block.attn1.set_processor(attend)
        block.register_forward_pre_hook(partial(own_layer, i))
    return net


@contextlib.contextmanager
def placed(net: nn.Module, cache: Cache, start: int) -> Iterator[None]:
    """A context in which net's calls are for the block from frame start on, with its cache."""
    net.rope.place = (cache, start)
    try:
        yield
    finally:
        net.rope.place = None


# ----------------------------------------------------------------------------------------- sampling
def stream(
    net: nn.Module,
    denoise: amd.Denoiser,
    noises: Iterable[Tensor],
    conds: Iterable[amd.Condition],
    levels: Sequence[float],
    window: int,
    sink: int,
    u: float = 1.0,
) -> Iterator[amd.Exit]:
    """Make blocks of noise (B, 16, n, h, w), each with its condition, one after the other -> exits.

    Each is made by amd.backward_simulation down the levels, to the exit that u picks, never with
    a graph. An exit's `again` is for `rollout`: by itself it has no place in a stream.

    A condition that is another object than the last one is a new prompt, for which the cache is
    made again (LongLive's recache, with its global sink): the sink's states stay, and the other
    frames that it holds, window - sink of them, are read anew, block by block in their order.

    The cache lives while the stream is iterated. To stop early, let go of the iterator, or close
    it. Layers that are compiled have a program for each number of frames that a block may see:
    window / n of them, whatever the length. ValueError: window < sink + n, noises and conditions
    differ in number, or there are more frames than rope knows.
    """
    cache = Cache(window, sink)
    recent = []  # the first frame and x of each block that has frames in the cache
    prompt = None
    start = 0
    try:
        for z, c in zip(noises, conds, strict=True):
            n = z.shape[2]
            running.require(
                sink >= 0 and window >= sink + n,
                f"a window of {window} frames: choose {sink + n} or more, for sink and block",
            )

            if recent:
                # The block before, whose clean pass waited until it was known that one follows. At
                # a new prompt only frames of the sink are still read under the old one.
                last, x = recent[-1]
                if c is prompt or last < sink:
                    read_clean(net, denoise, cache, last, x, prompt)
                if c is not prompt:
                    read_anew(net, denoise, cache, recent, c)

            with torch.no_grad(), placed(net, cache, start):
                made = amd.backward_simulation(denoise, z, c, levels, u)
            yield made

            recent.append((start, made.x))
            prompt = c
            start += n
            recent = [(i, x) for i, x in recent if i + x.shape[2] > start - (window - sink)]
    finally:
        cache.clear()


@torch.no_grad()
def read_clean(
    net: nn.Module,
    denoise: amd.Denoiser,
    cache: Cache,
    start: int,
    x: Tensor,
    c: amd.Condition,
) -> None:
    """Read clean frames x (B, 16, n, h, w), from start on, for their keys and values.

    They take the place of what noisy calls have left in their slots.
    """
    with placed(net, cache, start):
        denoise(x, x.new_zeros(len(x)), c)


def read_anew(
    net: nn.Module,
    denoise: amd.Denoiser,
    cache: Cache,
    blocks: list[tuple[int, Tensor]],
    c: amd.Condition,
) -> None:
    """Read the cache's frames again under another condition, but for the sink's.

    blocks has the first frame and x of each block that has frames there. The cache forgets them at
    first, so a block sees the sink and what was read before it, but no state of the old condition.
    """
    last, x = blocks[-1]
    first = cache.forget(last + x.shape[2])
    for start, x in blocks:
        gone = max(0, first - start)  # frames of the sink, or of no slot any more
        if gone < x.shape[2]:
            read_clean(net, denoise, cache, start + gone, x[:, :, gone:], c)


# ----------------------------------------------------------------------------------------- training
def rollout(
    net: nn.Module,
    denoise: amd.Denoiser,
    z: Tensor,
    c: amd.Condition,
    levels: Sequence[float],
    block: int,
    window: int,
    sink: int,
    u: float,
) -> amd.Exit:
    """Stream noise z (B, 16, F, h, w), in blocks of so many frames -> the whole x, for training.

    All blocks have the exit that u picks, and only their exits' calls carry gradient, not what is
    cached (Self-Forcing). x is made without a graph, whatever the grad mode. Where gradients are
    enabled, and by Exit.again, it comes with a node that makes the graph in the backward pass,
    block by block: it streams x once more, with a fresh cache, calls each block's exit again, goes
    backward through that call alone, and drops its graph.

    So there is only ever one block's graph, whatever the length, and nothing is held between the
    two passes: in a single graph of all blocks, keys and values of 21 frames alone take 5.6 GiB
    with the 1.3B. The backward pass has one more exit's call and one more clean pass a block, and
    Exit.again has none.

    Gradients are added to the .grad of parameters, as loss.backward() does. torch.autograd.grad
    with respect to parameters does not see through the node, and z and c get no gradient. Weights
    must not change before the backward pass. ValueError: block does not divide F, and see `stream`.
    """
    running.require(
        z.shape[2] % block == 0,
        f"{z.shape[2]} latent frames in blocks of {block}: choose a multiple of it",
    )
    noises = z.split(block, 2)
    conds = [c] * len(noises)
    made = list(stream(net, denoise, noises, conds, levels, window, sink, u))
    x = torch.cat([part.x for part in made], 2)

    def go_backward(grad: Tensor) -> None:
        replay(net, denoise, made, c, Cache(window, sink), grad)

    def again() -> Tensor:
        return Replayed.apply(x.detach().requires_grad_(), go_backward)

    return amd.Exit(again(), made[0].t_G, again, made[0].number)


class Replayed(torch.autograd.Function):
    """x as it is. Its backward pass is go_backward(grad), with grad at x, and nothing else.

    On a GPU it runs in a thread of autograd's own. Settings of torch, such as the limit on programs
    of torch.compile, are context variables, which that thread would not have.
    """

    @staticmethod
    def forward(ctx, x, go_backward):
        ctx.go_backward = go_backward
        ctx.settings = contextvars.copy_context()
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        ctx.settings.run(ctx.go_backward, grad)
        return None, None


def replay(
    net: nn.Module,
    denoise: amd.Denoiser,
    made: list[amd.Exit],
    c: amd.Condition,
    cache: Cache,
    grad: Tensor,
) -> None:
    """Add to the parameters' gradients those of a stream's exits, made of it.

    grad is that at the whole x (B, 16, F, h, w). The cache is empty at first. Each exit's call
    finds it as it was in the stream, because one that has a gradient does not write to it, and the
    clean pass of each block follows.
    """
    n = made[0].x.shape[2]
    starts = range(0, grad.shape[2], n)
    try:
        for start, part, grad_part in zip(starts, made, grad.split(n, 2), strict=True):
            with torch.enable_grad(), placed(net, cache, start):
                torch.autograd.backward(part.again(), grad_part)
            if part is not made[-1]:
                read_clean(net, denoise, cache, start, part.x, c)
    finally:
        cache.clear()
