#!/usr/bin/env bash
# Every check of the repository: set up what is missing, then lint, types and tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

USAGE='usage: ./run_tests.sh [all|unit|emulation] [PYTEST ARGUMENT ...]

  all          lint, types, unit tests and emulation tests (the default; needs root)
  unit         lint, types and the tests that need no root and no network
  emulation    the tests that build emulated networks (needs root)

Without one of these words, the arguments alone choose the tests, and lint and types are left out. Unit tests marked
python_mode also run uncompiled (NUMBA_DISABLE_JIT=1), those marked bounds also with bounds checks (NUMBA_BOUNDSCHECK=1).

examples: sudo ./run_tests.sh
          ./run_tests.sh unit -k steering
          ./run_tests.sh tests/unit/test_setup.py -x'

part=all
case ${1:-} in
  -h | --help) echo "$USAGE"; exit ;;
  all | unit | emulation) part=$1; shift ;;
  ?*) part=arguments ;;
esac

source experiments/harness/setup.sh
scope=emulation
[[ $part != unit && ($part != arguments || $EUID == 0) ]] || scope=unit  # arguments may name any test: root gets all
set_up "$scope"

if [[ ! -w . ]]; then  # the tools' caches lie here
  export RUFF_NO_CACHE=true MYPY_CACHE_DIR=/dev/null PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-} -p no:cacheprovider"
fi
failed=()
check() {  # check NAME COMMAND...: run it, remember whether it failed
  local name=$1 status=0
  shift
  printf '\n--- %s\n' "$name"
  "$@" || status=$?
  ((status == 0)) || failed+=("$name")
}

tests() {  # tests PYTEST-ARGUMENT...; where the arguments choose no test of a part, there is none to fail
  local status=0
  .venv/bin/python -m pytest "$@" || status=$?
  ((status == 5 && chosen)) || return "$status"
}
chosen=$#

# Beside the other checks, in what they leave of the cores: with the lowest priority, also as a group of tasks of its own
# (sched(7), "The autogroup feature"). No test without root is timed, and emulations must stand much more; those that are
# marked `alone` measure, and come when these have ended.
start_beside() {
  beside=$(mktemp -d --tmpdir nearstate-beside.XXXXXX)
  trap 'end_beside' EXIT
  trap 'exit 130' INT TERM HUP
  setsid chrt --idle 0 bash -c '
    beside() {  # beside NAME SETTING MARK PYTEST-ARGUMENT...
      local name=$1 setting=$2 mark=$3 status=0
      shift 3
      env "$setting" .venv/bin/python -m pytest tests/unit -m "$mark" -o cache_dir=".pytest_cache/$name" "$@" || status=$?
      echo "$status" >"$folder/$name.status"
    }
    folder=$1
    shift
    echo 19 2>/dev/null >/proc/$$/autogroup || true
    beside bounds NUMBA_BOUNDSCHECK=1 bounds "$@" >"$folder/bounds" 2>&1 &
    beside uncompiled NUMBA_DISABLE_JIT=1 python_mode "$@" >"$folder/uncompiled" 2>&1
    wait
  ' beside "$beside" "$@" </dev/null &
}

end_beside() {  # it is a process group of its own, or about to be one, which ends with this script
  [[ -z ${!:-} || -n ${ended:-} ]] || kill -TERM -- "-$!" "$!" 2>/dev/null || true
  rm -rf "$beside"
}

wait_beside() { wait "$!" || true; ended=1; }

tests_beside() {  # tests_beside NAME: tell what came of it
  local status
  cat "$beside/$1"
  status=$(cat "$beside/$1.status" 2>/dev/null || echo 1)
  ((status == 5 && chosen)) || return "$status"
}

case $part in
  all | unit)
    start_beside "$@"
    check "lint" .venv/bin/python -m ruff check .
    check "format (mend: .venv/bin/python -m ruff format .)" .venv/bin/python -m ruff format --check --quiet .
    check "types" .venv/bin/python -m mypy
    check "unit tests" tests tests/unit --numprocesses logical --maxprocesses 4 --dist loadfile "$@"  # each takes up to a gigabyte
    ;;
esac
case $part in
  all | emulation) check "emulation tests" tests tests/emulation -m "not alone" "$@" ;;
  arguments) check "tests" tests "$@" ;;
esac
case $part in
  all | unit)
    wait_beside
    check "unit tests, bounds checked" tests_beside bounds
    check "unit tests, uncompiled" tests_beside uncompiled
    ;;
esac
case $part in
  all | emulation) check "emulation tests that measure" tests tests/emulation -m alone "$@" ;;
esac
if ((${#failed[@]})); then
  printf 'run_tests.sh: failed:'; printf ' %s;' "${failed[@]}" | sed 's/;$/\n/'
  exit 1
fi
