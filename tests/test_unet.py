"""parts/unet.py: pipelines that are read or refused, students of files, LoRAs, exits, a GAN's head.

The pipelines are diffusers' own, tiny and with random weights, saved as their models' folders are.
"""

import copy
import json

import diffusers
import huggingface_hub
import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.testing import assert_close

import running
from helpers import CPU
from parts import tiny, unet

torch.set_num_threads(1)  # the networks are small


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


def load(folder):
    """The pipeline of a folder, in float32."""
    return unet.load_pipeline(str(folder), CPU, default=torch.float32)


@torch.no_grad()
def guess(net):
    """The noise that SDXL's UNet sees in two latents, which are the same in each call."""
    x_t, t, c = given()
    return net(
        x_t,
        1000 * t,
        c["text"],
        added_cond_kwargs=unet.added(c),
    ).sample


def given(width=64):
    """Two noisy latents, their levels, and what SDXL's UNet is told of them."""
    numbers = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 4, 8, 8, generator=numbers)
    text = torch.randn(2, 77, width, generator=numbers)
    pooled = torch.randn(2, 32, generator=numbers)
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    return (
        x_t,
        torch.tensor([0.3, 0.7]),
        dict(
            text=text,
            pooled=pooled,
            ids=ids,
        ),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of an SDXL."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    tiny.sdxl_pipeline("tiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model):
    return load(model)


@pytest.fixture
def pipe(loaded):
    """The model's pipeline, whose UNet is each test's own."""
    return type(loaded)(**loaded.components | dict(unet=copy.deepcopy(loaded.unet)))


# ------------------------------------------------------------------------------- pipelines of files
@pytest.mark.parametrize("make", [tiny.sdxl_pipeline, tiny.sd15_pipeline])
def test_a_pipeline_is_loaded_frozen_in_the_types_of_its_parts(tmp_path, make):
    """The VAE of SDXL wants float32, where the rest is in half precision."""
    made = make("tiny")
    made.save_pretrained(tmp_path)

    pipe = unet.load_pipeline(
        str(tmp_path),
        CPU,
        default=torch.bfloat16,
        vae=torch.float32,
    )

    assert type(pipe) is type(made)
    nets = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    for name, net in nets.items():
        wanted = torch.float32 if name == "vae" else torch.bfloat16
        assert {p.dtype for p in net.parameters()} == {wanted}
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())
    for name, p in made.unet.state_dict().items():
        assert pipe.unet.state_dict()[name].equal(p.bfloat16())


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


def predict_v(folder):
    change(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")


def begin_at_noise(folder):
    change(folder / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)


def take_edm(folder):
    """As Playground v2.5 has it."""
    name = "EDMDPMSolverMultistepScheduler"
    change(folder / "model_index.json", scheduler=["diffusers", name])
    path = folder / "scheduler/scheduler_config.json"
    path.unlink()
    path.write_text(
        json.dumps(
            dict(
                _class_name=name,
                prediction_type="epsilon",
                sigma_max=80.0,
            )
        )
    )


def shift_latents(folder):
    change(
        folder / "vae/config.json",
        latents_mean=[0.1] * 4,
        latents_std=[8.0] * 4,
    )


def lose_unet(folder):
    for path in (folder / "unet").iterdir():
        path.unlink()
    (folder / "unet").rmdir()


def take_inpainting(folder):
    """Its UNet is told a mask and an image, too."""
    change(folder / "unet/config.json", in_channels=9)


def take_another_pipeline(folder):
    change(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")


def never_had_unet(folder):
    """PixArt, SD 3 and Flux have a transformer in its place."""
    old = json.loads((folder / "model_index.json").read_text())
    change(
        folder / "model_index.json",
        unet=[None, None],
        transformer=old["unet"],
    )
    (folder / "unet").rename(folder / "transformer")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (predict_v, "predicts v_prediction, not noise"),
        (begin_at_noise, "has rescale_betas_zero_snr"),
        (take_edm, "is of another family (EDMDPMSolverMultistepScheduler)"),
        (shift_latents, "is of another family (EulerDiscreteScheduler)"),
        (lose_unet, "has no unet"),
        (never_had_unet, "has no unet"),
        (take_inpainting, "takes 9 channels"),
        (take_another_pipeline, "is a StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_a_model_of_another_noise_or_kind_is_refused_in_a_line(model, tmp_path, spoil, message):
    """Each would train or draw, and be wrong: nothing else tells that its x_t is another.

    That is told before weights are read, for they may have to be downloaded: here there are none.
    """
    folder = linked(model, tmp_path / "model")
    spoil(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()

    with pytest.raises(ValueError) as caught:
        load(folder)

    said = str(caught.value)
    assert str(folder) in said
    assert message in said
    assert "\n" not in said


def test_a_model_that_cannot_be_had_is_told_from_one_that_is_wrong(monkeypatch):
    """Without a connection the hub's libraries blame a file's name."""
    # the module reads the environment when it is imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not be downloaded: check its name and your conn"):
        unet.index_of("nobody/nothing")


def test_a_folder_with_nothing_but_fp16_files_is_read(pipe, tmp_path):
    """SDXL downloaded with --include '*.fp16.safetensors' has no others."""
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert unet.variant_of(tmp_path / "unet") == "fp16"

    assert guess(load(tmp_path).unet).equal(guess(pipe.unet))


def test_a_sharded_unet_is_read(model, pipe, tmp_path):
    """diffusers splits the weights of large networks into several files, with an index."""
    folder = linked(model, tmp_path / "model")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet/config.json").unlink()
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="300KB")
    assert len([*(folder / "unet").glob("*.safetensors")]) > 2

    assert guess(load(folder).unet).equal(guess(pipe.unet))


# ---------------------------------------------------------------------------------- UNets and LoRAs
TARGETS = ["to_q", "to_out.0", "ff.net.2", "conv1", "downsamplers.0.conv"]  # linear, convolution


def other(net):
    """A UNet like net, with other weights."""
    net = copy.deepcopy(net)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


def test_a_folder_of_a_unet_is_a_student(pipe, tmp_path):
    """It is put in the place of the teacher, in whatever files diffusers has written it."""
    net = other(pipe.unet)
    ways = dict(
        plain={},
        fp16=dict(variant="fp16"),
        sharded=dict(max_shard_size="300KB"),
        fp16_sharded=dict(variant="fp16", max_shard_size="300KB"),
        bin=dict(safe_serialization=False),
    )
    teacher = guess(pipe.unet)
    for name, options in ways.items():
        net.save_pretrained(tmp_path / name, **options)

        unet.adopt(pipe, tmp_path / name)

        assert guess(pipe.unet).equal(guess(net)), name
    assert not guess(net).equal(teacher)


def test_the_folder_of_a_run_is_read_for_its_student(pipe, tmp_path):
    """It has a config.json of its own, which is not a UNet's."""
    net = other(pipe.unet)
    running.open_run(tmp_path / "run", dict(lr=1))
    net.save_pretrained(tmp_path / "run/student")

    unet.adopt(pipe, tmp_path / "run")

    assert guess(pipe.unet).equal(guess(net))


def with_lora(net, **options):
    """net with a random LoRA of rank 4 and alpha 2, whose scale is 2 / 4, by peft."""
    config = (
        dict(
            r=4,
            lora_alpha=2,
            target_modules=TARGETS,
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
    """A LoRA by the names of the UNet's layers, with a scale in B."""
    state = get_peft_model_state_dict(adapted)
    state = {k.removeprefix("base_model.model."): v.detach() for k, v in state.items()}
    return {k: v * scale if ".lora_B." in k else v for k, v in state.items()}


def save_as_peft(adapted, folder):
    """peft's own way, whose alpha is in adapter_config.json."""
    adapted.save_pretrained(folder)


def save_bare(adapted, folder):
    """The names of the UNet's layers, of a LoRA whose scale is 1."""
    save_file(keys_of(adapted, scale=0.5), folder / "bare.safetensors")


def save_as_diffusers(adapted, folder):
    """diffusers' way, whose alpha is in the file's header."""
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        folder,
        keys_of(adapted),
        unet_lora_adapter_metadata=adapted.peft_config["default"].to_dict(),
    )


def save_as_diffusers_examples(adapted, folder):
    """As its training scripts do for attention, with no such header: alpha is the rank."""
    state = convert_state_dict_to_diffusers(keys_of(adapted, scale=0.5))
    diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, state)


def save_with_texts(adapted, folder):
    """As DreamBooth's script does where it trains a text encoder, too."""
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        folder, keys_of(adapted, scale=0.5), text_encoder_lora_layers=lora_of_texts()
    )


def save_as_kohya(adapted, folder):
    """lora_unet_LAYER, with underscores for dots, down and up for A and B, and an alpha a layer."""
    state = {}
    for k, v in keys_of(adapted).items():
        layer, half = k.split(".lora_")
        name = f"lora_unet_{layer.replace('.', '_')}"
        state[f"{name}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = v.contiguous()
        state[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(state, folder / "kohya.safetensors")


@pytest.mark.parametrize(
    "save, options",
    [
        (save_as_peft, {}),
        (save_as_peft, dict(use_rslora=True, r=16, lora_alpha=3)),
        (save_as_peft, dict(rank_pattern=dict(to_q=7))),
        (save_as_peft, dict(use_dora=True)),
        (save_bare, {}),
        (save_as_diffusers, {}),
        (save_as_diffusers, dict(use_dora=True)),
        (save_as_diffusers_examples, dict(target_modules=["to_q", "to_k", "to_v", "to_out.0"])),
        (save_with_texts, {}),
        (save_as_kohya, {}),
    ],
)
def test_a_lora_is_all_there_whoever_wrote_it(pipe, tmp_path, save, options):
    """The UNet guesses what the one guesses that peft made, so no layer and no scale is lost.

    A LoRA that does not arrive draws the teacher's images, and nobody is told.
    """
    adapted = with_lora(pipe.unet, **options)
    save(adapted, tmp_path)
    wanted = guess(adapted.base_model.model)
    assert (wanted - guess(pipe.unet)).abs().max() > 0.1

    unet.adopt(pipe, tmp_path)

    assert_close(guess(pipe.unet), wanted, rtol=0, atol=1e-4)


def test_a_lora_may_be_given_by_its_file(pipe, tmp_path):
    """Two of them are in one folder, as people keep them."""
    first, second = with_lora(pipe.unet), with_lora(pipe.unet)
    save_as_kohya(first, tmp_path)
    save_bare(second, tmp_path)

    unet.adopt(pipe, tmp_path / "kohya.safetensors")

    assert_close(guess(pipe.unet), guess(first.base_model.model), rtol=0, atol=1e-4)


# ----------------------------------------------------------------------- what is no student of ours
def write_no_lora(pipe, folder):
    save_file(dict(weight=torch.zeros(2)), folder / "x.safetensors")


def write_wider_lora(pipe, folder):
    """Of SDXL's layers, for texts of another width."""
    state = keys_of(with_lora(pipe.unet, target_modules=["attn2.to_k"]))
    wider = {k: torch.zeros(len(v), 96) if ".lora_A." in k else v for k, v in state.items()}
    diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, wider)


def write_lora_of_which_half_is_lost(pipe, folder):
    """diffusers' converter renames the layers of attention, and its reader takes these alone."""
    state = convert_state_dict_to_diffusers(keys_of(with_lora(pipe.unet)))
    diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, state)


def lora_of_texts():
    """A LoRA of a text encoder."""
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        init_lora_weights=False,
    )
    return keys_of(peft.get_peft_model(tiny.clip_text("tiny"), config))


def write_lora_of_texts(pipe, folder):
    state = lora_of_texts()
    diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, text_encoder_lora_layers=state)


def write_kohyas_lora_of_texts(pipe, folder):
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    state = {f"{layer}.lora_down.weight": torch.ones(4, 32)}
    state |= {f"{layer}.lora_up.weight": torch.ones(32, 4), f"{layer}.alpha": torch.tensor(4.0)}
    save_file(state, folder / "x.safetensors")


def write_nothing(pipe, folder):
    pass


def write_two(pipe, folder):
    save_bare(with_lora(pipe.unet), folder)
    save_as_kohya(with_lora(pipe.unet), folder)


def write_alphas_of_layers(pipe, folder):
    save_as_peft(with_lora(pipe.unet, alpha_pattern=dict(to_q=3)), folder)


def write_unet_of_sd15(pipe, folder):
    tiny.sd15_pipeline("tiny").unet.save_pretrained(folder)


def write_half_a_file(pipe, folder):
    save_bare(with_lora(pipe.unet), folder)
    path = folder / "bare.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    "write, message",
    [
        (write_no_lora, "no LoRA has keys such as weight"),
        (write_wider_lora, "size mismatch"),
        (write_lora_of_which_half_is_lost, "17 of its 49 layers are this UNet's"),
        (write_lora_of_texts, "it has no layer of a UNet"),
        (write_kohyas_lora_of_texts, "it has no layer of a UNet"),
        (write_nothing, "it has 0 .safetensors, where one is wanted"),
        (write_two, "it has 2 .safetensors, where one is wanted"),
        (write_alphas_of_layers, "its layers have alphas of their own"),
        (write_unet_of_sd15, "its texts are of another width"),
        (write_half_a_file, "invalid header length"),
    ],
)
def test_what_is_no_student_is_refused_in_a_line(pipe, tmp_path, write, message):
    """It names the folder and the reason, and never draws by the teacher instead."""
    folder = tmp_path / "given"
    folder.mkdir()
    write(pipe, folder)

    with pytest.raises(ValueError) as caught:
        unet.adopt(pipe, folder)

    said = str(caught.value)
    assert said.startswith(f"{folder} is no student of --model")
    assert message in said or message in repr(caught.value.__context__)
    assert "\n" not in said
    assert len(said) < len(str(folder)) + 250


def test_a_student_that_is_not_there_is_named(pipe, tmp_path):
    with pytest.raises(ValueError, match="nowhere is no student"):
        unet.adopt(pipe, tmp_path / "nowhere")


# ------------------------------------------------------------------------------ LoRAs to be trained
DMD2_LAYERS = [  # main/sd_unified_model.py of DMD2
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
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


def test_a_lora_is_on_dmd2s_layers_in_float32_with_dmd2s_scale():
    """alpha is 8 at any rank. The base stays frozen in its own type, and guesses as before."""
    net = tiny.sdxl_unet("tiny")
    before = guess(net)
    of_dmd2 = {
        name
        for name, module in net.named_modules()
        if any(name.endswith(f".{layer}") for layer in DMD2_LAYERS)
    }
    net.bfloat16()

    unet.add_lora(net, rank=16)

    layers = running.adapters(net)
    assert layers.keys() == of_dmd2
    assert len(of_dmd2) > 50
    assert {layer.scaling["default"] for layer in layers.values()} == {8 / 16}
    types = {(p.requires_grad, p.dtype) for p in net.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in trained)
    assert len(trained) == 2 * len(layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(guess(net).float(), before, rtol=0, atol=0.05)


# -------------------------------------------------------------------------------------------- exits
def test_a_unet_that_is_told_exits_begins_as_it_was():
    """Its layer is 0 at first, and has a gradient from the first update on."""
    net = tiny.sdxl_unet("tiny")
    before = guess(net)
    x_t, t, c = given()

    unet.tell_exits(net)
    code = unet.exit_code(0.749, 2, CPU)
    told = net(
        x_t,
        1000 * t,
        c["text"],
        added_cond_kwargs=unet.added(c),
        timestep_cond=code,
    ).sample
    told.square().mean().backward()

    assert told.equal(before)
    assert guess(net).equal(before)
    gradient = net.time_embedding.cond_proj.weight.grad
    assert gradient.any(0).all()


def test_two_exits_are_two_guesses_once_the_layer_has_learned():
    net = tiny.sdxl_unet("tiny")
    unet.tell_exits(net)
    net.time_embedding.cond_proj.weight.data.normal_()
    x_t, t, c = given()
    more = dict(added_cond_kwargs=unet.added(c))

    with torch.no_grad():
        first, last, none = (
            net(
                x_t,
                1000 * t,
                c["text"],
                timestep_cond=code,
                **more,
            ).sample
            for code in (
                unet.exit_code(
                    0.999,
                    2,
                    CPU,
                ),
                unet.exit_code(0.249, 2, CPU),
                None,
            )
        )

    assert (first - last).abs().max() > 1e-3
    assert (first - none).abs().max() > 1e-3


def test_an_exits_code_is_of_its_level_alone():
    """All samples of an update have one exit. Levels of 4 and of 8 steps are told apart."""
    levels = [0.999 - i / 8 for i in range(8)]

    codes = [unet.exit_code(level, 3, CPU) for level in levels]

    for code in codes:
        assert code.shape == (3, unet.EXIT_DIM)
        assert code.dtype == torch.float32
        assert code[0].equal(code[1])
        assert code[0].equal(code[2])
    apart = torch.pdist(torch.stack([code[0] for code in codes]))
    assert apart.min() > 1


def test_a_unet_with_such_an_input_of_its_own_cannot_be_told_exits():
    """Consistency models are told their CFG scale by it."""
    net = tiny.sdxl_unet("tiny")
    unet.tell_exits(net)

    with pytest.raises(ValueError, match="has a timestep_cond of its own"):
        unet.tell_exits(net)


# ----------------------------------------------------------------------------------- the GAN's head
@pytest.mark.parametrize("side, halvings", [(4, 0), (8, 1), (16, 2), (32, 3)])
def test_the_gans_head_makes_one_number_of_any_bottleneck(side, halvings):
    """At 1024 pixels SDXL's is 32 wide, and DMD2 halves it three times before it takes it whole."""
    head = unet.gan_head(32, side)

    convs = [layer for layer in head if isinstance(layer, torch.nn.Conv2d)]
    assert [conv.stride[0] for conv in convs] == [2] * halvings + [1, 1]
    assert [conv.kernel_size[0] for conv in convs] == [4] * (halvings + 1) + [1]
    assert head(torch.randn(2, 32, side, side)).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("side", [0, 1, 2, 3, 12, 24])
def test_a_bottleneck_that_is_no_power_of_2_is_refused(side):
    with pytest.raises(ValueError, match=f"dmd2's bottleneck is {side} wide: choose --image-size"):
        unet.gan_head(32, side)


@pytest.mark.parametrize("make", [tiny.sdxl_unet, lambda size: tiny.sd15_pipeline(size).unet])
def test_logits_are_the_heads_of_the_middle_block(make):
    """The middle block's output is read by a hook, of a whole call of the UNet, without an exit."""
    net = make("tiny")
    x_t, t, c = given(net.config.cross_attention_dim)
    if not net.config.addition_embed_type:
        c = dict(text=c["text"])
    unet.tell_exits(net)
    net.time_embedding.cond_proj.weight.data.normal_()
    unet.add_gan_head(net, side=8)
    seen = []
    net.mid_block.register_forward_hook(lambda _module, _given, h: seen.append(h))

    with torch.no_grad():
        net(
            x_t,
            (1000 * t).round(),
            c["text"],
            added_cond_kwargs=unet.added(c),
        )
        logits = net.logits(x_t, t, c)

    assert logits.shape == (2,)
    assert_close(logits, net.head(seen[0]).flatten())
    assert logits[0] != logits[1]


def test_the_head_computes_in_float32_on_a_unet_in_half():
    """As DMD2's does. A LoRA's base is in bfloat16 on a GPU."""
    net = tiny.sdxl_unet("tiny").bfloat16()
    unet.add_gan_head(net, side=8)
    x_t, t, c = given()
    c = {k: v.bfloat16() for k, v in c.items()}
    types = []
    for layer in (net.mid_block, *net.head):
        layer.register_forward_hook(lambda _module, _given, h: types.append(h.dtype))

    with torch.no_grad():
        logits = net.logits(x_t.bfloat16(), t, c)

    assert types == [torch.bfloat16] + [torch.float32] * len(net.head)
    assert logits.dtype == torch.float32
