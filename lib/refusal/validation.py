"""Notebook 00: what judges say of the texts that readers labelled, and how labels change when texts grow longer.

The keyword rules of other papers need texts, which git does not hold for harmful prompts, so what they say is measured
with the completions and kept as rows of the metrics.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from refusal import agreement, lengths, records, runs
from refusal.agreement import ALL, JUDGES, OTHERS
from refusal.analyses import plan
from refusal.files import sha256_file
from refusal.readers import NOTEBOOK, ROW, RULES_FILE, items, keyword_rules, refuses
from refusal.runs import Run
from refusal.statistics import Interval
from refusal.wording import people, span

RECORDS = records.COMMITTED
MACROS = {"seed_rule": "Seed", "gcg": "Gcg", "arditi": "Arditi"}
HEADLINES = {
    "LabelsKappa": "kappa of the labels with readers, all models",
    "LabelsKappaOwn": "the same, completions of this model alone",
    "LabelsChanged": "labels that change with longer answers, %",
}


def rules(run: Run, frame: pd.DataFrame) -> pd.DataFrame:
    """What the published rules say of completions that have just been made (or what they said, in replay).

    Returns:
        Metrics named after the rules: value 1 for a refusal; `direction_id` holds the condition.
    """

    def measure(_: object) -> pd.DataFrame:
        raw = lengths.just_made(run, frame)
        rows = [
            {"metric": rule, "direction_id": row.condition, "prompt_id": row.prompt_id,
             "value": float(refuses(rule, row.text))}
            for rule in keyword_rules() for row in raw.itertuples()
        ]  # fmt: skip
        return pd.DataFrame(rows)

    return runs.metrics(
        run, "rules", measure, lengths.digest(frame), sha256_file(RULES_FILE), modules=[sys.modules[__name__]]
    )


# ---- items and judges together


def labelled(read: pd.DataFrame, frame: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """The items of one model whose text came out as the readers saw it, with what every judge says of it.

    Args:
        read: From `items`.
        frame: The model's record of this notebook.
        metrics: Its metrics.

    Returns:
        The items' columns, and a column of labels for each of `JUDGES`; `said` is the record's text (redacted).
    """
    made = frame[frame["experiment"] == f"{NOTEBOOK} validation"]
    made = made.rename(columns={"label": "ours", "text": "said"})
    made["seed_rule"] = made["seed_rule"].replace("jailbreak", "compliance")
    found = metrics[metrics["experiment"] == "rules"]
    wide = found.pivot(index=["direction_id", "prompt_id"], columns="metric", values="value").rename_axis(columns=None)
    wide = wide.map(lambda value: "refusal" if value > 0.5 else "compliance").rename_axis(index=ROW).reset_index()
    columns = ["model", *ROW, "text_sha256", "ours", "seed_rule", "said"]
    both = made[columns].merge(wide, on=ROW, validate="one_to_one")
    return read.merge(both, on=["model", *ROW, "text_sha256"], validate="one_to_one")


def pooled(
    read: pd.DataFrame, frame: pd.DataFrame, metrics: pd.DataFrame, root: Path = RECORDS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The items of this model and of all others whose record of this notebook is committed.

    Args:
        read: From `items`.
        frame: This model's record.
        metrics: Its metrics.
        root: The folder with the records of the others.

    Returns:
        What `labelled` gives for all of them, and a table by model: `items` that were read, those `joined` to a record,
        and those `left_out`, because the text came out otherwise or the model has no record of this notebook.
    """
    own = set(frame["model"])
    parts = [labelled(read, frame, metrics)]
    for path in sorted(root.glob(f"*/{NOTEBOOK}.parquet")):
        if path.parent.name not in own:
            its = records.read(path)[0], records.read(path.with_name(f"{NOTEBOOK}.metrics.parquet"))[0]
            parts.append(labelled(read, *its))
    table = pd.concat(parts, ignore_index=True)
    count = pd.DataFrame({"items": read["model"].value_counts(sort=False), "joined": table["model"].value_counts()})
    count = count.fillna(0).astype(int)
    return table, count.assign(left_out=count["items"] - count["joined"]).rename_axis("model").reset_index()


def examples(table: pd.DataFrame, letters: int = 100) -> pd.DataFrame:
    """Answers to harmless prompts that our labels get wrong: how they begin, and what readers and judge call them."""
    wrong = table[(table["ours"] != table["reference"]) & ~table["prompt_set"].map(records.is_harmful)]
    shown = wrong.assign(begins=[" ".join(said.split())[:letters] for said in wrong["said"]])
    columns = ["model", "condition", "half", "kind", "reference", "ours", "begins"]
    return shown[columns].rename(columns={"reference": "readers"}).reset_index(drop=True)


# ---- numbers and words


def _two(value: float) -> str:
    """Two decimals; kappa of one label only, or of nothing, is not defined."""
    return "not defined" if math.isnan(value) else f"{value:.2f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else span(Interval(low, high), 1, 2)


def numbers(
    frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any], root: Path = RECORDS
) -> dict[str, str]:
    """Formatted numbers of notebook 00 on the labels, by macro name.

    Args:
        frame: A model's record.
        metrics: Its metrics.
        about: Its metadata.
        root: The folder with the records of the other models, whose items are pooled with this one's.

    Raises:
        CompendiumError: The readers' labels are missing or defective.
    """
    read = items()
    table, count = pooled(read, frame, metrics, root)
    found = agreement.agreement(table, seed=about["parameters"]["seed"])
    second = table[table["half"] == "B"]
    at = found[found["half"] == "B"].set_index(["scope", "sense", "judge"]).sort_index()
    ours, readers = at.loc[(ALL, "three labels", "ours")], at.loc[(ALL, "three labels", "readers")]
    own = found[(found["scope"] == frame["model"].iloc[0]) & (found["half"] == "B")]
    own = own[(own["sense"] == "three labels") & (own["judge"] == "ours")]["kappa"]
    first = found[(found["scope"] == ALL) & (found["half"] == "A")].set_index(["sense", "judge"]).sort_index()
    broken = second[second["reference"] == "degenerate"]
    values = {
        "LabelsItems": str(len(read)),
        "LabelsLeftOut": str(count["left_out"].sum()),
        "LabelsModels": str((count["joined"] > 0).sum()),
        "LabelsHalf": str(int(ours["n"])),
        "LabelsPrompts": str(int(ours["prompts"])),
        "LabelsReadersDiffer": str((read["reader_1"] != read["reader_2"]).sum()),
        "LabelsReadersKappa": _two(readers["kappa"]),
        "LabelsReadersKappaInterval": _interval(readers["low"], readers["high"]),
        "LabelsKappa": _two(ours["kappa"]),
        "LabelsKappaInterval": _interval(ours["low"], ours["high"]),
        "LabelsKappaBootstrap": _interval(ours["boot_low"], ours["boot_high"]),
        "LabelsKappaFirstHalf": _two(first.loc[("three labels", "ours"), "kappa"]),
        "LabelsKappaOwn": _two(own.iloc[0] if len(own) else math.nan),
        "LabelsKappaModels": _by_model(at),
        "LabelsRefusalKappa": _two(at.loc[(ALL, "refusal or not", "ours"), "kappa"]),
        "LabelsKappaVerdict": _verdict(ours),
        "LabelsBeats": _beats(at),
        "LabelsDegenerate": str(len(broken)),
        "LabelsDegenerateMissed": str((broken["ours"] == "compliance").sum()),
        "LabelsWrongKinds": _wrong_kinds(table),
    }
    for judge, macro in MACROS.items():
        row = at.loc[(ALL, "three labels", judge)]
        values |= {f"Labels{macro}Kappa": _two(row["kappa"]),
                   f"Labels{macro}KappaInterval": _interval(row["low"], row["high"]),
                   f"Labels{macro}RefusalKappa": _two(at.loc[(ALL, "refusal or not", judge), "kappa"])}  # fmt: skip
    return values | lengths.numbers(frame, metrics)


def _by_model(at: pd.DataFrame) -> str:
    rows = [(scope, at.loc[(scope, "three labels", "ours")]) for scope in at.index.levels[0] if scope != ALL]
    return ", ".join(
        f"{_two(row['kappa'])} on {people(scope)} (n = {int(row['n'])})" for scope, row in rows if row["n"]
    )


def _verdict(ours: "pd.Series[Any]") -> str:
    """Whether the plan's hoped-for kappa is reached; the interval is the one that takes prompts as the unit."""
    hoped = plan()[NOTEBOOK]["kappa_hoped"]
    if math.isnan(ours["kappa"]):
        return "There are too few items for a kappa."
    if ours["kappa"] >= hoped:
        sure = "and the whole interval lies above it" if ours["boot_low"] > hoped else "but the interval reaches below"
        return f"The hoped-for {hoped:.2f} is reached, {sure}."
    sure = "and the whole interval lies below it" if ours["boot_high"] < hoped else "though the interval reaches it"
    return f"The hoped-for {hoped:.2f} is missed, {sure}."


def _beats(at: pd.DataFrame) -> str:
    """Whether our labels agree with readers better than the other rules, in either sense."""
    said = []
    for sense, words in (("three labels", "By three labels"), ("refusal or not", "by refusal or not")):
        rows = {JUDGES[judge]: at.loc[(ALL, sense, judge)] for judge in OTHERS}
        better = [name for name, row in rows.items() if row["less_low"] > 0]
        others = [name for name in rows if name not in better]
        than = f"better than {_listed(better)}" if better else ""
        doubt = f"not detectably better than {_listed(others)}" if others else ""
        margins = ", ".join(
            f"{row['less']:+.2f} {_interval(row['less_low'], row['less_high'])}"
            for row in rows.values()
            if not math.isnan(row["less"])
        )
        which = ", but ".join(filter(None, (than, doubt))) if others else "better than each of the other rules"
        said.append(f"{words}, our labels agree {which} (differences {margins or 'not defined'})")
    return "; ".join(said) + "."


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _wrong_kinds(table: pd.DataFrame, most: int = 3) -> str:
    made = agreement.kinds(table)
    wrong = made[made[JUDGES["ours"]] > 0].sort_values(JUDGES["ours"], ascending=False, kind="stable").head(most)
    return (
        ", ".join(f"{row['kind']} ({row[JUDGES['ours']]} of {row['items']})" for _, row in wrong.iterrows()) or "none"
    )


def prose(values: Mapping[str, str]) -> str:
    """What the notebook says of the labels in words, from `numbers`."""
    v = values
    others = "; ".join(
        f"{JUDGES[judge]} {v[f'Labels{macro}Kappa']} ({v[f'Labels{macro}RefusalKappa']})"
        for judge, macro in MACROS.items()
    )
    lines = [
        f"**Our labels agree with the readers with a kappa of {v['LabelsKappa']} {v['LabelsKappaInterval']}** on "
        f"{v['LabelsHalf']} completions (of {v['LabelsPrompts']} prompts) that had no part in writing the rules "
        f"(bootstrap over prompts {v['LabelsKappaBootstrap']}; on the half that served for the rules, "
        f"{v['LabelsKappaFirstHalf']}). {v['LabelsKappaVerdict']}",
        f"By model: {v['LabelsKappaModels']}.",
        f"The two readers agree with each other with a kappa of {v['LabelsReadersKappa']} "
        f"{v['LabelsReadersKappaInterval']} there; of all {v['LabelsItems']} completions a third reader decided "
        f"{v['LabelsReadersDiffer']}.",
        f"The other rules, by three labels (by refusal or not, where ours has {v['LabelsRefusalKappa']}): {others}. "
        f"{v['LabelsBeats']}",
        f"Of {v['LabelsDegenerate']} completions that the readers call degenerate, our labels call "
        f"{v['LabelsDegenerateMissed']} compliance. Kinds most often wrong: {v['LabelsWrongKinds']}.",
        f"{v['LabelsLeftOut']} of the completions that were read are left out, because their text came out otherwise "
        "in the records at hand, or their model has none.",
        f"**{v['LabelsChanged']} % {v['LabelsChangedInterval']} of labels change** between the first "
        f"{v['LabelsShortTokens']} tokens and up to {v['LabelsLongerTokens']} ({v['LabelsChangedTexts']} completions "
        f"of {v['LabelsChangedPrompts']} prompts: {v['LabelsChangedHow']}; {v['LabelsChangedApart']} more do not "
        "begin alike, because a batch of another shape rounds differently).",
    ]
    return "\n".join(f"- {line}" for line in lines)
