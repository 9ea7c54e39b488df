"""Search over memory slots: those that a query reads, and those that are alike."""
