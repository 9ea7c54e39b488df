"""Talk with a model and its memory: `python scripts/chat.py checkpoint=RUN`."""

from memlm.app.chat import start

if __name__ == "__main__":
    start()
