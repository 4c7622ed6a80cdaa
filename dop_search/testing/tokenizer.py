"""A tokenizer that spells every character, and chat templates: nothing is downloaded."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dop_search.testing.sizes import (
    IMAGE_TOKEN_ID,
    NUM_SPECIAL_TOKENS,
    PAD_TOKEN_ID,
    VIDEO_TOKEN_ID,
    VISION_END_TOKEN_ID,
    VISION_START_TOKEN_ID,
)

END_TOKEN = "</s>"
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def chatml(image: str, video: str) -> str:
    """A chat template with these placeholders in the place of images and videos."""
    return (
        "{% for m in messages %}[{{ m['role'] }}]\n{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'video' %}" + video + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )


def tiny_tokenizer(
    image: str,
    video: str = "<video>",
    start: str = "<img>",
    end: str = "</img>",
    more: Sequence[str] = (),
    **extra: str,
) -> Any:
    """One token per character, and the special tokens of the tiny models at their ids.

    Args:
        image, video, start, end: how the family writes its placeholder tokens.
        more: further special tokens, at the ids after the characters.
        extra: further names under which processors look a token up, e.g. ``context_image_token="<IMG_CONTEXT>"``.
    """
    special = {
        "<pad>": PAD_TOKEN_ID,
        image: IMAGE_TOKEN_ID,
        video: VIDEO_TOKEN_ID,
        start: VISION_START_TOKEN_ID,
        end: VISION_END_TOKEN_ID,
    }
    characters = string.ascii_letters + string.digits + "\n .,:;?!<>/-[]'()"
    vocabulary = {**special, END_TOKEN: NUM_SPECIAL_TOKENS, "<unk>": NUM_SPECIAL_TOKENS + 1}
    vocabulary |= {character: len(vocabulary) + index for index, character in enumerate(characters)}
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(more)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*special, END_TOKEN, *more)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token=END_TOKEN,
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": image, "video_token": video, **extra},
    )


def square(side: int) -> dict[str, int]:
    """The size of a square image, as image processors take it."""
    return {"height": side, "width": side}
