"""Does a delay line wake as much earlier as it was seen to wake late, and no more?"""

from topologies.emulation.wire import MOST_SPIN_NS, SPIN_NS, early_ns


def test_it_wakes_earlier_where_waking_takes_long():
    assert early_ns(SPIN_NS, 2_000) == SPIN_NS
    assert early_ns(SPIN_NS, 90_000) == 180_000
    assert early_ns(SPIN_NS, 20_000_000) == MOST_SPIN_NS


def test_a_late_waking_is_forgotten():
    early = early_ns(SPIN_NS, 150_000)
    assert early == 300_000
    for _ in range(150):
        early = early_ns(early, 1_000)
    assert early == SPIN_NS
