"""What is wrong with a page of the built book, as a reader's browser sees it.

`page_faults` opens one page of a served folder in headless Chromium and gives one sentence for each
fault. test_book.py holds the book to it, and shows on bad pages that each fault is found.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
LOOKS = {
    "light": {"color_scheme": "light", "viewport": WIDE},
    "dark": {"color_scheme": "dark", "viewport": WIDE},
    "phone": {"color_scheme": "light", "viewport": PHONE},
}
PATIENCE = 60_000  # milliseconds; a busy machine needs ten of them for a page

# Everything that a script draws after the page has loaded.
READY = """() =>
  document.fonts.status === 'loaded'
  && [...document.querySelectorAll('.math')].every((e) => e.querySelector('mjx-container'))
  && [...document.querySelectorAll('.mermaid')].every(
       (e) => e.querySelector('svg[aria-roledescription]'))
  && document.querySelectorAll('.widget-subarea').length >= document.querySelectorAll(
       'script[type="application/vnd.jupyter.widget-view+json"]').length"""

FAULTS = """() => {
  const faults = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const say = (elements, fault, name) =>
    elements.forEach((e) => faults.push(fault + ': ' + String(name(e)).trim().slice(0, 80)));
  const text = (e) => e.textContent;

  say(all('.math').filter((e) => !e.querySelector('mjx-container')), 'maths is not typeset', text);
  say(all('mjx-merror, [data-mjx-error]'), 'maths has an error', text);
  const charts = all('.mermaid');
  say(charts.filter((e) => !e.querySelector('svg')), 'a diagram is not drawn', text);
  say(charts.filter((e) => e.querySelector('[aria-roledescription=error]')),
      'a diagram has an error', text);
  say(charts.filter((e) => !e.querySelector('svg[aria-describedby], svg[aria-labelledby]')),
      'a diagram has no description', text);
  const views = all('script[type="application/vnd.jupyter.widget-view+json"]').length;
  const drawn = all('.widget-subarea').filter((e) => e.querySelector('.jupyter-widgets')).length;
  if (drawn < views) faults.push(`widgets are missing: ${drawn} of ${views} are drawn`);

  say(all('img').filter((e) => !e.complete || !e.naturalWidth),
      'an image is missing', (e) => e.src);
  say(all('img').filter((e) => !e.alt.trim() || /\\.(png|svg|jpe?g)$/.test(e.alt)),
      'an image has no alternative text', (e) => e.src);

  const root = document.documentElement;
  const over = root.scrollWidth - root.clientWidth;
  if (over > 0) faults.push(`the page is ${over} px wider than the screen`);

  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const solid = (e) => {
    for (; e; e = e.parentElement) {
      const [r, g, b, a = 1] = numbers(getComputedStyle(e).backgroundColor);
      if (a > 0.5) return [r, g, b];
    }
    return root.dataset.theme === 'dark' ? [0, 0, 0] : [255, 255, 255];
  };
  const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const c = rgb[i] / 255;
    return sum + weight * (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  }, 0);
  const contrast = (e) => {
    const [low, high] = [light(numbers(getComputedStyle(e).color)), light(solid(e))].sort(
      (a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const words = all('.bd-article :is(p, li, th, td, caption, dt, dd, h1, h2, h3)').filter(
    (e) => e.textContent.trim() && e.getClientRects().length);
  say(words.filter((e) => contrast(e) < 4.5), 'text is hard to read', text);
  return faults;
}"""


def browser_path() -> str | None:
    """Path of an installed Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing about requests."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # a page asks for dozens of files at once; five is the default
    daemon_threads = True


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve `folder` on this machine alone, at a port the system chose; yields the address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def page_faults(context: object, address: str, name: str, patience: int = PATIENCE) -> list[str]:
    """Faults of the page `name` below `address` in a Playwright browser context.

    Requests that leave `address` are stopped, so the check itself reaches nothing outside.
    """
    from playwright.sync_api import TimeoutError as TooSlow

    faults = []
    page = context.new_page()
    inside = (address, "data:", "blob:")

    def guard(route: object) -> None:
        if route.request.url.startswith(inside):
            route.continue_()
        else:
            faults.append(f"a request leaves the page: {route.request.url}")
            route.abort()

    page.route("**/*", guard)
    page.on("pageerror", lambda error: faults.append(f"a script failed: {error}"))
    page.on(
        "console",
        lambda message: message.type == "error" and faults.append(f"console: {message.text}"),
    )
    page.goto(address + name, timeout=patience)
    with contextlib.suppress(TooSlow):
        page.wait_for_function(READY, timeout=patience)
    page.wait_for_load_state("networkidle", timeout=patience)
    faults += page.evaluate(FAULTS)
    page.close()
    return faults
