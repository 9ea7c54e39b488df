"""Train a language model with a memory, and show what the memory remembers."""

from memlm.app.train import start

if __name__ == "__main__":
    start()
