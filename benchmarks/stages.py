"""The stages: what is measured, in which order, with a fixed amount of work each.

A stage returns timings, agreement and values. One that is killed is measured again from its beginning.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

from benchmarks.bench import BATCH, Bench, Measured, agreement, attempt, measure, texts
from benchmarks.summary import LLAMA
from refusal import prompts
from refusal.options import DEFAULT_MODEL, BenchOptions

ALPHAS = (-2.5, -2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 2.5)
SCREEN_ALPHAS = (*ALPHAS[:5], 0.0, *ALPHAS[5:])
CONTESTANTS = ("engine", "transformers", "nnsight", "steering-vectors", "repeng")
PROMPTS, FEW, HALF, LONGEST = 96, 16, 48, 48
ROUNDS = 3
SCALING_TOKENS = 24
MOST_ROWS, MOST_ROWS_LONG = 1_536, 6_144
SECOND, THIRD = "qwen2.5-coder-1.5b", "smollm2-135m"
EXACT = 16  # prompts, under 6 conditions; half as many of the second model
GPU_GB = 40


def stage_ceiling(bench: Bench) -> dict:
    """The matrix products alone, at several row counts."""
    timings = []
    for rows in (1, 16, HALF, BATCH, 2 * BATCH, 480, 960):
        made = bench.worker("transformers").ask({"op": "ceiling", "rows": rows, "repeats": 5})
        timings.append({"contestant": "ceiling", "rows": rows, **made})
        bench.say(f"{'ceiling':16} {rows:4} rows {rows / statistics.median(made['seconds']):31.0f} tokens/s")
    return {"timings": timings}


def stage_sweep(bench: Bench, number: int) -> dict:
    """A round with the model's own stops: the engine on all alphas, each peer on a third of them."""
    part, everything = ALPHAS[number::ROUNDS], texts(PROMPTS)
    made: dict[str, Measured] = {}
    for place in range(len(CONTESTANTS)):
        contestant = CONTESTANTS[(place + number) % len(CONTESTANTS)]
        alphas = ALPHAS if contestant == "engine" else part
        if found := attempt(bench, contestant, alphas, everything, new=LONGEST):
            made[contestant] = found
    timings = [one.timing for one in made.values()]
    compared: list[dict] = []
    if "transformers" not in made:
        return {"timings": timings}
    reference = by_alpha(made["transformers"])
    for contestant, one in made.items():
        if contestant != "transformers":
            compared += agreement(bench, contestant, everything, by_alpha(one), reference)
    if number == 0:
        few = texts(FEW)
        if study := attempt(bench, "study", (-1.0, 1.0), few, new=LONGEST, batch=1):
            timings.append(study.timing)
            where = [everything.index(text) for text in few]
            picked = {alpha: [column[place] for place in where] for alpha, column in reference.items()}
            compared += agreement(bench, "study", few, by_alpha(study), picked)
        bench.close("study")
    elif half := attempt(bench, "transformers", part[len(part) // 2 :][:1], everything, new=LONGEST, batch=HALF):
        timings.append(half.timing | {"contestant": "half batch"})
        compared += agreement(bench, "half batch", everything, by_alpha(half), reference)
    return {"timings": timings, "agreement": compared}


def by_alpha(made: Measured) -> dict[float, list[list[int]]]:
    return dict(zip(made.timing["alphas"], made.tokens, strict=True))


def stage_forced(bench: Bench, number: int) -> dict:
    """A round with 48 forced tokens: each peer on one alpha, the engine on all, in two of the three rounds."""
    alpha, timings = (1.0, -1.0, 2.0)[number], []
    for place in range(len(CONTESTANTS)):
        contestant = CONTESTANTS[(place + number) % len(CONTESTANTS)]
        if contestant == "engine" and number == ROUNDS - 1:
            continue
        alphas = ALPHAS if contestant == "engine" else (alpha,)
        if found := attempt(bench, contestant, alphas, texts(PROMPTS), new=LONGEST, forced=True):
            timings.append(found.timing)
    return {"timings": timings}


def stage_alphas(bench: Bench) -> dict:
    """The prompt part of 1, 2, 5 and 10 alphas: the first token only."""
    timings = []
    for number in range(ROUNDS):
        for count in (1, 2, 5, 10)[:: 1 if number % 2 == 0 else -1]:
            timings.append(measure(bench, "engine", ALPHAS[::-1][:count], texts(PROMPTS), new=1).timing)
    return {"timings": timings}


def stage_profile(bench: Bench) -> dict:
    """Where the time goes: the engine on all rows for a few tokens, and a single row one prompt at a time."""
    made = [
        attempt(bench, contestant, alphas, texts(count), new=12, forced=True, batch=1, profile=True)
        for contestant, alphas, count in (("engine", ALPHAS, PROMPTS), ("study", (1.0,), 2))
    ]
    bench.close("study")
    return {"timings": [one.timing for one in made if one]}


def stage_screen(bench: Bench) -> dict:
    """All layers x 11 alphas x 64 selection prompts, against a forward pass a cell on a sample with every layer."""
    about = bench.told()
    if not about["openings"]:
        return {"why": "this model has no committed record that refusal openings could be derived from"}
    sets = [prompts.load(f"{kind}_selection")["text"].tolist() for kind in ("harmful", "harmless")]
    of, layers = [*sets[0], *sets[1]], list(range(about["layers"]))
    engine = bench.worker("engine")
    made = engine.ask({"op": "screen", "texts": of, "layers": layers, "alphas": list(SCREEN_ALPHAS)})
    values = made.pop("values")
    timings = [{"contestant": "engine", "cells": len(values), "prompts": len(of), **made}]
    bench.say(f"{'engine':16} {len(values)} cells {made['seconds']:35.1f} s")
    largest: list[float] = []
    for layer in layers:
        place = layer * 5 % len(SCREEN_ALPHAS)
        found = cell(bench, of, layer, SCREEN_ALPHAS[place])
        own = values[layer * len(SCREEN_ALPHAS) + place]
        largest.append(max(abs(a - b) for a, b in zip(own, found.pop("values"), strict=True)))
        one = {"contestant": "transformers", "layer": layer, "alpha": SCREEN_ALPHAS[place], "cells": 1}
        timings.append(one | {"prompts": len(of), **found})
    bench.say(f"{'transformers':16} {len(layers)} cells {sum(one['seconds'] for one in timings[1:]):35.1f} s")
    exact = screen_in_float32(bench, of[::8])
    return {"timings": timings, "values": {"differences": largest, "differences_float32": exact}}


def cell(bench: Bench, of: Sequence[str], layer: int, alpha: float, dtype: str = "") -> dict:
    """One cell of the screen, by a full forward pass."""
    engine, about = bench.worker("engine", dtype=dtype), bench.told(dtype=dtype)
    asked = engine.ask({"op": "encode", "texts": list(of)})
    asked["vector"] = engine.ask({"op": "vectors", "layers": [layer], "alphas": [alpha]})["vectors"][0]
    asked |= {"op": "cell", "layer": layer, "pad": about["pad"], "openings": about["openings"], "batch": 32}
    return bench.worker("transformers", dtype=dtype).ask(asked)


def screen_in_float32(bench: Bench, of: Sequence[str]) -> list[float]:
    """Absolute differences of log-odds in a few cells, in float32, where rounding leaves little room."""
    layers = bench.told()["layers"]
    differences: list[float] = []
    for layer, alpha in ((0, 1.0), (layers // 2, -1.0), (bench.told()["layer"], 2.5), (layers - 1, -2.5)):
        asked = {"op": "screen", "texts": list(of), "layers": [layer], "alphas": [alpha]}
        own = bench.worker("engine", dtype="float32").ask(asked)["values"][0]
        found = cell(bench, of, layer, alpha, "float32")["values"]
        differences += [abs(a - b) for a, b in zip(own, found, strict=True)]
    if bench.dtype != "float32":
        bench.close(dtype="float32")
    return differences


def stage_scored(bench: Bench) -> dict:
    """The engine once more, scoring its completions by the unsteered model too, as the notebooks do."""
    return {"timings": [measure(bench, "engine", ALPHAS, texts(PROMPTS), new=LONGEST, score=True).timing]}


def stage_exact(bench: Bench) -> dict:
    """Three models in float32 against the plain way, on prompts of very different length."""
    short, values = texts(2 * EXACT), {}
    bench.close()
    for model, count in ((bench.model, EXACT), (SECOND, EXACT // 2), (THIRD, EXACT)):
        some = short[:: max(1, len(short) // count)][:count]  # harmful and harmless ones
        of = [text * (1 + 4 * (place % 5 == 0)) for place, text in enumerate(some)]
        values[model] = bench.worker("engine", model, "float32").ask({"op": "exact", "texts": of})
        bench.say(f"{model:24} {values[model]['equal']} of {values[model]['rows']} rows equal")
        bench.close()
    return {"values": values}


def spread(count: int) -> tuple[float, ...]:
    """So many alphas from -2.5 to 2.5; one alone is 1."""
    return (1.0,) if count == 1 else tuple(-2.5 + 5 * place / (count - 1) for place in range(count))


def stage_scaling(bench: Bench, grid: Sequence[tuple[int, int]], model: str = "") -> dict:
    """Cells of conditions x prompts by the engine; by transformers one condition for each number of prompts."""
    if model:
        bench.close()
    direction = bench.told(model)["direction"]
    timings = []
    for count in sorted({many for _, many in grid}):
        if found := attempt(bench, "transformers", (1.0,), texts(count), new=SCALING_TOKENS, model=model):
            timings.append(found.timing)
    for conditions, count in grid:
        found = measure(bench, "engine", spread(conditions), texts(count), new=SCALING_TOKENS, model=model)
        timings.append(found.timing)
    if model:
        bench.close()
    return {"timings": timings, "values": {"direction": direction}}


def stage_llama(bench: Bench) -> dict:
    """The engine and transformers at the study's scale, with random weights and forced tokens, one after the other."""
    bench.close()
    timings = []
    for contestant, alphas in (("engine", ALPHAS), ("transformers", (1.0,))):
        for _ in range(ROUNDS):
            if found := attempt(bench, contestant, alphas, texts(PROMPTS), new=LONGEST, forced=True, model=LLAMA):
                timings.append(found.timing)
        if contestant == "engine":
            bench.worker("engine", LLAMA).ask({"op": "release"})
        else:
            for rows in (BATCH, 960):
                asked = {"op": "ceiling", "rows": rows, "repeats": 5}
                made = bench.worker("transformers", LLAMA).ask(asked)
                timings.append({"contestant": "ceiling", "rows": rows, **made})
    bench.close()
    return {"timings": timings}


# --- the plan


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, and how long it takes: in a peer's conditions of 96 prompts and in the engine's 960 rows."""

    name: str
    run: Callable[[Bench], dict]
    peer: float = 0.0
    engine: float = 0.0


def plan(options: BenchOptions, about: dict) -> list[Stage]:
    """The stages of a run, in order."""
    every = [(conditions, count) for conditions in (1, 4, 16, 64) for count in (16, 96, 384)]
    usual = [(conditions, count) for conditions, count in every if conditions * count <= MOST_ROWS]
    more = [(conditions, count) for conditions, count in every if MOST_ROWS < conditions * count <= MOST_ROWS_LONG]
    peers = len(CONTESTANTS) - 1
    stages = [Stage("ceiling", stage_ceiling, 1.0)]
    for number, part in enumerate((ALPHAS[0::3], ALPHAS[1::3], ALPHAS[2::3]), 1):
        run = functools.partial(stage_sweep, number=number - 1)
        stages.append(Stage(f"sweep {number}", run, peers * len(part) + (4.0 if number == 1 else 1.0), 1.0))
    forced = [
        Stage(f"forced {n}", functools.partial(stage_forced, number=n - 1), 1.2 * peers, 1.2 if n < ROUNDS else 0.0)
        for n in range(1, ROUNDS + 1)
    ]
    # What the targets need comes first, in case that the time does not suffice for all.
    stages += [forced[0], Stage("alphas", stage_alphas, 0.0, 1.0), Stage("profile", stage_profile, 1.0, 0.5)]
    stages.append(Stage("screen", stage_screen, 6.0, 4.0))
    if options.model == DEFAULT_MODEL:
        stages.append(Stage("exact", stage_exact, 6.0, 4.0))
    scaling = functools.partial(stage_scaling, grid=usual)
    stages += [*forced[1:], Stage("scaling", scaling, 3.0, 4.0), Stage("scored", stage_scored, 0.0, 1.5)]
    if options.model == DEFAULT_MODEL:
        second = functools.partial(stage_scaling, grid=[(1, 16), (4, 16)], model=SECOND)
        stages.append(Stage("second model", second, 3.0, 0.0))
    if options.long:
        stages.append(Stage("scaling, long", functools.partial(stage_scaling, grid=more), 3.0, 10.0))
    if about["accelerator_gb"] >= GPU_GB:
        stages.append(Stage(LLAMA, stage_llama, 15.0, 10.0))
    return stages
