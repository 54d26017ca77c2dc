# shellcheck shell=bash
# What must be there before anything runs? Sourced by run_all.sh and run_tests.sh, from the repository's root, under
# `set -euo pipefail`:
#
#   set_up emulation    everything; needs root
#   set_up unit         what tests without root and network need: no switch, fewer packages, root only to install them
#
#   1 system packages      dpkg says which are missing; apt installs those
#   2 Python packages      .venv from requirements.txt; .venv/complete, written last, names what it was built from
#   3 Open vSwitch         asked on its control sockets every time: after a reboot it does not run
#   4 compiled functions   kept under .venv/compiled; `warmed` there names the sources that were compiled
#
# Every check is made on every call (together 0.1 s); when nothing is missing, nothing is printed. One set-up runs at a
# time: the lock is the repository's folder. An interrupted step leaves its mark unwritten and is done again.

# The interpreter of the distribution, whatever `python3` on the PATH may be: Mininet is installed for that one.
PYTHON=/usr/bin/python3
OVS_CTL=/usr/share/openvswitch/scripts/ovs-ctl
UNIT_PACKAGES=(python3 python3-venv mininet libxdp1 libpcap0.8 etcd-server)
EMULATION_PACKAGES=("${UNIT_PACKAGES[@]}"
  openvswitch-switch nftables redis-server ethtool iproute2 iputils-ping procps kmod util-linux
  nginx curl wrk iperf3 openssh-server openssh-client dnsmasq-base bind9-dnsutils traceroute tcpdump
  conntrackd)
VENV_MBYTES=1500  # 700 when installed; pip unpacks beside it
STEPS=4

# Other Pythons' settings would make .venv's interpreter look in the wrong places. Administrators' tools may be missing
# from the PATH (cron, su); what the user put first stays first.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV PYENV_VERSION PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
PATH=${PATH:-/usr/bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

fail() {  # fail WHAT-AND-FIX [STATUS]
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-1}"
}

set_up() {  # set_up emulation|unit
  local scope=$1 lock work=()
  local -n packages=${scope^^}_PACKAGES
  [[ $scope == unit || $EUID == 0 ]] ||
    fail "needs root, for network namespaces and the switch: call \`sudo $0\` (tests without root: ./run_tests.sh unit)"
  command -v dpkg-query >/dev/null ||
    fail "needs Debian 12 or Ubuntu 22.04 or 24.04: there is no dpkg-query here, so no package can be installed"
  exec {lock}<.
  flock -n "$lock" || { echo "waiting for another set-up of this folder to end ..."; flock "$lock"; }
  choose_cache

  mapfile -t MISSING < <(missing_packages "${packages[@]}")
  ((${#MISSING[@]} == 0)) && [[ ! -e $SERVICES_MARK ]] || work[1]=1
  venv_is_complete || work[2]=1
  [[ $scope == unit ]] || switch_runs || work[3]=1
  [[ -z ${work[2]:-} ]] && functions_are_compiled || work[4]=1
  if ((${#work[@]})); then
    open_log
    ((${#MISSING[@]} == 0 || EUID == 0)) ||
      fail "packages are missing and only root may install them: sudo apt-get install ${MISSING[*]}"
    step 1 "system packages" "${work[1]:-}" install_packages
    step 2 "Python packages" "${work[2]:-}" build_venv
    [[ $scope == unit ]] || step 3 "Open vSwitch" "${work[3]:-}" start_switch
    step 4 "compiled functions" "${work[4]:-}" compile_functions
  fi
  exec {lock}<&-
}

# --- 1 system packages --------------------------------------------------------------------------------------------

# Installing these would start a service, and at every boot from then on; the emulation needs only their programs. The mark
# names the services that we brought, also to the next call when this one is interrupted. Those that were there, by whatever
# package, are left alone.
declare -A SERVICES=([redis-server]=redis-server [nginx]=nginx [openssh-server]=ssh [conntrackd]=conntrackd
  [etcd-server]=etcd)
SERVICES_MARK=.venv/services-installed-by-us
UNITS=/lib/systemd/system
POLICY=/usr/sbin/policy-rc.d  # invoke-rc.d(8) and deb-systemd-invoke(1p) ask it before they start a service
POLICY_MARK="# put here by nearstate's set-up, which removes it again"

missing_packages() {  # prints those of the named packages that are not installed, one a line
  # Ubuntu 24.04 calls libraries whose time_t has 64 bits NAMEt64; apt installs that one when asked for NAME.
  local package status
  declare -A installed=()
  while read -r package status; do
    [[ $status == installed ]] && installed[${package%t64}]=1
  done < <(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" "${@/%/t64}" 2>/dev/null)
  for package; do
    [[ -n ${installed[$package]:-} ]] || echo "$package"
  done
}

install_packages() {
  exec {lock}<&-  # a service that apt starts must not keep the lock
  # needrestart (Ubuntu) would ask, or restart services of others
  export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 NEEDRESTART_MODE=l
  trap lift_policy EXIT
  if ((${#MISSING[@]})); then
    mkdir -p .venv
    mark_services
    forbid_services
    if compgen -G '/var/lib/dpkg/updates/*' >/dev/null; then  # an interrupted dpkg: apt refuses to work before this
      dpkg --configure -a --force-confdef --force-confold
    fi
    apt-get update || echo "apt-get update failed; trying with the lists there are"
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
      -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "${MISSING[@]}"
  fi
  [[ ! -e $SERVICES_MARK ]] || leave_services_off
}

mark_services() {
  local package service
  for package in "${MISSING[@]}"; do
    service=${SERVICES[$package]:-}
    [[ -z $service || -e $UNITS/$service.service ]] || echo "$service" >>"$SERVICES_MARK"
  done
}

forbid_services() {  # a machine that has a policy of its own (containers) keeps it
  [[ -e $SERVICES_MARK && ! -e $POLICY ]] || return 0
  local names
  names=$(sort -u "$SERVICES_MARK" | paste -s -d '|')
  # shellcheck disable=SC2016
  printf '#!/bin/sh\n%s\nfor word; do case ${word%%.*} in %s) exit 101 ;; esac; done\n' "$POLICY_MARK" "$names" >"$POLICY"
  chmod 755 "$POLICY"
}

lift_policy() {
  ! grep -qsxF "$POLICY_MARK" "$POLICY" || rm -f "$POLICY"
}

leave_services_off() {
  local service
  for service in $(sort -u "$SERVICES_MARK"); do
    if [[ -d /run/systemd/system ]]; then
      [[ ! -e $UNITS/$service.socket ]] || systemctl disable --now "$service.socket"  # Ubuntu's ssh
      systemctl disable --now "$service"
    else
      service "$service" stop || true  # it need not run
      update-rc.d "$service" disable
    fi
  done
  rm "$SERVICES_MARK"
}

# --- 2 Python packages --------------------------------------------------------------------------------------------

venv_identity() {  # changes whenever .venv must be built again
  { cat requirements.txt; readlink -f "$PYTHON"; declare -f build_venv; } | sha256sum | cut -d ' ' -f 1
}

venv_is_complete() {
  [[ -x .venv/bin/python ]] && [[ $(cat .venv/complete 2>/dev/null) == "$(venv_identity)" ]] &&
    compgen -G '.venv/lib/python3.*/site-packages/mininet/net.py' >/dev/null
}

build_venv() {
  "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    { echo "unsupported Python: $("$PYTHON" --version)"; return 1; }
  # From nothing, as pip trusts what a killed pip left half unpacked. Compiled functions name their versions themselves.
  find .venv -mindepth 1 -maxdepth 1 ! -name compiled -exec rm -rf {} + 2>/dev/null || true
  (($(df -Pm . | awk 'NR == 2 { print $4 }') >= VENV_MBYTES)) ||
    { echo "No space left on device: less than the $VENV_MBYTES MB that .venv takes while it is built"; return 1; }
  "$PYTHON" -m venv .venv
  mkdir -p .venv/tmp  # what a killed pip leaves goes with the next build
  TMPDIR=$PWD/.venv/tmp .venv/bin/python -m pip install --progress-bar off -r requirements.txt
  local site
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  ln -sfn "$("$PYTHON" -I -c 'import mininet, os; print(os.path.dirname(mininet.__file__))')" "$site/mininet"
  .venv/bin/python -W ignore -c 'import mininet.net, numba, os_ken, pandas'
  rm -rf .venv/tmp
  venv_identity >.venv/complete.new
  mv .venv/complete.new .venv/complete
}

# --- 3 Open vSwitch -----------------------------------------------------------------------------------------------

switch_runs() {
  ovs-appctl -T 5 -t ovsdb-server version >/dev/null 2>&1 && ovs-appctl -T 5 -t ovs-vswitchd version >/dev/null 2>&1
}

start_switch() {
  exec {lock}<&-  # the daemons must not keep the lock
  if [[ -d /run/systemd/system ]]; then
    systemctl start openvswitch-switch || systemctl status --no-pager --lines 20 openvswitch-switch || true
  else
    # ovs-ctl gives up on kernels that load modules but lack openvswitch's; the userspace datapath needs none
    "$OVS_CTL" start --system-id=random || "$OVS_CTL" start --system-id=random --no-ovs-vswitchd &&
      pgrep -x ovs-vswitchd >/dev/null ||
      ovs-vswitchd unix:/var/run/openvswitch/db.sock -vconsole:emer -vsyslog:err -vfile:info --mlockall --no-chdir \
        --log-file --pidfile --detach --monitor || true
  fi
  local tries
  for tries in {1..50}; do
    switch_runs && return
    sleep 0.2
  done
  echo "Open vSwitch does not answer after $tries tries"
  return 1
}

# --- 4 compiled functions -----------------------------------------------------------------------------------------

choose_cache() {  # .venv/compiled; a folder of the user's own where root made .venv
  COMPILED=.venv/compiled
  [[ -e .venv && ! -w .venv ]] || return 0
  COMPILED=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/nearstate
  if ! mkdir -p "$COMPILED" 2>/dev/null; then
    COMPILED=/tmp/nearstate-compiled-$EUID
    mkdir -m 700 -p "$COMPILED"
  fi
  [[ -O $COMPILED && ! -L $COMPILED ]] ||  # code is loaded from it
    fail "compiled functions would lie in $COMPILED, which is another user's: remove it or set XDG_CACHE_HOME"
  NUMBA_CACHE_DIR=$COMPILED/$(sources_identity)
  export NUMBA_CACHE_DIR
}

sources_identity() {  # a superset of the compiled sources
  find datastore nfs topologies experiments -name '*.py' -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c 1-12
}

functions_are_compiled() {
  [[ $(cat "$COMPILED/warmed" 2>/dev/null) == "$(sources_identity) $(cat .venv/complete)" ]]
}

compile_functions() {
  mkdir -p "$COMPILED"
  env -u NUMBA_DISABLE_JIT -u NUMBA_BOUNDSCHECK .venv/bin/python -m experiments.harness.warm
  echo "$(sources_identity) $(cat .venv/complete)" >"$COMPILED/warmed"
}

# --- steps, their progress and their failures ---------------------------------------------------------------------

open_log() {
  LOG=results/setup.log
  { mkdir -p results && : >"$LOG"; } 2>/dev/null || LOG=$(mktemp --tmpdir nearstate-setup.XXXXXX.log) ||
    fail "no log can be written to results/ or ${TMPDIR:-/tmp}: free some space (df -h) or make one of them writable"
}

step() {  # step NUMBER NAME NEEDED FUNCTION: run FUNCTION under `set -e` into the log; show its name and seconds
  local name=$2 label="[$1/$STEPS] $2 ..." start=$SECONDS child status=0 written
  [[ -n $3 ]] || { echo "$label there"; return; }
  echo "=== $label" >>"$LOG"
  written=$(wc -c <"$LOG")
  printf '%s ' "$label"
  set -m  # a process group of its own, so that an interrupt reaches pip's and apt's children
  (set -e; "$4") >>"$LOG" 2>&1 </dev/null &
  child=$!
  set +m
  trap 'interrupt "$child"; fail "interrupted at \"$name\"; call again to go on" 130' INT TERM HUP
  while [[ -t 1 ]] && kill -0 "$child" 2>/dev/null; do
    show_progress "$label" $((SECONDS - start))
    sleep 0.2
  done
  wait "$child" || status=$?
  trap - INT TERM HUP
  [[ ! -t 1 ]] || printf '\r\e[K%s ' "$label"
  if ((status)); then
    echo "failed after $((SECONDS - start)) s; the end of $LOG:"
    tail -c "+$((written + 1))" "$LOG" | tail -n 15 | cut -c 1-160 | sed 's/^/    /'
    fail "$name: $(reason "$(tail -c "+$((written + 1))" "$LOG" | tail -n 200)")"
  fi
  echo "$((SECONDS - start)) s"
}

interrupt() {  # interrupt PROCESS-GROUP: apt and pip clean up behind themselves; never KILL, which would break dpkg
  kill -INT -- "-$1" 2>/dev/null
  local tries
  for tries in {1..50}; do
    kill -0 -- "-$1" 2>/dev/null || break
    sleep 0.1
  done
  kill -TERM -- "-$1" 2>/dev/null || true
  echo
}

show_progress() {  # the step's seconds and what it says last, on one line of the terminal
  local last width
  last=$(tail -n 1 "$LOG" | tr -dc '[:print:]')
  width=$(($(tput cols 2>/dev/null || echo 80) - ${#1} - 12))
  printf '\r\e[K%s %s s  %s' "$1" "$2" "${last:0:$((width > 0 ? width : 0))}"
}

reason() {  # reason OUTPUT: the cause as one line with its fix
  local free_mbytes
  free_mbytes=$(df -Pm . /var 2>/dev/null | awk 'NR > 1 && (!least || $4 < least) { least = $4 } END { print least }')
  case $1 in
    *"No space left on device"* | *"enough free space"* | *"Disk quota exceeded"*)
      echo "the disk is full (${free_mbytes:-?} MB free): free $VENV_MBYTES MB here and under /var, then call again" ;;
    *"unsupported Python"*)
      echo "$PYTHON is none of Python 3.10 to 3.13: use Debian 12, or Ubuntu 22.04 or 24.04" ;;
    *"Temporary failure"* | *"Could not resolve"* | *"Failed to establish a new connection"* | *"Could not connect"* | \
      *"Network is unreachable"* | *"Name or service not known"* | *"Connection timed out"* | *"Read timed out"*)
      echo "the package servers cannot be reached: check the network and http_proxy, https_proxy, then call again" ;;
    *"CERTIFICATE_VERIFY_FAILED"*)
      echo "the package server's certificate is not accepted: check the clock (date) and the proxy's certificate" ;;
    *"Unable to locate package"* | *"no installation candidate"*)
      echo "apt does not know a package; on Ubuntu: add-apt-repository universe, then call again" ;;
    *"Could not get lock"* | *"Unable to acquire the dpkg"*)
      echo "another package manager holds apt's lock: wait for it to end, then call again" ;;
    *"ensurepip is not available"*)
      echo "$PYTHON cannot make virtual environments: apt-get install --reinstall python3-venv, then call again" ;;
    *"No matching distribution found"*)
      echo "the package index lacks a version that requirements.txt names: check pip's settings (pip config list)" ;;
    *"Open vSwitch does not answer"*)
      echo "it does not start: see /var/log/openvswitch/ovs-vswitchd.log and \`ovs-vsctl show\`" ;;
    *) echo "see $LOG for the cause, mend it and call again" ;;
  esac
}
