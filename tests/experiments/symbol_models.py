"""Hand-made models of known memory, and small real ones, for experiments on documents of symbols."""

import functools
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from memlm.data.corpora.symbols import Symbols
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus
from memlm.memory.ltm import LongTermMemory
from memlm.memory.stm import ShortTermMemory
from memlm.models.lmcode import LMCode


def symbol_data(n_symbol, task):
    """What an experiment gets as data: the task on its vocabulary."""
    corpus = Symbols(n_symbol)
    (document,) = corpus.documents("train")
    tokenizer = train_tokenizer("word", [document], 10**6)
    tokens = np.array(tokenizer.encode(document), dtype=np.int32)
    train = TokenizedCorpus(tokens, np.array([0, len(tokens)]))
    return SimpleNamespace(tokenizer=tokenizer, train=train, task=task(tokenizer, train))


class Rows(list):
    """The state of some rows, which counts as 256 bytes each."""

    memory = (torch.zeros(1, 64),)


class Fake(nn.Module):
    """A model whose memory of a row is the list of all tokens of earlier segments; what it says is up to subclasses.

    A state holds for each row (memory, open text).
    """

    def __init__(self, n_vocab, segment_len, scope="sequence"):
        super().__init__()
        self.n_vocab, self.segment_len = n_vocab, segment_len
        self.memory = {"fake": [SimpleNamespace(scope=scope)]}
        self.told = []  # (memory, ids) of each call that writes

    def forward(self, ids, state=None, read=True, write=True, logits=True, donate=False, keep_state=True):
        state = self.init_state(len(ids)) if state is None else state
        assert len(state) == len(ids)
        assert not torch.is_grad_enabled()
        assert not self.training
        out = torch.zeros(*ids.shape, self.n_vocab) if logits else None
        new = []
        for i, (row, (memory, text)) in enumerate(zip(ids.tolist(), state, strict=True)):
            for t in range(len(row)) if logits else ():
                assert not text  # questions are asked in a fresh context
                out[i, t, self.next_token(row[: t + 1], memory if read else [])] = 5.0
            new.append((memory, text + row))
        if write:
            self.told.append((state, ids.clone()))
        return SimpleNamespace(logits=out, state=new if write and keep_state else None)

    def absorb(self, ids, state=None, donate=False):
        return self(ids, state, logits=False).state

    def next_token(self, text, memory):
        raise NotImplementedError

    def init_state(self, n_row):
        return Rows(([], []) for _ in range(n_row))

    def new_context(self, state, donate=False):
        return [(memory + text, []) for memory, text in state]

    def wipe(self, state):
        return [([], text) for _, text in state]


MEMORIES = {
    "none": {},
    "stm": {"stm": functools.partial(ShortTermMemory, n_slot=3, n_head=2, update_rate=0.5)},
    "ltm": {"ltm": functools.partial(LongTermMemory, n_slot=48, d_key=8, d_value=8, top_k=4, span=2)},
    "shared": {
        "ltm": functools.partial(LongTermMemory, n_slot=48, d_key=8, d_value=8, top_k=4, span=2, scope="shared")
    },
}


def real_model(n_vocab, memory, segment_len):
    """A small model with perturbed parameters, so that its memory matters."""
    torch.manual_seed(0)
    model = LMCode(n_vocab, MEMORIES[memory], n_layer=2, n_head=2, d_model=16, segment_len=segment_len, overlap=4)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model
