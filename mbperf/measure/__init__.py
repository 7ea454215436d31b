"""How mbperf measures: interleaved rounds, an A/A control and the memory limit as a contender.

A benchmark file builds `mbperf.measure.group.Group`s and hands them to the `race` fixture of
`mbperf.plugin.hooks`. See results/README.md for what a run leaves behind.
"""
