"""The commands of memlm."""
