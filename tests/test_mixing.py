import math
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from whatmatters.sparsity import mixing as mx

def setting(seed=0, n=6):
    g = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    draw = lambda k: (torch.randn(k, 3, generator=g, dtype=torch.float64), torch.randint(2, (k,), generator=g))
    return network, draw(n), draw(10), torch.rand(n, generator=g, dtype=torch.float64)


def test_gradient_of_weights_is_the_dot_product_of_gradients():
    network, batch, downstream, w = setting()
    step = mx.weighted_step(network, batch, downstream, w, rate=.4)
    each = lambda net, x, y: torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))])
    own = torch.stack([each(network, x[None], y[None]) for x, y in zip(*batch)])
    after = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    flat = torch.cat([p.detach().flatten() for p in network.parameters()]) - .4 * (w[:, None] * own).sum(0)
    nn.utils.vector_to_parameters(flat, after.parameters())
    assert torch.allclose(torch.cat([p.flatten() for p in step.parameters.values()]), flat)
    assert torch.allclose(step.gradient, -.4 * own @ each(after, *downstream)) and float(step.loss) == pytest.approx(cross_entropy(after(downstream[0]), downstream[1]).item())


def test_scorer_follows_the_gradient_and_the_reference_model_stays():
    network, batch, downstream, _ = setting(n=20)
    before = [p.clone() for p in network.parameters()]
    features = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scorer = nn.Linear(2, 1).double()
    start, numeric, small = scorer.weight.detach().clone(), [], 1e-5
    loss = lambda: mx.weighted_step(network, batch, downstream, scorer(features)[:, 0].softmax(0).detach(), .5).loss.item()
    for i in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad(): scorer.weight[0, i] += sign * small
            values.append(loss())
            with torch.no_grad(): scorer.weight.copy_(start)
        numeric.append((values[0] - values[1]) / (2 * small))
    found = mx.flyt(scorer, features, network, batch, downstream, steps=1, batch_size=10, rate=.5, scoring_rate=.01, update=False)
    assert len(found.losses) == 1 and all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    weights = scorer(features)[:, 0].softmax(0)
    with torch.no_grad(): scorer.weight.copy_(start)
    scorer.zero_grad()
    w = scorer(features)[:, 0].softmax(0)
    w.backward(mx.weighted_step(network, batch, downstream, w.detach(), .5).gradient)
    assert torch.allclose(scorer.weight.grad[0], torch.tensor(numeric, dtype=torch.float64), atol=1e-8) and weights.shape == (20,)


def test_flyt_draws_the_same_for_a_seed():
    network, batch, downstream, _ = setting(n=20)
    features = batch[0]
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(mx.flyt(nn.Linear(3, 1).double(), features, network, batch, downstream, steps=5, batch_size=8, generator=3))
    assert torch.equal(runs[0].scores, runs[1].scores) and runs[0].losses == runs[1].losses


@pytest.mark.parametrize("penalty", [0., .15, 1., math.inf])
@pytest.mark.parametrize("batch", [None, 1, 7])
def test_soft_cap_draws_exactly_the_budget(penalty, batch):
    s = torch.randn(50, generator=torch.Generator().manual_seed(0))
    counts = mx.soft_cap_sampling(s, 40, penalty, batch, 1)
    assert counts.sum() == 40 and (counts >= 0).all() and (not math.isinf(penalty) or counts.max() == 1)
    assert torch.equal(counts, mx.soft_cap_sampling(s, 40, penalty, batch, 1)) and torch.equal(counts, mx.soft_cap_sampling(s + 3, 40, penalty, batch, 1))  # only differences count


def test_more_than_there_is_needs_repeats():
    s = torch.zeros(4)
    assert mx.soft_cap_sampling(s, 400, 5., batch=1).tolist() == pytest.approx([100] * 4, abs=2)  # a high penalty takes turns
    with pytest.raises(ValueError, match="at most 4 draws"): mx.soft_cap_sampling(s, 5, math.inf)
    with pytest.raises(ValueError, match="batch: got 9"): mx.soft_cap_sampling(s, 20, batch=9)


@pytest.mark.parametrize("call, message", [
    (lambda: mx.soft_cap_sampling(torch.zeros(4), 2, -1.), "penalty"), (lambda: mx.soft_cap_sampling(torch.zeros(2, 2), 2), "scores: got shape"), (lambda: mx.soft_cap_sampling(torch.tensor([0., torch.nan]), 1), "NaN"),
    (lambda: mx.standardise(torch.zeros(3)), "a column for each method"), (lambda: mx.standardise(torch.zeros(1, 3)), "at least two examples"), (lambda: mx.hashed_words("a b"), "one string"), (lambda: mx.hashed_words(["a", None]), "a NoneType"),
    (lambda: mx.keep_probability(torch.ones(3), factor=-1.), "factor"), (lambda: mx.keep_probability(torch.ones(3), width=0.), "width"), (lambda: mx.rejecting_instruction_preferences(torch.ones(0, 2), torch.ones(0, 2)), "rewards: got shape"),
    (lambda: mx.flyt(nn.Linear(3, 1).double(), setting()[1][0], setting()[0], setting()[1], tuple(t[:0] for t in setting()[1]), batch_size=4), "downstream: got no examples"), (lambda: mx.hashed_words(["a", " "]), "1 without a word"), (lambda: mx.hashed_words([]), "none"),
    (lambda: mx.bigrams(torch.zeros(2, 0, dtype=torch.long)), "documents, tokens"), (lambda: mx.bigrams(torch.tensor([[9]]), size=4), "0 to 3"), (lambda: mx.bigrams(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[False, True]])), "documents of no tokens"),
    (lambda: mx.bigrams(torch.zeros(1, 2, dtype=torch.long), discount=1.), "discount"), (lambda: mx.keep_probability(torch.tensor([1., -1.])), "positive"), (lambda: mx.keep_probability(torch.ones(3), "odd"), '"gaussian" or "stepwise"'),
    (lambda: mx.keep_probability(torch.ones(3), share=0.), "a share"), (lambda: mx.rejecting_instruction_preferences(torch.ones(3, 1), torch.ones(3, 1)), "at least two answers"),
    (lambda: mx.rejecting_instruction_preferences(torch.ones(3, 2), torch.ones(3, 3)), "lengths"), (lambda: mx.rejecting_instruction_preferences(torch.ones(3, 2), torch.ones(3, 2), gap=1.), "gap: got 1.0"),
    (lambda: mx.rejecting_instruction_preferences(torch.ones(3, 2), torch.ones(3, 2), valid=torch.tensor([[True, False]] * 3)), "fewer than two answers"),
    (lambda: mx.weighted_step(setting()[0], setting()[1], setting()[2], torch.ones(2)), "weights"), (lambda: mx.flyt(nn.Linear(3, 1), setting()[1][0], *setting()[:3], batch_size=100), "at most 6"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_bigrams_prefer_what_they_saw_and_padding_counts_nothing():
    tokens, valid = mx.hashed_words(["the cat sat", "the cat ran", "a dog ran far away"], size=97)
    model = mx.bigrams(tokens, valid, size=97)
    at = mx.bigram_perplexity(model, *mx.hashed_words(["the cat ran", "ran cat the", "zebra quagga okapi"], size=97))
    assert at[0] < at[1] < 97 * 2 and at[0] < at[2]
    alone = mx.bigram_perplexity(model, *mx.hashed_words(["the cat ran"], size=97))
    longer = mx.bigram_perplexity(model, *mx.hashed_words(["the cat ran", "one two three four five six"], size=97))
    assert alone[0] == at[0] == longer[0]


@pytest.mark.parametrize("kind", ["gaussian", "stepwise"])
def test_probabilities_keep_the_share_and_do_not_depend_on_the_unit(kind):
    p = torch.rand(500, generator=torch.Generator().manual_seed(0)).add(.5).pow(3)
    for share in (.05, .2, .9, 1.):
        far = mx.keep_probability(torch.cat([p, p * 1e4]), kind, share / 4)  # a tail in which the Gaussian underflows
        assert float(far.double().mean()) == pytest.approx(share / 4, abs=1e-4)
        kept = mx.keep_probability(p, kind, share)
        assert float(kept.double().mean()) == pytest.approx(share, abs=1e-4) and kept.max() <= 1 and kept.min() >= 0
    assert torch.allclose(mx.keep_probability(p, kind), mx.keep_probability(p * 100, kind), atol=1e-5)
    few = mx.keep_probability(p, kind, .05) / mx.keep_probability(p, kind, .1)
    assert torch.allclose(few, few[:1].expand(500), atol=1e-3) or kind == "stepwise"  # where nothing is cut at one, only the height changes


def test_prompts_are_kept_by_the_rejected_answer():
    g = torch.Generator().manual_seed(0)
    rewards, lengths = torch.randn(200, 5, generator=g), torch.rand(200, 5, generator=g)
    found = mx.rejecting_instruction_preferences(rewards, lengths)
    worst = rewards.argmin(1)
    assert torch.equal(found.rejected_reward, rewards.amin(1)) and torch.equal(found.rejected_length, lengths[torch.arange(200), worst]) and torch.allclose(found.gap, rewards.amax(1) - rewards.amin(1))
    by_hand = (found.rejected_reward >= found.rejected_reward.quantile(.5)) & (found.rejected_length >= found.rejected_length.quantile(.5)) & (found.gap <= found.gap.quantile(.5))
    assert torch.equal(found.keep, by_hand) and 0 < found.keep.sum() < 100
    shuffled = torch.randperm(5, generator=g)
    assert torch.equal(mx.rejecting_instruction_preferences(rewards[:, shuffled], lengths[:, shuffled]).keep, found.keep)
    more = torch.cat([rewards, torch.full((200, 1), -9.)], 1), torch.cat([lengths, torch.zeros(200, 1)], 1)
    assert torch.equal(mx.rejecting_instruction_preferences(*more, valid=torch.arange(6).expand(200, 6) < 5).keep, found.keep)  # what is not there does not count
    assert torch.equal(mx.rejecting_instruction_preferences(rewards, lengths, reward=.9, length=0, gap=0).keep, rewards.amin(1).double() >= rewards.amin(1).double().quantile(.9))


def test_whole_numbers_will_do():
    p = torch.tensor([3, 9, 4, 8, 90])
    assert torch.equal(mx.keep_probability(p), mx.keep_probability(p.float())) and torch.equal(mx.standardise(p[:, None]), mx.standardise(p[:, None].float()))
    r, n = torch.tensor([[1, 5], [4, 5], [3, 9]]), torch.tensor([[2, 2], [9, 1], [8, 3]])
    assert torch.equal(mx.rejecting_instruction_preferences(r, n, .3, .3, .3).keep, mx.rejecting_instruction_preferences(r.float(), n.float(), .3, .3, .3).keep)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_quantiles_are_those_of_torch(n):
    t = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).round(decimals=1)
    for q in (0., .1, .25, .5, .75, 1.): assert float(mx._quantiles(t, [q])[0]) == float(t.quantile(q))
