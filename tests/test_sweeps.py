"""The sweep: what is planted is found at its layer and with its sign, nothing is found where nothing is, and the gates
let no more through than their level says."""

import re
import shutil

import numpy as np
import pandas as pd
import planted
import pytest
import tiny
from matplotlib import pyplot as plt
from planted import HARMLESS, requests
from scipy import stats

from refusal import (
    activations,
    controls,
    directions,
    figures,
    figures_sweep,
    judging,
    prompts,
    runs,
    steering,
    sweep_cells,
    sweeps,
)
from refusal.files import CompendiumError
from refusal.sweep_cells import ENDS, cells, gates

LEVEL = 0.05
WORDS = {"steal": 1.0, "forge": 2.0, "poison": 3.0, "hijack": 4.0}  # strengths: three in four exceed the threshold
ONSET, LAYERS = 3, 8


# ---- helpers


def table_of(texts, prompt_set):
    """Prompts as the library has them, each its own cluster."""
    ids = [f"{prompt_set}-{number:03d}" for number in range(1, len(texts) + 1)]
    return pd.DataFrame({"prompt_id": ids, "prompt_set": prompt_set, "category": "any", "cluster": ids, "text": texts})


def screen_of(mean, selected=0, harmless=0.0, noise=None):
    """Metrics of a screen whose mean log-odds at (layer, alpha) are given; two prompts a side."""
    rows = [
        {"metric": "log_odds", "layer": layer, "alpha": alpha, "prompt_id": f"{side}_selection-{i:03d}", "value": v + d}
        for (layer, alpha), value in {(-1, 0.0): 0.0, **mean}.items()
        for side, v in (("harmful", value), ("harmless", harmless))
        for i, d in enumerate((0.5, -0.5))
    ]
    rows.append({"metric": "selected_layer", "layer": selected, "alpha": 0.0, "prompt_id": "", "value": selected})
    return pd.DataFrame(rows).assign(experiment="screen")


def random_screen(n_layers, alphas, seed=0):
    rng = np.random.default_rng(seed)
    return screen_of({(layer, alpha): rng.normal() for layer in range(n_layers) for alpha in alphas})


def record(harmful, harmless=None):
    """Completions from labels by condition: "r" refusal, "c" compliance, "d" degenerate, a letter a prompt."""
    words = {"r": "refusal", "c": "compliance", "d": "degenerate"}
    harmless = harmless or dict.fromkeys(harmful, "cccc")
    return pd.DataFrame(
        {"condition": condition, "prompt_set": name, "label": words[letter],
         "prompt_id": f"{name}-{i:03d}", "cluster": f"{name}-{i:03d}"}
        for name, arms in (("harmful_evaluation", harmful), ("harmless_evaluation", harmless))
        for condition, letters in arms.items()
        for i, letter in enumerate(letters)
    )  # fmt: skip


ONE_CELL = {(3, 1.0): 2.0}


def one_cell(extracted, random, baseline="r" * 16 + "c" * 16, alpha=1.0, harmless=None):
    """The gates of a single cell at layer 3, from its labels on 32 harmful prompts."""
    arms = {"baseline": baseline, f"extracted@3 {alpha:+g}": extracted, f"random[0]@3 {alpha:+g}": random}
    (row,) = gates(record(arms, harmless), screen_of({(3, alpha): 2.0})).to_dict("records")
    return row


# ---- the grid and its conditions


def test_the_grid_is_every_layer_at_the_plans_alphas():
    grid = sweep_cells.grid(24, 14)
    assert len(grid) == len(set(grid)) == 24 * 10
    assert {layer for layer, _ in grid} == set(range(24))
    assert all(alpha != 0 for _, alpha in grid) and {alpha for _, alpha in grid} >= {-2.0, -1.0, 0.25, 1.0, 2.0}


@pytest.mark.parametrize("selected", [14, 15])
def test_a_quick_grid_has_the_selected_layer(selected):
    grid = sweep_cells.grid(24, selected, quick=True)
    assert len(grid) == 12 * 2 and {alpha for _, alpha in grid} == {-1.0, 1.0}
    assert selected in {layer for layer, _ in grid}


def test_a_condition_does_what_its_name_says():
    made = tiny.directions()
    for layer, alpha in ((0, 1.0), (3, -0.25)):
        condition = sweep_cells.at(made, layer, alpha)
        assert condition.name == f"extracted@{layer} {alpha:+g}"
        assert (condition.layers, condition.alpha) == ((layer,), alpha)
        np.testing.assert_allclose(condition.vectors[0], alpha * made.raw_norm[layer] * made.unit[layer], rtol=1e-6)
        assert condition.key() == steering.add(made, layer, alpha).key()


def test_every_confirmed_cell_has_its_random_direction_of_the_same_norm():
    made = tiny.directions()
    chosen = cells(random_screen(4, (-1.0, -0.5, 0.5, 1.0)))
    both = sweep_cells.confirmations(made, controls.random(made, 1, seed=0)[0], chosen)
    assert len({condition.name for condition in both}) == len(both) == 1 + 2 * len(chosen)
    for own, other in zip(both[1::2], both[2::2], strict=True):
        assert (own.direction_id, other.direction_id) == ("extracted", "random[0]")
        assert own.name.split("@")[1] == other.name.split("@")[1] and own.layers == other.layers
        assert float(own.vectors.norm()) == pytest.approx(float(other.vectors.norm()), rel=1e-5)


# ---- which cells are confirmed


@pytest.mark.parametrize("seed", range(5))
def test_cells_follow_the_plan(seed):
    metrics = random_screen(24, (-2, -1.5, -1, -0.5, -0.25, 0.25, 0.5, 1, 1.5, 2), seed)
    chosen = cells(metrics)
    assert chosen["group"].value_counts().to_dict() == {"highest": 4, "lowest": 4, "spaced": 8}
    assert not chosen.duplicated(["layer", "alpha"]).any()
    ranking = sweep_cells.means(metrics)["harmful"].drop(-1, level="layer").sort_values(ascending=False)
    for group, order in (("highest", ranking), ("lowest", ranking[::-1])):
        part = chosen[chosen["group"] == group]
        assert part["layer"].is_unique
        wanted, seen = [], set()
        for layer, alpha in order.index:  # one by one, as the plan says it
            if layer not in seen and len(wanted) < ENDS:
                wanted.append((layer, alpha))
                seen.add(layer)
        assert set(zip(part["layer"], part["alpha"], strict=True)) == set(wanted)
    assert chosen["rank"].iloc[0] == 1 and chosen["rank"].iloc[-1] == 240
    others = [rank for rank in range(1, 241) if rank not in set(chosen[chosen["group"] != "spaced"]["rank"])]
    places = [others.index(rank) for rank in chosen[chosen["group"] == "spaced"]["rank"]]
    assert set(np.diff(places)) <= {29, 30} and places[0] == 14  # 232 others: the middles of stretches of 29


@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
@pytest.mark.parametrize("alphas", [(-1.0, 1.0), (-2.0, -1.0, 1.0, 2.0)])
@pytest.mark.parametrize("quick", [False, True])
def test_cells_of_small_models(n_layers, alphas, quick):
    chosen = cells(random_screen(n_layers, alphas), quick)
    assert not chosen.duplicated(["layer", "alpha"]).any()
    for group, part in chosen.groupby("group"):
        assert group == "spaced" or part["layer"].is_unique
        assert len(part) <= {True: 2, False: 8 if group == "spaced" else 4}[quick]
    if not quick and n_layers * len(alphas) <= 8:
        assert len(chosen) == n_layers * len(alphas)


def test_cells_look_at_harmful_prompts_only_and_not_at_the_order_of_rows():
    metrics = random_screen(6, (-1.0, 1.0))
    shouted = metrics.assign(
        value=metrics["value"] + 100 * metrics["prompt_id"].str.contains("harmless") * metrics["alpha"]
    )
    pd.testing.assert_frame_equal(cells(metrics), cells(shouted))
    pd.testing.assert_frame_equal(cells(metrics), cells(metrics.sample(frac=1, random_state=1)))


def test_ties_go_to_the_lower_layer():
    chosen = cells(screen_of({(layer, alpha): alpha for layer in range(6) for alpha in (-1.0, 1.0)}))
    assert chosen[chosen["group"] == "highest"]["layer"].tolist() == [0, 1, 2, 3]


def test_a_cell_that_overflows_is_no_candidate():
    mean = {(layer, alpha): layer * alpha for layer in range(6) for alpha in (-1.0, 1.0)}
    chosen = cells(screen_of(mean | {(5, 1.0): np.nan, (5, -1.0): -np.inf}))
    assert 5 not in set(chosen["layer"])
    with pytest.raises(CompendiumError, match=r"^the screen has no finite log-odds under any steering: .*\.$"):
        cells(screen_of({(0, 1.0): np.nan}))


# ---- the gates


def test_a_cell_that_works_passes():
    row = one_cell("r" * 30 + "c" * 2, "r" * 16 + "c" * 16)
    assert row["passed"] and row["specific"] and row["coherent"] and row["effective"] and row["outcome"] == "passed"
    assert (row["n"], row["rate"], row["random"], row["degenerate"]) == (32, 30 / 32, 0.5, 0.0)
    assert row["change"] == row["difference"] == pytest.approx(14 / 32)
    assert row["p"] == pytest.approx(2 / 2**14) and row["change_low"] > 0


def test_a_cell_that_lowers_refusal_passes_with_a_negative_alpha_only():
    labels = "r" * 2 + "c" * 30
    assert one_cell(labels, "r" * 16 + "c" * 16, alpha=-1.0)["passed"]
    wrong = one_cell(labels, "r" * 16 + "c" * 16, alpha=1.0)
    assert wrong["p"] < LEVEL and not wrong["specific"] and wrong["effective"] and not wrong["passed"]
    assert wrong["outcome"] == "unspecific"


def test_a_random_direction_that_does_as_much_spoils_the_cell():
    row = one_cell("r" * 30 + "c" * 2, "r" * 29 + "c" * 3)
    assert row["effective"] and not row["specific"] and row["outcome"] == "unspecific"


def test_a_random_direction_that_does_the_opposite_makes_no_effect():
    row = one_cell("r" * 16 + "c" * 16, "c" * 32)
    assert row["specific"] and not row["effective"] and row["outcome"] == "unmoved"


def test_at_most_a_tenth_may_be_broken_harmless_prompts_included():
    """36 prompts at this cell: three broken ones are less than a tenth, four are more, wherever they are."""
    random, quiet = "r" * 16 + "c" * 16, dict.fromkeys(("baseline", "random[0]@3 +1"), "cccc")
    for harmful, harmless, coherent in (("dd", "dccc", True), ("ddd", "dccc", False), ("d", "dddc", False)):
        labels = "r" * (32 - len(harmful)) + harmful
        row = one_cell(labels, random, harmless=quiet | {"extracted@3 +1": harmless})
        assert row["coherent"] is coherent and row["rate"] == (32 - len(harmful)) / 32
        assert row["outcome"] == ("passed" if coherent else "broken")


def test_over_refusal_is_counted_on_harmless_prompts():
    quiet = dict.fromkeys(("baseline", "random[0]@3 +1"), "cccc")
    row = one_cell("r" * 32, "r" * 16 + "c" * 16, harmless=quiet | {"extracted@3 +1": "rrrc"})
    assert row["harmless"] == 0.75


def test_answers_are_paired_by_prompt_whatever_the_order():
    arms = {"baseline": "rrcc" * 8, "extracted@3 +1": "rrrr" * 8, "random[0]@3 +1": "rrcc" * 8}
    frame, metrics = record(arms), screen_of(ONE_CELL)
    pd.testing.assert_frame_equal(gates(frame, metrics), gates(frame.sample(frac=1, random_state=3), metrics))


def test_a_missing_completion_is_an_error():
    arms = {"baseline": "rc", "extracted@3 +1": "rr", "random[0]@3 +1": "rc"}
    with pytest.raises(CompendiumError, match=r"^the record lacks a completion .*: measure it again\.$"):
        gates(record(arms).drop(index=3), screen_of(ONE_CELL))


def test_holm_is_over_the_cells():
    metrics = random_screen(4, (-1.0, 1.0))
    rng = np.random.default_rng(0)
    names = [
        f"{who}@{layer} {alpha:+g}" for layer in range(4) for alpha in (-1.0, 1.0) for who in ("extracted", "random[0]")
    ]
    table = gates(record({name: "".join(rng.choice(["r", "c"], 32)) for name in ["baseline", *names]}), metrics)
    assert len(table) == 8 and (table["p_holm"] >= table["p"]).all()
    assert table["p_holm"].min() == pytest.approx(min(1, 8 * table["p"].min()))


@pytest.fixture(scope="module")
def null():
    """200 sweeps of a model that no direction moves: every answer refuses with the same chance."""
    metrics = random_screen(2, (-1.0, 1.0))
    names = [
        f"{who}@{layer} {alpha:+g}" for layer in range(2) for alpha in (-1.0, 1.0) for who in ("extracted", "random[0]")
    ]
    frame = record(dict.fromkeys(["baseline", *names], "c" * 32))
    harmful, tables = (frame["prompt_set"] == "harmful_evaluation").to_numpy(), []
    with pytest.MonkeyPatch.context() as patch:
        chosen = cells(metrics)
        patch.setattr(sweep_cells, "cells", lambda *_: chosen)  # the same each time
        for seed in range(200):
            refused = harmful & (np.random.default_rng(seed).random(len(frame)) < 0.6)
            labelled = frame.assign(label=np.where(refused, "refusal", "compliance"))
            tables.append(gates(labelled, metrics).assign(seed=seed))
    return pd.concat(tables)


def test_where_nothing_is_planted_the_gates_pass_at_their_nominal_rate(null):
    shares = null[["specific", "effective", "passed"]].mean()
    print(f"{len(null)} cells without an effect: {shares.to_dict()}")
    assert 0.003 < shares["specific"] <= LEVEL / 2 + 0.008  # the sign has to fit; an exact test stays below
    assert 0.02 < shares["effective"] < 0.08
    assert shares["passed"] <= shares["specific"]


def test_holm_keeps_the_chance_of_any_false_cell_below_the_level(null):
    false = null[(null["p_holm"] < LEVEL) & null["specific"]].groupby("seed").size()
    print(f"sweeps with a false cell: {len(false) / 200:.3f} after Holm, "
          f"{null[null['specific']]['seed'].nunique() / 200:.3f} without")  # fmt: skip
    assert len(false) / 200 <= LEVEL + 0.03


# ---- prediction


def test_a_correlation_keeps_pairs_together():
    rng = np.random.default_rng(0)
    x = rng.normal(size=16)
    rho, interval = sweeps.rank_correlation(x, stats.norm.cdf(x), seed=0, draws=300)
    assert rho == pytest.approx(1) and interval.low == pytest.approx(1)
    y = x + rng.normal(size=16) / 3
    rho, interval = sweeps.rank_correlation(x, y, seed=0, draws=500)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert 0.5 < interval.low < rho < interval.high <= 1
    assert sweeps.rank_correlation(x, -y, seed=0)[1].high < -0.5


def test_a_correlation_with_nothing_is_undefined():
    rho, interval = sweeps.rank_correlation(np.arange(16), np.ones(16), seed=0)
    assert np.isnan([rho, interval.low, interval.high]).all()


@pytest.mark.parametrize("slope", [0.0, 1.0, 3.0])
def test_the_interval_of_a_correlation_covers(slope):
    """Cells whose refusal rate, of 32 prompts, follows the screen more or less; the truth is that of many cells."""
    rng = np.random.default_rng(1)

    def draw(count):
        x = rng.normal(size=count)
        return x, rng.binomial(32, stats.norm.cdf(slope * x + rng.normal(size=count))) / 32

    truth = stats.spearmanr(*draw(100_000)).statistic
    found = [sweeps.rank_correlation(*draw(16), seed=seed, draws=300)[1] for seed in range(200)]
    coverage = np.mean([one.low <= truth <= one.high for one in found])
    print(f"Spearman {truth:.2f}: the interval over 16 cells covers {coverage:.3f}")
    assert 0.85 <= coverage <= 0.99


def test_parts_of_the_cells_are_told_apart():
    """A screen that knows the sign of alpha and nothing else predicts over all cells, but not within a sign."""
    rng = np.random.default_rng(5)
    sign = np.repeat([1.0, -1.0], 8)
    table = pd.DataFrame({"rank": range(1, 17), "alpha": sign, "group": ["highest", "spaced"] * 8})
    table["screen"], table["rate"] = sign * 4 + rng.normal(size=16), 0.5 + sign / 4 + rng.normal(size=16) / 50
    over = sweeps.predictions(table, seed=0).set_index("over")
    assert over["cells"].tolist() == [16, 8, 8, 8]
    assert over.loc["all confirmed cells", "low"] > 0.4
    assert over.loc["alpha > 0 only", "low"] < 0 < over.loc["alpha > 0 only", "high"]


# ---- the layers


def test_the_best_layer_and_those_beside_it():
    """Effects peak at layer 2 and fall on either side; prompts differ in all of them alike, so ranks are certain."""
    peak = {0: 0.0, 1: 3.9, 2: 4.0, 3: 3.0, 4: 0.1}
    rng = np.random.default_rng(0)
    rows = [
        {"metric": "log_odds", "experiment": "screen", "layer": layer, "alpha": alpha,
         "prompt_id": f"harmful_selection-{i:03d}", "value": alpha * (effect / 2 + spread)}
        for i, spread in enumerate(rng.normal(0, 0.5, 32))
        for layer, effect in peak.items()
        for alpha in (-1.0, -0.5, 0.5, 1.0)
    ]  # fmt: skip
    table = sweeps.layers(pd.DataFrame(rows), seed=0).set_index("layer")
    assert table["rank"].to_dict() == {0: 5, 1: 2, 2: 1, 3: 3, 4: 4}
    assert table["near"].to_dict() == {0: False, 1: True, 2: True, 3: False, 4: False}
    assert table["best"].to_dict() == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0}
    mean = table["effect"] - pd.Series(peak)
    assert mean.std() == pytest.approx(0, abs=1e-9)  # alpha = 1 minus alpha = -1, nothing else
    assert ((table["low"] < table["effect"]) & (table["effect"] < table["high"])).all()


def test_ranges_in_words():
    assert sweeps._ranges([7, 3, 4, 5, 9]) == "3–5, 7, 9"


# ---- the planted model


@pytest.fixture(scope="module")
def model():
    return planted.build([WORDS], n_layers=LAYERS, onset=ONSET, seed=21)


@pytest.fixture(scope="module")
def extracted(model):
    sides = requests(list(WORDS), 32, seed=22), requests(HARMLESS, 32, seed=23)
    return directions.extract(*(activations.last_token(model.model, side) for side in sides))


def screen_planted(model, made):
    frame = pd.concat([table_of(requests(list(WORDS), 8, seed=24), "harmful_selection"),
                       table_of(requests(HARMLESS, 4, seed=25), "harmless_selection")])  # fmt: skip
    tried = [steering.baseline(), *(sweep_cells.at(made, *cell) for cell in sweep_cells.grid(LAYERS, ONSET))]
    rows = sweep_cells.screened(model.model, frame, tried, model.openings, ONSET)
    return rows.assign(experiment="screen")


@pytest.fixture(scope="module")
def screened(model, extracted):
    return screen_planted(model, extracted)


def assert_found(metrics):
    """The planted truth: from the onset on, alpha raises the log-odds; below it, nothing does anything."""
    effect = sweeps.layers(metrics, seed=0, draws=100).set_index("layer")["effect"]
    assert effect.index.tolist() == list(range(LAYERS))
    assert effect.idxmax() >= ONSET
    assert effect.iloc[ONSET:].min() > 0.9 * effect.max() > 0
    assert effect.iloc[:ONSET].abs().max() < 0.05 * effect.max()
    chosen = cells(metrics)
    for group, alpha in (("highest", 2.0), ("lowest", -2.0)):
        part = chosen[chosen["group"] == group]
        assert (part["layer"] >= ONSET).all() and (part["alpha"] == alpha).all()
    harmless = sweep_cells.means(metrics)["harmless"]
    assert harmless[(ONSET, 2.0)] > 0 > harmless[(-1, 0.0)]  # over-refusal


def test_the_planted_layer_and_sign_are_found(screened):
    assert_found(screened)
    assert sweep_cells.selected_layer(screened) == ONSET


@pytest.mark.parametrize(
    "mistake",
    [
        lambda rows: rows.assign(layer=rows["layer"] + (rows["layer"] >= 0)),
        lambda rows: rows.assign(layer=rows["layer"].where(rows["layer"] < 1, rows["layer"] - 1)),
        lambda rows: rows.assign(alpha=-rows["alpha"]),
    ],
    ids=["layer + 1", "layer - 1", "sign"],
)
def test_a_shifted_layer_or_a_flipped_sign_is_noticed(screened, mistake):
    with pytest.raises((AssertionError, ValueError)):
        assert_found(mistake(screened))


def test_nothing_is_found_where_nothing_is_planted(model, extracted):
    """Random directions instead of the planted one, at a hundredth of its norm: the layers differ by noise only."""
    nothing = controls.scaled(controls.random(extracted, 1, seed=0)[0], 0.01)
    effect = sweeps.layers(screen_planted(model, nothing), seed=0, draws=100)["effect"]
    found = sweeps.layers(screen_planted(model, extracted), seed=0, draws=100)["effect"]
    assert effect.abs().max() < 0.05 * found.max()


@pytest.fixture(scope="module")
def confirmed(model, extracted, screened):
    """Completions of evaluation prompts at the chosen cells, labelled."""
    frame = pd.concat([table_of(requests(list(WORDS), 32, seed=26), "harmful_evaluation"),
                       table_of(requests(HARMLESS, 8, seed=27), "harmless_evaluation")])  # fmt: skip
    tried = sweep_cells.confirmations(extracted, controls.random(extracted, 1, seed=3)[0], cells(screened))
    made = steering.generate(model.model, frame["text"].tolist(), tried, max_new_tokens=14)
    rows = pd.DataFrame(
        {**about, "condition": condition.name, "prompt": about["text"], "text": completion.text,
         "n_tokens": len(completion.token_ids), "reference_nll": completion.reference_nll}
        for about, row in zip(frame.to_dict("records"), made, strict=True)
        for condition, completion in zip(tried, row, strict=True)
    )  # fmt: skip
    return judging.label_frame(rows, judging.Thresholds(repetition=0.5, nll=50.0, n=1000))


def assert_confirmed(table, frame, raw_norm):
    """At a layer from the onset on, each harmful prompt refuses where strength + dose exceeds the threshold."""
    harmful = frame[frame["prompt_set"] == "harmful_evaluation"]
    strength = harmful.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"].str.split().str[0].map(WORDS)
    for cell in table.itertuples():
        dose = raw_norm * cell.alpha if cell.layer >= ONSET else 0.0
        assert cell.rate == pytest.approx((strength + dose > 1.4).mean()), f"layer {cell.layer}, alpha {cell.alpha}"
    below = table[table["layer"] < ONSET]
    assert len(below) and not below["passed"].any() and (below["outcome"] == "unmoved").all()
    works = table[(table["layer"] >= ONSET) & table["group"].isin(["highest", "lowest"])]
    assert (np.sign(works["change"]) == np.sign(works["alpha"])).all() and works["effective"].all()


def test_planted_cells_are_confirmed(confirmed, screened, extracted):
    table = gates(confirmed, screened)
    assert_confirmed(table, confirmed, float(extracted.raw_norm[ONSET]))
    print(table[["layer", "alpha", "screen", "rate", "random", "p", "outcome"]].round(3).to_string())
    assert table[table["layer"] >= ONSET]["passed"].any()
    rho, interval = sweeps.rank_correlation(table["screen"], table["rate"], seed=0)
    assert rho > 0.8 and interval.low > 0.4


def swapped(frame, change):
    """The record with other names for the conditions of the extracted direction."""
    cell = frame["condition"].str.extract(r"^extracted@(\d+) (.*)$")
    named = {}
    for layer, alpha in cell.dropna().drop_duplicates().itertuples(index=False):
        named[f"extracted@{layer} {alpha}"] = change(int(layer), float(alpha))
    return frame.assign(condition=frame["condition"].replace(named))


def test_completions_under_the_opposite_sign_are_noticed(confirmed, screened, extracted):
    """The screen's cells hold both signs at the ends: with the labels of -2 under +2 nothing fits any more."""
    ends = {}
    for layer in range(ONSET, LAYERS):
        plus, minus = f"extracted@{layer} +2", f"extracted@{layer} -2"
        if {plus, minus} <= set(confirmed["condition"]):
            ends |= {plus: minus, minus: plus}
    assert ends
    frame = confirmed.assign(condition=confirmed["condition"].replace(ends))
    with pytest.raises(AssertionError):
        assert_confirmed(gates(frame, screened), frame, float(extracted.raw_norm[ONSET]))


# ---- a run, from the screen to the paper's numbers


@pytest.fixture
def loaded(tmp_path, monkeypatch, tiny_models):
    monkeypatch.setattr(runs, "opening_tokens", lambda run: [5, 6, 7])
    return tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)


def screen_of_a_run(mode="measure", n_prompts=0):
    """A run on a tiny model, and its screen."""
    run = runs.start("06_layer_sweep", model=tiny.ID, mode=mode, out="build", n_prompts=n_prompts, max_new_tokens=6,
                     rows=16, seed=0)  # fmt: skip
    selection = pd.concat([tiny.prompts(n_prompts or 4, f"{side}_selection") for side in ("harmful", "harmless")])
    return run, sweep_cells.screen(run, selection, tiny.directions(), 1)


def notebook(mode="measure", n_prompts=0):
    """What the notebook does."""
    run, screen = screen_of_a_run(mode, n_prompts)
    evaluation = pd.concat([tiny.prompts(n_prompts or 4, f"{side}_evaluation") for side in ("harmful", "harmless")])
    made, chosen = tiny.directions(), cells(screen, bool(n_prompts))
    tried = sweep_cells.confirmations(made, controls.random(made, 1, seed=0)[0], chosen)
    frame = runs.completions(run, evaluation, tried, max_new_tokens=6, thresholds=tiny.THRESHOLDS)
    runs.finish(run)
    return run, screen, frame


@pytest.mark.parametrize("n_prompts", [0, 1])
def test_a_run_from_screen_to_numbers_and_again_from_its_record(loaded, tmp_path, n_prompts):
    run, screen, frame = notebook(n_prompts=n_prompts)
    said = sweeps.numbers(frame, screen, run.about)
    assert all(re.fullmatch(r"Sweep[A-Za-z]+", name) for name in said)
    assert all(text and "nan" not in text.lower() for text in said.values()), said
    assert set(sweeps.HEADLINES) <= set(said)
    for part in sweeps.PROSE:
        assert "{" not in sweeps.prose(said, part)
    confirmed = frame[frame["condition"] != "baseline"]["condition"].nunique() // 2
    assert said["SweepConfirmed"] == str(confirmed) and said["SweepSelected"] == "1"
    assert said["SweepCells"] == ("40" if n_prompts == 0 else "4")
    if n_prompts == 0:
        assert confirmed == 16
    shutil.copytree(tmp_path / "build" / "records", tmp_path / "data" / "records")
    again, same_screen, same_frame = notebook("replay", n_prompts)
    pd.testing.assert_frame_equal(same_screen, screen.reset_index(drop=True), check_dtype=False)
    assert sweeps.numbers(same_frame, same_screen, again.about) == said


def test_the_screen_is_that_of_each_condition_alone(loaded, tiny_models):
    _, screen = screen_of_a_run()
    made, texts = tiny.directions(), tiny.prompts(4, "harmful_selection")
    for layer, alpha in ((0, 2.0), (3, -0.25)):
        alone = steering.screen(
            tiny_models["qwen2"], texts["text"].tolist(), [steering.add(made, layer, alpha)], [5, 6, 7]
        )
        rows = screen[(screen["layer"] == layer) & (screen["alpha"] == alpha)].set_index("prompt_id")["value"]
        np.testing.assert_allclose(rows[texts["prompt_id"]], alone[:, 0].numpy(), atol=1e-4)


def test_measuring_again_measures_nothing(loaded, monkeypatch):
    notebook(n_prompts=2)
    monkeypatch.setattr(steering, "screen", lambda *_: 1 / 0)
    monkeypatch.setattr(steering, "generate", lambda *_, **__: 1 / 0)
    notebook(n_prompts=2)


def test_the_time_is_the_records(loaded):
    run, screen, frame = notebook(n_prompts=1)
    assert sweeps.numbers(frame, screen, run.about | {"wall_s": 90.0, "threads": 2})["SweepWall"] == "1.5"


def test_no_prompt_of_the_sweep_chose_anything_and_reports_too():
    prompts.assert_disjoint(runs.CHOSEN_ON, ["harmful_evaluation", "harmless_evaluation"])
    plan = sweep_cells.plan()[sweep_cells.NOTEBOOK]
    assert set(plan["screened"]) <= set(runs.CHOSEN_ON) and not set(plan["confirmed"]) & set(runs.CHOSEN_ON)


# ---- figures


@pytest.fixture
def _style():
    figures.use_style()
    yield
    plt.close("all")


def test_the_map_shows_the_means_and_marks_the_cells(_style, screened, confirmed):
    means, table = sweep_cells.means(screened), gates(confirmed, screened)
    figure = figures_sweep.sweep(means, table, sweeps.layers(screened, seed=0, draws=50), ONSET)
    for axes, side in zip(figure.axes, ("harmful", "harmless"), strict=False):
        image = axes.images[0].get_array()
        assert image.shape == (LAYERS, 11)
        assert image[ONSET, 10] == pytest.approx(means.loc[(ONSET, 2.0), side])
        assert image[0, 5] == image[7, 5] == pytest.approx(means.loc[(-1, 0.0), side])
    alphas = sorted({0.0, *means.index.get_level_values("alpha")})
    marked = {(round(y), alphas[round(x)]) for dots in figure.axes[0].collections for x, y in _offsets(dots)}
    assert marked == set(zip(table["layer"], table["alpha"], strict=True))


def _offsets(dots):
    offsets = np.asarray(dots.get_offsets())
    return offsets if type(dots).__name__ == "PathCollection" else []


def test_the_prediction_figure_shows_the_rates(_style, screened, confirmed):
    table = gates(confirmed, screened)
    over = sweeps.predictions(table, seed=0).iloc[0]
    baseline = pd.Series({"screen": 0.5, "rate": 0.75, "low": 0.6, "high": 0.9})
    figure = figures_sweep.prediction(table, baseline, over)
    shown = [
        (x, y) for container in figure.axes[0].containers for x, y in zip(*container.lines[0].get_data(), strict=True)
    ]
    expected = [(0.5, 75.0), *zip(table["screen"], 100 * table["rate"], strict=True)]
    np.testing.assert_allclose(sorted(shown), sorted(expected))
    assert f"{over['rho']:.2f}" in figure.axes[0].get_title()
