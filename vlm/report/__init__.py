"""The report of a run: a pure function from its folder to one self-contained HTML file.

``read`` reads the folder into ``records``, ``compare`` says what differs and whether measurably, ``findings`` puts it
in words, ``charts``, ``curves``, ``tables`` and ``pictures`` draw, ``page`` lays out, ``html`` escapes.
"""

from pathlib import Path

from vlm.report.page import page
from vlm.report.read import ReportError, read_run

__all__ = ["ReportError", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` in one move and return its path.

    The same folder gives the same bytes. Raises ReportError when the folder is none of a run or malformed; a report
    that is already there then stays as it is.
    """
    document = page(read_run(Path(run_dir)))
    target = Path(run_dir) / "report.html"
    partial = target.with_name("report.html.partial")
    partial.write_text(document, encoding="utf-8")
    return partial.replace(target)
