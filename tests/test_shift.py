"Importance weights: what they are worth, and whether those that are found are the true ones."
import math
import numpy as np
import pytest
import torch
from scipy.stats import norm
from whatmatters.sparsity.shift import density_ratio, diagnose, effective_size, kernel_mean_matching, pareto_k, retasa, weighted_mean


def normals(n, mean=0., deviation=1., seed=0): return mean + deviation * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def moving(n, seed=0, mean=.8, deviation=.7, noise=.4):
    y, z = normals(n, seed=seed), normals(n, mean, deviation, seed + 1)
    truth = torch.tensor(norm.pdf(y, mean, deviation) / norm.pdf(y)).float()
    return y + noise * normals(n, seed=seed + 2), y, z + noise * normals(n, seed=seed + 3), truth


# diagnostics

def test_weighted_mean_against_numpy():
    v, w = normals(30).view(10, 3), normals(10).abs()
    np.testing.assert_allclose(weighted_mean(v, w), np.average(v, axis=0, weights=w), rtol=1e-5)
    assert weighted_mean(torch.tensor([1, 2]), torch.tensor([3, 1])).item() == 1.25


def test_effective_size_is_scale_free_and_between_one_and_n():
    w = normals(50).exp()
    assert effective_size(w) == pytest.approx(effective_size(w * 1e30)) and 1 <= effective_size(w) <= 50
    assert effective_size(torch.ones(7)) == 7 and effective_size(torch.tensor([0., 5., 0.])) == 1


@pytest.mark.parametrize("k", [.1, .4, .8, 1.2])
def test_pareto_k_finds_the_tail(k):
    draws = np.random.default_rng(0)
    found = np.mean([pareto_k(torch.tensor(draws.uniform(size=3000) ** -k)) for _ in range(8)])
    assert abs(found - k) < .12


def test_pareto_k_against_arviz():
    psis = pytest.importorskip("arviz").psislw
    log = normals(2000).double().numpy()
    assert abs(float(psis(log)[1]) - pareto_k(torch.tensor(np.exp(log)))) < .1


def test_pareto_k_of_few_equal_and_partly_equal_weights():
    assert math.isnan(pareto_k(torch.rand(24))) and pareto_k(torch.ones(100)) == -math.inf and pareto_k(torch.cat([torch.rand(50), torch.ones(50)])) == -math.inf
    assert pareto_k(normals(400).exp()) == pytest.approx(pareto_k(normals(400).exp() * 7), abs=1e-4)
    assert not diagnose(torch.tensor([1e6] + [1.] * 200)).reliable and diagnose(torch.ones(30)).reliable


def test_largest_share():
    d = diagnose(torch.tensor([1., 1., 2.]))
    assert d.largest == .5 and d.examples == 3 and not d.reliable # an effective size below ten


@pytest.mark.parametrize("f", [diagnose, effective_size, pareto_k, lambda w: weighted_mean(torch.zeros(2), w)])
@pytest.mark.parametrize("bad, said", [([1., -1.], "1 negative"), ([0., 0.], "2 zeros"), ([1., float("nan")], "1 NaN"), ([1., float("inf")], "1 NaN or infinite"), ([], "shape")])
def test_bad_weights_are_refused(f, bad, said):
    with pytest.raises(ValueError, match=f"weights: got {said}"): f(torch.tensor(bad))


# ratios

def test_density_ratio_of_normals_with_unequal_numbers():
    x, t = normals(3000), normals(1000, .5, .9, 1)
    grid = torch.linspace(-1, 1.5, 11)
    truth = torch.tensor(norm.pdf(grid, .5, .9) / norm.pdf(grid)).float()
    assert (density_ratio(x, t, grid) / truth - 1).abs().max() < .25 and density_ratio(x, t).mean() == pytest.approx(1, abs=.03)
    assert (density_ratio(x, normals(3000, seed=5)) - 1).abs().mean() < .06


def test_density_ratio_with_another_classifier():
    from sklearn.tree import DecisionTreeClassifier
    x, t = torch.zeros(40), torch.zeros(20)
    x[:10], t[:15] = 1, 1 # the ratio is 3 at one and 1/3 at nought
    torch.testing.assert_close(density_ratio(x, t, classifier=DecisionTreeClassifier()), torch.where(x > 0, 3., 1 / 3))


def test_no_overlap_is_refused():
    for f in (lambda: density_ratio(normals(30), normals(30) + 50), lambda: retasa(normals(30), normals(30), normals(30) + 50)):
        with pytest.raises(ValueError, match="target: got examples .*; want a target that overlaps"): f()
    with pytest.raises(ValueError, match="target: got 2 features"): density_ratio(torch.rand(9, 3), torch.rand(9, 2))
    with pytest.raises(ValueError, match="at: got 2 features; want 1"): density_ratio(normals(9), normals(9, seed=1), torch.rand(3, 2))
    with pytest.raises(ValueError, match="source: got 1 NaN"): density_ratio(torch.tensor([float("nan"), 1.]), torch.rand(2))


def test_kernel_mean_matching_minimises_what_it_says():
    x, t = normals(60), normals(60, .6, .8, 1)
    w = kernel_mean_matching(x, t)
    width = torch.pdist(x.double()[:, None]).median()
    similar = lambda a, b: (-(a[:, None] - b).double().square() / (2 * width ** 2)).exp()
    def apart(w): return w.double() @ similar(x, x) @ w.double() / 60 ** 2 - 2 * (similar(t, x).mean(0) @ w.double()) / 60 + similar(t, t).mean()
    assert w.min() >= 0 and w.mean() == pytest.approx(1) and apart(w) < .1 * apart(torch.ones(60))
    assert all(apart(w) < apart(torch.rand(60, generator=torch.Generator().manual_seed(i)) * 2) for i in range(20))


def test_matching_for_a_shift_of_y_is_a_smooth_function_of_y():
    x, y, t, truth = moving(300)
    w = kernel_mean_matching(x, t, y)
    assert torch.corrcoef(torch.stack([w, truth]))[0, 1] > .6
    with pytest.raises(ValueError, match="y: got shape"): kernel_mean_matching(x, t, y[:5])
    for change, said in ((dict(source=x[:1]), "source: got 1 rows"), (dict(target=t[:0]), "target: got 0 rows"), (dict(bound=0), "bound: got 0"), (dict(ridge=0.), "ridge: got 0"), (dict(target=t + 1000), "like none of the source")):
        with pytest.raises(ValueError, match=said): kernel_mean_matching(**dict(source=x, target=t) | change)


# retasa

def test_retasa_solves_the_regularised_equation():
    x, y, t, _ = moving(60)
    ratio = density_ratio(x, t)
    w = retasa(x, y, t, .05, ratio=ratio).double()
    def smoother(a):
        h = a.double().std() * 60 ** -.2
        k = (-(a[:, None] - a).double().square() / (2 * h ** 2)).exp()
        return k / k.sum(1, keepdim=True)
    given_x, given_y = smoother(x), smoother(y)
    rho = torch.linalg.solve(.05 * torch.eye(60).double() + given_y @ given_x, given_y @ (ratio.double() - 1))
    expected = (rho + 1).clamp_min(0)
    torch.testing.assert_close(w, expected / expected.mean(), atol=1e-5, rtol=1e-5)


def test_retasa_approaches_the_truth_and_does_not_care_for_units():
    error = lambda n, seed: (lambda x, y, t, truth: float((retasa(x, y, t) - truth).square().mean().sqrt()))(*moving(n, seed))
    assert np.mean([error(600, 10 * s) for s in range(4)]) < np.mean([error(80, 10 * s) for s in range(4)])
    x, y, t, truth = moving(300)
    w = retasa(x, y, t)
    assert float((w - truth).square().mean().sqrt()) < .5 * float((1 - truth).square().mean().sqrt())
    torch.testing.assert_close(retasa(x * 100 + 3, y * 10 - 5, t * 100 + 3), w, atol=1e-2, rtol=1e-2)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(retasa(x[order], y[order], t), w[order], atol=1e-3, rtol=1e-3)


def test_retasa_elsewhere_and_with_a_large_penalty():
    x, y, t, _ = moving(200)
    torch.testing.assert_close(retasa(x, y, t, at=y), retasa(x, y, t), atol=1e-4, rtol=1e-4)
    assert (retasa(x, y, t, 1e8) - 1).abs().max() < 1e-3 and retasa(x, y, t, at=torch.tensor([0., 1.])).shape == (2,)


@pytest.mark.parametrize("change, said", [(dict(penalty=0.), "penalty: got 0.0"), (dict(widths=(0., 1.)), "widths: got"), (dict(ratio=torch.ones(3)), "ratio: got shape"), (dict(ratio=-torch.ones(40)), "ratio: got 40 negative"), (dict(ratio=torch.zeros(40)), "ratio: got 40 zeros"),
                                          (dict(y=torch.ones(3)), "y: got shape"), (dict(y=torch.full((40,), float("nan"))), "y: got 40 NaN"), (dict(x=torch.full((40,), float("inf"))), "x: got 40 NaN")])
def test_retasa_refuses(change, said):
    x, y, t, _ = moving(40)
    with pytest.raises(ValueError, match=said): retasa(**{**dict(x=x, y=y, target=t), **change})
