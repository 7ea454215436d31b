"""A training loop with a stopwatch, as anyone would write it: what a real consumer waits. Imports no mbperf.

`python paced_consumer.py '{"dataset": "sleeps", "step": "sleeps", "step_time_s": 0.02, "seconds": 6,
"keywords": {"batch_size": 32, "num_workers": 2}}'` prints the idle share and its 95 % interval as JSON.
"""

import json
import math
import statistics
import sys
import time

import subjects
from torch.utils.data import DataLoader

BLOCKS = 12


def consume(loader, step, seconds):
    """Iterate epochs for `seconds`; return (waits, steps), without those of each epoch's cold queue."""
    skipped = max(1, loader.num_workers * (loader.prefetch_factor or 0))
    waits, steps = [], []
    while sum(waits) + sum(steps) < seconds:
        asked = time.perf_counter()
        for position, batch in enumerate(loader):
            arrived = time.perf_counter()
            step(batch)
            done = time.perf_counter()
            if position >= skipped:
                waits.append(arrived - asked)
                steps.append(done - arrived)
                if sum(waits) + sum(steps) > seconds:
                    break
            asked = done
    return waits, steps


def idle(waits, steps):
    """Return the share of the time that was waiting."""
    return sum(waits) / (sum(waits) + sum(steps))


def interval(waits, steps, turn):
    """Return the 95 % interval from blocks of whole turns of the workers."""
    size = max(turn, len(waits) // BLOCKS // turn * turn)
    starts = range(0, len(waits) - size + 1, size)
    shares = [idle(waits[k : k + size], steps[k : k + size]) for k in starts]
    half = 1.96 * statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 1.0
    return idle(waits, steps) - half, idle(waits, steps) + half


def main():
    job = json.loads(sys.argv[1])
    loader = DataLoader(subjects.KNOWN_COSTS[job["dataset"]](), shuffle=True, **job["keywords"])
    step = subjects.Step(job["step"], job["step_time_s"])
    waits, steps = consume(loader, step, job["seconds"])
    turn = max(1, loader.num_workers)
    print(json.dumps({"idle": idle(waits, steps), "interval": interval(waits, steps, turn)}))


if __name__ == "__main__":
    main()
