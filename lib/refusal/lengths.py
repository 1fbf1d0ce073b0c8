"""How labels change when answers grow longer: the same greedy texts, cut at few tokens and followed to many."""

import sys

import pandas as pd

from refusal import records, runs, statistics
from refusal.analyses import plan
from refusal.files import sha256_text
from refusal.readers import NOTEBOOK, ROW
from refusal.runs import Run
from refusal.wording import percent, span


def just_made(run: Run, frame: pd.DataFrame) -> pd.DataFrame:
    """The unredacted rows of a record that has just been measured; an error of the notebook where others came since."""
    raw = run.raw
    assert raw is not None and raw["text_sha256"].tolist() == frame["text_sha256"].tolist(), "ask before other parts"
    return raw


def digest(frame: pd.DataFrame) -> str:
    """A hash of which texts a record's rows have."""
    return sha256_text(" ".join([*frame["condition"], *frame["prompt_id"], *frame["text_sha256"]]))


def beginnings(run: Run, short: pd.DataFrame, longer: pd.DataFrame, raw: pd.DataFrame | None) -> pd.DataFrame:
    """Whether each longer completion begins with the shorter one (batches of another shape round differently).

    Args:
        run: The run, whose last completions are the longer ones.
        short: The rows with few tokens.
        longer: The rows with more tokens, in the same order.
        raw: `run.raw` as it was after the shorter ones; None in replay.

    Returns:
        Metric `begins_alike`, 1 or 0; `direction_id` holds the condition.
    """

    def measure(_: object) -> pd.DataFrame:
        assert raw is not None
        begun = raw.set_index(ROW)["token_ids"].map(list)
        whole = just_made(run, longer).set_index(ROW)["token_ids"].map(list)
        same = [float(whole[key][: len(ids)] == ids) for key, ids in begun.items()]
        named = begun.index.to_frame(index=False).rename(columns={"condition": "direction_id"})
        return named.assign(metric="begins_alike", value=same)

    inputs = digest(short), digest(longer)
    return runs.metrics(run, "beginnings", measure, *inputs, modules=[sys.modules[__name__]])


def changes(frame: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """The label after few and after many tokens, of each completion that was made with both.

    Returns:
        `condition, prompt_id, prompt_set, short, longer` (labels), `tokens` (of the longer one) and `alike` (bool).
    """
    short, longer = (frame[frame["experiment"] == f"{NOTEBOOK} {part}"] for part in ("short", "longer"))
    both = short[[*ROW, "prompt_set", "label"]].merge(
        longer[[*ROW, "label", "n_tokens"]], on=ROW, suffixes=("_short", "_longer"), validate="one_to_one"
    )
    alike = metrics[metrics["experiment"] == "beginnings"].rename(columns={"direction_id": "condition"})
    both = both.merge(alike[[*ROW, "value"]], on=ROW, validate="one_to_one")
    names = {"label_short": "short", "label_longer": "longer", "n_tokens": "tokens", "value": "alike"}
    return both.rename(columns=names).assign(alike=both["value"] > 0.5)


def changed(table: pd.DataFrame) -> statistics.Rate:
    """The share of labels that change, over texts that begin alike; the two completions of a prompt are a cluster."""
    part = table[table["alike"]]
    return statistics.rate(part["short"] != part["longer"], part["prompt_id"], how=plan()["intervals"]["clusters"])


def change_table(table: pd.DataFrame) -> pd.DataFrame:
    """Counts of texts that begin alike: the label after few tokens in rows, after many in columns."""
    part = table[table["alike"]]
    what = part["prompt_set"].map(records.is_harmful).map({True: "harmful", False: "harmless"})
    rows = [what.rename("requests"), part["condition"], part["short"].rename("after few tokens")]
    return pd.crosstab(rows, part["longer"].rename("after many tokens"))


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame) -> dict[str, str]:
    """Formatted numbers on longer answers, by macro name, from a model's record and metrics of this notebook."""
    table = changes(frame, metrics)
    tokens = frame.groupby("experiment")["max_new_tokens"].first()
    found, part = changed(table), table[table["alike"]]
    moved = part[part["short"] != part["longer"]]
    kinds = (moved["short"] + " to " + moved["longer"]).value_counts()
    return {
        "LabelsShortTokens": str(tokens[f"{NOTEBOOK} short"]),
        "LabelsLongerTokens": str(tokens[f"{NOTEBOOK} longer"]),
        "LabelsChanged": percent(found.estimate),
        "LabelsChangedInterval": span(found.interval),
        "LabelsChangedTexts": str(found.n),
        "LabelsChangedPrompts": str(found.clusters),
        "LabelsChangedApart": str((~table["alike"]).sum()),
        "LabelsChangedHow": ", ".join(f"{how} ({count})" for how, count in kinds.items()) or "none",
    }
