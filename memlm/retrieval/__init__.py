"""Top-k search over memory slots."""
