"""Completions under control directions: rates by family, and the study's table beside them (methods, section 3)."""

import functools

import numpy as np
import pandas as pd

from refusal import statistics
from refusal.analyses import LABELS, plan
from refusal.control_screens import FAMILIES, family_of
from refusal.files import ROOT
from refusal.wording import percent, points, rated, source_name, span

HARMFUL, HARMLESS = "harmful_evaluation", "harmless_evaluation"
GROUPS = ("baseline", "extracted +1", "extracted -1", *FAMILIES, "ablate extracted", "ablate controls")
STUDY_GROUPS = {"extracted": "extracted +1", "random": "random", "orthogonal": "orthogonal",
                "opposite": "extracted -1", "baseline": "baseline"}  # fmt: skip
STUDY_NAMES = {"Mistral": "mistral-7b-v0.3", "Qwen": "qwen2-7b", "Llama": "llama-3.1-8b"}


def rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Rates of the labels, and of jailbreaks by the study's rule, by prompt set and group of conditions.

    A control's sign is arbitrary, so both signs of all draws of a family are one group. Its conditions answer the same
    prompts, so the prompt is the unit.

    Returns:
        A row for each prompt set, group and outcome: `k, n, clusters, rate, low, high`; over the group's conditions
        `conditions, sd, lowest, highest`.
    """
    outcomes = {label: frame["label"] == label for label in LABELS}
    outcomes["jailbreak"] = frame["seed_rule"] == "jailbreak"
    how, rows = plan()["intervals"]["clusters"], []
    for (prompt_set, group), part in frame.groupby(["prompt_set", _groups(frame)], sort=False):
        for outcome, values in outcomes.items():
            hit = values[part.index]
            found = statistics.rate(hit, part["cluster"], plan()["confidence"], how=how)
            each = hit.groupby(part["condition"]).mean()
            rows.append({"prompt_set": prompt_set, "group": group, "outcome": outcome, "k": found.k, "n": found.n,
                         "clusters": found.clusters, "rate": found.estimate, "low": found.interval.low,
                         "high": found.interval.high, "conditions": len(each), "sd": each.std(), "lowest": each.min(),
                         "highest": each.max()})  # fmt: skip
    return pd.DataFrame(rows)


def _groups(frame: pd.DataFrame) -> pd.Series:
    family, extracted = frame["direction_id"].map(family_of), frame["direction_id"] == "extracted"
    added = frame["operation"] == "add"
    chosen = [frame["operation"] == "none", added & extracted, added, extracted]
    names = np.select(chosen, ["baseline", frame["condition"], family, "ablate extracted"], "ablate controls")
    return pd.Series(names, frame.index, name="group")


def rate_changes(frame: pd.DataFrame) -> tuple[float, statistics.Paired]:
    """The two views in refusal rates of harmful prompts: mean |change| of the random draws; the paired one at -1."""
    part = frame[frame["prompt_set"] == HARMFUL].assign(refused=lambda rows: rows["label"] == "refusal")
    each = part.groupby("condition")["refused"].mean()
    drawn = each[each.index.str.startswith("random[")] - each["baseline"]
    first, second, clusters = statistics.pair(part, "extracted -1", "baseline", "refused")
    worst = statistics.paired(first, second, clusters, plan()["confidence"])
    return float(drawn.abs().mean()), worst


@functools.cache
def study_table() -> pd.DataFrame:
    """The study's table of controls as published: rates of jailbreaks by its own rule."""
    return pd.read_csv(ROOT / "data" / "study_controls.csv")


def beside_study(shares: pd.DataFrame, model: str) -> pd.DataFrame:
    """The study's table and ours on harmful prompts, by its rule: `model, condition, rate, sd, low, high`.

    Args:
        shares: From `rates`.
        model: Our model's name.
    """
    ours = shares[(shares["prompt_set"] == HARMFUL) & (shares["outcome"] == "jailbreak")].set_index("group")
    ours = ours.loc[list(STUDY_GROUPS.values())].reset_index().assign(model=model, condition=list(STUDY_GROUPS))
    published = study_table().assign(model=lambda rows: rows["model"].map(source_name))
    columns = ["model", "condition", "rate", "sd", "low", "high"]
    return pd.concat([published, ours], ignore_index=True).reindex(columns=columns)


def rate_numbers(frame: pd.DataFrame) -> dict[str, str]:
    """Formatted rates of notebook 02, by macro name."""
    shares = rates(frame).set_index(["prompt_set", "group", "outcome"])
    shown = shares[["rate", "low", "high"]]
    names = {"Baseline": "baseline", "Plus": "extracted +1", "Minus": "extracted -1",
             **{family.capitalize(): family for family in FAMILIES},
             "Ablated": "ablate extracted", "AblatedControls": "ablate controls"}  # fmt: skip
    named: dict[str, str] = {}
    for tail, group in names.items():
        named |= rated(f"ControlsRefusal{tail}", *shown.loc[(HARMFUL, group, "refusal")])
        if tail in ("Baseline", "Plus", "Minus", "Random"):
            named |= rated(f"ControlsRefusalHarmless{tail}", *shown.loc[(HARMLESS, group, "refusal")])
        if group in STUDY_GROUPS.values():
            named[f"ControlsSeed{tail}"] = percent(shares.loc[(HARMFUL, group, "jailbreak"), "rate"])
    average, worst = rate_changes(frame)
    broken = shares[shares.index.get_level_values("outcome") == "degenerate"]["highest"]
    return named | {
        "ControlsSeedRandomSd": percent(shares.loc[(HARMFUL, "random", "jailbreak"), "sd"]),
        "ControlsAverageRate": f"{100 * average:.1f}",
        "ControlsWorstRate": points(worst.difference),
        "ControlsWorstRateInterval": span(worst.interval),
        "ControlsGeneratedDraws": str(frame[frame["direction_id"].str.startswith("random[")]["direction_id"].nunique()),
        "ControlsPromptsGenerated": str(shares.loc[(HARMFUL, "baseline", "refusal"), "n"]),
        "ControlsPromptsGeneratedHarmless": str(shares.loc[(HARMLESS, "baseline", "refusal"), "n"]),
        "ControlsDegenerationLargest": percent(broken.max()),
    }


def study_numbers() -> dict[str, str]:
    """The study's table of controls, in percent as published, by macro name."""
    published = study_table().set_index(["model", "condition"])
    named = {}
    for name, model in STUDY_NAMES.items():
        for condition in STUDY_GROUPS:
            row = published.loc[(model, condition)]
            named[f"ControlsStudy{name}{condition.capitalize()}"] = f"{100 * row['rate']:.3g}"
        named[f"ControlsStudy{name}RandomSd"] = f"{100 * published.loc[(model, 'random'), 'sd']:.2g}"
    return named | {"ControlsStudyDirections": str(published["directions"].max())}
