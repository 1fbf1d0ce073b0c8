"""The benchmark's page: tables and sentences, all from the results file alone.

`python -m benchmarks.page [FILE.json ...]` writes `<name>.md` and its figures next to each results file.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.summary import (
    FORCED,
    LLAMA,
    NEAR,
    ROWS,
    TITLES,
    agreed,
    alpha_costs,
    best_peer,
    ceilings,
    decoding,
    lines,
    number,
    one_more_alpha,
    percent,
    rates,
    says,
    scaling,
    screens,
    times,
    timings,
    verdicts,
)
from refusal.files import ROOT, CompendiumError, atomic, cli

RESULTS = ROOT / "benchmarks" / "results"
COMPARED = """\
- **(a)** the study's way: transformers `generate` with a forward hook, one prompt at a time. Timed on 16 prompts x 2
  alphas; its time for all rows is scaled from that.
- **(b)** the same with a batch of 96 prompts, one alpha after another.
- **(c)** nnsight `generate` with the addition inside `tracer.iter[:]`, the same batch.
- **(d)** steering-vectors and repeng, the same batch, each in an environment of its own, because their pins demand it,
  on the same torch and the same weights.
- **(e)** `refusal.steering.generate`, all rows in one call.
- The **ceiling**: every matrix product of one token, with the model's own weights in their order, for 960 rows;
  attention and all else left out. It bounds a way that multiplies every row by every weight. Rows that share work can
  pass it.""".splitlines()
METHOD = """\
Each contestant runs in a process of its own, with one warm-up; only one computes at a time. There are three rounds,
with the order rotated. In each, the engine does all 960 rows; (b), (c) and (d) do another third of the alphas, so that
over the rounds each alpha is timed once. Their alphas run one after another anyway, so their time for 960 rows is the
sum. With *forced* length stop tokens are ignored; there each round of a peer is one alpha, and the engine has two
rounds of 960 rows. Peers get token ids, so their times lack the tokenizer, which the engine's include. Tokens are
counted up to and without the stop token, for all alike. No completion is scored by the unsteered model. Peak memory is
that of the process, or of the GPU, while it generates. Labels are the judge's, without the rule that needs a reference
NLL"""


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and range."""
    if not values:
        return "—"
    middle, low, high = (number(value, digits) for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], edge: str = "---:") -> list[str]:
    edges = ["---"] + [edge] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, edges, *rows)] + [""]


def reason(result: dict, stage: str) -> list[str]:
    """Why a stage has no results."""
    why = result["stages"].get(stage, {}).get("why") or result.get("left_out", {}).get(stage) or "the run was stopped"
    return [f"Not run: {why.rstrip('.')}.", ""]


def name_of(result: dict) -> str:
    machine = result["identity"]["machine"]
    return machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores"


def markdown(result: dict, stem: str) -> str:
    """The page.

    Args:
        result: What the results file holds.
        stem: The file's name without ending; figures are called after it.
    """
    text = [f"# Benchmark of the steering engine: {name_of(result)}", ""]
    text += ["Written by `python -m benchmarks.page` from the results file; no number in it is typed.", ""]
    for part in (
        opening,
        throughput,
        one_alpha,
        the_screen,
        the_exactness,
        the_scaling,
        the_llama,
        targets,
        the_profile,
        missed,
        limits,
        versions,
    ):
        text += part(result, stem)
    return "\n".join(text).rstrip() + "\n"


def opening(result: dict, stem: str) -> list[str]:
    about = result["identity"]
    best, table = best_peer(result), lines(result)
    answer = "The timings that answer it are missing."
    if best and "engine" in table:
        answer = f"Here {best[1]:.1f} times faster than the best peer ({TITLES[best[0]]})"
        answer += (
            f" and {times(table['engine'], table['study']):.0f} times faster than (a)." if "study" in table else "."
        )
    return [
        "## Question",
        "",
        "How long does a sweep over alphas take, compared with what people use, and are the answers the same? "
        + answer,
        "",
        "## What is compared",
        "",
        f"{about['model']} in {about['dtype']}; 48 harmful and 48 harmless prompts under ten alphas (±0.5, 1, 1.5, 2, "
        f"2.5) at layer {about['layer']}, greedy: {ROWS} rows of up to {FORCED} tokens. The direction is "
        f"{about['direction']}.",
        "",
        *COMPARED,
        "",
        "## Method",
        "",
        METHOD
        + ("." if about["thresholds"] else ", and without the rule against loops: this model has no thresholds."),
        "",
    ]


def throughput(result: dict, stem: str) -> list[str]:
    text, table = ["## 960 rows", ""], lines(result)
    if not table:
        return text + reason(result, "sweep 1")
    most = ceilings(result)
    rows = []
    for name, title in TITLES.items():
        one = table.get(name)
        if one is None:
            rows.append([title, *["not run"] * 7])
            continue
        share = statistics.median(one.forced) / most[ROWS] if one.forced and ROWS in most else None
        same = ["—", "—"] if name == "transformers" else [percent(one.same_tokens), percent(one.same_labels)]
        cells = [number(one.wall), spread(one.rates), spread(one.forced), percent(share), number(one.peak, 2), *same]
        rows.append([title + (", scaled" if name == "study" else ""), *cells])
    if ROWS in most:
        rows.append(["ceiling", "—", "—", number(most[ROWS]), "100.0 %", "—", "—", "—"])
    header = ["", "wall time, s", "tokens/s", "tokens/s, forced", "of ceiling", "peak, GB", "completions = (b)",
              "labels = (b)"]  # fmt: skip
    text += [f"![Tokens per second of each contestant]({stem}-throughput.png)", "", *grid(header, rows)]
    text += [
        "Medians of the rounds, with the range in brackets and as bars. *Of ceiling* takes the forced rate, prompts "
        "included.",
        "",
    ]
    halves = timings(result, "sweep", "half batch")
    if itself := agreed(result, "half batch"):
        own = agreed(result, "engine", [one["alphas"][0] for one in halves])
        text.append(
            f"(b) agrees with itself at half the batch in {percent(itself[0])} of {itself[2]} completions and "
            f"{percent(itself[1])} of labels"
            + (f"; on the same rows (e) agrees with (b) in {percent(own[0])} and {percent(own[1])}." if own else ".")
        )
    if (speed := decoding(result)) and ROWS in most:
        text.append(
            f"After the prompts, decoding alone, (e) makes {number(speed)} tokens/s: {percent(speed / most[ROWS])} of "
            f"the ceiling. The ceiling at 96 rows is {number(most.get(96))} tokens/s."
        )
    if scored := timings(result, "scored", "engine"):
        last = scored[0]
        text.append(
            f"With a reference NLL for every completion, which no peer gives, (e) takes {number(last['seconds'], 1)} s "
            f"({number(rates(scored)[0])} tokens/s, {number(last['peak_gb'], 2)} GB)."
        )
    gone = {who: why for made in result["stages"].values() for who, why in made.get("absent", {}).items()}
    text += [f"Not run: {TITLES[who]}: {why}." for who, why in sorted(gone.items()) if who in TITLES]
    return [*text, ""]


def one_alpha(result: dict, stem: str) -> list[str]:
    text, costs = ["## One more alpha", ""], alpha_costs(result)
    if not costs:
        return text + reason(result, "alphas")
    rows = [[str(count), spread(seconds, 2)] for count, seconds in costs.items()]
    text += ["The time to the first token of 96 prompts under 1, 2, 5 and 10 alphas, three rounds; bars are ranges. "
             "On the right the screen, see the next section.", ""]  # fmt: skip
    text += [f"![The prompt part by number of alphas, and the screen]({stem}-prompts.png)", ""]
    text += grid(["alphas", "seconds, median (range)"], rows)
    return [*text, f"One more alpha costs {percent(one_more_alpha(result))} of the first: (ten − one) / 9 / one.", ""]


def the_screen(result: dict, stem: str) -> list[str]:
    text, found = ["## The screen", ""], screens(result)
    if not found:
        return text + reason(result, "screen")
    own, cells, count = found
    sample = timings(result, "screen", "transformers")
    values = result["stages"]["screen"]["values"]
    rounded, exact = values["differences"], values["differences_float32"]
    return [
        *text,
        f"The log-odds of a refusal opening at the first token for {count} cells of layer and alpha, "
        f"{sample[0]['prompts']} prompts each. The engine did all of them once, in {number(own, 1)} s. A full forward "
        f"pass a cell (transformers, hook, batches of 32, logits at the last position only) was timed on {len(sample)} "
        f"cells, one a layer: {spread([one['seconds'] for one in sample], 2)} s, so {number(cells)} s for all. The "
        f"engine is {cells / own:.2f} times faster.",
        "",
        f"Log-odds differ by at most {max(rounded):.2g} in the run's dtype (in the median cell by at most "
        f"{statistics.median(rounded):.2g}), and by at most {max(exact):.1e} in float32, on {len(exact)} values of "
        "four cells.",
        "",
    ]


def the_exactness(result: dict, stem: str) -> list[str]:
    text, found = ["## In float32, token for token", ""], result["stages"].get("exact", {}).get("values", {})
    if not found:
        return text + reason(result, "exact")
    rows = [
        [model, str(one["rows"]), str(one["equal"]), str(sum(gap < NEAR for gap in one["gaps"])),
         str(sum(gap >= NEAR for gap in one["gaps"])), percent(one["stopped"]), "yes" if one["alone"] else "no"]
        for model, one in found.items()
    ]  # fmt: skip
    header = ["model", "rows", "equal", "else, top two logits within 1e-4", "else", "ended early", "a row alone equal"]
    text += [
        "Against transformers `generate` with torch hooks, one condition at a time: no intervention, addition at one "
        "layer (twice at another) and at three at once, either sign, and ablation; 16 tokens; prompts of which every "
        "fifth is repeated five times.",
        "",
    ]
    return [*text, *grid(header, rows)]


def the_scaling(result: dict, stem: str) -> list[str]:
    text, table = ["## Scaling", ""], scaling(result)
    if not table:
        return text + reason(result, "scaling")
    header = ["model, prompts", "conditions", "rows", "engine, s", "tokens/s", "peak, GB", "(b), s", "times faster"]
    rows = [
        [f"{row['model']}, {row['prompts']}", str(row["conditions"]), number(row["rows"]), number(row["seconds"], 1),
         number(row["rate"]), number(row["peak_gb"], 2), number(row["peer"], 1),
         number(row["peer"] / row["seconds"], 2) if row["peer"] else "—"]
        for row in table
    ]  # fmt: skip
    text += [
        "Own stops, up to 24 tokens, alphas evenly from -2.5 to 2.5 (one alone is 1), each cell once. (b) was measured "
        "on one condition for each number of prompts, in batches of at most 96, and multiplied.",
        "",
        f"![Tokens per second, and times faster than (b), by rows]({stem}-scaling.png)",
        "",
        *grid(header, rows),
    ]
    second = result["stages"].get("second model", {})
    if direction := second.get("values", {}).get("direction"):
        text += [f"The second model's direction: {direction}; its making is not timed.", ""]
    elif "second model" in result.get("left_out", {}) or "why" in second:
        text += ["The second model: " + reason(result, "second model")[0], ""]
    return text


def the_llama(result: dict, stem: str) -> list[str]:
    if LLAMA not in result["stages"]:
        return []
    text = ["## At the study's scale", ""]
    own, peer = (timings(result, LLAMA, name) for name in ("engine", "transformers"))
    if not own or not peer:
        return text + reason(result, LLAMA)
    text += [
        "A model of the shapes of Llama 3.1 8B with random weights and the vocabulary of another tokenizer, forced "
        f"length: (e) makes {spread(rates(own))} tokens/s on 960 rows ({number(own[0]['peak_gb'], 1)} GB), (b) "
        f"{spread(rates(peer))} on one alpha of 96 prompts: "
        f"{statistics.median(rates(own)) / statistics.median(rates(peer)):.2f} times.",
        "",
    ]
    most = {one["rows"]: one["rows"] / statistics.median(one["seconds"]) for one in timings(result, LLAMA, "ceiling")}
    return [*text, "Ceilings: " + ", ".join(f"{number(v)} tokens/s at {k} rows" for k, v in most.items()) + ".", ""]


def targets(result: dict, stem: str) -> list[str]:
    rows = [[one.target, one.measured, says(one.met)] for one in verdicts(result)]
    text = ["## Targets", "", "They were set for two cores and the 0.5B. Code decides.", ""]
    text += grid(["target", "measured", "verdict"], rows, "---")
    return [*text, "*Times* is by wall time of 960 rows or by median tokens/s, whichever says less.", ""]


def limits(result: dict, stem: str) -> list[str]:
    return [
        "## What it does not show",
        "",
        "- One machine, one run a cell in the scaling table and in the screen; ranges are of two or three rounds.",
        "- One steered layer. The lower it lies, the less there is to share.",
        "- Peers' rounds are different alphas, so their ranges hold the alphas' differences too.",
        "- No server engines (vLLM and what is built on it): they need a GPU or another model runner.",
        "- Equality of labels says nothing about whether a label is right.",
        "",
    ]


def the_profile(result: dict, stem: str) -> list[str]:
    text, found = ["## Where the time goes", ""], {one["contestant"]: one for one in timings(result, "profile")}
    if not found:
        return text + reason(result, "profile") if "profile" in result.get("left_out", {}) else []
    titles = {"engine": f"(e), {ROWS} rows", "study": "(a), one row"}
    parts = list(dict.fromkeys(part for one in found.values() for part in one["shares"]))
    rows = [[part, *(percent(one["shares"].get(part)) for one in found.values())] for part in parts]
    return [
        *text,
        "Shares of the wall time of twelve tokens, prompts included, by torch's profiler; it takes time itself, which "
        "is counted as outside of torch. A part without a share is among the other operations.",
        "",
        *grid(["part", *(titles[who] for who in found)], rows),
    ]


def missed(result: dict, stem: str) -> list[str]:
    """Why the targets that compare with (a) and with (b)'s labels were missed, where they were."""
    table, most, verdict = lines(result), ceilings(result), {one.target: one.met for one in verdicts(result)}
    engine, study, peer = (table.get(name) for name in ("engine", "study", "transformers"))
    text = []
    late = next((met for target, met in verdict.items() if target.endswith("times that of (a)")), None)
    if late is False and engine and study and {1, ROWS} <= most.keys():
        own, single = (statistics.median(one.rates) for one in (engine, study))
        text.append(
            f"- **The times of (a).** One row at a time, the matrix products alone would allow {number(most[1], 1)} "
            f"tokens/s on this machine, and (a) makes {number(single, 1)}, {percent(single / most[1])} of that. With "
            f"{ROWS} rows they would allow {number(most[ROWS])}, {number(most[ROWS] / most[1], 1)} times as many, and "
            f"(e) makes {number(own)}, {percent(own / most[ROWS])} of that, prompts and ends of texts included. So the "
            "ratio is that of the two ceilings times that of the two shares: it is larger where single rows are slower."
        )
    labels = next((met for target, met in verdict.items() if target.startswith("labels agree")), None)
    if labels is False and engine and study and peer and (half := agreed(result, "half batch")):
        text.append(
            f"- **Labels in bfloat16.** The bar is (b) at half the batch, which may be padded as the whole is: "
            f"{percent(half[0])} of its completions are the same to the last token. Attention rounds otherwise where "
            f"the padding differs: (a), which has none, has {percent(study.same_tokens)} of completions like (b), and "
            f"(e) {percent(engine.same_tokens)}. In float32 they are the same (see above)."
        )
    return ["## What was missed, and why", "", *text, ""] if text else []


def versions(result: dict, stem: str) -> list[str]:
    about, machine = result["identity"], result["identity"]["machine"]
    rows = [[who, ", ".join(f"{name} {version}" for name, version in sorted(found.items()))]
            for who, found in sorted(result.get("packages", {}).items())]  # fmt: skip
    memory = f", {machine['accelerator_gb']:g} GB" if machine["accelerator"] else ""
    took = sum(stage["took"] for stage in result["stages"].values())
    busy = max((stage["busy_percent"] for stage in result["stages"].values()), default=0.0)
    left = [f"Left out: {name}: {why.rstrip('.')}." for name, why in sorted(result.get("left_out", {}).items())]
    return [
        "## Where and with what",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']:g} GB; "
        f"{machine['accelerator'] or 'no GPU'}{memory}; {machine['system']}. {result['date']}, commit "
        f"{result['commit']}, code {about['code']}, weights {about['weights_sha256'][:12]}. The stages took "
        f"{took / 60:.0f} minutes; before each, other processes used at most {busy:.0f} % of the processor.",
        "",
        *grid(["contestant", "packages"], rows, "---"),
        *left,
    ]


# --- files


def write(path: Path) -> list[Path]:
    """Writes the page and the figures of a results file.

    Returns:
        The results file, the page and the figures.

    Raises:
        CompendiumError: The file is missing or damaged.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        page = markdown(result, path.stem)
    except (OSError, ValueError, KeyError) as error:
        raise CompendiumError(
            f"{path} is no results file ({type(error).__name__}: {error}): run ./run_all.sh bench --fresh."
        ) from error
    target = path.with_suffix(".md")
    with atomic(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    from benchmarks import figures  # matplotlib takes seconds, and a page alone needs none

    return [path, target, *figures.draw(result, path)]


def main(arguments: Sequence[str]) -> int:
    """Writes the pages of the given results files, or of all."""
    for path in [Path(word) for word in arguments] or sorted(RESULTS.glob("*.json")):
        for written in write(path.resolve()):
            print(written)
    return 0


if __name__ == "__main__":
    cli(main)
