"Texts with references: the loaders on real archives, metrics against brute force and a peer."
import itertools
import json
import zipfile
from pathlib import Path
import pytest
import torch
from whatmatters.core.texts import load_referenced, sentences_of, stem, stopwords, words_of
from whatmatters.evaluation.references import keyphrase_agreement, rouge

DATA = Path(__file__).parent.parent.parent/"shared"/"data"


@pytest.mark.skipif(not (DATA/"inspec").is_dir(), reason="needs shared/data/inspec")
def test_inspec_is_that_of_its_published_references():
    corpus = load_referenced(str(DATA/"inspec"))
    published = json.loads((DATA/"inspec"/"references"/"test.uncontr.json").read_text())
    assert len(corpus.texts) == 500 and [sorted(p.lower() for p in r) for r in corpus.references] == [sorted(p[0].lower() for p in published[n]) for n in corpus.names]
    assert all(t.startswith(title) for t, title in zip(corpus.texts, corpus.titles)) and len(load_referenced(str(DATA/"inspec"), "train").texts) == 1000
    perfect = keyphrase_agreement(corpus.references, corpus.references, k=None)
    assert (perfect.f1 == 1).all()


@pytest.mark.skipif(not (DATA/"opinosis").is_dir(), reason="needs shared/data/opinosis")
def test_opinosis_has_its_topics_and_readers():
    corpus = load_referenced(str(DATA/"opinosis"))
    assert len(corpus.texts) == 51 and sum(map(len, corpus.references)) == 238 and all(len(sentences_of(t)) >= 20 for t in corpus.texts)


def test_longest_common_subsequence_is_that_of_brute_force():
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        a, b = (["abc"[i] for i in torch.randint(3, (7,), generator=draw)] for _ in range(2))
        kept = lambda w: {c for k in range(8) for c in itertools.combinations(w, k)}
        longest = max(map(len, kept(a) & kept(b)))
        assert abs(rouge([" ".join(a)], [[" ".join(b)]], "L", stems=False).recall.item() - longest / 7) < 1e-12


def test_rouge_agrees_with_sumy_where_no_word_repeats():
    # sumy counts the intersection with the repetitions of the reference only: a set of distinct words is where both are Lin's
    from sumy.evaluation import rouge_n
    from sumy.models.dom import Sentence

    class Split:
        def to_words(self, text): return tuple(text.split())

    said, gold = "the quick brown fox jumps", "a quick red fox sleeps well"
    for n in (1, 2):
        peer = rouge_n([Sentence(said, Split())], [Sentence(gold, Split())], n)
        assert abs(rouge([said], [[gold]], n, stems=False).recall.item() - peer) < 1e-12


def test_sentences_lose_nothing_and_end_where_they_end():
    for text in ('He said "Stop." Then he left.', "It works (see below.) Then it stops.", "He said “Stop.” Then he left.", "Es regnet. Über uns.", "Is it? No. It is.", "Cats, etc. They sleep.", "Vitamin C.\n\nIt helps."):
        found = sentences_of(text)
        assert len(found) == (3 if "?" in text else 2) and " ".join(found) == " ".join(text.split())
    for text in ("See No. 5 and p. 12 of it.", "By J.K. Rowling.", "It is. The U.S. Army came."): assert len(sentences_of(text)) == 1 + text.startswith("It is")


def test_words_whether_typed_or_typeset():
    import unicodedata
    for typed, typeset in (("don't", "don’t"), ("state-of-the-art", "state‑of‑the‑art"), ("naïve", unicodedata.normalize("NFD", "naïve"))):
        assert words_of(typeset) == [typeset] and stem(typeset) == stem(typed) and (typed in stopwords()) == (typeset in stopwords())
    assert words_of("snake_case Ωmega x") == ["snake", "case", "Ωmega", "x"]


def test_rouge_splits_as_its_reference_implementation_does():
    "Runs of letters and digits: what rouge-score and ROUGE-1.5.5 count, by hand."
    said, gold = "The state-of-the-art TF/IDF doesn't win.", "State of the art: TF IDF doesn t lose"
    assert rouge([said], [[gold]], stems=False).recall == 8 / 9 and rouge([said], [[gold]], stems=False).precision == 8 / 10
    assert rouge([said], [[gold]], 2, stems=False).recall == 7 / 8


def test_wrong_corpora_are_refused(tmp_path):
    for i in range(20): (tmp_path/f"{i:02}.txt").touch()
    with pytest.raises(ValueError, match=r"data: got the folder .* with 00.txt, .*07.txt, \.\.\.; want the archive"): load_referenced(str(tmp_path))
    (tmp_path/"Hulth2003.jsonl").mkdir() # a folder of that name is no table
    with pytest.raises(ValueError, match="the archive of Inspec"): load_referenced(str(tmp_path))
    (tmp_path/"rows.jsonl").write_text("no json")
    with pytest.raises(ValueError, match="data: got rows.jsonl, which cannot be read"): load_referenced(str(tmp_path))
    for content in (b"", b"no archive"):
        (tmp_path/"Opinosis.zip").write_bytes(content)
        with pytest.raises(ValueError, match="data: got Opinosis.zip, which cannot be read"): load_referenced(str(tmp_path))
    with zipfile.ZipFile(tmp_path/"Opinosis.zip", "w") as z: z.writestr("readme", "nothing")
    with pytest.raises(ValueError, match="data: got Opinosis.zip without a single text"): load_referenced(str(tmp_path))
    for name in tmp_path.iterdir(): name.rmdir() if name.is_dir() else name.unlink()
    with pytest.raises(ValueError, match="data: got 'digits'; want texts"): load_referenced("digits")
    with pytest.raises(ValueError, match="the archive of Inspec or Opinosis"): load_referenced(str(tmp_path))
    with pytest.raises(ValueError, match="text: got list"): sentences_of(["a"])
    for wrong in (None, 3):
        with pytest.raises(ValueError, match="text: got"): words_of(wrong)
    assert words_of("") == []


def test_what_the_hub_lacks_is_refused_by_name(monkeypatch):
    import datasets
    from whatmatters.core.data import table

    def lacks(source, split): raise ValueError(f"Unknown split {split}")

    monkeypatch.setattr(datasets, "load_dataset", lacks)
    for read in (load_referenced, table):
        with pytest.raises(ValueError, match=r"data: got 'owner/name', which did not load \(ValueError: Unknown split t"): read("owner/name")
