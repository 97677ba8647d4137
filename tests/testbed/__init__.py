"""Real clusters for the demo and the tests, on one Linux machine without Docker.

- `ControlPlane`: etcd, kube-apiserver, controllers and scheduler on loopback. kwok can simulate nodes for it.
- `Cluster`: a control plane in its own network namespace, with one real node: containerd, kubelet, kube-proxy, CoreDNS.
- `S3Server`: versitygw, which serves a folder.
"""
