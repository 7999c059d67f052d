"""A headless Chromium for tests, spoken to by the WebDriver protocol: JSON over HTTP, so that no
package is needed for the handful of commands that a page's test takes."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1120,1500",
)  # fmt: skip
SECONDS = 60


def programs() -> tuple[str, str] | None:
    """Paths of Chromium and its driver, or None where one is missing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One window."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"

    def command(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.root + path, data, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read())["value"]

    def open(self, page: Path) -> None:
        self.command("POST", "/url", url=page.resolve().as_uri())

    def run(self, script: str) -> Any:
        """What the script, a function's body, returns."""
        return self.command("POST", "/execute/sync", script=script, args=[])

    def point_at(self, css: str) -> None:
        found = self.command("POST", "/element", using="css selector", value=css)
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": found}
        mouse = {"type": "pointer", "id": "mouse", "actions": [move]}
        self.command("POST", "/actions", actions=[mouse])

    def messages(self) -> list[dict[str, Any]]:
        """What the page has logged since the last call: errors, blocked requests."""
        messages: list[dict[str, Any]] = self.command("POST", "/se/log", type="browser")
        return messages

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("GET", "/screenshot")))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start one with a new profile, without any network but the driver's; stop it after."""
    found = programs()
    assert found is not None, "ask programs() first"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        [found[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    browser = Browser(port)
    try:
        _wait_for(browser)
        options = {"binary": found[0], "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = browser.command("POST", "/session", capabilities={"alwaysMatch": wanted})
        browser.root += f"/session/{session['sessionId']}"
        try:
            yield browser
        finally:
            browser.command("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(SECONDS)


def _wait_for(browser: Browser) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            if browser.command("GET", "/status")["ready"]:
                return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
        time.sleep(0.05)
