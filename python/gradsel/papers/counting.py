"""Counting trained scalars by policy, and comparing the counts with the papers' tables.

Counts depend only on shapes, so models may be on the meta device, where they take no memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import Unpack

from gradsel.papers.presets import GPS, GRFT, Preset
from gradsel.papers.vit import vit_base_patch16_224
from gradsel.parameters.names import shaped_parameters
from gradsel.parameters.rules import RuleOptions, parameter_rules, sizes_of
from gradsel.ranking.policies import PerNeuron, Policy


@dataclass(frozen=True)
class Count:
    """Numbers of scalars in a model.

    Attributes:
        ranked: those that the policy selects.
        rankable: those that it selects from.
        whole: those in parameters that are trained whole, by reason: ``"bias"``, ``"head"``, ``"layer scale"``, ...
        total: all of them, the head included.
    """

    ranked: int
    rankable: int
    whole: Mapping[str, int]
    total: int

    @property
    def trained(self) -> int:
        """Number of trained scalars."""
        return self.ranked + sum(self.whole.values())

    @property
    def percent(self) -> float:
        """Trained scalars as a percentage of all."""
        return 100 * self.trained / max(self.total, 1)


def count(model: nn.Module, policy: Policy, **rules: Unpack[RuleOptions]) -> Count:
    """Counts what a policy trains in a model, without gradients. A selection trains as many if all ranked ones get one.

    Args:
        model: on any device, including meta.
        policy: how many entries are trained, and which compete.
        rules: the options of :func:`gradsel.parameters.rules.parameter_rules`.

    Raises:
        ValueError: as in :func:`gradsel.parameters.rules.parameter_rules`.
    """
    rule_of, parameters = parameter_rules(model, **rules), shaped_parameters(model)
    sizes = sizes_of(rule_of, parameters).values()
    whole: dict[str, int] = {}
    for name, rule in rule_of.items():
        if rule.action == "whole":
            whole[rule.reason] = whole.get(rule.reason, 0) + parameters[name].numel()
    rankable = sum(rows * cols for rows, cols in sizes)
    return Count(policy.budget(sizes), rankable, MappingProxyType(whole), sum(p.numel() for p in parameters.values()))


def trainable_count(model: nn.Module, policy: Policy, **rules: Unpack[RuleOptions]) -> int:
    """The number of trained scalars; arguments and errors are those of :func:`count`."""
    return count(model, policy, **rules).trained


# --- The papers' models ------------------------------------------------------------------------------------------


def _swin_b(classes: int) -> nn.Module:
    transformers = _transformers("swin-b")
    config = transformers.SwinConfig(
        embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=7, num_labels=classes
    )
    return transformers.SwinForImageClassification(config)


def _convnext_b(classes: int) -> nn.Module:
    transformers = _transformers("convnext-b")
    config = transformers.ConvNextConfig(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3], num_labels=classes)
    return transformers.ConvNextForImageClassification(config)


def _llama_1b(classes: int) -> nn.Module:
    transformers = _transformers("llama-3.2-1b")
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        num_labels=classes,
    )
    return transformers.LlamaForSequenceClassification(config)


def _transformers(model: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            f"{model} is built by transformers, which is not installed: pip install 'gradsel-kernels[bench]'",
            name="transformers",
        ) from None
    return transformers


#: Builders of the papers' models, from a number of classes; not pre-trained. All but ViT-B/16 need transformers, whose
#: queries, keys and values have separate matrices, so rows are counted in three matrices that timm fuses into one.
MODELS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "vit-b-16": vit_base_patch16_224,
        "swin-b": _swin_b,
        "convnext-b": _convnext_b,
        "llama-3.2-1b": _llama_1b,
    }
)


def meta_model(name: str, classes: int) -> nn.Module:
    """One of :data:`MODELS` at full size on the meta device.

    Raises:
        ValueError: there is no such model.
        ModuleNotFoundError: the model needs transformers, which is not installed.
    """
    _check_model(name)
    with torch.device("meta"):
        return MODELS[name](classes)


def _check_model(name: str) -> None:
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")


def available_models() -> list[str]:
    """The names of :data:`MODELS` that can be built with what is installed."""
    return list(MODELS) if importlib.util.find_spec("transformers") else ["vit-b-16"]


# --- The papers' tables ------------------------------------------------------------------------------------------

Unit = Literal["M", "%"]

#: GPS, Tab. 7: number of parameters by preset. Its header says millions, but most figures are percentages of all
#: parameters, the head included. CIFAR-100 (VTAB) is the row whose name is missing in the paper's web version.
GPS_TABLE_7: tuple[tuple[str, float, Unit], ...] = (
    ("CUB-200-2011", 0.47, "%"),
    ("NABirds", 1.35, "M"),
    ("Oxford Flowers", 0.29, "%"),
    ("Stanford Dogs", 0.30, "%"),
    ("Stanford Cars", 1.07, "M"),
    ("CIFAR-100 (VTAB)", 0.29, "%"),
    ("Caltech101", 0.29, "%"),
    ("DTD", 0.24, "%"),
    ("Flowers102", 0.29, "%"),
    ("Pets", 0.23, "%"),
    ("SVHN", 0.20, "%"),
    ("Sun397", 0.55, "%"),
    ("Patch Camelyon", 0.30, "%"),
    ("EuroSAT", 0.20, "%"),
    ("Resisc45", 0.24, "%"),
    ("Retinopathy", 0.20, "%"),
    ("Clevr/count", 0.30, "%"),
    ("Clevr/distance", 0.20, "%"),
    ("DMLab", 0.20, "%"),
    ("KITTI/distance", 0.20, "%"),
    ("dSprites/location", 0.21, "%"),
    ("dSprites/orientation", 0.21, "%"),
    ("SmallNORB/azimuth", 0.21, "%"),
    ("SmallNORB/elevation", 0.20, "%"),
    ("CIFAR-100", 0.58, "M"),
    ("CIFAR-100 (Swin)", 0.82, "M"),
    ("CIFAR-100 (ConvNeXt)", 0.78, "M"),
)

#: GRFT, Tab. 8: number of parameters by preset, as a percentage of all, the head included.
GRFT_TABLE_8: tuple[tuple[str, float, Unit], ...] = (
    ("CUB-200-2011", 0.47, "%"),
    ("NABirds", 2.56, "%"),
    ("Oxford Flowers", 0.26, "%"),
    ("Stanford Dogs", 0.58, "%"),
    ("Stanford Cars", 2.22, "%"),
    ("CIFAR-100 (VTAB)", 0.26, "%"),
    ("Caltech101", 0.26, "%"),
    ("DTD", 0.22, "%"),
    ("Flowers102", 0.26, "%"),
    ("Pets", 0.28, "%"),
    ("SVHN", 0.41, "%"),
    ("Sun397", 0.53, "%"),
    ("Patch Camelyon", 0.25, "%"),
    ("EuroSAT", 0.26, "%"),
    ("Resisc45", 0.37, "%"),
    ("Retinopathy", 0.18, "%"),
    ("Clevr/count", 0.33, "%"),
    ("Clevr/distance", 0.26, "%"),
    ("DMLab", 0.30, "%"),
    ("KITTI/distance", 0.18, "%"),
    ("dSprites/location", 0.34, "%"),
    ("dSprites/orientation", 0.31, "%"),
    ("SmallNORB/azimuth", 0.34, "%"),
    ("SmallNORB/elevation", 0.30, "%"),
    ("CoLA", 0.08, "%"),
    ("MRPC", 0.08, "%"),
    ("RTE", 0.08, "%"),
)

# Rows whose printed figure matches another policy than the printed one.
_FITS: Mapping[tuple[str, str], Policy] = {("GPS", "Clevr/count"): PerNeuron(2)}


@dataclass(frozen=True)
class TableRow:
    """One row of a paper's table beside our count.

    Attributes:
        table: where it is printed: ``"GPS, Tab. 7"`` or ``"GRFT, Tab. 8"``.
        preset: the settings of that row.
        name: the name of the preset: the data set, sometimes with the model.
        policy: the policy that we count: the preset's, unless the printed figure matches another one.
        count: our count.
        printed: the paper's figure, with two decimals.
        unit: the figure's unit: ``"M"``, million scalars, or ``"%"`` of all parameters, the head included.
    """

    table: str
    preset: Preset
    name: str
    policy: Policy
    count: Count
    printed: float
    unit: Unit

    @property
    def figure(self) -> float:
        """Our count in the paper's unit."""
        return self.count.trained / 1e6 if self.unit == "M" else self.count.percent

    @property
    def difference(self) -> float:
        """Our figure minus the paper's, in the paper's unit."""
        return self.figure - self.printed

    @property
    def rounds(self) -> bool:
        """Whether our figure, rounded to two decimals, equals the paper's."""
        return f"{self.figure:.2f}" == f"{self.printed:.2f}"

    @property
    def note(self) -> str:
        """Anything unusual about the row; empty if there is nothing."""
        return "; ".join(filter(None, [self.preset.note, "" if self.rounds else f"rounds to {self.figure:.2f}"]))


def reproduce(models: Iterable[str] = tuple(MODELS)) -> list[TableRow]:
    """Counts every row of GPS, Tab. 7, and GRFT, Tab. 8, in their order.

    Args:
        models: only count rows of these models. :func:`available_models` returns those that can be built here.

    Raises:
        ValueError: there is no such model.
        ModuleNotFoundError: a model needs transformers, which is not installed.
    """
    wanted = list(models)
    for name in wanted:
        _check_model(name)
    built: dict[tuple[str, int], nn.Module] = {}
    rows = []
    tables: tuple[tuple[str, Mapping[str, Preset], tuple[tuple[str, float, Unit], ...]], ...] = (
        ("GPS, Tab. 7", GPS, GPS_TABLE_7),
        ("GRFT, Tab. 8", GRFT, GRFT_TABLE_8),
    )
    for table, presets, printed_rows in tables:
        for name, printed, unit in printed_rows:
            preset = presets[name]
            key = preset.model, preset.classes
            if preset.model not in wanted:
                continue
            if key not in built:
                built[key] = meta_model(*key)
            policy = _FITS.get((preset.method, name), preset.policy)
            rows.append(TableRow(table, preset, name, policy, count(built[key], policy), printed, unit))
    return rows
