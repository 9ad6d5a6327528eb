"""`python -m engine.train [overrides]`, also under `torchrun -m`, `deepspeed --module` and `srun`."""

from __future__ import annotations

import os
import sys
import time
import traceback

from engine.config import batch, entry, launch_env, rules
from engine.config.load import HelpRequested, load
from engine.config.schema import Config
from engine.errors import EngineError, LaunchError
from engine.observe.log import is_main
from engine.plan import host
from engine.train import early

SILENT_WAIT_S = 5.0


def main(argv: list[str]) -> int:
    """Exit code: 0 trained, 1 failed, 2 refused (reasons are on stderr), 75 saved and stopped, 130 interrupted."""
    if {"-m", "--multirun"} & set(argv):
        from engine.tune import multirun

        return entry.run(lambda: multirun.main(argv))
    early.keep()
    try:
        cfg = load(argv)
        env = launch_env.read(os.environ)
        # Everything that needs no torch is checked before torch is imported.
        if env is not None:
            rules.require(cfg, env.world_size)
            host.require(cfg, env.world_size, env.local_world_size)
        from engine.train import local, session

        if session.is_finished(cfg):
            return 0
        if env is None:
            world_size = local.world_size(cfg)
            if batch.is_auto(cfg):
                from engine.tune import micro_batch

                argv = micro_batch.settled(cfg, argv, world_size)
                cfg = load(argv)
            rules.require(cfg, world_size)
            host.require(cfg, world_size, world_size)
            session.check_before_launch(cfg)
            if world_size > 1:
                return local.start_ranks(world_size, cfg, argv)
            env = local.alone()
        return _train(cfg, env)
    except HelpRequested as asked:
        print(asked)
    except EngineError as error:
        # A launch can be wrong for one rank alone, and a file missing on one host; the rest every rank finds alike.
        speaks = is_main() or "0" in (os.environ.get("LOCAL_RANK"), os.environ.get("SLURM_LOCALID"))
        if speaks or isinstance(error, LaunchError):
            print(f"{type(error).__name__}:\n{error}", file=sys.stderr)
        else:
            # A launcher kills the other ranks when the first one leaves: let it be one that speaks.
            time.sleep(SILENT_WAIT_S)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main():
            print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        # Leaving a process group that others still use can wait for them, and hide the reason: say it and go.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return 0


def _train(cfg: Config, env: launch_env.LaunchEnv) -> int:
    """This rank's part of the run."""
    from engine.train import exhausted, session
    from engine.train.loop import StopRequested

    try:
        session.run(cfg, env)
    except StopRequested as stop:
        if is_main():
            print(f"state saved after step {stop.step}; the same command with run.resume=true goes on", flush=True)
        return entry.STOPPED
    except Exception as error:
        refusal = exhausted.explained(error, cfg, env.rank, env.world_size)
        if refusal is None:
            raise
        raise refusal from error
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # The threads of gloo and NCCL can abort a process that takes the interpreter down around them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
