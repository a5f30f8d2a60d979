import math
from functools import partial
import pytest
import torch
from torch import nn
from whatmatters.core.ensemble import train_ensemble
from whatmatters.sparsity import labeling as al

def probabilities(n=30, c=4, seed=0): return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize("kind", ["entropy", "margin", "confidence"])
def test_uncertainty_is_highest_for_equal_and_zero_for_certain(kind):
    p = torch.cat([torch.full((1, 4), .25), torch.eye(4)[:1], probabilities()])
    u = al.uncertainty(p, kind)
    assert u.argmax() == 0 and abs(float(u[1])) < 1e-7 and torch.allclose(al.uncertainty(p[:, [2, 0, 3, 1]], kind), u)  # whatever the order of classes
    assert torch.equal(al.uncertainty(p.view(1, *p.shape), kind)[0], u)


def test_modal_like_scores_agree_with_loops():
    p = probabilities()
    for i, row in enumerate(p.tolist()):
        a, b = sorted(row)[-1], sorted(row)[-2]
        assert al.uncertainty(p, "margin")[i] == pytest.approx(1 - (a - b), abs=1e-6) and al.uncertainty(p, "confidence")[i] == pytest.approx(1 - a, abs=1e-6)
        assert al.uncertainty(p)[i] == pytest.approx(-sum(v * math.log(v) for v in row), abs=1e-5)


@pytest.mark.parametrize("call, message", [
    (lambda: al.uncertainty(torch.randn(5, 3) * 4), "probabilities"),
    (lambda: al.uncertainty(torch.tensor([[float("nan"), 1.]])), "NaN"),
    (lambda: al.uncertainty(probabilities(), "odd"), '"entropy", "margin" or "confidence"'),
    (lambda: al.rare_probability(probabilities(), 4), "classes from 0 to 3"),
    (lambda: al.rare_probability(probabilities(), []), "classes from 0 to 3"),
    (lambda: al.temperature(torch.randn(3, 2), torch.tensor([0, 1, 2])), "classes of the logits"),
    (lambda: al.temperature(torch.randn(3, 2), torch.tensor([0, 1])), "a class for each row"),
    (lambda: al.temperature(torch.randn(0, 2), torch.zeros(0, dtype=torch.long)), "at least one labelled example"),
    (lambda: al.inhibited_log_softmax(torch.randn(2, 2), -1.), "not negative"),
    (lambda: al.disagreement(probabilities()), "those of each network"),
    (lambda: al.dropout_probabilities(torch.randn(2, 2), p=1.), "a share"),
    (lambda: al.trust_score(torch.randn(3, 2), torch.randn(2, 2), torch.tensor([1, 1]), torch.tensor([0, 1, 0])), "one class only"),
    (lambda: al.k_center(torch.randn(5, 2), torch.zeros(5, dtype=torch.bool), 6), "k: got 6; want at most 5"),
    (lambda: al.badge(probabilities(5), torch.randn(5, 2), torch.ones(5, dtype=torch.bool), 1), "k: got 1; want at most 0"),
    (lambda: al.contrastive(probabilities(5), torch.randn(5, 2), torch.zeros(5, dtype=torch.bool)), "at least one labelled example"),
    (lambda: al.acquire(torch.rand(10), 10, skip=.1), "k: got 10; want at most 9"),
    (lambda: al.acquire(torch.rand(10), 1, skip=1.), "a share"),
    (lambda: al.collective_outliers(torch.tensor([.5, 2.]), torch.tensor([.1, .1])), "confidence"),
    (lambda: al.collective_outliers(torch.tensor([.5, .2]), torch.tensor([.1])), "the same for both"),
    (lambda: al.area(torch.tensor([1.])), "at least two"),
    (lambda: al.evidential_loss(torch.randn(2, 3), torch.tensor([0, 3])), "classes of the logits"),
    (lambda: al.trust_score(torch.full((2, 2), math.nan), torch.randn(2, 2), torch.tensor([0, 1]), torch.tensor([0, 1])), "NaN"),
    (lambda: al.k_center(torch.randn(5, 2), torch.zeros(5, dtype=torch.long), 2), "labeled: got torch.int64"),
    (lambda: al.complementary_loss(torch.randn(3, 1), torch.zeros(3, dtype=torch.long)), "at least two classes"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_temperature_of_many_networks_is_that_of_each():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 50, 4, generator=g) * 3
    y = torch.where(torch.rand(3, 50, generator=g) < .3, torch.randint(4, (3, 50), generator=g), z.argmax(-1))
    together = al.temperature(z, y)
    assert torch.allclose(together, torch.stack([al.temperature(a, b) for a, b in zip(z, y)]))
    assert torch.allclose(al.temperature(z * 2, y, most=1e3), al.temperature(z, y, most=1e3) * 2, rtol=1e-4)  # scales with the logits


def test_inhibited_softmax_is_a_softmax_with_one_logit_more():
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 5
    more = torch.cat([z, torch.full((6, 1), math.log(1.5))], 1).log_softmax(-1)[:, :3]
    assert torch.allclose(al.inhibited_log_softmax(z), more, atol=1e-6) and al.inhibited_log_softmax(z * 100).isfinite().all()


def test_trust_score_by_brute_force():
    g = torch.Generator().manual_seed(0)
    x, known, c, guess = torch.randn(9, 3, generator=g), torch.randn(12, 3, generator=g), torch.arange(12) % 3, torch.randint(3, (9,), generator=g)
    for i, s in enumerate(al.trust_score(x, known, c, guess)):
        far = (known - x[i]).norm(dim=1)
        assert s == pytest.approx(float(far[c != guess[i]].min() / far[c == guess[i]].min()), rel=1e-4)


def test_committee_of_one_mind_does_not_disagree():
    p = probabilities()[None].expand(4, -1, -1)
    assert al.disagreement(p).abs().max() < 1e-6 and al.disagreement(p, "votes").abs().max() < 1e-6
    mixed = torch.stack([probabilities(seed=s) for s in range(5)])
    assert (al.disagreement(mixed) > 0).all() and torch.allclose(al.disagreement(mixed), al.disagreement(mixed.flip(0)), atol=1e-6)


def test_k_center_covers_at_most_twice_as_badly_as_the_best():
    from itertools import combinations
    x, none = torch.randn(9, 2, generator=torch.Generator().manual_seed(3)), torch.zeros(9, dtype=torch.bool)
    radius = lambda chosen: float(torch.cdist(x, x[list(chosen)]).amin(1).max())
    greedy = al.k_center(x, none, 3)
    assert radius(greedy.nonzero()[:, 0].tolist()) <= 2 * min(radius(c) for c in combinations(range(9), 3)) + 1e-6
    known = none.clone().index_fill(0, torch.tensor([4]), True)
    assert al.k_center(x, known, 8).bool().equal(~known)  # all that is left
    allowed = torch.arange(9) < 6
    assert not al.k_center(x, known, 3, allowed)[6:].any()


def test_badge_draws_the_same_for_a_seed_and_no_copies():
    p, h, none = probabilities(), torch.randn(30, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(30, dtype=torch.bool)
    assert torch.equal(al.badge(p, h, none, 5, generator=7), al.badge(p, h, none, 5, generator=7))
    p, h = torch.cat([p, p]), torch.cat([h, h])  # each row twice: a chosen row's copy has distance zero
    chosen = al.badge(p, h, torch.zeros(60, dtype=torch.bool), 12, generator=0).nonzero()[:, 0] % 30
    assert len(chosen.unique()) == 12
    certain = torch.eye(4)[torch.arange(8) % 4]  # no gradients at all: still as many as asked for
    assert (al.badge(certain, torch.ones(8, 2), torch.zeros(8, dtype=torch.bool), 5) > 0).sum() == 5


def test_acquire_skips_the_top_share_of_what_is_valid():
    g = torch.Generator().manual_seed(0)
    scores, valid = torch.rand(3, 50, generator=g), torch.rand(3, 50, generator=g) < .8
    chosen = al.acquire(scores, 7, .1, valid)
    assert (chosen.sum(1) == 7).all() and not (chosen & ~valid).any()
    for row, ok, c in zip(scores, valid, chosen):
        ranked = row.masked_fill(~ok, -1).argsort(descending=True)
        first = math.floor(.1 * int(ok.sum()) + .5)
        assert set(ranked[first:first + 7].tolist()) == set(c.nonzero()[:, 0].tolist())
    assert torch.equal(al.acquire(scores[0], 7, .1, valid[0]), chosen[0])  # a row alone
    assert al.acquire(torch.zeros(6), 2).tolist() == [True, True, False, False, False, False]


def test_collective_outliers_are_those_never_learnt():
    confidence, variability = torch.tensor([.05, .9, .5, .1]), torch.tensor([.02, .1, .4, .05])
    assert al.collective_outliers(confidence, variability).tolist() == [True, False, False, False]
    assert not al.collective_outliers(confidence, variability, 0.).any()


def learners(**changes):
    g = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(80, 3, generator=g), torch.randn(60, 3, generator=g)
    rule = lambda t: (t[:, 0] + t[:, 1] > 0).long()
    options = dict(make=lambda: nn.Linear(3, 2), x=x, y=rule(x), test=(x_test, rule(x_test)), rules={"random": lambda r: torch.rand(len(r.x), generator=r.generator), "unsure": lambda r: al.uncertainty(r.probabilities)},
                   seeds=[0, 5], start=4, k=3, rounds=3, epochs=5, batch_size=4, optimizer=partial(torch.optim.SGD, lr=.5))
    return al.label_in_rounds(**{**options, **changes})


def test_loop_is_that_of_a_learner_alone():
    found = learners()
    assert found.curves["unsure"].shape == (2, 4) and found.order["unsure"].shape == (2, 13)
    alone = learners(seeds=[5], rules={"unsure": lambda r: al.uncertainty(r.probabilities)})
    assert torch.equal(alone.order["unsure"][0], found.order["unsure"][1]) and torch.allclose(alone.curves["unsure"][0], found.curves["unsure"][1])
    g = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(80, 3, generator=g), torch.randn(60, 3, generator=g)
    rule = lambda t: (t[:, 0] + t[:, 1] > 0).long()
    rows = torch.randperm(80, generator=torch.Generator().manual_seed(5))[:4]
    for r in range(4):  # by hand
        one = train_ensemble(lambda: nn.Linear(3, 2), x[rows], rule(x)[rows], [5], epochs=5, batch_size=4, optimizer=partial(torch.optim.SGD, lr=.5))
        assert float(one.accuracy(x_test, rule(x_test))) == pytest.approx(float(found.curves["unsure"][1, r]))
        score = al.uncertainty(one.predict(x)[0].softmax(-1)).index_fill(0, rows, -1)
        rows = torch.cat([rows, score.argsort(descending=True)[:3]])
    assert torch.equal(rows[:13], found.order["unsure"][1])


def test_loop_goes_on_where_it_stopped():
    whole, part = learners(), learners(rounds=1)
    again = learners(rounds=2, after=part)
    for n in whole.order: assert torch.equal(whole.order[n], again.order[n]) and torch.allclose(whole.curves[n], again.curves[n])


def test_loop_tells_rules_only_what_is_known():
    seen = []
    def rule(r):
        seen.append((int(r.labeled.sum()), int((r.y >= 0).sum()), int(r.held.sum()), r.logits.shape[0], bool((r.valid & r.labeled).any())))
        return torch.zeros(len(r.x))
    learners(rules={"look": rule}, seeds=[0], held=2, committee=3)
    assert seen == [(4, 4, 2, 3, False), (7, 7, 2, 3, False), (10, 10, 2, 3, False)]


def test_loop_with_a_pool_for_each_seed_and_what_is_allowed():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 40, 3, generator=g), torch.randint(2, (2, 40), generator=g)
    allowed = torch.arange(40) < 20
    start = torch.zeros(2, 40, dtype=torch.bool).index_fill(1, torch.tensor([0, 30]), True)
    found = learners(x=x, y=y, test=(x, y), start=start, valid={"unsure": allowed}, skip={"unsure": .1}, initial={"bias": torch.zeros(2, 2)})
    assert (found.order["unsure"][:, 2:] < 20).all() and set(found.order["unsure"][0, :2].tolist()) == {0, 30}
    alone = learners(x=x[1], y=y[1], test=(x[1], y[1]), seeds=[5], start=start[:1], valid={"unsure": allowed}, skip={"unsure": .1}, initial={"bias": torch.zeros(1, 2)})
    assert torch.equal(alone.order["unsure"][0], found.order["unsure"][1])


@pytest.mark.parametrize("changes, message", [
    (dict(start=81), "at most 80"), (dict(start=torch.zeros(2, 80, dtype=torch.bool)), "at least one"), (dict(k=100), "k: got 100; want at most 25 in each of 3 rounds"), (dict(rules={}), "0 rules"), (dict(seeds=[]), "0 seeds"), (dict(skip={"sure": .1}), "skip: got a rule named 'sure'"), (dict(valid={"sure": None}), "valid: got a rule"), (dict(valid={"unsure": torch.ones(79, dtype=torch.bool)}), "valid: got torch.bool of shape"), (dict(held=4), "fewer than the 4"),
    (dict(rules={"odd": lambda r: torch.zeros(3)}), "one for each example of the pool"), (dict(y=torch.zeros(79, dtype=torch.long)), "y: got shape"), (dict(test=(torch.randn(3, 3), torch.zeros(2, dtype=torch.long))), "test: got"),
    (dict(rules={"bad": lambda r: torch.full((len(r.x),), torch.nan)}), "NaN"),
])
def test_loop_refuses(changes, message):
    with pytest.raises(ValueError, match=message): learners(**changes)


def test_area_is_the_mean_height():
    assert al.area(torch.tensor([[0., 1.], [.5, .5]])).tolist() == [.5, .5] and al.area(torch.tensor([0., 1., 1.])) == .75
