"""The rows of the accuracy tests: kept in a file, so that a long run can be resumed, and shown as a table."""

import json
import os
from pathlib import Path


class AccuracyLog:
    """Rows by test id, in the file that MBPERF_ACCURACY names, or only in memory.

    A test whose row is in the file is judged by that row and not measured again, unless the row is void.
    """

    def __init__(self):
        name = os.environ.get("MBPERF_ACCURACY")
        self.path = Path(name) if name else None
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        self.rows = {row["id"]: row for row in map(json.loads, lines) if row["steady"]}

    def row(self, request, measure):
        """Return the row of this test, from the file or from `measure()`."""
        name = request.node.name
        if name not in self.rows:
            self.rows[name] = {"id": name, **measure()}
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.rows[name]) + "\n")
        return self.rows[name]

    def tables(self):
        """Return both tables and what was said against what was right, as text."""
        idle = [row for row in self.rows.values() if "predicted" in row]
        best = [row for row in self.rows.values() if "ratio" in row]
        return "\n\n".join([*filter(None, (idle_table(idle), best_table(best)))])


def idle_table(rows):
    """Return predicted against seen idle shares."""
    if not rows:
        return ""
    lines = [
        f"{'dataset':9} {'step':>14} {'workers':>7} {'drained':>8} {'predicted':>19} "
        f"{'seen before':>19} {'seen after':>19}   off        others"
    ]
    for row in rows:
        lines.append(
            f"{row['dataset']:9} {row['step']:>14} {row['workers']:7} {row['from_rate']:8.1%} "
            f"{share(row['predicted'], row['interval']):>19} "
            f"{share(row['before']['idle'], row['before']['interval']):>19} "
            f"{share(row['after']['idle'], row['after']['interval']):>19} "
            f"{100 * (row['predicted'] - row['seen']):+5.1f} {closing(row)}"
        )
    return "\n".join(lines)


def best_table(rows):
    """Return recommendations against exhaustive sweeps, and said against right."""
    if not rows:
        return ""
    lines = [f"{'dataset':17} {'recommended':>34} {'exhaustive best':>34} ratio  time  sure      others"]
    for row in rows:
        lines.append(
            f"{row['dataset']:17} {row['recommended']:>34} {row['best']:>34} {row['ratio']:.3f} "
            f"{row['share']:5.2f} {row['confidence']:5.0%} {closing(row)}"
        )
    said = [row["confidence"] for row in rows]
    right = [row["ratio"] >= 0.95 for row in rows]
    lines.append(f"said {sum(said) / len(said):.0%} sure on average, right {sum(right)} of {len(right)}")
    held_out = [claim for row in rows for claim in row["claims"]]
    lines += calibration(held_out)
    return "\n".join(lines)


def calibration(claims):
    """Return, for bands of what was said, how often it was right (each claim: said, right)."""
    lines = ["one repeat of each exhaustive sweep, judged by the others:"]
    for low, high in ((0.0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.01)):
        band = [(said, right) for said, right in claims if low <= said < high]
        if band:
            said, right = (sum(values) / len(band) for values in zip(*band, strict=True))
            lines.append(f"  said {said:4.0%} on average: right {right:4.0%} of {len(band)}")
    return lines


def closing(row):
    """Return what a row says (nothing where others used the machine or it changed), their share, its time."""
    verdict = "void" if not row["steady"] else "pass" if row["within"] else "MISS"
    return f"{verdict} {row['others']:4.0%} {row['took_s']:4.0f} s"


def share(value, interval):
    """Return `45.1 % (41 to 49)`."""
    return f"{100 * value:.1f} % ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
