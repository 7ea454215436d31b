"""The code inside a trial's process: clocks, stages, costs, memory, known traps."""
