"""Wan2.1's pipeline and transformer as AMD needs them: checked, with LoRAs and exits.

    model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    pipe = load_pipeline(model, device, default=torch.bfloat16, vae=torch.float32)
    net = load_transformer(model, device, torch.bfloat16)
    tell_exits(net)  # a fake teacher that can be told a sample's exit
    with told(net, exit_code(0.625, len(x_t), device)):
        velocity = net(x_t, 1000 * t, text).sample

What is here knows diffusers' classes, and nothing of a run. wan_students.py reads students.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import running
from parts.unet import EXIT_DIM, index_of, variant_of
from parts.unet import exit_code as exit_code  # told here, and the same for all backbones

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
IMAGE_PARTS = ("image_encoder", "image_processor")  # of image to video besides
NETWORKS = ("vae", "text_encoder", "image_encoder")  # those of them that are loaded with it
WIDTHS = dict(in_channels=16, out_channels=16, text_dim=4096, image_dim=None)  # and their defaults

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


# ------------------------------------------------------------------------------------- the pipeline
def load_pipeline(model: str, device: torch.device, **dtypes: torch.dtype):
    """diffusers' pipeline of a Wan2.1 without its transformer, frozen, on a device.

    model is a name on the hub or a folder, of text to video or of image to video. dtypes has the
    types of parts by name, and `default`. A folder that has nothing but fp16 files is read, too.
    ValueError: it is another kind of model, or a part is missing.
    """
    import diffusers

    quiet()
    folder = Path(model)
    index = index_of(model)
    require_wan21(model, index)
    parts = [*PARTS, *IMAGE_PARTS] if is_i2v(index) else PARTS
    for part in parts:
        running.require(
            any(index.get(part) or []) and (not folder.is_dir() or (folder / part).is_dir()),
            f"{model} has no {part}: give Wan2.1 of diffusers, a whole folder",
        )

    networks = [folder / part for part in NETWORKS if part in parts]
    half = folder.is_dir() and any(variant_of(network) == "fp16" for network in networks)
    variant = "fp16" if half else None
    kind = getattr(diffusers, index["_class_name"])  # DiffusionPipeline itself would not heed None
    pipe = kind.from_pretrained(model, transformer=None, dtype=dtypes, variant=variant)
    for name, net in pipe.components.items():
        if isinstance(net, nn.Module):
            net.to(device, dtypes.get(name, dtypes["default"])).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def require_wan21(model: str, index: dict) -> None:
    """ValueError, unless a pipeline's index is one of Wan2.1.

    Wan2.2's have two transformers, or are told a time step for each token.
    """
    kind = index.get("_class_name")
    running.require(
        kind in PIPELINES, f"{model} is a {kind}, and no Wan2.1: give one of {', '.join(PIPELINES)}"
    )
    running.require(
        not any(index.get("transformer_2") or []) and not index.get("expand_timesteps"),
        f"{model} is Wan2.2: give Wan2.1, which has one transformer",
    )


def is_i2v(index: dict) -> bool:
    """Is a pipeline's index one of image to video?"""
    return index["_class_name"] == "WanImageToVideoPipeline"


def quiet() -> None:
    """Let diffusers and transformers report errors only, and draw no bars of their own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


# ---------------------------------------------------------------------------------- the transformer
def load_transformer(model: str, device: torch.device, dtype: torch.dtype):
    """The WanTransformer3DModel of a pipeline on the hub or in a folder, frozen, on a device.

    All weights are of one type, as FSDP2 wants them, where diffusers would keep some in float32.
    The buffers are not: these are the angles of rope, for which bfloat16 is too coarse. The weights
    are read and cast on the CPU, so the device never holds them in another type, or twice.
    """
    from diffusers import WanTransformer3DModel

    quiet()
    folder = Path(model) / "transformer"
    variant = variant_of(folder) if folder.is_dir() else None
    net = WanTransformer3DModel.from_pretrained(
        model, subfolder="transformer", dtype=dtype, variant=variant
    )
    return cast(net, dtype).to(device).eval().requires_grad_(False)


def cast(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the weights of a transformer a type, in place, and leave its buffers alone -> net."""
    for p in net.parameters():
        p.data = p.data.to(dtype)
    return net


def config_of(model: str) -> dict:
    """The config of a model's transformer, which is a small file: no weights are read."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.load_config(model, subfolder="transformer")


def same_widths(model: str, teacher: str) -> None:
    """ValueError, unless two transformers take and give tensors of the same widths.

    So a teacher of 14B goes with a student of 1.3B, and one of image to video with none of text to
    video.
    """
    for name, usual in WIDTHS.items():
        ours = config_of(model).get(name, usual)
        theirs = config_of(teacher).get(name, usual)
        running.require(
            ours == theirs,
            f"{teacher} has {name} {theirs}, and {model} {ours}: choose a teacher with the same",
        )


def compile_blocks(net: nn.Module) -> None:
    """Compile the blocks of a transformer, all of them by the same programs.

    What is compiled is a block's forward, so that hooks of a block stay outside: what they choose
    for it would make each block a program of its own. There are some programs for each number of
    cached frames, batch and kind of pass, so dynamo may make more of them than its usual 8. Compile
    last, for a copy of a compiled block still calls the block that it is a copy of.
    """
    torch._dynamo.config.recompile_limit = 256
    for block in net.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


# -------------------------------------------------------------------------------------------- LoRAs
def add_lora(net: nn.Module, rank: int) -> None:
    """Add LoRAs of a rank to attention and feed-forward layers, in float32, with alpha = rank."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)
    net.add_adapter(config)
    for layer in running.adapters(net).values():
        layer.cast_input_dtype_enabled = False  # autocast does it, where it is needed
    for p in net.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def fuse_lora(net: nn.Module) -> None:
    """Add the LoRAs of a transformer to its weights, and remove them.

    A layer after the other is in float32 for it, so that in half precision a weight is rounded
    once, and B A is not rounded at all.
    """
    for layer in running.adapters(net).values():
        dtype = layer.get_base_layer().weight.dtype
        layer.float()
        layer.merge()
        layer.to(dtype)
    net.unload_lora()


# -------------------------------------------------------------------------------------------- exits
def tell_exits(net: nn.Module) -> None:
    """Let a transformer be told a sample's exit, see `told`.

    A linear layer in float32, 0 at first, adds the code of the exit to what the time embedder
    makes. It is a part of the time embedder, as `exit_proj`, so it is trained, sharded and saved
    with the transformer. ValueError: there is one already.
    """
    embedder = net.condition_embedder.time_embedder
    running.require(not hasattr(embedder, "exit_proj"), "this transformer is told exits already")
    last = embedder.linear_2
    layer = nn.Linear(
        EXIT_DIM,
        last.out_features,
        bias=False,
        device=last.weight.device,
        dtype=torch.float32,
    )
    nn.init.zeros_(layer.weight)
    embedder.exit_proj = layer
    embedder.exit_code = None
    embedder.register_forward_hook(add_exit)


def add_exit(embedder: nn.Module, _given: tuple, embedding: Tensor) -> Tensor:
    """A forward hook of the time embedder: its output (B, dim), and what it is told of the exit.

    Copies of a transformer have the hook, too, so it looks at the module that it is called with.
    """
    code = embedder.exit_code
    if code is None:
        return embedding
    weight = embedder.exit_proj.weight  # FSDP has it in half precision in a forward pass
    return embedding + embedder.exit_proj(code.to(weight.dtype)).to(embedding.dtype)


@contextlib.contextmanager
def told(net: nn.Module, code: Tensor | None) -> Iterator[None]:
    """A context in which a transformer is told the exit of its samples.

    code (B, 256) is of `exit_code`. With None, and outside of the context, the transformer computes
    as one that knows of no exits. ValueError: there is a code, and no layer of `tell_exits`.
    """
    embedder = net.condition_embedder.time_embedder
    if code is None:
        yield
        return
    running.require(
        hasattr(embedder, "exit_proj"), "this transformer is not told exits: call tell_exits first"
    )
    embedder.exit_code = code
    try:
        yield
    finally:
        embedder.exit_code = None
