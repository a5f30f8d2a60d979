"What was found: runs harvested from notebooks, the ledger, the report, and what the README and the workspace make of them."
import base64
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from urllib.request import urlopen
import nbformat
import pytest
from whatmatters import __version__
from whatmatters.core import ledger
from whatmatters.core.experiments import CLAIM

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def executed(path, claims=1, figure="aGk=", **about):
    "A finished run, as the runner would leave it."
    about = dict(experiment="toy", preset="default", parameters={"seed": 0}, code="abc", device="CPU", commit=None, started="2026-01-01T00:00:00+00:00", seconds=1., peak_memory_mb=9) | about
    about.setdefault("versions", {"whatmatters": __version__})
    claims = [dict(system=s, says=f"claim {s}", verdict="holds", mean=.1, low=0., high=.3, expect="> 0", what="points", level=.95, values=[.1] * 5) for s in range(claims)] if isinstance(claims, int) else claims
    v4 = nbformat.v4
    cells = [v4.new_markdown_cell("# A toy"), v4.new_code_cell("seed: int = 0  # of the draws", metadata={"tags": ["parameters"]}),
             v4.new_code_cell("pass", outputs=[v4.new_output("display_data", {CLAIM: c}) for c in claims]),
             v4.new_code_cell("pass", metadata={"tags": ["key-figure"]}, outputs=[v4.new_output("display_data", {"image/png": figure})])]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata={"whatmatters": about}), path)
    return path


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        if tag == "a": self.found.append(dict(attributes)["href"])


def test_runs_are_found_in_the_folder_and_in_folders_of_their_own(tmp_path):
    for name in ("toy-default-1.ipynb", "toy-default-2/toy-default-2.ipynb"): executed(tmp_path/name, parameters={"seed": int(name[12])}, figure="aG\nk=\n")  # kept as lines
    for name in ("toy-default-3.partial.ipynb", "toy-default-4.failed.ipynb", "toy-default-5/toy-default-5.partial.ipynb", "toy-default-6/toy-default-6.failed.ipynb",
                 "other/toy-default-7.ipynb", "deep/toy-default-8/toy-default-8.ipynb", ".ipynb_checkpoints/toy-default-1-checkpoint.ipynb"): executed(tmp_path/name)
    (tmp_path/"toy-default-2/toy-default-2.lock").touch()
    (tmp_path/"toy-default-9").mkdir()
    nbformat.write(nbformat.v4.new_notebook(), tmp_path/"mine.ipynb")  # no run at all
    runs = ledger.harvest(tmp_path)
    assert [r.about["parameters"]["seed"] for r in runs] == [1, 2] and [r.changed for r in runs] == [{"seed": 1}, {"seed": 2}]
    assert {r.title for r in runs} == {"A toy"} and {r.figure for r in runs} == {"aGk="}


def test_the_same_run_counts_once_the_newest(tmp_path):
    old, new = executed(tmp_path/"a/toy.ipynb", started="2026-01-01T00:00:00+00:00", device="old"), executed(tmp_path/"b/toy/toy.ipynb", started="2026-02-01T00:00:00+00:00", device="new")
    executed(tmp_path/"b/seed.ipynb", parameters={"seed": 3})
    executed(tmp_path/"b/code.ipynb", code="other")
    executed(tmp_path/"b/name.ipynb", experiment="game")
    for folders in ((tmp_path/"a", tmp_path/"b"), (str(tmp_path/"b"), str(tmp_path/"a")), (tmp_path/"a", tmp_path/"b", tmp_path/"a")):
        found = ledger.merge(folders)
        assert sorted(r.path.stem for r in found) == ["code", "name", "seed", "toy"] and old not in {r.path for r in found} and new in {r.path for r in found}
    with open(ledger.report([tmp_path/"a", tmp_path/"b"]).with_name("ledger.csv"), newline="") as file: assert len(list(csv.DictReader(file))) == 4


BROKEN = {"empty": b"", "half": b'{"cells": [{"cell_type": "code"', "list": b"[1, 2]", "no notebook": b"{}", "bytes": b"\xff\xfe{}", "no cells": b'{"metadata": {"whatmatters": {"versions": {"whatmatters": "0.0.1"}}}}',
          "no version": b'{"metadata": {"whatmatters": {"experiment": "toy"}}, "cells": []}', "odd version": b'{"metadata": {"whatmatters": {"versions": {"whatmatters": "one"}}}, "cells": []}'}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_notebook_is_named_and_left_out(what, tmp_path, caplog):
    executed(tmp_path/"good.ipynb")
    (tmp_path/"bad.ipynb").write_bytes(BROKEN[what])
    page = ledger.report(tmp_path)
    ledger.refuse_newer(tmp_path)
    assert [r["notebook"] for r in ledger.read_ledger(tmp_path/"ledger.csv")] == ["good.ipynb"] and page.exists()
    message, = caplog.messages
    assert "bad.ipynb is left out, it cannot be read" in message and "good" not in message


def test_half_a_record_and_half_a_claim_are_named(tmp_path, caplog):
    notebook = nbformat.read(executed(tmp_path/"record.ipynb"), 4)
    del notebook.metadata.whatmatters["device"], notebook.metadata.whatmatters["code"]
    nbformat.write(notebook, tmp_path/"record.ipynb")
    executed(tmp_path/"claim.ipynb", claims=[dict(system=1, says="so")])
    executed(tmp_path/"verdict.ipynb")
    (tmp_path/"verdict.ipynb").write_text((tmp_path/"verdict.ipynb").read_text().replace('"holds"', '"perhaps"'))
    assert ledger.harvest(tmp_path) == []
    assert "verdict: got 'perhaps'; want holds, fails, inconclusive" in caplog.text and "none of code, device" in caplog.text and "none of expect, high, level" in caplog.text


def test_versions_are_mixed_only_when_asked_for(tmp_path):
    executed(tmp_path/"a/one.ipynb", versions={"whatmatters": "0.0.9"})
    executed(tmp_path/"b/two.ipynb", versions={"whatmatters": "0.0.10"}, parameters={"seed": 1})
    folders = [tmp_path/"a", tmp_path/"b"]
    message = rf"folders: got runs of whatmatters 0.0.9 \(in {folders[0]}\) and runs of whatmatters 0.0.10 \(in {folders[1]}\); want runs of one version, or --mixed"
    with pytest.raises(ValueError, match=message): ledger.report(folders, out=tmp_path/"out")
    assert not (tmp_path/"out").exists()
    text = ledger.report(folders, out=tmp_path/"out", mixed=True).read_text()
    assert "mixes runs of whatmatters 0.0.9 and 0.0.10" in text and "whatmatters 0.0.9 ·" in text and "whatmatters 0.0.10 ·" in text
    assert Counter(r["version"] for r in ledger.read_ledger(tmp_path/"out/ledger.csv")) == {"0.0.9": 1, "0.0.10": 1}
    assert "mixes" not in ledger.report(folders[1]).read_text()


@pytest.mark.parametrize("version", ["99", "0.100.0", f"{__version__}.1", f"{__version__}.post1"])
@pytest.mark.parametrize("name", ["new.ipynb", "new/new.ipynb"])
def test_a_newer_version_is_refused_always_and_before_anything_is_written(name, version, tmp_path):
    executed(tmp_path/"runs"/name, versions={"whatmatters": version}, claims=[{"another": "format"}])
    executed(tmp_path/"runs/old.ipynb")
    before = sorted(tmp_path.rglob("*"))
    for mixed in (False, True):
        with pytest.raises(ValueError, match=rf"folder: got .*new.ipynb, written by whatmatters {re.escape(version)}; want a version up to {re.escape(__version__)}"): ledger.report(tmp_path/"runs", tmp_path/"out", mixed)
    with pytest.raises(ValueError, match="folder: got .*new.ipynb, written by"): ledger.refuse_newer(tmp_path/"runs")
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="folder: got .*nowhere, which is no folder; want a folder of executed notebooks"): ledger.report([tmp_path, tmp_path/"nowhere"])
    with pytest.raises(ValueError, match="folders: got none; want one or more"): ledger.report([])
    (tmp_path/"file").touch()
    with pytest.raises(ValueError, match="out: got .*file .*; want a folder that can be written"): ledger.report(tmp_path, tmp_path/"file")
    with pytest.raises(ValueError, match="path: got .* with the columns none; want system, says"): ledger.read_ledger(tmp_path/"file")
    assert "No finished run in this folder yet" in ledger.report(tmp_path).read_text() and ledger.read_ledger(tmp_path/"ledger.csv") == []


@pytest.mark.parametrize("out", [".", "a", "a/deep/er", "elsewhere", "b/toy two"])
def test_links_lead_to_the_notebooks_wherever_the_page_lies(out, tmp_path, monkeypatch):
    names = ["a/toy-default-1.ipynb", "b/toy two/toy two.ipynb", "b/100% #1 — ü?&.ipynb"]
    for i, name in enumerate(names): executed(tmp_path/name, parameters={"seed": i})
    monkeypatch.chdir(tmp_path)
    for folders in (["a", "b"], [tmp_path/"a", tmp_path/"b"]):
        page = ledger.report(folders, out)
        links = {(page.parent/unquote(link)).resolve() for link in Links(page).found}
        assert links == {(page.parent/r["notebook"]).resolve() for r in ledger.read_ledger(page.with_name("ledger.csv"))} == {tmp_path/n for n in names}
        assert not any(c in "".join(Links(page).found) for c in "#?& ")


def test_the_ledger_reads_back_to_the_bit(tmp_path):
    odd = dict(system=7, says='"quoted", with commas; ünïcode <b>', verdict="inconclusive", mean=None, low=None, high=None, expect="in [-0.1, .1]", what="", level=.9, values=[1 / 3, None, -0., 1e-300, 1e22, 0.1 + 0.2])
    run = dict(parameters={"data": None, "list": [1, .1, "ä, b"], "on": True}, device='GPU "A", 80 GB', commit="abc+")
    executed(tmp_path/"toy.ipynb", claims=[odd], **run)
    page = ledger.report(tmp_path)
    row, = ledger.read_ledger(tmp_path/"ledger.csv")
    assert {k: row[k] for k in odd} == odd and {k: row[k] for k in run} == run and repr(row["values"]) == repr(odd["values"])
    assert [row] == ledger.entries(ledger.harvest(tmp_path), tmp_path)
    assert "&quot;quoted&quot;" in page.read_text() and "ünïcode <b>" not in page.read_text()
    import pandas as pd
    frame = pd.read_csv(tmp_path/"ledger.csv")  # as anybody would read it
    assert list(frame) == ledger.COLUMNS and frame["mean"].isna().all() and frame["values"][0].split()[1] == "nan" and pd.DataFrame([row])["mean"].isna().all()


def test_only_so_many_figures_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "FIGURES", 2)
    for seed in range(4): executed(tmp_path/f"toy-{seed}.ipynb", parameters={"seed": seed})
    text = ledger.report(tmp_path).read_text()
    assert text.count("<img") == 2 and text.count("<section>") == 4


# The record in results/

NOTEBOOKS = sorted((ROOT/"results").glob("*.ipynb"))


def test_the_ledger_is_the_one_of_the_record():
    rows = ledger.read_ledger(ROOT/"results/ledger.csv")
    assert rows == ledger.entries(ledger.merge([ROOT/"results"]), ROOT/"results")
    text, told = (ROOT/"results/report.html").read_text(), Counter(r["notebook"] for r in rows)
    assert ledger.summary(rows) in text and Counter(Links(ROOT/"results/report.html").found) == told and set(told) == {p.name for p in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_record_is_light_and_complete(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    about, outputs = notebook.metadata.whatmatters, [o.data for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    pictures = [base64.b64decode(d["image/png"]) for d in outputs if "image/png" in d]
    assert pictures and max(map(len, pictures)) <= 100_000 and path.stat().st_size <= 500_000
    assert about.device and about.commit and about.versions.whatmatters and sum(CLAIM in d for d in outputs) == len(ledger.read_run(path).claims) > 0


def figures(rows):
    "The sentence of the README, counted once more without the package."
    verdicts = Counter(r["verdict"] for r in rows)
    return (f"{len(rows):,} claims of {len({r['system'] for r in rows})} papers re-executed in {len({r['notebook'] for r in rows})} runs: "
            f"{verdicts['holds']:,} held, {verdicts['fails']:,} failed, {verdicts['inconclusive']:,} inconclusive.")


@pytest.mark.parametrize("name", ["README.md", "nbs/index.ipynb"])
def test_the_figures_shown_are_those_of_the_ledger(name):
    with open(ROOT/"results/ledger.csv", newline="", encoding="utf-8") as file: rows = list(csv.DictReader(file))
    with open(ROOT/"nbs/site/papers.csv", newline="", encoding="utf-8") as file: verb = {r["id"]: r["module"].split(".")[0] for r in csv.DictReader(file)}
    text = (ROOT/name).read_text()
    assert text.count(figures(rows)) == 1 and figures(rows[1:]) not in text
    for shown, some in [*((f"(`{v}`)", [r for r in rows if verb[r["system"]] == v]) for v in ("attribution", "sparsity", "evaluation")), ("| all", rows)]:
        line, = re.findall(rf"\| [^|\n]*{re.escape(shown.strip('| '))} \|( [\d,]+ \|.*\|)", text)
        verdicts = Counter(r["verdict"] for r in some)
        assert [int(n.replace(",", "")) for n in line.strip("| ").split(" | ")] == [len({r["system"] for r in some}), len(some), *(verdicts[v] for v in ("holds", "fails", "inconclusive"))]


# The workspace of make lab

def widgets(area): return area["widgets"] if "widgets" in area else [w for child in area["children"] for w in widgets(child)]


def test_the_workspace_names_notebooks_that_exist_and_imports(tmp_path):
    data = json.loads((ROOT/"nbs/lab.json").read_text())["data"]
    shown = widgets(data["layout-restorer:data"]["main"]["dock"])
    assert len(shown) == 3 and [data[w]["data"]["path"] for w in shown] == [w.removeprefix("notebook:") for w in shown] and all((ROOT/data[w]["data"]["path"]).is_file() for w in shown)
    subprocess.run([BIN/"jupyter", "lab", "workspaces", "import", "nbs/lab.json"], cwd=ROOT, check=True, capture_output=True, env={**os.environ, "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path)})
    saved, = tmp_path.glob("whatmatters*")
    assert json.loads(saved.read_text())["data"] == data


def test_make_lab_shows_three_notebooks_side_by_side_and_asks_nothing(tmp_path):
    pytest.importorskip("selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver): pytest.skip("no Chromium")
    from selenium import webdriver
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {f"JUPYTER_{what}_DIR": str(tmp_path/what) for what in ("CONFIG", "DATA", "RUNTIME")}
    given = ["JUPYTERLAB_WORKSPACES_DIR=" + str(tmp_path/"workspaces"), f"BIN={BIN}", f"LAB=--allow-root --no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token=word"]
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", f"user-data-dir={tmp_path/'chromium'}",
                 "window-size=1600,900"): options.add_argument("--" + flag)
    with open(tmp_path/"log", "w") as log:
        server = subprocess.Popen(["make", "-o", ".venv/ready", "lab", *given], cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **own}, start_new_session=True)
        browser = None
        try:
            until(lambda: f"{port}/lab/workspaces/whatmatters?token" in (tmp_path/"log").read_text() or server.poll() is not None)
            assert server.poll() is None, (tmp_path/"log").read_text()
            browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
            browser.get(f"http://127.0.0.1:{port}/?token=word")
            ask = lambda what: browser.execute_script(f"return [...document.querySelectorAll('{what}')].map(e => [e.innerText, e.getBoundingClientRect().left, e.getBoundingClientRect().width])")
            def kernels():
                with urlopen(f"http://127.0.0.1:{port}/api/sessions?token=word") as answer: return [s["kernel"]["execution_state"] for s in json.load(answer)]
            until(lambda: kernels() == ["idle"] * 3 and len(ask(".jp-NotebookPanel .jp-Cell")) > 20)
            tabs, panels = ask("#jp-main-dock-panel .lm-TabBar-tabLabel"), ask(".jp-NotebookPanel")
            assert sorted(t for t, *_ in tabs) == ["00_gradients.ipynb", "index.ipynb", "roar.ipynb"]
            assert len({left for _, left, _ in panels}) == 3 and min(width for *_, width in panels) > 400
            assert ask(".jp-Dialog") == ask(".Toastify__toast") == []
        finally:
            if browser: browser.quit()
            server.terminate()  # make passes it on
            with contextlib.suppress(subprocess.TimeoutExpired): server.wait(30)
            with contextlib.suppress(ProcessLookupError): os.killpg(server.pid, signal.SIGKILL)


def until(done, seconds=180):
    for _ in range(seconds * 4):
        if done(): return
        time.sleep(.25)
    raise TimeoutError
