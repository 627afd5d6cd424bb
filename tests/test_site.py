"""Opens the built site in a headless browser, without a network. `make docs` runs it.

The screenshots are in build/docs-screenshots.
"""

import base64
import os
import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which `make docs` installs")

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build/docs"
PICTURES = ROOT / "build/docs-screenshots"
PAGES = sorted(
    str(p.relative_to(SITE)) for p in SITE.glob("**/*.html") if "_static" not in p.relative_to(SITE).parts
)
LOOKED_AT = (
    "index.html",
    "quickstart.html",
    "rules.html",
    "math.html",
    "monitoring.html",
    "experiment.html",
    "how-it-works.html",
    "api/buckets.html",
)
SCHEMES = ("light", "dark")
WIDTHS = {"desktop": 1280, "mobile": 390}
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

pytestmark = pytest.mark.skipif(not PAGES, reason="needs the built site: make docs")

# The area of each element, and the contrast of its text with the background of the page.
LOOK = """selector => Array.from(document.querySelectorAll(selector), e => {
    const luminance = color => {
        const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(x => {
            x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4 });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b };
    const box = e.getBoundingClientRect();
    const [dark, light] = [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]
        .map(luminance).sort((a, b) => a - b);
    return {text: e.textContent, left: box.left, right: box.right, width: box.width, height: box.height,
            contrast: (light + 0.05) / (dark + 0.05)} })"""
# The number of colours in a picture, of one pixel in seven.
COLOURS = """async url => {
    const picture = await createImageBitmap(await (await fetch(url)).blob());
    const canvas = new OffscreenCanvas(picture.width, picture.height);
    const context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0);
    const pixels = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    return new Set(pixels.filter((_, i) => i % 7 == 0)).size }"""


def executable(player):
    """The path of a browser: of the system, or None for the one that playwright has installed."""
    for name in NAMES:
        if shutil.which(name):
            return shutil.which(name)
    if not Path(player.chromium.executable_path).exists():
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(f"needs a browser: install one of {', '.join(NAMES)}")
    return None


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=executable(player), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(scope="module", params=WIDTHS)
def width(request):
    return request.param


@pytest.fixture(scope="module")
def tab(browser, scheme, width):
    """A page of the browser. Requests to other machines fail, and `tab.faults` has them and all errors."""
    context = browser.new_context(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme)
    faults = []

    def route(route):
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            faults.append(f"request to {route.request.url}")
            route.abort()

    context.route("**/*", route)
    tab = context.new_page()
    tab.on("console", lambda m: m.type in ("error", "warning") and faults.append(f"console: {m.text}"))
    tab.on("pageerror", lambda error: faults.append(f"error: {error}"))
    tab.on("requestfailed", lambda request: faults.append(f"not loaded: {request.url}"))
    tab.faults = faults
    yield tab
    context.close()


def opened(tab, page):
    tab.faults.clear()
    tab.goto((SITE / page).as_uri(), wait_until="load")
    return tab


def picture(browser, tab, name):
    """Saves a screenshot and returns the number of its colours."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    png = tab.screenshot(path=PICTURES / f"{name}.png")
    other = browser.new_page()  # `tab` refuses data
    colours = other.evaluate(COLOURS, "data:image/png;base64," + base64.b64encode(png).decode())
    other.close()
    return colours


def test_every_page_loads_from_this_machine_and_fits_the_window(tab):
    faults = []
    for page in PAGES:
        opened(tab, page)
        wide = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        faults += [f"{page}: {fault}" for fault in tab.faults]
        faults += [f"{page} is {wide} pixels too wide"] if wide > 0 else []
    assert not faults


@pytest.mark.parametrize("page", LOOKED_AT)
def test_text_can_be_read(browser, tab, scheme, width, page):
    opened(tab, page)
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    texts = tab.evaluate(LOOK, "article h1, article h2, article p:not(:empty)")
    assert len(texts) > 5
    for text in texts:
        assert text["width"] > 0, text
        assert text["height"] > 0, text
        assert text["contrast"] > 4.5, text
        hidden_in_a_table = text["right"] > WIDTHS[width]
        assert not hidden_in_a_table or tab.locator("article table").count(), text
    assert min(text["left"] for text in texts) >= 0
    name = page.removesuffix(".html").replace("/", "-")
    assert picture(browser, tab, f"{name}-{scheme}-{width}") > 20


@pytest.mark.parametrize("page", ["rules.html", "math.html"])
def test_formulas_are_drawn(browser, tab, scheme, width, page):
    opened(tab, page)
    formulas = tab.evaluate(LOOK, "article div.math math")
    assert len(formulas) >= 2
    for formula in formulas:
        assert formula["width"] > 50, formula
        assert formula["height"] > 15, formula
        assert formula["contrast"] > 4.5, formula
        assert "\\" not in formula["text"]
    assert max(formula["height"] for formula in formulas) > 45, "a fraction in braces has three lines"
    braces = tab.evaluate(LOOK, "article div.math mo")
    tall = [brace["height"] for brace in braces if brace["text"] == "{"]
    assert max(tall) > 45, "the brace should be as tall as its lines"
    text = tab.inner_text("article")
    assert not [raw for raw in ("\\frac", "\\begin", "\\langle", "$$") if raw in text]
    assert tab.evaluate("document.fonts.check('16px \"STIX Two Math\"')")
    assert "loaded" in tab.evaluate(
        "[...document.fonts].filter(f => f.family.includes('STIX')).map(f => f.status)"
    )


@pytest.mark.parametrize("page", ["index.html", "monitoring.html", "experiment.html", "how-it-works.html"])
def test_pictures_are_loaded(browser, tab, scheme, width, page):
    opened(tab, page)
    found = tab.locator("article img, article figure svg")
    assert found.count() >= 1
    for image in found.all():
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        assert box["width"] > 200, box
        assert box["x"] + box["width"] <= WIDTHS[width]
        if image.evaluate("e => e.tagName") == "IMG":
            image.evaluate("e => e.decode()")
            assert image.evaluate("e => e.naturalWidth") > 0
    assert picture(browser, tab, f"{page.removesuffix('.html')}-picture-{scheme}-{width}") > 20


def test_the_search_finds_a_name(tab):
    opened(tab, "search.html")
    tab.fill("input[name=q]", "retain_floor")
    tab.press("input[name=q]", "Enter")
    tab.wait_for_selector("#search-results li a", timeout=20_000)
    assert not tab.faults
