"Questions of multiple choice: read from files and hub sets, and answered; core.language."
import json
from types import SimpleNamespace
import nbformat
import pytest
import torch
from conftest import SHARED
from whatmatters.core import experiments, language, ledger
from whatmatters.core.language import Bytes, Choices, load_questions, log_likelihoods, small_lm, zero_shot
from whatmatters.core.models import load_model
from whatmatters.core.values import count_calls

TEXT = "the cat sat on the mat and the dog ran to the door. " * 40
LETTERS = dict(text=["one", "two", "three"], label=["A", "B", "C"])
ROWS = {  # rows with the columns that the sets have on the hub, and the questions they make
    "ARC": (dict(id="1", question="Which?", choices=LETTERS, answerKey="C"), Choices("Question: Which?\nAnswer:", LETTERS["text"], 2)),
    "ARC, numbered": (dict(id="1", question="Which?", choices=dict(text=["a", "b"], label=["1", "2"]), answerKey="1"), Choices("Question: Which?\nAnswer:", ["a", "b"], 0)),
    "OpenBookQA": (dict(id="1", question_stem="The sun is", choices=LETTERS, answerKey="A"), Choices("The sun is", LETTERS["text"], 0)),
    "HellaSwag": (dict(ind=1, activity_label="Baking", ctx_a="A man stands.", ctx_b="he", ctx="A man stands. he", endings=["eats. [step] A  pie.", " runs"], source_id="a", split="val", split_type="x", label="0"),
                  Choices("Baking: A man stands. He", ["eats. A pie.", "runs"], 0)),
    "HellaSwag, a title": (dict(activity_label="Home", ctx_a="How to cook [title] Boil", ctx_b="", endings=["a", "b"], label="1"), Choices("Home: How to cook. Boil", ["a", "b"], 1)),
    "PIQA": (dict(goal="Dry a shirt", sol1="hang it", sol2="drink it", label=1), Choices("Question: Dry a shirt\nAnswer:", ["hang it", "drink it"], 1)),
    "WinoGrande": (dict(sentence="Ann thanked Bo since _ had helped.", option1="Ann", option2="Bo", answer="2"), Choices(["Ann thanked Bo since Ann", "Ann thanked Bo since Bo"], ["had helped."] * 2, 1)),
    "BoolQ": (dict(question="is snow cold", answer=True, passage="Snow is ice."), Choices("Snow is ice.\nQuestion: is snow cold?\nAnswer:", ["no", "yes"], 1)),
    "ours": (dict(context="a", choices=["b", "c"], answer=1), Choices("a", ["b", "c"], 1)),
}


@pytest.fixture(scope="module")
def network(): return small_lm(TEXT, 1, 16, length=48, steps=30)


@pytest.fixture
def file(tmp_path):
    def put(*rows, name="task.jsonl"):
        (tmp_path/name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        return str(tmp_path/name)
    return put


@pytest.mark.parametrize("name", ROWS)
def test_the_columns_of_the_sets(name, file):
    row, wanted = ROWS[name]
    assert load_questions(file(row, "", row)) == [wanted, wanted]


def test_splits_of_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    row = ROWS["HellaSwag"][0]
    hub = {"train": [row] * 3, "validation": [{**row, "label": "1"}] * 2, "test": [{**row, "label": ""}]}  # as on the hub: the answers of the test split are kept back
    def found(name): return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in hub.items()})
    monkeypatch.setattr(language, "_hub", found)
    assert [q.answer for q in load_questions("owner/name")] == [1, 1]
    hub["test"] = [{**row, "label": "0"}] * 4
    assert [q.answer for q in load_questions("owner/name:configuration")] == [0] * 4
    hub.update(test=[{**row, "label": ""}], validation=[{**row, "label": ""}], train=[{**row, "label": ""}])
    with pytest.raises(ValueError, match="data: got owner/name with the splits train, validation, test; want .* that all have an answer"): load_questions("owner/name")


def test_answers_that_are_kept_back():
    kept = {"PIQA": -1, "WinoGrande": "", "HellaSwag": ""}
    for name, nothing in kept.items():
        row = {**ROWS[name][0], "answer" if name == "WinoGrande" else "label": nothing}
        assert language._asked(row, "row").answer == -1


def test_rows_are_drawn_without_replacement(file):
    path = file(*(dict(context=str(i), choices=["a", "b"], answer=0) for i in range(20)))
    everything = load_questions(path)
    some = load_questions(path, 8, generator=1)
    assert len({q.context for q in some}) == 8 and some == load_questions(path, 8, 1) != load_questions(path, 8, 2)
    assert load_questions(path, 20) == load_questions(path, 99) == everything


@pytest.mark.parametrize("rows, message", [
    ([dict(prompt="a", options=["b"])], "row 0 of .* with the columns prompt, options; want the columns context choices answer; or question choices answerKey; or "),
    ([ROWS["ours"][0], dict(context="a", choices=["b", "c"], answer=2)], "row 1 of .* with the answer 2; want a whole number from 0 to 1"),
    ([dict(context="a", choices=["b", "c"], answer=True)], "with the answer True"), ([dict(context="a", choices=["b", "c"], answer="1")], "with the answer '1'"),
    ([dict(context="a", choices=["b"], answer=0)], "with the choices"), ([dict(context="a", choices="bc", answer=0)], "with the choices bc"), ([dict(context="a", choices=["b", " "], answer=0)], "with the choices"),
    ([dict(context=1, choices=["b", "c"], answer=0)], "with the context 1"), ([dict(context=["a"], choices=["b", "c"], answer=0)], "with the context"),
    (["{"], "line 1 of .*; want a JSON object in every line"), (["[1]"], "line 1 of"), ([], "with the splits test; want test, validation or train, with questions"),
    ([{**ROWS["ARC"][0], "answerKey": "E"}], "that all have an answer"), ([{**ROWS["WinoGrande"][0], "sentence": "no gap"}], "row 0 of .*, which does not read .ValueError"),
])
def test_bad_questions_are_refused(rows, message, file):
    with pytest.raises(ValueError, match=f"data: got .*{message}"): load_questions(file(*rows))


def test_bad_input_is_refused(network, tmp_path):
    asked = [Choices("a", ["b", "c"], 0)]
    for call, message in [(lambda: load_questions("digits"), "data: got 'digits'"), (lambda: load_questions(str(tmp_path)), "with the splits none"), (lambda: load_questions("a/b", 0), "rows: got 0"),
                          (lambda: zero_shot(network, Bytes(), []), "questions: got none"), (lambda: log_likelihoods(network, Bytes(), []), "pairs: got none"),
                          (lambda: log_likelihoods(network, Bytes(), [("a", "")]), "pairs: got '', which has no token"), (lambda: zero_shot(network, Bytes(), asked, longest=1), "longest: got 1"),
                          (lambda: zero_shot(network, Bytes(), asked, longest=2), "a continuation of 2 tokens; want less than 2"), (lambda: zero_shot(network, Bytes(), asked, chunk=0), "chunk: got 0")]:
        with pytest.raises(ValueError, match=message): call()


PAIRS = [("the cat", " sat on the mat"), ("and", " the dog ran to the door."), ("", "the"), ("the mat and ", "the dog"), ("é", " naïve €"), ("to the door. the cat sat on the mat", " x")]


def test_log_likelihoods_by_brute_force(network):
    "One pair at a time, without padding, token by token."
    def one(context, continuation):
        ids, count = list((context + continuation).encode()), len((context[len(context.rstrip()):] + continuation).encode())
        if not context: ids = [network.config.bos_token_id] + ids
        with torch.no_grad(): p = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(p[t - 1, ids[t]]) for t in range(len(ids) - count, len(ids)))
    wanted = torch.tensor([one(*pair) for pair in PAIRS], dtype=torch.float64)
    for chunk in (1, 2, 5, None): assert torch.allclose(log_likelihoods(network, Bytes(), PAIRS, chunk=chunk), wanted, atol=1e-4)
    assert torch.allclose(log_likelihoods(network, Bytes(), PAIRS[::-1]), wanted.flip(0), atol=1e-4)


@pytest.mark.parametrize("begin, end", [(1, 2), (2, 2), (None, 2), (1, None)])
def test_first_and_last_tokens(network, begin, end):
    "A text begins as its tokenizer says and does not end; an empty context is one first token."
    class Ends:
        bos_token_id, eos_token_id = begin, end
        def __call__(self, text, add_special_tokens, verbose):
            before, after = ([t] if add_special_tokens and t is not None else [] for t in (begin, end))
            return dict(input_ids=[*before, *text.encode(), *after])
    first = end if begin is None else begin
    for (context, continuation), start in ((("the", " cat"), [] if begin is None else [begin]), (("", "the cat"), [first])):
        ids, count = start + list((context + continuation).encode()), len(continuation)
        with torch.no_grad(): p = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert float(log_likelihoods(network, Ends(), [(context, continuation)])) == pytest.approx(float(p[range(len(ids) - count - 1, len(ids) - 1), ids[-count:]].sum()), abs=1e-4)


def test_long_contexts_lose_their_beginning(network):
    context, choice = "the cat sat on the mat and", " the dog"
    cut = (context + choice)[-12:]
    for chunk in (1, 4):
        short, long = log_likelihoods(network, Bytes(), [(cut[:-8], choice)]), log_likelihoods(network, Bytes(), [(context, choice), ("a" * 40 + context, choice)], longest=12, chunk=chunk)
        assert torch.allclose(long, short.expand(2), atol=1e-5)
    at_most = network.config.max_position_embeddings
    assert torch.allclose(*log_likelihoods(network, Bytes(), [("b" * 500 + "a" * at_most, " x"), ("a" * at_most, " x")]), atol=1e-5)


class Alphabet(torch.nn.Module):
    "After each letter the next of the alphabet has a probability of one half, and so has nothing else."
    def __init__(self):
        super().__init__()
        self.none = torch.nn.Parameter(torch.zeros(1))
    def forward(self, ids): return torch.nn.functional.one_hot((ids + 1) % 256, 256) * torch.log(torch.tensor(255.))


def test_a_planted_model_knows_the_alphabet():
    asked = [Choices("cd\n", ["abcd", "axyz"], 0), Choices("cd\n", ["axyz", "abcd"], 1), Choices("cd\n", ["axyz", "abcd"], 0), Choices("cd\n", ["ax", "abcde"], 1), Choices("cd\n", ["ax", "ax"], 0), Choices("cd\n", ["ax", "ax"], 1)]
    found = zero_shot(Alphabet(), Bytes(), asked)
    assert found.plain.tolist() == [1, 1, 0, 1, 1, 0] and found.per_byte.tolist() == [1, 1, 0, 1, 1, 0]
    half, rest = torch.tensor(.5).log().item(), torch.tensor(.5 / 255).log().item()
    assert log_likelihoods(Alphabet(), Bytes(), [("a", "bc"), ("a", "bx")]).tolist() == pytest.approx([2 * half, half + rest], abs=1e-5)
    split = zero_shot(Alphabet(), Bytes(), [Choices("cd\n", ["a" + "bcdefghijklmnopqrstuvwxyz", "a"], 0)])  # the long choice has more factors, each of them likely
    assert (split.plain.item(), split.per_byte.item()) == (0, 1)


def test_every_choice_may_have_its_context(network):
    contexts, choices = ["the cat sat on the mat", "xq zz"], ["and the dog"] * 2
    likely = log_likelihoods(network, Bytes(), [(c, " " + t) for c, t in zip(contexts, choices)])
    assert likely[0] > likely[1]
    assert zero_shot(network, Bytes(), [Choices(contexts, choices, 0), Choices(contexts, choices, 1), Choices(contexts[::-1], choices, 1)]).plain.tolist() == [1, 0, 1]


def test_length_counts_in_bytes():
    flat = torch.nn.Linear(1, 1)
    flat.forward = lambda ids: torch.zeros(*ids.shape, 256)
    found = zero_shot(flat, Bytes(), [Choices("a ", ["éé", "abc"], 0), Choices("a ", ["éé", "abcd"], 0), Choices("a ", ["abcde", "éé"], 0)])
    assert found.plain.tolist() == [0, 1, 0]  # the blank before a choice is one of its tokens, but none of its bytes
    assert found.per_byte.tolist() == [1, 1, 1]


def test_no_number_is_no_answer():
    broken = torch.nn.Linear(1, 1)
    broken.forward = lambda ids: torch.full((*ids.shape, 256), torch.nan)
    assert all(v.isnan().all() for v in zero_shot(broken, Bytes(), [Choices("a", ["b", "c"], 0)]))


def test_one_forward_pass_per_choice(network):
    counted = count_calls(network)
    counted.parameters, counted.config = network.parameters, SimpleNamespace(bos_token_id=0)
    asked = [Choices("the cat", [" sat", "ran", "sat on"], 0), Choices("the", ["dog", "mat"], 0)]
    found = zero_shot(counted, Bytes(), asked, chunk=2)
    assert (counted.calls, counted.rows) == (3, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, zero_shot(network, Bytes(), asked)))


def test_stories_go_on_as_stories():
    folder = SHARED/"models/stories260K/hf"
    if not folder.is_dir(): pytest.skip("no folder of a real language model")
    model = load_model(str(folder))
    network, tokenizer = model.network, model.tokenizer
    stories = ["Once upon a time, there was a little girl named Lily.", "She loved to play with her toys in the park.", "One day, she saw a big dog and she was very happy.", "Her mom said, \"Do not be sad, we can go home.\"",
               "The boy and the bird were good friends.", "They played together all day and had lots of fun.", "Tom was sad because he lost his red ball.", "The little cat wanted to eat the fish."]
    asked = []
    for i, story in enumerate(stories):
        words = story.split()
        cut, generator = len(words) // 2, torch.Generator().manual_seed(i)
        mixed = [words[cut:][j] for j in torch.randperm(len(words) - cut, generator=generator).tolist()]
        asked.append(Choices(" ".join(words[:cut]), [" ".join(mixed), " ".join(words[cut:])], 1))
    found = zero_shot(network, tokenizer, asked)
    assert found.plain.mean() == 1 and torch.equal(found.plain, found.per_byte)  # same words, same length
    pairs = [(q.context, " " + c) for q in asked for c in q.choices]
    for (context, choice), value in zip(pairs, log_likelihoods(network, tokenizer, pairs, chunk=5)):
        whole, before = tokenizer(context + choice).input_ids, tokenizer(context).input_ids
        assert whole[:len(before)] == before and whole[0] == tokenizer.bos_token_id and tokenizer.decode(whole[len(before):]).strip() == choice.strip()
        with torch.no_grad(): p = network(torch.tensor([whole])).logits[0].log_softmax(-1)
        assert float(p[range(len(before) - 1, len(whole) - 1), whole[len(before):]].sum()) == pytest.approx(float(value), abs=1e-3)


@pytest.fixture
def claims(file, tmp_path):
    "The claims of an experiment at smoke size, those on zero-shot tasks and the others."
    task = file(*(dict(context="the", choices=[a, "zzz"], answer=0) for a in ("end", "of", "name")), dict(context="a", choices=["b", "c"], answer=1))
    def of(name, tasks=None):
        found = ledger.read_run(experiments.run(name, "smoke", dict(tasks=[task] if tasks is None else tasks), tmp_path/"runs", engine="warm")[0]).claims
        return [c for c in found if "zero-shot" in c["says"]], [c for c in found if "zero-shot" not in c["says"]]
    return of


def test_tasks_in_gblm(claims):
    (none, plain), (added, others) = claims("gblm", []), claims("gblm")
    assert not none and plain == others  # tasks change nothing else
    assert len(added) == 3 and all(c["system"] == 80 and len(c["values"]) == 2 and all(-1 <= v <= 1 for v in c["values"]) for c in added)
    with pytest.raises(Exception, match="data: got 'nowhere'"): claims("gblm", ["nowhere"])


def test_tasks_in_two_stage(claims):
    added, _ = claims("two_stage")
    assert len(added) == 2 and all(c["system"] == 121 and len(c["values"]) == 2 and all(-1 <= v <= 1 for v in c["values"]) for c in added)


@pytest.mark.parametrize("name", ["gblm", "two_stage"])
def test_the_paper_presets_name_tasks(name):
    path = experiments.find(name)
    assert experiments.resolve(path, "paper")["tasks"] and experiments.resolve(path, "smoke")["tasks"] == []
    assert any("zero-shot" in says for _, says in experiments.declared_claims(nbformat.read(path, 4)))
