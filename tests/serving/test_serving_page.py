"""The chat page in a real browser, in front of a real server of the tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_makers import serving, write_clip

from valley.serving import page as served_page
from valley.serving.keys import make_key

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with Playwright, which is missing")
Browser, Page, Route, expect = playwright.Browser, playwright.Page, playwright.Route, playwright.expect

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_COMPLETIONS = "**/v1/chat/completions"
_WITHIN_MS = 20_000
_CLIPBOARD = ("clipboard-read", "clipboard-write")


class Visit:
    """A page that was opened, and what it did: the bodies it sent, its complaints, whom it spoke to."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.bodies: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        page.set_default_timeout(_WITHIN_MS)
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        page.goto(address)
        expect(page.locator("#model")).to_have_text("valley")

    def _note(self, request: Any) -> None:
        if request.method == "POST":
            self.bodies.append(json.loads(request.post_data))
        if not request.url.startswith((f"{self.address}/", "data:", f"blob:{self.address}/")):
            self.strangers.append(request.url)

    @property
    def turns(self) -> Any:
        return self.page.locator(".turn")

    @property
    def question(self) -> Any:
        return self.page.get_by_label("Question")

    @property
    def problem(self) -> Any:
        return self.page.locator("#problem")

    def attach(self, file: Any) -> None:
        self.page.locator("#file").set_input_files(file)
        expect(self.page.locator("#attached .name")).to_be_visible()

    def limit(self, max_tokens: int) -> None:
        self.page.locator("#settings summary").click()
        self.page.get_by_label("Max tokens").fill(str(max_tokens))
        self.page.keyboard.press("Escape")

    def ask(self, question: str) -> Any:
        """Asks, and returns the turn once it is complete."""
        turn = self.turns.nth(self.turns.count())
        self.question.fill(question)
        self.question.press("Enter")
        expect(turn.locator(".question")).to_contain_text(question)
        expect(turn.locator(".figures")).to_be_visible(timeout=_WITHIN_MS)
        return turn

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png")

    shots: Path

    def check(self, *statuses: int) -> None:
        """Nothing but the errors that were provoked was complained about, and nobody else was spoken to."""
        expected = re.compile("Failed to load resource.*status of (" + "|".join(map(str, statuses or (0,))) + ")")
        assert [text for text in self.complaints if not expected.search(text)] == []
        assert self.strangers == []


Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(_BROWSERS)} is installed")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, server: str, tmp_path: Path) -> Iterator[Open]:
    """Opens the page in a fresh browser profile."""
    contexts = []
    Visit.shots = Path(os.environ.get("VALLEY_SCREENSHOTS", tmp_path))
    Visit.shots.mkdir(parents=True, exist_ok=True)

    def open_page(address: str = server, **options: Any) -> Visit:
        context = browser.new_context(**options)
        contexts.append(context)
        return Visit(context.new_page(), address)

    yield open_page
    for context in contexts:
        context.close()


def _running(server: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics") as response:
        found = re.search(r"^valley_num_requests_running\{.*\} (.+)$", response.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def _until(holds: Callable[[], bool], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def _stream(*texts: str, then: str = "data: [DONE]\n\n") -> Callable[[Route], None]:
    """Answers in the server's place."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + then
    return lambda route: route.fulfill(content_type="text/event-stream", body=body)


def _hold(route: Route) -> None:
    """Leaves it unanswered."""


def test_a_clip_is_asked_about_twice(visit: Open, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", colour=(20, 120, 200))  # one that no other test has shown
    seen = visit(color_scheme="light", viewport={"width": 1200, "height": 860})
    expect(seen.page.locator(".clip")).to_have_count(1)
    _wait_for_picture(seen)
    seen.shot("empty-light")
    seen.limit(60)
    seen.attach(clip)
    expect(seen.page.locator("#attached video")).to_be_visible()
    first = seen.ask("What moves?")
    expect(first.locator(".frame .time")).to_have_text(["0 s", "2 s", "4 s"])  # half a frame a second of six
    assert first.locator(".frame img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    expect(first.locator(".first-token dd")).to_have_text(re.compile(r"^\d+\.\d+ s$"))
    expect(first.locator(".speed dd")).to_have_text(re.compile(r"^\d+(\.\d)? tokens/s$"))
    expect(first.locator(".length dd")).to_have_text("60 tokens")
    expect(first.locator(".looking dd")).to_have_text(re.compile(r"^\d+\.\d+ s$"))
    expect(seen.question).to_be_focused()
    answer = first.locator(".answer").text_content()
    seen.shot("first-answer-light")
    second = seen.ask("And which way?")
    expect(second.locator(".looking dd")).to_have_text("known already")
    expect(second.locator(".frame")).to_have_count(0)  # they are shown once
    asked, again = (body["messages"] for body in seen.bodies)
    assert asked[0]["content"][1] == {"type": "text", "text": "What moves?"}
    assert again[:2] == [asked[0], {"role": "assistant", "content": answer}]
    assert again[2:] == [{"role": "user", "content": "And which way?"}]
    seen.shot("conversation-light")
    seen.page.emulate_media(color_scheme="dark")
    seen.shot("conversation-dark")
    first.locator(".frame").last.click()
    assert first.locator("video").evaluate("video => video.currentTime") == 4
    seen.check()


def _wait_for_picture(seen: Visit) -> None:
    picture = seen.page.locator(".clip video")
    assert _until(lambda: picture.evaluate("video => video.readyState") >= 2, 10)


def test_settings_go_into_the_request_and_frames_are_as_many_as_asked_for(visit: Open, clip: Path) -> None:
    seen = visit(color_scheme="dark", viewport={"width": 1200, "height": 860})
    seen.page.locator("#settings summary").click()
    seen.page.get_by_label("System message").fill("Answer in one word.")
    seen.page.get_by_label("Temperature").fill("0.7")
    seen.page.get_by_label("Max tokens").fill("8")
    seen.page.get_by_label("Frames to look at").select_option("num_frames")
    seen.shot("settings-dark")
    seen.page.keyboard.press("Escape")
    seen.attach(clip)
    seen.question.fill("What is it?")
    seen.question.press("Enter")  # how many frames was left open: that is asked for first
    expect(seen.page.get_by_label("How many")).to_be_focused()
    assert seen.bodies == []
    seen.page.get_by_label("How many").fill("12")
    seen.page.keyboard.press("Escape")
    turn = seen.ask("What is it?")
    expect(turn.locator(".frame")).to_have_count(12)
    expect(turn.locator(".ended dd")).to_have_text("at the limit of tokens")
    (body,) = seen.bodies
    assert body["messages"][0] == {"role": "system", "content": "Answer in one word."}
    assert (body["temperature"], body["max_tokens"], body["num_frames"]) == (0.7, 8, 12)
    assert "fps" not in body
    seen.check()


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_a_stopped_answer_stays_and_frees_its_slot(visit: Open, server: str, by: str) -> None:
    seen = visit()
    seen.limit(1500)
    seen.question.fill("Tell me all of it")
    seen.question.press("Enter")
    answer = seen.turns.last.locator(".answer")
    expect(answer).not_to_be_empty(timeout=_WITHIN_MS)
    assert _until(lambda: _running(server) == 1, 5)
    if by == "button":
        seen.page.get_by_role("button", name="Stop").click()
    else:
        seen.page.keyboard.press("Escape")
    expect(seen.turns.last.locator(".ended dd")).to_have_text("stopped")
    assert _until(lambda: _running(server) == 0, 5)
    partial = answer.text_content()
    seen.limit(4)
    seen.ask("Go on")
    assert seen.bodies[1]["messages"][1] == {"role": "assistant", "content": partial}
    expect(seen.turns.first.locator(".answer")).to_have_text(partial, use_inner_text=False)
    seen.check()


def test_stopped_before_the_first_word_the_question_goes_back(visit: Open, clip: Path) -> None:
    seen = visit()
    seen.page.route(_COMPLETIONS, _hold)
    seen.attach(clip)
    seen.shot("attached")
    seen.question.fill("What moves?")
    seen.question.press("Enter")
    expect(seen.page.locator(".busy")).to_have_text("Looking at the video…")
    seen.shot("busy")
    seen.page.get_by_role("button", name="Stop").click()
    expect(seen.turns).to_have_count(0)
    expect(seen.question).to_have_value("What moves?")
    expect(seen.page.locator("#attached .name")).to_have_text("clip.mp4")
    seen.check()


def test_a_new_conversation_ends_the_answer_being_written(visit: Open, server: str, clip: Path) -> None:
    seen = visit()
    seen.limit(1500)
    seen.attach(clip)
    seen.question.fill("Tell me all of it")
    seen.question.press("Enter")
    expect(seen.turns.locator(".answer")).not_to_be_empty(timeout=_WITHIN_MS)
    seen.page.get_by_role("button", name="New conversation").click()
    expect(seen.turns).to_have_count(0)
    assert _until(lambda: _running(server) == 0, 5)
    seen.limit(4)
    seen.ask("What moves?")
    assert seen.bodies[1]["messages"] == [{"role": "user", "content": "What moves?"}]
    expect(seen.turns).to_have_count(1)
    seen.check()


def test_a_broken_file_is_told_and_the_next_question_works(visit: Open, clip: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:600])
    seen = visit(color_scheme="light", viewport={"width": 1200, "height": 860})
    seen.limit(8)
    seen.attach(broken)
    expect(seen.page.locator("#attached .no-preview")).to_be_visible()
    seen.question.fill("What moves?")
    seen.question.press("Enter")
    expect(seen.problem).to_be_visible()
    expect(seen.problem).to_have_attribute("role", "alert")
    expect(seen.problem).to_contain_text("“broken.mp4”: ")
    expect(seen.question).to_have_value("What moves?")
    seen.shot("error")
    seen.attach(clip)
    turn = seen.ask("What moves?")
    expect(turn.locator(".frame")).to_have_count(3)
    expect(seen.problem).to_be_hidden()
    assert len(seen.bodies[1]["messages"]) == 1
    seen.check(413, 415, 422)


def test_files_that_cannot_be_videos_are_refused_here(visit: Open, tmp_path: Path) -> None:
    large = tmp_path / "large.mp4"
    with large.open("wb") as file:
        file.truncate((64 << 20) + 1)
    seen = visit()
    chooser = seen.page.locator("#file")
    chooser.set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"words"})
    expect(seen.problem).to_contain_text("“notes.txt” is neither a video nor an image")
    chooser.set_input_files({"name": "empty.mp4", "mimeType": "video/mp4", "buffer": b""})
    expect(seen.problem).to_contain_text("“empty.mp4” is empty")
    chooser.set_input_files(large)
    expect(seen.problem).to_contain_text("the most is 67.1 MB")
    expect(seen.page.locator("#attached")).to_be_hidden()
    seen.check()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(visit: Open, way: str) -> None:
    seen = visit()
    seen.limit(4)
    seen.page.evaluate(
        """async (way) => {
            const canvas = Object.assign(document.createElement("canvas"), {width: 64, height: 48});
            canvas.getContext("2d").fillRect(8, 8, 20, 20);
            const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
            const data = new DataTransfer();
            data.items.add(new File([blob], "square.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true};
            const event = way === "drop"
                ? new DragEvent("drop", {...options, dataTransfer: data})
                : new ClipboardEvent("paste", {...options, clipboardData: data});
            document.querySelector("#question").dispatchEvent(event);
        }""",
        way,
    )
    expect(seen.page.locator("#attached img")).to_be_visible()
    turn = seen.ask("What is it?")
    expect(turn.locator(".frame")).to_have_count(1)
    assert seen.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    seen.check()


def test_a_link_is_left_to_the_server(visit: Open) -> None:
    seen = visit()
    seen.page.route(_COMPLETIONS, _stream("A square."))
    seen.page.get_by_role("button", name="Link").click()
    seen.page.keyboard.type("http://example.org/clip.mp4")
    seen.page.keyboard.press("Enter")
    expect(seen.problem).to_contain_text("https://")
    seen.page.get_by_label("Address of a video or image").fill("https://example.org/clip.mp4")
    seen.page.keyboard.press("Enter")
    expect(seen.page.locator("#attached .name")).to_have_text("https://example.org/clip.mp4")
    seen.ask("What moves?")
    assert seen.bodies[0]["messages"][0]["content"][0] == {
        "type": "video_url",
        "video_url": {"url": "https://example.org/clip.mp4"},
    }
    seen.check()


def test_by_keyboard_alone(visit: Open) -> None:
    seen = visit()
    expect(seen.question).to_be_focused()
    expect(seen.page.locator(".clip")).to_have_count(1)
    _tab_to(seen.page, "summary", backwards=True)
    seen.page.keyboard.press("Enter")
    _tab_to(seen.page, "#max-tokens")
    seen.page.keyboard.type("12")
    seen.page.keyboard.press("Escape")
    _tab_to(seen.page, ".clip")  # a bundled one
    seen.page.keyboard.press("Enter")
    expect(seen.page.locator("#attached .name")).to_have_text("clip.mp4")
    expect(seen.question).to_be_focused()
    seen.page.keyboard.type("One line")
    seen.page.keyboard.press("Shift+Enter")
    seen.page.keyboard.type("and another")
    seen.page.keyboard.press("Enter")
    turn = seen.turns.last
    expect(turn.locator(".figures")).to_be_visible(timeout=_WITHIN_MS)
    expect(turn.locator(".frame")).to_have_count(3)
    assert seen.bodies[0]["messages"][0]["content"][1]["text"] == "One line\nand another"
    expect(seen.question).to_be_focused()
    _tab_to(seen.page, "button.frame", backwards=True)
    outline = "element => getComputedStyle(element).outlineStyle"
    assert seen.page.locator("button.frame:focus").evaluate(outline) == "solid"
    seen.page.keyboard.press("End")
    seen.page.keyboard.press("Enter")
    assert turn.locator("video").evaluate("video => video.currentTime") == 4
    _tab_to(seen.page, "#new", backwards=True)
    seen.page.keyboard.press("Enter")
    expect(seen.turns).to_have_count(0)
    expect(seen.question).to_be_focused()
    seen.check()


def _tab_to(page: Page, selector: str, *, backwards: bool = False) -> None:
    for _ in range(40):
        page.keyboard.press("Shift+Tab" if backwards else "Tab")
        if page.locator(f"{selector}:focus").count():
            return
    raise AssertionError(f"{selector} cannot be reached by Tab")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(visit: Open, tmp_path: Path, scheme: str) -> None:
    clip = write_clip(tmp_path / f"{'a-long-name-' * 8}.mp4", seconds=30)
    seen = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)
    expect(seen.page.locator(".clip")).to_have_count(1)
    _wait_for_picture(seen)
    seen.shot(f"phone-empty-{scheme}")
    seen.limit(60)
    seen.attach(clip)
    _assert_fits(seen.page)
    seen.ask("w" * 80 + " what moves?")
    expect(seen.page.locator(".frame")).to_have_count(15)
    _assert_fits(seen.page)
    seen.shot(f"phone-{scheme}")
    seen.page.locator("#settings summary").click()
    _assert_fits(seen.page)
    seen.shot(f"phone-settings-{scheme}")
    seen.check()


def _assert_fits(page: Page) -> None:
    assert page.evaluate("[document.documentElement.scrollWidth, visualViewport.scale]") == [360, 1]
    for control in page.locator("button:visible, summary, input:not(.hidden):visible, select:visible").all():
        box = control.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 40, control.inner_text()


def test_markup_is_shown_as_text(visit: Open, clip: Path) -> None:
    name = "<img src=x onerror=document.title='pwned'>.mp4"
    output = "<script>document.title='pwned'</script>\n<img src=x onerror=alert(1)> [a](https://example.org) **b**"
    seen = visit()
    seen.page.route(_COMPLETIONS, _stream(output[:9], output[9:]))
    seen.attach({"name": name, "mimeType": "video/mp4", "buffer": clip.read_bytes()})
    turn = seen.ask("<b>What</b>?")
    expect(turn.locator(".name")).to_have_text(name)
    assert turn.locator(".answer").inner_text() == output
    assert turn.locator(".question > p").inner_text() == "<b>What</b>?"
    assert turn.locator("script, a, b, img").count() == 0
    assert seen.page.title() == "Valley"
    seen.check()


_EVENT_OF_ERROR = 'data: {"error":{"message":"the model failed","type":"server_error","param":null,"code":"x"}}\n\n'


@pytest.mark.parametrize(("then", "said"), [(_EVENT_OF_ERROR, "The model failed."), ("", "ended before the answer")])
def test_an_answer_that_breaks_off_is_shown_as_such(visit: Open, then: str, said: str) -> None:
    seen = visit()
    seen.page.route(_COMPLETIONS, _stream("A red ", "squ", then=then))
    turn = seen.ask("What moves?")
    expect(turn.get_by_role("alert")).to_contain_text("The answer was interrupted.")
    expect(turn.get_by_role("alert")).to_contain_text(said)
    expect(turn.locator(".answer")).to_have_text("A red squ")
    seen.page.unroute(_COMPLETIONS)
    seen.page.route(_COMPLETIONS, _stream("A red square."))
    turn.get_by_role("button", name="Try again").click()
    expect(seen.turns).to_have_count(1)
    expect(seen.turns.locator(".answer")).to_have_text("A red square.")
    assert seen.bodies[1] == seen.bodies[0]
    seen.check()


def test_a_server_that_is_gone_or_busy_can_be_asked_again(visit: Open) -> None:
    seen = visit()
    seen.page.route(_COMPLETIONS, lambda route: route.abort("connectionrefused"))
    seen.question.fill("What moves?")
    seen.question.press("Enter")
    expect(seen.problem).to_contain_text("The server cannot be reached")
    busy = {"error": {"message": "too many requests", "type": "rate_limit_error", "param": None, "code": "overloaded"}}
    seen.page.unroute(_COMPLETIONS)
    seen.page.route(_COMPLETIONS, lambda route: route.fulfill(status=429, headers={"retry-after": "2"}, json=busy))
    seen.problem.get_by_role("button", name="Try again").click()
    expect(seen.problem).to_contain_text("Too many requests. Try again in 2 s.")
    seen.page.unroute(_COMPLETIONS)
    seen.page.route(_COMPLETIONS, _stream("A square."))
    seen.problem.get_by_role("button", name="Try again").click()
    expect(seen.turns.locator(".answer")).to_have_text("A square.")
    expect(seen.problem).to_be_hidden()
    seen.complaints = [text for text in seen.complaints if "ERR_CONNECTION_REFUSED" not in text]
    seen.check(429)


def test_a_key_is_asked_for_and_kept_in_the_tab_only(visit: Open, tmp_path: Path) -> None:
    key = make_key(tmp_path / "keys.yaml", "page")
    with serving(f"keys={tmp_path / 'keys.yaml'}") as address:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address)
        seen = visit(address, http_credentials={"username": "page", "password": key}, permissions=_CLIPBOARD)
        seen.page.locator("#settings summary").click()
        seen.page.get_by_label("API key").fill("valley-wrong")
        seen.page.keyboard.press("Escape")
        seen.question.fill("What moves?")
        seen.question.press("Enter")
        expect(seen.page.locator("#key-problem")).to_have_text("The server does not accept this API key.")
        expect(seen.problem).to_contain_text("does not accept this API key")
        expect(seen.page.get_by_label("API key")).to_be_focused()
        seen.shot("key-refused")
        seen.page.get_by_label("API key").fill(key)
        expect(seen.page.locator("#key-problem")).to_be_hidden()
        seen.page.keyboard.press("Escape")
        seen.limit(4)
        turn = seen.ask("What moves?")
        command = _copied_command(seen, turn)
        assert key not in command
        if shutil.which("curl") is not None:
            told = _run(command, tmp_path, VALLEY_API_KEY=key)
            assert _answer(told) == turn.locator(".answer").text_content()
        assert seen.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
        seen.page.reload()
        expect(seen.page.locator("#key")).to_have_value(key)
        seen.check(401)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the command is run with curl")
@pytest.mark.parametrize("bundled", [False, True])
def test_the_command_copied_sends_the_same_request(visit: Open, clip: Path, tmp_path: Path, bundled: bool) -> None:
    name = "it's a $(touch never) clip.mp4"
    seen = visit(permissions=_CLIPBOARD)
    seen.limit(4)
    if bundled:
        seen.page.locator(".clip").click()
        expect(seen.page.locator("#attached .name")).to_have_text("clip.mp4")
    else:
        shutil.copy(clip, tmp_path / name)
        seen.attach(tmp_path / name)
    turn = seen.ask("What's it? \\ `date` $HOME")
    command = _copied_command(seen, turn)
    assert len(command) < 2000
    events = _run(command, tmp_path)
    assert _answer(events) == turn.locator(".answer").text_content()
    assert events[0]["valley"]["known"] == 1  # the very same clip
    assert not (tmp_path / "never").exists()
    sent = command.replace("'\\''", "'")
    assert json.dumps("What's it? \\ `date` $HOME") in sent
    seen.check()


def _copied_command(seen: Visit, turn: Any) -> str:
    turn.get_by_role("button", name="Copy as curl").click()
    expect(turn.get_by_role("button", name="Copied")).to_be_visible()
    return str(seen.page.evaluate("navigator.clipboard.readText()"))


def _run(command: str, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Runs a command of curl, and returns the events it received."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: {")]


def _answer(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


def test_the_page_needs_nothing_from_elsewhere() -> None:
    folder = Path(served_page.__file__).parent
    namespaces = "xmlns='http://www.w3.org/2000/svg'"
    for name in ("index.html", "page.css", "page.js"):
        text = (folder / name).read_text().replace(namespaces, "")
        addresses = re.findall(r"""(?:https?:)?//[\w-]+\.[\w.-]+|@import|url\(""", text)
        assert addresses == [], name
    html = (folder / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"#][^":]*)"', html)) == {"page.css", "page.js"}
    assert re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", html) is None  # the policy forbids them
    assert (
        re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", _code(folder))
        is None
    )


def _code(folder: Path) -> str:
    return (folder / "page.js").read_text()
