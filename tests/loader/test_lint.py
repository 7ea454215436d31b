"""The known traps are found where they are, and nowhere else."""

import os
import subprocess
import sys

import subjects
import torch
from torch.utils.data import default_collate

from mbperf.loader.settings import Settings
from mbperf.loader.subject import Subject
from mbperf.loader.trial.lint import big_python_lists, digest, lint_subject, structure
from mbperf.loader.trial.time_loader import TrialInterrupted


def codes(dataset, **known):
    return {found["code"] for found in lint_subject(Subject(dataset, **known), Settings(batch_size=8))}


def test_a_clean_dataset_has_no_finding():
    assert codes(subjects.Base()) == set()
    assert codes(subjects.GlobalGenerator()) == set()


def test_a_generator_of_the_datasets_own_repeats_in_every_worker():
    assert codes(subjects.OwnGenerator()) == {"duplicate_random_streams"}


def test_iterable_datasets_that_every_worker_reads_whole():
    assert codes(subjects.Counting()) == {"unsharded_iteration"}
    assert codes(subjects.Sharded()) == set()


def test_lambdas_do_not_pickle():
    findings = lint_subject(Subject(subjects.Base(), collate_fn=lambda s: default_collate(s)), Settings())
    assert [found["code"] for found in findings] == ["unpicklable_parts"]
    assert "collate_fn" in findings[0]["words"]
    assert "3.14" in findings[0]["words"]
    assert codes(subjects.Unpicklable()) == {"unpicklable_parts"}


def test_big_python_lists_are_named_with_their_size():
    dataset = subjects.Base()
    dataset.paths = [f"/data/image-{index:09d}.jpg" for index in range(200_000)]
    words = big_python_lists(Subject(dataset), Settings())
    assert "dataset.paths holds about 200,000 Python objects" in words
    dataset.paths = torch.arange(200_000)
    assert big_python_lists(Subject(dataset), Settings()) is None
    nested = [{"ids": list(range(100))} for _ in range(2000)]
    assert "the dataset holds about 204,000" in big_python_lists(Subject(nested), Settings())


class Mixed(subjects.Base):
    """float32 then float64: torch's default_collate promotes in the main process and not in a worker."""

    def __getitem__(self, index):
        return torch.tensor([1e300 if index else 1.0], dtype=torch.float64 if index else torch.float32)


def test_collate_that_differs_in_a_worker():
    assert codes(Mixed()) == {"collate_disagreement"}


class RaisesEarly(subjects.Base):
    def access(self, index):
        if index == 3:
            raise ValueError("broken sample")


def test_a_check_that_breaks_hides_no_other():
    found = lint_subject(Subject(RaisesEarly(), collate_fn=lambda s: s), Settings(batch_size=8))
    assert [f["code"] for f in found] == ["unpicklable_parts", "collate_disagreement"]
    assert "could not be checked: ValueError: broken sample" in found[1]["words"]


def test_running_out_of_time_is_no_disagreement():
    def collate(samples):
        if torch.utils.data.get_worker_info() is not None:
            raise TrialInterrupted("no answer within 1 s")
        return len(samples)

    found = lint_subject(Subject(subjects.Base(), collate_fn=collate), Settings(batch_size=8))
    (told,) = [f["words"] for f in found if f["code"] == "collate_disagreement"]
    assert told.startswith("could not be checked")


def test_structures_are_of_values():
    assert structure(torch.ones(2)) == structure(torch.ones(2)) != structure(torch.zeros(2))


SAMPLES = (
    "[torch.arange(3), torch.arange(3).bfloat16(), torch.tensor(True), torch.arange(6).view(2, 3).t(),"
    " {'a': [1, 'x']}, (torch.zeros(1), 2), 'text', None]"
)


def test_a_digest_is_the_same_in_every_process():
    samples = eval(SAMPLES)
    ours = [digest(sample) for sample in samples]
    assert len(set(ours)) == len(ours)
    again = f"import torch, mbperf.loader.trial.lint as lint; print([lint.digest(s) for s in {SAMPLES}])"
    for seed in ("1", "2"):
        printed = subprocess.run([sys.executable, "-c", again], env=os.environ | {"PYTHONHASHSEED": seed},
                                 capture_output=True, text=True, check=True).stdout  # fmt: skip
        assert eval(printed) == ours
