"""Helpers for the tests of the reports: report.json as a run of each method writes it. No run is needed."""

from typing import Any

from graft.report.document import Report

KINDS = {"q_proj": [64, 64], "v_proj": [64, 64], "down_proj": [64, 128]}
DEPTH = 4


def matrices(rank: int) -> list[dict[str, Any]]:
    found = []
    for layer in range(DEPTH):
        for kind, shape in KINDS.items():
            values = [2.0 ** -(index + layer / 2) for index in range(rank)]
            found.append(
                {
                    "name": f"model.layers.{layer}.{kind}",
                    "kind": kind,
                    "layer": layer,
                    "shape": shape,
                    "singularValues": values,
                    "norm": sum(value**2 for value in values) ** 0.5,
                    "relativeNorm": 0.05 * (layer + 1),
                    "effectiveRank": 3.0 + layer / 4,
                }
            )
    return found


def document(method: str = "lora", **changes: Any) -> dict[str, Any]:
    """Return report.json in schema version 2."""
    times = {"full": 100.0, "lora": 80.0, "qlora": 150.0, "promptTuning": 60.0}
    memory = {"full": 8e9, "lora": 4e9, "qlora": 2e9, "promptTuning": 3e9}
    score = {"full": 0.9, "lora": 0.81, "qlora": 0.72, "promptTuning": 0.45}
    latency = {"base": {"prefillSeconds": 0.02, "secondsPerToken": 0.01}, "tuned": {"prefillSeconds": 0.03, "secondsPerToken": 0.012}}  # fmt: skip
    fields: dict[str, Any] = {
        "schemaVersion": 2,
        "job": {"name": f"support-{method.lower()}", "namespace": "shop", "uid": "uid-1", "attempt": "pod-1"},
        "adapter": "support",
        "version": "1.2.0",
        "baseModel": {"name": "tiny", "uri": "s3://bucket/models/tiny", "digest": "sha256:base"},
        "method": method,
        "hyperparameters": {"maxSteps": 20, "learningRate": 2e-4, "rank": 8, "packing": False},
        "trainableParameters": 1000 if method != "full" else 100_000,
        "totalParameters": 100_000,
        "dataset": {"digests": {"train": "sha256:train"}, "train": 24, "heldOut": 6},
        "evaluation": {
            "suites": [{"name": "general", "role": "forgetting"}, {"name": "faq", "role": "task"}],
            "gates": [{"metric": "exactMatch", "min": 0.5}],
        },
        "metrics": {
            "trainLoss": 0.1, "evalLoss": 0.2, "base/evalLoss": 1.4, "exactMatch": score[method], "base/exactMatch": 0.1,
            "fewShot/exactMatch": 0.3, "faq/f1": 0.6, "base/faq/f1": 0.5, "general/loss": 2.0, "base/general/loss": 1.8,
            "forgetting/general": 0.2,
        },
        "precision": {
            "exactMatch": {"n": 60}, "base/exactMatch": {"n": 60}, "fewShot/exactMatch": {"n": 60},
            "evalLoss": {"n": 60, "standardError": 0.01}, "faq/f1": {"n": 40, "standardError": 0.05},
        },
        "weights": {"adapter_model.safetensors": "ab" * 32},
        "samples": [{"prompt": "Which team?", "expected": "The light lab.", "answer": "The light lab.", "base/answer": "No."}],
        "lossCurve": [{"step": step, "loss": 2.0 / step, "learningRate": 1e-4, "gradNorm": 3.0 / step} for step in range(1, 20, 2)]
        + [{"step": step, "evalLoss": 2.2 / step} for step in (10, 20)],
        "tokens": 1200,
        "seconds": {"load": 2.0, "train": times[method], "evaluate": 5.0},
        "resources": {
            "peakMemoryBytes": memory[method], "tokensPerSecond": 12.5, "baseBytes": 7_000_000,
            "publishedBytes": 7_000_000 if method == "full" else 30_000,
            "quantizedBytes": 2_000_000 if method == "qlora" else None,
        },
        "analysis": {
            "update": {"matrices": matrices(8), "total": 12, "rank": 8},
            "representation": {
                "layers": [{"part": "decoder", "layer": layer, "cka": 1 - layer / 20} for layer in range(DEPTH + 1)],
                "examples": 6,
                "tokens": 60,
            },
            "latency": {"variants": latency, "runs": 5, "promptTokens": 20, "newTokens": 16},
        },
        "environment": {"python": "3.11", "device": "NVIDIA H200", "deviceMemoryBytes": 151_000_000_000, "worldSize": 2, "packages": {"torch": "2.15.0"}},
        "createdAt": "2026-01-02T03:04:05Z",
    }  # fmt: skip
    return fields | changes


def make_report(method: str = "lora", **changes: Any) -> Report:
    return Report.model_validate(document(method, **changes))


def old_document() -> dict[str, Any]:
    """Return report.json in schema version 1."""
    return {
        "schemaVersion": 1,
        "job": {"name": "old", "namespace": "shop", "uid": "uid-0", "attempt": "pod-0"},
        "adapter": "support",
        "version": "1.0.0",
        "baseModel": {"name": "tiny", "uri": "s3://bucket/models/tiny", "digest": None},
        "method": "lora",
        "hyperparameters": {"maxSteps": 20, "rank": 16},
        "targetModules": ["q_proj"],
        "trainableParameters": 1000,
        "totalParameters": 100_000,
        "dataset": {"digests": {"train": "sha256:train"}, "train": 24, "truncated": 0, "dropped": 0, "heldOut": 6},
        "metrics": {"evalLoss": 0.3, "base/evalLoss": 1.4, "exactMatch": 0.7, "base/exactMatch": 0.1},
        "samples": [],
        "lossCurve": [{"step": 1, "loss": 2.0, "learningRate": 1e-4}, {"step": 20, "loss": 0.3, "learningRate": 0.0}],
        "tokens": 1200,
        "seconds": {"load": 1.0, "train": 40.0, "evaluate": 2.0},
        "environment": {"python": "3.11", "packages": {}, "device": "x86_64", "threads": 2},
        "createdAt": "2026-01-01T00:00:00Z",
    }
