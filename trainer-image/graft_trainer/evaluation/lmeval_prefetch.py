"""The part of prepare for lm-eval: load every task once. This checks the task and downloads its data.

train needs no network. It finds the data of the harness's tasks in the Hugging Face cache, which prepare and train
share. The harness reads the endpoint from the environment when it is imported, so the tasks are loaded in a separate
process.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

from graft.api.evaluation import Evaluation, Suite
from graft.contracts.progress import Reason, Termination

from graft_trainer.run.failures import Failure

log = logging.getLogger(__name__)


def prefetch(suites: list[Suite], folder: Path, hf_endpoint: str | None, hf_token: str | None) -> None:
    """Load the tasks of those suites that have one. `folder` contains the suites' files.

    Raises Failure for the first task that cannot be loaded: ConfigurationInvalid, DatasetInvalid or DatasetUnavailable.
    Raises Failure(InternalError) if the process ends without a result.
    """
    chosen = [suite for suite in suites if suite.lm_eval is not None]
    if not chosen:
        return
    environment = dict(os.environ)
    environment |= {"HF_ENDPOINT": hf_endpoint} if hf_endpoint else {}
    environment |= {"HF_TOKEN": hf_token} if hf_token else {}
    result = subprocess.run(
        [sys.executable, "-m", "graft_trainer.evaluation.lmeval_prefetch", str(folder)],
        input=Evaluation(suites=chosen).model_dump_json(by_alias=True, exclude_none=True),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        log.info("lm-eval: %s", ", ".join(f"{suite.name} ({suite.lm_eval.task})" for suite in chosen if suite.lm_eval))
        return
    try:
        failure = Termination.model_validate_json(result.stdout.strip().rpartition("\n")[2])
    except ValueError as error:
        raise Failure(
            Reason.INTERNAL_ERROR,
            f"The lm-eval tasks could not be loaded: the process ended with exit code {result.returncode}",
            "Read the container's log for the traceback.",
        ) from error
    raise Failure(failure.reason, failure.message, failure.remedy)


def main(folder: Path, given: str) -> int:
    """Load the tasks. If one fails, the last line of the output is the Failure as JSON, and the exit code is 1."""
    import graft.artifacts.hub  # noqa: F401 - bounds the answers that the harness reads of the hub

    from graft_trainer.evaluation.lmeval_tasks import load_task

    try:
        for suite in Evaluation.model_validate_json(given).suites or ():
            load_task(suite, folder)
    except Failure as failure:
        print(Termination(reason=failure.reason, message=failure.message, remedy=failure.remedy).json_text())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.stdin.read()))
