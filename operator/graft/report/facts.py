"""The key figures and lists of a report's page, as texts (PURE)."""

from graft.api.evaluation import Gate
from graft.report import scores, wording
from graft.report.document import Report

Rows = list[tuple[str, str]]
STAGES = {
    "load": "load the model",
    "train": "train",
    "evaluate": "evaluate",
    "analyse": "analyse",
    "publish": "publish",
}


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return (name, value, remark) of the key figures. A figure that was not measured has no tile."""
    found: list[tuple[str, str, str]] = []
    main = scores.headline(scores.scores_of(report))
    if main is not None:
        form = wording.share if main.share else wording.number
        base = main.values.get("base")
        found.append((main.name, form(main.ours), f"base model {form(base)}" if base is not None else ""))
    if report.trainable_share is not None:
        of = f"{wording.count(report.trainable_parameters)} of {wording.count(report.total_parameters)}"
        found.append(("trained share", wording.share(report.trainable_share), of))
    if "train" in report.seconds:
        speed = report.resources.tokens_per_second
        found.append(
            (
                "training time",
                wording.duration(report.seconds["train"]),
                f"{wording.count(speed)} tokens/s" if speed else "",
            )
        )
    resources = report.resources
    if resources.peak_memory_bytes is not None:
        found.append(("peak memory", wording.size(resources.peak_memory_bytes), "of one GPU or process"))
    if resources.published_bytes is not None:
        base_size = resources.quantized_bytes or resources.base_bytes
        beside = f"base model {wording.size(base_size)}" if base_size and report.method != "full" else ""
        found.append(("published size", wording.size(resources.published_bytes), beside))
    if (over := latency_over_base(report)) is not None:
        found.append(("latency", wording.ratio(over), "per token, relative to the base model"))
    return found


def latency_over_base(report: Report) -> float | None:
    """Return the time per token of the version, not merged, divided by the base model's."""
    latency = report.analysis.latency if report.analysis else None
    if latency is None or not {"base", "tuned"} <= latency.variants.keys():
        return None
    return latency.variants["tuned"].seconds_per_token / latency.variants["base"].seconds_per_token


def costs(report: Report) -> Rows:
    """Return the rows for memory, time and size."""
    job, resources = report.job, report.resources
    rows = [(f"time to {STAGES.get(name, name)}", wording.duration(value)) for name, value in report.seconds.items()]
    rows += [
        ("tokens read in training", wording.count(report.tokens or None)),
        ("learned tokens: those that the loss covers", wording.count(report.learned_tokens)),
        ("tokens per second", wording.count(resources.tokens_per_second)),
        ("peak memory of one GPU or process", wording.size(resources.peak_memory_bytes)),
        ("published weights", wording.size(resources.published_bytes)),
        ("base model's weights, as stored", wording.size(resources.base_bytes)),
        ("base model's weights in 4 bits", wording.size(resources.quantized_bytes)),
        ("checkpoints kept until publication", str(job.checkpoints) if job.checkpoints else wording.ABSENT),
        ("resumed from step", wording.count(job.resumed_from)),
        ("attempts that ran out of memory", str(job.halvings) if job.halvings else wording.ABSENT),
    ]
    return [(name, value) for name, value in rows if value != wording.ABSENT]


def dataset(report: Report) -> Rows:
    """Return the rows about the dataset."""
    data, stats = report.dataset, report.dataset.statistics
    rows = [
        ("training examples", wording.count(data.train)),
        ("held-out examples", wording.count(data.held_out)),
        ("truncated to maxLength", wording.count(data.truncated)),
    ]
    if stats is not None:
        lengths = (stats.mean_tokens, stats.median_tokens, stats.p95_tokens, stats.max_tokens)
        rows += [
            ("lines left out", wording.count(stats.invalid)),
            *((f"left out: {reason}", wording.count(lines)) for reason, lines in stats.invalid_reasons.items()),
            *((f"lines with the unused field {name}", wording.count(n)) for name, n in stats.unread_fields.items()),
            ("held-out examples that are also in the training data", wording.count(stats.repeated)),
            ("date in the prompts", stats.prompt_date or wording.ABSENT),
            ("tokens of an example: mean, median, 95th percentile, longest", ", ".join(f"{n:.4g}" for n in lengths)),
        ]
    return rows


def provenance(report: Report) -> Rows:
    """Return the rows about the model, data, job, machine and software that the version was made with."""
    environment = report.environment
    return [
        ("base model", report.base_model.uri),
        ("base model's digest", report.base_model.digest or ""),
        *((f"dataset {role}", digest) for role, digest in report.dataset.digests.items()),
        ("recipe", report.recipe),
        ("job", f"{report.job.namespace}/{report.job.name}"),
        ("job's UID", report.job.uid),
        ("last attempt", report.job.attempt),
        ("digest of the version", report.digest or ""),
        *((f"SHA-256 of {name}", digest) for name, digest in report.weights.items()),
        ("hardware", hardware(report)),
        ("processes", str(environment.world_size) if environment.world_size > 1 else ""),
        ("CPU threads", str(environment.threads or "")),
        ("trainer image", environment.image),
        ("Python", environment.python),
        ("packages", ", ".join(f"{name} {version}" for name, version in environment.packages.items())),
    ]


def hardware(report: Report) -> str:
    """Return the devices of the run as text, such as 2 x NVIDIA H200 with 141 GB each."""
    environment = report.environment
    memory = environment.device_memory_bytes  # only GPUs have it. Several processes on CPUs are not several CPUs
    count = f"{environment.world_size} x " if environment.world_size > 1 and memory else ""
    each = f" with {wording.size(memory)}{' each' if count else ''}" if memory else ""
    return f"{count}{environment.device}{each}" if environment.device else ""


def gate_text(gate: Gate) -> str:
    """Return a text about what a gate requires."""
    over = {"base": "the base model", "fewShot": "the base model, few-shot", "current": "the current version"}
    asked = []
    if gate.min is not None:
        asked.append(f"at least {gate.min:g}")
    if gate.max is not None:
        asked.append(f"at most {gate.max:g}")
    if gate.min_gain is not None:
        better = f"better than {over[gate.over]} by at least {gate.min_gain:g}"
        asked.append(better if gate.min_gain else f"no worse than {over[gate.over]}")
    return ", and ".join(asked)
