"""Which services do real clients meet? nginx, iperf3, sshd and dnsmasq on an emulated host, each as the distribution built it.

    process on the host --> own mount namespace: /run is an empty folder in memory, with configurations, files and keys
        `--> unshare, one a server: own process namespace --> the server and whatever it forks

Nothing outlives the run or needs removing: the folder goes with its last process, and a server's children go with the first
process of their namespace, which dies with this one (PR_SET_PDEATHSIG), also when the runner was killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datastore.base.errors import NearstateError
from topologies.emulation import system

HTTP_PORT, IPERF_PORT, SSH_PORT, DNS_PORT = 80, 5201, 2222, 53
FOLDER = Path("/run")
"""Where sshd looks for its own folder of privilege separation, whatever its configuration says."""
FOLDER_MBYTES = 128
DOMAIN = "www.nearstate.test"
READY_S = 10.0
OPEN_FILES = 16_384
LISTEN, ESTABLISHED = "0A", "01"
"""States in /proc/net/tcp (<net/tcp_states.h>)."""
SERVERS = {"nginx": "nginx", "iperf3": "iperf3", "sshd": "openssh-server", "ssh-keygen": "openssh-client",
           "dnsmasq": "dnsmasq-base", "unshare": "util-linux"}  # fmt: skip
CLIENTS = {"ping": "iputils-ping", "traceroute": "traceroute", "dig": "bind9-dnsutils", "curl": "curl",
           "scp": "openssh-client", "iperf3": "iperf3", "wrk": "wrk"}  # fmt: skip
"""The programs on either side and the packages that have them."""

# The default backlog of 511 would drop handshakes when a thousand connections open at once.
NGINX = """
daemon off; user nobody nogroup; worker_processes 1; worker_rlimit_nofile {open_files}; pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {open_files}; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_timeout 60; keepalive_requests 100000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen {address}:80 backlog=4096; root {folder}/files; limit_rate {rate_bytes}; }}
}}
"""
# Only files can be copied, and only below one folder; a login shell of this machine is never started.
SSHD = """
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
ChrootDirectory {folder}/uploads
ForceCommand internal-sftp
Subsystem sftp internal-sftp
"""
SHADOW = "root:*:19000:0:99999:7:::\n"
"""sshd refuses an account whose password is locked ("!"), as some distributions' root is; "*" is none, but not locked."""


def main(config: dict[str, Any], control: Any) -> None:
    """Process target. config: address to serve at; files {name: bytes} to serve, of random content by `seed`; services: which
    of the servers to start, all without it; rate_bytes: a second, the most the web server sends on a connection, without a
    limit if absent.

    Answers {"connections": true} with {"connections": established at the web server}.
    """
    require(SERVERS)
    raise_open_files()
    os.umask(0o022)  # what is written here is read by servers' processes of other users
    system.private_folder(str(FOLDER), FOLDER_MBYTES)
    served = write_files(config["files"], int(config["seed"]))
    write_configurations(config["address"], int(config.get("rate_bytes", 0)))
    started = commands(config["address"])
    processes = {name: start(started[name]) for name in config.get("services", started)}
    await_listening(processes)
    keys = {"user_key": (FOLDER / "user_key").read_text(), "host_key": (FOLDER / "host_key.pub").read_text()}
    control.send({"ready": True, "sha256": served, **keys})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        control.send({"connections": sum(1 for port in ports_in(ESTABLISHED) if port == HTTP_PORT)})


def require(packages: Mapping[str, str]) -> None:
    """Return when all programs are installed. Raises NearstateError naming the packages of those that are not."""
    missing = {program: package for program, package in packages.items() if not shutil.which(program)}
    if missing:
        raise NearstateError(f"real clients: {', '.join(missing)} not installed: apt-get install {' '.join(missing.values())}")


def raise_open_files() -> None:
    """Let this process and those it starts have a few thousand connections; the usual limit is 1,024 open files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def write_files(sizes: Mapping[str, int], seed: int) -> dict[str, str]:
    """Write the files to serve and return their SHA-256 sums."""
    folder = FOLDER / "files"
    folder.mkdir(mode=0o755)
    source = random.Random(seed)
    sums = {}
    for name, size in sizes.items():
        content = source.randbytes(size)
        (folder / name).write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    return sums


def write_configurations(address: str, rate_bytes: int) -> None:
    """Write what the servers read, with keys for this run only. rate_bytes: 0 is no limit."""
    (FOLDER / "sshd").mkdir(mode=0o755)
    (FOLDER / "uploads").mkdir(mode=0o755)
    filled = {"folder": FOLDER, "address": address, "open_files": OPEN_FILES // 2, "port": SSH_PORT, "rate_bytes": rate_bytes}
    (FOLDER / "nginx.conf").write_text(NGINX.format(**filled))
    (FOLDER / "sshd.conf").write_text(SSHD.format(**filled))
    (FOLDER / "shadow").write_text(SHADOW)
    system.cover_file("/etc/shadow", str(FOLDER / "shadow"))
    for name in ("host_key", "user_key"):
        system.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(FOLDER / name)], dict(os.environ))


def commands(address: str) -> dict[str, list[str]]:
    """Return how each server is started, in the foreground."""
    return {
        "nginx": ["nginx", "-e", "stderr", "-c", str(FOLDER / "nginx.conf")],
        "iperf3": ["iperf3", "--server", "--bind", address, "--port", str(IPERF_PORT)],
        "sshd": [str(shutil.which("sshd")), "-D", "-e", "-f", str(FOLDER / "sshd.conf")],  # it wants its full path
        "dnsmasq": ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--no-daemon",
                    "--bind-interfaces", "--except-interface=lo", f"--listen-address={address}", f"--port={DNS_PORT}",
                    f"--host-record={DOMAIN},{address}", "--pid-file="],
    }  # fmt: skip


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a server as the first process of a namespace: everything it forks dies with it, and it with us."""
    isolated = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", *command]
    return subprocess.Popen(isolated, stdin=subprocess.DEVNULL, preexec_fn=system.dying_with_us())


def await_listening(processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Wait until all servers listen; without connecting, which a server could take for a client."""
    ports = {"nginx": HTTP_PORT, "iperf3": IPERF_PORT, "sshd": SSH_PORT, "dnsmasq": DNS_PORT}
    wanted = {name: ports[name] for name in processes}
    deadline = time.monotonic() + READY_S
    while missing := [name for name, port in wanted.items() if port not in set(ports_in(LISTEN))]:
        ended = [name for name in missing if processes[name].poll() is not None]
        if ended or time.monotonic() > deadline:
            raise NearstateError(f"real clients: {', '.join(ended or missing)} does not listen; what it said is above")
        time.sleep(0.01)


def ports_in(state: str) -> Iterator[int]:
    """Yield the local port of each TCP socket of this namespace in a state."""
    for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]:
        _, local, _, found, *_ = line.split()
        if found == state:
            yield int(local.rpartition(":")[2], 16)
