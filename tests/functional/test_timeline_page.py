"""The page of a timeline in a real browser: keys, pointers, zoom, both schemes, narrow screens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.helpers.speed import patient
from tools.plan_pipeline import main

GUTTER, RULER, ROW = 64, 26, 30
# Stages of 1 ms forward; of the exits' stages, 1 and 2, the backward takes 3.5 ms.
FILLED = (
    "--schedule filled --pipeline-model-parallel-size 4 --num-microbatches 6 --exit-stages 1 2 "
    "--timeline"
)
STEP_MS = 39


@pytest.fixture(scope="module")
def timeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timeline") / "filled.html"
    assert main([*FILLED.split(), str(path)]) == 0
    return path


@pytest.fixture
def page(browser: Browser, timeline: Path) -> Iterator[Page]:
    """The open page; whatever a test does, it must not complain, or ask for another file."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(patient(8000))
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(timeline.as_uri())
    yield page
    context.close()
    assert complaints == []
    assert addresses == [timeline.as_uri()]


def place(page: Page, rank: int, at_ms: float) -> tuple[float, float]:
    """Where on the screen a time of a rank is drawn."""
    chart = page.locator("#chart").bounding_box()
    assert chart
    spans = page.locator("#chart").evaluate(
        "chart => [chart.clientWidth, chart.scrollLeft, Number(chart.dataset.zoom)]"
    )
    width, scroll, zoom = spans
    x = GUTTER + at_ms / STEP_MS * (width - GUTTER) * zoom - scroll
    return chart["x"] + 1 + x, chart["y"] + 1 + RULER + (rank + 0.5) * ROW


def zoom_of(page: Page) -> float:
    return float(page.locator("#chart").get_attribute("data-zoom") or 0)


def color_at(page: Page, rank: int, at_ms: float) -> list[int]:
    """What the canvas has drawn there."""
    x, y = place(page, rank, at_ms)
    script = """([x, y]) => {
      const canvas = document.getElementById("canvas");
      const box = canvas.getBoundingClientRect();
      const ratio = canvas.width / box.width;
      const pen = canvas.getContext("2d");
      return [...pen.getImageData((x - box.left) * ratio, (y - box.top) * ratio, 1, 1).data];
    }"""
    return page.evaluate(script, [x, y])[:3]


def test_what_is_there_is_said(page):
    expect(page).to_have_title("filled, 4 ranks, 6 microbatches")
    expect(page.locator("#summary")).to_have_text("Step 39 ms, bubble 19.9% of all time.")
    legend = ["forward", "backward", "forward of a fill", "backward of a fill"]
    legend += ["exits in a backward", "critical path"]
    expect(page.locator("#legend li")).to_have_text(legend)


def test_pointing_tells_what_and_why(page):
    page.mouse.move(*place(page, rank=1, at_ms=12))
    tip = page.locator("#tip")
    expect(tip).to_contain_text("1B0: backward, microbatch 0")
    expect(tip).to_contain_text("From 11 ms to 14.5 ms, 3.5 ms long. On the critical path.")
    expect(tip).to_contain_text("Its rank waited 1.5 ms for 2B0 of rank 2.")
    page.mouse.move(*place(page, rank=0, at_ms=0.5))
    expect(tip).to_contain_text("The first: it waited for nothing.")
    # An idle rank has nothing to tell.
    page.mouse.move(*place(page, rank=0, at_ms=7))
    expect(tip).to_be_hidden()


def test_exits_are_marked_in_backwards(page):
    page.mouse.click(*place(page, rank=1, at_ms=12))
    expect(page.locator("#detail")).to_contain_text("Exits take 1.5 ms of it.")
    exits, rest = color_at(page, 1, 11.5), color_at(page, 1, 14.2)
    assert exits == [142, 68, 173]
    assert rest != exits
    # The third stage's backward of 2.5 ms has none; that of the last is its final head's.
    assert color_at(page, 3, 9.7) not in (exits, color_at(page, 0, 7))


def test_fills_are_marked(page):
    page.mouse.click(*place(page, rank=0, at_ms=10))
    detail = page.locator("#detail")
    expect(detail).to_contain_text("0Bw0: backward of a fill, fill w0 of the warm-up bubble")
    forward, fill = color_at(page, 0, 1.2), color_at(page, 0, 9.7)
    idle = color_at(page, 0, 7)
    assert forward != fill
    assert idle not in (forward, fill)


def test_keys_reach_everything(page):
    page.keyboard.press("Tab")
    for _ in range(3):
        page.keyboard.press("Tab")
    expect(page.locator("#chart")).to_be_focused()
    detail = page.locator("#detail")
    for key, action in (
        ("ArrowRight", "0F0"),
        ("ArrowRight", "0F1"),
        ("End", "0B5"),
        ("Enter", "1B5"),
        ("ArrowDown", "2Bc0"),
        ("ArrowLeft", "2Fc1"),
        ("ArrowUp", "1B5"),
        ("Home", "1F0"),
        ("c", "2F0"),
        ("c", "3F0"),
    ):
        page.keyboard.press(key)
        expect(detail).to_contain_text(f"{action}:")
    page.keyboard.press("+")
    assert zoom_of(page) == pytest.approx(1.5)
    page.keyboard.press("0")
    assert zoom_of(page) == 1


def test_zoom_stays_at_the_pointer_and_dragging_moves(page):
    x, y = place(page, rank=3, at_ms=20.5)
    page.mouse.move(x, y)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -600)
    page.keyboard.up("Control")
    page.wait_for_function("Number(document.getElementById('chart').dataset.zoom) > 4")
    # To the pixel of the pointer, which is now so many wide.
    assert place(page, 3, 20.5)[0] == pytest.approx(x, abs=zoom_of(page))
    before, _ = place(page, 3, 20.5)
    page.mouse.down()
    page.mouse.move(x + 200, y, steps=4)
    page.mouse.up()
    assert place(page, 3, 20.5)[0] == pytest.approx(before + 200, abs=3)
    # That was no click.
    expect(page.locator("#detail")).to_have_text("Nothing is selected.")
    page.get_by_role("button", name="Zoom out").click()
    assert zoom_of(page) < 6
    page.get_by_role("button", name="Whole step").click()
    assert zoom_of(page) == 1


def test_fingers_select_and_pinch(browser, timeline):
    context = browser.new_context(viewport={"width": 360, "height": 700}, has_touch=True)
    page = context.new_page()
    page.goto(timeline.as_uri())
    page.touchscreen.tap(*place(page, rank=3, at_ms=5))
    expect(page.locator("#detail")).to_contain_text("3B0")
    _, y = place(page, rank=1, at_ms=0)
    fingers = context.new_cdp_session(page)
    for kind, apart in (("Start", 40), ("Move", 60), ("Move", 120), ("End", None)):
        sides = () if apart is None else (-apart / 2, apart / 2)
        points = [{"x": 200 + side, "y": y} for side in sides]
        fingers.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    assert zoom_of(page) == pytest.approx(3, rel=0.1)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_have_their_colours(page, scheme):
    page.emulate_media(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    text = page.evaluate("getComputedStyle(document.documentElement).color")
    red = {name: int(value.split("(")[1].split(",")[0]) for name, value in
           (("background", background), ("text", text))}  # fmt: skip
    assert (red["background"] > red["text"]) == (scheme == "light")
    # The canvas follows: the row of an idle rank.
    expected = (lambda color: color[0] > 200) if scheme == "light" else (lambda c: c[0] < 80)
    page.wait_for_timeout(100)
    assert expected(color_at(page, 0, 7))


def test_narrow_screens_keep_their_width(page):
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Zoom in").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Whole step").click()
    page.mouse.click(*place(page, rank=3, at_ms=5))
    expect(page.locator("#detail")).to_contain_text("3B0")


def test_a_title_cannot_break_the_page(browser, tmp_path):
    from megatron.early_exit.planner.costs.cost_model import CostModel
    from megatron.early_exit.planner.drawing.page import draw_page
    from megatron.early_exit.planner.simulation.simulator import simulate
    from megatron.early_exit.schedules.generators import OneFOneB

    title = "</script><script>document.title = 'broken'</script> & @data@"
    schedule = OneFOneB(num_ranks=2, num_microbatches=2).build()
    draw_page(simulate(schedule, CostModel.even(2, 1, 2)), tmp_path / "page.html", title)
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    expect(page.get_by_role("heading")).to_have_text(title)
    page.close()


def test_a_plans_page_says_which_part_it_shows(browser, tmp_path):
    path = tmp_path / "plan.html"
    words = (
        "--config 1.3b --gpus 16 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 "
        "--num-virtual-stages-per-pipeline-rank 1 --micro-batch-size 4 --top 1 --timeline"
    )
    assert main([*words.split(), str(path)]) == 0
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(patient(8000))
    page.goto(path.as_uri())
    said = page.locator("#summary").inner_text()
    found = re.fullmatch(
        r"Drawn: 16 of 128 microbatches, and the update of .* ms\. The whole step: ([\d.]+) s, "
        r"bubble [\d.]+%, at most ([\d.]+) GB on a rank\.",
        said,
    )
    assert found, said
    expect(page.locator("#legend")).to_contain_text("update")
    expect(page.locator("#legend")).to_contain_text("memory, and its peak")
    # Four rows with a strip of memory each, and no wider than the screen.
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    assert box["height"] == RULER + 4 * (ROW + 18)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.locator("#chart").focus()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    detail = page.locator("#detail")
    expect(detail).to_contain_text("0F0: forward")
    expect(detail).to_contain_text(re.compile(r"Its rank has [\d.]+ GB\."))
    colors = page.evaluate("""() => {
      const pen = document.getElementById("canvas").getContext("2d");
      const ratio = window.devicePixelRatio;
      const right = document.getElementById("chart").clientWidth - 2;
      const at = (x, y) => [...pen.getImageData(x * ratio, y * ratio, 1, 1).data].slice(0, 3);
      return [at(right, 26 + 15), at(right, 26 + 30 + 15)];
    }""")
    assert colors == [[0x9A, 0xA0, 0xA6], [0x5B, 0x7F, 0xB5]]
    context.close()
