"""The decisions of the agent, tested without an engine, a store or a disk."""

from dataclasses import replace

import pytest
from graft.contracts.agent import Wanted, WantedAdapter, engine_name
from graft_server.agent.decisions.decide import (
    Delete,
    Discard,
    Download,
    Inspect,
    Load,
    Observed,
    OnDisk,
    Refuse,
    Unload,
    decide,
)
from graft_server.agent.decisions.memory import Failures, Idleness, Readiness
from graft_server.agent.decisions.reasons import AdapterReason
from graft_server.agent.decisions.room import Capacity
from graft_server.agent.engine.client import active_adapters, error_message
from graft_server.agent.report.residency import resident_adapters
from graft_server.agent.storage.adapterconfig import ConfigRejected, reduced_config

DIR = "/adapters"


def adapter(name: str, digit: str = "a") -> WantedAdapter:
    sha = "sha256:" + digit * 64
    return WantedAdapter(
        engine_name=engine_name("team", f"{name}-1.0.0", sha), adapter=f"{name}-1.0.0", uri="s3://b/k/", digest=sha
    )


A, B = adapter("a"), adapter("b", "b")


def wanted(*adapters: WantedAdapter) -> Wanted:
    return Wanted(base_model="base", max_lora_rank=16, adapters=list(adapters))


def at(one: WantedAdapter) -> dict[str, str]:
    return {one.engine_name: f"{DIR}/{one.engine_name}"}


def on(one: WantedAdapter, size: int = 0, used_at: float = 0) -> dict[str, OnDisk]:
    return {one.engine_name: OnDisk(one.digest, size, used_at)}


def sizes(*adapters: WantedAdapter, size: int = 10) -> dict[str, int]:
    return {one.engine_name: size for one in adapters}


@pytest.mark.parametrize(
    ("want", "seen", "actions"),
    [
        ([], Observed({}, {}), []),
        ([A], Observed({}, {}), [Inspect(A)]),
        ([A], Observed({}, {}, sizes=sizes(A)), [Download(A)]),
        ([A], Observed({}, None, sizes=sizes(A)), [Download(A)]),  # download while the engine still loads its model
        ([A], Observed(on(A), None), []),
        ([A], Observed(on(A), {}), [Load(A)]),
        ([A], Observed(on(A), at(A)), []),
        ([A], Observed({}, at(A), sizes=sizes(A)), [Download(A)]),  # after an eviction, the engine needs the files
        ([A], Observed({A.engine_name: OnDisk("sha256:other")}, {}, sizes=sizes(A)), [Download(A)]),
        ([A], Observed(on(A), {A.engine_name: "/elsewhere"}), [Unload(A.engine_name)]),
        ([A], Observed({}, {A.engine_name: "/elsewhere"}), [Unload(A.engine_name)]),
        ([A, B], Observed({}, {}, held_back=[A.engine_name], sizes=sizes(A, B)), [Download(B)]),
        ([A, B], Observed({}, {}, busy=[A.engine_name], sizes=sizes(A, B)), [Download(B)]),
        ([A, B], Observed({}, {}, sizes=sizes(B)), [Inspect(A), Download(B)]),  # there is enough room for both
        ([], Observed(on(A), at(A)), []),  # draining
        ([], Observed(on(A), at(A), drained=[A.engine_name]), [Unload(A.engine_name)]),
        ([], Observed(on(A), at(A), drained=[A.engine_name], busy=[A.engine_name]), []),
        ([], Observed(on(A), {}), []),  # kept for a quick rollback
        ([], Observed(on(A, 10), {}, capacity=Capacity(9, 9)), [Delete(A.engine_name)]),
        ([], Observed(on(A, 10), at(A), capacity=Capacity(9, 9)), []),  # the engine may read the files again
        ([], Observed(on(A, 10), None, capacity=Capacity(9, 9)), []),  # the engine may still read the files
        ([A], Observed(on(B, 10), {}, sizes=sizes(A), capacity=Capacity(15, 15)), [Delete(B.engine_name)]),
        ([A], Observed(on(B, 10), None, sizes=sizes(A), capacity=Capacity(15, 15)), []),  # wait: B may be deleted later
        ([A], Observed(on(B, 10), at(B), sizes=sizes(A), capacity=Capacity(15, 15)), []),  # wait until B has drained
        ([], Observed({}, {}, partial=[A.engine_name]), [Discard(A.engine_name)]),
        ([A], Observed({}, {}, partial=[A.engine_name], sizes=sizes(A)), [Download(A)]),
        ([A], Observed(on(A), at(A), partial=[A.engine_name]), [Discard(A.engine_name)]),
        ([], Observed({}, {"base": "/models/base", "someone-elses": "/x"}, drained=["someone-elses"]), []),
    ],
)
def test_decisions_for_wanted_adapters(want: list[WantedAdapter], seen: Observed, actions: list[object]) -> None:
    assert decide(wanted(*want), seen, DIR) == actions


@pytest.mark.parametrize(
    ("want", "seen", "actions"),
    [
        ([], Observed({}, {}), [Inspect(B, expected=True)]),
        ([], Observed({}, None), [Inspect(B, expected=True)]),
        ([], Observed({}, {}, sizes=sizes(B)), [Download(B)]),
        ([], Observed({}, {}, sizes=sizes(B), partial=[B.engine_name]), [Download(B)]),
        ([], Observed({}, {}, busy=[B.engine_name]), []),
        ([], Observed({}, {}, held_back=[B.engine_name], partial=[B.engine_name]), []),
        ([], Observed(on(B), {}), []),  # an expected adapter is not loaded
        ([A], Observed({}, {}, sizes=sizes(B)), [Inspect(A)]),  # wanted adapters come first
        ([A], Observed(on(A), {}, sizes=sizes(B)), [Load(A), Download(B)]),
        # An expected adapter that does not fit is skipped without a failure.
        (
            [A],
            Observed(on(A, 10), at(A), sizes=sizes(B), capacity=Capacity(19, 30)),
            [],
        ),
        # The agent would delete B again at once.
        ([A], Observed(on(A, 10), at(A), sizes=sizes(B), capacity=Capacity(30, 19)), []),
        # Nothing is deleted to make room for an expected adapter.
        ([], Observed(on(A, 10), {}, sizes=sizes(B), capacity=Capacity(15, 15)), []),
        ([A], Observed(on(B, 10), {}, sizes=sizes(A), capacity=Capacity(15, 15)), [Delete(B.engine_name)]),
        ([A, B], Observed({**on(A), **on(B)}, at(A)), [Load(B)]),
        # A missing wanted adapter stops the download of an expected one, and gets its room after the files are deleted.
        ([A], Observed({}, {}, sizes=sizes(A, B), partial=[B.engine_name]), [Download(A), Discard(B.engine_name)]),
        (
            [A],
            Observed({}, {}, sizes=sizes(A, B), partial=[B.engine_name], capacity=Capacity(15, 15)),
            [Discard(B.engine_name)],
        ),
        ([A], Observed({}, {}, sizes=sizes(A, B), busy=[B.engine_name], capacity=Capacity(15, 15)), []),
        # An expected adapter does not wait for a wanted one that has failed.
        ([A], Observed({}, {}, sizes=sizes(B), failed=[A.engine_name], held_back=[A.engine_name]), [Download(B)]),
    ],
)
def test_expected_adapters_are_downloaded_but_not_loaded(
    want: list[WantedAdapter], seen: Observed, actions: list[object]
) -> None:
    assert decide(wanted(*want).model_copy(update={"expected": [B]}), seen, DIR) == actions


def test_expected_adapters_are_downloaded_one_at_a_time_and_partial_files_count() -> None:
    c = adapter("c", "c")
    want = wanted(A).model_copy(update={"expected": [B, c]})

    def actions(**seen: object) -> list[object]:
        picture = Observed(on(A, 10), at(A), sizes=sizes(B, c), capacity=Capacity(25, 25))
        return list(decide(want, replace(picture, **seen), DIR))  # type: ignore[arg-type]

    assert actions() == [Download(B)]
    assert actions(busy=[B.engine_name], partial=[B.engine_name]) == []
    assert actions(held_back=[B.engine_name], partial=[B.engine_name]) == [], "its partial download takes the room"
    assert actions(held_back=[B.engine_name]) == [Download(c)]
    assert actions(sizes={}) == [Inspect(B, expected=True)]


def names(actions: list[object], kind: type) -> list[str]:
    return [action.name for action in actions if isinstance(action, kind)]  # type: ignore[attr-defined]


def test_only_the_last_adapters_are_refused_if_the_disk_is_too_small() -> None:
    c = adapter("c", "c")
    gib = 1 << 30
    seen = Observed(on(A, gib), at(A), sizes=sizes(B, c, size=gib), capacity=Capacity(5 * gib // 2, 0))
    actions = decide(wanted(A, B, c), seen, DIR)
    assert names(actions, Download) == [B.engine_name] and names(actions, Refuse) == [c.engine_name]
    refusal = next(action for action in actions if isinstance(action, Refuse))
    assert refusal.message.startswith("it needs 1.00 GiB, but only 0.50 GiB of 2.50 GiB are left for it: attach fewer")


def test_no_adapter_takes_the_room_of_an_earlier_one() -> None:
    seen = Observed({}, {}, sizes=sizes(B), capacity=Capacity(15, 15))
    assert decide(wanted(A, B), seen, DIR) == [Inspect(A)]  # A comes first and may need the room
    failed = Observed(
        {}, {}, sizes=sizes(B), capacity=Capacity(15, 15), failed=[A.engine_name], held_back=[A.engine_name]
    )
    assert decide(wanted(A, B), failed, DIR) == [Download(B)]  # B does not wait for A, because A has failed


def test_kept_versions_are_deleted_least_recently_used_first() -> None:
    old, older, loaded_one = adapter("old", "1"), adapter("older", "2"), adapter("loaded", "3")
    there = {**on(old, 10, used_at=200), **on(older, 10, used_at=100), **on(loaded_one, 10, used_at=1)}
    room = Observed(there, at(loaded_one), sizes=sizes(A), capacity=Capacity(35, 35))
    assert decide(wanted(A), room, DIR) == [Delete(older.engine_name)]  # first make room, then download
    then = Observed({**on(old, 10), **on(loaded_one, 10)}, at(loaded_one), sizes=sizes(A), capacity=Capacity(35, 35))
    assert decide(wanted(A), then, DIR) == [Download(A)]
    assert decide(wanted(old), then, DIR) == [Load(old)]  # a rollback needs no download


def test_versions_are_deleted_one_at_a_time() -> None:
    going, kept = adapter("going", "1"), adapter("kept", "2")
    seen = Observed(
        {**on(going, 10), **on(kept, 10)}, {}, busy=[going.engine_name], sizes=sizes(A), capacity=Capacity(25, 25)
    )
    assert decide(wanted(A), replace(seen, deleting=True), DIR) == []
    assert decide(wanted(A), replace(seen, busy=()), DIR) == [Delete(going.engine_name)]


def test_nothing_is_deleted_for_an_adapter_that_still_would_not_fit() -> None:
    kept = adapter("kept", "1")
    seen = Observed(on(kept, 10), {}, sizes=sizes(A, size=50), capacity=Capacity(40, 40))
    actions = decide(wanted(A), seen, DIR)
    assert names(actions, Refuse) == [A.engine_name] and names(actions, Delete) == []


def test_a_running_download_counts_with_its_full_size() -> None:
    seen = Observed({}, {}, busy=[A.engine_name], sizes=sizes(A, B), capacity=Capacity(15, 15))
    assert names(decide(wanted(A, B), seen, DIR), Refuse) == [B.engine_name]


def test_a_new_version_is_loaded_while_the_old_one_drains() -> None:
    old, new = adapter("a", "1"), adapter("a", "2")
    seen = Observed({**on(old)}, at(old))
    assert decide(wanted(new), seen, DIR) == [Inspect(new)]


CONFIG = b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"%s}'


def test_a_config_is_reduced_to_known_keys() -> None:
    assert reduced_config(CONFIG % b', "megatron_core": "os", "auto_map": null', 8, 16) == {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "bias": "none",
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (b', "auto_map": {"AutoModel": "x.Y"}', "auto_map"),
        (b', "use_dora": true', "DoRA"),
        (b', "bias": "all"', "bias"),
        (b', "peft_type": "IA3"', "LORA and PROMPT_TUNING"),
        (b', "peft_type": "PROMPT_TUNING"', "num_virtual_tokens is None"),
        (b', "r": 4', "manifest.json says rank 8"),
        (b', "r": true', "a rank must be an integer"),
        (b', "rank_pattern": {"q_proj": 64}', "rank 64 is above"),
        (b', "target_modules": []', "target_modules"),
        (b"}", "not JSON"),
    ],
)
def test_an_unsafe_or_unsupported_config_is_refused(more: bytes, words: str) -> None:
    with pytest.raises(ConfigRejected, match=words):
        reduced_config(CONFIG % more, 8, 16)


def test_a_tuned_prompts_config_is_reduced_too() -> None:
    config = (
        b'{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8, "prompt_tuning_init": "TEXT", "tokenizer_kwargs": {}}'
    )
    assert reduced_config(config, None, 8) == {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}


def test_the_newest_sample_of_the_metric_gives_the_active_adapters() -> None:
    def info(running: str, waiting: str, value: float) -> str:
        labels = f'max_lora="2",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
        return f"vllm:lora_requests_info{{{labels}}} {value}\n"

    text = "# TYPE vllm:lora_requests_info gauge\n" + info("old", "", 1.0) + info("a,b", "c", 2.0)
    assert active_adapters(text) == {"a", "b", "c"}
    counts = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"
    assert active_adapters(counts + text) == frozenset()  # the sample is outdated: no request runs
    assert active_adapters("") == frozenset()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no such adapter", "type": "NotFoundError"}}', "no such adapter"),
        (b'{"object": "error", "message": "no such adapter"}', "no such adapter"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b"<html>", "<html>"),
        (b"", "HTTP 500"),
    ],
)
def test_error_messages_are_read_from_every_form_of_answer(body: bytes, message: str) -> None:
    assert error_message(500, body) == message


def test_each_adapter_has_its_own_backoff() -> None:
    failures = Failures()
    waits = [failures.add("a", AdapterReason.STORAGE_UNAVAILABLE, "m", 0).retry_at for _ in range(9)]
    assert 0.7 <= waits[0] <= 1 and 21 <= waits[-1] <= 30
    seldom = [failures.add("b", AdapterReason.DIGEST_MISMATCH, "m", 0).retry_at for _ in range(9)]
    assert 7 <= seldom[0] <= 10 and 420 <= seldom[-1] <= 600
    assert failures.held_back(5) == {"a", "b"} and failures.held_back(700) == frozenset()
    failures.retry_now({AdapterReason.DIGEST_MISMATCH})
    assert failures.held_back(0) == {"a"}
    failures.retry_now()
    assert failures.held_back(0) == frozenset()
    assert failures.get("b") is not None  # the failure is still reported
    assert failures.add("a", AdapterReason.STORAGE_UNAVAILABLE, "m", 0).retry_at <= 1  # the backoff starts again


def test_retry_after_of_the_store_is_respected_up_to_a_limit() -> None:
    failures = Failures()
    assert failures.add("a", AdapterReason.STORAGE_THROTTLED, "m", 0, retry_after=17).retry_at == 17
    assert failures.add("b", AdapterReason.STORAGE_THROTTLED, "m", 0, retry_after=86400).retry_at == 120


def test_a_problem_that_every_check_finds_is_reported_once() -> None:
    failures = Failures()
    assert failures.note("a", AdapterReason.DISK_FULL, "needs 10, has 5")
    assert not failures.note("a", AdapterReason.DISK_FULL, "needs 10, has 6")
    assert failures.held_back(0) == frozenset()


def test_an_adapter_is_drained_only_after_a_whole_idle_period() -> None:
    idleness = Idleness()
    idleness.see(["a"], [], 0)
    idleness.see(["a"], ["a"], 5)
    idleness.see(["a"], [], 8)
    assert not idleness.drained(10, 12) and idleness.drained(10, 18) == {"a"}
    idleness.see(["a"], None, 19)  # the running requests are unknown
    assert not idleness.drained(10, 20)


def ready(readiness: Readiness, want: Wanted | None, engine: dict[str, str], failures: Failures | None = None) -> bool:
    if readiness.restarted(want, engine, DIR, (), False):
        readiness.start()
    return readiness.see(want, engine, DIR, failures or Failures())


def test_readiness_lasts_until_the_engine_restarts() -> None:
    one = Readiness()
    assert not ready(one, None, {})
    assert not ready(one, wanted(A), {})
    assert ready(one, wanted(A), at(A))
    assert ready(one, wanted(A, B), at(A))  # B was added later
    assert ready(one, wanted(B), at(A))  # A was removed and still drains
    assert ready(one, wanted(A, B), {**at(A), **at(B)})
    assert not ready(one, wanted(A, B), {})  # the engine has restarted without its adapters
    assert not ready(one, wanted(A, B), at(A))
    assert ready(one, wanted(A, B), {**at(A), **at(B)})


def test_a_permanently_failed_adapter_does_not_keep_the_pod_unready() -> None:
    failures = Failures()
    failures.add(B.engine_name, AdapterReason.STORAGE_UNAVAILABLE, "m", 0)
    one = Readiness()
    assert not ready(one, wanted(A, B), at(A), failures)
    failures.add(B.engine_name, AdapterReason.CREDENTIALS_INVALID, "m", 0)
    assert not ready(one, wanted(A, B), at(A), failures)  # else it would replace a pod that has its adapters
    failures.add(B.engine_name, AdapterReason.DIGEST_MISMATCH, "m", 0)
    assert ready(one, wanted(A, B), at(A), failures)


def test_residency_lists_the_state_of_every_adapter() -> None:
    failures = Failures()
    failures.add(B.engine_name, AdapterReason.DIGEST_MISMATCH, "changed", 0)
    gone, fresh = adapter("gone", "c"), adapter("fresh", "d")
    listed = resident_adapters(
        wanted(A, B, fresh),
        {**at(A), **at(gone)},
        DIR,
        {A.engine_name: OnDisk(A.digest, 7)},
        [B.engine_name],
        failures,
        {A.engine_name: 1.5},
        {A.engine_name: "its effect was not checked"},
    )
    assert listed[0].message == "its effect was not checked"
    assert [(one.adapter, one.state, one.reason) for one in listed] == [
        ("a-1.0.0", "Loaded", None),
        ("b-1.0.0", "Failed", "DigestMismatch"),  # a running retry does not hide the failure
        ("fresh-1.0.0", "Pending", None),
        ("gone-1.0.0", "Draining", None),
    ]
    assert (listed[0].load_seconds, listed[0].size_bytes) == (1.5, 7)
    assert listed[3].digest == "sha256:" + "c" * 12


def test_many_long_messages_fit_into_one_configmap() -> None:
    many = [adapter(f"a{number}", f"{number % 16:x}") for number in range(128)]
    failures = Failures()
    for one in many:
        failures.add(one.engine_name, AdapterReason.STORAGE_UNAVAILABLE, "m" * 5000, 0)

    def told() -> list[str]:
        return [one.message or "" for one in resident_adapters(wanted(*many), {}, DIR, {}, (), failures, {}, {})]

    assert {len(message) for message in told()} == {125} and told()[0].endswith("m…")
    failures.keep_only([many[0].engine_name])
    assert [len(message) for message in told()[:2]] == [1000, 0]
