"""Of the processes of a pod, only the first tokenises the dataset."""

import logging
import os
import socket
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest
from graft.contracts.job import Pods
from graft.contracts.progress import Reason
from graft_trainer.data import pod_tokens
from graft_trainer.data.example import Example
from graft_trainer.data.pod_tokens import tokenise_in_pod
from graft_trainer.data.tokens import tokenise
from graft_trainer.processes import distributed
from graft_trainer.run.failures import Failure
from torch.distributed import HashStore
from worlds.trainer import make_tokenizer

EXAMPLES = {
    "train": [Example(n, prompt="q" * n, answer="a" * n) for n in range(1, 40)],
    "eval": [Example(n, text="t" * n) for n in range(2, 9)],
}


def process(local: int, port: int, folder: Path, answer: Connection) -> None:
    """Run the `local`-th process of a pod. Send the roles that it has tokenised itself and the tokens that it has."""
    logging.disable()
    own = {"GRAFT_RENDEZVOUS_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update(own | distributed.variables(Pods(processes_per_node=2), own, local))
    called = []

    def slowly(*given: Any, **options: Any) -> Any:
        called.append(options["role"])
        time.sleep(0.5)
        return tokenise(*given, **options)

    pod_tokens.tokenise = slowly  # type: ignore[assignment]
    distributed.join()
    found = [
        tokenise_in_pod(examples, make_tokenizer(None), 30, role=role, task="causal", folder=folder, skip=True)
        for role, examples in EXAMPLES.items()
    ]
    seen = [([(item.input_ids, item.labels) for item in one.examples], one.truncated) for one in found]
    answer.send((called, seen))
    distributed.total([1])  # no process ends before the other has read the tokens
    os._exit(0)


def test_the_first_process_tokenises_and_the_other_maps_its_file(tmp_path: Path) -> None:
    (tmp_path / "tokens-stale").write_bytes(b"left by an earlier attempt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["worlds.ranks"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11's fork server imports only from there
        ensure_running()
    answers, processes = [], []
    for local in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=process, args=(local, port, tmp_path, theirs), daemon=True))
        processes[-1].start()
        answers.append(ours)
    assert all(answer.poll(120) for answer in answers)
    (first, seen), (second, mapped) = (answer.recv() for answer in answers)
    assert (first, second) == (["train", "eval"], [])
    assert seen == mapped and [len(examples) for examples, _ in seen] == [29, 7]
    for one in processes:
        one.join(30)
    assert [one.exitcode for one in processes] == [0, 0]


def test_waiting_for_a_silent_first_process_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    group = distributed.Group()
    group.store = HashStore()
    monkeypatch.setattr(distributed, "_group", group)
    monkeypatch.setattr(distributed, "TOKENISING", 0.3)
    with pytest.raises(Failure, match="first process has not tokenised") as caught:
        distributed.from_pod()
    assert caught.value.reason == Reason.PEER_LOST


def test_the_tokenizers_threads_are_on_only_while_it_tokenises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def look(*given: Any, **options: Any) -> Any:
        seen.append(os.environ["TOKENIZERS_PARALLELISM"])
        return tokenise(*given, **options)

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(pod_tokens, "tokenise", look)
    tokenise_in_pod(EXAMPLES["eval"], make_tokenizer(None), 30, role="eval", task="causal", folder=tmp_path)
    assert (seen, os.environ["TOKENIZERS_PARALLELISM"]) == (["true"], "false")
    assert not list(tmp_path.iterdir()), "the file must be deleted with the examples"
