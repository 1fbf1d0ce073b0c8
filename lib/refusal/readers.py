"""What readers said of completions, and the published keyword rules that other papers label completions with.

The items, who read them and what each label means: `data/validation/README.md`.
"""

import functools
from pathlib import Path

import pandas as pd

from refusal import judging, records, registry
from refusal.analyses import LABELS, plan
from refusal.files import ROOT, CompendiumError

NOTEBOOK = "00_can_we_trust_the_labels"
ITEMS_FILE = ROOT / "data" / "validation" / "items.csv"
RULES_FILE = ROOT / "data" / "keyword_rules.csv"
ROW = ["condition", "prompt_id"]  # what tells a model's completions apart
COLUMNS = (
    "item", "model", "prompt_set", "prompt_id", "condition", "half", "text_sha256",
    "reader_1", "reader_2", "reader_3", "kind_1", "kind_2", "text",
)  # fmt: skip
MAY_BE_EMPTY = ("reader_3", "text")


def items(path: Path | None = None) -> pd.DataFrame:
    """The labels that readers gave, checked.

    Args:
        path: The file; None for the committed one.

    Returns:
        The file's columns, as text; `reference` (the readers' label: where the first two differ, the third's) and
        `kind` (the words of the first reader who gave that label).

    Raises:
        CompendiumError: The file is missing or has a defect, or holds text that must not be stored.
    """
    path = path or ITEMS_FILE
    if not path.is_file():
        raise CompendiumError(f"there is no {path.name} with the labels of readers in {path.parent}: restore it.")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise CompendiumError(f"{path} cannot be read as a table ({type(error).__name__}): restore it.") from error
    absent = [column for column in COLUMNS if column not in table]
    if absent or table.empty:
        raise CompendiumError(f"{path} has {f'no column {absent[0]!r}' if absent else 'no items'}: restore it.")
    table = table[list(COLUMNS)]
    for sentence, wrong in _defects(table).items():
        if wrong.any():
            raise CompendiumError(f"{path}, item {table['item'][wrong.to_numpy().argmax()]!r}: {sentence}.")
    table["reference"] = table["reader_1"].where(table["reader_1"] == table["reader_2"], table["reader_3"])
    second = (table["reference"] == table["reader_2"]) & (table["reference"] != table["reader_1"])
    table["kind"] = table["kind_1"].where(~second, table["kind_2"]).str.strip().str.lower()
    return table


def _defects(table: pd.DataFrame) -> dict[str, "pd.Series[bool]"]:
    """What can be wrong with an item, and with which ones it is."""
    planned = plan()[NOTEBOOK]
    of_set = table["prompt_id"].str.rpartition("-")[0]
    differ = table["reader_1"] != table["reader_2"]
    judged = {
        "label": ["refusal" if text and judging.refusing_phrase(text) else "compliance" for text in table["text"]],
        "seed_rule": [judging.seed_rule(text) for text in table["text"]],
    }
    said = table.assign(**judged)
    held = said[table["prompt_set"].map(records.is_harmful) & (table["text"] != "")]
    forbidden = [number for number in held.index if records.violations(held.loc[[number]])]
    return {
        "it occurs twice: remove one": table["item"].duplicated() | table.duplicated(["model", *ROW]),
        "a cell is empty: fill it in": (table.drop(columns=list(MAY_BE_EMPTY)) == "").any(axis=1),
        "no model of the registry has this id: correct it": ~table["model"].isin(list(registry.registry())),
        "its prompt set is not one of the plan's: correct it": ~table["prompt_set"].isin(list(planned["prompts"])),
        "its prompt is not of its prompt set: correct it": of_set != table["prompt_set"],
        "its condition is not one of the plan's: correct it": ~table["condition"].isin(planned["conditions"]),
        "half is neither A nor B: correct it": ~table["half"].isin(["A", "B"]),
        "the hash is not one of 64 digits and letters: correct it": ~table["text_sha256"].str.fullmatch("[0-9a-f]{64}"),
        f"a reader's label is none of {', '.join(LABELS)}: correct it": (
            ~table["reader_1"].isin(LABELS) | ~table["reader_2"].isin(LABELS) | ~table["reader_3"].isin([*LABELS, ""])
        ),
        "the first two readers differ and no third has decided: let one read it": differ & (table["reader_3"] == ""),
        "the first two readers agree, so a third label is too many: remove it": ~differ & (table["reader_3"] != ""),
        "text of an answer to a harmful prompt must not be stored: remove it": table.index.to_series().isin(forbidden),
    }


@functools.cache
def keyword_rules() -> dict[str, tuple[bool, list[str]]]:
    """The published rules by name: whether they ignore case, and their keywords, any of which makes a refusal."""
    table = pd.read_csv(RULES_FILE, keep_default_na=False)
    if set(table["match"]) != {"anywhere"} or not set(table["case"]) <= {"kept", "ignored"}:
        raise CompendiumError(
            f"{RULES_FILE} has a keyword that is not matched anywhere, with its case kept or ignored."
        )
    return {
        str(name): ((part["case"] == "ignored").all(), part["keyword"].tolist())
        for name, part in table.groupby("rule", sort=False)
    }


def refuses(rule: str, text: str) -> bool:
    """Whether a published rule takes a text for a refusal, applied as in its paper's code.

    "gcg" (Zou et al. 2023) looks for its "prefixes" anywhere in the text, as they are written; "arditi" (Arditi et
    al. 2024) anywhere too, in lower case. Neither normalises apostrophes, and neither knows degenerate text.
    """
    ignore, keywords = keyword_rules()[rule]
    return any(keyword.lower() in text.lower() if ignore else keyword in text for keyword in keywords)
