"""Tokenizers: loading one, adding Valley's tokens, and turning segments into ids so that text never becomes control."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from valley.errors import ModelError
from valley.model.conversation import ADDED_TOKENS, MEDIA, PLAIN, Segment
from valley.model.miniatures import LLMS
from valley.model.settings import LLMSettings
from valley.model.templates import TEMPLATES, Template

_PADDING_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_KEPT_CONTROL = 256
_ENCODING = threading.Lock()
"""A tokenizer switches between text and control in place: two threads at once would read each other's switch."""

_WORDS = """
a an the this that these those it its they them their there here he she his her we you your i me my one two three four
five six seven eight nine ten no not none yes and or but so then than as if of in on at to from into onto out up down
left right over under above below behind beside between by with without before after first second last next again once
while during until when where what which who whose how why many much more most few some any all both each every other
another same different only also very too just now still already is are was were be been being am do does did doing done
has have had can could will would should may might must let go goes going went come comes came get gets got make makes
made take takes took see sees seen look looks show shows shown say says tell tells give gives find finds use uses know
move moves moved moving motion movement turn turns stay stays stand stands rest still stop stops start starts begin
begins end ends grow grows growing grew shrink shrinks shrinking shrank appear appears appearing appeared vanish
vanishes vanishing vanished disappear disappears change changes changing changed become becomes get bigger smaller
larger big small large long short fast slow slowly quickly high low near far upwards downwards leftwards rightwards
towards away across along around through direction side top bottom middle centre center corner edge way size colour
colours color shape shapes order time times number kind background foreground scene clip clips video videos image images
picture pictures frame frames camera object objects thing things red orange yellow green blue purple pink brown white
black grey gray dark light bright circle square triangle star cross ring dot line striped chequered dotted plain smooth
grainy cloudy pattern man woman person people child boy girl dog cat bird animal car bike bikes bicycle road street tree
trees grass sky water house room table chair phone hand hands face head eyes door window rabbit bunny animated cartoon
forest walk walks walking run runs running ride rides riding talk talks talking sit sits play plays describe detail
brief briefly short summary caption content contents happen happens happening visible question answer answers following
please human assistant intelligent understands about think because step think keep keeps for past back
contains contain sentence concisely single word words car cars city traffic wide waits
"""
"""Words of our generated scenes and of plain talk about pictures; each is one token with the space before it."""

_OPENERS = """
A An The This That There It In On At No Yes What Which Who Where When Why How Does Do Did Is Are Was Were Can First Then
One Two Three Four Left Right Up Down Both Neither Human Assistant You Valley Describe Tell Red Orange Yellow Green Blue
Purple White Black I Answer Write Sum
"""
"""Words that begin lines and sentences: one token with and without the space."""
_PIECES = "ing ed er es ly th he in an re on at en nd ti te or st ar al it is ou le ic ch sh ea ll ## ### ĊĊ"
"""Fragments of other words, and the marks of the templates."""


def load_tokenizer(settings: LLMSettings, template: Template) -> PreTrainedTokenizerBase:
    """Loads a backbone's tokenizer, or builds that of the miniatures, and makes it ready for `template`.

    Raises:
        ModelError: it cannot be loaded, has no EOS, or lacks a token that the template needs.
    """
    if settings.name in LLMS:
        tokenizer: PreTrainedTokenizerBase = tiny_tokenizer()
    else:
        gguf = {"gguf_file": settings.gguf_file} if settings.gguf_file else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(settings.name, **gguf)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"model.llm.name: no tokenizer can be loaded from {settings.name!r}: {error}") from error
    return prepare_tokenizer(tokenizer, template)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Template) -> PreTrainedTokenizerBase:
    """Adds `ADDED_TOKENS`, chooses a padding token and makes sure that text cannot spell control; changes it in place.

    Padding is what the tokenizer itself pads with; where that is its EOS or nothing, its unknown token; else a token
    of the usual names; else a new `<pad>`. A model that is taught to stop must never see its stop as padding.

    Raises:
        ModelError: no EOS, a token that the template needs is missing, or text can spell control all the same.
    """
    if tokenizer.eos_token is None:
        raise ModelError("model.llm: the tokenizer has no end-of-sequence token; answers could not end")
    known = tokenizer.get_vocab()
    if missing := [token for token in template.control_tokens if token not in known]:
        raise ModelError(f"model.template: the tokenizer lacks {', '.join(missing)}; choose another template")
    tokenizer.add_tokens([_control(token) for token in ADDED_TOKENS], special_tokens=True)
    choices = (tokenizer.pad_token, tokenizer.unk_token, *(name for name in _PADDING_NAMES if name in known), "<pad>")
    taken = {tokenizer.eos_token, tokenizer.bos_token, *template.control_tokens}
    padding = next(token for token in choices if token and token not in taken)
    tokenizer.add_special_tokens({"pad_token": padding})
    # A fine-tune may have added its marks as ordinary tokens: those are found in text, too, until they are special.
    if ordinary := _spelt_by_text(tokenizer, template):
        tokenizer.add_tokens([_control(token) for token in ordinary], special_tokens=True)
        if spelt := _spelt_by_text(tokenizer, template):
            raise ModelError(f"model.llm: with this tokenizer any text can hold the control tokens {', '.join(spelt)}")
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the small tokenizer of tests and demos: every byte, and one token for each word of `_WORDS`.

    Nothing is trained: the longest pieces win, so the vocabulary is the same everywhere and any text comes back as it
    was. It holds the control tokens of every template.
    """
    special = ["<pad>", "</s>", *dict.fromkeys(token for entry in TEMPLATES.values() for token in entry.control_tokens)]
    space = "Ġ"  # a space in the byte alphabet, as Ċ is a newline
    words = [space + word for word in _WORDS.split()]
    words += [lead + word for word in _OPENERS.split() for lead in ("", space)]
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *_PIECES.split()])
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=None, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_control(token) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


class SegmentTokenizer:
    """Turns segments into token ids, each segment by itself.

    Args:
        tokenizer: one that `prepare_tokenizer` made ready.
        template: whose control tokens no text may spell.
        num_patches: patch tokens P of one medium.

    Attributes:
        bos: what the tokenizer puts before every prompt; empty where it puts nothing.

    Raises:
        ModelError: a control token is missing, or text could spell one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, num_patches: int) -> None:
        if spelt := _spelt_by_text(tokenizer, template):
            raise ModelError(f"with this tokenizer any text can hold the control tokens {', '.join(spelt)}")
        self._tokenizer = tokenizer
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        self.bos: str = tokenizer.bos_token if adds_bos else ""
        im_start, im_patch, im_end, vi_start, vi_frame, vi_end = [_id_of(tokenizer, token) for token in ADDED_TOKENS]
        self._head = [im_start, *[im_patch] * num_patches, im_end, vi_start]
        self._frame, self._tail = vi_frame, vi_end
        # SentencePiece begins every text with a space: one too many inside a prompt.
        self._adds_space = self._encode(".a", plain=True) != [
            *self._encode(".", plain=True),
            *self._encode("a", plain=True),
        ]
        self._control: dict[str, list[int]] = {}

    def __call__(self, segments: Sequence[Segment], num_frames: Sequence[int]) -> list[list[int]]:
        """Returns the ids of each segment; a medium's are its visual tokens.

        Args:
            segments: a prompt.
            num_frames: frames T of each of its media, in order.

        Raises:
            ValueError: the prompt has another number of media than `num_frames`.
        """
        num_media = sum(segment.kind in MEDIA for segment in segments)
        if num_media != len(num_frames):
            raise ValueError(f"{num_media} places for media in the prompt, but {len(num_frames)} media given")
        frames = iter(num_frames)
        ids: list[list[int]] = []
        opening = True
        for segment in segments:
            if segment.kind in MEDIA:
                ids.append([*self._head, *[self._frame] * next(frames), self._tail])
            elif segment.kind in PLAIN:
                ids.append(self._encode_stretch(segment.text, opening, plain=True))
            else:
                ids.append(self._encode_control(segment.text, opening))
            opening = opening and segment.text == self.bos
        return ids

    def _encode_control(self, text: str, opening: bool) -> list[int]:
        """A template has few control strings, so their ids are kept; hand-written prompts must not fill the memory."""
        if opening:
            return self._encode_stretch(text, opening, plain=False)
        if text not in self._control:
            if len(self._control) >= _KEPT_CONTROL:
                self._control.clear()
            self._control[text] = self._encode_stretch(text, opening, plain=False)
        return self._control[text]

    def _encode_stretch(self, text: str, opening: bool, *, plain: bool) -> list[int]:
        """Encodes what stands inside a prompt behind a character whose tokens are then taken away."""
        if opening or not self._adds_space:
            return self._encode(text, plain=plain)
        lead = "." if text.startswith("\n") else "\n"
        return self._encode(lead + text, plain=plain)[len(self._encode(lead, plain=plain)) :]

    def _encode(self, text: str, *, plain: bool) -> list[int]:
        with _ENCODING:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
        return ids


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    """Returns the tokens that must never come out of anybody's text."""
    marks = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
    return list(dict.fromkeys([*ADDED_TOKENS, *template.control_tokens, *marks]))


def _spelt_by_text(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    return [
        token
        for token in control_tokens(tokenizer, template)
        if _id_of(tokenizer, token)
        in tokenizer.encode(f"a {token} b", add_special_tokens=False, split_special_tokens=True)
    ]


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found: Any = tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ModelError(f"the tokenizer lacks the token {token}")
    return int(found)


def _control(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)
