"""A simple model of a loader's rate from single-process costs, and what a configuration is worth.

Per batch of b samples: work = b g + c. Without workers the period is that; with W workers it is the largest
of (work + transport) / W, the consumer's own share of transport, and the CPU time over the processors.
"""

from dataclasses import dataclass

from mbperf.loader.settings import Settings
from mbperf.loader.trial.probe import Costs

# Before a trial with workers has corrected it: queue, pickling of descriptors, mmap (some 0.2 ms a batch),
# and writing fresh shared-memory pages (about 2 GB/s, page faults included).
TRANSPORT_S = 2e-4
SHARED_WRITE_BYTES_PER_S = 2e9
CONSUMER_SHARE = 0.5  # of the transport falls to the consumer's process


@dataclass
class Model:
    """Predict rates; corrected by the first trials.

    `transport_s` is per batch. `work_factor` is what the work of real batches takes over what the probe saw:
    it reads and collates the same few samples, whose memory is warm.
    """

    costs: Costs
    cpus: float
    transport_s: float = TRANSPORT_S
    work_factor: float = 1.0

    def work_s(self, settings: Settings) -> float:
        """Return the seconds of fetching and collating one batch in one process."""
        return self._parts(settings)[0]

    def _parts(self, settings: Settings) -> tuple[float, float]:
        """Return (wall, CPU) seconds of one batch's work."""
        wall, cpu = self._probed_parts(settings)
        return (
            (wall, cpu) if settings.dataset != "user" else (wall * self.work_factor, cpu * self.work_factor)
        )

    def _probed_parts(self, settings: Settings) -> tuple[float, float]:
        costs, size = self.costs, settings.batch_size or self.costs.batch_size or 1
        scale = size / (costs.batch_size or 1)
        if settings.dataset != "user":
            gathered = (costs.tensor_dataset_s or 0.0) * scale
            return gathered, gathered
        collate = costs.collate_s.get(settings.collate, 0.0) * scale
        return size * costs.getitem_s + collate, size * costs.getitem_cpu_s + collate

    def period_s(self, settings: Settings) -> float:
        """Return the predicted seconds between batches of a drained loader."""
        work, cpu = self._parts(settings)
        if not settings.num_workers:
            return max(work, 1e-9)
        scale = (settings.batch_size or 1) / (self.costs.batch_size or 1)
        transport = self.transport_s + self.costs.batch_bytes * scale / SHARED_WRITE_BYTES_PER_S
        consumer = CONSUMER_SHARE * transport
        workers = (work + transport) / settings.num_workers
        return max(workers, consumer, (cpu + transport + consumer) / self.cpus, 1e-9)

    def rate(self, settings: Settings) -> float:
        """Return the predicted samples per second of a drained loader."""
        return (settings.batch_size or 1) / self.period_s(settings)

    def correct(self, settings: Settings, measured_rate: float) -> None:
        """Choose the work factor, or with workers the transport, that makes the prediction meet a rate.

        Begin with a rate without workers: the transport is found by bisection, with the work as it stands.
        """
        if measured_rate <= 0:
            return
        if not settings.num_workers:
            probed, _ = self._probed_parts(settings)
            if probed > 0 and settings.dataset == "user":
                self.work_factor = (settings.batch_size or 1) / measured_rate / probed
            return
        low, high = 0.0, 100.0 * (settings.batch_size or 1) / measured_rate
        for _ in range(60):
            self.transport_s = (low + high) / 2
            if self.rate(settings) > measured_rate:
                low = self.transport_s
            else:
                high = self.transport_s


@dataclass
class Consumer:
    """The consumer, which takes batches and steps.

    Args:
        step_time_s: time of one step with a batch of `batch_size`; 0 drains.
        samples: of an epoch; None: endless.
        hand_over_s: what taking over a finished batch from a worker costs the consumer itself.
    """

    step_time_s: float = 0.0
    batch_size: int | None = None
    samples: int | None = None
    hand_over_s: float = 0.0

    def step_s(self, settings: Settings) -> float:
        """Return the step time of one batch; a batch of another size takes proportionally long."""
        if not self.batch_size or not settings.batch_size:
            return self.step_time_s
        return self.step_time_s * settings.batch_size / self.batch_size

    def period_s(self, settings: Settings, rate_samples_per_s: float) -> float:
        """Return the seconds between steps: loading adds to the step without workers, overlaps with them.

        What never overlaps is taking over a finished batch (queue, descriptors, mmap): `hand_over_s`.
        """
        load = (settings.batch_size or 1) / max(rate_samples_per_s, 1e-9)
        step = self.step_s(settings)
        return max(step + self.hand_over_s, load) if settings.num_workers else step + load

    def idle(self, settings: Settings, rate_samples_per_s: float) -> float:
        """Return the share of its time that the consumer waits.

        With workers this is max(0, 1 - T * rate), or the hand-over's share if that is more; without, step and
        load follow each other: 1 - T / (T + 1 / rate).
        """
        period = self.period_s(settings, rate_samples_per_s)
        return max(0.0, 1 - self.step_s(settings) / period)

    def start_up_s(self, settings: Settings, rate: float, first_batch_s: float | None) -> float:
        """Return what the first batch takes beyond the time that its share of the steady rate explains."""
        together = max(1, settings.num_workers)  # the first batches of all workers arrive at once
        return max(0.0, (first_batch_s or 0.0) - together * (settings.batch_size or 1) / max(rate, 1e-9))

    def value(self, settings: Settings, rate: float, first_batch_s: float | None = None) -> float:
        """Return the samples/s that this consumer gets, over a whole epoch where its length is known."""
        start_up = self.start_up_s(settings, rate, first_batch_s)
        return self.value_at(settings, self.period_s(settings, rate), start_up)

    def value_at(self, settings: Settings, period_s: float, start_up_s: float) -> float:
        """Return the samples/s of steps `period_s` apart, behind a start-up in each epoch of known length."""
        size = settings.batch_size or 1
        if not self.samples:
            return size / period_s
        batches = max(1.0, self.samples / size)
        return self.samples / (batches * period_s + start_up_s)
