"""What the server that forks ranks imports once, for all of them."""

import datasets
import peft
import sklearn.metrics
import timm
import torchvision.transforms.v2
import transformers
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import gradsel.training.report
import gradsel.training.run
import gradsel.training.trainer

__all__ = [
    "AutoModelForImageClassification",
    "AutoModelForSequenceClassification",
    "datasets",
    "gradsel",
    "peft",
    "sklearn",
    "timm",
    "torchvision",
    "transformers",
]
