"Units of many architectures: found, removed, saved, loaded, and everything put back where it fails."
import copy
import json
import pytest
import torch
import transformers as T
from torch import nn
from whatmatters.core.keep import top
from whatmatters.core.vision import CifarResNet
from whatmatters.sparsity import structure as S

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=.3)
IDS, IMAGES = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(0)), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FOREIGN = {"gpt2": SIZES, "t5": (*SIZES, "max_position_embeddings"), "opt": ("intermediate_size",),  # what these call otherwise
           "vit": ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")}


def make(name, **changes):
    torch.manual_seed(0)
    kind, config, extra = {
        "llama": (T.LlamaForCausalLM, T.LlamaConfig, dict(num_key_value_heads=2)), "mqa": (T.LlamaForCausalLM, T.LlamaConfig, dict(num_key_value_heads=1)),
        "three heads a group": (T.LlamaForCausalLM, T.LlamaConfig, dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=6)),
        "tied": (T.LlamaForCausalLM, T.LlamaConfig, dict(num_key_value_heads=2, tie_word_embeddings=True)), "qwen3": (T.Qwen3ForCausalLM, T.Qwen3Config, dict(num_key_value_heads=2, head_dim=12)),
        "phi3": (T.Phi3ForCausalLM, T.Phi3Config, dict(num_key_value_heads=2)), "mixtral": (T.MixtralForCausalLM, T.MixtralConfig, dict(num_key_value_heads=2, num_local_experts=4)),
        "qwen moe": (T.Qwen2MoeForCausalLM, T.Qwen2MoeConfig, dict(num_key_value_heads=2, num_experts=4, moe_intermediate_size=20, shared_expert_intermediate_size=24)),
        "opt": (T.OPTForCausalLM, T.OPTConfig, dict(ffn_dim=44, word_embed_proj_dim=32, init_std=.3)), "bert": (T.BertForSequenceClassification, T.BertConfig, {}),
        "gpt2": (T.GPT2LMHeadModel, T.GPT2Config, dict(n_embd=32, n_layer=2, n_head=4)),
        "vit": (T.ViTForImageClassification, T.ViTConfig, dict(image_size=16, patch_size=4, num_labels=5)), "t5": (T.T5ForConditionalGeneration, T.T5Config, dict(d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4, decoder_start_token_id=0)),
    }[name]
    return kind(config(**{k: v for k, v in {**SMALL, **extra, **changes}.items() if k not in FOREIGN.get(name, ())})).eval()


def example(name): return IMAGES if name == "vit" else dict(input_ids=IDS, decoder_input_ids=IDS[:, :3]) if name == "t5" else IDS


def random_masks(groups, seed=1, keep=.5):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: top(torch.rand(len(g), generator=generator), k=max(1, int(len(g) * keep)), per="tensor") for g in groups}


def outputs(network, batch):
    with torch.no_grad(): return (network(**batch) if isinstance(batch, dict) else network(batch)).logits


HEADS = {"llama": 2, "tied": 2, "three heads a group": 3, "mqa": None, "qwen3": 2, "phi3": 2, "mixtral": 2, "qwen moe": 2, "opt": 4, "bert": 4, "gpt2": 4, "vit": 4, "t5": 4}


@pytest.mark.parametrize("name", HEADS)
def test_units_are_removed_saved_and_loaded(name, tmp_path):
    network, batch = make(name), example(name)
    before = copy.deepcopy(network.state_dict())
    groups = S.units(network, batch)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values())) and not network.training
    sizes = sorted({len(g) for g in groups})
    assert HEADS[name] in sizes if HEADS[name] else 1 not in sizes
    assert name == "mixtral" or 44 in sizes or name in ("qwen moe", "gpt2")
    kept = random_masks(groups)
    with S.mask_units(network, groups, kept): masked = outputs(network, batch)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values()))
    lost = sum(int((~kept[g.name]).sum()) * g.parameters for g in groups)
    total = sum(p.numel() for p in network.parameters())
    S.shrink(network, groups, kept, batch)
    assert sum(p.numel() for p in network.parameters()) <= total - lost * .8  # a slice that two groups share counts twice in `lost`
    torch.testing.assert_close(outputs(network, batch), masked, rtol=1e-5, atol=1e-5 * float(masked.abs().max().clamp_min(1)))
    kind = S.save(network, tmp_path/"model")
    assert kind == ("recipe" if name in ("bert", "gpt2", "opt") else "stock")
    again = S.load(tmp_path/"model")
    assert torch.equal(outputs(again, batch), outputs(network, batch))
    if kind == "stock": assert torch.equal(outputs(type(network).from_pretrained(tmp_path/"model").eval(), batch), outputs(network, batch))
    if network.can_generate():
        tell = lambda n, **how: n.generate(IDS, max_new_tokens=5, do_sample=False, **how)
        assert torch.equal(tell(again), tell(network)) and torch.equal(tell(network, use_cache=False), tell(network))


def test_uneven_widths_need_a_recipe_and_even_ones_none(tmp_path):
    network = make("llama")
    groups = [g for g in S.units(network, IDS) if g.name.endswith("down_proj")]
    S.shrink(network, S.Units(groups, {}), {g.name: torch.arange(44) < n for g, n in zip(groups, (20, 30))}, IDS)
    assert S.save(network, tmp_path/"model") == "recipe"
    recipe = json.loads((tmp_path/"model/recipe.json").read_text())
    assert recipe["attributes"]["model.layers.1.mlp"] == {"intermediate_size": 30} and recipe["shapes"]["model.layers.0.mlp.down_proj.weight"] == [32, 20] and not recipe["drop"]
    assert torch.equal(outputs(S.load(tmp_path/"model"), IDS), outputs(network, IDS))
    S.shrink(network, u := S.units(network, IDS), {groups[1].name: torch.arange(30) < 20}, IDS)
    assert S.save(network, tmp_path/"model") == "stock" and not (tmp_path/"model/recipe.json").exists()  # the old recipe goes
    assert T.AutoModelForCausalLM.from_pretrained(tmp_path/"model").config.intermediate_size == 20


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_in_bfloat16(name, tmp_path):
    network = make(name)
    for p in network.parameters(): p.data = p.data.bfloat16()  # what is no parameter stays exact, as when transformers loads it
    groups = S.units(network, IDS)
    single = S.units(make(name), IDS)
    assert [g.name for g in groups] == [g.name for g in single] and all(torch.equal(a.slices[k], b.slices[k]) for a, b in zip(groups, single) for k in a.slices)
    S.shrink(network, groups, random_masks(groups), IDS)
    S.save(network, tmp_path/"model")
    again = S.load(tmp_path/"model")
    assert again.dtype == torch.bfloat16 and torch.equal(outputs(again, IDS), outputs(network, IDS))


def test_heads_of_one_model_are_linked_where_they_share_a_bias():
    group = next(g for g in S.units(make("t5"), example("t5")) if "SelfAttention" in g.name and g.name.startswith("encoder"))
    assert group.slices["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1].tolist() == [[0], [1], [2], [3]]
    assert group.slices["encoder.block.1.layer.0.SelfAttention.q.weight", 0].shape == (4, 8)


def test_a_norm_that_all_heads_share_stays_whole():
    network = make("qwen3")
    groups = S.units(network, IDS)
    S.shrink(network, groups, random_masks(groups), IDS)
    assert network.model.layers[0].self_attn.q_norm.weight.shape == (12,)


def test_experts_are_refused_by_name_and_attention_works():
    groups = S.units(make("mixtral"), IDS)
    assert "model.layers.0.mlp.experts.down_proj" in groups.refused and "model.layers.0.self_attn.o_proj" in [g.name for g in groups]


class Pairs(nn.Module):
    def forward(self, x): return x.view(len(x), -1, 2).mean(-1)


def brute_force(network, x):
    "Which outputs of the first layer of a plain stack feed which inputs of the last, by the whole Jacobian."
    h = network[0](x).detach()
    middle = lambda h: network[1:-1](h)
    return (torch.autograd.functional.jacobian(middle, h) != 0).any(0).any(1).flatten(2).any(-1) if h.ndim > 2 else (torch.autograd.functional.jacobian(middle, h) != 0).any(0).any(1)


@pytest.mark.parametrize("middle, channels, width", [([nn.ReLU()], 6, 6), ([nn.GroupNorm(3, 6), nn.ReLU()], 6, 6), ([nn.Softplus(), nn.GLU()], 6, 3), ([Pairs()], 6, 3)])
def test_pattern_equals_the_whole_jacobian(middle, channels, width):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, channels), *middle, nn.Linear(width, 4)).eval()
    pattern = brute_force(network, torch.randn(64, 5))
    group, last = S.units(network, torch.randn(1, 5))[0], f"{len(network) - 1}.weight"
    assert len(group) == (6 if len(middle) == 1 and isinstance(middle[0], nn.ReLU) else 3)
    for written, read in zip(group.slices["0.weight", 0].tolist(), group.slices[last, 1].tolist()):
        inside = torch.zeros_like(pattern)
        inside[read] = True
        assert pattern[read][:, written].any() and not (pattern & inside)[:, [i for i in range(channels) if i not in written]].any() and not (pattern & ~inside)[:, written].any()
    x = torch.randn(3, 5)
    kept = random_masks([group])
    with S.mask_units(network, [group], kept): masked = network(x)
    torch.testing.assert_close(S.shrink(network, S.Units([group], {}), kept, x)(x), masked)


def test_depthwise_convolutions_and_norms_without_scale():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(5 * 64, 3))
    network(torch.randn(4, 3, 8, 8))  # statistics of the batch norm
    network.eval()
    x = torch.randn(2, 3, 8, 8)
    groups = S.units(network, x)
    assert [len(g) for g in groups] == [4, 5]  # channels in the groups of the norm, and feature maps
    kept = random_masks(groups)
    with S.mask_units(network, groups, kept): masked = network(x)
    torch.testing.assert_close(S.shrink(network, groups, kept, x)(x), masked)
    assert network[3].groups == network[3].in_channels == 4 and network[4].num_groups == 2 and network[1].running_mean.shape == (4,)


def test_residual_network_and_what_its_code_counts_on():
    torch.manual_seed(0)
    network, x = CifarResNet(8).eval(), IMAGES
    before, groups = copy.deepcopy(network.state_dict()), S.units(network, x)
    with pytest.raises(ValueError, match="kept: got layer1.0.conv1, without which the network fails"): S.shrink(network, groups, random_masks(groups), x)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values())) and network.layer1[0].conv1.out_channels == 16
    free = S.removable(network, groups, x)
    assert [g.name for g in free] == [f"layer{i}.0.conv2" for i in (1, 2, 3)] and "linear" in free.refused
    kept = random_masks(free)
    with S.mask_units(network, free, kept): masked = network(x)
    torch.testing.assert_close(S.shrink(network, free, kept, x)(x), masked)


def test_dependencies_of_a_big_llama_cost_little(monkeypatch):
    "Counted in backward passes through what lies between layers: about two for each binary digit of a width and kind of layer, and a few more for each block."
    calls, backward = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or backward(*a, **k))
    cost = {}
    for layers in (2, 8):
        with torch.device("meta"): network = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4))
        network = network.to_empty(device="cpu")
        for t in (*network.parameters(), *network.buffers()): t.data.fill_(.1) if t.ndim == 1 else None
        calls.clear()
        assert [len(g) for g in S.units(network, IDS)] == [4, 1376] * layers
        cost[layers] = len(calls)
    assert cost[2] < 120 and cost[8] - cost[2] < 6 * 30  # half a second with eight blocks, on one core


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "vit"])
def test_attention_is_removed(name, tmp_path):
    network, batch = make(name), example(name)
    silent = copy.deepcopy(network)
    at = S.attention_of(silent, 0)
    out = [m for n, m in silent.get_submodule(at).named_modules() if n in ("o_proj", "out_proj", "c_proj")][0]
    out.weight.data.zero_()
    if out.bias is not None: out.bias.data.zero_()
    S.remove_attention(network, 0)
    torch.testing.assert_close(outputs(network, batch), outputs(silent, batch))
    assert S.save(network, tmp_path/"model") == "recipe"
    again = S.load(tmp_path/"model")
    assert torch.equal(outputs(again, batch), outputs(network, batch)) and at + ".o_proj" not in dict(again.named_modules())
    if network.can_generate(): assert torch.equal(again.generate(IDS, max_new_tokens=5, do_sample=False), silent.generate(IDS, max_new_tokens=5, do_sample=False))
    if network.can_generate(): assert again.generate(IDS, max_new_tokens=4, num_beams=2, do_sample=False).shape[0] == 2


def test_attention_that_normalises_inside_is_refused():
    with pytest.raises(ValueError, match="layer: got bert.encoder.layer.1.attention, a BertAttention that normalises"): S.remove_attention(make("bert"), 1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "vit"])
def test_blocks_are_dropped(name, tmp_path):
    network, batch = make(name, **({"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4})), example(name)
    blocks, read = S._chain(network)[1], []
    wanted = copy.deepcopy(network)
    for i in (1, 2): S._chain(wanted)[1][i].forward = lambda h, *a, **k: h
    S.drop_blocks(network, [1, 2])
    torch.testing.assert_close(outputs(network, batch), outputs(wanted, batch))
    assert S.save(network, tmp_path/"model") == "stock" and network.config.num_hidden_layers == 2 == len(getattr(network.config, "layer_types", None) or [1, 2])
    again = S.load(tmp_path/"model")
    assert torch.equal(outputs(again, batch), outputs(network, batch))
    if network.can_generate(): assert torch.equal(again.generate(IDS, max_new_tokens=5, do_sample=False), network.generate(IDS, max_new_tokens=5, do_sample=False))


def test_everything_at_once(tmp_path):
    network = make("llama", num_hidden_layers=4)
    groups = S.units(network, IDS)
    S.shrink(network, groups, {groups[1].name: torch.arange(44) < 7, groups[4].name: torch.tensor([True, False])}, IDS)
    S.remove_attention(S.drop_blocks(network, [1]), 0)
    network.model.layers[2].mlp.up_proj.weight = network.model.layers[1].mlp.up_proj.weight  # shared
    assert S.save(network, tmp_path/"model") == "recipe"
    again = S.load(tmp_path/"model")
    assert again.model.layers[2].mlp.up_proj.weight is again.model.layers[1].mlp.up_proj.weight
    assert torch.equal(outputs(again, IDS), outputs(network, IDS)) and torch.equal(again.generate(IDS, max_new_tokens=5, do_sample=False), network.generate(IDS, max_new_tokens=5, do_sample=False))
    groups = S.units(again, IDS)  # and once more
    S.shrink(again, groups, random_masks(groups), IDS)
    S.save(again, tmp_path/"second")
    assert torch.equal(outputs(S.load(tmp_path/"second"), IDS), outputs(again, IDS))


def test_plain_networks_with_a_recipe(tmp_path):
    fresh = lambda: CifarResNet(8).eval()
    torch.manual_seed(0)
    network = fresh()
    free = S.removable(network, S.units(network, IMAGES), IMAGES)
    S.shrink(network, free, random_masks(free), IMAGES)
    assert S.save(network, tmp_path/"model") == "recipe"
    assert torch.equal(S.load(tmp_path/"model", fresh())(IMAGES), network(IMAGES))
    with pytest.raises(ValueError, match="network: got Sequential; want a CifarResNet"): S.load(tmp_path/"model", nn.Sequential(nn.Linear(2, 2)))


def test_a_broken_save_leaves_what_was_there(tmp_path, monkeypatch):
    network = make("llama")
    S.save(network, tmp_path/"model")
    before = {p.name: p.read_bytes() for p in (tmp_path/"model").iterdir()}
    S.remove_attention(network, 0)
    def broken(*a, **k): raise OSError("no space left")
    monkeypatch.setattr(S, "save_file", broken)
    with pytest.raises(OSError, match="no space"): S.save(network, tmp_path/"model")
    with pytest.raises(OSError, match="no space"): S.save(network, tmp_path/"new")
    monkeypatch.undo()
    real, moves = S.os.replace, []
    def stumbling(a, b):
        moves.append(1)
        if len(moves) == at: raise OSError("pulled out")
        real(a, b)
    monkeypatch.setattr(S.os, "replace", stumbling)
    for at in (1, 2): # between the files, so to say
        del moves[:]
        with pytest.raises(OSError, match="pulled out"): S.save(network, tmp_path/"model")
        assert {p.name: p.read_bytes() for p in (tmp_path/"model").iterdir()} == before
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in (tmp_path/"model").iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["model"]
    (tmp_path/"model/notes.txt").write_text("mine")
    assert S.save(network, tmp_path/"model") == "recipe" and (tmp_path/"model/notes.txt").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["model"]
    (tmp_path/"file").write_text("mine")
    with pytest.raises(ValueError, match="folder: got .*file; want a folder"): S.save(network, tmp_path/"file")


def test_recipes_run_no_code_of_others(tmp_path):
    network = make("llama")
    S.save(S.remove_attention(network, 0), tmp_path/"model")
    path = tmp_path/"model/recipe.json"
    whole = path.read_text()
    for kind in ("os.system", "whatmatters.sparsity.structure.load", "whatmatters.sparsity.structure.Path", "whatmatters.nothing.NoAttention"):
        path.write_text(whole.replace("whatmatters.sparsity.structure.NoAttention", kind))
        with pytest.raises(ValueError, match="recipe: got "): S.load(tmp_path/"model")
    path.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="recipe: got format 2"): S.load(tmp_path/"model")


def test_recipes_that_were_tampered_with_or_cut_off_are_refused(tmp_path):
    network = S.remove_attention(make("llama"), 0)
    S.save(network, folder := tmp_path/"model")
    path = folder/"recipe.json"
    whole, recipe = path.read_text(), json.loads(path.read_text())
    for text in (whole[:len(whole) // 2], "[]", *(json.dumps({k: v for k, v in recipe.items() if k != gone}) for gone in recipe),
                 *(json.dumps({**recipe, **change}) for change in (dict(network="pipeline"), dict(network="PreTrainedModel"), dict(drop=["../x"]), dict(shared={"lm_head.weight": "forward"}), dict(shapes={"lm_head.weight": [3, 3]}),
                   dict(attributes={"": {"forward": 1}}), dict(attributes={"": {"__class__": 1}}), dict(attributes={"lm_head": {"_parameters": 1}}), dict(attributes={"nothing": {"a": 1}}), dict(attributes={"": {"config._attn_implementation": "a/b"}}),
                   dict(modules={"model.layers.0.self_attn": dict(kind="whatmatters.sparsity.structure.NoAttention", options=dict(surprise=1))})))):
        path.write_text(text)
        with pytest.raises(ValueError, match="^(recipe|folder|network): got"): S.load(folder)
    path.write_text(whole)
    assert torch.equal(outputs(S.load(folder), IDS), outputs(network, IDS))
    said = (folder/"config.json").read_text()
    (folder/"config.json").write_text(json.dumps({**json.loads(said), "attn_implementation": "somebody/kernels"}))
    with pytest.raises(ValueError, match="folder: got attention from somebody/kernels"): S.load(folder)
    (folder/"config.json").unlink()
    with pytest.raises(ValueError, match="want a folder with config.json"): S.load(folder)


def test_a_network_that_does_not_fit_a_recipe_is_as_it_was(tmp_path):
    fresh = lambda width: nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
    network = fresh(6)
    S.shrink(network, groups := S.units(network, torch.randn(2, 3)), random_masks(groups), torch.randn(2, 3))
    S.save(network, tmp_path/"model")
    other = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(ValueError, match="^(folder|recipe): got"): S.load(tmp_path/"model", other)
    assert other[0].out_features == 6 and all(torch.equal(p, before[n]) for n, p in other.named_parameters())


class Words(nn.Module):
    "A classifier of six tokens: by convolutions longer than four of them, or by all at once."
    def __init__(self, flat):
        super().__init__()
        self.flat, self.embedding, self.mix, self.hidden, self.out = flat, nn.Embedding(96, 12), nn.Linear(72, 10) if flat else nn.Conv1d(12, 10, 5), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.out(torch.relu(self.hidden(torch.relu(self.mix(x.flatten(1)) if self.flat else self.mix(x.mT).amax(-1)))))


@pytest.mark.parametrize("flat", [False, True])
def test_networks_that_want_more_than_four_tokens(flat):
    torch.manual_seed(0)
    network = Words(flat)
    groups = S.units(network, IDS)
    assert [len(g) for g in groups] == [12, 10, 8] and groups["mix"].slices["mix.weight", 1].shape == (12, 6 if flat else 1)
    kept, others = random_masks(groups), torch.randint(96, (5, 6), generator=torch.Generator().manual_seed(9))
    with S.mask_units(network, groups, kept): masked = network(others)
    torch.testing.assert_close(S.shrink(network, groups, kept, IDS)(others), masked)


class OneWeight(nn.Module):
    "Two layers with one weight and a bias each."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(7, 12), nn.Linear(7, 12), nn.Linear(12, 5), nn.Linear(12, 5)
        self.b.weight = self.a.weight

    def forward(self, x): return self.c(torch.relu(self.a(x))) + self.d(torch.relu(self.b(x.flip(-1))))


def test_layers_that_share_a_weight_are_one_group_with_all_their_biases():
    torch.manual_seed(0)
    network, x = OneWeight(), torch.randn(5, 7)
    group, = groups = S.units(network, x[:2])
    assert {n for n, _ in group.slices} == {"a.weight", "a.bias", "b.bias", "c.weight", "d.weight"}
    with S.mask_units(network, groups, kept := random_masks(groups)): masked = network(x)
    torch.testing.assert_close(S.shrink(network, groups, kept, x[:2])(x), masked)
    assert network.b.weight is network.a.weight and network.b.out_features == 6


def test_heads_of_partial_rotary_embeddings():
    torch.manual_seed(0)
    network = T.PhiForCausalLM(T.PhiConfig(**SMALL)).eval()  # as in Phi-2, as many heads as dimensions are rotated
    groups = S.units(network, IDS)
    assert network.model.layers[0].self_attn.rotary_ndims == 4 == len(groups[0]) and not S.removable(network, groups, IDS).refused
    others = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(9))
    with S.mask_units(network, groups, kept := random_masks(groups)): masked = outputs(network, others)
    torch.testing.assert_close(outputs(S.shrink(network, groups, kept, IDS), others), masked)


def test_inputs_of_several_kinds_are_numbered_in_their_order():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.columns, self.out = nn.ModuleList(nn.Embedding(96, 4) for _ in range(6)), nn.Linear(24, 3)

        def forward(self, x): return self.out(torch.cat([c(x[:, i]) for i, c in enumerate(self.columns)], -1))
    groups = S.units(Columns(), IDS)
    assert [g.name for g in groups] == ["out", *(f"out#{i}" for i in range(2, 7))] and [g.producers[0][0] for g in groups] == [f"columns.{i}.weight" for i in range(6)]


def test_bad_input_leaves_the_network_alone():
    network = make("llama")
    before, groups = copy.deepcopy(network.state_dict()), S.units(network, IDS)
    name = groups[0].name
    for kept, message in (({"nothing": torch.ones(2).bool()}, "kept: got 'nothing'"), ({name: torch.ones(3).bool()}, "want 2 booleans"), ({name: torch.ones(2)}, "want 2 booleans"),
                          ({name: torch.zeros(2).bool()}, "nothing to keep"), ([True], "kept: got list")):
        with pytest.raises(ValueError, match=message): S.shrink(network, groups, kept, IDS)
    for call, message in ((lambda: S.units(network, IDS[:0]), "batch: got"), (lambda: S.unit_scores(network, groups, "magic"), "kind: got 'magic'"), (lambda: S.drop_blocks(network, [0, 1]), "at least one block that stays"),
                          (lambda: S.drop_blocks(network, [0, 0]), "indices: got"), (lambda: S.drop_blocks(network, [2]), "indices: got"), (lambda: S.remove_attention(network, 2), "layer: got 2"),
                          (lambda: S.drop_blocks(make("t5"), [0]), "one stack of blocks"), (lambda: S.drop_blocks(nn.Linear(2, 2), [0]), "list of blocks"), (lambda: groups["magic"], "which: got 'magic'")):
        with pytest.raises(ValueError, match=message): call()
    network.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="no finite numbers"): S.shrink(network, groups, random_masks(groups), IDS)
    network.load_state_dict(before)
    assert network.model.layers[0].mlp.up_proj.out_features == 44


def test_scores_count_their_passes_and_find_a_planted_neuron():
    network = make("llama")
    groups = S.Units([g for g in S.units(network, IDS) if g.name.endswith("down_proj")], {})
    for g in groups:
        for n, d in g.producers: dict(network.named_parameters())[n].data[7] *= 30
    calls = []
    handle = network.model.register_forward_hook(lambda *a: calls.append(1))
    for kind in ("weight", "activation", "sequence", "output", "taylor"):
        del calls[:]
        scores = S.unit_scores(network, groups, kind, [IDS, IDS])
        assert all(s.shape == (44,) and (kind == "taylor" or int(s.argmax()) == 7) for s in scores.values()), kind
        assert len(calls) == {"weight": 0, "taylor": 4}.get(kind, 2)
    handle.remove()


def test_the_same_generator_gives_the_same_units_and_any_gives_the_same_groups():
    network = make("opt")  # with ReLU
    first = S.units(network, IDS)
    for seed in (1, 2):
        for a, b in zip(first, S.units(network, IDS, seed)): assert a.name == b.name and all(torch.equal(a.slices[k], b.slices[k]) for k in a.slices)


def test_operations_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.out = nn.Linear(7, 12), nn.Linear(12, 9), nn.Linear(9, 12), nn.Linear(12, 3)

        def forward(self, x):
            h = self.a(x)
            y = self.b(h)
            h += self.c(torch.nn.functional.relu(y, inplace=True))
            return self.out(h.relu_())
    torch.manual_seed(0)
    network, x = InPlace(), torch.randn(20, 7)
    groups = S.units(network, x[:2])
    assert {g.name: sorted(n for n, _ in g.slices) for g in groups} == {"b": ["a.bias", "a.weight", "b.weight", "c.bias", "c.weight", "out.weight"], "c": ["b.bias", "b.weight", "c.weight"]}
    with S.mask_units(network, groups, kept := random_masks(groups)): masked = network(x)
    torch.testing.assert_close(S.shrink(network, groups, kept, x[:2])(x), masked)


@pytest.mark.parametrize("wide", [False, True])
def test_products_that_are_written_out(wide, tmp_path):
    "Falcon multiplies with `weight.T`, adds in place, and has attention and feed-forward side by side."
    torch.manual_seed(0)
    network = T.FalconForCausalLM(T.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=44, bias=False, initializer_range=.3, **dict(new_decoder_architecture=True, num_kv_heads=2) if wide else dict(multi_query=True, parallel_attn=True))).eval()
    groups = S.units(network, IDS)
    free, others = S.removable(network, groups, IDS), torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(9))
    assert {f"transformer.h.{i}.mlp.dense_4h_to_h" for i in (0, 1)} <= {g.name for g in free} and not groups.refused
    with S.mask_units(network, free, kept := random_masks(free)): masked = outputs(network, others)
    torch.testing.assert_close(outputs(S.shrink(network, free, kept, IDS), others), masked, rtol=1e-5, atol=1e-5 * float(masked.abs().max().clamp_min(1)))
    S.save(network, tmp_path/"model")
    assert torch.equal(outputs(S.load(tmp_path/"model"), others), outputs(network, others))


def test_a_matrix_that_is_also_used_turned_over():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.p, self.out = nn.Linear(7, 12), nn.Parameter(torch.randn(7, 9)), nn.Linear(9, 5)

        def forward(self, x): return self.out(torch.relu(torch.nn.functional.linear(torch.relu(self.a(x)), self.a.weight.T) @ self.p))
    torch.manual_seed(0)
    network, x = Tied(), torch.randn(20, 7)
    groups = S.units(network, x[:2])
    assert [(g.name, len(g)) for g in groups] == [("a", 12), ("out", 9)]
    with S.mask_units(network, groups, kept := random_masks(groups)): masked = network(x)
    torch.testing.assert_close(S.shrink(network, groups, kept, x[:2])(x), masked)
    assert network.p.shape == (7, 5) or network.p.shape == (7, 4)


def test_what_a_tokenizer_returns():
    network, batch = make("llama"), T.BatchEncoding(dict(input_ids=IDS, attention_mask=torch.ones_like(IDS)))
    groups = S.units(network, batch)
    assert [len(g) for g in groups] == [2, 44] * 2
    S.shrink(network, groups, random_masks(groups), batch)
    assert network.config.intermediate_size == 44 and network.model.layers[0].mlp.up_proj.out_features == 22
