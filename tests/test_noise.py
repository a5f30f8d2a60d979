"Wrong labels, wrong tokens, and which tokens of an answer to learn from."
import copy
from functools import partial
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from whatmatters.core.values import seeded
from whatmatters.sparsity.noise import confident_learning, error_norms, first_learned, late_stopping, learned, truncated_losses
from whatmatters.sparsity.tokens import prompt_attention, recorded_attention, token_scores, tune_selected

fast = partial(torch.optim.Adam, lr=.02)


def net(): return nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 3))


def blobs(rows=150, noise=.2, seed=0):
    "Three clouds; some labels are wrong."
    g = seeded(seed)
    truth = torch.randint(3, (rows,), generator=g)
    x = torch.randn(rows, 6, generator=g) + 3 * one_hot(truth, 6)
    wrong = torch.rand(rows, generator=g) < noise
    return x, torch.where(wrong, (truth + torch.randint(1, 3, truth.shape, generator=g)) % 3, truth), truth, wrong


# ---- when an example is learned

@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_first_learned_by_brute_force(k):
    correct = torch.rand(12, 200, generator=seeded(k)) < .7
    expected = [next((e + 1.0 for e in range(k - 1, 12) if all(column[e - k + 1:e + 1])), float("inf")) for column in correct.T.tolist()]
    assert first_learned(correct, k).tolist() == expected


def test_asking_for_more_epochs_in_a_row_is_never_earlier():
    correct = torch.rand(10, 100, generator=seeded(0)) < .6
    one, two, three = (first_learned(correct, k) for k in (1, 2, 3))
    assert (one < two).logical_or(two.isinf()).all() and (two < three).logical_or(three.isinf()).all()


@pytest.mark.parametrize("correct, k, match", [(torch.ones(3, 2), 1, "correct: got torch.float32"), (torch.ones(3).bool(), 1, "correct"), (torch.ones(0, 2).bool(), 1, "correct"), (torch.ones(3, 2).bool(), 0, "k: got 0")])
def test_bad_input_of_first_learned_is_refused(correct, k, match):
    with pytest.raises(ValueError, match=match): first_learned(correct, k)


# ---- late stopping

def test_late_stopping_removes_wrong_labels_and_keeps_count():
    x, y, truth, wrong = blobs()
    told = []
    stopped = late_stopping(net, x, y, [0, 1], rounds=3, share=.92, epochs=50, final=5, optimizer=fast, batch_size=32, progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)] and stopped.kept.shape == (2, 150) and len(stopped.ensemble) == 2
    assert torch.equal(stopped.kept, stopped.rounds == 0) and stopped.rounds.max() <= 3
    for r in range(1, 4): # at least the share that is asked for stays, in each round
        before, after = (stopped.rounds == 0) | (stopped.rounds >= r), (stopped.rounds == 0) | (stopped.rounds > r)
        assert (after.sum(1) >= (before.sum(1) * .92).floor()).all()
    for removed in ~stopped.kept: assert removed.any() and wrong[removed].double().mean() > .7
    again = late_stopping(net, x, y, [0, 1], rounds=3, share=.92, epochs=50, final=5, optimizer=fast, batch_size=32)
    assert torch.equal(again.rounds, stopped.rounds) and torch.equal(again.ensemble.predict(x), stopped.ensemble.predict(x))


def test_members_have_labels_of_their_own():
    x, y, truth, wrong = blobs(90)
    other = (y + 1) % 3
    both = late_stopping(net, x, torch.stack([y, other]), [0, 0], rounds=2, share=.9, epochs=25, final=2, optimizer=fast)
    for row, labels in enumerate((y, other)):
        alone = late_stopping(net, x, labels, [0], rounds=2, share=.9, epochs=25, final=2, optimizer=fast)
        assert (alone.kept[0] == both.kept[row]).double().mean() > .9 # the same up to rounding in the sums


def test_a_round_that_does_not_get_there_removes_nothing():
    x, y, *_ = blobs(60, .4)
    stopped = late_stopping(net, x, y, [0], rounds=2, share=1., epochs=2, final=1, optimizer=partial(torch.optim.SGD, lr=1e-4))
    assert stopped.kept.all() and not stopped.rounds.any()


def test_epochs_one_by_one_go_on_with_the_optimiser():
    x, y, *_ = blobs(40)
    steps = partial(torch.optim.Adam, lr=.05)
    logits = learned(net, x, y, [2], epochs=5, optimizer=steps, batch_size=40) # a single batch: no order to draw
    with torch.random.fork_rng():
        torch.manual_seed(2)
        plain = net()
    optimizer = steps(plain.parameters())
    for e in range(5):
        cross_entropy(plain(x), y).backward()
        optimizer.step(), optimizer.zero_grad()
        torch.testing.assert_close(logits[e, 0], plain(x), atol=1e-4, rtol=1e-4)


def test_what_is_not_kept_is_not_learned_from():
    x, y, *_ = blobs(60)
    kept = torch.arange(60) < 40
    one, other = (learned(net, x, torch.where(kept, y, labels), [0], epochs=3, kept=kept[None], optimizer=fast) for labels in (torch.zeros_like(y), (y + 1) % 3))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("changed, match", [(dict(y=torch.zeros(30).long()), "one class only"), (dict(y=torch.arange(30) % 4), "y: got label 3; want 0 to 2"), (dict(x=torch.zeros(0, 6), y=torch.zeros(0).long()), "x: got no rows"), (dict(y=torch.arange(30) % 3 - 1), "labels below 0"), (dict(y=torch.rand(30)), "y: got torch.float32"), (dict(y=torch.arange(29) % 3), "y: got"),
                                            (dict(share=0.), "share"), (dict(final=0), "final"), (dict(rounds=0), "rounds"), (dict(epochs=0), "epochs"), (dict(most=0), "most")])
def test_bad_input_of_late_stopping_is_refused(changed, match):
    given = dict(x=torch.randn(30, 6, generator=seeded(0)), y=torch.arange(30) % 3) | changed
    with pytest.raises(ValueError, match=match): late_stopping(net, seeds=[0], **given)


def test_one_member_of_one_class_is_refused_and_the_kind_of_whole_number_does_not_matter():
    x, y, *_ = blobs(30)
    with pytest.raises(ValueError, match="one class only"): learned(net, x, torch.stack([y, y * 0]), [0, 1])
    assert torch.equal(learned(net, x, y.int(), [0], epochs=1), learned(net, x, y, [0], epochs=1))


# ---- confident learning

def probabilities(rows=400, classes=4, noise=.2, seed=0):
    g = seeded(seed)
    truth = torch.randint(classes, (rows,), generator=g)
    p = (torch.randn(rows, classes, generator=g) + 2.5 * one_hot(truth, classes)).double().softmax(-1)
    wrong = torch.rand(rows, generator=g) < noise
    return p, torch.where(wrong, (truth + 1) % classes, truth), wrong


def test_cleanlab_counts_and_ranks_alike():
    cleanlab = pytest.importorskip("cleanlab")
    from cleanlab import count, filter, rank
    p, y, wrong = probabilities()
    told = confident_learning(p, y)
    joint = count.estimate_joint(y.numpy(), p.numpy(), confident_joint=count.compute_confident_joint(y.numpy(), p.numpy(), calibrate=False))
    torch.testing.assert_close(told.joint, torch.from_numpy(joint), atol=1 / 400, rtol=0) # the peer rounds to whole examples
    peer = filter.find_label_issues(y.numpy(), p.numpy(), filter_by="confident_learning")
    assert (told.errors.numpy() == peer).mean() > .99
    margin = rank.get_normalized_margin_for_each_label(y.numpy(), p.numpy()) # (p_y - largest other + 1) / 2
    torch.testing.assert_close(told.scores, torch.from_numpy(1 - 2 * margin))
    assert wrong[told.errors].double().mean() > .8


def test_joint_is_a_distribution_with_the_labels_at_its_margin():
    p, y, _ = probabilities(seed=1)
    told = confident_learning(p, y)
    torch.testing.assert_close(told.joint.sum(1), torch.bincount(y) / len(y), check_dtype=False)
    assert told.joint.min() >= 0 and (told.joint.diagonal() > .1).all()


def test_suspicion_is_the_margin_of_label_quality():
    from whatmatters.attribution.examples import label_quality
    p, y, _ = probabilities()
    torch.testing.assert_close(confident_learning(p, y).scores, 1 - 2 * label_quality(p, y, "normalised margin", probabilities=True))


@pytest.mark.parametrize("p, y, match", [(torch.ones(4, 2) / 2, torch.zeros(4), "y: got torch.float32"), (torch.ones(0, 2), torch.zeros(0).long(), "probabilities: got shape .0, 2."), (torch.ones(4, 2) / 2, torch.zeros(4).long(), "all of 0 to 1"), (torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), "probabilities"), (torch.ones(4, 2) / 2, torch.tensor([0, 1, 2, 1]), "y: got labels from 0 to 2"),
                                         (torch.ones(4, 2) / 2, torch.tensor([0, 1, -1, 1]), "y: got labels from -1"), (torch.ones(4, 2) / 2, torch.zeros(3).long(), "probabilities: got shape")])
def test_bad_input_of_confident_learning_is_refused(p, y, match):
    with pytest.raises(ValueError, match=match): confident_learning(p, y)


# ---- tokens that are wrong

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_error_norms_without_one_hot_vectors(dtype):
    z, t = 3 * torch.randn(5, 9, 37, generator=seeded(0)).to(dtype), torch.randint(37, (5, 9), generator=seeded(1))
    norms = error_norms(z, t)
    torch.testing.assert_close(norms, (z.double().softmax(-1) - one_hot(t, 37)).norm(dim=-1).float(), atol=1e-5, rtol=1e-5)
    assert norms.max() <= 2 ** .5 + 1e-6 and not norms.requires_grad


def test_error_norms_keep_their_digits_where_the_model_is_sure():
    z = torch.zeros(1, 3, dtype=torch.float64)
    z[0, 0] = 16
    small = error_norms(z, torch.tensor([0]))
    torch.testing.assert_close(small, (z.softmax(-1) - torch.tensor([1., 0, 0])).norm(dim=-1).float(), rtol=1e-4, atol=0)


def test_what_is_ignored_counts_nowhere():
    z, t = torch.randn(2, 6, 11, generator=seeded(0), requires_grad=True), torch.randint(11, (2, 6), generator=seeded(1))
    t[0, 2:] = -100
    out = truncated_losses(z, t, share=.25)
    assert out.kept.sum() == 6 and not out.kept[0, 2:].any() and not out.losses[0, 2:].any() and not error_norms(z, t)[0, 2:].any() # 8 tokens, 2 dropped
    out.losses.sum().backward()
    assert not z.grad[~out.kept].any() and z.grad[out.kept].any()


@pytest.mark.parametrize("by", ["norm", "loss"])
def test_truncation_drops_the_highest_scores(by):
    z, t = torch.randn(40, 11, generator=seeded(0)), torch.randint(11, (40,), generator=seeded(1))
    scores = error_norms(z, t) if by == "norm" else cross_entropy(z, t, reduction="none")
    out = truncated_losses(z, t, share=.1, by=by)
    assert set(scores.topk(4).indices.tolist()) == set((~out.kept).nonzero()[:, 0].tolist())
    limit = float(scores.median())
    assert torch.equal(truncated_losses(z, t, threshold=limit, by=by).kept, scores <= limit)
    assert torch.equal(out.losses[out.kept], cross_entropy(z, t, reduction="none")[out.kept]) and truncated_losses(z, t, share=0., by=by).kept.all()


@pytest.mark.parametrize("changed, match", [(dict(targets=torch.tensor([0, 5])), "targets: got 5; want 0 to 4"), (dict(targets=torch.tensor([0, -1])), "targets: got -1"), (dict(targets=torch.tensor([0, 1, 2])), "targets: got torch.int64 of shape"),
                                            (dict(targets=torch.tensor([-100, -100])), "at least one token"), (dict(share=.1, threshold=1.), "at most one"), (dict(threshold=float("nan")), "threshold: got nan"), (dict(share=1.), "share: got 1.0"), (dict(by="entropy"), "by: got 'entropy'")])
def test_bad_input_of_truncation_is_refused(changed, match):
    with pytest.raises(ValueError, match=match): truncated_losses(torch.zeros(2, 5), **dict(targets=torch.tensor([0, 1])) | changed)


def test_a_share_leaves_a_token_and_a_broken_model_is_not_taken_for_odd_tokens():
    assert truncated_losses(torch.zeros(1, 5), torch.tensor([2]), share=.9).kept.all() and not truncated_losses(torch.zeros(1, 5), torch.tensor([2]), threshold=.1).kept.any()
    with pytest.raises(ValueError, match="scores: got 2 NaN"): truncated_losses(torch.full((2, 5), float("nan")), torch.tensor([0, 1]), threshold=1.)
    assert torch.equal(truncated_losses(torch.zeros(2, 5), torch.tensor([2, 3]).int(), share=.5).kept, torch.tensor([True, False])) # of equal scores the first stays


# ---- tokens to learn from

SIZES = dict(vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=.3)
MODELS = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)), "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
          "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=.3, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0))}


def model(name="llama"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().eval()


def batch(padded=False, seed=0):
    ids = torch.randint(30, (3, 10), generator=seeded(seed))
    labels = ids.masked_fill(torch.arange(10) < 4, -100)
    if not padded: return dict(input_ids=ids, labels=labels)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    return dict(input_ids=ids, labels=labels.masked_fill(mask == 0, -100), attention_mask=mask)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_recorded_attention_is_that_of_transformers(name, layer):
    network, ids = model(name), batch()["input_ids"]
    with torch.no_grad(), recorded_attention(network, layer) as kept: network(ids)
    assert network.config._attn_implementation == "sdpa" and not any(m._forward_hooks for m in network.modules())
    network.set_attn_implementation("eager")
    with torch.no_grad(): torch.testing.assert_close(kept[0], network(ids, output_attentions=True).attentions[layer])
    prompt = torch.arange(10).expand(3, -1) < 4
    share = prompt_attention(kept[0], prompt)
    assert share.shape == (3, 9) and torch.allclose(share[:, :3], torch.ones(3, 3)) and 0 <= share.min() and share[:, 3:].max() < 1


def test_an_error_inside_gives_the_fast_attention_back():
    network = model()
    with pytest.raises(RuntimeError), recorded_attention(network): raise RuntimeError
    assert network.config._attn_implementation == "sdpa" and not any(m._forward_hooks for m in network.modules())


def test_scores_add_up():
    g = seeded(0)
    now, past, attention = (torch.rand(4, 7, generator=g) for _ in range(3))
    valid = torch.rand(4, 7, generator=g) < .8
    for row in range(4):
        gain = (past - now)[row, valid[row]]
        expected = .3 * (gain - gain.min()) / (gain.max() - gain.min()) + .7 * attention[row, valid[row]]
        torch.testing.assert_close(token_scores(now, valid, history=past, attention=attention, gamma=.3)[row, valid[row]], expected)
    same = token_scores(now, valid, history=now, attention=attention) # before the first step nothing has changed
    torch.testing.assert_close(same[valid], .5 * attention[valid])
    assert torch.equal(token_scores(now, valid, reference=past), now - past) and torch.equal(token_scores(now, valid, history=past), past - now)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_tokens_is_plain_fine_tuning(name):
    b, network = batch(True), model(name)
    tuned = tune_selected(copy.deepcopy(network), [b], "all", epochs=2, clip=1e9, optimizer=partial(torch.optim.SGD, lr=.01))
    optimizer = torch.optim.SGD(network.train().parameters(), lr=.01)
    for step in range(2):
        out = network(**b).loss
        assert abs(out.item() - tuned.losses[step]) < 1e-4
        out.backward(), optimizer.step(), optimizer.zero_grad()
    for p, q in zip(network.parameters(), tuned.network.parameters()): torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("by", ["reference", "history", "attention", "both"])
def test_the_share_of_each_answer_is_learned_from_and_padding_never(by):
    batches, reference = [batch(True), batch(seed=1)], model("qwen2") if by == "reference" else None
    before = [p.clone() for p in reference.parameters()] if reference else []
    tuned = tune_selected(model(), batches, by, ratio=.5, reference=reference, epochs=2)
    assert [k.sum(1).tolist() for k in tuned.kept] == [[2, 3, 3], [3, 3, 3]] and len(tuned.losses) == 4 # of answers of 4 and 6 tokens
    assert not tuned.kept[0][0, 7:].any() and not any(k[:, :3].any() for k in tuned.kept)
    assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(reference.parameters(), before)) if reference else True
    assert not tuned.network.training and all(p.requires_grad for p in tuned.network.parameters())


def padded(side):
    "Two rows with questions of 3 and 5 tokens and answers of 4 and 6."
    g, lengths = seeded(0), ((3, 4), (5, 6))
    ids, labels, mask = torch.zeros(2, 11, dtype=torch.long), torch.full((2, 11), -100), torch.zeros(2, 11, dtype=torch.long)
    for row, (question, answer) in enumerate(lengths):
        n = question + answer
        at = slice(11 - n, 11) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = torch.randint(30, (n,), generator=g), 1
        labels[row, at] = ids[row, at].masked_fill(torch.arange(n) < question, -100)
    return dict(input_ids=ids, labels=labels, attention_mask=mask)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("by", ["all", "both", "reference"])
def test_padding_on_the_left_is_padding_on_the_right(name, by):
    past = model(name)
    with torch.no_grad():
        for p in past.parameters(): p.mul_(1.1)
    run = lambda batch, by=by, **o: tune_selected(model(name), [batch], by, epochs=2, reference=past if by == "reference" else None, optimizer=partial(torch.optim.SGD, lr=.1), **o)
    left, right = run(padded("left"), ratio=.5), run(padded("right"), ratio=.5)
    assert left.losses == pytest.approx(right.losses, rel=1e-4)
    on = lambda tuned, side: [row[labels[1:] != -100].tolist() for row, labels in zip(tuned.kept[0], padded(side)["labels"])]
    assert on(left, "left") == on(right, "right") and (by == "all" or left.kept[0].sum(1).tolist() == [2, 3])
    whole, all_of_them = run(padded("left"), ratio=1.), run(padded("left"), "all") if by != "reference" else run(padded("left"), ratio=1.)
    for p, q in zip(whole.network.parameters(), all_of_them.network.parameters()): torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_a_short_answer_keeps_a_token_and_padding_has_no_label():
    short = dict(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[-100, -100, 3]]))
    tuned = tune_selected(model(), [short], "both", ratio=.3, epochs=3) # .3 of one token rounds to none
    assert all(l == l for l in tuned.losses) and tuned.kept[0].tolist() == [[False, True]] and all(p.isfinite().all() for p in tuned.network.parameters())
    labelled = dict(input_ids=torch.tensor([[1, 2, 3, 0]]), labels=torch.tensor([[-100, 2, 3, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))
    assert tune_selected(model(), [labelled], "all").kept[0].tolist() == [[True, True, False]]


def test_gradients_from_before_do_not_count():
    used, fresh = model(), model()
    for p in used.parameters(): p.grad = torch.ones_like(p)
    for network in (used, fresh): tune_selected(network, [batch()], "history")
    assert all(torch.equal(p, q) for p, q in zip(used.parameters(), fresh.parameters()))


def test_a_moving_history_is_between_the_model_and_its_past():
    batches = [batch(seed=s) for s in range(3)]
    run = lambda **o: tune_selected(model(), batches, "history", epochs=2, optimizer=partial(torch.optim.SGD, lr=.5), **o)
    fixed, slow, quick = run(), run(ema=.999999), run(ema=0.)
    assert all(torch.equal(a, b) for a, b in zip(fixed.kept, slow.kept)) # hardly moves
    first = quick.kept[0] # the history is the model: no gains, of equal scores the first ones
    assert torch.equal(first, first[:1].expand_as(first)) and first[0].tolist() == [False] * 3 + [True] * 4 + [False] * 2


@pytest.mark.parametrize("changed, match", [(dict(by="loss"), "by: got 'loss'"), (dict(by="reference"), "reference: got NoneType"), (dict(ratio=0.), "ratio"), (dict(ema=1.), "ema"), (dict(batches=[]), "batches: got none"), (dict(epochs=0), "epochs"),
                                            (dict(batches=[torch.zeros(2, 3).long()]), "batches: got Tensor"), (dict(batches=[dict(input_ids=torch.ones(1, 4).long(), labels=torch.full((1, 4), -100))]), "without an answer"), (dict(batches=[dict(input_ids=torch.ones(1, 4).long(), labels=torch.ones(1, 3).long())]), "batches: got input_ids .1, 4., labels .1, 3."),
                                            (dict(gamma=2.), "gamma"), (dict(layer=3), "layer: got 3")])
def test_bad_input_of_tuning_is_refused(changed, match):
    with pytest.raises(ValueError, match=match): tune_selected(**dict(network=model(), batches=[batch()]) | changed)


def test_what_has_no_attention_is_refused():
    with pytest.raises(ValueError, match="network: got Linear"), recorded_attention(nn.Linear(2, 2)): pass
    with pytest.raises(ValueError, match="prompt"): prompt_attention(torch.ones(1, 1, 3, 3), torch.ones(1, 4).bool())
