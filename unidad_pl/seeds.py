"""Seeds that are functions of what they are for."""

from __future__ import annotations

import hashlib

MOST_SEED = 2**63 - 1
"""The largest: they are kept as 64-bit integers with a sign."""


def mix_seed(*parts: int) -> int:
    """A 63-bit seed from integers; different parts give unrelated seeds, on every platform."""
    text = ",".join(str(int(part)) for part in parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
