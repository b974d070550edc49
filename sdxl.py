"""AMD on Stable Diffusion XL (and 1.5), text to image in four steps: the paper's Tables 2, 3, 7, 8, 9 and Fig. 9.
    torchrun --nproc-per-node 8 sdxl.py                         # the whole UNet by FSDP2, in DMD2's setting (A.4)
    python sdxl.py --lora-rank 64 --adam8bit --accum 32         # as a LoRA, on one GPU
    torchrun --nproc-per-node 8 sdxl.py sample --init runs/sdxl --layout hpdv2 --prompts benchmark --out runs/hpdv2
    python sdxl.py score --samples runs/hpdv2 runs/hpdv2_dmd2   # mean HPSv2; of two, how often the first one wins
    python sdxl.py --dry-run full                               # memory and speed on this GPU, with random weights
Weights are downloaded on first use. HPSv2 and ImageReward x 100 of Table 3: DMD2 30.64, 71.01; AMD 31.25, 88.37.
"""

import argparse
import copy
import json
import os
from functools import partial
from importlib import import_module as lib  # for what is slow to import, where it's first used
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torchvision.transforms import v2
from torchvision.utils import save_image

import amd
import running

torch.set_float32_matmul_precision("high")
# ----------------------------------------------------------------------------------------------------------- arguments
PRESETS = {
    "sdxl": dict(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        batch=128,
        fake_steps=5,
        steps=3800,
        chunk=8,
        lora_rank=0,
        log_every=10,
        sample_every=250,
        save_every=250,
    )
}  # DMD2: 19,000 of the fake
PRESETS["full"] = PRESETS["sdxl"] | dict(model=None, batch=8, accum=2, lora_rank=64)
PRESETS["tiny"] = PRESETS["full"] | dict(
    fake_steps=2, steps=4, chunk=3, sample_every=4, save_every=2, accum=1
)
LAM = dict(dmd2=5e-3, dmdr=0.05)  # DMD2's weight of its generator's GAN loss, DMDR's of its reward
LAYOUTS = dict(
    flat="{i:06}.png",
    coco="{i:06}.png",
    drawbench="{i:05}.jpg",
    hpdv2="{style}/{i:05}.jpg",
    geneval="{row:05}/samples/{k:04}.png",
)


def parse(argv=None):
    parser = running.Parser(__doc__)
    shared, (_, _, data, _, sampling) = parser.shared, parser.groups.values()
    parser.add_argument("task", nargs="?", choices=["train", "sample", "score"], default="train")

    shared("method", "amd", choices=amd.METHODS, default="amd")
    shared("s", ".5", default=0.5)
    shared("tau", "1", default=1.0)
    shared("w", "DMD2: 8", default=8.0)
    shared("lam", "DMD2: dmd2 .005; DMDR: dmdr .05")
    shared("group", "8; DMD2: 1", default=8)
    shared("student-steps", "4")
    shared("fake-steps", "DMD2: 5")

    shared("batch", "DMD2: 128")
    shared("accum", "as many as make micro-batches of 8")
    shared("steps", "DMD2: 3,800")
    shared("lr", "DMD2: 5e-7, of a LoRA 5e-5")
    shared("fake-lr", "that of the student")
    shared("ema", "0, as DMD2", default=0.0)
    shared("lora-rank", "0; DMD2: 64")
    shared("adam8bit")
    shared("checkpointing", default=True)
    shared("compile", default=torch.cuda.is_available())
    shared("offload-text")
    shared("seed", "0", default=0)

    shared("dry-run", choices=["tiny", "full"])
    data.add_argument(
        "--model", help="the teacher: SDXL (default), Stable Diffusion 1.5, or a folder of either"
    )
    shared("init", "from its end; sample: a run, a UNet's folder, or a LoRA")
    shared("prompts", "text, jsonl or json; hpdv2: the folder of its json files; default: ours")
    data.add_argument(
        "--real-data", type=Path, help="dmd2: images and metadata.jsonl {file_name, text}"
    )
    data.add_argument("--image-size", type=int, help="pixels (the model's)")
    data.add_argument("--reward-vae", help="a smaller decoder, as madebyollin/taesdxl")
    data.add_argument("--hps", type=Path, help="HPSv2's file (v2.1, downloaded)")

    shared("out", "runs/sdxl")
    shared("resume")
    shared("log-every", "10")
    shared("sample-every", "250")
    shared("save-every", "250")

    shared("chunk", "8")
    shared("samples", "one folder of sample, or two", nargs="+")
    shared("layout", "flat", choices=LAYOUTS, default="flat")
    sampling.add_argument(
        "--judges", nargs="+", choices=JUDGES, default=["hpsv2"], help="score: by whom (hpsv2)"
    )
    args = parser.parse_args(argv)
    name = args.dry_run or "sdxl"
    own = (
        running.read_config(args.init)
        if args.task == "sample" and args.init and (args.init / "student").exists()
        else {}
    )
    given = dict(
        lam=LAM.get(args.method, 0.0),
        out=Path("runs", "samples" if args.task == "sample" else name),
        student_steps=own.get("student_steps", 4),
        image_size=own.get("image_size"),
    )
    given |= PRESETS[name] | {k: v for k, v in vars(args).items() if v is not None}
    lr, most = (
        given.get("lr", 5e-5 if given["lora_rank"] else 5e-7),
        8 * int(os.environ.get("WORLD_SIZE", 1)),
    )
    return argparse.Namespace(
        **vars(args) | dict(lr=lr, fake_lr=lr, accum=-(-given["batch"] // most)) | given
    )


# ------------------------------------------------------------------------------------------------------------ backbone
def random_pipeline(full):
    """SDXL's pipeline with random weights: the true architecture, or the same classes in two layers."""
    D, T, bpe, end = (
        lib("diffusers"),
        lib("transformers"),
        lib("open_clip").SimpleTokenizer(),
        "<end_of_text>",
    )
    widths, depths, heads, dims, time, vae_widths, groups, layers, size = (
        (
            (320, 640, 1280),
            (1, 2, 10),
            (5, 10, 20),
            (768, 1280),
            256,
            (128, 256, 512, 512),
            32,
            2,
            128,
        )
        if full
        else ((32, 64), (1, 2), (1, 2), (32, 32), 8, (8, 8, 8, 8), 2, 1, 8)
    )
    unet = D.UNet2DConditionModel(
        sample_size=size,
        down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * (len(widths) - 1)],
        up_block_types=[*["CrossAttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"],
        block_out_channels=widths,
        layers_per_block=layers,
        transformer_layers_per_block=depths,
        attention_head_dim=heads,
        cross_attention_dim=sum(dims),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time,
        projection_class_embeddings_input_dim=6 * time + dims[1],
    )
    vae = D.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=layers,
        block_out_channels=vae_widths,
        norm_num_groups=groups,
        scaling_factor=0.13025,
    )
    text = lambda kind, dim, depth, act: kind(
        T.CLIPTextConfig(
            hidden_size=dim,
            intermediate_size=4 * dim,
            num_attention_heads=max(2, dim // 64),
            hidden_act=act,
            num_hidden_layers=depth if full else 2,
            projection_dim=dim,
        )
    )
    words = T.CLIPTokenizer(
        bpe.encoder, [*bpe.bpe_ranks], end, "<start_of_text>", end, end, model_max_length=77
    )
    return D.StableDiffusionXLPipeline(
        vae,
        text(T.CLIPTextModel, dims[0], 12, "quick_gelu"),
        text(T.CLIPTextModelWithProjection, dims[1], 32, "gelu"),
        words,
        words,
        unet,
        D.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


def load_pipeline(args, device, **dtypes):
    """-> diffusers' pipeline of --model, frozen, parts in dtypes. ValueError: of another kind, or a part missing."""
    (
        (diffusers := lib("diffusers")).logging.set_verbosity_error(),
        diffusers.logging.disable_progress_bar(),
    )
    torch.manual_seed(0)  # random weights are alike on all ranks, and when a run goes on
    if args.model:
        index, folder = diffusers.DiffusionPipeline.load_config(args.model), Path(args.model)
        lost = [
            part
            for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
            if part not in index or folder.is_dir() and not (folder / part).is_dir()
        ]
        if lost:
            raise ValueError(
                f"{folder} has no {lost[0]}: give SDXL, Stable Diffusion 1.5 or a whole folder"
            )
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            args.model, dtype=dtypes, safety_checker=None
        )
    else:
        with device:
            pipe = random_pipeline(args.dry_run == "full")
    if pipe.scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"{args.model} predicts no noise: no SDXL")
    for name, net in pipe.components.items():
        if isinstance(net, nn.Module):
            net.to(device, dtypes.get(name, dtypes["default"])).eval().requires_grad_(False)
    return pipe.set_progress_bar_config(disable=True) or pipe


def timesteps(args):
    return [
        999 - i * (1000 // args.student_steps) for i in range(args.student_steps)
    ]  # 999, 749, ...


def pixels(args, pipe):
    return args.image_size or pipe.unet.config.sample_size * pipe.vae_scale_factor


def added(c):
    return dict(text_embeds=c["pooled"], time_ids=c["ids"]) if "pooled" in c else None


def denoiser(unet, schedule):
    return amd.x0_from_eps(
        lambda x_t, t, c: (
            running.autocast(x_t)(unet.__call__)(
                x_t, t, c["text"], added_cond_kwargs=added(c)
            ).sample
        ),
        schedule,
    )


def decoder(vae):
    return lambda x: running.autocast(x)(vae.decode)(
        x / vae.config.scaling_factor
    ).sample.float()  # to about [-1, 1]


def conditions(args, pipe, read, device):
    """-> encode(prompts, index (B,)) to what the UNet and, by `read`, the reward ask for; null: the empty prompt."""
    nets = [net for name, net in pipe.components.items() if name.startswith("text_encoder")]

    @torch.no_grad()
    def embed(texts):
        for net in nets:
            net.to(device)
        text, _, *more = pipe.encode_prompt(
            texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        for net in nets if args.offload_text else ():
            net.to("cpu")
        return dict(text=text, pooled=more[0]) if more else dict(text=text)

    def encode(prompts, index):
        which, places = index.unique(return_inverse=True)  # K samples share a prompt
        texts, size = [prompts[i] for i in which.tolist()], [pixels(args, pipe)] * 2
        c = {k: v[places.to(device)] for k, v in (embed(texts) | dict(wish=read(texts))).items()}
        return c | dict(
            ids=torch.tensor([[*size, 0, 0, *size]], device=device).repeat(len(index), 1),
            index=index,
        )

    empty = {} if pipe.config.get("force_zeros_for_empty_prompt") else embed([""])

    def null(c):
        return c | {
            k: empty[k].expand_as(c[k]) if empty else 0 * c[k] for k in ("text", "pooled") if k in c
        }

    return encode, null


def adopt(pipe, path):
    """Give pipe the student in path for its UNet. ValueError: that is none, or of another model."""
    path, own = (
        path / "student" if (path / "student").exists() else path,
        pipe.unet.config.cross_attention_dim,
    )
    try:
        if not (path / "config.json").exists():
            pipe.load_lora_weights(str(path))
        else:
            pipe.unet = type(pipe.unet).from_pretrained(path, dtype=pipe.dtype).to(pipe.device)
        if pipe.unet.config.cross_attention_dim != own:
            raise ValueError("its texts are of another width")
    except Exception as error:
        raise ValueError(f"{path} is no student of --model: take one ({error!s:.80})") from None


def gan_head(width, side):
    """DMD2's: a bottleneck (B, width, side, side) halved down to 4, then taken whole -> (B, 1, 1, 1)."""
    if side < 4 or side & (side - 1):
        raise ValueError(f"dmd2's bottleneck is {side} wide: choose --image-size 2 ** n")
    convs = [nn.Conv2d(width, width, 4, 2, 1) for _ in range(side.bit_length() - 3)] + [
        nn.Conv2d(width, width, 4)
    ]
    return nn.Sequential(
        *[m for f in convs for m in (f, nn.GroupNorm(32, width), nn.SiLU())], nn.Conv2d(width, 1, 1)
    )


def logits(unet, x_t, t, c):
    """D(x_t) (B,): unet.head of what its middle block gives; the other half of the UNet is not run."""
    with running.autocast(x_t):
        emb = unet.time_embedding(unet.get_time_embed(x_t, (1000 * t).round()))
        aug, h = unet.get_aug_embed(emb, c["text"], added(c)), unet.conv_in(x_t)
        for block in [*unet.down_blocks, unet.mid_block]:
            attends = (
                dict(encoder_hidden_states=c["text"])
                if hasattr(block, "has_cross_attention")
                else {}
            )
            h = block(h, temb=emb if aug is None else emb + aug, **attends)
            h = h[0] if isinstance(h, tuple) else h
        return unet.head(h).float().sum((1, 2, 3))


# ---------------------------------------------------------------------------------------------- reward, judges and data
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


def form(size, mean, std):  # PIL's images to (3, size, size)
    return v2.Compose(
        [
            v2.Resize(size, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def square(image, size=224):
    """HPSv2's preprocessing of (B, 3, H, W) in [0, 1]: longest side to 224, black around, CLIP's mean and std."""
    h, w = (round(side * size / max(image.shape[2:])) for side in image.shape[2:])
    if max(image.shape[2:]) != size:
        image = v2.functional.resize(image, [h, w], v2.InterpolationMode.BICUBIC)
    image = F.pad(
        image, ((size - w) // 2, (size - w + 1) // 2, (size - h) // 2, (size - h + 1) // 2)
    )
    return v2.functional.normalize(image, MEAN, STD)


def load_hps(args, device):
    """HPSv2.1 -> read(prompts), features (B, D), and rate(images as of `square`, those features), 100 cos (B,)."""
    C, gpu, tokenize = (
        lib("open_clip"),
        device.type == "cuda",
        lib("open_clip").get_tokenizer("ViT-H-14"),
    )
    file = args.hps or (
        None if args.dry_run else hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    )
    try:
        net = (
            C.CLIP(
                32,
                C.CLIPVisionCfg(2, 32, 16, patch_size=56),
                C.CLIPTextCfg(width=32, heads=2, layers=2),
            )
            if (args.dry_run == "tiny")
            else C.create_model("ViT-H-14", file and str(file), precision="fp16" if gpu else "fp32")
        )
    except Exception as error:
        raise ValueError(f"{file} is no HPS_v2.1_compressed.pt ({error!s:.99})") from None
    net.to(device).eval().requires_grad_(False)

    def unit(
        f, v, graph=False
    ):  # in fp16 as its authors do, but a gradient needs the range of bf16
        with torch.autocast(device.type, torch.bfloat16 if graph else torch.float16, enabled=gpu):
            return F.normalize(f(v).float(), dim=1)

    return (
        lambda prompts: unit(net.encode_text, tokenize(prompts).to(device)),
        lambda image, text: (
            100 * (unit(net.encode_image, image, image.requires_grad) * text).sum(1)
        ),
    )


def load_reward(args, pipe, device):
    """-> reward(x, c), HPSv2 of latents (B,), with a gradient if x has one; its `read`; distances that it saw."""
    (read, rate), seen, vae = load_hps(args, device), [], pipe.vae
    if args.reward_vae:
        vae = lib("diffusers").AutoencoderTiny.from_pretrained(args.reward_vae).to(device)
    view = lambda x, decode=decoder(vae): square(((decode(x) + 1) / 2).clamp(0, 1))

    def reward(
        x, c
    ):  # one at a time, and again for a gradient: nothing is as large as the decoder's activations
        images = torch.cat(
            [
                torch.utils.checkpoint.checkpoint(view, part, use_reentrant=False)
                for part in x.split(1)
            ]
        )
        apart = (
            (images[1:] - images[:-1])
            .detach()
            .abs()
            .mean((1, 2, 3))[c["index"][1:] == c["index"][:-1]]
        )
        seen[:] = [*seen, apart][
            -args.accum * args.fake_steps :
        ]  # of an update: how unlike samples of a prompt are
        return rate(images, c["wish"])

    return reward, read, seen


def hpsv2(args, device):  # a judge: images of PIL, prompts -> (B,)
    (read, rate), tensor = (
        load_hps(args, device),
        v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]),
    )
    return lambda images, texts: rate(
        torch.cat([square(tensor(im)[None].to(device)) for im in images]), read(texts)
    )


def pickscore(
    args,
    device,
    name="yuvalkirstain/PickScore_v1",
    processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
):
    T = lib("transformers")
    net, read = (
        T.AutoModel.from_pretrained(name).to(device).eval(),
        T.AutoProcessor.from_pretrained(processor),
    )

    def judge(images, prompts):
        out = net(
            **read(
                images=images, text=prompts, padding=True, truncation=True, return_tensors="pt"
            ).to(device)
        )
        return net.logit_scale.exp() * (out.image_embeds * out.text_embeds).sum(1)

    return judge


def imagereward(
    args, device, file=None, tokenizer="bert-base-uncased", vit="vit_large_patch16_224", **bert
):
    """ImageReward-v1.0 (arXiv 2304.05977): BLIP, whose text reads the image, and five linear layers."""
    T, see, drop = lib("transformers"), lib("timm").create_model(vit, num_classes=0), nn.Identity()
    words, view = T.AutoTokenizer.from_pretrained(tokenizer), form(224, MEAN, STD)
    config = T.BlipTextConfig(num_attention_heads=12, encoder_hidden_size=see.embed_dim, **bert)
    text = T.models.blip.modeling_blip_text.BlipTextModel(config, add_pooling_layer=False)
    mlp = nn.Sequential(
        nn.Linear(config.hidden_size, 1024),
        drop,
        nn.Linear(1024, 128),
        drop,
        nn.Linear(128, 64),
        drop,
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    blip = nn.ModuleDict(dict(visual_encoder=see, text_encoder=text))
    net = nn.ModuleDict(dict(blip=blip, mlp=nn.ModuleDict(dict(layers=mlp))))
    state = torch.load(
        file or hf_hub_download("THUDM/ImageReward", "ImageReward.pt"), "cpu", weights_only=True
    )
    net.load_state_dict({k: state[k] for k in net.state_dict()}), net.to(device).eval()

    def judge(images, prompts):
        c = words(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(device)
        image = see.forward_features(torch.stack([view(image) for image in images]).to(device))
        h = text(c.input_ids, c.attention_mask, encoder_hidden_states=image, is_decoder=False)[0]
        return (mlp(h[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072

    return judge


JUDGES = dict(hpsv2=hpsv2, pickscore=pickscore, imagereward=imagereward)
OURS = [
    f"{style} of {subject} {place}"
    for style in ("a photograph", "an oil painting", "a sketch")
    for subject in ("a red fox", "an old sailor", "a glass teapot", "a lighthouse")
    for place in ("in snow", "at dawn", "in the rain")
]


def read_prompts(path):
    """Rows {prompt, ..} of text, jsonl or json; ours if path is None. ValueError: none, not UTF-8, one too long."""
    if not path:
        return [dict(prompt=prompt) for prompt in OURS]
    try:
        rows = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        rows = json.loads("".join(rows)) if path.suffix == ".json" else rows
        rows = [json.loads(row) if path.suffix == ".jsonl" else row for row in rows]
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 or no {path.suffix} ({error}): mend") from None
    rows = [row if isinstance(row, dict) else dict(prompt=row) for row in rows or [""]]
    for i, row in enumerate(rows):
        prompt = row.setdefault("prompt", row.get("text", row.get("caption")))
        if not isinstance(prompt, str) or not 0 < len(prompt) <= 2000:
            raise ValueError(
                f"{path}, prompt {i + 1}: give 1 to 2,000 characters (CLIP reads 77 tokens)"
            )
    return rows


def real_images(args, rows, pipe, device):
    """-> truth(c): latents of the images whose texts are c's prompts."""

    def latent(i, view=form(pixels(args, pipe), [0.5], [0.5]), vae=pipe.vae):
        x = view(Image.open(args.real_data / rows[i]["file_name"]).convert("RGB"))[None].to(device)
        with running.autocast(x), torch.no_grad():
            return vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor

    return lambda c: torch.cat([latent(i) for i in c["index"].tolist()])


# ---------------------------------------------------------------------------------------------- optimizers and sharding
TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut time_emb_proj "
    "downsamplers.0.conv upsamplers.0.conv"
).split()  # of a LoRA, DMD2's


def parts_of(net, *kinds):
    return [m for m in net.modules() if type(m).__name__ in kinds]


def networks(args, unet, side, device):
    """-> real, student, fake; `blended`, the adapted teacher of dmdr, magic. LoRAs share the tensors of one base."""
    nets, lora = (
        dict(real=unet),
        args.lora_rank
        and lib("peft").LoraConfig(r=args.lora_rank, lora_alpha=8, target_modules=TARGETS),
    )
    torch.manual_seed(0)  # adapters and head begin alike on all ranks
    for name in ("student", "fake"):
        net = nets[name] = running.share(unet) if lora else copy.deepcopy(unet).requires_grad_()
        if lora:
            net.add_adapter(lora)
        if args.checkpointing:
            net.enable_gradient_checkpointing()
        for p in net.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    if not lora:
        unet.to(running.half(device))
    if args.method in ("dmdr", "magic"):
        nets["blended"] = running.share(net) if lora else copy.deepcopy(unet)
    if args.method == "dmd2":
        net.head = gan_head(
            unet.config.block_out_channels[-1], side >> len(unet.down_blocks) - 1
        ).to(device)
        net.logits = partial(logits, net)
    torch._dynamo.config.recompile_limit = (
        64  # two widths, two batches, with and without graph, with and without LoRA
    )
    for name, each in nets.items():
        if args.compile and name != "blended":  # whose LoRA's scale changes in each step
            for block in parts_of(each, "BasicTransformerBlock", "ResnetBlock2D"):
                block.compile(dynamic=False)
        if not lora:
            running.shard(
                each, parts_of(each, "Transformer2DModel", "ResnetBlock2D"), running.half(device)
            )
    if args.method == "dmd2" and not lora:
        torch.distributed.fsdp.register_fsdp_forward_method(net, "logits")
    return nets


def prepare(args, device):
    """-> a namespace of all names below: networks (nets, call), opts, ema, parts to save, train, generate, batch ..."""
    whole, (rank, world, _) = (
        dict(vae=torch.float32) | ({} if args.lora_rank else dict(unet=torch.float32)),
        running.ranks(),
    )
    pipe = load_pipeline(args, device, default=running.half(device), **whole)
    schedule = amd.vp(
        lib("diffusers").DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod
    )
    side, levels = pixels(args, pipe) // pipe.vae_scale_factor, [i / 1000 for i in timesteps(args)]
    method = amd.method(
        args.method,
        s=args.s,
        tau=args.tau,
        lam=args.lam,
        fade=max(1, args.steps // 2),
        unit_w=args.tau < 1,
    )
    nets, (reward, read, seen) = (
        networks(args, pipe.unet, side, device),
        load_reward(args, pipe, device),
    )
    call, (encode, null) = (
        {k: denoiser(net, schedule) for k, net in nets.items()},
        conditions(args, pipe, read, device),
    )
    rows = read_prompts(args.real_data / "metadata.jsonl" if args.real_data else args.prompts)
    prompts, truth = [row["prompt"] for row in rows], real_images(args, rows, pipe, device)

    def generate(c, u=1.0):
        z = torch.randn(len(c["text"]), 4, side, side, device=device)
        return amd.backward_simulation(call["student"], z, c, levels, u, schedule)

    def adapt(r):
        if not args.lora_rank:
            amd.blend(nets["blended"], nets["real"], nets["fake"], r)
        for m in running.adapters(nets["blended"]).values():
            m.set_scale("default", r)  # the fake's own, weighed by r
        return call["blended"]

    def batch(n, j):  # of all groups, what this rank and micro-batch have
        seeded = torch.Generator().manual_seed(amd.key(args.seed, n))
        index = torch.randint(
            len(prompts), (args.batch // args.group,), generator=seeded
        ).repeat_interleave(args.group)
        return encode(prompts, index.view(world * args.accum, -1)[rank * args.accum + j])

    adam = (
        lib("bitsandbytes").optim.AdamW8bit
        if args.adam8bit
        else partial(torch.optim.AdamW, fused=True)
    )
    opts = [
        adam([p for p in nets[name].parameters() if p.requires_grad], lr, weight_decay=0.01)
        for name, lr in (("student", args.lr), ("fake", args.fake_lr))
    ]
    train = partial(
        amd.train,
        method,
        student=generate,
        real=call["real"],
        fake=call["fake"],
        batch=batch,
        null=null,
        opt_student=opts[0],
        opt_fake=opts[1],
        reward=reward,
        K=args.group,
        w=args.w,
        schedule=schedule,
        space="eps",
        truth=truth,
        logits=getattr(nets["fake"], "logits", None),
        adapt=adapt,
        accum=args.accum,
        fake_steps=args.fake_steps,
        update=running.update,
        ranks=running.ranks(),
        seed=args.seed,
    )
    ema = args.ema and running.EMA(nets["student"], args.ema)
    parts = dict(student=(nets["student"], opts[0], ema), fake=(nets["fake"], opts[1], None))
    return argparse.Namespace(**locals())


# ------------------------------------------------------------------------------------------------------------- training
def begin(args):
    """OUT with its config.json. A run may go on to other --steps, on other ranks, in other chunks."""
    free = ["accum", "chunk"] if (args.out / "student").exists() else ["accum", "chunk", "steps"]
    return running.open_run(args.out, dict(vars(args), resume=None), args.resume, free)


def train(args, device):
    """--steps student updates; then OUT/student: a UNet's folder, or pytorch_lora_weights.safetensors."""
    if (args.out / "student").exists():
        return begin(args)  # done; or of another run, and it says so
    run, steps = prepare(args, device), args.steps
    if args.init and not running.load(args.init, **run.parts):
        raise ValueError(f"{args.init} holds no checkpoint: no run")
    start = running.load(out := begin(args), **run.parts)
    log, bar = (
        running.Log(out, args.batch, start),
        running.progress(total=steps, initial=start, desc=out.name),
    )
    for _, row in zip(range(start, steps), run.train(start=start), strict=False):
        run.ema and run.ema.update(), bar.update()
        due = lambda every, step=row["step"]: step % every == 0 or step == steps
        if due(args.log_every):
            bar.set_postfix(
                reward=log(row | dict(variety=torch.cat(run.seen).mean())).get("reward")
            )
        if due(args.sample_every):
            show(args, run, out / f"samples/step_{row['step']}.png")
        if due(args.save_every):
            running.save(out, row["step"], keep=2, **run.parts)  # each of 58 GiB, if whole
    export(args, run)


def export(args, run):
    """OUT/student, of the average if there is one, whole or not at all. OSError: no room."""
    net, new, _ = run.nets["student"], args.out / "student.unfinished", run.ema and run.ema.swap()
    state = (
        lib("peft").get_peft_model_state_dict(net)
        if args.lora_rank
        else get_model_state_dict(
            net, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    )
    for name, m in running.adapters(
        net
    ).items():  # readers who are told no alpha take the rank for it
        state[f"{name}.lora_B.weight"] = state[f"{name}.lora_B.weight"] * m.scaling["default"]
    if running.ranks()[0]:
        return
    try:
        if args.lora_rank:
            type(run.pipe).save_lora_weights(new, state)
        else:
            (
                (unet := type(net).from_config(net.config)).load_state_dict(state),
                unet.save_pretrained(new),
            )
    except Exception as error:
        raise OSError(f"{new} unwritable ({error!s:.99}): make room, then --resume") from None
    new.rename(args.out / "student")


@torch.no_grad()
def show(args, run, path):
    """A grid of four prompts by four seeds, always the same ones, by the student's average if there is one."""
    index = (torch.arange(4) * len(run.prompts) // 4).repeat_interleave(4)
    run.ema and run.ema.swap(), torch.manual_seed(amd.key(args.seed))
    x = torch.cat([run.generate(run.encode(run.prompts, part))[0] for part in index.split(4)])
    run.ema and run.ema.swap()
    images = [
        F.interpolate(decoder(run.pipe.vae)(part), (256, 256), mode="area") for part in x.split(1)
    ]
    if running.ranks()[0] == 0:
        path.parent.mkdir(exist_ok=True), save_image((torch.cat(images) + 1) / 2, path, nrow=4)


# ----------------------------------------------------------------------------------------------------- sample and score
def listing(args):
    """-> rows {file, of: the prompt's row} of what --layout wants, in order."""
    files, n, styles = (
        [args.prompts],
        1 + 3 * (args.layout == "geneval"),
        "anime concept-art paintings photo".split(),
    )
    if args.layout == "hpdv2":
        files = [(args.prompts or Path("benchmark")) / f"{style}.json" for style in styles]
    return [
        dict(
            file=LAYOUTS[args.layout].format(style=file and file.stem, row=i // n, k=i % n, i=i),
            of=row,
        )
        for file in files
        for i, row in enumerate(row for row in read_prompts(file) for _ in range(n))
    ]


@torch.no_grad()
def sample(args, device):
    """Images by diffusers' own pipeline to OUT/images; any number of processes share them, each image has its seed."""
    rows, (rank, world, _) = listing(args), running.ranks()
    pipe = load_pipeline(
        args, device, default=torch.float16 if device.type == "cuda" else torch.float32
    )
    _, out, _ = adopt(pipe, args.init), begin(args), pipe.vae.enable_slicing()
    pipe.scheduler = lib("diffusers").LCMScheduler.from_config(pipe.scheduler.config)
    if rank == 0:
        running.write(out / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    rows = [row for row in rows[rank::world] if not (out / "images" / row["file"]).exists()]
    for part in running.progress(
        [rows[i : i + args.chunk] for i in range(0, len(rows), args.chunk)]
    ):
        noise = [
            torch.Generator(device).manual_seed(amd.key(args.seed, row["file"])) for row in part
        ]
        images = pipe(
            [row["of"]["prompt"] for row in part],
            height=args.image_size,
            width=args.image_size,
            timesteps=timesteps(args),
            guidance_scale=0.0,
            generator=noise,
        ).images
        for row, image in zip(part, images, strict=True):
            (path := out / "images" / row["file"]).parent.mkdir(parents=True, exist_ok=True)
            if args.layout == "geneval":
                (path.parents[1] / "metadata.jsonl").write_text(json.dumps(row["of"]))
            image.save(new := path.with_name(f"_{path.name}"), quality=95), new.rename(path)


@torch.no_grad()
def score(args, device):
    """Print the judges' mean of folders that `sample` wrote, by style if there are some; of two, the winning rate."""
    rows, *others = [
        [json.loads(line) for line in (run / "prompts.jsonl").open()] for run in args.samples
    ]
    if others not in ([], [rows]):
        raise ValueError("--samples are of other prompts or layouts: compare like with like")
    styles = [
        row["file"].split("/")[0] if row["file"].count("/") == 1 else "" for row in rows
    ]  # of hpdv2
    for name in args.judges:
        judge, scores = JUDGES[name](args, device), []
        for run in args.samples:
            r = [
                judge(
                    [
                        Image.open(run / "images" / row["file"]).convert("RGB")
                        for row in rows[i : i + args.chunk]
                    ],
                    [row["of"]["prompt"] for row in rows[i : i + args.chunk]],
                )
                for i in running.progress(range(0, len(rows), args.chunk), desc=name)
            ]
            scores.append(r := torch.cat(r).double().cpu())
            means = {
                k: r[[style == k for style in styles]].mean().item()
                for k in sorted({*styles} - {""})
            }
            print(
                json.dumps(
                    dict(samples=str(run), judge=name, images=len(r), mean=r.mean().item(), **means)
                )
            )
        if others:  # ties count half; the interval is Wilson's, 95 %
            p, z = (scores[0] - scores[1]).sign().add(1).mean().item() / 2, 1.96**2 / len(rows)
            middle, width = (p + z / 2) / (1 + z), (p * (1 - p) * z + z**2 / 4) ** 0.5 / (1 + z)
            print(
                json.dumps(
                    dict(judge=name, winning_rate=p, low=middle - width, high=middle + width)
                )
            )


def speed(args, device):
    """Print what an update takes beside the bare passes of the same networks that it needs, and the GPU's memory."""
    run, k, n, off = prepare(args, device), args.accum, args.student_steps, torch.no_grad()
    clock = running.Clock()
    c, (student, real, fake) = run.batch(0, 0), map(run.call.get, ("student", "real", "fake"))
    x, t, c_two = off(run.generate)(c)[0], 0 * c["wish"][:, 0] + 0.5, amd.pair(c, run.null(c))
    for name, call in dict(
        forward=off(lambda: student(x, t, c)),
        backward=lambda: fake(x, t, c).square().mean().backward(),
        real=off(lambda: real(torch.cat([x, x]), torch.cat([t, t]), c_two)),
        reward=off(lambda: run.reward(x, c)),
        text=lambda: run.batch(0, 0),
        adamw=run.opts[1].step,
    ).items():
        clock(name, call)
    one, three = (
        clock(
            f"update with {i} of the fake",
            partial(next, run.train(student=lambda c, u: run.generate(c), fake_steps=i)),
        )
        for i in (1, 3)
    )
    fakes = dict(
        text=k, forward=n * k, reward=k, backward=k, adamw=1
    )  # backward: forward and backward
    both = fakes | dict(forward=(n if k > 1 else n - 1) * k, backward=2 * k, real=k, adamw=2)
    clock.ratio(f"fake update of {args.batch}", (three - one) / 2, fakes)
    clock.ratio(f"student and fake update of {args.batch}", one, both)
    running.say(f"samples: {len(x)}; peak {running.peak_gib():.1f} GiB")


def main(args):
    """ValueError for what cannot work, before anything is written or downloaded."""
    counts = "batch accum group fake_steps student_steps steps chunk log_every save_every sample_every lr fake_lr w"
    bad, world = (
        [k for k in counts.split() if not vars(args)[k] > 0],
        int(os.environ.get("WORLD_SIZE", 1)),
    )
    trains, split, real = (
        args.task == "train",
        world * args.accum,
        args.real_data if args.task == "train" else None,
    )
    rows = (
        ()
        if args.task == "score"
        else read_prompts(real / "metadata.jsonl")
        if real
        else listing(args)
    )
    files = [args.init, args.hps] + [
        real / row.get("file_name", "no file_name") for row in rows if real
    ]
    lost = [str(path) for path in files if path and not path.exists()]
    for wrong, fix in (
        (bad, f"choose {', '.join(bad)} above 0"),
        (lost, f"no such file or folder: {', '.join(lost[:3])}"),
        (
            not 0 <= args.ema < 1 or args.lora_rank < 0,
            "choose --ema in [0, 1), --lora-rank at least 0",
        ),
        ((args.image_size or 64) % 64, "choose --image-size as a multiple of 64"),
        (
            trains and (args.method == "dmd2") == (not real),
            "--real-data is for dmd2, which needs it",
        ),
        (
            args.layout == "geneval" and any("tag" not in row["of"] for row in rows),
            "geneval: give its metadata",
        ),
        (trains and args.lam and args.method not in LAM, "--lam is for dmd2 and dmdr"),
        (
            trains and args.adam8bit and world > 1 and not args.lora_rank,
            "--adam8bit: give --lora-rank, or one GPU",
        ),
        (
            trains and args.batch % (split or 1),
            f"--batch {args.batch} of {split} ranks x --accum: take a multiple",
        ),
        (args.task == "sample" and not args.init, "give --init: a run, a UNet's folder or a LoRA"),
        (
            args.task == "score" and len(args.samples or ()) not in (1, 2),
            "give --samples, a folder or two",
        ),
    ):
        running.require(not wrong, fix)
    method = amd.method(args.method, s=args.s, tau=args.tau, lam=args.lam)
    if trains and (args.group > 1 or method.senses):
        amd.group_advantage(torch.zeros(args.batch), args.group)
    job = (
        speed
        if args.dry_run == "full" and trains
        else dict(train=train, sample=sample, score=score)[args.task]
    )
    device = running.launch()
    if args.task != "score" and running.together((args.out / "config.json").exists()):
        begin(args)  # a folder that cannot be used is refused before anything is loaded
    job(args, device)
    if job in (train, sample) and running.ranks()[0] == 0:
        print(f"see {args.out}")


if __name__ == "__main__":
    running.run(main, parse, "raise --accum, take --lora-rank 64 --adam8bit, lower --chunk")
