"Scores of training examples from predictions, training dynamics and gradients; spectra of gradients."
import copy
import math
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from whatmatters.attribution import spectra
from whatmatters.attribution.examples import (area_under_margin, cartography, dynamics, el2n, forgetting, grand, label_quality, out_of_fold, pointwise_v_information, predictions,
                                              variance_of_gradients)
from whatmatters.attribution.spectra import effective_rank, nuclear_norm
from whatmatters.core.data import Data, load
from whatmatters.core.ensemble import checkpoints, train_ensemble
from whatmatters.core.planted import detection, planted
from whatmatters.core.values import count_calls, seeded


def mlp(): return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16, num_labels=3)).eval()


def named():
    ids = torch.randint(1, 50, (5, 9), generator=seeded(1))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 2, 1, 1, 0])


# ---- predictions and errors

def test_el2n_is_one_forward_pass(blobs):
    x, y = blobs
    networks = [count_calls(mlp()) for _ in range(3)]
    el2n(predictions(networks, x, batch_size=50), y)
    assert [(n.calls, n.rows) for n in networks] == [(3, 150)] * 3


def test_predictions_of_transformers_do_not_depend_on_the_batch(bert):
    batch, y = named()
    whole = predictions(bert, batch)
    assert whole.shape == (1, 5, 3) and not whole.requires_grad
    torch.testing.assert_close(predictions([bert, bert], {**batch, "labels": y}, batch_size=2)[1], whole[0])
    with pytest.raises(ValueError, match="networks: got none"): predictions([], batch)


def test_el2n_by_hand():
    outputs = torch.randn(4, 7, 5, generator=seeded(0), dtype=torch.float64)
    y = torch.randint(5, (7,), generator=seeded(1))
    expected = torch.stack([torch.stack([(outputs[m, i].softmax(0) - torch.eye(5, dtype=torch.float64)[y[i]]).norm() for i in range(7)]) for m in range(4)]).mean(0)
    torch.testing.assert_close(el2n(outputs, y), expected)
    torch.testing.assert_close(el2n(outputs.softmax(-1), y, probabilities=True), expected)
    assert el2n(outputs.to(torch.bfloat16), y).dtype == torch.float32
    sure = torch.eye(5)[y]
    assert el2n(sure, y, probabilities=True).max() == 0 and torch.allclose(el2n(sure, (y + 1) % 5, probabilities=True), torch.tensor(math.sqrt(2)))


@pytest.mark.parametrize("outputs, y, message", [
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "y: got labels from 0 to 3; want 0 to 2"),
    (torch.zeros(4, 3), torch.tensor([0, -1, 2, 1]), "y: got labels from -1 to 2"),
    (torch.zeros(4, 3), torch.zeros(5).long(), r"y: got .*want classes of shape \(4,\)"),
    (torch.zeros(4, 3), torch.zeros(4), "y: got torch.float32"),
    (torch.zeros(4, 1), torch.zeros(4).long(), "at least two classes"),
    (torch.full((4, 3), torch.nan), torch.zeros(4).long(), "outputs: got 12 NaN"),
    (torch.zeros(0, 3), torch.zeros(0).long(), "outputs: got shape"),
    ([1, 2], torch.zeros(2).long(), "outputs: got list")], ids=range(8))
def test_outputs_and_labels_are_checked(outputs, y, message):
    for score in (el2n, pointwise_v_information, label_quality):
        with pytest.raises(ValueError, match=message): score(outputs, y)
    with pytest.raises(ValueError, match=message): dynamics([outputs], y)


def test_probabilities_are_checked():
    with pytest.raises(ValueError, match="want probabilities that add up to 1"): el2n(torch.ones(2, 2), torch.tensor([0, 1]), probabilities=True)
    with pytest.raises(ValueError, match="want probabilities that add up to 1"): label_quality(torch.tensor([[1.5, -.5]]), torch.tensor([0]), probabilities=True)


def test_grand_is_the_mean_norm_of_gradients(bert, blobs):
    x, y = blobs
    ensemble = train_ensemble(mlp, x, y, range(2), epochs=1)
    def norm(network, i):
        loss = nn.functional.cross_entropy(network(x[i:i + 1]), y[i:i + 1])
        return sum(g.square().sum() for g in torch.autograd.grad(loss, list(network.parameters()))).sqrt()
    expected = torch.stack([torch.stack([norm(ensemble.member(m), i) for i in range(5)]) for m in range(2)]).mean(0)
    torch.testing.assert_close(grand(ensemble, (x, y))[:5], expected, rtol=1e-3, atol=1e-5)
    batch, labels = named()
    loss = bert(**{k: t[3:4] for k, t in batch.items()}, labels=labels[3:4]).loss
    head = torch.autograd.grad(loss, [bert.classifier.weight, bert.classifier.bias])
    torch.testing.assert_close(grand(bert, {**batch, "labels": labels}, parameters=["classifier.*"])[3], sum(g.square().sum() for g in head).sqrt(), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="networks: got none"): grand([], (x, y))


# ---- dynamics

def test_dynamics_streams_and_agrees_with_loops(blobs):
    outputs = torch.randn(3, 2, 8, 4, generator=seeded(0))
    y = torch.randint(4, (8,), generator=seeded(1))
    course = dynamics((o for o in outputs), y)
    for e in range(3):
        for m in range(2):
            for i in range(8):
                z = outputs[e, m, i]
                others = torch.cat([z[:y[i]], z[y[i] + 1:]])
                assert torch.allclose(course.probability[e, m, i], z.softmax(0)[y[i]]) and torch.allclose(course.margin[e, m, i], z[y[i]] - others.max())
                assert bool(course.correct[e, m, i]) == bool(z.argmax() == y[i])
    one = dynamics(outputs[:, 0], y)
    assert torch.equal(one.margin[:, 0], course.margin[:, 0])
    torch.testing.assert_close(area_under_margin(course.margin), course.margin.mean((0, 1)))
    with pytest.raises(ValueError, match="outputs: got none"): dynamics([], y)
    with pytest.raises(ValueError, match="the same at every epoch"): dynamics([outputs[0], outputs[0, :1]], y)


def slow_forgetting(trend):
    "As one would count by hand: learnt, then wrong."
    if not any(trend): return len(trend)
    return sum(a and not b for a, b in zip(trend, trend[1:]))


def test_forgetting_counts():
    correct = torch.rand(9, 3, 40, generator=seeded(0)) < torch.linspace(0, 1, 40)
    expected = torch.tensor([[slow_forgetting(correct[:, m, i].tolist()) for i in range(40)] for m in range(3)], dtype=torch.float64).mean(0)
    torch.testing.assert_close(forgetting(correct), expected)
    assert forgetting(correct).argmax() == 0 and (forgetting(correct, never=torch.inf)[0] == torch.inf) == bool((~correct.any(0))[:, 0].any())
    for bad in (correct.float(), correct[0, 0], [True]):
        with pytest.raises(ValueError, match="correct: got .*epochs first"): forgetting(bad)
    with pytest.raises(ValueError, match="correct: got one epoch"): forgetting(correct[:1])


def test_cartography_by_hand():
    p = torch.tensor([[.2, .9], [.4, .9], [.6, .9]])
    found = cartography(p, p > .5)
    torch.testing.assert_close(found.confidence, torch.tensor([.4, .9]))
    torch.testing.assert_close(found.variability, torch.tensor([(2 * .04 / 3) ** .5, 0.]))
    torch.testing.assert_close(found.correctness, torch.tensor([1 / 3, 1.]))
    with pytest.raises(ValueError, match="correct: got shape"): cartography(p, (p > .5)[:, :1])
    with pytest.raises(ValueError, match="want probabilities in \\[0, 1\\]"): cartography(3 * p, p > .5)
    with pytest.raises(ValueError, match="margin: got torch.int64"): area_under_margin(torch.ones(3, 2).long())


# ---- gradients of the input

def test_variance_of_gradients_by_brute_force(blobs):
    x, y = blobs[0][:20], blobs[1][:20]
    networks = [w.member(0) for w in checkpoints(mlp, *blobs, [0], epochs=3)]
    gradients = []
    for network in networks:
        at = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(network(at)[torch.arange(20), y].sum(), at)[0])
    raw = torch.stack(gradients).std(0, correction=0).mean(1)
    torch.testing.assert_close(variance_of_gradients(networks, x, y, normalise=False, chunk=7), raw, rtol=1e-4, atol=1e-6)
    scores = variance_of_gradients(networks, x, y)
    for c in range(3):
        of = raw[y == c]
        torch.testing.assert_close(scores[y == c], (of - of.mean()) / of.std(correction=0), rtol=1e-3, atol=1e-4)
    counted = [count_calls(n) for n in networks]
    variance_of_gradients(counted, x, y)
    assert [c.rows for c in counted] == [20] * 4
    assert torch.equal(variance_of_gradients([networks[1]] * 3, x, y), torch.zeros(20)) # nothing varies


def test_variance_of_gradients_of_texts_leaves_padding_out(bert):
    batch, y = named()
    other = copy.deepcopy(bert)
    with torch.no_grad():
        for p in other.parameters(): p.add_(.05 * torch.randn(p.shape, generator=seeded(2)))
    def reads(network, mask): return lambda e: network(inputs_embeds=e, attention_mask=mask.expand(len(e), -1)).logits
    def embedded(network, ids): return network.get_input_embeddings()(ids).detach()
    row = slice(2, 3)
    mask, ids = batch["attention_mask"][row], batch["input_ids"][row]
    padded = variance_of_gradients([reads(n, mask) for n in (bert, other)], [embedded(n, ids) for n in (bert, other)], y[row], normalise=False, valid=mask.bool())
    cut = variance_of_gradients([reads(n, mask[:, :6]) for n in (bert, other)], [embedded(n, ids[:, :6]) for n in (bert, other)], y[row], normalise=False)
    torch.testing.assert_close(padded, cut, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="valid: got rows without"): variance_of_gradients([reads(bert, mask)] * 2, embedded(bert, ids), y[row], valid=torch.zeros_like(mask).bool())


def test_variance_of_gradients_refuses(blobs):
    x, y = blobs
    network = mlp()
    with pytest.raises(ValueError, match="networks: got 1 checkpoints"): variance_of_gradients([network], x, y)
    with pytest.raises(ValueError, match="x: got 1 sets of inputs"): variance_of_gradients([network] * 2, [x], y)
    with pytest.raises(ValueError, match="y: got shape"): variance_of_gradients([network] * 2, x, y[:5])
    with pytest.raises(ValueError, match="classes: got numbers from 0 to 3"): variance_of_gradients([network] * 2, x[:4], torch.arange(4))
    with pytest.raises(ValueError, match="x: got torch.int64"): variance_of_gradients([network] * 2, x.long(), y)
    with pytest.raises(ValueError, match="y: got torch.float32"): variance_of_gradients([network] * 2, x, y.float())
    with pytest.raises(ValueError, match="valid: got torch.bool of shape"): variance_of_gradients([network] * 2, x, y, valid=torch.ones(5).bool())


# ---- information and labels

def test_information_of_a_model_that_learnt_frequencies_is_none():
    y = torch.tensor([0, 0, 0, 1])
    frequencies = torch.tensor([.75, .25]).log().expand(4, -1)
    torch.testing.assert_close(pointwise_v_information(frequencies, y), torch.zeros(4))
    torch.testing.assert_close(pointwise_v_information(frequencies, y, null=torch.zeros(2)), torch.tensor([1.5, 1.5, 1.5, .5]).log2())
    torch.testing.assert_close(pointwise_v_information(frequencies.exp(), y, null=torch.tensor([.5, .5]), probabilities=True), torch.tensor([1.5, 1.5, 1.5, .5]).log2())
    with pytest.raises(ValueError, match="null: got shape"): pointwise_v_information(frequencies, y, null=torch.zeros(3))
    wrong = pointwise_v_information(torch.tensor([[0., 4.]]).expand(4, -1), y)
    assert (wrong[:3] < 0).all() and wrong[3] > 0


@pytest.mark.parametrize("adjust", [False, True])
@pytest.mark.parametrize("kind, theirs", [("self-confidence", "self_confidence"), ("normalised margin", "normalized_margin")])
def test_label_quality_is_that_of_cleanlab(kind, theirs, adjust):
    rank = pytest.importorskip("cleanlab.rank")
    logits = 2 * torch.randn(60, 4, generator=seeded(0), dtype=torch.float64)
    y = torch.arange(60) % 4
    p = logits.softmax(1)
    expected = rank.get_label_quality_scores(y.numpy(), p.numpy(), method=theirs, adjust_pred_probs=adjust)
    torch.testing.assert_close(label_quality(logits, y, kind, adjust), torch.tensor(expected))
    torch.testing.assert_close(label_quality(torch.stack([p, p]), y, kind, adjust, probabilities=True), torch.tensor(expected))


def test_label_quality_refuses():
    z = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="kind: got 'margin'"): label_quality(z, torch.zeros(4).long(), "margin")
    with pytest.raises(ValueError, match="y: got no example of class 1"): label_quality(z, torch.zeros(4).long(), adjust=True)


def test_out_of_fold_never_asks_who_has_seen_the_row(blobs):
    "Labels that are drawn at random can be learnt by heart, but not told of rows that were left out."
    x, y = blobs
    drawn = y[torch.randperm(150, generator=seeded(3))]
    options = dict(epochs=40, optimizer=lambda p: torch.optim.Adam(p, lr=.03))
    def wide(): return nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 3))
    held = out_of_fold(wide, x, drawn, folds=3, repeats=2, **options)
    seen = train_ensemble(wide, x, drawn, [0], **options).predict(x)
    right = lambda out: float((out.argmax(-1) == drawn).double().mean())
    assert held.shape == (2, 150, 3) and right(held) < .45 and right(seen) > .8
    assert torch.equal(held, out_of_fold(wide, x, drawn, folds=3, repeats=2, **options)) and not torch.equal(held[0], held[1])
    with pytest.raises(ValueError, match="folds: got 51; want at most 50"): out_of_fold(wide, x, drawn, folds=51)
    with pytest.raises(ValueError, match="folds: got 1"): out_of_fold(wide, x, drawn, folds=1)
    with pytest.raises(ValueError, match="y: got labels of one class only"): out_of_fold(wide, x, y * 0)


def test_planted_noise_is_at_the_top(blobs):
    x, y = blobs
    given = planted(Data(x, y, ("a", "b", "c")), noise=.15, duplicates=0, off=0, hard=0)
    way = checkpoints(mlp, given.x, given.y, range(3), epochs=15, optimizer=lambda p: torch.optim.Adam(p, lr=.01))
    course = dynamics((w.predict(given.x) for w in way[1:]), given.y)
    for score in (el2n(way[5].predict(given.x), given.y), grand(way[5], (given.x, given.y)), -area_under_margin(course.margin), -cartography(course.probability, course.correct).confidence):
        assert detection(score, given, ["noisy"])["noisy"] > .95


def test_real_texts(real):
    "SST-2: flipped labels of sentences are found from hashed words, better than by chance."
    from sklearn.feature_extraction.text import HashingVectorizer
    train, _ = load(real("sst2"), rows=2000)
    x = torch.from_numpy(HashingVectorizer(n_features=1024, alternate_sign=False).transform(train.x).toarray()).float()
    given = planted(Data(x, train.y, train.classes), noise=.1, duplicates=0, off=0, hard=0)
    held = out_of_fold(lambda: nn.Linear(1024, 2), given.x, given.y, epochs=10, optimizer=lambda p: torch.optim.Adam(p, lr=.02))
    assert detection(-label_quality(held, given.y), given, ["noisy"])["noisy"] > .6 and pointwise_v_information(held, given.y).isfinite().all()


# ---- spectra

def test_spectra_by_hand(bert):
    batch, y = named()
    rows = [{**{k: t[i:i + 2] for k, t in batch.items()}, "labels": y[i:i + 2]} for i in (0, 2)]
    found = spectra.spectra(bert, rows, parameters=["*attention.self*"])
    assert len(found.names) == 6 and found.nuclear.shape == found.rank.shape == (2, 6)
    loss = bert(**rows[1]).loss
    for j, name in enumerate(found.names):
        g = torch.autograd.grad(loss, bert.get_parameter(name), retain_graph=True)[0]
        torch.testing.assert_close(found.nuclear[1, j], torch.linalg.matrix_norm(g, "nuc"), rtol=1e-3, atol=1e-6)
        p = torch.linalg.svdvals(g)
        p = p[p > 0] / p.sum()
        torch.testing.assert_close(found.rank[1, j], (-(p * p.log()).sum()).exp(), rtol=1e-2, atol=1e-4)
    queries = [n for n in found.names if "query" in n]
    a, b = (torch.autograd.grad(loss, bert.get_parameter(n), retain_graph=True)[0].flatten() for n in queries)
    torch.testing.assert_close(found.cosines["bert.encoder.layer.*.attention.self.query.weight"][1, 0], nn.functional.cosine_similarity(a, b, dim=0), rtol=1e-3, atol=1e-5)


def test_spectra_of_two_batches_are_those_of_each(blobs):
    x, y = blobs
    network = mlp()
    both = spectra.spectra(network, [(x[:10], y[:10]), (x[10:30], y[10:30])])
    torch.testing.assert_close(both.nuclear[1], spectra.spectra(network, (x[10:30], y[10:30])).nuclear[0])
    assert both.names == ["0.weight", "2.weight"] and both.cosines["*.weight"].isnan().all() # of different shapes
    assert (both.rank <= 3 + 1e-4).all() or both.rank[:, 0].max() <= 6
    single = spectra.spectra(network, [(x[:1], y[:1])])
    torch.testing.assert_close(single.rank, torch.ones(1, 2), rtol=1e-3, atol=1e-3)
    frozen = mlp().requires_grad_(False)
    assert spectra.spectra(frozen, [(x[:10], y[:10])]).nuclear.gt(0).all() and not any(p.requires_grad for p in frozen.parameters())


def test_rank_and_norm_of_singular_values():
    torch.testing.assert_close(effective_rank(torch.ones(2, 7)), torch.full((2,), 7.))
    assert effective_rank(torch.tensor([2., 0., 0.])) == 1 and effective_rank(torch.zeros(2)) == 0 and nuclear_norm(torch.tensor([1., 2.])) == 3
    with pytest.raises(ValueError, match="sigma: got values from -1"): effective_rank(torch.tensor([-1., 1.]))


def test_spectra_refuse(blobs):
    with pytest.raises(ValueError, match="batches: got none"): spectra.spectra(mlp(), [])
    with pytest.raises(ValueError, match="parameters: got .*bias"): spectra.spectra(mlp(), [(blobs[0], blobs[1])], parameters=["*bias"])
    with pytest.raises(ValueError, match="parameters: got 'nothing'"): spectra.spectra(mlp(), [(blobs[0], blobs[1])], parameters=["nothing"])
