"""parts/wan_students.py: students of all kinds of files, whoever wrote them, and what is none.

The networks are tiny and random. Whoever writes a file here has its keys written out by hand.
"""

import copy
import json

import diffusers
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import running
from helpers import same_weights, wans_guess
from parts import rewards, tiny, wan_net, wan_students

torch.set_num_threads(1)  # the networks are small


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


@pytest.fixture
def net():
    """A tiny transformer of text to video, each test's own."""
    return tiny.wan_transformer("tiny")


def change(path, **new):
    """Replace a file of json by one that says something else of these keys."""
    old = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(old | new))


# --------------------------------------------------------------------------- students: all weights
def other(net):
    """A transformer like net, with other weights."""
    net = copy.deepcopy(net)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


WAYS = dict(
    plain={},
    fp16=dict(variant="fp16"),
    sharded=dict(max_shard_size="9KB"),
    fp16_sharded=dict(variant="fp16", max_shard_size="9KB"),
    bin=dict(safe_serialization=False),
)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_transformers_folder_is_a_student(net, tmp_path, options):
    """It is read in whatever files diffusers has written it, and what adopts it is frozen."""
    student = other(net)
    student.save_pretrained(tmp_path, **options)

    wan_students.adopt(net.requires_grad_(), tmp_path)

    assert same_weights(net, student)
    assert not any(p.requires_grad for p in net.parameters())


def test_the_folder_of_a_run_or_of_a_pipeline_is_read_for_its_transformer(net, tmp_path):
    """A run has a config.json of its own, which is not a transformer's."""
    student = other(net)
    running.open_run(tmp_path / "run", dict(init=None))
    student.save_pretrained(tmp_path / "run/student")
    student.save_pretrained(tmp_path / "run/student_ema")
    student.save_pretrained(tmp_path / "pipeline/transformer")

    for path in ("run", "run/student", "run/student_ema", "pipeline"):
        adopted = copy.deepcopy(net)
        wan_students.adopt(adopted, tmp_path / path)
        assert same_weights(adopted, student), path


def by_wans_names(net, prefix=""):
    """A network's weights as Wan names them. When they are read, diffusers translates the names."""
    return {prefix + wan_students.wans_name(k): v for k, v in net.state_dict().items()}


def write_self_forcing(net, path):
    """ode_init.pt, and their checkpoints, of two networks."""
    critic = by_wans_names(other(net), "model.")
    torch.save(dict(generator=by_wans_names(net, "model."), critic=critic, step=7), path)


def write_longlive(net, path):
    """With an average, which is the better one, and FSDP's words in its keys."""
    average = by_wans_names(net, "model._fsdp_wrapped_module.")
    average = {k.replace(".0.", ".0._fsdp_wrapped_module.", 1): v for k, v in average.items()}
    worse = by_wans_names(other(net), "model.")
    torch.save(dict(generator=worse, generator_ema=average), path)


def write_model(net, path):
    torch.save(dict(model=by_wans_names(net)), path)


def write_without_average(net, path):
    """Before the average begins its checkpoints have an empty one."""
    torch.save(dict(generator=by_wans_names(net, "model."), generator_ema={}), path)


def write_old(net, path):
    """As torch saved before 1.6, which cannot be mapped."""
    torch.save(by_wans_names(net), path, _use_new_zipfile_serialization=False)


def write_wan(net, path):
    """Wan's own file, as its authors' code reads it."""
    save_file(by_wans_names(net), path)


def write_comfy(net, path):
    save_file(by_wans_names(net, "model.diffusion_model."), path)


def write_diffusers(net, path):
    """diffusion_pytorch_model.safetensors, without its folder."""
    save_file(net.state_dict(), path)


FILES = [
    (write_self_forcing, "ode_init.pt"),
    (write_longlive, "longlive.pt"),
    (write_model, "model.pt"),
    (write_without_average, "early.pt"),
    (write_old, "old.pth"),
    (write_wan, "wan.safetensors"),
    (write_comfy, "comfy.safetensors"),
    (write_diffusers, "diffusers.safetensors"),
]


@pytest.mark.parametrize("write, name", FILES, ids=[name for _, name in FILES])
@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_a_file_of_weights_is_a_student(tmp_path, write, name, i2v):
    """Each weight of the file arrives, whoever has written it."""
    net = tiny.wan_transformer("tiny", i2v)
    student = other(net)
    write(student, tmp_path / name)

    wan_students.adopt(net, tmp_path / name)

    assert same_weights(net, student)


def test_a_network_in_half_precision_stays_so(net, tmp_path):
    """Self-Forcing's files are in float32."""
    student = other(net)
    write_self_forcing(student, tmp_path / "ode_init.pt")
    student.save_pretrained(tmp_path / "folder")

    for name in ("ode_init.pt", "folder"):
        half = copy.deepcopy(net).bfloat16()
        wan_students.adopt(half, tmp_path / name)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert same_weights(half, copy.deepcopy(student).bfloat16())


# --------------------------------------------------------------------------------- students: LoRAs
def with_lora(net, **options):
    """net with a random LoRA of rank 4 and alpha 2, whose scale is 2 / 4, by peft."""
    config = (
        dict(
            r=4,
            lora_alpha=2,
            target_modules=wan_net.LORA_TARGETS,
            init_lora_weights=False,
        )
        | options
    )
    adapted = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**config))
    for name, p in adapted.named_parameters():
        if "magnitude" in name:  # DoRA's, which begin as the norms of the weights
            p.data *= 1.1
    return adapted


def keys_of(adapted, scale=1.0):
    """A LoRA by the names of the transformer's layers, with a scale in B."""
    state = get_peft_model_state_dict(adapted)
    state = {k.removeprefix("base_model.model."): v.detach() for k, v in state.items()}
    return {k: v * scale if ".lora_B." in k else v.clone() for k, v in state.items()}


def save_as_peft(adapted, folder):
    """peft's own way, whose alpha is in adapter_config.json."""
    adapted.save_pretrained(folder)


def save_as_diffusers(adapted, folder):
    """diffusers' way, whose alpha is in the file's header."""
    diffusers.WanPipeline.save_lora_weights(
        folder,
        keys_of(adapted),
        transformer_lora_adapter_metadata=adapted.peft_config["default"].to_dict(),
    )


def save_without_header(adapted, folder):
    """As wan.py does, and diffusers' training scripts did: alpha is the rank."""
    diffusers.WanPipeline.save_lora_weights(folder, keys_of(adapted, scale=0.5))


def save_bare(adapted, folder):
    """The names of the transformer's layers alone, of a LoRA whose scale is 1."""
    save_file(keys_of(adapted, scale=0.5), folder / "bare.safetensors")


def save_with_diffusers_old_names(adapted, folder):
    """lora.down and lora.up."""
    state = {
        k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v
        for k, v in keys_of(adapted, scale=0.5).items()
    }
    save_file(state, folder / "old.safetensors")


def save_as_comfy(adapted, folder):
    """Wan's layers with lora_A and lora_B, as DiffSynth and ai-toolkit write them."""
    state = keys_of(adapted, scale=0.5)
    state = {f"diffusion_model.{wan_students.wans_name(k)}": v for k, v in state.items()}
    save_file(state, folder / "comfy.safetensors")


def save_with_alphas(adapted, folder):
    """Wan's layers with lora_down, lora_up and an alpha, as lightx2v's are."""
    state = {}
    for k, v in keys_of(adapted).items():
        k = wan_students.wans_name(k).replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        state[f"diffusion_model.{k}"] = v.bfloat16()
        state[f"diffusion_model.{k.split('.lora_')[0]}.alpha"] = torch.tensor(2.0)
    save_file(state, folder / "alphas.safetensors")


def save_as_musubi(adapted, folder):
    """lora_unet_LAYER, with underscores for dots, and an alpha for each layer."""
    state = {}
    for k, v in keys_of(adapted).items():
        layer, half = wan_students.wans_name(k).split(".lora_")
        name = f"lora_unet_{layer.replace('.', '_')}"
        state[f"{name}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = v
        state[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(state, folder / "musubi.safetensors")


def save_as_longlive(adapted, folder):
    """peft's keys of Wan's own network under FSDP, in a .pt with the critic's; alpha is the rank.

    The folder has nothing else, but a .pt is looked for by its name alone.
    """
    state = {}
    for k, v in keys_of(adapted, scale=0.5).items():
        key = wan_students.wans_name(k).replace("blocks.0.", "blocks.0._fsdp_wrapped_module.")
        state[f"base_model.model.{key}"] = v
    critic = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save(dict(generator_lora=state, critic_lora=critic, step=3), folder / "lora.pt")


SAVED = [
    (save_as_peft, {}),
    (save_as_peft, dict(use_rslora=True, r=16, lora_alpha=3)),
    (save_as_peft, dict(rank_pattern=dict(to_q=7))),
    (save_as_peft, dict(alpha_pattern=dict(to_q=7))),
    (save_as_peft, dict(use_dora=True)),
    (save_as_peft, dict(lora_bias=True)),
    (save_as_diffusers, {}),
    (save_as_diffusers, dict(alpha_pattern=dict(to_q=7))),
    (save_without_header, {}),
    (save_without_header, dict(target_modules=["proj_out", "to_k", "time_proj"])),
    (save_bare, {}),
    (save_with_diffusers_old_names, {}),
    (save_as_comfy, {}),
    (save_as_comfy, dict(target_modules=["proj_out", "to_k", "time_proj", "linear_1"])),
    (save_with_alphas, {}),
    (save_as_musubi, {}),
    (save_as_longlive, {}),
]


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes biases for broken halves
@pytest.mark.parametrize("save, options", SAVED)
@torch.no_grad()
def test_a_lora_is_all_there_whoever_wrote_it(net, tmp_path, save, options):
    """The transformer guesses what the one guesses that peft made, fused or not.

    A LoRA that does not arrive makes the teacher's videos, and nobody is told.
    """
    adapted = with_lora(net, **options)
    save(adapted, tmp_path)
    path = tmp_path / "lora.pt" if save is save_as_longlive else tmp_path
    wanted = wans_guess(adapted.base_model.model)
    assert (wanted - wans_guess(net)).abs().max() > 0.02

    beside = copy.deepcopy(net)
    wan_students.adopt(beside, path, fuse=False)
    wan_students.adopt(net, path)

    tolerance = 2e-3 if save is save_with_alphas else 1e-5  # that file is in bfloat16
    assert_close(wans_guess(beside), wanted, rtol=0, atol=tolerance)
    assert_close(wans_guess(net), wanted, rtol=0, atol=tolerance)
    assert len(running.adapters(beside)) == len(running.adapters(adapted))
    assert not running.adapters(net)
    for network in (net, beside):
        assert not any(p.requires_grad for p in network.parameters())


@torch.no_grad()
def test_a_lora_of_image_to_video_is_all_there(tmp_path):
    """It has two layers more a block, for which Wan has names of its own."""
    net = tiny.wan_transformer("tiny", i2v=True)
    adapted = with_lora(net, target_modules=["add_k_proj", "add_v_proj", "to_q"])
    save_with_alphas(adapted, tmp_path)

    wan_students.adopt(net, tmp_path)

    merged = adapted.merge_and_unload()
    for k, v in merged.state_dict().items():
        assert_close(net.state_dict()[k], v, rtol=0, atol=5e-3)
    changed = net.blocks[0].attn2.add_k_proj.weight
    assert (
        changed - tiny.wan_transformer("tiny", i2v=True).blocks[0].attn2.add_k_proj.weight
    ).any()


def test_differences_of_weights_and_biases_are_added(net, tmp_path):
    """lightx2v's LoRAs have them, for norms, too; diffusers loses those of norms without a word."""
    adapted = with_lora(net, lora_alpha=4)
    state = {f"diffusion_model.{wan_students.wans_name(k)}": v for k, v in keys_of(adapted).items()}
    bias, norm, query = torch.randn(3, 24)
    state["diffusion_model.blocks.1.self_attn.q.diff_b"] = bias.clone()
    state["diffusion_model.blocks.1.norm3.diff"] = norm.clone()
    state["diffusion_model.blocks.0.cross_attn.norm_q.diff"] = query.clone()
    save_file(state, tmp_path / "lora.safetensors")
    student = adapted.merge_and_unload()
    student.blocks[1].attn1.to_q.bias.data += bias
    student.blocks[1].norm2.weight.data += norm
    student.blocks[0].attn2.norm_q.weight.data += query

    wan_students.adopt(net, tmp_path)

    for k, v in student.state_dict().items():
        assert_close(net.state_dict()[k], v, rtol=0, atol=1e-6)


def test_a_lora_may_be_given_by_its_file(net, tmp_path):
    """Two of them are in one folder, as people keep them."""
    first, second = with_lora(net), with_lora(net)
    save_as_musubi(first, tmp_path)
    save_bare(second, tmp_path)

    wan_students.adopt(net, tmp_path / "musubi.safetensors")

    assert_close(wans_guess(net), wans_guess(first.base_model.model), rtol=0, atol=1e-5)


def test_a_lora_is_fused_in_float32(net, tmp_path):
    """Weights in bfloat16 are rounded once, after the sum; unfused they are as they were.

    peft would round the LoRA, too, when it is loaded.
    """
    adapted = with_lora(net)
    save_as_peft(adapted, tmp_path)
    net.bfloat16()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    beside = copy.deepcopy(net)

    wan_students.adopt(net, tmp_path)
    wan_students.adopt(beside, tmp_path, fuse=False)

    halves = keys_of(adapted)
    layers = {k.split(".lora_")[0] for k in halves}
    assert len(layers) == 2 * len(["q", "k", "v", "out"]) * 2 + 2 * 2
    for k, v in net.state_dict().items():
        layer = k.removesuffix(".weight")
        if layer in layers:
            product = halves[f"{layer}.lora_B.weight"] @ halves[f"{layer}.lora_A.weight"]
            assert_close(v, (before[k].float() + 0.5 * product).bfloat16(), rtol=0, atol=0)
            assert beside.state_dict()[f"{layer}.base_layer.weight"].equal(before[k])
        else:
            assert v.equal(before[k])
    halves_beside = [p for name, p in beside.named_parameters() if ".lora_" in name]
    assert {p.dtype for p in halves_beside} == {torch.float32}
    assert wans_guess(beside).dtype == torch.bfloat16


@pytest.mark.parametrize("given", ["run", "run/student", "run/student_ema", "a file of it"])
def test_a_runs_lora_stands_on_the_init_of_the_run(net, tmp_path, given):
    """Without it the LoRA would be added to a network that it was never trained on."""
    start = other(net)
    write_self_forcing(start, tmp_path / "ode_init.pt")
    adapted = with_lora(start)
    running.open_run(tmp_path / "run", dict(init=str(tmp_path / "ode_init.pt")))
    for name in ("student", "student_ema"):
        save_without_header(adapted, tmp_path / "run" / name)
    file = "run/student/pytorch_lora_weights.safetensors"

    wan_students.adopt(net, tmp_path / (file if given == "a file of it" else given))

    assert_close(wans_guess(net), wans_guess(adapted.base_model.model), rtol=0, atol=1e-5)


def test_a_runs_whole_student_needs_no_init(net, tmp_path):
    """The file that the run began with may be gone, and is not read."""
    student = other(net)
    running.open_run(tmp_path / "run", dict(init=str(tmp_path / "gone.pt")))
    student.save_pretrained(tmp_path / "run/student")

    wan_students.adopt(net, tmp_path / "run")

    assert same_weights(net, student)


# ----------------------------------------------------------------------- what is no student of ours
def write_key_too_many(net, folder):
    save_file(by_wans_names(net) | {"odd.weight": torch.ones(3)}, folder / "x.safetensors")


def write_key_too_few(net, folder):
    state = by_wans_names(net)
    save_file({k: v for k, v in state.items() if "head" not in k}, folder / "x.safetensors")


def write_folder_with_a_key_too_few(net, folder):
    """diffusers would draw the missing one at random."""
    net.save_pretrained(folder)
    state = net.state_dict()
    save_file(
        {k: v for k, v in state.items() if k != "proj_out.bias"},
        folder / "diffusion_pytorch_model.safetensors",
    )


def write_folder_with_a_key_too_many(net, folder):
    """diffusers would leave it out, and warn."""
    net.save_pretrained(folder)
    state = net.state_dict() | {"odd.weight": torch.ones(3)}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")


def write_folder_of_vace(net, folder):
    """Wan's layers and more, which diffusers would leave out without an error."""
    net.save_pretrained(folder)
    change(folder / "config.json", _class_name="WanVACETransformer3DModel")


def write_folder_of_other_heads(net, folder):
    """The shapes of all weights are the same."""
    net.save_pretrained(folder)
    change(folder / "config.json", num_attention_heads=4, attention_head_dim=6)


def write_i2v(net, folder):
    tiny.wan_transformer("tiny", i2v=True).save_pretrained(folder)


def write_run_without_student(net, folder):
    running.open_run(folder, dict(init=None))


def write_runs_lora_without_its_init(net, folder):
    running.open_run(folder, dict(init=str(folder / "gone.pt")))
    save_without_header(with_lora(net), folder / "student")


def write_nothing(net, folder):
    pass


def write_two(net, folder):
    save_bare(with_lora(net), folder)
    save_as_comfy(with_lora(net), folder)


def write_half_a_file(net, folder):
    save_bare(with_lora(net), folder)
    path = folder / "bare.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def write_deeper_lora(net, folder):
    """Of 14B, where --model is 1.3B, if it had the same width."""
    state = keys_of(with_lora(net))
    state |= {k.replace("blocks.1.", "blocks.39."): v.clone() for k, v in state.items()}
    save_file(state, folder / "x.safetensors")


def write_wider_lora(net, folder):
    state = keys_of(with_lora(net))
    wider = {k: torch.zeros(len(v), 96) if ".lora_A." in k else v for k, v in state.items()}
    save_file(wider, folder / "x.safetensors")


def write_lora_of_a_unet(net, folder):
    layer = "unet.mid_block.attentions.0.proj_in"
    state = {
        f"{layer}.lora_A.weight": torch.ones(4, 24),
        f"{layer}.lora_B.weight": torch.ones(24, 4),
    }
    save_file(state, folder / "x.safetensors")


def write_lora_with_half_a_layer(net, folder):
    state = keys_of(with_lora(net))
    del state["blocks.1.attn1.to_q.lora_A.weight"]
    save_file(state, folder / "x.safetensors")


def write_dora_of_another_tool(net, folder):
    """diffusers reads it as a LoRA, without its magnitudes."""
    state = {
        f"diffusion_model.{wan_students.wans_name(k)}": v
        for k, v in keys_of(with_lora(net)).items()
    }
    state["diffusion_model.blocks.0.self_attn.q.dora_scale"] = torch.ones(24, 1)
    save_file(state, folder / "x.safetensors")


def write_difference_of_another_width(net, folder):
    state = {
        f"diffusion_model.{wan_students.wans_name(k)}": v
        for k, v in keys_of(with_lora(net)).items()
    }
    state["diffusion_model.patch_embedding.diff"] = torch.zeros(24, 36, 1, 2, 2)
    save_file(state, folder / "x.safetensors")


def write_alpha_of_no_layer(net, folder):
    state = keys_of(with_lora(net)) | {"blocks.7.attn1.to_q.alpha": torch.tensor(1.0)}
    save_file(state, folder / "x.safetensors")


@pytest.mark.parametrize(
    "write, message",
    [
        (write_key_too_many, "odd.weight"),
        (write_key_too_few, "proj_out"),
        (write_folder_with_a_key_too_few, "proj_out.bias"),
        (write_folder_with_a_key_too_many, "odd.weight"),
        (write_folder_of_vace, "its config.json is of no WanTransformer3DModel"),
        (write_folder_of_other_heads, "it has 4 heads, and --model 2"),
        (write_i2v, ""),
        (write_run_without_student, "its config.json is of no WanTransformer3DModel"),
        (write_runs_lora_without_its_init, "there is no such file or folder"),
        (write_nothing, "it has 0 .safetensors, where one is wanted"),
        (write_two, "it has 2 .safetensors, where one is wanted"),
        (write_half_a_file, ""),
        (write_deeper_lora, "10 of its 30 layers are not --model's"),
        (write_wider_lora, "20 of its 20 layers are not --model's"),
        (write_lora_of_a_unet, "1 of its 1 layers are not --model's"),
        (write_lora_with_half_a_layer, "1 of its 20 layers are not --model's"),
        (write_dora_of_another_tool, "blocks.0.attn1.to_q.dora_scale is of no layer"),
        (write_difference_of_another_width, "patch_embedding.diff is of no layer"),
        (write_alpha_of_no_layer, "blocks.7.attn1.to_q.alpha is of no layer"),
    ],
)
def test_what_is_no_student_is_refused_in_a_line(net, tmp_path, write, message, capsys):
    """It names the folder and the reason, and never draws by the teacher instead."""
    folder = tmp_path / "given"
    folder.mkdir()
    write(net, folder)
    capsys.readouterr()

    with pytest.raises(ValueError) as caught:
        wan_students.adopt(other(net), folder)

    said = str(caught.value)
    assert said.startswith(str(folder))
    assert "is no student of --model: take one (" in said
    assert message in said
    assert "\n" not in said
    assert len(said) < len(str(folder)) + 250
    assert capsys.readouterr() == ("", "")


def test_a_student_that_is_not_there_is_named(net, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no student of --model.*no such file"):
        wan_students.adopt(net, tmp_path / "nowhere")


def test_no_code_of_a_file_is_run(net, tmp_path):
    """A .pt is a pickle, which may call anything; one that does is no student."""
    torch.save(dict(generator=print), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt is no student of --model"):
        wan_students.adopt(net, tmp_path / "x.pt")


# --------------------------------------------------------------------------------- files for others
@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_a_student_for_comfyui_has_wans_names_and_is_read_again(tmp_path, i2v):
    """The names are Wan's own; diffusers' translation of them finds all weights again."""
    net = tiny.wan_transformer("tiny", i2v)
    student = other(net)
    student.save_pretrained(tmp_path / "student")

    wan_students.write_for_comfyui(tmp_path / "student", tmp_path / "comfyui.safetensors")

    written = load_file(tmp_path / "comfyui.safetensors")
    assert written.keys() == by_wans_names(student).keys()
    wan_students.adopt(net, tmp_path / "comfyui.safetensors")
    assert same_weights(net, student)


def test_a_lora_for_comfyui_has_wans_names_and_is_read_again(net, tmp_path):
    """With the prefix that ComfyUI looks for."""
    adapted = with_lora(net)
    save_without_header(adapted, tmp_path / "student")

    wan_students.write_for_comfyui(tmp_path / "student", tmp_path / "comfyui.safetensors")

    written = load_file(tmp_path / "comfyui.safetensors")
    assert "diffusion_model.blocks.0.self_attn.o.lora_A.weight" in written
    assert "diffusion_model.blocks.1.ffn.2.lora_B.weight" in written
    wan_students.adopt(net, tmp_path / "comfyui.safetensors")
    assert_close(wans_guess(net), wans_guess(adapted.base_model.model), rtol=0, atol=1e-5)


def test_self_forcings_start_is_downloaded(net, tmp_path, monkeypatch):
    """By its name on the hub, which a run's config.json has, too."""
    student = other(net)
    write_self_forcing(student, tmp_path / "ode_init.pt")
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return tmp_path / "ode_init.pt"

    monkeypatch.setattr(rewards, "download", download)
    wan_students.adopt(net, wan_students.ODE_INIT)

    assert asked == [("gdhe17/Self-Forcing", "checkpoints/ode_init.pt")]
    assert same_weights(net, student)
