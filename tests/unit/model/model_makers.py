"""A model small enough to be run by the hundred, and prompts for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from valley.model.configuration import ValleyConfig, ValleyVisionConfig
from valley.model.modeling import ValleyForConditionalGeneration

VOCABULARY = 80
IM_START, IM_PATCH, IM_END, VI_START, VI_FRAME, VI_END = range(70, 76)
PAD, EOS = 0, 1
PATCHES, SIZE_PX = 4, 28
TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE_PX, "patch_size": 14, "width": 32, "head_width": 8, "layers": 3},
}


def llama(**changes: Any) -> LlamaConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=EOS, **shape | changes)


def neox() -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )


def make_config(temporal: str = "v1", text: PreTrainedConfig | None = None, **changes: Any) -> ValleyConfig:
    tower = ValleyVisionConfig(tower=TOWER, hidden_size=32, num_patches=PATCHES, size_px=SIZE_PX)
    ids = {
        "image_start_token_id": IM_START,
        "image_patch_token_id": IM_PATCH,
        "image_end_token_id": IM_END,
        "video_start_token_id": VI_START,
        "video_frame_token_id": VI_FRAME,
        "video_end_token_id": VI_END,
    }
    return ValleyConfig(vision_config=tower, text_config=text or llama(), temporal=temporal, **ids | changes)


def make_model(temporal: str = "v1", text: PreTrainedConfig | None = None, **changes: Any) -> Any:
    """A model with weights large enough for its answers to depend on everything it is given."""
    torch.manual_seed(0)
    model = ValleyForConditionalGeneration(make_config(temporal, text, **changes))
    with torch.no_grad():
        for name in ("projector", "added_tokens", "language_model"):
            for parameter in model.get_submodule(name).parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    model.generation_config.pad_token_id = PAD
    return model.eval()


def place(num_frames: int) -> list[int]:
    """The tokens that stand for a clip."""
    return [IM_START, *[IM_PATCH] * PATCHES, IM_END, VI_START, *[VI_FRAME] * num_frames, VI_END]


def frames(num_frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, SIZE_PX, SIZE_PX, 3), generator=generator, dtype=torch.uint8)


def batch_of(*prompts: Sequence[int], left: bool = False) -> dict[str, Tensor]:
    """Prompts padded to one length, on the right unless `left`."""
    length = max(map(len, prompts))
    rows = [[PAD] * (length - len(prompt)) for prompt in prompts]
    ids = [[*pad, *prompt] if left else [*prompt, *pad] for pad, prompt in zip(rows, prompts, strict=True)]
    ones = [[1] * len(prompt) for prompt in prompts]
    mask = [[*pad, *one] if left else [*one, *pad] for pad, one in zip(rows, ones, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def media_of(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """One clip for each length, all different."""
    clips = [frames(length, seed=seed + 100 * index) for index, length in enumerate(lengths)]
    return {"pixel_values": torch.cat(clips), "num_frames": torch.tensor(lengths)}
