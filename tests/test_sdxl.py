"""sdxl.py: DMD2's update, LoRAs, exits, texts, the reward, whole runs, samples, bad input.

Everything runs on the CPU, on tiny networks of diffusers' own classes with random weights. What is
in parts/ has tests of its own.
"""

import contextlib
import copy
import json
import re
import resource
import shutil
from functools import partial, partialmethod
from pathlib import Path
from typing import NamedTuple

import bitsandbytes  # noqa: F401, forks need not import again what is imported here
import diffusers
import matplotlib.figure  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision.transforms import functional as V

import amd
import running
import sdxl
from helpers import CPU, ROOT, picture, pictures, read_log, run_main, survive
from parts import judges, rewards, tiny, unet

torch.set_num_threads(1)  # the networks are small

SCALING = 0.13025  # of SDXL's latents


@pytest.fixture(autouse=True)
def clean_start(tmp_path, monkeypatch):
    """Each test begins in an empty folder, with the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def arguments(*flags):
    """The arguments of a run on tiny networks, which need no download."""
    return sdxl.parse(["--dry-run", "tiny", "--no-compile", *map(str, flags)])


def prepare(*flags):
    """A run that is ready to train: its networks, closures and optimizers."""
    return sdxl.prepare(arguments(*flags), CPU)


# -------------------------------------------------------------------------------------------- flags
def test_the_recipe_is_dmd2s_for_sdxl():
    args = sdxl.parse([])

    assert args.model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (args.w, args.student_steps, args.fake_steps) == (8, 4, 5)
    assert (args.batch, args.steps, args.accum) == (128, 3800, 16)
    assert args.lr == args.fake_lr == 5e-7
    assert (args.ema, args.lora_rank, args.lam) == (0, 0, 0)
    assert sdxl.timesteps(args) == [999, 749, 499, 249]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """The folder of a Stable Diffusion 1.5, as diffusers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sd15"
    tiny.sd15_pipeline("tiny").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["name", "hub", "folder"])
def test_the_recipe_is_dmd2s_for_sd15(sd15, how):
    """One step. Its model may be called by its short name, by the hub's, or by a folder."""
    hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    given = dict(name="sd15", hub=hub, folder=str(sd15))[how]

    args = sdxl.parse(["--model", given])
    dmd2 = sdxl.parse(["--model", given, "--method", "dmd2"])

    assert args.model == (str(sd15) if how == "folder" else hub)
    assert (args.w, args.student_steps, args.fake_steps) == (1.75, 1, 10)
    assert (args.batch, args.accum) == (2048, 256)
    assert args.lr == args.fake_lr == 1e-5
    assert dmd2.lam == 1e-3
    assert sdxl.timesteps(args) == [999]


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--method dmd2", dict(lam=5e-3)),
        ("--method dmdr", dict(lam=3e-3)),
        ("--method dmdr --model sd15", dict(lam=3e-3)),
        ("--method dmd2 --lam .1", dict(lam=0.1)),
        (
            "--model sd15 --w 3 --batch 64 --lr 1e-6",
            dict(
                w=3,
                batch=64,
                accum=8,
                fake_lr=1e-6,
            ),
        ),
        ("--model sd15 --student-steps 2 --fake-steps 3", dict(student_steps=2, fake_steps=3)),
        ("--lora-rank 64", dict(lr=5e-5, fake_lr=sdxl.LORA_FAKE_LR)),
        ("--lora-rank 64 --lr 1e-5", dict(lr=1e-5, fake_lr=sdxl.LORA_FAKE_LR)),
        ("--model sd15 --lora-rank 8", dict(lr=5e-5, fake_lr=sdxl.LORA_FAKE_LR)),
        (
            "--dry-run tiny",
            dict(
                model=None,
                batch=8,
                steps=4,
                out=Path("runs/tiny"),
            ),
        ),
        ("--dry-run tiny --batch 16 --fake-steps 7", dict(batch=16, fake_steps=7)),
        ("sample", dict(out=Path("runs/samples"), chunk=8)),
    ],
)
def test_a_flag_that_is_given_counts_and_others_follow_it(flags, wanted):
    args = sdxl.parse(flags.split())

    assert {name: getattr(args, name) for name in wanted} == wanted


def test_dmdrs_teacher_is_itself_again_after_half_of_the_updates():
    method = sdxl.method_of(
        arguments(
            "--method",
            "dmdr",
            "--steps",
            100,
        )
    )

    assert method.phi(0) == 0.375
    assert 0 < method.phi(49) < 0.01
    assert method.phi(50) == 0
    assert method.lam == 3e-3


def test_a_tau_below_1_weighs_losses_by_1_on_average():
    assert not sdxl.method_of(arguments()).unit_w
    assert sdxl.method_of(arguments("--tau", 0.5)).unit_w


# ------------------------------------------------------------------------------------ DMD2's update
class DMD2:
    """One update in DMD2's own equations: the oracle of sdxl.py.

    It calls whole UNets, and diffusers' scheduler adds the noise; nothing of amd.py is in it but
    the seeds of the draws, which are where the docstring of amd.train says. It copies the student
    and the fake teacher, so it must be made before sdxl.py trains them. Time steps i are DDPM's, 0
    to 999; c are the conditions of two groups of four samples.
    """

    def __init__(self, run, images):
        self.grid = diffusers.DDPMScheduler.from_config(run.pipe.scheduler.config)
        self.real = run.nets["real"]
        self.student = copy.deepcopy(run.nets["student"])
        self.fake = copy.deepcopy(run.nets["fake"])
        self.fake.mid_block.register_forward_hook(self.keep_bottleneck)
        self.vae = run.pipe.vae
        self.images = images
        self.c = run.batch(0, 0)

        shared = torch.Generator().manual_seed(amd.key(0, 0))
        self.exit = int(4 * torch.rand((), generator=shared).item())
        level = torch.rand(
            2,
            generator=shared,
            dtype=torch.float64,
        )  # one for each group
        self.i = (20 + 960 * level.repeat_interleave(4)).round().long()

        torch.manual_seed(amd.key(0, 0, 0, 0))
        self.x = self.backward_simulation()
        self.eps = torch.randn_like(self.x)

    def keep_bottleneck(self, _module, _inputs, output):
        self.bottleneck = output

    def predict_eps(self, net, x_t, i, empty=False):
        """The noise that a UNet sees.

        SDXL reads the image's size, where it was cropped, and the size to draw; its empty prompt is
        an embedding of zeros, not that of "".
        """
        given = 0 if empty else 1
        added = dict(
            text_embeds=given * self.c["pooled"],
            time_ids=torch.tensor([[64, 64, 0, 0, 64, 64]] * 8),
        )
        return net(
            x_t,
            i,
            given * self.c["text"],
            added_cond_kwargs=added,
        ).sample

    def predict_x0(self, net, x_t, i):
        """The clean sample that a UNet sees."""
        return self.x0_of(x_t, i, self.predict_eps(net, x_t, i))

    def x0_of(self, x_t, i, eps):
        """The clean sample of which x_t is the noisy one, if eps is its noise."""
        abar = self.grid.alphas_cumprod[i].view(-1, 1, 1, 1)
        return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()

    def logit(self, x):
        """The discriminator: a head on what the fake's middle block makes of a noisy x."""
        self.predict_eps(
            self.fake,
            self.grid.add_noise(x, self.eps, self.i),
            self.i,
        )
        return self.fake.head(self.bottleneck).flatten()

    def backward_simulation(self):
        """The student's sample: only the call at the exit carries a gradient."""
        steps = [torch.full((8,), i) for i in (999, 749, 499, 249)]
        x_t = torch.randn(8, 4, 8, 8)
        for k in range(self.exit):
            with torch.no_grad():
                x = self.predict_x0(self.student, x_t, steps[k])
                x_t = self.grid.add_noise(
                    x,
                    torch.randn_like(x),
                    steps[k + 1],
                )
        return self.predict_x0(self.student, x_t, steps[self.exit])

    @torch.no_grad()
    def real_latents(self):
        """The images whose texts are the prompts, as squares of 64 pixels in [-1, 1], encoded."""
        latents = []
        for j in self.c["index"].tolist():
            image = picture(self.images / f"{j}.png")
            image = V.resize(image, 64, V.InterpolationMode.BICUBIC)
            pixels = 2 * V.to_tensor(V.center_crop(image, 64)) - 1
            latents.append(self.vae.encode(pixels[None]).latent_dist.mean * SCALING)
        return torch.cat(latents)

    @torch.no_grad()
    def distribution_matching(self):
        """The gradient at x that DMD divides by the mean |p_real| of each sample.

        The real teacher is under a CFG scale of 8, the fake teacher under none.
        """
        x_t = self.grid.add_noise(self.x, self.eps, self.i)
        with_prompt = self.predict_eps(self.real, x_t, self.i)
        without = self.predict_eps(self.real, x_t, self.i, empty=True)
        guided = without + 8 * (with_prompt - without)
        p_real = self.x - self.x0_of(x_t, self.i, guided)
        p_fake = self.x - self.predict_x0(self.fake, x_t, self.i)
        return (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)

    def student_loss(self):
        """Its gradient at x is that of distribution matching, plus the generator's of the GAN.

        The weight of the GAN is DMD2's for SDXL.
        """
        target = (self.x - self.distribution_matching()).detach()
        return 0.5 * F.mse_loss(self.x, target) + 5e-3 * F.softplus(-self.logit(self.x)).mean()

    def fake_loss(self):
        """The loss of a diffusion model on the student's samples, plus the discriminator's.

        The weight of the GAN is DMD2's for SDXL.
        """
        x = self.x.detach()
        x_t = self.grid.add_noise(x, self.eps, self.i)
        denoising = F.mse_loss(
            self.predict_eps(
                self.fake,
                x_t,
                self.i,
            ),
            self.eps,
        )
        gan = F.softplus(self.logit(x)) + F.softplus(-self.logit(self.real_latents()))
        return denoising + 1e-2 * gan.mean()


class Update(NamedTuple):
    """What an update did to the student and to the fake teacher, and what it should have done."""

    oracle: DMD2
    log: dict
    steps: dict[str, list]  # by network, what was taken from each parameter
    wanted: dict[str, list]


@pytest.fixture(scope="module")
def dmd2(tmp_path_factory):
    """One update of sdxl.py with --method dmd2, beside its oracle.

    SGD with a rate of 1 takes the gradient itself from the parameters. The head of the GAN is large
    here, for its part in the gradients to be seen.
    """
    torch.manual_seed(0)
    images = tmp_path_factory.mktemp("dmd2") / "real"
    pictures(images)
    run = prepare(
        *("--method", "dmd2", "--real-data", images),
        *("--lora-rank", 0, "--group", 4, "--no-exit-aware"),
    )
    for p in run.nets["fake"].head.parameters():
        p.data.normal_(0, 0.1)

    oracle = DMD2(run, images)
    wanted = dict(
        student=torch.autograd.grad(oracle.student_loss(), [*oracle.student.parameters()]),
        fake=torch.autograd.grad(oracle.fake_loss(), [*oracle.fake.parameters()]),
    )

    nets = {name: run.nets[name] for name in wanted}
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items()}
    sgd = {name: torch.optim.SGD(net.parameters(), 1.0) for name, net in nets.items()}
    updates = run.train(
        opt_student=sgd["student"],
        opt_fake=sgd["fake"],
        fake_steps=1,
        update=partial(amd.update, clip=1e9),
    )
    log = next(updates)

    steps = {}
    for name, net in nets.items():
        pairs = zip(before[name], net.parameters(), strict=True)
        steps[name] = [old - p.detach() for old, p in pairs]
    return Update(oracle, log, steps, wanted)


@pytest.mark.parametrize("name", ["student", "fake"])
def test_an_update_of_dmd2_is_its_definition(dmd2, name):
    """Every parameter moves by the gradient that autograd gives for DMD2's own loss.

    The exit must not be the first, else backward simulation would not be tested.
    """
    assert dmd2.oracle.exit > 0
    assert dmd2.log["skipped"] == 0
    for step, gradient in zip(
        dmd2.steps[name],
        dmd2.wanted[name],
        strict=True,
    ):
        assert_close(step, gradient, rtol=1e-3, atol=1e-5)


def test_a_group_shares_its_prompt(dmd2):
    first, second = dmd2.oracle.c["index"].view(2, 4)
    assert len(first.unique()) == len(second.unique()) == 1
    assert first[0] != second[0]


# -------------------------------------------------------------------------------------------- exits
@torch.no_grad()
def look(run, name, x_t, **more):
    """What a network of a run makes of x_t, for the first conditions of the run."""
    t = torch.ones(len(x_t)) / 3
    c = {k: v[: len(x_t)] for k, v in run.batch(0, 0).items()}
    return run.denoise[name](x_t, t, c | more)


@pytest.mark.parametrize("rank", [0, 4])
def test_an_exit_aware_fake_begins_as_the_plain_one(rank):
    """--exit-aware adds one layer to the fake, which is 0 at first, and nothing to the others."""
    plain = prepare(
        "--lora-rank",
        rank,
        "--method",
        "dmdr",
        "--no-exit-aware",
    )
    aware = prepare("--lora-rank", rank, "--method", "dmdr")
    x_t = torch.randn(2, 4, 8, 8)
    code = unet.exit_code(0.749, 2, CPU)

    told = look(aware, "fake", x_t, exit=code)

    assert told.equal(look(plain, "fake", x_t))
    assert plain.train.keywords["aware"] is None
    new = running.tensors(aware.parts).keys() - running.tensors(plain.parts).keys()
    assert new == {"fake.net.time_embedding.cond_proj.weight"}
    for name in ("student", "real"):
        assert aware.nets[name].time_embedding.cond_proj is None


def test_a_fake_of_one_exit_is_told_none():
    """It would be one more bias, and a key more in the checkpoint."""
    run = prepare("--student-steps", 1)

    assert run.train.keywords["aware"] is None
    assert run.nets["fake"].time_embedding.cond_proj is None


# -------------------------------------------------------------------------------------------- LoRAs
class Looks(NamedTuple):
    """Guesses of the networks of a run at one x_t, before two updates and after.

    told has, by network, what its calls in these updates were told of an exit.
    """

    run: sdxl.Run
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    told: dict[str, list]
    logs: list[dict]


@pytest.fixture(scope="module")
def adapted():
    """Two updates of DMDR with LoRAs.

    It has all four networks: real, student, fake, and the blended teacher between real and fake.
    """
    torch.manual_seed(0)
    flags = "--method dmdr --lora-rank 4 --lr 1e-2 --fake-lr 2e-2 --batch 4 --group 2 --accum 2"
    run = prepare(*flags.split())
    x_t = torch.randn(2, 4, 8, 8)
    before = {
        name: look(
            run,
            name,
            x_t,
        )
        for name in ("real", "student", "fake")
    }

    told = {name: [] for name in run.nets}

    def note(net, _args, given):
        (name,) = [k for k, v in run.nets.items() if v is net]
        told[name].append(given["timestep_cond"])

    hooks = [net.register_forward_pre_hook(note, with_kwargs=True) for net in run.nets.values()]
    updates = run.train()
    logs = [next(updates) for _ in range(2)]
    for hook in hooks:
        hook.remove()

    after = {
        name: look(
            run,
            name,
            x_t,
        )
        for name in ("real", "student", "fake")
    }
    adapt = run.train.keywords["adapt"]
    for r in (0, 1):
        adapt(r)
        after[f"blended, r = {r}"] = look(run, "blended", x_t)
    return Looks(run, before, after, told, logs)


def test_two_updates_with_loras_are_finite(adapted):
    assert [log["skipped"] for log in adapted.logs] == [0, 0]


@pytest.mark.parametrize("name", ["student", "fake"])
def test_a_lora_stands_on_the_teachers_own_weights(adapted, name):
    """It holds the very tensors of the teacher beside its own, and begins as the teacher."""
    teachers = {id(p) for p in adapted.run.nets["real"].parameters()}
    own = {id(p) for p in adapted.run.nets[name].parameters()}
    assert teachers < own
    assert adapted.before[name].equal(adapted.before["real"])


def test_training_loras_leaves_the_teacher_alone(adapted):
    """The teacher says what it said, bit for bit, while student and fake go ways of their own.

    So no network sees an adapter of another, though all of them share one base.
    """
    before, after = adapted.before, adapted.after
    assert after["real"].equal(before["real"])
    assert (after["student"] - before["real"]).abs().max() > 1e-4
    assert (after["fake"] - after["student"]).abs().max() > 1e-4


def test_the_adapted_teacher_goes_from_the_teacher_to_the_fake(adapted):
    """DMDR and MagicDistillation move the teacher's weights to the fake's by r in [0, 1].

    With a LoRA that is the fake's own adapter, scaled by r.
    """
    assert adapted.after["blended, r = 0"].equal(adapted.after["real"])
    assert adapted.after["blended, r = 1"].equal(adapted.after["fake"])


def test_the_fake_alone_is_told_of_exits(adapted):
    """All calls of the fake are, of the exit of their iteration, and no call of another network.

    The layer that it is told by has learned, and a fake that is told hears it.
    """
    told = adapted.told
    assert len(told["fake"]) == 2 * 2 * 2  # updates, fake updates in each, micro-batches
    assert told["student"]
    assert told["blended"]
    for name in ("student", "real", "blended"):
        assert {v is None for v in told[name]} <= {True}
    levels = [i / 1000 for i in (999, 749, 499, 249)]
    codes = [unet.exit_code(level, 2, CPU) for level in levels]
    found = [[code.equal(v) for code in codes].index(True) for v in told["fake"]]
    assert found[0::2] == found[1::2]  # the micro-batches of an iteration have one exit
    exits = {found[4 * i] + 1 for i in range(2)}
    logged = {int(k[-1]) for log in adapted.logs for k in log if k.startswith("reward_exit_")}
    assert logged == exits

    assert adapted.run.nets["fake"].time_embedding.cond_proj.weight.any(1).all()
    x_t = torch.randn(2, 4, 8, 8)
    by_exit = [
        look(
            adapted.run,
            "fake",
            x_t,
            exit=code,
        )
        for code in codes
    ]
    assert (by_exit[0] - by_exit[3]).abs().max() > 1e-4


def test_a_checkpoint_of_loras_holds_no_weight_of_the_teacher(adapted):
    """Only adapters and the layer of exits are saved, and optimizers' states, named by number."""
    names = running.tensors(adapted.run.parts)
    weights = [name for name in names if ".opt." not in name]
    others = [name for name in weights if "lora" not in name]
    assert len(weights) > 100
    assert others == ["fake.net.time_embedding.cond_proj.weight"]


def moved_by_ten_updates(*flags):
    """How far a fake's weights go in ten updates of its own loss, by layer: root mean squares.

    It is `train` itself with a student that stands still, so the batches are alike in each call.
    """
    still = ["--method", "dmd", "--no-exit-aware", "--fake-steps", 10, "--lr", 1e-12]
    run = prepare("--batch", 4, "--group", 2, *still, *flags)
    net = run.nets["fake"]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    next(run.train())

    layers = running.adapters(net)
    if layers:
        moves = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    else:
        moves = {
            name.removesuffix(".weight"): p - before[name] for name, p in net.named_parameters()
        }
    return {name: move.detach().square().mean().sqrt() for name, move in moves.items()}


def test_a_lora_fake_moves_as_far_as_dmd2s_whole_fake():
    """DMD2 trains a LoRA student against a whole fake, at 5e-5; ours is a LoRA at LORA_FAKE_LR.

    The measure is the median over layers of what its weights moved by, relative to a whole fake's.
    """
    whole = moved_by_ten_updates("--lora-rank", 0, "--fake-lr", 5e-5)
    lora = moved_by_ten_updates("--lora-rank", 64)

    ratio = torch.stack([move / whole[name] for name, move in lora.items()]).median().item()
    print(f"a LoRA fake at {sdxl.LORA_FAKE_LR:g} moves {ratio:.2f} times as far as a whole one")
    assert len(lora) > 50
    assert 0.5 < ratio < 2


# -------------------------------------------------------------------------------------------- texts
@pytest.fixture(scope="module")
def pipes():
    """The two pipelines, by name."""
    torch.manual_seed(0)
    return dict(sdxl=tiny.sdxl_pipeline("tiny"), sd15=tiny.sd15_pipeline("tiny"))


PROMPTS = [f"a fox {i}" for i in range(5)]


def texts_of(pipe, *flags):
    """The texts of five prompts."""
    return sdxl.Texts(arguments(*flags), pipe, PROMPTS, CPU)


def noted(monkeypatch, owner, name):
    """A list that gets the first argument of each call of a method, which works as before."""
    method = getattr(owner, name)
    calls = []

    def note(first, *others, **options):
        calls.append(first)
        return method(first, *others, **options)

    monkeypatch.setattr(owner, name, note)
    return calls


def test_a_prompt_is_encoded_once_an_update(monkeypatch):
    """However many iterations and micro-batches of the update draw it. Other updates come anew."""
    run = prepare("--fake-steps", 3, "--accum", 2, "--group", 2)
    calls = noted(monkeypatch, run.pipe, "encode_prompt")

    for update in (5, 6):
        calls.clear()
        drawn = [run.batch(3 * update + i, j)["index"] for i in range(3) for j in range(2)]

        wanted = [run.texts.prompts[i] for i in torch.cat(drawn).unique().tolist()]
        assert len(wanted) > 3
        assert calls == [[prompt] for prompt in wanted]


def test_the_encoders_visit_the_gpu_once_an_update(monkeypatch):
    """The UNet's and the reward's, to encode all of its prompts. tests/test_running.py has visits.

    A condition that is asked for again is the same.
    """
    run = prepare("--fake-steps", 3, "--accum", 2, "--group", 2, "--offload-text")
    visits = noted(monkeypatch, running, "visit")

    for update in (5, 6):
        visits.clear()
        first = [run.batch(3 * update + i, j) for i in range(3) for j in range(2)]
        again = run.batch(3 * update + 2, 1)
        assert visits == [CPU, CPU]
        assert again["text"].equal(first[-1]["text"])


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_a_condition_does_not_depend_on_its_company(pipes, name):
    """A prompt's numbers are the same bit for bit, whatever else an update has, and in which order.

    So micro-batches and ranks change nothing.
    """
    texts = texts_of(pipes[name])

    texts.hold([3])
    alone = texts(torch.tensor([3, 3]))
    texts.hold([4, 3, 0, 3])
    among = texts(torch.tensor([4, 3, 0, 3]))

    assert among["index"].tolist() == [4, 3, 0, 3]
    for k in alone:
        assert among[k][1].equal(alone[k][0])
        assert among[k][3].equal(alone[k][1])
    assert not among["text"][0].equal(among["text"][1])


def test_sdxl_is_told_texts_pooled_texts_and_sizes(pipes):
    """The oracle is diffusers' own encoding of the prompts, all at once."""
    texts = texts_of(pipes["sdxl"], "--image-size", 128)
    texts.hold([1, 2])

    c = texts(torch.tensor([2, 1]))

    hidden, _, pooled, _ = pipes["sdxl"].encode_prompt(
        [PROMPTS[2], PROMPTS[1]], device=CPU, do_classifier_free_guidance=False
    )
    assert c.keys() == {"text", "pooled", "ids", "index"}
    assert_close(c["text"], hidden)
    assert_close(c["pooled"], pooled)
    assert c["ids"].tolist() == [[128, 128, 0, 0, 128, 128]] * 2


def test_sdxls_empty_prompt_is_zeros(pipes):
    texts = texts_of(pipes["sdxl"])
    texts.hold([1, 2])
    c = texts(torch.tensor([2, 1]))

    empty = texts.null(c)

    assert c["text"].any()
    assert not empty["text"].any()
    assert not empty["pooled"].any()
    assert empty["ids"].equal(c["ids"])
    assert amd.pair(c, empty)["text"].shape == (4, 77, 64)


def test_sd15s_empty_prompt_is_encoded(pipes):
    """And it is told of nothing but texts."""
    texts = texts_of(pipes["sd15"])
    texts.hold([1, 2])
    c = texts(torch.tensor([2, 1]))

    empty = texts.null(c)

    hidden, _ = pipes["sd15"].encode_prompt(
        [""],
        CPU,
        1,
        do_classifier_free_guidance=False,
    )
    assert "pooled" not in c
    for row in empty["text"]:
        assert_close(row, hidden[0])
    assert amd.pair(c, empty)["text"].shape == (4, 77, 32)


# --------------------------------------------------------------------------------------- the reward
class Rewarded(NamedTuple):
    """Four latents, two a prompt; the images that they decode to; their reward."""

    reward: sdxl.Reward
    x: torch.Tensor
    images: torch.Tensor
    scores: torch.Tensor


INDEX = [3, 3, 1, 1]  # of the prompts of these latents


@pytest.fixture
def rewarded(pipes):
    """What sdxl.py's reward says of random latents."""
    vae = pipes["sdxl"].vae
    x = torch.randn(4, 4, 8, 8, requires_grad=True)
    images = ((vae.decode(x / SCALING).sample + 1) / 2).clamp(0, 1)

    reward = sdxl.Reward(arguments(), pipes["sdxl"], PROMPTS, CPU)
    reward.hold(INDEX)
    scores = reward(x, dict(index=torch.tensor(INDEX)))
    return Rewarded(reward, x, images, scores)


def test_the_reward_is_hpsv2_of_decoded_latents_and_their_own_prompts(rewarded):
    """One by one; the gradient is that of the definition, too."""
    hps = rewarded.reward.hps
    by_hand = []
    for image, i in zip(rewarded.images, INDEX, strict=True):
        by_hand.append(hps(rewards.square(image[None]), hps.text([PROMPTS[i]]))[0])
    by_hand = torch.stack(by_hand)
    assert_close(rewarded.scores, by_hand, rtol=0, atol=1e-4)
    assert len({f"{score:.3f}" for score in by_hand}) == 4

    g = torch.autograd.grad(rewarded.scores.sum(), rewarded.x)[0]
    wanted = torch.autograd.grad(by_hand.sum(), rewarded.x)[0]
    assert_close(g, wanted, rtol=1e-3, atol=1e-5)
    assert g.any()


def test_variety_is_how_unlike_samples_of_a_prompt_are(rewarded):
    """A distance for each pair of neighbours of one prompt, here two, in each call of an update."""
    views = torch.cat([rewards.square(image[None]) for image in rewarded.images.detach()])
    apart = torch.stack([(views[i] - views[i + 1]).abs().mean() for i in (0, 2)])
    assert apart.all()
    assert_close(rewarded.reward.variety(), apart.mean())

    assert rewarded.reward.variety().isnan()  # of no call
    rewarded.reward.hold([0, 1, 2, 3])
    rewarded.reward(rewarded.x, dict(index=torch.tensor([0, 1, 2, 3])))
    assert rewarded.reward.variety().isnan()  # of no pair


def test_variety_is_the_same_however_small_micro_batches_are(rewarded):
    """Neighbours may be of two calls; calls of another update do not count."""
    rewarded.reward.hold(INDEX)
    whole = rewarded.reward.variety()

    for x, i in zip(rewarded.x, INDEX, strict=True):
        rewarded.reward(x[None], dict(index=torch.tensor([i])))
    assert_close(rewarded.reward.variety(), whole)
    rewarded.reward(rewarded.x[-1:], dict(index=torch.tensor(INDEX[-1:])))
    assert rewarded.reward.variety().isnan()


def test_the_reward_may_have_a_decoder_of_its_own(pipes, tmp_path):
    """The small one of madebyollin/taesdxl takes latents as they are."""
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    )
    vae.save_pretrained(tmp_path / "taesdxl")
    args = arguments("--reward-vae", tmp_path / "taesdxl")
    x = torch.randn(1, 4, 8, 8)

    view = sdxl.Reward(args, pipes["sdxl"], PROMPTS, CPU).view(x)

    with torch.no_grad():
        image = (vae.decode(x).sample + 1) / 2
    assert_close(view, rewards.square(image.clamp(0, 1)))


# -------------------------------------------------------------------------------- runs and students
class Run(NamedTuple):
    """A run that was killed and one that was left alone.

    They lie in folder/killed and folder/whole, and start from diffusers' own folder/model.
    """

    folder: Path
    flags: list[str]
    ranks: int
    steps: int

    @property
    def whole(self):
        return self.folder / "whole"


def run_twice(folder, ranks, steps, kind):
    """Train from a folder of diffusers, once with a kill -9 and once without.

    `survive` compares the two students and the two logs, bit for bit. The UNet has one level,
    and one block in each transformer, because FSDP2 and checkpoints take longer the more layers
    there are.
    """
    torch.manual_seed(0)
    pipe = tiny.sdxl_pipeline("tiny")
    pipe.unet = type(pipe.unet).from_config(
        pipe.unet.config,
        down_block_types=["CrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2D",
        up_block_types=["CrossAttnUpBlock2D"],
        block_out_channels=[64],
        attention_head_dim=2,
        transformer_layers_per_block=1,
    )
    pipe.save_pretrained(folder / "model")
    flags = [
        *("--dry-run", "tiny", "--no-compile"),
        *("--model", str(folder / "model")),
        *("--steps", str(steps), "--fake-steps", "1"),
        *("--save-every", "1", "--log-every", "1"),
        *kind.split(),
    ]
    survive(folder, "sdxl", flags, ranks)
    return Run(folder, flags, ranks, steps)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A LoRA with its average and 8-bit states, on one rank."""
    return run_twice(
        tmp_path_factory.mktemp("lora"),
        ranks=1,
        steps=3,
        kind="--lora-rank 4 --ema 0.5 --adam8bit --lr 1e-2",
    )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Whole UNets, sharded by FSDP2 on two ranks. Curves are drawn by the other run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "draw_log", lambda out: None)
        return run_twice(
            tmp_path_factory.mktemp("unet"),
            ranks=2,
            steps=2,
            kind="--lora-rank 0 --lr 1e-3 --exit-aware",
        )


@pytest.fixture(scope="module", params=["lora_run", "whole_run"])
def run(request):
    """Each of the two."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def again(run):
    """Networks made anew, on one rank, with the weights of the run's last checkpoint."""
    made = sdxl.prepare(sdxl.parse(run.flags), CPU)
    assert running.load(run.whole, **made.parts) == run.steps
    return made


LOGGED = {
    "step",
    "fake_step",
    "skipped",
    "g_norm",
    "dm_norm",
    "ca_norm",
    "loss_student",
    "loss_fake",
    "reward",
    "reward_std",
    "adv_clip",
    "w_mean",
    "variety",
    "sec",
    "samples_per_s",
    "mem_gib",
}


def test_sdxl_survives_kill_9(run):
    """The run went on as if nothing had happened, which `survive` has checked.

    Here only what it logs remains to be seen: the reward by exit, too, and with one iteration in an
    update there is one exit.
    """
    rows = read_log(run.whole)
    assert len(rows) == run.steps
    for row in rows:
        assert row.keys() >= LOGGED
        (name,) = [k for k in row if re.fullmatch("reward_exit_[1-4]", k)]
        assert row[name] == row["reward"]
        assert row["variety"] > 0


def test_the_last_two_checkpoints_are_kept(run):
    assert len([*(run.whole / "checkpoints").iterdir()]) == 2


def test_a_run_draws_its_curves_and_samples(lora_run):
    """Four images of each of four prompts, of 256 pixels a side; the curves are for the eye."""
    run = lora_run
    assert (run.whole / "curves.png").stat().st_size > 10_000
    (path,) = (run.whole / "samples").iterdir()
    assert path.name == f"step_{run.steps}.png"
    assert picture(path).size == (4 * 258 + 2, 4 * 258 + 2)


def test_a_used_folder_is_refused(lora_run):
    with pytest.raises(ValueError, match="holds a run: add --resume to go on"):
        run_main("sdxl", [*lora_run.flags, "--out", lora_run.whole])


def test_a_checkpoint_has_the_fakes_layer_of_exits_and_the_student_has_not(run, again):
    """It has learned, also where FSDP2 shards it. The student is what diffusers knows, no more."""
    assert again.nets["fake"].time_embedding.cond_proj.weight.any()

    (path,) = (run.whole / "student").glob("*.safetensors")
    state = load_file(path)
    if run.ranks == 2:
        assert state.keys() == again.nets["real"].state_dict().keys()
    else:
        assert path.name == LORA_WEIGHT_NAME_SAFE
        assert all(re.fullmatch(r"unet\..*\.lora_[AB]\.weight", k) for k in state)


def documented(folder, model, whole_unet):
    """The lines of the documentation that draw an image with a student, for a test's own files.

    They load a LoRA, and say in a comment what loads a whole UNet instead.
    """
    text = (ROOT / "docs/sdxl.md").read_text(encoding="utf-8")
    lines = re.search(r"```py\n(.*?)```", text, re.S)[1]
    for old, new in {
        "stabilityai/stable-diffusion-xl-base-1.0": str(model),
        "float16": "float32",
        '"cuda"': '"cpu"',
        "runs/sdxl/student": str(folder),
    }.items():
        assert old in lines
        lines = lines.replace(old, new)
    if whole_unet:
        lines = re.sub(
            "^pipe.load_lora_weights.*$",
            "",
            lines,
            flags=re.M,
        )
        lines = re.sub("^# ", "", lines, flags=re.M)
    return lines


def drawn_by_diffusers(run, student, monkeypatch):
    """The image (3, 64, 64) in [0, 1] that the documentation's lines draw by a student."""
    pipeline = diffusers.StableDiffusionXLPipeline
    call = partialmethod(
        pipeline.__call__,
        output_type="pt",
        generator=torch.Generator().manual_seed(5),
    )
    monkeypatch.setattr(pipeline, "__call__", call)
    scope = {}
    exec(
        documented(
            run.whole / student,
            run.folder / "model",
            run.ranks == 2,
        ),
        scope,
    )
    return scope["image"]


@torch.no_grad()
def drawn_by_us(run, prompt):
    """The same by a run's own networks, for a prompt of the documentation."""
    run.texts.prompts[0] = prompt
    run.texts.hold([0])
    torch.manual_seed(5)
    x = run.generate(run.texts(torch.tensor([0])), 1.0).x
    return ((run.pipe.vae.decode(x / SCALING).sample[0] + 1) / 2).clamp(0, 1)


def test_a_student_draws_in_diffusers_what_it_draws_here(run, again, monkeypatch):
    """The documentation's own lines load OUT/student, and draw what our sampler draws.

    It has the weights of the last checkpoint. A run with an average has that beside it, which is
    another student.
    """
    prompt = "a red fox in deep snow"
    ours = drawn_by_us(again, prompt)
    assert_close(drawn_by_diffusers(run, "student", monkeypatch), ours, rtol=0, atol=1e-4)

    assert (run.whole / "student_ema").exists() == bool(again.ema) == ("--ema" in run.flags)
    if again.ema:
        with running.averaged(again.ema):
            average = drawn_by_us(again, prompt)
        assert (average - ours).abs().max() > 1e-3
        drawn = drawn_by_diffusers(run, "student_ema", monkeypatch)
        assert_close(drawn, average, rtol=0, atol=1e-4)


def test_a_finished_run_is_left_as_it_is(lora_run):
    """A job script that is started again with --resume finds nothing to do."""
    files = [path for path in lora_run.whole.rglob("*") if path.is_file() and path.suffix]
    times = {path: path.stat().st_mtime_ns for path in files if path.name != "config.json"}

    run_main("sdxl", [*lora_run.flags, "--out", lora_run.whole, "--resume"])

    assert {path: path.stat().st_mtime_ns for path in times} == times


def contents(folder):
    """The bytes of the files of a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def full_disk():
    """A context in which no file can grow beyond 1000 bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_student_is_written_whole_or_not_at_all(run, again, tmp_path):
    """On a full disk the error says what to do, and another attempt succeeds."""
    args = sdxl.parse(run.flags)

    with full_disk(), pytest.raises(OSError, match=r"unwritable .*: make room, then --resume"):
        sdxl.export(args, again, tmp_path / "student")
    assert not (tmp_path / "student").exists()

    sdxl.export(args, again, tmp_path / "student")
    assert contents(tmp_path / "student") == contents(run.whole / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_full_disk_costs_no_checkpoint(lora_run, tmp_path, monkeypatch):
    """A run with an average writes two students; here there is no room for the second one.

    It goes on to its end by --resume. Its folder was moved, which a run bears.
    """
    out = tmp_path / "moved"
    shutil.copytree(lora_run.whole, out)
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "student_ema")
    saved = contents(out / "checkpoints")
    flags = [*lora_run.flags, "--out", out, "--resume"]
    export = sdxl.export

    def no_room_for_the_second(args, run, path):
        with contextlib.nullcontext() if path.name == "student_ema" else full_disk():
            export(args, run, path)

    with monkeypatch.context() as patch:
        patch.setattr(sdxl, "export", no_room_for_the_second)
        with pytest.raises(OSError, match="make room, then --resume"):
            run_main("sdxl", flags)
    assert contents(out / "checkpoints") == saved
    assert (out / "student_ema").exists()
    assert not (out / "student").exists()

    run_main("sdxl", flags)
    for student in ("student", "student_ema"):
        assert contents(out / student) == contents(lora_run.whole / student)


# ----------------------------------------------------------------------------- Stable Diffusion 1.5
@pytest.fixture(scope="module")
def sd15_run(sd15, tmp_path_factory):
    """The flags and the folder of two updates of a LoRA of Stable Diffusion 1.5."""
    out = tmp_path_factory.mktemp("sd15") / "run"
    flags = [
        *("--dry-run", "tiny", "--no-compile"),
        *("--model", sd15),
        *("--steps", 2, "--batch", 4, "--group", 2, "--fake-steps", 1),
        *("--lora-rank", 4, "--lr", 1e-2, "--log-every", 1),
    ]
    run_main("sdxl", [*flags, "--out", out])
    return flags, out


def test_sd15_is_trained_for_one_step(sd15_run):
    """What its folder says of it counts, but for flags."""
    _, out = sd15_run

    config = running.read_config(out)
    assert (config["w"], config["student_steps"]) == (1.75, 1)
    assert (config["batch"], config["lr"], config["steps"]) == (4, 1e-2, 2)
    rows = read_log(out)
    assert [row["skipped"] for row in rows] == [0, 0]
    assert not any("exit" in k for row in rows for k in row)


def test_sd15s_student_draws_in_one_step(sd15, sd15_run, tmp_path):
    """The steps need not be given, for the run's own are taken.

    The oracle is one guess from noise of the image's seed, by the LoRA that diffusers has loaded.
    """
    flags = ["--dry-run", "tiny", "--model", sd15, "--init", sd15_run[1], "--out", tmp_path / "s"]
    Path("p.txt").write_text("a fox\nan owl")
    run_main("sdxl", ["sample", *flags, "--prompts", "p.txt"])

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd15)
    pipe.load_lora_weights(sd15_run[1] / "student")
    text, _ = pipe.encode_prompt(
        ["an owl"],
        CPU,
        1,
        do_classifier_free_guidance=False,
    )
    noise = torch.randn(
        1, 4, 8, 8, generator=torch.Generator().manual_seed(amd.key(0, "000001.png"))
    )
    abar = pipe.scheduler.alphas_cumprod[999]
    with torch.no_grad():
        eps = pipe.unet(noise, 999, text).sample
        x = (noise - (1 - abar).sqrt() * eps) / abar.sqrt()
        image = pipe.vae.decode(x / 0.18215).sample[0] / 2 + 0.5
    levels = V.pil_to_tensor(picture(tmp_path / "s/images/000001.png"))
    assert (levels - 255 * image.clamp(0, 1)).abs().max() <= 1


def test_sdxl_refuses_a_lora_of_sd15(sd15_run, tmp_path):
    with pytest.raises(ValueError, match=r"student is no student of --model: take one \(.*\)$"):
        flags = ["--dry-run", "tiny", "--init", sd15_run[1], "--out", tmp_path / "s"]
        run_main("sdxl", ["sample", *flags])
    assert not (tmp_path / "s").exists()


# ------------------------------------------------------------------------------------------ samples
ROWS = [dict(prompt=f"a fox {i}", tag="t") for i in range(2)]


def sample(run, out, *more, rows=ROWS):
    """Draw four images of each prompt by a run's student, laid out for GenEval, three at a time."""
    prompts = run.folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    flags = [
        *run.flags,
        *("--prompts", prompts, "--layout", "geneval"),
        *("--init", run.whole, "--out", out),
    ]
    run_main("sdxl", ["sample", *flags, *more])


def images_of(out, row):
    """The files of a prompt's four images."""
    return [out / f"images/0000{row}/samples/000{k}.png" for k in range(4)]


def difference(path, other):
    """The largest difference of two images, in levels of 0 to 255."""
    levels = [V.pil_to_tensor(picture(p)).int() for p in (path, other)]
    return (levels[0] - levels[1]).abs().max()


@pytest.fixture(scope="module")
def drawn(lora_run):
    """The folder of images that a LoRA drew."""
    sample(lora_run, lora_run.folder / "drawn")
    return lora_run.folder / "drawn"


def test_an_image_has_a_seed_of_its_own(lora_run, drawn, tmp_path):
    """It is the same whatever is drawn beside it, and no two are alike."""
    sample(lora_run, tmp_path / "at_once", "--chunk", "12")
    images = images_of(drawn, row=0)
    for path, other in zip(
        images,
        images_of(tmp_path / "at_once", row=0),
        strict=True,
    ):
        assert difference(path, other) <= 1
    assert difference(images[2], images[1]) > 9


def test_samples_for_geneval_have_the_metadata_of_their_prompt(drawn):
    metadata = (drawn / "images/00000/metadata.jsonl").read_text()
    assert json.loads(metadata) == ROWS[0]


def test_sample_resumes_with_the_images_that_are_missing(lora_run, drawn, tmp_path):
    """What is lost is drawn again as it was, and what is there is left alone."""
    out = tmp_path / "again"
    shutil.copytree(drawn, out)
    images = images_of(out, row=1)
    images[2].unlink()
    images[3].write_bytes(b"kept")

    sample(lora_run, out, "--resume")

    assert difference(images[2], images_of(drawn, row=1)[2]) <= 1
    assert images[3].read_bytes() == b"kept"


def test_sample_is_not_resumed_with_other_prompts(lora_run, drawn):
    """A prompt that is put before the others would get the image of another."""
    kept = contents(drawn)
    rows = [dict(prompt="a teapot", tag="t"), *ROWS]

    with pytest.raises(ValueError, match="has images of other prompts: choose another folder"):
        sample(lora_run, drawn, "--resume", rows=rows)

    assert contents(drawn) == kept


def test_a_jpg_is_of_pillows_own_quality(tmp_path):
    """HPSv2's authors save HPDv2's and DrawBench's images so, and scores depend on it."""
    pixels = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    image = V.to_pil_image(pixels)
    image.save("wanted.jpg")

    path = tmp_path / "images/anime/00000.jpg"
    sdxl.write_image(
        arguments("--layout", "hpdv2"),
        path,
        image,
        dict(prompt="a"),
    )

    assert path.read_bytes() == Path("wanted.jpg").read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["00000.jpg"]


# ------------------------------------------------------------------------------------------- scores
def test_score_prints_means_and_who_wins(drawn, tmp_path, capsys):
    """The first folder's images against those of a student that draws black squares."""
    black = tmp_path / "black"
    shutil.copytree(drawn, black)
    for path in black.rglob("*.png"):
        Image.new("RGB", (64, 64)).save(path)
    capsys.readouterr()

    run_main("sdxl", ["score", "--dry-run", "tiny", "--chunk", 3, "--samples", drawn, black])

    first, second, won = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["samples"] for row in (first, second)] == [str(drawn), str(black)]
    assert first["images"] == second["images"] == 8
    assert won["judge"] == "hpsv2"
    assert first["mean"] != second["mean"]
    assert 0 <= won["low"] <= won["winning_rate"] <= won["high"] <= 1


def test_a_judges_scores_are_of_each_image_and_its_prompt(drawn):
    """Whatever the chunks are, and in the order of prompts.jsonl."""
    rows = sdxl.read_rows(drawn)
    judge = judges.hpsv2(CPU, tiny.hpsv2("tiny"))

    scores = sdxl.judged(arguments("--chunk", 3), judge, drawn, rows)

    paths = images_of(drawn, row=0) + images_of(drawn, row=1)
    prompts = ["a fox 0"] * 4 + ["a fox 1"] * 4
    wanted = [
        judge([picture(p)], [text])[0]
        for p, text in zip(
            paths,
            prompts,
            strict=True,
        )
    ]
    assert_close(scores, torch.stack(wanted).double(), rtol=0, atol=1e-4)


def test_hpdv2s_means_go_by_style():
    files = ["anime/00000.jpg", "photo/00000.jpg", "anime/00001.jpg", "photo/00001.jpg"]
    r = torch.tensor([1.0, 2.0, 3.0, 6.0])

    assert sdxl.by_style([dict(file=file) for file in files], r) == dict(anime=2, photo=4)
    for other in ("000000.png", "00000/samples/0000.png"):
        assert sdxl.by_style([dict(file=other)] * 4, r) == {}


def test_a_broken_image_is_named(drawn, tmp_path):
    """A judge must not pass it by, for means are of all images."""
    out = tmp_path / "cut"
    shutil.copytree(drawn, out)
    path = images_of(out, row=1)[2]
    path.write_bytes(path.read_bytes()[:2000])

    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as a picture")):
        run_main("sdxl", ["score", "--dry-run", "tiny", "--samples", out])


def test_samples_of_other_prompts_digest_not_compared(drawn, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(drawn, other)
    rows = sdxl.read_rows(other)
    rows[0]["of"] = dict(prompt="a teapot", tag="t")
    (other / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    with pytest.raises(ValueError, match="--samples are of other prompts"):
        run_main("sdxl", ["score", "--dry-run", "tiny", "--samples", drawn, other])


# ---------------------------------------------------------------------------------------- the speed
@pytest.mark.parametrize("accum", [1, 2])
def test_the_speed_report_compares_an_update_with_the_calls_that_it_needs(capsys, accum):
    """Each item has a line, as soon as it is known; the ratio is what a reader looks for.

    An update of two micro-batches calls each of its last exits once more, for the graph.
    """
    flags = ["--batch", 4, "--group", 2, "--fake-steps", 1, "--student-steps", 2]
    sdxl.speed(arguments("--accum", accum, *flags), CPU)

    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    measured = {"forward", "real", "reward", "backward", "texts", "adamw"}
    measured.add("update with 1 of the fake")
    assert lines.keys() == measured | {"update of 4", "samples"}
    for name in measured:
        assert re.fullmatch(r"\d+\.\d{4} s", lines[name])
    ratio = lines["update of 4"]
    assert f"{accum * accum} forward, {2 * accum} backward, {accum} real" in ratio
    assert re.search(r"ratio \d+\.\d{3}$", ratio)
    assert lines["samples"].startswith(f"{4 // accum}; peak")


# --------------------------------------------------------------------------------------- bad inputs
@pytest.fixture
def files(tmp_path):
    """Inputs that are wrong in one way each, by the name of what is wrong; and good images."""
    pictures(tmp_path / "images")
    (tmp_path / "empty").touch()
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "second_too_long.txt").write_text("ok\n" + "x" * 10_000)
    (tmp_path / "cut_short.jsonl").write_text('{"prompt": ')

    pictures(tmp_path / "one_lost")
    (tmp_path / "one_lost/3.png").unlink()

    model = tmp_path / "model_without_unet"
    (model / "vae").mkdir(parents=True)
    index = dict(_class_name="StableDiffusionXLPipeline", unet=["a", "b"])
    (model / "model_index.json").write_text(json.dumps(index))

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/prompts.jsonl").write_text('{"prompt": "a fox"}')
    (tmp_path / "unnamed").mkdir()
    row = dict(file_name=None, text="a fox")
    (tmp_path / "unnamed/metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / "unfinished/checkpoints").mkdir(parents=True)
    (tmp_path / "of_no_run/student").mkdir(parents=True)

    running.open_run(tmp_path / "other_script", dict(height=480))
    (tmp_path / "other_script/student").mkdir()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--prompts empty", "empty has no prompt"),
        ("--prompts latin1.txt", "latin1.txt, line 1 is not UTF-8"),
        ("--prompts second_too_long.txt", "line 2: its prompt has 10,000 characters"),
        ("--prompts cut_short.jsonl", "line 1 is no JSON"),
        ("--prompts nowhere.txt", "nowhere.txt"),
        ("--model model_without_unet", "has no unet"),
        ("--hps nowhere.pt", "nowhere.pt: there is no such file or folder"),
        ("--lr 0", "--lr 0.0: choose it above 0"),
        ("--fake-lr -1", "--fake-lr -1.0: choose it above 0"),
        ("--w nan", "--w nan: choose it above 0"),
        ("--batch 0", "--batch 0: choose it above 0"),
        ("--ema 1", "--ema 1.0: choose it in [0, 1)"),
        ("--lora-rank -1", "--lora-rank: choose 0 or more"),
        ("--image-size 100", "--image-size: choose a multiple of 64"),
        ("--s 2", "choose s in [0, 1]"),
        ("--batch 12", "--batch 12: take a multiple of --group"),
        ("--accum 3", "--batch 128 of 3 ranks x --accum: take a multiple"),
        ("--lam 1", "--lam is for dmd2 and dmdr"),
        ("--method dmd2", "--real-data is for dmd2, which needs it"),
        ("--real-data images", "--real-data is for dmd2, which needs it"),
        ("--method dmd2 --real-data one_lost", "one_lost/3.png: there is no such file"),
        (
            "--dry-run tiny --method dmd2 --real-data images --image-size 192",
            "bottleneck is 12",
        ),
        ("sample", "give --init"),
        ("sample --init nowhere", "nowhere: there is no such file or folder"),
        ("sample --dry-run tiny --init images", "images is no student of --model"),
        ("sample --dry-run tiny --init other_script", "student is no student of --model"),
        ("sample --init images --layout geneval", "prompt 1 has no tag"),
        ("score", "give --samples, a folder or two"),
        ("score --samples images --dry-run tiny --judges pickscore", "no judge but hpsv2"),
        ("score --samples images --dry-run tiny", "images holds no images of `sample`"),
        ("score --samples foreign --dry-run tiny", "foreign/prompts.jsonl is not of `sample`"),
        ("--image-size -64", "--image-size: choose a multiple of 64"),
        ("--image-size 0", "--image-size: choose a multiple of 64"),
        ("--out empty", "--out empty is a file"),
        ("--dry-run tiny --out of_no_run", "of_no_run has a student and no config.json"),
        ("--init images", "images holds no checkpoint"),
        ("--method dmd2 --real-data unnamed", "unnamed/None: there is no such file"),
        ("--method dmd2 --real-data images --prompts empty", "leave --prompts out"),
        ("sample --init unfinished", "unfinished has no student before its run has ended"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(files, tmp_path, flags, message):
    """ValueError or OSError is what running.run turns into one line and exit code 2."""
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run_main("sdxl", flags.split())
    assert not (tmp_path / "runs").exists()


def test_a_run_does_not_go_on_with_other_prompts(tmp_path):
    """The file may have been edited; its name is the same, and the run would learn other things."""
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\nan owl\n")
    args = arguments("--prompts", path, "--out", tmp_path / "run", "--resume")
    sdxl.open_run(args)
    sdxl.open_run(args)

    path.write_text("a fox\na boat\n")
    with pytest.raises(ValueError, match="prompts_digest"):
        sdxl.open_run(args)


def test_a_run_goes_on_with_less_memory(tmp_path):
    """What changes nothing that is learned may change: a run that ends at sea takes such flags."""
    out = ["--out", tmp_path / "run", "--resume"]
    sdxl.open_run(arguments(*out))
    sdxl.open_run(arguments(*out, "--offload-text", "--accum", 2, "--no-compile", "--log-every", 3))
    with pytest.raises(ValueError, match="fake_steps"):
        sdxl.open_run(arguments(*out, "--fake-steps", 7))


def test_samples_are_of_the_runs_own_model(tmp_path):
    """A LoRA of a fine-tune on another base would draw another picture, without a word."""
    running.open_run(tmp_path / "run", dict(model="someone/fine-tune", student_steps=2))
    (tmp_path / "run/student").mkdir()

    for path in ("run", "run/student"):
        args = sdxl.parse(["sample", "--init", str(tmp_path / path)])
        assert (args.model, args.student_steps) == ("someone/fine-tune", 2)
    args = sdxl.parse(["sample", "--init", str(tmp_path / "run"), "--model", "sdxl"])
    assert args.model == sdxl.SDXL["model"]


def test_the_rewards_decoder_is_of_the_models_latents(pipes, tmp_path):
    """Stable Diffusion 1.5's VAE has another scale, and a UNet is none."""
    own = pipes["sdxl"].vae
    tiny.sd_vae("tiny").save_pretrained(tmp_path / "of_sd15")
    pipes["sdxl"].unet.save_pretrained(tmp_path / "unet")
    tiny.sd_vae("tiny", scaling_factor=SCALING).save_pretrained(tmp_path / "of_sdxl")

    sdxl.load_vae(str(tmp_path / "of_sdxl"), own, CPU)
    for name in ("of_sd15", "unet"):
        with pytest.raises(ValueError, match="give a VAE of --model's latents"):
            sdxl.load_vae(str(tmp_path / name), own, CPU)


def test_layers_that_are_no_loras_have_dmd2s_rate():
    """The LoRAs' is ten times as large, as their steps are smaller; an exit's layer is whole."""
    run = prepare("--lora-rank", 4)
    rates = {}
    for group in run.opt_fake.param_groups:
        rates |= {id(p): group["lr"] for p in group["params"]}
    named = {name: p for name, p in run.nets["fake"].named_parameters() if p.requires_grad}

    assert len(rates) == len(named) > 50
    for name, p in named.items():
        assert rates[id(p)] == (5e-4 if "lora_" in name else 5e-5)
    (group,) = run.opt_student.param_groups
    assert group["lr"] == 5e-5


@pytest.mark.parametrize("rank", [0, 4])
def test_trained_networks_recompute_activations(rank):
    """Where --no-checkpointing does not say otherwise. The teacher has no gradient."""
    nets = prepare("--lora-rank", rank).nets
    assert {name for name, net in nets.items() if net.is_gradient_checkpointing} == {
        "student",
        "fake",
    }
    nets = prepare("--lora-rank", rank, "--no-checkpointing").nets
    assert not any(net.is_gradient_checkpointing for net in nets.values())


@pytest.mark.parametrize(
    "flags",
    ["--method magic", "--method magic --lora-rank 0", "--method dmdr --lora-rank 0"],
)
def test_an_adapted_teacher_trains(flags):
    """An update moves student and fake, by numbers that are finite. dmd2 and amd are above."""
    run = prepare(*flags.split(), "--fake-steps", 1, "--batch", 2, "--group", 2)
    before = {
        name: [p.detach().clone() for p in run.nets[name].parameters() if p.requires_grad]
        for name in ("student", "fake")
    }

    row = next(run.train())

    assert row["skipped"] == 0
    for name, old in before.items():
        new = [p for p in run.nets[name].parameters() if p.requires_grad]
        assert any((p != q).any() for p, q in zip(new, old, strict=True))


@pytest.mark.parametrize("given", [[], ["--offload-text"]])
def test_offloaded_encoders_live_on_the_cpu(pipes, monkeypatch, given):
    """The pipeline's are sent there in the beginning, and the reward's."""
    moved = noted(monkeypatch, pipes["sdxl"].text_encoder_2, "to")
    texts_of(pipes["sdxl"], *given)
    assert moved == ["cpu"] * len(given)

    hps = tiny.hpsv2("tiny")
    monkeypatch.setattr(sdxl, "load_hps", lambda args, device: hps)
    moves = [noted(monkeypatch, net, "to") for net in hps.text_nets]
    sdxl.Reward(arguments(*given), pipes["sdxl"], PROMPTS, CPU)
    assert moves == [["cpu"] * len(given)] * 2


def test_a_broken_image_of_dmd2s_data_is_named(pipes, tmp_path):
    """A run meets it at any time, and its name is what helps then."""
    pictures(tmp_path / "images")
    path = tmp_path / "images/3.png"
    path.write_bytes(path.read_bytes()[:9000])
    rows = [dict(file_name=f"{i}.png") for i in range(5)]

    truth = sdxl.real_images(
        arguments("--real-data", tmp_path / "images"), rows, pipes["sdxl"], CPU
    )

    assert truth(dict(index=torch.tensor([2, 0]))).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as a picture")):
        truth(dict(index=torch.tensor([2, 3])))
