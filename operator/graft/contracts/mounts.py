"""Paths, ports and Secret names that the operator writes into pods and that the programs in the pods use."""

JOB_FILE = "/etc/graft/job.json"
STORAGE_DIR = "/etc/graft/storage"  # the Secret graft-storage, one file per key
HF_TOKEN_FILE = "/etc/graft/huggingface/token"  # noqa: S105 - a path
WORK_DIR = "/work"  # emptyDir, shared by the containers prepare and train
PVC_DIR = "/mnt/pvc"  # pvc://claim/path is mounted at PVC_DIR/claim
CONFIGMAP_DIR = "/mnt/configmap"  # configMap://name/key is mounted at CONFIGMAP_DIR/name
ADAPTERS_DIR = "/adapters"  # emptyDir, shared by agent (writes) and engine (reads)
ENGINE_DIR = "/access"  # emptyDir, shared by agent (writes) and engine (reads): who may call, certificate
CALLERS_FILE = "callers.json"  # in ENGINE_DIR; graft_server.callers reads it
MODULES_DIR = "python"  # in ENGINE_DIR: the module graft_callers, for vLLM
CERTIFICATE_FILE, PRIVATE_KEY_FILE = "tls.crt", "tls.key"  # in ENGINE_DIR
ENGINE_PORT = 8000
AGENT_PORT = 8081  # /readyz, /livez, /metrics
GATEWAY_PORT = 8080
STORAGE_SECRET = "graft-storage"  # noqa: S105 - a name
HF_SECRET = "graft-huggingface"  # noqa: S105 - a name
