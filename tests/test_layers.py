"Layers: running part of a model, its costs, odd architectures, and the peers' layer attributions."
import contextlib
import captum.attr
import pytest
import torch
from torch import nn
from whatmatters.attribution import gradients
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
