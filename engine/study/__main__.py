"""`python -m engine.study parity [options] [overrides]`."""

from __future__ import annotations

import sys

from engine.config import entry
from engine.errors import LaunchError, nearest
from engine.study import network, parity, timeline

STUDIES = {"parity": parity.main, "timeline": timeline.main, "network": network.main}


def main(argv: list[str]) -> int:
    """Exit code: 0 passed, 1 a study found a miss, 2 refused, 130 interrupted."""
    return entry.run(lambda: _study(argv))


def _study(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m engine.study STUDY [options] [overrides]\nstudies: " + ", ".join(STUDIES))
        return 0
    if argv[0] not in STUDIES:
        raise LaunchError.of(520, "study", argv[0], "no such study", nearest(argv[0], STUDIES))
    return STUDIES[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
