"""Analysis: what happens inside a memory and what it costs, as numbers and figures from plain data."""
