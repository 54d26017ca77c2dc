"""What does a store process say to the coordinator, and take from it, while its main thread is busy?

Pure: `member.py` gives it the clock, a thread and a connection, the simulator imagined ones. The reporter's thread says what the
main thread said last, and takes leases; the main thread looks for what is new, and follows the maps that were heard.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

from datastore.coordination.heartbeats import Grant, Heartbeat, Timing
from datastore.coordination.messages import beat_message, read_grant
from datastore.replication.replica import Replica

STUCK_LEASES = 5
"""A process whose main thread does not come by for so many leases asks for no more of them: it serves nobody."""


class Spokesman:
    """Speaks for one store. grants: what was heard of maps and refusals, for the main thread, oldest first."""

    def __init__(self, replica: Replica, timing: Timing, now_ns: int) -> None:
        self.replica, self.timing = replica, timing
        self.grants: deque[Grant] = deque()
        self._worked_ns = self.looked_ns = now_ns
        self._said = replica.beat(now_ns)
        self._function_ended = 0

    # ---- the reporter's thread ----------------------------------------------------------------------------------------

    def report(self, now_ns: int) -> dict[str, Any] | None:
        """Return the heartbeat to send now: what the main thread said last, under the clock of now; None: nothing."""
        stuck_ns = STUCK_LEASES * self.timing.lease_ns
        if now_ns - self._worked_ns > stuck_ns:
            return None
        return beat_message(replace(self._said, sent_ns=now_ns, function_ended=self._function_ended))

    def end_function(self, number: int) -> None:
        """Take that NF process `number` on this host's table has ended."""
        self._function_ended = max(self._function_ended, number)  # numbers grow with time

    def hear(self, message: dict[str, Any]) -> bool:
        """Take a grant: the lease at once, the rest for the main thread; tell whether that has something to do.

        Raises KeyError or NearstateError for what is no grant.
        """
        grant = read_grant(message["grant"])
        self.replica.take_lease(grant)
        is_news = grant.refusal != self.replica.refusal or bool(grant.map and grant.map.epoch > self.replica.map.epoch)
        if is_news:
            self.grants.append(grant)
        return is_news

    # ---- the main thread ----------------------------------------------------------------------------------------------

    def work(self, now_ns: int) -> None:
        """Note that the main thread runs."""
        if now_ns - self._worked_ns > 2 * self.timing.heartbeat_ns:
            self.replica.was_stopped(now_ns)
        self._worked_ns = now_ns

    def follow(self, now_ns: int) -> bool:
        """Follow the maps that were heard; tell whether there was a newer one."""
        changed = False
        while self.grants:
            changed |= self.replica.hear(now_ns, self.grants.popleft())
        return changed

    def look(self, now_ns: int) -> bool:
        """See what there is to tell the coordinator; tell whether that is news, to be told at once."""
        self.looked_ns = now_ns
        beat, before = self.replica.beat(now_ns), self._said
        self._said = beat
        return _news(beat) != _news(before) or (beat.synchronised != before.synchronised and not self.replica.teaches(beat))

    def pause_ns(self) -> int:
        """Return after what time the main thread looks again: soon, while the coordinator waits for what it has to say."""
        return self.timing.heartbeat_ns // 12 if self.replica.expected() else self.timing.heartbeat_ns


def _news(beat: Heartbeat) -> tuple[Any, ...]:
    """Return of a heartbeat what is told at once.

    That learners have a copy is told with the next heartbeat while others still learn: a map for every few of them kept two hosts
    busier than the copies did (128 partitions: 90 maps, 0.7 s).
    """
    return beat.epoch, beat.released, beat.unreachable
