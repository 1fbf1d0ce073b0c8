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
"$PY" - <<'END'
import json, os, pathlib, sys

sys.path.append(os.environ["TOOL"])
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

DEAD, ALIVE = ("killed", "timeout"), ("survived", "no tests")
lines, died, lived = [], 0, 0
for path in sorted(pathlib.Path("mutants/src/refusal").glob("*.meta")):
    codes = json.loads(path.read_text())["exit_code_by_key"]
    status = {name: status_by_exit_code[code] for name, code in codes.items()}
    dead, alive = (sum(one in which for one in status.values()) for which in (DEAD, ALIVE))
    died, lived = died + dead, lived + alive
    if dead + alive:
        lines.append(f"# {path.name.partition('.')[0]}: {dead} of {dead + alive} died, {dead / (dead + alive):.1%}")
    for name in (name for name, one in status.items() if one in ALIVE):
        changed = [line for line in get_diff_for_mutant(name).splitlines()[2:] if line[:1] in "+-"]
        lines += [name.removeprefix("refusal."), *(f"  {line[0]} {line[1:].strip()}" for line in changed)]
pathlib.Path("survivors.txt").write_text("\n".join(lines) + "\n")
print(f"{died} of {died + lived} mutants died: {died / max(1, died + lived):.1%}; build/mutation/survivors.txt has the others")
END
