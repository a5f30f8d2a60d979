"Sizes of embeddings: gradients through a step looked ahead, the search by hand, tables that are really smaller, and bad input."
import copy
from functools import partial
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from whatmatters.sparsity import embeddings as E


def seeded(seed): return torch.Generator().manual_seed(seed)


class Model(nn.Module):
    "Two soft tables, and something else that is trained."
    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.user, self.item, self.head = E.SoftEmbedding(torch.tensor([0, 1, 0, 1]), 3, .5, 1), E.SoftEmbedding(torch.tensor([0, 0, 1, 2, 2]), 3, .5, 2), nn.Linear(3, 1)
        self.to(dtype)
        self.calls = 0

    def forward(self, pairs):
        self.calls += 1
        return self.head(self.user(pairs[:, 0]) * self.item(pairs[:, 1]))[:, 0]


def loss(network, batch): return ((network(batch[0]) - batch[1]) ** 2).mean()


def batch(n, seed, dtype=torch.float32):
    g = seeded(seed)
    return torch.stack([torch.randint(4, (n,), generator=g), torch.randint(5, (n,), generator=g)], 1), torch.randn(n, generator=g).to(dtype)


@pytest.mark.parametrize("unroll", [0., .4])
def test_gradient_through_the_step(unroll):
    "Finite differences of all entries of both selections, in double precision; the network stays as it is."
    network, train, held = Model(torch.float64), batch(20, 1, torch.float64), batch(15, 2, torch.float64)
    for e in (network.user, network.item): e.alpha.data.uniform_(.2, 1, generator=seeded(3))
    state = copy.deepcopy(network.state_dict())
    found = E.selection_gradient(network, train, held, loss, unroll, normalise=False)
    assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items()) and all(p.grad is None for p in network.parameters())
    def value(name, change):
        other = copy.deepcopy(network)
        other.get_parameter(name).data += change
        weights = [p for n, p in other.named_parameters() if "alpha" not in n]
        for w, g in zip(weights, torch.autograd.grad(loss(other, train), weights)): w.data -= unroll * g
        return loss(other, held).item()
    assert set(found) == {"user.alpha", "item.alpha"}
    for name, g in found.items():
        for i in range(g.numel()):
            step = torch.zeros(g.numel(), dtype=torch.float64)
            step[i] = 1e-5
            assert (value(name, step.view(g.shape)) - value(name, -step.view(g.shape))) / 2e-5 == pytest.approx(g.flatten()[i].item(), abs=1e-8)


def test_normalised_gradients_forget_the_scale():
    "A block whose gradient is a thousand times smaller moves as far; one without a gradient stays."
    network = Model()
    plain = E.selection_gradient(network, None, batch(30, 1), loss, normalise=False)["item.alpha"]
    found = E.selection_gradient(network, None, batch(30, 1), loss)["item.alpha"]
    torch.testing.assert_close(found, plain / plain.abs().mean(1, keepdim=True))
    rare = batch(30, 1)
    rare[0][:, 1] = 0
    found = E.selection_gradient(network, None, rare, loss)["item.alpha"]
    assert (found[1:] == 0).all() and found[0].abs().mean() == pytest.approx(1)


@pytest.mark.parametrize("unroll, calls", [(0., 2), (.1, 3)])
def test_search_by_hand(unroll, calls):
    "Two steps of alpha and weights in turn, written out; forward passes counted."
    network, train, held = Model(), [batch(16, s) for s in (1, 2)], [batch(16, s) for s in (3, 4)]
    other = copy.deepcopy(network)
    sgd = partial(torch.optim.SGD, lr=.2)
    losses = E.search_sizes(network, train, held, loss, sgd, rate=.3, unroll=unroll, l1=.5)
    assert network.calls == 2 * calls and losses.shape == (2,)
    weights = [p for n, p in other.named_parameters() if "alpha" not in n]
    for t, h in zip(train, held):
        for n, g in E.selection_gradient(other, t, h, loss, unroll).items(): other.get_parameter(n).data = (other.get_parameter(n).data - .3 * (g + .5)).clamp(0, 1)
        for w, g in zip(weights, torch.autograd.grad(loss(other, t), weights)): w.data -= .2 * g
    for n, p in network.named_parameters(): torch.testing.assert_close(p, other.get_parameter(n))
    for e in (network.user, network.item): assert e.alpha.min() >= 0 and e.alpha.max() <= 1 and e.alpha.min() < 1


def test_rate_zero_is_plain_training():
    network, data = Model(), [batch(16, s) for s in range(5)]
    other = copy.deepcopy(network)
    E.search_sizes(network, data, data, loss, partial(torch.optim.Adam, lr=.01), rate=0.)
    stepper = torch.optim.Adam([p for n, p in other.named_parameters() if "alpha" not in n], lr=.01)
    for b in data:
        stepper.zero_grad()
        loss(other, b).backward()
        stepper.step()
    for n, p in network.named_parameters(): torch.testing.assert_close(p, other.get_parameter(n))
    assert (network.item.alpha == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["block", "entry"])
@pytest.mark.parametrize("limit", [dict(threshold=.8), dict(budget=.3), dict(budget=1.), dict(threshold=1e9)])
def test_narrow_tables(dtype, how, limit, tmp_path):
    "Lookups by brute force, sizes in memory and on disk, a round trip through safetensors."
    g = seeded(1)
    table, blocks = torch.randn(40, 7, generator=g).to(dtype), torch.randint(4, (40,), generator=g)
    table[blocks == 2] *= 3
    small = E.narrowed(table, blocks if how == "block" else None, **limit)
    if how == "entry": keep = table.abs() >= limit["threshold"] if "threshold" in limit else torch.zeros(280, dtype=torch.bool).index_fill(0, table.abs().flatten().argsort(descending=True, stable=True)[:int(limit["budget"] * 280 + .5)], True).view(40, 7)
    else:
        size = torch.stack([(table[blocks == b].double() ** 2).mean(0).sqrt() for b in range(4)])
        if "threshold" in limit: chosen = size >= limit["threshold"]
        else:
            chosen, room = torch.zeros_like(size, dtype=torch.bool), int(limit["budget"] * 280 + .5)
            for i in size.flatten().argsort(descending=True, stable=True):
                room -= int((blocks == i // 7).sum())
                if room < 0: break
                chosen.view(-1)[i] = True
        keep = chosen[blocks]
    wanted = torch.where(keep, table, 0)
    for ids in (torch.arange(40), torch.randint(40, (3, 5), generator=g), torch.tensor(7), torch.zeros(0, dtype=torch.long)):
        assert torch.equal(small(ids), wanted[ids]) and small(ids).dtype == dtype
    assert sum(p.numel() for p in small.parameters()) == keep.sum()
    save_file(small.state_dict(), tmp_path/"table.safetensors")
    assert (tmp_path/"table.safetensors").stat().st_size < small.bytes + 1500
    again = type(small).of_state(load_file(tmp_path/"table.safetensors"))
    assert torch.equal(again(torch.arange(40)), wanted) and again.widths == small.widths and again.bytes == small.bytes
    assert small.bytes == sum(t.numel() * t.element_size() for t in small.state_dict().values())


def test_gradients_of_narrow_tables():
    "Twice the same id in a batch adds up; the rest of the table has no gradient."
    table, blocks = torch.randn(10, 4, generator=seeded(1)), torch.tensor([0] * 5 + [1] * 5)
    ids, g = torch.tensor([3, 3, 8]), torch.randn(3, 4, generator=seeded(2))
    mixed, ragged = E.narrowed(table, blocks, budget=.6), E.narrowed(table, budget=.6)
    for small in (mixed, ragged):
        small(ids).backward(g)
        dense = torch.zeros(10, 4).index_add(0, ids, g)
        if small is ragged:
            at = small.columns.long(), torch.repeat_interleave(torch.arange(10), small.starts.diff())
            torch.testing.assert_close(small.values.grad, dense[at[1], at[0]])
        else:
            for b, t in enumerate(small.tables): torch.testing.assert_close(t.grad, dense[blocks == b][:, getattr(small, f"dimensions_{b}").long()])


def test_blocks_by_frequency():
    counts = torch.randint(50, (33,), generator=seeded(1))
    blocks = E.frequency_blocks(counts, 4)
    assert sorted(blocks.bincount().tolist()) == [8, 8, 8, 9]
    for b in range(3): assert counts[blocks == b].min() >= counts[blocks == b + 1].max()
    assert E.frequency_blocks(torch.ones(6), 3).tolist() == [0, 0, 1, 1, 2, 2] # ties by index
    assert E.frequency_blocks(torch.ones(6), 1).tolist() == [0] * 6


@pytest.mark.parametrize("call, message", [
    (lambda: E.frequency_blocks(torch.ones(3), 5), "blocks: got 5 of 3 features"), (lambda: E.frequency_blocks(torch.tensor([1., torch.nan])), "counts: got 1 NaN"),
    (lambda: E.SoftEmbedding(torch.tensor([0., 1.]), 3), "blocks: got torch.float32"), (lambda: E.SoftEmbedding(torch.tensor([0]), 0), "dimensions: got 0"),
    (lambda: E.search_sizes(Model(), [1], [], loss), "train, validation: got 1 and 0"), (lambda: E.search_sizes(Model(), [], [], loss), "train, validation: got 0"),
    (lambda: E.search_sizes(Model(), [1], [1], loss, rate=-1), "rate, l1"), (lambda: E.search_sizes(nn.Linear(2, 2), [1], [1], loss), "without a SoftEmbedding"),
    (lambda: E.narrowed(torch.ones(3, 2)), "threshold, budget"), (lambda: E.narrowed(torch.ones(3, 2), budget=2.), "budget: got 2"), (lambda: E.narrowed(torch.ones(3), threshold=.1), "table: got shape"),
    (lambda: E.narrowed(torch.ones(3, 2), torch.zeros(2, dtype=torch.long), threshold=.1), "blocks: got shape")])
def test_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_a_failed_search_says_where():
    network, bad = Model(), batch(8, 1)
    bad[1][0] = torch.nan
    with pytest.raises(ValueError, match="got .* at step|NaN"): E.search_sizes(network, [bad], [batch(8, 2)], loss)
