"""The container's command: python -m graft_trainer preflight | prepare | train | compose | import.

All failures of a run are handled here.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable

from graft.contracts.job import JobFile
from graft.contracts.progress import EXIT_CODES, Reason

from graft_trainer.processes import distributed
from graft_trainer.processes.launch import launch
from graft_trainer.run.failures import Interrupted, explain, write_termination
from graft_trainer.run.interruption import Interruption
from graft_trainer.run.run import Prepared, Run, open_run, open_store, read_job
from graft_trainer.run.settings import Settings, library_environment

log = logging.getLogger("graft_trainer")
# Seconds to upload the last progress.json.
INTERRUPTED_PATIENCE = 3.0  # if the run is interrupted or the store is unavailable
FAILED_PATIENCE = 10.0  # if the run fails for another reason
FINAL_PATIENCE = 60.0  # if the run succeeds


def main(arguments: list[str]) -> int:
    """Run one stage. Return the exit code."""
    if len(arguments) != 1 or arguments[0] not in {"preflight", "prepare", "train", "compose", "import"}:
        print("usage: python -m graft_trainer preflight|prepare|train|compose|import", file=sys.stderr)
        return 2
    command = arguments[0]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    settings = Settings.from_environment(os.environ)
    os.environ.update(library_environment(settings.work_dir, offline=command == "train"))
    interruption = Interruption()
    interruption.listen(lambda: give_up(settings))

    run: Run | None = None
    try:
        if command in {"compose", "import"}:
            without_bitsandbytes()
            from graft_trainer.versions.make_version import make_version

            make_version(settings)
            return 0
        job = read_job(settings.job_file)
        if command == "train" and "RANK" not in os.environ:
            if job.pods.processes_per_node > 1:
                return launch(job.pods, settings, interruption)
            os.environ.update(distributed.variables(job.pods, os.environ))
        run = open_run(
            settings,
            open_store(settings),
            job,
            write_now=command != "train",
            silent=command == "train" and not distributed.is_main(),
        )
        run.interruption = interruption
        opened = run
        distributed.listen(lambda error: fail(error, opened, settings))
        if not needs_bitsandbytes(job, settings):
            without_bitsandbytes()
        with run.cleanup:
            stage(command)(run)
        # The run is done, so SIGTERM must not fail it during the last upload.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        run.progress.close(FINAL_PATIENCE)
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        return fail(error, run, settings)
    return 0


def needs_bitsandbytes(job: JobFile, settings: Settings) -> bool:
    """Return whether the method, the optimizer or the weights of the base model need it."""
    if job.method.qlora is not None or job.training.optim == "adamw8bit":
        return True
    return settings.prepared_file.is_file() and Prepared.read(settings.prepared_file).quantized


def without_bitsandbytes() -> None:
    """Prevent the import of bitsandbytes. peft would import it, and it imports torch's compiler: a fifth of train's
    start."""
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def stage(command: str) -> Callable[[Run], None]:
    """Return the function of a stage. torch is imported only for train."""
    if command != "train":
        from graft_trainer import prepare

        return prepare.preflight if command == "preflight" else prepare.prepare_container
    from graft_trainer.pipeline import train_evaluate_publish

    return train_evaluate_publish


def fail(error: BaseException, run: Run | None, settings: Settings) -> int:
    """Report why the run failed, in the log, the termination message and progress.json. Return the exit code."""
    interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
    state = run.progress.state if run else None
    known, training = (state.training, state.stage == "Training") if state else (None, False)
    trained = state is not None and state.step > (state.resumed_from or 0)
    follows = distributed.follows()  # called for every failure, because it informs the other ranks
    error = Interrupted() if interrupted else error
    failure = explain(error, known, training=training, trained=trained, follows=follows)
    if interrupted:
        log.warning("interrupted")
    else:
        log.error("failed", exc_info=error)
    log.error("%s: %s", failure.reason, failure.message)
    log.error("what to do: %s", failure.remedy)
    write_termination(settings.termination_file, failure)
    if run is not None:
        if failure.reason == Reason.MEMORY_EXCEEDED:
            run.progress.update(training=(known or {}) | {"halvings": run.halvings})  # read by memory_halvings
        run.progress.stage("Failed", failure=failure)
        brief = interrupted or failure.reason == Reason.STORAGE_UNAVAILABLE
        run.progress.close(INTERRUPTED_PATIENCE if brief else FAILED_PATIENCE)
    return EXIT_CODES[failure.reason]


def give_up(settings: Settings) -> int:
    """Report a run that was interrupted but did not end in time. Return the exit code."""
    failure = explain(Interrupted())
    write_termination(settings.termination_file, failure)
    return EXIT_CODES[failure.reason]


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = main(sys.argv[1:])
    # Native threads of the libraries can block the interpreter's normal exit. All output is already written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
