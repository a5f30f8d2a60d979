"Activation sparsity: the definition by brute force, models of several kinds, padding, counts of model calls, laws, and what is refused."
import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from whatmatters.core.hooks import module_of
from whatmatters.sparsity.activations import CRReLU, activation_entropy, cett, dead_units, error_curves, feed_forwards, fit_power_law, neuron_magnitudes, ppl_sparsity, threshold_for, truncated

SMALL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, hidden_act="relu")).eval()
    with torch.no_grad():
        for p in network.parameters(): p.mul_(4)  # so that the feed-forward parts matter
    return network


@pytest.fixture
def ids(): return torch.randint(1, 50, (6, 12), generator=torch.Generator().manual_seed(1))


def hooks_of(network): return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules())


@pytest.mark.parametrize("n, d, out, relu", [(1, 1, 1, False), (3, 7, 5, False), (8, 5, 2, True), (2, 20, 8, True)])
def test_threshold_is_where_the_error_passes(n, d, out, relu):
    g = torch.Generator().manual_seed(n)
    a, w = torch.randn(n, d, generator=g), torch.randn(out, d, generator=g)
    a = a.relu() if relu else a
    every = [0., *sorted(set(neuron_magnitudes(a, w).flatten().tolist()) - {0.})]
    brute = []
    for t in every:
        tail = [sum((a[i, j] * w[:, j] for j in range(d) if abs(a[i, j]) * w[:, j].norm() <= t + 1e-7), torch.zeros(out)) for i in range(n)]
        brute.append(np.mean([float(tail[i].norm() / (a[i] @ w.T).norm()) if a[i].any() else 0. for i in range(n)]))
    for t, b in zip(every, brute): assert float(cett(a, w, t + 1e-7).mean()) == pytest.approx(b, abs=1e-5)
    for error in (0., .1, .4, .8):
        at = int(np.abs(np.array(every) - threshold_for(a, w, error)).argmin())
        assert brute[at] <= error + 1e-5 and (at + 1 == len(every) or brute[at + 1] > error - 1e-5)


def test_curve_is_the_definition_whatever_the_batches(llama, ids):
    curves, apart = error_curves(llama, ids), error_curves(llama, [ids[:1], ids[1:3], ids[3:]])
    for name, layer in feed_forwards(llama).items():
        seen = []
        handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad(): llama(ids)
        handle.remove()
        for error in (.02, .2, .6):
            t = curves[name].threshold(error)
            assert threshold_for(seen[0], layer.weight, error) == pytest.approx(t, rel=.05)
            assert apart[name].threshold(error) == pytest.approx(t, rel=.05)
            at = int((curves[name].thresholds == t).nonzero())
            assert float(curves[name].errors[at]) == pytest.approx(float(cett(seen[0], layer.weight.detach(), t).mean()), abs=1e-5)
            assert float(curves[name].kept[at]) == pytest.approx(float((neuron_magnitudes(seen[0], layer.weight) > t).float().mean()), abs=1e-5)


@pytest.mark.parametrize("make", [lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32)), lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))])
def test_truncation_by_hand(make, ids):
    "Zeroing in a copy of the layer's input, for a Conv1D and a Linear with bias."
    network = make().eval()
    name, layer = list(feed_forwards(network).items())[-1]
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    assert weight.shape == (16, 24) or weight.shape == (16, 64)
    seen = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        network(ids)
        t = neuron_magnitudes(seen[0][0].flatten(0, 1), weight).median()
        with truncated(network, {name: float(t)}) as kept: network(ids)
    handle.remove()
    x = seen[0][0] * (seen[0][0].abs() * weight.norm(dim=0) > t)
    torch.testing.assert_close(seen[1][1], F.linear(x, weight, layer.bias))
    assert kept.mean == pytest.approx(.5, abs=.01) and hooks_of(network) == 0


def test_padding_changes_nothing(llama, ids):
    left = torch.cat([torch.zeros(6, 4, dtype=torch.long), ids], 1)
    padded = dict(input_ids=left, attention_mask=torch.cat([torch.zeros(6, 4, dtype=torch.long), torch.ones_like(ids)], 1))
    one, other = ppl_sparsity(llama, ids, 5.), ppl_sparsity(llama, padded, 5.)
    assert other.loss == pytest.approx(one.loss, rel=1e-4) and other.sparsity == pytest.approx(one.sparsity, abs=.01) and other.cett == pytest.approx(one.cett, abs=.01)


def test_what_the_search_promises(llama, ids):
    before, calls = {k: v.clone() for k, v in llama.state_dict().items()}, []
    handle = llama.register_forward_pre_hook(lambda *_: calls.append(1))
    found = [ppl_sparsity(llama, [ids[:3], ids[3:]], p) for p in (.5, 5., 50.)]
    handle.remove()
    assert len(calls) == 3 * 2 * 11  # loss and curves, and log2(1000) steps, on two batches
    assert [f.increase <= p for f, p in zip(found, (.5, 5., 50.))] == [True] * 3
    assert found[0].sparsity < found[1].sparsity < found[2].sparsity and found[0].cett < found[2].cett
    for f in found:
        assert f.sparsity == pytest.approx(1 - np.mean(list(f.kept.values())))
        with torch.no_grad(), truncated(llama, f.thresholds) as kept: loss = F.cross_entropy(llama(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert 100 * np.expm1(float(loss) - f.loss) == pytest.approx(f.increase, abs=1e-2) and kept.ratio == f.kept
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items()) and hooks_of(llama) == 0


def test_an_untrained_network_needs_none():
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    assert ppl_sparsity(network, torch.randint(50, (4, 10))).sparsity > .9


def test_rules_of_comparison(llama, ids):
    with torch.no_grad():
        whole = llama(ids).logits
        with truncated(llama, ratio=.25) as kept: llama(ids)
        assert set(kept.ratio.values()) == {.25}
        with truncated(llama, ratio=1.): torch.testing.assert_close(llama(ids).logits, whole)
        with truncated(llama, 0., by="activation") as natural: assert torch.equal(llama(ids).logits, whole)
        assert .2 < natural.mean < .8  # ReLU
        with truncated(llama, .5, layers=["model.layers.1.mlp.down_proj"]) as kept: llama(ids)
        assert list(kept.ratio) == ["model.layers.1.mlp.down_proj"]
        with truncated(llama, .01): llama.generate(ids[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_single_precision_where_the_model_has_less(llama, ids):
    import copy
    half, whole = ppl_sparsity(copy.deepcopy(llama).bfloat16(), ids, 5.), ppl_sparsity(llama, ids, 5.)
    assert half.sparsity == pytest.approx(whole.sparsity, abs=.05)
    torch.manual_seed(0)
    a, w = torch.randn(4, 9).bfloat16(), torch.randn(3, 9).bfloat16()
    assert cett(a, w, .3).dtype == torch.float32 and cett(a.double(), w.double(), .3).dtype == torch.float64


def test_fast_path_and_plain_chains():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.), 2).eval()
    assert list(feed_forwards(encoder)) == ["layers.0.linear2", "layers.1.linear2"]
    assert min(c.tokens for c in error_curves(encoder, torch.randn(2, 5, 16)).values()) == 10
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        def forward(self, x):
            for layer in self.layers: x = layer(x).relu()
            return x
    assert list(feed_forwards(Stack())) == ["layers.1", "layers.2"]


@pytest.mark.parametrize("given, says", [(dict(p=0.), "p: got 0.0"), (dict(tolerance=0.), "tolerance: got"), (dict(batches=[]), "batches: got none"), (dict(layers=["lm"]), "a module of the network"),
                                         (dict(layers=["model.norm"]), "layers: got model.norm"), (dict(loss=lambda n, b: n(b).logits.mean()), "one loss for each"), (dict(loss=lambda n, b: torch.zeros(3)), "no token in"), (dict(tokens=0), "tokens: got 0")])
def test_bad_input(llama, ids, given, says):
    with pytest.raises(ValueError, match=says): ppl_sparsity(**{**dict(network=llama, batches=ids), **given})
    assert hooks_of(llama) == 0


def test_blocks_that_do_not_fit_are_named():
    class Block(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), last
    class Net(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.blocks = nn.ModuleList(Block(last()) for _ in range(2))
    assert list(feed_forwards(Net(lambda: nn.Linear(32, 8)))) == ["blocks.0.down", "blocks.1.down"]
    with pytest.raises(ValueError, match="blocks.0, whose last linear layer down maps 20 to 8"): feed_forwards(Net(lambda: nn.Linear(20, 8)))
    with pytest.raises(ValueError, match="blocks.0 with 1 linear layers"): feed_forwards(Net(lambda: nn.Conv1d(32, 8, 1)))


def test_nan_names_the_layer(llama, ids):
    import copy
    broken = copy.deepcopy(llama)
    with torch.no_grad(): module_of(broken, "model.layers.1.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="activations of model.layers.1.mlp.down_proj"): ppl_sparsity(broken, ids)


@pytest.mark.parametrize("kind, law", [("convergent", lambda x: .4 - .2 * x ** -.5), ("logspace", lambda x: np.exp(-.5 * x ** .6 - 1) + .07)])
def test_laws_are_found_again(kind, law):
    x = np.geomspace(.5, 200, 20)
    fit = fit_power_law(x, law(x), kind)
    assert fit.error < 1e-4 and fit.limit == pytest.approx(.4 if kind == "convergent" else .07, abs=5e-3) and np.allclose(fit(x), law(x), atol=1e-3)
    assert fit_power_law(x, x * 0 + .3, kind).error < 1e-6  # nothing to explain


def test_crrelu():
    f = CRReLU(.3).double()
    x = torch.linspace(-3, 3, 13, dtype=torch.double, requires_grad=True) + .01
    assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradcheck(lambda e: x.detach().relu() + e * x.detach() * torch.exp(-x.detach() ** 2 / 2), (f.eps,))
    assert torch.equal(CRReLU(0.)(x), x.relu()) and [n for n, _ in f.named_parameters()] == ["eps"]


def test_entropy_of_histograms():
    a = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = activation_entropy(a, 10), [np.histogram(a[:, i].numpy(), 10)[0] / 500 for i in range(3)]
    torch.testing.assert_close(ours, torch.tensor([-sum(p * np.log(p) for p in share if p) for share in theirs]).float(), rtol=1e-2, atol=2e-2)  # an edge may fall on the other side
    assert not activation_entropy(torch.ones(4, 2)).any() and dead_units(torch.zeros(4, 2)).all()
    with pytest.raises(ValueError, match="least: got 2"): dead_units(a, 2)


def test_a_real_model():
    folder = SHARED/"models"/"stories260K"/"hf"
    if not folder.is_dir(): pytest.skip("no stories260K here")
    from transformers import AutoModelForCausalLM
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    ids = network.generate(torch.full((4, 1), 1), max_new_tokens=24, do_sample=True, pad_token_id=0)
    found = ppl_sparsity(network, ids)
    assert 0 < found.sparsity < .9 and found.increase <= 1 and len(found.kept) == network.config.num_hidden_layers
