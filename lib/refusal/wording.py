"""How numbers and models are written, in notebooks and paper alike."""

import math

from refusal import registry, statistics


def percent(share: float) -> str:
    """A share as a percentage, e.g. "62.0"."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}"


def span(interval: statistics.Interval, scale: float = 100, digits: int = 1) -> str:
    """An interval, by default of a share in percent, e.g. "[52.2, 70.9]"."""
    return f"[{scale * interval.low:.{digits}f}, {scale * interval.high:.{digits}f}]"


def rated(name: str, rate: float, low: float, high: float) -> dict[str, str]:
    """A rate in percent and its interval, by macro name: `name` and `nameInterval`."""
    return {name: percent(rate), f"{name}Interval": span(statistics.Interval(low, high))}


def p_value(p: float) -> str:
    """Two significant digits, e.g. "0.038"; "< 0.0001" below that; "1" for 1."""
    if p < 1e-4:
        return "< 0.0001"
    return "1" if p > 0.995 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def p_equals(p: float) -> str:
    """The same with its sign: "p = 0.038" or "p < 0.0001"."""
    return f"p {p_value(p)}" if p < 1e-4 else f"p = {p_value(p)}"


def detectable(n: int, rate: float, some: str, none: str) -> str:
    """What change of a rate would be found at 80 %: `some` with its points for {points}, or `none` where none would.

    Args:
        n: Prompts, whose answers under both conditions are taken as independent.
        rate: The rate that may change.
        some: A sentence with {points}, and maybe {n}, in it.
        none: A sentence, maybe with {n}.
    """
    least = statistics.smallest_detectable_difference(n, rate)
    return none.format(n=n) if math.isnan(least) else some.format(n=n, points=percent(least))


def source_name(model: str) -> str:
    """The model's name in its file or on the hub."""
    known = registry.entry(model)
    return known.hub_id.split("/")[-1] if known.hub_id else known.gguf_name.rsplit(".", 1)[0]


def people(model: str) -> str:
    """The model's name for people, from its file's or hub name, with the quantisation left out."""
    parts = [part for part in source_name(model).replace(".Q", "-q").split("-") if not part.lower().startswith("q4")]
    return "-".join(part if part[:1].isupper() else part.capitalize() for part in parts).replace("b-", "B-")


def source_format(model: str) -> str:
    """The format that the weights come in: a quantisation, or safetensors."""
    found = [part for part in source_name(model).replace(".", "-").split("-") if part.lower().startswith("q4")]
    return found[0].upper() if found else "safetensors"
