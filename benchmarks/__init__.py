"""Benchmarks: each file measures the speed or the memory use of one thing, mostly beside a named peer.

A benchmark is a module with two functions: `run(**settings) -> Result`, with the settings of
`configs/benchmark/<name>.yaml`, and `report(result) -> str`, the text to print. `scripts/benchmark.py` finds them by
name. `benchmarks.base` holds what they share. What is slow to import is imported inside functions: mistakes are told
before, and a process whose memory is measured holds nothing that was not asked for.
"""
