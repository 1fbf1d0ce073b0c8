"""What notebook 05 says in words: texts for the numbers of `cone_words`, and sentences that follow from numbers."""

import math
from collections.abc import Mapping

import pandas as pd

from refusal import cone_study
from refusal.analyses import plan
from refusal.cone_effects import Contrast
from refusal.statistics import Interval
from refusal.wording import p_equals, p_value, span

PROSE = {
    "study": """
The six cosines alone give {ConesStudyRank} for the entropy rank, {ConesStudyCosine} for the mean,
{ConesStudySpecificities} for the specificities and {ConesStudyAngle} sr for the toolkit's solid angle: all published
figures of finding 1 are functions of one matrix, and **one** piece of evidence. Four directions with *equal* cosines
have the pilot's highest rank, {ConesStudyHighest} (layer {ConesStudyHighestLayer}), at a cosine of
{ConesStudyHighestEqual}, and its lowest, {ConesStudyLowest} (layer {ConesStudyLowestLayer}), at
{ConesStudyLowestEqual}; what its toolkit calls linear needs {ConesStudyLinearNeeds}. Isotropic random directions in
{ConesStudyWidth} dimensions have a rank of {ConesStudyRandomRank} and a mean |cosine| of {ConesStudyRandomCosine}. So
the rank says how many categories were put in, and little else.

**Which published conclusions the six cosines support.**

- *The estimated vectors are far from parallel*: supported.
- *The model has about four directions*: not supported. Estimates of one direction from {ConesStudyPrompts} prompts may
  look like that, or of four, or of none; the next sections measure which.
- *It has separate circuits, and removing one direction leaves the others*: not supported, since nothing was changed in
  the model.
- *The geometry goes from polyhedral to linear with depth*: not supported by two extremes of a curve that has no null,
  and the lowest rank is as far from linear as the table above shows.
""",
    "geometry": """
At layer {ConesLayer}, from {ConesPerCategory} prompts a category, the entropy rank of the category directions is
**{ConesRank}** and their mean |cosine| {ConesCosine}. Noise biases both, and the nulls likewise: so each stands beside
nulls of as many prompts. Corrected for noise, the mean cosine is **{ConesUnbiased}** (over {ConesSplits} random halves:
{ConesHalves}; plain cosines divided by the root of the reliabilities, which are {ConesReliability}: {ConesCorrected}),
which leaves a participation ratio of {ConesUnbiasedNumber} of {ConesKinds}. {ConesGeometrySaid} The lowest and the
highest unbiased cosine of two categories are {ConesPairLow} and {ConesPairHigh}.
""",
    "counts": """
With {ConesSmall} prompts a category the entropy rank is {ConesSmallObserved} (median and central 95 % of random
subsets), and {ConesSmallOwn} with the pilot's own baselines. Where **one** direction is planted in harmless noise
it is {ConesSmallPlanted}, and with permuted categories {ConesSmallPermuted}. The pilot's toolkit calls
{ConesSmallCalled} % of the draws with one planted direction polyhedral at {ConesSmall} prompts a category, and
{ConesCalled} % at {ConesPerCategory}. {ConesPilotSaid}
""",
    "layers": """
The entropy rank is highest at layer {ConesHighestLayer} ({ConesHighest}) and lowest at layer {ConesLowestLayer}
({ConesLowest}). Spearman's correlation with the layer is {ConesTrend} over {ConesLayers} layers; p = {ConesTrendP}
among permuted categories. {ConesTrendSaid}
""",
    "topics": """
Is it "refuse weapons" or "about weapons"? The directions from harmless questions about the topics have a mean unbiased
cosine of {ConesAboutCosine} among each other, and of {ConesTopicCosine} with the direction of their own category. With
the questions about its topic as each category's baseline, which takes the topic out, the categories' directions have a
mean unbiased cosine of {ConesMatchedCosine}; with one baseline for all it is {ConesUnbiased}.
""",
    "causes": """
On {ConesPrompts} evaluation prompts ({ConesPromptsEach} a category, each its own cluster), a category's own direction
has a mean effect of {ConesOwn} log-odds on its prompts, the direction of another category {ConesOther}. The contrast is
**{ConesContrast}** {ConesContrastInterval}, {ConesContrastShare} % of the former; p = {ConesContrastP} by
{ConesPermutations} permutations of the categories, Holm {ConesHolm}. The cells go from {ConesCellLow} to
{ConesCellHigh}; {ConesBeyond} lie beyond all {ConesRandoms} random directions, whose mean effects reach
{ConesRandomLargest} in size. {ConesConclusion}

**Verdict by the plan's rule: {ConesVerdict}.** The rule: {ConesRule}.
""",
    "secondary": """
**Beside it (with intervals, decides nothing).** By completions, refusal at alpha = +1 minus refusal at -1 is
{ConesAddedOwn} points for a category's own direction, {ConesAdded} points {ConesAddedInterval} more than for the
others; ablation takes away {ConesAblatedOwn} points, {ConesAblated} {ConesAblatedInterval} more than that of the
others. Random directions: {ConesRandomAdded} points when added, {ConesRandomAblated} when ablated. Without steering,
{ConesBaseline} % are refused. By the screen, a category's direction without its part along its topic keeps an effect of
{ConesRestOwn}, with a contrast of {ConesRest} {ConesRestInterval}; the topic directions have {ConesTopicOwn}, with
{ConesTopic} {ConesTopicInterval}.
""",
    "cone": """
Of {ConesCombinations} non-negative combinations, {ConesCombinationsBeyond} have a mean swing beyond all random
directions; the least is {ConesCombinationLeast}, the limit {ConesRandomLargest}. So a cone in the stronger sense
**{ConesCone}**, for these combinations and by the first token. The first {ConesGenerated} of them, on
{ConesGeneratedPrompts} prompts, move refusal by {ConesGeneratedLeast} to {ConesGeneratedMost} points between alpha = -1
and +1.
""",
}


def prose(said: Mapping[str, str], part: str) -> str:
    """What the notebook says in words, from `cone_words.numbers`; the parts are those of `PROSE`."""
    return PROSE[part].format(**said)


def number(value: float, form: str = ".2f") -> str:
    """A number, or "undefined" where there is none."""
    return "undefined" if math.isnan(value) else f"{value:{form}}"


def interval_of(interval: Interval, scale: float = 1, digits: int = 2) -> str:
    """An interval, or that there is none."""
    return "(no interval)" if math.isnan(interval.low) else span(interval, scale, digits)


def with_interval(row: "pd.Series[float]") -> str:
    """A value with its interval, of a row with `value, low, high`."""
    interval = "" if math.isnan(row["value"]) else f" {interval_of(Interval(row['low'], row['high']))}"
    return f"{number(row['value'])}{interval}"


def median(band: "pd.Series[float]") -> str:
    """The median of draws with their central 95 %, of a row with `median, low, high`."""
    return f"{number(band['median'])} {interval_of(Interval(band['low'], band['high']))}"


def geometry_said(row: "pd.Series[float]", test: "pd.Series[float]") -> str:
    """Whether the categories' directions differ at all, which is less than that they work apart.

    Args:
        row: The unbiased mean cosine in `cone_tables.table`.
        test: The same in `cone_effects.tests`.
    """
    start = f"Among permuted categories, where it is {number(row['permuted'])} (median), {p_equals(test['p'])}"
    found = (
        "the categories do differ in direction"
        if test["p_holm"] < plan()["level"]
        else "no difference between the categories' directions could be detected"
    )
    return f"{start}, Holm {p_value(test['p_holm'])}: {found}."


def trend_said(null: float, p: float) -> str:
    """Whether the change with depth is more than depth does to permuted categories, whose correlation is `null`."""
    if p < plan()["level"]:
        return f"Permuted categories have {number(null, '+.2f')} (median), which does not account for it."
    return (
        f"Permuted categories, which cannot differ, have {number(null, '+.2f')} (median): depth alone may give as much."
    )


def pilot_said(found: pd.DataFrame) -> str:
    """What the pilot's numbers of prompts give in this model, and whether the published figures lie among that."""
    if found.empty:
        return "The pilot's numbers of prompts were not taken here."
    bands, stated, said = found.set_index(["family", "statistic"]), cone_study.published(), []
    for name, noun, value in (
        ("entropy_rank", "an entropy rank", stated["rank_highest"]),
        ("mean_abs_cosine", "a mean |cosine|", stated["mean_cosine"]),
    ):
        planted, own = bands.loc[("planted", name)], bands.loc[("own", name)]
        place = "inside" if planted["low"] <= value <= planted["high"] else "outside of"
        said.append(
            f"one planted direction has {noun} of {median(planted)}, the categories with the pilot's baselines one of "
            f"{median(own)}, and the published {value:g} lies {place} the former"
        )
    return (
        f"With the pilot's numbers of prompts in this model, at layer {found['layer'].iloc[0]} (median and central "
        f"95 % of draws): {'; '.join(said)}."
    )


def conclusion(verdict: str, found: Contrast, limit: float) -> str:
    """The verdict in a sentence, with the numbers that it follows from.

    Args:
        verdict: From `cone_effects.verdict`.
        found: The contrast.
        limit: The largest size of a random direction's mean swing.
    """
    if not found.own > limit:
        return "The category directions do not move refusal further than random ones do, so there is nothing to divide."
    share, most = (f"{100 * value / found.own:.0f} %" for value in (found.value, found.interval.high))
    lead = "more" if found.value > 0 else "less"
    return {
        "separate": "Each kind of harm has a direction that works for it more than the others do: by "
        f"{share} of its effect.",
        "shared": "The directions of all kinds of harm work alike on every kind: "
        + (
            f"what is special to one is at most {most} of its effect."
            if found.interval.high > 0
            else "none does more for its own kind than the others do."
        ),
        "partly shared": f"The directions share a part of their effect, and each does {lead} for its own kind of harm, "
        f"by {share} of its effect there.",
        "inconclusive": "The measurement settles neither that the directions work apart nor that they work alike.",
    }[verdict]
