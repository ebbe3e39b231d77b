"""What is said about a scene, and the tokenizer that knows every word of it.

Prompts are those of POPE and CHAIR, so that benchmarks written for COCO ask a Scenes model in words it was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from vlm.data.benchmarks._shared.words import article
from vlm.data.scenes.classes import CLASSES
from vlm.data.scenes.world import Scene

FULL_PROMPT = "Please describe this image in detail."
BRIEF_PROMPT = "Please describe this image briefly."
QUESTION = "Is there {} in the image?"

CAPTIONS = 0.6
FULL_CAPTIONS = 0.7
QUESTIONS = 3  # to one picture
ANSWER_WEIGHT = 3.0  # the loss is per token: one word of answer would drown in captions of fifteen
YES = 0.5
SYNONYM = 0.1
BRIEF_MOST = 2

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE)
ROLE_WORDS = ("system", "user", "assistant", ":")  # plain-text chat templates write them between turns


@dataclass(frozen=True)
class Exchange:
    """One question and its answer."""

    prompt: str
    answer: str
    weight: float = 1.0  # of the answer's tokens in the loss


def mention(number: int, rng: np.random.Generator) -> str:
    """A class with its article, now and then under another name."""
    item = CLASSES[number]
    word = item.name
    if rng.random() < SYNONYM:
        word = item.synonyms[rng.integers(len(item.synonyms))]
    return f"{article(word)} {word}"


def caption(scene: Scene, rng: np.random.Generator, full: bool = True) -> Exchange:
    """All objects, or at most two, in random order: "i see a cup and a stop sign."."""
    order = rng.permutation([item.cls for item in scene.objects]).tolist()
    named = order if full else order[:BRIEF_MOST]
    words = " and ".join(mention(number, rng) for number in named)
    return Exchange(FULL_PROMPT if full else BRIEF_PROMPT, f"i see {words}.")


def questions(scene: Scene, rng: np.random.Generator, count: int = 1) -> tuple[Exchange, ...]:
    """Questions about different classes, each yes or no equally often.

    Negatives are uniform over the absent classes, so that few of them are hard. Every scene has three objects and
    three absent classes at least, enough for `count` up to three.
    """
    present = {item.cls for item in scene.objects}
    asked: list[int] = []
    exchanges = []
    for _ in range(count):
        answer = bool(rng.random() < YES)
        candidates = [n for n in range(len(CLASSES)) if (n in present) == answer and n not in asked]
        asked.append(candidates[rng.integers(len(candidates))])
        exchanges.append(Exchange(QUESTION.format(mention(asked[-1], rng)), "yes" if answer else "no", ANSWER_WEIGHT))
    return tuple(exchanges)


def chat(scene: Scene, rng: np.random.Generator) -> tuple[Exchange, ...]:
    """One training example in the proportions of the spec: a caption (full or brief), or questions one after another.

    Several questions to a picture, as visual question data are usually trained, because one yes or no for each
    picture teaches too little in a short run.
    """
    if rng.random() < CAPTIONS:
        return (caption(scene, rng, full=bool(rng.random() < FULL_CAPTIONS)),)
    return questions(scene, rng, QUESTIONS)


def synonyms_file() -> str:
    """The classes in CHAIR's vocabulary format: a line each, the class first, then its synonyms."""
    return "".join(", ".join((item.name, *item.synonyms)) + "\n" for item in CLASSES)


def vocabulary() -> list[str]:
    """Every token of the world, special ones first; the place in this list is the token id."""
    nouns = [word for item in CLASSES for word in (item.name, *item.synonyms)]
    articles = [article(noun) for noun in nouns]
    sentences = [FULL_PROMPT, BRIEF_PROMPT, QUESTION.format(""), "i see and.", "yes no", *articles, *nouns]
    words = [word for text in sentences for word, _ in _splitter().pre_tokenize_str(text.lower())]
    return list(dict.fromkeys([*SPECIAL, *ROLE_WORDS, *words]))


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])


def tokenizer() -> Tokenizer:
    """Word-level, lower-case, punctuation apart; decoding joins the words by blanks: "i see a cup ."."""
    ids = {word: number for number, word in enumerate(vocabulary())}
    built = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = _splitter()
    built.add_special_tokens(list(SPECIAL))
    return built


def save_tokenizer(folder: Path) -> None:
    """Write a folder that `PreTrainedTokenizerFast.from_pretrained` and `AutoTokenizer.from_pretrained` load."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "extra_special_tokens": {"image_token": IMAGE},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
