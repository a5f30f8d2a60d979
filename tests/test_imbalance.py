import math
import re
from collections import Counter
import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from sklearn.datasets import make_classification
from whatmatters.core.values import seeded
from whatmatters.sparsity.imbalance import (adapted_gamma, asymmetric_loss, cisir_loss, correlation_loss, label_density, mdi_importance, negative_gradient, over_sample, probability_gap, roc_hull,
                                            smote, stratified_batches, under_sample)


def imbalanced(n=400, width=4, share=.1, seed=0):
    x, y = make_classification(n, n_features=width, n_informative=width - 1, n_redundant=0, n_clusters_per_class=1, weights=[1 - share], random_state=seed)
    return torch.tensor(x), torch.tensor(y)


def on_segments(new, small, k):
    "Whether each new point lies between a point and one of its k nearest."
    near = torch.cdist(small, small).fill_diagonal_(torch.inf).argsort(1)[:, :k]
    a, d = small[:, None], small[near] - small[:, None]
    u = (((new[:, None, None] - a) * d).sum(-1) / d.square().sum(-1)).clamp(0, 1)
    return (new[:, None, None] - a - u[..., None] * d).norm(dim=-1).flatten(1).amin(1) < 1e-8


@pytest.mark.parametrize("k", [1, 5])
def test_synthetic_points_lie_between_neighbours(k):
    x, y = imbalanced()
    more, labels = smote(x, y, k=k, generator=2)
    n, new = int((y == 1).sum()), more[len(x):]
    assert torch.equal(more[:len(x)], x) and torch.equal(labels[:len(y)], y)
    assert int((labels == 1).sum()) == int((labels == 0).sum()) == int((y == 0).sum())
    assert on_segments(new, x[y == 1], k).all() and not on_segments(x[y == 0], x[y == 1], k).all()
    assert len(new.unique(dim=0)) == len(new) and len(new) // n >= 1


def test_smote_agrees_with_imbalanced_learn():
    peer = pytest.importorskip("imblearn.over_sampling")
    x, y = imbalanced(300)
    theirs, their_y = peer.SMOTE(k_neighbors=3, random_state=0).fit_resample(x.numpy(), y.numpy())
    ours, our_y = smote(x, y, k=3)
    assert len(ours) == len(theirs) and (our_y.sum() == their_y.sum())
    assert on_segments(torch.tensor(theirs[300:]), x[y == 1], 3).all()  # the same neighbours
    many = [torch.cat([smote(x, y, k=3, generator=s)[0][300:] for s in range(40)]), torch.tensor(np.concatenate([peer.SMOTE(k_neighbors=3, random_state=s).fit_resample(x.numpy(), y.numpy())[0][300:] for s in range(40)]))]
    for statistic in (lambda t: t.mean(0), lambda t: t.std(0), lambda t: t.quantile(.1, 0)): assert (statistic(many[0]) - statistic(many[1])).abs().max() < .08


def test_mixed_categories_agree_with_imbalanced_learn():
    peer = pytest.importorskip("imblearn.over_sampling")
    x, y = imbalanced(300)
    x = torch.cat([x, torch.randint(4, (300, 2), generator=seeded(1)).double()], 1)
    x[y == 1, 4] = (x[y == 1, 0] > 0).double()
    ours = smote(x, y, categorical=[4, 5])[0][300:]
    theirs = torch.tensor(peer.SMOTENC([4, 5], random_state=0).fit_resample(x.numpy(), y.numpy())[0][300:])
    assert set(ours[:, 4].tolist()) <= {0., 1.} and set(ours[:, 5].tolist()) <= set(x[y == 1, 5].tolist())
    for c, tolerance in ((4, .1), (5, .2)):
        shares = [torch.bincount(t[:, c].long(), minlength=4) / len(t) for t in (ours, theirs)]
        assert (shares[0] - shares[1]).abs().max() < tolerance  # ties are broken in another way


def test_categories_alone_use_the_classes(seed=0):
    draw = seeded(seed)
    y = (torch.rand(300, generator=draw) < .15).long()
    x = torch.randint(3, (300, 5), generator=draw).float()
    x[:, 0] = torch.where(y == 1, x[:, 0] % 2, x[:, 0])  # the minority never has 2
    new = smote(x, y, categorical=range(5))[0][300:]
    assert set(new[:, 0].tolist()) <= {0., 1.} and (new == new.round()).all()
    small = x[y == 1].long()
    shares = torch.stack([torch.tensor([((x[:, c] == v) & (y == 1)).sum() / (x[:, c] == v).sum() for v in range(3)]) for c in range(5)])
    places = torch.stack([2 * shares[c, small[:, c]] for c in range(5)], 1)
    near = torch.cdist(places, places).fill_diagonal_(torch.inf).topk(5, largest=False).indices
    votes = {tuple(torch.cat([small[i:i + 1], small[near[i]]]).mode(0).values.tolist()) for i in range(len(small))}
    assert np.mean([tuple(r.long().tolist()) in votes for r in new]) > .8  # other neighbours only where distances are equal


def test_every_example_is_used_equally_often_and_equal_examples_do_no_harm():
    x = torch.cat([torch.arange(10.)[:, None] * 100, torch.full((30, 1), -500.)])
    y = torch.cat([torch.ones(10), torch.zeros(30)]).long()
    new = smote(x, y, 3, k=1)[0][40:, 0]  # 80 new ones; between neighbours that are 100 apart
    assert len(new) == 80
    same = torch.cat([torch.zeros(8, 2), torch.randn(20, 2, generator=seeded(0))])
    more, _ = smote(same, torch.cat([torch.ones(8), torch.zeros(20)]).long())
    assert (more[28:] == 0).all()
    half, labels = smote(x, y, .4, k=3)  # two new ones, of different examples
    assert len(half) == 42 and (labels[40:] == 1).all()


def test_float32_classes_and_generators():
    x, y = imbalanced()
    assert smote(x.float(), y)[0].dtype == torch.float32
    g = torch.Generator().manual_seed(7)
    assert torch.equal(smote(x, y, generator=g)[0], smote(x, y, generator=7)[0])
    three = torch.where(torch.arange(len(y)) % 2 == 0, y, 2 - y)  # 0 and 2 are frequent
    labels = smote(x, three, .5)[1]
    assert int((labels == 1).sum()) == round(.5 * int((y == 0).sum())) and int((labels != 1).sum()) == int((y == 0).sum())
    assert int((smote(x, three, 1., minority=0)[1] == 0).sum()) == int((three != 0).sum())


def test_under_and_over_sampling():
    _, y = imbalanced()
    kept, repeated = under_sample(y, .5), over_sample(y, .5)
    rare = int((y == 1).sum())
    assert kept[y == 1].all() and int(kept[y == 0].sum()) == 2 * rare
    assert Counter(y[repeated].tolist())[1] == round(.5 * int((y == 0).sum())) and (y[repeated[len(y):]] == 1).all()
    assert not torch.equal(under_sample(y, .5, generator=1), kept) and torch.equal(under_sample(y, .5), kept)


def test_the_hull_of_roc_points():
    points = torch.rand(60, 2, generator=seeded(0))
    hull = roc_hull(points)
    assert hull[0].tolist() == [0, 0] and hull[-1].tolist() == [1, 1]
    slopes = hull.diff(dim=0)
    assert (slopes[:, 1] >= 0).all()
    slopes = slopes[:, 1] / slopes[:, 0].clamp_min(1e-12)
    assert (slopes.diff() < 0).all()  # concave
    height = np.interp(points[:, 0], hull[:, 0], hull[:, 1])
    assert (points[:, 1].numpy() <= height + 1e-6).all()
    for weight in (.1, .5, .9):  # what is best for some costs is a corner
        best = lambda p: float((weight * p[:, 1] - (1 - weight) * p[:, 0]).max())
        assert best(hull) == pytest.approx(max(best(points.double()), best(hull[[0, -1]])))


def test_the_asymmetric_loss_agrees_with_the_formula_and_is_stable():
    z = torch.randn(7, 5, generator=seeded(0)).double() * 3
    y = (torch.rand(7, 5, generator=seeded(1)) < .3).long()
    p = z.sigmoid()
    for a, b, m in ((4, 1, .05), (4, 0, .05), (2, 2, 0), (.5, 0, .2)):
        pm = (p - m).clamp_min(0)
        by_hand = torch.where(y == 1, -(1 - p) ** b * p.log(), -pm ** a * (1 - pm).log()).sum(1)
        assert torch.allclose(asymmetric_loss(z, y, a, b, m), by_hand, atol=1e-9)
    for far in (80., -80.):
        at = torch.full((1, 3), far, requires_grad=True)
        for target in (0, 1):
            for a, m in ((4, .05), (0, 0), (.5, .1), (1, 0)):
                loss = asymmetric_loss(at, torch.full((1, 3), target), a, a, m)
                assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), at)[0].isfinite().all()


@pytest.mark.parametrize("gamma", [0, .5, 1, 2, 4])
def test_the_gradient_of_negatives(gamma):
    p = torch.linspace(.01, .99, 99).double()
    for m in (0, .05, .3):
        z = p.logit().requires_grad_()
        found = torch.autograd.grad(asymmetric_loss(z[None], torch.zeros(1, 99), gamma, 0, m).sum(), z)[0]
        assert torch.allclose(found, negative_gradient(p, gamma, m), atol=2e-6)
        assert (found[p < m] == 0).all()
        assert negative_gradient(torch.tensor([0., 1.]), gamma, m).isfinite().all()
    high = p > .9
    if gamma == 4: assert (negative_gradient(p, gamma, .3)[high] < negative_gradient(p, gamma, 0)[high]).all()  # the shift spares what may be mislabelled


def test_the_gap_and_its_exponent():
    z, y = torch.tensor([[2., -2., -3.], [0., 1., -1.]]), torch.tensor([[1, 0, 0], [1, 0, 0]])
    p = z.sigmoid()
    assert float(probability_gap(z, y)) == pytest.approx(float((p[0, 0] + p[1, 0]) / 2 - (1 - p[:, 1:]).mean()))
    assert adapted_gamma(2., -.5, .1, .5) == pytest.approx(2.3) and adapted_gamma(.1, .9, .1, .5) == 0


def test_the_importance_is_an_involution_that_falls():
    d = torch.rand(500, generator=seeded(0), dtype=torch.float64)
    for alpha in (.5, 1, 2.4):
        w = mdi_importance(d, alpha)
        assert torch.allclose(mdi_importance(w, alpha), d, atol=1e-7)
        assert (w[d.argsort()].diff() <= 0).all()
    assert mdi_importance(d.float(), .5).dtype == torch.float32


def test_the_density_is_that_of_scipy():
    y = torch.randn(800, generator=seeded(0)).exp()
    for bandwidth in (None, .2):
        kernel = gaussian_kde(y.double().numpy(), bandwidth)(y.double().numpy())
        assert np.allclose(label_density(y, bandwidth), kernel / kernel.max(), atol=2e-3)


def test_correlation_counts_weights_as_repeats():
    a, b = torch.randn(2, 12, generator=seeded(0)).double()
    w = torch.randint(0, 4, (12,), generator=seeded(1))
    again = w.repeat_interleave(w) * 0 + torch.arange(12).repeat_interleave(w)
    assert float(correlation_loss(a, b, w.double())) == pytest.approx(float(correlation_loss(a[again], b[again])))
    z = a.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cisir_loss(z, b, w.double(), .7, w.double()), z)
    assert float(correlation_loss(a.float(), w)) == pytest.approx(float(correlation_loss(a.float(), w.float())))  # whole numbers as targets
    for constant in (1., .1, 12345.6): assert float(correlation_loss(torch.full((12,), constant), b.float(), w.float())) == 1


def test_stratified_batches_hold_one_of_each_group():
    y = torch.randn(103, generator=seeded(0))
    batches = stratified_batches(y, 10)
    group = torch.empty(103, dtype=torch.long)
    for g, rows in enumerate(y.argsort().tensor_split(10)): group[rows] = g
    assert batches.shape == (11, 10) and (group[batches] == torch.arange(10)).all()
    assert sorted(batches.unique().tolist()) == list(range(103)) and int((batches.flatten().bincount() == 2).sum()) == 7
    assert torch.equal(stratified_batches(y, 10, 3), stratified_batches(y, 10, 3)) and not torch.equal(stratified_batches(y, 10, 3), batches)
    assert stratified_batches(y, 103).shape == (1, 103)


def test_bad_input():
    x, y = imbalanced()
    z = torch.zeros(2, 3)
    for message, call in {
        "y: got one class": lambda: smote(x, y * 0),
        "y: got 3 examples of class 1; want more than k=5": lambda: smote(torch.cat([x[y == 0], x[y == 1][:3]]), torch.cat([y[y == 0], y[y == 1][:3]])),
        "y: got shape": lambda: smote(x, y[:-1]),
        "x: got 1 NaN": lambda: smote(torch.cat([x[:-1], x[-1:] * torch.nan])[:, :1], y),
        "x: got torch.int64": lambda: smote(x.long(), y),
        "minority: got 7": lambda: smote(x, y, minority=7),
        "categorical: got 9": lambda: smote(x, y, categorical=[9]),
        "ratio: got 0.01": lambda: under_sample(y, .01),
        "ratio: got inf": lambda: over_sample(y, math.inf),
        "y: got shape (400, 1)": lambda: smote(x, y[:, None]),
        "y: got one class, []": lambda: under_sample(y[:0]),
        "points: got values from 2 to 3": lambda: roc_hull(torch.tensor([[2., 3.]])),
        "points: got shape (3, 3)": lambda: roc_hull(torch.rand(3, 3)),
        "logits: got shape (3,)": lambda: asymmetric_loss(z[0], z[0]),
        "targets: got shape (1, 3)": lambda: probability_gap(z, z[:1]),
        "balance: got nan": lambda: cisir_loss(torch.rand(3), torch.rand(3), balance=math.nan),
        "targets: got shape (2,)": lambda: asymmetric_loss(z, torch.zeros(2)),
        "targets: got values from 0.0 to 0.5": lambda: asymmetric_loss(z, torch.tensor([[0, .5, 0]] * 2)),
        "shift: got 1.0": lambda: asymmetric_loss(z, z, shift=1.),
        "gamma_neg, gamma_pos: got (-1, 0)": lambda: asymmetric_loss(z, z, -1, 0),
        "targets: got labels of one kind": lambda: probability_gap(z, z),
        "y: got equal targets": lambda: label_density(torch.ones(5)),
        "alpha: got 0": lambda: mdi_importance(torch.rand(3), 0),
        "density: got values from": lambda: mdi_importance(torch.rand(3) + 1, 1.),
        "weights: got shape (3,), smallest -1": lambda: correlation_loss(torch.rand(3), torch.rand(3), torch.tensor([-1., 1, 1])),
        "weights: got shape (3,), smallest 0, sum 0": lambda: cisir_loss(torch.rand(3), torch.rand(3), torch.zeros(3)),
        "batch_size: got 9; want at most 5": lambda: stratified_batches(torch.rand(5), 9),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)): call()


def test_real_imbalance_is_ranked_no_worse(real):
    import pandas as pd
    from sklearn.metrics import roc_auc_score
    from sklearn.tree import DecisionTreeClassifier
    frame = pd.read_csv(real("imbalanced_tabular") + "/mammography.csv", header=None)
    x, y = torch.tensor(frame.iloc[:, :-1].to_numpy()), torch.tensor((frame.iloc[:, -1].astype(str).str.strip("'") == "1").to_numpy()).long()
    order = torch.randperm(len(y), generator=seeded(0))
    train, test = order[:6000], order[6000:]
    area = lambda a, b: roc_auc_score(y[test], DecisionTreeClassifier(min_samples_leaf=5, random_state=0).fit(a, b).predict_proba(x[test])[:, 1])
    assert area(*smote(x[train], y[train])) > area(x[train], y[train])
