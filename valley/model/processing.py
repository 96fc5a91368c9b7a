"""The processor: chat messages and clips in, model inputs out. The same object in training, evaluation and serving."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from valley.errors import ModelError, RecordError
from valley.media.sampling import Sampling
from valley.model.conversation import (
    MEDIA,
    SUPERVISED,
    Message,
    RenderedPrompt,
    Segment,
    carried_frames,
    read_prompt,
    render,
)
from valley.model.saved import saved_folder
from valley.model.settings import ModelSettings
from valley.model.templates import SYSTEM, find_template
from valley.model.tokenizer import SegmentTokenizer, load_tokenizer
from valley.model.video_processing import Framing, ValleyVideoProcessor, order_clips
from valley.model.vision import vision_config

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is not supervised."""

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


class Encoded(NamedTuple):
    """One sample as token ids.

    Attributes:
        input_ids: the prompt and its answers.
        labels: the same ids where they are supervised, else -100; not shifted.
        cut_tokens: how many tokens were cut off at the end.
    """

    input_ids: Int64[np.ndarray, " L"]
    labels: Int64[np.ndarray, " L"]
    cut_tokens: int


class ValleyProcessor(ProcessorMixin):
    """Renders chat messages, tokenises them with their media's places, and brings frames to the tower's size.

    Saved with the checkpoint, it holds all that training and serving must agree on.

    Args:
        tokenizer: one that `valley.model.tokenizer.prepare_tokenizer` made ready.
        video_processor: size and normalisation of the frames.
        template: a name in `TEMPLATES`.
        system: the system message of a conversation that brings none; None: the default, empty: none at all.
        num_patches: patch tokens P of one video or image.
        sampling: which frames of a clip the model was trained on.
        source_sampling: where that differed, by the name of the data source.
        stop_strings: what ends an answer besides `stop_token_ids`, for weights that never learned to write EOS.
        chat_template: what a saved folder holds; only compared with the template's own.

    Raises:
        ModelError: no such template, or a tokenizer that does not suit it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        video_processor: ValleyVideoProcessor,
        template: str = "valley",
        system: str | None = None,
        num_patches: int = 256,
        sampling: Sampling | Mapping[str, Any] | None = None,
        source_sampling: Mapping[str, Sampling | Mapping[str, Any]] | None = None,
        stop_strings: Sequence[str] = (),
        chat_template: str | None = None,
    ) -> None:
        self.template = template
        self.system = system
        self.num_patches = num_patches
        self.sampling = Sampling.model_validate(sampling or {})
        self.source_sampling = {name: Sampling.model_validate(value) for name, value in (source_sampling or {}).items()}
        self.stop_strings = list(stop_strings)
        self._template = find_template(template)
        self._segments = SegmentTokenizer(tokenizer, self._template, num_patches)
        rendered = self._template.jinja(bos=self._segments.bos, system=self._system)
        if chat_template not in (None, rendered):
            logger.warning(
                "The saved chat template is not that of template %r here; prompts follow the latter.", template
            )
        super().__init__(tokenizer, video_processor, chat_template=rendered)  # type: ignore[no-untyped-call]  # transformers
        tokenizer.chat_template = rendered
        tokenizer.padding_side = "left"

    @property
    def size_px(self) -> int:
        """Side of the frames."""
        return int(self.video_processor.size_px)

    @property
    def framing(self) -> Framing:
        """How frames are brought to the tower's size, as `valley.media.decode.sample_clip` takes it."""
        processor: ValleyVideoProcessor = self.video_processor
        return {
            "size_px": processor.size_px,
            "interpolation": processor.interpolation,
            "resize_mode": processor.resize_mode,
        }

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer: the EOS, and the template's own mark where that is a token."""
        marks = [self.tokenizer.eos_token]
        if self._template.end in self._template.control_tokens and self._template.end not in marks:
            marks.append(self._template.end)
        ids: list[int] = self.tokenizer.convert_tokens_to_ids(marks)
        return ids

    @property
    def stopping(self) -> dict[str, Any]:
        """Further arguments of `generate` that make it stop at `stop_strings`; empty where there are none.

        They are not in the generation configuration: there, `generate` would fail whenever no tokenizer is handed over.
        """
        return {"stop_strings": self.stop_strings, "tokenizer": self.tokenizer} if self.stop_strings else {}

    @property
    def end_marks(self) -> tuple[str, ...]:
        """Texts that end an answer, where they are not special tokens."""
        return (self._template.end, *self.stop_strings)

    @property
    def _system(self) -> str:
        return SYSTEM if self.system is None else self.system

    # Training

    def encode(
        self, messages: Sequence[Message], num_frames: Sequence[int], *, max_tokens: int | None = None
    ) -> Encoded:
        """Turns one conversation into a training sample: assistant text and its end marks are supervised.

        What is longer than `max_tokens` is cut at the end of its text.

        Args:
            messages: chat messages; a `video` or `image` part for each medium.
            num_frames: frames T of each medium, in order.
            max_tokens: longest sample; None: no limit.

        Raises:
            RecordError: a role or part that has no place there; places for media that do not match `num_frames`; a cut
                that would reach visual tokens; or nothing left to learn.
        """
        try:
            segments = self._render(messages).segments
            pieces = self._segments(segments, num_frames)
        except ValueError as error:
            raise RecordError("sample", "messages", str(error)) from None
        kinds = [segment.kind for segment in segments]
        supervised = np.repeat([kind in SUPERVISED for kind in kinds], [len(piece) for piece in pieces])
        input_ids = np.array([token for piece in pieces for token in piece], dtype=np.int64)
        cut_tokens = 0 if max_tokens is None else max(0, len(input_ids) - max_tokens)
        if cut_tokens:
            ends = np.cumsum([len(piece) for piece in pieces])
            visual_end = max((int(end) for kind, end in zip(kinds, ends, strict=True) if kind in MEDIA), default=0)
            if visual_end > len(input_ids) - cut_tokens:
                reason = f"visual tokens reach position {visual_end}, past the limit of {max_tokens} tokens"
                raise RecordError("sample", "messages", reason)
            input_ids, supervised = input_ids[:max_tokens], supervised[:max_tokens]
        if not supervised.any():
            where = f" within the limit of {max_tokens} tokens" if cut_tokens else ""
            raise RecordError("sample", "messages", f"no token of an answer{where}")
        return Encoded(input_ids, np.where(supervised, input_ids, IGNORED), cut_tokens)

    def encode_prompt(self, messages: Sequence[Message], num_frames: Sequence[int]) -> Int64[np.ndarray, " L"]:
        """Turns a conversation into the prompt of its next answer, without its frames.

        Args:
            messages: chat messages; a `video` or `image` part for each medium.
            num_frames: frames T of each medium, in order.

        Raises:
            ValueError: a role or part that has no place there, or places for media that do not match `num_frames`.
        """
        segments = self._render(messages, add_generation_prompt=True).segments
        return np.array([token for piece in self._segments(segments, num_frames) for token in piece], dtype=np.int64)

    def count_tokens(self, messages: Sequence[Message], num_frames: Sequence[int]) -> int:
        """Returns the length of the sample that `encode` makes without a limit.

        Raises:
            ValueError: a role or part that has no place there, or places for media that do not match `num_frames`.
        """
        return sum(map(len, self._segments(self._render(messages).segments, num_frames)))

    def mask_sample(self, encoded: Encoded, *, colour: bool | None = None) -> str:
        """Returns a sample as text in which what is supervised stands out: green, or in double brackets.

        Args:
            encoded: the sample.
            colour: None: where standard output is a terminal.
        """
        before, after = (_GREEN, _PLAIN) if (sys.stdout.isatty() if colour is None else colour) else ("[[", "]]")
        text = ""
        for supervised, group in groupby(
            zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True), _learned
        ):
            stretch = self.tokenizer.decode([token for token, _ in group])
            text += f"{before}{stretch}{after}" if supervised else stretch
        return re.sub(r"(<im_patch>|<vi_frame>)\1+", lambda run: f"{run[1]}*{len(run[0]) // len(run[1])}", text)

    # Hugging Face

    def apply_chat_template(  # type: ignore[override]  # what is not listed here is passed on by keyword
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        videos: Any = None,
        images: Any = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders a conversation, or several, and tokenises them if asked to.

        What a message says stays text whatever it holds; only its `video` and `image` parts become media.

        Args:
            conversation: chat messages, or a list of such lists.
            chat_template: another Jinja template. It is then rendered as Hugging Face does it, to an ordinary string,
                without that guarantee; so it is with any argument of theirs that is not listed here.
            add_generation_prompt: open the answer that is to be generated.
            tokenize: return model inputs, not text. Frames are taken from the parts (`{"type": "video", "video": …}`),
                else from `videos` and `images`.
            return_dict: with `tokenize`, return all model inputs, not the ids alone.
            return_tensors: as in `__call__`.
            return_assistant_tokens_mask: as in `__call__`.
            videos: as in `__call__`.
            images: as in `__call__`.
            processor_kwargs: further arguments of `__call__`.
            kwargs: further arguments of Hugging Face.

        Returns:
            A `RenderedPrompt` for each conversation; with `tokenize`, what `__call__` returns.

        Raises:
            ValueError: as `__call__`, or a role or part that has no place there.
        """
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations: Any = conversation if is_batch else [conversation]
        if chat_template is not None or any(kwargs.values()):
            prompts: Any = super().apply_chat_template(
                [list(messages) for messages in conversations],
                chat_template,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
        else:
            prompts = [self._render(messages, add_generation_prompt) for messages in conversations]
        if not tokenize:
            return prompts if is_batch else prompts[0]
        inputs = self(
            text=prompts,
            videos=list(carried_frames(conversations, "video")) or videos,
            images=list(carried_frames(conversations, "image")) or images,
            return_tensors=return_tensors,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **processor_kwargs or {},
        )
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: None = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: Literal["left", "right"] = "left",
        return_assistant_tokens_mask: bool = False,
    ) -> BatchFeature:
        """Makes model inputs from prompts and their media.

        Args:
            images: a picture (PIL, or uint8 `[H, W, 3]`) for each `<image>`, in order.
            text: prompts. One that `apply_chat_template` rendered keeps text and control apart; in any other string
                each special token is control and each `<video>` and `<image>` a medium.
            videos: sampled frames (uint8 `[T, H, W, 3]`, or a list of pictures) for each `<video>`, in order.
            audio: nothing; Hugging Face's pipelines name it.
            return_tensors: `pt` or `np`; None: ids as lists.
            padding: pad the prompts to the longest.
            padding_side: left for generation; right for training.
            return_assistant_tokens_mask: add `assistant_masks`, 1 where a token is supervised.

        Returns:
            `input_ids` and `attention_mask` `[B, L]`; with media `pixel_values`, uint8 `[F, S, S, 3]`, and `num_frames`
            `[M]`, media in the order of rows and of their places in them.

        Raises:
            ValueError: no text; more or fewer media than places for them; something that is not a clip; or a mask asked
                of a prompt that `apply_chat_template` did not render.
        """
        if text is None:
            raise ValueError("no text given")
        texts = [text] if isinstance(text, str) else list(text)
        if return_assistant_tokens_mask and not all(isinstance(prompt, RenderedPrompt) for prompt in texts):
            raise ValueError("only a prompt that apply_chat_template rendered tells whose text is whose")
        prompts = [self._read(prompt) for prompt in texts]
        kinds = [segment.kind for prompt in prompts for segment in prompt.segments if segment.kind in MEDIA]
        clips = order_clips(kinds, videos=videos, images=images)
        pictures = self.video_processor(clips, return_tensors="np") if clips else {}
        num_frames = iter(pictures["num_frames"].tolist() if clips else ())
        rows, masks = [], []
        for prompt in prompts:
            pieces = self._segments(prompt.segments, [next(num_frames) for s in prompt.segments if s.kind in MEDIA])
            rows.append([token for piece in pieces for token in piece])
            learned = [int(segment.kind in SUPERVISED) for segment in prompt.segments]
            masks.append([flag for flag, piece in zip(learned, pieces, strict=True) for _ in piece])
        width = max(map(len, rows)) if padding else 0

        def pad(row: list[int], value: int) -> list[int]:
            filling = [value] * (width - len(row))
            return filling + row if padding_side == "left" else row + filling

        data: dict[str, Any] = {
            "input_ids": [pad(row, self.tokenizer.pad_token_id) for row in rows],
            "attention_mask": [pad([1] * len(row), 0) for row in rows],
        }
        if return_assistant_tokens_mask:
            data["assistant_masks"] = [pad(mask, 0) for mask in masks]
        return BatchFeature(data | dict(pictures), tensor_type=return_tensors)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Returns generated answers as text, without the template's end mark."""
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.removesuffix(self._template.end).removeprefix(self._template.glue) for text in texts]

    def to_dict(self) -> dict[str, Any]:
        """Returns what is saved besides the tokenizer and the chat template."""
        return {
            "processor_class": type(self).__name__,
            "template": self.template,
            "system": self.system,
            "num_patches": self.num_patches,
            "sampling": self.sampling.model_dump(mode="json"),
            "source_sampling": {name: value.model_dump(mode="json") for name, value in self.source_sampling.items()},
            "stop_strings": self.stop_strings,
            "video_processor": self.video_processor.to_dict(),
        }

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Builds a processor from its parts and what `to_dict` saved; part of `from_pretrained`.

        The base class reads the constructor's names from its code object, where a decorator hides them.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        given = {**processor_dict, **kwargs}
        known = inspect.signature(cls).parameters.keys() - {"tokenizer", "video_processor"}
        processor = cls(*args, **{name: given[name] for name in known & given.keys()})
        unused = {name: value for name, value in given.items() if name not in known}
        return (processor, unused) if return_unused else processor

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> RenderedPrompt:
        return render(
            messages,
            self._template,
            system=self._system,
            bos=self._segments.bos,
            eos=self.tokenizer.eos_token,
            add_generation_prompt=add_generation_prompt,
        )

    def _read(self, text: str) -> RenderedPrompt:
        prompt = read_prompt(text)
        if prompt is text or prompt.startswith(self._segments.bos):
            return prompt
        return RenderedPrompt([Segment("control", self._segments.bos), *prompt.segments])


def build_processor(settings: ModelSettings, sampling: Sampling) -> ValleyProcessor:
    """Builds the processor of a new model, or loads a saved one and gives it `sampling`; loads no weights.

    Raises:
        ModelError: an unknown template or tower, or a tokenizer that cannot be loaded or does not suit the template.
    """
    if settings.path is not None:
        try:
            processor = load_saved_processor(settings.path)
        except ModelError as error:
            raise ModelError(f"model.path: {error}") from error
        processor.sampling = sampling
        return processor
    tower = vision_config(settings.vision)
    return ValleyProcessor(
        load_tokenizer(settings.llm, find_template(settings.template)),
        ValleyVideoProcessor(
            tower.size_px,
            tower.mean,
            tower.std,
            tower.interpolation,
            tower.resize_mode,
        ),
        template=settings.template,
        system=settings.system,
        num_patches=tower.num_patches,
        sampling=sampling,
    )


def load_saved_processor(path: str) -> ValleyProcessor:
    """Loads a saved processor.

    Args:
        path: the folder of its model, a run folder, or a name on a hub.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    folder = saved_folder(path)
    try:
        processor: ValleyProcessor = ValleyProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"no processor can be loaded from {folder}: {error}") from error
    return processor


def _learned(pair: tuple[int, int]) -> bool:
    return pair[1] != IGNORED
