"""parts/wan_net.py: pipelines that are read or refused, LoRAs to be trained, exits; parts/tiny.py.

The pipelines are diffusers' own, tiny and with random weights, saved as their models' folders are.
"""

import copy
import json
import re
from functools import partial

import diffusers
import pytest
import torch
from torch.testing import assert_close

import running
from helpers import CPU, same_weights, wans_guess
from parts import tiny, unet, wan_net

torch.set_num_threads(1)  # the networks are small


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of Wan2.1: text to video as t2v, image to video as i2v."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny.wan_pipeline("tiny")
    pipe.register_modules(transformer=tiny.wan_transformer("tiny"))
    pipe.save_pretrained(folder / "t2v")
    tiny.wan_i2v_pipeline("tiny").save_pretrained(folder / "i2v")
    return folder


def load(folder, **dtypes):
    """The pipeline of a folder, in float32 where dtypes says nothing else."""
    return wan_net.load_pipeline(str(folder), CPU, **dict(default=torch.float32) | dtypes)


@pytest.fixture
def net():
    """A tiny transformer of text to video, each test's own."""
    return tiny.wan_transformer("tiny")


# ------------------------------------------------------------------------------- pipelines of files
@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_a_pipeline_is_loaded_frozen_in_the_types_of_its_parts(models, name):
    """Wan's VAE wants float32, where the rest is in half precision."""
    whole = diffusers.DiffusionPipeline.from_pretrained(models / name)

    pipe = load(models / name, default=torch.bfloat16, vae=torch.float32)

    assert type(pipe) is type(whole)
    nets = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    of_images = {"image_encoder"} if name == "i2v" else set()
    assert nets.keys() == {"vae", "text_encoder"} | of_images
    for part, net in nets.items():
        wanted = torch.float32 if part == "vae" else torch.bfloat16
        assert {p.dtype for p in net.parameters()} == {wanted}
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())
        assert same_weights(net, whole.components[part].to(wanted))


def linked(model, folder):
    """A folder with the model's files, where each file may be replaced by another."""
    for path in model.rglob("*"):
        if path.is_file():
            copied = folder / path.relative_to(model)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.symlink_to(path)
    return folder


def change(path, **new):
    """Replace a file of json by one that says something else of these keys."""
    old = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(old | new))


@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_a_pipelines_transformer_is_not_read(models, tmp_path, name):
    """It is loaded by itself, in a type of its own, and twice it may be 28 GiB too many.

    DiffusionPipeline.from_pretrained(..., transformer=None) would load it all the same.
    """
    folder = linked(models / name, tmp_path / name)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.write_text("nobody can read this")

    assert load(folder).transformer is None


@pytest.mark.parametrize(
    "options",
    [dict(variant="fp16"), dict(max_shard_size="30KB"), dict(variant="fp16", max_shard_size="9KB")],
    ids=["fp16", "sharded", "fp16 and sharded"],
)
def test_a_folder_with_other_files_of_weights_is_read(models, tmp_path, options):
    """A model downloaded with --include '*.fp16.safetensors' has no others.

    Large networks are in several files, with an index.
    """
    whole = diffusers.WanPipeline.from_pretrained(models / "t2v")
    whole.save_pretrained(tmp_path, **options)

    pipe = load(tmp_path)
    net = wan_net.load_transformer(str(tmp_path), CPU, torch.float32)

    if "max_shard_size" in options:
        assert len([*(tmp_path / "transformer").glob("*.safetensors")]) > 1
    assert same_weights(pipe.text_encoder, whole.text_encoder)
    assert same_weights(pipe.vae, whole.vae)
    assert same_weights(net, whole.transformer)


def be_wan22(folder):
    """A14B has one transformer for high noise, and one for low."""
    change(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])


def be_wan22_5b(folder):
    """TI2V-5B has one transformer, which is told a time step for each token."""
    change(folder / "model_index.json", expand_timesteps=True)


def be_vace(folder):
    change(folder / "model_index.json", _class_name="WanVACEPipeline")


def be_sdxl(folder):
    change(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")


def lose(part):
    """A download that was not whole."""

    def spoil(folder):
        for path in (folder / part).iterdir():
            path.unlink()
        (folder / part).rmdir()

    return spoil


def never_had_image_encoder(folder):
    """As image to video of Wan2.2."""
    change(folder / "model_index.json", image_encoder=[None, None])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (be_wan22, "is Wan2.2: give Wan2.1"),
        (be_wan22_5b, "is Wan2.2: give Wan2.1"),
        (be_vace, "is a WanVACEPipeline, and no Wan2.1"),
        (be_sdxl, "is a StableDiffusionXLPipeline, and no Wan2.1"),
        (lose("transformer"), "has no transformer"),
        (lose("vae"), "has no vae"),
        (lose("tokenizer"), "has no tokenizer"),
        (lose("image_encoder"), "has no image_encoder"),
        (never_had_image_encoder, "has no image_encoder"),
    ],
)
def test_a_model_of_another_kind_is_refused_in_a_line(models, tmp_path, spoil, message):
    folder = linked(models / "i2v", tmp_path / "model")
    spoil(folder)

    with pytest.raises(ValueError) as caught:
        load(folder)

    said = str(caught.value)
    assert str(folder) in said
    assert message in said
    assert "\n" not in said


# ---------------------------------------------------------------------------------- transformers
def test_a_transformer_has_one_type_of_weights_and_exact_angles(models):
    """diffusers would keep the time embedder and others in float32, which FSDP2 does not shard.

    Angles in bfloat16 would be wrong by a fifth of a radian at the 50th frame.
    """
    whole = diffusers.WanTransformer3DModel.from_pretrained(models / "t2v/transformer")

    net = wan_net.load_transformer(str(models / "t2v"), CPU, torch.bfloat16)

    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert same_weights(net, copy.deepcopy(whole).to(torch.bfloat16))
    assert net.rope.freqs_cos.dtype == torch.float32
    assert net.rope.freqs_cos.equal(whole.rope.freqs_cos)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def write_config(folder, **config):
    """A pipeline's folder that has no more than its transformer's config."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_teacher_of_the_same_widths_may_be_larger(tmp_path):
    """1.3B and 14B differ in depth and width, and a config may leave out what is as usual."""
    small = write_config(tmp_path / "1.3B", text_dim=4096, in_channels=16, num_layers=30)
    large = write_config(tmp_path / "14B", out_channels=16, image_dim=None, num_layers=40)
    wan_net.same_widths(small, large)
    wan_net.same_widths(large, small)


@pytest.mark.parametrize(
    "name, value", [("in_channels", 36), ("out_channels", 48), ("text_dim", 32), ("image_dim", 16)]
)
def test_a_teacher_of_other_widths_is_refused(tmp_path, name, value):
    """Image to video, Wan2.2's 5B and the tiny ones cannot see what the student sees."""
    model = write_config(tmp_path / "model")
    teacher = write_config(tmp_path / "teacher", **{name: value})
    with pytest.raises(ValueError, match=rf"{re.escape(teacher)} has {name} {value}, and .*choose"):
        wan_net.same_widths(model, teacher)


def louder(factor, _block, given):
    """A hook that multiplies what a block is given first."""
    return factor * given[0], *given[1:]


def test_blocks_are_compiled_to_one_program_and_hooks_stay_outside(net, monkeypatch):
    """Each block has a hook that gives it something of its own, as causal streams do.

    Were the hook compiled with its block, each block would be another program.
    """
    programs = []

    def backend(program, example):
        programs.append(program)
        return program.forward

    compile = torch.compile
    options = dict(fullgraph=True, backend=backend)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile(f, dynamic=dynamic, **options))
    for i, block in enumerate(net.blocks):
        block.register_forward_pre_hook(partial(louder, 1.5 + i))
    # monkeypatch would take the setting away when it undoes it
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8):
        before = wans_guess(net)

        wan_net.compile_blocks(net)

        assert_close(wans_guess(net), before)
        assert torch._dynamo.config.recompile_limit == 256
    assert len(programs) == 1


# ------------------------------------------------------------------------------ LoRAs to be trained
def test_a_lora_is_on_attention_and_feed_forward_in_float32(net):
    """alpha is the rank. The base stays frozen in its own type, and guesses as before."""
    before = wans_guess(net)
    net.bfloat16()

    wan_net.add_lora(net, rank=16)

    layers = running.adapters(net)
    of_attention = [f"{a}.to_{k}" for a in ("attn1", "attn2") for k in ("q", "k", "v", "out.0")]
    of_block = [*of_attention, "ffn.net.0.proj", "ffn.net.2"]
    assert layers.keys() == {f"blocks.{i}.{layer}" for i in range(2) for layer in of_block}
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    assert not any(layer.cast_input_dtype_enabled for layer in layers.values())
    types = {(p.requires_grad, p.dtype) for p in net.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in trained)
    assert len(trained) == 2 * len(layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(wans_guess(net).float(), before, rtol=0, atol=0.05)


# -------------------------------------------------------------------------------------------- exits
def codes():
    """The codes of the first of four exits, and of the last."""
    return wan_net.exit_code(1.0, 2, CPU), wan_net.exit_code(0.625, 2, CPU)


def test_a_transformer_that_is_told_exits_begins_as_it_was(net):
    """Its layer is 0 at first, and has a gradient from the first update on."""
    before = wans_guess(net)

    wan_net.tell_exits(net)
    first, _ = codes()
    told = wans_guess(net, first)
    told.square().mean().backward()

    assert told.equal(before)
    assert wans_guess(net).equal(before)
    gradient = net.condition_embedder.time_embedder.exit_proj.weight.grad
    assert gradient.any(1).all()


@torch.no_grad()
def learned(net):
    """A transformer that is told exits, whose layer is no longer 0."""
    wan_net.tell_exits(net)
    net.condition_embedder.time_embedder.exit_proj.weight.normal_()
    return net


@torch.no_grad()
def test_two_exits_are_two_guesses_once_the_layer_has_learned(net):
    """Outside of `told` the transformer is the one that knows of no exits."""
    plain = wans_guess(net)
    learned(net)
    first, last = codes()

    assert (wans_guess(net, first) - wans_guess(net, last)).abs().max() > 1e-3
    assert (wans_guess(net, first) - plain).abs().max() > 1e-3
    assert wans_guess(net).equal(plain)


@torch.no_grad()
def test_each_sample_is_told_its_own_exit(net):
    """The samples of a batch may come from two exits."""
    learned(net)
    first, last = codes()
    both = torch.stack([first[0], last[0]])

    assert_close(wans_guess(net, both)[0], wans_guess(net, first)[0])
    assert_close(wans_guess(net, both)[1], wans_guess(net, last)[1])


@torch.no_grad()
def test_an_exit_is_forgotten_after_an_exception(net):
    """The next call may be of another exit, or of the teacher that shares the weights."""
    plain = wans_guess(net)
    learned(net)

    with pytest.raises(KeyboardInterrupt), wan_net.told(net, codes()[0]):
        raise KeyboardInterrupt

    assert wans_guess(net).equal(plain)


@torch.no_grad()
def test_a_copy_is_told_its_own_exits(net):
    """Networks of a run are copies of one base; a hook that kept the first would mix them up."""
    learned(net)
    plain = wans_guess(net)
    twin = copy.deepcopy(net)
    twin.condition_embedder.time_embedder.exit_proj.weight.mul_(2)
    first, _ = codes()

    with wan_net.told(twin, first):
        assert wans_guess(net).equal(plain)
    assert (wans_guess(twin, first) - wans_guess(net, first)).abs().max() > 1e-3


def test_the_layer_is_a_float32_part_of_a_transformer_in_half_precision(net):
    """So it is saved, sharded and trained with it, by updates that bfloat16 would round away."""
    net.bfloat16()

    learned(net)

    name = "condition_embedder.time_embedder.exit_proj.weight"
    state = net.state_dict()
    assert state[name].dtype == torch.float32
    assert state[name].shape == (24, wan_net.EXIT_DIM)
    assert dict(net.named_parameters())[name].requires_grad
    first, last = codes()
    with torch.no_grad():
        assert wans_guess(net, first).dtype == torch.bfloat16
        assert (wans_guess(net, first) - wans_guess(net, last)).abs().max() > 1e-3
        with torch.autocast("cpu", torch.bfloat16):
            assert wans_guess(net, first).isfinite().all()


def test_a_transformer_is_told_exits_once(net):
    wan_net.tell_exits(net)
    with pytest.raises(ValueError, match="is told exits already"):
        wan_net.tell_exits(net)


def test_a_transformer_that_cannot_be_told_says_so(net):
    """A code that nothing adds would train a fake that knows of no exits."""
    with pytest.raises(ValueError, match="call tell_exits first"), wan_net.told(net, codes()[0]):
        pass


def test_codes_are_those_of_all_backbones():
    assert wan_net.exit_code is unet.exit_code
    assert wan_net.EXIT_DIM == unet.EXIT_DIM == 256


# ---------------------------------------------------------------------------------- random networks
def test_random_networks_are_in_the_default_type():
    """The full text encoder is 21 GiB in float32. Levels and angles are never in half precision."""
    with running.default_dtype(torch.bfloat16):
        pipe = tiny.wan_pipeline("tiny")
        images = tiny.wan_i2v_pipeline("tiny")
        net = tiny.wan_transformer("tiny")

    for part in (pipe.text_encoder, pipe.vae, images.image_encoder, images.transformer, net):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in part.parameters())
    assert pipe.transformer is None
    assert net.rope.freqs_cos.dtype == torch.float32


@pytest.mark.parametrize(
    "size, i2v, billions", [("1.3B", False, 1.42), ("14B", False, 14.29), ("14B", True, 16.40)]
)
def test_full_transformers_have_the_size_of_wans(size, i2v, billions):
    """The counts are those of the files on the hub. Nothing is allocated."""
    with torch.device("meta"):
        net = tiny.wan_transformer(size, i2v)
    count = sum(p.numel() for p in net.parameters())
    assert abs(count / 1e9 - billions) < 0.03
    assert net.config.in_channels == (36 if i2v else 16)


def test_the_full_pipeline_has_the_size_of_wans():
    """UMT5-XXL's encoder has 5.7 billion weights, and Wan's VAE 127 million."""
    with torch.device("meta"):
        pipe = tiny.wan_pipeline("full")
    sizes = [sum(p.numel() for p in net.parameters()) for net in (pipe.text_encoder, pipe.vae)]
    assert [round(size / 1e6) for size in sizes] == [5681, 127]
    assert pipe.scheduler.timesteps.device == CPU


def test_there_is_no_full_image_to_video():
    with pytest.raises(ValueError, match="no image to video of size full: choose tiny"):
        tiny.wan_i2v_pipeline("full")
