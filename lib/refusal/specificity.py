"""Is the extracted direction special? What the rows of `control_screens` say, by the plan (methods, section 3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from refusal import control_rates, controls, statistics
from refusal.analyses import in_words, mean_interval, plan
from refusal.control_rates import HARMFUL, HARMLESS
from refusal.control_screens import FAMILIES, LIMIT, MATCHED, TOLERANCE, family_of
from refusal.statistics import Interval
from refusal.wording import p_equals, p_value, span

NOTEBOOK = "02_orthogonal_controls"
HEADLINES = {
    "ControlsSwing": "swing of the extracted direction, log-odds",
    "ControlsLargestHolm": "p against control directions (largest of the families, Holm)",
    "ControlsAverage": "mean |change| under a random direction, log-odds",
    "ControlsWorst": "change at alpha = -1, log-odds",
    "ControlsVerdict": "is the direction special",
}


# ---- effects at the first token


def swings(metrics: pd.DataFrame, prompt_set: str = HARMFUL, experiment: str = "screen") -> pd.Series:
    """Mean log-odds of a refusal opening under a positive alpha minus the same under a negative one, of each direction.

    Returns:
        Index `family, draw`; the extracted direction is draw 0 of "extracted". NaN for a draw without a value.
    """
    rows = _means(metrics, prompt_set, experiment)
    rows = rows[rows["operation"] == "add"]
    wide = rows.assign(sign=np.sign(rows["alpha"])).pivot(index=["family", "draw"], columns="sign", values="value")
    return wide[1.0] - wide[-1.0]


def ablations(metrics: pd.DataFrame, prompt_set: str = HARMFUL) -> pd.Series:
    """Change of the mean log-odds from the baseline where a direction is ablated; index as in `swings`."""
    rows = _means(metrics, prompt_set, "ablation").set_index(["family", "draw"])["value"]
    baseline = _means(metrics, prompt_set, "screen").set_index("operation").loc["none", "value"]
    return rows - float(baseline)


def _means(metrics: pd.DataFrame, prompt_set: str, experiment: str) -> pd.DataFrame:
    rows = metrics[(metrics["experiment"] == experiment) & (metrics["metric"] == "mean_log_odds")]
    rows = rows[rows["prompt_id"] == prompt_set]
    return rows.assign(family=rows["direction_id"].map(family_of))


def ranks(effects: pd.Series, extracted: float) -> pd.DataFrame:
    """The extracted effect among each family's: `controls.specificity`, and how many draws have as large an effect.

    Returns:
        Index family; columns extracted, p, z, n, missing, mean, sd, largest, as_large (both of the effect's size).
    """
    rows = {}
    for family, values in effects.groupby(level="family", sort=False):
        if family == "extracted":
            continue
        if values.isna().all():  # none reached the KL: all of them count against the extracted direction
            found = controls.Specificity(1.0, np.nan, len(values), len(values), np.nan, np.nan)
        else:
            found = controls.specificity(extracted, values.to_numpy())
        sizes = values.abs()
        rows[str(family)] = {"extracted": extracted, **dataclasses.asdict(found), "largest": sizes.max(),
                             "as_large": int((sizes >= abs(extracted)).sum())}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The plan's comparisons: swings at equal norm on harmful prompts, a row a family, with Holm's correction."""
    effects = swings(metrics)
    found = ranks(effects, float(effects["extracted", 0]))
    found = found.loc[[one["family"] for one in plan()[NOTEBOOK]["comparisons"]]]
    return found.assign(p_holm=pd.Series(statistics.holm(found["p"].to_dict())))


def secondary(metrics: pd.DataFrame) -> pd.DataFrame:
    """What the plan shows beside them with uncorrected p; it decides nothing. Index `comparison, family`."""
    effects, harmless = swings(metrics), swings(metrics, HARMLESS)
    own = float(effects["extracted", 0])
    ablated = {name: ablations(metrics, name) for name in (HARMFUL, HARMLESS)}
    parts = {
        "equal KL": ranks(swings(metrics, experiment="equal_kl"), own),
        "harmless requests": ranks(harmless.drop("balanced"), float(harmless["extracted", 0])),
        "shuffled within classes": ranks(effects.loc[["balanced"]], own),
        "ablation": ranks(ablated[HARMFUL], float(ablated[HARMFUL]["extracted", 0])),
        "ablation, harmless requests": ranks(ablated[HARMLESS], float(ablated[HARMLESS]["extracted", 0])),
    }
    return pd.concat(parts, names=["comparison", "family"])


def panels(metrics: pd.DataFrame) -> dict[str, pd.Series]:
    """The swings that the figure shows, the extracted one among them, by the title of a panel."""
    effects, matched = swings(metrics), swings(metrics, experiment="equal_kl")
    return {
        "(a) harmful requests,\nequal norm": effects,
        "(b) harmless requests,\nequal norm": swings(metrics, HARMLESS),
        "(c) harmful requests,\nequal KL": pd.concat([effects.loc[["extracted"]], matched]),
    }


def verdict(table: pd.DataFrame) -> str:
    """The plan's rule: special, not special, or inconclusive.

    Args:
        table: From `table`. With so few draws that no p could be below the level, nothing can be concluded.
    """
    level = plan()["level"]
    if 1 / (1 + table["n"].min()) >= level:
        return "inconclusive"
    if (table["p_holm"] < level).all():
        return "special"
    return "not special" if table.loc["random", "p"] >= level else "inconclusive"


# ---- by prompt: intervals, and the two views of robustness


def by_prompt(metrics: pd.DataFrame, prompt_set: str = HARMFUL, experiment: str = "screen") -> pd.DataFrame:
    """Changes of the log-odds from the baseline: a row for each direction and alpha, a column for each prompt."""
    rows = metrics[(metrics["metric"] == "log_odds") & metrics["prompt_id"].str.startswith(f"{prompt_set}-")]
    baseline = rows[rows["operation"] == "none"].set_index("prompt_id")["value"]
    steered = rows[(rows["experiment"] == experiment) & (rows["operation"] != "none")]
    return steered.pivot(index=["direction_id", "alpha"], columns="prompt_id", values="value") - baseline


def mean_size(changes: NDArray[np.float64], seed: int, samples: int = 1000) -> tuple[float, Interval]:
    """How far an average perturbation moves refusal, whichever way: the mean over directions of |mean over prompts|.

    The interval resamples directions (both signs together) and prompts, each as a whole (Owen, 2007, Annals of Applied
    Statistics 1, 386-411), and is widened as t is with as many degrees of freedom. Noise lengthens a mean, and
    resampling lengthens it as much again: so what the bootstrap adds is taken off the mean, and twice off the interval.
    Measured coverage: .93 to .98.

    Args:
        changes: `[directions, signs, prompts]`.
        seed: Of the bootstrap.
        samples: Of the bootstrap.
    """
    rng, (directions, _, prompts) = np.random.default_rng(seed), changes.shape
    size = float(np.abs(changes.mean(-1)).mean())
    boots = np.empty(samples)
    for i in range(samples):
        some = changes[rng.integers(0, directions, directions)] @ rng.multinomial(
            prompts, np.full(prompts, 1 / prompts)
        )
        boots[i] = np.abs(some).mean() / prompts
    added = float(boots.mean()) - size
    reach = stats.t.isf((1 - plan()["confidence"]) / 2, max(min(directions, prompts) - 1, 1))
    low, high = np.quantile(boots, stats.norm.cdf([-reach, reach])) - 2 * added
    return max(size - added, 0.0), Interval(max(float(low), 0.0), max(float(high), 0.0))


def robustness(metrics: pd.DataFrame, seed: int) -> dict[str, tuple[float, Interval]]:
    """Two views of robustness, in log-odds of a refusal opening on harmful prompts.

    Returns:
        "average": mean |change| under a random direction at the extracted norm; "worst": the change at alpha = -1 along
        the extracted direction, the worst that is known here.
    """
    changes = by_prompt(metrics)
    drawn = changes[changes.index.get_level_values("direction_id").map(family_of) == "random"].to_numpy(dtype=float)
    worst = changes.loc[("extracted", -1.0)].to_numpy(dtype=float)
    return {"average": mean_size(drawn.reshape(len(drawn) // 2, 2, -1), seed), "worst": mean_interval(worst)}


# ---- words


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, str]:
    """Formatted numbers of notebook 02, by macro name.

    Args:
        frame: Its completions.
        metrics: Its metrics.
        about: Metadata of the record: `parameters`.
    """
    test, more = table(metrics), secondary(metrics)
    sizes = robustness(metrics, int(about["parameters"]["seed"]))
    named: dict[str, str] = {}
    for family, row in test.iterrows():
        head = f"Controls{str(family).capitalize()}"
        named |= {f"{head}Sd": f"{row['sd']:.2f}", f"{head}Z": f"{row['z']:+.1f}", f"{head}P": p_value(row["p"]),
                  f"{head}Holm": p_value(row["p_holm"])}  # fmt: skip
    for family in MATCHED:
        head, matched = f"Controls{family.capitalize()}", more.loc[("equal KL", family)]
        named |= {f"{head}KlP": p_value(matched["p"]), f"{head}Unreached": str(int(matched["missing"])),
                  f"{head}AblationP": p_value(more.loc[("ablation", family), "p"])}  # fmt: skip
    for name, (value, interval) in {
        "Swing": swing(metrics),
        "SwingHarmless": swing(metrics, HARMLESS),
        "Ablation": mean_interval(by_prompt(metrics, experiment="ablation").loc["extracted"].to_numpy(dtype=float)[0]),
        "Worst": sizes["worst"],
    }.items():
        named |= {f"Controls{name}": f"{value:+.2f}", f"Controls{name}Interval": span(interval, 1, 2)}
    average, interval = sizes["average"]
    named |= {
        "ControlsAverage": f"{average:.2f}",
        "ControlsAverageInterval": span(interval, 1, 2),
        "ControlsHarmlessP": p_value(more.loc["harmless requests", "p"].max()),
        "ControlsBalancedP": p_value(more.loc[("shuffled within classes", "balanced"), "p"]),
        "ControlsLargestHolm": p_value(test["p_holm"].max()),
        "ControlsVerdict": verdict(test),
        "ControlsRule": in_words(plan()[NOTEBOOK]["verdict"], "special"),
        "ControlsConclusion": _conclusion(test),
    }
    completions = control_rates.rate_numbers(frame) | control_rates.study_numbers()
    return named | _counts(metrics, test, more) | _kl_numbers(metrics) | completions


def swing(metrics: pd.DataFrame, prompt_set: str = HARMFUL) -> tuple[float, Interval]:
    """The swing of the extracted direction on a set of prompts, with its t interval."""
    own = by_prompt(metrics, prompt_set).loc["extracted"]
    return mean_interval((own.loc[1.0] - own.loc[-1.0]).to_numpy(dtype=float))


def _counts(metrics: pd.DataFrame, test: pd.DataFrame, more: pd.DataFrame) -> dict[str, str]:
    cosines = metrics[metrics["metric"] == "cosine"]
    shuffled = cosines[cosines["direction_id"].str.startswith("shuffled[")]["value"].abs()
    return {
        "ControlsLayer": str(cosines["layer"].iloc[0]),
        "ControlsFamilies": str(len(test)),
        "ControlsDraws": str(test["n"].iloc[0]),
        "ControlsBalancedDraws": str(more.loc[("shuffled within classes", "balanced"), "n"]),
        "ControlsKlDraws": str(more.loc[("equal KL", "random"), "n"]),
        "ControlsAblationDraws": str(more.loc[("ablation", "random"), "n"]),
        "ControlsPrompts": str(by_prompt(metrics).shape[1]),
        "ControlsPromptsHarmless": str(by_prompt(metrics, HARMLESS).shape[1]),
        "ControlsShuffledCosine": f"{shuffled.max():.2f}",
    }


def _kl_numbers(metrics: pd.DataFrame) -> dict[str, str]:
    kl = metrics[metrics["metric"] == "kl"]
    own = kl[kl["direction_id"] == "extracted"].set_index("alpha")["value"]
    drawn = kl[kl["direction_id"].str.startswith("random[")]["value"]
    return {
        "ControlsKlPlus": f"{own[1.0]:.3f}",
        "ControlsKlMinus": f"{own[-1.0]:.3f}",
        "ControlsKlRandom": f"{drawn.median():.3f}",
        "ControlsKlPrompts": str(plan()[NOTEBOOK]["matching"]["harmful_selection"]),
        "ControlsKlTolerance": f"{100 * TOLERANCE:.0f}",
        "ControlsKlLimit": f"{LIMIT:.0f}",
    }


def _conclusion(test: pd.DataFrame) -> str:
    large, total = test["as_large"], int(test["n"].sum())
    which = ", ".join(f"{family} {count}" for family, count in large.items() if count)
    beyond = (
        f"{large.sum()} of the {total} control draws have a swing at least as large ({which})"
        if large.sum()
        else f"its swing is larger than that of every one of the {total} control draws"
    )
    start = {
        "special": "At the same norm, the extracted direction moves refusal further than any family of controls "
        "accounts for",
        "not special": "At the same norm, the extracted direction does not move refusal further than random directions "
        f"do (rank {p_equals(test.loc['random', 'p'])})",
        "inconclusive": "The measurement does not settle whether the extracted direction is special",
    }
    return f"{start[verdict(test)]}: {beyond}."


def prose(said: Mapping[str, str]) -> str:
    """What notebook 02 says of its plan's test in words, from `numbers`."""
    rows = [
        f"- **{family}**: standard deviation of the swings {said[f'Controls{name}Sd']}; the extracted one lies at "
        f"z = {said[f'Controls{name}Z']}; rank p = {said[f'Controls{name}P']}, Holm {said[f'Controls{name}Holm']} "
        f"({said['ControlsDraws']} draws)"
        for family, name in ((family, family.capitalize()) for family in FAMILIES)
    ]
    return "\n".join(
        [
            f"The swing of the extracted direction at layer {said['ControlsLayer']} is **{said['ControlsSwing']}** "
            f"log-odds {said['ControlsSwingInterval']} on {said['ControlsPrompts']} harmful prompts (each its own "
            f"cluster; positive: refusal rises with alpha). {said['ControlsConclusion']}\n",
            *rows,
            f"\n**Verdict by the plan's rule: {said['ControlsVerdict']}.** The rule: {said['ControlsRule']}.",
        ]
    )
