"""SiT, the class-conditional transformer on latents (arXiv 2401.08740), and the files it comes in.

    net = read_sit("SiT-XL-2-256x256.pt", "XL/2", side=32)  # or REPA's last.pt
    v = net(x, t, y)                                        # velocity noise - x, t = 0 is clean

Keys are those of SiT's files, so a state dict goes both ways without a map.
"""

import argparse
import re
import zipfile
from functools import partial
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {  # width, depth, heads
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "cifar10": (256, 12, 4),
    "digits": (64, 4, 4),
    "tiny": (32, 2, 2),
}
PATCHES = (2, 4, 8)


# -------------------------------------------------------------------------------------- the network
def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A LayerNorm without weights of its own, then scale and shift by the condition."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and an MLP, each scaled, shifted and gated by the condition (adaLN-zero)."""

    def __init__(self, dim: int, heads: int):
        from timm.models.vision_transformer import Attention, Mlp

        super().__init__()
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.mlp = Mlp(dim, 4 * dim, act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Tokens h (B, N, dim), condition c (B, dim) -> (B, N, dim)."""
        modulation = self.adaLN_modulation(c)[:, None]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, 2)
        h = h + gate * self.attn(modulate(h, shift, scale))
        return h + gate_mlp * self.mlp(modulate(h, shift_mlp, scale_mlp))


class SiT(nn.Module):
    """The velocity noise - x of x_t (B, channels, side, side) at t (B,), where t = 0 is clean.

    model        "size/patch", a size of SIZES and a patch of 2, 4 or 8 that divides side
    side         height and width of x, in latents or pixels
    classes      their number, and the label of no class
    learn_sigma  the layout of SiT's own files: twice the channels out, of which the second half is
                 unused, a time that is 1 where ours is 0, and a velocity of the other sign

    The weights are random; as in SiT, all gates and the output start at 0. ValueError: there is no
    such model, or its patch does not divide side.
    """

    def __init__(
        self,
        model: str = "XL/2",
        side: int = 32,
        channels: int = 4,
        classes: int = 1000,
        learn_sigma: bool = False,
    ):
        from timm.layers import PatchEmbed

        super().__init__()
        dim, depth, heads, patch = dimensions(model, side)
        self.channels = channels
        self.classes = classes
        self.patch = patch
        self.learn_sigma = learn_sigma

        # modules without a forward of their own, for the sake of the files' keys
        self.x_embedder = PatchEmbed(side, patch, channels, dim)
        self.register_buffer("pos_embed", positions(side // patch, dim))
        time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.t_embedder = nn.ModuleDict(dict(mlp=time_mlp))
        self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(classes + 1, dim)))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        out = patch**2 * channels * (2 if learn_sigma else 1)
        self.final_layer = nn.ModuleDict(
            dict(
                linear=nn.Linear(dim, out),
                adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)),
            )
        )
        self.exit_embedder = None
        for name, p in self.named_parameters():
            if "adaLN" in name or "final" in name:
                nn.init.zeros_(p)

    def tell_exits(self, count: int) -> "SiT":
        """Make this a fake teacher that can be told a sample's exit, one of count -> self.

        It adds a learned vector an exit to the embedding of t. They start at 0, so nothing changes
        at first.
        """
        dim = self.pos_embed.shape[2]
        self.exit_embedder = nn.Embedding(count, dim, device=self.pos_embed.device)
        nn.init.zeros_(self.exit_embedder.weight)
        return self

    def null(self, y: Tensor) -> Tensor:
        """The label of no class, for classifier-free guidance, in the shape of y."""
        return torch.full_like(y, self.classes)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x (B, channels, side, side), t (B,), classes c (B,) -> the velocity, of x's shape.

        A network that is told exits may have c = (classes, exits), both (B,).
        """
        y, exit = c if isinstance(c, tuple) else (c, None)
        time = 1 - t if self.learn_sigma else t
        c = self.t_embedder["mlp"](waves(time)) + self.y_embedder["embedding_table"](y)
        if exit is not None:
            c = c + self.exit_embedder(exit)

        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, 2)
        h = self.final_layer["linear"](modulate(h, shift, scale))

        # tokens to an image: of each, its patch row by row with channels last
        n, p = x.shape[2] // self.patch, self.patch
        v = h.view(len(x), n, n, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        v = v.reshape(len(x), -1, n * p, n * p)
        return -v[:, : self.channels] if self.learn_sigma else v

    def flops(self) -> float:
        """Floating-point operations of a forward pass for one sample, in its blocks.

        A backward pass takes twice as many.
        """
        _, tokens, dim = self.pos_embed.shape
        return len(self.blocks) * tokens * (24 * dim**2 + 4 * tokens * dim)


def dimensions(model: str, side: int) -> tuple[int, int, int, int]:
    """Width, depth, heads and patch of "size/patch", for images of side."""
    size, _, patch = model.partition("/")
    known = size in SIZES and patch in map(str, PATCHES)
    if not known or side % int(patch):
        raise ValueError(
            f"--model {model}: give size/patch, a size of {', '.join(SIZES)} and a patch of"
            f" {', '.join(map(str, PATCHES))} that divides {side}"
        )
    return *SIZES[size], int(patch)


def positions(n: int, dim: int) -> Tensor:
    """Sines and cosines of a token's place on a grid of n x n -> (1, n^2, dim).

    The first half is the column's, the second the row's; in each, sines come first.
    """
    omega = 1e4 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(n)[:, None] * omega
    line = torch.cat([angle.sin(), angle.cos()], 1).float()  # (n, dim / 2)
    column = line[None].expand(n, n, -1)
    row = line[:, None].expand(n, n, -1)
    return torch.cat([column, row], 2).reshape(1, n * n, dim)


def waves(t: Tensor) -> Tensor:
    """128 cosines and 128 sines of t (B,), of falling frequency -> (B, 256)."""
    omega = 1e4 ** (-torch.arange(128, device=t.device) / 128)
    angle = t[:, None] * omega
    return torch.cat([angle.cos(), angle.sin()], 1)


# --------------------------------------------------------------------------------- files of weights
# where a training checkpoint keeps its weights: the average first, for that is what is evaluated
AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict", "ema_params", "student_ema")
WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "net", "student", "params")
# what rides along in one, and may be unpickled
HARMLESS = [argparse.Namespace, PosixPath, WindowsPath, PurePosixPath, PureWindowsPath]
FIRST = "x_embedder.proj.weight"  # by which a state of SiT is known
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "model.")  # of DDP, torch.compile, wrappers


def read_sit(path: str | Path, model: str, side: int) -> SiT:
    """The SiT in a file of SiT or REPA, or of people's own training; they are told apart by shape.

    A checkpoint's average is taken before its weights. ValueError, in one line: it holds no SiT, or
    one of another size, or is damaged.
    """
    try:
        state = find_state(read_file(Path(path)))
        last, first = state["final_layer.linear.bias"], state[FIRST]
        net = SiT(model, side, learn_sigma=len(last) > first[0].numel())
        net.load_state_dict(state)
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError):
            reason = f"no {reason}"
        raise ValueError(f"{path} is no SiT {model} at {8 * side} px ({reason:.200})") from error
    return net


def read_file(path: Path) -> object:
    """What a .pt or .safetensors holds, of tensors and harmless types alone.

    ValueError: it is another kind of file, or a part of one, or has objects of other classes.
    """
    with path.open("rb") as file:
        begin = file.read(20)
    if not begin:
        raise ValueError("the file is empty")
    if begin.startswith(b"version https://git"):
        raise ValueError("a git-lfs pointer, not the file: run git lfs pull")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)

    if not begin.startswith((b"PK", b"\x80")):  # a zip file, or a pickle as torch wrote it once
        raise ValueError(f"not of torch.save, for it begins {begin}")
    if begin.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError("a part of the file: get it again")
    with torch.serialization.safe_globals(HARMLESS):
        try:
            return torch.load(path, "cpu", weights_only=True)
        except UnpicklingError as error:
            of_class = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if of_class is None:
                raise
            raise ValueError(f"has a pickled {of_class[1]}: save its tensors alone") from error


def find_state(saved: object) -> dict[str, Tensor]:
    """The state of a SiT in what a file holds, with SiT's own keys."""
    names = [*AVERAGES, *WEIGHTS]
    while isinstance(saved, dict) and not any(str(k).endswith(FIRST) for k in saved):
        inner = [saved[k] for k in names if isinstance(saved.get(k), dict)]
        if not inner:
            break
        saved = inner[0]
    if not isinstance(saved, dict):
        raise ValueError(f"a {type(saved).__name__}, not a dict of weights")
    state = {}
    for k, v in saved.items():
        k = str(k)
        while k.startswith(PREFIXES):
            k = k.removeprefix(next(p for p in PREFIXES if k.startswith(p)))
        if isinstance(v, Tensor) and not k.startswith("projectors."):  # REPA's, for its training
            state[k] = v
    if FIRST not in state:
        raise ValueError(f"no {FIRST}; it has {', '.join(map(str, [*saved][:5]))}")
    return state
