"""sdxl.py: DMD2's update, LoRAs, the reward HPSv2, whole runs, samples, bad input.

Everything runs on the CPU, on tiny networks of diffusers' own classes with random weights.
"""

import copy
import json
import re
from functools import partial, partialmethod
from pathlib import Path
from typing import NamedTuple

import diffusers
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision.transforms import functional as V

import amd
import running
import sdxl
from helpers import CPU, ROOT, picture, pictures, read_log, run_main, survive

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


# ---------------------------------------------------------------------------------- DMD2's update
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
        level = torch.rand(2, generator=shared, dtype=torch.float64)  # one for each group
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
        return net(x_t, i, given * self.c["text"], added_cond_kwargs=added).sample

    def predict_x0(self, net, x_t, i):
        """The clean sample that a UNet sees."""
        return self.x0_of(x_t, i, self.predict_eps(net, x_t, i))

    def x0_of(self, x_t, i, eps):
        """The clean sample of which x_t is the noisy one, if eps is its noise."""
        abar = self.grid.alphas_cumprod[i].view(-1, 1, 1, 1)
        return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()

    def logit(self, x):
        """The discriminator: a head on what the fake's middle block makes of a noisy x."""
        self.predict_eps(self.fake, self.grid.add_noise(x, self.eps, self.i), self.i)
        return self.fake.head(self.bottleneck).flatten()

    def backward_simulation(self):
        """The student's sample: only the call at the exit carries a gradient."""
        steps = [torch.full((8,), i) for i in (999, 749, 499, 249)]
        x_t = torch.randn(8, 4, 8, 8)
        for k in range(self.exit):
            with torch.no_grad():
                x = self.predict_x0(self.student, x_t, steps[k])
                x_t = self.grid.add_noise(x, torch.randn_like(x), steps[k + 1])
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
        denoising = F.mse_loss(self.predict_eps(self.fake, x_t, self.i), self.eps)
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
    run = prepare("--method", "dmd2", "--real-data", images, "--lora-rank", 0, "--group", 4)
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
    for step, gradient in zip(dmd2.steps[name], dmd2.wanted[name], strict=True):
        assert_close(step, gradient, rtol=1e-3, atol=1e-5)


def test_a_group_shares_its_prompt(dmd2):
    first, second = dmd2.oracle.c["index"].view(2, 4)
    assert len(first.unique()) == len(second.unique()) == 1
    assert first[0] != second[0]


def test_real_images_are_squares_in_minus_one_to_one(dmd2):
    view = sdxl.form(64, [0.5], [0.5])
    images = [picture(path) for path in dmd2.oracle.images.glob("*.png")]
    pixels = torch.stack([view(image) for image in images])
    assert pixels.shape == (5, 3, 64, 64)
    assert -1 <= pixels.min() < -0.9
    assert 0.9 < pixels.max() <= 1


# ------------------------------------------------------------------------------------------ LoRAs
class Looks(NamedTuple):
    """Guesses of the networks of a run at one x_t, before two updates and after."""

    run: object
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


@torch.no_grad()
def look(run, name, x_t):
    """What a network of a run makes of x_t, for the first conditions of the run."""
    t = torch.ones(len(x_t)) / 3
    return run.call[name](x_t, t, run.batch(0, 0))


@pytest.fixture(scope="module")
def adapted():
    """Two updates of DMDR with LoRAs.

    It has all four networks: real, student, fake, and the blended teacher between real and fake.
    """
    torch.manual_seed(0)
    flags = "--method dmdr --lora-rank 4 --lr 1e-2 --fake-lr 2e-2 --accum 2 --ema 0.5"
    run = prepare(*flags.split())
    x_t = torch.randn(4, 4, 8, 8)
    before = {name: look(run, name, x_t) for name in ("real", "student", "fake")}

    updates = run.train()
    logs = [next(updates) for _ in range(2)]
    assert [log["skipped"] for log in logs] == [0, 0]
    after = {name: look(run, name, x_t) for name in ("real", "student", "fake")}

    run.adapt(0)
    after["blended, r = 0"] = look(run, "blended", x_t)
    run.adapt(1)
    after["blended, r = 1"] = look(run, "blended", x_t)
    return Looks(run, before, after)


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


def test_a_loras_scale_is_dmd2s(adapted):
    """Its alpha is 8 at any rank, so it is scaled by 8 / rank."""
    layers = running.adapters(adapted.run.nets["fake"]).values()
    assert {layer.scaling["default"] for layer in layers} == {8 / 4}


def test_a_checkpoint_of_loras_holds_no_weight_of_the_teacher(adapted):
    """Only adapters and their optimizers' states are saved, which are named by number."""
    names = running.tensors(adapted.run.parts)
    weights = [name for name in names if ".opt." not in name]
    assert weights
    assert all("lora" in name for name in weights)


# ------------------------------------------------------------------------------------------ HPSv2
class HPS(NamedTuple):
    """HPSv2 as its authors compute it, on a small CLIP: one picture (3, H, W) in [0, 1] at a time.

    The longest side is resized to 224, the rest is black; then CLIP's own normalisation.
    """

    clip: nn.Module

    @staticmethod
    def view(image):
        """(3, H, W) in [0, 1] -> (3, 224, 224), as CLIP takes it."""
        h, w = (round(side * 224 / max(image.shape)) for side in image.shape[1:])
        image = V.resize(image, [h, w], V.InterpolationMode.BICUBIC, antialias=True)
        left, top = (224 - w) // 2, (224 - h) // 2
        image = V.pad(image, [left, top, 224 - w - left, 224 - h - top])
        mean = [0.48145466, 0.4578275, 0.40821073]
        std = [0.26862954, 0.26130258, 0.27577711]
        return V.normalize(image, mean, std)

    def __call__(self, image, prompt):
        words = open_clip.get_tokenizer("ViT-H-14")([prompt])
        features = self.clip.encode_image(self.view(image)[None])
        return 100 * F.cosine_similarity(features, self.clip.encode_text(words))[0]


TEXTS = [f"picture {i}" for i in range(5)]


def seeded_clip():
    """sdxl.py makes its small CLIP at random: with this seed just before, it is ours."""
    torch.manual_seed(7)


@pytest.fixture(scope="module")
def hps():
    """The oracle.

    Its CLIP has the weights of the one that sdxl.py makes for --dry-run tiny.
    """
    vision = open_clip.CLIPVisionCfg(2, 32, 16, patch_size=56)
    text = open_clip.CLIPTextCfg(width=32, heads=2, layers=2)
    seeded_clip()
    return HPS(open_clip.CLIP(32, vision, text).eval())


def test_hpsv2_judges_images_as_its_authors_do(hps, tmp_path):
    """The images are wider than high and higher than wide, so black is added on every side."""
    pictures(tmp_path / "some")
    images = [picture(tmp_path / f"some/{i}.png") for i in range(5)]
    wanted = [hps(V.to_tensor(a), text) for a, text in zip(images, TEXTS, strict=True)]

    seeded_clip()
    judge = sdxl.hpsv2(arguments(), CPU)
    assert_close(judge(images, TEXTS), torch.stack(wanted), rtol=0, atol=1e-4)


class Rewarded(NamedTuple):
    """Four latents, two a prompt; the images that they decode to; their reward, twice."""

    x: torch.Tensor
    images: torch.Tensor
    rewards: list[torch.Tensor]
    seen: list[torch.Tensor]


@pytest.fixture
def rewarded():
    """What sdxl.py's reward says of random latents.

    It is called twice, as by the two iterations of an update.
    """
    pipe = sdxl.random_pipeline(False)
    x = torch.randn(4, 4, 8, 8, requires_grad=True)
    images = ((pipe.vae.decode(x / SCALING).sample + 1) / 2).clamp(0, 1)

    seeded_clip()
    reward, read, seen = sdxl.load_reward(arguments(), pipe, CPU)
    encode, _null = sdxl.conditions(arguments(), pipe, read, CPU)
    c = encode(TEXTS, torch.tensor([0, 0, 1, 1]))
    rewards = [reward(x, c) for _ in range(2)]
    return Rewarded(x, images, rewards, seen)


def test_the_reward_is_hpsv2_of_decoded_latents_with_its_gradient(hps, rewarded):
    by_hand = torch.stack([hps(rewarded.images[i], TEXTS[i // 2]) for i in range(4)])
    reward = rewarded.rewards[0]
    assert_close(reward, by_hand, rtol=0, atol=1e-4)

    g = torch.autograd.grad(reward.sum(), rewarded.x)[0]
    wanted = torch.autograd.grad(by_hand.sum(), rewarded.x)[0]
    assert_close(g, wanted, rtol=1e-3, atol=1e-5)
    assert g.any()


def test_the_reward_sees_how_unlike_samples_of_a_prompt_are(rewarded):
    """A distance for each pair of neighbours of one prompt, here two, in each call of an update.

    Its mean is what the log calls variety.
    """
    views = torch.stack([HPS.view(image) for image in rewarded.images.detach()])
    apart = torch.stack([(views[i] - views[i + 1]).abs().mean() for i in (0, 2)])
    assert_close(torch.cat(rewarded.seen), torch.cat([apart, apart]))
    assert apart.all()


# ------------------------------------------------------------------------------- runs and students
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

    `survive` compares the two students and the two logs, bit for bit.
    """
    torch.manual_seed(0)
    sdxl.random_pipeline(False).save_pretrained(folder / "model")
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
    """Whole UNets, sharded by FSDP2 on two ranks."""
    return run_twice(
        tmp_path_factory.mktemp("unet"),
        ranks=2,
        steps=2,
        kind="--lora-rank 0 --lr 1e-3",
    )


@pytest.fixture(scope="module", params=["lora_run", "whole_run"])
def run(request):
    """Each of the two."""
    return request.getfixturevalue(request.param)


LOGGED = (
    "step fake_step skipped g_norm dm_norm ca_norm loss_student loss_fake "
    "reward reward_std adv_clip w_mean variety sec samples_per_s mem_gib"
)


def test_sdxl_survives_kill_9(run):
    """The run went on as if nothing had happened, which `survive` has checked.

    Here only what it logs remains to be seen.
    """
    rows = read_log(run.whole)
    assert len(rows) == run.steps
    assert rows[0].keys() >= {*LOGGED.split()}


def test_the_last_two_checkpoints_are_kept(run):
    assert len([*(run.whole / "checkpoints").iterdir()]) == 2


def test_a_used_folder_is_refused(lora_run):
    with pytest.raises(ValueError, match="holds a run: add --resume to go on"):
        run_main("sdxl", [*lora_run.flags, "--out", lora_run.whole])


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
        "runs/sdxl": str(folder),
    }.items():
        assert old in lines
        lines = lines.replace(old, new)
    if whole_unet:
        lines = re.sub("^pipe.load_lora_weights.*$", "", lines, flags=re.M)
        lines = re.sub("^# ", "", lines, flags=re.M)
    return lines


def test_a_student_draws_in_diffusers_what_it_draws_here(run, monkeypatch):
    """The documentation's own lines load OUT/student, and draw what our sampler draws.

    Ours has the weights of the last checkpoint, or their average if the run keeps one.
    """
    pipeline = diffusers.StableDiffusionXLPipeline
    call = partialmethod(
        pipeline.__call__,
        output_type="pt",
        generator=torch.Generator().manual_seed(5),
    )
    monkeypatch.setattr(pipeline, "__call__", call)
    scope = {}
    exec(documented(run.whole, run.folder / "model", whole_unet=run.ranks == 2), scope)

    ours = sdxl.prepare(sdxl.parse(run.flags), CPU)
    assert running.load(run.whole, **ours.parts) == run.steps
    assert bool(ours.ema) == ("--ema" in run.flags)
    c = ours.encode(["a red fox in deep snow"], torch.tensor([0]))
    torch.manual_seed(5)
    with torch.no_grad(), running.averaged(ours.ema):
        x = ours.generate(c)[0]
    image = ((ours.pipe.vae.decode(x / SCALING).sample[0] + 1) / 2).clamp(0, 1)
    assert_close(scope["image"], image, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------- samples
PROMPTS = [dict(prompt=f"a fox {i}", tag="t") for i in range(2)]


def sample(run, out, *more):
    """Draw four images of each prompt by a run's student, laid out for GenEval, three at a time."""
    prompts = run.folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in PROMPTS))
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
    levels = [torch.tensor(list(picture(p).tobytes())) for p in (path, other)]
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
    for path, other in zip(images, images_of(tmp_path / "at_once", row=0), strict=True):
        assert difference(path, other) <= 1
    assert difference(images[2], images[1]) > 9


def test_samples_for_geneval_have_the_metadata_of_their_prompt(drawn):
    metadata = (drawn / "images/00000/metadata.jsonl").read_text()
    assert json.loads(metadata) == PROMPTS[0]


def test_sample_resumes_with_the_images_that_are_missing(lora_run, drawn, tmp_path):
    """What is lost is drawn again as it was, and what is there is left alone.

    It works on the images of the second prompt, which no other test reads.
    """
    images = images_of(drawn, row=1)
    lost = tmp_path / "lost.png"
    images[2].rename(lost)
    images[3].write_bytes(b"kept")

    sample(lora_run, drawn, "--resume")
    assert difference(images[2], lost) <= 1
    assert images[3].read_bytes() == b"kept"


# -------------------------------------------------------------------------------------- bad inputs
@pytest.fixture
def files(tmp_path):
    """Inputs that are wrong in one way each, by the name of what is wrong; and good images."""
    pictures(tmp_path / "images")
    (tmp_path / "empty").touch()
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "second_too_long.txt").write_text("ok\n" + "x" * 10_000)
    (tmp_path / "cut_short.jsonl").write_text('{"prompt": ')

    model = tmp_path / "model_without_unet"
    (model / "vae").mkdir(parents=True)
    index = dict(_class_name="StableDiffusionXLPipeline", unet=["a", "b"])
    (model / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--prompts empty", "give 1 to"),
        ("--prompts latin1.txt", "UTF-8"),
        ("--prompts second_too_long.txt", "prompt 2"),
        ("--prompts cut_short.jsonl", "no .json"),
        ("--model model_without_unet", "has no unet"),
        ("--lr 0", "choose lr"),
        ("--batch 12", "choose K"),
        ("--accum 3", "take"),
        ("--lam 1", "dmd2 and dmdr"),
        ("--method dmd2", "dmd2, which needs"),
        (
            "--dry-run tiny --method dmd2 --real-data images --image-size 192",
            "bottleneck is 12",
        ),
        ("sample", "--init"),
        ("score", "give"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(files, tmp_path, flags, message):
    """ValueError or OSError is what running.run turns into one line and exit code 2."""
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run_main("sdxl", flags.split())
    assert not (tmp_path / "runs").exists()
