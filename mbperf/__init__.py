"""The loss and the batch of a mini-batch training loop at the speed of memory."""
