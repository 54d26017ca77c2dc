"""How is a measured number said in a sentence?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def digits(value: float) -> str:
    """Return three significant digits, never in exponent form: 0.312, 61.2, 1,230."""
    if value == 0 or abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def microseconds(value_us: float) -> str:
    """Return a latency in the unit a reader expects: below a microsecond in ns, from 10,000 on in ms."""
    if value_us < 1:
        return f"{digits(value_us * 1000)} ns"
    return f"{digits(value_us)} µs" if value_us < 10_000 else f"{digits(value_us / 1000)} ms"


def times(high: float, low: float) -> str:
    """Return how many times larger `high` is than `low`; `∞x` of 0."""
    return f"{digits(high / low)}x" if low else "∞x"


def spread(values: Iterable[float], unit: str = "x") -> str:
    """Return the range of values said shortly: 1.2x, or 1.2x to 3x."""
    ends = sorted(values)
    first, last = digits(ends[0]), digits(ends[-1])
    return f"{first}{unit}" if first == last else f"{first}{unit} to {last}{unit}"


def listing(names: Sequence[str]) -> str:
    """Return names as prose: a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "nothing"


def missing(*placements: str) -> str:
    """Return the sentence for a question that cannot be answered, naming what was not measured."""
    return f"Not answered: this run holds no valid measurement of {listing(placements)}."
