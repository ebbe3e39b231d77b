"""Samples as people can judge them: one HTML page with images, messages, and tokens as the model gets them.

The page is self-contained and runs nothing: everything is escaped, and its policy allows inline styles and images only.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Protocol

from vlm.data.batch import Example
from vlm.data.chat import Template, TokenView
from vlm.data.schema import Message, Sample

_MIME = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp", "bmp": "bmp"}
_LINE_END = "\u21b5"
_STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#e4e7ec;--learn:#d3f2dc;--chip:#4757d6;--card:#fff;--page:#f6f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#344054;--learn:#1d5a37;--chip:#7480ee;
--card:#1b212c;--page:#12161e}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.4rem;margin:0}header p,.facts{color:var(--soft);margin:.2rem 0 1rem;font-size:.85rem}
article{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem 1.2rem;margin:1rem 0}
h2{font:600 .95rem ui-monospace,monospace;margin:0;overflow-wrap:anywhere}
figure{margin:0 .6rem .6rem 0;display:inline-block}figcaption{font-size:.75rem;color:var(--soft)}
img{height:9rem;max-width:100%;object-fit:contain;image-rendering:auto;border-radius:6px;border:1px solid var(--line)}
.turn{margin:.35rem 0;white-space:pre-wrap;overflow-wrap:anywhere}.turn b{color:var(--soft);font-weight:600}
.tokens{font:13px/2 ui-monospace,monospace;border-top:1px solid var(--line);margin-top:.8rem;padding-top:.6rem;
overflow-wrap:anywhere}
.tokens span{padding:.15em .1em;border-radius:4px;box-shadow:inset 0 0 0 1px var(--line);margin-right:2px;
white-space:pre-wrap}
.learn{background:var(--learn)}
.chip{background:var(--chip);color:#fff;border-radius:999px!important;padding:.15em .6em!important;margin-right:.3em}
"""


class Viewer(Protocol):
    """Who encoded the samples, and can say what each token is."""

    template: Template

    def view(self, example: Example) -> list[TokenView]: ...


def show(pairs: Iterable[tuple[Sample, Example]], encoder: Viewer, title: str = "Samples") -> str:
    """The page as a string. Each sample comes with its example after template, masking and cutting; of a preference
    pair both sequences are shown."""
    cards = [_card(sample, example, encoder) for sample, example in pairs]
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
    )
    intro = (
        f"<header><h1>{escape(title)}</h1><p>{len(cards)} samples, template {escape(encoder.template.name)}."
        ' <span class="learn">Green</span> tokens are supervised; hover for id and weight.</p></header>'
    )
    return f"{head}<title>{escape(title)}</title><style>{_STYLE}</style>{intro}{''.join(cards)}</html>\n"


def _card(sample: Sample, example: Example, encoder: Viewer) -> str:
    figures = "".join(_figure(ext, content, n) for n, (ext, content) in enumerate(_media(sample)))
    turns = "".join(_turn(message) for message in sample.messages)
    turns += "".join(_turn(message, "rejected") for message in sample.rejected)
    sequences = [example, *([example.rejected] if example.rejected else [])]
    tokens = "".join(
        f'<div class="tokens">{"".join(_token(view) for view in encoder.view(one))}</div>' for one in sequences
    )
    facts = [
        f"{len(example.tokens)} tokens",
        f"{sum(weight > 0 for weight in example.weights)} supervised",
        f"{example.image_count} images",
        *(f"{name} {value}" for name, value in (("source", sample.source), ("license", sample.license)) if value),
        *([f"tags {', '.join(sample.tags)}"] if sample.tags else []),
    ]
    line = escape(" \u00b7 ".join(facts))
    body = f"{figures}{turns}{tokens}"
    return f'<article><h2>{escape(sample.key)}</h2><p class="facts">{line}</p>{body}</article>'


def _media(sample: Sample) -> Sequence[tuple[str, bytes]]:
    return list(zip(sample.media_ext, sample.media, strict=True))


def _figure(extension: str, content: bytes, number: int) -> str:
    data = base64.b64encode(content).decode()
    source = f"data:image/{_MIME[extension]};base64,{data}"
    return f'<figure><img alt="image {number}" src="{source}"><figcaption>image {number}</figcaption></figure>'


def _turn(message: Message, role: str = "") -> str:
    parts = [
        escape(part.text) if part.type == "text" else f'<span class="chip">image {part.ref}</span>'
        for part in message.content
    ]
    return f'<div class="turn"><b>{escape(role or message.role)}</b> {"".join(parts)}</div>'


def _token(view: TokenView) -> str:
    kind = "chip" if view.is_image else "learn" if view.weight > 0 else "given"
    text = "image" if view.is_image else (view.text or view.name).replace("\n", f"{_LINE_END}\n")
    about = f"{view.name} · id {view.id} · weight {view.weight:g}"
    return f'<span class="{kind}" title="{escape(about)}">{escape(text)}</span>'
