"""Files as damage and attackers make them."""

from __future__ import annotations

import copy
import json
import random

#: What stands in a file in place of what should.
STRANGE = (
    None, True, -1, 2**62, 2**70, 1e400, [], {}, [[]], "", "../outside", "/dev/zero", "one.safetensors",
    "two.safetensors", "\x1b[2J", "\ud800", "a" * 5000,
)  # fmt: skip


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """Changes a few bytes; or truncates the file; or repeats, drops or moves a piece."""
    data = bytearray(whole)
    kind = rng.randrange(6)
    if kind < 3:
        end = len(data) if kind else min(len(data), 300)  # often the header
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(end)] = rng.randrange(256)
    elif kind == 3:
        del data[rng.randrange(len(data)) :]
    else:
        start, length, to = rng.randrange(len(data)), rng.randrange(1, 40), rng.randrange(len(data))
        piece = data[start : start + length]
        data[to : to + (0 if kind == 4 else len(piece))] = piece
    return bytes(data)


def mutated_json(whole: bytes, rng: random.Random) -> bytes:
    """Replaces, removes, renames or nests one value of a JSON document."""
    document = json.loads(whole)
    holders = list(_holders(document))
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return b"[]"
    key, kind = rng.choice(keys), rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "y", "z", *map(str, keys)])] = holder.pop(key)
    elif kind == 2:
        holder[key] = [copy.deepcopy(holder[key])]
    else:
        holder[key] = rng.choice(STRANGE)
    return json.dumps(document).encode()


def _holders(value):
    if isinstance(value, (dict, list)):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _holders(each)
