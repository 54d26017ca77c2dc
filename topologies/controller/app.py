"""The OpenFlow controller: an os-ken application that installs the steering ahead of the packets and obeys commands.

Started by the runner as its own process: `python -m topologies.controller.app <topology.json> <listener> <commands>`, the last
two being descriptors of sockets that already listen: the switch can connect while this process still imports (an attempt that
found nobody would be repeated a second later only).

Commands, one JSON object a line, each answered by one line:
    {"command": "steer", "partitions": [3, 4], "instance": "nf2"} -> {"steered": 2}   once the switch confirmed (barrier)
        "return": "nf1" sends their answers, from the server to the client, to another instance; without it both go to one
    {"command": "follow", "instances": ["nf1", ...256]} -> {"steered": 128}   both directions of each partition, those only that
                                                                              differ; where instances are side by side
    {"command": "chain", "stages": [["nf1"], ["nf2"]]} -> {"rules": 6175}     packets meet an instance of each stage, dealt anew
    {"command": "show"}  -> {"instances": ["nf1", ...256], "returns": ["nf1", ...256], "rules": 3107, "refused_packets": 0,
                             "connected": true}                                with stages "nf1|nf2", from inside to outside
    {"command": "where"} -> {"instances": [...], "returns": [...]}           without asking the switch, which takes half a second
    {"command": "ports"} -> {"down": ["nf1.inside", ...]}                    instances' interfaces whose link the switch sees down
        "known": ["nf1.inside", ...] waits for an answer that differs, for a second at most
    {"command": "settled"} -> {"settled": true}                     once no flow's packets go as before the last change confirmed
    {"command": "ready"} -> {"rules": 3107}                                          once all rules are confirmed
A command that is wrong is answered {"error": reason} and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from os_ken import cfg
from os_ken.base.app_manager import AppManager, OSKenApp
from os_ken.controller import controller as openflow
from os_ken.controller import ofp_event, ofp_handler
from os_ken.controller.handler import CONFIG_DISPATCHER, DEAD_DISPATCHER, MAIN_DISPATCHER, set_ev_cls
from os_ken.lib import hub
from os_ken.ofproto import ofproto_v1_3, ofproto_v1_3_parser

from datastore.security import strict
from topologies.controller import revalidation, steering

CONFIRM_S = 5.0
"""Longest wait for a barrier reply: 3,100 rules are confirmed in 0.4 s on two busy cores."""
WATCH_S = 1.0
"""Longest wait for a link to go up or down."""
OUTPUT_AT = -12
"""Where the output port is in a group's message: the action is type, length, port, longest packet-in and 6 bytes of padding
(OpenFlow 1.3.5, section 7.2.5)."""
ADD, MODIFY = ofproto_v1_3.OFPGC_ADD, ofproto_v1_3.OFPGC_MODIFY
GROUP_EXISTS = (ofproto_v1_3.OFPET_GROUP_MOD_FAILED, ofproto_v1_3.OFPGMFC_GROUP_EXISTS)
LONGEST_COMMAND = 1 << 16
"""Bytes of a command: `follow` names 256 instances."""
MOST_TALKERS = 16
LOG = logging.getLogger(__name__)


class Steering(OSKenApp):
    """Keeps one switch's rules equal to the steering."""

    OFP_VERSIONS = (ofproto_v1_3.OFP_VERSION,)
    topology: dict[str, Any]
    commands: socket.socket

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ports = steering.Ports.from_json(self.topology)
        self.stages: steering.Stages = [list(self.ports.instances)]
        self.forward = steering.evenly(self.stages)
        self.back = list(self.forward)
        self.datapath: Any = None
        self.links = threading.Condition()  # notified when one goes up or down
        self.changing = threading.Lock()  # one change of rules at a time
        self.installed = threading.Event()
        self.barriers: dict[int, threading.Event] = {}
        self.statistics: dict[int, tuple[threading.Event, list[Any]]] = {}
        self.refusals: list[str] = []
        self.written: dict[tuple[int, int], bytearray] = {}
        self.talkers = threading.BoundedSemaphore(MOST_TALKERS)
        self.unsure: set[int] = set()
        """Partitions of a change that the switch did not confirm: it may have done a part of it."""

    def start(self) -> Any:
        thread = super().start()
        threading.Thread(target=self._listen, daemon=True).start()
        return thread

    @set_ev_cls(ofp_event.EventOFPSwitchFeatures, CONFIG_DISPATCHER)
    def connected(self, event: Any) -> None:
        self.datapath = event.msg.datapath
        threading.Thread(target=self._install_all, daemon=True).start()  # this thread must go on to see the barrier's answer

    @set_ev_cls(ofp_event.EventOFPStateChange, DEAD_DISPATCHER)
    def disconnected(self, event: Any) -> None:
        if event.datapath is self.datapath:
            self.datapath = None
            self.installed.clear()
            self.links_changed()

    @set_ev_cls(ofp_event.EventOFPPortStateChange, MAIN_DISPATCHER)
    def links_changed(self, _: Any = None) -> None:
        with self.links:
            self.links.notify_all()

    @set_ev_cls(ofp_event.EventOFPBarrierReply, MAIN_DISPATCHER)
    def confirmed(self, event: Any) -> None:
        if waiting := self.barriers.pop(event.msg.xid, None):
            waiting.set()

    @set_ev_cls(ofp_event.EventOFPFlowStatsReply, MAIN_DISPATCHER)
    def counted(self, event: Any) -> None:
        if event.msg.xid in self.statistics:
            waiting, entries = self.statistics[event.msg.xid]
            entries += event.msg.body
            if not event.msg.flags & ofproto_v1_3.OFPMPF_REPLY_MORE:
                waiting.set()

    @set_ev_cls(ofp_event.EventOFPErrorMsg, [CONFIG_DISPATCHER, MAIN_DISPATCHER])
    def refused(self, event: Any) -> None:
        if (event.msg.type, event.msg.code) == GROUP_EXISTS:
            return  # since before the switch was connected again; the message behind says where it is to lead
        self.refusals.append(f"the switch refused a rule: OpenFlow error type {event.msg.type} code {event.msg.code}")
        LOG.error(self.refusals[-1])

    def _install_all(self) -> None:
        with self.changing:
            try:
                groups = (self.stages, self.forward, self.back, range(steering.PARTITIONS))
                self._install(
                    [*self._group_mods(ADD, *groups), *self._group_mods(MODIFY, *groups), *self._flow_mods(self._all_rules())]
                )
                self.unsure.clear()
                self.installed.set()
            except ValueError as error:
                LOG.error("installing the rules: %s", error)

    def _all_rules(self) -> list[steering.Rule]:
        return steering.all_rules(self.ports, self.stages, self.forward, self.back)

    def _connected_switch(self) -> Any:
        if self.datapath is None:
            raise ValueError("the switch is not connected")
        return self.datapath

    def _install(self, messages: list[bytes]) -> None:
        """Send messages and a barrier as one buffer and wait for the switch. Raises ValueError when it does not confirm."""
        datapath = self._connected_switch()
        self.refusals.clear()
        barrier, done = ofproto_v1_3_parser.OFPBarrierRequest(datapath), threading.Event()
        datapath.set_xid(barrier)
        self.barriers[barrier.xid] = done
        datapath.send(b"".join([*messages, _serialized(datapath, barrier)]))
        if not done.wait(CONFIRM_S):
            self.barriers.pop(barrier.xid, None)
            raise ValueError(f"the switch did not confirm {len(messages)} changes in {CONFIRM_S:g} s")
        if self.refusals:
            raise ValueError(self.refusals[0])

    def _flow_mods(self, rules: Iterable[steering.Rule]) -> list[bytes]:
        """Return the messages that install rules."""
        datapath = self._connected_switch()
        return [_serialized(datapath, _flow_mod(datapath, rule)) for rule in rules]

    def _group_mods(
        self, command: int, stages: steering.Stages, forward: Sequence[steering.Way], back: Sequence[steering.Way],
        partitions: Iterable[int],
    ) -> list[bytes]:  # fmt: skip
        """Return the messages that say where the groups of partitions lead."""
        datapath = self._connected_switch()
        return [self._group_mod(datapath, command, hop)
                for p in partitions for hop in steering.hops(self.ports, stages, p, forward[p], back[p])]  # fmt: skip

    def _group_mod(self, datapath: Any, command: int, hop: steering.Hop) -> bytes:
        """Return the message that says where a group leads. os-ken takes 80 us to write one, which would be 20 ms of a failover
        for half of the partitions; but those of one group differ in the output port only, its action's last word but one.
        """
        written = self.written.get((command, hop.group))
        if written is None:
            written = self.written[command, hop.group] = bytearray(_serialized(datapath, _group(datapath, command, hop)))
        struct.pack_into("!I", written, OUTPUT_AT, hop.output)
        return bytes(written)

    def _listen(self) -> None:
        while True:
            connection, _ = self.commands.accept()
            if self.talkers.acquire(blocking=False):
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _converse(self, connection: socket.socket) -> None:
        """Answer the lines of a connection until it is closed, or one is too long."""
        try:
            with connection, connection.makefile("rwb") as lines, contextlib.suppress(OSError):
                while len(line := lines.readline(LONGEST_COMMAND + 1)) in range(1, LONGEST_COMMAND + 1):
                    try:
                        answer = self._obey(strict.loads(line))
                    except (ValueError, TypeError, KeyError, LookupError, OverflowError) as error:
                        answer = {"error": str(error)}
                    lines.write(json.dumps(answer).encode() + b"\n")
                    lines.flush()
        finally:
            self.talkers.release()

    def _obey(self, request: Any) -> dict[str, Any]:
        """Return the answer to a command. Raises ValueError with the reason when it is wrong."""
        commands = {"steer": self._steer, "chain": self._chain, "show": self._show, "ready": self._ready,
                    "where": self._where, "follow": self._follow, "ports": self._ports,
                    "settled": self._settled}  # fmt: skip
        if not isinstance(request, dict) or request.get("command") not in commands:
            raise ValueError(f"unknown command {str(request)[:100]}; valid are {', '.join(commands)}")
        return commands[request["command"]](request)

    def _steer(self, request: dict[str, Any]) -> dict[str, Any]:
        instance = request.get("instance")
        with self.changing:
            forward, back = (
                steering.steered(before, self.stages, request.get("partitions"), wanted)
                for before, wanted in ((self.forward, instance), (self.back, request.get("return", instance)))
            )
            partitions = sorted(set(request["partitions"]))
            self._change(partitions, forward, back)
        return {"steered": len(partitions)}

    def _follow(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.changing:
            ways = steering.followed(self.stages, request.get("instances"))
            partitions = [p for p, way in enumerate(ways)
                          if p in self.unsure or (self.forward[p], self.back[p]) != (way, way)]  # fmt: skip
            self._change(partitions, ways, list(ways))
        return {"steered": len(partitions)}

    def _change(self, partitions: list[int], forward: list[steering.Way], back: list[steering.Way]) -> None:
        """Have the groups of these partitions lead elsewhere. Raises ValueError when the switch does not confirm."""
        self.unsure.update(partitions)
        self._install(self._group_mods(MODIFY, self.stages, forward, back, partitions))
        self.unsure.difference_update(partitions)
        self.forward, self.back = forward, back

    def _chain(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.changing:
            stages = steering.checked_stages(request.get("stages"), self.ports.instances)
            ways = steering.evenly(stages)
            rules = steering.all_rules(self.ports, stages, ways, ways)
            datapath = self._connected_switch()
            removals = [_serialized(datapath, _removal(datapath)), _serialized(datapath, _group_removal(datapath))]
            groups = self._group_mods(ADD, stages, ways, ways, range(steering.PARTITIONS))
            self._install([*removals, *groups, *self._flow_mods(rules)])
            self.stages, self.forward, self.back = stages, ways, list(ways)
            self.unsure.clear()
        return {"rules": len(rules)}

    def _ready(self, _: dict[str, Any]) -> dict[str, Any]:
        if not self.installed.wait(2 * CONFIRM_S):
            raise ValueError(self.refusals[0] if self.refusals else "the switch has not connected")
        return {"rules": len(self._all_rules())}

    def _show(self, _: dict[str, Any]) -> dict[str, Any]:
        counted = self._refused_packets() if self.datapath else None
        return {
            **self._ways(),
            "rules": len(self._all_rules()),
            "refused_packets": counted,
            "connected": self.datapath is not None,
        }

    def _where(self, _: dict[str, Any]) -> dict[str, Any]:
        with self.changing:  # what was told before is done
            return self._ways()

    def _ways(self) -> dict[str, Any]:
        return {"instances": ["|".join(way) for way in self.forward], "returns": ["|".join(way) for way in self.back]}

    def _ports(self, request: dict[str, Any]) -> dict[str, Any]:
        if "known" in request:
            with self.links:
                self.links.wait_for(lambda: self._down() != request["known"], WATCH_S)
        return {"down": self._down()}

    def _down(self) -> list[str]:
        datapath = self.datapath
        if datapath is None:
            raise ValueError("the switch is not connected")
        with warnings.catch_warnings():  # os-ken keeps its picture by OFPPortStatus, and advises against it since OpenFlow 1.3
            warnings.simplefilter("ignore")
            known = datapath.ports
        return [f"{name}.{side}" for name, numbers in self.ports.instances.items()
                for side, number in zip(("inside", "outside"), numbers, strict=True)
                if number not in known or known[number].state & ofproto_v1_3.OFPPS_LINK_DOWN]  # fmt: skip

    def _settled(self, _: dict[str, Any]) -> dict[str, Any]:
        revalidation.settle(self._nudge)
        return {"settled": True}

    def _nudge(self) -> None:
        """Make a change that changes nothing, unless there is one under way."""
        datapath = self.datapath
        if datapath and self.changing.acquire(blocking=False):
            try:
                rule = steering.partition_rules(self.ports, self.stages, 0, self.forward[0], self.back[0])[0]
                datapath.send(_serialized(datapath, _flow_mod(datapath, rule)))
            finally:
                self.changing.release()

    def _refused_packets(self) -> int:
        """Return how many frames the table-miss rule dropped: neither IP nor ARP, unknown storage addresses."""
        datapath = self.datapath
        request = ofproto_v1_3_parser.OFPFlowStatsRequest(datapath)
        datapath.set_xid(request)
        done, entries = self.statistics.setdefault(request.xid, (threading.Event(), []))
        datapath.send_msg(request)
        answered = done.wait(CONFIRM_S)
        del self.statistics[request.xid]
        if not answered:
            raise ValueError(f"the switch gave no statistics in {CONFIRM_S:g} s")
        return sum(entry.packet_count for entry in entries if entry.priority == steering.REFUSED)


def _flow_mod(datapath: Any, rule: steering.Rule) -> Any:
    parser = ofproto_v1_3_parser
    if rule.group is not None:
        actions = [parser.OFPActionGroup(rule.group)]
    else:
        actions = [] if rule.output is None else [parser.OFPActionOutput(rule.output)]
    instructions = [parser.OFPInstructionActions(ofproto_v1_3.OFPIT_APPLY_ACTIONS, actions)]
    return parser.OFPFlowMod(datapath, priority=rule.priority, match=_match(rule), instructions=instructions)


def _group(datapath: Any, command: int, hop: steering.Hop) -> Any:
    parser = ofproto_v1_3_parser
    bucket = parser.OFPBucket(actions=[parser.OFPActionOutput(hop.output)])
    return parser.OFPGroupMod(datapath, command, ofproto_v1_3.OFPGT_INDIRECT, hop.group, [bucket])


def _group_removal(datapath: Any) -> Any:
    """Return the message that removes every group."""
    return ofproto_v1_3_parser.OFPGroupMod(
        datapath, ofproto_v1_3.OFPGC_DELETE, ofproto_v1_3.OFPGT_INDIRECT, ofproto_v1_3.OFPG_ALL
    )


def _removal(datapath: Any) -> Any:
    """Return the message that removes every rule."""
    protocol = ofproto_v1_3
    return ofproto_v1_3_parser.OFPFlowMod(datapath, command=protocol.OFPFC_DELETE, table_id=protocol.OFPTT_ALL,
                                          out_port=protocol.OFPP_ANY, out_group=protocol.OFPG_ANY)  # fmt: skip


def _match(rule: steering.Rule) -> Any:
    """Return the OpenFlow match with its fields in the rule's order: the switch wants a field's prerequisites before it, and
    os-ken's own order puts the Nicira fields (ip_frag) first."""
    fields = [ofproto_v1_3.oxm_normalize_user(name, value) for name, value in rule.match]
    return ofproto_v1_3_parser.OFPMatch(_ordered_fields=fields)


def _serialized(datapath: Any, message: Any) -> bytes:
    if message.xid is None:
        datapath.set_xid(message)
    message.serialize()
    return bytes(message.buf)


def main() -> None:
    with contextlib.suppress(OSError):  # on a machine of its own it would not wait behind packets; here it shares a few cores
        os.nice(-10)
    topology, listener, commands = sys.argv[1], *(socket.socket(fileno=int(number)) for number in sys.argv[2:4])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    Steering.topology, Steering.commands = json.loads(Path(topology).read_text()), commands

    def accept_switches() -> None:
        while True:
            hub.spawn(openflow.datapath_connection_factory, *listener.accept())

    ofp_handler.OpenFlowController = lambda: accept_switches  # in place of os-ken's own, which binds fixed ports
    cfg.CONF([], project="os_ken")
    AppManager.run_apps(["topologies.controller.app"])


if __name__ == "__main__":
    sys.modules["topologies.controller.app"] = sys.modules["__main__"]  # os-ken imports the application by name
    main()
