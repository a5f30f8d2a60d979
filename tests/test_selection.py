"Examples kept from scores, as sets, and as instances of a nearest-neighbour classifier."
import itertools
import pytest
import torch
from torch import nn
from whatmatters.core.data import load
from whatmatters.core.ensemble import train_ensemble
from whatmatters.core.per_example import example_losses, gradient_dots
from whatmatters.core.values import count_calls, seeded
from whatmatters.sparsity.coresets import _mask, _swap_bounds, _transport_value, goracs, goracs_by_class, herding, quad, remembered, softmax_influence, transport, transport_cost
from whatmatters.sparsity.examples import RULES, dealrec, keep_examples, quotas, risk_influence, strata_of
from whatmatters.sparsity.instances import GraphAttention, condensed, edge_softmax, edited, gais, graph_recall, hashing_graph, neighbour_graph


@pytest.fixture(scope="module")
def wine(): return load("wine")[0]


# ---- rules

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("fair", [False, True])
def test_every_rule_keeps_exactly_k_and_nothing_that_is_cut(rule, labelled, fair):
    g = seeded(0)
    for k in (0, 1, 7, 25, 40):
        scores, labels = torch.randn(50, generator=g).round(decimals=1), torch.randint(3, (50,), generator=g) if labelled else None
        keep = keep_examples(scores, k, rule=rule, cut=.2, strata=7, labels=labels, fair=fair, generator=3)
        assert keep.dtype == torch.bool and keep.sum() == k and not keep[scores.argsort(descending=True, stable=True)[:10]].any()
        assert torch.equal(keep, keep_examples(scores, k, rule=rule, cut=.2, strata=7, labels=labels, fair=fair, generator=3))


def test_fair_shares_are_the_most_even_ones():
    for sizes in itertools.product(range(4), repeat=3):
        for k in range(sum(sizes) + 1):
            given = quotas(torch.tensor(sizes), k).tolist()
            even = min((sorted(s, reverse=True) for s in itertools.product(*(range(n + 1) for n in sizes)) if sum(s) == k)) # the largest as small as can be, then the next
            assert sorted(given, reverse=True) == even and all(a <= b for a, b in zip(given, sizes))


def test_strata_reach_where_the_scores_are_rare():
    scores = torch.cat([torch.rand(990, generator=seeded(0)), 10 + torch.arange(10.)])
    kept = lambda rule: keep_examples(scores, 20, rule=rule, strata=20, generator=1)[990:].sum()
    assert kept("stratified") > 5 > kept("random") and kept("hardest") == 10 and kept("easiest") == 0
    assert strata_of(torch.ones(5), 3).tolist() == [0] * 5 and strata_of(torch.tensor([0., .5, 1.]), 2).tolist() == [0, 1, 1]


@pytest.mark.parametrize("given, message", [
    (dict(k=11), "k: got 11; want at most 10"), (dict(k=10, cut=.1), "k: got 10; want at most 9"), (dict(k=2, ratio=.1), "k, ratio"), (dict(), "k, ratio"),
    (dict(k=2, rule="best"), "rule: got 'best'"), (dict(k=2, labels=torch.zeros(3, dtype=torch.long)), "labels: got"), (dict(k=2, labels=torch.full((10,), -1)), "labels: got"),
    (dict(ratio=1.2), "ratio: got 1.2"), (dict(k=2, cut=-.1), "cut: got -0.1"), (dict(k=2.5), "k: got 2.5")])
def test_rules_refuse(given, message):
    with pytest.raises(ValueError, match=message): keep_examples(torch.arange(10.), **given)


def test_scores_of_any_type_are_ranked_and_divided_as_numbers():
    counts = torch.arange(10)
    for rule in RULES:
        wanted = keep_examples(counts.double(), 3, rule=rule, generator=1)
        for scores in (counts, counts.byte(), counts.half(), counts.double() * 1e300): assert torch.equal(keep_examples(scores, 3, rule=rule, generator=1), wanted)
        assert keep_examples(torch.ones(10).half(), 3, rule=rule).sum() == 3
    for top in range(1, 60): assert torch.equal(strata_of(torch.arange(top + 1), 50), (torch.arange(top + 1) * 50 // top).clamp(max=49)) # on the borders of strata too
    assert quotas(torch.tensor([10 ** 6, 10 ** 6], dtype=torch.int32), 10 ** 4, fair=False).tolist() == [5000, 5000]
    assert dealrec(torch.ones(3).half(), torch.tensor([0., 1, 2]).half()).tolist() == [0, .25, .5]


def test_scores_that_are_no_numbers_are_refused():
    for call, message in ((lambda: strata_of(torch.tensor([1., float("nan")])), "scores: got 1 NaN"), (lambda: strata_of(torch.ones(0)), "scores: got shape"), (lambda: dealrec(torch.ones(0), torch.ones(0)), "effort: got shape"),
                          (lambda: dealrec(torch.ones(2), torch.ones(2), float("nan")), "strength: got nan")):
        with pytest.raises(ValueError, match=message): call()
    with pytest.raises(ValueError, match="scores: got 1 NaN"): keep_examples(torch.tensor([1., float("nan")]), 1)
    with pytest.raises(ValueError, match="effort: got shape"): dealrec(torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match="sizes: got"): quotas(torch.tensor([1.]), 1)
    assert dealrec(torch.ones(3), torch.tensor([0., 1., 2.]), .5).tolist() == [0, .25, .5]


# ---- influence on the risk

def regression(x, y, l2=.1):
    from sklearn.linear_model import LogisticRegression
    network = nn.Linear(x.shape[1], int(y.max()) + 1, bias=False).double()
    network.weight.data = torch.tensor(LogisticRegression(C=1 / (l2 * len(y)), fit_intercept=False, tol=1e-10, max_iter=2000).fit(x.numpy(), y.numpy()).coef_)
    return network.eval()


def test_risk_influence_is_the_closed_form_whatever_the_batches(wine):
    x, y = wine.x.double(), wine.y
    network = regression(x, y)
    found = risk_influence(network, (x, y), damping=.1)
    hessian = torch.autograd.functional.hessian(lambda w: nn.functional.cross_entropy(x @ w.T, y), network.weight.detach()).reshape(39, 39) + .1 * torch.eye(39)
    g = torch.stack([torch.autograd.grad(example_losses(network, (x[i:i + 1], y[i:i + 1])).sum(), network.weight)[0].flatten() for i in range(len(x))])
    torch.testing.assert_close(found, g @ torch.linalg.solve(hessian, g.mean(0)) / len(x), rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(risk_influence(network, [(x[:7], y[:7]), (x[7:], y[7:])], damping=.1), found, rtol=1e-5, atol=1e-10)


def test_too_few_steps_are_warned_of(wine):
    with pytest.warns(UserWarning, match="after 1 steps a residual of"): risk_influence(regression(wine.x.double(), wine.y), (wine.x.double(), wine.y), damping=.01, steps=1)


def test_risk_influence_reads_language_models_and_some_layers():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.randint(32, (5, 8), generator=seeded(0))
    for parameters in (None, "*.mlp.*"): # with much damping the Hessian does not count
        dots = gradient_dots(network, [ids], [ids], parameters=parameters).mean(1)
        torch.testing.assert_close(risk_influence(network, [ids[:2], ids[2:]], damping=1e6, parameters=parameters) * 1e6 * 5, dots, rtol=1e-3, atol=1e-4)


def test_a_hessian_that_is_not_positive_is_refused():
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double().eval()
    x = torch.randn(20, 2, generator=seeded(0)).double()
    y = (x[:, 0] * x[:, 1] > 0).long()
    with pytest.raises(ValueError, match="damping: got a Hessian with curvature"): risk_influence(network, (x, y), damping=0.)
    with pytest.raises(ValueError, match="damping: got -1"): risk_influence(network, (x, y), damping=-1)
    with pytest.raises(ValueError, match="parameters: got 'nothing'"): risk_influence(network, (x, y), parameters="nothing")


# ---- Quad

@pytest.mark.parametrize("classes", [2, 3])
def test_softmax_influence_is_minus_the_derivative_of_the_reference_loss(wine, classes):
    some = wine.y < classes
    x, y = wine.x[some].double(), wine.y[some]
    scores = softmax_influence(x, y, (x[::5], y[::5]), l2=.1)(torch.arange(len(y)))
    from sklearn.linear_model import LogisticRegression
    def loss(weights):
        model = LogisticRegression(C=(2 if classes == 2 else 1) / (.1 * len(y)), fit_intercept=False, tol=1e-12, max_iter=5000).fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
        return -model.predict_log_proba(x[::5].numpy())[range(len(y[::5])), y[::5]].mean()
    for row in (0, int(scores.argmax()), int(scores.argmin())):
        change = torch.where(torch.arange(len(y)) == row, .02, 0.)
        assert (loss(1 - change) - loss(1 + change)) / .04 * len(y) == pytest.approx(float(scores[row]), rel=.02, abs=1e-3 * float(scores.abs().max()))


def test_quad_looks_for_good_clusters_and_counts_its_looks():
    clusters = torch.arange(8).repeat(50)
    worth = torch.where(clusters < 2, 1., -1.) + .5 * torch.randn(400, generator=seeded(0))
    influence = count_calls(lambda rows: worth[rows])
    found = quad(clusters, influence, 60, take=10, probe=4, alpha=.2)
    assert found.keep.sum() == 60 and influence.rows == found.evaluations == 4 * found.pulls.sum() < 100
    assert (clusters[found.keep] < 2).double().mean() > .9 and (found.means[:2] > 0).all()
    several = quad(clusters, influence, 60, take=10, probe=4, arms=4, alpha=.2, generator=5)
    assert several.keep.sum() == 60 and torch.equal(several.keep, quad(clusters, influence, 60, take=10, probe=4, arms=4, alpha=.2, generator=5).keep)


def test_what_a_cluster_says_may_be_shared():
    clusters = torch.arange(6).repeat_interleave(30)
    worth = torch.where(clusters < 3, -1., 1.)
    shared = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    found = quad(clusters, lambda rows: worth[rows], 30, take=10, probe=2, alpha=0., shared=shared)
    assert found.pulls[:3].sum() == 1 and found.evaluations == 2 * found.pulls.sum() # one bad pull tells of the three
    assert quad(clusters, lambda rows: worth[rows], 30, take=10, probe=2, alpha=0.).pulls[:3].sum() == 3


@pytest.mark.parametrize("given, message", [
    (dict(k=41), "k: got 41; want at most 40"), (dict(k=5, probe=9, take=8), "probe: got 9"), (dict(k=5, threshold=9.), "threshold: got 9.0, above which only 0 rows"),
    (dict(k=30), "threshold: got 0.0, above which only 20"), (dict(k=5, shared=torch.ones(3, 3)), "shared: got"), (dict(k=5, shared=torch.zeros(2, 2)), "ones on the diagonal"), (dict(k=0), "k: got 0")])
def test_quad_refuses(given, message):
    clusters = torch.arange(2).repeat_interleave(20)
    with pytest.raises(ValueError, match=message): quad(clusters, lambda rows: torch.where(clusters[rows] == 0, 1., -1.), **({"take": 10} | given))


def test_quad_refuses_scores_that_are_not_one_per_row():
    with pytest.raises(ValueError, match="influence: got scores of shape"): quad(torch.arange(20) % 2, lambda rows: torch.ones(len(rows), 1), 5)


def test_an_interrupted_selection_goes_on(tmp_path):
    clusters, worth = torch.arange(4).repeat(25), torch.randn(100, generator=seeded(0))
    whole = quad(clusters, lambda rows: worth[rows], 40, take=5, probe=3)
    def interrupted(rows):
        if first.rows > 20: raise KeyboardInterrupt
        return worth[rows]
    first, second = count_calls(interrupted), count_calls(lambda rows: worth[rows])
    with pytest.raises(KeyboardInterrupt): quad(clusters, remembered(first, tmp_path/"scores", "a"), 40, take=5, probe=3)
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]
    found = quad(clusters, remembered(second, tmp_path/"scores", "a"), 40, take=5, probe=3)
    assert torch.equal(found.keep, whole.keep) and second.rows < whole.evaluations
    with pytest.raises(ValueError, match="path: got a file of scores of 'a'; want one of 'b'"): remembered(second, tmp_path/"scores", "b")
    asked = remembered(second)
    before = second.rows
    assert torch.equal(asked(torch.tensor([3, 3, 5])), worth[[3, 3, 5]].double()) and second.rows == before + 2


# ---- GORACS

def problem(seed, n=9, m=6, d=2):
    g = seeded(seed)
    return transport_cost(torch.randn(n, d, generator=g), torch.randn(m, d, generator=g) + .5, torch.rand(n, generator=g))


@pytest.mark.parametrize("k, n", [(1, 4), (3, 3), (3, 7), (4, 10), (5, 12)])
def test_transport_is_optimal_and_its_potentials_prove_it(k, n):
    cost = torch.rand(k, n, generator=seeded(k)).double()
    value, u, v = transport(cost)
    assert (u[:, None] + v <= cost + 1e-9).all() and float(u.mean() + v.mean()) == pytest.approx(value) == pytest.approx(_transport_value(cost))


def test_transport_is_that_of_a_peer():
    ot = pytest.importorskip("ot")
    cost = torch.rand(5, 8, generator=seeded(0)).double()
    assert ot.emd2(torch.full((5,), 1 / 5).numpy(), torch.full((8,), 1 / 8).numpy(), cost.numpy()) == pytest.approx(transport(cost)[0], abs=1e-6)


def test_groups_are_never_below_the_optimum_and_mostly_reach_it():
    reached = 0
    for seed in range(12):
        cost, k = problem(seed), 1 + seed % 4
        optimum = min(_transport_value(cost[list(s)]) for s in itertools.combinations(range(9), k))
        found = goracs(cost, k)
        assert found.keep.sum() == k and found.settled and found.costs[-1] >= optimum - 1e-9
        assert all(b < a for a, b in zip(found.costs, found.costs[1:])) and found.costs[-1] == pytest.approx(transport(cost[found.keep])[0])
        if k == 1: assert found.costs[-1] == pytest.approx(optimum)
        reached += found.costs[-1] <= optimum + 1e-9
    assert reached >= 8


def test_a_settled_group_has_no_exchange_that_improves_it():
    cost = problem(3, 12, 8)
    start = _mask(torch.tensor([0, 1, 2, 3]), cost)
    found = goracs(cost, 4, start=start)
    inside = found.keep.nonzero()[:, 0]
    bounds = _swap_bounds(cost, inside, transport(cost[inside])[1])
    for o, e in itertools.product(range(4), (~found.keep).nonzero()[:, 0].tolist()):
        swapped = inside.clone()
        swapped[o] = e
        value = _transport_value(cost[swapped])
        assert value >= found.costs[-1] - 1e-9 and bounds[o, e] <= value + 1e-9
    assert found.costs[-1] < goracs(cost, 4, start=start, swaps=0).costs[-1] and not goracs(cost, 4, start=start, swaps=1).settled


def test_groups_refuse(wine):
    cost = problem(0)
    for given, message in ((dict(k=10), "k: got 10; want at most 9"), (dict(k=2, start=torch.ones(9, dtype=torch.bool)), "start: got"), (dict(k=0), "k: got 0")):
        with pytest.raises(ValueError, match=message): goracs(cost, **given)
    with pytest.raises(ValueError, match="effort: got"): transport_cost(torch.rand(3, 2), torch.rand(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="target: got"): transport_cost(torch.rand(3, 2), torch.rand(2, 3))
    labels = torch.tensor([0] * 8 + [1]), torch.tensor([0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="k: got 6"): goracs_by_class(cost, labels, 6)
    for wrong in (labels[1] - 1, labels[1].float(), labels[1][:2]):
        with pytest.raises(ValueError, match="labels: got"): goracs_by_class(cost, (labels[0], wrong), 2)
    for wrong in (cost[0], cost / 0):
        with pytest.raises(ValueError, match="cost: got"): transport(wrong)
    assert goracs_by_class(cost, labels, 2).sum() == 2 and goracs(cost, 9).keep.all()


def test_herding_follows_the_mean():
    x = torch.randn(60, 4, generator=seeded(0))
    assert (x[herding(x, 15)].mean(0) - x.mean(0)).norm() < .1 and herding(x, 60).all() and herding(x, 1).sum() == 1
    with pytest.raises(ValueError, match="k: got 61"): herding(x, 61)


# ---- instances

def test_editing_is_that_of_a_peer(wine):
    peer = pytest.importorskip("imblearn.under_sampling")
    kept = peer.EditedNearestNeighbours(sampling_strategy="all", n_neighbors=3, kind_sel="mode").fit(wine.x.numpy(), wine.y.numpy())
    kept.fit_resample(wine.x.numpy(), wine.y.numpy())
    mine = edited(wine.x, wine.y)
    theirs = torch.zeros_like(mine)
    theirs[torch.as_tensor(kept.sample_indices_)] = True
    assert (mine == theirs).double().mean() > .97 # ties go to the lowest class there, and to the row's own here


def test_condensing_is_consistent(wine):
    keep = condensed(wine.x, wine.y, 1)
    nearest = torch.cdist(wine.x, wine.x[keep]).argmin(1)
    assert (wine.y[keep][nearest] == wine.y).all() and keep.double().mean() < .4
    twice = condensed(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) # equal rows of two classes: it ends
    assert twice.sum() == 3 # all but those of the class met first
    assert torch.equal(condensed(wine.x, wine.y.int(), 1), keep) and torch.equal(edited(wine.x, wine.y.int()), edited(wine.x, wine.y))


def test_graphs_name_the_nearest(wine):
    x, exact = wine.x, neighbour_graph(wine.x, 5)
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
    assert torch.equal(exact.edges[1].bincount(), torch.full((len(x),), 5)) and exact.comparisons == len(x) * (len(x) - 1)
    torch.testing.assert_close(distance[exact.edges[1], exact.edges[0]].view(-1, 5).sort(1).values, distance.sort(1).values[:, :5], rtol=1e-4, atol=1e-4)
    parts = neighbour_graph(x, 5, batch=33, labels=wine.y)
    assert parts.comparisons < exact.comparisons / 3 and torch.equal(parts.edges[1].bincount(), exact.edges[1].bincount())
    everything = hashing_graph(x, 5, bits=1, views=12) # a row is somewhere with nearly every other
    assert graph_recall(everything.edges, exact.edges) > .99


def test_levels_and_views_find_more(wine):
    exact = neighbour_graph(wine.x, 5)
    one, levels, views = (hashing_graph(wine.x, 5, bits=6, generator=2, **more) for more in ({}, dict(levels=6), dict(views=6)))
    recall = [graph_recall(g.edges, exact.edges) for g in (one, levels, views)]
    assert recall[0] < recall[1] and recall[0] < recall[2] and one.comparisons < levels.comparisons < exact.comparisons
    for g in (one, levels, views):
        assert (g.edges[0] != g.edges[1]).all() and g.edges.T.unique(dim=0).shape[0] == g.edges.shape[1] and g.edges[1].bincount().max() <= 5


def test_attention_is_a_softmax_over_what_a_node_hears():
    g = seeded(0)
    edges, scores = torch.stack([torch.randint(6, (30,), generator=g), torch.arange(6).repeat(5)]), 50 * torch.randn(30, 2, generator=g)
    weights = edge_softmax(scores, edges[1], 6)
    for node in range(6): torch.testing.assert_close(weights[edges[1] == node], scores[edges[1] == node].softmax(0))


def test_the_network_is_that_of_a_dense_formula():
    torch.manual_seed(0)
    network, x = GraphAttention(3, 2, hidden=4, heads=2), torch.randn(5, 3)
    edges = torch.stack([torch.arange(5).repeat(5), torch.arange(5).repeat_interleave(5)]) # everybody hears everybody
    out, weights = network(x, edges)
    for layer in range(2):
        heads = []
        for w, ask, tell in zip(network.weight[layer], network.ask[layer], network.tell[layer]):
            z = (nn.functional.elu(x) if layer else x) @ w
            heads.append(nn.functional.leaky_relu(z @ ask + (z @ tell).T, .2).softmax(1) @ z)
        x = torch.cat(heads, 1)
    torch.testing.assert_close(out, x)
    torch.testing.assert_close(weights[0].view(5, 5, 2).sum(1), torch.ones(5, 2))


def test_selection_by_attention(wine):
    edges = neighbour_graph(wine.x, 5).edges
    found = gais(wine.x, wine.y, edges, epochs=40)
    assert found.accuracy > .9 and torch.equal(found.scores, found.attention) and torch.equal(gais(wine.x, wine.y, edges, epochs=3).scores, gais(wine.x, wine.y, edges, epochs=3).scores)
    received = torch.stack([torch.zeros(len(wine.y)).index_add(0, found.edges[0], w.mean(1)) for w in found.weights]).mean(0)
    assert float(received.sum()) == pytest.approx(len(wine.y), rel=1e-4) and (found.attention <= received + 1e-5).all()
    state = torch.random.get_rng_state()
    with torch.no_grad(): gais(wine.x, wine.y.int(), edges, "both", epochs=1)
    assert torch.equal(state, torch.random.get_rng_state()) # the global generator is left alone


@pytest.mark.parametrize("call, message", [
    (lambda x, y: gais(x, torch.zeros_like(y), torch.tensor([[0], [1]])), "y: got one class only"), (lambda x, y: gais(x, y, torch.tensor([[0], [999]])), "edges: got"),
    (lambda x, y: gais(x, y, torch.tensor([[0], [1]]), "degree"), "score: got 'degree'"), (lambda x, y: gais(x, y - 1, torch.tensor([[0], [1]])), "y: got numbers below 0"),
    (lambda x, y: neighbour_graph(x, 10, batch=8), "k: got 10"), (lambda x, y: hashing_graph(x, bits=70), "bits, levels: got 70"),
    (lambda x, y: neighbour_graph(x, 3, batch=30, labels=y[:9]), "labels: got shape"), (lambda x, y: hashing_graph(x.long()), "x: got torch.int64"), (lambda x, y: gais(x, y, torch.tensor([[0.], [1.]])), "edges: got"),
    (lambda x, y: graph_recall(torch.zeros(2, 0).long(), torch.zeros(2, 0).long()), "exact: got no edges"), (lambda x, y: softmax_influence(x, y, (x[:0], y[:0])), "reference: got"), (lambda x, y: softmax_influence(x, y, (x[:3], y[:3] - 5)), "reference: got"),
    (lambda x, y: softmax_influence(x * float("nan"), y, (x[:3], y[:3])), "x: got"), (lambda x, y: edited(x[:3], y[:3]), "x: got 3 rows"), (lambda x, y: condensed(x * float("nan"), y), "x: got"),
    (lambda x, y: softmax_influence(x, y, (x[:5], y[:5]), l2=0.), "l2: got 0.0"), (lambda x, y: softmax_influence(x, torch.zeros_like(y), (x[:5], y[:5] * 0)), "y: got one class only")])
def test_instances_refuse(call, message, wine):
    with pytest.raises(ValueError, match=message): call(wine.x, wine.y)


def test_selected_rows_train_what_all_rows_train():
    "A selection is a weight: training on the rows kept is training with the others weighted zero."
    train, test = load("digits", rows=200)
    keep = keep_examples(train.x.flatten(1).norm(dim=1), 60, rule="stratified")
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    weighted = train_ensemble(make, train.x, train.y, [0], weights=keep[None].float(), epochs=3, batch_size=200)
    alone = train_ensemble(make, train.x[keep], train.y[keep], [0], epochs=3, batch_size=200)
    torch.testing.assert_close(weighted.predict(test.x), alone.predict(test.x), rtol=1e-3, atol=1e-4)
