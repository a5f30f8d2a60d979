"DeepLIFT, LRP and patching: peers, sums, costs, networks that peers get wrong, and what is refused."
import captum.attr
import pytest
import torch
from conftest import SHARED
from torch import nn
from torch.nn import functional as F
from whatmatters.attribution.gradients import input_x_gradient
from whatmatters.attribution.propagation import activation_patching, attribution_patching, deep_shap, deeplift, lrp, relp
from whatmatters.core.hooks import module_of
from whatmatters.core.rules import Rules, value_under
from whatmatters.core.values import class_value, count_calls

pytestmark = pytest.mark.filterwarnings("ignore")


def close(a, b, tolerance=1e-4):
    "Equal to `tolerance` of the largest entry."
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.fixture
def case():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.Sigmoid(),
                            nn.Linear(8, 5), nn.Softplus()).double().eval()
    return network, torch.randn(4, 3, 12, 12).double(), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("baseline", ["zeros", "one", "each"])
def test_captum_deeplift(case, baseline):
    network, x, classes = case
    reference = {"zeros": torch.zeros_like(x), "one": torch.randn(1, 3, 12, 12).double(), "each": torch.randn_like(x)}[baseline]
    theirs = captum.attr.DeepLift(network).attribute(x, reference, classes).detach()
    close(deeplift(class_value(network), x, reference, args=(classes,)), theirs)
    close(deeplift(class_value(network), x, reference, args=(classes,), chunk=3), theirs)


def test_captum_deep_lift_shap(case):
    network, x, classes = case
    background = torch.randn(3, 3, 12, 12).double()
    close(deep_shap(class_value(network), x, background, args=(classes,)), captum.attr.DeepLiftShap(network).attribute(x, background, classes).detach())


def test_shap_deep_explainer(case):
    shap = pytest.importorskip("shap")
    torch.manual_seed(1)
    network, background = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(4, 3, 12, 12)
    x = case[1].float()
    theirs = torch.tensor(shap.DeepExplainer(network, background).shap_values(x))
    for c in range(3): close(deep_shap(class_value(network), x, background, args=(torch.full((4,), c),)), theirs[..., c].float())


def test_captum_epsilon_lrp(case):
    "Captum has LRP for some modules."
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 5), nn.ReLU()).double().eval(), case[1]
    f = lambda x: network(x)[:, 0, 0, 0]
    theirs = captum.attr.LRP(network).attribute(x, (0, 0, 0)).detach()
    alive = f(x) > 0
    assert alive.any()
    close(lrp(f, x, epsilon=1e-9)[alive], theirs[alive], 1e-3)


@pytest.mark.parametrize("name, shape", [("california_model.pt", (8,)), ("titanic_model.pt", (12,)), ("cifar_torchvision.pt", (3, 32, 32))])
def test_models_of_captums_tutorials(name, shape):
    path = SHARED/"models"/"captum_tutorial_models"/name
    if not path.is_file(): pytest.skip("no models of Captum's tutorials here")
    state = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    network = tutorial_network(state, nn.Sigmoid if name.startswith("titanic") else nn.ReLU).eval()
    x, f = torch.rand(4, *shape), class_value(network)
    classes = torch.zeros(4, dtype=torch.long)
    ours, error = deeplift(f, x, args=(classes,), return_error=True)
    assert error.abs().max() < 1e-4 * ours.abs().sum()
    if name != "cifar_torchvision.pt": close(ours, captum.attr.DeepLift(network).attribute(x, torch.zeros_like(x), 0).detach())
    assert lrp(f, x, args=(classes,)).isfinite().all()


def tutorial_network(state, activation):
    "The layers that a state dictionary names, in its order, with activations (in the image model, and pooling) in between."
    layers, weights = [], [(k, v) for k, v in state.items() if k.endswith("weight")]
    for i, (key, w) in enumerate(weights):
        layer = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2]) if w.ndim == 4 else nn.Linear(w.shape[1], w.shape[0])
        layer.load_state_dict({"weight": w, "bias": state[key.replace("weight", "bias")]})
        if w.ndim == 2 and i and weights[i - 1][1].ndim == 4: layers.append(nn.Flatten())
        layers.append(layer)
        if i + 1 < len(weights): layers.append(activation())
        if w.ndim == 4: layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class Shared(nn.Module):
    "One ReLU module for two layers."
    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(6, 12), nn.Linear(12, 12), nn.ReLU()

    def forward(self, x): return self.relu(self.second(self.relu(self.first(x)))) @ torch.linspace(-1, 1, 24, dtype=x.dtype).view(12, 2)


class Functional(Shared):
    def forward(self, x): return (torch.relu(self.second(F.relu(self.first(x)))) @ torch.linspace(-1, 1, 24, dtype=x.dtype).view(12, 2)).softmax(-1)


class Smooth(nn.Module):
    "Attention, layer norm, GELU by module and by hand, RMS norm by hand, a gate."
    def __init__(self, size=8, tokens=4):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(size, 2, 16, activation="gelu", batch_first=True, norm_first=True)
        self.gate, self.up = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        h = self.block(x.unflatten(-1, (4, -1)))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        g = self.up(h)
        h = h + F.silu(self.gate(h)) * (.5 * g * (1 + torch.erf(g / 2 ** .5)))
        return h.mean(1)


@pytest.mark.parametrize("make", [Shared, Functional, Smooth])
@pytest.mark.parametrize("rule", ["rescale", "reveal-cancel"])
def test_sums_to_delta_where_module_hooks_do_not(make, rule):
    torch.manual_seed(0)
    network = make().double().eval()
    x = torch.randn(5, 32 if make is Smooth else 6).double()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    ours, error = deeplift(class_value(network), x, torch.randn_like(x), rule, (torch.zeros(5).long(),), return_error=True)
    assert error.abs().max() < 1e-10 and ours.isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters()) and not any(m._forward_hooks or m._backward_hooks for m in network.modules())


def test_peer_fails_on_those():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    with pytest.raises(RuntimeError): captum.attr.DeepLift(Shared().eval()).attribute(x, target=0)
    wrong = captum.attr.DeepLift(Functional().eval()).attribute(x, target=0, return_convergence_delta=True)[1]
    assert wrong.abs().max() > 1e-3


def test_costs(case):
    network, x, classes = case
    for run, rows, calls in ((lambda f: deeplift(f, x, torch.randn_like(x), args=(classes,)), 8, 2), (lambda f: deeplift(f, x, args=(classes * 0,)), 5, 2), (lambda f: lrp(f, x, args=(classes,)), 4, 1),
                             (lambda f: lrp(f, x, "gamma", args=(classes,)), 4, 1), (lambda f: deep_shap(f, x, torch.randn(7, 3, 12, 12).double(), args=(classes * 0,)), 11, 8)):
        counted = count_calls(class_value(network))
        run(counted)
        assert (counted.rows, counted.calls) == (rows, calls)


def test_bf16_and_outer_no_grad(case):
    network, x, classes = case
    f = class_value(network)
    exact = deeplift(f, x, args=(classes,))
    with torch.no_grad(): torch.testing.assert_close(deeplift(f, x, args=(classes,)), exact)
    low = class_value(nn.Sequential(*network).bfloat16())
    for method in (deeplift, lrp):
        scores = method(low, x.bfloat16(), args=(classes,))
        assert scores.dtype == torch.bfloat16 and scores.isfinite().all()


def test_operations_one_by_one():
    "Every operation that the tables treat keeps the sum, spelled in every way that people spell it."
    torch.manual_seed(0)
    x, y, w = torch.randn(3, 4, 6).double(), torch.randn(3, 4, 6).double(), torch.rand(4).double()
    total = lambda t: t.flatten(1).sum(1)
    cases = {
        "square": lambda x: x ** 2, "pow": lambda x: x.abs() ** 1.5, "exp": torch.exp, "two to the": lambda x: 2 ** x, "gates": lambda x: x * torch.sigmoid(x.flip(1)), "in place": lambda x: torch.relu_(x * 2).mul_(3),
        "in place and again": lambda x: (h := x * 2, h.tanh_(), h + 1)[-1], "divided": lambda x: x / (1 + x.flip(2).abs()), "one over": lambda x: 1 / (2 + x.sin()), "softmax": lambda x: x.softmax(-1)[..., :2],
        "softmax of columns": lambda x: (h := x.transpose(0, 1), h.softmax(0)[:2].transpose(0, 1))[1], "log-softmax": lambda x: F.log_softmax(x, 1)[:, :1], "logsumexp": lambda x: x.logsumexp(2), "layer norm": lambda x: F.layer_norm(x, (4, 6))[..., 0], "group norm": lambda x: F.group_norm(x, 2, w, w)[..., 0],
        "instance norm": lambda x: F.instance_norm(x)[..., 0], "rms norm": lambda x: F.rms_norm(x, (6,))[..., 0], "normalize": lambda x: F.normalize(x, dim=-1)[..., 0], "prelu": lambda x: F.prelu(x, w), "glu": F.glu,
        "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x.flip(1)), "bmm": lambda x: x @ x.mT, "baddbmm": lambda x: torch.baddbmm(x.sum(2, keepdim=True), x, x.mT), "amax": lambda x: x.amax(-1), "max": lambda x: x.max(1).values,
        "maximum": lambda x: torch.maximum(x, x.flip(1)), "pool": lambda x: F.max_pool1d(x, 2), "pool 2d": lambda x: F.max_pool2d(x[:, None], 2, 1, padding=1), "adaptive": lambda x: F.adaptive_max_pool1d(x, 2),
        "sdpa": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None].flip(2), x[:, None].tanh(), is_causal=True), "clamp": lambda x: x.clamp(-.5, .5), "hand-made silu": lambda x: x * (1 / (1 + torch.exp(-x))),
        "mask": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=torch.ones(4, 4).tril().bool()),
    }
    for name, g in cases.items():
        for kind, reference in (("other", y), ("half", torch.where(y > 0, x, y)), ("same", x)):
            scores, error = deeplift(lambda x: total(g(x)), x, reference, return_error=True)
            assert error.abs().max() < 1e-9 and scores.isfinite().all(), (name, kind, error)


def test_near_reference_is_the_gradient():
    "As the reference comes near, DeepLIFT is the gradient times the difference."
    torch.manual_seed(0)
    network, x = Smooth().double().eval(), torch.randn(3, 32).double()
    f, step = (lambda x: network(x)[:, 0]), 1e-5 * torch.randn(3, 32).double()
    leaf = x.clone().requires_grad_()
    slope, = torch.autograd.grad(f(leaf).sum(), leaf)
    close(deeplift(f, x + step, x), slope * step, 1e-3)


def test_lrp_identities():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 9, bias=False), nn.ReLU(), nn.Linear(9, 1, bias=False)).double()
    f, x = (lambda x: network(x)[:, 0]), torch.rand(7, 6).double()
    torch.testing.assert_close(lrp(f, x, epsilon=0), input_x_gradient(f, x))
    torch.testing.assert_close(lrp(f, x, "gamma", gamma=0, epsilon=0), lrp(f, x, epsilon=0))
    w, v = network[0].weight, network[2].weight
    one = nn.Sequential(network[0]).double()
    z_plus = lrp(lambda x: one(x)[:, 2], x, "alpha-beta", alpha=1, epsilon=0)
    more = (x * w[2].clamp_min(0)).detach()
    torch.testing.assert_close(z_plus, more / more.sum(1, keepdim=True) * one(x)[:, 2:3].detach())


def test_lrp_of_a_hand_made_norm_and_gelu():
    "Written out or not, a normalisation and an activation get the same rules."
    torch.manual_seed(0)
    x, w, v = torch.randn(4, 6).double(), torch.randn(6, 6).double(), torch.randn(6).double()
    by_hand = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    gelu = lambda x: .5 * x * (1 + torch.tanh((2 / torch.pi) ** .5 * (x + .044715 * torch.pow(x, 3))))
    a = lrp(lambda x: gelu(by_hand(x) @ w) @ v, x, epsilon=0)
    b = lrp(lambda x: F.gelu(F.rms_norm(x, (6,), eps=1e-6) @ w, approximate="tanh") @ v, x, epsilon=0)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a.sum(1), F.gelu(by_hand(x) @ w, approximate="tanh") @ v)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    return config, LlamaForCausalLM


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama(attention):
    config, make = llama()
    config._attn_implementation = attention
    network = make(config).double().eval()
    x, y = torch.randn(2, 3, 7, 16).double()
    f = lambda x: network(inputs_embeds=x, use_cache=False).logits[:, -1, 3]
    assert deeplift(f, x, y, return_error=True)[1].abs().max() < 1e-7 # its norms and softmax compute in single precision whatever comes
    assert lrp(f, x, epsilon=0, return_error=True)[1].abs().max() < 1e-6 # no biases: what the norms' epsilon takes
    modules = {n: module_of(network, n) for n in ("model.layers.0.mlp", "model.layers.1")}
    effects, exact = relp(f, x, y, modules), activation_patching(f, x, y, modules)
    assert {n: e.shape for n, e in effects.items()} == {n: (3, 7) for n in modules}
    whole = f(y) - f(x)
    last = exact["model.layers.1"][:, -1]
    torch.testing.assert_close(last, whole.detach())
    near = {n: attribution_patching(f, x, x + 1e-2 * (y - x), modules)[n] for n in modules}
    for n, e in activation_patching(f, x, x + 1e-2 * (y - x), modules).items(): close(near[n], e, .1)


def test_eager_and_sdpa_agree():
    config, make = llama()
    scores = []
    for attention in ("eager", "sdpa"):
        config._attn_implementation = attention
        torch.manual_seed(1)
        network = make(config).double().eval()
        x = torch.linspace(-1, 1, 2 * 7 * 16).view(2, 7, 16).double()
        f = lambda x: network(inputs_embeds=x, use_cache=False).logits[:, -1, 3]
        scores.append((deeplift(f, x), lrp(f, x), lrp(f, x, attention="taylor")))
    for a, b in zip(*scores): close(a, b)


def test_gpt2_and_bert():
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)).double().eval()
    bert = BertModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)).double().eval()
    x = torch.randn(2, 5, 16).double()
    for f in (lambda x: gpt2(inputs_embeds=x, use_cache=False).logits[:, -1, 3], lambda x: bert(inputs_embeds=x).pooler_output[:, 0]):
        assert deeplift(f, x, return_error=True)[1].abs().max() < 1e-9
        assert lrp(f, x).isfinite().all()


def test_weights_by_addmm():
    "The linear layers of GPT-2 are calls of addmm."
    torch.manual_seed(0)
    w, b, v, x = torch.randn(6, 5).double(), torch.randn(5).double(), torch.randn(5).double(), torch.randn(3, 6).double()
    one, other = (lambda x: torch.addmm(b, x, w).relu() @ v), (lambda x: F.linear(x, w.T, b).relu() @ v)
    torch.testing.assert_close(deeplift(one, x, rule="reveal-cancel"), deeplift(other, x, rule="reveal-cancel"))
    for rule in ("epsilon", "gamma", "alpha-beta"): torch.testing.assert_close(lrp(one, x, rule), lrp(other, x, rule))


def test_refusals():
    x = torch.randn(3, 4)
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.sin()
        @staticmethod
        def backward(ctx, g): return g
    gru, lstm = nn.GRU(4, 2, batch_first=True), nn.LSTMCell(4, 2)
    cases = {"cumprod": lambda x: x.cumprod(1).sum(1), "gru": lambda x: gru(x[:, None])[0].sum((1, 2)), "lstm_cell": lambda x: lstm(x)[0].sum(1), "Odd": lambda x: Odd.apply(x).sum(1), "sort": lambda x: x.sort(1).values[:, 0],
             "batch_norm": lambda x: F.batch_norm(x, None, None, training=True).sum(1), "median": lambda x: x.median(1).values, "atan2": lambda x: torch.atan2(x, x.flip(1)).sum(1)}
    for name, f in cases.items():
        for method in (deeplift, lrp):
            with pytest.raises(ValueError, match=f"operation: got {name}"): method(f, x)
    with pytest.raises(ValueError, match="operation: got log_softmax"): lrp(lambda x: x.log_softmax(1)[:, 0], x)
    with pytest.raises(ValueError, match="rule: got 'zero'"): lrp(lambda x: x.sum(1), x, "zero")
    with pytest.raises(ValueError, match="gamma: got -1"): lrp(lambda x: x.sum(1), x, "gamma", gamma=-1)
    with pytest.raises(ValueError, match="baseline: got shape"): deeplift(lambda x: x.sum(1), x, torch.zeros(5))
    with pytest.raises(ValueError, match="f: got values of shape"): deeplift(lambda x: x, x)
    with pytest.raises(ValueError, match="f: got contributions that miss"): deeplift(lambda x: (x * (x > 0.1) + (x < .1)).sum(1), x)


def test_graph_is_left_behind_nowhere():
    "A second call on the same tensors starts afresh."
    x = torch.randn(3, 4)
    f = lambda x: (x * torch.sigmoid(x)).sum(1)
    a = deeplift(f, x)
    assert not x.requires_grad and torch.equal(a, deeplift(f, x))
    value, leaf = value_under(Rules({}), lambda x: x.sum(1), x)
    assert leaf is not x and torch.equal(torch.autograd.grad(value.sum(), leaf)[0], torch.ones(3, 4))
