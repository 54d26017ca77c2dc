"""What went over the cables? tcpdump at every host interface of a recorded network, each into a pcap file of its own.

A tap on the interface itself would be blind: what AF_XDP sends or takes passes no packet socket there (seen: of ten frames
from one AF_XDP port to another, the sockets on both interfaces see none). So a recorded cable is two veth pairs that meet in
a namespace of their own, where the kernel hands every frame on, and past a packet socket:

    host end ==veth== ra3 [tap] --redirect-- [tap] rb3 ==veth== other end

It works alike for AF_XDP, AF_PACKET and the kernel's own stack. It costs a frame one more veth pair and a copy for each tap.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from datastore.base.errors import NearstateError
from topologies.emulation import recordings, system
from topologies.emulation.network import Network

SNAP_BYTES = 1600
"""Recorded of each frame: all of it, on a network whose frames have at most 1,518 bytes."""
MOST_FRAMES = 20_000
"""Recorded at each interface, at most 32 MB: 2 s of 10 kpps. What comes later is left out, and the record says so."""
BUFFER_KBYTES = 8192
HANDOVER_S = 1.2
"""The kernel hands recorded frames over in blocks, at the latest after the second that tcpdump asks for."""
READY_S = 20.0


def require() -> None:
    """Raise NearstateError when there is no tcpdump."""
    try:
        subprocess.run(["tcpdump", "--version"], capture_output=True, check=True, timeout=READY_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise NearstateError(f"recording needs tcpdump, which does not run ({error}): apt-get install tcpdump") from error


class Recorder:
    """Records a network from `start` to `stop` into `folder`/<host>-<interface>.pcap, time stamps in nanoseconds.

    A mark beside the files says that they are recordings of this testbed (`recordings`).
    """

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        """Start one tcpdump for each host interface and wait until all of them listen. Raises NearstateError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        recordings.mark(self.folder, [f"{host}-{interface}.pcap" for host, interface, _ in self.network.taps()])
        self.network.journal.process("recorder")
        with system.network_namespace(self.network.middle_pid()):
            for host, interface, tap in self.network.taps():
                self._running[f"{host}-{interface}"] = self._dump(tap, self.folder / f"{host}-{interface}.pcap")
        for name, process in self._running.items():
            self._await(name, process)

    def _dump(self, tap: str, path: Path) -> subprocess.Popen[str]:
        command = ["tcpdump", "-i", tap, "-n", "-w", str(path.resolve()), "-s", str(SNAP_BYTES), "-c", str(MOST_FRAMES),
                   "-B", str(BUFFER_KBYTES), "--time-stamp-precision=nano", "-Z", "root"]  # fmt: skip
        return subprocess.Popen(command, env=self.network.journal.environment(), text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=system.dying_with_us())  # fmt: skip

    def _await(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stderr
        said = ""
        while line := process.stderr.readline():
            if "listening on" in line:
                return
            said = line.strip()
        raise NearstateError(f"recording {name}: tcpdump ended: {said}; is there room in {self.folder}?")

    def stop(self) -> dict[str, Any]:
        """End the recording and return what each file holds: frames, those the kernel dropped, whether it is full."""
        if any(process.poll() is None for process in self._running.values()):
            time.sleep(HANDOVER_S)
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        found = {name: _counts(process) for name, process in self._running.items()}
        self._running.clear()
        folder = f"{self.folder.parent.name}/{self.folder.name}"
        return {"folder": folder, "snap_bytes": SNAP_BYTES, "most_frames": MOST_FRAMES, "interfaces": found}


def _counts(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the end of a tcpdump and return the counts it prints."""
    try:
        _, said = process.communicate(timeout=READY_S)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    counts = {name: re.search(rf"(\d+) packets? {words}", said) for name, words in
              (("frames", "captured"), ("dropped", "dropped by kernel"))}  # fmt: skip
    frames, dropped = (int(match[1]) if match else -1 for match in counts.values())
    return {"frames": frames, "dropped": dropped, "full": frames >= MOST_FRAMES}
