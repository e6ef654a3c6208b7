"""The papers' settings, one preset per data set.

:data:`GPS` holds those of gradient-based parameter selection (Zhang et al., CVPR 2024), :data:`GRFT` those of
gradient-based and regularized fine-tuning; :func:`gps` and :func:`grft` look them up by name. Settings that neither
the paper nor the authors' scripts state are None.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

from gradsel.ranking.policies import Columns, PerNeuron, Rows


class DataSet(NamedTuple):
    """A data set of the papers.

    Attributes:
        benchmark: ``"FGVC"``, ``"VTAB"``, ``"GLUE"`` or ``"CIFAR"``.
        classes: number of classes (GPS, Tab. 13; 2 for the GLUE tasks of GRFT).
        aliases: other names.
    """

    benchmark: str
    classes: int
    aliases: tuple[str, ...] = ()


#: The data sets by name. "CIFAR-100" is the full one, with 50,000 training images; VTAB's has 1,000.
DATA_SETS: Mapping[str, DataSet] = MappingProxyType(
    {
        "CUB-200-2011": DataSet("FGVC", 200, ("CUB-2011", "CUB-200", "CUB")),
        "NABirds": DataSet("FGVC", 555),
        "Oxford Flowers": DataSet("FGVC", 102, ("Oxford Flowers 102",)),
        "Stanford Dogs": DataSet("FGVC", 120, ("Stan. Dogs", "Dogs")),
        "Stanford Cars": DataSet("FGVC", 196, ("Stan. Cars", "Cars")),
        "CIFAR-100 (VTAB)": DataSet("VTAB", 100, ("VTAB CIFAR-100",)),
        "Caltech101": DataSet("VTAB", 102),
        "DTD": DataSet("VTAB", 47),
        "Flowers102": DataSet("VTAB", 102, ("Flowers102 (VTAB)",)),
        "Pets": DataSet("VTAB", 37, ("Oxford Pets", "Oxford IIIT Pet")),
        "SVHN": DataSet("VTAB", 10),
        "Sun397": DataSet("VTAB", 397),
        "Patch Camelyon": DataSet("VTAB", 2, ("Camelyon", "PCam")),
        "EuroSAT": DataSet("VTAB", 10),
        "Resisc45": DataSet("VTAB", 45),
        "Retinopathy": DataSet("VTAB", 5, ("Diabetic Retinopathy",)),
        "Clevr/count": DataSet("VTAB", 8),
        "Clevr/distance": DataSet("VTAB", 6, ("Clevr/dist",)),
        "DMLab": DataSet("VTAB", 6),
        "KITTI/distance": DataSet("VTAB", 4, ("KITTI",)),
        "dSprites/location": DataSet("VTAB", 16, ("dSprites/loc",)),
        "dSprites/orientation": DataSet("VTAB", 16, ("dSprites/ori",)),
        "SmallNORB/azimuth": DataSet("VTAB", 18, ("SmallNORB/azi",)),
        "SmallNORB/elevation": DataSet("VTAB", 9, ("SmallNORB/ele",)),
        "CIFAR-100": DataSet("CIFAR", 100),
        "CoLA": DataSet("GLUE", 2),
        "MRPC": DataSet("GLUE", 2),
        "RTE": DataSet("GLUE", 2),
    }
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings for one data set. None means not known.

    Attributes:
        method: ``"GPS"`` or ``"GRFT"``.
        data_set: a name of :data:`DATA_SETS`.
        model: a name of :data:`gradsel.papers.counting.MODELS`.
        policy: for :func:`gradsel.select`.
        source: where the settings come from, in words.
        note: anything unusual about them; empty if there is nothing.
        optimizer: ``"Adam"`` or ``"AdamW"``, masked here: :class:`gradsel.MaskedAdam`, :class:`gradsel.MaskedAdamW`.
        learning_rate: the peak, after warm-up; then the rate follows a cosine.
        first_learning_rate, last_learning_rate: the rates at the start of warm-up and at the end of training.
        batch_size: samples per step.
        epochs, warmup_epochs: passes over the training data. GPS counts warm-up in ``epochs``, GRFT before them.
        cooldown_epochs: passes at the last rate after them, in which an average settles.
        ema: decay of an exponential moving average of what is trained.
        weight_decay: weight decay of the selected entries.
        drop_path: the largest probability of dropping a residual branch (stochastic depth).
        mixup, cutmix: alpha of the Beta distributions that mix images.
        label_smoothing: fraction of the target that is spread over all classes.
        augmentation, selection_augmentation: of images in training, and of those that weights are ranked on, by the
            names they have in :class:`gradsel.training.DataConfig`.
    """

    method: str
    data_set: str
    model: str
    policy: PerNeuron | Rows | Columns
    source: str
    note: str = ""
    optimizer: str | None = None
    learning_rate: float | None = None
    first_learning_rate: float | None = None
    last_learning_rate: float | None = None
    batch_size: int | None = None
    epochs: int | None = None
    warmup_epochs: int | None = None
    cooldown_epochs: int | None = None
    ema: float | None = None
    weight_decay: float | None = None
    drop_path: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    label_smoothing: float | None = None
    augmentation: str | None = None
    selection_augmentation: str | None = None

    @property
    def classes(self) -> int:
        """Outputs of the head."""
        return DATA_SETS[self.data_set].classes


@dataclass(frozen=True, kw_only=True)
class GPSPreset(Preset):
    """Settings of GPS; the defaults are shared by all of its runs.

    Attributes:
        policy: the policy in the paper's table.
        scripts_policy: the policy in the authors' scripts, which train more for NABirds and Stanford Cars.
    """

    method: str = "GPS"
    optimizer: str | None = "Adam"
    first_learning_rate: float | None = 1e-7
    last_learning_rate: float | None = 1e-8
    epochs: int | None = 100
    warmup_epochs: int | None = 10
    weight_decay: float | None = 0.0
    selection_augmentation: str | None = "strong"
    scripts_policy: PerNeuron | None = None


@dataclass(frozen=True, kw_only=True)
class GRFTPreset(Preset):
    """Settings of GRFT.

    Attributes:
        data_subsets: number of random parts of the training data; the selection uses the easiest one, see
            :func:`gradsel.ranking.subsets.easiest_subset`.
        anchor: the factor of the squared distance from the pre-trained weights (lambda).
        regular_layers: number of last blocks that the anchor holds, besides patch embedding and head; or ``"all"``.
    """

    method: str = "GRFT"
    data_subsets: int | None = None
    anchor: float | None = None
    regular_layers: int | Literal["all"] | None = None


_PresetT = TypeVar("_PresetT", bound=Preset)

# Entries per neuron in the paper (Tab. 7) and in the scripts; then the scripts' learning rate, batch size, drop path,
# and decay of the average.
_GPS_FGVC = (
    ("CUB-200-2011", 2, 2, 3e-3, 32, 0.0, 0.9998),
    ("NABirds", 10, 20, 1e-4, 32, 0.1, 0.9998),
    ("Oxford Flowers", 1, 1, 1e-3, 32, 0.1, 0.99),
    ("Stanford Dogs", 1, 1, 1e-4, 64, 0.0, 0.9998),
    ("Stanford Cars", 10, 15, 5e-4, 32, 0.0, 0.9998),
)
# Entries per neuron in the paper (Tab. 7) and in the scripts; then the scripts' learning rate, batch size, drop path.
_GPS_VTAB = (
    ("CIFAR-100 (VTAB)", 1, 1e-2, 32, 0.0),
    ("Caltech101", 1, 2e-3, 16, 0.0),
    ("DTD", 1, 2e-3, 16, 0.0),
    ("Flowers102", 1, 2e-3, 16, 0.0),
    ("Pets", 1, 3e-3, 32, 0.0),
    ("SVHN", 1, 5e-3, 32, 0.0),
    ("Sun397", 1, 2.5e-3, 16, 0.0),
    ("Patch Camelyon", 2, 4e-3, 32, 0.0),
    ("EuroSAT", 1, 2e-3, 16, 0.0),
    ("Resisc45", 1, 1.5e-3, 16, 0.1),
    ("Retinopathy", 1, 2e-3, 32, 0.2),
    ("Clevr/count", 1, 3e-4, 16, 0.1),
    ("Clevr/distance", 1, 2e-3, 16, 0.1),
    ("DMLab", 1, 1.5e-3, 16, 0.1),
    ("KITTI/distance", 1, 1e-3, 16, 0.0),
    ("dSprites/location", 1, 7e-3, 32, 0.0),
    ("dSprites/orientation", 1, 5e-4, 16, 0.2),
    ("SmallNORB/azimuth", 1, 3e-3, 32, 0.1),
    ("SmallNORB/elevation", 1, 3e-4, 32, 0.2),
)
# Tab. 7's runs on the full CIFAR-100: model and entries per neuron.
_GPS_CIFAR = (
    ("CIFAR-100", "vit-b-16", 5),
    ("CIFAR-100 (Swin)", "swin-b", 5),
    ("CIFAR-100 (ConvNeXt)", "convnext-b", 5),
)
_GPS_NOTES = {
    "NABirds": "the scripts train 20 entries per neuron, Tab. 7 says 10",
    "Stanford Cars": "the scripts train 15 entries per neuron, Tab. 7 says 10",
    "Clevr/count": "Tab. 7 says 1 entry per neuron, but its number of parameters matches 2",
}

# GRFT, Tab. 6 and 7: learning rate, batch size, data subsets, regular parameter, regular layers, rows or columns. The
# paper does not print which of the two, but it follows from the numbers of parameters in Tab. 8.
_GRFT_FGVC: tuple[tuple[str, float, int, int, float, int | Literal["all"], Rows | Columns], ...] = (
    ("CUB-200-2011", 5e-3, 32, 4, 1e-3, 2, Columns(2)),
    ("NABirds", 1e-4, 32, 1, 1e-4, 7, Rows(26)),
    ("Oxford Flowers", 1e-3, 32, 1, 1e-4, 2, Rows(1)),
    ("Stanford Dogs", 2e-4, 64, 2, 5e-5, 4, Rows(5)),
    ("Stanford Cars", 5e-4, 32, 7, 1e-4, "all", Columns(20)),
)
_GRFT_VTAB: tuple[tuple[str, float, int, int, float, int | Literal["all"], Rows | Columns], ...] = (
    ("CIFAR-100 (VTAB)", 2e-3, 32, 1, 1e-6, "all", Rows(1)),
    ("Caltech101", 2e-3, 16, 1, 1e-8, 2, Rows(1)),
    ("DTD", 2e-3, 16, 1, 1e-8, 3, Rows(1)),
    ("Flowers102", 2e-3, 16, 1, 1e-6, "all", Rows(1)),
    ("Pets", 3e-3, 32, 1, 1e-3, "all", Rows(2)),
    ("SVHN", 5e-3, 32, 1, 1e-3, 1, Rows(4)),
    ("Sun397", 2.5e-3, 16, 1, 1e-6, 2, Rows(1)),
    ("Patch Camelyon", 4e-3, 32, 1, 1e-7, "all", Rows(2)),
    ("EuroSAT", 2e-3, 16, 1, 1e-4, 3, Rows(2)),
    ("Resisc45", 1.5e-3, 16, 1, 1e-3, "all", Rows(3)),
    ("Retinopathy", 2e-3, 32, 1, 1e-6, 1, Rows(1)),
    ("Clevr/count", 3e-4, 16, 1, 0.0, 0, Rows(3)),
    ("Clevr/distance", 2e-3, 16, 1, 1e-5, "all", Rows(2)),
    ("DMLab", 1.5e-3, 16, 1, 0.0, 0, Columns(2)),
    ("KITTI/distance", 1e-3, 16, 1, 1e-5, "all", Rows(1)),
    ("dSprites/location", 7e-3, 32, 1, 1e-4, 5, Rows(3)),
    ("dSprites/orientation", 5e-4, 16, 1, 0.0, 0, Columns(2)),
    ("SmallNORB/azimuth", 3e-3, 32, 1, 1e-8, "all", Rows(3)),
    ("SmallNORB/elevation", 3e-4, 32, 1, 1e-3, 2, Columns(2)),
)
_GRFT_GLUE = ("CoLA", "MRPC", "RTE")


def _gps_presets() -> Iterator[tuple[str, GPSPreset]]:
    source = "GPS, Tab. 7 and section 4.1, and the authors' scripts (github.com/FightingFighting/GPS)"
    for name, k, k_in_scripts, learning_rate, batch_size, drop_path, ema in _GPS_FGVC:
        yield (
            name,
            GPSPreset(
                data_set=name,
                model="vit-b-16",
                policy=PerNeuron(k),
                scripts_policy=PerNeuron(k_in_scripts),
                source=source,
                note=_GPS_NOTES.get(name, ""),
                learning_rate=learning_rate,
                batch_size=batch_size,
                cooldown_epochs=10,
                ema=ema,
                drop_path=drop_path,
                mixup=0.8,
                cutmix=1.0,
                label_smoothing=0.1,
                augmentation="fgvc",
            ),
        )
    for name, k, learning_rate, batch_size, drop_path in _GPS_VTAB:
        yield (
            name,
            GPSPreset(
                data_set=name,
                model="vit-b-16",
                policy=PerNeuron(k),
                scripts_policy=PerNeuron(k),
                source=source,
                note=_GPS_NOTES.get(name, ""),
                learning_rate=learning_rate,
                batch_size=batch_size,
                # The scripts add ten epochs at the last rate here, too. Without an average they change nothing.
                cooldown_epochs=0,
                drop_path=drop_path,
                mixup=0.0,
                cutmix=0.0,
                label_smoothing=0.0,
                augmentation="none",
            ),
        )
    for name, model, k in _GPS_CIFAR:
        yield (
            name,
            GPSPreset(
                data_set="CIFAR-100",
                model=model,
                policy=PerNeuron(k),
                source=(
                    "GPS, Tab. 7 and section 4.1; warm-up and weight decay as in the authors' scripts for the others; "
                    "images as in SSF, which it follows (github.com/dongzelian/SSF)"
                ),
                mixup=0.8,
                cutmix=1.0,
                label_smoothing=0.1,
                augmentation="randaugment",
            ),
        )


def _grft_presets() -> Iterator[tuple[str, GRFTPreset]]:
    for printed_in, rows in (("Tab. 6", _GRFT_FGVC), ("Tab. 7", _GRFT_VTAB)):
        for name, learning_rate, batch_size, data_subsets, anchor, regular_layers, policy in rows:
            yield (
                name,
                GRFTPreset(
                    data_set=name,
                    model="vit-b-16",
                    policy=policy,
                    source=f"GRFT, {printed_in} and section 4.1; rows or columns by Tab. 8",
                    optimizer="Adam",
                    learning_rate=learning_rate,
                    batch_size=batch_size,
                    epochs=100,
                    warmup_epochs=10,
                    data_subsets=data_subsets,
                    anchor=anchor,
                    regular_layers=regular_layers,
                ),
            )
    for name in _GRFT_GLUE:
        yield (
            name,
            GRFTPreset(
                data_set=name,
                model="llama-3.2-1b",
                policy=Rows(3),
                source="GRFT, Tab. 8 and section 4.1; rows or columns by Tab. 8",
                optimizer="AdamW",
            ),
        )


#: GPS's settings by data set.
GPS: Mapping[str, GPSPreset] = MappingProxyType(dict(_gps_presets()))

#: GRFT's settings by data set.
GRFT: Mapping[str, GRFTPreset] = MappingProxyType(dict(_grft_presets()))


def gps(name: str) -> GPSPreset:
    """GPS's settings for a data set.

    Args:
        name: a name in :data:`GPS` or an alias in :data:`DATA_SETS`; case, spaces and punctuation do not matter. GPS
            uses CIFAR-100 twice: ``"CIFAR-100"`` is the full one, ``"CIFAR-100 (VTAB)"`` VTAB's.

    Raises:
        KeyError: there is no such preset; the message names similar ones, if any, and all that there are.
    """
    return _look_up("GPS", GPS, name)


def grft(name: str) -> GRFTPreset:
    """GRFT's settings for a data set.

    Args:
        name: a name in :data:`GRFT` or an alias in :data:`DATA_SETS`; case, spaces and punctuation do not matter.
            ``"CIFAR-100"`` is VTAB's, the only one that GRFT uses.

    Raises:
        KeyError: there is no such preset; the message names similar ones, if any, and all that there are.
    """
    return _look_up("GRFT", GRFT, name, {"CIFAR-100": "CIFAR-100 (VTAB)"})


class _NoPreset(KeyError):
    """A KeyError that shows its message without quotes."""

    def __str__(self) -> str:
        return str(self.args[0])


def _look_up(
    method: str, presets: Mapping[str, _PresetT], name: str, also: Mapping[str, str] = MappingProxyType({})
) -> _PresetT:
    names = {_plain(alias): data_set for alias, data_set in also.items()}
    for key in presets:
        for alias in (key, *(DATA_SETS[key].aliases if key in DATA_SETS else ())):
            names[_plain(alias)] = key
    wanted = _plain(name)
    if wanted in names:
        return presets[names[wanted]]
    close = [key for known, key in names.items() if wanted and wanted in known]
    close += [names[known] for known in difflib.get_close_matches(wanted, names, n=3)]
    hint = f"did you mean {', '.join(dict.fromkeys(close))}? " if close else ""
    raise _NoPreset(f"{method} has no preset {name!r}; {hint}it has {', '.join(presets)}")


def _plain(name: str) -> str:
    """Only the letters and digits, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
