"""lm-evaluation-harness, with the model ``memlm``: `memlm lm_eval --model memlm --model_args checkpoint=RUN ...`."""

from __future__ import annotations

import sys

from memlm import threads
from memlm.app.errors import mistakes_told
from memlm.config import ConfigError
from memlm.printed import one_line


def start() -> None:
    """What the command line runs."""
    with mistakes_told():
        threads.wait_passively()
        try:
            from lm_eval.__main__ import cli_evaluate

            from memlm.evaluation import harness  # noqa: F401  # which registers the model
        except ImportError as error:
            raise ConfigError(
                f"memlm lm_eval needs lm-evaluation-harness: pip install 'memlm[lm-eval]' ({one_line(error)})"
            ) from error
        threads.take()
        sys.argv[0] = "lm_eval"
        cli_evaluate()


if __name__ == "__main__":
    start()
