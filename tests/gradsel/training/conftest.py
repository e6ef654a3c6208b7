"""Data and models that the tests of this folder share, and a cache for tables that is thrown away."""

from __future__ import annotations

import datasets
import pytest

from tests.support import runs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return runs.image_folder(tmp_path_factory.mktemp("data") / "images", train=6, val=3, test=4)


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    return runs.reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return runs.bert_folder(tmp_path_factory.mktemp("model") / "bert")
