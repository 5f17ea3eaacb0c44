"""The site as its readers meet it: read file by file, and seen in a real browser.

It is built from the stored notebooks, in seconds; nothing is executed.  The browser is Debian's `chromium` with
`chromium-driver`.  Where they are missing, the tests that need them are skipped, unless KDLIB_NEEDS_BROWSER is set.
"""

import _thread
import functools
import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from tools import api, chapters, idea
from tools import site as builder

PHONE, LAPTOP = 390, 1280  # CSS pixels


@pytest.fixture(scope="module")
def html(root) -> Path:
    """The folder of the site; built if it is not there or not up to date."""
    assert builder.main(root) == 0
    return root / builder.CHECKED / "html"


LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


class Page(HTMLParser):
    """What a page refers to: its anchors, its links, and what a browser loads by itself."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        said = dict(attributes)
        if "id" in said:
            self.anchors.add(said["id"])
        if tag == "a" and said.get("href"):
            self.links.append(said["href"])
        if said.get(LOADED.get(tag, "")) and said.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.append(said[LOADED[tag]])


read = functools.cache(Page)  # a page is asked for by several tests
derived = functools.cache(api.derived)


def pages(folder: Path) -> dict[str, Page]:
    """The pages by their path; the theme leaves templates in _static, which are none."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*.html"))]
    return {str(path): read(folder / path) for path in paths if path.parts[0] != "_static"}


def outside(address: str) -> bool:
    """Whether an address leads to another server."""
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme in ("http", "https", "ftp")


def broken_links(folder: Path) -> list[str]:
    """Links within the site that lead to no file or to no anchor, and things to load that are not there."""
    found, all_pages = [], pages(folder)
    for name, page in all_pages.items():
        for address in [*page.links, *page.loaded]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            if not target.is_file():
                found.append(f"{name}: {address} does not exist")
            elif parts.fragment and target.suffix == ".html":
                there = all_pages[str(target.relative_to(folder.resolve()))].anchors
                if unquote(parts.fragment) not in there:
                    found.append(f"{name}: {address} has no such anchor")
    return found


def loaded_from_outside(folder: Path) -> list[str]:
    """What a browser would fetch from elsewhere: by the pages, and by the style sheets."""
    found = [f"{name}: {src}" for name, page in pages(folder).items() for src in page.loaded if outside(src)]
    for sheet in sorted(folder.rglob("*.css")):
        used = re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""", sheet.read_text())
        found += [f"{sheet.relative_to(folder)}: {address}" for address in used if outside(address)]
    return found


def test_nothing_is_loaded_from_outside(html):
    assert loaded_from_outside(html) == []
    assert (html / "_static" / "mathjax" / "tex-chtml.js").exists()


def test_links_and_anchors_resolve(html):
    assert broken_links(html) == []
    assert sum(len(page.links) for page in pages(html).values()) > 500


def test_these_two_checks_catch_their_mistakes(tmp_path):
    (tmp_path / "style.css").write_text('@import "https://a.example/x.css"; a { background: url(//b.example/y.png) }')
    (tmp_path / "page.html").write_text(
        '<h1 id="here"><a href="#here">good</a><a href="#gone">x</a><a href="page.html#gone">x</a>'
        '<a href="none.html">x</a><a href="https://c.example">to read, not to load</a><img src="none.png">'
        '<script src="http://d.example/z.js"></script><link rel="stylesheet" href="//e.example/z.css">'
    )
    broken = ["#gone has", "page.html#gone has", "none.html does", "none.png does"]
    found = broken_links(tmp_path)
    assert len(found) == 4 and all(any(f": {part}" in line for line in found) for part in broken)
    addresses = ["http://d.example/z.js", "//e.example/z.css", "https://a.example/x.css", "//b.example/y.png"]
    assert [line.split(": ")[1] for line in loaded_from_outside(tmp_path)] == addresses


REAL = chapters.chapters()


@pytest.mark.parametrize("chapter", REAL, ids=[chapter.name for chapter in REAL])
def test_a_chapter_offers_its_files(html, chapter):
    page = read(html / "chapters" / f"{chapter.name}.html")
    offered = {Path(link).name: page.path.parent / link for link in page.links if "_downloads" in link}
    assert set(offered) == {chapter.source.name, chapter.notebook.name}
    assert offered[chapter.source.name].read_text() == chapter.source.read_text()
    cells = [nbformat.read(path, as_version=4).cells for path in (offered[chapter.notebook.name], chapter.notebook)]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("chapter", REAL, ids=[chapter.name for chapter in REAL])
def test_a_chapter_links_to_what_the_library_took_from_it_and_back(html, root, chapter):
    page = read(html / "chapters" / f"{chapter.name}.html")
    for entry in derived(root).get(chapter.name, []):
        name = f"{entry.module}.{entry.name}" if entry.name else f"module-{entry.module}"
        assert f"../api/{entry.module}.html#{name}" in page.links, name
        back = read(html / "api" / f"{entry.module}.html").links
        assert f"../chapters/{chapter.name}.html" in back, name


@pytest.mark.parametrize(("lines", "folded"), [(builder.LONG, False), (builder.LONG + 1, True)])
def test_a_long_output_is_folded(lines, folded):
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text="a\n" * lines)])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell])
    page = builder.chapter_page(notebook, REAL[0], [])
    assert page.cells[1].metadata.get("tags", []) == ["hide-output"] * folded


def test_the_library_names_the_chapter_that_derives_a_function(root):
    names = {f"{entry.module}.{entry.name}" for entry in derived(root)["01_distillation"]}
    assert {"kdlib.losses.kl_divergence", "kdlib.losses.distillation_loss", "kdlib.methods.kd."} <= names


def test_every_public_function_is_on_a_page(html, root):
    shown = {name: read(html / "api" / f"{name}.html").anchors for name in api.modules(root)}
    public = [f"{module}.{name}" for name, where in chapters.library_names(root).items() for module in where]
    assert [name for name in public if name not in shown[name.rpartition(".")[0]]] == []


def figures_of(chapter: chapters.Chapter) -> int:
    """How many pictures the cells of a chapter have drawn."""
    cells = nbformat.read(chapter.notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs)


@pytest.mark.parametrize("chapter", REAL, ids=[chapter.name for chapter in REAL])
def test_equations_and_figures_are_numbered_by_chapter(html, chapter):
    text = (html / "chapters" / f"{chapter.name}.html").read_text()
    labels = re.findall(r"\$\$ \((eq-[\w-]+)\)$", chapter.source.read_text(), re.MULTILINE)
    equations = re.findall(r'<span class="eqno">\((\d+\.\d+)\)', text)
    figures = re.findall(r'<span class="caption-number">Figure (\d+\.\d+)', text)
    for count, found in ((len(labels), equations), (figures_of(chapter), figures)):
        assert found == [f"{int(chapter.name[:2])}.{n}" for n in range(1, count + 1)]


def test_a_reference_to_an_equation_shows_its_number(html):
    text = (html / "chapters" / "01_distillation.html").read_text()
    assert re.search(r'href="#equation-eq-dist-softmax"[^>]*>\(1\.1\)', text)


def test_the_front_figure_is_what_its_script_draws_and_small(root, tmp_path):
    (tmp_path / idea.TARGET.parent).mkdir(parents=True)
    idea.main(tmp_path)
    stored = (root / idea.TARGET).read_bytes()
    assert (tmp_path / idea.TARGET).read_bytes() == stored, "run `python -m tools.idea`"
    assert len(stored) <= 60_000


# What only a browser can tell.

LOOK = """
const done = arguments[arguments.length - 1];
// Not MathJax's promise: asked for too early it may be one that is never kept.  What counts is the page.
const begun = Date.now();
const typeset = () => [...document.querySelectorAll("article .math")].every((e) => e.querySelector("mjx-container"));
const look = () => {
  if (window.MathJax && !typeset() && Date.now() - begun < 60000) return setTimeout(look, 100);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (/\\$|\\\\\\(|\\\\\\[/.test(node.data) && !node.parentElement.closest("code, pre, script, style, mjx-container"))
      found.push("raw formula: " + node.data.trim().slice(0, 60));
  }
  const formulas = [...document.querySelectorAll("article .math")];
  for (const formula of formulas) {
    const box = formula.querySelector("mjx-container");
    const shut = formula.closest("details:not([open])");
    if (!box || !(shut || box.getBoundingClientRect().width > 0))
      found.push("formula without a size: " + formula.textContent.slice(0, 60));
  }
  for (const error of document.querySelectorAll("mjx-merror, mjx-container [style*='color: red']"))
    found.push("formula that MathJax refuses: " + (error.getAttribute("data-mjx-error") || error.textContent));
  const figures = [...document.querySelectorAll("article img")];
  for (const image of figures) {
    const name = image.src.split("/").pop(), box = image.getBoundingClientRect();
    const caption = image.closest("figure")?.querySelector("figcaption");
    if (!image.complete || image.naturalWidth < 100 || box.width < 100) found.push("figure without a size: " + name);
    if (!image.alt || image.alt.includes(".png")) found.push("figure without alt text: " + name);
    if (!caption || caption.textContent.trim().length < 20) found.push("figure without a caption: " + name);
  }
  done({found, formulas: formulas.length, figures: figures.length,
        cells: document.querySelectorAll("div.highlight pre").length,
        copy: document.querySelectorAll("button.copybtn").length});
};
look();
"""

# Wider than the window, or sticking out of it where nothing scrolls.
WIDTH = """
const found = [], width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > width)
  found.push("the page is " + document.documentElement.scrollWidth + " wide");
const scrolls = (e) => e && e !== document.body && (["auto", "scroll"].includes(getComputedStyle(e).overflowX)
  && e.getBoundingClientRect().right <= width + 1 || scrolls(e.parentElement));
for (const e of document.querySelectorAll(
    "article :is(h1, h2, h3, p, li, dt, dd, pre, table, td, img, figcaption, code, mjx-math, .eqno)"))
  if ((e.getBoundingClientRect().right > width + 1 || e.getBoundingClientRect().left < -1) && !scrolls(e.parentElement))
    found.push("<" + e.localName + "> sticks out: " + e.textContent.trim().slice(0, 60));
return found;
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """With threads that coverage does not trace: of two that begin at once, Python 3.11 may end one unanswered."""

    def process_request(self, request, client_address):
        _thread.start_new_thread(self.process_request_thread, (request, client_address))


@pytest.fixture(scope="module")
def serve() -> Iterator:
    """A function that serves a folder on loopback and returns its address."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium that can reach loopback only and keeps a log of what it was asked to fetch."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "no Chromium: install Debian's chromium and chromium-driver"
        pytest.fail(reason) if os.environ.get("KDLIB_NEEDS_BROWSER") else pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_script_timeout(120)
    yield chrome
    chrome.quit()


def resize(browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requests(browser) -> list[str]:
    """The addresses that were asked for since the last look."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def visit(browser, address: str) -> dict:
    """Open a page and look at it at both widths, the whole book also as it is printed; `found` holds the complaints."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what earlier pages left there
    resize(browser, LAPTOP)
    browser.get(address)
    seen = browser.execute_async_script(LOOK)
    for width in (LAPTOP, PHONE):
        resize(browser, width)
        seen["found"] += [f"at {width} pixels: {line}" for line in browser.execute_script(WIDTH)]
    if address.endswith("/print.html"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        seen["found"] += [f"in print: {line}" for line in browser.execute_async_script(LOOK)["found"]]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    seen["found"] += [f"console: {e['message']}" for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    home = "{0.scheme}://{0.netloc}/".format(urlsplit(address))
    asked = [url for url in requests(browser) if not url.startswith((home, "data:", "blob:"))]
    seen["found"] += [f"asked for {url}" for url in asked]
    return seen


@pytest.fixture(scope="module")
def seen(html, serve, browser) -> dict[str, dict]:
    """What a visit to each page shows."""
    address = serve(html)
    return {name: visit(browser, f"{address}/{name}") for name in pages(html)}


def test_every_page_is_well(seen):
    assert {name: page["found"] for name, page in seen.items() if page["found"]} == {}


def test_all_was_looked_at(seen):
    """Counts, so that a page that shows nothing is not taken for one without faults."""
    single = [page for name, page in seen.items() if name != "print.html"]
    total = {what: sum(page[what] for page in single) for what in ("formulas", "figures")}
    print(f"{len(seen)} pages, {total['figures']} figures, {total['formulas']} formulas")
    assert {chapter.name: seen[f"chapters/{chapter.name}.html"]["figures"] for chapter in REAL} == {
        chapter.name: figures_of(chapter) for chapter in REAL
    }
    assert seen["chapters/01_distillation.html"]["formulas"] > 100
    assert seen["index.html"]["figures"] == 1
    assert {what: seen["print.html"][what] for what in total} == total, "the page for printing holds the whole book"


def test_code_cells_have_a_copy_button(seen):
    for name, page in seen.items():
        assert page["copy"] == page["cells"], name
    assert seen["chapters/01_distillation.html"]["copy"] > 50


def results(browser, address: str, word: str) -> list[str]:
    """The pages that the site's own search finds for a word."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/search.html?q={word}")
    summary = "return document.querySelector('.search-summary')?.textContent ?? ''"
    finished = re.compile("found|did not match")
    WebDriverWait(browser, 60).until(lambda b: finished.search(b.execute_script(summary)))
    # A function that is found by its name is listed without a quotation.
    texts = "document.querySelectorAll('#search-results li:not(.kind-object)')"
    quoted = f"return [...{texts}].every(e => e.querySelector('p.context'))"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(quoted))
    links = "return [...document.querySelectorAll('#search-results ul.search a')].map(a => a.href)"
    return browser.execute_script(links)


def test_search(html, serve, browser):
    address = serve(html)
    assert any("/notation.html" in link for link in results(browser, address, "influence"))
    assert len(browser.execute_script("return document.querySelector('#search-results').textContent")) > 300
    assert [line for line in browser.execute_async_script(LOOK)["found"] if line.startswith("raw")] == []
    assert results(browser, address, "zyxwv") == []


def test_light_and_dark(html, serve, browser):
    address = serve(html)
    brightness = {}
    for mode in ("light", "dark"):
        browser.get(f"{address}/index.html")
        browser.execute_script("localStorage.setItem('mode', arguments[0])", mode)
        browser.refresh()
        colors = browser.execute_script(
            "return [document.body, document.querySelector('article p')].map((e, i) =>"
            " getComputedStyle(e)[i ? 'color' : 'backgroundColor'])"
        )
        brightness[mode] = [sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in colors]
        inverted = browser.execute_script("return getComputedStyle(document.querySelector('img.idea')).filter")
        assert inverted.startswith("invert") == (mode == "dark"), "the figure's paper has the colour of the page"
    assert brightness["light"][0] > 200 > 80 > brightness["light"][1]
    assert brightness["dark"][0] < 80 < 200 < brightness["dark"][1]


def test_a_page_can_be_printed(html, serve, browser):
    """A short one: the book as it is printed has been looked at, and to make a file of all of it takes a minute."""
    browser.get(f"{serve(html)}/notation.html")
    browser.execute_async_script(LOOK)
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert len(pdf) > 100_000


FAULTS = {
    "<p>The cost is $x^2$.</p>": "raw formula: The cost is $x^2$.",
    r"<p>The cost is \(x^2\).</p>": r"raw formula: The cost is \(x^2\).",
    '<span class="math">x</span>': "formula without a size: x",
    '<mjx-merror data-mjx-error="Undefined">x</mjx-merror>': "formula that MathJax refuses: Undefined",
    r'<mjx-container><i style="color: red">\nosuch</i></mjx-container>': r"formula that MathJax refuses: \nosuch",
    '<img src="none.png" alt="A line.">': "figure without a size: none.png",
    '<img src="wide.svg">': "figure without alt text: wide.svg",
    '<img src="wide.svg" alt="A line."><figure></figure>': "figure without a caption: wide.svg",
    '<p style="width: 500px">wide</p>': "at 390 pixels: the page is",
    '<div style="overflow: hidden"><p style="width: 500px">cut</p></div>': "at 390 pixels: <p> sticks out: cut",
    '<p style="width: 1400px">wide</p>': "at 1280 pixels: the page is",
    '<style>@media print { img { display: none } }</style><img src="wide.svg">': "in print: figure without a size",
    "<script>throw Error('no good')</script>": "console: ",
    '<script src="http://elsewhere.example/x.js"></script>': "asked for http://elsewhere.example/x.js",
    '<style>p { background: url("http://elsewhere.example/y.png") }</style><p>x': "asked for http://elsewhere.example/y",
}


def test_a_good_page_passes(serve, browser, tmp_path):
    page = '<link rel="icon" href="data:,"><article><p>Good, for <code>$5</code>.</p></article>'
    (tmp_path / "page.html").write_text(page)
    assert visit(browser, f"{serve(tmp_path)}/page.html")["found"] == []


@pytest.mark.parametrize(("fault", "complaint"), FAULTS.items())
def test_each_fault_is_seen(serve, browser, tmp_path, fault, complaint):
    (tmp_path / "wide.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="200" height="100"></svg>')
    page = f'<!doctype html><link rel="icon" href="data:,"><body style="margin: 0"><article>{fault}</article>'
    (tmp_path / "print.html").write_text(page)
    found = visit(browser, f"{serve(tmp_path)}/print.html")["found"]
    assert any(line.startswith(complaint) for line in found), found
