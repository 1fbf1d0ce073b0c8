"""`./run_all.sh bench`: runs the stages that the results lack, and writes results and page.

Results go to `benchmarks/results/<processor>-<n>-cores.json` after every stage, so that a run that was stopped goes on
at the next stage. A file made by other code, packages or weights is not gone on with but measured anew.
"""

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence

import psutil

from benchmarks import page
from benchmarks.bench import Bench
from benchmarks.stages import Stage, plan
from benchmarks.summary import timings, verdicts_text
from benchmarks.workers import ContestantError
from refusal import provenance
from refusal.files import ROOT, CompendiumError, atomic, cli, sha256_file, sha256_text
from refusal.options import DEFAULT_MODEL, parse_bench

SCHEMA = 1
# A change in these modules, of the benchmark and of the library, makes results void.
MEASURING = ("bench", "contestants", "engine", "exactness", "stages", "timing")
LIBRARY = (
    "activations",
    "analyses",
    "conditions",
    "conversion",
    "directions",
    "engine",
    "judging",
    "models",
    "prefixes",
    "prompts",
    "steering",
)
GUESS = (30.0, 100.0)  # seconds: a peer's condition of 96 prompts and the engine's 960 rows, until they are measured


def unit_costs(result: dict) -> tuple[float, float]:
    """Seconds of a peer's condition and of the engine's 960 rows, as measured so far."""
    made = timings(result, "sweep")
    each = [value for one in made if one["contestant"] == "transformers" for value in one["each"]]
    own = [one["seconds"] for one in made if one["contestant"] == "engine"]
    return (statistics.median(each) if each else GUESS[0]), (statistics.median(own) if own else GUESS[1])


def go(bench: Bench, stages: Sequence[Stage], minutes: float) -> None:
    """Runs the stages that the results lack, and writes the results after each.

    A stage that would end after `minutes` is left out, with a line that says so; the same command goes on with it.
    """
    done = bench.result.setdefault("stages", {})
    bench.result["left_out"] = {}
    todo = [stage for stage in stages if stage.name not in done]
    for place, stage in enumerate(todo):
        bench.stage = stage.name
        peer, engine = unit_costs(bench.result)
        took = [one.peer * peer + one.engine * engine for one in todo[place:]]
        bench.until, bench.after = time.monotonic() + took[0], sum(took[1:])
        if any("sweep" in name for name in done) and time.monotonic() - bench.began + took[0] > minutes * 60:
            bench.result["left_out"][stage.name] = f"it would have ended after the {minutes:g} minutes of this run"
            bench.say(f"left out: {bench.result['left_out'][stage.name]}; the same command goes on with it")
            save(bench)
            continue
        busy = psutil.cpu_percent(interval=1.0)  # nothing of ours computes now
        start = time.monotonic()
        try:
            made = stage.run(bench)
        except (ContestantError, CompendiumError) as error:  # of one that the stage cannot do without
            bench.result["left_out"][stage.name] = str(error)
            bench.say(f"left out: {error}")
        else:
            facts = {"took": time.monotonic() - start, "busy_percent": busy, "absent": dict(bench.absent)}
            done[stage.name] = facts | made
        save(bench)


def save(bench: Bench) -> None:
    if bench.path is not None:
        with atomic(bench.path) as path:
            path.write_text(json.dumps(bench.result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def hardware(about: dict) -> dict:
    """The machine, without its name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": provenance.processor() or platform.machine(),
        "cores": cores,
        "threads": about["threads"],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "accelerator": about["accelerator"],
        "accelerator_gb": round(about["accelerator_gb"], 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def slug(machine: dict, model: str) -> str:
    """The results' name, from processor and cores, or from the GPU."""
    name = machine["accelerator"] or f"{machine['processor']} {machine['cores']} cores"
    name = re.sub(r"\((r|tm)\)|@.*?hz|\bcpu\b|-core processor", " ", name.lower())
    parts = [re.sub(r"[^a-z0-9]+", "-", name).strip("-"), *([] if model == DEFAULT_MODEL else [model])]
    return "-".join(parts)


def identity(bench: Bench) -> dict:
    """What must be the same for results to be gone on with."""
    sources = [ROOT / "lib" / "refusal" / f"{name}.py" for name in LIBRARY]
    sources += [ROOT / "benchmarks" / f"{name}.py" for name in MEASURING]
    about = bench.told()
    return {
        "schema": SCHEMA,
        "code": sha256_text("".join(sha256_file(path) for path in sources))[:12],
        "packages": bench.worker("engine").packages,
        "machine": hardware(about),
        "model": bench.model,
        "dtype": about["dtype"],
        "layer": about["layer"],
        "direction": about["direction"],
        "direction_sha256": about["direction_sha256"],
        "thresholds": about["thresholds"],
        "weights_sha256": about["weights_sha256"],
    }


def commit() -> str:
    """The commit, and whether the code differs from it; "unknown" outside of git."""
    head = provenance.git(ROOT, "rev-parse", "HEAD")
    changed = provenance.git(ROOT, "status", "--porcelain", "--", "lib", "benchmarks/*.py")
    return head[:12] + (" with changes" if changed else "") if head else "unknown"


def start(bench: Bench, fresh: bool) -> None:
    """Reads the results of this machine, or begins new ones."""
    bench.dtype = bench.told()["dtype"]
    bench.about[bench.model, bench.dtype] = bench.about[bench.model, "auto"]
    bench.workers["engine", bench.model, bench.dtype] = bench.workers.pop(("engine", bench.model, "auto"))
    same = identity(bench)
    bench.path = page.RESULTS / f"{slug(same['machine'], bench.model)}.json"
    found = json.loads(bench.path.read_text(encoding="utf-8")) if bench.path.is_file() and not fresh else {}
    if found and found["identity"] == same:
        bench.result = found
    else:
        if found:
            print("the results so far are of other code, packages, weights or hardware: everything is measured anew.")
        packages = bench.result.get("packages", {})
        made = {"identity": same, "commit": commit(), "date": time.strftime("%Y-%m-%d"), "packages": packages}
        bench.result = made


def main(arguments: Sequence[str]) -> int:
    """Measures what is missing and writes the page."""
    options = parse_bench(arguments)
    bench = Bench(options.model, stage="start")
    try:
        start(bench, options.fresh)
        assert bench.path is not None
        go(bench, plan(options, bench.told()), options.minutes)
    finally:
        bench.close()
    written = page.write(bench.path)
    print("", verdicts_text(bench.result), "", *(f"  {os.path.relpath(path, ROOT)}" for path in written), sep="\n")
    return 0


if __name__ == "__main__":
    cli(main)
