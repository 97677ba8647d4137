"""`python -m graft` runs the operator. `python -m graft uninstall` removes Graft's finalizer from all resources after
the operator was removed."""

import asyncio
import json
import logging
import os
import sys
import time
from typing import Any

from graft.contracts.addresses import IPV4_ANY, host_port

LOG_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A formatter that writes one JSON object per line. The `extra` of a log call becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {
            key: value for key, value in vars(record).items() if key not in LOG_FIELDS and not key.startswith("k8s_")
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging() -> None:
    """Write structured logs to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=os.environ.get("GRAFT_LOG_LEVEL", "INFO"), handlers=[handler], force=True)
    for noisy in ("kopf", "botocore", "urllib3", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def run() -> None:
    """Run the operator until SIGTERM."""
    import kopf

    from graft import handlers  # noqa: F401 - registers with kopf

    # The kubelet probes the pod's first address, of either family.
    listening = host_port(os.environ.get("POD_IP", IPV4_ANY), 8080)
    address = os.environ.get("GRAFT_LIVENESS", f"http://{listening}/healthz")
    # standalone: the chart runs one replica with the strategy Recreate. kopf's peering is not a lease, and every write
    # is safe to repeat.
    kopf.run(clusterwide=True, standalone=True, liveness_endpoint=address)


def main() -> int:
    configure_logging()
    command = sys.argv[1] if len(sys.argv) > 1 else "run"
    if command == "run":
        run()
        return 0
    if command == "uninstall":
        from graft.reconcile.shared.uninstall import uninstall

        asyncio.run(uninstall())
        return 0
    print(f"unknown command {command}; usage: python -m graft [run | uninstall]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
