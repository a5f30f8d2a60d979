"Keyphrases: candidates against brute force, centralities against networkx, documents that do not depend on each other, what is left out of a fit, what is refused."
import random
import networkx
import numpy as np
import pytest
from scipy import sparse
from whatmatters.attribution.keyphrases import (c_value, candidates, centralities, eru_kg, fit_informativeness, frake, phrase_scores, ppmi_embeddings, rake, revise, semantic_importance, semre_rank,
                                                textrank_keyphrases, tf_idf_keyphrases, tf_idf_terms, top_phrases, weirdness, word_graph)
from whatmatters.core.texts import load_referenced, sentences_of, stem, words_of

DOCS = load_referenced()
TEXTS = DOCS.texts[:12]


def nouns(words): return [w[0].lower() in "abcdefghilmnoprs" for w in words] # any rule will do


def test_candidates_are_the_runs_that_a_slow_reading_finds():
    found = candidates(TEXTS, longest=3, content=nouns)
    for d, text in enumerate(TEXTS):
        expected, first, before = {}, {}, 0
        for line in sentences_of(text):
            run, end, at = [], None, 0
            for word in [*words_of(line), None]:
                start = line.index(word, at) if word else len(line)
                if run and (word is None or not nouns([word])[0] or not line[end:start].isspace()):
                    if len(run) <= 3:
                        key = tuple(map(stem, run))
                        expected[key] = expected.get(key, 0) + 1
                        first.setdefault(key, before - len(run))
                    run = []
                if word is None: break
                if nouns([word])[0]: run.append(word)
                at = end = start + len(word)
                before += 1
        row = found.counts[[d]]
        begin = found.counts.indptr[d]
        key = lambda p: tuple(found.words[w] for w in found.members[p] if w >= 0)
        assert {key(p): n for p, n in zip(row.indices, row.data)} == expected
        assert {key(p): found.first[begin + i] for i, p in enumerate(row.indices)} == first
        assert found.sizes[d] == before


def test_a_phrase_is_reported_in_its_most_frequent_form():
    found = candidates(["Neural networks. A neural network. The neural networks.", "A neural network, a Neural Network of a kind."])
    assert "neural network" in found.phrases and "neural networks" not in found.phrases
    assert all(len({tuple(map(stem, words_of(p)))}) for p in found.phrases) and len({tuple(map(stem, words_of(p))) for p in found.phrases}) == len(found.phrases)


def test_verbs_are_found_by_the_articles_after_them():
    texts = ["Robots inspect the welds.", "Robots inspect a bridge.", "Weak welds damage robots."]
    assert "robots" in candidates(texts).phrases and not any("inspect" in p for p in candidates(texts).phrases)
    assert "robots inspect" in candidates(texts, verbs=9).phrases


@pytest.mark.parametrize("seed", range(4))
def test_centralities_are_those_of_networkx(seed):
    draw, graphs = np.random.default_rng(seed), []
    for n in (1, 2, 7, 30, 3): graphs.append(networkx.gnp_random_graph(n, .25, seed=int(draw.integers(1000))))
    whole = sparse.block_diag([networkx.to_scipy_sparse_array(g, dtype=float) for g in graphs], format="csr")
    doc = np.repeat(range(len(graphs)), [len(g) for g in graphs])
    ours = centralities(whole, doc)
    for i, g in enumerate(graphs):
        if len(g) == 1: continue # networkx calls the degree of a lonely node 1
        for j, measure in enumerate((networkx.degree_centrality, networkx.betweenness_centrality, networkx.closeness_centrality)):
            np.testing.assert_allclose(ours[doc == i, j], list(measure(g).values()), atol=1e-12)
    assert (ours[doc == 0, :3] == 0).all()
    path = networkx.path_graph(400) # long, and more nodes than go into one matrix: blocks of sources
    np.testing.assert_allclose(centralities(networkx.to_scipy_sparse_array(path, dtype=float), np.zeros(400))[:, 1], list(networkx.betweenness_centrality(path).values()), atol=1e-12)


def test_eigenvector_centrality():
    g = networkx.karate_club_graph()
    ours = centralities(networkx.to_scipy_sparse_array(g, weight="weight", dtype=float), np.zeros(len(g)), steps=300)[:, 3]
    np.testing.assert_allclose(ours, list(networkx.eigenvector_centrality_numpy(g, weight="weight").values()), atol=1e-6)


@pytest.mark.parametrize("method", [textrank_keyphrases, frake, lambda t, top: frake(t, top, text=False), lambda t, top: frake(t, top, graph=False)])
def test_documents_do_not_depend_on_each_other(method):
    "But for the verbs, which the corpus tells, and the axis of FRAKE's component: with the same documents in another order nothing changes."
    order = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
    plain, mixed = method(TEXTS, 8), method([TEXTS[i] for i in order], 8)
    for place, i in enumerate(order):
        assert [s for _, s in plain[i]] == pytest.approx([s for _, s in mixed[place]], abs=1e-6)
    assert {stem(w) for p, _ in plain[0] for w in words_of(p)} <= {stem(w) for w in words_of(TEXTS[0])}


def test_methods_take_texts_or_candidates():
    found = candidates(TEXTS)
    model = fit_informativeness(TEXTS, DOCS.titles[:12])
    for method in (tf_idf_keyphrases, textrank_keyphrases, frake, lambda t, top: eru_kg(t, model, top)):
        assert method(TEXTS, 3) == method(found, 3) == [row[:3] for row in method(found, 9)]
        assert all(a[1] >= b[1] for row in method(found, 9) for a, b in zip(row, row[1:]))


def test_tf_idf_is_that_of_scikit_learn():
    from sklearn.feature_extraction.text import TfidfTransformer
    found = candidates(TEXTS)
    peer = sparse.csr_array(TfidfTransformer(norm=None).fit_transform(found.terms))
    assert (peer.indices == found.terms.indices).all()
    scores = phrase_scores(found, peer.data)
    for ours, peer in zip(tf_idf_keyphrases(found), top_phrases(found, scores)): assert ours == [(p, pytest.approx(s)) for p, s in peer]


def test_c_value_and_rake_by_brute_force():
    found = candidates(TEXTS)
    rows = [tuple(w for w in m if w >= 0) for m in found.members.tolist()]
    own = np.asarray(found.counts.sum(axis=0)).ravel()
    inside = lambda a, b: sum(b[i:i + len(a)] == a for i in range(len(b) - len(a) + 1))
    some = [p for p in range(len(rows)) if len(rows[p]) < 3][::40]
    frequency = lambda a: sum(own[q] * inside(a, b) for q, b in enumerate(rows))
    for p in some:
        longer = [q for q, b in enumerate(rows) if len(b) > len(rows[p]) and inside(rows[p], b)]
        value = np.log2(1 + len(rows[p])) * (frequency(rows[p]) - (np.mean([frequency(rows[q]) for q in longer]) if longer else 0))
        assert c_value(found)[p] == pytest.approx(value)
    word = rows[some[0]][0]
    degree, count = sum(own[q] * len(b) * b.count(word) for q, b in enumerate(rows)), sum(own[q] * b.count(word) for q, b in enumerate(rows))
    single = [q for q, b in enumerate(rows) if b == (word,)]
    assert single and rake(found)[single[0]] == pytest.approx(degree / count)


def test_words_of_one_topic_have_like_embeddings():
    draw = random.Random(0)
    topics = (["engine", "wheel", "brake", "clutch", "gearbox"], ["violin", "cello", "oboe", "trumpet", "flute"])
    found = candidates([". ".join(" of the ".join(draw.sample(topics[d % 2], 3)).capitalize() for _ in range(8)) for d in range(40)])
    x = ppmi_embeddings(found, dimension=4, window=10)
    x = x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
    kind = np.array([{stem(w): t for t, words in enumerate(topics) for w in words}.get(w, -1) for w in found.words])
    near = x[kind == 0] @ x[kind == 0].T
    assert near.min() > (x[kind == 0] @ x[kind == 1].T).max()
    importance = semantic_importance(found, ["engine"], x, share=1.)
    assert importance[kind == 1].max() == 0 < importance[kind == 0].min() and importance.max() == 1
    scores = np.ones(len(found.phrases))
    assert (semre_rank(found, scores, ["engine"], x, share=1.) == revise(found, scores, importance)).all()


def test_embeddings_are_the_same_twice():
    "Many words, few neighbours: ARPACK begins anew at random, which has to be the same each time."
    found = candidates(TEXTS[:1])
    assert (ppmi_embeddings(found) == ppmi_embeddings(found)).all()
    dense = ppmi_embeddings(found, dimension=5)
    spectrum = (dense ** 2).sum(0)
    assert (np.diff(spectrum) <= 1e-9).all() and dense.T @ dense == pytest.approx(np.diag(spectrum), abs=1e-9)


def test_weights_are_of_nodes_even_where_words_are_as_many():
    found = candidates(["red cat, blue dog", "red cat of the"])
    assert found.terms.nnz == len(found.words) == 6
    weights = np.arange(6.)
    of = {(d, found.words[w]): weights[i] for i, (d, w) in enumerate(zip(np.repeat(range(2), np.diff(found.terms.indptr)), found.terms.indices))}
    scores = phrase_scores(found, weights, frequency=0).toarray()
    assert scores[1, found.phrases.index("red cat")] == of[1, "red"] + of[1, "cat"]
    some = candidates(TEXTS)
    with pytest.raises(ValueError, match="weights: got shape .*; want .*one per stored entry"): phrase_scores(some, np.ones(len(some.words)))


def test_scores_in_any_sparse_form_and_of_the_right_shape():
    found = candidates(TEXTS)
    scores = phrase_scores(found, np.ones(found.terms.nnz))
    assert top_phrases(found, scores.tocoo()) == top_phrases(found, scores.tocsc()) == top_phrases(found, scores)
    with pytest.raises(ValueError, match="scores: got shape"): top_phrases(found, scores[:3])


def test_of_equal_scores_a_phrase_that_the_document_lacks_comes_last():
    found = candidates(["blue dog, red cat", "green bird, gray owl"])
    order = [found.phrases.index(p) for p in ("green bird", "red cat", "blue dog", "gray owl")]
    scores = sparse.csr_array((np.ones(4), ([0, 0, 0, 1], order)), shape=found.counts.shape) # as many entries as the counts, elsewhere
    assert [p for p, _ in top_phrases(found, scores)[0]] == ["blue dog", "red cat", "green bird"]


def test_a_document_s_own_title_does_not_teach_its_words():
    "The share of titles with a word leaves the document itself out, so that a word of one document alone says nothing of its title."
    texts = [f"Alpha beta{i}x.\n\nWe saw gamma{i}x and delta{i}x in the alpha." for i in range(30)]
    titles = [f"On gamma{i}x" for i in range(30)] # every label is that of a word of one document alone
    model = fit_informativeness(texts, titles)
    assert abs(model.coefficients[model.FEATURES.index("referred to")]) < 2 and model.seen["alpha"] == (30, 0)
    assert model.rate == pytest.approx(30 / sum(n for n, _ in model.seen.values()))
    found = candidates(["The alpha gamma1x."])
    assert model(found).shape == (found.terms.nnz,) and ((model(found) > 0) & (model(found) < 1)).all()


def test_learned_importance_is_above_chance_on_others():
    half = len(DOCS.texts) // 2
    model = fit_informativeness(DOCS.texts[:half], DOCS.titles[:half])
    found = candidates([t.removeprefix(h) for t, h in zip(DOCS.texts[half:], DOCS.titles[half:])])
    said = [{stem(w) for w in words_of(h)} for h in DOCS.titles[half:]]
    doc = np.repeat(range(len(said)), np.diff(found.terms.indptr))
    hit = np.array([found.words[w] in said[d] for d, w in zip(doc, found.terms.indices)])
    p = model(found)
    assert (p[hit][:, None] > p[~hit][None, :]).mean() > .7 # the area under the curve


def test_generation_draws_on_similar_documents_only():
    texts = ["Solar cells of silicon and of glass are in batteries.", "Solar cells and silicon wafers are in batteries.", "Choirs sing old hymns at vespers.", "Choirs sing hymns with an organ at vespers."]
    model = fit_informativeness(TEXTS, DOCS.titles[:12])
    has = lambda d, p: stem(p.split()[0]) in {stem(w) for w in words_of(texts[d])}
    assert all(has(d, p) for d, row in enumerate(eru_kg(texts, model)) for p, _ in row)
    mixed = eru_kg(texts, model, top=20, generate=.9, neighbours=1)
    assert "silicon wafers" in dict(mixed[0]) and "organ" in dict(mixed[2]) and "organ" not in dict(mixed[0]) and "silicon wafers" not in dict(mixed[2])
    indexed = eru_kg(texts[:1] + texts[2:3], model, top=20, generate=.9, neighbours=1, index=[texts[1]])
    assert len(indexed) == 2 and "silicon wafers" in dict(indexed[0])


@pytest.mark.parametrize("call, message", [
    (lambda: candidates("a text"), "texts: got a str; want a list"),
    (lambda: frake([]), "texts: got no document"),
    (lambda: tf_idf_keyphrases(["word", "", "x"]), r"texts\[1\]: got ''; want a document with at least one word"),
    (lambda: candidates(["word", 3]), r"texts\[1\]: got int"),
    (lambda: candidates(["the of and"]), "texts: got no content word"),
    (lambda: candidates(["red cat"], content=lambda words: [True]), "content: got 1 answers for 2 words"),
    (lambda: candidates(["red cat"], longest=0), "longest: got 0"),
    (lambda: tf_idf_keyphrases(["red cat"]), "texts: got 1 document; want at least two"),
    (lambda: tf_idf_terms(candidates(["red cat"])), "texts: got 1 document"),
    (lambda: textrank_keyphrases(TEXTS, top=0), "top: got 0"),
    (lambda: frake(TEXTS, top=-1), "top: got -1"),
    (lambda: frake(TEXTS, graph=False, text=False), "graph: got False"),
    (lambda: word_graph(candidates(["red cat"]), 1), "window: got 1"),
    (lambda: weirdness(candidates(["red cat"]), []), "reference: got no text"),
    (lambda: semre_rank(candidates(["red cat"]), [1.], ["dog"]), "seeds: got 1 phrases, none of whose words"),
    (lambda: semre_rank(candidates(["red cat"]), [1.], "cat"), "seeds: got "),
    (lambda: semre_rank(candidates(["red cat"]), [np.nan]), "scores: got NaN"),
    (lambda: semantic_importance(candidates(["red cat"]), ["cat"], np.ones((1, 3))), "embedding: got shape"),
    (lambda: fit_informativeness(["red cat"], ["red", "cat"]), "references: got 2 for 1 texts"),
    (lambda: fit_informativeness(["red cat"], ["..."]), r"references\[0\]: got"),
    (lambda: fit_informativeness(["red cat"], ["dog"]), "references: got none of the texts"),
    (lambda: eru_kg(["red cat"], None), "model: got NoneType"),
    (lambda: eru_kg(TEXTS, fit_informativeness(TEXTS, DOCS.titles[:12]), index="a text"), "index: got a str; want a list"),
    (lambda: candidates(["1 2. 3"]), "texts: got no content word; want words with letters"),
    (lambda: centralities(np.ones((2, 2)), [0, 1]), "graph: got edges between documents"),
])
def test_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_one_document_is_enough_where_nothing_is_compared():
    assert textrank_keyphrases(["A red cat."]) and frake(["A red cat."])[0][0][0] == "red cat"
    assert [p for p, _ in frake(["The red cat. " * 3, "Is it? It is the."])[1]] == [] # words, but none that a phrase may have


def test_the_benchmark_runs(tmp_path):
    from pathlib import Path
    from whatmatters.core import experiments
    book = Path(__file__).parent.parent/"nbs/benchmarks/terms.ipynb"
    assert experiments.run(str(book), given=dict(data="python", rows=6, peers=["yake"], encoder=None, large=20), out=tmp_path, engine="warm")[1]


@pytest.mark.parametrize("given, message", [(dict(ks=[]), "ks: got"), (dict(generate=1.), "generate: got 1.0"), (dict(queries="author"), "queries: got 'author'"), (dict(documents=3), "documents: got 3"), (dict(rows=4), "texts: got python|rows: got")])
def test_the_experiment_refuses(given, message, tmp_path):
    from whatmatters.core import experiments
    with pytest.raises(Exception, match=message): experiments.run("keyphrases", "smoke", given, tmp_path, engine="warm")
