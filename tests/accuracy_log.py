"""The rows of the accuracy tests: kept in a file, so that a long run can be resumed, and shown as a table."""

import json
import os
from pathlib import Path


class AccuracyLog:
    """Rows by test id, in the file that MBPERF_ACCURACY names, or only in memory.

    A test whose row is in the file is judged by that row and not measured again.
    """

    def __init__(self):
        name = os.environ.get("MBPERF_ACCURACY")
        self.path = Path(name) if name else None
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        self.rows = {row["id"]: row for row in map(json.loads, lines)}

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
    lines = [f"{'dataset':17} {'step':>14} {'workers':>7} {'drained':>8} {'predicted':>18} {'seen':>18}  off"]
    for row in rows:
        verdict = "pass" if row["passed"] else "MISS"
        lines.append(
            f"{row['dataset']:17} {row['step']:>14} {row['workers']:7} {row['from_rate']:8.1%} "
            f"{share(row['predicted'], row['interval']):>18} {share(row['seen'], row['seen_interval']):>18} "
            f"{100 * (row['predicted'] - row['seen']):+5.1f} {verdict} {row['took_s']:.0f} s"
        )
    return "\n".join(lines)


def best_table(rows):
    """Return recommendations against exhaustive sweeps, and said against right."""
    if not rows:
        return ""
    lines = [f"{'dataset':17} {'recommended':>34} {'exhaustive best':>34} ratio  time  sure"]
    for row in rows:
        verdict = "pass" if row["passed"] else "MISS"
        lines.append(
            f"{row['dataset']:17} {row['recommended']:>34} {row['best']:>34} {row['ratio']:.3f} "
            f"{row['share']:5.2f} {row['confidence']:5.0%} {verdict} {row['took_s']:.0f} s"
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


def share(value, interval):
    """Return `45.1 % (41 to 49)`."""
    return f"{100 * value:.1f} % ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
