"""The API's documentation, and pages of other origins, in a real browser."""

from __future__ import annotations

import http.server
import threading

import pytest
from playwright.sync_api import expect

from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.text_server import text_server

KEY = {"Authorization": "Bearer sesame"}
ALLOWED = "https://pages.example:8443"


@pytest.fixture(scope="module")
def elsewhere():
    """An empty page of another origin."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as pages:
        thread = threading.Thread(target=pages.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{pages.server_port}"
        pages.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory, elsewhere):
    checkpoint = save_text_checkpoint(tmp_path_factory.mktemp("docs"))
    origins = (ALLOWED, elsewhere)
    with text_server(checkpoint, api_key="sesame", allowed_origins=origins) as running:
        yield running


def test_the_api_is_shown_at_once_and_can_be_tried_with_the_key(server, browser):
    page = browser.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock-summary-path").first).to_be_visible(timeout=60_000)
    paths = page.locator(".opblock-summary-path").all_inner_texts()
    assert {"/v1/completions", "/api", "/health"} <= {path.replace("\u200b", "") for path in paths}
    page.get_by_role("button", name="Authorize").click()
    page.locator(".auth-container input").fill("sesame")
    page.locator(".auth-btn-wrapper .authorize").click()
    page.locator(".auth-btn-wrapper .btn-done").click()
    page.locator(".opblock-summary", has_text="/tokenizer_info").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    assert faults == []
    page.close()


def test_the_description_needs_no_key_and_the_rest_does(server):
    assert server.get("/openapi.json").json()["security"] == [{"key": []}]
    assert server.get("/docs/swagger/css/swagger-ui.css").status_code == 200
    assert server.get("/v1/models").status_code == 401


def test_a_page_elsewhere_may_use_the_server(server, browser, elsewhere):
    page = browser.new_page()
    page.goto(elsewhere)
    ask = """async (url) => {
        const response = await fetch(url + "/tokenize", {
            method: "POST",
            headers: {
                "Content-Type": "application/json",
                "Authorization": "Bearer sesame",
                // OpenAI's client for JavaScript sends these.
                "X-Stainless-Lang": "js",
                "X-Stainless-OS": "Linux",
            },
            body: JSON.stringify({prompt: "the"}),
        });
        return [response.status, await response.json()];
    }"""
    status, body = page.evaluate(ask, server.url)
    assert (status, body["count"]) == (200, len(body["tokens"]))
    page.close()


def test_other_origins_are_not_allowed(server):
    for origin, allowed in ((ALLOWED, ALLOWED), ("https://other.example", None), (None, None)):
        headers = {} if origin is None else {"Origin": origin}
        for response in (
            server.get("/v1/models", headers=headers | KEY),
            server.get("/v1/models", headers=headers),
        ):
            assert response.headers.get("Access-Control-Allow-Origin") == allowed
            assert "Origin" in response.headers["Vary"]
            exposed = response.headers.get("Access-Control-Expose-Headers", "")
            assert ("X-Request-Id" in exposed) == (allowed is not None)
