"""A notebook's run: the same calls measure in chunks that survive `kill -9`, or replay what was measured before."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch

from refusal import __version__, analyses, chunks, directions, judging, models, prompts, provenance, records
from refusal.files import ROOT, CompendiumError, sha256_file, sha256_text
from refusal.steering import MAX_ALPHA, Condition

FIRST = "01_extraction"
CHOSEN_ON = ("harmful_extraction", "harmless_extraction", "harmful_selection", "harmless_selection")


@dataclass
class Run:
    """What one notebook is doing: which model, from where to where, with which parameters.

    Attributes:
        notebook: Its name, e.g. "03_sign_inversion".
        model: Registry id.
        mode: "replay" or "measure".
        out: Where figures go, and records when measuring.
        parameters: All that decide the record.
        facts: What identifies the model.
        about: Metadata of the record.
        frame: The completions; None until measured.
        raw: The same before redaction, with token ids; only when measuring, and never written.
        metric_frames: The metrics, a frame an experiment (in replay: all in one).
        store: The chunks, when measuring.
    """

    notebook: str
    model: str
    mode: str
    out: Path
    parameters: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    frame: pd.DataFrame | None = None
    raw: pd.DataFrame | None = None
    metric_frames: list[pd.DataFrame] = field(default_factory=list)
    store: chunks.Store | None = None

    @property
    def source(self) -> Path:
        """Where records and directions are read: the committed ones, or those of this run."""
        return ROOT / "data" if self.mode == "replay" else self.out


def start(notebook: str, *, model: str, mode: str, out: str, **parameters: object) -> Run:
    """Opens a run.

    Args:
        notebook: The notebook's name.
        model: A registry id.
        mode: "replay" reads committed records; "measure" measures into `out`.
        out: Folder, relative to the repository's root.
        **parameters: Whatever else decides the record; a replay refuses a record made with other values.

    Raises:
        CompendiumError: Unknown model or mode, a parameter out of range; in replay, a missing or other record.
    """
    models.entry(model)
    if mode not in ("replay", "measure"):
        raise CompendiumError(f"mode is {mode!r}, but must be 'replay' or 'measure'.")
    for name in ("rows", "max_new_tokens", "samples", "draws"):
        value = parameters.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
            raise CompendiumError(f"{name} is {value!r}, but must be a whole number from 1 to 100000.")
    dose = parameters.get("alpha", 1.0)
    if isinstance(dose, bool) or not isinstance(dose, int | float) or not 0 < dose <= MAX_ALPHA:
        raise CompendiumError(f"alpha is {dose!r}, but must be a number above 0 and at most {MAX_ALPHA:g}.")
    run = Run(notebook, model, mode, ROOT / out, dict(parameters))
    if mode == "measure":
        run.store = chunks.open_store(model)
        run.facts = run.store.facts
        return run
    completions_path, metrics_path = records.paths(run.source, model, notebook)
    if not completions_path.is_file():
        raise CompendiumError(
            f"there is no committed record {completions_path.relative_to(ROOT)}, so {notebook} cannot be replayed for "
            f"{model}: measure it with ./run_all.sh --model {model}."
        )
    run.frame, run.about = records.read(completions_path, run.parameters)
    run.metric_frames = [records.read(metrics_path, run.parameters)[0]]
    run.facts = run.about["facts"]
    return run


def load_prompts(run: Run, name: str) -> pd.DataFrame:
    """A prompt set, or its first `n_prompts` rows in a quick run (any prefix of a set is balanced)."""
    frame = prompts.load(name)
    count = run.parameters.get("n_prompts", 0)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise CompendiumError(f"n_prompts is {count!r}, but must be a whole number, 0 for all.")
    return frame.head(count) if count else frame


def completions(
    run: Run,
    frame: pd.DataFrame,
    conditions: Sequence[Condition],
    *,
    max_new_tokens: int,
    thresholds: judging.Thresholds | None = None,
    part: str = "",
) -> pd.DataFrame:
    """The record of every prompt under every condition: measured chunk by chunk, or read.

    Args:
        run: The run.
        frame: Prompts.
        conditions: What is done to the model.
        max_new_tokens: Longest completion.
        thresholds: Of the judge; None calibrates them on these very completions (notebook 01).
        part: A word for these completions, where a notebook makes several groups; it becomes part of `experiment`.

    Returns:
        Rows in the record's columns; text is redacted as in the file.

    Raises:
        CompendiumError: In replay, a record of other prompts or conditions.
    """
    experiment, digests = f"{run.notebook} {part}".strip(), _digests(frame, part)
    if run.store is None:
        assert run.frame is not None
        found = run.frame[run.frame["experiment"] == experiment].reset_index(drop=True)
        _same(run, set(found["condition"]), {condition.name for condition in conditions}, "conditions")
        if {name: one for name, one in run.about["prompts"].items() if name.rpartition(" ")[0] == part} != digests:
            raise CompendiumError(f"the record of {run.notebook} was made with other prompts: measure it again.")
        return found
    folder = models.fetch(run.model)
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))  # those that are loaded
    size *= 2 if run.facts["dtype"] == "float32" else 1  # the files hold bfloat16
    row = chunks.row_bytes(folder, run.facts["dtype"], max_new_tokens, int(frame["text"].str.len().max()))
    rows = chunks.rows_that_fit(int(run.parameters["rows"]), row, size)
    title = f"{experiment}: {run.model}"
    raw = chunks.completions(run.store, frame, conditions, max_new_tokens=max_new_tokens, rows=rows, title=title)
    joined = raw.merge(frame.rename(columns={"text": "prompt"}), on="prompt_id", validate="many_to_one")
    if thresholds is None:
        minimum = 1 if _flags(run)["quick"] else 1000
        thresholds = judging.calibrate(joined["text"].tolist(), joined["reference_nll"].tolist(), minimum=minimum)
    labelled = judging.label_frame(joined, thresholds)
    for name, value in _facts_by_condition(run, conditions, experiment, max_new_tokens).items():
        labelled[name] = labelled["condition"].map(value) if isinstance(value, dict) else value
    labelled["text_sha256"] = [sha256_text(text) for text in labelled["text"]]
    run.about |= {"thresholds": vars(thresholds), "prompts": run.about.get("prompts", {}) | digests, "rows": rows}
    run.raw = labelled
    made = records.redact(labelled[records.COMPLETIONS.names])
    run.frame = made if run.frame is None else pd.concat([run.frame, made], ignore_index=True)
    return made


def _same(run: Run, found: set[str], wanted: set[str], what: str) -> None:
    if found != wanted:
        raise CompendiumError(
            f"the record of {run.notebook} has other {what} than asked for ({sorted(found ^ wanted)[0]!r} is in one of "
            "them only): measure it again."
        )


def _digests(frame: pd.DataFrame, part: str) -> dict[str, str]:
    groups = frame.groupby("prompt_set", sort=True)
    return {f"{part} {name}".strip(): prompts.digest(group) for name, group in groups}


def _flags(run: Run) -> dict[str, bool]:
    """What keeps a record from being published."""
    return {"quick": bool(run.parameters.get("n_prompts")), "user": bool(run.parameters.get("prompts_file"))}


def _facts_by_condition(
    run: Run, conditions: Sequence[Condition], experiment: str, max_new_tokens: int
) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "model": run.model,
        "weights_sha256": run.facts["weights_sha256"],
        "dtype": run.facts["dtype"],
        "experiment": experiment,
        "max_new_tokens": max_new_tokens,
        "layers": {c.name: " ".join(map(str, c.layers)) for c in conditions},
        "seed": {c.name: -1 if c.seed is None else c.seed for c in conditions},
    }
    for name in ("operation", "direction_id", "alpha", "alpha_absolute", "alpha_relative", "position"):
        columns[name] = {c.name: getattr(c, name) for c in conditions}
    return columns


def metrics(
    run: Run,
    experiment: str,
    measure: Callable[[chunks.Store], pd.DataFrame],
    *inputs: object,
    modules: Sequence[ModuleType] = (),
) -> pd.DataFrame:
    """Rows that are no completions (geometry, screens): measured once, or read.

    Args:
        run: The run.
        experiment: Name of this group of rows within the notebook.
        measure: Makes the rows from the store; called only where nothing fitting has been measured before.
        *inputs: What decides them besides model and code: prompt digests, seeds, counts (JSON values).
        modules: Of the library, whose code decides the rows beside those that decide activations and tokens.

    Returns:
        Rows in the metrics' columns.
    """
    store = run.store
    if store is None:
        (frame,) = run.metric_frames
        return frame[frame["experiment"] == experiment].reset_index(drop=True)
    name = f"{run.notebook} {experiment}"
    return _note(run, experiment, chunks.metrics(store, name, lambda: measure(store), inputs, modules))


def _note(run: Run, experiment: str, measured: pd.DataFrame) -> pd.DataFrame:
    complete = measured.assign(experiment=experiment)
    blank = {"operation": "none", "direction_id": "", "layer": -1, "alpha": 0.0, "draw": 0, "prompt_id": ""}
    for name in blank.keys() - set(complete):
        complete[name] = blank[name]
    complete = complete[records.METRICS.names]
    run.metric_frames.append(complete)
    return complete


def openings(run: Run) -> pd.DataFrame:
    """How often each token opens a completion, and how many of those are refusals: counted from the run's completions.

    Returns:
        Metrics `refusals` (of harmful prompts), `all_refusals` and `completions`; `draw` holds the token id and
        `prompt_id` its text.
    """
    if run.store is None:
        (frame,) = run.metric_frames
        return frame[frame["experiment"] == "openings"].reset_index(drop=True)
    assert run.raw is not None
    raw = run.raw[run.raw["n_tokens"] > 0]
    first = raw["token_ids"].map(lambda ids: ids[0])
    refused = raw["label"] == "refusal"
    harmful = raw["prompt_set"].map(records.is_harmful)
    counted = {"refusals": refused & harmful, "all_refusals": refused, "completions": refused | True}
    tokens = sorted(set(first[refused]))
    texts = raw.groupby(first)["text"].first() if tokens else {}
    rows = [
        {
            "metric": name,
            "draw": token,
            "prompt_id": texts[token].split(" ")[0][:20],
            "value": float((first[mask] == token).sum()),
        }
        for token in tokens
        for name, mask in counted.items()
    ]
    return _note(run, "openings", pd.DataFrame(rows, columns=["metric", "draw", "prompt_id", "value"]))


def save_directions(run: Run, made: directions.Directions, layer: int, frame: pd.DataFrame) -> None:
    """Writes a measuring run's directions to `<out>/directions/<model>.safetensors`, and their hash to its record."""
    about = {name: run.facts[name] for name in ("weights_sha256", "template_sha256")}
    about |= {"model": run.model, "prompts_sha256": prompts.digest(frame)}
    path = run.source / "directions" / f"{run.model}.safetensors"
    directions.save(made, path, layer=layer, about=about)
    run.about["directions_sha256"] = sha256_file(path)  # safetensors does not notice flipped bits


def load_directions(run: Run) -> tuple[directions.Directions, int]:
    """The directions that notebook 01 made for this model, and the selected layer."""
    expect = {name: run.facts[name] for name in ("weights_sha256", "template_sha256")} | {"model": run.model}
    path = run.source / "directions" / f"{run.model}.safetensors"
    record = records.paths(run.source, run.model, FIRST)[0]
    if path.is_file() and record.is_file():
        wanted = records.read(record)[1].get("directions_sha256")  # older records have none
        if wanted is not None and sha256_file(path) != wanted:
            raise CompendiumError(
                f"{path} is not the file that was written with the record of {FIRST}, but damaged or of another run: "
                f"run notebook {FIRST} for this model again."
            )
    return directions.load(path, expect=expect, shape=(run.facts["layers"], run.facts["width"]))


def thresholds(run: Run) -> judging.Thresholds:
    """The judge's thresholds that notebook 01 calibrated for this model."""
    _, about = _first(run, metrics=False)
    return judging.Thresholds(**about["thresholds"])


def opening_tokens(run: Run) -> list[int]:
    """The tokens with which this model opens its refusals, as notebook 01 counted them, by the plan's rule."""
    frame, _ = _first(run, metrics=True)
    return analyses.opening_tokens(frame)


def _first(run: Run, metrics: bool) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The completions or the metrics of notebook 01 for this model."""
    path = records.paths(run.source, run.model, FIRST)[metrics]
    frame, about = records.read(path)
    if about["facts"]["weights_sha256"] != run.facts["weights_sha256"]:
        raise CompendiumError(f"{path} was made with other weights: run notebook {FIRST} for this model again.")
    return frame, about


def finish(run: Run) -> None:
    """Writes the record and the metrics of a measuring run, with their provenance; does nothing in replay."""
    if run.store is None:
        return
    completions_path, metrics_path = records.paths(run.source, run.model, run.notebook)
    run.about |= _provenance(run, run.store)
    empty = pd.DataFrame({name: [] for name in records.METRICS.names})
    assert run.frame is not None
    records.write(pd.concat(run.metric_frames) if run.metric_frames else empty, metrics_path, run.about)
    records.write(run.frame, completions_path, run.about)


def _provenance(run: Run, store: chunks.Store) -> dict[str, Any]:
    deciding = ("lib", "notebooks", "data/prompts", "data/*.csv", "data/*.yaml")
    changed = provenance.git(ROOT, "status", "--porcelain", "--", *deciding)
    hardware = {"machine": platform.machine(), "processor": provenance.processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        hardware["accelerator"] = torch.cuda.get_device_name()
    return {
        "notebook": run.notebook,
        "model": run.model,
        "parameters": run.parameters,
        "facts": run.facts,
        **_flags(run),
        "library": __version__,
        "commit": provenance.git(ROOT, "rev-parse", "HEAD"),
        "dirty": bool(changed),
        "packages": {name: packages.version(name) for name in ("nnsight", "torch", "transformers", "numpy", "pandas")},
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "wall_s": round(sum(cost["wall_s"] for cost in store.costs), 1),
        "peak_gb": round(max((cost["peak_gb"] for cost in store.costs), default=0.0), 2),
    }
