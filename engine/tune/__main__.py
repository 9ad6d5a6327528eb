"""`python -m engine.tune report SEARCH_FOLDER`, and `python -m engine.tune lr_range` or `micro_batch [overrides]`."""

from __future__ import annotations

import sys

from engine.config import entry
from engine.errors import LaunchError, nearest

COMMANDS = ("report", "lr_range", "micro_batch")


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 nothing to suggest, 2 refused, 130 interrupted."""
    return entry.run(lambda: _command(argv))


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m engine.tune COMMAND ...\ncommands: " + ", ".join(COMMANDS))
        print("a search is started by python -m engine.train -m OPTION=VALUE,VALUE")
        return 0
    if argv[0] == "report":
        from engine.tune import report

        return report.main(argv[1:])
    if argv[0] == "lr_range":
        from engine.tune import lr_range

        return lr_range.main(argv[1:])
    if argv[0] == "micro_batch":
        from engine.tune import micro_batch

        return micro_batch.main(argv[1:])
    raise LaunchError.of(589, "command", argv[0], "no such command", nearest(argv[0], COMMANDS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
