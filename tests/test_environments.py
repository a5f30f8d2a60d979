"Environments: fits counted, rows never scored by what has seen them, tables and tensors alike, seeds, modalities of any type."
import warnings
from itertools import product
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from whatmatters.attribution import environments as e
from whatmatters.attribution.coalitions import banzhaf, kernel_shap, shapley
from whatmatters.core.values import count_calls, seeded

CHAIN = {"a": [], "b": ["a"], "c": ["b"]}


def world(n, seed, move=0.):
    z = torch.randn(3, n, generator=seeded(seed))
    a = z[0] + move
    return {"a": a, "b": a + z[1], "c": a + z[1] + z[2]}


class Watched(ClassifierMixin, BaseEstimator):
    "A classifier that notes its fits, and whether it is asked about rows that it has seen."
    fits, leaks = 0, 0

    def fit(self, x, y):
        Watched.fits += 1
        self.seen, self.classes_ = set(map(bytes, np.ascontiguousarray(x))), np.unique(y)
        return self

    def predict_proba(self, x):
        Watched.leaks += sum(bytes(row) in self.seen for row in np.ascontiguousarray(x))
        p = 1 / (1 + np.exp(-x[:, 0]))
        return np.stack([1 - p, p], 1)


@pytest.fixture
def watched():
    Watched.fits = Watched.leaks = 0
    return Watched()


def test_one_classifier_per_distinct_set(watched):
    e.mechanism_ratios(world(60, 0), world(50, 1), CHAIN, classifier=watched, folds=3)
    assert Watched.fits == 3 * 4 and Watched.leaks == 0  # {a}, {a, b}, {b}, {b, c}
    e.shift_attribution(world(60, 0), world(50, 1), (torch.zeros(60), torch.ones(50)), CHAIN, classifier=watched, folds=3, resamples=4)
    assert Watched.fits == 3 * 4 * 6 and Watched.leaks == 0  # copies of a resampled row stay in one fold
    e.shift_attribution(world(60, 0), world(50, 1), (torch.zeros(60), torch.ones(50)), CHAIN, classifier=watched, folds=3, resamples=4, refit=False)
    assert Watched.fits == 3 * 4 * 7


def test_a_classifier_that_only_memorises_is_not_believed():
    same = e.mechanism_ratios(world(500, 0), world(500, 1), CHAIN, classifier=DecisionTreeClassifier(random_state=0))
    assert same.abs().mean() < .3


def test_ratio_of_gaussians_whatever_the_sizes():
    for m in (4000, 400):
        source = world(4000, 0)
        logs = e.mechanism_ratios(source, world(m, 1, move=1.), CHAIN, classifier=LogisticRegression())
        assert (logs[:, 0] - (source["a"] - .5)).abs().mean() < .2 and logs[:, 1:].abs().mean() < .2


def test_tables_and_tensors_are_the_same():
    source, target = world(200, 0), world(150, 1, .5)
    frames = [pd.DataFrame({n: t.numpy() for n, t in w.items()}) for w in (source, target)]
    stacked = [{"first": torch.stack([w["a"], w["b"]], 1), "c": w["c"]} for w in (source, target)]
    graph = {"first": [], "c": ["first"]}
    one = e.mechanism_ratios(*stacked, graph, classifier=LogisticRegression())
    two = e.mechanism_ratios(*frames, graph, {"first": ["a", "b"]}, classifier=LogisticRegression())
    torch.testing.assert_close(one, two)
    loss = torch.rand(200, generator=seeded(2)), torch.rand(150, generator=seeded(3))
    results = [e.shift_attribution(*w, loss, graph, b, classifier=LogisticRegression(), resamples=3) for w, b in ((stacked, None), (frames, {"first": ["a", "b"]}))]
    torch.testing.assert_close(results[0].low, results[1].low)


def test_words_are_columns_of_their_own():
    source = pd.DataFrame({"place": ["city"] * 20 + ["village"] * 60 + [None] * 20})
    target = pd.DataFrame({"place": ["city"] * 60 + ["village"] * 20 + [None] * 20})
    logs = e.mechanism_ratios(source, target, {"place": []}, classifier=LogisticRegression(C=100))
    for rows, ratio in ((slice(0, 20), 3.), (slice(20, 80), 1 / 3), (slice(80, 100), 1.)): assert logs[rows].exp().mean().item() == pytest.approx(ratio, rel=.25)


def test_same_seed_same_bits_and_any_chunk():
    given = dict(source=world(80, 0), target=world(90, 1, .3), loss=(torch.rand(80, generator=seeded(2)), torch.rand(90, generator=seeded(3))), graph=CHAIN, classifier=LogisticRegression())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two, other = (e.shift_attribution(**given, resamples=3, generator=g) for g in (5, torch.Generator().manual_seed(5), 6))
        assert torch.equal(one.scores, two.scores) and torch.equal(one.low, two.low) and not torch.equal(one.low, other.low)
        masks = torch.tensor(list(product((False, True), repeat=3)))
        torch.testing.assert_close(e.shift_value(**given)(masks), e.shift_value(**given, chunk=1)(masks))


@pytest.mark.parametrize("normalise,complete", list(product((True, False), repeat=2)))
def test_the_game(normalise, complete):
    source, target = world(300, 0), world(200, 1, .3)
    loss, ratios = (torch.rand(300, generator=seeded(2)), torch.rand(200, generator=seeded(3))), .3 * torch.randn(300, 3, generator=seeded(4)).double()
    value = e.shift_value(source, target, loss, CHAIN, ratios=ratios, normalise=normalise, complete=complete)
    total = float(loss[1].double().mean() - loss[0].double().mean())
    def weighted(mask):
        w = ratios[:, list(mask)].sum(1).exp()
        return float((w * loss[0]).sum() / (w.sum() if normalise else 300)) - float(loss[0].double().mean()), float(w.sum() ** 2 / w.square().sum())
    alone = [abs(weighted([i == j for j in range(3)])[0]) for i in range(3)]
    gap = total - weighted([True] * 3)[0]
    assert value.gap == pytest.approx(gap) and value.total == pytest.approx(total)
    for mask in product((False, True), repeat=3):
        wanted, rows = weighted(mask)
        if complete: wanted += gap * sum(a for a, m in zip(alone, mask) if m) / sum(alone)
        assert float(value(torch.tensor([mask]))[0]) == pytest.approx(wanted, abs=1e-12) and float(value.effective(torch.tensor([mask]))[0]) == pytest.approx(rows)
    torch.testing.assert_close(shapley(value).scores, kernel_shap(value, 8).scores)
    assert float(shapley(value).scores.sum()) == pytest.approx(total if complete else total - gap)
    if normalise: torch.testing.assert_close(value(torch.eye(3).bool()), e.shift_value(source, target, loss, CHAIN, ratios=ratios + 7, complete=complete)(torch.eye(3).bool()))


def test_few_effective_rows_are_said():
    source, target, loss = world(300, 0), world(300, 1), (torch.zeros(300), torch.ones(300))
    ratios = torch.zeros(300, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e.shift_value(source, target, loss, CHAIN, ratios=ratios)
    ratios[0, 1] = 9.
    with pytest.warns(UserWarning, match=r"of 300 source rows fewer than 50 count with the weights of b \(1\), all together \(1\)"): e.shift_value(source, target, loss, CHAIN, ratios=ratios)


def test_few_rows_that_are_alike_are_not_poor_overlap():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = e.shift_value(world(30, 0), world(30, 1), (torch.zeros(30), torch.ones(30)), CHAIN, ratios=torch.zeros(30, 3))
    assert shapley(value).scores.tolist() == pytest.approx([1 / 3] * 3)  # no weight accuses anybody


@pytest.mark.filterwarnings("ignore:poor overlap")
def test_resamples_of_few_rows_have_something_to_learn_from():
    source, target = ({"a": world(4, s)["a"]} for s in (0, 1))
    for seed in range(5): assert e.shift_attribution(source, target, (torch.zeros(4), torch.ones(4)), {"a": []}, classifier=LogisticRegression(), folds=2, resamples=20, generator=seed).scores.tolist() == pytest.approx([1.])


def test_levels_of_one_environment_and_constants():
    source, target = pd.DataFrame({"place": ["city", "village"] * 50, "flat": 1.}), pd.DataFrame({"place": ["city", "island"] * 40, "flat": 1.})
    logs = e.mechanism_ratios(source, target, {"place": [], "flat": ["place"]}, classifier=LogisticRegression(C=100), clip=50)
    assert logs[::2, 0].abs().mean() < .2 and (logs[1::2, 0] < -3).all() and logs[:, 1].abs().max() < .2


def test_environments_that_do_not_fit():
    source, target, loss = world(100, 0), world(100, 1), (torch.zeros(100), torch.ones(100))
    for bad, message in ((dict(source={}), "source: got no columns"), (dict(source={**source, "a": source["a"][1:]}), "source: got columns of 99"), (dict(target={**target, "a": target["a"][:, None].expand(-1, 2)}), "target: got 2 numbers per row"),
                         (dict(blocks={"d": ["a"]}), "blocks: got 'd'"), (dict(blocks={"a": []}), "blocks: got no columns"), (dict(ratios=torch.full((100, 3), float("nan"))), "ratios: got 300 NaN"),
                         (dict(ratios=torch.zeros(100, 3), folds=3), "options: got folds"), (dict(chunk=0), "chunk: got 0"), (dict(classifier="trees"), "classifier: got 'trees'"), (dict(classifier=LogisticRegression), "classifier: got <class"),
                         (dict(source=torch.zeros(100, 3)), "source: got Tensor"), (dict(target=torch.zeros(100, 3)), "target: got Tensor")):
        with pytest.raises(ValueError, match=message): e.shift_value(**{**dict(source=source, target=target, loss=loss, graph=CHAIN), **bad})


def test_modalities_of_any_type():
    tokens, pixels, right = torch.arange(12).view(6, 2), torch.arange(6.)[:, None, None].expand(6, 2, 2), torch.arange(6)
    f = count_calls(lambda t, p, y: (t[:, 0] == 2 * y) & (p[:, 0, 0] == y))
    value = e.modality_value(f, (tokens, pixels), (-1, torch.full((2, 2), 9.)), args=(right,), chunk=4)
    masks = torch.tensor(list(product((False, True), repeat=2)))
    assert value(masks).tolist() == [[0.] * 6] * 3 + [[1.] * 6] and f.calls == 8 and f.rows == 24
    for seed in range(5): assert (e.modality_value(f, (tokens, pixels), "permuted", args=(right,), draws=3, generator=seed)(masks)[:3] == 0).all()  # nobody keeps its own
    torch.testing.assert_close(e.modality_importance(value).scores, torch.full((2, 6), .5))
    bf16 = e.modality_value(lambda a, b: (a + b)[:, 0], (torch.ones(3, 1).bfloat16(), torch.ones(3, 1).bfloat16()))
    assert e.modality_importance(bf16).scores.dtype == torch.float32 and torch.equal(e.modality_importance(bf16).scores, torch.ones(2, 3))


@pytest.mark.parametrize("count", (2, 3, 4))
def test_scores_are_differences_of_means(count):
    names = "abcd"[:count]
    subsets = [tuple(n for n, m in zip(names, row) if m) for row in product((False, True), repeat=count)]
    table = {s: torch.rand(5, generator=seeded(i)) for i, s in enumerate(subsets)}
    shuffled = dict(sorted(table.items(), key=lambda kv: kv[0][::-1]))
    for nobody in (True, False):
        result = e.modality_importance(shuffled, names, nobody)
        for i, n in enumerate(names):
            has, lacks = (torch.stack([v for s, v in table.items() if (n in s) == k and (s or nobody)]).mean(0) for k in (True, False))
            torch.testing.assert_close(result.scores[i], has - lacks)
    assert torch.equal(result.performance[-1], table[tuple(names)]) and torch.equal(result.performance[0], table[()])
    mean = lambda m: torch.stack([table[tuple(n for n, k in zip(names, row) if k)].mean() for row in m.tolist()])
    torch.testing.assert_close(e.modality_importance(table, names).scores.mean(1), banzhaf(mean, count).scores)
