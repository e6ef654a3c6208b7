"""The experiments of GRFT, as data."""

from __future__ import annotations

from gradsel.experiments.papers.experiment import Experiment
from gradsel.experiments.papers.of_gps import METHODS
from gradsel.experiments.papers.sources import FGVC, VTAB

_WITH_GPS = {("GPS*" if name == "GPS" else name): how for name, how in METHODS.items()} | {"GRFT": "grft"}
_RECIPES = (
    "The methods other than GPS and GRFT have GRFT's recipe with a learning rate of their own, not tuned; the paper "
    "repeats GPS's numbers for them. gradsel compare tunes."
)
_GRFT = {"GRFT": "grft"}

GRFT = (
    Experiment(
        name="grft/table1", title="methods on FGVC", paper="grft", source="GRFT, Tab. 1", methods=_WITH_GPS, data=FGVC,
        notes=(_RECIPES,),
    ),
    Experiment(
        name="grft/table2", title="methods on VTAB-1k", paper="grft", source="GRFT, Tab. 2", methods=_WITH_GPS,
        data=VTAB, notes=(_RECIPES,),
    ),
    Experiment(
        name="grft/table3", title="tasks of GLUE with Llama-3.2-1B", paper="grft", source="GRFT, Tab. 3",
        methods={"Full": "full", "LoRA": "lora:layers=attention", "GRFT": "grft"}, data=("CoLA", "MRPC", "RTE"),
        models={"Llama-3.2-1B": "llama-3.2-1b"},
        notes=(
            "Nobody published the learning rate; without --learning-rate, each method has its own.",
            "Accuracy on all tasks; the paper does not name its metric, nor the rank and the layers of LoRA.",
        ),
    ),
    Experiment(
        name="grft/table4", title="sparse, rows or columns", paper="grft", source="GRFT, Tab. 4",
        methods={
            "GPS*": "gps", "GRFT-Sparse": "grft:sparse=preset", "GRFT-Row": "grft:rows=preset",
            "GRFT-Column": "grft:columns=preset",
        },
        data=FGVC, notes=("The number of rows or columns is that of Tab. 6 for each.",),
    ),
    Experiment(
        name="grft/table5", title="norms of the pull", paper="grft", source="GRFT, Tab. 5",
        methods={"Without Norm": "grft:anchor=0", "L1 Norm": "grft:anchor_norm=1", "L2 Norm": "grft"}, data=FGVC,
    ),
    Experiment(
        name="grft/fig3", title="memory over time", paper="grft", source="GRFT, Fig. 3",
        methods={"Full": "full", "GPS*": "gps", "GRFT": "grft"}, data=FGVC, measure="memory",
        metrics=("peak MB", "mean MB", "seconds"),
        notes=(
            "On a GPU, what torch has reserved; on a CPU, the resident memory of the process. Earlier runs of the same "
            "process raise both: run one method at a time.",
            "gps here is attached, without the dense masks and gradients of the published code.",
        ),
    ),
    Experiment(
        name="grft/fig4-rows", title="rows or columns", paper="grft", source="GRFT, Fig. 4 (a)", methods={
            "GRFT-Row": "grft:rows=setting", "GRFT-Column": "grft:columns=setting",
        }, data=FGVC, settings={f"k={k}": {"number": k} for k in (1, 2, 3, 5, 10, 15, 20, 25, 30)},
    ),
    Experiment(
        name="grft/fig4-lambda", title="strength of the pull", paper="grft", source="GRFT, Fig. 4 (b)", methods=_GRFT,
        data=FGVC, settings={f"lambda=1e-{n}": {"method.options.anchor": 10.0**-n} for n in range(8, 2, -1)},
    ),
    Experiment(
        name="grft/fig4-blocks", title="blocks that are pulled", paper="grft", source="GRFT, Fig. 4 (c)",
        methods=_GRFT, data=FGVC,
        settings={f"blocks={n}": {"method.options.anchor_blocks": n} for n in range(1, 9)},
    ),
    Experiment(
        name="grft/fig4-subsets", title="parts of the training data", paper="grft", source="GRFT, Fig. 4 (d)",
        methods=_GRFT, data=FGVC, settings={f"n={n}": {"method.options.subsets": n} for n in range(1, 8)},
    ),
    Experiment(
        name="grft/masks", title="bytes of masks", paper="grft", source="GRFT, Fig. 1",
        methods={"GPS": "gps", "GRFT rows": "grft:rows=setting", "GRFT columns": "grft:columns=setting"},
        models={"ViT-B/16": "vit-b-16", "Llama-3.2-1B": "llama-3.2-1b"}, measure="masks",
        metrics=("entries", "dense float32", "dense bool", "bitmask", "indices"),
        settings={f"k={k}": {"number": k} for k in (1, 2, 3, 5, 10)},
        notes=("Computed from the shapes of the model, without its weights.",),
    ),
)  # fmt: skip
