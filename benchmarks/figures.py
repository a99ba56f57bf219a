"""Rows of ours and theirs, as the benchmarks print them and keep them as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def row(
    name: str, ours: list[float], theirs: list[float], more_is_better: bool = False
) -> dict[str, Any]:
    """Return a row: medians, their ratio, which is above 1 where ours is better, and the spread."""
    pair = statistics.median(ours), statistics.median(theirs)
    better, worse = pair if more_is_better else pair[::-1]
    return {
        "name": name,
        "ours": round(pair[0], 4),
        "theirs": round(pair[1], 4),
        # A stage that takes no time that can be measured is as good.
        "ratio": round(better / worse, 2) if worse > 0 and better > 0 else 1.0,
        "n": len(ours),
        "spread": {
            "ours": [round(min(ours), 4), round(max(ours), 4)],
            "theirs": [round(min(theirs), 4), round(max(theirs), 4)],
        },
    }


def show_row(one: dict[str, Any]) -> None:
    """Print a row."""
    print(
        f"{one['name']:52} ours {one['ours']:8.3f}  theirs {one['theirs']:8.3f}"
        f"  {one['ratio']:6.1f}x  n={one['n']}",
        flush=True,
    )


def write_result(name: str, rows: list[dict[str, Any]], load: float, folder: Path) -> None:
    """Keep rows in a file of their own.

    Args:
        name: of the benchmark.
        rows: of `row`.
        load: of the machine before.
        folder: for the file.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    result = {
        "benchmark": name,
        "taken": stamp,
        "cpus": os.cpu_count(),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "prefect": importlib.metadata.version("prefect"),
        "python": platform.python_version(),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{stamp}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{result['cpus']} CPUs, load {load:.1f} before; {path}")
