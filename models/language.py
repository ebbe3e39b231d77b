"""Language models: any Hugging Face causal LM by name or folder, or one built from a config, and its tokenizer."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vlm.models.errors import ModelError


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or folder. Raises ModelError when there is none or it lacks an end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.language.tokenizer: no tokenizer at {name!r}: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.language.tokenizer: {name!r} has no end-of-text token, so answers could not end")
    return tokenizer


def load_language(name: str) -> PreTrainedModel:
    """A pretrained causal language model by hub name or folder, with sdpa attention."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.language: no causal language model at {name!r}: {reason}") from None


def build_language(config: Mapping[str, Any], vocabulary: int) -> PreTrainedModel:
    """A causal language model with random weights from a config such as ``{model_type: llama, hidden_size: 96}``.

    vocabulary: number of tokens of its tokenizer, used unless the config says ``vocab_size``.
    """
    options = dict(config)
    kind = options.pop("model_type", None)
    if kind is None:
        raise ModelError("model.language.config: model_type is missing; expected a Transformers type such as llama")
    try:
        built = AutoConfig.for_model(kind, **{"vocab_size": vocabulary, **options})
        return AutoModelForCausalLM.from_config(built, attn_implementation="sdpa")
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model.language.config: cannot build {kind!r}: {reason}") from None
