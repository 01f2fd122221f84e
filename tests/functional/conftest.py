"""What tests of command lines, servers and pages share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.helpers.browser import BROWSERS, INSTALLER


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real one, for the tests of a module."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(f"needs a Chromium: bash {INSTALLER.relative_to(INSTALLER.parents[2])}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
