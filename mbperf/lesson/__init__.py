"""fast.ai's lesson "03 minibatch training", step by step: the naive versions that mbperf is measured against.

`from mbperf.lesson import *` gives what the lesson exports, and the names of its steps. As at the
lesson's end, DataLoader, SequentialSampler and RandomSampler are torch's; the hand-written loaders keep names
of their own.
"""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from mbperf.lesson.data import get_data
from mbperf.lesson.loaders import (
    Dataset,
    Sampler,
    SamplingDataLoader,
    SlicingDataLoader,
    collate,
    get_dls,
)
from mbperf.lesson.losses import (
    accuracy,
    log_softmax,
    log_softmax_difference,
    log_softmax_ratio,
    log_softmax_stable,
    logsumexp,
    nll,
)
from mbperf.lesson.modules import (
    DummyModule,
    Model,
    Optimizer,
    RegisteredModel,
    SequentialModel,
    UnregisteredModel,
    get_layers,
    get_model,
)
from mbperf.lesson.training import (
    evaluate,
    fit,
    train_dataset,
    train_layers,
    train_loader,
    train_parameters,
    train_slices,
)
from mbperf.testing import test_near

__all__ = [
    "DataLoader",
    "Dataset",
    "DummyModule",
    "F",
    "Model",
    "Optimizer",
    "RandomSampler",
    "RegisteredModel",
    "Sampler",
    "SamplingDataLoader",
    "SequentialModel",
    "SequentialSampler",
    "SlicingDataLoader",
    "UnregisteredModel",
    "accuracy",
    "collate",
    "evaluate",
    "fit",
    "get_data",
    "get_dls",
    "get_layers",
    "get_model",
    "log_softmax",
    "log_softmax_difference",
    "log_softmax_ratio",
    "log_softmax_stable",
    "logsumexp",
    "nll",
    "nn",
    "optim",
    "test_near",
    "torch",
    "train_dataset",
    "train_layers",
    "train_loader",
    "train_parameters",
    "train_slices",
]
