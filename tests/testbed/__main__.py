"""Build, start, stop or show a cluster of the testbed: python -m testbed build | up | down | status [--name NAME]"""

import argparse
import sys

from testbed import binaries
from testbed.cluster import Cluster
from testbed.shell import main_guard, say


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testbed", description=__doc__)
    parser.add_argument("command", choices=["build", "up", "down", "status"])
    parser.add_argument("--name", default="demo")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.name)
    if arguments.command == "build":
        binaries.build(list(binaries.SOURCES))
    elif arguments.command == "up":
        cluster.up()
        say(f"export KUBECONFIG={cluster.kubeconfig}")
    elif arguments.command == "down":
        cluster.down()
        say(f"cluster {arguments.name} is deleted")
    else:
        say(f"cluster {arguments.name} {'is running' if cluster.running() else 'is not running'}")


if __name__ == "__main__":
    sys.exit(main_guard(main))
