"Texts with references: the loaders on real archives, metrics against brute force and a peer."
import itertools
import json
from pathlib import Path
import pytest
import torch
from whatmatters.core.texts import load_referenced, sentences_of, words_of
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


def test_wrong_corpora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data: got 'digits'; want texts"): load_referenced("digits")
    with pytest.raises(ValueError, match="the archive of Inspec or Opinosis"): load_referenced(str(tmp_path))
    with pytest.raises(ValueError, match="text: got list"): sentences_of(["a"])
    assert words_of("") == []
