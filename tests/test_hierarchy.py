"""Models side by side: what each notebook said is taken as it is, differences are paired by prompt, and an order is
claimed only where there is one."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from refusal import (
    analyses,
    figures,
    figures_hierarchy,
    hierarchy,
    hierarchy_order,
    hierarchy_words,
    records,
    specificity,
    statistics,
    tex,
)
from refusal.analyses import plan
from refusal.files import ROOT, CompendiumError
from refusal.hierarchy_order import Measured
from refusal.specification import FACTORS, Arm
from refusal.specification_runs import rule
from refusal.wording import people

BIG, SMALL, WEAK = "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m"
COMMITTED = ROOT / "data" / "records"
OURS = {factor: rule()["ours"][factor] for factor in FACTORS}
N = 40
no_records = not (COMMITTED / SMALL / "03_sign_inversion.parquet").exists()
needs_records = pytest.mark.skipif(no_records, reason="no committed records of the default model")


# ---- one difference


def series(values):
    return pd.Series(values, index=[f"p-{i:02d}" for i in range(len(values))])


def test_a_difference_is_mcnemars_where_prompts_are_independent():
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 2, 30) for _ in range(2))
    own = series([f"c-{i}" for i in range(30)])
    found = hierarchy_order.difference(series(first), series(second), own)
    paired = statistics.paired(first, second, own.to_numpy())
    assert (found["n"], found["clusters"]) == (30, 30)
    assert found["p"] == pytest.approx(paired.p) and found["value"] == pytest.approx(paired.difference)
    assert found["low"] < found["value"] < found["high"]


def test_clusters_are_flipped_whole():
    first, second = series([1] * 12), series([0] * 12)
    alone = hierarchy_order.difference(first, second, series([f"c-{i}" for i in range(12)]))
    together = hierarchy_order.difference(first, second, series([f"c-{i // 4}" for i in range(12)]))
    assert alone["p"] == pytest.approx(2**-11) and together["p"] == pytest.approx(2**-2)
    assert together["clusters"] == 3


def test_prompts_are_matched_by_id_and_others_left_out():
    first = series([1, 1, 1, 0])
    second = series([0, 1, 1, 0]).iloc[[2, 0]]
    found = hierarchy_order.difference(first, second, series(["a", "b", "c", "d"]))
    assert found["n"] == 2 and found["value"] == 0.5
    none = hierarchy_order.difference(first, second.rename(lambda name: "x" + name), series(list("abcd")))
    assert none["n"] == 0 and none["p"] == 1 and np.isnan(none["value"])


# ---- the family at one mean difference


def sign_record(refusals, sizes=(30, 20)):
    """Completions of notebook 03, from the share that each condition refuses, prompts in a fixed order."""
    rows = []
    for prompt_set, size in zip(("harmful_evaluation", "harmless_evaluation"), sizes, strict=True):
        for condition, share in refusals[prompt_set].items():
            rows += [
                {"condition": condition, "prompt_set": prompt_set, "prompt_id": f"{prompt_set}-{i:03d}",
                 "cluster": f"{prompt_set}-{i:03d}", "label": "refusal" if i < share * size else "compliance"}
                for i in range(size)
            ]  # fmt: skip
    return pd.DataFrame(rows)


def shares(base=0.5, plus=0.9, minus=0.1, harmless=0.1, over=0.4):
    return {"harmful_evaluation": {"baseline": base, "extracted +1": plus, "extracted -1": minus},
            "harmless_evaluation": {"baseline": harmless, "extracted +1": over, "extracted -1": 0.0}}  # fmt: skip


@pytest.fixture
def of_models(monkeypatch, tmp_path):
    """Lets `hierarchy.read` find these frames, of notebook 03, by model."""

    def install(frames):
        monkeypatch.setattr(
            hierarchy, "read",
            lambda folder, notebook: (frames[folder.name], pd.DataFrame(), {}) if notebook[:2] == "03" else None,
        )  # fmt: skip
        return {model: tmp_path / model for model in frames}

    return install


def test_the_family_is_every_pair_and_comparison_with_holm_over_all(of_models):
    folders = of_models({SMALL: sign_record(shares()), BIG: sign_record(shares(base=0.9)), WEAK: sign_record(shares())})
    found = hierarchy_order.compared(folders)
    assert len(found) == 3 * len(rule()["compared"]) == 12
    assert (found["p_holm"] >= found["p"]).all()
    adjusted = statistics.holm({str(i): p for i, p in enumerate(found["p"])})
    np.testing.assert_allclose(found["p_holm"], list(adjusted.values()))
    table = found.set_index(["first", "second", "name"])["value"]
    assert table[SMALL, BIG, "baseline"] == pytest.approx(-0.4)
    assert table[SMALL, BIG, "plus"] == pytest.approx(0.4)  # one rises from .5 to .9, the other stays at .9
    assert table[SMALL, BIG, "minus"] == pytest.approx(0.4)
    assert table[SMALL, BIG, "over_refusal"] == 0
    assert (table[SMALL, WEAK] == 0).all()
    alike = found[(found["first"] == SMALL) & (found["second"] == WEAK)]
    assert (alike["p"] == 1).all()


def test_one_model_has_no_family_and_a_missing_condition_is_an_error(of_models):
    assert hierarchy_order.compared(of_models({SMALL: sign_record(shares())})).empty
    broken = sign_record(shares())
    broken = broken[broken["condition"] != "extracted +1"]
    with pytest.raises(CompendiumError, match=r"lacks the condition 'extracted \+1'"):
        hierarchy_order.compared(of_models({SMALL: sign_record(shares()), BIG: broken}))


# ---- the order


def measured(model, minus, base=0.0, refusal=0.9, rng=None):
    """A model that complies in these shares in each unit: with the direction subtracted, and unsteered."""
    rng = rng or np.random.default_rng(sum(map(ord, model)))
    ids = tuple(f"harmful_evaluation-{i:03d}" for i in range(N))
    clusters, arms = np.array(ids, dtype=object), []
    for unit in rule()["units"]:
        level = minus[unit] if isinstance(minus, dict) else minus
        draws = [rng.permutation(np.arange(N) < share * N) for share in (level, 0.0, base)]
        spec = tuple({**OURS, "unit": unit}[factor] for factor in FACTORS)
        arms.append(Arm(spec, 3, *draws, ids, clusters, 0.0))
    return Measured(model, arms, refusal, N)


def ordered(*models):
    found = {one.model: one for one in models}
    table = hierarchy_order.ordering(found)
    return table, hierarchy_order.verdict(table), hierarchy_order.order(found)


def test_a_planted_order_is_supported():
    table, said, order = ordered(measured(SMALL, 1.0), measured(BIG, 0.0), measured(WEAK, 0.5))
    assert len(table) == 3 * 3 * 2 and said == "supported" and order == [BIG, WEAK, SMALL]
    assert (table.set_index(["first", "second"]).loc[(SMALL, BIG), "value"] > 0).all()


def test_opposite_orders_in_two_units_contradict_an_order():
    high, low = (
        dict(zip(rule()["units"], (0.9, 0.5, 0.1), strict=True)),
        dict(zip(rule()["units"], (0.1, 0.5, 0.9), strict=True)),
    )
    _, said, _ = ordered(measured(SMALL, high), measured(BIG, low))
    assert said == "contradicted"


def test_a_level_that_is_a_models_own_baseline_is_no_order():
    """The study's measure: one model complies without steering as much as another under it."""
    _, said, _ = ordered(measured(SMALL, 0.9, base=0.9, refusal=0.25), measured(BIG, 0.5, base=0.0))
    assert said == "contradicted"  # more by the level, less by the rise
    _, said, _ = ordered(measured(SMALL, 0.5), measured(BIG, 0.5))
    assert said == "inconclusive"


def test_one_model_or_one_that_hardly_refuses_cannot_be_ordered():
    table, said, order = ordered(measured(SMALL, 0.9))
    assert table.empty and said == "not testable here" and order == [SMALL]
    weak = measured(WEAK, 1.0, base=0.97, refusal=rule()["least_refusal"] - 0.01)
    table, said, order = ordered(measured(SMALL, 0.9), weak)
    assert table.empty and said == "not testable here" and order == [SMALL]
    assert hierarchy_order.across({one.model: one for one in (measured(SMALL, 0.9), weak)}).empty


def test_equal_models_are_hardly_ever_ordered_over_200_seeds():
    rng, found = np.random.default_rng(7), []
    for _ in range(200):
        table = hierarchy_order.ordering({model: measured(model, 0.5, rng=rng) for model in (SMALL, BIG)})
        found.append((hierarchy_order.verdict(table), bool((table["p_holm"] < 0.05).any())))
    assert {said for said, _ in found} <= {"inconclusive", "supported", "contradicted"}
    assert np.mean([said != "inconclusive" for said, _ in found]) <= 0.01
    assert np.mean([sure for _, sure in found]) <= 0.09  # the family-wise rate


def test_the_order_over_all_choices_counts_specifications():
    found = {model: measured(model, share) for model, share in ((SMALL, 0.95), (BIG, 0.1))}
    (row,) = hierarchy_order.across(found).to_dict("records")
    assert row["count"] == 3 and row["level_first"] == row["level_first_sure"] == row["change_first"] == 3
    assert row["level_second"] == 0


# ---- side by side


def test_this_models_records_are_its_own_and_those_of_others_the_committed_ones(tmp_path):
    committed, own = tmp_path / "data", tmp_path / "build"
    for folder in (committed / SMALL, committed / BIG, own / SMALL, own / WEAK):
        folder.mkdir(parents=True)
        (folder / "03_sign_inversion.parquet").touch()
    (committed / WEAK).mkdir()
    found = hierarchy.sources(own, SMALL, committed)
    assert found == {SMALL: own / SMALL, BIG: committed / BIG}
    assert list(hierarchy.sources(own, BIG, committed)) == [SMALL]  # it has none of its own there
    assert hierarchy.missing(found)[BIG] == ["01", "02", "04", "05", "06", "07", "08"]


def test_a_model_without_records_says_so():
    table = pd.DataFrame(
        [{"model": SMALL, "notebook": "03_sign_inversion", "quantity": "baseline", "unit": "share", "value": 0.62,
          "low": 0.522, "high": 0.709, "said": ""},
         {"model": SMALL, "notebook": "03_sign_inversion", "quantity": "sign", "unit": "verdict", "value": np.nan,
          "low": np.nan, "high": np.nan, "said": "replicated"}]
    )  # fmt: skip
    shown = hierarchy_words.shown(table, [SMALL, BIG])
    assert shown.shape == (2, 3)
    assert shown.iloc[0].tolist()[1:] == ["62.0 [52.2, 70.9]", "not measured"]
    assert shown.iloc[1].tolist()[1:] == ["replicated", "not measured"]
    assert tex.tabular(shown)


@needs_records
def test_quantities_are_what_the_notebooks_say():
    folder = COMMITTED / SMALL
    sign = records.read(folder / "03_sign_inversion.parquet")[0]
    controls = records.read(folder / "02_orthogonal_controls.metrics.parquet")[0]
    found = {(one.quantity, one.unit): one for nb in ("02_orthogonal_controls", "03_sign_inversion", "01_extraction")
             for one in hierarchy.quantities(folder, nb)}  # fmt: skip
    tests, shown = analyses.comparisons(sign), analyses.rates(sign)
    rate = shown.set_index(["prompt_set", "condition", "label"])["rate"]
    assert found["baseline", "share"].value == rate["harmful_evaluation", "baseline", "refusal"]
    for name, planned in {"plus": "plus", "minus": "minus", "over_refusal": "harmless_plus"}.items():
        one = found[name, "points"]
        assert (one.value, one.interval.low, one.interval.high) == tuple(
            tests.loc[planned, ["difference", "low", "high"]]
        )
    assert found["sign", "verdict"].said == analyses.sign_verdict(tests, shown)
    assert found["special", "verdict"].said == specificity.verdict(specificity.table(controls))
    assert found["z", "sd"].value == specificity.table(controls).loc["random", "z"]
    relative, absolute = (found["dose", f"alpha_{unit}"] for unit in ("relative", "absolute"))
    steered = sign[sign["condition"] == "extracted +1"].iloc[0]
    assert absolute.value == pytest.approx(steered["alpha_absolute"], rel=1e-4)
    assert relative.value == pytest.approx(steered["alpha_relative"], rel=1e-4)


@needs_records
def test_a_changed_label_changes_the_quantity(tmp_path):
    for path in (COMMITTED / SMALL).glob("03_sign_inversion*.parquet"):
        frame, about = records.read(path)
        if "label" in frame:
            rows = (frame["condition"] == "extracted +1") & (frame["prompt_set"] == "harmful_evaluation")
            frame.loc[rows, ["label", "text"]] = ["compliance", ""]
        records.write(frame, tmp_path / SMALL / path.name, about)
    before, after = (
        {(one.quantity, one.unit): one for one in hierarchy.quantities(folder, "03_sign_inversion")}
        for folder in (COMMITTED / SMALL, tmp_path / SMALL)
    )
    assert after["refusal_plus", "share"].value == 0 < before["refusal_plus", "share"].value
    assert after["sign", "verdict"].said == "contradicted" != before["sign", "verdict"].said
    assert after["baseline", "share"] == before["baseline", "share"]


@needs_records
def test_half_way_doses_are_the_same_dose_in_each_unit():
    found = {(one.quantity, one.unit): one for one in hierarchy.quantities(COMMITTED / SMALL, "04_llama_threshold")}
    frame = records.read(COMMITTED / SMALL / "04_llama_threshold.parquet")[0]
    far = frame[frame["direction_id"] == "extracted"].iloc[0]
    for unit in hierarchy.UNITS:
        one, own = found["alpha50", unit], found["alpha50", "alpha"]
        assert one.value == pytest.approx(own.value * far[unit] / far["alpha"], nan_ok=True)
        assert not one.value > 0  # the direction is subtracted


def test_a_record_that_cannot_be_read_by_a_notebooks_code_is_reported(tmp_path, monkeypatch):
    for tail in ("", ".metrics"):
        (tmp_path / f"06_layer_sweep{tail}.parquet").touch()

    def fail(*_):
        raise CompendiumError("the record lacks a completion.")

    monkeypatch.setattr(hierarchy, "_quantities", fail)
    (one,) = hierarchy.quantities(tmp_path, "06_layer_sweep")
    assert one.quantity == "fault" and "lacks a completion" in one.said
    assert hierarchy.quantities(tmp_path, "05_polyhedral_cones") == ()


# ---- words and figure


@pytest.mark.parametrize("count", [1, 2, 3])
def test_words_and_figure_for_one_two_and_three_models(of_models, tmp_path, count):
    models = [SMALL, BIG, WEAK][:count]
    frames = {model: sign_record(shares(base=base)) for model, base in zip(models, (0.5, 0.9, 0.1), strict=False)}
    folders = of_models(frames)
    strengths = zip(models, (0.95, 0.2, 0.97), (0.9, 0.9, 0.03), strict=False)
    found = {model: measured(model, level, refusal=refusal) for model, level, refusal in strengths}
    said = hierarchy_words._models(folders, found)
    assert all(tex.escape(text) for text in said.values())
    for part in hierarchy_words.PROSE:
        assert "{" not in hierarchy_words.prose(said, part)
    expected = {1: "not testable here", 2: "supported", 3: "supported"}[count]
    assert said["HierarchyVerdict"] == expected and said["HierarchyFamily"] == str({1: 0, 2: 4, 3: 12}[count])
    assert (people(WEAK) in said["HierarchyUnordered"]) == (count == 3)
    figures.use_style()
    row = {
        "notebook": "03_sign_inversion",
        "quantity": "baseline",
        "unit": "share",
        "low": 0.4,
        "high": 0.6,
        "said": "",
    }
    table = pd.DataFrame([row | {"model": model, "value": 0.5} for model in models])
    figure = figures_hierarchy.models(table, hierarchy_order.levels(found), models)
    assert len(figure.axes) == 6
    words = [text.get_text() for text in figure.axes[5].texts]
    assert words == ["not measured"] * count
    assert len(figure.axes[2].lines) >= 3 * count
    plt.close("all")


def test_the_verdict_is_not_typed():
    """Every verdict that the words can print is one of the plan's."""
    assert set(rule()["verdict"]) == {"supported", "contradicted", "not testable here", "inconclusive"}
    for said in ("supported", "contradicted", "inconclusive"):
        table = pd.DataFrame({"p_holm": [1.0]})
        assert hierarchy_words._conclusion(said, [SMALL, BIG], table)
    assert plan()["level"] == 0.05
