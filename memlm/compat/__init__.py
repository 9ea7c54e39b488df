"""The names of the projects that memlm grew from, for code that was written for them.

Thin adapters: each builds memlm's own models and memories and gives them the names and arguments of its source, so that
code runs with only its imports changed. What a source claims and the real thing does not do stands in the docstrings.
``docs/other_projects.md`` has a table of all names. New code is better off with memlm's own.
"""
