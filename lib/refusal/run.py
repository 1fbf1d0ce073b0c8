"""One run of the compendium: configure the job graph, run it quietly, say what came out.

./run_all.sh calls it with its own options, after the environment is made.
"""

import contextlib
import csv
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from refusal.files import ROOT, CompendiumError, atomic, cli, explain
from refusal.options import DEFAULT_MODEL, Options, measured, notebooks, parse
from refusal.parameters import defaults, find, read

OUT = {"full": "build", "quick": "build/quick", "user": "build/user", "replay": "build/replay"}
PRODUCTS = ("directions", "figures", "logs", "models", "notebooks", "paper", "records")
LOG_BYTES = 64 * 1024  # with less space a step cannot say why it failed
QUICK = {"n_prompts": 12}  # for notebooks that have such a parameter


def configure(options: Options) -> dict:
    """The configuration of the Snakefile for these options.

    Raises:
        CompendiumError: A bad prompt file, no committed records to replay, a notebook without sound parameters.
    """
    own: dict[str, object] = {}
    if options.kind == "quick":
        own |= QUICK
    if options.kind == "user":
        own |= {"prompts_file": options.prompts}
    known = {name: defaults(read(find(name)), name) for name in notebooks()}
    given = {name: {key: value for key, value in own.items() if key in known[name]} for name in known}
    chosen = list(options.only) or list(known)
    if options.prompts:
        from refusal import prompts

        prompts.load(options.prompts)
        chosen = [name for name in chosen if "prompts_file" in known[name]]
        if not chosen:
            raise CompendiumError(f"{', '.join(options.only)} takes no prompts of your own: leave --only out.")
    beside: list[str] = []
    if options.kind == "replay":
        for model in options.models:
            if not any((ROOT / "data" / "records" / model).glob("*.parquet")):
                raise CompendiumError(f"there are no committed records of {model}: leave --replay out to measure it.")
        if DEFAULT_MODEL in options.models:  # then the paper is the committed one, which has all models
            beside = [model for model in measured(ROOT / "data" / "records") if model not in options.models]
    return {
        "out": OUT[options.kind],
        "mode": "replay" if options.kind == "replay" else "measure",
        "models": list(options.models),
        "beside": beside,
        "notebooks": chosen,
        "parameters": given,
        "inputs": [options.prompts] if options.prompts else [],
        "paper": options.paper,
        "tex": bool(shutil.which("latexmk") and shutil.which("pdflatex")),
        "cores": options.cores or len(os.sched_getaffinity(0)),
    }


def discard(options: Options) -> None:
    """Removes what this kind of run has made, and the chunks of the chosen models unless it is a replay."""
    out = ROOT / OUT[options.kind]
    for path in [*(out / name for name in PRODUCTS), out / "paper.pdf"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if options.kind != "replay":
        for model in options.models:
            shutil.rmtree(ROOT / "build" / "chunks" / model, ignore_errors=True)


def command(options: Options, config: dict, config_file: Path) -> list[str]:
    """The Snakemake command line. It dies with this process, also after `kill -9`, where the system has setpriv."""
    words = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT)]
    words += ["--configfile", str(config_file), "--rerun-incomplete", "--nolock", "--nocolor"]
    if options.profile:
        words += ["--profile", options.profile]
    else:
        words += ["--resources", "measure=1"]  # one notebook measures at a time: it uses all cores by itself
    if options.cores or not options.profile:
        words += ["--cores", str(config["cores"])]
    if options.dry_run:
        words += ["--dry-run"]
    return (["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []) + words


def follow(words: Sequence[str], log: Path) -> Iterator[str]:
    """Runs Snakemake, writes what it says to `log`, and yields each job as it starts, and last its exit status.

    Yields:
        "job: ..." for each job that is started, then "status: N".
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if sys.stderr.isatty():
        environment["REFUSAL_TTY"] = os.ttyname(2)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    assert process.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as kept:
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                if match := re.match(r"Job \d+: (.+)", line):
                    yield f"job: {match[1]}"
        yield f"status: {process.wait()}"
    finally:
        if process.poll() is None:  # Ctrl-C reaches Snakemake too, which ends its workers
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def failure(out: Path, log: Path) -> str:
    """Why a run failed: the sentence of the worker that failed, or else where to look."""
    for path in sorted((out / "logs").rglob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if sentences := [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]:
            return f"{sentences[-1]} (log: {path.relative_to(ROOT)})"
    text = log.read_text(encoding="utf-8", errors="replace")
    if "older modification time" in text:
        return "the clock of this machine jumped back while a step ran: run the same command again, which goes on."
    step = re.search(r"Error in rule (\S+?),?:(?:.|\n)*?log: (\S+)", text)
    if shutil.disk_usage(log.parent).free < LOG_BYTES:
        return str(explain(OSError(errno.ENOSPC, "full"), out))
    if step:
        return f"the step {step[1]} failed without saying why: its log is {step[2]}."
    said = [line.strip() for line in text.splitlines() if re.search(r"Error|Exception", line)]
    return f"Snakemake stopped ({said[-1] if said else 'without a word'}): its log is {log.relative_to(ROOT)}."


def not_ahead(out: Path) -> None:
    """Sets files from the future to now: Snakemake fails on inputs that are newer than what is made from them.

    A clock that was ahead, or an archive from a machine whose clock is, leaves such times.
    """
    now = time.time()
    for folder in (*(ROOT / name for name in ("lib", "data", "notebooks", "paper")), out):
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime > now:
                    os.utime(path, (now, now))


def run(options: Options, config: dict, folder: Path) -> None:
    """Runs the job graph and prints each job; the configuration and Snakemake's log go to `folder`.

    Raises:
        CompendiumError: A job failed; the sentence is its own.
    """
    config_file, log = folder / "run.yaml", folder / "logs" / "snakemake.log"
    with atomic(config_file) as path:
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
    if not options.dry_run:
        not_ahead(ROOT / config["out"])
    jobs, status = 0, 1
    if config["mode"] == "measure" and not options.dry_run:
        kept = sum(len(list((ROOT / "build" / "chunks" / model).glob("*"))) for model in options.models)
        if kept:  # of quick looks and full runs alike
            print(f"{kept} measured parts lie in build/chunks/: those of this run are not measured again")
    try:
        for event in follow(command(options, config, config_file), log):
            kind, _, what = event.partition(": ")
            if kind == "status":
                status = int(what)
            else:
                jobs += 1
                print(f"{'would do' if options.dry_run else time.strftime('%H:%M:%S')}  {what}", flush=True)
    except OSError as error:  # the log cannot be written
        if (sentence := explain(error, log)) is None:
            raise
        raise sentence from error
    if status:
        raise CompendiumError(failure(ROOT / config["out"], log))
    if not jobs:
        print(f"nothing to do: everything in {config['out']}/ is up to date.")


def timings(out: Path, config: dict, since: float) -> list[str]:
    """A line a step: how long it took in this run, and its peak memory, or that it was not done again."""
    steps = [(model, name) for model in config["models"] for name in ("weights", *notebooks())]
    lines = []
    for model, name in [*steps, ("", "numbers"), ("", "paper")]:
        path = out / "logs" / model / f"{name}.tsv"
        if not path.exists():
            continue
        took = "not done again"
        if path.stat().st_mtime >= since:
            row = next(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"))
            memory = f", {float(row['max_rss']) / 1024:.1f} GiB" if row["max_rss"].replace(".", "").isdigit() else ""
            took = f"{float(row['s']):.0f} s{memory}"
        lines.append(f"  {f'{name} {model}'.strip():42} {took}")
    return lines


def results(options: Options, config: dict) -> None:
    """Prints the headline numbers and how they differ from the committed ones; where no paper is made, the rates."""
    from refusal import paper

    out = ROOT / config["out"]
    records = (ROOT / "data" if options.kind == "replay" else out) / "records"
    if options.kind == "quick":
        print("\na quick look: so few prompts show that all works, and are too few for a conclusion.")
    for model in options.models:
        print(f"\nheadline numbers, {model}:" if options.paper else f"\nresults, {model}:")
        if options.paper:
            paper.main(["headlines", "--records", str(records), "--model", model])
        else:
            _reports(records, model, config["notebooks"])
    if options.paper:
        print("\ncompared with the committed numbers:")
        built, committed = out / "paper" / "generated", ROOT / "paper" / "generated"
        paper.main(["compare", "--built", str(built), "--committed", str(committed)])


def _reports(records: Path, model: str, names: Sequence[str]) -> None:
    """Prints what each notebook found on a model, where no paper says it."""
    import pandas as pd

    from refusal import analyses, summaries

    for name in names:
        print(name)
        if name in summaries.REPORTS:
            values = summaries.report(records, model, name)
            lines = [f"  {words}: {values[key]}" for key, words in summaries.HEADLINES.items() if key in values]
            print("\n".join(lines))
        else:
            shares = analyses.rates(pd.read_parquet(records / model / f"{name}.parquet"))
            print(summaries.sign_table(shares).to_string(index=False))


def publish(options: Options, config: dict) -> str:
    """Makes the results of a full run the committed ones, file by file, and executes the notebooks on them.

    Returns:
        What was done, for people.
    """
    from refusal import notebooks as strict
    from refusal import paper, readme

    out, copied = ROOT / config["out"], 0
    for model in options.models:
        pairs = [(path, ROOT / "data" / "records" / model / path.name) for path in (out / "records" / model).iterdir()]
        pairs += [(path, ROOT / "figures" / model / path.name) for path in (out / "figures" / model).iterdir()]
        name = f"{model}.safetensors"
        pairs += [(out / "directions" / name, ROOT / "data" / "directions" / name)]
        for source, target in pairs:
            if not source.name.startswith("."):
                with atomic(target) as path:
                    shutil.copyfile(source, path)
                copied += 1
    paper.generate(ROOT / "data" / "records", ROOT)
    readme.refresh(ROOT / "README.md", ROOT / "data" / "records")
    if DEFAULT_MODEL in options.models:
        for name in config["notebooks"]:
            strict.publish(name)
    return f"\npublished {copied} files to data/ and figures/, and paper/generated/ and notebooks/: commit them."


def main(arguments: Sequence[str]) -> int:
    """Does what the options of ./run_all.sh say."""
    options, since = parse(arguments), time.time()
    config = configure(options)
    out = ROOT / config["out"]
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            run(options, config, Path(folder))
        if config["mode"] == "measure":
            from refusal import estimates  # imports torch

            print(estimates.report(options.models, config["notebooks"]))
        return 0
    if options.fresh:
        discard(options)
    for path in (out / "logs").rglob("*.log"):
        path.unlink()  # so that a sentence found there is of this run
    run(options, config, out)
    lines = ["", f"made in {config['out']}/ in {time.time() - since:.0f} s:", *timings(out, config, since)]
    products = ("records", "directions", "figures", "notebooks")
    lines += [f"  {config['out']}/{name}/" for name in products if (out / name).is_dir()]
    if options.paper:
        lines += [f"  {config['out']}/paper.pdf" if config["tex"] else "  no PDF, for want of latexmk and pdflatex"]
    print("\n".join(lines))
    results(options, config)
    if options.publish:
        print(publish(options, config))
    return 0


if __name__ == "__main__":
    cli(main)
