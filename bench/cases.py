"""The axes of the benchmarks: which sizes, dtypes and passes, each with the reason it is there."""

from dataclasses import dataclass

import torch

SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

NO_GRAD, FORWARD, FORWARD_BACKWARD = "no_grad", "forward", "fwd+bwd"
PASSES = (NO_GRAD, FORWARD, FORWARD_BACKWARD)


@dataclass(frozen=True)
class CrossEntropyCase:
    """Logits (N, C) or (N, C, d1, ...), a dtype, a pass and the options of the call."""

    shape: tuple[int, ...]
    why: str
    step: str = FORWARD_BACKWARD
    dtype: torch.dtype = torch.float32
    reduction: str = "mean"
    label_smoothing: float = 0.0
    weighted: bool = False
    soft: bool = False
    cold: bool = False
    # The row counts of successive steps, at most shape[0]: one call takes them all.
    varied: tuple[int, ...] = ()
    # How many times faster than F.cross_entropy forward+backward must be; CPU, 2 threads.
    floor: float | None = None

    @property
    def rows(self) -> int:
        """N times the positions, of all steps."""
        if self.varied:
            return sum(self.varied)
        return torch.Size(self.shape).numel() // self.classes

    @property
    def classes(self) -> int:
        """C."""
        return self.shape[1]

    @property
    def options(self) -> str:
        """The differences from a plain call, in words."""
        words = {
            self.reduction: self.reduction != "mean",
            "smoothing": self.label_smoothing > 0,
            "weights": self.weighted,
            "soft": self.soft,
            "cold": self.cold,
            "varied": bool(self.varied),
        }
        return " ".join(word for word, there in words.items() if there)

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return " ".join(filter(None, [size, SHORT[self.dtype], self.step, self.options]))


# (shape, why, floor of forward+backward against F.cross_entropy on recycled pages, which at the large shapes
# is three to five times as fast as on fresh ones)
SHAPES: list[tuple[tuple[int, ...], str, float]] = [
    ((64, 10), "the lesson's mini-batch: all overhead", 1.6),
    ((50_000, 10), "the lesson's whole training set: few classes, many rows", 20),
    ((16_384, 32), "small C past one vector", 4),
    ((256, 1_000), "ImageNet, one batch: 1 MB of logits", 2.2),
    ((4_096, 1_000), "ImageNet, large batch: 16 MB of logits", 6),
    ((512, 32_000), "Llama vocabulary: 66 MB, beyond most caches", 3),
    ((512, 50_257), "GPT-2 vocabulary: odd, so every other row is unaligned", 2.8),
    ((128, 128_256), "Llama 3 vocabulary: rows of half a megabyte", 3),
    ((1, 128_256), "one row: parallel over columns or not at all", 2),
    ((4, 21, 256, 256), "segmentation: the class dimension is strided", 5),
]

LARGE = (512, 32_000)

# Drawn from 400 to 641. Five, as a cache of a few blocks of exactly these sizes would know fewer by heart.
VARIED_ROWS = (577, 412, 641, 469, 530)

CROSS_ENTROPY: list[CrossEntropyCase] = [
    CrossEntropyCase(shape, why, step, floor=floor if step == FORWARD_BACKWARD else None)
    for shape, why, floor in SHAPES
    for step in PASSES
]
CROSS_ENTROPY += [
    # A row of half precision takes a way of its own through the kernels: nothing may be slower than torch.
    CrossEntropyCase(shape, why, dtype=dtype, floor=1)
    for dtype in (torch.bfloat16, torch.float16)
    for shape, why, _ in SHAPES
    # F.cross_entropy's mean of more float16 losses than that is infinite.
    if dtype == torch.bfloat16 or torch.Size(shape).numel() // shape[1] < 20_000
]
CROSS_ENTROPY += [
    CrossEntropyCase((4_096, 1_000), "no gradient in the forward pass: LSE is kept", reduction="none"),
    CrossEntropyCase((4_096, 1_000), "the other scalar reduction", reduction="sum"),
    CrossEntropyCase((4_096, 1_000), "a factor per class", weighted=True),
    CrossEntropyCase((4_096, 1_000), "a second sum per row", label_smoothing=0.1),
    CrossEntropyCase((4_096, 1_000), "targets as large as the logits", soft=True),
    CrossEntropyCase((256, 1_000), "the same batch straight from memory", cold=True),
    CrossEntropyCase(
        (641, 32_000), "packed tokens: another row count in every step", varied=VARIED_ROWS, floor=4
    ),
]


@dataclass(frozen=True)
class CollateCase:
    """A batch size, what one sample is, and how many times faster than default_collate it must be."""

    batch_size: int
    sample: str
    why: str
    floor: float

    def __str__(self) -> str:
        return f"{self.batch_size} {self.sample}"


# The floors of single sizes are below the geometric mean asked for (5x), as the gain grows with the batch.
COLLATE: list[CollateCase] = [
    CollateCase(64, "pixels+label", "the lesson's batch", floor=3),
    CollateCase(256, "pixels+label", "a copy of 0.8 MB", floor=3),
    CollateCase(1_024, "pixels+label", "a copy of 3.2 MB", floor=3),
    CollateCase(64, "ten-fields", "nested dicts of ten small fields: all overhead", floor=5),
]

# One case for each kind of sample that default_collate knows: it may be slower on none. Where torch's own
# stack does the work the two are alike, and a floor of 1 would be missed every other time.
KINDS: list[CollateCase] = [
    CollateCase(64, "tiny", "four numbers and a label", floor=1),
    CollateCase(2, "tiny", "the smallest batch: the call itself", floor=1),
    CollateCase(8, "images", "3x224x224 float32: a copy of 5 MB", floor=1),
    CollateCase(64, "images", "3x224x224 float32: 39 MB, fresh pages for torch", floor=1),
    CollateCase(64, "byte-images", "3x224x224 uint8", floor=1),
    CollateCase(8, "permuted-images", "strided: torch copies them for both", floor=0.95),
    CollateCase(16, "scales", "another image size in every batch, five batches", floor=1),
    CollateCase(64, "hundred-fields", "a flat dict of a hundred tensors", floor=1),
    CollateCase(64, "numpy", "an array and a number", floor=1),
    CollateCase(64, "numpy-scalars", "one of each of five types", floor=1),
    CollateCase(64, "scalars", "int, float and bool", floor=1),
    CollateCase(64, "strings", "handed back as they are", floor=1),
    CollateCase(64, "bytes", "handed back as they are", floor=1),
    CollateCase(64, "nested", "dict, list, tuple and named tuple; tensor, number and text", floor=1),
    CollateCase(64, "mixed", "float32 and float64 alternately: torch converts for both", floor=0.95),
]


@dataclass(frozen=True)
class LinearCase:
    """Hidden states (N, H), a head (V, H), a dtype and the share of targets that is ignored."""

    shape: tuple[int, int, int]
    why: str
    dtype: torch.dtype = torch.float32
    ignored: float = 0.0
    chunked: bool = False  # torch's own chunks beside the others: up to twelve times as slow
    memory: bool = False  # peak memory, each in a fresh process

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return " ".join(
            filter(None, [size, SHORT[self.dtype], f"{self.ignored:.0%} ignored" if self.ignored else ""])
        )


# Few rows: the default run has minutes for everything. docs/linear_cross_entropy.md has those of a real step.
LINEAR: list[LinearCase] = [
    LinearCase((64, 50, 10), "the lesson's last layer: all overhead"),
    LinearCase((64, 50, 10), "the lesson's last layer, half precision", torch.bfloat16),
    LinearCase((128, 256, 32_000), "Llama 2's vocabulary behind a narrow model", memory=True),
    # Where torch's chunks, which take 30 times as long in the case above, are done in a fifth of a second.
    LinearCase((128, 128, 16_000), "torch's own chunks beside ours", chunked=True),
    LinearCase((128, 256, 32_000), "half precision: ATen sums its products in it", torch.bfloat16),
    LinearCase((128, 256, 32_000), "fine-tuning: half of the tokens are the prompt", ignored=0.5),
    LinearCase((64, 256, 50_257), "GPT-2's odd vocabulary"),
]


# The logits are computed once more than where they are kept: with a wide model that is a quarter of the time.
LINEAR_TOKENS: list[LinearCase] = [
    LinearCase((64, 50, 10), "a small action space: all overhead"),
    LinearCase((256, 256, 32_000), "Llama 2's vocabulary behind a narrow model", memory=True),
    LinearCase((256, 256, 32_000), "half precision", torch.bfloat16),
]


@dataclass(frozen=True)
class KlDivCase:
    """Logits (N, C) of a student and of a teacher, a dtype and a temperature; forward and backward."""

    shape: tuple[int, int]
    why: str
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0  # 1 costs torch nothing, any other a copy of both
    floor: float = 4
    memory: bool = False  # peak memory, each in a fresh process

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{size} {SHORT[self.dtype]} fwd+bwd" + (
            f" T={self.temperature:g}" if self.temperature != 1 else ""
        )


KL_DIV: list[KlDivCase] = [
    KlDivCase((128, 100), "CIFAR-100: few classes, half of it overhead", temperature=4.0, floor=2.5),
    KlDivCase((256, 1_000), "ImageNet, one batch: 1 MB of logits each", temperature=4.0),
    KlDivCase((256, 32_000), "Llama 2's vocabulary: 33 MB each, beyond most caches", memory=True),
    KlDivCase((256, 32_000), "half precision: exponentials are most of the time", torch.bfloat16),
]


@dataclass(frozen=True)
class TokenCase:
    """Logits (N, C), a dtype, a pass, and what is asked for."""

    shape: tuple[int, int]
    why: str
    step: str = FORWARD_BACKWARD
    dtype: torch.dtype = torch.float32
    entropy: bool = True
    temperature: float = 1.0
    memory: bool = False  # peak memory, each in a fresh process
    floor: float | None = None

    @property
    def options(self) -> str:
        """The differences from a plain call, in words."""
        words = ["entropy" * self.entropy, f"T={self.temperature:g}" * (self.temperature != 1)]
        return " ".join(filter(None, words))

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return " ".join(filter(None, [size, SHORT[self.dtype], self.step, self.options]))


# Few rows: the usual ways take 0.1 s a call for 128 of them.
TOKENS: list[TokenCase] = [
    TokenCase((64, 10), "all overhead", floor=1.5),
    TokenCase((256, 1_000), "a small action space: 1 MB of logits", floor=3),
    TokenCase((128, 32_000), "Llama 2's vocabulary", memory=True, floor=3),
    TokenCase((128, 32_000), "half precision, sampled at a temperature", FORWARD_BACKWARD, torch.bfloat16,
              temperature=0.7, floor=3),
    TokenCase((64, 50_257), "GPT-2's odd vocabulary, no entropy: DPO", entropy=False, floor=2),
    TokenCase((64, 50_257), "the log-probabilities of the old policy", NO_GRAD, entropy=False, floor=1.5),
]  # fmt: skip

# Only where MBPERF_LARGE is set: the usual way takes seconds a call, the comparison 17 GB by estimate.
LARGE_TOKENS: list[TokenCase] = [
    TokenCase((8_192, 50_257), "4 x 2,048 tokens of GPT-2: 823 MB of logits", dtype=torch.bfloat16,
              memory=True, floor=5),
]  # fmt: skip


@dataclass(frozen=True)
class StatsCase:
    """Logits (N, C), a dtype and a pass: a loss beside entropies, predictions and their probabilities."""

    shape: tuple[int, int]
    why: str
    step: str = FORWARD_BACKWARD
    dtype: torch.dtype = torch.float32
    floor: float | None = None

    def __str__(self) -> str:
        return " ".join(["x".join(map(str, self.shape)), SHORT[self.dtype], self.step])


STATS: list[StatsCase] = [
    StatsCase((64, 10), "the lesson's mini-batch and its accuracy: all overhead", floor=1.5),
    StatsCase((256, 1_000), "ImageNet, one batch: 1 MB of logits", floor=2),
    StatsCase((256, 1_000), "ImageNet: the validation set", NO_GRAD, floor=2),
    StatsCase((128, 32_000), "Llama 2's vocabulary, as a trainer logs it", floor=3),
    StatsCase((128, 32_000), "half precision", FORWARD_BACKWARD, torch.bfloat16, floor=3),
]


@dataclass(frozen=True)
class SoftcapCase:
    """Logits (N, C) that are capped at 30, as those of Gemma 2, and a dtype; forward and backward."""

    shape: tuple[int, int]
    why: str
    dtype: torch.dtype = torch.float32
    floor: float | None = None

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {SHORT[self.dtype]} {FORWARD_BACKWARD}"


SOFTCAP: list[SoftcapCase] = [
    SoftcapCase((64, 10), "all overhead", floor=1.2),
    SoftcapCase((256, 1_000), "1 MB of logits", floor=2),
    SoftcapCase((32, 256_000), "Gemma's vocabulary", floor=3),
    SoftcapCase((32, 256_000), "Gemma's vocabulary, half precision", torch.bfloat16, floor=3),
]


@dataclass(frozen=True)
class DistributedCase:
    """Logits (N, C) whose classes are spread evenly over the ranks."""

    rows: int
    classes: int
    why: str
    floor: float = 8

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes} f32"


DISTRIBUTED: list[DistributedCase] = [
    DistributedCase(64, 1_000, "all overhead: the collective is the time", floor=0),
    DistributedCase(512, 32_000, "Llama 2's vocabulary"),
    DistributedCase(512, 128_256, "Llama 3's vocabulary"),
]
