"""Which configurations to try, what their trials say, which one to recommend."""
