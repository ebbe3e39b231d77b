"""From chat turns to the batch of a pretrained model, through the checkpoint's own processor and chat template."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import AutoProcessor

from vlm.models.errors import ModelError
from vlm.models.program.layout import Side

# A conversation: (role, parts) for every turn; a part is text or an image.
Chat = Sequence[tuple[str, Sequence[str | Image.Image]]]


def load_processor(name: str | os.PathLike[str]) -> Any:
    """The processor of a folder or a hub name. Raises ModelError when there is none that takes images and text."""
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model: no processor at {str(name)!r}: {str(error).splitlines()[0]}") from None
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"model: the processor at {str(name)!r} takes no images; found {type(processor).__name__}")
    return processor


def process(processor: Any, chats: Sequence[Chat], *, side: Side = "left") -> Mapping[str, Any]:
    """The prompts of a batch of conversations as tensors, for ``PretrainedVlm.inputs``; an answer is to follow.

    With a chat template the checkpoint says how turns are written; without one their text follows as it stands, an
    image as the processor's placeholder. Raises ModelError when the processor refuses.
    """
    texts = [_written(processor, chat) for chat in chats]
    images = [[part for _, parts in chat for part in parts if not isinstance(part, str)] for chat in chats]
    begin = processor.tokenizer.bos_token
    has_begin = bool(begin) and texts[0].startswith(begin)  # a template may write what the tokenizer would add again
    options: dict[str, Any] = {"add_special_tokens": False} if has_begin else {}
    try:
        return processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side=side,
            return_tensors="pt",
            **options,
        )
    except (ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{type(processor).__name__}: cannot process these prompts: {reason}") from None


def _written(processor: Any, chat: Chat) -> str:
    if processor.chat_template is None:
        parts = [part if isinstance(part, str) else processor.image_token for _, parts in chat for part in parts]
        return " ".join(parts)
    messages = [
        {
            "role": role,
            "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts],
        }
        for role, parts in chat
    ]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
