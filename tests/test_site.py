"""The site shows the whole book and needs nothing from elsewhere: a small project built with the real builder."""

import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from base64 import b64encode
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fastcore.nbio import mk_cell, new_nb, write_nb
from PIL import Image

from audiomaepp.explorer import explore

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt install chromium)")

HELPER = '''#| exporti
def halve(
    x: float, # number to halve
) -> float: # half of it
    "Return half of a number."
    return x / 2'''
PUBLIC = '''#| export
def quarter(
    x: float, # number to quarter
) -> float: # a fourth of it
    "Return a fourth of a number."
    return halve(halve(x))'''


def figure(source, width=900):
    "A cell with a picture as its output."
    Image.new("RGB", (width, 90), "white").save(png := BytesIO(), "png")
    data = {"image/png": b64encode(png.getvalue()).decode(), "text/plain": "<Figure>"}
    return mk_cell(source, outputs=[dict(output_type="display_data", data=data, metadata={})])


def table(source, columns=30):
    "A cell with a wide table as its output."
    row = "".join(f"<td style='text-align:right'>{10**6 + i}</td>" for i in range(columns))
    data = {"text/html": f"<table><tbody><tr><td>name of a row</td>{row}</tr></tbody></table>"}
    return mk_cell(source, outputs=[dict(output_type="display_data", data=data, metadata={})])


def build(folder, cells):
    "Build the site of a project with one chapter of `cells`; return the finished process."
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "nbs").mkdir()
    (folder / "small").mkdir()
    (folder / "small/__init__.py").write_text('__version__ = "0.0.1"\n__all__ = ["quarter"]\n')
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "small"\nversion = "0.0.1"\n[project.urls]\nRepository = "https://github.com/a/small"\n'
        '[tool.nbdev]\nlib_path = "small"\n'
    )
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        (folder / name).write_text(f"# {name}\n")
    home = [mk_cell(text, "markdown") for text in ("# small\n\n> A small book", "See [`halve`](numbers.html#halve).")]
    home.append(mk_cell("![A map of two clips](images/map.png)\n\n![A picture](images/other.png)", "markdown"))
    write_nb(new_nb(home), folder / "nbs/index.ipynb")
    (folder / "nbs/images").mkdir()
    for name in ("map", "other"):
        Image.new("RGB", (90, 90), "white").save(folder / f"nbs/images/{name}.png")
    explorer = explore(np.zeros((2, 2)), {"name": ["dog", "rain"]}, held_out="two clips", title="Two clips")
    (folder / "nbs/images/map.json").write_text(json.dumps(explorer.payload))
    head = [mk_cell("# Numbers\n\n> Parts of numbers", "markdown"), mk_cell("#| default_exp numbers")]
    write_nb(new_nb([*head, *cells]), folder / "nbs/00_numbers.ipynb")
    env = {**os.environ, "PYTHONPATH": str(folder)}
    env.pop("IN_TEST", None)
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    for command in (["-c", export], ["docs/build.py", "site"]):
        done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    return done


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A built project whose chapter has one cell of each kind."
    folder = tmp_path_factory.mktemp("small")
    long_line = "eighth = " + " + ".join(["quarter(4) / 8"] * 20)
    done = build(folder, [
        mk_cell("First helpers.", "markdown"), mk_cell(HELPER), mk_cell("Then the rest.", "markdown"),
        mk_cell("#| export\nimport math"), mk_cell(PUBLIC), mk_cell("assert quarter(4) == 1\nassert quarter(0) == 0"),
        mk_cell(long_line + "\nassert eighth"), mk_cell("#| export\n_LIMIT = 3 # largest number"),
        mk_cell("#| exporti\ndef _at_most(x): return x"),
        figure('#| fig-alt: A line that "rises"\nplot()'), figure('ax.set(title="Two lines")'), table("wide()"),
    ])  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def chapter(project):
    return (project / "_site/numbers.html").read_text(encoding="utf-8")


class Shown(HTMLParser):
    "The visible text of a page, and that of its closed folds."

    def __init__(self, html):
        super().__init__()
        self.open, self.closed, self.folds, self.summary = "", "", 0, False
        self.feed(html[html.index("<article") : html.index("</article>")])

    def handle_starttag(self, tag, attrs):
        self.folds += tag == "details" and "open" not in dict(attrs)
        self.summary |= tag == "summary"

    def handle_endtag(self, tag):
        self.folds -= tag == "details"
        self.summary &= tag != "summary"

    def handle_data(self, data):
        if self.folds and not self.summary:
            self.closed += data
        else:
            self.open += data


def test_every_exported_cell_can_be_read_where_it_stands(project, chapter):
    page = Shown(chapter)
    assert "halve: Return half of a number." in page.open, "the fold says what is in it"
    for source in ("return x / 2", "return halve(halve(x))", "_LIMIT = 3"):
        assert source in page.closed and source not in page.open
    order = ["First helpers.", 'id="halve"', "Then the rest.", 'id="quarter"', 'id="_limit"']
    assert order == sorted(order, key=chapter.index)
    source = (project / "small/numbers.py").read_text().splitlines()
    line = int(re.search(r'href="https://github.com/a/small/blob/main/small/numbers.py#L(\d+)"', chapter)[1])
    assert source[line - 1].startswith("def halve("), "the source link points to the definition"


def test_only_cells_that_do_nothing_but_check_are_folded(chapter):
    page = Shown(chapter)
    assert "assert quarter(4) == 1" in page.closed and "assert quarter(4) == 1" not in page.open
    assert "assert eighth" in page.open, "an example stays open"


def test_the_reference_has_every_name_the_public_ones_first(project):
    html = (project / "_site/reference.html").read_text(encoding="utf-8")
    page = Shown(html)
    assert "quarter" in page.open and "Return a fourth of a number." in page.open
    assert "halve" not in page.open and "Return half of a number." in page.closed and "largest number" in page.closed
    for name in ("quarter", "halve", "_limit"):
        assert f'href="numbers.html#{name}"' in html
    assert "_at_most" in page.closed, "underscores of a name are not markup"


def test_figures_have_a_text(chapter):
    texts = re.findall(r'<img [^>]*alt="([^"]*)"', chapter)
    assert texts == ["A line that &quot;rises&quot;", "Two lines"]


def test_a_map_is_live_on_the_site_and_a_picture_elsewhere(project):
    home = (project / "_site/index.html").read_text(encoding="utf-8")
    assert '<iframe class="live" src="images/map.html" title="A map of two clips"' in home
    assert 'src="images/other.png"' in home and "images/map.png" not in home
    page = (project / "_site/images/map.html").read_text(encoding="utf-8")
    assert "Two clips" in page and '"dog","rain"' in page and not (project / "_site/images/map.json").exists()


def test_four_places_to_go(project, chapter):
    tabs = re.findall(r'<a href="[^"]*" class="md-tabs__link">\s*(.*?)\s*</a>', chapter, re.S)
    assert tabs == ["Get started", "Guides", "Chapters", "Reference"]


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("html", [
    '<script src="https://cdn.example/x.js"></script>', '<script src=//cdn.example/x.js></script>',
    '<link rel="stylesheet" href="https://fonts.example/css">', '<img alt="a dog" src="http://example/dog.png">',
    "<style>@import 'https://fonts.example/css';</style>", "<p style=\"background: url('https://example/a.png')\">",
    '<img src="a.png">', '<img src="a.png" alt="">',
])  # fmt: skip
def test_a_page_that_needs_the_web_or_hides_a_picture_is_refused(tmp_path, builder, html):
    (tmp_path / "a.html").write_text(html)
    assert len(builder.faults(tmp_path)) == 1


@pytest.mark.parametrize("html", [
    '<a href="https://example.org">a link</a>', '<script src="../assets/x.js"></script>', "<p>src='https://x'</p>",
    '<link rel="canonical" href="https://example.org/a.html">', '<img src="a.png" alt="a dog">',
    '<audio><source src="data:audio/wav;base64,AA"></audio>', "<script>f(`<img src=${x}>`)</script>",
])  # fmt: skip
def test_a_page_that_stands_alone_is_accepted(tmp_path, builder, html):
    (tmp_path / "a.html").write_text(html)
    assert builder.faults(tmp_path) == []


@pytest.mark.slow
def test_the_build_stops_at_a_figure_without_a_text(tmp_path):
    done = build(tmp_path, [mk_cell(HELPER), figure("plot()")])
    assert done.returncode == 1 and "numbers-1.png" in done.stdout and "add `#| fig-alt:`" in done.stdout


def in_browser(page, script, profile, *flags, query=""):
    "Open the file of a page in a browser, run a script in it, and return what the script reports."
    inbox = queue.Queue()

    class Inbox(BaseHTTPRequestHandler):
        def do_POST(self):
            inbox.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Inbox) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        to = f"http://127.0.0.1:{server.server_port}"
        report = f"const report = x => fetch('{to}', {{method: 'POST', mode: 'no-cors', body: JSON.stringify(x)}})"
        until = "const until = async f => { while (!f()) await new Promise(go => setTimeout(go, 50)); return f() }"
        copy = page.with_name(f"probe-{page.name}")
        code = f"<script>{report}; {until}; (async () => {{ {script} }})().catch(e => report(String(e)))</script>"
        copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{code}</body>"), encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
        command += ["--remote-debugging-port=0"]  # or it would end as soon as the page is loaded
        command += [f"--user-data-dir={profile}", copy.as_uri() + query]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return inbox.get(timeout=120)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
            copy.unlink()


WIDTHS = """
const frame = document.body.appendChild(document.createElement("iframe")), found = {};
frame.style.cssText = "width: 390px; height: 844px; border: 0";
for (const page of PAGES) {
  await new Promise(go => { frame.onload = go; frame.src = page });
  const inside = frame.contentDocument;
  for (const fold of inside.querySelectorAll("details")) fold.open = true;
  await new Promise(go => setTimeout(go, 100));
  const elsewhere = frame.contentWindow.performance.getEntriesByType("resource").map(x => x.name);
  found[page] = [inside.documentElement.scrollWidth, elsewhere.filter(x => x.startsWith("http"))];
}
report(found);
"""


def widths(site, profile):
    "The width that each page of a site takes on a phone of 390 pixels, and what it fetches from elsewhere."
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.stem != "404")
    (site / "phone.html").write_text("<!doctype html><body></body>")
    try:
        script = f"const PAGES = {json.dumps(pages)}; {WIDTHS}"
        return in_browser(site / "phone.html", script, profile, "--allow-file-access-from-files")
    finally:
        (site / "phone.html").unlink()


@needs_browser
def test_a_phone_shows_every_page_without_scrolling_sideways(project, tmp_path):
    assert widths(project / "_site", tmp_path) == dict.fromkeys(
        ("CHANGELOG.html", "CONTRIBUTING.html", "images/map.html", "index.html", "numbers.html", "reference.html"),
        [390, []],
    )


@needs_browser
def test_search_works_from_a_file(project, tmp_path):
    script = """
    await until(() => document.querySelector(".md-search-result__item"));
    report([...document.querySelectorAll(".md-search-result__link")].map(link => link.href.split("/").pop()))
    """
    found = in_browser(project / "_site/index.html", script, tmp_path, query="?q=fourth")  # ?q= fills the search field
    assert any(link.startswith("numbers.html") for link in found)


@needs_browser
def test_a_link_to_a_helper_opens_its_fold(project, tmp_path):
    assert 'href="numbers.html#halve"' in (project / "_site/index.html").read_text()
    script = "await until(() => document.getElementById('halve').closest('details').open); report('open')"
    assert in_browser(project / "_site/numbers.html", script, tmp_path, query="#halve") == "open"


@needs_browser
def test_a_wide_table_scrolls_under_its_first_column(project, tmp_path):
    script = """
    const table = await until(() => document.querySelector(".md-typeset__scrollwrap table"));
    const first = table.querySelector("td"), before = first.getBoundingClientRect().left;
    table.closest(".md-typeset__scrollwrap").scrollLeft = 300;
    report([table.closest(".md-typeset__scrollwrap").scrollLeft, first.getBoundingClientRect().left - before])
    """
    scrolled, moved = in_browser(project / "_site/numbers.html", script, tmp_path)
    assert scrolled == 300 and abs(moved) < 1


@needs_browser
@pytest.mark.slow
def test_no_page_of_the_whole_site_is_wider_than_a_phone(tmp_path):
    for name in ("nbs", "docs", "audiomaepp", "pyproject.toml", "CONTRIBUTING.md", "CHANGELOG.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    env.pop("IN_TEST", None)
    command = [sys.executable, "docs/build.py", "site"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = widths(tmp_path / "_site", tmp_path / "profile")
    assert len(found) > 30 and {page: is_ for page, is_ in found.items() if is_ != [390, []]} == {}


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("nbs/tutorials/*.ipynb")))
def test_a_tutorial_opens_in_colab(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    path = f"nbs/tutorials/{name}.ipynb"
    first = "".join(json.loads((ROOT / path).read_text())["cells"][0]["source"])
    address = project.replace("https://github.com/", "https://colab.research.google.com/github/")
    assert f"[Open in Colab]({address}/blob/main/{path})" in first
    assert f"`!pip install git+{project}`" in first  # Colab has no copy of the package
