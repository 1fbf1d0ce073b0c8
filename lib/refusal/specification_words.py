"""What notebook 08 says of the specification curve: what the choices of measurement do to the effect of the sign."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from refusal import specification
from refusal.analyses import in_words, plan
from refusal.specification import FACTORS, Arm
from refusal.specification_runs import layers, rule
from refusal.statistics import Interval
from refusal.wording import p_equals, p_value, percent, points, span

HEADLINES = {
    "HierarchyCurveVerdict": "the effect of the sign over all choices of measurement",
    "HierarchyMedian": "median swing of all specifications, points",
    "HierarchyAbove": "specifications with a swing above zero, %",
    "HierarchyJointP": "joint p of all specifications",
}
PROSE = """
{HierarchySpecs} specifications ({HierarchyDifferent} of them different, since layer rules may agree: {HierarchyLayers})
on {HierarchyPrompts} prompts. The median swing is **{HierarchyMedian} points**, the range {HierarchyRange};
{HierarchyAbove} % lie above zero. The joint p is {HierarchyJointP} ({HierarchyExchanges} exchanges of the signs).
**By the plan's rule, the effect of the sign is, over all choices: {HierarchyCurveVerdict}.**

- Our choice: {HierarchyOurs}.
- The study's: {HierarchyStudy}.
- What matters, by the share of the variance between specifications: {HierarchyFactors}. {HierarchyBroken}

The rule: {HierarchyCurveRule}; inconclusive otherwise.
"""


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame, own: Sequence[Arm], seed: int) -> dict[str, str]:
    """Formatted numbers of the specification curve, by macro name.

    Args:
        frame: This model's completions of notebook 08.
        metrics: Its metrics.
        own: What `specification.arms` makes of them.
        seed: Of the exchanges of the signs.
    """
    curve, joint = specification.table(own), specification.joint(own, seed)
    sets = frame.groupby("prompt_set")
    marked = {who: curve[curve[who]] for who in ("ours", "study")}
    different = curve.drop(columns="layer").drop_duplicates([*(f for f in FACTORS if f != "layer"), "at"])
    return {
        "HierarchySpecs": str(len(curve)),
        "HierarchyDifferent": str(len(different)),
        "HierarchyLayers": ", ".join(f"{FACTORS['layer'][one]} {at}" for one, at in layers(metrics).items()),
        "HierarchyPrompts": " and ".join(
            f"{part['prompt_id'].nunique()} ({part['cluster'].nunique()} clusters)" for _, part in sets
        ),
        "HierarchyDoses": ", ".join(
            f"{dose:g} {FACTORS['unit'][unit].removesuffix('s' if dose == 1 else '')}"
            for unit, dose in _doses().items()
        ),
        "HierarchyStudyDose": f"{rule()['doses']['study']:g}",
        "HierarchyStudyDepth": percent(rule()["layers"]["depth"]).removesuffix(".0"),
        "HierarchyExchanges": str(specification.EXCHANGES),
        "HierarchyMedian": points(joint.median),
        "HierarchyRange": f"{points(curve['swing'].min())} to {points(curve['swing'].max())}",
        "HierarchyAbove": percent(joint.above),
        "HierarchyJointP": p_value(joint.p),
        "HierarchyCurveVerdict": specification.verdict(joint),
        "HierarchyCurveRule": rule_in_words("curve_verdict"),
        **{f"Hierarchy{who.capitalize()}": _one(rows) for who, rows in marked.items()},
        "HierarchyFactors": _factors(specification.factors(curve)),
        "HierarchyBroken": _broken(curve),
    }


def _doses() -> dict[str, float]:
    return {unit: dose for unit, dose in rule()["doses"].items() if unit in rule()["units"]}


def rule_in_words(which: str) -> str:
    """A rule of the plan's section, by its key there."""
    return in_words(rule()[which], *(one for one in rule()[which] if one != "inconclusive"))


def _one(rows: pd.DataFrame) -> str:
    """A marked specification, in words."""
    if rows.empty:
        return "not among those measured"
    row = rows.iloc[0]
    return (
        f"a swing of {points(row['swing'])} points {span(Interval(row['swing_low'], row['swing_high']))} (compliance "
        f"{percent(row['base'])} % unsteered, {percent(row['minus'])} % with the direction subtracted and "
        f"{percent(row['plus'])} % with it added; {p_equals(row['swing_p'])}, uncorrected; layer {row['at']}; n = "
        f"{row['n']} in {row['clusters']} clusters; up to {percent(row['broken'])} % degenerate by our labels)"
    )


def _factors(table: pd.DataFrame) -> str:
    parts = []
    for factor, rows in sorted(table.groupby("factor"), key=lambda item: -item[1]["share"].iloc[0]):
        said = ", ".join(
            f"{FACTORS[str(factor)][level]} {points(median)}"
            for level, median in zip(rows["level"], rows["median"], strict=True)
        )
        share = rows["share"].iloc[0]
        parts.append(f"{factor} {'–' if math.isnan(share) else f'{100 * share:.0f}'} % (medians: {said})")
    return "; ".join(parts)


def _broken(curve: pd.DataFrame) -> str:
    limit = plan()["03_sign_inversion"]["degeneration_limit"]
    some = curve[curve["broken"] > limit]
    units = ", ".join(FACTORS["unit"][unit] for unit in some["unit"].unique())
    if some.empty:
        return f"In none of them are more than {100 * limit:.0f} % of the completions degenerate."
    return (
        f"In {len(some)} specifications more than {100 * limit:.0f} % of the completions are degenerate, which our "
        f"labels do not call compliance and the other judges may (doses in: {units})."
    )


def prose(said: Mapping[str, str]) -> str:
    """What the notebook says of the curve in words, from `numbers`."""
    return PROSE.format(**said)
