"""The DataLoader profiler: which num_workers, on your own dataset, and how sure."""

from mbperf.require import require

require("psutil", "loader")  # every part needs it; said once, with the command that brings it

from mbperf.loader.profiler import profile  # noqa: E402
from mbperf.loader.records import Profile, Trial  # noqa: E402
from mbperf.loader.settings import Settings  # noqa: E402
from mbperf.loader.source import LoaderError  # noqa: E402
from mbperf.loader.trial.time_loader import time_loader  # noqa: E402
from mbperf.loader.trial.timing import Timing  # noqa: E402

__all__ = ["LoaderError", "Profile", "Settings", "Timing", "Trial", "profile", "time_loader"]
