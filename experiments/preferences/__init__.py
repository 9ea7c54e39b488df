"""Preferences: does an adaptive memory learn what users like, ignore the rest, forget what is unused and adapt?"""

from experiments.preferences.experiment import run
from experiments.preferences.figures import plot
from experiments.preferences.settings import Preferences

__all__ = ["Preferences", "plot", "run"]
