"Blocks fused into their neighbours, and blocks that borrow their weights."
import copy
import pytest
import torch
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from whatmatters.core.calibration import weights_of
from whatmatters.core.values import seeded
from whatmatters.sparsity.blocks import batch_losses, macro_influence, recover
from whatmatters.sparsity.fusion import adapters, fold, fuse, fuse_block, inject, share, share_block, share_residuals, stored
from whatmatters.sparsity.structure import drop_blocks, load, save
from test_blocks import gpt2, ids, llama, mixtral, tiny  # noqa: F401 (a fixture)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- fusion

@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_injected_weights_begin_silent_and_fold_away(make, ids):
    network = make()
    with torch.no_grad():
        whole, injected = network(ids).logits, copy.deepcopy(network)
        factors = inject(injected, 1, [0, 2], rank=3, generator=1)
        torch.testing.assert_close(injected(ids).logits, whole)
        for f in factors: f.add_(.05)
        changed = injected(ids).logits
        assert not torch.allclose(changed, whole, atol=1e-3)
        folded = fold(injected)
        torch.testing.assert_close(folded(ids).logits, changed, rtol=1e-4, atol=1e-4)
    assert set(folded.state_dict()) == set(network.state_dict()) and [type(m) for m in folded.modules()] == [type(m) for m in network.modules()]


def test_every_matrix_of_a_neighbour_gets_its_counterpart(ids):
    network = gpt2()
    injected = copy.deepcopy(network)
    factors = inject(injected, 1, [3], rank=2)
    assert len(factors) == 4 * 2 + 4 # A and B of four matrices, a factor per entry of four biases
    with torch.no_grad():
        for f in factors: f.normal_(generator=seeded(3))
    theirs, mine, before = (n.transformer.h for n in (network, injected, network))
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        new, own, lent = mine[3].get_submodule(name), before[3].get_submodule(name), theirs[1].get_submodule(name)
        p = new.parametrizations.weight[0]
        torch.testing.assert_close(new.weight, own.weight + (p.a @ p.b) * lent.weight)
        torch.testing.assert_close(new.bias, own.bias + new.parametrizations.bias[0].a * lent.bias)


def test_fusing_without_steps_is_deleting(ids):
    network = llama()
    fused = copy.deepcopy(network)
    result = fuse_block(fused, 2, [ids], rank=2, group=3, steps=0)
    assert same(fused, drop_blocks(network, [2])) and result.group == [1, 2, 3] and result.errors == []


@pytest.mark.parametrize("make", [llama, gpt2])
def test_fusion_lowers_the_error_of_the_group(make, ids):
    network = make()
    untuned, tuned = copy.deepcopy(network), copy.deepcopy(network)
    with torch.no_grad(): goal = network.base_model(ids).last_hidden_state
    fuse_block(untuned, 1, [ids], steps=0)
    result = fuse_block(tuned, 1, [ids], rank=4, steps=40, rate=2e-2)
    error = lambda n: (n.base_model(ids).last_hidden_state - goal).square().mean().item()
    with torch.no_grad(): assert result.errors[-1] < .8 * result.errors[0] and error(tuned) < error(untuned)


def test_a_light_update_beside_the_injected_weights(ids):
    network = llama()
    fused = copy.deepcopy(network)
    assert len(inject(fused, 1, [2], rank=2, light=3)) == 7 * 4
    assert same(fold(fused), network)
    result = fuse_block(fused, 1, [ids], rank=2, light=3, steps=20, rate=2e-2)
    assert result.errors[-1] < result.errors[0] and set(fused.state_dict()) == set(drop_blocks(network, [1]).state_dict())


def test_two_stacks_are_refused_before_anything_changes(ids):
    t5 = tiny(T5ForConditionalGeneration, T5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0))
    before = copy.deepcopy(t5)
    with pytest.raises(ValueError, match="an encoder and a decoder"): fuse_block(t5, 1, [dict(input_ids=ids, decoder_input_ids=ids)], chain="encoder.block")
    assert same(t5, before)


def test_only_the_group_changes(ids):
    network = llama()
    fused = copy.deepcopy(network)
    result = fuse_block(fused, 0, [ids], rank=2, group=2, steps=2, rate=1e-2)
    assert result.group == [0, 1] and fused.config.num_hidden_layers == 3
    assert all(same(fused.model.layers[i - 1], network.model.layers[i]) for i in (2, 3)) and not same(fused.model.layers[0], network.model.layers[1])
    frozen = ("input_layernorm", "post_attention_layernorm")
    assert all(same(fused.model.layers[0].get_submodule(n), network.model.layers[1].get_submodule(n)) for n in frozen)


def test_fusion_that_fails_leaves_the_network(ids):
    network = llama()
    before = copy.deepcopy(network)
    with pytest.raises(ValueError, match="loss: got nan|loss: got inf"): fuse_block(network, 1, [ids], rank=2, steps=30, rate=1e30)
    assert same(network, before) and network.config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="index: got"): fuse_block(network, 7, [ids])
    with pytest.raises(ValueError, match="batches: got none"): fuse_block(network, 1, [])
    with pytest.raises(ValueError, match="group: got 1"): fuse_block(network, 1, [ids], group=1)
    with pytest.raises(ValueError, match="k: got 4"): fuse(network, [ids], 4)
    with torch.no_grad(): network.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(10, 16))
    with pytest.raises(ValueError, match="targets: got"): inject(network, 1, [2])
    assert same(network.model.layers[2], before.model.layers[2])


def test_blocks_go_in_the_order_of_their_influence(ids):
    network = llama()
    first = int(macro_influence(network, [ids]).argmin())
    gone = fuse(network, [ids], 2, rank=2, steps=1)
    assert gone[0] == first and len(set(gone)) == 2 and network.config.num_hidden_layers == 2
    assert [b.self_attn.layer_idx for b in network.model.layers] == [0, 1]


def test_a_linear_block_can_be_taken_over():
    class Linear(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.move = torch.nn.Linear(6, 6, bias=False)
            self.move.weight = torch.nn.Parameter(weight)

        def forward(self, x): return x + self.move(x)

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            draws = torch.randn(3, 6, 6, generator=seeded(0)) * .1
            self.blocks = torch.nn.ModuleList(Linear(w) for w in draws)

        def forward(self, x):
            for b in self.blocks: x = b(x)
            return x
    network, x = Stack(), torch.randn(200, 6, generator=seeded(1))
    fused = copy.deepcopy(network)
    errors = fuse_block(fused, 1, [x], rank=6, group=3, steps=300, rate=2e-2).errors
    assert errors[-1] < .01 * errors[0]


# ---- borrowing

@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("normalised", [True, False])
def test_full_rank_is_the_block_itself(make, normalised, ids):
    network = make()
    with torch.no_grad():
        whole = network(ids).logits
        share_block(network, 1, 99, [ids] if normalised else None)
        torch.testing.assert_close(network(ids).logits, whole, rtol=1e-3, atol=1e-3)


def test_residuals_by_brute_force():
    network = llama()
    found = share_residuals(network, 1, 3, [0, 2])
    assert found[[1, 3]].isnan().all()
    for j in (0, 2):
        tail = size = 0
        for name, w in weights_of(network.model.layers[1]).items():
            d = w.matrix - weights_of(network.model.layers[j])[name].matrix
            u, s, v = torch.linalg.svd(d)
            tail += (d - u[:, :3] * s[:3] @ v[:3]).square().sum()
            size += w.matrix.square().sum()
        assert found[j] == pytest.approx((tail / size).sqrt().item(), rel=1e-4)


def test_normalised_features_have_their_old_moments(ids):
    network = gpt2()
    borrowed, outputs = copy.deepcopy(network), {}
    what = share_block(borrowed, 2, 2, [ids])
    for kind, n in (("old", network), ("new", borrowed)): n.transformer.h[2].mlp.c_proj.register_forward_hook(lambda m, i, o, kind=kind: outputs.update({kind: o.flatten(0, 1)}))
    with torch.no_grad(): network(ids), borrowed(ids)
    torch.testing.assert_close(outputs["new"].mean(0), outputs["old"].mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs["new"].std(0), outputs["old"].std(0), rtol=1e-3, atol=1e-4)
    assert borrowed.transformer.h[2].mlp.c_proj.layer is borrowed.transformer.h[what.lender].mlp.c_proj


def test_what_is_shared_is_stored_once(ids):
    network = llama()
    whole, bytes_before = stored(network)
    block = sum(w.matrix.numel() for w in weights_of(network.model.layers[0]).values())
    thin = sum(2 * sum(w.matrix.shape) + 2 * len(w.matrix) for w in weights_of(network.model.layers[0]).values())
    done = share(network, [ids], 2, rank=2)
    assert stored(network)[0] == whole - 2 * (block - thin) and stored(network)[1] == 4 * stored(network)[0] and bytes_before == 4 * whole
    assert all(s.lender not in [t.index for t in done] for s in done)
    lender = network.model.layers[done[0].lender]
    recover(network, [ids], 2, parameters=adapters(network), rate=1e-2)
    borrowed = network.model.layers[done[0].index].mlp.up_proj
    assert borrowed.layer is lender.mlp.up_proj and len(adapters(network)) == 2 * 7 * 4
    copied = copy.deepcopy(network)
    assert copied.model.layers[done[0].index].mlp.up_proj.layer is copied.model.layers[done[0].lender].mlp.up_proj and stored(copied) == stored(network)


def test_borrowing_blocks_generate_with_a_cache(ids):
    network = llama()
    share(network, [ids], 2, rank=3, lenders="nearest")
    out = [network.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False)]
    assert torch.equal(*out)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_saved_and_loaded(make, ids, tmp_path):
    network = make()
    done = share(network, [ids], 2, rank=3)
    assert save(network, tmp_path/"borrowing") == "recipe"
    again = load(tmp_path/"borrowing")
    assert torch.equal(again(ids).logits, network(ids).logits) and stored(again) == stored(network)
    with pytest.raises(ValueError, match="no other block borrows"): share_block(again, done[0].lender, 2)
    with torch.no_grad():
        for p in again.parameters(): p.add_(.01)
        for p in network.parameters(): p.add_(.01)
    assert torch.equal(again(ids).logits, network(ids).logits) # what is shared moves together


def test_a_fused_model_is_a_stock_model(ids, tmp_path):
    network = llama()
    fuse_block(network, 1, [ids], rank=2, steps=2)
    assert save(network, tmp_path/"fused") == "stock"
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path/"fused").eval()(ids).logits, network(ids).logits)


def test_beginning_at_nothing_is_the_lenders_weights(ids):
    network = llama()
    what = share_block(network, 1, 3, None, init="zero")
    borrowed = network.model.layers[1].mlp.up_proj
    x = torch.randn(5, 16)
    torch.testing.assert_close(borrowed(x), network.model.layers[what.lender].mlp.up_proj(x))
    assert borrowed.down.abs().sum() > 0 and what.residual == pytest.approx(share_residuals(llama(), 1, 0, [what.lender])[what.lender].item())


def test_padding_does_not_count_in_the_moments(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    a, b = llama(), llama()
    share_block(a, 1, 2, [dict(input_ids=ids, attention_mask=mask)])
    share_block(b, 1, 2, [dict(input_ids=ids.masked_fill(mask == 0, 5), attention_mask=mask)])
    torch.testing.assert_close(a.model.layers[1].mlp.down_proj.gain, b.model.layers[1].mlp.down_proj.gain)


def test_half_precision(ids):
    network = llama().bfloat16()
    share_block(network, 1, 2, [ids])
    fuse_block(network, 3, [ids], rank=2, group=2, steps=2)
    assert network(ids).logits.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in network.parameters()) and batch_losses(network, ids).isfinite().all()


def test_bad_input_of_sharing(ids):
    network = llama()
    before = copy.deepcopy(network)
    for bad, match in ((dict(rank=0), "rank: got 0"), (dict(index=4), "index: got"), (dict(lender=1), "lender: got 1"), (dict(init="random"), "init: got"), (dict(batches=[]), "batches: got none")):
        with pytest.raises(ValueError, match=match): share_block(network, **{**dict(index=1, rank=2), **bad})
    with pytest.raises(ValueError, match="experts"): share_block(mixtral(), 1, 2)
    with pytest.raises(ValueError, match="no block that borrows"): adapters(network)
    with pytest.raises(ValueError, match="k: got 4"): share(network, [ids], 4, 2)
    assert same(network, before)
