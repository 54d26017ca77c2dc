"""Is a capture file read as libpcap reads it, and refused in one line when any part of it would be lost or misread?

Files are written byte by byte here, after draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore.base.errors import NearstateError
from experiments.workloads import savefile
from tests import packets

FRAMES = [packets.tcp("S"), packets.tcp("SA", inside=False), packets.tcp("PA", payload=b"GET /")]
SECOND = 1_700_000_000
ALL_ONES = 0xFFFFFFFF


def pcap(frames: Sequence[bytes] = FRAMES, *, order: str = "<", magic: int = 0xA1B2C3D4, snap: int = 262144, link: int = 1,
         times: Sequence[tuple[int, int]] = (), lengths: Sequence[int] = ()) -> bytes:  # fmt: skip
    """Return a pcap file; times: (seconds, fraction) of each frame, a millisecond apart without; lengths: on the wire."""
    fraction = 1000 if magic == 0xA1B2C3D4 else 1_000_000
    parts = [struct.pack(f"{order}IHHIIII", magic, 2, 4, 0, 0, snap, link)]
    for number, frame in enumerate(frames):
        seconds, rest = times[number] if times else (SECOND, number * fraction)
        length = lengths[number] if lengths else len(frame)
        parts.append(struct.pack(f"{order}IIII", seconds, rest, len(frame), length) + frame)
    return b"".join(parts)


def block(kind: int, body: bytes, order: str = "<", trailer: int | None = None) -> bytes:
    body += bytes(-len(body) % 4)
    length = len(body) + 12
    return struct.pack(f"{order}II", kind, length) + body + struct.pack(f"{order}I", length if trailer is None else trailer)


def option(code: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4)


def section(order: str = "<") -> bytes:
    return block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def interface(order: str = "<", link: int = 1, snap: int = 0, resolution: int | None = None, offset: int = 0) -> bytes:
    options = b"" if resolution is None else option(9, bytes([resolution]), order)
    options += option(14, struct.pack(f"{order}q", offset), order) if offset else b""
    return block(1, struct.pack(f"{order}HHI", link, 0, snap) + options + (bytes(4) if options else b""), order)


def enhanced(number: int, order: str = "<", interface_id: int = 0, ticks: int | None = None, more: bytes = b"",
             trailer: int | None = None, frame: bytes | None = None) -> bytes:  # fmt: skip
    frame = FRAMES[number] if frame is None else frame
    ticks = SECOND * 1_000_000 + number * 1000 if ticks is None else ticks
    head = struct.pack(f"{order}IIIII", interface_id, ticks >> 32, ticks & ALL_ONES, len(frame), len(frame))
    return block(6, head + frame + bytes(-len(frame) % 4) + more, order, trailer)


def simple(number: int, order: str = "<") -> bytes:
    return block(3, struct.pack(f"{order}I", len(FRAMES[number])) + FRAMES[number], order)


def pcapng(*blocks: bytes, order: str = "<") -> bytes:
    return section(order) + interface(order) + b"".join(blocks)


def read(folder: Path, content: bytes) -> list[savefile.Frame]:
    path = folder / "capture"
    path.write_bytes(content)
    return list(savefile.frames(str(path)))


def refusal(folder: Path, content: bytes) -> str:
    """Return the one line by which a file is refused."""
    with pytest.raises(NearstateError) as raised:
        read(folder, content)
    assert "\n" not in str(raised.value)
    assert repr(str(folder / "capture")) in str(raised.value)
    return str(raised.value)


WHOLE = {
    "little-endian": pcap(),
    "big-endian": pcap(order=">"),
    "nanoseconds": pcap(magic=0xA1B23C4D),
    "nanoseconds, big-endian": pcap(order=">", magic=0xA1B23C4D),
    "no snap length": pcap(snap=0),
    "gzip": gzip.compress(pcap()),
    "gzip of two parts": gzip.compress(pcap()[:100]) + gzip.compress(pcap()[100:]),
    "pcapng": pcapng(*map(enhanced, range(3))),
    "pcapng, big-endian": pcapng(*(enhanced(number, ">") for number in range(3)), order=">"),
    "odd option size": pcapng(enhanced(0), enhanced(1, more=struct.pack("<HHI", 2, 3, 1)), enhanced(2)),
    "unknown blocks between": pcapng(enhanced(0), block(0x0BAD, bytes(8)), enhanced(1), block(5, bytes(12)), enhanced(2)),
    "section of its own": pcapng(enhanced(0)) + pcapng(enhanced(1), enhanced(2)),
    "section counting in ns": pcapng(enhanced(0)) + section() + interface(resolution=9)
    + b"".join(enhanced(number, ticks=SECOND * 10**9 + number * 10**6) for number in (1, 2)),
    "offset of the interface": section() + interface(resolution=6, offset=SECOND)
    + b"".join(enhanced(number, ticks=number * 1000) for number in range(3)),
    "old packet block": pcapng(enhanced(0), enhanced(1)) + block(
        2, struct.pack("<HHIIII", 0, 0, (SECOND * 10**6 + 2000) >> 32, (SECOND * 10**6 + 2000) & ALL_ONES, len(FRAMES[2]),
                       len(FRAMES[2])) + FRAMES[2]),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_every_frame_is_read_with_its_time(tmp_path: Path, kind: str) -> None:
    found = read(tmp_path, WHOLE[kind])
    assert [frame.content for frame in found] == FRAMES
    assert [frame.number for frame in found] == [1, 2, 3]
    assert [frame.time_ns - SECOND * 10**9 for frame in found] == [0, 1_000_000, 2_000_000]
    assert {(frame.link, frame.timed) for frame in found} == {(1, True)}


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if "gzip" not in kind])
def test_tcpdump_finds_the_same(tmp_path: Path, kind: str) -> None:
    """The reader that users have: as many packets, at the same times."""
    (tmp_path / "capture").write_bytes(WHOLE[kind])
    command = ["tcpdump", "-nn", "-tt", "--nano", "-r", str(tmp_path / "capture")]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except FileNotFoundError:
        pytest.skip("needs tcpdump")
    times = [int(line.split()[0].replace(".", "")) for line in said.splitlines()]
    assert times == [frame.time_ns for frame in savefile.frames(str(tmp_path / "capture"))]


@pytest.mark.parametrize(
    ("resolution", "ticks_per_second"), [(0, 1), (3, 10**3), (6, 10**6), (9, 10**9), (12, 10**12), (0x80, 1), (0x8A, 2**10),
                                         (0x80 | 34, 2**34)]
)  # fmt: skip
def test_time_resolutions(tmp_path: Path, resolution: int, ticks_per_second: int) -> None:
    ticks = 10_000 * ticks_per_second + ticks_per_second // 8
    (found,) = read(tmp_path, section() + interface(resolution=resolution) + enhanced(0, ticks=ticks))
    assert found.time_ns == ticks * 10**9 // ticks_per_second


def test_a_resolution_that_libpcap_gets_wrong_is_refused(tmp_path: Path) -> None:
    """2^-40 s: libpcap multiplies the fraction by 10^9 in 64 bits."""
    content = section() + interface(resolution=0x80 | 40) + enhanced(0, ticks=1_000_000 << 40 | 1 << 39)
    assert "packet 1: its interface counts time in 2^-40 s (if_tsresol), which libpcap reads wrongly" in refusal(
        tmp_path, content
    )


def test_seconds_after_2038_are_told_in_both_byte_orders(tmp_path: Path) -> None:
    for order in "<>":
        (found,) = read(tmp_path, pcap(FRAMES[:1], order=order, times=[(3_000_000_000, 5)]))
        assert found.time_ns == 3_000_000_000 * 10**9 + 5000


REFUSED = {
    "second length of a block": (pcapng(enhanced(0), enhanced(1, trailer=99), enhanced(2)),
                                 "packet 2: libpcap: block total length in header.* and trailer.* don't match"),
    "undescribed interface": (pcapng(enhanced(0), enhanced(1, interface_id=7), enhanced(2)),
                              "packet 2: libpcap: a packet arrived on interface 7, but there's no Interface Description Block"),
    "interface of another section": (section() + interface() + interface() + enhanced(0, interface_id=1) + section() + interface()
                                     + enhanced(1, interface_id=1), "packet 2: libpcap: a packet arrived on interface 1"),
    "several link types": (pcapng(enhanced(0)) + section() + interface(link=101) + enhanced(1, frame=FRAMES[1][14:]),
                           "packet 2: libpcap: an interface has a type 101 different from the type of the first"),
    "several snap lengths": (pcapng(enhanced(0)) + interface(snap=100) + enhanced(1, interface_id=1),
                             "packet 2: libpcap: an interface has a snapshot length 100 different"),
    "several byte orders": (pcapng(enhanced(0)) + pcapng(enhanced(1, ">"), order=">"),
                            "packet 2: libpcap: "),
    "block length": (pcapng(enhanced(0)) + struct.pack("<III", 6, 14, 14), "packet 2: libpcap: .*14 that is not a multiple of 4"),
    "block too short": (pcapng(enhanced(0)) + block(6, bytes(8)), "packet 2: libpcap: "),
    "longer than its block": (pcapng(enhanced(0)) + block(6, struct.pack("<IIIII", 0, 0, 0, 900, 900) + bytes(60)),
                              "packet 2: libpcap: "),
    "time of all ones": (pcapng(enhanced(0), enhanced(1, ticks=(1 << 64) - 1), enhanced(2)),
                         "packet 2: 18,446,744,073,709 s and 551,615,000 ns since 1970 are no time"),
    "microseconds taken for seconds": (section() + interface(resolution=0) + enhanced(0), "packet 1: 1,700,000,000,000,000 s"),
    "resolution beyond all": (section() + interface(resolution=77) + enhanced(0), "cannot be read: .*if_tsresol"),
    "time before 1970": (section() + interface(resolution=6, offset=-SECOND - 9) + enhanced(0), "packet 1: -9 s"),
    "pcap time of all ones": (pcap(times=[(SECOND, 0), (ALL_ONES, ALL_ONES), (SECOND, 9)]),
                              "packet 2: 4,294,967,295 s and .* no time"),
    "fraction above a second": (pcap(times=[(SECOND, 0), (SECOND, 1_000_000), (SECOND, 9)]),
                                "packet 2: 1,700,000,000 s and 1,000,000,000 ns since 1970 are no time"),
    "snap length below the frame": (pcap(snap=54), r"packet 3: libpcap reads 54 of its 59 bytes, as the file says .* is 54"),
    "captured length of all ones": (pcap()[:24] + struct.pack("<IIII", SECOND, 0, ALL_ONES, 60) + bytes(60),
                                    "packet 1: libpcap: invalid packet capture length 4294967295"),
    "cut in a frame": (pcap()[:-1], "packet 3: libpcap: truncated dump file; tried to read 59 captured bytes, only got 58"),
    "cut in a header": (pcap()[: 24 + 16 + 54 + 5],
                        "packet 2: libpcap: truncated dump file; tried to read 16 header bytes, only got 5"),
    "cut in a block": (pcapng(*map(enhanced, range(3)))[:-1], "packet 3: libpcap: truncated pcapng dump file"),
    "gzip cut off": (gzip.compress(pcap())[:-9], "cannot be read: Compressed file ended"),
    "gzip of a cut file": (gzip.compress(pcap()[:-1]), "packet 3: libpcap: truncated"),
    "gzip with a wrong sum": (gzip.compress(pcap())[:-8] + bytes(8), "cannot be read: CRC check failed"),
    "no interface": (section() + enhanced(0), "cannot be read: .*Interface Description Block"),
    "empty": (b"", r"cannot be read: truncated dump file; .*\(it begins with nothing; pcap and pcapng are possible\)"),
    "no capture": (b"\x7fELF and more", r"cannot be read: unknown file format \(it begins with 7f454c46"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(60), r"unknown file format \(it begins with 28b52ffd"),
    "another version": (pcapng()[:12] + b"\x07" + pcapng()[13:], "cannot be read: .*version"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_libpcap_refuses_or_would_misread_is_refused_by_file_packet_and_reason(tmp_path: Path, kind: str) -> None:
    content, expected = REFUSED[kind]
    said = refusal(tmp_path, content)
    assert re.search(expected, said), said


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in ((tmp_path, "it is no file"), (tmp_path / "pipe", "it is no file"), ("/dev/zero", "it is no file"),
                         (tmp_path / "missing", "No such file or directory")):  # fmt: skip
        with pytest.raises(NearstateError, match=f"^capture '{name}' cannot be read: {reason}$"):
            list(savefile.frames(str(name)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_what_may_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "capture").write_bytes(pcap())
    (tmp_path / "capture").chmod(0)
    with pytest.raises(NearstateError, match="cannot be read: Permission denied"):
        list(savefile.frames(str(tmp_path / "capture")))


def test_a_gzipped_file_of_endless_zeros_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savefile, "MOST_BYTES", 1 << 21)
    assert "has more than 2,097,152 bytes: cut it" in refusal(tmp_path, gzip.compress(bytes(1 << 24)))
    assert "has more than 2,097,152 bytes: cut it" in refusal(tmp_path, pcap() + bytes(1 << 21))


def test_a_simple_packet_block_has_no_time(tmp_path: Path) -> None:
    found = read(tmp_path, pcapng(enhanced(0), simple(1), enhanced(2)))
    assert [frame.content for frame in found] == FRAMES
    assert [frame.timed for frame in found] == [True, False, True]


def test_a_file_without_packets_has_none(tmp_path: Path) -> None:
    assert read(tmp_path, pcap([])) == read(tmp_path, pcapng()) == []


def packets_told(content: bytes) -> int:
    """Return how many packets the structure of a file says that it has, by a walk of this test's own."""
    count, at = 0, 24 if content[:4] != section()[:4] else 0
    while at < len(content):
        if content[:4] != section()[:4]:
            at += 16 + struct.unpack_from("<I", content, at + 8)[0]
            count += 1
        else:
            kind, length = struct.unpack_from("<II", content, at)
            count += kind in (2, 3, 6)
            at += length
    return count


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400)
@given(st.sampled_from(["little-endian", "pcapng", "section of its own", "section counting in ns", "old packet block"]),
       st.integers(0, 2**32), st.binary(min_size=1, max_size=8), st.booleans())  # fmt: skip
def test_a_damaged_file_is_read_to_its_end_or_refused(tmp_path: Path, kind: str, where: int, damage: bytes, cut: bool) -> None:
    """Whatever bytes are changed: no other exception, and never fewer frames than the structure has packets."""
    content = bytearray(WHOLE[kind])
    at = where % len(content)
    content[at : at + len(damage)] = damage[: len(content) - at]
    damaged = bytes(content[:at]) if cut else bytes(content)
    try:
        found = read(tmp_path, damaged)
    except NearstateError:
        return
    assert len(found) == packets_told(damaged)
    assert all(0 <= frame.time_ns < 1 << 63 for frame in found)


def test_without_libpcap_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **options: Any) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(savefile.C, "CDLL", missing)
    savefile.library.cache_clear()
    with pytest.raises(
        NearstateError, match=r"read by libpcap, which did not load \(libpcap\.so\.0\.8: .*apt-get install libpcap0\.8"
    ):
        savefile.library()
