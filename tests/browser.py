"""Chromium without a window, for looking at pages that the package writes. Needs selenium."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: So that nothing is asked of the network but what a page asks for.
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage",
)  # fmt: skip


def missing() -> str | None:
    """Return what is missing to start a browser, or None."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return None
    return "chromium and chromedriver are needed (Debian: apt-get install chromium chromium-driver)"


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium with a profile of its own and yield selenium's driver of it.

    Its logs ``browser`` (the console) and ``performance`` (every request) are kept from the start.

    Raises:
        FileNotFoundError: If there is no Chromium, or no driver of it.
    """
    from selenium import webdriver

    if reason := missing():
        raise FileNotFoundError(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
        )
        try:
            yield driver
        finally:
            driver.quit()


def screen(driver: Any, *, width: int, height: int, scale: float = 1, **features: str) -> None:
    """Set the screen and what its owner prefers, and wait until the page shows it.

    Args:
        driver: From `chromium`.
        width: In CSS pixels.
        height: In CSS pixels.
        scale: Device pixels per CSS pixel.
        features: Media features, such as ``prefers_color_scheme="dark"``; others are as the browser has them.
    """
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
    # A page hears of it with its next frame.
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
