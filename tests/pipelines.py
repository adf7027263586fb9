"""Tiny diffusion pipelines with random weights, as diffusers saves them, and PEFT adapters of components."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WIDTH = 16
"""Of text embeddings, and of half the UNet's inner channels."""


def perturb(model: Any, seed: int) -> Any:
    """Make every parameter random and different from its initial value: none is zero, one or symmetric."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def clip_text(seed: int, *, projects: bool = False, hidden: int = WIDTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=hidden,
        bos_token_id=62,
        eos_token_id=63,
        pad_token_id=63,
    )
    return perturb((CLIPTextModelWithProjection if projects else CLIPTextModel)(config), seed)


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"<unused{k}>" for k in range(62 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def vae(seed: int, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **settings,
    )
    return perturb(model, seed)


def unet(seed: int, **settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"cross_attention_dim": WIDTH, "attention_head_dim": 4, **settings},
    )
    return perturb(model, seed)


def stable_diffusion(folder: Path, **saving: Any) -> Path:
    """Save a Stable Diffusion: UNet, one text encoder, VAE, scheduler and tokenizer."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        unet=unet(1),
        text_encoder=clip_text(2),
        vae=vae(3),
        tokenizer=clip_tokenizer(folder.with_name(f"{folder.name}-words")),
        scheduler=DDIMScheduler(num_train_timesteps=20, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, **saving)
    return folder


def stable_diffusion_xl(folder: Path, **saving: Any) -> Path:
    """Save a Stable Diffusion XL whose two text encoders are alike in names and in shapes."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    words = clip_tokenizer(folder.with_name(f"{folder.name}-words"))
    pipeline = StableDiffusionXLPipeline(
        unet=unet(
            1,
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=1,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        text_encoder=clip_text(2),
        text_encoder_2=clip_text(4, projects=True),
        vae=vae(3),
        tokenizer=words,
        tokenizer_2=words,
        scheduler=EulerDiscreteScheduler(num_train_timesteps=20),
    )
    pipeline.save_pretrained(folder, **saving)
    return folder


def flux(folder: Path, **saving: Any) -> Path:
    """Save a Flux: a transformer, CLIP and T5 as text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    words = clip_tokenizer(folder.with_name(f"{folder.name}-words"))
    text = T5Config(vocab_size=64, d_model=WIDTH, d_ff=32, d_kv=8, num_layers=2, num_heads=2, is_encoder_decoder=False)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = FluxPipeline(
        transformer=perturb(transformer, 1),
        text_encoder=clip_text(2),
        text_encoder_2=perturb(T5EncoderModel(text), 4),
        vae=vae(3, shift_factor=0.1),
        tokenizer=words,
        tokenizer_2=words,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder, **saving)
    return folder


def stable_diffusion_3(folder: Path, **saving: Any) -> Path:
    """Save a Stable Diffusion 3: a transformer, two CLIPs and a T5 as text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    words = clip_tokenizer(folder.with_name(f"{folder.name}-words"))
    width = 2 * WIDTH
    text = T5Config(vocab_size=64, d_model=width, d_ff=32, d_kv=8, num_layers=2, num_heads=2, is_encoder_decoder=False)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=width,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=perturb(transformer, 1),
        text_encoder=clip_text(2, projects=True),
        text_encoder_2=clip_text(4, projects=True),
        text_encoder_3=perturb(T5EncoderModel(text), 5),
        vae=vae(3, shift_factor=0.1),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=words,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder, **saving)
    return folder


UNET_TARGETS = ("to_q", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "conv_in", "ff.net.2")
"""Linear layers, 3x3 and 1x1 convolutions."""
TEXT_TARGETS = ("q_proj", "v_proj", "fc1")
FLUX_TARGETS = ("to_q", "to_k", "proj_mlp", "x_embedder")
SD3_TARGETS = ("to_q", "to_k", "add_v_proj", "ff.net.2")
T5_TARGETS = ("q", "o", "wi")


def train(
    model: Any, folder: Path, targets: Sequence[str], *, rank: int = 3, alpha: float = 5, seed: int = 7, **config: Any
) -> Any:
    """Save a PEFT adapter of a component whose every factor is random; give the model with the adapter on it."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(folder)
    return wrapped.eval()
