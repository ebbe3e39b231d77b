"""Try a trained model on one image."""

from pathlib import Path

from PIL import Image, ImageOps

from vlm.build import build_encoder, build_model, build_tokenizer, decoder_of, for_evaluation, program_of
from vlm.data.errors import DataError
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.program.attach import attach
from vlm.models.program.grounding import grounding_maps
from vlm.recipe import Recipe
from vlm.training.weights import trained_weights


def generate(
    recipe: Recipe,
    image: Path,
    prompt: str,
    max_new_tokens: int = 64,
    show: Path | None = None,
    phrase: str | None = None,
) -> str:
    """The answer of the run's trained model, under the recipe's own methods and ``evaluate.decode``.

    show: where to draw the picture with what ``phrase`` of the answer looks at (the whole answer by default). The
    passes that look are those of the bare model. Raises DataError for a phrase that the answer does not have.
    """
    if not image.is_file():
        raise DataError(f"{image}: expected an image file, found none")
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    trained_weights(recipe, model)
    model = for_evaluation(recipe, model)
    encoder = build_encoder(recipe, model, tokenizer)
    asker = Asker(model, tokenizer, encoder, lambda key: Path(key).read_bytes(), 1, decoder_of(recipe))
    asked = Prompt(str(image), prompt, max_new_tokens)
    with attach(model, program_of(recipe.own, model.facts)):
        answer = asker([asked], lambda count: None)[asked]
    if show is not None:
        _draw(show, image, asker, asked, answer, answer if phrase is None else phrase, recipe.model.image.resize)
    return answer


def _draw(show: Path, image: Path, asker: Asker, asked: Prompt, answer: str, phrase: str, resize: str) -> None:
    """Draw the picture, dimmed where the phrase does not look."""
    start = answer.find(phrase)
    if not phrase or start < 0:
        raise DataError(f"--phrase: expected words of the answer {answer!r}, found {phrase!r}")
    ids = asker.tokenizer.encode(answer, add_special_tokens=False)
    texts = [str(asker.tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]
    ends = [len(text) for text in texts]
    chosen = [n for n in range(len(ids)) if ends[n] < start + len(phrase) and ends[n + 1] > start]
    words = [texts[n + 1][ends[n] :] for n in range(len(ids))]
    heat = grounding_maps(asker.model, asker.inputs([asked]), ids, words, chosen)[0]
    picture = framed(Image.open(image).convert("RGB"), resize)
    light = (0.25 + 0.75 * heat / heat.max().clamp_min(1e-12)).float().cpu().numpy()
    mask = Image.fromarray((255 * light).astype("uint8")).resize(picture.size, Image.Resampling.BICUBIC)
    Image.composite(picture, Image.new("RGB", picture.size), mask).save(show, "PNG")


def framed(picture: Image.Image, resize: str) -> Image.Image:
    """The part of a picture that the encoder's square shows, in the picture's own resolution."""
    width, height = picture.size
    if resize == "crop":
        side = min(width, height)
        return ImageOps.fit(picture, (side, side))
    side = max(width, height)
    return ImageOps.pad(picture, (side, side)) if resize == "pad" else picture
