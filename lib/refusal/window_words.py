"""What notebook 07 says: the window, its costs, the pilot's doses and the format demands, in numbers and words."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from refusal import statistics, window_costs, window_formats, window_pilot, windows
from refusal.analyses import in_words, plan
from refusal.statistics import Interval
from refusal.window_answers import UNITS, Answers, answers, signed
from refusal.window_runs import FIRST, LAST, rule, third
from refusal.windows import STOPS, Found
from refusal.wording import p_value, percent, points, rated, span

HEADLINES = {
    "WindowVerdict": "verdict on 'no useful window' (many layers)",
    "WindowShare": "resamples with a useful part (many layers), %",
    "WindowEdges": "window (many layers), alpha",
    "WindowOneVerdict": "verdict on 'no useful window' (one layer)",
    "WindowOneEdges": "window (one layer), alpha",
}
MACROS = {"one": "WindowOne", "many": "Window"}  # the claim is about many layers
LIMITS = ("useful_rise", "over_refusal_limit", "degeneration_limit")
DIGITS = {"alpha": 2, "alpha_absolute": 1, "alpha_relative": 2}
PROSE = {
    "window": """
- **Many layers** ({WindowLayers} at once): {WindowEdgesWhy}; wide {WindowWidth}. Useful part: {WindowUseful}.
  Within the window, {WindowRise}. A useful part is there in {WindowShare} % of {WindowDraws} resamples.
  **By the plan's rule, the claim that no useful window exists is {WindowVerdict}.** {WindowMeaning}
- **One layer** ({WindowLayer}): {WindowOneEdgesWhy}; wide {WindowOneWidth}. Useful part: {WindowOneUseful}.
  Within the window, {WindowOneRise}. A useful part is there in {WindowOneShare} % of the resamples.
  By the same rule: **{WindowOneVerdict}**. {WindowOneMeaning}
- **Unsteered**, {WindowBase} % {WindowBaseInterval} of {WindowHarmful} harmful requests ({WindowClusters} clusters)
  are refused, {WindowBaseHarmless} % {WindowBaseHarmlessInterval} of {WindowHarmless} harmless ones
  ({WindowHarmlessClusters} clusters), and {WindowBaseBroken} % of all completions are degenerate. {WindowCeiling}

The rule: {WindowRule}; inconclusive otherwise.
""",
    "disturbance": """
Where the window ends, below and above, the first token's distribution has moved by a KL of {WindowOneKlLow} and
{WindowOneKlHigh} nats at one layer, and by {WindowKlLow} and {WindowKlHigh} at many. What is said there costs the
unsteered model {WindowOneNllLow} and {WindowOneNllHigh} nats a token (one layer), {WindowNllLow} and {WindowNllHigh}
(many); unsteered text costs it {WindowNllBase}.
""",
    "study": """
The pilot ({WindowPilotModel}, layers {WindowPilotLayers} at once) reports, at α = {WindowPilotDoses}:
{WindowPilotCoherent} % of {WindowPilotTexts} texts coherent and {WindowPilotRefused} % of {WindowPilotPrompts} harmful
requests refused. Unsteered, that is {WindowPilotBase} % {WindowPilotBaseInterval}; none at all is
{WindowPilotNoneInterval}. No rise below {WindowPilotDetectable} points would have been found with a probability of
80 %, and a model that hardly refuses cannot lose its refusals: the table says when text breaks, and next to nothing of
refusal.

On our model's curve for many layers, the same doses give, **if its alpha multiplies the raw difference**,
{WindowPilotDifferenceCoherent} % coherent and {WindowPilotDifferenceRefused} % refused; **if it multiplies a unit
vector** (its largest dose is then {WindowPilotLargest} of our alpha), {WindowPilotUnitCoherent} % and
{WindowPilotUnitRefused} %.
""",
    "defence": """
{WindowDefenceLow} {WindowDefenceHigh} {WindowDefencePrice}
""",
    "formats": """
- **Refusal** of the same {WindowFormatsPrompts} harmful requests is {WindowFormatsBase} % without a demand. With *JSON*
  it is {WindowFormatsJson}; with a *table*, {WindowFormatsTable}; with a *template*, {WindowFormatsTemplate}.
  {WindowFormatsConclusion} {WindowFormatsPower} Degenerate: {WindowFormatsBroken}.
- **Projection**: the mean size of its change is {WindowProjectionFirst} mean differences over layers {WindowThirdFirst}
  and {WindowProjectionLast} over layers {WindowThirdLast}; the paired difference is {WindowProjectionDifference}
  {WindowProjectionInterval} (p = {WindowProjectionP}, flips of the sign of each prompt). {WindowProjectionConclusion}
  With its sign, the mean change over the late layers is {WindowProjectionSigned} {WindowProjectionSignedInterval}:
  above zero is towards harmful.
""",
}


def _edge(found: Found, side: int) -> str:
    """An edge with its interval, or the end of the grid that the window goes beyond."""
    value, interval = (found.low, found.intervals["low"]) if side == 0 else (found.high, found.intervals["high"])
    if found.stops[side] == STOPS[-1]:
        return f"beyond {signed(value, 0)}"
    return f"{signed(value)} {span(interval, 1, 2)}"


def edges(found: Found) -> str:
    """The window in units of alpha, e.g. "−0.53 [−0.60, −0.41] to beyond +3"."""
    return f"{_edge(found, 0)} to {_edge(found, 1)}"


def _why(found: Found) -> str:
    """The same with what ends it."""
    low, high = (f"{_edge(found, side)} ({found.stops[side]})" for side in (0, 1))
    return f"the window goes from {low} to {high}"


def _sizes(found: Found, key: str) -> str:
    """A width with its interval in the three units; what reaches the end of the grid may be wider."""
    ends = [end for part in found.parts for end in part] if key == "useful" else [found.low, found.high]
    beyond = [found.low] * (found.stops[0] == STOPS[-1]) + [found.high] * (found.stops[1] == STOPS[-1])
    return ("at least " if set(ends) & set(beyond) else "") + ", ".join(
        f"{size * getattr(found, key):.{DIGITS[unit]}f} {span(found.intervals[key], size, DIGITS[unit])} {UNITS[unit]}"
        for unit, size in found.answers.units.items()
    )


def _useful(found: Found) -> str:
    if not found.parts:
        return f"none (its width is {_sizes(found, 'useful')})"
    where = " and ".join(f"{signed(start)} to {signed(end)}" for start, end in found.parts)
    return f"α from {where}, wide {_sizes(found, 'useful')}"


def _rise(found: Found) -> str:
    if found.rise <= 0:
        return "refusal of harmful requests rises at no dose of the grid"
    return (
        f"refusal of harmful requests rises most at α = {signed(found.rise_at)}, by {points(found.rise)} points (p = "
        f"{p_value(found.rise_p)}, paired, times the number of doses in the window)"
    )


def _meaning(found: Found) -> str:
    """The sentence on a variant, which follows from the rule's verdict and from what ends the window."""
    planned = rule()
    least, cost, broken = (f"{100 * planned[key]:.0f}" for key in LIMITS)
    said = {
        "contradicted": f"There are doses that raise refusal of harmful requests by {least} points or more and that of "
        f"harmless ones by less than {cost}, with fewer than {broken} % of the completions degenerate.",
        "replicated": f"No dose raised refusal of harmful requests by {least} points before {_first_stop(found)}.",
        "inconclusive": "These prompts do not settle whether there is such a dose.",
    }[found.verdict]
    return f"{said} {_unresolved(found)}".strip()


def _unresolved(found: Found) -> str:
    """Says where an edge lies closer to zero than any dose; nothing where the window is empty."""
    alphas = found.answers.alphas
    below, above = float(alphas[alphas < 0].max()), float(alphas[alphas > 0].min())
    inside = [alpha for alpha, edge in ((below, found.low), (above, found.high)) if abs(edge) < abs(alpha)]
    if not inside or found.width == 0:
        return ""
    doses = " and ".join(signed(alpha) for alpha in inside)
    return f"An edge between zero and the nearest dose ({doses}) is read off a line: no smaller dose was tried."


def _first_stop(found: Found) -> str:
    stops = list(dict.fromkeys(found.stops))
    return " or ".join(stops) + (" ended the window" if stops != [STOPS[-1]] else "")


def _ceiling(found: Found) -> str:
    room = f"Refusal of harmful requests could rise by {percent(found.room)} points at most"
    if found.room < rule()["useful_rise"]:
        return f"{room}, so that no useful part was possible, whatever steering does: the verdict says nothing here."
    if found.answers.broken[:, found.answers.zero].mean() >= rule()["degeneration_limit"]:
        return (
            f"{room}; but unsteered text breaks the limit on degeneration already, so that there is no window, "
            "whatever steering does: the verdict says nothing here."
        )
    return f"{room}."


def _number(table: pd.DataFrame, variant: str, measure: str, alpha: float) -> str:
    """KL or NLL at any alpha, with its interval, on straight lines between the doses that have one."""
    rows = table[(table["variant"] == variant) & (table["measure"] == measure)].dropna(subset=["value"])
    rows = rows.sort_values("alpha")
    if rows.empty:
        return "(not measured)"
    value, low, high = (float(np.interp(alpha, rows["alpha"], rows[column])) for column in ("value", "low", "high"))
    return f"{value:.2f} {span(Interval(low, high), 1, 2)}"


def _layers(numbers: list[int]) -> str:
    return f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else ", ".join(map(str, numbers))


def _variant(macro: str, found: Found, table: pd.DataFrame) -> dict[str, str]:
    variant = found.answers.variant
    return {
        f"{macro}Edges": edges(found),
        f"{macro}EdgesWhy": _why(found),
        f"{macro}Width": _sizes(found, "width"),
        f"{macro}Useful": _useful(found),
        f"{macro}Rise": _rise(found),
        f"{macro}Share": percent(found.share),
        f"{macro}Verdict": found.verdict,
        f"{macro}Meaning": _meaning(found),
        f"{macro}KlLow": _number(table, variant, "kl", found.low),
        f"{macro}KlHigh": _number(table, variant, "kl", found.high),
        f"{macro}NllLow": _number(table, variant, "nll", found.low),
        f"{macro}NllHigh": _number(table, variant, "nll", found.high),
    }


def _setup(frame: pd.DataFrame, of: Mapping[str, Answers], metrics: pd.DataFrame) -> dict[str, str]:
    one, planned = of["one"], rule()
    n_layers = 1 + int(metrics.loc[metrics["metric"].str.startswith("projection "), "layer"].max())
    many = [int(layer) for layer in of["many"].layers.split()]
    return {
        "WindowAlphas": str(len(one.alphas)),
        "WindowAlphaEnd": f"{one.alphas.max():g}",
        "WindowCompletions": f"{len(frame):,}",
        "WindowKlPrompts": str(metrics.loc[metrics["metric"] == "kl", "prompt_id"].nunique()),
        "WindowLayer": one.layers,
        "WindowLayers": _layers(many),
        "WindowLayerCount": str(len(many)),
        "WindowUnitAbsolute": f"{one.units['alpha_absolute']:.1f}",
        "WindowUnitRelative": f"{one.units['alpha_relative']:.2f}",
        "WindowDraws": str(windows.DRAWS),
        "WindowLimitBroken": f"{100 * planned['degeneration_limit']:.0f}",
        "WindowLimitRefusal": f"{100 * planned['over_refusal_limit']:.0f}",
        "WindowUsefulRise": f"{100 * planned['useful_rise']:.0f}",
        "WindowHarmful": str(len(one.harmful)),
        "WindowHarmless": str(len(one.harmless)),
        "WindowClusters": str(len(set(one.clusters[0]))),
        "WindowHarmlessClusters": str(len(set(one.clusters[1]))),
        "WindowThirdFirst": _layers(third(n_layers, FIRST)),
        "WindowThirdLast": _layers(third(n_layers, LAST)),
    } | _unsteered(one)


def _unsteered(of: Answers) -> dict[str, str]:
    """The unsteered rates, by macro name."""
    confidence, how = plan()["confidence"], plan()["intervals"]["clusters"]
    sides = zip(("WindowBase", "WindowBaseHarmless"), (of.harmful, of.harmless), of.clusters, strict=True)
    named = {"WindowBaseBroken": percent(float(of.broken[:, of.zero].mean()))}
    for macro, values, clusters in sides:
        found = statistics.rate(values[:, of.zero], clusters, confidence, how=how)
        named |= rated(macro, found.estimate, found.interval.low, found.interval.high)
    return named


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, str]:
    """Formatted numbers of notebook 07, by macro name.

    Args:
        frame: The record's completions.
        metrics: Its metrics.
        about: Its metadata, for the seed.
    """
    seed = int(about["parameters"]["seed"])
    of = {variant: answers(frame, variant) for variant in MACROS}
    table = window_costs.disturbance(frame, metrics, list(MACROS), seed)
    named = _setup(frame, of, metrics)
    for variant, macro in MACROS.items():
        found = windows.find(of[variant], seed)
        named |= _variant(macro, found, table)
    return (
        named
        | {
            "WindowCeiling": _ceiling(found),
            "WindowRule": in_words(rule()["verdict"], "contradicted", "replicated"),
            "WindowNllBase": _number(table, "one", "nll", 0.0),
        }
        | window_costs.numbers(frame)
        | window_formats.numbers(frame, metrics, seed)
        | window_pilot.numbers(of["many"])
    )


def prose(said: Mapping[str, str], what: str) -> str:
    """What the notebook says in words, from `numbers`; the parts are those of PROSE."""
    return PROSE[what].format(**said)
