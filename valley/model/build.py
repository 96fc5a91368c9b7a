"""From settings to a model, with the weights it starts from."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from valley.errors import ModelError
from valley.media.sampling import Sampling
from valley.model.configuration import ValleyConfig
from valley.model.conversation import ADDED_TOKENS
from valley.model.miniatures import LLMS, miniature_llm_config
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor, build_processor
from valley.model.saved import saved_folder
from valley.model.settings import LLMSettings, ModelSettings
from valley.model.vision import VisionTower, load_pretrained, vision_config

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError, ImportError, RuntimeError)
"""What Hugging Face raises for a name, folder or file that it cannot make a model of."""


def build_model(
    settings: ModelSettings, *, seed: int, dtype: torch.dtype = torch.float32
) -> ValleyForConditionalGeneration:
    """Builds a new model on the CPU, or loads a saved one.

    The tower and the language model start from their pretrained weights, the temporal module and the projector at
    random, the rows of the added tokens at the mean of the vocabulary.

    Args:
        settings: what to build.
        seed: of all random weights.
        dtype: of the weights.

    Raises:
        ModelError: a part that is unknown, cannot be loaded or does not fit the others.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if settings.path is not None:
            try:
                return load_saved(settings.path, attn_implementation=settings.llm.attention, dtype=dtype)
            except ModelError as error:
                raise ModelError(f"model.path: {error}") from error
        processor = build_processor(settings, Sampling())
        vision_tower = build_tower(settings)
        language_model = load_language_model(settings.llm, vocab_size=len(processor.tokenizer), dtype=dtype)
        ids = dict(zip(ADDED_TOKENS, processor.tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS)), strict=True))
        config = ValleyConfig(
            vision_config=vision_tower.config,
            text_config=language_model.config,
            temporal=settings.temporal,
            placement=settings.placement,
            image_start_token_id=ids["<im_start>"],
            image_patch_token_id=ids["<im_patch>"],
            image_end_token_id=ids["<im_end>"],
            video_start_token_id=ids["<vi_start>"],
            video_frame_token_id=ids["<vi_frame>"],
            video_end_token_id=ids["<vi_end>"],
            dtype=dtype,
        )
        model = ValleyForConditionalGeneration(config, language_model, vision_tower)
        # Drawn by itself, like the tower: models that differ in their temporal module alone start alike.
        torch.manual_seed(seed)
        model.projector.reset_parameters()
        for parameter in model.parameters():  # not the buffers: rotary frequencies do not survive bf16
            parameter.data = parameter.data.to(dtype)
        _start_added_tokens(model, len(processor.tokenizer))
    model.generation_config = generation_config(processor)
    model.eval()  # type: ignore[no-untyped-call]  # transformers
    return model


def build_tower(settings: ModelSettings) -> VisionTower:
    """Builds the tower of a model of these settings by itself, with the weights that it has there, in fp32.

    Args:
        settings: of the model.

    Raises:
        ModelError: it is unknown, cannot be loaded or does not fit.
    """
    if settings.path is not None:
        try:
            return _saved_tower(settings.path)
        except (*UNREADABLE, ModelError) as error:
            raise ModelError(f"model.path: no tower can be loaded from {settings.path}: {error}") from error
    config = vision_config(settings.vision)
    with torch.random.fork_rng():
        torch.manual_seed(settings.vision.seed)
        tower = VisionTower(config)
    load_pretrained(tower, config)
    for module in tower.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]  # else Hugging Face draws its weights anew
    return tower


def _saved_tower(path: str) -> VisionTower:
    """Reads a saved model's tower and leaves its language model, which may be a hundred times larger, where it is."""
    folder = saved_folder(path)
    if not Path(folder).is_dir():
        return load_saved(path, dtype=torch.float32).vision_tower
    config: Any = ValleyConfig.from_pretrained(folder)
    tower, prefix = VisionTower(config.vision_config), "vision_tower."
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            weights |= {
                name.removeprefix(prefix): opened.get_tensor(name).float()
                for name in opened.keys()  # noqa: SIM118 - not a dict
                if name.startswith(prefix)
            }
    tower.load_state_dict(weights)
    return tower


def generation_config(processor: ValleyProcessor) -> GenerationConfig:
    """Returns when a model of this processor stops, what it pads with, and that it never writes the added tokens."""
    return GenerationConfig(
        eos_token_id=processor.stop_token_ids,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        suppress_tokens=processor.tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS)),
    )


def load_language_model(settings: LLMSettings, *, vocab_size: int, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a causal language model by hub name, folder or GGUF file, or builds one with random weights.

    Args:
        settings: which.
        vocab_size: tokens that one built in code must know.
        dtype: of the weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attention}
    gguf = {"gguf_file": settings.gguf_file} if settings.gguf_file else {}
    try:
        if settings.name in LLMS:
            return _random_language_model(miniature_llm_config(settings.name, vocab_size), options)
        if settings.random_weights:
            logger.warning("THE LANGUAGE MODEL %s IS RANDOM, as asked for.", settings.name)
            return _random_language_model(AutoConfig.from_pretrained(settings.name, **gguf), options)
        model: PreTrainedModel = _load_whole(AutoModelForCausalLM, settings.name, **options, **gguf)
        if gguf:
            # A model from a GGUF file refuses to be saved, though its weights are plain numbers by now.
            config = _without_quantization(model.config)
            model = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), **options)
        return model
    except UNREADABLE as error:
        raise ModelError(f"model.llm.name: no language model can be loaded from {settings.name!r}: {error}") from error


def _random_language_model(config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(_without_quantization(config), **options)
    return model


def _without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_saved(path: str, **options: Any) -> ValleyForConditionalGeneration:
    """Loads a saved model, whole.

    Args:
        path: its folder, a run folder, or a name on a hub.
        options: of Hugging Face's `from_pretrained`.

    Raises:
        ModelError: there is none, it cannot be read, or weights are missing.
    """
    folder = saved_folder(path)
    try:
        model: ValleyForConditionalGeneration = _load_whole(ValleyForConditionalGeneration, folder, **options)
    except UNREADABLE as error:
        raise ModelError(f"no Valley model can be loaded from {folder}: {error}") from error
    return model


def _load_whole(cls: Any, path: str, **options: Any) -> Any:
    """Loads a model and accepts no weight that the checkpoint lacks: Hugging Face would draw it at random."""
    model, report = cls.from_pretrained(path, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:5])}{', …' if missing[5:] else ''}")
    return model


@torch.no_grad()
def _start_added_tokens(model: ValleyForConditionalGeneration, num_tokens: int) -> None:
    """Gives every token of the tokenizer its rows, the new ones at the mean of the vocabulary."""
    added = model.config.added_token_ids
    num_rows = model.config.text_config.vocab_size
    num_old = min(*added, num_rows)
    if num_tokens > num_rows:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    for rows in (embedding.weight, head.weight, getattr(head, "bias", None)):
        if rows is not None:
            rows[num_old:num_tokens] = rows[:num_old].float().mean(0).to(rows.dtype)
    # Through the embedding, not out of its weight: some backbones scale what they look up.
    model.added_tokens.weight.copy_(embedding(torch.tensor(added, device=embedding.weight.device)))
