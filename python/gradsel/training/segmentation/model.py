"""SAM as a model that segments without prompts, and which of its parameters GPS ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.methods import Parts
from gradsel.parameters.names import named_parameters
from gradsel.training.config import ModelConfig
from gradsel.training.models import Loaded, image_input, quiet_transformers, settings_of, timm_name, unavailable

#: Without prompts, no point, box or mask is embedded; of the four masks that the decoder can make, the first one
#: counts, and its guess of the IoU does not.
_UNUSED = re.compile(
    r"prompt_encoder\.(mask_embed|point_embed|not_a_point_embed)\.|"
    r"mask_decoder\.(iou_prediction_head|output_hypernetworks_mlps\.[1-9]\d*)\."
)
_DECODER = re.compile(r"mask_decoder\.|prompt_encoder\.no_mask_embed\.")
_NECK_BIAS = re.compile(r"vision_encoder\.neck\.layer_norm\d\.bias")
_POSITIONS = re.compile(r"vision_encoder\..*\.rel_pos_[hw]|.*\.positional_embedding|vision_encoder\.pos_embed")


def load_sam(config: ModelConfig, seed: int = 0, image_size: int | None = None) -> Loaded:
    """Makes a SAM of transformers; with ``weights: none`` its initial values depend on ``seed`` alone.

    Args:
        image_size: None, or the size that the model has.

    Raises:
        ValueError: there is no such model, it is not a SAM, its weights cannot be had, or it has another size.
    """
    import transformers

    if timm_name(config.name) is not None:
        raise ValueError(
            f"model.name: {config.name} is a model of timm; segmentation needs a SAM of transformers, such as "
            "facebook/sam-vit-base"
        )
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        settings = settings_of(config)
        if settings.model_type != "sam":
            raise ValueError(
                f"model.name: {config.name} ({settings.model_type}) is not a SAM, such as facebook/sam-vit-base, which "
                "segmentation needs"
            )
        size = settings.vision_config.image_size
        if image_size not in (None, size):
            raise ValueError(f"data.image_size is {image_size}, but {config.name} takes {size}; leave --image-size out")
        try:
            if config.weights == "none":
                model, missing = transformers.SamModel(settings), set()
            else:
                model, info = transformers.SamModel.from_pretrained(
                    config.name, config=settings, output_loading_info=True
                )
                missing = set(info["missing_keys"])
        except Exception as error:
            raise unavailable(config, error) from error
        if missing:
            raise ValueError(f"model.name: {config.name} lacks {len(missing)} weights of SAM, first {min(missing)}")
    image = image_input(config.name, settings, size)._replace(interpolation="bilinear")
    return Loaded(model.float(), "transformers", head=(), image=image, parts=sam_parts(model))


def sam_parts(model: nn.Module) -> Parts:
    """What becomes of the parameters of a SAM, as in the code that GPS's authors published for it.

    In the encoder, matrices and convolutions are ranked, the neck's included; biases are trained, also those of the
    neck's norms; other norms and all positions are frozen, the relative ones of attention as well, which
    :func:`gradsel.select` trains by default. Of the rest, the mask decoder and the embedding of "no mask" are trained
    whole, norms and tokens included. What has no gradient without prompts is frozen.
    """
    names = list(named_parameters(model))
    unused = tuple(name for name in names if _UNUSED.match(name))
    return Parts(
        head=tuple(name for name in names if _DECODER.match(name) and name not in unused),
        whole=tuple(name for name in names if _NECK_BIAS.fullmatch(name)),
        frozen=tuple(name for name in names if _POSITIONS.fullmatch(name)),
        unused=unused,
    )


def masks_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The logits of the masks [batch, height, width] that SAM makes without prompts, a quarter of its input's size."""
    found: Tensor = model(**inputs, multimask_output=False).pred_masks
    return found[:, 0, 0]


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [batch, height, width] of another size, in float32."""
    return F.interpolate(logits.float().unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus one minus the soft IoU, as SAM-Adapter and GPS train SAM.

    Args:
        logits: [batch, height, width] of any size; they are resized to that of the masks.
        masks: [batch, height, width] of 0 and 1.

    Returns:
        A scalar, float32: the cross-entropy is a mean over pixels, the IoU over images.
    """
    logits, target = resized(logits, (masks.shape[-2], masks.shape[-1])), masks.float()
    guess = logits.sigmoid()
    shared = (guess * target).sum((1, 2))
    union = guess.sum((1, 2)) + target.sum((1, 2)) - shared
    return F.binary_cross_entropy_with_logits(logits, target) + (1 - shared / union).mean()


def batch_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """:func:`mask_loss` of a batch with ``labels``: what weights are ranked by, as there are no classes to contrast."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return mask_loss(masks_of(model, inputs), batch["labels"])
