"""Which of the prompts that a model folder states stands before queries, and which before passages."""

import logging

from bge_core import UserError
from bge_core.encoder.settings import EncoderSettings
from bge_core.runtime.flags import EncodingStage

logger = logging.getLogger(__name__)


def choose_prompts(
    model: str, stored: EncoderSettings, config: EncodingStage | None = None
) -> tuple[str | None, str | None]:
    """The prompts of queries and of passages: what a flag gives, else names, else those stored for them.

    A folder may state prompts under other names alone, as search_query or s2p_query. Which of them is meant is not
    guessed: one that is for another task makes vectors that look fine and rank worse.

    Args:
        model: its name, for messages.
        stored: what it states.
        config: the stage's flags; None: it has none for this model.

    Returns:
        Of queries and of passages; None: nothing is stated.

    Raises:
        UserError: prompts are stated and none for queries, and no flag chooses; a name that is not among them.
    """
    if config is None:
        _refuse_to_guess(model, stored, f"store one as query in {model}/config_sentence_transformers.json")
        return stored.query_prompt, stored.passage_prompt
    query = _flag(model, stored, "query", config.query_instruction_for_retrieval, config.query_prompt_name)
    passage = _flag(model, stored, "passage", config.passage_instruction_for_retrieval, config.passage_prompt_name)
    if query is None:
        remedy = (
            "choose with --query_prompt_name and --passage_prompt_name, or give --query_instruction_for_retrieval ''"
        )
        _refuse_to_guess(model, stored, remedy)
    elif config.query_prompt_name and passage is None and stored.passage_prompt is None:
        others = ", ".join(stored.other_prompts)
        logger.warning("%s: nothing stands before passages; --passage_prompt_name chooses one of %s", model, others)
    return stored.query_prompt if query is None else query, stored.passage_prompt if passage is None else passage


def _flag(model: str, stored: EncoderSettings, side: str, text: str | None, name: str | None) -> str | None:
    if name is None:
        return text
    if text is not None:
        raise UserError(f"--{side}_prompt_name {name!r}: cannot go with --{side}_instruction_for_retrieval: choose one")
    if name not in stored.prompts:
        known = f"it states {', '.join(stored.prompts)}" if stored.prompts else "it states none"
        raise UserError(f"--{side}_prompt_name {name!r}: {model} has no prompt of that name; {known}")
    return stored.prompts[name]


def _refuse_to_guess(model: str, stored: EncoderSettings, remedy: str) -> None:
    others = [name for name, text in stored.other_prompts.items() if text]
    if others and not stored.query_prompt and not stored.passage_prompt:
        default = f" (by default {stored.default_prompt_name})" if stored.default_prompt_name else ""
        raise UserError(f"{model}: states the prompts {', '.join(others)}{default}, and none as query: {remedy}")
