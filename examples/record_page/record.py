"""Take pictures of the chat page in Chromium: ``python -m examples.record_page.record OUT``.

Starts ``internvl3 serve`` with the demo model on a free port, asks about its sample images, and
writes OUT-desktop.webp and OUT-phone.webp. Needs selenium, Chromium and chromedriver.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from internvl3_mlx.loading.resolve import DEMO_FOLDER

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 60
QUALITY = 88
QUESTIONS = (
    ("four_corners.jpg", "Where is the turtle?"),
    (None, "Where is the apple?"),
)
# name -> width, height, pixels per unit, appearance
VIEWS = {"desktop": (1100, 860, 1, "light"), "phone": (390, 760, 1.5, "dark")}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("record", description=__doc__)
    parser.add_argument("out", type=Path, help="output path without a suffix")
    out = parser.parse_args(words).out
    with run_server() as url:
        for name, view in VIEWS.items():
            with open_browser(*view) as driver:
                ask_questions(driver, url)
                save_picture(
                    driver.get_screenshot_as_png(), out.with_name(f"{out.name}-{name}.webp")
                )


@contextmanager
def run_server() -> Iterator[str]:
    """Start the server and yield its address."""
    command = [sys.executable, "-m", "internvl3_mlx", "serve", "--model", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+$", line.strip()) for line in process.stderr)
        try:
            yield next(match[0] for match in found if match)
        finally:
            process.terminate()
            process.stderr.read()


@contextmanager
def open_browser(width: int, height: int, scale: float, appearance: str) -> Iterator[Any]:
    """Open a window without a screen."""
    from selenium import webdriver

    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver_path = shutil.which("chromedriver")
    if browser is None or driver_path is None:
        raise SystemExit("Chromium and chromedriver are needed: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    metrics = {"width": width, "height": height, "pixelRatio": scale, "mobile": width < 500}
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {**metrics, "touch": True}}
    )
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    feature = {"name": "prefers-color-scheme", "value": appearance}
    try:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        yield driver
    finally:
        driver.quit()


def ask_questions(driver: Any, url: str) -> None:
    """Ask about the samples, as a person would."""
    driver.get(url)
    wait(driver, "return document.documentElement.dataset.ready")
    driver.execute_script("document.getElementById('set-show_tiles').click()")
    for number, (file, question) in enumerate(QUESTIONS, start=1):
        if file is not None:
            path = DEMO_FOLDER / "samples" / file
            driver.find_element("id", "files").send_keys(str(path))
            wait(driver, "return document.querySelectorAll('#attachments li .tile-count').length")
        driver.find_element("id", "question").send_keys(question + "\n")
        answered = "return document.querySelectorAll('.assistant .row').length"
        wait(driver, f"{answered} == {number} && !document.querySelector('[aria-busy]')")
    time.sleep(0.5)  # the last image is laid out


def wait(driver: Any, script: str) -> None:
    end = time.monotonic() + WAIT_S
    while not driver.execute_script(script):
        if time.monotonic() > end:
            raise SystemExit(f"the page does not get there: {script}")
        time.sleep(0.05)


def save_picture(data: bytes, path: Path) -> None:
    """Save a screenshot; it is part of the documentation, so its size matters."""
    Image.open(io.BytesIO(data)).convert("RGB").save(path, quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
