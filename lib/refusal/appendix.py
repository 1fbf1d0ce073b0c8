"""The paper's appendices: the study's tables beside ours, what measuring took, and the command for each figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from refusal import analyses, claims, collapse_study, grids, records, statistics, summaries
from refusal.statistics import Interval
from refusal.wording import p_equals, people, percent, source_name, span

NONE = "–"
COLUMNS = {"baseline": "baseline", "standard_plus": "standard +α", "standard_minus": "standard −α",
           "inverted_plus": "inverted +α"}  # fmt: skip
OURS = {"standard_plus": "extracted +1", "standard_minus": "extracted -1"}
VERDICTS = {
    "AcrossSign": "sign-inversion",
    "AcrossSpecial": "controls-specific",
    "AcrossCollapse": "threshold-collapse",
    "AcrossCones": "cones-separate",
    "AcrossWindow": "window-none",
}


def _rate(estimate: float, low: float, high: float) -> str:
    return f"{percent(estimate)} {span(Interval(low, high))}"


def study_sign(root: Path, models: Sequence[str]) -> pd.DataFrame:
    """The study's table of sign inversion (its section 3.2), and ours by its rule on its layout, as strings.

    A published p is the study's (pooled z), one of ours that of exact flips of whole clusters.

    Args:
        root: The folder with a folder of records for each model.
        models: Registry ids of ours.
    """
    rows = []
    for model, part in analyses.study_table().groupby("model", sort=False):
        cells = {}
        for row in part.itertuples():
            tested = "" if row.condition == "baseline" else f"; {p_equals(row.z)}"
            cells[str(row.condition)] = _rate(row.rate, row.low, row.high) + tested
        rows.append([f"{source_name(str(model))}, published", *(cells[name] for name in COLUMNS)])
    for model in models:
        frame, _ = records.read(root / model / "03_sign_inversion.parquet")
        layout = frame[frame["prompt_set"] == "harmful_study"]
        layout = layout.assign(jailbreak=layout["seed_rule"] == "jailbreak")
        found = analyses.seed_rule_rates(layout).set_index("condition")
        cells = {"baseline": _rate(*found.loc["baseline", ["rate", "low", "high"]]), "inverted_plus": "as standard −α"}
        for name, condition in OURS.items():
            first, second, clusters = statistics.pair(layout, condition, "baseline", "jailbreak")
            p = statistics.paired(first, second, clusters).p
            cells[name] = f"{_rate(*found.loc[condition, ['rate', 'low', 'high']])}; {p_equals(p)}"
        rows.append([f"{people(model)}, ours", *(cells[name] for name in COLUMNS)])
    return pd.DataFrame(rows, columns=["model", *COLUMNS.values()])


def study_threshold(root: Path, model: str) -> pd.DataFrame:
    """The study's table of doses (its section 3.3), and ours along the extracted direction, as strings.

    Args:
        root: The folder with a folder of records for each model.
        model: Registry id of ours.
    """
    published = collapse_study.counts()
    rows = [
        [f"{people(row.model)}, published", f"{row.alpha:g}", NONE, _rate(row.rate, row.low, row.high), NONE, NONE]
        for row in published.itertuples()
    ]
    frame, _ = records.read(root / model / "04_llama_threshold.parquet")
    frame = grids.part(frame, "curves")
    frame = frame[(frame["operation"] == "none") | (frame["direction_id"] == "extracted")]
    for alpha, part in frame.groupby("alpha"):
        cells = []
        for hit in (part["seed_rule"] == "jailbreak", part["label"] == "compliance", part["label"] == "degenerate"):
            found = statistics.rate(hit, part["cluster"], analyses.plan()["confidence"])
            cells.append(_rate(found.estimate, found.interval.low, found.interval.high))
        relative = part["alpha_relative"].iloc[0]
        rows.append([f"{people(model)}, ours", f"{alpha:g}", f"{np.nan_to_num(relative):.2f}", *cells])
    columns = ["model", "α", "in mean norms", "jailbreak, %", "compliance, %", "degenerate, %"]
    return pd.DataFrame(rows, columns=columns)


def compute(root: Path, models: Sequence[str]) -> pd.DataFrame:
    """Minutes and memory of each notebook on each model, from the records' metadata, as strings.

    Args:
        root: The folder with a folder of records for each model.
        models: Registry ids.
    """
    cells: dict[tuple[str, str], str] = {}
    minutes = dict.fromkeys(models, 0.0)
    for model in models:
        for path in sorted((root / model).glob("*.parquet")):
            if not path.name.endswith(".metrics.parquet"):
                about = records.read(path)[1]
                minutes[model] += about["wall_s"] / 60
                cells[path.stem, model] = f"{about['wall_s'] / 60:.1f} min, {about['peak_gb']:.1f} GB"
    notebooks = sorted({notebook for notebook, _ in cells})
    rows = [[notebook, *(cells.get((notebook, model), NONE) for model in models)] for notebook in notebooks]
    rows.append(["all", *(f"{minutes[model]:.0f} min" for model in models)])
    return pd.DataFrame(rows, columns=["notebook", *map(people, models)])


def figures() -> pd.DataFrame:
    """For each figure the notebook that makes it, and the command, as strings."""
    rows = [[name, notebook, f"./run_all.sh --only {notebook[:2]}"] for name, notebook in summaries.FIGURES.items()]
    return pd.DataFrame(rows, columns=["figure", "notebook", "command"])


def across(ledger: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Macros that say, for the claims the abstract is about, which verdict each measured model has.

    Args:
        ledger: `claims.verdicts` by model.
    """
    made = {"AcrossModels": ", ".join(people(model) for model in ledger)}
    for macro, claim in VERDICTS.items():
        on: dict[str, list[str]] = {}
        for model, table in ledger.items():
            verdict = str(table.set_index("claim").loc[claim, "verdict"])
            on.setdefault(verdict, []).append(people(model))
        made[macro] = "; ".join(f"{verdict} on {' and '.join(names)}" for verdict, names in on.items())
    return made | {"LedgerEvery": " ".join(claims.sentence(table, model) for model, table in ledger.items())}


def tables(root: Path, models: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The appendices' tables by name; a model without the record of signs is left out of that table.

    Args:
        root: The folder with a folder of records for each model.
        models: Registry ids, the one that the text is about first.
    """
    signed = [model for model in models if (root / model / "03_sign_inversion.parquet").is_file()]
    return {
        "study_sign": study_sign(root, signed),
        "study_threshold": study_threshold(root, models[0]),
        "compute": compute(root, models),
        "figures": figures(),
    }
