"""The coordinator's state in etcd, so that another coordinator can go on when one is gone with its machine.

    {prefix}/leader    who leads; bound to an etcd lease that the leader keeps alive. It goes when the leader is silent for TTL_S
    {prefix}/state     what `Coordinator.save` returned

A coordinator campaigns until it is the one who made the leader's key, then loads the state and goes on as after a crash. Each
save is one transaction: only if the leader's key is still the one that it made, and only over the state that it saved last. So
who was replaced without knowing cannot save, nor can a request of its own that was late.

Leases are granted without saving anything, so a leader also has to know by itself when it is none: when the last keep-alive that
was confirmed is older than the etcd lease, counted from when it was *sent*. etcd counts from when it got it: the leader is the
first to think that it is over. While etcd is away nobody leads for longer than that, and stores go on by their promises.

Spoken is etcd's JSON gateway (https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/); bytes are in base64, numbers in text.
"""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from datastore.base.errors import NearstateError
from datastore.security import strict

SCHEME = "etcd://"
TTL_S = 2
"""etcd's shortest, with its usual election timeout of a second."""
MARGIN_S = 0.2
"""For clocks that drift by up to a tenth between them."""
REQUEST_S = 0.25
"""Decisions wait meanwhile; leases are renewed."""
CAMPAIGN_S, KEEP_ALIVE_S = 0.1, 0.4


def now_s() -> float:
    """Return the time by a clock that goes on while the machine sleeps, as etcd's does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Unavailable(NearstateError):
    """etcd did not answer, or somebody else leads: to be tried again."""


@dataclass
class Term:
    """One time of leading."""

    lease: int
    """etcd's, which the leader's key goes with."""
    made: int
    """etcd's revision that made the key."""
    until_s: float
    """When etcd may think that it is over, by `now_s`."""
    over: bool = False
    """Known to be, for good."""


class Gateway:
    """Requests to whichever of some etcd endpoints answers. One connection; not for two threads at once."""

    def __init__(self, endpoints: list[tuple[str, int]]) -> None:
        self.endpoints = endpoints
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request. Raises NearstateError when no endpoint gives one; it may have been done or not."""
        reason = ""
        for _ in self.endpoints:
            try:
                return self._ask(path, body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
                self.close()
                self.endpoints = self.endpoints[1:] + self.endpoints[:1]
        tried = ", ".join(f"{host}:{port}" for host, port in self.endpoints)
        raise Unavailable(f"etcd does not answer at {tried} ({reason}): is it running?")

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self.endpoints[0], timeout=REQUEST_S)
        self._connection.request("POST", f"/v3/{path}", json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        data = response.read()
        if response.status != http.client.OK:
            raise OSError(f"status {response.status}: {data[:100].decode(errors='replace')}")
        return strict.message(data)

    def close(self) -> None:
        """Close the connection; the next request makes another."""
        if self._connection:
            self._connection.close()
        self._connection = None


class EtcdState:
    """A `StateStore` for one of several coordinators; `campaign` first."""

    def __init__(self, url: str, name: str) -> None:
        """url: etcd://host:port[,host:port ...]/prefix. name: of this coordinator, for people. Raises NearstateError."""
        parts = urlsplit(url)
        try:
            endpoints = [(host, int(port)) for host, _, port in (end.rpartition(":") for end in parts.netloc.split(","))]
            if not all(host for host, _ in endpoints) or len(parts.path) < 2:
                raise ValueError
        except ValueError:
            raise NearstateError(f"coordinator's state {url!r}: write {SCHEME}host:port[,host:port]/prefix") from None
        self.name, self._gateway, self._keeper = name, Gateway(endpoints), Gateway(list(endpoints))
        self._leader, self._state = (_coded(f"{parts.path[1:]}/{key}") for key in ("leader", "state"))
        self._lease = self._revision = 0
        self._pause_s = 0.0
        self._term = Term(0, 0, 0.0, over=True)
        self._closed = threading.Event()
        self._keeping: threading.Thread | None = None

    # ---- leading ------------------------------------------------------------------------------------------------------

    def campaign(self, give_up: Callable[[], bool]) -> bool:
        """Try to lead until this coordinator does; False when `give_up` says so before."""
        self._lease = 0  # one of before is left alone: kept alive it would keep a leader's key of before
        self._term.over = True
        if self._keeping:
            self._keeping.join()  # it ends with its term
        while True:
            try:
                if self._try_to_lead():
                    self._keeping = threading.Thread(target=self._keep_alive, args=(self._term,), name="etcd", daemon=True)
                    self._keeping.start()
                    return True
            except NearstateError:  # etcd is away: nobody can lead
                self._lease = 0  # it may have made us leader and not told: that key must go before anybody leads
            if give_up():
                return False
            time.sleep(CAMPAIGN_S)

    def _try_to_lead(self) -> bool:
        sent_s = now_s()
        if not self._lease or not self._renew(self._gateway, self._lease):
            self._lease = int(self._gateway.ask("lease/grant", {"TTL": TTL_S})["ID"])
        answer = self._gateway.ask("kv/txn", {
            "compare": [{"key": self._leader, "target": "CREATE", "create_revision": "0"}],
            "success": [{"request_put": {"key": self._leader, "value": _coded(self.name), "lease": str(self._lease)}}],
        })  # fmt: skip
        if not answer.get("succeeded"):
            return False
        self._term = Term(self._lease, int(answer["header"]["revision"]), sent_s + TTL_S - MARGIN_S)
        return True

    @staticmethod
    def _renew(gateway: Gateway, lease: int) -> bool:
        """Keep an etcd lease alive; False when it is over."""
        answer = gateway.ask("lease/keepalive", {"ID": str(lease)})
        return int(answer.get("result", {}).get("TTL", 0)) > 0

    def _keep_alive(self, term: Term) -> None:
        while not self._closed.wait(KEEP_ALIVE_S) and not term.over and now_s() < term.until_s:
            sent_s = now_s()
            try:
                if self._renew(self._keeper, term.lease):
                    term.until_s = sent_s + TTL_S - MARGIN_S
                else:
                    term.over = True
            except NearstateError:
                pass  # until the lease is over by our own clock

    def leads(self) -> bool:
        """Tell whether no other coordinator can lead now."""
        return not self._term.over and now_s() < self._term.until_s

    # ---- the state ----------------------------------------------------------------------------------------------------

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, by whomever. Raises NearstateError."""
        found = self._gateway.ask("kv/range", {"key": self._state}).get("kvs", [])
        self._revision = int(found[0]["mod_revision"]) if found else 0
        document: dict[str, Any] | None = json.loads(base64.b64decode(found[0]["value"])) if found else None
        return document

    def save(self, document: dict[str, Any]) -> None:
        """Save, so that no crash of a minority of etcd's members can undo it. Raises NearstateError, also when not leading."""
        if not self.leads():
            raise Unavailable(f"coordinator {self.name} leads no longer: it was not confirmed by etcd for {TTL_S} s")
        answer = self._unless_away("kv/txn", {
            "compare": [{"key": self._leader, "target": "CREATE", "create_revision": str(self._term.made)},
                        {"key": self._state, "target": "MOD", "mod_revision": str(self._revision)}],
            "success": [{"request_put": {"key": self._state, "value": _coded(json.dumps(document))}}],
            "failure": [{"request_range": {"key": self._leader}}, {"request_range": {"key": self._state}}],
        })  # fmt: skip
        if answer.get("succeeded"):
            self._revision = int(answer["header"]["revision"])
            return
        leader, state = (part["response_range"].get("kvs", []) for part in answer["responses"])
        if not leader or int(leader[0]["create_revision"]) != self._term.made:
            self._term.over = True
            name = base64.b64decode(leader[0]["value"]).decode() if leader else "nobody yet"
            raise Unavailable(f"another coordinator leads: {name}")
        self._revision = int(state[0]["mod_revision"]) if state else 0  # a save whose answer was lost had been done
        raise Unavailable("etcd had done what it was thought not to have: once more")

    def _unless_away(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask, but not again right after nobody answered: each attempt keeps decisions waiting."""
        if now_s() < self._pause_s:
            raise Unavailable("etcd did not answer a moment ago: the decision is taken back")
        try:
            return self._gateway.ask(path, body)
        except NearstateError:
            self._pause_s = now_s() + 4 * REQUEST_S
            raise

    def close(self) -> None:
        """Lead no longer; the key goes with its lease."""
        self._term.over = True
        self._closed.set()
        if self._keeping:
            self._keeping.join(timeout=2 * REQUEST_S)
        for gateway in (self._gateway, self._keeper):
            gateway.close()
