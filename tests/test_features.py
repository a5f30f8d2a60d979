"Features: splines by other means, members trained alone, dtypes, costs, residuals of log-ratios, triangles by hand."
from itertools import combinations
import pytest
import torch
from torch import nn
from whatmatters.attribution import features as f
from whatmatters.attribution.coalitions import permutation_shapley
from whatmatters.core.values import count_calls


def close(a, b, **tolerance): torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


@pytest.fixture
def table():
    "Six features; the target is additive in three of them."
    torch.manual_seed(0)
    x = torch.randn(800, 6)
    return x, 2 * x[:, 0] - x[:, 1] + .5 * x[:, 2].clamp(-2, 2) ** 2


@pytest.fixture
def kan():
    torch.manual_seed(1)
    return f.KAN((6, 4, 3), grid=4).requires_grad_(False)


def test_splines_of_degree_one_interpolate():
    grid, heights = torch.tensor([0., 1, 3, 4]), torch.tensor([2., -1, 5, 0])
    at = torch.tensor([0., .25, 1, 2, 3.5, 4])
    close(f.bspline_basis(at, grid, 1) @ heights, [2, 1.25, -1, 2, 2.5, 0])


def test_splines_reproduce_polynomials_of_their_degree():
    x, grid = torch.linspace(-1, 2, 200).double(), torch.tensor([-1., -.2, .5, 1.7, 2]).double()
    for degree in (1, 2, 3, 4):
        basis, target = f.bspline_basis(x, grid, degree), torch.stack([x ** d for d in range(degree + 1)], 1)
        close(basis @ torch.linalg.lstsq(basis, target).solution, target, atol=1e-9)
        rough = (x - .5).clamp(min=0)[:, None] ** (degree + .5)
        assert (basis @ torch.linalg.lstsq(basis, rough).solution - rough).abs().max() > 1e-4


def test_beyond_the_grid_only_the_silu_goes_on(kan):
    kan.weights[0][..., 0] = 0  # no SiLU in the first layer
    far = torch.full((1, 6), 2.)
    close(kan(far), kan(far * 50))
    close(kan(-far), kan(-far * 50))
    assert not torch.allclose(kan(far), kan(far * .9))


def test_save_and_load(kan):
    again = f.KAN((6, 4, 3), grid=4)
    again.load_state_dict(kan.state_dict())
    x = torch.randn(9, 6)
    assert torch.equal(again(x), kan(x)) and kan(x[None]).shape == (1, 9, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(kan, dtype):
    x = torch.randn(300, 6)
    y = kan(x).argmax(1)
    other = f.KAN((6, 4, 3), grid=4).to(dtype)
    other.load_state_dict(kan.state_dict())
    for method in ("l1", "l2", "sensitivity", "knockout"):
        got, want = f.kan_importance(other, x.to(dtype), y, method), f.kan_importance(kan, x, y, method)
        close(got, want, rtol=.1 if dtype is torch.bfloat16 else 1e-4, atol=.05 if dtype is torch.bfloat16 else 1e-5)


def test_fit_in_double_precision(table):
    x, y = table
    kan = f.fit_kan(x.double(), y.double(), epochs=2)
    assert kan(x.double()).dtype == torch.float64 and f.fit_additive(x.double(), y.double()).offset.dtype == torch.float64


def test_same_seed_same_bits_and_members_as_alone(table):
    x, y = table
    xs, ys = x.view(2, 400, 6), y.view(2, 400)
    together, again = (f.fit_kan(xs, ys, epochs=3, seeds=[7, 7]) for _ in range(2))
    for i in (0, 1):
        assert torch.equal(together[i](x), again[i](x))
        close(together[i](x), f.fit_kan(xs[i], ys[i], epochs=3, seeds=[7])(x), atol=1e-3)


def test_additive_is_the_best_of_its_kind(table):
    x, y = table
    kan = f.fit_additive(x, y, ridge=1e-8)
    risk = lambda k: ((k(x)[:, 0] - y) ** 2).mean()
    assert 1e-6 < risk(kan) < .02 and risk(kan) < risk(f.fit_kan(x, y, hidden=(), epochs=100, decay=0))
    start = risk(kan)
    for seed in range(5):  # no direction leads down
        torch.manual_seed(seed)
        other = f.fit_additive(x, y, ridge=1e-8)
        other.weights[0].add_(.02 * torch.randn_like(other.weights[0]))
        assert risk(other) > start


def test_additive_sees_few_rows_at_a_time(table, monkeypatch):
    x, y = table
    most, basis = [], f.KAN.basis
    monkeypatch.setattr(f.KAN, "basis", lambda self, x: (most.append(len(x)), basis(self, x))[1])
    a, b = f.fit_additive(x, y + 1e4), f.fit_additive(x, y + 1e4, chunk=70)
    assert max(most[1:]) == 70 and sum(most[1:]) == 800
    close(a(x) - 1e4, b(x) - 1e4, atol=5e-3)
    close(f.fit_additive(x.double(), y.double(), chunk=70)(x.double()), f.fit_additive(x.double(), y.double())(x.double()))


def test_knockouts_in_double_precision(kan):
    kan, x, y = kan.double(), torch.randn(200, 6).double(), torch.randint(3, (200,))
    value = f.knockout_value(kan, x, y)(torch.ones(1, 6).bool())
    assert value.dtype == torch.float64
    close(value[0], -nn.functional.cross_entropy(kan(x), y), rtol=1e-12)


def test_a_constant_feature_has_no_importance(table):
    x, y = table
    x = torch.cat([x, torch.full((800, 1), 3.)], 1)
    for kan in (f.fit_kan(x, y, epochs=5), f.fit_additive(x, y)):
        for method in ("l1", "l2", "sensitivity", "knockout"): close(f.kan_importance(kan, x, y, method)[6], 0, atol=1e-5)


def test_constants_of_the_splines_count_for_coefficients_only(kan):
    x, y = torch.randn(200, 6), torch.randint(3, (200,))
    moved = f.KAN((6, 4, 3), grid=4)
    moved.load_state_dict(kan.state_dict())
    with torch.no_grad(): moved.weights[0][:, 2, 1:] += 5
    for method in ("l1", "l2"):
        close(f.kan_importance(moved, x, method=method), f.kan_importance(kan, x, method=method), rtol=1e-3)
        assert f.kan_importance(moved, x, method=method, of="coefficients")[2] > 2 * f.kan_importance(kan, x, method=method, of="coefficients")[2]


def test_sensitivity_by_finite_differences(kan):
    kan, x = kan.double(), torch.randn(60, 6).double().clamp(-1.9, 1.9)
    centred = lambda z: z - z.mean(1, keepdim=True)
    slopes = []
    for j in range(6):
        step = 1e-6 * torch.eye(6)[j].double()
        slopes.append(((centred(kan(x + step)) - centred(kan(x - step))) / 2e-6).abs().mean() * x[:, j].std(correction=0))
    close(f.kan_importance(kan, x, method="sensitivity"), torch.stack(slopes), rtol=1e-5)


def test_a_drift_common_to_all_logits_changes_nothing(kan):
    other = f.KAN((6, 4, 3), grid=4)
    other.load_state_dict(kan.state_dict())
    with torch.no_grad(): other.weights[1].add_(torch.randn(1, 4, 8))
    x, y = torch.randn(100, 6), torch.randint(3, (100,))
    for method in ("sensitivity", "knockout"): close(f.kan_importance(other, x, y, method), f.kan_importance(kan, x, y, method), atol=1e-4)


def test_costs(kan):
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    counted = count_calls(kan)
    value = f.knockout_value(counted, x, y, chunk=20)
    value(torch.ones(4, 6).bool())
    assert counted.rows == 4 * 50 + 1 and value.players == 6
    seen = []
    kan.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    for method, rows in (("l1", 0), ("l2", 0), ("sensitivity", 3 * 50), ("knockout", 7 * 50 + 1)):
        seen.clear()
        f.kan_importance(kan, x, y, method, chunk=20)
        assert sum(seen) == rows and max(seen, default=0) <= 20


def test_knockouts_are_a_game_for_any_network_and_estimator():
    network, x = nn.Linear(4, 1).requires_grad_(False), torch.randn(200, 4)
    value = f.knockout_value(network, x, network(x)[:, 0])
    # without noise the loss is the variance of what is missing: features that do not go together pay for themselves alone
    centred = x - x.mean(0)
    shares = network.weight[0] * (torch.cov(centred.T, correction=0) @ network.weight[0])
    close(permutation_shapley(value, 62).scores, shares, atol=1e-4)


def test_partial_correlations_are_those_of_residuals_of_log_ratios():
    torch.manual_seed(0)
    x = torch.randn(300, 5).double() @ torch.randn(5, 5).double()
    found = f.partial_correlations(x.exp())
    for i, j in combinations(range(5), 2):
        for reference in set(range(5)) - {i, j}:
            ratios = x - x[:, [reference]]
            rest = torch.cat([ratios[:, [k for k in range(5) if k not in (i, j, reference)]], torch.ones(300, 1).double()], 1)
            residual = ratios[:, [i, j]] - rest @ torch.linalg.lstsq(rest, ratios[:, [i, j]]).solution
            close(found[i, j], torch.corrcoef(residual.T)[0, 1], atol=1e-8)
    assert (found.abs() <= 1).all() and (found == found.T).all() and (found < 0).any()
    order = torch.tensor([3, 1, 4, 0, 2])
    close(f.partial_correlations(x.exp()[:, order]), found[order][:, order])
    close(f.partial_correlations(x.exp() * 1e3), found)
    close(f.partial_correlations((x * 1e-3).exp()), found, atol=1e-6)  # small variances too


def test_triangles_by_hand():
    torch.manual_seed(0)
    a = (torch.rand(3, 2, 9, 9) < .5).triu(1)
    a = a | a.transpose(-1, -2)
    found = f.three_cycles(a)
    assert found.shape == (3, 2, 9) and found.dtype == torch.long
    for graph, count in zip(a.flatten(0, 1), found.flatten(0, 1)):
        by_hand = torch.zeros(9, dtype=torch.long)
        for nodes in combinations(range(9), 3):
            if all(graph[i, j] for i, j in combinations(nodes, 2)): by_hand[list(nodes)] += 1
        assert torch.equal(count, by_hand)


def test_bad_input(kan):
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    for widths in ((6,), 6):
        with pytest.raises(ValueError, match="widths: got .6.; want the number of features"): f.KAN(widths)
    with pytest.raises(ValueError, match="x: got torch.int64"): f.bspline_basis(torch.arange(3), torch.tensor([0., 1, 2, 3]))
    with pytest.raises(ValueError, match="x: got 5 columns; want 6"): kan.edges(x[:, :5])
    with pytest.raises(ValueError, match="x: got ndarray"): f.kan_importance(kan, x.numpy())
    with pytest.raises(ValueError, match="network: got outputs of shape .50,."): f.knockout_value(lambda x: x[:, 0], x, x[:, 0])(torch.ones(1, 6).bool())
    for name, bad in (("hidden", 5), ("seeds", 3)):
        with pytest.raises(ValueError, match=f"{name}: got {bad}; want a list"): f.fit_kan(x, x[:, 0], **{name: bad})
    with pytest.raises(ValueError, match="degree: got 0"): f.KAN((6, 1), degree=0)
    with pytest.raises(ValueError, match="grid: got 0"): f.KAN((6, 1), grid=0)
    with pytest.raises(ValueError, match="grid: got .* NaN"): f.KAN((6, 1), grid=torch.tensor([0., float("nan")]))
    with pytest.raises(ValueError, match="grid: got 1 after 2; want rising"): f.KAN((6, 1), grid=torch.tensor([0., 2., 1.]))
    with pytest.raises(ValueError, match="did you mean coefficients"): f.kan_importance(kan, x, of="coeficients")
    with pytest.raises(ValueError, match="y: got None; want the values"): f.kan_importance(kan, x, method="knockout")
    with pytest.raises(ValueError, match="x: got one row"): f.fit_kan(x[:1], torch.ones(1))
    with pytest.raises(ValueError, match="y: got classes from 0 to 0"): f.fit_kan(x, y * 0)
    with pytest.raises(ValueError, match="y: got shape"): f.fit_kan(x[None], y)
    with pytest.raises(ValueError, match="compositions: got .* zero or negative"): f.partial_correlations(torch.zeros(9, 3))
