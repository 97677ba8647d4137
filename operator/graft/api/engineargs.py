"""The flags of vLLM that spec.engineArgs may have, and why others are refused.

The list says what is allowed, because every version of vLLM has new flags, and some of them run code or open files. All
flags are those of `vllm serve` 0.32. tests/handover compares them with the real parser.
"""

from typing import Any

# With a value: --flag=value.
VALUES = (
    "attention-backend",
    "block-size",
    "chat-template-content-format",
    "default-chat-template-kwargs",
    "kv-cache-dtype",
    "limit-mm-per-prompt",
    "logprobs-mode",
    "long-prefill-token-threshold",
    "max-cudagraph-capture-size",
    "max-logprobs",
    "max-num-batched-tokens",
    "mm-processor-cache-gb",
    "moe-backend",
    "optimization-level",
    "override-generation-config",
    "performance-mode",
    "reasoning-parser",
    "response-role",
    "scheduling-policy",
    "seed",
    "stream-interval",
    "tokenizer-mode",
)
# Without a value.
SWITCHES = (
    "async-scheduling",
    "no-async-scheduling",
    "disable-cascade-attn",
    "disable-custom-all-reduce",
    "disable-sliding-window",
    "enable-chunked-prefill",
    "no-enable-chunked-prefill",
    "enable-expert-parallel",
    "enable-force-include-usage",
    "enable-prefix-caching",
    "no-enable-prefix-caching",
    "enable-prompt-tokens-details",
    "enforce-eager",
    "exclude-tools-when-tool-choice-none",
    "fully-sharded-loras",
    "language-model-only",
    "skip-mm-profiling",
)

# Why -> flags. Every other flag that is not in the lists above is refused, too.
REFUSED: dict[str, tuple[str, ...]] = {
    "runs code of a file, of a package or of the model's repository": (
        "additional-config", "compilation-config", "distributed-executor-backend", "ec-transfer-config", "hf-overrides",
        "io-processor-plugin", "kv-transfer-config", "logits-processors", "middleware", "model-class-overrides",
        "profiler-config", "reasoning-parser-plugin", "scheduler-cls", "structured-outputs-config", "tool-parser-plugin",
        "trust-remote-code", "worker-cls", "worker-extension-cls",
    ),
    "reads pickled weights or tensors, which can run code": (
        "enable-mm-embeds", "enable-prompt-embeds", "load-format", "model-loader-extra-config", "pt-load-map-location",
    ),
    "reads or writes files of the container": (
        "allowed-local-media-path", "config", "download-dir", "generation-config", "hf-config-path", "log-config-file",
        "mm-encoder-fp8-scale-path",
    ),
    "sends data to other hosts, or gets data from them": (
        "allowed-media-domains", "collect-detailed-traces", "data-parallel-address", "hf-token", "kv-events-config",
        "master-addr", "media-io-kwargs", "nnodes", "otlp-traces-endpoint", "speculative-config", "tool-server",
    ),
    "changes who may call the engine, or where": (
        "api-key", "allowed-origins", "enable-sleep-mode", "enable-tokenizer-info-endpoint", "enable-trace-replay", "host",
        "port", "root-path", "ssl-certfile", "ssl-keyfile", "trust-request-chat-template", "trust-request-mm-kwargs", "uds",
    ),
    "writes the words of users to the log": ("enable-log-outputs", "enable-log-requests"),
    "is set by Graft from spec.baseModel, spec.adapters and the base model's source": (
        "enable-lora", "lora-modules", "model", "revision", "served-model-name", "tokenizer", "tokenizer-revision",
    ),
    "is set by Graft from spec.limits": ("max-cpu-loras", "max-lora-rank", "max-loras", "max-model-len", "max-num-seqs"),
    "is set by Graft from the placement, spec.resources and spec.quantization": (
        "dtype", "gpu-memory-utilization", "pipeline-parallel-size", "quantization", "tensor-parallel-size",
    ),
    "has a field of its own: spec.chatTemplate, spec.toolCallParser, spec.shutdownSeconds": (
        "chat-template", "enable-auto-tool-choice", "shutdown-timeout", "tool-call-parser",
    ),
}  # fmt: skip


def _cel(flags: tuple[str, ...]) -> str:
    return "[" + ", ".join(f"'--{flag}'" for flag in flags) + "]"


_ALLOWED = f"(a in {_cel(SWITCHES)} || (a.contains('=') && a.split('=', 2)[0] in {_cel(VALUES)}))"
ENGINE_ARGS_RULES: dict[str, Any] = {
    "x-kubernetes-validations": [
        {
            "rule": f"self.all(a, {_ALLOWED})",
            "message": "engineArgs: a flag is not in the list of docs/reference.md#engine-arguments, or its =value is missing or "
            "too much. Flags that run code, open files, reach other hosts or belong to another field are refused",
            "messageExpression": f"'engineArgs: ' + self.filter(a, !{_ALLOWED})[0].split('=', 2)[0] + "
            "' is refused, or its =value is missing or too much. docs/reference.md#engine-arguments lists the allowed flags, and "
            "why others are refused'",
        }
    ]
}


def reference() -> list[str]:
    """Return the section of docs/reference.md."""
    lines = [
        "",
        "## Engine arguments",
        "",
        "`AdapterDeployment.spec.engineArgs` are flags of `vllm serve`. Each item is one flag: `--enforce-eager`, or `--seed=7`.",
        "Values are used as they stand, without a shell. These flags are allowed:",
        "",
        "- with a value: " + ", ".join(f"`--{flag}`" for flag in VALUES),
        "- without a value: " + ", ".join(f"`--{flag}`" for flag in SWITCHES),
        "",
        "All other flags are refused. The most important ones, by what the flag does:",
        "",
    ]
    lines += [f"- {why}: {', '.join(f'`--{flag}`' for flag in flags)}" for why, flags in REFUSED.items()]
    return lines
