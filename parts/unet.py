"""Stable Diffusion's pipeline and UNet as AMD needs them: checked, with LoRAs, exits, a GAN head.

    pipe = load_pipeline("stabilityai/stable-diffusion-xl-base-1.0", device, default=torch.bfloat16)
    add_lora(unet, rank=64)  # DMD2's layers
    tell_exits(unet)  # a fake teacher that can be told a sample's exit
    adopt(pipe, Path("runs/sdxl"))  # a student, or anyone's UNet or LoRA

What is here knows diffusers' classes, and nothing of a run.
"""

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import running

LORA_TARGETS = [  # DMD2's
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
]
LORA_ALPHA = 8  # DMD2's
PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionPipeline")
EXIT_DIM = 256  # numbers in the code of an exit


# ------------------------------------------------------------------------------------- the pipeline
def load_pipeline(model: str, device: torch.device, **dtypes: torch.dtype):
    """diffusers' pipeline of SDXL or Stable Diffusion 1.5, frozen, on a device.

    dtypes has the types of parts by name, and `default`. A folder that has nothing but fp16 files
    is read, too. ValueError: it is another kind of model, or a part is missing, or its noise
    schedule is none that AMD's eps networks are trained on.
    """
    import diffusers

    folder = Path(model)
    index = index_of(model)
    kind = index.get("_class_name")
    running.require(kind in PIPELINES, f"{model} is a {kind}: give one of {', '.join(PIPELINES)}")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        running.require(
            part in index and (not folder.is_dir() or (folder / part).is_dir()),
            f"{model} has no {part}: give SDXL, Stable Diffusion 1.5 or a whole folder",
        )
    check_parts(model, scheduler=index["scheduler"][1])
    variant = variant_of(folder / "unet") if folder.is_dir() else None
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        model, dtype=dtypes, variant=variant, safety_checker=None
    )
    return frozen(pipe, device, **dtypes)


def index_of(model: str) -> dict:
    """A pipeline's index, of a folder or of the hub. ValueError: there is none to be had."""
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(model)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{model} is no folder of a pipeline and not in the hub's cache, and could not be"
            f" downloaded: check its name and your connection ({reason:.100})"
        ) from None
    running.require(isinstance(index, dict), f"{model} has no index: give a whole folder")
    return index


def check_parts(model: str, scheduler: str) -> None:
    """Refuse a model whose noise, latents or UNet's input are not those of SDXL or SD1.5.

    scheduler is its class's name. The configs of these parts are small, so a model that will not do
    is not downloaded first. ValueError: that is so. OSError: a config cannot be had.
    """
    import diffusers

    noise = diffusers.DDPMScheduler.load_config(model, subfolder="scheduler")
    vae = diffusers.AutoencoderKL.load_config(model, subfolder="vae")
    net = diffusers.UNet2DConditionModel.load_config(model, subfolder="unet")
    kind = noise.get("prediction_type", "epsilon")
    running.require(kind == "epsilon", f"{model} predicts {kind}, not noise: choose another model")
    running.require(
        not noise.get("rescale_betas_zero_snr"),
        f"{model} has rescale_betas_zero_snr: its first level is all noise, of which a network that"
        " predicts noise tells nothing; choose another model",
    )
    running.require(
        "EDM" not in scheduler and not vae.get("latents_mean"),
        f"{model} is of another family ({scheduler}): choose SDXL or Stable Diffusion 1.5",
    )
    channels = net.get("in_channels", 4)
    running.require(channels == 4, f"{model} takes {channels} channels: choose text to image")


def frozen(pipe, device: torch.device, **dtypes: torch.dtype):
    """Freeze a pipeline's networks and move them to a device. It makes diffusers quiet."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    for name, net in pipe.components.items():
        if isinstance(net, nn.Module):
            net.to(device, dtypes.get(name, dtypes["default"])).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def variant_of(folder: Path) -> str | None:
    """diffusers' variant of a network's files: "fp16" where there are no others."""
    names = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


# --------------------------------------------------------------------------- LoRAs, exits, GAN head
def add_lora(unet: nn.Module, rank: int) -> None:
    """Add LoRAs of a rank to the layers that DMD2 trains, in float32."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=LORA_ALPHA, target_modules=LORA_TARGETS)
    unet.add_adapter(config)
    for layer in running.adapters(unet).values():
        layer.cast_input_dtype_enabled = False  # autocast does it, where it is needed
    for p in unet.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def tell_exits(unet: nn.Module) -> None:
    """Let a UNet be told a sample's exit, by diffusers' own timestep_cond.

    A linear layer, 0 at first, adds the code of the exit to the sines of the time step. ValueError:
    the UNet uses that input already, as those of consistency models do.
    """
    embedding = unet.time_embedding
    running.require(
        embedding.cond_proj is None, "--exit-aware: this UNet has a timestep_cond of its own"
    )
    width = embedding.linear_1.in_features
    layer = nn.Linear(EXIT_DIM, width, bias=False, device=embedding.linear_1.weight.device)
    nn.init.zeros_(layer.weight)
    embedding.cond_proj = layer


def exit_code(t_G: float, count: int, device: torch.device) -> Tensor:
    """Sines and cosines of an exit's level -> (count, EXIT_DIM), the same for all samples."""
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(torch.full((count,), 1000 * t_G, device=device), EXIT_DIM)


def gan_head(width: int, side: int) -> nn.Sequential:
    """DMD2's discriminator of the bottleneck (B, width, side, side) -> (B, 1, 1, 1).

    Convolutions halve it down to a side of 4, and the last one takes that whole. ValueError: side
    is no power of 2 from 4 on.
    """
    running.require(
        side >= 4 and side & (side - 1) == 0,
        f"dmd2's bottleneck is {side} wide: choose --image-size 2 ** n",
    )
    halvings = side.bit_length() - 3
    convs = [nn.Conv2d(width, width, 4, 2, 1) for _ in range(halvings)]
    convs.append(nn.Conv2d(width, width, 4))
    layers = []
    for conv in convs:
        layers += [conv, nn.GroupNorm(32, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))


def add_gan_head(unet: nn.Module, side: int) -> None:
    """Give a fake teacher DMD2's head, for latents of side, and the method `logits`."""
    config = unet.config
    shrunk = side >> len(config.block_out_channels) - 1
    unet.head = gan_head(config.block_out_channels[-1], shrunk).to(unet.device)
    unet.logits = partial(logits, unet)


def logits(unet: nn.Module, x_t: Tensor, t: Tensor, c: dict[str, Tensor]) -> Tensor:
    """DMD2's D(x_t) (B,): the head, of what the middle block gives.

    The other half of the UNet is not run. The head computes in float32, as DMD2's does.
    """
    with running.autocast(x_t):
        emb = unet.time_embedding(unet.get_time_embed(x_t, (1000 * t).round()))
        more = unet.get_aug_embed(emb, c["text"], added(c))
        if more is not None:
            emb = emb + more
        h = unet.conv_in(x_t)
        for block in [*unet.down_blocks, unet.mid_block]:
            attends = getattr(block, "has_cross_attention", False)
            text = dict(encoder_hidden_states=c["text"]) if attends else {}
            h = block(h, temb=emb, **text)
            if isinstance(h, tuple):
                h, _ = h
    with torch.autocast(x_t.device.type, enabled=False):
        return unet.head(h.float()).sum((1, 2, 3))


def added(c: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What SDXL's UNet is told beside the text; None for Stable Diffusion 1.5."""
    return dict(text_embeds=c["pooled"], time_ids=c["ids"]) if "pooled" in c else None


def blocks_of(unet: nn.Module, *kinds: str) -> list[nn.Module]:
    """The modules of these classes."""
    return [m for m in unet.modules() if type(m).__name__ in kinds]


# --------------------------------------------------------------------------- students, UNets, LoRAs
def adopt(pipe, path: Path) -> None:
    """Give pipe the student in path: a run, a UNet's folder, or a LoRA, its file or folder.

    LoRAs may be diffusers', peft's or kohya's, with alphas, and DoRAs. ValueError: it is none of
    them, or of another model, or no weight of it would be used.
    """
    if (path / "student").exists():
        path = path / "student"
    own = pipe.unet.config.cross_attention_dim
    try:
        if (path / "config.json").exists():
            net = type(pipe.unet).from_pretrained(path, dtype=pipe.dtype, variant=variant_of(path))
            width = net.config.cross_attention_dim
            running.require(width == own, "its texts are of another width")
            pipe.unet = net.to(pipe.device)
        else:
            load_lora(pipe, path)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no student of --model: take one ({reason:.150})") from None


def load_lora(pipe, path: Path) -> None:
    """Load a LoRA into a pipeline's UNet, and see that all of it arrives."""
    from safetensors.torch import load_file

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    running.require(len(files) == 1, f"it has {len(files)} .safetensors, where one is wanted")
    (file,) = files
    state = load_file(file)
    running.require(
        any("lora" in k for k in state), f"no LoRA has keys such as {next(iter(state), 'none')}"
    )
    of_texts = ("text_encoder", "lora_te")
    wanted = [k for k in state if is_second_half(k) and not k.startswith(of_texts)]
    running.require(wanted, "it has no layer of a UNet")

    if any(k.startswith(("unet.", "lora_unet")) for k in state):
        # diffusers reads the file itself, whose header may have alphas
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    else:
        pipe.load_lora_weights(from_peft(state, file.with_name("adapter_config.json")))
    layers = running.adapters(pipe.unet)
    running.require(
        len(layers) >= len(wanted), f"{len(layers)} of its {len(wanted)} layers are this UNet's"
    )


def is_second_half(key: str) -> bool:
    """Is it the name of a LoRA's B, which peft has as lora_B, and the others as up?"""
    return key.endswith((".lora_B.weight", "up.weight"))


def from_peft(state: dict[str, Tensor], config: Path) -> dict[str, Tensor]:
    """A LoRA by the names of a UNet's layers, or as peft writes them, to diffusers' keys.

    What config says of its scale goes into B: a reader who is told no alpha takes the rank for it.
    """
    state = {f"unet.{k.removeprefix('base_model.model.')}": v for k, v in state.items()}
    if not config.exists():
        return state
    told = json.loads(config.read_text(encoding="utf-8"))
    running.require(not told.get("alpha_pattern"), "its layers have alphas of their own")
    for k, v in state.items():
        if is_second_half(k):
            rank = v.shape[1]
            root = rank**0.5 if told.get("use_rslora") else rank
            state[k] = v * told["lora_alpha"] / root
    return state
