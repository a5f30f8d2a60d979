"Which blocks can go: scores by brute force, what is skipped is skipped, and networks are as they were."
import copy
import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, T5Config, T5EncoderModel
from whatmatters.core.values import seeded
from whatmatters.sparsity.blocks import (batch_losses, block_influence, bypass, distil, iterative_removal, macro_influence, one_shot, position_aware, recover,
                                         removal_losses)
from whatmatters.sparsity.structure import drop_blocks

SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, initializer_range=.3)


def tiny(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


def llama(): return tiny(LlamaForCausalLM, LlamaConfig(**SIZES))
def gpt2(): return tiny(GPT2LMHeadModel, GPT2Config(vocab_size=48, n_embd=16, n_layer=4, n_head=2, n_positions=32, initializer_range=.3, bos_token_id=0, eos_token_id=0))
def mixtral(): return tiny(MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=3))


@pytest.fixture
def ids(): return torch.randint(48, (3, 10), generator=seeded(0))


class Plus(nn.Module):
    "A residual block; `form` says how it returns its output."
    def __init__(self, width, form=lambda x: x):
        super().__init__()
        self.layer, self.form, self.ran = nn.Linear(width, width), form, 0

    def forward(self, x):
        self.ran += 1
        return self.form(x + torch.tanh(self.layer(x)))


class Chain(nn.Module):
    def __init__(self, count=5, width=6, form=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.out, self.take = nn.ModuleList(Plus(width, form) for _ in range(count)), nn.Linear(width, 3), lambda y: y if isinstance(y, torch.Tensor) else y[0]

    def forward(self, x):
        for b in self.blocks: x = self.take(b(x))
        return self.out(x)


def rows(n=20, width=6): return torch.randn(n, width, generator=seeded(1)), torch.randint(3, (n,), generator=seeded(2))


# ---- leaving out

@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_bypassed_is_dropped(make, ids):
    network = make()
    before = network(ids).logits
    with torch.no_grad(), bypass(network, [1, 3]): out = network(ids, use_cache=False).logits
    torch.testing.assert_close(network(ids).logits, before)
    torch.testing.assert_close(out, drop_blocks(copy.deepcopy(network), [1, 3])(ids).logits)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: (x, None), lambda x: [x]])
def test_whatever_a_block_returns(form):
    network, plain, batch = Chain(form=form), Chain(), rows()
    torch.testing.assert_close(removal_losses(network, [batch]).without, removal_losses(plain, [batch]).without)
    torch.testing.assert_close(removal_losses(network, [batch], restart=False).without, removal_losses(plain, [batch]).without)
    torch.testing.assert_close(macro_influence(network, [batch]), macro_influence(plain, [batch]))


def test_bypassed_blocks_do_not_run():
    network, x = Chain(), rows()[0]
    with bypass(network, [0, 2]):
        for _ in range(4): network(x)
    assert [b.ran for b in network.blocks] == [1, 4, 1, 4, 4] # once, to see what they return


def test_forwards_come_back_after_an_error():
    network, x = Chain(), rows()[0]
    mine = network.blocks[1].forward
    network.blocks[1].forward = lambda x: mine(x) # somebody else's
    theirs = network.blocks[1].forward
    with pytest.raises(KeyboardInterrupt), bypass(network, [0, 1]): raise KeyboardInterrupt
    assert vars(network.blocks[1])["forward"] is theirs and "forward" not in vars(network.blocks[0])
    def fails(network, batch): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): removal_losses(network, [rows()], fails)
    assert vars(network.blocks[1])["forward"] is theirs and not any(b._forward_hooks or b._forward_pre_hooks for b in network.blocks)


def test_blocks_that_cannot_go_are_refused(ids):
    class Narrows(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8 - i, 7 - i) for i in range(3))

        def forward(self, x):
            for b in self.blocks: x = b(x)
            return x
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    network = Narrows()
    with pytest.raises(ValueError, match=r"blocks.1, which makes \(4, 6\) of \(4, 7\)"), bypass(network, [1]): network(x)
    with pytest.raises(ValueError, match=r"blocks.0, which makes \(4, 7\) of \(4, 8\)"): removal_losses(Narrows(), [(x, y)])
    with pytest.raises(ValueError, match="returns more than hidden states"), bypass(bad := Chain(form=lambda x: (x, x)), [0]): bad(rows()[0])
    with pytest.raises(ValueError, match="without a list of blocks"): removal_losses(nn.Linear(3, 3), [(torch.randn(2, 3), torch.tensor([0, 1]))])
    shared = Chain()
    shared.blocks[3] = shared.blocks[1]
    with pytest.raises(ValueError, match="chain: got a block that stands in it more than once"): removal_losses(shared, [rows()])


def test_what_flows_past_the_blocks_is_noticed():
    class Skips(Chain):
        def forward(self, x):
            states = [x]
            for b in self.blocks: states.append(b(states[-1]))
            return self.out(sum(states))
    network, batch = Skips(), rows()
    with pytest.raises(ValueError, match="only hidden states flow"): removal_losses(network, [batch])
    found = removal_losses(network, [batch], restart=False)
    with torch.no_grad(), bypass(network, [2]): torch.testing.assert_close(found.without[2], batch_losses(network, batch).double())


def test_blocks_called_twice_need_whole_passes():
    network, (x, y) = Chain(), rows()
    def twice(network, batch): return batch_losses(network, batch) + batch_losses(network, (batch[0] + 1, batch[1]))
    with pytest.raises(ValueError, match="2 calls of blocks.0 in one pass"): removal_losses(network, [(x, y)], twice)
    found = removal_losses(network, [(x, y)], twice, restart=False)
    with torch.no_grad(), bypass(network, [4]): torch.testing.assert_close(found.without[4], twice(network, (x, y)).double())


def test_blocks_that_add_in_place():
    class InPlace(Plus):
        def forward(self, x): return x.add_(torch.tanh(self.layer(x)))
    network, plain = Chain(), Chain()
    for b in network.blocks: b.__class__ = InPlace
    network.forward = lambda x: Chain.forward(network, x.clone())
    torch.testing.assert_close(removal_losses(network, [rows()]).without, removal_losses(plain, [rows()]).without)


# ---- losses and influence

@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_removal_losses_are_those_of_shorter_networks(make, ids):
    network = make()
    found = removal_losses(network, [ids[:2], ids[2:]])
    assert found.without.shape == (4, 3) and found.whole.shape == (3,)
    for i in range(4):
        with torch.no_grad(): torch.testing.assert_close(found.without[i], batch_losses(drop_blocks(copy.deepcopy(network), [i]), ids).double(), rtol=1e-4, atol=1e-5)
    with torch.no_grad(): torch.testing.assert_close(batch_losses(network, ids).mean(), network(ids, labels=ids).loss, rtol=1e-4, atol=1e-5)


def test_batches_do_not_matter(ids):
    network = llama()
    one, many = removal_losses(network, [ids]), removal_losses(network, list(ids.split(1)))
    torch.testing.assert_close(one.without, many.without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(macro_influence(network, [ids]), macro_influence(network, list(ids.split(1))), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count(ids):
    network, mask = llama(), torch.ones_like(ids)
    mask[1, :4] = 0
    batch = dict(input_ids=ids, attention_mask=mask)
    found, alone = removal_losses(network, [batch]), removal_losses(network, [dict(input_ids=ids[1:2, 4:], position_ids=torch.arange(4, 10)[None], attention_mask=torch.ones(1, 6, dtype=torch.long))])
    positions = dict(batch, position_ids=torch.arange(10).expand(3, -1))
    torch.testing.assert_close(removal_losses(network, [positions]).without[:, 1], alone.without[:, 0], rtol=1e-3, atol=1e-4)
    for score in (block_influence, macro_influence):
        noise = dict(positions, input_ids=ids.masked_fill(mask == 0, 7))
        torch.testing.assert_close(score(network, [noise]), score(network, [positions]), rtol=1e-4, atol=1e-6)


def test_macro_influence_by_brute_force(ids):
    network = gpt2()
    with torch.no_grad():
        states = network.transformer(ids, output_hidden_states=True).hidden_states
        embedded = states[0]
        def last(skip):
            h = embedded
            for i, b in enumerate(network.transformer.h): h = h if i == skip else b(h)
            return h
        whole = last(None)
        exact = torch.stack([1 - cosine_similarity(whole, last(i), -1).mean() for i in range(4)])
    torch.testing.assert_close(macro_influence(network, [ids]), exact.double(), rtol=1e-4, atol=1e-5)


def test_influence_of_an_encoder(ids):
    bert = tiny(BertModel, BertConfig(vocab_size=48, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32, initializer_range=.3))
    found = macro_influence(bert, [ids])
    with torch.no_grad():
        whole = bert(ids).last_hidden_state
        for i in range(3):
            with bypass(bert, [i]): assert abs(found[i] - (1 - cosine_similarity(whole, bert(ids).last_hidden_state, -1).mean())) < 1e-5


def test_blocks_that_return_positions_too(ids):
    t5 = tiny(T5EncoderModel, T5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, initializer_factor=3.))
    found, bias = macro_influence(t5, [ids], "encoder.block"), None
    with torch.no_grad():
        def last(skip):
            h, bias = t5.encoder.embed_tokens(ids), None
            for i, b in enumerate(t5.encoder.block):
                out = b(h, position_bias=bias)
                h, bias = (h if i == skip else out[0]), out[1] # the first block makes the biases of all
            return h
        for i in range(3): assert abs(found[i] - (1 - cosine_similarity(last(None), last(i), -1).mean())) < 1e-5


def test_half_the_blocks_run():
    network = Chain(6)
    removal_losses(network, [rows(), rows()])
    assert sum(b.ran for b in network.blocks) == 2 * (6 + 15) + 3 # and half a pass to check
    for b in network.blocks: b.ran = 0
    macro_influence(network, [rows()])
    assert sum(b.ran for b in network.blocks) == 6 + 15 + 3
    for b in network.blocks: b.ran = 0
    iterative_removal(network, [rows()], 3)
    assert sum(b.ran for b in network.blocks) == (6 + 15) + (5 + 10) + (4 + 6) + checks(network)


def checks(network):
    "What it costs to check the flow in each of three steps: the blocks behind the middle that are still there."
    order = iterative_removal(copy.deepcopy(network), [rows()], 3).order
    return sum(len([b for b in range(3, 6) if b not in order[:step]]) for step in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype, ids):
    network = llama().to(dtype)
    for scores in (removal_losses(network, [ids]).harm, macro_influence(network, [ids]), block_influence(network, [ids])):
        assert scores.dtype == torch.float64 and scores.isfinite().all()


# ---- which go

def test_one_shot_takes_exactly_k_and_the_first_of_ties():
    assert one_shot(torch.zeros(5), 3) == [0, 1, 2] and one_shot(torch.zeros(5), 0) == [] and one_shot(torch.tensor([1., torch.nan, 0, 2]), 2) == [0, 2]
    for k in (-1, 2.): 
        with pytest.raises(ValueError, match="k: got"): one_shot(torch.zeros(5), k)


def test_iterative_removal_by_brute_force(ids):
    network, order = llama(), []
    found = iterative_removal(network, [ids], 3, candidates=[0, 1, 3])
    for _ in range(3):
        losses = {}
        for i in (0, 1, 3):
            if i in order: continue
            with torch.no_grad(), bypass(network, [*order, i]): losses[i] = batch_losses(network, ids).mean().item()
        order.append(min(losses, key=losses.get))
    assert found.order == order and found.losses.shape == (4, 3) and found.table.isnan().sum() == 3 * 4 - 6
    torch.testing.assert_close(found.losses[-1], batch_losses(drop_blocks(network, order), ids).double(), rtol=1e-4, atol=1e-5)


def test_a_generated_metric_needs_whole_passes(ids):
    network = llama()
    def wrong(network, batch): # of greedy continuations
        out = network.generate(batch[:, :6], max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=0)
        return (out[:, 6:] != batch[:, 6:9]).double().mean(1)
    assert len(iterative_removal(network, [ids], 1, wrong, restart=False).order) == 1


def test_bad_input_of_removal():
    network, batch = Chain(), rows()
    for k in (0, 5, 1.5):
        with pytest.raises(ValueError, match="k: got"): iterative_removal(network, [batch], k)
    with pytest.raises(ValueError, match="batches: got none"): removal_losses(network, [])
    with pytest.raises(ValueError, match="loss: got"): removal_losses(network, [batch], lambda n, b: batch_losses(n, b).mean())
    with pytest.raises(ValueError, match="candidates: got"): iterative_removal(network, [batch], 1, candidates=[0, 0])
    network.blocks[2].layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"): removal_losses(network, [batch])
    with pytest.raises(ValueError, match="batch: got"): removal_losses(llama(), [torch.zeros(2, 1, dtype=torch.long)])
    dropping = nn.Sequential(nn.Dropout(.5))
    network = Chain()
    network.drop = dropping
    with pytest.raises(ValueError, match="training mode"): removal_losses(network.train(), [batch])


# ---- by position, and training

def test_positions():
    plan = position_aware(torch.tensor([0., 0, 0, 0, 3, 1, 2, 2]), 2)
    assert plan.removed == [5, 6] and plan.frozen == [0, 1, 2, 3] and plan.weights[4] < plan.weights[7] and plan.weights.sum() == pytest.approx(2)
    assert position_aware(torch.arange(4.), 2).weights.sum() == 0 # nobody is left to learn
    assert position_aware(torch.tensor([1., 2, -5, 3]), 1, protected=.25).removed == [2]
    assert position_aware(torch.tensor([1., -1, -5, 3]), 1, protected=.25, weighting="proportional").weights.min() >= 0
    for bad, match in ((dict(weighting="even"), "weighting"), (dict(protected=1.5), "ratio"), (dict(k=3), "k: got 3")):
        with pytest.raises(ValueError, match=match): position_aware(**{**dict(sensitivities=torch.arange(4.), k=1), **bad})


def test_distilling_what_nothing_was_taken_from_changes_nothing():
    network = Chain()
    assert max(distil(copy.deepcopy(network), network, [], [rows()], steps=2)) == 0


def test_recover_puts_back_what_it_broke():
    network, before = Chain(), Chain().state_dict()
    steps = iter(range(9))
    def loss(n, b): return batch_losses(n, b) * (torch.nan if next(steps) == 2 else 1)
    with pytest.raises(ValueError, match="loss: got nan at step 2"): recover(network, [rows()], 5, loss)
    assert all(torch.equal(p, before[n]) for n, p in network.state_dict().items())
    losses = recover(network.requires_grad_(False), [rows()], 30, rate=1e-2)
    assert losses[-1] < losses[0] and not any(p.requires_grad or p.grad is not None for p in network.parameters())
