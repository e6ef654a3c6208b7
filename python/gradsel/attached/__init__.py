"""What is attached: weights and their values, the record of a model, and what optimizers' steps do to both."""

from gradsel.attached.differences import Differences, no_differences
from gradsel.attached.record import (
    OFFLOADED,
    RECORD,
    STATE,
    Attachments,
    Record,
    attached_root,
    attachments_of,
    differences_in,
    is_attached,
    masks_in,
    require_complete,
    require_present,
    selected_in,
)
from gradsel.attached.selected import (
    LINK,
    SUFFIX,
    VALUES_VERSION,
    WEIGHT_VERSION,
    Original,
    Selected,
    SelectedValues,
    is_values,
    values_of,
)
from gradsel.attached.steps import links_of, owner_of, watch_optimizers

__all__ = [
    "LINK", "OFFLOADED", "RECORD", "STATE", "SUFFIX", "VALUES_VERSION", "WEIGHT_VERSION", "Attachments", "Differences",
    "Original", "Record", "Selected", "SelectedValues", "attached_root", "attachments_of", "differences_in",
    "is_attached", "is_values", "links_of", "masks_in", "no_differences", "owner_of", "require_complete",
    "require_present", "selected_in", "values_of", "watch_optimizers",
]  # fmt: skip
