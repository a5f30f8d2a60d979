"TracIn, influence functions and their curvature, TRAK, and representers."
import math
import warnings
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn.functional import cross_entropy, softplus
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from whatmatters.attribution.curvature import Inverse, arnoldi, conjugate_gradients, curvature_product, ekfac, exact, sampled_losses
from whatmatters.attribution.influence import draw_cells, entity_importance, influence, linear_datamodelling_score, log_odds, self_influence, tracin, trak
from whatmatters.attribution.representers import complete, low_rank_representers, representers
from whatmatters.core.data import load
from whatmatters.core.ensemble import train_ensemble
from whatmatters.core.per_example import example_gradients, example_losses, projected_gradients
from whatmatters.core.stats import correlation
from whatmatters.core.values import count_calls

double = torch.double
draw = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=double)


def mlp(seed=0, inputs=6, hidden=5, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double().eval()


@pytest.fixture
def pairs():
    "Training and test examples of three classes."
    x, y = draw(40, 6), torch.arange(40) % 3
    return (x[:30], y[:30]), (x[30:], y[30:])


def rows(network, batch, losses=None): return torch.cat([t.flatten(1) for t in example_gradients(network, batch, losses).values()], 1)


def corr(a, b): return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).detach())[0, 1])


# ---- products of gradients

def test_tracin_is_the_sum_of_products_of_gradients_over_checkpoints(pairs):
    networks, rates = [mlp(s) for s in range(3)], [.1, .2, .3]
    wanted = sum(r * rows(n, pairs[0]) @ rows(n, pairs[1]).T for n, r in zip(networks, rates))
    torch.testing.assert_close(tracin(networks, *pairs, rates), wanted)
    torch.testing.assert_close(tracin((n for n in networks), *pairs, torch.tensor(rates), chunk=7), wanted, rtol=1e-5, atol=1e-7) # one after the other
    torch.testing.assert_close(tracin(networks[0], *pairs, normalise=True), torch.cosine_similarity(rows(networks[0], pairs[0])[:, None], rows(networks[0], pairs[1])[None], 2))
    torch.testing.assert_close(self_influence(networks, pairs[0], rates), sum(r * rows(n, pairs[0]).square().sum(1) for n, r in zip(networks, rates)))
    batches = [(pairs[0][0][:11], pairs[0][1][:11]), (pairs[0][0][11:], pairs[0][1][11:])]
    torch.testing.assert_close(tracin(networks, batches, pairs[1], rates), wanted)


def test_tracin_of_some_parameters_and_of_texts():
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)).eval()
    ids = torch.randint(32, (7, 8), generator=torch.Generator().manual_seed(0))
    all_of, some = tracin(lm, ids[:4], ids[4:]), tracin(lm, ids[:4], ids[4:], parameters="*.mlp.*")
    g = example_gradients(lm, ids)
    dots = lambda names: sum(g[n][:4].flatten(1) @ g[n][4:].flatten(1).T for n in names)
    torch.testing.assert_close(all_of, dots(g), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(some, dots([n for n in g if ".mlp." in n]), rtol=1e-3, atol=1e-4)


def test_checkpoints_of_other_models_are_refused(pairs):
    with pytest.raises(ValueError, match="networks: got number 1 with other parameters than the first"): tracin([mlp(), mlp(hidden=6)], *pairs)
    with pytest.raises(ValueError, match="networks: got none"): tracin([], *pairs)
    with pytest.raises(ValueError, match="networks: got a dict"): self_influence([{}], pairs[0])
    for rates in ([.1], [.1] * 3):
        with pytest.raises(ValueError, match="rates: got"): tracin([mlp(), mlp(1)], *pairs, rates)
    with pytest.raises(ValueError, match="labels from 0 to 9"): tracin(mlp(), (pairs[0][0], pairs[0][1] * 0 + torch.arange(30) % 10), pairs[1])


def test_tracin_takes_a_forward_and_a_backward_pass_for_each_row(pairs):
    network = mlp()
    counted = count_calls(lambda x: network(x))
    losses = lambda n, batch: cross_entropy(counted(batch[0]), batch[1], reduction="none")
    tracin(network, *pairs, losses=losses)
    assert counted.rows <= 40 + 2 # and a row to see that nothing is left out


# ---- curvature

@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_products_are_those_with_the_whole_matrix(pairs, kind):
    network, (x, y) = mlp(), pairs[0]
    names, shapes = zip(*((n, p.shape) for n, p in network.named_parameters()))
    def out(flat): return torch.func.functional_call(network, dict(zip(names, (t.view(s) for t, s in zip(flat.split([s.numel() for s in shapes]), shapes)))), x)
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    if kind == "hessian": matrix = torch.func.hessian(lambda t: cross_entropy(out(t), y))(flat)
    else:
        jacobian, p = torch.func.jacrev(out)(flat), out(flat).softmax(1)
        matrix = torch.einsum("ncp,ncd,ndq->pq", jacobian, torch.diag_embed(p) - p[:, :, None] * p[:, None], jacobian) / len(x)
    v = draw(5, len(flat))
    for options in ({}, dict(chunk=7, together=2)): torch.testing.assert_close(curvature_product(network, pairs[0], v, kind, **options), v @ matrix)
    torch.testing.assert_close(curvature_product(network, [(x[:9], y[:9]), (x[9:], y[9:])], v, kind), v @ matrix)
    torch.testing.assert_close(curvature_product(network, pairs[0], v[:1], kind), v[:1] @ matrix)
    assert all(p.grad is None for p in network.parameters())


def test_gauss_newton_of_a_language_model_is_that_of_its_tokens():
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)).double().eval()
    ids, some = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0)), ["*c_fc.bias"]
    p = lm.transformer.h[0].mlp.c_fc.bias
    jacobian = torch.func.jacrev(lambda b: torch.func.functional_call(lm, {"transformer.h.0.mlp.c_fc.bias": b}, (ids,)).logits[:, :-1])(p.detach())
    q = lm(ids).logits[:, :-1].softmax(-1).detach()
    matrix = torch.einsum("btcp,btcd,btdq->pq", jacobian, torch.diag_embed(q) - q[..., None] * q[..., None, :], jacobian) / 12
    torch.testing.assert_close(curvature_product(lm, ids, torch.eye(len(p), dtype=double), parameters=some), matrix, rtol=1e-4, atol=1e-7)
    generator = torch.Generator().manual_seed(0)
    drawn = sum(rows_of(lm, ids, generator, some) for _ in range(150)) / 150
    assert corr(drawn, matrix) > .95 and abs(float(drawn.trace().detach() / matrix.trace().detach()) - 1) < .15


def rows_of(lm, ids, generator, some):
    "Second moment of the gradients of drawn labels."
    p = lm.transformer.h[0].mlp.c_fc.bias
    g = torch.stack([torch.autograd.grad(l, p, retain_graph=True)[0] for l in sampled_losses(lm, ids, generator)])
    return g.T @ g / len(ids)


def test_all_solvers_agree(pairs):
    network, v = mlp(), draw(4, 53)
    wanted = exact(network, pairs[0], .05)(v)
    torch.testing.assert_close(conjugate_gradients(network, pairs[0], .05, tolerance=1e-9)(v), wanted, rtol=1e-4, atol=1e-6)
    hessian = exact(network, pairs[0], .5, kind="hessian")(v)
    torch.testing.assert_close(conjugate_gradients(network, pairs[0], .5, kind="hessian", tolerance=1e-9)(v), hessian, rtol=1e-4, atol=1e-6)
    bent = curvature_product(network, pairs[0], v) # inside the space in which the matrix is not zero, all directions are the whole matrix
    torch.testing.assert_close(arnoldi(network, pairs[0], .05, steps=53, rank=53)(bent), exact(network, pairs[0], .05)(bent), rtol=1e-4, atol=1e-6)


def test_arnoldi_finds_the_largest_eigenvalues_early(pairs):
    network, v = mlp(), draw(6, 53)
    matrix = curvature_product(network, pairs[0], torch.eye(53, dtype=double))
    values, basis = torch.linalg.eigh(matrix)
    wanted = (v @ basis[:, -3:]) / values[-3:] @ basis[:, -3:].T
    torch.testing.assert_close(arnoldi(network, pairs[0], steps=25, rank=3)(v), wanted, rtol=1e-4, atol=1e-5)
    same = [arnoldi(network, pairs[0], steps=10, rank=3, generator=g)(v) for g in (1, 1, torch.Generator().manual_seed(1))]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


def test_a_singular_or_indefinite_curvature_is_damped_and_it_is_said(pairs):
    network, v = mlp(), draw(2, 53)
    with pytest.warns(UserWarning, match="gauss-newton matrix is singular, its eigenvalues go from"): found = exact(network, pairs[0])
    assert found.damping > 0 and found(v).isfinite().all()
    with pytest.warns(UserWarning, match="hessian matrix is indefinite"): found = exact(network, pairs[0], kind="hessian")
    with pytest.warns(UserWarning, match="indefinite .*: damped by"): assert conjugate_gradients(network, pairs[0], kind="hessian")(v).isfinite().all()
    with pytest.warns(UserWarning, match="the curvature of .* is singular"): assert max(ekfac(network, pairs[0], 0.).damping.values()) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exact(network, pairs[0], .1).damping == .1


def test_bad_requests_to_the_solvers_are_refused(pairs):
    network = mlp()
    with pytest.raises(ValueError, match="vectors: got shape"): curvature_product(network, pairs[0], draw(2, 52))
    with pytest.raises(ValueError, match="vectors: got 1 NaN"): curvature_product(network, pairs[0], draw(1, 53).index_fill(1, torch.tensor([3]), torch.nan))
    with pytest.raises(ValueError, match="kind: got 'fisher'"): exact(network, pairs[0], kind="fisher")
    with pytest.raises(ValueError, match="network: got 53 parameters; want at most 50"): exact(network, pairs[0], most=50)
    with pytest.raises(ValueError, match="batches: got none"): ekfac(network, [])
    with pytest.raises(ValueError, match="solver: got 'lissa'"): influence(network, *pairs, "lissa")
    with pytest.raises(ValueError, match="damping: got a value; want none beside an Inverse"): influence(network, *pairs, Inverse(lambda v: v, 0.), .1)
    with pytest.raises(ValueError, match="network: got one in training mode"): influence(nn.Sequential(nn.Dropout(.5), mlp()).train(), *pairs)


def test_products_cost_what_is_said(pairs):
    network = mlp()
    counted = count_calls(network.forward)
    network.forward = counted
    curvature_product(network, pairs[0], draw(3, 53))
    assert counted.rows == 30
    counted.rows = 0
    arnoldi(network, pairs[0], steps=5, rank=2)
    assert counted.rows == 5 * 30
    counted.rows = 0
    ekfac(network, pairs[0], draws=3)
    assert counted.rows <= 2 * 3 * 30 + 9 # and a few to see which parameters it can read


# ---- EK-FAC

def test_ekfac_is_exact_for_a_linear_layer_under_squared_error():
    x, y, v = draw(200, 4) @ draw(4, 4, seed=1), draw(200, 1, seed=2), draw(3, 5, seed=3)
    line = nn.Linear(4, 1).double().eval()
    unit = lambda n, b, generator: n(b[0])[:, 0] * math.sqrt(2) * (2 * torch.randint(2, (len(b[0]),), generator=generator) - 1)
    torch.testing.assert_close(ekfac(line, (x, y), .1, unit)(v), exact(line, (x, y), .1)(v))
    two = nn.Linear(4, 2).double().eval() # of more outputs up to the noise of the draws
    wanted = exact(two, (x, draw(200, 2)), .5)(draw(3, 10))
    assert (ekfac(two, (x, draw(200, 2)), .5, draws=50)(draw(3, 10)) - wanted).norm() < .1 * wanted.norm()


def test_ekfac_reads_convolutions_normalisation_and_transposed_layers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, groups=1, bias=False), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)).double().eval()
    batch = draw(24, 2, 6, 6), torch.arange(24) % 3
    found, g = ekfac(network, batch, draws=2), rows(network, batch)
    assert not found.left_out and (g * found(g)).sum(1).min() > 0
    a, b = draw(5, g.shape[1]), draw(5, g.shape[1], seed=1)
    torch.testing.assert_close(a @ found(b).T, found(a) @ b.T) # symmetric
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.randint(16, (6, 6), generator=torch.Generator().manual_seed(0))
    found = ekfac(lm, ids)
    assert found.left_out == ("transformer.wte.weight", "transformer.wpe.weight") and "transformer.h.0.attn.c_attn.weight" in found.damping
    scores = influence(lm, ids[:4], ids[4:], found)
    assert scores.shape == (4, 2) and scores.isfinite().all()
    named = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone())
    torch.testing.assert_close(ekfac(lm, named)(rows(lm, ids)), found(rows(lm, ids)))


def test_ekfac_follows_the_exact_curvature_of_a_network(pairs):
    network = mlp()
    a, b = rows(network, pairs[0]), rows(network, pairs[1])
    wanted = a @ exact(network, pairs[0], .02)(b).T
    layered = a @ ekfac(network, pairs[0], .02, draws=20)(b).T
    assert corr(layered, wanted) > max(.9, corr(a @ b.T, wanted))
    assert torch.equal(ekfac(network, pairs[0], generator=3)(b), ekfac(network, pairs[0], generator=3)(b))


# ---- influence and leaving out

def penalised(x, y, rows, penalty, n):
    "Softmax regression fitted to the end, as a module."
    fitted = LogisticRegression(C=1 / (penalty * n), fit_intercept=False, tol=1e-9, max_iter=5000).fit(x[rows], y[rows])
    network = nn.Linear(x.shape[1], len(fitted.classes_), bias=False).double().eval()
    network.weight.data = torch.tensor(fitted.coef_)
    return network


def test_influence_foretells_leaving_out_of_digits():
    train, test = load("digits", rows=200)
    x, others = train.x.flatten(1).double(), (test.x.flatten(1).double()[:50], test.y[:50])
    model = penalised(x, train.y, range(200), .02, 200)
    scores = influence(model, (x, train.y), others, damping=.02)
    whole, chosen, truth = example_losses(model, others).detach(), range(0, 200, 8), []
    for i in chosen: truth.append(example_losses(penalised(x, train.y, [j for j in range(200) if j != i], .02, 200), others).detach() - whole)
    assert corr(scores[list(chosen)] / 200, torch.stack(truth)) > .99
    streamed = influence(model, [(x[:90], train.y[:90]), (x[90:], train.y[90:])], others, "cg", .02, tolerance=1e-7)
    assert (streamed - scores).norm() < 1e-4 * scores.norm()


def test_influence_of_ridge_regression_is_leaving_out_up_to_its_leverage():
    x, n, penalty = draw(40, 5), 40, .1
    y = x @ draw(5, seed=1) + draw(40, seed=2)
    fit = lambda keep: torch.tensor(Ridge(alpha=penalty * n / 2, fit_intercept=False, tol=1e-12).fit(x[keep], y[keep]).coef_) # sums of squares, and n penalty / 2
    network = nn.Linear(5, 1, bias=False).double().eval()
    network.weight.data = fit(range(n))[None]
    others = draw(6, 5, seed=3)
    score = lambda net, batch: net(batch[0])[:, 0]
    scores = influence(network, (x, y), (others, torch.zeros(6, dtype=double)), damping=penalty, test_losses=score) / n
    hat = (x @ torch.linalg.inv(2 * x.T @ x / n + penalty * torch.eye(5)) * 2 * x / n).sum(1)
    for i in (0, 7, 23):
        change = others @ (fit([j for j in range(n) if j != i]) - fit(range(n)))
        torch.testing.assert_close(scores[i] / (1 - hat[i]), change, rtol=1e-5, atol=1e-8)


# ---- TRAK and the linear datamodelling score

def test_linear_datamodelling_score_ranks_what_models_say():
    subsets, truth = torch.rand(30, 12, generator=torch.Generator().manual_seed(0)) < .5, draw(12, 3).float()
    outputs = subsets.float() @ truth
    assert torch.allclose(linear_datamodelling_score(truth, subsets, outputs.tanh()), torch.ones(3, dtype=double))
    one = torch.stack([correlation((subsets.float() @ truth).T.flip(0)[i:i + 1], outputs.T[i:i + 1])[0] for i in range(3)])
    torch.testing.assert_close(linear_datamodelling_score(truth.flip(1), subsets, outputs), one)
    with pytest.raises(ValueError, match="subsets: got torch.float32"): linear_datamodelling_score(truth, subsets.float(), outputs)
    with pytest.raises(ValueError, match="outputs: got shape"): linear_datamodelling_score(truth, subsets, outputs[:, :2])
    with pytest.raises(ValueError, match="subsets: got 2 rows"): linear_datamodelling_score(truth, subsets[:2], outputs[:2])
    with pytest.raises(ValueError, match="scores: got 1 NaN"): linear_datamodelling_score(torch.where(truth == truth[0, 0], torch.nan, truth), subsets, outputs)
    with pytest.warns(UserWarning, match="constant"): assert linear_datamodelling_score(truth * 0, subsets, outputs).isnan().all()


def test_log_odds(pairs):
    network, (x, y) = mlp(), pairs[0]
    p = network(x).softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(log_odds(network, pairs[0]), (p / (1 - p)).log())
    torch.testing.assert_close(softplus(-log_odds(network, pairs[0])), example_losses(network, pairs[0]))
    with pytest.raises(ValueError, match="batch: got a Tensor"): log_odds(network, x)
    with pytest.raises(ValueError, match="no class for each row"): log_odds(network, (x, x))
    with pytest.raises(ValueError, match="batch: got labels from"): log_odds(network, (x, y + 9))


@pytest.mark.parametrize("solver", ["exact", "cg", "arnoldi", "ekfac"])
def test_damping_that_is_none_is_refused(pairs, solver):
    for damping in (-.1, torch.nan):
        with pytest.raises(ValueError, match="damping: got"): influence(mlp(), *pairs, solver, damping)


def test_ekfac_is_not_of_losses_that_it_has_not_seen(pairs):
    with pytest.raises(ValueError, match="losses: got a function beside"): influence(mlp(), *pairs, "ekfac", losses=log_odds)


def test_trak_without_projection_is_its_formula(pairs):
    networks = [mlp(s) for s in range(2)]
    features, scores, slopes = [[rows(n, p, log_odds) for p in pairs] for n in networks], 0, 0
    for n, (a, b) in zip(networks, features):
        shift = .3 * a.square().sum(1).mean() # of 30 eigenvalues that are not zero
        scores = scores + a @ torch.linalg.solve(a.T @ a + shift * torch.eye(a.shape[1]), b.T) / 2
        slopes = slopes + (1 - n(pairs[0][0]).softmax(1).gather(1, pairs[0][1][:, None])) / 2
    torch.testing.assert_close(trak(networks, *pairs, None, .3), (scores * slopes).detach())
    wide = [trak(networks, *pairs, 4000, .3, generator=s) for s in range(2)] # a projection to many numbers is nearly none
    assert corr(wide[0], scores * slopes) > .97 and not torch.equal(*wide)
    narrow, few = trak(networks, *pairs, 16, generator=5), [projected_gradients(networks[0], p, 16, log_odds, generator=5) for p in pairs]
    assert torch.equal(narrow, trak(networks, *pairs, 16, generator=5))
    shift = .1 * few[0].square().sum() / 16
    one = few[0] @ torch.linalg.solve(few[0].T @ few[0] + shift * torch.eye(16), few[1].T) * (1 - networks[0](pairs[0][0]).softmax(1).gather(1, pairs[0][1][:, None]))
    torch.testing.assert_close(trak(networks[0], *pairs, 16, generator=5), one.detach())
    for size in (100, None):
        with pytest.warns(UserWarning, match="second moment of the features is singular"): trak(networks, *pairs, size, 0.)
    with pytest.raises(ValueError, match="damping: got -1"): trak(networks, *pairs, damping=-1)
    with pytest.raises(ValueError, match="other parameters"): trak([mlp(), mlp(hidden=9)], *pairs)


def test_trak_foretells_no_worse_than_its_authors_own(tmp_path):
    traker = pytest.importorskip("trak")
    train, test = load("digits", rows=200)
    data, held = (train.x.flatten(1), train.y), (test.x.flatten(1)[:30], test.y[:30])
    make = lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    subsets = torch.rand(34, 200, generator=torch.Generator().manual_seed(1)) < .5
    ensemble = train_ensemble(make, *data, range(34), weights=subsets.float(), epochs=30, batch_size=16, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3))
    said, fitted = torch.stack([log_odds(lambda x: out, held) for out in ensemble.predict(held[0])]), [ensemble.member(i) for i in range(4)]
    theirs = traker.TRAKer(model=fitted[0], task="image_classification", train_set_size=200, save_dir=str(tmp_path), device="cpu", proj_dim=64, logging_level=40, use_half_precision=False)
    for i, network in enumerate(fitted):
        theirs.load_checkpoint(network.state_dict(), model_id=i)
        theirs.featurize(data, num_samples=200)
    theirs.finalize_features()
    for i, network in enumerate(fitted):
        theirs.start_scoring_checkpoint("test", network.state_dict(), i, num_targets=30)
        theirs.score(held, num_samples=30)
    peer = torch.tensor(theirs.finalize_scores("test").copy())
    lds = lambda s: float(linear_datamodelling_score(s, subsets[4:], said[4:]).mean())
    ours = lds(trak(fitted, data, held, 64))
    assert ours >= lds(peer) - .02 and ours > .3


# ---- representers

def test_l1_representers_add_up_and_l2_representers_are_inner_products():
    x, others = draw(60, 20), draw(7, 20, seed=1)
    y = (x[:, :3].sum(1) > 0).long()
    loss = lambda z: softplus((1 - 2. * y) * z)
    for norm, ratio in (("l1", 1.), ("l2", 0.)):
        fitted = LogisticRegression(C=.5, l1_ratio=ratio, solver="liblinear", fit_intercept=False, tol=1e-12, max_iter=100_000, random_state=0).fit(x, y)
        theta = torch.tensor(fitted.coef_[0])
        found = representers(x, loss, theta, 1 / (60 * .5), others, norm)
        torch.testing.assert_close(found.contributions.sum(0), others @ theta, rtol=0, atol=1e-6)
        slopes = (x @ theta).sigmoid() - y
        torch.testing.assert_close(found.weights, -.5 * slopes)
        kernel = (x * theta.abs()) @ others.T if norm == "l1" else x @ others.T
        torch.testing.assert_close(found.contributions, found.weights[:, None] * kernel)
        assert norm == "l2" or (theta == 0).sum() > 5
        with pytest.raises(ValueError, match="theta: got parameters with a residual of"): representers(x, loss, theta * 1.01, 1 / 30, others, norm)
        with pytest.raises(ValueError, match="residual"): representers(x, loss, theta, 1 / 31, others, norm)


def test_representers_of_several_classes_and_with_a_bias():
    x, y, others = draw(60, 5), torch.arange(60) % 3, draw(4, 5, seed=1)
    fitted = LogisticRegression(C=1., tol=1e-10, max_iter=10_000).fit(x, y)
    theta, bias = torch.tensor(fitted.coef_).T, torch.tensor(fitted.intercept_)
    found = representers(x, lambda z: cross_entropy(z, y, reduction="none"), theta, 1 / 60, others, "l2", bias)
    assert found.contributions.shape == (60, 4, 3)
    torch.testing.assert_close(found.contributions.sum(0), others @ theta, rtol=0, atol=1e-4)


def test_low_rank_representers_add_up_by_any_side_and_refuse_what_is_no_optimum():
    truth, known = draw(12, 2) @ draw(2, 9, seed=1), torch.rand(12, 9, generator=torch.Generator().manual_seed(0)) < .6
    entries, values, others = known.nonzero(), truth[known], (~known).nonzero()
    loss = lambda z: (z - values).square() / 2
    theta = complete(entries, values, truth.shape, .05)
    objective = lambda t: float(loss(t[known]).mean() + .05 * torch.linalg.matrix_norm(t, "nuc"))
    for s in range(5): assert objective(theta) <= objective(theta + 1e-3 * draw(12, 9, seed=s))
    for side in ("both", "row", "column"):
        found = low_rank_representers(entries, loss, theta, .05, others, side)
        torch.testing.assert_close(found.contributions.sum(0), theta[~known], rtol=0, atol=1e-6)
        assert found.residual < 1e-6
        if side != "both":
            at = int(side == "column")
            apart = entries[:, at, None] != others[:, at]
            assert (found.contributions[apart] == 0).all()
    for wrong in (theta * .99, truth, draw(12, 9)):
        with pytest.raises(ValueError, match="theta: got parameters with a residual of"): low_rank_representers(entries, loss, wrong, .05, others)
    nothing = complete(entries, values, truth.shape, 100.)
    assert (nothing == 0).all() and (low_rank_representers(entries, loss, nothing, 100., others).contributions == 0).all()


def test_bad_input_of_representers_is_refused():
    x, y, theta = draw(10, 3), torch.ones(10, dtype=double), draw(3)
    loss = lambda z: (z - y).square()
    with pytest.raises(ValueError, match="norm: got 'l0'"): representers(x, loss, theta, 1., x, "l0")
    with pytest.raises(ValueError, match="strength: got 0"): representers(x, loss, theta, 0, x)
    with pytest.raises(ValueError, match="others: got shape"): representers(x, loss, theta, 1., x[:, :2])
    with pytest.raises(ValueError, match="loss: got a result of shape"): representers(x, lambda z: loss(z).sum(), theta, 1., x)
    with pytest.raises(ValueError, match="x: got 1 NaN"): representers(torch.where(x == x[0, 0], torch.nan, x), loss, theta, 1., x)
    entries = torch.tensor([[0, 0], [1, 2], [1, 1]])
    with pytest.raises(ValueError, match="entries: got torch.float64"): complete(entries.double(), draw(3), (2, 3), 1.)
    with pytest.raises(ValueError, match="entries: got numbers from 0 to"): complete(entries, draw(3), (2, 2), 1.)
    with pytest.raises(ValueError, match="an entry that comes twice"): complete(entries[[0, 0]], draw(2), (2, 3), 1.)
    with pytest.raises(ValueError, match="values: got shape"): complete(entries, draw(2), (2, 3), 1.)
    with pytest.warns(UserWarning, match="after 1 steps"): complete(entries, draw(3), (2, 3), .01, steps=1)
    with pytest.raises(ValueError, match="start: got shape"): complete(entries, draw(3), (2, 3), 1., start=draw(3, 2))
    with pytest.raises(ValueError, match="side: got 'left'"): low_rank_representers(entries, lambda z: z, draw(2, 3), 1., entries, "left")


# ---- entities

def test_entities_share_the_sizes_of_the_scores_of_their_cells():
    cells = torch.stack([torch.randint(s, (50,), generator=torch.Generator().manual_seed(s)) for s in (4, 6, 3)], 1)
    scores = draw(50)
    shares = entity_importance(scores, cells, (4, 6, 3))
    for mode, s in enumerate(shares):
        torch.testing.assert_close(s, torch.stack([scores[cells[:, mode] == i].abs().sum() for i in range(len(s))]) / scores.abs().sum())
    drawn = draw_cells(shares, 5000, generator=3)
    assert torch.equal(drawn, draw_cells(shares, 5000, generator=3)) and drawn.shape == (5000, 3)
    for mode, s in enumerate(shares): torch.testing.assert_close(torch.bincount(drawn[:, mode], minlength=len(s)) / 5000., s.float(), rtol=0, atol=.03)
    with pytest.raises(ValueError, match="cells: got entities up to"): entity_importance(scores, cells, (4, 5, 3))
    with pytest.raises(ValueError, match="scores: got zeros"): entity_importance(scores * 0, cells, (4, 6, 3))
    with pytest.raises(ValueError, match="cells: got torch.float64"): entity_importance(scores, cells.double(), (4, 6, 3))
    with pytest.raises(ValueError, match="shares: got negative"): draw_cells([-shares[0]], 3)
    with pytest.raises(ValueError, match="shares: got none"): draw_cells([], 3)
