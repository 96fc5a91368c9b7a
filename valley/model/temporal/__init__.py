"""The temporal module (paper 4.2): what turns the patches of T frames into those of one.

A module is called as `module(patches [B, T, P, D], frame_mask [B, T]) -> [B, P, D]`. The mask is True for frames that
are there; they come first. A clip gives the same result alone as inside a padded batch, whatever the padding holds.
To add a module, write its file here and its line in `TEMPORAL`.
"""

from torch import nn

from valley.model.temporal.mean import TemporalMean
from valley.model.temporal.table import TableTransformer
from valley.model.temporal.transformer import TemporalTransformer
from valley.model.temporal.weighted import TemporalWeighting

TEMPORAL: dict[str, type[nn.Module]] = {
    "v1": TemporalMean,
    "v2": TemporalWeighting,
    "v3": TemporalTransformer,
    "v3_table": TableTransformer,
}
"""Name in the settings -> class, built as `TEMPORAL[name](dim=D, num_patches=P)`."""
