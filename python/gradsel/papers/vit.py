"""A vision transformer in timm's layout, for the demo, the tests and the benchmarks.

Modules and parameters have timm's names, so timm's checkpoints load, and selections fit both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value matrix."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Cuts images into square patches and projects each to a token."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021), initialised as in timm.

    Args:
        image_size, patch: side of the square images and patches, in pixels.
        channels: image channels.
        dim, depth, heads: width, number of blocks, attention heads per block.
        mlp_ratio: hidden width of each block's MLP divided by ``dim``.
        num_classes: outputs of the head.

    Raises:
        ValueError: ``patch`` does not divide ``image_size``, or ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch: int = 16,
        channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patch must divide image_size, got {patch} and {image_size}")
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} and {dim}")
        self.patch_embed = PatchEmbed(patch, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)  # like timm, leaves the patch embedding's convolution at torch's default

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [batch, channels, side, side] to the class token after the final norm, [batch, dim]."""
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.blocks(tokens + self.pos_embed)
        return self.norm(tokens[:, 0].contiguous())  # copied, so that backward does not keep the other tokens

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, channels, side, side] to logits [batch, classes]."""
        return self.head(self.forward_features(images))

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a newly initialised one."""
        self.head = nn.Linear(self.head.in_features, num_classes).to(self.head.weight)
        _init_linear(self.head)


def vit_base_patch16_224(num_classes: int = 1000) -> VisionTransformer:
    """ViT-B/16: 85,798,656 parameters and a head, not pre-trained."""
    return VisionTransformer(num_classes=num_classes)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
