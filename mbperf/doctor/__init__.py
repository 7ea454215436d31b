"""`mbperf doctor`: what this machine and this installation offer, what is wrong, and what to do about it.

A folder of its own, because it has four subjects: findings about the software, the processor and the heap,
and their display. Nothing here needs torch, the extension or an extra to import: their absence is a finding.
"""
