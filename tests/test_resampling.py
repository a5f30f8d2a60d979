import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from whatmatters.sparsity import resampling
from whatmatters.sparsity.resampling import gumbel_noise, hashed_ngrams, kl_reduction, log_ratio, log_weights, ngram_counts, read_texts, resample, select_shards, shard_counts, shard_weights


def documents(n, words=40, seed=0, favourites=0):
    "Zipf-like words; `favourites` moves which of them are frequent."
    draw = np.random.default_rng(seed)
    p = 1 / np.arange(1, 801)
    p = np.roll(p, favourites) / p.sum()
    return [" ".join(f"w{i}," if i % 7 == 0 else f"W{i}" for i in draw.choice(800, words, p=p)) for _ in range(n)]


def write(folder, texts, shards=3, kind="jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    for s, some in enumerate(np.array_split(np.arange(len(texts)), shards)):
        some = [texts[i] for i in some]
        if kind == "parquet":
            import pandas as pd
            pd.DataFrame({"n": range(len(some)), "text": some}).to_parquet(folder/f"{s}.parquet")
        else: (folder/f"{s}.{kind}").write_text("".join((json.dumps({"text": t, "n": i}) if kind == "jsonl" else t) + "\n" for i, t in enumerate(some)))
    return folder


def pieces(text): return re.findall(r"\w+|[^\w\s]+", text.lower())


def test_words_are_those_of_the_regular_expression_whatever_the_spaces():
    odd = ["Don't stop-me (now)!!", "a\u00a0b\u2003c\x1cd\x85e", "naïve ÉCOLE 東京タワー、です", "x" * 100 + "!" + "y" * 50, "\n\t ", "a_b 3.14 \ud800", "İstanbul"]
    found = hashed_ngrams(odd, ngrams=1)
    assert found.lengths.tolist() == [len(pieces(t)) for t in odd]
    alone = hashed_ngrams([w for t in odd for w in pieces(t)], ngrams=1)
    assert np.array_equal(found.ids, alone.ids)  # a word's bucket is the same in a document and alone


def test_equal_ngrams_fall_into_equal_buckets_and_different_ones_do_not():
    found = hashed_ngrams(["a b c", "x a b", "b a"], ngrams=3, buckets=2 ** 30)
    assert found.ids.dtype == np.uint32
    assert found.ids[0, 1] == found.ids[4, 1] != found.ids[6, 1]  # "a b", and not "b a"
    inside = found.ids[found.ids < found.buckets]
    names = ["a", "b", "c", "x", "a b", "b c", "x a", "b a", "a b c", "x a b"]
    assert len(set(inside.tolist())) == len(names)
    assert (found.ids[:, 1] == found.buckets).sum() == 3 and (found.ids[:, 2] == found.buckets).sum() == 6  # what would reach over an end


def test_the_memory_of_words_is_bounded(monkeypatch):
    texts = documents(30)
    before = hashed_ngrams(texts)
    monkeypatch.setattr(resampling, "REMEMBERED", 10)
    resampling._hashes.clear()
    assert np.array_equal(hashed_ngrams(texts).ids, before.ids) and len(resampling._hashes) <= 10
    hashed_ngrams(["z" * 1000])
    assert "z" * 1000 not in resampling._hashes


def test_weights_are_the_formula_and_do_not_depend_on_the_batch():
    raw, target = hashed_ngrams(documents(50)), hashed_ngrams(documents(20, favourites=5))
    p, q = ngram_counts(target).double(), ngram_counts(raw).double()
    ratio = log_ratio(ngram_counts(target), ngram_counts(raw))
    assert torch.allclose(ratio, (p / p.sum() + 1e-8).log() - (q / q.sum() + 1e-8).log())
    dense = torch.tensor(raw.matrix.toarray())
    assert torch.allclose(log_weights(raw, ratio), dense @ ratio)
    assert torch.allclose(log_weights(raw, ratio, normalise=True), dense @ ratio / dense.sum(1))
    parts = [log_weights(hashed_ngrams(documents(50)[i:i + 7]), ratio) for i in range(0, 50, 7)]
    assert torch.equal(torch.cat(parts), log_weights(raw, ratio))


def test_the_reference_gives_the_same_weights(tmp_path, monkeypatch):
    peer = pytest.importorskip("data_selection")
    from data_selection import hashed_ngram_dsir
    pool, target = documents(150, words=110) + documents(150, words=110, seed=1, favourites=40), documents(80, words=110, seed=2, favourites=40)
    write(tmp_path/"pool", pool, 1), write(tmp_path/"target", target, 1)
    def weights(name):
        theirs = peer.HashedNgramDSIR([str(tmp_path/"pool/0.jsonl")], [str(tmp_path/"target/0.jsonl")], cache_dir=str(tmp_path/name), num_proc=1)
        theirs.fit_importance_estimator(num_tokens_to_fit="all")
        theirs.compute_importance_weights()
        return np.load(tmp_path/name/"log_importance_weights/0.npy")
    selection = select_shards(tmp_path/"pool", tmp_path/"target", 100, tmp_path/"work")
    ours = shard_weights(tmp_path/"pool/0.jsonl", tmp_path/"work", selection.ratio).numpy()
    assert spearmanr(weights("theirs"), ours)[0] > .8  # their buckets collide elsewhere, which shows in so small a pool
    def bucket(text, num_buckets):
        found = hashed_ngrams([text], buckets=num_buckets).ids
        return int(found[0, len(found) - 1])
    monkeypatch.setattr(hashed_ngram_dsir, "hash_buckets", bucket)
    np.testing.assert_allclose(weights("same buckets"), ours, rtol=1e-9, atol=1e-6)


def test_gumbel_top_k_draws_in_proportion_to_the_weights():
    weights = torch.tensor([4., 3., 2., 1.]).double()
    noise = gumbel_noise(np.arange(4 * 20_000), 3).view(-1, 4) + weights.log()
    first = noise.argmax(1).bincount(minlength=4) / len(noise)
    assert torch.allclose(first, (weights / 10).float(), atol=.012)
    assert resample(weights, 4).all() and resample(weights.log(), 2, seed=5).sum() == 2
    assert any(not torch.equal(resample(weights.log(), 2, seed=s), resample(weights.log(), 2)) for s in range(1, 9))
    assert torch.equal(resample(weights.log(), 2, keys=[3, 2, 1, 0]), resample(weights.log().flip(0), 2).flip(0))


def test_kl_reduction_is_a_difference_of_divergences():
    t, s, r = (torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(i)) for i in range(3))
    kl = lambda p, q: ((p / p.sum()) * ((p / p.sum()).log() - (q / q.sum()).log())).sum()
    t, s, r = (v.double() for v in (t, s, r))
    assert float(kl_reduction(t, s, r)) == pytest.approx(float(kl(t, r) - kl(t, s)), abs=1e-5)
    assert kl_reduction(torch.stack([t, s]), s, r).shape == (2,) and float(kl_reduction(t, t, r)) > 0 and float(kl_reduction(t, r, r)) == 0


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_a_pool_on_disk_gives_what_memory_gives(tmp_path, kind):
    pool, target = documents(90) + documents(30, seed=1, favourites=300), documents(30, seed=2, favourites=300)
    write(tmp_path/"pool", pool, kind=kind)
    selection = select_shards(tmp_path/"pool", target, 30, tmp_path/"work", tmp_path/"out", min_tokens=5, draw=False)
    weights = log_weights(hashed_ngrams(pool), log_ratio(ngram_counts(hashed_ngrams(target)), ngram_counts(hashed_ngrams(pool))))
    mask = resample(weights, 30, draw=False)
    assert torch.equal(torch.cat([selection.kept[n] for n in sorted(selection.kept)]), mask) and mask[90:].sum() > 27
    assert [t.strip() for p in sorted((tmp_path/"out").iterdir()) for t in read_texts(p)] == [pool[i] for i in mask.nonzero()[:, 0]]
    if kind == "jsonl": assert all("n" in json.loads(line) for line in (tmp_path/"out/2.jsonl").open())  # rows as they were
    assert selection.threshold == pytest.approx(float(weights[mask].min()))
    everything = select_shards(tmp_path/"pool", target, 120, tmp_path/"work", min_tokens=5)
    assert all(m.all() for m in everything.kept.values())


def test_the_selection_does_not_depend_on_order_batch_or_workers(tmp_path):
    write(tmp_path/"pool", documents(120), 5)
    target = documents(20, favourites=100)
    options = dict(k=25, min_tokens=5, seed=4, normalise=True)  # so that the noise decides
    one = select_shards(tmp_path/"pool", target, work=tmp_path/"a", **options)
    with ThreadPoolExecutor(3) as pool: two = select_shards(sorted((tmp_path/"pool").iterdir(), reverse=True), target, work=tmp_path/"b", map=pool.map, **options)
    assert all(torch.equal(one.kept[n], two.kept[n]) for n in one.kept) and torch.equal(one.ratio, two.ratio)
    other = select_shards(tmp_path/"pool", target, work=tmp_path/"a", **{**options, "seed": 5})
    assert any(not torch.equal(one.kept[n], other.kept[n]) for n in one.kept)
    path = tmp_path/"pool/0.jsonl"
    assert torch.equal(shard_counts(path, tmp_path/"c", batch=7), shard_counts(path, tmp_path/"a"))
    assert torch.equal(*(shard_weights(path, tmp_path/w, one.ratio, min_tokens=5, batch=b) for w, b in (("c", 3), ("d", 99))))


def test_an_interrupted_selection_goes_on_and_nothing_stale_is_used(tmp_path, monkeypatch):
    write(tmp_path/"pool", documents(60))
    target, run = documents(20, favourites=100), partial(select_shards, tmp_path/"pool", k=10, work=tmp_path/"work", min_tokens=5)
    read, seen = resampling.read_texts, []
    def failing(path, field="text"):
        for i, t in enumerate(read(path, field)):
            if path.name == "1.jsonl" and i == 7: raise OSError("the disk is gone")
            yield t
    monkeypatch.setattr(resampling, "read_texts", failing)
    with pytest.raises(OSError): run(target)
    assert [p.name[0] for p in (tmp_path/"work").iterdir()] == ["0", "0"]  # the first shard, nothing of the second
    def watched(path, field="text"):
        seen.append(path.name)
        return read(path, field)
    monkeypatch.setattr(resampling, "read_texts", watched)
    first = run(target)
    assert seen == ["1.jsonl", "2.jsonl"]
    run(documents(20, favourites=200))
    assert len(seen) == 2  # another target reads no text of the pool
    rows = (tmp_path/"pool/0.jsonl").read_text().splitlines()
    (tmp_path/"pool/0.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    again = run(target)
    assert seen[2:] == ["0.jsonl"] and len(again.kept["0.jsonl"]) == len(first.kept["0.jsonl"]) - 1


def test_odd_lines_keep_their_places(tmp_path):
    (tmp_path/"pool").mkdir()
    lines = ["a b\rc", "\u00a0", "", "d \u2028 e", "  ", "f\x85g", "h i"]
    (tmp_path/"pool/a.txt").write_bytes("\n".join(lines).encode())
    assert list(read_texts(tmp_path/"pool/a.txt")) == [l + "\n" for l in lines[:2] + lines[3:4] + lines[5:6]] + ["h i"]
    selection = select_shards(tmp_path/"pool", ["h i"], 1, tmp_path/"work", tmp_path/"out", min_tokens=1, draw=False)
    assert (tmp_path/"out/a.txt").read_text() == "h i" and selection.short == {"a.txt": 1}
    (tmp_path/"pool/a.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match="a.txt, line 2, which is no UTF-8"): list(read_texts(tmp_path/"pool/a.txt"))


def test_memory_is_that_of_a_batch(tmp_path):
    import tracemalloc
    write(tmp_path/"pool", documents(400, words=100) * 6, 1)
    path, size = tmp_path/"pool/0.jsonl", (tmp_path/"pool/0.jsonl").stat().st_size
    shard_counts(path, tmp_path/"warm", batch=32)
    tracemalloc.start()
    counts = shard_counts(path, tmp_path/"work", batch=32)
    shard_weights(path, tmp_path/"work", counts / counts.sum() - 1e-4, batch=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2  # the text alone is `size` bytes


def test_short_documents_are_counted_and_never_drawn(tmp_path):
    pool = documents(20) + ["w1", "", "two words"]
    write(tmp_path/"pool", pool, 1)
    selection = select_shards(tmp_path/"pool", documents(5), 20, tmp_path/"work", min_tokens=3)
    assert selection.short == {"0.jsonl": 3} and not selection.kept["0.jsonl"][20:].any()
    with pytest.raises(ValueError, match="k: got 21; want at most 20: so many of 23 documents have 3 words or more"): select_shards(tmp_path/"pool", documents(5), 21, tmp_path/"work", min_tokens=3)


def test_bad_input(tmp_path):
    found = hashed_ngrams(documents(3))
    counts = ngram_counts(found)
    (tmp_path/"work").mkdir()
    for message, call in {
        "texts: got a NoneType in place 1": lambda: hashed_ngrams(["a", None]),
        "buckets": lambda: hashed_ngrams(["a"], buckets=1),
        "texts: got one string": lambda: hashed_ngrams("a b"),
        "pool: got 'nowhere', which is no folder": lambda: select_shards("nowhere", documents(2), 2, tmp_path/"w"),
        "target: got 'some text', which is no folder": lambda: select_shards(write(tmp_path/"pool", documents(6)), "some text", 2, tmp_path/"w"),
        "pool: got nowhere.jsonl, which is no file": lambda: select_shards(["nowhere.jsonl"], documents(2), 2, tmp_path/"w"),
        "target: got no shard in": lambda: select_shards(tmp_path/"pool", tmp_path/"work", 2, tmp_path/"w"),
        "raw: got counts that are negative, or all zero": lambda: select_shards(write(tmp_path/"blank", ["", " ", ""]), documents(2), 2, tmp_path/"w"),
        "target: got counts": lambda: select_shards(tmp_path/"pool", ["", " "], 2, tmp_path/"w"),
        "target: got counts that are negative, or all zero": lambda: log_ratio(counts * 0, counts),
        "raw: got shape": lambda: log_ratio(counts, counts[:-1]),
        "ratio: got shape": lambda: log_weights(found, counts[:-1].double()),
        "2 documents without a word, the first in place 0": lambda: log_weights(hashed_ngrams(["", "a", " "]), counts.double()),
        "no documents": lambda: log_weights(hashed_ngrams([]), counts.double()),
        "k: got 4; want at most 3": lambda: resample(torch.zeros(3), 4),
        "weights: got 1 NaN": lambda: resample(torch.tensor([0., torch.nan]), 1),
        "target: got no documents": lambda: select_shards(write(tmp_path/"pool", documents(6)), [], 2, tmp_path/"w"),
        "pool: got no shard in": lambda: select_shards(tmp_path, documents(2), 2, tmp_path/"w"),
        "more than one shard named 0.jsonl": lambda: select_shards([tmp_path/"pool/0.jsonl"] * 2, documents(2), 2, tmp_path/"w"),
        "no text named 'body' in 0.jsonl, line 1": lambda: select_shards(tmp_path/"pool", documents(2), 2, tmp_path/"w", field="body"),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)): call()
    (tmp_path/"bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="bad.jsonl, line 2, which is no JSON"): list(read_texts(tmp_path/"bad.jsonl"))
    with pytest.raises(ValueError, match="want a .jsonl, .txt or .parquet file"): list(read_texts(tmp_path/"a.csv"))


def test_real_text_ranks_its_own_kind_first(real):
    plays = Path(real("tinyshakespeare"), "input.txt").read_text().split()
    wiki = Path(real("wikitext2"), "valid.txt").read_text().split()
    cut = lambda words, n, start=0: [" ".join(words[start + i * 150:start + (i + 1) * 150]) for i in range(n)]
    pool = cut(wiki, 200) + cut(plays, 100)
    weights = log_weights(raw := hashed_ngrams(pool), log_ratio(ngram_counts(hashed_ngrams(cut(plays, 200, 50_000))), ngram_counts(raw)))
    assert resample(weights, 100)[200:].sum() >= 97


def test_what_is_written_is_whole_and_overwrites_nothing_else(tmp_path, monkeypatch):
    write(tmp_path/"pool", documents(60))
    run = partial(select_shards, tmp_path/"pool", documents(20, favourites=100), 10, tmp_path/"work", min_tokens=5, normalise=True)  # so that the seed decides
    content = lambda out: {p.name: p.read_text() for p in out.iterdir()}
    before = content(tmp_path/"pool")
    with pytest.raises(ValueError, match="out: got .*, where the pool is"): run(out=tmp_path/"pool")
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/9.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="out: got .* with 9.jsonl in it"): run(out=tmp_path/"mine")
    assert content(tmp_path/"pool") == before and not (tmp_path/"work").exists()  # refused before anything is read
    write_kept = resampling._write_kept
    def full(path, kept, out):
        if path.name == "2.jsonl": raise OSError("no space left")
        write_kept(path, kept, out)
    monkeypatch.setattr(resampling, "_write_kept", full)
    with pytest.raises(OSError): run(out=tmp_path/"out")
    assert not (tmp_path/"out").exists()
    monkeypatch.setattr(resampling, "_write_kept", write_kept)
    first = (run(out=tmp_path/"out"), content(tmp_path/"out"))[1]
    assert sum(len(t.splitlines()) for t in first.values()) == 10 and not (tmp_path/".out.part").exists()
    run(out=tmp_path/"out", seed=1)
    assert content(tmp_path/"out") != first and sorted(content(tmp_path/"out")) == sorted(first)


def test_what_a_killed_run_left_is_cleared_away_and_what_is_being_written_is_not(tmp_path):
    write(tmp_path/"pool", documents(20), 1), (tmp_path/"work").mkdir()
    old, new, other = (tmp_path/"work"/n for n in (".0.jsonl-abc.ids.x1", ".0.jsonl-abc.npz.x2", ".gitignore"))
    for p in (old, new, other): p.write_text("half")
    for p in (old, other): os.utime(p, (time.time() - 7200,) * 2)
    select_shards(tmp_path/"pool", documents(5), 5, tmp_path/"work", min_tokens=5)
    assert not old.exists() and new.exists() and other.exists()


def test_a_shard_that_changes_during_a_selection_is_refused(tmp_path):
    write(tmp_path/"pool", documents(30))
    def late(f, paths):
        for p in paths: yield f(p)
        with (tmp_path/"pool/1.jsonl").open("a") as file: file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match="changed meanwhile"): select_shards(tmp_path/"pool", documents(5), 5, tmp_path/"work", tmp_path/"out", min_tokens=5, map=late)
    assert not (tmp_path/"out").exists()


def test_a_target_may_be_named_by_strings(tmp_path):
    write(tmp_path/"pool", documents(30)), write(tmp_path/"target", documents(9, seed=1), 2)
    run = lambda target: select_shards(tmp_path/"pool", target, 5, tmp_path/"work", min_tokens=5).ratio
    paths = sorted((tmp_path/"target").iterdir())
    assert torch.equal(run(list(map(str, paths))), run(paths)) and torch.equal(run(paths), run(tmp_path/"target")) and torch.equal(run(paths), run(documents(9, seed=1)))
