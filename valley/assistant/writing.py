"""From tokens to text, piece by piece: what can be told already, and where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence

from valley.model.processing import ValleyProcessor

_CONTEXT = 8
"""Tokens behind those that are decoded again, so that each is decoded as in the whole."""


class Writer:
    """The text of one answer as it comes.

    Decoded by themselves, some tokenizers' words lose the space before them, and a character may be made of several
    tokens. So each token is decoded together with those before it: with a few of them, since all of them would make
    long answers slow.

    Args:
        processor: of the model that writes.
        stops: texts that end the answer besides the template's own; they are not part of it.

    Attributes:
        text: what has been told.
        stopped: one of the ends has come; what follows is not told.
    """

    def __init__(self, processor: ValleyProcessor, stops: Sequence[str] = ()) -> None:
        self._processor = processor
        self._stops = (*processor.stop_strings, *stops)
        self._marks = (*processor.end_marks, *stops)
        self._tokens: list[int] = []
        self._start = self._mid = 0
        self._settled = ""
        self._whole = ""
        self.text = ""
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Takes further tokens; returns the text that they make certain, which may be empty."""
        if self.stopped:
            return ""
        self._tokens += tokens
        if len(self._tokens) - self._mid > 2 * _CONTEXT:
            self._move(len(self._tokens) - _CONTEXT)
        self._whole = self._settled + self._text(self._mid, len(self._tokens))
        return self._tell(_certain(self._cut(self._whole.lstrip()), self._marks))

    def end(self) -> str:
        """Returns what was held back because more might have followed."""
        whole = self._whole.removesuffix(self._processor.end_marks[0])
        return self._tell(self._cut(whole.lstrip()).strip())

    def _move(self, place: int) -> None:
        """Settles the text of the tokens before `place`, unless a character is only half told there."""
        text = self._text(self._mid, place)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not self._text(self._mid, len(self._tokens)).startswith(text):
            return
        self._settled += text
        self._start, self._mid = self._mid, place

    def _text(self, first: int, last: int) -> str:
        """The text of the tokens from `first`, which is where the settled ones end, to `last`."""
        context = self._decode(self._tokens[self._start : first])
        return self._decode(self._tokens[self._start : last])[len(context) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        decoded: str = self._processor.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded

    def _cut(self, text: str) -> str:
        """The text up to the first of the strings that stop it."""
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        return text

    def _tell(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new


def _certain(text: str, marks: Sequence[str]) -> str:
    """What later tokens cannot change: without half a character, half an end mark, or white space at the end."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    for mark in marks:
        begun = next((size for size in range(len(mark), 0, -1) if text.endswith(mark[:size])), 0)
        text = text[: len(text) - begun]
    return text.rstrip()
