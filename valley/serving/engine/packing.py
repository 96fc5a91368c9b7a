"""A language model on a CPU: the dtype that the processor is fast in, and weights laid out for a few rows at a time.

`nn.Linear` lays its weight out anew for every multiplication by more than one row, which takes longer than the
multiplication. oneDNN can do that once; torch's own compiler uses the same operators.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_ROWS = 8
"""The number of rows that the layout is chosen for; it serves others well, too."""


def serving_dtype(
    wanted: Literal["auto", "float32", "bfloat16", "float16"], saved: torch.dtype, device: torch.device
) -> torch.dtype:
    """Returns the dtype to serve in; see `EngineSettings.dtype`."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if device.type != "cpu" or saved == torch.float32:
        return saved
    has_instructions = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has_instructions else torch.float32


class PackedLinear(nn.Module):
    """A linear layer whose weight is laid out for oneDNN; for inference on a CPU.

    Args:
        linear: what it computes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        """Returns `rows @ weight.T + bias`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return product


def pack_linear_layers(model: nn.Module) -> int:
    """Replaces the linear layers of a model on a CPU, where oneDNN is there and computes the same; returns how many.

    Weights that others share (an embedding's) stay theirs.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return 0
    num_packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                packed = _packed(child)
                if packed is None:
                    return num_packed
                setattr(module, name, packed)
                num_packed += 1
    return num_packed


@torch.no_grad()
def _packed(linear: nn.Linear) -> PackedLinear | None:
    """The layer packed, if this torch has the operators and they agree with the layer."""
    try:
        packed = PackedLinear(linear)
        probe: Any = torch.randn(2, linear.in_features, dtype=linear.weight.dtype)
        tolerance = 1e-4 if linear.weight.dtype == torch.float32 else 5e-2
        torch.testing.assert_close(packed(probe), linear(probe), rtol=tolerance, atol=tolerance * 10)
    except (AttributeError, RuntimeError, AssertionError) as error:
        logger.warning("linear layers stay as they are: %s", str(error).splitlines()[0])
        return None
    return packed
