"ReAGent, learned masks, cross-task evaluation, ranking agreement, attention and the soft metrics: planted truths, brute force, costs, bad input."
import math
from pathlib import Path
import pytest
import torch
from torch import nn
from whatmatters.core.absence import draw_masked, draw_tokens
from whatmatters.attribution.text import (attention_rollout, cross_task, gate_open, hard_concrete, learned_mask,
                                          ranking_agreement, raw_attention, reagent, suppress_context)
from whatmatters.core import experiments, ledger
from whatmatters.core.values import count_calls
from whatmatters.evaluation.soft import soft_comprehensiveness, soft_sufficiency

MODELS = Path(__file__).parent.parent.parent/"shared/models"
V, T = 12, 9


def language_model(seed=0):
    "Next-token distribution that depends on all tokens, a little by place, and mostly on the token in place 3."
    g = torch.Generator().manual_seed(seed)
    table, place = torch.randn(V, V, generator=g), torch.rand(T, generator=g) * .3
    place[3] = 4.
    return lambda ids: (table[ids] * place[:ids.shape[1], None]).sum(1).softmax(-1)


IDS = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
P = language_model()
TARGET = int(P(IDS[None]).argmax())
ANY = draw_tokens(torch.ones(V))


def test_reagent_is_what_a_plain_loop_gives():
    "One run, one step after the other, as the reference implementation does it."
    ratio, keep, top_k, most = .3, .2, 1, 200
    found = reagent(P, IDS, TARGET, ANY, runs=1, ratio=ratio, keep=keep, top_k=top_k, steps=most, at_once=5, generator=4)
    g = torch.Generator().manual_seed(4)
    logits, before, steps, stopped = torch.rand(1, T, generator=g)[0], P(IDS[None])[0, TARGET], 0, False
    while steps < most and not stopped:
        u = torch.rand(3, 1, T, generator=g)[:, 0]
        gone = u[0] < ratio
        delta = before - P(torch.where(gone, ANY(IDS, gone, u[1]), IDS)[None])[0, TARGET]
        logits = logits + torch.where(gone, 1., -1.) * torch.logit((1 + delta) / 2)
        kept = torch.zeros(T, dtype=torch.bool)
        kept[logits.argsort(descending=True)[:math.ceil(keep * T)]] = True
        p = P(torch.where(kept, IDS, ANY(IDS, ~kept, u[2]))[None])[0]
        steps, stopped = steps + 1, TARGET in p.topk(top_k).indices
    torch.testing.assert_close(found.scores, logits.softmax(-1))
    assert found.steps.tolist() == [steps] and found.stopped.tolist() == [stopped] and 1 < steps


def test_reagent_finds_the_planted_token_and_costs_what_it_says():
    counted = count_calls(P)
    found = reagent(counted, IDS, TARGET, ANY, runs=6, steps=40, top_k=0)
    assert found.scores.argmax() == 3 and found.scores.sum() == pytest.approx(1) and not found.stopped.any()
    assert (found.calls, found.rows) == (counted.calls, counted.rows) and found.rows == 1 + 6 * 40
    stopping = reagent(P, IDS, TARGET, ANY, runs=6, at_once=4, top_k=1, keep=.12)
    least = 1 + 2 * int(stopping.steps.sum())
    assert stopping.stopped.all() and least <= stopping.rows <= least + 2 * 6 * 3


def test_reagent_does_not_depend_on_chunk_or_steps_at_once():
    run = lambda **options: reagent(P, IDS, TARGET, draw_tokens(torch.arange(V) + 1.), top_k=1, keep=.12, generator=2, **options)
    whole = run(at_once=1)
    for options in (dict(at_once=3), dict(at_once=64, chunk=5), dict(chunk=1)):
        torch.testing.assert_close(run(**options).runs, whole.runs)
        assert torch.equal(run(**options).steps, whole.steps)


def test_reagent_leaves_alone_who_does_not_play():
    players, seen = torch.ones(T, dtype=torch.bool), []
    players[[0, 3]] = False
    watched = lambda ids: seen.append(ids) or P(ids)
    found = reagent(watched, IDS, TARGET, ANY, players, steps=10)
    assert (found.scores[[0, 3]] == 0).all() and all((ids[:, [0, 3]] == IDS[[0, 3]]).all() for ids in seen)


def test_reagent_stays_finite_where_a_probability_goes_from_one_to_zero():
    sure = lambda ids: torch.stack([ids[:, 2] == IDS[2], ids[:, 2] != IDS[2]], 1).float()
    found = reagent(sure, IDS, 0, lambda ids, gone, u: (ids + 1) % V, steps=20, top_k=0)
    assert found.runs.isfinite().all() and found.scores.argmax() == 2
    flat = reagent(lambda ids: torch.full((len(ids), V), 1 / V), IDS, 3, ANY, steps=7) # ties: never among the first
    assert not flat.stopped.any() and flat.steps.tolist() == [7] * 5


def test_reagent_takes_low_precision_and_halves_on_out_of_memory():
    def small(ids):
        if len(ids) > 6: raise torch.OutOfMemoryError("CUDA out of memory")
        return P(ids).bfloat16()
    assert reagent(small, IDS, TARGET, ANY, steps=30, top_k=0).scores.argmax() == 3


@pytest.mark.parametrize("bad, message", [
    (dict(ids=IDS[:0]), "ids: got"), (dict(ids=IDS[None]), "ids: got"), (dict(ids=IDS.float()), "ids: got"), (dict(target=V), f"target: got {V}"), (dict(target=-1), "target: got -1"),
    (dict(runs=0), "runs: got 0"), (dict(steps=0), "steps: got 0"), (dict(steps=2.5), "steps: got 2.5"), (dict(at_once=0), "at_once: got 0"), (dict(ratio=0.), "ratio: got 0.0"), (dict(keep=1.), "keep: got 1.0"),
    (dict(players=torch.zeros(T, dtype=torch.bool)), "players: got"), (dict(probabilities=lambda ids: P(ids) / 0), "probabilities: got"), (dict(probabilities=lambda ids: P(ids)[0]), "probabilities: got")])
def test_reagent_refuses(bad, message):
    with pytest.raises(ValueError, match=message): reagent(**{**dict(probabilities=P, ids=IDS, target=TARGET, replace=ANY), **bad})


def test_replacements():
    ids, gone = torch.zeros(4000, 3, dtype=torch.long), torch.tensor([True, True, False]).expand(4000, 3)
    u = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    def fill(masked): # the first place depends on what stands, unmasked, in the last; the second is uniform over 1 and 2
        assert (masked[:, :2] == 9).all() and (masked[:, 2] == 0).all()
        p = torch.zeros(len(masked), 3, 10)
        p[:, 0, 7], p[:, 1, 1:3], p[:, 2, 0] = 1, .5, 1
        return p
    drawn = draw_masked(fill, mask=9)(ids, gone, u)
    assert (drawn[:, 0] == 7).all() and (drawn[:, 2] == 0).all() and .47 < (drawn[:, 1] == 1).float().mean() < .53 and set(drawn[:, 1].tolist()) == {1, 2}
    edge = draw_tokens(torch.tensor([0., 1, 0]))(ids[:1], gone[:1], torch.tensor([[0., 1 - 2 ** -24, .5]]))
    assert edge.tolist() == [[1, 1, 0]]
    for weights in (torch.zeros(3), torch.tensor([1., -1]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="weights: got"): draw_tokens(weights)
    with pytest.raises(ValueError, match="fill: got"): draw_masked(lambda ids: torch.ones(2, 5), 9)(ids, gone, u)


@pytest.mark.parametrize("options", [dict(), dict(temperature=2 / 3, stretch=(-.1, 1.1))])
def test_expected_gates(options):
    a = torch.tensor([-4., -1, 0, 2], requires_grad=True)
    u = torch.rand(50_000, 1, generator=torch.Generator().manual_seed(0))
    gates = hard_concrete(a, u, **options)
    assert 0 <= gates.min() and gates.max() <= 1 and (gates == 0).any()
    torch.testing.assert_close((gates > 0).float().mean(0), gate_open(a, **options), rtol=0, atol=.01)
    assert (torch.autograd.grad(gates[:, 2].sum(), a)[0][2] > 0) and (torch.autograd.grad(gate_open(a, **options).sum(), a)[0] > 0).all()
    with pytest.raises(ValueError, match="stretch"): gate_open(a, stretch=(.1, 1.))
    with pytest.raises(ValueError, match="temperature"): hard_concrete(a, u, temperature=0.)


def encoder():
    "A small transformer whose class is told by token 4 alone, by construction of its embeddings and head; attention mixes everything."
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    body = BertModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32, hidden_dropout_prob=0., attention_probs_dropout_prob=0.), add_pooling_layer=False).eval()
    head = nn.Linear(16, 3)
    def f(x, real, places):
        hidden = body(inputs_embeds=x, attention_mask=real, position_ids=places).last_hidden_state
        return 6 * head((hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True))
    return body.get_input_embeddings(), f


@pytest.mark.parametrize("side", ["right", "left"])
def test_learned_mask_is_the_same_alone_and_padded(side):
    embedding, f = encoder()
    texts = [torch.tensor(t) for t in ([4, 7, 9, 3, 11, 5], [8, 4, 2], [6, 1, 13, 4])]
    alone, width = [], 6
    for t in texts: alone.append(learned_mask(f, embedding(t)[None].detach(), steps=40, args=(torch.ones(1, len(t)), torch.arange(len(t))[None])))
    pad = lambda t: torch.cat([t, t.new_zeros(width - len(t))] if side == "right" else [t.new_zeros(width - len(t)), t])
    ids, real = torch.stack([pad(t) for t in texts]), torch.stack([pad(torch.ones(len(t), dtype=torch.long)) for t in texts])
    places = (real.cumsum(1) - 1).clamp_min(0)
    both = learned_mask(f, embedding(ids).detach(), valid=real.bool(), steps=40, args=(real.float(), places))
    for i, (t, a) in enumerate(zip(texts, alone)):
        torch.testing.assert_close(both.scores[i][real[i].bool()], a.scores[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(both.divergence[i], a.divergence[0], rtol=0, atol=1e-4)
    assert (both.scores[real == 0] == 0).all()
    parts = learned_mask(f, embedding(ids).detach(), valid=real.bool(), steps=40, args=(real.float(), places), chunk=2)
    torch.testing.assert_close(parts.scores, both.scores, rtol=0, atol=1e-4)


DIRECTION = torch.tensor([0., 0, 3, 0, 2, 0])
def both_needed(x): return torch.stack([x[..., 0] @ DIRECTION[:x.shape[1]] - 4, torch.zeros(len(x))], 1)


def test_learned_mask_keeps_what_is_needed_and_counts():
    x = torch.ones(2, 6, 4)
    counted = count_calls(both_needed)
    found = learned_mask(counted, x, steps=200, generator=1)
    assert (found.scores > .5).tolist() == [[False, False, True, False, True, False]] * 2 and (found.divergence <= .1).all()
    assert counted.rows == 2 * 202 and counted.calls == 202
    assert torch.equal(learned_mask(both_needed, x, steps=200, generator=1).scores, found.scores)
    low = learned_mask(lambda x: both_needed(x.float()), x.bfloat16(), steps=200, generator=1)
    assert low.scores.dtype == torch.bfloat16 and torch.equal(low.scores > .5, found.scores > .5)
    nothing = learned_mask(lambda x: torch.stack([x[..., 0].sum(1) * 0, torch.zeros(len(x))], 1), x)
    assert (nothing.scores < .1).all() # a model that does not look needs no token
    def small(x):
        if len(x) > 1: raise torch.OutOfMemoryError("CUDA out of memory")
        return both_needed(x)
    torch.testing.assert_close(learned_mask(small, x, steps=200, generator=1).scores, found.scores)


def test_a_learned_baseline_makes_tokens_superfluous():
    "Where every embedding is near the same vector, the learned baseline goes there, and no token is needed."
    x = torch.ones(4, 5, 3) + .01 * torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    f = lambda x: torch.stack([x.mean((1, 2)) * 8 - 4, torch.zeros(len(x))], 1)
    given, learned = learned_mask(f, x, baseline=0.), learned_mask(f, x, baseline=0., learn_baseline=True)
    assert learned.baseline.shape == (3,) and learned.baseline.mean() > .4
    assert learned.scores.mean() < given.scores.mean() - .2


@pytest.mark.parametrize("bad, message", [
    (dict(x=torch.ones(2, 6)), "x: got shape"), (dict(x=torch.ones(0, 6, 4)), "x: got shape"), (dict(x=torch.ones(2, 6, 4) / 0), "x: got"), (dict(x=torch.ones(2, 6, 4, dtype=torch.long)), "x: got"),
    (dict(valid=torch.zeros(2, 6, dtype=torch.bool)), "no tokens"), (dict(valid=torch.ones(2, 5)), "valid: got"), (dict(margin=0.), "margin: got"), (dict(steps=0), "steps: got"), (dict(rate=-1.), "rate: got"),
    (dict(f=lambda x: x[:, 0, :1]), "f: got"), (dict(f=lambda x: both_needed(x) / 0), "f: got"), (dict(baseline=torch.ones(7)), "baseline: got"), (dict(baseline=torch.ones(6, 4), learn_baseline=True), "baseline: got"), (dict(args=(torch.ones(3),)), "args.0.: got")])
def test_learned_mask_refuses(bad, message):
    with pytest.raises(ValueError, match=message): learned_mask(**{**dict(f=both_needed, x=torch.ones(2, 6, 4)), **bad})


def test_cross_task_masks_exactly_that_many():
    ids = torch.arange(1, 11).expand(6, 10).clone()
    ids[:, 8:] = 99 # two that do not count
    valid, seen = ids != 99, []
    predict = lambda ids: seen.append(ids) or torch.nn.functional.one_hot((ids == 3).any(1).long(), 2).float()
    tried = cross_task(predict, ids, torch.ones(6, dtype=torch.long), torch.arange(10.).expand(6, 10), fill=0, ratios=(.25, .5), valid=valid, draws=2, chunk=4)
    assert [int((s == 0).sum(1).unique()) for s in seen] == [2] * 6 + [4] * 6 and all((s[:, 8:] == 99).all() for s in seen)
    assert tried.correct.tolist() == [[1., 0.]] * 6 # the word 3 is third from below: it stays when two go, not when four do
    assert cross_task(predict, ids, torch.ones(6, dtype=torch.long), torch.arange(10.).expand(6, 10), 0, (.5,), "top", valid).correct.all()
    a, b = (cross_task(predict, ids, torch.ones(6, dtype=torch.long), torch.rand(6, 10), 0, (.5,), valid=valid, chunk=c, draws=30) for c in (1, 100))
    assert torch.equal(a.random, b.random) and .3 < a.random.mean() < .7
    for bad, message in ((dict(mask="middle"), "mask: got"), (dict(scores=torch.ones(6, 3)), "scores: got"), (dict(targets=torch.ones(2)), "targets: got"), (dict(ratios=(1.5,)), "ratio: got"), (dict(draws=0), "draws: got")):
        with pytest.raises(ValueError, match=message): cross_task(**{**dict(predict=predict, ids=ids, targets=torch.ones(6), scores=torch.ones(6, 10), fill=0), **bad})


@pytest.mark.parametrize("k, p", [(1, .9), (4, 1.), (7, .5), (50, .98)])
def test_ranking_agreement_by_brute_force(k, p):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(k))
    lists, n = logits.argsort(-1, descending=True).tolist(), min(k, 7)
    brute = lambda a, b: sum(p ** (d - 1) * len(set(a[:d]) & set(b[:d])) / d for d in range(1, n + 1)) / sum(p ** (d - 1) for d in range(1, n + 1))
    found = ranking_agreement(logits, k, p)
    torch.testing.assert_close(found, torch.tensor([[brute(a, b) for b in lists] for a in lists]))
    torch.testing.assert_close(found, ranking_agreement(logits.softmax(-1), k, p)) # an order is an order
    for bad in (dict(k=0), dict(persistence=0.), dict(persistence=1.1), dict(logits=logits[0]), dict(logits=logits / 0)):
        with pytest.raises(ValueError): ranking_agreement(**{**dict(logits=logits), **bad})


def test_suppression():
    g = torch.Generator().manual_seed(0)
    maps, agree = torch.rand(5, 8, generator=g), torch.rand(5, 5, generator=g)
    torch.testing.assert_close(suppress_context(maps, torch.ones(5, 5)), maps)
    found = suppress_context(maps, agree)
    torch.testing.assert_close(found[0], maps[0]) # nothing comes before the first
    assert (found <= maps + 1e-6).all() and (found >= 0).all()
    for t in range(1, 5): # by hand
        mean = maps[:t].mean(0)
        scale = (maps[t] @ mean) / (mean @ mean)
        torch.testing.assert_close(found[t], (maps[t] - scale * ((1 - agree[t, :t, None]) * maps[:t]).sum(0) / t).clamp_min(0))
    torch.testing.assert_close(suppress_context(maps * 5, agree), found * 5)
    torch.testing.assert_close(suppress_context(maps, agree, context=torch.zeros(5, 5, dtype=torch.bool)), maps)
    torch.testing.assert_close(suppress_context(maps, agree, scale=0.), maps)
    assert suppress_context(torch.ones(3, 4), torch.zeros(3, 3))[1:].abs().max() < 1e-6 # maps that are all context leave nothing
    for bad in (dict(maps=maps[0]), dict(agreement=agree[:3]), dict(agreement=agree + 1), dict(scale=-1.), dict(maps=maps / 0)):
        with pytest.raises(ValueError): suppress_context(**{**dict(maps=maps, agreement=agree), **bad})


def test_attention_of_a_real_architecture():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2, n_positions=16, attn_implementation="eager")).eval()
    attentions = network(torch.randint(30, (2, 7)), output_attentions=True).attentions
    rolled = attention_rollout(attentions)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 7))
    brute = torch.eye(7)
    for a in attentions: brute = (a[0].mean(0) + torch.eye(7)) / 2 @ brute
    torch.testing.assert_close(rolled[0], brute)
    torch.testing.assert_close(raw_attention(attentions, None), torch.stack(attentions).mean((0, 2)))
    assert attention_rollout([a.bfloat16() for a in attentions]).dtype == torch.float32
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[:, 0] = False
    assert (attention_rollout(attentions, valid=valid)[..., 0] == 0).all() and (raw_attention(attentions, valid=valid)[..., 0] == 0).all()
    for none in (None, (), (None, None, None)):
        for score in (attention_rollout, raw_attention):
            with pytest.raises(ValueError, match="eager"): score(none)
    for bad in (dict(layer=3), dict(valid=valid[:1]), dict(attentions=[attentions[0][..., :3]])):
        with pytest.raises(ValueError): raw_attention(**{**dict(attentions=attentions), **bad})
    with pytest.raises(ValueError, match="residual"): attention_rollout(attentions, residual=1.5)


def test_soft_metrics_by_hellinger_distance():
    "A model that sees nothing after thinning everything: with equal scores half of every embedding goes."
    g = torch.Generator().manual_seed(0)
    weight = torch.rand(5, 6, 4, generator=g)
    f, x = lambda x: torch.einsum("bth,thc->bc", x, weight).softmax(-1), torch.randn(3, 5, 6, generator=g)
    whole, nothing = f(x), f(x * 0)
    most = (whole.sqrt() - nothing.sqrt()).norm(dim=1) / 2 ** .5
    one = torch.tensor([[1., 0, 0, 0, 0]]).expand(3, 5) # all of the first token, nothing of the others
    apart = lambda p: (whole.sqrt() - p.sqrt()).norm(dim=1) / 2 ** .5
    alone, without = x * one[..., None], x * (1 - one)[..., None]
    torch.testing.assert_close(soft_sufficiency(f, x, one), (most - apart(f(alone))).clamp_min(0) / most)
    torch.testing.assert_close(soft_comprehensiveness(f, x, one), apart(f(without)) / most)
    torch.testing.assert_close(soft_sufficiency(f, x, one * 7 - 3), soft_sufficiency(f, x, one)) # scaled to [0, 1]
    a, b = (soft_comprehensiveness(f, x, torch.rand(3, 5, generator=torch.Generator().manual_seed(1)), chunk=c) for c in (1, None))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["reagent", "ranking_correlation"])
def test_experiments_on_a_real_llama(name, tmp_path):
    if not (MODELS/"stories260K/hf").is_dir(): pytest.skip("no model stories260K")
    path, ran = experiments.run(name, "smoke", dict(model=str(MODELS/"stories260K/hf")), tmp_path, engine="warm")
    assert ran and ledger.read_run(path).claims and "/stories260K" not in "".join(c["says"] for c in ledger.read_run(path).claims)


def test_cross_task_on_real_sentences(real, tmp_path):
    given = dict(data=[real("esnli"), real("sst2")], length=24)
    assert ledger.read_run(experiments.run("cross_task", "smoke", given, tmp_path, engine="warm")[0]).claims
