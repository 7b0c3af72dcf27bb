#!/bin/sh
# ./run.sh [--no_cuda ...]    run all experiments, write their logs, print a table
# ./run.sh test [...]         run the tests
# The arguments go to exp-mnist.py, or to pytest. Two variables can stand before the command:
#   SEED=2024                 use this seed instead of the one below
#   PYTHON=/path/to/python    use this Python instead of .venv, and install nothing
set -eu
trap 'exit 130' INT # Ctrl-C
CDPATH='' cd -- "$(dirname -- "$0")"

seed=1234 # the last four digits of your student ID; no spaces around =
seed=${SEED:-$seed}
python=${PYTHON:-.venv/bin/python}

say() { echo "run.sh: $*" >&2; }

check_version() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' ||
        { say "$1 is not Python 3.10 to 3.14. Set PYTHON, or put one of these first on PATH."; exit 1; }
}

install_packages() {
    say "setting up .venv, once: 5 to 20 minutes, up to 5 GB"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        check_version python3
        python3 -c 'import ensurepip, venv' 2>/dev/null ||
            { say "Python's venv module is missing. Debian, Ubuntu: apt install python3-venv"; exit 1; }
        python3 -m venv --clear .venv
    fi
    "$python" -m pip install -r requirements.txt
    "$python" -c 'import torch, torchvision, numpy, sklearn, pandas, matplotlib, distributed, pytest'
    cp requirements.txt .venv/installed.txt
}

# pip compiles MemTorch. --no-deps, because MemTorch requires the withdrawn package `sklearn`.
# --no-cache-dir, because pip's cache may have a build for another torch.
install_memtorch() { # fail if MemTorch still cannot be imported
    "$python" -c 'import memtorch' 2>/dev/null && return
    [ -z "${PYTHON:-}" ] || return
    say "building MemTorch: 2 to 5 minutes (it needs g++; Debian, Ubuntu: apt install g++ python3-dev)"
    PATH=$PWD/.venv/bin:$PATH "$python" -m pip install --force-reinstall \
        --no-deps --no-build-isolation --no-cache-dir memtorch-cpu==1.1.6 &&
        "$python" -c 'import memtorch'
}

if command -v flock >/dev/null; then # one run at a time
    exec 9>run.lock
    flock -n 9 || { say "waiting for another run to end"; flock 9; }
fi
unset PIP_TARGET PIP_PREFIX # pip must install into .venv
export PIP_USER=0
if [ -n "${PYTHON:-}" ]; then
    check_version "$python"
elif ! cmp -s requirements.txt .venv/installed.txt || ! "$python" -m pip --version >/dev/null; then
    install_packages
fi
crossbar=yes
if [ ! -e memristor.py ]; then
    crossbar=no
    say "memristor.py is missing. The crossbar is left out."
elif ! install_memtorch; then
    crossbar=no
    say "MemTorch cannot be imported. The crossbar is left out."
fi

if [ "${1:-}" = test ]; then
    shift
    exec "$python" -m pytest "$@"
fi

logs=""
experiment() { # LOG COMMAND...
    log=$1
    shift
    say "$* > $log"
    "$@" >"$log.tmp"
    if ! grep -q '^Summary: ' "$log.tmp"; then # for example, with --help
        cat "$log.tmp"
        exit
    fi
    mv "$log.tmp" "$log"
    logs="$logs $log"
}

for trainer in ERM groupDRO Backdoor; do
    experiment ${trainer}_log.txt "$python" exp-mnist.py --seed "$seed" "$@" --trainer $trainer
done
experiment IRM_log.txt "$python" exp-mnist.py --seed "$seed" "$@" --trainer IRM \
    --save_model data/models/IRM
if [ $crossbar = yes ]; then
    experiment memristor_log.txt "$python" memristor.py "$@" --load_model data/models/IRM
fi
"$python" metric.py $logs
