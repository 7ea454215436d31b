"""Collate against default_collate on random nested samples, in the main process and through a real worker."""

import copy
import pickle
import warnings

import pytest
import torch
from batches import assert_same, batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from mbperf import collate

pytestmark = pytest.mark.filterwarnings("ignore")
FUZZ = settings().max_examples > 1000  # under `make fuzz`


def outcome(function, batch):
    """(result, None) or (None, class of the error)."""
    try:
        return function(batch), None
    except Exception as error:
        return None, type(error)


@pytest.mark.usefixtures("device")  # where the samples lie
@given(batches())
def test_fuzz_main_process(batch):
    theirs, refused = outcome(default_collate, copy.copy(batch))
    if refused:
        with pytest.raises(refused):
            collate(batch)
    else:
        assert_same(collate(batch), theirs)


class Batches(torch.utils.data.Dataset):
    """Every item is a whole batch; with batch_size=None the worker hands it to collate_fn."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i]


@settings(max_examples=300 if FUZZ else 20)
@given(st.lists(batches(), min_size=20, max_size=40))
def test_fuzz_worker(candidates):
    good, expected = [], []
    for batch in candidates:
        theirs, refused = outcome(default_collate, batch)
        # A result that no process can send (a mappingproxy) would keep the loader waiting forever.
        if not refused and outcome(pickle.dumps, theirs)[1] is None:
            good.append(batch)
            expected.append(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(Batches(good), batch_size=None, num_workers=1, collate_fn=collate)
        for ours, theirs in zip(loader, expected, strict=True):
            assert_same(ours, theirs)
