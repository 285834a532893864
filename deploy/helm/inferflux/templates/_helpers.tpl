{{/* Names and labels. */}}

{{- define "inferflux.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else if contains "inferflux" .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-inferflux" (.Release.Name | trunc 20 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{/* The components beside the workers, each with a Service. */}}
{{- define "inferflux.services" -}}
gateway policy registry{{ if .Values.guardrails.enabled }} guardrails{{ end }}
{{- end -}}

{{- define "inferflux.selector" -}}
app.kubernetes.io/name: inferflux
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "inferflux.labels" -}}
{{ include "inferflux.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Selector of one component: (dict "root" $ "component" "gateway" "pool" ""). */}}
{{- define "inferflux.component" -}}
{{ include "inferflux.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
inferflux.io/pool: {{ . }}
{{- end }}
{{- end -}}

{{/* Names of Secrets. */}}

{{- define "inferflux.secretName" -}}
{{- .Values.secrets.existingSecret | default (printf "%s-keys" (include "inferflux.fullname" .)) -}}
{{- end -}}

{{- define "inferflux.apiKeySecretName" -}}
{{- .Values.apiKeys.existingSecret | default (printf "%s-api-keys" (include "inferflux.fullname" .)) -}}
{{- end -}}

{{- define "inferflux.redisSecretName" -}}
{{- if eq .Values.redis.mode "bundled" -}}
{{- printf "%s-redis" (include "inferflux.fullname" .) -}}
{{- else -}}
{{- .Values.redis.external.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* (dict "root" $ "role" "gateway") */}}
{{- define "inferflux.tlsSecretName" -}}
{{- $prefix := .root.Values.tls.existingSecretPrefix | default (printf "%s-tls" (include "inferflux.fullname" .root)) -}}
{{- printf "%s-%s" $prefix .role -}}
{{- end -}}

{{/* By digest if there is one, else by tag: (dict "root" $ "image" "gateway"). */}}
{{- define "inferflux.image" -}}
{{- $images := .root.Values.images -}}
{{- $image := index $images .image -}}
{{- $name := printf "%s:%s" $image.repository ($image.tag | default $images.tag | default .root.Chart.AppVersion) -}}
{{- if $image.digest }}{{ $name = printf "%s@%s" $image.repository $image.digest }}{{ end -}}
{{- if $images.prefix }}{{ printf "%s/%s" $images.prefix $name }}{{ else }}{{ $name }}{{ end -}}
{{- end -}}

{{/* What all pods have: one user, no privileges. */}}
{{- define "inferflux.podCommon" -}}
enableServiceLinks: false
# Process 1 is then not ours: a SIGTERM ends a process that does not listen to it yet.
shareProcessNamespace: true
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.podSecurity.runAsUser }}
  runAsGroup: {{ .Values.podSecurity.runAsUser }}
  fsGroup: {{ .Values.podSecurity.runAsUser }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "inferflux.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The environment that all our processes take. */}}
{{- define "inferflux.env" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: INFERFLUX_INSTANCE_ID
  value: $(POD_NAME)
- name: INFERFLUX_HOME
  value: /inferflux
- name: INFERFLUX_OPS_ADDRESS
  value: {{ include "inferflux.podHost" . }}:9090
- name: INFERFLUX_OPS_TOKEN_FILE
  value: /inferflux/secrets/ops.token
- name: INFERFLUX_LOG_LEVEL
  value: {{ .Values.logLevel }}
{{- with .Values.telemetry.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ $.Values.telemetry.sampleRatio | quote }}
{{- end }}
{{- end -}}

{{/* The pod's own address, as it is written before a port. */}}
{{- define "inferflux.podHost" -}}
{{- if .Values.ipv6 }}[$(POD_IP)]{{ else }}$(POD_IP){{ end -}}
{{- end -}}

{{- define "inferflux.extraEnv" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Progress: the operations port answers from the event loop that does the work. */}}
{{- define "inferflux.probes" -}}
startupProbe:
  httpGet:
    path: /livez
    port: ops
  periodSeconds: 1
  timeoutSeconds: 2
  failureThreshold: {{ .startSeconds }}
livenessProbe:
  httpGet:
    path: /livez
    port: ops
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet:
    path: /readyz
    port: ops
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end -}}

{{/* Volumes with a role's certificate and with the keys it needs: (dict "root" $ "role" "policy" "keys" (list ..)). */}}
{{- define "inferflux.identityVolumes" -}}
- name: pki
  secret:
    secretName: {{ include "inferflux.tlsSecretName" . }}
    defaultMode: 0440
    items:
      - key: ca.crt
        path: ca.crt
      - key: tls.crt
        path: {{ .role }}.crt
      - key: tls.key
        path: {{ .role }}.key
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      - secret:
          name: {{ include "inferflux.secretName" .root }}
          items:
            {{- range .keys }}
            - key: {{ . }}
              path: {{ . }}
            {{- end }}
      {{- if has .role (list "policy" "registry") }}
      - secret:
          name: {{ include "inferflux.redisSecretName" .root }}
          items:
            - key: {{ .root.Values.redis.urlKey }}
              path: redis.url
      {{- end }}
      {{- if eq .role "policy" }}
      - secret:
          name: {{ include "inferflux.apiKeySecretName" .root }}
          items:
            - key: api-keys
              path: api-keys
      {{- end }}
{{- if and (has .role (list "policy" "registry")) (eq .root.Values.redis.mode "external") .root.Values.redis.external.caSecret }}
- name: redis-tls
  secret:
    secretName: {{ .root.Values.redis.external.caSecret }}
    defaultMode: 0440
{{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .tmpSize | default "256Mi" }}
{{- end -}}

{{- define "inferflux.identityMounts" -}}
- name: pki
  mountPath: /inferflux/pki
  readOnly: true
- name: secrets
  mountPath: /inferflux/secrets
  readOnly: true
{{- if and (has .role (list "policy" "registry")) (eq .root.Values.redis.mode "external") .root.Values.redis.external.caSecret }}
- name: redis-tls
  mountPath: /inferflux/redis-tls
  readOnly: true
{{- end }}
- name: tmp
  mountPath: /tmp
{{- end -}}

{{/* Where pods go: (dict "root" $ "spec" .. "component" .. "pool" ..). */}}
{{- define "inferflux.placement" -}}
{{- with .spec.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- $selector := include "inferflux.component" . }}
{{- with .spec.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ .topologyKey }}
    maxSkew: {{ .maxSkew | default 1 }}
    whenUnsatisfiable: {{ .whenUnsatisfiable | default "ScheduleAnyway" }}
    labelSelector:
      matchLabels:
        {{- $selector | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}
