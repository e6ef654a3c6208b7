"""The data sets of the papers: where they lie below a root folder, where they are had, and how large they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gradsel.papers.presets import DATA_SETS

#: Folders below the root in which data sets are looked for, besides the root itself.
_SHELVES = ("fgvc", "vtab-1k", "vtab", "glue", "imagenet")
_VTAB = "the 1,000 images and lists of VTAB-1k, which the authors of NOAH and of SSF distribute; tensorflow_datasets"


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: as in :data:`gradsel.papers.presets.DATA_SETS`, where it is there.
        folders: names that its folder may have; case does not matter.
        had: where it is had, in words.
        train, test: samples (GPS, Tab. 13; training and validation sets together), for what a run costs.
        preset: the data set whose preset it is trained by; empty if the papers have none.
        settings: of a run, by dotted names; ``"{folder}"`` is the data set's.
        inside: what has to be in the folder.
    """

    name: str
    folders: tuple[str, ...]
    had: str
    train: int
    test: int
    preset: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({"data.path": "{folder}"}))
    inside: tuple[str, ...] = ()

    def find(self, root: Path) -> Path | None:
        """Its folder below a root, or None."""
        wanted = {name.lower() for name in self.folders}
        for shelf in (root, *(each for each in _folders(root) if each.name.lower() in _SHELVES)):
            for folder in _folders(shelf):
                if folder.name.lower() in wanted and all((folder / name).exists() for name in self.inside):
                    return folder
        return None

    def settings_in(self, folder: Path) -> dict[str, Any]:
        """The settings of a run on the data in a folder."""
        return {
            name: value.replace("{folder}", str(folder)) if isinstance(value, str) else value
            for name, value in self.settings.items()
        }


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []


def _vtab(name: str, folder: str, test: int) -> Source:
    return Source(name, (folder,), _VTAB, 1_000, test, name, inside=("test.txt",))


def _glue(name: str, train: int, test: int) -> Source:
    files = "the files that GLUE distributes, or glue/{name} on the model hub".replace("{name}", name.lower())
    return Source(name, (name, f"{name}-bin"), files, train, test, name)


_IMAGENET = "image-net.org, after registration; one folder of images for each class"
_SOURCES = (
    Source("CUB-200-2011", ("CUB_200_2011", "cub"), "Caltech's data archive, as CUB-200-2011", 5_994, 5_794,
           "CUB-200-2011"),
    Source("NABirds", ("nabirds",), "Cornell Lab of Ornithology, after registration", 23_929, 24_633, "NABirds"),
    Source("Oxford Flowers", ("oxford-flowers", "flowers", "flowers-102", "oxford_flowers"),
           "Visual Geometry Group, Oxford: 102 Category Flower Dataset", 2_040, 6_149, "Oxford Flowers"),
    Source("Stanford Dogs", ("stanford-dogs", "dogs", "stanford_dogs"), "Stanford Vision Lab: Stanford Dogs", 12_000,
           8_580, "Stanford Dogs"),
    Source("Stanford Cars", ("stanford-cars", "cars", "stanford_cars"),
           "mirrors of Stanford's Cars Dataset, whose own page is gone", 8_144, 8_041, "Stanford Cars"),
    _vtab("CIFAR-100 (VTAB)", "cifar", 10_000), _vtab("Caltech101", "caltech101", 6_084), _vtab("DTD", "dtd", 1_880),
    _vtab("Flowers102", "oxford_flowers102", 6_149), _vtab("Pets", "oxford_iiit_pet", 3_669),
    _vtab("SVHN", "svhn", 26_032), _vtab("Sun397", "sun397", 21_750),
    _vtab("Patch Camelyon", "patch_camelyon", 32_768), _vtab("EuroSAT", "eurosat", 5_400),
    _vtab("Resisc45", "resisc45", 6_300), _vtab("Retinopathy", "diabetic_retinopathy", 42_670),
    _vtab("Clevr/count", "clevr_count", 15_000), _vtab("Clevr/distance", "clevr_dist", 15_000),
    _vtab("DMLab", "dmlab", 22_735), _vtab("KITTI/distance", "kitti", 711),
    _vtab("dSprites/location", "dsprites_loc", 73_728), _vtab("dSprites/orientation", "dsprites_ori", 73_728),
    _vtab("SmallNORB/azimuth", "smallnorb_azi", 12_150), _vtab("SmallNORB/elevation", "smallnorb_ele", 12_150),
    Source("CIFAR-100", ("CIFAR100", "cifar-100"), "University of Toronto: CIFAR-100, python version, unpacked", 50_000,
           10_000, "CIFAR-100", {"data.path": "torchvision/CIFAR100", "data.root": "{folder}"},
           ("cifar-100-python",)),
    Source("ImageNet-1K", ("imagenet", "imagenet-1k", "ilsvrc2012"), _IMAGENET, 1_281_167, 50_000, "CIFAR-100",
           {"data.path": "{folder}", "data.root": None}, ("train", "val")),
    Source("ImageNet-A", ("imagenet-a",), "its authors (Hendrycks et al. 2021), as imagenet-a", 0, 7_500),
    Source("ImageNet-R", ("imagenet-r",), "its authors (Hendrycks et al. 2021), as imagenet-r", 0, 30_000),
    Source("ImageNet-C", ("imagenet-c",), "its authors (Hendrycks and Dietterich 2019): a folder for each corruption, "
           "in it one for each severity", 0, 75 * 50_000),
    Source("Kvasir-SEG", ("Kvasir-SEG",), "Simula Research Laboratory: Kvasir-SEG", 880, 120, "",
           {"data.path": "{folder}", "data.task": "segmentation", "data.augmentation": "flip"}),
    _glue("CoLA", 8_551, 1_043), _glue("MRPC", 3_668, 408), _glue("RTE", 2_490, 277),
)  # fmt: skip
#: By name.
SOURCES: Mapping[str, Source] = MappingProxyType({source.name: source for source in _SOURCES})

FGVC = tuple(name for name, data_set in DATA_SETS.items() if data_set.benchmark == "FGVC")
VTAB = tuple(name for name, data_set in DATA_SETS.items() if data_set.benchmark == "VTAB")


def plain(text: str) -> str:
    """What names are compared by: letters, digits, and the signs that tell methods and settings apart."""
    return re.sub(r"[^a-z0-9*=.+]", "", text.lower())


def names_of(name: str) -> set[str]:
    """All names by which a data set may be asked for, in plain form."""
    aliases = DATA_SETS[name].aliases if name in DATA_SETS else ()
    return {plain(each) for each in (name, *aliases, *SOURCES[name].folders)}
