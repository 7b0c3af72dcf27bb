#!/usr/bin/env bash
# ./run.sh [--no_cuda ...]    run every experiment, write its log, print the table of results
# ./run.sh test [...]         run the test suite
# Arguments go to exp-mnist.py, or to pytest. Variables that may stand before the command:
#   SEED=2024          in place of the seed below
#   LOGS=folder        where logs and networks go (else here, and to data/models)
#   PYTHON=.../python  a Python that has torch, to be used as it is (else .venv is made)
# and pip's own, for making .venv, such as PIP_INDEX_URL and PIP_EXTRA_INDEX_URL.
set -euo pipefail
complete=() # the logs that this run has written
trap 'say "interrupted${complete[0]:+; complete: ${complete[*]}}"; exit 130' INT
CDPATH='' cd -- "$(dirname -- "$0")"

seed=1234 # the last four digits of your student number; no spaces around =
seed=${SEED:-$seed}

memtorch="memtorch-cpu==1.1.6"
python=${PYTHON:-.venv/bin/python}
apt_install="Debian, Ubuntu: apt install"

say() { echo "run.sh: $*" >&2; }

if [[ ! $seed =~ ^[0-9]+$ ]]; then
    say "seed=$seed: the last four digits of your student number are wanted, such as 0731"
    exit 2
fi

quoted() { printf ' %q' "$@"; } # words as they can be pasted into a shell

imports() { # MODULE...: whether Python can import them; if not, $reason is its last line on why
    local modules="$*"
    reason=$("$python" -W ignore -c "import ${modules// /, }" 2>&1) && return
    reason=${reason##*$'\n'}
    return 1
}

right_version() { # PYTHON: whether the packages are to be had for it
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))'
}

watched() { # COMMAND...: say every 15 s how far it is, and how it ended, if it failed
    local log=.venv/setup.log start=$SECONDS status=0 watcher
    while { sleep 15 && kill -0 $$; } >/dev/null 2>&1; do # as long as run.sh runs
        say "  $((SECONDS - start)) s, .venv has $(du -sm .venv | cut -f 1) MB:" \
            "$(tail -n 1 $log | cut -c 1-70)"
    done 9>&- & # without the lock, which its last sleep would hold for long
    watcher=$!
    "$@" >$log 2>&1 || status=$?
    { kill $watcher && wait $watcher; } 2>/dev/null || true
    [ $status -eq 0 ] || tail -n 15 $log >&2
    return $status
}

check_python() { # the user's own, into which nothing is installed; $1 is test or nothing
    local needed=(torch torchvision numpy scikit-learn tqdm filelock) package missing=() reasons=""
    if [ "${1:-}" = test ]; then
        needed+=(pytest matplotlib nbclient nbformat ipykernel distributed)
    fi
    right_version "$python" || { say "PYTHON=$python is not Python 3.10 to 3.14"; exit 1; }
    imports "${needed[@]/scikit-learn/sklearn}" && return
    for package in "${needed[@]}"; do
        imports "${package/scikit-learn/sklearn}" && continue
        missing+=("$package")
        reasons+="${reasons:+; }$reason"
    done
    say "PYTHON=$python can't import ${missing[*]} ($reasons):" \
        "$(quoted "$python" -m pip install "${missing[@]}")"
    exit 1
}

installed() { # what .venv was made from: another Python, or other packages, and it is made anew
    "$python" --version 2>&1 | cut -d . -f 1,2
    cat requirements.txt
}

set_up() {
    if installed | cmp -s - .venv/installed; then return; fi
    say "set-up, this once: up to 5 GB in .venv, 5 to 20 minutes"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        say "set-up 1 of 3: making .venv"
        right_version python3 ||
            { say "python3 is not Python 3.10 to 3.14: put one of these first on PATH"; exit 1; }
        python3 -m venv .venv ||
            { say "python3 can't make .venv ($apt_install python3-venv)"; exit 1; }
    fi
    say "set-up 2 of 3: downloading and installing what requirements.txt lists"
    watched "$python" -m pip install -r requirements.txt --progress-bar off ||
        { say "installing requirements.txt failed, as the lines above say"; exit 1; }
    installed >.venv/installed
}

# MemTorch has no ready build, reads torch while it builds, and asks for a withdrawn name of
# scikit-learn. A cached build may be of another torch, and then fails at import.
set_up_memtorch() { # fails where it can't be had: all but the crossbar works without it
    local needed=("setuptools<82" wheel ninja scipy pandas matplotlib)
    local options=(--no-deps --no-build-isolation --no-cache-dir)
    local path=$PWD/.venv/bin:$PATH # for ninja, without which one file is compiled at a time
    if imports memtorch; then return; fi
    if [ -n "${PYTHON:-}" ]; then
        say "no crossbar, as PYTHON=$python can't import memtorch ($reason):" \
            "$(quoted "$python" -m pip install "${needed[@]}") &&" \
            "$(quoted "$python" -m pip install "${options[@]}" "$memtorch")"
        return 1
    fi
    say "set-up 3 of 3: building MemTorch, 2 to 5 minutes, as .venv can't import it ($reason)"
    if ! command -v g++ >/dev/null; then
        say "there is no g++ ($apt_install g++ python3-dev)"
    elif ! PATH=$path watched "$python" -m pip install --force-reinstall "${options[@]}" \
        "$memtorch"; then
        say "MemTorch can't be built, as the lines above say ($apt_install g++ python3-dev)"
    elif ! imports memtorch; then
        say "MemTorch is built, but can't be imported: $reason"
    else
        return 0
    fi
    say "all but the crossbar works without MemTorch; the next run tries again"
    return 1
}

if command -v flock >/dev/null; then # two first runs at once: one of them sets up
    exec 9<requirements.txt
    flock -n 9 || { say "waiting, as another run sets up"; flock 9 || true; }
fi
if [ -n "${PYTHON:-}" ]; then check_python "$@"; else set_up; fi
crossbar=0
say "looking for torch and MemTorch"
if [ -e memristor.py ] && set_up_memtorch; then crossbar=1; fi
exec 9>&-

if [ "${1:-}" = test ]; then
    if [ -n "${CI:-}" ] && [ $crossbar -eq 0 ]; then
        say "no tests: CI is set, and there is no MemTorch"
        exit 1
    fi
    exec "$python" -m pytest "${@:2}"
fi

logs=${LOGS:+$LOGS/}
models=${LOGS:-data}/models
former=${LOGS:-data}/former_logs/$(date +%Y-%m-%d_%H.%M.%S)_$$
memristor=("$python" memristor.py) # its networks are IRM's, so few of the arguments concern it
previous=""
for argument in "$@"; do
    case $argument in
        --seed | --seed=*) say "in place of --seed write SEED=2024 ./run.sh"; exit 2 ;;
        --trainer | --trainer=*) say "--trainer is for exp-mnist.py: this runs all"; exit 2 ;;
        --no_cuda | --dataset_path=*) memristor+=("$argument") ;;
    esac
    if [ "$previous" = --dataset_path ]; then memristor+=("$previous" "$argument"); fi
    previous=$argument
done

log() { # LOG COMMAND...: what the command prints goes to LOG, once it is complete
    count=$((count + 1))
    say "$count of $((4 + crossbar)):$(quoted "${@:2}")"
    "${@:2}" >"$partial" || return
    grep -q "^Summary: " "$partial" || { cat "$partial"; exit; } # --help, say
    if [ -e "$1" ] && ! cmp -s "$partial" "$1"; then
        if ! { mkdir -p "$former" && cp -p "$1" "$former"; }; then
            mv "$partial" "$1.new"
            say "the $1 that was here cannot be kept in $former; the new one is $1.new"
            return 1
        fi
        say "the $1 that was here is kept in $former"
    fi
    mv "$partial" "$1" && complete+=("$1")
}

experiments() { # until one fails
    local train=("$python" exp-mnist.py --seed "$seed") trainer network
    for trainer in ERM groupDRO Backdoor; do
        log "$logs${trainer}_log.txt" "${train[@]}" "$@" --trainer $trainer || return
    done
    log "${logs}IRM_log.txt" "${train[@]}" --save_model "$models" "$@" --trainer IRM || return
    if [ $crossbar -eq 0 ]; then return; fi
    memristor+=(--load_model)
    while read -r network; do memristor+=("$network"); done \
        < <(sed -n "s/^Saved: //p" "${logs}IRM_log.txt")
    log "${logs}memristor_log.txt" "${memristor[@]}"
}

mkdir -p "${logs:-.}"
partial=$logs.run.$$.partial # $$ tells this run from others at the same time
trap 'rm -f "$partial"' EXIT
for left in "$logs".run.*.partial; do # by runs that were killed
    process=${left%.partial}
    [ ! -e "$left" ] || kill -0 "${process##*.}" 2>/dev/null || rm -f "$left"
done
count=0 status=0
experiments "$@" || status=$?
[ ${#complete[@]} -eq 0 ] || "$python" metric.py "${complete[@]}" || status=$?
exit $status
