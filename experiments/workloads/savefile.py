"""Which frames has a capture file? libpcap reads it (package libpcap0.8, by ctypes): the reader that tcpdump and Wireshark share.

A file that libpcap refuses is refused here with its reason and the packet's number. Three things libpcap passes over without a
word (sf-pcap.c, sf-pcapng.c of 1.10), so they are looked at beside it, and refused:

    a pcap record longer than the file's snap length   libpcap cuts the frame; `described` tells its length in the file
    a time stamp that is none                          a fraction of a second above one, a second after the year 2262
    a binary resolution finer than 2^-34 s             libpcap's 64-bit product overflows, and the fractions are wrong

A Simple Packet Block has no time stamp; libpcap says zero, and `Frame.timed` says so. Formats: pcap and pcapng
(draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng), also gzipped.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import errno
import functools
import gzip
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from datastore.base import ROOT
from datastore.base.errors import NearstateError

MOST_BYTES = 2 << 30
"""Of a file, uncompressed: a million frames of 1,518 bytes take 1.6 GB."""
COPY_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
PCAP_MAGICS = {b"\xa1\xb2\xc3\xd4": (">", 16), b"\xd4\xc3\xb2\xa1": ("<", 16), b"\xa1\xb2\x3c\x4d": (">", 16),
               b"\x4d\x3c\xb2\xa1": ("<", 16), b"\xa1\xb2\xcd\x34": (">", 24), b"\x34\xcd\xb2\xa1": ("<", 24)}  # fmt: skip
"""Byte order and bytes of a record's header; the last two are of a patched libpcap of 1999 that libpcap still reads."""
PCAPNG_MAGIC, PCAPNG_ORDERS = b"\x0a\x0d\x0d\x0a", {b"\x1a\x2b\x3c\x4d": ">", b"\x4d\x3c\x2b\x1a": "<"}
INTERFACE_BLOCK, PACKET_BLOCK, SIMPLE_BLOCK, ENHANCED_BLOCK = 1, 2, 3, 6
TIME_RESOLUTION, FINEST_BINARY = 9, 34
"""Option of an interface description block, and the finest of its binary values that libpcap reads rightly."""
NANOSECONDS, ERROR = 1, -1
ERROR_BYTES = 256
LATEST_S = (1 << 63) // 1_000_000_000 - 1
"""Seconds since 1970 whose nanoseconds fit 63 bits: the year 2262."""


class Frame(NamedTuple):
    """number: in the file, from 1. time_ns: since 1970; `timed`: whether the file tells it. link: LINKTYPE value. content: the
    bytes that were captured."""

    number: int
    time_ns: int
    timed: bool
    link: int
    content: bytes


class Described(NamedTuple):
    """A packet as the structure of its file tells it.

    captured: bytes. timed: it has a time stamp. problem: why libpcap would read it wrongly, "" when it would not. unsigned: its
    time's seconds are an unsigned number of 32 bits.
    """

    captured: int
    timed: bool
    problem: str = ""
    unsigned: bool = False


class PacketHeader(C.Structure):
    """struct pcap_pkthdr of pcap.h; `fraction` is in ns here."""

    _fields_ = [("seconds", C.c_long), ("fraction", C.c_long), ("captured", C.c_uint32), ("length", C.c_uint32)]


@functools.cache
def library() -> Any:
    """Return libpcap, loaded once. Raises NearstateError without it."""
    try:
        loaded = C.CDLL("libpcap.so.0.8")
    except OSError as error:
        raise NearstateError(
            f"capture files are read by libpcap, which did not load ({error}): apt-get install libpcap0.8"
        ) from error
    loaded.pcap_open_offline_with_tstamp_precision.restype = C.c_void_p
    loaded.pcap_open_offline_with_tstamp_precision.argtypes = [C.c_char_p, C.c_uint, C.c_char_p]
    loaded.pcap_geterr.restype = loaded.pcap_lib_version.restype = loaded.pcap_datalink_val_to_name.restype = C.c_char_p
    loaded.pcap_next_ex.argtypes = [C.c_void_p, C.POINTER(C.POINTER(PacketHeader)), C.POINTER(C.c_void_p)]
    for name in ("pcap_geterr", "pcap_datalink", "pcap_close", "pcap_snapshot"):
        getattr(loaded, name).argtypes = [C.c_void_p]
    return loaded


def version() -> str:
    """Return the version that libpcap gives itself. Raises NearstateError without libpcap."""
    words = bytes(library().pcap_lib_version()).decode().split()
    return words[2] if len(words) > 2 else " ".join(words)


def link_name(link: int) -> str:
    """Return libpcap's name of a link type, "" when it has none."""
    return (library().pcap_datalink_val_to_name(link) or b"").decode()


def frames(name: str) -> Iterator[Frame]:
    """Yield every frame of a capture file, in the file's order.

    name: path from the repository's root. Raises NearstateError, at the frame where it turns out, for a file that cannot be
    read, that libpcap refuses, or of which libpcap would drop or change something.
    """
    with contextlib.ExitStack() as stack:
        file = _open(name, stack)
        handle = _handle(name, file)
        stack.callback(library().pcap_close, handle)
        inner, link, number = described(file), int(library().pcap_datalink(handle)), 0
        for number, (header, content) in enumerate(_packets(name, handle), 1):
            told = next(inner, Described(0, True, "the file's structure has no such packet"))
            if told.problem:
                raise _refused(name, number, told.problem)
            if told.captured != len(content):
                raise _refused(name, number, f"libpcap reads {len(content):,} of its {told.captured:,} bytes, as the file says "
                               f"that the snap length is {library().pcap_snapshot(handle):,}")  # fmt: skip
            yield Frame(number, _time_ns(name, number, header, told.unsigned), told.timed, link, content)
        if next(inner, None) is not None:
            raise _refused(name, number + 1, "libpcap reads no further, but the file goes on")


def _refused(name: str, number: int, reason: str) -> NearstateError:
    return NearstateError(
        f"capture {name!r}, packet {number}: {reason}; record the file anew, or save the whole part: `tcpdump -r FILE -w NEW`"
    )


def _time_ns(name: str, number: int, header: PacketHeader, unsigned: bool) -> int:
    """Return a packet's time. unsigned: its seconds have 32 bits, which libpcap takes for signed in files of this byte order."""
    seconds, fraction = header.seconds & 0xFFFFFFFF if unsigned else header.seconds, header.fraction
    if not (0 <= seconds <= LATEST_S and 0 <= fraction < 1_000_000_000):
        raise _refused(name, number, f"{seconds:,} s and {fraction:,} ns since 1970 are no time")
    return int(seconds * 1_000_000_000 + fraction)


# libpcap


def _handle(name: str, file: BinaryIO) -> int:
    """Open a file with libpcap, nanoseconds asked for."""
    said = C.create_string_buffer(ERROR_BYTES)
    path = f"/proc/self/fd/{file.fileno()}".encode()
    handle = library().pcap_open_offline_with_tstamp_precision(path, NANOSECONDS, said)
    if not handle:
        begins = os.pread(file.fileno(), 4, 0).hex() or "nothing"
        reason = said.value.decode(errors="replace").removeprefix(f"{path.decode()}: ")
        raise NearstateError(f"capture {name!r} cannot be read: {reason} (it begins with {begins}; pcap and pcapng are possible)")
    return int(handle)


def _packets(name: str, handle: int) -> Iterator[tuple[PacketHeader, bytes]]:
    """Yield header and captured bytes of each packet."""
    header, data = C.POINTER(PacketHeader)(), C.c_void_p()
    number = 1
    while (found := library().pcap_next_ex(handle, C.byref(header), C.byref(data))) == 1:
        captured = header.contents.captured
        yield header.contents, C.string_at(data.value, captured) if captured and data.value else b""
        number += 1
    if found == ERROR:
        raise _refused(name, number, f"libpcap: {library().pcap_geterr(handle).decode(errors='replace')}")


# The file


def _open(name: str, stack: contextlib.ExitStack) -> BinaryIO:
    """Return a capture file, uncompressed. Raises NearstateError for what is no file, cannot be read or is too large."""
    path = ROOT / name
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(errno.EINVAL, "it is no file")
        file = stack.enter_context(path.open("rb"))
        if file.read(2) == GZIP_MAGIC:
            file.seek(0)
            return _uncompressed(name, file, stack)
        _check_size(name, os.fstat(file.fileno()).st_size)
        return file
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise NearstateError(f"capture {name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _uncompressed(name: str, file: BinaryIO, stack: contextlib.ExitStack) -> BinaryIO:
    """Return the content of a gzipped file as a file in memory."""
    whole = stack.enter_context(os.fdopen(os.memfd_create("capture", os.MFD_CLOEXEC), "w+b"))
    with gzip.GzipFile(fileobj=file) as content:
        while part := content.read(COPY_BYTES):
            whole.write(part)
            _check_size(name, whole.tell())
    whole.flush()
    return whole


def _check_size(name: str, size: int) -> None:
    if size > MOST_BYTES:
        raise NearstateError(f"capture {name!r} has more than {MOST_BYTES:,} bytes: cut it, `tcpdump -r FILE -c COUNT -w NEW`")


# The structure


def described(file: BinaryIO) -> Iterator[Described]:
    """Yield what the structure of a file says of each packet, up to where it breaks off; nothing for no capture."""
    file.seek(0)
    magic = file.read(4)
    with contextlib.suppress(struct.error, KeyError):  # too short, or no byte order: libpcap says why
        if magic in PCAP_MAGICS:
            yield from _described_records(file, *PCAP_MAGICS[magic])
        elif magic == PCAPNG_MAGIC:
            yield from _described_blocks(file)


def _described_records(file: BinaryIO, order: str, header_bytes: int) -> Iterator[Described]:
    file.seek(24)
    while header := file.read(header_bytes):
        captured, _ = struct.unpack_from(f"{order}II", header, 8)
        yield Described(captured, True, unsigned=True)
        file.seek(captured, os.SEEK_CUR)


def _described_blocks(file: BinaryIO) -> Iterator[Described]:
    """Walk the blocks; of a byte order that changes between sections libpcap says why it goes no further."""
    order, at, snap_bytes, problem = "", 0, 0, ""
    file.seek(0)
    while header := file.read(28):
        if header[:4] == PCAPNG_MAGIC:
            order = PCAPNG_ORDERS[header[8:12]]
        kind, length = struct.unpack_from(f"{order}II", header)
        if kind == INTERFACE_BLOCK:
            (snap_bytes,) = struct.unpack_from(f"{order}I", header, 12)
            file.seek(at + 16)
            problem = problem or _resolution_problem(order, file.read(max(0, length - 20)))
        elif kind in (PACKET_BLOCK, ENHANCED_BLOCK):
            yield Described(struct.unpack_from(f"{order}I", header, 20)[0], True, problem)
        elif kind == SIMPLE_BLOCK:
            (size,) = struct.unpack_from(f"{order}I", header, 8)
            yield Described(min(size, snap_bytes or size), False, problem)
        at += max(length, 12)
        file.seek(at)


def _resolution_problem(order: str, options: bytes) -> str:
    """Return why an interface's time stamps would be read wrongly, from its block's options; "" when they would not."""
    at = 0
    while at + 4 < len(options):
        code, size = struct.unpack_from(f"{order}HH", options, at)
        value = options[at + 4]
        if code == TIME_RESOLUTION and value & 0x80 and value & 0x7F > FINEST_BINARY:
            return f"its interface counts time in 2^-{value & 0x7F} s (if_tsresol), which libpcap reads wrongly"
        at += 4 + size + -size % 4
    return ""
