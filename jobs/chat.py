#!/usr/bin/env python3
"""Asks a trained model about a video or an image, in the terminal.

python jobs/chat.py --model runs/demo/finetune/model --video samples/clips/bikes.mp4 --question "What happens?"
python jobs/chat.py --model runs/demo/finetune/model --video clip.mp4

Without a question it is a conversation: Ctrl-C ends an answer, Ctrl-D the conversation. `--video` takes images too,
and may be given several times, or not at all.
"""

import argparse
import contextlib
import sys

import valley
from valley.assistant.terminal import talk
from valley.command import run_command


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a model's folder, a run folder, or a name on a hub")
    parser.add_argument("--video", action="append", metavar="FILE", help="a video or an image")
    parser.add_argument("--question", help="what to ask; without it, a conversation")
    parser.add_argument("--system", help="another system message")
    parser.add_argument("--device", help="where to compute; without it, on the GPU if there is one")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (%(default)s)")
    parser.add_argument("--seed", type=int, help="of what is drawn at a temperature above 0")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1 or not arguments.temperature >= 0:
        parser.error("expected --max-new-tokens of 1 or more and --temperature of 0 or more")
    return arguments


def write(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=True)


def main() -> None:
    """Answers the question, or talks until the user has had enough."""
    arguments = parse()
    options = {name: vars(arguments)[name] for name in ("system", "max_new_tokens", "temperature", "seed")}
    assistant = valley.load(arguments.model, device=arguments.device)
    if arguments.question is not None:
        for piece in valley.stream(assistant, arguments.video, arguments.question, **options):
            write(piece)
        write("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and editing
    talk(assistant, arguments.video, lambda: input("> "), write, **options)


if __name__ == "__main__":
    sys.exit(run_command(main))
