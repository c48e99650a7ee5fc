"""The page of `skipdit app` as a person uses it, in Debian's Chromium."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_dit

pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
pytest.importorskip("gradio", reason='needs the page: pip install "skipdit[app]"')

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from skipdit.diffusion import Objective, make_scheduler
from skipdit.pipelines import ClassToImagePipeline
from skipdit.text import find_weights

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync")  # fmt: skip
PATIENCE = 60_000  # milliseconds, on a machine that is busy with other things
SECRET = "a file of the folder in which the page was started"
# of the server's process: says on stderr whom else it asks
WATCH = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        name = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        name = name[0] if isinstance(name, tuple) else name
        if name not in ("127.0.0.1", "localhost", "::1", None):
            print("asked elsewhere:", event, name, file=sys.stderr, flush=True)

sys.addaudithook(watch)
"""
TINY = "tiny-run"  # as the page calls the pipeline of such a run

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page is started: a run's pipeline of 16x16 pixels and four classes, and a file of somebody."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("home")
    model = tiny_dit(6, sample_size=16, patch_size=4, in_channels=3, out_channels=3, num_classes=4)
    scheduler = make_scheduler(Objective(process="flow", prediction_type="flow_prediction"), "euler")
    names = {"0": "ant", "1": "bee", "2": "cat", "3": "dog"}
    ClassToImagePipeline(model, scheduler, id2label=names).save_pretrained(home / TINY / "pipeline")
    (home / "secret.txt").write_text(SECRET)
    (home / "watch").mkdir()
    (home / "watch" / "sitecustomize.py").write_text(WATCH)
    return home


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """A page that is served by the command, whose models are the tiny one and the bundled ones."""
    command = [sys.executable, "-m", "skipdit", "app", "--port", "0", "--models", f"{TINY}/pipeline"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(home / "watch"), *sys.path])}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=home, env=environment, text=True, **pipes) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line + server.stderr.read()
            yield found[0]
        finally:
            server.terminate()
            _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    assert "asked elsewhere" not in errors, errors


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Open the page in a window of its own, and check in the end that it asked nobody else and logged no error."""
    contexts, asked, errors = [], [], []

    def open_page(width: int = 1280, **options: object) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)  # pyright: ignore[reportArgumentType]
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        expect(page.get_by_label("Labels")).to_be_visible()
        expect(page.get_by_text("ant", exact=True).first).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert errors == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


def fill(page: Page, **fields: object) -> None:
    """Fill in number fields of the tab that is shown, by their labels with underscores for spaces."""
    for name, value in fields.items():
        field = page.get_by_label(name.replace("_", " "), exact=True).locator("visible=true")
        field.fill(str(value))
        field.blur()


def choose(page: Page, label: str, name: str) -> None:
    """Choose in a list."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=name, exact=True).click()


def run(page: Page) -> Locator:
    return page.locator("#generate-run")


def start_long_job(page: Page) -> None:
    """Generate what takes longer than any test."""
    choose(page, "Model", "emoji")
    expect(page.get_by_text("face-smiling").first).to_be_visible()
    fill(page, Steps=250)
    run(page).click()
    expect(page.get_by_text(re.compile(r"step \d+ of 250")).first).to_be_visible()


def generate(page: Page) -> None:
    """Generate what takes a moment, and wait for it."""
    fill(page, Steps=6, How_many=2)
    run(page).click()
    expect(page.get_by_text("Done.").locator("visible=true")).to_be_visible()


# ----------------------------------------------------------------------------------------------------------------------
# Generate


def test_full_and_cached_stand_side_by_side(page: Page) -> None:
    expect(page).to_have_title("skipdit")
    generate(page)
    for heading in ("Full", "Cached", "Difference"):
        pictures = page.get_by_alt_text(re.compile(f"^{heading}: "))
        expect(pictures).to_have_count(2)
        assert pictures.first.evaluate("picture => picture.naturalWidth") == 16
    told = page.get_by_role("img", name=re.compile("^cached: ")).get_attribute("aria-label") or ""
    full, reused = map(int, re.findall(r"\d+", told))
    assert full + reused == 6
    assert reused > 0
    assert page.locator(".sd-strip .sd-reused").count() == reused
    figures = dict(zip(*(page.locator(f".sd-cards {kind}").all_inner_texts() for kind in ("dt", "dd")), strict=True))
    assert re.fullmatch(r"[\d.]+x", figures["speedup"])
    assert re.match(r"[\d.]+ ± ", figures["PSNR, dB"])
    assert re.fullmatch(r"[\d.]+ MiB", figures["held by the cache"])
    before = page.get_by_alt_text(re.compile("^Difference")).first.get_attribute("src")
    page.get_by_role("slider").fill("40")
    expect(page.get_by_text("x 40")).to_be_visible()
    assert page.get_by_alt_text(re.compile("^Difference")).first.get_attribute("src") != before


def test_a_run_is_cancelled_and_the_next_one_works(page: Page) -> None:
    start_long_job(page)
    page.locator("#generate-cancel").click()
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    expect(page.locator("#generate-cancel")).to_be_disabled()
    choose(page, "Model", TINY)
    expect(page.get_by_text("ant", exact=True).first).to_be_visible()
    generate(page)


def test_another_task_asks_for_what_it_needs(page: Page) -> None:
    page.get_by_label("class-to-video").check()
    expect(page.get_by_label("Model")).to_have_value("emoji-clips")
    expect(page.get_by_label("How many")).to_have_value("1")
    expect(page.get_by_label("Prompts")).to_be_hidden()
    page.get_by_label("text-to-image").check()
    expect(page.get_by_label("Model")).to_have_value("emoji-text")
    if find_weights() is None or find_spec("transformers") is None:
        expect(page.get_by_role("alert")).to_contain_text("skipdit[text]")
        return
    expect(page.get_by_label("Prompts")).to_have_value(re.compile("grinning face\nred heart"))
    expect(page.get_by_label("Labels")).to_be_hidden()
    page.get_by_label("class-to-image").check()
    expect(page.get_by_label("Labels")).to_be_visible()


def test_a_wrong_input_is_a_message(page: Page) -> None:
    alert = page.get_by_role("alert")
    fill(page, Steps=1)
    run(page).click()
    expect(alert).to_have_text("steps must be from 2 to 250, got 1")
    fill(page, Steps=6, Seed=-1)
    run(page).click()
    expect(alert).to_contain_text("seed must be from 0")
    fill(page, Seed="")
    run(page).click()
    expect(alert).to_contain_text("seed must be a number")
    fill(page, Seed=0)
    page.get_by_label("Other", exact=True).check()
    for cache, message in (
        ("no-such-cache:N2", "cache method must be one of auto, skip"),
        ("/etc/passwd.json", "a cache is a speedup or a name here, not a file"),
        ("60x", "out of reach"),
        ("<img src=x>", "<img src=x>"),
    ):
        page.get_by_label("Other cache").fill(cache)
        page.get_by_label("Other cache").press("Enter")
        run(page).click()
        expect(alert).to_contain_text(message, ignore_case=True)
    page.get_by_label("Other cache").fill("N3")
    page.get_by_label("Other cache").press("Enter")
    generate(page)
    expect(page.locator(".sd-cache code")).to_have_text("N3")


def test_two_pages_take_turns(open_page: Callable[..., Page]) -> None:
    first, second = open_page(), open_page()
    start_long_job(first)
    fill(second, Steps=6)
    run(second).click()
    expect(second.get_by_text("Waiting: 1 job is before this one.")).to_be_visible()
    expect(first.get_by_text(re.compile(r"step \d+ of 250")).first).to_be_visible()
    first.locator("#generate-cancel").click()
    expect(first.get_by_text("Cancelled.")).to_be_visible()
    expect(second.get_by_text("Done.").locator("visible=true")).to_be_visible()


def test_a_page_that_is_closed_lets_the_next_one_in(open_page: Callable[..., Page]) -> None:
    first, second = open_page(), open_page()
    start_long_job(first)
    fill(second, Steps=6)
    run(second).click()
    expect(second.get_by_text("Waiting: 1 job is before this one.")).to_be_visible()
    first.close()
    expect(second.get_by_text("Done.").locator("visible=true")).to_be_visible()


def press_tab_until(page: Page, holds: str) -> None:
    """holds: what is asked of the element in focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(f"(() => {{ const it = document.activeElement; return {holds} }})()"):
            return
    raise AssertionError(f"no element is reached by the keyboard where {holds}")


def test_the_keyboard_is_enough(page: Page) -> None:
    press_tab_until(page, "it.type === 'radio' && it.value === '2.5x'")
    page.keyboard.press("Space")
    expect(page.get_by_label("2.5x", exact=True)).to_be_checked()
    press_tab_until(page, "it.labels?.[0]?.innerText.startsWith('Steps') || it.ariaLabel === 'Steps'")
    page.keyboard.press("Control+A")
    page.keyboard.type("6")
    press_tab_until(page, "it.id === 'generate-run'")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_text("Done.").locator("visible=true")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^full: 6 full"))).to_be_visible()
    press_tab_until(page, "it.type === 'range'")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("x 21", exact=True)).to_be_visible()
    page.get_by_role("tab", name="Generate").focus()
    press_tab_until(page, "it.role === 'tab' && it.innerText === 'Quality and speed'")
    page.keyboard.press("Enter")
    expect(page.locator("#calibrate-run")).to_be_visible()


# ----------------------------------------------------------------------------------------------------------------------
# Quality and speed, stability


def test_a_schedule_is_made_downloaded_and_used(page: Page, home: Path) -> None:
    page.get_by_role("tab", name="Quality and speed").click()
    expect(page.get_by_text(f"Nothing has been measured of {TINY} yet.")).to_be_visible()
    fill(page, Target_speedup=1.3, Steps=6, Samples_to_measure_on=1)
    page.locator("#calibrate-run").click()
    link = page.get_by_role("link", name="Download schedule.json")
    expect(link).to_be_visible()
    with page.expect_download() as download:
        link.click()
    path = home / "1.3x.json"
    download.value.save_as(path)
    assert '"full_steps": [' in path.read_text()
    page.get_by_role("tab", name="Generate").click()
    expect(page.get_by_label("Other cache")).to_have_value("made here: 1.3x, 6 steps")
    generate(page)
    expect(page.locator(".sd-cache code")).to_have_text("made here: 1.3x, 6 steps")


def test_a_schedule_is_offered_on_its_own_model_alone(page: Page) -> None:
    """The model was changed before the calibration ended: its schedule was chosen on the new one."""
    page.get_by_role("tab", name="Quality and speed").click()
    fill(page, Target_speedup=1.3, Steps=60, Samples_to_measure_on=4)
    page.locator("#calibrate-run").click()
    expect(page.locator("#calibrate-cancel")).to_be_enabled()
    page.get_by_label("class-to-video").check()
    expect(page.get_by_label("Model")).to_have_value("emoji-clips")
    expect(page.locator("#calibrate-cancel")).to_be_enabled()  # it goes on
    expect(page.get_by_role("link", name="Download schedule.json")).to_be_visible()
    expect(page.get_by_text(f"made here: 1.3x, 60 steps is now a cache of {TINY}.")).to_be_visible()
    page.get_by_role("tab", name="Generate").click()
    page.wait_for_timeout(1000)
    expect(page.get_by_label("2x", exact=True)).to_be_checked()
    expect(page.get_by_label("Other cache")).not_to_be_visible()
    page.get_by_label("class-to-image").check()
    expect(page.get_by_label("Model")).to_have_value(TINY)
    page.get_by_label("Other", exact=True).check()
    expect(page.get_by_label("Other cache")).to_have_value("made here: 1.3x, 60 steps")


def test_stability_is_measured_of_pictures_of_classes(page: Page) -> None:
    page.get_by_role("tab", name="Stability").click()
    expect(page.get_by_text("No report yet")).to_be_visible()
    page.locator("#stability-run").click()
    expect(page.locator("progress[value]:visible")).to_be_visible()
    page.locator("#stability-cancel").click()
    expect(page.get_by_text("Cancelled.").locator("visible=true")).to_be_visible()
    page.get_by_label("class-to-video").check()
    expect(page.get_by_label("Model")).to_have_value("emoji-clips")
    page.locator("#stability-run").click()
    alert = page.get_by_role("alert").locator("visible=true")
    expect(alert).to_contain_text("emoji-clips is a class-to-video model")


# ----------------------------------------------------------------------------------------------------------------------
# The page itself


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_narrow_window(scheme: str, open_page: Callable[..., Page]) -> None:
    page = open_page(420, color_scheme=scheme)
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    generate(page)
    for tab in ("Generate", "Quality and speed", "Stability"):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        assert page.evaluate("document.documentElement.scrollWidth") <= 420


def status_of(
    url: str, *, method: str = "GET", headers: dict[str, str] | None = None, body: bytes | None = None
) -> int:
    """The status of an answer, which does not hold the secret."""
    request = urllib.request.Request(url, method=method, headers=headers or {}, data=body)
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        assert SECRET.encode() not in answer.read()
        return int(answer.status or 0)


def test_no_file_of_the_machine_is_given_away(address: str, home: Path) -> None:
    assert status_of(f"{address}/config") == 200
    names = ("/etc/passwd", "secret.txt", str(home / "secret.txt"), f"{TINY}/pipeline/model_index.json", "~/.profile")
    for name in names:
        for path in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "svelte/", "download/x/"):
            assert status_of(f"{address}/{path}{name}") in (403, 404), (path, name)
        for up in ("..%2f" * 12, "../" * 12, "%2e%2e/" * 12):
            assert status_of(f"{address}/static/{up}{name.lstrip('/')}") in (400, 403, 404)


def test_other_doors_are_shut(address: str) -> None:
    json = {"Content-Type": "application/json"}
    for path in (
        "upload",
        "proxy=http://127.0.0.1:1/",
        "run/generate",
        "call/generate",
        "component_server",
        "vibe-edit",
    ):
        for method in ("GET", "POST"):
            body = b"{}" if method == "POST" else None
            assert status_of(f"{address}/gradio_api/{path}", method=method, headers=json, body=body) == 404
    assert status_of(f"{address}/gradio_api/file=http://127.0.0.1:1/") == 404
    for path in ("queue/join", "run/predict"):
        url, foreign = f"{address}/gradio_api/{path}", {**json, "Origin": "https://example.com"}
        assert status_of(url, method="POST", headers=foreign, body=b"{}") == 403
    assert status_of(address, headers={"Host": "example.com"}) == 403
    assert status_of(address, headers={"Host": f"localhost:{address.rpartition(':')[2]}"}) == 200
