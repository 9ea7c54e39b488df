"""Models of memlm in lm-evaluation-harness (the extra ``lm-eval``), under the name ``memlm``.

The harness has no place where a package could announce a model. So `memlm lm_eval` is its command with this module
imported; from Python, importing this module is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

import memlm
from memlm import checkpoint as checkpoints
from memlm.config import ConfigError, whole
from memlm.evaluation.scoring import Scorer
from memlm.models.pretrained import Pretrained
from memlm.models.sampling import Sampling

_MOST_NEW = 256  # tokens of an answer, where a task does not say
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@register_model("memlm")
class MemlmLM(TemplateLM):
    """A trained model, or a pretrained one with a memory that needs no training.

    Args:
        checkpoint: A run, a checkpoint or an export. Without, the model is built of ``settings``.
        base: As for `memlm.load`.
        local: As for `memlm.evaluation.scoring.Scorer`.
        read: As there.
        batch_size: Texts that are read side by side.
        max_batch_size: None, as nothing is detected.
        device: ``cpu``, ``cuda``, ...; None, or the harness's default ``cuda:0``, for the GPU if there is one.
        settings: As for `memlm.build`: ``model=pretrained``, ``model.path=DIR``, ``memory=camelot``, ...

    Raises:
        ConfigError: If neither or both say which model it is, an argument is none that can be, or as `memlm.load` and
            `memlm.build` do.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        base: str | None = None,
        local: int | None = None,
        read: bool = True,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if (checkpoint is None) == (not settings):
            raise ConfigError(
                "model_args must have checkpoint=RUN, or settings of a model such as model=pretrained,model.path=DIR,"
                f"memory=none; got {', '.join(settings) or 'neither'}{' and both' if checkpoint and settings else ''}"
            )
        if checkpoint is None and base is not None:
            raise ConfigError(
                "base says where the base of a checkpoint is: give checkpoint=RUN too, or model.path alone"
            )
        if local is not None:
            whole("local", local, least=1)
        if not isinstance(read, bool):
            raise ConfigError(f"read must be true or false, got {read!r}")
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise ConfigError(f"batch_size must be a whole number, got {batch_size}: nothing is detected here")
        if checkpoint is not None:
            model: Any = checkpoints.load(checkpoint, base=base)
        else:
            model = memlm.build(*(f"{name}={_plain(name, value)}" for name, value in settings.items())).eval()
            if not isinstance(model, Pretrained):
                raise ConfigError(
                    "a model that is not pretrained says nothing before it is trained: give checkpoint=RUN"
                )
        checkpoints.place(model, "auto" if device in (None, "cuda:0") else str(device))
        self.model, self.scorer = model, Scorer(model, int(batch_size), local, read)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return next(iter(self.model.ends), self.model.tokenizer.pad_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is read after, in models that begin none themselves."""
        return self.eot_token_id if self.model.start is None else self.model.start

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers apart."""
        return self.model.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; nothing is added, as the model itself begins it."""
        return self.model.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        begins = bool(self.model.begin)
        pairs = [
            ([] if begins and not words[0] and context == [self.prefix_token_id] else context, text)
            for words, context, text in requests
        ]
        scores = [(score.log_likelihood, score.greedy) for score in self.scorer.score(pairs)]
        for (words, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", words, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """How likely whole documents are; each is one text, of any length."""
        first = [] if self.model.begin else [self.prefix_token_id]
        pairs = [(first, self.tok_encode(request.args[0])) for request in requests]
        scores = [score.log_likelihood for score in self.scorer.score(pairs)]
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """How contexts go on, up to a string that ends them, which is left out."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for group in groups.values():
            given = requests[group[0]].args[1]
            told: dict[str, Any] = dict(normalize_gen_kwargs(given, _MOST_NEW))
            until, n_new = list(told.pop("until", None) or []), told.pop("max_gen_toks")
            if unknown := sorted(told.keys() - {*_SAMPLING, "do_sample"}):
                raise ConfigError(f"a task asks to generate with {unknown[0]}, which memlm does not know: leave it out")
            how = Sampling(
                max_new_tokens=n_new,
                eos_token_id=self.model.ends or None,
                stop_strings=until or None,
                **{"top_k": None, "top_p": None, "do_sample": False} | told,
            )
            contexts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group]
            for i, tokens in zip(group, self.scorer.generate(contexts, how), strict=True):
                tokens = [token for token in tokens if token not in self.model.ends]
                found[i] = postprocess_generated_text(self.model.tokenizer.decode(tokens), until, None)
                self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
        return found

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of the base's tokenizer, for what the harness keeps of a run."""
        return self.model.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat."""
        return self.model.chat(chat_history, add_generation_prompt)


def _plain(name: str, value: Any) -> Any:
    """A value of the harness's arguments as Hydra reads it; the harness takes the name ``none`` for no value."""
    if value is None:
        return "null" if "." in name else "none"
    return str(value).lower() if isinstance(value, bool) else value
