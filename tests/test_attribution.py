"Attributions: peers, costs, determinism, whatever the chunk size."
import captum.attr
import captum.metrics
import pytest
import torch
from torch import nn
from whatmatters.attribution import gradients as g
from whatmatters.core.values import class_value, count_calls, seeded
from whatmatters.evaluation import faithfulness


@pytest.fixture
def case():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 5)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    return network, x, torch.tensor([0, 1, 2, 3])


def close(a, b): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_captum_gradients(case):
    network, x, classes = case
    f = class_value(network)
    close(g.gradient(f, x, (classes,)), captum.attr.Saliency(network).attribute(x, classes, abs=False))
    close(g.input_x_gradient(f, x, (classes,)), captum.attr.InputXGradient(network).attribute(x, classes))


@pytest.mark.parametrize("rule, method", [("gauss", "gausslegendre"), ("riemann", "riemann_right")])
@pytest.mark.parametrize("baseline", [0., .3])
def test_captum_integrated_gradients(case, rule, method, baseline):
    network, x, classes = case
    theirs, delta = captum.attr.IntegratedGradients(network).attribute(x, baseline, classes, n_steps=9, method=method, return_convergence_delta=True)
    ours, error = g.integrated_gradients(class_value(network), x, baseline, 9, rule, (classes,), return_error=True)
    close(ours, theirs)
    close(error, delta)


def test_captum_metrics(case):
    network, x, classes = case
    f, scores = class_value(network), g.gradient(class_value(network), x, (classes,))
    moved = torch.randn(x.shape, generator=seeded(1), dtype=torch.float64) * .1
    theirs = captum.metrics.infidelity(network, lambda inputs: (moved, inputs - moved), x, scores, target=classes, n_perturb_samples=1)
    close(faithfulness.infidelity(f, x, scores, samples=1, perturb=lambda x, generator: moved, args=(classes,)), theirs)
    drawn = .02 * (2 * torch.rand(x.shape, generator=seeded(7)).double() - 1)
    explain = lambda x, target: g.gradient(f, x, (target,))
    bare = lambda x: x[0] if isinstance(x, tuple) else x  # captum hands over now one, now the other
    theirs = captum.metrics.sensitivity_max(lambda x, target: (explain(bare(x), target),), x, lambda inputs, radius: bare(inputs) + drawn, target=classes, n_perturb_samples=1)
    close(faithfulness.max_sensitivity(explain, x, samples=1, args=(classes,), generator=7), theirs)


METHODS = {
    "gradient": (g.gradient, {}, 1), "input_x_gradient": (g.input_x_gradient, {}, 1), "integrated_gradients": (g.integrated_gradients, {"steps": 6}, 6),
    "expected_gradients": (g.expected_gradients, {"samples": 6, "background": torch.ones(3, 3, 8, 8, dtype=torch.float64)}, 6),
    "smoothgrad": (g.smoothgrad, {"samples": 6}, 6), "smoothgrad_squared": (g.smoothgrad_squared, {"samples": 6}, 6), "vargrad": (g.vargrad, {"samples": 6}, 6),
}


@pytest.mark.parametrize("name", METHODS)
def test_cost_chunks_and_bits(case, name):
    network, x, classes = case
    method, options, passes = METHODS[name]
    counted, largest = count_calls(class_value(network)), []
    def f(x, classes):
        largest.append(len(x))
        return counted(x, classes)
    whole = method(f, x, args=(classes,), **options)
    assert counted.rows == passes * len(x) and counted.calls == passes
    assert max(largest) == len(x)  # memory stays that of one batch, however many steps
    assert torch.equal(whole, method(f, x, args=(classes,), **options))
    for chunk in (1, 3, 8, 1000): torch.testing.assert_close(method(f, x, args=(classes,), chunk=chunk, **options), whole)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_stays(case, name):
    network, x, classes = case
    method, options, _ = METHODS[name]
    options = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    scores = method(class_value(network.bfloat16()), x.bfloat16(), args=(classes,), **options)
    assert scores.dtype == torch.bfloat16 and scores.isfinite().all()


def test_out_of_memory_halves_the_chunk_once(case):
    network, x, classes = case
    sizes = []
    def f(x, classes):
        sizes.append(len(x))
        if len(x) > 2: raise torch.OutOfMemoryError("out of memory")
        return class_value(network)(x, classes)
    scores = g.integrated_gradients(f, x, steps=3, args=(classes,))
    assert sizes == [4, 2, 2, 2, 2, 2, 2]
    torch.testing.assert_close(scores, g.integrated_gradients(class_value(network), x, steps=3, args=(classes,)))
