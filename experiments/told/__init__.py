"""Sentences told in one context, asked in other words answered from the records that memory finds."""

from experiments.told.experiment import Told, plot, run

__all__ = ["Told", "plot", "run"]
