"Correlations from few labels, raters who err, and the Rasch model: closed forms, brute force, a peer, and bad input."
import itertools
import math
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from whatmatters.core import experiments, ledger
from whatmatters.core.stats import correlation
from whatmatters.evaluation.raters import (OrdinalHead, dawid_skene, label_proposal, linked_sets, majority_vote, ordinal_cross_entropy, ordinal_softmax, rasch, rasch_fit,
                                           rating_posterior, sampled_correlation)


def draws(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = (torch.rand(n, generator=g) < .2).double()
    return torch.randn(n, generator=g).exp().double() * (1 + c), c, g


def test_every_input_weighted_by_its_probability_is_the_plain_correlation():
    a, c, g = draws()
    truth = correlation(a[None], c[None], "pearson")[0]
    q = label_proposal(a, torch.rand(400, generator=g))
    often = torch.arange(400).repeat_interleave((q * 1e4).ceil().long())  # as often as it would be drawn
    found = sampled_correlation(a, often, c[often], (q * 1e4).ceil())
    assert found.value.item() == pytest.approx(truth.item(), abs=1e-12)


def test_error_is_right_on_average_and_batches_change_nothing():
    a, c, g = draws(2000)
    q = label_proposal(a)
    rows = torch.multinomial(q, 300 * 500, True, generator=g).view(300, 500)
    found = sampled_correlation(a, rows, c[rows], q)
    assert found.error.square().mean().sqrt() == pytest.approx(found.value.std().item(), rel=.15)
    assert abs(found.value.mean() - correlation(a[None], c[None], "pearson")[0]) < 4 * found.value.std() / 300 ** .5
    one = sampled_correlation(a, rows[7], c[rows[7]], q)
    assert one.value.item() == pytest.approx(found.value[7].item(), rel=1e-12) and one.error.item() == pytest.approx(found.error[7].item(), rel=1e-9)
    half = sampled_correlation(a.bfloat16().float(), rows[7], c[rows[7]].bfloat16(), q.float())
    assert half.value.item() == pytest.approx(one.value.item(), abs=.01)


def test_few_draws_have_no_silent_error():
    a, c, g = draws(2000)
    q = label_proposal(a)
    rows = torch.multinomial(q, 300 * 20, True, generator=g).view(300, 20)
    distinct = torch.tensor([min(len(r[c[r] == k].unique()) for k in (0, 1)) for r in rows])
    assert (distinct < 5).any() and (distinct >= 5).any()
    with pytest.warns(UserWarning, match="fewer than five inputs"): found = sampled_correlation(a, rows, c[rows], q)
    assert found.error.isnan().tolist() == (distinct < 5).tolist()
    alike = torch.cat([a[:1].expand(200), a])
    for which, labels in ((torch.arange(37), torch.arange(37.) % 2), (torch.arange(150, 300), torch.ones(150)), (torch.arange(150, 300), torch.full((150,), .3))):
        with pytest.warns(UserWarning, match="one label or one activation"): assert sampled_correlation(alike, which, labels, torch.rand(2200, generator=g) + .1).value.isnan()


def test_probabilities_as_labels_have_the_variance_of_what_they_stand_for():
    a, c, g = draws(200_000)
    p = torch.where(c > 0, .9, .3).double()  # P(yes); the posterior is calibrated, the truth drawn from it
    posterior = (a / a.max()) ** .5 * .5 + p * .2
    truth = (torch.rand(len(a), generator=g) < posterior).double()
    rows = torch.arange(len(a))
    assert sampled_correlation(a, rows, posterior).value.item() == pytest.approx(sampled_correlation(a, rows, truth).value.item(), abs=.01)


def test_proposals():
    a, c, g = draws()
    z = (a - a.mean()).abs()
    torch.testing.assert_close(label_proposal(a, uniform=.2), .8 * z / z.sum() + .2 / 400)
    torch.testing.assert_close(label_proposal(a, torch.full_like(a, .3)), label_proposal(a))  # a guess that is the same everywhere says nothing
    assert label_proposal(a, uniform=1.).std() < 1e-12
    for bad in (dict(uniform=0.), dict(uniform=True), dict(guess=a), dict(guess=c * 0)):
        with pytest.raises(ValueError): label_proposal(a, **bad)


def test_posterior_is_bayes_rule_by_enumeration():
    g = torch.Generator().manual_seed(0)
    item, rater = (torch.tensor(t) for t in zip(*[(i, j) for i in range(4) for j in range(3) if (i, j) != (2, 1)]))
    rating = torch.randint(2, (len(item),), generator=g)
    sensitivity, specificity, prior = (.5 + .5 * torch.rand(n, generator=g).double() for n in (3, 3, 4))
    found = rating_posterior(item, rater, rating, sensitivity, specificity, prior)
    for i in range(4):
        weight = [prior[i], 1 - prior[i]]
        for j, r in zip(rater[item == i].tolist(), rating[item == i].tolist()):
            weight[0] = weight[0] * (sensitivity[j] if r else 1 - sensitivity[j])
            weight[1] = weight[1] * (1 - specificity[j] if r else specificity[j])
        assert found[i].item() == pytest.approx((weight[0] / sum(weight)).item())
    certain = rating_posterior(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([1, 0]), 1., 1., prior=.5)
    assert certain.tolist() == pytest.approx([1, 0])  # a rater who never errs
    with pytest.warns(UserWarning, match="1 of 3 items have no ratings"): assert majority_vote(torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1]), 3).nan_to_num(9).tolist() == [.5, 9, 1]


def crowd(items, raters, each, seed=0):
    g = torch.Generator().manual_seed(seed)
    c, rates = (torch.rand(items, generator=g) < .4).long(), .7 + .25 * torch.rand(2, raters, generator=g)
    item, rater = torch.arange(items).repeat_interleave(each), torch.rand(items, raters, generator=g).argsort(1)[:, :each].flatten()
    right = torch.rand(len(item), generator=g) < torch.where(c[item] > 0, *rates[:, rater])
    return item, rater, torch.where(right, c[item], 1 - c[item])


def test_dawid_skene_ends_at_a_maximum_of_the_posterior():
    item, rater, rating = crowd(30, 4, 3)
    found = dawid_skene(item, rater, rating, tolerance=1e-12, rounds=5000)
    def negative(x):
        p, sens, spec = 1 / (1 + np.exp(-x[0])), *np.split(1 / (1 + np.exp(-x[1:])), 2)
        joint = [np.log(p) * np.ones(30), np.log(1 - p) * np.ones(30)]
        for i, j, r in zip(item.tolist(), rater.tolist(), rating.tolist()):
            joint[0][i] += np.log(sens[j] if r else 1 - sens[j])
            joint[1][i] += np.log(1 - spec[j] if r else spec[j])
        return -np.logaddexp(*joint).sum() - (3 * np.log(sens * spec) + np.log((1 - sens) * (1 - spec))).sum()
    logit = lambda t: np.log(t / (1 - t))
    at = np.concatenate([[logit(found.prior[0].item())], logit(found.sensitivity.numpy()), logit(found.specificity.numpy())])
    assert -negative(at) == pytest.approx(found.trace[-1].item(), abs=1e-6)
    best = minimize(negative, at + .05 * np.random.default_rng(0).normal(size=len(at)))
    assert best.fun > negative(at) - 1e-5 and (found.trace.diff() > -1e-9).all()


@pytest.mark.parametrize("given, message", [
    (lambda i, j, r: dict(rater=j * 0), "rater: got .*rated it before"), (lambda i, j, r: dict(rating=1 + 0 * r), "rating: got 1 only"), (lambda i, j, r: dict(rater=j + 1), r"rater: got no ratings for 1 of 5 \(0\)"),
    (lambda i, j, r: dict(rating=r * 2), "rating: got values from 0 to 2"), (lambda i, j, r: dict(rating=r[1:]), "rating: got 89 entries"), (lambda i, j, r: dict(items=3), "item: got numbers from 0 to 29"),
    (lambda i, j, r: dict(beta=(1., 0.)), "beta: got"), (lambda i, j, r: dict(item=torch.arange(90)), "item: got one rating per item")])
def test_bad_raters_are_refused(given, message):
    ratings = crowd(30, 4, 3)
    with pytest.raises(ValueError, match=message): dawid_skene(**{**dict(zip(("item", "rater", "rating"), ratings)), **given(*ratings)})


def survey(texts=40, raters=8, questions=4, categories=4, each=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    theta, alpha, delta = (torch.randn(n, generator=g).double() for n in (texts, raters, questions))
    tau = torch.linspace(-1, 1, categories - 1).double()
    pairs = torch.stack([torch.arange(texts).repeat_interleave(each), torch.rand(texts, raters, generator=g).argsort(1)[:, :each].flatten()])
    text, rater = pairs.repeat_interleave(questions, 1)
    question = torch.arange(questions).repeat(pairs.shape[1])
    step = (theta[text] - alpha[rater] - delta[question])[:, None] - tau
    p = torch.cat([0 * step[:, :1], step.cumsum(1)], 1).softmax(1)
    return text, question, rater, torch.multinomial(p, 1, generator=g)[:, 0]


def likelihood(theta, delta, alpha, tau, text, question, rater, rating):
    step = (theta[text] - alpha[rater] - delta[question])[:, None] - tau[question]
    return torch.cat([0 * step[:, :1], step.cumsum(1)], 1).log_softmax(1).gather(1, rating[:, None]).sum()


@pytest.mark.parametrize("partial_credit, spread", [(True, None), (True, math.inf), (False, 1.5), (False, math.inf)])
def test_the_gradient_is_zero(partial_credit, spread):
    ratings = survey()
    model = rasch(*ratings, partial_credit=partial_credit, spread=spread)
    theta, delta, alpha = (t.clone().requires_grad_() for t in (model.texts, model.questions, model.raters))
    steps = (model.steps if partial_credit else model.steps[0]).clone().requires_grad_()
    value = likelihood(theta, delta, alpha, steps.expand(4, -1), *ratings)
    assert value.item() == pytest.approx(model.log_likelihood)
    prior = ((theta - theta.mean()) / model.spread[0]).square().sum() / 2 + (alpha / model.spread[1]).square().sum() / 2
    assert all(t.abs().max() < 1e-5 for t in torch.autograd.grad(value - prior, (theta, delta, alpha, steps)))
    assert model.raters.mean().abs() < 1e-9 and model.questions.mean().abs() < 1e-9 and model.steps.sum(1).abs().max() < 1e-9
    torch.testing.assert_close(model.probabilities(*ratings[:3]).sum(1), torch.ones(len(ratings[0])).double())
    if not partial_credit: torch.testing.assert_close(model.steps, model.steps[:1].expand(4, -1))


def test_standard_errors_are_those_of_the_information_given_the_rest():
    ratings = survey(12, 4, 3, 3)
    model = rasch(*ratings, spread=2.)
    for name, place in (("text", 0), ("rater", 2)):
        parts = [model.texts, model.questions, model.raters, model.steps]
        def at(t): return likelihood(*(t if i == place else p for i, p in enumerate(parts)), *ratings)
        information = -torch.autograd.functional.hessian(at, parts[place])
        torch.testing.assert_close(model.errors[name], (information.diagonal() + 1 / 4).rsqrt())


def test_misfit_by_hand():
    ratings = survey()
    model = rasch(*ratings)
    p = model.probabilities(*ratings[:3])
    mean = (p * torch.arange(4)).sum(1)
    variance = (p * torch.arange(4) ** 2).sum(1) - mean ** 2
    square, mine = (ratings[3] - mean) ** 2, ratings[1] == 2
    fit = rasch_fit(model, *ratings)["question"]
    assert fit.infit[2].item() == pytest.approx((square[mine].sum() / variance[mine].sum()).item()) and fit.outfit[2].item() == pytest.approx((square / variance)[mine].mean().item())
    with pytest.warns(UserWarning, match="1 of 40 texts have no ratings"): some = rasch_fit(model, *(t[ratings[0] > 0] for t in ratings))["text"]
    assert some.infit[0].isnan() and some.infit[1:].isfinite().all()


def test_sets_that_nothing_links():
    text, question, rater, rating = survey()
    apart = torch.where(text < 10, rater % 4, 4 + rater % 4)
    assert [t.tolist() for t in linked_sets(text, apart)] == [[1] * 10 + [0] * 30, [1] * 4 + [0] * 4]  # the largest first
    with pytest.raises(ValueError, match="rater: got 2 sets of texts and raters .*texts 10, 11, 12, ... with raters 4, 5, 6, ..."): rasch(text, question, apart, rating)
    own = torch.where(question < 2, rater % 4, 4 + rater % 4)  # every rater has questions of their own: severity and difficulty cannot be told apart
    with pytest.raises(ValueError, match="2 sets of questions and raters"): rasch(text, question, own, rating)
    nested = (text < 20) == (question < 2)
    with pytest.raises(ValueError, match="2 sets of texts and questions"): rasch(*(t[nested] for t in (text, question, rater, rating)))
    with pytest.raises(ValueError, match="rating: got 640 ratings .* who has given one"): rasch(*(t.repeat(2) for t in (text, question, rater, rating)))


def test_widths_of_nothing_are_found_too():
    text, question, rater, rating = survey()
    one = rater == 0
    which = text[one].unique(return_inverse=True)[1]
    assert rasch(which, question[one], rater[one], rating[one]).spread[1] == .001  # one person has no spread
    found = rasch(text, question, rater, rating).spread
    assert .5 < found[0] < 1.5 and .5 < found[1] < 2


@pytest.mark.parametrize("given, message", [
    (lambda r: dict(rating=r + 1, categories=4), "rating: got numbers from 1 to 4; want 0 to 3"), (lambda r: dict(rating=r - 1), "rating: got numbers from -1"), (lambda r: dict(rating=r.float()), "rating: got torch.float32"),
    (lambda r: dict(rating=0 * r), "rating: got one category only for question 0, 1, 2, 3"), (lambda r: dict(spread=-1.), "spread: got -1"), (lambda r: dict(rating=r[1:]), "rating: got 639 entries"), (lambda r: dict(categories=1), "categories: got 1")])
def test_bad_ratings_are_refused(given, message):
    names = ("text", "question", "rater", "rating")
    ratings = dict(zip(names, survey()))
    with pytest.raises(ValueError, match=message): rasch(**{**ratings, **given(ratings["rating"])})


def test_a_category_that_nobody_uses():
    text, question, rater, rating = survey()
    missing = rasch(text, question, rater, torch.where(rating == 1, 2, rating), partial_credit=False)
    assert missing.steps.isnan().tolist() == [[True, True, False]] * 4 and missing.probabilities(text, question, rater)[:, 1].max() == 0 and missing.gradient < 1e-6
    wider = rasch(text, question, rater, rating, categories=6)
    torch.testing.assert_close(wider.texts, rasch(text, question, rater, rating).texts)


def test_ordinal_outputs():
    torch.manual_seed(0)
    head = OrdinalHead(5, [2, 5, 3])
    torch.nn.init.normal_(head.gaps, std=5)
    logits, ratings, score = head(torch.randn(7, 5))
    p = ordinal_softmax(logits)
    assert p.shape == (7, 3, 5) and (p >= 0).all() and p[:, 0, 2:].max() == 0 and p[:, 2, 3:].max() == 0
    torch.testing.assert_close(p.sum(-1), torch.ones(7, 3)), torch.testing.assert_close((p * torch.arange(5)).sum(-1), ratings)
    torch.testing.assert_close((head.total.weight * ratings).sum(1) + head.total.bias, score)
    for answers in itertools.product(range(2), range(5), range(3)): assert ordinal_cross_entropy(logits[:1], torch.tensor([answers])).isfinite().all()
    torch.testing.assert_close(ordinal_cross_entropy(logits[..., :1], torch.ones(7, 3).long()), torch.nn.functional.softplus(-logits[..., 0]))
    for bad in (torch.zeros(7).long(), torch.full((7, 3), 5), torch.zeros(7, 3)):
        with pytest.raises(ValueError, match="target: got"): ordinal_cross_entropy(logits, bad)


def test_rasch_on_the_design_of_a_table(tmp_path):
    import pandas as pd
    text, question, rater, rating = survey(30, 6, 3, 3, each=3)
    wide = pd.DataFrame(dict(comment=text, person=rater, question=question, rating=rating)).pivot(index=["comment", "person"], columns="question", values="rating").reset_index()
    wide.columns = ["comment", "person", "a", "b", "c"]
    wide.loc[0, "c"] = None  # a question left out
    (tmp_path/"table").mkdir()
    wide.to_csv(tmp_path/"table"/"ratings.csv", index=False)
    given = dict(data=str(tmp_path/"table"), text="comment", rater="person", items=["a", "b", "c"])
    path, _ = experiments.run("rasch", "smoke", given, tmp_path/"runs", engine="warm")
    assert "269 ratings of 30 texts by 6 raters" in path.read_text() and len(ledger.read_run(path).claims) == 6
    with pytest.raises(Exception, match="without the columns d"): experiments.run("rasch", "smoke", {**given, "items": ["d"]}, tmp_path/"runs", engine="warm")


def test_neurons_of_a_trained_network_on_real_images(real, tmp_path):
    from conftest import SHARED
    folder = next((p.parent for p in (SHARED/"models").rglob("resnet20*.th")), None)
    if folder is None: pytest.skip("no CIFAR ResNet")
    path, _ = experiments.run("neuron_raters", "smoke", dict(data=real("cifar10_lossless4k"), rows=150, model=str(folder), layer="network.layer3"), tmp_path, engine="warm")
    assert "300 images" in path.read_text() and len(ledger.read_run(path).claims) == 6
