"Scores from gradients and budgets from forward passes: definitions, costs, and what they refuse."
import pytest
import torch
from torch import nn
from whatmatters.core.calibration import gradients, weights_of
from whatmatters.core.keep import count_of
from whatmatters.sparsity.gradients import dpruner, ecoflap_shares, gblm, mask_structure, removal_error, zeroth_order

draw = torch.Generator().manual_seed(0)
w, g = torch.randn(5, 8, generator=draw), torch.randn(5, 8, generator=draw)
F, G, norm = torch.rand(5, 8, generator=draw), torch.rand(5, 8, generator=draw), torch.rand(8, generator=draw)
SCORES = {"removal": lambda w: removal_error(w, g, F), "gblm": lambda w: gblm(w, norm, G), "step": lambda w: dpruner(w, G, g, F), "dual": lambda w: dpruner(w, G, g, F, rule="removal")}


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype).eval()


def batches(n=3, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 6, generator=draw).to(dtype), torch.randint(4, (16,), generator=draw)) for _ in range(n)]


def loss(network, batch): return nn.functional.cross_entropy(network(batch[0]).float(), batch[1])


@pytest.mark.parametrize("name", SCORES)
def test_dtypes_and_inputs_that_stay(name):
    before, exact = w.clone(), SCORES[name](w)
    assert exact.dtype == torch.float32 and exact.shape == w.shape and (exact >= 0).all() and torch.equal(w, before)
    low = SCORES[name](w.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, SCORES[name](w.bfloat16().float()))
    assert SCORES[name](w.double()).dtype == torch.float64
    assert not SCORES[name](w.clone().requires_grad_()).requires_grad
    assert not SCORES[name](torch.zeros_like(w)).any()


def test_gblm_by_its_definition():
    model, data = network(), batches()
    weights = weights_of(model)
    for power, aggregate in ((2, lambda t: t.square().sum(0).sqrt()), (1, lambda t: t.abs().sum(0))):
        found = gradients(model, data, loss, weights, power)
        for name, v in weights.items():
            each = torch.stack([torch.autograd.grad(loss(model, (x[i:i + 1], y[i:i + 1])), v.parameter)[0] for x, y in data for i in range(len(x))])
            scale = norm.new_ones(v.matrix.shape[1])
            score = gblm(v.matrix, scale, found[name].sqrt() if power == 2 else found[name], alpha=100)
            torch.testing.assert_close(score, v.matrix.abs() + v.matrix.abs() * aggregate(100 * each), rtol=1e-4, atol=1e-6)


def test_gblm_of_a_language_model_through_prune():
    from transformers import LlamaConfig, LlamaForCausalLM
    from whatmatters.core.calibration import calibrate
    from whatmatters.sparsity.weights import prune
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)).eval()
    ids = torch.randint(32, (6, 20))
    weights = weights_of(model)
    statistics, squares = calibrate(model, [ids], weights), gradients(model, [ids], None, weights)
    wanted = {k: gblm(v.matrix, statistics[k].norm / 6 ** .5, squares[k].sqrt()) for k, v in weights.items()}
    masks = prune(model, "gblm", .5, ids).masks
    for k, m in masks.items(): assert m.sum(1).tolist() == [m.shape[1] // 2] * len(m) and wanted[k][m].sum() > wanted[k][~m].sum()
    from whatmatters.core.keep import top
    for k, m in masks.items(): assert torch.equal(m, top(wanted[k], ratio=.5)), k


def test_dual_scores_by_their_formulas():
    for name, v in (("step", abs((1 + 2 * .1 * .03 ** 2 * G * F) * g * w - (1 + 2 * .1 * .03 ** 2 * G * F) ** 2 * F * w ** 2 / 2)), ("dual", abs(g * w - (F + .2 * G) * w ** 2 / 2))):
        torch.testing.assert_close(SCORES[name](w), v)


def test_slopes_cost_two_forwards_each_and_leave_the_weights_alone():
    model, calls = network().train(), []
    before = [p.clone() for p in model.parameters()]
    def counted(network, batch):
        assert not network.training
        return calls.append(1) or loss(network, batch)
    slopes = zeroth_order(model, batches(), counted, probes=2, generator=3)
    assert len(calls) == 2 * 3 * 2 * 3 and model.training and all(s.shape == (6,) for s in slopes.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    again = zeroth_order(model, iter(batches()), loss, probes=2, generator=3)
    assert all(torch.equal(slopes[k], again[k]) for k in slopes)
    def fails(network, batch):
        calls.append(1)
        if len(calls) == 40: raise RuntimeError("no more")
        return loss(network, batch)
    with pytest.raises(RuntimeError, match="no more"): zeroth_order(model, batches(), fails)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and model.training


def test_slopes_estimate_the_norm_of_the_gradient():
    model, data = network(dtype=torch.float64), batches(1, torch.float64)
    slopes = zeroth_order(model, data, lambda n, b: nn.functional.cross_entropy(n(b[0]), b[1]), probes=600, scale=1e-4)
    for name, s in slopes.items():
        true = torch.autograd.grad(loss(model, data[0]), model.get_parameter(name))[0].norm()
        assert s.mean() == pytest.approx(float(true) * (2 / torch.pi) ** .5, rel=.1)


def test_slopes_in_bfloat16():
    model = network(dtype=torch.bfloat16)
    before = [p.clone() for p in model.parameters()]
    slopes = zeroth_order(model, batches(2, torch.bfloat16), loss, scale=1e-2)
    assert all(s.isfinite().all() for s in slopes.values()) and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("sparsity", [0, .3, .5, .9, .97])
@pytest.mark.parametrize("cap", [None, 1.])
def test_shares_meet_the_target_and_the_cap(sparsity, cap):
    draw = torch.Generator().manual_seed(int(sparsity * 100))
    for _ in range(20):
        counts = {str(i): int(n) for i, n in enumerate(torch.randint(1, 5000, (7,), generator=draw))}
        importances = {k: float(v) for k, v in zip(counts, torch.rand(7, generator=draw) ** 4)}
        shares = ecoflap_shares(importances, {k: (n,) for k, n in counts.items()}, sparsity, cap)
        least = max(.9 - sparsity, 0) if cap is None else 0
        kept = {k: shares[k] * n for k, n in counts.items()}
        assert all(abs(v - round(v)) < 1e-6 for v in kept.values()) and round(sum(kept.values())) == count_of(1 - sparsity, sum(counts.values()))
        assert all(least * counts[k] - 1 <= v <= counts[k] for k, v in kept.items())
        free = [k for k in counts if shares[k] < 1]  # not full: beyond the floor, in proportion to the importance
        beyond = [kept[k] - least * counts[k] for k in free]
        part = sum(beyond) / max(sum(importances[k] for k in free), 1e-12)
        assert all(b == pytest.approx(part * importances[k], abs=3) for k, b in zip(free, beyond))


def test_blocks_share_one_ratio_and_scale_does_not_matter():
    counts, importances = dict(a=(10, 100), b=(20, 100), c=(30, 100)), dict(a=torch.tensor([1., 3.]), b=1., c=5.)
    shares = ecoflap_shares(importances, counts, .5, groups=dict(a=0, b=0, c=1))
    assert shares["a"] == pytest.approx(shares["b"], abs=1e-3) and shares["a"] * 1000 + shares["b"] * 2000 + shares["c"] * 3000 == pytest.approx(3000)
    assert ecoflap_shares({k: 1e-9 * v for k, v in importances.items()}, counts, .5) == pytest.approx(ecoflap_shares(importances, counts, .5))


def test_structure_of_a_random_mask_is_one_by_exact_expectation():
    from itertools import combinations
    masks = [torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(c), True).view(2, 3) for c in combinations(range(6), 3)]
    rows, columns = zip(*map(mask_structure, masks))
    assert sum(rows) / len(masks) == pytest.approx(1) and sum(columns) / len(masks) == pytest.approx(1)
    with pytest.raises(ValueError, match="mask: got shape"): mask_structure(torch.ones(3, 3, dtype=torch.bool))


def test_structure_of_a_mask_by_hand():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0] = mask[1, :2] = True  # 8 of 24 kept: a row has 2 on average
    rows, columns = mask_structure(mask)
    p = 1 / 3
    assert rows == pytest.approx(((16 + 0 + 4 + 4) / 4) / (6 * p * (1 - p) * 18 / 23)) and columns == pytest.approx(((2 * (2 - 4 / 3) ** 2 + 4 * (1 - 4 / 3) ** 2) / 6) / (4 * p * (1 - p) * 20 / 23))


@pytest.mark.parametrize("call, message", [
    (lambda: removal_error(w, g[:2]), "gradient: got shape"), (lambda: removal_error(w * float("nan"), g), "weight: got 40 NaN"), (lambda: removal_error(w, g * float("inf")), "gradient: got 40 NaN or infinite"),
    (lambda: removal_error(w[0], g[0]), "weight: got torch.float32 of shape"), (lambda: gblm(w, norm[:3], G), "norm: got shape"), (lambda: gblm(w, norm, G, alpha=-1), "alpha: got -1"),
    (lambda: dpruner(w, -G, g, F), "general, fisher: got 40 and 0 negative"), (lambda: dpruner(w, G, g, F, penalty=-.1), "penalty: got -0.1"), (lambda: dpruner(w, G, g, F, rule="half"), "rule: got 'half'"),
    (lambda: zeroth_order(network(), [], loss), "batches: got none"), (lambda: zeroth_order(network(), batches(), loss, scale=0), "scale: got 0"), (lambda: zeroth_order(network(), batches(), loss, probes=0), "probes: got 0"),
    (lambda: zeroth_order(network(), batches(), lambda n, b: loss(n, b) * float("nan")), "loss: got nan"), (lambda: ecoflap_shares({}, {}), "weights: got none"),
    (lambda: ecoflap_shares(dict(a=1.), dict(a=(3,)), 1.), "sparsity: got 1.0"), (lambda: ecoflap_shares(dict(a=1.), dict(a=(3,)), .5, .4), "cap: got 0.4"), (lambda: ecoflap_shares(dict(a=-1.), dict(a=(3,))), "importances: got"),
    (lambda: ecoflap_shares(dict(a=1.), dict(b=(3,))), "importances, groups: got 1 and 1 names"), (lambda: mask_structure(w), "mask: got torch.float32")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_dual_scores_from_two_sets_of_batches_and_what_they_cost():
    from whatmatters.sparsity.gradients import dpruner_scores
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    scores = dpruner_scores(model, [torch.randn(20, 6), torch.randn(20, 6)], batches(1), loss, rule="removal", penalty=1.)
    assert len(calls) == 2 + 2 * 16 and all(s.shape == weights_of(model)[k].matrix.shape and (s >= 0).all() for k, s in scores.items())
    with pytest.raises(ValueError, match="weights: got the grouped convolution 0.weight"): dpruner_scores(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)).eval(), [torch.randn(9, 4, 8)], [torch.randn(2, 4, 8)], lambda n, b: n(b).sum())
    with pytest.raises(ValueError, match="batches: got none"): dpruner_scores(model, [torch.randn(20, 6)], [], loss)


def test_gblm_divides_the_norm_of_an_expert_by_all_sequences():
    "Not by the tokens that came to the expert: its gradients are sums over all sequences too."
    from transformers import MixtralConfig, MixtralForCausalLM
    from whatmatters.core.calibration import calibrate, gradients
    from whatmatters.sparsity.weights import score_weights
    torch.manual_seed(0)
    network = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)).eval()
    batches = list(torch.randint(64, (6, 10)).split(2))
    found, s, g = score_weights(network, "gblm", batches), calibrate(network, batches), gradients(network, batches)
    for name, w in weights_of(network).items():
        assert torch.allclose(found[name], w.matrix.abs() * (s[name].norm / 6 ** .5 + 100 * g[name].sqrt()), rtol=1e-5)
