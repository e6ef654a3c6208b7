"""What ``--help`` shows of every command as an example: lines that run as they are, given the files that they name."""

from __future__ import annotations

_VIT = "timm/vit_base_patch16_224.augreg_in21k"

#: By the words of a command. Lines have at most 80 columns.
EXAMPLES = {
    "gradsel": ("gradsel demo", "gradsel finetune --help"),
    "gradsel finetune": (
        "gradsel finetune --preset gps/cub --data CUB_200_2011/",
        f"gradsel finetune --data birds/ --k 1 --output runs/birds \\\n      --model {_VIT}",
        "gradsel finetune --data reviews.csv --method grft --output runs/reviews \\\n"
        "      --model distilbert/distilbert-base-uncased",
        "gradsel finetune --task segmentation --data Kvasir-SEG/ \\\n"
        "      --model facebook/sam-vit-base --output runs/polyps",
        "gradsel finetune --config runs/birds/config.yaml --seed 1 \\\n      --output runs/birds-1",
    ),
    "gradsel evaluate": ("gradsel evaluate runs/birds", "gradsel evaluate runs/birds --data other-birds/ --json"),
    "gradsel predict": (
        "gradsel predict runs/birds photo.jpg",
        'gradsel predict runs/reviews "a warm and funny film" --top 1',
    ),
    "gradsel resume": ("gradsel resume runs/birds",),
    "gradsel compare": (
        f"gradsel compare --data birds/ --model {_VIT} \\\n"
        "      --methods gps,gps:criterion=random,lora,ssf --seeds 3 --epochs 20 \\\n"
        "      --output runs/birds-compared",
    ),
    "gradsel papers": (
        "gradsel papers list",
        "gradsel papers show gps/table2 --data DATA/",
        "gradsel papers run gps/table2 --data DATA/ --only cub,gps,linear",
    ),
    "gradsel papers list": ("gradsel papers list",),
    "gradsel papers show": ("gradsel papers show gps/table2 --data DATA/",),
    "gradsel papers run": (
        "gradsel papers run gps/table2 --data DATA/ --only cub,gps,linear",
        "gradsel papers run gps/fig4 --data DATA/ --only flowers,K=1,K=5 \\\n      --epochs 20 --device cuda",
    ),
    "gradsel push": (
        "gradsel push runs/birds USER/birds --private",
        f"gradsel push birds.safetensors USER/birds \\\n      --base {_VIT}",
    ),
    "gradsel methods": ("gradsel methods",),
    "gradsel presets": ("gradsel presets", "gradsel presets gps/cub"),
    "gradsel demo": ("gradsel demo", "gradsel demo --output /tmp/demo"),
    "gradsel count": ("gradsel count", "gradsel count --policy per-neuron:2 --model vit-b-16"),
    "gradsel config": ("gradsel config",),
    "gradsel delta": (
        "gradsel delta make base/ tuned/ birds.safetensors",
        "gradsel delta info birds.safetensors",
        "gradsel delta apply birds.safetensors base/ tuned-again/",
    ),
    "gradsel delta info": ("gradsel delta info runs/birds/delta.safetensors", "gradsel delta info USER/birds"),
    "gradsel delta apply": (
        "gradsel delta apply birds.safetensors base/model.safetensors \\\n      tuned.safetensors",
    ),
    "gradsel delta revert": ("gradsel delta revert birds.safetensors tuned.safetensors base.safetensors",),
    "gradsel delta diff": ("gradsel delta diff birds.safetensors cars.safetensors",),
    "gradsel delta merge": (
        "gradsel delta merge birds.safetensors cars.safetensors both.safetensors \\\n      --wins first",
    ),
    "gradsel delta make": ("gradsel delta make base/ tuned/ birds.safetensors --with-originals",),
    "gradsel delta lora": ("gradsel delta lora birds.safetensors adapter/ --base base/ --rank 8",),
}


def shown(program: str) -> str | None:
    """The end of the help of a command, or None."""
    lines = EXAMPLES.get(program)
    if lines is None:
        return None
    return "\n".join([f"example{'s' if len(lines) > 1 else ''}:", *(f"  {line}" for line in lines)])
