"""Peak memory of one forward+backward, as the operating system saw it in a fresh process.

The high-water mark of resident memory counts what was really touched, by whichever allocator; a fresh process
has no freed blocks to reuse. Logits and targets are not counted, the returned gradient is.
"""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # proc(5): resets VmHWM to the resident size


def peak_memory(loss: str, rows: int, classes: int) -> int:
    """Return the bytes that forward+backward of a loss adds to resident memory at its highest.

    Args:
        loss: "module:function" with the signature of `F.cross_entropy`.
        rows: N.
        classes: C, float32 logits.

    Returns:
        Bytes, with the gradient (4 * N * C) among them.

    Raises:
        subprocess.CalledProcessError: the fresh process failed; its message is on stderr.

    >>> peak_memory("torch.nn.functional:cross_entropy", 1024, 1024) > 2 << 20
    True
    """
    return printed_by("-m", "mbperf.measure.memory", loss, rows, classes)


def printed_by(*arguments: object) -> int:
    """Return the number that Python prints in a fresh process.

    Args:
        arguments: of the interpreter, for instance a script and what it is told.

    Raises:
        subprocess.CalledProcessError: the fresh process failed; its message is on stderr.

    >>> printed_by("-c", "print(6 * 7)")
    42
    """
    command = [sys.executable, *map(str, arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_here(loss: str, rows: int, classes: int) -> int:
    """Do what `peak_memory` describes in this process."""
    import torch

    module, _, name = loss.partition(":")
    function = getattr(import_module(module), name)

    def forward_backward(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(function(input, target), input)[0]

    # Loads code and starts threads, none of which is this loss's memory.
    forward_backward(torch.randn(8, 16, requires_grad=True), torch.arange(8))
    input = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    return added_at_peak(lambda: forward_backward(input, target))


def added_at_peak(call: Callable[[], object]) -> int:
    """Return the bytes that a call adds to this process's resident memory at its highest."""
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _peak_bytes()
    call()
    return _peak_bytes() - before


def _peak_bytes() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(peak_here(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
