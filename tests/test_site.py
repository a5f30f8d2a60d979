"The site as its readers get it: built once, its links followed, then driven in a real browser where there is one."
import ast
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from whatmatters.core.ledger import read_ledger, write_ledger

ROOT = Path(__file__).parent.parent
SITE = ROOT/"nbs/site"
CLAIM = "application/vnd.whatmatters.claim+json"


class Page(HTMLParser):
    "What a page refers to, what it can be referred by, its table rows and its words."
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.names, self.classes, self.words, self.figures, self.silent = [], [], set(), [], [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.names |= {a[k] for k in ("id", "name") if a.get(k)}
        self.classes += (a.get("class") or "").split()
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "link" and a.get("href"): self.loads.append(a["href"])
        if a.get("src"): self.loads.append(a["src"])
        if tag == "img": self.figures.append(a.get("alt"))
        if tag in ("script", "style", "pre", "code"): self.silent += 1

    def handle_endtag(self, tag):
        if tag in ("script", "style", "pre", "code"): self.silent -= 1

    def handle_data(self, data):
        if not self.silent: self.words.append(data)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the site: the first worker builds it, the others wait."
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if base.name.startswith("popen-") else base)/"site"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            built = subprocess.run([sys.executable, SITE/"build.py", out], cwd=base, capture_output=True, text=True)
            assert built.returncode == 0, built.stdout + built.stderr
            assert built.stdout.endswith(f"the site: {out/'index.html'}\n") and {p.name for p in out.parent.glob("site*")} == {"site", "site.lock"} and not (out.parent/"jupyter_execute").exists()
    return out


@pytest.fixture(scope="session")
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html") if "_static" not in p.parts}


@pytest.fixture(scope="module")
def build():
    sys.path.insert(0, str(SITE))
    yield __import__("build")
    sys.path.remove(str(SITE))


def records(): return [json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT/"results").glob("*.ipynb"))]


def ledger():
    with open(ROOT/"results/ledger.csv", encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def test_every_link_inside_resolves(site, pages):
    wrong = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme in ("http", "https", "mailto"):
                assert link in page.links, f"{name} loads {link}"
                continue
            target = (site/name).parent/unquote(url.path) if url.path else site/name
            inside = target.resolve().relative_to(site.resolve()).as_posix()
            if not target.is_file() or (url.fragment and inside in pages and unquote(url.fragment) not in pages[inside].names): wrong.append(f"{name}: {link}")
    assert not wrong


def test_every_notebook_is_a_page(pages):
    for path in (ROOT/"nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts: assert path.relative_to(ROOT/"nbs").with_suffix(".html").as_posix() in pages
    assert {"ledger.html", "papers.html", "search.html", "genindex.html"} <= set(pages)


def test_every_run_of_the_record_is_a_page_with_its_claims(pages):
    shown = Counter(p.classes.count("claim") for n, p in pages.items() if n.startswith("experiments/") and "claim" in p.classes)
    assert shown == Counter(sum(CLAIM in o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", [])) for nb in records())
    for nb in records():
        about = nb["metadata"]["whatmatters"]
        texts = ["".join(p.words) for n, p in pages.items() if n.startswith(f"experiments/{about['experiment']}") and "claim" in p.classes]
        assert any(f"{about['device']}, in {about['seconds']:.0f} s" in t and f"torch {about['versions']['torch']}" in t for t in texts)


def test_every_public_name_is_described(pages):
    names = set()
    for path in (ROOT/"pkg/whatmatters").glob("*/*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        public = next((ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), [])
        names |= {f"whatmatters.{path.parent.name}.{path.stem}.{n.name}" for n in body if getattr(n, "name", None) in public}
    assert len(names) > 500 and names <= set().union(*(p.names for p in pages.values()))


def test_arguments_are_described(pages):
    words = " ".join("".join(pages["attribution/00_gradients.html"].words).split())
    assert "steps – points on the path: as many forward and backward passes per input" in words
    assert "Returns: attributions, shaped like" in words


def test_nothing_is_left_of_the_notebooks(pages):
    for name, page in pages.items():
        words = "".join(page.words)
        for left in ("#|", ":::", "```", "{py:", "$$", "](", ":param", "\\frac", "\\sum", "\\alpha"): assert left not in words, f"{name}: {left} in {words[max(0, words.index(left) - 60):][:160]}"


def test_formulas_are_shown_once(site):
    for path in (ROOT/"nbs").glob("*/*.ipynb"):
        prose = [re.sub(r"`[^`]*`", "", "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]
        formulas = [len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.S)) for text in prose]
        if path.parent.name in ("core", "attribution", "sparsity", "evaluation"):
            assert (site/path.relative_to(ROOT/"nbs").with_suffix(".html")).read_text(encoding="utf-8").count("<math ") == sum(formulas), path


def test_ledger_and_map_are_complete(build, pages):
    claims, papers = ledger(), build.rows(ROOT)
    assert Counter(c for c in pages["ledger.html"].classes if c in build.VERDICTS) == Counter(c["verdict"] for c in claims) + Counter({c["verdict"]: 1 for c in claims})  # and one on each button
    assert {n for n in pages["papers.html"].names if re.fullmatch(r"paper-\d+", n)} == {f"paper-{i}" for i in range(508)} and len(papers) == 508
    counted = Counter(p["state"] for p in papers)
    assert {s: pages["papers.html"].classes.count(s) - 1 for s in counted} == counted


def test_the_first_page_counts_the_ledger_and_says_where_to_start(pages):
    words = "".join(pages["index.html"].words)
    assert f"{len(ledger()):,} claims" in words and "Where to start" in words
    assert {"attribution/00_gradients.html", "experiments/roar.html", "core/index.html"} <= set(pages["index.html"].links)
    assert "|" not in words


def test_a_figure_says_what_it_belongs_to(pages):
    figures = [alt for name, page in pages.items() if name != "search.html" for alt in page.figures]
    assert len(figures) > 100 and all(re.fullmatch(r"Figure: .+", alt or "") for alt in figures)


@pytest.mark.parametrize("differs, device, words", [
    ({}, "CPU, 1 threads", "default"),
    ({"data": "../data/wikitext2", "model": "models/small/hf", "seeds": 5}, "CPU, 1 threads", "on wikitext2, with small"),
    ({"data": ["data/esnli", "data/sst2"]}, "NVIDIA H200", "on esnli and sst2, NVIDIA H200"),
    ({"decades": 0, "seeds": 2}, "CPU, 2 threads", "decades = 0"),
])
def test_a_run_is_named_by_what_differs(build, differs, device, words): assert build.label({"device": device}, differs) == words


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError])
def test_nothing_temporary_is_left_of_a_build_that_stops(build, tmp_path, monkeypatch, stop):
    (tmp_path/"site").mkdir()                       # the site of before stays
    def sources(_, out):
        build.write(out/"index.md", "# Half")
        raise stop
    monkeypatch.setattr(build, "sources", sources)
    with pytest.raises(stop): build.main(tmp_path/"site")
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_build_that_is_stopped_from_outside(tmp_path, stop):
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)     # which a shell in the background switches off
    build = subprocess.Popen([sys.executable, SITE/"build.py", tmp_path/"site"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heard)
    while build.poll() is None and not list(tmp_path.rglob("*.doctree")): time.sleep(.1)    # until Sphinx's workers write
    build.send_signal(stop)
    assert build.wait(60) != 0 and list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_build_with_warnings(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "sources", lambda _, out: build.write(out/"index.md", "# Half\n\n[nowhere](gone.md)"))
    with pytest.raises(SystemExit, match="got the warnings above"): build.main(tmp_path/"site")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder, match", [("", "got no executed notebook in .*want those of the record"), ("results", "got no executed notebook")])
def test_no_record_is_said(build, tmp_path, folder, match):
    (tmp_path/folder).mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match=match): build.records(tmp_path)


@pytest.mark.parametrize("text", [None, "", "system,says\n"])
def test_an_empty_ledger_is_said(build, tmp_path, text):
    (tmp_path/"results").mkdir()
    if text is not None: (tmp_path/"results/ledger.csv").write_text(text)
    with pytest.raises(SystemExit, match="got no claim in .*ledger.csv; want the ledger of the record"): build.ledger(tmp_path, tmp_path/"out", {}, {})


def test_a_ledger_of_another_record_is_said(build, tmp_path):
    (tmp_path/"results").mkdir()
    write_ledger([{**read_ledger(ROOT/"results/ledger.csv")[0], "notebook": "gone.ipynb"}], tmp_path/"results/ledger.csv")
    with pytest.raises(SystemExit, match="got a claim of gone.ipynb, which is not in results"): build.ledger(tmp_path, tmp_path/"out", {}, {})


def test_signatures_and_comments_are_read(build):
    source = '''
def f(
    x,            # a `x_y` with *stars*
    n:int=3,      # $n$
    *more,        # the rest
    key=None,
)->dict:          # what comes back
    "Doc with [link](a)."
    y = x         # not an argument
class C(NamedTuple):
    "Fields."
    a: int        # first
    def double(self, by=2): "Twice."; return 2 * self.a
    def silent(self): return 0
def _hidden(): return 1
'''
    (f, text), (c, fields) = build.api(source)
    assert (f, c) == ("f", "C")
    assert text.splitlines()[0] == ":::{py:function} f(x, n: int=3, *more, key=None) -> dict"
    assert r":param x: a `x_y` with \*stars\*" in text and r":param n: \$n\$" in text and r":param \*more: the rest" in text and ":returns: what comes back" in text
    assert r"Doc with \[link\](a)." in text and "not an argument" not in text and "key:" not in text
    assert fields.startswith("::::{py:class} C(a: int)") and ":param a: first" in fields and ":::{py:method} double(by=2)" in fields and "silent" not in fields


# In the browser

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = (shutil.which("chromium") or shutil.which("google-chrome")), shutil.which("chromedriver")
    if not (chromium and driver): pytest.skip("no Chromium with its driver here")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"): options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


def visit(browser, url, width=1280):
    "Open a page and check what must hold of all: no error, nothing from another host, nothing wider than the window."
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.get("about:blank")  # a new fragment alone would load nothing
    browser.get(url)
    assert [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    host = url.partition("/_")[0].split("/")[2]
    assert [u for u in browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") if urlsplit(u).netloc != host and not u.startswith("data:")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def until(browser, script, timeout=20):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, timeout, .1).until(lambda b: b.execute_script("return " + script))


def visible(browser): return browser.execute_script("return document.querySelectorAll('table.rows tbody tr').length")


def type_in(browser, text):
    from selenium.webdriver.common.by import By
    browser.find_element(By.CSS_SELECTOR, ".dt-search input").send_keys(text)


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_in_the_browser(browser, address, width):
    for name in ("index", "attribution/00_gradients", "attribution/index", "evaluation/08_measurable", "experiments/index", "experiments/roar", "experiments/sparsing_law", "benchmarks/pruning", "ledger", "papers", "genindex"):
        visit(browser, f"{address}{name}.html", width)


@pytest.mark.parametrize("width", [1280, 390])
def test_search_in_the_browser(browser, address, width):
    visit(browser, f"{address}search.html?q=integrated_gradients", width)
    hits = until(browser, "[...document.querySelectorAll('ul.search li a')].map(a => a.getAttribute('href'))")
    assert "attribution/00_gradients.html#whatmatters.attribution.gradients.integrated_gradients" in hits
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_ledger_in_the_browser(browser, address):
    claims = ledger()
    visit(browser, f"{address}ledger.html")
    info = "document.querySelector('.dt-info').textContent"
    assert f"of {len(claims):,} entries" in until(browser, info) and visible(browser) == 50
    type_in(browser, "random ranking")
    assert 0 < visible(browser) < 50
    visit(browser, f"{address}ledger.html#paper-138")
    assert f"of {sum(c['system'] == '138' for c in claims)} entries" in until(browser, info)
    browser.execute_script("document.querySelector('button[data-value=fails]').click()")
    assert visible(browser) == sum(c["system"] == "138" and c["verdict"] == "fails" for c in claims)


def test_map_in_the_browser(browser, address, build):
    papers = build.rows(ROOT)
    visit(browser, f"{address}papers.html")
    assert "of 508 entries" in until(browser, "document.querySelector('.dt-info').textContent")
    browser.execute_script("document.querySelector('button[data-value=works]').click()")
    assert f"of {sum(p['state'] == 'works' for p in papers)} entries" in until(browser, "document.querySelector('.dt-info').textContent")
    visit(browser, f"{address}papers.html#paper-13")
    assert visible(browser) == 1


def test_a_click_leads_from_the_map_to_the_routine_and_the_claims(browser, address):
    from selenium.webdriver.common.by import By
    visit(browser, f"{address}papers.html#paper-138")
    links = [a.get_attribute("href") for a in browser.find_elements(By.CSS_SELECTOR, "#paper-138 a")]
    routine, proof = (next(link for link in links if part in link) for part in ("#whatmatters.", "experiments/roar"))
    visit(browser, routine)
    assert until(browser, "document.querySelector('dt:target').textContent").strip()
    visit(browser, proof)
    assert browser.find_elements(By.CSS_SELECTOR, ".claim")


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", ["ledger", "papers"])
def test_tables_are_readable_in_light_and_dark(browser, address, name, mode):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": mode}]})
    visit(browser, f"{address}{name}.html")
    until(browser, "document.querySelector('.dt-info').textContent")
    paint = """let luminance = c => {let [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b};
        let behind = e => {while (e && /, 0\\)$/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement; return getComputedStyle(e || document.body).backgroundColor};
        return [...document.querySelectorAll('table.rows td, table.rows span, .counts button')].map(e => {
            let [a, b] = [luminance(getComputedStyle(e).color), luminance(behind(e))]; return (Math.max(a, b) + .05) / (Math.min(a, b) + .05)})"""
    ratios = browser.execute_script(paint)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(ratios) > 200 and min(ratios) >= 4.5     # as WCAG 2 wants of text


def test_tables_work_from_a_file(browser, site):
    browser.get((site/"ledger.html").as_uri())
    assert [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    assert visible(browser) == 50
