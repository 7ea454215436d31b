"""The pytest plugin: the `race` fixture, where runs are kept, what is compared, gated and shown.

`mbperf.plugin.hooks` is what pytest loads; `mbperf.measure` does the measuring.
"""
