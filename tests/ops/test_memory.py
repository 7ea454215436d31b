"""The blocks of large results: which request they serve, how much waits, and when it goes back."""

import ctypes
import gc
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

import mbperf
from mbperf import memory

SANITIZED = bool(os.environ.get("MBPERF_SANITIZE"))
MB = 1 << 20
UNPROVEN = 256 * MB  # so much waits although nothing like it was asked for twice
IDLE_S = 10
PIECE = torch.arange(256, dtype=torch.uint8).repeat(256).unsqueeze(0)  # (1, 64 KB)
MADV_PAGEOUT = 21  # reclaim these pages now: what the kernel does by itself when memory is short

pytestmark = pytest.mark.skipif(os.environ.get("MBPERF_MEMORY_CACHE") == "0", reason="the cache is off")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def nothing_waits():
    gc.collect()
    memory.empty_cache()


def result(megabytes: float) -> Tensor:
    """A result of so many MB, written throughout, in a block of its own."""
    return mbperf.gather(PIECE, torch.zeros(int(megabytes * 16), dtype=torch.int64))


def use(megabytes: float) -> int:
    """Make and free a result; return where it lay."""
    return result(megabytes).data_ptr()


def resident() -> int:
    return psutil.Process().memory_info().rss


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script that finds this file's helpers imported, in a process of its own."""
    here = Path(__file__)
    prelude = f"import sys; sys.path.insert(0, {str(here.parent)!r})\nfrom {here.stem} import *\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def output(script: str, **environment: str) -> str:
    done = run(script, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("waiting", "wanted", "serves"),
    [
        (64, 64, True),
        (64, 62, True),
        (64, 32, True),
        (64, 30, False),
        (64, 66, False),
        (4, 2, True),  # fewer than two huge pages, in a block of two
        (1, 0.5, True),
        (1, 0.4, False),
        (0.25, 0.125, True),
    ],
)
def test_a_block_serves_from_half_its_size_up(waiting, wanted, serves):
    place, before = use(waiting), memory.stats()
    assert (use(wanted) == place) is serves
    after = memory.stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (serves, not serves)


def test_the_smallest_block_that_fits_serves():
    small, large = result(32), result(48)
    places = small.data_ptr(), large.data_ptr()
    del small, large
    assert (use(30), use(40)) == places


def test_small_results_are_not_ours():
    before = memory.stats()
    held = result(1 / 16)
    assert memory.stats() == before
    assert held.nbytes == 64 << 10


def test_stats_count_whole_blocks():
    before = memory.stats().in_use_bytes
    held = result(5)
    assert memory.stats().in_use_bytes - before == 6 * MB  # three huge pages
    del held
    assert memory.stats().in_use_bytes == before
    assert memory.stats().kept_bytes == 6 * MB


def test_varying_rows_find_their_block():
    sizes = torch.randint(400, 642, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    use(641 / 16)
    before = memory.stats()
    for rows in sizes:
        use(rows / 16)
    assert memory.stats().hits - before.hits == len(sizes)
    assert memory.stats().kept_bytes <= 42 * MB


def test_varying_rows_find_their_block_while_the_last_result_is_alive():
    script = """
def step(held=None):
    for rows in (577, 412, 641, 469, 530):
        held = result(rows / 8)
step(), step()
before = memory.stats()
for _ in range(10): step()
print(memory.stats().misses - before.misses, memory.stats().hits - before.hits)
"""
    assert output(script) == "0 50"


def test_small_blocks_do_not_leave_for_one_that_serves_them_not():
    script = """
def step():
    held = [result(8) for _ in range(4)]
use(64), step(), step()
before = memory.stats().misses
for _ in range(10): step()
assert memory.stats().misses == before
"""
    output(script)


def test_contents_of_two_results_never_share_memory():
    held = [result(k % 7 + 1) for k in range(20)]
    for i in range(0, 20, 2):
        held[i] = result(held[i].nbytes / MB).fill_(i)
    for i, tensor in enumerate(held):
        assert bool((tensor == (i if i % 2 == 0 else PIECE)).all())


def test_kept_bytes_never_pass_the_peak_in_use():
    script = """
for megabytes in (16, 24, 48, 8, 2, 100, 0.5):
    use(megabytes)
    s = memory.stats()
    assert s.kept_bytes <= s.peak_in_use_bytes, s
    assert s.kept_bytes > 0
held = [result(60) for _ in range(3)]
del held
s = memory.stats()
assert 120 * MB <= s.kept_bytes <= s.peak_in_use_bytes < 300 * MB, s
"""
    output(script)


def test_a_single_large_call_leaves_nothing_but_a_loop_does():
    script = """
use(300)
assert memory.stats().kept_bytes == 0
use(300)
assert memory.stats().kept_bytes == 300 * MB
before = memory.stats().hits
use(299)
assert memory.stats().hits == before + 1
"""
    output(script)


def test_many_blocks_asked_for_once_leave_the_bound():
    script = """
held = [result(100) for _ in range(4)]
del held
assert memory.stats().kept_bytes == 200 * MB <= UNPROVEN
time.sleep(IDLE_S + 0.2)
use(300)
assert memory.stats().kept_bytes == 0  # too late to be a loop
"""
    output(script)


@on_linux
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps memory of its own")
def test_resident_size_after_everything_is_gone():
    script = """
logits, target = torch.randn(1024, 100_000), torch.randint(0, 100_000, (1024,))
logits.requires_grad_()
mbperf.cross_entropy(logits[:8], target[:8]).backward()  # starts threads, loads code
logits.grad = None
memory.empty_cache()
before = resident()
for _ in range(3):
    mbperf.cross_entropy(logits, target).backward()
    assert resident() - before > 380 * MB
    logits.grad = None
s = memory.stats()
print(resident() - before, s.kept_bytes, end=" ")
memory.empty_cache()
print(resident() - before)
"""
    waiting, kept, emptied = map(int, output(script).split())
    assert kept == 392 * MB
    assert abs(waiting - kept) < 16 * MB
    assert abs(emptied) < 16 * MB


def test_idle_blocks_go_back_with_the_next_request_of_any_size():
    for request in (lambda: result(1 / 16), lambda: use(1)):
        use(64)
        time.sleep(IDLE_S / 2)
        request()
        assert memory.stats().kept_bytes >= 64 * MB
        time.sleep(IDLE_S / 2 + 0.2)
        request()
        assert memory.stats().kept_bytes < 4 * MB
        memory.empty_cache()


def mappings() -> str:
    return Path("/proc/self/smaps").read_text()


def lazily_freed(place: int) -> int:
    """Return how many bytes of the mapping around an address the kernel may take."""
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", mappings())[1:]:
        begin, end = (int(part, 16) for part in entry.split(maxsplit=1)[0].split("-"))
        if begin <= place < end:
            return int(re.search(r"LazyFree:\s+(\d+) kB", entry)[1]) << 10
    return 0


@on_linux
def test_the_kernel_may_take_what_waits():
    place = use(64)
    if lazily_freed(place) == 0 and "LazyFree" not in mappings():
        pytest.skip("this kernel has no MADV_FREE")
    assert lazily_freed(place) == 64 * MB
    before = resident()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(place), ctypes.c_size_t(64 * MB), MADV_PAGEOUT) != 0:
        pytest.skip("this kernel has no MADV_PAGEOUT")
    assert before - resident() > 60 * MB
    held = result(64)
    assert held.data_ptr() == place
    assert bool((held == PIECE).all())


@on_linux
def test_the_rest_of_a_block_stays_the_kernels():
    place = use(64)
    held = result(34)
    assert held.data_ptr() == place
    assert lazily_freed(place) >= 28 * MB


def test_a_fork_gives_back_what_waits():
    script = """
import signal
held = result(8)
use(64)
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)  # a second pool of OpenMP threads would wait forever
    assert memory.stats().kept_bytes == 0
    assert bool((held == PIECE).all())
    assert use(64) == use(64)
    del held
    assert memory.stats().kept_bytes == 72 * MB
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert memory.stats().kept_bytes == 0
assert bool((held == PIECE).all())
"""
    output(script)


def test_forks_beside_threads_that_allocate():
    """A child that inherited a held lock would never come back."""
    script = """
import signal
torch.set_num_threads(1)
use(0.25)  # an import under way in another thread would hold a child up, too
done = threading.Event()
def allocate():
    while not done.is_set():
        use(0.25)
# Both are joined: a thread that takes the lock of an interpreter that ends is unwound, and the guards of that
# lock in torch then end the process.
threads = [threading.Thread(target=allocate) for _ in range(2)]
for thread in threads: thread.start()
try:
    for _ in range(100):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            use(0.25)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
finally:
    done.set()
    for thread in threads: thread.join()
"""
    output(script)


def test_threads_never_share_a_block():
    wrong = []

    def work(mark: int) -> None:
        for k in range(60):
            mine = result((1, 2, 4.5)[k % 3]).fill_(mark)
            time.sleep(0.0005)
            if not bool((mine == mark).all()):
                wrong.append(mark)
            del mine

    before = memory.stats()
    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = memory.stats()
    assert not wrong
    assert after.hits + after.misses - before.hits - before.misses == 4 * 60
    assert after.in_use_bytes == before.in_use_bytes
    assert after.kept_bytes <= after.peak_in_use_bytes


def test_tensors_that_live_until_the_interpreter_ends():
    script = """
import atexit, builtins
builtins.held = [result(8), result(0.5)]
class Late:
    def __del__(self): self.held.clear()
late = Late(); late.held = [result(64)]; builtins.late = late
use(16)
atexit.register(lambda: print(memory.stats().kept_bytes == 16 * MB))
"""
    assert output(script) == "True"


def test_switched_off():
    script = """
use(64), use(2)
s = memory.stats()
print(s.enabled, s.kept_bytes, s.hits, s.misses, s.in_use_bytes)
"""
    assert output(script, MBPERF_MEMORY_CACHE="0") == "False 0 0 1 0"


def test_the_environment_is_read_once():
    script = """
os.environ["MBPERF_MEMORY_CACHE"] = "0"
use(64)
print(memory.stats().enabled, memory.stats().kept_bytes == 64 * MB)
"""
    assert output(script, MBPERF_MEMORY_CACHE="1") == "True True"


@pytest.mark.parametrize("value", ["", "yes", "2", "01"])
def test_an_unknown_word_in_the_environment(value):
    done = run("", MBPERF_MEMORY_CACHE=value)
    assert done.returncode != 0
    assert f"ValueError: mbperf: MBPERF_MEMORY_CACHE expects 0 or 1, got '{value}'" in done.stderr


@on_linux
def test_waiting_blocks_make_room_under_a_limit_of_address_space():
    script = """
import resource
use(200)
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + 50 * MB, resource.RLIM_INFINITY))
assert result(210)[-1].equal(PIECE[0])
try:
    result(2_000)
except torch.OutOfMemoryError as error:
    print("cannot allocate" in str(error), memory.stats().peak_in_use_bytes == 210 * MB)
"""
    if SANITIZED:
        pytest.skip("AddressSanitizer reserves terabytes")
    assert output(script) == "True True"


@pytest.mark.skipif(not SANITIZED, reason="needs AddressSanitizer")
@pytest.mark.parametrize("megabytes", [0.5, 64])
def test_a_read_after_free_is_caught(megabytes):
    done = run(f"place = use({megabytes}); print(ctypes.string_at(place + 5, 100))")
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr
