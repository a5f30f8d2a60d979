"The column loop of SparseGPT and GPTQ: against plain loops in double precision, and what it refuses."
import pytest
import torch
from whatmatters.core.calibration import weights_of
from whatmatters.core.keep import top
from whatmatters.sparsity.reconstruction import least_squares, obs_factor, obs_importance, output_error, prune_sparsegpt, reconstruct, sparsegpt


def layer(rows=24, columns=50, causes=12, n=300, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, causes, generator=draw) @ torch.randn(causes, columns, generator=draw) + .3 * torch.randn(n, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw), x.T @ x


def plainly(weight, second, change, damp=.01):
    "One column after the other, with the inverse of what is left computed anew: `change(W, j)` gives the new column."
    H, W = second.double(), weight.double().clone()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    for j in range(len(H)):
        left = torch.linalg.inv(H[j:, j:])
        new = change(W, j)
        W[:, j:] -= ((W[:, j] - new) / left[0, 0])[:, None] * left[0]
        W[:, j] = new
    return W


def rounding(step): return lambda columns, start, diagonal: lambda column, j: (column / step).round() * step


@pytest.mark.parametrize("group", [1, 7, 16, 32, 50, 128])
def test_rounding_equals_the_plain_loop_whatever_the_group(group):
    weight, second = layer()
    new = reconstruct(weight.double(), obs_factor(second.double()), rounding(.25), group)
    torch.testing.assert_close(new, plainly(weight, second, lambda W, j: (W[:, j] / .25).round() * .25), atol=1e-4, rtol=0)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 33, 129])
def test_single_precision_keeps_to_a_given_mask_and_to_double(columns):
    weight, second = layer(columns=columns)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < .5
    new = reconstruct(weight, obs_factor(second), lambda c, start, d: lambda column, j: column * mask[:, start + j])
    assert not new[~mask].any()
    torch.testing.assert_close(new.double(), plainly(weight, second, lambda W, j: W[:, j] * mask[:, j]), atol=1e-4, rtol=1e-4)


def test_groups_come_in_order_and_as_they_are_by_then():
    weight, second = layer()
    seen, factor = [], obs_factor(second)
    def plan(columns, start, diagonal):
        seen.append((start, columns.shape[1], columns.clone()))
        assert torch.equal(diagonal, factor.diagonal()[start:start + columns.shape[1]])
        return lambda column, j: torch.zeros_like(column)
    assert not reconstruct(weight, factor, plan, 12).any()
    assert [s[:2] for s in seen] == [(0, 12), (12, 12), (24, 12), (36, 12), (48, 2)]
    assert torch.equal(seen[0][2], weight[:, :12])
    rest = plainly(weight, second, lambda W, j: torch.zeros_like(W[:, j]) if j < 36 else W[:, j])
    torch.testing.assert_close(seen[3][2].double(), rest[:, 36:48], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sparsity", [0, .1, .5, .83])
def test_exactly_the_share_of_every_block_goes(sparsity):
    weight, second = layer()
    new, mask = sparsegpt(weight, second, sparsity, block=16)
    for i in range(0, 50, 16):
        part = mask[:, i:i + 16]
        assert int(part.sum()) == int((1 - sparsity) * part.numel() + .5 + 1e-9)
    assert not new[~mask].any() and (new[mask] != 0).all()


def test_n_of_m_is_scored_anew_every_m_columns():
    weight, second = layer(columns=48)
    new, mask = sparsegpt(weight, second, pattern=(2, 4))
    assert (mask.view(24, 12, 4).sum(-1) == 2).all()
    factor, held = obs_factor(second.double()), torch.zeros_like(mask)
    def change(W, j):
        if j % 4 == 0: held[:, j:j + 4] = top((W[:, j:j + 4] / factor.diagonal()[j:j + 4]).square(), k=2)
        return W[:, j] * held[:, j]
    torch.testing.assert_close(new.double(), plainly(weight, second, change), atol=1e-4, rtol=1e-4)
    assert torch.equal(mask, held)


def test_better_than_leaving_the_others_alone_and_bounded_by_least_squares():
    weight, second = layer(40, 64)
    new, mask = sparsegpt(weight, second, .6, damp=1e-4)
    least = least_squares(weight, second, mask, damp=1e-6)
    errors = [output_error(weight, v, second) for v in (least, new, weight * mask)]
    assert (errors[0] <= errors[1] * 1.001).all() and errors[1].sum() < .5 * errors[2].sum()
    gradient = ((least.double() - weight.double()) @ second.double())[mask]
    assert gradient.abs().max() < 1e-3 * second.abs().max()


def test_importance_is_the_least_error_of_one_removal():
    weight, second = layer(3, 10, causes=6)
    scores = obs_importance(weight, second.double(), damp=0)
    assert torch.equal(scores, obs_importance(weight, second.double(), factor=obs_factor(second.double(), damp=0)))
    idle = torch.nn.functional.pad(second, (0, 1, 0, 1))  # an input that is always zero
    torch.testing.assert_close(obs_importance(torch.nn.functional.pad(weight, (0, 1), value=9.), idle.double(), damp=0), torch.nn.functional.pad(scores, (0, 1)))
    for i, j in ((0, 0), (1, 4), (2, 9)):
        mask = torch.ones(3, 10, dtype=torch.bool)
        mask[i, j] = False
        best = least_squares(weight.double(), second, mask, damp=0)
        torch.testing.assert_close(output_error(weight.double(), best, second)[i], scores[i, j], rtol=1e-4, atol=1e-6)


def test_inputs_that_are_always_zero_go_first_and_disturb_nobody():
    weight, second = layer()
    alive = torch.ones(50, dtype=torch.bool)
    alive[[3, 17, 40]] = False
    second = second * alive[:, None] * alive
    new, mask = sparsegpt(weight, second, .5)
    assert not mask[:, ~alive].any() and int(mask.sum()) == 600
    some, kept = sparsegpt(weight[:, alive], second[alive][:, alive], (600 - 24 * 3) / (24 * 47))
    assert torch.equal(mask[:, alive], kept)
    torch.testing.assert_close(new[:, alive], some, rtol=1e-4, atol=1e-4)
    by_size, mask = sparsegpt(weight, torch.zeros(50, 50), .5)
    assert torch.equal(by_size, weight * top(weight.abs(), ratio=.5, per="tensor"))


def test_too_few_rows_are_damped_with_a_warning_and_dtypes_stay():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 50, generator=draw)
    with pytest.warns(UserWarning, match="no Cholesky factor with damp=0; tried again with 0.0001"): factor = obs_factor(x.T @ x, damp=0)
    assert factor.isfinite().all()
    weight, second = layer()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        new, mask = sparsegpt(weight.to(dtype), second, .5)
        assert new.dtype == dtype and new.isfinite().all() and mask.dtype == torch.bool
    low, exact = sparsegpt(weight.bfloat16(), second, .5)[0], sparsegpt(weight.bfloat16().float(), second, .5)[0]
    assert torch.equal(low, exact.bfloat16())  # computed in single precision, rounded once


def test_nothing_given_is_changed_and_layouts_do_not_matter():
    weight, second = layer()
    before = weight.clone(), second.clone()
    new, mask = sparsegpt(weight, second)
    assert torch.equal(weight, before[0]) and torch.equal(second, before[1]) and new.is_contiguous()
    other, same = sparsegpt(weight.T.contiguous().T.requires_grad_(), second)
    assert torch.equal(other, new) and torch.equal(same, mask) and not other.requires_grad


@pytest.mark.parametrize("call, message", [
    (lambda w, h: sparsegpt(w, h, 1.), "sparsity: got 1.0; want a share in"), (lambda w, h: sparsegpt(w, h, -.1), "sparsity: got -0.1"), (lambda w, h: sparsegpt(w, h[:4, :4]), "second: got shape"),
    (lambda w, h: sparsegpt(w, h, pattern=(2, 4)), "pattern: got m=4 for 50 inputs"), (lambda w, h: sparsegpt(w, h, pattern=(5, 4)), "pattern: got"),
    (lambda w, h: sparsegpt(w * float("nan"), h), "weight: got 1200 NaN"), (lambda w, h: sparsegpt(w, h * float("inf")), "second: got"), (lambda w, h: obs_factor(h, damp=-1), "damp: got -1"),
    (lambda w, h: obs_factor(h[:3]), "second: got shape"), (lambda w, h: obs_factor(-h), "second: got 50 negative diagonal"), (lambda w, h: reconstruct(w.long(), obs_factor(h), None), "weight: got torch.int64"),
    (lambda w, h: reconstruct(w, obs_factor(h[:4, :4]), None), "factor: got shape"), (lambda w, h: reconstruct(w, obs_factor(h), None, 0), "group: got 0"),
    (lambda w, h: obs_importance(w, h[:3, :3]), "second: got shape"), (lambda w, h: least_squares(w, h, w), "mask: got torch.float32"), (lambda w, h: output_error(w, w[:2], h), "new, second: got shapes"), (lambda w, h: sparsegpt(w, h, block=0), "group: got 0")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call(*layer())


def test_a_network_of_convolutions_linear_layers_and_experts():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    torch.manual_seed(0)
    pictures = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 4 * 4, 5)).eval()
    experts = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2)).eval()
    for network, batches in ((pictures, [torch.randn(30, 4, 6, 6) for _ in range(5)]), (experts, [torch.randint(40, (8, 16)) for _ in range(2)])):
        before = {n: v.matrix.clone() for n, v in weights_of(network).items()}
        masks = prune_sparsegpt(network, batches, .5).masks
        for name, v in weights_of(network).items():
            assert masks[name].shape == v.matrix.shape and not v.matrix[~masks[name]].any() and abs(float(masks[name].double().mean()) - .5) < .02, name
            assert not torch.equal(v.matrix, before[name])


@pytest.mark.parametrize("sequential", [False, True])
def test_memory_is_that_of_one_block_and_of_the_masks(peak, sequential):
    from transformers import LlamaConfig, LlamaForCausalLM
    found, ids = {}, torch.randint(40, (16, 16), generator=torch.Generator().manual_seed(0))
    for layers in (1, 4):
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=64, intermediate_size=176, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1)).eval()
        found[layers] = peak(lambda: prune_sparsegpt(network, ids.split(4), .5, sequential=sequential, block=16))
    block, second, hidden = sum(w.matrix.numel() for n, w in weights_of(network).items() if ".0." in n), 4 * (3 * 64 ** 2 + 176 ** 2), 4 * 64 * ids.numel()
    assert found[4] - found[1] < 3.1 * block  # a mask takes a byte per weight; of what else a block needs nothing stays
    assert found[1] < block + hidden + 3 * second


def test_a_budget_for_each_layer_and_one_forward_pass():
    torch.manual_seed(0)
    network, calls = torch.nn.Sequential(torch.nn.Linear(10, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12)).eval(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    masks = prune_sparsegpt(network, list(torch.randn(6, 40, 10)), {"0.weight": .25, "2.weight": .75}).masks
    assert [int(m.sum()) for m in masks.values()] == [90, 36] and len(calls) == 6
    with pytest.warns(UserWarning, match="batches: 3 rows for the 1[02] inputs of [02].weight"): prune_sparsegpt(network, [torch.randn(3, 10)], .7)
    with pytest.raises(ValueError, match="sparsity: got 1.5"): prune_sparsegpt(network, [torch.randn(30, 10)], {"0.weight": 1.5, "2.weight": 0})


def test_what_a_network_must_not_be_asked_leaves_it_as_it_was():
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8)).eval()
    x = [torch.randn(60, 16, generator=torch.Generator().manual_seed(1))]
    half = make()
    prune_sparsegpt(half, x, pattern="2:4")
    for network, options, message in ((make(), dict(batches=[]), "batches: got none"), (make(), dict(batches=[x[0][:0]]), "batches: got a Tensor without a tensor that has rows"), (make(), dict(sparsity=.999), "sparsity: got 0.999, which leaves nothing of 0.weight, 2.weight; want less"),
                                      (make(), dict(batches=[torch.full((60, 16), torch.nan)]), "batches: got NaN or infinite activations at the input of 0.weight"), (half, dict(pattern="2:4"), "network: got one already pruned to 50.0%; want one that does not have the pattern 2:4"),
                                      (half, dict(sparsity=.5), "network: got one already pruned to 50.0%; want a sparsity above that, not 0.5"), (make(), dict(pattern="2:5"), "pattern: got m=5 for 16 inputs"), (make(), dict(weights={}, pattern="2:4"), "weights: got none")):
        before = [p.clone() for p in network.parameters()]
        with pytest.raises(ValueError, match=message): prune_sparsegpt(network, **{"batches": x, **options})
        assert all(torch.equal(a, b) for a, b in zip(before, network.parameters())), options
    assert prune_sparsegpt(make(), x, .999, allow_empty=True).removed == 1 and prune_sparsegpt(half, x, pattern="1:4").removed == .75
