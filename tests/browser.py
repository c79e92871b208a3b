"""A real browser for the tests of pages, and what a page must not do in it."""

from __future__ import annotations

import shutil
from pathlib import Path

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


class Watched:
    """A page, and everything it did that it should not."""

    def __init__(self, browser, path: Path, **options):
        self.page = browser.new_page(**options)
        self.requests: list[str] = []
        self.trouble: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.trouble.append(f"dialog {dialog.message}"))
        self.page.on("pageerror", lambda error: self.trouble.append(f"error {error}"))
        self.page.on("console", lambda said: self.trouble.append(f"console {said.text}"))
        self.page.goto(path.as_uri())
