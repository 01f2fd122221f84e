"""Finds the browser for the tests of pages."""

from __future__ import annotations

from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
INSTALLER = Path(__file__).parents[2] / "tools" / "setup" / "install_browser.sh"
