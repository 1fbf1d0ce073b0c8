#!/usr/bin/env bash
# The one entry of the compendium: makes the environment where it is missing, then runs the job graph, the tests, the
# benchmark, the site, JupyterLab or the comparison with the committed records, or prints the ledger of claims.
# `./run_all.sh --help` lists the options. Options are read in lib/refusal/options.py, the run is lib/refusal/run.py.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
unset PYTHONPATH PYTHONHOME # they would let other versions of the pinned packages in
unset REFUSAL_LAB # refusal.lab sets it: elsewhere figures stand still
# Memory in large pages: a batch's intermediate results are made and left again, and finding their pages costs 5 %.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
# Arrow takes every path for UTF-8, and so must Python, in whatever locale: else a folder with foreign letters is not found.
export PYTHONUTF8=1
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

TEX_PACKAGES="latexmk texlive-latex-recommended lmodern"
TEX_STYLES="lmodern microtype booktabs natbib hyperref"
LOG=build/logs/environment.log

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 2
}

busy() {
    fail "another run is under way in $PWD: wait for its end, or stop it (Ctrl-C where it runs; it goes on later)."
}

# Whether packages of the distribution may be installed here, and how.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}
may_install() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}
install_packages() {
    mkdir -p build/logs
    {
        as_root apt-get update -q &&
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "$@"
    } </dev/null >>"$LOG" 2>&1 9>&-
}

# The first Python from 3.11 on, those that can make an environment first.
find_python() {
    local wanted candidate
    for wanted in "import ensurepip, venv" ""; do
        for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14; do
            if "$candidate" -c "import sys; assert sys.version_info >= (3, 11); $wanted" 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
    return 1
}

# Makes .venv from the lock. The stamp is written last, so an environment that was cut short is made anew; it holds what
# the environment was made from, and where, because a virtual environment cannot be moved.
environment() {
    if [ "${REFUSAL_ENV:-}" = active ]; then
        PY=$(command -v python) || fail "REFUSAL_ENV=active needs an active environment: conda activate refusal."
        "$PY" -c "import importlib.util as u, sys; sys.exit(not (u.find_spec('refusal') and u.find_spec('snakemake')))" ||
            fail "the active environment lacks the compendium's packages: make it from environment.yml."
        return
    fi
    PY=$PWD/.venv/bin/python
    local wanted
    wanted=$({ cat requirements.lock pyproject.toml && pwd && "$BASE" -V; } | sha256sum)
    if [ -x "$PY" ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$wanted" ]; then return; fi
    [ -n "$alone" ] || busy
    mkdir -p build/logs
    : >"$LOG"
    if ! "$BASE" -c "import ensurepip, venv" 2>/dev/null; then # Debian packs this part of Python on its own
        local version
        version=$("$BASE" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        may_install || fail "$BASE cannot make an environment: apt-get install $version, then run the same command again."
        say "installing $version from the distribution"
        install_packages "$version" || fail "$version could not be installed: see $LOG."
    fi
    say "making the environment in .venv (once; two to four minutes, about 2.2 GB; what it does: $LOG)"
    rm -rf .venv
    local start=$SECONDS
    logged "$BASE" -m venv .venv
    logged "$PY" -m pip install "$(grep -o 'torch==[0-9.]*' pyproject.toml)"
    logged "$PY" -m pip install --no-deps --require-hashes -r requirements.lock
    logged "$PY" -m pip install --no-deps --no-build-isolation -e .
    logged "$PY" -m pip check
    printf '%s\n' "$wanted" >.venv/stamp
    say "environment made in $((SECONDS - start)) s"
}
logged() {
    "$@" </dev/null >>"$LOG" 2>&1 9>&- && return
    local why
    why=$(grep -iE '^(error|.*(No space left|Permission denied|not match))' "$LOG" | tail -n 1)
    fail "the environment could not be made (${why:-see the log}): its log is $LOG; the same command tries again."
}

tex() {
    local style missing=""
    if command -v latexmk >/dev/null && command -v pdflatex >/dev/null && command -v kpsewhich >/dev/null; then
        for style in $TEX_STYLES; do kpsewhich "$style.sty" >/dev/null || missing=1; done
        [ -n "$missing" ] || return 0
    fi
    if may_install; then
        say "installing TeX from the distribution ($TEX_PACKAGES)"
        # shellcheck disable=SC2086
        install_packages $TEX_PACKAGES && return
        say "TeX could not be installed (see $LOG): everything but the PDF is made."
    else
        say "TeX is missing: everything but the PDF is made; for it, apt-get install $TEX_PACKAGES."
    fi
}

# What only the site, or only the tests in a browser, need: into the same environment.
packages() {
    [ "${REFUSAL_ENV:-}" != active ] || return 0 # refusal.site says what is missing, and such tests are skipped
    local name wanted
    for name in "$@"; do
        wanted=$(cat "requirements-$name.lock" .venv/stamp | sha256sum)
        [ "$(cat ".venv/stamp-$name" 2>/dev/null)" != "$wanted" ] || continue
        say "adding the packages of requirements-$name.lock to .venv (once)"
        logged "$PY" -m pip install --no-deps --require-hashes -r "requirements-$name.lock"
        printf '%s\n' "$wanted" >".venv/stamp-$name"
    done
}

browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    if may_install; then
        say "installing Chromium from the distribution, for the tests in a browser"
        install_packages chromium fonts-liberation && return
    fi
    say "Chromium is missing: the tests in a browser are skipped; for them, apt-get install chromium."
}

tests() {
    local failed="" weights
    "$PY" -m refusal.models fetch qwen2.5-coder-0.5b & # the checks of the code need no weights
    weights=$!
    "$PY" -m ruff check . || failed+=" ruff-check"
    "$PY" -m ruff format --check . || failed+=" ruff-format"
    "$PY" -m mypy || failed+=" mypy"
    wait "$weights" || failed+=" weights"
    # nbval executes the committed notebooks, in replay mode, and compares what they print with what is stored in them
    PYDEVD_DISABLE_FILE_VALIDATION=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 JUPYTER_PREFER_ENV_PATH=1 \
        OMP_NUM_THREADS=1 "$PY" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval --nbval-current-env tests notebooks ||
        failed+=" pytest"
    [ -z "$failed" ] || fail "failed:$failed."
}

# A comma in decimals, an i without a dot: what runs under other locales is tried by the fault suite.
foreign_locales() {
    [ "$(locale -a 2>/dev/null | grep -cxE 'de_DE.iso88591|tr_TR.utf8')" != 2 ] || return 0
    if may_install; then
        say "installing a German and a Turkish locale, for the tests"
        install_packages locales && {
            as_root localedef -i de_DE -f ISO-8859-1 de_DE.iso88591 && as_root localedef -i tr_TR -f UTF-8 tr_TR.utf8
        } </dev/null >>"$LOG" 2>&1 && return
    fi
    say "German and Turkish locales are missing: their tests are skipped; for them, apt-get install locales-all."
}

# The fault suite whole; the default tests run a shortened selection of it.
faults() {
    foreign_locales
    OMP_NUM_THREADS=1 "$PY" -m pytest -n 2 -m "" tests/faults || fail "failed: pytest."
}

BASE=$(find_python) || fail "Python 3.11 or later is needed: install it, or name one with PYTHON=/path/to/python3."
case ${1:-} in bench | claims | verify) kind=$1 ;; *) kind="" ;; esac
case " $* " in *" --help "* | *" -h "*) exec "$BASE" lib/refusal/options.py ${kind:+"$kind"} --help ;; esac
if [ "${1:-}" = test ]; then
    [ $# = 1 ] || [ "$*" = "test faults" ] || fail "test takes no options but the word faults."
    [ $# = 1 ] && builds_paper=paper || builds_paper=""
    dry_run=""
elif [ "${1:-}" = site ]; then
    [ $# = 1 ] || fail "site takes no options."
    builds_paper=paper dry_run=""
elif [ "${1:-}" = lab ]; then
    builds_paper="" dry_run=""
else
    plan=$("$BASE" lib/refusal/options.py "$@") # ends here with a sentence where an option is wrong
    case $plan in *paper*) builds_paper=paper ;; *) builds_paper="" ;; esac
    case $plan in *dry-run*) dry_run=1 ;; *) dry_run="" ;; esac
fi
if [ -n "$dry_run" ]; then
    if [ ! -e .venv/stamp ] && [ "${REFUSAL_ENV:-}" != active ]; then
        echo "would do  environment in .venv (two to four minutes, 2.2 GB), then weights, notebooks and paper (the README says"
        echo "          how long they take; once the environment is made, --dry-run lists them with time and memory for this machine)"
        exit 0
    fi
    [ "${REFUSAL_ENV:-}" = active ] && PY=$(command -v python) || PY=$PWD/.venv/bin/python
    exec "$PY" -m refusal.run "$@"
fi

# One run at a time in a folder. The lock ends with this process, and is not handed to those that it starts.
mkdir -p build/logs 2>/dev/null && { : >>build/.lock; } 2>/dev/null ||
    fail "no permission to write $PWD/build: change its owner or mode."
alone=1
if command -v flock >/dev/null; then
    exec 9>build/.lock
    flock -n 9 || alone=""
    [ -n "$alone" ] || [ "${1:-}" = claims ] || busy # who only reads the ledger may do so beside a run
fi
environment
[ -z "$builds_paper" ] || tex
if [ "${1:-}" = test ]; then
    if [ $# = 1 ]; then
        packages site browser
        browser
    fi
    exec 9>&- # the tests start runs of their own
    if [ $# = 1 ]; then tests; else faults; fi
elif [ "${1:-}" = site ]; then
    packages site
    exec "$PY" -m refusal.site
elif [ "${1:-}" = lab ]; then
    exec 9>&- # who reads may run
    exec "$PY" -m refusal.lab "${@:2}"
elif [ "${1:-}" = bench ]; then
    exec "$PY" -m benchmarks.harness "${@:2}"
elif [ "${1:-}" = claims ]; then
    exec "$PY" -m refusal.claims "${@:2}"
elif [ "${1:-}" = verify ]; then
    exec "$PY" -m refusal.verify "${@:2}"
else
    exec "$PY" -m refusal.run "$@"
fi
