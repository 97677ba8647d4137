"""graft compare JOB… | FILE…: the methods side by side. graft verify VERSION: a published version against its signature."""

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
    """The command line."""
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
    compare.add_argument("-n", "--namespace", help="of the jobs; that of the kubeconfig's context when absent")
    compare.add_argument("--context", help="the kubeconfig's context; its current one when absent")
    compare.add_argument(
        "--endpoint", help="URL of the object store, where the cluster's own is not reachable from here"
    )
    compare.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"where the page goes; {PAGE} when absent")
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    compare.set_defaults(run=run_compare)
    verify = commands.add_parser(
        "verify",
        help="check a published version against the operator's signature",
        description="Read every byte of a published version and compare it with its manifest, and that with the operator's signature.",
        epilog=VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("version", metavar="VERSION", help="name of an Adapter, for example support-1.0.0")
    verify.add_argument(
        "-k", "--key", type=Path, action="append", required=True, metavar="FILE",
        help="a public key that you trust (PEM); may be given several times",
    )  # fmt: skip
    verify.add_argument("-n", "--namespace", help="of the Adapter; that of the kubeconfig's context when absent")
    verify.add_argument("--context", help="the kubeconfig's context; its current one when absent")
    verify.add_argument(
        "--endpoint", help="URL of the object store, where the cluster's own is not reachable from here"
    )
    verify.set_defaults(run=run_verify)
    return root


def run_verify(arguments: argparse.Namespace) -> None:
    """Verify, and say what was verified."""
    from graft.cli.verification import verify_version

    print(verify_version(arguments.version, arguments.key, arguments.namespace, arguments.context, arguments.endpoint))


def run_compare(arguments: argparse.Namespace) -> None:
    """Read the reports, print the matrix, write the page."""
    # Imported here: --help needs neither matplotlib nor a cluster.
    from graft.cli.reports import read_reports
    from graft.report.compare import compare as compare_reports
    from graft.report.comparison_page import SIGNATURE, as_json, render_comparison

    if len(arguments.runs) < 2:
        raise CliFailure("one run cannot be compared", "Name at least two jobs or report.json files.")
    reports = read_reports(arguments.runs, arguments.namespace, arguments.context, arguments.endpoint)
    comparison = compare_reports(reports)
    target: Path = arguments.output or Path(PAGE)
    if arguments.output is None and target.exists() and SIGNATURE not in target.read_text(errors="replace"):
        raise CliFailure(f"{PAGE} is here and no comparison", "Give another file with -o; it is not overwritten.")
    try:
        target.write_text(render_comparison(comparison), encoding="utf-8")
    except OSError as error:
        raise CliFailure(f"{target} cannot be written: {error}", "Give another file with -o.") from error
    print(json.dumps(as_json(comparison), indent=1) if arguments.json else as_text(comparison))
    print(f"page: {target}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 1 after a message on standard error."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except CliFailure as failure:
        print(f"graft: {failure}\n{failure.remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
