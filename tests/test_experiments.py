"Experiments at smoke size, in a warm engine; the runner and what it leaves behind."
import signal
import subprocess
import sys
import time
from pathlib import Path
import nbformat
import pytest
from whatmatters.core import experiments, ledger
from whatmatters.core.cli import main

ROOT = Path(__file__).parent.parent


def claims(path): return ledger.read_run(path).claims


@pytest.mark.parametrize("name", experiments.names())
def test_smoke(name, tmp_path):
    path, ran = experiments.run(name, "smoke", out=tmp_path, engine="warm")
    found, about = claims(path), nbformat.read(path, 4).metadata.whatmatters
    assert ran and found and {c["verdict"] for c in found} == {"inconclusive"}  # two seeds prove nothing
    assert {c["system"] for c in found} == {s for s, _ in experiments.declared_claims(nbformat.read(experiments.find(name), 4))}
    assert about.parameters.seeds == 2 and about.device and about.versions.torch and about.seconds > 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert ledger.read_run(path).figure


def test_same_seed_same_bits_whatever_the_chunk(tmp_path):
    small = dict(rows=80, seeds=2, epochs=2, estimators=["gradient", "VarGrad", "expected gradients"], ratios=[0.5])
    run = lambda **given: [c["values"] for c in claims(experiments.run("roar", "smoke", {**small, **given}, tmp_path, force=True, engine="warm")[0])]
    first = run()
    assert run() == first
    for a, b in zip(run(chunk=7), first): assert a == pytest.approx(b, abs=1 / 80)  # a float's difference may move one of 80 images


@pytest.mark.parametrize("name", experiments.names())
def test_every_preset_fits_its_experiment(name):
    path = experiments.find(name)
    for preset in experiments.presets(path): assert experiments.resolve(path, preset)
    assert {"smoke", "paper"} <= set(experiments.presets(path))
    for p in experiments.parameters(nbformat.read(path, 4)).values(): assert p.help and experiments.fits(p.default, p.type), p


def test_roar_on_real_images(real, tmp_path):
    given = dict(data=real("cifar10_lossless4k"), model="cnn", rows=60, size=None, epochs=1, estimators=["gradient", "edges"])
    path, _ = experiments.run("roar", "smoke", given, tmp_path, engine="warm")
    assert "(3, 32, 32), 10 classes" in path.read_text() and claims(path)


def test_recursive_roar_on_real_sentences(real, tmp_path):
    path, _ = experiments.run("recursive_roar", "smoke", dict(data=real("sst2"), rows=60, models=["attention"], length=12), tmp_path, engine="warm")
    assert any("sst2" in c["says"] for c in claims(path))


def test_recursive_roar_with_a_pretrained_encoder_from_a_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "excellent", "awful", "the", "film"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>").save_pretrained(tmp_path/"model")
    RobertaModel(RobertaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=40)).save_pretrained(tmp_path/"model")
    given = dict(models=[str(tmp_path/"model")], measures=["gradient", "second random"], sentences=40, epochs=1, length=16)
    path, _ = experiments.run("recursive_roar", "smoke", given, tmp_path/"runs", engine="warm")
    assert claims(path)


@pytest.mark.parametrize("name, given", [("ensemble", dict(members=[1, 3], rows=64, epochs=1, repeats=2)), ("attribution", dict(models=["cnn"], batch=2, steps=[2], repeats=1)),
                                         ("text", dict(layers=1, width=32, prompt=8, new=3, long=24, repeats=1)), ("layers", dict(models=["cnn"], batch=2, steps=2, repeats=1, peaks=["conductance"])),
                                         ("propagation", dict(models=["cnn"], batch=2, width=8, repeats=1)),
                                         ("games", dict(games=["diabetes 10 boosting"], encoder=None, budgets=[60], repeats=1, background=3)),
                                         ("pruning", dict(layers=1, hidden=32, neurons=48, heads=4, kv_heads=2, vocabulary=64, sequences=2, length=8, rows=1, gradient_sequences=1, side=32, memory=[], repeats=1)),
                                         ("data", dict(examples=16, others=4, texts=4, rows=60, networks=2, truth=6, sizes=[16], subset_models=8, documents=200, labels=100, repeats=1)),
                                         ("sweeps", dict(runs=1, workers=1, repeats=1, trivial=[10]))])
def test_benchmarks_run(name, given, tmp_path):
    assert experiments.run(str(ROOT/f"nbs/benchmarks/{name}.ipynb"), given=given, out=tmp_path, engine="warm")[1]


def test_plain_papermill(tmp_path):
    command = [sys.executable, "-m", "papermill", "nbs/experiments/roar.ipynb", str(tmp_path/"out.ipynb"), "-f", "nbs/experiments/roar.smoke.yaml", "-p", "seeds", "1", "-p", "epochs", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert len(claims_anywhere(tmp_path/"out.ipynb")) == 7


def claims_anywhere(path):
    return [o.data[experiments.CLAIM] for c in nbformat.read(path, 4).cells for o in c.get("outputs", []) if experiments.CLAIM in o.get("data", {})]


BAD = {
    "experiment": (["run", "raor"], "raor: did you mean roar?"),
    "preset": (["run", "roar", "--preset", "smok"], "smok: did you mean smoke?"),
    "parameter": (["run", "roar", "-p", "sead", "1"], "sead: did you mean seed"),
    "type": (["run", "roar", "-p", "seeds", "few"], "seeds: got 'few' (str); want int: independent repetitions"),
    "broken list": (["run", "roar", "-p", "ratios", "[0.1"], "ratios: got '[0.1' (str); want list[float]"),
    "list": (["run", "roar", "-p", "ratios", "0.5"], "ratios: got 0.5 (float); want list[float]"),
    "data": (["run", "roar", "-p", "data", "./nowhere"], "data: got './nowhere', which is no folder; want one of digits"),
    "report": (["report", "./nowhere"], "folder: got ./nowhere, which is no folder"),
    "twice": (["run", "roar", "-p", "seeds", "1", "-p", "seeds", "2"], "-p: got seeds seeds; want each parameter once"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_starts(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, message = BAD[what]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert message in said.err and len(said.err.strip().splitlines()) <= 2 and "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key, value, message", [("ratios", "[0.5, 1.5]", "roar failed: ratios: got [0.5, 1.5]; want"), ("steps", "0", "steps: got 0; want a whole number >= 1"),
                                                 ("data", ".", "data: got the folder . with no table and no folders of images; want"), ("estimators", "[magic]", "estimators: got 'magic'")])
def test_bad_values_fail_in_a_line_and_leave_a_notebook_that_says_so(key, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    estimators = [] if key == "estimators" else ["-p", "estimators", "[expected gradients]"]
    assert main(["run", "roar", "--preset", "smoke", "--warm", "-p", key, value, *estimators, "--out", "runs"]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert [p.name.split(".", 1)[1] for p in (tmp_path/"runs").iterdir()] == ["failed.ipynb"]


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path/"file").write_text("in the way")
    assert main(["run", "roar", "--preset", "smoke", "--out", str(tmp_path/"file"/"runs")]) == 2
    assert "a folder that can be written" in capsys.readouterr().err


def test_an_interrupted_run_is_called_partial(tmp_path):
    process = subprocess.Popen([Path(sys.executable).parent/"whatmatters", "run", "roar", "-p", "epochs", "5000", "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(240):
        if list(tmp_path.glob("*.partial.ipynb")): break
        time.sleep(.25)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "roar was interrupted; what it did so far is in" in said and "Traceback" not in said
    assert [p.name.split(".", 1)[1] for p in tmp_path.iterdir()] == ["partial.ipynb"]
    nbformat.validate(nbformat.read(next(tmp_path.iterdir()), 4))


def test_list(capsys):
    assert main(["list"]) == 0 and main(["list", "roar"]) == 0
    said = capsys.readouterr().out
    assert "138" in said and "105" in said and "smoke" in said and "seeds" in said


def test_the_report_is_one_page_without_network(tmp_path):
    experiments.run("roar", "smoke", dict(rows=60, epochs=1), tmp_path, engine="warm")
    (tmp_path/"half.partial.ipynb").write_text("{")
    (tmp_path/"other.ipynb").write_text("not a notebook")
    page = ledger.report(tmp_path)
    text, found = page.read_text(), ledger.read_ledger(tmp_path/"ledger.csv")
    assert len(found) == 7 and all(c["verdict"] == "inconclusive" and c["notebook"].endswith(".ipynb") for c in found)
    assert "http" not in text and "<script" not in text and 'src="data:image/png;base64,' in text and found[0]["says"] in text
    assert {p.suffix for p in tmp_path.iterdir()} == {".ipynb", ".csv", ".html"}
