"How much of each layer: budgets kept exactly, fixed points by another way."
import math
import numpy as np
import pytest
import torch
from whatmatters.core.keep import count_of, top
from whatmatters.core.values import seeded
from whatmatters.sparsity.allocation import ALLOCATIONS, erdos_renyi, global_shares, lamp_shares, outlier_ratios, owl, uniform, uniform_plus
from whatmatters.sparsity.weights import lamp

NETS = [{"a": (8, 3, 3, 3), "b": (16, 8, 3, 3), "c": (16, 16, 1, 1), "d": (10, 16)}, {"a": (100, 784), "b": (100, 100), "c": (10, 100)}, {"only": (7, 5)}, {str(i): (17 + i, 13) for i in range(9)}]
SPARSITIES = (0, .1, .5, .777, .9, .97)


def tensors(net): return {n: torch.randn(s, generator=seeded(i)) * 3. ** -i for i, (n, s) in enumerate(net.items())}
def counts(net, shares): return {n: shares[n] * math.prod(s) for n, s in net.items()}


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("net", NETS, ids=("cnn", "mlp", "one", "alike"))
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_budgets_are_met_exactly(name, net, sparsity):
    w = tensors(net)
    try: shares = ALLOCATIONS[name](w, {n: t.abs() for n, t in w.items()}, sparsity)
    except ValueError as error:
        assert name == "uniform_plus" and "sparsity: got" in str(error)
        return
    assert set(shares) == set(net) and all(0 <= s <= 1 for s in shares.values())
    found = counts(net, shares)
    if name != "uniform":
        assert all(abs(c - round(c)) < 1e-6 for c in found.values())
        assert round(sum(found.values())) == count_of(1 - sparsity, sum(math.prod(s) for s in net.values()))
        assert sum(int(top(w[n].abs(), ratio=shares[n], per="tensor").sum()) for n in net) == round(sum(found.values()))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_as_its_authors_remove_layers(sparsity):
    "Layers of the largest raw density become dense one round after the other (Evci et al. 2020), written anew with the whole loop."
    for net in NETS:
        size = {n: math.prod(s) for n, s in net.items()}
        raw, dense = {n: sum(s) / math.prod(s) for n, s in net.items()}, set()
        while True:
            rest = [n for n in net if n not in dense]
            if not rest: break
            epsilon = (count_of(1 - sparsity, sum(size.values())) - sum(size[n] for n in dense)) / sum(raw[n] * size[n] for n in rest)
            top_raw = max(raw[n] for n in rest)
            if top_raw * epsilon > 1: dense |= {n for n in rest if raw[n] == top_raw}
            else: break
        found = erdos_renyi(net, sparsity)
        for n in net: assert abs(found[n] * size[n] - (size[n] if n in dense else epsilon * raw[n] * size[n])) <= 1
    assert erdos_renyi(NETS[0], .5, power=0) == pytest.approx(uniform(NETS[0], .5), abs=.01)


def test_lamp_shares_are_those_of_its_scores_and_leave_no_layer_empty():
    for net in NETS:
        w = tensors(net)
        for sparsity in SPARSITIES:
            direct = top({n: lamp(t) for n, t in w.items()}, ratio=1 - sparsity, per="model")
            assert all(top(w[n].abs(), ratio=share, per="tensor").equal(direct[n]) for n, share in lamp_shares(w, sparsity).items())
    w = {"large": torch.ones(1000) * 100, "small": torch.ones(10)} # all tied: one score of 1 for each layer
    assert all(share > 0 for share in lamp_shares(w, 1 - 2 / 1010).values()) and global_shares(w, .5)["small"] == 0


def test_uniform_plus_exceptions():
    shares = uniform_plus(NETS[0], .8)
    assert shares["a"] == 1 and shares["d"] == pytest.approx(.2) and shares["b"] == pytest.approx(shares["c"], abs=.01)
    assert uniform_plus(NETS[1], .9)["a"] < .11 and uniform_plus(NETS[1], .9)["c"] == .2
    assert uniform_plus({"one": (3, 3, 3, 3)}, .5)["one"] == pytest.approx(.5, abs=.01)
    with pytest.raises(ValueError, match="sparsity: got 0.97; want at most"): uniform_plus({"a": (64, 3, 3, 3), "d": (10, 16)}, .97)


def test_owl():
    scores = {n: torch.rand(40, 40, generator=seeded(i)) for i, n in enumerate("abcd")}
    scores["c"][0, :8] = 1000
    ratios = outlier_ratios(scores)
    assert ratios == {"a": 0, "b": 0, "c": 8 / 1600, "d": 0}
    shares = owl(ratios, scores, .7)
    assert shares["c"] - shares["a"] == pytest.approx(.16, abs=1e-3) and np.mean(list(shares.values())) == pytest.approx(.3)
    grouped = outlier_ratios(scores, groups={"a": 0, "b": 0, "c": 1, "d": 1})
    assert grouped["c"] == grouped["d"] == 8 / 3200 and grouped["a"] == 0
    unequal = {"a": (10, 10), "b": (30, 30)}
    assert sum(counts(unequal, owl({"a": .1, "b": 0.}, unequal, .5)).values()) == 500


@pytest.mark.parametrize("call", [lambda: erdos_renyi({}, .5), lambda: uniform({"a": (2, 2)}, 1), lambda: global_shares({"a": torch.ones(3)}, -1), lambda: owl({"a": 0}, {"b": (2, 2)}, .5),
                                  lambda: owl({"a": 0}, {"a": (2, 2)}, .5, spread=2), lambda: lamp_shares({"a": torch.tensor([float("nan")])}, .5), lambda: outlier_ratios({"a": torch.tensor([float("inf")])})])
def test_bad_input(call):
    with pytest.raises(ValueError, match="got .*; want"): call()
