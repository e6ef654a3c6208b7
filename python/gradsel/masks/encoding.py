"""The tensors of masks in files: written in as few bytes as possible, untrusted when read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

import gradsel_kernels as gk

#: Words of packed bits that are unpacked at a time.
_PIECE = 2**14


def ascends(numbers: Tensor) -> bool:
    """Whether numbers ascend strictly along the last dimension. No diff(): on damaged ones it may overflow."""
    return bool((numbers[..., 1:] > numbers[..., :-1]).all())


def narrow(numbers: Tensor, end: int) -> Tensor:
    """Numbers below ``end`` in the smallest integers that files hold: uint16, int32 or int64."""
    if end <= 2**16:
        return numbers.to(torch.uint16)
    return numbers.to(torch.int32 if end <= 2**31 else torch.int64)


def widen(part: str, numbers: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The inverse of :func:`narrow`: int32, or int64 as it is.

    Raises:
        TypeError: the numbers have none of these dtypes.
    """
    if numbers.dtype not in dtypes:
        raise TypeError(f"{part} must be one of {', '.join(map(str, dtypes))}, got {numbers.dtype}")
    return numbers if numbers.dtype is torch.int64 else numbers.to(torch.int32)


def fewest_bytes(part: str, numbers: Tensor, shape: tuple[int, int], matrix: Callable[[], Tensor]) -> dict[str, Tensor]:
    """``numbers``, or the packed bits of the bool ``matrix`` of this shape if they are smaller."""
    rows, n = shape
    if 4 * rows * _words(n) < numbers.nbytes:
        return {"bits": gk.pack_bits(matrix())}
    return {part: numbers}


def cols_of(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """int32 [rows, K]: the set bits of each row of packed bits [rows, ceil(n / 32)].

    Raises:
        TypeError, ValueError: see :func:`_check_bits`; or rows have different numbers of bits set.
    """
    rows, n = shape
    _check_bits(bits, shape)
    width = 32 * _words(n)
    count = _count(bits)
    k = count // rows
    if count != rows * k:
        raise ValueError(f"{count} bits are set in {rows} rows, so not the same number in each")
    cols = torch.empty(count, dtype=torch.int32)
    begin = 0
    for numbers in _set_bits(bits):
        end = begin + numbers.numel()
        wrong = numbers // width != torch.arange(begin, end) // max(k, 1)
        if bool(wrong.any()):
            row = int(torch.minimum(numbers // width, torch.arange(begin, end) // max(k, 1))[wrong][0])
            raise ValueError(f"row {row} does not have {k} bits set, as many as the others on average")
        cols[begin:end] = numbers % width
        begin = end
    return cols.view(rows, k)


def indices_of(bits: Tensor, n: int) -> Tensor:
    """int32 or int64 [nnz]: the set bits of packed bits [1, ceil(n / 32)].

    Raises:
        TypeError, ValueError: see :func:`_check_bits`.
    """
    _check_bits(bits, (1, n))
    indices = torch.empty(_count(bits), dtype=torch.int32 if n <= 2**31 else torch.int64)
    begin = 0
    for numbers in _set_bits(bits):
        indices[begin : begin + numbers.numel()] = numbers
        begin += numbers.numel()
    return indices


def _check_bits(bits: Tensor, shape: tuple[int, int]) -> None:
    """Checks packed bits.

    Raises:
        TypeError, ValueError: ``bits`` is not int32 [rows, ceil(n / 32)]; it has bits set after the last column; or the
            matrix is empty, which is never packed (its other size could be anything).
    """
    rows, n = shape
    if bits.dtype is not torch.int32:
        raise TypeError(f"bits must be torch.int32, got {bits.dtype}")
    if tuple(bits.shape) != (rows, _words(n)) or not rows * n:
        raise ValueError(f"bits must be [{rows}, {_words(n)}] for a matrix [{rows}, {n}], got {list(bits.shape)}")
    if n % 32 and bool((bits[:, -1] >> n % 32).any()):
        raise ValueError(f"bits are set after the last column, {n - 1}")


def _set_bits(bits: Tensor) -> Iterator[Tensor]:
    """Numbers of the set bits, ascending, all rows one after the other: int64, in pieces that take little memory."""
    for start, piece in enumerate(bits.reshape(-1).split(_PIECE)):
        yield gk.unpack_bits(piece.view(1, -1), 32 * piece.numel()).view(-1).nonzero().view(-1) + 32 * _PIECE * start


def _count(bits: Tensor) -> int:
    pieces = bits.reshape(-1).split(_PIECE)
    return sum(int(gk.unpack_bits(piece.view(1, -1), 32 * piece.numel()).sum()) for piece in pieces)


def part_of(tensors: Mapping[str, Tensor], *names: str) -> tuple[str, Tensor]:
    """The only tensor of a mask and its name, which must be one of ``names``.

    Raises:
        KeyError, ValueError: there is no tensor, or a different one.
    """
    if not tensors:
        raise KeyError(names[0])
    (part, tensor), *others = tensors.items()
    if others or part not in names:
        raise ValueError(f"expected {' or '.join(names)}, got {', '.join(tensors)}")
    return part, tensor


def no_part(tensors: Mapping[str, Tensor]) -> None:
    """Checks that a mask which needs no tensors has none.

    Raises:
        ValueError: it has some.
    """
    if tensors:
        raise ValueError(f"expected no tensors, got {', '.join(tensors)}")


def _words(n: int) -> int:
    return -(-n // 32)
