"""``vlm methods``: everything that a recipe can name by ``use``, with its source."""

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    text = "list every method that a recipe can name, with its paper and how far it is verified"
    parser = commands.add_parser("methods", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="as JSON, with every option and its default")
    parser.set_defaults(call=_methods)


def _methods(arguments: argparse.Namespace) -> None:
    from vlm.create import FOLDERS, describe

    entries = [entry for kind in FOLDERS for entry in describe(kind)]
    if arguments.json:
        print(json.dumps(entries, indent=2, ensure_ascii=False))
    else:
        _print_table(entries)


def _print_table(entries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("kind", "name", "options", "source", "verified"):
        table.add_column(heading, no_wrap=heading in ("kind", "name"))  # what one looks for stays whole
    for entry in entries:
        options = ", ".join(name if option["required"] else f"[{name}]" for name, option in entry["options"].items())
        source = f"needs {entry['needs']}, not installed" if "needs" in entry else entry["source"]
        table.add_row(entry["kind"], entry["name"], _literal(options), _literal(source), _literal(entry["verified"]))
    Console().print(table)


def _literal(text: str) -> Any:
    """Text in which square brackets are no markup of rich's."""
    from rich.text import Text

    return Text(text)
