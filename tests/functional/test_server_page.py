"""The server's page in a real browser, before a stand-in server that does what each test needs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.helpers.browser import BROWSERS, INSTALLER
from tests.helpers.page_server import (
    EARLY,
    EXIT_LAYERS,
    FULL,
    PageServer,
    Script,
    ScriptedToken,
    all_layers,
    text_of,
)
from tests.helpers.server_process import wait_until
from tests.helpers.speed import patient
from tests.helpers.stored_rules import make_rule

FIRST_DIFFERENCE = 20
PROMPT = "A language model is"
# What a browser itself writes when an answer is an error, or none comes.
NETWORK_NOISE = "Failed to load resource"
# Milliseconds that a test which fails takes to say so.
PATIENCE = patient(60_000)
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with PageServer() as server:
        yield server


@pytest.fixture
def script(server: PageServer) -> Script:
    server.script = Script()
    return server.script


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Pages share what is cached; what a page keeps for itself ends with the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: PageServer, script: Script) -> Iterator[Page]:
    """A page that is not open yet. Whatever a test does, the page must not break a rule of its
    content security policy, throw, or ask another host."""
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    yield page
    context.set_offline(False)
    page.evaluate("localStorage.clear()")
    page.close()
    assert [text for text in complaints if NETWORK_NOISE not in text] == []
    assert {address for address in addresses if not address.startswith(server.url)} == set()


def generate(page: Page, server: PageServer, prompt: str = PROMPT) -> None:
    """Opens the page, types a prompt and starts."""
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()


def pane(page: Page, index: int = 0) -> Locator:
    return page.locator("article").nth(index)


def exit_box(page: Page, layer: int) -> Locator:
    return page.get_by_role("group", name="Exits after layer").get_by_label(str(layer))


def bottom(element: Locator) -> float:
    box = element.bounding_box()
    assert box
    return box["y"] + box["height"]


def finish(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Finished")


def text_in(page: Page, index: int = 0) -> str:
    """The generated text of a pane, without the prompt before it."""
    return "".join(pane(page, index).locator(".token").all_text_contents())


def figure(page: Page, name: str, index: int = 0) -> str:
    return pane(page, index).locator(f"[data-figure={name}]").inner_text()


# --- one text ------------------------------------------------------------------------------------


def test_stream_arrives_with_a_colour_for_each_layer(page, server, script):
    script.held_back = frozenset({3, 4, 10})
    generate(page, server)
    finish(page)
    assert text_in(page) == text_of(EARLY)
    tokens = pane(page).locator(".token")
    assert tokens.all_text_contents() == [token.text for token in EARLY]
    looks = tokens.evaluate_all(
        "all => all.map(token => {const style = getComputedStyle(token);"
        "return style.backgroundColor + style.backgroundImage + style.backgroundSize})"
    )
    by_layer = {token.layer: look for token, look in zip(EARLY, looks, strict=True)}
    assert len(set(by_layer.values())) == 3
    assert looks == [by_layer[token.layer] for token in EARLY]
    gauges = tokens.evaluate_all(
        "all => all.map(token => parseFloat(getComputedStyle(token).backgroundSize.split(' ')[1]))"
    )
    assert gauges == pytest.approx([token.layer / 8 * gauges[0] / 0.25 for token in EARLY], abs=0.1)
    assert page.locator("#legend li").all_inner_texts() == ["layer 2", "layer 4", "all 8 layers"]


def test_figures_tell_speed_depth_and_shares(page, server, script):
    generate(page, server)
    finish(page)
    mean = sum(token.layer for token in EARLY) / len(EARLY)
    assert figure(page, "speed") == "90.3"
    assert re.fullmatch(r"\d+ ms|\d\.\d\d s", figure(page, "first"))
    assert figure(page, "depth") == f"{mean:.1f}"
    assert figure(page, "tokens") == str(len(EARLY))
    shares = pane(page).locator(".shares li").all_inner_texts()
    assert [share.split(":")[0] for share in shares] == ["layer 2", "layer 4", "layer 8"]


def test_figures_are_alive_while_the_text_comes(page, server, script):
    script.seconds_per_token = 0.1
    generate(page, server)
    expect(pane(page).locator("[data-figure=tokens]")).to_have_text(re.compile(r"[1-9]"))
    expect(pane(page).locator("[data-figure=speed]")).to_have_text(re.compile(r"\d\.\d"))
    assert pane(page).get_attribute("data-state") == "running"
    page.keyboard.press("Escape")


def test_token_tells_what_is_known_of_it(page, server, script):
    generate(page, server)
    finish(page)
    place = next(i for i, token in enumerate(EARLY) if token.layer == 4)
    pane(page).locator(".token").nth(place).hover()
    details = page.locator("#inspector")
    expect(details).to_contain_text(f"Token {place + 1}")
    expect(details).to_contain_text("layer 4 of 8")
    expect(details).to_contain_text(f"{EARLY[place].confidence:.3f}")
    expect(details).to_contain_text("Log-probability")
    expect(details.locator("caption")).to_have_text("The guess after each layer that was asked")
    names = details.locator("thead th").all_inner_texts()
    assert (names[0], names[1], names[3]) == ("After layer", "Guess", "Confidence")
    heads = details.locator("tbody tr")
    assert heads.count() == 2
    expect(heads.nth(0)).to_contain_text("␣it")
    expect(heads.nth(0)).to_contain_text("0.120")
    expect(heads.nth(1)).to_have_class("chosen")
    expect(details).to_contain_text("The tick is the threshold, 0.80")
    assert "%" not in details.inner_text()
    expect(details.locator(".candidates")).to_contain_text("⏎")


def test_controls_are_sent(page, server, script):
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Confidence threshold").fill("0.35")
    expect(page.locator("#threshold-value")).to_have_text("0.35")
    exit_box(page, 4).uncheck()
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Stop at").fill("\\n\\n\n END")
    page.get_by_role("button", name="Generate").click()
    finish(page)
    assert script.requests == [
        {
            "model": "scripted",
            "prompt": PROMPT,
            "max_tokens": 12,
            "temperature": 0.7,
            "seed": 5,
            "top_p": 0.9,
            "stop": ["\n\n", " END"],
            "mode": "early_exit",
            "early_exit_threshold": 0.35,
            "exit_layers": [2],
            "logprobs": 4,
            "exit_details": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_lossless_mode_names_the_exit_that_drafts(page, server, script):
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Lossless").check()
    expect(page.get_by_label("Confidence threshold")).to_be_hidden()
    page.get_by_role("group", name="Drafts come from").get_by_label("layer 4").check()
    page.get_by_role("button", name="Generate").click()
    finish(page)
    (body,) = script.requests
    assert (body["mode"], body["draft_exit_layer"]) == ("self_speculative", 4)
    assert "draft_method" not in body
    assert not {"early_exit_threshold", "exit_layers"} & set(body)
    expect(pane(page)).to_contain_text("75 % of drafts accepted, 4.00 tokens a verification.")


def test_a_look_ahead_head_drafts_where_there_is_one(page, server, script):
    script.draft_methods = ["exit", "mtp", "auto"]
    script.early = [replace(one, layer=0 if one.layer == 2 else one.layer) for one in EARLY]
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Lossless").check()
    drafters = page.get_by_role("group", name="Drafts come from")
    expect(drafters.get_by_label("whichever is faster")).to_be_checked()
    page.get_by_role("button", name="Generate").click()
    finish(page)
    expect(page.locator("#legend li").first).to_have_text("look-ahead head")
    expect(pane(page)).to_contain_text(re.compile(r"look-ahead head: \d+ %"))
    drafters.get_by_label("look-ahead head").check()
    page.get_by_label("Compare with the full model").check()
    page.get_by_role("button", name="Generate").click()
    wait_until(lambda: len(script.requests) == 3)
    finish(page)
    automatic, ahead, full = script.requests
    assert (automatic["draft_method"], ahead["draft_method"]) == ("auto", "mtp")
    assert "draft_exit_layer" not in ahead
    assert "draft_method" not in full
    drafters.get_by_label("layer 4").check()
    page.get_by_label("Compare with the full model").uncheck()
    page.get_by_role("button", name="Generate").click()
    wait_until(lambda: len(script.requests) == 4)
    finish(page)
    by_exit = script.requests[-1]
    assert (by_exit["draft_method"], by_exit["draft_exit_layer"]) == ("exit", 4)
    script.exit_layers, script.draft_methods = [], ["mtp"]
    page.goto(server.url)
    modes = page.get_by_role("group", name="Mode")
    expect(modes).to_contain_text("Lossless")
    expect(modes).not_to_contain_text("Early exit")


def test_the_stored_rule_is_shown_and_set(page, server, script):
    rule = make_rule(early_exit_threshold=0.625, exit_layers=(2,))
    promise = {**rule.to_dict()["promise"], "tasks": ["held_out"]}
    says = rule.promise.sentence()
    script.stored_rule = {**rule.defaults(), "promise": promise, "says": says, "is_default": True}
    page.goto(server.url)
    modes = page.get_by_role("group", name="Mode")
    expect(modes).to_contain_text(f"Chosen for this model: {says}.")
    expect(page.locator("#threshold-value")).to_have_text("0.6250")
    boxes = page.locator("[name=exit]")
    assert [box.get_attribute("value") for box in boxes.all() if box.is_checked()] == ["2"]
    generate(page, server)
    finish(page)
    body = script.requests[-1]
    assert body["early_exit_threshold"] == 0.625
    assert "exit_layers" not in body
    script.stored_rule["is_default"] = False
    page.reload()
    expect(modes).not_to_contain_text("Chosen for this model")


def test_stored_thresholds_are_shown_and_sent_until_one_for_all_is_set(page, server, script):
    rule = make_rule(
        early_exit_threshold=None, exit_thresholds=(0.625, 0.25), exit_layers=tuple(EXIT_LAYERS)
    )
    promise = {**rule.to_dict()["promise"], "tasks": ["held_out"]}
    says = rule.promise.sentence()
    script.stored_rule = {**rule.defaults(), "promise": promise, "says": says, "is_default": True}
    page.goto(server.url)
    shown = page.locator("#threshold-value")
    expect(shown).to_have_text("0.6250, 0.25")
    generate(page, server)
    finish(page)
    body = script.requests[-1]
    assert (body["exit_thresholds"], body["exit_layers"]) == ([0.625, 0.25], EXIT_LAYERS)
    assert "early_exit_threshold" not in body
    # They are of both exits, by the server's measure.
    box = page.locator(f"[name=exit][value='{EXIT_LAYERS[0]}']")
    box.uncheck()
    expect(shown).to_have_text("0.80")
    box.check()
    expect(shown).to_have_text("0.6250, 0.25")
    page.get_by_label("Confidence is measured by").select_option("entropy")
    expect(shown).to_have_text("0.80")
    page.get_by_label("Confidence is measured by").select_option("max_probability")
    page.get_by_label("Confidence threshold").fill("0.5")
    expect(shown).to_have_text("0.50")
    page.get_by_role("button", name="Generate").click()
    wait_until(lambda: len(script.requests) == 2)
    finish(page)
    assert script.requests[-1]["early_exit_threshold"] == 0.5
    assert "exit_thresholds" not in script.requests[-1]


def test_measure_and_skipped_layers_are_sent_where_they_are_not_the_models(page, server, script):
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    measure = page.get_by_label("Confidence is measured by")
    assert measure.locator("option").all_inner_texts() == ["the largest probability", "entropy"]
    policies = page.get_by_role("group", name="Layers that a token skips")
    expect(policies.get_by_label("Computed later")).to_be_checked()
    page.get_by_role("button", name="Generate").click()
    finish(page)
    assert not {"exit_measure", "kv_policy"} & set(script.requests[0])
    measure.select_option("entropy")
    policies.get_by_label("Left out").check()
    expect(policies).to_contain_text("the text may differ more")
    page.get_by_label("Compare with the full model").check()
    page.get_by_role("button", name="Generate").click()
    wait_until(lambda: len(script.requests) == 3)
    finish(page)
    early, full = script.requests[1:]
    assert (early["exit_measure"], early["kv_policy"]) == ("entropy", "propagate")
    assert not {"exit_measure", "kv_policy"} & set(full)
    page.get_by_label("Lossless").check()
    expect(measure).to_be_hidden()
    expect(policies).to_be_hidden()


def test_no_exit_at_all_is_not_sent(page, server, script):
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    for layer in (2, 4):
        exit_box(page, layer).uncheck()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text("Choose at least one exit, or the full model.")
    assert script.requests == []


def test_text_and_command_are_copied(page, server, script):
    script.api_key = "secret"
    page.goto(server.url)
    page.locator("#key").fill("secret")
    page.get_by_role("button", name="Use key").click()
    page.get_by_label("Prompt", exact=True).fill("It's")
    page.get_by_role("button", name="Generate").click()
    finish(page)
    page.get_by_role("button", name="Copy text").click()
    expect(pane(page).get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text_of(EARLY)
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#status")).to_have_text("Copied the command.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert "secret" not in command
    words = shlex.split(command)
    assert words[:3] == ["curl", "--no-buffer", f"{server.url}v1/completions"]
    assert "Authorization: Bearer $API_KEY" in words
    assert json.loads(words[-1]) == script.requests[0]
    assert script.requests[0]["prompt"] == "It's"


def test_stop_ends_the_transfer(page, server, script):
    script.seconds_per_token = 0.1
    generate(page, server)
    expect(pane(page).locator(".token").nth(4)).to_be_attached()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(pane(page).locator(".state")).to_have_text("stopped")
    wait_until(lambda: script.left_at)
    assert script.left_at[0] < len(EARLY)
    assert text_of(EARLY).startswith(text_in(page))


def test_two_thousand_tokens_stay_smooth(page, server, script):
    script.early = [ScriptedToken(f" w{i}", (2, 4, 8)[i % 3], 0.9) for i in range(2000)]
    script.tokens_per_event = 2
    # In the thread's own time, which other processes do not count for.
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Max tokens").fill("2000")
    page.get_by_role("button", name="Generate").click()
    finish(page)
    assert pane(page).locator(".token").count() == 2000
    figures = devtools.send("Performance.getMetrics")["metrics"]
    seconds = {figure["name"]: figure["value"] for figure in figures}
    assert seconds["TaskDuration"] < 4


# --- two texts -----------------------------------------------------------------------------------


def test_a_prompt_typed_before_the_models_are_known(page, server):
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.goto(server.url)
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill(PROMPT)
    prompt.blur()
    held[0].continue_()
    expect(page.get_by_role("radio", name="Early exit")).to_be_checked()
    expect(prompt).to_have_value(PROMPT)


def test_comparison_marks_the_first_difference(page, server, script):
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("switch", name="Compare with the full model").check()
    page.get_by_role("button", name="Generate").click()
    finish(page)
    assert [body["mode"] for body in script.requests] == ["early_exit", "full"]
    twin = script.requests[1]
    assert not twin["exit_details"]
    assert not {"early_exit_threshold", "exit_layers"} & set(twin)
    assert text_in(page, 1) == text_of(FULL)
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("2.17\u00d7")
    expect(verdict).to_contain_text(f"differ at token {FIRST_DIFFERENCE + 1} of")
    for index, tokens in enumerate((EARLY, FULL)):
        marked = pane(page, index).locator(".token.differs")
        assert marked.all_text_contents() == [tokens[FIRST_DIFFERENCE].text]
    marked.hover()
    expect(page.locator("#inspector")).to_contain_text("Here the two texts first differ")
    expect(pane(page, 0).locator(".token.twin")).to_have_class(re.compile("differs"))


def test_comparison_says_when_the_texts_are_the_same(page, server, script):
    script.full = all_layers(EARLY)
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("switch", name="Compare with the full model").check()
    page.get_by_role("button", name="Generate").click()
    finish(page)
    expect(page.locator("#verdict")).to_contain_text(f"the same, all {len(EARLY)} tokens")
    assert page.locator(".token.differs").count() == 0


# --- no gain -------------------------------------------------------------------------------------


def compare(page: Page, server: PageServer) -> None:
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("switch", name="Compare with the full model").check()
    page.get_by_role("button", name="Generate").click()
    finish(page)


def test_answer_without_a_gain_says_why_and_suggests_a_threshold(page, server, script):
    # Two of three tokens run all layers; exit 4 was 0.58 sure of the half that is easiest to give.
    script.early = [replace(token, layer=8 if i % 3 else 2) for i, token in enumerate(EARLY)]
    script.unsure, script.full_speed = 0.291, 120.0
    compare(page, server)
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text(
        "Slower than the full model: 90.3 against 120 tokens/s (0.75\u00d7)"
    )
    assert page.locator(".speed-up").count() == 0
    advice = page.locator("#advice-text")
    expect(advice).to_contain_text("67 % of the tokens ran all 8 layers")
    expect(advice).to_contain_text("At a threshold of 0.58, half of these tokens would have left")
    expect(advice).to_contain_text("If the server has just started")
    page.get_by_role("button", name="Ask again with 0.58").click()
    wait_until(lambda: len(script.requests) == 4)
    finish(page)
    assert script.requests[2]["early_exit_threshold"] == 0.58
    expect(page.locator("#threshold-value")).to_have_text("0.58")
    expect(advice).not_to_contain_text("If the server has just started")


def test_costs_of_exits_and_of_drafts_are_named(page, server, script):
    script.full_speed = 90.25
    compare(page, server)
    expect(page.locator("#verdict")).to_contain_text("About as fast as the full model")
    expect(page.locator("#advice-text")).to_contain_text("The tokens skipped 53 % of the layers")
    page.get_by_role("button", name="Ask again with exit 2 alone").click()
    wait_until(lambda: len(script.requests) == 4)
    finish(page)
    assert script.requests[2]["exit_layers"] == [2]
    script.acceptance = 0.25
    page.get_by_label("Lossless").check()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#advice-text")).to_contain_text("Only 25 % of the drafts were accepted")
    page.get_by_role("button", name="Ask again with drafts from layer 4").click()
    wait_until(lambda: len(script.requests) == 8)
    assert script.requests[6]["draft_exit_layer"] == 4
    finish(page)


# --- errors --------------------------------------------------------------------------------------


def test_server_that_goes_away_is_called_unreachable(page, server, script, context):
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    context.set_offline(True)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    finish(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_server_that_is_not_there_yet_can_be_tried_again(page, server, script):
    page.route("**/v1/models", lambda route: route.abort())
    page.goto(server.url)
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#model-facts")).to_contain_text("8 layers")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_key_is_asked_for_and_kept_for_the_tab(page, server, script):
    script.api_key = "secret"
    page.goto(server.url)
    expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
    key = page.locator("#key")
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("refuses this API key")
    key.fill("schlüssel€")
    key.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("ASCII characters")
    key.fill("secret")
    key.press("Enter")
    expect(page.locator("#model-facts")).to_contain_text("8 layers")
    expect(key).to_be_hidden()
    page.reload()
    expect(page.locator("#model-facts")).to_contain_text("8 layers")
    assert page.evaluate("localStorage.length") == 0


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((429, "64 requests wait already."), "The server is busy: 64 requests wait already."),
        ((400, "prompt is too long"), "The server refuses this request: prompt is too long."),
        ((503, "the engine has died"), "The server failed: the engine has died."),
    ],
)
def test_refusal_is_shown_in_words(page, server, script, refusal, words):
    script.refusal = refusal
    page.goto(server.url)
    page.get_by_role("switch", name="Compare with the full model").check()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(pane(page, 0).locator(".state")).to_have_text("failed")
    expect(pane(page, 0).locator(".outcome")).to_contain_text(words)
    expect(pane(page, 1).locator(".state")).to_have_text("not asked")
    expect(pane(page, 1).locator(".outcome")).to_contain_text("because the first text failed")
    script.refusal = None
    page.get_by_role("button", name="Try again").click()
    finish(page)
    assert [body["mode"] for body in script.requests] == ["early_exit", "early_exit", "full"]
    assert text_in(page, 0) == text_of(EARLY)
    assert pane(page, 1).locator(".outcome").inner_text() == ""
    expect(page.get_by_role("alert")).to_be_hidden()


def test_refused_setting_is_shown_and_asked_anew_with_its_change(page, server, script):
    script.refusal, script.refused_param = (400, "max_tokens 128: allowed: up to 48"), "max_tokens"
    generate(page, server)
    expect(page.get_by_role("alert")).to_contain_text("max_tokens 128: allowed: up to 48.")
    field = page.get_by_label("Max tokens")
    expect(field).to_be_focused()
    field.fill("48")
    script.refusal = None
    page.get_by_role("button", name="Try again").click()
    finish(page)
    assert [body["max_tokens"] for body in script.requests] == [128, 48]


def test_full_model_alone_is_asked_again_where_it_alone_failed(page, server, script):
    script.refusal, script.refused_mode = (429, "64 requests wait already."), "full"
    page.goto(server.url)
    page.get_by_role("switch", name="Compare with the full model").check()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    expect(pane(page, 1).locator(".state")).to_have_text("failed")
    script.refusal = None
    page.get_by_role("button", name="Try again").click()
    finish(page)
    assert [body["mode"] for body in script.requests] == ["early_exit", "full", "full"]
    assert page.locator(".token.differs").count() == 2
    expect(page.locator("#verdict")).to_contain_text("2.17\u00d7")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ({"error_after": 7}, "The server broke off the text: out of memory."),
        ({"cut_after": 7}, "The connection ended before the text did. "),
    ],
)
def test_text_so_far_stays_when_the_stream_breaks(page, server, script, failure, words):
    server.script = replace(script, **failure)
    generate(page, server)
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(pane(page).locator(".token")).to_have_count(7)
    assert text_in(page) == text_of(EARLY[:7])
    expect(pane(page).locator(".outcome")).to_contain_text(words)
    server.script = script
    page.get_by_role("button", name="Try again").click()
    finish(page)
    assert text_in(page) == text_of(EARLY)


# --- models that can do less ---------------------------------------------------------------------


def test_model_without_exits_runs_in_full_only(page, server, script):
    script.exit_layers = []
    generate(page, server)
    finish(page)
    expect(page.locator("#no-exits")).to_be_visible()
    assert page.locator("#modes").inner_text() == "Full model"
    expect(page.get_by_label("Confidence threshold")).to_be_hidden()
    expect(page.get_by_role("switch")).to_be_hidden()
    (body,) = script.requests
    assert (body["mode"], body["exit_details"]) == ("full", False)


def test_model_without_text_takes_token_ids(page, server, script):
    script.has_text = False
    page.goto(server.url)
    field = page.get_by_label("Prompt, as token ids")
    field.fill("12 seven")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("token ids")
    field.fill("12, 7 301")
    page.get_by_role("button", name="Generate").click()
    finish(page)
    assert script.requests[0]["prompt"] == [12, 7, 301]
    ids = text_in(page).split()
    assert len(ids) == len(EARLY)
    assert all(word.isdecimal() for word in ids)


# --- prompts and conversations -------------------------------------------------------------------


def test_examples_suit_the_model(page, server, script):
    page.goto(server.url)
    page.get_by_role("button", name="The capital of France is").click()
    finish(page)
    assert script.requests[0]["prompt"] == "The capital of France is"
    script.example_prompts = ["def main():\n    "]
    page.reload()
    examples = page.locator("#example-list")
    expect(examples).to_have_text("def main():")
    examples.get_by_role("button").click()
    finish(page)
    assert script.requests[1]["prompt"] == "def main():\n    "


def test_examples_of_a_model_for_code_are_code(page, server, script):
    def rename(route):
        response = route.fetch()
        models = response.json()
        for model in models["data"]:
            model["id"] = model["root"] = "TinyCode-1B"
        route.fulfill(response=response, json=models)

    page.route("**/v1/models", rename)
    page.goto(server.url)
    page.get_by_role("button", name="def main():").click()
    finish(page)
    assert (script.requests[0]["model"], script.requests[0]["prompt"]) == (
        "TinyCode-1B",
        "def main():",
    )


def test_conversation_goes_on_with_coloured_answers(page, server, script):
    script.has_chat_template = True
    script.held_back = frozenset({3, 10})
    page.goto(server.url)
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_role("button", name="Why is the sky blue?").click()
    finish(page)
    tokens = pane(page).locator(".token")
    assert tokens.all_text_contents() == [token.text for token in EARLY]
    assert tokens.evaluate_all("all => new Set(all.map(one => one.style.cssText)).size") == 3
    tokens.nth(1).hover()
    expect(page.locator("#inspector .candidates")).to_contain_text("⏎")
    page.get_by_role("button", name="Reply").click()
    message = page.get_by_label("Message")
    expect(message).to_be_focused()
    message.fill("And red?")
    page.get_by_role("button", name="Generate").click()
    wait_until(lambda: len(script.requests) == 2)
    finish(page)
    first, second = script.requests
    asked = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Why is the sky blue?"},
    ]
    assert first["messages"] == asked
    assert (first["logprobs"], first["top_logprobs"], first["exit_details"]) == (True, 4, True)
    answer = {"role": "assistant", "content": text_of(EARLY).strip()}
    assert second["messages"] == [*asked, answer, {"role": "user", "content": "And red?"}]
    expect(page.locator("#turns li")).to_have_count(2)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#turns")).to_be_hidden()
    page.get_by_label("Text to go on with").check()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="The capital of France is")).to_be_visible()


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "text"])
def test_parts_of_a_character_are_tokens_of_their_own(page, server, script, is_chat):
    script.has_chat_template = is_chat
    parts = [(b"\xe6", ""), (b"\x97", ""), (b"\xa5", "\u65e5")]
    script.early = [
        ScriptedToken("A", 2, 0.9),
        *(ScriptedToken(text, 4, 0.9, data) for data, text in parts),
        ScriptedToken(" day", 2, 0.9),
    ]
    page.goto(server.url)
    page.get_by_role("button", name="sky" if is_chat else "France").click()
    finish(page)
    tokens = pane(page).locator(".token")
    assert tokens.all_text_contents() == ["A", "", "", "\u65e5", " day"]
    tokens.nth(1).hover()
    expect(page.locator("#token h2")).to_contain_text("bytes E6")


def test_a_special_token_in_a_conversation_has_a_name_and_no_text(page, server, script):
    script.has_chat_template = True
    script.early = [
        ScriptedToken("A", 2, 0.9),
        ScriptedToken("", 4, 0.9, b""),
        ScriptedToken(" day", 2, 0.9),
        ScriptedToken(" off", 2, 0.9),
    ]
    page.goto(server.url)
    page.get_by_role("button", name="sky").click()
    finish(page)
    assert pane(page).locator(".token").all_text_contents() == ["A", "", " day", " off"]


# --- everybody -----------------------------------------------------------------------------------


def test_keyboard_is_enough(page, server, script):
    page.goto(server.url)
    keys = page.keyboard
    expect(page.locator("#model-facts")).to_contain_text("8 layers")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    keys.type(PROMPT)
    keys.press("Control+Enter")
    finish(page)
    stops = []
    for _ in range(25):
        keys.press("Tab")
        stops.append(
            page.evaluate("document.activeElement.classList[0] || document.activeElement.id")
        )
        if stops[-1] == "token":
            break
    # The whole text is one stop, behind the controls.
    assert stops[-1] == "token", stops
    inspector = page.locator("#inspector")
    expect(inspector).to_contain_text("Token 1 ")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    expect(inspector).to_contain_text("Token 3 ")
    focused = page.locator(":focus")
    expect(focused).to_have_attribute("aria-describedby", "token")
    assert focused.evaluate("it => getComputedStyle(it).outlineStyle") == "solid"
    top = focused.evaluate("it => it.getBoundingClientRect().top")
    keys.press("ArrowDown")
    assert focused.evaluate("it => it.getBoundingClientRect().top") > top
    keys.press("ArrowUp")
    assert focused.evaluate("it => it.getBoundingClientRect().top") == top
    keys.press("End")
    expect(inspector).to_contain_text(f"Token {len(EARLY)} ")
    keys.press("Shift+Tab")
    keys.press("Tab")
    expect(inspector).to_contain_text(f"Token {len(EARLY)} ")


def test_escape_stops_and_no_comparison_follows(page, server, script):
    script.seconds_per_token = 0.1
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("switch").check()
    page.get_by_role("button", name="Generate").click()
    expect(pane(page).locator(".token").nth(2)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Stopped")
    assert len(script.requests) == 1
    expect(pane(page, 1).locator(".state")).to_have_text("not asked")
    expect(pane(page, 1).locator(".outcome")).to_contain_text("because you stopped before")
    assert page.locator("#verdict").inner_text() == ""


def test_status_is_announced_at_the_end_and_not_for_each_token(page, server, script):
    page.goto(server.url)
    page.evaluate(
        "window.said = []; new MutationObserver(() => window.said.push("
        "document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), {childList: true})"
    )
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    finish(page)
    said = page.evaluate("window.said")
    assert said[0] == "Generating: Early exit."
    assert said[1].startswith(f"Finished. Early exit: {len(EARLY)} tokens in ")
    assert len(said) == 2
    assert page.locator("[aria-live], .text[role=log]").count() == 0


def test_theme_follows_the_system_until_it_is_chosen(page, server, script):
    def surface() -> str:
        return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    page.emulate_media(color_scheme="dark")
    page.goto(server.url)
    dark = surface()
    page.emulate_media(color_scheme="light")
    assert surface() != dark
    button = page.get_by_role("button", name="Theme")
    button.click()
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert surface() == dark
    page.reload()
    assert surface() == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page, server, script, scheme):
    page.emulate_media(color_scheme=scheme)
    generate(page, server)
    finish(page)
    ratios = page.evaluate(CONTRASTS)
    assert min(ratios.values()) >= 4.5, ratios


# Draws colours, for a canvas knows how every kind of them looks.
CONTRASTS = """() => {
  const brush = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const luminance = (colour) => {
    brush.fillStyle = colour;
    brush.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const probe = document.body.appendChild(document.createElement("i"));
  const colour = (name) => {
    probe.style.setProperty("color", `var(--${name})`);
    return getComputedStyle(probe).color;
  };
  const pairs = {
    "ink on page": [colour("ink"), colour("page")],
    "soft on page": [colour("soft"), colour("page")],
    "soft on surface": [colour("soft"), colour("surface")],
    "accent on page": [colour("accent"), colour("page")],
    "label of a main button": [colour("on-accent"), colour("accent")],
    "error": [colour("alarm"), colour("alarm-surface")],
    "mark of a difference": [colour("surface"), colour("alarm")],
  };
  for (const token of document.querySelectorAll(".token")) {
    const style = getComputedStyle(token);
    pairs[`token on ${style.backgroundColor}`] = [style.color, style.backgroundColor];
  }
  probe.remove();
  return Object.fromEntries(Object.entries(pairs).map(([name, pair]) => [name, ratio(...pair)]));
}"""


@pytest.fixture
def phone(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    )
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


# Checkboxes and radio buttons lie in labels, which are touched as well; tokens have other ways.
SMALL_TARGETS = """() =>
  [...document.querySelectorAll("button, a, input, select, textarea, summary")]
  .filter(one => one.offsetParent && getComputedStyle(one).opacity > 0)
  .map(one => (/checkbox|radio/.test(one.type) ? one.closest("label") : one))
  .map(one => [one.id || one.textContent, one.getBoundingClientRect()])
  .filter(([, box]) => box.width < 24 || box.height < 24)
  .map(([name, box]) => `${name}: ${box.width} x ${box.height}`)"""


def test_phone_shows_tokens_on_a_sheet_that_closes(phone, server, script):
    script.has_chat_template = True
    phone.goto(server.url)
    expect(phone.get_by_role("button", name="Generate")).to_have_text("Generate Ctrl ⏎")
    expect(phone.locator("#shortcut")).to_be_hidden()
    phone.get_by_role("switch", name="Compare with the full model").tap()
    phone.get_by_role("button", name="Why is the sky blue?").tap()
    finish(phone)
    token = pane(phone).locator(".token").nth(3)
    inspector = phone.locator("#inspector")
    token.tap()
    expect(inspector).to_be_in_viewport()
    assert bottom(token) <= inspector.bounding_box()["y"]
    phone.get_by_role("button", name="Next").tap()
    expect(inspector).to_contain_text("Token 5 ")
    phone.get_by_text("Settings", exact=True).tap()
    expect(inspector).to_be_hidden()
    expect(phone.get_by_label("Confidence threshold")).to_be_visible()
    token.tap()
    assert phone.evaluate(SMALL_TARGETS) == []
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    phone.get_by_role("button", name="Close").tap()
    expect(inspector).to_be_hidden()
    token.tap()
    expect(inspector).to_contain_text("Token 4 ")


def test_desktop_has_large_targets_and_leads_to_the_documentation(page, server, script):
    script.has_chat_template = True
    page.goto(server.url)
    expect(page.locator("#model-facts")).to_contain_text("8 layers")
    assert page.evaluate(SMALL_TARGETS) == []
    links = page.get_by_role("link").evaluate_all("all => all.map(link => link.href)")
    assert links == [f"{server.url}docs", f"{server.url}openapi.json"]


# --- the browser itself --------------------------------------------------------------------------


@pytest.mark.parametrize("name", BROWSERS)
def test_installer_finds_a_browser(tmp_path, name):
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
    assert install_browser(tmp_path).stdout == f"{tmp_path / name}\n"


def test_installer_says_what_to_install_where_it_may_not(tmp_path):
    done = install_browser(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "apt-get install chromium" in done.stderr


def install_browser(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the installer on a machine that has nothing but `folder` on its path."""
    bash, id_tool = shutil.which("bash"), shutil.which("id")
    (folder / "id").symlink_to(str(id_tool))
    return subprocess.run(
        [str(bash), str(INSTALLER)],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=patient(60),
    )
