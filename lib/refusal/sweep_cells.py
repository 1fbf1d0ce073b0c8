"""Cells of the sweep, each a layer and an alpha other than 0: screened, chosen, put to the gates (methods, section 9).

Every cell is screened on selection prompts. Some are confirmed by generation on evaluation prompts, beside a random
direction of the same norm at the same layer.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from refusal import chunks, prompts, records, runs, statistics, steering
from refusal.analyses import plan
from refusal.conditions import Condition
from refusal.directions import Directions
from refusal.files import CompendiumError, sha256_text
from refusal.models import Model

NOTEBOOK = "06_layer_sweep"
ENDS, BETWEEN = 4, 8  # cells from either end of the ranking, and from all others (analysis plan)
BROKEN = 0.10  # largest share of degenerate completions of a coherent cell (analysis plan)
# The first gate that a cell fails, if any; text that is broken says nothing of refusal, so coherence comes first.
OUTCOMES = {
    "passed": "passes all three gates",
    "broken": "not coherent",
    "unmoved": "no change from the baseline",
    "unspecific": "no more than a random direction",
}


def grid(n_layers: int, selected: int, quick: bool = False) -> list[tuple[int, float]]:
    """The cells (layer, alpha) of the screen; alpha = 0 is none, since the baseline is the same at every layer.

    Args:
        n_layers: Number of decoder blocks.
        selected: The layer that the rule chose.
        quick: Every second layer only, the selected one among them, and alphas of -1 and 1.
    """
    layers = range(selected % 2, n_layers, 2) if quick else range(n_layers)
    alphas = [-1.0, 1.0] if quick else [float(alpha) for alpha in plan()[NOTEBOOK]["alphas"] if alpha != 0]
    return [(layer, alpha) for layer in layers for alpha in alphas]


def _name(direction_id: str, layer: int, alpha: float) -> str:
    return f"{direction_id}@{layer} {alpha:+g}"


def at(made: Directions, layer: int, alpha: float) -> Condition:
    """`steering.add` with the layer in the name, "extracted@14 +1": there are several layers here."""
    return replace(steering.add(made, layer, alpha), name=_name(made.id, layer, alpha))


def screen(run: runs.Run, frame: pd.DataFrame, made: Directions, selected: int) -> pd.DataFrame:
    """The screen of every cell of the grid and of the baseline: measured, or read.

    Args:
        run: The notebook's run; a quick one screens a smaller grid.
        frame: Selection prompts.
        made: The direction of every layer.
        selected: The layer that the rule chose, which is noted beside.

    Returns:
        Metrics `log_odds` by layer, alpha and prompt, layer -1 for the baseline; and `selected_layer`, one row.
    """
    where = grid(len(made.unit), selected, bool(run.parameters["n_prompts"]))
    conditions = [steering.baseline(), *(at(made, layer, alpha) for layer, alpha in where)]
    openings = runs.opening_tokens(run)

    def measure(store: chunks.Store) -> pd.DataFrame:
        return screened(chunks.load_model(store), frame, conditions, openings, selected)

    keys = [(condition.name, condition.key()) for condition in conditions]
    # Of this module, no more than the layout of the rows decides them: a change of words measures nothing.
    layout = sha256_text(inspect.getsource(screened))
    return runs.metrics(run, "screen", measure, prompts.digest(frame), keys, openings, selected, layout)


def screened(
    model: Model, frame: pd.DataFrame, conditions: Sequence[Condition], openings: Sequence[int], selected: int
) -> pd.DataFrame:
    """The rows of `screen`."""
    values = steering.screen(model, frame["text"].tolist(), conditions, openings).double().numpy()
    about = {"metric": "log_odds", "prompt_id": frame["prompt_id"].to_numpy()}
    rows = [
        pd.DataFrame(
            about
            | {"operation": condition.operation, "direction_id": condition.direction_id, "alpha": condition.alpha}
            | {"layer": -1 if condition.first is None else condition.first, "value": values[:, column]}
        )
        for column, condition in enumerate(conditions)
    ]
    rule = {"metric": "selected_layer", "prompt_id": "", "operation": "none", "direction_id": "", "alpha": 0.0}
    return pd.concat([*rows, pd.DataFrame([rule | {"layer": selected, "value": float(selected)}])], ignore_index=True)


def selected_layer(metrics: pd.DataFrame) -> int:
    """The layer that the rule of notebook 01 chose, as noted beside the screen."""
    return int(metrics.loc[metrics["metric"] == "selected_layer", "layer"].iloc[0])


def log_odds(metrics: pd.DataFrame) -> pd.DataFrame:
    """The screen's rows, with the `side` that a prompt is on: harmful or harmless."""
    part = metrics[(metrics["experiment"] == "screen") & (metrics["metric"] == "log_odds")]
    return part.assign(side=np.where(part["prompt_id"].map(records.is_harmful), "harmful", "harmless"))


def means(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean log-odds by layer and alpha (index; layer -1 is the baseline), columns harmful and harmless."""
    return log_odds(metrics).groupby(["layer", "alpha", "side"])["value"].mean().unstack("side")


def cells(metrics: pd.DataFrame, quick: bool = False) -> pd.DataFrame:
    """The cells to confirm, by the plan's rule, from the mean log-odds on harmful selection prompts.

    The highest and the lowest, with no layer twice in either group (fewer where there are fewer layers); then, from the
    ranking of all others, the middle of each of eight stretches of equal length. Ties go to the lower layer and alpha.

    Args:
        metrics: From `screen`.
        quick: Two a group.

    Returns:
        `rank` (1 is the highest of all cells), `layer, alpha, screen` (mean log-odds) and `group` ("highest", "lowest"
        or "spaced"), by rank.

    Raises:
        CompendiumError: No cell has finite log-odds.
    """
    ends, between = (2, 2) if quick else (ENDS, BETWEEN)
    mean = means(metrics)["harmful"].drop(-1, level="layer").replace([np.inf, -np.inf], np.nan).dropna()
    if mean.empty:
        raise CompendiumError("the screen has no finite log-odds under any steering: measure it in float32.")
    ranking = mean.rename("screen").reset_index()
    ranking = ranking.sort_values(["screen", "layer", "alpha"], ascending=[False, True, True], ignore_index=True)
    ranking.insert(0, "rank", ranking.index + 1)
    highest = ranking.drop_duplicates("layer").head(ends).index
    rest = ranking.drop(highest)
    lowest = rest[::-1].drop_duplicates("layer").head(ends).index
    others = rest.drop(lowest).index
    count = min(between, len(others))
    spaced = [others[int((i + 0.5) * len(others) / count)] for i in range(count)]
    groups = {"highest": highest, "spaced": spaced, "lowest": lowest}
    ranking["group"] = ranking.index.map({row: name for name, rows in groups.items() for row in rows})
    return ranking.dropna(subset=["group"]).reset_index(drop=True)


def confirmations(made: Directions, control: Directions, chosen: pd.DataFrame) -> list[Condition]:
    """The baseline, and both directions at each of the chosen cells."""
    steered = [at(one, int(cell.layer), float(cell.alpha)) for cell in chosen.itertuples() for one in (made, control)]
    return [steering.baseline(), *steered]


def _labels(frame: pd.DataFrame) -> pd.DataFrame:
    """The label of every completion, prompts in rows and conditions in columns."""
    wide = frame.pivot(index="prompt_id", columns="condition", values="label")
    if wide.isna().any(axis=None):
        raise CompendiumError("the record lacks a completion of some prompt under some condition: measure it again.")
    return wide


def gates(frame: pd.DataFrame, metrics: pd.DataFrame, quick: bool = False) -> pd.DataFrame:
    """The study's three gates for every confirmed cell, by the plan's rule.

    Specific: on the same harmful prompts, refusal differs from that under the random direction, in the direction of
    alpha's sign (McNemar exact, below the level). Coherent: at most a tenth of the cell's completions, harmless prompts
    included, are degenerate. Effective: the interval of the paired change from the baseline excludes zero.

    Args:
        frame: The record's completions.
        metrics: From `screen`.
        quick: As in `cells`.

    Returns:
        The columns of `cells`; `n`; `rate, low, high` (refusal of harmful requests), `random` (the same under the
        random direction), `harmless`, `degenerate`; `change, change_low, change_high` (from the baseline);
        `difference, p, p_holm` (from the random direction; Holm over the cells); `specific, coherent, effective,
        passed`; `outcome`, a key of OUTCOMES.

    Raises:
        CompendiumError: A completion is missing.
    """
    level, confidence, how = plan()["level"], plan()["confidence"], plan()["intervals"]["clusters"]
    labels, about = _labels(frame), frame.drop_duplicates("prompt_id").set_index("prompt_id")
    harmful = about["prompt_set"].map(records.is_harmful).loc[labels.index]
    refused, degenerate = labels[harmful] == "refusal", (labels == "degenerate").mean()
    harmless, clusters = (labels[~harmful] == "refusal").mean(), about["cluster"].loc[refused.index]
    table = cells(metrics, quick)
    rows = []
    for cell in table.itertuples():
        own, other = (_name(who, int(cell.layer), float(cell.alpha)) for who in ("extracted", "random[0]"))
        rate = statistics.rate(refused[own], clusters, confidence, how=how)
        change = statistics.paired(refused[own], refused["baseline"], clusters, confidence)
        against = statistics.paired(refused[own], refused[other], clusters, confidence)
        rows.append(
            {"n": rate.n, "rate": rate.estimate, "low": rate.interval.low, "high": rate.interval.high,
             "random": refused[other].mean(), "harmless": harmless[own], "degenerate": degenerate[own],
             "change": change.difference, "change_low": change.interval.low, "change_high": change.interval.high,
             "difference": against.difference, "p": against.p}
        )  # fmt: skip
    table = pd.concat([table, pd.DataFrame(rows)], axis=1)
    table["p_holm"] = pd.Series(statistics.holm(table["p"].to_dict()))
    table["specific"] = (table["p"] < level) & (table["difference"] * table["alpha"] > 0)
    table["coherent"] = table["degenerate"] <= BROKEN
    table["effective"] = (table["change_low"] > 0) | (table["change_high"] < 0)
    table["passed"] = table["specific"] & table["coherent"] & table["effective"]
    failed = [table["passed"], ~table["coherent"], ~table["effective"]]
    table["outcome"] = np.select(failed, ["passed", "broken", "unmoved"], "unspecific")
    return table
