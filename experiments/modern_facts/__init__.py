"""Modern facts: true sentences told once at inference, asked for in the same words and in others."""

from experiments.modern_facts.experiment import ModernFacts, run
from experiments.modern_facts.figures import plot

__all__ = ["ModernFacts", "plot", "run"]
