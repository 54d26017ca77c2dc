"""Do the ledger's causes add up, and do the parser's statuses and the ledger's causes speak of the same things?"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfs.dataplane import ledger
from nfs.dataplane.frames import FRAME_BYTES, free_frames, give_frame, make_frames, take_frame
from nfs.dataplane.ledger import CAUSES, imbalance, make_ledger, to_counts


def test_every_cause_has_the_number_its_name_says() -> None:
    numbers = {"received": ledger.RECEIVED, "forwarded": ledger.FORWARDED, "dropped_by_verdict": ledger.BY_VERDICT,
               "truncated": ledger.TRUNCATED, "oversized": ledger.OVERSIZED, "malformed": ledger.MALFORMED,
               "not_ip": ledger.NOT_IP, "fragment": ledger.FRAGMENT, "unreadable": ledger.UNREADABLE,
               "fragment_room_full": ledger.FRAGMENT_ROOM_FULL, "table_full": ledger.TABLE_FULL,
               "state_unreachable": ledger.STATE_UNREACHABLE, "waiting_room_full": ledger.WAITING_ROOM_FULL,
               "state_refused": ledger.STATE_REFUSED, "uncommitted": ledger.UNCOMMITTED,
               "transmit_ring_full": ledger.TRANSMIT_RING_FULL,
               "refused_by_rule": ledger.REFUSED_BY_RULE, "out_of_window": ledger.OUT_OF_WINDOW,
               "ports_exhausted": ledger.PORTS_EXHAUSTED, "no_backend": ledger.NO_BACKEND,
               "rate_exceeded": ledger.RATE_EXCEEDED, "blocked_source": ledger.BLOCKED_SOURCE,
               "waiting": ledger.WAITING}  # fmt: skip
    assert [CAUSES[number] for number in numbers.values()] == list(numbers)
    assert set(numbers) == set(CAUSES)


@given(st.lists(st.integers(0, 10**9), min_size=len(CAUSES) - 1, max_size=len(CAUSES) - 1), st.integers(-5, 5))
def test_a_ledger_balances_when_its_causes_add_up(causes: list[int], missing: int) -> None:
    entries = make_ledger()
    entries[1:] = causes
    entries[ledger.RECEIVED] = sum(causes) + missing
    assert imbalance(to_counts(entries)) == missing
    assert to_counts(entries) == dict(zip(CAUSES, [sum(causes) + missing, *causes], strict=True))


def test_frames_are_handed_out_once_and_come_back() -> None:
    frames = make_frames(32)
    taken = [int(take_frame(frames)) for _ in range(32)]
    assert sorted(taken) == [n * FRAME_BYTES for n in range(32)]
    assert take_frame(frames) == -1
    assert free_frames(frames) == 0
    for at in taken:
        give_frame(frames, at + 256 + 7)  # named by any byte of theirs, as the kernel does behind its headroom
    assert {int(take_frame(frames)) for _ in range(32)} == set(taken)


@pytest.mark.bounds
def test_a_frame_given_back_twice_is_noticed_when_checked() -> None:
    from datastore.base import CHECKED

    if not CHECKED:
        pytest.skip("only with NUMBA_BOUNDSCHECK=1; run_tests.sh runs it so")
    frames = make_frames(4)
    with pytest.raises(IndexError):
        give_frame(frames, 0)
    assert np.array_equal(np.sort(frames.stack), np.arange(4) * FRAME_BYTES)
