"Weights, statistics and walks on the architectures that transformers has today; core.keep against sorting; core.language."
import gc
import warnings
import weakref
import pytest
import torch
import transformers
from torch import nn
from whatmatters.core import calibration
from whatmatters.core.calibration import calibrate, chain_of, coverage, gradients, hidden_cosines, listen, restoring, walk, weights_of
from whatmatters.core.keep import blocks, count_of, n_of_m, ranks, top
from whatmatters.core.language import load_text, next_token_losses, token_rows
from whatmatters.core.values import seeded

SMALL = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64)
MOE = dict(**SMALL, num_local_experts=3, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=4)
CAUSAL = {"Llama": SMALL, "Qwen3": dict(**SMALL, head_dim=4), "Phi3": dict(**SMALL, pad_token_id=0), "Gemma2": dict(**SMALL, head_dim=4), "Mixtral": MOE, "Qwen3Moe": MOE, "GptOss": MOE,
          "GPT2": dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64), "GPTNeoX": dict(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})}
IDS = torch.randint(0, 64, (5, 9), generator=seeded(3))


def causal(name, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CAUSAL[name])
    cls = transformers.GPT2LMHeadModel if name == "GPT2" else getattr(transformers, f"{name}ForCausalLM")
    return cls(config).eval().to(dtype)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no calibration token reached")
        yield


@pytest.mark.parametrize("name", CAUSAL)
def test_every_matrix_is_heard_all_at_once_and_block_by_block(name):
    network = causal(name)
    weights = weights_of(network)
    named = sum(p.numel() for n, p in network.named_parameters() if p.ndim > 1 and "embed" not in n and "lm_head" not in n and "wte" not in n and "wpe" not in n)
    routers = sum(p.numel() for m in network.modules() if hasattr(m, "top_k") and not isinstance(m, nn.Linear) for n, p in m.named_parameters(recurse=False) if p.ndim == 2)
    biases = sum(p.numel() for m in network.modules() if hasattr(m, "is_transposed") for n, p in m.named_parameters(recurse=False) if p.ndim == 2)
    assert sum(w.matrix.numel() for w in weights.values()) == named - routers - biases
    whole, stepwise = calibrate(network, [IDS[:2], IDS[2:]], want=("second",)), {}
    for _, _, statistics in walk(network, [IDS[:2], IDS[2:]]): stepwise |= statistics
    assert list(whole) == list(weights) and set(stepwise) == set(weights)
    for n in weights: assert torch.allclose(whole[n].second, stepwise[n].second, rtol=1e-3, atol=1e-5), n
    experts = {n.rpartition("[")[0] for n in weights if "[" in n}
    for e in experts: assert sum(whole[n].rows for n in weights if n.startswith(e + "[")) == IDS.numel() * 2


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_an_expert_s_statistics_predict_its_outputs(name):
    network, squares = causal(name), {}
    def note(n, x, y): squares[n] = squares.get(n, 0) + (x @ weights[n].matrix.mT).square().sum(0), y
    weights = {n: w for n, w in weights_of(network).items() if "experts.down_proj" in n}
    with torch.no_grad(), listen(weights, on_call=note) as listener:
        network.set_experts_implementation("eager")
        listener.run(network, IDS)
    assert squares and all(y.shape[1] == 16 for _, y in squares.values())
    if name == "Mixtral": # GptOss adds its biases behind the product
        for n, (predicted, y) in squares.items(): assert torch.allclose(predicted, y.square().sum(0), rtol=1e-3, atol=1e-6)


def test_layers_that_share_an_input_share_a_statistic_and_one_product():
    heard, network = [], causal("Llama")
    with torch.no_grad(), listen(weights_of(network), lambda name, x: heard.append(name)) as listener: listener.run(network, IDS)
    assert len(heard) == 2 * 4 and len(listener.leader) == 2 * 7


def test_half_precision_and_its_single_precision_sums():
    statistics = calibrate(causal("Llama", torch.bfloat16), [IDS], want=("norm", "second", "quantiles"))
    assert {s.second.dtype for s in statistics.values()} == {torch.float32}


@pytest.mark.parametrize("what", ["ViT", "Bert", "T5", "Swin"])
def test_encoders_and_hierarchies(what):
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16, generator=seeded(1))
    make = {"ViT": lambda: (transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)), dict(pixel_values=pixels)),
            "Swin": lambda: (transformers.SwinForImageClassification(transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2)), dict(pixel_values=pixels)),
            "Bert": lambda: (transformers.BertForSequenceClassification(transformers.BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})), dict(input_ids=IDS)),
            "T5": lambda: (transformers.T5EncoderModel(transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4)), dict(input_ids=IDS))}
    network, batch = make[what]()
    network.eval()
    whole, stepwise = calibrate(network, [batch]), {}
    for _, _, statistics in walk(network, [batch], want=("norm",)): stepwise |= statistics
    assert set(whole) == set(stepwise)
    for n in whole: assert torch.allclose(whole[n].square, stepwise[n].square, rtol=1e-3, atol=1e-5), n
    if what != "Swin": assert len(hidden_cosines(network, [batch])) == len(chain_of(network))


def test_cost_in_forward_passes():
    network, calls = causal("Llama"), dict(block=0, head=0)
    def count(what): return lambda *a: calls.__setitem__(what, calls[what] + 1)
    network.model.layers[1].mlp.register_forward_hook(count("block")), network.lm_head.register_forward_hook(count("head"))
    batches = [IDS[:2], IDS[2:4]]
    for spend, blocks, heads in ((lambda: calibrate(network, batches), 2, 0), (lambda: list(walk(network, batches)), 2, 0), (lambda: list(walk(network, batches, sequential=True)), 2, 0), (lambda: hidden_cosines(network, batches), 2, 0),
                                 (lambda: gradients(network, batches), 4, 4)):
        calls.update(block=0, head=0)
        spend()
        assert calls == dict(block=blocks, head=heads)  # the last block's outputs are asked for by nobody


def test_the_statistics_of_one_block_are_alive_at_a_time(monkeypatch):
    alive, most = weakref.WeakSet(), []
    class Watched(calibration.Statistics):
        def add(self, *a):
            alive.add(self)
            most.append(len(alive))
            super().add(*a)
    monkeypatch.setattr(calibration, "Statistics", Watched)
    gc.disable()  # nothing may wait for it
    try:
        for _, _, statistics in walk(causal("Llama"), [IDS[:2], IDS[2:]]): del statistics
        assert len(most) == 2 * 2 * 4 and max(most) == 4 and not alive
        calibrate(causal("Llama"), [IDS])
        assert max(most) == 2 * 4 and not alive
    finally: gc.enable()


def test_the_network_is_left_as_it_was():
    network = causal("Mixtral")
    before, forwards = {n: p.clone() for n, p in network.state_dict().items()}, [m.__dict__.get("forward") for m in network.modules()]
    list(walk(network, [IDS])), calibrate(network, [IDS]), gradients(network, [IDS[:1]])
    assert all(torch.equal(before[n], p) for n, p in network.state_dict().items()) and [m.__dict__.get("forward") for m in network.modules()] == forwards
    assert network.config.use_cache and all(p.grad is None for p in network.parameters())
    generator = walk(network, [IDS])
    next(generator)
    generator.close()
    assert network.config.use_cache and not [h for m in network.modules() for h in m._forward_hooks]


def test_tied_weights_are_one():
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()
    assert [n for n in weights_of(network, skip=["*layers*"])] == ["model.embed_tokens.weight"]
    whole = sum(p.numel() for p in network.parameters())
    assert coverage(network, weights_of(network)).startswith(f"{whole - 64 * 16 - 5 * 16:,} of {whole:,} parameters") and coverage(network, weights_of(network, skip=[])).startswith(f"{whole - 5 * 16:,} of {whole:,}")  # two norms in each block and one behind


@pytest.mark.parametrize("spoil, message", [
    (lambda f: calibrate(f, []), "batches: got none"), (lambda f: list(walk(f, [])), "batches: got none"), (lambda f: gradients(f, []), "batches: got none"),
    (lambda f: calibrate(f, [torch.zeros(0, 4, dtype=torch.long)]), "batches: got a Tensor without"), (lambda f: list(walk(f, [torch.zeros(0, 4, dtype=torch.long)])), "batches: got a Tensor without"),
    (lambda f: gradients(f, [IDS[:, :1]]), "loss: got nan of a row"), (lambda f: calibrate(f, ["text"]), "batches: got a str"),
    (lambda f: calibrate(f, [IDS], want=("mean",)), "want: got mean"), (lambda f: weights_of(f, skip="lm_head"), "skip: got 'lm_head'"),
    (lambda f: weights_of(nn.Sequential(nn.GRU(2, 2))), "of a GRU, for which there is no rule"), (lambda f: list(walk(f, [IDS], chain="model.blocks")), "chain: got 'model.blocks'"),
    (lambda f: gradients(f, [IDS], lambda f, b: f(b).logits), "loss: got a"), (lambda f: hidden_cosines(nn.Linear(2, 2), [torch.ones(1, 2)]), "without a list of blocks")])
def test_bad_input(spoil, message):
    with pytest.raises(ValueError, match=message): spoil(causal("Llama"))


def test_training_mode_is_refused_where_it_matters():
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(.5), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="network: got one in training mode"): calibrate(network, [torch.ones(2, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring(dtype, peak):
    network = causal("GPT2", dtype)
    network.odd = nn.ParameterList([torch.tensor(2.), torch.zeros(0, 3), torch.randn(4, 3).T, nn.Parameter(torch.arange(3), requires_grad=False)])
    before = {n: p.clone() for n, p in network.named_parameters()}
    with pytest.raises(RuntimeError), torch.no_grad(), restoring(network):
        for p in network.parameters(): p.mul_(3)
        raise RuntimeError
    assert all(torch.equal(before[n], p) for n, p in network.named_parameters())
    def nothing():
        with restoring(network): pass
    assert peak(nothing) < 200  # the copy is not in memory but for the transposed one


def test_keep_agrees_with_sorting_on_random_shapes():
    generator = seeded(0)
    for _ in range(60):
        rows, columns = torch.randint(1, 9, (2,), generator=generator).tolist()
        scores = torch.randint(-2, 3, (rows, columns), generator=generator).float() / 2
        valid, ratio = torch.rand(rows, columns, generator=generator) < .7, torch.rand((), generator=generator).item()
        assert torch.equal(top(scores, ratio=ratio), ranks(scores) < count_of(ratio, columns))
        assert torch.equal(top(scores, ratio=ratio, valid=valid), ranks(scores, valid) < count_of(ratio, valid.sum(1))[:, None])
        assert top(scores, ratio=ratio, per="tensor").sum() == count_of(ratio, scores.numel())
    assert n_of_m(torch.zeros(2, 8)).tolist() == [[True, True, False, False] * 2] * 2
    assert blocks(torch.zeros(4, 4), (2, 2), k=1).tolist()[0] == [True, True, False, False]
    with pytest.raises(ValueError, match="scores: got 1 NaN"): top({"a": torch.tensor([1., float("nan")])}, ratio=.5, per="model")


def test_texts_from_folders(tmp_path):
    (tmp_path/"one.txt").write_text("a" * 100)
    assert [len(load_text(str(tmp_path), s, share=.2)) for s in ("train", "test")] == [80, 20]
    (tmp_path/"one.txt").rename(tmp_path/"valid.txt"), (tmp_path/"test.txt").write_text("b" * 10)
    assert load_text(str(tmp_path))[0] == "a" and load_text(str(tmp_path), "test") == "b" * 10
    (tmp_path/"valid.txt").rename(tmp_path/"other.txt")
    with pytest.raises(ValueError, match="data: got the texts other, test"): load_text(str(tmp_path))
    for p in tmp_path.iterdir(): p.unlink()
    with pytest.raises(ValueError, match="without text"): load_text(str(tmp_path))


def test_real_text_and_a_real_model(real, root):
    assert len(load_text(real("wikitext2"))) > 1e6 and load_text(real("wikitext2"), "test") != load_text(real("wikitext2"))
    folder = root.parent/"shared/models/stories260K/hf"
    if not folder.is_dir(): pytest.skip("no folder of a real language model")
    from whatmatters.core.models import load_model
    model = load_model(str(folder))
    ids = token_rows(model.tokenizer, "Once upon a time, there was a little girl named Lily. She loved to play with her toys. " * 20, 32)
    assert next_token_losses(model.network, ids).mean() < 3 and len(calibrate(model.network, [ids])) == len(weights_of(model.network))


@pytest.mark.parametrize("use", (lambda n, b: {k: s.norm for k, s in calibrate(n, b).items()}, gradients,
                                 lambda n, b: {k: s.second for _, _, found in walk(n, b) for k, s in found.items()}, lambda n, b: {"": hidden_cosines(n, b)}))
def test_one_batch_needs_no_list_and_may_come_from_a_tokenizer(use):
    network = causal("Llama")
    whole, mask = use(network, [IDS]), torch.tensor([[1] * 9] * 3 + [[0] * 4 + [1] * 5] * 2)
    padded = use(network, [dict(input_ids=IDS, attention_mask=mask)])
    for batch in (IDS, dict(input_ids=IDS), transformers.BatchEncoding(dict(input_ids=IDS)), [transformers.BatchEncoding(dict(input_ids=IDS))]):
        found = use(network, batch)
        assert all(torch.equal(found[n], whole[n]) for n in whole)
    found = use(network, transformers.BatchEncoding(dict(input_ids=IDS, attention_mask=mask)))
    assert all(torch.equal(found[n], padded[n]) for n in padded) and any(not torch.equal(found[n], whole[n]) for n in whole)
    for batches in (None, "text", 3):
        with pytest.raises(ValueError, match="^batches: got"): use(network, batches)


def test_the_loss_of_the_next_token_is_for_language_models():
    network, body = causal("Llama"), causal("Llama").model
    assert all(torch.equal(a, b) for a, b in zip(gradients(network, [(IDS,)]).values(), gradients(network, [IDS]).values()))
    with pytest.raises(ValueError, match="^loss: got none for a Sequential"): gradients(nn.Sequential(nn.Linear(3, 2)), [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="^loss: got none, and a LlamaModel"): gradients(body, [IDS])
    with pytest.raises(ValueError, match="^batches: got a tuple of 2"): gradients(network, [(IDS, IDS)])
    for odd in (None, [network]):
        with pytest.raises(ValueError, match="^network: got a"): weights_of(odd)
