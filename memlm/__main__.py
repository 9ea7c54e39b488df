"""``python -m memlm COMMAND``, as the command ``memlm``."""

from memlm.app.console import main

if __name__ == "__main__":
    main()
