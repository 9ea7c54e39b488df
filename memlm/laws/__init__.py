"""The law book: what every memory keeps, as plain functions that raise AssertionError.

A law takes a builder, ``make(memory=None, **model_settings)`` (`builder`), which returns the same small model each time
it is called with the same settings: perturbed parameters (so that no gate or projection sits at a special value) in
eval mode. Each law starts from `filled`, a state in which memory holds several segments and evictions have happened;
law 0 proves that memory matters there, so that no other law holds vacuously.

`memlm check memory=NAME` puts a memory before all of them (`memlm.laws.judge`).
"""

from memlm.laws.bare import bare
from memlm.laws.builders import (
    MODEL,
    N_VOCAB,
    Make,
    Nodes,
    T,
    builder,
    builder_of,
    class_of,
    close,
    filled,
    host_of,
    logits,
    named_tensors,
    names,
    nodes_of,
    rounding,
    same_memory,
    settings_of,
    slow_scan,
    small,
    takes,
    text,
    windows_of,
    windows_of_documents,
)
from memlm.laws.causality import (
    alive,
    causal,
    chunk_invariant,
    closed_once,
    contexts,
    empty_segments,
    generates_as_parallel,
    isolated,
    ragged,
    schedules_agree,
)
from memlm.laws.described import described, has_slots
from memlm.laws.forgetting import Letters, forgets
from memlm.laws.judge import LAWS, Law, Verdict, judge
from memlm.laws.learning import every_parameter_learns, learn_recall, reach, recall_batch, recall_scores, useful
from memlm.laws.state import admits, bounded, given_away, inspectable, pure, resets, round_trip

__all__ = [
    "LAWS",
    "MODEL",
    "N_VOCAB",
    "Law",
    "Letters",
    "Make",
    "Nodes",
    "T",
    "Verdict",
    "admits",
    "alive",
    "bare",
    "bounded",
    "builder",
    "builder_of",
    "causal",
    "chunk_invariant",
    "class_of",
    "close",
    "closed_once",
    "contexts",
    "described",
    "empty_segments",
    "every_parameter_learns",
    "filled",
    "forgets",
    "generates_as_parallel",
    "given_away",
    "has_slots",
    "host_of",
    "inspectable",
    "isolated",
    "judge",
    "learn_recall",
    "logits",
    "named_tensors",
    "names",
    "nodes_of",
    "pure",
    "ragged",
    "reach",
    "recall_batch",
    "recall_scores",
    "resets",
    "round_trip",
    "rounding",
    "same_memory",
    "schedules_agree",
    "settings_of",
    "slow_scan",
    "small",
    "takes",
    "text",
    "useful",
    "windows_of",
    "windows_of_documents",
]
