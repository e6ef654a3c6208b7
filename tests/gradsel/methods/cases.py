"""Tiny vision models of every layout that methods add something to."""

from __future__ import annotations

import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.methods import Method
from gradsel.papers.vit import VisionTransformer
from tests.support import tiny


def own_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(image_size=32, patch=8, dim=24, depth=2, heads=2, num_classes=3).eval()


def hf_vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def timm_swin() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, drop_path_rate=0.0, **sizes).eval()


def hf_swin() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, embed_dim=12, depths=[2, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.0, num_labels=3
    )
    return transformers.SwinForImageClassification(config).eval()


def timm_convnext() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_mlp=False)
    return _without_layer_scale(model).eval()


def hf_convnext() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], num_labels=3, layer_scale_init_value=0.5
    )
    return transformers.ConvNextForImageClassification(config).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3).eval()


def _without_layer_scale(model: nn.Module) -> nn.Module:
    """A new ConvNeXt scales its blocks by 1e-6, which would hide what is added to them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    return model


VITS = {"own ViT": own_vit, "timm ViT": tiny.vit, "HF ViT": hf_vit}
SWINS = {"timm Swin": timm_swin, "HF Swin": hf_swin}
CONVNEXTS = {"timm ConvNeXt": timm_convnext, "HF ConvNeXt": hf_convnext}
VISION = {**VITS, **SWINS, **CONVNEXTS}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = model(batch["pixel_values"])
    return found if isinstance(found, Tensor) else found.logits


def train(how: Method, model: nn.Module, batches: list[dict[str, Tensor]], rate: float = 1e-2) -> None:
    optimizer = how.optimizer(model, lr=rate)
    for batch in batches:
        F.cross_entropy(logits(model, batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
