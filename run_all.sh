#!/usr/bin/env bash
# The main job: set up what is missing, run the experiments, draw the figures, write the report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

USAGE='usage: sudo ./run_all.sh [--profile smoke|quick|paper] [--pcap] [EXPERIMENT ...]

Sets up what is missing, runs the experiments (all of them if none is named), draws their figures, writes
results/<run id>/report.html and prints where it is, with a table of centralized against integrated state.

  --profile smoke    seconds for each experiment: does everything work?
  --profile quick    minutes in all: believable shapes (the default)
  --profile paper    full sweeps, repeats and confidence intervals
  --pcap             record every trial at each host interface, in results/<run id>/pcap/
  -h, --help         this text

exit status: 0; 1 when something failed, or no trial was valid; 2 for a wrong argument
example: sudo ./run_all.sh --profile smoke state_access_latency
experiments and their questions, after the first call: .venv/bin/python -m experiments list'

refuse() {
  printf 'run_all.sh: %s; see ./run_all.sh --help\n' "$1" >&2
  exit 2
}

profile=quick options=() experiments=()
while (($#)); do
  case $1 in
    -h | --help) echo "$USAGE"; exit ;;
    --profile) (($# > 1)) || refuse "--profile needs a value: smoke, quick or paper"; profile=$2; shift ;;
    --profile=*) profile=${1#*=} ;;
    --pcap) options+=("$1") ;;
    --) shift; experiments+=("$@"); break ;;
    -*) refuse "unknown option $1: valid are --profile, --pcap and --help" ;;
    *) experiments+=("$1") ;;
  esac
  shift
done
[[ $profile == smoke || $profile == quick || $profile == paper ]] ||
  refuse "unknown profile '$profile': valid are smoke, quick and paper"

known=()  # a file of experiments/ is an experiment, as in experiments/harness/spec.py
for file in experiments/*.py; do
  name=${file##*/} name=${name%.py}
  [[ $name == _* || ! -e $file ]] || known+=("$name")
done
for name in ${experiments[@]+"${experiments[@]}"}; do
  [[ " ${known[*]-} " == *" $name "* && $name != *" "* ]] || refuse "unknown experiment '$name': valid are ${known[*]-}"
done

source experiments/harness/setup.sh
set_up emulation
exec .venv/bin/python -m experiments run --profile "$profile" ${options[@]+"${options[@]}"} ${experiments[@]+"${experiments[@]}"}
