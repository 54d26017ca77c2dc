"""Does a network function decide as the kernel does with nftables, packet by packet, but for the differences that are known?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.conftest import Bench, make_bench
from tests.oracle import FIREWALL, Difference, Kernel, Subject, compare, unaltered
from tests.oracle_nat import FILTERED_NAT, NAT, NAT_SYMMETRIC
from tests.replay import Replay
from tests.traces import Trace, make_trace

LONG = os.environ.get("NEARSTATE_LONG") == "1"
PACKETS = 2000
SEEDS = {"firewall": 5, "nat": 5, "nat_symmetric": 2, "firewall+nat": 2}
"""How many traces; with NEARSTATE_LONG=1 100 each."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from make_bench("test-oracle", tmp_path_factory.mktemp("logs"), ())


def flags_of(flags: int) -> str:
    return "".join(letter for bit, letter in enumerate("FSRPAU") if flags >> bit & 1)


def story(trace: Trace, difference: Difference) -> str:
    """Return a difference that nothing explains, with what came before it in its flow, for people to read."""
    lines = [f"seed {trace.seed}, packet {difference.number} ({trace.kinds[difference.number]}): {difference.seen.frame.hex()}"]
    before = [step for step in difference.seen.flow if step.number < difference.number][-12:]
    for step in (*before, difference.seen):
        what = flags_of(step.flags) or f"protocol {step.fields['protocol']} type {step.fields['icmp_type']}"
        did = [f"{who} {'forwards' if left else 'drops'}" for who, left in (("ours", step.ours), ("the kernel", step.theirs))]
        lines.append(f"  {step.number:5} from {('inside', 'outside')[step.side]:7} {what:20} status {step.fields['status']} "
                     f"state {step.state} {did[0]}, {did[1]}; sequence {step.fields['tcp_sequence']}")  # fmt: skip
    return "\n".join(lines)


@pytest.mark.parametrize("subject", [FIREWALL, NAT, NAT_SYMMETRIC, FILTERED_NAT], ids=lambda subject: subject.nf)
def test_every_verdict_is_the_kernels_or_a_known_difference(bench: Bench, subject: Subject) -> None:
    """10,000 packets of 5 seeds; with NEARSTATE_LONG=1 200,000 of 100. A trace takes far less time than any time-out.

    What leaves us is moreover what entered, whatever the kernel did with it: nothing but what is translated changes.
    """
    seeds = 100 if LONG else SEEDS[subject.nf]
    kernel = Kernel.start(bench, subject)
    unknown: list[str] = []
    counts: Counter[str] = Counter()
    strict = forwarded = 0
    for seed in range(1, seeds + 1):
        trace, replay = make_trace(seed, PACKETS, subject.kinds), Replay.of(*subject.functions, settings=subject.settings)
        ours, theirs = subject.passages(trace, replay.box(trace), kernel.box(trace))
        assert replay.ledger()["table_full"] == 0
        assert [number for number, left in enumerate(ours) if not unaltered(subject, trace.frames[number], left)] == []
        differences, compared = compare(subject, trace, ours, theirs, replay.seen)
        strict += compared
        forwarded += sum(left is not None for left in theirs)
        counts.update(difference.known or "unknown" for difference in differences)
        unknown += [story(trace, difference) for difference in differences if difference.known is None]
    total = seeds * PACKETS
    print(f"{total} packets, {strict} compared without excuse, {forwarded} forwarded by the kernel; {dict(counts)}")
    assert not unknown, f"{len(unknown)} differences that nothing explains, the first three:\n" + "\n".join(unknown[:3])
    assert strict > subject.strict * total, "the known differences excuse too much"
    assert 0.4 * total < forwarded < 0.9 * total, "the traces say little: nearly all is forwarded, or nearly all dropped"
    names = {known.name for known in subject.known}
    assert not LONG or names <= set(counts), f"known differences that nothing shows: {names - set(counts)}"
