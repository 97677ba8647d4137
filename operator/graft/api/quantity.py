"""Resource quantities in the notation of Kubernetes (PURE)."""

import math
import re

SCALES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "Ki": 2.0**10} | {
    letter + suffix: base**power
    for power, letter in enumerate("MGTPE", start=2)
    for suffix, base in (("", 1e3), ("i", 2.0**10))
}

MOST = math.nextafter(2.0**63, 0)


def quantity(text: str | int | float) -> float:
    """Return a resource quantity as a number: 500m is 0.5, 4Gi is 4294967296. Kubernetes has no amount above 2**63 - 1, so a
    larger one is this number. Raises ValueError if the text is not a quantity."""
    match = re.fullmatch(r"\+?([0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", str(text).strip())
    if match is None or match[2] not in SCALES:
        raise ValueError(f"{text!r} is not a quantity")
    return min(float(match[1]) * SCALES[match[2]], MOST)


def binary(size: int) -> str:
    """Return bytes in the notation of the API server, rounded up to whole MiB: 4352Mi, 5Gi."""
    mib = -(-size // 2**20)
    power = next(power for power in (2, 1, 0) if mib % 1024**power == 0)
    return f"{mib // 1024**power}{('Mi', 'Gi', 'Ti')[power]}"
