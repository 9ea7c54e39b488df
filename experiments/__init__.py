"""Experiments: each file asks one question of a trained model and answers it beside its controls.

An experiment is a module with two functions: `run(model, data, cfg) -> Result`, which touches no files, loggers or
global random state, and `plot(result) -> Figure`. `memlm.evaluation.result` holds what they share: `Result`, the
intervals, the figure style and `emit`, the only place that writes.
"""
