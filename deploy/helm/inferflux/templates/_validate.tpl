{{/* What a schema can't say. Each message names the value. */}}

{{- define "inferflux.validate" -}}
{{- $names := list -}}
{{- range $i, $pool := .Values.pools -}}
{{- $at := printf "pools[%d]" $i -}}
{{- if has $pool.name $names -}}
{{- fail (printf "%s.name: %q is the name of an earlier pool" $at $pool.name) -}}
{{- end -}}
{{- $names = append $names $pool.name -}}
{{- $storage := $pool.storage | default dict -}}
{{- if eq ($pool.engine | default "vllm") "vllm" -}}
{{- if eq (empty $storage.claim) (empty $storage.hostPath) -}}
{{- fail (printf "%s.storage: the engine vllm needs either claim or hostPath" $at) -}}
{{- end -}}
{{- end -}}
{{- with $pool.sharedMemory -}}
{{- if eq (empty .claim) (empty .hostPath) -}}
{{- fail (printf "%s.sharedMemory: needs either claim or hostPath" $at) -}}
{{- end -}}
{{- end -}}
{{- if and (eq ($pool.transport | default "auto") "shm") (not $pool.sharedMemory) -}}
{{- fail (printf "%s.transport: shm between pods needs %s.sharedMemory" $at $at) -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
{{- $spec := index $pool $role -}}
{{- $scaling := $spec.autoscaling | default dict -}}
{{- if $scaling.enabled -}}
{{- range $key := list "minReplicas" "maxReplicas" "averageValue" -}}
{{- if not (index $scaling $key) -}}
{{- fail (printf "%s.%s.autoscaling.%s: missing" $at $role $key) -}}
{{- end -}}
{{- end -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "%s.%s.autoscaling.minReplicas: %v is above maxReplicas %v" $at $role $scaling.minReplicas $scaling.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- $isPlanned := eq (dig "planner" "mode" "" $spec) "act" -}}
{{- if and $isPlanned $scaling.enabled -}}
{{- fail (printf "%s.%s.planner.mode: act, but the autoscaler of the pool acts too" $at $role) -}}
{{- end -}}
{{- if and $isPlanned (ne $.Values.planner.mode "kubernetes") -}}
{{- fail (printf "%s.%s.planner.mode: act needs planner.mode kubernetes, it is %s" $at $role $.Values.planner.mode) -}}
{{- end -}}
{{- $parallelism := $spec.parallelism | default dict -}}
{{- if include "inferflux.isSpread" $spec -}}
{{- include "inferflux.validateRay" (dict "root" $ "at" (printf "%s.%s" $at $role) "pool" $pool "role" $role) -}}
{{- else if and (eq ($parallelism.executor | default "auto") "ray") (not $parallelism.rayAuthSecret) -}}
{{- fail (printf "%s.%s.parallelism.rayAuthSecret: missing; the executor ray needs a Secret with the cluster's token" $at $role) -}}
{{- end -}}
{{- $rollout := $spec.rollout | default dict -}}
{{- if and (hasKey $rollout "maxSurge") (hasKey $rollout "maxUnavailable") (has (toString $rollout.maxSurge) (list "0" "0%")) (has (toString $rollout.maxUnavailable) (list "0" "0%")) -}}
{{- fail (printf "%s.%s.rollout: maxSurge and maxUnavailable are both 0: nothing could ever change" $at $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.gateway.autoscaling -}}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- fail (printf "gateway.autoscaling.minReplicas: %v is above maxReplicas %v" .minReplicas .maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.redis.mode "external") (not .Values.redis.external.existingSecret) -}}
{{- fail "redis.external.existingSecret: missing; it names the Secret with the URL" -}}
{{- end -}}
{{- if and (eq .Values.tls.mode "cert-manager") (not .Values.tls.issuer.name) -}}
{{- fail "tls.issuer.name: missing; mode cert-manager needs an issuer" -}}
{{- end -}}
{{- if and (eq .Values.tls.mode "secret") (not .Values.tls.existingSecretPrefix) -}}
{{- fail "tls.existingSecretPrefix: missing; mode secret needs the names of the Secrets" -}}
{{- end -}}
{{- if and .Values.tls.existingSecretPrefix (ne .Values.tls.mode "secret") -}}
{{- fail (printf "tls.existingSecretPrefix: belongs to mode secret, the mode is %s" .Values.tls.mode) -}}
{{- end -}}
{{- end -}}
