"""A tiny transformer with adapters, and inputs for it."""

import torch
from diffusers import Ideogram4Transformer2DModel
from peft import LoraConfig
from torch import nn

from ideoflow.kernels.float8 import quantize_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]


def tiny(targets=ALL, fp8=False, seed=0, **lora):
    """A tiny base with projected text features, and adapters whose B is not zero."""
    torch.manual_seed(seed)
    model = Ideogram4Transformer2DModel(
        in_channels=16, num_layers=3, attention_head_dim=32, num_attention_heads=3, intermediate_size=160,
        adaln_dim=32, llm_features_dim=96, mrope_section=(6, 5, 5),
    )  # fmt: skip
    model.llm_cond_norm = model.llm_cond_proj = nn.Identity()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    if fp8:
        assert quantize_blocks(model) == 3 * 8
    model.to(DEVICE)
    if targets:
        model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, **lora))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, device=DEVICE) * 0.2
    return model


def inputs(layout, seed=1):
    torch.manual_seed(seed)
    latents = torch.randn(layout.image_total, 16, device=DEVICE)
    text = torch.randn(layout.text_total, 96, device=DEVICE)
    return latents, torch.rand(layout.samples, device=DEVICE), text
