"Datamodels, values of training examples, and the importance of items that are retrieved."
import importlib.util
import numpy as np
import pytest
import torch
from whatmatters.attribution.coalitions import banzhaf, leave_one_out, shapley
from whatmatters.attribution.corpus import expected_votes, importance, learn_importance, prune, ranking, retrieval_probabilities, top_k_value
from whatmatters.core.values import seeded


# ---- retrieval corpora

def corpus(seed=0, n=9, questions=4, binary=False):
    draw = seeded(seed)
    items = ranking(torch.randint(0, 4, (questions, n), generator=draw).float()) # many ties
    utilities = torch.randint(0, 2, (questions, n), generator=draw).double() if binary else torch.randn(questions, n, generator=draw, dtype=torch.float64)
    return items, utilities, torch.rand(n, generator=draw, dtype=torch.float64)


def masks(n): return (torch.arange(2 ** n)[:, None] >> torch.arange(n) & 1).bool()


def by_hand(items, utilities, k, kept):
    "Mean utility of one corpus, in a loop."
    total = 0.
    for row, u in zip(items.tolist(), utilities.tolist()): total += sum([g for i, g in zip(row, u) if i >= 0 and kept[i]][:k]) / k
    return total / len(items)


@pytest.mark.parametrize("k", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("n", [1, 4, 9])
def test_value_and_gradient_are_those_of_all_corpora(n, k):
    items, utilities, w = corpus(n + k, n)
    if n > 4: items[0, 5:] = -1
    every, value = masks(n), top_k_value(items, utilities, k, n)
    v = value(every)
    torch.testing.assert_close(v, torch.tensor([by_hand(items, utilities, k, m) for m in every.tolist()], dtype=torch.float64))
    found = importance(w, items, utilities, k)
    torch.testing.assert_close(found.values.mean(), v @ torch.where(every, w, 1 - w).prod(1))
    for i in range(n):
        rest = torch.cat([w[:i], w[i + 1:]])
        inside = torch.cat([masks(n - 1)[:, :i], torch.ones(2 ** (n - 1), 1, dtype=torch.bool), masks(n - 1)[:, i:]], 1)
        outside = inside.clone()
        outside[:, i] = False
        chance = torch.where(masks(n - 1), rest, 1 - rest).prod(1)
        torch.testing.assert_close(found.gradient[i], ((value(inside) - value(outside)) * chance).sum())


def test_the_gradient_is_that_of_finite_differences():
    items, utilities, w = corpus(3, 30, 6)
    w, step = w * .8 + .1, 1e-4 # multilinear: the difference quotient of one weight is exact
    found = importance(w, items, utilities, 4)
    for i in (0, 7, 29):
        up, down = w.clone(), w.clone()
        up[i] += step
        down[i] -= step
        torch.testing.assert_close((importance(up, items, utilities, 4).values - importance(down, items, utilities, 4).values).mean() / (2 * step), found.gradient[i])


def test_three_values_of_data_are_one_gradient():
    items, utilities, _ = corpus(5, 10)
    value, at = top_k_value(items, utilities, 3), lambda t: importance(torch.full((10,), t, dtype=torch.float64), items, utilities, 3).gradient
    torch.testing.assert_close(at(1.), leave_one_out(value).scores)
    torch.testing.assert_close(at(.5), banzhaf(value).scores)
    points, shares = np.polynomial.legendre.leggauss(6)
    torch.testing.assert_close(sum(s / 2 * at((p + 1) / 2) for p, s in zip(points, shares)), shapley(value).scores)


@pytest.mark.parametrize("weights", ["half", "ones", "random", "some zero"])
@pytest.mark.parametrize("epsilon", [.1, 1e-2, 1e-6])
def test_the_short_walk_is_within_epsilon_and_shorter(weights, epsilon):
    items, utilities, w = corpus(7, 300, 20, binary=True)
    w = {"half": torch.full_like(w, .5), "ones": torch.ones_like(w), "random": w, "some zero": (w - .4).clamp_min(0)}[weights]
    for row in range(5): # the gradient of one question, which is what is bounded
        exact, short = (importance(w, items[row:row + 1], utilities[row:row + 1], 5, e) for e in (0., epsilon))
        assert (exact.values - short.values).abs().max() <= epsilon and (exact.gradient - short.gradient).abs().max() <= epsilon
        assert short.read < exact.read / 2 or weights == "some zero" and short.read < exact.read


def test_chunks_change_nothing():
    items, utilities, w = corpus(1, 40, 30)
    whole, parts = importance(w, items, utilities, 3), importance(w, items, utilities, 3, chunk=7)
    assert torch.equal(whole.values, parts.values)
    torch.testing.assert_close(whole.gradient, parts.gradient, rtol=1e-12, atol=1e-15) # a sum in another order
    assert torch.equal(retrieval_probabilities(w, items, 3), retrieval_probabilities(w, items, 3, chunk=1))
    some = torch.rand(9, 40, generator=seeded(0)) < .5
    assert torch.equal(top_k_value(items, utilities, 3)(some), top_k_value(items, utilities, 3, chunk=2)(some))


def test_read_probabilities():
    items, _, w = corpus(2, 8, 3)
    every = masks(8)
    kept = every[:, items] # (corpora, questions, ranks)
    read = (kept & (kept.cumsum(2) <= 2)).double()
    torch.testing.assert_close(retrieval_probabilities(w, items, 2), (read * torch.where(every, w, 1 - w).prod(1)[:, None, None]).sum(0))


def test_ties_go_to_the_first_and_lists_may_end():
    assert ranking(torch.tensor([[1., 2, 2, 1]])).tolist() == [[1, 2, 0, 3]] and ranking(torch.tensor([[1., 2, 2, 1]]), 2).tolist() == [[1, 2]]
    items, utilities = torch.tensor([[1, 0, -1], [2, -1, -1]]), torch.ones(2, 3)
    found = importance(torch.ones(4), items, utilities, 3)
    assert found.values.tolist() == [2 / 3, 1 / 3] and found.gradient[3] == 0 # what is missing contributes nothing
    torch.testing.assert_close(found.gradient[:3], torch.full((3,), 1 / 6, dtype=torch.float64))


def test_learning_drops_what_misleads_and_sources_share():
    items = ranking(torch.rand(80, 60, generator=seeded(0)))
    bad = torch.arange(60) % 4 == 0
    utilities = torch.where(bad[items], 0., 1.)
    own = learn_importance(items, utilities, 5)
    assert own[bad].max() < .05 and own[~bad].min() > .5
    shared = learn_importance(items, utilities, 5, groups=torch.arange(60) % 4)
    assert all(len(shared[torch.arange(60) % 4 == g].unique()) == 1 for g in range(4)) and shared[0] == 0 and shared[1] > .7 # without rivals a good item has nothing to gain
    before, after = (importance(w, items, utilities, 5).values.mean() for w in (torch.full((60,), .5), own))
    assert after > before
    assert learn_importance(items, utilities, 5, count=70)[60:].tolist() == [.5] * 10 # nothing is known of what is never found


def test_votes_and_pruning():
    items, answers = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([0, 1, 1])
    assert expected_votes(torch.ones(3), items, answers, 1).tolist() == [[1, 0], [0, 1]]
    assert expected_votes(torch.tensor([0., 1, 1]), items, answers, 2).tolist() == [[0, 2], [0, 2]]
    assert expected_votes(torch.full((3,), .5), items, answers, 1)[0].tolist() == [.5, .375]
    own_words = torch.tensor([[0, 1, 0], [1, 1, 0]]) # an item may say other things to other questions
    assert expected_votes(torch.ones(3), items, own_words, 2).tolist() == [[1, 1], [0, 2]]
    kept = prune(torch.tensor([.1, .9, .9]), items, answers, torch.tensor([1, 1]), 1, shares=(0., .3, .4))
    assert kept.tolist() == [False, True, True]
    assert prune(torch.tensor([.5, .5, .5]), items, answers, torch.tensor([1, 1]), 1).all() # equal weights stay together


def test_what_a_corpus_refuses():
    items, utilities, w = corpus()
    for call, words in (
        (lambda: importance(w + 1, items, utilities), "weights: got numbers from"),
        (lambda: importance(w * float("nan"), items, utilities), "weights: got"),
        (lambda: importance(w[:3], items, utilities), "items: got numbers from 0 to 8; want 0 to 2"),
        (lambda: importance(w, items.double(), utilities), "items: got torch.float64"),
        (lambda: importance(w, items, utilities[:, :2]), "utilities: got shape"),
        (lambda: importance(w, items, utilities, 0), "k: got 0"),
        (lambda: importance(w, items, utilities, epsilon=1.), "epsilon: got 1.0"),
        (lambda: learn_importance(items, utilities, rate=0), "rate: got 0"),
        (lambda: learn_importance(items, utilities, groups=torch.zeros(3).long()), "groups: got shape"),
        (lambda: learn_importance(items, utilities, groups=torch.full((9,), -1)), "groups: got torch.int64, smallest -1"),
        (lambda: expected_votes(w, items, torch.zeros(4).long()), "answers: got shape"),
        (lambda: expected_votes(w, items, -torch.ones(9).long()), "answers: got torch.int64, smallest -1"),
        (lambda: prune(w, items, torch.zeros(9).long(), torch.zeros(4).long(), shares=(1.,)), "shares: got"),
        (lambda: top_k_value(items, utilities)(torch.ones(2, 4).bool()), "masks: got shape"),
        (lambda: ranking(torch.zeros(2, 3), 4), "depth: got 4"),
        (lambda: ranking(torch.zeros(3)), "similarities: got shape")):
        with pytest.raises(ValueError, match=words): call()
