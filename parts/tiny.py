"""Random networks of the real classes, for dry runs and for tests.

A tiny one runs on a CPU in no time. A full one has the true sizes, to measure speed and memory. All
are frozen and in eval mode, and are made on torch's default device, in its default dtype:

    with torch.device("cuda"):
        vae = tiny.sd_vae("full")

The libraries are imported on the CPU all the same. They make tensors when they are imported first,
and keep them, and these must not lie on the device of whoever came first.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from parts import rewards

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ON_CPU = torch.device("cpu")
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # of all SDs


# --------------------------------------------------------------------------------- Stable Diffusion
def sd_vae(size: str, scaling_factor: float = 0.18215) -> "AutoencoderKL":
    """The autoencoder of Stable Diffusion, an eighth of an image a side, with 4 channels.

    size is "full" for the sizes of sd-vae-ft-ema, or "tiny" for 8 channels a layer.
    """
    with ON_CPU:
        from diffusers import AutoencoderKL

    widths = dict(tiny=(8, 8, 8, 8), full=(128, 256, 512, 512))[size]
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        block_out_channels=widths,
        norm_num_groups=widths[0] // 4,
        scaling_factor=scaling_factor,
    )
    return vae.eval().requires_grad_(False)


def sdxl_pipeline(size: str) -> "StableDiffusionXLPipeline":
    """Stable Diffusion XL, with both text encoders.

    size is "full" for the sizes of its base, or "tiny" for images of 64 pixels, a UNet of two
    levels, and texts of width 32.
    """
    with ON_CPU:
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

        tokenizer = clip_tokenizer()
        scheduler = EulerDiscreteScheduler(**BETAS)  # whose levels lie on the CPU, as when loaded

    return StableDiffusionXLPipeline(
        vae=sd_vae(size, scaling_factor=0.13025),
        text_encoder=clip_text(size),
        text_encoder_2=clip_text_projected(size),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=sdxl_unet(size),
        scheduler=scheduler,
    )


def sdxl_unet(size: str) -> "UNet2DConditionModel":
    """The UNet of SDXL, which is also told sizes of images and a text's pooled embedding."""
    with ON_CPU:
        from diffusers import UNet2DConditionModel

    if size == "full":
        sizes = dict(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),  # the number of heads, whatever diffusers calls it
        )
        text_width = 768 + 1280
        pooled_width = 1280
        time_width = 256
    else:
        sizes = dict(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 2),
        )
        text_width = 32 + 32
        pooled_width = 32
        time_width = 8

    attending = len(sizes["block_out_channels"]) - 1
    unet = UNet2DConditionModel(
        **sizes,
        down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * attending],
        up_block_types=[*["CrossAttnUpBlock2D"] * attending, "UpBlock2D"],
        cross_attention_dim=text_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + pooled_width,
    )
    return unet.eval().requires_grad_(False)


def sd15_pipeline(size: str) -> "StableDiffusionPipeline":
    """Stable Diffusion 1.5, with one text encoder, and no condition but the text's tokens.

    size is "tiny", for images of 64 pixels, a UNet of two levels, and texts of width 32.
    """
    with ON_CPU:
        from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

        tokenizer = clip_tokenizer()
        scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)

    if size != "tiny":
        raise ValueError(f"no Stable Diffusion 1.5 of size {size}: choose tiny")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=2,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=32,
    )
    return StableDiffusionPipeline(
        vae=sd_vae(size),
        text_encoder=clip_text(size),
        tokenizer=tokenizer,
        unet=unet.eval().requires_grad_(False),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# ------------------------------------------------------------------------------------- CLIP's texts
def clip_text(size: str) -> "CLIPTextModel":
    """The text encoder of Stable Diffusion 1.5, and the first of SDXL: OpenAI's ViT-L/14."""
    with ON_CPU:
        from transformers import CLIPTextConfig, CLIPTextModel

    widths = dict(
        tiny=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        full=dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    )[size]
    width = widths["hidden_size"]
    config = CLIPTextConfig(
        **widths, intermediate_size=4 * width, projection_dim=width, hidden_act="quick_gelu"
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def clip_text_projected(size: str) -> "CLIPTextModelWithProjection":
    """The second text encoder of SDXL: OpenCLIP's ViT-bigG/14."""
    with ON_CPU:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    widths = dict(
        tiny=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        full=dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20),
    )[size]
    width = widths["hidden_size"]
    config = CLIPTextConfig(
        **widths, intermediate_size=4 * width, projection_dim=width, hidden_act="gelu"
    )
    return CLIPTextModelWithProjection(config).eval().requires_grad_(False)


def clip_tokenizer() -> "CLIPTokenizer":
    """The tokenizer of all CLIPs, from the word list that open_clip brings along."""
    with ON_CPU:
        from open_clip import SimpleTokenizer
        from transformers import CLIPTokenizer

    words = SimpleTokenizer()
    begin, end = "<start_of_text>", "<end_of_text>"
    return CLIPTokenizer(
        words.encoder,
        [*words.bpe_ranks],
        unk_token=end,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        model_max_length=77,
    )


# ------------------------------------------------------------------------------------------ rewards
def dinov2(size: str) -> rewards.DINOv2Classifier:
    """DINOv2's classifier of 1,000 classes.

    size is "full" for ViT-L/14, or "tiny" for width 32, 4 layers and 2 heads.
    """
    with ON_CPU:
        import timm

    sizes = dict(tiny=dict(embed_dim=32, depth=4, num_heads=2), full={})[size]
    net = timm.create_model(rewards.NETWORK, pretrained=False, num_classes=0, **sizes)
    head = nn.Linear((rewards.LAYERS + 1) * net.embed_dim, 1000)
    return rewards.DINOv2Classifier(net, head).eval().requires_grad_(False)


def hpsv2(size: str) -> rewards.HPSv2:
    """HPSv2.

    size is "full" for ViT-H/14, or "tiny" for width 32, 2 layers and patches of 56 pixels.
    """
    with ON_CPU:
        import open_clip

    sizes = dict(
        tiny=dict(
            embed_dim=32,
            vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=56),
            text_cfg=dict(layers=2, width=32, heads=2),
        ),
        full=open_clip.get_model_config(rewards.CLIP),
    )[size]
    return rewards.HPSv2(open_clip.CLIP(**sizes)).eval().requires_grad_(False)
