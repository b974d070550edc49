"""Students of Wan2.1 in files of all kinds: of diffusers, Self-Forcing, LongLive, anyone's LoRAs.

adopt(net, ODE_INIT)  # Self-Forcing's causal start, downloaded at first
adopt(net, Path("runs/wan"))  # a run's student, or anyone's weights or LoRA
write_for_comfyui(Path("runs/wan/student"), Path("comfyui.safetensors"))
"""

import json
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

import running
from parts import rewards
from parts.unet import variant_of
from parts.wan_net import fuse_lora, quiet

SELF_FORCING = "gdhe17/Self-Forcing"  # on the hub
ODE_INIT = Path(SELF_FORCING, "checkpoints/ode_init.pt")  # for T2V-1.3B

STUDENTS = ("student", "student_ema")  # folders of a run
WRAPPERS = ("generator_ema", "generator", "generator_lora", "model")  # in a file, the best first
PREFIXES = re.compile(r"^((base_model|model|diffusion_model|transformer)\.)+")  # of keys
INSIDE = ("_fsdp_wrapped_module.", "_orig_mod.", "default.")  # FSDP, compile, peft put them there
HALVES = {  # of a LoRA: other tools' names, and peft's
    ".lora_down.": ".lora_A.",
    ".lora_up.": ".lora_B.",
    ".lora.down.": ".lora_A.",
    ".lora.up.": ".lora_B.",
}
DIFFUSERS_LAYERS = (".attn1.", ".attn2.", ".ffn.net.")  # as Wan's keys have no layers
WANS_NAMES = {  # a piece of diffusers' key: Wan's, to be replaced in this order
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.": "",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "norm_added_k": "norm_k_img",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    ".to_out.0": ".o",
    ".to_": ".",
    "norm2": "norm3",
    "net.0.proj": "0",
    "net.2": "2",
    "embedder.linear_1": "embedding.0",
    "embedder.linear_2": "embedding.2",
    "time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "modulation",
}


# ------------------------------------------------------------------------------ students of files
def adopt(net: nn.Module, path: Path, fuse: bool = True) -> None:
    """Give a transformer the student in path, its weights or a LoRA, and freeze it.

    ODE_INIT                  downloaded, unless it is in the hub's cache
    a run's folder            its `student`; if that is a LoRA, it stands on the run's `init`
    a transformer's folder    of diffusers, or the pipeline's around it
    .pt, .safetensors         weights by the keys of diffusers, Wan, Self-Forcing or LongLive
    a LoRA, file or folder    of diffusers, peft, LongLive, ComfyUI, musubi and their kin

    All that is there must arrive. With fuse a LoRA goes into the weights, else it stays beside
    them, where bfloat16 does not round it away. ValueError: it is none of these, or of another
    model, or some of it would be left over or missing.
    """
    if path == ODE_INIT:
        path = rewards.download(SELF_FORCING, str(ODE_INIT.relative_to(SELF_FORCING)))
    path = student_of(path)
    start = init_of(path)
    if start is not None:
        adopt(net, start)
    quiet()
    try:
        running.require(path.exists(), "there is no such file or folder")
        if (path / "config.json").exists():
            load_folder(net, path)
        else:
            load_file(net, only_file(path), fuse)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no student of --model: take one ({reason:.150})") from None
    net.eval().requires_grad_(False)


def student_of(path: Path) -> Path:
    """The folder of the weights, if path is the folder of a run or of a pipeline; else path."""
    for name in ("student", "transformer"):
        if (path / name).is_dir():
            return path / name
    return path


def init_of(path: Path) -> Path | None:
    """What a run's LoRA was trained from, if path is the LoRA's folder or file in the run."""
    folder = path.parent if path.is_file() else path
    whole = (folder / "config.json").exists()
    if whole or folder.name not in STUDENTS or not (folder.parent / "config.json").exists():
        return None
    start = running.read_config(folder.parent).get("init")
    return Path(start) if start else None


def only_file(path: Path) -> Path:
    """The file path, or the one .safetensors in the folder path."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    running.require(len(files) == 1, f"it has {len(files)} .safetensors, where one is wanted")
    return files[0]


def load_folder(net: nn.Module, folder: Path) -> None:
    """Load a transformer's folder of diffusers, and see that it is whole and of net's shape."""
    kind = type(net).__name__
    config = type(net).load_config(folder)
    running.require(config.get("_class_name") == kind, f"its config.json is of no {kind}")
    heads, ours = config["num_attention_heads"], net.config.num_attention_heads
    running.require(heads == ours, f"it has {heads} heads, and --model {ours}")  # no shape tells
    student, found = type(net).from_pretrained(
        folder, dtype=net.dtype, variant=variant_of(folder), output_loading_info=True
    )
    odd = [*found["missing_keys"], *found["unexpected_keys"]]
    running.require(not odd, f"its files lack, or do not know, {', '.join(odd)}")
    net.load_state_dict(student.state_dict())


def load_file(net: nn.Module, file: Path, fuse: bool) -> None:
    """Load a file of weights or of a LoRA."""
    state = read_weights(file)
    if not any(".lora_" in key for key in state):
        load_weights(net, state)
        return
    load_lora(net, state, lora_config(file))
    if fuse:
        fuse_lora(net)


def read_weights(file: Path) -> dict[str, Tensor]:
    """A file's tensors on the CPU, by keys without what trainers wrap about them.

    A checkpoint of several networks is read for the student, and for the running average of that,
    if there is one. No code in a file is run.
    """
    import safetensors.torch

    if file.suffix == ".safetensors":
        state = safetensors.torch.load_file(file)
    else:
        # A mapped file is read where it is needed: the critic in it takes no memory.
        state = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for name in WRAPPERS:
        if state.get(name):
            state = state[name]
            break
    return {unwrapped(key): v for key, v in state.items()}


def unwrapped(key: str) -> str:
    """A key as the network itself would have it; the halves of a LoRA are named as peft's."""
    for part in INSIDE:
        key = key.replace(part, "")
    for theirs, ours in HALVES.items():
        key = key.replace(theirs, ours)
    return PREFIXES.sub("", key)


def load_weights(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights by diffusers' keys or Wan's, every one of them."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    if state.keys() != net.state_dict().keys():
        state = convert_wan_transformer_to_diffusers(state)
    net.load_state_dict(state)


# ---------------------------------------------------------------------------------- LoRAs of files
def load_lora(net: nn.Module, state: dict[str, Tensor], config: dict | None) -> None:
    """Add a LoRA to a transformer as its adapter "default", and see that all of it arrives.

    Its halves are in float32, whatever the transformer is in. Its differences of weights and
    biases, `diff` and `diff_b`, go into these at once. config is peft's, or None, and then its
    scale is 1 but for what `alpha` beside a layer says.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = scaled(by_diffusers_keys(state))
    halves = {key: v for key, v in state.items() if ".lora_" in key}
    add_differences(net, {key: v for key, v in state.items() if key not in halves})
    require_layers(net, halves)
    net.load_lora_adapter(dict(halves), prefix=None, metadata=config, adapter_name="default")
    # They were cast to the transformer's type, so they are loaded once more, in float32.
    for name, p in net.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()
    set_peft_model_state_dict(net, dict(halves))
    arrived = get_peft_model_state_dict(net, adapter_name="default")
    odd = sorted(halves.keys() ^ arrived.keys())
    running.require(not odd, f"{len(odd)} of its tensors are left over or missing: {odd[:1]}")


def lora_config(file: Path) -> dict | None:
    """What peft's adapter_config.json or diffusers' header tell of a LoRA, as of its alpha."""
    import peft
    from safetensors import safe_open

    if file.with_name("adapter_config.json").exists():
        return peft.LoraConfig.from_pretrained(file.parent).to_dict()
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
    told = json.loads(header.get("lora_adapter_metadata", "{}"))
    return {key.removeprefix("transformer."): v for key, v in told.items()} or None


def by_diffusers_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA by the names of Wan's layers -> by diffusers'; one that has these stays as it is.

    musubi's keys have underscores for the dots of a layer, lora_unet_blocks_0_self_attn_q.
    """
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    if any(layer in key for key in state for layer in DIFFUSERS_LAYERS):
        return state
    dotted = {}
    for key, v in state.items():
        key = key.removeprefix("lora_unet_")
        dotted[re.sub(r"^blocks_(\d+)_(self_attn|cross_attn|ffn)_", r"blocks.\1.\2.", key)] = v
    return convert_wan_transformer_to_diffusers(dotted)


def scaled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA whose layers may have an `alpha` -> one without, with alpha / rank in its B."""
    alphas = {key: v for key, v in state.items() if key.endswith(".alpha")}
    state = {key: v for key, v in state.items() if key not in alphas}
    for key, alpha in alphas.items():
        up = f"{key.removesuffix('.alpha')}.lora_B.weight"
        running.require(up in state, f"{key} is of no layer")
        rank = state[up].shape[1]
        state[up] = state[up].float() * (alpha.item() / rank)
    return state


def add_differences(net: nn.Module, differences: dict[str, Tensor]) -> None:
    """Add LAYER.diff to a layer's weight and LAYER.diff_b to its bias, as some LoRAs have them."""
    weights = dict(net.named_parameters())
    for key, v in differences.items():
        layer, _, kind = key.rpartition(".")
        name = f"{layer}.{dict(diff='weight', diff_b='bias').get(kind)}"
        running.require(
            name in weights and weights[name].shape == v.shape, f"{key} is of no layer of --model"
        )
        weight = weights[name]
        weight.data = (weight.float() + v.to(weight.device).float()).to(weight.dtype)


def require_layers(net: nn.Module, halves: dict[str, Tensor]) -> None:
    """ValueError, unless the layers of a LoRA are layers of net, of the same widths."""
    weights = dict(net.named_parameters())
    layers = {key.split(".lora_")[0] for key in halves}
    strange = []
    for layer in sorted(layers):
        weight = weights.get(f"{layer}.weight")
        down = halves.get(f"{layer}.lora_A.weight")
        up = halves.get(f"{layer}.lora_B.weight")
        known = weight is not None and down is not None and up is not None
        if not known or (len(up), down.shape[1]) != tuple(weight.shape[:2]):
            strange.append(layer)
    running.require(
        not strange, f"{len(strange)} of its {len(layers)} layers are not --model's: {strange[:1]}"
    )


# ------------------------------------------------------------------------------- files for others
def write_for_comfyui(path: Path, file: Path) -> None:
    """Write a student of diffusers, a transformer's folder or a LoRA, by Wan's names of layers.

    ComfyUI and its WanVideoWrapper look for these. path is a folder, as a run's `student`. A LoRA
    whose alpha is not its rank is not for it, and `sample` has no need of it. ValueError: path has
    no student.
    """
    import safetensors.torch
    from diffusers import WanTransformer3DModel

    running.require(path.exists(), f"{path}: there is no such file or folder")
    if (path / "config.json").exists():
        state = WanTransformer3DModel.from_pretrained(path, variant=variant_of(path)).state_dict()
        state = {wans_name(key): v for key, v in state.items()}
    else:
        state = read_weights(only_file(path))
        state = {f"diffusion_model.{wans_name(key)}": v for key, v in state.items()}
    state = {key: v.contiguous() for key, v in state.items()}
    safetensors.torch.save_file(state, file)


def wans_name(key: str) -> str:
    """diffusers' key of a weight -> Wan's own."""
    if key == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in WANS_NAMES.items():
        key = key.replace(ours, theirs)
    return key
