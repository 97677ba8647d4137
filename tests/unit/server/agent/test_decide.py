"""What the agent decides, without anything running."""

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
from graft_server.agent.storage.adapterconfig import ConfigRejected, check_tokenizer_config, reduced_config

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
        ([A], Observed({}, None, sizes=sizes(A)), [Download(A)]),  # the engine still loads its model: fetch meanwhile
        ([A], Observed(on(A), None), []),
        ([A], Observed(on(A), {}), [Load(A)]),
        ([A], Observed(on(A), at(A)), []),
        ([A], Observed({}, at(A), sizes=sizes(A)), [Download(A)]),  # an eviction would read its files again
        ([A], Observed({A.engine_name: OnDisk("sha256:other")}, {}, sizes=sizes(A)), [Download(A)]),
        ([A], Observed(on(A), {A.engine_name: "/elsewhere"}), [Unload(A.engine_name)]),
        ([A], Observed({}, {A.engine_name: "/elsewhere"}), [Unload(A.engine_name)]),
        ([A, B], Observed({}, {}, held_back=[A.engine_name], sizes=sizes(A, B)), [Download(B)]),
        ([A, B], Observed({}, {}, busy=[A.engine_name], sizes=sizes(A, B)), [Download(B)]),
        ([A, B], Observed({}, {}, sizes=sizes(B)), [Inspect(A), Download(B)]),  # there is enough room for both
        ([], Observed(on(A), at(A)), []),  # draining
        ([], Observed(on(A), at(A), drained=[A.engine_name]), [Unload(A.engine_name)]),
        ([], Observed(on(A), at(A), drained=[A.engine_name], busy=[A.engine_name]), []),
        ([], Observed(on(A), {}), []),  # kept for a quick way back
        ([], Observed(on(A, 10), {}, capacity=Capacity(9, 9)), [Delete(A.engine_name)]),
        ([], Observed(on(A, 10), at(A), capacity=Capacity(9, 9)), []),  # the engine may read it again
        ([], Observed(on(A, 10), None, capacity=Capacity(9, 9)), []),  # what the engine still reads is unknown
        ([A], Observed(on(B, 10), {}, sizes=sizes(A), capacity=Capacity(15, 15)), [Delete(B.engine_name)]),
        ([A], Observed(on(B, 10), None, sizes=sizes(A), capacity=Capacity(15, 15)), []),  # there will be room
        ([A], Observed(on(B, 10), at(B), sizes=sizes(A), capacity=Capacity(15, 15)), []),  # when it has drained
        ([], Observed({}, {}, partial=[A.engine_name]), [Discard(A.engine_name)]),
        ([A], Observed({}, {}, partial=[A.engine_name], sizes=sizes(A)), [Download(A)]),
        ([A], Observed(on(A), at(A), partial=[A.engine_name]), [Discard(A.engine_name)]),
        ([], Observed({}, {"base": "/models/base", "someone-elses": "/x"}, drained=["someone-elses"]), []),
    ],
)
def test_decisions(want: list[WantedAdapter], seen: Observed, actions: list[object]) -> None:
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
        ([], Observed(on(B), {}), []),  # it is not loaded
        ([A], Observed({}, {}, sizes=sizes(B)), [Inspect(A)]),  # what is wanted comes first
        ([A], Observed(on(A), {}, sizes=sizes(B)), [Load(A), Download(B)]),
        (
            [A],
            Observed(on(A, 10), at(A), sizes=sizes(B), capacity=Capacity(19, 30)),
            [],
        ),  # it is refused without a word
        ([A], Observed(on(A, 10), at(A), sizes=sizes(B), capacity=Capacity(30, 19)), []),  # it would go again at once
        ([], Observed(on(A, 10), {}, sizes=sizes(B), capacity=Capacity(15, 15)), []),  # nothing goes for it
        ([A], Observed(on(B, 10), {}, sizes=sizes(A), capacity=Capacity(15, 15)), [Delete(B.engine_name)]),
        ([A, B], Observed({**on(A), **on(B)}, at(A)), [Load(B)]),
        # What is wanted and missing ends it, and has its room when it is gone.
        ([A], Observed({}, {}, sizes=sizes(A, B), partial=[B.engine_name]), [Download(A), Discard(B.engine_name)]),
        (
            [A],
            Observed({}, {}, sizes=sizes(A, B), partial=[B.engine_name], capacity=Capacity(15, 15)),
            [Discard(B.engine_name)],
        ),
        ([A], Observed({}, {}, sizes=sizes(A, B), busy=[B.engine_name], capacity=Capacity(15, 15)), []),
        # One that cannot be had is not waited for.
        ([A], Observed({}, {}, sizes=sizes(B), failed=[A.engine_name], held_back=[A.engine_name]), [Download(B)]),
    ],
)
def test_what_is_expected_is_brought_and_not_loaded(
    want: list[WantedAdapter], seen: Observed, actions: list[object]
) -> None:
    assert decide(wanted(*want).model_copy(update={"expected": [B]}), seen, DIR) == actions


def test_what_is_expected_comes_one_at_a_time_and_is_counted_on_its_way() -> None:
    c = adapter("c", "c")
    want = wanted(A).model_copy(update={"expected": [B, c]})

    def actions(**seen: object) -> list[object]:
        picture = Observed(on(A, 10), at(A), sizes=sizes(B, c), capacity=Capacity(25, 25))
        return list(decide(want, replace(picture, **seen), DIR))  # type: ignore[arg-type]

    assert actions() == [Download(B)]
    assert actions(busy=[B.engine_name], partial=[B.engine_name]) == []
    assert actions(held_back=[B.engine_name], partial=[B.engine_name]) == [], "its part takes the room"
    assert actions(held_back=[B.engine_name]) == [Download(c)]
    assert actions(sizes={}) == [Inspect(B, expected=True)]


def names(actions: list[object], kind: type) -> list[str]:
    return [action.name for action in actions if isinstance(action, kind)]  # type: ignore[attr-defined]


def test_the_last_ones_do_not_fit_and_no_other_suffers() -> None:
    c = adapter("c", "c")
    gib = 1 << 30
    seen = Observed(on(A, gib), at(A), sizes=sizes(B, c, size=gib), capacity=Capacity(5 * gib // 2, 0))
    actions = decide(wanted(A, B, c), seen, DIR)
    assert names(actions, Download) == [B.engine_name] and names(actions, Refuse) == [c.engine_name]
    refusal = next(action for action in actions if isinstance(action, Refuse))
    assert refusal.message.startswith("it needs 1.00 GiB, but only 0.50 GiB of 2.50 GiB are left for it: attach fewer")


def test_where_room_is_short_nobody_takes_that_of_one_before_it() -> None:
    seen = Observed({}, {}, sizes=sizes(B), capacity=Capacity(15, 15))
    assert decide(wanted(A, B), seen, DIR) == [Inspect(A)]  # it may be as large, and it is wanted first
    failed = Observed(
        {}, {}, sizes=sizes(B), capacity=Capacity(15, 15), failed=[A.engine_name], held_back=[A.engine_name]
    )
    assert decide(wanted(A, B), failed, DIR) == [Download(B)]  # but nobody waits for one that cannot be had


def test_kept_versions_make_room_the_least_recently_used_first() -> None:
    old, older, loaded_one = adapter("old", "1"), adapter("older", "2"), adapter("loaded", "3")
    there = {**on(old, 10, used_at=200), **on(older, 10, used_at=100), **on(loaded_one, 10, used_at=1)}
    room = Observed(there, at(loaded_one), sizes=sizes(A), capacity=Capacity(35, 35))
    assert decide(wanted(A), room, DIR) == [Delete(older.engine_name)]  # first the room, then the download
    then = Observed({**on(old, 10), **on(loaded_one, 10)}, at(loaded_one), sizes=sizes(A), capacity=Capacity(35, 35))
    assert decide(wanted(A), then, DIR) == [Download(A)]
    assert decide(wanted(old), then, DIR) == [Load(old)]  # a roll-back needs no download


def test_one_deletion_is_seen_before_the_next_is_decided() -> None:
    going, kept = adapter("going", "1"), adapter("kept", "2")
    seen = Observed(
        {**on(going, 10), **on(kept, 10)}, {}, busy=[going.engine_name], sizes=sizes(A), capacity=Capacity(25, 25)
    )
    assert decide(wanted(A), replace(seen, deleting=True), DIR) == []
    assert decide(wanted(A), replace(seen, busy=()), DIR) == [Delete(going.engine_name)]


def test_nothing_is_deleted_for_an_adapter_that_does_not_fit_even_then() -> None:
    kept = adapter("kept", "1")
    seen = Observed(on(kept, 10), {}, sizes=sizes(A, size=50), capacity=Capacity(40, 40))
    actions = decide(wanted(A), seen, DIR)
    assert names(actions, Refuse) == [A.engine_name] and names(actions, Delete) == []


def test_room_that_a_running_download_will_fill_is_taken() -> None:
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
        (b', "r": true', "not a rank"),
        (b', "rank_pattern": {"q_proj": 64}', "rank 64 is above"),
        (b', "target_modules": []', "target_modules"),
        (b"}", "not JSON"),
    ],
)
def test_a_config_that_may_not_be_served(more: bytes, words: str) -> None:
    with pytest.raises(ConfigRejected, match=words):
        reduced_config(CONFIG % more, 8, 16)


def test_a_tuned_prompts_config_is_reduced_too() -> None:
    config = (
        b'{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8, "prompt_tuning_init": "TEXT", "tokenizer_kwargs": {}}'
    )
    assert reduced_config(config, None, 8) == {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}


def test_a_tokenizer_that_names_code_is_refused() -> None:
    check_tokenizer_config(b'{"model_max_length": 8}')
    with pytest.raises(ConfigRejected, match="auto_map"):
        check_tokenizer_config(b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')


def test_what_runs_is_the_newest_sample() -> None:
    def info(running: str, waiting: str, value: float) -> str:
        labels = f'max_lora="2",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
        return f"vllm:lora_requests_info{{{labels}}} {value}\n"

    text = "# TYPE vllm:lora_requests_info gauge\n" + info("old", "", 1.0) + info("a,b", "c", 2.0)
    assert active_adapters(text) == {"a", "b", "c"}
    counts = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"
    assert active_adapters(counts + text) == frozenset()  # a leftover: nothing runs at all
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
def test_both_shapes_of_errors(body: bytes, message: str) -> None:
    assert error_message(500, body) == message


def test_back_off_per_adapter() -> None:
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
    assert failures.get("b") is not None  # still to be told
    assert failures.add("a", AdapterReason.STORAGE_UNAVAILABLE, "m", 0).retry_at <= 1  # from the start again


def test_a_store_that_asks_for_patience_gets_it_within_reason() -> None:
    failures = Failures()
    assert failures.add("a", AdapterReason.STORAGE_THROTTLED, "m", 0, retry_after=17).retry_at == 17
    assert failures.add("b", AdapterReason.STORAGE_THROTTLED, "m", 0, retry_after=86400).retry_at == 120


def test_what_is_found_at_every_look_is_news_once() -> None:
    failures = Failures()
    assert failures.note("a", AdapterReason.DISK_FULL, "needs 10, has 5")
    assert not failures.note("a", AdapterReason.DISK_FULL, "needs 10, has 6")
    assert failures.held_back(0) == frozenset()


def test_idle_means_idle_all_the_time() -> None:
    idleness = Idleness()
    idleness.see(["a"], [], 0)
    idleness.see(["a"], ["a"], 5)
    idleness.see(["a"], [], 8)
    assert not idleness.drained(10, 12) and idleness.drained(10, 18) == {"a"}
    idleness.see(["a"], None, 19)  # not known
    assert not idleness.drained(10, 20)


def ready(readiness: Readiness, want: Wanted | None, engine: dict[str, str], failures: Failures | None = None) -> bool:
    if readiness.restarted(want, engine, DIR, (), False):
        readiness.start()
    return readiness.see(want, engine, DIR, failures or Failures())


def test_readiness_is_latched_per_start_of_the_engine() -> None:
    one = Readiness()
    assert not ready(one, None, {})
    assert not ready(one, wanted(A), {})
    assert ready(one, wanted(A), at(A))
    assert ready(one, wanted(A, B), at(A))  # added later
    assert ready(one, wanted(B), at(A))  # taken away, still draining
    assert ready(one, wanted(A, B), {**at(A), **at(B)})
    assert not ready(one, wanted(A, B), {})  # the engine has forgotten: it started again
    assert not ready(one, wanted(A, B), at(A))
    assert ready(one, wanted(A, B), {**at(A), **at(B)})


def test_an_adapter_that_failed_for_good_does_not_keep_the_pod_from_serving_the_others() -> None:
    failures = Failures()
    failures.add(B.engine_name, AdapterReason.STORAGE_UNAVAILABLE, "m", 0)
    one = Readiness()
    assert not ready(one, wanted(A, B), at(A), failures)
    failures.add(B.engine_name, AdapterReason.CREDENTIALS_INVALID, "m", 0)
    assert not ready(one, wanted(A, B), at(A), failures)  # it would take the place of a pod that has its adapters
    failures.add(B.engine_name, AdapterReason.DIGEST_MISMATCH, "m", 0)
    assert ready(one, wanted(A, B), at(A), failures)


def test_residency_says_what_is_so() -> None:
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
    )
    assert [(one.adapter, one.state, one.reason) for one in listed] == [
        ("a-1.0.0", "Loaded", None),
        ("b-1.0.0", "Failed", "DigestMismatch"),  # the retry that runs does not hide it
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
        return [one.message or "" for one in resident_adapters(wanted(*many), {}, DIR, {}, (), failures, {})]

    assert {len(message) for message in told()} == {125} and told()[0].endswith("m…")
    failures.keep_only([many[0].engine_name])
    assert [len(message) for message in told()[:2]] == [1000, 0]
