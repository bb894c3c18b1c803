"""`custom_generate`: every method behind transformers' own ``generate``::

    model.generate(**inputs, custom_generate=specref.custom_generate,
                   specref_method="speculative", draft=small, gamma=4)

transformers prepares inputs, processors and criteria as ever and hands the
decoding over; what comes back has its types and its meaning.  Processors
are applied once, at every position with its true prefix; criteria see the
full ids after each token.  Positions and lengths count left padding the
way transformers counts it.

Does not handle (each refused in a sentence): beams and other searches,
right padding, embeddings or a filled cache as input, classifier-free
guidance and SynthID (their processors keep a state per call), attentions
and hidden states as output.  ``stop_strings`` fails in transformers 5
itself, which loses the tokenizer on the way to a callable: pass
``stopping_criteria=[StopStringCriteria(tokenizer, texts)]``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from specref.decode import rounds
from specref.draws import Draws, Seeded
from specref.hf_run import Run
from specref.tagged import Untagged


def custom_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    generation_config: Any = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    specref_method: str = "auto",
    draft: Any = None,
    gamma: int | None = None,
    seed: int | Draws | None = None,
    specref_options: dict[str, Any] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode with a method of the registry, called by ``model.generate``.

    Args:
        specref_method: a name of `specref.methods()`; ``auto`` is
            ``speculative`` with a draft and ``prompt_lookup`` without.
        draft: a transformers model, an `LM`, or a draft file, for methods
            that take one; ``assistant_model`` of ``generate`` means it too.
        gamma: draft length of methods that take one.
        seed: of all randomness, or a `Draws`; None draws a seed from
            torch's generator, so that ``transformers.set_seed`` governs it
            as it does sampling.
        specref_options: the method's other options.
    Returns:
        ``[B, n]`` ids, or a ``GenerateDecoderOnlyOutput`` with
        ``sequences``, ``scores`` and ``logits`` as asked; where a row had
        ended, ``scores`` and ``logits`` hold zeros.
    Raises:
        ValueError: what this page says is not handled, or a bad option.
    """
    from specref.lm.hf import HF

    given = _lost_arguments(inspect.currentframe())
    streamer = given.get("streamer") if streamer is None else streamer
    draft = given.get("assistant_model") if draft is None else draft
    _refuse(generation_config, synced_gpus, model_kwargs, logits_processor)
    lm = HF(model)
    options = dict(specref_options or {})
    options |= {} if draft is None else {"draft": draft}
    options |= {} if gamma is None else {"gamma": gamma}
    drafter, rule = _parts(lm, specref_method, options)
    prompts = unpad(input_ids, model_kwargs.get("attention_mask"))
    run = Run(lm, input_ids, prompts, generation_config)
    run.processors, run.criteria = list(logits_processor), stopping_criteria
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    draws = Seeded(seed) if isinstance(seed, int) else seed
    ask = run.request(draws)
    shown = Untagged(drafter, run.sampling(run.process_untagged))
    for one in rounds(run.target, shown, rule, ask):
        run.take(one, streamer)
    if streamer is not None:
        streamer.end()
    return run.result()


def _lost_arguments(frame: Any) -> dict[str, Any]:
    """``streamer`` and ``assistant_model`` as given to ``generate``.

    transformers 5 hands a callable the arguments of its signature that
    came as extra ones, and these two are named ones of ``generate``: they
    would be dropped without a word.
    """
    from transformers import GenerationMixin

    caller = frame.f_back
    code = inspect.unwrap(GenerationMixin.generate).__code__
    if caller is None or caller.f_code is not code:
        return {}
    return dict(caller.f_locals)


def _refuse(
    config: Any, synced: bool, kwargs: dict[str, Any], processors: Any
) -> None:
    """Raise for what would be ignored or wrong."""
    if config is None:
        raise ValueError(
            "custom_generate is called by model.generate: pass "
            "custom_generate=specref.custom_generate there"
        )
    mode = str(config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise ValueError(
            f"custom_generate decodes greedily or samples, got {mode}: unset "
            "what asks for it (num_beams, prompt_lookup_num_tokens, ...)"
        )
    wide = config.return_dict_in_generate
    for name in ("output_attentions", "output_hidden_states"):
        if wide and getattr(config, name, False):
            raise ValueError(
                f"{name} is not supported by custom_generate: leave it out"
            )
    if synced:
        raise ValueError("synced_gpus must be False for custom_generate")
    for process in processors:
        name = type(process).__name__
        if name in STATEFUL:
            raise ValueError(
                f"{STATEFUL[name]} is not supported by custom_generate: "
                f"{name} keeps a state that a tree of tokens would corrupt"
            )
    _refuse_inputs(kwargs)


STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
}
# Prepared by generate itself; the loop keeps its own.
PREPARED = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")
CACHES = ("cache", "past_key_values")


def _refuse_inputs(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in CACHES and value is not None and value.get_seq_length():
            raise ValueError(
                f"{name} must be empty or left out: custom_generate keeps "
                "its own"
            )
        known = name in (*PREPARED, *CACHES, "cache_position")
        if value is not None and not known:
            raise ValueError(
                f"{name} is not supported by custom_generate, which takes "
                "input_ids and attention_mask"
            )
    where, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if where is None:
        return
    steps = torch.ones_like(where) if mask is None else mask
    if bool(((steps.cumsum(-1) - 1 != where) & (steps != 0)).any()):
        raise ValueError(
            "position_ids must count each row's tokens from 0: leave it out"
        )


def _parts(lm: Any, name: str, options: dict[str, Any]) -> Any:
    from specref.api import default_method
    from specref.registry import method

    if name == "auto":
        name = "speculative" if "draft" in options else default_method(lm)
    return method(name).parts(lm, **options)


def unpad(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each row's tokens that the mask shows.

    Hidden tokens are seen by no one and take no position, whether they lie
    in front or, because transformers guesses masks from pad tokens, inside.

    Raises:
        ValueError: the last token of a row is hidden.
    """
    rows = input_ids.tolist()
    if mask is None:
        return rows
    out = []
    for b, (row, on) in enumerate(zip(rows, mask.tolist(), strict=True)):
        if not on[-1]:
            raise ValueError(
                f"attention_mask of row {b} hides its last token: pad on "
                "the left (padding_side='left' in the tokenizer)"
            )
        out.append([t for t, x in zip(row, on, strict=True) if x])
    return out
