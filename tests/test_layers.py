"Layers: running part of a model, its costs, odd architectures, and the peers' layer attributions."
import contextlib
import captum.attr
import pytest
import torch
from torch import nn
from whatmatters.attribution import gradients, layers
from whatmatters.core.hooks import head, layer_gradients, patch, tail
from whatmatters.core.values import class_value, count_calls, values_and_gradients, values_of


def close(a, b, tolerance=1e-5): torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


class Block(nn.Module):
    "A residual block as in ResNets: one ReLU, in place, called twice."
    def __init__(self, channels, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, stride, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.relu, self.down = nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1, stride) if stride > 1 else None
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class Shared(nn.Module):
    "The same block over and over, as in ALBERT, on sequences with the batch second, tables without rows and functional steps on the way."
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.gate = nn.Embedding(20, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8)
        self.positions, self.recurrent, self.out = nn.Embedding(6, 8), nn.LSTM(8, 8), nn.Linear(8, 3)
    def forward(self, ids):
        h = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        h += 1
        h, (last, _) = self.recurrent(h.transpose(0, 1))
        h = h.transpose(0, 1)
        flat = self.gate(h.reshape(-1, 8))
        for _ in range(3): h = self.block(h) + h
        h = (h * torch.sigmoid(flat).view_as(h)).mean(1) + last[0]
        return self.out(torch.nn.functional.gelu(h))


def resnet():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Block(4), Block(4, 2), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
    return network, torch.randn(4, 3, 10, 10), network


def bert(ids=False):
    from transformers import BertConfig, BertForSequenceClassification
    network = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=5))
    if ids: return network, torch.randint(0, 50, (4, 6)), lambda x: network(input_ids=x).logits
    return network, torch.randn(4, 6, 16), lambda x: network(inputs_embeds=x).logits


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    network = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32))
    mask = torch.tensor([[1] * 4, [0, 1, 1, 1], [1] * 4, [0, 0, 1, 1]]) # as many tokens as rows, and the left padded
    return network, torch.randint(0, 50, (4, 4)), lambda x, m=mask: network(input_ids=x, attention_mask=(x > 10).long().cummax(1)[0]).logits[:, -1]


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM
    network = MixtralForCausalLM(MixtralConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, num_local_experts=4))
    return network, torch.randint(0, 50, (4, 6)), lambda x: network(input_ids=x).logits[:, -1]


def t5():
    from transformers import T5Config, T5ForConditionalGeneration
    network = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=32, num_layers=3, num_heads=2, d_kv=8, decoder_start_token_id=0))
    return network, torch.randint(3, 50, (4, 6)), lambda x: network(input_ids=x, decoder_input_ids=x[:, :3]).logits[:, -1]


def encoder():
    network = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3, enable_nested_tensor=False), nn.Linear(16, 5))
    return network.requires_grad_(False), torch.randn(4, 6, 8), lambda x: network(x)[:, 0]


def shared():
    network = Shared()
    return network, torch.randint(0, 20, (4, 6)), network


# case -> network, inputs and logits; the layer, which call of it, and a module that must not run behind it
CASES = {
    "resnet block": (resnet, lambda n: n[4], None, lambda n: n[3].conv1), "resnet inside, bypassed": (resnet, lambda n: n[4].conv2, None, lambda n: n[4].conv1),
    "resnet reused relu": (resnet, lambda n: n[4].relu, 0, lambda n: n[4].conv1), "resnet reused relu again": (resnet, lambda n: n[4].relu, 1, lambda n: n[4].down),
    "resnet before an in-place relu": (resnet, lambda n: n[1], None, lambda n: n[0]),
    "bert layer": (bert, lambda n: n.bert.encoder.layer[1], None, lambda n: n.bert.encoder.layer[0].attention.self.query),
    "bert inside": (bert, lambda n: n.bert.encoder.layer[2].attention.self, None, lambda n: n.bert.encoder.layer[1]),
    "bert embeddings from ids": (lambda: bert(True), lambda n: n.bert.embeddings, None, lambda n: n.bert.embeddings.word_embeddings),
    "bert word embeddings": (lambda: bert(True), lambda n: n.bert.embeddings.word_embeddings, None, lambda n: None),
    "llama layer": (llama, lambda n: n.model.layers[1], None, lambda n: n.model.layers[0].self_attn),
    "llama mlp": (llama, lambda n: n.model.layers[1].mlp, None, lambda n: n.model.layers[1].self_attn),
    "mixture of experts": (mixtral, lambda n: n.model.layers[1].mlp, None, lambda n: n.model.layers[1].self_attn),
    "t5 encoder": (t5, lambda n: n.encoder.block[1], None, lambda n: n.encoder.block[0].layer[0].SelfAttention), "t5 decoder": (t5, lambda n: n.decoder.block[2].layer[1], None, lambda n: n.encoder),
    "fused encoder": (encoder, lambda n: n[1].layers[1].linear1, None, lambda n: n[1].layers[1].self_attn),
    "shared block, third time": (shared, lambda n: n.block, 2, lambda n: n.recurrent), "inside the shared block": (shared, lambda n: n.block[0], 1, lambda n: n.gate),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, layer, call, idle = CASES[request.param]
    network, x, logits = make()
    network.eval()
    return network, x, lambda x, c: logits(x).gather(1, c[:, None])[:, 0], layer(network), call, idle(network)


@contextlib.contextmanager
def no_run_of(module):
    with pytest.MonkeyPatch.context() as m:
        if module is not None: m.setattr(module, "forward", lambda *args, **kwargs: pytest.fail(f"{type(module).__name__} ran"))
        yield


def state(network): return [(vars(m).get("forward"), dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training) for m in network.modules()] + [(p.grad, p.requires_grad, p._version) for p in network.parameters()]


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_tail_is_the_whole_with_a_patch(case, chunk):
    network, x, f, layer, call, idle = case
    c, before = torch.tensor([0, 1, 2, 0]), state(network)
    g, h, rows = tail(f, x, layer, (c,), call, chunk)
    close(values_of(g, h, (rows,), chunk), f(x, c))
    close(head(f, layer, call or 0)(x, c), h, 1e-4)
    for some in (rows, torch.tensor([2, 3]), torch.tensor([3, 0, 0, 2, 1, 1])):
        new = (h[some] + .3 * torch.randn(h[some].shape)).requires_grad_()
        with patch({layer: lambda a, n: new.clone() if n == (call or 0) else a}): whole = f(x[some], c[some])
        with no_run_of(idle): part = g(new, some)
        close(part, whole, 1e-4)
        close(*(torch.autograd.grad(v.sum(), new)[0] for v in (part, whole)), 1e-4)
    close(g(h, rows), f(x, c), 1e-4)  # nothing kept was changed by the calls in between
    values, activations, grads = layer_gradients(f, x, layer, (c,), call, chunk)
    close(values, f(x, c), 1e-4), close(activations, h, 1e-4), close(grads, values_and_gradients(g, h, (rows,), chunk)[1], 1e-4)
    assert state(network) == before and torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()
    assert not torch.nn.modules.module._global_forward_hooks and not torch.nn.modules.module._global_forward_pre_hooks


def test_the_model_is_restored_on_errors():
    network, x, f = bert()
    network.eval()
    layer, before = network.bert.encoder.layer[1], state(network)
    value = lambda x, fail: f(x)[:, 0] if not fail.any() else 1 / 0
    g, h, rows = tail(value, x, layer, (torch.zeros(4, dtype=torch.bool),))
    def break_down(*args): raise ZeroDivisionError
    for attempt in (lambda: tail(value, x, layer, (torch.ones(4, dtype=torch.bool),)), lambda: layer_gradients(value, x, layer, (torch.ones(4, dtype=torch.bool),)),
                    lambda: head(lambda x: 1 / 0, layer)(x)):
        with pytest.raises(ZeroDivisionError): attempt()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(network.bert.pooler, "forward", break_down)
        with pytest.raises(ZeroDivisionError): g(h, rows)
    assert state(network) == before and torch.is_grad_enabled() and not torch.nn.modules.module._global_forward_hooks


def test_hooks_of_the_user_act_once_in_the_whole_and_behind():
    network, x, logits = bert()
    network.eval()
    f, stack = lambda x: logits(x)[:, 0], network.bert.encoder.layer
    handles = [m.register_forward_hook(lambda m, i, o: o + 1) for m in (stack[0], stack[1], stack[2])]
    g, h, rows = tail(f, x, stack[1])
    close(g(h, rows), f(x))
    torch.testing.assert_close(head(f, stack[1])(x), h), torch.testing.assert_close(layer_gradients(f, x, stack[1])[1], h)
    assert all(len(m._forward_hooks) == 1 for m in (stack[0], stack[1], stack[2]))


def test_modules_that_accelerate_has_wrapped():
    hooks = pytest.importorskip("accelerate.hooks")
    network, x, logits = llama()
    network.eval()
    for m in network.model.layers: hooks.add_hook_to_module(m, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    f, before = lambda x: logits(x)[:, 0], state(network)
    g, h, rows = tail(f, x, network.model.layers[1])
    close(g(h, rows), f(x), 1e-4)
    assert state(network) == before and "forward" in vars(network.model.layers[0])


class Batchwise(nn.Module):
    "Every row depends on the others."
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, x): return self.last(self.first(x - 2 * x.mean(0)))


class Remembers(nn.Module):
    "The last module reads what the first one left behind, not what it returned."
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.first.inside = self.middle
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        return self.last(self.middle(self.first(x))) * self.calls


REFUSED = {
    "never called": (lambda n, x: tail(n, x, nn.Linear(2, 2)), "layer: got a Linear that f never calls"),
    "never called, gradients": (lambda n, x: layer_gradients(n, x, nn.Linear(2, 2)), "layer: got a Linear that f never calls"),
    "twice": (lambda n, x: tail(lambda x: n(x) + n(x), x, n.net[0]), "layer: got a Linear that f calls 2 times; want call="),
    "twice, gradients": (lambda n, x: layer_gradients(lambda x: n(x) + n(x), x, n.net[0]), "layer: got a Linear that f calls 2 times; want call="),
    "no such call": (lambda n, x: tail(n, x, n.net[0], call=1), "call: got 1; want a call of the Linear: 0 to 0"),
    "no such call, neuron": (lambda n, x: layers.neuron_value(n, n.net[0], 0, call=2)(x), "call: got 2; want"),
    "training": (lambda n, x: tail(n.train(), x, n.net[0]), "f: got a model with a Dropout in training mode"),
    "args": (lambda n, x: tail(n, x, n.net[0], (x[:2],)), "args.0.: got shape"),
    "value": (lambda n, x: tail(n.net, x, n.net[0]), "f: got values of shape"),
    "not rows first": (lambda n, x: layers.layer_gradient_x_activation(lambda x: n.net[0](x[None]).sum((0, 2)), x, n.net[0]), "layer: got an activation of shape"),
    "baseline": (lambda n, x: layers.layer_integrated_gradients(n, x, n.net[0], torch.zeros(3)), "baseline: got shape"),
    "activation": (lambda n, x: layers.layer_integrated_gradients(n, x, n.net[0], activation=torch.zeros(3)), "activation: got shape"),
    "ids without a baseline": (lambda n, x: layers.layer_integrated_gradients(n, x.long(), n.net[0]), "baseline: got None"),
    "steps": (lambda n, x: layers.layer_conductance(n, x, n.net[0], steps=0), "steps: got 0"),
    "rule": (lambda n, x: layers.layer_conductance(n, x, n.net[0], rule="gauss"), "rule: got 'gauss'"),
    "rule of influence": (lambda n, x: layers.internal_influence(n, x, n.net[0], rule="left"), "rule: got 'left'"),
    "nan": (lambda n, x: layers.layer_conductance(n, x / 0, n.net[0]), "x: got .* NaN"),
    "neuron": (lambda n, x: layers.neuron_value(n, n.net[0], (0, 1))(x), r"neuron: got \(0, 1\); want an index into \(6,\)"),
    "no gradient": (lambda n, x: layers.layer_gradient_x_activation(lambda x: n(x).detach(), x, n.net[0]), "layer: got a Linear whose activation has no gradient"),
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(.5), nn.Tanh(), nn.Linear(6, 3))
    def forward(self, x): return self.net(x)[:, 0]


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input(what):
    act, message = REFUSED[what]
    network = Small().eval()
    with pytest.raises(ValueError, match=message): act(network, torch.randn(5, 4))
    assert not any("forward" in vars(m) or m._forward_hooks for m in network.modules())


def test_models_that_cannot_be_cut_are_refused():
    x, batchwise, remembers = torch.randn(5, 4), Batchwise(), Remembers()
    with pytest.raises(ValueError, match="f: got a model whose rows depend on each other"): tail(lambda x: batchwise(x)[:, 0], x, batchwise.last)
    with pytest.raises(ValueError, match="f: got other values when"): tail(lambda x: remembers(x)[:, 0], x, remembers.middle)
    noisy = Small()
    f = lambda x: noisy.net[3](noisy.net[0](x) + 9 * torch.randn(len(x), 6))[:, 0]  # dropout may twice drop the same of six
    with pytest.raises(ValueError, match="f: got a model whose rows depend on each other, or which does not give the same twice"): tail(f, x, noisy.net[3])


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Conv2d(4, 5, 3), nn.Softplus(), nn.Flatten(), nn.Linear(80, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    return network, torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("at", [0, 3, 5])
@pytest.mark.parametrize("baseline", [0., .3])
def test_captum_layers(cnn, at, baseline):
    network, x, c = cnn
    f, layer = class_value(network), network[at]
    close(layers.layer_gradient_x_activation(f, x, layer, (c,)), captum.attr.LayerGradientXActivation(network, layer).attribute(x, c))
    theirs, delta = captum.attr.LayerIntegratedGradients(network, layer).attribute(x, baseline, c, n_steps=9, return_convergence_delta=True)
    ours, error = layers.layer_integrated_gradients(f, x, layer, baseline, args=(c,), steps=9, return_error=True)
    close(ours, theirs)
    torch.testing.assert_close(error, delta, rtol=1e-4, atol=1e-9)
    theirs, delta = captum.attr.LayerConductance(network, layer).attribute(x, baseline, c, n_steps=9, method="riemann_trapezoid", return_convergence_delta=True)
    ours, error = layers.layer_conductance(f, x, layer, baseline, 9, "left", (c,), return_error=True)
    close(ours, theirs)
    torch.testing.assert_close(error, delta, rtol=1e-4, atol=1e-9)
    theirs = captum.attr.LayerConductance(network, layer).attribute(x, baseline, c, n_steps=1000, method="riemann_trapezoid", internal_batch_size=2000)
    close(layers.layer_conductance(f, x, layer, baseline, 30, args=(c,)), theirs, 1e-2)
    close(layers.internal_influence(f, x, layer, baseline, 9, args=(c,)), captum.attr.InternalInfluence(network, layer).attribute(x, baseline, c, n_steps=9))


@pytest.mark.parametrize("neuron", [(2, 1, 3), lambda a: a.flatten(1).square().sum(1)])
def test_captum_neurons(cnn, neuron):
    network, x, c = cnn
    value, selector = layers.neuron_value(network, network[2], neuron), neuron
    close(gradients.gradient(value, x), captum.attr.NeuronGradient(network, network[2]).attribute(x, selector))
    close(gradients.integrated_gradients(value, x, .1, 9), captum.attr.NeuronIntegratedGradients(network, network[2]).attribute(x, selector, .1, n_steps=9))


def test_captum_on_a_transformer():
    torch.manual_seed(0)
    network, x, logits = bert()
    network.eval().double()
    x, c, layer = x.double(), torch.tensor([0, 1, 2, 0]), network.bert.encoder.layer[1]
    f, forward = lambda x, c: logits(x).gather(1, c[:, None])[:, 0], lambda x: logits(x)
    theirs = captum.attr.LayerIntegratedGradients(forward, layer).attribute(x, target=c, n_steps=7)
    close(layers.layer_integrated_gradients(f, x, layer, args=(c,), steps=7), theirs[0] if isinstance(theirs, tuple) else theirs)
    theirs = captum.attr.LayerConductance(forward, layer).attribute(x, target=c, n_steps=7, method="riemann_trapezoid")
    close(layers.layer_conductance(f, x, layer, steps=7, rule="left", args=(c,)), theirs[0] if isinstance(theirs, tuple) else theirs)


def test_ids_take_layer_attributions():
    torch.manual_seed(0)
    network, ids, logits = bert(ids=True)
    network.eval()
    f, embeddings = lambda x: logits(x)[:, 1], network.bert.embeddings
    attributions, error = layers.layer_integrated_gradients(f, ids, embeddings, baseline=0, steps=40, return_error=True)
    close(attributions.flatten(1).sum(1), f(ids) - f(ids * 0), 1e-3)
    with torch.no_grad(): x = embeddings(ids), embeddings(ids * 0)
    same = layers.layer_integrated_gradients(f, ids, embeddings, activation=x[1], steps=40)
    close(same, attributions)
    g, h, rows = tail(f, ids, embeddings)
    close(h, x[0])
    close(same, gradients.integrated_gradients(g, x[0], x[1], 40, args=(rows,)))


METHODS = {"layer_gradient_x_activation": (layers.layer_gradient_x_activation, {}), "layer_integrated_gradients": (layers.layer_integrated_gradients, {"steps": 6}),
           "layer_conductance": (layers.layer_conductance, {"steps": 6}), "internal_influence": (layers.internal_influence, {"steps": 6})}
# rows through the first module and through the last one, for 4 inputs: what the docstrings say
COSTS = {"layer_gradient_x_activation": (4, 4), "layer_integrated_gradients": (4 + 1 + 4, 6 * 4 + 4 + 4), "layer_conductance": (7 * 4, 7 * 4), "internal_influence": (6 * 4, 6 * 4)}


class Count(nn.Module):
    "Counts rows of its forward and backward passes."
    def __init__(self):
        super().__init__()
        self.forwards, self.backwards, self.largest = 0, 0, 0
    def forward(self, x):
        self.forwards, self.largest = self.forwards + len(x), max(self.largest, len(x))
        if x.requires_grad: x.register_hook(lambda g: setattr(self, "backwards", self.backwards + len(g)))
        return x


@pytest.mark.parametrize("name", METHODS)
def test_cost_chunks_and_completeness(cnn, name):
    network, x, c = cnn
    method, options = METHODS[name]
    first, last = Count(), Count()
    counted = nn.Sequential(network[0], nn.Sequential(network[1], first), network[2], network[3:], last)
    f, layer = class_value(counted), counted[2]
    whole = method(f, x, layer, args=(c,), **options)
    assert (first.forwards, last.forwards) == COSTS[name]
    assert first.backwards == 0 and last.backwards == 4 * {"layer_gradient_x_activation": 1, "layer_conductance": 7}.get(name, 6)
    assert first.largest == last.largest == 4  # memory stays that of one batch, however many steps
    assert torch.equal(whole, method(f, x, layer, args=(c,), **options))
    for chunk in (1, 3, 8, 1000): torch.testing.assert_close(method(f, x, layer, args=(c,), chunk=chunk, **options), whole)
    assert all(p.grad is None for p in network.parameters()) and not any("forward" in vars(m) or m._forward_hooks for m in counted.modules())
    if name in ("layer_integrated_gradients", "layer_conductance"):
        scores, error = method(f, x, layer, args=(c,), return_error=True, **(options | {"steps": 100}))
        difference = f(x, c) - f(x * 0, c)
        torch.testing.assert_close(scores.flatten(1).sum(1), difference, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(error, scores.flatten(1).sum(1) - difference)


def test_a_shared_baseline_runs_once_for_each_kind_of_row(cnn):
    network, x, c = cnn
    first = Count()
    counted = nn.Sequential(first, *network)
    layers.layer_integrated_gradients(class_value(counted), x, counted[3], .5, args=(c // 2,), steps=2)
    assert first.forwards == 4 + 1 + 2
    same = layers.layer_integrated_gradients(class_value(counted), x, counted[3], torch.full_like(x, .5) + x * 0, args=(c // 2,), steps=2)
    torch.testing.assert_close(layers.layer_integrated_gradients(class_value(counted), x, counted[3], .5, args=(c // 2,), steps=2), same)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_stays(cnn, name):
    network, x, c = cnn
    method, options = METHODS[name]
    scores = method(class_value(network.bfloat16()), x.bfloat16(), network[2], args=(c,), **options)
    assert scores.dtype == torch.bfloat16 and scores.isfinite().all()


def test_neurons_run_only_up_to_the_layer(cnn):
    network, x, c = cnn
    last = Count()
    counted = nn.Sequential(*network, last)
    f = count_calls(counted)
    gradients.integrated_gradients(layers.neuron_value(f, counted[2], (0, 0, 0)), x, steps=5)
    assert f.rows == 20 and last.forwards == 0


def test_out_of_memory_halves_the_chunk(cnn):
    network, x, c = cnn
    def f(x, c):
        if len(x) > 2: raise torch.OutOfMemoryError("out of memory")
        return class_value(network)(x, c)
    for method, options in METHODS.values(): torch.testing.assert_close(method(f, x, network[2], args=(c,), **options), method(class_value(network), x, network[2], args=(c,), **options))


# a tolerance in place of steps

def test_tolerance_stops_each_input_by_itself(cnn):
    network, x, c = cnn
    f, spent = class_value(network), torch.zeros(4, dtype=torch.long)
    x = x * torch.tensor([0., .1, 1, 5], dtype=x.dtype)[:, None, None, None]
    largest = []
    def counted(x, c, row):
        spent.index_add_(0, row, torch.ones_like(row))
        largest.append(len(x))
        return f(x, c)
    scores, error = gradients.integrated_gradients(counted, x, tolerance=1e-6, args=(c, torch.arange(4)), return_error=True)
    assert error.abs().max() <= 1e-6 and max(largest) <= 4
    assert spent[0] == 3 and spent[0] <= spent[1] <= spent[2] <= spent[3] and all(n in (3, 5, 9, 17, 33, 65, 129) for n in spent)
    assert largest[-1] > 1  # few inputs left: more points of theirs in a call
    torch.testing.assert_close(error, scores.flatten(1).sum(1) - (f(x, c) - f(x * 0, c)))
    close(scores, gradients.integrated_gradients(f, x, steps=200, args=(c,)), 1e-4)
    for chunk in (1, 3, 1000): torch.testing.assert_close(gradients.integrated_gradients(f, x, tolerance=1e-6, args=(c,), chunk=chunk), scores)


@pytest.mark.parametrize("intervals", [2, 4, 8, 16, 64])
def test_clenshaw_curtis(intervals):
    points, weights = gradients._clenshaw_curtis(intervals)
    doubled = gradients._clenshaw_curtis(2 * intervals)[0]
    assert weights.sum() == pytest.approx(1) and points == pytest.approx(doubled[::2]) and (weights > 0).all()
    for degree in range(intervals + 1): assert (weights * points ** degree).sum() == pytest.approx(1 / (degree + 1))


def test_a_capped_tolerance_shows_in_the_error():
    kink = lambda x: (x.sum(1) - .3).relu()
    seen = count_calls(kink)
    scores, error = gradients.integrated_gradients(seen, torch.ones(1, 4), tolerance=1e-9, steps=20, return_error=True)
    assert seen.rows == 17 and error.abs() > 1e-9  # 3, 5, 9, 17; 33 are more than 20
    torch.testing.assert_close(scores.sum(1) - kink(torch.ones(1, 4)), error)
