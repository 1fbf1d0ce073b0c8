"""How much computing a notebook takes on a model, counted before it is done.

Parameters follow from the shape in the registry. Prompts and tokens of completions are those in the committed record of
each notebook (another model's says as many), readings of first tokens those that the analysis plan asks for.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from refusal import control_screens, engine, prompts, records, window_runs
from refusal.analyses import plan
from refusal.directions import candidate_layers
from refusal.options import DEFAULT_MODEL
from refusal.registry import Entry

OWN_TOKENS = 24  # of a prompt, after the beginning that all share: 22 or 23 in the mean on the default model
MATCHING_CALLS = 5  # in the mean, until a control's KL is that of the extracted direction


def parameters(known: Entry) -> tuple[int, int, int]:
    """Numbers of parameters in the matrices of the blocks, in the output layer, and in all; norms and biases left out.

    Args:
        known: An entry with a shape.
    """
    shape, width = known.shape, known.width
    assert shape is not None
    attention = 2 * width * shape.head_width * (shape.heads + shape.kv_heads)
    body = known.blocks * (attention + 3 * width * shape.feed_forward)
    head = shape.vocabulary * width
    return body, head, body + head * (1 if shape.tied else 2)


def record_of(model: str, notebook: str, root: Path) -> Path | None:
    """A committed record of a notebook: the model's own, or else the default model's, or else none."""
    paths = (records.paths(root.parent, name, notebook)[0] for name in (model, DEFAULT_MODEL))
    return next((path for path in paths if path.is_file()), None)


def _prompts(*names: str) -> int:
    return sum(len(prompts.load(name)) for name in names)


def readings(notebook: str, blocks: int, layer: int, given: Mapping[str, Any]) -> list[tuple[int, float]]:
    """First-token readings and activations of a notebook: how many, and the share of the blocks that each runs.

    Args:
        notebook: Its name.
        blocks: Of the model.
        layer: The steered layer.
        given: The notebook's parameters.
    """
    above = 1 - (layer + 1) / blocks
    extraction = _prompts("harmful_extraction", "harmless_extraction")
    planned = plan().get(notebook, {})
    if notebook == "01_extraction":
        layers = candidate_layers(blocks)
        share = sum(1 - (one + 1) / blocks for one in layers) / len(layers)
        held_out = _prompts("harmful_evaluation", "harmless_evaluation")
        screened = _prompts("harmful_selection", "harmless_selection")
        return [(screened * 2 * len(layers), share), (extraction + held_out + screened, 1.0)]
    if notebook == "02_orthogonal_controls":
        screened, matching = (sum(planned[use].values()) for use in ("screened", "matching"))
        directions = 1 + (len(control_screens.FAMILIES) * given["draws"]) + given["balanced"]
        scaled = matching * 2 * (1 + len(control_screens.MATCHED) * given["matched"]) * MATCHING_CALLS
        ablated = screened * (1 + len(control_screens.MATCHED) * given["ablated"])
        return [(screened * 2 * directions, above), (scaled, above), (ablated, 1.0)]
    if notebook == "05_polyhedral_cones":
        kinds = 3 * prompts.load("harmful_extraction")["category"].nunique()  # a direction, a topic, and what is left
        directions = kinds + planned["random_directions"] + planned["combinations"]
        return [
            (sum(planned["screened"].values()) * 2 * directions, above),
            (extraction + _prompts("harmless_topics"), 1.0),
        ]
    if notebook == "06_layer_sweep":
        doses = sum(alpha != 0 for alpha in planned["alphas"])
        return [(sum(planned["screened"].values()) * blocks * doses, 0.5)]
    if notebook == "07_therapeutic_window":
        count = window_runs.KL_PROMPTS * len(planned["prompts"])
        middle = window_runs.third(blocks, window_runs.MIDDLE)[0]
        return [(count * len(window_runs.doses("one")), above),
                (count * len(window_runs.doses("many")), 1 - (middle + 1) / blocks)]  # fmt: skip
    return []


@functools.cache
def _counted(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    frame, about = records.read(path)
    blocks = about["facts"]["layers"]
    first = frame["layers"].map(lambda layers: int(layers.split()[0]) if layers else blocks - 1)
    frame = frame.assign(
        tokens=frame["n_tokens"] + (frame["stop_reason"] == "stop"),
        steered=(frame["layers"] != "").astype(float),
        above=1 - (first + 1) / blocks,
    )
    return frame[["experiment", "prompt_id", "layers", "tokens", "steered", "above"]], about


def work(known: Entry, notebook: str, path: Path, rows: int) -> tuple[float, float]:
    """Floating-point operations of a notebook (two a parameter and token, attention left out), and passes.

    A completion's tokens go through the whole unsteered model, which scores them, and once more through the blocks
    above the steered one. Rows that say the same share the first of these, so that this is an upper bound.

    Args:
        known: An entry with a shape.
        notebook: Its name.
        path: A record of the notebook, of any model.
        rows: Completions at once.
    """
    frame, about = _counted(path)
    body, head, _ = parameters(known)
    tokens = frame["tokens"]
    made = float((tokens * (body * (1 + frame["above"]) + head * (1 + frame["steered"]))).sum())
    asked = frame.drop_duplicates(["experiment", "prompt_id"])
    made += OWN_TOKENS * body * float(len(asked) + frame["above"].sum())
    steps = 2 * math.ceil(len(frame) / rows) * about["parameters"]["max_new_tokens"]
    prompts_read = len(asked) + float(frame["steered"].sum())
    one = frame[(frame["layers"] != "") & ~frame["layers"].str.contains(" ")]["layers"]
    depth = (int(one.mode().iloc[0]) if len(one) else candidate_layers(about["facts"]["layers"])[-1]) + 1
    layer = max(round(depth / about["facts"]["layers"] * known.blocks) - 1, 0)
    for count, share in readings(notebook, known.blocks, layer, about["parameters"]):
        made += count * (OWN_TOKENS * body * share + head)
        prompts_read += count
    return 2 * made, steps + OWN_TOKENS * prompts_read / engine.PASS_TOKENS
