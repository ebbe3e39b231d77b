"""The command line: it parses, loads the recipe, calls the module that does the work, and says errors in one line.

One file per command, each with ``add(commands)``. Nothing heavy is imported before a command runs, so that help
and a typing mistake answer at once.

Exit codes: 0 done, 1 problems found (``vlm data check``), 2 a mistake in what was asked or given, 130 interrupted.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import vlm
from vlm.commands import calibrate, data, doctor, export, generate, kernels, methods, plan, run

COMMANDS = (run, plan, data, calibrate, generate, export, methods, kernels, doctor)

# By name, because importing them all would cost seconds; a class that was raised is imported already.
USER_ERRORS = {
    "vlm.recipe.errors.RecipeError",
    "vlm.data.errors.DataError",
    "vlm.models.errors.ModelError",
    "vlm.training.errors.TrainingError",
    "vlm.report.read.ReportError",
}


class Parser(argparse.ArgumentParser):
    """argparse with one line per error, and the nearest command to a mistyped one."""

    def error(self, message: str) -> NoReturn:
        from vlm.recipe.errors import nearest

        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", wrong[2])
            message = f"{wrong[1]} is no command of {self.prog}{nearest(wrong[1], known)} Known: {', '.join(known)}"
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    root = Parser(prog="vlm", description=vlm.__doc__.partition("\n")[0] if vlm.__doc__ else None)
    root.add_argument("--version", action="version", version=f"vlm {vlm.__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in COMMANDS:
        module.add(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` is without the program's name."""
    # Read when torch loads. Threads that spin while they wait cost a busy machine (loader and training on two cores)
    # several times what they save.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        arguments = _parse(parser(), argv)
        return arguments.call(arguments) or 0
    except ValueError as error:
        if not _is_user_error(error):
            raise
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        # The reader (`vlm plan ... | head`) has seen enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parse(root: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with overrides allowed after flags too, where argparse alone does not take them."""
    arguments, rest = root.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if hasattr(arguments, "overrides"):
        arguments.overrides += overrides
        rest = [word for word in rest if word not in overrides]
    if rest:
        root.error(f"{rest[0]} is no argument of vlm {arguments.command}; see vlm {arguments.command} --help")
    return arguments


def _is_user_error(error: ValueError) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in USER_ERRORS for kind in type(error).__mro__)
