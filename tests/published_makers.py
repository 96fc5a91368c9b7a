"""Tiny folders in the layout of the original Valley code, and what such a model computes, in straight lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from valley.model.tokenizer import tiny_tokenizer

SIZE_PX, PATCHES, WIDTH, TEXT_WIDTH, BLOCKS = 28, 4, 32, 64, 3
TABLE_ROWS = 2048
PUBLISHED_ORDER = ("<im_patch>", "<vi_frame>", "<im_start>", "<im_end>", "<vi_start>", "<vi_end>")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FLAGS = {"v1": {}, "v2": {"use_patch_importance_pooling": True}, "v3": {"use_delta_transformer": True}}


@dataclass
class Published:
    """A model of the original code, as its parts."""

    version: str
    clip: CLIPVisionModel
    llm: LlamaForCausalLM
    projector: nn.Linear
    tokenizer: PreTrainedTokenizerFast
    pooling: nn.Linear | None = None
    encoder: nn.TransformerEncoder | None = None
    table: Tensor | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def visual_tensors(self) -> dict[str, Tensor]:
        """The projector and the temporal module by their published names."""
        named = prefixed("model.mm_projector.", self.projector)
        if self.pooling is not None:
            named |= prefixed("model.pooling_layer.", self.pooling)
        if self.encoder is not None and self.table is not None:
            named |= prefixed("model.transformer_delta_encoder.", self.encoder)
            named |= prefixed("model.transforemr_adding_layer.", encoder_layer())  # copied, then left where it was
            named["model.position_matrix"] = self.table
        return named

    def tensors(self, tower: str = "model.vision_tower.vision_model.") -> dict[str, Tensor]:
        """All tensors by their published names, with the constants that libraries of that time saved."""
        named = self.llm.state_dict() | prefixed(tower, self.clip) | self.visual_tensors()
        named[f"{tower}embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
        named["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        return {name: tensor.detach().clone() for name, tensor in named.items()}


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach() for name, tensor in module.state_dict().items()}


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(TEXT_WIDTH, nhead=8, batch_first=True)


def randomise(module: nn.Module, std: float = 0.15) -> None:
    """Away from zeros and ones, so that every tensor matters; weights of norms stay about one, as in trained ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=std)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def make_llm(vocab_size: int) -> LlamaForCausalLM:
    shape = {"hidden_size": TEXT_WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, rms_norm_eps=1e-5, **shape))
    randomise(model)
    return model.eval()


def make_published(version: str, *, seed: int = 0) -> Published:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(PUBLISHED_ORDER), special_tokens=True)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    clip = CLIPVisionModel(CLIPVisionConfig(image_size=SIZE_PX, patch_size=14, **shape)).eval()
    randomise(clip)
    made = Published(version, clip, make_llm(len(tokenizer) + 2), nn.Linear(WIDTH, TEXT_WIDTH), tokenizer)
    if version == "v2":
        made.pooling = nn.Linear(TEXT_WIDTH * PATCHES, 1)
        randomise(made.pooling)
    if version == "v3":
        made.encoder = nn.TransformerEncoder(encoder_layer(), num_layers=1).eval()
        randomise(made.encoder)
        made.table = torch.randn(TABLE_ROWS, TEXT_WIDTH)  # not sines: what is stored counts
    made.config = {
        "model_type": "valley",
        "architectures": ["ValleyLlamaForCausalLM"],
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": True,
        "use_mm_proj": True,
        "use_patch_importance_pooling": False,
        "use_delta_transformer": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": -1,
        **{name: getattr(made.llm.config, name) for name in ("vocab_size", "rms_norm_eps", "num_key_value_heads")},
        **{name: getattr(made.llm.config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        "num_attention_heads": 4,
        **FLAGS[version],
    }
    return made


def write_folder(
    folder: Path, made: Published, tensors: Mapping[str, Tensor] | None = None, *, tokenizer: bool = True, **config: Any
) -> Path:
    """Writes a published folder whose tower's configuration lies in a folder beside it."""
    folder.mkdir()
    clip = folder.with_name(f"{folder.name}-clip")
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps(made.clip.config.to_dict()))
    (folder / "config.json").write_text(json.dumps(made.config | {"mm_vision_tower": str(clip)} | config))
    if tokenizer:
        made.tokenizer.save_pretrained(folder)
    save_file(dict(tensors or made.tensors()), folder / "model.safetensors")
    return folder


def write_bins(folder: Path, made: Published, tensors: Mapping[str, Tensor]) -> Path:
    """Writes a published folder in pickled shards that cut through the middle of attention layers."""
    write_folder(folder, made)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"pytorch_model-{1 + index % 2:05d}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def frames(num_frames: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, SIZE_PX, SIZE_PX, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def expected_logits(made: Published, ids: list[int], clips: list[Tensor], *, layer: int = -2) -> Tensor:
    """What the original code computes for one prompt: its `### Human: …` with the places of all clips in it."""
    embeds = made.llm.get_input_embeddings()(torch.tensor(ids))
    patch, frame = made.tokenizer.convert_tokens_to_ids(["<im_patch>", "<vi_frame>"])
    places = [index for index, token in enumerate(ids) if token in (patch, frame)]
    used = 0
    for clip in clips:
        pixels = (clip / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        states = made.clip(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[layer]
        projected = states @ made.projector.weight.T + made.projector.bias
        patches, frame_tokens = projected[:, 1:], projected[:, 0]
        merged = patches.mean(0)
        if made.pooling is not None:
            scores = patches.reshape(len(clip), -1) @ made.pooling.weight[0] + made.pooling.bias
            merged = (scores.softmax(0)[:, None, None] * patches).sum(0)
        if made.encoder is not None and made.table is not None:
            encoded = made.encoder(patches.transpose(0, 1) + made.table[: len(clip)])
            merged = merged + encoded[:, -1]
        visual = torch.cat([merged, frame_tokens])
        embeds[places[used : used + len(visual)]] = visual
        used += len(visual)
    assert used == len(places)
    return made.llm(inputs_embeds=embeds[None]).logits[0]
