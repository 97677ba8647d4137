"""The programs `graft` and `kubectl-graft`, which kubectl runs as `kubectl graft`."""

import sys
from pathlib import Path

from graft.cli.completion import proposals
from graft.cli.failure import CliFailure
from graft.cli.output import safe
from graft.cli.parser import parser

PLUGIN = "kubectl-graft"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return the exit code: 0, or 1 after a message on standard error."""
    program = "kubectl graft" if Path(sys.argv[0]).name == PLUGIN else "graft"
    known = parser(program)
    arguments = known.parse_args(argv)
    if arguments.command is None:
        known.print_help()
        return 0
    try:
        arguments.run(arguments)
    except CliFailure as failure:
        print(safe(f"{program}: {failure}\n{failure.remedy}"), file=sys.stderr)
        return 1
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "graft":
            raise
        print(
            f"{program}: the command needs the package {error.name}, which is not installed\n"
            "Install the command line with its packages, in a checkout of Graft: pip install '.[cli]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130  # as a shell reports SIGINT
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        sys.stderr.close()
        return 1
    return 0


def complete() -> None:
    """Print what kubectl's own completion proposes for `kubectl graft`: the program kubectl_complete-graft."""
    found, files = proposals(sys.argv[1:] or [""], parser())
    # The last line is a directive of cobra: 0 lets the shell complete names of files, 4 does not.
    print(*found, f":{0 if files else 4}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
