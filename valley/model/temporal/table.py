"""v3 with its position encodings read from a table, as published weights hold them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers.initialization import copy_

from valley.model.temporal.transformer import TemporalTransformer, sinusoids

TABLE_FRAMES = 2048
"""Rows of the table in the published code."""


class TableTransformer(TemporalTransformer):
    r"""v3, with `PE[t]` the row t of a table that is saved with the weights and never trained.

    The table starts as v3's sines and cosines. The code that the paper's authors published saves it with the weights;
    these learned with what it held, so they are used with that.

    Args:
        dim: width D of the patches.
        num_patches: patches P of a frame (v3 does not depend on it).
    """

    position_table: Tensor

    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__(dim, num_patches)
        self.register_buffer("position_table", sinusoids(TABLE_FRAMES, dim).float())

    def reset_parameters(self) -> None:
        """Fills the table with v3's sines and cosines, unless it was loaded."""
        copy_(self.position_table, sinusoids(TABLE_FRAMES, self.dim))

    def positions(self, num_frames: int) -> Float[Tensor, "T D"]:
        """Returns the table's first rows.

        Raises:
            ValueError: the table has fewer.
        """
        if num_frames > TABLE_FRAMES:
            raise ValueError(f"a clip has {num_frames} frames, but the table of positions ends after {TABLE_FRAMES}")
        return self.position_table[:num_frames]
