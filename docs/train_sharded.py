"""Train a small language model whose last layer is spread over two processes: python docs/train_sharded.py"""

import tempfile

import torch
from torch import distributed, multiprocessing, nn

from mbperf.distributed import vocab_parallel_linear_cross_entropy

WORDS, WIDTH, RANKS, STEPS = 50, 32, 2, 40


def sentences(count: int) -> torch.Tensor:
    """Words that count upwards in steps of 3 from a random start: the last word tells the next."""
    return (torch.randint(WORDS, (count, 1)) + 3 * torch.arange(9)) % WORDS


def train(rank: int, folder: str) -> None:
    """Take part as one rank."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)  # as torchrun does: the ranks share the cores
    torch.manual_seed(0)  # the same model, text and hidden states on every rank, but a share of the words
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    head = nn.Parameter(0.1 * torch.randn(WORDS, WIDTH).chunk(RANKS)[rank])
    optimiser = torch.optim.Adam([*model.parameters(), head], lr=0.02)
    for step in range(STEPS):
        words = sentences(32)
        hidden = model(words[:, :-1]).flatten(0, 1)
        loss = vocab_parallel_linear_cross_entropy(hidden, head, words[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in (0, STEPS - 1):
            print(f"rank {rank}, step {step}: loss {loss.item():.4f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(train, (folder,), RANKS)
