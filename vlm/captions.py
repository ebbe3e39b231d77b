"""An index of captioned pictures, for the mitigator ``ara``."""

from collections.abc import Callable
from pathlib import Path

import torch

from vlm.build import build_encoder, build_model, build_tokenizer, for_evaluation
from vlm.data.errors import DataError
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.program.retrieval import Captions, encoder_of, image_features
from vlm.recipe import Recipe
from vlm.training.weights import trained_weights

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def pairs_of(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder, at any depth, each with the text of the ``.txt`` file of its name, in order of their paths.

    Raises DataError for a folder without any, and for a picture without a caption.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise DataError(f"{folder}: expected pictures ({', '.join(PICTURES)}), found none")
    pairs = []
    for path in found:
        beside = path.with_suffix(".txt")
        caption = " ".join(beside.read_text(encoding="utf-8").split()) if beside.is_file() else ""
        if not caption:
            found_there = "an empty one" if beside.is_file() else "none"
            raise DataError(f"{path}: expected its caption in {beside.name}, found {found_there}")
        pairs.append((path, caption))
    return pairs


@torch.inference_mode()
def index_captions(recipe: Recipe, folder: Path, out: Path, tick: Callable[[int, int], None] = lambda *_: None) -> int:
    """Write the index ``out`` of a folder of captioned pictures, as the recipe's trained model sees them.

    Returns how many they are. Raises DataError for a folder that holds none, or a picture without a caption.
    """
    pairs = pairs_of(folder)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    trained_weights(recipe, model)
    model = for_evaluation(recipe, model)
    encoder = build_encoder(recipe, model, tokenizer)
    asker = Asker(model, tokenizer, encoder, lambda key: Path(key).read_bytes(), recipe.evaluate.batch)
    features = []
    for start in range(0, len(pairs), asker.batch):
        prompts = [Prompt(str(path), "What is this?", 1) for path, _ in pairs[start : start + asker.batch]]
        features.append(image_features(model, asker.inputs(prompts)).cpu())
        tick(min(start + asker.batch, len(pairs)), len(pairs))
    Captions(torch.cat(features), [caption for _, caption in pairs], encoder_of(model)).save(out)
    return len(pairs)
