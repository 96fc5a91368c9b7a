"""Valley: a video, and a language model that talks about it (paper 4.1).

    frames -> vision tower -> temporal module -> projector -> visual tokens among the text's -> language model

Letters in shapes: B rows, L tokens, M media, F frames of all media, P patches a frame, N = 1 + P tokens a frame, D
width of the tower, H width of the language model, V visual tokens of all media.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from valley.model.configuration import ValleyConfig
from valley.model.loss import supervised_loss
from valley.model.splice import frame_places, join_clips, pad_clips, repeat_rows
from valley.model.temporal import TEMPORAL
from valley.model.vision import Standardisation, VisionTower

PARTS = {
    "vision": "vision_tower",
    "temporal": "temporal",
    "projector": "projector",
    "added_tokens": "added_tokens",
    "llm": "language_model",
    "lora": "language_model",
}
"""What the settings call the parts of a model -> their modules. `llm` is what the language model has by itself."""
LORA_MARK = ".lora_"
"""In the name of every weight of a low-rank update (`valley.model.lora`)."""


class ValleyForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A language model that sees videos and images.

    The six added tokens have embeddings of their own, `added_tokens`, which stand in place of the rows that the
    language model has for them; so they can train while it is frozen, and are saved under their own name. The language
    model's rows only keep ids within bounds: the six are never targets, and generation suppresses them.

    Differs from the paper: only with `placement="after_projector"`, which is what its authors' published code does.

    Args:
        config: what to build.
        language_model: a language model that is loaded already; None: one with random weights.
        vision_tower: likewise a tower.
    """

    config: ValleyConfig
    config_class = ValleyConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "video", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(
        self,
        config: ValleyConfig,
        language_model: PreTrainedModel | None = None,
        vision_tower: VisionTower | None = None,
    ) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        tower = config.vision_config
        text_width: Any = language_model.get_input_embeddings().embedding_dim  # a few backbones are wider behind it
        width = tower.hidden_size if config.placement == "before_projector" else text_width
        self.vision_tower = vision_tower or VisionTower(tower)
        self.standardisation = Standardisation(tower.hidden_size)
        self.temporal = TEMPORAL[config.temporal](dim=width, num_patches=tower.num_patches)
        self.projector = nn.Linear(tower.hidden_size, text_width)
        self.added_tokens = nn.Embedding(len(config.added_token_ids), text_width)
        self.language_model = language_model
        self.post_init()  # type: ignore[no-untyped-call]  # transformers
        self.generation_config.suppress_tokens = config.added_token_ids

    # What Hugging Face asks of a model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a saved model. Loading lets every weight train, the tower's too, so the tower is frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info`
        model.vision_tower.requires_grad_(False)
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the language model's output layer."""
        head: nn.Module | None = self.language_model.get_output_embeddings()
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the language model's output layer."""
        self.language_model.set_output_embeddings(new_embeddings)

    def _init_weights(self, module: nn.Module) -> None:
        """Lets every module start as its author meant; Hugging Face's normal(0, 0.02) would saturate v2's softmax."""
        for start in ("init_non_persistent_buffers", "reset_parameters", "_reset_parameters"):
            if hasattr(module, start):
                getattr(module, start)()
                return

    # Training

    def module_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """Returns the parameters of one of `PARTS` by their full names; v1 has none, nor a model without an update.

        Raises:
            ValueError: there is no such part.
        """
        if part not in PARTS:
            raise ValueError(f"no part is called {part!r}; known: {', '.join(PARTS)}")
        module = PARTS[part]
        parameters = {f"{module}.{name}": value for name, value in self.get_submodule(module).named_parameters()}
        return {name: value for name, value in parameters.items() if (LORA_MARK in name) == (part == "lora")}

    # From frames to visual tokens

    def encode_frames(
        self, pixel_values: UInt8[Tensor, "F S S 3"] | Float[Tensor, "F 3 S S"]
    ) -> Float[Tensor, "F N D"]:
        """Returns the tower's tokens of each frame, the global one first; the same for ever, as the tower never trains.

        Args:
            pixel_values: uint8 frames, or float frames that are normalised already.
        """
        tokens: Tensor = self.vision_tower(pixel_values)
        return tokens

    def merge_frames(self, frame_tokens: Float[Tensor, "F N D"], num_frames: Int[Tensor, " M"]) -> Float[Tensor, "V H"]:
        """Turns the frames' tokens into the visual tokens of each medium, in reading order (paper 4.1).

        Args:
            frame_tokens: what `encode_frames` returned, the frames of one medium after those of another.
            num_frames: frames T of each medium.

        Returns:
            `[V_hat (P tokens); CLS of frame 1; …; CLS of frame T]` of each medium, at the language model's width.
        """
        tokens = self.standardisation(frame_tokens.to(self.projector.weight.dtype))
        before = self.config.placement == "before_projector"
        if not before:
            tokens = self.projector(tokens)
        clips, frame_mask = pad_clips(tokens[:, 1:], num_frames)
        joined = join_clips(self.temporal(clips, frame_mask), tokens[:, 0], num_frames)
        return self.projector(joined) if before else joined

    def visual_features(
        self, pixel_values: UInt8[Tensor, "F S S 3"] | Float[Tensor, "F 3 S S"], num_frames: Int[Tensor, " M"]
    ) -> Float[Tensor, "V H"]:
        """Returns the visual tokens of each medium: `merge_frames` of `encode_frames`."""
        return self.merge_frames(self.encode_frames(pixel_values), num_frames)

    # Forward

    @can_return_tuple  # type: ignore[untyped-decorator]  # transformers
    def forward(
        self,
        input_ids: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "B L H"] | None = None,
        pixel_values: UInt8[Tensor, "F S S 3"] | Float[Tensor, "F 3 S S"] | None = None,
        num_frames: Int[Tensor, " M"] | None = None,
        frame_tokens: Float[Tensor, "F N D"] | None = None,
        labels: Int[Tensor, "B L"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = False,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Returns the loss, or the logits, of a prompt with visual tokens in it.

        Args:
            input_ids: the prompt, with the places of its visual tokens.
            attention_mask: 0 for padding.
            position_ids: as the language model takes them.
            past_key_values: the cache of an earlier call.
            inputs_embeds: embeddings instead of ids; takes no media.
            pixel_values: the frames of all media in reading order, uint8, or float and normalised already.
            num_frames: frames T of each medium.
            frame_tokens: what `encode_frames` returned, instead of `pixel_values`.
            labels: token ids, -100 where nothing is to be learned; not shifted.
            num_items_in_batch: what the sum of token losses is divided by; None: the supervised tokens here.
            return_logits: with labels, also return the logits of every position.
            logits_to_keep: without labels, the positions whose logits are returned, as in Hugging Face; 0: all.
            use_cache: whether to return a cache; never with labels.
            kwargs: what else the language model takes.

        Returns:
            With labels `loss`, and `logits` only if `return_logits`; without, what the language model returns.

        Raises:
            ValueError: the places in the prompt do not fit the media.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        has_media = pixel_values is not None or frame_tokens is not None
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, pixel_values, num_frames, frame_tokens)
            if labels is not None and not has_media:
                inputs_embeds = inputs_embeds + self._touch_visual_parameters(inputs_embeds)
        elif has_media:
            raise ValueError("media need input_ids: their places cannot be found in inputs_embeds")
        inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if labels is None:
            outputs: ModelOutput = self.language_model(use_cache=use_cache, logits_to_keep=logits_to_keep, **inputs)
            return outputs
        return supervised_loss(self.language_model, labels, num_items_in_batch, return_logits=return_logits, **inputs)

    def embed_prompt(self, input_ids: Int[Tensor, " L"], visual: Float[Tensor, "V H"]) -> Float[Tensor, "L H"]:
        """Returns the embeddings of one prompt whose visual tokens are known already: what a server keeps of a clip.

        Args:
            input_ids: the prompt, with the places of its visual tokens.
            visual: what `visual_features` returned for its media, in reading order; empty without media.

        Raises:
            ValueError: the prompt has another number of places.
        """
        embeds = self._embed_tokens(input_ids)
        places = (input_ids == self.config.image_patch_token_id) | (input_ids == self.config.video_frame_token_id)
        if int(places.sum()) != len(visual):
            raise ValueError(f"{len(visual)} visual tokens for {int(places.sum())} places in the prompt")
        return embeds.masked_scatter(places[:, None], visual.to(embeds.dtype))

    def _embed_tokens(self, input_ids: Int[Tensor, "*B"]) -> Float[Tensor, "*B H"]:
        """Returns the embeddings of tokens, the added ones' from `added_tokens`."""
        is_added = input_ids[..., None] == torch.tensor(self.config.added_token_ids, device=input_ids.device)
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        added = self.added_tokens(is_added.int().argmax(-1)).to(embeds.dtype)
        return torch.where(is_added.any(-1, keepdim=True), added, embeds)

    def _embed(
        self,
        input_ids: Int[Tensor, "B L"],
        pixel_values: Tensor | None,
        num_frames: Int[Tensor, " M"] | None,
        frame_tokens: Float[Tensor, "F N D"] | None,
    ) -> Float[Tensor, "B L H"]:
        """Returns the embeddings of a prompt with its visual tokens in their places."""
        embeds = self._embed_tokens(input_ids)
        frames = pixel_values if frame_tokens is None else frame_tokens
        # A step of generation asks nothing of the device here: its one token is never a place, those are suppressed.
        if frames is None and input_ids.shape[1] == 1:
            return embeds
        places = self._find_places(input_ids, frames, num_frames)
        if frames is None or num_frames is None:
            return embeds
        tokens = self.encode_frames(frames) if frame_tokens is None else frame_tokens
        visual = self.merge_frames(tokens, num_frames)
        return embeds.masked_scatter(places[..., None], visual.to(embeds.dtype))

    def _find_places(
        self, input_ids: Int[Tensor, "B L"], frames: Tensor | None, num_frames: Int[Tensor, " M"] | None
    ) -> Bool[Tensor, "B L"]:
        """Returns where the visual tokens of these media go.

        Raises:
            ValueError: the prompt has other places than they need.
        """
        is_patch = input_ids == self.config.image_patch_token_id
        is_frame = input_ids == self.config.video_frame_token_id
        places = is_patch | is_frame
        if frames is None:
            if bool(places.any()):
                raise ValueError(
                    f"the prompt has {int(places.sum())} places for visual tokens, but no media came with it"
                )
            return places
        if num_frames is None:
            raise ValueError("media need num_frames, the frames of each medium")
        counts, num_patches = num_frames.tolist(), self.config.vision_config.num_patches
        if min(counts, default=0) < 1 or sum(counts) != len(frames):
            raise ValueError(f"media of {counts} frames do not make up the {len(frames)} frames that came")
        if not torch.equal(is_frame[places], frame_places(num_frames, num_patches)):
            raise ValueError(
                f"{len(counts)} media of {counts} frames need {len(counts) * num_patches} places for patches and "
                f"{sum(counts)} for frames, medium by medium; the prompt has {int(is_patch.sum())} and "
                f"{int(is_frame.sum())}"
            )
        return places

    def _touch_visual_parameters(self, embeds: Float[Tensor, "B L H"]) -> Float[Tensor, ""]:
        """Returns 0 with a zero gradient for every visual parameter, by way of one blank frame.

        Ranks reduce gradients together: a rank whose batch has no media must not leave parameters out, or ZeRO-2 stops
        in a mismatched collective. ZeRO-3 gathers weights as modules run, so they run here, and where they do with
        media: before the language model.
        """
        size_px = self.config.vision_config.size_px
        blank = torch.zeros(1, size_px, size_px, 3, dtype=torch.uint8, device=embeds.device)
        visual = self.visual_features(blank, torch.ones(1, dtype=torch.long, device=blank.device))
        return 0 * visual.sum().to(embeds.dtype)

    # Generation

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Hands the media over with the prompt only; after it they are in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]  # a protocol
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            for name in ("pixel_values", "num_frames", "frame_tokens"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Copies each row `expand_size` times with its media; the tower still sees every frame once."""
        media: dict[str, Any] = {
            name: kwargs.pop(name, None) for name in ("pixel_values", "frame_tokens", "num_frames")
        }
        if expand_size > 1 and input_ids is not None and media["num_frames"] is not None:
            if media["frame_tokens"] is None:
                media["frame_tokens"] = self.encode_frames(media.pop("pixel_values"))
            self._find_places(input_ids, media["frame_tokens"], media["num_frames"])
            num_patches = self.config.vision_config.num_patches
            clips = (input_ids == self.config.image_patch_token_id).sum(1) // num_patches
            frames = (input_ids == self.config.video_frame_token_id).sum(1)
            media["frame_tokens"] = repeat_rows(media["frame_tokens"], frames, expand_size)
            media["num_frames"] = repeat_rows(media["num_frames"], clips, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]  # a protocol
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, kwargs | media
