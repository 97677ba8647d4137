"""Real clusters for the demo and the tests, on one Linux machine without Docker.

- `ControlPlane`: etcd, kube-apiserver, controllers and scheduler on loopback, optionally with nodes that kwok simulates.
- `Cluster`: the same in a network namespace of its own, with one real node: containerd, kubelet, kube-proxy, CoreDNS.
- `S3Server`: versitygw over a folder.
"""
