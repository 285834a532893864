{{/* Parts of network policies. */}}

{{- define "inferflux.peer" -}}
podSelector:
  matchLabels:
    {{- include "inferflux.component" (dict "root" .root "component" .component "pool" "") | nindent 4 }}
{{- end -}}

{{- define "inferflux.dns" -}}
- to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ .Values.networkPolicy.dnsNamespace }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{- define "inferflux.fromMonitoring" -}}
{{- with .Values.networkPolicy.monitoringNamespace }}
- from:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ . }}
  ports:
    - port: 9090
{{- end }}
{{- end -}}

{{- define "inferflux.policyHead" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "inferflux.fullname" .root }}-{{ .component }}
  labels:
    {{- include "inferflux.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  podSelector:
    matchLabels:
      {{- include "inferflux.component" (dict "root" .root "component" .component "pool" "") | nindent 6 }}
  policyTypes: [Ingress, Egress]
{{- end -}}
