"""Losses for selection: supervised contrastive learning, which needs no head, and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.parameters.names import unwrapped
from gradsel.ranking.pooling import features as features_of


class SupConLoss(nn.Module):
    """Supervised contrastive loss, L_out of equation 2 in Khosla et al. (NeurIPS 2020), as GPS and GRFT use it.

    The loss L2-normalises the features. Every sample, or every view of it, is an anchor; its positives are all other
    samples of the same class. The mean leaves out anchors without a positive.

    Args:
        temperature: divides the cosine similarities.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, labels: Tensor) -> Tensor: ...

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            features: [batch, dim], or [batch, views, dim] for several augmented views of each sample.
            labels: integer classes [batch].

        Returns:
            The loss, a float32 scalar (float64 for float64 features).

        Raises:
            ValueError: shapes do not match, or no class has two samples, so that no anchor has a positive.
        """
        if features.ndim not in (2, 3):
            raise ValueError(f"features must be [batch, dim] or [batch, views, dim], got {list(features.shape)}")
        if labels.shape != features.shape[:1]:
            raise ValueError(f"labels must be [{features.shape[0]}], one class per sample, got {list(labels.shape)}")
        if features.ndim == 3:
            labels = labels.repeat_interleave(features.shape[1])
            features = features.flatten(0, 1)
        if features.dtype in (torch.bfloat16, torch.float16):
            features = features.float()
        features = F.normalize(features, dim=1)

        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        positive = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~itself
        positives = positive.sum(1)
        anchors = positives > 0
        if not bool(anchors.any()):
            raise ValueError(
                f"no two of the {len(labels)} samples share a class, so no anchor has a positive; "
                "use larger batches or two augmented views of each sample"
            )
        similarity = (features @ features.t() / self.temperature).masked_fill(itself, -torch.inf)
        log_probability = similarity - similarity.logsumexp(1, keepdim=True)
        per_anchor = log_probability.masked_fill(~positive, 0.0).sum(1)[anchors] / positives[anchors]
        return -per_anchor.mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def contrastive(
    features: Callable[[Any, Any], Tensor] | str | None = None,
    *,
    temperature: float = 0.07,
    augment: Callable[[Any], Any] | None = None,
    views: bool = False,
) -> Callable[[Any, Any], Tensor]:
    """The loss of GPS and GRFT for :func:`gradsel.select`: :class:`SupConLoss` on batches of (inputs, labels), or of
    mappings with ``"labels"`` as the data collators of transformers make them.

    Args:
        features: ``features(model, inputs)``, which returns the input of the head, [batch, dim]; or the name of a
            method of the model that returns it, given the inputs. None: those of :func:`gradsel.features`.
        temperature: as in :class:`SupConLoss`.
        augment: makes one view of the inputs; if given, the loss compares two views of every sample.
        views: the features are [batch, views, dim]. Without it three dimensions are refused: they are usually tokens
            that nobody pooled, each of which would count as a view of its own.

    Returns:
        ``loss(model, batch)``, which raises a ValueError if the features have another shape.
    """
    if views and augment is not None:
        raise ValueError("views=True says that the features have views already; leave out augment")
    supcon = SupConLoss(temperature)

    def loss(model: Any, batch: Any) -> Tensor:
        inputs, labels = _split(batch)
        compute = _compute(features, model)
        seen = [inputs] if augment is None else [augment(inputs), augment(inputs)]
        found = [compute(model, view) for view in seen]
        for each in found:
            if each.ndim != 2 + views:
                raise ValueError(
                    f"features must be {'[batch, views, dim]' if views else '[batch, dim]'}, got {list(each.shape)}; "
                    + ("" if views else "pool them, as gradsel.features(model) does, or pass views=True if they are ")
                    + ("pass views=False for features without views" if views else "several views of each sample")
                )
        return supcon(found[0] if views else torch.stack(found, dim=1), labels)

    return loss


def _compute(given: Callable[[Any, Any], Tensor] | str | None, model: Any) -> Callable[[Any, Any], Tensor]:
    if given is None:
        return features_of(model)
    if not isinstance(given, str):
        return given
    method = getattr(unwrapped(model), given)
    return lambda _, inputs: method(**inputs) if isinstance(inputs, Mapping) else method(inputs)


def cross_entropy(model: Any, batch: Any) -> Tensor:
    """Cross-entropy through the head, as in GPS, Tab. 6c: ``loss(model, batch)``.

    Args:
        model: returns logits [batch, classes], or an object with these as ``logits``.
        batch: (inputs, labels), or a mapping with ``"labels"`` as the data collators of transformers make it. Of a
            mapping, the model's own ``loss`` counts if it returns one: that of a language model, for example.
    """
    inputs, labels = _split(batch)
    if not isinstance(batch, Mapping):
        outputs = model(inputs)
    else:
        outputs = model(**batch)
        if isinstance(own := getattr(outputs, "loss", None), Tensor):
            return own
    return F.cross_entropy(getattr(outputs, "logits", outputs), labels)


def _split(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch."""
    if not isinstance(batch, Mapping):
        inputs, labels = batch
        return inputs, labels
    if "labels" not in batch:
        raise ValueError(f"the batch has no 'labels', only {', '.join(map(repr, batch))}")
    return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
