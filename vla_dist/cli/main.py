"""``vla-dist <verb>``: parse, build, run, print."""

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from vla_dist import __version__
from vla_dist.core.errors import VlaDistError

VERBS = {
    "run": "run a preset: collect, train, serve and evaluate, on this machine or a joined cluster",
    "plan": "what goes where on a cluster, how fast, for how much, and what will be the bottleneck",
    "cluster": "check a cluster file; become a node of a cluster",
    "serve": "serve the policies of a run to robots over gRPC",
    "promote": "a version to a share of the robots (canary), to all (stable), or into the shadow",
    "rollback": "end a canary, or take stable back to the version before",
    "channels": "what the channels point at, how the canary does, who moved what",
    "token": "bearer tokens with roles for robots, operators and admins",
    "evaluate": "success of a version of a run on unseen seeds",
    "inspect": "what a run holds: config, versions, replay",
    "attention": "what a model looked at in a recorded episode, as pictures and as a video",
    "replay": "what a replay holds and how it is doing; whether it is whole; to files and back",
    "collect": "a campaign: so many episodes of these tasks from these robots, to the data set",
    "robot": "one robot that records and uploads, with its driver",
    "fleet": "many simulated robots, each a process, with broken links and crashes on demand",
    "data": "episodes as data sets: list, show, view, export, import, validate",
    "models": "the policies that can be trained: sizes, parameters, what they need",
    "analyze": "what policies cost in memory, arithmetic and time, and whether they keep up with a robot",
    "tune": "search settings of a preset on the data of a run, with Ray Tune",
    "registry": "versions of policies: what they are, what differs, which may go",
    "doctor": "what this machine has and what is missing",
    "bench": "benchmarks, each against a peer or a limit in the same run",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exit status 0; 1 with one sentence on standard error; 2 for a wrong call; 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if words else 2)
    if words[0] in ("-V", "--version"):
        print(f"vla-dist {__version__}")
        return
    if words[0] not in VERBS:
        near = difflib.get_close_matches(words[0], VERBS, n=1)
        hint = f"did you mean 'vla-dist {near[0]}'? " if near else ""
        _fail(f"no verb {words[0]!r}; {hint}The verbs are {', '.join(VERBS)}.", status=2)
    # A polite kill ends things like Ctrl-C does, and Ctrl-C works even where a shell started us with it ignored (`&`).
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # Processes here are started, never forked: gRPC need not prepare for forks, nor complain at each that it cannot.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    try:
        # Each verb is imported by itself: a robot's or a newcomer's install may lack what another verb needs.
        verb = importlib.import_module(f"vla_dist.cli.{words[0]}")
        verb.main(words[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("vla_dist"):
            raise
        _fail(f"'vla-dist {words[0]}' needs the package {error.name!r}; pip install 'vla-dist[all]'")
    except VlaDistError as error:
        _fail(str(error))
    except BrokenPipeError as error:
        if _while_stopping(error):
            # Some pipe of what was being stopped, not the reader of our output.
            print("\nstopped", file=sys.stderr)
            sys.exit(130)
        # The reader of our output has gone, as with `| head`; nothing more can be said, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _while_stopping(error: BaseException | None) -> bool:
    """Whether it came up while Ctrl-C was dealt with."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(["usage: vla-dist <verb> [options]   (vla-dist <verb> --help explains one)", "", *lines])


def _fail(sentence: str, *, status: int = 1) -> None:
    print(f"vla-dist: {sentence}", file=sys.stderr)
    sys.exit(status)
