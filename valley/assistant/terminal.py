"""A conversation in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from valley.assistant.answering import Media, look, stream
from valley.assistant.loading import Assistant
from valley.model.conversation import Message


def talk(
    assistant: Assistant, media: Media, ask: Callable[[], str], write: Callable[[str], object], **options: Any
) -> list[Message]:
    """Asks for questions and writes the answers as they come, until there are no more questions.

    An interrupt (Ctrl-C) ends an answer, of which the model then remembers what it said, or drops a question that is
    being typed.

    Args:
        assistant: who answers.
        media: what the conversation is about; read once.
        ask: returns the next question; EOFError (Ctrl-D) ends the conversation.
        write: takes pieces of text.
        options: further arguments of `stream`.

    Returns:
        All that was said.

    Raises:
        MediaError: a file cannot be used.
    """
    clips = look(assistant, media)
    history: list[Message] = []
    while True:
        try:
            question = ask()
        except EOFError:
            write("\n")
            return history
        except KeyboardInterrupt:
            write("\n")
            continue
        if not question.strip():
            continue
        answer = ""
        try:
            for piece in stream(assistant, clips, question, history=history, **options):
                answer += piece
                write(piece)
        except KeyboardInterrupt:
            write(" …")
        write("\n")
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
