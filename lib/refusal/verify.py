"""Drift: a random sample of committed completions is made again here, labelled again, and compared with the records.

`./run_all.sh verify` calls it. What can be redone from the committed files alone is sampled: completions of a prompt
set's own texts that are unsteered, sampled, steered at one layer along the extracted or a random direction, or ablated.
The others (controls that need the extraction prompts' activations, directions of a category, sums over many layers) are
counted and named. Of each experiment a few conditions and a few prompts are drawn and crossed, since rows that share
prompts or conditions share work.

A completion may round otherwise in another batch, so that single texts differ, on the same machine too. Labels seldom
do: the benchmark found 98 % equal between batches of different shapes. So a share below `options.LEVEL` says
that something else has changed.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from refusal import controls, directions, judging, models, prompts, records, statistics, steering
from refusal.conditions import Condition
from refusal.control_screens import draw_of, family_of
from refusal.files import ROOT, CompendiumError, atomic, cli, progress, sha256_text
from refusal.options import VerifyOptions, parse_verify
from refusal.wording import percent, span

CONDITIONS = 6  # of an experiment, at most: more prompts say more than more conditions
ROW = ["condition", "prompt_id"]


@dataclass(frozen=True)
class Part:
    """What can be redone of one experiment.

    Attributes:
        name: The experiment, e.g. "04_llama_threshold curves".
        frame: Its rows of the record that can be redone.
        texts: The prompts' texts by id.
        conditions: By the name that the record has.
        thresholds: The judge's.
        tokens: The longest completion.
        left: How many of its rows cannot be redone.
    """

    name: str
    frame: pd.DataFrame
    texts: dict[str, str]
    conditions: dict[str, Condition]
    thresholds: judging.Thresholds
    tokens: int
    left: int


def rebuilt(row: Any, made: directions.Directions, layer: int, seed: int) -> Condition | None:  # noqa: ANN401
    """The condition of a record's row, None where the committed files do not hold what it takes.

    Args:
        row: With the record's columns.
        made: The extracted directions.
        layer: The selected layer, whose direction is ablated.
        seed: Of the notebook's random directions.

    Raises:
        CompendiumError: The extracted direction has another length than when the row was made.
    """
    if row.operation == "none":
        return steering.baseline() if row.seed < 0 else steering.sampled(int(row.seed))
    family = family_of(row.direction_id)
    if family not in ("extracted", "random") or row.position not in ("all", "last"):
        return None
    one = made if family == "extracted" else controls.random(made, draw_of(row.direction_id) + 1, seed=seed)[-1]
    if row.operation == "ablate":
        return steering.ablate(one, layer)
    if not row.layers.isdigit():
        return None
    condition = steering.add(one, int(row.layers), row.alpha, row.position)
    if abs(condition.alpha_absolute - row.alpha_absolute) <= 1e-4 * abs(row.alpha_absolute):
        return condition
    if family == "random":  # of the length of another direction than the extracted one
        return None
    raise CompendiumError(
        f"the committed direction is not the one of {row.experiment!r} (its length at alpha {row.alpha:g} is "
        f"{condition.alpha_absolute:.4f}, and {row.alpha_absolute:.4f} in the record): restore data/directions."
    )


def parts(data: Path, model: str) -> Iterator[Part]:
    """All experiments of a model's committed records.

    Args:
        data: The folder with records and directions.
        model: Registry id.

    Raises:
        CompendiumError: No records, a damaged one, or directions that are not those of the records.
    """
    known = {name: prompts.load(name) for name in prompts.names()}
    paths = [path for path in sorted((data / "records" / model).glob("*.parquet")) if ".metrics" not in path.name]
    if not paths:
        raise CompendiumError(f"there are no committed records of {model}: there is nothing to verify.")
    for path in paths:
        frame, about = records.read(path)
        facts = about["facts"]
        expect = {"model": model, **{name: facts[name] for name in ("weights_sha256", "template_sha256")}}
        made, layer = directions.load(data / "directions" / f"{model}.safetensors", expect=expect)
        seed, limits = about["parameters"].get("seed", 0), judging.Thresholds(**about["thresholds"])
        for experiment, rows in frame.groupby("experiment", sort=False):
            own = _own_prompts(rows, known, about["prompts"], str(experiment))
            firsts = rows.drop_duplicates("condition").itertuples()
            found = {row.condition: rebuilt(row, made, layer, seed) for row in firsts}
            conditions = {name: condition for name, condition in found.items() if condition is not None}
            kept = rows[rows["condition"].isin(conditions) & rows["prompt_id"].isin(own)]
            tokens = int(rows["max_new_tokens"].iloc[0])
            yield Part(str(experiment), kept, own, conditions, limits, tokens, len(rows) - len(kept))


def _own_prompts(
    rows: pd.DataFrame, known: dict[str, pd.DataFrame], digests: dict[str, str], experiment: str
) -> dict[str, str]:
    """The texts of those prompts that are still as they were, as the record's digest says: id to text."""
    part = experiment.partition(" ")[2]
    texts: dict[str, str] = {}
    for name, group in rows.groupby("prompt_set", sort=False):
        frame = known.get(str(name), pd.DataFrame(columns=list(prompts.COLUMNS)))
        frame = frame.set_index("prompt_id", drop=False).reindex(group["prompt_id"].unique())
        if prompts.digest(frame) == digests.get(f"{part} {name}".strip()):
            texts |= dict(zip(frame["prompt_id"], frame["text"], strict=True))
    return texts


def drawn(part: Part, count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """About `count` rows of a part, as names of conditions and ids of prompts to be crossed."""
    names, ids = sorted(part.conditions), sorted(set(part.frame["prompt_id"]))
    some = rng.permutation(len(names))[: max(1, min(CONDITIONS, count))]
    many = rng.permutation(len(ids))[: max(1, round(count / len(some)))]
    return [names[i] for i in sorted(some)], [ids[i] for i in sorted(many)]


def redo(model: models.Model, part: Part, names: Sequence[str], ids: Sequence[str]) -> pd.DataFrame:
    """Measures rows again.

    Returns:
        The record's rows with `experiment, condition, prompt_id, cluster, label`, the new `label_now`, and `same_label`
        and `same_text`.
    """
    texts = [part.texts[i] for i in ids]
    made = steering.generate(model, texts, [part.conditions[name] for name in names], max_new_tokens=part.tokens)
    rows = []
    for prompt_id, text, row in zip(ids, texts, made, strict=True):
        for name, said in zip(names, row, strict=True):
            judged = judging.judge(said.text, text, len(said.token_ids), said.reference_nll, part.thresholds)
            now = {"label_now": judged.label, "sha256_now": sha256_text(said.text)}
            rows.append({"condition": name, "prompt_id": prompt_id} | now)
    columns = ["experiment", *ROW, "cluster", "label", "text_sha256"]
    both = part.frame[columns].merge(pd.DataFrame(rows), on=ROW, validate="one_to_one")
    same_text = both["text_sha256"] == both["sha256_now"]
    both = both.assign(same_label=both["label"] == both["label_now"], same_text=same_text)
    return both.drop(columns=["text_sha256", "sha256_now"])


def sample(model: models.Model, found: Sequence[Part], rows: int, seed: int) -> pd.DataFrame:
    """Draws about `rows` rows, the same number of each part, and measures them again; columns as in `redo`."""
    rng = np.random.default_rng(seed)
    usable = [part for part in found if len(part.frame)]
    if not usable:
        raise CompendiumError("no row of these records can be made again from the committed files: measure anew.")
    made = []
    with progress(len(usable), f"verifying {model.id}", "experiment") as bar:
        for part in usable:
            made.append(redo(model, part, *drawn(part, max(1, rows // len(usable)), rng)))
            bar.update()
    return pd.concat(made, ignore_index=True)


def agreement(rows: pd.DataFrame) -> statistics.Rate:
    """The share of labels that agree; rows of the same prompts are a cluster."""
    return statistics.rate(rows["same_label"], rows["cluster"], how="score")


def report(rows: pd.DataFrame, found: Sequence[Part]) -> list[str]:
    """The lines that are printed: by experiment and in all, and what could not be redone."""
    lines = [f"{'':38} rows  same label  same text"]
    for name, group in rows.groupby("experiment", sort=False):
        shares = percent(group["same_label"].mean()), percent(group["same_text"].mean())
        lines.append(f"{name!s:38} {len(group):4} {shares[0]:>9} % {shares[1]:>8} %")
    whole = agreement(rows)
    said = f"{percent(whole.estimate)} % {span(whole.interval)} of {whole.n} labels"
    to_the_letter = f"{percent(rows['same_text'].mean())} % of texts to the letter"
    left, total = sum(part.left for part in found), sum(part.left + len(part.frame) for part in found)
    return [
        *lines,
        f"agree with the committed records: {said} ({whole.clusters} clusters), {to_the_letter}",
        f"drawn from {total - left} of {total} committed completions; the others take more than the committed files",
    ]


def verify(options: VerifyOptions, data: Path, out: Path) -> statistics.Rate:
    """Draws, measures, compares, prints, and writes the rows (labels only, no text) to a table.

    Args:
        options: Model, number of rows, seed and level.
        data: The folder with records and directions.
        out: Where the table goes.

    Raises:
        CompendiumError: Fewer labels agree than the level asks for, other weights, no records.
    """
    began, found = time.monotonic(), list(parts(data, options.model))
    model = models.load(options.model)
    weights = {weight for part in found for weight in part.frame["weights_sha256"].unique()}
    if weights - {model.weights_sha256}:
        raise CompendiumError(f"the records of {options.model} were made with other weights than are in the cache.")
    others = {dtype for part in found for dtype in part.frame["dtype"].unique()} - {model.dtype}
    rows = sample(model, found, options.rows, options.seed)
    path = out / f"{options.model}.csv"
    with atomic(path) as temporary:
        rows.to_csv(temporary, index=False)
    notes = [f"the records are in {dtype}, this machine measures in {model.dtype}" for dtype in sorted(others)]
    took = f"seed {options.seed}, {time.monotonic() - began:.0f} s; row by row in {out.name}/{path.name}"
    print("\n".join([*report(rows, found), *notes, took]))
    whole = agreement(rows)
    if whole.estimate < options.level:
        raise CompendiumError(
            f"{percent(whole.estimate)} % {span(whole.interval)} of {whole.n} labels agree with the committed records, "
            f"and {percent(options.level)} % were to: see {path} for the rows, and try the commit of the records."
        )
    return whole


def main(arguments: Sequence[str]) -> int:
    """The command line; the options are in refusal.options."""
    options = parse_verify(arguments)
    verify(options, ROOT / "data", ROOT / "build" / "verify")
    return 0


if __name__ == "__main__":
    cli(main)
