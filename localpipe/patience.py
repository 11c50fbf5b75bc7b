"""How long something has stayed the same, in seconds in which the one who looks was awake itself."""

from __future__ import annotations

import time

_GAP_S = 2.0  # looks come twice a second; of a longer gap between two, no more than this counts


class Patience:
    """Counts seconds without change, look by look.

    A laptop that slept, a virtual machine that was frozen, a whole run that was stopped and continued: when it looks again,
    nothing has changed for an hour, yet nobody has hung. So a gap between two looks counts for two seconds at most.
    """

    def __init__(self) -> None:
        self._last: object = None
        self._looked = time.monotonic()
        self._same_s = 0.0

    def same_s(self, thing: object) -> float:
        """Look once more; return for how many seconds the thing has been equal to what it is now."""
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        self._same_s = self._same_s + min(gap, _GAP_S) if thing == self._last else 0.0
        self._last = thing
        return self._same_s
