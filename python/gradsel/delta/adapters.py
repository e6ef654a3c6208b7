"""What a delta becomes for PEFT, and is made of: LoRA, SHiRA and Super-Tuning adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from gradsel.delta.lora import Above, LoraExport, write_lora
from gradsel.delta.making import Base
from gradsel.delta.parts import Part
from gradsel.delta.shira import read_shira, write_shira
from gradsel.delta.supertuning import read_supertuning, write_supertuning

PathLike = str | os.PathLike[str]
Own = TypeVar("Own", bound="AsAdapter")


class AsAdapter(Mapping[str, Part]):
    """The part of :class:`gradsel.Delta` that knows the adapters of PEFT."""

    def to_shira(self, folder: PathLike, *, base: Base | None = None, drop: bool = False) -> None:
        """Writes a SHiRA adapter of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

        SHiRA stores differences. Adding one to the base gives the value up to rounding, and cannot be undone exactly.

        Args:
            folder: the folder to write to, which is created.
            base: the model, or its state_dict, if the delta does not keep originals.
            drop: leave out what SHiRA cannot store, such as biases of adapted layers.

        Raises:
            ValueError: originals are not known, or SHiRA cannot store some parameters.
        """
        write_shira(self, Path(folder), base, drop)

    def to_lora(
        self,
        folder: PathLike,
        base: Base | None = None,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        drop: bool = False,
        *,
        above: Above = "refuse",
        pad: bool = False,
    ) -> LoraExport:
        """Writes a LoRA adapter of PEFT with the effect of the delta: ``adapter_config.json`` and its safetensors file.

        A difference in c columns (or c rows) of a matrix is a LoRA of rank c, exactly: A is one-hot and B holds the
        differences, or the other way round. The adapter has nothing that a server of LoRA would not take, except for
        modules that the delta sets whole (a new head), which become PEFT's ``modules_to_save``.

        Args:
            folder: the folder to write to, which is created.
            base: the model, or its state_dict. Needed if the delta does not keep originals. A model (on any device,
                also "meta" if there are originals) tells which layers are Linear, which are stored as [in, out], and
                which weights are tied; without one, weights of two dimensions count as those of ``nn.Linear``.
            rank: the highest rank allowed; None: whatever the delta needs.
            dtype: of A and B. None: float32. A narrower one rounds the differences.
            drop: leave out what LoRA cannot hold (norms, biases, embeddings, fused experts), and list it.
            above: what to do with layers that need a higher rank: "refuse" them; "split" the delta into several
                adapters, in ``folder/part-1`` and so on, whose sum is exact when all are active; or write the
                nearest adapter of that rank by "svd" and report its error.
            pad: give all layers the same rank, with zeros, for servers that know no ``rank_pattern``.

        Returns:
            What was written, with ranks, errors and what was left out.

        Raises:
            ValueError: originals are not known, LoRA cannot hold some tensors, or a layer needs a higher rank; nothing
                is written.
        """
        return write_lora(self, Path(folder), base, rank, dtype, drop, above, pad)

    @classmethod
    def from_shira(cls: type[Own], folder: PathLike, base: Base) -> Own:
        """The delta with the effect of a SHiRA adapter of PEFT: base + difference, as PEFT would merge it.

        Args:
            folder: the folder that PEFT's ``save_pretrained`` wrote.
            base: the plain model, or its state_dict.

        Raises:
            ValueError: the folder has no SHiRA adapter, or one for another model.
        """
        return cls._made(read_shira(Path(folder), base), {"policy": f"SHiRA adapter {Path(folder).name}"})

    def to_supertuning(self, folder: PathLike, *, base: Base | None = None, drop: bool = False) -> None:
        """Writes a Super-Tuning adapter of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

        As for SHiRA, it stores differences. PEFT derives the number of entries of a layer from one ``sparsity`` for all
        layers, so that those with fewer are filled up with entries whose difference is 0.

        Args:
            folder: the folder to write to, which is created.
            base: the model, or its state_dict, if the delta does not keep originals.
            drop: leave out what Super-Tuning cannot store, such as biases of adapted layers.

        Raises:
            ValueError: originals are not known, or Super-Tuning cannot store some parameters.
        """
        write_supertuning(self, Path(folder), base, drop)

    @classmethod
    def from_supertuning(cls: type[Own], folder: PathLike, base: Base) -> Own:
        """The delta with the effect of a Super-Tuning adapter of PEFT: base + difference, as PEFT would merge it.

        Args:
            folder: the folder that PEFT's ``save_pretrained`` wrote. If its adapter also has a LoRA (``r``), the delta
                sets the adapted weights whole.
            base: the plain model, or its state_dict.

        Raises:
            ValueError: the folder has no Super-Tuning adapter, or one for another model.
        """
        name = Path(folder).name
        return cls._made(read_supertuning(Path(folder), base), {"policy": f"Super-Tuning adapter {name}"})

    @classmethod
    def _made(cls: type[Own], parts: Mapping[str, Part], notes: Mapping[str, Any]) -> Own:
        return cls(parts, notes)  # type: ignore[call-arg]
