"""`graft compare JOB… | FILE…` shows runs side by side.

`graft examples JOB | FILE` shows what the loss covered. `graft verify VERSION` checks a published version against its
signature.
"""

import argparse
import json
import sys
from pathlib import Path

from graft.cli.failure import CliFailure
from graft.cli.table import as_text

PAGE = "report.html"
EPILOG = """examples:
  graft compare support-full support-lora support-qlora -n shop
  graft compare full/report.json lora/report.json -o comparison.html
  graft compare support-full support-lora --endpoint http://localhost:9000   # through a port-forward to the store
"""
VERIFY_EPILOG = """examples:
  graft verify support-1.0.0 -n shop --key 2026-11-25.pub
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(prog="graft", description="Fine-tune LLMs on Kubernetes.")
    commands = root.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="put the reports of several runs side by side",
        description="Put the reports of several runs side by side: memory, time, latency, size and score.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("runs", nargs="+", metavar="JOB|FILE", help="name of a FineTuneJob, or a report.json")
    _add_cluster(compare, "the jobs")
    compare.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"file for the page (default: {PAGE})")
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    compare.set_defaults(run=run_compare)
    examples = commands.add_parser(
        "examples",
        help="show training examples of a run, with the tokens that the loss covers",
        description="Show training examples of a run as the model read them. The loss covers what is between ⟦ and ⟧.",
    )
    examples.add_argument("job", metavar="JOB|FILE", help="name of a FineTuneJob that published, or a report.json")
    _add_cluster(examples, "the job")
    examples.set_defaults(run=run_examples)
    verify = commands.add_parser(
        "verify",
        help="check a published version against the operator's signature",
        description="Compare every byte of a published version with its manifest, and check the operator's signature of the manifest.",
        epilog=VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("version", metavar="VERSION", help="name of an Adapter, for example support-1.0.0")
    verify.add_argument(
        "-k", "--key", type=Path, action="append", required=True, metavar="FILE",
        help="a public key that you trust (PEM); the option may be repeated",
    )  # fmt: skip
    _add_cluster(verify, "the Adapter")
    verify.set_defaults(run=run_verify)
    return root


def _add_cluster(command: argparse.ArgumentParser, whose: str) -> None:
    """Add the options that say where the cluster and its object store are."""
    command.add_argument(
        "-n", "--namespace", help=f"namespace of {whose} (default: the one of the kubeconfig's context)"
    )
    command.add_argument("--context", help="context of the kubeconfig (default: the current one)")
    command.add_argument(
        "--endpoint", help="URL of the object store, if the URL in the Secret is reachable only inside the cluster"
    )


def run_verify(arguments: argparse.Namespace) -> None:
    """Verify the version and print what was verified."""
    from graft.cli.verification import verify_version

    print(verify_version(arguments.version, arguments.key, arguments.namespace, arguments.context, arguments.endpoint))


def run_examples(arguments: argparse.Namespace) -> None:
    """Print the examples of a report."""
    from graft.cli.reports import read_reports

    [report] = read_reports([arguments.job], arguments.namespace, arguments.context, arguments.endpoint)
    found = report.dataset.statistics.learned if report.dataset.statistics is not None else []
    if not found:
        raise CliFailure(
            f"the report of {arguments.job} shows no examples", "It was written by an older Graft. Run the job again."
        )
    print("\n\n".join(found))


def run_compare(arguments: argparse.Namespace) -> None:
    """Read the reports, write the page and print the matrix."""
    # Imported here: --help needs neither matplotlib nor a cluster.
    from graft.cli.reports import read_reports
    from graft.report.compare import compare as compare_reports
    from graft.report.comparison_page import SIGNATURE, as_json, render_comparison

    if len(arguments.runs) < 2:
        raise CliFailure("a comparison needs more than one run", "Name at least two jobs or report.json files.")
    reports = read_reports(arguments.runs, arguments.namespace, arguments.context, arguments.endpoint)
    comparison = compare_reports(reports)
    target: Path = arguments.output or Path(PAGE)
    if arguments.output is None and target.exists() and SIGNATURE not in target.read_text(errors="replace"):
        raise CliFailure(f"{PAGE} exists and is not a comparison", "It is not overwritten. Give another file with -o.")
    try:
        target.write_text(render_comparison(comparison), encoding="utf-8")
    except OSError as error:
        raise CliFailure(f"cannot write {target}: {error}", "Give another file with -o.") from error
    print(json.dumps(as_json(comparison), indent=1) if arguments.json else as_text(comparison))
    print(f"page: {target}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return the exit code: 0, or 1 after a message on standard error."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except CliFailure as failure:
        print(f"graft: {failure}\n{failure.remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
