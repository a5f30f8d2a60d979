"Single weights: scores against their definitions, masks against brute force, and what is refused leaves the network as it was."
import copy
import json
import warnings
from pathlib import Path
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from whatmatters.core.calibration import weights_of
from whatmatters.core.keep import count_of, top
from whatmatters.core.values import seeded
from whatmatters.sparsity import weights as W
from whatmatters.sparsity.weights import Contributions, Score, contributions, dimap, lamp, prune, relative_importance, ria, score_weights, semi_structured, wanda

SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64)
IDS = torch.randint(0, 64, (4, 10), generator=seeded(1))


def model(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


def llama(**more): return model(LlamaForCausalLM, LlamaConfig(**SIZES, **more))
def gpt2(): return model(GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64))
def mixtral(): return model(MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=3))


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()


X, Y = torch.randn(20, 12, generator=seeded(2)), torch.randint(0, 4, (20,), generator=seeded(3))
CLASSES = lambda network, batch: nn.functional.cross_entropy(network(batch[0]), batch[1])
def same(a, b): return all(p.equal(q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_lamp_by_definition_and_its_traps():
    for w in (torch.randn(5, 8, generator=seeded(0)), torch.randn(5, 8, generator=seeded(1)).round(), torch.ones(3, 3)):
        flat = w.flatten().double()
        order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i].item()), i))
        expected = torch.zeros_like(flat)
        for place, i in enumerate(order):
            total = sum(flat[j].item() ** 2 for j in order[:place + 1])
            expected[i] = flat[i] ** 2 / total if total else 0
        assert torch.allclose(lamp(w).flatten().double(), expected, atol=1e-6)
        assert lamp(w).max() == 1
    w = torch.randn(50, 40, generator=seeded(2))
    assert torch.allclose(lamp(3e-24 * w), lamp(w), atol=1e-6) and torch.allclose(lamp(-1e25 * w), lamp(w), atol=1e-6)
    assert not lamp(torch.zeros(3, 4)).any() and lamp(torch.zeros(0, 4)).shape == (0, 4)
    assert lamp(w.bfloat16()).dtype == torch.float32 and lamp(w.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="weight: got 1 NaN"): lamp(torch.tensor([1., float("nan")]))
    direct = top({"a": lamp(w), "b": lamp(100 * w[:5])}, k=2, per="model")
    assert direct["a"].sum() == direct["b"].sum() == 1 # one weight each


def test_dimap_between_lamp_and_global_magnitude():
    tensors = {n: torch.randn(s, generator=seeded(i)) * 10. ** -i for i, (n, s) in enumerate({"a": (4, 4), "b": (3, 8), "c": (6, 2)}.items())}
    by_group = dimap(tensors, {"a": "x", "b": "y", "c": "x"})
    joint = lamp(torch.cat([tensors["a"].flatten(), tensors["c"].flatten()]))
    assert by_group["a"].flatten().equal(joint[:16]) and by_group["c"].flatten().equal(joint[16:]) and by_group["b"].equal(lamp(tensors["b"]))
    for k in (1, 7, 30): assert all(m.equal(n) for m, n in zip(top(dimap(tensors, dict.fromkeys(tensors, 0)), k=k, per="model").values(), top({n: t.abs() for n, t in tensors.items()}, k=k, per="model").values()))
    with pytest.raises(ValueError, match="modules: got groups of 1"): dimap(tensors, {"a": 0})


@pytest.mark.parametrize("sparsity", [0, .3, .5, .75])
def test_wanda_rows_by_brute_force(sparsity):
    network, before = mlp(), mlp()
    report = prune(network, "wanda", sparsity, [X[:7], X[7:]])
    inputs = {"0.weight": X, "2.weight": before[:2](X), "4.weight": before[:4](X)}
    for name, mask in report.masks.items():
        w, norm = dict(before.named_parameters())[name], inputs[name].double().square().sum(0).sqrt()
        for i, row in enumerate(w.double().abs() * norm):
            order = sorted(range(len(row)), key=lambda j: (-row[j].item(), j))[:count_of(1 - sparsity, len(row))]
            assert mask[i].nonzero()[:, 0].tolist() == sorted(order)
        assert dict(network.named_parameters())[name].equal(torch.where(mask, w, 0.))
    if not sparsity: assert same(network, before)


def test_n_of_m_by_brute_force_and_blocks():
    network, before = mlp(), mlp()
    prune(network, "magnitude", pattern="2:4")
    w = before[0].weight
    for i in range(16):
        for g in range(3):
            order = sorted(range(4), key=lambda j: (-abs(w[i, 4 * g + j].item()), j))
            for j in range(4): assert (network[0].weight[i, 4 * g + j] == 0) == (j in order[2:])
    network = mlp()
    report = prune(network, "magnitude", pattern=(1, 4))
    assert report.removed == .75 and prune(mlp(), "magnitude", .75, pattern="1:4").removed == .75
    report = prune(mlp(), "magnitude", .5, pattern="4x4")
    for m in report.masks.values(): assert all(b.all() or not b.any() for rows in m.split(4) for b in rows.split(4, 1))
    assert report.removed == .5


def test_contributions_stream_and_do_not_depend_on_batches():
    w, x = torch.randn(5, 7, generator=seeded(4)), torch.randn(30, 7, generator=seeded(5)).relu()
    w[2], x[3] = 0, 0
    c = (w * x[:, None]).abs()
    c = c / c.sum(2, keepdim=True).clamp_min(1e-30)
    whole, parts = Contributions(w).add(x), Contributions(w)
    for piece in x.split(4): parts.add(piece)
    for found in (whole, parts):
        assert torch.allclose(found.mean, c.mean(0), atol=1e-6) and torch.allclose(found.spread, c.std(0, correction=0), atol=1e-3)
    assert torch.allclose(relative_importance(w, x, .5), c.mean(0) + .5 * c.std(0, correction=0), atol=1e-3)
    assert not whole.mean[2].any() and whole.mean.isfinite().all()
    network = cnn()
    images = torch.randn(3, 2, 6, 6, generator=seeded(6))
    found = contributions(network, [images[:1], images[1:]])
    patches = nn.functional.unfold(network[:2](images), 3).mT.flatten(0, 1)
    for g in range(2):
        mine = relative_importance(network[2].weight.flatten(1)[4 * g:4 * g + 4], patches[:, 36 * g:36 * g + 36])
        assert torch.allclose(found["2.weight"].mean[4 * g:4 * g + 4], mine, atol=1e-6)
    shared = contributions(llama(), [IDS])
    assert torch.allclose(shared["model.layers.0.self_attn.v_proj.weight"].mean.sum(1), torch.ones(8), atol=1e-4) # heard although q_proj has the same input
    with pytest.raises(ValueError, match="weight: got shape"): Contributions(torch.ones(3))
    with pytest.raises(ValueError, match="x: got shape .0, 7."): relative_importance(w, x[:0])


def test_scores_of_gradients():
    network = mlp()
    found = {name: score_weights(network, name, [(X, Y)], loss=CLASSES) for name in ("snip", "taylor", "fisher")}
    w, each = network[2].weight, []
    for x, y in zip(X, Y): each.append(torch.autograd.grad(CLASSES(network, (x[None], y[None])), w)[0])
    each = torch.stack(each)
    for name, expected in (("snip", (w * each.sum(0)).abs()), ("taylor", w.abs() * each.abs().sum(0)), ("fisher", w ** 2 * each.square().sum(0) / 2)):
        assert torch.allclose(found[name]["2.weight"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [llama, gpt2, mixtral, lambda: llama(tie_word_embeddings=True)])
@pytest.mark.parametrize("score", ["magnitude", "lamp", "wanda", "ria", "relative_importance", "fisher", "random"])
def test_transformers(make, score):
    network = make()
    before = copy.deepcopy(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # an expert may get no token of so few
        report = prune(network, score, .5, [dict(input_ids=IDS)])
    assert abs(report.removed - .5) < .01 and "parameters" in report.coverage
    assert network.get_input_embeddings().weight.equal(before.get_input_embeddings().weight)
    if network.config.tie_word_embeddings: assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    for name, w in weights_of(network).items(): assert w.matrix.equal(torch.where(report.masks[name], weights_of(before)[name].matrix, 0.))
    if make is mixtral: assert any("[2]" in n for n in report.masks)
    assert network(IDS).logits.isfinite().all()


def test_bfloat16_convolutions_and_tables():
    network = llama().bfloat16()
    assert prune(network, "wanda", .5, [IDS]).removed == .5 and network.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    images = torch.randn(3, 2, 6, 6, generator=seeded(6))
    for score in ("wanda", "ria", "relative_importance"): assert abs(prune(cnn(), score, .5, [images]).removed - .5) < .05
    report = prune(cnn(), "magnitude", .5, allocation={"0.weight": 1., "2.weight": .5, "5.weight": .25})
    assert report.sparsity == {"0.weight": 0, "2.weight": .5, "5.weight": .75}
    assert "5.weight" in report._repr_html_() and "3 weight matrices" in repr(report)
    own = prune(mlp(), lambda w, s, g: -w.matrix, .5)
    assert all((mlp().state_dict()[n][m] <= mlp().state_dict()[n].flatten().sort().values[m.sum()]).all() for n, m in own.masks.items()) # the lowest are kept
    assert prune(mlp(), Score(lambda w, s, g: s.norm.expand_as(w.matrix), ("norm",)), .5, X).removed == .5 # a tensor is one batch
    scores = {n: torch.rand(w.matrix.shape) for n, w in weights_of(mlp()).items()}
    report = prune(mlp(), scores, .25, allocation="global")
    assert all(m.equal(n) for m, n in zip(report.masks.values(), top(scores, ratio=.75, per="model").values()))


def test_one_forward_pass_per_batch_and_one_backward_pass_per_example():
    network, calls = mlp(), []
    network.register_forward_hook(lambda *a: calls.append(len(a[1][0])))
    for score, expected in (("magnitude", []), ("wanda", [10, 10]), ("relative_importance", [10, 10]), ("fisher", [1] * 20)):
        calls.clear()
        score_weights(network, score, [(X[:10], Y[:10]), (X[10:], Y[10:])] if score == "fisher" else [X[:10], X[10:]], loss=CLASSES)
        assert calls == expected, score


class Sick(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4)
    def forward(self, x): return self.second(self.first(x).log() * float("nan"))


BAD = [(dict(sparsity=s), r"sparsity: got") for s in (-.1, 1, 1., 1.5, float("nan"), "half", True)] + [
    (dict(pattern="2:5"), "pattern: got 2:5 for 0.weight, which has 12 inputs"), (dict(pattern="5:4"), "pattern: got '5:4'"), (dict(pattern="24"), "pattern: got '24'"), (dict(pattern=(0, 4)), "pattern: got"),
    (dict(pattern="3x4"), "pattern: got 3x4 for 0.weight"), (dict(pattern="2:4", sparsity=.6), "sparsity: got 0.6; want 0.5 or None"), (dict(pattern="2:4", allocation="erk"), "allocation: got 'erk'"),
    (dict(score="wanda"), "batches: got none; want calibration batches, which the score wanda needs"), (dict(score="wanda", batches=[]), "batches: got none"), (dict(score="fisher"), "batches: got none"),
    (dict(score="relative_importance", batches=[]), "batches: got none"), (dict(score="fisher", batches=[], loss=CLASSES), "batches: got none"), (dict(score="wanada"), "score: got 'wanada'; want one of magnitude"), (dict(score=3), "score: got 3"),
    (dict(score={"0.weight": torch.ones(16, 12)}), "score: got scores of 1 weights"), (dict(score=lambda w, s, g: w.matrix[:1]), "score: got scores of shape .1, 12. for 0.weight"),
    (dict(score=lambda w, s, g: w.matrix * float("nan")), "scores of 0.weight: got"), (dict(per="column"), "per: got 'column'"), (dict(per="model"), "per: got 'model'"), (dict(allocation="erks"), "allocation: got 'erks'; want one of uniform"),
    (dict(allocation={"0.weight": .5}), "allocation: got shares of 1"), (dict(sparsity=.999), "sparsity: got 0.999, which leaves nothing of 0.weight, 2.weight, 4.weight; want less"), (dict(weights={}), "weights: got none")]


@pytest.mark.parametrize("options, message", BAD, ids=range(len(BAD)))
def test_bad_input_leaves_the_network_as_it_was(options, message):
    network = mlp()
    with pytest.raises(ValueError, match=message): prune(network, **{"score": "magnitude", **options})
    assert same(network, mlp())


def test_more_bad_input():
    sick = Sick().eval()
    before = copy.deepcopy(sick)
    for score in ("wanda", "relative_importance"):
        with pytest.raises(ValueError, match="batches: got NaN or infinite activations at the input of second.weight"): prune(sick, score, .5, [X])
    assert same(sick, before)
    recurrent = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="weight_ih_l0 of a LSTM, for which there is no rule"): prune(recurrent, "magnitude", .5)
    channels_last = cnn().to(memory_format=torch.channels_last) # its matrix would be a copy, and nothing would be pruned
    before = copy.deepcopy(channels_last)
    try: assert abs(prune(channels_last, "magnitude", .5).removed - .5) < .01 and (channels_last[2].weight == 0).double().mean() == .5
    except ValueError as error: assert "memory format channels_last" in str(error) and same(channels_last, before)
    broken = mlp()
    with torch.no_grad(): broken[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="2.weight: got 1 NaN"): prune(broken, "magnitude", .5)
    with pytest.raises(ValueError, match="norm: got shape"): wanda(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="norm: got negative"): ria(torch.ones(2, 3), -torch.ones(3))
    with pytest.raises(ValueError, match="gradient: got shape"): W.snip(torch.ones(2, 3), torch.ones(3))


def test_ties_zero_rows_and_exact_counts():
    network = mlp()
    with torch.no_grad():
        for p in network.parameters(): p.fill_(1.)
    report = prune(network, "magnitude", .5)
    assert report.removed == .5 and all(m.flatten()[:m.numel() // 2].all() for m in report.masks.values()) # the first are kept, not none
    network = mlp()
    with torch.no_grad(): network[0].weight[3] = 0
    for score in ("ria", "wanda", "relative_importance", "lamp"):
        pruned = copy.deepcopy(network)
        assert not prune(pruned, score, .6, [X]).masks["0.weight"][3].any() and pruned[0].weight.isfinite().all()


def test_already_pruned():
    network = mlp()
    first = prune(network, "magnitude", .5)
    before = copy.deepcopy(network)
    for sparsity in (.3, .5):
        with pytest.raises(ValueError, match="network: got one already pruned to 50.0%; want a sparsity above that"): prune(network, "random", sparsity)
        with pytest.raises(ValueError, match="network: got one already pruned to 50.0%; want a sparsity above that"): prune(network, "wanda", sparsity, X, per="row") # some rows have less zeros than that, all together not
    assert same(network, before)
    for allocation in ("uniform", "global", "lamp"):
        more = copy.deepcopy(network)
        second = prune(more, "random", .75, allocation=allocation, generator=3)
        assert abs(second.removed - .75) < .01 and all(not (m & ~first.masks[n]).any() for n, m in second.masks.items()) # never resurrected
    assert prune(mlp(), "magnitude", 0).removed == 0
    emptied = prune(mlp(), "magnitude", .999, allow_empty=True)
    assert emptied.removed == 1


def test_held_in_training():
    network = mlp()
    optimiser = torch.optim.SGD(network.parameters(), .1, momentum=.9, weight_decay=.01)
    step = lambda: (optimiser.zero_grad(), CLASSES(network, (X, Y)).backward(), optimiser.step())
    step() # momentum from before would move a pruned weight
    report = prune(network, "magnitude", .7)
    before, hold = copy.deepcopy(network), report.hold()
    for _ in range(3):
        step()
        for n, m in report.masks.items():
            p = dict(network.named_parameters())[n]
            assert not p[~m].any() and not p.grad[~m].any()
    assert not network[0].weight.equal(before[0].weight)
    hold.remove()
    step()
    assert any(dict(network.named_parameters())[n][~m].any() for n, m in report.masks.items())
    report.apply()
    assert not any(dict(network.named_parameters())[n][~m].any() for n, m in report.masks.items())
    experts = mixtral()
    report = prune(experts, "magnitude", .5)
    with report.hold():
        optimiser = torch.optim.AdamW(experts.parameters(), .1)
        experts(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        assert not any(w.matrix[~report.masks[n]].any() for n, w in weights_of(experts).items())


def test_semi_structured():
    network = nn.Sequential(nn.Linear(64, 64)).half()
    report = prune(network, "magnitude", pattern="2:4")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="network: got 0.weight on cpu; want weights on CUDA"): semi_structured(network, report.masks)
    dense = {"0.weight": torch.ones(64, 64, dtype=torch.bool)}
    with pytest.raises(ValueError, match="masks: got 0.weight, of which more than 2 of 4"): semi_structured(network, dense)
    with pytest.raises(ValueError, match="masks: got none"): semi_structured(network, {})
    with pytest.raises(ValueError, match="masks: got one for 0.bias"): semi_structured(network, {"0.bias": dense["0.weight"]})
    with pytest.raises(ValueError, match=r"masks: got one for 0.weight \(Conv2d\)"): semi_structured(nn.Sequential(nn.Conv2d(1, 4, 2)), {"0.weight": torch.ones(4, 4, dtype=torch.bool)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 kernels run on CUDA only")
def test_semi_structured_on_a_gpu():
    network = nn.Sequential(nn.Linear(128, 128)).half().cuda()
    report = prune(network, "magnitude", pattern="2:4")
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    expected = network(x)
    assert torch.allclose(semi_structured(network, report.masks)(x), expected, atol=1e-2)


def test_peer_torch_prune():
    from torch.nn.utils import prune as peer
    network, other = mlp(), mlp()
    prune(network, "magnitude", .4, allocation="global")
    peer.global_unstructured([(m, "weight") for m in other if isinstance(m, nn.Linear)], peer.L1Unstructured, amount=count_of(.4, sum(p.numel() for n, p in network.named_parameters() if n.endswith("weight"))))
    for mine, theirs in zip(network, other):
        if isinstance(mine, nn.Linear): assert mine.weight.equal(theirs.weight)


def test_sequential_recalibration_sees_pruned_inputs():
    network, plain = llama(), llama()
    calls = []
    network.model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    report = prune(network, "wanda", .5, [IDS], sequential=True)
    assert len(calls) <= 3 and list(report.masks) == list(weights_of(network)) # the entry, statistics, and once more when pruned
    once = prune(plain, "wanda", .5, [IDS])
    first, later = ([n for n in report.masks if f"layers.{i}." in n] for i in (0, 1))
    assert all(report.masks[n].equal(once.masks[n]) for n in first) and any(not report.masks[n].equal(once.masks[n]) for n in later)
    half = llama() # the second block by the definition: statistics of a network whose first block is pruned
    prune(half, "wanda", .5, [IDS], weights={n: weights_of(half)[n] for n in first})
    expected = prune(half, "wanda", .5, [IDS], weights={n: weights_of(half)[n] for n in later})
    assert all(report.masks[n].equal(expected.masks[n]) for n in later)
    untouched = llama()
    for options, message in ((dict(score="magnitude"), "sequential: got True"), (dict(allocation="global"), "sequential: got True"), (dict(score="fisher"), "sequential: got True"), (dict(sparsity=.999), "which leaves nothing of"), (dict(batches=[]), "batches: got none")):
        with pytest.raises(ValueError, match=message): prune(untouched, **{"score": "wanda", "sparsity": .5, "batches": [IDS], "sequential": True, **options})
    assert same(untouched, llama())


def test_lamp_on_a_cifar_network(real, tmp_path):
    from whatmatters.core import experiments, ledger
    data = Path(real("cifar10_lossless4k"))
    given = dict(model=str(data.parent.parent/"models"/"resnet_cifar10"), data=str(data), rows=20, sparsities=[.5], high=.5)
    path, _ = experiments.run("lamp", "smoke", given, tmp_path, engine="warm")
    assert len(ledger.read_run(path).claims) == 5


def test_dimap_on_a_swin_transformer_from_a_folder(tmp_path):
    from transformers import SwinConfig, SwinForImageClassification
    from whatmatters.core import experiments, ledger
    model(SwinForImageClassification, SwinConfig(image_size=8, patch_size=2, num_channels=1, embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2, num_labels=3)).save_pretrained(tmp_path/"swin")
    (tmp_path/"swin"/"preprocessor_config.json").write_text(json.dumps(dict(image_processor_type="ViTImageProcessor", do_normalize=True, image_mean=[.5], image_std=[.5])))
    path, _ = experiments.run("dimap", "smoke", dict(model=str(tmp_path/"swin"), rows=30), tmp_path/"runs", engine="warm")
    assert {c["says"].split(":")[0] for c in ledger.read_run(path).claims} == {"Swin"}
