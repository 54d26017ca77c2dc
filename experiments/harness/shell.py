"""An emulated network to walk around in: a placement and an NF running, Mininet's prompt open."""

from __future__ import annotations

import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.harness import doctor, spec
from experiments.harness.bench import Bench
from experiments.harness.runner import PRELOAD, network_parameters
from experiments.harness.spec import Experiment, Trial
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

HINTS = """
{placement} placement, {nf} on {hosts}; the hosts' interfaces are inside, outside and storage
  client ping -c 3 server          through the NF
  client ip addr                   any command on any host: HOST COMMAND
  nf1 {python} -m datastore list   the stores
  exit                             takes everything down again
"""


def open_shell(topology: str, placement: str, nf: str, nf_hosts: int) -> None:
    """Bring the network up with stores and NFs running and open the prompt; everything goes when it is left."""
    doctor.require()
    fixed = {"nf_hosts": nf_hosts} if topology != "back_to_back" else {}
    experiment = Experiment("shell", "packet_latency", ({"topology": (topology,), "nf": (nf,), "placement": (placement,)},),
                            network=fixed)  # fmt: skip
    spec.check("shell", experiment)
    trial = Trial("shell", topology, nf, placement, 1, {}, {}, 0, 1)
    with (
        TemporaryDirectory(prefix="nearstate-") as logs,
        Journal(f"shell-{datetime.datetime.now():%Y%m%d-%H%M%S}") as journal,
        Launcher(journal, Path(logs), PRELOAD) as launcher,
    ):
        network = Network(topology, network_parameters(trial, experiment), journal.run_id, launcher, journal)
        bench = Bench(trial, experiment, network, launcher)
        try:
            network.start()
            bench.start_state()
            bench.start_functions()
            hosts = ", ".join(host.name for host in bench.nf_hosts)
            print(HINTS.format(placement=placement, nf=nf, hosts=hosts, python=".venv/bin/python"))
            network.shell()
        finally:
            bench.stop()
            network.stop()
