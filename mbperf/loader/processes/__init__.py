"""One process for each trial: start it, follow it, end it, say why it failed."""
