"""The messages between operator, trainer, agent and gateway: files and ConfigMap keys.

The Kubernetes API is the only control plane, and object storage is the only data plane (docs/architecture.md). The
parts exchange only these messages. A reader ignores unknown fields, so parts of neighbouring versions work together.
It does not trust the writer: `Message.read` checks the limits of the message before it parses, and every field has bounds.

| module   | message      | written by | read by  | where                                                             |
|----------|--------------|------------|----------|-------------------------------------------------------------------|
| job      | JobFile      | operator   | trainer  | ConfigMap key job.json, mounted at /etc/graft/job.json            |
| job      | VersionFile  | operator   | trainer  | the same, for a pod that composes or imports a version            |
| progress | Progress     | trainer    | operator | object storage, runs/<job-uid>/<attempt>/progress.json            |
| progress | Termination  | trainer    | operator | the container's termination message, and Progress.failure         |
| agent    | Wanted       | operator   | agent    | ConfigMap <deployment>-wanted, key wanted.json                    |
| agent    | Residency    | agent      | operator | ConfigMap <deployment>-residency, one key per pod                 |
| agent    | trusted keys | operator   | agent    | ConfigMap graft-trusted-keys, operator's namespace, key ID -> key |
| gateway  | Routes       | operator   | gateway  | ConfigMaps labelled graft.dev/component=routes, key routes.json   |
| gateway  | root keys    | operator   | gateway  | Secret graft-gateway-keys, operator's namespace, name -> key      |
| gateway  | Demand       | gateway    | operator | ConfigMap graft-demand, one key per deployment and gateway        |

The module `message` has the base class of the messages and the reference to a base model. The module `mounts` has the
paths, ports and Secret names that the operator and the programs in its pods share. The module `enginekeys` has the keys
with which gateways and agents call engines.
"""
