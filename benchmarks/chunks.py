"""Rules of matrix memories in chunks beside their token loops: one segment, forward and backward, without maps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.base import check_least, check_names, conditions, quartiles, surroundings, torch_threads
from memlm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from memlm.evaluation.result import Result

Rule = Callable[..., tuple["Tensor", "Tensor"]]

RULES = {
    # name: width of rates, width of decays; 0 for none, 1 for each head, 2 for each channel
    "linear": (0, 0),
    "gla": (0, 2),
    "delta": (1, 0),
    "gated": (1, 1),
    "kda": (1, 2),
    "gdn2": (2, 2),
    "mesa": (1, 1),
    "kalman": (1, 0),
}
"""What can be measured: rules of `memory=delta`, and the two forms of `memory=mesa`."""

N_STEP, RIDGE = 30, 1.0


def run(
    rules: list[str], n_row: list[int], n_token: int, n_head: int, d_head: int, rounds: int, threads: int, seed: int
) -> Result:
    """Seconds of both ways and their ratio; see the YAML.

    Returns:
        Metrics ``<rule>/<rows>/loop``, ``chunks`` (seconds) and ``ratio``; one row for each round.

    Raises:
        ConfigError: If a setting cannot work.
    """
    given = {"n_token": n_token, "n_head": n_head, "d_head": d_head, "rounds": rounds, "threads": threads}
    check_names(rules=rules, n_row=n_row)
    check_least({**given, "n_row": min(n_row)})
    if unknown := [name for name in rules if name not in RULES]:
        raise ConfigError(f"rules must be among {', '.join(RULES)}, got {', '.join(unknown)}.")
    import torch

    from memlm.evaluation.result import Result

    metadata = {"settings": given | {"rules": rules, "n_row": n_row, "seed": seed}, "threads": threads}
    metadata |= surroundings("cpu")
    clock = time.process_time if threads == 1 else time.perf_counter
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    with torch_threads(threads):
        for name in rules:
            for n in n_row:
                parts = _inputs(name, n, n_token, n_head, d_head, torch.Generator().manual_seed(seed))
                ways: dict[str, Rule] = {"loop": _loop, "chunks": _in_chunks}
                _check_same(name, ways, parts)
                times = [{way: _seconds(name, rule, parts, clock) for way, rule in ways.items()} for _ in range(rounds)]
                rows += [{"rule": name, "n_row": n, "round": i, **found} for i, found in enumerate(times)]
                for way in ways:
                    metrics |= quartiles(f"{name}/{n}/{way}", [found[way] for found in times])
                metrics |= quartiles(f"{name}/{n}/ratio", [found["loop"] / found["chunks"] for found in times])
    return Result("benchmark_chunks", metrics, tuple(rows), metadata)


def _inputs(name: str, n_row: int, n_token: int, n_head: int, d: int, draw: Any) -> dict[str, Tensor | None]:
    """Cells (B, T, H, d) as the maps of a memory make them, and a matrix (B, H, d, V)."""
    import torch
    from torch.nn import functional as F

    n_rate, n_decay = ((0, 1, d)[width] for width in RULES[name])
    shape = n_row, n_token, n_head
    q, k, v = (torch.randn(*shape, d, generator=draw) for _ in range(3))
    rate, write_rate = (torch.rand(*shape, n_rate, generator=draw) for _ in range(2))
    decay = -0.1 * torch.rand(*shape, n_decay, generator=draw)
    matrix = torch.randn(n_row, n_head, d, d, generator=draw)
    if name == "mesa":
        matrix = torch.cat([matrix, torch.eye(d).expand_as(matrix)], dim=-1)
    if name == "kalman":
        matrix = torch.cat([matrix, torch.eye(d).expand_as(matrix) / RIDGE], dim=-1)
    parts = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v, "matrix": matrix}
    parts |= {"rate": rate, "write_rate": rate if n_rate == 1 else write_rate} if n_rate else {}
    parts |= {"decay": decay} if n_decay else {}
    unique = {id(part): part.requires_grad_() for part in parts.values()}
    return {**dict.fromkeys(("rate", "write_rate", "decay")), **{key: unique[id(part)] for key, part in parts.items()}}


def _in_chunks(
    name: str, q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, rate: Any, write_rate: Any, decay: Any
) -> tuple[Tensor, Tensor]:
    """What each token finds once it has written, (B, T, H, V), and the matrix at the end."""
    import torch

    from memlm.memory.chunks import chunks_of
    from memlm.memory.matrix import cut
    from memlm.memory.mesa import Kalman, Sums

    rule: Any
    fading, query = None if decay is None else cut(decay, 1), cut(q, 1)
    if name == "kalman":
        k, v = rate.sqrt() * k, rate.sqrt() * v
        rule = Kalman(cut(k, 1), cut(torch.cat([v, torch.zeros_like(k)], dim=-1), 1), query)
    elif name == "mesa":
        added = cut(rate * torch.cat([v, k], dim=-1), 1)
        rule = Sums(chunks_of(cut(k, 1), added, None, fading), query, RIDGE, N_STEP)
    else:
        k = cut(k, 1)
        value, erase = (v, None) if rate is None else (write_rate * v, cut(rate, 1) * k)
        rule = chunks_of(k, cut(value, 1), erase, fading, query)
    before, written = [], []
    for chunk in rule.each():
        before.append(matrix)
        written.append(chunk.written(matrix))
        matrix = chunk.after(matrix, written[-1])
    found = rule.found(torch.stack(before), torch.stack(written))  # (c, B, H, L, V)
    return found.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : q.shape[1]], matrix


def _loop(
    name: str, q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, rate: Any, write_rate: Any, decay: Any
) -> tuple[Tensor, Tensor]:
    """The same token by token, all rows and heads at once."""
    import torch

    from memlm.memory.mesa import solve

    d, found = k.shape[-1], []
    value = v if rate is None or name in ("mesa", "kalman") else write_rate * v
    erase = None if rate is None else rate * k
    kept = None if decay is None else decay.exp()
    given: list[Any] = [q, k, value, rate, erase, kept]
    each: list[Any] = [None if part is None else part[..., None, :].unbind(dim=1) for part in given]
    queries, keys, values, rates, erasing, left = each  # (B, H, 1, d) of each token
    for t, (query, key, new) in enumerate(zip(queries, keys, values, strict=True)):
        if left is not None:
            matrix = left[t].mT * matrix
        if name == "kalman":
            known = key @ matrix
            gain = known[..., d:] / (known[..., d:] @ key.mT + 1 / rates[t])
            matrix = matrix + gain.mT @ (torch.cat([new, torch.zeros_like(key)], dim=-1) - known)
        elif name == "mesa":
            matrix = matrix + (rates[t] * key).mT @ torch.cat([new, key], dim=-1)
            query = solve(partial(_with_ridge, matrix[..., d:]), query, N_STEP)
        else:
            matrix = matrix + key.mT @ (new if erasing is None else new - erasing[t] @ matrix)
        found.append((query @ matrix[..., :d])[:, :, 0])
    return torch.stack(found, dim=1), matrix


def _with_ridge(keys: Tensor, x: Tensor) -> Tensor:
    """Rows ``x`` times the sum of keys with its ridge."""
    return x @ keys + RIDGE * x


def _check_same(name: str, ways: dict[str, Rule], parts: dict[str, Any]) -> None:
    """Check that both ways give the same, as a measurement of anything else would tell nothing."""
    first, second = (rule(name, **parts) for rule in ways.values())
    for one, other in zip(first, second, strict=True):
        error = ((one - other).abs().max() / one.abs().max()).item()
        if not error < 1e-3:
            raise ValueError(f"chunks and loop of {name!r} differ by {error:.3g} of what they give")


def _seconds(name: str, rule: Rule, parts: dict[str, Any], clock: Callable[[], float]) -> float:
    """Seconds of one segment, forward and backward."""
    for part in parts.values():
        if part is not None:
            part.grad = None
    gc.collect()
    begin = clock()
    found, matrix = rule(name, **parts)
    ((found * found).sum() + (matrix * matrix).sum()).backward()  # type: ignore[no-untyped-call]
    return clock() - begin


def report(result: Result) -> str:
    """The times and ratios, and the conditions, to print."""
    from memlm.evaluation.table import table

    settings = result.metadata["settings"]

    def of(key: str) -> list[str]:
        measured = result.metrics
        low, high = measured[f"{key}/ratio_low"], measured[f"{key}/ratio_high"]
        seconds = [f"{1000 * measured[f'{key}/{way}']:.1f} ms" for way in ("loop", "chunks")]
        return [*seconds, f"{measured[f'{key}/ratio']:.1f} ({low:.1f} to {high:.1f})"]

    lines = [[name, str(n), *of(f"{name}/{n}")] for name in settings["rules"] for n in settings["n_row"]]
    title = (
        f"one segment of {settings['n_token']} tokens, {settings['n_head']} heads of {settings['d_head']}, forward and "
        "backward; medians, the ratio with its quartiles"
    )
    heads = ["rule", "rows", "token loop", "chunks", "loop / chunks"]
    return "\n\n".join([table(heads, lines, title), "\n".join(conditions(result.metadata))])
