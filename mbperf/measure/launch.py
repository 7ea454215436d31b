"""Who started this process: torchrun, or anybody else. Imports no torch."""

import os


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first_rank() -> bool:
    """Whether this process is the one that prints and saves."""
    return not launched() or os.environ["RANK"] == "0"
