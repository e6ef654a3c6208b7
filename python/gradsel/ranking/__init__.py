"""select(): collects gradients within bounded memory and ranks them by a policy and a criterion."""

from gradsel.ranking.criteria import Criterion, random_scores
from gradsel.ranking.losses import SupConLoss, contrastive, cross_entropy
from gradsel.ranking.policies import ByMass, Columns, Global, PerLayer, PerNeuron, Rows, equal_budget
from gradsel.ranking.pooling import features
from gradsel.ranking.selecting import select
from gradsel.ranking.subsets import easiest_subset

__all__ = [
    "ByMass",
    "Columns",
    "Criterion",
    "Global",
    "PerLayer",
    "PerNeuron",
    "Rows",
    "SupConLoss",
    "contrastive",
    "cross_entropy",
    "easiest_subset",
    "equal_budget",
    "features",
    "random_scores",
    "select",
]
