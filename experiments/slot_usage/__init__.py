"""Slot usage: which slots a memory really writes and reads, what they hold, and whether those it reads most matter."""

from experiments.slot_usage.experiment import run
from experiments.slot_usage.figures import plot
from experiments.slot_usage.settings import SlotUsage

__all__ = ["SlotUsage", "plot", "run"]
