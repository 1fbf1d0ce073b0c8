"""Tests of the pilot's claims about the window and formats, from notebook 07. The rules stand in data/claims.yaml."""

from refusal import window_answers, window_formats, window_runs, window_words, windows
from refusal.analyses import plan
from refusal.claim_evidence import (
    CONTRADICTED,
    INCONCLUSIVE,
    REPLICATED,
    Evidence,
    Finding,
    change_power,
    decide,
    finding,
)
from refusal.statistics import Interval
from refusal.wording import p_equals, people, percent, points, span

WINDOW = window_runs.NOTEBOOK


def _window(evidence: Evidence, variant: str) -> windows.Found:
    record = evidence.record(WINDOW)
    return evidence.once(
        f"window {variant}", lambda: windows.find(window_answers.answers(record.frame, variant), record.seed)
    )


def _useful(found: windows.Found) -> tuple[str, str, str]:
    """The plan's verdict on "no useful window exists", the numbers, and the power."""
    least = window_runs.rule()["useful_rise"]
    shares = f"{percent(windows.ABSENT)} or less and {percent(windows.THERE)} % or more"
    said = (
        f"window {window_words.edges(found)} in alpha, a useful part in {percent(found.share)} % of {windows.DRAWS} "
        f"resamples ({shares} decide); largest rise of refusal within {points(found.rise)} points ("
        f"{p_equals(found.rise_p)}) of {percent(found.room)} possible; n = {len(found.answers.harmful)} + "
        f"{len(found.answers.harmless)} prompts"
    )
    if found.room < least:
        return INCONCLUSIVE, said, f"No useful part was possible: refusal had {percent(found.room)} points of room."
    return found.verdict, said, change_power(len(found.answers.harmful), 1 - found.room)


def no_window(evidence: Evidence, variant: str) -> Finding:
    """Is there no useful window? The plan's verdict on a variant."""
    return finding(*_useful(_window(evidence, variant)))


def defence(evidence: Evidence) -> Finding:
    """Is there a dose at one layer that a defence could use? The plan's verdict, of the reverse."""
    verdict, said, power = _useful(_window(evidence, "one"))
    reverse = {REPLICATED: CONTRADICTED, CONTRADICTED: REPLICATED}
    return finding(reverse.get(verdict, verdict), said, power)


def window_edges(evidence: Evidence, size: float) -> Finding:
    """Does the window of many layers end at about this alpha on either side, under a reading of the pilot's alpha?"""
    found = _window(evidence, "many")
    readings = {"the raw difference": 1.0, "a unit vector": found.answers.units["alpha_absolute"]}
    sides, said = [], []
    for reading, unit in readings.items():
        ends = [found.intervals[side] for side in ("low", "high")]
        reach = [sorted((abs(unit * end.low), abs(unit * end.high))) for end in ends]
        inside = all(size / 2 <= low and high <= 2 * size for low, high in reach)
        outside = any(high < size / 2 or low > 2 * size for low, high in reach)
        sides.append(decide(inside, outside))
        edges = " to ".join(f"{unit * getattr(found, side):+.2f} {span(found.intervals[side], unit, 2)}"
                            for side in ("low", "high"))  # fmt: skip
        said.append(f"as multiples of {reading}: {edges}")
    verdict = decide(REPLICATED in sides, set(sides) == {CONTRADICTED})
    power = f"Some edge's interval reaches across the factor of two around {size:g}."
    return finding(verdict, "; ".join(said), power)


def window_widens(evidence: Evidence, smaller: str, larger: str) -> Finding:
    """Is the window of the larger model the wider one, in units of the mean residual norm?"""
    found = {model: _window(evidence.of(model), "one") for model in (smaller, larger)}
    ends, said = {}, []
    for model, one in found.items():
        unit = one.answers.units["alpha_relative"]
        ends[model] = Interval(unit * one.intervals["width"].low, unit * one.intervals["width"].high)
        said.append(f"{people(model)}: {unit * one.width:.2f} {span(ends[model], 1, 2)}")
    wider, narrower = ends[larger].low > ends[smaller].high, ends[larger].high < ends[smaller].low
    return finding(
        decide(wider, narrower),
        f"width, {'; '.join(said)}",
        "The two intervals overlap; more prompts would narrow them.",
    )


def formats(evidence: Evidence) -> Finding:
    """Does a demanded format lower refusal? The plan's comparisons."""
    level, margin = plan()["level"], plan()["margin"]
    every = evidence.once("formats", lambda: window_formats.refusals(evidence.record(WINDOW).frame))
    table = every.drop(window_runs.NONE)
    clear = table["p_holm"] < level
    lowers, raises = (clear & (table["change"] < 0)).any(), (clear & (table["change"] > 0)).any()
    same = bool(((table["change_low"] > -margin) & (table["change_high"] < margin)).all())
    verdict = decide(lowers and not raises, (raises and not lowers) or same)
    said = "; ".join(
        f"{name} {points(row['change'])} {span(Interval(row['change_low'], row['change_high']))} (Holm "
        f"{p_equals(row['p_holm'])})"
        for name, row in table.iterrows()
    )
    base = every.loc[window_runs.NONE]
    said = f"change of refusal in points: {said}; n = {base['n']:.0f} prompts"
    return finding(verdict, said, change_power(base["n"], base["rate"]))


def formats_late(evidence: Evidence) -> Finding:
    """Does a demanded format move the projection more in late layers than in early ones? The plan's comparison."""
    record = evidence.record(WINDOW)
    found = window_formats.contrast(record.frame, record.metrics, record.seed)
    clear = found.p < plan()["level"]
    verdict = decide(clear and found.difference > 0, clear and found.difference < 0)
    said = (
        f"late minus early {found.difference:+.2f} {span(found.interval, 1, 2)} mean differences ("
        f"{p_equals(found.p)}); n = {found.n} prompts in {found.clusters} clusters"
    )
    return finding(verdict, said, f"The interval, {span(found.interval, 1, 2)}, says what was left open.")


TESTS = (no_window, defence, window_edges, window_widens, formats, formats_late)
