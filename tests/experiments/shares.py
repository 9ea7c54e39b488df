"""Several processes that measure together, played by threads that exchange their rows."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from memlm.evaluation.result import Result
from memlm.evaluation.share import Share


def check_shares(measure: Callable[[Share], Result], whole: Result, n: int = 2) -> None:
    """Assert that each of ``n`` processes finds what one does, although each measures items of its own."""
    barrier, board = threading.Barrier(n, timeout=60), [[] for _ in range(n)]
    own: list[int] = [0] * n

    class Played(Share):
        def join(self, rows: list[Any]) -> list[Any]:
            own[self.rank] += len(rows)
            board[self.rank] = copy.deepcopy(rows)
            barrier.wait()
            joined = [row for part in board for row in part]
            barrier.wait()
            return joined

    with ThreadPoolExecutor(n) as pool:
        results = list(pool.map(lambda rank: measure(Played(rank, n)), range(n)))
    assert all(0 < count < len(whole.rows) for count in own)
    for result in results:
        assert [row.keys() for row in result.rows] == [row.keys() for row in whole.rows]
        for found, expected in zip(result.rows, whole.rows, strict=True):
            for name, value in expected.items():
                assert found[name] == (_near(value) if isinstance(value, float) else value), name
        assert result.metrics == _near(dict(whole.metrics))
        assert result.metadata.keys() == whole.metadata.keys()


def _near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True)
