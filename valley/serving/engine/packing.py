"""A language model on a CPU: the dtype that the processor is fast in, and weights laid out for a few rows at a time.

`nn.Linear` keeps its weight as `[out, in]`. A product with a few rows then lays the weight out anew each time, which
takes longer than the product. In float32 it is enough to keep it as `[in, out]` in memory: as fast as before for one
row, and twice to three times as fast for a few. In half precision oneDNN wants a layout of its own, which it can make
once; torch's compiler uses the same operators.
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
    """Lays out the weights of the linear layers of a model on a CPU; returns how many.

    Weights that others share (an embedding's) stay theirs. Layers that oneDNN cannot do, or does otherwise, stay.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return 0
    num_packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                if child.weight.dtype == torch.float32:  # `[in, out]` in memory, `[out, in]` to look at
                    child.weight = nn.Parameter(child.weight.detach().t().contiguous().t(), requires_grad=False)
                elif packed := _packed(child):
                    setattr(module, name, packed)
                else:
                    return num_packed
                num_packed += 1
    return num_packed


@torch.no_grad()
def _packed(linear: nn.Linear) -> PackedLinear | None:
    """The layer packed, if this torch has the operators and they agree with the layer."""
    try:
        packed = PackedLinear(linear)
        probe: Any = torch.randn(2, linear.in_features, dtype=linear.weight.dtype)
        torch.testing.assert_close(packed(probe), linear(probe), rtol=5e-2, atol=0.5)
    except (AttributeError, RuntimeError, AssertionError) as error:
        logger.warning("linear layers stay as they are: %s", str(error).splitlines()[0])
        return None
    return packed
