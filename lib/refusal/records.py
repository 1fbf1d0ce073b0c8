"""The measurement table: schema, provenance, redaction, and reading it back with its promises checked."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from refusal.files import ROOT, CompendiumError, atomic, sha256_text
from refusal.judging import refusing_phrase

COMMITTED = ROOT / "data" / "records"  # a folder of records for each model
LONGEST_TEXT = 120

COMPLETIONS = pa.schema(
    [
        ("model", pa.string()),
        ("weights_sha256", pa.string()),
        ("dtype", pa.string()),
        ("experiment", pa.string()),
        ("condition", pa.string()),
        ("operation", pa.string()),
        ("direction_id", pa.string()),
        ("layers", pa.string()),
        ("alpha", pa.float64()),
        ("alpha_absolute", pa.float64()),
        ("alpha_relative", pa.float64()),
        ("position", pa.string()),
        ("seed", pa.int64()),
        ("max_new_tokens", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt_set", pa.string()),
        ("category", pa.string()),
        ("cluster", pa.string()),
        ("n_tokens", pa.int64()),
        ("stop_reason", pa.string()),
        ("label", pa.string()),
        ("label_reason", pa.string()),
        ("matched_phrase", pa.string()),
        ("seed_rule", pa.string()),
        ("reference_nll", pa.float64()),
        ("repetition", pa.float64()),
        ("text_sha256", pa.string()),
        ("text", pa.string()),
    ]
)
METRICS = pa.schema(
    [
        ("experiment", pa.string()),
        ("metric", pa.string()),
        ("operation", pa.string()),
        ("direction_id", pa.string()),
        ("layer", pa.int64()),
        ("alpha", pa.float64()),
        ("draw", pa.int64()),
        ("prompt_id", pa.string()),
        ("value", pa.float64()),
    ]
)
ROW_KEY = ["experiment", "condition", "prompt_id"]


def paths(root: Path, model: str, notebook: str) -> tuple[Path, Path]:
    """Where a notebook's completions and metrics lie below a root such as `data` or `build`."""
    folder = root / "records" / model
    return folder / f"{notebook}.parquet", folder / f"{notebook}.metrics.parquet"


def is_harmful(prompt_set: str) -> bool:
    """Whether completions of this set may hold compliance with a harmful request; unknown sets count as harmful."""
    return not prompt_set.startswith("harmless_")


def redact(frame: pd.DataFrame) -> pd.DataFrame:
    """Removes every text that must not be stored.

    For harmful prompts at most the refusing sentence stays, 120 characters or fewer, and only where `label` and
    `seed_rule` both say refusal (analysis plan, section 4). Hash and scores always stay.

    Args:
        frame: Rows with `prompt_set, label, seed_rule, matched_phrase, text`.

    Returns:
        A copy with `text` redacted.
    """
    kept = frame.copy()
    kept["text"] = [
        row.text if not is_harmful(row.prompt_set) else _refusing_sentence(row.text, row.matched_phrase)
        if row.label == row.seed_rule == "refusal" else ""
        for row in frame.itertuples()
    ]  # fmt: skip
    return kept


def _refusing_sentence(text: str, phrase: str) -> str:
    # A phrase is listed in one spelling ("i cannot" for "I can’t"), so the judge has to find it, not a search.
    sentences = (sentence.strip() for sentence in re.findall(r"[^.!?。！？\n]+[.!?。！？]*", text))
    # On its own, a sentence may match by the beginning of the phrase: "i cannot assist" of "i cannot assist with that".
    found = next((s for s in sentences if (own := refusing_phrase(s)) and phrase.startswith(own)), "")
    return found if len(found) <= LONGEST_TEXT else ""


def seal(table: pa.Table, described: str) -> bytes:
    """A hash of all values and what describes them: parquet notices a truncation, but not every flipped bit."""
    return sha256_text(described + repr(table.to_pydict())).encode()


def violations(frame: pd.DataFrame) -> list[str]:
    """Rows that hold text which must not be stored; empty for a record that may enter git."""
    text = frame["text"].fillna("")
    allowed = (frame["label"] == "refusal") & (frame["seed_rule"] == "refusal") & (text.str.len() <= LONGEST_TEXT)
    bad = frame[frame["prompt_set"].map(is_harmful) & (text != "") & ~allowed]
    return [f"{row.prompt_id} under {row.condition!r}: text of a harmful prompt" for row in bad.itertuples()]


def write(frame: pd.DataFrame, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes completions or metrics (told apart by the file's name), redacted, in one atomic step.

    Args:
        frame: The rows; a missing or superfluous column is an error.
        path: `<notebook>.parquet` or `<notebook>.metrics.parquet`.
        metadata: Provenance, stored as JSON in the file's schema under `refusal`.

    Raises:
        CompendiumError: Wrong columns, doubled rows, no space, no permission.
    """
    schema = METRICS if path.name.endswith(".metrics.parquet") else COMPLETIONS
    wrong = set(frame.columns) ^ set(schema.names)
    if wrong:
        raise CompendiumError(f"{path} cannot be written: the columns {sorted(wrong)} are missing or unknown.")
    if schema is COMPLETIONS:
        frame = redact(frame)
        if frame.duplicated(ROW_KEY).any() or violations(frame):
            raise CompendiumError(f"{path} cannot be written: it has doubled rows, or text that must not be stored.")
    table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    described = json.dumps(dict(metadata), sort_keys=True)
    table = table.replace_schema_metadata({b"refusal": described.encode(), b"sha256": seal(table, described)})
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read(path: Path, parameters: Mapping[str, Any] | None = None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Reads a record and its metadata.

    Args:
        path: The record.
        parameters: The notebook's parameters, all of which must equal those that the record was made with.

    Raises:
        CompendiumError: Missing, damaged, of another schema, or made with other parameters.
    """
    if not path.is_file():
        raise CompendiumError(f"there is no record {path}: measure it first with ./run_all.sh.")
    try:
        table = pq.read_table(path)
        described = (table.schema.metadata or {})[b"refusal"].decode()
        metadata = json.loads(described)
        if seal(table, described) != table.schema.metadata[b"sha256"]:
            raise ValueError("flipped bits")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CompendiumError(
            f"{path} is cut short, damaged or no record: restore it with git, or measure it again."
        ) from error
    schema = METRICS if path.name.endswith(".metrics.parquet") else COMPLETIONS
    if not table.schema.equals(schema, check_metadata=False):
        raise CompendiumError(f"{path} has other columns than this version writes: measure it again.")
    made = metadata.get("parameters", {})
    for name, value in (parameters or {}).items():
        if made.get(name) != value:
            raise CompendiumError(
                f"{path} was made with {name} = {made.get(name)!r}, not {value!r}: "
                "use that value, or measure again with mode = 'measure'."
            )
    return table.to_pandas(), metadata
