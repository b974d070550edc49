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
from parts.videoalign import VideoAlign, add_marks

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        Qwen2Tokenizer,
        Qwen2VLModel,
        Qwen2VLProcessor,
    )

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


# ------------------------------------------------------------------------------------------- Wan2.1
WAN_SIZES = {  # of WanTransformer3DModel, whose defaults are 14B's
    "tiny": dict(
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=32,
        num_layers=2,
        text_dim=32,
        freq_dim=16,
    ),
    "1.3B": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14B": dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
}
WAN_HEAD_DIM = 128  # of 1.3B and 14B


def wan_transformer(size: str, i2v: bool = False) -> "WanTransformer3DModel":
    """The transformer of Wan2.1.

    size is "tiny", for texts of width 32, "1.3B" or "14B". With i2v it is one of image to video,
    which also sees an image's latents, their mask, and CLIP's features of the image.
    """
    with ON_CPU:
        from diffusers import WanTransformer3DModel

    sizes = dict(WAN_SIZES[size])
    if i2v:
        width = sizes["num_attention_heads"] * sizes.get("attention_head_dim", WAN_HEAD_DIM)
        sizes |= dict(
            in_channels=16 + 4 + 16,
            image_dim=16 if size == "tiny" else 1280,
            added_kv_proj_dim=width,
        )
    return WanTransformer3DModel(**sizes).eval().requires_grad_(False)


def wan_pipeline(size: str) -> "WanPipeline":
    """Wan2.1's text to video without its transformer, which is some hundred times larger.

    size is "full" for the sizes of UMT5-XXL and of Wan's VAE, or "tiny" for texts of width 32, in
    lower-case letters. The full text encoder has 5.7 billion weights, so make it in bfloat16:
    11 GiB instead of 21.
    """
    with ON_CPU:
        from diffusers import WanPipeline

    return WanPipeline(**wan_parts(size), transformer=None)


def wan_i2v_pipeline(size: str) -> "WanImageToVideoPipeline":
    """Wan2.1's image to video, with its transformer.

    size is "tiny", for images that CLIP sees at width 16.
    """
    with ON_CPU:
        from diffusers import WanImageToVideoPipeline
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    if size != "tiny":
        raise ValueError(f"no image to video of size {size}: choose tiny")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return WanImageToVideoPipeline(
        **wan_parts(size),
        image_processor=CLIPImageProcessor(),
        image_encoder=CLIPVisionModel(config).eval().requires_grad_(False),
        transformer=wan_transformer(size, i2v=True),
        transformer_2=None,
    )


def wan_parts(size: str) -> dict[str, object]:
    """What both of Wan's pipelines have: tokenizer, text encoder, VAE and scheduler."""
    with ON_CPU:
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
        from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

        pieces = ["<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz.,"]
        tokenizer = T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )

    text_sizes = dict(
        tiny=dict(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
        full=dict(
            vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64
        ),
    )[size]
    vae_sizes = dict(
        tiny=dict(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        full={},
    )[size]
    return dict(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**text_sizes)).eval().requires_grad_(False),
        vae=AutoencoderKLWan(**vae_sizes).eval().requires_grad_(False),
        scheduler=scheduler,
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


def videoalign(size: str) -> VideoAlign:
    """VideoAlign's VideoReward, with a random head of one row and a short text for its question.

    size is "full" for Qwen2-VL-2B, or "tiny" for width 32 and 2 layers.
    """
    net, processor = qwen2vl(size)
    add_marks(net, processor)
    template = "Rate <|VQ_reward|> and <|MQ_reward|> and {text_prompt} <|TA_reward|>"
    head = torch.randn(1, net.config.text_config.hidden_size)
    rate = VideoAlign(net, processor, head, template)
    return rate.eval().requires_grad_(False)


def qwen2vl(size: str) -> tuple["Qwen2VLModel", "Qwen2VLProcessor"]:
    """Qwen2-VL without its language head, and what makes its inputs of texts and videos.

    size is "full" for the sizes of 2B, or "tiny" for width 32 and 2 layers. The tokenizer knows
    single bytes and the tokens about a video. The chat template says nothing but what it is given.
    """
    with ON_CPU:
        from transformers import (
            Qwen2VLConfig,
            Qwen2VLImageProcessor,
            Qwen2VLModel,
            Qwen2VLProcessor,
            Qwen2VLVideoProcessor,
        )

        words = qwen_tokenizer(size)
        chat = (
            "{% for part in messages[0].content %}"
            "{{ part.text if part.type == 'text' else '<|video_pad|>' }}"
            "{% endfor %}"
        )
        processor = Qwen2VLProcessor(
            Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor(), chat_template=chat
        )

    widths = dict(
        tiny=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
        full=dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
        ),
    )[size]
    sections = dict(tiny=[2, 3, 3], full=[16, 24, 24])[size]  # of half a head, for t, h and w
    eye_widths = dict(tiny=dict(depth=2, embed_dim=32, num_heads=2), full={})[size]
    config = Qwen2VLConfig(
        text_config=dict(
            **widths,
            vocab_size=len(words),
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections),
        ),
        vision_config=dict(**eye_widths, hidden_size=widths["hidden_size"]),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
    )
    return Qwen2VLModel(config).eval().requires_grad_(False), processor


def qwen_tokenizer(size: str) -> "Qwen2Tokenizer":
    """A tokenizer of Qwen2-VL's kind, whose words are the 256 bytes.

    A full one has as many words as Qwen2-VL's, 151,657, so that the embedding has its true size.
    The others than bytes never come up.
    """
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    words = [*bytes_to_unicode().values(), *special]
    if size == "full":
        words += [f"word {i}" for i in range(len(words), 151_657)]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer
