"""The easiest part of a data set: which one it is, and that looking for it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gradsel.ranking.subsets import EasiestSubset, easiest_subset


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return torch.tensor(float(i))


class Endless(IterableDataset):
    def __iter__(self):
        raise AssertionError("should not have been called")


def value(model, batch):
    return batch.mean()


def by(size):
    return lambda part: DataLoader(part, batch_size=size)


class Noisy(nn.Module):
    """Has modes, a buffer that forward changes, and dropout."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(1)
        self.dropout = nn.Dropout(0.5)
        self.eval_only = nn.Linear(1, 1).eval()

    def forward(self, x):
        return self.eval_only(self.dropout(self.bn(x[:, None])))


@pytest.mark.parametrize(("size", "n"), [(12, 3), (13, 4), (7, 7), (100, 6)])
def test_parts_cover_everything_and_differ_in_size_by_one_at_most(size, n):
    parts = []

    def batches(part):
        parts.append([int(x) for x in part])
        return DataLoader(part, batch_size=5)

    easiest = easiest_subset(nn.Identity(), Numbers(size), value, n, batches=batches)
    assert len(parts) == n
    assert sorted(number for part in parts for number in part) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [int(x) for x in easiest] == parts[easiest.part]


def test_the_part_with_the_smallest_mean_of_its_batches_wins():
    parts = []

    def batches(part):
        numbers = [float(x) for x in part]
        parts.append((numbers[0] + sum(numbers[1:]) / (len(numbers) - 1)) / 2)
        return [torch.tensor(numbers[:1]), torch.tensor(numbers[1:])]  # of unequal sizes, and of equal weight

    easiest = easiest_subset(nn.Identity(), Numbers(40), value, 5, batches=batches, seed=3)
    assert isinstance(easiest, EasiestSubset)
    assert easiest.losses == pytest.approx(parts)
    assert easiest.part == parts.index(min(parts))
    assert len(easiest) == 8


def test_of_equal_parts_the_first_wins():
    easiest = easiest_subset(nn.Identity(), Numbers(9), lambda model, batch: batch.mean() * 0, 3, batches=by(3))
    assert easiest.losses == (0.0, 0.0, 0.0)
    assert easiest.part == 0


def test_the_split_is_random_and_follows_the_seed_alone():
    def indices(seed):
        torch.rand(1)
        return list(easiest_subset(nn.Identity(), Numbers(60), value, 3, batches=by(20), seed=seed).indices)

    assert indices(0) == indices(0)
    assert sorted(indices(0)) != sorted(indices(1))
    found = indices(0)
    assert found != sorted(found)  # shuffled inside, too
    assert max(found) - min(found) > 20  # no contiguous piece


def test_one_part_is_everything_and_nothing_runs():
    def never(*arguments):
        raise AssertionError("should not have been called")

    data = Numbers(5)
    everything = easiest_subset(nn.Identity(), data, never, 1, batches=never)
    assert list(everything.indices) == [0, 1, 2, 3, 4]
    assert everything.dataset is data
    assert (everything.part, everything.losses) == (0, ())
    assert [int(x) for x in DataLoader(everything, batch_size=None)] == [0, 1, 2, 3, 4]


def test_the_model_and_the_random_numbers_are_given_back():
    model = Noisy()
    model.eval_only.weight.requires_grad_(False)
    model.bn.weight.grad = torch.tensor([2.0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()

    def loss(model, batch):
        assert not torch.is_grad_enabled()
        assert model.training  # as the caller left it
        out = model(batch).square().mean()
        model.eval()
        model.train()
        model.eval_only.train()
        return out

    easiest_subset(model, Numbers(30), loss, 3, batches=lambda part: DataLoader(part, batch_size=5, shuffle=True))
    assert model.training
    assert not model.eval_only.training
    assert not model.eval_only.weight.requires_grad
    assert model.bn.weight.grad.item() == 2.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_given_back_when_the_loss_fails():
    model = Noisy()
    state = torch.get_rng_state()

    def loss(model, batch):
        model(batch)
        model.eval()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        easiest_subset(model, Numbers(30), loss, 3, batches=by(5))
    assert model.training
    assert model.bn.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_draws_alike_for_every_part():
    torch.manual_seed(0)
    data = TensorDataset(torch.ones(300))
    model = nn.Dropout(0.5)
    easiest = easiest_subset(model, data, lambda model, batch: model(batch[0]).mean(), 3, batches=by(100))
    assert len(set(easiest.losses)) == 1
    assert easiest.losses[0] != 1.0  # it did drop some


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_names_the_part(bad):
    def loss(model, batch):
        return torch.where((batch == 0).any(), bad, 1.0)

    def batches(part):
        return DataLoader(part, batch_size=100)

    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    number = next(i for i, part in enumerate(order.tensor_split(4)) if 0 in part)
    with pytest.raises(ValueError, match=rf"the loss of batch 0 in part {number} of 4 is -?(nan|inf)"):
        easiest_subset(nn.Identity(), Numbers(10), loss, 4, batches=batches)


@pytest.mark.parametrize(
    ("data", "n", "error", "message"),
    [
        (Numbers(4), 0, ValueError, "n must be an integer >= 1, got 0"),
        (Numbers(4), -1, ValueError, "n must be an integer >= 1, got -1"),
        (Numbers(4), True, ValueError, "n must be an integer >= 1, got True"),
        (Numbers(4), 2.0, ValueError, "n must be an integer >= 1, got 2.0"),
        (Numbers(4), 5, ValueError, "4 samples cannot be split into n = 5 parts"),
        (Numbers(0), 1, ValueError, "0 samples cannot be split into n = 1 parts"),
        (Endless(), 2, TypeError, "needs a map-style data set with a length, got Endless"),
    ],
)
def test_bad_arguments(data, n, error, message):
    with pytest.raises(error, match=message):
        easiest_subset(nn.Identity(), data, value, n, batches=by(2))


def test_a_loss_that_is_no_scalar_and_a_part_without_batches_are_errors():
    with pytest.raises(ValueError, match=r"the loss of batch 0 in part 0 of 2 is not a scalar, its shape is \[3\]"):
        easiest_subset(nn.Identity(), Numbers(6), lambda model, batch: batch, 2, batches=by(3))
    with pytest.raises(ValueError, match="batches gives nothing for part 0 of 2: is drop_last set"):
        easiest_subset(
            nn.Identity(), Numbers(6), value, 2, batches=lambda part: DataLoader(part, batch_size=4, drop_last=True)
        )
