"""What a training step sends under FSDP2, by arithmetic: nothing here is measured.

``tests/gradsel/sharding/test_wire.py`` counts the same bytes on a small model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages.figures import paragraph, table

#: Bytes of a number as it is gathered for a forward, and as gradients are reduced.
GATHERED, REDUCED = 2, 4
#: Bytes of a column index.
INDEX = 4
#: GPUs of a node, over which HSDP shards; it keeps replicas on all nodes.
NODE = 8
GPUS = (8, 64, 1024)
K, RANK = 10, 16


@dataclass(frozen=True)
class Shape:
    """A model of the family of Llama.

    Attributes:
        dim, inner, keys: width of the model, of its feed-forward layers, and of keys and values.
        blocks, tokens: number of blocks, and of tokens, whose embedding and head are not tied.
    """

    name: str
    dim: int
    inner: int
    keys: int
    blocks: int
    tokens: int = 128_256

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The weights of a block, [out, in]."""
        dim, inner, keys = self.dim, self.inner, self.keys
        return [(dim, dim), (keys, dim), (keys, dim), (dim, dim), (inner, dim), (inner, dim), (dim, inner)]

    @property
    def size(self) -> int:
        """Number of parameters."""
        block = sum(rows * cols for rows, cols in self.matrices) + 2 * self.dim
        return self.blocks * block + 2 * self.tokens * self.dim + self.dim

    @property
    def values(self) -> int:
        """Selected entries: ``PerNeuron(K)`` of the matrices of all blocks."""
        return self.blocks * K * sum(rows for rows, _ in self.matrices)

    @property
    def adapters(self) -> int:
        """Entries of LoRA's A and B beside the same matrices."""
        return self.blocks * RANK * sum(rows + cols for rows, cols in self.matrices)


SHAPES = [Shape("Llama 3.1 8B", 4096, 14336, 1024, 32), Shape("Llama 3.1 70B", 8192, 28672, 1024, 80)]


@dataclass(frozen=True)
class Method:
    """A way to train a shape.

    Attributes:
        trained: numbers with a gradient.
        added: bytes of what is gathered for a forward beside the model.
    """

    name: str
    trained: int
    added: int = 0


def methods(shape: Shape) -> list[Method]:
    return [
        Method(f"values, K = {K}, attach() first", shape.values, shape.values * 4),
        Method(f"values, K = {K}, fully_shard() first", shape.values),
        Method(f"LoRA, r = {RANK}", shape.adapters, shape.adapters * GATHERED),
        Method("full fine-tuning", shape.size),
    ]


def fsdp(shape: Shape, method: Method, gpus: int) -> tuple[float, float]:
    """Bytes that a GPU sends in a step: to gather for forward and backward, and to reduce gradients, both by a ring."""
    share = (gpus - 1) / gpus
    return 2 * (shape.size * GATHERED + method.added) * share, method.trained * REDUCED * share


def between_nodes(method: Method, gpus: int) -> float:
    """Bytes of them that a GPU of HSDP sends to other nodes: an all-reduce of its share of the gradients."""
    nodes = gpus // NODE
    return 2 * method.trained / NODE * REDUCED * (nodes - 1) / nodes


def traffic(results: Path) -> str:
    """Bytes by shape, method and number of GPUs."""
    lines = []
    for shape in SHAPES:
        for method in methods(shape):
            line = [shape.name, method.name, f"{method.trained / 1e6:,.1f} M"]
            for gpus in GPUS:
                gathered, reduced = fsdp(shape, method, gpus)
                line.append(f"{gathered / 1e9:,.1f} + {_size(reduced)}")
            line += [_size(between_nodes(method, gpus)) for gpus in GPUS[1:]]
            lines.append(line)
    heads = ["model", "trained", "numbers", *(f"FSDP, {gpus:,} GPUs" for gpus in GPUS)]
    heads += [f"HSDP between nodes, {gpus:,}" for gpus in GPUS[1:]]
    return table(heads, lines)


def findings(results: Path) -> str:
    """How much less goes between nodes, what a GPU holds, and what it would send to hold less."""
    less, held, more = [], [], []
    for shape in SHAPES:
        less.append(f"1/{shape.size / shape.values:.0f} for {shape.name}")
        indices = shape.values * INDEX
        own = (f"{_size(shape.values * 12 / gpus)} GB on {gpus:,}" for gpus in (GPUS[0], GPUS[-1]))
        held.append(f"{shape.name}, {_size(indices)} GB on every GPU and {' or '.join(own)} GPUs")
        gathered, _ = fsdp(shape, Method("", 0), NODE)
        sent = indices * (NODE - 1) / NODE
        more.append(f"{_size(sent)} GB ({100 * sent / gathered:.1f} %) for {shape.name}")
    return paragraph(
        "Gathering the frozen model dominates, for values as for LoRA. Where that stays within a node, what goes "
        f"between nodes is that of full fine-tuning times {', '.join(less)}. Every GPU holds the column indices of all "
        "rows, since its batch has gradients for all of them, and its own values and moments besides: for "
        f"K = {K}, {'; '.join(held)}. To hold only its own indices, each of {NODE} GPUs would send "
        f"{', '.join(more)} more in a step."
    )


def _size(count: float) -> str:
    """Gigabytes with two digits that say something."""
    gigabytes = count / 1e9
    return f"{gigabytes:,.1f}" if gigabytes >= 10 else f"{gigabytes:.2g}"
