"Gradients of examples against a loop over them, on architectures of many kinds; planted trouble."
import gc
import math
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from whatmatters.core.data import Data
from whatmatters.core.per_example import _first, _Gradients, _rows, example_gradients, example_losses, gradient_dots, gradient_norms, mean_gradient, projected_gradients
from whatmatters.core.planted import KINDS, detection, planted


def loop(network, batch, losses=example_losses, names=None):
    parameters = [p for n, p in network.named_parameters() if p.requires_grad and (names is None or n in names)]
    rows = []
    for i in range(len(_first(batch))):
        gradients = torch.autograd.grad(losses(network, _rows(batch, slice(i, i + 1))).sum(), parameters, allow_unused=True)
        rows.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients)]))
    return torch.stack(rows)


class Norms(nn.Module):
    "Normalisation of every kind, grouped and one-dimensional convolutions, an in-place activation, a plain parameter that is added and one that multiplies."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.GroupNorm(2, 8), nn.BatchNorm2d(8)
        self.d, self.e, self.f, self.g = nn.Conv1d(8, 6, 3, dilation=2), nn.RMSNorm(6), nn.LayerNorm(6, bias=False), nn.Linear(6, 3)
        self.shift, self.scale, self.token = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(1, 5, 6))
        for m in (self.b, self.c): m.weight.data.uniform_(.5, 2)
        self.c.running_mean.normal_(), self.c.running_var.uniform_(.5, 2)
    def forward(self, x):
        h = F.relu_(self.c(self.b(self.a(x))))
        h = self.d(h.flatten(2))[:, :, :5].mT
        return self.g(self.f(self.e(h) * self.scale + self.shift) + self.token).mean(1)


def bert():
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=5, max_position_embeddings=16)), \
        dict(input_ids=torch.randint(1, 50, (6, 7)), attention_mask=(torch.arange(7) < torch.tensor([7, 5, 7, 3, 7, 6])[:, None]).long(), labels=torch.randint(5, (6,)))


def causal(name, **more):
    import transformers
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config), torch.randint(50, (6, 7))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.recurrent, self.out = nn.Embedding(50, 8, padding_idx=0), nn.LSTM(8, 8, batch_first=True), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
    def forward(self, ids): return self.out(self.recurrent(self.embed(ids))[1][0][0])


torch.manual_seed(0)
# name -> network and batch, and whether everything is heard
CASES = {
    "linear": lambda: (nn.Linear(4, 3), (torch.randn(6, 4), torch.randint(3, (6,))), True),
    "squared error": lambda: (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), (torch.randn(6, 4), torch.randn(6)), True),
    "normalisation": lambda: (Norms(), (torch.randn(6, 4, 8, 8), torch.randint(3, (6,))), True),
    "encoder": lambda: (nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(96, 5)), (torch.randn(6, 6, 8), torch.randint(5, (6,))), False),
    "bert": lambda: (*bert(), True), "llama, tied": lambda: (*causal("Llama", tie_word_embeddings=True), True), "mixture of experts": lambda: (*causal("Mixtral", num_local_experts=3), False),
    "gemma": lambda: (*causal("Gemma", head_dim=4), False), "recurrent": lambda: (Recurrent(), (torch.randint(50, (6, 7)), torch.randint(3, (6,))), False),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    network, batch, heard = CASES[request.param]()
    return network.eval(), batch, heard


@pytest.mark.filterwarnings("ignore")
def test_everything_equals_the_loop(case):
    network, batch, heard = case
    truth = loop(network, batch)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * float(b.abs().max()))
    close(gradient_norms(network, batch), truth.norm(dim=1))
    close(gradient_norms(network, batch, squared=True, chunk=4), truth.square().sum(1))
    close(gradient_dots(network, batch, _rows(batch, slice(1, 4)), chunk=2), truth @ truth[1:4].T)
    close(torch.cat([g.flatten(1) for g in example_gradients(network, batch).values()], 1), truth)
    close(torch.cat([g.flatten() for g in mean_gradient(network, batch, chunk=4).values()]), truth.mean(0))
    p = projected_gradients(network, batch, 4096)
    assert (p @ p.T - truth @ truth.T).norm() < .2 * (truth @ truth.T).norm()
    torch.testing.assert_close(projected_gradients(network, batch, 32, chunk=4), projected_gradients(network, batch, 32), rtol=1e-3, atol=1e-4 * float(p.abs().max()))
    walk = _Gradients(network, None, None)
    walk.over(batch, None, lambda found: 0)
    assert (not walk.alone) == heard


def test_nothing_is_left_behind():
    network, batch = bert()
    network.eval().requires_grad_(False)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    gradient_norms(network, batch, parameters="classifier.*")
    assert all(p.grad is None and not p.requires_grad for p in network.parameters()) and all(v.equal(state[k]) for k, v in network.state_dict().items())
    with pytest.raises(ValueError, match="network: got no parameter that requires a gradient"): gradient_norms(network, batch)


def test_some_parameters_and_own_losses():
    torch.manual_seed(0)
    network, batch = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (torch.randn(6, 4), torch.randint(3, (6,)))
    margin = lambda n, b: (lambda z: z.gather(1, b[1][:, None])[:, 0] - z.logsumexp(1))(n(b[0]).double())
    torch.testing.assert_close(gradient_norms(network, batch, margin, ["2.*"]), loop(network, batch, margin, ["2.weight", "2.bias"]).norm(dim=1))
    assert list(example_gradients(network, batch, parameters="*.bias")) == ["0.bias", "2.bias"]


def test_one_forward_and_one_backward_pass():
    class Counting(nn.Linear):
        rows = backward = 0
        def forward(self, x):
            Counting.rows += len(x)
            out = super().forward(x)
            out.register_hook(lambda g: setattr(Counting, "backward", Counting.backward + len(g)))
            return out
    network, batch = nn.Sequential(Counting(4, 5), nn.Tanh(), nn.Linear(5, 3)), (torch.randn(50, 4), torch.randint(3, (50,)))
    gradient_norms(network, batch, chunk=20)
    assert Counting.rows == 51  # and one row by itself
    Counting.rows = 0
    gradient_dots(network, batch, _rows(batch, slice(0, 10)), chunk=20)
    assert Counting.rows == 61


def test_memory_does_not_grow_with_the_examples():
    torch.manual_seed(0)
    network, sizes = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5)), []
    def losses(network, batch):
        held = sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[:1] == (32,))
        sizes.append(held)
        return example_losses(network, batch)
    gradient_norms(network, (torch.randn(640, 64), torch.randint(5, (640,))), losses, chunk=32)
    assert max(sizes[3:]) <= 1.05 * max(sizes[:3])  # what was heard of one chunk is gone before the next


def test_double_precision_stays_double():
    torch.manual_seed(0)
    network, batch = nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)).double(), (torch.randint(7, (6, 4)), torch.randint(3, (6,), dtype=torch.int32))
    truth = loop(network, batch)
    torch.testing.assert_close(gradient_dots(network, batch, batch), truth @ truth.T, rtol=1e-12, atol=1e-12)


def test_losses_and_labels_that_are_none_are_refused():
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    network = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="losses: got a \\(\\) for 6 rows"): mean_gradient(network, batch, lambda n, b: n(b[0]).sum())
    with pytest.raises(ValueError, match="batches: got NaN"): mean_gradient(network, batch, lambda n, b: n(b[0]).sum(1) * torch.nan)
    lm, ids = causal("Llama")
    with pytest.raises(ValueError, match="batch: got labels that are other tokens"): gradient_norms(lm.eval(), dict(input_ids=ids, labels=(ids + 1) % 50))
    with pytest.raises(ValueError, match="a label for each token"): gradient_norms(lm, dict(input_ids=ids, labels=ids[:, 1:]))
    named = dict(input_ids=ids, labels=torch.where(torch.arange(7) < 3, -100, ids))
    torch.testing.assert_close(gradient_norms(lm, named), loop(lm, named).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_half_precision():
    torch.manual_seed(0)
    network, batch = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).bfloat16(), (torch.randn(8, 16).bfloat16(), torch.randint(3, (8,)))
    torch.testing.assert_close(gradient_norms(network, batch).float(), loop(network.float(), (batch[0].float(), batch[1])).norm(dim=1), rtol=.05, atol=.01)


def test_planted_kinds_are_apart_and_right():
    torch.manual_seed(0)
    data = Data(torch.rand(200, 5), torch.arange(200) % 3 * 2, ("a", "b", "c", "d", "e"))
    given = planted(data, noise=.2, duplicates=.1, off=.1, hard=.1, generator=4)
    assert [int(given.where(k).sum()) for k in KINDS] == [120, 40, 20, 20, 20] and len(given.y) == 220
    assert set(given.y.tolist()) == {0, 2, 4} and ((given.y != given.truth) == given.where("noisy")).all()  # labels that are not in the data are not made
    assert detection(given.where("off").float(), given) == pytest.approx(dict(noisy=.5, duplicate=.5, off=1., hard=.5))
    twice = torch.zeros(220).index_fill(0, torch.cat([given.origin[given.where("duplicate")], given.where("duplicate").nonzero()[:, 0]]), 1.)
    assert detection(twice, given)["duplicate"] == 1  # the originals, which look the same, do not count against it
    none = planted(data, hard=0.)
    assert math.isnan(detection(torch.rand(len(none.y)), none, ["hard"])["hard"])
