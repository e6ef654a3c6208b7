"""What is attached: weights and their values, the record of a model, and what optimizers' steps do to both."""

from gradsel.attached.record import (
    RECORD,
    STATE,
    Attachments,
    Record,
    attached_root,
    attachments_of,
    is_attached,
    require_complete,
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
    "LINK", "RECORD", "STATE", "SUFFIX", "VALUES_VERSION", "WEIGHT_VERSION", "Attachments", "Original", "Record",
    "Selected", "SelectedValues", "attached_root", "attachments_of", "is_attached", "is_values", "links_of", "owner_of",
    "require_complete", "selected_in", "values_of", "watch_optimizers",
]  # fmt: skip
