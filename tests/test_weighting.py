"The step of a weighted training and every rule for its weights: by hand, against peers, and what is refused."
import math
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import gaussian_kde
from torch import nn
from torch.nn.functional import cross_entropy
from whatmatters.core.per_example import gradient_norms
from whatmatters.sparsity.weighting import (SHAPES, allocate, check_weights, curriculum_weights, difficulty, keep_self_generated, loss_weights, pair_difficulty, presence_weights,
                                            self_consistent, shift_extent, task_relevance, train_weighted)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def rows(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g), torch.randint(3, (n,), generator=g)


def sgd(parameters): return torch.optim.SGD(parameters, lr=.1)


# the step

def test_training_follows_the_weighted_sum_of_losses():
    x, y = rows(8)
    w = torch.rand(8)
    a, b = net(), net()
    train_weighted(a, x, y, lambda losses, r, epoch: w[r], epochs=1, batch_size=8, optimizer=sgd)
    (w * cross_entropy(b(x), y, reduction="none")).sum().backward()
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q - .1 * q.grad)


def test_weights_that_depend_on_the_losses_pass_no_gradient():
    x, y = rows(16)
    a, b = net(), net()
    with torch.no_grad(): fixed = loss_weights(cross_entropy(b(x), y, reduction="none"))
    train_weighted(a, x, y, lambda losses, r, epoch: loss_weights(losses), epochs=1, batch_size=16, optimizer=sgd)
    train_weighted(b, x, y, lambda losses, r, epoch: fixed[r], epochs=1, batch_size=16, optimizer=sgd)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q)


def test_training_shows_every_row_once_in_an_epoch_the_same_way_for_the_same_seed():
    x, y = rows(41)
    def run(seed):
        seen, network = [], net()
        def weigh(losses, r, epoch):
            assert not losses.requires_grad and not network.training
            seen.append((epoch, r))
            return torch.ones_like(losses) / len(r)
        losses = train_weighted(network, x, y, weigh, epochs=2, batch_size=8, generator=seed)
        assert len(losses) == len(seen) == 12 and not network.training
        return seen, losses
    seen, losses = run(3)
    assert all(torch.equal(torch.cat([r for e, r in seen if int(e) == i]).sort().values, torch.arange(41)) for i in (0, 1))
    assert torch.equal(losses, run(3)[1]) and not torch.equal(losses, run(4)[1])


def test_watch_ends_training_and_a_frozen_parameter_stays():
    x, y = rows()
    network = net()
    network[0].weight.requires_grad_(False)
    before = network[0].weight.clone()
    assert len(train_weighted(network, x, y, batch_size=10, watch=lambda step: step >= 3)) == 3
    assert torch.equal(before, network[0].weight) and all(p.grad is None for p in network.parameters())


def test_training_of_a_regression():
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    line = nn.Linear(2, 1)
    losses = train_weighted(line, x, x @ torch.tensor([1., -2.]) + 3, loss=lambda out, y: (out[:, 0] - y).square(), optimizer=sgd, epochs=20)
    assert losses[-1] < 1e-3 and abs(line.bias.item() - 3) < .05


@pytest.mark.parametrize("bad, said", [(lambda l: -torch.ones_like(l), "negative"), (torch.zeros_like, "zeros"), (lambda l: l * float("nan"), "NaN"), (lambda l: l[:2], "shape"), (lambda l: l[:, None], "shape")])
def test_training_refuses_bad_weights_before_the_step(bad, said):
    network = net()
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(ValueError, match=f"weigh: got .*{said}"): train_weighted(network, *rows(), lambda losses, r, epoch: bad(losses))
    assert all(torch.equal(p, q) for p, q in zip(before, network.parameters()))


def test_training_refuses_bad_data():
    x, y = rows()
    with pytest.raises(ValueError, match="y: got shape"): train_weighted(net(), x, y[:3])
    with pytest.raises(ValueError, match="x: got no rows"): train_weighted(net(), x[:0], y[:0])
    with pytest.raises(ValueError, match="epochs: got 0"): train_weighted(net(), x, y, epochs=0)
    with pytest.raises(ValueError, match="loss: got shape"): train_weighted(net(), x, y, loss=cross_entropy)
    with pytest.raises(ValueError, match="weights: got list"): check_weights("weights", [1, 2])
    assert check_weights("weights", torch.tensor([0, 2])).tolist() == [0, 2]


def test_a_training_costs_one_pass_per_row_and_epoch():
    x, y = rows()
    network, seen = net(), []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    train_weighted(network, x, y, lambda losses, r, epoch: loss_weights(losses), epochs=3, batch_size=16)
    assert sum(seen) == 3 * 40 and len(seen) == 9


# self-influence

def test_presence_weights_are_the_softmax_of_the_formula():
    s = torch.tensor([.5, 2., 8.])
    for phase, sign in ((1, 1), (2, -1)):
        expected = torch.exp(sign * s / (2 * s.mean()))
        torch.testing.assert_close(presence_weights(s, phase, 2.), expected / expected.sum())


def test_presence_weights_of_a_closed_form_self_influence():
    "Of a linear classifier self-influence is |p - onehot|^2 (|x|^2 + 1)."
    x, y = rows(12)
    torch.manual_seed(0)
    linear = nn.Linear(5, 3)
    with torch.no_grad(): expected = (linear(x).softmax(1) - nn.functional.one_hot(y, 3)).square().sum(1) * (x.square().sum(1) + 1)
    found = gradient_norms(linear, (x, y), squared=True)
    torch.testing.assert_close(presence_weights(found, 1), presence_weights(expected, 1))


def test_presence_weights_refuse():
    with pytest.raises(ValueError, match="phase: got 3"): presence_weights(torch.ones(3), 3)
    with pytest.raises(ValueError, match="temperature: got 0"): presence_weights(torch.ones(3), 1, 0)
    with pytest.raises(ValueError, match="influence: got 1 negative"): presence_weights(torch.tensor([1., -1.]), 1)
    with pytest.raises(ValueError, match="influence: got 1 NaN"): presence_weights(torch.tensor([1., float("nan")]), 1)
    with pytest.raises(ValueError, match="influence: got shape .0,."): presence_weights(torch.zeros(0), 1)
    assert presence_weights(torch.zeros(2), 2).tolist() == [.5, .5] # nothing is left to learn
    assert presence_weights(torch.zeros(2).half(), 2).tolist() == [.5, .5]
    torch.testing.assert_close(presence_weights(torch.tensor([1e-35, 3e-35]), 1), presence_weights(torch.tensor([1., 3.]), 1)) # nearly nothing


def test_a_language_model_trains_with_both_phases():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    ids = torch.arange(8).repeat(24, 1)
    ids[:4] = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(0)) # texts without order
    loss = lambda out, y: cross_entropy(out.logits[:, :-1].transpose(1, 2), y[:, 1:], reduction="none").mean(1)
    seen = []
    def weigh(losses, r, epoch):
        w = presence_weights(gradient_norms(lm, ids[r], squared=True), 1 if epoch < 2 else 2)
        seen.append((epoch < 2, float(w[r < 4].mean() / w[r >= 4].mean())))
        return w
    losses = train_weighted(lm, ids, ids, weigh, epochs=6, batch_size=24, loss=loss, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    assert len(losses) == 6 and losses[-1] < losses[0] and seen[-1][1] < .5 and all(up == (ratio > 1) for up, ratio in seen[1:])


# losses

@pytest.mark.parametrize("shape", SHAPES)
def test_loss_weights_by_hand(shape):
    losses = torch.tensor([1., 2., 4., 5.], dtype=torch.double)
    h = [-1., -.5, .5, 1.]
    f = {"linupper": [min(v + 1, 1) for v in h], "quadratic": [1 - v * v for v in h], "extremes": [abs(v) for v in h]}[shape]
    e = [math.exp(v / .3) for v in f]
    torch.testing.assert_close(loss_weights(losses, shape, .3), torch.tensor([v / sum(e) for v in e]).double())
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss_weights(losses[order], shape), loss_weights(losses, shape)[order])


def test_loss_weights_at_the_ends_and_refusals():
    assert loss_weights(torch.tensor([3.])).tolist() == [1] and loss_weights(torch.full((4,), 2.), "extremes").tolist() == [.25] * 4
    torch.testing.assert_close(loss_weights(torch.rand(5), temperature=1e7), torch.full((5,), .2))
    assert not loss_weights(torch.rand(3, requires_grad=True)).requires_grad
    with pytest.raises(ValueError, match="shape: got 'linear'"): loss_weights(torch.rand(3), "linear")
    with pytest.raises(ValueError, match="losses: got 1 NaN"): loss_weights(torch.tensor([1., float("nan")]))
    with pytest.raises(ValueError, match="losses: got shape"): loss_weights(torch.rand(0))


# curricula

def test_difficulty_of_every_kind():
    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for i, s in enumerate(scores):
        place = (s[None] > s[:, None]).sum(1) + 1
        torch.testing.assert_close(difficulty(scores)[i], 1 / place.double())
        torch.testing.assert_close(difficulty(scores, "normalised")[i], (s - s.min()) / (s.max() - s.min()))
        peer = gaussian_kde(s.numpy())
        torch.testing.assert_close(difficulty(scores, "percentile")[i], torch.tensor([peer.integrate_box_1d(-math.inf, v) for v in s.tolist()], dtype=torch.double))
    for kind in ("reciprocal", "normalised", "percentile"):
        d = difficulty(scores, kind)
        assert d.min() >= 0 and d.max() <= 1 and torch.equal(d.argsort(1), scores.argsort(1)) # what ranks higher is easier
    assert difficulty(torch.ones(1, 3), "normalised").tolist() == [[.5] * 3]


def test_curriculum_ends():
    d = torch.rand(20)
    w = torch.stack([curriculum_weights(d, i, 5) for i in range(8)])
    assert torch.equal(w[0], d) and (w.diff(dim=0) >= 0).all() and (w[5:] == 1).all()
    torch.testing.assert_close(w[3], d + .6 * (1 - d))
    assert (curriculum_weights(d, 0, 0) == 1).all()
    torch.testing.assert_close(pair_difficulty(d, d), torch.full((20,), .5))
    with pytest.raises(ValueError, match="difficulty: got values"): curriculum_weights(d + 1, 0, 5)
    with pytest.raises(ValueError, match="epoch: got -1"): curriculum_weights(d, -1, 5)
    with pytest.raises(ValueError, match="kind: got 'rank'"): difficulty(torch.rand(2, 3), "rank")
    for bad in (torch.rand(3), torch.rand(0, 3)):
        with pytest.raises(ValueError, match="scores: got shape"): difficulty(bad)
    for kind in ("reciprocal", "normalised", "percentile"): torch.testing.assert_close(difficulty(torch.tensor([[1, 3, 2]]), kind), difficulty(torch.tensor([[1., 3, 2]]), kind))


# tasks

def test_task_relevance_meets_the_conditions_of_the_lasso():
    g = torch.Generator().manual_seed(0)
    sources, target = torch.randn(9, 4, generator=g, dtype=torch.double), torch.randn(4, generator=g, dtype=torch.double)
    nu = task_relevance(sources, target, .3)
    slope = sources @ (target - nu @ sources) # of the square; lambda times the sign where nu is not zero, and at most lambda elsewhere
    on = nu != 0
    assert 0 < on.sum() < 9 and torch.allclose(slope[on], .3 * nu[on].sign(), atol=1e-5) and (slope[~on].abs() <= .3 + 1e-6).all()
    assert not task_relevance(sources, target, 100.).any()
    shortest = linprog([1] * 18, A_eq=torch.cat([sources, -sources]).T.numpy(), b_eq=target.numpy()).fun # the least 1-norm of all that make the target
    small = task_relevance(sources, target, 1e-7)
    torch.testing.assert_close(small @ sources, target, atol=1e-5, rtol=1e-5)
    assert float(small.abs().sum()) == pytest.approx(shortest, abs=1e-5)
    with pytest.raises(ValueError, match="target: got shape"): task_relevance(sources, target[:2])
    with pytest.raises(ValueError, match="penalty: got 0"): task_relevance(sources, target, 0)
    with pytest.raises(ValueError, match="sources: got 1 NaN"): task_relevance(torch.tensor([[float("nan")]]), torch.ones(1))


def test_allocation_sums_up_and_keeps_its_floor():
    g = torch.Generator().manual_seed(0)
    for total in (7, 50, 999):
        nu = torch.randn(6, generator=g)
        n = allocate(nu, total)
        assert n.sum() == total and ((n - total * nu.abs() / nu.abs().sum()).abs() < 1).all()
        floored = allocate(nu, total, floor=1)
        assert floored.sum() == total and floored.min() >= 1
    assert allocate(torch.tensor([1., -2.]), 10, power=2).tolist() == [2, 8] and allocate(torch.tensor([0., 1.]), 5).tolist() == [0, 5]
    costs = torch.tensor([1., 4.])
    assert allocate(torch.tensor([1., 2.]), 50, costs=costs).tolist() == [10, 10] # |nu| / sqrt(cost) is the same
    with pytest.raises(ValueError, match="relevance: got 2 zeros"): allocate(torch.zeros(2), 5)
    with pytest.raises(ValueError, match="total: got 5"): allocate(torch.ones(2), 5, floor=3)
    for cost in (0., float("inf")):
        with pytest.raises(ValueError, match="costs: got .1.0, "): allocate(torch.ones(2), 5, costs=torch.tensor([1., cost]))
    with pytest.raises(ValueError, match="power: got -1"): allocate(torch.ones(2), 5, power=-1)
    for i in range(20): # with costs never more than the budget, and not so much less that the dearest task could have one more
        costs = torch.rand(6, generator=g) * 5 + .5
        spent = float(costs.double() @ allocate(torch.randn(6, generator=g), 200, costs=costs).double())
        assert 200 - 6 * float(costs.max()) < spent <= 200


# self-improvement

def test_extent_is_the_ratio_folded_at_one():
    losses = torch.tensor([[.1, 1.], [3., 4.]])
    w = 2. / losses
    torch.testing.assert_close(shift_extent(losses, torch.tensor([1., 3.]), most=100., far=100.), torch.maximum(w, 1 / w))
    assert shift_extent(losses, torch.tensor([2.])).max() <= 5 and shift_extent(torch.tensor([1e-9]), torch.tensor([2.])) == 2
    with pytest.raises(ValueError, match="most, far: got 0, 5.0"): shift_extent(losses, torch.ones(2), most=0)
    with pytest.raises(ValueError, match="wanted: got losses that are all zero"): shift_extent(losses, torch.zeros(2))
    with pytest.raises(ValueError, match="wanted: got shape .0,."): shift_extent(losses, torch.zeros(0))
    with pytest.raises(ValueError, match="losses: got shape"): shift_extent(-losses, torch.ones(2))


def test_self_consistency_against_counting():
    g = torch.Generator().manual_seed(0)
    answers = torch.randint(-1, 4, (50, 7), generator=g)
    for row, agree in zip(answers.tolist(), self_consistent(answers).tolist()):
        given = [a for a in row if a >= 0]
        best = min(set(given), key=lambda a: (-given.count(a), a)) if given else None
        assert agree == [a == best for a in row]
    with pytest.raises(ValueError, match="answers: got torch.float32"): self_consistent(torch.rand(2, 2))


def test_what_is_kept_is_consistent_and_has_the_least_shift():
    g = torch.Generator().manual_seed(0)
    answers, losses, wanted = torch.randint(3, (30, 5), generator=g), torch.rand(30, 5, generator=g) * 3, torch.rand(9, generator=g)
    kept, agree, extent = keep_self_generated(losses, wanted, answers, .6), self_consistent(answers), shift_extent(losses, wanted)
    assert not (kept & ~agree).any() and kept.sum() == round(.6 * int(agree.sum())) and extent[kept].max() <= extent[agree & ~kept].min()
    assert torch.equal(keep_self_generated(losses, wanted, answers, 1.), agree)
    with pytest.raises(ValueError, match="answers: got shape"): keep_self_generated(losses, wanted, answers[:3])
