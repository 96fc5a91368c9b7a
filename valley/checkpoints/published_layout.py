"""Which tensors of a published folder make which tensor of ours.

published (ValleyLlamaForCausalLM)                    ours
model.vision_tower.*, Hugging Face's CLIP             vision_tower.visual.*, open_clip's
model.mm_projector.*                                  projector.*
model.pooling_layer.* (v2)                            temporal.score.*
model.transformer_delta_encoder.layers.0.* (v3)       temporal.layer.*
model.position_matrix (v3)                            temporal.position_table
model.* and lm_head, LLaMA's                          language_model.*
rows of model.embed_tokens.weight                     added_tokens.weight
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from valley.checkpoints.weight_files import WeightFiles
from valley.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FINAL_NORM = "model.norm.weight"

_TOWER = "model.vision_tower."
_TOWER_PREFIXES: Sequence[str] = (f"{_TOWER}vision_tower.vision_model.", f"{_TOWER}vision_model.", _TOWER)
_CLIP_PREFIXES: Sequence[str] = ("vision_model.", "")

_NO_WEIGHTS = re.compile(
    # Constants that older libraries saved: positions in CLIP, rotary frequencies in LLaMA.
    r".*\.position_ids|.*\.rotary_emb\.inv_freq"
    # The layer that the published code makes v3's encoder from: the encoder is a copy of it, this one is never run.
    r"|model\.transforemr_adding_layer\..*"
)
_OTHER_HALF_OF_CLIP = re.compile(r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale")

_TOWER_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.": "pre_layrnorm.",  # spelt so by Hugging Face
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
"""Pieces of open_clip's names -> Hugging Face's."""
_TEMPORAL_NAMES = {
    "score.": "model.pooling_layer.",
    "layer.": "model.transformer_delta_encoder.layers.0.",
    "position_table": "model.position_matrix",
}
"""Beginnings of our names -> of the published ones."""

Kind = Literal["whole", "delta", "pretrain"]
"""What a folder holds: a whole model, differences to a base LLaMA, or no language model at all."""


class Part(NamedTuple):
    """A tensor that must be there, with its shape."""

    files: WeightFiles
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How one of our tensors is made.

    Attributes:
        parts: what it is made from.
        make: takes the tensors of `parts` in order, returns the tensor.
    """

    parts: Sequence[Part]
    make: Callable[..., Tensor]

    def cook(self) -> Tensor:
        """Reads the parts and returns the tensor."""
        return self.make(*(part.files.read(part.name) for part in self.parts))


@dataclass(frozen=True)
class Layout:
    """The folders that a model is put together from.

    Attributes:
        source: the published folder.
        kind: what it holds.
        base: the base language model; None for a whole model.
        tower: where the vision tower is: `source`, or a CLIP folder.
        tower_prefix: what stands before Hugging Face's names of it.
        added_token_ids: rows of the embedding that become `added_tokens`.
    """

    source: WeightFiles
    kind: Kind
    base: WeightFiles | None
    tower: WeightFiles
    tower_prefix: str
    added_token_ids: Sequence[int]

    def recipes(self, specs: Mapping[str, Tensor]) -> dict[str, Recipe]:
        """Returns how to make each tensor of our model.

        Args:
            specs: its tensors by name; only their shapes count.
        """
        return {name: self._recipe(name, tuple(spec.shape)) for name, spec in specs.items()}

    def problems(self, recipes: Iterable[Recipe]) -> list[str]:
        """Returns what does not fit, a line for each folder and kind of problem: missing, wrong shape, unknown."""
        parts = [part for recipe in recipes for part in recipe.parts]
        lines = []
        for files in dict.fromkeys([self.source, self.tower, *([self.base] if self.base else [])]):
            needed = {part.name: part.shape for part in parts if part.files is files}
            missing = [name for name in needed if name not in files.tensors]
            wrong = [
                f"{name} (expected {list(shape)}, found {list(files.tensors[name].shape)})"
                for name, shape in needed.items()
                if name in files.tensors and files.tensors[name].shape != shape
            ]
            unknown = [name for name in files.tensors if name not in needed and not self._holds_nothing(files, name)]
            for what, names in (("missing", missing), ("of the wrong shape", wrong), ("unknown", unknown)):
                if names:
                    lines.append(f"{files.folder}: {len(names)} tensor(s) {what}: {', '.join(names)}")
        if self.tower is self.source and not any(name.startswith(_TOWER) for name in self.source.tensors):
            lines.append(f"{self.source.folder}: no vision tower here; give the folder of its CLIP model (--vision)")
        if self.kind == "delta" and self.base and stored_rows(self.base) > stored_rows(self.source):
            counts = f"{stored_rows(self.base)} tokens, the delta {stored_rows(self.source)}"
            lines.append(f"{self.base.folder}: {EMBEDDING}: the base has {counts}: it is another base's delta")
        return lines

    def _holds_nothing(self, files: WeightFiles, name: str) -> bool:
        is_clip = files is self.tower and files is not self.source
        return bool(_NO_WEIGHTS.fullmatch(name) or (is_clip and _OTHER_HALF_OF_CLIP.fullmatch(name)))

    def _recipe(self, name: str, shape: tuple[int, ...]) -> Recipe:
        module, _, rest = name.partition(".")
        match module:
            case "vision_tower":
                return self._tower_recipe(rest.removeprefix("visual."), shape)
            case "standardisation":  # the identity: the published code has none
                return Recipe((), lambda: torch.zeros(shape) if rest == "mean" else torch.ones(shape))
            case "temporal":
                start = next(start for start in _TEMPORAL_NAMES if rest.startswith(start))
                return self._copy(_TEMPORAL_NAMES[start] + rest.removeprefix(start), shape)
            case "projector":
                return self._copy(f"model.mm_projector.{rest}", shape)
            case "added_tokens":
                rows = self._language_recipe(EMBEDDING, (max(self.added_token_ids) + 1, shape[1]))
                return Recipe(rows.parts, lambda *parts: rows.make(*parts)[list(self.added_token_ids)])
            case "language_model":
                return self._language_recipe(rest, shape)
        raise ValueError(f"no rule for {name}")

    def _copy(self, name: str, shape: tuple[int, ...]) -> Recipe:
        return Recipe((Part(self.source, name, shape),), _itself)

    def _tower_recipe(self, name: str, shape: tuple[int, ...]) -> Recipe:
        if name == "proj":
            # What is published is the tower without the projection behind it, and Valley looks at blocks before it.
            return Recipe((), lambda: torch.eye(*shape))
        if ".attn.in_proj_" in name:
            block, _, kind = name.partition(".attn.in_proj_")
            third = (shape[0] // 3, *shape[1:])
            names = [f"{_tower_name(block)}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            return Recipe(
                [Part(self.tower, self.tower_prefix + each, third) for each in names], lambda *qkv: torch.cat(qkv)
            )
        return Recipe((Part(self.tower, self.tower_prefix + _tower_name(name), shape),), _itself)

    def _language_recipe(self, name: str, shape: tuple[int, ...]) -> Recipe:
        files = self.base if self.kind == "pretrain" and self.base else self.source
        has_rows = name in (EMBEDDING, HEAD)
        own = Part(files, name, (stored_rows(files), *shape[1:]) if has_rows else shape)
        if self.kind != "delta" or self.base is None:
            return Recipe((own,), lambda rows: _grow(rows, shape[0]) if has_rows else rows)
        theirs = Part(self.base, name, (stored_rows(self.base), *shape[1:]) if has_rows else shape)
        return Recipe((own, theirs), lambda delta, base: _grow(_add(delta, base), shape[0]))


def find_tower(source: WeightFiles, clip: WeightFiles | None) -> tuple[WeightFiles, str]:
    """Returns where a vision tower's weights are, and what stands before their names.

    Args:
        source: the published folder.
        clip: a CLIP folder to look in when the published folder has no tower.
    """
    files, prefixes = source, _TOWER_PREFIXES
    if clip is not None and not any(name.startswith(_TOWER) for name in source.tensors):
        files, prefixes = clip, _CLIP_PREFIXES
    return files, next((p for p in prefixes if any(name.startswith(p) for name in files.tensors)), prefixes[-1])


def stored_rows(files: WeightFiles) -> int:
    """Returns for how many tokens a folder has embeddings; 0 where it has none."""
    stored = files.tensors.get(EMBEDDING)
    return stored.shape[0] if stored and stored.shape else 0


def check_delta(source: WeightFiles, base: WeightFiles | None) -> None:
    """Refuses a delta without its base, and a base for what is no delta; both would load and talk nonsense.

    A trained LLaMA's last norm is about 1 or more in every channel; fine-tuning moves it by a hundredth.

    Raises:
        CheckpointError: the last norm says that it is the other kind.
    """
    norm = source.read(FINAL_NORM).float()
    if base is None:
        if norm.abs().mean() < 0.1:
            raise CheckpointError(
                f"{source.folder}: {FINAL_NORM} is nearly zero: these are differences to a base LLaMA; give it (--base)"
            )
    elif (norm - base.read(FINAL_NORM).float()).norm() < norm.norm():
        raise CheckpointError(
            f"{source.folder}: {FINAL_NORM} is nearly that of {base.folder}: this is no delta; leave the base out"
        )


def _add(delta: Tensor, base: Tensor) -> Tensor:
    """Adds the base to the rows that it has."""
    total = delta.to(torch.float32, copy=True)  # what was read from a mapped file is read again
    total[: len(base)] += base.float()
    return total.to(delta.dtype)


def _grow(rows: Tensor, num_rows: int) -> Tensor:
    """Adds rows at the mean of those there are."""
    if len(rows) >= num_rows:
        return rows
    return torch.cat([rows, rows.float().mean(0, keepdim=True).expand(num_rows - len(rows), -1).to(rows.dtype)])


def _tower_name(name: str) -> str:
    for ours, theirs in _TOWER_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _itself(tensor: Tensor) -> Tensor:
    return tensor
