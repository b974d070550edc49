"""parts/causal_wan.py: a stream by a cache, new prompts, gradients by replay, memory, programs.

The network is diffusers' own, tiny and with random weights, on a CPU. The oracle of most tests is
one pass of that network as it is, over all frames at once, with masks that say what each may see:
it has neither blocks nor a cache.
"""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.testing import assert_close

import amd
from parts import causal_wan

torch.set_num_threads(1)  # the networks are small

TOKENS = 4  # of a frame of 4 x 4 latents
WORDS = 5  # of a text
LEVELS = [1.0, 0.9375, 0.8333, 0.625]
LONGLIVE = dict(window=12, sink=3)


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


def tiny(causal=True):
    """The tiny transformer, causal or as diffusers has it.

    Its weights are always the same, and so large that no part of it is without effect.
    """
    net = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=32,
        num_layers=2,
        text_dim=32,
        freq_dim=16,
    )
    numbers = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data.normal_(0, 0.3, generator=numbers)
    net.eval()
    return causal_wan.make_causal(net) if causal else net


def denoiser(net):
    """An amd.Denoiser of a network of velocities, whose condition is a text (B, WORDS, 32)."""

    def velocity(x_t, t, text):
        return net(x_t, 1000 * t, text).sample

    return amd.x0_from_flow(velocity)


def streamed(net, noises, conds, levels, window, sink, u=1.0):
    """The exits of a stream."""
    return causal_wan.stream(net, denoiser(net), noises, conds, levels, window, sink, u)


def furthest(a, b):
    """The largest difference between two tensors."""
    return (a - b).abs().max()


# ------------------------------------------------------------------- 1. a stream is one masked pass
def masked_pass(net, x, where, t, sees, texts, prompts, cut=0):
    """x0_hat of all frames of x (B, 16, F, h, w), in one pass of diffusers' own transformer.

    Frame f stands at position where[f], is noisy by level t[f], attends to the frames sees[f] and
    to the text texts[prompts[f]] (B, WORDS, 32). No gradient goes into keys and values of the first
    `cut` frames. net is changed.
    """
    frames = range(len(t))
    words = torch.arange(len(texts) * WORDS) // WORDS
    mask = torch.tensor([[g in sees[f] for g in frames] for f in frames])
    mask = mask.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    text_mask = words == torch.tensor(prompts).repeat_interleave(TOKENS)[:, None]
    attend = net.blocks[0].attn1.processor
    angles_of = net.rope.forward

    def masked(attn, h, text, no_mask, angles):
        return attend(attn, h, text, mask, angles)

    def masked_text(attn, h, text, no_mask, angles):
        return attend(attn, h, text, text_mask, angles)

    def detached(layer, args, h):
        first, rest = h.tensor_split([cut * TOKENS], 1)
        return torch.cat([first.detach(), rest], 1)

    def angles_at_where(x):
        long_video = x.new_empty(1).expand(1, 1, max(where) + 1, *x.shape[3:])
        angles = [v.unflatten(1, (-1, TOKENS)) for v in angles_of(long_video)]
        return [v[:, where].flatten(1, 2) for v in angles]

    for block in net.blocks:
        block.attn1.set_processor(masked)
        block.attn2.set_processor(masked_text)
        block.attn1.norm_k.register_forward_hook(detached)
        block.attn1.to_v.register_forward_hook(detached)
    net.rope.forward = angles_at_where

    t = torch.tensor(t)
    levels = t.repeat_interleave(TOKENS).expand(len(x), -1)
    velocity = net(x, 1000 * levels, torch.cat([*texts], 1)).sample
    return x - t[:, None, None] * velocity


@dataclass
class Shape:
    """A stream of F frames in blocks of n, whose attention sees `window` frames, `sink` first."""

    n: int
    F: int
    window: int
    sink: int

    def start(self, f):
        """The first frame of the block in which frame f is."""
        return f // self.n * self.n

    def block(self, f):
        """The frames of the block in which frame f is."""
        return {*range(self.start(f), self.start(f) + self.n)}

    def reads(self, start):
        """The earlier frames that the block from `start` on may see.

        They are the first ones, and so many of the last as fill the window with the block.
        """
        sink = min(self.sink, start)
        last = self.window - self.sink - self.n
        return {*range(sink), *range(max(sink, start - last), start)}

    def one_pass(self, net, x, x_t, level, text, cut=0):
        """The frames that the stream must make of x_t, all at a level, if x came before each.

        Clean frames take part beside the noisy ones, and stand in for the cache: a noisy frame sees
        the noisy ones of its own block, and clean ones before it; a clean frame sees clean ones.
        See masked_pass.
        """
        frames = range(self.F)
        reads = [self.reads(self.start(f)) for f in frames]
        seen_by_clean = [reads[f] | self.block(f) for f in frames]
        seen_by_noisy = [reads[f] | {self.F + g for g in self.block(f)} for f in frames]
        made = masked_pass(
            net,
            torch.cat([x, x_t], 2),
            where=[*frames, *frames],
            t=[0.0] * self.F + [level] * self.F,
            sees=seen_by_clean + seen_by_noisy,
            texts=[text],
            prompts=[0] * 2 * self.F,
            cut=cut,
        )
        return made[:, :, self.F :]


SHAPES = {
    "as LongLive": Shape(n=3, F=15, window=9, sink=3),
    "frame by frame": Shape(n=1, F=6, window=3, sink=1),
    "no sink, all is seen": Shape(n=2, F=8, window=8, sink=0),
    "sink below a block": Shape(n=3, F=9, window=5, sink=2),
    "odd window": Shape(n=2, F=10, window=5, sink=1),
    "blocks cut by the window": Shape(n=2, F=12, window=6, sink=1),
}
LEVEL = 0.8  # the noise level from which these streams make each block, in one step


@dataclass
class Case:
    """A stream in one step, of two videos."""

    shape: Shape
    noise: Tensor  # (2, 16, F, 4, 4)
    texts: Tensor  # (2, 2, WORDS, 32): two prompts of two videos
    x: Tensor | None = None  # the stream under the first prompt
    want: Tensor | None = None  # what it must be, by `one_pass`

    def roll(self, turn=None, **changes):
        """The stream -> its frames (2, 16, F, 4, 4).

        From frame `turn` on it has the second prompt, if that is given. changes are other values of
        window and sink.
        """
        first, second = self.texts
        starts = range(0, self.shape.F, self.shape.n)
        conds = [first if turn is None or start < turn else second for start in starts]
        given = dict(window=self.shape.window, sink=self.shape.sink) | changes
        blocks = streamed(tiny(), self.noise.split(self.shape.n, 2), conds, [LEVEL], **given)
        return torch.cat([made.x for made in blocks], 2)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def case(request):
    """A stream of each shape, made once, before any test meddles with it."""
    shape = request.param
    torch.manual_seed(0)
    case = Case(shape, torch.randn(2, 16, shape.F, 4, 4), torch.randn(2, 2, WORDS, 32))
    with torch.no_grad():
        case.x = case.roll()
        case.want = shape.one_pass(tiny(causal=False), case.x, case.noise, LEVEL, case.texts[0])
    return case


def test_a_cached_stream_is_one_masked_pass(case):
    """A stream makes each block by itself, and sees the others by keys and values in a cache."""
    assert furthest(case.x, case.want) < 1e-5


@torch.no_grad()
def test_a_lost_sink_would_be_seen(case):
    """A stream that keeps no first frames is another one, if it had any to keep.

    Its window is as much shorter, so that it sees the same last frames.
    """
    lost = case.roll(window=case.shape.window - case.shape.sink, sink=0)
    assert (furthest(lost, case.want) > 1e-3) == (case.shape.sink > 0)


def begin_at_frame_0(monkeypatch, n):
    """Every block has the angles of the first one."""
    angles_from = causal_wan.angles_from
    monkeypatch.setattr(causal_wan, "angles_from", lambda rope, _, x: angles_from(rope, 0, x))


def leave_noise(monkeypatch, n):
    """The cache keeps what a noisy call has left, for there is no clean pass."""
    monkeypatch.setattr(causal_wan, "read_clean", lambda *given: None)


def forget_the_past(monkeypatch, n):
    """A block sees none but its own frames."""
    monkeypatch.setattr(causal_wan.Cache, "filled", lambda cache, end: n)
    monkeypatch.setattr(causal_wan.Cache, "slots", lambda cache, start, n, _: torch.arange(n))


def write_a_block_late(monkeypatch, n):
    """A block overwrites the one before it, and in its own slots there is an older one."""
    slots = causal_wan.Cache.slots

    def late(cache, start, count, device):
        return slots(cache, max(0, start - n), count, device)

    monkeypatch.setattr(causal_wan.Cache, "slots", late)


@pytest.mark.parametrize(
    "make", [begin_at_frame_0, leave_noise, forget_the_past, write_a_block_late]
)
@torch.no_grad()
def test_a_mistake_with_the_cache_would_be_seen(case, make, monkeypatch):
    """The oracle tells a stream from one with a mistake.

    If it did not, that a stream is as it says would prove nothing.
    """
    make(monkeypatch, case.shape.n)
    assert not furthest(case.roll(), case.want) < 1e-3  # or it is NaN, of a slot never written


@torch.no_grad()
def test_a_new_prompt_keeps_the_sink_and_reads_the_other_frames_anew(case):
    """The last two blocks have another prompt, under which the cache is made again (LongLive).

    The oracle has clean frames of two kinds: those before the turn, under the old prompt, and, all
    under the new one, those that the cache held at the turn and those after it. The sink keeps its
    old states. A frame that is read anew sees the sink, its own block, and others of these before.
    """
    shape = case.shape
    turn = shape.F - 2 * shape.n
    y = case.roll(turn)
    assert y[:, :, :turn].equal(case.x[:, :, :turn]), "what came before the turn has changed"

    sink = min(shape.sink, turn)
    held = max(sink, turn - (shape.window - shape.sink))  # the first of those that are read anew
    old = [("old", f) for f in range(turn)]
    new = [("new", f) for f in range(held, shape.F)]
    noisy = [("noisy", f) for f in range(turn, shape.F)]
    frames = old + new + noisy

    def state(g):
        """The frame that is cached for g after the turn."""
        return ("old" if g < sink else "new", g)

    def seen_by(kind, f):
        start = shape.start(f)
        if kind == "old":
            return {("old", g) for g in shape.reads(start) | shape.block(f)}
        if f < turn:
            own = {g for g in shape.block(f) if g >= held}
            return {state(g) for g in {*range(sink), *range(held, start)} | own}
        return {state(g) for g in shape.reads(start)} | {(kind, g) for g in shape.block(f)}

    want = masked_pass(
        tiny(causal=False),
        torch.cat([y[:, :, :turn], y[:, :, held:], case.noise[:, :, turn:]], 2),
        where=[f for _, f in frames],
        t=[LEVEL if kind == "noisy" else 0.0 for kind, _ in frames],
        sees=[{frames.index(g) for g in seen_by(*frame)} for frame in frames],
        texts=case.texts,
        prompts=[0 if kind == "old" else 1 for kind, _ in frames],
    )
    assert furthest(y[:, :, turn:], want[:, :, -2 * shape.n :]) < 1e-5
    assert furthest(y[:, :, turn:], case.x[:, :, turn:]) > 1e-3, "the prompt has no effect"


# ------------------------------------------------------------------------ 2. gradients of a rollout
SHAPE = SHAPES["as LongLive"]
TEXT = torch.randn(2, WORDS, 32, generator=torch.Generator().manual_seed(2))


def roll(net, u=0.6, shape=SHAPE, spied=None):
    """A rollout of two videos in four steps, always of the same noise and TEXT.

    u = 0.6 is the third of the four exits. x_t and t of each call are added to the list `spied`.
    """
    denoise = denoiser(net)

    def spying(x_t, t, c):
        if spied is not None:
            spied.append((x_t, t[0].item()))
        return denoise(x_t, t, c)

    torch.manual_seed(3)
    z = torch.randn(2, 16, shape.F, 4, 4)
    size = (shape.n, shape.window, shape.sink)
    return causal_wan.rollout(net, spying, z, TEXT, LEVELS, *size, u)


def gradients(net):
    """All gradients of a network, in a row."""
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def gradient(net, **options):
    """The gradient in the weights of a loss of a rollout, sin x."""
    roll(net, **options).x.sin().sum().backward()
    return gradients(net)


@pytest.mark.parametrize("u, level", [(0.6, LEVELS[2]), (1.0, LEVELS[3])])
def test_the_gradient_of_a_rollout_is_that_of_one_masked_pass(u, level):
    """Only exits carry gradient: what is cached does not.

    In the oracle no gradient goes into keys and values of clean frames. It has one graph of all
    blocks, where the rollout has one of each after the other.
    """
    net, spied = tiny(), []
    made = roll(net, u, spied=spied)
    x_t = torch.cat([x_t for x_t, t in spied if abs(t - level) < 1e-6], 2)
    assert made.t_G == level
    assert made.number == LEVELS.index(level) + 1

    plain = tiny(causal=False)
    x = made.x.detach()
    want = SHAPE.one_pass(plain, x, x_t, level, TEXT, cut=SHAPE.F)
    assert furthest(x, want) < 1e-5

    weight = torch.randn_like(x)
    (weight * want).sum().backward()
    (weight * made.x).sum().backward()
    scale = gradients(plain).abs().max()
    assert scale > 1
    assert furthest(gradients(net), gradients(plain)) < 1e-6 * scale


def test_the_exit_again_is_the_same_x_with_the_same_gradient():
    """It is what amd.train asks of an exit that was made without a graph.

    It costs no call of the network before the backward pass, and there one of each block, and the
    clean passes.
    """
    net = tiny()
    want = gradient(net)
    net.zero_grad()
    with torch.no_grad():
        made = roll(net)
    assert not made.x.requires_grad

    calls = []
    net.register_forward_pre_hook(lambda *given: calls.append(given))
    x = made.again()
    assert x.equal(made.x)
    assert not calls
    x.sin().sum().backward()
    assert len(calls) == 5 + 4
    assert gradients(net).equal(want)


def test_x_may_serve_two_losses_and_again_and_again():
    """Gradients add up, in one backward pass or in several; a graph that is not used does nothing.

    The gradient of a loss at x itself makes no graph.
    """
    net = tiny()
    want = gradient(net)
    net.zero_grad()

    made = roll(net)
    torch.autograd.grad(made.x.sin().sum(), made.x)
    assert all(p.grad is None for p in net.parameters())

    (made.x.sin() / 2 + made.x.sin() / 4).sum().backward()
    (made.x.sin() / 4).sum().backward()
    assert_close(gradients(net), want, rtol=1e-5, atol=1e-5)
    made.again().sin().sum().backward()
    assert_close(gradients(net), 2 * want, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_has_the_settings_of_the_rollout():
    """On a GPU it runs in another thread, for which torch's settings are at their defaults.

    There layers compile for the first time with a gradient, and the default limit on the number of
    programs is 8.
    """
    net = tiny()
    with torch._dynamo.config.patch(recompile_limit=77):
        made = roll(net)

    limits = []
    net.register_forward_pre_hook(
        lambda *given: limits.append(torch._dynamo.config.recompile_limit)
    )
    with ThreadPoolExecutor(1) as another_thread:
        another_thread.submit(made.x.sum().backward).result()
    assert limits == [77] * 9, "five exits and four clean passes"


def compile_counted(net):
    """Compile each layer, as the scripts do, but to an error where it does not compile whole.

    -> a list, to which each program that is made is added.
    """
    torch._dynamo.reset()
    programs = []

    def backend(program, example):
        programs.append(program)
        return program.forward

    for block in net.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
    return programs


def test_gradients_of_recomputed_layers_are_the_same():
    """A layer that is computed again, for its gradient, sees the cache that it saw at first."""
    want = gradient(tiny())
    recomputed = tiny()
    recomputed.enable_gradient_checkpointing()
    assert want.abs().max() > 1
    assert_close(gradient(recomputed), want, rtol=1e-6, atol=1e-6)


def test_a_stream_of_any_length_has_four_programs_and_training_four_more():
    """A window of 12 frames is full after four blocks of 3; then nothing new is compiled.

    Layers compile whole and share their programs. These are what the layers are: gradients are the
    same, of layers that are recomputed, too.
    """
    net = tiny()
    net.enable_gradient_checkpointing()
    programs = compile_counted(net)

    def compiled_for(conds):
        noises = torch.randn(2, 16, 3 * len(conds), 4, 4).split(3, 2)
        for _ in streamed(net, noises, conds, LEVELS, **LONGLIVE):
            pass
        return len(programs)

    assert compiled_for([TEXT] * 8) == 4
    assert compiled_for([TEXT] * 20) == 4
    assert compiled_for([TEXT, TEXT.clone()] * 4) == 4, "a new prompt compiles nothing"

    shape = Shape(n=3, F=15, **LONGLIVE)
    got = gradient(net, shape=shape)
    assert len(programs) == 8
    assert_close(got, gradient(tiny(), shape=shape), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------ 3. memory, failures
@pytest.fixture
def few_objects():
    """Hide from gc what is alive before a test, for it would look at all libraries each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def caches():
    """The keys and values of whole windows that are alive, of any layer."""
    gc.collect()
    windows = [v for v in gc.get_objects() if type(v) is Tensor and v.ndim == 4]
    return [v for v in windows if v.shape[2:] == (2, 12) and v.shape[1] % (3 * TOKENS) == 0]


def bytes_alive():
    """The bytes of all tensors that are alive.

    Tensors that share a storage count once.
    """
    tensors = [v for v in gc.get_objects() if type(v) is Tensor]
    storages = [v.untyped_storage() for v in tensors]
    return sum({v.data_ptr(): v.nbytes() for v in storages}.values())


@torch.no_grad()
def test_a_long_stream_takes_constant_memory(few_objects):
    """The cache has its size from the first block on; beside it are frames of one window.

    Three blocks of three frames fill a window of nine, and nine blocks are made.
    """
    noises = torch.randn(1, 16, 27, 4, 4).split(3, 2)
    conds = [torch.randn(1, WORDS, 32)] * 9
    held, cached = [], []
    for _ in streamed(tiny(), noises, conds, LEVELS, window=9, sink=3):
        cached.append(len(caches()))
        held.append(bytes_alive())
    assert cached == [4] * 9, "keys and values of two layers"
    assert len({*held[3:]}) == 1


class Saved:
    """A tensor that a graph has saved."""

    def __init__(self, v):
        self.v = v


@pytest.mark.parametrize("recomputed", [False, True])
def test_only_one_blocks_graph_is_ever_alive(recomputed, few_objects):
    """Three blocks fill the window, and then each one's graph is as large as the last one's.

    So the most that is saved at a time is the same for three and for nine, and before the backward
    pass there is nothing, neither a graph nor a cache.
    """
    net = tiny()
    if recomputed:
        net.enable_gradient_checkpointing()
    alive = weakref.WeakSet()
    most = []

    def save(v):
        saved = Saved(v)
        alive.add(saved)
        most[-1] = max(most[-1], sum(saved.v.nbytes for saved in alive))
        return saved

    for blocks in (3, 9):
        shape = Shape(n=3, F=3 * blocks, window=9, sink=3)
        most.append(0)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.v):
            made = roll(net, shape=shape)
            assert not alive
            assert not caches()
            made.x.backward(torch.ones_like(made.x))
        assert not alive
        assert not caches()
    assert most[0] == most[1] > 0


def test_a_stream_that_stops_early_drops_its_cache(few_objects):
    """It does when its iterator is gone, or closed."""
    net = tiny()
    noises = torch.randn(1, 16, 12, 4, 4).split(3, 2)
    conds = [torch.randn(1, WORDS, 32)] * 4
    for _ in streamed(net, noises, conds, LEVELS, **LONGLIVE):
        assert caches()
        break
    assert not caches()

    blocks = streamed(net, noises, conds, LEVELS, **LONGLIVE)
    next(blocks)
    next(blocks)
    assert caches()
    blocks.close()
    assert not caches()


@pytest.mark.parametrize("working", [0, 6, 22])
def test_a_network_that_fails_leaves_nothing_behind_and_works_again(working, few_objects):
    """It fails in its second layer, in its first call, the second block, or the backward pass.

    A rollout of five blocks is 19 calls: three down to the exit of each, and four clean passes.
    """
    net = tiny()
    want = gradient(net)
    net.zero_grad()
    calls = []

    def fail(*given):
        calls.append(None)
        if len(calls) > working:
            raise RuntimeError("out of luck")

    hook = net.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        gradient(net)
    assert len(calls) == working + 1
    assert net.rope.place is None
    assert len(caches()) == 2, "those of the layer that failed, in the traceback"
    del caught
    assert not caches()
    hook.remove()

    net.zero_grad()
    assert gradient(net).equal(want)


def test_a_stream_never_has_a_graph():
    """Whatever the grad mode is, which it leaves as it was."""
    net = tiny()
    blocks = streamed(net, [torch.randn(1, 16, 3, 4, 4)], [torch.randn(1, WORDS, 32)], [1.0], 6, 0)
    assert not next(blocks).x.requires_grad
    assert torch.is_grad_enabled()


# -------------------------------------------------------------------------- 4. types, and bad input
@pytest.mark.parametrize(
    "weights, autocast, cached, close",
    [
        (torch.float32, False, torch.float32, 1e-6),
        (torch.float64, False, torch.float64, 1e-5),
        (torch.float32, True, torch.bfloat16, 0.2),
        (torch.bfloat16, True, torch.bfloat16, 0.2),
    ],
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own, of RMSNorm under autocast
@torch.no_grad()
def test_the_cache_is_of_the_type_in_which_layers_compute(
    weights, autocast, cached, close, few_objects
):
    """That is the type of the weights, or autocast's.

    Guesses are of size 9, and so far apart as that type makes them.
    """
    noise, text = torch.randn(2, 16, 12, 4, 4), torch.randn(2, WORDS, 32)

    def frames(net, noise, text):
        blocks = streamed(net, noise.split(3, 2), [text] * 4, [LEVEL], window=9, sink=3)
        parts = []
        for made in blocks:
            types.update(v.dtype for v in caches())
            parts.append(made.x)
        return torch.cat(parts, 2)

    types = set()
    want = frames(tiny(), noise, text)
    types.clear()
    net = tiny()
    for p in net.parameters():
        p.data = p.data.to(weights)
    wide = weights if weights is torch.float64 else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = frames(net, noise.to(wide), text.to(wide))
    assert types == {cached}
    assert x.dtype == wide
    assert furthest(x, want) < close


def test_bad_input_says_what_is_wrong():
    """A message says what to do, so some words of it are enough here."""
    net = tiny()
    z, text = torch.randn(1, 16, 4, 4, 4), torch.randn(1, WORDS, 32)

    with pytest.raises(ValueError, match="in blocks of 3: choose a multiple"):
        causal_wan.rollout(net, denoiser(net), z, text, [1.0], 3, 6, 3, 1.0)
    with pytest.raises(ValueError, match="choose 5 or more"):
        next(streamed(net, [z], [text], [1.0], window=4, sink=1))
    with pytest.raises(ValueError, match="zip"):
        list(streamed(net, [z, z], [text], [1.0], window=6, sink=1))
    with pytest.raises(ValueError, match="is causal: call it by stream"):
        denoiser(net)(z, torch.ones(1), text)
    net.rope.rope.max_seq_len = 6
    with pytest.raises(ValueError, match="rope knows 6"):
        list(streamed(net, [z, z], [text, text], [1.0], window=6, sink=1))
