"""An assistant answers what its model generates for these media and this question: whole, in pieces, in turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from training_makers import MODEL, new_model, processor

import valley
from valley.assistant.answering import look
from valley.assistant.terminal import talk
from valley.errors import DamagedMediaError, MissingMediaError, ModelError, UnsupportedMediaError
from valley.media.decode import sample_clip
from valley.media.sampling import Sampling
from valley.model.processing import build_processor

QUESTION = "What happens?"
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a clip of six seconds and a picture beside it."""
    folder = tmp_path_factory.mktemp("chat")
    new_model().save_pretrained(folder / "run" / "model")
    processor().save_pretrained(folder / "run" / "model")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint32).reshape(40, 50, 3).astype(np.uint8)).save(
        folder / "picture.png"
    )
    return folder


@pytest.fixture(scope="module")
def assistant(folder: Path) -> valley.Assistant:
    return valley.load(folder / "run" / "model", device="cpu")


def expected(assistant: valley.Assistant, messages: Sequence[dict[str, Any]], clips: Sequence[np.ndarray]) -> str:
    """The answer by plain transformers: only what comes after the prompt."""
    prompt = assistant.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = assistant.processor(text=[prompt], videos=list(clips) or None)
    generated = assistant.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    answer = generated[:, inputs["input_ids"].shape[1] :]
    return str(assistant.processor.post_process_image_text_to_text(answer)[0]).strip()


def asked(question: str, num_clips: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "video"}] * num_clips + [{"type": "text", "text": question}]}


@dataclass
class Seen:
    """What reached the model: the prompt of each answer, the frames of each, and how often it was called."""

    prompts: list[list[int]] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    calls: int = 0


@contextmanager
def watching(assistant: valley.Assistant) -> Iterator[Seen]:
    seen = Seen()

    def look_at(module: Any, args: Any, given: dict[str, Any]) -> None:
        seen.calls += 1
        if given["input_ids"].shape[1] > 1:
            seen.prompts.append(given["input_ids"][0].tolist())
            if given.get("pixel_values") is not None:
                seen.frames.append(given["pixel_values"].numpy())

    hook = assistant.model.register_forward_pre_hook(look_at, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def frames_of(path: Path) -> np.ndarray:
    return sample_clip(path, processor().sampling, **processor().framing).pixels


def test_a_path_and_its_bytes_are_answered_as_transformers_answers(assistant: valley.Assistant, folder: Path) -> None:
    clip = folder / "clip.mp4"
    answer = expected(assistant, [asked(QUESTION)], [frames_of(clip)])
    assert len(answer.split()) > 5

    with watching(assistant) as seen:
        assert valley.chat(assistant, clip, QUESTION, max_new_tokens=LENGTH) == answer
        assert valley.chat(assistant, str(clip), QUESTION, max_new_tokens=LENGTH) == answer
        assert valley.chat(assistant, clip.read_bytes(), QUESTION, max_new_tokens=LENGTH) == answer
        assert valley.chat(assistant, look(assistant, clip), QUESTION, max_new_tokens=LENGTH) == answer

    assert frames_of(clip).shape[0] == 3
    assert all(np.array_equal(frames, frames_of(clip)) for frames in seen.frames)
    assert len(seen.frames) == 4


def test_an_image_and_several_media_are_seen_in_order(assistant: valley.Assistant, folder: Path) -> None:
    clip, picture = folder / "clip.mp4", folder / "picture.png"
    with watching(assistant) as seen:
        alone = valley.chat(assistant, picture, QUESTION, max_new_tokens=LENGTH)
        both = valley.chat(assistant, [picture, clip], QUESTION, max_new_tokens=LENGTH)
        valley.chat(assistant, None, QUESTION, max_new_tokens=1)

    assert alone == expected(assistant, [asked(QUESTION)], [frames_of(picture)])
    assert both == expected(assistant, [asked(QUESTION, 2)], [frames_of(picture), frames_of(clip)])
    assert np.array_equal(seen.frames[0], frames_of(picture))
    assert np.array_equal(seen.frames[1], np.concatenate([frames_of(picture), frames_of(clip)]))
    assert len(seen.prompts) == 3
    assert len(seen.frames) == 2


def test_an_image_is_the_prompt_that_transformers_makes_of_an_image(assistant: valley.Assistant, folder: Path) -> None:
    picture = folder / "picture.png"
    with watching(assistant) as seen:
        valley.chat(assistant, picture, QUESTION, max_new_tokens=1)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = assistant.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = assistant.processor(text=[prompt], images=[Image.open(picture)])
    assert seen.prompts == [inputs["input_ids"][0].tolist()]


def test_the_media_stand_before_the_first_of_several_questions(assistant: valley.Assistant, folder: Path) -> None:
    clip, picture = folder / "clip.mp4", folder / "picture.png"
    history = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "A ball moves."},
        {"role": "user", "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": "And here?"}]},
        {"role": "assistant", "content": "No ball."},
    ]
    with watching(assistant) as seen:
        answer = valley.chat(assistant, clip, "Why?", history=history, system="Be brief.", max_new_tokens=LENGTH)

    turns = [
        {"role": "system", "content": "Be brief."},
        asked(QUESTION),
        history[1],
        asked("And here?"),
        history[3],
        {"role": "user", "content": "Why?"},
    ]
    clips = [frames_of(clip), frames_of(picture)]
    assert answer == expected(assistant, turns, clips)
    prompt = assistant.processor.apply_chat_template(turns, add_generation_prompt=True)
    assert seen.prompts == [assistant.processor(text=[prompt], videos=clips)["input_ids"][0].tolist()]
    assert history[0] == {"role": "user", "content": QUESTION}


def test_pieces_add_up_to_the_answer(assistant: valley.Assistant, folder: Path) -> None:
    clip = folder / "clip.mp4"
    pieces = list(valley.stream(assistant, clip, QUESTION, max_new_tokens=LENGTH))

    assert len(pieces) > 5
    assert "".join(pieces) == valley.chat(assistant, clip, QUESTION, max_new_tokens=LENGTH)


def test_an_answer_ends_before_its_stop_string(folder: Path) -> None:
    assistant = valley.load(folder / "run")
    whole = valley.chat(assistant, None, QUESTION, max_new_tokens=LENGTH)
    stop = whole[len(whole) // 2 :][:5]
    assistant.processor.stop_strings = [stop]

    with watching(assistant) as seen:
        pieces = list(valley.stream(assistant, None, QUESTION, max_new_tokens=LENGTH))

    assert "".join(pieces) == whole.partition(stop)[0].strip()
    assert seen.calls < LENGTH


def test_draws_follow_their_seed_and_leave_the_global_generator_alone(assistant: valley.Assistant) -> None:
    def draw(seed: int | None) -> str:
        return valley.chat(assistant, None, QUESTION, max_new_tokens=LENGTH, temperature=1.5, seed=seed)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2)
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def generating() -> bool:
    return any(thread.name == "generate" for thread in threading.enumerate())


def test_an_error_while_generating_reaches_the_caller(assistant: valley.Assistant) -> None:
    def fail(module: Any, args: Any, output: Any) -> None:
        raise RuntimeError("out of memory")

    hook = assistant.model.projector.register_forward_hook(fail)
    frames = np.zeros((2, 56, 56, 3), np.uint8)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            valley.chat(assistant, frames, QUESTION)
    finally:
        hook.remove()
    assert not generating()


def test_whoever_stops_reading_stops_the_model(assistant: valley.Assistant) -> None:
    with watching(assistant) as seen:
        pieces = valley.stream(assistant, None, QUESTION, max_new_tokens=1000)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        assert not generating()
    assert seen.calls < 1000


@pytest.mark.parametrize(
    ("medium", "error"),
    [("/no/such/clip.mp4", MissingMediaError), (b"#EXTM3U\n/etc/passwd", UnsupportedMediaError)],
)
def test_bad_media_and_numbers_are_refused_before_anything_is_generated(
    assistant: valley.Assistant, medium: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        valley.stream(assistant, medium, QUESTION)
    with pytest.raises(ValueError, match="max_new_tokens > 0"):
        valley.stream(assistant, None, QUESTION, max_new_tokens=0)
    with pytest.raises(ValueError, match="has the role 'owner'"):
        valley.stream(assistant, None, QUESTION, history=[{"role": "owner", "content": "Hi"}])


def test_a_truncated_clip_is_refused(assistant: valley.Assistant, folder: Path) -> None:
    with pytest.raises(DamagedMediaError):
        valley.chat(assistant, (folder / "clip.mp4").read_bytes()[:-200], QUESTION)


def test_load_takes_a_run_and_another_precision_and_refuses_checkpoints(folder: Path, tmp_path: Path) -> None:
    loaded = valley.load(str(folder / "run"), device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.training
    assert valley.load(folder / "run").model.dtype == torch.float32

    (tmp_path / "manifest.json").touch()
    with pytest.raises(ModelError, match=f"{tmp_path} is a training checkpoint, not a model"):
        valley.load(tmp_path)
    with pytest.raises(ModelError, match=f"there is no {tmp_path}/none"):
        valley.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=f"there is no model in {tmp_path}/empty"):
        valley.load(tmp_path / "empty")


def test_a_model_samples_clips_as_it_was_trained(folder: Path, tmp_path: Path) -> None:
    new_model().save_pretrained(tmp_path)
    build_processor(MODEL, Sampling(mode="fixed", num_frames=7)).save_pretrained(tmp_path)
    assert len(look(valley.load(tmp_path), folder / "clip.mp4")[0]) == 7


def test_a_conversation_remembers_what_was_said_and_survives_interrupts(
    assistant: valley.Assistant, folder: Path
) -> None:
    clip = folder / "clip.mp4"
    typed: list[Any] = [KeyboardInterrupt(), "  ", QUESTION, "Why?", EOFError()]
    written: list[str] = []

    def ask() -> str:
        line = typed.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 4:  # after "\n" of the first interrupt: the third piece of the first answer
            raise KeyboardInterrupt

    with watching(assistant) as seen:
        said = talk(assistant, clip, ask, write, max_new_tokens=LENGTH)

    assert [turn["role"] for turn in said] == ["user", "assistant", "user", "assistant"]
    first, second = said[1]["content"], said[3]["content"]
    assert first == "".join(written[1:4])
    assert valley.chat(assistant, clip, QUESTION, max_new_tokens=LENGTH).startswith(first)
    assert second == valley.chat(assistant, clip, "Why?", history=said[:2], max_new_tokens=LENGTH)
    assert "".join(written) == "\n" + "".join(written[1:4]) + " …\n" + second + "\n\n"
    assert len(seen.prompts) == 2
    assert not generating()
