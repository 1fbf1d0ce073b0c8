"""What the results say: the main table, costs, ratios and verdicts, all from the results file alone."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LLAMA = "llama-8b-shape"
ROWS, FORCED = 960, 48
PEERS = ("transformers", "nnsight", "steering-vectors", "repeng")
TITLES = {
    "study": "(a) one prompt at a time",
    "transformers": "(b) transformers, hook",
    "nnsight": "(c) nnsight",
    "steering-vectors": "(d) steering-vectors",
    "repeng": "(d) repeng",
    "engine": "(e) this engine",
}
ROUNDING = 1e-3  # log-odds in float32
NEAR = 1e-4  # two logits between which rounding may choose
TARGETS = {"peers": 3.0, "study": 40.0, "ceiling": 0.80, "alpha": 0.25, "screen": 3.5, "memory": 6.0, "labels": 0.01}


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured, and whether it was met; None where it was not measured."""

    target: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class Line:
    """A contestant's line of the main table; shares between 0 and 1, None where it was not measured.

    Attributes:
        wall: Seconds for 960 rows with the model's own stops.
        rates: Tokens/s with own stops, a round each.
        forced: Tokens/s with forced length, a round each.
        peak: Peak memory, 10^9 bytes.
        same_tokens: Share of completions that equal those of (b).
        same_labels: Share of labels that do.
    """

    wall: float | None
    rates: list[float]
    forced: list[float]
    peak: float | None
    same_tokens: float | None
    same_labels: float | None


# --- reading the results


def timings(result: dict, stage: str, contestant: str = "") -> list[dict]:
    """The timings of all stages whose name begins so, of one contestant or of all."""
    found = [
        one for name, made in result["stages"].items() if name.startswith(stage) for one in made.get("timings", [])
    ]
    return [one for one in found if not contestant or one["contestant"] == contestant]


def rates(made: Sequence[dict]) -> list[float]:
    return [one["tokens"] / one["seconds"] for one in made]


def ceilings(result: dict) -> dict[int, float]:
    """Tokens/s of the matrix products alone, by row count."""
    made = timings(result, "ceiling")
    return {one["rows"]: one["rows"] / statistics.median(one["seconds"]) for one in made}


def agreed(result: dict, contestant: str, alphas: Sequence[float] = ()) -> tuple[float, float, int] | None:
    """Shares of equal completions and labels, and how many were compared; of some alphas, or of all."""
    made = [one for name, stage in result["stages"].items() if name.startswith("sweep")
            for one in stage.get("agreement", []) if one["contestant"] == contestant]  # fmt: skip
    made = [one for one in made if not alphas or one["alpha"] in alphas]
    n = sum(one["compared"] for one in made)
    return (sum(m["same_tokens"] for m in made) / n, sum(m["same_labels"] for m in made) / n, n) if n else None


def line(result: dict, contestant: str) -> Line | None:
    """A contestant's line of the main table, None where it was not run."""
    made = timings(result, "sweep", contestant)
    if not made:
        return None
    if contestant == "engine":
        wall: float | None = statistics.median(one["seconds"] for one in made)
    elif contestant == "study":
        wall = made[0]["seconds"] * ROWS / made[0]["rows"]
    else:
        wall = sum(one["seconds"] for one in made) if sum(one["rows"] for one in made) == ROWS else None
    same = (1.0, 1.0, 0) if contestant == "transformers" else agreed(result, contestant)
    return Line(
        wall,
        rates(made),
        rates(timings(result, "forced", contestant)),
        max(one["peak_gb"] for one in made),
        same[0] if same else None,
        same[1] if same else None,
    )


def lines(result: dict) -> dict[str, Line]:
    return {name: found for name in TITLES if (found := line(result, name))}


def alpha_costs(result: dict) -> dict[int, list[float]]:
    """Seconds of the prompt part, by number of alphas, a round each."""
    table: dict[int, list[float]] = {}
    for one in timings(result, "alphas"):
        table.setdefault(one["conditions"], []).append(one["seconds"])
    return dict(sorted(table.items()))


def one_more_alpha(result: dict) -> float | None:
    """What one more alpha costs, as a share of the first."""
    costs = {count: statistics.median(seconds) for count, seconds in alpha_costs(result).items()}
    if not {1, 10} <= costs.keys():
        return None
    return (costs[10] - costs[1]) / 9 / costs[1]


def decoding(result: dict) -> float | None:
    """The engine's tokens/s in the 47 steps after the first token, 960 rows, forced length."""
    forced = [one["seconds"] for one in timings(result, "forced", "engine")]
    first = alpha_costs(result).get(10)
    if not forced or not first:
        return None
    return ROWS * (FORCED - 1) / (statistics.median(forced) - statistics.median(first))


def screens(result: dict) -> tuple[float, float, int] | None:
    """Seconds of the whole screen by the engine, and by a pass a cell (the sample's mean x cells), and the cells."""
    own, cells = timings(result, "screen", "engine"), timings(result, "screen", "transformers")
    if not own or not cells:
        return None
    return own[0]["seconds"], statistics.mean(one["seconds"] for one in cells) * own[0]["cells"], own[0]["cells"]


def scaling(result: dict) -> list[dict]:
    """Cells of the scaling tables: model, conditions, prompts, the engine's seconds and rate, transformers' seconds."""
    table = []
    for name in ("scaling", "second model"):
        single = {(one["model"], one["prompts"]): one["seconds"] for one in timings(result, name, "transformers")}
        for one in timings(result, name, "engine"):
            alone = single.get((one["model"], one["prompts"]))
            row = {key: one[key] for key in ("model", "conditions", "prompts", "rows", "seconds", "peak_gb")}
            row |= {"rate": rates([one])[0], "peer": alone * one["conditions"] if alone else None}
            table.append(row)
    return sorted(table, key=lambda row: (row["model"], row["prompts"], row["conditions"]))


def best_peer(result: dict) -> tuple[str, float] | None:
    """The fastest peer, and how many times faster the engine is: by wall time or by tokens/s, whichever says less."""
    table = lines(result)
    engine = table.get("engine")
    found = {name: times(engine, table[name]) for name in PEERS if name in table} if engine else {}
    return min(found.items(), key=lambda item: item[1]) if found else None


def times(engine: Line, other: Line) -> float:
    ratios = [statistics.median(engine.rates) / statistics.median(other.rates)]
    if engine.wall and other.wall:
        ratios.append(other.wall / engine.wall)
    return min(ratios)


def verdicts(result: dict) -> list[Verdict]:
    """The targets, decided here and nowhere else."""
    table = lines(result)
    engine, goal, made = table.get("engine"), TARGETS, []

    def add(target: str, value: float | None, met: Callable[[float], bool], shown: Callable[[float], str]) -> None:
        if value is None:
            made.append(Verdict(target, "not measured", None))
        else:
            made.append(Verdict(target, shown(value), met(value)))

    best = best_peer(result)
    missing = [name for name in PEERS if name not in table]
    note = f"; not run: {', '.join(missing)}" if missing else ""
    add(f"at least {goal['peers']:g} times the throughput of the best of (b), (c) and (d), own stops",
        best[1] if best else None, lambda v: v >= goal["peers"],
        lambda v: f"{v:.2f} times that of {TITLES[best[0]] if best else ''}{note}")  # fmt: skip
    study = times(engine, table["study"]) if engine and "study" in table else None
    add(
        f"at least {goal['study']:g} times that of (a)", study, lambda v: v >= goal["study"], lambda v: f"{v:.1f} times"
    )
    most, speed = ceilings(result).get(ROWS), decoding(result)
    add(f"at least {100 * goal['ceiling']:.0f} % of the ceiling while decoding full batches",
        speed / most if speed and most else None, lambda v: v >= goal["ceiling"], percent)  # fmt: skip
    add(f"the prompt part of one more alpha costs less than {100 * goal['alpha']:.0f} % of the first's, at 96 prompts",
        one_more_alpha(result), lambda v: v < goal["alpha"], percent)  # fmt: skip
    screen = screens(result)
    add(f"the screen at least {goal['screen']:g} times faster than a forward pass a cell",
        screen[1] / screen[0] if screen else None, lambda v: v >= goal["screen"],
        lambda v: f"{v:.2f} times")  # fmt: skip
    values = result["stages"].get("screen", {}).get("values", {})
    exact = values.get("differences_float32")
    add(f"the screen equal to it within rounding (log-odds in float32, {ROUNDING:g})",
        max(exact) if exact else None, lambda v: v <= ROUNDING, lambda v: f"largest difference {v:.1e}")  # fmt: skip
    peaks = [one["peak_gb"] for stage in ("sweep", "scored") for one in timings(result, stage, "engine")]
    add(f"peak memory of {ROWS} rows below {goal['memory']:g} GB, scored or not", max(peaks, default=None),
        lambda v: v < goal["memory"], lambda v: f"{v:.2f} GB")  # fmt: skip
    halves = [one["alphas"][0] for one in timings(result, "sweep", "half batch")]
    own, itself = (agreed(result, name, halves) if halves else None for name in ("engine", "half batch"))
    add("labels agree with (b) no less than (b) with itself at half the batch, less one point, on the same rows",
        own[1] - itself[1] if own and itself else None, lambda v: v >= -goal["labels"],
        lambda v: f"{percent(own[1])} against {percent(itself[1])} of {itself[2]}"
        if own and itself else "")  # fmt: skip
    found = result["stages"].get("exact", {}).get("values", {})
    far = sum(gap >= NEAR for one in found.values() for gap in one["gaps"])
    add("in float32 every completion equals the plain way's, or first differs where its two top logits lie within 1e-4",
        far if found else None, lambda v: v == 0,
        lambda v: f"{v:g} of {sum(one['rows'] for one in found.values())} do not, {len(found)} models")  # fmt: skip
    return made


def verdicts_text(result: dict) -> str:
    """The verdicts for a terminal."""
    return "\n".join(f"{says(one.met):12} {one.target}: {one.measured}" for one in verdicts(result))


def says(met: bool | None) -> str:
    return {True: "met", False: "missed", None: "not measured"}[met]


def percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 0) -> str:
    return "—" if value is None else f"{value:,.{digits}f}"
