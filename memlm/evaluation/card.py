"""The page of a model on the Hugging Face hub: what it is, how it is loaded, and what was measured, with controls."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import huggingface_hub

from memlm.checkpoint import Trust, describe
from memlm.evaluation.headline import headline, in_percent
from memlm.evaluation.result import Result
from memlm.evaluation.runs import find_runs
from memlm.evaluation.summary import summary
from memlm.models.base import LanguageModel

_PAGE = """\
---
{data}
---

# {name}

A language model with memory, trained with memlm {version}: {kind} with {memory}. It takes its text in segments of
{segment_len} tokens; what is older reaches it through its memory.

```python
import memlm
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{needs}`model.model` is the model with all that memlm offers, such as `store_experience` and `query_memory`.

| | |
|---|---|
{facts}

## Results

{results}
"""


def card_of(model: LanguageModel, run: str | os.PathLike[str], name: str, trust: Trust = None) -> str:
    """The text of a card.

    Args:
        model: The model.
        run: Directory of its run, or a checkpoint of one.
        name: What the model is to be called.
        trust: Packages of which checkpoints may name classes, as for `memlm.load`.

    Returns:
        Markdown with a head in YAML.

    Raises:
        ConfigError: If a result cannot be read, or claims a rate without its controls.
    """
    results, version = _results(run, trust), describe(model)["version"]
    settings = model.config["model"]
    base = None if model.base_folder is None else settings["path"]
    named = None if base is None or os.path.isdir(os.path.expanduser(base)) else base
    numbers = [
        huggingface_hub.EvalResult(
            task_type="text-generation",
            dataset_type=result.name,
            dataset_name=result.name,
            metric_type=number.metric,
            metric_name=number.label,
            metric_value=in_percent(number.value) if number.percent else number.value,
        )
        for result in results
        for number in headline(result)
        if math.isfinite(number.value)
    ]
    data = huggingface_hub.ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["memlm", "memory", *model.memory],
        base_model=named,
        eval_results=numbers or None,
    )
    n_parameter = sum(parameter.numel() for parameter in model.parameters())
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts: dict[str, Any] = {
        "Parameters": f"{n_parameter:,}" + ("" if base is None else f", of which {n_trained:,} were trained"),
        "Memory": ", ".join(f"`{part}`" for part in model.memory) or "none",
        "Layers with memory": ", ".join(map(str, model.memory_layers)),
        "Tokens per segment": model.segment_len,
    }
    if base is not None:
        facts["Base"] = f"{named or 'in the folder `base`'}, sha256 of its weights `{settings['sha256'][:12]}`"
    return _PAGE.format(
        data=data.to_yaml(),
        name=name,
        version=version,
        kind=str(settings["_target_"]).rpartition(".")[2],
        memory="no memory" if not model.memory else f"the memory {' and '.join(f'`{part}`' for part in model.memory)}",
        segment_len=model.segment_len,
        needs=f"The base has to be in the cache of the hub: `hf download {named}`. " if named else "",
        facts="\n".join(f"| {label} | {value} |" for label, value in facts.items()),
        results=_told(results),
    )


def _results(run: str | os.PathLike[str], trust: Trust) -> list[Result]:
    """What was measured of a run at its end."""
    path = Path(run)
    folder = path if path.is_dir() else path.absolute().parent.parent
    if not any(folder.glob("*/result.json")):
        return []
    found, _ = find_runs([folder], trust)
    return list(found[0].results.values())


def _told(results: list[Result]) -> str:
    text = summary(results)
    return f"Controls stand below what they are controls of.\n\n```text\n{text}\n```" if text else "None were measured."
