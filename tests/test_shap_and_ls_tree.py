"What the experiments shap and ls_tree refuse before anything is trained, and what their claims are made of."
import nbformat
import pytest
from whatmatters.core import experiments, ledger


def values(path): return {c["says"]: c["values"] for c in ledger.read_run(path).claims}


@pytest.mark.parametrize("name, given, message", [
    ("shap", dict(budgets=[16, 32]), "budgets: got .16, 32.; want model calls, each from 14 to 31"),
    ("shap", dict(budgets=[13]), "budgets: got .13.; want model calls, each from 14"),
    ("shap", dict(data="wine", features=11), "features: got 11"),
    ("shap", dict(data="digits"), "data: got digits, which holds no table"),
    ("shap", dict(data="TEXTS"), "data: got .*texts, which holds no table"),
    ("ls_tree", dict(model="EMPTY"), "model: got .*empty"),
    ("ls_tree", dict(rows=2), "rows: got 2; want at least 3"),
])
def test_refused_in_the_check_cell(name, given, message, tmp_path):
    (tmp_path/"empty").mkdir(), (tmp_path/"texts").mkdir()
    (tmp_path/"texts"/"train.csv").write_text("text,label\n" + "\n".join(f"a {w} film,{i % 2}" for i, w in enumerate(("good", "bad") * 10)))
    where = {"TEXTS": str(tmp_path/"texts"), "EMPTY": str(tmp_path/"empty")}
    given = {k: where.get(v, v) if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises(Exception, match=message): experiments.run(name, "smoke", given, tmp_path/"runs", engine="warm")
    ran = [nbformat.read(p, 4) for p in (tmp_path/"runs").rglob("*.ipynb")] if (tmp_path/"runs").exists() else []
    for book in ran: assert sum(c.cell_type == "code" and bool(c.execution_count) for c in book.cells) <= 4


def test_claims_are_measured_anew_for_every_seed(tmp_path):
    found = values(experiments.run("shap", "smoke", dict(seeds=3), tmp_path, engine="warm")[0])
    for says, numbers in found.items():
        if "consistency" in says: assert len({round(n, 8) for n in numbers}) == 3, (says, numbers)
    found = values(experiments.run("ls_tree", "smoke", dict(seeds=3, rows=3, train_rows=100, models=["cnn"]), tmp_path, engine="warm")[0])
    assert all(len(numbers) == 3 for numbers in found.values())  # a mean over no sentence would have no value
