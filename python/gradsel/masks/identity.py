"""The identity of a mask as one number."""

from __future__ import annotations

import hashlib

from gradsel.masks.base import Mask


def fingerprint(mask: Mask) -> int:
    """63 bits that depend on the selected entries and their order.

    A number, because torch takes numbers in a state through ``load_state_dict`` as they are: integer tensors it casts
    to the dtype of the parameter, strings it takes to pieces.
    """
    digest = hashlib.blake2b(f"{mask.kind} {mask.shape} {mask.describe()}".encode(), digest_size=8)
    for tensor in mask.tensors().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1
