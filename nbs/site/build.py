"""The site, without network: `build.py [OUT]` turns the chapters, the record, the ledger and the papers into pages, and has Sphinx read them; both in OUT.partial, which goes away.

Pages keep the folders and names of the notebooks, so that the links between notebooks lead to pages."""
import ast
import json
import re
import shutil
import signal
import sys
from collections import Counter, defaultdict
from html import escape
from multiprocessing import active_children
from pathlib import Path

import itables
import nbformat
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import main as sphinx

from whatmatters.core.experiments import CLAIM
from whatmatters.core.ledger import harvest, read_ledger
from api import api
from papers import rows

ROOT = Path(__file__).parents[2]
VERBS = {"attribution": "Attribution: score it", "sparsity": "Sparsity: keep only it", "evaluation": "Evaluation: prove it", "core": "Core: what all three share"}
VERDICTS = {"holds": "hold", "fails": "fail", "inconclusive": "inconclusive"}


def read(path): return nbformat.read(path, 4)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def page(path, cells):
    "Write a notebook that Sphinx reads."
    write(path, nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python", "pygments_lexer": "ipython3"}})))


def heading(nb):
    "Title and one-line description of a notebook: its first heading and quote."
    text = nb.cells[0].source
    quote = re.search(r"^> *(.+(?:\n>.*)*)", text, re.M)
    return re.search(r"^# +(.+)", text, re.M)[1], re.sub(r"\n> *", " ", quote[1]) if quote else ""


def fold(cell, prompt):
    cell.metadata = {"tags": ["hide-input"], "mystnb": cell.metadata.get("mystnb", {}) | {"code_prompt_show": prompt, "code_prompt_hide": prompt}}


def shown(nb):
    "The cells that a reader sees, with what was exported in `directive`; without directives, hidden cells, and outputs that only programs read."
    cells, section = [], ""
    for cell in nb.cells:
        if cell.cell_type == "markdown": section = re.sub(r"[`*$]", "", ([section] + re.findall(r"^#+ +(.+)", cell.source, re.M))[-1])
        if cell.cell_type == "code":
            cell.metadata["mystnb"] = {"image": {"alt": f"Figure: {section}"}}
            found = re.findall(r"^#\s*\|\s*(\w+)", cell.source, re.M)
            cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            if "hide" in found or not cell.source: continue
            cell.directive = next((f for f in found if f.startswith("export")), None)
            for output in cell.outputs:
                for mime in [m for m in output.get("data", {}) if m.startswith("application/vnd.whatmatters")]: del output.data[mime]
        if "hide" not in cell.metadata.get("tags", []): cells.append(cell)
    return cells


# Chapters

def chapter(path, out):
    "A chapter as a page. Names of its routines, each with the target of a link to it."
    nb = read(path)
    module = next((m[1] for c in nb.cells if (m := re.search(r"^#\| default_exp (\S+)", c.source, re.M))), None)
    cells, routines = [], {}
    for cell in shown(nb):
        directive = cell.pop("directive", None)
        if directive:
            described = api(cell.source) if directive == "export" else []
            names = [getattr(n, "name", None) for n in ast.parse(cell.source).body]
            fold(cell, "Code of " + ", ".join(filter(None, names)) if any(names) else "Imports and constants")
            if described: cells.append(new_markdown_cell("\n\n".join(text for _, text in described)))
            routines |= {name: f"whatmatters.{module}.{name}" for name, _ in described}
        cells.append(cell)
    if module: cells.insert(1, new_markdown_cell(f":::{{py:module}} whatmatters.{module}\n:::"))
    page(out/path.parent.name/path.name, cells)
    return routines


def chapters(root, out):
    "All chapters and a page for each verb. Routines by chapter: {path in nbs: {name: target}}."
    found = {}
    for folder, title in VERBS.items():
        lines = []
        for path in sorted((root/"nbs"/folder).glob("*.ipynb")):
            name, about = heading(read(path))
            found[f"{folder}/{path.name}"] = routines = chapter(path, out)
            lines += [f"[{name}]({path.name}): {about}", ": " + (" ".join(f"{{py:obj}}`{n} <{target}>`" for n, target in routines.items()) or "no routine"), ""]
        write(out/folder/"index.md", f"# {title}\n\n" + "\n".join(lines) + tree(sorted(p.name for p in (root/"nbs"/folder).glob("*.ipynb"))))
    return found


def tree(pages, caption=""):
    return "\n\n```{toctree}\n:hidden:\n" + (f":caption: {caption}\n" if caption else "") + "\n".join(str(p).removesuffix(".ipynb") for p in pages) + "\n```\n"


# Experiments

def records(root):
    "The runs of each experiment with the names of their pages, those with default parameters first: {experiment: [(page, `Run`)]}."
    found = defaultdict(list)
    for run in harvest(root/"results") if (root/"results").is_dir() else []: found[run.about["experiment"]].append(run)
    if not found: sys.exit(f"results: got no executed notebook in {root/'results'}; want those of the record: whatmatters sweep all, then make docs")
    name = lambda i, run: run.about["experiment"] + (f"-{run.path.stem.rpartition('-')[2]}" if i else "")
    return {e: [(name(i, run), run) for i, run in enumerate(sorted(runs, key=lambda run: len(run.changed)))] for e, runs in found.items()}


def counts(verdicts):
    n = Counter(verdicts)
    return ", ".join(f'<span class="{v}">{n[v]} {word}</span>' for v, word in VERDICTS.items() if n[v]) or "none"


def label(about, differs):
    "A run in a few words: its data and model, else the first parameter that is not the default, and its GPU."
    names = lambda value: " and ".join(str(v).removesuffix("/hf").split("/")[-1] for v in (value if isinstance(value, list) else [value]))
    words = {"data": "on", "model": "with", "models": "with"}
    said = [f"{words[k]} {names(differs[k])}" for k in words if k in differs] or [f"{k} = {v}" for k, v in list(differs.items())[:1]] or ["default"]
    return re.sub(r"[^\w ,./=-]", "", ", ".join(said + [about["device"]] * (not about["device"].startswith("CPU"))))


def about_run(run, others):
    "What a reader must know of a run: where, when, with what, and what it found."
    about = run.about
    versions = ", ".join(f"{k} {v}" for k, v in {"Python": about["python"], **about["versions"]}.items())
    memory = f"{about['peak_memory_mb']} MB" + (f", {about['peak_gpu_memory_mb']} MB on the GPU" if about["peak_gpu_memory_mb"] else "")
    lines = {"Claims": counts(c["verdict"] for c in run.claims), "Ran on": f"{about['device']}, in {about['seconds']:.0f} s, at most {memory}, {about['started'][:10]}",
             "With": versions, "Parameters": ", ".join(f"`{k} = {json.dumps(v)}`" for k, v in run.changed.items()) or "the default ones", "Other runs": others}
    return new_markdown_cell("\n".join(f":{k}: {v}" for k, v in lines.items() if v))


def experiment(path, runs, out):
    "The pages of an experiment: one for each run of the record, or the notebook as it is when there is none."
    for i, (name, run) in enumerate(runs):
        nb, number = read(run.path), 0
        others = " · ".join(f"[{label(r.about, r.changed)}]({n}.ipynb)" for n, r in runs if n != name)
        for output in (o for c in nb.cells for o in c.get("outputs", []) if CLAIM in o.get("data", {})):
            output.data["text/html"] = output.data["text/html"].replace("<div ", f'<div id="claim-{number}" class="claim" ', 1)
            number += 1
        cells = []
        for cell in shown(nb):
            kinds = cell.metadata.get("tags", [])
            if {"injected-parameters", "record"} & set(kinds): continue
            if cell.cell_type == "code" and "parameters" not in kinds: fold(cell, "Code")
            cell.pop("directive", None)
            cells.append(cell)
        if i: cells[0].source = cells[0].source.replace("\n", f" ({label(run.about, run.changed)})\n", 1)
        cells[0].source = re.sub(r"\bsystem (\d+)\b", r'<a href="../papers.html#paper-\1">system \1</a>', cells[0].source)
        cells.insert(1, about_run(run, others))
        if not i and len(runs) > 1: cells.append(new_markdown_cell(tree(f"{label(r.about, r.changed)} <{n}>" for n, r in runs[1:])))
        page(out/"experiments"/f"{name}.ipynb", cells)
    if not runs:
        cells = shown(read(path))
        for cell in cells: cell.pop("directive", None)
        cells.insert(1, new_markdown_cell(f"*Not in the record yet:* `whatmatters run {path.stem}` *executes it.*"))
        page(out/"experiments"/path.name, cells)


def experiments(root, out, record):
    paths = sorted((root/"nbs/experiments").glob("*.ipynb"))
    lines = ["# Experiments", "", "What the papers claim, re-executed. Each page is the notebook as it ran: what was asked, what came out, and whether the claim holds.", "",
             ":::{table}", ":class: wide", ":widths: 16 38 18 28", "| experiment | asks | claims | runs |", "|---|---|---|---|"]
    for path in paths:
        runs = record.get(path.stem, [])
        title = heading(read(path))[0].replace("|", r"\|")
        lines += [f"| [{path.stem}]({path.name}) | {title} | {counts(c['verdict'] for _, run in runs[:1] for c in run.claims)} | "
                  + " · ".join(f"[{label(run.about, run.changed)}]({name}.ipynb)" for name, run in runs) + " |"]
        experiment(path, runs, out)
    write(out/"experiments/index.md", "\n".join(lines) + "\n:::\n" + tree(p.name for p in paths))


# The ledger and the papers, as tables

def table(head, lines):
    "A page's table that tables.js makes searchable; the script and its style are those of itables, copied once."
    cells = "".join(f"<th{' class=state' if h in ('verdict', 'state') else ''}>{h}</th>" for h in head)
    return (f'\n```{{raw}} html\n<link rel="stylesheet" href="_static/datatables.css">\n<div class="scroll"><table class="rows">\n<thead><tr>{cells}</tr></thead>\n<tbody>\n'
            + "\n".join(lines) + '\n</tbody></table></div>\n<script src="_static/datatables.js"></script><script src="_static/tables.js"></script>\n```\n')


def buttons(counted):
    return "\n```{raw} html\n<p class=\"counts\">" + " ".join(f'<button data-value="{k}" class="{k}" aria-pressed="false"><b>{n}</b> {k}</button>' for k, n in counted.items()) + "</p>\n```\n"


def row(identity, *cells): return f"<tr{identity}>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in cells) + "</tr>"


def measured(line):
    mean, low, high = (float("nan") if line[k] is None else line[k] for k in ("mean", "low", "high"))
    return f'<td data-order="{mean}">{mean:.4g} <small>[{low:.4g}, {high:.4g}] {escape(line["what"])}; expected {escape(line["expect"])}</small></td>'


def ledger(root, out, record, titles):
    "The ledger as a page. Its lines."
    path = root/"results/ledger.csv"
    try: lines = read_ledger(path)
    except (OSError, ValueError): lines = []
    if not lines: sys.exit(f"results: got no claim in {path}; want the ledger of the record: whatmatters report writes it")
    where = {run.path.name: name for runs in record.values() for name, run in runs}
    number, seen, body = Counter(), set(), []
    for line in lines:
        name, paper = where.get(line["notebook"]), line["system"]
        title = escape(titles.get(paper, ""))
        if not name: sys.exit(f"results/ledger.csv: got a claim of {line['notebook']}, which is not in results; want a ledger of the record: whatmatters report writes it")
        line["page"] = f"experiments/{name}.html#claim-{number[name]}"
        number[name] += 1
        body.append(row("" if paper in seen else f' id="paper-{paper}"',
                        f'<td data-order="{paper}" data-search="paper {paper} {title}"><a href="papers.html#paper-{paper}">paper {paper}</a> {title}</td>', escape(line["says"]),
                        measured(line), f'<td class="{line["verdict"]}">{line["verdict"]}</td>', f'<a href="{line["page"]}">{name}</a>'))
        seen.add(paper)
    write(out/"ledger.md", "# Ledger\n\nEvery claim that was re-executed: what the paper says, what was measured (mean and interval), and whether the claim holds.\n"
          + buttons(Counter(line["verdict"] for line in lines)) + table(["paper", "claim", "measured", "verdict", "experiment"], body))
    return lines


def paper_map(root, out, lines, routines):
    "Every paper with what became of it here."
    claimed, states, body = defaultdict(list), Counter(), []
    for line in lines: claimed[line["system"]].append(line)
    for paper in rows(root):
        key, state = paper["id"], paper["state"]
        states[state] += 1
        places = [f'<a href="{path.removesuffix(".ipynb")}.html#{routines[path][name]}">{name}</a>' for path, name in paper["routines"]]
        proofs = [f'<a href="experiments/{name}.html">{name}</a>' for name in paper["experiments"]]
        found = f': <a href="ledger.html#paper-{key}">{counts(line["verdict"] for line in claimed[key])}</a>' if claimed[key] else ""
        body.append(row(f' id="paper-{key}"', f'<td data-order="{key}" data-search="paper {key} ">paper {key} </td>', escape(paper["title"]),
                        f'<td class="module">{paper["module"]}</td>', f'<td class="{state}">{state}</td>',
                        escape(paper["reason"]) or "; ".join(filter(None, [", ".join(places), ", ".join(proofs) + found]))))
    write(out/"papers.md", "# Paper map\n\nThe papers that the kit is made from, and what became of each: its routine and its claims, or why there is none.\n"
          + buttons(states) + table(["paper", "title", "module", "state", "routines and claims, or why there are none"], body))


def data_tables(out):
    "DataTables, from itables: a module there, a plain script here, because browsers load no module from a file."
    source = Path(itables.__file__).parent/"html"
    text, n = re.subn(r"export\{.*?(\w+) as default.*?\};?\s*(?=$|/\*)", r"window.DataTable=\1;\n", (source/"dt_bundle.js").read_text(encoding="utf-8"), count=1, flags=re.M)
    if n != 1: sys.exit("itables: got a dt_bundle.js without a default export; want one as in itables 2.9")
    write(out/"_static/datatables.js", "(() => {\n" + text + "\n})();\n")
    shutil.copy(source/"dt_bundle.css", out/"_static/datatables.css")


def sources(root, out):
    "All that Sphinx reads."
    record = records(root)
    routines = chapters(root, out)
    experiments(root, out, record)
    lines = ledger(root, out, record, {p["id"]: p["title"] for p in rows(root)})
    paper_map(root, out, lines, routines)
    benchmarks = sorted((root/"nbs/benchmarks").glob("*.ipynb"))
    for path in benchmarks: chapter(path, out)
    write(out/"benchmarks/index.md", "# Benchmarks\n\nHow fast, how much memory, how many calls, against the peers.\n\n" + "\n".join(f"- [{heading(read(p))[0]}]({p.name})" for p in benchmarks)
          + tree(p.name for p in benchmarks))
    cells = [c for c in shown(read(root/"nbs/index.ipynb")) if c.pop("directive", None) is None]
    navigation = tree([*(f"{v}/index" for v in VERBS), "Routines from A to Z <genindex>"], "Chapters") + tree(["experiments/index", "ledger", "papers", "benchmarks/index"], "Record")
    links = " · ".join(f"[{text}]({name})" for text, name in
                       {**{v: f"{v}/index.md" for v in VERBS}, "experiments": "experiments/index.md", "ledger of claims": "ledger.md", "paper map": "papers.md", "benchmarks": "benchmarks/index.md"}.items())
    page(out/"index.ipynb", [cells[0], new_markdown_cell("Where to start: [gradients](attribution/00_gradients.ipynb), the first chapter, then [ROAR](experiments/roar.ipynb), an experiment that puts it to the test.\n\nOn this site: " + links), *cells[1:], new_markdown_cell(navigation)])


def main(out="_docs"):
    out = Path(out).absolute()
    work = out.with_name(out.name + ".partial")
    source, html = work/"source", work/"html"   # in a folder of their own: myst-nb leaves one beside html
    shutil.rmtree(work, ignore_errors=True)
    others = set(active_children())
    try:
        sources(ROOT, source)
        if sphinx(["--builder", "html", "--jobs", "2", "--fail-on-warning", "--keep-going", "--quiet", "-c", str(Path(__file__).parent), "-d", str(work/"doctrees"), str(source), str(html)]):
            sys.exit("Sphinx: got the warnings above, about pages named like their notebooks in nbs; want none")
        data_tables(html)
        shutil.rmtree(out, ignore_errors=True)
        html.rename(out)
    finally:
        for worker in set(active_children()) - others: worker.kill(); worker.join()   # Sphinx's, that still write or wait to be heard
        shutil.rmtree(work, ignore_errors=True)
    print(f"the site: {out/'index.html'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # or nothing would be cleaned up
    main(*sys.argv[1:])
