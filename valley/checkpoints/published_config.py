"""What a published folder says besides its weights: configuration and tokenizer, turned into ours."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerBase

from valley.errors import CheckpointError
from valley.media.sampling import Sampling
from valley.model.configuration import ValleyVisionConfig
from valley.model.conversation import ADDED_TOKENS
from valley.model.processing import ValleyProcessor
from valley.model.settings import VisionSettings
from valley.model.templates import find_template
from valley.model.tokenizer import prepare_tokenizer
from valley.model.video_processing import ValleyVideoProcessor
from valley.model.vision import vision_config

SYSTEM = (
    "You are Valley, a large language and vision assistant trained by ByteDance. You are able to understand the visual "
    "content or video that the user provides, and assist the user with a variety of tasks using natural language. "
    "Follow the instructions carefully and explain your answers in detail."
)
"""The system message that the published weights are used with."""
STOP = "\n###"
"""How the published weights end an answer: they never learned to write EOS."""
SAMPLING = Sampling(mode="fixed", num_frames=8)
"""What the published code trains on, in spite of the paper."""

_TOWERS = {
    "openai/clip-vit-base-patch32": "ViT-B-32-quickgelu",
    "openai/clip-vit-base-patch16": "ViT-B-16-quickgelu",
    "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336-quickgelu",
}
"""`mm_vision_tower` -> open_clip's name of the same tower."""

_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA = (
    *_NEEDED,
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "head_dim",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
)
"""What is kept of a LLaMA's configuration; the rest is the published code's, or about training and tokens."""
_TOKENIZER_FILES = ("tokenizer*", "added_tokens.json", "special_tokens_map.json")


def read_config(folder: Path) -> dict[str, Any]:
    """Returns a folder's `config.json`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected a JSON object")
    return config


def llama_config(config: Mapping[str, Any], folder: Path, *, vocab_size: int) -> LlamaConfig:
    """Returns the language model's configuration.

    Args:
        config: a published configuration, or a LLaMA's.
        folder: where it came from, for messages.
        vocab_size: tokens that it shall know.

    Raises:
        CheckpointError: it is no LLaMA, or not told completely.
    """
    model_type = str(config.get("model_type"))
    if model_type.lower() not in ("valley", "llama"):
        raise CheckpointError(f"{folder}: model_type is {model_type!r}: expected valley or llama")
    if missing := [name for name in _NEEDED if name not in config]:
        raise CheckpointError(f"{folder / 'config.json'}: lacks {', '.join(missing)}")
    try:
        return LlamaConfig(**{name: config[name] for name in _LLAMA if name in config}, vocab_size=vocab_size)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not a LLaMA's configuration: {error}") from error


def temporal_name(config: Mapping[str, Any], folder: Path) -> str:
    """Returns our name of the temporal module that the flags ask for.

    Raises:
        CheckpointError: they ask for two.
    """
    weighted, transformer = (
        bool(config.get(flag)) for flag in ("use_patch_importance_pooling", "use_delta_transformer")
    )
    if weighted and transformer:
        raise CheckpointError(
            f"{folder / 'config.json'}: use_patch_importance_pooling and use_delta_transformer are both set"
        )
    return "v3_table" if transformer else "v2" if weighted else "v1"


def tower_config(config: Mapping[str, Any], folder: Path, clip: Path | None) -> ValleyVisionConfig:
    """Returns the vision tower's configuration; its token layer is the one that `mm_vision_select_layer` means.

    The published folder only names its tower. Numbers of heads and the activation are in no shape, so they come from
    `clip`, or are those of OpenAI's towers when it names one.

    Args:
        config: the published configuration.
        folder: where it came from, for messages.
        clip: a CLIP folder of Hugging Face's with a `config.json`.

    Raises:
        CheckpointError: the tower is not known, has another width than `mm_hidden_size`, or no such layer.
    """
    name = str(config.get("mm_vision_tower"))
    if clip is not None:
        tower = _read_clip(clip)
    elif name in _TOWERS:
        tower = vision_config(VisionSettings(name=_TOWERS[name], pretrained="openai"))
    else:
        raise CheckpointError(
            f"{folder / 'config.json'}: mm_vision_tower is {name!r}, neither a folder here nor one of "
            f"{', '.join(_TOWERS)}; give the folder of that CLIP model (--vision)"
        )
    if (width := config.get("mm_hidden_size", tower.hidden_size)) != tower.hidden_size:
        raise CheckpointError(
            f"{folder / 'config.json'}: mm_hidden_size is {width}, but the tower is {tower.hidden_size} wide"
        )
    description: dict[str, Any] = tower.tower or {}
    tower.tower = description | {"embed_dim": tower.hidden_size}
    # The published code falls back to the last layer.
    tower.layer = _block(config.get("mm_vision_select_layer", -1), description["vision_cfg"]["layers"], folder)
    return tower


def build_published_processor(
    source: Path, base: Path | None, tower: ValleyVisionConfig
) -> tuple[ValleyProcessor, list[str]]:
    """Returns the processor, and which of the six added tokens the tokenizer did not have.

    Args:
        source: the published folder.
        base: where the tokenizer is, if the published folder has none.
        tower: the vision tower.

    Raises:
        CheckpointError: no tokenizer can be loaded.
        ModelError: it does not suit the paper's template.
    """
    tokenizer = _load_tokenizer(source if base is None or _tokenizer_files(source) else base)
    lacking = [token for token in ADDED_TOKENS if token not in tokenizer.get_vocab()]
    processor = ValleyProcessor(
        prepare_tokenizer(tokenizer, find_template("valley")),
        ValleyVideoProcessor(tower.size_px, tower.mean, tower.std, tower.interpolation, tower.resize_mode),
        template="valley",
        system=SYSTEM,
        num_patches=tower.num_patches,
        sampling=SAMPLING,
        stop_strings=[STOP],
    )
    return processor, lacking


def _read_clip(folder: Path) -> ValleyVisionConfig:
    config = read_config(folder)
    try:
        clip: Any = CLIPVisionConfig.from_dict(config.get("vision_config") or config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not a CLIP tower's configuration: {error}") from error
    if clip.hidden_act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{folder / 'config.json'}: hidden_act {clip.hidden_act!r}: known: quick_gelu, gelu")
    vision = {
        "image_size": clip.image_size,
        "patch_size": clip.patch_size,
        "width": clip.hidden_size,
        "head_width": clip.hidden_size // clip.num_attention_heads,
        "layers": clip.num_hidden_layers,
        "mlp_ratio": clip.intermediate_size / clip.hidden_size,
        "norm_kwargs": {"eps": clip.layer_norm_eps},
    }
    return ValleyVisionConfig(
        name=folder.name,
        pretrained=folder.name,
        tower={"embed_dim": clip.hidden_size, "quick_gelu": clip.hidden_act == "quick_gelu", "vision_cfg": vision},
        hidden_size=clip.hidden_size,
        num_patches=(clip.image_size // clip.patch_size) ** 2,
        size_px=clip.image_size,
    )


def _block(hidden_state: int, num_blocks: int, folder: Path) -> int:
    """Hugging Face counts the states between blocks, from 0 before the first; we count blocks."""
    layer = hidden_state if hidden_state < 0 else hidden_state - 1
    if not -num_blocks <= layer < num_blocks or hidden_state == 0:
        what = f"mm_vision_select_layer is {hidden_state}: not the output of one of the tower's {num_blocks} blocks"
        raise CheckpointError(f"{folder / 'config.json'}: {what}")
    return layer


def _tokenizer_files(folder: Path) -> list[Path]:
    return [path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)]


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with (
        tempfile.TemporaryDirectory() as alone
    ):  # beside a published config.json transformers may ask that for the tokenizer
        for path in _tokenizer_files(folder):
            shutil.copy(path, alone)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(alone)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            hint = "; a bare tokenizer.model needs the package sentencepiece (pip install 'valley[published]')"
            raise CheckpointError(
                f"{folder}: no tokenizer can be loaded: {error}{hint if (folder / 'tokenizer.model').is_file() else ''}"
            ) from error
    tokenizer.name_or_path = folder.name  # not that of a folder that is gone
    return tokenizer
