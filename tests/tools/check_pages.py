"""Opens every page of the built site in headless Chromium, in phone and desktop width.

    make docs && python -m tests.tools.check_pages [--screenshots FOLDER]

It fails if a page writes an error to the console, does not find a file, or is wider than the
window. It needs the package ``playwright`` and a Chromium on PATH; without them it does nothing and
says so.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

SITE = Path(__file__).resolve().parents[2] / "site"
WIDTHS = (390, 1280)
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
# Elements that are cut off: beyond the right edge, and not inside something that scrolls or hides.
CUT_OFF = """() => {
  const scrolls = e => {
    for (let p = e; p && p !== document.body; p = p.parentElement)
      if (!["visible", "clip"].includes(getComputedStyle(p).overflowX)) return true;
    return false;
  };
  return [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e))
    .map(e => e.tagName + ": " + e.textContent.trim().slice(0, 60));
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server without request logging."""

    def log_message(self, *_: Any) -> None:
        pass


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.check_pages")
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--screenshots", type=Path, help="write a picture of each page here")
    options = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("skipped: playwright is not installed (pip install playwright)")
        return 0
    if browser is None:
        print("skipped: there is no Chromium on PATH")
        return 0
    handler = functools.partial(Quiet, directory=str(options.site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    pages = sorted(p.relative_to(options.site) for p in options.site.rglob("index.html"))
    faults: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=list(OPTIONS))
        for width in WIDTHS:
            view = chromium.new_page(viewport={"width": width, "height": 844})
            said: list[str] = []
            view.on("console", lambda m, said=said: m.type == "error" and said.append(m.text))
            view.on("pageerror", lambda error, said=said: said.append(str(error)))
            view.on(
                "response",
                lambda r, said=said: r.status >= 400 and said.append(f"{r.status} {r.url}"),
            )
            for path in pages:
                view.goto(f"{address}/{path}", wait_until="load")
                wide, window = view.evaluate("[document.documentElement.scrollWidth, innerWidth]")
                if wide > window:
                    said.append(f"is {wide} pixels wide")
                said += [f"cut off: {element}" for element in view.evaluate(CUT_OFF)]
                faults += [f"{path} at {width} pixels: {words}" for words in said]
                said.clear()
                if options.screenshots:
                    options.screenshots.mkdir(parents=True, exist_ok=True)
                    name = f"{path.parent.name or 'index'}-{width}.png"
                    view.screenshot(path=options.screenshots / name)
        chromium.close()
    server.shutdown()
    print(*faults, sep="\n")
    print(f"{len(pages)} pages at {len(WIDTHS)} widths: {len(faults)} faults")
    return int(bool(faults) or not pages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
