"""The command line: commands, options and their texts. It imports nothing that a command needs."""

import argparse
import importlib
import textwrap
from collections.abc import Callable
from pathlib import Path

from graft import __version__
from graft.cli.completion import SHELLS
from graft.cli.output import OUTPUTS

PAGE = "report.html"
SYSTEM = "graft-system"
COMPARE = """examples:
  graft compare support-full support-lora support-qlora -n shop
  graft compare full/report.json lora/report.json --page comparison.html
"""
REPORT = """examples:
  graft report support-lora -n shop
  graft report support-lora -n shop --page support.html
  graft report report.json -o yaml
"""
VERIFY = """examples:
  graft verify support-1.0.0 -n shop
  graft verify support-1.0.0 -n shop --key 2026-11-25.pub
"""
PULL = """examples:
  graft pull support-1.0.0 -n shop
  graft pull support-1.0.0 -n shop --to models/support
"""
COMPLETION = """examples:
  source <(graft completion bash)          # bash, zsh
  graft completion fish | source           # fish
"""
Command = Callable[[argparse.Namespace], None]


def command(name: str) -> Command:
    """Return a command of graft.cli.commands, which is imported when it runs. So --help and completion need no package."""

    def run(arguments: argparse.Namespace) -> None:
        getattr(importlib.import_module("graft.cli.commands"), name)(arguments)

    return run


def parser(program: str = "graft") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(
        prog=program,
        description="Fine-tune LLMs on Kubernetes.",
        epilog="The commands use your kubeconfig. If a Service is reachable only inside the cluster, they forward a port to it.",
    )
    root.add_argument("--version", action="version", version=f"graft {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=textwrap.fill(description, 80),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    found = add("report", "show the report of a run", "Show the scores of a run, and save its page.", REPORT)
    found.add_argument("job", metavar="JOB|FILE", help="name of a FineTuneJob that published, or a report.json")
    found.add_argument("--page", type=Path, metavar="FILE", help="also save the page as this HTML file")
    _cluster(found, "the job")
    _output(found)
    found.set_defaults(run=command("run_report"))

    found = add(
        "compare",
        "put the reports of several runs side by side",
        "Put the reports of several runs side by side: memory, time, latency, size and score.",
        COMPARE,
    )
    found.add_argument("runs", nargs="+", metavar="JOB|FILE", help="name of a FineTuneJob, or a report.json")
    found.add_argument("--page", type=Path, metavar="FILE", help=f"file for the page (default: {PAGE})")
    _cluster(found, "the jobs")
    _output(found)
    found.set_defaults(run=command("run_compare"))

    found = add(
        "examples",
        "show training examples of a run, with the tokens that the loss covers",
        "Show training examples of a run as the model read them. The loss covers what is between ⟦ and ⟧.",
    )
    found.add_argument("job", metavar="JOB|FILE", help="name of a FineTuneJob that published, or a report.json")
    _cluster(found, "the job")
    found.set_defaults(run=command("run_examples"))

    found = add("logs", "print the log of a job's newest pod", "Print the log of a job's newest pod.")
    found.add_argument("job", metavar="JOB", help="name of a FineTuneJob")
    found.add_argument("-f", "--follow", action="store_true", help="print new lines until the container ends")
    found.add_argument("-c", "--container", help="container (default: the one that runs, or the one that failed)")
    found.add_argument(
        "-p", "--previous", action="store_true", help="print the log of the container before its restart"
    )
    _place(found, "the job")
    found.set_defaults(run=command("run_logs"))

    found = add(
        "restart",
        "start a failed job again from its newest checkpoint",
        "Raise spec.restarts of a job that has failed. The operator starts it again from its newest checkpoint.",
    )
    found.add_argument("job", metavar="JOB", help="name of a FineTuneJob that has failed")
    _place(found, "the job")
    _output(found)
    found.set_defaults(run=command("run_restart"))

    found = add(
        "pull",
        "download a published version and verify it",
        "Download a published version. The folder appears only if the operator's signature and the SHA-256 of every file are right.",
        PULL,
    )
    found.add_argument("version", metavar="VERSION", help="name of an Adapter, for example support-1.0.0")
    found.add_argument("--to", type=Path, metavar="FOLDER", help="new folder for the files (default: ./VERSION)")
    _trust(found)
    _cluster(found, "the Adapter")
    _output(found)
    found.set_defaults(run=command("run_pull"))

    found = add(
        "verify",
        "check a published version against the operator's signature",
        "Compare every byte of a published version with its manifest, and check the operator's signature of the manifest.",
        VERIFY,
    )
    found.add_argument("version", metavar="VERSION", help="name of an Adapter, for example support-1.0.0")
    _trust(found)
    _cluster(found, "the Adapter")
    _output(found)
    found.set_defaults(run=command("run_verify"))

    found = add(
        "completion",
        "print the completion script of a shell",
        "Print a script that completes commands, options and values.",
        COMPLETION,
    )
    found.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")
    found.set_defaults(run=command("run_completion"))
    return root


def _place(found: argparse.ArgumentParser, whose: str) -> None:
    """Add the options that say where an object of the cluster is."""
    found.add_argument("-n", "--namespace", help=f"namespace of {whose} (default: the one of the kubeconfig's context)")
    found.add_argument("--context", help="context of the kubeconfig (default: the current one)")


def _cluster(found: argparse.ArgumentParser, whose: str) -> None:
    """Add the options that say where the cluster and its object store are."""
    _place(found, whose)
    found.add_argument(
        "--endpoint", metavar="URL", help="URL of the object store (default: the one in the Secret graft-storage)"
    )


def _trust(found: argparse.ArgumentParser) -> None:
    """Add the options that say which public keys are trusted."""
    found.add_argument(
        "-k", "--key", type=Path, action="append", default=[], metavar="FILE",
        help="a public key that you trust (PEM); may be repeated (default: the keys that the operator publishes in the cluster)",
    )  # fmt: skip
    found.add_argument(
        "--operator-namespace", default=SYSTEM, metavar="NAME", help=f"namespace of the operator (default: {SYSTEM})"
    )


def _output(found: argparse.ArgumentParser) -> None:
    found.add_argument("-o", "--output", choices=OUTPUTS, default="text", help="form of the output (default: text)")
