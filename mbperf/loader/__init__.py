"""The DataLoader profiler: which num_workers, on your own dataset, and how sure."""

from mbperf.loader.profiler import profile
from mbperf.loader.records import Profile, Trial
from mbperf.loader.settings import Settings
from mbperf.loader.source import LoaderError
from mbperf.loader.trial import Timing, time_loader

__all__ = ["LoaderError", "Profile", "Settings", "Timing", "Trial", "profile", "time_loader"]
