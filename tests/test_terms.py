"Sentences and terms of a text: graphs, walks, summaries, against peers and by hand."
import json
import subprocess
import sys
from pathlib import Path
import networkx
import numpy as np
import pytest
import torch
from scipy import sparse
from whatmatters.attribution.terms import centroid, lexrank, page_rank, sentence_graph, stable_topics, summarise, textrank, tf_idf, weighted_keywords, word_counts
from whatmatters.core import experiments
from whatmatters.core.texts import load_referenced, sentences_of

TEXTS = load_referenced("python").texts
TALK = [s for t in TEXTS[:12] for s in sentences_of(t)]
KINDS = ("degree", "threshold", "continuous")


@pytest.mark.parametrize("seed", range(4))
def test_page_rank_is_networkx_and_the_linear_solve(seed):
    rng = np.random.default_rng(seed)
    weights = sparse.random_array((40, 40), density=.06, rng=rng, format="csr")
    restart = rng.random(40) * (rng.random(40) < .5)
    theirs = networkx.pagerank(networkx.from_scipy_sparse_array(weights, create_using=networkx.DiGraph), alpha=.7, personalization=dict(enumerate(restart)), tol=1e-13)
    ours = page_rank(weights, restart, damping=.7, tolerance=1e-13)
    assert ours == pytest.approx(np.array(list(theirs.values())), abs=1e-10) and ours.sum() == pytest.approx(1)
    assert page_rank(weights.tocoo(), restart, .7, 1e-13) == pytest.approx(ours) and page_rank(weights.toarray() * 7, restart * 3, .7, 1e-13) == pytest.approx(ours)


def test_page_rank_of_a_graph_without_edges_is_the_restart():
    assert page_rank(np.zeros((3, 3)), [1, 0, 3]) == pytest.approx([.25, 0, .75])
    assert page_rank([[0]]) == pytest.approx([1])


def test_continuous_lexrank_never_holds_the_matrix_and_is_the_walk_on_it():
    z = tf_idf(word_counts(TALK).counts)
    assert lexrank(TALK, "continuous") == pytest.approx(page_rank(z @ z.T), abs=1e-8)
    assert lexrank(z, "continuous") == pytest.approx(lexrank(TALK, "continuous"))


@pytest.mark.parametrize("threshold", [0, .1, .4])
def test_thresholded_kinds_are_those_of_the_dense_matrix(threshold):
    z = tf_idf(word_counts(TALK).counts).toarray()
    joined = (z @ z.T > threshold) * 1.
    assert (sentence_graph(TALK, threshold) > 0).toarray() == pytest.approx(joined)
    assert lexrank(TALK, "degree", threshold) == pytest.approx(joined.sum(0) / joined.sum())
    assert lexrank(TALK, "threshold", threshold) == pytest.approx(page_rank(joined), abs=1e-8)


@pytest.mark.parametrize("measure", [*KINDS, textrank, centroid])
def test_scores_follow_the_sentences_when_they_change_places(measure):
    order = np.random.default_rng(0).permutation(len(TALK))
    score = (lambda s: lexrank(s, measure)) if isinstance(measure, str) else measure
    assert score([TALK[i] for i in order]) == pytest.approx(score(TALK)[order], abs=1e-8)


def test_embeddings_do_for_vectors_when_none_is_negative():
    vectors = np.random.default_rng(0).random((30, 5))
    for kind in KINDS: assert lexrank(vectors, kind, .7).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="sentences: got negative"): lexrank(vectors - .5, "continuous")


def test_tensors_of_any_kind_do_for_vectors():
    vectors = torch.rand(12, 5, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        assert lexrank(vectors.requires_grad_(), kind, .7) == pytest.approx(lexrank(vectors.detach().numpy(), kind, .7))
        assert lexrank(vectors.detach().bfloat16(), kind, .7) == pytest.approx(lexrank(vectors.detach().bfloat16().float(), kind, .7))


def test_words_are_those_of_the_text_as_written():
    assert len(word_counts(["İZMİR", "Ankara"]).words) == 2 # in lower case the İ gets a dot of its own, which is no letter


@pytest.mark.parametrize("call, message", [(lambda: word_counts(["a star", None]), r"texts\[1\]: got NoneType"), (lambda: weighted_keywords(np.zeros((3, 2))), "counts: got only zeros"),
                                           (lambda: stable_topics(np.zeros((4, 5)), [2]), "X: got only zeros")])
def test_nothing_to_count_is_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_words_that_nobody_wrote():
    counts, words = word_counts(["Stars star starring", "", "stars?", "the of it"])
    assert words[0] == "stars" and counts.toarray()[:, 0].tolist() == [3, 0, 1, 0]
    assert word_counts(["the of it"], stops=True).counts.sum() == 3
    scores = lexrank(["red stars", "...", "red planets", "blue planets"], "threshold", .05)
    assert np.isfinite(scores).all() and scores.argmin() == 1


@pytest.mark.parametrize("measure", [*KINDS, textrank, centroid])
@pytest.mark.parametrize("sentences, message", [([], "sentences: got 0 sentences"), (["Only one."], "sentences: got 1 sentence; want at least two"), ("A text. Of two.", "sentences: got one str"),
                                                (["...", "?"], "texts: got 2 texts without a word")])
def test_what_cannot_be_compared_is_refused(measure, sentences, message):
    with pytest.raises(ValueError, match=message): lexrank(sentences, measure) if isinstance(measure, str) else measure(sentences)


@pytest.mark.parametrize("given, message", [(dict(threshold=-.1), "threshold: got -0.1"), (dict(threshold=1), "threshold: got 1"), (dict(kind="continous"), "did you mean continuous"), (dict(kind=3), "kind: got 3"),
                                            (dict(jump=-1), "jump: got -1"), (dict(restart=[1]), "restart: got"), (dict(tolerance=0), "tolerance: got 0"), (dict(most=0), "most: got 0")])
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message): lexrank(TALK[:5], **given)


def test_summaries_keep_their_budget_and_do_not_repeat():
    scores = lexrank(TALK)
    z = tf_idf(word_counts(TALK).counts)
    alike = (z @ z.T).toarray()
    for redundancy in (.1, .5):
        picked = summarise(TALK, scores, count=12, redundancy=redundancy)
        among = alike[np.ix_(picked, picked)] - np.eye(len(picked))
        assert len(picked) == 12 and among.max() <= redundancy and (np.diff(scores[picked]) <= 0).all()
    assert summarise(TALK, scores, count=4, redundancy=1) == np.argsort(-scores, kind="stable")[:4].tolist()
    assert summarise(TALK, scores, words=1) == [] or len(TALK[summarise(TALK, scores, words=1)[0]].split()) == 1


def test_keywords_and_topics_are_the_same_for_the_same_seed():
    counts = word_counts(TEXTS[:10]).counts
    reactions = np.arange(10.)
    first = weighted_keywords(counts, reactions, topics=2, passes=3, generator=1)
    assert (first == weighted_keywords(counts.toarray(), reactions, topics=2, passes=3, generator=1)).all() and first.shape == (counts.shape[1],) and (first >= 0).all()
    a, b = (stable_topics(counts, [2, 3], copies=2, steps=20, generator=1) for _ in range(2))
    assert a.k == b.k and a.silhouettes == b.silhouettes and (a.topics == b.topics).all()


LONG = """
import json, resource, sys, time
import numpy as np
from whatmatters.attribution.terms import lexrank, summarise
from whatmatters.core.texts import load_referenced, sentences_of, words_of
parts = [words_of(s) for t in load_referenced("python").texts for s in sentences_of(t)]
rng = np.random.default_rng(0)
text = [" ".join(parts[a][:len(parts[a]) // 2] + parts[b][len(parts[b]) // 2:] + ["end"]) for a, b in rng.integers(0, len(parts), (10000, 2))]
began = time.process_time()
assert len(summarise(text, lexrank(text, sys.argv[1]), count=10)) == 10
high = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
print(json.dumps([time.process_time() - began, high]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of Linux")
@pytest.mark.parametrize("kind", ["threshold", "continuous"])
def test_ten_thousand_sentences_take_seconds_and_less_than_a_gigabyte(kind):
    seconds, memory = json.loads(subprocess.run([sys.executable, "-c", LONG, kind], check=True, capture_output=True, text=True).stdout)
    assert seconds < 30 and memory < 1000


def test_the_benchmark_runs(tmp_path):
    path = Path(__file__).parent.parent/"nbs/benchmarks/summaries.ipynb"
    assert experiments.run(str(path), given=dict(clusters=2, sentences=100), out=tmp_path, engine="warm")[1]
