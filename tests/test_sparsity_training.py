"Masks in the ensemble trainer; sparsity found while training: gradients, transformers, plain layers afterwards, tickets by hand, costs, and bad input."
from functools import partial
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from whatmatters.core.ensemble import own_inputs, train_ensemble
from whatmatters.core.keep import top
from whatmatters.sparsity import training as T


def seeded(seed): return torch.Generator().manual_seed(seed)


def make(): return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def data():
    x = torch.randn(120, 12, generator=seeded(0))
    return x, (x[:, :3] + .3 * torch.randn(120, 3, generator=seeded(1))).argmax(1)


def batches(data, steps, size=16, seed=0):
    g = seeded(seed)
    for _ in range(steps):
        rows = torch.randint(len(data[1]), (size,), generator=g)
        yield data[0][rows], data[1][rows]


def loss(network, batch): return cross_entropy(network(batch[0]), batch[1])


def fresh(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


# the ensemble trainer

@pytest.mark.parametrize("optimizer", [partial(torch.optim.Adam, lr=1e-2, fused=True), partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=.1)])
@pytest.mark.parametrize("group", [1, 2, None])
def test_masks_of_members(data, optimizer, group):
    "What a mask leaves out stays zero; a mask that keeps all changes nothing; members do not see each other's."
    masks = {"0.weight": torch.rand(3, 16, 12, generator=seeded(2)) < .5, "2.bias": torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()}
    masks["0.weight"][1] = True
    train = partial(train_ensemble, make, *data, optimizer=optimizer, epochs=3, batch_size=32)
    masked, plain = train([4, 5, 6], masks=masks, group=group), train([5])
    for n, m in masks.items(): assert torch.equal(masked.parameters[n] != 0, m)
    for n, p in plain.parameters.items(): torch.testing.assert_close(masked.parameters[n][1], p[0], rtol=1e-4, atol=1e-6)
    assert masked.member(0)[0].weight[~masks["0.weight"][0]].abs().max() == 0


def test_members_go_on_where_others_ended(data):
    "Two halves by hand: SGD has no memory, so that two times two epochs with the same order are two trainings after each other."
    sgd = partial(torch.optim.SGD, lr=.1)
    first = train_ensemble(make, *data, [0, 1], epochs=2, optimizer=sgd)
    before = {n: p.clone() for n, p in first.parameters.items()}
    second = train_ensemble(make, *data, [7, 7], epochs=2, optimizer=sgd, initial=first.parameters)
    assert all(torch.equal(first.parameters[n], p) for n, p in before.items()) # start values are copied
    for i in range(2):
        network = first.member(i).train()
        stepper, order = sgd(network.parameters()), seeded(7)
        for _ in range(2):
            for rows in torch.randperm(120, generator=order).split(64):
                stepper.zero_grad()
                loss(network, (data[0][rows], data[1][rows])).backward()
                stepper.step()
        torch.testing.assert_close(second.parameters["0.weight"][i], network[0].weight.data, rtol=1e-4, atol=1e-6)
    some = train_ensemble(make, *data, [0, 1], epochs=1, initial={"2.bias": torch.ones(2, 3)}, optimizer=partial(torch.optim.SGD, lr=0.))
    assert (some.parameters["2.bias"] == 1).all() and torch.equal(some.parameters["0.weight"][1], fresh(1)[0].weight) # names left out start from the seed


def test_start_values_of_buffers_and_of_modules():
    def normed(): return nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network = normed()
    network[1].running_mean.fill_(3)
    ensemble = train_ensemble(normed, torch.randn(20, 12), torch.randint(2, (20,)), [0], epochs=1, initial=[network], optimizer=partial(torch.optim.SGD, lr=0.))
    assert torch.equal(ensemble.parameters["0.weight"][0], network[0].weight) and (ensemble.buffers["1.running_mean"] > 1).all()


@pytest.mark.parametrize("bad, message", [
    (dict(masks={"0.weight": torch.ones(2, 16, 12)}), "masks: got torch.float32"), (dict(masks={"0.weight": torch.ones(16, 12, dtype=torch.bool)}), "masks: got shape"),
    (dict(masks={"weight": torch.ones(2, 16, 12, dtype=torch.bool)}), "masks: got 'weight'"), (dict(initial={"0.weight": torch.full((2, 16, 12), torch.nan)}), "initial: got 384 NaN"),
    (dict(initial=[fresh()]), "initial: got 1 modules; want 2")])
def test_ensemble_refuses(data, bad, message):
    with pytest.raises(ValueError, match=message): train_ensemble(make, *data, [0, 1], epochs=1, **bad)


# masks

@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_straight_through(per, dtype):
    scores = torch.randn(6, 10, generator=seeded(3)).to(dtype).requires_grad_()
    mask = T.straight_through(scores, .7, per)
    assert mask.dtype == dtype and torch.equal(mask.bool(), top(scores.detach(), ratio=.3, per=per)) and set(mask.unique().tolist()) == {0, 1}
    g = torch.randn(6, 10, generator=seeded(4)).to(dtype)
    assert torch.equal(torch.autograd.grad(mask, scores, g)[0], g)
    assert T.straight_through(torch.zeros(4, 5), .5).sum() == 10 # ties: exactly as many, the first


def test_schedule_is_the_formula():
    for t in (0, 13, 50, 77, 100):
        share = min(max((t / 100 - .2) / .5, 0), 1)
        assert T.cubic_schedule(t, 100, .8, .3, .2, .3) == pytest.approx(.8 - .5 * (1 - share) ** 3)


# networks

def bert():
    import transformers
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    import transformers
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.))


@pytest.mark.parametrize("method", T.METHODS)
@pytest.mark.parametrize("architecture", [bert, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers(architecture, method, dtype, tmp_path):
    "Trained, made plain, saved and loaded by transformers as if nothing had been."
    network = architecture().to(dtype)
    inside = network.bert.encoder if architecture is bert else network.transformer.h
    ids, y = torch.randint(50, (8, 10), generator=seeded(5)), torch.randint(3, (8,), generator=seeded(6))
    before, keys, flags = network(ids).logits, list(network.state_dict()), [p.requires_grad for p in network.parameters()]
    originals = {n: m.weight.detach().clone() for n, m in inside.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    sparse = T.sparsify(inside, method, rank=2, generator=0)
    assert set(sparse) == set(originals) and torch.equal(network(ids).logits, before)
    if method == "pst": assert {n.split(".")[-1] for n, p in inside.named_parameters() if p.requires_grad and "parametrizations" in n} == set("ABRCUV")
    logits = lambda n, b: cross_entropy((n(b[0]).logits if architecture is bert else n(b[0]).logits[:, -1, :3]).float(), b[1])
    losses = T.train_sparse(network, [(ids, y)] * 12, logits, .6, partial(torch.optim.Adam, lr=1e-2))
    assert losses[-1] < losses[0]
    after, masks = network(ids).logits, T.finalise(inside)
    torch.testing.assert_close(network(ids).logits, after)
    assert list(network.state_dict()) == keys and [p.requires_grad for p in network.parameters()] == flags
    for n, m in masks.items():
        weight = inside.get_submodule(n).weight
        assert (weight[~m] == 0).all() and m.sum() == int(.4 * m.numel() + .5 + 1e-9) and weight.dtype == dtype
        assert not torch.signbit(weight[~m]).any()
    network.save_pretrained(tmp_path)
    torch.testing.assert_close(type(network).from_pretrained(tmp_path, dtype=dtype)(ids).logits, network(ids).logits)


def test_convolutions_and_rows():
    network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    x = torch.randn(3, 2, 8, 8)
    before = network(x)
    T.sparsify(network, "pst", rank=1, per="row", generator=0)
    torch.testing.assert_close(network(x), before)
    T.set_sparsity(network, {"0": .5, "3": .25})
    masks = T.finalise(network)
    assert (masks["0"].flatten(1).sum(1) == 9).all() and masks["0"].shape == (6, 2, 3, 3) and (masks["3"].sum(1) == 162).all()


def test_model_calls_and_modes(data):
    "One forward pass per batch; the mode and the sparsity are as they should be afterwards."
    network, calls = fresh().eval(), []
    network.register_forward_hook(lambda m, i, o: calls.append((m.training, float((m[0].weight == 0).double().mean()))))
    T.sparsify(network, "movement", skip="2")
    T.train_sparse(network, batches(data, 20), loss, .5, partial(torch.optim.SGD, lr=.1), before=.25, after=.25)
    assert len(calls) == 20 and all(training for training, _ in calls) and not network.training
    assert [s for _, s in calls[:6]] == [0.] * 6 and [s for _, s in calls[15:]] == [.5] * 5
    assert T.sparse_weights(network)["0"].sparsity == .5


def test_same_seed_same_bits(data):
    def run():
        network = fresh()
        T.sparsify(network, "pst", rank=2, generator=3)
        T.train_sparse(network, batches(data, 10), loss, .5)
        T.finalise(network)
        return network.state_dict()
    a, b = run(), run()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_movement_prunes_what_moves_to_zero():
    "A weight whose gradient pulls it towards zero is dropped though it is large; one that is pushed away stays though it is small."
    network = nn.Sequential(nn.Linear(4, 1, bias=False))
    network[0].weight.data = torch.tensor([[2., .1, 2., .1]])
    x, target = torch.eye(4), torch.tensor([[0.], [1.], [0.], [1.]])
    T.sparsify(network, "movement")
    T.train_sparse(network, [(x, target)] * 5, lambda n, b: ((n(b[0]) - b[1]) ** 2).sum(), .5, partial(torch.optim.SGD, lr=.01), before=.5, after=.2)
    assert T.finalise(network)["0"].tolist() == [[False, True, False, True]]


def test_nothing_changes_when_a_network_is_refused():
    network = fresh()
    network[0].weight.data[0, 0] = torch.nan
    state = {n: t.clone() for n, t in network.state_dict().items()}
    with pytest.raises(ValueError, match="weight of 0: got 1 NaN"): T.sparsify(network)
    assert list(network.state_dict()) == list(state) and all(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="loss: got nan at step 0"):
        other = fresh()
        T.sparsify(other, "magnitude")
        T.train_sparse(other, [(torch.full((2, 12), torch.nan), torch.zeros(2).long())], loss, .5)
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="self_attn.out_proj of a MultiheadAttention"): T.sparsify(attention)
    assert list(T.sparsify(attention, skip="self_attn*")) == ["linear1", "linear2"]
    with pytest.raises(ValueError, match="names among linear1"): T.set_sparsity(attention, {"linear3": .5})
    with pytest.raises(ValueError, match="sparsity: got 1"): T.set_sparsity(attention, 1.)
    with pytest.raises(ValueError, match="batches: got none"): T.train_sparse(attention, [], loss, .5)
    for bad in (1.5, "half", None):
        with pytest.raises(ValueError, match=f"final: got {bad}"): T.train_sparse(attention, [0], loss, bad)
    with pytest.raises(ValueError, match="sparsity: got 'half'"): T.straight_through(torch.ones(2, 2), "half")
    recurrent = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="network: got 0, a LSTM, for whose weight_ih_l0 there is no rule"): T.sparsify(recurrent)
    assert list(T.sparsify(recurrent, skip="0")) == ["1"] and list(T.sparsify(nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2)))) == ["2"]


def test_layers_are_made_sparse_in_two_goes_and_experts_are_refused():
    from transformers import MixtralConfig, MixtralModel
    network = fresh()
    assert list(T.sparsify(network, "movement", skip="2")) == ["0"] and list(T.sparsify(network, "pst", skip="0")) == ["2"]
    experts = MixtralModel(MixtralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2))
    with pytest.raises(ValueError, match="network: got layers.0.mlp.experts, a MixtralExperts, for whose gate_up_proj there is no rule"): T.sparsify(experts)


def test_a_training_that_fails_leaves_the_parameters_and_the_mode(data):
    network, steps = fresh().eval(), []
    T.sparsify(network, "movement")
    T.set_sparsity(network, .25)
    before = {n: p.clone() for n, p in network.named_parameters()}
    def fails(network, batch): return loss(network, batch) * (torch.nan if steps.append(1) or len(steps) == 4 else 1)
    with pytest.raises(ValueError, match="loss: got nan at step 3"): T.train_sparse(network, batches(data, 8), fails, .5)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in network.named_parameters()) and not network.training
    assert {s.sparsity for s in T.sparse_weights(network).values()} == {.25}


def test_trained_parameters_by_hand():
    network = fresh()
    T.sparsify(network, "pst", skip="2", rank=3, delta_rank=1)
    assert T.trained_parameters(network) == (3 * 28 + 28 + 28 + 16 * 3 + 3, 12 * 16 + 16 + 16 * 3 + 3)
    assert T.trained_parameters(network, skip="2.*")[0] == 3 * 28 + 28 + 28


def test_energy_of_nothing():
    with pytest.raises(ValueError, match="scores"): T.energy(torch.zeros(3, 3))


# tickets

@pytest.mark.parametrize("score", ["magnitude", "increase"])
@pytest.mark.parametrize("per", ["tensor", "model"])
def test_tickets_by_hand(data, score, per):
    "One seed, a plain loop of training, pruning and rewinding."
    options = dict(epochs=2, optimizer=partial(torch.optim.SGD, lr=.2), batch_size=40)
    tickets = T.lottery_tickets(make, *data, [3], rounds=2, share=.4, score=score, per=per, **options)
    masks = {n: torch.ones_like(fresh(3).get_parameter(n), dtype=torch.bool) for n in ("0.weight", "2.weight")}
    for t in tickets:
        network, order = fresh(3), seeded(3)
        stepper = torch.optim.SGD(network.parameters(), lr=.2)
        with torch.no_grad():
            for n, m in masks.items(): network.get_parameter(n).mul_(m)
        for _ in range(2):
            for rows in torch.randperm(120, generator=order).split(40):
                stepper.zero_grad()
                loss(network, (data[0][rows], data[1][rows])).backward()
                stepper.step()
                with torch.no_grad():
                    for n, m in masks.items(): network.get_parameter(n).mul_(m)
        for n, p in network.named_parameters(): torch.testing.assert_close(t.ensemble.parameters[n][0], p.data, rtol=1e-4, atol=1e-6)
        for n, m in masks.items(): assert torch.equal(t.masks[n][0], m)
        scores = {n: (network.get_parameter(n).detach().abs() - (fresh(3).get_parameter(n).detach().abs() if score == "increase" else 0)).masked_fill(~m, -torch.inf) for n, m in masks.items()}
        pools = [list(masks)] if per == "model" else [[n] for n in masks]
        for pool in pools:
            flat = torch.cat([scores[n].flatten() for n in pool])
            k = int(.6 * sum(int(masks[n].sum()) for n in pool) + .5 + 1e-9)
            chosen = torch.zeros_like(flat, dtype=torch.bool)
            chosen[flat.argsort(descending=True, stable=True)[:k]] = True
            masks.update({n: c.view(masks[n].shape) for n, c in zip(pool, chosen.split([masks[n].numel() for n in pool]))})


def test_tickets_rewind_and_leave_parameters_out(data):
    options = dict(epochs=2, optimizer=partial(torch.optim.SGD, lr=.2))
    tickets = T.lottery_tickets(make, *data, [0, 1], rounds=1, share=.5, parameters=["0.weight"], rewind=1, **options)
    start = train_ensemble(make, *data, [0, 1], epochs=1, optimizer=options["optimizer"]).parameters
    again = train_ensemble(make, *data, [0, 1], initial=start, masks=tickets[1].masks, **options)
    assert list(tickets[1].masks) == ["0.weight"] and tickets[1].kept == .5 and (tickets[1].ensemble.parameters["2.weight"] != 0).all()
    for n, p in again.parameters.items(): assert torch.equal(p, tickets[1].ensemble.parameters[n])
    with pytest.raises(ValueError, match="share: got 0.9; want one that leaves a weight of 2.bias"): T.lottery_tickets(make, *data, [0], share=.9, parameters=["2.bias"], epochs=1)


def test_class_tickets_with_data_of_their_own():
    "Members with inputs of their own are trained and judged on these; the cost is the lowest that is enough."
    x, y = torch.randn(2, 150, 6, generator=seeded(8)), torch.rand(2, 150, generator=seeded(9)) < .2
    x[..., 0] += 1.5 * y
    y = y.long()
    def small(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    options = dict(epochs=4, optimizer=partial(torch.optim.Adam, lr=1e-2))
    find = lambda costs: T.class_tickets(small, own_inputs(x[:, :90]), y[:, :90], [0, 1], (own_inputs(x[:, 90:]), y[:, 90:]), costs=costs, rounds=1, share=.5, **options)
    both, alone = find([1, 5]), [find([c]) for c in (1, 5)]
    negatives = torch.stack([a[1].negatives for a in alone])
    allowed = both[0].negatives
    for i in range(2):
        which = 0 if negatives[0, i] <= allowed[i] else 1 if negatives[1, i] <= allowed[i] else int(negatives[:, i].argmin())
        assert both[1].cost[i] == (1, 5)[which] and both[1].accepted[i] == (negatives[which, i] <= allowed[i])
        torch.testing.assert_close(both[1].ensemble.parameters["0.weight"][i], alone[which][1].ensemble.parameters["0.weight"][i], rtol=1e-4, atol=1e-5)
    missed, alarms = T.class_errors(both[1].ensemble.predict(own_inputs(x[:, 90:]), n=60), y[:, 90:])
    assert torch.equal(missed, both[1].negatives) and torch.equal(alarms, both[1].positives)
    said = both[1].ensemble.member(1)(x[1, 90:]).argmax(1)
    assert missed[1] == ((y[1, 90:] == 1) & (said == 0)).sum() and alarms[1] == ((y[1, 90:] == 0) & (said == 1)).sum()
