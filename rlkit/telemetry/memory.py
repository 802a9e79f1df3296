"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_memory_gb() -> float:
    """Largest resident set so far on a CPU, largest allocation on a GPU, in GB (1e9 bytes)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
