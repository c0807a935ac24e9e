# SPDX-License-Identifier: Apache-2.0
"""The page at ``/`` in a real browser, against the real server."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
from importlib.resources import files

import jiwer
import openai
import pytest
import soundfile
import srt
from playwright.sync_api import expect, sync_playwright
from support.audio import DATA
from support.checkpoints import CHECKPOINT
from support.fake_sessions import app_of, made
from support.servers import on_a_port

from qwen3_asr_vllm.server.page import About

ABOUT = About(
    ("asr",), {"en": "English"}, ("wav",), (), 1, 3_600, 60, False, False, False, "greedy"
)
HELLO = DATA / "hello.flac"
ATTACK = "<img src=x onerror='broken=1'><script>broken=1</script>"
SIZES = {"desktop": (1000, 800), "phone": (320, 640)}
PATIENCE_MS = 300_000  # a busy machine proves nothing wrong
# What the page says of it, such as "Recording 0:09".
RECORDED_S = "(hint.textContent.match(/\\d+/g) ?? []).reduce((sum, part) => 60 * sum + +part, 0)"

# The least contrast of any text that is shown with what is behind it, as WCAG defines it.
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => channels(color).slice(0, 3)
    .map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const color = node ? getComputedStyle(node).backgroundColor : "rgb(255, 255, 255)";
    return (channels(color)[3] ?? 1) === 0 ? behind(node.parentElement) : color;
  };
  const seen = [...document.body.querySelectorAll("*")].filter((node) =>
    node.checkVisibility() && !["SCRIPT", "OPTION", "AUDIO"].includes(node.tagName)
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return Math.min(...seen.map((node) => {
    const two = [getComputedStyle(node).color, behind(node)].map(luminance).sort((a, b) => b - a);
    return (two[0] + 0.05) / (two[1] + 0.05);
  }));
}"""


def test_the_page_loads_no_other_host():
    page = files("qwen3_asr_vllm").joinpath("server/static/index.html").read_text("utf-8")
    assert len(page.encode()) < 26_000
    assert not re.search(r"https?:|//\w+\.|@import|url\(", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, whose microphone plays ``hello.flac`` again and again."""
    wav = tmp_path_factory.mktemp("microphone") / "hello.wav"
    soundfile.write(wav, *soundfile.read(HELLO))
    options = [
        "--use-fake-ui-for-media-stream",  # grants permission
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={wav}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    path = shutil.which("chromium")
    assert path, "these tests need Debian's package chromium"
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=options, timeout=PATIENCE_MS
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page; the test fails if it asks another host or a script of it fails."""
    asked, mistakes = [], []

    def visit(**options):
        context = browser.new_context(accept_downloads=True, **options)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.goto(server.url)
        expect(page.locator("#limits")).to_contain_text("Up to 4 h")
        return page

    yield visit
    for context in list(browser.contexts):
        context.close()
    assert asked and not mistakes
    assert all(url.startswith((server.url, f"blob:{server.url}", "data:")) for url in asked)


def drop(page, path):
    """A file dropped on the page by hand."""
    transfer = page.evaluate_handle(
        """([name, type, data]) => {
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          transfer.items.add(new File([bytes], name, { type }));
          return transfer;
        }""",
        [path.name, "audio/flac", base64.b64encode(path.read_bytes()).decode()],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def finished(page):
    expect(page.get_by_role("group", name="Download")).to_be_visible()
    return page.locator("#text li")


def transcribed(page):
    """The text that is shown."""
    return " ".join(finished(page).locator("p").all_inner_texts())


def wait_until(page, condition):
    """The page's headers forbid playwright's own way, which is to evaluate text."""
    while not page.evaluate(condition):
        page.wait_for_timeout(50)


def answer(page, *, words=(), text="Good morning.", speakers=()):
    """Answer the page with this instead of the server's response."""
    segments = [
        {"start": float(i), "end": i + 1.0, "text": piece, "language": "English"}
        for i, piece in enumerate(re.split(r"(?<=\.)", text)[:-1] or [text])
    ]
    for segment, speaker in zip(segments, speakers, strict=False):
        segment["speaker"] = speaker
    done = {"type": "transcript.text.done", "text": text, "languages": [{"code": "en"}]}
    done |= {"duration": 9.0, "segments": segments, "words": words, "srt": "", "vtt": ""}
    events = [{"type": "transcript.text.delta", "delta": text}, done | {"warnings": [text]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    asked = []

    def fulfil(route):
        asked.append(route.request)
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/audio/transcriptions", fulfil)
    return asked


@pytest.mark.vllm
def test_dropped_files_show_the_api_response(visit, server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    page = visit()
    drop(page, HELLO)
    assert page.locator("#name").inner_text() == "hello.flac"
    ask = client.audio.transcriptions.create
    verbose = ask(model=str(CHECKPOINT), file=HELLO, response_format="verbose_json")
    assert transcribed(page) == verbose.text
    assert finished(page).count() == len(verbose.segments)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download srt").click()
    assert download.value.suggested_filename == "hello.srt"
    text = download.value.path().read_text("utf-8")
    assert " ".join(cue.content for cue in srt.parse(text)).split() == verbose.text.split()
    assert text == ask(model=str(CHECKPOINT), file=HELLO, response_format="srt")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download json").click()
    saved = json.loads(download.value.path().read_text("utf-8"))
    assert saved["segments"] == [segment.model_dump() for segment in verbose.segments]


@pytest.mark.vllm
def test_the_microphone_is_transcribed(visit):
    page = visit()
    page.get_by_role("button", name="Record").click()
    wait_until(page, f"{RECORDED_S} > {soundfile.info(HELLO).duration}")
    page.get_by_role("button", name="Stop").click()
    text = transcribed(page)
    expected = HELLO.with_suffix(".txt").read_text()
    words = jiwer.process_words(expected.lower(), text.lower())
    assert words.hits > words.substitutions + words.deletions  # it may begin again before the stop
    assert page.locator("#name").inner_text() == "recording.webm"
    wait_until(page, "isFinite(audio.duration) && audio.currentTime === 0")


@pytest.mark.vllm
def test_speech_is_written_while_it_is_spoken(visit):
    """Text before its end, all of it after, and a second go that knows nothing of the first."""
    page = visit()
    for _ in range(2):
        page.get_by_role("button", name="Live").click()
        wait_until(page, f"{RECORDED_S} > 0")
        expect(page.locator("#text")).to_have_text(re.compile(".{10}", re.DOTALL))
        early = page.locator("#text").inner_text()
        page.wait_for_timeout(1000 * soundfile.info(HELLO).duration)
        page.get_by_role("button", name="Stop").click()
        finished(page)
        with page.expect_download() as download:
            page.get_by_role("button", name="Download txt").click()
        text = download.value.path().read_text("utf-8")
        assert text.startswith(early.strip()) and len(text.strip()) > len(early.strip())
        assert "<" not in text
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_role("button", name="Transcribe again")).to_be_hidden()


def test_live_shows_speech_and_its_words(browser):
    """An engine that writes a word each second; the microphone speaks, and pauses."""
    with on_a_port(app_of(made(), about=ABOUT)) as url:
        page = browser.new_context().new_page()
        page.goto(url)
        page.get_by_role("button", name="Live").click()
        expect(page.locator("#status")).to_have_text("Speech …")
        expect(page.locator("body.recording.speaking #level")).to_be_visible()
        expect(page.locator("#text")).to_contain_text("En0 En1")
        expect(page.locator("#status")).to_have_text("Listening …")
        expect(page.locator("body.speaking")).to_have_count(0)
        page.get_by_role("button", name="Stop").click()
        finished(page)
        page.context.close()


def test_a_stop_waits_for_committed_speech(browser):
    """The engine answers a second after the turn has ended, and the user stops before that."""
    shared = made()
    decode = shared.decode

    async def late(request, model, headers):
        await asyncio.sleep(1)
        return await decode(request, model, headers)

    shared.decode = late
    with on_a_port(app_of(shared, about=ABOUT)) as url:
        page = browser.new_context().new_page()
        page.goto(url)
        page.get_by_role("button", name="Live").click()
        expect(page.locator("#status")).to_have_text("Speech …")
        expect(page.locator("#status")).to_have_text("Listening …")
        page.get_by_role("button", name="Stop").click()
        finished(page)
        assert page.locator("#text").text_content().endswith("\n")  # the transcript is complete
        page.context.close()


@pytest.mark.vllm
def test_options_and_key_are_sent(visit):
    about = {"models": ["asr"], "languages": {"de": "German"}, "needs_key": True, "words": True}
    about |= {"decodes": ["wav"], "max_upload_mb": 1, "max_duration_s": 14_400, "version": "1"}
    page = visit()
    page.route("**/about", lambda route: route.fulfill(json=about))
    page.reload()
    asked = answer(page)
    page.get_by_label("API key").fill("secret")
    page.get_by_label("Language").select_option("German")
    page.get_by_label("Keywords").fill("Ada, Grace Hopper")
    page.get_by_label("Context").fill("A lecture.")
    page.set_input_files("#file", HELLO)
    finished(page)
    assert asked[0].headers["authorization"] == "Bearer secret"
    sent = asked[0].post_data_buffer.decode(errors="replace")
    fields = re.findall(r'name="([^"]+)"\r\n\r\n(.*?)\r\n--', sent)
    assert ("language", "de") in fields and ("prompt", "A lecture.") in fields
    assert ("keywords", "Ada, Grace Hopper") in fields
    assert ("timestamp_granularities[]", "word") in fields


@pytest.mark.vllm
def test_speakers_are_shown_on_request(visit):
    page = visit()
    assert page.get_by_label("Show who speaks").is_hidden()
    about = page.evaluate("fetch('about').then((answer) => answer.json())")
    page.route("**/about", lambda route: route.fulfill(json=about | {"speakers": True}))
    page.reload()
    asked = answer(page, text="One. Two. Three.", speakers=["Ada", "Ada", "<b>"])
    page.get_by_label("Show who speaks").check()
    page.set_input_files("#file", HELLO)
    finished(page)
    assert b'name="diarize"\r\n\r\ntrue' in asked[0].post_data_buffer
    assert page.locator("#text .speaker").all_inner_texts() == ["Ada", "<b>"]


NOTE_PROTOCOLS = """
  window.WebSocket = class extends WebSocket {
    constructor(url, protocols) {
      super(url, protocols);
      Object.assign(window, { offered: protocols, session: this });
    }
  };
"""


@pytest.mark.vllm
def test_live_sends_the_key_as_a_subprotocol(visit):
    page = visit()
    page.evaluate(f"() => {{ {NOTE_PROTOCOLS} }}")
    page.evaluate("document.getElementById('key-field').hidden = false")
    page.get_by_label("API key").fill("a/b=")
    page.get_by_role("button", name="Live").click()
    expect(page.get_by_role("alert")).to_contain_text("API key")
    page.get_by_label("API key").fill("secret-1")
    page.get_by_role("button", name="Live").click()
    wait_until(page, "window.session?.readyState === 1")
    assert page.evaluate("offered") == ["realtime", "openai-insecure-api-key.secret-1"]
    assert page.evaluate("session.protocol") == "realtime"
    page.evaluate("session.close()")


@pytest.mark.vllm
def test_no_text_runs_as_script(visit):
    """Not from a file's name, not from a transcript; and the headers would stop what did."""
    page = visit()
    answer(page, text=ATTACK, words=[{"word": "<script>", "start": 0.1, "end": 0.2}])
    name = f"{ATTACK.replace('/', '')}.flac"
    payload = {"name": name, "mimeType": "audio/flac", "buffer": HELLO.read_bytes()}
    page.set_input_files("#file", payload)
    assert transcribed(page) == ATTACK
    assert page.locator("#name").inner_text() == name
    assert page.locator("#warnings li").inner_text() == ATTACK
    assert page.locator("main img, main script").count() == 0
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{ textContent: 'window.broken = 1' }))"
    )
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=broken=1>')")
    page.wait_for_timeout(500)
    assert page.evaluate("window.broken === undefined")


@pytest.mark.vllm
def test_errors_are_shown_unchanged(visit):
    page = visit()
    notes = {"name": "notes.wav", "mimeType": "audio/wav", "buffer": b"words" * 99}
    page.set_input_files("#file", notes)
    expect(page.get_by_role("alert")).to_contain_text("400: ")
    expect(page.get_by_role("alert")).to_contain_text("not audio, or cut off")
    expect(page.get_by_role("button", name="Transcribe again")).to_be_visible()


@pytest.mark.vllm
def test_words_highlight_and_seek(visit):
    page = visit()
    words = [  # put together, they are the text
        {"word": word, "start": 0.5 * i, "end": 0.5 * i + 0.5}
        for i, word in enumerate(["One", " two.", " Three", " four.", " Five", " six."])
    ]
    words[1]["probability"], words[3]["probability"] = 0.3, 0.9
    answer(page, text="One two. Three four. Five six.", words=words)
    page.set_input_files("#file", HELLO)
    lines = finished(page)
    wait_until(page, "audio.readyState >= 2")
    page.evaluate("audio.pause(); audio.currentTime = 1.7; audio.playbackRate = 1 / 16")
    expect(page.locator("#text li.lit p")).to_have_text("Three four.")
    expect(page.locator("#text span.lit")).to_have_text("four.")
    expect(page.locator("#text span")).to_have_count(6)
    expect(page.locator("#text span.unsure")).to_have_text("two.")
    lines.nth(2).get_by_role("button", name="Play from 0:02").press("Enter")
    expect(page.locator("#text li.lit p")).to_have_text("Five six.")
    wait_until(page, "!audio.paused && audio.currentTime > 2")
    page.evaluate("audio.pause(); audio.currentTime = 5")
    expect(page.locator("#text .lit")).to_have_count(0)


@pytest.mark.vllm
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_and_fits(visit, scheme, size):
    width, height = SIZES[size]
    page = visit(color_scheme=scheme, viewport={"width": width, "height": height})
    unsure = {"word": "Good", "start": 0.1, "end": 0.4, "probability": 0.2}
    answer(page, text=f"Good morning. {'Donaudampfschifffahrt' * 9}.", words=[unsure])
    page.set_input_files("#file", HELLO)
    finished(page)
    page.evaluate("fail('Something went wrong.')")
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG 2, level AA
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    controls = page.locator("button:visible, input:visible, select:visible, textarea:visible")
    for control in controls.all():
        assert control.aria_snapshot().count('"'), control  # it has a name
