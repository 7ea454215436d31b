"""From a finished search to words, tables, a picture, and live progress."""
