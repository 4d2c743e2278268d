#!/bin/sh
# The environment, then the workflow: ./run_all.sh --help tells the flags.
# CDELTA_TORCH_INDEX names a package index for torch alone, e.g. one with CPU-only builds.
set -eu
root=$(cd "$(dirname "$0")" && pwd -P)
lock=$root/requirements.lock
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this copy of the package, whatever the environment has

say() { echo "run_all.sh: $*" >&2; }

# The stamp holds the lock's checksum, so that a new lock is installed and an old stamp costs nothing to check.
is_ready() { [ -x "$1/bin/python" ] && [ "$(cat "$1/.cdelta-ready" 2>/dev/null)" = "$(cksum <"$lock")" ]; }
mark_ready() { cksum <"$lock" >"$1/.cdelta-ready" 2>/dev/null || true; }

# Whether an environment that we did not make has the locked versions, and the packages import.
fits() {
    "$1/bin/python" - "$lock" <<'PY' 2>/dev/null
import importlib, importlib.metadata, sys
pins = [line.split("==") for line in open(sys.argv[1]) if "==" in line and ";" not in line]
ok = sys.version_info >= (3, 11) and all(importlib.metadata.version(name).split("+")[0] == pin.strip() for name, pin in pins)
for name in "torch transformers datasets transformer_lens peft papermill jupytext jupyterlab snakemake nbconvert seaborn pytest".split() * ok:
    importlib.import_module(name)
sys.exit(not ok)
PY
}

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "Python 3.11 or newer is needed, and none is on the PATH: install it (apt install python3 python3-venv, or brew install python)."
    exit 2
}

pip_install() { "$root/.venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }

# A marker stays while an installation is under way: after a kill, the next start begins it anew.
install() {
    env=$root/.venv
    python=$(find_python) || exit $?
    if [ -e "$env/.cdelta-installing" ] || [ ! -x "$env/bin/python" ]; then rm -rf "$env"; fi
    mkdir -p "$env"
    touch "$env/.cdelta-installing"
    say "installing into $env (once; minutes, about 2.5 GB with a CPU build of torch)"
    [ -x "$env/bin/python" ] || "$python" -m venv "$env" || { say "python -m venv failed: on Debian or Ubuntu, apt install python3-venv."; exit 1; }
    pip_install "torch==$(sed -n 's/^torch==//p' "$lock")" ${CDELTA_TORCH_INDEX:+--index-url "$CDELTA_TORCH_INDEX"}
    say "torch is there, installing the other packages"
    pip_install --requirement "$lock"
    pip_install --no-deps --no-build-isolation --editable "$root"
    mark_ready "$env"
    rm "$env/.cdelta-installing"
}

choose() {
    for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [ -n "$prefix" ] && [ "$prefix" != "$root/.venv" ]; then
            if is_ready "$prefix"; then echo "$prefix"; return; fi
            if fits "$prefix"; then mark_ready "$prefix"; echo "$prefix"; return; fi
            say "the active environment $prefix lacks the locked packages: using $root/.venv instead."
        fi
    done
    is_ready "$root/.venv" || install >&2
    echo "$root/.venv"
}

case " $* " in *" --test "*) ;; *" --help "* | *" -h "*) exec "$(find_python)" -m cdelta.artifact.workflow --help ;; esac
prefix=$(choose)
exec "$prefix/bin/python" -m cdelta.artifact.workflow "$@"
