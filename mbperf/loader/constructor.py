"""The arguments of the user's that a recommended call has to carry, as text: what no trial changed."""

from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler

from mbperf.loader.subject import Subject, own_arguments


def fixed_words(subject: Subject) -> list[str]:
    """Return the arguments as they stand in a call; what has no short spelling becomes `your_<name>`.

    >>> fixed_words(Subject(list(range(3)), drop_last=True))
    ['shuffle=True', 'drop_last=True']
    """
    loader = subject.template
    words = order_words(subject)
    if loader is not None:
        words += [f"{name}={spelled(name, value)}" for name, value in own_arguments(loader).items()]
        words += ["generator=your_generator"] if loader.generator is not None else []
        words += [f"timeout={loader.timeout!r}"] if loader.timeout else []
    kept = subject if loader is None else loader
    words += ["drop_last=True"] if kept.drop_last else []
    words += ["worker_init_fn=your_worker_init_fn"] if kept.worker_init_fn is not None else []
    return words


def order_words(subject: Subject) -> list[str]:
    """Return which argument decides the order of samples: none, shuffle, or a sampler of the user's."""
    if subject.iterable:
        return []
    if subject.template is None:
        return ["shuffle=True"] if subject.shuffled else []
    if subject.fixed_batches:
        return ["batch_sampler=your_batch_sampler"]
    sampler = subject.template.sampler
    if type(sampler) is SequentialSampler:
        return []
    return ["shuffle=True"] if is_plain_shuffle(sampler, subject.length()) else ["sampler=your_sampler"]


def is_plain_shuffle(sampler: Any, length: int | None) -> bool:
    """Tell whether shuffle=True would make this sampler: each sample once."""
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == length


def spelled(name: str, value: Any) -> str:
    """Return a value as a call would spell it."""
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"your_{name}"
