"""The page of `rectify serve` in a real browser without a window: whether it does what it is for, and nothing else.

python eval/page_check.py --screenshot page.png
python eval/page_check.py --browser /usr/bin/chromium --scorer stub

It needs a Chromium, and playwright to steer it (`pip install playwright`; a browser of its own is not needed). What the
page shows is held against what the server answers to the same text. One line a check goes to standard output, `ok` or
`FAILED`; the exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from server_load import health, serving  # beside this file

from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError, RectifyError, first_line
from rectify.scoring.wire import ANALYZE_PATH, MAX_BYTES, analyze_body

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 30
SENTENCES = ["Thank you, that was lovely 😀.", "You are a stupid idiot!", "See you at ten."]
MARKUP = 'Look: <img src=x onerror="window.ran = 1"> <b>bold</b> &amp; <script>window.ran = 1</script>. And on it goes.'
KEY = "a key & more"


def make_parser() -> Parser:
    parser = Parser(prog="page_check.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--scorer", default="pocket", help="as in `rectify serve` (default: %(default)s)")
    parser.add_argument("--browser", metavar="PATH", help="of a Chromium (default: the first found of that name)")
    parser.add_argument("--screenshot", type=Path, metavar="FILE", help="a picture of the page with scores, as PNG")
    return parser


class Checks:
    """Prints a line a check, and counts those that failed."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, found: Any, wanted: Any = True) -> None:
        """One check: what was found must equal what is wanted."""
        right = found == wanted
        self.failed += not right
        print(f"ok      {what}" if right else f"FAILED  {what}: {found!r}, not {wanted!r}", flush=True)


class ScorePage:
    """The page as a person sees it, opened in a browser, with a record of what it does besides.

    Attributes:
        errors: what went to the console as an error, or was thrown, but for refusals by the server.
        addresses: of all that was asked for.
    """

    def __init__(self, browser: Browser, url: str) -> None:
        self.errors: list[str] = []
        self.addresses: list[str] = []
        self.url = url
        self.page: Page = browser.new_page(viewport={"width": 800, "height": 1000})
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(f"{url}/")

    def _note(self, message: Any) -> None:
        # a browser names each answer above 399 there; those to calls are for the page to show
        refusal = message.text.startswith("Failed to load resource") and ANALYZE_PATH in message.location["url"]
        if message.type == "error" and not refusal:
            self.errors.append(message.text)

    def score(self, text: str, key: str | None = None) -> str:
        """Type a text, and a key, press the button, and read the status line once an answer is there."""
        self.page.fill("#text", text)
        if key is not None:
            self.page.fill("#key", key)
        self.page.click("#score")
        self.page.locator("#score:enabled").wait_for()
        return self.page.inner_text("#status")

    def rows(self) -> dict[str, str]:
        """The score of each attribute, as shown."""
        rows = self.page.locator("#result tbody tr")
        names, scores = rows.locator("th").all_inner_texts(), rows.locator("output").all_inner_texts()
        return dict(zip(names, scores, strict=True))

    def marks(self) -> list[tuple[str, str]]:
        """Each highlighted sentence, and the number at its end."""
        numbers = self.page.locator("#marked mark small").all_inner_texts()
        whole = self.page.locator("#marked mark").all_text_contents()
        return [(text.removesuffix(number), number) for text, number in zip(whole, numbers, strict=True)]

    def strengths(self) -> list[float]:
        """How opaque the background of each highlighted sentence is drawn, from 0 to 1."""
        script = "marks => marks.map(mark => getComputedStyle(mark).backgroundColor)"
        drawn = self.page.locator("#marked mark").evaluate_all(script)  # color(srgb 1 0.5 0.4 / 0.25)
        return [float(colour.rstrip(")").partition("/")[2] or 1) for colour in drawn]

    def shown_text(self) -> str:
        """The text under the scores, without the numbers in it."""
        script = "node => [...node.childNodes].map(part => (part.firstChild || part).textContent).join('')"
        return self.page.locator("#marked").evaluate(script)

    def show(self, attribute: str) -> None:
        """Choose whose scores the sentences have."""
        self.page.select_option("#shown", attribute)


def ask(url: str, text: str, attributes: list[str]) -> dict[str, Any]:
    """What the server answers to the call that the page should make."""
    body = analyze_body(text, attributes, languages=(), span_annotations=True)
    return requests.post(url + ANALYZE_PATH, json=body, timeout=SECONDS).json()


def check_scores(check: Checks, browser: Browser, url: str, screenshot: Path | None) -> None:
    """A server that wants no key."""
    about = health(url)
    names = about["attributes"]
    page = ScorePage(browser, url)
    named = f"{about['scorer']['name']}, revision {about['scorer']['revision']}"
    check("the page names the scorer and its revision", named in page.page.inner_text("main"))
    check("no key is asked for where none is needed", page.page.locator("#key").count(), 0)

    text = "  ".join(SENTENCES)
    status, scores = page.score(text), ask(url, text, names)["attributeScores"]
    summary = {name: f"{scores[name]['summaryScore']['value']:.3f}" for name in names}
    check("the status line says that the text is scored", status, f"Scored: {names[0]} {summary[names[0]]}.")
    check("the table has the score of every attribute", page.rows(), summary)
    check("the sentences given are highlighted", [sentence for sentence, _ in page.marks()], SENTENCES)
    check("the text is shown whole", page.shown_text(), text)
    shown, drawn = {}, {}
    for name in names:
        page.show(name)
        shown[name], drawn[name] = [number for _, number in page.marks()], page.strengths()
    spans = {name: [span["score"]["value"] for span in scores[name]["spanScores"]] for name in names}
    numbers = {name: [f"{value:.2f}" for value in values] for name, values in spans.items()}
    check("the sentences have the scores of the attribute chosen", shown, numbers)
    pairs = [pair for name in names for pair in zip(drawn[name], spans[name], strict=False)]
    close = max((abs(strength - value) for strength, value in pairs), default=1.0) < 0.01
    check("a sentence is highlighted as strongly as its score is high", close)
    if numbers[names[0]] != numbers[names[-1]]:
        check("another attribute changes the highlights", drawn[names[0]] != drawn[names[-1]])
    page.show(names[0])
    if screenshot:
        page.page.screenshot(path=screenshot, full_page=True)

    asked = len(page.addresses)
    page.score("")
    check("an empty text is not sent", len(page.addresses), asked)
    check("an empty text is marked as missing", page.page.locator("#text:invalid").count(), 1)
    for what, refused in (("blank", "   "), ("too long", "a" * (MAX_BYTES + 1))):
        message = ask(url, refused, names)["error"]["message"]
        check(f"a text that is {what} gets the server's error", page.score(refused), f"No score: {message}")
        check(f"a text that is {what} has no scores shown", page.page.locator("#result").is_visible(), False)

    check("a text with HTML is scored", page.score(MARKUP).startswith("Scored"))
    check("HTML in a text is shown as text", page.shown_text(), MARKUP)
    check("HTML in a text makes no elements", page.page.locator("#result :is(img, script, b)").count(), 0)
    check("HTML in a text does not run", page.page.evaluate("window.ran === undefined"))
    check_quiet(check, page)


def check_key(check: Checks, browser: Browser, url: str) -> None:
    """A server that wants `KEY`."""
    page = ScorePage(browser, url)
    asked = len(page.addresses)
    page.score(SENTENCES[0])
    check("without a key nothing is sent", len(page.addresses), asked)
    check("a wrong key gets the server's error", page.score(SENTENCES[0], "wrong").startswith("No score: API key"))
    check("the right key gets a score", page.score(SENTENCES[0], KEY).startswith("Scored"))
    check("what is typed as a key is hidden", page.page.get_attribute("#key", "type"), "password")
    check("the key is in no address", [address for address in page.addresses if "key" in address], [])
    check_quiet(check, page, "with a key: ")


def check_quiet(check: Checks, page: ScorePage, where: str = "") -> None:
    """Nothing has gone wrong, or elsewhere."""
    known = (f"{page.url}/", "data:")
    check(f"{where}nothing is asked of another host", [url for url in page.addresses if not url.startswith(known)], [])
    check(f"{where}no error on the console", page.errors, [])


@contextmanager
def browser_at(path: str | None) -> Iterator[Browser]:
    """A browser for the time of a `with` block.

    Raises:
        RectifyError: playwright or the browser is not there, or does not start.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise RectifyError(f"{error.name} is not installed: pip install playwright") from error
    found = shutil.which(path) if path else next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        wanted = path or ", ".join(BROWSERS)
        raise InvalidArgumentError(f"browser is {path!r}: no program {wanted}: give the path of a Chromium")
    with sync_playwright() as playwright:
        try:  # its sandbox does not start for root
            browser = playwright.chromium.launch(executable_path=found, chromium_sandbox=os.geteuid() != 0)
        except Error as error:
            raise RectifyError(f"browser {found!r} does not start ({first_line(error)}): give another") from error
        say(f"{found}, version {browser.version}")
        with browser:
            yield browser


def run(arguments: argparse.Namespace) -> None:
    check, flags = Checks(), ["--scorer", arguments.scorer]
    with browser_at(arguments.browser) as browser:
        from playwright.sync_api import Error  # it is there by now

        for key in ("", KEY):
            with serving(flags, key) as url:
                try:
                    if key:
                        check_key(check, browser, url)
                    else:
                        check_scores(check, browser, url, arguments.screenshot)
                except Error as error:
                    check("the page can be used to the end", first_line(error), "")
    if check.failed:
        say(f"{check.failed} checks failed")
        sys.exit(1)


def main() -> int:
    return execute(run, make_parser(), None)


if __name__ == "__main__":
    sys.exit(main())
