"Action sets and responsiveness: against brute force over whole grids, with the rules as predicates."
import itertools
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from whatmatters.attribution import recourse
from whatmatters.attribution.recourse import ActionSet, best_linear, describe, fixed_predictions, reachable, reasons_without_recourse, responsiveness
from whatmatters.core.values import count_calls

NAMES = ["age", "job", "hours", "cards", "debt", "low", "mid", "high", "one", "two"]
LEVELS = {"one-hot": {(1, 0, 0), (0, 1, 0), (0, 0, 1)}, "at most one": {(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)}, "thermometer": {(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)}}


def random_set(seed):
    "A random action set, and the same in plain words for brute force."
    draw = np.random.default_rng(seed)
    pick = lambda *options: options[draw.integers(len(options))]
    spec = dict(kind=pick(*LEVELS), turn=pick("free", "up", "down", "never"), steps=pick("free", "up", "down", "never"), scale=pick(1, 2), effect=bool(draw.integers(2)),
                change={n: pick("free", "up", "down", "never") for n in NAMES[:5]}, most={n: pick((1, 2), (2, 1), (9, 9)) for n in NAMES[:5]}, step={"hours": pick(1, 2), "job": 1, "cards": 1, "debt": pick(1, 2), "age": 1})
    spec["change"]["job"] = pick("free", "up", "down") # a link starts here
    low, high = dict(age=0, job=0, hours=0, cards=0, debt=0), dict(age=6, job=3, hours=4, cards=2, debt=4)
    corners = pd.DataFrame([list(low.values()) + [0] * 5, list(high.values()) + [1] * 5], columns=NAMES)
    actions = ActionSet(corners)
    for n in NAMES[:5]: actions.let(n, spec["change"][n], most=tuple(max(m, spec["step"][n]) for m in spec["most"][n]), step=spec["step"][n])
    spec["most"] = {n: tuple(max(m, spec["step"][n]) for m in spec["most"][n]) for n in NAMES[:5]}
    actions.encode(["low", "mid", "high"], spec["kind"], spec["turn"]).encode(["one", "two"], "thermometer", spec["steps"]).link("job", "age", spec["scale"])
    actions.implies(("cards", "==", 0), ("debt", "<=", 1), effect=spec["effect"]).implies(("hours", ">=", 4), ("high", "==", 0), effect=False)
    return actions, spec, (low, high)


def legal(p):
    return (p["cards"] != 0 or p["debt"] <= 1) and (p["hours"] < 4 or p["high"] == 0)


def by_choice(spec, low, high, name, old, new):
    d = new - old
    if d == 0: return True
    turn, (fall, rise) = spec["change"][name], spec["most"][name]
    return turn != "never" and (turn != "up" or d > 0) and (turn != "down" or d < 0) and -fall <= d <= rise and d % spec["step"][name] == 0 and low[name] <= new <= high[name]


def levels_by_choice(kind, turn, old, new):
    order = sorted(LEVELS[kind], key=lambda v: (sum(v), v.index(1) if 1 in v else -1)) if kind != "thermometer" else sorted(LEVELS[kind])
    if new not in LEVELS[kind]: return False
    a, b = order.index(old), order.index(new)
    return a == b or turn == "free" or turn == "up" and b > a or turn == "down" and b < a


def brute_force(spec, bounds, x):
    "All points of the grid that a joint action reaches."
    low, high = bounds
    old, found = dict(zip(NAMES, x)), set()
    may = lambda name, new: by_choice(spec, low, high, name, old[name], new)
    homes = [c for c in itertools.product((0, 1), repeat=3) if levels_by_choice(spec["kind"], spec["turn"], tuple(x[5:8]), c)]
    steps = [c for c in itertools.product((0, 1), repeat=2) if levels_by_choice("thermometer", spec["steps"], (*x[8:], 0), (*c, 0))]
    for *p, home, step in itertools.product(range(7), range(4), range(5), range(3), range(5), homes, steps):
        new = dict(zip(NAMES, (*p, *home, *step)))
        aged = spec["scale"] * (new["job"] - old["job"])
        set_by_rule = spec["effect"] and new["cards"] == 0 and new["debt"] == 1 and any(may("debt", d) for d in range(2, 5))
        if legal(new) and all(may(n, new[n]) for n in ("job", "hours", "cards")) and may("age", new["age"] - aged) and (may("debt", new["debt"]) or set_by_rule): found.add(tuple(new.values()))
    return found - {tuple(x)}


def brute_force_alone(spec, x, feature, everything):
    "Those among them that one feature reaches, with its effects."
    j, old, found = NAMES.index(feature), dict(zip(NAMES, x)), set()
    with_it = {5: (5, 6, 7), 6: (5, 6, 7), 7: (5, 6, 7), 8: (8, 9), 9: (8, 9), 1: (0, 1), 3: (3, 4)}.get(j, (j,))
    for p in everything:
        new = dict(zip(NAMES, p))
        if p[j] == x[j] or any(p[i] != x[i] for i in range(10) if i not in with_it): continue
        if feature == "job" and new["age"] != old["age"] + spec["scale"] * (new["job"] - old["job"]): continue
        if feature == "cards" and new["debt"] != (1 if spec["effect"] and new["cards"] == 0 and old["debt"] > 1 else old["debt"]): continue
        if feature == "debt" and not by_choice(spec, {"debt": 0}, {"debt": 4}, "debt", old["debt"], new["debt"]): continue
        found.add(p)
    return found


def people_of(spec, bounds, n, seed):
    draw, rows = np.random.default_rng(seed), []
    while len(rows) < n:
        code = sorted(LEVELS[spec["kind"]])[draw.integers(len(LEVELS[spec["kind"]]))]
        p = [int(draw.integers(bounds[1][k] + 1)) for k in NAMES[:5]] + list(code) + list([(0, 0), (1, 0), (1, 1)][draw.integers(3)])
        if legal(dict(zip(NAMES, p))): rows.append(p)
    return rows


def points(t): return set(map(tuple, t.long().tolist()))


@pytest.mark.parametrize("seed", range(12))
def test_random_sets_are_brute_force(seed):
    actions, spec, bounds = random_set(seed)
    rows = people_of(spec, bounds, 2, seed)
    x = torch.tensor(rows, dtype=torch.float64)
    w = torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    middle = torch.tensor([3., 1.5, 2, 1, 2, .5, .5, .5, .5, .5], dtype=torch.float64)
    predict = count_calls(lambda x: ((x - middle) @ w > 2).long())
    result, joint = responsiveness(predict, x, actions), fixed_predictions(predict, x, actions)
    for i, row in enumerate(rows):
        everything = brute_force(spec, bounds, row)
        assert points(reachable(actions, x[i])) == everything
        attained = {p for p in everything | {tuple(row)} if (torch.tensor(p) - middle) @ w > 2}
        assert joint.fixed[i] == (not attained) and joint.certain[i] and joint.asked[i] <= len(everything) + 1
        if not attained: assert joint.asked[i] == len(everything) + 1
        for j, name in enumerate(NAMES):
            alone = brute_force_alone(spec, row, name, everything)
            assert points(reachable(actions, x[i], name)) == alone, name
            assert result.points[i, j] == len(alone) and result.scores[i, j] == (len(alone & attained) / len(alone) if alone else 0)
        assert len(reachable(actions, x[i])) == len(everything)


def test_every_distinct_point_is_asked_about_once(monkeypatch):
    actions, spec, bounds = random_set(3)
    rows = people_of(spec, bounds, 5, 0)
    x = torch.tensor(rows * 3, dtype=torch.float64)
    seen = []
    def predict(x):
        assert len(x) <= 16
        seen.extend(map(tuple, x.tolist()))
        return x[:, 1] > 1
    counted = count_calls(predict)
    once = responsiveness(counted, x, actions, chunk=16)
    distinct = set().union(*(points(reachable(actions, p, n)) for p in x for n in NAMES))
    assert len(seen) == len(set(seen)) == len(distinct) and counted.calls == -(-len(distinct) // 16)
    monkeypatch.setattr(recourse, "WINDOW", 10)
    for a, b in zip(once, responsiveness(predict, x, actions, chunk=16)): assert torch.equal(a, b)


def test_intervals_cover_and_are_those_of_clopper_and_pearson():
    line = ActionSet(pd.DataFrame(dict(a=[0., 1.5], b=[0, 1000]))).let("a", "up", most=1.).let("b", "free")
    x, f = torch.tensor([[.25, 500]], dtype=torch.float64), lambda x: (x[:, 0] >= .95) | (x[:, 1] < 100) # true: 0.3 and 0.1
    hits = torch.zeros(2)
    for seed in range(200):
        r = responsiveness(f, x, line, samples=60, generator=seed, confidence=.9)
        k = (r.scores[0] * 60).round().long().tolist()
        for j in range(2):
            theirs = binomtest(k[j], 60).proportion_ci(.9, "exact")
            assert (r.low[0, j].item(), r.high[0, j].item()) == pytest.approx((theirs.low, theirs.high))
        hits += ((r.low <= torch.tensor([.3, .1])) & (torch.tensor([.3, .1]) <= r.high))[0].float()
    assert (hits / 200 >= .85).all() and (hits < 200).any() # coverage of 0.9 and a little more; not 1
    assert not r.exact.any() and (r.points == 60).all() # 1000 other values are more than the samples
    full = responsiveness(f, x, line, samples=1000)
    assert full.exact.tolist() == [[False, True]] and full.scores[0, 1] == .1 == full.high[0, 1]


def test_draws_do_not_depend_on_the_chunk_and_seeds_differ():
    line = ActionSet(pd.DataFrame(dict(a=[0., 1.5], b=[.5, 9.])))
    x = torch.rand(5, 2) + .5
    f = lambda x: x.sum(1) > 4
    a, b, c = (responsiveness(f, x, line, samples=50, generator=g, chunk=n) for g, n in ((1, 7), (1, 1000), (2, 1000)))
    assert torch.equal(a.scores, b.scores) and not torch.equal(a.scores, c.scores)
    assert a.scores.dtype == torch.float32 and responsiveness(f, x.bfloat16(), line, samples=50).scores.dtype == torch.float32


def test_rules_that_leave_no_draw_say_that_nothing_is_known():
    table = pd.DataFrame(dict(hours=[0., 40.5], employed=[0, 1]))
    actions = ActionSet(table).implies(("employed", "==", 0), ("hours", "==", 0), effect=False)
    x = torch.tensor([[0., 0], [20.5, 1]])
    r = responsiveness(lambda x: x[:, 0] > 30, x, actions, samples=50)
    assert (r.scores[0, 0], r.low[0, 0], r.high[0, 0], r.points[0, 0]) == (0, 0, 1, 0) # unemployed: no hours by hours alone
    assert r.points[1, 1] == 0 and r.exact[1, 1] # and with hours, unemployment is impossible by itself
    joint = fixed_predictions(lambda x: x[:, 0] > 30, x, actions, most=500)
    assert not joint.fixed.any() and joint.certain.all() # both together do it


def test_links_of_links_and_the_order_in_which_they_are_given():
    table = pd.DataFrame(np.array([[0, 0, 0, 0], [9, 9, 30, 60]]), columns=list("abcd"))
    for order in itertools.permutations([("a", "b", 1), ("b", "c", 2), ("c", "d", 1)]):
        actions = ActionSet(table)
        for link in order: actions.link(*link)
        actions.let("a", "up", most=2).let(["b", "c", "d"], "never") # they still follow
        assert points(reachable(actions, torch.tensor([1., 1, 1, 1]), "a")) == {(2, 2, 3, 3), (3, 3, 5, 5)} == points(reachable(actions, torch.tensor([1., 1, 1, 1])))
    with pytest.raises(ValueError, match="closes a cycle through a, b, c, d"): actions.let("d", "free").link("d", "a")


def test_best_linear_is_the_best_of_all_points():
    for seed in range(8):
        actions, spec, bounds = random_set(seed)
        actions.rules = []
        x = torch.tensor(people_of(spec, bounds, 2, seed), dtype=torch.float64)
        w = torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        brute = torch.stack([(torch.cat([p[None], reachable(actions, p)]) @ w).max() for p in x])
        torch.testing.assert_close(best_linear(w, x, actions), brute)
    table = pd.DataFrame(dict(a=[0., 1.5], b=[0., 2.5]))
    linked = ActionSet(table).let("b", "never").link("a", "b", 2) # b binds first: a can rise to 1.25 only
    assert best_linear(torch.tensor([1., 1]), torch.tensor([[0., 0]]), linked).item() == pytest.approx(3.75)


def test_the_table_says_what_was_set():
    actions, spec, _ = random_set(0)
    shown = describe(actions)
    assert list(shown.index) == NAMES and "moves age by" in shown.ties["job"] and shown.kind["low"] == "binary" and "thermometer of 2: one" in shown.ties["two"]
    assert "needs high == 0" in shown.ties["hours"] and repr(actions) == shown.to_string() and "<table" in actions._repr_html_()


def test_too_much_is_refused():
    actions = ActionSet(pd.DataFrame(np.array([[0] * 6, [99] * 6]), columns=list("abcdef")))
    x = torch.full((1, 6), 50.)
    with pytest.raises(ValueError, match="actions: got 1000000000000 reachable points"): reachable(actions, x[0])
    assert len(reachable(actions, x[0], "a")) == 99
    with pytest.raises(ValueError, match="feature: got a with 99 values"): reachable(actions, x[0], "a", most=10)
    stop = fixed_predictions(lambda x: x.sum(1) > 1e9, x, actions, most=2000)
    assert stop.fixed.all() and not stop.certain.any() and stop.asked.item() == 2001
    with pytest.raises(ValueError, match="no bound for a"): reachable(actions.let("a", high=float("inf")), x[0], "a")


def test_reasons():
    scores = torch.tensor([[0., .2, 0, .1], [0, 0, 0, 0]])
    named = torch.tensor([[4., 3, 2, 1]]).expand(2, -1)
    assert reasons_without_recourse(named, scores, 2).tolist() == [.5, 1]
    assert reasons_without_recourse(scores, scores, 2).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_a_tenth_are_decimal_numbers(dtype):
    "Neither the noise of 0.1 nor that of single precision loses a step, a bound or a rule."
    table = pd.DataFrame(dict(rate=[0., .9], years=[0, 9], pay=[0., 39.9]))
    x, asked = torch.tensor([[.3, 3, .7], [.9, 9, 39.9]], dtype=dtype), lambda p: p[:, [0, 1]].mul(10).round().long().tolist()
    actions = ActionSet(table).let("rate", step=.1).link("rate", "years", 10).implies(("years", "==", 7), ("pay", "==", 5))
    down, up = ([[r, 10 * r] for r in values] for values in (range(3), range(4, 10)))
    found = reachable(actions, x[0], "rate")
    assert sorted(asked(found)) == down + up and (found[:, 1] == found[:, 1].round()).all() and found[found[:, 1] == 7, 2].tolist() == [5]
    tenths = torch.tensor([0, .1, .2, .4, .5, .6, .7, .8, .9], dtype=dtype)
    torch.testing.assert_close(found[:, 0], tenths, rtol=1e-6 if dtype == torch.float32 else 0, atol=0) # the bounds to the last bit
    assert found[0, 0] == 0 and found[-1, 0] == tenths[-1]
    assert responsiveness(lambda x: x[:, 0] == 0, x, actions).scores[0, 0] == pytest.approx(1 / 9)
    needs = ActionSet(table).implies(("rate", "<=", .3), ("pay", "<=", .7), effect=False).let("pay", "up", high=39.9)
    assert len(reachable(needs, x[0], "years")) == 9 and not len(reachable(needs, x[0], "pay")) and not len(reachable(needs, x[1], "pay"))
    assert best_linear(torch.ones(3), x[1:], ActionSet(table)).item() == pytest.approx(49.8)


def test_bounds_of_small_numbers_hold():
    table = pd.DataFrame(dict(a=[0., 1e-7], b=[0., 2.5e-7]))
    actions = ActionSet(table).link("a", "b", 1.)
    points = reachable(actions, torch.tensor([0., 2e-7], dtype=torch.float64), "a", samples=200)
    assert len(points) == 200 and points[:, 1].max() <= 2.5001e-7 # a moves b, which binds first


def test_people_are_scored_as_if_each_came_alone():
    actions, spec, bounds = random_set(5)
    x, f = torch.tensor(people_of(spec, bounds, 40, 3), dtype=torch.float64), lambda x: (x[:, 0] + x[:, 3] + x[:, 7] > 4)
    together, alone = responsiveness(f, x, actions), [responsiveness(f, p[None], actions) for p in x]
    for k in range(5): assert torch.equal(together[k], torch.cat([a[k] for a in alone]))
    drawn = responsiveness(f, x, actions, method="sample", samples=30, weights={"hours": lambda new, now: (new != now + 1) * .5})
    assert (drawn.points[(together.points > 0)] <= 30).all() and (drawn.points[:, 3] == 30 * (together.points[:, 3] > 0)).all()
    assert ((drawn.low <= together.scores) & (together.scores <= drawn.high))[:, [0, 1, 3, 5, 6, 7, 8, 9]].double().mean() > .93


@pytest.mark.parametrize("said, message", [(lambda x: torch.sigmoid(x[:, 0]), "predict: got scores such as 0.*want labels, or scores with"), (lambda x: (x[:, 0] > 1).numpy(), "predict: got ndarray of shape"),
                                           (lambda x: x, "predict: got Tensor of shape .* want a tensor of shape")])
def test_predictions_that_are_no_labels(said, message):
    actions = ActionSet(pd.DataFrame(dict(a=[0., 1.5], b=[0, 3])))
    for score in (responsiveness, fixed_predictions):
        with pytest.raises(ValueError, match=message): score(said, torch.tensor([[.5, 1]]), actions)
    assert responsiveness(lambda x: torch.sigmoid(x[:, 0]), torch.tensor([[.5, 1]]), actions, threshold=.6).scores[0, 0] > .5


def test_wrong_kinds_are_named():
    table = pd.DataFrame(dict(a=[0., 1.5], b=[0, 3]))
    actions, f, x = ActionSet(table), lambda x: x[:, 0] > 1, torch.tensor([[.5, 1]])
    for call, message in ((lambda: responsiveness(f, table, actions), "x: got DataFrame"), (lambda: responsiveness(f, x.long(), actions), "x: got torch.int64"), (lambda: responsiveness(f, x, table), "actions: got DataFrame"),
                          (lambda: responsiveness(f, x, actions, weights=["a"]), "weights: got list"), (lambda: reachable(actions, x), "x: got Tensor of shape .1, 2.; want one person"), (lambda: actions.let(0, "up"), "names: got 0"),
                          (lambda: actions.let("a", most=("x", 1)), "most: got 'x'"), (lambda: ActionSet(dict(a=[1])), "table: got dict"), (lambda: reasons_without_recourse(x, responsiveness(f, x, actions), 1), "scores: got Responsiveness")):
        with pytest.raises(ValueError, match=message): call()
