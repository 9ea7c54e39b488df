"""Memory mechanisms: one file each, all under the contract of `memlm.memory.contract`."""
