"Coalitions: peers, coverage of standard errors, continued runs, costs, refusals."
import captum.attr
import pytest
import torch
from torch import nn
from whatmatters.attribution import coalitions as c
from whatmatters.core.values import class_value, count_calls, mask_value, seeded


@pytest.fixture
def game():
    "Ten features of a random network and a background of eight rows."
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    network.requires_grad_(False)
    x, background = 2 * torch.randn(10).double(), torch.randn(8, 10).double()
    return (lambda x: network(x)[:, 0]), x, background


def masks_of(count): return (torch.arange(2 ** count)[:, None] >> torch.arange(count) & 1).bool()


def table(count, seed=0, decay=.6):
    "A game of random interactions of all sizes, the larger the weaker, looked up."
    draw = torch.Generator().manual_seed(seed)
    masks = masks_of(count)
    worth = torch.randn(2 ** count, generator=draw, dtype=torch.float64) * decay ** masks.sum(1)
    values = ((masks.double() @ masks.double().T == masks.sum(1).double()).double() @ worth)  # sums over the subsets of each coalition
    value = lambda m: values[(m.long() << torch.arange(count)).sum(1)]
    value.players = count
    return value


def close(a, b, **tolerance): torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


def test_shap(game):
    shap = pytest.importorskip("shap")
    f, x, background = game
    value, numpy_f = c.background_value(f, x, background), lambda rows: f(torch.as_tensor(rows)).numpy()
    exact = shap.explainers.Exact(numpy_f, shap.maskers.Independent(background.numpy()))(x[None].numpy()).values[0]
    close(c.shapley(value).scores, exact)
    close(c.kernel_shap(value, 1024).scores, exact)
    theirs = shap.KernelExplainer(numpy_f, background.numpy()).shap_values(x.numpy(), nsamples=1022, l1_reg=False, silent=True)
    close(c.kernel_shap(value, 1024, order=1).scores, theirs)
    weights = torch.linspace(-1, 2, 10).double()
    linear = shap.LinearExplainer((weights.numpy(), .5), shap.maskers.Independent(background.numpy())).shap_values(x[None].numpy())[0]
    close(c.linear_shap(weights, x, background), linear)
    close(c.shapley(c.background_value(lambda x: x @ weights + .5, x, background)).scores, linear)


def test_interactions_by_their_definition():
    from itertools import permutations
    value = table(5)
    at = lambda *players: float(value(torch.tensor([[i in players for i in range(5)]])))
    scores = c.shapley_interactions(value).scores
    for i, j in ((0, 1), (2, 4), (3, 1)):
        merged = list(permutations([p for p in range(5) if p not in (i, j)] + [(i, j)]))  # orders in which the two arrive as one
        before = [o[:o.index((i, j))] for o in merged]
        close(scores[i, j], sum(at(*b, i, j) - at(*b, i) - at(*b, j) + at(*b) for b in before) / len(merged))
    assert torch.equal(scores, scores.T) and scores.diagonal().abs().max() == 0


def test_captum(game):
    f, x, _ = game
    baseline = torch.linspace(-1, 1, 10).double()
    value = mask_value(f, x, fill=baseline)
    ablation, players = captum.attr.FeatureAblation(f), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3])
    close(c.leave_one_out(value).scores, ablation.attribute(x[None], baseline[None])[0])
    groups = players == torch.arange(4)[:, None]
    close(c.occlusion(value, groups).scores, ablation.attribute(x[None], baseline[None], feature_mask=players[None])[0])
    close(c.occlusion(value, c.sliding((10,), (3,), 2)).scores, captum.attr.Occlusion(f).attribute(x[None], (3,), strides=2, baselines=baseline[None])[0])
    grouped = mask_value(f, x, players, baseline)
    theirs = captum.attr.ShapleyValues(f).attribute(x[None], baseline[None], feature_mask=players[None])[0]
    close(c.shapley(grouped).scores[players], theirs)
    close(c.kernel_shap(grouped, 16).scores[players], theirs)
    close(c.permutation_shapley(grouped, 20_000).scores[players], theirs, rtol=.05, atol=.05)


def test_captum_occlusion_of_images():
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 5 * 4, 1)).double()
    x = torch.randn(1, 1, 7, 6).double()
    value = mask_value(lambda x: network(x)[:, 0], x[0])
    for window, stride in (((3, 2), (2, 2)), ((2, 2), (1, 2))):
        theirs = captum.attr.Occlusion(network).attribute(x, (1, *window), strides=(1, *stride))
        close(c.occlusion(value, c.sliding((7, 6), window, stride)).scores.view(7, 6), theirs[0, 0].detach())


SHAPLEY = {"permutation_shapley": c.permutation_shapley, "kernel_shap order 1": lambda *a, **k: c.kernel_shap(*a, order=1, **k), "kernel_shap": c.kernel_shap}
SAMPLED = {**SHAPLEY, "banzhaf_sampling": c.banzhaf_sampling, "banzhaf_sampling order 1": lambda *a, **k: c.banzhaf_sampling(*a, order=1, **k)}


@pytest.mark.parametrize("name", SAMPLED)
def test_standard_errors_cover(name):
    value, budget = table(9), {"permutation_shapley": 600}.get(name, 240)
    exact = (c.banzhaf if "banzhaf" in name else c.shapley)(value).scores
    runs = [SAMPLED[name](value, budget, generator=s) for s in range(200)]
    z = torch.stack([(r.scores - exact) / r.error for r in runs])
    ridge = name in ("kernel_shap", "banzhaf_sampling")  # which fits half of all coalitions with hundreds of slopes: leaving one out is then on the safe side
    assert (.25 if ridge else .8) < (z ** 2).mean() < (1.2 if ridge else 1.3)
    assert .92 < (z.abs() < 2).double().mean()
    if not ridge:  # the ridge trades a little bias for much variance, and its error includes both
        bias, spread = torch.stack([r.scores for r in runs]).mean(0) - exact, torch.stack([r.scores for r in runs]).std(0)
        assert (bias / spread * 200 ** .5).abs().max() < 4


def cubic(count):
    "(sum of weights - 3) ** 3, whose triples all pull the same way, and its Shapley values: each product of weights is shared equally."
    w = torch.rand(count, generator=torch.Generator().manual_seed(0)).double()
    rest, rest2 = w.sum() - w, (w ** 2).sum() - w ** 2
    return (lambda m: (m.double() @ w - 3) ** 3), w ** 3 + 1.5 * (w ** 2 * rest + w * rest2) + w * (rest ** 2 - rest2) - 9 * w * (w + rest) + 27 * w


def product(count):
    w = torch.rand(count, generator=torch.Generator().manual_seed(0)).double()
    value = lambda m: torch.where(m, 1 + w, 1.).prod(1)
    return value, c.shapley(value, count).scores


@pytest.mark.parametrize("game, count, budget", [(cubic, 30, 180), (cubic, 30, 800), (product, 14, 60), (product, 14, 120)])
def test_errors_cover_the_bias_of_the_ridge(game, count, budget):
    value, exact = game(count)  # more triples than pairs drawn, which all pull the same way
    close(cubic(8)[1], c.shapley(cubic(8)[0], 8).scores, atol=1e-9)
    runs = [c.kernel_shap(value, budget, players=count, generator=s) for s in range(40)]
    off, said = torch.stack([r.scores - exact for r in runs]), torch.stack([r.error for r in runs])
    assert runs[0].state["order"] == 3 and c.comb(count, 3) > budget // 2
    assert .9 <= (off.abs() < 1.96 * said).double().mean()
    assert (said ** 2).mean().sqrt() < 2.5 * (off ** 2).mean().sqrt()  # safe, not useless
    assert (off ** 2).mean().sqrt() < .5 * torch.stack([c.kernel_shap(value, budget, 1, players=count, generator=s).scores - exact for s in range(10)]).pow(2).mean().sqrt()


def test_the_order_used_is_said():
    value = lambda m: m.double().sum(1)
    for run in (c.kernel_shap, c.banzhaf_sampling):
        assert [run(value, b, players=p).state["order"] for p, b in ((9, 100), (9, 512), (26, 4000), (26, 4100))] == [3, 1, 3, 1]
        assert run(value, 100, order=1, players=9).state["order"] == 1
        assert run(value, 150, players=9, more=run(value, 100, players=9)).state["order"] == 3


def test_no_error_from_few_pairs_of_orders():
    both = lambda m: m.all(1).double()
    assert c.permutation_shapley(both, 2 + 4 * 16, players=9).error is None and c.permutation_shapley(both, 2 + 5 * 16, players=9).error is not None
    for count in (1, 2):
        result = c.permutation_shapley(both, 20, players=count)
        close(result.scores, c.shapley(both, count).scores)
        assert result.error.abs().max() == 0


def test_windows_of_one_number():
    assert torch.equal(c.sliding((5,), 2), c.sliding((5,), (2,))) and torch.equal(c.sliding(5, 2), c.sliding((5,), (2,)))
    assert torch.equal(c.sliding((4, 3), 2, 2), c.sliding((4, 3), (2, 2), (2, 2)))


def test_deep_parses():
    words = 2000
    tree = words - 1
    for w in range(words - 2, -1, -1): tree = (w, tree)
    nodes, parents = c.tree_nodes(tree, words)
    assert nodes.shape == (2 * words - 1, words) and sorted(nodes.sum(1).tolist()) == sorted([1] * words + list(range(2, words + 1)))
    assert (nodes[1:] & ~nodes[parents[1:]]).sum() == 0
    again = c.tree_of_spans([(w, words) for w in range(words)], words)
    assert all(torch.equal(a, b) for a, b in zip(c.tree_nodes(again, words), (nodes, parents)))
    assert c.tree_of_spans([], 1) == (0,) and c.tree_of_spans([(0, 1), (1, 3)], 4) == (0, (1, 2), 3)


def test_lime_error_is_the_spread_over_seeds():
    runs = [c.lime(table(8), 400, generator=s) for s in range(200)]
    spread, said = torch.stack([r.scores for r in runs]).std(0), torch.stack([r.error for r in runs]).mean(0)
    close(said, spread, rtol=.2)


@pytest.mark.parametrize("name", SHAPLEY)
def test_axioms_hold_for_every_sample(name):
    value = table(9)
    result = SHAPLEY[name](value, 150, generator=4)
    ends = value(torch.tensor([[False], [True]]).expand(2, 9))
    close(result.scores.sum(), ends[1] - ends[0])
    assert result.base == ends[0]
    worth = torch.arange(9.).double() - 4
    close(SHAPLEY[name](lambda m: m.double() @ worth + 3, 100, players=9).scores, worth, atol=1e-9)


def test_triples_are_what_the_regression_removes():
    value = table(12, 3, .5)
    exact = c.shapley(value).scores
    error = {n: sum((f(value, 1000, generator=s).scores - exact).norm() for s in range(10)) for n, f in SHAPLEY.items()}
    assert error["kernel_shap"] < .5 * error["kernel_shap order 1"] and error["kernel_shap"] < .5 * error["permutation_shapley"], error
    masks = masks_of(12)
    cubic = lambda m: (m[:, 0] & m[:, 1] & m[:, 2]).double() - 2 * (m[:, 3] & m[:, 9] & m[:, 11]).double() + m[:, 4].double()
    close(c.kernel_shap(cubic, 700, players=12).scores, c.shapley(cubic, 12).scores, atol=1e-5)
    assert c.shapley(lambda m: cubic(m), 12).calls == len(masks)


@pytest.mark.parametrize("centred", [True, False])
def test_both_ways_to_the_triples_agree(centred):
    draw = torch.Generator().manual_seed(0)
    z = (torch.rand(100, 8, generator=draw) < .5).double() * 2 - 1  # 56 triples, fewer than rows, or more than the first 50
    root = torch.rand(100, generator=draw).double() + .5
    def gram(rows, wide):
        z_, r_ = z[:rows], root[:rows]
        q = torch.linalg.qr(z_ * r_[:, None])[0] if not centred else torch.linalg.qr((z_ @ torch.linalg.svd(torch.eye(8).double() - 1 / 8)[0][:, :-1]) * r_[:, None])[0]
        u, l, cross = c._triples(z_, r_, q, centred)
        return (u * l) @ u.T, cross @ u
    a = torch.tensor(list(c.combinations(range(8), 3)))
    for rows in (50, 100):
        z_, r_ = z[:rows], root[:rows]
        psi = z_[:, a].prod(2) - (z_[:, a].mean(2) if centred else 0)
        k = (psi * r_[:, None]) @ (psi * r_[:, None]).T
        q = torch.linalg.qr((z_ @ torch.linalg.svd(torch.eye(8).double() - 1 / 8)[0][:, :-1] if centred else z_) * r_[:, None])[0]
        out = torch.eye(rows).double() - q @ q.T
        ours, cross = gram(rows, None)
        close(ours, out @ k @ out, atol=1e-8)


@pytest.mark.parametrize("name", [*SAMPLED, "lime"])
@pytest.mark.parametrize("count", [9, 30])
def test_going_on_is_one_long_run(name, count):
    run = {**SAMPLED, "lime": c.lime}[name]
    weights = torch.randn(count, count, generator=seeded(1))
    value = count_calls(lambda m: torch.tanh(m.float() @ weights).sum(1) / 3)
    first = run(value, 150, players=count, generator=5)
    again = run(value, 400, players=count, more=first)
    assert value.rows == again.calls <= 400 and first.calls <= 150
    whole = run(value, 400, players=count, generator=5)
    close(again.scores, whole.scores), close(again.error, whole.error, rtol=1e-2)  # a matrix product rounds by the rows that it is given
    assert torch.equal(run(value, first.calls, players=count, more=first).scores, first.scores)
    assert not torch.equal(run(value, 400, players=count, generator=6).scores, whole.scores)
    assert whole.scores.dtype == torch.float32


def test_same_draws_whatever_the_chunk(game):
    f, x, background = game
    seen = []
    def asked(chunk):
        value = c.background_value(f, x, background, chunk=chunk)
        watched = lambda m: (seen.append(m), value(m))[1]
        return c.kernel_shap(watched, 200, players=10).scores
    close(asked(7), asked(1024), rtol=1e-9)
    assert torch.equal(*seen)


def test_memory_is_bounded_by_the_chunk(game):
    f, x, background = game
    largest = [0]
    def watched(rows):
        largest[0] = max(largest[0], len(rows))
        return f(rows)
    counted = count_calls(watched)
    c.shapley(c.background_value(counted, x, background, chunk=100))
    assert largest[0] == 100 and counted.rows == 1024 * 8


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_small_games_are_exact(count):
    value = table(count)
    for budget in (2 ** count, 10_000):
        close(c.kernel_shap(value, max(budget, 2)).scores, c.shapley(value).scores, atol=1e-10)
        close(c.banzhaf_sampling(value, budget).scores, c.banzhaf(value).scores, atol=1e-10)
        assert c.kernel_shap(value, max(budget, 2)).calls == 2 ** count and c.kernel_shap(value, max(budget, 2)).error.abs().max() == 0
    close(c.permutation_shapley(value, 20_000).scores.sum(), (value(torch.ones(1, count).bool()) - value(torch.zeros(1, count).bool()))[0])


def test_no_coalition_is_asked_twice():
    asked = []
    def value(m):
        asked.append(m)
        return m.double().sum(1)
    for run in (lambda: c.kernel_shap(value, 700, players=11), lambda: c.banzhaf_sampling(value, 700, players=11), lambda: c.kernel_shap(value, 900, players=40), lambda: c.banzhaf_sampling(value, 900, players=40)):
        asked.clear()
        result = run()
        assert len(torch.cat(asked).unique(dim=0)) == result.calls == (900 if len(result.scores) == 40 else 700)


def test_half_precision(game):
    f, x, _ = game
    value = mask_value(lambda x: f(x.double()).bfloat16(), x.bfloat16())
    for run in (c.leave_one_out, c.shapley, lambda v: c.kernel_shap(v, 300), lambda v: c.lime(v, 300), lambda v: c.ls_tree(v, list(range(10)))):
        assert run(value).scores.dtype == torch.float32


def test_ls_tree_by_hand():
    nodes, parents = c.tree_nodes([[0, [1]], [[[2, 3]], 4]], 5)
    assert [n.nonzero()[:, 0].tolist() for n in nodes] == [[0, 1, 2, 3, 4], [0, 1], [0], [1], [2, 3, 4], [2, 3], [2], [3], [4]]
    assert parents.tolist() == [-1, 0, 1, 1, 0, 4, 5, 5, 4]
    assert c.tree_of_spans([(0, 2), (2, 5), (2, 4), (3, 4)], 5) == ((0, 1), ((2, 3), 4))
    value = count_calls(lambda m: torch.tanh(m.double().sum(1)) + 2 * (m[:, 2] & m[:, 3]))
    result = c.ls_tree(value, [[0, 1], [[2, 3], 4]], players=5)
    assert value.rows == result.calls == 10
    psi = torch.linalg.lstsq(nodes.double(), (value(nodes) - value(nodes[:1] & False))[:, None]).solution[:, 0]
    close(result.scores, psi)
    found = c.tree_interactions(result)
    assert found.nodes[found.score.argmax()].int().tolist() == [0, 0, 1, 1, 0]
    # the deepest node: with all above it gone, the words 2 and 3 share what the node has beyond them
    gain = lambda *words: float(value(torch.tensor([[i in words for i in range(5)]]))) - float(value(torch.zeros(1, 5).bool()))
    extra = gain(2, 3) - gain(2) - gain(3)
    close(found.direction[found.score.argmax()], 2 * extra / 3)
    close(found.score[found.score.argmax()], 2 ** .5 * extra / 3)


BAD = {
    "too many": (lambda v: c.shapley(v, 21), "players: got 21; want at most 20.*2,097,152 model calls"),
    "too small": (lambda v: c.kernel_shap(v, 20), "budget: got 20; want at least 26 model calls for 9 players"),
    "one pair": (lambda v: c.permutation_shapley(v, 17), "budget: got 17; want at least 18"),
    "banzhaf": (lambda v: c.banzhaf_sampling(v, 35), "budget: got 35; want at least 36"),
    "lime": (lambda v: c.lime(v, 10), "budget: got 10; want at least 11"),
    "order": (lambda v: c.kernel_shap(v, 200, order=2), "order: got 2; want 1, 3 or None"),
    "width": (lambda v: c.lime(v, width=0), "width: got 0"),
    "narrow": (lambda v: c.lime(v, 200, width=.001), "width: got 0.001; want a wider kernel"),
    "players": (lambda v: c.kernel_shap(v, 200, players=8), "players: got 8; want 9"),
    "unknown": (lambda v: c.kernel_shap(lambda m: v(m), 200), "players: got None"),
    "other": (lambda v: c.kernel_shap(v, 200, more=c.leave_one_out(table(9))), "more: got no result of kernel_shap"),
    "groups": (lambda v: c.occlusion(v, torch.eye(8).bool()), "groups: got torch.bool of shape .8, 8."),
    "parse": (lambda v: c.ls_tree(v, (0, 1)), "tree: got words .0, 1., .2, 3, 4, 5, 6, 7, 8. missing"),
    "window": (lambda v: c.sliding((3, 3), (2,)), "window: got 1 dimensions"),
    "half a window": (lambda v: c.sliding((5,), 0), "window: got 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_a_model_call(what):
    inner = table(9)
    value = count_calls(inner)
    value.players = None if what in ("too many", "unknown") else 9
    if value.players is None: del value.players
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message): call(value)
    assert value.calls == 0


def test_more_is_checked():
    first = c.kernel_shap(table(9), 100)
    for options, message in ((dict(generator=1, budget=200), "generator: got one beside"), (dict(budget=50), "budget: got 50; want at least the 100"), (dict(budget=200, order=1), "more: got no result")):
        with pytest.raises(ValueError, match=message): c.kernel_shap(table(9), more=first, **options)
    with pytest.raises(ValueError, match="more: got a result for 9 players"): c.kernel_shap(table(8), 200, more=first)


def test_what_the_model_says_is_checked():
    with pytest.raises(ValueError, match="value: got .* NaN"): c.kernel_shap(lambda m: m.sum(1) / (m.sum(1) - 3), 100, players=9)
    with pytest.raises(ValueError, match="value: got shape"): c.kernel_shap(lambda m: m.double(), 100, players=9)


def test_background_is_checked(game):
    f, x, background = game
    for bad, message in ((background[:, :9], "want rows as wide"), (background[0], "background: got shape"), (background[:0], "background: got shape"), (background / 0, "background: got .* infinite")):
        with pytest.raises(ValueError, match=message): c.background_value(f, x, bad)


def test_arguments_travel_with_the_rows(game):
    torch.manual_seed(2)
    network = nn.Linear(10, 3).double().requires_grad_(False)
    _, x, background = game
    value = c.background_value(class_value(network), x, background, args=(torch.tensor(2),), chunk=7)
    close(c.shapley(value).scores, c.linear_shap(network.weight[2], x, background))
