"Fewer bits: grids, GPTQ, low-rank repair, layers and tokens that matter, rotations and signs, against brute force and double precision."
import copy
import itertools
import math
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from whatmatters.core.calibration import calibrate, chain_of, weights_of
from whatmatters.core.values import seeded
from whatmatters.sparsity.binary import BinaryFactors, binarise, bits_per_weight, dual_svid, rank_for, signs
from whatmatters.sparsity.quantization import (Int8Linear, assign_bits, gptq, grid_of, layer_input_modification, lorc, lorc_bytes, pack, pack_int8, quantise, quantised_activations, quantised_bytes,
                                               round_to_nearest, token_importance, unpack, z_score_share)
from whatmatters.sparsity.reconstruction import output_error
from whatmatters.sparsity.rotation import hadamard, orthogonal, rotate, rsq

SIZES = dict(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64)


def llama(**more):
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SIZES, **more)).eval().requires_grad_(False)
    for p in network.parameters(): p.mul_(3) if p.ndim > 1 else p.add_(.3 * torch.randn(p.shape))
    return network


def drawn(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


IDS = torch.randint(0, 64, (6, 12), generator=seeded(1))
same = lambda network, before: all(torch.equal(p, before[n]) for n, p in network.state_dict().items())
state = lambda network: {n: p.clone() for n, p in network.state_dict().items()}


@pytest.mark.parametrize("bits, group, symmetric", list(itertools.product((2, 3, 4, 8), (None, 1, 5, 16), (False, True))))
def test_rounding_is_to_the_nearest_of_all_grid_values(bits, group, symmetric):
    w = drawn(4, 12, seed=bits) * torch.tensor([1., 100, 1e-3, 0])[:, None]
    codes, grid = round_to_nearest(w, bits, group, symmetric, parts=True)
    new = grid.values(codes)
    first = -2 ** (bits - 1) if symmetric else 0
    for i, j in itertools.product(range(4), range(12)):
        scale, zero = grid.scale[i, j // grid.group], grid.zero[i, j // grid.group]
        values = scale * (torch.arange(first, first + 2 ** bits) - zero)
        assert (values - new[i, j]).abs().min() == 0 and abs(new[i, j] - w[i, j]) <= (values - w[i, j]).abs().min() * (1 + 1e-6)
    assert torch.equal(grid.scale, grid.scale.half().float()) and not new[3].any()
    assert torch.equal(round_to_nearest(w, bits, group, symmetric), new)


@pytest.mark.parametrize("shape, bits, group, symmetric", [((3, 10), 3, 4, False), ((7, 64), 4, None, True), ((5, 33), 5, 128, False), ((1, 1), 2, 1, False)])
def test_bytes_are_those_of_what_is_packed(shape, bits, group, symmetric):
    codes, grid = round_to_nearest(drawn(*shape), bits, group, symmetric, parts=True)
    stored = [pack(codes - (-2 ** (bits - 1) if symmetric else 0), bits), *([] if symmetric else [pack(grid.zero, bits)])]
    assert quantised_bytes(shape, bits, group, symmetric) == sum(map(len, stored)) + 2 * grid.scale.numel()
    assert torch.equal(unpack(stored[0], bits, codes.numel()).view(shape).float(), codes - (-2 ** (bits - 1) if symmetric else 0))


@pytest.mark.parametrize("bad, message", [
    (lambda w: round_to_nearest(w, 1), "bits: got 1; want 2 to 8"), (lambda w: round_to_nearest(w, 9), "bits: got 9"), (lambda w: round_to_nearest(w, 4.), "bits: got 4.0"),
    (lambda w: round_to_nearest(w, 4, 0), "group: got 0"), (lambda w: round_to_nearest(w / 0), "weight: got .* NaN or infinite"), (lambda w: round_to_nearest(w.long()), "weight: got torch.int64"),
    (lambda w: round_to_nearest(w[0]), r"weight: got shape \(8,\)"), (lambda w: round_to_nearest(w * 1e9), "weight: got a range of"), (lambda w: round_to_nearest(w[:0]), r"weight: got shape \(0, 8\)"),
    (lambda w: gptq(w, torch.eye(7)), r"second: got shape \(7, 7\); want \(8, 8\)"), (lambda w: gptq(w, torch.eye(8) * torch.nan), "second: got"), (lambda w: gptq(w, torch.eye(8), damp=-1), "damp: got -1"),
    (lambda w: lorc(w, w[:2], 1), r"quantised: got shape"), (lambda w: lorc(w, w, 0), "rank: got 0"), (lambda w: lorc(w, w, 5), "rank: got 5; want at most 4"), (lambda w: lorc(w, w / 0, 1), "quantised: got"),
    (lambda w: pack(w, 2), "codes: got"), (lambda w: assign_bits(w, average=3), "scores: got shape"), (lambda w: assign_bits([1.], 4, 2), "low, high: got 4, 2"), (lambda w: assign_bits([float("nan")]), "scores: got 1 NaN"),
    (lambda w: assign_bits([1., 2], sizes=[1]), "sizes: got 1 numbers"), (lambda w: token_importance("attention", w), "attention: got None"), (lambda w: token_importance("norm", w), "hidden: got shape"),
    (lambda w: token_importance("norm", w[None], low=2), "low: got 2"), (lambda w: dual_svid(w, 5), "rank: got 5"), (lambda w: dual_svid(w / 0, 1), "weight: got .* NaN or infinite"), (lambda w: dual_svid(w, 1, 0), "paths: got 0"),
    (lambda w: rank_for(0, (8, 8)), "bits: got 0"), (lambda w: rank_for(1., (8, 8)), "bits: got 1.0; want at least"), (lambda w: signs(w, 0), "slope: got 0"), (lambda w: hadamard(6), "n: got 6"),
    (lambda w: hadamard(0), "n: got 0"), (lambda w: Int8Linear(nn.Linear(2, 2).requires_grad_(False).apply(lambda m: m.weight.fill_(torch.nan))), "linear: got 4 NaN")])
def test_bad_input_is_refused(bad, message):
    with pytest.raises(ValueError, match=message): bad(drawn(4, 8))


def plain(w, second, bits, group, symmetric, damp=.01):
    "GPTQ column by column in double precision."
    w, h = w.double().clone(), second.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    done = torch.empty_like(w)
    for j in range(w.shape[1]):
        if j % group == 0: grid = grid_of(w[:, j:j + group], bits, None, symmetric)
        done[:, j] = grid.values(grid.codes(w[:, j], 0), 0)
        inverse = torch.linalg.inv(h[j:, j:]) # of what is still free: no factor is trusted here
        w[:, j:] -= ((w[:, j] - done[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return done


@pytest.mark.parametrize("bits, group, symmetric", [(2, 40, False), (3, 16, True), (4, 7, False)])
def test_gptq_is_the_plain_solution_in_double_precision(bits, group, symmetric):
    x = drawn(200, 10, seed=1, dtype=torch.float64) @ drawn(10, 40, seed=2, dtype=torch.float64) + .3 * drawn(200, 40, seed=3, dtype=torch.float64)
    w, second = drawn(6, 40, seed=4, dtype=torch.float64), x.mT @ x
    new = gptq(w, second, bits, group, symmetric)
    torch.testing.assert_close(new, plain(w, second, bits, group, symmetric), atol=1e-4, rtol=0)
    assert output_error(w, new, second).sum() < output_error(w, round_to_nearest(w, bits, group, symmetric), second).sum()
    single = gptq(w.float(), second.float(), bits, group, symmetric)
    assert single.dtype == torch.float32 and ((single - new).abs() < 1e-4).float().mean() > .95
    torch.testing.assert_close(gptq(w, 7 * second, bits, group, symmetric), new, atol=1e-6, rtol=0) # the scale of the moments does not matter


@pytest.mark.parametrize("second", [torch.eye(24), torch.zeros(24, 24), torch.diag(torch.arange(24.))])
def test_gptq_without_correlations_is_rounding(second):
    w = drawn(5, 24)
    for group in (None, 8): assert torch.equal(gptq(w, second, 3, group), round_to_nearest(w, 3, group))
    assert torch.equal(gptq(w, second, 3, 8, order=True), round_to_nearest(w, 3, 8))


def test_half_precision_stays_half_precision():
    w, second = drawn(6, 16).bfloat16(), torch.eye(16) + .5
    for new in (round_to_nearest(w, 4, 8), gptq(w, second, 4, 8), *lorc(w, round_to_nearest(w, 2), 2)): assert new.dtype == torch.bfloat16 and new.isfinite().all()
    network = llama().bfloat16()
    report = quantise(network, 4, "gptq", [IDS], group=8, rank=2)
    assert report.before == 2 * report.weights and network(IDS).logits.isfinite().all() and all(p.dtype == torch.bfloat16 for p in network.parameters())
    for f in dual_svid(w, 2, 2): assert f.u.dtype == torch.float32
    assert set(signs(w).flatten().tolist()) == {-1., 1.}


def test_low_rank_repair_is_the_best_of_its_rank():
    w = drawn(10, 14, dtype=torch.float64)
    q = round_to_nearest(w, 2, None)
    u, s, v = torch.linalg.svd(w - q, full_matrices=False)
    for rank in (1, 4, 10):
        a, b = lorc(w, q, rank)
        torch.testing.assert_close(a @ b, u[:, :rank] * s[:rank] @ v[:rank])
        torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1)) # split evenly
        assert lorc_bytes(w.shape, rank) == 2 * (a.numel() + b.numel()) and lorc_bytes(w.shape, rank, 8) == a.numel() + b.numel() + 4 * rank


@pytest.mark.parametrize("options", [dict(), dict(method="gptq"), dict(method="gptq", sequential=True), dict(rank=3), dict(method="gptq", importance="attention", sequential=True), dict(method=lambda w, second, bits: w.round())])
def test_a_network_is_quantised_weight_by_weight(options):
    network, dense = llama(), llama()
    options = dict(group=8, batches=[IDS]) | options
    report = quantise(network, 3, **options)
    for name, w in weights_of(network).items():
        old = weights_of(dense)[name].matrix
        assert not torch.equal(w.matrix, old)
        if options.get("method", "rtn") == "rtn" and "rank" not in options: assert torch.equal(w.matrix, round_to_nearest(old, 3, 8)) and w.matrix.unique().numel() <= 8 * w.matrix.numel() // 8
    for name, p in network.named_parameters():
        if name not in report.bits: assert torch.equal(p, dense.get_parameter(name))
    assert report.after == sum(quantised_bytes(w.matrix.shape, 3, 8) + (lorc_bytes(w.matrix.shape, 3, 8) if "rank" in options else 0) for w in weights_of(dense).values())
    assert report.before + report.rest == sum(p.numel() * 4 for p in dense.parameters()) and "simulated" in str(report)
    assert network.config._attn_implementation == dense.config._attn_implementation and not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_gptq_of_a_network_uses_the_moments_of_its_inputs():
    network, moments = llama(), calibrate(llama(), [IDS], want=("second",))
    quantise(network, 3, "gptq", [IDS[:2], IDS[2:]], group=None)
    for name, w in weights_of(network).items():
        new = gptq(weights_of(llama())[name].matrix, moments[name].second, 3, None)
        assert ((w.matrix - new).abs() > 1e-3).float().mean() < .02, name


def test_grouped_convolutions_and_conv1d():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    dense, x = copy.deepcopy(cnn), drawn(20, 4, 4, 4)
    quantise(cnn, 3, "gptq", [x], group=None)
    second = calibrate(dense, [x], want=("second",))["0.weight"].second
    halves = [gptq(w, s, 3, None) for w, s in zip(dense[0].weight.detach().flatten(1).chunk(2), second)]
    torch.testing.assert_close(cnn[0].weight.detach().flatten(1), torch.cat(halves), atol=1e-4, rtol=0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)).eval()
    name, before = "transformer.h.0.mlp.c_fc.weight", gpt2.transformer.h[0].mlp.c_fc.weight.detach().clone()
    quantise(gpt2, 4, group=8)
    torch.testing.assert_close(gpt2.transformer.h[0].mlp.c_fc.weight.detach().T, round_to_nearest(before.T, 4, 8)) # groups along the inputs


@pytest.mark.filterwarnings("ignore:no calibration token")
def test_experts_are_quantised_one_by_one():
    torch.manual_seed(0)
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)).eval().requires_grad_(False)
    dense = copy.deepcopy(mixtral)
    report = quantise(mixtral, 4, "gptq", [IDS], group=8)
    assert sum("experts" in name for name in report.bits) == 2 * 2 * 3 and not any("gate.weight" in name for name in report.bits) # routers stay
    quantise(dense, 4, group=8)
    for (name, w), rounded in zip(weights_of(mixtral).items(), weights_of(dense).values()):
        if "experts" in name: assert w.matrix.isfinite().all() and not torch.equal(w.matrix, rounded.matrix)
    with pytest.raises(ValueError, match="importance: got an input of .*experts"): quantise(dense, 4, "gptq", [IDS], group=8, importance="norm")


def test_tied_weights_stay_tied():
    network = llama(tie_word_embeddings=True)
    report = quantise(network, 4, group=8, skip=[])
    assert network.lm_head.weight is network.model.embed_tokens.weight and "model.embed_tokens.weight" in report.bits and "lm_head.weight" not in report.bits
    before, after = pack_int8(tied := llama(tie_word_embeddings=True), skip=[])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and after < before


def test_a_network_is_unchanged_when_something_fails():
    network, calls = llama(tie_word_embeddings=True), []
    before = state(network)
    def breaks(w, second, bits):
        calls.append(1)
        if len(calls) > 9: raise KeyboardInterrupt
        return torch.zeros_like(w)
    with pytest.raises(KeyboardInterrupt): quantise(network, 4, breaks, [IDS], sequential=True)
    assert same(network, before)
    for options, message in ((dict(method="rtn", bits=9), "bits: got 9"), (dict(method="best"), "method: got 'best'"), (dict(method="gptq"), "batches: got None"), (dict(layer_bits={"model.layers.9": 2}), "layer_bits: got"),
                             (dict(layer_bits={"model.layers.0": 1}), "bits: got 1"), (dict(method="gptq", batches=[]), "batches: got none"), (dict(rank=-1), "rank: got -1"), (dict(importance="norm"), "method: got 'rtn' with importance"), (dict(method="gptq", importance="norm"), "batches: got None"), (dict(method="rtn", batches=[IDS], sequential=True), "method: got 'rtn' with"),
                             (dict(method="gptq", batches=[IDS], importance="luck"), "kind: got 'luck'"), (dict(method=lambda w, s, b: w[:1]), "method: got a matrix"), (dict(method=lambda w, s, b: w / 0), "got .* NaN or infinite")):
        with pytest.raises(ValueError, match=message): quantise(network, **options)
        assert same(network, before), options
    broken = llama()
    broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight: got 1 NaN"): quantise(broken, 4)
    with pytest.raises(ValueError, match="bits: got 9"): rsq(network, [IDS], 9)
    with pytest.raises(ValueError, match="bits: got 0.5 for model.layers.0.self_attn.q_proj.weight"): binarise(network, .5)
    assert same(network, before) and network.lm_head.weight is network.model.embed_tokens.weight and network.config.tie_word_embeddings and network.config._attn_implementation != "eager"


def test_what_it_costs():
    network, rows = llama(), {}
    def count(name): return lambda module, args, output: rows.update({name: rows.get(name, 0) + output.shape[0]})
    handles = [b.mlp.register_forward_hook(count(name)) for name, b in chain_of(network)]
    for options, times in ((dict(), 1), (dict(sequential=True), 2), (dict(importance="norm", sequential=True), 2)):
        rows.clear()
        quantise(network, 4, "gptq", [IDS[:4], IDS[4:]], group=8, **options)
        assert rows["model.layers.0"] <= times * 6 + 4 and rows["model.layers.1"] <= times * 6 # and the first batch once more in the first block, to see what blocks return
    rows.clear()
    quantise(network, 4, batches=[IDS])
    assert not rows
    for h in handles: h.remove()


@pytest.mark.parametrize("options", [{}, dict(sequential=True), dict(importance="norm")], ids=str)
def test_memory_does_not_grow_with_the_number_of_blocks(options, peak):
    found = {}
    for layers in (1, 4):
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers})).eval()
        found[layers] = peak(lambda: quantise(network, 4, "gptq", [IDS, IDS], **options))
    assert found[4] < 1.1 * found[1]


def test_too_few_rows_are_said_once_for_each_input():
    with pytest.warns(UserWarning, match="batches: 12 rows for the (24|40) inputs of model.layers") as said: quantise(llama(), 4, "gptq", [IDS[:1]])
    assert [str(w.message).rpartition(" inputs of ")[2].split(";")[0].split("layers.")[1] for w in said if "rows for the" in str(w.message)] == [f"{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]


def test_importance_leaves_padding_out():
    padded, mask = torch.cat([IDS, torch.full((6, 4), 7)], 1), torch.cat([torch.ones(6, 12), torch.zeros(6, 4)], 1).long()
    for kind in ("attention", "norm"):
        a, b = llama(), llama()
        quantise(a, 3, "gptq", [IDS], group=None, importance=kind), quantise(b, 3, "gptq", [dict(input_ids=padded[:3], attention_mask=mask[:3]), dict(input_ids=padded[3:], attention_mask=mask[3:])], group=None, importance=kind)
        assert sum(int(((p - q).abs() > 1e-3).sum()) for p, q in zip(a.parameters(), b.parameters())) < .02 * sum(p.numel() for p in a.parameters()), kind
    with pytest.raises(ValueError, match="importance: got"): quantise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval(), 3, "gptq", [drawn(5, 4)], importance="norm")


def test_a_token_without_importance_does_not_count():
    a, b = llama(), llama()
    quantise(a, 3, "gptq", [IDS], group=None, importance=lambda hidden, attention, mask: (torch.arange(12) < 5).float().expand(6, 12))
    quantise(b, 3, "gptq", [IDS[:, :5]], group=None) # causal: the first five tokens know nothing of the others
    assert sum(int(((p - q).abs() > 1e-3).sum()) for p, q in zip(a.parameters(), b.parameters())) < .02 * sum(p.numel() for p in a.parameters())


def test_activations_are_rounded_per_token_and_hooks_go():
    linear = nn.Sequential(nn.Linear(6, 3, bias=False)).requires_grad_(False)
    x = drawn(4, 5, 6)
    with quantised_activations(linear, 4): y = linear(x)
    torch.testing.assert_close(y, round_to_nearest(x.flatten(0, 1), 4, None).view(4, 5, 6) @ linear[0].weight.mT, atol=2e-2, rtol=0) # up to the half precision of scales that are kept
    for bits in (0, 9, True):
        with pytest.raises(ValueError, match="bits: got"), quantised_activations(linear, bits): pass
    with pytest.raises(KeyError), quantised_activations(linear, 4): raise KeyError
    assert torch.equal(linear(x), x @ linear[0].weight.mT)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"experts.*, whose input no hook sees"), quantised_activations(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)), 8): pass
    tokens = llama()
    with quantised_activations(tokens, 8, skip=["*norm*"]): assert (tokens(IDS).logits - llama()(IDS).logits).abs().max() < .2 * tokens(IDS).logits.abs().max()
    with pytest.raises(ValueError, match="statistics: got none of 0.weight"), quantised_activations(linear, 8, statistics={}): pass
    seen = calibrate(linear, [x], want=("quantiles",))
    with quantised_activations(linear, 8, statistics=seen, quantile=1.): torch.testing.assert_close(linear(x), x @ linear[0].weight.mT, atol=.05, rtol=0)


def test_bits_within_a_budget():
    for n, average in itertools.product((1, 3, 7), (2., 2.5, 3., 3.7, 4.)):
        scores = drawn(n, seed=n)
        bits = assign_bits(scores, 2, 4, average)
        high = [b for b in bits if b == 4]
        assert sum(bits) / n <= average + 1e-9 and (sum(bits) + 2) / n > average or len(high) == n
        assert not high or min(s for s, b in zip(scores, bits) if b == 4) >= max([s for s, b in zip(scores, bits) if b == 2], default=-torch.inf)
    network = llama()
    lim = layer_input_modification(network, [IDS])
    hidden = network.model(IDS, output_hidden_states=True).hidden_states
    assert lim.shape == (2,) and abs(lim[0] + torch.cosine_similarity(hidden[0], hidden[1], dim=-1).mean()) < 1e-4
    w = drawn(1000)
    assert z_score_share(w) == float((((w - w.mean()) / w.std(correction=0)) > 1).double().mean()) == pytest.approx(z_score_share(5 * w + 3), abs=2e-3)
    block = network.model.layers[0].mlp
    assert z_score_share(block) == pytest.approx(z_score_share(torch.cat([p.flatten() for p in block.parameters()])))


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 44, 60, 96, 256])
def test_hadamard_matrices(n):
    h = hadamard(n).double()
    torch.testing.assert_close(h @ h.mT, torch.eye(n, dtype=torch.float64), atol=1e-5, rtol=0)
    assert torch.equal(orthogonal(n, 5), orthogonal(n, 5)) and (n == 1 or not torch.equal(orthogonal(n, 5), orthogonal(n, 6)))


def test_a_rotated_network_computes_the_same_and_loads(tmp_path):
    for more in (dict(), dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)):
        network = llama(**more)
        exact = network(IDS).logits
        rotate(network, generator=1)
        torch.testing.assert_close(network(IDS).logits, exact, atol=1e-4, rtol=1e-4)
        assert network.lm_head.weight is not network.model.embed_tokens.weight
        network.save_pretrained(tmp_path)
        torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, network(IDS).logits)
    half = llama().bfloat16()
    exact = half(IDS).logits
    rotate(half)
    assert (half(IDS).logits - exact).abs().max() < .05 * exact.abs().max()


def test_rotate_refuses_what_it_cannot_turn():
    torch.manual_seed(0)
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    before = state(mixtral)
    with pytest.raises(ValueError, match="MixtralSparseMoeBlock with other layers, .*experts"): rotate(mixtral)
    with pytest.raises(ValueError, match="LlamaModel without an output head"): rotate(llama().model)
    with pytest.raises(ValueError, match="rotation: got shape"): rotate(llama(), 2 * torch.eye(24))
    reads = llama(tie_word_embeddings=True) # something else reads the stream
    reads.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + args[0])
    was = state(reads)
    with pytest.raises(ValueError, match="outputs that change by"): rotate(reads)
    assert same(reads, was) and reads.lm_head.weight is reads.model.embed_tokens.weight and same(mixtral, before)


def test_bits_of_signs_are_counted():
    for shape, rank, paths in (((8, 12), 3, 1), ((30, 20), 5, 2)):
        factors = dual_svid(drawn(*shape), rank, paths)
        stored = sum(f.u.numel() + f.v.numel() + 16 * (f.h.numel() + f.l.numel() + f.g.numel()) for f in factors)
        assert bits_per_weight(shape, rank, paths) * math.prod(shape) == pytest.approx(stored)
        assert rank_for(bits_per_weight(shape, rank, paths), shape, paths) == rank


def test_dual_svid_term_by_term():
    w = drawn(9, 7, dtype=torch.float64)
    f, = dual_svid(w, 3)
    by_hand = sum(f.l[k] * torch.outer(f.h * f.u[:, k].sign(), f.g * f.v[:, k].sign()) for k in range(3))
    torch.testing.assert_close(f.matrix(), by_hand)
    u, s, v = torch.linalg.svd(w)
    torch.testing.assert_close(f.u @ f.v.mT, u[:, :3] * s[:3] @ v[:3])
    first, second = dual_svid(w, 3, 2)
    torch.testing.assert_close(second.matrix(), dual_svid(w - first.matrix(), 3)[0].matrix())


def test_binarised_layers_train_and_load():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 4))
    small, x = copy.deepcopy(network), drawn(32, 40)
    report = binarise(small, 1.5, paths=1, skip=["2.*"])
    assert report.bits == {"0.weight": bits_per_weight((48, 40), rank_for(1.5, (48, 40)))} and report.before == 4 * 48 * 40 and report.rest == 4 * (48 + 4 * 48 + 4)
    assert abs(8 * report.after / report.weights - report.bits["0.weight"]) < 8 / report.weights
    loss = lambda: (small(x) - network(x).detach()).square().mean()
    begun, optimiser = loss().item(), torch.optim.Adam(small[0].parameters(), 3e-3)
    for _ in range(60): optimiser.zero_grad(), loss().backward(), optimiser.step()
    assert loss() < .8 * begun
    fresh = copy.deepcopy(network)
    binarise(fresh, 1.5, paths=1, skip=["2.*"])
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x)) and isinstance(fresh[0], BinaryFactors)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=48, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)).eval()
    binarise(gpt2, 2., paths=2)
    assert gpt2(IDS).logits.isfinite().all() and isinstance(gpt2.transformer.h[0].attn.c_attn, BinaryFactors)
    with pytest.raises(ValueError, match=r"lm_head.weight|embed_tokens.weight \(tied\)"): binarise(llama(tie_word_embeddings=True), 8., skip=["*layers*"])
    with pytest.raises(ValueError, match=r"0.weight \(convolution\)"): binarise(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_eight_bits_are_really_stored():
    network = llama().bfloat16()
    exact = network(IDS).logits
    before, after = pack_int8(network)
    linear = sum(m.in_features * m.out_features for m in network.modules() if isinstance(m, Int8Linear))
    rows = sum(m.out_features for m in network.modules() if isinstance(m, Int8Linear))
    assert before - after == linear - 2 * rows and (network(IDS).logits - exact).abs().max() < .1 * exact.abs().max()
    one = network(IDS[:1, :1]).logits # a single row goes through PyTorch's own kernel
    with torch.enable_grad(): torch.testing.assert_close(network(IDS[:1, :1]).logits, one, atol=.1, rtol=.05)
    with pytest.raises(ValueError, match="network: got a Linear"): pack_int8(nn.Linear(2, 2))


def test_batches_may_be_one_tensor_or_one_dict_or_a_generator():
    expected = llama()
    quantise(expected, 3, "gptq", [IDS], importance="norm")
    for batches in (IDS, dict(input_ids=IDS), (b for b in [IDS])):
        network = llama()
        quantise(network, 3, "gptq", batches, importance="norm")
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), expected.parameters()))


def test_an_embedding_is_refused_by_methods_that_look_at_data():
    network = llama()
    before = state(network)
    with pytest.raises(ValueError, match="skip: got no pattern of the embedding model.embed_tokens.weight"): quantise(network, 4, "gptq", [torch.zeros(1, 4, dtype=torch.long)], skip=[])
    assert same(network, before)


def test_gptq_refuses_a_factor_that_it_would_not_use():
    with pytest.raises(ValueError, match="factor: got one with order"): gptq(torch.randn(2, 3), torch.eye(3), order=True, factor=torch.eye(3))


def test_a_module_that_is_used_twice_stays_one():
    twice = nn.Linear(64, 64)
    network = nn.Sequential(twice, nn.ReLU(), twice, nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"network: got 0.weight \(tied\)"): binarise(network, 2.)
    pack_int8(network)
    assert network[0] is network[2] is twice and type(network[3]).__name__ == "Int8Linear"


@pytest.mark.parametrize("options, message", [(dict(paths=0), "paths: got 0"), (dict(slope=-1.), "slope: got -1.0")])
def test_binarise_refuses_before_it_changes_anything(options, message):
    network = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=message): binarise(network, 2., **options)
    assert type(network[0]) is nn.Linear
    with pytest.raises(ValueError, match="paths: got 0"): rank_for(2., (8, 8), 0)
