# The job graph: weights -> notebooks x models -> numbers -> paper. `./run_all.sh` (refusal.run) writes its configuration;
# without one it makes everything in full. Declared outputs lie in build/ only, so that a fresh clone runs everything and
# a second run does nothing. `exec` makes Snakemake the parent of each worker, which ends when its parent does.
import json
import sys
from pathlib import Path

OUT = config.get("out", "build")
MEASURE = config.get("mode", "measure") == "measure"  # else replay: from the committed records
MODELS = config.get("models", ["qwen2.5-coder-0.5b"])
BESIDE = config.get("beside", [])  # models that a replay leaves as they are, and its paper has
NOTEBOOKS = sorted(glob_wildcards("notebooks/{nb,[0-9][0-9]_[a-z0-9_]+}.ipynb").nb)
TARGETS = config.get("notebooks") or NOTEBOOKS
FIRST = "01_extraction"  # makes the directions that the others use
LAST = "08_robustness_hierarchy"  # reads the records of all others, of all models
PYTHON = sys.executable

DATA = OUT if MEASURE else "data"
RECORDS = [DATA + "/records/{model}/{nb}.parquet", DATA + "/records/{model}/{nb}.metrics.parquet"]
DIRECTIONS = DATA + "/directions/{model}.safetensors"
MADE = expand(OUT + "/notebooks/{model}/{nb}.ipynb", model=MODELS, nb=TARGETS)
# A change in these executes the notebooks again; what they measure is kept in chunks, and redone only where the change
# is in what decides tokens.
RUNNERS = ("appendix", "environment", "estimates", "notebooks", "options", "parameters", "paper", "run", "tex", "verify")
RUNNERS += ("lab", "site", "site_claims", "site_pages", "workload")
MODULES = sorted(glob_wildcards("lib/refusal/{name}.py").name)
CLAIMS = ["data/claims.yaml"] + [f"lib/refusal/{name}.py" for name in MODULES if name.startswith("claim")]  # the ledger
LIBRARY = [f"lib/refusal/{name}.py" for name in MODULES if name not in RUNNERS and not name.startswith("claim")]
TABLES = [f"data/{name}" for name in sorted(glob_wildcards("data/{name,((prompts|validation)/)?[a-z_]+[.](csv|yaml)}").name)]
TABLES = [name for name in TABLES if name not in CLAIMS]
SHARED = LIBRARY + TABLES


def parameters(nb):
    fixed = {"mode": "measure" if MEASURE else "replay", "out": OUT}
    own = config.get("parameters", {}).get(nb, {})
    return lambda wildcards: json.dumps({"model": wildcards.model, **fixed, **own}, sort_keys=True)


def beside(wildcards):
    own = expand(RECORDS, nb=[nb for nb in NOTEBOOKS if FIRST < nb < LAST], model=wildcards.model) if MEASURE else []
    committed = [path for path in Path("data/records").glob("*/*.parquet") if not MEASURE or path.parent.name != wildcards.model]
    return own + sorted(map(str, committed))


wildcard_constraints:
    model="[a-z0-9][a-z0-9.-]*",


localrules: all, numbers, paper


rule all:
    input:
        MADE,
        OUT + "/paper/generated/numbers.tex" if config.get("paper", True) else [],
        OUT + "/paper.pdf" if config.get("paper", True) and config.get("tex", True) else [],


rule weights:
    input: "data/models.yaml"
    output: OUT + "/models/{model}.json"
    log: OUT + "/logs/{model}/weights.log"
    benchmark: OUT + "/logs/{model}/weights.tsv"
    message: "weights of {wildcards.model}"
    shell: "exec {PYTHON:q} -m refusal.models fetch {wildcards.model} --stamp {output} > {log} 2>&1"


for nb in NOTEBOOKS:
    OWN = expand(RECORDS, nb=nb, allow_missing=True) + ([DIRECTIONS] if nb == FIRST else [])

    rule:
        name: nb
        input:
            SHARED,
            config.get("inputs", []),
            OUT + "/models/{model}.json" if MEASURE else OWN,
            [] if nb == FIRST else expand(RECORDS, nb=FIRST, allow_missing=True) + [DIRECTIONS],
            beside if nb == LAST else [],
            CLAIMS if nb == LAST else [],  # it shows the ledger
            notebook=f"notebooks/{nb}.ipynb",
        output:
            OWN if MEASURE else [],
            touch(OUT + "/figures/{model}/." + nb),
            notebook=OUT + "/notebooks/{model}/" + nb + ".ipynb",
        log: OUT + "/logs/{model}/" + nb + ".log"
        benchmark: OUT + "/logs/{model}/" + nb + ".tsv"
        params:
            yaml=parameters(nb),
        threads: config.get("cores", 2) if MEASURE else 1
        resources:
            measure=1 if MEASURE else 0,  # those that read records run beside each other
            mem_mb=8000 if MEASURE else 2000,
        message: nb + " on {wildcards.model}"
        shell: "exec {PYTHON:q} -m refusal.notebooks run {input.notebook} --out {output.notebook} -y {params.yaml:q} > {log} 2>&1"


rule numbers:
    input: MADE, SHARED, CLAIMS, "lib/refusal/appendix.py", "lib/refusal/paper.py", "lib/refusal/tex.py", "paper/main.tex", expand(RECORDS, model=MODELS, nb=TARGETS), [str(path) for model in BESIDE for path in Path("data/records", model).glob("*.parquet")]
    output: OUT + "/paper/generated/numbers.tex"
    log: OUT + "/logs/numbers.log"
    benchmark: OUT + "/logs/numbers.tsv"
    params:
        models=" ".join(f"--model {model}" for model in [*MODELS, *BESIDE]),
    message: "numbers, tables and figures of the paper"
    shell:
        "exec {PYTHON:q} -m refusal.paper numbers --records {DATA}/records --figures {OUT}/figures --out {OUT} {params.models}"
        " > {log} 2>&1"


rule paper:
    input: OUT + "/paper/generated/numbers.tex", "paper/main.tex", "paper/references.bib"
    output: OUT + "/paper.pdf"
    log: OUT + "/logs/paper.log"
    benchmark: OUT + "/logs/paper.tsv"
    message: "paper.pdf"
    shell: "exec {PYTHON:q} -m refusal.paper pdf --records {DATA}/records --out {OUT} > {log} 2>&1"
