"""Which paper is where: the tags of the chapters, put together with `papers.csv`.

A line `#| papers 138 105` right below `#| export` says that the routine of this cell re-implements these rows of `papers.csv`; nbdev drops it from the package.
`papers.csv` has a line per paper. Who has no tag has a state there, planned or outside, and the reason; who has one is left blank."""
import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
import nbformat
from whatmatters.core.experiments import declared_claims

PAPERS = 508
STATES = "planned", "outside"
TAG = re.compile(r"^#\s*\|\s*papers?\b(.*)$", re.M)


def _cells(root):
    "The code cells of all notebooks, each with its notebook's path."
    for path in sorted((Path(root)/"nbs").rglob("*.ipynb")):
        name = path.relative_to(Path(root)/"nbs").as_posix()
        if ".ipynb_checkpoints" in path.parts: continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code": yield name, "".join(cell["source"])


def _routine(source):
    "The public function or class of a cell, None where there is none."
    return found[1] if (found := re.search(r"^(?:def|class) ([A-Za-z]\w*)", source, re.M)) else None


def _tagged(root):
    "Every tag: the notebook, the routine of the cell or None, and the ids (None where the line is not a tag as it should be)."
    for path, source in _cells(root):
        for said in TAG.findall(source):
            well = source.startswith(f"#| export\n#| papers{said}\n") and re.fullmatch(r"( \d+)+", said)
            yield path, _routine(source), list(map(int, said.split())) if well else None


def _by_paper(tagged):
    found = defaultdict(list)
    for path, routine, ids in tagged:
        for paper in ids or ():
            if routine: found[paper].append((path, routine))
    return dict(found)


def _table(root):
    with open(Path(root)/"nbs/site/papers.csv", encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def tags(
    root, # of the checkout
)->dict:  # id -> [(path of the chapter from nbs/, name of the routine), ...], in reading order
    "Which routines re-implement each paper."
    return _by_paper(_tagged(root))


def claims(
    root, # of the checkout
)->dict:  # id -> names of the experiments, sorted
    "Which experiments claim something of each paper, read from their code."
    found = defaultdict(set)
    for path in (Path(root)/"nbs/experiments").glob("*.ipynb"):
        for paper, _ in declared_claims(nbformat.read(path, 4)): found[paper].add(path.stem)
    return {paper: sorted(names) for paper, names in sorted(found.items())}


def rows(
    root, # of the checkout
)->list:  # a dict per paper: id, title, module, state (works, planned or outside), reason, routines as of `tags`, experiments
    "Every paper with what became of it."
    tagged, claimed = tags(root), claims(root)
    return [{**row, "id": (paper := int(row["id"])), "state": "works" if paper in tagged else row["state"], "routines": tagged.get(paper, []), "experiments": claimed.get(paper, [])} for row in _table(root)]


def check(
    root, # of the checkout
)->list:  # sentences; empty where all is well
    "What is wrong with the tags and with `papers.csv`."
    problems, table, marks = [], _table(root), list(_tagged(root))
    tagged = _by_paper(marks)
    times = Counter(row["id"] for row in table)
    known = {str(i) for i in range(PAPERS)}
    problems += [f"papers.csv: id {i} comes {n} times" for i, n in times.items() if n > 1]
    problems += [f"papers.csv: unknown id {i}" for i in times if i not in known]
    problems += [f"papers.csv: id {i} is missing" for i in sorted(known - set(times), key=int)]
    for path, routine, ids in marks:
        if ids is None: problems.append(f"{path}: a tag is the line `#| papers ID ID ...` right below `#| export`")
        elif routine is None: problems.append(f"{path}: tag {ids} in a cell that exports no function")
        else:
            problems += [f"{path}: {routine} has the tag {i} twice" for i, n in Counter(ids).items() if n > 1]
            problems += [f"{path}: {routine} has the tag {i}, which no paper has" for i in set(ids) if str(i) not in known]
    for row in table:
        name, works = f"paper {row['id']} ({row['title']})", row["id"].isdigit() and int(row["id"]) in tagged
        if row["state"] not in ("", *STATES): problems.append(f"{name}: state {row['state']!r}; want {', '.join(STATES)} or none")
        elif works and (row["state"] or row["reason"]): problems.append(f"{name} has the tagged routine {tagged[int(row['id'])][0][1]}, and papers.csv a state or reason")
        elif not works and not (row["state"] and row["reason"]): problems.append(f"{name} has no tag, and papers.csv lacks its state or reason")
    problems += [f"experiments/{names[0]} claims something of paper {i}, which no routine is tagged with" for i, names in claims(root).items() if i not in tagged]
    return problems
