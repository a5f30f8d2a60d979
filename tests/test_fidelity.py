"Subset Fidelity against least squares over actual outputs; compensation, unlearning and the two stages."
import copy
import math
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from whatmatters.core.keep import top
from whatmatters.core.values import seeded
from whatmatters.sparsity import fidelity as F, structure as S

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, initializer_range=.3, pad_token_id=0)
IDS = torch.randint(3, 96, (6, 12), generator=seeded(0))


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def outputs_of(network, name, batch):
    "What a module reads and writes, without its bias."
    seen, module = [], network.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out.detach() - (0 if m.bias is None else m.bias.detach().view(-1, *[1] * (out.ndim - 2)) if isinstance(m, nn.Conv2d) else m.bias.detach()))))
    with torch.no_grad(): network(batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("compensated", [True, False])
def test_fidelity_equals_least_squares_over_outputs(compensated):
    g = seeded(1)
    a, w = torch.randn(60, 7, generator=g).double() @ torch.randn(7, 7, generator=g).double(), torch.randn(3, 7, generator=g).double()
    a[:, 3] = 0  # a dead unit
    index = torch.tensor([[0, 6], [1, 2], [3, 4]])
    m, parts = F.gram(w, a.T @ a / 60, index), torch.stack([(a[:, i] @ w[:, i].T).flatten() for i in index], 1)
    kept = torch.tensor([[bool(n >> b & 1) for b in range(3)] for n in range(8)])
    y = parts.sum(1)
    for k, f in zip(kept, F.subset_fidelity(m, kept, compensated)):
        said = parts[:, k] @ (torch.linalg.lstsq(parts[:, k], y[:, None]).solution[:, 0] if compensated and k.any() else torch.ones(int(k.sum()), dtype=torch.double))
        assert float(f) == pytest.approx(float(1 - (y - said).square().sum() / y.square().sum()), abs=1e-9)
    torch.testing.assert_close(F.singleton_fidelity(m), F.subset_fidelity(m, torch.eye(3).bool()))


def test_more_units_never_say_less_and_all_say_everything():
    g = seeded(2)
    a = torch.randn(200, 8, generator=g).double()
    m, kept = F.gram(torch.randn(5, 8, generator=g).double(), a.T @ a), torch.zeros(9, 8, dtype=torch.bool)
    for i in range(8): kept[i + 1:, i] = True
    found = F.subset_fidelity(m, kept)
    assert (found.diff() >= -1e-12).all() and float(found[0]) == 0 and float(found[-1]) == pytest.approx(1)


def test_uncorrelated_units_are_best_chosen_one_by_one():
    m = torch.diag(torch.rand(10, generator=seeded(3)).double())
    for k in (1, 4, 9): assert torch.equal(F.best_subset(m, k), top(F.singleton_fidelity(m), k=k, per="tensor"))
    twins = torch.ones(4, 4).double() * .99 + torch.eye(4).double() * .01
    m = torch.block_diag(twins, torch.eye(2).double() * .5)  # four copies, and two voices of their own
    assert int(F.best_subset(m, 3)[:4].sum()) == 1 and int(top(F.singleton_fidelity(m), k=3, per="tensor")[:4].sum()) == 3


@pytest.mark.parametrize("how", ["scale", "matrix"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "heads"])
def test_compensation_reaches_the_fidelity_that_was_promised(name, how):
    torch.manual_seed(0)
    network, x, reader = {"mlp": (nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)), torch.randn(300, 6), "2"),
                          "cnn": (nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten(), nn.Linear(12, 3)), torch.randn(50, 2, 6, 6), "2"),
                          "heads": (llama(), IDS, "model.layers.0.self_attn.o_proj")}[name]
    network.eval()
    group = S.Units([g for g in S.units(network, x) if g.name == reader], {})
    kept = {reader: top(F.fidelities(network, group, [x])[reader], k=max(1, len(group[0]) // 2), per="tensor")}
    m, (_, before) = F.grams(network, group, [x])[reader], outputs_of(network, reader, x)
    F.compensate(network, group, kept, [x], how)
    S.shrink(network, group, kept, x)
    _, after = outputs_of(network, reader, x)
    error, promised = float((after - before).square().sum() / before.square().sum()), 1 - float(F.subset_fidelity(m, kept[reader]))
    assert error == pytest.approx(promised, rel=1e-3, abs=1e-6) if how == "scale" else error < promised + 1e-6


def test_compensation_in_bfloat16_and_of_a_network_stored_transposed():
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)).eval().bfloat16()
    groups = S.units(network, IDS)
    kept = {n: top(s, ratio=.5, per="tensor") for n, s in F.fidelities(network, groups, [IDS]).items()}
    F.compensate(network, groups, kept, [IDS])
    S.shrink(network, groups, kept, IDS)
    assert network(IDS).logits.isfinite().all() and network.transformer.h[0].mlp.c_proj.weight.shape == (64, 32)


def test_a_planted_class_is_unlearned_and_passes_are_counted():
    g = seeded(4)
    x = torch.cat([torch.cat([torch.rand(40, 4, generator=g), torch.zeros(40, 4)], 1), torch.cat([torch.zeros(40, 4), torch.rand(40, 4, generator=g)], 1)])
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)).eval()
    network[0].weight.data = torch.eye(8)
    groups, calls = S.units(network, x), []
    handle = network.register_forward_hook(lambda *a: calls.append(1))
    kept = F.unlearn(network, groups, [x[:20], x[20:40]], [x[40:]], ratio=.5)
    handle.remove()
    assert kept["2"].tolist() == [False] * 4 + [True] * 4 and len(calls) == 3
    assert F.unlearn(network, groups, [x[:40]], [x[40:]], ratio=.99)["2"].sum() == 1  # never all


def test_budget_of_attention():
    assert F.attention_budget(32, 2, 1, 0.) == (0, 0.)
    for s in (.25, .375, .5):
        for ffn, attn in ((300, 100), (100, 100), (100, 300)):
            try: n, rate = F.attention_budget(12, ffn, attn, s, 1.5, 7)
            except ValueError as error:
                assert "would have to go" in str(error)
                continue
            assert n * attn + 12 * ffn * rate == pytest.approx(s * 12 * (ffn + attn + 7)) and 0 <= rate < 1 and n <= math.floor(12 * s ** (ffn / attn / 1.5) + .5)
    assert [F.attention_budget(12, 200, 100, .5, a)[0] for a in (0, .5, 1, 2, 3)] == [0, 1, 3, 6, 8]


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_two_stages_reach_the_sparsity_and_save(kind, tmp_path):
    torch.manual_seed(0)
    network = {"llama": llama, "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)).eval(), "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)).eval()}[kind]()
    blocks = lambda n: sum(p.numel() for _, b in F.chain_of(n) for p in b.parameters())
    before, calls = blocks(network), []
    handle = network.register_forward_hook(lambda *a: calls.append(1))
    went = F.two_stage(network, [IDS], .5)
    handle.remove()
    assert 1 - blocks(network) / before == pytest.approx(.5, abs=.02) and len(went.attention) == len(went.losses) >= 1
    assert sum(isinstance(m, S.NoAttention) for m in network.modules()) == len(went.attention)
    assert len(calls) == 4 + sum(4 - i for i in range(len(went.attention)))  # units, the loss before, masked, shrunk; each trial of the second stage; scores are heard in the backbone
    S.save(network, tmp_path/"model")
    again = S.load(tmp_path/"model")
    assert torch.equal(again.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), network.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_the_second_stage_is_greedy():
    network = llama()
    reference = copy.deepcopy(network)
    went = F.two_stage(network, [IDS], .5, judge=IDS)
    groups = S.units(reference, IDS)
    S.shrink(reference, groups, {n: k for n, k in went.kept.items()}, IDS)
    for gone, loss in zip(went.attention, went.losses):
        tried = {}
        for i in range(4):
            if isinstance(reference.model.layers[i].self_attn, S.NoAttention): continue
            n = S.remove_attention(copy.deepcopy(reference), i)
            with torch.no_grad(): tried[i] = float(n(IDS, labels=IDS).loss)
        assert min(tried, key=tried.get) == gone and tried[gone] == pytest.approx(loss, rel=1e-5)
        S.remove_attention(reference, gone)


def test_bad_input_changes_nothing():
    network = llama()
    before, groups, m = copy.deepcopy(network.state_dict()), S.units(network, IDS), torch.eye(4).double()
    for call, message in ((lambda: F.gram(torch.ones(2, 3), torch.ones(2, 2)), "second: got shape"), (lambda: F.gram(torch.full((2, 2), torch.nan), torch.ones(2, 2)), "weight: got 4 NaN"),
                          (lambda: F.subset_fidelity(m, torch.ones(4)), "kept: got torch.float32"), (lambda: F.subset_fidelity(m * 0, torch.ones(4).bool()), "add up to nothing"), (lambda: F.best_subset(m, 5), "k: got 5"),
                          (lambda: F.compensate(network, groups, {"no": torch.ones(2).bool()}, [IDS]), "kept: got 'no'"), (lambda: F.compensate(network, groups, {}, [IDS], "magic"), "how: got 'magic'"),
                          (lambda: F.fidelities(network, groups, []), "batches: got none"), (lambda: F.unlearn(network, groups, [IDS], [IDS], 1.), "ratio: got 1.0"), (lambda: F.two_stage(network, [], .5), "batches: got none"),
                          (lambda: F.two_stage(network, [IDS], 1.), "sparsity: got 1.0"), (lambda: F.two_stage(network, [IDS], "half"), "sparsity: got 'half'"), (lambda: F.two_stage(network, [IDS], .9, alpha=0.), "would have to go"), (lambda: F.two_stage(network, [IDS], .5, loss=lambda n, b: n(b).logits.sum() * torch.nan), "judge: got a loss of nan"),
                          (lambda: F.two_stage(BertModel(BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})).eval(), [IDS], .3), "groups of feed-forward neurons|normalises")):
        with pytest.raises(ValueError, match=message): call()
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values()))
