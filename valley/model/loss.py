"""The loss of a language model, computed where there is something to learn and nowhere else."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

IGNORED = -100
"""Label of a token that is not supervised."""


def supervised_loss(
    language_model: PreTrainedModel,
    labels: Int[Tensor, "B L"],
    num_items: Tensor | int | None = None,
    *,
    return_logits: bool = False,
    **inputs: Any,
) -> CausalLMOutputWithPast:
    """Runs a causal language model and returns its next-token loss on the supervised tokens.

    The head runs on the columns in which some row is supervised, through the backbone's own `logits_to_keep`, which
    keeps what it does to its logits (Gemma's soft cap, Cohere's scale).

    Args:
        language_model: any Hugging Face causal language model.
        labels: token ids, -100 where nothing is to be learned; not shifted.
        num_items: what the sum of token losses is divided by; None: the number of supervised tokens here.
        return_logits: also return the logits of every position.
        inputs: what else the language model takes.

    Returns:
        `loss` in float32, 0 with a zero gradient when nothing is supervised; `logits` is None unless asked for.
    """
    targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
    supervised = targets != IGNORED
    columns = supervised.any(dim=0).nonzero().squeeze(1)
    if not len(columns):
        columns = columns.new_zeros(1)  # a column without a target: the head stays part of the graph
    outputs = language_model(use_cache=False, logits_to_keep=0 if return_logits else columns, **inputs)
    kept = outputs.logits.shape[1] == len(columns)  # a few backbones take `logits_to_keep` and do not heed it
    logits = outputs.logits if kept else outputs.logits[:, columns]
    chosen = supervised[:, columns]
    total = cross_entropy(logits[chosen].float(), targets[:, columns][chosen], reduction="sum")
    count = supervised.sum().clamp(min=1) if num_items is None else num_items
    return CausalLMOutputWithPast(
        loss=total / count,
        logits=outputs.logits if return_logits else None,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
