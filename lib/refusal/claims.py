"""The ledger: every published claim with a verdict for each model, from records, as a table, a page and a command.

`./run_all.sh claims` prints it; `./run_all.sh claims ID` shows all there is to know about one claim.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from refusal import claim_file
from refusal.claim_evidence import (
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_MEASURED,
    NOT_TESTABLE,
    REPLICATED,
    VERDICTS,
    Evidence,
    Finding,
    NotMeasuredError,
)
from refusal.claim_file import Claim, Ledger
from refusal.claim_tests import TESTS
from refusal.files import ROOT, CompendiumError, cli
from refusal.options import DEFAULT_MODEL, measured, parse_claims
from refusal.records import COMMITTED
from refusal.wording import people

BESIDE = 3  # so many columns of verdicts fit a page of the paper
MODEL_FREE = ("published_jump", "published_rate", "published_p")  # of published counts: no record of a model


def examine(claim: Claim, evidence: Evidence) -> Finding:
    """What the records say of one claim.

    Raises:
        CompendiumError: A record is damaged, or lacks what the test needs; the message names the claim.
    """
    if not claim.test:
        return Finding(NOT_TESTABLE, f"needs {claim.needs}")
    try:
        return TESTS[claim.test](evidence, **claim.arguments)
    except NotMeasuredError as error:
        return Finding(NOT_MEASURED, str(error))
    except CompendiumError as error:
        raise CompendiumError(f"claim {claim.id}: {error}") from error


def command(claim: Claim, model: str) -> str:
    """What measures a claim's evidence again."""
    words = [] if model == DEFAULT_MODEL else ["--model", model]
    return " ".join(["./run_all.sh", *words, "--only", claim.notebook[:2]])


def comparison(claim: Claim) -> str:
    """What a claim is tested on, "" for nothing: claims that differ in what they expect there may share it."""
    shared = {name: value for name, value in claim.arguments.items() if name not in ("claimed", "limit")}
    return f"{claim.test} {shared}" if claim.test else ""


def verdicts(records: Path, model: str, ledger: Ledger | None = None) -> pd.DataFrame:
    """The verdict on every claim, for one model.

    Args:
        records: The folder with a folder of records for each model; a test may look at several models.
        model: Registry id.
        ledger: The claims; by default those of data/claims.yaml.

    Returns:
        A row a claim, in the file's order: `claim` (its id), `document, place, quote, sentence`; `test` (with its
        arguments, "" for none), `comparison`; `verdict` (one of VERDICTS), `numbers` (with interval and p), `power`
        (where inconclusive); `command, record, figure, notebook` (record and figure as paths from the root).

    Raises:
        CompendiumError: A fault in the file, or a record that is damaged.
    """
    evidence, rows = Evidence(records, model), []
    for claim in (ledger or claim_file.read()).claims:
        found = examine(claim, evidence)
        tested = bool(claim.test)
        free = claim.test in MODEL_FREE
        rows.append(
            {
                "claim": claim.id,
                "document": claim.document,
                "place": claim.place,
                "quote": claim.quote,
                "sentence": claim.claim,
                "test": f"{claim.test} {dict(claim.arguments)}" if tested else "",
                "comparison": comparison(claim),
                "verdict": found.verdict,
                "numbers": found.numbers,
                "power": found.power,
                "command": command(claim, model) if tested else "",
                "record": f"data/records/{model}/{claim.notebook}.parquet" if tested and not free else "",
                "figure": f"figures/{model}/{claim.figure}.png" if claim.figure else "",
                "notebook": claim.notebook,
            }
        )
    return pd.DataFrame(rows)


def all_verdicts(records: Path, models: Sequence[str], ledger: Ledger | None = None) -> dict[str, pd.DataFrame]:
    """`verdicts` of several models.

    Raises:
        CompendiumError: No model, or what `verdicts` raises.
    """
    if not models:
        raise CompendiumError(f"there is no record in {records}: run ./run_all.sh first.")
    return {model: verdicts(records, model, ledger) for model in models}


# ---- words and numbers


def counts(table: pd.DataFrame) -> dict[str, int]:
    """How many claims have each verdict."""
    return {verdict: int((table["verdict"] == verdict).sum()) for verdict in VERDICTS}


def sentence(table: pd.DataFrame, model: str) -> str:
    """The ledger in a sentence."""
    of = counts(table)
    rest = f"; {of[NOT_MEASURED]} not measured yet" if of[NOT_MEASURED] else ""
    return (
        f"On {people(model)}, {of[REPLICATED]} of {len(table)} claims are replicated, {of[CONTRADICTED]} contradicted "
        f"and {of[INCONCLUSIVE]} inconclusive; {of[NOT_TESTABLE]} cannot be tested here{rest}."
    )


def numbers(table: pd.DataFrame, model: str) -> dict[str, str]:
    """The ledger's macros, of one model.

    Args:
        table: From `verdicts`.
        model: Registry id.
    """
    against = table.loc[table["verdict"] == CONTRADICTED, "claim"]
    return {
        "LedgerClaims": str(len(table)),
        "LedgerDocuments": str(table["document"].nunique()),
        "LedgerComparisons": str(table.loc[table["comparison"] != "", "comparison"].nunique()),
        "LedgerReplicated": str(counts(table)[REPLICATED]),
        "LedgerAgainst": ", ".join(against) or "none",
        "LedgerSentence": sentence(table, model),
    }


def _each(tables: Mapping[str, pd.DataFrame], row: int, joint: str = "; ") -> str:
    """The verdicts on one claim, of all models."""
    if len(tables) == 1:
        return str(next(iter(tables.values()))["verdict"].iloc[row])
    return joint.join(f"{people(model)}: {table['verdict'].iloc[row]}" for model, table in tables.items())


def _said(row: "pd.Series[str]") -> str:
    return f"{row['numbers']}{'' if row['numbers'].endswith('.') else '.'} {row['power']}".strip()


def shown(tables: Mapping[str, pd.DataFrame], document: str = "") -> pd.DataFrame:
    """The ledger as strings, for a notebook and the paper; what is measured is that of the first model.

    Args:
        tables: `verdicts` by model.
        document: Only the claims of one.
    """
    first = next(iter(tables.values()))
    rows = [
        [f"{row['claim']}: {row['sentence']}", f"“{row['quote']}” ({row['place']})", _said(row), _each(tables, number)]
        for number, (_, row) in enumerate(first.iterrows())
        if document in ("", row["document"])
    ]
    return pd.DataFrame(rows, columns=["claim", "published", "measured", "verdict"])


def paper_tables(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """A table a document for the paper, by name: claims_study ...; a few models have a column of verdicts each."""
    made = {}
    for document in map(str, next(iter(tables.values()))["document"].unique()):
        frame = shown(tables, document)
        if 1 < len(tables) <= BESIDE:
            frame = frame.drop(columns="verdict")
            for model, table in tables.items():
                frame[people(model)] = list(table["verdict"][table["document"] == document])
        made[f"claims_{document}"] = frame
    return made


def _link(words: str, target: str) -> str:
    """A link to what is there; nothing to what is not."""
    return f"[{words}]({target})" if target and (ROOT / target).exists() else ""


def markdown(tables: Mapping[str, pd.DataFrame]) -> str:
    """The ledger for the README: counts by model, then every claim of each document, folded."""
    ledger, (model, first) = claim_file.read(), next(iter(tables.items()))
    lines = ["| verdict | " + " | ".join(people(one) for one in tables) + " |", "| --- |" + " --- |" * len(tables)]
    every = [counts(table) for table in tables.values()]
    lines += [f"| {verdict} | " + " | ".join(str(of[verdict]) for of in every) + " |" for verdict in VERDICTS]
    for document, name in ledger.documents.items():
        part = first[first["document"] == document]
        lines += ["", f"<details><summary>{name}: {len(part)} claims</summary>", ""]
        lines += [f"| claim | published | verdict | measured on {people(model)} | evidence |", "| --- " * 5 + "|"]
        for number, row in part.iterrows():
            links = (_link("notebook", f"notebooks/{row['notebook']}.ipynb"), _link("record", row["record"]),
                     _link("figure", row["figure"]), f"`{row['command']}`" if row["command"] else "")  # fmt: skip
            cells = (f"**{row['claim']}**: {row['sentence']}", f"“{row['quote']}”, {row['place']}",
                     _each(tables, int(str(number)), "<br>"), _said(row), ", ".join(filter(None, links)))  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines += ["", "</details>"]
    return "\n".join(lines)


# ---- the command


def page(claim: Claim, rule: str, tables: Mapping[str, pd.DataFrame]) -> str:
    """All there is to know about one claim, for a terminal."""
    lines = [claim.id, "", *_filled("source", claim.source), *_filled("quote", claim.quote)]
    lines += [*_filled("claim", claim.claim), *_filled("counts as replicated", claim.replicated)]
    lines += _filled("behind the figure", claim.behind) + (_filled("rule", rule) if rule else [])
    for model, table in tables.items():
        row = table.set_index("claim").loc[claim.id]
        lines += ["", *_filled(people(model), f"{row['verdict'].upper()}: {_said(row)}")]
        for name in ("command", "record", "figure"):
            lines += _filled(name, row[name]) if row[name] else []
    return "\n".join(lines)


def _filled(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=f"{name:>21}  ", subsequent_indent=" " * 23, break_on_hyphens=False)


def _indented(text: str, first: int, others: int) -> list[str]:
    return textwrap.wrap(text, 112, initial_indent=" " * first, subsequent_indent=" " * others)


def report(tables: Mapping[str, pd.DataFrame]) -> str:
    """The whole ledger, for a terminal: each claim, with what was found on each model; the counts last."""
    ledger, lines = claim_file.read(), ["A claim about another model is put to ours: the effect is compared.", ""]
    first = next(iter(tables.values()))
    for document, name in ledger.documents.items():
        lines += [name, ""]
        for number, row in first[first["document"] == document].iterrows():
            lines += _indented(f"{row['claim']}: {row['sentence']}", 2, 2)
            for model, table in tables.items():
                found = table.loc[number]
                lines += _indented(f"{found['verdict']} on {people(model)}: {_said(found)}", 6, 8)
            lines.append("")
    lines += [sentence(table, model) for model, table in tables.items()]
    return "\n".join([*lines, "./run_all.sh claims ID shows source, rule, command, record and figure of a claim."])


def main(arguments: Sequence[str]) -> int:
    """Prints the ledger of the committed records, or what there is on single claims."""
    options, ledger = parse_claims(arguments), claim_file.read()
    records = Path(options.records) if options.records else COMMITTED
    chosen = [ledger.claim(name) for name in options.claims]
    asked = replace(ledger, claims=tuple(chosen)) if chosen else ledger  # the other tests take half a minute
    tables = all_verdicts(records, options.models or measured(records), asked)
    pages = [page(claim, ledger.rules.get(claim.test, ""), tables) for claim in chosen]
    print("\n\n".join(pages) if pages else report(tables))
    return 0


if __name__ == "__main__":
    cli(main)
