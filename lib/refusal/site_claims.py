"""The ledger as a page of the site: each published claim with its verdicts, and links to what they rest on.

Verdicts, numbers and sentences come from `refusal.claims`; nothing is decided here.
"""

from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path

import pandas as pd

from refusal.site_pages import record_links
from refusal.wording import people

HEAD = """# Published claims

Every claim of the documents that a measurement could bear on. Verdicts follow from the records by rules that stand in
{download}`claims.yaml <files/claims.yaml>`, with what would count as replicated, and with what stands behind each
published figure; its head says which rules were written after a first model had been measured. A claim about another
model is put to ours: what compares is the effect, not the figure.
"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _evidence(row: "pd.Series[str]", model: str, files: Path, placed: Set[str]) -> str:
    links = [f"[notebook](notebooks/{row['notebook']}.ipynb)"]
    links += record_links(files, model, row["notebook"], "") if row["record"] else []
    if (figure := Path(row["figure"]).stem) in placed:
        links.append(f"{{ref}}`figure <{figure}>`")
    return ", ".join([*links, *([f"`{row['command']}`"] if row["command"] else [])])


def overview(tables: Mapping[str, pd.DataFrame]) -> str:
    """How many claims have each verdict on each model."""
    counted = {model: Counter(table["verdict"]) for model, table in tables.items()}
    names = list(dict.fromkeys(verdict for of in counted.values() for verdict in of))
    rows = [f"| {name} | " + " | ".join(str(of[name]) for of in counted.values()) + " |" for name in names]
    head = "| verdict | " + " | ".join(people(model) for model in tables) + " |"
    return "\n".join([head, "| --- |" + " ---: |" * len(tables), *rows, ""])


def claims_page(
    tables: Mapping[str, pd.DataFrame],
    documents: Mapping[str, str],
    about: Mapping[str, Mapping[str, str]],
    files: Path,
    placed: Set[str],
) -> str:
    """The page.

    Args:
        tables: `claims.verdicts` by model.
        documents: The documents' names by key.
        about: For each claim what counts as replicated, and what stands behind the figure: `replicated`, `behind`.
        files: The folder `files` of the site's source.
        placed: The figures that have a place in a notebook's page.
    """
    text, first = [HEAD, overview(tables)], next(iter(tables.values()))
    for document, name in documents.items():
        text += [f"## {name}", ""]
        for number, row in first[first["document"] == document].iterrows():
            text += [f"(claim-{row['claim']})=", f"### {row['claim']}", "", f"{row['sentence']}", ""]
            text += [f"- Published: “{row['quote']}” ({row['place']})."]
            text += [f"- Behind the figure: {_cell(about[row['claim']]['behind'])}"]
            text += [f"- Replicated would be: {_cell(about[row['claim']]['replicated'])}", ""]
            text += ["| model | verdict | measured | evidence |", "| --- | --- | --- | --- |"]
            for model, table in tables.items():
                own = table.loc[number]
                said = _cell(f"{own['numbers']} {own['power']}")
                text.append(
                    f"| {people(model)} | **{own['verdict']}** | {said} | {_evidence(own, model, files, placed)} |"
                )
            text.append("")
    return "\n".join(text)
