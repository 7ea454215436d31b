"""`mbperf bench --against REV`: the working tree and a revision in one run, their processes in lockstep.

Operators register under one name, so each tree lives in processes of its own. What a change of a kernel is
judged by: `mbperf.measure.lockstep` has the rounds and the statistics.
"""
