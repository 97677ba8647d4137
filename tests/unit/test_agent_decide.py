"""What the agent decides, without anything running."""

import pytest
from graft.contracts import Wanted, WantedAdapter, engine_name
from graft_server.agent.adapterconfig import ConfigRejected, check_tokenizer_config, reduced_config
from graft_server.agent.decide import Delete, Download, Load, Observed, Unload, decide
from graft_server.agent.download import OnDisk
from graft_server.agent.engine import active_adapters, error_message
from graft_server.agent.memory import Failures, Idleness, Readiness
from graft_server.agent.residency import resident_adapters

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


def on(one: WantedAdapter) -> dict[str, str]:
    return {one.engine_name: one.digest}


@pytest.mark.parametrize(
    ("want", "seen", "actions"),
    [
        ([], Observed({}, {}), []),
        ([A], Observed({}, {}), [Download(A)]),
        ([A], Observed({}, None), [Download(A)]),  # the engine still loads its model: fetch meanwhile
        ([A], Observed(on(A), None), []),
        ([A], Observed(on(A), {}), [Load(A)]),
        ([A], Observed(on(A), at(A)), []),
        ([A], Observed({}, at(A)), [Download(A)]),  # its files are lost, and an eviction would read them again
        ([A], Observed({A.engine_name: "sha256:other"}, {}), [Download(A)]),
        ([A], Observed(on(A), {A.engine_name: "/elsewhere"}), [Unload(A.engine_name)]),
        ([A, B], Observed({}, {}, held_back=[A.engine_name]), [Download(B)]),
        ([A, B], Observed({}, {}, busy=[A.engine_name]), [Download(B)]),
        ([], Observed(on(A), at(A)), []),  # draining
        ([], Observed(on(A), at(A), drained=[A.engine_name]), [Unload(A.engine_name)]),
        ([], Observed(on(A), at(A), drained=[A.engine_name], busy=[A.engine_name]), []),
        ([], Observed(on(A), {}), [Delete(A.engine_name)]),
        ([], Observed(on(A), None), []),  # what the engine still reads is unknown
        ([], Observed({}, {"base": "/models/base", "someone-elses": "/x"}, drained=["someone-elses"]), []),
    ],
)
def test_decisions(want: list[WantedAdapter], seen: Observed, actions: list[object]) -> None:
    assert decide(wanted(*want), seen, DIR) == actions


def test_a_new_version_is_loaded_while_the_old_one_drains() -> None:
    old, new = adapter("a", "1"), adapter("a", "2")
    seen = Observed({**on(old)}, at(old))
    assert decide(wanted(new), seen, DIR) == [Download(new)]


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
        (b', "peft_type": "PROMPT_TUNING"', "only LORA"),
        (b', "r": 4', "manifest.json says rank 8"),
        (b', "r": true', "not a rank"),
        (b', "rank_pattern": {"q_proj": 64}', "rank 64 is above"),
        (b', "target_modules": []', "target_modules"),
        (b"}", "no JSON"),
    ],
)
def test_a_config_that_may_not_be_served(more: bytes, words: str) -> None:
    with pytest.raises(ConfigRejected, match=words):
        reduced_config(CONFIG % more, 8, 16)


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
    waits = [failures.add("a", "R", "m", permanent=False, now=0).retry_at for _ in range(9)]
    assert 0.7 <= waits[0] <= 1 and 21 <= waits[-1] <= 30
    failures.add("b", "R", "m", permanent=True, now=0)
    assert failures.held_back(5) == {"a", "b"} and failures.held_back(100) == frozenset()
    failures.retry_now()
    assert failures.held_back(0) == frozenset()
    assert failures.get("b") is not None  # still to be told


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
    failures.add(B.engine_name, "StorageUnavailable", "m", permanent=False, now=0)
    one = Readiness()
    assert not ready(one, wanted(A, B), at(A), failures)
    failures.add(B.engine_name, "DigestMismatch", "m", permanent=True, now=0)
    assert ready(one, wanted(A, B), at(A), failures)


def test_residency_says_what_is_so() -> None:
    failures = Failures()
    failures.add(B.engine_name, "DigestMismatch", "changed", permanent=True, now=0)
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
