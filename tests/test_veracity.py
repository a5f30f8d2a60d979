"Wrong numbers in a column: residuals of any regressor, relative to how uncertain it is."
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from whatmatters.attribution.veracity import filter_errors, out_of_fold, veracity_scores

curve = make_pipeline(StandardScaler(), PolynomialFeatures(2), Ridge())


def column(seed=0, rows=300, noise=(.1, 3.)):
    "Inputs, numbers, which are wrong: a quadratic function of two inputs; the third says how noisy a number is."
    draw = np.random.default_rng(seed)
    x = draw.uniform(-1, 1, (rows, 3))
    truth = 3 * x[:, 0] - 2 * x[:, 1] ** 2
    wrong = np.arange(rows) % 12 == 0
    y = truth + np.where(x[:, 2] > .5, noise[1], noise[0]) * draw.normal(size=rows) + 3 * wrong * draw.choice([-1, 1], rows)
    return torch.tensor(x), torch.tensor(y), wrong


class Counted(LinearRegression):
    "Counts its fits, and the rows of each."
    fits = []
    def fit(self, x, y):
        Counted.fits.append(len(x))
        return super().fit(x, y)


# ---- scores

def test_scores_by_hand():
    y, p, u, s = (torch.tensor(t) for t in ([1., 5., 2.], [0., 1., 2.], [1., 4., 1.], [1., 1., 2.]))
    assert veracity_scores(y, p, u, s).tolist() == [.5, .8, 0]
    assert veracity_scores(y, p, u, s, "geometric").tolist() == [1, 2, 0]
    assert veracity_scores(y, p, u, s, "epistemic").tolist() == [1, 1, 0] and veracity_scores(y, p, u, s, "aleatoric").tolist() == [1, 4, 0]
    assert veracity_scores(y, p, u, s, "residual").tolist() == [1, 4, 0] and veracity_scores(y, p, 1, 3).tolist() == [.25, 1, 0]


@pytest.mark.parametrize("kind", ["arithmetic", "geometric", "epistemic", "aleatoric", "residual"])
def test_scores_do_not_depend_on_the_unit_unless_they_are_residuals(kind):
    g = torch.Generator().manual_seed(0)
    y, p, u, s = (torch.rand(20, generator=g, dtype=torch.float64) for _ in range(4))
    one, other = veracity_scores(y, p, u, s, kind), veracity_scores(1000 * y, 1000 * p, 1000 * u, 1000 * s, kind)
    torch.testing.assert_close(other, 1000 * one if kind == "residual" else one)


def test_no_uncertainty_at_all_is_survived():
    scores = veracity_scores(torch.tensor([1., 2., 3.]), torch.tensor([1., 2., 5.]), 0., 0.)
    assert scores.isfinite().all() and scores.tolist()[:2] == [0, 0] and scores.argmax() == 2
    assert veracity_scores(torch.ones(2), torch.ones(2), 0., 0., "geometric").tolist() == [0, 0]


@pytest.mark.parametrize("changed, match", [(dict(y=torch.tensor([1., float("nan")])), "y: got 1 NaN"), (dict(predictions=torch.ones(3)), "predictions: got shape"), (dict(epistemic=torch.tensor([1., -1.])), "epistemic: got -1"),
                                            (dict(aleatoric=torch.ones(3)), "aleatoric: got shape"), (dict(kind="both"), "kind: got 'both'"), (dict(y=torch.ones(0), predictions=torch.ones(0)), "at least one")])
def test_bad_input_of_scores_is_refused(changed, match):
    given = dict(y=torch.ones(2), predictions=torch.ones(2), epistemic=1., aleatoric=1.) | changed
    with pytest.raises(ValueError, match=match): veracity_scores(**given)


# ---- predictions and uncertainties

def test_every_prediction_is_of_a_model_that_did_not_see_the_number():
    x, y, _ = column()
    about = out_of_fold(curve, x, y, resamples=0)
    moved = y.clone()
    moved[7] += 1000
    assert out_of_fold(curve, x, moved, resamples=0).predictions[7] == about.predictions[7] # its own number has no part in it
    assert (out_of_fold(curve, x, moved, resamples=0).predictions != about.predictions).sum() == 240 # those of the other folds have seen it
    assert not about.epistemic.any() and (about.aleatoric >= 0).all()


def test_what_is_not_kept_teaches_nothing_and_is_predicted():
    x, y, wrong = column()
    kept = torch.tensor(~wrong)
    one, other = (out_of_fold(curve, x, torch.where(kept, y, v), kept, resamples=2) for v in (0., 1e5))
    assert torch.equal(one.predictions, other.predictions) and torch.equal(one.epistemic, other.epistemic)
    assert (one.predictions[~kept] - y[~kept]).abs().max() < 20


def test_the_fits_are_those_that_are_promised():
    x, y, _ = column(rows=100)
    Counted.fits = []
    out_of_fold(Counted(), x, y, folds=4, resamples=3)
    assert sorted(Counted.fits) == [50] * 6 + [75] * 8
    Counted.fits = []
    filter_errors(Counted(), x, y, shares=(0., .1, .2), fine=2, folds=4, resamples=3, rounds=2)
    once = 2 * 4 + 2 * 3
    assert len(Counted.fits) in [3 * once + 4 * (a + b) for a in (5, 7) for b in (5, 7)] # a best share at an end has one neighbour


def test_uncertainties_are_where_they_belong():
    x, y, _ = column(rows=600, noise=(.1, 2.))
    about = out_of_fold(curve, x, y)
    noisy = x[:, 2] > .5
    assert about.aleatoric[noisy].mean() > 1.5 * about.aleatoric[~noisy].mean()
    edge = x[:, :2].abs().amax(1) > .9
    assert about.epistemic[edge].mean() > about.epistemic[~edge].mean() # fewer data around


def test_seeds_decide_everything():
    x, y, _ = column(rows=80)
    trees = ExtraTreesRegressor(3)
    state = np.random.get_state()[1].copy()
    one, again, other = (out_of_fold(trees, x, y, resamples=2, generator=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again)) and not torch.equal(one.predictions, other.predictions)
    assert (np.random.get_state()[1] == state).all() and trees.random_state is None # nothing is touched
    pipe = make_pipeline(StandardScaler(), ExtraTreesRegressor(3))
    assert torch.equal(out_of_fold(pipe, x, y, resamples=0).predictions, out_of_fold(pipe, x, y, resamples=0).predictions)


@pytest.mark.parametrize("changed, match", [(dict(y=torch.ones(20)), "one value only"), (dict(y=torch.ones(19)), "y: got shape"), (dict(folds=1), "folds: got 1"), (dict(folds=21), "folds: got 21"), (dict(kept=torch.ones(20)), "kept: got torch.float32"),
                                            (dict(kept=torch.arange(20) < 3), "folds: got 5"), (dict(resamples=-1), "resamples")])
def test_bad_input_of_predictions_is_refused(changed, match):
    g = torch.Generator().manual_seed(0)
    given = dict(x=torch.randn(20, 2, generator=g), y=torch.randn(20, generator=g)) | changed
    with pytest.raises(ValueError, match=match): out_of_fold(LinearRegression(), **given)


def test_a_regressor_that_predicts_nothing_is_refused():
    class Broken(LinearRegression):
        def predict(self, x): return np.full(len(x), np.nan)
    x, y, _ = column(rows=40)
    with pytest.raises(ValueError, match="regressor"): out_of_fold(Broken(), x, y)


# ---- planted errors

def test_uncertainty_helps_where_noise_differs_and_only_there():
    gaps = []
    for noise in ((.1, 3.), (1., 1.)):
        found = []
        for seed in range(3):
            x, y, wrong = column(seed, noise=noise)
            about = out_of_fold(curve, x, y, generator=seed)
            found.append([average_precision_score(wrong, veracity_scores(y, *about, kind)) for kind in ("residual", "arithmetic")])
        gaps.append(np.diff(np.mean(found, 0)).item())
    assert gaps[0] > .1 and abs(gaps[1]) < .1


def test_the_filter_improves_the_fit_and_finds_nothing_in_clean_data():
    x, y, wrong = column(1, noise=(.3, .3))
    trees = ExtraTreesRegressor(10, min_samples_leaf=3)
    found = filter_errors(trees, x, y, resamples=2, folds=4)
    assert found.removed.sum() == round(found.share * 300) and .03 < found.share < .2 and found.removed[torch.tensor(wrong)].double().mean() > .4
    assert max(found.fits, key=found.fits.get) == found.share and list(found.fits) == sorted(found.fits)
    x, y, _ = column(1, noise=(1e-6, 1e-6))
    y = 3 * x[:, 0] - 2 * x[:, 1] ** 2
    assert filter_errors(trees, x, y, resamples=2, fine=0, folds=4).share <= .05
    assert filter_errors(curve, x, y, shares=(0.,), fine=3).removed.sum() == 0 # only nothing can be dropped


@pytest.mark.parametrize("changed, match", [(dict(shares=()), "shares"), (dict(shares=(.5, 1.)), "shares"), (dict(shares=(-.1,)), "shares"), (dict(rounds=0), "rounds"), (dict(fine=-1), "fine"), (dict(kind="worst"), "kind")])
def test_bad_input_of_the_filter_is_refused(changed, match):
    x, y, _ = column(rows=40)
    with pytest.raises(ValueError, match=match): filter_errors(LinearRegression(), x, y, **changed)


# ---- a peer

def test_cleanlab_ranks_the_same_entries():
    learn = pytest.importorskip("cleanlab.regression.learn")
    np.NaN = np.nan # which cleanlab 2.9 still asks for
    x, y, wrong = column(2, noise=(.5, .5))
    peer = learn.CleanLearning(curve, seed=0).find_label_issues(x.numpy(), y.numpy())
    about = out_of_fold(curve, x, y)
    # the library's aleatoric uncertainty is one number, which is what a constant is here
    ours = veracity_scores(y, about.predictions, about.epistemic, float(about.aleatoric.mean()))
    assert spearmanr(ours, 1 - peer.label_quality).statistic > .8 # the peer agrees with itself, under another seed, by .93
    found = filter_errors(curve, x, y)
    both = found.removed.numpy() & peer.is_label_issue.to_numpy()
    assert both.sum() > .6 * min(found.removed.sum(), peer.is_label_issue.sum())
