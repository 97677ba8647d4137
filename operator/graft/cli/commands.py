"""What each command does: read, compute, print. The packages that only some commands need are imported in them."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graft.artifacts.store import S3Store
from graft.cli.failure import CliFailure
from graft.cli.output import safe, show
from graft.cli.reports import opened_store, read_reports

if TYPE_CHECKING:
    from graft.cli.cluster import Cluster

PAGE = "report.html"


def run_report(arguments: argparse.Namespace) -> None:
    """Print the scores of a run, and save its page."""
    from graft.cli.table import report_as_text

    [report] = read_reports([arguments.job], arguments.namespace, arguments.context, arguments.endpoint)
    if arguments.page is not None:
        from graft.report.job import render_job

        write_page(arguments.page, render_job(report))
    show(report.model_dump(mode="json", by_alias=True, exclude_none=True), report_as_text(report), arguments.output)


def run_compare(arguments: argparse.Namespace) -> None:
    """Read the reports, write the page and print the matrix."""
    from graft.cli.table import as_text
    from graft.report.compare import compare
    from graft.report.comparison_page import SIGNATURE, as_json, render_comparison

    if len(arguments.runs) < 2:
        raise CliFailure("a comparison needs more than one run", "Name at least two jobs or report.json files.")
    target: Path = arguments.page or Path(PAGE)
    if arguments.page is None and target.exists() and SIGNATURE not in target.read_text(errors="replace"):
        raise CliFailure(
            f"{PAGE} exists and is not a comparison", "It is not overwritten. Give another file with --page."
        )
    comparison = compare(read_reports(arguments.runs, arguments.namespace, arguments.context, arguments.endpoint))
    write_page(target, render_comparison(comparison))
    show(as_json(comparison), as_text(comparison), arguments.output)


def write_page(target: Path, page: str) -> None:
    """Write a page, and say where it is. Raises CliFailure."""
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CliFailure(f"cannot write {target}: {error}", "Give another file with --page.") from error
    print(f"page: {target}", file=sys.stderr)


def run_examples(arguments: argparse.Namespace) -> None:
    """Print the examples of a report."""
    [report] = read_reports([arguments.job], arguments.namespace, arguments.context, arguments.endpoint)
    found = report.dataset.statistics.learned if report.dataset.statistics is not None else []
    if not found:
        raise CliFailure(
            f"the report of {arguments.job} shows no examples", "It was written by an older Graft. Run the job again."
        )
    print(safe("\n\n".join(found)))


def run_logs(arguments: argparse.Namespace) -> None:
    """Print the log of a job."""
    from graft.cli.jobs import print_log

    cluster, namespace = open_cluster(arguments)
    print_log(
        cluster, namespace, arguments.job, arguments.container, follow=arguments.follow, previous=arguments.previous
    )


def run_restart(arguments: argparse.Namespace) -> None:
    """Restart a job."""
    from graft.cli.jobs import restart

    cluster, namespace = open_cluster(arguments)
    done = restart(cluster, namespace, arguments.job)
    show(
        done, f"the job {namespace}/{arguments.job} is restarted: spec.restarts is {done['restarts']}", arguments.output
    )


def run_pull(arguments: argparse.Namespace) -> None:
    """Download a version, and print what was verified."""
    from graft.cli.pull import pull

    with opened_version(arguments) as (store, namespace, adapter, version, trusted):
        done = pull(store, namespace, adapter, version, trusted, arguments.to or Path(arguments.version))
    show(done.wire(), done.text, arguments.output)


def run_verify(arguments: argparse.Namespace) -> None:
    """Verify a version, and print what was verified."""
    from graft.cli.verification import check

    with opened_version(arguments) as found:
        done = check(*found)
    show(done.wire(), done.text, arguments.output)


def run_completion(arguments: argparse.Namespace) -> None:
    """Print the completion script of a shell."""
    from graft.cli.completion import script
    from graft.cli.parser import parser

    print(script(arguments.shell, parser()), end="")


def open_cluster(arguments: argparse.Namespace) -> tuple["Cluster", str]:
    """Return the cluster and the namespace that a command names."""
    from graft.cli.cluster import Cluster

    cluster = Cluster(arguments.context)
    return cluster, arguments.namespace or cluster.namespace


@contextmanager
def opened_version(arguments: argparse.Namespace) -> Iterator[tuple[S3Store, str, str, str, dict[str, bytes]]]:
    """Open the store of a version. Yield the store, the namespace, adapter and version, and the trusted keys."""
    from graft.cli.verification import split_version, trusted_files

    adapter, version = split_version(arguments.version)
    trusted = trusted_files(arguments.key)
    cluster, namespace = open_cluster(arguments)
    if not trusted:
        trusted = cluster.trusted_keys(arguments.operator_namespace)
    with opened_store(cluster, namespace, arguments.endpoint) as store:
        yield store, namespace, adapter, version, trusted
