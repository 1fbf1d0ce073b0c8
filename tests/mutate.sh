#!/usr/bin/env bash
# The mutation score of the science modules, with mutmut (its settings: [tool.mutmut] in pyproject.toml).
#
#   tests/mutate.sh                        all mutants; hours, and the same command goes on after a stop
#   tests/mutate.sh 'refusal.cones.*'      some; mutmut's names, with wildcards
#   tests/mutate.sh --show NAME            what a mutant changes; survivors.txt has it of all that survived
#
# mutmut finds a package in ./ or src/ only, so it works on a copy in build/mutation, where lib is called src. mutmut
# itself lies there too, behind the locked packages: the environment stays as the lock says.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
VERSION=3.8.1
PY=${PYTHON:-$PWD/.venv/bin/python}
COPY=build/mutation TOOL=$PWD/build/mutation/tool
mkdir -p "$COPY/src"
if [ "$(cat "$TOOL/version" 2>/dev/null)" != "$VERSION" ]; then
    # what pip says of the other versions here does not matter: they lie behind the locked ones
    "$PY" -m pip install --quiet --only-binary=:all: --upgrade --target "$TOOL" "mutmut==$VERSION" 2>"$COPY/pip.log" ||
        { cat "$COPY/pip.log" >&2 && exit 1; }
    echo "$VERSION" >"$TOOL/version"
fi
cp -a --update lib/refusal "$COPY/src/"
cp -a --update data tests pyproject.toml "$COPY/"
cd "$COPY"
export OMP_NUM_THREADS=1 PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 TOOL
unset PYTHONPATH
mutmut() { "$PY" -c 'import os, sys; sys.path.append(os.environ["TOOL"]); from mutmut.__main__ import cli; cli()' "$@"; }
if [ "${1:-}" = --show ]; then
    mutmut show "$2"
    exit
fi
mutmut run --max-children "${CHILDREN:-2}" "$@"
mutmut results | grep -v ": not checked" || true
mutmut export-cicd-stats >/dev/null
"$PY" - <<'END'
import json, pathlib

found = json.loads(pathlib.Path("mutants/mutmut-cicd-stats.json").read_text())
dead, alive = found["killed"] + found.get("timeout", 0), found["survived"] + found.get("no_tests", 0)
print(f"{dead} of {dead + alive} mutants died: {dead / max(1, dead + alive):.1%}; build/{pathlib.Path.cwd().name} has them all")
END
"$PY" - <<'END' >survivors.txt
import collections, json, os, pathlib, sys

sys.path.append(os.environ["TOOL"])
from mutmut.mutation.diff_apply import get_diff_for_mutant

for path in sorted(pathlib.Path("mutants/src/refusal").glob("*.meta")):
    codes = json.loads(path.read_text())["exit_code_by_key"]
    count = collections.Counter("alive" if code in (0, 33) else "dead" for code in codes.values() if code is not None)
    if not count:
        continue
    print(f"# {path.name.partition('.')[0]}: {count['dead']} of {count.total()} died, {count['dead'] / count.total():.1%}")
    for name in (name for name, code in codes.items() if code in (0, 33)):
        changed = [line for line in get_diff_for_mutant(name).splitlines()[2:] if line[:1] in "+-"]
        print(name.removeprefix("refusal."), *(f"  {line[0]} {line[1:].strip()}" for line in changed), sep="\n")
END
