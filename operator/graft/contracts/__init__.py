"""What the parts say to each other: the files and ConfigMap keys between operator, training pod, agent and gateway.

The Kubernetes API is the only control plane and object storage the only data plane (docs/architecture.md); these models are
the whole traffic between the parts. A reader ignores what it does not know, so parts of neighbouring versions work together.

| message      | written by    | read by       | where                                                            |
|--------------|---------------|---------------|------------------------------------------------------------------|
| JobFile      | operator      | training pod  | ConfigMap key job.json, mounted at /etc/graft/job.json           |
| VersionFile  | operator      | training pod  | the same, for a pod that composes or imports a version           |
| Progress     | training pod  | operator      | object storage, runs/<job-uid>/<attempt>/progress.json           |
| Termination  | training pod  | operator      | the container's termination message, and Progress.failure        |
| Wanted       | operator      | agent         | ConfigMap <deployment>-wanted, key wanted.json                   |
| Residency    | agent         | operator      | ConfigMap <deployment>-residency, one key per pod                |
| Trusted keys | operator      | agents        | ConfigMap graft-trusted-keys of the operator's namespace: key id -> key   |
| Routes       | operator      | gateway       | ConfigMaps labelled graft.dev/component=routes, key routes.json  |
| Demand       | gateway       | operator      | ConfigMap graft-demand, one key per deployment and gateway       |
"""
