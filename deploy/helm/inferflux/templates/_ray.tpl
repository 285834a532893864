{{/* Workers that are larger than a node: each is a Ray cluster of its own, made by KubeRay. */}}

{{/* Whether the workers of a pool are (its spec); empty: they are not. */}}
{{- define "inferflux.isSpread" -}}
{{- if gt (int (dig "parallelism" "nodes" 1 .)) 1 }}true{{ end -}}
{{- end -}}

{{/* Ranks of a whole worker, from its parallelism. */}}
{{- define "inferflux.numRanks" -}}
{{- mul (int (.tensor | default 1)) (int (.pipeline | default 1)) (int (.data | default 1)) -}}
{{- end -}}

{{/* One of a pool's Ray clusters: (dict "root" $ "pool" $pool "role" $role "index" 0). */}}
{{- define "inferflux.rayName" -}}
{{- printf "%s-%s-%s-%d" (include "inferflux.fullname" .root) .pool.name .role (int .index) -}}
{{- end -}}

{{/* The Secret with the token of all the chart's Ray clusters, unless a pool brings one: (dict "root" $ "spec" $spec). */}}
{{- define "inferflux.raySecretName" -}}
{{- dig "parallelism" "rayAuthSecret" "" .spec | default (printf "%s-ray" (include "inferflux.fullname" .root)) -}}
{{- end -}}

{{/* What makes the scheduler of the cluster place all pods of a worker or none. */}}
{{- define "inferflux.gangLabels" -}}
{{- $queue := .Values.ray.queue -}}
{{- if eq .Values.ray.gangScheduler "volcano" -}}
ray.io/scheduler-name: volcano
{{- with $queue }}
volcano.sh/queue-name: {{ . }}
{{- end }}
{{- else if eq .Values.ray.gangScheduler "scheduler-plugins" -}}
ray.io/gang-scheduling-enabled: "true"
{{- else if eq .Values.ray.gangScheduler "kueue" -}}
kueue.x-k8s.io/queue-name: {{ $queue }}
{{- end }}
{{- end -}}

{{/* Ray's own flags, the same on all nodes: what a rank needs and no more. (dict "ranks" 1 "gpus" 0) */}}
{{- define "inferflux.rayFlags" -}}
--node-ip-address="$POD_IP" --node-manager-port=6380 --object-manager-port=6381 --num-cpus=1 --object-store-memory=134217728 --disable-usage-stats
{{- if .gpus }} --num-gpus={{ .gpus }}{{ else }} --num-gpus=0 --resources='{"inferflux_rank": {{ .ranks }}}'{{ end -}}
{{- end -}}

{{/* What a schema can't say of workers on several nodes: (dict "root" $ "at" "pools[0].decode" "pool" $pool "role" $role). */}}
{{- define "inferflux.validateRay" -}}
{{- $spec := index .pool .role -}}
{{- $parallelism := $spec.parallelism -}}
{{- $nodes := int $parallelism.nodes -}}
{{- $ranks := int (include "inferflux.numRanks" $parallelism) -}}
{{- $gpus := int (dig "limits" "nvidia.com/gpu" 0 ($spec.resources | default dict)) -}}
{{- if eq .role "prefill" -}}
{{- fail (printf "%s.parallelism.nodes: %d; the ranks of a prefill worker share memory, and need one node" .at $nodes) -}}
{{- end -}}
{{- if not (has ($parallelism.executor | default "auto") (list "auto" "ray")) -}}
{{- fail (printf "%s.parallelism.nodes: %d nodes take the executor ray, it is %s" .at $nodes $parallelism.executor) -}}
{{- end -}}
{{- if $parallelism.rayAddress -}}
{{- fail (printf "%s.parallelism.rayAddress: with %d nodes the chart makes the Ray cluster; leave it out" .at $nodes) -}}
{{- end -}}
{{- if mod $ranks $nodes -}}
{{- fail (printf "%s.parallelism.nodes: %d ranks can't lie equally on %d nodes" .at $ranks $nodes) -}}
{{- end -}}
{{- if and $gpus (ne $gpus (div $ranks $nodes | int)) -}}
{{- fail (printf "%s.resources.limits: %d GPUs for %d ranks on each of %d nodes" .at $gpus (div $ranks $nodes) $nodes) -}}
{{- end -}}
{{- if ne (.pool.engine | default "vllm") "vllm" -}}
{{- fail (printf "%s.parallelism.nodes: %d; the engine %s has one rank" .at $nodes .pool.engine) -}}
{{- end -}}
{{- if ne (.pool.transport | default "auto") "nixl" -}}
{{- fail (printf "%s.parallelism.nodes: ranks on %d nodes read KV over the network: the pool's transport must be nixl" .at $nodes) -}}
{{- end -}}
{{- if or (dig "autoscaling" "enabled" false $spec) (eq (dig "planner" "mode" "" $spec) "act") -}}
{{- fail (printf "%s.parallelism.nodes: nothing scales workers of %d nodes by itself; set replicas, and neither autoscaling nor planner.mode act" .at $nodes) -}}
{{- end -}}
{{- $name := include "inferflux.rayName" (dict "root" .root "pool" .pool "role" .role "index" $spec.replicas) -}}
{{- if gt (len $name) 53 -}}
{{- fail (printf "%s: the name %s of its Ray clusters has %d characters, KubeRay takes 53; shorten pool or fullnameOverride" .at $name (len $name)) -}}
{{- end -}}
{{- if and (eq .root.Values.ray.gangScheduler "kueue") (not .root.Values.ray.queue) -}}
{{- fail "ray.queue: missing; gangScheduler kueue needs the name of a queue" -}}
{{- end -}}
{{- end -}}
