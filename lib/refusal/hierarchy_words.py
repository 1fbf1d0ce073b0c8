"""What notebook 08 says: models side by side, whether an order is supported, and what the choices of measurement do."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from refusal import hierarchy, hierarchy_order, specification_words
from refusal.analyses import plan
from refusal.hierarchy import RECORDS
from refusal.hierarchy_order import Measured
from refusal.specification_runs import rule
from refusal.statistics import Interval
from refusal.wording import detectable, p_value, people, percent, points, span

HEADLINES = {
    "HierarchyVerdict": "verdict on a hierarchy of robustness between models",
    **specification_words.HEADLINES,
}
NOT_MEASURED, NO_NUMBER = "not measured", "–"
UNITS = {"alpha": "mean differences", "alpha_relative": "residual norms", "alpha_absolute": "activation units"}
DOSES = [(unit, f"{rule()['doses'][unit]:g}", words) for unit, words in UNITS.items()]
# The rows of the table: what they are called. Quantities in units of alpha have a row a unit.
ROWS = {
    ("depth", "share"): "selected layer, % of the depth",
    ("dose", "alpha_relative"): "one mean difference, residual norms",
    ("dose", "alpha_absolute"): "one mean difference, activation units",
    ("baseline", "share"): "refusal of harmful requests, %",
    ("plus", "points"): "its change at α = +1, points",
    ("minus", "points"): "its change at α = −1, points",
    ("degenerate_minus", "share"): "degenerate at α = −1, %",
    ("harmless", "share"): "refusal of harmless requests, %",
    ("over_refusal", "points"): "its change at α = +1, points",
    ("sign", "verdict"): "sign inversion",
    **{("level", unit): f"compliance at −{dose} {words}, %" for unit, dose, words in DOSES},
    **{("rise", unit): f"its rise at −{dose} {words}, points" for unit, dose, words in DOSES},
    **{("fall", unit): f"its change at +{dose} {words}, points" for unit, dose, words in DOSES},
    ("swing", "log-odds"): "swing of the first token, log-odds",
    ("z", "sd"): "its z among random directions",
    ("special", "verdict"): "is the direction special",
    **{("alpha50", unit): f"compliance half way, {words}" for unit, words in UNITS.items()},
    ("width", "alpha50"): "10–90 % width, relative to that",
    ("collapse", "verdict"): "collapse at a threshold",
    **{("window_low", unit): f"window from, {words}" for unit, words in UNITS.items()},
    **{("window_high", unit): f"window to, {words}" for unit, words in UNITS.items()},
    ("useful", "alpha"): "its useful part, mean differences",
    ("window_one", "verdict"): "no useful window, one layer",
    ("window_many", "verdict"): "no useful window, many layers",
    ("cones", "share"): "contrast of categories, % of own effect",
    ("separate", "verdict"): "a direction for each kind of harm",
    ("screen", "rho"): "correlation of screen and completions",
}
SCALES = {"share": (100, 1), "points": (100, 1)}  # of a unit: factor and decimals; all others as they are, with two
SHARES = ("level", "rise", "fall")  # their unit is that of the dose
SIGNED = ("plus", "minus", "over_refusal", "rise", "fall", "z", "swing")
NAMES = {"baseline": "unsteered refusal", "plus": "the change at α = +1", "minus": "the change at α = −1",
         "over_refusal": "the change on harmless requests at α = +1"}  # fmt: skip
PROSE = {
    "models": """
Records: {HierarchyModels}. {HierarchyMissing}

At one mean difference, on the same prompts, each model is compared with each other one. {HierarchyDifferences}
""",
    "order": """
**A hierarchy of robustness is, by the plan's rule: {HierarchyVerdict}.** {HierarchyConclusion} {HierarchyUnordered}
{HierarchyPower}

The rule: {HierarchyRule}; inconclusive otherwise.

Over all choices (exploratory, p not corrected): {HierarchyAcross}
""",
}


def _cell(row: "pd.Series[Any]") -> str:
    """A quantity of a model, as a string."""
    if row["unit"] == "verdict" or math.isnan(row["value"]):
        return row["said"] or NO_NUMBER
    scale, digits = (100, 1) if row["quantity"] in SHARES else SCALES.get(row["unit"], (1, 2))
    if row["quantity"] == "cones":
        digits = 0
    sign = "+" if row["quantity"] in SIGNED else ""
    value = f"{scale * row['value']:{sign}z.{digits}f}"
    if not math.isnan(row["low"]):
        value += " " + span(Interval(row["low"], row["high"]), scale, digits)
    return f"{value} {row['said']}".strip()


def shown(table: pd.DataFrame, models: Sequence[str]) -> pd.DataFrame:
    """The table of models as strings: a row a quantity, a column a model.

    Args:
        table: From `hierarchy.side_by_side`.
        models: The columns.
    """
    cells = {(row["model"], row["quantity"], row["unit"]): _cell(row) for _, row in table.iterrows()}
    known = {(quantity, unit) for _, quantity, unit in cells}
    rows = [
        [words, *(cells.get((model, *key), NOT_MEASURED) for model in models)]
        for key, words in ROWS.items() if key in known
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["", *(people(model) for model in models)])


def numbers(
    frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any], root: Path = RECORDS
) -> dict[str, str]:
    """Formatted numbers of notebook 08, by macro name.

    Args:
        frame: This model's completions.
        metrics: Its metrics.
        about: Its metadata, for the seed.
        root: The folder with this model's records of notebooks 01 to 07; those of other models are the committed ones.
    """
    model = str(frame["model"].iloc[0])
    folders = hierarchy.sources(root, model)
    own = hierarchy_order.measured(model, frame, metrics)
    found = hierarchy_order.others(folders, own)
    curve = specification_words.numbers(frame, metrics, own.arms, int(about["parameters"]["seed"]))
    return curve | _models(folders, found)


# ---- between models


def _models(folders: Mapping[str, Path], found: Mapping[str, Measured]) -> dict[str, str]:
    family, ordering = hierarchy_order.compared(folders), hierarchy_order.ordering(found)
    order, verdict = hierarchy_order.order(found), hierarchy_order.verdict(ordering)
    weak = [one for one in found.values() if not one.refuses]
    return {
        "HierarchyModels": ", ".join(people(model) for model in folders),
        "HierarchyMissing": _missing(hierarchy.missing(folders)) + _faults(hierarchy.side_by_side(folders)),
        "HierarchyFamily": str(len(family)),
        "HierarchyDifferences": _differences(family),
        "HierarchyVerdict": verdict,
        "HierarchyRule": specification_words.rule_in_words("verdict"),
        "HierarchyConclusion": _conclusion(verdict, order, ordering),
        "HierarchyOrderTests": str(len(ordering)),
        "HierarchyUnordered": _unordered(weak),
        "HierarchyPower": _power(found),
        "HierarchyAcross": _across(hierarchy_order.across(found)),
    }


def _missing(lacking: Mapping[str, Sequence[str]]) -> str:
    parts = [f"{people(model)} lacks {', '.join(numbers)}" for model, numbers in lacking.items()]
    return f"Not measured yet: {'; '.join(parts)}." if parts else "None of them lacks a notebook."


def _faults(table: pd.DataFrame) -> str:
    """What could not be made of a record, where there is such."""
    some = table[table["quantity"] == "fault"]
    return "".join(f" No estimate for {people(row['model'])}: {row['said']}" for _, row in some.iterrows())


def pairs(family: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of pairs of models as strings.

    Args:
        family: From `hierarchy_order.compared`.
    """
    rows = [
        [NAMES[row["name"]], f"{people(row['first'])} minus {people(row['second'])}",
         f"{points(row['value'])} {span(Interval(row['low'], row['high']))}", p_value(row["p"]), p_value(row["p_holm"])]
        for _, row in family.iterrows()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["of refusal", "models", "difference, points", "p", "Holm p"])


def _differences(family: pd.DataFrame) -> str:
    if family.empty:
        return "There is one model only, so that nothing can be compared."
    sure = int((family["p_holm"] < plan()["level"]).sum())
    return f"{sure} of these {len(family)} comparisons show a difference after Holm's correction."


def _conclusion(verdict: str, order: Sequence[str], table: pd.DataFrame) -> str:
    if verdict == "not testable here":
        return "Fewer than two models that refuse enough have records, and one model has no order."
    named = " < ".join(people(model) for model in order)
    sure = int((table["p_holm"] < plan()["level"]).sum())
    tests = (
        f"{sure} of {len(table)} comparisons (pairs, units and measures) are below the level after Holm's correction"
    )
    return {
        "supported": f"From the least to the most compliance under subtraction: {named}, in every unit; {tests}.",
        "contradicted": f"Which model is more robust depends on the unit or on the measure; {tests}.",
        "inconclusive": f"By the mean over units the order is {named} (least to most compliance under subtraction), "
        f"but it is not established: {tests}.",
    }[verdict]


def _unordered(weak: Sequence[Measured]) -> str:
    if not weak:
        return "All models that were measured refuse enough to be ordered."
    said = ", ".join(f"{people(one.model)} ({percent(one.refusal)} % of {one.n} requests)" for one in weak)
    return f"Not ordered, since they hardly refuse and so have no safety to lose: {said}."


def _power(found: Mapping[str, Measured]) -> str:
    table = hierarchy_order.levels({model: one for model, one in found.items() if one.refuses})
    if table.empty:
        return "No model refuses enough for a difference to be looked for."
    low = table[table["sign"] < 0]
    return detectable(
        int(low["n"].min()),
        float(low["rate"].mean()),
        "With {n} prompts, a difference in compliance between two models of {points} points or more would be found "
        "with a probability of 80 % (one comparison, uncorrected, and if their answers to a prompt were independent).",
        "With {n} prompts, no difference between two models would be found with a probability of 80 %.",
    )


def _across(table: pd.DataFrame) -> str:
    if table.empty:
        return "there is no pair of models to compare."
    said = []
    for _, row in table.iterrows():
        counts = []
        for measure, words in {"level": "by its level", "change": "by its rise"}.items():
            sides = [f"{measure}_{side}" for side in ("first", "second")]
            more, less = (f"{row[side]} ({row[f'{side}_sure']})" for side in sides)
            counts.append(f"{words}, more in {more} and less in {less}")
        said.append(
            f"{people(row['first'])} complies under subtraction, compared with {people(row['second'])}, "
            f"{'; '.join(counts)} of {row['count']} specifications (in parentheses, with p below the level)"
        )
    return ". ".join(said) + "."


def prose(said: Mapping[str, str], part: str) -> str:
    """What the notebook says in words, from `numbers`; the parts are those of PROSE."""
    return PROSE[part].format(**said)
