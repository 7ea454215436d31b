"""`mbperf doctor`: what this machine and this installation offer, what is wrong, and what to do about it.

A folder of its own, because it has three subjects: findings about the software, findings about the processor,
and their display. Nothing here needs torch, the extension or an extra to import: their absence is a finding.
"""
