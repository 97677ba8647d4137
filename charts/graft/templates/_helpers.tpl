{{/* The prefix of the names <prefix>-operator, <prefix>-gateway and <prefix>-store. */}}
{{- define "graft.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select a component's pods. They stay the same over upgrades. Argument: list of component and root. */}}
{{- define "graft.selectorLabels" -}}
{{- $root := index . 1 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 0 }}
{{- end -}}

{{/* Labels of a component's objects. Argument: list of component and root. */}}
{{- define "graft.labels" -}}
{{- $root := index . 1 -}}
{{ include "graft.selectorLabels" . }}
app.kubernetes.io/part-of: graft
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image reference with the digest, else the tag, else the chart's appVersion. Argument: list of the image's values and root. */}}
{{- define "graft.image" -}}
{{- $image := index . 0 -}}
{{- $root := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "graft.imagePullSecrets" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Pod Security `restricted`. fsGroup makes mounted Secrets and volumes readable for the user. Without a fixed user, the cluster sets
both, as OpenShift does. */}}
{{- define "graft.podSecurityContext" -}}
runAsNonRoot: true
{{- if .Values.podSecurity.fixedUser }}
runAsUser: {{ int64 .Values.podSecurity.runAsUser }}
runAsGroup: {{ int64 .Values.podSecurity.runAsUser }}
fsGroup: {{ int64 .Values.podSecurity.runAsUser }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "graft.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What proxy and trustedCA add to the environment of every container, here and in the pods that the operator creates. The proxy is
not used inside the cluster. */}}
{{- define "graft.networkEnv" -}}
{{- with .Values.proxy }}
{{- if or .httpProxy .httpsProxy }}
{{- with .httpProxy }}
- name: HTTP_PROXY
  value: {{ . | quote }}
{{- end }}
{{- with .httpsProxy }}
- name: HTTPS_PROXY
  value: {{ . | quote }}
{{- end }}
- name: NO_PROXY
  value: {{ concat (list "localhost" "127.0.0.1" "::1" ".svc" ".cluster.local" "$(KUBERNETES_SERVICE_HOST)") (.noProxy | default list) | join "," | quote }}
{{- end }}
{{- end }}
{{- if .Values.trustedCA.configMap }}
{{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "AWS_CA_BUNDLE" }}
- name: {{ . }}
  value: /etc/graft-ca/ca.crt
{{- end }}
{{- end }}
{{- end -}}

{{- define "graft.networkMounts" -}}
{{- if .Values.trustedCA.configMap }}
- {name: trusted-ca, mountPath: /etc/graft-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "graft.networkVolumes" -}}
{{- with .Values.trustedCA.configMap }}
- name: trusted-ca
  configMap:
    name: {{ . }}
    items:
      - {key: {{ $.Values.trustedCA.key }}, path: ca.crt}
{{- end }}
{{- end -}}

{{/* What the values add to a container and its pod: of all components, and of one. Argument: list of the component's values and root. */}}
{{- define "graft.env" -}}
{{- include "graft.networkEnv" (index . 1) }}
{{- with (index . 0).env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "graft.volumeMounts" -}}
{{- include "graft.networkMounts" (index . 1) }}
{{- with (index . 0).volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "graft.volumes" -}}
{{- include "graft.networkVolumes" (index . 1) }}
{{- with (index . 0).volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The template of the operator's own pods, with proxy and trustedCA, as JSON. Argument: list of podTemplate and root. */}}
{{- define "graft.podTemplate" -}}
{{- $own := index . 0 | default dict | deepCopy -}}
{{- $root := index . 1 -}}
{{- range $field, $name := dict "env" "graft.networkEnv" "volumeMounts" "graft.networkMounts" "volumes" "graft.networkVolumes" -}}
{{- with include $name $root | trim -}}
{{- $_ := set $own $field (concat (get $own $field | default list) (fromYamlArray .)) -}}
{{- end -}}
{{- end -}}
{{- toJson $own -}}
{{- end -}}

{{/* The scheduling fields of a pod. Argument: the component's values. */}}
{{- define "graft.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* The spread of a component's pods: its values, else over nodes if possible. Argument: list of component, its values and root. */}}
{{- define "graft.spread" -}}
{{- $values := index . 1 -}}
{{- if $values.topologySpreadConstraints -}}
topologySpreadConstraints: {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
{{- else -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "graft.selectorLabels" (list (index . 0) (index . 2)) | nindent 8 }}
{{- end -}}
{{- end -}}

{{/* The S3 endpoint. Pods of every namespace can reach it at this address. */}}
{{- define "graft.storeEndpoint" -}}
{{- if .Values.objectStore.embedded.enabled -}}
{{- printf "http://%s-store.%s.svc:7070" (include "graft.fullname" .) .Release.Namespace -}}
{{- else -}}
{{- .Values.objectStore.external.endpoint -}}
{{- end -}}
{{- end -}}

{{/* The name of the Secret with the operator's key of the object store. */}}
{{- define "graft.storeSecret" -}}
{{- if and (not .Values.objectStore.embedded.enabled) (eq .Values.objectStore.credentials "webIdentity") -}}
{{- .Values.objectStore.external.existingSecret -}}
{{- else if not .Values.objectStore.embedded.enabled -}}
{{- required "objectStore.external.existingSecret is needed when objectStore.embedded.enabled is false: set it to the name of a Secret with the keys access-key-id and secret-access-key" .Values.objectStore.external.existingSecret -}}
{{- else if .Values.objectStore.embedded.existingSecret -}}
{{- .Values.objectStore.embedded.existingSecret -}}
{{- else if include "graft.earlierStoreKey" . -}}
{{- include "graft.fullname" . }}-store-root
{{- else -}}
{{- include "graft.fullname" . }}-store-key
{{- end -}}
{{- end -}}

{{/* The entries of the Secret with the root key that an earlier chart made in this release, as JSON, or nothing. An upgrade keeps it,
because people upload with this key. Without a cluster there is none. */}}
{{- define "graft.earlierStoreKey" -}}
{{- if and .Values.objectStore.embedded.enabled (not .Values.objectStore.embedded.existingSecret) -}}
{{- $found := lookup "v1" "Secret" .Release.Namespace (printf "%s-store-root" (include "graft.fullname" .)) -}}
{{- if and $found (eq (dig "metadata" "annotations" "meta.helm.sh/release-name" "" $found) .Release.Name) -}}
{{- toJson $found.data -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Not empty if the operator creates the Secret with the root key of the embedded store. */}}
{{- define "graft.createsStoreKey" -}}
{{- if and .Values.objectStore.embedded.enabled (not .Values.objectStore.embedded.existingSecret) (not (include "graft.earlierStoreKey" .)) -}}
true
{{- end -}}
{{- end -}}

{{- define "graft.gatewayUrl" -}}
{{- default (printf "http://%s-gateway.%s.svc:%v" (include "graft.fullname" .) .Release.Namespace .Values.gateway.service.port) .Values.gateway.url -}}
{{- end -}}

{{/* The environment of every Python container: nothing is imported from its working folder or from HOME. kopf asks for the user's name, and
fails for a user that the image's /etc/passwd does not list, unless the environment has it. */}}
{{- define "graft.pythonEnv" -}}
- name: PYTHONSAFEPATH
  value: "1"
- name: PYTHONNOUSERSITE
  value: "1"
- name: HOME
  value: /tmp
- name: USER
  value: graft
- name: LOGNAME
  value: graft
{{- end -}}

{{/* NetworkPolicyPeers: all addresses except clouds' metadata, link-local addresses and networkPolicy.closed. */}}
{{- define "graft.addresses" -}}
{{- $addresses := .Files.Get "files/addresses.yaml" | fromYamlArray -}}
{{- range $peer := $addresses -}}
{{- range $.Values.networkPolicy.closed -}}
{{- if eq (contains ":" .) (contains ":" $peer.ipBlock.cidr) -}}
{{- $_ := set $peer.ipBlock "except" (append $peer.ipBlock.except .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $addresses -}}
{{- end -}}

{{/* The API server's ports, as JSON. Its Service has 443. The pods behind it may have another port. */}}
{{- define "graft.apiServerPorts" -}}
{{- $ports := .Values.networkPolicy.apiServerPorts -}}
{{- if not $ports -}}
{{- $ports = list 443 6443 -}}
{{- $slice := lookup "discovery.k8s.io/v1" "EndpointSlice" "default" "kubernetes" -}}
{{- range (dig "ports" list $slice) -}}
{{- $ports = append $ports (int .port) -}}
{{- end -}}
{{- end -}}
{{- $ports | uniq | toJson -}}
{{- end -}}

{{/* The egress rule for DNS. 5353 is the port of OpenShift's DNS pods. */}}
{{- define "graft.dnsEgress" -}}
- to:
    - namespaceSelector: {}
    {{- include "graft.addresses" . | nindent 4 }}
    {{- range .Values.networkPolicy.dnsServers }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    {{- range list 53 5353 }}
    - {protocol: UDP, port: {{ . }}}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}

{{/* The egress rule for the API server. */}}
{{- define "graft.apiServerEgress" -}}
- to: {{- include "graft.addresses" . | nindent 4 }}
  ports:
    {{- range include "graft.apiServerPorts" . | fromJsonArray }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}

{{/*
The egress rules of the operator for URLs, as graft.manifests.network makes them for other pods: the port of a URL outside of the
cluster, and the namespace of a Service. A Service's pods may listen on another port than the Service.
*/}}
{{- define "graft.urlEgress" -}}
{{- $ports := list 443 -}}
{{- $namespaces := list -}}
{{- range $address := (list .Values.objectStore.external.endpoint .Values.objectStore.external.adminUrl .Values.objectStore.webIdentity.stsEndpoint .Values.huggingface.endpoint .Values.proxy.httpProxy .Values.proxy.httpsProxy) -}}
{{- if $address -}}
{{- $url := urlParse $address -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (eq $url.scheme "http" | ternary "80" "443") | int -}}
{{- $service := regexMatch "^[^.]+\\.[^.]+(\\.svc(\\..+)?)?$" $url.hostname -}}
{{- if $service -}}
{{- $namespaces = append $namespaces (index (splitList "." $url.hostname) 1) -}}
{{- end -}}
{{- if not (and $service (regexMatch "^[^.]+\\.[^.]+\\.svc(\\..+)?$" $url.hostname)) -}}
{{- $ports = append $ports $port -}}
{{- end -}}
{{- end -}}
{{- end -}}
- to: {{- include "graft.addresses" . | nindent 4 }}
  ports:
    {{- range uniq $ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- range uniq $namespaces }}
- to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: {{ . }}}
{{- end }}
{{- end -}}
