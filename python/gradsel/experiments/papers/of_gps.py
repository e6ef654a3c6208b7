"""The experiments of GPS (Zhang et al., CVPR 2024), as data."""

from __future__ import annotations

from gradsel.experiments.papers.experiment import Experiment
from gradsel.experiments.papers.sources import FGVC, VTAB

#: The rows of Tab. 2 and 3, and the library's methods with the options whose trained shares are the paper's.
METHODS = {
    "Full": "full", "Linear": "linear", "Bias": "bias", "Adapter": "adapter", "LoRA": "lora:rank=16:layers=attention",
    "VPT-Shallow": "vpt-shallow", "VPT-Deep": "vpt-deep", "SSF": "ssf", "SPT-Adapter": "spt-adapter",
    "SPT-LoRA": "spt-lora", "GPS": "gps",
}  # fmt: skip
_WITHOUT_LORA = {
    name: METHODS[name] for name in ("Full", "Linear", "Bias", "Adapter", "VPT-Shallow", "VPT-Deep", "SSF", "GPS")
}
_FEW = {name: METHODS[name] for name in ("Full", "Linear", "SSF", "GPS")}
_OTHERS = {"Swin-B": "swin-b", "ConvNeXt-B": "convnext-b"}
_ALL = {"ViT-B/16": "vit-b-16", **_OTHERS}
_SELECTIONS = {
    "Net": "gps:scope=net", "Layer": "gps:scope=layer", "Net Random": "gps:scope=net:criterion=random",
    "Neuron Random": "gps:criterion=random", "Magnitude": "gps:criterion=magnitude",
    "Head+CE": "gps:loss=cross-entropy", "GPS": "gps",
}  # fmt: skip
_BLOCKS = {
    "all": {},
    **{f"without {n + 1}": {"method.options.skip_blocks": [n]} for n in range(12)},
    **{f"without 1 to {n}": {"method.options.skip_blocks": list(range(n))} for n in range(2, 12)},
}
_RECIPES = (
    "The other methods have GPS's recipe with a learning rate of their own, not tuned; the paper takes their numbers "
    "from their papers, or does not say. gradsel compare tunes."
)
_EPOCHS = "The last epoch is tested; the authors report the best one on the test set."
_UNPUBLISHED = "Nobody published the learning rate; without --learning-rate, each method has its own."
_IMAGENET = f"{_UNPUBLISHED} The recipe is that of CIFAR-100."
_NO_PROMPTS = {("ConvNeXt-B", "VPT-Shallow"), ("ConvNeXt-B", "VPT-Deep"), ("Swin-B", "VPT-Shallow")}
_PROMPTS = "VPT does not go into ConvNeXt, as in the paper; here VPT-Shallow does not go into Swin either."
_SIX = ("Caltech101", "DTD", "Patch Camelyon", "EuroSAT", "Clevr/count", "dSprites/location")

GPS = (
    Experiment(
        name="gps/table2", title="methods on FGVC", paper="gps", source="GPS, Tab. 2", methods=METHODS, data=FGVC,
        notes=(_RECIPES, _EPOCHS),
    ),
    Experiment(
        name="gps/table3", title="methods on VTAB-1k", paper="gps", source="GPS, Tab. 3", methods=METHODS, data=VTAB,
        notes=(_RECIPES, _EPOCHS),
    ),
    Experiment(
        name="gps/table4", title="FGVC with Swin-B and ConvNeXt-B, means", paper="gps", source="GPS, Tab. 4",
        methods=_FEW, data=FGVC, models=_OTHERS,
        notes=("Nobody published the settings of these models; they have those of ViT-B/16.", _RECIPES, _EPOCHS),
    ),
    Experiment(
        name="gps/table5", title="polyp segmentation with SAM", paper="gps", source="GPS, Tab. 5",
        methods={"Full": "full", "Linear": "linear", "Bias": "bias", "LoRA": "lora", "GPS": "gps"},
        data=("Kvasir-SEG",), models={"SAM-B": "facebook/sam-vit-base"}, metrics=("mDice", "mIoU"),
        base={
            "recipe.batch_size": 1, "recipe.epochs": 20, "recipe.learning_rate": 2e-4, "recipe.warmup_epochs": 0.0,
            "recipe.last_learning_rate": 1e-7,
        },
        notes=(
            "Weights are ranked on the training images, and IoU counts all pixels; the authors' scripts rank on the "
            "test images and count pixels of foreground, so the numbers are not comparable with the paper's.",
        ),
    ),
    Experiment(
        name="gps/table6", title="levels, criteria and losses of selection", paper="gps", source="GPS, Tab. 6 and 12",
        methods=_SELECTIONS, data=FGVC, seeds=3, notes=(_EPOCHS,),
    ),
    Experiment(
        name="gps/table8", title="robustness of models trained on ImageNet-1K", paper="gps", source="GPS, Tab. 8",
        methods=_WITHOUT_LORA, data=("ImageNet-1K",), also=("ImageNet-A", "ImageNet-R", "ImageNet-C"),
        measure="robustness", metrics=("ImageNet-1K", "ImageNet-A", "ImageNet-R", "ImageNet-C"),
        notes=(
            _IMAGENET,
            "ImageNet-C is the mean error over corruptions and severities; the paper does not say what its column is, "
            "and its text fits an error. Scores on A and R are over all 1,000 classes.",
        ),
    ),
    Experiment(
        name="gps/table9", title="FGVC with three models", paper="gps", source="GPS, Tab. 9", methods=_FEW, data=FGVC,
        models=_ALL, notes=("Swin-B and ConvNeXt-B have the settings of ViT-B/16.", _RECIPES, _EPOCHS),
    ),
    Experiment(
        name="gps/table10", title="CIFAR-100 with three models", paper="gps", source="GPS, Tab. 10",
        methods=_WITHOUT_LORA, data=("CIFAR-100",), models=_ALL, without=_NO_PROMPTS,
        notes=(_UNPUBLISHED, _RECIPES, _PROMPTS),
    ),
    Experiment(
        name="gps/table11", title="ImageNet-1K with three models", paper="gps", source="GPS, Tab. 11",
        methods=_WITHOUT_LORA, data=("ImageNet-1K",), models=_ALL, without=_NO_PROMPTS,
        notes=(_IMAGENET, _RECIPES, _PROMPTS),
    ),
    Experiment(
        name="gps/fig4", title="entries per neuron: accuracy and trained share", paper="gps",
        source="GPS, Fig. 4 and section 4.5", methods={"GPS": "gps"}, data=FGVC, metrics=("top1", "percent"),
        settings={f"K={k}": {"method.options.k": k} for k in range(1, 16)}, notes=(_EPOCHS,),
    ),
    Experiment(
        name="gps/fig5", title="few samples of each class of ImageNet-1K", paper="gps", source="GPS, Fig. 5",
        methods={name: METHODS[name] for name in ("Full", "Linear", "Bias", "Adapter", "VPT-Deep", "SSF", "GPS")},
        data=("ImageNet-1K",), measure="few_shot", settings={f"shots={k}": {"shots": k} for k in (1, 2, 4, 8, 16)},
        notes=(_IMAGENET, "The text names one sample of each class; the other numbers are the usual ones."),
    ),
    Experiment(
        name="gps/blocks", title="no selection in a block, or in the first blocks", paper="gps",
        source="GPS, section 4.4", methods={"GPS": "gps"}, data=("CUB-200-2011",), settings=_BLOCKS, notes=(_EPOCHS,),
    ),
    Experiment(
        name="gps/distribution", title="where selections lie, by block", paper="gps", source="GPS, section 6.3",
        methods={name: _SELECTIONS[name] for name in ("Net", "Layer", "GPS")}, data=FGVC, measure="distribution",
        metrics=("first half", "last two blocks", "largest block"),
    ),
    Experiment(
        name="gps/overlap", title="what selections of six tasks share", paper="gps", source="GPS, section 8.2",
        methods={"GPS": "gps"}, data=_SIX, measure="overlap", metrics=("shared",),
        notes=("The paper names no task, only two of each group of VTAB.", "Shared with all others, and with each."),
    ),
    Experiment(
        name="gps/tsne", title="features of the test set in two dimensions", paper="gps", source="GPS, section 8.3",
        methods={name: METHODS[name] for name in ("Linear", "SSF", "Full", "GPS")}, data=("NABirds",), measure="tsne",
        metrics=("silhouette", "silhouette in 2-D"), notes=("The silhouettes are ours; the paper shows pictures.",),
    ),
    Experiment(
        name="gps/regularized", title="what sparse full fine-tuning moves, and whether gradients foretell it",
        paper="gps", source="GPS, Eq. 3 and 4", methods={"Full": "full"}, data=("CUB-200-2011",),
        measure="regularized", metrics=("top1", "moved", "agreement", "chance", "rank correlation"),
        settings={f"lambda={x:g}": {"pull": x} for x in (0.0, 0.1, 0.3, 1.0)}, base={"recipe.ema": None},
        notes=(
            "The penalty counts what moves, which has no gradient: its L1 form is used, as soft thresholding after "
            "each step of Adam, so lambda is in units of a whole step. No average is kept, as it would not be sparse.",
        ),
    ),
    Experiment(
        name="gps/cost", title="time and memory of training and inference", paper="gps", source="GPS, section 4.2",
        methods={"all": "gps"}, measure="cost", metrics=(),
        notes=(
            "Steps of ViT-B/16 at batch 32 in two dtypes: minutes on a GPU, hours on a CPU. Memory is that of tensors, "
            "weights included. All methods are in memory at once while times are taken.",
        ),
    ),
)  # fmt: skip
