"""What all commands do around their work: texts that were asked for, refusals, and the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from engine.config.load import HelpRequested
from engine.errors import EngineError

INTERRUPTED = 130
STOPPED = 75
"""Exit code of a run that has saved its state and stopped: EX_TEMPFAIL of sysexits.h, start it again."""


def run(work: Callable[[], int], *, usage: str = "", interrupted: str = "interrupted") -> int:
    """`work()`, with refusals on stderr; its exit code, that of a refusal (2), or 130 after Ctrl-C.

    Args:
        usage: printed above the help on options.
        interrupted: said after Ctrl-C.
    """
    try:
        return work()
    except HelpRequested as asked:
        print(f"{usage}\n{asked}" if usage else asked)
        return 0
    except EngineError as error:
        print(f"{type(error).__name__}:\n{error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough. Python would write what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
